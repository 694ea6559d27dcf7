/* SPDX-License-Identifier: MIT */
/* Utilities from queries against the definition in double, and RoPE undone. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <math.h>
#include <cmocka.h>
#include "policy/trace.h"
#include "policy/trace_rope.h"
#include "shm/util.h"
#include "tests/unit/trace_fixture.h"

static char err[1024];

/* Word for word: A[t][j] = softmax over j <= t of q_t . k_j / sqrt(k_dim), per head of the group. */
static void reference(uint32_t lane, const struct trace_cut *c, double *umax, double *umean)
{
	for (uint32_t j = 0; j < c->prompt; j++)
		umax[j] = umean[j] = 0;
	for (uint32_t t = c->prompt; t < c->prompt + c->queries; t++) {
		double a[FX_GROUP][FX_ROWS];

		for (int g = 0; g < FX_GROUP; g++) {
			double sum = 0;

			for (uint32_t j = 0; j <= t; j++) {
				double dot = 0;

				for (int d = 0; d < FX_K; d++)
					dot += (double)fx_q[lane][g][t][d] * (double)fx_k[lane][j][d];
				a[g][j] = exp(dot / sqrt(FX_K));
				sum += a[g][j];
			}
			for (uint32_t j = 0; j <= t; j++)
				a[g][j] /= sum;
		}
		for (uint32_t j = 0; j < c->prompt; j++) {
			umax[j] += fmax(a[0][j], fmax(a[1][j], a[2][j]));
			umean[j] += (a[0][j] + a[1][j] + a[2][j]) / 3;
		}
	}
}

static void compare(const char *path)
{
	struct trace *t;

	if (trace_open(&t, path, err, sizeof(err)) < 0)
		fail_msg("%s", err);
	for (uint32_t c = 0; c < 2; c++)
		for (uint32_t lane = 0; lane < FX_LANES; lane++) {
			float umax[FX_ROWS], umean[FX_ROWS], alone[FX_ROWS];
			double wmax[FX_ROWS], wmean[FX_ROWS], whole = 0;

			reference(lane, &fx_cuts[c], wmax, wmean);
			assert_int_equal(trace_utility(t, lane, c, umax, umean, err, sizeof(err)), 0);
			for (uint32_t j = 0; j < fx_cuts[c].prompt; j++) {
				assert_true(fabs((double)umax[j] - wmax[j]) < 2e-5 * wmax[j] + 1e-7);
				assert_true(fabs((double)umean[j] - wmean[j]) < 2e-5 * wmean[j] + 1e-7);
				whole += wmean[j];
			}
			assert_true(whole > 1 && whole < fx_cuts[c].queries);
			assert_int_equal(trace_utility(t, lane, c, NULL, alone, err, sizeof(err)), 0);
			assert_memory_equal(alone, umean, 4 * fx_cuts[c].prompt);
			assert_int_equal(trace_utility(t, lane, c, alone, NULL, err, sizeof(err)), 0);
			assert_memory_equal(alone, umax, 4 * fx_cuts[c].prompt);
		}
	trace_free(t);
}

static void test_utility(void **state)
{
	fx_write(fx_path("a.kvtr"));
	compare(fx_path("a.kvtr"));
}

/* The same utilities from a file whose keys are stored before RoPE. */
static void test_utility_unrotated(void **state)
{
	struct trace_header h = fx_header();
	static float k[FX_LANES][FX_ROWS][FX_K];
	uint32_t pos[FX_ROWS];

	for (uint32_t i = 0; i < FX_ROWS; i++)
		pos[i] = i;
	memcpy(k, fx_k, sizeof(k));
	for (int l = 0; l < FX_LANES; l++)
		rope_undo(&k[l][0][0], FX_K, FX_ROWS, pos, TRACE_ROPE_PAIRS, 500.0f);
	h.keys = TRACE_KEYS_UNROTATED;
	h.rope_type = TRACE_ROPE_PAIRS;
	h.rope_theta = 500.0f;
	fx_write_as(fx_path("a.kvtr"), &h, &k[0][0][0]);
	compare(fx_path("a.kvtr"));
}

/* Logits of hundreds: the maximum is taken off before exp(). */
static void test_utility_sharp(void **state)
{
	float umax[FX_ROWS];
	struct trace *t;
	double whole = 0;

	for (size_t i = 0; i < sizeof(fx_q) / 4; i++)
		(&fx_q[0][0][0][0])[i] *= 1000.0f;
	fx_write(fx_path("a.kvtr"));
	assert_int_equal(trace_open(&t, fx_path("a.kvtr"), err, sizeof(err)), 0);
	assert_int_equal(trace_utility(t, 0, 0, umax, NULL, err, sizeof(err)), 0);
	for (uint32_t j = 0; j < fx_cuts[0].prompt; j++) {
		assert_true(isfinite(umax[j]) && umax[j] >= 0);
		whole += (double)umax[j];
	}
	assert_true(whole > 1 && whole <= FX_GROUP * fx_cuts[0].queries);
	trace_free(t);
}

