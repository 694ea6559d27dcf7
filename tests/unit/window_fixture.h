/* SPDX-License-Identifier: MIT */
#pragma once
/* A daemon, a connection to it and one way of life, for the tests of sequences with a window. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include "core_harness.h"
#include "window_gpu.h"

#define K 48u
#define V 32u
#define RING 24576u /* two pages of 128 rows with their headers, and little more */

struct fixture {
	struct harness h;
	struct wlink l;
};

static inline void begin(struct fixture *f, bool nvme)
{
	harness_init(&f->h, nvme);
	assert_true(harness_start(&f->h));
	assert_int_equal(wl_connect(&f->l, f->h.sock[0]), 0);
	assert_int_equal(wl_model(&f->l, "bytes", KVT_DTYPE_OPAQUE, 0, 3, 3, K, V), 0);
}

static inline void begin_seq(struct fixture *f, struct wseq *q, uint32_t id, uint32_t lifetime, uint64_t ring,
			     uint32_t rows)
{
	struct wire_budget b = wq_budget(KVT_ROWS_ALL, 0, 0);

	strcpy(b.policy, "client");
	assert_int_equal(wq_make(q, &f->l, id, 1200, 1200, 4096, ring == RING ? RING / 2 : ring, ring, 1), 0);
	assert_int_equal(wq_open(q, W_OP_OPEN, lifetime, 0, 0, &b), 0);
	for (uint32_t n; rows; rows -= n) {
		n = MIN(rows, 200u);
		assert_int_equal(wq_append(q, n), 0);
	}
}

static inline void finish(struct fixture *f)
{
	wl_close(&f->l);
	harness_stop(&f->h);
	harness_rm(f->h.dir);
}

static inline void assert_no_miss(struct fixture *f)
{
	struct core_stat st = harness_stat(&f->h);

	assert_int_equal(st.miss_corrupt + st.miss_io + st.miss_stale + st.miss_client_mutated, 0);
	assert_int_equal(st.hangups_protocol, 0);
}

/* Every sequence and page is gone; waits for the daemon to notice. */
static inline void assert_empty(struct fixture *f)
{
	struct core_stat st = {.seqs = 1};

	for (int i = 0; i < 200 && (st.seqs || st.tier[KVT_TIER_DRAM].used || st.bytes[KVT_TIER_NVME]); i++) {
		st = harness_stat(&f->h);
		usleep(5000);
	}
	assert_int_equal(st.seqs, 0);
	assert_int_equal(st.tier[KVT_TIER_DRAM].used, 0);
	assert_int_equal(st.bytes[KVT_TIER_DRAM] + st.bytes[KVT_TIER_NVME], 0);
}

/* The connection ends, with one line of the daemon's; an honest one works on. */
static inline void assert_ended(struct fixture *f)
{
	uint8_t b[512];
	ssize_t n = 1;

	for (int i = 0; i < 100 && n; i++)
		n = sock_wait(f->l.fd, POLLIN, now_ns() + 100000000u) > 0
			    ? sock_recv(f->l.fd, b, sizeof(b), NULL, NULL)
			    : -1;
	assert_int_equal(n, 0);
	assert_int_equal(harness_stat(&f->h).hangups_protocol, 1);
}

/* ---- a life -------------------------------------------------------------------------- */

/* Some steps of a plan that nobody waits for, then a cut through it. */
static inline void truncate_somewhere(struct wseq *q)
{
	struct wire_budget b = wq_budget(20 + wq_random(q) % 300, wq_random(q) % 600, KVT_ROWS_ALL);
	uint32_t steps = wq_random(q) % 12;
	uint64_t id;

	assert_int_equal(wq_ask(q, &b, &id), 0);
	for (uint32_t i = 0; i < steps; i++) {
		assert_true(wq_step(q) >= 0);
		usleep(wq_random(q) % 300);
	}
	assert_int_equal(wq_truncate(q, q->rows - wq_random(q) % (q->rows / 3)), 0);
}

static inline void any_life(struct fixture *f, struct wseq *q, int steps)
{
	for (int k = 0; k < steps; k++) {
		uint32_t what = wq_random(q) % 12, most = 0;
		uint64_t id;

		for (uint32_t l = 0; l < f->l.lanes; l++)
			most = MAX(most, q->count[l]);
		if (what < 4 && most + 150 < q->cap && q->rows + 150 < q->max_rows) {
			assert_int_equal(wq_append(q, 1 + wq_random(q) % 150), 0);
		} else if (what < 8) {
			assert_int_equal(wq_plan(q, 20 + wq_random(q) % 900, wq_random(q) % 600,
						 what == 7 ? wq_random(q) % 200 : KVT_ROWS_ALL),
					 0);
		} else if (what == 8) {
			uint32_t at = wq_random(q) % q->rows;

			assert_int_equal(wq_fetch(q, at, MIN(40u, q->rows - at), &id), 0);
			assert_int_equal(wq_follow(q, id), 0);
		} else if (what == 9) {
			q->nack_lane = wq_random(q) % f->l.lanes;
			assert_int_equal(wq_plan(q, 20 + wq_random(q) % 900, wq_random(q) % 600, KVT_ROWS_ALL),
					 0);
		} else if (q->rows > 10) {
			truncate_somewhere(q);
		}
		assert_int_equal(wq_wrong(q), 0);
	}
}
