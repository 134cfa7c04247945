// The inner loops of GPTQ: columns of a lazy block rounded one after the other (Frantar et al. 2023, Algorithm 1), the
// columns of coordinate descent (QuantEase, Behdin et al. 2023), and a group's scale refitted in closed form
// (arXiv 2602.02126).
//
// All take a block as compute/columns.py describes it: tensors are [columns, rows], so that a column of the weight is
// contiguous, and rows are independent. A strip of rows goes through all columns while its values stay in the cache. What
// earlier columns push onto a column is subtracted when its turn comes, in their order; every product is rounded before it
// is subtracted (no contraction): the integers and errors are torch's, bit for bit, in every variant.
#include "common.h"

enum { STRIP = 64, WIDEST_GROUP = 256 };

// clamp(round(x / scale + zero), 0, levels), ties to even; what is not a number stays so
ALWAYS_INLINE float nearest(float x, float scale, float zero, float levels) {
    float q = rintf(x / scale + zero);
    q = q < 0 ? 0 : q;
    return q > levels ? levels : q;
}

typedef struct {
    long count, rows;      // columns of the block; rows of the weight
    const float *columns;  // [count, rows]: weights, or gradients of the objective
    const float *values;   // [count, rows]: quantised values before a move
    const float *factors;  // [count, count]: row i is what column i receives from each earlier column; its pivot at i
    const float *scales, *zeros;  // [groups, rows]
    const int64_t *groups;        // [count]
    float levels;
    uint8_t *integers;  // [count, rows]
    float *errors;      // [count, rows]: what a column pushes onto the later ones
    float *costs;       // [rows]
} Block;

enum { ROUND, MOVE };

// ROUND: q = nearest(w), error = (w - q) / U_ii, cost error^2.
// MOVE: to the grid's value nearest to q - G / H_ii; the error is the old value less the new one; the objective changes by
// error (error H_ii / 2 - G), as it is a parabola in one integer.
ALWAYS_INLINE void strip(const Block *b, int rule, long at, const int n) {
    float cost[STRIP] = {0}, w[STRIP];
    for (long i = 0; i < b->count; i++) {
        const float *s = b->scales + b->groups[i] * b->rows + at, *z = b->zeros + b->groups[i] * b->rows + at;
        const float *u = b->factors + i * b->count, *before = b->values + i * b->rows + at, pivot = u[i];
        float *e = b->errors + i * b->rows + at;
        uint8_t *integers = b->integers + i * b->rows + at;
        for (int k = 0; k < n; k++) w[k] = b->columns[i * b->rows + at + k];
        for (long j = 0; j < i; j++) {
            const float factor = u[j], *pushed = b->errors + j * b->rows + at;
            for (int k = 0; k < n; k++) w[k] -= factor * pushed[k];
        }
        for (int k = 0; k < n; k++) {
            float q = nearest(rule == MOVE ? before[k] - w[k] / pivot : w[k], s[k], z[k], b->levels);
            float value = (q - z[k]) * s[k];
            e[k] = rule == MOVE ? before[k] - value : (w[k] - value) / pivot;
            cost[k] += rule == MOVE ? e[k] * (e[k] * (pivot * 0.5f) - w[k]) : e[k] * e[k];
            integers[k] = (uint8_t)(int32_t)(q == q ? q : 0.0f);
        }
    }
    for (int k = 0; k < n; k++) b->costs[at + k] = cost[k];
}

ALWAYS_INLINE void all_strips(Args args, int rule) {
    const Block block = {
        args[10], args[11], POINTER(float, 1), POINTER(float, 2), POINTER(float, 3), POINTER(float, 4), POINTER(float, 5),
        POINTER(int64_t, 6), float_of(args[12]), POINTER(uint8_t, 7), POINTER(float, 8), POINTER(float, 9),
    };
    long unit, end;
    thread_share((block.rows + STRIP - 1) / STRIP, &unit, &end);
    for (; unit < end; unit++) {
        long at = unit * STRIP, n = at_most(STRIP, block.rows - at);
        if (n == STRIP) strip(&block, rule, at, STRIP);
        else strip(&block, rule, at, (int)n);
    }
}

