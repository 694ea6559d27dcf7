/* SPDX-License-Identifier: MIT */
/*
 * The KVP network in AVX-512, twice: with bf16 dot products (activations are
 * rounded to bf16 before each linear, sums stay fp32) and in fp32 throughout.
 * Both hold 12 rows by 32 outputs in registers.
 */
#include "policy/kvp.h"

#include <immintrin.h>

#define vf __m512 /* the vocabulary of kvp_rows.h */
#define VF 16
#define vf_load _mm512_load_ps
#define vf_store _mm512_store_ps
#define vf_loadu _mm512_loadu_ps
#define vf_storeu _mm512_storeu_ps
#define vf_iota() _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#define vf_swap(x) _mm512_permute_ps((x), 0xb1)
#define vf_set1 _mm512_set1_ps
#define vf_add _mm512_add_ps
#define vf_sub _mm512_sub_ps
#define vf_mul _mm512_mul_ps
#define vf_div _mm512_div_ps
#define vf_min _mm512_min_ps
#define vf_max _mm512_max_ps
#define vf_fma _mm512_fmadd_ps
#define vf_fnma _mm512_fnmadd_ps
#define vf_round(x) _mm512_roundscale_ps((x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define vf_scale2 _mm512_scalef_ps
#define vf_sum _mm512_reduce_add_ps

#define ROWS 12
#define PANEL 32

static inline __m512 vf_split(__m512 x, __m512 *e)
{
	*e = _mm512_getexp_ps(x);
	return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
}

static inline __m512 widen_bf16(__m256i half)
{
	return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline __m512 vf_load_row(const char *row, uint32_t i, enum row_dtype dtype)
{
	switch (dtype) {
	case ROW_F32:
		return _mm512_loadu_ps(row + (size_t)i * 4);
	case ROW_F16:
		return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(row + (size_t)i * 2)));
	default:
		return widen_bf16(_mm256_loadu_si256((const __m256i *)(row + (size_t)i * 2)));
	}
}

static inline void act_put(void *act, size_t i, __m512 v, bool bf16)
{
	if (bf16)
		_mm256_storeu_si256((__m256i *)((uint16_t *)act + i), (__m256i)_mm512_cvtneps_pbh(v));
	else
		_mm512_storeu_ps((float *)act + i, v);
}

#include "policy/kvp_rows.h"

static bool has_fp32(void)
{
	return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
	       __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") &&
	       cpu_has_f16c(); /* all that this file is compiled for, but bf16 */
}

static bool has_bf16(void)
{
	return has_fp32() && __builtin_cpu_supports("avx512bf16");
}

/* `rows` rows by one panel; rows is a constant at every call, so the accumulators are registers. */
KERNEL void block_bf16(float *c, uint32_t out, const uint16_t *act, const uint16_t *w, uint32_t in,
		       const float *bias, const unsigned rows)
{
	__m512 sum[ROWS][2];

	UNROLL
	for (unsigned r = 0; r < rows; r++) {
		sum[r][0] = _mm512_load_ps(bias);
		sum[r][1] = _mm512_load_ps(bias + 16);
	}
	for (uint32_t i = 0; i < in; i += 2, act += 2, w += 2 * PANEL) {
		__m512bh w0 = (__m512bh)_mm512_load_si512(w), w1 = (__m512bh)_mm512_load_si512(w + 32);

		UNROLL
		for (unsigned r = 0; r < rows; r++) {
			__m512bh x = (__m512bh)_mm512_set1_epi32(*(const int *)(act + r * KVP_LD));

			sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, w0);
			sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, w1);
		}
	}
	UNROLL
	for (unsigned r = 0; r < rows; r++) {
		_mm512_store_ps(c + r * out, sum[r][0]);
		_mm512_store_ps(c + r * out + 16, sum[r][1]);
	}
}

/* The same in fp32: of each 32-bit word of weights the low half is input i's, the high half input i + 1's. */
KERNEL void block_fp32(float *c, uint32_t out, const float *act, const uint16_t *w, uint32_t in,
		       const float *bias, const unsigned rows)
{
	const __m512i high = _mm512_set1_epi32((int)0xffff0000);
	__m512 sum[ROWS][2];

	UNROLL
	for (unsigned r = 0; r < rows; r++) {
		sum[r][0] = _mm512_load_ps(bias);
		sum[r][1] = _mm512_load_ps(bias + 16);
	}
	for (uint32_t i = 0; i < in; i += 2, act += 2, w += 2 * PANEL) {
		__m512i p0 = _mm512_load_si512(w), p1 = _mm512_load_si512(w + 32);
		__m512 w0 = _mm512_castsi512_ps(_mm512_slli_epi32(p0, 16));
		__m512 w1 = _mm512_castsi512_ps(_mm512_slli_epi32(p1, 16));

		UNROLL
		for (unsigned r = 0; r < rows; r++) {
			__m512 x = _mm512_set1_ps(act[r * KVP_LD]);

			sum[r][0] = _mm512_fmadd_ps(x, w0, sum[r][0]);
			sum[r][1] = _mm512_fmadd_ps(x, w1, sum[r][1]);
		}
		w0 = _mm512_castsi512_ps(_mm512_and_si512(p0, high));
		w1 = _mm512_castsi512_ps(_mm512_and_si512(p1, high));
		UNROLL
		for (unsigned r = 0; r < rows; r++) {
			__m512 x = _mm512_set1_ps(act[r * KVP_LD + 1]);

			sum[r][0] = _mm512_fmadd_ps(x, w0, sum[r][0]);
			sum[r][1] = _mm512_fmadd_ps(x, w1, sum[r][1]);
		}
	}
	UNROLL
	for (unsigned r = 0; r < rows; r++) {
		_mm512_store_ps(c + r * out, sum[r][0]);
		_mm512_store_ps(c + r * out + 16, sum[r][1]);
	}
}

