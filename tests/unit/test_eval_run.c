/* SPDX-License-Identifier: MIT */
/* Whole evaluations of made-up traces: what must come out, whatever the threads, and what is refused by name.
 */
#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "policy/eval/report.h"
#include "policy/eval/run.h"
#include "policy/eval/select.h"
#include "policy/weights.h"
#include "tests/unit/eval_fixture.h"

static char dir[64], err[512];

static void remove_tree(const char *path)
{
	char inner[512];
	struct dirent *e;
	DIR *d = opendir(path);

	while (d && (e = readdir(d))) {
		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
			continue;
		snprintf(inner, sizeof(inner), "%s/%s", path, e->d_name);
		if (unlink(inner) < 0)
			remove_tree(inner);
	}
	if (d)
		closedir(d);
	rmdir(path);
}

static int setup(void **state)
{
	strcpy(dir, "/tmp/kvtier-eval.XXXXXX");
	return mkdtemp(dir) && fx_write_dir(dir, 4, 4, 500) == 0 ? 0 : -1;
}

static int teardown(void **state)
{
	remove_tree(dir);
	return 0;
}

/* ---- a run in the process ---------------------------------------------------------------- */

struct whole {
	struct eval_set set;
	struct rivals rivals;
	struct eval_table table;
	float *gram;
};

static uint32_t all_lanes[FX_LANES] = {0, 1, 2, 3};
static bool all_on[FX_LANES] = {true, true, true, true};

static void whole_run(struct whole *w, enum trace_split split, uint32_t threads)
{
	char path[128];
	struct eval_job j = {.set = &w->set,
			     .rivals = &w->rivals,
			     .lane_on = all_on,
			     .lane_at = all_lanes,
			     .error_queries = 8,
			     .threads = threads,
			     .quiet = true,
			     .table = &w->table};

	snprintf(path, sizeof(path), "%s/model.kvtr", dir);
	assert_int_equal(eval_set_open(&w->set, dir, split, 0, NULL, err, sizeof(err)), 0);
	assert_int_equal(rivals_open(&w->rivals, NULL, NULL, 0, &w->set.shape, 1, err, sizeof(err)), 0);
	assert_int_equal(eval_load_gram(&w->gram, path, &w->set.shape, err, sizeof(err)), 0);
	j.gram = w->gram;
	assert_int_equal(eval_table_init(&w->table, w->set.items, FX_LANES, w->rivals.n), 0);
	w->table.lane = all_lanes;
	assert_int_equal(eval_run(&j, err, sizeof(err)), 0);
}

static void whole_done(struct whole *w)
{
	free(w->gram);
	eval_table_done(&w->table);
	rivals_close(&w->rivals);
	eval_set_close(&w->set);
}

static double mean_regret(const struct whole *w, const char *name)
{
	double sum = 0, n = 0;

	for (uint32_t p = 0; p < w->rivals.n; p++)
		for (uint32_t i = 0; strcmp(w->rivals.r[p].name, name) == 0 && i < w->set.items; i++)
			for (uint32_t l = 0; l < FX_LANES; l++) {
				sum += eval_at(&w->table, i, l, p)[METRIC_REGRET];
				n++;
			}
	assert_true(n > 0);
	return sum / n;
}

