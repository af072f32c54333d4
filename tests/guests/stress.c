/* Loads all processors of a Linux guest with what needs its processors to agree, and checks the contents.
 *
 *   stress SECONDS
 *
 * remap    one thread maps fresh pages over old ones and publishes a generation; readers on all other processors
 *          must never see an older one (TLB shootdown)
 * protect  a page becomes read-only; writes on another processor must fault from then on
 * anon     pages come, are filled, read back and go, on every processor
 * fork     copy on write: a child on another processor and its parent must not see each other's writes
 * pipe     a token goes round all processors; its number rises by one at each
 * futex    a lock that all processors take: the sum must come out
 * clock    CLOCK_MONOTONIC and TSC must not go back between two processors ("warp")
 *
 * They take turns of half a second, then all of them have one together.
 *
 * Ends with one line: "STRESS done seconds=… remap=… … errors=N warps=N". Static: runs without a C library beside it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define MAX_CPUS 32
#define PAGE 4096
#define WORDS (PAGE / 8)
#define REMAP_PAGES 16
#define FORK_PAGES 32
#define MAX_MESSAGES 40

#define TURN_US 500000

enum { REMAP, PROTECT, ANON, FORK, PIPE, FUTEX, CLOCK, ALL, ENDED };
static atomic_int turn;
static int cpus;
static atomic_int stop;
static atomic_ulong errors, warps, largest_warp;
static atomic_ulong remaps, protections, faults, mappings, forks, hops, locks, clock_reads;

static void error(const char *what, unsigned long expected, unsigned long found)
{
	if (atomic_fetch_add(&errors, 1) < MAX_MESSAGES)
		printf("STRESS error: %s: expected %lu, found %lu\n", what, expected, found);
}

static void futex(void *word, int operation, unsigned value)
{
	syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

/* The next turn; sleepers need no timer, which would be most of the load. */
static void change_turn(int next)
{
	atomic_store(&turn, next);
	futex(&turn, FUTEX_WAKE, INT_MAX);
}

/* To be called while waiting for another thread of the same kind: others may have their turn. */
static void wait_a_moment(int kind)
{
	int now = atomic_load(&turn);
	if (now == kind)
		_mm_pause();
	else if (now == ALL)
		sched_yield();
	else if (!stop)
		futex(&turn, FUTEX_WAIT, now);
}

/* To be called before each round of a kind; 0 at the end. */
static int may_go_on(int kind)
{
	for (;;) {
		int now = atomic_load(&turn);
		if (atomic_load(&stop))
			return 0;
		if (now == kind || now == ALL)
			return 1;
		futex(&turn, FUTEX_WAIT, now);
	}
}

static void pin(int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu % cpus, &set);
	if (sched_setaffinity(0, sizeof set, &set))
		error("sched_setaffinity", 0, errno);
}

static void *map_pages(void *where, size_t pages)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (where ? MAP_FIXED : 0);
	void *got = mmap(where, pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (got == MAP_FAILED) {
		perror("STRESS error: mmap");
		_exit(3);
	}
	return got;
}

/* ------------------------------------------------------------ remap */

static volatile uint64_t *remap_area;
static atomic_ulong published;
static struct { _Alignas(64) atomic_ulong seen; } readers[MAX_CPUS];

static void *remap_writer(void *unused)
{
	pin(0);
	for (unsigned long generation = 1; may_go_on(REMAP); generation++) {
		map_pages((void *)remap_area, REMAP_PAGES);
		for (int page = 0; page < REMAP_PAGES; page++)
			remap_area[page * WORDS] = generation;
		atomic_store(&published, generation);
		remaps++;
		for (int cpu = 1; cpu < cpus; cpu++)
			while (atomic_load(&readers[cpu].seen) < generation && !stop)
				wait_a_moment(REMAP);
	}
	return unused;
}

static void *remap_reader(void *number)
{
	long cpu = (long)number;
	pin(cpu);
	while (!stop) {
		unsigned long generation = atomic_load(&published);
		/* The writer waits for all readers: until we say that we have seen this one, nothing newer is mapped. */
		if (generation == atomic_load(&readers[cpu].seen)) {
			wait_a_moment(REMAP);
			continue;
		}
		for (int page = 0; page < REMAP_PAGES; page++) {
			uint64_t value = remap_area[page * WORDS];
			if (value != generation)
				error("stale page", generation, value);
		}
		atomic_store(&readers[cpu].seen, generation);
	}
	return NULL;
}

/* ------------------------------------------------------------ protect */

