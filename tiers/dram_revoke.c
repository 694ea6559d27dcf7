/* SPDX-License-Identifier: MIT */
/*
 * Published segments that the host wants back. They can not be punched, so whole ones are chosen; their pages
 * are their owner's to move; and a segment goes when no page lies in it and the kernel says that no process has
 * it, open or mapped, but ours. Nobody's word is taken for that. Until then it stays its owner's, who gets no
 * new places meanwhile.
 */
#include "tiers/dram.h"

#define PROBES 32u /* segments asked for in one call: three system calls each */
#define LATE_NS (TIER_REVOKE_MS * UINT64_C(1000000))

static uint32_t taken_slabs(const struct dram_seg *s, uint32_t i)
{
	const struct alloc_seg *a = &s->pool->alloc[s->node].seg[i];

	return a->slabs - a->pooled;
}

bool dram_vacated(const struct dram_seg *s, uint32_t i)
{
	return s->revoked_ns && !taken_slabs(s, i);
}

static bool can_go(const struct dram_seg *s)
{
	return s->pool && s->pool->owner && !s->revoked_ns && dram_warm(s);
}

/* The owner with the most that was not chosen yet. */
static struct pool *richest(struct dram *d)
{
	struct pool *p, *most = NULL;

	LIST_FOREACH(p, &d->pools, link)
		if (p->mapped > p->revoked && (!most || p->mapped - p->revoked > most->mapped - most->revoked))
			most = p;
	return most;
}

/* Of that owner's the one in which the least lies; NULL: none has memory. */
static struct dram_seg *emptiest(struct dram *d, const struct pool *p)
{
	struct dram_seg *best = NULL;
	uint32_t least = UINT32_MAX;

	for (uint32_t i = 0; i < d->top; i++)
		if (can_go(&d->slot[i]) && d->slot[i].pool == p && taken_slabs(&d->slot[i], i) < least) {
			best = &d->slot[i];
			least = taken_slabs(best, i);
		}
	return best;
}

uint64_t dram_revoke(struct tier *t, uint64_t bytes)
{
	struct dram *d = dram_of(t);
	uint64_t chosen = 0;

	while (chosen < bytes) {
		struct pool *p = richest(d);
		struct dram_seg *s = p ? emptiest(d, p) : NULL;

		if (!s)
			break;
		s->revoked_ns = now_ns();
		p->revoked += s->bytes;
		chosen += dram_warm(s);
	}
	return chosen;
}

bool dram_revoked(struct tier *t, tier_addr addr)
{
	const struct dram *d = dram_of(t);
	uint32_t number = tier_segment(addr), i = number % DRAM_SLOTS;

	return tier_published(addr) && i < d->top && d->slot[i].pool && d->slot[i].revoked_ns &&
	       d->slot[i].gen == number >> DRAM_SLOT_BITS;
}

uint64_t dram_reclaim(struct tier *t)
{
	struct dram *d = dram_of(t);
	uint64_t before = d->warm;

	for (uint32_t n = 0, probes = 0; n < DRAM_SLOTS && probes < PROBES; n++) {
		uint32_t i = d->next_probe++ % DRAM_SLOTS;
		struct dram_seg *s = &d->slot[i];
		struct pool *p = s->pool;

		if (i >= d->top || !p || !s->revoked_ns || taken_slabs(s, i))
			continue;
		probes++;
		if (seg_alone(s->seg.fd) == 1) {
			dram_give_back(d, i);
			dram_pool_end(d, p);
		}
	}
	return before - d->warm;
}

void dram_revoke_end(struct dram *d)
{
	for (uint32_t i = 0; i < d->top; i++)
		if (d->slot[i].pool && d->slot[i].revoked_ns) {
			d->slot[i].pool->revoked -= d->slot[i].bytes;
			d->slot[i].revoked_ns = 0;
			if (!d->slot[i].pool->held)
				dram_pool_release(d, d->slot[i].pool);
		}
}

void dram_revoke_stat(const struct dram *d, const struct pool *p, uint64_t *ret_all, uint64_t *ret_late)
{
	uint64_t now = now_ns();

	*ret_all = *ret_late = 0;
	for (uint32_t i = 0; i < d->top; i++) {
		const struct dram_seg *s = &d->slot[i];

		if (!s->pool || !s->revoked_ns || (p && s->pool != p))
			continue;
		*ret_all += dram_warm(s);
		*ret_late += now - s->revoked_ns > LATE_NS ? dram_warm(s) : 0;
	}
}
