/* What two processors of a Linux guest cost each other: measured for SECONDS each, on processors 0 and 1.
 *
 *   smpbench SECONDS
 *
 * ipi        membarrier(2) while a thread of ours runs on the other processor: an interrupt there, waited for
 * shootdown  a page that the other processor uses is given back (MADV_DONTNEED): its translation is removed there
 * pipe       one byte there and back between processes on different processors, which sleep meanwhile
 * fork       fork, exit, wait, wherever the scheduler likes
 *
 * Prints one line: "SMPBENCH ipi=… shootdown=… pipe=… fork=…", each per second. Static. */
#define _GNU_SOURCE
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static atomic_int stop, ready;
static volatile uint64_t *page;
static double seconds;

static void fail(const char *what)
{
	perror(what);
	_exit(1);
}

static void pin(int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof set, &set))
		fail("SMPBENCH sched_setaffinity");
}

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static double rate(void (*once)(void))
{
	double start = now(), end = start;
	unsigned long count = 0;
	while (end - start < seconds) {
		for (int burst = 0; burst < 8; burst++)
			once();
		count += 8;
		end = now();
	}
	return count / (end - start);
}

static void *busy_elsewhere(void *unused)
{
	pin(1);
	while (!stop) {
		(void)page[0];
		ready = 1;
	}
	return unused;
}

static void barrier(void)
{
	if (syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0))
		fail("SMPBENCH membarrier");
}

static void shootdown(void)
{
	page[1] = 1;
	if (madvise((void *)page, 4096, MADV_DONTNEED))
		fail("SMPBENCH madvise");
}

static int there[2], back[2];

static void ping(void)
{
	char byte = 0;
	if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
		fail("SMPBENCH pipe");
}

static void fork_once(void)
{
	int status;
	pid_t pid = fork();
	if (pid == 0)
		_exit(0);
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
		fail("SMPBENCH fork");
}

static double with_busy_thread(void (*once)(void))
{
	pthread_t thread;
	double result;
	stop = ready = 0;
	if (pthread_create(&thread, NULL, busy_elsewhere, NULL))
		fail("SMPBENCH pthread_create");
	while (!ready)
		sched_yield();
	result = rate(once);
	stop = 1;
	pthread_join(thread, NULL);
	return result;
}

static double pipes(void)
{
	char byte;
	double result;
	if (pipe(there) || pipe(back))
		fail("SMPBENCH pipe");
	pid_t pid = fork();
	if (pid < 0)
		fail("SMPBENCH fork");
	if (pid == 0) {
		pin(1);
		close(there[1]);
		while (read(there[0], &byte, 1) == 1 && write(back[1], &byte, 1) == 1)
			;
		_exit(0);
	}
	result = rate(ping);
	close(there[1]);
	waitpid(pid, NULL, 0);
	return result;
}

int main(int count, char **arguments)
{
	cpu_set_t all;
	double ipi, shootdowns, pings, forks;

	seconds = count > 1 ? atof(arguments[1]) : 1.0;
	if (sched_getaffinity(0, sizeof all, &all) || CPU_COUNT(&all) < 2) {
		printf("SMPBENCH needs two processors\n");
		return 1;
	}
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED)
		fail("SMPBENCH mmap");
	if (syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0))
		fail("SMPBENCH membarrier");
	pin(0);
	ipi = with_busy_thread(barrier);
	shootdowns = with_busy_thread(shootdown);
	pings = pipes();
	sched_setaffinity(0, sizeof all, &all);
	forks = rate(fork_once);
	printf("SMPBENCH ipi=%.1f shootdown=%.1f pipe=%.1f fork=%.1f\n", ipi, shootdowns, pings, forks);
	return 0;
}
