/* SPDX-License-Identifier: MIT */
/* Row arithmetic, eight columns at a time; the columns left over go one by one. */
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "policy/rows.h"
#include "shm/util.h"

static float sum8(__m256 v)
{
	__m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

	s = _mm_add_ps(s, _mm_movehl_ps(s, s));
	return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static __m256 load8(const char *src, enum row_dtype dtype)
{
	if (dtype == ROW_F16)
		return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)src));
	return _mm256_castsi256_ps(
		_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)src)), 16));
}

static void load(float *x, const void *src, size_t stride, uint32_t dim, uint32_t n, enum row_dtype dtype)
{
	uint32_t whole = dim / 8 * 8;

	for (uint32_t i = 0; i < n; i++, x += dim) {
		const char *row = (const char *)src + i * stride;

		if (dtype == ROW_F32) {
			memcpy(x, row, dim * sizeof(float));
			continue;
		}
		for (uint32_t c = 0; c < whole; c += 8)
			_mm256_storeu_ps(x + c, load8(row + c * 2, dtype));
		if (whole < dim) {
			char tail[16] = {0};
			float f[8];

			memcpy(tail, row + whole * 2, (dim - whole) * 2);
			_mm256_storeu_ps(f, load8(tail, dtype));
			memcpy(x + whole, f, (dim - whole) * sizeof(float));
		}
	}
}

static void dot(const float *x, uint32_t dim, uint32_t n, const float *w, float *out)
{
	for (uint32_t i = 0; i < n; i++, x += dim) {
		__m256 a = _mm256_setzero_ps(), b = a;
		uint32_t c = 0;
		float s;

		for (; c + 16 <= dim; c += 16) {
			a = _mm256_fmadd_ps(_mm256_loadu_ps(x + c), _mm256_loadu_ps(w + c), a);
			b = _mm256_fmadd_ps(_mm256_loadu_ps(x + c + 8), _mm256_loadu_ps(w + c + 8), b);
		}
		s = sum8(_mm256_add_ps(a, b));
		for (; c < dim; c++)
			s += x[c] * w[c];
		out[i] = s;
	}
}

static void sumsq(const float *x, uint32_t dim, uint32_t n, float *out)
{
	for (uint32_t i = 0; i < n; i++, x += dim)
		dot(x, dim, 1, x, out + i);
}

static float max8(__m256 v)
{
	__m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

	m = _mm_max_ps(m, _mm_movehl_ps(m, m));
	return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

static void range(const float *x, uint32_t dim, uint32_t n, float *out)
{
	for (uint32_t i = 0; i < n; i++, x += dim) {
		__m256 hi = _mm256_set1_ps(x[0]), neg = _mm256_set1_ps(-x[0]);
		uint32_t c = 0;
		float top, bottom;

		for (; c + 8 <= dim; c += 8) {
			__m256 v = _mm256_loadu_ps(x + c);

			hi = _mm256_max_ps(hi, v);
			neg = _mm256_max_ps(neg, _mm256_sub_ps(_mm256_setzero_ps(), v));
		}
		top = max8(hi);
		bottom = -max8(neg);
		for (; c < dim; c++) {
			top = MAX(top, x[c]);
			bottom = MIN(bottom, x[c]);
		}
		out[i] = top - bottom;
	}
}

static void add(const float *x, uint32_t dim, uint32_t n, const float *scale, float *acc)
{
	uint32_t c = 0;

	for (; c + 8 <= dim; c += 8) {
		__m256 a = _mm256_loadu_ps(acc + c);

		for (uint32_t i = 0; i < n; i++)
			a = _mm256_fmadd_ps(_mm256_set1_ps(scale[i]), _mm256_loadu_ps(x + i * dim + c), a);
		_mm256_storeu_ps(acc + c, a);
	}
	for (; c < dim; c++)
		for (uint32_t i = 0; i < n; i++)
			acc[c] += scale[i] * x[i * dim + c];
}

static void minmax(const float *x, uint32_t dim, uint32_t n, float *lo, float *hi)
{
	uint32_t c = 0;

	for (; c + 8 <= dim; c += 8) {
		__m256 l = _mm256_loadu_ps(x + c), h = l;

		for (uint32_t i = 1; i < n; i++) {
			__m256 v = _mm256_loadu_ps(x + i * dim + c);

			l = _mm256_min_ps(l, v);
			h = _mm256_max_ps(h, v);
		}
		_mm256_storeu_ps(lo + c, l);
		_mm256_storeu_ps(hi + c, h);
	}
	for (; c < dim; c++) {
		lo[c] = hi[c] = x[c];
		for (uint32_t i = 1; i < n; i++) {
			lo[c] = MIN(lo[c], x[i * dim + c]);
			hi[c] = MAX(hi[c], x[i * dim + c]);
		}
	}
}

static float row_spread(float *x, uint32_t dim, const float *lo, const float *inv)
{
	__m256 sum = _mm256_setzero_ps(), var = sum, mean8;
	uint32_t c = 0;
	float mean, v;

	for (; c + 8 <= dim; c += 8) {
		__m256 r = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + c), _mm256_loadu_ps(lo + c)),
					 _mm256_loadu_ps(inv + c));

		_mm256_storeu_ps(x + c, r);
		sum = _mm256_add_ps(sum, r);
	}
	mean = sum8(sum);
	for (; c < dim; c++) {
		x[c] = (x[c] - lo[c]) * inv[c];
		mean += x[c];
	}
	mean /= (float)dim;
	mean8 = _mm256_set1_ps(mean);
	for (c = 0; c + 8 <= dim; c += 8) {
		__m256 d = _mm256_sub_ps(_mm256_loadu_ps(x + c), mean8);

		var = _mm256_fmadd_ps(d, d, var);
	}
	v = sum8(var);
	for (; c < dim; c++)
		v += (x[c] - mean) * (x[c] - mean);
	return sqrtf(v / (float)(dim - 1));
}

