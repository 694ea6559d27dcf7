/* SPDX-License-Identifier: MIT */
/*
 * Recall through a real core, a real socket and a real region: what comes back are the rows that the
 * definitions name, byte for byte, and nothing that a client does or that befalls a page brings anything else.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include "core_harness.h"
#include "daemon/internal.h"
#include "ipc/client/client.h"
#include "ipc/codec.h"
#include "policy/learned.h"
#include "policy/recall.h"
#include "policy/train/set.h"

#define LAYERS 2u
#define HEADS 3u
#define DIM 16u
#define GROUP 2u
#define WINDOW 64u
#define CAP 1024u
#define MAX_ROWS 2048u

static const struct kvtier_budget keep_all = {
	.size = sizeof(keep_all), .device_rows = KVT_ROWS_ALL, .manual = 1, .policy = "client"};

struct fixture {
	struct harness h;
	struct runtime rt;
	struct rt_seq q;
	uint64_t window; /* offset: [LAYERS][K|V][HEADS][WINDOW] rows */
	bool half;
};

/* ---- rows whose every element is known -------------------------------------------------------- */

static float element(uint32_t lane, uint32_t pos, uint32_t i, bool v)
{
	uint64_t x = (lane * 4096u + pos) * 0x9e3779b97f4a7c15u + i * 0xbf58476d1ce4e5b9u + v * 77u;

	x ^= x >> 31;
	x *= 0x94d049bb133111ebu;
	x ^= x >> 29;
	return (float)((double)(x & 0xffffff) / 0x800000 - 1); /* exact in float32 */
}

static uint32_t row_bytes(const struct fixture *f)
{
	return DIM * (f->half ? 2 : 4);
}

static void write_row(const struct fixture *f, void *dst, uint32_t lane, uint32_t pos, bool v)
{
	for (uint32_t i = 0; i < DIM; i++) {
		float x = element(lane, pos, i, v);
		uint16_t h = float_half(x);

		if (f->half)
			memcpy((char *)dst + i * 2, &h, 2);
		else
			memcpy((char *)dst + i * 4, &x, 4);
	}
}

static bool same_row(const struct fixture *f, const void *src, uint32_t lane, uint32_t pos, bool v)
{
	char want[DIM * 4];

	write_row(f, want, lane, pos, v);
	return !memcmp(src, want, row_bytes(f));
}

static void append(struct fixture *f, uint32_t n)
{
	struct rt_seq *q = &f->q;

	for (uint32_t l = 0; l < q->rt->lanes; l++) {
		int have = kvtier_seq_resident(q->s, l, NULL, 0);

		assert_true(have >= 0 && have + n <= CAP);
		for (uint32_t i = 0; i < n; i++) {
			write_row(f, rt_row(q, l, (uint32_t)have + i, false), l, q->rows + i, false);
			write_row(f, rt_row(q, l, (uint32_t)have + i, true), l, q->rows + i, true);
			*rt_score(q, l, q->rows + i) = (float)(rt_random(q) % 10000);
		}
	}
	q->rows += n;
	assert_int_equal(kvtier_seq_append(q->s, KVT_ALL_LAYERS, q->rows - n, n), 0);
}

/* ---- fixture ----------------------------------------------------------------------------------- */

static void connect_runtime(struct fixture *f)
{
	struct kvtier_layer_desc d[LAYERS];
	struct kvtier_open_opts o = {
		.size = sizeof(o), .socket = f->h.sock[0], .name = "recall", .timeout_ms = 10000};
	struct kvtier_model_desc md = {.size = sizeof(md),
				       .name = "recall",
				       .layers = d,
				       .n_layers = LAYERS,
				       .dtype = f->half ? KVT_DTYPE_F16 : KVT_DTYPE_F32,
				       .head_dim = DIM,
				       .world = 1};

	for (uint32_t i = 0; i < LAYERS; i++)
		d[i] = (struct kvtier_layer_desc){
			.kv_heads = HEADS, .k_bytes = row_bytes(f), .v_bytes = row_bytes(f)};
	f->rt = (struct runtime){.layers = LAYERS,
				 .heads = HEADS,
				 .lanes = LAYERS * HEADS,
				 .k_bytes = row_bytes(f),
				 .v_bytes = row_bytes(f)};
	assert_int_equal(kvtier_open(&o, &f->rt.c), 0);
	assert_int_equal(kvtier_model_register(f->rt.c, &md, &f->rt.m), 0);
}

/* As rt_prepare(), with a window behind the score planes. */
static void prepare_seq(struct fixture *f, struct rt_seq *q, uint32_t id)
{
	uint64_t bytes, scores = 0;

	memset(q, 0, sizeof(*q));
	*q = (struct rt_seq){
		.rt = &f->rt, .id = id, .seed = id, .cap = CAP, .stage = CAP, .max_rows = MAX_ROWS};
	q->lay = calloc(LAYERS, sizeof(*q->lay));
	q->salts = calloc(MAX_ROWS, sizeof(*q->salts));
	assert_int_equal(kvtier_layout_plain(f->rt.m, CAP, CAP, 0, 0, q->lay, &bytes), 0);
	bytes = ALIGN_UP(bytes, 64);
	for (uint32_t i = 0; i < LAYERS; i++) {
		q->lay[i].score_off = bytes + scores;
		q->lay[i].score_head_stride = MAX_ROWS * sizeof(float);
		scores += HEADS * q->lay[i].score_head_stride;
	}
	f->window = bytes + scores;
	assert_int_equal(
		kvtier_region_create(f->rt.c, f->window + LAYERS * 2 * HEADS * WINDOW * row_bytes(f), &q->r),
		0);
}

