/* SPDX-License-Identifier: MIT */
/* One lane of one document: utilities, everybody's ranking for each prompt, what each ranking costs. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "policy/eval/run.h"
#include "policy/learned.h"
#include "policy/rows.h"
#include "shm/util.h"

/* What the functions below work on. */
struct lane {
	struct eval_worker *w;
	const struct eval_doc *doc;
	const struct trace *t;
	uint32_t index, head; /* lane of the model, head of the layer */
	struct attn_head attn;
	const char *raw_k, *raw_v;
	size_t k_bytes, v_bytes; /* of a row */
	bool contrib;            /* the file has VNORM */
};

static float *of_cut(const struct lane *l, float *array, uint32_t cut)
{
	return array + (size_t)cut * l->w->job->set->max_rows;
}

static int read_chunk(const struct lane *l, uint32_t kind, uint32_t cut, float *to)
{
	return trace_read(l->t, kind, l->index, cut, to, l->w->err, l->w->errsize);
}

/* UMAX and UMEAN of every cut, from the file or from the queries. */
static int load_utilities(struct lane *l)
{
	int r = 0;

	for (uint32_t c = 0; r == 0 && c < l->t->h.cuts; c++) {
		const struct trace_cut *cut = &l->t->cut[c];
		float *umax = of_cut(l, l->w->umax, c), *umean = of_cut(l, l->w->umean, c);

		if (trace_find(l->t, TRACE_UMAX, l->index, c) && trace_find(l->t, TRACE_UMEAN, l->index, c)) {
			r = read_chunk(l, TRACE_UMAX, c, umax);
			if (r == 0)
				r = read_chunk(l, TRACE_UMEAN, c, umean);
			continue;
		}
		if (!l->w->has_q || cut->flags & TRACE_CUT_BRANCH) {
			snprintf(l->w->err, l->w->errsize, "%s: UMEAN: none for lane %u, cut %u", l->doc->path,
				 l->index, c);
			return -EINVAL;
		}
		memset(umax, 0, cut->prompt * sizeof(*umax));
		memset(umean, 0, cut->prompt * sizeof(*umean));
		attn_utility(&l->attn, &l->w->attn, cut->prompt, cut->prompt, cut->queries, umax, umean);
	}
	l->contrib = trace_find(l->t, TRACE_VNORM, l->index, 0) != NULL;
	if (r == 0 && l->contrib)
		r = read_chunk(l, TRACE_VNORM, 0, l->w->contrib);
	return r;
}

static void norms(const struct lane *l)
{
	const struct rows_kern *kern = rows_kern(NULL);
	struct eval_worker *w = l->w;
	uint32_t rows = l->t->h.rows;

	kern->sumsq(l->attn.k, l->t->h.k_dim, rows, w->knorm);
	kern->sumsq(w->v, l->t->h.v_dim, rows, w->vnorm);
	for (uint32_t i = 0; i < rows; i++) {
		w->knorm[i] = sqrtf(w->knorm[i]);
		w->vnorm[i] = sqrtf(w->vnorm[i]);
	}
}

static int score_ops(const struct lane *l, const struct rival *r, uint32_t prompt, float *score)
{
	struct policy_batch b = {.lane = l->index,
				 .n = prompt,
				 .k = l->raw_k,
				 .v = l->raw_v,
				 .k_stride = l->k_bytes,
				 .v_stride = l->v_bytes,
				 .total = prompt,
				 .nonce = l->t->h.seed};
	int e = r->policy->ops->score(r->policy, &b, score);

	if (e < 0)
		snprintf(l->w->err, l->w->errsize, "policy %s, lane %u: %s", r->name, l->index, strerror(-e));
	return e;
}

/* Scores of rows [0, prompt), prompt number p of the document. */
static int score(const struct lane *l, const struct rival *r, uint32_t p, float *to)
{
	struct eval_worker *w = l->w;
	uint32_t prompt = w->prompt[p];

	switch (r->how) {
	case HOW_CUR_LOCAL:
		rival_cur_local(w->knorm, w->vnorm, prompt, to);
		return 0;
	case HOW_TOVA:
		memcpy(to, of_cut(l, w->last, p), prompt * sizeof(*to));
		return 0;
	case HOW_H2O:
		memcpy(to, of_cut(l, w->h2o, p), prompt * sizeof(*to));
		return 0;
	case HOW_SNAPKV:
		attn_snapkv(&l->attn, &w->attn, prompt, to);
		return 0;
	case HOW_EXPECTED:
		attn_expected(&l->attn, &w->attn, prompt, w->vnorm, to);
		return 0;
	case HOW_DEFENSIVE:
		attn_defensive(&l->attn, &w->attn, prompt, w->vnorm, to);
		return 0;
	default:
		return score_ops(l, r, prompt, to);
	}
}

static uint32_t *order_of(const struct eval_worker *w, uint32_t rival)
{
	return w->order + (size_t)rival * w->job->set->max_rows;
}

static bool depends_on_cut(const struct rival *r)
{
	return r->how == HOW_ORACLE || r->how == HOW_ATTAINABLE || r->how == HOW_BEST;
}

static int rank_prompt(const struct lane *l, uint32_t p)
{
	struct eval_worker *w = l->w;

	for (uint32_t i = 0; i < w->job->rivals->n; i++) {
		const struct rival *r = &w->job->rivals->r[i];
		int e;

		if (depends_on_cut(r))
			continue;
		e = score(l, r, p, w->score);
		if (e < 0)
			return e;
		rank_rows(w->score + PROTECT_FIRST, w->prompt[p] - PROTECTED, order_of(w, i), w->scratch);
	}
	return 0;
}

