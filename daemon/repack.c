/* SPDX-License-Identifier: MIT */
/*
 * One move below the device tier: read the source pages, check each as a
 * whole, take the wanted rows into a private buffer, write them as one page of
 * the other tier. No tier buffer is held while waiting for another one, so
 * reads and writes cannot wait for each other in a circle.
 *
 *   read → worker (check, copy) → ... → last one sums up → write → commit
 *
 * The index changes only in commit; while a worker decides over it, commits wait.
 */
#include <string.h>
#include "daemon/direct.h"
#include "daemon/internal.h"
#include "daemon/limbo.h"
#include "shm/crc.h"
#include "shm/trial.h"
#include "shm/util.h"

struct repack {
	struct job job;
	struct seq *seq; /* a reference */
	struct core *core;
	uint32_t epoch;
	int from, to, error, failed[REPACK_SOURCES];
	bool whole;
	uint32_t k_bytes, limit[REPACK_SOURCES]; /* positions for which a source speaks end here */
	unsigned n, reading;
	struct page *src[REPACK_SOURCES]; /* pinned, marked moving */
	struct pio *read[REPACK_SOURCES];
	struct page *dst; /* pinned; the source itself when whole */
	uint8_t *buf;     /* its payload */
	struct recall_shape keys;
	struct recall_sum *sum;   /* of its keys, when they stay in dram */
	tier_addr addr;           /* where it was written */
	struct limbo_move *limbo; /* keeps the sources until that is durable, or NULL */
	STAILQ_ENTRY(repack) link;
};

static void finish(struct repack *r)
{
	struct core *c = r->core;

	c->background_bytes -= r->dst->bytes;
	r->seq->repacks--;
	for (unsigned i = 0; i < r->n; i++) {
		r->src[i]->moving = false;
		page_unpin(&c->pages, r->src[i]);
	}
	page_unpin(&c->pages, r->dst);
	limbo_cancel(c, r->limbo);
	seq_unref(r->seq);
	free(r->buf);
	free(r->sum);
	free(r);
	mover_kick(c);
}

/* ---- reading ------------------------------------------------------------------------ */

/* Copy the rows that dst wants from this page; K plane and V plane each keep their place. */
static void take_rows(const struct repack *r, unsigned i, const uint8_t *buf, uint32_t k, uint32_t v)
{
	const struct page *dst = r->dst, *src = r->src[i];
	uint8_t *dk = r->buf, *dv = r->buf + (size_t)dst->rows * k;
	const uint8_t *sk = buf, *sv = buf + (size_t)src->rows * k;
	uint32_t row = 0, out;

	for (uint32_t w = 0; w < src->span; w++)
		for (uint64_t b = src->pos[w]; b; b &= b - 1, row++) {
			uint32_t pos = src->first + w * 64 + (uint32_t)__builtin_ctzll(b);

			if (pos >= r->limit[i] || !page_has(dst, pos))
				continue;
			out = bits_rank(dst->pos, pos - dst->first);
			memcpy(dk + (size_t)out * k, sk + (size_t)row * k, k);
			if (v)
				memcpy(dv + (size_t)out * v, sv + (size_t)row * v, v);
		}
}

/* All sources are read: check them, make the new payload and its checksum. */
static void repack_run(struct job *j, struct worker_ctx *w)
{
	struct repack *r = container_of(j, struct repack, job);
	struct page_ident id;

	for (unsigned i = 0; i < r->n; i++) {
		const struct page *p = r->src[i];

		if (r->read[i]->io.res < 0)
			r->read[i]->error = r->read[i]->io.res;
		else if (!page_verify(p, r->read[i]->io.buf))
			r->read[i]->error = -EBADMSG;
		else if (r->whole)
			memcpy(r->buf, r->read[i]->io.buf, p->bytes);
		else
			take_rows(r, i, r->read[i]->io.buf, r->k_bytes, p->bytes / p->rows - r->k_bytes);
	}
	if (r->whole) {
		if (!r->read[0]->error)
			r->sum = recall_sum_make(r->keys, r->dst, r->buf);
		return;
	}
	page_ident(r->dst, &id);
	r->dst->crc = crc32c(page_crc_seed(&id), r->buf, r->dst->bytes);
	r->sum = recall_sum_make(r->keys, r->dst, r->buf);
}

