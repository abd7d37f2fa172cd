/* One expert of a mixture, from its packed record: no repacking, no copy of the weights. Layout: refold/experts/records.py.

   The input is quantised per block of 32 to int8 (q, with the float d = largest / 127), and a row's sum is

       sum over blocks b of  s[b] * d[b] * (code . q)[b]  -  s[b] * d[b] * centre * (1 . q)[b]

   The products within a block are integers, so exact; the float sums run in an order that depends on the number of columns and
   the bits alone: not on how many tokens or rows there are. Compile with -ffp-contract=off; fused products are written out. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 32
#define UNIT 8   /* blocks that a step of the sum takes: 256 columns */
#define TOKENS 4 /* tokens that share what is unpacked of a row */
#define CHUNK 16 /* tokens that go through an expert together: their inputs stay in the first cache */
#define AHEAD 4096 /* bytes read ahead while one token goes through: what the processor does by itself ends at each page */

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "dot_avx2.h"
#elif defined(__aarch64__)
#include "dot_neon.h"
#else
#include "dot_plain.h"
#endif

typedef struct {
    const uint8_t *codes;
    const uint16_t *scales;
    int64_t rows, columns;
    int32_t bits, group;
} matrix;

/* Of some tokens, `blocks` each: a multiple of UNIT, zeros behind the last column. `m` is d * centre * sum of q. */
typedef struct {
    int8_t *q;
    float *d, *m;
    int64_t blocks;
} inputs;

static int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static int64_t blocks_of(const matrix *a) { return up(a->columns, a->group) / BLOCK; }

/* One block of 32 to int8, nearest even. A value that is not finite makes the block's scale NaN: nothing hides it. */
static float quantise(const float *x, int8_t *q, int *sum) {
    union {
        float f;
        uint32_t u;
    } most = {.u = 0}, v[BLOCK];
    memcpy(v, x, sizeof v);
    for (int i = 0; i < BLOCK; i++) {
        const uint32_t size = v[i].u & 0x7fffffff;
        most.u = size > most.u ? size : most.u;
    }
    const int finite = most.u < 0x7f800000, some = most.f > 1e-30f;
    const float inverse = finite && some ? 127.0f / most.f : 0;
    int s = 0;
    for (int i = 0; i < BLOCK; i++) {
        v[i].f = (finite ? v[i].f : 0) * inverse + 12582912.0f; /* 1.5 * 2^23: the sum rounds to a whole number */
        q[i] = (int8_t)(v[i].u - 0x4b400000u);
        s += q[i];
    }
    *sum = s;
    return finite ? (some ? most.f / 127.0f : 0) : NAN;
}

/* Puts a block's values where `unit` meets them beside the codes of the same bytes. */
INLINE void place(const int bits, const int8_t *q, int64_t b, int8_t *to) {
    const int64_t part = 4 * bits, width = LANE > part ? LANE : part, beside = width / part;
    int8_t *at = to + b / beside * beside * BLOCK + b % beside * part;
    for (int k = 0; k < 8 / bits; k++) memcpy(at + k * width, q + k * part, part);
}

static void quantise_tokens(const matrix *a, const float *x, int64_t tokens, int64_t stride, inputs *to) {
    const float centre = a->bits == 8 ? 0 : a->bits == 4 ? 8 : 1.5f;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t b = 0; b < to->blocks; b++) {
            float wide[BLOCK] = {0};
            int8_t q[BLOCK];
            int sum;
            const float *from = x + t * stride + b * BLOCK;
            const int64_t left = a->columns - b * BLOCK;
            if (left < BLOCK) {
                if (left > 0) memcpy(wide, from, left * sizeof *x);
                from = wide;
            }
            const float d = quantise(from, q, &sum);
            int8_t *into = to->q + t * to->blocks * BLOCK;
            if (a->bits == 8) place(8, q, b, into);
            else if (a->bits == 4) place(4, q, b, into);
            else place(2, q, b, into);
            to->d[t * to->blocks + b] = d;
            to->m[t * to->blocks + b] = d * (centre * (float)sum);
        }
}

