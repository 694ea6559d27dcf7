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

/* One row's 24 sums. Plain variables, not an array: they must live in registers. */
struct sums {
	__m256 a, b, c;
};

static inline void sums_add(struct sums *s, const float *x, __m256 ga, __m256 gb, __m256 gc)
{
	__m256 v = _mm256_broadcast_ss(x);

	s->a = _mm256_fmadd_ps(v, ga, s->a);
	s->b = _mm256_fmadd_ps(v, gb, s->b);
	s->c = _mm256_fmadd_ps(v, gc, s->c);
}

static inline float sums_square(const struct sums *s)
{
	__m256 q = _mm256_mul_ps(s->a, s->a);

	q = _mm256_fmadd_ps(s->b, s->b, q);
	return sum8(_mm256_fmadd_ps(s->c, s->c, q));
}

/* Four rows share each row of G: twelve sums in registers. */
static void project4(const float *const x[4], uint32_t dim, const float *g, float out[4])
{
	const struct sums zero = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
	struct sums s0 = zero, s1 = zero, s2 = zero, s3 = zero;
	const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];

	for (uint32_t c = 0; c < dim; c++, g += ROWS_PROJ_PAD) {
		__m256 ga = _mm256_loadu_ps(g), gb = _mm256_loadu_ps(g + 8), gc = _mm256_loadu_ps(g + 16);

		sums_add(&s0, x0 + c, ga, gb, gc);
		sums_add(&s1, x1 + c, ga, gb, gc);
		sums_add(&s2, x2 + c, ga, gb, gc);
		sums_add(&s3, x3 + c, ga, gb, gc);
	}
	out[0] = sums_square(&s0);
	out[1] = sums_square(&s1);
	out[2] = sums_square(&s2);
	out[3] = sums_square(&s3);
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
		const __m256 mine = _mm256_set1_ps(s[i]);
		const __m256i me = _mm256_set1_epi32((int)i);
		__m256i below = _mm256_setzero_si256(), at = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
		uint32_t lanes[8];

		for (uint32_t j = 0; j < ROWS_CHUNK; j += 8) {
			__m256 v = _mm256_loadu_ps(padded + j);
			__m256 tie = _mm256_and_ps(_mm256_cmp_ps(v, mine, _CMP_EQ_OQ),
						   _mm256_castsi256_ps(_mm256_cmpgt_epi32(me, at)));
			__m256 less = _mm256_or_ps(_mm256_cmp_ps(v, mine, _CMP_LT_OQ), tie);

			below = _mm256_sub_epi32(below, _mm256_castps_si256(less));
			at = _mm256_add_epi32(at, _mm256_set1_epi32(8));
		}
		_mm256_storeu_si256((__m256i *)lanes, below);
		out[i] = (float)(lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] +
				 lanes[7]);
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
