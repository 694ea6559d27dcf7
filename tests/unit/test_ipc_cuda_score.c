/* SPDX-License-Identifier: MIT */
/* Networks in GPU memory and what sequences score with them; what a sequence refuses. On the fake driver. */
#include "kvp_double.h"

#include "policy/scorer.h"
#include "tests/unit/gpu_fixture.h"

#define DIM 64u
#define LAYERS 2u
#define HEADS 2u
#define LANES (LAYERS * HEADS)
#define CLOSE 5e-3 /* of the scores' spread, which is about 1 */

static struct kvtier_model *model;

/* A core with a weight file, and a runtime of a model that it fits. */
static void begin_scored(void)
{
	struct kvtier_layer_desc d[LAYERS];
	struct kvtier_model_desc md = {.size = sizeof(md),
				       .name = MODEL,
				       .layers = d,
				       .n_layers = LAYERS,
				       .dtype = KVT_DTYPE_F16,
				       .head_dim = DIM,
				       .rope = KVT_ROPE_HALF,
				       .post_rope = 1,
				       .rope_theta = 100000,
				       .world = 1};
	struct weights_header shape = shape_trained();
	_cleanup_free_ uint8_t *image = NULL;
	char path[200];

	shape.layers = LAYERS;
	shape.heads = HEADS;
	image = make_image(shape, 0, 21);
	fake.set(NULL);
	base = fake_gpu_counts(&fake);
	harness_init(&h, false);
	snprintf(h.cfg.model_dir, sizeof(h.cfg.model_dir), "%s", h.dir);
	strcpy(h.cfg.policy, "kvp");
	snprintf(path, sizeof(path), "%s/" MODEL ".kvp", h.dir);
	assert_int_equal(weights_image_write(image, path), 0);
	assert_true(harness_start(&h));
	assert_ok(rt_open(&rt, h.sock[0], LAYERS));
	for (uint32_t i = 0; i < LAYERS; i++)
		d[i] = (struct kvtier_layer_desc){.kv_heads = HEADS, .k_bytes = DIM * 2, .v_bytes = DIM * 2};
	assert_ok(kvtier_model_register(rt.c, &md, &model));
	assert_ok(gpu_open(&gpu));
	assert_ok(kvtier_cuda_window_create(rt.c, gpu.g, 4 << 20, &window));
}

static void end_scored(void)
{
	kvtier_model_release(model);
	end();
}

/* GPU memory of finite f16 rows: [lane][K, V][slots][DIM]; slots 0, 1, ... are to be rows pos, pos + 1, ... */
static void fill(uint64_t rows, uint32_t slots, uint64_t seed)
{
	rng = seed;
	for (uint64_t i = 0; i < (uint64_t)LANES * 2 * slots; i++)
		for (uint32_t j = 0; j < DIM; j++)
			put_element((char *)rows + i * DIM * 2, j, ROW_F16, normal());
}

static void layers_of(uint64_t rows, uint32_t slots, struct kvtier_cuda_layer *ret)
{
	uint64_t head = (uint64_t)2 * slots * DIM * 2;

	for (uint32_t i = 0; i < LAYERS; i++)
		ret[i] = (struct kvtier_cuda_layer){.k = rows + i * HEADS * head,
						    .v = rows + i * HEADS * head + head / 2,
						    .k_head_stride = head,
						    .v_head_stride = head,
						    .k_row_stride = DIM * 2,
						    .v_row_stride = DIM * 2};
}

static int open_seq(struct kvtier_cuda_scorer *s, const struct kvtier_cuda_layer *layers, uint32_t cap,
		    struct kvtier_seq **ret)
{
	struct kvtier_budget b = {.size = sizeof(b), .device_rows = KVT_ROWS_ALL, .manual = 1, .policy = "kvp"};
	struct kvtier_seq_opts o = {.size = sizeof(o), .max_rows = 2 * cap, .budget = &b};
	struct kvtier_cuda_seq_opts g = {.size = sizeof(g),
					 .window = window,
					 .scorer = s,
					 .layers = layers,
					 .cap = cap,
					 .stage = cap,
					 .out_bytes = 1 << 16,
					 .in_bytes = 1 << 16};

