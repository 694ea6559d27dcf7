/* SPDX-License-Identifier: MIT */
/* The KVP network: the reference against fp64 arithmetic, the vector kernels against the reference. */
#include "kvp_double.h"

#include <float.h>
#include <math.h>
#include <pthread.h>

#define MAX_ROWS 1000
#define FP32_LIMIT 1e-4
#define BF16_LIMIT 2e-2 /* random weights whose scores spread by about one; the reference rounds nothing */

static const char *const vector_isas[] = {"avx2", "avx512-fp32", "avx512-bf16"};

static double limit_of(const char *isa)
{
	return strcmp(isa, "avx512-bf16") == 0 ? BF16_LIMIT : FP32_LIMIT;
}

static double largest_difference(const float *a, const float *b, uint32_t n)
{
	double worst = 0;

	for (uint32_t i = 0; i < n; i++)
		worst = fmax(worst, fabs((double)a[i] - b[i]));
	return worst;
}

static double spread(const float *a, uint32_t n)
{
	double sum = 0, squares = 0;

	for (uint32_t i = 0; i < n; i++) {
		sum += a[i];
		squares += (double)a[i] * a[i];
	}
	return sqrt(squares / n - sum / n * (sum / n));
}

/* ---- the reference ---- */

static void check_ref(struct weights_header h)
{
	struct rows r = make_rows(9, h.k_dim, h.v_dim, ROW_F32, 0, 0);
	struct policy *p;
	struct weights *w;
	float scores[9];
	char err[256];

	save_random(h, 7);
	assert_int_equal(weights_load(&w, fixture_file, err, sizeof(err)), 0);
	p = make_policy(&policy_kvp_ops, h, ROW_F32, "ref");
	for (r.batch.lane = 0; r.batch.lane < 2; r.batch.lane++) {
		r.batch.first_pos = h.pos_rows - 4; /* the last five rows share a position table's last entry */
		r.batch.total = h.pos_rows + 200;
		assert_int_equal(p->ops->score(p, &r.batch, scores), 0);
		for (uint32_t i = 0; i < r.batch.n; i++) {
			double want = score64(w, r.batch.lane, (const float *)r.batch.k + i * h.k_dim,
					      (const float *)r.batch.v + i * h.v_dim, r.batch.first_pos + i,
					      r.batch.total);

			assert_true(fabs(scores[i] - want) < 2e-5);
		}
		assert_true(spread(scores, r.batch.n) > 0.2);
	}
	p->ops->free(p);
	weights_free(w);
	free(r.mem);
}

static void reference_is_the_definition(void **state)
{
	check_ref(shape_kvp(64, 64));
	check_ref(shape_kvp(128, 128));
	check_ref(shape_narrow());
	check_ref(shape_trained());
	check_ref(shape_narrow_trained());
}

/* ---- kernels ---- */

static void compare(struct weights_header h, enum row_dtype dtype, const char *isa, const uint32_t *counts,
		    size_t sizes)
{
	static float want[MAX_ROWS], got[MAX_ROWS];
	struct rows r = make_rows(MAX_ROWS, h.k_dim, h.v_dim, dtype, 6, 2);
	struct policy *ref = make_policy(&policy_kvp_ops, h, dtype, "ref"),
		      *fast = make_policy(&policy_kvp_ops, h, dtype, isa);
	uint32_t most = 0;

	for (size_t i = 0; i < sizes; i++)
		most = MAX(most, counts[i]);
	r.batch.n = most;
	assert_int_equal(ref->ops->score(ref, &r.batch, want), 0);
	for (size_t i = 0; fast && i < sizes; i++) {
		r.batch.n = counts[i];
		memset(got, 0xff, sizeof(got));
		assert_int_equal(fast->ops->score(fast, &r.batch, got), 0);
		if (!(largest_difference(got, want, counts[i]) < limit_of(isa)))
			fail_msg("%s dtype %d dim %u n %u: off by %g", isa, dtype, h.k_dim, counts[i],
				 largest_difference(got, want, counts[i]));
		if (counts[i] < MAX_ROWS)
			assert_true(isnan(got[counts[i]])); /* nothing written past the end */
	}
	if (fast)
		fast->ops->free(fast);
	else
		print_message("# %s: not on this CPU, not compared\n", isa);
	ref->ops->free(ref);
	free(r.mem);
}

