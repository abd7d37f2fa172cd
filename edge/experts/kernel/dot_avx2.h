/* AVX2 and FMA: 256 columns of a row times the same of T tokens. Eight float lanes; which column goes to which lane is fixed, so
   a sum does not depend on T. With VNNI the integer product is one instruction instead of two and the same integer. */
#include <immintrin.h>

#define LANE 32
#define NAME "avx2"

typedef __m256 lanes;

INLINE lanes zero(void) { return _mm256_setzero_ps(); }

INLINE float total(lanes a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* The factors of eight blocks, so arranged that `factor` spreads them with a cheap shuffle within each half. */
INLINE __m256 arrange(const int bits, __m256 c) {
    if (bits == 4) return _mm256_permutevar8x32_ps(c, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    if (bits == 2) return _mm256_permutevar8x32_ps(c, _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
    return c;
}

/* One factor per lane of the vector v: its block fills 8 lanes at 8 bits, 4 at 4 bits, 2 at 2 bits. */
INLINE __m256 factor(const int bits, const int v, __m256 c) {
    if (bits == 8) c = v < 4 ? _mm256_permute2f128_ps(c, c, 0x00) : _mm256_permute2f128_ps(c, c, 0x11);
    if (bits == 2) return v ? _mm256_permute_ps(c, 0xfa) : _mm256_permute_ps(c, 0x50);
    switch (v & 3) {
    case 0: return _mm256_permute_ps(c, 0x00);
    case 1: return _mm256_permute_ps(c, 0x55);
    case 2: return _mm256_permute_ps(c, 0xaa);
    default: return _mm256_permute_ps(c, 0xff);
    }
}

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
typedef __m256i partial;
#if defined(__AVXVNNI__)
INLINE partial multiply(partial sum, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }
#else
INLINE partial multiply(partial sum, __m256i u, __m256i s) { return _mm256_dpbusd_epi32(sum, u, s); }
#endif
INLINE __m256i widen(partial sum) { return sum; }
#else
/* 16-bit sums of at most 8 products: 127 * 128 * 2 at 8 bits, 15 * 127 * 4 at 4 bits, 3 * 127 * 8 at 2 bits; none overflows. */
typedef __m256i partial;
INLINE partial multiply(partial sum, __m256i u, __m256i s) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s)); }
INLINE __m256i widen(partial sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

INLINE void unit(const int bits, const int T, const uint8_t *w, const float *s, const int8_t *q, const float *d, const float *m,
                 int64_t blocks, lanes *acc) {
    const __m256i mask = _mm256_set1_epi8(bits == 4 ? 15 : 3);
    const __m256 scale = _mm256_loadu_ps(s);
    __m256 c[TOKENS], part[TOKENS];
    for (int t = 0; t < T; t++) {
        c[t] = arrange(bits, _mm256_mul_ps(scale, _mm256_loadu_ps(d + t * blocks)));
        part[t] = _mm256_setzero_ps();
        if (bits < 8) part[t] = _mm256_fnmadd_ps(scale, _mm256_loadu_ps(m + t * blocks), part[t]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < bits; v++) {
        const __m256i raw = _mm256_loadu_si256((const __m256i *)(w + LANE * v));
        __m256i code[4] = {raw};
        if (bits == 8) code[0] = _mm256_abs_epi8(raw);
        else
            for (int k = 0; k < 8 / bits; k++) code[k] = _mm256_and_si256(_mm256_srli_epi16(raw, k * bits), mask);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const __m256i *x = (const __m256i *)(q + t * blocks * BLOCK) + v * (8 / bits);
            partial sum = _mm256_setzero_si256();
            for (int k = 0; k < 8 / bits; k++) {
                __m256i value = _mm256_loadu_si256(x + k);
                if (bits == 8) value = _mm256_sign_epi8(value, raw);
                sum = multiply(sum, code[k], value);
            }
            part[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(widen(sum)), factor(bits, v, c[t]), part[t]);
        }
    }
    for (int t = 0; t < T; t++) acc[t] = _mm256_add_ps(acc[t], part[t]);
}

/* Eight float16 as float32. */
#define HALVES(from, to) _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from))))