static void begin(struct fixture *f, bool nvme, bool half)
{
	memset(f, 0, sizeof(*f));
	f->half = half;
	harness_init(&f->h, nvme);
	f->h.cfg.workers = 2;
	assert_true(harness_start(&f->h));
	connect_runtime(f);
	prepare_seq(f, &f->q, 1);
	assert_int_equal(rt_seq_open(&f->q, KVT_EPHEMERAL, &keep_all), 0);
}

static void finish(struct fixture *f)
{
	if (f->q.r)
		rt_seq_free(&f->q, true);
	if (f->rt.c)
		rt_close(&f->rt);
	harness_stop(&f->h);
	harness_rm(f->h.dir);
}

/* ---- asking ------------------------------------------------------------------------------------- */

struct answer {
	uint32_t counts[HEADS], positions[HEADS * WINDOW];
	struct kvtier_recalled r;
};

static uint64_t window_at(const struct fixture *f, uint32_t layer, bool v)
{
	return f->window + (layer * 2 + v) * HEADS * WINDOW * row_bytes(f);
}

static struct kvtier_recall_opts opts_of(const struct fixture *f, uint32_t layer, uint32_t rows)
{
	return (struct kvtier_recall_opts){.size = sizeof(struct kvtier_recall_opts),
					   .group = GROUP,
					   .dtype = KVT_DTYPE_F32,
					   .rows = rows,
					   .probe = 1000,
					   .window_rows = WINDOW,
					   .k_off = window_at(f, layer, false),
					   .v_off = window_at(f, layer, true),
					   .k_head_stride = WINDOW * row_bytes(f),
					   .v_head_stride = WINDOW * row_bytes(f),
					   .k_row_stride = row_bytes(f),
					   .v_row_stride = row_bytes(f)};
}

static void queries(float *q, uint32_t tokens, uint32_t seed)
{
	for (uint32_t i = 0; i < tokens * HEADS * GROUP * DIM; i++)
		q[i] = 4 * element(seed, i, 3, false);
}

static int ask(struct fixture *f, uint32_t layer, const float *q, uint32_t tokens,
	       const struct kvtier_recall_opts *o, struct answer *a)
{
	memset(a, 0, sizeof(*a));
	a->r = (struct kvtier_recalled){.size = sizeof(a->r), .counts = a->counts, .positions = a->positions};
	return kvtier_seq_recall(f->q.s, layer, q, tokens, o, &a->r);
}

static int ask_plainly(struct fixture *f, uint32_t layer, uint32_t rows, struct answer *a)
{
	static float q[4 * HEADS * GROUP * DIM];
	struct kvtier_recall_opts o = opts_of(f, layer, rows);

	queries(q, 4, 5);
	return ask(f, layer, q, 4, &o, a);
}

/* Everything that was recalled lies in the window, byte for byte, ascending, and is not on the device. */
static void check_window(struct fixture *f, uint32_t layer, const struct answer *a, uint32_t stride)
{
	static uint32_t res[MAX_ROWS];

	for (uint32_t h = 0; h < HEADS; h++) {
		uint32_t lane = layer * HEADS + h;
		int n = kvtier_seq_resident(f->q.s, lane, res, MAX_ROWS);

		for (uint32_t i = 0; i < a->counts[h]; i++) {
			uint32_t pos = a->positions[h * stride + i];
			const char *base = kvtier_region_addr(f->q.r);

			assert_true(!i || pos > a->positions[h * stride + i - 1]);
			assert_true(pos < f->q.rows);
			for (int k = 0; k < n; k++)
				assert_true(res[k] != pos);
			for (int v = 0; v < 2; v++)
				assert_true(same_row(
					f, base + window_at(f, layer, v) + (h * WINDOW + i) * row_bytes(f),
					lane, pos, v));
		}
	}
}

/* What the definitions say for plain logits, exact search. */
static void expected(struct fixture *f, uint32_t lane, const float *q, uint32_t rows, uint32_t *ret,
		     uint32_t *ret_n)
{
	static bool here[MAX_ROWS];
	static uint32_t res[MAX_ROWS];
	static double score[MAX_ROWS];
	int n = kvtier_seq_resident(f->q.s, lane, res, MAX_ROWS);
	uint32_t h = lane % HEADS, got = 0;

	memset(here, 0, sizeof(here));
	for (int i = 0; i < n; i++)
		here[res[i]] = true;
	for (uint32_t p = 0; p < f->q.rows; p++) {
		score[p] = -INFINITY;
		for (uint32_t t = 0; t < 4; t++)
			for (uint32_t g = 0; g < GROUP; g++) {
				double s = 0;

				for (uint32_t d = 0; d < DIM; d++)
					s += (double)q[((t * HEADS + h) * GROUP + g) * DIM + d] *
					     (f->half ? (double)half_float(
								float_half(element(lane, p, d, false)))
						      : (double)element(lane, p, d, false));
				score[p] = fmax(score[p], s);
			}
	}
	while (got < rows) {
		uint32_t best = MAX_ROWS;

		for (uint32_t p = 0; p < f->q.rows; p++)
			if (!here[p] && (best == MAX_ROWS || score[p] > score[best]))
				best = p;
		if (best == MAX_ROWS)
			break;
		here[best] = true;
		ret[got++] = best;
	}
	*ret_n = got;
}

static int by_number(const void *a, const void *b)
{
	return (int)*(const uint32_t *)a - (int)*(const uint32_t *)b;
}

/* ---- tests ---------------------------------------------------------------------------------------- */

