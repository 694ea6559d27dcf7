/* SPDX-License-Identifier: MIT */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include "core_harness.h"
#include "ipc/codec.h"
#include "shm/ctl.h"
#include "shm/ring.h"
#include "shm/seg.h"

static const struct kvtier_budget keep_all = {
	.size = sizeof(keep_all), .device_rows = KVT_ROWS_ALL, .manual = 1, .policy = "client"};

struct fixture {
	struct harness h;
	struct runtime rt;
};

static void begin(struct fixture *f, bool nvme)
{
	harness_init(&f->h, nvme);
	assert_true(harness_start(&f->h));
	assert_int_equal(rt_open(&f->rt, f->h.sock[0], 4), 0);
}

static void begin_seq(struct fixture *f, struct rt_seq *q, uint32_t id, uint32_t lifetime, uint32_t rows)
{
	assert_int_equal(rt_prepare(q, &f->rt, id, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(q, lifetime, &keep_all), 0);
	assert_int_equal(rt_append(q, rows), 0);
}

static void finish(struct fixture *f)
{
	rt_close(&f->rt);
	harness_stop(&f->h);
	harness_rm(f->h.dir);
}

/* Everything is given back: pages, sequences, exchange memory. Waits for the daemon to notice. */
static void assert_empty(struct fixture *f)
{
	struct core_stat st = {.seqs = 1};

	for (int i = 0;
	     i < 100 && (st.seqs || st.tier[KVT_TIER_DRAM].used || st.bytes[0] || st.bytes[KVT_TIER_NVME]);
	     i++) {
		st = harness_stat(&f->h);
		usleep(10000);
	}
	assert_int_equal(st.seqs, 0);
	assert_int_equal(st.tier[KVT_TIER_DRAM].used, 0);
	assert_int_equal(st.bytes[KVT_TIER_DRAM], 0);
	assert_int_equal(st.bytes[KVT_TIER_NVME], 0);
	assert_int_equal(st.rows[0] + st.rows[1] + st.rows[2], 0);
}

static void assert_no_miss(struct fixture *f)
{
	struct core_stat st = harness_stat(&f->h);

	assert_int_equal(st.miss_corrupt, 0);
	assert_int_equal(st.miss_io, 0);
	assert_int_equal(st.miss_stale, 0);
	assert_int_equal(st.hangups_protocol, 0);
}

static void demote_and_promote_through_dram(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct kvtier_plan p;
	struct core_stat st;

	begin(&f, false);
	begin_seq(&f, &q, 7, KVT_EPHEMERAL, 1000);
	assert_int_equal(rt_plan(&q, 200, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(p.rows_out, 800 * f.rt.lanes);
	assert_int_equal(kvtier_seq_resident(q.s, 0, NULL, 0), 200);
	assert_int_equal(rt_wrong(&q), 0);
	assert_int_equal(rt_plan(&q, KVT_ROWS_ALL, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(p.rows_in, 800 * f.rt.lanes);
	assert_int_equal(kvtier_seq_resident(q.s, 0, NULL, 0), 1000);
	assert_int_equal(rt_wrong(&q), 0);
	/* Rows that have a copy below leave without another one. */
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(p.rows_out, 100 * f.rt.lanes);
	assert_int_equal(rt_wrong(&q), 0);
	st = harness_stat(&f.h);
	assert_int_equal(st.rows_demoted[KVT_TIER_DRAM], 900 * f.rt.lanes);
	assert_int_equal(st.rows[KVT_TIER_DRAM], 900 * f.rt.lanes);
	assert_true(st.refaults[KVT_TIER_DRAM] == 800 * f.rt.lanes);
	assert_int_equal(st.refault_rows[KVT_TIER_DRAM].bucket[0], 800 * f.rt.lanes); /* it did not grow */
	assert_no_miss(&f);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

static void latencies_and_refault_distances_are_counted(void **state)
{
	const struct histogram *back;
	struct kvtier_plan p;
	struct core_stat st;
	struct fixture f;
	struct rt_seq q;

	begin(&f, true);
	begin_seq(&f, &q, 7, KVT_EPHEMERAL, 1000);
	assert_int_equal(rt_plan(&q, 200, 0, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(rt_append(&q, 300), 0);
	assert_int_equal(rt_plan(&q, KVT_ROWS_ALL, 0, KVT_ROWS_ALL, &p), 0);
	assert_true(p.rows_in > 100);
	st = harness_stat(&f.h);
	back = &st.refault_rows[KVT_TIER_NVME];
	assert_int_equal(back->bucket[histogram_index(300)], p.rows_in);
	assert_int_equal(histogram_count(back), st.refaults[KVT_TIER_NVME]);
	assert_int_equal(back->sum, 300 * p.rows_in);
	assert_int_equal(histogram_count(&st.plan_ns), st.plans);
	assert_int_equal(histogram_count(&st.decide_ns), st.plans);
	assert_int_equal(st.plan_ns.sum, st.plan_ns_total);
	assert_true(st.decide_ns.sum > 0 && st.decide_ns.sum <= st.plan_ns.sum);
	/* Every page has its latency once. */
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
		assert_int_equal(histogram_count(&st.read_ns[t]), st.tier[t].reads);
		assert_int_equal(histogram_count(&st.write_ns[t]), st.tier[t].writes);
	}
	assert_true(st.tier[KVT_TIER_NVME].reads && st.read_ns[KVT_TIER_NVME].sum > 1000);
	assert_true(st.tier[KVT_TIER_NVME].writes && st.write_ns[KVT_TIER_NVME].sum > 1000);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

static void rows_come_back_from_nvme(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct kvtier_plan p;
	struct kvtier_seq_info i;

	begin(&f, true);
	begin_seq(&f, &q, 8, KVT_EPHEMERAL, 1000);
	assert_int_equal(rt_plan(&q, 100, 300, KVT_ROWS_ALL, &p), 0);
	i = rt_info(&q);
	assert_int_equal(i.tier_rows[KVT_TIER_DRAM], 300 * f.rt.lanes);
	assert_int_equal(i.tier_rows[KVT_TIER_NVME], 600 * f.rt.lanes);
	assert_int_equal(i.dropped_rows, 0);
	assert_int_equal(rt_plan(&q, 900, KVT_ROWS_ALL, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(p.rows_in, 800 * f.rt.lanes);
	assert_int_equal(rt_wrong(&q), 0);
	/* dram is wanted no more: what it holds alone goes to nvme behind the plan. */
	assert_int_equal(rt_plan(&q, 50, 0, KVT_ROWS_ALL, &p), 0);
	for (int k = 0; k < 200 && rt_info(&q).tier_rows[KVT_TIER_NVME] != 950 * f.rt.lanes; k++)
		usleep(10000);
	i = rt_info(&q);
	assert_int_equal(i.tier_rows[KVT_TIER_NVME], 950 * f.rt.lanes);
	assert_int_equal(rt_plan(&q, 1000, 0, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(rt_wrong(&q), 0);
	assert_int_equal(kvtier_seq_resident(q.s, 3, NULL, 0), 1000);
	assert_no_miss(&f);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

/* Rows that exist, per lane 0, by any tier. */
static void any_life(struct fixture *f, struct rt_seq *q, int steps)
{
	for (int k = 0; k < steps; k++) {
		struct kvtier_plan p = {.size = sizeof(p)};
		uint32_t what = rt_random(q) % 10;
		int have = kvtier_seq_resident(q->s, 0, NULL, 0);

		if (getenv("V"))
			print_message("# step %d: %u, rows %u, resident %d\n", k, what, q->rows, have);
		if (what < 4 && have + 150 < (int)q->cap && q->rows + 150 < q->max_rows) {
			assert_int_equal(rt_append(q, 1 + rt_random(q) % 150), 0);
		} else if (what < 9) {
			uint32_t dev = 20 + rt_random(q) % 900, dram = rt_random(q) % 600;
			int r = rt_plan(q, dev, dram, what == 8 ? rt_random(q) % 200 : KVT_ROWS_ALL, &p);

			if (r < 0)
				print_message("# step %d: %s\n", k, kvtier_last_error());
			assert_int_equal(r, 0);
		} else if (q->rows > 10) {
			uint32_t n = q->rows - rt_random(q) % (q->rows / 3);

			assert_int_equal(kvtier_seq_truncate(q->s, n), 0);
			q->rows = n;
			if (getenv("V"))
				print_message("# truncate %u\n", n);
			q->salt++;
		}
		if (rt_wrong(q)) {
			print_message("# step %d (%u): %u rows wrong\n", k, what, rt_wrong(q));
			fail();
		}
	}
}

static void any_life_keeps_every_byte(void **state)
{
	struct fixture f;
	struct rt_seq q[3];

	begin(&f, true);
	for (uint32_t i = 0; i < 3; i++)
		begin_seq(&f, &q[i], 20 + i, KVT_EPHEMERAL, 300);
	for (int round = 0; round < 4; round++)
		for (uint32_t i = 0; i < 3; i++)
			any_life(&f, &q[i], 12);
	assert_no_miss(&f);
	for (uint32_t i = 0; i < 3; i++)
		rt_seq_free(&q[i], false);
	assert_empty(&f);
	finish(&f);
}

static void a_truncate_cancels_the_plan(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct kvtier_plan p = {.size = sizeof(p)};
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = 100, .dram_rows = KVT_ROWS_ALL, .manual = 1};

	begin(&f, true);
	begin_seq(&f, &q, 40, KVT_EPHEMERAL, 1000);
	for (int k = 0; k < 12; k++) {
		uint64_t id;
		int r;

		/* At once, and after some of the work has been done. */
		assert_int_equal(kvtier_plan_request(q.s, &b, &id), 0);
		if (k % 3 == 1)
			assert_int_equal(kvtier_plan_wait(q.s, id, KVT_PLAN_DECIDED, 5000, &p), 0);
		if (k % 3 == 2)
			assert_int_equal(kvtier_plan_wait(q.s, id, KVT_PLAN_READY, 5000, &p), 0);
		assert_int_equal(kvtier_seq_truncate(q.s, 400 + k), 0);
		q.rows = 400 + k;
		q.salt++;
		/* It is not seen any more; the one that was asked for comes all the same. */
		r = kvtier_plan_peek(q.s, &p);
		assert_true(r == 0 || (r == 1 && p.id >= id && p.watermark == q.rows));
		assert_int_equal(rt_append(&q, 500), 0);
		assert_int_equal(rt_wrong(&q), 0);
		assert_int_equal(rt_follow(&q, id, &p), 0);
		assert_int_equal(rt_wrong(&q), 0);
	}
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(rt_plan(&q, KVT_ROWS_ALL, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(kvtier_seq_resident(q.s, 0, NULL, 0), (int)q.rows);
	assert_int_equal(rt_wrong(&q), 0);
	assert_no_miss(&f);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

static void refused_lanes_stay_as_they_were(void **state)
{
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = 100, .dram_rows = KVT_ROWS_ALL, .manual = 1};
	struct kvtier_plan p = {.size = sizeof(p)};
	uint64_t nack[16] = {~0ull}, id;
	struct fixture f;
	struct rt_seq q;
	struct kvtier_seq_info i;

	begin(&f, false);
	begin_seq(&f, &q, 41, KVT_EPHEMERAL, 500);
	assert_int_equal(kvtier_plan_request(q.s, &b, &id), 0);
	assert_int_equal(kvtier_plan_wait(q.s, id, KVT_PLAN_READY, 5000, &p), 0);
	assert_int_equal(kvtier_plan_ack(q.s, p.id, nack), 0);
	i = rt_info(&q);
	assert_int_equal(i.tier_rows[KVT_TIER_DEVICE], 500 * f.rt.lanes);
	assert_int_equal(harness_stat(&f.h).plans_nacked, 1);
	/* The copies made for it stay good: nothing is copied when they are accepted. */
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(p.rows_out, 0);
	assert_int_equal(rt_wrong(&q), 0);
	assert_int_equal(rt_plan(&q, 500, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(rt_wrong(&q), 0);
	assert_int_equal(kvtier_seq_resident(q.s, 5, NULL, 0), 500);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

static void a_fork_shares_pages_and_parts_ways(void **state)
{
	struct fixture f;
	struct rt_seq q, kid;
	struct kvtier_seq_opts o;
	struct kvtier_plan p;
	uint64_t before;

	begin(&f, true);
	begin_seq(&f, &q, 42, KVT_EPHEMERAL, 1000);
	assert_int_equal(rt_plan(&q, 200, 500, KVT_ROWS_ALL, &p), 0);
	before = harness_stat(&f.h).tier[KVT_TIER_DRAM].used;
	assert_int_equal(rt_prepare(&kid, &f.rt, 42, 1200, 1200, 4096), 0);
	kid.id = 43;
	o = rt_opts(&kid, KVT_EPHEMERAL, &keep_all);
	kid.id = 42; /* its first rows carry the parent's pattern */
	assert_int_equal(kvtier_seq_fork(q.s, 700, &o, &kid.s), 0);
	kid.rows = 700;
	assert_int_equal(harness_stat(&f.h).tier[KVT_TIER_DRAM].used, before);
	assert_int_equal(rt_wrong(&kid), 0);
	/* Both go on differently. */
	kid.salt = 9;
	assert_int_equal(rt_append(&kid, 400), 0);
	assert_int_equal(rt_append(&q, 100), 0);
	assert_int_equal(rt_plan(&kid, 50, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(rt_plan(&q, 1100, KVT_ROWS_ALL, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(rt_wrong(&q), 0);
	assert_int_equal(kvtier_seq_resident(q.s, 0, NULL, 0), 1100);
	/* The parent ends; the child's rows are still there. */
	rt_seq_free(&q, false);
	assert_int_equal(rt_plan(&kid, 1100, KVT_ROWS_ALL, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(kvtier_seq_resident(kid.s, 0, NULL, 0), 1100);
	assert_int_equal(rt_wrong(&kid), 0);
	/* A truncated child never sees the parent's rows past its prefix again. */
	assert_int_equal(kvtier_seq_truncate(kid.s, 650), 0);
	kid.rows = 650;
	kid.salt = 10;
	assert_int_equal(rt_append(&kid, 300), 0);
	assert_int_equal(rt_plan(&kid, 50, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(rt_plan(&kid, 950, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(rt_wrong(&kid), 0);
	assert_no_miss(&f);
	rt_seq_free(&kid, false);
	assert_empty(&f);
	finish(&f);
}

/* A fork that is answered late finds a plan that its client applies meanwhile: it must stay the parent's plan.
 */
static void a_fork_leaves_a_ready_plan(void **state)
{
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = 100, .dram_rows = KVT_ROWS_ALL, .manual = 1};
	struct kvtier_plan p = {.size = sizeof(p)};
	struct kvtier_seq_opts o;
	struct rt_seq q, kid;
	struct fixture f;
	uint64_t id;

	begin(&f, false);
	begin_seq(&f, &q, 44, KVT_EPHEMERAL, 500);
	assert_int_equal(kvtier_plan_request(q.s, &b, &id), 0);
	assert_int_equal(kvtier_plan_wait(q.s, id, KVT_PLAN_READY, 5000, &p), 0);
	assert_int_equal(rt_prepare(&kid, &f.rt, 44, 1200, 1200, 4096), 0);
	kid.id = 45;
	o = rt_opts(&kid, KVT_EPHEMERAL, &keep_all);
	kid.id = 44;
	assert_int_equal(kvtier_seq_fork(q.s, 300, &o, &kid.s), 0);
	kid.rows = 300;
	assert_int_equal(kvtier_plan_apply(q.s, &p), 0);
	assert_int_equal(kvtier_plan_ack(q.s, p.id, NULL), 0);
	assert_int_equal(kvtier_seq_resident(q.s, 0, NULL, 0), 100);
	assert_int_equal(rt_wrong(&q), 0);
	assert_int_equal(rt_wrong(&kid), 0);
	assert_int_equal(rt_plan(&kid, 10, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(rt_plan(&kid, 300, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(rt_wrong(&kid), 0);
	assert_int_equal(rt_plan(&q, 500, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(rt_wrong(&q), 0);
	assert_no_miss(&f);
	rt_seq_free(&kid, false);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

static void a_plan_asked_for_comes_in_spite_of_a_truncate(void **state)
{
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = 100, .dram_rows = KVT_ROWS_ALL, .manual = 1};
	struct kvtier_plan p = {.size = sizeof(p)};
	struct fixture f;
	struct rt_seq q;
	uint64_t id;

	begin(&f, false);
	begin_seq(&f, &q, 46, KVT_EPHEMERAL, 500);
	for (uint32_t rows = 499; rows > 480; rows--) {
		assert_int_equal(kvtier_plan_request(q.s, &b, &id), 0);
		assert_int_equal(kvtier_seq_truncate(q.s, rows), 0);
		q.rows = rows;
		assert_int_equal(kvtier_plan_wait(q.s, id, KVT_PLAN_READY, 5000, &p), 0);
		assert_true(p.id >= id && p.watermark == rows);
	}
	assert_int_equal(kvtier_plan_apply(q.s, &p), 0);
	assert_int_equal(kvtier_plan_ack(q.s, p.id, NULL), 0);
	assert_int_equal(rt_wrong(&q), 0);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

static void a_lease_survives_its_client(void **state)
{
	struct fixture f;
	struct runtime second;
	struct rt_seq q, r;
	struct kvtier_seq_opts o;
	struct kvtier_plan p;
	uint32_t rows = 0;

	begin(&f, true);
	begin_seq(&f, &q, 50, KVT_LEASED, 900);
	assert_int_equal(rt_plan(&q, 300, 200, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(rt_append(&q, 100), 0);
	kvtier_close(f.rt.c); /* with everything open: 400 rows are only in the region */
	f.rt.c = NULL;
	assert_int_equal(rt_open(&second, f.h.sock[0], 4), 0);
	assert_int_equal(rt_prepare(&r, &second, 50, 1200, 1200, 4096), 0);
	o = rt_opts(&r, KVT_LEASED, &keep_all);
	o.secret[31] ^= 1;
	assert_int_equal(kvtier_seq_resume(second.c, second.m, &o, &r.s, &rows), KVT_E_NOENT);
	o.secret[31] ^= 1;
	assert_int_equal(kvtier_seq_resume(second.c, second.m, &o, &r.s, &rows), 0);
	assert_int_equal(rows, 1000);
	assert_int_equal(kvtier_seq_resident(r.s, 0, NULL, 0), 0);
	r.rows = 1000;
	assert_int_equal(rt_plan(&r, 1000, KVT_ROWS_ALL, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(kvtier_seq_resident(r.s, 0, NULL, 0), 1000);
	assert_int_equal(rt_wrong(&r), 0);
	assert_no_miss(&f);
	/* Closed and taken up again in the same connection. */
	kvtier_seq_close(r.s);
	assert_int_equal(kvtier_seq_resume(second.c, second.m, &o, &r.s, &rows), 0);
	assert_int_equal(rt_plan(&r, 1000, KVT_ROWS_ALL, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(rt_wrong(&r), 0);
	rt_seq_free(&r, true);
	free(q.lay);
	free(q.salts);
	assert_empty(&f);
	rt_close(&second);
	harness_stop(&f.h);
	harness_rm(f.h.dir);
}

/* Child processes must not inherit the core's threads: they start before it. */
static pid_t victim(struct fixture *f, uint32_t lifetime, int ready[2], int go[2])
{
	pid_t pid;
	char b = 1;

	assert_int_equal(pipe(ready), 0);
	assert_int_equal(pipe(go), 0);
	pid = fork();
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (read(go[0], &b, 1) == 1) {
		struct runtime rt;
		struct rt_seq q;

		b = 1;
		if (rt_open(&rt, f->h.sock[0], 4) || rt_prepare(&q, &rt, 60, 1200, 1200, 4096) ||
		    rt_seq_open(&q, lifetime, &keep_all) || rt_append(&q, 800) ||
		    rt_plan(&q, 300, KVT_ROWS_ALL, 0, NULL) || rt_append(&q, 77))
			b = 2;
		if (write(ready[1], &b, 1) == 1)
			pause();
	}
	_exit(0);
}

static void kill_leaves_nothing_behind(void **state)
{
	struct fixture f;
	int ready[2], go[2];
	pid_t pid;
	char b = 0;

	harness_init(&f.h, false);
	pid = victim(&f, KVT_EPHEMERAL, ready, go);
	assert_true(harness_start(&f.h));
	assert_int_equal(write(go[1], &b, 1), 1);
	assert_int_equal(read(ready[0], &b, 1), 1);
	assert_int_equal(b, 1);
	assert_int_equal(harness_stat(&f.h).seqs, 1);
	assert_true(harness_stat(&f.h).tier[KVT_TIER_DRAM].used > 0);
	kill(pid, SIGKILL);
	assert_empty(&f);
	assert_int_equal(harness_stat(&f.h).clients, 0);
	waitpid(pid, NULL, 0);
	harness_stop(&f.h);
	harness_rm(f.h.dir);
}

static _Atomic int drained;
static void on_drained(void *arg)
{
	(void)arg;
	atomic_store(&drained, 1);
}

static void start_drain(struct core *c, void *arg)
{
	core_drain(c, on_drained, arg);
}

static void killed_leases_come_back_after_a_restart(void **state)
{
	struct fixture f;
	struct rt_seq r;
	struct kvtier_seq_opts o;
	struct kvtier_plan p;
	uint32_t rows = 0;
	int ready[2], go[2];
	pid_t pid;
	char b = 0;

	harness_init(&f.h, true);
	pid = victim(&f, KVT_LEASED, ready, go);
	assert_true(harness_start(&f.h));
	assert_int_equal(write(go[1], &b, 1), 1);
	assert_int_equal(read(ready[0], &b, 1), 1);
	assert_int_equal(b, 1);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	atomic_store(&drained, 0);
	harness_call(&f.h, start_drain, NULL);
	for (int i = 0; i < 1000 && !atomic_load(&drained); i++)
		usleep(10000);
	assert_true(atomic_load(&drained));
	harness_stop(&f.h);
	for (int t = 0; t < 2; t++)
		unlink(f.h.sock[t]);

	assert_true(harness_start(&f.h));
	assert_int_equal(harness_stat(&f.h).orphans, 1);
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	assert_int_equal(rt_prepare(&r, &f.rt, 60, 1200, 1200, 4096), 0);
	o = rt_opts(&r, KVT_LEASED, &keep_all);
	assert_int_equal(kvtier_seq_resume(f.rt.c, f.rt.m, &o, &r.s, &rows), 0);
	assert_int_equal(rows, 877);
	r.rows = 877;
	assert_int_equal(rt_plan(&r, 877, 0, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(kvtier_seq_resident(r.s, 0, NULL, 0), 877);
	assert_int_equal(rt_wrong(&r), 0);
	rt_seq_free(&r, true);
	assert_empty(&f);
	finish(&f);
}

static void tenants_do_not_meet(void **state)
{
	struct fixture f;
	struct runtime other;
	struct rt_seq q, r;
	struct kvtier_seq_opts o;
	uint32_t rows;

	begin(&f, false);
	assert_int_equal(rt_open(&other, f.h.sock[1], 4), 0);
	begin_seq(&f, &q, 70, KVT_LEASED, 100);
	/* The same key in another tenant is another sequence. */
	assert_int_equal(rt_prepare(&r, &other, 70, 1200, 1200, 4096), 0);
	o = rt_opts(&r, KVT_LEASED, &keep_all);
	assert_int_equal(kvtier_seq_resume(other.c, other.m, &o, &r.s, &rows), KVT_E_NOENT);
	assert_int_equal(kvtier_seq_open(other.c, other.m, &o, &r.s), 0);
	assert_int_equal(harness_stat(&f.h).seqs, 2);
	rt_seq_free(&r, true);
	/* In the same tenant it is taken. */
	assert_int_equal(rt_prepare(&r, &f.rt, 70, 1200, 1200, 4096), 0);
	o = rt_opts(&r, KVT_LEASED, &keep_all);
	assert_int_equal(kvtier_seq_open(f.rt.c, f.rt.m, &o, &r.s), KVT_E_EXISTS);
	r.s = NULL;
	rt_seq_free(&r, false);
	rt_seq_free(&q, true);
	rt_close(&other);
	assert_empty(&f);
	finish(&f);
}

static void quotas_clip_and_refuse(void **state)
{
	struct fixture f;
	struct rt_seq q, r;
	struct kvtier_plan p;
	struct core_stat st;

	harness_init(&f.h, false);
	f.h.cfg.tenant[0].max_seqs = 1;
	f.h.cfg.tenant[0].dram_bytes = 1 << 20;
	f.h.cfg.tenant[0].region_bytes = 8 << 20;
	assert_true(harness_start(&f.h));
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	begin_seq(&f, &q, 71, KVT_EPHEMERAL, 1100);
	assert_int_equal(rt_prepare(&r, &f.rt, 72, 10, 0, 100), 0);
	assert_int_equal(rt_seq_open(&r, KVT_EPHEMERAL, &keep_all), KVT_E_LIMIT);
	assert_non_null(strstr(kvtier_last_error(), "max_seqs 1"));
	r.s = NULL;
	rt_seq_free(&r, false);
	assert_int_equal(rt_prepare(&r, &f.rt, 72, 60000, 0, 60000), KVT_E_LIMIT);
	rt_seq_free(&r, false);
	/* More than the quota leaves: the rest is dropped, nothing fails. */
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, &p), 0);
	assert_true(p.rows_drop > 0);
	st = harness_stat(&f.h);
	assert_true(st.bytes[KVT_TIER_DRAM] > 512 << 10);
	assert_true(st.bytes[KVT_TIER_DRAM] <= 1 << 20);
	assert_int_equal(rt_plan(&q, 1100, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(rt_wrong(&q), 0);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

static void corrupt_pages_are_misses(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct kvtier_plan p;
	struct core_stat st;

	harness_init(&f.h, false);
	strcpy(f.h.cfg.dram_fault, "seed=3,flip=150");
	assert_true(harness_start(&f.h));
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	begin_seq(&f, &q, 73, KVT_EPHEMERAL, 1000);
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, &p), 0);
	/* Every page that does not match is a counted miss; what comes back is right. */
	for (int i = 0; i < 4; i++) {
		int r = rt_plan(&q, 1000, KVT_ROWS_ALL, 0, &p);

		assert_int_equal(r, 0);
		assert_int_equal(rt_wrong(&q), 0);
		assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, &p), 0);
	}
	st = harness_stat(&f.h);
	assert_true(st.miss_corrupt > 0);
	assert_true(rt_info(&q).misses > 0);
	assert_true(rt_info(&q).dropped_rows > 0);
	assert_int_equal(st.hangups_protocol, 0);
	rt_seq_free(&q, false);
	finish(&f);
}

/* ---- by itself: budgets, slack ------------------------------------------------------------ */

static void plans_come_by_themselves(void **state)
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .device_rows = 256,
				  .dram_rows = KVT_ROWS_ALL,
				  .slack_rows = 32,
				  .policy = "client"};
	struct fixture f;
	struct rt_seq q;
	struct kvtier_plan p = {.size = sizeof(p)};

	begin(&f, false);
	assert_int_equal(rt_prepare(&q, &f.rt, 74, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL, &b), 0);
	assert_int_equal(rt_append(&q, 288), 0);
	usleep(150000);
	assert_int_equal(kvtier_plan_peek(q.s, &p), 0); /* within the slack */
	for (int i = 0; i < 20; i++) {
		assert_int_equal(rt_append(&q, 33), 0);
		assert_int_equal(rt_follow(&q, 0, &p), 0);
		assert_int_equal(kvtier_seq_resident(q.s, 0, NULL, 0), 256);
		assert_int_equal(rt_wrong(&q), 0);
	}
	assert_int_equal(rt_info(&q).dropped_rows, 0);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

/* Scored by workers, decided on the loop, published to nobody: over before the call that decided it returns. */
static void a_small_plan_may_end_where_it_is_made(void **state)
{
	const struct kvtier_budget keep_few = {
		.size = sizeof(keep_few), .device_rows = 64, .policy = "keydiff"};
	struct kvtier_layer_desc layer = {.kv_heads = 3, .k_bytes = 48, .v_bytes = 48};
	struct kvtier_model_desc md = {.size = sizeof(md),
				       .name = "floats",
				       .dtype = KVT_DTYPE_F32,
				       .head_dim = 12,
				       .layers = &layer,
				       .n_layers = 1,
				       .world = 1};
	struct fixture f;
	struct rt_seq q;

	harness_init(&f.h, false);
	f.h.cfg.observe = true;
	assert_true(harness_start(&f.h));
	assert_int_equal(rt_open_dims(&f.rt, f.h.sock[0], 1, 3, 48, 48, 0, 0), 0);
	kvtier_model_release(f.rt.m);
	assert_int_equal(kvtier_model_register(f.rt.c, &md, &f.rt.m), 0);
	assert_int_equal(rt_prepare(&q, &f.rt, 12, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL, &keep_few), 0);
	for (uint32_t plans = 1; plans <= 3; plans++) {
		assert_int_equal(rt_append(&q, 300), 0);
		for (int i = 0; i < 500 && harness_stat(&f.h).plans < plans; i++)
			usleep(10000);
		assert_int_equal(harness_stat(&f.h).plans, plans);
	}
	assert_string_equal(rt_info(&q).policy, "keydiff");
	assert_int_equal(kvtier_seq_resident(q.s, 0, NULL, 0), 900);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

static void low_dram_is_relieved_in_the_background(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct kvtier_plan p;
	struct core_stat st;

	harness_init(&f.h, true);
	f.h.cfg.dram_size = 4 << 20;
	f.h.cfg.dram_segment = 2 << 20;
	f.h.cfg.dram_marks = (struct config_watermarks){.min = 50, .low = 800, .high = 900};
	assert_true(harness_start(&f.h));
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	begin_seq(&f, &q, 90, KVT_EPHEMERAL, 1100);
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(p.rows_drop, 0);
	for (int i = 0; i < 300; i++) {
		st = harness_stat(&f.h);
		if (st.tier[KVT_TIER_DRAM].free >= st.tier[KVT_TIER_DRAM].capacity / 1000 * 800)
			break;
		usleep(10000);
	}
	assert_true(st.tier[KVT_TIER_DRAM].free >= st.tier[KVT_TIER_DRAM].capacity / 1000 * 800);
	assert_true(st.rows_demoted[KVT_TIER_NVME] > 0);
	/* Nobody asked the runtime, nothing was lost. */
	assert_int_equal(rt_info(&q).dropped_rows, 0);
	assert_int_equal(rt_plan(&q, 1100, KVT_ROWS_ALL, KVT_ROWS_ALL, &p), 0);
	assert_int_equal(kvtier_seq_resident(q.s, 0, NULL, 0), 1100);
	assert_int_equal(rt_wrong(&q), 0);
	assert_no_miss(&f);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

static void start_verify(struct core *c, void *arg)
{
	char err[200];

	*(int *)arg = core_verify_start(c, 0, err, sizeof(err));
}
static void look_verify(struct core *c, void *arg)
{
	core_verify_stat(c, arg);
}

static struct core_verify verify_all(struct fixture *f)
{
	struct core_verify v = {.running = true};
	int r = -1;

	harness_call(&f->h, start_verify, &r);
	assert_int_equal(r, 0);
	for (int i = 0; i < 500 && v.running; i++) {
		usleep(5000);
		harness_call(&f->h, look_verify, &v);
	}
	assert_false(v.running);
	return v;
}

static void a_scrub_reads_every_page_and_finds_the_bad(void **state)
{
	struct core_verify v;
	struct core_stat st;
	struct fixture f;
	struct rt_seq q;

	begin(&f, true);
	begin_seq(&f, &q, 91, KVT_EPHEMERAL, 1000);
	assert_int_equal(rt_plan(&q, 100, 400, KVT_ROWS_ALL, NULL), 0);
	v = verify_all(&f);
	assert_true(v.pages >= 900 * f.rt.lanes / 128);
	assert_int_equal(v.pages, v.total);
	assert_int_equal(v.bytes, 900 * f.rt.lanes * (RT_K + RT_V));
	assert_int_equal(v.bad, 0);
	rt_seq_free(&q, false);
	finish(&f);

	harness_init(&f.h, false);
	strcpy(f.h.cfg.dram_fault, "seed=5,flip=300");
	assert_true(harness_start(&f.h));
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	begin_seq(&f, &q, 92, KVT_EPHEMERAL, 1000);
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, NULL), 0);
	v = verify_all(&f);
	assert_true(v.bad > 0);
	st = harness_stat(&f.h);
	assert_int_equal(st.miss_corrupt, v.bad);
	assert_true(rt_info(&q).dropped_rows > 0);
	rt_seq_free(&q, false);
	finish(&f);
}

/* ---- hostile ---------------------------------------------------------------------------------- */

struct raw {
	int fd, fds[WIRE_MAX_FDS];
	struct seg ctl, region;
	struct ring sq;
	struct seq_slot *slots;
	uint64_t seq;
	uint32_t entries;
};

static int raw_call(struct raw *r, struct wire_hdr *m, void *reply, size_t size, unsigned *n_fds)
{
	unsigned n = 0;
	ssize_t len;

	assert_int_equal(sock_send(r->fd, m, m->len, NULL, 0), 0);
	if (sock_wait(r->fd, POLLIN, now_ns() + 5000000000u) <= 0)
		return -1;
	len = sock_recv(r->fd, reply, size, r->fds, &n);
	if (n_fds)
		*n_fds = n;
	return len <= 0 ? -1 : ((struct wire_reply *)reply)->status;
}

/* A well-behaved client by hand, up to one open sequence of one layer and one head. */
static void raw_open(struct raw *r, const char *sock)
{
	struct wire_hello h;
	struct wire_hello_reply hr;
	struct wire_region g;
	struct wire_region_reply gr;
	struct wire_seq_open_reply sr;
	union {
		struct wire_model m;
		struct wire_seq_open o;
		uint8_t b[1024];
	} u;
	struct wire_model_reply mr;
	unsigned n;

	memset(r, 0, sizeof(*r));
	r->fd = sock_connect(sock);
	assert_true(r->fd >= 0);
	wire_init(&h.hdr, W_HELLO, sizeof(h), 1);
	h.max_seqs = 4;
	h.ring_entries = r->entries = 64;
	h.plan_bytes = 1 << 20;
	strcpy(h.name, "raw");
	assert_int_equal(raw_call(r, &h.hdr, &hr, sizeof(hr), &n), 0);
	assert_int_equal(n, 4);
	assert_int_equal(seg_map(&r->ctl, SEG_EXCHANGE, r->fds[0], hr.ctl_bytes), 0);
	close(r->fds[1]);
	close(r->fds[3]);
	assert_int_equal(ring_attach(&r->sq, r->ctl.addr, 64, true), 0);
	r->slots = (struct seq_slot *)((char *)r->ctl.addr + ctl_slots_off(64));
	int wake = r->fds[2];
	wire_init(&u.m.hdr, W_MODEL, wire_model_len(1), 2);
	strcpy(u.m.name, "raw");
	u.m.n_layers = 1;
	u.m.world = 1;
	u.m.layer[0] = (struct wire_layer){.kv_heads = 1, .k_bytes = 64};
	assert_int_equal(raw_call(r, &u.m.hdr, &mr, sizeof(mr), NULL), 0);
	wire_init(&g.hdr, W_REGION, sizeof(g), 3);
	g.bytes = 1 << 20;
	assert_int_equal(raw_call(r, &g.hdr, &gr, sizeof(gr), &n), 0);
	close(r->fds[0]);
	wire_init(&u.o.hdr, W_SEQ_OPEN, wire_seq_open_len(1, 0), 4);
	u.o.max_rows = 1000;
	u.o.n_layers = 1;
	u.o.model = mr.model;
	u.o.region = gr.region;
	u.o.key[0] = 1;
	*wire_open_layouts(&u.o) = (struct wire_layout){.k_row_stride = 64, .cap = 500, .stage = 10};
	assert_int_equal(raw_call(r, &u.o.hdr, &sr, sizeof(sr), NULL), 0);
	r->seq = sr.seq;
	r->slots += sr.slot;
	r->fds[2] = wake;
}

static void raw_poke(struct raw *r)
{
	struct ring_entry e = {.type = Q_DIRTY, .handle = r->seq};
	uint64_t one = 1;

	assert_true(ring_push(&r->sq, &e) >= 0);
	assert_int_equal(write(r->fds[2], &one, sizeof(one)), sizeof(one));
}

static bool raw_ended(struct raw *r)
{
	uint8_t b[4096];
	bool end = false;

	for (int i = 0; i < 100 && !end; i++) {
		int n;
		unsigned k;

		if (sock_wait(r->fd, POLLIN, now_ns() + 50000000u) > 0) {
			n = (int)sock_recv(r->fd, b, sizeof(b), r->fds, &k);
			end = n == 0 || n == -ECONNRESET;
		}
	}
	close(r->fd);
	close(r->fds[2]);
	seg_close(&r->ctl);
	return end;
}

static void whoever_cheats_is_ended_alone(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct kvtier_plan p;
	struct wire_handle bad;
	struct raw r;
	uint64_t one = 1;
	uint32_t ended = 0;

	begin(&f, false);
	begin_seq(&f, &q, 80, KVT_EPHEMERAL, 300);
	for (int how = 0; how < 8; how++) {
		raw_open(&r, f.h.sock[0]);
		switch (how) {
		case 0: /* an epoch that never was */
			atomic_store(&r.slots->len, seq_len_pack(7, 10));
			raw_poke(&r);
			break;
		case 1: /* more rows than the layout holds */
			atomic_store(&r.slots->len, seq_len_pack(0, 501));
			raw_poke(&r);
			break;
		case 2: /* more than max_rows */
			atomic_store(&r.slots->len, seq_len_pack(0, 100000));
			raw_poke(&r);
			break;
		case 3: /* fewer than before */
			atomic_store(&r.slots->len, seq_len_pack(0, 10));
			raw_poke(&r);
			usleep(150000);
			atomic_store(&r.slots->len, seq_len_pack(0, 9));
			raw_poke(&r);
			break;
		case 4: /* a plan that never was */
			atomic_store(&r.slots->acked, 5);
			raw_poke(&r);
			break;
		case 5: /* somebody else's sequence */
			r.seq = rt_info(&q).handle;
			raw_poke(&r);
			break;
		case 6: /* a cursor far ahead */
			memset(r.ctl.addr, 0x7f, 256);
			assert_int_equal(write(r.fds[2], &one, sizeof(one)), sizeof(one));
			break;
		case 7: /* a cut message */
			wire_init(&bad.hdr, W_SEQ_INFO, sizeof(bad), 9);
			bad.hdr.len += 8;
			assert_int_equal(sock_send(r.fd, &bad, sizeof(bad), NULL, 0), 0);
			break;
		}
		if (!raw_ended(&r)) {
			print_message("# trick %d was not noticed\n", how);
			fail();
		}
		ended++;
		assert_int_equal(harness_stat(&f.h).hangups_protocol, ended);
	}
	/* The honest one never noticed. */
	assert_int_equal(rt_plan(&q, 100, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(rt_wrong(&q), 0);
	rt_seq_free(&q, false);
	assert_empty(&f);
	finish(&f);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(demote_and_promote_through_dram),
		cmocka_unit_test(latencies_and_refault_distances_are_counted),
		cmocka_unit_test(rows_come_back_from_nvme),
		cmocka_unit_test(any_life_keeps_every_byte),
		cmocka_unit_test(a_truncate_cancels_the_plan),
		cmocka_unit_test(refused_lanes_stay_as_they_were),
		cmocka_unit_test(a_fork_shares_pages_and_parts_ways),
		cmocka_unit_test(a_fork_leaves_a_ready_plan),
		cmocka_unit_test(a_plan_asked_for_comes_in_spite_of_a_truncate),
		cmocka_unit_test(a_lease_survives_its_client),
		cmocka_unit_test(kill_leaves_nothing_behind),
		cmocka_unit_test(killed_leases_come_back_after_a_restart),
		cmocka_unit_test(tenants_do_not_meet),
		cmocka_unit_test(quotas_clip_and_refuse),
		cmocka_unit_test(corrupt_pages_are_misses),
		cmocka_unit_test(plans_come_by_themselves),
		cmocka_unit_test(a_small_plan_may_end_where_it_is_made),
		cmocka_unit_test(low_dram_is_relieved_in_the_background),
		cmocka_unit_test(a_scrub_reads_every_page_and_finds_the_bad),
		cmocka_unit_test(whoever_cheats_is_ended_alone),
	};

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
