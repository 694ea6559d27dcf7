/* SPDX-License-Identifier: MIT */
#pragma once
/* A daemon, two connections of one user, and sequences with a directory. The including test has cmocka's
 * headers. */
#include "direct_reader.h"

static const struct kvtier_budget keep_all = {
	.size = sizeof(keep_all), .device_rows = KVT_ROWS_ALL, .manual = 1, .policy = "client"};

struct fixture {
	struct harness h;
	struct runtime rt, eye; /* eye: another connection of the same user, for the reader */
};

static inline void begin(struct fixture *f, bool nvme)
{
	harness_init(&f->h, nvme);
	f->h.cfg.dram_size = UINT64_C(48) << 20;
	f->h.cfg.dram_segment = UINT64_C(16) << 20;
	assert_true(harness_start(&f->h));
	assert_int_equal(rt_open(&f->rt, f->h.sock[0], 4), 0);
	assert_int_equal(rt_open(&f->eye, f->h.sock[0], 4), 0);
}

static inline void finish(struct fixture *f)
{
	rt_close(&f->eye);
	rt_close(&f->rt);
	harness_stop(&f->h);
	harness_rm(f->h.dir);
}

static inline void begin_seq(struct fixture *f, struct rt_seq *q, uint32_t id, uint32_t lifetime, uint32_t rows)
{
	assert_int_equal(rt_prepare(q, &f->rt, id, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(q, lifetime, &keep_all), 0);
	assert_int_equal(harness_direct(&f->h, q), 0);
	assert_int_equal(rt_append(q, rows), 0);
}

/* One look that must be believable, for nothing moves. */
static inline uint64_t look(struct reader *r)
{
	uint64_t before = r->rows;

	for (int i = 0; i < 2000 && !reader_look(r, 0, READER_PAGES); i++)
		usleep(1000);
	assert_int_equal(r->wrong, 0);
	assert_int_equal(r->bad_crc, 0);
	assert_int_equal(r->lost, 0);
	return r->rows - before;
}

/* Wait until the directory lists so many rows; how many it does. */
static inline uint64_t settle(struct reader *r, uint64_t want)
{
	uint64_t rows = look(r);

	for (int i = 0; i < 400 && rows != want; i++) {
		usleep(5000);
		rows = look(r);
	}
	return rows;
}

static inline uint64_t published(struct fixture *f, uint64_t want)
{
	uint64_t have = harness_stat(&f->h).tier[KVT_TIER_DRAM].published;

	for (int i = 0; i < 200 && have != want; i++) {
		usleep(5000);
		have = harness_stat(&f->h).tier[KVT_TIER_DRAM].published;
	}
	return have;
}
