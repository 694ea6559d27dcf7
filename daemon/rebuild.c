/* SPDX-License-Identifier: MIT */
/*
 * What of the pages that a restart found is believed: those that the ledger, or else the newest note, does not
 * cut off; of pages with the same rows in one tier the newest. A page that was rewritten is found beside the
 * one that took its rows when the daemon died after that one's seal and before its own end reached the disk.
 */
#include <stdlib.h>
#include <string.h>
#include "daemon/internal.h"
#include "daemon/ledger.h"
#include "daemon/restart.h"
#include "shm/trial.h"
#include "shm/util.h"

/* Pages that cannot be believed leave the list. Returns the rows that the others reach. */
static uint32_t drop_stale(struct core *c, struct seq *s, uint32_t oldest)
{
	uint32_t rows = 0;

	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		struct lane_pages *lp = &s->ix.lane[l];
		uint32_t out = 0;

		for (uint32_t i = 0; i < lp->n; i++) {
			struct page *p = lp->v[i];

			if (p->epoch < oldest) {
				c->stat.miss_stale++;
				page_unref(&c->pages, p);
				continue;
			}
			lp->v[out++] = p;
			for (uint32_t w = p->span; w--;)
				if (p->pos[w]) {
					uint32_t end =
						p->first + w * 64 + 64 - (uint32_t)__builtin_clzll(p->pos[w]);

					rows = MAX(rows, MIN(end, index_limit(&s->ix, p->epoch)));
					break;
				}
		}
		lp->n = out;
	}
	return rows;
}

/* The rows of the lane that have a copy in this tier. */
static void mark_copies(struct core *c, struct seq *s, uint32_t lane, int tier)
{
	for (uint32_t i = 0; i < s->ix.lane[lane].n; i++) {
		struct page *p = s->ix.lane[lane].v[i];

		if (!page_in(p, tier))
			continue;
		index_mark(&s->ix, p, tier, true);
		c->stat.returned[tier] += p->bytes;
	}
}

static int newest_first(const void *a, const void *b)
{
	const struct page *x = *(struct page *const *)a, *y = *(struct page *const *)b;

	return x->number > y->number ? -1 : x->number < y->number;
}

/* Rows of the page that are not in `taken`; they are from now on. */
static uint32_t take_rows(const struct index *ix, const struct page *p, int tier, uint64_t *taken)
{
	uint64_t mask[PAGE_SPAN];
	uint32_t n = 0;

	index_alive(ix, p, tier, mask);
	for (uint32_t w = 0; w < p->span; w++)
		for (uint64_t b = mask[w]; b; b &= b - 1) {
			uint32_t pos = p->first + w * 64 + (uint32_t)__builtin_ctzll(b);

			n += !bits_test(taken, pos);
			bits_set(taken, pos);
		}
	return n;
}

/* Pages of the lane whose rows are all in newer ones of this tier go. The rows are marked. -ENOMEM. */
static int keep_newest(struct core *c, struct seq *s, uint32_t lane, int tier)
{
	const struct lane_pages *lp = &s->ix.lane[lane];
	_cleanup_free_ struct page **page = NULL;
	_cleanup_free_ uint64_t *taken = NULL;
	uint64_t rows = 0;
	uint32_t n = 0;

	for (uint32_t i = 0; i < lp->n; i++)
		rows += index_alive(&s->ix, lp->v[i], tier, NULL);
	if (rows == bits_rank(index_bits(&s->ix, tier, lane), s->ix.rows) || planted("restart-keeps-both"))
		return 0;
	page = calloc(lp->n, sizeof(struct page *));
	taken = calloc(s->ix.words, sizeof(*taken));
	if (!page || !taken)
		return -ENOMEM;
	for (uint32_t i = 0; i < lp->n; i++)
		if (page_in(lp->v[i], tier))
			page[n++] = lp->v[i];
	qsort(page, n, sizeof(struct page *), newest_first);
	for (uint32_t i = 0; i < n; i++)
		if (!take_rows(&s->ix, page[i], tier, taken)) {
			c->stat.returned[tier] -= page[i]->bytes;
			page_free_copy(&c->pages, page[i], tier);
		}
	index_sweep(&s->ix, &c->pages, lane);
	return 0;
}

/* Index and counts of a sequence whose pages reach `rows` rows. */
static int list_rows(struct core *c, struct seq *s, uint32_t rows)
{
	int r = index_extend(&s->ix, rows);

	if (r < 0)
		return r;
	s->rows = s->scored = rows;
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		bits_clear_range(index_bits(&s->ix, KVT_TIER_DEVICE, l), 0, rows);
		s->ix.resident[l] = 0;
		for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
			mark_copies(c, s, l, t);
			/* Keys are not kept: all rows are equal until they are scored again. */
			bits_for_each(i, index_bits(&s->ix, t, l), rows)
				s->ix.key[(size_t)l * s->ix.cap + i] = 1;
		}
		/* Sweeps, so not before all tiers are marked. */
		for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
			r = keep_newest(c, s, l, t);
			if (r < 0)
				return r;
		}
	}
	return 0;
}

int restart_rebuild(struct core *c, struct seq *s)
{
	static struct note n; /* start-up only */
	uint32_t oldest = s->epoch, rows;
	const struct ledger_entry *e = ledger_of(s);
	bool lives = s->place != LEDGER_NONE; /* whatever is left of it */
	int r = 0;

	if (e && e->epoch >= s->epoch) {
		s->epoch = e->epoch;
		oldest = e->oldest;
		for (uint32_t i = 0; i < e->n && !r; i++)
			r = index_mark_epoch(&s->ix, e->mark[i].epoch, e->mark[i].start);
		if (r < 0)
			return r;
	} else {
		r = restart_find_note(c, s, &n);
		if (r == -ENOMEM)
			return r;
		oldest = r ? oldest : n.pad;
		lives |= !r;
		for (uint32_t i = 0; !r && i < n.n && !planted("restart-skips-epoch-cut"); i++)
			r = index_mark_epoch(&s->ix, n.mark[i].epoch, n.mark[i].start);
		if (r == -ENOMEM)
			return r;
	}
	rows = drop_stale(c, s, oldest);
	if (!rows && (!lives || planted("restart-frees-the-empty")))
		return -ENOENT;
	if (!rows)
		(void)drop_stale(c, s, UINT32_MAX); /* all are cut */
	r = rows ? list_rows(c, s, rows) : 0;
	if (r < 0)
		return r;
	s->expires_ns = now_ns() + (uint64_t)s->ttl_s * 1000000000u;
	r = ledger_return(s);
	if (r < 0)
		return r;
	seq_recount(s);
	return 0;
}
