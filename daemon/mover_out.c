/* SPDX-License-Identifier: MIT */
/*
 * Out: the rows of a plan's copy_out, lane by lane, gathered by workers from
 * the region into pages of the tier that the plan chose for them.
 */
#include <string.h>
#include "daemon/internal.h"
#include "shm/trial.h"
#include "shm/util.h"

#define JOB_PAGES 64u
#define JOB_BYTES (UINT64_C(1) << 20)

struct out_job {
	struct job job;
	struct plan *plan;
	unsigned n;
	struct pio *io[JOB_PAGES];
};

/* The slots of the page's rows: their rank among the rows resident now. */
static void page_slots(const struct index *ix, const struct page *p, uint32_t *slots)
{
	const uint64_t *dev = index_bits(ix, KVT_TIER_DEVICE, p->lane);
	uint32_t at = p->first, rank = bits_rank(dev, at), n = 0;

	for (uint32_t w = 0; w < p->span; w++, at += 64) {
		uint64_t here = index_window(dev, ix->words, at), rows = p->pos[w];

		for (; rows; rows &= rows - 1) {
			uint64_t below = (rows & -rows) - 1;

			slots[n++] = rank + (uint32_t)__builtin_popcountll(here & below);
		}
		rank += (uint32_t)__builtin_popcountll(here);
	}
}

/* The page's rows from the region into its buffer. */
static int gather(const struct plan *p, struct pio *io)
{
	const struct region *g = p->region;
	struct page *page = io->page;
	uint32_t slots[PAGE_ROWS];
	struct device_lane lane;
	struct page_ident id;

	page_ident(page, &id);
	page->crc = page_crc_seed(&id);
	page_slots(&p->seq->ix, page, slots);
	seq_lane(p->seq, page->lane, &lane);
	return g->ops->gather(g->mem, &lane, slots, page->rows, io->io.buf, &page->crc);
}

static void out_run(struct job *j, struct worker_ctx *w)
{
	struct out_job *o = container_of(j, struct out_job, job);

	for (unsigned i = 0; i < o->n; i++) {
		struct pio *io = o->io[i];

		io->error = o->plan->win ? window_take(o->plan, io) : gather(o->plan, io);
		if (!io->error)
			io->sum = recall_sum_make(io->keys, io->page, io->io.buf);
	}
}

/* The plan cannot be carried out; the next one leaves this tier alone if it fails there again and again. */
static void out_failed(struct plan *p, int tier, int r)
{
	struct core *c = p->seq->core;

	p->error = r;
	if (r == -EILSEQ)
		return; /* the client's doing: counted page by page */
	if (p->seq->retries)
		p->seq->avoid[tier] = true;
	if (r == -ENOSPC)
		c->stat.miss_nospace++;
	else
		c->stat.miss_io++;
}

/* Written (or not): the page enters the index when its rows still mean the same. */
static void out_end(struct pio *io)
{
	struct plan *p = io->owner;
	struct seq *s = p->seq;
	struct core *c = s->core;
	struct page *page = io->page;
	int r = io->error ? io->error : io->io.res;

	page_ref(page);
	if (!r)
		r = page_set_copy(&c->pages, page, io->tier, io->io.addr);
	if (!r && io->sum)
		page_set_sum(&c->pages, page, TAKE_PTR(io->sum));
	if (!r && s->state != SEQ_CLOSING && p->epoch == s->epoch) {
		r = index_add_page(&s->ix, page, io->tier);
		if (!r) {
			crash_point("page.indexed");
			c->stat.rows_demoted[io->tier] += page->rows;
			feed_move(s, KVT_TIER_DEVICE, io->tier, page->lane, page->rows, page->bytes);
		}
	}
	if (r < 0 && !p->error && !p->over)
		out_failed(p, io->tier, r);
	pio_free(io);
	page_unref(&c->pages, page);
	plan_unref(p);
}

static void out_done(struct job *j)
{
	struct out_job *o = container_of(j, struct out_job, job);

	o->plan->seq->core->out_jobs--;
	mover_kick(o->plan->seq->core);
	if (o->plan->win)
		window_taken(o->plan, o->io, o->n);
	for (unsigned i = 0; i < o->n; i++) {
		if (o->io[i]->error || o->plan->over) {
			if (!o->io[i]->error)
				o->io[i]->error = -ECANCELED;
			out_end(o->io[i]);
		} else {
			pio_write(o->io[i]);
		}
	}
	free(o);
}

/* 1 a page was prepared into *ret, 0 no more, -errno. */
static int next_page(struct plan *p, struct pio **ret)
{
	struct seq *s = p->seq;
	struct core *c = s->core;
	struct cut cut;
	struct page *page;
	struct pio *io;
	int r;

	if (p->win && window_waits(p->win))
		return -EAGAIN;
	if (!cut_find(p, &p->cut, &cut))
		return 0;
	page = page_new(&c->pages, s->origin, p->cut.lane, cut.first, cut.span);
	if (!page)
		return -ENOMEM;
	memcpy(page->pos, cut.word, cut.span * sizeof(uint64_t));
	page->rows = (uint8_t)cut.rows;
	page->epoch = p->epoch;
	page->bytes = cut.rows * lane_bytes(s->model, p->cut.lane);
	page_ref(page);
	io = pio_new(c, page, p->cut.tier, out_end, p);
	page_unref(&c->pages, page);
	if (!io)
		return -ENOMEM;
	r = pio_prepare(io, s);
	if (r < 0) {
		io->io.buf = NULL;
		pio_free(io);
		return r;
	}
	p->cut.pos = cut.end;
	if (p->win)
		io->nth = p->win->next++;
	if (p->cut.tier == KVT_TIER_DRAM)
		io->keys = recall_shape(s, p->cut.lane);
	*ret = io;
	return 1;
}

static void put_job(struct plan *p, struct out_job *o)
{
	struct core *c = p->seq->core;

	o->plan = p;
	o->job.run = out_run;
	o->job.done = out_done;
	o->job.tenant = p->seq->tenant->index;
	c->out_jobs++;
	workers_put(c->workers, &o->job);
}

unsigned mover_out(struct plan *p, unsigned pages)
{
	struct out_job *o = NULL;
	struct core *c = p->seq->core;
	unsigned made = 0;
	int r = 1;

	/* Buffers come back one by one; while the workers are busy anyway, let them gather for a fair job. */
	if (c->out_jobs >= 2 * workers_count(c->workers))
		return 0;
	while (made < pages) {
		struct pio *io;

		r = next_page(p, &io);
		if (r <= 0)
			break;
		made++;
		p->refs++;
		if (!o)
			o = calloc(1, sizeof(*o));
		if (!o) {
			io->error = r = -ENOMEM;
			out_end(io);
			break;
		}
		o->io[o->n++] = io;
		o->job.bytes += io->page->bytes;
		if (o->n == JOB_PAGES || o->job.bytes >= JOB_BYTES) {
			put_job(p, o);
			o = NULL;
		}
	}
	if (o)
		put_job(p, o);
	if (!r) {
		p->out_done = true;
	} else if (r < 0 && r != -EAGAIN) {
		out_failed(p, p->cut.tier, r);
		p->out_done = true;
	}
	return made;
}