static void test_regrets(void **state)
{
	struct whole w = {0};
	int oracle, reach;

	whole_run(&w, TRACE_TEST, 2);
	assert_int_equal(w.set.docs, 4);
	assert_int_equal(w.set.items, 28);
	assert_int_equal(w.set.clusters, 2); /* two traces of each source */
	assert_float_equal(mean_regret(&w, "oracle"), 0, 1e-9);
	assert_float_equal(mean_regret(&w, "random"), 1, 0.1);
	assert_true(mean_regret(&w, "snapkv") < 0.9); /* past queries like what future ones do */
	assert_true(mean_regret(&w, "h2o") < 0.9);
	oracle = rival_find(&w.rivals, HOW_ORACLE);
	reach = rival_find(&w.rivals, HOW_ATTAINABLE);
	for (uint32_t i = 0; i < w.set.items; i++) {
		const float *best = eval_at(&w.table, i, 1, (uint32_t)oracle);
		const float *four = eval_at(&w.table, i, 1, (uint32_t)reach);
		bool branch = w.set.item[i].flags & TRACE_CUT_BRANCH;

		assert_true(w.set.item[i].attainable == branch); /* five of the cuts are equal */
		assert_true(branch ? four[METRIC_REGRET] > 0 && four[METRIC_REGRET] < 0.5
				   : isnan(four[METRIC_REGRET]));
		assert_true(isnan(best[METRIC_ERROR + 2]) == branch);
		for (uint32_t p = 0; p < w.rivals.n;
		     p++) { /* nobody beats the oracle where the oracle is defined */
			const float *own = eval_at(&w.table, i, 1, p);

			assert_false(own[METRIC_REGRET] < -1e-6f);
			for (int b = 0; b < EVAL_BUDGETS; b++)
				assert_false(own[METRIC_EVICTED + b] < best[METRIC_EVICTED + b] - 1e-6f);
		}
	}
	whole_done(&w);
}

static void test_threads_agree(void **state)
{
	struct whole one = {0}, three = {0};

	whole_run(&one, TRACE_TEST, 1);
	whole_run(&three, TRACE_TEST, 3);
	assert_memory_equal(one.table.value, three.table.value,
			    (size_t)one.set.items * FX_LANES * one.rivals.n * METRICS * sizeof(float));
	whole_done(&one);
	whole_done(&three);
}

/* The attainable oracle's ranking is that of the mean of the other four, not of its own cut. */
static void test_attainable(void **state)
{
	struct whole w = {0};
	struct fx_options o = {.rows = 500 + 32, .split = TRACE_TEST, .seed = 1004};
	struct trace_header h = fx_header(&o);
	uint32_t prompt = (h.rows - FX_QUERIES) / 2, n = prompt - PROTECTED, lane = 2;
	_cleanup_free_ float *sum = calloc(prompt, sizeof(*sum)), *own = NULL;
	_cleanup_free_ uint32_t *order = calloc(n, sizeof(*order)), *best = calloc(n, sizeof(*best));
	_cleanup_free_ uint32_t *room = calloc(2 * n, sizeof(*room));
	struct metric_cut cut = {.prompt = prompt, .queries = FX_QUERIES, .n = n, .best = best};
	float out[METRICS];

	whole_run(&w, TRACE_TEST, 2);
	for (uint32_t c = 2; c < 7; c++) {
		_cleanup_free_ float *u = fx_utility(&h, lane, c, prompt);

		for (uint32_t i = 0; c != 4 && i < prompt; i++)
			sum[i] += u[i];
		if (c == 4)
			own = TAKE_PTR(u);
	}
	cut.u[UTILITY_MAX] = own + PROTECT_FIRST;
	rank_rows(own + PROTECT_FIRST, n, best, room);
	rank_rows(sum + PROTECT_FIRST, n, order, room);
	metric_prepare(&cut);
	metric_of(&cut, order, out);
	for (uint32_t i = 0; i < w.set.items; i++) {
		const struct eval_item *it = &w.set.item[i];

		if (w.set.doc[it->doc].trace->h.seed != h.seed || it->cut != 4)
			continue;
		assert_int_equal(it->prompt, prompt);
		assert_float_equal(eval_at(&w.table, i, lane,
					   (uint32_t)rival_find(&w.rivals, HOW_ATTAINABLE))[METRIC_REGRET],
				   out[METRIC_REGRET], 1e-5);
		whole_done(&w);
		return;
	}
	fail_msg("the trace of seed 1004 was not evaluated");
}

/* ---- choosing on validation ------------------------------------------------------------------ */

