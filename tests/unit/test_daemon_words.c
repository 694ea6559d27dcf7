/* SPDX-License-Identifier: MIT */
/* What a client says in its slot, in orders that an honest one may choose. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include "core_harness.h"

static void rows_may_come_between_applying_and_saying_so(void **state)
{
	struct kvtier_plan p = {.size = sizeof(p)};
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = 24, .dram_rows = UINT32_MAX, .manual = 1, .policy = "client"};
	struct runtime rt;
	struct harness h;
	struct rt_seq q;
	uint64_t id;

	harness_init(&h, false);
	assert_true(harness_start(&h));
	assert_int_equal(rt_open(&rt, h.sock[0], 2), 0);
	assert_int_equal(rt_prepare(&q, &rt, 1, 100, 16, 1000), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL, NULL), 0);
	assert_int_equal(rt_append(&q, 90), 0);
	assert_int_equal(kvtier_plan_request(q.s, &b, &id), 0);
	assert_int_equal(kvtier_plan_wait(q.s, id, KVT_PLAN_READY, 10000, &p), 0);
	assert_int_equal(kvtier_plan_apply(q.s, &p), 0);
	/* More than was free before, as many as are free now; the daemon looks before it hears of the plan. */
	for (uint32_t l = 0; l < rt.lanes; l++)
		for (uint32_t i = 0; i < 60; i++)
			rt_write(&q, l, 24 + i, 90 + i);
	assert_int_equal(kvtier_seq_append(q.s, KVT_ALL_LAYERS, 90, 60), 0);
	q.rows = 150;
	assert_int_equal(rt_info(&q).rows, 150);
	assert_int_equal(kvtier_plan_ack(q.s, p.id, NULL), 0);
	assert_int_equal(rt_wrong(&q), 0);
	assert_int_equal(rt_info(&q).rows, 150);
	assert_int_equal(harness_stat(&h).hangups_protocol, 0);
	rt_seq_free(&q, true);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rows_may_come_between_applying_and_saying_so),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
