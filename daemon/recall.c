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
#include "daemon/internal.h"
#include "ipc/codec.h"
#include "policy/recall.h"
#include "shm/util.h"

#define INLINE_NS 300000.0 /* the longest search on the loop */
#define MAC_NS 0.025       /* of one multiplication of a search, the copying included */

struct row {
	uint32_t pos, run, row;
};

/* One lane's search. */
struct hunt {
	struct job job;
	struct recall *call;
	uint32_t lane;
	struct device_lane to;  /* the window */
	struct page **page;     /* [n], pinned while a worker works */
	struct recall_run *run; /* [n] */
	uint32_t n, cap;
	struct recall_query q;
	struct recall_hit *hit; /* [rows] */
	struct row *found;      /* [rows], ascending */
	uint32_t count;
	char *rows; /* what was found: K plane, V plane */
	int error;
};

struct recall {
	struct seq *seq;       /* a reference */
	struct client *client; /* NULL: gone */
	struct region *region; /* a reference */
	struct wire_recall m;  /* without its queries */
	float *q;              /* [heads][per_head][dim] */
	uint32_t first;        /* lane of head 0 */
	uint32_t waiting;      /* pages being summarised, then lanes with workers */
	bool pinned, asked;    /* asked: pages without a summary were read once */
	uint64_t started, searched, skipped, missed;
	struct hunt hunt[]; /* [heads] */
};

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

/* ---- what may be searched ---------------------------------------------------------------------- */

/* Rows of the page that may be recalled, as bits over its packed rows. Returns how many. */
static uint32_t packed_rows(const struct index *ix, const struct page *p, uint32_t *alive)
{
	const uint64_t *dev = index_bits(ix, KVT_TIER_DEVICE, p->lane);
	uint64_t mask[PAGE_SPAN];
	uint32_t row = 0, n = 0;

	memset(alive, 0, PAGE_ROWS / 8);
	if (!index_alive(ix, p, KVT_TIER_DRAM, mask))
		return 0;
	for (uint32_t w = 0; w < p->span; w++) {
		mask[w] &= ~index_window(dev, ix->words, p->first + w * 64);
		n += (uint32_t)__builtin_popcountll(mask[w]);
	}
	if (n == p->rows) {
		for (uint32_t i = 0; i < n; i += 32)
			alive[i / 32] = n - i >= 32 ? UINT32_MAX : (1u << (n - i)) - 1;
		return n;
	}
	for (uint32_t w = 0; n && w < p->span; w++)
		for (uint64_t b = p->pos[w]; b; b &= b - 1, row++)
			if (mask[w] & b & -b)
				alive[row / 32] |= 1u << row % 32;
	return n;
}

/* Where a page of a mapped tier lies: it stays there while it is pinned, or while the loop does nothing else.
 */
static const void *page_bytes(struct core *c, const struct page *p)
{
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];
	struct tier_io io = {.op = TIER_READ, .bytes = p->bytes, .addr = p->addr[KVT_TIER_DRAM - 1]};
	const void *at;

	if (!(t->ops->caps & TIER_CAP_MAPPED) || t->ops->prepare(t, &io) < 0)
		return NULL;
	at = io.buf;
	t->ops->release(t, &io);
	return at;
}

static int hunt_add(struct hunt *u, struct page *p, const void *k, const uint32_t *alive)
{
	if (u->n == u->cap) {
		uint32_t cap = u->cap ? u->cap * 2 : 64;
		struct page **page = reallocarray(u->page, cap, sizeof(struct page *));
		struct recall_run *run;

		if (!page)
			return -ENOMEM;
		u->page = page;
		run = reallocarray(u->run, cap, sizeof(*run));
		if (!run)
			return -ENOMEM;
		u->run = run;
		u->cap = cap;
	}
	u->page[u->n] = p;
	u->run[u->n] = (struct recall_run){.k = k, .sum = p->sum, .rows = p->rows};
	memcpy(u->run[u->n++].alive, alive, PAGE_ROWS / 8);
	return 0;
}

