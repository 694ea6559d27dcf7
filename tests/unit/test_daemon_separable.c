/* SPDX-License-Identifier: MIT */
/*
 * Scores that follow the distance to the end, through the whole daemon: every
 * row is scored once, and at every length of the sequence the rows that stay are
 * the ones that the formula ranks first, wherever they were until then.
 */
#include "growing_fixture.h"

#include "daemon/index.h"
#include "policy/decide.h"

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
	open_seq(&f, &q, 3);
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
	open_seq(&f, &q, 3);
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

	open_seq(&f, &q, 4);
	append(&q, 600);
	plan(&q, "kvp", NULL);
	assert_int_equal(rt_prepare(&kid, &f.rt, 5, MOST, MOST, MOST), 0);
	{
		struct kvtier_seq_opts o = rt_opts(&kid, KVT_EPHEMERAL, &everything);

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

/* Damage to a file, or a file that is not for this model; what the daemon's refusal has to name. */
enum damage { CUT, FLIPPED, OTHER_MODEL, NOT_FINITE, CONTRADICTION, DAMAGES };

static void write_damaged(const char *path, enum damage d)
{
	static const char *const says[DAMAGES] = {"total_size", "digest", "name: grown", "dist[3]: not finite",
						  "octave: 0"};
	struct weights_header h = shape(WEIGHTS_KVP, 2);
	_cleanup_free_ uint8_t *image = make_image(h, 0, 21);
	struct weights_header *in = (struct weights_header *)image;
	struct policy_cfg cfg = {.layers = LAYERS,
				 .heads = HEADS,
				 .k_dim = DIM,
				 .v_dim = DIM,
				 .dtype = ROW_F32,
				 .weights = path,
				 .model = "growing"};
	struct policy *p = NULL;
	char err[512] = "";

	if (d == OTHER_MODEL)
		memcpy(in->name, "grown\0\0", 8);
	if (d == NOT_FINITE)
		((uint16_t *)weights_image_at(image, 1, KVP_DIST))[3] = 0x7fc0;
	if (d == CONTRADICTION)
		in->octave = 0;
	weights_image_seal(image, image_size(image));
	if (d == FLIPPED)
		image[image_size(image) - 200] ^= 4;
	assert_int_equal(weights_image_write(image, path), 0);
	if (d == CUT)
		assert_int_equal(truncate(path, (off_t)image_size(image) - 64), 0);
	assert_true(policy_kvp_ops.init(&p, &cfg, err, sizeof(err)) < 0);
	if (!strstr(err, path) || !strstr(err, says[d]))
		fail_msg("'%s' does not name the file and '%s'", err, says[d]);
}

static void damaged_files_are_refused_and_the_fallback_runs(void **state)
{
	for (int d = 0; d < DAMAGES; d++) {
		struct fixture f;
		struct rt_seq q;

		prepare(&f);
		write_damaged(f.file, (enum damage)d);
		start(&f);
		open_seq(&f, &q, 3);
		append(&q, 300);
		plan(&q, "kvp", NULL);
		assert_string_equal(rt_info(&q).policy, "streaming");
		assert_int_equal(rt_resident(&q, 0, NULL), BUDGET);
		rt_seq_free(&q, false);
		finish(&f);
	}
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
	/* Grown by and by: at any length, less than a sixteenth and a grain more than the rows need. */
	assert_int_equal(index_init(&ix, 90), 0);
	for (uint32_t rows = 64; rows <= 4160; rows += 64) {
		assert_int_equal(index_extend(&ix, rows), 0);
		assert_int_equal(index_keep_coef(&ix, true), 0);
		assert_true(rows < 1024 || ix.bytes * 50 <= 90ull * rows * 256);
		assert_true(ix.cap <= rows + rows / 16 + INDEX_GRAIN);
	}
	print_message("# grown to 4160 rows, 64 at a time: %.2f %% of K and V\n",
		      100.0 * (double)ix.bytes / (90.0 * 4160 * 256));
	index_free(&ix, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(growing_sequences_keep_what_the_formula_ranks_first),
		cmocka_unit_test(forks_and_changes_of_policy_keep_rows_ranked),
		cmocka_unit_test(new_weights_rank_the_rows_that_are_there),
		cmocka_unit_test(damaged_files_are_refused_and_the_fallback_runs),
		cmocka_unit_test(coefficients_fit_the_index),
	};

	return cmocka_run_group_tests_name("daemon/separable", tests, NULL, NULL);
}
