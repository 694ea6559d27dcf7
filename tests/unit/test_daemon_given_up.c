/* SPDX-License-Identifier: MIT */
/* A plan that does not come, whatever is tried: its client learns that at once, keeps its rows, and may ask
 * again. */
#include "window_fixture.h"

/* Whatever this client announces, its window holds something else: after a few attempts the daemon stops
 * asking. */
static void who_never_keeps_its_word_is_told(void **state)
{
	struct wire_budget b = wq_budget(300, 300, KVT_ROWS_ALL);
	uint64_t last = 0, id, end;
	struct fixture f;
	struct wseq q;
	uint32_t why;

	begin(&f, true);
	begin_seq(&f, &q, 4, KVT_EPHEMERAL, 1 << 20, 1000);
	for (int i = 0; i < 2; i++) {
		assert_int_equal(wq_ask(&q, &b, &id), 0);
		assert_true(id > last);
		why = 0;
		end = now_ns() + UINT64_C(20000000000);
		while (plan_given_up(q.area, q.area_bytes, &why) < id && now_ns() < end) {
			q.bad_crc = 0;
			assert_true(wq_step(&q) >= 0);
		}
		last = plan_given_up(q.area, q.area_bytes, &why);
		assert_true(last >= id);
		assert_int_equal(why, -KVT_E_CORRUPT);
	}
	q.bad_crc = UINT32_MAX;
	assert_int_equal(wq_plan(&q, 300, 300, KVT_ROWS_ALL), 0);
	assert_true(q.applied > last);
	assert_int_equal(plan_given_up(q.area, q.area_bytes, &why), 0);
	assert_int_equal(wq_info(&q).dropped_rows, 0);
	assert_int_equal(wq_wrong(&q), 0);
	assert_int_equal(wq_close(&q, true), 0);
	wq_free(&q);
	finish(&f);
}

static void freeze(struct core *c, void *arg)
{
	core_freeze(c, *(bool *)arg);
}

/* Asked for before there were rows, which come when no plans are made: nobody waits for the thaw. */
static void who_asked_before_a_freeze_is_told(void **state)
{
	struct kvtier_budget b = {.size = sizeof(b), .device_rows = 100, .manual = 1, .policy = "client"};
	struct kvtier_plan p = {.size = sizeof(p)};
	struct runtime rt;
	struct harness h;
	struct rt_seq q;
	uint64_t id, next;

	harness_init(&h, false);
	assert_true(harness_start(&h));
	assert_int_equal(rt_open(&rt, h.sock[0], 2), 0);
	assert_int_equal(rt_prepare(&q, &rt, 1, 1024, 64, 1024), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL, &b), 0);
	assert_int_equal(kvtier_plan_request(q.s, &b, &id), 0);
	harness_call(&h, freeze, &(bool){true});
	assert_int_equal(rt_append(&q, 300), 0);
	assert_int_equal(kvtier_plan_wait(q.s, id, KVT_PLAN_READY, 20000, &p), KVT_E_BUSY);
	assert_non_null(strstr(kvtier_last_error(), "given up"));
	assert_int_equal(kvtier_plan_request(q.s, &b, &next), KVT_E_BUSY);
	harness_call(&h, freeze, &(bool){false});
	assert_int_equal(kvtier_plan_request(q.s, &b, &next), 0);
	assert_true(next > id);
	assert_int_equal(rt_follow(&q, next, &p), 0);
	assert_int_equal(rt_resident(&q, 0, NULL), 100);
	assert_int_equal(rt_wrong(&q), 0);
	rt_seq_free(&q, true);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(who_never_keeps_its_word_is_told),
		cmocka_unit_test(who_asked_before_a_freeze_is_told),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
