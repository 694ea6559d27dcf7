/* SPDX-License-Identifier: MIT */
#include "policy/train/lane.h"
#include "policy/rows.h"
#include "shm/util.h"

#include <string.h>

void lane_work_free(struct lane_work *w)
{
	if (!w)
		return;
	net_work_free(w->act);
	objective_scratch_free(w->obj);
	free(w->cost);
	free(w->pos);
	free(w->order);
	free(w->u);
	free(w->score);
	free(w->ds);
	free(w->dlog);
	free(w->reward);
	free(w->grad);
	free(w);
}

int lane_work_new(struct lane_work **ret, const struct train_opts *o, const struct net *n)
{
	struct lane_work *w = calloc(1, sizeof(*w));
	size_t rows = o->rows, batch = o->batch;

	if (!w)
		return -ENOMEM;
	w->o = o;
	w->net = n;
	w->cost = calloc(batch, sizeof(*w->cost));
	w->pos = calloc(rows, sizeof(*w->pos));
	w->order = calloc(rows, sizeof(*w->order));
	w->u = calloc(rows, sizeof(*w->u));
	w->score = calloc(batch * rows, sizeof(*w->score));
	w->ds = calloc(rows, sizeof(*w->ds));
	w->dlog = calloc(rows, sizeof(*w->dlog));
	w->reward = calloc(batch * MAX(o->perms, 1), sizeof(*w->reward));
	w->grad = calloc(n->params, sizeof(*w->grad));
	if (!w->cost || !w->pos || !w->order || !w->u || !w->score || !w->ds || !w->dlog || !w->reward ||
	    !w->grad || net_work_new(&w->act, n, o->rows) < 0 || objective_scratch_new(&w->obj, o->rows) < 0) {
		lane_work_free(w);
		return -ENOMEM;
	}
	*ret = w;
	return 0;
}

static void gather_utilities(struct lane_work *w, const struct lane_set *set, uint32_t lane,
			     const struct train_batch *t, uint32_t slot)
{
	const uint32_t *row = t->row + (size_t)slot * w->o->rows, unit = t->unit[slot];
	const float *u = set->u + lane * set->unit_at[set->shape.units] + set->unit_at[unit];

	for (uint32_t i = 0; i < t->n[slot]; i++)
		w->u[i] = u[row[i]];
}

static void forward(struct lane_work *w, const struct lane_set *set, uint32_t lane, const float *params,
		    const struct train_batch *t, uint32_t slot, float *scores)
{
	const struct rows_kern *rk = rows_kern(NULL);
	const struct weights_header *h = &w->net->h;
	const uint32_t *row = t->row + (size_t)slot * w->o->rows, unit = t->unit[slot];
	uint32_t doc = set->shape.unit_doc[unit];
	uint64_t base = lane * set->doc_at[set->shape.docs] + set->doc_at[doc];

	for (uint32_t i = 0; i < t->n[slot]; i++) {
		w->pos[i] = set->shape.doc_pos[doc][row[i]];
		if (h->kind != WEIGHTS_KVP)
			continue;
		rk->load(w->act->k + (size_t)i * h->k_dim, set->k + (base + row[i]) * h->k_dim, h->k_dim * 2,
			 h->k_dim, 1, ROW_F16);
		rk->load(w->act->v + (size_t)i * h->v_dim, set->v + (base + row[i]) * h->v_dim, h->v_dim * 2,
			 h->v_dim, 1, ROW_F16);
	}
	net_forward(w->net, w->act, params, t->n[slot], w->pos, set->shape.unit_prompt[unit], scores);
}

/* Objectives that look at one unit at a time. */
static double plain(struct lane_work *w, const struct lane_set *set, uint32_t lane, const float *params,
		    const struct train_batch *t)
{
	double loss = 0;

	for (uint32_t s = 0; s < t->units; s++) {
		const struct unit_cost *c = &w->cost[s];

		if (!c->counted)
			continue;
		gather_utilities(w, set, lane, t, s);
		forward(w, set, lane, params, t, s, w->score);
		if (w->o->objective == TRAIN_MSE)
			loss += objective_mse(c, w->score, w->u, w->ds);
		else
			loss += objective_exact(c, w->o->reward, w->score, w->u, w->ds, w->obj);
		net_backward(w->net, w->act, params, w->ds, w->grad);
	}
	return loss;
}

