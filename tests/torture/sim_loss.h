/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What a kill must not take. After every turn of the loop: rows of leased sequences that a restart would find,
 * because they lie in a sealed segment, or in kept DRAM with a record. A row stays known until the daemon gives
 * it up by decision, wherever it is moved in between; so one that was safe in DRAM and is on its way to NVMe
 * when the daemon is killed must be there in the next life, as must one that NVMe rewrites. Media that fail may
 * lose rows: then nothing is expected.
 *
 * And the store of descriptors that outlives a daemon that is killed, as systemd's does.
 */
#include "daemon/ledger.h"
#include "daemon/limbo.h"
#include "tests/torture/sim_disk.h"
#include "tests/torture/sim_plans.h"
#include "tiers/dram_dir.h"

#define KEPT_MOST 32u
#define KNOWN_MOST 64u

struct store { /* descriptors by name */
	struct tier_kept held[KEPT_MOST], offered[KEPT_MOST];
	unsigned n;
	struct tier_keep keep;
};

struct known {
	uint64_t born; /* whose; 0: the place is free */
	bool seen;
	uint64_t on[MAX_LANES][ROW_WORDS];
};
struct loss {
	bool on;
	struct known known[KNOWN_MOST];
	uint64_t expected; /* rows, at all kills */
};
static struct store store;
static struct loss loss;

/* ---- the store ------------------------------------------------------------------------- */

static int store_put(void *arg, const char *name, int fd)
{
	if (store.n == KEPT_MOST)
		return -ENOSPC;
	snprintf(store.held[store.n].name, sizeof(store.held[0].name), "%s", name);
	store.held[store.n].fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	return store.held[store.n].fd < 0 ? -errno : (store.n++, 0);
}

static void store_drop(void *arg, const char *name)
{
	for (unsigned i = 0; i < store.n; i++)
		if (!strcmp(store.held[i].name, name)) {
			close(store.held[i].fd);
			store.held[i] = store.held[--store.n];
			return;
		}
}

static void store_refused(void *arg, const char *name, const char *why)
{
	broken("segment %s is not taken over: %s", name, why);
}

/* For the life that begins. */
static const struct tier_keep *store_offer(void)
{
	for (unsigned i = 0; i < store.n; i++) {
		store.offered[i] = store.held[i];
		store.offered[i].fd = fcntl(store.held[i].fd, F_DUPFD_CLOEXEC, 3);
	}
	store.keep = (struct tier_keep){.store = store_put,
					.drop = store_drop,
					.refused = store_refused,
					.kept = store.offered,
					.n = store.n};
	return &store.keep;
}

static void store_empty(void)
{
	while (store.n)
		close(store.held[--store.n].fd);
}

/* ---- what is known to be safe --------------------------------------------------------------- */

static bool has_record(const struct page *p)
{
	uint32_t flags;

	return !tier_published(p->addr[KVT_TIER_DRAM - 1]) &&
	       52 + nvme_pos_size(p->pos, p->span, &flags) <= page_room(p->bytes) / KVT_UNIT * DIR_SLOT;
}

static bool is_sealed(struct core *c, const struct page *p)
{
	uint32_t unit;
	const struct nvme_seg *g =
		nvme_resolve(nvme(c->pages.tier[KVT_TIER_NVME]), p->addr[KVT_TIER_NVME - 1], &unit);

	return g && g->state == NVME_SEALED && !g->unsealed;
}

static void add_page(struct known *k, const struct seq *s, const struct page *p, int tier)
{
	uint64_t mask[PAGE_SPAN];

	index_alive(&s->ix, p, tier, mask);
	for (uint32_t w = 0; w < p->span; w++) {
		uint32_t pos = p->first + w * 64, at = pos / 64, shift = pos % 64;

		if (!mask[w])
			continue;
		k->on[p->lane][at] |= mask[w] << shift;
		if (shift && mask[w] >> (64 - shift))
			k->on[p->lane][at + 1] |= mask[w] >> (64 - shift);
	}
}

static struct known *known_of(uint64_t born, bool make)
{
	struct known *empty = NULL;

	for (unsigned i = 0; i < KNOWN_MOST; i++) {
		if (loss.known[i].born == born)
			return &loss.known[i];
		if (!loss.known[i].born && !empty)
			empty = &loss.known[i];
	}
	must(!make || empty, "too many sequences for the test");
	if (make)
		*empty = (struct known){.born = born};
	return make ? empty : NULL;
}

