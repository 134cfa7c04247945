// Causal attention over several queries of a sequence:
//
//     out = softmax(scale * Q K^T, causal) V
//
// A tile of queries is taken at a time: their scores against all keys up to the last of them, the powers of each row
// and their sum, and the weighted sum of the values, all in float32. A tile's scores stay in the cache, so that no
// partial result has to be rescaled as in FlashAttention (Dao et al., arXiv 2205.14135).
//
// Operands are packed as 32-bit words in the order in which the multiplications read them: keys by tiles of
// [d, TILE keys], queries and values by rows. A word is a float32; where the CPU multiplies pairs of bfloat16 (AVX-512
// BF16) it is a pair: two neighbours of d for keys and queries, two neighbouring tokens for values, and the powers are
// then rounded to bfloat16.
#include "vector.h"

// A tile of sums, QUERIES x REGISTERS, fills the registers but for the operands: 32 of AVX-512 and NEON, 16 of AVX2.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define QUERIES 4
#else
#define QUERIES 8
#endif
#define REGISTERS 3
#define TILE (REGISTERS * LANES)
#define HIDDEN (-3e38f)  // the score of a key that a query must not see

enum {
    DTYPE = 1, QUERY, KEY, VALUE, STARTS, OUT, PACKED_KEYS, PACKED_VALUES, SCRATCH, SCRATCH_BYTES, WIDTH, BATCH, HEADS,
    KV_HEADS, TOKENS, SLOTS, D, SCALE, STRIDES  // of batch, head and token: query, key, value
};

ALWAYS_INLINE void store_powers(int pairs, void *powers, long at, Floats x) {
    if (pairs) store_bf16((uint16_t *)powers + at, x);
    else store((float *)powers + at, x);
}

// Element `at` of a row as a word, or elements `at` and `at + 1` as a pair.
ALWAYS_INLINE uint32_t word_of(int dtype, int pairs, const char *row, long at) {
    uint32_t word;
    if (dtype == FLOAT32) memcpy(&word, row + 4 * at, sizeof word);
    else if (pairs) memcpy(&word, row + 2 * at, sizeof word);
    else word = (uint32_t)((const uint16_t *)row)[at] << 16;
    return word;
}

// The row of a token; beyond the last token, the last one's.
ALWAYS_INLINE const char *row_of(Args args, int which, int dtype, long batch, long head, long token) {
    const int64_t *stride = args + STRIDES + 3 * (which - QUERY);
    long last = args[which == QUERY ? TOKENS : SLOTS] - 1;
    long at = batch * stride[0] + head * stride[1] + at_most(token, last) * stride[2];
    return POINTER(char, which) + at * (dtype == BFLOAT16 ? 2 : 4);
}

// Pack a tile of keys of one head, and the same tokens' values but in float32.
ALWAYS_INLINE void pack_tile(Args args, int dtype, int pairs, long group, long token) {
    long batch = group / args[KV_HEADS], head = group % args[KV_HEADS], d = args[D], width = args[WIDTH];
    long per_word = pairs ? 2 : 1, words = d / per_word;
    uint32_t *keys = POINTER(uint32_t, PACKED_KEYS) + (group * width + token) * words;
    uint32_t *values = POINTER(uint32_t, PACKED_VALUES) + (group * width + token) / per_word * d;
    for (int i = 0; i < TILE; i++) {
        const char *row = row_of(args, KEY, dtype, batch, head, token + i);
        for (long word = 0; word < words; word++) keys[word * TILE + i] = word_of(dtype, pairs, row, word * per_word);
    }
    if (dtype == FLOAT32) return;  // values are read as they lie
    for (int i = 0; i < TILE; i += (int)per_word, values += d) {
        const char *row = row_of(args, VALUE, dtype, batch, head, token + i);
        const char *next = row_of(args, VALUE, dtype, batch, head, token + i + 1);
        for (long column = 0; column < d; column++)
            values[column] = pairs ? word_of(dtype, 0, row, column) >> 16 | word_of(dtype, 0, next, column)
                                   : word_of(dtype, 0, row, column);
    }
}

