// A linear layer over a few rows, quantised (linear.c) or of plain numbers (dense.c). step.c runs the same products
// inside a decode step.
#pragma once
#include "common.h"

enum { OUTPUTS = 32, LONGEST_GROUP = 128 };
enum { TO_FLOAT32 = 0, TO_BFLOAT16 = 1, ADD_FLOAT32 = 2 };  // where sums go

// The weights of a layer; the order of its fields in an array of int64 is LINEAR_FIELDS of compute/linear.py. Plain
// numbers have 16 bits (bfloat16) or 32 (float32), lie as [outputs, columns] and have no scales; quantised layers have
// whole blocks of OUTPUTS.
typedef struct {
    const uint8_t *weights;
    const void *scales;  // [blocks, groups, 32] float16 or float32
    long columns, outputs, group_size, bits, scales_float16;
} Linear;

// Rows of activations: for quantised weights, 16-bit integers with a scale and a sum for each group; for plain ones,
// numbers of `dense_dtype`.
typedef struct {
    int8_t *high, *low;  // bytes [rows, columns]; where products are of 16 bits, `high` is int16 [rows, columns]
    float *scales;       // [rows, groups]
    int32_t *sums;       // [rows, groups]
    long columns, group_size, groups, bits;
} Activations;

ALWAYS_INLINE Linear linear_at(const int64_t *fields) {
    Linear layer;
    memcpy(&layer, fields, sizeof layer);
    return layer;
}
ALWAYS_INLINE long blocks_of(const Linear *layer) { return (layer->outputs + OUTPUTS - 1) / OUTPUTS; }

Activations activations_at(void *workspace, long rows, const Linear *layer);
void put_group(const Activations *to, long row, long group, const float *x);
Activations activations_of(const Activations *x, long row);
void multiply(const Linear *layer, const Activations *x, long rows, long block, long end, int mode, void *y);

void dense_group(const Activations *to, long row, long group, const float *x);
void multiply_dense(const Linear *layer, const Activations *x, long rows, long first, long end, int mode, void *y);
