/* SPDX-License-Identifier: MIT */
/*
 * Rewriting: pages that lost most of their rows, and the small ones that a
 * growing sequence leaves behind at every plan, are merged with their
 * neighbours of the same lane and tier. Behind everything else, a lane at a
 * time. On nvme only pages that are mostly dead: writing costs more there than
 * a few bytes of index.
 */
#include <string.h>
#include "daemon/internal.h"
#include "shm/trial.h"
#include "shm/util.h"

#define IN_FLIGHT (UINT64_C(4) << 20) /* bytes of background moves beyond which this waits */
#define SLICE_NS UINT64_C(300000)     /* of the loop, for lanes in which there is nothing to merge */
#define WORTH_ROWS 96u                /* a merged page of so many rows is worth two old ones */
#define WORTH_PAGES 4u                /* so many pages are worth merging whatever comes out */

struct heap {
	struct page *src[REPACK_SOURCES];
	unsigned n;
	bool dead; /* holds a page that is mostly dead */
	uint32_t first, end, rows;
	uint64_t word[PAGE_SPAN];
};

static uint32_t full_rows(const struct page *p)
{
	return MIN(PAGE_ROWS, TIER_MAX_PAGE / (p->bytes / p->rows));
}

/* First and one past the last position in mask. */
static void bounds(const struct page *p, const uint64_t *mask, uint32_t *ret_first, uint32_t *ret_end)
{
	uint32_t a = 0, b = p->span;

	while (!mask[a])
		a++;
	while (!mask[b - 1])
		b--;
	*ret_first = p->first + a * 64 + (uint32_t)__builtin_ctzll(mask[a]);
	*ret_end = p->first + b * 64 - (uint32_t)__builtin_clzll(mask[b - 1]);
}

/*
 * Rows that a later life would find in dram are not put where it would not: a few short rows far from each
 * other may have more positions than there is room for beside them.
 */
static bool hides_rows(const struct seq *s, const struct heap *h, int tier)
{
	struct tier *t = s->core->pages.tier[tier];
	uint32_t bytes = h->rows * (h->src[0]->bytes / h->src[0]->rows), words = (h->end - h->first + 63) / 64;

	if (tier != KVT_TIER_DRAM || s->lifetime != KVT_LEASED || !t->ops->finds || t->ops->finds(t, bytes, h->word, words) ||
	    planted("merged-unfound"))
		return false;
	for (unsigned i = 0; i < h->n; i++)
		if (!tier_published(h->src[i]->addr[tier - 1]) &&
		    t->ops->finds(t, h->src[i]->bytes, h->src[i]->pos, h->src[i]->span))
			return true;
	return false;
}

static void flush(struct seq *s, struct heap *h, int tier)
{
	bool worth = h->n >= WORTH_PAGES || h->dead || (h->n > 1 && h->rows >= WORTH_ROWS);

	if (h->n && worth && !hides_rows(s, h, tier))
		repack_start(s, h->src, h->n, tier, tier, false, h->first, h->word,
			     (h->end - h->first + 63) / 64);
	memset(h, 0, sizeof(*h));
}

/* Pages come in ascending order of their first position, not of their first live row. */
static void add(struct seq *s, struct heap *h, struct page *p, const uint64_t *mask, uint32_t alive, bool dead)
{
	uint32_t first, end;
	int tier = page_in(p, KVT_TIER_DRAM) ? KVT_TIER_DRAM : KVT_TIER_NVME;

	bounds(p, mask, &first, &end);
	if (h->n && (h->n == REPACK_SOURCES || h->rows + alive > full_rows(p) || first < h->first ||
		     MAX(end, h->end) - h->first > PAGE_SPAN * 64))
		flush(s, h, tier);
	if (!h->n)
		h->first = first;
	for (uint32_t w = 0; w < p->span; w++)
		for (uint64_t b = mask[w]; b; b &= b - 1)
			bits_set(h->word, p->first + w * 64 + (uint32_t)__builtin_ctzll(b) - h->first);
	h->src[h->n++] = p;
	h->rows += alive;
	h->end = MAX(h->end, end);
	h->dead = h->dead || dead;
}

static void compact_lane(struct seq *s, uint32_t lane, int tier)
{
	struct lane_pages *lp = &s->ix.lane[lane];
	struct heap h = {.n = 0};

	for (uint32_t i = 0; i < lp->n; i++) {
		struct page *p = lp->v[i];
		uint64_t mask[PAGE_SPAN];
		uint32_t alive;
		bool dead;

		/*
		 * Shared pages are not ours to replace, of two copies the other would be left behind, and what
		 * is not sealed has sources that wait for it.
		 */
		if (p->moving || p->limbo || p->refs != 1 || !page_in(p, tier) ||
		    page_in(p, KVT_TIER_DRAM + KVT_TIER_NVME - tier))
			continue;
		alive = index_alive(&s->ix, p, tier, mask);
		dead = alive * 2 < p->rows;
		if (alive && (dead || (tier == KVT_TIER_DRAM && alive * 2 <= full_rows(p))))
			add(s, &h, p, mask, alive, dead);
	}
	flush(s, &h, tier);
}

void compact_start(struct seq *s)
{
	s->compact_lane = 0;
	if (s->compacting || !s->model) /* without its shape rows cannot be merged */
		return;
	s->compacting = true;
	s->refs++;
	TAILQ_INSERT_TAIL(&s->core->compacts, s, compacts);
	mover_kick(s->core);
}

void compact_stop(struct seq *s)
{
	if (!s->compacting)
		return;
	s->compacting = false;
	TAILQ_REMOVE(&s->core->compacts, s, compacts);
	seq_unref(s);
}

void compact_pump(struct core *c)
{
	uint64_t end = now_ns() + SLICE_NS;
	struct seq *s, *next;

	for (s = TAILQ_FIRST(&c->compacts); s && c->background_bytes < IN_FLIGHT; s = next) {
		next = TAILQ_NEXT(s, compacts);
		if (plan_lent(s) || s->settle || s->cut != ROWS_ALL)
			continue; /* their ends kick the pump */
		while (s->compact_lane < s->ix.lanes && c->background_bytes < IN_FLIGHT) {
			for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
				if (c->pages.tier[t])
					compact_lane(s, s->compact_lane, t);
			s->compact_lane++;
			if (now_ns() >= end) {
				mover_kick(c);
				return;
			}
		}
		if (s->compact_lane == s->ix.lanes)
			compact_stop(s);
	}
}