static void count_skipped(struct recall *k, uint32_t lane)
{
	const struct index *ix = &k->seq->ix;
	const uint64_t *dev = index_bits(ix, 0, lane), *dram = index_bits(ix, 1, lane),
		       *nvme = index_bits(ix, 2, lane);

	for (uint32_t w = 0; w < BITS_WORDS(ix->rows); w++)
		k->skipped += (uint32_t)__builtin_popcountll(nvme[w] & ~dram[w] & ~dev[w]);
}

static void on_summed(void *arg);

/* Collect one lane's pages; those without a summary are asked for, once. */
static int collect(struct recall *k, struct hunt *u)
{
	struct seq *s = k->seq;
	const struct lane_pages *lp = &s->ix.lane[u->lane];
	uint32_t alive[PAGE_ROWS / 32];
	int r = 0;

	u->n = 0;
	for (uint32_t i = 0; i < lp->n && r >= 0; i++) {
		struct page *p = lp->v[i];
		uint32_t n = page_in(p, KVT_TIER_DRAM) ? packed_rows(&s->ix, p, alive) : 0;
		const void *at;

		if (!n)
			continue;
		if (!p->sum && !k->asked) {
			r = recall_sum_start(s, p, on_summed, k);
			k->waiting += r >= 0;
			continue;
		}
		at = p->sum && p->sum->dim == k->m.dim ? page_bytes(s->core, p) : NULL;
		k->searched += at ? n : 0;
		k->missed += at ? 0 : n;
		if (at)
			r = hunt_add(u, p, at, alive);
	}
	return r;
}

/* ---- one lane: any thread -------------------------------------------------------------------------- */

static uint32_t position(const struct page *p, uint32_t row)
{
	for (uint32_t w = 0;; w++) {
		uint32_t n = (uint32_t)__builtin_popcountll(p->pos[w]);
		uint64_t b = p->pos[w];

		if (row >= n) {
			row -= n;
			continue;
		}
		while (row--)
			b &= b - 1;
		return p->first + w * 64 + (uint32_t)__builtin_ctzll(b);
	}
}

static int by_position(const void *a, const void *b)
{
	const struct row *x = a, *y = b;

	return x->pos < y->pos ? -1 : x->pos > y->pos;
}

/* Hits as positions, ascending, each once: two pages may hold a row. */
static void sort_hits(struct hunt *u, uint32_t n)
{
	bool sorted = true;

	for (uint32_t i = 0; i < n; i++) {
		u->found[i] = (struct row){.pos = position(u->page[u->hit[i].run], u->hit[i].row),
					   .run = u->hit[i].run,
					   .row = u->hit[i].row};
		sorted &= !i || u->found[i].pos > u->found[i - 1].pos;
	}
	if (!sorted)
		qsort(u->found, n, sizeof(*u->found), by_position);
	u->count = 0;
	for (uint32_t i = 0; i < n; i++)
		if (!u->count || u->found[i].pos != u->found[u->count - 1].pos)
			u->found[u->count++] = u->found[i];
}

static void copy_rows(struct hunt *u, uint32_t k_bytes, uint32_t v_bytes)
{
	char *k = u->rows, *v = u->rows + (size_t)u->count * k_bytes;

	for (uint32_t i = 0; i < u->count; i++) {
		const struct recall_run *run = &u->run[u->found[i].run];

		__builtin_prefetch((const char *)run->k + (size_t)run->rows * k_bytes +
				   (size_t)u->found[i].row * v_bytes);
		memcpy(k + (size_t)i * k_bytes, (const char *)run->k + (size_t)u->found[i].row * k_bytes,
		       k_bytes);
	}
	for (uint32_t i = 0; v_bytes && i < u->count; i++) {
		const struct recall_run *run = &u->run[u->found[i].run];

		memcpy(v + (size_t)i * v_bytes,
		       (const char *)run->k + (size_t)run->rows * k_bytes + (size_t)u->found[i].row * v_bytes,
		       v_bytes);
	}
}