static void repack_run_done(struct job *j)
{
	struct repack *r = container_of(j, struct repack, job);
	struct core *c = r->core;

	for (unsigned i = 0; i < r->n; i++) {
		if (r->read[i]->error)
			r->error = r->failed[i] = r->read[i]->error;
		pio_free(r->read[i]);
	}
	STAILQ_INSERT_TAIL(&c->repack_wait, r, link);
	mover_kick(c);
}

static void read_end(struct pio *io)
{
	struct repack *r = io->owner;

	if (--r->reading)
		return;
	r->job.run = repack_run;
	r->job.done = repack_run_done;
	r->job.tenant = r->seq->tenant->index;
	r->job.bytes = r->dst->bytes;
	workers_put(r->core->workers, &r->job);
}

/* ---- writing and entering the index ---------------------------------------------------- */

static bool stale(const struct repack *r)
{
	const struct seq *s = r->seq;

	return s->dead || s->state == SEQ_CLOSING || s->epoch != r->epoch;
}

static void commit_lost(struct repack *r)
{
	for (unsigned i = 0; i < r->n; i++)
		if (r->failed[i])
			mover_lost(r->seq, r->src[i], r->from, r->failed[i]);
}

static void commit(struct repack *r)
{
	struct seq *s = r->seq;
	struct core *c = r->core;
	struct page *p = r->dst;
	int e = r->error;

	page_ref(p);
	if (!e)
		e = page_set_copy(&c->pages, p, r->to, r->addr);
	/* Dropped by a plan or cut by a truncation while it was on its way. */
	if (stale(r) || (r->whole && !index_lists(&s->ix, p))) {
		if (!e && r->whole)
			page_free_copy(&c->pages, p, r->to);
		e = -ESTALE;
	}
	if (!e && !r->whole)
		e = index_list_page(&s->ix, p);
	if (!e && r->to == KVT_TIER_DRAM)
		direct_add(&s->ix, p); /* a whole page was listed before it came up */
	if (!e && r->sum)
		page_set_sum(&c->pages, p, TAKE_PTR(r->sum));
	if (!e && r->to < r->from) { /* what is below stays */
		index_copy(&s->ix, p, r->from, r->to);
		c->stat.rows_promoted[r->to] += p->rows;
		feed_move(s, r->from, r->to, p->lane, p->rows, p->bytes);
	} else if (!e) {
		index_move(&s->ix, p, r->from, r->to);
		if (r->from == r->to) {
			/* All that lived in the sources lives here now. */
			for (unsigned i = 0; i < r->n; i++)
				index_unlist(&s->ix, &c->pages, r->src[i]);
		} else {
			settle_moved(s);
			c->stat.rows_demoted[r->to] += p->rows;
			feed_move(s, r->from, r->to, p->lane, p->rows, p->bytes);
		}
	}
	if (!e)
		limbo_enter(c, TAKE_PTR(r->limbo), p);
	page_unref(&c->pages, p);
	if (r->to < r->from && e == -ENOSPC)
		recall_pull_stop(s);
	else if (e == -ENOSPC)
		c->stat.miss_nospace++;
	if (!stale(r))
		commit_lost(r);
}

static void commit_and_sweep(struct repack *r)
{
	struct seq *s = r->seq;
	uint32_t lane = r->dst->lane;
	struct core *c = r->core;

	s->refs++;
	commit(r);
	finish(r);
	if (!s->dead && s->state != SEQ_CLOSING) {
		index_sweep(&s->ix, &c->pages, lane);
		if (!s->recount) {
			s->recount = true;
			s->refs++;
			STAILQ_INSERT_TAIL(&c->recounts, s, recounts);
		}
	}
	seq_unref(s);
}

static void finish_or_park(struct repack *r)
{
	struct seq *s = r->seq;

	if (!s->dead && plan_lent(s) && s->plan->phase == PHASE_DECIDE)
		STAILQ_INSERT_TAIL(&s->parked, r, link);
	else
		commit_and_sweep(r);
}

void repack_unpark(struct seq *s)
{
	struct repack *r;

	while ((r = STAILQ_FIRST(&s->parked))) {
		STAILQ_REMOVE_HEAD(&s->parked, link);
		commit_and_sweep(r);
	}
}