// Scores of the tile's queries with a tile of keys. Sums of at most CHUNK words are added up in registers, and these in
// memory: a float32 sum of a wide head keeps more of its digits.
#define CHUNK 128
ALWAYS_INLINE void multiply_keys(int pairs, long words, const float *queries, const float *keys, float *scores, long width) {
    for (long first = 0; first < words; first += CHUNK) {
        Floats sum[QUERIES][REGISTERS];
        for (int q = 0; q < QUERIES; q++)
            for (int i = 0; i < REGISTERS; i++) sum[q][i] = spread(0);
        long last = at_most(first + CHUNK, words);
        for (long word = first; word < last; word++, keys += TILE) {
            Floats key[REGISTERS];
            for (int i = 0; i < REGISTERS; i++) key[i] = load(keys + i * LANES);
            for (int q = 0; q < QUERIES; q++) {
                Floats query = spread(queries[q * words + word]);
                for (int i = 0; i < REGISTERS; i++) sum[q][i] = multiply_words(pairs, query, key[i], sum[q][i]);
            }
        }
        for (int q = 0; q < QUERIES; q++)
            for (int i = 0; i < REGISTERS; i++) {
                float *to = scores + q * width + i * LANES;
                if (first) sum[q][i] += load(to);
                store(to, sum[q][i]);
            }
    }
}

// e^(scale (score - largest)) of the first `count` scores of a row, zeros up to `end`; the inverse of their sum.
ALWAYS_INLINE float softmax(int pairs, float *scores, void *powers, long count, long end, float scale) {
    for (long at = count; at < end; at++) scores[at] = HIDDEN;
    Floats largest = spread(HIDDEN), sum = spread(0);
    for (long at = 0; at < end; at += LANES) largest = larger(load(scores + at), largest);
    largest = spread(largest_lane(largest));
    for (long at = 0; at < end; at += LANES) {
        Floats power = exponential((load(scores + at) - largest) * spread(scale));
        sum = sum + power;  // with those of hidden keys: e^-87, which no float32 sum from 1 on shows
        store_powers(pairs, powers, at, power);
    }
    memset((char *)powers + count * (pairs ? 2 : 4), 0, (size_t)(end - count) * (pairs ? 2 : 4));
    return 1 / total(sum);
}

// Weighted sums of `registers` registers of the values' columns.
ALWAYS_INLINE void multiply_values(int pairs, int dtype, int registers, long words, const float *powers, long width,
                                   const float *values, long value_stride, const float *inverses, void *out,
                                   long stride, long rows) {
    Floats sum[QUERIES][REGISTERS];
    for (int q = 0; q < QUERIES; q++)
        for (int i = 0; i < registers; i++) sum[q][i] = spread(0);
    for (long word = 0; word < words; word++, values += value_stride) {
        Floats value[REGISTERS];
        for (int i = 0; i < registers; i++) value[i] = load(values + i * LANES);
        for (int q = 0; q < QUERIES; q++) {
            Floats power = spread(powers[q * width + word]);
            for (int i = 0; i < registers; i++) sum[q][i] = multiply_words(pairs, power, value[i], sum[q][i]);
        }
    }
    for (int q = 0; q < QUERIES; q++)
        for (int i = 0; i < registers && q < rows; i++)
            store_as(dtype, out, q * stride + i * LANES, sum[q][i] * spread(inverses[q]));
}

