/* SPDX-License-Identifier: MIT */
/*
 * What happens to a row between two linears, written once for every vector
 * width. The including file defines, before it includes this,
 *
 *   vf, VF              a vector of VF floats
 *   vf_load, vf_store   aligned to the vector
 *   vf_load_row         VF elements of a row of any dtype and alignment
 *   vf_loadu, vf_storeu aligned to nothing;  vf_iota: 0, 1, 2 ...
 *   vf_set1, vf_add, vf_sub, vf_mul, vf_div, vf_min, vf_max
 *   vf_fma(a, b, c)     a * b + c;  vf_fnma: c - a * b
 *   vf_round            to the nearest integer
 *   vf_scale2(p, n)     p * 2^n for integral n in [-126, 127]
 *   vf_split(x, e)      x = m 2^e, m in [1, 2); for normal x > 0
 *   vf_swap             neighbours change places
 *   vf_sum              sum of the lanes in a fixed order
 *   act_put(act, i, v, bf16)   store activations i..i+VF
 */
#include "policy/kvp.h"

#include <float.h>
#include <math.h>

#define KERNEL static inline __attribute__((always_inline))

/* Before a loop of constant length over an array of vectors, which only then can be registers. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/*
 * e^x, relative error below 1e-6, for x clamped to [-87, 88]: x = n ln 2 + r with
 * |r| <= ln 2 / 2 and ln 2 in two parts (the first has trailing zeros, so that
 * n times it is exact), then the Taylor series of e^r up to r^6 / 720; the first
 * term left out is 1.2e-7 at most.
 */
KERNEL vf vf_exp(vf x)
{
	vf n, r, p;

	x = vf_min(vf_max(x, vf_set1(-87.0f)), vf_set1(88.0f));
	n = vf_round(vf_mul(x, vf_set1(1.442695041f)));
	r = vf_fnma(n, vf_set1(0x1.62e4p-1f), x);
	r = vf_fnma(n, vf_set1(0x1.7f7d1cp-20f), r);
	p = vf_fma(r, vf_set1(1.0f / 720), vf_set1(1.0f / 120));
	p = vf_fma(p, r, vf_set1(1.0f / 24));
	p = vf_fma(p, r, vf_set1(1.0f / 6));
	p = vf_fma(p, r, vf_set1(0.5f));
	p = vf_fma(p, r, vf_set1(1.0f));
	p = vf_fma(p, r, vf_set1(1.0f));
	return vf_scale2(p, n);
}

KERNEL vf vf_silu(vf x)
{
	return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_set1(0.0f), x))));
}

/*
 * Mean and 1 / sqrt(variance + eps) of a row: two passes, as the reference
 * does, so that no digits cancel. Four sums each, so that additions need not
 * wait for one another; widths are multiples of 16, not of four vectors.
 */
KERNEL void row_stats(const float *c, uint32_t width, vf *mean, vf *scale)
{
	vf s[4], q[4];
	uint32_t i;

	UNROLL
	for (int j = 0; j < 4; j++)
		s[j] = q[j] = vf_set1(0.0f);
	for (i = 0; i + 4 * VF <= width; i += 4 * VF)
		UNROLL
	for (int j = 0; j < 4; j++)
		s[j] = vf_add(s[j], vf_load(c + i + j * VF));
	for (; i < width; i += VF)
		s[0] = vf_add(s[0], vf_load(c + i));
	*mean = vf_set1(vf_sum(vf_add(vf_add(s[0], s[1]), vf_add(s[2], s[3]))) / (float)width);

	for (i = 0; i + 4 * VF <= width; i += 4 * VF)
		UNROLL
	for (int j = 0; j < 4; j++) {
		vf d = vf_sub(vf_load(c + i + j * VF), *mean);

		q[j] = vf_fma(d, d, q[j]);
	}
	for (; i < width; i += VF) {
		vf d = vf_sub(vf_load(c + i), *mean);

		q[0] = vf_fma(d, d, q[0]);
	}
	*scale = vf_set1(
		1.0f / sqrtf(vf_sum(vf_add(vf_add(q[0], q[1]), vf_add(q[2], q[3]))) / (float)width + KVP_EPS));
}

KERNEL vf normal_at(const float *c, uint32_t i, vf mean, vf scale, struct kvp_norm norm)
{
	vf y = vf_mul(vf_sub(vf_load(c + i), mean), scale);

	return vf_fma(y, vf_load(norm.gain + i), vf_load(norm.shift + i));
}

KERNEL void rows_norm(void *act, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm, bool silu,
		      bool bf16)
{
	for (uint32_t r = 0; r < n; r++, c += width) {
		vf mean, scale;

		row_stats(c, width, &mean, &scale);
		for (uint32_t i = 0; i < width; i += VF) {
			vf y = normal_at(c, i, mean, scale, norm);

			act_put(act, (size_t)r * KVP_LD + i, silu ? vf_silu(y) : y, bf16);
		}
	}
}

KERNEL void rows_finish(float *const *coef, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm,
			const float *out, const float *bias, uint32_t rank)
{
	for (uint32_t r = 0; r < n; r++, c += width) {
		vf mean, scale, sum0 = vf_set1(0.0f), sum1 = vf_set1(0.0f);

		row_stats(c, width, &mean, &scale);
		for (uint32_t i = 0; i < width; i += VF) {
			vf h = vf_silu(normal_at(c, i, mean, scale, norm));

			sum0 = vf_fma(h, vf_load(out + i), sum0);
			if (rank > 1)
				sum1 = vf_fma(h, vf_load(out + width + i), sum1);
		}
		coef[0][r] = vf_sum(sum0) + bias[0];
		if (rank > 1)
			coef[1][r] = vf_sum(sum1) + bias[1];
	}
}

