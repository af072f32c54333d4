/* Writes numbered blocks to a disk and says which of them the disk has acknowledged as kept.
 *
 *   numbered DISK THREADS SLOTS START
 *
 * Thread T writes blocks of 4 KiB with the numbers START + 1, START + 2, … to its own SLOTS places, one after the other
 * (block N of thread T: place T * SLOTS + N % SLOTS), each past the guest's cache and followed by fdatasync. A block:
 * u32 CRC-32 of the rest, u32 thread, u64 number, then bytes that depend on both. Little endian.
 * Whenever there is something new, at most four times a second: a line "kept N N …", for each thread the last number that
 * was acknowledged. On SIGTERM every thread ends with the block that it is at: "ended N N …". A failure: "failed …". */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 4096, MOST_THREADS = 16 };

struct block {
	uint32_t crc;
	uint32_t thread;
	uint64_t number;
	uint64_t content[(BLOCK - 16) / 8];
};
_Static_assert(sizeof(struct block) == BLOCK, "a block is 4 KiB");

static uint32_t table[256];
static int disk;
static uint64_t slots, start;
static _Atomic uint64_t kept[MOST_THREADS];
static atomic_int ending;

static void make_table(void)
{
	for (uint32_t byte = 0; byte < 256; byte++) {
		uint32_t value = byte;
		for (int bit = 0; bit < 8; bit++)
			value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
		table[byte] = value;
	}
}

static uint32_t crc32(const unsigned char *data, size_t length)
{
	uint32_t value = ~0u;
	while (length--)
		value = value >> 8 ^ table[(value ^ *data++) & 255];
	return ~value;
}

static void fail(const char *what)
{
	printf("failed %s: %s\n", what, strerror(errno));
	fflush(stdout);
	_exit(1);
}

static void *write_blocks(void *argument)
{
	uint64_t thread = (uint64_t)(uintptr_t)argument;
	struct block *block = aligned_alloc(BLOCK, BLOCK);
	if (block == NULL)
		fail("memory");
	for (uint64_t number = start + 1; !ending; number++) {
		block->thread = (uint32_t)thread;
		block->number = number;
		for (size_t word = 0; word < sizeof block->content / 8; word++)
			block->content[word] = (number * 0x9E3779B97F4A7C15u) ^ (thread << 56) ^ word;
		block->crc = crc32((unsigned char *)block + 4, BLOCK - 4);
		off_t place = (off_t)((thread * slots + number % slots) * BLOCK);
		ssize_t written = pwrite(disk, block, BLOCK, place);
		if (written != BLOCK)
			fail("write");
		if (fdatasync(disk) < 0)
			fail("fdatasync");
		kept[thread] = number;
	}
	return NULL;
}

static void say(const char *word, int threads)
{
	fputs(word, stdout);
	for (int thread = 0; thread < threads; thread++)
		printf(" %llu", (unsigned long long)kept[thread]);
	putchar('\n');
	fflush(stdout);
}

static void end(int number)
{
	(void)number;
	ending = 1;
}

int main(int argc, char **argv)
{
	pthread_t writers[MOST_THREADS];
	uint64_t said = 0;
	int threads = argc == 5 ? atoi(argv[2]) : 0;

	if (threads < 1 || threads > MOST_THREADS || (slots = strtoull(argv[3], NULL, 10)) == 0) {
		fprintf(stderr, "usage: numbered DISK THREADS SLOTS START\n");
		return 2;
	}
	start = strtoull(argv[4], NULL, 10);
	if ((disk = open(argv[1], O_RDWR | O_DIRECT)) < 0)
		fail(argv[1]);
	make_table();
	signal(SIGTERM, end);
	for (int thread = 0; thread < threads; thread++) {
		kept[thread] = start;
		if (pthread_create(&writers[thread], NULL, write_blocks, (void *)(uintptr_t)thread) != 0)
			fail("thread");
	}
	while (!ending) {
		uint64_t sum = 0;
		for (int thread = 0; thread < threads; thread++)
			sum += kept[thread];
		if (sum != said)
			say("kept", threads);
		said = sum;
		usleep(250000);
	}
	for (int thread = 0; thread < threads; thread++)
		pthread_join(writers[thread], NULL);
	say("ended", threads);
	return 0;
}
