/* SPDX-License-Identifier: MIT */
/* Rankings and their cost against definitions written out; the bootstrap on data of known spread. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "policy/eval/boot.h"
#include "policy/eval/metric.h"
#include "policy/eval/rivals.h"
#include "policy/train/noise.h"
#include "shm/util.h"

enum { MAX_N = 6000 };

static float u[UTILITIES][MAX_N], score[MAX_N];
static uint32_t order[MAX_N], best[MAX_N], scratch[2 * MAX_N];

static float noise(uint32_t a, uint32_t b)
{
	return train_noise(7, a, 0, 0, 0, b);
}

/* Place of row i: rows with a higher score come first, and of equal ones the later. */
static uint32_t place(const float *s, uint32_t n, uint32_t i)
{
	uint32_t before = 0;

	for (uint32_t j = 0; j < n; j++)
		before += s[j] > s[i] || (s[j] == s[i] && j > i);
	return before;
}

static void test_rank(void **state)
{
	static const float odd[] = {0.0f, -0.0f, 1e-45f, -1e-45f, 3e38f, -3e38f, 1, 1, -1, -1, 60000, 0.0f};

	for (uint32_t n = 0; n < 300; n += 7) {
		for (uint32_t i = 0; i < n; i++)
			score[i] = i % 3 ? rintf(noise(n, i) * 20 - 10) : odd[i % ARRAY_SIZE(odd)];
		rank_rows(score, n, order, scratch);
		for (uint32_t k = 0; k < n; k++)
			assert_int_equal(place(score, n, order[k]), k);
	}
}

static struct metric_cut cut_of(uint32_t prompt, uint32_t queries)
{
	struct metric_cut c = {.prompt = prompt, .queries = queries, .n = prompt - PROTECTED, .best = best};

	for (int k = 0; k < UTILITIES; k++)
		c.u[k] = u[k];
	rank_rows(u[UTILITY_MAX], c.n, best, scratch);
	metric_prepare(&c);
	return c;
}

static void draw_utilities(uint32_t n, uint32_t seed)
{
	for (int k = 0; k < UTILITIES; k++)
		for (uint32_t i = 0; i < n; i++)
			u[k][i] = powf(noise(seed + (uint32_t)k, i), 6) * 10;
}

/* Regret of `s` among rows whose distance to the end lies in [from, to), by the definition. */
static double plain_regret(const float *s, uint32_t prompt, uint32_t from, uint32_t to)
{
	static float su[MAX_N], ss[MAX_N];
	double cost = 0, ideal = 0, sum = 0;
	uint32_t m = 0;

	for (uint32_t i = 0; i < prompt - PROTECTED; i++) {
		uint32_t distance = prompt - 1 - (PROTECT_FIRST + i);

		if (distance < from || distance >= to)
			continue;
		su[m] = u[UTILITY_MAX][i];
		ss[m++] = s[i];
	}
	for (uint32_t i = 0; i < m; i++) {
		cost += (place(ss, m, i) + 1.0) * su[i];
		ideal += (place(su, m, i) + 1.0) * su[i];
		sum += su[i];
	}
	if (m < LEAST_BUCKET)
		return NAN;
	return (cost - ideal) / ((m + 1) / 2.0 * sum - ideal);
}

static void same(float got, double want)
{
	if (isnan(want))
		assert_true(isnan(got));
	else
		assert_float_equal(got, want, 1e-5);
}

