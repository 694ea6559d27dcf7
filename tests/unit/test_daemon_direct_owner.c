/* SPDX-License-Identifier: MIT */
/* Direct reads: nobody else finds anything, nobody writes, and what published memory costs is charged. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <fcntl.h>
#include <sys/mman.h>
#include "direct_fixture.h"

/* ---- who may see it -------------------------------------------------------------------------------- */

static void read_only(int fd, uint64_t bytes)
{
	char path[64], byte = 1;
	int again;

	assert_int_equal(seg_verify(fd, SEG_PUBLISHED, bytes), 0);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	again = open(path, O_RDWR | O_CLOEXEC);
	for (int k = 0; k < 2; k++) {
		int at = k ? again : fd;

		if (at < 0)
			continue;
		assert_ptr_equal(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, at, 0), MAP_FAILED);
		assert_true(pwrite(at, &byte, 1, 0) < 0);
		assert_true(fallocate(at, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes) < 0);
		assert_true(ftruncate(at, (off_t)bytes / 2) < 0);
		assert_true(fcntl(at, F_ADD_SEALS, F_SEAL_WRITE) < 0);
	}
	assert_true(again < 0 || !close(again));
}

static void others_see_nothing(void **state)
{
	struct fixture f;
	struct rt_seq q, plain;
	struct runtime other;
	struct direct_page *e;
	struct reader r;
	uint64_t bytes = 0;
	uint32_t number;
	int fd;

	begin(&f, false);
	assert_int_equal(rt_open(&other, f.h.sock[1], 4), 0);
	begin_seq(&f, &q, 7, KVT_EPHEMERAL, 1000);
	assert_int_equal(reader_open(&r, &q, f.eye.c), 0);
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, NULL), 0);
	assert_int_equal(look(&r), 900 * q.rt->lanes);
	e = (struct direct_page *)(r.hdr + 1);
	number = direct_segment(atomic_load(&e->place));
	assert_int_equal(ask_segment(f.rt.c, number, &fd, &bytes), 0);
	read_only(fd, bytes);
	close(fd);
	read_only(r.dir.fd, r.dir.size);
	assert_int_equal(ask_segment(other.c, number, &fd, &bytes), KVT_E_NOENT);
	for (uint32_t n = 0; n < 64; n++)
		assert_int_equal(ask_segment(other.c, n << 12 | (n & 3), &fd, &bytes), KVT_E_NOENT);
	assert_int_equal(ask_segment(f.rt.c, number + 50, &fd, &bytes), KVT_E_NOENT);
	assert_int_equal(ask_segment(f.rt.c, UINT32_MAX, &fd, &bytes), KVT_E_NOENT);
	/* The directory is its own client's only, and only of sequences that have one. */
	assert_int_equal(ask_directory(f.eye.c, q.s->handle, &fd, &bytes), KVT_E_STALE);
	assert_int_equal(ask_directory(other.c, q.s->handle, &fd, &bytes), KVT_E_STALE);
	assert_int_equal(rt_prepare(&plain, &f.rt, 8, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&plain, KVT_EPHEMERAL, &keep_all), 0);
	assert_int_equal(ask_directory(f.rt.c, plain.s->handle, &fd, &bytes), KVT_E_INVAL);
	/* A sequence without keeps its pages private. */
	bytes = harness_stat(&f.h).tier[KVT_TIER_DRAM].published;
	assert_int_equal(rt_append(&plain, 1000), 0);
	assert_int_equal(rt_plan(&plain, 100, KVT_ROWS_ALL, 0, NULL), 0);
	assert_int_equal(harness_stat(&f.h).tier[KVT_TIER_DRAM].published, bytes);
	reader_close(&r);
	rt_seq_free(&plain, false);
	rt_seq_free(&q, false);
	rt_close(&other);
	finish(&f);
}

