// A whole decode step: every block of a decoder for one new token in each row, on all threads together.
//
//     x += W_o attention(rotary(norm(x) W_qkv));  x += W_down (silu(gate) up),  gate, up = norm(x) W_gate_up
//
// In a mixture of experts, the second is a sum over the experts that the row's router chooses; no other is read. In a
// hybrid, most blocks have linear attention in the place of the first.
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
    FIELD(int64_t, qkv_width)         /* from row to row of qkv, where a block attends to all tokens */ \
    FIELD(float *, rates)             /* [rows, 2 value_heads], see linear_attention */ \
    FIELD(const int64_t *, states)    /* addresses of each block's states: of its convolution, its recurrence */ \
    FIELD(float *, shared_gate_up) FIELD(float *, factors)  /* of the expert that all rows take */ \
    FIELD(float *, likely) FIELD(float *, shares) FIELD(int64_t *, routes)  /* of a mixture, see choose */ \
    FIELD(float *, scores) FIELD(float *, parts)  /* see attend */ \
    FIELD(int64_t, splits)            /* stretches that the longest row reaches into */ \
    FIELD(const float *, cos) FIELD(const float *, sin)  /* [rows or 1, heads + kv_heads, d] */ \
    FIELD(int64_t, rotation_stride)   /* from row to row */ \
    FIELD(float *, keys) FIELD(float *, values)  /* [layers, rows, kv_heads, d, slots], [..., slots, d] */ \
    FIELD(int64_t, slots) FIELD(int64_t, layer_stride)  /* numbers from layer to layer of both */ \
    FIELD(const int64_t *, positions) FIELD(int64_t, rows)  /* [rows] */ \
    FIELD(const float *, norm) FIELD(void *, y)  /* [hidden]; [rows, hidden] */ \
    FIELD(int64_t, dtype)             /* of y, a router and a convolution's state */ \
    FIELD(int64_t, layers) FIELD(int64_t, hidden) FIELD(int64_t, heads) FIELD(int64_t, kv_heads) FIELD(int64_t, d) \
    FIELD(int64_t, key_heads) FIELD(int64_t, value_heads)  /* of linear attention; 0: there is none */ \
    FIELD(int64_t, key_dim) FIELD(int64_t, value_dim) FIELD(int64_t, kernel) \
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
enum { QKV, OUT, GATE_UP, DOWN, RATES, SHARED_GATE_UP, SHARED_DOWN, LINEARS };
// Addresses of float32 vectors, and of a mixture's router, [experts, hidden] of the step's dtype; 0: there is none.
enum {
    ATTENTION_NORM, MLP_NORM, QKV_BIAS, QK_NORM, ROUTER, SHARED_GATE, CONVOLUTION, SPEED, DECAY_BIAS, STATE_NORM, VECTORS
};

static float inverse_rms(const float *x, long n, Float32 eps) {
    Floats squares = spread(0.0f);
    for (long i = 0; i < n; i += LANES) squares = fmadd(load(x + i), load(x + i), squares);
    return 1.0f / sqrtf(total(squares) / (float)n + eps.value);
}

ALWAYS_INLINE Floats silu(Floats x) { return x / (spread(1.0f) + exponential(spread(0.0f) - x)); }
ALWAYS_INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// ---- products -------------------------------------------------------------------------------------------------------

enum { NORMED, MIXED, GATED_HEADS, GATED };  // what a linear layer reads

