/* SPDX-License-Identifier: MIT */
/* What the scores decide that a client computes with a policy's network. */
#include "scorer_fixture.h"

static struct policy *policy_at(const struct fixture *f)
{
	struct policy_cfg cfg = {
		.layers = LAYERS, .heads = HEADS, .k_dim = DIM, .v_dim = DIM, .dtype = ROW_F16, .model = MODEL};
	char path[200], err[256] = "";
	struct policy *p;

	file_of(f, path, sizeof(path));
	cfg.weights = path;
	if (policy_find("kvp")->init(&p, &cfg, err, sizeof(err)) < 0)
		fail_msg("%s", err);
	return p;
}

/* Resident rows are the protected ones and the best of the rest, by the formula on what the planes hold. */
static void assert_best(struct policy *p, const struct wseq *q)
{
	static float f0[4096], f1[4096];
	static uint16_t keys[4096];

	for (uint32_t l = 0; l < LANES; l++) {
		struct policy_batch b = {.lane = l, .n = q->rows, .total = q->rows};
		uint16_t worst = UINT16_MAX, best = 0;
		bool here[4096] = {0};

		for (uint32_t c = 0; c < q->coefs; c++) {
			score_keys(wq_score(q, l, c, 0), keys, q->rows);
			key_scores(keys, c ? f1 : f0, q->rows);
		}
		assert_int_equal(p->ops->combine(p, &b, (const float *const[]){f0, f1}, f0), 0);
		score_keys(f0, keys, q->rows);
		for (uint32_t s = 0; s < q->count[l]; s++)
			here[*wq_pos(q, l, s)] = true;
		for (uint32_t i = 4; i < q->rows - 16; i++)
			if (here[i])
				worst = MIN(worst, keys[i]);
			else
				best = MAX(best, keys[i]);
		assert_int_equal(q->count[l], KEEP);
		assert_true(best <= worst);
		assert_true(here[0] && here[3] && here[q->rows - 1] && here[q->rows - 16]);
	}
}

static void open_scored(struct fixture *f, struct wseq *q, uint32_t id, const struct wire_scorer_reply *a)
{
	struct wire_budget b = wq_budget(KEEP, KVT_ROWS_ALL, KVT_ROWS_ALL);

	assert_int_equal(wq_make(q, &f->l, id, 1800, 1800, 3000, 256 << 10, 256 << 10, a->coefs), 0);
	assert_int_equal(wq_open(q, W_OP_OPEN, KVT_LEASED, a->id, 0, &b), 0);
}