/* W_SEQ_OPEN as a runtime with a GPU sends it, a window of one page at the end of the region. */
static int open_direct(struct rt_seq *q, uint64_t *ret)
{
	uint32_t layers = q->rt->layers;
	size_t len = wire_seq_open_len(layers, 0);
	struct wire_seq_open *m = calloc(1, len);
	struct wire_seq_open_reply a;
	struct call k = {.req = &m->hdr, .reply = &a, .reply_size = sizeof(a)};
	int r;

	assert_non_null(m);
	wire_init(&m->hdr, W_SEQ_OPEN, len, 0);
	m->max_rows = q->max_rows;
	m->n_layers = layers;
	m->flags = W_OPEN_WINDOW | W_OPEN_DIRECT;
	m->model = q->rt->m->handle;
	m->region = q->r->handle;
	m->window = (struct window_place){0, 65536, 65536, 65536};
	m->key[0] = 99;
	m->budget.manual = 1;
	for (uint32_t i = 0; i < layers; i++)
		((struct wire_layout *)wire_open_layouts(m))[i].cap = q->cap;
	r = call_run(q->rt->c, &k);
	free(m);
	if (!r)
		*ret = a.seq;
	return r;
}

static void forbid(struct core *c, void *arg)
{
	c->tenant[0].limit.direct = false;
}

static void a_tenant_may_have_none(void **state)
{
	struct fixture f;
	struct rt_seq q;
	uint64_t seq = 0, bytes = 0;
	int fd;

	begin(&f, false);
	assert_int_equal(rt_prepare(&q, &f.rt, 3, 1200, 1200, 4096), 0);
	assert_int_equal(model_ensure(f.rt.m, call_deadline(f.rt.c)), 0);
	assert_int_equal(open_direct(&q, &seq), 0);
	assert_int_equal(ask_directory(f.rt.c, seq, &fd, &bytes), 0);
	assert_true(bytes >= sizeof(struct direct_hdr) + 4096 / 128 * f.rt.lanes * sizeof(struct direct_page));
	read_only(fd, bytes);
	close(fd);
	harness_call(&f.h, forbid, NULL);
	q.id = 4;
	assert_int_equal(open_direct(&q, &seq), KVT_E_PERM);
	assert_non_null(strstr(kvtier_last_error(), "direct = no"));
	rt_seq_free(&q, false);
	finish(&f);
}

/* The user's last client takes the emptied segments with it; mappings outlive all. */
static void segments_go_with_the_last_client(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct reader r;
	struct core_stat st;
	uint64_t bytes, had;
	int fd;

	begin(&f, true);
	begin_seq(&f, &q, 9, KVT_EPHEMERAL, 1000);
	assert_int_equal(reader_open(&r, &q, f.eye.c), 0);
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, NULL), 0);
	assert_int_equal(look(&r), 900 * q.rt->lanes);
	had = harness_stat(&f.h).tier[KVT_TIER_DRAM].published;
	assert_true(had > 0);
	assert_int_equal(rt_plan(&q, 100, 0, KVT_ROWS_ALL, NULL), 0);
	assert_int_equal(settle(&r, 0), 0);
	st = harness_stat(&f.h);
	assert_int_equal(st.tier[KVT_TIER_DRAM].published, had);
	assert_int_equal(st.tier[KVT_TIER_DRAM].held, had);
	assert_int_equal(st.bytes[KVT_TIER_DRAM], had);
	rt_seq_free(&q, true);
	rt_close(&f.rt);
	usleep(50000); /* `eye` is still there */
	assert_int_equal(published(&f, had), had);
	assert_int_equal(ask_segment(f.eye.c, r.number[0], &fd, &bytes), 0);
	close(fd);
	assert_int_equal(atomic_load(&r.hdr->used), 0);
	rt_close(&f.eye);
	assert_int_equal(published(&f, 0), 0);
	assert_int_equal(((const volatile uint8_t *)r.seg[0].addr)[0], ((uint8_t *)r.seg[0].addr)[0]);
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	assert_int_equal(rt_open(&f.eye, f.h.sock[0], 4), 0);
	assert_int_equal(ask_segment(f.eye.c, r.number[0], &fd, &bytes), KVT_E_NOENT);
	reader_close(&r);
	finish(&f);
}

