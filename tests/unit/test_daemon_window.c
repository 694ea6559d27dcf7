/* SPDX-License-Identifier: MIT */
/* Sequences whose rows only their client reaches: plans through rings, byte for byte. */
#include "window_fixture.h"

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

/* The best rows stay, by what the score planes say, and the protected ones. */
static void assert_best(const struct wseq *q, uint32_t keep)
{
	_cleanup_free_ uint8_t *here = malloc(q->rows);

	for (uint32_t l = 0; l < q->l->lanes; l++) {
		float worst = 100, best = -100;

		assert_int_equal(q->count[l], keep);
		memset(here, 0, q->rows);
		for (uint32_t s = 0; s < keep; s++)
			here[*wq_pos(q, l, s)] = 1;
		for (uint32_t p = 4; p < q->rows - 16; p++)
			if (here[p])
				worst = MIN(worst, *wq_score(q, l, 0, p));
			else
				best = MAX(best, *wq_score(q, l, 0, p));
		assert_true(worst >= best - 0.01f); /* keys are halves */
		assert_true(here[0] && here[3] && here[q->rows - 1] && here[q->rows - 16]);
	}
}

static void scores_of_the_plane_decide(void **state)
{
	struct fixture f;
	struct wseq q;

	begin(&f, false);
	begin_seq(&f, &q, 2, KVT_EPHEMERAL, RING, 600);
	assert_int_equal(wq_plan(&q, 100, 0, 0), 0);
	assert_best(&q, 100);
	assert_int_equal(wq_info(&q).dropped_rows, 500 * f.l.lanes);
	assert_no_miss(&f);
	wq_free(&q);
	finish(&f);
}

/* So many rows that their scores are read by all workers: more than a million of row and lane. */
static void scores_of_many_lanes_decide(void **state)
{
	struct wire_budget b = wq_budget(KVT_ROWS_ALL, 0, 0);
	struct fixture f;
	struct wseq q;

	begin(&f, false);
	assert_int_equal(wl_model(&f.l, "wide", KVT_DTYPE_OPAQUE, 0, 64, 8, 16, 0), 0);
	strcpy(b.policy, "client");
	assert_int_equal(wq_make(&q, &f.l, 14, 2200, 2200, 2200, 1 << 20, 1 << 20, 1), 0);
	assert_int_equal(wq_open(&q, W_OP_OPEN, KVT_EPHEMERAL, 0, 0, &b), 0);
	assert_int_equal(wq_append(&q, 2100), 0);
	assert_int_equal(wq_plan(&q, 100, 200, 0), 0);
	assert_best(&q, 100);
	assert_int_equal(wq_info(&q).dropped_rows, 1800 * f.l.lanes);
	assert_int_equal(wq_plan(&q, 300, 300, 0), 0);
	assert_int_equal(q.count[511], 300);
	assert_int_equal(wq_wrong(&q), 0);
	assert_no_miss(&f);
	wq_free(&q);
	finish(&f);
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
	uint64_t before, id;

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
	/* All of it refused before it is ready: another plan comes by itself, of pages that were checked. */
	assert_int_equal(wq_plan(&q, 100, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
	assert_int_equal(wq_ask(&q, &b, &id), 0);
	while (wq_step(&q) >= 0 && q.drained == 0)
		usleep(50);
	memset(q.slot->nack, 0xff, sizeof(q.slot->nack));
	atomic_store(&q.slot->acked, id);
	q.applied = id;
	before = q.direct;
	wq_poke(&q);
	assert_int_equal(wq_follow(&q, id + 1), 0);
	assert_int_equal(q.direct, before);
	assert_int_equal(q.count[2], 1000);
	assert_int_equal(wq_wrong(&q), 0);
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

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rows_go_down_and_come_back),
		cmocka_unit_test(scores_of_the_plane_decide),
		cmocka_unit_test(scores_of_many_lanes_decide),
		cmocka_unit_test(any_life_keeps_every_byte),
		cmocka_unit_test(plans_come_by_themselves),
		cmocka_unit_test(rows_are_written_through),
		cmocka_unit_test(rows_in_published_memory_are_read_where_they_lie),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