// args: threads, columns, values, factors, scales, zeros, groups, integers, errors, costs, count, rows, levels
static void round_thread(Args args) { all_strips(args, ROUND); }
static void move_thread(Args args) { all_strips(args, MOVE); }
void round_columns(Args args) { on_threads(round_thread, args); }
void move_columns(Args args) { on_threads(move_thread, args); }

// ---- a group's scale for its integers -------------------------------------------------------------------------------
// With u = integers - zero, G the gradient before the moves and H the group's block of the Hessian, the objective changes
// by delta u'G + delta^2/2 u'Hu: least at delta = -u'G / u'Hu. The moves have changed G by -H errors since.

// A scale as a file holds it: float16, never zero or infinite.
ALWAYS_INLINE float storable(float scale) {
    const float largest = 65504.0f, smallest = 6.103515625e-05f;
    float bounded = scale > largest ? largest : scale < -largest ? -largest : scale;
    float half = (float)(_Float16)bounded;
    return fabsf(half) < smallest ? (scale < 0 ? -smallest : smallest) : half;
}

ALWAYS_INLINE void fit_strip(Args args, long at, const int n) {
    const long count = args[12], rows = args[13];
    const float *gradient = POINTER(float, 1), *values = POINTER(float, 2), *H = POINTER(float, 3);
    const float *scale = POINTER(float, 4), *zero = POINTER(float, 5), *errors = POINTER(float, 7);
    const uint8_t *integers = POINTER(uint8_t, 6);
    float *new_scale = POINTER(float, 8), *new_values = POINTER(float, 9), *less = POINTER(float, 10);
    float *change = POINTER(float, 11);
    float u[WIDEST_GROUP][STRIP], slope[STRIP] = {0}, curve[STRIP] = {0};
    for (long i = 0; i < count; i++)
        for (int k = 0; k < n; k++) u[i][k] = (float)integers[i * rows + at + k] - zero[at + k];
    for (long i = 0; i < count; i++) {
        float Hu[STRIP] = {0};
        for (long j = 0; j < count; j++) {
            const float h = H[i * count + j];
            for (int k = 0; k < n; k++) Hu[k] += h * u[j][k];
        }
        const float *g = gradient + i * rows + at, *e = errors + i * rows + at;
        for (int k = 0; k < n; k++) {
            slope[k] += u[i][k] * g[k] - e[k] * Hu[k];
            curve[k] += u[i][k] * Hu[k];
        }
    }
    for (int k = 0; k < n; k++) {
        float old = scale[at + k], wanted = old - slope[k] / curve[k];
        float stored = isfinite(wanted) && wanted != 0 ? storable(wanted) : old, step = stored - old;
        float changed = step * (slope[k] + step * (curve[k] / 2));
        new_scale[at + k] = changed < 0 ? stored : old;
        change[at + k] = changed < 0 ? changed : 0;
    }
    for (long i = 0; i < count; i++)
        for (int k = 0; k < n; k++) {
            float value = u[i][k] * new_scale[at + k];
            new_values[i * rows + at + k] = value;
            less[i * rows + at + k] = values[i * rows + at + k] - value;
        }
}

// args: threads, gradient, values, H, scale, zero, integers, errors, new_scale, new_values, less, change, count, rows
static void fit_thread(Args args) {
    long unit, end, rows = args[13];
    thread_share((rows + STRIP - 1) / STRIP, &unit, &end);
    for (; unit < end; unit++) {
        long at = unit * STRIP, n = at_most(STRIP, rows - at);
        if (n == STRIP) fit_strip(args, at, STRIP);
        else fit_strip(args, at, (int)n);
    }
}
void fit_scale(Args args) { on_threads(fit_thread, args); }
