/* SPDX-License-Identifier: MIT */
/* A core whose DRAM outlives it: what comes back when it stops with its clients connected, as if it were
 * killed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include "core_harness.h"
#include "keeper.h"

#define LAYERS 4u

static const struct kvtier_budget keep_all = {
	.size = sizeof(keep_all), .device_rows = KVT_ROWS_ALL, .manual = 1, .policy = "client"};

struct fixture {
	struct harness h;
	struct keeper k;
	struct runtime rt;
	struct rt_seq q;
};

static void start(struct fixture *f)
{
	f->h.keep = keeper_pass(&f->k);
	assert_true(harness_start(&f->h));
	assert_int_equal(rt_open(&f->rt, f->h.sock[0], LAYERS), 0);
}

static void begin(struct fixture *f, bool nvme, uint32_t id, uint32_t rows)
{
	memset(f, 0, sizeof(*f));
	harness_init(&f->h, nvme);
	f->h.cfg.dram_segment = UINT64_C(4) << 20;
	start(f);
	assert_int_equal(rt_prepare(&f->q, &f->rt, id, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&f->q, KVT_LEASED, &keep_all), 0);
	assert_int_equal(rt_append(&f->q, rows), 0);
}

static void stop(struct fixture *f)
{
	harness_stop(&f->h);
	rt_seq_free(&f->q, false);
	rt_close(&f->rt);
	for (int t = 0; t < 2; t++)
		unlink(f->h.sock[t]);
}

/* The sequence of before, resumed: its rows by the same pattern. Returns how many there are. */
static uint32_t resume(struct fixture *f, uint32_t id, uint32_t salt_from, uint32_t salt)
{
	struct kvtier_seq_opts o;
	uint32_t rows = 0;

	assert_int_equal(rt_prepare(&f->q, &f->rt, id, 1200, 1200, 4096), 0);
	for (uint32_t i = salt_from; i < f->q.max_rows; i++)
		f->q.salts[i] = salt;
	o = rt_opts(&f->q, KVT_LEASED, &keep_all);
	assert_int_equal(kvtier_seq_resume(f->rt.c, f->rt.m, &o, &f->q.s, &rows), 0);
	f->q.rows = rows;
	return rows;
}

/* Everything comes up and is right; rows of lane 0. */
static uint32_t whole(struct fixture *f)
{
	assert_int_equal(rt_plan(&f->q, KVT_ROWS_ALL, KVT_ROWS_ALL, KVT_ROWS_ALL, NULL), 0);
	assert_int_equal(rt_wrong(&f->q), 0);
	assert_int_equal(harness_stat(&f->h).miss_corrupt, 0);
	return (uint32_t)kvtier_seq_resident(f->q.s, 0, NULL, 0);
}

static void finish(struct fixture *f)
{
	struct core_stat st = {.seqs = 1};

	rt_seq_free(&f->q, true);
	for (int i = 0; i < 200 && (st.seqs || st.tier[KVT_TIER_DRAM].used || st.bytes[KVT_TIER_NVME]); i++) {
		st = harness_stat(&f->h);
		usleep(10000);
	}
	assert_int_equal(st.seqs, 0);
	assert_int_equal(st.tier[KVT_TIER_DRAM].used, 0);
	assert_int_equal(st.bytes[KVT_TIER_DRAM], 0);
	assert_int_equal(st.bytes[KVT_TIER_NVME], 0);
	assert_int_equal(st.rows[0] + st.rows[1] + st.rows[2], 0);
	assert_true(f->k.n <= 1);
	rt_close(&f->rt);
	harness_stop(&f->h);
	harness_rm(f->h.dir);
	keeper_close(&f->k);
}

