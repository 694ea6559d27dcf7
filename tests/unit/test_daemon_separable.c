/* SPDX-License-Identifier: MIT */
/*
 * Scores that follow the distance to the end, through the whole daemon: every
 * row is scored once, and at every length of the sequence the rows that stay are
 * the ones that the formula ranks first, wherever they were until then.
 */
#include "kvp_double.h"

#include "core_harness.h"
#include "daemon/index.h"
#include "policy/decide.h"

#define LAYERS 2u
#define HEADS 2u
#define LANES (LAYERS * HEADS)
#define DIM 16u
#define BUDGET 120u
#define FIRST 4u
#define LAST 16u
#define MOST 2000u

struct fixture {
	struct harness h;
	struct runtime rt;
	struct policy *p; /* the daemon's, on the same file */
	char file[sizeof(((struct config *)0)->model_dir) + 64];
};

static struct weights_header shape(uint32_t kind, uint32_t rank)
{
	struct weights_header h = kind == WEIGHTS_KVP ? shape_narrow_trained() : shape_position();

	memset(h.name, 0, sizeof(h.name));
	strcpy(h.name, "growing");
	h.layers = LAYERS;
	h.heads = HEADS;
	h.k_dim = h.v_dim = DIM;
	if (kind == WEIGHTS_KVP) {
		h.rank = rank;
		h.rope_type = WEIGHTS_ROPE_HALF;
	}
	return h;
}

static void write_file(const char *path, struct weights_header h, uint64_t seed)
{
	_cleanup_free_ uint8_t *image = make_image(h, 0, seed);

	assert_int_equal(weights_image_write(image, path), 0);
}

static void load_policy(struct fixture *f, struct weights_header h)
{
	struct policy_cfg cfg = {.layers = LAYERS,
				 .heads = HEADS,
				 .k_dim = DIM,
				 .v_dim = DIM,
				 .dtype = ROW_F32,
				 .weights = f->file,
				 .model = "growing"};
	char err[256] = "";

	if (policy_for_kind(h.kind)->init(&f->p, &cfg, err, sizeof(err)) < 0)
		fail_msg("%s", err);
}

static void begin(struct fixture *f, struct weights_header h)
{
	struct kvtier_layer_desc d[LAYERS];
	struct kvtier_open_opts o = {.size = sizeof(o), .name = "test", .timeout_ms = 10000};
	struct kvtier_model_desc md = {.size = sizeof(md),
				       .name = "growing",
				       .layers = d,
				       .n_layers = LAYERS,
				       .dtype = KVT_DTYPE_F32,
				       .head_dim = DIM,
				       .rope = KVT_ROPE_HALF,
				       .post_rope = 1,
				       .rope_theta = 10000,
				       .world = 1};

	harness_init(&f->h, false);
	snprintf(f->h.cfg.model_dir, sizeof(f->h.cfg.model_dir), "%s", f->h.dir);
	snprintf(f->file, sizeof(f->file), "%s/growing.kvp", f->h.cfg.model_dir);
	write_file(f->file, h, 21);
	load_policy(f, h);
	assert_true(harness_start(&f->h));
	for (uint32_t i = 0; i < LAYERS; i++)
		d[i] = (struct kvtier_layer_desc){.kv_heads = HEADS, .k_bytes = DIM * 4, .v_bytes = DIM * 4};
	memset(&f->rt, 0, sizeof(f->rt));
	f->rt.layers = LAYERS;
	f->rt.lanes = LANES;
	f->rt.heads = HEADS;
	f->rt.k_bytes = f->rt.v_bytes = DIM * 4;
	o.socket = f->h.sock[0];
	assert_int_equal(kvtier_open(&o, &f->rt.c), 0);
	assert_int_equal(kvtier_model_register(f->rt.c, &md, &f->rt.m), 0);
}

static void finish(struct fixture *f)
{
	f->p->ops->free(f->p);
	rt_close(&f->rt);
	harness_stop(&f->h);
	harness_rm(f->h.dir);
}

/* The row of a lane and position: the same numbers for whoever asks. */
static void row(uint32_t lane, uint32_t pos, float k[DIM], float v[DIM])
{
	uint32_t x = lane * 7919 + pos * 104729 + 1;

	for (uint32_t i = 0; i < 2 * DIM; i++) {
		x = x * 1664525 + 1013904223;
		(i < DIM ? k : v - DIM)[i] = ((float)(x >> 8) / (1 << 23) - 1.0f) * (i < DIM ? 3 : 1);
	}
}