static void kernels_match_the_reference(void **state)
{
	static const uint32_t counts[] = {1, 2, 17, 128}, many[] = {1000};
	struct weights_header shapes[] = {shape_kvp(64, 64), shape_kvp(128, 128), shape_narrow(),
					  shape_trained(), shape_narrow_trained()};

	for (size_t s = 0; s < ARRAY_SIZE(shapes); s++) {
		save_random(shapes[s], 11 + s);
		for (size_t i = 0; i < ARRAY_SIZE(vector_isas); i++) {
			for (int dtype = ROW_F32; dtype <= ROW_BF16; dtype++)
				compare(shapes[s], (enum row_dtype)dtype, vector_isas[i], counts,
					ARRAY_SIZE(counts));
			if (s == 0)
				compare(shapes[s], ROW_BF16, vector_isas[i], many, 1);
		}
	}
}

static void every_head_dim_and_width_is_computed(void **state)
{
	static const uint32_t counts[] = {50};
	struct weights_header h = shape_narrow();

	for (uint32_t x = 1; x <= 16; x++) {
		h.k_dim = 16 * x;
		h.v_dim = 16 * (17 - x);
		h.proj = 32 * (1 + x % 8);
		h.hidden = 32 * x;
		h.pos_dim = 16 * (1 + x % 4);
		save_random(h, x);
		for (size_t i = 0; i < ARRAY_SIZE(vector_isas); i++)
			compare(h, ROW_F32, vector_isas[i], counts, 1);
	}
}

/* All isas of this CPU, the reference included, on one file of 64-element rows. */
static void for_each_isa_of(struct weights_header h, void (*check)(struct policy *p, const char *isa))
{
	static const char *const names[] = {"ref", "avx2", "avx512-fp32", "avx512-bf16"};

	save_random(h, 3);
	for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
		struct policy *p = make_policy(&policy_kvp_ops, h, ROW_F32, names[i]);

		if (!p)
			continue;
		check(p, names[i]);
		p->ops->free(p);
	}
}

static void for_each_isa(void (*check)(struct policy *p, const char *isa))
{
	for_each_isa_of(shape_kvp(64, 64), check);
}

static void check_alone(struct policy *p, const char *isa)
{
	struct rows r = make_rows(61, 64, 64, ROW_F32, 0, 0);
	struct policy_batch one = r.batch;
	float all[61], again[61], alone;

	assert_int_equal(p->ops->score(p, &r.batch, all), 0);
	assert_int_equal(p->ops->score(p, &r.batch, again), 0);
	assert_memory_equal(all, again, sizeof(all));
	one.n = 1;
	for (uint32_t i = 0; i < r.batch.n; i++) {
		one.k = (const char *)r.batch.k + i * r.batch.k_stride;
		one.v = (const char *)r.batch.v + i * r.batch.v_stride;
		one.first_pos = r.batch.first_pos + i;
		assert_int_equal(p->ops->score(p, &one, &alone), 0);
		assert_memory_equal(&alone, &all[i], sizeof(alone));
	}
	free(r.mem);
}

static void a_score_depends_on_its_row_alone(void **state)
{
	for_each_isa(check_alone);
	for_each_isa_of(shape_trained(), check_alone);
}

static void check_positions(struct policy *p, const char *isa)
{
	struct rows r = make_rows(60, 64, 64, ROW_F32, 0, 0);
	float by_first[60], by_list[60], past[60], last[60], other[60];
	uint32_t pos[60];

	r.batch.first_pos = 0;
	for (uint32_t i = 0; i < r.batch.n; i++)
		pos[i] = i;
	assert_int_equal(p->ops->score(p, &r.batch, by_first), 0);
	r.batch.pos = pos;
	assert_int_equal(p->ops->score(p, &r.batch, by_list), 0);
	assert_memory_equal(by_first, by_list, sizeof(by_list));
	for (uint32_t i = 0; i < r.batch.n; i++)
		pos[i] = i % 2 ? UINT32_MAX : 6000 + i;
	assert_int_equal(p->ops->score(p, &r.batch, past), 0);
	for (uint32_t i = 0; i < r.batch.n; i++)
		pos[i] = 5999;
	assert_int_equal(p->ops->score(p, &r.batch, last), 0);
	assert_memory_equal(past, last, sizeof(last));
	for (uint32_t i = 0; i < r.batch.n; i++)
		pos[i] = 5998;
	assert_int_equal(p->ops->score(p, &r.batch, other), 0);
	for (uint32_t i = 0; i < r.batch.n; i++)
		assert_true(other[i] != last[i]);
	free(r.mem);
}

