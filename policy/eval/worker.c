/* SPDX-License-Identifier: MIT */
/* A thread's memory, and loading a layer's rows into it. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "policy/eval/run.h"
#include "policy/learned.h"
#include "policy/rows.h"
#include "shm/util.h"

struct part {
	void **at;
	size_t bytes;
};

int eval_worker_init(struct eval_worker *w, const struct eval_job *j, char *err, size_t errsize)
{
	const struct trace_header *h = &j->set->shape;
	size_t rows = j->set->max_rows, cuts = j->set->max_cuts, f = sizeof(float);
	size_t el = dtype_bytes((enum row_dtype)h->dtype), total = 0;
	char *at;

	*w = (struct eval_worker){.job = j, .err = err, .errsize = errsize};
	const struct part parts[] = {
		{(void **)&w->raw_k, h->heads * rows * h->k_dim * el},
		{(void **)&w->raw_v, h->heads * rows * h->v_dim * el},
		{(void **)&w->raw_q, h->group * rows * h->k_dim * el},
		{(void **)&w->k, h->heads * rows * h->k_dim * f},
		{(void **)&w->v, rows * h->v_dim * f},
		{(void **)&w->q, (size_t)h->heads * h->group * rows * h->k_dim * f},
		{(void **)&w->vnorm, rows * f},
		{(void **)&w->knorm, rows * f},
		{(void **)&w->contrib, rows * f},
		{(void **)&w->umax, cuts * rows * f},
		{(void **)&w->umean, cuts * rows * f},
		{(void **)&w->value, rows * f},
		{(void **)&w->mean, rows * f},
		{(void **)&w->last, cuts * rows * f},
		{(void **)&w->h2o, cuts * rows * f},
		{(void **)&w->score, rows * f},
		{(void **)&w->order, j->rivals->n * rows * sizeof(uint32_t)},
		{(void **)&w->best, rows * sizeof(uint32_t)},
		{(void **)&w->scratch, 2 * rows * sizeof(uint32_t)},
		{(void **)&w->prompt, cuts * sizeof(uint32_t)},
	};

	for (size_t i = 0; i < ARRAY_SIZE(parts); i++)
		total += ALIGN_UP(parts[i].bytes, KVT_CACHELINE);
	w->memory = at = aligned_alloc(KVT_CACHELINE, total);
	if (!at ||
	    attn_reserve(&w->attn, (uint32_t)rows, h->k_dim, h->group, h->rope_type, h->rope_theta) < 0) {
		eval_worker_done(w);
		snprintf(err, errsize, "memory: not enough for a thread");
		return -ENOMEM;
	}
	for (size_t i = 0; i < ARRAY_SIZE(parts); i++) {
		*parts[i].at = at;
		at += ALIGN_UP(parts[i].bytes, KVT_CACHELINE);
	}
	return 0;
}

void eval_worker_done(struct eval_worker *w)
{
	free(w->memory);
	w->memory = NULL;
	attn_release(&w->attn);
	output_release(&w->out);
}

static void to_floats(float *x, const void *raw, uint32_t dim, uint32_t n, uint32_t dtype)
{
	rows_kern(NULL)->load(x, raw, dim * dtype_bytes((enum row_dtype)dtype), dim, n, (enum row_dtype)dtype);
}

static int load_head(struct eval_worker *w, const struct trace *t, uint32_t lane, uint32_t head)
{
	const struct trace_header *h = &t->h;
	size_t el = dtype_bytes((enum row_dtype)h->dtype);
	char *k = w->raw_k + (size_t)head * h->rows * h->k_dim * el;
	int r;

	r = trace_read(t, TRACE_K, lane, 0, k, w->err, w->errsize);
	if (r == 0)
		r = trace_read(t, TRACE_V, lane, 0, w->raw_v + (size_t)head * h->rows * h->v_dim * el, w->err,
			       w->errsize);
	if (r == 0 && w->has_q)
		r = trace_read(t, TRACE_Q, lane, 0, w->raw_q, w->err, w->errsize);
	if (r < 0)
		return r;
	to_floats(w->k + (size_t)head * h->rows * h->k_dim, k, h->k_dim, h->rows, h->dtype);
	if (w->has_q)
		to_floats(w->q + (size_t)head * h->group * h->rows * h->k_dim, w->raw_q, h->k_dim,
			  h->group * h->rows, h->dtype);
	return 0;
}

/* Distinct prompts of a document's items, ascending. */
static void list_prompts(struct eval_worker *w, const struct eval_doc *d)
{
	w->prompts = 0;
	for (uint32_t i = 0; i < d->items; i++) {
		uint32_t prompt = w->job->set->item[d->first_item + i].prompt, at = 0;

		while (at < w->prompts && w->prompt[at] < prompt)
			at++;
		if (at < w->prompts && w->prompt[at] == prompt)
			continue;
		memmove(w->prompt + at + 1, w->prompt + at, (w->prompts - at) * sizeof(*w->prompt));
		w->prompt[at] = prompt;
		w->prompts++;
	}
}

/* TOVA's scores: the last query's attention, summed over all heads of the layer. */
static void last_queries(struct eval_worker *w, const struct trace_header *h)
{
	for (uint32_t p = 0; p < w->prompts; p++) {
		float *sum = w->last + (size_t)p * w->job->set->max_rows;

		memset(sum, 0, w->prompt[p] * sizeof(*sum));
		for (uint32_t head = 0; head < h->heads; head++) {
			struct attn_head a = {.k = w->k + (size_t)head * h->rows * h->k_dim,
					      .q = w->q + (size_t)head * h->group * h->rows * h->k_dim,
					      .rows = h->rows,
					      .dim = h->k_dim,
					      .group = h->group};

			attn_last(&a, &w->attn, w->prompt[p], sum);
		}
	}
}

/* Queries are half of a file: read only for policies, outputs and utilities that need them. */
static bool wants_q(const struct eval_job *j, const struct trace *t, uint32_t layer)
{
	uint32_t first = layer * t->h.heads;
	bool wants = j->gram && j->error_queries;

	for (uint32_t i = 0; i < j->rivals->n; i++)
		wants |= rival_needs_q(&j->rivals->r[i]);
	for (uint32_t lane = first; !wants && lane < first + t->h.heads; lane++)
		for (uint32_t c = 0; c < t->h.cuts; c++)
			wants |= !trace_find(t, TRACE_UMAX, lane, c) || !trace_find(t, TRACE_UMEAN, lane, c);
	return wants && trace_find(t, TRACE_Q, first, 0);
}

int eval_layer(struct eval_worker *w, uint32_t doc, uint32_t layer)
{
	const struct eval_doc *d = &w->job->set->doc[doc];
	const struct trace_header *h = &d->trace->h;
	bool tova = rival_find(w->job->rivals, HOW_TOVA) >= 0, any = false;
	int r = 0;

	for (uint32_t head = 0; head < h->heads; head++)
		any |= w->job->lane_on[layer * h->heads + head];
	if (!any || !d->items)
		return 0;
	w->has_q = wants_q(w->job, d->trace, layer);
	list_prompts(w, d);
	for (uint32_t head = 0; r == 0 && head < h->heads; head++)
		if (tova || w->job->lane_on[layer * h->heads + head])
			r = load_head(w, d->trace, layer * h->heads + head, head);
	if (r == 0 && tova)
		last_queries(w, h);
	for (uint32_t head = 0; r == 0 && head < h->heads; head++)
		if (w->job->lane_on[layer * h->heads + head])
			r = eval_lane(w, doc, layer, head);
	return r;
}
