/* SPDX-License-Identifier: MIT */
/*
 * In: the rows of a plan's bring_in. Whole pages are read, checked by a worker
 * and only then are the wanted rows written to the lane's stage slots, in
 * ascending position: slot = cap + rank among the lane's promoted rows.
 *
 * An imported file is written by a thread of its tenant. A write needs the
 * inode's lock, and the file's owner can sit on that for as long as it likes (by
 * a write of its own from memory that never arrives); shared workers would
 * wait with it. The page is copied first, so that no tier's buffer waits either.
 */
#include <string.h>
#include "daemon/internal.h"
#include "daemon/usdt.h"
#include "shm/trial.h"
#include "shm/util.h"

#define JOB_PAGES 32u

struct write_job {
	struct job job;
	struct pio *io;
	char data[]; /* the checked page */
};

struct in_job {
	struct job job;
	unsigned n;
	struct pio *io[JOB_PAGES];          /* of any plans of one tenant, who is charged */
	struct write_job *write[JOB_PAGES]; /* of those in imported regions */
};

static bool imported(const struct plan *p)
{
	return p->region->ops == &device_fd_ops;
}

/* Write the wanted rows of one checked page, in runs of neighbouring slots. */
static int scatter(const struct plan *p, const struct pio *io, const void *data)
{
	const struct seq *s = p->seq;
	const struct page *page = io->page;
	const uint64_t *in = p->t.bring_in + (uint64_t)page->lane * p->words;
	uint32_t cap = s->layout[s->model->lane_layer[page->lane]].cap;
	uint32_t pick[PAGE_ROWS], n = 0, first = 0, row = 0, at = page->first, rank = bits_rank(in, at);
	struct device_lane lane;
	int r = 0;

	seq_lane(s, page->lane, &lane);
	for (uint32_t w = 0; w < page->span && !r; w++, at += 64) {
		uint64_t all = index_window(in, p->words, at);

		for (uint64_t rows = page->pos[w]; rows && !r; rows &= rows - 1, row++) {
			uint64_t bit = rows & -rows;
			uint32_t slot = cap + rank + (uint32_t)__builtin_popcountll(all & (bit - 1));

			if (!(io->words[w] & bit))
				continue;
			if (n && slot != first + n) {
				r = p->region->ops->scatter(p->region->mem, &lane, data, page->rows, pick,
							    first, n);
				n = 0;
			}
			if (!n)
				first = slot;
			pick[n++] = row;
		}
		rank += (uint32_t)__builtin_popcountll(all);
	}
	if (n && !r)
		r = p->region->ops->scatter(p->region->mem, &lane, data, page->rows, pick, first, n);
	return r;
}

static void in_run(struct job *j, struct worker_ctx *w)
{
	struct in_job *b = container_of(j, struct in_job, job);

	for (unsigned i = 0; i < b->n; i++) {
		struct pio *io = b->io[i];

		const struct plan *p = io->owner;

		if (!io->segment && !page_verify(io->page, io->io.buf) &&
		    !(io->tier == KVT_TIER_DRAM && planted("dram-unchecked")) &&
		    !(io->tier == KVT_TIER_NVME && planted("nvme-unchecked"))) {
			io->error = -EBADMSG;
		} else if (p->win) {
			io->error = window_pack(p, io);
			io->refused = io->error < 0;
		} else if (!imported(io->owner)) {
			io->error = scatter(io->owner, io, io->io.buf);
			io->refused = io->error < 0;
		} else {
			b->write[i] = malloc(sizeof(*b->write[i]) + io->page->bytes);
			if (b->write[i])
				memcpy(b->write[i]->data, io->io.buf, io->page->bytes);
			else
				io->error = -ENOMEM;
		}
	}
}

static void write_run(struct job *j, struct worker_ctx *ctx)
{
	struct write_job *w = container_of(j, struct write_job, job);

	w->io->error = scatter(w->io->owner, w->io, w->data);
	w->io->refused = w->io->error < 0;
}

static void in_finish(struct pio *io)
{
	struct plan *p = io->owner;
	struct seq *s = p->seq;
	int r = io->error;

	if (io->refused || r == -ENOMEM) {
		p->error = r; /* no room in the region or none here, a file that cannot be written: no miss */
	} else if (r < 0) {
		p->missed = true;
		if (s->state != SEQ_CLOSING)
			mover_lost(s, io->page, io->tier, r);
	} else if (p->win && io->nth != WINDOW_NO_RECORD) {
		p->win->record[io->nth].done = true;
	}
	pio_free(io);
	plan_unref(p);
}

static void write_done(struct job *j)
{
	struct write_job *w = container_of(j, struct write_job, job);

	in_finish(w->io);
	free(w);
}

static void write_put(struct write_job *w, struct pio *io)
{
	const struct plan *p = io->owner;

	pio_release(io);
	w->job = (struct job){.run = write_run, .done = write_done, .bytes = io->page->bytes};
	w->io = io;
	workers_put(p->region->tenant->writer, &w->job);
}

static void in_done(struct job *j)
{
	struct in_job *b = container_of(j, struct in_job, job);
	struct core *c = b->io[0]->core;

	c->in_jobs--;
	mover_in_flush(c);

	for (unsigned i = 0; i < b->n; i++) {
		struct plan *p = b->io[i]->owner; /* stays: while it moves the mover has a reference */

		if (b->write[i])
			write_put(b->write[i], b->io[i]);
		else
			in_finish(b->io[i]);
		if (p->win && (i + 1 == b->n || b->io[i + 1]->owner != p))
			window_stage(p);
	}
	free(b);
}

