/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Calibration of a policy's scores from traces (policy/calibrate.h): gather scores
 * and mean utilities of the calib split, fit, and verify on the valid split.
 */
#include "policy/calibrate.h"
#include "policy/train/run.h"

/*
 * Verification: keep the best 10, 20, 30 and 50 % of a unit's rows by score; per lane, the slope through the
 * origin of the attention that those rows received on the attention that the table predicted for them.
 */
struct fit_slopes {
	double *lane; /* [lanes], owned by whoever asked */
	double median;
	double within; /* share of lanes between 0.9 and 1.1 */
};

/* Scores of a unit's rows in all lanes. */
struct scored {
	uint32_t unit, n;
	uint32_t *row; /* [n] indices into the document's stored rows */
	float *score;  /* [lanes][n] */
};

struct split_scores {
	struct scored *unit;
	uint32_t n;
};
void scores_drop(struct split_scores *x);

/* Where scores come from: all units of a split, added to *ret. */
struct fit_source {
	int (*score)(struct run *r, const void *arg, uint32_t split, struct split_scores *ret);
	const void *arg;
};
int fit_from(struct run *r, const struct fit_source *from, float *table, struct fit_slopes *ret);

/* The shape of a table for all lanes of the set's model, and its bytes. */
struct calibrate_shape fit_shape(const struct set *s);
uint64_t fit_bytes(const struct set *s);

/* Fit the run's lanes from the backend's TRAIN_PARAMS; error in run->error. */
int fit_table(struct run *r, float *table, struct fit_slopes *ret);
/*
 * The same for a policy of the registry that scores whole prompts by itself, weights (if it needs any) from
 * o.base. The set must be loaded without a backend.
 */
int fit_policy(struct run *r, const char *policy, float *table, struct fit_slopes *ret);
/* As fit_table(), into an image's calibration section. */
int fit_image(struct run *r, uint8_t *image, struct fit_slopes *ret);