static void dram_rows_come_back(void **state)
{
	struct core_stat st;
	struct fixture f;
	uint32_t above, rows;

	begin(&f, false, 5, 900);
	assert_int_equal(rt_plan(&f.q, 200, KVT_ROWS_ALL, 0, NULL), 0);
	for (int life = 0; life < 3; life++) {
		above = (uint32_t)kvtier_seq_resident(f.q.s, 0, NULL, 0);
		stop(&f);
		start(&f);
		st = harness_stat(&f.h);
		assert_int_equal(st.orphans, 1);
		assert_true(st.kept && st.returned[KVT_TIER_DRAM] > 0);
		assert_int_equal(st.returned[KVT_TIER_NVME], 0);
		rows = resume(&f, 5, 0, 0);
		assert_true(rows > 600 && rows <= 900);
		assert_int_equal(rt_info(&f.q).tier_rows[KVT_TIER_DRAM], 700 * f.rt.lanes);
		assert_int_equal(whole(&f), 700);
		assert_int_equal(above, life ? 100 : 200);
		/* All have their copies below, so none is lost with what is on the device. */
		assert_int_equal(rt_plan(&f.q, 100, KVT_ROWS_ALL, 0, NULL), 0);
	}
	finish(&f);
}

/* Ephemeral sequences, and those whose key nobody asks for, leave nothing. */
static void the_others_end(void **state)
{
	struct core_stat st;
	struct rt_seq e;
	struct fixture f;

	begin(&f, false, 6, 500);
	assert_int_equal(rt_prepare(&e, &f.rt, 7, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&e, KVT_EPHEMERAL, &keep_all), 0);
	assert_int_equal(rt_append(&e, 500), 0);
	assert_int_equal(rt_plan(&e, 100, KVT_ROWS_ALL, 0, NULL), 0);
	assert_int_equal(rt_plan(&f.q, 100, KVT_ROWS_ALL, 0, NULL), 0);
	f.h.cfg.orphan_ttl_s = 1;
	harness_stop(&f.h);
	rt_seq_free(&e, false);
	rt_seq_free(&f.q, false);
	rt_close(&f.rt);
	for (int t = 0; t < 2; t++)
		unlink(f.h.sock[t]);
	start(&f);
	st = harness_stat(&f.h);
	assert_int_equal(st.orphans, 1);
	assert_int_equal(st.rows[KVT_TIER_DRAM], 400 * f.rt.lanes);
	for (int i = 0; i < 400 && harness_stat(&f.h).orphans; i++)
		usleep(10000);
	assert_int_equal(harness_stat(&f.h).orphans, 0);
	assert_int_equal(rt_prepare(&f.q, &f.rt, 6, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&f.q, KVT_LEASED, &keep_all), 0); /* the key is free */
	finish(&f);
}

/* The daemon ends the moment that a truncation was answered. */
static void a_cut_is_known_before_it_is_answered(void **state)
{
	struct fixture f;

	for (uint32_t cut = 100; cut < 800; cut += 223) {
		begin(&f, false, 8, 900);
		assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
		assert_int_equal(kvtier_seq_truncate(f.q.s, cut), 0);
		stop(&f);
		start(&f);
		assert_int_equal(resume(&f, 8, 0, 0), cut);
		assert_int_equal(whole(&f), cut);
		/* What comes next is of another epoch than what lay there; both survive. */
		for (uint32_t i = cut; i < f.q.max_rows; i++)
			f.q.salts[i] = f.q.salt = 3;
		assert_int_equal(rt_append(&f.q, 60), 0);
		assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
		stop(&f);
		start(&f);
		assert_int_equal(resume(&f, 8, cut, 3), cut + 60);
		assert_int_equal(whole(&f), cut + 60);
		finish(&f);
	}
}

/* No room for the note: rows of pages that it would have cut do not come back, and none comes back wrong. */
static void a_cut_without_room_for_its_note(void **state)
{
	struct fixture f;
	uint32_t rows;

	begin(&f, false, 9, 900);
	assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
	stop(&f);
	f.h.cfg.tenant[0].dram_bytes = 4096; /* what is there already stays */
	start(&f);
	assert_int_equal(resume(&f, 9, 0, 0), 900);
	assert_int_equal(kvtier_seq_truncate(f.q.s, 500), 0);
	stop(&f);
	start(&f);
	rows = resume(&f, 9, 0, 0);
	assert_true(rows && rows <= 500);
	assert_int_equal(whole(&f), rows);
	finish(&f);
}

