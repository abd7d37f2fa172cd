/* Any processor: 256 columns of a row times the same of T tokens, one block after the other. */
#define LANE 8
#define NAME "plain"

typedef float lanes;

INLINE lanes zero(void) { return 0; }

INLINE float total(lanes a) { return a; }

INLINE void unit(const int bits, const int T, const uint8_t *w, const float *s, const int8_t *q, const float *d, const float *m,
                 int64_t blocks, lanes *acc) {
    for (int t = 0; t < T; t++)
        for (int b = 0; b < UNIT; b++) {
            const uint8_t *code = w + b * 4 * bits;
            const int8_t *x = q + t * blocks * BLOCK + b * BLOCK;
            int sum = 0;
            for (int k = 0; k < 8 / bits; k++)
                for (int i = 0; i < 4 * bits; i++)
                    sum += (bits == 8 ? (int8_t)code[i] : code[i] >> k * bits & ((1 << bits) - 1)) * x[k * 4 * bits + i];
            acc[t] += (float)sum * (s[b] * d[t * blocks + b]);
            if (bits < 8) acc[t] -= s[b] * m[t * blocks + b];
        }
}

INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    union {
        uint32_t u;
        float f;
    } out;
    if (exponent == 0) {
        out.f = (float)fraction * 0x1p-24f;
        out.u |= sign;
    } else
        out.u = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    return out.f;
}

#define HALVES(from, to) \
    for (int half = 0; half < 8; half++) (to)[half] = half_to_float((from)[half])
