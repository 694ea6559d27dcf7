/* SPDX-License-Identifier: MIT */
/* Recall arithmetic in AVX2: two registers hold a block of queries, four rows are multiplied at once. */
#include <immintrin.h>
#include <math.h>
#include "policy/learned.h"
#include "policy/recall_kern.h"
#include "shm/util.h"

#define ROWS 4
#define HALF 8

static void widen(float *x, const void *src, size_t n, enum row_dtype dtype)
{
	const uint16_t *h = src;
	size_t i = 0;

	for (; i + HALF <= n; i += HALF) {
		__m128i v = _mm_loadu_si128((const __m128i *)(h + i));
		__m256 wide = dtype == ROW_F16
				      ? _mm256_cvtph_ps(v)
				      : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));

		_mm256_storeu_ps(x + i, wide);
	}
	for (; i < n; i++)
		x[i] = row_element(src, i, dtype);
}

static void centre(float *x, const int8_t *c, uint32_t n, float step)
{
	uint32_t i = 0;

	for (; i + HALF <= n; i += HALF) {
		__m256i v = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(c + i)));

		_mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_cvtepi32_ps(v), _mm256_set1_ps(step)));
	}
	for (; i < n; i++)
		x[i] = (float)c[i] * step;
}

static inline __m256 or_never(__m256 v)
{
	__m256 big = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
	__m256 ok = _mm256_cmp_ps(big, _mm256_set1_ps(INFINITY), _CMP_LT_OQ);

	return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), v, ok);
}

/* Fixed n unrolls, so that the sums live in registers. */
static inline __attribute__((always_inline)) void block(const float *x, uint32_t dim, const uint32_t n,
							const float *qt, float *out)
{
	__m256 lo[ROWS], hi[ROWS];

	for (uint32_t i = 0; i < n; i++)
		lo[i] = hi[i] = _mm256_setzero_ps();
	for (uint32_t d = 0; d < dim; d++) {
		__m256 a = _mm256_loadu_ps(qt + (size_t)d * RECALL_LANES);
		__m256 b = _mm256_loadu_ps(qt + (size_t)d * RECALL_LANES + HALF);

#pragma GCC unroll 4
		for (uint32_t i = 0; i < n; i++) {
			__m256 k = _mm256_set1_ps(x[(size_t)i * dim + d]);

			lo[i] = _mm256_fmadd_ps(k, a, lo[i]);
			hi[i] = _mm256_fmadd_ps(k, b, hi[i]);
		}
	}
	for (uint32_t i = 0; i < n; i++) {
		_mm256_storeu_ps(out + (size_t)i * RECALL_LANES, or_never(lo[i]));
		_mm256_storeu_ps(out + (size_t)i * RECALL_LANES + HALF, or_never(hi[i]));
	}
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
	__m256 lo = _mm256_loadu_ps(m), hi = _mm256_loadu_ps(m + HALF);

	for (uint32_t i = 0; i < n; i++, l += RECALL_LANES) {
		lo = _mm256_max_ps(lo, _mm256_loadu_ps(l));
		hi = _mm256_max_ps(hi, _mm256_loadu_ps(l + HALF));
	}
	_mm256_storeu_ps(m, lo);
	_mm256_storeu_ps(m + HALF, hi);
}

/* e^x for x <= 0: see recall_avx512.c; 2^n goes straight into the exponent, so x ends at -87. */
static inline __m256 exp_neg(__m256 x)
{
	__m256 t = _mm256_mul_ps(_mm256_max_ps(x, _mm256_set1_ps(-87)), _mm256_set1_ps(1.44269504f));
	__m256 n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
	__m256 f = _mm256_sub_ps(t, n), p = _mm256_set1_ps(1.54035304e-4f);
	__m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);

	p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.33335581e-3f));
	p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.61812911e-3f));
	p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.55041087e-2f));
	p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.40226507e-1f));
	p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.93147181e-1f));
	p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1));
	return _mm256_mul_ps(p, _mm256_castsi256_ps(e));
}

static void sumexp(const float *l, uint32_t n, const float *m, float *sum)
{
	for (uint32_t h = 0; h < RECALL_LANES; h += HALF) {
		__m256 top = _mm256_loadu_ps(m + h), v = _mm256_loadu_ps(sum + h);

		for (uint32_t i = 0; i < n; i++) {
			__m256 x = _mm256_loadu_ps(l + (size_t)i * RECALL_LANES + h);

			v = _mm256_add_ps(v, exp_neg(_mm256_sub_ps(x, top)));
		}
		_mm256_storeu_ps(sum + h, v);
	}
}

static inline float max8(__m256 v)
{
	__m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

	s = _mm_max_ps(s, _mm_movehl_ps(s, s));
	return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

static void best(const float *l, uint32_t n, const float *base, float *score)
{
	__m256 b0 = _mm256_loadu_ps(base), b1 = _mm256_loadu_ps(base + HALF);

	for (uint32_t i = 0; i < n; i++, l += RECALL_LANES) {
		float s = max8(_mm256_max_ps(_mm256_sub_ps(_mm256_loadu_ps(l), b0),
					     _mm256_sub_ps(_mm256_loadu_ps(l + HALF), b1)));

		score[i] = MAX(score[i], s);
	}
}

static void pair(float *x, size_t n, size_t step)
{
	size_t i = 0;

	for (; i + HALF <= n; i += HALF)
		_mm256_storeu_ps(x + i, _mm256_max_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i + step)));
	for (; i < n; i++)
		x[i] = MAX(x[i], x[i + step]);
}

static uint32_t above(const float *s, uint32_t n, float edge)
{
	__m256i count = _mm256_setzero_si256();
	uint32_t i = 0, rest = 0, part[HALF];

	for (; i + HALF <= n; i += HALF) {
		__m256 more = _mm256_cmp_ps(_mm256_loadu_ps(s + i), _mm256_set1_ps(edge), _CMP_GT_OQ);

		count = _mm256_sub_epi32(count, _mm256_castps_si256(more));
	}
	for (; i < n; i++)
		rest += s[i] > edge;
	_mm256_storeu_si256((__m256i *)part, count);
	for (i = 0; i < HALF; i++)
		rest += part[i];
	return rest;
}

const struct recall_kern recall_avx2 = {.isa = "avx2",
					.widen = widen,
					.centre = centre,
					.logits = logits,
					.max = max,
					.sumexp = sumexp,
					.best = best,
					.pair = pair,
					.above = above};