static void finds_the_right_rows(bool half)
{
	float q[4 * HEADS * GROUP * DIM];
	struct fixture f;
	struct answer a;

	begin(&f, false, half);
	append(&f, 900);
	assert_int_equal(rt_plan(&f.q, 100, MAX_ROWS, 0, NULL), 0);
	queries(q, 4, 9);
	for (uint32_t layer = 0; layer < LAYERS; layer++)
		for (uint32_t rows = 1; rows <= WINDOW; rows *= 4) {
			struct kvtier_recall_opts o = opts_of(&f, layer, rows);

			o.flags = KVT_RECALL_LOGITS | KVT_RECALL_ALONE;
			assert_int_equal(ask(&f, layer, q, 4, &o, &a), rows);
			assert_int_equal(a.r.searched, HEADS * 800);
			assert_int_equal(a.r.skipped + a.r.missed, 0);
			check_window(&f, layer, &a, rows);
			for (uint32_t h = 0; h < HEADS; h++) {
				uint32_t want[WINDOW], n;

				expected(&f, layer * HEADS + h, q, rows, want, &n);
				qsort(want, n, sizeof(*want), by_number);
				assert_int_equal(a.counts[h], n);
				assert_memory_equal(want, a.positions + h * rows, n * sizeof(*want));
			}
		}
	finish(&f);
}

/* Rows around the best one come along, in order of position over what is demoted: the same as asking for it
 * alone, and counting. */
static void test_neighbours_come_along(void **state)
{
	static const uint32_t near[][3] = {
		{0, 0, 33}, {2, 5, 8}, {0, 9, 10}, {40, 0, 41}}; /* the first: defaults */
	static uint32_t res[MAX_ROWS], out[MAX_ROWS];
	float q[4 * HEADS * GROUP * DIM];
	struct fixture f;
	struct answer one, a;

	begin(&f, false, false);
	append(&f, 700);
	assert_int_equal(rt_plan(&f.q, 500, MAX_ROWS, 0, NULL), 0); /* twice, so that pages interleave */
	append(&f, 200);
	assert_int_equal(rt_plan(&f.q, 150, MAX_ROWS, 0, NULL), 0);
	queries(q, 4, 9);
	for (uint32_t i = 0; i < ARRAY_SIZE(near); i++) {
		struct kvtier_recall_opts o = opts_of(&f, 1, 1);

		o.flags = KVT_RECALL_ALONE;
		assert_int_equal(ask(&f, 1, q, 4, &o, &one), 1);
		o = opts_of(&f, 1, near[i][2]);
		o.before = near[i][0];
		o.after = near[i][1];
		assert_true(ask(&f, 1, q, 4, &o, &a) > 0);
		check_window(&f, 1, &a, near[i][2]);
		for (uint32_t h = 0; h < HEADS; h++) {
			uint32_t before = i ? near[i][0] : 8, after = i ? near[i][1] : 24, n = 0, hit = 0,
				 k = 0;
			int have = kvtier_seq_resident(f.q.s, HEADS + h, res, MAX_ROWS);

			for (uint32_t p = 0; p < f.q.rows; p++) {
				if (k < (uint32_t)have && res[k] == p)
					k++;
				else
					out[n++] = p;
			}
			while (hit < n && out[hit] != one.positions[h])
				hit++;
			assert_true(hit < n && n == 750);
			for (uint32_t j = hit > before ? hit - before : 0; j <= MIN(hit + after, n - 1); j++) {
				bool found = false;

				for (uint32_t c = 0; c < a.counts[h]; c++)
					found |= a.positions[h * near[i][2] + c] == out[j];
				assert_true(found);
			}
		}
	}
	finish(&f);
}

static void test_finds_the_right_rows(void **state)
{
	finds_the_right_rows(false);
	finds_the_right_rows(true);
}

/* Searches that are too long for the loop go to workers and find the same. */
static void test_long_searches(void **state)
{
	static float q[4 * HEADS * 128 * DIM];
	struct kvtier_recall_opts o;
	struct answer few, many;
	struct fixture f;

	begin(&f, false, false);
	append(&f, 1000);
	assert_int_equal(rt_plan(&f.q, 50, MAX_ROWS, 0, NULL), 0);
	o = opts_of(&f, 1, 40);
	o.group = 128;
	for (uint32_t t = 0; t < 4; t++)
		for (uint32_t h = 0; h < HEADS; h++)
			for (uint32_t g = 0; g < 128; g++)
				for (uint32_t d = 0; d < DIM; d++) /* exact in bf16, as they travel */
					q[((t * HEADS + h) * 128 + g) * DIM + d] =
						(float)(int)(16 * element(t, h, d, true));
	assert_int_equal(ask(&f, 1, q, 4, &o, &many), 40);
	check_window(&f, 1, &many, 40);
	for (uint32_t t = 0; t < 4; t++) /* the same queries, each once */
		for (uint32_t h = 0; h < HEADS; h++)
			memmove(q + (t * HEADS + h) * DIM, q + (t * HEADS + h) * 128 * DIM, DIM * sizeof(*q));
	o.group = 1;
	assert_int_equal(ask(&f, 1, q, 4, &o, &few), 40);
	assert_memory_equal(few.counts, many.counts, sizeof(few.counts));
	assert_memory_equal(few.positions, many.positions, sizeof(few.positions));
	finish(&f);
}

/* More rows than there are; nothing below at all; another turn over the same window. */
static void test_all_and_nothing(void **state)
{
	struct fixture f;
	struct answer a;

	begin(&f, false, false);
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), 0);
	append(&f, 120);
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), 0);
	assert_int_equal(a.r.searched, 0);
	assert_int_equal(rt_plan(&f.q, 90, MAX_ROWS, 0, NULL), 0);
	for (int turn = 0; turn < 3; turn++)
		for (uint32_t layer = 0; layer < LAYERS; layer++) {
			assert_int_equal(ask_plainly(&f, layer, WINDOW, &a), 30);
			for (uint32_t h = 0; h < HEADS; h++)
				assert_int_equal(a.counts[h], 30);
			check_window(&f, layer, &a, WINDOW);
		}
	assert_int_equal(kvtier_seq_recall_end(f.q.s), 0);
	finish(&f);
}

