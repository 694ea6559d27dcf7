/* SPDX-License-Identifier: MIT */
/* Adaptive budgets through the daemon: who gets them, what they add up to, and that the most valuable rows
 * stay. */
#include "growing_fixture.h"

#include "policy/adaptive.h"
#include "policy/calibrate.h"
#include "policy/decide.h"

#define FLOOR 30u /* max(24, BUDGET / 4) */

static const struct calibrate_shape table_shape = {.lanes = LANES, .knots = 2, .lengths = 1, .distances = 1};

/* Rows of lane l are worth (score + 20) / 40 * 8 / 2^l: each lane half of the lane before it. */
static void fill_table(float *table)
{
	calibrate_begin(table, &table_shape);
	for (uint32_t l = 0; l < LANES; l++) {
		float *p = table + calibrate_head(&table_shape) + l * calibrate_stride(&table_shape);
		const float lane[5] = {1, -20, 20, 0, 8.0f / (float)(1u << l)};

		memcpy(p, lane, sizeof(lane));
	}
}

/* A weight file with that table, or with its word `bad` spoilt. */
static void write_calibrated(const char *path, struct weights_header h, int bad)
{
	_cleanup_free_ uint8_t *image = make_image(h, calibrate_bytes(&table_shape), 21);
	float *table = (float *)(image + ((struct weights_header *)image)->calib_off);

	fill_table(table);
	if (bad >= 0)
		table[bad] = 77;
	weights_image_seal(image, image_size(image));
	assert_int_equal(weights_image_write(image, path), 0);
}

static void begin_adaptive(struct fixture *f)
{
	prepare(f);
	f->h.cfg.adaptive = true;
	write_calibrated(f->file, shape(WEIGHTS_KVP, 2), -1);
	load_policy(f, shape(WEIGHTS_KVP, 2));
	start(f);
}

struct asked {
	uint64_t handle;
	struct core_seq_stat stat;
};

static void ask(struct core *c, void *arg)
{
	struct asked *a = arg;

	assert_int_equal(core_seq_stat(c, a->handle, &a->stat), 0);
}

static struct core_seq_stat seq_stat(struct fixture *f, struct rt_seq *q)
{
	struct asked a = {.handle = rt_info(q).handle};

	harness_call(&f->h, ask, &a);
	return a.stat;
}

static uint32_t resident(struct rt_seq *q, uint32_t kept[LANES])
{
	uint32_t sum = 0;

	for (uint32_t l = 0; l < LANES; l++)
		sum += kept[l] = (uint32_t)rt_resident(q, l, NULL);
	return sum;
}

static void assert_uniform(struct fixture *f, struct rt_seq *q)
{
	uint32_t kept[LANES];

	resident(q, kept);
	for (uint32_t l = 0; l < LANES; l++)
		assert_int_equal(kept[l], BUDGET);
	assert_false(seq_stat(f, q).adaptive);
}

/* What every row of a lane is worth at this length, as the daemon sees it. */
static void weigh(const struct fixture *f, uint32_t lane, uint32_t n, uint16_t *worth)
{
	static float k[MOST][DIM], v[MOST][DIM], f0[MOST], f1[MOST];
	struct policy_batch b = {.lane = lane,
				 .n = n,
				 .k = k,
				 .v = v,
				 .k_stride = sizeof(k[0]),
				 .v_stride = sizeof(v[0]),
				 .total = n};
	uint16_t keys[MOST];

	for (uint32_t i = 0; i < n; i++)
		row(lane, i, k[i], v[i]);
	assert_int_equal(f->p->ops->coefs(f->p, &b, (float *const[]){f0, f1}), 0);
	score_keys(f0, keys, n);
	key_scores(keys, f0, n);
	score_keys(f1, keys, n);
	key_scores(keys, f1, n);
	assert_int_equal(f->p->ops->combine(f->p, &b, (const float *const[]){f0, f1}, f0), 0);
	score_keys(f0, keys, n);
	key_scores(keys, f0, n);
	for (uint32_t i = 0; i < n; i++)
		f0[i] = (f0[i] + 20) / 40 * 8 / (float)(1u << lane);
	adaptive_keys(f0, 1, n, worth);
}

/* Above its floor no lane keeps a row that is worth less than one which another lane left. */
static void assert_most_valuable(struct fixture *f, struct rt_seq *q)
{
	uint16_t worth[MOST], kept_least = UINT16_MAX, left_most = 0;
	uint32_t kept[LANES], pos[MOST];

	assert_int_equal(resident(q, kept), LANES * BUDGET);
	for (uint32_t l = 0; l < LANES; l++) {
		bool stays[MOST] = {0};

		rt_resident(q, l, pos);
		weigh(f, l, q->rows, worth);
		for (uint32_t i = 0; i < kept[l]; i++) {
			stays[pos[i]] = true;
			if (kept[l] > FLOOR && pos[i] >= FIRST && pos[i] < q->rows - LAST)
				kept_least = MIN(kept_least, worth[pos[i]]);
		}
		assert_true(kept[l] >= FLOOR);
		for (uint32_t i = FIRST; i < q->rows - LAST; i++)
			if (!stays[i])
				left_most = MAX(left_most, worth[i]);
	}
	/* A step of the 16 bits: calibration and this test round on their own. */
	assert_true(left_most <= kept_least + 1);
}

