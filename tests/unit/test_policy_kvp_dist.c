/* SPDX-License-Identifier: MIT */
/* Keys before RoPE, and scores that follow the distance to the end: every isa against fp64. */
#include "kvp_double.h"

#include <float.h>

static const char *const isas[] = {"ref", "avx2", "avx512-fp32", "avx512-bf16"};

/* check() on a file of this shape for every isa of this CPU; the file itself is in *w. */
static void for_each_isa(struct weights_header h, void (*check)(struct policy *p, const struct weights *w))
{
	struct weights *w;
	char err[256] = "";

	save_random(h, 5);
	if (weights_load(&w, fixture_file, err, sizeof(err)) < 0)
		fail_msg("%s", err);
	for (size_t i = 0; i < ARRAY_SIZE(isas); i++) {
		struct policy *p = make_policy(&policy_kvp_ops, h, ROW_F32, isas[i]);

		if (p)
			check(p, w);
		else
			print_message("# %s: not on this CPU\n", isas[i]);
		if (p)
			p->ops->free(p);
	}
	weights_free(w);
}

/* ---- RoPE ---- */

/* As a model does it, from its definition. */
static void rotate(float *k, const struct weights_header *h, uint32_t pos)
{
	uint32_t half = h->k_dim / 2;

	for (uint32_t p = 0; p < half; p++) {
		bool pairs = h->rope_type == WEIGHTS_ROPE_PAIRS;
		float *a = &k[pairs ? 2 * p : p], *b = pairs ? a + 1 : a + half;
		double angle = pos / pow(h->rope_theta, (double)p / half), x = *a, y = *b;

		*a = (float)(x * cos(angle) - y * sin(angle));
		*b = (float)(y * cos(angle) + x * sin(angle));
	}
}

static const uint32_t far_positions[] = {0,     1,     63,     127,     128,     129,     1000,    8191,
					 16383, 16384, 100000, 1048575, 1048576, 1048577, 5000000, 1u << 31};

/* A file that asks for keys before RoPE sees in rotated keys what its twin sees in the originals. */
static void check_twins(struct weights_header h, const char *isa)
{
	enum { N = ARRAY_SIZE(far_positions) };
	struct rows r = make_rows(N, h.k_dim, h.v_dim, ROW_F32, 0, 0);
	float plain[N], undone[N], cached[N];
	struct policy *p;
	double most = 0;

	h.keys = WEIGHTS_KEYS_CACHED;
	r.batch.pos = far_positions;
	save_random(h, 9);
	p = make_policy(&policy_kvp_ops, h, ROW_F32, isa);
	if (!p) {
		free(r.mem);
		return;
	}
	assert_int_equal(p->ops->score(p, &r.batch, plain), 0);
	for (uint32_t i = 0; i < N; i++)
		rotate((float *)r.batch.k + i * h.k_dim, &h, far_positions[i]);
	assert_int_equal(p->ops->score(p, &r.batch, cached), 0);
	p->ops->free(p);

	h.keys = WEIGHTS_KEYS_UNROTATED;
	save_random(h, 9);
	p = make_policy(&policy_kvp_ops, h, ROW_F32, isa);
	assert_int_equal(p->ops->score(p, &r.batch, undone), 0);
	p->ops->free(p);
	for (uint32_t i = 0; i < N; i++) {
		double limit = strcmp(isa, "avx512-bf16") == 0 ? 4e-2 : 2e-4;

		if (!(fabs(undone[i] - plain[i]) < limit))
			fail_msg("%s dim %u rope %u position %u: %g, without RoPE %g", isa, h.k_dim,
				 h.rope_type, far_positions[i], (double)undone[i], (double)plain[i]);
	}
	for (uint32_t i = 0; i < N; i++)
		most = fmax(most, fabs(cached[i] - plain[i]));
	assert_true(most > 0.2); /* to have undone nothing would show */
	free(r.mem);
}

static void keys_are_unrotated(void **state)
{
	static const uint32_t dims[] = {16, 48, 64, 80, 256};

	for (size_t d = 0; d < ARRAY_SIZE(dims); d++)
		for (uint32_t rope = WEIGHTS_ROPE_HALF; rope <= WEIGHTS_ROPE_PAIRS; rope++)
			for (size_t i = 0; i < ARRAY_SIZE(isas); i++) {
				struct weights_header h = shape_trained();

				h.k_dim = dims[d];
				h.rope_type = rope;
				check_twins(h, isas[i]);
			}
}

static void models_without_rope_have_nothing_to_undo(void **state)
{
	struct weights_header h = shape_trained();
	struct rows r = make_rows(70, 64, 64, ROW_F32, 0, 0);
	float s[2][70];

	h.rope_type = WEIGHTS_ROPE_NONE;
	for (uint32_t keys = 0; keys < 2; keys++) {
		struct policy *p;

		h.keys = keys;
		save_random(h, 9);
		p = make_policy(&policy_kvp_ops, h, ROW_F32, NULL);
		assert_int_equal(p->ops->score(p, &r.batch, s[keys]), 0);
		p->ops->free(p);
	}
	assert_memory_equal(s[0], s[1], sizeof(s[0]));
	free(r.mem);
}