/* Recall knows nothing of plans and plans nothing of recall. */
static void test_beside_plans(void **state)
{
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = 300, .dram_rows = MAX_ROWS, .manual = 1, .policy = "client"};
	struct kvtier_plan p = {.size = sizeof(p)};
	struct fixture f;
	struct answer a;
	uint64_t id;

	begin(&f, false, false);
	append(&f, 800);
	assert_int_equal(rt_plan(&f.q, 200, MAX_ROWS, 0, NULL), 0);
	/* one is outstanding that promotes 100 rows of each lane */
	assert_int_equal(kvtier_plan_request(f.q.s, &b, &id), 0);
	assert_int_equal(kvtier_plan_wait(f.q.s, id, KVT_PLAN_READY, 10000, &p), 0);
	assert_int_equal(p.rows_in, 100 * LAYERS * HEADS);
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), WINDOW);
	check_window(&f, 0, &a, WINDOW);
	assert_int_equal(kvtier_plan_apply(f.q.s, &p), 0);
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), KVT_E_BUSY);
	assert_int_equal(kvtier_plan_ack(f.q.s, id, NULL), 0);
	for (uint32_t l = 0; l < LAYERS * HEADS; l++) {
		static uint32_t res[MAX_ROWS];
		int n = kvtier_seq_resident(f.q.s, l, res, MAX_ROWS);

		assert_int_equal(n, 300);
		for (int i = 0; i < n; i++)
			assert_true(same_row(&f, rt_row(&f.q, l, (uint32_t)i, false), l, res[i], false));
	}
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), WINDOW);
	assert_int_equal(a.r.searched, HEADS * 500);
	check_window(&f, 0, &a, WINDOW);
	/* new rows stay on the device; then more rows leave it */
	append(&f, 200);
	assert_int_equal(ask_plainly(&f, 1, WINDOW, &a), WINDOW);
	check_window(&f, 1, &a, WINDOW);
	assert_int_equal(rt_plan(&f.q, 100, MAX_ROWS, 0, NULL), 0);
	assert_int_equal(ask_plainly(&f, 1, WINDOW, &a), WINDOW);
	assert_int_equal(a.r.searched, HEADS * 900);
	check_window(&f, 1, &a, WINDOW);
	finish(&f);
}

static void test_only_nvme(void **state)
{
	struct fixture f;
	struct answer a;

	begin(&f, true, false);
	append(&f, 500);
	assert_int_equal(rt_plan(&f.q, 100, 150, KVT_ROWS_ALL, NULL), 0);
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), WINDOW);
	assert_int_equal(a.r.searched, HEADS * 150);
	assert_int_equal(a.r.skipped, HEADS * 250);
	check_window(&f, 0, &a, WINDOW);
	finish(&f);
}

static void count_sums(struct core *c, void *arg)
{
	struct seq *s = TAILQ_FIRST(&c->lru);
	uint32_t *n = arg;

	*n = 0;
	for (uint32_t l = 0; l < s->ix.lanes; l++)
		for (uint32_t i = 0; i < s->ix.lane[l].n; i++)
			*n += s->ix.lane[l].v[i]->sum != NULL;
}

/* On the loop: room for some pages more in dram. */
static void small_quota(struct core *c, void *arg)
{
	struct seq *s = TAILQ_FIRST(&c->lru);

	s->tenant->limit.dram_bytes = c->pages.used[KVT_TIER_DRAM][s->origin->charge] + 5 * 16384;
}

/* Ask until nothing is skipped, or for a second. */
static void ask_until_up(struct fixture *f, struct answer *a)
{
	for (int i = 0; i < 1000; i++) {
		assert_int_equal(ask_plainly(f, 0, WINDOW, a), WINDOW);
		check_window(f, 0, a, WINDOW);
		if (!a->r.skipped)
			return;
		usleep(1000);
	}
}

/* What was announced comes up from nvme, checked, and is let go without a write. */
static void test_prepare_brings_nvme_up(void **state)
{
	struct core_stat before, up, after;
	struct fixture f;
	uint32_t sums;
	struct answer a;

	begin(&f, true, false);
	append(&f, 900);
	assert_int_equal(rt_plan(&f.q, 100, 150, KVT_ROWS_ALL, NULL), 0);
	for (int i = 0; i < 1000; i++) { /* it moves down in the background */
		assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), WINDOW);
		if (a.r.skipped == HEADS * 650)
			break;
		usleep(1000);
	}
	assert_int_equal(a.r.skipped, HEADS * 650);
	before = harness_stat(&f.h);
	assert_int_equal(kvtier_seq_recall_prepare(f.q.s), 0);
	ask_until_up(&f, &a);
	assert_int_equal(a.r.skipped + a.r.missed, 0);
	assert_int_equal(a.r.searched, HEADS * 800);
	for (int i = 0; i < 1000; i++) { /* the other layer's */
		assert_int_equal(ask_plainly(&f, 1, WINDOW, &a), WINDOW);
		if (!a.r.skipped)
			break;
		usleep(1000);
	}
	check_window(&f, 1, &a, WINDOW);
	assert_int_equal(a.r.searched, HEADS * 800);
	harness_call(&f.h, count_sums, &sums);
	assert_true(sums >= LAYERS * HEADS * 7); /* with their summaries */
	up = harness_stat(&f.h);
	assert_int_equal(up.rows_promoted[KVT_TIER_DRAM] - before.rows_promoted[KVT_TIER_DRAM],
			 LAYERS * HEADS * 650);
	/* a plan's budget holds again, and what goes down is there already */
	assert_int_equal(rt_plan(&f.q, 100, 150, KVT_ROWS_ALL, NULL), 0);
	for (int i = 0; i < 1000; i++) {
		assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), WINDOW);
		check_window(&f, 0, &a, WINDOW);
		if (a.r.skipped == HEADS * 650)
			break;
		usleep(1000);
	}
	assert_int_equal(a.r.skipped, HEADS * 650);
	assert_int_equal(a.r.searched, HEADS * 150);
	after = harness_stat(&f.h);
	assert_int_equal(after.rows_demoted[KVT_TIER_NVME], before.rows_demoted[KVT_TIER_NVME]);
	assert_int_equal(after.miss_corrupt + after.miss_nospace, before.miss_corrupt + before.miss_nospace);
	finish(&f);
}

