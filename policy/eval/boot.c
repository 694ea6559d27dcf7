/* SPDX-License-Identifier: MIT */
/* Bootstrap as matrix products: resampled means of all columns are weights times values. */
#include <cblas.h>
#include <errno.h>
#include <math.h>
#include <string.h>
#include "policy/eval/boot.h"
#include "policy/train/noise.h"
#include "shm/util.h"

int boot_init(struct boot *b, uint32_t resamples, uint32_t clusters, uint64_t seed)
{
	*b = (struct boot){.resamples = resamples, .clusters = clusters};
	b->weight = calloc((size_t)resamples * clusters, sizeof(*b->weight));
	if (!b->weight)
		return -ENOMEM;
	for (uint32_t r = 0; r < resamples; r++)
		for (uint32_t i = 0; i < clusters; i++) {
			uint64_t draw = train_hash(seed, r, 0, 0, 0, i) >> 32;

			b->weight[(size_t)r * clusters + (draw * clusters >> 32)]++;
		}
	return 0;
}

void boot_done(struct boot *b)
{
	free(b->weight);
	*b = (struct boot){0};
}

/* [resamples][columns] = weights [resamples][clusters] times x [clusters][columns]. */
static void times(const struct boot *b, const float *x, uint32_t columns, float *out)
{
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)b->resamples, (int)columns,
		    (int)b->clusters, 1, b->weight, (int)b->clusters, x, (int)columns, 0, out, (int)columns);
}

int boot_means(const struct boot *b, const float *x, uint32_t columns, float *point, float *mean)
{
	size_t n = (size_t)b->clusters * columns, out = (size_t)b->resamples * columns;
	_cleanup_free_ float *value = calloc(n, sizeof(*value)), *there = calloc(n, sizeof(*there));
	_cleanup_free_ float *count = malloc(out * sizeof(*count));

	if (!value || !there || !count)
		return -ENOMEM;
	for (size_t i = 0; i < n; i++) {
		there[i] = isnan(x[i]) ? 0 : 1;
		value[i] = isnan(x[i]) ? 0 : x[i];
	}
	for (uint32_t c = 0; c < columns; c++) {
		double sum = 0, present = 0;

		for (uint32_t d = 0; d < b->clusters; d++) {
			sum += value[(size_t)d * columns + c];
			present += there[(size_t)d * columns + c];
		}
		point[c] = present > 0 ? (float)(sum / present) : NAN;
	}
	times(b, value, columns, mean);
	times(b, there, columns, count);
	for (size_t i = 0; i < out; i++)
		mean[i] = count[i] > 0 ? mean[i] / count[i] : NAN;
	return 0;
}

/* The k-th smallest (Hoare's selection); smaller ones end up before it. */
static float nth(float *v, uint32_t n, uint32_t k)
{
	uint32_t lo = 0, hi = n - 1;

	while (lo < hi) {
		float pivot = v[lo + (hi - lo) / 2];
		int64_t i = lo, j = hi;

		while (i <= j) {
			while (v[i] < pivot)
				i++;
			while (v[j] > pivot)
				j--;
			if (i <= j) {
				float keep = v[i];

				v[i++] = v[j];
				v[j--] = keep;
			}
		}
		if (k <= j)
			hi = (uint32_t)j;
		else if (k >= i)
			lo = (uint32_t)i;
		else
			break;
	}
	return v[k];
}

struct interval boot_interval(float point, float *value, uint32_t n)
{
	uint32_t m = 0;

	for (uint32_t i = 0; i < n; i++)
		if (!isnan(value[i]))
			value[m++] = value[i];
	if (isnan(point) || m == 0)
		return (struct interval){point, NAN, NAN};
	return (struct interval){point, nth(value, m, (uint32_t)(0.025 * (m - 1))),
				 nth(value, m, (uint32_t)ceil(0.975 * (m - 1)))};
}

double boot_p(const float *value, uint32_t n)
{
	uint32_t below = 0, above = 0;

	for (uint32_t i = 0; i < n; i++) {
		below += value[i] <= 0;
		above += value[i] >= 0;
	}
	return MIN(1.0, 2 * (MIN(below, above) + 1.0) / (n + 1.0));
}

void boot_holm(double *p, uint32_t n)
{
	uint32_t done = 0;
	double floor = 0;

	for (uint32_t step = 0; step < n; step++) {
		uint32_t least = UINT32_MAX;

		for (uint32_t i = 0; i < n; i++)
			if (!(done >> i & 1) && (least == UINT32_MAX || p[i] < p[least]))
				least = i;
		done |= 1u << least;
		floor = MAX(floor, MIN(1.0, p[least] * (n - step)));
		p[least] = floor;
	}
}