static void look_at(struct core *c, const struct seq *s)
{
	uint32_t rows = MIN(s->ix.rows, s->cut), words = (uint32_t)BITS_WORDS(rows);
	struct known *k = known_of(s->born, true);

	k->seen = true;
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		const uint64_t *dram = index_bits(&s->ix, KVT_TIER_DRAM, l),
			       *nvme = index_bits(&s->ix, KVT_TIER_NVME, l);

		for (uint32_t i = 0; i < s->ix.lane[l].n; i++) {
			const struct page *p = s->ix.lane[l].v[i];

			if (p->origin != s->origin) /* a parent's: they do not come back with the child */
				continue;
			if (c->seams.keep && page_in(p, KVT_TIER_DRAM) && has_record(p))
				add_page(k, s, p, KVT_TIER_DRAM);
			if (page_in(p, KVT_TIER_NVME) && is_sealed(c, p))
				add_page(k, s, p, KVT_TIER_NVME);
		}
		for (uint32_t w = 0; w < ROW_WORDS; w++)
			k->on[l][w] &= w < words ? dram[w] | nvme[w] : 0;
		if (rows % 64)
			bits_clear_range(k->on[l], rows, words * 64);
	}
}

/* After every turn: what was given up is forgotten, what became safe is known. */
static void loss_look(struct core *c)
{
	struct seq *s;

	if (!loss.on)
		return;
	for (unsigned i = 0; i < KNOWN_MOST; i++)
		loss.known[i].seen = false;
	/* Of a sequence that was cut very often the ledger holds the newest cuts only. */
	TAILQ_FOREACH(s, &c->lru, lru)
		if (s->lifetime == KVT_LEASED && s->state != SEQ_CLOSING && s->ix.n_epochs + 2 < LEDGER_MARKS)
			look_at(c, s);
	for (unsigned i = 0; i < KNOWN_MOST; i++)
		if (!loss.known[i].seen)
			loss.known[i].born = 0;
	must(!c->stat.limbo_let_go_bytes, "%llu bytes went before they were sealed, on media without faults",
	     (unsigned long long)c->stat.limbo_let_go_bytes);
}

/* The next life has them all. */
static void loss_check(struct core *c)
{
	for (unsigned i = 0; loss.on && i < KNOWN_MOST; i++) {
		const struct known *k = &loss.known[i];
		const struct seq *s, *found = NULL;

		if (!k->born)
			continue;
		TAILQ_FOREACH(s, &c->lru, lru)
			if (s->born == k->born)
				found = s;
		for (uint32_t l = 0; l < side.shape.lanes; l++)
			bits_for_each(pos, k->on[l], MAX_ROWS) {
				loss.expected++;
				must(found && pos < found->ix.rows &&
					     (bits_test(index_bits(&found->ix, KVT_TIER_DRAM, l), pos) ||
					      bits_test(index_bits(&found->ix, KVT_TIER_NVME, l), pos)),
				     "lane %u row %u was safe below the device, and a kill took it%s", l, pos,
				     found ? "" : " with its sequence");
			}
	}
}

/* Of pages with the same rows in a tier the newest is taken. */
static void loss_check_twice(const struct core *c)
{
	static uint64_t taken[ROW_WORDS + PAGE_SPAN];
	const struct seq *s;

	TAILQ_FOREACH(s, &c->lru, lru)
		for (uint32_t l = 0; l < s->ix.lanes; l++)
			for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
				for (uint32_t i = 0; i < s->ix.lane[l].n; i++) {
					const struct page *p = s->ix.lane[l].v[i], *q;
					uint64_t mask[PAGE_SPAN];
					uint32_t all = index_alive(&s->ix, p, t, mask), alive = all;

					memset(taken, 0, sizeof(taken));
					for (uint32_t j = 0; j < s->ix.lane[l].n; j++) {
						uint64_t other[PAGE_SPAN];

						q = s->ix.lane[l].v[j];
						if (q->number <= p->number || !index_alive(&s->ix, q, t, other))
							continue;
						bits_for_each(b, other, q->span * 64u)
							bits_set(taken, q->first + b);
					}
					bits_for_each(b, mask, p->span * 64u)
						alive -= bits_test(taken, p->first + b);
					must(alive || !all, "lane %u: all rows of page %llx are in newer ones",
					     l, (unsigned long long)p->number);
				}
}