static void put_batch(struct core *c, struct tenant *t)
{
	struct in_job *b = TAKE_PTR(t->in_batch);

	c->in_jobs++;
	b->job.run = in_run;
	b->job.done = in_done;
	b->job.tenant = t->index;
	workers_put(c->workers, &b->job);
}

/* Reads end one by one; while the workers are busy anyway batches may grow. */
void mover_in_flush(struct core *c)
{
	for (uint32_t i = 0; i < c->tenants && c->in_jobs < workers_count(c->workers); i++) {
		c->in_turn = (c->in_turn + 1) % c->tenants;
		if (c->tenant[c->in_turn].in_batch)
			put_batch(c, &c->tenant[c->in_turn]);
	}
}

/* To a worker. */
static void in_put(struct pio *io)
{
	struct tenant *t = ((struct plan *)io->owner)->seq->tenant;
	struct in_job *b = t->in_batch;

	if (!b)
		b = t->in_batch = calloc(1, sizeof(*b));
	if (!b) {
		io->error = -ENOMEM;
		in_finish(io);
		return;
	}
	b->io[b->n++] = io;
	b->job.bytes += io->page->bytes;
	if (b->n == JOB_PAGES)
		put_batch(io->core, t);
}

static void in_end(struct pio *io)
{
	const struct plan *p = io->owner;

	if (io->io.res < 0 || p->over) {
		io->error = io->io.res;
		in_finish(io);
		return;
	}
	in_put(io);
}

/* Rows wanted back from a page that one of the last plans wrote left too early. */
static void count_refaults(struct seq *s, const struct page *page, int tier, const uint64_t *mask)
{
	const unsigned kept = ARRAY_SIZE(s->recent_page);
	unsigned back = 0; /* plans ago that the page was written */
	uint32_t n = 0, rows;

	while (back < kept && page->number < s->recent_page[(s->nonce - back) % kept])
		back++;
	if (back == kept)
		return;
	for (uint32_t w = 0; w < page->span; w++)
		n += (uint32_t)__builtin_popcountll(mask[w]);
	rows = s->recent_rows[(s->nonce - back) % kept];
	s->refaults += n;
	s->core->stat.refaults[tier] += n;
	USDT(refault, s->handle, tier, n);
	if (back < s->nonce)
		histogram_add_n(&s->core->stat.refault_rows[tier], s->rows - MIN(s->rows, rows), n);
}

/* Ask for the pages of one tier that hold needed rows of the lane; those rows leave p->need. -EAGAIN: once
 * more.
 */
static int lane_in(struct plan *p, uint32_t lane, int tier, unsigned *made)
{
	struct seq *s = p->seq;
	struct core *c = s->core;
	struct lane_pages *lp = &s->ix.lane[lane];

	for (uint32_t i = 0; i < lp->n; i++) {
		struct page *page = lp->v[i];
		uint64_t mask[PAGE_SPAN], any = 0;
		struct pio *io;

		if (!index_alive(&s->ix, page, tier, mask))
			continue;
		for (uint32_t w = 0; w < page->span; w++) {
			mask[w] &= index_window(p->need, p->words, page->first + w * 64);
			any |= mask[w];
		}
		if (!any)
			continue;
		io = pio_new(c, page, tier, in_end, p);
		if (!io)
			return -ENOMEM;
		memcpy(io->words, mask, page->span * sizeof(uint64_t));
		if (p->win) {
			int r = window_reserve(p, io);

			if (r < 0) {
				pio_free(io);
				return r;
			}
		}
		for (uint32_t w = 0; w < page->span; w++)
			for (uint64_t m = mask[w]; m; m &= m - 1)
				bits_clear(p->need, page->first + w * 64 + (uint32_t)__builtin_ctzll(m));
		USDT(promote, s->handle, tier, KVT_TIER_DEVICE, page->lane, bits_rank(mask, page->span * 64u),
		     page->bytes);
		count_refaults(s, page, tier, mask);
		p->refs++;
		if (io->segment)
			in_put(io);
		else
			pio_read(io);
		(*made)++;
	}
	return 0;
}

unsigned mover_in(struct plan *p, unsigned pages)
{
	struct seq *s = p->seq;
	unsigned made = 0;

	for (; p->in_lane < s->ix.lanes && made < pages; p->in_lane++) {
		uint32_t l = p->in_lane;
		int r;

		if (!p->in[l])
			continue;
		if (!p->in_begun)
			memcpy(p->need, p->t.bring_in + (uint64_t)l * p->words, p->words * sizeof(uint64_t));
		p->in_begun = true;
		r = lane_in(p, l, KVT_TIER_DRAM, &made);
		if (!r)
			r = lane_in(p, l, KVT_TIER_NVME, &made);
		if (r == -EAGAIN)
			break;
		p->in_begun = false;
		if (r < 0) {
			p->error = r;
			break;
		}
		if (bits_next(p->need, 0, p->watermark) < p->watermark) {
			s->core->stat.miss_stale++;
			log_about(&s->tenant->said, 4,
				  "miss: seq %016llx lane %u: rows without a page from %u on",
				  (unsigned long long)s->handle, l, bits_next(p->need, 0, p->watermark));
			s->misses++;
			p->missed = true;
			for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
				uint64_t *on = index_bits(&s->ix, t, l);

				for (uint32_t w = 0; w < p->words; w++)
					on[w] &= ~p->need[w];
			}
			break;
		}
	}
	p->in_done = p->in_lane == s->ix.lanes || p->error || p->missed;
	return made;
}
