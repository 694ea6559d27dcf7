/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * One lane's batch on the CPU: gather rows, run the network, apply the
 * objective, go back. What belongs to a thread is in struct lane_work.
 */
#include "policy/train/net.h"
#include "policy/train/objective.h"

/* The whole set as the CPU backend keeps it. K and V lie lane after lane, a lane's documents one after the
 * other. */
struct lane_set {
	struct train_set_shape shape; /* arrays are the caller's */
	uint64_t *doc_at;             /* [docs + 1] rows of the documents before */
	uint64_t *unit_at;            /* [units + 1] utilities of the units before */
	uint16_t *k, *v;
	float *u;
};

struct lane_work {
	const struct train_opts *o;
	const struct net *net;
	struct net_work *act;
	struct objective_scratch *obj;
	struct unit_cost *cost; /* [batch] */
	uint32_t *pos, *order;  /* [rows] */
	float *u;               /* [rows] */
	float *score;           /* [batch][rows] */
	float *ds;              /* [rows] */
	double *dlog;           /* [rows] */
	double *reward;         /* [batch][perms] */
	float *grad;            /* [params] */
};

int lane_work_new(struct lane_work **ret, const struct train_opts *o, const struct net *n); /* -ENOMEM */
void lane_work_free(struct lane_work *w);

/* Mean loss over the counted units and its gradient into w->grad. */
double lane_gradient(struct lane_work *w, const struct lane_set *set, uint32_t lane, const float *params,
		     const struct train_batch *t);
/* As train_backend_ops.evaluate, for one lane. */
void lane_evaluate(struct lane_work *w, const struct lane_set *set, uint32_t lane, const float *params,
		   const struct train_batch *t, struct train_score *out);
/* Scores [units][opts.rows]; places past a unit's rows are zero. */
void lane_scores(struct lane_work *w, const struct lane_set *set, uint32_t lane, const float *params,
		 const struct train_batch *t, float *out);