/* What a leased sequence left in published memory is there for whoever resumes it. */
static void a_resumed_sequence_is_listed_again(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct kvtier_seq_opts o;
	struct reader r;

	begin(&f, false);
	begin_seq(&f, &q, 10, KVT_LEASED, 1000);
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, NULL), 0);
	rt_seq_free(&q, false);
	rt_close(&f.rt);
	rt_close(&f.eye);
	usleep(50000);
	assert_true(harness_stat(&f.h).tier[KVT_TIER_DRAM].published > 0);
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	assert_int_equal(rt_open(&f.eye, f.h.sock[0], 4), 0);
	assert_int_equal(rt_prepare(&q, &f.rt, 10, 1200, 1200, 4096), 0);
	o = rt_opts(&q, KVT_LEASED, &keep_all);
	assert_int_equal(kvtier_seq_resume(f.rt.c, f.rt.m, &o, &q.s, &q.rows), 0);
	assert_int_equal(q.rows, 1000);
	assert_int_equal(harness_direct(&f.h, &q), 0);
	assert_int_equal(reader_open(&r, &q, f.eye.c), 0);
	assert_int_equal(settle(&r, 1000 * q.rt->lanes), 1000 * q.rt->lanes);
	assert_int_equal(rt_plan(&q, 1000, 0, 0, NULL), 0);
	assert_int_equal(rt_wrong(&q), 0);
	reader_close(&r);
	rt_seq_free(&q, true);
	finish(&f);
}

static void on_drained(void *arg)
{
	atomic_store((_Atomic int *)arg, 1);
}

static void start_drain(struct core *c, void *arg)
{
	core_drain(c, on_drained, arg);
}

/* Published segments die with the daemon; what was mapped stays readable, and leased rows are on nvme. */
static void a_restart_keeps_rows_and_mappings(void **state)
{
	_Atomic int drained = 0;
	struct fixture f;
	struct rt_seq q, again;
	struct kvtier_seq_opts o;
	struct reader r, late;
	uint32_t rows = 0;

	begin(&f, true);
	begin_seq(&f, &q, 13, KVT_LEASED, 1000);
	assert_int_equal(reader_open(&r, &q, f.eye.c), 0);
	assert_int_equal(rt_plan(&q, 10, KVT_ROWS_ALL, 0, NULL), 0);
	assert_int_equal(look(&r), 990 * q.rt->lanes);
	kvtier_seq_close(q.s);
	q.s = NULL;
	rt_close(&f.eye);
	harness_call(&f.h, start_drain, (void *)&drained);
	for (int i = 0; i < 1000 && !atomic_load(&drained); i++)
		usleep(10000);
	assert_true(atomic_load(&drained));
	harness_stop(&f.h);
	for (uint32_t i = 0; i < r.have; i++) /* where the last look found them */
		assert_int_equal(reader_page(&r, &r.page[i], &rows), 0);
	assert_int_equal(rows, 990 * q.rt->lanes);
	rt_seq_free(&q, false);
	rt_close(&f.rt);
	for (int t = 0; t < 2; t++)
		unlink(f.h.sock[t]);

	assert_true(harness_start(&f.h));
	assert_int_equal(harness_stat(&f.h).orphans, 1);
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	assert_int_equal(rt_open(&f.eye, f.h.sock[0], 4), 0);
	assert_int_equal(rt_prepare(&again, &f.rt, 13, 1200, 1200, 4096), 0);
	o = rt_opts(&again, KVT_LEASED, &keep_all);
	assert_int_equal(kvtier_seq_resume(f.rt.c, f.rt.m, &o, &again.s, &again.rows), 0);
	assert_int_equal(again.rows, 1000);
	assert_int_equal(harness_direct(&f.h, &again), 0);
	assert_int_equal(reader_open(&late, &again, f.eye.c), 0);
	assert_int_equal(look(&late), 0);
	assert_int_equal(rt_plan(&again, 1000, 0, KVT_ROWS_ALL, NULL), 0);
	assert_int_equal(rt_wrong(&again), 0);
	reader_close(&late);
	reader_close(&r);
	rt_seq_free(&again, true);
	finish(&f);
}