enum { WRITABLE = 1, WRITTEN, READ_ONLY, TRIED };
static volatile uint64_t *guarded;
static atomic_int phase;
static __thread sigjmp_buf after_fault;
static __thread volatile sig_atomic_t expects_fault;

static void on_fault(int number)
{
	if (expects_fault)
		siglongjmp(after_fault, 1);
	_exit(100 + number);
}

static int wait_while(int value)
{
	while (atomic_load(&phase) == value) {
		if (stop)
			return 0;
		wait_a_moment(PROTECT);
	}
	return 1;
}

static void *protect_owner(void *unused)
{
	pin(1);
	while (may_go_on(PROTECT)) {
		if (mprotect((void *)guarded, PAGE, PROT_READ | PROT_WRITE))
			error("mprotect", 0, errno);
		atomic_store(&phase, WRITABLE);
		if (!wait_while(WRITABLE))
			break;
		if (mprotect((void *)guarded, PAGE, PROT_READ))
			error("mprotect", 0, errno);
		uint64_t before = *guarded;
		atomic_store(&phase, READ_ONLY);
		if (!wait_while(READ_ONLY))
			break;
		if (*guarded != before)
			error("read-only page changed", before, *guarded);
		protections++;
	}
	return unused;
}

static void *protect_writer(void *unused)
{
	volatile uint64_t written = 0; /* outlives siglongjmp */
	pin(0);
	while (!stop) {
		int now = atomic_load(&phase);
		if (now == WRITABLE) {
			if (*guarded != written)
				error("guarded page", written, *guarded);
			*guarded = ++written;
			atomic_store(&phase, WRITTEN);
		} else if (now == READ_ONLY) {
			expects_fault = 1;
			if (sigsetjmp(after_fault, 1) == 0) {
				*guarded = written + 1;
				error("write to a read-only page", 0, 1);
			} else {
				faults++;
			}
			expects_fault = 0;
			atomic_store(&phase, TRIED);
		} else {
			wait_a_moment(PROTECT);
		}
	}
	return unused;
}

/* ------------------------------------------------------------ anonymous memory, fork */

static void *anon(void *number)
{
	unsigned random = (unsigned)(long)number * 7919 + 1;
	pin((long)number);
	while (may_go_on(ANON)) {
		size_t pages = 1 + random % 64;
		uint64_t *area = map_pages(NULL, pages);
		for (size_t word = 0; word < pages * WORDS; word += 64)
			area[word] = random ^ word;
		if (random & 0x10000)
			sched_yield();
		for (size_t word = 0; word < pages * WORDS; word += 64)
			if (area[word] != (random ^ word))
				error("anonymous page", random ^ word, area[word]);
		munmap(area, pages * PAGE);
		random = random * 1103515245 + 12345;
		mappings++;
	}
	return NULL;
}

static int child(uint64_t *area, uint64_t base, int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu % cpus, &set);
	if (sched_setaffinity(0, sizeof set, &set))
		return 3;
	for (size_t word = 0; word < FORK_PAGES * WORDS; word += 128) {
		if (area[word] != base + word)
			return 1;
		area[word] = ~word;
	}
	for (size_t word = 0; word < FORK_PAGES * WORDS; word += 128)
		if (area[word] != ~word)
			return 2;
	return 0;
}

static void *forker(void *number)
{
	long cpu = (long)number;
	uint64_t *area = map_pages(NULL, FORK_PAGES);
	pin(cpu);
	for (uint64_t round = 0; may_go_on(FORK); round++) {
		uint64_t base = round << 32 | cpu;
		int status;
		for (size_t word = 0; word < FORK_PAGES * WORDS; word += 128)
			area[word] = base + word;
		pid_t pid = fork();
		if (pid == 0)
			_exit(child(area, base, cpu + 1));
		if (pid < 0 || waitpid(pid, &status, 0) != pid) {
			error("fork or waitpid", 0, errno);
			continue;
		}
		if (status)
			error("child's status", 0, status);
		for (size_t word = 0; word < FORK_PAGES * WORDS; word += 128)
			if (area[word] != base + word)
				error("parent's page", base + word, area[word]);
		forks++;
	}
	return NULL;
}

/* ------------------------------------------------------------ pipe, futex */

static int ring[MAX_CPUS][2];

static void *pipe_station(void *number)
{
	long station = (long)number;
	unsigned long expected = station, token;
	pin(station);
	while (read(ring[station][0], &token, sizeof token) == sizeof token) {
		if (token != expected)
			error("token in the pipe", expected, token);
		expected = token + cpus;
		token++;
		hops++;
		if (!may_go_on(PIPE) || write(ring[(station + 1) % cpus][1], &token, sizeof token) != sizeof token)
			break;
	}
	close(ring[(station + 1) % cpus][1]); /* the next one reads the end of file */
	return NULL;
}

