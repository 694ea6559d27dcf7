/* SPDX-License-Identifier: MIT */
/*
 * What moves from dram to nvme and when: after a plan what it decided, under
 * the low watermark the coldest pages of the longest idle sequences, at a drain
 * everything. One list of sequences being settled, lane by lane, with bounded
 * bytes in flight, so that plans and promotions are not held up.
 */
#include <string.h>
#include "daemon/internal.h"
#include "daemon/limbo.h"
#include "shm/util.h"

#define IN_FLIGHT (UINT64_C(16) << 20) /* bytes of background moves */
#define SLICE_NS UINT64_C(500000)      /* of the loop, for lanes in which nothing moves */
#define COLD_LOOK 64u                  /* sequences looked at per tick of the demoter */

struct settle {
	struct seq *seq; /* a reference */
	uint32_t lane, words;
	bool left;  /* rows were passed over in this round: their page was on its way, or did not fit */
	bool moved; /* something was in this round, so another one may get further */
	TAILQ_ENTRY(settle) link;
	uint64_t want[]; /* [lanes][words]: rows that dram should give up */
};

void settle_stop(struct seq *s)
{
	struct settle *t = s->settle;

	if (!t)
		return;
	s->settle = NULL;
	TAILQ_REMOVE(&s->core->settles, t, link);
	free(t);
	seq_unref(s);
}

static struct settle *settle_new(struct seq *s, uint32_t words)
{
	struct settle *t;

	settle_stop(s);
	t = calloc(1, sizeof(*t) + (size_t)s->ix.lanes * words * sizeof(uint64_t));
	if (!t)
		return NULL;
	t->seq = s;
	t->words = words;
	s->refs++;
	s->settle = t;
	TAILQ_INSERT_TAIL(&s->core->settles, t, link);
	mover_kick(s->core);
	return t;
}

void settle_start(struct seq *s, const uint64_t *to_nvme, uint32_t words)
{
	struct settle *t = NULL;

	if (!s->core->pages.tier[KVT_TIER_NVME])
		return;
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		const uint64_t *dram = index_bits(&s->ix, KVT_TIER_DRAM, l);

		for (uint32_t w = 0; w < words; w++) {
			uint64_t v = to_nvme[(uint64_t)l * words + w] & dram[w];

			if (v && !t)
				t = settle_new(s, words);
			if (v && !t)
				return; /* no memory: the rows stay where they are */
			if (v)
				t->want[(uint64_t)l * words + w] = v;
		}
	}
}

void settle_flush(struct seq *s)
{
	uint32_t words = (uint32_t)BITS_WORDS(s->ix.rows);
	struct settle *t;

	if (!s->core->pages.tier[KVT_TIER_NVME] || !s->held[KVT_TIER_DRAM])
		return;
	t = settle_new(s, words);
	for (uint32_t l = 0; t && l < s->ix.lanes; l++)
		memcpy(t->want + (uint64_t)l * words, index_bits(&s->ix, KVT_TIER_DRAM, l),
		       words * sizeof(uint64_t));
}

void settle_moved(struct seq *s)
{
	if (s->settle)
		s->settle->moved = true;
}

/* Rows of the page that are wanted below and have no copy there. */
static uint32_t moving_rows(const struct settle *t, const struct page *p, uint64_t mask[PAGE_SPAN],
			    uint32_t *ret_alive)
{
	const struct index *ix = &t->seq->ix;
	const uint64_t *want = t->want + (uint64_t)t->lane * t->words,
		       *nvme = index_bits(ix, KVT_TIER_NVME, t->lane);
	uint32_t n = 0;

	*ret_alive = index_alive(ix, p, KVT_TIER_DRAM, mask);
	for (uint32_t w = 0; w < p->span; w++) {
		mask[w] &= index_window(want, t->words, p->first + w * 64) &
			   ~index_window(nvme, ix->words, p->first + w * 64);
		n += (uint32_t)__builtin_popcountll(mask[w]);
	}
	return n;
}

/* Rows taken for one new page, on top of its first position. */
struct taken {
	struct page *src[REPACK_SOURCES];
	unsigned n;
	uint32_t first, rows, span;
	uint64_t word[PAGE_SPAN];
};

/* Add what fits of one page's rows; how many did. */
static uint32_t take(struct taken *k, struct page *p, const uint64_t *mask)
{
	uint32_t any = 0;

	for (uint32_t w = 0; w < p->span; w++)
		for (uint64_t b = mask[w]; b && k->rows < PAGE_ROWS; b &= b - 1) {
			uint32_t pos = p->first + w * 64 + (uint32_t)__builtin_ctzll(b);

			if (!k->n && !any)
				k->first = pos;
			if (pos < k->first || pos - k->first >= PAGE_SPAN * 64)
				continue;
			bits_set(k->word, pos - k->first);
			k->span = MAX(k->span, (pos - k->first) / 64 + 1);
			k->rows++;
			any++;
		}
	if (any)
		k->src[k->n++] = p;
	return any;
}

