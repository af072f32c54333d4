/* The driver's half of a virtio-blk queue, in a process of its own: keeps DEPTH reads in flight, notifies and is
 * interrupted as EVENT_IDX says, sleeps in read() of the interrupt's eventfd after a look of HALT_POLL_NS (as KVM looks
 * before a halted vCPU sleeps), and spends WORK_NS of processor time per request, as a guest's block layer does.
 * Prints one line of JSON. Run by bench/block_pair.py, which has laid the queue out.
 *
 *   block_driver MEMORY KICK CALL DESCRIPTORS AVAILABLE USED DEPTH WORK_NS MILLISECONDS LENGTH CAPACITY HALT_POLL_NS
 */
#define _GNU_SOURCE
#include <poll.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { SIZE = 256, CHAINS = 64, MAX_SAMPLES = 8 << 20 };
enum { MEMORY, KICK, CALL, DESCRIPTORS, AVAILABLE, USED, DEPTH, WORK, MILLISECONDS, LENGTH, CAPACITY, HALT, ARGUMENTS };
static const uint64_t HEADERS = 0x100000, STATUSES = 0x180000, TABLES = 0x200000, DATA = 0x1000000;
struct descriptor { uint64_t addr; uint32_t len; uint16_t flags, next; };
static uint32_t samples[MAX_SAMPLES];

static uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int in_order(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double processor_us(void)
{
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return (double)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) * 1e6 + (double)(r.ru_utime.tv_usec + r.ru_stime.tv_usec);
}

static void write_chains(uint8_t *ram, struct descriptor *table, uint32_t length)
{
    for (uint32_t i = 0; i < CHAINS; i++) {
        struct descriptor d[3] = {{HEADERS + 32 * i, 16, 1, 1},
                                  {DATA + (uint64_t)length * i, length, 3, 2},
                                  {STATUSES + 16 * i, 1, 2, 0}};
        memcpy(ram + TABLES + 1024 * i, d, sizeof d);
        table[i] = (struct descriptor){TABLES + 1024 * i, sizeof d, 4, 0};
        for (uint32_t o = 0; o < length; o += 4096) ram[DATA + (uint64_t)length * i + o] = 1;
    }
}

int main(int argc, char **argv)
{
    uint64_t given[ARGUMENTS];
    struct stat st;
    if (argc != ARGUMENTS + 1) return 2;
    for (int i = 0; i < ARGUMENTS; i++) given[i] = strtoull(argv[i + 1], 0, 0);
    int kick = (int)given[KICK], call = (int)given[CALL], depth = (int)given[DEPTH], in_flight = 0;
    uint32_t length = (uint32_t)given[LENGTH], unused[CHAINS], left = 0, count = 0;
    if (depth < 1 || depth > CHAINS || fstat((int)given[MEMORY], &st)) return 2;
    uint8_t *ram = mmap(0, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, (int)given[MEMORY], 0);
    if (ram == MAP_FAILED) return 2;
    volatile uint16_t *available = (uint16_t *)(ram + given[AVAILABLE]), *used = (uint16_t *)(ram + given[USED]);
    volatile uint32_t *elements = (uint32_t *)(ram + given[USED] + 4);
    write_chains(ram, (struct descriptor *)(ram + given[DESCRIPTORS]), length);
    while (left < CHAINS) { unused[left] = CHAINS - 1 - left; left++; }
    uint16_t last = used[1], index = available[1];
    uint64_t begun[CHAINS], seed = 88172645463325252u, kicks = 0, interrupts = 0, done = 0, one = 1, value;
    uint64_t start = clock_ns(), stop = start + given[MILLISECONDS] * 1000000, now = start;
    double before = processor_us();
    for (;;) {
        while (in_flight < depth && now < stop) {
            uint32_t i = unused[--left];
            seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17;
            uint64_t sector = seed % (given[CAPACITY] / length) * (length / 512);
            memset(ram + HEADERS + 32 * i, 0, 8);
            memcpy(ram + HEADERS + 32 * i + 8, &sector, 8);
            ram[STATUSES + 16 * i] = 0xff;
            for (uint64_t end = clock_ns() + given[WORK]; given[WORK] && clock_ns() < end;) {}
            begun[i] = clock_ns();
            available[2 + (index & (SIZE - 1))] = (uint16_t)i;
            uint16_t old = index++;
            in_flight++;
            if (!given[WORK] && in_flight < depth) continue; /* a plugged queue: one notification for all */
            if (!given[WORK]) old = available[1];
            atomic_thread_fence(memory_order_release);
            available[1] = index;
            atomic_thread_fence(memory_order_seq_cst);
            if ((uint16_t)(index - used[2 + 4 * SIZE] - 1) < (uint16_t)(index - old)) {
                if (write(kick, &one, 8) != 8) return 1;
                kicks++;
            }
        }
        if (!in_flight) break;
        if (used[1] == last) {
            available[2 + SIZE] = last; /* used_event: an interrupt for the next one */
            atomic_thread_fence(memory_order_seq_cst);
            if (used[1] == last) {
                struct pollfd p = {call, POLLIN, 0};
                for (uint64_t end = clock_ns() + given[HALT]; given[HALT] && clock_ns() < end && poll(&p, 1, 0) == 0;) {}
                if (read(call, &value, 8) == 8) interrupts++;
            }
        }
        atomic_thread_fence(memory_order_seq_cst);
        now = clock_ns();
        while (last != used[1]) {
            uint32_t i = elements[2 * (last & (SIZE - 1))];
            if (i >= CHAINS || ram[STATUSES + 16 * i]) { fprintf(stderr, "chain %u failed\n", i); return 1; }
            if (count < MAX_SAMPLES) samples[count++] = (uint32_t)(now - begun[i]);
            unused[left++] = i;
            in_flight--; last++; done++;
        }
    }
    double elapsed = (double)(clock_ns() - start) / 1e9, spent = processor_us() - before;
    qsort(samples, count, 4, in_order);
    printf("{\"rate\": %.0f, \"p50\": %.2f, \"p99\": %.2f, \"done\": %llu, \"kicks\": %.4f, \"interrupts\": %.4f, "
           "\"driver\": %.3f}\n",
           (double)done / elapsed, samples[count / 2] / 1e3, samples[(uint64_t)count * 99 / 100] / 1e3,
           (unsigned long long)done, (double)kicks / (double)done, (double)interrupts / (double)done,
           spent / (double)done);
    return 0;
}