static void the_most_valuable_rows_stay(void **state)
{
	struct core_seq_stat st;
	struct kvtier_plan p;
	uint32_t kept[LANES], again[LANES];
	struct fixture f;
	struct rt_seq q;

	begin_adaptive(&f);
	open_seq(&f, &q, 3);
	append(&q, 700);
	plan(&q, "kvp", &p);
	assert_int_equal(p.flags, 0);
	assert_most_valuable(&f, &q);
	resident(&q, kept);
	assert_true(kept[0] > kept[1] && kept[1] >= kept[2] && kept[2] >= kept[3] && kept[0] > 2 * BUDGET);
	st = seq_stat(&f, &q);
	assert_true(st.adaptive);
	assert_int_equal(st.device_most, kept[0]);
	assert_int_equal(st.device_least, kept[3]);
	/* A few rows more change no budget by five per cent. */
	append(&q, 3);
	plan(&q, "kvp", NULL);
	resident(&q, again);
	assert_memory_equal(kept, again, sizeof(kept));
	append(&q, 600);
	plan(&q, "kvp", NULL);
	assert_int_equal(resident(&q, kept), LANES * BUDGET);
	rt_seq_free(&q, false);
	finish(&f);
}

static void plan_budget(struct rt_seq *q, struct kvtier_budget *b)
{
	uint64_t id;

	b->size = sizeof(*b);
	b->dram_rows = KVT_ROWS_ALL;
	b->manual = 1;
	b->policy = "kvp";
	assert_int_equal(kvtier_plan_request(q->s, b, &id), 0);
	assert_int_equal(rt_follow(q, id, NULL), 0);
}

static void set_adaptive(struct core *c, void *arg)
{
	char err[256];
	struct config cfg = *(const struct config *)arg;

	assert_int_equal(core_reload(c, &cfg, err, sizeof(err)), 0);
}

/* Budgets by lane are the client's, and a switch that is off is off; turned on, it serves the next plan. */
static void others_keep_their_budgets(void **state)
{
	uint32_t table[LANES] = {50, 60, 70, 80}, kept[LANES];
	struct kvtier_budget by_lane = {
		.kind = KVT_BUDGET_PER_LANE, .device_rows = BUDGET, .device_table = table, .table_n = LANES};
	struct config cfg;
	struct fixture f;
	struct rt_seq q;

	begin_adaptive(&f);
	cfg = f.h.cfg;
	open_seq(&f, &q, 3);
	append(&q, 700);
	plan_budget(&q, &by_lane);
	resident(&q, kept);
	assert_memory_equal(kept, table, sizeof(kept));
	assert_false(seq_stat(&f, &q).adaptive);
	cfg.adaptive = false;
	harness_call(&f.h, set_adaptive, &cfg);
	plan(&q, "kvp", NULL);
	assert_uniform(&f, &q);
	cfg.adaptive = true;
	harness_call(&f.h, set_adaptive, &cfg);
	plan(&q, "kvp", NULL);
	assert_most_valuable(&f, &q);
	plan(&q, "knorm", NULL); /* not calibrated */
	assert_uniform(&f, &q);
	rt_seq_free(&q, false);
	finish(&f);
}

static void equal_lanes_stay_equal(void **state)
{
	static const uint32_t granularity[] = {KVT_GRAN_HEAD, KVT_GRAN_TOKEN};
	struct fixture f;

	begin_adaptive(&f);
	for (int i = 0; i < 2; i++) {
		struct rt_seq q;
		struct kvtier_seq_opts o;

		assert_int_equal(rt_prepare(&q, &f.rt, 3, MOST, MOST, MOST), 0);
		o = rt_opts(&q, KVT_EPHEMERAL, &everything);
		o.equal_lanes = granularity[i] == KVT_GRAN_HEAD;
		o.granularity = granularity[i];
		assert_int_equal(kvtier_seq_open(f.rt.c, f.rt.m, &o, &q.s), 0);
		append(&q, 700);
		plan(&q, "kvp", NULL);
		assert_uniform(&f, &q);
		rt_seq_free(&q, false);
	}
	finish(&f);
}

static void demote(struct core *c, void *arg)
{
	char err[200];

	assert_int_equal(core_seq_demote(c, *(uint64_t *)arg, 60, err, sizeof(err)), 0);
}