	return kvtier_cuda_seq_open(rt.c, model, &o, &g, ret);
}

/* Scores of rows [from, to) as they lie in the window, against the definition. row(lane, pos): its K and V. */
static void check_scores(struct kvtier_seq *s, uint32_t from, uint32_t to,
			 const char *(*row)(uint32_t, uint32_t))
{
	const struct cuda_seq *q = s->cu;
	const struct scorer_hdr *net = (const struct scorer_hdr *)q->scorer->addr;
	const float *plane = (const float *)((const char *)window->r->seg.addr + q->score_off);

	for (uint32_t lane = 0; lane < LANES; lane++)
		for (uint32_t pos = from; pos < to; pos++) {
			const char *k = row(lane, pos);
			float want[2] = {0};

			scorer_eval_ref(net, lane, ROW_F16, k, k + DIM * 2, pos, want);
			for (uint32_t c = 0; c < net->coefs; c++) {
				float got = plane[((size_t)lane * net->coefs + c) * s->max_rows + pos];

				if (!(fabsf(got - want[c]) < CLOSE * (1 + fabsf(want[c]))))
					fail_msg("lane %u, row %u, coefficient %u: %g, must be %g", lane, pos,
						 c, got, want[c]);
			}
		}
}

/* Rows as they were written, to compare scores of rows that have moved since. */
static char kept[LANES][400][DIM * 4];

static const char *kept_row(uint32_t lane, uint32_t pos)
{
	return kept[lane][pos];
}

static void keep(uint64_t rows, uint32_t slots, uint32_t slot, uint32_t pos, uint32_t n)
{
	for (uint32_t lane = 0; lane < LANES; lane++)
		for (uint32_t i = 0; i < n; i++)
			for (int v = 0; v < 2; v++)
				memcpy(kept[lane][pos + i] + v * DIM * 2,
				       (char *)rows +
					       (((size_t)lane * 2 + (size_t)v) * slots + slot + i) * DIM * 2,
				       DIM * 2);
}

/* The daemon ranks by what the GPU wrote, before and after rows have moved. */
static void test_rows_are_scored(void **state)
{
	struct kvtier_cuda_scorer *s;
	struct kvtier_cuda_layer layers[LAYERS];
	struct kvtier_seq *q;
	struct kvtier_seq_info info = {.size = sizeof(info)};
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = 100, .dram_rows = KVT_ROWS_ALL, .manual = 1};
	struct kvtier_cuda_state st = {.size = sizeof(st)};
	uint64_t rows, id;
	int r;

	begin_scored();
	assert_ok(kvtier_cuda_scorer_get(rt.c, gpu.g, model, NULL, &s));
	assert_int_equal(kvtier_cuda_scorer_coefs(s), 2);
	assert_string_equal(kvtier_cuda_scorer_policy(s), "kvp");
	assert_ok(cuda_enter(gpu.g));
	assert_int_equal(gpu.d->alloc(&rows, (size_t)LANES * 2 * 400 * DIM * 2), 0);
	cuda_leave(gpu.g);
	fill(rows, 400, 5);
	layers_of(rows, 400, layers);
	assert_ok(open_seq(s, layers, 200, &q));
	keep(rows, 400, 0, 0, 150);
	assert_ok(kvtier_cuda_append(q, 0, 70));
	assert_ok(kvtier_cuda_push(q, NULL));
	assert_ok(kvtier_cuda_append(q, 70, 80));
	assert_ok(kvtier_cuda_push(q, NULL));
	check_scores(q, 0, 150, kept_row);
	assert_int_equal(kvtier_cuda_poll(q, NULL, NULL), KVT_PLAN_NONE);
	assert_ok(kvtier_plan_request(q, &b, &id));
	for (int i = 0; i < 2000 && (r = kvtier_cuda_poll(q, NULL, &st)) != KVT_PLAN_READY; i++)
		usleep(1000);
	assert_int_equal(r, KVT_PLAN_READY);
	assert_ok(kvtier_cuda_apply(q, st.plan, NULL, NULL, NULL));
	assert_ok(kvtier_seq_info(q, &info));
	assert_string_equal(info.policy, "kvp");
	/* new rows follow in slot 100, not 150 */
	fill(rows, 400, 6);
	keep(rows, 400, 100, 150, 60);
	assert_ok(kvtier_cuda_append(q, 150, 60));
	assert_ok(kvtier_cuda_push(q, NULL));
	check_scores(q, 0, 210, kept_row);
	kvtier_seq_close(q);
	kvtier_cuda_scorer_put(s);
	assert_ok(cuda_enter(gpu.g));
	assert_int_equal(gpu.d->free(rows), 0);
	cuda_leave(gpu.g);
	end_scored();
}