static void append(struct rt_seq *q, uint32_t n)
{
	for (uint32_t l = 0; l < LANES; l++) {
		int have = kvtier_seq_resident(q->s, l, NULL, 0);

		assert_true(have >= 0 && have + n <= q->cap);
		for (uint32_t i = 0; i < n; i++)
			row(l, q->rows + i, (float *)rt_row(q, l, (uint32_t)have + i, false),
			    (float *)rt_row(q, l, (uint32_t)have + i, true));
	}
	q->rows += n;
	assert_int_equal(kvtier_seq_append(q->s, KVT_ALL_LAYERS, q->rows - n, n), 0);
}

static void plan(struct rt_seq *q, const char *policy, struct kvtier_plan *ret)
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .device_rows = BUDGET,
				  .dram_rows = KVT_ROWS_ALL,
				  .manual = 1,
				  .policy = policy};
	uint64_t id;

	assert_int_equal(kvtier_plan_request(q->s, &b, &id), 0);
	assert_int_equal(rt_follow(q, id, ret), 0);
}

/* What the daemon keeps of each row, as it keeps it. */
static void kept_coefs(const struct fixture *f, uint32_t lane, uint32_t n, float f0[], float f1[])
{
	static float k[MOST][DIM], v[MOST][DIM];
	struct policy_batch b = {
		.lane = lane, .n = n, .k = k, .v = v, .k_stride = sizeof(k[0]), .v_stride = sizeof(v[0])};
	uint16_t keys[MOST];

	for (uint32_t i = 0; i < n; i++)
		row(lane, i, k[i], v[i]);
	assert_int_equal(f->p->ops->coefs(f->p, &b, (float *const[]){f0, f1}), 0);
	score_keys(f0, keys, n);
	key_scores(keys, f0, n);
	score_keys(f1, keys, n);
	key_scores(keys, f1, n);
}

/* Resident rows are the protected ones and the best of the rest, as scores are at this length. */
static void assert_best_rows(const struct fixture *f, struct rt_seq *q)
{
	static float f0[MOST], f1[MOST];
	uint32_t n = q->rows, pos[MOST];

	for (uint32_t l = 0; l < LANES; l++) {
		struct policy_batch b = {.lane = l, .n = n, .total = n};
		bool resident[MOST] = {0};
		uint16_t keys[MOST], worst = UINT16_MAX, best = 0;
		int have = rt_resident(q, l, pos);

		assert_int_equal(have, BUDGET);
		memset(f1, 0, sizeof(f1));
		kept_coefs(f, l, n, f0, f1);
		assert_int_equal(f->p->ops->combine(f->p, &b, (const float *const[]){f0, f1}, f0), 0);
		score_keys(f0, keys, n);
		for (int i = 0; i < have; i++) {
			float k[DIM], v[DIM];

			resident[pos[i]] = true;
			row(l, pos[i], k, v);
			assert_memory_equal(rt_row(q, l, (uint32_t)i, false), k, sizeof(k));
			assert_memory_equal(rt_row(q, l, (uint32_t)i, true), v, sizeof(v));
		}
		for (uint32_t i = 0; i < n; i++) {
			if (i < FIRST || i >= n - LAST)
				assert_true(resident[i]);
			else if (resident[i])
				worst = MIN(worst, keys[i]);
			else
				best = MAX(best, keys[i]);
		}
		assert_true(best <= worst);
	}
}

static void grow_and_check(struct weights_header h, const char *policy)
{
	static const uint32_t steps[] = {300, 1, 200, 500, 900};
	struct fixture f;
	struct kvtier_plan p;
	struct rt_seq q;
	uint64_t back = 0;

	begin(&f, h);
	assert_int_equal(rt_prepare(&q, &f.rt, 3, MOST, MOST, MOST), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL,
				     &(struct kvtier_budget){.size = sizeof(struct kvtier_budget),
							     .device_rows = KVT_ROWS_ALL,
							     .manual = 1}),
			 0);
	for (size_t i = 0; i < ARRAY_SIZE(steps); i++) {
		append(&q, steps[i]);
		plan(&q, policy, &p);
		back += p.rows_in;
		assert_string_equal(rt_info(&q).policy, policy);
		assert_best_rows(&f, &q);
	}
	print_message("# %s, %u coefficients: %llu rows came back\n", policy, h.rank, (unsigned long long)back);
	assert_true(back > 0); /* rows below were ranked on equal terms, and some rose */
	rt_seq_free(&q, false);
	finish(&f);
}

static void growing_sequences_keep_what_the_formula_ranks_first(void **state)
{
	grow_and_check(shape(WEIGHTS_KVP, 2), "kvp");
	grow_and_check(shape(WEIGHTS_KVP, 1), "kvp");
	grow_and_check(shape(WEIGHTS_POSITION, 1), "position");
}

