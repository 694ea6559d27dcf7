/* SPDX-License-Identifier: MIT */
/*
 * What leaves DRAM under pressure, in rounds, each a walk over the sequences in slices of the loop:
 *
 *   COPIES  pages of which all rows are on nvme as well: free at once, nothing is lost
 *   COUNT   what pages are worth, by tenant: bytes by the upper byte of their rows' mean key
 *   TAKE    from every tenant by what it is over its fair share, its least pages first: to nvme (settle.c),
 *           or, with `drop`, away
 *
 * Pinned rows and those that a policy always keeps make a page the last of its tenant's. Published pages stay,
 * but those in segments that are to go: these go whatever they are worth. What a worker decides over, or a plan
 * not yet acknowledged relies on, is left to a later round.
 */
#include <string.h>
#include "daemon/internal.h"
#include "daemon/limbo.h"
#include "daemon/pressure.h"
#include "shm/util.h"

#define BUCKETS 257u /* by key; the last: protected */
#define PROTECTED 256u
#define SLICE_NS UINT64_C(300000)
#define TRIM (UINT64_C(4) << 20) /* bytes punched in one slice: about as long */

enum stage { COPIES, COUNT, TAKE, WAIT };

struct give {
	enum stage stage;
	bool drop, took; /* took: something in this round */
	uint32_t cursor, lane;
	uint32_t tenants;
	uint64_t need;              /* bytes of this round */
	uint64_t (*worth)[BUCKETS]; /* [tenants] bytes */
	struct {
		uint64_t bytes, left;
		uint32_t cut;        /* buckets up to here go, */
		double part;         /* of that one this part */
		uint64_t seen, gone; /* of that one: bytes looked at, bytes that went */
	} * tenant;
	uint16_t *key; /* scratch */
	uint32_t keys;
};

struct give *give_new(uint32_t tenants)
{
	struct give *g = calloc(1, sizeof(*g));

	if (!g)
		return NULL;
	g->tenants = tenants;
	g->worth = calloc(tenants, sizeof(*g->worth));
	g->tenant = calloc(tenants, sizeof(*g->tenant));
	if (!g->worth || !g->tenant) {
		give_free(g);
		return NULL;
	}
	return g;
}

void give_free(struct give *g)
{
	if (!g)
		return;
	free(g->worth);
	free(g->tenant);
	free(g->key);
	free(g);
}

static void enter(struct give *g, enum stage stage)
{
	g->stage = stage;
	g->cursor = g->lane = 0;
}

void give_start(struct give *g)
{
	g->drop = false;
	enter(g, COPIES);
}

/* ---- one page ------------------------------------------------------------------------- */

static bool revoked(const struct core *c, const struct page *p)
{
	const struct tier_ops *ops = c->pages.tier[KVT_TIER_DRAM]->ops;

	return ops->revoked && ops->revoked(c->pages.tier[KVT_TIER_DRAM], p->addr[KVT_TIER_DRAM - 1]);
}

static bool ours(const struct core *c, const struct page *p)
{
	return page_in(p, KVT_TIER_DRAM) && !p->moving &&
	       (!tier_published(p->addr[KVT_TIER_DRAM - 1]) || revoked(c, p));
}

/* The lane's keys now; NULL: none, or no memory. */
static const uint16_t *keys_of(struct give *g, const struct seq *s, uint32_t lane)
{
	if (!s->keys_use || !s->keys_use->coefs)
		return s->ix.key + (size_t)lane * s->ix.cap;
	if (g->keys < s->ix.rows) {
		uint16_t *key = realloc(g->key, s->ix.rows * sizeof(*key));

		if (!key)
			return NULL;
		g->key = key;
		g->keys = s->ix.rows;
	}
	score_combine(s, s->keys_use, lane, s->ix.rows, s->ix.rows, g->key);
	return g->key;
}

static bool protected(const struct seq *s, uint32_t pos)
{
	const struct config *cfg = &s->core->cfg;

	return pos < cfg->protect_first || s->ix.rows - pos <= cfg->protect_last ||
	       (s->pinned && bits_test(s->pinned, pos));
}

static uint32_t bucket_of(const struct seq *s, const struct page *p, const uint64_t *mask, uint32_t alive,
			  const uint16_t *key)
{
	uint64_t sum = 0;

	for (uint32_t w = 0; w < p->span; w++)
		for (uint64_t b = mask[w]; b; b &= b - 1) {
			uint32_t pos = p->first + w * 64 + (uint32_t)__builtin_ctzll(b);

			if (protected(s, pos))
				return PROTECTED;
			sum += key[pos];
		}
	return (uint32_t)(sum / alive >> 8);
}