static void test_regret(void **state)
{
	static const uint32_t prompts[] = {52, 149, 700, 2300, 5200};
	float out[METRICS];

	for (size_t p = 0; p < ARRAY_SIZE(prompts); p++) {
		uint32_t prompt = prompts[p], n = prompt - PROTECTED, from = 0;
		struct metric_cut c;

		draw_utilities(n, 10 * (uint32_t)p);
		c = cut_of(prompt, 100);
		for (uint32_t i = 0; i < n; i++)
			score[i] = u[UTILITY_MAX][i] + noise(99, i);
		rank_rows(score, n, order, scratch);
		metric_of(&c, order, out);
		same(out[METRIC_REGRET], plain_regret(score, prompt, 0, UINT32_MAX));
		same(out[METRIC_FAR], plain_regret(score, prompt, 128, UINT32_MAX));
		for (int b = 0; b < EVAL_BUCKETS; b++) {
			same(out[METRIC_BUCKET + b], plain_regret(score, prompt, from, eval_bucket_end[b]));
			from = eval_bucket_end[b];
		}
		assert_true(out[METRIC_REGRET] > 0 && out[METRIC_REGRET] < 1);
		assert_true(isnan(out[METRIC_ERROR]));
	}
}

static void test_ratio(void **state)
{
	float out[METRICS];
	struct metric_cut c;
	double cost = 0, ideal = 0;

	draw_utilities(280, 3);
	c = cut_of(300, 10);
	for (uint32_t i = 0; i < c.n; i++) {
		order[i] = c.n - 1 - i;
		cost += (i + 1.0) * u[0][c.n - 1 - i];
		ideal += (i + 1.0) * u[0][best[i]];
	}
	metric_of(&c, order, out);
	assert_float_equal(out[METRIC_RATIO], cost / ideal, 1e-4);
	for (uint32_t i = 0; i < c.n; i++) /* one row holds everything: the ratio is n and is clamped */
		u[0][i] = i == 7 ? 1 : 0;
	c = cut_of(300, 10);
	for (uint32_t i = 0; i < c.n; i++)
		order[i] = (8 + i) % c.n;
	metric_of(&c, order, out);
	assert_float_equal(out[METRIC_RATIO], 200, 1e-6);
}

static void test_oracle_and_random(void **state)
{
	float out[METRICS];
	double sum = 0;
	struct metric_cut c;

	draw_utilities(980, 50);
	c = cut_of(1000, 64);
	metric_of(&c, best, out);
	for (int m = METRIC_REGRET; m < METRIC_EVICTED; m++)
		if (m != METRIC_RATIO && !isnan(out[m]))
			assert_float_equal(out[m], 0, 1e-12);
	assert_float_equal(out[METRIC_RATIO], 1, 1e-6);
	for (uint32_t round = 0; round < 200; round++) {
		for (uint32_t i = 0; i < c.n; i++)
			score[i] = noise(1000 + round, i);
		rank_rows(score, c.n, order, scratch);
		metric_of(&c, order, out);
		sum += out[METRIC_REGRET];
	}
	assert_float_equal(sum / 200, 1, 0.02);
	for (uint32_t i = 0; i < c.n; i++) /* the worst order: as far above random as the best is below */
		order[i] = best[c.n - 1 - i];
	metric_of(&c, order, out);
	assert_float_equal(out[METRIC_REGRET], 2, 1e-5);
}

static void test_evicted(void **state)
{
	float out[METRICS];
	uint32_t prompt = 700, n = prompt - PROTECTED;
	struct metric_cut c;

	draw_utilities(n, 30);
	c = cut_of(prompt, 100);
	for (uint32_t i = 0; i < n; i++)
		score[i] = noise(5, i);
	rank_rows(score, n, order, scratch);
	metric_of(&c, order, out);
	for (int k = 0; k < UTILITIES; k++)
		for (int b = 0; b < EVAL_BUDGETS; b++) {
			double lost = 0, all = 0;

			for (uint32_t i = 0; i < n; i++) {
				all += u[k][i];
				if (place(score, n, i) >= lrint((double)eval_budget[b] * n))
					lost += u[k][i];
			}
			/* 5 % of 700 rows are fewer than 64: not reported */
			same(out[METRIC_EVICTED + k * EVAL_BUDGETS + b], b == 0 ? NAN : lost / all);
		}
	c.u[UTILITY_VALUE] = NULL;
	metric_prepare(&c);
	metric_of(&c, order, out);
	assert_true(isnan(out[METRIC_EVICTED + UTILITY_VALUE * EVAL_BUDGETS + 2]));
	assert_true(metric_too_small(0.1f, 639) && !metric_too_small(0.1f, 640));
}

