/* SPDX-License-Identifier: MIT */
#pragma once
/* Which policy ranks, its weights, and scoring. Part of internal.h. */
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>
#include "daemon/plan.h"
#include "policy/calibrate.h"
#include "policy/policy.h"
#include "shm/seg.h"

/* ---- policies.c ------------------------------------------------------------------------ */
struct policy_use {
	LIST_ENTRY(policy_use) link;
	struct model *model;
	const struct policy_ops *ops; /* what runs */
	struct policy *policy;        /* NULL: client */
	char asked[32], weights[CONFIG_PATH], reason[440];
	uint32_t coefs;                        /* that the index keeps of a row; 0: its score */
	const struct calibration *calibration; /* what scores are worth: the policy's or `own`; NULL: unknown */
	struct calibration own;
	struct scorer { /* its network as clients run it; id 0: not made, or refused for a reason */
		uint64_t id;
		uint32_t coefs;
		bool making;
		struct seg seg;
		char refusal[WIRE_TEXT];
	} scorer;
	uint32_t refs;
	bool stale;     /* newer weights exist */
	bool no_scores; /* the layouts have no score plane */
	bool no_rows;   /* the daemon cannot read K and V */
};
/* What runs for this sequence; a reference. NULL: out of memory. */
struct policy_use *policies_get(struct seq *s);
/* What runs for a model where everything can be read; asked "": the default. A reference, or NULL. */
struct policy_use *policies_of(struct core *c, struct model *m, const char *asked);
struct policy_use *policies_ref(struct policy_use *u);
void policies_put(struct core *c, struct policy_use *u); /* NULL is fine */
void policies_drop(struct core *c, const char *model);   /* make them stale; NULL: all */
void policies_forget_model(struct core *c, const struct model *m);
void policies_free(struct core *c);

/* ---- scorer.c ---------------------------------------------------------------------------- */
/* W_SCORER. 0, or KVT_AGAIN: the network is being made. */
int request_scorer(struct client *cl, const struct wire_scorer *m);
/* What this client was given under this id, or NULL. */
struct policy_use *scorer_find(struct client *cl, uint64_t id);
/* The client ends. */
void scorer_forget(struct client *cl);

/* ---- score.c ------------------------------------------------------------------------------ */
/*
 * Score [from, watermark) of lanes [lo, hi) (and device rows below when CONTEXT) into the index, and the plan's
 * keys from coefficients. Any thread.
 */
/* A lane as policies and their calibrations count them. */
static inline uint32_t policy_lane(const struct model *m, uint32_t lane)
{
	return (uint32_t)m->lane_layer[lane] * m->heads + m->lane_head[lane];
}
/* Its scores lie in planes of the region: nothing is computed. */
static inline bool score_given(const struct plan *p)
{
	return p->use->ops->id == POLICY_CLIENT || (p->seq->scorer && p->use == p->seq->scorer);
}
int score_lanes(struct plan *p, uint32_t lo, uint32_t hi, struct worker_ctx *w);
/*
 * Keys of rows [0, rows) of a lane whose index holds coefficients of `use`, as the sequence has `total` rows.
 * keys may be the index's own. Any thread.
 */
void score_combine(const struct seq *s, const struct policy_use *use, uint32_t lane, uint32_t rows,
		   uint32_t total, uint16_t *keys);