/* ---- coefficients and distances ---- */

#define ROWS 300

static void check_score_is_combined(struct policy *p, const struct weights *w)
{
	static float coef[2][ROWS], s[ROWS], c[ROWS], one;
	static const uint32_t totals[] = {0, 1, 100, 399, 400, 401, 1000, 8192, 30000, 1u << 20, UINT32_MAX};
	struct rows r = make_rows(ROWS, w->h.k_dim, w->h.v_dim, ROW_F32, 0, 0);
	const float *from[2] = {coef[0], coef[1]};
	uint32_t pos[ROWS], rank = w->h.rank;

	assert_int_equal(p->ops->coefs_per_row(p), rank);
	r.batch.total = 7; /* coefficients do not look at it */
	assert_int_equal(p->ops->coefs(p, &r.batch, (float *const[]){coef[0], coef[1]}), 0);
	for (uint32_t i = 0; i < ROWS; i++)
		pos[i] = 100 + i;
	for (size_t t = 0; t < ARRAY_SIZE(totals); t++) {
		struct policy_batch b = r.batch;

		b.total = totals[t];
		assert_int_equal(p->ops->score(p, &b, s), 0);
		b.k = b.v = NULL;
		assert_int_equal(p->ops->combine(p, &b, from, c), 0);
		assert_memory_equal(s, c, sizeof(s));
		b.pos = pos;
		b.first_pos = 77777;
		assert_int_equal(p->ops->combine(p, &b, from, c), 0);
		assert_memory_equal(s, c, sizeof(s));
		for (uint32_t i = 0; i < ROWS; i += 7) {
			struct policy_batch alone = {
				.lane = b.lane, .n = 1, .first_pos = pos[i], .total = b.total};
			const float *at[2] = {coef[0] + i, coef[1] + i};

			assert_int_equal(p->ops->combine(p, &alone, at, &one), 0);
			assert_memory_equal(&one, &s[i], sizeof(one));
		}
	}
	free(r.mem);
}

static void a_score_is_its_coefficients_combined(void **state)
{
	struct weights_header h = shape_trained();

	for_each_isa(h, check_score_is_combined);
	for_each_isa(shape_narrow_trained(), check_score_is_combined);
	h.rank = 1;
	for_each_isa(h, check_score_is_combined);
}

/* All distances of a long sequence, in pieces as the daemon takes them, and then scattered ones. */
static void check_distances(struct policy *p, const struct weights *w)
{
	enum { PIECE = 1024 };
	static float f[2][PIECE], s[PIECE];
	static const uint32_t totals[] = {1, 20, 1023, 5000, 40000, 1u << 20};
	const float *from[2] = {f[0], f[1]};
	uint32_t pos[PIECE];

	for (uint32_t i = 0; i < PIECE; i++) {
		f[0][i] = normal();
		f[1][i] = normal();
	}
	for (size_t t = 0; t < ARRAY_SIZE(totals); t++)
		for (uint32_t at = 0, n; at<totals[t]; at += totals[t]> 50000 ? 50 * PIECE + 3 : PIECE) {
			struct policy_batch b = {.lane = at / PIECE % 2, .first_pos = at, .total = totals[t]};

			b.n = n = MIN(PIECE, totals[t] - at);
			for (int scattered = 0; scattered < 2; scattered++) {
				for (uint32_t i = 0; i < n; i++)
					pos[i] = scattered ? (uint32_t)((uint64_t)i * totals[t] / n) : at + i;
				b.pos = scattered ? pos : NULL;
				assert_int_equal(p->ops->combine(p, &b, from, s), 0);
				for (uint32_t i = 0; i < n; i++) {
					double fi[2] = {f[0][i], f[1][i]},
					       want = combine64(w, b.lane, fi, pos[i], totals[t]);

					if (!(fabs(s[i] - want) < 1e-4))
						fail_msg("%u of %u: %g, must be %g", pos[i], totals[t],
							 (double)s[i], want);
				}
			}
		}
}

static void distances_are_read_as_documented(void **state)
{
	static const uint32_t octaves[] = {1, 2, 5, 64}, knots[] = {1, 2, 33, 200};
	struct weights_header h = shape_narrow_trained();

	for (size_t i = 0; i < ARRAY_SIZE(octaves); i++) {
		h.octave = octaves[i];
		h.dist_rows = knots[i];
		h.pos_rows = 1 + knots[i] / 2;
		h.rank = 1 + (uint32_t)i % 2;
		for_each_isa(h, check_distances);
	}
}

