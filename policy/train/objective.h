/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What a ranking costs, and how that cost is made smaller: one unit (n rows with
 * scores s and utilities u) at a time. Definitions: policy/train/backend.h. The
 * fp32 form of the exact objective is what trains; the fp64 forms are its measure
 * in tests and, for the sampled estimators, all there is. Pure but for the
 * scratch, which belongs to one thread.
 */
#include "policy/train/backend.h"
#include <stdbool.h>
#include <stddef.h>

struct kern;

struct objective_scratch {
	const struct kern *kern;
	uint32_t rows; /* most of a unit */
	uint32_t *key, *key2, *order2, *order;
	float *e, *g, *rank, *slope; /* [rows padded] */
	double *part;                /* [rows] */
	double *weight;              /* [rows] W(1) ... W(weight_n), of weight_kind */
	uint32_t weight_n, weight_kind;
	void *memory;
};

/* rows: most of a unit. -ENOMEM. */
int objective_scratch_new(struct objective_scratch **ret, uint32_t rows);
void objective_scratch_free(struct objective_scratch *x);

/* What every ranking of a unit is measured against. */
struct unit_cost {
	uint32_t n, weighting;
	double best;   /* C* */
	double random; /* C_rand */
	double total;  /* sum of u */
	bool counted;  /* false: teaches nothing */
};

/* Budget weighting of a (possibly expected) rank, and its derivative. */
double objective_weight(uint32_t weighting, double rank, uint32_t n);
double objective_weight_slope(uint32_t weighting, double rank, uint32_t n);

/* n >= 2. */
void objective_cost(struct unit_cost *ret, const float *u, uint32_t n, uint32_t weighting,
		    struct objective_scratch *x);

/* order[0 ... n) = rows by descending key; equal keys, and NaN as the lowest, by ascending row. */
void objective_order(uint32_t *order, const float *key, uint32_t n, struct objective_scratch *x);
/* Cost of a ranking; order[r] is the row of rank r + 1. */
double objective_ranked(const struct unit_cost *c, const float *u, const uint32_t *order,
			struct objective_scratch *x);
/* Regret and ratio of a cost. */
double objective_regret(const struct unit_cost *c, double cost);
double objective_ratio(const struct unit_cost *c, double cost);
/* What the exact and sampled objectives make small: the regret, or the ratio up to 200. */
double objective_loss(const struct unit_cost *c, uint32_t reward, double cost);

/*
 * Exact objective and its gradient by s. Zero, both, for a unit that is not counted. Scores further than 40
 * from the middle of their range count as there; the fp64 form has no such limit.
 */
double objective_exact(const struct unit_cost *c, uint32_t reward, const float *s, const float *u, float *grad,
		       struct objective_scratch *x);
/* -ENOMEM. */
int objective_exact_ref(double *loss, const struct unit_cost *c, uint32_t reward, const double *s,
			const double *u, double *grad);

/* Draw a ranking from Plackett-Luce by sorting s_i - log(-log noise_i). */
void objective_draw(uint32_t *order, const float *s, uint32_t n, uint64_t seed, uint64_t step, uint32_t lane,
		    uint32_t unit, uint32_t perm, struct objective_scratch *x);
/* log pi of a ranking; adds scale * d log pi / d s to grad (NULL: only the value). */
double objective_log_pi(const float *s, uint32_t n, const uint32_t *order, double scale, double *grad,
			struct objective_scratch *x);
/*
 * Rewards [units][perms] of a lane's counted units to advantages, in place: leave-one-out by `objective`
 * (TRAIN_RLOO, or TRAIN_RLOO_BATCH with perms 1), then, if asked, divided by their deviation and clipped.
 */
void objective_advantages(double *reward, uint32_t units, uint32_t perms, uint32_t objective, bool standardise);

/* Mean squared error to log(u / mean u + 1e-4), and its gradient. */
double objective_mse(const struct unit_cost *c, const float *s, const float *u, float *grad);