static void test_utility_refused(void **state)
{
	struct trace_header h = fx_header();
	struct trace_writer *w;
	float u[FX_ROWS];
	struct trace *t;

	fx_write(fx_path("a.kvtr"));
	assert_int_equal(trace_open(&t, fx_path("a.kvtr"), err, sizeof(err)), 0);
	assert_int_equal(trace_utility(t, 0, 2, u, NULL, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "future is not in this file"));
	assert_int_equal(trace_utility(t, 0, 3, u, NULL, err, sizeof(err)), -EINVAL);
	assert_int_equal(trace_utility(t, FX_LANES, 0, u, NULL, err, sizeof(err)), -ENOENT);
	trace_free(t);
	assert_int_equal(trace_writer_open(&w, fx_path("b.kvtr"), &h, fx_cuts, err, sizeof(err)), 0);
	assert_int_equal(trace_writer_chunk(w, TRACE_K, 0, 0, fx_k[0]), 0);
	assert_int_equal(trace_writer_finish(w, 0), 0);
	assert_int_equal(trace_open(&t, fx_path("b.kvtr"), err, sizeof(err)), 0);
	assert_int_equal(trace_utility(t, 0, 0, u, NULL, err, sizeof(err)), -ENOENT);
	trace_free(t);
}

static const struct {
	uint32_t dim;
	enum trace_rope rope;
	float theta;
} ropes[] = {{64, TRACE_ROPE_HALF, 1e5f},
	     {64, TRACE_ROPE_PAIRS, 1e4f},
	     {2, TRACE_ROPE_HALF, 1e4f},
	     {18, TRACE_ROPE_PAIRS, 1e6f},
	     {TRACE_MAX_DIM, TRACE_ROPE_HALF, 5e5f}};

enum { N = 40 };

/* Against rotation by the float angle, in double; and undoing brings the row back. */
static void test_rope(void **state)
{
	static float x[N * TRACE_MAX_DIM], was[N * TRACE_MAX_DIM];
	uint32_t pos[N];

	for (uint32_t i = 0; i < N; i++)
		pos[i] = i < 20 ? i : i < 30 ? i * 211 : TRACE_MAX_ROWS - i;
	for (size_t c = 0; c < ARRAY_SIZE(ropes); c++) {
		uint32_t dim = ropes[c].dim, half = dim / 2;

		fx_fill(x, N * dim);
		memcpy(was, x, sizeof(was));
		rope_apply(x, dim, N, pos, ropes[c].rope, ropes[c].theta);
		for (uint32_t i = 0; i < N; i++)
			for (uint32_t p = 0; p < half; p++) {
				float angle =
					(float)pos[i] * (float)pow((double)ropes[c].theta, -2.0 * p / dim);
				bool pairs = ropes[c].rope == TRACE_ROPE_PAIRS;
				uint32_t a = i * dim + (pairs ? 2 * p : p), b = pairs ? a + 1 : a + half;
				double co = cos((double)angle), si = sin((double)angle);

				assert_true(fabs((double)x[a] - ((double)was[a] * co - (double)was[b] * si)) <
					    2e-6);
				assert_true(fabs((double)x[b] - ((double)was[b] * co + (double)was[a] * si)) <
					    2e-6);
			}
		rope_undo(x, dim, N, pos, ropes[c].rope, ropes[c].theta);
		for (uint32_t i = 0; i < N * dim; i++)
			assert_true(fabsf(x[i] - was[i]) < 3e-6f);
	}
	rope_undo(x, 64, N, pos, TRACE_ROPE_NONE, 1e4f);
	assert_true(fabsf(x[70] - was[70]) < 3e-6f);
}

/* The portable loop and the one for AVX2 agree. */
static void test_rope_portable(void **state)
{
	struct rope_job job = {.dim = 64, .n = 1, .rope = TRACE_ROPE_HALF, .sign = -1};
	float x[64], y[64];
	uint32_t pos = 4095;

	fx_fill(x, 64);
	memcpy(y, x, sizeof(y));
	for (uint32_t p = 0; p < 32; p++)
		job.freq[p] = (float)pow(1e5, -2.0 * p / 64);
	job.rows = x;
	job.pos = &pos;
	rope_run_portable(&job);
	rope_undo(y, 64, 1, &pos, TRACE_ROPE_HALF, 1e5f);
	for (int i = 0; i < 64; i++)
		assert_true(fabsf(x[i] - y[i]) < 1e-6f);
}

static int each(void **state)
{
	fx_random();
	return fx_setup(state);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, each, fx_teardown)
	const struct CMUnitTest tests[] = {
		T(test_utility), T(test_utility_unrotated), T(test_utility_sharp), T(test_utility_refused),
		T(test_rope),    T(test_rope_portable),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
