/* SPDX-License-Identifier: MIT */
/* The two small learned policies: position-only tables and q-filters. */
#include "kvp_fixture.h"

#include <float.h>
#include <math.h>

/* Knots at 0, 1, 3, 7, 15 ... (one per octave): `dist` falls by one per knot, `index` is 100 at position 0
 * only. */
static void save_ramp(uint32_t per_octave)
{
	struct weights_header h = shape_position();
	_cleanup_free_ uint8_t *image = NULL;
	char err[256];

	h.pos_dim = per_octave;
	assert_int_equal(weights_image_new(&image, &h, 0, err, sizeof(err)), 0);
	for (uint32_t lane = 0; lane < 2; lane++) {
		float *dist = weights_image_at(image, lane, POSITION_DIST);
		float *index = weights_image_at(image, lane, POSITION_INDEX);

		for (uint32_t i = 0; i < h.pos_rows; i++)
			dist[i] = -(float)(i + 1000 * lane);
		index[0] = 100;
	}
	weights_image_seal(image, image_size(image));
	assert_int_equal(weights_image_write(image, fixture_file), 0);
}

static float position_score(struct policy *p, uint32_t lane, uint32_t pos, uint32_t total)
{
	struct policy_batch b = {.lane = lane, .n = 1, .first_pos = pos, .total = total};
	float score = NAN;

	assert_int_equal(p->ops->score(p, &b, &score), 0);
	return score;
}

static void position_tables_are_read_as_documented(void **state)
{
	struct policy *p;

	save_ramp(1);
	p = make_policy(&policy_position_ops, shape_position(), ROW_OPAQUE, NULL);
	assert_true(position_score(p, 0, 500, 501) == 0);  /* newest row: distance 0, knot 0 */
	assert_true(position_score(p, 0, 500, 502) == -1); /* distance 1, knot log2(2) = 1 */
	assert_true(position_score(p, 0, 500, 508) == -3); /* distance 7 */
	assert_true(fabsf(position_score(p, 0, 500, 506) + log2f(6)) < 1e-5f); /* distance 5, between knots */
	assert_true(position_score(p, 0, 500, 500 + (1u << 18)) == -18);
	assert_true(position_score(p, 0, 500, UINT32_MAX) == -19); /* past the last knot: flat */
	assert_true(position_score(p, 0, 0, 1) == 100);
	assert_true(position_score(p, 0, 1, 2) == 0);         /* index table: zero from knot 1 on */
	assert_true(position_score(p, 0, 700, 500) == 0);     /* a row past the end counts as the newest */
	assert_true(position_score(p, 1, 500, 502) == -1001); /* the lane's own tables */
	p->ops->free(p);

	save_ramp(4);
	p = make_policy(&policy_position_ops, shape_position(), ROW_OPAQUE, NULL);
	assert_true(position_score(p, 0, 500, 502) == -4);
	assert_true(position_score(p, 0, 500, 508) == -12);
	p->ops->free(p);
}

static void position_batches_use_their_positions(void **state)
{
	uint32_t pos[3] = {0, 90, 99};
	struct policy_batch b = {.n = 3, .pos = pos, .total = 100, .first_pos = 7};
	struct policy *p;
	float s[3];

	save_ramp(1);
	p = make_policy(&policy_position_ops, shape_position(), ROW_OPAQUE, NULL);
	assert_int_equal(p->ops->score(p, &b, s), 0);
	for (int i = 0; i < 3; i++)
		assert_true(s[i] == position_score(p, 0, pos[i], 100));
	assert_true(s[2] > s[1]);
	b.lane = 2;
	assert_int_equal(p->ops->score(p, &b, s), -EINVAL);
	p->ops->free(p);
	policy_position_ops.free(NULL);
}

/* The distance grows with the sequence: what may be kept of a row is its coefficient, not its score. */
static void position_scores_are_separable(void **state)
{
	uint32_t pos[3] = {0, 90, 99};
	struct policy_batch b = {.lane = 1, .n = 3, .pos = pos, .total = 100};
	float coef[3], s[3], combined[3];
	struct policy *p;

	save_ramp(2);
	p = make_policy(&policy_position_ops, shape_position(), ROW_OPAQUE, NULL);
	assert_true(policy_position_ops.caps & POLICY_SEPARABLE && policy_position_ops.caps & POLICY_STATIC);
	assert_int_equal(p->ops->coefs_per_row(p), 1);
	assert_int_equal(p->ops->coefs(p, &b, (float *const[]){coef}), 0);
	for (b.total = 100; b.total < 100000; b.total *= 3) {
		assert_int_equal(p->ops->score(p, &b, s), 0);
		assert_int_equal(p->ops->combine(p, &b, (const float *const[]){coef}, combined), 0);
		assert_memory_equal(s, combined, sizeof(s));
	}
	coef[1] = NAN;
	assert_int_equal(p->ops->combine(p, &b, (const float *const[]){coef}, combined), 0);
	assert_true(combined[1] == -FLT_MAX && combined[2] == s[2]);
	b.lane = 2;
	assert_int_equal(p->ops->combine(p, &b, (const float *const[]){coef}, combined), -EINVAL);
	assert_int_equal(p->ops->coefs(p, &b, (float *const[]){coef}), -EINVAL);
	p->ops->free(p);
}

