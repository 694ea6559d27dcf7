/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Paired bootstrap over clusters (source documents): one draw of weights serves
 * every column, so that differences between columns are paired. Internal to policy/eval.
 */
#include <stdint.h>

struct boot {
	uint32_t resamples, clusters;
	float *weight; /* [resamples][clusters]: how often a cluster was drawn; a row adds up to `clusters` */
};

/* -ENOMEM. Deterministic by seed. */
int boot_init(struct boot *b, uint32_t resamples, uint32_t clusters, uint64_t seed);
void boot_done(struct boot *b);
/*
 * Means of x [clusters][columns] over the clusters: point[columns] and, for every resample,
 * mean [resamples][columns]. NaN entries are left out; NaN where nothing is left. -ENOMEM.
 */
int boot_means(const struct boot *b, const float *x, uint32_t columns, float *point, float *mean);

struct interval {
	float mean, lo, hi; /* point estimate and 95 % percentile interval */
};
/* Of `point` and n resampled values, which are reordered. NaN values are left out. */
struct interval boot_interval(float point, float *value, uint32_t n);
/* Two-sided p-value of a resampled difference against 0: twice the smaller tail, (tail + 1) / (n + 1). */
double boot_p(const float *value, uint32_t n);
/* Holm's step-down correction of n <= 32 p-values, in place. */
void boot_holm(double *p, uint32_t n);
