/* SPDX-License-Identifier: MIT */
/* Sequences whose rows only their client reaches: plans through rings, byte for byte, and clients that lie or
 * die. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include "core_harness.h"
#include "window_gpu.h"

#define K 48u
#define V 32u
#define RING 24576u /* two pages of 128 rows with their headers, and little more */

struct fixture {
	struct harness h;
	struct wlink l;
};

static void begin(struct fixture *f, bool nvme)
{
	harness_init(&f->h, nvme);
	assert_true(harness_start(&f->h));
	assert_int_equal(wl_connect(&f->l, f->h.sock[0]), 0);
	assert_int_equal(wl_model(&f->l, "bytes", KVT_DTYPE_OPAQUE, 0, 3, 3, K, V), 0);
}

static void begin_seq(struct fixture *f, struct wseq *q, uint32_t id, uint32_t lifetime, uint64_t ring,
		      uint32_t rows)
{
	struct wire_budget b = wq_budget(KVT_ROWS_ALL, 0, 0);

	strcpy(b.policy, "client");
	assert_int_equal(wq_make(q, &f->l, id, 1200, 1200, 4096, ring == RING ? RING / 2 : ring, ring, 1), 0);
	assert_int_equal(wq_open(q, W_OP_OPEN, lifetime, 0, 0, &b), 0);
	for (uint32_t n; rows; rows -= n) {
		n = MIN(rows, 200u);
		assert_int_equal(wq_append(q, n), 0);
	}
}

static void finish(struct fixture *f)
{
	wl_close(&f->l);
	harness_stop(&f->h);
	harness_rm(f->h.dir);
}

static void assert_no_miss(struct fixture *f)
{
	struct core_stat st = harness_stat(&f->h);

	assert_int_equal(st.miss_corrupt + st.miss_io + st.miss_stale + st.miss_mutated, 0);
	assert_int_equal(st.hangups_protocol, 0);
}

/* Every sequence and page is gone; waits for the daemon to notice. */
static void assert_empty(struct fixture *f)
{
	struct core_stat st = {.seqs = 1};

	for (int i = 0; i < 200 && (st.seqs || st.tier[KVT_TIER_DRAM].used || st.bytes[KVT_TIER_NVME]); i++) {
		st = harness_stat(&f->h);
		usleep(5000);
	}
	assert_int_equal(st.seqs, 0);
	assert_int_equal(st.tier[KVT_TIER_DRAM].used, 0);
	assert_int_equal(st.bytes[KVT_TIER_DRAM] + st.bytes[KVT_TIER_NVME], 0);
}

/* The connection ends, with one line of the daemon's; an honest one works on. */
static void assert_ended(struct fixture *f)
{
	uint8_t b[512];
	ssize_t n = 1;

	for (int i = 0; i < 100 && n; i++)
		n = sock_wait(f->l.fd, POLLIN, now_ns() + 100000000u) > 0
			    ? sock_recv(f->l.fd, b, sizeof(b), NULL, NULL)
			    : -1;
	assert_int_equal(n, 0);
	assert_int_equal(harness_stat(&f->h).hangups_protocol, 1);
}

/* ---- rows ------------------------------------------------------------------------------ */

