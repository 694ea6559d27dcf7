/* SPDX-License-Identifier: MIT */
/*
 * What happens to a row between two linears, written once for every vector
 * width. The including file defines, before it includes this,
 *
 *   vf, VF              a vector of VF floats
 *   vf_load, vf_store   aligned to the vector
 *   vf_load_row         VF elements of a row of any dtype and alignment
 *   vf_set1, vf_add, vf_sub, vf_mul, vf_div, vf_min, vf_max
 *   vf_fma(a, b, c)     a * b + c;  vf_fnma: c - a * b
 *   vf_round            to the nearest integer
 *   vf_scale2(p, n)     p * 2^n for integral n in [-126, 127]
 *   vf_sum              sum of the lanes in a fixed order
 *   act_put(act, i, v, bf16)   store activations i..i+VF
 */
#include "policy/kvp.h"

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

KERNEL void rows_finish(float *scores, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm,
			const float *out, float bias)
{
	for (uint32_t r = 0; r < n; r++, c += width) {
		vf mean, scale, sum = vf_set1(0.0f);

		row_stats(c, width, &mean, &scale);
		for (uint32_t i = 0; i < width; i += VF)
			sum = vf_fma(vf_silu(normal_at(c, i, mean, scale, norm)), vf_load(out + i), sum);
		scores[r] = vf_sum(sum) + bias;
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