/* dist: phi_0 falls by one per knot, phi_1 rises by a quarter, the odd tables add a tenth of lambda. */
static void save_ramps(struct weights_header h)
{
	_cleanup_free_ uint8_t *image = make_image(h, 0, 1);

	for (uint32_t lane = 0; lane < 2; lane++) {
		uint16_t *d = weights_image_at(image, lane, KVP_DIST);

		for (uint32_t k = 0; k < h.dist_rows; k++) {
			d[k] = float_bf16(-(float)k);
			d[h.dist_rows + k] = float_bf16(0.125f);
			d[2 * h.dist_rows + k] = float_bf16(0.25f * (float)k);
			d[3 * h.dist_rows + k] = 0;
		}
	}
	weights_image_seal(image, image_size(image));
	assert_int_equal(weights_image_write(image, fixture_file), 0);
}

/* The same two rows, kept once: which ranks first changes as the sequence grows, where the formula says so. */
static void growth_changes_ranks_as_the_formula_says(void **state)
{
	struct weights_header h = shape_trained();
	const float f0[2] = {0, 1}, f1[2] = {4, 1}, *const coef[2] = {f0, f1};
	uint32_t pos[2] = {0, 50};

	save_ramps(h);
	for (size_t i = 0; i < ARRAY_SIZE(isas); i++) {
		struct policy *p = make_policy(&policy_kvp_ops, h, ROW_F32, isas[i]);
		float s[2];

		for (uint32_t n = 51; p && n < 60000; n = n * 2 + 1) {
			struct policy_batch b = {.n = 2, .pos = pos, .total = n};
			double t0 = 2 * log2(n), t1 = 2 * log2(n - 50),
			       lambda = fmin(fmax(log2(n), 8), 14) - 11;

			assert_int_equal(p->ops->combine(p, &b, coef, s), 0);
			/* 4 rising quarters hold the first row up; the second falls by three quarters a knot */
			assert_true(fabs(s[0] - 0.125 * lambda) < 1e-3);
			assert_true(fabs(s[1] - (1 - 0.75 * t1 + 0.125 * lambda)) < 1e-3);
			assert_true((s[0] > s[1]) == (t1 > 4.0 / 3));
			assert_true(t0 > t1);
		}
		if (p)
			p->ops->free(p);
	}
}

static void check_odd_coefs(struct policy *p, const struct weights *w)
{
	const float odd[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, 3e38f, 0, 1};
	enum { N = ARRAY_SIZE(odd) };
	float f[2][N * N], s[N * N];
	const float *coef[2] = {f[0], f[1]};
	struct policy_batch b = {.n = N * N, .first_pos = 3, .total = 500};

	for (int i = 0; i < N * N; i++) {
		f[0][i] = odd[i / N];
		f[1][i] = odd[i % N];
	}
	assert_int_equal(p->ops->combine(p, &b, coef, s), 0);
	for (int i = 0; i < N * N; i++) {
		assert_true(isfinite(s[i]));
		if (isnan(f[0][i]) || isnan(f[1][i]))
			assert_true(s[i] == -FLT_MAX);
	}
	b.lane = 2;
	assert_int_equal(p->ops->combine(p, &b, coef, s), -EINVAL);
	b.lane = b.n = 0;
	s[0] = 5;
	assert_int_equal(p->ops->combine(p, &b, coef, s), 0);
	assert_true(s[0] == 5);
}

static void coefficients_that_make_no_sense_rank_last(void **state)
{
	for_each_isa(shape_trained(), check_odd_coefs);
}

static void files_without_distances_are_plain_static(void **state)
{
	for (int ref = 0; ref < 2; ref++) {
		struct weights_header h = shape_narrow();
		struct policy_batch b = {.n = 1, .total = 5};
		struct policy *p;
		float f = 1, s = 0;

		save_random(h, 1);
		p = make_policy(&policy_kvp_ops, h, ROW_F32, ref ? "ref" : NULL);
		assert_int_equal(p->ops->coefs_per_row(p), 0);
		assert_int_equal(p->ops->combine(p, &b, (const float *const[]){&f, &f}, &s), -EINVAL);
		p->ops->free(p);
	}
}

static void separable_policies_have_what_it_takes(void **state)
{
	for (const struct policy_ops *const *p = policy_registry; *p; p++) {
		bool separable = (*p)->caps & POLICY_SEPARABLE;

		assert_true(separable == ((*p)->coefs_per_row != NULL) && separable == ((*p)->coefs != NULL) &&
			    separable == ((*p)->combine != NULL));
		assert_true(!separable || (*p)->caps & POLICY_STATIC);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(keys_are_unrotated),
		cmocka_unit_test(models_without_rope_have_nothing_to_undo),
		cmocka_unit_test(a_score_is_its_coefficients_combined),
		cmocka_unit_test(distances_are_read_as_documented),
		cmocka_unit_test(growth_changes_ranks_as_the_formula_says),
		cmocka_unit_test(coefficients_that_make_no_sense_rank_last),
		cmocka_unit_test(files_without_distances_are_plain_static),
		cmocka_unit_test(separable_policies_have_what_it_takes),
	};

	return cmocka_run_group_tests_name("policy/kvp-dist", tests, fixture_setup, fixture_teardown);
}
