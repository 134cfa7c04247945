// Products of a few rows with a bfloat16 matrix, as decode steps have them, on CPUs without bfloat16 instructions:
//
//     out[row][o] = bias[o] + sum_i x[row][i] * weight[o][i]
//
// Reading the matrix takes the time, so it is read once: as it lies, 16 bits a weight, widened to float32 in registers.
// Each weight that is widened serves four rows. Sums are float32, and rounded once.
#include "vector.h"

enum { DTYPE = 1, X, WEIGHT, BIAS, OUT, ROWS, IN, OUTS, STRIDE };

// Some rows times some outputs.
ALWAYS_INLINE void multiply_tile(Args args, int dtype, int rows, int outs, long row, long output) {
    long in = args[IN], stride = args[STRIDE], i = 0;
    const float *x = POINTER(float, X) + row * in, *bias = POINTER(float, BIAS);
    const uint16_t *weight = POINTER(uint16_t, WEIGHT) + output * stride;
    Floats sum[4][3];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outs; o++) sum[r][o] = spread(0);
    for (; i + LANES <= in; i += LANES) {
        Floats held[3];
        for (int o = 0; o < outs; o++) held[o] = load_bf16(weight + o * stride + i);
        for (int r = 0; r < rows; r++) {
            Floats value = load(x + r * in + i);
            for (int o = 0; o < outs; o++) sum[r][o] = fmadd(held[o], value, sum[r][o]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outs; o++) {
            float found = total(sum[r][o]);
            for (long k = i; k < in; k++) found += x[r * in + k] * get_as(BFLOAT16, weight, o * stride + k);
            if (bias) found += bias[output + o];
            put_as(dtype, POINTER(void, OUT), (row + r) * args[OUTS] + output + o, found);
        }
}

ALWAYS_INLINE void multiply_outputs(Args args, int dtype, int outs, long output) {
    long row = 0;
    for (; row + 4 <= args[ROWS]; row += 4) multiply_tile(args, dtype, 4, outs, row, output);
    for (; row + 2 <= args[ROWS]; row += 2) multiply_tile(args, dtype, 2, outs, row, output);
    if (row < args[ROWS]) multiply_tile(args, dtype, 1, outs, row, output);
}

ALWAYS_INLINE void multiply_share(Args args, int dtype) {
    long first, end;
    thread_share(args[OUTS], &first, &end);
    for (; first + 3 <= end; first += 3) multiply_outputs(args, dtype, 3, first);  // 4 x 3 fill 16 registers
    for (; first < end; first++) multiply_outputs(args, dtype, 1, first);
}
static void multiply_to_bf16(Args args) { multiply_share(args, BFLOAT16); }
static void multiply_to_f32(Args args) { multiply_share(args, FLOAT32); }

// dtype of out, x float32 [rows, in], weight bfloat16 [outs, in] by its stride, bias float32 [outs] or 0,
// out [rows, outs]
void dense_bf16(Args args) { on_threads(args[DTYPE] == BFLOAT16 ? multiply_to_bf16 : multiply_to_f32, args); }
