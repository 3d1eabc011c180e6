/* What fserver_lib's four copies take without anything around them: into a slot, out of it at the other end, and the same on
   the way back, between two threads that spin, each on a CPU of its own. With sizes of 0 0, the two signals alone. PAST is 1 if
   copies into slots go past the caches, where the compiler knows how.

   copies BYTES BYTES ROUNDS CPU CPU PRIORITY PAST     prints the median and the 99th percentile in microseconds, as JSON */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

static struct {
    _Alignas(256) _Atomic uint64_t turn;
} there, back;
static char *slot_there, *slot_back, *push, *pull, *key, *out;
static size_t push_bytes, pull_bytes;
static uint64_t rounds;
static int cpus[2], priority, past;

/* Into a slot, whose lines the other thread has read. */
static void fill(char *slot, const char *from, size_t bytes) {
#ifdef __SSE2__
    if (past) {
        for (; bytes >= 16; slot += 16, from += 16, bytes -= 16)
            _mm_stream_si128((__m128i *)slot, _mm_loadu_si128((const __m128i *)from));
        _mm_sfence();
    }
#endif
    memcpy(slot, from, bytes);
}

static void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    if (priority) pthread_setschedparam(pthread_self(), SCHED_FIFO, &(struct sched_param){.sched_priority = priority});
}

static void await(_Atomic uint64_t *turn, uint64_t wanted) {
    while (atomic_load_explicit(turn, memory_order_acquire) != wanted) {}
}

static void *serve(void *nothing) {
    pin(cpus[0]);
    for (uint64_t round = 1; round <= rounds; round++) {
        await(&there.turn, round);
        memcpy(key, slot_there, push_bytes);
        fill(slot_back, out, pull_bytes);
        atomic_store_explicit(&back.turn, round, memory_order_release);
    }
    return nothing;
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000 + time.tv_nsec;
}

static int compare(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static char *memory(size_t bytes) {
    size_t room = (bytes / 4096 + 1) * 4096;
    char *place = aligned_alloc(4096, room);
    if (!place) exit(1);
    return memset(place, 1, room);
}

int main(int count, char **words) {
    if (count != 8) return 2;
    push_bytes = strtoul(words[1], 0, 10), pull_bytes = strtoul(words[2], 0, 10), rounds = strtoul(words[3], 0, 10);
    cpus[0] = atoi(words[4]), cpus[1] = atoi(words[5]), priority = atoi(words[6]), past = atoi(words[7]);
    slot_there = memory(push_bytes), push = memory(push_bytes), key = memory(push_bytes);
    slot_back = memory(pull_bytes), pull = memory(pull_bytes), out = memory(pull_bytes);
    int64_t *times = (int64_t *)memory(rounds * sizeof *times);
    pthread_t server;
    if (pthread_create(&server, 0, serve, 0)) return 1;
    pin(cpus[1]);
    for (uint64_t round = 1; round <= rounds; round++) {
        int64_t began = now();
        fill(slot_there, push, push_bytes);
        atomic_store_explicit(&there.turn, round, memory_order_release);
        await(&back.turn, round);
        memcpy(pull, slot_back, pull_bytes);
        times[round - 1] = now() - began;
    }
    pthread_join(server, 0);
    qsort(times, rounds, sizeof *times, compare);
    printf("{\"p50\": %.3f, \"p99\": %.3f}\n", times[rounds / 2] / 1e3, times[rounds * 99 / 100] / 1e3);
    return 0;
}