/* The mean utility of four other continuations. */
static void rank_attainable(const struct lane *l, const struct eval_item *it, uint32_t *order)
{
	const struct trace_cut *cut = l->t->cut, *mine = &cut[it->cut];
	struct eval_worker *w = l->w;
	uint32_t n = it->prompt - PROTECTED, others = 0;

	memset(w->mean, 0, n * sizeof(*w->mean));
	for (uint32_t c = 0; c < l->t->h.cuts && others < 4; c++) {
		if (c == it->cut || cut[c].context != mine->context || cut[c].prompt != mine->prompt)
			continue;
		w->attn.kern->axpy(w->mean, of_cut(l, w->umax, c) + PROTECT_FIRST, 1 / (float)cut[c].queries,
				   n);
		others++;
	}
	rank_rows(w->mean, n, order, w->scratch);
}

static int prepare_errors(const struct lane *l, const struct eval_item *it)
{
	const struct eval_job *j = l->w->job;
	size_t wide = (size_t)l->t->h.group * l->t->h.v_dim;

	return output_prepare(&l->w->out, &l->attn, &l->w->attn, l->w->v, l->t->h.v_dim,
			      j->gram + l->index * wide * wide, it->prompt, it->queries, j->error_queries);
}

/* Metrics of every policy on one cut; its prompt's rankings are there. */
static int measure(const struct lane *l, uint32_t item)
{
	struct eval_worker *w = l->w;
	const struct eval_job *j = w->job;
	const struct eval_item *it = &j->set->item[item];
	float *umean = of_cut(l, w->umean, it->cut) + PROTECT_FIRST;
	struct metric_cut cut = {.prompt = it->prompt, .queries = it->queries, .best = w->best};
	bool errors = w->has_q && j->gram && j->error_queries && !(it->flags & TRACE_CUT_BRANCH);

	cut.n = it->prompt - PROTECTED;
	cut.u[UTILITY_MAX] = of_cut(l, w->umax, it->cut) + PROTECT_FIRST;
	cut.u[UTILITY_MEAN] = umean;
	for (uint32_t i = 0; i < cut.n && l->contrib; i++)
		w->value[i] = umean[i] * w->contrib[PROTECT_FIRST + i];
	cut.u[UTILITY_VALUE] = l->contrib ? w->value : NULL;
	rank_rows(cut.u[UTILITY_MAX], cut.n, w->best, w->scratch);
	metric_prepare(&cut);
	if (errors && prepare_errors(l, it) < 0) {
		snprintf(w->err, w->errsize, "memory: not enough for attention outputs");
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < j->rivals->n; i++) {
		const struct rival *r = &j->rivals->r[i];
		uint32_t *order = r->how == HOW_ORACLE ? w->best : order_of(w, i);
		float *out = eval_at(j->table, item, j->lane_at[l->index], i);

		if (r->how == HOW_BEST || (r->how == HOW_ATTAINABLE && !it->attainable))
			continue;
		if (r->how == HOW_ATTAINABLE)
			rank_attainable(l, it, order);
		metric_of(&cut, order, out);
		if (errors)
			output_errors(&w->out, order, cut.n, out + METRIC_ERROR);
	}
	return 0;
}

static void past_attention(const struct lane *l)
{
	struct eval_worker *w = l->w;
	float *score[TRACE_MAX_CUTS];

	for (uint32_t p = 0; p < w->prompts; p++)
		score[p] = of_cut(l, w->h2o, p);
	attn_h2o(&l->attn, &w->attn, w->prompt, w->prompts, score);
}

int eval_lane(struct eval_worker *w, uint32_t doc, uint32_t layer, uint32_t head)
{
	const struct eval_doc *d = &w->job->set->doc[doc];
	const struct trace_header *h = &d->trace->h;
	struct lane l = {.w = w, .doc = d, .t = d->trace, .index = layer * h->heads + head, .head = head};
	size_t el = dtype_bytes((enum row_dtype)h->dtype);
	int r;

	l.k_bytes = h->k_dim * el;
	l.v_bytes = h->v_dim * el;
	l.raw_k = w->raw_k + head * h->rows * l.k_bytes;
	l.raw_v = w->raw_v + head * h->rows * l.v_bytes;
	l.attn = (struct attn_head){.k = w->k + (size_t)head * h->rows * h->k_dim,
				    .q = w->q + (size_t)head * h->group * h->rows * h->k_dim,
				    .rows = h->rows,
				    .dim = h->k_dim,
				    .group = h->group};
	rows_kern(NULL)->load(w->v, l.raw_v, l.v_bytes, h->v_dim, h->rows, (enum row_dtype)h->dtype);
	norms(&l);
	r = load_utilities(&l);
	if (r == 0 && rival_find(w->job->rivals, HOW_H2O) >= 0)
		past_attention(&l);
	for (uint32_t p = 0; r == 0 && p < w->prompts; p++) {
		r = rank_prompt(&l, p);
		for (uint32_t i = 0; r == 0 && i < d->items; i++)
			if (w->job->set->item[d->first_item + i].prompt == w->prompt[p])
				r = measure(&l, d->first_item + i);
	}
	return r;
}
