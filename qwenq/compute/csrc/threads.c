// Threads: the OpenMP runtime's that torch computes on, else a small pool of our own.
//
// Two pools would compete for the cores, so the caller passes in the four entry points of the OpenMP runtime that this
// process has loaded (GOMP_parallel, GOMP_barrier, omp_get_thread_num, omp_get_num_threads). Where torch brings a
// runtime without them, as on macOS, `qwenq_set_threads(NULL, …)` leaves the pool below: workers sleep on a condition
// variable between kernels and meet at a spinning barrier within one.
#include "common.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

// What the loader asks a library before it calls a kernel: the sources it was compiled from, and its variant.
EXPORT const char *qwenq_sources(void) { return QWENQ_SOURCES; }
EXPORT const char *qwenq_variant(void) { return QWENQ_VARIANT; }

static void (*omp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static void (*omp_barrier)(void);
static int (*omp_index)(void);
static int (*omp_count)(void);

EXPORT void qwenq_set_threads(void *parallel, void *wait, void *index, void *count) {
    omp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    omp_barrier = (void (*)(void))wait;
    omp_index = (int (*)(void))index;
    omp_count = (int (*)(void))count;
}

#define MOST_WORKERS 256
static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_ready = PTHREAD_COND_INITIALIZER;
static void (*pool_body)(Args);
static Args pool_args;
static int pool_workers, pool_count = 1;
static long pool_job;
static atomic_int waiting, finished;
static atomic_long generation;
static _Thread_local int my_index, my_count = 1;

static void pool_barrier(void) {
    long current = atomic_load(&generation);
    if (atomic_fetch_add(&waiting, 1) + 1 == pool_count) {
        atomic_store(&waiting, 0);
        atomic_fetch_add(&generation, 1);
        return;
    }
    for (int spins = 0; atomic_load(&generation) == current; spins++)
        if (spins > 1000) sched_yield();
}

static void *work(void *index) {
    long seen = 0;
    my_index = (int)(intptr_t)index;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (pool_job == seen) pthread_cond_wait(&work_ready, &lock);
        seen = pool_job;
        int count = pool_count;
        void (*body)(Args) = pool_body;
        Args args = pool_args;
        pthread_mutex_unlock(&lock);
        if (my_index >= count) continue;
        my_count = count;
        body(args);
        atomic_fetch_add(&finished, 1);
    }
    return NULL;
}

static void pool_run(void (*body)(Args), Args args, int count) {
    pthread_mutex_lock(&one_caller);
    pthread_mutex_lock(&lock);
    if (count > MOST_WORKERS) count = MOST_WORKERS;
    while (pool_workers < count - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(intptr_t)(pool_workers + 1))) break;
        pthread_detach(thread);
        pool_workers++;
    }
    pool_count = count < pool_workers + 1 ? count : pool_workers + 1;
    atomic_store(&finished, 0);
    pool_body = body, pool_args = args, pool_job++;
    int others = pool_count - 1;
    pthread_cond_broadcast(&work_ready);
    pthread_mutex_unlock(&lock);
    my_index = 0, my_count = others + 1;
    body(args);
    for (int spins = 0; atomic_load(&finished) < others; spins++)
        if (spins > 1000) sched_yield();
    my_count = 1;
    pthread_mutex_unlock(&one_caller);
}

void on_threads(void (*body)(Args), Args args) {
    int count = (int)args[0];
    if (count < 2) {
        my_index = 0, my_count = 1;
        if (omp_parallel) omp_parallel((void (*)(void *))body, (void *)args, 1, 0);
        else body(args);
    } else if (omp_parallel) {
        omp_parallel((void (*)(void *))body, (void *)args, (unsigned)count, 0);
    } else {
        pool_run(body, args, count);
    }
}

void barrier(void) {
    if (omp_parallel) omp_barrier();
    else if (my_count > 1) pool_barrier();
}

int thread_index(void) { return omp_parallel ? omp_index() : my_index; }
int thread_count(void) { return omp_parallel ? omp_count() : my_count; }
