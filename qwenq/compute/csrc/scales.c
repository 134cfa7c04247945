// The search for a group's scale: the candidate with the least error weighted by the Hessian's diagonal, then refined
// by least squares with its integers held fixed. A group passes all candidates while its weights are in the cache.
// Costs are torch's bit for bit, the order of additions included (16 running sums, joined by halves), so the choice is,
// too.
#include "vector.h"

enum { SUMS = 16, PARTS = SUMS / LANES, REFITS = 3 };

typedef struct {
    const float *w, *h;  // weights and importance
    int size;
    float levels, cost, scale, zero;  // the best so far
} Group;

ALWAYS_INLINE Floats steps_of(Floats w, Floats scale, Floats zero, Floats levels) {
    return smaller(levels, larger(spread(0.0f), nearest_whole(w / scale + zero))) - zero;
}

ALWAYS_INLINE float by_halves(Floats *sum) {
    for (int half = PARTS / 2; half; half /= 2)
        for (int p = 0; p < half; p++) sum[p] += sum[p + half];
    return total(sum[0]);
}

ALWAYS_INLINE void consider(Group *g, float fitted, float zero) {
    const float scale = (float)(_Float16)fitted;  // judged as it will be read back
    Floats sum[PARTS], scales = spread(scale), zeros = spread(zero), levels = spread(g->levels);
    for (int p = 0; p < PARTS; p++) sum[p] = spread(0.0f);
    for (int at = 0; at < g->size; at += SUMS)
        for (int p = 0; p < PARTS; p++) {
            Floats w = load(g->w + at + p * LANES);
            Floats gap = steps_of(w, scales, zeros, levels) * scales - w;
            sum[p] += gap * gap * load(g->h + at + p * LANES);
        }
    float cost = by_halves(sum);
    if (cost < g->cost) g->cost = cost, g->scale = scale, g->zero = zero;
}

// The scale of least squares for the best candidate's integers.
ALWAYS_INLINE float refit(const Group *g) {
    Floats above[PARTS], below[PARTS], scales = spread(g->scale), zeros = spread(g->zero), levels = spread(g->levels);
    for (int p = 0; p < PARTS; p++) above[p] = below[p] = spread(0.0f);
    for (int at = 0; at < g->size; at += SUMS)
        for (int p = 0; p < PARTS; p++) {
            Floats w = load(g->w + at + p * LANES), q = steps_of(w, scales, zeros, levels);
            Floats hq = load(g->h + at + p * LANES) * q;
            above[p] += hq * w;
            below[p] += hq * q;
        }
    float scale = by_halves(above) / by_halves(below);
    return isfinite(scale) && scale != 0 ? scale : g->scale;
}

// args: threads, weights [groups, size], importance [per_row, size], scales [groups], zeros [groups], shrink
// [candidates], groups, groups per row, size, candidates, levels, whether the zero point stays
static void search_thread(Args args) {
    const float *weights = POINTER(float, 1), *importance = POINTER(float, 2), *shrink = POINTER(float, 5);
    float *scales = POINTER(float, 3), *zeros = POINTER(float, 4), levels = float_of(args[10]);
    long per_row = args[7], candidates = args[9], i, end;
    int size = (int)args[8];
    thread_share(args[6], &i, &end);
    for (; i < end; i++) {
        float first = scales[i], low = -zeros[i] * first;
        Group g = {weights + i * size, importance + i % per_row * size, size, levels, INFINITY, first, zeros[i]};
        for (long c = 0; c < candidates; c++) {
            float scale = first * shrink[c], zero = rintf(-low * shrink[c] / scale);
            zero = zero < 1 ? 1 : zero > levels ? levels : zero;
            consider(&g, scale, args[11] ? zeros[i] : zero);
        }
        for (int n = 0; n < REFITS; n++) consider(&g, refit(&g), g.zero);
        scales[i] = g.scale;
        zeros[i] = g.zero;
    }
}
void search_scales(Args args) { on_threads(search_thread, args); }