/* A row's scales as float, once per block. */
static void spread(const uint16_t *scales, int64_t blocks, int64_t each, float *to) {
    const int64_t count = blocks / each;
    float eight[8];
    for (int64_t g = 0; g < count; g += 8) {
        const int64_t n = count - g < 8 ? count - g : 8;
        if (n == 8) HALVES(scales + g, eight);
        else {
            uint16_t few[8] = {0};
            memcpy(few, scales + g, n * 2);
            HALVES(few, eight);
        }
        float *at = to + g * each;
        if (each == 1) memcpy(at, eight, n * sizeof *at);
        else if (each == 2 && n == 8)
            for (int i = 0; i < 8; i++) at[2 * i] = at[2 * i + 1] = eight[i];
        else if (each == 4 && n == 8)
            for (int i = 0; i < 8; i++) at[4 * i] = at[4 * i + 1] = at[4 * i + 2] = at[4 * i + 3] = eight[i];
        else
            for (int64_t i = 0; i < n; i++)
                for (int64_t k = 0; k < each; k++) at[i * each + k] = eight[i];
    }
}

/* One row times T tokens: out[t * stride]. */
INLINE void tile(const int bits, const int T, const uint8_t *w, int64_t bytes, const float *s, const inputs *x, int64_t token,
                 float *out, int64_t stride) {
    const int step = BLOCK * bits; /* bytes of UNIT blocks */
    const int64_t blocks = x->blocks, whole = bytes / step, left = bytes % step;
    const int8_t *q = x->q + token * blocks * BLOCK;
    const float *d = x->d + token * blocks, *m = x->m + token * blocks;
    lanes acc[TOKENS];
    for (int t = 0; t < T; t++) acc[t] = zero();
    for (int64_t u = 0; u < whole; u++) {
        if (T == 1)
            for (int i = 0; i < step; i += 64) __builtin_prefetch(w + AHEAD + i);
        unit(bits, T, w, s, q, d, m, blocks, acc);
        w += step, s += UNIT, q += UNIT * BLOCK, d += UNIT, m += UNIT;
    }
    if (left) {
        uint8_t rest[BLOCK * 8] = {0};
        unit(bits, T, memcpy(rest, w, left), s, q, d, m, blocks, acc);
    }
    for (int t = 0; t < T; t++) out[t * stride] = total(acc[t]);
}

/* All rows of a matrix times some tokens; `s` has room for the scales of a row. */
INLINE void product(const int bits, const matrix *a, const inputs *x, int64_t tokens, float *s, float *out, int64_t stride) {
    const int64_t blocks = blocks_of(a), each = a->group / BLOCK, bytes = blocks * 4 * bits;
    for (int64_t r = 0; r < a->rows; r++) {
        const uint8_t *w = a->codes + r * bytes;
        int64_t t = 0;
        spread(a->scales + r * (blocks / each), blocks, each, s);
        for (; t + TOKENS <= tokens; t += TOKENS) tile(bits, TOKENS, w, bytes, s, x, t, out + t * stride + r, stride);
        for (; t < tokens; t++) tile(bits, 1, w, bytes, s, x, t, out + t * stride + r, stride);
    }
}

static void multiply_all(const matrix *a, const inputs *x, int64_t tokens, float *s, float *out, int64_t stride) {
    if (a->bits == 8) product(8, a, x, tokens, s, out, stride);
    else if (a->bits == 4) product(4, a, x, tokens, s, out, stride);
    else product(2, a, x, tokens, s, out, stride);
}

/* Working memory for `tokens` inputs of `a`; 0: there is none. Freed by its owner through `*memory`. */
static int take(const matrix *a, int64_t tokens, inputs *x, float **s, void **memory) {
    const int64_t blocks = up(blocks_of(a), UNIT), floats = tokens * blocks;
    char *p = malloc(floats * (BLOCK + 2 * sizeof(float)) + blocks * sizeof(float) + 64);
    *memory = p;
    if (!p) return 0;
    p = (char *)up((int64_t)(intptr_t)p, 64);
    x->q = (int8_t *)p, x->blocks = blocks;
    x->d = (float *)(p + floats * BLOCK), x->m = x->d + floats;
    *s = x->m + floats;
    memset(*s, 0, blocks * sizeof(float));
    return 1;
}

/* out (tokens, rows) = x (tokens, columns) times the transpose of `a`; all contiguous. 0, or 1: no memory. */
int refold_linear(const matrix *a, const float *x, int64_t tokens, float *out) {
    inputs in;
    float *s;
    void *memory;
    const int64_t most = tokens < CHUNK ? tokens : CHUNK;
    if (!take(a, most, &in, &s, &memory)) return 1;
    for (int64_t t = 0; t < tokens; t += CHUNK) {
        const int64_t n = tokens - t < CHUNK ? tokens - t : CHUNK;
        quantise_tokens(a, x + t * a->columns, n, a->columns, &in);
        multiply_all(a, &in, n, s, out + t * a->rows, a->rows);
    }
    free(memory);
    return 0;
}