/* A forked child and a policy that changes and comes back: rows keep what ranks them. */
static void forks_and_changes_of_policy_keep_rows_ranked(void **state)
{
	struct weights_header h = shape(WEIGHTS_KVP, 2);
	struct fixture f;
	struct rt_seq q, kid;
	uint32_t pos[MOST];
	int have;

	begin(&f, h);
	assert_int_equal(rt_prepare(&q, &f.rt, 3, MOST, MOST, MOST), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL,
				     &(struct kvtier_budget){.size = sizeof(struct kvtier_budget),
							     .device_rows = KVT_ROWS_ALL,
							     .manual = 1}),
			 0);
	append(&q, 700);
	plan(&q, "kvp", NULL);
	assert_best_rows(&f, &q);
	plan(&q, "streaming", NULL);
	assert_string_equal(rt_info(&q).policy, "streaming");
	have = rt_resident(&q, 0, pos);
	assert_int_equal(have, BUDGET);
	append(&q, 100);
	plan(&q, "position", NULL); /* no such file: the fallback, by name */
	assert_string_equal(rt_info(&q).policy, "streaming");
	plan(&q, "kvp", NULL);
	assert_string_equal(rt_info(&q).policy, "kvp");
	for (uint32_t l = 0; l < LANES; l++)
		assert_int_equal(rt_resident(&q, l, pos), BUDGET);
	rt_seq_free(&q, false);

	assert_int_equal(rt_prepare(&q, &f.rt, 4, MOST, MOST, MOST), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL,
				     &(struct kvtier_budget){.size = sizeof(struct kvtier_budget),
							     .device_rows = KVT_ROWS_ALL,
							     .manual = 1}),
			 0);
	append(&q, 600);
	plan(&q, "kvp", NULL);
	assert_int_equal(rt_prepare(&kid, &f.rt, 5, MOST, MOST, MOST), 0);
	{
		struct kvtier_budget b = {.size = sizeof(b), .device_rows = KVT_ROWS_ALL, .manual = 1};
		struct kvtier_seq_opts o = rt_opts(&kid, KVT_EPHEMERAL, &b);

		assert_int_equal(kvtier_seq_fork(q.s, 600, &o, &kid.s), 0);
		kid.rows = 600;
	}
	append(&kid, 900);
	plan(&kid, "kvp", NULL);
	assert_best_rows(&f, &kid);
	rt_seq_free(&kid, false);
	rt_seq_free(&q, false);
	finish(&f);
}

static void load_weights(struct core *c, void *arg)
{
	char err[256];

	assert_int_equal(core_policy_load(c, arg, err, sizeof(err)), 0);
}

/* New weights: rows in the device tier are scored by them at the next plan, not only rows to come. */
static void new_weights_rank_the_rows_that_are_there(void **state)
{
	struct weights_header h = shape(WEIGHTS_KVP, 2);
	struct kvtier_budget all = {.size = sizeof(all),
				    .device_rows = KVT_ROWS_ALL,
				    .dram_rows = KVT_ROWS_ALL,
				    .manual = 1,
				    .policy = "kvp"};
	struct fixture f;
	struct rt_seq q;
	uint64_t id;

	begin(&f, h);
	assert_int_equal(rt_prepare(&q, &f.rt, 3, MOST, MOST, MOST), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL, &all), 0);
	append(&q, 700);
	assert_int_equal(kvtier_plan_request(q.s, &all, &id), 0);
	assert_int_equal(rt_follow(&q, id, NULL), 0); /* all scored, all resident */
	f.p->ops->free(f.p);
	write_file(f.file, h, 99);
	load_policy(&f, h);
	harness_call(&f.h, load_weights, f.file);
	plan(&q, "kvp", NULL);
	assert_best_rows(&f, &q);
	rt_seq_free(&q, false);
	finish(&f);
}

/* The budget of the index is two per cent of the bytes of K and V: here, of rows of 256 bytes. */
static void coefficients_fit_the_index(void **state)
{
	struct index ix;
	uint64_t kv = 90ull * 4096 * 256;

	assert_int_equal(index_init(&ix, 90), 0);
	assert_int_equal(index_extend(&ix, 4096), 0);
	assert_int_equal(index_keep_coef(&ix, true), 0);
	print_message("# index of 90 lanes x 4096 rows: %llu bytes, %.2f %% of K and V\n",
		      (unsigned long long)ix.bytes, 100.0 * (double)ix.bytes / (double)kv);
	assert_true(ix.bytes * 50 <= kv);
	index_free(&ix, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(growing_sequences_keep_what_the_formula_ranks_first),
		cmocka_unit_test(forks_and_changes_of_policy_keep_rows_ranked),
		cmocka_unit_test(new_weights_rank_the_rows_that_are_there),
		cmocka_unit_test(coefficients_fit_the_index),
	};

	return cmocka_run_group_tests_name("daemon/separable", tests, NULL, NULL);
}