/* Moves of one lane, as far as the bytes in flight allow. true: the lane is done. */
static bool settle_lane(struct settle *t)
{
	struct seq *s = t->seq;
	struct core *c = s->core;
	struct lane_pages *lp = &s->ix.lane[t->lane];
	struct taken k = {.rows = 0};
	uint64_t *want = t->want + (uint64_t)t->lane * t->words;
	const uint64_t *nvme = index_bits(&s->ix, KVT_TIER_NVME, t->lane);
	uint64_t *dram = index_bits(&s->ix, KVT_TIER_DRAM, t->lane);

	/* A second copy exists: dram just lets go. */
	for (uint32_t w = 0; w < t->words; w++)
		dram[w] &= ~(want[w] & nvme[w]);
	for (uint32_t i = 0; i < lp->n; i++) {
		struct page *p = lp->v[i];
		uint64_t mask[PAGE_SPAN];
		uint32_t alive, n;

		if (!page_in(p, KVT_TIER_DRAM))
			continue;
		n = moving_rows(t, p, mask, &alive);
		if (!n)
			continue;
		if (p->moving) {
			t->left = true;
			continue;
		}
		if (c->background_bytes >= IN_FLIGHT)
			return false;
		if (n == p->rows && p->refs == 1 && p->origin == s->origin) {
			if (repack_start(s, &p, 1, KVT_TIER_DRAM, KVT_TIER_NVME, true, 0, NULL, 0) < 0)
				return true;
			continue;
		}
		t->left |= take(&k, p, mask) < n;
		if (k.n == REPACK_SOURCES || k.rows == PAGE_ROWS) {
			if (repack_start(s, k.src, k.n, KVT_TIER_DRAM, KVT_TIER_NVME, false, k.first, k.word,
					 k.span) < 0)
				return true;
			for (uint32_t w = 0; w < k.span; w++) /* what is on its way is not wanted again */
				for (uint64_t b = k.word[w]; b; b &= b - 1)
					bits_clear(want, k.first + w * 64 + (uint32_t)__builtin_ctzll(b));
			memset(&k, 0, sizeof(k));
		}
	}
	if (k.rows)
		(void)repack_start(s, k.src, k.n, KVT_TIER_DRAM, KVT_TIER_NVME, false, k.first, k.word, k.span);
	index_sweep(&s->ix, &c->pages, t->lane);
	return true;
}

/* All lanes were gone through. True: once more, for what a page on its way kept back. */
static bool next_round(struct settle *t)
{
	struct seq *s = t->seq;

	if (t->left && s->repacks)
		return false; /* their ends come back here */
	if (!t->left || !t->moved) {
		settle_stop(s);
		return false;
	}
	t->lane = 0;
	t->left = t->moved = false;
	return true;
}

void settle_pump(struct core *c)
{
	uint64_t end = now_ns() + SLICE_NS;
	struct settle *t, *next;

	for (t = TAILQ_FIRST(&c->settles); t && c->background_bytes < IN_FLIGHT; t = next) {
		struct seq *s = t->seq;

		next = TAILQ_NEXT(t, link);
		if (plan_lent(s) || s->cut != ROWS_ALL)
			continue;
		if (t->lane == s->ix.lanes && !next_round(t))
			continue;
		while (t->lane < s->ix.lanes && c->background_bytes < IN_FLIGHT && settle_lane(t)) {
			t->lane++;
			if (now_ns() >= end) {
				mover_kick(c);
				return;
			}
		}
	}
}

uint64_t settle_choose(struct seq *s, uint32_t lane, settle_choice_fn choose, void *arg)
{
	struct lane_pages *lp = &s->ix.lane[lane];
	struct settle *t = s->settle;
	uint64_t mask[PAGE_SPAN], bytes = 0;

	for (uint32_t i = 0; i < lp->n; i++) {
		const struct page *p = lp->v[i];
		uint32_t alive = index_alive(&s->ix, p, KVT_TIER_DRAM, mask);

		/* Lanes that are done are not gone back to; the one being worked at is looked at again. */
		if (t && (t->lane > lane || t->words < BITS_WORDS(s->ix.rows)))
			break;
		if (!alive || !choose(arg, s, p, mask, alive))
			continue;
		if (!t)
			t = settle_new(s, (uint32_t)BITS_WORDS(s->ix.rows));
		if (!t)
			break;
		bytes += page_room(p->bytes);
		for (uint32_t w = 0; w < p->span; w++)
			for (uint64_t b = mask[w]; b; b &= b - 1)
				bits_set(t->want + (uint64_t)lane * t->words,
					 p->first + w * 64 + (uint32_t)__builtin_ctzll(b));
	}
	return bytes;
}