static void scores_of_a_growing_sequence_follow_its_length(void **state)
{
	static const uint32_t steps[] = {300, 1, 200, 500, 900};

	for (uint32_t rank = 1; rank <= 2; rank++) {
		struct wire_scorer_reply a;
		struct wire_seq_info_reply info;
		struct policy *p;
		struct fixture f;
		struct wseq q;

		begin_kvp(&f, rank, NULL);
		p = policy_at(&f);
		assert_int_equal(ask_scorer(&f.l, "", &a), 0);
		close(f.l.fds[0]);
		assert_int_equal(a.coefs, rank);
		open_scored(&f, &q, 30, &a);
		for (size_t i = 0; i < ARRAY_SIZE(steps); i++) {
			assert_int_equal(wq_append(&q, steps[i]), 0);
			assert_int_equal(wq_plan(&q, KEEP, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
			assert_best(p, &q);
			assert_int_equal(wq_wrong(&q), 0);
		}
		info = wq_info(&q);
		assert_string_equal(info.policy, "kvp");
		/* Resumed, its rows keep their rank, and new ones are ranked with them. */
		assert_int_equal(wq_plan(&q, 0, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
		assert_int_equal(wq_close(&q, false), 0);
		{
			struct wire_budget b = wq_budget(KEEP, KVT_ROWS_ALL, KVT_ROWS_ALL);
			struct wseq r;

			assert_int_equal(wq_make(&r, &f.l, 30, 1800, 1800, 3000, 256 << 10, 256 << 10, rank),
					 0);
			assert_int_equal(wq_open(&r, W_OP_RESUME, KVT_LEASED, a.id, 0, &b), 0);
			memcpy(r.salts, q.salts, r.max_rows * sizeof(*r.salts));
			assert_int_equal(wq_append(&r, 100), 0);
			assert_int_equal(wq_plan(&r, KEEP, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
			for (uint32_t l = 0; l < LANES; l++) /* as if it had never been away */
				for (uint32_t c = 0; c < rank; c++)
					memcpy(wq_score(&r, l, c, 0), wq_score(&q, l, c, 0),
					       q.rows * sizeof(float));
			assert_best(p, &r);
			assert_int_equal(wq_wrong(&r), 0);
			wq_free(&r);
		}
		assert_no_miss(&f);
		wq_free(&q);
		p->ops->free(p);
		finish(&f);
	}
}

static void load_weights(struct core *c, void *path)
{
	char err[200];

	assert_int_equal(core_policy_load(c, path, err, sizeof(err)), 0);
}

/* Newer weights are for those who ask from then on. */
static void open_sequences_keep_the_network_that_they_run(void **state)
{
	struct wire_scorer_reply a, b;
	struct policy *old, *new;
	struct wlink other;
	struct fixture f;
	struct wseq q, r, s;
	char path[200];

	begin_kvp(&f, 2, NULL);
	old = policy_at(&f);
	assert_int_equal(ask_scorer(&f.l, "", &a), 0);
	close(f.l.fds[0]);
	open_scored(&f, &q, 31, &a);
	assert_int_equal(wq_append(&q, 400), 0);
	assert_int_equal(wq_plan(&q, KEEP, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
	write_weights(&f, 2, 22);
	file_of(&f, path, sizeof(path));
	harness_call(&f.h, load_weights, path);
	new = policy_at(&f);
	assert_int_equal(ask_scorer(&f.l, "", &b), 0);
	close(f.l.fds[0]);
	assert_int_not_equal(a.id, b.id);
	open_scored(&f, &r, 32, &b);
	open_scored(&f, &s, 33, &a); /* who has it may go on with it */
	for (int i = 0; i < 3; i++) {
		struct wseq *all[] = {&q, &r, &s};

		for (int k = 0; k < 3; k++) {
			assert_int_equal(wq_append(all[k], 300), 0);
			assert_int_equal(wq_plan(all[k], KEEP, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
			assert_best(k == 1 ? new : old, all[k]);
			assert_int_equal(wq_wrong(all[k]), 0);
		}
	}
	/* Who never had it may not. */
	assert_int_equal(wl_connect(&other, f.h.sock[0]), 0);
	register_kvp(&other);
	wq_free(&s);
	{
		struct wire_budget budget = wq_budget(KEEP, 0, 0);

		assert_int_equal(wq_make(&s, &other, 34, 100, 100, 300, 256 << 10, 256 << 10, 2), 0);
		assert_int_equal(wq_open(&s, W_OP_OPEN, KVT_EPHEMERAL, a.id, 0, &budget), KVT_E_STALE);
	}
	wl_close(&other);
	old->ops->free(old);
	new->ops->free(new);
	wq_free(&q);
	wq_free(&r);
	wq_free(&s);
	finish(&f);
}

/* Lanes divide what they have by what rows are worth, as they do in regions. */
static void budgets_adapt(void **state)
{
	const struct calibrate_shape table = {.lanes = LANES, .knots = 2, .lengths = 1, .distances = 1};
	_cleanup_free_ uint8_t *image = make_image(shape(2), calibrate_bytes(&table), 23);
	float *t = (float *)(image + ((struct weights_header *)image)->calib_off);
	struct wire_scorer_reply a;
	struct fixture f;
	struct wseq q;
	uint32_t sum = 0;

	calibrate_begin(t, &table);
	for (uint32_t l = 0; l < LANES; l++) {
		const float lane[5] = {1, -20, 20, 0, 8.0f / (float)(1u << l)};

		memcpy(t + calibrate_head(&table) + l * calibrate_stride(&table), lane, sizeof(lane));
	}
	weights_image_seal(image, image_size(image));
	begin_kvp(&f, 2, image);
	assert_int_equal(ask_scorer(&f.l, "", &a), 0);
	close(f.l.fds[0]);
	open_scored(&f, &q, 35, &a);
	for (int i = 0; i < 3; i++) {
		assert_int_equal(wq_append(&q, 400), 0);
		assert_int_equal(wq_plan(&q, KEEP, KVT_ROWS_ALL, KVT_ROWS_ALL), 0);
		assert_int_equal(wq_wrong(&q), 0);
	}
	for (uint32_t l = 0; l < LANES; l++)
		sum += q.count[l];
	assert_int_equal(sum, KEEP * LANES);
	assert_true(q.count[0] > q.count[LANES - 1] + 50);
	assert_no_miss(&f);
	wq_free(&q);
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(scores_of_a_growing_sequence_follow_its_length),
		cmocka_unit_test(open_sequences_keep_the_network_that_they_run),
		cmocka_unit_test(budgets_adapt),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
