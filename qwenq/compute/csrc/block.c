// What lies between a block's products: RMSNorm, rotary positions, the gated activation. One pass over memory each.
//
//     rms_norm   out = weight * x / sqrt(mean(x^2) + eps)              Zhang and Sennrich, arXiv 1910.07467
//     rotate     (a, b) -> (a cos - b sin, b cos + a sin), pairs (x[i], x[i + d/2])   Su et al., arXiv 2104.09864
//     swiglu     out = up * gate / (1 + e^-gate)                       Shazeer, arXiv 2002.05202
//
// Activations are bfloat16 or float32, sums and powers float32. What the blocks of transformers round to bfloat16 on
// the way (the normalised x, both products of a rotation, the activation before it is multiplied by `up`) is rounded
// here, too. Widths are multiples of 16.
#include "vector.h"

enum { DTYPE = 1, FIRST = 2 };  // of every kernel's arguments: the dtype of its activations, then its own

// `weight_dtype`: with float32 weights the result alone is rounded.
ALWAYS_INLINE void norm_rows(Args args, int dtype, int weight_dtype) {
    const char *x = POINTER(char, FIRST + 1);
    const void *weights = POINTER(void, FIRST + 2);
    void *out = POINTER(void, FIRST + 3);
    long rows = args[FIRST + 4], d = args[FIRST + 5], weight_rows = args[FIRST + 6], first, end;
    float eps = float_of(args[FIRST + 7]);
    thread_share(rows, &first, &end);
    for (long row = first; row < end; row++) {
        long at = row * d, weight = row % weight_rows * d;
        Floats squares = spread(0), others = spread(0);  // two sums, as one would wait for itself
        long i = 0;
#pragma GCC unroll 2
        for (; i + 2 * LANES <= d; i += 2 * LANES) {
            Floats one = load_as(dtype, x, at + i), other = load_as(dtype, x, at + i + LANES);
            squares = fmadd(one, one, squares), others = fmadd(other, other, others);
        }
        if (i < d) {
            Floats one = load_as(dtype, x, at + i);
            squares = fmadd(one, one, squares);
        }
        squares = squares + others;
        Floats scale = spread(1 / sqrtf(total(squares) / (float)d + eps));
#pragma GCC unroll 4
        for (i = 0; i < d; i += LANES) {
            Floats normed = rounded_as(weight_dtype, load_as(dtype, x, at + i) * scale);
            store_as(dtype, out, at + i, normed * load_as(weight_dtype, weights, weight + i));
        }
    }
}
static void norm_bf16(Args args) { norm_rows(args, BFLOAT16, BFLOAT16); }
static void norm_bf16_f32(Args args) { norm_rows(args, BFLOAT16, FLOAT32); }
static void norm_f32(Args args) { norm_rows(args, FLOAT32, FLOAT32); }

// dtype, dtype of the weights, x [rows, d], weight [weight_rows, d] (row r has weight r % weight_rows), out [rows, d],
// rows, d, weight_rows, eps
void rms_norm(Args args) {
    if (args[DTYPE] == FLOAT32) on_threads(norm_f32, args);
    else on_threads(args[FIRST] == FLOAT32 ? norm_bf16_f32 : norm_bf16, args);
}

ALWAYS_INLINE void swiglu_rows(Args args, int dtype) {
    const void *gates = POINTER(void, FIRST), *ups = POINTER(void, FIRST + 1);
    void *out = POINTER(void, FIRST + 2);
    long rows = args[FIRST + 3], d = args[FIRST + 4], gate_stride = args[FIRST + 5], up_stride = args[FIRST + 6];
    long first, end;
    thread_share(rows, &first, &end);
    for (long row = first; row < end; row++)
#pragma GCC unroll 4
        for (long i = 0; i < d; i += LANES) {
            Floats gate = load_as(dtype, gates, row * gate_stride + i);
            Floats below = spread(1) + exponential(-gate);
            // `exponential` ends at e^87. Beyond, the power is infinite, so that -inf gives NaN as in torch.
            below = where_less(gate, spread(-87), spread(INFINITY), below);
            Floats activated = rounded_as(dtype, gate / below);
            store_as(dtype, out, row * d + i, activated * load_as(dtype, ups, row * up_stride + i));
        }
}