/* Only so many as the quota has room for; the rest stays where it is, and nothing is lost or counted as a miss.
 */
static void test_prepare_keeps_the_quota(void **state)
{
	struct core_stat before, after;
	struct fixture f;
	struct answer a;

	begin(&f, true, false);
	append(&f, 900);
	assert_int_equal(rt_plan(&f.q, 100, 0, KVT_ROWS_ALL, NULL), 0);
	before = harness_stat(&f.h);
	harness_call(&f.h, small_quota, NULL);
	assert_int_equal(kvtier_seq_recall_prepare(f.q.s), 0);
	for (int i = 0; i < 100; i++) {
		assert_true(ask_plainly(&f, 0, WINDOW, &a) >= 0);
		check_window(&f, 0, &a, WINDOW);
		assert_int_equal(a.r.searched + a.r.skipped, HEADS * 800);
		usleep(1000);
	}
	assert_true(a.r.searched > 0 && a.r.skipped > 0);
	after = harness_stat(&f.h);
	assert_int_equal(after.miss_corrupt + after.miss_nospace, before.miss_corrupt + before.miss_nospace);
	finish(&f);
}

static void test_truncate(void **state)
{
	struct fixture f;
	struct answer a;

	begin(&f, false, false);
	append(&f, 600);
	assert_int_equal(rt_plan(&f.q, 50, MAX_ROWS, 0, NULL), 0);
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), WINDOW);
	assert_int_equal(kvtier_seq_truncate(f.q.s, 100), 0);
	f.q.rows = 100;
	assert_true(ask_plainly(&f, 0, WINDOW, &a) > 0);
	assert_true(a.r.searched <= HEADS * 100 && a.r.searched >= HEADS * 50);
	check_window(&f, 0, &a, WINDOW);
	append(&f, 100); /* pages of the first epoch still list positions 100 to 199 */
	assert_true(ask_plainly(&f, 0, WINDOW, &a) > 0);
	for (uint32_t h = 0; h < HEADS; h++)
		for (uint32_t i = 0; i < a.counts[h]; i++)
			assert_true(a.positions[h * WINDOW + i] < 100);
	finish(&f);
}

/* A child recalls what it inherited. */
static void test_fork(void **state)
{
	struct fixture f;
	struct kvtier_seq_opts o;
	struct rt_seq child;
	struct answer a;

	begin(&f, false, false);
	append(&f, 600);
	assert_int_equal(rt_plan(&f.q, 50, MAX_ROWS, 0, NULL), 0);
	prepare_seq(&f, &child, 2);
	o = rt_opts(&child, KVT_EPHEMERAL, &keep_all);
	assert_int_equal(kvtier_seq_fork(f.q.s, 300, &o, &child.s), 0);
	child.rows = 300;
	{
		struct rt_seq mother = f.q;

		f.q = child;
		assert_int_equal(ask_plainly(&f, 1, WINDOW, &a), WINDOW);
		assert_true(a.r.searched < HEADS * 300);
		check_window(&f, 1, &a, WINDOW);
		child = f.q;
		f.q = mother;
	}
	assert_int_equal(ask_plainly(&f, 1, WINDOW, &a), WINDOW);
	check_window(&f, 1, &a, WINDOW);
	rt_seq_free(&child, true);
	finish(&f);
}

/* Saved at its client's end, resumed by the next: everything is below. */
static void test_resume(void **state)
{
	struct fixture f;
	struct kvtier_seq_opts o;
	struct answer a;
	uint32_t rows = 0;
	int r;

	begin(&f, false, false);
	rt_seq_free(&f.q, true);
	prepare_seq(&f, &f.q, 3);
	assert_int_equal(rt_seq_open(&f.q, KVT_LEASED, &keep_all), 0);
	append(&f, 200);
	rt_seq_free(&f.q, false);
	prepare_seq(&f, &f.q, 3);
	o = rt_opts(&f.q, KVT_LEASED, &keep_all);
	r = kvtier_seq_resume(f.rt.c, f.rt.m, &o, &f.q.s, &rows);
	assert_int_equal(r, 0);
	assert_int_equal(rows, 200);
	f.q.rows = rows;
	assert_int_equal(ask_plainly(&f, 1, WINDOW, &a), WINDOW);
	assert_int_equal(a.r.searched, HEADS * 200);
	check_window(&f, 1, &a, WINDOW);
	finish(&f);
}

/* ---- pages go bad ------------------------------------------------------------------------------------- */

struct spoil {
	uint32_t lane, pages;
	bool sums; /* has any page a summary? */
};