/* ---- watermarks -------------------------------------------------------------------------- */

static bool lies_on(const struct core *c, const struct page *p, int node)
{
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];

	return node < 0 || (page_in(p, KVT_TIER_DRAM) && t->ops->where(t, p->addr[KVT_TIER_DRAM - 1]) == node);
}

/*
 * The colder half of a sequence's dram rows, by key, wants to leave; all of it when it is detached. node: only
 * from there; -1: from anywhere.
 */
static uint64_t make_cold(struct seq *s, int node)
{
	uint32_t words = (uint32_t)BITS_WORDS(s->ix.rows);
	struct settle *t = settle_new(s, words);
	bool combine = s->keys_use && s->keys_use->coefs;
	_cleanup_free_ uint16_t *now = combine ? malloc(s->ix.rows * sizeof(*now)) : NULL;
	uint64_t bytes = 0;

	for (uint32_t l = 0; t && (now || !combine) && l < s->ix.lanes; l++) {
		struct lane_pages *lp = &s->ix.lane[l];
		const uint16_t *key = combine ? now : s->ix.key + (size_t)l * s->ix.cap;
		uint64_t sum = 0, n = 0;

		if (combine)
			score_combine(s, s->keys_use, l, s->ix.rows, s->ix.rows, now);
		bits_for_each(i, index_bits(&s->ix, KVT_TIER_DRAM, l), s->ix.rows) {
			sum += key[i];
			n++;
		}
		for (uint32_t i = 0; i < lp->n; i++) {
			struct page *p = lp->v[i];
			uint64_t mask[PAGE_SPAN], keys = 0;
			uint32_t rows = index_alive(&s->ix, p, KVT_TIER_DRAM, mask);

			if (!rows || !lies_on(s->core, p, node))
				continue;
			for (uint32_t w = 0; w < p->span; w++)
				for (uint64_t b = mask[w]; b; b &= b - 1)
					keys += key[p->first + w * 64 + (uint32_t)__builtin_ctzll(b)];
			if (s->state != SEQ_DETACHED && keys * n > sum * rows)
				continue;
			bytes += page_room(p->bytes);
			for (uint32_t w = 0; w < p->span; w++)
				for (uint64_t b = mask[w]; b; b &= b - 1)
					bits_set(t->want + (uint64_t)l * words,
						 p->first + w * 64 + (uint32_t)__builtin_ctzll(b));
		}
	}
	return bytes;
}

static void demote_cold(struct core *c, uint64_t bytes, int node)
{
	struct seq *s, *next;
	uint64_t end = now_ns() + SLICE_NS;
	unsigned looked = 0;

	/* Out of time: the next tick goes on, where these have less to give. */
	for (s = TAILQ_FIRST(&c->lru); s && bytes && looked < COLD_LOOK && now_ns() < end; s = next, looked++) {
		uint64_t n;

		next = TAILQ_NEXT(s, lru);
		if (s->settle || s->plan || s->cut != ROWS_ALL || !s->held[KVT_TIER_DRAM] ||
		    s->state == SEQ_CLOSING)
			continue;
		if (node >= 0 && s->node && s->node != node + 1) {
			looked--; /* its pages are elsewhere, but for a few that go there soon */
			continue;
		}
		n = make_cold(s, node);
		bytes -= MIN(bytes, n);
	}
}

void settle_watermarks(struct core *c)
{
	const struct config_watermarks *marks[KVT_TIERS] = {NULL, &c->cfg.dram_marks, &c->cfg.nvme_marks};

	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
		uint64_t unit, waits = limbo_bytes(&c->pages, t, LIMBO_ALL);
		struct tier_stat st;
		uint64_t over;
		int node;

		if (!c->pages.tier[t])
			continue;
		c->pages.tier[t]->ops->stat(c->pages.tier[t], &st);
		unit = st.capacity / 1000;
		c->below_min[t] = st.free < unit * marks[t]->min;
		if (st.free < unit * marks[t]->low)
			c->below_low[t] = true;
		if (st.free >= unit * marks[t]->high)
			c->below_low[t] = false;
		if (c->below_low[t] && waits)
			limbo_hurry(c, t);
		if (t != KVT_TIER_DRAM || !c->pages.tier[KVT_TIER_NVME] || c->below_min[KVT_TIER_NVME] ||
		    !TAILQ_EMPTY(&c->settles))
			continue;
		if (c->below_low[t]) {
			if (st.free + waits < unit * marks[t]->high)
				demote_cold(c, unit * marks[t]->high - st.free - waits, -1);
		} else if ((node = near_crowded(c, &over)) >= 0) {
			demote_cold(c, over, node);
		}
	}
}