static float activate(int which, float v) {
    switch (which) {
    case 0: return v / (1.0f + expf(-v));
    case 1: return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case 2: return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    default: return v > 0 || v != v ? v : 0;
    }
}

/* An expert: first (2 * inner rows when gated, gate rows first), its activation, second. x, out: (tokens, hidden). */
int refold_expert(const matrix *first, const matrix *second, int gated, int which, const float *x, int64_t tokens, float *out) {
    const int64_t most = tokens < CHUNK ? tokens : CHUNK, inner = second->columns, wide = first->rows;
    inputs in, mid;
    float *s, *s2, *h = malloc((size_t)(most * wide) * sizeof *h);
    void *memory = NULL, *memory2 = NULL;
    const int ready = h && take(first, most, &in, &s, &memory) && take(second, most, &mid, &s2, &memory2);
    for (int64_t t = 0; ready && t < tokens; t += CHUNK) {
        const int64_t n = tokens - t < CHUNK ? tokens - t : CHUNK;
        quantise_tokens(first, x + t * first->columns, n, first->columns, &in);
        multiply_all(first, &in, n, s, h, wide);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < inner; j++) {
                float *v = h + i * wide + j;
                *v = gated ? activate(which, *v) * v[inner] : activate(which, *v);
            }
        quantise_tokens(second, h, n, wide, &mid);
        multiply_all(second, &mid, n, s2, out + t * second->rows, second->rows);
    }
    free(memory), free(memory2), free(h);
    return !ready;
}

/* Sixteen weights of 16 bits as float32. */
INLINE void widen16(const int brain, const uint16_t *w, float *to) {
    if (!brain) {
        HALVES(w, to);
        HALVES(w + 8, to + 8);
        return;
    }
    for (int i = 0; i < 16; i++) {
        const uint32_t u = (uint32_t)w[i] << 16;
        memcpy(to + i, &u, sizeof u);
    }
}

/* One row of 16-bit weights times T tokens, in sixteen sums whose columns are fixed, added in a fixed tree. */
INLINE void half_tile(const int brain, const int T, const uint16_t *w, int64_t columns, const float *x, float *out, int64_t rows) {
    float sum[TOKENS][16] = {{0}}, v[16];
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16) {
        if (T == 1 && !(c & 31)) __builtin_prefetch((const char *)(w + c) + AHEAD);
        widen16(brain, w + c, v);
        for (int t = 0; t < T; t++)
            for (int i = 0; i < 16; i++) sum[t][i] += v[i] * x[t * columns + c + i];
    }
    if (c < columns) {
        uint16_t rest[16] = {0};
        memcpy(rest, w + c, (columns - c) * sizeof *w);
        widen16(brain, rest, v);
        for (int t = 0; t < T; t++)
            for (int i = 0; i < columns - c; i++) sum[t][i] += v[i] * x[t * columns + c + i];
    }
    for (int t = 0; t < T; t++) {
        for (int n = 8; n; n /= 2)
            for (int i = 0; i < n; i++) sum[t][i] += sum[t][i + n];
        out[t * rows] = sum[t][0];
    }
}

INLINE void half_product(const int brain, const uint16_t *w, int64_t rows, int64_t columns, const float *x, int64_t tokens,
                         float *out) {
    for (int64_t first = 0; first < tokens; first += CHUNK) {
        const int64_t last = first + CHUNK < tokens ? first + CHUNK : tokens;
        for (int64_t r = 0; r < rows; r++) {
            int64_t t = first;
            for (; t + TOKENS <= last; t += TOKENS)
                half_tile(brain, TOKENS, w + r * columns, columns, x + t * columns, out + t * rows + r, rows);
            for (; t < last; t++) half_tile(brain, 1, w + r * columns, columns, x + t * columns, out + t * rows + r, rows);
        }
    }
}

/* out (tokens, rows) = x (tokens, columns) times the transpose of w (rows, columns), bfloat16 where `brain`, float16 otherwise. */
void refold_half(const uint16_t *w, int brain, int64_t rows, int64_t columns, const float *x, int64_t tokens, float *out) {
    if (brain) half_product(1, w, rows, columns, x, tokens, out);
    else half_product(0, w, rows, columns, x, tokens, out);
}

const char *refold_kernel_name(void) { return NAME; }