static _Atomic int drained;

static void on_drained(void *arg)
{
	atomic_store(&drained, 1);
}

static void start_drain(struct core *c, void *arg)
{
	core_drain(c, on_drained, arg);
}

static void drain(struct harness *h)
{
	atomic_store(&drained, 0);
	harness_call(h, start_drain, NULL);
	for (int i = 0; i < 2000 && !atomic_load(&drained); i++)
		usleep(5000);
	assert_true(atomic_load(&drained));
}

/* Its memory as it was before a drain moved the pages to disk: they are there twice, and are the same pages. */
static void a_page_in_both_tiers_is_one(void **state)
{
	static struct keeper before;
	struct kvtier_seq_info i;
	struct fixture f;
	uint64_t index;

	begin(&f, true, 10, 900);
	assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
	keeper_snapshot(&before, &f.k);
	rt_seq_free(&f.q, false);
	for (int n = 0; n < 1000 && harness_stat(&f.h).orphans != 1; n++)
		usleep(1000);
	drain(&f.h);
	index = harness_stat(&f.h).index_bytes;
	harness_stop(&f.h);
	rt_close(&f.rt);
	for (int t = 0; t < 2; t++)
		unlink(f.h.sock[t]);
	keeper_close(&f.k);
	f.k = before;
	start(&f);
	assert_true(harness_stat(&f.h).returned[KVT_TIER_DRAM] > 0);
	assert_int_equal(harness_stat(&f.h).returned[KVT_TIER_DRAM],
			 harness_stat(&f.h).returned[KVT_TIER_NVME]);
	assert_true(harness_stat(&f.h).index_bytes < index * 5 / 4);
	assert_int_equal(resume(&f, 10, 0, 0), 900);
	i = rt_info(&f.q);
	assert_int_equal(i.tier_rows[KVT_TIER_DRAM], 900 * f.rt.lanes);
	assert_int_equal(i.tier_rows[KVT_TIER_NVME], 0); /* best copies */
	assert_int_equal(i.dropped_rows, 0);
	assert_int_equal(whole(&f), 900);
	finish(&f);
}

/* Stop; its memory is the caller's, and the next life begins without any. */
static struct keeper stop_with_memory(struct fixture *f)
{
	struct keeper k;

	stop(f);
	k = f->k;
	memset(&f->k, 0, sizeof(f->k));
	return k;
}

/* A key that was given up and used anew: memory of both lives is found, only the younger sequence is believed.
 */
static void the_older_life_of_a_key_stays_gone(void **state)
{
	for (int order = 0; order < 2; order++) {
		struct keeper old, young;
		struct fixture f;

		begin(&f, false, 11, 900);
		assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
		assert_int_equal(kvtier_seq_truncate(f.q.s, 850), 0); /* its epoch is the higher one */
		old = stop_with_memory(&f);
		start(&f); /* a life of its own, that knows nothing of the first */
		assert_int_equal(rt_prepare(&f.q, &f.rt, 11, 1200, 1200, 4096), 0);
		f.q.salt = 5;
		assert_int_equal(rt_seq_open(&f.q, KVT_LEASED, &keep_all), 0);
		assert_int_equal(rt_append(&f.q, 300), 0);
		assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
		young = stop_with_memory(&f);
		f.k = order ? old : young;
		for (unsigned i = 0; i < (order ? young.n : old.n); i++)
			f.k.held[f.k.n++] = order ? young.held[i] : old.held[i];
		start(&f);
		assert_int_equal(f.k.refused, 0);
		assert_int_equal(harness_stat(&f.h).orphans, 1);
		assert_int_equal(resume(&f, 11, 0, 5), 300);
		assert_int_equal(whole(&f), 300);
		finish(&f);
	}
}