/* Whole blocks, then 4 and 1 rows at a time: each row's sums run in the same order whatever its block. */
#define LINEAR(act_type, block)                                                                                \
	for (uint32_t o = 0; o < out; o += PANEL) {                                                            \
		const uint16_t *w = d->w + (size_t)o * in;                                                     \
		const act_type *a = act;                                                                       \
		uint32_t r = 0;                                                                                \
                                                                                                               \
		for (; r + ROWS <= n; r += ROWS)                                                               \
			block(c + r * out + o, out, a + r * KVP_LD, w, in, d->bias + o, ROWS);                 \
		for (; r + 4 <= n; r += 4)                                                                     \
			block(c + r * out + o, out, a + r * KVP_LD, w, in, d->bias + o, 4);                    \
		for (; r < n; r++)                                                                             \
			block(c + r * out + o, out, a + r * KVP_LD, w, in, d->bias + o, 1);                    \
	}

static void linear_bf16(float *c, const void *act, uint32_t n, uint32_t in, uint32_t out,
			const struct kvp_dense *d)
{
	LINEAR(uint16_t, block_bf16)
}

static void linear_fp32(float *c, const void *act, uint32_t n, uint32_t in, uint32_t out,
			const struct kvp_dense *d)
{
	LINEAR(float, block_fp32)
}

static void norm_bf16(void *act, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm, bool silu)
{
	rows_norm(act, c, n, width, norm, silu, true);
}

static void norm_fp32(void *act, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm, bool silu)
{
	rows_norm(act, c, n, width, norm, silu, false);
}

static void finish(float *const *coef, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm,
		   const float *out, const float *bias, uint32_t rank)
{
	rows_finish(coef, c, n, width, norm, out, bias, rank);
}

static void combine(float *scores, const float *f0, const float *f1, uint32_t n, uint32_t distance,
		    float per_octave, const struct kvp_segment *seg)
{
	rows_combine(scores, f0, f1, n, distance, per_octave, seg);
}

/* bf16 rows are copied bit for bit: a conversion to fp32 and back would flush subnormals. */
static void load_bf16(void *act, const void *rows, size_t stride, enum row_dtype dtype, uint32_t n,
		      uint32_t dim)
{
	if (dtype == ROW_BF16)
		for (uint32_t r = 0; r < n; r++)
			memcpy((uint16_t *)act + (size_t)r * KVP_LD, (const char *)rows + r * stride, dim * 2);
	else
		rows_load(act, rows, stride, dtype, n, dim, true);
}

static void load_fp32(void *act, const void *rows, size_t stride, enum row_dtype dtype, uint32_t n,
		      uint32_t dim)
{
	rows_load(act, rows, stride, dtype, n, dim, false);
}

static void unrotate_bf16(void *act, const void *rows, size_t stride, enum row_dtype dtype, uint32_t n,
			  const struct kvp_rope *rope, const uint32_t *pos)
{
	rows_unrotate(act, rows, stride, dtype, n, rope, pos, true);
}

static void unrotate_fp32(void *act, const void *rows, size_t stride, enum row_dtype dtype, uint32_t n,
			  const struct kvp_rope *rope, const uint32_t *pos)
{
	rows_unrotate(act, rows, stride, dtype, n, rope, pos, false);
}

const struct kvp_isa kvp_avx512_bf16 = {
	.name = "avx512-bf16",
	.supported = has_bf16,
	.panel = PANEL,
	.act_bytes = 2,
	.load = load_bf16,
	.unrotate = unrotate_bf16,
	.linear = linear_bf16,
	.norm = norm_bf16,
	.finish = finish,
	.combine = combine,
};

const struct kvp_isa kvp_avx512_fp32 = {
	.name = "avx512-fp32",
	.supported = has_fp32,
	.panel = PANEL,
	.act_bytes = 4,
	.load = load_fp32,
	.unrotate = unrotate_fp32,
	.linear = linear_fp32,
	.norm = norm_fp32,
	.finish = finish,
	.combine = combine,
};