static void test_selection(void **state)
{
	uint32_t chosen[FX_LANES], again[FX_LANES];
	float regret[FX_LANES];
	struct whole w = {0};
	char path[128];

	whole_run(&w, TRACE_VALID, 2);
	assert_int_equal(select_best(chosen, regret, &w.set, &w.rivals, &w.table), 0);
	for (uint32_t l = 0; l < FX_LANES; l++) {
		assert_int_equal(w.rivals.r[chosen[l]].role, RIVAL_STAR);
		for (uint32_t p = 0; p < w.rivals.n; p++) {
			double sum = 0; /* every document has as many cuts, so the mean over cuts is the
					   documents' */

			for (uint32_t i = 0; i < w.set.items; i++)
				sum += eval_at(&w.table, i, l, p)[METRIC_REGRET];
			if (w.rivals.r[p].role == RIVAL_STAR)
				assert_true(sum / w.set.items >= regret[l] - 1e-5f);
			if (p == chosen[l])
				assert_float_equal(sum / w.set.items, regret[l], 1e-5);
		}
	}
	snprintf(path, sizeof(path), "%s/selected.csv", dir);
	assert_int_equal(select_write(path, chosen, regret, &w.rivals, all_lanes, FX_LANES, err, sizeof(err)),
			 0);
	assert_int_equal(select_read(again, path, &w.rivals, all_lanes, FX_LANES, err, sizeof(err)), 0);
	assert_memory_equal(chosen, again, sizeof(chosen));
	select_fill(&w.table, &w.rivals, chosen);
	for (uint32_t l = 0; l < FX_LANES; l++)
		assert_memory_equal(eval_at(&w.table, 1, l, (uint32_t)rival_find(&w.rivals, HOW_BEST)),
				    eval_at(&w.table, 1, l, chosen[l]), METRICS * sizeof(float));
	assert_int_equal(truncate(path, 30), 0);
	assert_int_equal(select_read(again, path, &w.rivals, all_lanes, FX_LANES, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "lane"));
	whole_done(&w);
}

/* ---- slices, gaps and wins on values that are set by hand -------------------------------------- */

static void test_slices(void **state)
{
	uint32_t chosen[FX_LANES] = {0};
	struct whole w = {0};
	struct report r;
	struct slice s;
	struct wins wins[RIVALS_MAX][AMONG];
	float room[500];
	struct slice_def def = {.kind = SLICE_ALL};
	int random, knorm, best, oracle, lag;

	whole_run(&w, TRACE_TEST, 2);
	random = chosen[0] = (uint32_t)rival_find(&w.rivals, HOW_OPS);
	knorm = random + 2;
	lag = random + 4;
	best = rival_find(&w.rivals, HOW_BEST);
	oracle = rival_find(&w.rivals, HOW_ORACLE);
	assert_string_equal(w.rivals.r[knorm].name, "knorm");
	assert_string_equal(w.rivals.r[lag].name, "lagkv");
	for (uint32_t i = 0; i < w.set.items; i++)
		for (uint32_t l = 0; l < FX_LANES; l++) {
			float cluster = (float)w.set.doc[w.set.item[i].doc].cluster * 0.01f;

			for (uint32_t p = 0; p < w.rivals.n; p++)
				eval_at(&w.table, i, l, p)[METRIC_REGRET] = 1 + cluster;
			eval_at(&w.table, i, l, (uint32_t)knorm)[METRIC_REGRET] = (l == 0 ? 2 : 0.7f) + cluster;
			/* On lane 3 as often better as worse than knorm: not surely the lowest. */
			eval_at(&w.table, i, l, (uint32_t)lag)[METRIC_REGRET] =
				l == 3 ? (cluster > 0 ? 0.9f : 0.4f) : 1.5f;
			eval_at(&w.table, i, l, (uint32_t)best)[METRIC_REGRET] = 0.8f + cluster;
			eval_at(&w.table, i, l, (uint32_t)oracle)[METRIC_REGRET] = 0.3f + cluster;
		}
	r = (struct report){
		.set = &w.set, .rivals = &w.rivals, .table = &w.table, .chosen = chosen, .resamples = 500};
	assert_int_equal(slice_make(&s, &r, &def), 0);
	assert_int_equal(s.clusters, 2);
	assert_float_equal(s.point[(uint32_t)random * METRICS], 1.005, 1e-5);
	assert_float_equal(slice_mean(&s, (uint32_t)random, METRIC_REGRET, room).lo, 1, 1e-5);
	assert_float_equal(slice_mean(&s, (uint32_t)random, METRIC_REGRET, room).hi, 1.01, 1e-5);
	/* knorm is 2 on one lane of four: mean 1.025 + cluster; (0.8 - 1.025) / (0.8 - 0.3) */
	assert_float_equal(slice_share(&s, (uint32_t)knorm, (uint32_t)best, (uint32_t)oracle, room).mean, -0.45,
			   1e-4);
	assert_float_equal(slice_share(&s, (uint32_t)knorm, (uint32_t)best, (uint32_t)oracle, room).hi, -0.45,
			   1e-4);
	assert_int_equal(slice_wins(&r, &s, wins, NULL), 0);
	assert_int_equal(wins[knorm][AMONG_STAR].lanes, 4);
	assert_int_equal(wins[knorm][AMONG_STAR].lowest, 2);
	assert_int_equal(wins[knorm][AMONG_STAR].sure, 2);
	assert_int_equal(wins[lag][AMONG_STAR].lowest, 1);
	assert_int_equal(wins[lag][AMONG_STAR].sure, 0);
	assert_int_equal(wins[oracle][AMONG_TRAINED].lowest, 4);
	slice_done(&s);
	def = (struct slice_def){.kind = SLICE_LENGTH, .from = 4096, .to = UINT32_MAX};
	assert_int_equal(slice_make(&s, &r, &def), -ENODATA);
	whole_done(&w);
}

