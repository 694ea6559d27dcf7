/* SPDX-License-Identifier: MIT */
/*
 * W_RECALL. One search at a time per sequence, over the pages of one layer's lanes that are in DRAM:
 *
 *   request → pages without a summary are read and checked → search, copy, scatter → reply
 *
 * A search that takes less than a slice of the loop is done where it arrives: handing it to a worker would cost
 * as much. Longer ones go to workers lane by lane, and imported regions are written by their tenant's thread,
 * see mover_in.c. Workers see pinned pages and copies of what the index said, never the index; while they work
 * seq_step() waits. Queries came over the socket: nobody can write them any more.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "daemon/recall.h"
#include "ipc/codec.h"
#include "shm/util.h"

#define INLINE_NS 300000.0 /* the longest search on the loop */
#define MAC_NS 0.025       /* of one multiplication of a search, the copying included */

static void recall_free(struct recall *k)
{
	struct seq *s = k->seq;

	for (uint32_t h = 0; h < k->m.heads; h++) {
		struct hunt *u = &k->hunt[h];

		for (uint32_t i = 0; k->pinned && i < u->n; i++)
			page_unpin(&s->core->pages, u->page[i]);
		free(u->page);
		free(u->run);
		free(u->hit);
		free(u->found);
		free(u->rows);
	}
	region_unref(s->core, k->region);
	free(k->q);
	free(k);
	seq_unref(s);
}

void recall_orphan(struct seq *s)
{
	if (s->recall)
		s->recall->client = NULL;
}

static void on_summed(void *arg);

/* ---- the end ---------------------------------------------------------------------------------------- */

static void reply_found(struct recall *k)
{
	static _Alignas(8) char buf[WIRE_MAX]; /* the loop's; check_find() saw to it that all fits */
	struct wire_recall_reply *a = (void *)buf;
	uint32_t rows = 0, *pos;

	for (uint32_t h = 0; h < k->m.heads; h++)
		rows += k->hunt[h].count;
	wire_reply_init(&a->r, &k->m.hdr, wire_recall_reply_len(k->m.heads, rows), 0, NULL);
	a->heads = k->m.heads;
	a->rows = rows;
	a->searched = k->searched;
	a->skipped = k->skipped;
	a->missed = k->missed;
	pos = wire_recall_positions(a);
	for (uint32_t h = 0; h < k->m.heads; h++) {
		wire_recall_counts(a)[h] = k->hunt[h].count;
		for (uint32_t i = 0; i < k->hunt[h].count; i++)
			*pos++ = k->hunt[h].found[i].pos;
	}
	a->ns = now_ns() - k->started;
	k->seq->core->stat.rows_recalled += rows;
	client_reply(k->client, &a->r, NULL, 0);
}

static void fail(const struct recall *k, int status, const char *text)
{
	if (k->client)
		client_fail(k->client, &k->m.hdr, status, text);
}

/* Everybody is done: answer, and let the sequence go on. */
static void recall_over(struct recall *k, int error)
{
	struct seq *s = k->seq;

	for (uint32_t h = 0; h < k->m.heads && !error; h++)
		error = k->hunt[h].error;
	if (!error && s->epoch != k->m.epoch)
		fail(k, KVT_E_STALE, "recall: the sequence was truncated meanwhile");
	else if (error == -ENOMEM || error == -ENOSPC)
		fail(k, error == -ENOMEM ? KVT_E_NOMEM : KVT_E_NOSPC,
		     error == -ENOMEM ? "daemon: out of memory" : "window: no memory behind it");
	else if (error < 0)
		fail(k, KVT_E_IO, strerror(-error));
	else if (k->client)
		reply_found(k);
	s->refs++;
	if (s->recall == k) {
		s->recall = NULL;
		if (s->state == SEQ_LIVE)
			seq_answer(s);
	}
	recall_free(k);
	seq_step(s);
	seq_unref(s);
}

static void hunt_written(struct job *j)
{
	struct recall *k = container_of(j, struct hunt, job)->call;

	if (!--k->waiting)
		recall_over(k, 0);
}

static void write_run(struct job *j, struct worker_ctx *w)
{
	hunt_scatter(container_of(j, struct hunt, job));
}

