/* SPDX-License-Identifier: MIT */
/*
 * Rows that only nvme holds come up to dram when recalls are announced, for that is where recall searches.
 * Their nvme copies stay, so letting go of them again writes nothing. One pass, page by page, behind plans and
 * moves down, and as far as quota and dram's low watermark allow; the next plan places rows by its budgets
 * again.
 */
#include "daemon/internal.h"
#include "shm/util.h"

#define IN_FLIGHT (UINT64_C(8) << 20) /* bytes of background moves */
#define SLICE_NS UINT64_C(300000)     /* of the loop, for lanes in which nothing is to come up */

void recall_pull(struct seq *s)
{
	struct core *c = s->core;

	s->pull_lane = s->pull_at = 0;
	if (s->pulling || !c->pages.tier[KVT_TIER_NVME] || !c->pages.tier[KVT_TIER_DRAM])
		return;
	s->pulling = true;
	s->refs++;
	TAILQ_INSERT_TAIL(&c->pulls, s, pulls);
	mover_kick(c);
}

void recall_pull_stop(struct seq *s)
{
	if (!s->pulling)
		return;
	s->pulling = false;
	TAILQ_REMOVE(&s->core->pulls, s, pulls);
	seq_unref(s);
}

/* Does this page hold a row that is nowhere above? Shared pages are their other sequences' too. */
static bool wanted(const struct seq *s, const struct page *p)
{
	const uint64_t *dev = index_bits(&s->ix, KVT_TIER_DEVICE, p->lane);
	const uint64_t *dram = index_bits(&s->ix, KVT_TIER_DRAM, p->lane);
	uint64_t mask[PAGE_SPAN], only = 0;

	if (page_in(p, KVT_TIER_DRAM) || !page_in(p, KVT_TIER_NVME) || p->moving || p->refs != 1 ||
	    p->origin != s->origin || !index_alive(&s->ix, p, KVT_TIER_NVME, mask))
		return false;
	for (uint32_t w = 0; w < p->span; w++)
		only |= mask[w] & ~index_window(dev, s->ix.words, p->first + w * 64) &
			~index_window(dram, s->ix.words, p->first + w * 64);
	return only != 0;
}

static bool full(const struct seq *s)
{
	struct core *c = s->core;
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];
	uint64_t used = c->pages.used[KVT_TIER_DRAM][s->origin->charge] +
			direct_held(c, s->origin->charge, direct_owner_of(s));
	struct tier_stat st;

	t->ops->stat(t, &st);
	return st.free < st.capacity / 1000 * c->cfg.dram_marks.low + c->background_bytes ||
	       used + c->background_bytes >= s->tenant->limit.dram_bytes;
}

enum pull { PULLED, BUSY, LATE };

/* Go on with one sequence. PULLED: it has all that it may have. */
static enum pull pull(struct seq *s, uint64_t end)
{
	struct core *c = s->core;

	if (s->state != SEQ_LIVE)
		return PULLED;
	for (; s->pull_lane < s->ix.lanes; s->pull_lane++, s->pull_at = 0) {
		const struct lane_pages *lp = &s->ix.lane[s->pull_lane];

		for (uint32_t i = index_from(lp, s->pull_at); i < lp->n; i++) {
			struct page *p = lp->v[i];

			s->pull_at = p->first;
			if (i % 64 == 63 && now_ns() >= end)
				return LATE;
			if (!wanted(s, p))
				continue;
			if (full(s))
				return PULLED;
			if (c->background_bytes >= IN_FLIGHT)
				return BUSY;
			if (repack_start(s, &p, 1, KVT_TIER_NVME, KVT_TIER_DRAM, true, 0, NULL, 0) < 0)
				return PULLED;
		}
		if (now_ns() >= end) {
			s->pull_lane++;
			s->pull_at = 0;
			return LATE;
		}
	}
	return PULLED;
}

void recall_pump(struct core *c)
{
	uint64_t end = now_ns() + SLICE_NS;
	struct seq *s, *next;

	for (s = TAILQ_FIRST(&c->pulls); s && c->background_bytes < IN_FLIGHT; s = next) {
		enum pull r;

		next = TAILQ_NEXT(s, pulls);
		if (plan_lent(s) || s->settle || s->cut != ROWS_ALL)
			continue; /* their ends kick the pump */
		r = pull(s, end);
		if (r == PULLED)
			recall_pull_stop(s);
		if (r == LATE) {
			mover_kick(c);
			return;
		}
	}
}