static void rows_go_down_and_come_back(void **state)
{
	struct fixture f;
	struct wseq q;
	struct wire_seq_info_reply i;

	begin(&f, true);
	begin_seq(&f, &q, 1, KVT_EPHEMERAL, RING, 1000);
	assert_int_equal(wq_plan(&q, 200, 300, KVT_ROWS_ALL), 0);
	for (uint32_t l = 0; l < f.l.lanes; l++)
		assert_int_equal(q.count[l], 200);
	assert_int_equal(wq_wrong(&q), 0);
	assert_true(q.wraps_out > 10);
	i = wq_info(&q);
	assert_int_equal(i.tier_rows[KVT_TIER_DRAM], 300 * f.l.lanes);
	assert_int_equal(i.tier_rows[KVT_TIER_NVME], 500 * f.l.lanes);
	assert_int_equal(wq_plan(&q, KVT_ROWS_ALL, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
	for (uint32_t l = 0; l < f.l.lanes; l++)
		assert_int_equal(q.count[l], 1000);
	assert_int_equal(wq_wrong(&q), 0);
	assert_true(q.wraps_in > 10);
	/* Rows that have a copy below leave without another one. */
	q.pages_out = 0;
	assert_int_equal(wq_plan(&q, 200, 300, KVT_ROWS_ALL), 0);
	assert_int_equal(q.pages_out, 0);
	assert_int_equal(wq_info(&q).dropped_rows, 0);
	assert_no_miss(&f);
	assert_int_equal(wq_close(&q, false), 0);
	assert_empty(&f);
	wq_free(&q);
	finish(&f);
}

/* The best rows stay: what the score planes say is what is kept. */
static void scores_of_the_plane_decide(void **state)
{
	struct fixture f;
	struct wseq q;

	begin(&f, false);
	begin_seq(&f, &q, 2, KVT_EPHEMERAL, RING, 600);
	assert_int_equal(wq_plan(&q, 100, 0, 0), 0);
	for (uint32_t l = 0; l < f.l.lanes; l++) {
		float worst = 100, best = -100;
		uint8_t here[600] = {0};

		assert_int_equal(q.count[l], 100);
		for (uint32_t s = 0; s < 100; s++)
			here[*wq_pos(&q, l, s)] = 1;
		for (uint32_t p = 4; p < 600 - 16; p++) /* between the protected ones */
			if (here[p])
				worst = MIN(worst, *wq_score(&q, l, 0, p));
			else
				best = MAX(best, *wq_score(&q, l, 0, p));
		assert_true(worst >= best - 0.01f); /* keys are halves */
		assert_true(here[0] && here[3] && here[599] && here[584]);
	}
	assert_int_equal(wq_info(&q).dropped_rows, 500 * f.l.lanes);
	assert_no_miss(&f);
	wq_free(&q);
	finish(&f);
}

/* Some steps of a plan that nobody waits for, then a cut through it. */
static void truncate_somewhere(struct wseq *q)
{
	struct wire_budget b = wq_budget(20 + wq_random(q) % 300, wq_random(q) % 600, KVT_ROWS_ALL);
	uint32_t steps = wq_random(q) % 12;
	uint64_t id;

	assert_int_equal(wq_ask(q, &b, &id), 0);
	for (uint32_t i = 0; i < steps; i++) {
		assert_true(wq_step(q) >= 0);
		usleep(wq_random(q) % 300);
	}
	assert_int_equal(wq_truncate(q, q->rows - wq_random(q) % (q->rows / 3)), 0);
}

static void any_life(struct fixture *f, struct wseq *q, int steps)
{
	for (int k = 0; k < steps; k++) {
		uint32_t what = wq_random(q) % 12, most = 0;
		uint64_t id;

		for (uint32_t l = 0; l < f->l.lanes; l++)
			most = MAX(most, q->count[l]);
		if (what < 4 && most + 150 < q->cap && q->rows + 150 < q->max_rows) {
			assert_int_equal(wq_append(q, 1 + wq_random(q) % 150), 0);
		} else if (what < 8) {
			assert_int_equal(wq_plan(q, 20 + wq_random(q) % 900, wq_random(q) % 600,
						 what == 7 ? wq_random(q) % 200 : KVT_ROWS_ALL),
					 0);
		} else if (what == 8) {
			uint32_t at = wq_random(q) % q->rows;

			assert_int_equal(wq_fetch(q, at, MIN(40u, q->rows - at), &id), 0);
			assert_int_equal(wq_follow(q, id), 0);
		} else if (what == 9) {
			q->nack_lane = wq_random(q) % f->l.lanes;
			assert_int_equal(wq_plan(q, 20 + wq_random(q) % 900, wq_random(q) % 600, KVT_ROWS_ALL),
					 0);
		} else if (q->rows > 10) {
			truncate_somewhere(q);
		}
		assert_int_equal(wq_wrong(q), 0);
	}
}

static void any_life_keeps_every_byte(void **state)
{
	static const uint64_t ring[] = {RING, 9 * 4096, 1 << 20};
	struct fixture f;
	struct wseq q[3];

	begin(&f, true);
	for (uint32_t i = 0; i < 3; i++)
		begin_seq(&f, &q[i], 20 + i, KVT_EPHEMERAL, ring[i], 300);
	for (int round = 0; round < 8; round++)
		for (uint32_t i = 0; i < 3; i++)
			any_life(&f, &q[i], 12);
	assert_true(q[0].wraps_in > 20 && q[0].wraps_out > 20 && q[1].wraps_in > 5);
	assert_no_miss(&f);
	for (uint32_t i = 0; i < 3; i++) {
		assert_int_equal(wq_close(&q[i], false), 0);
		wq_free(&q[i]);
	}
	assert_empty(&f);
	finish(&f);
}

static void plans_come_by_themselves(void **state)
{
	struct wire_budget b = wq_budget(256, KVT_ROWS_ALL, 0);
	struct fixture f;
	struct wseq q;

	begin(&f, false);
	b.manual = 0;
	b.slack_rows = 32;
	strcpy(b.policy, "client");
	assert_int_equal(wq_make(&q, &f.l, 3, 1200, 1200, 4096, 1 << 20, 1 << 20, 1), 0);
	assert_int_equal(wq_open(&q, W_OP_OPEN, KVT_EPHEMERAL, 0, 0, &b), 0);
	assert_int_equal(wq_append(&q, 288), 0);
	for (int i = 0; i < 20; i++) {
		assert_int_equal(wq_append(&q, 33), 0);
		assert_int_equal(wq_follow(&q, 0), 0);
		assert_int_equal(q.count[0], 256);
		assert_int_equal(wq_wrong(&q), 0);
	}
	assert_int_equal(wq_info(&q).dropped_rows, 0);
	assert_no_miss(&f);
	wq_free(&q);
	finish(&f);
}

/* Written through, rows leave the device at once, and nothing of them dies with their client. */
static void rows_are_written_through(void **state)
{
	struct wire_budget b = wq_budget(KVT_ROWS_ALL, 300, KVT_ROWS_ALL);
	struct fixture f;
	struct wseq q, r;
	uint64_t id;

	begin(&f, true);
	begin_seq(&f, &q, 9, KVT_LEASED, RING, 900);
	b.write_through = 1;
	assert_int_equal(wq_ask(&q, &b, &id), 0);
	assert_int_equal(wq_follow(&q, id), 0);
	for (uint32_t l = 0; l < f.l.lanes; l++)
		assert_int_equal(q.count[l], 900);
	assert_true(q.pages_out >= 900 / 128 * f.l.lanes);
	assert_int_equal(harness_stat(&f.h).rows_demoted[KVT_TIER_DRAM], 300 * f.l.lanes);
	assert_int_equal(harness_stat(&f.h).rows_demoted[KVT_TIER_NVME], 600 * f.l.lanes);
	q.pages_out = 0;
	assert_int_equal(wq_plan(&q, 200, 300, KVT_ROWS_ALL), 0);
	assert_int_equal(q.pages_out, 0);
	assert_int_equal(q.count[0], 200);
	assert_int_equal(wq_append(&q, 100), 0);
	assert_int_equal(wq_plan(&q, KVT_ROWS_ALL, 300, KVT_ROWS_ALL), 0); /* still set: the new ones */
	assert_true(q.pages_out >= f.l.lanes && q.pages_out <= 4 * f.l.lanes);
	assert_int_equal(wq_wrong(&q), 0);
	assert_int_equal(q.count[0], 1000);
	/* The client goes without a word. */
	wl_close(&f.l);
	assert_int_equal(wl_connect(&f.l, f.h.sock[0]), 0);
	assert_int_equal(wl_model(&f.l, "bytes", KVT_DTYPE_OPAQUE, 0, 3, 3, K, V), 0);
	assert_int_equal(wq_make(&r, &f.l, 9, 1200, 1200, 4096, RING, RING, 1), 0);
	assert_int_equal(wq_open(&r, W_OP_RESUME, KVT_LEASED, 0, 0, &b), 0);
	assert_int_equal(r.rows, 1000);
	memcpy(r.salts, q.salts, r.max_rows * sizeof(*r.salts));
	assert_int_equal(wq_info(&r).dropped_rows, 0);
	assert_int_equal(wq_plan(&r, KVT_ROWS_ALL, 300, KVT_ROWS_ALL), 0);
	assert_int_equal(r.count[0], 1000);
	assert_int_equal(wq_wrong(&r), 0);
	assert_no_miss(&f);
	assert_int_equal(wq_close(&r, true), 0);
	assert_empty(&f);
	wq_free(&q);
	wq_free(&r);
	finish(&f);
}

/* ---- published memory ------------------------------------------------------------------------ */

struct segments {
	struct wlink *l;
	struct seg seg[16];
	uint32_t number[16], n;
};

/* As a client does: ask for the descriptor once, map it. */
static const char *segment_at(void *arg, uint32_t number)
{
	struct segments *g = arg;
	struct wire_segment m;

	for (uint32_t i = 0; i < g->n; i++)
		if (g->number[i] == number)
			return g->seg[i].addr;
	wire_init(&m.hdr, W_SEGMENT, sizeof(m), 11);
	m.segment = number;
	if (g->n == ARRAY_SIZE(g->seg) || wl_call(g->l, &m.hdr) || g->l->n_fds != 1)
		return NULL;
	g->seg[g->n] = (struct seg)SEG_INIT;
	if (seg_map(&g->seg[g->n], SEG_PUBLISHED, g->l->fds[0],
		    ((struct wire_segment_reply *)g->l->reply)->bytes) < 0)
		return NULL;
	g->number[g->n] = number;
	return g->seg[g->n++].addr;
}

static void rows_in_published_memory_are_read_where_they_lie(void **state)
{
	struct wire_budget b = wq_budget(KVT_ROWS_ALL, 0, 0);
	struct segments g = {.n = 0};
	struct fixture f;
	struct wseq q;
	uint64_t before;

	begin(&f, true);
	g.l = &f.l;
	strcpy(b.policy, "client");
	assert_int_equal(wq_make(&q, &f.l, 10, 1200, 1200, 4096, RING, RING, 1), 0);
	assert_int_equal(wq_open(&q, W_OP_OPEN, KVT_EPHEMERAL, 0, W_OPEN_DIRECT, &b), 0);
	q.segment = segment_at;
	q.segment_arg = &g;
	assert_int_equal(wq_append(&q, 1000), 0);
	assert_int_equal(wq_plan(&q, 100, 600, KVT_ROWS_ALL), 0);
	assert_int_equal(wq_plan(&q, KVT_ROWS_ALL, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
	assert_true(q.direct >= 600 / 128 * f.l.lanes); /* and what nvme had came through the ring */
	assert_int_equal(q.count[2], 1000);
	assert_int_equal(wq_wrong(&q), 0);
	/* Refused by the client, the next time they are checked here and copied. */
	assert_int_equal(wq_plan(&q, 100, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
	q.nack_lane = 4;
	assert_int_equal(wq_plan(&q, 1000, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
	assert_int_equal(q.count[4], 100);
	before = q.direct;
	assert_int_equal(wq_plan(&q, 1000, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
	assert_int_equal(q.direct, before);
	assert_int_equal(q.count[4], 1000);
	assert_int_equal(wq_wrong(&q), 0);
	assert_int_equal(wq_plan(&q, 100, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
	assert_int_equal(wq_plan(&q, 900, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
	assert_true(q.direct > before);
	for (int i = 0; i < 5; i++)
		any_life(&f, &q, 12);
	assert_no_miss(&f);
	assert_int_equal(wq_close(&q, false), 0);
	wl_close(&f.l); /* its segments are kept while it may name them */
	assert_empty(&f);
	for (uint32_t i = 0; i < g.n; i++)
		seg_close(&g.seg[i]);
	wq_free(&q);
	harness_stop(&f.h);
	harness_rm(f.h.dir);
}

/* ---- what a GPU gets wrong ---------------------------------------------------------------- */

static void a_page_that_is_not_what_was_said_is_a_miss(void **state)
{
	struct fixture f;
	struct wseq q;
	struct core_stat st;

	begin(&f, true);
	begin_seq(&f, &q, 4, KVT_EPHEMERAL, 1 << 20, 1000);
	q.bad_crc = 7;
	assert_int_equal(wq_plan(&q, 300, 300, KVT_ROWS_ALL), 0); /* the second attempt */
	st = harness_stat(&f.h);
	assert_int_equal(st.miss_mutated, 1);
	assert_int_equal(st.plans_cancelled, 1);
	q.bad_plan = 0;
	assert_int_equal(wq_plan(&q, 200, 300, KVT_ROWS_ALL), 0);
	assert_int_equal(harness_stat(&f.h).miss_mutated, 2);
	q.bad_page = 3;
	assert_int_equal(wq_plan(&q, 50, 300, KVT_ROWS_ALL), 0);
	st = harness_stat(&f.h);
	assert_int_equal(st.miss_mutated, 3);
	assert_int_equal(st.miss_corrupt + st.miss_io + st.miss_stale + st.miss_nospace + st.hangups_protocol,
			 0);
	assert_int_equal(wq_info(&q).misses, 3);
	assert_int_equal(wq_info(&q).dropped_rows, 0);
	assert_int_equal(wq_plan(&q, 1000, 0, KVT_ROWS_ALL), 0);
	assert_int_equal(q.count[3], 1000);
	assert_int_equal(wq_wrong(&q), 0);
	assert_int_equal(wq_close(&q, false), 0);
	assert_empty(&f);
	wq_free(&q);
	finish(&f);
}

static void pages_that_rot_are_not_brought_in(void **state)
{
	struct fixture f;
	struct wseq q;
	struct core_stat st;

	harness_init(&f.h, false);
	strcpy(f.h.cfg.dram_fault, "seed=3,flip=150");
	assert_true(harness_start(&f.h));
	assert_int_equal(wl_connect(&f.l, f.h.sock[0]), 0);
	assert_int_equal(wl_model(&f.l, "bytes", KVT_DTYPE_OPAQUE, 0, 3, 3, K, V), 0);
	begin_seq(&f, &q, 5, KVT_EPHEMERAL, RING, 1000);
	assert_int_equal(wq_plan(&q, 100, KVT_ROWS_ALL, 0), 0);
	for (int i = 0; i < 4; i++) {
		assert_int_equal(wq_plan(&q, 1000, KVT_ROWS_ALL, 0), 0);
		assert_int_equal(wq_wrong(&q), 0);
		assert_int_equal(wq_plan(&q, 100, KVT_ROWS_ALL, 0), 0);
	}
	st = harness_stat(&f.h);
	assert_true(st.miss_corrupt > 0);
	assert_int_equal(st.hangups_protocol, 0);
	wq_free(&q);
	finish(&f);
}

enum lie { GATHERED_BEYOND, GATHERED_AHEAD, GATHERED_BACK, DRAINED_BEYOND, DRAINED_AHEAD, DRAINED_BACK, LIES };

static void cursors_that_cannot_be_end_the_client(void **state)
{
	for (int lie = 0; lie < LIES; lie++) {
		struct fixture f;
		struct wseq q;
		struct wire_budget b = wq_budget(900, 900, 0);
		_Atomic uint64_t *word;
		uint64_t id, now;

		begin(&f, false);
		begin_seq(&f, &q, 6, KVT_EPHEMERAL, RING, 1000);
		assert_int_equal(wq_plan(&q, 200, KVT_ROWS_ALL, 0), 0);
		b.device_rows = lie < DRAINED_BEYOND ? 100 : 900;
		assert_int_equal(wq_ask(&q, &b, &id), 0);
		q.stop_out = q.stop_in = true; /* the plan stays as it is */
		for (int i = 0; i < 5000 && q.plan < id; i++) {
			assert_int_equal(wq_step(&q), 0);
			usleep(200);
		}
		assert_int_equal(q.plan, id);
		for (int i = 0; i < 5000 && lie >= DRAINED_BEYOND && !plan_staged(&q.view); i++)
			usleep(200);
		word = lie < DRAINED_BEYOND ? &q.slot->gathered : &q.slot->drained;
		now = atomic_load(word);
		switch (lie % 3) {
		case 0:
			now = window_cursor(id, lie ? plan_staged(&q.view) + 1 : q.view.out_pages + 1);
			break;
		case 1:
			now = window_cursor(id + 1, 0);
			break;
		case 2:
			atomic_store(word, window_cursor(id, 0));
			wq_poke(&q);
			harness_stat(&f.h);
			now = window_cursor(id - 1, 1);
			break;
		}
		if (lie % 3 == 2)
			usleep(30000); /* seen */
		atomic_store(word, now);
		wq_poke(&q);
		assert_ended(&f);
		assert_empty(&f);
		wq_free(&q);
		finish(&f);
	}
}

/* ---- the end --------------------------------------------------------------------------------- */

static void what_was_stored_is_resumed(void **state)
{
	struct wire_budget b = wq_budget(KVT_ROWS_ALL, KVT_ROWS_ALL, KVT_ROWS_ALL);
	struct fixture f;
	struct wseq q, r;

	begin(&f, true);
	begin_seq(&f, &q, 7, KVT_LEASED, RING, 900);
	assert_int_equal(wq_plan(&q, 0, 300, KVT_ROWS_ALL), 0); /* as kvtier_cuda_settle() saves */
	assert_int_equal(q.count[0], 0);
	assert_int_equal(wq_append(&q, 50), 0); /* these nobody saves */
	assert_int_equal(wq_close(&q, false), 0);
	strcpy(b.policy, "client");
	assert_int_equal(wq_make(&r, &f.l, 7, 1200, 1200, 4096, RING, RING, 1), 0);
	assert_int_equal(wq_open(&r, W_OP_RESUME, KVT_LEASED, 0, 0, &b), 0);
	assert_int_equal(r.rows, 950);
	memcpy(r.salts, q.salts, r.max_rows * sizeof(*r.salts));
	assert_int_equal(wq_info(&r).dropped_rows, 50 * f.l.lanes);
	assert_int_equal(wq_append(&r, 30), 0);
	assert_int_equal(wq_plan(&r, KVT_ROWS_ALL, 0, KVT_ROWS_ALL), 0);
	for (uint32_t l = 0; l < f.l.lanes; l++)
		assert_int_equal(r.count[l], 930);
	assert_int_equal(wq_wrong(&r), 0);
	any_life(&f, &r, 12);
	assert_no_miss(&f);
	assert_int_equal(wq_close(&r, true), 0);
	assert_empty(&f);
	wq_free(&q);
	wq_free(&r);
	finish(&f);
}

/* In a process of its own, which is killed in the middle of a plan. */
static pid_t doomed(struct fixture *f, bool linger)
{
	int ready[2];
	pid_t pid;
	char c;

	assert_int_equal(pipe(ready), 0);
	pid = fork();
	if (!pid) {
		struct wire_budget b = wq_budget(100, 300, KVT_ROWS_ALL);
		struct fixture g;
		struct wseq q;
		uint64_t id;

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(ready[0]);
		if (wl_connect(&g.l, f->h.sock[0]) || wl_model(&g.l, "bytes", 0, 0, 3, 3, K, V))
			_exit(1);
		strcpy(b.policy, "client");
		if (wq_make(&q, &g.l, 8, 1200, 1200, 4096, RING, RING, 1) ||
		    wq_open(&q, W_OP_OPEN, KVT_LEASED, 0, 0, &b) || wq_append(&q, 1000) || wq_ask(&q, &b, &id))
			_exit(2);
		for (int i = 0; i < 30; i++)
			if (wq_step(&q) < 0)
				_exit(3);
		if (linger) {
			close(g.l.fd);
			close(ready[1]);
			pause();
		}
		if (write(ready[1], "x", 1) != 1)
			_exit(4);
		for (;;)
			wq_step(&q);
	}
	close(ready[1]);
	assert_int_equal(read(ready[0], &c, 1), linger ? 0 : 1);
	close(ready[0]);
	return pid;
}

static void a_client_may_die_in_the_middle(void **state)
{
	struct wire_budget b = wq_budget(KVT_ROWS_ALL, KVT_ROWS_ALL, KVT_ROWS_ALL);

	for (int round = 0; round < 4; round++) {
		struct fixture f;
		struct wseq r;
		uint32_t below;
		pid_t pid;
		int how;

		begin(&f, true);
		pid = doomed(&f, false);
		usleep(1000 * (unsigned)round);
		kill(pid, SIGKILL);
		assert_int_equal(waitpid(pid, &how, 0), pid);
		assert_true(WIFSIGNALED(how));
		strcpy(b.policy, "client");
		assert_int_equal(wq_make(&r, &f.l, 8, 1200, 1200, 4096, RING, RING, 1), 0);
		for (int i = 0; (how = wq_open(&r, W_OP_RESUME, KVT_LEASED, 0, 0, &b)) == KVT_E_BUSY && i < 100;
		     i++)
			usleep(5000);
		assert_int_equal(how, 0);
		assert_int_equal(r.rows, 1000);
		below = (uint32_t)(wq_info(&r).tier_rows[KVT_TIER_DRAM] + wq_info(&r).tier_rows[KVT_TIER_NVME]);
		assert_int_equal(wq_info(&r).dropped_rows + below, 1000 * f.l.lanes);
		assert_int_equal(wq_plan(&r, KVT_ROWS_ALL, 0, KVT_ROWS_ALL), 0);
		for (uint32_t l = 0; l < f.l.lanes; l++)
			below -= r.count[l];
		assert_int_equal(below, 0);
		assert_int_equal(wq_wrong(&r), 0); /* pages that were whole, whatever the moment */
		assert_no_miss(&f);
		wq_free(&r);
		finish(&f);
	}
}

static uint64_t region_room(struct fixture *f)
{
	struct wire_region g;
	uint64_t lo = 0, hi = UINT64_C(64) << 20;

	while (lo < hi) { /* the largest region that the quota leaves, in pages */
		uint64_t mid = (lo + hi + 4096) / 2 / 4096 * 4096;
		struct wire_handle c;

		wire_init(&g.hdr, W_REGION, sizeof(g), 3);
		g.bytes = mid;
		if (wl_call(&f->l, &g.hdr)) {
			hi = mid - 4096;
			continue;
		}
		lo = mid;
		close(f->l.fds[0]);
		wire_init(&c.hdr, W_REGION_CLOSE, sizeof(c), 4);
		c.handle = ((struct wire_region_reply *)f->l.reply)->region;
		assert_int_equal(wl_call(&f->l, &c.hdr), 0);
	}
	return lo;
}

/* A connection that is closed says nothing about the copies of a GPU; the end of its process does. */
static void memory_is_charged_until_the_process_is_gone(void **state)
{
	struct fixture f;
	uint64_t room;
	pid_t pid;

	harness_init(&f.h, false);
	f.h.cfg.tenant[0].region_bytes = UINT64_C(64) << 20;
	assert_true(harness_start(&f.h));
	assert_int_equal(wl_connect(&f.l, f.h.sock[0]), 0);
	assert_int_equal(region_room(&f), UINT64_C(64) << 20);
	pid = doomed(&f, true);
	for (int i = 0; i < 200 && harness_stat(&f.h).clients > 1; i++)
		usleep(5000);
	assert_int_equal(harness_stat(&f.h).clients, 1);
	room = region_room(&f);
	if (room == UINT64_C(64) << 20 && harness_stat(&f.h).seqs) { /* no SO_PEERPIDFD */
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
		finish(&f);
		print_message("# SKIP the kernel gives no descriptor of the peer's process\n");
		skip();
	}
	assert_true(room < UINT64_C(64) << 20);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	for (int i = 0; i < 200 && room < UINT64_C(64) << 20; i++) {
		room = region_room(&f);
		usleep(5000);
	}
	assert_int_equal(room, UINT64_C(64) << 20);
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rows_go_down_and_come_back),
		cmocka_unit_test(scores_of_the_plane_decide),
		cmocka_unit_test(any_life_keeps_every_byte),
		cmocka_unit_test(plans_come_by_themselves),
		cmocka_unit_test(rows_are_written_through),
		cmocka_unit_test(rows_in_published_memory_are_read_where_they_lie),
		cmocka_unit_test(a_page_that_is_not_what_was_said_is_a_miss),
		cmocka_unit_test(pages_that_rot_are_not_brought_in),
		cmocka_unit_test(cursors_that_cannot_be_end_the_client),
		cmocka_unit_test(what_was_stored_is_resumed),
		cmocka_unit_test(a_client_may_die_in_the_middle),
		cmocka_unit_test(memory_is_charged_until_the_process_is_gone),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