// dtype, gate, up [rows, d] with these strides, out [rows, d], rows, d, gate_stride, up_stride
KERNEL_BY_DTYPE(swiglu, swiglu_rows)

// One register of each half of all heads of a token. `table` is the dtype of cosines and sines: float32 tables make the
// arithmetic float32, and the result alone is rounded.
ALWAYS_INLINE void rotate_heads(int dtype, int table, char *x, long heads, long d, Floats cos1, Floats cos2,
                                Floats sin1, Floats sin2, long i) {
    for (long head = 0; head < heads; head++) {
        long at = head * d + i, paired = at + d / 2;
        Floats a = load_as(dtype, x, at), b = load_as(dtype, x, paired);
        store_as(dtype, x, at, rounded_as(table, a * cos1) + rounded_as(table, b * sin1));
        store_as(dtype, x, paired, rounded_as(table, b * cos2) + rounded_as(table, a * sin2));
    }
}

ALWAYS_INLINE void rotate_tokens(Args args, int dtype, int table) {
    char *x = POINTER(char, FIRST + 1), *cosines = POINTER(char, FIRST + 2), *sines = POINTER(char, FIRST + 3);
    long batch = args[FIRST + 4], tokens = args[FIRST + 5], heads = args[FIRST + 6], d = args[FIRST + 7];
    const int64_t *stride = args + FIRST + 8;  // of batch and token: x, cosines, sines
    long size = dtype == BFLOAT16 ? 2 : 4, table_size = table == BFLOAT16 ? 2 : 4, half = d / 2, first, end;
    thread_share(batch * tokens, &first, &end);
    for (long task = first; task < end; task++) {
        long row = task / tokens, token = task % tokens;
        char *here = x + (row * stride[0] + token * stride[1]) * size;
        const char *cos = cosines + (row * stride[2] + token * stride[3]) * table_size;
        const char *sin = sines + (row * stride[4] + token * stride[5]) * table_size;
        long i = 0;
        for (; i + LANES <= half; i += LANES)
            rotate_heads(dtype, table, here, heads, d, load_as(table, cos, i), load_as(table, cos, half + i),
                         load_as(table, sin, i), load_as(table, sin, half + i), i);
        for (; i < half; i++)  // half a register is left where d is an odd multiple of 16
            for (long head = 0; head < heads; head++) {
                long at = head * d + i, paired = at + half;
                float a = get_as(dtype, here, at), b = get_as(dtype, here, paired);
                float a_cos = round_as(table, a * get_as(table, cos, i));
                float b_sin = round_as(table, b * get_as(table, sin, i));
                float b_cos = round_as(table, b * get_as(table, cos, half + i));
                float a_sin = round_as(table, a * get_as(table, sin, half + i));
                put_as(dtype, here, at, a_cos + b_sin);
                put_as(dtype, here, paired, b_cos + a_sin);
            }
    }
}
static void rotate_bf16(Args args) { rotate_tokens(args, BFLOAT16, BFLOAT16); }
static void rotate_bf16_f32(Args args) { rotate_tokens(args, BFLOAT16, FLOAT32); }
static void rotate_f32(Args args) { rotate_tokens(args, FLOAT32, FLOAT32); }

// dtype, dtype of the tables, x [batch, tokens, heads, d] (changed), cosines and sines [batch, tokens, d], where the
// first half of the sines is negated, batch, tokens, heads, d, and the strides of batch and token of x, cosines, sines
void rotate(Args args) {
    if (args[DTYPE] == FLOAT32) on_threads(rotate_f32, args);
    else on_threads(args[FIRST] == FLOAT32 ? rotate_bf16_f32 : rotate_bf16, args);
}