/* Rows of the mask that have no copy in that tier. */
static uint32_t without(const struct index *ix, const struct page *p, int tier, const uint64_t *mask)
{
	const uint64_t *bits = index_bits(ix, tier, p->lane);
	uint32_t n = 0;

	for (uint32_t w = 0; w < p->span; w++)
		n += (uint32_t)__builtin_popcountll(mask[w] &
						    ~index_window(bits, ix->words, p->first + w * 64));
	return n;
}

static void recount_soon(struct seq *s)
{
	if (s->recount)
		return;
	s->recount = true;
	s->refs++;
	STAILQ_INSERT_TAIL(&s->core->recounts, s, recounts);
}

/* ---- one lane ---------------------------------------------------------------------------- */

static void free_copies(struct give *g, struct seq *s, uint32_t lane)
{
	struct lane_pages *lp = &s->ix.lane[lane];
	uint64_t mask[PAGE_SPAN];
	bool any = false;

	for (uint32_t i = 0; i < lp->n; i++) {
		struct page *p = lp->v[i];

		if (!ours(s->core, p) || p->refs != 1 || !index_alive(&s->ix, p, KVT_TIER_DRAM, mask) ||
		    without(&s->ix, p, KVT_TIER_NVME, mask))
			continue;
		index_mark(&s->ix, p, KVT_TIER_DRAM, false);
		s->core->stat.squeeze_copied_bytes += page_room(p->bytes);
		any = true;
	}
	if (!any)
		return;
	index_sweep(&s->ix, &s->core->pages, lane);
	recount_soon(s);
}

static void count_lane(struct give *g, struct seq *s, uint32_t lane)
{
	struct lane_pages *lp = &s->ix.lane[lane];
	const uint16_t *key = lp->n ? keys_of(g, s, lane) : NULL;
	uint64_t mask[PAGE_SPAN];

	for (uint32_t i = 0; key && i < lp->n; i++) {
		struct page *p = lp->v[i];
		uint32_t alive = ours(s->core, p) ? index_alive(&s->ix, p, KVT_TIER_DRAM, mask) : 0;

		if (alive && !revoked(s->core, p))
			g->worth[p->origin->charge][bucket_of(s, p, mask, alive, key)] += page_room(p->bytes);
	}
}

/*
 * A page is its tenant's turn: it goes, and is counted. Of the last bucket only a part goes, evenly over all
 * lanes and sequences: pages in it are worth the same, and those that the walk meets first are no worse.
 */
static bool goes(struct give *g, const struct core *c, const struct page *p, uint32_t bucket)
{
	typeof(*g->tenant) *t = &g->tenant[p->origin->charge];
	uint64_t room = page_room(p->bytes);

	if (revoked(c, p))
		return g->took = true;
	if (bucket > t->cut || !t->left)
		return false;
	if (bucket == t->cut) {
		t->seen += room;
		if ((double)t->gone >= t->part * (double)t->seen)
			return false;
		t->gone += room;
	}
	t->left -= MIN(t->left, room);
	g->took = true;
	return true;
}

static void drop_lane(struct give *g, struct seq *s, uint32_t lane)
{
	struct lane_pages *lp = &s->ix.lane[lane];
	const uint16_t *key = lp->n ? keys_of(g, s, lane) : NULL;
	struct core *c = s->core;
	uint32_t lost[4] = {0};
	uint64_t mask[PAGE_SPAN], bytes = 0;

	for (uint32_t i = 0; key && i < lp->n; i++) {
		struct page *p = lp->v[i];
		uint32_t alive = ours(s->core, p) ? index_alive(&s->ix, p, KVT_TIER_DRAM, mask) : 0;

		if (!alive || !goes(g, c, p, bucket_of(s, p, mask, alive, key)))
			continue;
		for (uint32_t w = 0; w < p->span; w++)
			mask[w] &= ~index_window(index_bits(&s->ix, KVT_TIER_DEVICE, lane), s->ix.words,
						 p->first + w * 64);
		lost[0] += without(&s->ix, p, KVT_TIER_NVME, mask);
		bytes += page_room(p->bytes);
		index_mark(&s->ix, p, KVT_TIER_DRAM, false);
	}
	if (!bytes)
		return;
	c->stat.squeeze_dropped_bytes += bytes;
	c->stat.squeeze_dropped_rows += lost[0];
	c->stat.rows_dropped += lost[0];
	core_feed(c, FEED_DROP, s, 0, bytes, lost);
	index_sweep(&s->ix, &c->pages, lane);
	recount_soon(s);
}

struct choice {
	struct give *g;
	const uint16_t *key;
};

static bool choose(void *arg, const struct seq *s, const struct page *p, const uint64_t *mask, uint32_t alive)
{
	struct choice *x = arg;

	return ours(s->core, p) && without(&s->ix, p, KVT_TIER_NVME, mask) &&
	       goes(x->g, s->core, p, bucket_of(s, p, mask, alive, x->key));
}

