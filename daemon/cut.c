/* SPDX-License-Identifier: MIT */
/*
 * How the rows that a plan copies out are cut into pages: lane by lane, dram before nvme, ascending, each page
 * as long as it may be. The mover makes pages by it and a window's list names them by it, so both count alike.
 */
#include <string.h>
#include "daemon/internal.h"

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

/* The next page of (lane, tier) from position `pos` on; rows 0: none. */
static void next_cut(const struct plan *p, const struct cut_at *at, uint32_t max_rows, struct cut *c)
{
	uint32_t w = at->pos / 64, shift, n = 0;
	uint64_t v = 0;

	c->rows = 0;
	for (; w < p->words; w++) {
		v = out_rows(p, at->lane, at->tier, w);
		if (w == at->pos / 64)
			v &= ~UINT64_C(0) << (at->pos % 64);
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
			v = out_rows(p, at->lane, at->tier, w);
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

bool cut_find(const struct plan *p, struct cut_at *at, struct cut *ret)
{
	const struct seq *s = p->seq;

	for (; at->lane < s->ix.lanes; at->lane++) {
		for (; p->out[at->lane] && at->tier < KVT_TIERS; at->tier++) {
			next_cut(p, at, lane_page_rows(s->model, at->lane), ret);
			if (ret->rows)
				return true;
			at->pos = 0;
		}
		at->tier = KVT_TIER_DRAM;
	}
	return false;
}
