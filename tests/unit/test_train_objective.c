/* SPDX-License-Identifier: MIT */
/*
 * The training objectives against what they claim to be: full enumeration of
 * Plackett-Luce at six rows, finite differences, the fp64 form, and, for the
 * sampled estimators, convergence of their mean to the exact gradient.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "policy/train/kern.h"
#include "policy/train/noise.h"
#include "policy/train/objective.h"
#include "shm/util.h"

#include <math.h>
#include <string.h>

#define N6 6

static float uniform(uint32_t salt, uint32_t i)
{
	return train_noise(7, salt, 0, 0, 0, i);
}

/* Scores spread over +-spread/2, utilities with a long tail, as attention has. */
static void make(float *s, float *u, uint32_t n, uint32_t salt, float spread)
{
	for (uint32_t i = 0; i < n; i++) {
		s[i] = spread * (uniform(salt, i) - 0.5f);
		u[i] = expf(-6.0f * uniform(salt + 1000, i)) * 0.01f;
	}
}

struct ground { /* of all 720 rankings */
	double cost, grad[N6];
};

/* Expected cost and its gradient, E[C (d log pi)], both by enumeration. */
static void enumerate(struct ground *t, const double *s, const double *u, uint32_t weighting)
{
	memset(t, 0, sizeof(*t));
	for (uint32_t code = 0; code < 720; code++) {
		uint32_t left[N6] = {0, 1, 2, 3, 4, 5}, order[N6], rest = code;
		double p = 1, cost = 0, dlog[N6] = {0};

		for (uint32_t r = 0; r < N6; r++) {
			uint32_t k = rest % (N6 - r);

			rest /= N6 - r;
			order[r] = left[k];
			memmove(left + k, left + k + 1, (N6 - r - k - 1) * sizeof(*left));
		}
		for (uint32_t r = 0; r < N6; r++) {
			double z = 0;

			for (uint32_t q = r; q < N6; q++)
				z += exp(s[order[q]]);
			p *= exp(s[order[r]]) / z;
			dlog[order[r]] += 1;
			for (uint32_t q = r; q < N6; q++)
				dlog[order[q]] -= exp(s[order[q]]) / z;
			cost += objective_weight(weighting, r + 1, N6) * u[order[r]];
		}
		t->cost += p * cost;
		for (uint32_t j = 0; j < N6; j++)
			t->grad[j] += p * cost * dlog[j];
	}
}

static void test_enumeration(void **state)
{
	struct objective_scratch *x;

	assert_int_equal(objective_scratch_new(&x, N6), 0);
	for (uint32_t salt = 1; salt <= 20; salt++) {
		float sf[N6], uf[N6], grad[N6];
		double s[N6], u[N6], exact[N6], loss, norm;
		struct unit_cost c;
		struct ground t;

		make(sf, uf, N6, salt, 6);
		for (int i = 0; i < N6; i++) {
			s[i] = (double)sf[i];
			u[i] = (double)uf[i];
		}
		objective_cost(&c, uf, N6, TRAIN_UNIFORM, x);
		assert_true(c.counted);
		enumerate(&t, s, u, TRAIN_UNIFORM);
		norm = c.random - c.best;
		assert_int_equal(objective_exact_ref(&loss, &c, TRAIN_REGRET, s, u, exact), 0);
		assert_true(fabs(loss - (t.cost - c.best) / norm) < 1e-10);
		for (int i = 0; i < N6; i++)
			assert_true(fabs(exact[i] - t.grad[i] / norm) < 1e-10);
		assert_true(fabs(objective_exact(&c, TRAIN_REGRET, sf, uf, grad, x) - loss) < 1e-5);
		for (int i = 0; i < N6; i++)
			assert_true(fabs((double)grad[i] - exact[i]) < 1e-5);

		assert_int_equal(objective_exact_ref(&loss, &c, TRAIN_RATIO, s, u, exact), 0);
		assert_true(fabs(loss - t.cost / c.best) < 1e-10);
		for (int i = 0; i < N6; i++)
			assert_true(fabs(exact[i] - t.grad[i] / c.best) < 1e-9);
	}
	objective_scratch_free(x);
}

