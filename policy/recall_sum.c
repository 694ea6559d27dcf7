/* SPDX-License-Identifier: MIT */
/* Summaries of packed keys: what recall looks at before it looks at a key. */
#include <math.h>
#include <string.h>
#include "policy/recall_kern.h"
#include "shm/util.h"

size_t recall_sum_bytes(uint32_t rows, uint32_t dim)
{
	return ALIGN_UP(sizeof(struct recall_sum) +
				recall_groups(rows) * (2 * sizeof(float) + sizeof(uint32_t) + dim),
			8);
}

void recall_load(float *x, const void *src, size_t n, enum row_dtype dtype)
{
	rows_kern(NULL)->load(x, src, 0, (uint32_t)n, 1, dtype);
}

static bool finite_row(const float *x, uint32_t dim)
{
	float sum = 0;

	for (uint32_t d = 0; d < dim; d++)
		sum += fabsf(x[d]) * 0x1p-12f; /* rows whose sum alone overflows count as finite */
	return isfinite(sum);
}

/* Rows that are not finite count for nothing; x keeps the others, packed, and *ret_good has their bits. */
static uint32_t keep_finite(float *x, uint32_t n, uint32_t dim, uint32_t *ret_good)
{
	uint32_t kept = 0, good = 0;

	for (uint32_t i = 0; i < n; i++) {
		if (!finite_row(x + (size_t)i * dim, dim))
			continue;
		good |= 1u << i;
		if (kept != i)
			memcpy(x + (size_t)kept * dim, x + (size_t)i * dim, dim * sizeof(*x));
		kept++;
	}
	*ret_good = good;
	return kept;
}

static void summarise(const struct rows_kern *kern, const float *x, uint32_t n, uint32_t dim, float *step,
		      float *radius, int8_t *c)
{
	float sum[RECALL_MAX_DIM] = {0}, one[RECALL_GROUP], sq[RECALL_GROUP], top = 0, inv;
	double all = 0, with = 0, own = 0; /* sum of |k|^2; of k.c; |c|^2 */

	for (uint32_t i = 0; i < n; i++)
		one[i] = 1.0f / (float)n;
	if (n) {
		kern->add(x, dim, n, one, sum);
		kern->sumsq(x, dim, n, sq);
	}
	for (uint32_t d = 0; d < dim; d++)
		top = MAX(top, fabsf(sum[d]));
	*step = top / 127;
	inv = top > 0 ? 127 / top : 0;
	if (!isfinite(top) || !isfinite(inv))
		inv = *step = 0; /* too large or too small for a centre that means anything */
	for (uint32_t i = 0; i < n; i++)
		all += sq[i];
	for (uint32_t d = 0; d < dim; d++) {
		double v;

		c[d] = (int8_t)lrintf(inv > 0 ? sum[d] * inv : 0);
		v = (double)c[d] * *step;
		with += v * sum[d];
		own += v * v;
	}
	all = n ? all / n - 2 * (*step > 0 ? with : 0) + own : 0;
	*radius = (float)sqrt(MIN(MAX(all, 0), 1e36));
}

void recall_summarise(const void *k, uint32_t rows, uint32_t dim, enum row_dtype dtype, struct recall_sum *ret)
{
	const struct rows_kern *kern = rows_kern(NULL);
	uint32_t groups = recall_groups(rows);
	size_t width = (size_t)dim * (dtype == ROW_F32 ? 4 : 2);
	uint32_t *good = (uint32_t *)(ret->v + 2 * (size_t)groups);
	int8_t *c = (int8_t *)(good + groups);
	float x[RECALL_GROUP * RECALL_MAX_DIM];

	ret->groups = (uint16_t)groups;
	ret->dim = (uint16_t)dim;
	for (uint32_t g = 0; g < groups; g++) {
		uint32_t n = MIN(RECALL_GROUP, rows - g * RECALL_GROUP);

		kern->load(x, (const char *)k + g * RECALL_GROUP * width, width, dim, n, dtype);
		n = keep_finite(x, n, dim, &good[g]);
		summarise(kern, x, n, dim, &ret->v[g], &ret->v[groups + g], c + (size_t)g * dim);
	}
}
