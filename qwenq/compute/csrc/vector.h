// Registers of float32 under one set of names: AVX-512 (16 lanes), AVX2 (8), NEON (4), or plain C (4).
//
// Loops over elements that a compiler vectorises by itself stay plain C. These names are for loops whose sums must stay
// in registers. `fmadd` rounds once; a * b + c is never contracted (-ffp-contract=off), so that every variant computes
// the same bits wherever the order of additions is the same.
#pragma once
#include "common.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
typedef __m512 Floats;
#define load(p) _mm512_loadu_ps(p)
#define store(p, x) _mm512_storeu_ps(p, x)
#define spread(x) _mm512_set1_ps(x)
#define fmadd(a, b, c) _mm512_fmadd_ps(a, b, c)
#define larger(a, b) _mm512_max_ps(a, b)
#define smaller(a, b) _mm512_min_ps(a, b)
#define nearest_whole(x) _mm512_roundscale_ps(x, 0)
ALWAYS_INLINE Floats load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
// The upper halves are bfloat16, rounded to the nearest, ties to even; infinities stay.
ALWAYS_INLINE __m512i bf16_bits(Floats x) {
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
ALWAYS_INLINE void store_bf16(uint16_t *p, Floats x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(x), 16)));
}
ALWAYS_INLINE Floats round_bf16(Floats x) {
    return _mm512_castsi512_ps(_mm512_and_si512(bf16_bits(x), _mm512_set1_epi32(-0x10000)));
}
ALWAYS_INLINE Floats where_less(Floats a, Floats b, Floats yes, Floats no) {  // yes where a < b, else no
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
ALWAYS_INLINE Floats times_power_of_two(Floats x, Floats whole) {  // x 2^whole, |whole| < 127
    return _mm512_scalef_ps(x, whole);
}
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
typedef __m256 Floats;
#define load(p) _mm256_loadu_ps(p)
#define store(p, x) _mm256_storeu_ps(p, x)
#define spread(x) _mm256_set1_ps(x)
#define fmadd(a, b, c) _mm256_fmadd_ps(a, b, c)
#define larger(a, b) _mm256_max_ps(a, b)
#define smaller(a, b) _mm256_min_ps(a, b)
#define nearest_whole(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
ALWAYS_INLINE Floats load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
ALWAYS_INLINE __m256i bf16_bits(Floats x) {
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
ALWAYS_INLINE Floats round_bf16(Floats x) {
    return _mm256_castsi256_ps(_mm256_and_si256(bf16_bits(x), _mm256_set1_epi32(-0x10000)));
}
ALWAYS_INLINE Floats where_less(Floats a, Floats b, Floats yes, Floats no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
ALWAYS_INLINE void store_bf16(uint16_t *p, Floats x) {
    __m256i bits = _mm256_srli_epi32(bf16_bits(x), 16);
    __m128i low = _mm256_castsi256_si128(bits), high = _mm256_extracti128_si256(bits, 1);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(low, high));
}
ALWAYS_INLINE Floats times_power_of_two(Floats x, Floats whole) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
#else
#define LANES 4
#if defined(__ARM_NEON)
#include <arm_neon.h>
typedef float32x4_t Floats;
#define load(p) vld1q_f32(p)
#define store(p, x) vst1q_f32(p, x)
#define spread(x) vdupq_n_f32(x)
#define fmadd(a, b, c) vfmaq_f32(c, a, b)
// The second operand where either is not a number, as on x86.
#define larger(a, b) vbslq_f32(vcgtq_f32(a, b), a, b)
#define smaller(a, b) vbslq_f32(vcltq_f32(a, b), a, b)
#define nearest_whole(x) vrndnq_f32(x)
ALWAYS_INLINE Floats load_bf16(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
ALWAYS_INLINE uint32x4_t bf16_bits(Floats x) {
    uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
}
ALWAYS_INLINE void store_bf16(uint16_t *p, Floats x) { vst1_u16(p, vshrn_n_u32(bf16_bits(x), 16)); }
ALWAYS_INLINE Floats round_bf16(Floats x) {
    return vreinterpretq_f32_u32(vandq_u32(bf16_bits(x), vdupq_n_u32(0xffff0000)));
}
ALWAYS_INLINE Floats where_less(Floats a, Floats b, Floats yes, Floats no) {
    return vbslq_f32(vcltq_f32(a, b), yes, no);
}
ALWAYS_INLINE Floats times_power_of_two(Floats x, Floats whole) {
    return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127)), 23)));
}
#else
#error "no variant for this instruction set"
#endif
#endif

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
    return times_power_of_two(sum, whole);
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
