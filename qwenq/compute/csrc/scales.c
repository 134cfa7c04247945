// The search for a group's scale: the candidate with the least error weighted by the Hessian's diagonal, then refined by
// least squares with its integers held fixed. A group passes all candidates while its weights are in the cache. Costs are
// torch's bit for bit, the order of additions included (16 running sums, joined by halves), so the choice is, too.
#include "common.h"

enum { SUMS = 16, REFITS = 3 };

typedef struct {
    const float *w, *h;  // weights and importance
    int size;
    float levels, cost, scale, zero;  // the best so far
} Group;

ALWAYS_INLINE float steps_of(float w, float scale, float zero, float levels) {
    float q = rintf(w / scale + zero);
    q = q < 0 ? 0 : q;
    return (q > levels ? levels : q) - zero;
}

ALWAYS_INLINE float by_halves(float *sum) {
    for (int half = SUMS / 2; half; half /= 2)
        for (int k = 0; k < half; k++) sum[k] += sum[k + half];
    return sum[0];
}

ALWAYS_INLINE void consider(Group *g, float scale, float zero) {
    float sum[SUMS] = {0};
    scale = (float)(_Float16)scale;  // judged as it will be read back
    for (int at = 0; at < g->size; at += SUMS)
        for (int k = 0; k < SUMS; k++) {
            float gap = steps_of(g->w[at + k], scale, zero, g->levels) * scale - g->w[at + k];
            sum[k] += gap * gap * g->h[at + k];
        }
    float cost = by_halves(sum);
    if (cost < g->cost) g->cost = cost, g->scale = scale, g->zero = zero;
}

// The scale of least squares for the best candidate's integers.
ALWAYS_INLINE float refit(const Group *g) {
    float above[SUMS] = {0}, below[SUMS] = {0};
    for (int at = 0; at < g->size; at += SUMS)
        for (int k = 0; k < SUMS; k++) {
            float q = steps_of(g->w[at + k], g->scale, g->zero, g->levels), hq = g->h[at + k] * q;
            above[k] += hq * g->w[at + k];
            below[k] += hq * q;
        }
    float scale = by_halves(above) / by_halves(below);
    return isfinite(scale) && scale != 0 ? scale : g->scale;
}

// args: threads, weights [groups, size], importance [per_row, size], scales [groups], zeros [groups], shrink [candidates],
// groups, groups per row, size, candidates, levels, whether the zero point stays
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
