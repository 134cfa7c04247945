// The product of 4- or 8-bit weights, scaled by group, with a few rows of activations in 16 bits.
//
//     y[n] = sum over groups g of  s_w[g, n] s_x[g] ( sum over k of q_w[k, n] q_x[k]  -  middle * sum over k of q_x[k] )
//
// Sums over a group are exact integers; scales and totals are float32. Activations of a group are rounded to 32512 steps
// of their largest: finer than bfloat16 wherever they are above a hundredth of it. What is not finite makes the group's
// scale NaN.
//
// Weights lie in blocks of 32 outputs: [blocks, steps, 32 outputs, 4 bytes]. A byte is a column (8 bits) or two, the one
// four columns on in its high nibble (4 bits), so a step has 4 or 8 columns. Each instruction set multiplies them its way:
//
//     VNNI (x86), dot product (Arm)   4 columns of 8 bits at a time: activations are 256 high + low, two signed bytes
//     AVX2                            2 columns of 16 bits at a time (vpmaddwd): activations are as they are, and the
//                                     weights' even and odd bytes are masked out to 16 bits
//
// A decode step reads every weight once: this runs at the memory's speed, or near it.
#include "linear.h"
#include "vector.h"

#define LARGEST 32512.0f  // 127 * 256: its high byte is 127

#if defined(__AVX512VNNI__)
#define BYTE_PRODUCTS 1
#define dot(sum, weights, x) (Ints)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(weights), (__m512i)(x))
#define load_halves(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#elif defined(__AVX2__)
#if defined(__AVXVNNI__)
#define BYTE_PRODUCTS 1
#define dot(sum, weights, x) (Ints)_mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(weights), (__m256i)(x))
#else
#define BYTE_PRODUCTS 0
#define dot(sum, weights, x) ((sum) + (Ints)_mm256_madd_epi16((__m256i)(weights), (__m256i)(x)))
#endif
#define load_halves(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#else
#define BYTE_PRODUCTS 1
#define dot(sum, weights, x) (Ints)vdotq_s32((int32x4_t)(sum), (int8x16_t)(weights), (int8x16_t)(x))
#define load_halves(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p))))
#endif

enum { REGISTERS = OUTPUTS / LANES, PLANES = BYTE_PRODUCTS ? 2 : 1 };
#if defined(__ARM_NEON)
enum { SIGNED_BYTES = 1 };  // vdotq_s32 takes bytes of 8-bit weights as q - 128: nothing is left to subtract
#else
enum { SIGNED_BYTES = 0 };
#endif

// The workspace's size is `activation_bytes` of compute/linear.py.
Activations activations_at(void *workspace, long rows, const Linear *layer) {
    Activations x = {.columns = layer->columns, .group_size = layer->group_size, .bits = layer->bits};
    x.groups = x.columns / x.group_size;
    x.high = workspace;
    x.low = x.high + rows * x.columns;
    x.scales = (float *)(x.low + rows * x.columns);
    x.sums = (int32_t *)(x.scales + rows * x.groups);
    return x;
}

// The row as the first of its own.
Activations activations_of(const Activations *x, long row) {
    Activations one = *x;
    one.high += row * x->columns * (x->bits >= 16 ? (dense_dtype(x->bits) == BFLOAT16 ? 2 : 4) : BYTE_PRODUCTS ? 1 : 2);
    one.low += row * x->columns;
    one.scales += row * x->groups;
    one.sums += row * x->groups;
    return one;
}

// Keep a group of a row's activations in the form in which they are multiplied.
void put_group(const Activations *to, long row, long group, const float *x) {
    if (to->bits >= 16) {
        dense_group(to, row, group, x);
        return;
    }
    Floats largest = spread(0.0f), invalid = spread(0.0f);
    const Floats zero = spread(0.0f);
    for (long k = 0; k < to->group_size; k += LANES) {
        Floats value = load(x + k);
        largest = larger(largest, larger(value, zero - value));
        invalid += value - value;  // NaN where a value is not finite
    }
    float top = largest_lane(largest), not_finite = total(invalid);
    if (!(top > 1e-30f)) top = 1e-30f;
    float steps = LARGEST / top;
    int32_t q[LONGEST_GROUP], sum = 0;
    for (long k = 0; k < to->group_size; k++) {
        float whole = rintf(x[k] * steps);
        whole = whole > -LARGEST ? whole : -LARGEST;  // NaN, too, becomes a number that an integer can hold
        whole = whole < LARGEST ? whole : LARGEST;
        q[k] = (int32_t)whole;
        sum += q[k];
    }
    long start = row * to->columns + group * to->group_size;
    if (BYTE_PRODUCTS) {
        int8_t *high = to->high + start, *low = to->low + start;
        for (long k = 0; k < to->group_size; k++) {
            high[k] = (int8_t)((q[k] + 128) >> 8);
            low[k] = (int8_t)q[k];  // the lowest byte of q - 256 high is q's own
        }
    } else {  // of four columns first the even ones, then the odd ones
        int16_t *pairs = (int16_t *)to->high + start;
        for (long k = 0; k < to->group_size; k += 4) {
            pairs[k] = (int16_t)q[k], pairs[k + 1] = (int16_t)q[k + 2];
            pairs[k + 2] = (int16_t)q[k + 1], pairs[k + 3] = (int16_t)q[k + 3];
        }
    }
    to->scales[row * to->groups + group] = top / LARGEST + not_finite;
    to->sums[row * to->groups + group] = sum;
}