/* Under any weighting the gradient is that of the loss which is returned. */
static void test_differences(void **state)
{
	enum { N = 57 };
	struct objective_scratch *x;

	assert_int_equal(objective_scratch_new(&x, N), 0);
	for (uint32_t weighting = TRAIN_UNIFORM; weighting <= TRAIN_LOG_UNIFORM; weighting++) {
		float sf[N], uf[N];
		double s[N], u[N], grad[N], other[N], loss, up, down;
		struct unit_cost c;

		make(sf, uf, N, 50 + weighting, 5);
		for (int i = 0; i < N; i++) {
			s[i] = (double)sf[i];
			u[i] = (double)uf[i];
		}
		objective_cost(&c, uf, N, weighting, x);
		assert_int_equal(objective_exact_ref(&loss, &c, TRAIN_REGRET, s, u, grad), 0);
		for (int i = 0; i < N; i++) {
			double at = s[i];

			s[i] = at + 1e-5;
			objective_exact_ref(&up, &c, TRAIN_REGRET, s, u, other);
			s[i] = at - 1e-5;
			objective_exact_ref(&down, &c, TRAIN_REGRET, s, u, other);
			s[i] = at;
			assert_true(fabs((up - down) / 2e-5 - grad[i]) < 1e-8);
		}
	}
	objective_scratch_free(x);
}

/* The fast form, on every instruction set, against fp64, up to the largest unit. */
static void test_fast(void **state)
{
	static const char *const isas[] = {"portable", "avx2", "avx512"};
	static const uint32_t sizes[] = {2, 31, 33, 1000, 2500};

	for (size_t k = 0; k < ARRAY_SIZE(isas) * ARRAY_SIZE(sizes) * 2; k++) {
		uint32_t n = sizes[k / 2 % ARRAY_SIZE(sizes)], weighting = k % 2;
		_cleanup_free_ float *f = calloc(3 * n, sizeof(float));
		_cleanup_free_ double *d = calloc(3 * n, sizeof(double));
		struct objective_scratch *x;
		struct unit_cost c;
		double loss, most = 0, off = 0;

		setenv("KVT_TRAIN_ISA", isas[k / 2 / ARRAY_SIZE(sizes)], 1);
		assert_int_equal(objective_scratch_new(&x, n), 0);
		unsetenv("KVT_TRAIN_ISA");
		make(f, f + n, n, 90, 30);
		for (uint32_t i = 0; i < 2 * n; i++)
			d[i] = (double)f[i];
		objective_cost(&c, f + n, n, weighting, x);
		assert_int_equal(objective_exact_ref(&loss, &c, TRAIN_REGRET, d, d + n, d + 2 * n), 0);
		assert_true(fabs(objective_exact(&c, TRAIN_REGRET, f, f + n, f + 2 * n, x) - loss) <
			    1e-5 * (1 + fabs(loss)));
		for (uint32_t i = 2 * n; i < 3 * n; i++) {
			most = MAX(most, fabs(d[i]));
			off = MAX(off, fabs(d[i] - (double)f[i]));
		}
		assert_true(off <= 2e-5 * most + 1e-12);
		objective_scratch_free(x);
	}
}