static void hunt_done(struct job *j)
{
	struct hunt *u = container_of(j, struct hunt, job);
	struct recall *k = u->call;

	if (recall_imported(k) && !u->error && u->count) {
		u->job = (struct job){.run = write_run, .done = hunt_written, .bytes = u->count};
		workers_put(k->region->tenant->writer, &u->job);
		return;
	}
	hunt_written(j);
}

/* ---- the beginning ---------------------------------------------------------------------------------- */

/* Estimated nanoseconds of the search. */
static double effort(const struct recall *k)
{
	const struct recall_query *q = &k->hunt[0].q;
	double rows = 0, probed = (double)k->searched * q->probe / 1000;
	uint32_t queries = ALIGN_UP(q->n, RECALL_LANES);

	for (uint32_t h = 0; h < k->m.heads; h++)
		rows += k->hunt[h].q.resident ? k->hunt[h].q.resident_n : 0;
	rows += MAX(probed, MIN(4.0 * k->m.rows * k->m.heads, (double)k->searched)) +
		(double)k->searched / RECALL_GROUP;
	return rows * q->dim * queries * MAC_NS;
}

static void search_here(struct recall *k)
{
	struct core *c = k->seq->core;

	k->waiting = k->m.heads;
	for (uint32_t h = 0, n = k->m.heads; h < n; h++)
		workers_run_inline(c->workers, &k->hunt[h].job); /* the last one ends k */
}

static void search_there(struct recall *k)
{
	struct core *c = k->seq->core;

	k->pinned = true;
	k->waiting = k->m.heads;
	for (uint32_t h = 0; h < k->m.heads; h++)
		for (uint32_t i = 0; i < k->hunt[h].n; i++)
			page_pin(k->hunt[h].page[i]);
	for (uint32_t h = 0; h < k->m.heads; h++)
		workers_put(c->workers, &k->hunt[h].job);
}

/* Search what is there, unless pages have to be read first. */
static void go(struct recall *k)
{
	struct seq *s = k->seq;
	int r = 0;

	k->searched = k->skipped = k->missed = 0;
	for (uint32_t h = 0; h < k->m.heads && r >= 0 && s->ix.rows; h++) {
		r = hunt_collect(k, &k->hunt[h], on_summed);
	}
	k->asked = true;
	if (k->waiting)
		return; /* on_summed() comes back here */
	for (uint32_t h = 0; h < k->m.heads && r >= 0; h++) {
		struct hunt *u = &k->hunt[h];

		r = hunt_begin(k, u);
		u->call = k;
		u->job = (struct job){
			.run = hunt_run, .done = hunt_done, .urgent = true, .tenant = s->tenant->index};
	}
	if (r < 0)
		recall_over(k, r);
	else if (!recall_imported(k) && effort(k) <= INLINE_NS)
		search_here(k);
	else
		search_there(k);
}

static void on_summed(void *arg)
{
	struct recall *k = arg;
	struct seq *s = k->seq;

	if (--k->waiting)
		return;
	if (!k->client || s->state != SEQ_LIVE || s->cut != ROWS_ALL)
		recall_over(k, k->client ? 0 : -ECANCELED);
	else
		go(k);
}

/* Copy the queries and check what depends on the sequence. 0, or KVT_E_* with a line. */
static int take(struct recall *k, const struct wire_recall *m, char *err, size_t size)
{
	struct seq *s = k->seq;
	const struct wire_layer *y = &s->model->layer[m->layer];
	size_t n = (size_t)m->heads * m->per_head * m->dim;
	const void *src = wire_recall_queries(m);

	if (wire_layout_check(&m->window, y, m->layer, s->region->bytes, s->max_rows, err, size))
		return KVT_E_INVAL;
	k->q = malloc(n * sizeof(*k->q));
	if (!k->q) {
		snprintf(err, size, "out of memory");
		return KVT_E_NOMEM;
	}
	recall_load(k->q, src, n, (enum row_dtype)m->dtype);
	for (size_t i = 0; i < n; i++)
		if (!isfinite(k->q[i])) {
			snprintf(err, size, "queries[%zu]: %g, must be finite", i, (double)k->q[i]);
			return KVT_E_INVAL;
		}
	for (uint32_t h = 0; h < m->heads; h++) {
		k->hunt[h].lane = k->first + h;
		k->hunt[h].to = (struct device_lane){.k_off = m->window.k_off + h * m->window.k_head_stride,
						     .v_off = m->window.v_off + h * m->window.v_head_stride,
						     .k_stride = m->window.k_row_stride,
						     .v_stride = m->window.v_row_stride,
						     .k_bytes = y->k_bytes,
						     .v_bytes = y->v_bytes};
	}
	return 0;
}