/* ---- what is refused --------------------------------------------------------------------------- */

static void expect_err(int r, const char *one, const char *two)
{
	assert_true(r < 0);
	if (!strstr(err, one) || !strstr(err, two))
		fail_msg("\"%s\" names neither %s nor %s", err, one, two);
}

/* A directory of one test trace made with these options, and a second one like it but for k_dim. */
static int open_odd(const struct fx_options *o, uint32_t second_dim, bool q)
{
	char sub[96], path[128];
	struct eval_set s;
	int r;

	snprintf(sub, sizeof(sub), "%s/odd", dir);
	assert_int_equal(mkdir(sub, 0700), 0);
	snprintf(path, sizeof(path), "%s/1.kvtr", sub);
	assert_int_equal(fx_write(path, o), 0);
	if (second_dim) {
		struct fx_options other = *o;

		other.k_dim = second_dim;
		snprintf(path, sizeof(path), "%s/2.kvtr", sub);
		assert_int_equal(fx_write(path, &other), 0);
	}
	r = eval_set_open(&s, sub, TRACE_TEST, 0, NULL, err, sizeof(err));
	if (r == 0 && q)
		r = eval_set_need_q(&s, err, sizeof(err));
	if (r == 0 || q)
		eval_set_close(&s);
	remove_tree(sub);
	return r;
}

static void test_refused_traces(void **state)
{
	struct fx_options o = {.rows = 300, .split = TRACE_TEST};
	struct eval_set s;

	assert_int_equal(open_odd(&o, 0, true), 0);
	expect_err(open_odd(&o, 8, false), "2.kvtr", "k_dim");
	o.no_q = true;
	assert_int_equal(open_odd(&o, 0, false), 0);
	expect_err(open_odd(&o, 0, true), "1.kvtr", "Q");
	o.no_umax = true;
	expect_err(open_odd(&o, 0, false), "1.kvtr", "UMAX");
	assert_int_equal(eval_set_open(&s, dir, TRACE_CALIB, 0, NULL, err, sizeof(err)), -ENOENT);
	assert_non_null(strstr(err, "calib"));
}

