/* SPDX-License-Identifier: MIT */
/* What ranks by attention, and the attention output with rows missing, against loops in double. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "policy/cpu.h"
#include "policy/eval/attention.h"
#include "policy/eval/output.h"
#include "policy/train/noise.h"
#include "shm/util.h"

enum { ROWS = 230, DIM = 16, GROUP = 3, V_DIM = 8, PROMPT = 190 };

static float k[ROWS * DIM], q[GROUP * ROWS * DIM], v[ROWS * V_DIM], vnorm[ROWS];
static double attention[GROUP][ROWS][ROWS];
static struct attn_head head = {.k = k, .q = q, .rows = ROWS, .dim = DIM, .group = GROUP};
static struct attn_scratch scratch;

static float noise(uint32_t a, uint32_t b)
{
	return train_noise(3, a, 0, 0, 0, b) * 2 - 1;
}

static int setup(void **state)
{
	for (uint32_t i = 0; i < ARRAY_SIZE(k); i++)
		k[i] = 3 * noise(1, i);
	for (uint32_t i = 0; i < ARRAY_SIZE(q); i++)
		q[i] = 3 * noise(2, i) + (i % DIM == 3 ? 2 : 0);
	for (uint32_t i = 0; i < ARRAY_SIZE(v); i++)
		v[i] = noise(4, i);
	for (uint32_t i = 0; i < ROWS; i++)
		vnorm[i] = 1 + noise(5, i) / 2;
	for (uint32_t g = 0; g < GROUP; g++)
		for (uint32_t t = 0; t < ROWS; t++) {
			double sum = 0;

			for (uint32_t j = 0; j <= t; j++) {
				double dot = 0;

				for (uint32_t c = 0; c < DIM; c++)
					dot += (double)q[(g * ROWS + t) * DIM + c] * k[j * DIM + c];
				sum += attention[g][t][j] = exp(dot / sqrt(DIM));
			}
			for (uint32_t j = 0; j <= t; j++)
				attention[g][t][j] /= sum;
		}
	return attn_reserve(&scratch, ROWS, DIM, GROUP, TRACE_ROPE_HALF, 100);
}

static int teardown(void **state)
{
	attn_release(&scratch);
	return 0;
}

static void close_to(double got, double want)
{
	assert_float_equal(got, want, 2e-5 * (fabs(want) + 1e-3));
}

/* ---- kernels -------------------------------------------------------------------------- */

static void check_kernel(const struct eval_kern *kern)
{
	static float s[300], x[300], acc[300];

	for (uint32_t n = 1; n < 300; n += n < 20 ? 1 : 37) {
		double sum = 0, top = -1e9;
		float got;

		for (uint32_t i = 0; i < n; i++) {
			x[i] = s[i] = i % 11 == 5 ? -1000 : 40 * noise(n, i);
			acc[i] = noise(9, i);
			top = MAX(top, (double)s[i]);
		}
		got = kern->exp_row(s, n, 0.5f);
		for (uint32_t i = 0; i < n; i++) {
			double want = exp(0.5 * (x[i] - top));

			sum += want;
			assert_float_equal(s[i], want, 5e-6 * want + 1e-30); /* the argument is rounded too */
		}
		assert_float_equal(got, sum, 1e-5 * sum);
		kern->axpy(acc, x, 0.25f, n);
		for (uint32_t i = 0; i < n; i++) {
			assert_float_equal(acc[i], noise(9, i) + 0.25f * x[i], 1e-4);
			acc[i] = noise(9, i);
		}
		kern->most(acc, x, n);
		for (uint32_t i = 0; i < n; i++)
			assert_true(acc[i] == MAX(x[i], noise(9, i)));
	}
}

static void test_kernels(void **state)
{
	check_kernel(&eval_portable);
#if defined(__x86_64__)
	if (cpu_has_avx2())
		check_kernel(&eval_avx2);
#endif
}