/* On the loop: flip one bit of the first page of a lane. */
static void spoil_page(struct core *c, void *arg)
{
	struct spoil *x = arg;
	struct seq *s = TAILQ_FIRST(&c->lru);
	struct lane_pages *lp = &s->ix.lane[x->lane];
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];
	struct tier_io io = {.op = TIER_READ, .bytes = lp->v[0]->bytes, .addr = lp->v[0]->addr[0]};

	assert_int_equal(t->ops->prepare(t, &io), 0);
	((char *)io.buf)[lp->v[0]->bytes - 1] ^= 1;
	t->ops->release(t, &io);
	x->pages = lp->n;
}

static void test_bad_page(void **state)
{
	struct spoil x = {.lane = 1};
	struct core_stat before, after;
	struct fixture f;
	struct answer a;

	begin(&f, false, false);
	append(&f, 900);
	assert_int_equal(rt_plan(&f.q, 100, MAX_ROWS, 0, NULL), 0);
	before = harness_stat(&f.h);
	harness_call(&f.h, spoil_page, &x);
	assert_true(x.pages > 1);
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), WINDOW);
	check_window(&f, 0, &a, WINDOW); /* none of the bad page, or a byte would be wrong */
	after = harness_stat(&f.h);
	assert_int_equal(after.miss_corrupt, before.miss_corrupt + 1);
	assert_true(a.r.searched < HEADS * 800);
	finish(&f);
}

/* Summaries are made ahead, charged to the index, and end with their pages. */
static void test_prepare(void **state)
{
	struct core_stat none, before, after;
	struct fixture f;
	uint32_t sums = 0;
	struct answer a;

	begin(&f, false, false);
	none = harness_stat(&f.h);
	append(&f, 900);
	assert_int_equal(rt_plan(&f.q, 100, MAX_ROWS, 0, NULL), 0);
	harness_call(&f.h, count_sums, &sums);
	assert_int_equal(sums, 0); /* nobody asked */
	before = harness_stat(&f.h);
	assert_int_equal(kvtier_seq_recall_prepare(f.q.s), 0);
	for (int i = 0; i < 1000 && sums < LAYERS * HEADS * 7; i++) {
		harness_call(&f.h, count_sums, &sums);
		usleep(1000);
	}
	assert_int_equal(sums, LAYERS * HEADS * 7); /* 800 rows in pages of 128 */
	after = harness_stat(&f.h);
	assert_true(after.index_bytes >= before.index_bytes + sums * recall_sum_bytes(96, DIM));
	/* pages that come now have theirs at once */
	append(&f, 300);
	assert_int_equal(rt_plan(&f.q, 100, MAX_ROWS, 0, NULL), 0);
	harness_call(&f.h, count_sums, &sums);
	assert_true(sums >= LAYERS * HEADS * 9);
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), WINDOW);
	check_window(&f, 0, &a, WINDOW);
	rt_seq_free(&f.q, true);
	after = harness_stat(&f.h);
	assert_true(after.index_bytes <= none.index_bytes);
	finish(&f);
}

/* ---- clients that lie or leave ------------------------------------------------------------------------- */

/* A raw request on the library's own connection, which is idle; the reply's status. */
static int raw(struct fixture *f, const struct wire_recall *m, size_t len)
{
	int sock = f->q.s->link->sock, fds[WIRE_MAX_FDS];
	static _Alignas(8) char buf[WIRE_MAX];
	unsigned n;
	ssize_t r;

	assert_int_equal(sock_send(sock, m, len, NULL, 0), 0);
	assert_true(sock_wait(sock, POLLIN, now_ns() + UINT64_C(5000000000)) > 0);
	r = sock_recv(sock, buf, sizeof(buf), fds, &n);
	return r <= 0 ? 1 : ((struct wire_reply *)buf)->status;
}

static size_t good_message(struct fixture *f, struct wire_recall *m)
{
	size_t len = wire_recall_len(HEADS * GROUP, DIM, 4);
	struct kvtier_recall_opts o = opts_of(f, 0, 8);

	memset(m, 0, len);
	wire_init(&m->hdr, W_RECALL, len, 77);
	m->seq = f->q.s->handle;
	m->epoch = atomic_load(&f->q.s->epoch);
	m->rows = 8;
	m->heads = HEADS;
	m->per_head = GROUP;
	m->dim = DIM;
	m->dtype = KVT_DTYPE_F32;
	m->window = (struct wire_layout){.k_off = o.k_off,
					 .v_off = o.v_off,
					 .k_head_stride = o.k_head_stride,
					 .v_head_stride = o.v_head_stride,
					 .k_row_stride = o.k_row_stride,
					 .v_row_stride = o.v_row_stride,
					 .cap = WINDOW};
	return len;
}

