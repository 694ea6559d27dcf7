/* SPDX-License-Identifier: MIT */
/* Tenants' turns at the workers: what everybody's jobs cost, and who is charged. Job by job. */
#include "scorer_fixture.h"

#include "stepped_fixture.h"

#define MANY 8u

struct two {
	struct harness h;
	struct runtime rt[2];
};

static void begin_two(struct two *f)
{
	harness_init(&f->h, false);
	f->h.stepped = true;
	assert_true(harness_start(&f->h));
	for (int t = 0; t < 2; t++)
		assert_int_equal(step_open(&f->rt[t], f->h.sock[t]), 0);
}

static void end_two(struct two *f)
{
	for (int t = 0; t < 2; t++)
		rt_close(&f->rt[t]);
	harness_stop(&f->h);
	harness_rm(f->h.dir);
}

static void carry_out(struct harness *h, struct rt_seq *q)
{
	assert_int_equal(step_until(h, q), 0);
	assert_int_equal(rt_follow(q, 0, NULL), 0);
	assert_int_equal(rt_wrong(q), 0);
}

/* Another policy reads all rows again: as dear as new rows, not free because none is new. */
static void scoring_again_costs_as_much(void **state)
{
	struct two f;
	struct rt_seq again[MANY], once;
	unsigned before = 0;

	begin_two(&f);
	for (uint32_t i = 0; i < MANY; i++) {
		assert_int_equal(step_make(&again[i], &f.rt[0], i + 1), 0);
		assert_int_equal(step_want(&again[i], "knorm", KVT_ROWS_ALL), 0);
		carry_out(&f.h, &again[i]);
	}
	assert_int_equal(step_make(&once, &f.rt[1], 100), 0);
	for (uint32_t i = 0; i < MANY; i++)
		assert_int_equal(step_want(&again[i], "vnorm", KVT_ROWS_ALL), 0);
	assert_int_equal(step_want(&once, "knorm", KVT_ROWS_ALL), 0);
	assert_int_equal(step_until(&f.h, &once), 0);
	for (uint32_t i = 0; i < MANY; i++)
		before += step_ready(&again[i]);
	assert_in_range(before, 0, MANY / 2);
	carry_out(&f.h, &once);
	for (uint32_t i = 0; i < MANY; i++) {
		carry_out(&f.h, &again[i]);
		rt_seq_free(&again[i], true);
	}
	rt_seq_free(&once, true);
	end_two(&f);
}

/* What stands before a job of its own: bytes read for each tenant's plans. */
static void batches(struct core *c, void *arg)
{
	uint64_t *bytes = arg;

	for (unsigned t = 0; t < 2; t++)
		bytes[t] = c->tenant[t].in_batch ? ((struct job *)c->tenant[t].in_batch)->bytes : 0;
}

static void reading(struct core *c, void *arg)
{
	*(unsigned *)arg = c->in_jobs;
}

/* Pages that are read while the workers are busy go to them together, but no tenant's with another's. */
static void a_batch_has_one_tenant(void **state)
{
	const uint32_t back = 100;
	const int owner[] = {0, 0, 1}; /* the first one keeps the workers busy */
	struct two f;
	struct rt_seq q[3];
	unsigned jobs = 0;
	uint64_t bytes[2] = {0, 0}, end, all = (uint64_t)back * 6 * 128;

	begin_two(&f);
	for (uint32_t i = 0; i < 3; i++) {
		assert_int_equal(step_make(&q[i], &f.rt[owner[i]], i + 1), 0);
		assert_int_equal(step_want(&q[i], "streaming", STEP_ROWS - back), 0);
		carry_out(&f.h, &q[i]);
	}
	end = now_ns() + STEP_WAIT_NS;
	assert_int_equal(step_want(&q[0], "streaming", KVT_ROWS_ALL), 0);
	while (!jobs && now_ns() < end)
		harness_call(&f.h, reading, &jobs);
	for (uint32_t i = 1; i < 3; i++)
		assert_int_equal(step_want(&q[i], "streaming", KVT_ROWS_ALL), 0);
	while ((bytes[0] < all || bytes[1] < all) && now_ns() < end)
		harness_call(&f.h, batches, bytes);
	assert_in_range(bytes[0], all, 2 * all - 1); /* the first one may have left some */
	assert_int_equal(bytes[1], all);
	for (uint32_t i = 0; i < 3; i++) {
		carry_out(&f.h, &q[i]);
		rt_seq_free(&q[i], true);
	}
	end_two(&f);
}

/* A network is made in the turn of who asked for it, whoever is first in the table of tenants. */
static void a_network_is_its_askers_work(void **state)
{
	struct wire_scorer m;
	struct runtime rt;
	struct rt_seq q;
	struct fixture f;
	unsigned after = 0;

	memset(&f, 0, sizeof(f));
	harness_init(&f.h, false);
	snprintf(f.h.cfg.model_dir, sizeof(f.h.cfg.model_dir), "%s", f.h.dir);
	write_weights(&f, 2, 21);
	f.h.stepped = true;
	assert_true(harness_start(&f.h));
	assert_int_equal(step_open(&rt, f.h.sock[0]), 0);
	assert_int_equal(step_make(&q, &rt, 1), 0);
	assert_int_equal(wl_connect(&f.l, f.h.sock[1]), 0);
	register_kvp(&f.l);
	wire_init(&m.hdr, W_SCORER, sizeof(m), 9);
	m.model = f.l.model;
	strcpy(m.policy, "kvp");
	assert_int_equal(sock_send(f.l.fd, &m, sizeof(m), NULL, 0), 0);
	for (uint64_t end = now_ns() + STEP_WAIT_NS; !step(&f.h) && now_ns() < end;) /* the file is read */
		usleep(1000);
	assert_int_equal(step_want(&q, "knorm", KVT_ROWS_ALL), 0);
	assert_int_equal(step_until(&f.h, &q), 0);
	while (step(&f.h))
		after++;
	assert_in_range(after, LANES - 1, LANES);
	carry_out(&f.h, &q);
	rt_seq_free(&q, true);
	rt_close(&rt);
	wl_close(&f.l);
	harness_stop(&f.h);
	harness_rm(f.h.dir);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(scoring_again_costs_as_much),
		cmocka_unit_test(a_batch_has_one_tenant),
		cmocka_unit_test(a_network_is_its_askers_work),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
