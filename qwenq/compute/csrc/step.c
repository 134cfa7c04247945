// A whole decode step: every block of a decoder for one new token in each row, on all threads together.
//
//     x += W_o attention(rotary(norm(x) W_qkv));  x += W_down (silu(gate) up),  gate, up = norm(x) W_gate_up
//
// In a mixture of experts, the second is a sum over the experts that the row's router chooses; no other is read.
// Nothing but a barrier lies between a product and the next. Products are linear.c's; all else is float32, the residual
// stream too. Attention reads a cache that is laid out for steps: keys transposed, so that a register holds the same
// number of neighbouring slots. A long cache is split into stretches, which threads share; each has a softmax of its own,
// and their results are joined by their largest scores (flash-decoding, Dao et al. 2023). Stretches have a fixed length:
// the result does not depend on the number of threads.
#include "linear.h"
#include "vector.h"

enum { STRETCH = 256, HEADS_AT_ONCE = 4, MOST_HEAD_REGISTERS = 256 / LANES };

// The arguments: what a step reads and writes. compute/step.py asks for these names, in this order.
#define FIELDS(FIELD) \
    FIELD(float *, x)                 /* [rows, hidden], the residual stream */ \
    FIELD(void *, workspace)          /* activations of the widest layer */ \
    FIELD(float *, qkv) FIELD(float *, mixed) FIELD(float *, gate_up)  /* [rows, ...], what linears read and write */ \
    FIELD(const int64_t *, linears) FIELD(const int64_t *, vectors)  /* addresses of each block, see LINEARS, VECTORS */ \
    FIELD(float *, likely) FIELD(float *, shares) FIELD(int64_t *, routes)  /* of a mixture, see choose */ \
    FIELD(float *, scores) FIELD(float *, parts)  /* see attend */ \
    FIELD(int64_t, splits)            /* stretches that the longest row reaches into */ \
    FIELD(const float *, cos) FIELD(const float *, sin)  /* [rows or 1, heads + kv_heads, d] */ \
    FIELD(int64_t, rotation_stride)   /* from row to row */ \
    FIELD(float *, keys) FIELD(float *, values)  /* [layers, rows, kv_heads, d, slots], [..., slots, d] */ \
    FIELD(int64_t, slots) FIELD(int64_t, layer_stride)  /* numbers from layer to layer of both */ \
    FIELD(const int64_t *, positions) FIELD(int64_t, rows)  /* [rows] */ \
    FIELD(const float *, norm) FIELD(void *, y) FIELD(int64_t, dtype)  /* [hidden]; [rows, hidden]; of y and a router */ \
    FIELD(int64_t, layers) FIELD(int64_t, hidden) FIELD(int64_t, heads) FIELD(int64_t, kv_heads) FIELD(int64_t, d) \
    FIELD(int64_t, experts) FIELD(int64_t, active)  /* of a mixture; how many a row takes */ \
    FIELD(int64_t, normalised)        /* whether their shares add up to one */ \
    FIELD(Float32, eps)

typedef struct {
    int64_t threads;
#define FIELD(type, name) type name;
    FIELDS(FIELD)
#undef FIELD
} Step;
EXPORT const char *qwenq_step_fields(void) {
    return ""
#define FIELD(type, name) #name " "
        FIELDS(FIELD)
#undef FIELD
        ;
}

// Addresses of a Linear's fields; of a mixture, GATE_UP and DOWN are addresses of one such address for each expert.
enum { QKV, OUT, GATE_UP, DOWN, LINEARS };
// Addresses of float32 vectors, and of a mixture's router, [experts, hidden] of the step's dtype; 0: there is none.
enum { ATTENTION_NORM, MLP_NORM, QKV_BIAS, QK_NORM, ROUTER, VECTORS };

static float inverse_rms(const float *x, long n, Float32 eps) {
    Floats squares = spread(0.0f);
    for (long i = 0; i < n; i += LANES) squares = fmadd(load(x + i), load(x + i), squares);
    return 1.0f / sqrtf(total(squares) / (float)n + eps.value);
}

// ---- products -------------------------------------------------------------------------------------------------------

enum { NORMED, MIXED, GATED };  // what a linear layer reads