static void test_limit(void **state)
{
	struct eval_set s;

	assert_int_equal(eval_set_open(&s, dir, TRACE_TEST, 2, NULL, err, sizeof(err)), 0);
	assert_int_equal(s.docs, 2);
	assert_int_not_equal(s.doc[0].trace->h.seed, s.doc[1].trace->h.seed);
	eval_set_close(&s);
}

static int open_weights(const char *list, const char *name, const struct weights_header *shape, bool tamper)
{
	struct fx_options o = {.rows = 300};
	struct trace_header h = fx_header(&o);
	_cleanup_free_ uint8_t *image = NULL;
	char path[128];
	struct rival_weights w = {name, path};
	struct rivals r;
	int e;

	snprintf(path, sizeof(path), "%s/w.kvp", dir);
	assert_int_equal(weights_image_new(&image, shape, 0, err, sizeof(err)), 0);
	weights_image_random(image, 1);
	weights_image_seal(image, ((struct weights_header *)image)->total_size);
	image[300] ^= tamper;
	assert_int_equal(weights_image_write(image, path), 0);
	e = rivals_open(&r, list, &w, 1, &h, 1, err, sizeof(err));
	if (e == 0)
		rivals_close(&r);
	unlink(path);
	return e;
}

static void test_refused_weights(void **state)
{
	struct weights_header h = {.name = "made-up",
				   .layers = FX_LAYERS,
				   .heads = FX_HEADS,
				   .k_dim = FX_DIM,
				   .v_dim = FX_DIM,
				   .kind = WEIGHTS_POSITION,
				   .pos_kind = WEIGHTS_POS_LOG2,
				   .pos_rows = 20,
				   .pos_dim = 2};

	assert_int_equal(open_weights("star", "mine", &h, false), 0);
	expect_err(open_weights("star", "mine", &h, true), "w.kvp", "digest");
	expect_err(open_weights("star", "knorm", &h, false), "knorm", "two policies");
	expect_err(open_weights("random,knorn", "mine", &h, false), "--policies", "knorn");
	h.layers = 3;
	expect_err(open_weights("star", "mine", &h, false), "w.kvp", "layers");
	h.layers = FX_LAYERS;
	strcpy(h.name, "another");
	expect_err(open_weights("star", "mine", &h, false), "w.kvp", "another");
}

static void test_damaged(void **state)
{
	struct whole w = {0};
	struct eval_job j = {.set = &w.set, .rivals = &w.rivals, .lane_on = all_on, .lane_at = all_lanes};
	struct fx_options o = {.rows = 300, .split = TRACE_TEST};
	char sub[96], path[128];
	int f;

	snprintf(sub, sizeof(sub), "%s/bad", dir);
	snprintf(path, sizeof(path), "%s/1.kvtr", sub);
	assert_int_equal(mkdir(sub, 0700), 0);
	assert_int_equal(fx_write(path, &o), 0);
	f = open(path, O_RDWR);
	assert_true(f >= 0);
	assert_int_equal(pwrite(f, "damage", 6, 9000), 6); /* in the middle of some rows */
	close(f);
	assert_int_equal(eval_set_open(&w.set, sub, TRACE_TEST, 0, NULL, err, sizeof(err)), 0);
	assert_int_equal(rivals_open(&w.rivals, "star", NULL, 0, &w.set.shape, 1, err, sizeof(err)), 0);
	assert_int_equal(eval_table_init(&w.table, w.set.items, FX_LANES, w.rivals.n), 0);
	j.table = &w.table;
	j.threads = 2;
	j.quiet = true;
	expect_err(eval_run(&j, err, sizeof(err)), "1.kvtr", "offset");
	whole_done(&w);
	remove_tree(sub);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_regrets),    cmocka_unit_test(test_threads_agree),
		cmocka_unit_test(test_attainable), cmocka_unit_test(test_selection),
		cmocka_unit_test(test_slices),     cmocka_unit_test(test_refused_traces),
		cmocka_unit_test(test_limit),      cmocka_unit_test(test_refused_weights),
		cmocka_unit_test(test_damaged),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