// `n` of a row's `width` activations: RMSNorm of the residual stream, attention's result, the same gated by what lies
// behind its queries, keys and values, or silu(gate) up times a factor.
static void activations(const Step *s, int kind, const float *weight, float factor, long row, long first, long n,
                        long width, float *to) {
    if (kind == NORMED) {
        const float *x = s->x + row * s->hidden + first;
        for (long k = 0; k < n; k += LANES) store(to + k, load(x + k) * spread(factor) * load(weight + first + k));
    } else if (kind == MIXED) {
        memcpy(to, s->mixed + row * width + first, (size_t)n * sizeof *to);
    } else if (kind == GATED_HEADS) {
        const float *mixed = s->mixed + row * width + first, *gate = s->qkv + (row + 1) * s->qkv_width - width + first;
        for (long k = 0; k < n; k += LANES) {
            Floats below = spread(1.0f) + exponential(spread(0.0f) - load(gate + k));
            store(to + k, load(mixed + k) / below);
        }
    } else {
        const float *gate = s->gate_up + row * 2 * width + first, *up = gate + width;
        for (long k = 0; k < n; k += LANES) store(to + k, silu(load(gate + k)) * load(up + k) * spread(factor));
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

// This thread's part of the router's logits, `likely` [rows, experts]; one thread's `factors` of the shared expert.
static void route(const Step *s, const void *router, const float *norm, const float *shared_gate) {
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
        if (!shared_gate || end < stride) continue;
        Floats sum = spread(0.0f);
        for (long i = 0; i < s->hidden; i += LANES)
            sum = fmadd(load(x + i) * inverse * load(norm + i), load(shared_gate + i), sum);
        s->factors[row] = sigmoid(total(sum));
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

#define FIELDS_OF(i) ((const int64_t *)(intptr_t)linears[i])

static void mixture(const Step *s, const int64_t *linears, const float *const *vectors) {
    const int64_t *gate_up = FIELDS_OF(GATE_UP), *down = FIELDS_OF(DOWN);
    const float *norm = vectors[MLP_NORM], *shared_gate = vectors[SHARED_GATE];
    if (shared_gate) project(s, FIELDS_OF(SHARED_GATE_UP), NORMED, norm, TO_FLOAT32, s->shared_gate_up);
    Linear layer = linear_at((const int64_t *)(intptr_t)gate_up[0]);  // experts are alike in their sizes and groups
    Activations x = activations_at(s->workspace, s->rows, &layer);
    prepare(s, &x, s->rows, NORMED, norm);
    route(s, vectors[ROUTER], norm, shared_gate);
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
    if (!shared_gate) return;
    Step own = *s;
    own.gate_up = s->shared_gate_up;
    project(&own, FIELDS_OF(SHARED_DOWN), GATED, s->factors, ADD_FLOAT32, s->x);
}

// ---- linear attention -----------------------------------------------------------------------------------------------
// A head keeps a matrix S [key_dim, value_dim], which each token lets decay and corrects by what it answers to its key
// (gated delta rule, Yang et al., arXiv 2412.06464; compute/delta_rule.py):
//
//     S = a S;   S = S + k b (v - S'k)';   output S'q

enum { MOST_STATE_DIM = 256, VALUES_AT_ONCE = 32 };

// silu of the convolution of the channels [first, first + n) over their last inputs, of which the oldest is forgotten.
static void convolve(const Step *s, const float *x, void *state, const float *weight, long first, long n, long channels,
                     float *to) {
    int dtype = (int)s->dtype;
    for (long k = 0; k < n; k++) {
        long channel = first + k, last = s->kernel - 1, at = channel * s->kernel;
        float newest = round_as(dtype, x[channel]), sum = newest * weight[last * channels + channel];
        for (long j = 0; j < last; j++) {
            float input = get_as(dtype, state, at + j + 1);
            put_as(dtype, state, at + j, input);
            sum += input * weight[j * channels + channel];
        }
        put_as(dtype, state, at + last, newest);
        to[k] = sum;
    }
    for (long k = 0; k < n; k += LANES) store(to + k, silu(load(to + k)));
}

static void scale_to_length(float *x, long n, float length) {
    Floats squares = spread(0.0f);
    for (long i = 0; i < n; i += LANES) squares = fmadd(load(x + i), load(x + i), squares);
    Floats factor = spread(length / sqrtf(total(squares) + 1e-6f));
    for (long i = 0; i < n; i += LANES) store(x + i, load(x + i) * factor);
}

// One token of a head: its answer [value_dim]. S'k and S'q are those of the state before its decay, so both read it once.
static void correct(const Step *s, float *S, const float *q, const float *k, const float *v, float decay, float strength,
                    float *answer) {
    enum { WIDE = VALUES_AT_ONCE / LANES };
    Floats products = spread(0.0f), a = spread(decay);
    for (long i = 0; i < s->key_dim; i += LANES) products = fmadd(load(q + i), load(k + i), products);
    Floats qk = spread(total(products));
    for (long first = 0; first < s->value_dim; first += VALUES_AT_ONCE) {
        Floats of_key[WIDE], of_query[WIDE], change[WIDE];
        for (int w = 0; w < WIDE; w++) of_key[w] = of_query[w] = spread(0.0f);
        for (long i = 0; i < s->key_dim; i++)
            for (int w = 0; w < WIDE; w++) {
                Floats held = load(S + i * s->value_dim + first + w * LANES);
                of_key[w] = fmadd(spread(k[i]), held, of_key[w]);
                of_query[w] = fmadd(spread(q[i]), held, of_query[w]);
            }
        for (int w = 0; w < WIDE; w++) {
            change[w] = spread(strength) * (load(v + first + w * LANES) - a * of_key[w]);
            store(answer + first + w * LANES, fmadd(qk, change[w], a * of_query[w]));
        }
        for (long i = 0; i < s->key_dim; i++)
            for (int w = 0; w < WIDE; w++) {
                float *at = S + i * s->value_dim + first + w * LANES;
                store(at, fmadd(spread(k[i]), change[w], a * load(at)));
            }
    }
}

// This thread's key heads, each with the value heads that share it. `qkv` holds queries, keys, values and z, which gates
// the output; `rates` the strength and the decay of each value head before they are bounded.
static void linear_attention(const Step *s, const int64_t *states, const float *const *vectors) {
    long keys = s->key_heads * s->key_dim, values = s->value_heads * s->value_dim, channels = 2 * keys + values;
    long sharing = s->value_heads / s->key_heads, size = s->dtype == BFLOAT16 ? 2 : 4, task, end;
    const float *weight = vectors[CONVOLUTION];
    thread_share(s->rows * s->key_heads, &task, &end);
    for (; task < end; task++) {
        long row = task / s->key_heads, head = task % s->key_heads;
        const float *x = s->qkv + row * (channels + values), *rates = s->rates + row * 2 * s->value_heads;
        char *inputs = (char *)(intptr_t)states[0] + row * channels * s->kernel * size;
        float q[MOST_STATE_DIM], k[MOST_STATE_DIM], v[MOST_STATE_DIM], answer[MOST_STATE_DIM];
        convolve(s, x, inputs, weight, head * s->key_dim, s->key_dim, channels, q);
        convolve(s, x, inputs, weight, keys + head * s->key_dim, s->key_dim, channels, k);
        scale_to_length(q, s->key_dim, 1.0f / sqrtf((float)s->key_dim));
        scale_to_length(k, s->key_dim, 1.0f);
        for (long own = head * sharing; own < (head + 1) * sharing; own++) {
            float slowness = rates[s->value_heads + own] + vectors[DECAY_BIAS][own];
            slowness = slowness > 20 ? slowness : log1pf(expf(slowness));  // softplus
            float decay = expf(vectors[SPEED][own] * slowness);
            float *S = (float *)(intptr_t)states[1] + (row * s->value_heads + own) * s->key_dim * s->value_dim;
            convolve(s, x, inputs, weight, 2 * keys + own * s->value_dim, s->value_dim, channels, v);
            correct(s, S, q, k, v, decay, sigmoid(rates[own]), answer);
            Floats inverse = spread(inverse_rms(answer, s->value_dim, s->eps));
            const float *z = x + channels + own * s->value_dim, *norm = vectors[STATE_NORM];
            float *to = s->mixed + row * values + own * s->value_dim;
            for (long i = 0; i < s->value_dim; i += LANES)
                store(to + i, load(answer + i) * inverse * load(norm + i) * silu(load(z + i)));
        }
    }
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
        float *x = s->qkv + row * s->qkv_width + head * d;
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
    const float *queries = s->qkv + row * s->qkv_width + head * s->d;
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
    const int attended = s->qkv_width > (s->heads + 2 * s->kv_heads) * s->d ? GATED_HEADS : MIXED;
    long attending = 0;  // blocks so far with keys and values in the cache
    for (long layer = 0; layer < s->layers; layer++) {
        const int64_t *const linears = s->linears + layer * LINEARS;
        const float *vectors[VECTORS];
        for (int i = 0; i < VECTORS; i++) vectors[i] = (const float *)(intptr_t)s->vectors[layer * VECTORS + i];
        project(s, FIELDS_OF(QKV), NORMED, vectors[ATTENTION_NORM], TO_FLOAT32, s->qkv);
        if (vectors[CONVOLUTION]) {
            project(s, FIELDS_OF(RATES), NORMED, vectors[ATTENTION_NORM], TO_FLOAT32, s->rates);
            linear_attention(s, s->states + 2 * layer, vectors);
            barrier();
            project(s, FIELDS_OF(OUT), MIXED, NULL, ADD_FLOAT32, s->x);
        } else {
            rotate_and_store(s, attending, vectors[QKV_BIAS], vectors[QK_NORM]);
            barrier();
            attend_parts(s, attending++);
            barrier();
            join_parts(s);
            barrier();
            project(s, FIELDS_OF(OUT), attended, NULL, ADD_FLOAT32, s->x);
        }
        if (vectors[ROUTER]) {
            mixture(s, linears, vectors);
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
