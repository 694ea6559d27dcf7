/* SPDX-License-Identifier: MIT */
#include "policy/pool.h"
#include "shm/util.h"

#include <string.h>

/* a * b / c, b <= c. */
static uint64_t part_of(uint64_t a, uint64_t b, uint64_t c)
{
	return (uint64_t)((unsigned __int128)a * b / c);
}

/*
 * What one with this demand gets of `total` rows: all that it keeps at the lowest price at which everybody's
 * rows fit, and of the rows of the bin below an even share. The parts of all never exceed the total.
 */
static uint64_t part(const uint32_t *keep, const uint64_t *all, uint64_t total)
{
	uint32_t yes = 0, no = ADAPTIVE_BINS;

	if (all[0] <= total)
		return keep[0];
	if (all[ADAPTIVE_BINS] >= total)
		return part_of(keep[ADAPTIVE_BINS], total, all[ADAPTIVE_BINS]);
	while (no - yes > 1) {
		uint32_t mid = yes + (no - yes) / 2;

		if (all[mid] > total)
			yes = mid;
		else
			no = mid;
	}
	return keep[no] + part_of(keep[yes] - keep[no], total - all[no], all[yes] - all[no]);
}

/* Is a change of this many rows worth the trouble? */
static bool counts(uint64_t change, uint64_t of, uint32_t permille)
{
	return change && change * 1000 >= of * permille;
}

uint64_t pool_spare(const struct pool *p)
{
	uint64_t taken = p->held + p->lent;

	return p->uniform > taken ? p->uniform - taken : 0;
}

bool pool_owed(const struct pool *p)
{
	return p->held + p->lent > p->uniform;
}

uint64_t pool_part(const struct pool *p, const struct pool_seat *s)
{
	return part(s->keep, p->keep, p->uniform);
}

static void hold(struct pool *p, struct pool_seat *s, uint64_t rows)
{
	p->held += rows - s->held;
	s->held = rows;
}

static void wish(struct pool *p, struct pool_seat *s, uint64_t rows)
{
	p->waiting += (uint32_t)(rows != 0) - (uint32_t)(s->wish != 0);
	s->wish = rows;
}

static void demand(struct pool *p, struct pool_seat *s, const uint32_t *keep)
{
	for (uint32_t b = 0; b <= ADAPTIVE_BINS; b++)
		p->keep[b] += (uint64_t)keep[b] - s->keep[b];
	memcpy(s->keep, keep, sizeof(s->keep));
}

/* Until its first plan it keeps what it brought, whatever others do. */
static void join(struct pool *p, struct pool_seat *s, uint64_t uniform)
{
	*s = (struct pool_seat){.seated = true, .uniform = uniform, .held = uniform};
	for (uint32_t b = 0; b <= ADAPTIVE_BINS; b++) {
		s->keep[b] = (uint32_t)uniform;
		p->keep[b] += s->keep[b];
	}
	p->uniform += uniform;
	p->held += uniform;
	p->seats++;
}

void pool_begin(struct pool *p, struct pool_seat *s, uint64_t uniform, struct pool_bid *bid)
{
	uint64_t less;

	if (!s->seated)
		join(p, s, uniform);
	less = s->uniform > uniform ? s->uniform - uniform : 0;
	if (uniform > s->uniform)
		hold(p, s, s->held + uniform - s->uniform);
	p->uniform += uniform - s->uniform;
	s->uniform = uniform;
	bid->phase = POOL_LENT;
	bid->owed = pool_owed(p);
	bid->total = p->uniform;
	bid->base = s->held - MIN(less, s->held);
	bid->lent = pool_spare(p);
	bid->before = s->held;
	p->lent += bid->lent;
	for (uint32_t b = 0; b <= ADAPTIVE_BINS; b++)
		bid->others[b] = p->keep[b] - s->keep[b];
}

void pool_choose(struct pool_bid *bid, uint32_t permille)
{
	uint64_t all[ADAPTIVE_BINS + 1], due, most = bid->base + bid->lent, change;
	bool fits = bid->base >= bid->keep[ADAPTIVE_BINS] && bid->base <= bid->keep[0];

	for (uint32_t b = 0; b <= ADAPTIVE_BINS; b++)
		all[b] = bid->others[b] + bid->keep[b];
	due = part(bid->keep, all, bid->total);
	bid->rows = MIN(due, most);
	change = MAX(bid->rows, bid->base) - MIN(bid->rows, bid->base);
	if (fits && !counts(change, bid->base, permille) && !(bid->owed && due < bid->base))
		bid->rows = bid->base;
}

void pool_claim(struct pool *p, struct pool_seat *s, struct pool_bid *bid)
{
	if (bid->phase != POOL_LENT)
		return;
	p->lent -= bid->lent;
	bid->phase = POOL_CLAIMED;
	bid->before = s->held;
	hold(p, s, MAX(s->held, bid->rows));
	demand(p, s, bid->keep);
}

void pool_settle(struct pool *p, struct pool_seat *s, struct pool_bid *bid, bool all)
{
	if (bid->phase != POOL_CLAIMED)
		return;
	bid->phase = POOL_OVER;
	if (all)
		hold(p, s, bid->rows);
}

void pool_abandon(struct pool *p, struct pool_seat *s, struct pool_bid *bid)
{
	if (bid->phase == POOL_LENT)
		p->lent -= bid->lent;
	else if (bid->phase == POOL_CLAIMED)
		hold(p, s, bid->before);
	bid->phase = POOL_OVER;
}

void pool_leave(struct pool *p, struct pool_seat *s, struct pool_bid *bid)
{
	if (bid)
		pool_abandon(p, s, bid);
	if (!s->seated)
		return;
	for (uint32_t b = 0; b <= ADAPTIVE_BINS; b++)
		p->keep[b] -= s->keep[b];
	p->uniform -= s->uniform;
	p->held -= s->held;
	wish(p, s, 0);
	p->seats--;
	s->seated = false;
}

bool pool_due(const struct pool *p, const struct pool_seat *s, uint32_t permille)
{
	uint64_t due = pool_part(p, s);

	if (s->held > due)
		return pool_owed(p) || (p->waiting && counts(s->held - due, s->held, permille));
	return counts(MIN(due - s->held, pool_spare(p)), s->held, permille);
}

bool pool_off(const struct pool *p, const struct pool_seat *s, uint32_t permille)
{
	uint64_t due = pool_part(p, s);

	return counts(MAX(due, s->held) - MIN(due, s->held), s->held, permille);
}

bool pool_wish(struct pool *p, struct pool_seat *s, uint32_t permille)
{
	uint64_t due = pool_part(p, s), had = s->wish;

	wish(p, s, due > s->held && counts(due - s->held, s->held, permille) ? due : 0);
	return s->wish && !had;
}
