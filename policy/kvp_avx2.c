/* SPDX-License-Identifier: MIT */
/* The KVP network in AVX2 and FMA, fp32: 6 rows by 16 outputs in registers. */
#include "policy/kvp.h"

#include <immintrin.h>

#define vf __m256 /* the vocabulary of kvp_rows.h */
#define VF 8
#define vf_load _mm256_load_ps
#define vf_store _mm256_store_ps
#define vf_loadu _mm256_loadu_ps
#define vf_storeu _mm256_storeu_ps
#define vf_iota() _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)
#define vf_swap(x) _mm256_permute_ps((x), 0xb1)
#define vf_set1 _mm256_set1_ps
#define vf_add _mm256_add_ps
#define vf_sub _mm256_sub_ps
#define vf_mul _mm256_mul_ps
#define vf_div _mm256_div_ps
#define vf_min _mm256_min_ps
#define vf_max _mm256_max_ps
#define vf_fma _mm256_fmadd_ps
#define vf_fnma _mm256_fnmadd_ps
#define vf_round(x) _mm256_round_ps((x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

#define ROWS 6
#define PANEL 16

static inline __m256 vf_scale2(__m256 p, __m256 n)
{
	__m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);

	return _mm256_mul_ps(p, _mm256_castsi256_ps(bits));
}

static inline __m256 vf_split(__m256 x, __m256 *e)
{
	__m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(127);

	*e = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), one));
	bits = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff));
	return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_slli_epi32(one, 23)));
}

static inline float vf_sum(__m256 v)
{
	__m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

	s = _mm_add_ps(s, _mm_movehl_ps(s, s));
	return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline __m256 vf_load_row(const char *row, uint32_t i, enum row_dtype dtype)
{
	__m128i half;

	if (dtype == ROW_F32)
		return _mm256_loadu_ps((const float *)(row + (size_t)i * 4));
	half = _mm_loadu_si128((const __m128i *)(row + (size_t)i * 2));
	if (dtype == ROW_F16)
		return _mm256_cvtph_ps(half);
	return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static inline void act_put(void *act, size_t i, __m256 v, bool bf16)
{
	_mm256_storeu_ps((float *)act + i, v); /* fp32 only here */
}

#include "policy/kvp_rows.h"

static bool has_avx2(void)
{
	return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c();
}

/*
 * `rows` rows by one panel; rows is a constant at every call, so the
 * accumulators are registers. Of each 32-bit word of weights the low half is
 * input i's, the high half input i + 1's.
 */
KERNEL void block(float *c, uint32_t out, const float *act, const uint16_t *w, uint32_t in, const float *bias,
		  const unsigned rows)
{
	static const uint32_t _Alignas(32) high_half[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
							   0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
	const __m256i *high = (const __m256i *)high_half;
	__m256 sum[ROWS][2];

	UNROLL
	for (unsigned r = 0; r < rows; r++) {
		sum[r][0] = _mm256_load_ps(bias);
		sum[r][1] = _mm256_load_ps(bias + 8);
	}
	for (uint32_t i = 0; i < in; i += 2, act += 2, w += 2 * PANEL) {
		const __m256i *pair = (const __m256i *)w;
		__m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_load_si256(pair), 16));
		__m256 w1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_load_si256(pair + 1), 16));

		UNROLL
		for (unsigned r = 0; r < rows; r++) {
			__m256 x = _mm256_broadcast_ss(act + r * KVP_LD);

			sum[r][0] = _mm256_fmadd_ps(x, w0, sum[r][0]);
			sum[r][1] = _mm256_fmadd_ps(x, w1, sum[r][1]);
		}
		__asm__("" : "+r"(high)); /* 15 registers are taken: keep the mask in memory */
		w0 = _mm256_castsi256_ps(_mm256_and_si256(_mm256_load_si256(pair), *high));
		w1 = _mm256_castsi256_ps(_mm256_and_si256(_mm256_load_si256(pair + 1), *high));
		UNROLL
		for (unsigned r = 0; r < rows; r++) {
			__m256 x = _mm256_broadcast_ss(act + r * KVP_LD + 1);

			sum[r][0] = _mm256_fmadd_ps(x, w0, sum[r][0]);
			sum[r][1] = _mm256_fmadd_ps(x, w1, sum[r][1]);
		}
	}
	UNROLL
	for (unsigned r = 0; r < rows; r++) {
		_mm256_store_ps(c + r * out, sum[r][0]);
		_mm256_store_ps(c + r * out + 8, sum[r][1]);
	}
}

/* Whole blocks, then 3 and 1 rows at a time: each row's sums run in the same order whatever its block. */
static void linear(float *c, const void *act, uint32_t n, uint32_t in, uint32_t out, const struct kvp_dense *d)
{
	for (uint32_t o = 0; o < out; o += PANEL) {
		const uint16_t *w = d->w + (size_t)o * in;
		const float *a = act;
		uint32_t r = 0;

		for (; r + ROWS <= n; r += ROWS)
			block(c + r * out + o, out, a + r * KVP_LD, w, in, d->bias + o, ROWS);
		for (; r + 3 <= n; r += 3)
			block(c + r * out + o, out, a + r * KVP_LD, w, in, d->bias + o, 3);
		for (; r < n; r++)
			block(c + r * out + o, out, a + r * KVP_LD, w, in, d->bias + o, 1);
	}
}

static void load(void *act, const void *rows, size_t stride, enum row_dtype dtype, uint32_t n, uint32_t dim)
{
	rows_load(act, rows, stride, dtype, n, dim, false);
}

static void unrotate(void *act, const void *rows, size_t stride, enum row_dtype dtype, uint32_t n,
		     const struct kvp_rope *rope, const uint32_t *pos)
{
	rows_unrotate(act, rows, stride, dtype, n, rope, pos, false);
}

static void norm(void *act, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm_, bool silu)
{
	rows_norm(act, c, n, width, norm_, silu, false);
}

static void finish(float *const *coef, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm_,
		   const float *out, const float *bias, uint32_t rank)
{
	rows_finish(coef, c, n, width, norm_, out, bias, rank);
}

static void combine(float *scores, const float *f0, const float *f1, uint32_t n, uint32_t distance,
		    float per_octave, const struct kvp_segment *seg)
{
	rows_combine(scores, f0, f1, n, distance, per_octave, seg);
}

const struct kvp_isa kvp_avx2 = {
	.name = "avx2",
	.supported = has_avx2,
	.panel = PANEL,
	.act_bytes = 4,
	.load = load,
	.unrotate = unrotate,
	.linear = linear,
	.norm = norm,
	.finish = finish,
	.combine = combine,
};