static void test_rows(void **state)
{
	static const uint32_t t[] = {0, 1, 70, 71, 200, 229};
	uint32_t n = ARRAY_SIZE(t), stride;

	attn_rows(&head, &scratch, t, n, &stride);
	assert_int_equal(stride, 230);
	for (uint32_t g = 0; g < GROUP; g++)
		for (uint32_t i = 0; i < n; i++)
			for (uint32_t j = 0; j < stride; j++)
				close_to(scratch.a[(g * n + i) * stride + j] * scratch.inv[g * n + i],
					 j <= t[i] ? attention[g][t[i]][j] : 0);
}

/* ---- policies ------------------------------------------------------------------------- */

/* The rows from `from` on are above all others and equal. */
static void kept(const float *score, uint32_t from, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		assert_true(i < from ? score[i] < score[n - 1] : score[i] == score[n - 1]);
}

static void test_h2o(void **state)
{
	static const uint32_t prompts[] = {30, 97, 128, PROMPT};
	static float out[4][ROWS];
	float *const to[] = {out[0], out[1], out[2], out[3]};

	attn_h2o(&head, &scratch, prompts, 4, to);
	for (int p = 0; p < 4; p++) {
		uint32_t n = prompts[p], free_rows = n > ATTN_H2O_WINDOW ? n - ATTN_H2O_WINDOW : 0;

		for (uint32_t j = 0; j < free_rows; j++) {
			double sum = 0;

			for (uint32_t g = 0; g < GROUP; g++)
				for (uint32_t t = j; t < n; t++)
					sum += attention[g][t][j];
			close_to(out[p][j], sum / GROUP / (n - j));
		}
		kept(out[p], free_rows, n);
	}
}

/* Sum over five neighbours, as far as they are rows before the window. */
static double pooled(uint32_t g, uint32_t t, uint32_t j, uint32_t n)
{
	double sum = 0;

	for (int d = -2; d <= 2; d++)
		if ((int)j + d >= 0 && (int)j + d < (int)n)
			sum += attention[g][t][(int)j + d];
	return sum / 5;
}

static void test_snapkv(void **state)
{
	float out[ROWS];
	uint32_t n = PROMPT - ATTN_SNAPKV_WINDOW;

	attn_snapkv(&head, &scratch, PROMPT, out);
	for (uint32_t j = 0; j < n; j++) {
		double sum = 0;

		for (uint32_t g = 0; g < GROUP; g++)
			for (uint32_t t = n; t < PROMPT; t++)
				sum += pooled(g, t, j, n);
		close_to(out[j], sum / GROUP / ATTN_SNAPKV_WINDOW);
	}
	kept(out, n, PROMPT);
	attn_snapkv(&head, &scratch, 40, out); /* shorter than the window: all of it is kept */
	kept(out, 0, 40);
}

static void test_defensive(void **state)
{
	float out[ROWS];
	double most[ROWS] = {0}, mean = 0;
	uint32_t n = PROMPT - ATTN_DEFENSIVE_WINDOW, clamped = 0;

	attn_defensive(&head, &scratch, PROMPT, vnorm, out);
	for (uint32_t j = 0; j < n; j++) {
		for (uint32_t g = 0; g < GROUP; g++)
			for (uint32_t t = n; t < PROMPT; t++)
				most[j] = MAX(most[j], pooled(g, t, j, n));
		mean += most[j] / n;
	}
	for (uint32_t j = 0; j < n; j++) {
		clamped += most[j] < mean;
		close_to(out[j], MAX(most[j], mean) * vnorm[j]);
	}
	assert_true(clamped > 0 && clamped < n);
	kept(out, n, PROMPT);
}

static void test_last(void **state)
{
	float sum[ROWS];

	for (uint32_t j = 0; j < PROMPT; j++)
		sum[j] = 1;
	attn_last(&head, &scratch, PROMPT, sum);
	for (uint32_t j = 0; j < PROMPT; j++)
		close_to(sum[j], 1 + attention[0][PROMPT - 1][j] + attention[1][PROMPT - 1][j] +
					 attention[2][PROMPT - 1][j]);
}

