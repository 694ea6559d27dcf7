/* SPDX-License-Identifier: MIT */
/* Published memory under pressure: it comes back when nobody has it any more, whatever a client says of it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <fcntl.h>
#include "daemon/pressure.h"
#include "direct_fixture.h"

static void set_reserve(struct core *c, void *arg)
{
	c->cfg.pressure_reserve = *(uint64_t *)arg;
	c->cfg.pressure_floor = 0;
	c->cfg.pressure_shrink = true;
	pressure_tick(c);
}

static void squeeze(struct fixture *f, bool on)
{
	uint64_t reserve = on ? UINT64_C(64) << 40 : 0;

	harness_call(&f->h, set_reserve, &reserve);
}

static void tenant_now(struct core *c, void *arg)
{
	uint32_t at = 0;

	core_tenant_next(c, &at, arg);
}

/* A sequence of which all but 10 rows lie in published memory that the reader has mapped. */
static void spread(struct fixture *f, struct rt_seq *q, struct reader *r, uint32_t id)
{
	begin_seq(f, q, id, KVT_EPHEMERAL, 1000);
	assert_int_equal(reader_open(r, q, f->eye.c), 0);
	assert_int_equal(rt_plan(q, 10, KVT_ROWS_ALL, KVT_ROWS_ALL, NULL), 0);
	assert_int_equal(look(r), 990 * q->rt->lanes);
	assert_true(r->segs > 0);
}

static uint64_t late(struct fixture *f)
{
	uint64_t have = 0;

	for (int i = 0; i < 600 && !have; i++) {
		usleep(5000);
		have = harness_stat(&f->h).tier[KVT_TIER_DRAM].late;
	}
	return have;
}

static void let_go(struct reader *r)
{
	for (uint32_t i = 0; i < r->segs; i++)
		seg_close(&r->seg[i]);
	r->segs = 0;
}

static uint32_t hints(struct fixture *f)
{
	while (kvtier_process(f->eye.c) > 0)
		;
	return atomic_load(&f->eye.c->link->revokes);
}

/* What was moved down for it comes back up by a plan, as it was. */
static void read_back(struct fixture *f, struct rt_seq *q)
{
	squeeze(f, false);
	assert_int_equal(rt_plan(q, 1000, 0, KVT_ROWS_ALL, NULL), 0);
	assert_int_equal(rt_wrong(q), 0);
}

static void a_willing_client_gives_back(void **state)
{
	struct core_stat st;
	struct fixture f;
	struct rt_seq q;
	struct reader r;

	begin(&f, true);
	spread(&f, &q, &r, 21);
	assert_int_equal(hints(&f), 0);
	squeeze(&f, true);
	assert_int_equal(settle(&r, 0), 0);
	let_go(&r);
	assert_int_equal(published(&f, 0), 0);
	st = harness_stat(&f.h);
	assert_int_equal(st.rows_dropped, 0);
	assert_true(st.revokes > 0 && st.revoke_returned_bytes >= UINT64_C(2) << 20);
	assert_true(hints(&f) > 0);
	read_back(&f, &q);
	reader_close(&r);
	rt_seq_free(&q, false);
	finish(&f);
}

