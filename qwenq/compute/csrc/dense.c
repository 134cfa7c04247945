// The product of a matrix of bfloat16 with a few rows of activations.
//
//     y[row][o] = sum_i x[row][i] weight[o][i]
//
// Reading the matrix takes the time, so it is read as it lies, 16 bits a weight. A tile of some outputs by some rows stays
// in registers. Outputs of a tile are streams side by side, for which a CPU does not fetch ahead: without the lines of the
// next tile being asked for in their order, a row was multiplied at 0.4 of the memory's speed. Weights are widened to
// float32 in registers; with AVX-512 BF16, activations are rounded to bfloat16 and pairs are multiplied. Sums are float32,
// and their order does not depend on the number of rows.
#include "linear.h"
#include "vector.h"

// A tile fills the registers but for its operands: 32 of AVX-512 and NEON, 16 of AVX2.
enum { TILE_ROWS = 4, TILE_OUTPUTS = LANES == 8 ? 2 : 4, AT_ONCE = PAIRS ? 2 * LANES : LANES };
enum { LINE = 32 };  // weights of a cache line; columns are a multiple of it

void dense_group(const Activations *to, long row, long group, const float *x) {
    long at = row * to->columns + group * to->group_size;
    for (long k = 0; k < to->group_size; k += LANES) store_as(PAIRS ? BFLOAT16 : FLOAT32, to->high, at + k, load(x + k));
}

ALWAYS_INLINE Floats words_at(int dtype, const void *base, long at) {  // a pair in each lane, or a float32
    return PAIRS ? load((const float *)((const uint16_t *)base + at)) : load_as(dtype, base, at);
}

ALWAYS_INLINE void multiply_tile(const Linear *layer, const Activations *x, long output, long row, int mode, void *y,
                                 const int outputs, const int rows) {
    const long columns = layer->columns, first = output * columns, next = first + outputs * columns;
    Floats sums[TILE_ROWS][TILE_OUTPUTS];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) sums[r][o] = spread(0.0f);
    for (long line = 0; line < columns; line += LINE) {
        for (int o = 0; o < outputs; o++) __builtin_prefetch(layer->weights + 2 * (next + outputs * line + o * LINE));
        for (long i = line; i < line + LINE; i += AT_ONCE) {
            Floats held[TILE_OUTPUTS];
            for (int o = 0; o < outputs; o++) held[o] = words_at(BFLOAT16, layer->weights, first + o * columns + i);
            for (int r = 0; r < rows; r++) {
                Floats value = words_at(FLOAT32, x->high, (row + r) * columns + i);
                for (int o = 0; o < outputs; o++) sums[r][o] = multiply_words(PAIRS, held[o], value, sums[r][o]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) {
            long to = (row + r) * layer->outputs + output + o;
            float sum = total(sums[r][o]) + (mode == ADD_FLOAT32 ? ((float *)y)[to] : 0.0f);
            put_as(mode == TO_BFLOAT16 ? BFLOAT16 : FLOAT32, y, to, sum);
        }
}

ALWAYS_INLINE void multiply_rows(const Linear *layer, const Activations *x, long rows, long output, int mode, void *y,
                                 const int outputs) {
    long row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS) multiply_tile(layer, x, output, row, mode, y, outputs, TILE_ROWS);
    for (; row + 2 <= rows; row += 2) multiply_tile(layer, x, output, row, mode, y, outputs, 2);
    if (row < rows) multiply_tile(layer, x, output, row, mode, y, outputs, 1);
}

// Outputs [first, end) for all rows.
void multiply_dense(const Linear *layer, const Activations *x, long rows, long first, long end, int mode, void *y) {
    for (; first + TILE_OUTPUTS <= end; first += TILE_OUTPUTS) multiply_rows(layer, x, rows, first, mode, y, TILE_OUTPUTS);
    for (; first < end; first++) multiply_rows(layer, x, rows, first, mode, y, 1);
}
