/* SPDX-License-Identifier: MIT */
/* Sequences with a window and the operator: pins, demotions, freezing, observing, drains. */
#include "window_fixture.h"

struct steer {
	uint64_t handle;
	int pin, keep, freeze; /* -1: leave it */
	bool promote;
};

static void steer_call(struct core *c, void *arg)
{
	const struct steer *t = arg;
	char err[200];

	if (t->pin >= 0)
		assert_int_equal(core_seq_pin(c, t->handle, (uint32_t)t->pin, 10, true, err, sizeof(err)), 0);
	if (t->keep >= 0)
		assert_int_equal(core_seq_demote(c, t->handle, (uint32_t)t->keep, err, sizeof(err)), 0);
	if (t->promote)
		assert_int_equal(core_seq_promote(c, t->handle, err, sizeof(err)), 0);
	if (t->freeze >= 0)
		assert_int_equal(core_freeze(c, t->freeze), 0);
}

static void operators_steer_them_like_others(void **state)
{
	struct steer t = {.pin = 200, .keep = -1, .freeze = -1};
	struct wire_budget b = wq_budget(100, KVT_ROWS_ALL, 0);
	struct fixture f;
	struct wseq q;
	uint64_t id;

	begin(&f, false);
	begin_seq(&f, &q, 11, KVT_EPHEMERAL, RING, 600);
	t.handle = q.handle;
	harness_call(&f.h, steer_call, &t);
	assert_int_equal(wq_plan(&q, 100, KVT_ROWS_ALL, 0), 0);
	for (uint32_t l = 0; l < f.l.lanes; l++)
		for (uint32_t pos = 200; pos < 210; pos++)
			assert_int_equal(*wq_pos(&q, l, *wq_slot(&q, l, pos)), pos);
	/* Down to a few, and back up to the budget, without a word of the client's. */
	t = (struct steer){.handle = q.handle, .pin = -1, .keep = 30, .freeze = -1};
	id = q.applied + 1;
	harness_call(&f.h, steer_call, &t);
	assert_int_equal(wq_follow(&q, id), 0);
	assert_int_equal(q.count[5], 30);
	t.keep = -1;
	t.promote = true;
	id = q.applied + 1;
	harness_call(&f.h, steer_call, &t);
	assert_int_equal(wq_follow(&q, id), 0);
	assert_int_equal(q.count[5], 100);
	/* Frozen, nothing is published; then all goes on. */
	t = (struct steer){.handle = q.handle, .pin = -1, .keep = -1, .freeze = 1};
	harness_call(&f.h, steer_call, &t);
	assert_int_equal(wq_ask(&q, &b, &id), KVT_E_BUSY);
	assert_int_equal(wq_append(&q, 100), 0);
	assert_int_equal(wq_step(&q), 0);
	t.freeze = 0;
	harness_call(&f.h, steer_call, &t);
	assert_int_equal(wq_plan(&q, 50, KVT_ROWS_ALL, 0), 0);
	assert_int_equal(q.count[0], 50);
	assert_int_equal(wq_wrong(&q), 0);
	assert_no_miss(&f);
	wq_free(&q);
	finish(&f);
}

static void observing_publishes_nothing(void **state)
{
	struct wire_budget b = wq_budget(100, KVT_ROWS_ALL, 0);
	struct fixture f;
	struct wseq q;

	harness_init(&f.h, false);
	f.h.cfg.observe = true;
	assert_true(harness_start(&f.h));
	assert_int_equal(wl_connect(&f.l, f.h.sock[0]), 0);
	assert_int_equal(wl_model(&f.l, "bytes", KVT_DTYPE_OPAQUE, 0, 3, 3, K, V), 0);
	b.manual = 0;
	b.write_through = 1;
	strcpy(b.policy, "client");
	assert_int_equal(wq_make(&q, &f.l, 12, 1200, 1200, 4096, RING, RING, 1), 0);
	assert_int_equal(wq_open(&q, W_OP_OPEN, KVT_EPHEMERAL, 0, 0, &b), 0);
	for (uint32_t i = 1; i <= 3; i++) {
		assert_int_equal(wq_append(&q, 200), 0);
		for (int k = 0; k < 1000 && harness_stat(&f.h).plans < i; k++)
			usleep(1000);
		assert_int_equal(harness_stat(&f.h).plans, i);
		assert_int_equal(wq_step(&q), 0);
	}
	assert_int_equal(harness_stat(&f.h).rows_demoted[KVT_TIER_DRAM], 0);
	wq_free(&q);
	finish(&f);
}

struct drain {
	_Atomic int done;
};

static void on_drained(void *arg)
{
	atomic_store(&((struct drain *)arg)->done, 1);
}

static void drain_call(struct core *c, void *arg)
{
	core_drain(c, on_drained, arg);
}

/* A drain does not wait for a client that does nothing: 20 s would be its deadline. */
static void a_drain_waits_for_no_client(void **state)
{
	struct wire_budget b = wq_budget(100, KVT_ROWS_ALL, 0);
	struct drain d = {.done = 0};
	struct fixture f;
	struct wseq q;
	uint64_t id, begun;

	begin(&f, true);
	begin_seq(&f, &q, 13, KVT_EPHEMERAL, RING, 600);
	assert_int_equal(wq_ask(&q, &b, &id), 0);
	q.stop_out = true;
	for (int i = 0; i < 1000 && q.plan < id; i++) {
		assert_int_equal(wq_step(&q), 0);
		usleep(1000);
	}
	begun = now_ns();
	harness_call(&f.h, drain_call, &d);
	while (!atomic_load(&d.done) && now_ns() - begun < UINT64_C(30000000000))
		usleep(1000);
	assert_int_equal(atomic_load(&d.done), 1);
	assert_true(now_ns() - begun < UINT64_C(15000000000));
	wq_free(&q);
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(operators_steer_them_like_others),
		cmocka_unit_test(observing_publishes_nothing),
		cmocka_unit_test(a_drain_waits_for_no_client),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