/* Sorting: descending, ties and NaN by row; the optimum is no worse than any other ranking. */
static void test_order(void **state)
{
	static const float key[] = {1, NAN, -0.0f, 3, 0.0f, -INFINITY, 3, INFINITY, -2};
	static const uint32_t want[] = {7, 3, 6, 0, 2, 4, 8, 5, 1};
	uint32_t order[ARRAY_SIZE(key)];
	float s[300], u[300];
	struct objective_scratch *x;
	struct unit_cost c;
	uint32_t o[300];

	assert_int_equal(objective_scratch_new(&x, 300), 0);
	objective_order(order, key, ARRAY_SIZE(key), x);
	assert_memory_equal(order, want, sizeof(want));
	make(s, u, 300, 5, 1);
	for (uint32_t w = TRAIN_UNIFORM; w <= TRAIN_LOG_UNIFORM; w++) {
		objective_cost(&c, u, 300, w, x);
		objective_order(o, u, 300, x);
		assert_true(fabs(objective_regret(&c, objective_ranked(&c, u, o, x))) < 1e-12);
		objective_order(o, s, 300, x);
		assert_true(objective_regret(&c, objective_ranked(&c, u, o, x)) > 0.5);
	}
	objective_scratch_free(x);
}

static void test_not_counted(void **state)
{
	enum { N = 40 };
	float s[N], u[N], grad[N], same[N];
	struct objective_scratch *x;
	struct unit_cost c;

	assert_int_equal(objective_scratch_new(&x, N), 0);
	make(s, u, N, 5, 1);
	for (int i = 0; i < N; i++) {
		same[i] = 0.25f;
		u[i] *= 1e-6f;
		grad[i] = 1;
	}
	objective_cost(&c, same, N, TRAIN_UNIFORM, x);
	assert_false(c.counted); /* all rankings cost the same */
	objective_cost(&c, u, N, TRAIN_UNIFORM, x);
	assert_false(c.counted); /* nothing is looked at */
	assert_true(objective_exact(&c, TRAIN_REGRET, s, u, grad, x) == 0);
	for (int i = 0; i < N; i++)
		assert_true(grad[i] == 0);
	objective_scratch_free(x);
}

/* Gradient of log pi by finite differences; scores far apart, where fp32 sums would fail. */
static void test_log_pi(void **state)
{
	enum { N = 25 };
	float s[N], u[N], at;
	uint32_t order[N];
	double grad[N] = {0}, up, down;
	struct objective_scratch *x;

	assert_int_equal(objective_scratch_new(&x, N), 0);
	make(s, u, N, 3, 8);
	s[4] = 60.0f;
	objective_draw(order, s, N, 1, 2, 3, 4, 5, x);
	assert_int_equal(order[0], 4);
	objective_log_pi(s, N, order, 1, grad, x);
	for (int i = 0; i < N; i++) {
		at = s[i];
		s[i] = at + 0x1p-9f;
		up = objective_log_pi(s, N, order, 1, NULL, x);
		s[i] = at - 0x1p-9f;
		down = objective_log_pi(s, N, order, 1, NULL, x);
		s[i] = at;
		assert_true(fabs((up - down) / 0x1p-8 - grad[i]) < 2e-5);
	}
	objective_scratch_free(x);
}

/*
 * The mean of -advantage * d log pi over many draws is the exact gradient, within five standard errors in every
 * component, and the standard error is small enough for that to say something. `units` differ when the baseline
 * comes from the batch.
 */
