/* SPDX-License-Identifier: MIT */
/*
 * Direct reads: what a client finds through its directory is right whenever it may believe it, whatever the
 * daemon does meanwhile.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include "direct_fixture.h"

/* ---- what the directory says ------------------------------------------------------------------- */

static void it_lists_what_is_in_dram(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct reader r;
	uint64_t moved, serial;

	begin(&f, true);
	begin_seq(&f, &q, 5, KVT_EPHEMERAL, 1000);
	assert_int_equal(reader_open(&r, &q, f.eye.c), 0);
	assert_int_equal(r.hdr->magic, DIRECT_MAGIC);
	assert_int_equal(look(&r), 0);
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, NULL), 0);
	assert_int_equal(settle(&r, 900 * q.rt->lanes), 900 * q.rt->lanes);
	/* What is added invalidates nothing. */
	moved = r.hdr->moved;
	serial = r.hdr->serial;
	assert_true(serial > 0);
	assert_int_equal(rt_append(&q, 500), 0);
	assert_int_equal(rt_plan(&q, 1000, KVT_ROWS_ALL, 0, NULL), 0);
	assert_true(look(&r) >= 900 * q.rt->lanes);
	assert_true(r.hdr->serial >= serial);
	/* Rows that a plan drops die although their page may live. */
	assert_int_equal(rt_plan(&q, 300, 200, 0, NULL), 0);
	assert_true(settle(&r, 500 * q.rt->lanes) <= 1500 * q.rt->lanes);
	/* To nvme and out of the directory, but for copies of what is on the device. */
	assert_int_equal(rt_plan(&q, 300, 0, KVT_ROWS_ALL, NULL), 0);
	for (int i = 0; i < 400 && look(&r) >= 300 * q.rt->lanes; i++)
		usleep(5000);
	assert_true(look(&r) < 300 * q.rt->lanes);
	assert_true(r.hdr->moved > moved);
	assert_int_equal(rt_wrong(&q), 0);
	reader_close(&r);
	rt_seq_free(&q, false);
	finish(&f);
}

static void truncation_cuts_at_once(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct reader r;
	uint64_t rows;

	begin(&f, false);
	begin_seq(&f, &q, 6, KVT_EPHEMERAL, 1100);
	assert_int_equal(reader_open(&r, &q, f.eye.c), 0);
	assert_int_equal(rt_plan(&q, 50, KVT_ROWS_ALL, 0, NULL), 0);
	for (uint32_t k = 0; k < 20; k++) {
		uint32_t n = q.rows - 30 - k;
		uint64_t moved = atomic_load(&r.hdr->moved);

		assert_int_equal(kvtier_seq_truncate(q.s, n), 0);
		assert_true(atomic_load(&r.hdr->moved) > moved); /* whoever reads now must look again */
		q.rows = n;
		q.salt++;
		for (uint32_t pos = n; pos < q.max_rows;
		     pos++) /* a stale row that is believed is a wrong one */
			q.salts[pos] = q.salt;
		look(&r);
		assert_int_equal(rt_append(&q, 20), 0);
		assert_int_equal(rt_plan(&q, 50, KVT_ROWS_ALL, 0, NULL), 0);
		rows = look(&r);
		assert_true(rows >= (uint64_t)(n - 70) * q.rt->lanes);
	}
	reader_close(&r);
	rt_seq_free(&q, false);
	finish(&f);
}

/* Pages that two sequences share: each directory by its own sequence's rules. */
static void forks_have_directories_of_their_own(void **state)
{
	struct fixture f;
	struct rt_seq q, kid;
	struct kvtier_seq_opts o;
	struct reader r, s;

	begin(&f, false);
	begin_seq(&f, &q, 42, KVT_EPHEMERAL, 1000);
	assert_int_equal(rt_plan(&q, 200, KVT_ROWS_ALL, 0, NULL), 0);
	assert_int_equal(rt_prepare(&kid, &f.rt, 42, 1200, 1200, 4096), 0);
	kid.id = 43;
	o = rt_opts(&kid, KVT_EPHEMERAL, &keep_all);
	kid.id = 42;
	assert_int_equal(kvtier_seq_fork(q.s, 700, &o, &kid.s), 0);
	kid.rows = 700;
	kid.salt = 9;
	for (uint32_t pos = 700; pos < kid.max_rows; pos++)
		kid.salts[pos] = kid.salt;
	assert_int_equal(harness_direct(&f.h, &kid), 0);
	assert_int_equal(reader_open(&r, &q, f.eye.c), 0);
	assert_int_equal(reader_open(&s, &kid, f.eye.c), 0);
	assert_int_equal(look(&r), 800 * q.rt->lanes);
	for (int i = 0; i < 100 && !look(&s); i++)
		usleep(2000); /* filled in the background */
	assert_int_equal(rt_append(&kid, 400), 0);
	assert_int_equal(rt_plan(&kid, 100, KVT_ROWS_ALL, 0, NULL), 0);
	assert_int_equal(settle(&s, 1000 * q.rt->lanes), 1000 * q.rt->lanes);
	/* The parent goes, and its directory with it; shared pages stay where they are. */
	rt_seq_free(&q, true);
	for (int i = 0; i < 400 && atomic_load(&r.hdr->used); i++)
		usleep(5000);
	assert_int_equal(atomic_load(&r.hdr->used), 0);
	assert_int_equal(look(&s), 1000 * kid.rt->lanes);
	assert_int_equal(rt_plan(&kid, 1100, KVT_ROWS_ALL, KVT_ROWS_ALL, NULL), 0);
	assert_int_equal(rt_wrong(&kid), 0);
	reader_close(&r);
	reader_close(&s);
	rt_seq_free(&kid, false);
	finish(&f);
}