/* ---- what it costs -------------------------------------------------------------------------------- */

static void small_quota(struct core *c, void *arg)
{
	c->tenant[0].limit.dram_bytes = *(uint64_t *)arg;
}

/* Whole segments count, and count against others of the tenant, not against their owner. */
static void segments_are_charged(void **state)
{
	uint64_t quota = UINT64_C(3) << 20, held;
	struct fixture f;
	struct rt_seq q, plain;
	struct core_stat st;
	struct reader r;

	begin(&f, true);
	harness_call(&f.h, small_quota, &quota);
	begin_seq(&f, &q, 11, KVT_EPHEMERAL, 10);
	assert_int_equal(reader_open(&r, &q, f.eye.c), 0);
	for (int k = 0; k < 3; k++) {
		assert_int_equal(rt_append(&q, 1000 - k), 0);
		assert_int_equal(rt_plan(&q, 10, KVT_ROWS_ALL, KVT_ROWS_ALL, NULL), 0);
		st = harness_stat(&f.h);
		assert_true(st.bytes[KVT_TIER_DRAM] <= quota);
		assert_true(st.tier[KVT_TIER_DRAM].published <= quota);
		look(&r);
	}
	assert_true(st.tier[KVT_TIER_DRAM].published >= quota - (UINT64_C(2) << 20)); /* all slabs that fit */
	assert_true(st.rows_demoted[KVT_TIER_NVME] > 0);
	/* Emptied, they stay charged: nothing is left for a sequence that cannot use them, all for one that
	 * can. */
	assert_int_equal(rt_plan(&q, 10, 0, KVT_ROWS_ALL, NULL), 0);
	assert_int_equal(settle(&r, 0), 0);
	held = harness_stat(&f.h).tier[KVT_TIER_DRAM].held;
	assert_int_equal(held, st.tier[KVT_TIER_DRAM].published);
	assert_int_equal(rt_prepare(&plain, &f.rt, 12, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&plain, KVT_EPHEMERAL, &keep_all), 0);
	for (int k = 0; k < 2; k++) {
		assert_int_equal(rt_append(&plain, 1000), 0);
		assert_int_equal(rt_plan(&plain, 10, KVT_ROWS_ALL, KVT_ROWS_ALL, NULL), 0);
	}
	st = harness_stat(&f.h);
	assert_true(st.tier[KVT_TIER_DRAM].used <= quota - held);
	assert_true(st.bytes[KVT_TIER_DRAM] <= quota);
	rt_seq_free(&plain, true);
	assert_int_equal(rt_append(&q, 1000), 0);
	assert_int_equal(rt_plan(&q, 10, KVT_ROWS_ALL, KVT_ROWS_ALL, NULL), 0);
	assert_true(look(&r) > 900 * q.rt->lanes);
	assert_int_equal(harness_stat(&f.h).tier[KVT_TIER_DRAM].published, held);
	reader_close(&r);
	rt_seq_free(&q, false);
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(others_see_nothing),
		cmocka_unit_test(a_tenant_may_have_none),
		cmocka_unit_test(segments_go_with_the_last_client),
		cmocka_unit_test(a_resumed_sequence_is_listed_again),
		cmocka_unit_test(a_restart_keeps_rows_and_mappings),
		cmocka_unit_test(segments_are_charged),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