/* Without a sequence: any lanes, any rows; more calls than are kept track of. */
static void test_by_hand(void **state)
{
	struct kvtier_cuda_scorer *s;
	uint64_t rows, out, head = (uint64_t)2 * 50 * DIM * 2;
	const struct scorer_hdr *net;

	begin_scored();
	assert_ok(kvtier_cuda_scorer_get(rt.c, gpu.g, model, "kvp", &s));
	net = (const struct scorer_hdr *)s->addr;
	assert_ok(cuda_enter(gpu.g));
	assert_int_equal(gpu.d->alloc(&rows, LANES * head), 0);
	assert_int_equal(gpu.d->alloc(&out, (size_t)2 * 2 * 64 * sizeof(float)), 0);
	cuda_leave(gpu.g);
	fill(rows, 50, 9);
	for (uint32_t call = 0; call < 2 * SCORER_RUNS + 3; call++) {
		uint32_t pos = 37 * call;
		float want[2] = {0};

		assert_ok(kvtier_cuda_scorer_run(s, 1, 2, rows + head, rows + head + head / 2, head, head,
						 DIM * 2, DIM * 2, KVT_DTYPE_F16, pos, 50, out, 64, NULL));
		for (uint32_t i = 0; i < 50; i += 7)
			for (uint32_t lane = 1; lane < 3; lane++) {
				const char *k = (const char *)rows + lane * head + i * DIM * 2;

				scorer_eval_ref(net, lane, ROW_F16, k, k + head / 2, pos + i, want);
				for (uint32_t c = 0; c < 2; c++) {
					float got = ((float *)out)[((lane - 1) * 2 + c) * 64 + i];

					assert_true(fabsf(got - want[c]) < CLOSE * (1 + fabsf(want[c])));
				}
			}
	}
#define RUN(lane, lanes, dtype, pos, n)                                                                        \
	kvtier_cuda_scorer_run(s, lane, lanes, rows, rows, head, head, DIM * 2, DIM * 2, dtype, pos, n, out,   \
			       64, NULL)
	assert_said(RUN(3, 2, KVT_DTYPE_F16, 0, 1), KVT_E_INVAL, "lanes: 2 from 3 on");
	assert_said(RUN(0, 0, KVT_DTYPE_F16, 0, 1), KVT_E_INVAL, "lanes");
	assert_said(RUN(0, 1, KVT_DTYPE_F32, 0, 1), KVT_E_INVAL, "dtype: 1");
	assert_said(RUN(0, 1, KVT_DTYPE_F16, UINT32_MAX, 2), KVT_E_INVAL, "rows: 2 from");
	assert_said(RUN(0, 1, KVT_DTYPE_F16, 0, 0), KVT_E_INVAL, "rows: 0");
	assert_ok(cuda_enter(gpu.g));
	assert_int_equal(gpu.d->free(rows) + gpu.d->free(out), 0);
	cuda_leave(gpu.g);
	kvtier_cuda_scorer_put(s);
	end_scored();
}