ALWAYS_INLINE Ints word_at(const void *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return spread_ints(word);
}

// One register of weights, one part after the other, times the activations of all rows; a part is 4 columns of bytes, or
// 2 columns of 16 bits.
ALWAYS_INLINE Ints part_of(Ints weights, int part, int bits) {
    typedef uint16_t Pairs __attribute__((vector_size(4 * LANES)));
    if (!BYTE_PRODUCTS) {  // the even bytes before the odd ones, low nibbles before high ones
        const int shift = part % 2 * 8 + part / 2 * 4;
        Pairs shifted = (Pairs)weights >> shift;
        return (Ints)(shift + bits < 16 ? shifted & (uint16_t)((1 << bits) - 1) : shifted);
    }
    if (bits == 4) return (Ints)((Words)weights >> 4 * part) & 0x0F0F0F0F;
    return SIGNED_BYTES ? weights ^ (int32_t)0x80808080 : weights;
}

// `rows` rows of `tile` registers of a block's outputs, for all groups. Constants: bits, float16 scales, rows, tile, mode.
ALWAYS_INLINE void multiply_tile(const Linear *layer, const Activations *x, long block, int first, long row, int mode,
                                 void *y, const int bits, const int halves, const int rows, const int tile) {
    enum { MOST_ROWS = 4, MOST_TILE = 4 };
    const int parts = (bits == 4 ? 2 : 1) * (BYTE_PRODUCTS ? 1 : 2), middle = SIGNED_BYTES && bits == 8 ? 0 : 1 << (bits - 1);
    const long columns_at_once = 32 / bits, steps = x->group_size / columns_at_once;
    const uint8_t *weights = layer->weights + block * (x->columns / columns_at_once) * OUTPUTS * 4 + first * LANES * 4;
    Floats totals[MOST_ROWS][MOST_TILE];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t++) totals[r][t] = spread(0.0f);
    for (long group = 0; group < x->groups; group++) {
        Ints sums[PLANES][MOST_ROWS][MOST_TILE];
        for (int p = 0; p < PLANES; p++)
            for (int r = 0; r < rows; r++)
                for (int t = 0; t < tile; t++) sums[p][r][t] = spread_ints(0);
        const int8_t *at = x->high + (row * x->columns + group * x->group_size) * (BYTE_PRODUCTS ? 1 : 2);
        const long next_row = x->columns * (BYTE_PRODUCTS ? 1 : 2), low = x->low - x->high;
        for (long step = 0; step < steps; step++) {
            Ints held[MOST_TILE];
            for (int t = 0; t < tile; t++) held[t] = load_ints(weights + t * LANES * 4);
            for (int part = 0; part < parts; part++) {
                Ints some[MOST_TILE];
                for (int t = 0; t < tile; t++) some[t] = part_of(held[t], part, bits);
                for (int r = 0; r < rows; r++)
                    for (int p = 0; p < PLANES; p++) {
                        Ints numbers = word_at(at + r * next_row + p * low + 4 * part);
                        for (int t = 0; t < tile; t++) sums[p][r][t] = dot(sums[p][r][t], some[t], numbers);
                    }
            }
            weights += OUTPUTS * 4;
            at += 4 * parts;
        }
        long scale_at = (block * x->groups + group) * OUTPUTS + first * LANES;
        for (int t = 0; t < tile; t++) {
            Floats scale = halves ? load_halves((const uint16_t *)layer->scales + scale_at + t * LANES)
                                  : load((const float *)layer->scales + scale_at + t * LANES);
            for (int r = 0; r < rows; r++) {
                long of_row = (row + r) * x->groups + group;
                Ints sum = sums[0][r][t];
                if (PLANES == 2) sum = (sum << 8) + sums[PLANES - 1][r][t];
                sum -= middle * x->sums[of_row];
                totals[r][t] = fmadd(to_floats(sum), scale * spread(x->scales[of_row]), totals[r][t]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t++) {
            long to = (row + r) * layer->outputs + block * OUTPUTS + (first + t) * LANES;
            if (mode == TO_BFLOAT16) store_bf16((uint16_t *)y + to, totals[r][t]);
            else if (mode == ADD_FLOAT32) store((float *)y + to, load((float *)y + to) + totals[r][t]);
            else store((float *)y + to, totals[r][t]);
        }
}

// Registers side by side: as many as leave the sums of all rows in registers.
#define TILE(rows) ((rows) == 4 && !defined_avx512 ? (REGISTERS < 2 ? REGISTERS : 2) : (REGISTERS < 4 ? REGISTERS : 4))
#if defined(__AVX512F__)
enum { defined_avx512 = 1 };
#else
enum { defined_avx512 = 0 };
#endif

ALWAYS_INLINE void multiply_block(const Linear *layer, const Activations *x, long block, long rows, int mode, void *y,
                                  const int bits, const int halves) {
    long row = 0;
#define TILES_OF(count) \
    for (; row + count <= rows; row += count) \
        for (int first = 0; first < REGISTERS; first += TILE(count)) \
            multiply_tile(layer, x, block, first, row, mode, y, bits, halves, count, TILE(count))
    TILES_OF(4);
    TILES_OF(2);
    TILES_OF(1);
}

// Blocks [block, end) for all rows: a block of weights stays in the cache meanwhile.
void multiply(const Linear *layer, const Activations *x, long rows, long block, long end, int mode, void *y) {
    if (layer->bits >= 16)
        multiply_dense(layer, x, rows, block * OUTPUTS, at_most(end * OUTPUTS, layer->outputs), mode, y);
    else if (layer->bits == 4 && layer->scales_float16)
        for (; block < end; block++) multiply_block(layer, x, block, rows, mode, y, 4, 1);
    else if (layer->bits == 4)
        for (; block < end; block++) multiply_block(layer, x, block, rows, mode, y, 4, 0);
    else if (layer->scales_float16)
        for (; block < end; block++) multiply_block(layer, x, block, rows, mode, y, 8, 1);
    else
        for (; block < end; block++) multiply_block(layer, x, block, rows, mode, y, 8, 0);
}

// args: threads, layer, x [rows, columns], y [rows, outputs], workspace, rows, dtype of x, of y
static void linear_thread(Args args) {
    Linear layer = linear_at(POINTER(const int64_t, 1));
    const void *in = POINTER(const void, 2);
    long rows = args[5], dtype = args[6];
    Activations x = activations_at(POINTER(void, 4), rows, &layer);
    long task, end;
    thread_share(rows * x.groups, &task, &end);
    for (; task < end; task++) {
        float values[LONGEST_GROUP];
        long at = task / x.groups * x.columns + task % x.groups * x.group_size;
        for (long k = 0; k < x.group_size; k += LANES) store(values + k, load_as((int)dtype, in, at + k));
        put_group(&x, task / x.groups, task % x.groups, values);
    }
    barrier();
    thread_share(blocks_of(&layer), &task, &end);
    multiply(&layer, &x, rows, task, end, args[7] == BFLOAT16 ? TO_BFLOAT16 : TO_FLOAT32, POINTER(void, 3));
}
void linear(Args args) { on_threads(linear_thread, args); }

// Unpack a block of outputs: the integers less the middle, scaled.
ALWAYS_INLINE void unpack_block(const Linear *layer, long block, int bits, int dtype, void *weight) {
    long at_once = 32 / bits, steps = layer->columns / at_once, outputs = layer->outputs;
    long groups = layer->columns / layer->group_size;
    int middle = 1 << (bits - 1);
    const uint8_t *bytes = layer->weights + block * steps * OUTPUTS * 4;
    for (long step = 0; step < steps; step++, bytes += OUTPUTS * 4) {
        long scale_at = (block * groups + step * at_once / layer->group_size) * OUTPUTS;
        for (int t = 0; t < REGISTERS; t++) {
            Floats scale = layer->scales_float16 ? load_halves((const uint16_t *)layer->scales + scale_at + t * LANES)
                                                 : load((const float *)layer->scales + scale_at + t * LANES);
            uint32_t words[LANES];  // of an output: its column k is in byte k % 4, the low nibble before the high one
            memcpy(words, bytes + t * LANES * 4, sizeof words);
            long to = step * at_once * outputs + block * OUTPUTS + t * LANES;
            for (int k = 0; k < at_once; k++, to += outputs) {
                float values[LANES];
                for (int lane = 0; lane < LANES; lane++)
                    values[lane] = (float)((int)(words[lane] >> (8 * (k & 3) + (k & 4)) & ((1u << bits) - 1)) - middle);
                store_as(dtype, weight, to, load(values) * scale);
            }
        }
    }
}

// args: threads, layer, weight [columns, outputs], its dtype
static void unpack_thread(Args args) {
    Linear layer = linear_at(POINTER(const int64_t, 1));
    void *weight = POINTER(void, 2);
    long block, end;
    thread_share(blocks_of(&layer), &block, &end);
    for (; block < end; block++) {
        if (layer.bits == 4 && args[3] == BFLOAT16) unpack_block(&layer, block, 4, BFLOAT16, weight);
        else if (layer.bits == 4) unpack_block(&layer, block, 4, FLOAT32, weight);
        else if (args[3] == BFLOAT16) unpack_block(&layer, block, 8, BFLOAT16, weight);
        else unpack_block(&layer, block, 8, FLOAT32, weight);
    }
}
void quantised_unpack(Args args) { on_threads(unpack_thread, args); }
