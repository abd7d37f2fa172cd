/* 64-bit Arm: 256 columns of a row times the same of T tokens, in four float lanes. With the dot-product extension sixteen
   products take one instruction; without it, widening products give the same integers in the same lanes. */
#include <arm_neon.h>

#define LANE 16
#define NAME "neon"

typedef float32x4_t lanes;

INLINE lanes zero(void) { return vdupq_n_f32(0); }

INLINE float total(lanes a) { return vaddvq_f32(a); }

INLINE int32x4_t multiply(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(a), vget_high_s8(b)));
    return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
}

INLINE void unit(const int bits, const int T, const uint8_t *w, const float *s, const int8_t *q, const float *d, const float *m,
                 int64_t blocks, lanes *acc) {
    const uint8x16_t mask = vdupq_n_u8(bits == 4 ? 15 : 3);
    float c[TOKENS][UNIT];
    for (int t = 0; t < T; t++)
        for (int h = 0; h < UNIT; h += 4) {
            const float32x4_t scale = vld1q_f32(s + h);
            vst1q_f32(c[t] + h, vmulq_f32(scale, vld1q_f32(d + t * blocks + h)));
            if (bits < 8) acc[t] = vfmsq_f32(acc[t], scale, vld1q_f32(m + t * blocks + h));
        }
#pragma GCC unroll 8
    for (int v = 0; v < (bits == 2 ? 4 : 8); v++) { /* two blocks at 2 bits, otherwise one */
        const int parts = bits == 2 ? 4 : 2;
        int8x16_t code[4];
        if (bits == 8)
            for (int k = 0; k < 2; k++) code[k] = vreinterpretq_s8_u8(vld1q_u8(w + BLOCK * v + LANE * k));
        else {
            uint8x16_t raw = vld1q_u8(w + LANE * v);
            for (int k = 0; k < parts; k++) {
                code[k] = vreinterpretq_s8_u8(vandq_u8(raw, mask));
                raw = bits == 4 ? vshrq_n_u8(raw, 4) : vshrq_n_u8(raw, 2);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const int8_t *x = q + t * blocks * BLOCK + v * parts * LANE;
            int32x4_t sum = vdupq_n_s32(0);
            for (int k = 0; k < parts; k++) sum = multiply(sum, code[k], vld1q_s8(x + LANE * k));
            const float *own = c[t];
            const float32x4_t factor =
                bits == 2 ? vcombine_f32(vdup_n_f32(own[2 * v]), vdup_n_f32(own[2 * v + 1])) : vdupq_n_f32(own[v]);
            acc[t] = vfmaq_f32(acc[t], vcvtq_f32_s32(sum), factor);
        }
    }
}

/* Eight float16 as float32. */
#define HALVES(from, to)                                                      \
    do {                                                                      \
        const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(from));      \
        vst1q_f32(to, vcvt_f32_f16(vget_low_f16(half)));                      \
        vst1q_f32((to) + 4, vcvt_f32_f16(vget_high_f16(half)));               \
    } while (0)