// `n` of a row's `width` activations: RMSNorm of the residual stream, attention's result, or silu(gate) up times a factor.
static void activations(const Step *s, int kind, const float *weight, float factor, long row, long first, long n,
                        long width, float *to) {
    if (kind == NORMED) {
        const float *x = s->x + row * s->hidden + first;
        for (long k = 0; k < n; k += LANES) store(to + k, load(x + k) * spread(factor) * load(weight + first + k));
    } else if (kind == MIXED) {
        memcpy(to, s->mixed + row * s->heads * s->d + first, (size_t)n * sizeof *to);
    } else {
        const float *gate = s->gate_up + row * 2 * width + first, *up = gate + width;
        for (long k = 0; k < n; k += LANES) {
            Floats g = load(gate + k), below = spread(1.0f) + exponential(spread(0.0f) - g);
            store(to + k, g / below * load(up + k) * spread(factor));
        }
    }
}

// This thread's part of the activations of a linear layer. NORMED: `vector` is the norm's weight; GATED: factors of the
// rows, or NULL.
static void prepare(const Step *s, const Activations *x, long rows, int kind, const float *vector) {
    long group, end;
    thread_share(x->groups, &group, &end);
    for (long row = 0; row < rows; row++) {
        float factor = kind == NORMED            ? inverse_rms(s->x + row * s->hidden, s->hidden, s->eps)
                       : kind == GATED && vector ? vector[row]
                                                 : 1.0f;
        for (long g = group; g < end; g++) {
            float values[LONGEST_GROUP];
            activations(s, kind, vector, factor, row, g * x->group_size, x->group_size, x->columns, values);
            put_group(x, row, g, values);
        }
    }
}

// This thread's part of a linear layer over all rows; every thread has to come here.
static void project(const Step *s, const int64_t *fields, int kind, const float *norm, int mode, float *y) {
    Linear layer = linear_at(fields);
    Activations x = activations_at(s->workspace, s->rows, &layer);
    long block, end;
    prepare(s, &x, s->rows, kind, norm);
    barrier();
    thread_share(blocks_of(&layer), &block, &end);
    multiply(&layer, &x, s->rows, block, end, mode, y);
    barrier();
}

// ---- a mixture of experts -------------------------------------------------------------------------------------------
// A pair is a row and one of its experts. Pairs are taken expert by expert, so that a block of weights serves all rows of
// an expert while it is in the cache.

// `routes`: where the pairs of each expert begin, [experts + 1]; the pairs' numbers, expert by expert; each pair's expert.
#define STARTS(s) ((s)->routes)
#define ORDER(s) ((s)->routes + (s)->experts + 1)
#define CHOSEN(s) (ORDER(s) + (s)->rows * (s)->active)

enum { MOST_LANES = 16 };  // rows of `likely` are a multiple of it for every variant

