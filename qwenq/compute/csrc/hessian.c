// Running means of products of activations, mean = keep mean + weight X'Y: Hessians (X is Y) and drifts.
//
// Tokens are packed first into panels of PANEL neighbouring columns, by runs of RUN words, so that a tile of the result
// reads consecutive memory. A word is one token in float32, or two tokens in bfloat16 where the CPU multiplies pairs of
// them (AVX-512 BF16); elsewhere bfloat16 is widened as it is packed. A tile's sums stay in registers for a run. The order
// of additions for an element is that of the tokens, whatever the number of threads.
#include "vector.h"

#if defined(__AVX512F__)
enum { REGISTERS = 3, ROWS = 8 };
#elif defined(__AVX2__)
enum { REGISTERS = 3, ROWS = 4 };
#else
enum { REGISTERS = 6, ROWS = 4 };
#endif
enum { PANEL = REGISTERS * LANES, RUN = 128 };
_Static_assert(PANEL % ROWS == 0, "a panel is whole tiles");

EXPORT long qwenq_panel(void) { return PANEL; }
EXPORT long qwenq_tokens_per_word(long dtype) { return dtype == BFLOAT16 && PAIRS ? 2 : 1; }

// args: threads, x [tokens, columns], packed, tokens, columns, panels, dtype
static void pack_thread(Args args) {
    const void *x = POINTER(void, 1);
    uint32_t *packed = POINTER(uint32_t, 2);
    long tokens = args[3], columns = args[4], panels = args[5], dtype = args[6];
    long pairs = dtype == BFLOAT16 && PAIRS, words = pairs ? (tokens + 1) / 2 : tokens, word, end;
    thread_share(words, &word, &end);
    for (; word < end; word++) {
        long first = word / RUN * RUN, run = at_most(RUN, words - first);
        for (long panel = 0; panel < panels; panel++) {
            uint32_t *to = packed + (first * panels + panel * run + (word - first)) * PANEL;
            long from = panel * PANEL, count = at_most(PANEL, columns - from);
            if (count < PANEL) memset(to, 0, PANEL * sizeof *to);
            if (dtype == FLOAT32) {
                if (count > 0) memcpy(to, (const float *)x + word * columns + from, (size_t)count * sizeof *to);
            } else if (!pairs) {
                const uint16_t *row = (const uint16_t *)x + word * columns + from;
                for (long k = 0; k < count; k++) to[k] = (uint32_t)row[k] << 16;
            } else {
                const uint16_t *row = (const uint16_t *)x + 2 * word * columns + from, *next = row + columns;
                if (2 * word + 1 < tokens)
                    for (long k = 0; k < count; k++) to[k] = row[k] | (uint32_t)next[k] << 16;
                else
                    for (long k = 0; k < count; k++) to[k] = row[k];
            }
        }
    }
}
void hessian_pack(Args args) { on_threads(pack_thread, args); }

// Sums of a run for ROWS rows of the left panel and all columns of the right one.
ALWAYS_INLINE void tile(const float *left, const float *right, long run, float *mean, long stride, float keep, float weight,
                        const int pairs) {
    Floats sums[ROWS][REGISTERS];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < REGISTERS; i++) sums[r][i] = spread(0.0f);
    for (long word = 0; word < run; word++) {
        Floats held[REGISTERS];
        for (int i = 0; i < REGISTERS; i++) held[i] = load(right + word * PANEL + i * LANES);
        for (int r = 0; r < ROWS; r++) {
            Floats x = spread(left[word * PANEL + r]);
            for (int i = 0; i < REGISTERS; i++) sums[r][i] = multiply_words(pairs, x, held[i], sums[r][i]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < REGISTERS; i++) {
            float *at = mean + r * stride + i * LANES;
            store(at, fmadd(sums[r][i], spread(weight), load(at) * spread(keep)));
        }
}

// args: threads, left, right, mean [left_panels PANEL, right_panels PANEL], words, left_panels, right_panels,
// whether the lower triangle is enough, keep, weight, dtype
static void add_thread(Args args) {
    const float *left = POINTER(float, 1), *right = POINTER(float, 2);
    float *mean = POINTER(float, 3), keep = float_of(args[8]), weight = float_of(args[9]);
    long words = args[4], left_panels = args[5], right_panels = args[6], lower = args[7], stride = right_panels * PANEL;
    long pairs = args[10] == BFLOAT16 && PAIRS, me = thread_index(), threads = thread_count();
    for (long first = 0; first < words; first += RUN) {
        long run = at_most(RUN, words - first);
        for (long column = 0; column < right_panels; column++)
            for (long row = lower ? column : 0; row < left_panels; row++) {
                if ((row + column) % threads != me) continue;  // the same thread's in every run
                const float *x = left + (first * left_panels + row * run) * PANEL;
                const float *y = right + (first * right_panels + column * run) * PANEL;
                float *to = mean + row * PANEL * stride + column * PANEL, kept = first ? 1.0f : keep;
                for (int r = 0; r < PANEL; r += ROWS)
                    if (pairs) tile(x + r, y, run, to + r * stride, stride, kept, weight, 1);
                    else tile(x + r, y, run, to + r * stride, stride, kept, weight, 0);
            }
    }
}
void hessian_add(Args args) { on_threads(add_thread, args); }
