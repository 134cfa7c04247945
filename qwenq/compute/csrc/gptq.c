// The inner loops of GPTQ: columns of a lazy block rounded one after the other (Frantar et al. 2023, Algorithm 1), the
// columns of coordinate descent (QuantEase, Behdin et al. 2023), and a group's scale refitted in closed form
// (arXiv 2602.02126).
//
// All take a block as compute/columns.py describes it: tensors are [columns, rows], so that a column of the weight is
// contiguous, and rows are independent. A strip of rows passes through all columns in registers. What earlier columns
// push onto a column is subtracted when it is reached, in their order; every product is rounded before it is subtracted
// (no contraction): the integers and errors are torch's, bit for bit, in every variant. The errors of a strip are read
// again for each later column, so they also lie side by side in a workspace, which stays in the first-level cache.
#include "vector.h"

enum { STRIP = 64, REGISTERS = STRIP / LANES };

// clamp(round(x / scale + zero), 0, levels), ties to even; what is not a number stays so
ALWAYS_INLINE Floats nearest(Floats x, Floats scale, Floats zero, Floats levels) {
    return smaller(levels, larger(spread(0.0f), nearest_whole(x / scale + zero)));
}

typedef struct {  // the arguments
    int64_t threads;
    const float *columns;  // [count, rows]: weights, or gradients of the objective
    const float *values;   // [count, rows]: quantised values before a move
    const float *factors;  // [count, count]: row i is what column i receives from each earlier column; its pivot at i
    const float *scales, *zeros;  // [groups, rows]
    const int64_t *groups;        // [count]
    uint8_t *integers;  // [count, rows]
    float *errors;      // [count, rows]: what a column pushes onto the later ones
    float *costs;       // [rows]
    float *pushed;      // [threads, count, STRIP]: workspace, the errors of a strip side by side
    int64_t count, rows;  // columns of the block; rows of the weight
    Float32 levels;
} Block;

enum { ROUND, MOVE };

// ROUND: q = nearest(w), error = (w - q) / U_ii, cost error^2.
// MOVE: to the grid's value nearest to q - G / H_ii; the error is the old value less the new one; the objective changes
// by error (error H_ii / 2 - G), as it is a parabola in one integer.
ALWAYS_INLINE void strip(const Block *b, int rule, long at, const int registers) {
    Floats cost[REGISTERS], w[REGISTERS], levels = spread(b->levels.value);
    float integers[STRIP] = {0};
    for (int r = 0; r < registers; r++) cost[r] = spread(0.0f);
    for (long i = 0; i < b->count; i++) {
        const float *s = b->scales + b->groups[i] * b->rows + at, *z = b->zeros + b->groups[i] * b->rows + at;
        const float *u = b->factors + i * b->count;
        const long here = i * b->rows + at;
        for (int r = 0; r < registers; r++) w[r] = load(b->columns + here + r * LANES);
        for (long j = 0; j < i; j++) {
            Floats factor = spread(u[j]);
            for (int r = 0; r < registers; r++) w[r] -= factor * load(b->pushed + j * STRIP + r * LANES);
        }
        Floats pivot = spread(u[i]), half = pivot * spread(0.5f);
        for (int r = 0; r < registers; r++) {
            Floats scale = load(s + r * LANES), zero = load(z + r * LANES), q, error;
            if (rule == ROUND) {
                q = nearest(w[r], scale, zero, levels);
                error = (w[r] - (q - zero) * scale) / pivot;
                cost[r] += error * error;
            } else {
                Floats before = load(b->values + here + r * LANES);
                q = nearest(before - w[r] / pivot, scale, zero, levels);
                error = before - (q - zero) * scale;
                cost[r] += error * (error * half - w[r]);
            }
            store(integers + r * LANES, q);
            store(b->errors + here + r * LANES, error);
            store(b->pushed + i * STRIP + r * LANES, error);
        }
        for (int k = 0; k < registers * LANES; k++)
            b->integers[here + k] = (uint8_t)(int32_t)(integers[k] == integers[k] ? integers[k] : 0.0f);
    }
    for (int r = 0; r < registers; r++) store(b->costs + at + r * LANES, cost[r]);
}

// Run `body(first row, registers)` for this thread's strips: rows are at least a register. The last strip begins earlier
// where rows are no multiple, and writes what its neighbour writes, too; fewer than STRIP rows go by single registers.
#define EACH_STRIP(rows, body) \
    do { \
        long wide = (rows) < STRIP ? LANES : STRIP, unit, end; \
        thread_share(((rows) + wide - 1) / wide, &unit, &end); \
        for (; unit < end; unit++) { \
            long at = at_most(unit * wide, (rows) - wide); \
            if (wide == STRIP) body(at, REGISTERS); \
            else body(at, 1); \
        } \
    } while (0)