static void hunt_scatter(struct hunt *u)
{
	struct recall *k = u->call;

	if (u->count)
		u->error =
			k->region->ops->scatter(k->region->mem, &u->to, u->rows, u->count, NULL, 0, u->count);
}

static bool imported(const struct recall *k)
{
	return k->region->ops == &device_fd_ops;
}

static void hunt_run(struct job *j, struct worker_ctx *w)
{
	struct hunt *u = container_of(j, struct hunt, job);
	void *scratch = worker_scratch(w, recall_scratch(&u->q, u->n));
	struct recall_seen seen;
	int n = scratch ? recall_search(&u->q, u->run, u->n, scratch, u->hit, &seen) : -ENOMEM;

	if (n < 0) {
		u->error = n;
		return;
	}
	sort_hits(u, (uint32_t)n);
	copy_rows(u, u->to.k_bytes, u->to.v_bytes);
	if (!imported(u->call))
		hunt_scatter(u);
}

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

	if (imported(k) && !u->error && u->count) {
		u->job = (struct job){.run = write_run, .done = hunt_written, .bytes = u->count};
		workers_put(k->region->tenant->writer, &u->job);
		return;
	}
	hunt_written(j);
}

/* ---- the beginning ---------------------------------------------------------------------------------- */

static int hunt_begin(struct recall *k, struct hunt *u)
{
	struct seq *s = k->seq;
	uint32_t h = (uint32_t)(u - k->hunt), extra = s->rows - MIN(s->ix.rows, s->rows);
	struct device_lane own;

	u->q = (struct recall_query){.n = k->m.per_head,
				     .dim = k->m.dim,
				     .scale = k->m.scale > 0 ? k->m.scale : 1 / sqrtf((float)k->m.dim),
				     .dtype = (enum row_dtype)s->model->dtype,
				     .norm = k->m.flags & KVT_RECALL_LOGITS ? RECALL_LOGIT : RECALL_MASS,
				     .probe = k->m.probe ? k->m.probe : RECALL_PROBE,
				     .want = k->m.rows,
				     .q = k->q + (size_t)h * k->m.per_head * k->m.dim};
	if (!(k->m.flags & KVT_RECALL_FLAGS) && s->cut == ROWS_ALL && s->ix.resident[u->lane] + extra) {
		seq_lane(s, u->lane, &own);
		u->q.resident_n = s->ix.resident[u->lane] + extra;
		u->q.resident_stride = own.k_stride;
		u->q.resident =
			k->region->ops->peek(k->region->mem, own.k_off,
					     (uint64_t)(u->q.resident_n - 1) * own.k_stride + own.k_bytes);
	}
	u->hit = malloc(k->m.rows * sizeof(*u->hit));
	u->found = malloc(k->m.rows * sizeof(*u->found));
	u->rows = malloc((size_t)k->m.rows * (u->to.k_bytes + u->to.v_bytes));
	return u->hit && u->found && u->rows ? 0 : -ENOMEM;
}

/* Estimated nanoseconds of the search. */
static double effort(const struct recall *k)
{
	const struct recall_query *q = &k->hunt[0].q;
	double rows = 0, probed = (double)k->searched * q->probe / 1000;

	for (uint32_t h = 0; h < k->m.heads; h++)
		rows += k->hunt[h].q.resident ? k->hunt[h].q.resident_n : 0;
	rows += MAX(probed, MIN(4.0 * k->m.rows * k->m.heads, (double)k->searched)) +
		(double)k->searched / RECALL_GROUP;
	return rows * q->dim * (double)ALIGN_UP(q->n, RECALL_LANES) * MAC_NS;
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
		r = collect(k, &k->hunt[h]);
		count_skipped(k, k->hunt[h].lane);
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
	else if (!imported(k) && effort(k) <= INLINE_NS)
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
	} else if (m->op == W_RECALL_FIND) {
		find(cl, s, m);
	} else {
		if (m->op == W_RECALL_PREPARE)
			recall_prepare(s);
		wire_reply_init(&a.r, &m->hdr, sizeof(a), 0, NULL);
		client_reply(cl, &a.r, NULL, 0);
	}
	seq_unref(s);
	return 0;
}
