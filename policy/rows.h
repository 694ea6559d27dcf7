/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Rows of K or V as floats, and the arithmetic that the heuristics share. A tile
 * is n packed rows of dim floats. The kernels differ by CPU in rounding only.
 * Pure; any thread. Internal to policy/.
 */
#include <stddef.h>
#include <stdint.h>
#include "policy/policy.h"

#define ROWS_TILE 32     /* rows loaded at once: 32 x 64 floats are a quarter of L1 */
#define ROWS_CHUNK 128   /* most rows that rank() takes */
#define ROWS_PROJ 20     /* columns of a random projection ... */
#define ROWS_PROJ_PAD 24 /* ... and their stride, the rest zero */

struct rows_kern {
	const char *isa; /* "ref" or "avx2" */
	/* Row i at src + i * stride, elements of `dtype` (not opaque), any alignment. */
	void (*load)(float *x, const void *src, size_t stride, uint32_t dim, uint32_t n, enum row_dtype dtype);
	/* out[i] = sum of squares; sum of x * w[dim]; largest less smallest element. */
	void (*sumsq)(const float *x, uint32_t dim, uint32_t n, float *out);
	void (*dot)(const float *x, uint32_t dim, uint32_t n, const float *w, float *out);
	void (*range)(const float *x, uint32_t dim, uint32_t n, float *out);
	/* acc[dim] += scale[i] * x[i]. */
	void (*add)(const float *x, uint32_t dim, uint32_t n, const float *scale, float *acc);
	/* Per column, over the tile. n >= 1. */
	void (*minmax)(const float *x, uint32_t dim, uint32_t n, float *lo, float *hi);
	/* out[i] = standard deviation (dim - 1 degrees) over the columns of (x - lo) * inv; dim >= 2.
	 * Overwrites x. */
	void (*spread)(float *x, uint32_t dim, uint32_t n, const float *lo, const float *inv, float *out);
	/* out[i] = |x_i G|^2, G [dim][ROWS_PROJ_PAD]. */
	void (*project)(const float *x, uint32_t dim, uint32_t n, const float *g, float *out);
	/* out[i] = how many s[j] are smaller, or equal with j < i. n <= ROWS_CHUNK, s not NaN. */
	void (*rank)(const float *s, uint32_t n, float *out);
};
extern const struct rows_kern rows_portable, rows_avx2;

/* Kernels for policy_cfg.isa: NULL best, "ref" portable, "avx2" and "avx512" the vector ones. NULL when there
 * are none. */
const struct rows_kern *rows_kern(const char *isa);
