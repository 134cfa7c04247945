// What every kernel here shares: how it is called, how its work is split over threads.
//
// A kernel has the signature `void name(const int64_t *args)`; kernels.def lists them, and the library exports them. args[0] is the number of
// threads; the others are addresses, integers, and float32 as their bits. The caller (compute/cpu.py) has checked
// shapes, dtypes and devices: no kernel checks them again.
//
// A kernel hands its body to all threads with `on_threads`. Inside a body, `thread_share` splits a range by thread and
// `barrier` waits for all threads. Threads are those of the OpenMP runtime that torch uses (threads.c).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef const int64_t *Args;

#define KERNEL(name) EXPORT void name(Args args);
#include "kernels.def"
#undef KERNEL

#define POINTER(type, i) ((type *)(intptr_t)args[i])

ALWAYS_INLINE float float_of(int64_t bits) {
    uint32_t word = (uint32_t)bits;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

// A float32 among arguments that are read as a struct: all fields have 8 bytes, as the arguments have.
typedef struct {
    float value;
    uint32_t unused;
} Float32;

void on_threads(void (*body)(Args), Args args);
void barrier(void);
int thread_index(void);
int thread_count(void);

// The part [first, end) of `count` items that belongs to the calling thread.
ALWAYS_INLINE void thread_share(long count, long *first, long *end) {
    long index = thread_index(), threads = thread_count();
    *first = count * index / threads;
    *end = count * (index + 1) / threads;
}

ALWAYS_INLINE long at_most(long a, long b) { return a < b ? a : b; }
