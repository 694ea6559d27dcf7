/* SPDX-License-Identifier: MIT */
/* Row arithmetic in plain C: what any CPU runs and what the vector kernels are compared with. */
#include <math.h>
#include <string.h>
#include "policy/cpu.h"
#include "policy/learned.h"
#include "policy/rows.h"
#include "shm/util.h"

static void load(float *x, const void *src, size_t stride, uint32_t dim, uint32_t n, enum row_dtype dtype)
{
	for (uint32_t i = 0; i < n; i++, x += dim) {
		const char *row = (const char *)src + i * stride;

		if (dtype == ROW_F32) {
			memcpy(x, row, dim * sizeof(float));
			continue;
		}
		for (uint32_t c = 0; c < dim; c++)
			x[c] = row_element(row, c, dtype);
	}
}

static void sumsq(const float *x, uint32_t dim, uint32_t n, float *out)
{
	for (uint32_t i = 0; i < n; i++, x += dim) {
		float s = 0;

		for (uint32_t c = 0; c < dim; c++)
			s += x[c] * x[c];
		out[i] = s;
	}
}

static void dot(const float *x, uint32_t dim, uint32_t n, const float *w, float *out)
{
	for (uint32_t i = 0; i < n; i++, x += dim) {
		float s = 0;

		for (uint32_t c = 0; c < dim; c++)
			s += x[c] * w[c];
		out[i] = s;
	}
}

static void range(const float *x, uint32_t dim, uint32_t n, float *out)
{
	for (uint32_t i = 0; i < n; i++, x += dim) {
		float lo = x[0], hi = x[0];

		for (uint32_t c = 1; c < dim; c++) {
			lo = MIN(lo, x[c]);
			hi = MAX(hi, x[c]);
		}
		out[i] = hi - lo;
	}
}

static void add(const float *x, uint32_t dim, uint32_t n, const float *scale, float *acc)
{
	for (uint32_t i = 0; i < n; i++, x += dim)
		for (uint32_t c = 0; c < dim; c++)
			acc[c] += scale[i] * x[c];
}

static void minmax(const float *x, uint32_t dim, uint32_t n, float *lo, float *hi)
{
	memcpy(lo, x, dim * sizeof(*lo));
	memcpy(hi, x, dim * sizeof(*hi));
	for (uint32_t i = 1; i < n; i++)
		for (uint32_t c = 0; c < dim; c++) {
			lo[c] = MIN(lo[c], x[i * dim + c]);
			hi[c] = MAX(hi[c], x[i * dim + c]);
		}
}

static void spread(float *x, uint32_t dim, uint32_t n, const float *lo, const float *inv, float *out)
{
	for (uint32_t i = 0; i < n; i++, x += dim) {
		float mean = 0, var = 0;

		for (uint32_t c = 0; c < dim; c++) {
			x[c] = (x[c] - lo[c]) * inv[c];
			mean += x[c];
		}
		mean /= (float)dim;
		for (uint32_t c = 0; c < dim; c++)
			var += (x[c] - mean) * (x[c] - mean);
		out[i] = sqrtf(var / (float)(dim - 1));
	}
}

static void project(const float *x, uint32_t dim, uint32_t n, const float *g, float *out)
{
	for (uint32_t i = 0; i < n; i++, x += dim) {
		float p[ROWS_PROJ] = {0}, s = 0;

		for (uint32_t c = 0; c < dim; c++)
			for (uint32_t j = 0; j < ROWS_PROJ; j++)
				p[j] += x[c] * g[c * ROWS_PROJ_PAD + j];
		for (uint32_t j = 0; j < ROWS_PROJ; j++)
			s += p[j] * p[j];
		out[i] = s;
	}
}

static void rank(const float *s, uint32_t n, float *out)
{
	for (uint32_t i = 0; i < n; i++) {
		uint32_t below = 0;

		for (uint32_t j = 0; j < n; j++)
			below += s[j] < s[i] || (s[j] == s[i] && j < i);
		out[i] = (float)below;
	}
}

const struct rows_kern rows_portable = {
	.isa = "ref",
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

const struct rows_kern *rows_kern(const char *isa)
{
	if (!isa)
		return cpu_has_avx2() ? &rows_avx2 : &rows_portable;
	if (strcmp(isa, "ref") == 0)
		return &rows_portable;
	if (strcmp(isa, "avx2") == 0 || strcmp(isa, "avx512") == 0)
		return cpu_has_avx2() ? &rows_avx2 : NULL;
	return NULL;
}