static void test_utility(void **state)
{
	float umax[ROWS] = {0}, umean[ROWS] = {0};

	attn_utility(&head, &scratch, PROMPT, PROMPT, 37, umax, umean);
	for (uint32_t j = 0; j < PROMPT; j++) {
		double most = 0, mean = 0;

		for (uint32_t t = PROMPT; t < PROMPT + 37; t++) {
			const double a = attention[0][t][j], b = attention[1][t][j], c = attention[2][t][j];

			most += MAX(a, MAX(b, c));
			mean += (a + b + c) / 3;
		}
		close_to(umax[j], most);
		close_to(umean[j], mean);
	}
}

/* A rotation by the angles of position m, as a matrix; summed into r with a weight. */
static void add_rotation(double r[DIM][DIM], uint32_t m, double w, bool pairs)
{
	for (uint32_t p = 0; p < DIM / 2; p++) {
		uint32_t a = pairs ? 2 * p : p, b = pairs ? 2 * p + 1 : p + DIM / 2;
		double angle = m * pow(100, -2.0 * p / DIM);

		r[a][a] += w * cos(angle);
		r[a][b] -= w * sin(angle);
		r[b][a] += w * sin(angle);
		r[b][b] += w * cos(angle);
	}
}

static void expected_logits(uint32_t g, bool pairs, double *out)
{
	double mean[DIM] = {0}, cov[DIM][DIM] = {{0}}, r[DIM][DIM] = {{0}}, rm[DIM] = {0}, rc[DIM][DIM] = {{0}};
	static double plain[ROWS][DIM];
	uint32_t n = PROMPT - ATTN_SINKS;

	for (uint32_t i = 0; i < n; i++) {
		double back[DIM][DIM] = {{0}};

		add_rotation(back, ATTN_SINKS + i, 1, pairs);
		for (uint32_t a = 0; a < DIM; a++) {
			plain[i][a] = 0;
			for (uint32_t b = 0; b < DIM; b++) /* the transpose turns back */
				plain[i][a] += back[b][a] * q[(g * ROWS + ATTN_SINKS + i) * DIM + b];
			mean[a] += plain[i][a] / n;
		}
	}
	for (uint32_t i = 0; i < n; i++)
		for (uint32_t a = 0; a < DIM; a++)
			for (uint32_t b = 0; b < DIM; b++)
				cov[a][b] += (plain[i][a] - mean[a]) * (plain[i][b] - mean[b]) / n;
	for (uint32_t m = PROMPT; m < PROMPT + 512; m++)
		add_rotation(r, m, 1 / 512.0, pairs);
	for (uint32_t a = 0; a < DIM; a++)
		for (uint32_t b = 0; b < DIM; b++) {
			rm[a] += r[a][b] * mean[b];
			for (uint32_t c = 0; c < DIM; c++)
				for (uint32_t d = 0; d < DIM; d++)
					rc[a][b] += r[a][c] * cov[c][d] * r[b][d];
		}
	for (uint32_t i = 0; i < n; i++) {
		const float *x = k + (ATTN_SINKS + i) * DIM;

		out[i] = 0;
		for (uint32_t a = 0; a < DIM; a++) {
			out[i] += x[a] * rm[a] / sqrt(DIM);
			for (uint32_t b = 0; b < DIM; b++)
				out[i] += (double)x[a] * rc[a][b] * x[b] / (2 * DIM);
		}
	}
}

static void compare_expected(bool pairs)
{
	double want[ROWS] = {0}, logits[ROWS];
	float out[ROWS];
	uint32_t n = PROMPT - ATTN_SINKS;

	for (uint32_t g = 0; g < GROUP; g++) {
		double sum = 0;

		expected_logits(g, pairs, logits);
		for (uint32_t i = 0; i < n; i++)
			sum += exp(logits[i]);
		for (uint32_t i = 0; i < n; i++)
			want[i] += exp(logits[i]) / sum / GROUP;
	}
	attn_expected(&head, &scratch, PROMPT, vnorm, out);
	for (uint32_t i = 0; i < n; i++)
		close_to(out[ATTN_SINKS + i], want[i] * vnorm[ATTN_SINKS + i]);
	for (uint32_t i = 0; i < ATTN_SINKS; i++)
		assert_true(out[i] > 1);
}

