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

static void pair(float *x, size_t n, size_t step)
{
	for (size_t i = 0; i < n; i++)
		x[i] = MAX(x[i], x[i + step]);
}

static uint32_t above(const float *s, uint32_t n, float edge)
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < n; i++)
		count += s[i] > edge;
	return count;
}

const struct recall_kern recall_ref = {.isa = "ref",
				       .widen = widen,
				       .centre = centre,
				       .logits = logits,
				       .max = max,
				       .sumexp = sumexp,
				       .best = best,
				       .pair = pair,
				       .above = above};

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

/* Floats as integers of the same order, and back. */
static uint32_t ordered(float f)
{
	uint32_t u;

	memcpy(&u, &f, sizeof(u));
	return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static float unordered(uint32_t u)
{
	float f;

	u = u & 0x80000000u ? u & 0x7fffffffu : ~u;
	memcpy(&f, &u, sizeof(f));
	return f;
}

uint32_t recall_top(const struct recall_kern *kern, const float *s, uint32_t n, uint32_t k, uint32_t *idx)
{
	uint32_t lo = ordered(-INFINITY), hi = ordered(INFINITY), out = 0, left = 0;
	float edge = -INFINITY;

	if (kern->above(s, n, edge) > k) {
		uint32_t more = 0; /* above hi, fewer than k; above lo are at least k */

		while (hi - lo > 1) {
			uint32_t mid = lo + (hi - lo) / 2, count = kern->above(s, n, unordered(mid));

			if (count < k) {
				hi = mid;
				more = count;
			} else {
				lo = mid;
				if (count == k)
					break;
			}
		}
		edge = unordered(hi - lo > 1 ? lo : hi);
		left = hi - lo > 1 ? 0 : k - more;
	}
	for (uint32_t i = 0; i < n && out < k; i++) {
		if (!(s[i] >= edge) || (s[i] == edge && !left))
			continue;
		left -= s[i] == edge;
		idx[out++] = i;
	}
	return out;
}
