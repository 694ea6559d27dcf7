/* SPDX-License-Identifier: MIT */
/*
 * torture 13: handles and segment numbers whose generations run out
 * pass: 0 stale accepts
 * quick: every handle of 64 slots with 8-bit generations, every number of a slot of published DRAM, 3 times
 * full: every handle of 4,096 slots, every number, 20 times
 * plants: generation-wraps segment-number-returns
 *
 * shm/handle.c is built here with generations of 8 bits, so that reuse comes round (ABA): objects are made and
 * freed in random order until the table gives no more, and every handle that was ever given out is asked for
 * again and again. Published segments have 12 bits as they are: one is made and freed until its slot's numbers
 * are used up.
 */
#define HANDLE_GEN_MAX 255u
#include "shm/handle.c"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include "tiers/tier.h"

#define LIVE_MAX 4096u

static uint64_t seed = 1;

static uint32_t next_random(uint32_t below)
{
	seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return (uint32_t)(seed >> 33) % below;
}

struct given {
	uint64_t *all; /* every handle so far */
	bool *stale;
	size_t n;
};

/* Stale handles that the table takes for live ones; every one in the end, a few after each step. */
static uint64_t accepted(const struct handle_table *t, const struct given *g, size_t tries)
{
	uint64_t bad = 0;

	for (size_t i = 0; i < tries; i++) {
		size_t k = tries == g->n ? i : next_random((uint32_t)g->n);

		bad += g->stale[k] && handle_get(t, g->all[k], NULL);
	}
	return bad;
}

/* Returns stale accepts and live handles that were refused; the number of handles in *ret_n. */
static uint64_t exhaust(uint32_t slots, uint64_t *ret_n)
{
	size_t most = (size_t)slots * HANDLE_GEN_MAX + 1, live = 0;
	struct given g = {.all = calloc(most, sizeof(*g.all)), .stale = calloc(most, 1)};
	static size_t of[LIVE_MAX]; /* live handles: their places in g */
	static int object;
	struct handle_table *t = NULL;
	uint64_t bad = 0;

	if (!g.all || !g.stale || handle_table_new(&t, slots) < 0)
		abort();
	for (bool dry = false; !dry || live;) {
		if (!dry && live < slots && next_random(2)) {
			uint64_t h = handle_add(t, &object, NULL);

			dry = !h || g.n == most; /* more than there are: they come round */
			bad += g.n == most;
			if (dry)
				continue;
			g.all[g.n] = h;
			of[live++] = g.n++;
		} else if (live) {
			uint32_t k = next_random((uint32_t)live);

			bad += !handle_get(t, g.all[of[k]], NULL);
			handle_del(t, g.all[of[k]]);
			g.stale[of[k]] = true;
			of[k] = of[--live];
			bad += accepted(t, &g, 16);
		}
	}
	bad += accepted(t, &g, g.n);
	*ret_n = g.n;
	handle_table_free(t);
	free(g.all);
	free(g.stale);
	return bad;
}

/* Segments of one owner, made and freed `times` times; returns numbers that came back or were still known. */
static uint64_t numbers(uint32_t times, uint64_t *ret_n)
{
	const struct tier_ops *ops = &tier_dram_ops;
	struct tier_cfg cfg = {.size = UINT64_C(64) << 20, .segment = UINT64_C(2) << 20, .node = -1};
	uint8_t *seen = calloc(1, 1u << 24);
	struct tier *t = NULL;
	char err[128];
	uint64_t bad = 0;

	if (!seen || ops->open(&t, &cfg, err, sizeof(err)) < 0)
		abort();
	for (uint32_t i = 0; i < times; i++) {
		struct tier_io io = {.op = TIER_WRITE, .bytes = 4096, .owner = 7, .room = UINT64_MAX}, *p = &io,
			       *done;
		uint64_t size;
		uint32_t number;

		if (ops->prepare(t, &io) < 0) {
			bad++;
			break;
		}
		memset(io.buf, 1, io.bytes);
		ops->submit(t, &p, 1);
		ops->reap(t, &done, 1);
		ops->release(t, &io);
		number = tier_segment(io.addr);
		bad += seen[number];
		seen[number] = 1;
		bad += ops->segment(t, 7, number, &size) < 0;
		ops->free(t, io.addr, 4096);
		bad += ops->segment(t, 7, number, &size) >= 0;
	}
	*ret_n = times;
	ops->close(t);
	free(seen);
	return bad;
}

int main(void)
{
	const char *mode = getenv("KVT_TORTURE"), *s = getenv("KVT_SEED");
	bool full = mode && !strcmp(mode, "full");
	uint32_t slots = full ? LIVE_MAX : 64, rounds = full ? 20 : 3;
	uint64_t handles, segments, bad = 0, all = 0, stale;

	seed = s ? strtoull(s, NULL, 0) : 1;
	for (uint32_t i = 0; i < rounds; i++) {
		bad += exhaust(slots, &handles);
		all += handles;
	}
	printf("%s 1 - %" PRIu64 " handles of %u slots in %u lives, %" PRIu64 " stale ones accepted\n",
	       bad ? "not ok" : "ok", all, slots, rounds, bad);
	stale = numbers(full ? 20 * 4096 : 2 * 4096 + 10, &segments);
	printf("%s 2 - %" PRIu64 " published segments, %" PRIu64 " numbers came back\n",
	       stale ? "not ok" : "ok", segments, stale);
	printf("1..2\n# figure: 8-bit generations: %" PRIu64 " handles, %" PRIu64 " stale accepts; %" PRIu64
	       " published segments, %" PRIu64 " numbers twice\n",
	       all, bad, segments, stale);
	return bad || stale;
}