/* Knots as large as floats go: sums and differences overflow, scores must not. */
static void position_scores_are_finite(void **state)
{
	struct weights_header h = shape_position();
	_cleanup_free_ uint8_t *image = make_image(h, 0, 1);
	struct policy *p;

	for (uint32_t i = 0; i < h.pos_rows; i++) {
		((float *)weights_image_at(image, 0, POSITION_DIST))[i] = i % 2 ? FLT_MAX : -FLT_MAX;
		((float *)weights_image_at(image, 0, POSITION_INDEX))[i] = i % 3 ? FLT_MAX : -FLT_MAX;
	}
	weights_image_seal(image, image_size(image));
	assert_int_equal(weights_image_write(image, fixture_file), 0);
	p = make_policy(&policy_position_ops, h, ROW_OPAQUE, NULL);
	for (uint32_t pos = 0; pos < 300; pos++)
		assert_true(isfinite(position_score(p, 0, pos, 300)));
	p->ops->free(p);
}

static void put(char *row, uint32_t i, enum row_dtype dtype, int value)
{
	static const uint16_t halves[] = {0, 0x3c00, 0x4000, 0x4200}; /* 0, 1, 2, 3 in binary16 */
	uint16_t half = dtype == ROW_F16 ? halves[value] : float_bf16((float)value);
	float whole = (float)value;

	if (dtype == ROW_F32)
		memcpy(row + i * 4, &whole, 4);
	else
		memcpy(row + i * 2, &half, 2);
}

static void qfilter_projects_keys(void **state)
{
	enum { DIM = 13, N = 7 }; /* any dim */
	struct weights_header h = shape_qfilter(DIM);
	char rows[N * (DIM * 4 + 3) + 1];
	float got[N];

	for (int dtype = ROW_F32; dtype <= ROW_BF16; dtype++) {
		_cleanup_free_ uint8_t *image = make_image(h, 0, 5);
		struct policy_batch b = {.n = N, .k = rows + 1, .k_stride = DIM * 4 + 3};
		struct policy *p;

		for (uint32_t lane = 0; lane < 2; lane++)
			for (uint32_t i = 0; i < DIM; i++)
				((float *)weights_image_at(image, lane, QFILTER_F))[i] = (float)(i + lane * 50);
		weights_image_seal(image, image_size(image));
		assert_int_equal(weights_image_write(image, fixture_file), 0);
		p = make_policy(&policy_qfilter_ops, h, (enum row_dtype)dtype, NULL);
		memset(rows, 0xff, sizeof(rows));
		for (b.lane = 0; b.lane < 2; b.lane++) {
			for (uint32_t r = 0; r < N; r++)
				for (uint32_t i = 0; i < DIM; i++)
					put(rows + 1 + r * b.k_stride, i, (enum row_dtype)dtype,
					    (int)(i * r + r) % 4);
			assert_int_equal(p->ops->score(p, &b, got), 0);
			for (uint32_t r = 0; r < N; r++) {
				int want = 0;

				for (uint32_t i = 0; i < DIM; i++)
					want -= (int)(i + b.lane * 50) * ((int)(i * r + r) % 4);
				assert_true(got[r] == (float)want);
			}
		}
		p->ops->free(p);
	}
	policy_qfilter_ops.free(NULL);
}

static void qfilter_survives_hostile_rows(void **state)
{
	struct weights_header h = shape_qfilter(16);
	float rows[3][16] = {{INFINITY, -INFINITY}, {NAN}, {FLT_MAX, FLT_MAX, FLT_MAX}}, got[3];
	struct policy_batch b = {.n = 3, .k = rows, .k_stride = sizeof(rows[0])};
	struct policy *p;

	save_random(h, 2);
	p = make_policy(&policy_qfilter_ops, h, ROW_F32, NULL);
	assert_int_equal(p->ops->score(p, &b, got), 0);
	assert_true(got[0] == -FLT_MAX && got[1] == -FLT_MAX && isfinite(got[2]));
	b.k = NULL;
	assert_int_equal(p->ops->score(p, &b, got), -EINVAL);
	b.k = rows;
	b.lane = 2;
	assert_int_equal(p->ops->score(p, &b, got), -EINVAL);
	p->ops->free(p);
}

static void kinds_have_their_policies(void **state)
{
	assert_ptr_equal(policy_for_kind(WEIGHTS_KVP), &policy_kvp_ops);
	assert_ptr_equal(policy_for_kind(WEIGHTS_POSITION), &policy_position_ops);
	assert_ptr_equal(policy_for_kind(WEIGHTS_QFILTER), &policy_qfilter_ops);
	assert_null(policy_for_kind(0));
	assert_null(policy_for_kind(4));
	for (uint32_t kind = 1; kind <= 3; kind++)
		assert_string_equal(weights_kind_name(kind), policy_for_kind(kind)->name);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(position_tables_are_read_as_documented),
		cmocka_unit_test(position_batches_use_their_positions),
		cmocka_unit_test(position_scores_are_separable),
		cmocka_unit_test(position_scores_are_finite),
		cmocka_unit_test(qfilter_projects_keys),
		cmocka_unit_test(qfilter_survives_hostile_rows),
		cmocka_unit_test(kinds_have_their_policies),
	};

	return cmocka_run_group_tests_name("policy/learned", tests, fixture_setup, fixture_teardown);
}