/* A header is believed in nothing. */
static void test_hostile_scorer(void **state)
{
	struct kvtier_cuda_scorer *s;
	struct scorer_hdr good, h2;
	uint32_t refused = 0;

	begin_scored();
	assert_ok(kvtier_cuda_scorer_get(rt.c, gpu.g, model, NULL, &s));
	good = s->h;
	assert_ok(scorer_check(&good, good.bytes, LANES));
	assert_int_equal(scorer_check(&good, good.bytes - 1, LANES), KVT_E_VERSION);
	assert_int_equal(scorer_check(&good, good.bytes, LANES + 1), KVT_E_VERSION);
	/* every bit, but of what may be anything: id, rope_theta, reserved, and flags and octave within limits
	 */
	for (size_t bit = 0; bit < sizeof(good) * 8; bit++) {
		size_t byte = bit / 8;
		bool any = (byte >= offsetof(struct scorer_hdr, id) &&
			    byte < offsetof(struct scorer_hdr, layers)) ||
			   (byte >= offsetof(struct scorer_hdr, flags) &&
			    byte < offsetof(struct scorer_hdr, bytes)) ||
			   (byte >= offsetof(struct scorer_hdr, proj) &&
			    byte < offsetof(struct scorer_hdr, hidden)) ||
			   (byte >= offsetof(struct scorer_hdr, pos_dim) &&
			    byte < offsetof(struct scorer_hdr, pos_pad)) ||
			   (byte >= offsetof(struct scorer_hdr, octave) &&
			    byte < offsetof(struct scorer_hdr, lane_off)) ||
			   byte >= offsetof(struct scorer_hdr, reserved);

		h2 = good;
		((uint8_t *)&h2)[byte] ^= (uint8_t)(1u << bit % 8);
		if (any) {
			(void)scorer_check(&h2, good.bytes, LANES);
			continue;
		}
		if (scorer_check(&h2, good.bytes, LANES) != KVT_E_VERSION)
			fail_msg("bit %zu of byte %zu is not looked at", bit % 8, byte);
		refused++;
	}
	assert_true(refused > 1000);
	kvtier_cuda_scorer_put(s);
	assert_said(kvtier_cuda_scorer_get(rt.c, gpu.g, model, "streaming", &s), KVT_E_NOENT, "streaming");
	assert_int_equal(
		kvtier_cuda_scorer_get(rt.c, gpu.g, model, "a-name-that-is-longer-than-a-policy's", &s),
		KVT_E_INVAL);
	for (int n = 1; n <= 4; n++) {
		static const char *const calls[] = {"cuMemAlloc_v2", "cuMemHostAlloc", "cuEventCreate",
						    "cuStreamCreate"};
		char words[64];

		snprintf(words, sizeof(words), "fail=%s:2@1", calls[n - 1]);
		fake.set(words);
		assert_int_equal(kvtier_cuda_scorer_get(rt.c, gpu.g, model, NULL, &s), KVT_E_NOMEM);
	}
	fake.set(NULL);
	end_scored();
}

/* ---- refusals ---------------------------------------------------------------------------------- */

