/* SPDX-License-Identifier: MIT */
/*
 * Out: the rows of a plan's copy_out, lane by lane, gathered by workers from
 * the region into pages of the tier that the plan chose for them.
 */
#include <string.h>
#include "daemon/internal.h"
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

static void out_run(struct job *j, struct worker_ctx *w)
{
	struct out_job *o = container_of(j, struct out_job, job);
	const struct region *g = o->plan->region;
	struct seq *s = o->plan->seq;
	uint32_t slots[PAGE_ROWS];

	for (unsigned i = 0; i < o->n; i++) {
		struct page *p = o->io[i]->page;
		struct device_lane lane;
		struct page_ident id;

		page_ident(p, &id);
		p->crc = page_crc_seed(&id);
		page_slots(&s->ix, p, slots);
		seq_lane(s, p->lane, &lane);
		o->io[i]->error = g->ops->gather(g->mem, &lane, slots, p->rows, o->io[i]->io.buf, &p->crc);
		if (!o->io[i]->error)
			o->io[i]->sum = recall_sum_make(o->io[i]->keys, p, o->io[i]->io.buf);
	}
}

/* The plan cannot be carried out; the next one leaves this tier alone if it fails there again and again. */
static void out_failed(struct plan *p, int tier, int r)
{
	struct core *c = p->seq->core;

	p->error = r;
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

/* Rows of the lane that leave for this tier. */
static uint64_t out_rows(const struct plan *p, uint32_t lane, int tier, uint32_t word)
{
	uint64_t i = (uint64_t)lane * p->words + word, dram = p->to_dram[i];

	return p->t.copy_out[i] & (tier == KVT_TIER_DRAM ? dram : ~dram);
}

/* Keep the lowest n set bits. */
static uint64_t lowest(uint64_t v, uint32_t n)
{
	uint64_t rest = v;

	while (n-- && rest)
		rest &= rest - 1;
	return v & ~rest;
}

struct cut {
	uint64_t word[PAGE_SPAN + 1];
	uint32_t first, span, rows, end; /* end: where the next page may begin */
};

/* The next page of (lane, tier) from position `pos` on; rows 0: none. */
static void next_cut(const struct plan *p, uint32_t lane, int tier, uint32_t pos, uint32_t max_rows,
		     struct cut *c)
{
	uint32_t w = pos / 64, shift, n = 0;
	uint64_t v = 0;

	c->rows = 0;
	for (; w < p->words; w++) {
		v = out_rows(p, lane, tier, w);
		if (w == pos / 64)
			v &= ~UINT64_C(0) << (pos % 64);
		if (v)
			break;
	}
	if (w >= p->words)
		return;
	shift = (uint32_t)__builtin_ctzll(v);
	c->first = w * 64 + shift;
	memset(c->word, 0, sizeof(c->word));
	for (; w < p->words && n < PAGE_SPAN && c->rows < max_rows; w++, n++) {
		if (n)
			v = out_rows(p, lane, tier, w);
		v = lowest(v, max_rows - c->rows);
		c->rows += (uint32_t)__builtin_popcountll(v);
		c->word[n] |= v >> shift;
		if (shift && n)
			c->word[n - 1] |= v << (64 - shift);
		if (v) {
			c->end = w * 64 + 64 - (uint32_t)__builtin_clzll(v);
			c->span = (c->end - c->first + 63) / 64;
		}
	}
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

	for (;;) {
		if (p->out_lane == s->ix.lanes)
			return 0;
		next_cut(p, p->out_lane, p->out_tier, p->out_pos,
			 MIN(PAGE_ROWS, TIER_MAX_PAGE / lane_bytes(s->model, p->out_lane)), &cut);
		if (cut.rows)
			break;
		p->out_pos = 0;
		if (p->out_tier++ == KVT_TIER_NVME) {
			p->out_tier = KVT_TIER_DRAM;
			p->out_lane++;
		}
	}
	page = page_new(&c->pages, s->origin, p->out_lane, cut.first, cut.span);
	if (!page)
		return -ENOMEM;
	memcpy(page->pos, cut.word, cut.span * sizeof(uint64_t));
	page->rows = (uint8_t)cut.rows;
	page->epoch = p->epoch;
	page->bytes = cut.rows * lane_bytes(s->model, p->out_lane);
	page_ref(page);
	io = pio_new(c, page, p->out_tier, out_end, p);
	page_unref(&c->pages, page);
	if (!io)
		return -ENOMEM;
	r = pio_prepare(io, s);
	if (r < 0) {
		io->io.buf = NULL;
		pio_free(io);
		return r;
	}
	p->out_pos = cut.end;
	if (p->out_tier == KVT_TIER_DRAM)
		io->keys = recall_shape(s, p->out_lane);
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
		out_failed(p, p->out_tier, r);
		p->out_done = true;
	}
	return made;
}
