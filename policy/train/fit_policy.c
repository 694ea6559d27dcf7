/* SPDX-License-Identifier: MIT */
/* Scores for calibration by the daemon's own policies, which see whole prompts. */
#include "policy/learned.h"
#include "policy/train/fit.h"
#include "shm/util.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define UNIT_ROWS 1024u /* most points of a unit and lane */

/* One document: its lanes' K and V, and scores of a whole prompt. */
struct desk {
	struct policy *policy;
	const struct policy_ops *ops;
	void *k, *v;
	float *score; /* [rows] */
};

static int open_policy(struct policy **ret, const struct run *r, const struct policy_ops *ops, char *err,
		       size_t errsize)
{
	const struct trace_header *t = &r->set->model;
	struct policy_cfg cfg = {
		.layers = t->layers,
		.heads = t->heads,
		.k_dim = t->k_dim,
		.v_dim = t->v_dim,
		.dtype = t->dtype,
		.seed = r->o.t.seed,
		.weights = r->o.base,
		.model = t->model,
	};

	if (ops->caps & POLICY_NEEDS_WEIGHTS && !cfg.weights) {
		snprintf(err, errsize, "%s: reads a weight file, name it with --base", ops->name);
		return -EINVAL;
	}
	return ops->init(ret, &cfg, err, errsize);
}

static int score_unit(struct run *r, struct desk *d, const struct trace *t, struct scored *u, uint32_t lane)
{
	const struct set_unit *unit = &r->set->unit[u->unit];
	const uint32_t *pos = r->set->doc[unit->doc].pos;
	size_t elem = dtype_bytes(t->h.dtype);
	struct policy_batch b = {.lane = lane,
				 .n = unit->prompt,
				 .k = d->k,
				 .v = d->v,
				 .k_stride = t->h.k_dim * elem,
				 .v_stride = t->h.v_dim * elem,
				 .total = unit->prompt,
				 .nonce = u->unit};
	int x = d->ops->score(d->policy, &b, d->score);

	for (uint32_t i = 0; x == 0 && i < u->n; i++)
		u->score[(size_t)lane * u->n + i] = d->score[pos[u->row[i]]];
	return x;
}

static int score_doc(struct run *r, struct desk *d, uint32_t doc, struct split_scores *in, uint32_t from)
{
	struct trace *t;
	int x = trace_open(&t, r->set->doc[doc].path, r->error, sizeof(r->error));

	if (x < 0)
		return x;
	if (t->h.dtype != r->set->model.dtype) {
		snprintf(r->error, sizeof(r->error), "%s: dtype %u, the policy was opened for %u", t->path,
			 t->h.dtype, r->set->model.dtype);
		trace_free(t);
		return -EINVAL;
	}
	d->k = malloc(trace_chunk_bytes(&t->h, TRACE_K, NULL));
	d->v = malloc(trace_chunk_bytes(&t->h, TRACE_V, NULL));
	d->score = malloc(t->h.rows * sizeof(*d->score));
	if (!d->k || !d->v || !d->score)
		x = -ENOMEM;
	for (uint32_t lane = 0; x == 0 && lane < r->set->o.lanes; lane++) {
		x = trace_read(t, TRACE_K, lane, 0, d->k, r->error, sizeof(r->error));
		if (x == 0)
			x = trace_read(t, TRACE_V, lane, 0, d->v, r->error, sizeof(r->error));
		for (uint32_t u = from; x == 0 && u < in->n; u++)
			x = score_unit(r, d, t, &in->unit[u], lane);
	}
	free(d->k);
	free(d->v);
	free(d->score);
	trace_free(t);
	return x;
}

/* Room for a unit's scores, of rows evenly spread. */
static int add_unit(struct run *r, uint32_t unit, struct split_scores *in)
{
	uint32_t rows = r->set->unit[unit].rows, n = MIN(rows, UNIT_ROWS);
	struct scored *more = realloc(in->unit, (in->n + 1) * sizeof(*more)), *u;

	if (!more)
		return -ENOMEM;
	in->unit = more;
	u = &more[in->n++];
	*u = (struct scored){.unit = unit, .n = n};
	u->row = malloc(n * sizeof(*u->row));
	u->score = malloc((size_t)r->set->o.lanes * n * sizeof(*u->score));
	if (!u->row || !u->score)
		return -ENOMEM;
	for (uint32_t i = 0; i < n; i++)
		u->row[i] = (uint32_t)((uint64_t)i * rows / n);
	return 0;
}

static int score_by_policy(struct run *r, const void *arg, uint32_t split, struct split_scores *ret)
{
	struct desk d = {.ops = arg};
	int x = open_policy(&d.policy, r, d.ops, r->error, sizeof(r->error));

	if (x < 0)
		return x;
	for (uint32_t doc = 0; x == 0 && doc < r->set->docs; doc++) {
		uint32_t from = ret->n;

		if (r->set->doc[doc].split != split)
			continue;
		for (uint32_t u = 0; x == 0 && u < r->set->units; u++)
			if (r->set->unit[u].doc == doc)
				x = add_unit(r, u, ret);
		if (x == 0)
			x = score_doc(r, &d, doc, ret, from);
	}
	d.ops->free(d.policy);
	return x;
}

int fit_policy(struct run *r, const char *name, float *table, struct fit_slopes *ret)
{
	const struct policy_ops *ops = policy_find(name);
	struct fit_source from = {.score = score_by_policy, .arg = ops};

	if (!ops || ops->id == POLICY_CLIENT) {
		snprintf(r->error, sizeof(r->error), "%s: no policy of this name scores by itself", name);
		return -EINVAL;
	}
	return fit_from(r, &from, table, ret);
}