static void positions_are_clamped_to_the_table(void **state)
{
	for_each_isa(check_positions);
}

/* A hostile runtime's rows: scores stay finite, rank last, and the neighbours' scores do not change. */
static void check_hostile(struct policy *p, const char *isa)
{
	static const uint32_t words[] = {0x7f800000, 0xff800000, 0x7fc00000, 0x7f7fffff, 0xffffffff};
	struct rows r = make_rows(52, 64, 64, ROW_F32, 0, 0);
	float before[52], after[52];

	assert_int_equal(p->ops->score(p, &r.batch, before), 0);
	for (size_t i = 0; i < ARRAY_SIZE(words); i++)
		for (uint32_t j = 0; j < 64; j++)
			memcpy((char *)r.batch.k + 10 * i * r.batch.k_stride + j * 4, &words[i], 4);
	assert_int_equal(p->ops->score(p, &r.batch, after), 0);
	for (uint32_t i = 0; i < r.batch.n; i++) {
		assert_true(isfinite(after[i]));
		if (i % 10 == 0 && i < 50 && i != 30) /* the largest finite float may survive */
			assert_true(after[i] == -FLT_MAX);
		else if (i % 10 != 0)
			assert_memory_equal(&after[i], &before[i], sizeof(float));
	}
	free(r.mem);
}

static void rows_that_are_not_finite_rank_last(void **state)
{
	for_each_isa(check_hostile);
	for_each_isa_of(shape_trained(), check_hostile);
}

static void check_misuse(struct policy *p, const char *isa)
{
	struct rows r = make_rows(2, 64, 64, ROW_F32, 0, 0);
	float scores[2] = {5, 5};

	r.batch.lane = 2;
	assert_int_equal(p->ops->score(p, &r.batch, scores), -EINVAL);
	r.batch.lane = 0;
	r.batch.v = NULL;
	assert_int_equal(p->ops->score(p, &r.batch, scores), -EINVAL);
	r.batch.n = 0;
	assert_int_equal(p->ops->score(p, &r.batch, scores), 0);
	assert_true(scores[0] == 5 && scores[1] == 5);
	free(r.mem);
}

static void batches_that_make_no_sense_are_refused(void **state)
{
	for_each_isa(check_misuse);
	for_each_isa_of(shape_trained(), check_misuse);
	policy_kvp_ops.free(NULL);
}

struct job {
	struct policy *p;
	const struct policy_batch *batch;
	float scores[200];
};

static void *score_in_thread(void *arg)
{
	struct job *j = arg;

	for (int i = 0; i < 5; i++)
		j->p->ops->score(j->p, j->batch, j->scores);
	return NULL;
}

static void check_threads(struct policy *p, const char *isa)
{
	static struct job jobs[4];
	struct rows r = make_rows(200, 64, 64, ROW_F32, 0, 0), r2 = make_rows(200, 64, 64, ROW_F32, 0, 0);
	pthread_t threads[4];
	float want[2][200];

	r2.batch.lane = 0;
	assert_int_equal(p->ops->score(p, &r.batch, want[0]), 0);
	assert_int_equal(p->ops->score(p, &r2.batch, want[1]), 0);
	for (int i = 0; i < 4; i++) {
		jobs[i] = (struct job){.p = p, .batch = i % 2 ? &r2.batch : &r.batch};
		assert_int_equal(pthread_create(&threads[i], NULL, score_in_thread, &jobs[i]), 0);
	}
	for (int i = 0; i < 4; i++) {
		pthread_join(threads[i], NULL);
		assert_memory_equal(jobs[i].scores, want[i % 2], sizeof(want[0]));
	}
	free(r.mem);
	free(r2.mem);
}