static void write_end(struct pio *io)
{
	struct repack *r = io->owner;

	r->error = io->io.res;
	r->addr = io->io.addr;
	pio_free(io);
	finish_or_park(r);
}

/* false: no buffer now. */
static bool try_write(struct repack *r)
{
	struct pio *io;
	int e;

	if (!r->error && stale(r))
		r->error = -ESTALE; /* nothing was written: there is no place to give back */
	if (r->error) {
		finish_or_park(r);
		return true;
	}
	io = pio_new(r->core, r->dst, r->to, write_end, r);
	if (io)
		io->background = true;
	e = io ? pio_prepare(io, r->seq) : -ENOMEM;
	if (e < 0) {
		if (io) {
			io->io.buf = NULL;
			pio_free(io);
		}
		if (e == -EAGAIN)
			return false;
		r->error = e;
		finish_or_park(r);
		return true;
	}
	memcpy(io->io.buf, r->buf, r->dst->bytes);
	pio_write(io);
	return true;
}

void repack_pump(struct core *c)
{
	struct repack *r;

	while ((r = STAILQ_FIRST(&c->repack_wait))) {
		STAILQ_REMOVE_HEAD(&c->repack_wait, link);
		if (!try_write(r)) {
			STAILQ_INSERT_HEAD(&c->repack_wait, r, link);
			return;
		}
	}
}

/* ---- starting -------------------------------------------------------------------------- */

static struct page *make_dst(struct seq *s, const struct page *like, uint32_t first, const uint64_t *take,
			     uint32_t span)
{
	struct page *p = page_new(&s->core->pages, s->origin, like->lane, first, span);
	uint32_t rows = 0;

	if (!p)
		return NULL;
	for (uint32_t w = 0; w < span; w++) {
		p->pos[w] = take[w];
		rows += (uint32_t)__builtin_popcountll(take[w]);
	}
	p->rows = (uint8_t)rows;
	p->epoch = s->epoch;
	p->bytes = rows * (like->bytes / like->rows);
	return p;
}

int repack_start(struct seq *s, struct page *const *src, unsigned n, int from, int to, bool whole,
		 uint32_t first, const uint64_t *take, uint32_t span)
{
	struct core *c = s->core;
	struct repack *r;
	unsigned made = 0;

	/* Nobody has told yet where in a row V begins: planes can be moved, but not taken apart. */
	if (!whole && !s->model && !planted("orphan-taken-apart"))
		return -ENODATA;
	r = calloc(1, sizeof(*r));
	if (!r)
		return -ENOMEM;
	r->core = c;
	r->seq = s;
	r->epoch = s->epoch;
	r->from = from;
	r->to = to;
	r->whole = whole;
	r->addr = TIER_ADDR_NONE;
	r->n = n;
	r->k_bytes = s->model ? s->model->layer[s->model->lane_layer[src[0]->lane]].k_bytes : 0;
	if (to == KVT_TIER_DRAM)
		r->keys = recall_shape(s, src[0]->lane);
	r->dst = whole ? src[0] : make_dst(s, src[0], first, take, span);
	r->buf = r->dst ? malloc(r->dst->bytes) : NULL;
	for (; r->buf && made < n; made++) {
		r->read[made] = pio_new(c, src[made], from, read_end, r);
		if (!r->read[made])
			break;
		r->read[made]->background = true;
	}
	if (made < n || (to == KVT_TIER_NVME && limbo_begin(s, src, n, from, &r->limbo) < 0)) {
		while (made--)
			pio_free(r->read[made]);
		if (r->dst && !whole) {
			page_pin(r->dst);
			page_unpin(&c->pages, r->dst);
		}
		free(r->buf);
		free(r);
		return -ENOMEM;
	}
	s->refs++;
	s->repacks++;
	c->background_bytes += r->dst->bytes;
	page_pin(r->dst);
	r->reading = n;
	for (unsigned i = 0; i < n; i++) {
		r->src[i] = src[i];
		r->limit[i] = index_limit(&s->ix, src[i]->epoch);
		src[i]->moving = true;
		page_pin(src[i]);
	}
	for (unsigned i = 0; i < n; i++)
		pio_read(r->read[i]);
	return 0;
}
