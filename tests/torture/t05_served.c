/* SPDX-License-Identifier: MIT */
/*
 * torture 5: bits flipped below a running daemon, in its memory and in its store
 * pass: every flipped page is a counted miss, every row that comes back is right
 * quick: 6 rounds
 * full: 150 rounds
 * io: both
 * plants: dram-unchecked nvme-unchecked
 *
 * A sequence's rows are demoted, some to DRAM and the rest to NVMe. One bit of every page is flipped where it
 * lies: in the tier's memory by the loop's own thread, and in the container file from outside. Then everything
 * is asked back until nothing is left below. Every row names sequence, lane and position (core_harness.h).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include "many.h"

#include "daemon/internal.h"
#include "tests/unit/core_harness.h"
#include "tiers/nvme.h"

#define ROWS 1000u

struct victim {
	uint64_t handle, rng;
	bool every; /* page, or one of two */
	int fd;
	unsigned flipped[KVT_TIERS];
};

static uint64_t draw(struct victim *v)
{
	v->rng ^= v->rng << 13;
	v->rng ^= v->rng >> 7;
	v->rng ^= v->rng << 17;
	return v->rng;
}

static void flip_in_memory(struct core *c, const struct page *p, uint32_t bit)
{
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];
	struct tier_io io = {.op = TIER_READ, .bytes = p->bytes, .addr = p->addr[0]};

	if (t->ops->prepare(t, &io) < 0)
		abort();
	((uint8_t *)io.buf)[bit / 8] ^= (uint8_t)(1u << bit % 8);
	t->ops->release(t, &io);
}

static void flip_in_store(struct core *c, int fd, const struct page *p, uint32_t bit)
{
	const struct nvme *t = container_of(c->pages.tier[KVT_TIER_NVME], struct nvme, tier);
	uint64_t addr = p->addr[1],
		 at = NVME_PREAMBLE + (addr >> 40) * t->segment_bytes + (addr & 0xffff) * KVT_UNIT + bit / 8;
	uint8_t b;

	if (pread(fd, &b, 1, (off_t)at) != 1)
		abort();
	b ^= (uint8_t)(1u << bit % 8);
	if (pwrite(fd, &b, 1, (off_t)at) != 1 || fdatasync(fd))
		abort();
}

/* On the loop's thread: nothing moves meanwhile. */
static void flip_pages(struct core *c, void *arg)
{
	struct victim *v = arg;
	uint32_t cursor = 0;
	struct seq *s;
	uint64_t h;

	while ((s = handle_next(c->seqs, &cursor, &h)))
		for (uint32_t l = 0; l < s->ix.lanes; l++)
			for (uint32_t i = 0; i < s->ix.lane[l].n; i++) {
				const struct page *p = s->ix.lane[l].v[i];
				uint32_t bit = (uint32_t)(draw(v) % (p->bytes * 8));
				int tier = p->addr[0] != TIER_ADDR_NONE ? KVT_TIER_DRAM : KVT_TIER_NVME;

				if (!v->every && draw(v) % 2)
					continue;
				if (tier == KVT_TIER_DRAM)
					flip_in_memory(c, p, bit);
				else if (p->addr[1] != TIER_ADDR_NONE)
					flip_in_store(c, v->fd, p, bit);
				v->flipped[tier]++;
			}
}

static void one_round(struct harness *h, struct runtime *rt, uint64_t round, uint64_t *flips, uint64_t *rows)
{
	struct victim v = {.rng = round * 977 + 1, .every = round % 2};
	struct kvtier_plan p;
	struct rt_seq q;
	struct core_stat before = harness_stat(h), after;
	char path[sizeof(h->cfg.nvme_path) + 32];
	unsigned all;

	snprintf(path, sizeof(path), "%s/kvtier-000.dat", h->cfg.nvme_path);
	v.fd = open(path, O_RDWR | O_CLOEXEC);
	assert_true(v.fd >= 0);
	assert_int_equal(rt_prepare(&q, rt, (uint32_t)round + 1, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL, NULL), 0);
	assert_int_equal(rt_append(&q, ROWS), 0);
	assert_int_equal(rt_plan(&q, 50, 300 + (uint32_t)(round % 5) * 100, KVT_ROWS_ALL, &p), 0);
	harness_call(h, flip_pages, &v);
	close(v.fd);
	all = v.flipped[KVT_TIER_DRAM] + v.flipped[KVT_TIER_NVME];
	assert_true(v.flipped[KVT_TIER_DRAM] && v.flipped[KVT_TIER_NVME]);
	for (int i = 0; i < 4; i++) /* a plan that misses is made again without what it missed */
		assert_int_equal(rt_plan(&q, ROWS, KVT_ROWS_ALL, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(rt_wrong(&q), 0);
	after = harness_stat(h);
	assert_int_equal(after.miss_corrupt - before.miss_corrupt, all);
	if (v.every)
		assert_int_equal(rt_info(&q).dropped_rows, (ROWS - 50) * rt->lanes);
	*flips += all;
	*rows += ROWS * rt->lanes - rt_info(&q).dropped_rows;
	rt_seq_free(&q, true);
}

int main(void)
{
	uint64_t rounds = many_full() ? 150 : 6, flips = 0, rows = 0;
	struct harness h;
	struct runtime rt;

	setenv("CMOCKA_TEST_ABORT", "1", 1);
	harness_init(&h, true);
	assert_true(harness_start(&h));
	assert_int_equal(rt_open(&rt, h.sock[0], 4), 0);
	for (uint64_t i = 0; i < rounds; i++)
		one_round(&h, &rt, i, &flips, &rows);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
	many_tap(true, "%s pages with a flipped bit were misses, %s other rows right", many_comma(flips),
		 many_comma(rows));
	printf("# figure: %s of %s pages flipped below a running daemon were misses, 0 rows wrong\n",
	       many_comma(flips), many_comma(flips));
	return many_end();
}