/*
 * The sampled ones compare units, so that all rewards are there before the first gradient: the network runs
 * forward twice. Rankings are drawn again in the second round; the noise is a function of its place.
 */
static double sampled(struct lane_work *w, const struct lane_set *set, uint32_t lane, const float *params,
		      const struct train_batch *t)
{
	const struct train_opts *o = w->o;
	uint32_t perms = o->objective == TRAIN_RLOO ? o->perms : 1, counted = 0;
	double loss = 0, *a = w->reward;

	for (uint32_t s = 0; s < t->units; s++) {
		float *score = w->score + (size_t)s * o->rows;

		if (!w->cost[s].counted)
			continue;
		gather_utilities(w, set, lane, t, s);
		forward(w, set, lane, params, t, s, score);
		for (uint32_t p = 0; p < perms; p++) {
			objective_draw(w->order, score, t->n[s], o->seed, t->step, lane, s, p, w->obj);
			*a++ = -objective_loss(&w->cost[s], o->reward,
					       objective_ranked(&w->cost[s], w->u, w->order, w->obj));
		}
		counted++;
	}
	objective_advantages(w->reward, counted, perms, o->objective, true);
	a = w->reward;
	for (uint32_t s = 0; s < t->units; s++) {
		float *score = w->score + (size_t)s * o->rows;
		uint32_t n = t->n[s];

		if (!w->cost[s].counted)
			continue;
		memset(w->dlog, 0, n * sizeof(*w->dlog));
		for (uint32_t p = 0; p < perms; p++, a++) {
			double scale = -*a / ((double)n * perms);

			objective_draw(w->order, score, n, o->seed, t->step, lane, s, p, w->obj);
			loss += scale * objective_log_pi(score, n, w->order, scale, w->dlog, w->obj);
		}
		for (uint32_t i = 0; i < n; i++)
			w->ds[i] = (float)w->dlog[i];
		forward(w, set, lane, params, t, s, score);
		net_backward(w->net, w->act, params, w->ds, w->grad);
	}
	return loss;
}

static uint32_t measure(struct lane_work *w, const struct lane_set *set, uint32_t lane,
			const struct train_batch *t)
{
	uint32_t counted = 0;

	for (uint32_t s = 0; s < t->units; s++) {
		gather_utilities(w, set, lane, t, s);
		objective_cost(&w->cost[s], w->u, t->n[s], w->o->weighting, w->obj);
		counted += w->cost[s].counted;
	}
	return counted;
}

double lane_gradient(struct lane_work *w, const struct lane_set *set, uint32_t lane, const float *params,
		     const struct train_batch *t)
{
	bool one_by_one = w->o->objective == TRAIN_EXACT || w->o->objective == TRAIN_MSE;
	uint32_t counted = measure(w, set, lane, t);
	double loss;

	memset(w->grad, 0, w->net->params * sizeof(*w->grad));
	if (!counted)
		return 0;
	loss = one_by_one ? plain(w, set, lane, params, t) : sampled(w, set, lane, params, t);
	for (size_t i = 0; i < w->net->params; i++)
		w->grad[i] *= 1.0f / (float)counted;
	return loss / counted;
}

void lane_evaluate(struct lane_work *w, const struct lane_set *set, uint32_t lane, const float *params,
		   const struct train_batch *t, struct train_score *out)
{
	measure(w, set, lane, t);
	for (uint32_t s = 0; s < t->units; s++) {
		const struct unit_cost *c = &w->cost[s];
		double cost;

		if (!c->counted)
			continue;
		gather_utilities(w, set, lane, t, s);
		forward(w, set, lane, params, t, s, w->score);
		objective_order(w->order, w->score, t->n[s], w->obj);
		cost = objective_ranked(c, w->u, w->order, w->obj);
		out->regret += objective_regret(c, cost);
		out->ratio += objective_ratio(c, cost);
		out->counted++;
	}
}

void lane_scores(struct lane_work *w, const struct lane_set *set, uint32_t lane, const float *params,
		 const struct train_batch *t, float *out)
{
	for (uint32_t s = 0; s < t->units; s++, out += w->o->rows) {
		forward(w, set, lane, params, t, s, out);
		memset(out + t->n[s], 0, (w->o->rows - t->n[s]) * sizeof(*out));
	}
}
