// The product of a matrix of bfloat16 or float32 with a few rows of activations.
//
//     y[row][o] = sum_i x[row][i] weight[o][i]
//
// Reading the matrix takes the time, so it is read as it lies. A tile of some outputs by some rows stays in registers.
// Outputs of a tile are streams side by side, for which a CPU does not fetch ahead: without the lines of the next tile
// being asked for in their order, a row was multiplied at 0.4 of the memory's speed. bfloat16 is widened to float32 in
// registers; with AVX-512 BF16, its activations are rounded to bfloat16 and pairs are multiplied. Sums are float32, and
// their order does not depend on the number of rows.
#include "linear.h"
#include "vector.h"

// A tile fills the registers but for its operands: 32 of AVX-512 and NEON, 16 of AVX2.
enum { TILE_ROWS = 4, TILE_OUTPUTS = LANES == 8 ? 2 : 4 };
enum { LINE = 64 };  // bytes of a cache line; columns are a multiple of it

void dense_group(const Activations *to, long row, long group, const float *x) {
    long at = row * to->columns + group * to->group_size;
    for (long k = 0; k < to->group_size; k += LANES) store_as(dense_dtype(to->bits), to->high, at + k, load(x + k));
}

ALWAYS_INLINE Floats words_at(int pairs, int dtype, const void *base, long at) {  // a pair in each lane, or a float32
    return pairs ? load((const uint16_t *)base + at) : load_as(dtype, base, at);
}

ALWAYS_INLINE void multiply_tile(const Linear *layer, const Activations *x, long output, long row, int mode, void *y,
                                 const int dtype, const int outputs, const int rows) {
    const int pairs = PAIRS && dtype == BFLOAT16, size = dtype == BFLOAT16 ? 2 : 4, line = LINE / size;
    const long columns = layer->columns, first = output * columns, next = first + outputs * columns;
    Floats sums[TILE_ROWS][TILE_OUTPUTS];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) sums[r][o] = spread(0.0f);
    for (long at = 0; at < columns; at += line) {
        for (int o = 0; o < outputs; o++) __builtin_prefetch(layer->weights + size * (next + outputs * at + o * line));
        for (long i = at; i < at + line; i += pairs ? 2 * LANES : LANES) {
            Floats held[TILE_OUTPUTS];
            for (int o = 0; o < outputs; o++) held[o] = words_at(pairs, dtype, layer->weights, first + o * columns + i);
            for (int r = 0; r < rows; r++) {
                Floats value = words_at(pairs, FLOAT32, x->high, (row + r) * columns + i);
                for (int o = 0; o < outputs; o++) sums[r][o] = multiply_words(pairs, held[o], value, sums[r][o]);
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
                                 const int dtype, const int outputs) {
    long row = 0;
#define TILES_OF(count) \
    for (; row + count <= rows; row += count) multiply_tile(layer, x, output, row, mode, y, dtype, outputs, count)
    TILES_OF(TILE_ROWS);
    TILES_OF(2);
    TILES_OF(1);
}

ALWAYS_INLINE void multiply_outputs(const Linear *layer, const Activations *x, long rows, long first, long end, int mode,
                                    void *y, const int dtype) {
    for (; first + TILE_OUTPUTS <= end; first += TILE_OUTPUTS)
        multiply_rows(layer, x, rows, first, mode, y, dtype, TILE_OUTPUTS);
    for (; first < end; first++) multiply_rows(layer, x, rows, first, mode, y, dtype, 1);
}

// Outputs [first, end) for all rows.
void multiply_dense(const Linear *layer, const Activations *x, long rows, long first, long end, int mode, void *y) {
    if (layer->bits == 16) multiply_outputs(layer, x, rows, first, end, mode, y, BFLOAT16);
    else multiply_outputs(layer, x, rows, first, end, mode, y, FLOAT32);
}
