/* SPDX-License-Identifier: MIT */
/* Recall arithmetic in AVX-512: one register holds a block of queries, eight rows are multiplied at once. */
#include <immintrin.h>
#include <math.h>
#include "policy/recall_kern.h"
#include "shm/util.h"

#define ROWS 8

static inline __m512 widen16(__m256i half, enum row_dtype dtype)
{
	if (dtype == ROW_F16)
		return _mm512_cvtph_ps(half);
	return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static void widen(float *x, const void *src, size_t n, enum row_dtype dtype)
{
	const uint16_t *h = src;
	size_t i = 0;

	for (; i + 16 <= n; i += 16)
		_mm512_storeu_ps(x + i, widen16(_mm256_loadu_si256((const __m256i *)(h + i)), dtype));
	if (i < n) {
		__mmask16 rest = (__mmask16)((1u << (n - i)) - 1);

		_mm512_mask_storeu_ps(x + i, rest, widen16(_mm256_maskz_loadu_epi16(rest, h + i), dtype));
	}
}

static void centre(float *x, const int8_t *c, uint32_t n, float step)
{
	for (uint32_t i = 0; i < n; i += 16) {
		__mmask16 rest = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
		__m512i v = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(rest, c + i));

		_mm512_mask_storeu_ps(x + i, rest, _mm512_mul_ps(_mm512_cvtepi32_ps(v), _mm512_set1_ps(step)));
	}
}

static inline __m512 or_never(__m512 v)
{
	__m512 big = _mm512_abs_ps(v);
	__mmask16 ok = _mm512_cmp_ps_mask(big, _mm512_set1_ps(INFINITY), _CMP_LT_OQ);

	return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), ok, v);
}

/* Fixed n unrolls, so that the sums live in registers. */
static inline __attribute__((always_inline)) void block(const float *x, uint32_t dim, const uint32_t n,
							const float *qt, float *out)
{
	__m512 acc[ROWS];

	for (uint32_t i = 0; i < n; i++)
		acc[i] = _mm512_setzero_ps();
	for (uint32_t d = 0; d < dim; d++) {
		__m512 q = _mm512_loadu_ps(qt + (size_t)d * RECALL_LANES);

#pragma GCC unroll 8
		for (uint32_t i = 0; i < n; i++)
			acc[i] = _mm512_fmadd_ps(_mm512_set1_ps(x[(size_t)i * dim + d]), q, acc[i]);
	}
	for (uint32_t i = 0; i < n; i++)
		_mm512_storeu_ps(out + (size_t)i * RECALL_LANES, or_never(acc[i]));
}

static void logits(const float *x, uint32_t dim, uint32_t n, const float *qt, float *out)
{
	uint32_t i = 0;

	for (; i + ROWS <= n; i += ROWS)
		block(x + (size_t)i * dim, dim, ROWS, qt, out + (size_t)i * RECALL_LANES);
	for (; i < n; i++)
		block(x + (size_t)i * dim, dim, 1, qt, out + (size_t)i * RECALL_LANES);
}

static void max(const float *l, uint32_t n, float *m)
{
	__m512 v = _mm512_loadu_ps(m);

	for (uint32_t i = 0; i < n; i++)
		v = _mm512_max_ps(v, _mm512_loadu_ps(l + (size_t)i * RECALL_LANES));
	_mm512_storeu_ps(m, v);
}

/* e^x for x <= 0, relative error below 2e-7: 2^round(t) times a polynomial of what is left of t = x / ln 2. */
static inline __m512 exp_neg(__m512 x)
{
	__m512 t = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-100)), _mm512_set1_ps(1.44269504f));
	__m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
	__m512 f = _mm512_sub_ps(t, n), p = _mm512_set1_ps(1.54035304e-4f);

	p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.33335581e-3f));
	p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812911e-3f));
	p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
	p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
	p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-1f));
	p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1));
	return _mm512_scalef_ps(p, n);
}

static void sumexp(const float *l, uint32_t n, const float *m, float *sum)
{
	__m512 top = _mm512_loadu_ps(m), v = _mm512_loadu_ps(sum);

	for (uint32_t i = 0; i < n; i++)
		v = _mm512_add_ps(v,
				  exp_neg(_mm512_sub_ps(_mm512_loadu_ps(l + (size_t)i * RECALL_LANES), top)));
	_mm512_storeu_ps(sum, v);
}

static void best(const float *l, uint32_t n, const float *base, float *score)
{
	__m512 b = _mm512_loadu_ps(base);

	for (uint32_t i = 0; i < n; i++) {
		float s = _mm512_reduce_max_ps(_mm512_sub_ps(_mm512_loadu_ps(l + (size_t)i * RECALL_LANES), b));

		score[i] = MAX(score[i], s);
	}
}

static void pair(float *x, size_t n, size_t step)
{
	for (size_t i = 0; i < n; i += 16) {
		__mmask16 rest = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
		__m512 a = _mm512_maskz_loadu_ps(rest, x + i), b = _mm512_maskz_loadu_ps(rest, x + i + step);

		_mm512_mask_storeu_ps(x + i, rest, _mm512_max_ps(a, b));
	}
}

static uint32_t above(const float *s, uint32_t n, float edge)
{
	__m512i count = _mm512_setzero_si512(), one = _mm512_set1_epi32(1);

	for (uint32_t i = 0; i < n; i += 16) {
		__mmask16 rest = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
		__m512 v = _mm512_maskz_loadu_ps(rest, s + i);

		rest = _mm512_mask_cmp_ps_mask(rest, v, _mm512_set1_ps(edge), _CMP_GT_OQ);
		count = _mm512_mask_add_epi32(count, rest, count, one);
	}
	return (uint32_t)_mm512_reduce_add_epi32(count);
}

const struct recall_kern recall_avx512 = {.isa = "avx512",
					  .widen = widen,
					  .centre = centre,
					  .logits = logits,
					  .max = max,
					  .sumexp = sumexp,
					  .best = best,
					  .pair = pair,
					  .above = above};
