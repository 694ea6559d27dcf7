/* SPDX-License-Identifier: MIT */
/* Recall arithmetic in plain C, the choice of kernels, and the selection of the largest scores. */
#include <math.h>
#include <string.h>
#include "policy/cpu.h"
#include "policy/learned.h"
#include "policy/recall_kern.h"
#include "shm/util.h"

static void widen(float *x, const void *src, size_t n, enum row_dtype dtype)
{
	for (size_t i = 0; i < n; i++)
		x[i] = row_element(src, i, dtype);
}

static void centre(float *x, const int8_t *c, uint32_t n, float step)
{
	for (uint32_t i = 0; i < n; i++)
		x[i] = (float)c[i] * step;
}

static void logits(const float *x, uint32_t dim, uint32_t n, const float *qt, float *out)
{
	for (uint32_t i = 0; i < n; i++, x += dim, out += RECALL_LANES) {
		float acc[RECALL_LANES] = {0};

		for (uint32_t d = 0; d < dim; d++)
			for (uint32_t j = 0; j < RECALL_LANES; j++)
				acc[j] += x[d] * qt[d * RECALL_LANES + j];
		for (uint32_t j = 0; j < RECALL_LANES; j++)
			out[j] = isfinite(acc[j]) ? acc[j] : -INFINITY;
	}
}

static void max(const float *l, uint32_t n, float *m)
{
	for (uint32_t i = 0; i < n; i++, l += RECALL_LANES)
		for (uint32_t j = 0; j < RECALL_LANES; j++)
			m[j] = MAX(m[j], l[j]);
}

static void sumexp(const float *l, uint32_t n, const float *m, float *sum)
{
	for (uint32_t i = 0; i < n; i++, l += RECALL_LANES)
		for (uint32_t j = 0; j < RECALL_LANES; j++)
			sum[j] += expf(l[j] - m[j]);
}

static void best(const float *l, uint32_t n, const float *base, float *score)
{
	for (uint32_t i = 0; i < n; i++, l += RECALL_LANES)
		for (uint32_t j = 0; j < RECALL_LANES; j++)
			score[i] = MAX(score[i], l[j] - base[j]);
}

const struct recall_kern recall_ref = {.isa = "ref",
				       .widen = widen,
				       .centre = centre,
				       .logits = logits,
				       .max = max,
				       .sumexp = sumexp,
				       .best = best};

static bool cpu_has_avx512(void)
{
#if defined(__x86_64__)
	__builtin_cpu_init();
	return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
	return false;
#endif
}

const struct recall_kern *recall_kern(const char *isa)
{
#if defined(__x86_64__)
	if (cpu_has_avx512() && (!isa || strcmp(isa, "avx512") == 0))
		return &recall_avx512;
	if (cpu_has_avx2() && (!isa || strcmp(isa, "avx2") == 0))
		return &recall_avx2;
#endif
	return !isa || strcmp(isa, "ref") == 0 ? &recall_ref : NULL;
}

/* Floats as integers of the same order; -inf is the least that is no NaN. */
static uint32_t ordered(float f)
{
	uint32_t u;

	memcpy(&u, &f, sizeof(u));
	return u & 0x80000000u ? ~u : u | 0x80000000u;
}

#define NEVER 0x007fffffu /* ordered(-INFINITY) */

uint32_t recall_top(const float *s, uint32_t n, uint32_t k, uint32_t *idx)
{
	uint32_t edge = 0, mask = 0, left = k, out = 0;

	/* The k-th largest, a byte at a time: what equals it is taken from the front until k is full. */
	for (int shift = 24; shift >= 0 && k; shift -= 8) {
		uint32_t count[256] = {0}, b = 255;

		for (uint32_t i = 0; i < n; i++) {
			uint32_t u = ordered(s[i]);

			if ((u & mask) == edge)
				count[u >> shift & 255]++;
		}
		for (; b && count[b] < left; b--)
			left -= count[b];
		edge |= b << shift;
		mask |= 255u << shift;
	}
	for (uint32_t i = 0; i < n && out < k; i++) {
		uint32_t u = ordered(s[i]);

		if (u <= NEVER || u < edge || (u == edge && !left))
			continue;
		left -= u == edge;
		idx[out++] = i;
	}
	return out;
}
