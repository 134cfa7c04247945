// Registers of float32: AVX-512 (16 lanes), AVX2 (8), NEON (4).
//
// Loops over elements that a compiler vectorises by itself stay plain C. These names are for loops whose sums must stay
// in registers. They are vectors of GCC and Clang, so + - * / & >> and casts of bits are the language's, and intrinsics
// are left for what it lacks. `fmadd` rounds once; a * b + c is never contracted (-ffp-contract=off), so that every
// variant computes the same bits wherever the order of additions is the same.
#pragma once
#include "common.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
typedef __m512 Floats;
#define fmadd(a, b, c) _mm512_fmadd_ps(a, b, c)
#define larger(a, b) _mm512_max_ps(a, b)
#define smaller(a, b) _mm512_min_ps(a, b)
#define nearest_whole(x) _mm512_roundscale_ps(x, 0)
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
typedef __m256 Floats;
#define fmadd(a, b, c) _mm256_fmadd_ps(a, b, c)
#define larger(a, b) _mm256_max_ps(a, b)
#define smaller(a, b) _mm256_min_ps(a, b)
#define nearest_whole(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define LANES 4
typedef float32x4_t Floats;
#define fmadd(a, b, c) vfmaq_f32(c, a, b)
// The second operand where either is not a number, as on x86.
#define larger(a, b) vbslq_f32(vcgtq_f32(a, b), a, b)
#define smaller(a, b) vbslq_f32(vcltq_f32(a, b), a, b)
#define nearest_whole(x) vrndnq_f32(x)
#else
#error "no variant for this instruction set"
#endif

typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef float PlainFloats __attribute__((vector_size(4 * LANES)));  // what conversions give, on Arm another type

ALWAYS_INLINE Floats load(const void *p) {
    Floats x;
    memcpy(&x, p, sizeof x);
    return x;
}
ALWAYS_INLINE void store(void *p, Floats x) { memcpy(p, &x, sizeof x); }
ALWAYS_INLINE Floats spread(float x) { return (Floats)(x - (PlainFloats){0}); }
ALWAYS_INLINE Ints load_ints(const void *p) { return (Ints)load(p); }
ALWAYS_INLINE Ints spread_ints(int32_t x) { return x - (Ints){0}; }
ALWAYS_INLINE Floats to_floats(Ints x) { return (Floats)__builtin_convertvector(x, PlainFloats); }

ALWAYS_INLINE Floats load_bf16(const uint16_t *p) {
    Halves upper;
    memcpy(&upper, p, sizeof upper);
    return (Floats)(__builtin_convertvector(upper, Words) << 16);
}
// The upper halves are bfloat16, rounded to the nearest, ties to even; infinities stay.
ALWAYS_INLINE Words bf16_bits(Floats x) { return (Words)x + ((Words)x >> 16 & 1) + 0x7fff; }
ALWAYS_INLINE Floats round_bf16(Floats x) { return (Floats)(bf16_bits(x) & 0xffff0000u); }
ALWAYS_INLINE void store_bf16(uint16_t *p, Floats x) {
    Halves upper = __builtin_convertvector(bf16_bits(x) >> 16, Halves);
    memcpy(p, &upper, sizeof upper);
}
ALWAYS_INLINE Floats where_less(Floats a, Floats b, Floats yes, Floats no) {  // yes where a < b, else no
    Words less = (Words)((PlainFloats)a < (PlainFloats)b);
    return (Floats)(((Words)yes & less) | ((Words)no & ~less));
}

ALWAYS_INLINE float total(Floats x) {  // by halves
#if defined(__AVX2__)
#if defined(__AVX512F__)
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
    __m256 eight = x;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float32x2_t two = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
#endif
}
ALWAYS_INLINE float largest_lane(Floats x) {
    float lane[LANES];
    store(lane, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) lane[k] = lane[k] > lane[k + half] ? lane[k] : lane[k + half];
    return lane[0];
}

// Products of 32-bit words: a word is a float32 or, where the CPU multiplies them (AVX-512 BF16), a pair of bfloat16.
#if defined(__AVX512BF16__)
enum { PAIRS = 1 };
ALWAYS_INLINE Floats multiply_words(int pairs, Floats a, Floats b, Floats sum) {
    return pairs ? _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b) : fmadd(a, b, sum);
}
#else
enum { PAIRS = 0 };
ALWAYS_INLINE Floats multiply_words(int pairs, Floats a, Floats b, Floats sum) {
    (void)pairs;
    return fmadd(a, b, sum);
}
#endif

// e^x to float32's precision; arguments beyond ±87 give the ends of that range; what is not a number stays so.
// x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite), then the Taylor series of e^r: its first omitted term is < 2e-8.
ALWAYS_INLINE Floats exponential(Floats x) {
    x = larger(spread(-87.0f), smaller(spread(87.0f), x));
    Floats whole = nearest_whole(x * spread(1.44269504f));
    Floats rest = fmadd(whole, spread(-0.693359375f), x);
    rest = fmadd(whole, spread(2.12194440e-4f), rest);
    Floats sum = spread(1.0f / 5040);
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 7; i++) sum = fmadd(sum, rest, spread(terms[i]));
    // times 2^whole, added to the exponent: with such arguments neither number is below float32's normal ones
    return (Floats)((Words)sum + ((Words)__builtin_convertvector((PlainFloats)whole, Ints) << 23));
}

// Activations are float32 or bfloat16: one code for both, instantiated by dtype.
enum { FLOAT32 = 0, BFLOAT16 = 1 };
ALWAYS_INLINE Floats load_as(int dtype, const void *base, long at) {
    return dtype == BFLOAT16 ? load_bf16((const uint16_t *)base + at) : load((const float *)base + at);
}
ALWAYS_INLINE void store_as(int dtype, void *base, long at, Floats x) {
    if (dtype == BFLOAT16) store_bf16((uint16_t *)base + at, x);
    else store((float *)base + at, x);
}
ALWAYS_INLINE Floats rounded_as(int dtype, Floats x) {  // what storing and loading gives back
    return dtype == BFLOAT16 ? round_bf16(x) : x;
}
ALWAYS_INLINE float get_as(int dtype, const void *base, long at) {  // one element
    if (dtype == FLOAT32) return ((const float *)base)[at];
    return float_of((int64_t)((const uint16_t *)base)[at] << 16);
}
ALWAYS_INLINE uint32_t rounded_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits + 0x7fff + (bits >> 16 & 1);
}
ALWAYS_INLINE void put_as(int dtype, void *base, long at, float x) {
    if (dtype == FLOAT32) ((float *)base)[at] = x;
    else ((uint16_t *)base)[at] = (uint16_t)(rounded_bits(x) >> 16);
}
ALWAYS_INLINE float round_as(int dtype, float x) {
    return dtype == FLOAT32 ? x : float_of(rounded_bits(x) & 0xffff0000u);
}

// What plain weights of so many bits are multiplied with: bfloat16 where its pairs are, else float32.
ALWAYS_INLINE int dense_dtype(long bits) { return PAIRS && bits == 16 ? BFLOAT16 : FLOAT32; }

// A kernel over activations of either dtype, its second argument: `body(args, dtype)` on all threads.
#define KERNEL_BY_DTYPE(name, body) \
    static void name##_bf16(Args args) { body(args, BFLOAT16); } \
    static void name##_f32(Args args) { body(args, FLOAT32); } \
    void name(Args args) { on_threads(args[1] == BFLOAT16 ? name##_bf16 : name##_f32, args); }
