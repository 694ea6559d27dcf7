/* SPDX-License-Identifier: MIT */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include "core_harness.h"

static void demote_and_promote_through_dram(void **state)
{
	struct harness h;
	struct runtime rt;
	struct rt_seq q;
	struct kvtier_plan p;
	struct core_stat st;

	harness_init(&h, false);
	assert_true(harness_start(&h));
	assert_int_equal(rt_open(&rt, h.sock[0], 4), 0);
	assert_int_equal(rt_prepare(&q, &rt, 7, 1200, 1024, 4096), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL,
				     &(struct kvtier_budget){.size = sizeof(struct kvtier_budget),
							     .device_rows = KVT_ROWS_ALL,
							     .manual = 1}),
			 0);
	assert_int_equal(rt_append(&q, 1000), 0);
	assert_int_equal(rt_plan(&q, 200, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(p.rows_out, 800 * rt.lanes);
	assert_int_equal(kvtier_seq_resident(q.s, 0, NULL, 0), 200);
	assert_int_equal(rt_wrong(&q), 0);
	assert_int_equal(rt_plan(&q, KVT_ROWS_ALL, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(p.rows_in, 800 * rt.lanes);
	assert_int_equal(kvtier_seq_resident(q.s, 0, NULL, 0), 1000);
	assert_int_equal(rt_wrong(&q), 0);
	/* Clean rows leave again without a copy. */
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(rt_wrong(&q), 0);
	st = harness_stat(&h);
	assert_int_equal(st.rows_demoted[KVT_TIER_DRAM], 800 * rt.lanes + p.rows_out);
	assert_int_equal(st.miss_corrupt + st.miss_io + st.miss_stale, 0);
	rt_seq_free(&q, false);
	st = harness_stat(&h);
	assert_int_equal(st.seqs, 0);
	assert_int_equal(st.tier[KVT_TIER_DRAM].used, 0);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(demote_and_promote_through_dram),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