static void test_hostile_messages(void **state)
{
	static union {
		struct wire_recall m;
		char room[WIRE_MAX];
	} u;
	struct fixture f;
	struct answer a;
	float bad[2] = {NAN, INFINITY};
	size_t len;

	begin(&f, false, false);
	append(&f, 400);
	assert_int_equal(rt_plan(&f.q, 100, MAX_ROWS, 0, NULL), 0);
	len = good_message(&f, &u.m);
	assert_int_equal(raw(&f, &u.m, len), 0);
#define REFUSED(status, change)                                                                                \
	do {                                                                                                   \
		good_message(&f, &u.m);                                                                        \
		u.m.change;                                                                                    \
		assert_int_equal(raw(&f, &u.m, u.m.hdr.len), status);                                          \
	} while (0)
	REFUSED(KVT_E_INVAL, layer = LAYERS);
	REFUSED(KVT_E_INVAL, layer = UINT32_MAX);
	REFUSED(KVT_E_STALE, epoch++);
	REFUSED(KVT_E_STALE, seq ^= UINT64_C(1) << 40);
	REFUSED(KVT_E_INVAL, seq = 0);
	REFUSED(KVT_E_INVAL, rows = 0);
	REFUSED(KVT_E_INVAL, rows = WINDOW + 1);
	REFUSED(KVT_E_INVAL, probe = 1001);
	REFUSED(KVT_E_INVAL, flags = 8);
	REFUSED(KVT_E_INVAL, scale = NAN);
	REFUSED(KVT_E_INVAL, scale = -1);
	REFUSED(KVT_E_INVAL, before = WIRE_MAX_NEAR + 1);
	REFUSED(KVT_E_INVAL, after = UINT16_MAX);
	REFUSED(KVT_E_INVAL, op = 3);
	REFUSED(KVT_E_INVAL, dtype = KVT_DTYPE_OPAQUE);
	REFUSED(KVT_E_INVAL, window.k_off = UINT64_MAX - 64);
	REFUSED(KVT_E_INVAL, window.v_off = kvtier_region_bytes(f.q.r) - 16);
	REFUSED(KVT_E_INVAL, window.k_row_stride = 1);
	REFUSED(KVT_E_INVAL, window.v_head_stride = UINT64_C(1) << 60);
	REFUSED(KVT_E_INVAL, window.cap = WIRE_MAX_ROWS + 1);
	/* a layer of another shape, in a message that is whole in itself */
	len = good_message(&f, &u.m);
	u.m.heads = HEADS * GROUP;
	u.m.per_head = 1;
	assert_int_equal(raw(&f, &u.m, len), KVT_E_INVAL);
	u.m.heads = HEADS;
	u.m.per_head = GROUP * 2;
	u.m.dim = DIM / 2;
	assert_int_equal(raw(&f, &u.m, len), KVT_E_INVAL);
	for (int i = 0; i < 2; i++) {
		len = good_message(&f, &u.m);
		memcpy((char *)wire_recall_queries(&u.m) + 4 * i, &bad[i], 4);
		assert_int_equal(raw(&f, &u.m, len), KVT_E_INVAL);
	}
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), WINDOW); /* nobody was harmed */
	check_window(&f, 0, &a, WINDOW);
	len = good_message(&f, &u.m);
	u.m.per_head = 400; /* more than the message holds: this ends the connection */
	assert_int_equal(raw(&f, &u.m, len), KVT_E_PROTO);
	assert_true(sock_wait(f.q.s->link->sock, POLLIN, now_ns() + UINT64_C(5000000000)) > 0);
	assert_int_equal(recv(f.q.s->link->sock, u.room, 1, MSG_PEEK), 0);
	finish(&f);
}

static void test_bad_arguments(void **state)
{
	float q[HEADS * GROUP * DIM] = {1};
	struct kvtier_recall_opts o;
	struct kvtier_recalled r = {.size = sizeof(r)};
	struct fixture f;
	struct answer a;

	begin(&f, false, false);
	append(&f, 300);
	assert_int_equal(rt_plan(&f.q, 100, MAX_ROWS, 0, NULL), 0);
#define WRONG(code, change)                                                                                    \
	do {                                                                                                   \
		o = opts_of(&f, 0, 8);                                                                         \
		o.change;                                                                                      \
		assert_int_equal(ask(&f, 0, q, 1, &o, &a), code);                                              \
	} while (0)
	WRONG(KVT_E_INVAL, rows = 0);
	WRONG(KVT_E_INVAL, rows = WINDOW + 1);
	WRONG(KVT_E_INVAL, dtype = 0);
	WRONG(KVT_E_INVAL, dtype = 9);
	WRONG(KVT_E_INVAL, group = 1000);
	WRONG(KVT_E_INVAL, size = 4);
	WRONG(KVT_E_INVAL, flags = 16);
	WRONG(KVT_E_INVAL, before = 1025);
	WRONG(KVT_E_INVAL, after = UINT32_MAX);
	WRONG(KVT_E_INVAL, after = (o.flags = KVT_RECALL_ALONE));
	WRONG(KVT_E_INVAL, k_off = kvtier_region_bytes(f.q.r));
	WRONG(KVT_E_INVAL, v_row_stride = 2);
	o = opts_of(&f, 0, 8);
	assert_int_equal(ask(&f, LAYERS, q, 1, &o, &a), KVT_E_INVAL);
	assert_int_equal(ask(&f, 0, NULL, 1, &o, &a), KVT_E_INVAL);
	assert_int_equal(ask(&f, 0, q, 0, &o, &a), KVT_E_INVAL);
	q[5] = NAN;
	assert_int_equal(ask(&f, 0, q, 1, &o, &a), KVT_E_INVAL);
	q[5] = 0;
	assert_int_equal(kvtier_seq_recall(NULL, 0, q, 1, &o, &r), KVT_E_INVAL);
	assert_int_equal(kvtier_seq_recall(f.q.s, 0, q, 1, NULL, &r), KVT_E_INVAL);
	assert_int_equal(kvtier_seq_recall(f.q.s, 0, q, 1, &o, NULL), KVT_E_INVAL);
	assert_int_equal(kvtier_seq_recall(f.q.s, 0, q, 1, &o, &r), 8); /* without arrays */
	assert_int_equal(kvtier_seq_recall_prepare(NULL), KVT_E_INVAL);
	assert_int_equal(kvtier_seq_recall_end(NULL), KVT_E_INVAL);
	finish(&f);
}