ALWAYS_INLINE void all_strips(Args args, int rule) {
    Block block;
    memcpy(&block, args, sizeof block);
    block.pushed += thread_index() * block.count * STRIP;
#define OF_COLUMNS(at, registers) strip(&block, rule, at, registers)
    EACH_STRIP(block.rows, OF_COLUMNS);
}

static void round_thread(Args args) { all_strips(args, ROUND); }
static void move_thread(Args args) { all_strips(args, MOVE); }
void round_columns(Args args) { on_threads(round_thread, args); }
void move_columns(Args args) { on_threads(move_thread, args); }

// ---- a group's scale for its integers -------------------------------------------------------------------------------
// With u = integers - zero, G the gradient before the moves and H the group's block of the Hessian, the objective
// changes by delta u'G + delta^2/2 u'Hu: least at delta = -u'G / u'Hu. The moves have changed G by -H errors since.

// A scale as a file holds it: float16, never zero or infinite.
ALWAYS_INLINE float storable(float scale) {
    const float largest = 65504.0f, smallest = 6.103515625e-05f;
    float bounded = scale > largest ? largest : scale < -largest ? -largest : scale;
    float half = (float)(_Float16)bounded;
    return fabsf(half) < smallest ? (scale < 0 ? -smallest : smallest) : half;
}

typedef struct {  // the arguments; H is [count, count], a group's columns are [count, rows], its scale and zero [rows]
    int64_t threads;
    const float *gradient, *values, *H, *scale, *zero;
    const uint8_t *integers;
    const float *errors;
    float *new_scale, *new_values, *less, *change;
    float *u;  // [threads, count, STRIP]: workspace
    int64_t count, rows;
} Group;

// Columns of H whose products with u are summed side by side, so that one addition need not wait for the last.
enum { TOGETHER = LANES == 16 ? 4 : 1 };

ALWAYS_INLINE void add_columns(const Group *g, long at, long i, Floats *slope, Floats *curve, const int registers,
                               const int together) {
    Floats Hu[TOGETHER][REGISTERS];
    for (int c = 0; c < together; c++)
        for (int r = 0; r < registers; r++) Hu[c][r] = spread(0.0f);
    for (long j = 0; j < g->count; j++)
        for (int c = 0; c < together; c++) {
            Floats h = spread(g->H[(i + c) * g->count + j]);
            for (int r = 0; r < registers; r++) Hu[c][r] = fmadd(h, load(g->u + j * STRIP + r * LANES), Hu[c][r]);
        }
    for (int c = 0; c < together; c++)
        for (int r = 0; r < registers; r++) {
            long here = (i + c) * g->rows + at + r * LANES;
            Floats u = load(g->u + (i + c) * STRIP + r * LANES);
            slope[r] += u * load(g->gradient + here) - load(g->errors + here) * Hu[c][r];
            curve[r] += u * Hu[c][r];
        }
}

ALWAYS_INLINE void fit_strip(const Group *g, long at, const int registers) {
    Floats slope[REGISTERS], curve[REGISTERS];
    float slopes[STRIP], curves[STRIP];
    for (long i = 0; i < g->count; i++)
        for (int k = 0; k < registers * LANES; k++)
            g->u[i * STRIP + k] = (float)g->integers[i * g->rows + at + k] - g->zero[at + k];
    for (int r = 0; r < registers; r++) slope[r] = curve[r] = spread(0.0f);
    long i = 0;
    for (; i + TOGETHER <= g->count; i += TOGETHER) add_columns(g, at, i, slope, curve, registers, TOGETHER);
    for (; i < g->count; i++) add_columns(g, at, i, slope, curve, registers, 1);
    for (int r = 0; r < registers; r++) {
        store(slopes + r * LANES, slope[r]);
        store(curves + r * LANES, curve[r]);
    }
    for (int k = 0; k < registers * LANES; k++) {
        float old = g->scale[at + k], wanted = old - slopes[k] / curves[k];
        float stored = isfinite(wanted) && wanted != 0 ? storable(wanted) : old, step = stored - old;
        float changed = step * (slopes[k] + step * (curves[k] / 2));
        g->new_scale[at + k] = changed < 0 ? stored : old;
        g->change[at + k] = changed < 0 ? changed : 0;
    }
    for (i = 0; i < g->count; i++)
        for (int r = 0; r < registers; r++) {
            long here = i * g->rows + at + r * LANES;
            Floats value = load(g->u + i * STRIP + r * LANES) * load(g->new_scale + at + r * LANES);
            store(g->new_values + here, value);
            store(g->less + here, load(g->values + here) - value);
        }
}

static void fit_thread(Args args) {
    Group group;
    memcpy(&group, args, sizeof group);
    group.u += thread_index() * group.count * STRIP;
#define OF_GROUP(at, registers) fit_strip(&group, at, registers)
    EACH_STRIP(group.rows, OF_GROUP);
}
void fit_scale(Args args) { on_threads(fit_thread, args); }