/* One move down at a time is made for a sequence; lanes that it leaves out wait for the next round. */
static void demote_lane(struct give *g, struct seq *s, uint32_t lane)
{
	struct choice x = {.g = g, .key = s->ix.lane[lane].n ? keys_of(g, s, lane) : NULL};

	if (x.key)
		s->core->stat.squeeze_demoted_bytes += settle_choose(s, lane, choose, &x);
}

/* ---- walking ------------------------------------------------------------------------------- */

static bool busy(const struct give *g, const struct seq *s)
{
	return s->dead || s->state == SEQ_CLOSING || !s->ix.rows || plan_lent(s) || s->cut != ROWS_ALL ||
	       (g->stage == TAKE && g->drop && s->plan);
}

/* True: all lanes of all sequences were seen. */
static bool walk(struct core *c, struct give *g, uint64_t end)
{
	static void (*const act[])(struct give *, struct seq *, uint32_t) = {
		[COPIES] = free_copies, [COUNT] = count_lane, [TAKE] = demote_lane};
	uint32_t next = g->cursor;
	struct seq *s;

	while ((s = handle_next(c->seqs, &next, NULL))) {
		while (!busy(g, s) && g->lane < s->ix.lanes) {
			(g->stage == TAKE && g->drop ? drop_lane : act[g->stage])(g, s, g->lane++);
			if (now_ns() >= end)
				return false;
		}
		g->lane = 0;
		g->cursor = next;
	}
	return true;
}

/* How much each tenant gives: in proportion to what it is over an equal share of what may stay. */
static void divide(struct core *c, struct give *g)
{
	uint64_t total = 0, over = 0, fair;
	uint32_t have = 0;

	for (uint32_t t = 0; t < g->tenants; t++) {
		g->tenant[t].bytes = 0;
		for (uint32_t b = 0; b < BUCKETS; b++)
			g->tenant[t].bytes += g->worth[t][b];
		total += g->tenant[t].bytes;
		have += g->tenant[t].bytes > 0;
	}
	fair = have && total > g->need ? (total - g->need) / have : 0;
	for (uint32_t t = 0; t < g->tenants; t++)
		over += g->tenant[t].bytes - MIN(g->tenant[t].bytes, fair);
	for (uint32_t t = 0; t < g->tenants; t++) {
		uint64_t mine = g->tenant[t].bytes - MIN(g->tenant[t].bytes, fair), sum = 0;
		uint32_t cut = 0;

		mine = over ? (uint64_t)((double)MIN(g->need, total) * ((double)mine / (double)over)) : 0;
		while (cut < BUCKETS - 1 && sum + g->worth[t][cut] < mine)
			sum += g->worth[t][cut++];
		g->tenant[t].cut = cut;
		g->tenant[t].part = g->worth[t][cut] ? (double)(mine - sum) / (double)g->worth[t][cut] : 1;
		g->tenant[t].left = mine;
		g->tenant[t].seen = g->tenant[t].gone = 0;
	}
}

bool give_some(struct core *c, struct give *g, uint64_t need, bool drop)
{
	struct tier *dram = c->pages.tier[KVT_TIER_DRAM], *nvme = c->pages.tier[KVT_TIER_NVME];
	uint64_t end = now_ns() + SLICE_NS, gone, waits = limbo_bytes(&c->pages, KVT_TIER_DRAM, LIMBO_ALL);

	gone = dram->ops->trim(dram, MIN(need, TRIM));
	c->stat.squeeze_returned_bytes += gone;
	if (gone)
		return true;
	if (drop && waits) { /* better a row that a kill could lose than one that is lost */
		limbo_let_go(c, KVT_TIER_DRAM);
		return false; /* its end kicks the pump */
	}
	if (drop && !g->drop) { /* what is on its way goes on */
		g->drop = true;
		enter(g, COUNT);
		memset(g->worth, 0, g->tenants * sizeof(*g->worth));
	}
	switch (g->stage) {
	case COPIES:
		if (walk(c, g, end)) {
			memset(g->worth, 0, g->tenants * sizeof(*g->worth));
			enter(g, COUNT);
		}
		return true;
	case COUNT:
		if (walk(c, g, end)) {
			g->need = need - MIN(need, waits);
			g->took = false;
			divide(c, g);
			enter(g, g->drop || (nvme && !c->below_min[KVT_TIER_NVME]) ? TAKE : WAIT);
		}
		return true;
	case TAKE:
		if (!walk(c, g, end))
			return true;
		enter(g, WAIT);
		return g->took;
	case WAIT:
		if (waits && TAILQ_EMPTY(&c->settles)) /* before that segments become full by themselves */
			limbo_hurry(c, KVT_TIER_DRAM);
		if (!g->drop && (!TAILQ_EMPTY(&c->settles) || waits))
			return false; /* their ends kick the pump, and so do seals */
		memset(g->worth, 0, g->tenants * sizeof(*g->worth));
		enter(g, COUNT);
		return g->took;
	}
	return false;
}