/* Does the message speak of this model's layer? */
static int shape_check(const struct seq *s, const struct wire_recall *m, char *err, size_t size)
{
	const struct model *mo = s->model;
	const struct wire_layer *y = m->layer < mo->n_layers ? &mo->layer[m->layer] : NULL;
	uint32_t elem = wire_dtype_bytes(mo->dtype);

	if (!y)
		snprintf(err, size, "layer: %u, must be below %u", m->layer, mo->n_layers);
	else if (!elem)
		snprintf(err, size, "model: opaque rows cannot be searched");
	else if (m->heads != y->kv_heads)
		snprintf(err, size, "heads: %u, layer %u has %u", m->heads, m->layer, y->kv_heads);
	else if (m->dim != y->k_bytes / elem || m->dim > RECALL_MAX_DIM)
		snprintf(err, size, "dim: %u, keys of layer %u have %u, at most %u", m->dim, m->layer,
			 y->k_bytes / elem, RECALL_MAX_DIM);
	else if ((uint64_t)m->rows * (y->k_bytes + y->v_bytes) > TIER_MAX_PAGE)
		snprintf(err, size, "rows: %u of %u bytes, at most %u bytes per head", m->rows,
			 y->k_bytes + y->v_bytes, TIER_MAX_PAGE);
	else
		return 0;
	return y && !elem ? KVT_E_MODEL : KVT_E_INVAL;
}

static void find(struct client *cl, struct seq *s, const struct wire_recall *m)
{
	char err[WIRE_TEXT] = "";
	struct recall *k;
	bool first;
	int r = shape_check(s, m, err, sizeof(err));

	if (!r && (m->epoch != s->epoch || s->cut != ROWS_ALL)) {
		snprintf(err, sizeof(err), "epoch: %u, the sequence is in %u%s", m->epoch, s->epoch,
			 s->cut != ROWS_ALL ? ", being cut" : "");
		r = m->epoch != s->epoch ? KVT_E_STALE : KVT_E_BUSY;
	}
	k = r ? NULL : calloc(1, sizeof(*k) + m->heads * sizeof(k->hunt[0]));
	if (!k) {
		client_fail(cl, &m->hdr, r ? r : KVT_E_NOMEM, r ? err : "out of memory");
		return;
	}
	k->started = now_ns();
	k->seq = s;
	s->refs++;
	k->client = cl;
	k->region = region_ref(s->region);
	k->m = *m;
	while (s->model->lane_layer[k->first] != m->layer)
		k->first++;
	r = take(k, m, err, sizeof(err));
	if (r < 0) {
		fail(k, r, err);
		recall_free(k);
		return;
	}
	first = !s->recalls;
	s->recalls = true;
	s->core->stat.recalls++;
	s->recall = k;
	go(k);
	if (first) /* behind the pages that this one needs */
		recall_prepare(s);
}

int request_recall(struct client *cl, const struct wire_recall *m)
{
	struct seq *s = request_seq(cl, &m->hdr, m->seq);
	struct wire_recall_reply a;

	if (!s)
		return 0;
	if (s->recall && s->waiter) {
		client_fail(cl, &m->hdr, KVT_E_BUSY, "recall: another client waits for the sequence");
	} else if (s->recall) { /* one that its caller gave up */
		s->waiter = cl;
		cl->waits = s;
		seq_unref(s);
		return KVT_AGAIN;
	} else if (m->op == W_RECALL_FIND && seq_windowed(s)) {
		client_fail(cl, &m->hdr, KVT_E_INVAL, "recall: the sequence has a window, its client searches");
	} else if (m->op == W_RECALL_FIND) {
		find(cl, s, m);
	} else {
		if (m->op == W_RECALL_PREPARE) {
			if (!seq_windowed(s)) /* whose client searches makes its own summaries */
				recall_prepare(s);
			recall_pull(s);
		}
		wire_reply_init(&a.r, &m->hdr, sizeof(a), 0, NULL);
		client_reply(cl, &a.r, NULL, 0);
	}
	seq_unref(s);
	return 0;
}