/* Shares that add up to all rows drop none, however unlike the lanes; and a lane of a demoted sequence stays
 * below what it was demoted to. */
static void promises_are_kept(void **state)
{
	struct core_seq_stat st;
	struct kvtier_seq_opts o;
	uint32_t kept[LANES];
	struct fixture f;
	struct rt_seq q;
	uint64_t handle;

	prepare(&f);
	f.h.cfg.adaptive = true;
	f.h.cfg.budget_device = 200;
	f.h.cfg.budget_dram = 800;
	strcpy(f.h.cfg.policy, "kvp");
	write_calibrated(f.file, shape(WEIGHTS_KVP, 2), -1);
	start(&f);
	assert_int_equal(rt_prepare(&q, &f.rt, 3, MOST, MOST, MOST), 0);
	o = rt_opts(&q, KVT_EPHEMERAL, NULL);
	assert_int_equal(kvtier_seq_open(f.rt.c, f.rt.m, &o, &q.s), 0);
	append(&q, 700);
	assert_int_equal(rt_follow(&q, 1, NULL), 0);
	assert_int_equal(resident(&q, kept), LANES * 140);
	st = seq_stat(&f, &q);
	assert_true(st.adaptive && kept[3] < 140);
	assert_int_equal(st.dropped_rows, 0);
	assert_int_equal(st.tier_rows[KVT_TIER_DEVICE] + st.tier_rows[KVT_TIER_DRAM], LANES * 700);
	plan(&q, "kvp", NULL);
	assert_true(seq_stat(&f, &q).adaptive);
	handle = rt_info(&q).handle;
	harness_call(&f.h, demote, &handle);
	assert_int_equal(rt_follow(&q, 3, NULL), 0);
	resident(&q, kept);
	for (uint32_t l = 0; l < LANES; l++)
		assert_int_equal(kept[l], 60);
	assert_false(seq_stat(&f, &q).adaptive);
	rt_seq_free(&q, false);
	finish(&f);
}

/* A heuristic has no weight file: a calibration of its own, in a file that names it, serves as well. */
static void heuristics_may_be_calibrated_too(void **state)
{
	_cleanup_free_ float *table = calloc(1, calibrate_bytes(&table_shape));
	char path[300], other[300];
	uint32_t kept[LANES];
	struct fixture f;
	struct rt_seq q;

	assert_non_null(table);
	fill_table(table);
	prepare(&f);
	f.h.cfg.adaptive = true;
	snprintf(path, sizeof(path), "%s/growing.knorm.calib", f.h.dir);
	snprintf(other, sizeof(other), "%s/growing.vnorm.calib", f.h.dir);
	assert_int_equal(calibrate_write(path, table, &table_shape, "knorm", "growing"), 0);
	assert_int_equal(calibrate_write(other, table, &table_shape, "knorm", "growing"), 0);
	start(&f);
	open_seq(&f, &q, 3);
	append(&q, 700);
	plan(&q, "knorm", NULL);
	assert_int_equal(resident(&q, kept), LANES * BUDGET);
	assert_true(seq_stat(&f, &q).adaptive && kept[0] > kept[3]);
	plan(&q, "vnorm", NULL); /* its file speaks of another policy */
	assert_string_equal(rt_info(&q).policy, "vnorm");
	assert_uniform(&f, &q);
	rt_seq_free(&q, false);
	finish(&f);
}

/* A weight file whose calibration makes no sense is refused as a whole, and the fallback runs. */
static void nonsense_calibrations_are_refused(void **state)
{
	struct fixture f;
	struct rt_seq q;
	struct policy_cfg cfg = {.layers = LAYERS,
				 .heads = HEADS,
				 .k_dim = DIM,
				 .v_dim = DIM,
				 .dtype = ROW_F32,
				 .model = "growing"};
	struct policy *p = NULL;
	char err[512] = "";

	prepare(&f);
	f.h.cfg.adaptive = true;
	write_calibrated(f.file, shape(WEIGHTS_KVP, 2), 2); /* lanes */
	cfg.weights = f.file;
	assert_int_equal(policy_kvp_ops.init(&p, &cfg, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, "growing.kvp: calibration: lanes: 77, must be 4"));
	start(&f);
	open_seq(&f, &q, 3);
	append(&q, 700);
	plan(&q, "kvp", NULL);
	assert_string_equal(rt_info(&q).policy, "streaming");
	assert_uniform(&f, &q);
	rt_seq_free(&q, false);
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_most_valuable_rows_stay),
		cmocka_unit_test(others_keep_their_budgets),
		cmocka_unit_test(equal_lanes_stay_equal),
		cmocka_unit_test(promises_are_kept),
		cmocka_unit_test(heuristics_may_be_calibrated_too),
		cmocka_unit_test(nonsense_calibrations_are_refused),
	};

	return cmocka_run_group_tests_name("daemon/adaptive", tests, NULL, NULL);
}