/* A cut that cannot tell rankings apart says nothing rather than something arbitrary. */
static void test_says_nothing(void **state)
{
	float out[METRICS];
	struct metric_cut c;

	for (uint32_t i = 0; i < 480; i++)
		u[0][i] = u[1][i] = u[2][i] = 0;
	c = cut_of(500, 64);
	metric_of(&c, best, out);
	for (int m = 0; m < METRICS; m++)
		assert_true(isnan(out[m]));
	for (uint32_t i = 0; i < 480; i++)
		u[0][i] = 1; /* every order costs the same */
	c = cut_of(500, 64);
	metric_of(&c, best, out);
	assert_true(isnan(out[METRIC_REGRET]) && isnan(out[METRIC_RATIO]));
	assert_float_equal(out[METRIC_EVICTED + EVAL_BUDGETS - 1], 0.5, 1e-6);
}

static void test_names(void **state)
{
	char name[40], other[40];

	metric_name(METRIC_REGRET, name, sizeof(name));
	assert_string_equal(name, "regret");
	metric_name(METRIC_EVICTED + UTILITY_VALUE * EVAL_BUDGETS + 2, name, sizeof(name));
	assert_string_equal(name, "evicted_value_20");
	metric_name(METRIC_ERROR + 1, name, sizeof(name));
	assert_string_equal(name, "error_25");
	for (uint32_t a = 0; a < METRICS; a++)
		for (uint32_t b = 0; b < a; b++) {
			metric_name(a, name, sizeof(name));
			metric_name(b, other, sizeof(other));
			assert_string_not_equal(name, other);
		}
}

/* CurDKV as published by default, written out for one row in the middle and one in the short last window. */
static void test_cur_local(void **state)
{
	float k[37], v[37], s[37];

	for (uint32_t i = 0; i < 37; i++) {
		k[i] = 1 + noise(1, i);
		v[i] = 1 + noise(2, i);
	}
	rival_cur_local(k, v, 37, s);
	for (uint32_t i = 4; i < 37; i++) {
		double ks = 0, vs = 0;

		for (uint32_t j = i / 16 * 16; j < MIN(i / 16 * 16 + 16, 37u); j++) {
			ks += k[j] * k[j];
			vs += v[j] * v[j];
		}
		assert_float_equal(s[i], k[i] * k[i] / ks * v[i] * v[i] / vs, 1e-6);
	}
	for (uint32_t i = 0; i < 4; i++)
		assert_true(s[i] > 1);
}

/* ---- bootstrap ------------------------------------------------------------------------ */

static float normal(uint32_t a, uint32_t b)
{
	return sqrtf(-2 * logf(noise(a, 2 * b))) * cosf(6.2831853f * noise(a, 2 * b + 1));
}

static void test_boot_means(void **state)
{
	enum { D = 6, C = 3, B = 500 };
	float x[D][C], point[C];
	static float mean[B][C];
	struct boot b;

	assert_int_equal(boot_init(&b, B, D, 1), 0);
	for (uint32_t d = 0; d < D; d++) {
		x[d][0] = noise(3, d);
		x[d][1] = x[d][0] - 0.25f;
		x[d][2] = d < 2 ? (float)d : NAN; /* only two documents have it */
	}
	assert_int_equal(boot_means(&b, &x[0][0], C, point, &mean[0][0]), 0);
	for (uint32_t r = 0; r < B; r++) {
		double sum = 0, weights = 0;

		for (uint32_t d = 0; d < D; d++) {
			sum += b.weight[r * D + d] * x[d][0];
			weights += b.weight[r * D + d];
		}
		assert_float_equal(weights, D, 0);
		assert_float_equal(mean[r][0], sum / D, 1e-5);
		assert_float_equal(mean[r][0] - mean[r][1], 0.25, 1e-5); /* paired: a constant stays one */
		if (b.weight[r * D] + b.weight[r * D + 1] > 0)
			assert_float_equal(mean[r][2],
					   b.weight[r * D + 1] / (b.weight[r * D] + b.weight[r * D + 1]), 1e-5);
		else
			assert_true(isnan(mean[r][2]));
	}
	assert_float_equal(point[2], 0.5, 1e-6);
	boot_done(&b);
}