static void test_refusals(void **state)
{
	struct kvtier_cuda_layer layers[LAYERS], bad[LAYERS];
	struct kvtier_cuda_scorer *s;
	struct kvtier_seq *q = NULL, *on_host = NULL;
	struct kvtier_plan plan = {.size = sizeof(plan), .id = 1};
	struct kvtier_recall_opts ro = {
		.size = sizeof(ro), .rows = 1, .window_rows = 1, .dtype = KVT_DTYPE_F32};
	struct kvtier_recalled found = {.size = sizeof(found)};
	struct kvtier_seq_opts fo = {.size = sizeof(fo), .max_rows = 10};
	struct rt_seq host = {0};
	struct gpu_seq other;
	float query[DIM * HEADS] = {0};
	uint32_t stride;
	uint64_t addr;

	begin_scored();
	assert_ok(kvtier_cuda_scorer_get(rt.c, gpu.g, model, NULL, &s));
	layers_of(1 << 20, 400, layers); /* nothing is read there */
	assert_ok(open_seq(s, layers, 200, &q));
	/* what is for rows in a region */
	assert_said(kvtier_seq_append(q, KVT_ALL_LAYERS, 0, 1), KVT_E_INVAL, "kvtier_cuda_append()");
	assert_said(kvtier_plan_apply(q, &plan), KVT_E_INVAL, "kvtier_cuda_apply()");
	assert_said(kvtier_plan_ack(q, 1, NULL), KVT_E_INVAL, "kvtier_cuda_apply()");
	assert_said(kvtier_seq_fork(q, 0, &fo, &on_host), KVT_E_INVAL, "in GPU memory");
	assert_said(kvtier_seq_recall(q, 0, query, 1, &ro, &found), KVT_E_INVAL, "kvtier_cuda_recall()");
	/* and the other way round */
	assert_ok(rt_prepare(&host, &rt, 77, 100, 50, 200));
	assert_ok(rt_seq_open(&host, KVT_EPHEMERAL, NULL));
	assert_said(kvtier_cuda_append(host.s, 0, 1), KVT_E_INVAL, "kvtier_cuda_seq_open()");
	assert_int_equal(kvtier_cuda_push(host.s, NULL), KVT_E_INVAL);
	assert_int_equal(kvtier_cuda_poll(host.s, NULL, NULL), KVT_E_INVAL);
	assert_int_equal(kvtier_cuda_apply(host.s, 1, NULL, NULL, NULL), KVT_E_INVAL);
	assert_int_equal(kvtier_cuda_counts(host.s, NULL), KVT_E_INVAL);
	assert_int_equal(kvtier_cuda_map(host.s, &addr, &stride), KVT_E_INVAL);
	assert_int_equal(kvtier_cuda_settle(host.s, 0, 1, NULL), KVT_E_INVAL);
	assert_int_equal(kvtier_cuda_poll(NULL, NULL, NULL), KVT_E_INVAL);
	/* rows */
	assert_said(kvtier_cuda_append(q, 1, 1), KVT_E_INVAL, "pos: 1, must be 0");
	assert_said(kvtier_cuda_append(q, 0, 201), KVT_E_NOSPC, "must be at most cap 200");
	assert_said(kvtier_cuda_append(q, 0, UINT32_MAX), KVT_E_NOSPC, "max_rows 400");
	assert_said(kvtier_cuda_apply(q, 7, NULL, NULL, NULL), KVT_E_STALE, "plan 7");
	assert_said(kvtier_seq_truncate(q, 1), KVT_E_INVAL, "n: 1, must be at most");
	kvtier_seq_close(q);
	/* layers */
	memcpy(bad, layers, sizeof(bad));
	bad[1].k += 8;
	assert_said(open_seq(s, bad, 200, &q), KVT_E_INVAL, "layers[1]: addresses and strides");
	bad[1] = layers[1];
	bad[0].v_row_stride = DIM;
	assert_said(open_seq(s, bad, 200, &q), KVT_E_INVAL, "layers[0]: row strides");
	bad[0] = layers[0];
	bad[0].v = 0;
	assert_said(open_seq(s, bad, 200, &q), KVT_E_INVAL, "layers[0].v: 0");
	assert_int_equal(open_seq(s, layers, 0, &q), KVT_E_INVAL);
	/* a network of another model */
	assert_ok(gpu_prepare(&other, &gpu, &rt, window, 1, 100, 50, 200, 0));
	other.scorer = s;
	assert_said(gpu_seq_open(&other, KVT_EPHEMERAL, NULL, 1 << 16), KVT_E_MODEL, "scorer: of 4 lanes");
	gpu_seq_free(&other, false);
	rt_seq_free(&host, true);
	kvtier_cuda_scorer_put(s);
	end_scored();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_rows_are_scored),
		cmocka_unit_test(test_by_hand),
		cmocka_unit_test(test_hostile_scorer),
		cmocka_unit_test(test_refusals),
	};

	return gpu_main(tests, ARRAY_SIZE(tests));
}
