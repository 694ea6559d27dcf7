/* SPDX-License-Identifier: MIT */
/* Rows of attention, eight floats at a time. Compiled for AVX2 and FMA; called where the CPU has both. */
#include <immintrin.h>
#include <math.h>
#include "policy/eval/kern.h"

/*
 * exp(x) for x <= 0, within 2 units in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of
 * degree 6 for exp(r), n added to the exponent. Below -87 the result is 0.
 */
static inline __m256 exp8(__m256 x)
{
	const __m256 least = _mm256_set1_ps(-87.0f);
	__m256 keep = _mm256_cmp_ps(x, least, _CMP_GE_OQ);
	__m256 n, r, p;

	x = _mm256_max_ps(x, least);
	n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
			    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
	r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x); /* ln 2 in two parts, the first exact */
	r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
	p = _mm256_set1_ps(1.0f / 720);
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
	p = _mm256_castsi256_ps(
		_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
	return _mm256_and_ps(p, keep);
}

/* The first n of eight, all bits set. */
static inline __m256i first(uint32_t n)
{
	return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline float add8(__m256 x)
{
	__m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));

	s = _mm_add_ps(s, _mm_movehl_ps(s, s));
	return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline float max8(__m256 x)
{
	__m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));

	s = _mm_max_ps(s, _mm_movehl_ps(s, s));
	return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

static float row_max(const float *s, uint32_t n)
{
	__m256 top = _mm256_set1_ps(-INFINITY);
	uint32_t i = 0;

	for (; i + 8 <= n; i += 8)
		top = _mm256_max_ps(top, _mm256_loadu_ps(s + i));
	if (i < n) {
		__m256i mask = first(n - i);

		top = _mm256_max_ps(
			top, _mm256_blendv_ps(top, _mm256_maskload_ps(s + i, mask), _mm256_castsi256_ps(mask)));
	}
	return max8(top);
}

static float exp_row(float *s, uint32_t n, float scale)
{
	const __m256 top = _mm256_set1_ps(row_max(s, n)), by = _mm256_set1_ps(scale);
	__m256 sum = _mm256_setzero_ps();
	uint32_t i = 0;

	for (; i + 8 <= n; i += 8) {
		__m256 e = exp8(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(s + i), top), by));

		_mm256_storeu_ps(s + i, e);
		sum = _mm256_add_ps(sum, e);
	}
	if (i < n) {
		__m256i mask = first(n - i);
		__m256 e = exp8(_mm256_mul_ps(_mm256_sub_ps(_mm256_maskload_ps(s + i, mask), top), by));

		_mm256_maskstore_ps(s + i, mask, e);
		sum = _mm256_add_ps(sum, _mm256_and_ps(e, _mm256_castsi256_ps(mask)));
	}
	return add8(sum);
}

static void axpy(float *acc, const float *x, float w, uint32_t n)
{
	const __m256 by = _mm256_set1_ps(w);
	uint32_t i = 0;

	for (; i + 8 <= n; i += 8)
		_mm256_storeu_ps(acc + i,
				 _mm256_fmadd_ps(by, _mm256_loadu_ps(x + i), _mm256_loadu_ps(acc + i)));
	for (; i < n; i++)
		acc[i] += w * x[i];
}

static void most(float *acc, const float *x, uint32_t n)
{
	uint32_t i = 0;

	for (; i + 8 <= n; i += 8)
		_mm256_storeu_ps(acc + i, _mm256_max_ps(_mm256_loadu_ps(acc + i), _mm256_loadu_ps(x + i)));
	for (; i < n; i++)
		acc[i] = acc[i] > x[i] ? acc[i] : x[i];
}

const struct eval_kern eval_avx2 = {.isa = "avx2", .exp_row = exp_row, .axpy = axpy, .most = most};