static void threads_share_a_policy(void **state)
{
	for_each_isa(check_threads);
	for_each_isa_of(shape_trained(), check_threads);
}

/* With gain 0 the LayerNorm yields its shift, so the kernel's SiLU, and with it its e^x, stands alone. */
static void silu_is_exact_to_a_millionth(void **state)
{
	static const struct kvp_isa *const isas[] = {&kvp_avx2, &kvp_avx512_fp32};
	static float _Alignas(64) c[256], gain[256], shift[256], act[KVP_LD];

	for (size_t k = 0; k < ARRAY_SIZE(isas); k++) {
		if (!isas[k]->supported()) {
			print_message("# %s: not on this CPU\n", isas[k]->name);
			continue;
		}
		for (double from = -120; from < 120; from += 1) {
			for (int i = 0; i < 256; i++)
				shift[i] = (float)(from + i / 256.0);
			isas[k]->norm(act, c, 1, 256, (struct kvp_norm){gain, shift}, true);
			for (int i = 0; i < 256; i++) {
				double want = shift[i] / (1 + exp(-(double)shift[i]));

				/* Beyond e^87 the result is as good as zero and need only stay so. */
				assert_true(fabs(act[i] - want) <= 1e-6 * fabs(want) + 1e-35);
			}
		}
	}
}

static void best_isa_is_the_default(void **state)
{
	const struct kvp_isa *best, *wide;
	char err[128];

	assert_int_equal(kvp_isa_find(&best, NULL, err, sizeof(err)), 0);
	if (kvp_avx512_bf16.supported())
		assert_ptr_equal(best, &kvp_avx512_bf16);
	else if (kvp_avx2.supported())
		assert_non_null(best);
	if (kvp_isa_find(&wide, "avx512", err, sizeof(err)) == 0)
		assert_ptr_equal(wide, best);
	assert_int_equal(kvp_isa_find(&best, "ref", err, sizeof(err)), 0);
	assert_null(best);
	assert_int_equal(kvp_isa_find(&best, "", err, sizeof(err)), -EINVAL);
	assert_int_equal(kvp_isa_find(&best, "avx", err, sizeof(err)), -EINVAL);
}

static void halves_are_converted_exactly(void **state)
{
	for (uint32_t bits = 0; bits < 0x10000; bits++) {
		uint32_t e = bits >> 10 & 31, m = bits & 1023;
		double want = ldexp(e ? 1024 + m : m, (int)(e ? e : 1) - 25);
		float got = half_float((uint16_t)bits), back = bf16_float((uint16_t)bits);

		if (e == 31 && m)
			assert_true(isnan(got));
		else
			assert_true(got == (float)((bits & 0x8000 ? -1 : 1) * (e == 31 ? INFINITY : want)));
		if (!isnan(back))
			assert_int_equal(float_bf16(back), bits);
		else
			assert_true(isnan(bf16_float(float_bf16(back))));
	}
	assert_int_equal(float_bf16(1.00390625f), 0x3f80); /* halfway: to even */
	assert_int_equal(float_bf16(1.01171875f), 0x3f82);
	assert_int_equal(float_bf16(1.00390637f), 0x3f81);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(halves_are_converted_exactly),
		cmocka_unit_test(reference_is_the_definition),
		cmocka_unit_test(silu_is_exact_to_a_millionth),
		cmocka_unit_test(kernels_match_the_reference),
		cmocka_unit_test(every_head_dim_and_width_is_computed),
		cmocka_unit_test(a_score_depends_on_its_row_alone),
		cmocka_unit_test(positions_are_clamped_to_the_table),
		cmocka_unit_test(rows_that_are_not_finite_rank_last),
		cmocka_unit_test(batches_that_make_no_sense_are_refused),
		cmocka_unit_test(threads_share_a_policy),
		cmocka_unit_test(best_isa_is_the_default),
	};

	return cmocka_run_group_tests_name("policy/kvp", tests, fixture_setup, fixture_teardown);
}