static void test_expected(void **state)
{
	compare_expected(false);
	assert_int_equal(attn_reserve(&scratch, ROWS, DIM, GROUP, TRACE_ROPE_PAIRS, 100), 0);
	compare_expected(true);
	assert_int_equal(attn_reserve(&scratch, ROWS, DIM, GROUP, TRACE_ROPE_HALF, 100), 0);
}

/* ---- output --------------------------------------------------------------------------- */

static double plain_error(const bool *keep, const float *gram, uint32_t future, uint32_t sample)
{
	double lost = 0, whole = 0;

	for (uint32_t s = 0; s < sample; s++) {
		uint32_t t = PROMPT + (2 * s + 1) * future / (2 * sample), wide = GROUP * V_DIM;
		double full[GROUP * V_DIM] = {0}, diff[GROUP * V_DIM] = {0};

		for (uint32_t g = 0; g < GROUP; g++) {
			double part[V_DIM] = {0}, sum = 0;

			for (uint32_t j = 0; j <= t; j++) {
				bool in = j >= PROMPT || keep[j];

				sum += in ? attention[g][t][j] : 0;
				for (uint32_t c = 0; c < V_DIM; c++) {
					full[g * V_DIM + c] += attention[g][t][j] * v[j * V_DIM + c];
					part[c] += in ? attention[g][t][j] * v[j * V_DIM + c] : 0;
				}
			}
			for (uint32_t c = 0; c < V_DIM; c++)
				diff[g * V_DIM + c] = full[g * V_DIM + c] - part[c] / sum;
		}
		for (uint32_t a = 0; a < wide; a++)
			for (uint32_t b = 0; b < wide; b++) {
				lost += diff[a] * gram[a * wide + b] * diff[b];
				whole += full[a] * gram[a * wide + b] * full[b];
			}
	}
	return sqrt(lost / whole);
}

static void test_output(void **state)
{
	enum { WIDE = GROUP * V_DIM, N = PROMPT - PROTECTED };
	static float gram[WIDE * WIDE];
	struct output o = {0};
	uint32_t order[N];
	float out[EVAL_ERRORS];

	for (uint32_t a = 0; a < WIDE; a++)
		for (uint32_t b = 0; b < WIDE; b++)
			for (uint32_t c = 0; c < WIDE; c++)
				gram[a * WIDE + b] += noise(6, c * WIDE + a) * noise(6, c * WIDE + b);
	for (uint32_t i = 0; i < N; i++)
		order[i] = i * 71 % N; /* 170 and 71 have no factor in common */
	for (uint32_t sample = 1; sample <= 40; sample += 13) {
		assert_int_equal(output_prepare(&o, &head, &scratch, v, V_DIM, gram, PROMPT, 40, sample), 0);
		output_errors(&o, order, N, out);
		assert_true(isnan(out[0]) && isnan(out[1])); /* fewer than 64 of 190 rows */
		for (int b = 2; b < EVAL_ERRORS; b++) {
			bool keep[PROMPT] = {false};

			for (uint32_t i = 0; i < PROMPT; i++)
				keep[i] = i < PROTECT_FIRST || i >= PROMPT - PROTECT_LAST;
			for (uint32_t i = 0; i < lrint((double)eval_error_budget[b] * N); i++)
				keep[PROTECT_FIRST + order[i]] = true;
			assert_float_equal(out[b], plain_error(keep, gram, 40, sample), 1e-4);
			assert_true(out[b] > 0.01f);
		}
	}
	output_release(&o);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_kernels), cmocka_unit_test(test_rows),      cmocka_unit_test(test_h2o),
		cmocka_unit_test(test_snapkv),  cmocka_unit_test(test_defensive), cmocka_unit_test(test_last),
		cmocka_unit_test(test_utility), cmocka_unit_test(test_expected),  cmocka_unit_test(test_output),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