// A tile of queries of one head, from `first` on.
ALWAYS_INLINE void attend_tile(Args args, int dtype, int pairs, long batch, long head, long first) {
    long d = args[D], width = args[WIDTH], per_word = pairs ? 2 : 1, words = d / per_word;
    long shared = head / (args[HEADS] / args[KV_HEADS]), group = batch * args[KV_HEADS] + shared;
    const float *keys = POINTER(float, PACKED_KEYS) + group * width * words;
    const float *values = POINTER(float, PACKED_VALUES) + group * width / per_word * d;
    long value_stride = d;
    if (dtype == FLOAT32) {
        values = (const float *)row_of(args, VALUE, dtype, batch, shared, 0);
        value_stride = args[STRIDES + 3 * (VALUE - QUERY) + 2];
    }
    float *scores = (float *)(POINTER(char, SCRATCH) + thread_index() * args[SCRATCH_BYTES]);
    float *powers = scores + QUERIES * width, *queries = powers + QUERIES * width, inverses[QUERIES];
    for (int q = 0; q < QUERIES; q++) {
        const char *row = row_of(args, QUERY, dtype, batch, head, first + q);
        if (dtype == FLOAT32 || pairs) memcpy(queries + q * words, row, (size_t)words * 4);
        else for (long i = 0; i < d; i += LANES) store(queries + q * d + i, load_bf16((const uint16_t *)row + i));
    }
    long slot = POINTER(int64_t, STARTS)[batch] + first, end = at_most(slot + QUERIES, args[SLOTS]);
    for (long at = 0; at < end; at += TILE)
        multiply_keys(pairs, words, queries, keys + at * words, scores + at, width);
    long padded = (end + LANES - 1) / LANES * LANES, row_words = width / per_word;
    for (int q = 0; q < QUERIES; q++)
        inverses[q] = softmax(pairs, scores + q * width, powers + q * row_words, at_most(slot + q + 1, args[SLOTS]),
                              padded, float_of(args[SCALE]));
    long rows = args[TOKENS] - first, stride = args[HEADS] * d, size = dtype == BFLOAT16 ? 2 : 4;
    long count = d / LANES, parts = (count + REGISTERS - 1) / REGISTERS;
    char *out = POINTER(char, OUT) + ((batch * args[TOKENS] + first) * args[HEADS] + head) * d * size;
    for (long part = 0; part < parts; part++) {  // as even as can be: a tile of one register waits for its sums
        long column = part * count / parts * LANES, registers = (part + 1) * count / parts - part * count / parts;
        char *to = out + column * size;
        long tokens = (end + per_word - 1) / per_word;
#define SUMS(registers)                                                                                               \
    multiply_values(pairs, dtype, registers, tokens, powers, row_words, values + column, value_stride, inverses, to, \
                    stride, rows)
        if (registers == 1) SUMS(1);
        else if (registers == 2) SUMS(2);
        else SUMS(3);
#undef SUMS
    }
}

ALWAYS_INLINE void attend(Args args, int dtype) {
    const int pairs = PAIRS && dtype == BFLOAT16;
    long tiles = args[WIDTH] / TILE, first, end;
    thread_share(args[BATCH] * args[KV_HEADS] * tiles, &first, &end);
    for (long task = first; task < end; task++)
        if (task % tiles * TILE < args[SLOTS]) pack_tile(args, dtype, pairs, task / tiles, task % tiles * TILE);
    barrier();
    long blocks = (args[TOKENS] + QUERIES - 1) / QUERIES, tasks = args[BATCH] * args[HEADS] * blocks;
    // By turns: later queries of a head see more keys.
    for (long task = thread_index(); task < tasks; task += thread_count()) {
        long head = task / blocks;
        attend_tile(args, dtype, pairs, head / args[HEADS], head % args[HEADS], task % blocks * QUERIES);
    }
}

// The arguments are named above: addresses of q [batch, heads, tokens, d], k and v [batch, kv_heads, slots, d] by their
// strides, starts [batch] (the slot of each row's first query), out [batch, tokens, heads, d], packed keys and values
// [batch, kv_heads, WIDTH, d] words each, the threads' scratch; WIDTH is `slots` rounded up to a multiple of TILE.
KERNEL_BY_DTYPE(causal_attention, attend)