static _Alignas(64) atomic_uint lock_word; /* 0 free, 1 taken, 2 taken and waited for */
static _Alignas(64) unsigned long guarded_sum, guarded_copy;

static void *futex_locker(void *number)
{
	unsigned long rounds = 0;
	pin((long)number);
	while (may_go_on(FUTEX)) {
		unsigned value = 0;
		if (!atomic_compare_exchange_strong(&lock_word, &value, 1))
			while (atomic_exchange(&lock_word, 2))
				futex(&lock_word, FUTEX_WAIT, 2);
		unsigned long sum = guarded_sum;
		if (guarded_copy != sum)
			error("sum under the lock", sum, guarded_copy);
		guarded_sum = sum + 1;
		if (rounds++ % 8 == 0)
			sched_yield(); /* so that the others have to wait */
		guarded_copy = sum + 1;
		if (atomic_exchange(&lock_word, 0) == 2)
			futex(&lock_word, FUTEX_WAKE, 1);
	}
	atomic_fetch_add(&locks, rounds);
	return NULL;
}

/* ------------------------------------------------------------ clock */

static _Alignas(64) atomic_ulong latest[2];

static uint64_t now(int tsc)
{
	struct timespec time;
	unsigned cpu;
	if (tsc)
		return __rdtscp(&cpu);
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void *clock_reader(void *number)
{
	pin((long)number);
	while (may_go_on(CLOCK)) {
		for (int burst = 0; burst < 2000; burst++) {
			int kind = burst & 1;
			unsigned long before = atomic_load(&latest[kind]);
			unsigned long value = now(kind);
			if (value < before) {
				warps++;
				if (before - value > largest_warp)
					largest_warp = before - value;
			}
			while (before < value && !atomic_compare_exchange_weak(&latest[kind], &before, value))
				;
		}
		clock_reads += 2000;
	}
	return NULL;
}

/* ------------------------------------------------------------ */

static void report(const char *word, unsigned long seconds)
{
	printf("STRESS %s seconds=%lu cpus=%d remap=%lu protect=%lu faults=%lu anon=%lu fork=%lu pipe=%lu futex=%lu "
	       "clock=%lu errors=%lu warps=%lu largest=%lu\n", word, seconds, cpus, remaps, protections, faults, mappings,
	       forks, hops, locks, clock_reads, errors, warps, largest_warp);
}

static pthread_t threads[16 * MAX_CPUS];
static int thread_count;

static void start(void *(*function)(void *), long number)
{
	if (pthread_create(&threads[thread_count++], NULL, function, (void *)number)) {
		perror("STRESS error: pthread_create");
		_exit(3);
	}
}

int main(int count, char **arguments)
{
	unsigned long seconds = count > 1 ? strtoul(arguments[1], NULL, 10) : 10;
	struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };
	unsigned long token = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	cpus = sysconf(_SC_NPROCESSORS_ONLN);
	if (cpus < 2 || cpus > MAX_CPUS) {
		printf("STRESS error: %d processors\n", cpus);
		return 2;
	}
	sigaction(SIGSEGV, &action, NULL);
	signal(SIGPIPE, SIG_IGN);
	remap_area = map_pages(NULL, REMAP_PAGES);
	guarded = map_pages(NULL, 1);
	for (int cpu = 0; cpu < cpus; cpu++)
		if (pipe2(ring[cpu], O_CLOEXEC)) {
			perror("STRESS error: pipe");
			return 3;
		}
	start(remap_writer, 0);
	start(protect_owner, 0);
	start(protect_writer, 0);
	for (long cpu = 0; cpu < cpus; cpu++) {
		if (cpu)
			start(remap_reader, cpu);
		start(anon, cpu);
		start(forker, cpu);
		start(pipe_station, cpu);
		start(futex_locker, cpu);
		start(clock_reader, cpu);
	}
	if (write(ring[0][1], &token, sizeof token) != sizeof token)
		error("write to the pipe", sizeof token, errno);
	for (unsigned long second = 1; second <= seconds; second++) {
		for (int part = 0; part < 1000000 / TURN_US; part++) {
			usleep(TURN_US);
			change_turn((turn + 1) % (ALL + 1));
		}
		if (second % 10 == 0 && second < seconds)
			report("at", second);
	}
	stop = 1;
	change_turn(ENDED);
	for (int thread = 0; thread < thread_count; thread++)
		pthread_join(threads[thread], NULL);
	if (guarded_sum != locks)
		error("locked sections", locks, guarded_sum);
	report("done", seconds);
	return errors || warps;
}
