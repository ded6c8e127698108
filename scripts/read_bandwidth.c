/* read_bandwidth THREADS [MIB]: GB/s at which THREADS threads together read MIB MiB (default 512), best of five passes.
 * Eight accumulators a thread keep enough loads in flight; each thread reads its own part, touched first by itself. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { PASSES = 6 };
static pthread_barrier_t gate;
static size_t part;
static volatile uint64_t sink;
/* By pass and thread. The readers look at the clock themselves: where they hold all cores, one more thread wakes late. */
static double began[PASSES][1024], ended[PASSES][1024];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

struct job {
    char *data;
    int thread;
};

static void *reader(void *arg) {
    struct job job = *(struct job *)arg;
    char *mine = job.data;
    typedef uint64_t v4 __attribute__((vector_size(32)));
    memset(mine, 1, part);
    for (int pass = 0; pass < PASSES; pass++) {
        pthread_barrier_wait(&gate);
        began[pass][job.thread] = now();
        v4 a[8] = {{0}};
        const v4 *p = (const v4 *)mine;
        for (size_t i = 0; i < part / sizeof(v4); i += 8)
            for (int j = 0; j < 8; j++) a[j] ^= p[i + j];
        v4 s = a[0];
        for (int j = 1; j < 8; j++) s ^= a[j];
        sink += s[0] ^ s[1] ^ s[2] ^ s[3];
        ended[pass][job.thread] = now();
    }
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    size_t mib = argc > 2 ? strtoul(argv[2], NULL, 10) : 512;
    if (threads < 1 || threads > 1024 || mib < 1) return fprintf(stderr, "usage: read_bandwidth THREADS [MIB]\n"), 2;
    part = (mib << 20) / threads & ~(size_t)4095;
    char *data = mmap(NULL, part * threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return perror("mmap"), 2;
    madvise(data, part * threads, MADV_HUGEPAGE);
    pthread_barrier_init(&gate, NULL, threads);
    static pthread_t ids[1024];
    static struct job jobs[1024];
    for (int t = 0; t < threads; t++) {
        jobs[t] = (struct job){data + t * part, t};
        if (pthread_create(&ids[t], NULL, reader, &jobs[t])) return perror("pthread_create"), 2;
    }
    for (int t = 0; t < threads; t++) pthread_join(ids[t], NULL);
    double best = 1e30;
    for (int pass = 1; pass < PASSES; pass++) { /* the first pass warms up */
        double first = began[pass][0], last = ended[pass][0];
        for (int t = 1; t < threads; t++) {
            if (began[pass][t] < first) first = began[pass][t];
            if (ended[pass][t] > last) last = ended[pass][t];
        }
        if (last - first < best) best = last - first;
    }
    printf("%.2f\n", part * threads / best / 1e9);
    return 0;
}