/* 95 % intervals of a mean of 40 documents cover the truth about 95 times in 100 (percentile: a little less).
 */
static void test_boot_coverage(void **state)
{
	enum { D = 40, C = 400, B = 1000 };
	static float x[D][C], mean[B][C], point[C], column[B];
	uint32_t covered = 0;
	struct boot b;

	for (uint32_t d = 0; d < D; d++)
		for (uint32_t c = 0; c < C; c++)
			x[d][c] = 3 + normal(c, d);
	assert_int_equal(boot_init(&b, B, D, 2), 0);
	assert_int_equal(boot_means(&b, &x[0][0], C, point, &mean[0][0]), 0);
	for (uint32_t c = 0; c < C; c++) {
		struct interval i;

		for (uint32_t r = 0; r < B; r++)
			column[r] = mean[r][c];
		i = boot_interval(point[c], column, B);
		assert_true(i.lo < i.mean && i.mean < i.hi);
		covered += i.lo <= 3 && 3 <= i.hi;
	}
	boot_done(&b);
	assert_in_range(covered, 362, 392); /* 90.5 to 98 % of 400 */
}

static void test_interval(void **state)
{
	static float v[2001];
	struct interval i;

	for (uint32_t k = 0; k <= 2000; k++) /* 0 ... 2000 in some order, and two that are missing */
		v[k] = (float)(k * 1237u % 2001);
	i = boot_interval(1, v, 2001);
	assert_float_equal(i.lo, 50, 0);
	assert_float_equal(i.hi, 1950, 0);
	v[3] = v[99] = NAN;
	i = boot_interval(1, v, 2001);
	assert_true(fabsf(i.lo - 50) < 3 && fabsf(i.hi - 1950) < 3);
	for (uint32_t k = 0; k < 100; k++)
		v[k] = 5;
	i = boot_interval(5, v, 100);
	assert_true(i.lo == 5 && i.hi == 5);
	v[0] = NAN;
	i = boot_interval(5, v, 1);
	assert_true(isnan(i.lo) && isnan(i.hi));
}

static void test_p_and_holm(void **state)
{
	float v[999];
	double p[5] = {0.01, 0.04, 0.03, 0.005, 0.5};

	for (uint32_t k = 0; k < 999; k++)
		v[k] = k < 9 ? 1 : -1;
	assert_float_equal(boot_p(v, 999), 2 * 10 / 1000.0, 1e-12);
	for (uint32_t k = 0; k < 999; k++)
		v[k] = 0;
	assert_float_equal(boot_p(v, 999), 1, 0);
	boot_holm(p, 5);
	assert_float_equal(p[3], 0.025, 1e-12);
	assert_float_equal(p[0], 0.04, 1e-12);
	assert_float_equal(p[2], 0.09, 1e-12);
	assert_float_equal(p[1], 0.09, 1e-12); /* 0.08, but never below the one before */
	assert_float_equal(p[4], 0.5, 1e-12);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_rank),       cmocka_unit_test(test_regret),
		cmocka_unit_test(test_ratio),      cmocka_unit_test(test_oracle_and_random),
		cmocka_unit_test(test_evicted),    cmocka_unit_test(test_says_nothing),
		cmocka_unit_test(test_names),      cmocka_unit_test(test_cur_local),
		cmocka_unit_test(test_boot_means), cmocka_unit_test(test_boot_coverage),
		cmocka_unit_test(test_interval),   cmocka_unit_test(test_p_and_holm),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