/* Nothing of it was below the device when the daemon went: its key and its secret still open it. */
static void a_sequence_without_pages_comes_back_without_rows(void **state)
{
	struct rt_seq other;
	struct fixture f;
	uint32_t rows;

	for (int stored = 0; stored < 2; stored++) {
		begin(&f, true, 12, 300);
		if (stored) { /* there was something, and it was cut off */
			assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
			assert_int_equal(kvtier_seq_truncate(f.q.s, 0), 0);
			for (uint32_t i = 0; i < f.q.max_rows; i++)
				f.q.salts[i] = f.q.salt = 3;
			f.q.rows = 0;
			assert_int_equal(rt_append(&f.q, 40), 0);
		}
		assert_int_equal(rt_prepare(&other, &f.rt, 13, 1200, 1200, 4096), 0);
		assert_int_equal(rt_seq_open(&other, KVT_LEASED, &keep_all), 0);
		rt_seq_free(&other, true); /* this one has ended */
		for (int i = 0; i < 1000 && harness_stat(&f.h).seqs != 1; i++)
			usleep(1000);
		stop(&f);
		start(&f);
		assert_int_equal(harness_stat(&f.h).orphans, 1);
		assert_int_equal(resume(&f, 12, 0, 7), 0);
		f.q.salt = 7;
		assert_int_equal(rt_append(&f.q, 60), 0);
		assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
		stop(&f);
		start(&f);
		assert_int_equal(resume(&f, 12, 0, 7), 60);
		assert_int_equal(whole(&f), 60);
		finish(&f);
	}
	begin(&f, true, 12, 300);
	stop(&f);
	start(&f);
	assert_int_equal(rt_prepare(&f.q, &f.rt, 12, 1200, 1200, 4096), 0);
	{
		struct kvtier_seq_opts o = rt_opts(&f.q, KVT_LEASED, &keep_all);

		o.secret[5] ^= 1;
		assert_int_equal(kvtier_seq_resume(f.rt.c, f.rt.m, &o, &f.q.s, &rows), KVT_E_NOENT);
	}
	rt_seq_free(&f.q, false);
	assert_int_equal(resume(&f, 12, 0, 0), 0);
	finish(&f);
}

/* A life without the disk, and with it its ledger: what is there of the name speaks of an older sequence. */
static void a_ledger_of_before_does_not_speak_for_the_key(void **state)
{
	struct fixture f;

	begin(&f, true, 14, 900);
	assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
	assert_int_equal(kvtier_seq_truncate(f.q.s, 10), 0);
	stop(&f);
	f.h.cfg.nvme_enabled = false;
	start(&f);
	assert_int_equal(resume(&f, 14, 0, 0), 10);
	rt_seq_free(&f.q, true);
	for (int i = 0; i < 1000 && harness_stat(&f.h).seqs; i++)
		usleep(1000);
	assert_int_equal(rt_prepare(&f.q, &f.rt, 14, 1200, 1200, 4096), 0);
	f.q.salt = 5;
	assert_int_equal(rt_seq_open(&f.q, KVT_LEASED, &keep_all), 0);
	assert_int_equal(rt_append(&f.q, 300), 0);
	assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
	stop(&f);
	f.h.cfg.nvme_enabled = true;
	start(&f);
	assert_int_equal(resume(&f, 14, 0, 5), 300);
	assert_int_equal(whole(&f), 300);
	finish(&f);
}

/* 900 rows, all on disk and sealed, and in memory too or not; the next life has no disk. */
static void on_disk(struct fixture *f, uint32_t id, bool memory)
{
	static struct keeper before;

	begin(f, true, id, 900);
	assert_int_equal(rt_plan(&f->q, 0, KVT_ROWS_ALL, 0, NULL), 0);
	keeper_snapshot(&before, &f->k);
	rt_seq_free(&f->q, false);
	for (int n = 0; n < 1000 && harness_stat(&f->h).orphans != 1; n++)
		usleep(1000);
	drain(&f->h);
	harness_stop(&f->h);
	rt_close(&f->rt);
	for (int t = 0; t < 2; t++)
		unlink(f->h.sock[t]);
	keeper_close(&f->k);
	memset(&f->k, 0, sizeof(f->k));
	if (memory)
		f->k = before;
	else
		keeper_close(&before);
	f->h.cfg.nvme_enabled = false;
	start(f);
}