/* ---- while everything moves ------------------------------------------------------------------------ */

struct watch {
	struct reader r[2];
	_Atomic bool stop;
};

static void *watch_run(void *arg)
{
	struct watch *w = arg;
	uint32_t seed = 1;

	while (!atomic_load(&w->stop))
		for (int i = 0; i < 2; i++) {
			uint32_t used = atomic_load(&w->r[i].hdr->used);

			/* Short looks, that hardly anything disturbs, and long ones. */
			seed = seed * 1664525 + 1013904223;
			if (seed >> 30)
				reader_look(&w->r[i], used ? (seed >> 8) % used : 0, 1 + (seed >> 4) % 8);
			else
				reader_look(&w->r[i], 0, 256);
		}
	return NULL;
}

static void live(struct reader *r, struct rt_seq *q, unsigned step)
{
	uint32_t what = rt_random(q) % 10, dev = 20 + rt_random(q) % 500, dram = rt_random(q) % 700;
	int have = kvtier_seq_resident(q->s, 0, NULL, 0);

	if (what < 4 && have + 150 < (int)q->cap && q->rows + 150 < q->max_rows) {
		assert_int_equal(rt_append(q, 1 + rt_random(q) % 150), 0);
	} else if (what < 9 || q->rows < 200) {
		assert_int_equal(rt_plan(q, dev, dram, what == 8 ? rt_random(q) % 200 : KVT_ROWS_ALL, NULL), 0);
	} else {
		uint32_t n = q->rows - rt_random(q) % (q->rows / 3);

		atomic_fetch_add(&r->cuts, 1);
		assert_int_equal(kvtier_seq_truncate(q->s, n), 0);
		q->rows = n;
		q->salt++;
		atomic_fetch_add(&r->cuts, 1);
	}
	if (step % 8 == 0)
		assert_int_equal(rt_wrong(q), 0);
}

static void readers_never_see_a_wrong_byte(void **state)
{
	struct fixture f;
	struct rt_seq q[2];
	struct core_stat st;
	struct watch w = {.stop = false};
	pthread_t thread;
	uint64_t moved = 0, end = now_ns() + UINT64_C(6000000000);

	begin(&f, true);
	for (uint32_t i = 0; i < 2; i++) {
		begin_seq(&f, &q[i], 20 + i, KVT_EPHEMERAL, 400);
		assert_int_equal(reader_open(&w.r[i], &q[i], f.eye.c), 0);
	}
	assert_int_equal(pthread_create(&thread, NULL, watch_run, &w), 0);
	for (unsigned step = 0; step < 300 && now_ns() < end; step++)
		for (uint32_t i = 0; i < 2; i++)
			live(&w.r[i], &q[i], step);
	atomic_store(&w.stop, true);
	pthread_join(thread, NULL);
	st = harness_stat(&f.h);
	for (uint32_t i = 0; i < 2; i++) {
		struct reader *r = &w.r[i];

		print_message("# %llu rows of %llu pages read in %llu looks, %llu not to be believed\n",
			      (unsigned long long)r->rows, (unsigned long long)r->pages,
			      (unsigned long long)r->whole, (unsigned long long)r->torn);
		assert_int_equal(r->wrong, 0);
		assert_int_equal(r->bad_crc, 0);
		assert_int_equal(r->lost, 0);
		if (!r->rows) { /* a machine so busy that the other thread never ran */
			assert_int_equal(rt_plan(&q[i], 20, KVT_ROWS_ALL, 0, NULL), 0);
			assert_true(look(r) > 0);
		}
		moved += atomic_load(&r->hdr->moved);
	}
	assert_true(moved > 100);
	assert_true(st.rows_demoted[KVT_TIER_NVME] && st.rows_dropped);
	assert_int_equal(st.miss_corrupt + st.miss_stale, 0);
	for (uint32_t i = 0; i < 2; i++) {
		reader_close(&w.r[i]);
		rt_seq_free(&q[i], false);
	}
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(it_lists_what_is_in_dram),
		cmocka_unit_test(truncation_cuts_at_once),
		cmocka_unit_test(forks_have_directories_of_their_own),
		cmocka_unit_test(readers_never_see_a_wrong_byte),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