static void spread(float *x, uint32_t dim, uint32_t n, const float *lo, const float *inv, float *out)
{
	for (uint32_t i = 0; i < n; i++, x += dim)
		out[i] = row_spread(x, dim, lo, inv);
}

/* Four rows share each row of G: twelve sums in registers. */
static void project4(const float *const x[4], uint32_t dim, const float *g, float out[4])
{
	__m256 p[4][3];

	for (int i = 0; i < 4; i++)
		p[i][0] = p[i][1] = p[i][2] = _mm256_setzero_ps();
	for (uint32_t c = 0; c < dim; c++, g += ROWS_PROJ_PAD) {
		__m256 g0 = _mm256_loadu_ps(g), g1 = _mm256_loadu_ps(g + 8), g2 = _mm256_loadu_ps(g + 16);

#define PROJECT_ROW(i)                                                                                         \
	do {                                                                                                   \
		__m256 v = _mm256_broadcast_ss(x[i] + c);                                                      \
		p[i][0] = _mm256_fmadd_ps(v, g0, p[i][0]);                                                     \
		p[i][1] = _mm256_fmadd_ps(v, g1, p[i][1]);                                                     \
		p[i][2] = _mm256_fmadd_ps(v, g2, p[i][2]);                                                     \
	} while (0)
		PROJECT_ROW(0);
		PROJECT_ROW(1);
		PROJECT_ROW(2);
		PROJECT_ROW(3);
#undef PROJECT_ROW
	}
	for (int i = 0; i < 4; i++) {
		__m256 s = _mm256_mul_ps(p[i][0], p[i][0]);

		s = _mm256_fmadd_ps(p[i][1], p[i][1], s);
		out[i] = sum8(_mm256_fmadd_ps(p[i][2], p[i][2], s));
	}
}

static void project(const float *x, uint32_t dim, uint32_t n, const float *g, float *out)
{
	for (uint32_t i = 0; i < n; i += 4) {
		const float *rows[4];
		float s[4];

		for (uint32_t j = 0; j < 4; j++) /* the last row stands in for those that are not there */
			rows[j] = x + (size_t)MIN(i + j, n - 1) * dim;
		project4(rows, dim, g, s);
		memcpy(out + i, s, MIN(n - i, 4) * sizeof(*s));
	}
}

static void rank(const float *s, uint32_t n, float *out)
{
	float padded[ROWS_CHUNK];

	for (uint32_t i = 0; i < ROWS_CHUNK; i++)
		padded[i] = i < n ? s[i] : INFINITY;
	for (uint32_t i = 0; i < n; i++) {
		const __m256 me = _mm256_set1_ps(s[i]);
		uint32_t below = 0, j = 0, before = i / 8 * 8;

		for (; j < before; j += 8)
			below += (uint32_t)__builtin_popcount((unsigned)_mm256_movemask_ps(
				_mm256_cmp_ps(_mm256_loadu_ps(padded + j), me, _CMP_LE_OQ)));
		for (; j < before + 8; j++)
			below += padded[j] < s[i] || (padded[j] == s[i] && j < i);
		for (; j < ROWS_CHUNK; j += 8)
			below += (uint32_t)__builtin_popcount((unsigned)_mm256_movemask_ps(
				_mm256_cmp_ps(_mm256_loadu_ps(padded + j), me, _CMP_LT_OQ)));
		out[i] = (float)below;
	}
}

const struct rows_kern rows_avx2 = {
	.isa = "avx2",
	.load = load,
	.sumsq = sumsq,
	.dot = dot,
	.range = range,
	.add = add,
	.minmax = minmax,
	.spread = spread,
	.project = project,
	.rank = rank,
};