/* Its memory stays and is its tenant's; others give instead; nobody is given the segment any more. */
static void a_stuck_client_keeps_and_pays(void **state)
{
	struct core_tenant_stat t;
	struct core_stat st;
	struct fixture f;
	struct rt_seq q, plain;
	struct reader r;
	uint64_t bytes = 0;
	int fd;

	begin(&f, true);
	spread(&f, &q, &r, 22);
	assert_int_equal(rt_prepare(&plain, &f.rt, 23, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&plain, KVT_EPHEMERAL, &keep_all), 0);
	assert_int_equal(rt_append(&plain, 1000), 0);
	assert_int_equal(rt_plan(&plain, 10, KVT_ROWS_ALL, KVT_ROWS_ALL, NULL), 0);
	squeeze(&f, true);
	assert_int_equal(settle(&r, 0), 0);
	assert_true(late(&f) > 0);
	st = harness_stat(&f.h);
	assert_true(st.tier[KVT_TIER_DRAM].published > 0);
	assert_true(st.bytes[KVT_TIER_DRAM] >= st.tier[KVT_TIER_DRAM].published);
	assert_int_equal(st.tier[KVT_TIER_DRAM].resident, st.tier[KVT_TIER_DRAM].late);
	harness_call(&f.h, tenant_now, &t);
	assert_int_equal(t.late, st.tier[KVT_TIER_DRAM].late);
	assert_int_equal(ask_segment(f.eye.c, r.number[0], &fd, &bytes), KVT_E_NOENT);
	/* It is read-only to the end, and ends with its last holder. */
	assert_int_equal(((const volatile uint8_t *)r.seg[0].addr)[0], ((uint8_t *)r.seg[0].addr)[0]);
	let_go(&r);
	assert_int_equal(published(&f, 0), 0);
	harness_call(&f.h, tenant_now, &t);
	assert_int_equal(t.late, 0);
	read_back(&f, &q);
	reader_close(&r);
	rt_seq_free(&plain, false);
	rt_seq_free(&q, false);
	finish(&f);
}

/* It unmaps, but keeps the file in one way or another; then it leaves, and keeps it still. */
static void a_liar_is_found_out(void **state)
{
	char path[64];
	struct fixture f;
	struct rt_seq q;
	struct reader r;
	uint64_t had;
	int kept, again;

	begin(&f, true);
	spread(&f, &q, &r, 24);
	kept = dup(r.seg[0].fd);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", kept);
	squeeze(&f, true);
	assert_int_equal(settle(&r, 0), 0);
	let_go(&r);
	assert_true(late(&f) > 0);
	usleep(300000); /* the other segments go */
	had = harness_stat(&f.h).tier[KVT_TIER_DRAM].late;
	assert_true(had > 0);
	again = open(path, O_RDWR | O_CLOEXEC); /* a descriptor of its own */
	assert_true(again >= 0);
	close(kept);
	usleep(300000);
	assert_int_equal(harness_stat(&f.h).tier[KVT_TIER_DRAM].late, had);
	reader_close(&r);
	rt_seq_free(&q, true);
	rt_close(&f.rt);
	rt_close(&f.eye);
	usleep(300000);
	assert_int_equal(harness_stat(&f.h).tier[KVT_TIER_DRAM].late, had);
	assert_true(harness_stat(&f.h).bytes[KVT_TIER_DRAM] >= had);
	close(again);
	assert_int_equal(published(&f, 0), 0);
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	assert_int_equal(rt_open(&f.eye, f.h.sock[0], 4), 0);
	finish(&f);
}

/* Relieved before it let go: the segments stay, and take pages again. */
static void relief_ends_it(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct reader r;
	uint64_t had;

	begin(&f, true);
	spread(&f, &q, &r, 25);
	had = harness_stat(&f.h).tier[KVT_TIER_DRAM].published;
	squeeze(&f, true);
	assert_int_equal(settle(&r, 0), 0);
	squeeze(&f, false);
	for (int i = 0; i < 2000 && harness_stat(&f.h).tier[KVT_TIER_DRAM].revoked; i++)
		usleep(5000);
	assert_int_equal(harness_stat(&f.h).tier[KVT_TIER_DRAM].revoked, 0);
	assert_int_equal(harness_stat(&f.h).tier[KVT_TIER_DRAM].published, had);
	assert_int_equal(rt_append(&q, 1000), 0);
	assert_int_equal(rt_plan(&q, 10, KVT_ROWS_ALL, KVT_ROWS_ALL, NULL), 0);
	assert_true(look(&r) > 0);
	reader_close(&r);
	rt_seq_free(&q, false);
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_willing_client_gives_back),
		cmocka_unit_test(a_stuck_client_keeps_and_pays),
		cmocka_unit_test(a_liar_is_found_out),
		cmocka_unit_test(relief_ends_it),
	};

	signal(SIGIO, SIG_IGN);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