/* Searches are on their way when their client goes: nothing is left of it, and nobody crashes. */
static void test_client_leaves(void **state)
{
	static union {
		struct wire_recall m;
		char room[WIRE_MAX];
	} u;

	for (int how = 0; how < 6; how++) {
		struct fixture f;
		struct core_stat st;
		size_t len;

		begin(&f, false, false);
		append(&f, 1000);
		assert_int_equal(rt_plan(&f.q, 50, MAX_ROWS, 0, NULL), 0);
		len = good_message(&f, &u.m);
		if (how % 2) { /* long enough for the workers */
			u.m.per_head = 256;
			u.m.dtype = KVT_DTYPE_F16;
			u.m.probe = 1000;
			len = wire_recall_len(HEADS * 256, DIM, 2);
			u.m.hdr.len = (uint32_t)len;
		}
		for (int i = 0; i < 1 + how; i++) { /* the second one waits for the first */
			u.m.hdr.cookie = 1000u + (uint32_t)i;
			assert_int_equal(sock_send(f.q.s->link->sock, &u.m, len, NULL, 0), 0);
		}
		if (how >= 4) { /* closed, and the answer to that waits for the search */
			rt_seq_free(&f.q, true);
		} else {
			shutdown(f.q.s->link->sock, SHUT_RDWR);
			rt_seq_free(&f.q, true);
			rt_close(&f.rt);
			f.rt.c = NULL;
		}
		for (int i = 0; i < 200; i++) {
			st = harness_stat(&f.h);
			if (!st.seqs && !st.tier[KVT_TIER_DRAM].used)
				break;
			usleep(10000);
		}
		assert_int_equal(st.seqs, 0);
		assert_int_equal(st.tier[KVT_TIER_DRAM].used, 0);
		finish(&f);
	}
}

static void test_daemon_gone(void **state)
{
	struct fixture f;
	struct answer a;
	uint64_t start;

	begin(&f, false, false);
	append(&f, 300);
	assert_int_equal(rt_plan(&f.q, 50, MAX_ROWS, 0, NULL), 0);
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), WINDOW);
	harness_stop(&f.h);
	start = now_ns();
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), KVT_E_DAEMON);
	assert_int_equal(ask_plainly(&f, 0, WINDOW, &a), KVT_E_DAEMON);
	assert_int_equal(kvtier_seq_recall_end(f.q.s), KVT_E_DAEMON);
	assert_true(now_ns() - start < UINT64_C(2000000000));
	rt_seq_free(&f.q, true);
	rt_close(&f.rt);
	harness_rm(f.h.dir);
}

/* A runtime's own file as the region: written by descriptor, by its tenant's thread. */
static void test_imported_region(void **state)
{
	struct fixture f;
	struct rt_seq made;
	struct answer a;
	int fd;

	begin(&f, false, true);
	made = f.q;
	prepare_seq(&f, &f.q, 4);
	fd = memfd_create("pool", MFD_CLOEXEC);
	assert_int_equal(ftruncate(fd, (off_t)kvtier_region_bytes(f.q.r)), 0);
	kvtier_region_close(f.q.r);
	assert_int_equal(kvtier_region_import(f.rt.c, fd, lseek(fd, 0, SEEK_END), &f.q.r), 0);
	assert_int_equal(rt_seq_open(&f.q, KVT_EPHEMERAL, &keep_all), 0);
	append(&f, 500);
	assert_int_equal(rt_plan(&f.q, 100, MAX_ROWS, 0, NULL), 0);
	for (uint32_t layer = 0; layer < LAYERS; layer++) {
		assert_int_equal(ask_plainly(&f, layer, WINDOW, &a), WINDOW);
		check_window(&f, layer, &a, WINDOW);
	}
	close(fd);
	rt_seq_free(&f.q, true);
	f.q = made;
	finish(&f);
}

/* The last point, then each farthest from those already there. */
static void test_pick(void **state)
{
	float x[] = {0, 0, 10, 0, 0, 1, 7, 7, 0.5f, 0}, near[5];
	float same[6] = {1, 1, 1, 1, 1, 1}, bad[] = {1, 1, NAN, NAN, 2, 2};
	uint32_t pick[4];

	assert_int_equal(pick_farthest(x, 2, 2, 5, 4, near, pick), 4);
	assert_int_equal(pick[0], 4);
	assert_int_equal(pick[1], 3); /* sqrt(91) from the last; point 1 is 9.5 away */
	assert_int_equal(pick[2], 1);
	assert_int_equal(pick[3], 2);
	assert_int_equal(pick_farthest(x, 2, 2, 1, 4, near, pick), 1);
	assert_int_equal(pick[0], 0);
	assert_int_equal(pick_farthest(same, 2, 2, 3, 4, near, pick), 3);
	assert_int_equal(pick[0] + pick[1] + pick[2], 3);
	assert_int_equal(pick_farthest(bad, 2, 2, 3, 4, near, pick), 3);
	assert_int_equal(pick[0] + pick[1] + pick[2], 3);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_finds_the_right_rows),
		cmocka_unit_test(test_neighbours_come_along),
		cmocka_unit_test(test_long_searches),
		cmocka_unit_test(test_all_and_nothing),
		cmocka_unit_test(test_beside_plans),
		cmocka_unit_test(test_only_nvme),
		cmocka_unit_test(test_prepare_brings_nvme_up),
		cmocka_unit_test(test_prepare_keeps_the_quota),
		cmocka_unit_test(test_truncate),
		cmocka_unit_test(test_fork),
		cmocka_unit_test(test_resume),
		cmocka_unit_test(test_bad_page),
		cmocka_unit_test(test_prepare),
		cmocka_unit_test(test_hostile_messages),
		cmocka_unit_test(test_bad_arguments),
		cmocka_unit_test(test_client_leaves),
		cmocka_unit_test(test_daemon_gone),
		cmocka_unit_test(test_imported_region),
		cmocka_unit_test(test_pick),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