/* The disk is there again; what memory there was is not. */
static void disk_again(struct fixture *f)
{
	stop(f);
	keeper_close(&f->k);
	memset(&f->k, 0, sizeof(f->k));
	f->h.cfg.nvme_enabled = true;
	start(f);
}

/* A life without the disk: its clients are told that rows are gone, and the disk still has them. */
static void what_a_life_without_the_disk_gave_up_stays_gone(void **state)
{
	struct kvtier_seq_opts o;
	struct fixture f;
	uint32_t rows;

	on_disk(&f, 15, false); /* goes on without its rows, with others in their places */
	assert_int_equal(resume(&f, 15, 0, 5), 0);
	f.q.salt = 5;
	assert_int_equal(rt_append(&f.q, 300), 0);
	assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
	disk_again(&f);
	assert_int_equal(resume(&f, 15, 0, 5), 0);
	assert_int_equal(rt_append(&f.q, 40), 0);
	assert_int_equal(rt_plan(&f.q, 0, 0, KVT_ROWS_ALL, NULL), 0);
	assert_int_equal(whole(&f), 40);
	finish(&f);

	on_disk(&f, 16, false); /* ends */
	assert_int_equal(resume(&f, 16, 0, 0), 0);
	rt_seq_free(&f.q, true);
	for (int i = 0; i < 1000 && harness_stat(&f.h).seqs; i++)
		usleep(1000);
	disk_again(&f);
	assert_int_equal(harness_stat(&f.h).orphans, 0);
	assert_int_equal(rt_prepare(&f.q, &f.rt, 16, 1200, 1200, 4096), 0);
	o = rt_opts(&f.q, KVT_LEASED, &keep_all);
	assert_int_equal(kvtier_seq_resume(f.rt.c, f.rt.m, &o, &f.q.s, &rows), KVT_E_NOENT);
	assert_int_equal(rt_seq_open(&f.q, KVT_LEASED, &keep_all), 0); /* the key is free */
	finish(&f);
}

/* The same with rows in memory as well, which stays: cut without the disk, they stay cut with it. */
static void a_cut_without_the_disk_holds_with_it(void **state)
{
	struct fixture f;

	on_disk(&f, 17, true);
	assert_int_equal(resume(&f, 17, 0, 0), 900);
	assert_int_equal(kvtier_seq_truncate(f.q.s, 500), 0);
	for (uint32_t i = 500; i < f.q.max_rows; i++)
		f.q.salts[i] = f.q.salt = 5;
	f.q.rows = 500;
	assert_int_equal(rt_append(&f.q, 100), 0);
	assert_int_equal(rt_plan(&f.q, 0, KVT_ROWS_ALL, 0, NULL), 0);
	stop(&f);
	f.h.cfg.nvme_enabled = true;
	start(&f);
	assert_true(harness_stat(&f.h).returned[KVT_TIER_NVME] > 0);
	assert_int_equal(resume(&f, 17, 500, 5), 600);
	assert_int_equal(whole(&f), 600);
	disk_again(&f); /* now without the memory that knew of the cut */
	assert_int_equal(resume(&f, 17, 500, 5), 500);
	assert_int_equal(whole(&f), 500);
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(dram_rows_come_back),
		cmocka_unit_test(the_others_end),
		cmocka_unit_test(a_cut_is_known_before_it_is_answered),
		cmocka_unit_test(a_cut_without_room_for_its_note),
		cmocka_unit_test(a_page_in_both_tiers_is_one),
		cmocka_unit_test(the_older_life_of_a_key_stays_gone),
		cmocka_unit_test(a_sequence_without_pages_comes_back_without_rows),
		cmocka_unit_test(a_ledger_of_before_does_not_speak_for_the_key),
		cmocka_unit_test(what_a_life_without_the_disk_gave_up_stays_gone),
		cmocka_unit_test(a_cut_without_the_disk_holds_with_it),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