static void check_estimator(uint32_t objective, uint32_t units, uint32_t perms, uint32_t rounds)
{
	enum { N = 12, UNITS = 4 };
	float s[UNITS][N], u[UNITS][N];
	double exact[N], sd[N], ud[N], sum[N] = {0}, squares[N] = {0}, loss, off = 0, size = 0;
	struct objective_scratch *x;
	struct unit_cost c[UNITS];

	assert_int_equal(objective_scratch_new(&x, N), 0);
	for (uint32_t i = 0; i < units; i++) {
		make(s[i], u[i], N, 20 + i, 3);
		objective_cost(&c[i], u[i], N, TRAIN_UNIFORM, x);
	}
	for (uint32_t i = 0; i < N; i++) {
		sd[i] = (double)s[0][i];
		ud[i] = (double)u[0][i];
	}
	objective_exact_ref(&loss, &c[0], TRAIN_REGRET, sd, ud, exact);
	for (uint32_t round = 0; round < rounds; round++) {
		double reward[UNITS * 8], one[N] = {0};
		uint32_t order[8][N], other[N];

		for (uint32_t i = 0; i < units; i++)
			for (uint32_t p = 0; p < perms; p++) {
				uint32_t *o = i == 0 ? order[p] : other;

				objective_draw(o, s[i], N, 11, round, 0, i, p, x);
				reward[i * perms + p] =
					-objective_regret(&c[i], objective_ranked(&c[i], u[i], o, x));
			}
		objective_advantages(reward, units, perms, objective, false);
		for (uint32_t p = 0; p < perms; p++)
			objective_log_pi(s[0], N, order[p], -reward[p] / perms, one, x);
		for (uint32_t i = 0; i < N; i++) {
			sum[i] += one[i];
			squares[i] += one[i] * one[i];
		}
	}
	for (uint32_t i = 0; i < N; i++) {
		double mean = sum[i] / rounds, error = sqrt((squares[i] / rounds - mean * mean) / rounds);

		assert_true(fabs(mean - exact[i]) < 5 * error);
		off += error * error;
		size += exact[i] * exact[i];
	}
	assert_true(sqrt(off) < 0.1 * sqrt(size));
	objective_scratch_free(x);
}

static void test_rloo(void **state)
{
	check_estimator(TRAIN_RLOO, 1, 8, 20000);
}

static void test_rloo_batch(void **state)
{
	check_estimator(TRAIN_RLOO_BATCH, 4, 1, 100000);
}

static void test_advantages(void **state)
{
	double a[] = {1, 2, 3, 6, 0, 0, 0, 0}, b[] = {5}, c[64] = {0}, sum = 0;

	objective_advantages(a, 2, 4, TRAIN_RLOO, false);
	assert_true(fabs(a[0] - (1 - 11.0 / 3)) < 1e-12 && fabs(a[3] - 4) < 1e-12);
	objective_advantages(b, 1, 1, TRAIN_RLOO_BATCH, true);
	assert_true(b[0] == 0); /* nothing to compare with */
	c[0] = -200;
	objective_advantages(c, 64, 1, TRAIN_RLOO_BATCH, true);
	assert_true(c[0] == -2); /* clipped */
	for (int i = 1; i < 64; i++)
		sum += c[i];
	assert_true(sum > 0 && sum < 64);
}

static void test_mse(void **state)
{
	enum { N = 10 };
	float s[N], u[N], grad[N], other[N], at;
	struct objective_scratch *x;
	struct unit_cost c;
	double up, down;

	assert_int_equal(objective_scratch_new(&x, N), 0);
	make(s, u, N, 8, 2);
	objective_cost(&c, u, N, TRAIN_UNIFORM, x);
	objective_mse(&c, s, u, grad);
	for (int i = 0; i < N; i++) {
		at = s[i];
		s[i] = at + 0x1p-10f;
		up = objective_mse(&c, s, u, other);
		s[i] = at - 0x1p-10f;
		down = objective_mse(&c, s, u, other);
		s[i] = at;
		assert_true(fabs((up - down) / 0x1p-9 - (double)grad[i]) < 1e-5);
	}
	for (int i = 0; i < N; i++)
		s[i] = (float)log((double)u[i] / (c.total / N) + 1e-4);
	assert_true(objective_mse(&c, s, u, grad) < 1e-10);
	objective_scratch_free(x);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_enumeration), cmocka_unit_test(test_differences),
		cmocka_unit_test(test_fast),        cmocka_unit_test(test_order),
		cmocka_unit_test(test_not_counted), cmocka_unit_test(test_log_pi),
		cmocka_unit_test(test_rloo),        cmocka_unit_test(test_rloo_batch),
		cmocka_unit_test(test_advantages),  cmocka_unit_test(test_mse),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