// This thread's part of the router's logits, `likely` [rows, experts].
static void route(const Step *s, const void *router, const float *norm) {
    long first, end, stride = (s->experts + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
    thread_share(stride, &first, &end);
    for (long row = 0; row < s->rows; row++) {
        const float *x = s->x + row * s->hidden;
        Floats inverse = spread(inverse_rms(x, s->hidden, s->eps));
        for (long expert = first; expert < end; expert++) {
            Floats sum = spread(0.0f);
            if (expert < s->experts)
                for (long i = 0; i < s->hidden; i += LANES)
                    sum = fmadd(load(x + i) * inverse * load(norm + i), load_as((int)s->dtype, router, expert * s->hidden + i), sum);
            s->likely[row * stride + expert] = expert < s->experts ? total(sum) : -INFINITY;
        }
    }
}

// Softmax of each row's logits, its likeliest experts and their `shares` [rows, active]; and the pairs in order.
static void choose(const Step *s) {
    long stride = (s->experts + MOST_LANES - 1) / MOST_LANES * MOST_LANES, pairs = s->rows * s->active, at = 0;
    for (long row = 0; row < s->rows; row++) {
        float *likely = s->likely + row * stride, *shares = s->shares + row * s->active, taken = 0.0f;
        Floats largest = spread(-INFINITY), sum = spread(0.0f);
        for (long i = 0; i < stride; i += LANES) largest = larger(largest, load(likely + i));
        Floats top = spread(largest_lane(largest));
        for (long i = 0; i < stride; i += LANES) {
            Floats power = exponential(load(likely + i) - top);
            store(likely + i, power);
            sum += power;
        }
        for (long slot = 0; slot < s->active; slot++) {
            long best = 0;
            for (long expert = 1; expert < s->experts; expert++)
                if (likely[expert] > likely[best]) best = expert;
            CHOSEN(s)[row * s->active + slot] = best;
            shares[slot] = likely[best];
            taken += likely[best];
            likely[best] = -1.0f;
        }
        float divisor = s->normalised ? taken : total(sum);
        for (long slot = 0; slot < s->active; slot++) shares[slot] /= divisor;
    }
    for (long expert = 0; expert < s->experts; expert++) {
        STARTS(s)[expert] = at;
        for (long pair = 0; pair < pairs; pair++)
            if (CHOSEN(s)[pair] == expert) ORDER(s)[at++] = pair;
    }
    STARTS(s)[s->experts] = at;
}

// This thread's blocks of one linear layer of all experts: GATE_UP from rows to pairs, DOWN from pairs added to rows.
static void multiply_experts(const Step *s, int which, const int64_t *fields, const Activations *x, float *y) {
    for (long expert = 0; expert < s->experts; expert++) {
        const int64_t *first = ORDER(s) + STARTS(s)[expert], *last = ORDER(s) + STARTS(s)[expert + 1];
        if (first == last) continue;
        Linear layer = linear_at((const int64_t *)(intptr_t)fields[expert]);
        long block, end;
        thread_share(blocks_of(&layer), &block, &end);
        for (; block < end; block++)
            for (const int64_t *pair = first; pair < last; pair++) {
                long row = *pair / s->active, from = which == DOWN ? *pair : row, to = which == DOWN ? row : *pair;
                Activations one = activations_of(x, from);
                multiply(&layer, &one, 1, block, block + 1, which == DOWN ? ADD_FLOAT32 : TO_FLOAT32,
                         y + to * layer.outputs);
            }
    }
}

static void mixture(const Step *s, const int64_t *gate_up, const int64_t *down, const void *router, const float *norm) {
    Linear layer = linear_at((const int64_t *)(intptr_t)gate_up[0]);  // experts are alike in their sizes and groups
    Activations x = activations_at(s->workspace, s->rows, &layer);
    prepare(s, &x, s->rows, NORMED, norm);
    route(s, router, norm);
    barrier();
    if (thread_index() == 0) choose(s);
    barrier();
    multiply_experts(s, GATE_UP, gate_up, &x, s->gate_up);
    barrier();
    layer = linear_at((const int64_t *)(intptr_t)down[0]);
    x = activations_at(s->workspace, s->rows * s->active, &layer);
    prepare(s, &x, s->rows * s->active, GATED, s->shares);
    barrier();
    multiply_experts(s, DOWN, down, &x, s->x);
    barrier();
}

// ---- rotary positions, and the cache --------------------------------------------------------------------------------

// The cache of a head: numbers before its keys, and before its values.
static long cache_start(const Step *s, long layer, long row, long kv_head) {
    return layer * s->layer_stride + (row * s->kv_heads + kv_head) * s->slots * s->d;
}

static void rotate_and_store(const Step *s, long layer, const float *bias, const float *norm) {
    long d = s->d, half = d / 2, heads = s->heads + 2 * s->kv_heads, rotated = s->heads + s->kv_heads, task, end;
    thread_share(s->rows * heads, &task, &end);
    for (; task < end; task++) {
        long row = task / heads, head = task % heads, position = s->positions[row];
        float *x = s->qkv + task * d;
        if (bias)
            for (long i = 0; i < d; i += LANES) store(x + i, load(x + i) + load(bias + head * d + i));
        if (head >= rotated) {
            float *to = s->values + cache_start(s, layer, row, head - rotated) + position * d;
            memcpy(to, x, (size_t)d * sizeof *to);
            continue;
        }
        if (norm) {  // Qwen3's RMSNorm of each head
            Floats inverse = spread(inverse_rms(x, d, s->eps));
            for (long i = 0; i < d; i += LANES) store(x + i, load(x + i) * inverse * load(norm + head * d + i));
        }
        // x cos + (the other half) sin: the sines of the first half are negative in the table
        const float *cos = s->cos + row * s->rotation_stride + head * d, *sin = s->sin + row * s->rotation_stride + head * d;
        for (long i = 0; i < half; i += LANES) {
            Floats first = load(x + i), second = load(x + half + i);
            store(x + i, fmadd(first, load(cos + i), second * load(sin + i)));
            store(x + half + i, fmadd(second, load(cos + half + i), first * load(sin + half + i)));
        }
        if (head < s->heads) continue;
        float *to = s->keys + cache_start(s, layer, row, head - s->heads) + position;  // keys lie transposed
        for (long i = 0; i < d; i++) to[i * s->slots] = x[i];
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------

// What attention leaves of a stretch for each head: values mixed [d], the largest score, the sum of powers.
ALWAYS_INLINE float *part_at(const Step *s, long row, long head, long split) {
    return s->parts + ((row * s->heads + head) * s->splits + split) * (s->d + 2);
}

// Lanes from `count` on become `other`.
ALWAYS_INLINE Floats lanes_before(long count, Floats x, float other) {
    if (count >= LANES) return x;
    float lane[LANES];
    store(lane, x);
    for (long k = count < 0 ? 0 : count; k < LANES; k++) lane[k] = other;
    return load(lane);
}

// Scores of `heads` queries with the keys of `wide` registers of slots: [heads, STRETCH], from `at` on.
ALWAYS_INLINE void score(const Step *s, const float *queries, const float *keys, long at, float *scores, const int heads,
                         const int wide) {
    Floats sums[HEADS_AT_ONCE][4];
    for (int h = 0; h < heads; h++)
        for (int w = 0; w < wide; w++) sums[h][w] = spread(0.0f);
    for (long i = 0; i < s->d; i++) {
        Floats held[4];
        for (int w = 0; w < wide; w++) held[w] = load(keys + i * s->slots + w * LANES);
        for (int h = 0; h < heads; h++) {
            Floats q = spread(queries[h * s->d + i]);
            for (int w = 0; w < wide; w++) sums[h][w] = fmadd(q, held[w], sums[h][w]);
        }
    }
    for (int h = 0; h < heads; h++)
        for (int w = 0; w < wide; w++) store(scores + h * STRETCH + at + w * LANES, sums[h][w]);
}

// `heads` heads that share keys and values, over the slots [start, end) of a stretch.
ALWAYS_INLINE void attend(const Step *s, long row, long head, long split, const float *keys, const float *values,
                          long count, float *scores, const int heads) {
    const float *queries = s->qkv + (row * (s->heads + 2 * s->kv_heads) + head) * s->d;
    const int wide = heads == 4 && LANES < 16 ? 2 : 4;
    long at = 0;
    for (; at + wide * LANES <= count; at += wide * LANES) score(s, queries, keys + at, at, scores, heads, wide);
    for (; at < count; at += LANES) score(s, queries, keys + at, at, scores, heads, 1);
    for (int h = 0; h < heads; h++) {  // softmax but for its divisor
        float *own = scores + h * STRETCH, *part = part_at(s, row, head + h, split);
        Floats largest = spread(-INFINITY), sum = spread(0.0f), invalid = spread(0.0f);
        for (at = 0; at < count; at += LANES) {
            Floats seen = lanes_before(count - at, load(own + at), -INFINITY);
            largest = larger(largest, seen);
        }
        float top = largest_lane(largest);
        for (at = 0; at < count; at += LANES) {
            Floats shifted = load(own + at) - spread(top);
            Floats power = lanes_before(count - at, exponential(shifted), 0.0f);
            invalid += lanes_before(count - at, shifted - shifted, 0.0f);  // NaN where a score is not finite
            store(own + at, power);
            sum += power;
        }
        part[s->d] = top, part[s->d + 1] = total(sum) + total(invalid);
    }
    enum { SLICE = LANES == 16 ? 2 : 4 };  // registers of a head's values at a time: `d` is a multiple of 32
    for (long first = 0; first < s->d; first += SLICE * LANES) {
        Floats sums[HEADS_AT_ONCE][SLICE];
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < SLICE; i++) sums[h][i] = spread(0.0f);
        for (at = 0; at < count; at++) {
            Floats held[SLICE];
            for (int i = 0; i < SLICE; i++) held[i] = load(values + at * s->d + first + i * LANES);
            for (int h = 0; h < heads; h++) {
                Floats weight = spread(scores[h * STRETCH + at]);
                for (int i = 0; i < SLICE; i++) sums[h][i] = fmadd(weight, held[i], sums[h][i]);
            }
        }
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < SLICE; i++) store(part_at(s, row, head + h, split) + first + i * LANES, sums[h][i]);
    }
}

static void attend_parts(const Step *s, long layer) {
    long sharing = s->heads / s->kv_heads, task, end;
    float *scores = s->scores + thread_index() * HEADS_AT_ONCE * STRETCH;
    thread_share(s->rows * s->kv_heads * s->splits, &task, &end);
    for (; task < end; task++) {
        long split = task % s->splits, row = task / s->splits / s->kv_heads, kv_head = task / s->splits % s->kv_heads;
        long start = split * STRETCH, count = at_most(STRETCH, s->positions[row] + 1 - start);
        long cache = cache_start(s, layer, row, kv_head), head = kv_head * sharing, last = head + sharing;
        const float *keys = s->keys + cache + start, *values = s->values + cache + start * s->d;
        if (count <= 0) {  // a row that ends before this stretch
            for (; head < last; head++) {
                float *part = part_at(s, row, head, split);
                memset(part, 0, (size_t)(s->d + 2) * sizeof *part);
                part[s->d] = -INFINITY;
            }
            continue;
        }
        for (; head + 4 <= last; head += 4) attend(s, row, head, split, keys, values, count, scores, 4);
        if (last - head == 3) attend(s, row, head, split, keys, values, count, scores, 3);
        if (last - head == 2) attend(s, row, head, split, keys, values, count, scores, 2);
        if (last - head == 1) attend(s, row, head, split, keys, values, count, scores, 1);
    }
}

static void join_parts(const Step *s) {
    long task, end, d = s->d;
    thread_share(s->rows * s->heads, &task, &end);
    for (; task < end; task++) {
        const float *parts = s->parts + task * s->splits * (d + 2);
        float top = -INFINITY, *mixed = s->mixed + task * d;
        for (long split = 0; split < s->splits; split++) {
            float largest = parts[split * (d + 2) + d];
            top = largest > top ? largest : top;
        }
        Floats sums[MOST_HEAD_REGISTERS], divisor = spread(0.0f);
        for (long i = 0; i < d / LANES; i++) sums[i] = spread(0.0f);
        for (long split = 0; split < s->splits; split++) {
            const float *part = parts + split * (d + 2);
            Floats weight = part[d] == -INFINITY ? spread(0.0f) : exponential(spread(part[d] - top));
            divisor = fmadd(weight, spread(part[d + 1]), divisor);
            for (long i = 0; i < d / LANES; i++) sums[i] = fmadd(weight, load(part + i * LANES), sums[i]);
        }
        for (long i = 0; i < d / LANES; i++) store(mixed + i * LANES, sums[i] / divisor);
    }
}

// ---- the step -------------------------------------------------------------------------------------------------------

static void step_thread(Args args) {
    Step step;
    memcpy(&step, args, sizeof step);
    const Step *s = &step;
    for (long layer = 0; layer < s->layers; layer++) {
        const int64_t *const linears = s->linears + layer * LINEARS;
        const float *vectors[VECTORS];
        for (int i = 0; i < VECTORS; i++) vectors[i] = (const float *)(intptr_t)s->vectors[layer * VECTORS + i];
#define FIELDS_OF(i) ((const int64_t *)(intptr_t)linears[i])
        project(s, FIELDS_OF(QKV), NORMED, vectors[ATTENTION_NORM], TO_FLOAT32, s->qkv);
        rotate_and_store(s, layer, vectors[QKV_BIAS], vectors[QK_NORM]);
        barrier();
        attend_parts(s, layer);
        barrier();
        join_parts(s);
        barrier();
        project(s, FIELDS_OF(OUT), MIXED, NULL, ADD_FLOAT32, s->x);
        if (vectors[ROUTER]) {
            mixture(s, FIELDS_OF(GATE_UP), FIELDS_OF(DOWN), vectors[ROUTER], vectors[MLP_NORM]);
            continue;
        }
        project(s, FIELDS_OF(GATE_UP), NORMED, vectors[MLP_NORM], TO_FLOAT32, s->gate_up);
        project(s, FIELDS_OF(DOWN), GATED, NULL, ADD_FLOAT32, s->x);
    }
    long first, end;
    thread_share(s->hidden / LANES, &first, &end);
    for (long row = 0; row < s->rows; row++) {
        const float *x = s->x + row * s->hidden;
        Floats inverse = spread(inverse_rms(x, s->hidden, s->eps));
        for (long i = first * LANES; i < end * LANES; i += LANES)
            store_as((int)s->dtype, s->y, row * s->hidden + i, load(x + i) * inverse * load(s->norm + i));
    }
}
void decode_step(Args args) { on_threads(step_thread, args); }
