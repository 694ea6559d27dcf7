/* SPDX-License-Identifier: MIT */
/* Write-through of sequences whose rows are in the region: copies as rows are ranked, none when they leave. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include "core_harness.h"

struct fixture {
	struct harness h;
	struct runtime rt;
};

static void begin(struct fixture *f, bool nvme, uint64_t dram)
{
	harness_init(&f->h, nvme);
	f->h.cfg.dram_size = dram;
	assert_true(harness_start(&f->h));
	assert_int_equal(rt_open(&f->rt, f->h.sock[0], 4), 0);
}

static void finish(struct fixture *f)
{
	rt_close(&f->rt);
	harness_stop(&f->h);
	harness_rm(f->h.dir);
}

static struct kvtier_budget through(uint32_t device, uint32_t dram, uint32_t nvme)
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .device_rows = device,
				  .dram_rows = dram,
				  .nvme_rows = nvme,
				  .slack_rows = 64,
				  .policy = "client",
				  .write_through = 1};

	return b;
}

/* By itself, every slack rows, although no budget is exceeded; then a plan that drops has nothing to copy. */
static void rows_get_their_copies_as_they_come(void **state)
{
	struct kvtier_budget b = through(KVT_ROWS_ALL, 200, KVT_ROWS_ALL);
	struct fixture f;
	struct rt_seq q;
	struct kvtier_plan p;
	struct core_stat st;

	begin(&f, true, UINT64_C(64) << 20);
	assert_int_equal(rt_prepare(&q, &f.rt, 1, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL, &b), 0);
	for (uint32_t n = 0; n < 10; n++) {
		assert_int_equal(rt_append(&q, 65), 0);
		assert_int_equal(rt_follow(&q, 0, &p), 0);
		assert_int_equal(p.rows_out, 65 * f.rt.lanes);
		assert_int_equal(p.rows_drop, 0);
		assert_int_equal(rt_wrong(&q), 0);
		assert_int_equal(kvtier_seq_resident(q.s, 0, NULL, 0), (int)q.rows);
	}
	st = harness_stat(&f.h);
	assert_int_equal(st.rows[KVT_TIER_DEVICE], 650 * f.rt.lanes);
	assert_int_equal(st.rows_demoted[KVT_TIER_DRAM], 200 * f.rt.lanes);
	assert_int_equal(st.rows_demoted[KVT_TIER_NVME], 450 * f.rt.lanes);
	assert_int_equal(rt_plan(&q, 100, 200, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(p.rows_out, 0);
	assert_int_equal(rt_info(&q).dropped_rows, 0);
	assert_int_equal(rt_plan(&q, 650, 200, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(p.rows_in, 550 * f.rt.lanes);
	assert_int_equal(rt_wrong(&q), 0);
	rt_seq_free(&q, false);
	finish(&f);
}

/* Where there is no room no copies are made, and plans come through all the same. */
static void copies_stop_where_room_does(void **state)
{
	struct kvtier_budget b = through(KVT_ROWS_ALL, KVT_ROWS_ALL, 0);
	struct fixture f;
	struct rt_seq q;
	struct kvtier_plan p;

	b.manual = 1;
	harness_init(&f.h, false);
	f.h.cfg.tenant[0].dram_bytes = 512 << 10;
	assert_true(harness_start(&f.h));
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	assert_int_equal(rt_prepare(&q, &f.rt, 2, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL, &b), 0);
	for (uint32_t n = 0; n < 5; n++) {
		assert_int_equal(rt_append(&q, 200), 0);
		assert_int_equal(rt_plan(&q, KVT_ROWS_ALL, KVT_ROWS_ALL, 0, &p), 0);
		assert_int_equal(kvtier_seq_resident(q.s, 5, NULL, 0), (int)q.rows);
	}
	assert_true(harness_stat(&f.h).bytes[KVT_TIER_DRAM] > 128 << 10);
	assert_true(harness_stat(&f.h).bytes[KVT_TIER_DRAM] <= 512 << 10);
	assert_int_equal(rt_info(&q).dropped_rows, 0);
	assert_int_equal(rt_wrong(&q), 0);
	rt_seq_free(&q, false);
	finish(&f);
}

/* Writing fails again and again: what stays on the device only lacks its copy. */
static void a_tier_that_fails_costs_no_row(void **state)
{
	struct kvtier_budget b = through(KVT_ROWS_ALL, 0, KVT_ROWS_ALL);
	struct fixture f;
	struct rt_seq q;
	struct kvtier_plan p;

	b.manual = 1;
	harness_init(&f.h, true);
	strcpy(f.h.cfg.nvme_fault, "seed=5,write_eio=1000");
	assert_true(harness_start(&f.h));
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	assert_int_equal(rt_prepare(&q, &f.rt, 3, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL, &b), 0);
	assert_int_equal(rt_append(&q, 600), 0);
	assert_int_equal(rt_plan(&q, 1000, 0, 500, &p), 0);
	assert_int_equal(p.rows_drop, 0);
	assert_int_equal(kvtier_seq_resident(q.s, 7, NULL, 0), 600);
	assert_int_equal(rt_info(&q).dropped_rows, 0);
	assert_true(harness_stat(&f.h).miss_io > 0);
	assert_int_equal(rt_wrong(&q), 0);
	rt_seq_free(&q, false);
	finish(&f);
}

/* Equal lanes, whole tokens, a pinned row, budgets that shrink and grow: every byte is where it belongs. */
static void any_life_keeps_every_byte(void **state)
{
	struct kvtier_budget b = through(300, 200, KVT_ROWS_ALL);
	struct fixture f;
	struct rt_seq q[3];

	begin(&f, true, UINT64_C(64) << 20);
	for (uint32_t i = 0; i < 3; i++) {
		struct kvtier_seq_opts o;

		assert_int_equal(rt_prepare(&q[i], &f.rt, 10 + i, 1200, 1200, 4096), 0);
		b.manual = 1;
		o = rt_opts(&q[i], KVT_EPHEMERAL, &b);
		o.granularity = i == 1 ? KVT_GRAN_TOKEN : KVT_GRAN_HEAD;
		o.equal_lanes = i == 2;
		assert_int_equal(kvtier_seq_open(f.rt.c, f.rt.m, &o, &q[i].s), 0);
	}
	for (int step = 0; step < 60; step++) {
		struct rt_seq *s = &q[step % 3];
		int have = kvtier_seq_resident(s->s, 0, NULL, 0);
		uint32_t n;

		if (have + 150 < (int)s->cap && s->rows + 150 < s->max_rows)
			assert_int_equal(rt_append(s, 1 + rt_random(s) % 150), 0);
		assert_int_equal(rt_plan(s, 20 + rt_random(s) % 900, rt_random(s) % 300, KVT_ROWS_ALL, NULL),
				 0);
		assert_int_equal(rt_wrong(s), 0);
		if (rt_random(s) % 4 == 0) {
			n = s->rows - rt_random(s) % (s->rows / 3);
			assert_int_equal(kvtier_seq_truncate(s->s, n), 0);
			s->rows = n;
			s->salt++;
		}
		assert_int_equal(rt_info(s).dropped_rows, 0);
	}
	for (uint32_t i = 0; i < 3; i++)
		rt_seq_free(&q[i], false);
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rows_get_their_copies_as_they_come),
		cmocka_unit_test(copies_stop_where_room_does),
		cmocka_unit_test(a_tier_that_fails_costs_no_row),
		cmocka_unit_test(any_life_keeps_every_byte),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