KERNEL void rows_load(void *act, const void *rows, size_t stride, enum row_dtype dtype, uint32_t n,
		      uint32_t dim, bool bf16)
{
	for (uint32_t r = 0; r < n; r++) {
		const char *row = (const char *)rows + r * stride;

		for (uint32_t i = 0; i < dim; i += VF)
			act_put(act, (size_t)r * KVP_LD + i, vf_load_row(row, i, dtype), bf16);
	}
}

/* x holds the row and after it its first half again, so that partners of any VF elements lie together. */
KERNEL void rows_unrotate(void *act, const void *rows, size_t stride, enum row_dtype dtype, uint32_t n,
			  const struct kvp_rope *rope, const uint32_t *pos, bool bf16)
{
	float _Alignas(64) base[2 * KVP_ROW], x[KVP_ROW + KVP_ROW / 2];
	const uint32_t dim = rope->dim;
	uint32_t step = UINT32_MAX; /* of base; no position has it */

	for (uint32_t r = 0; r < n; r++) {
		const char *row = (const char *)rows + r * stride;
		const float *fine = rope->fine + (size_t)(pos[r] % KVP_ROPE_STEP) * 2 * dim;

		if (pos[r] / KVP_ROPE_STEP != step) {
			step = pos[r] / KVP_ROPE_STEP;
			kvp_rope_base(rope, step, base);
		}
		for (uint32_t i = 0; i < dim; i += VF)
			vf_store(x + i, vf_load_row(row, i, dtype));
		if (rope->type == WEIGHTS_ROPE_HALF)
			memcpy(x + dim, x, dim / 2 * sizeof(*x));
		for (uint32_t i = 0; i < dim; i += VF) {
			vf cb = vf_load(base + i), sb = vf_load(base + dim + i), cf = vf_load(fine + i),
			   sf = vf_load(fine + dim + i);
			vf cosine = vf_fnma(sb, sf, vf_mul(cb, cf)), sine = vf_fma(sb, cf, vf_mul(cb, sf));
			vf own = vf_load(x + i), other;

			other = rope->type == WEIGHTS_ROPE_HALF ? vf_loadu(x + dim / 2 + i) : vf_swap(own);
			act_put(act, (size_t)r * KVP_LD + i, vf_fma(other, sine, vf_mul(own, cosine)), bf16);
		}
	}
}

/*
 * log2 of normal x > 0, absolute error below 2e-7: x = m 2^e, and with s = (m - sqrt 2) / (m + sqrt 2), so
 * |s| <= 0.172, log2 m = 1/2 + 2 / ln 2 (s + s^3/3 + s^5/5 + s^7/7 ...); the first term left out is 4e-8 at
 * most.
 */
KERNEL vf vf_log2(vf x)
{
	vf e, m = vf_split(x, &e), s, z, p;

	s = vf_div(vf_sub(m, vf_set1(1.41421356f)), vf_add(m, vf_set1(1.41421356f)));
	z = vf_mul(s, s);
	p = vf_fma(z, vf_set1(2.88539008f / 7), vf_set1(2.88539008f / 5));
	p = vf_fma(p, z, vf_set1(2.88539008f / 3));
	p = vf_fma(p, z, vf_set1(2.88539008f));
	return vf_fma(p, s, vf_add(e, vf_set1(0.5f)));
}

/* Scores of VF rows from here on; clamped to finite, what is not a number to the least. */
KERNEL vf combine_at(const float *f0, const float *f1, uint32_t i, vf x1, vf per_octave,
		     const struct kvp_segment *seg)
{
	vf t = vf_mul(vf_log2(vf_max(x1, vf_set1(1.0f))), per_octave), s;

	s = vf_add(vf_loadu(f0 + i), vf_fma(t, vf_set1(seg->b[0]), vf_set1(seg->a[0])));
	if (f1)
		s = vf_fma(vf_loadu(f1 + i), vf_fma(t, vf_set1(seg->b[1]), vf_set1(seg->a[1])), s);
	return vf_min(vf_max(s, vf_set1(-FLT_MAX)),
		      vf_set1(FLT_MAX)); /* max() of a NaN is its second operand */
}

KERNEL void rows_combine(float *scores, const float *f0, const float *f1, uint32_t n, uint32_t distance,
			 float per_octave, const struct kvp_segment *seg)
{
	const vf scale = vf_set1(per_octave), step = vf_set1((float)VF);
	vf x1 = vf_sub(vf_set1((float)distance + 1.0f), vf_iota()); /* 1 + distance, row by row */
	uint32_t i = 0;

	for (; i + VF <= n; i += VF, x1 = vf_sub(x1, step))
		vf_storeu(scores + i, combine_at(f0, f1, i, x1, scale, seg));
	if (i < n) {
		float a[VF] = {0}, b[VF] = {0}, s[VF];

		memcpy(a, f0 + i, (n - i) * sizeof(*a));
		if (f1)
			memcpy(b, f1 + i, (n - i) * sizeof(*b));
		vf_storeu(s, combine_at(a, f1 ? b : NULL, 0, x1, scale, seg));
		memcpy(scores + i, s, (n - i) * sizeof(*s));
	}
}
