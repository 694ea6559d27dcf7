/* SPDX-License-Identifier: MIT */
/*
 * Recall against a search written out from its definitions in double precision; every kernel against that; and
 * what keys and queries may never do to it.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "policy/learned.h"
#include "policy/recall.h"
#include "policy/recall_kern.h"
#include "policy/train/set.h"
#include "shm/util.h"

static const char *const isas[] = {"ref", "avx2", "avx512"};
static uint32_t seed = 1;

static uint32_t any(void)
{
	seed = seed * 1664525u + 1013904223u;
	return seed >> 8;
}

static float normal(void)
{
	float s = 0;

	for (int i = 0; i < 12; i++)
		s += (float)(any() & 0xffff) / 65536.0f;
	return s - 6;
}

static uint16_t to_bf16(float f)
{
	uint32_t u;

	memcpy(&u, &f, 4);
	return (uint16_t)(u >> 16);
}

static void put(void *k, size_t i, enum row_dtype t, float f)
{
	uint16_t h = float_half(f), b = to_bf16(f);

	if (t == ROW_F32)
		memcpy((char *)k + i * 4, &f, 4);
	else
		memcpy((char *)k + i * 2, t == ROW_F16 ? &h : &b, 2);
}

/* ---- a lane of pages ------------------------------------------------------------------------ */

#define RUNS 9u

struct lane {
	uint32_t dim, n_runs, rows;
	enum row_dtype dtype;
	struct recall_run run[RUNS];
	void *keys[RUNS];
	float q[64 * 256];
};

/* Keys in clusters, so that groups differ; some rows are not to be recalled. */
static void lane_make(struct lane *l, uint32_t dim, enum row_dtype dtype, bool all)
{
	static const uint32_t rows[RUNS] = {128, 128, 1, 31, 32, 33, 128, 97, 64};

	memset(l, 0, sizeof(*l));
	l->dim = dim;
	l->dtype = dtype;
	l->n_runs = RUNS;
	for (uint32_t r = 0; r < RUNS; r++) {
		struct recall_sum *sum = malloc(recall_sum_bytes(rows[r], dim));
		float *centre = calloc(dim, sizeof(float));

		l->keys[r] = malloc((size_t)rows[r] * dim * 4);
		for (uint32_t i = 0; i < rows[r]; i++) {
			if (i % 32 == 0)
				for (uint32_t d = 0; d < dim; d++)
					centre[d] = 2 * normal();
			for (uint32_t d = 0; d < dim; d++)
				put(l->keys[r], (size_t)i * dim + d, dtype, centre[d] + normal());
			if (all || any() % 4)
				l->run[r].alive[i / 32] |= 1u << i % 32;
		}
		recall_summarise(l->keys[r], rows[r], dim, dtype, sum);
		l->run[r].k = l->keys[r];
		l->run[r].rows = rows[r];
		l->run[r].sum = sum;
		l->rows += rows[r];
		free(centre);
	}
	for (uint32_t i = 0; i < ARRAY_SIZE(l->q); i++)
		l->q[i] = normal();
}

static void lane_free(struct lane *l)
{
	for (uint32_t r = 0; r < l->n_runs; r++) {
		free((void *)l->run[r].sum);
		free(l->keys[r]);
	}
}

static struct recall_query query_of(const struct lane *l, uint32_t n, uint32_t want)
{
	return (struct recall_query){.n = n,
				     .dim = l->dim,
				     .scale = 1 / sqrtf((float)l->dim),
				     .dtype = l->dtype,
				     .norm = RECALL_MASS,
				     .probe = RECALL_PROBE,
				     .want = want,
				     .q = l->q};
}

static int search(const struct recall_query *q, const struct lane *l, struct recall_hit *hits,
		  struct recall_seen *seen)
{
	void *scratch = malloc(recall_scratch(q, l->n_runs));
	struct recall_seen mine;
	int r = recall_search(q, l->run, l->n_runs, scratch, hits, seen ? seen : &mine);

	free(scratch);
	return r;
}

/* ---- the definitions again ------------------------------------------------------------------- */

static double key_at(const struct lane *l, uint32_t r, uint32_t i, uint32_t d)
{
	return row_element(l->keys[r], (size_t)i * l->dim + d, l->dtype);
}

static double logit(const struct recall_query *q, const struct lane *l, uint32_t j, uint32_t r, uint32_t i)
{
	double s = 0;

	for (uint32_t d = 0; d < l->dim; d++)
		s += key_at(l, r, i, d) * q->q[(size_t)j * l->dim + d];
	return s * q->scale;
}

static double bound(const struct recall_query *q, const struct lane *l, uint32_t j, uint32_t r, uint32_t g)
{
	const struct recall_sum *sum = l->run[r].sum;
	const int8_t *c = (const int8_t *)(sum->v + 2 * sum->groups) + g * l->dim;
	double s = 0, sq = 0;

	for (uint32_t d = 0; d < l->dim; d++) {
		s += (double)c[d] * sum->v[g] * q->q[(size_t)j * l->dim + d];
		sq += (double)q->q[(size_t)j * l->dim + d] * q->q[(size_t)j * l->dim + d];
	}
	return q->scale * (s + RECALL_SPREAD * sqrt(sq) * sum->v[sum->groups + g] / sqrt(l->dim));
}

struct ref_row {
	uint32_t r, i;
	double s;
};

static int by_score(const void *a, const void *b)
{
	const struct ref_row *x = a, *y = b;

	if (x->s != y->s)
		return x->s > y->s ? -1 : 1;
	return x->r != y->r ? (x->r < y->r ? -1 : 1) : x->i < y->i ? -1 : 1;
}

/* Scores of all probed rows, best first; how many. *ret_edge: how far the group scores at the edge are apart.
 */
static uint32_t reference(const struct recall_query *q, const struct lane *l, struct ref_row *out,
			  double *ret_edge)
{
	struct ref_row g[RUNS * 4];
	uint32_t n = 0, rows = 0, e;
	double top[512];

	for (uint32_t r = 0; r < l->n_runs; r++)
		for (uint32_t k = 0; k < l->run[r].sum->groups; k++)
			if (l->run[r].alive[k])
				g[n++] = (struct ref_row){r, k, -INFINITY};
	for (uint32_t j = 0; j < q->n; j++) {
		top[j] = -INFINITY;
		for (uint32_t k = 0; k < n; k++)
			top[j] = fmax(top[j], bound(q, l, j, g[k].r, g[k].i));
	}
	for (uint32_t k = 0; k < n; k++)
		for (uint32_t j = 0; j < q->n; j++)
			g[k].s = fmax(g[k].s, bound(q, l, j, g[k].r, g[k].i) - top[j]);
	qsort(g, n, sizeof(*g), by_score);
	e = MIN(n, MAX(DIV_UP(n * q->probe, 1000), DIV_UP(q->want * 4, RECALL_GROUP)));
	*ret_edge = e < n && (g[e - 1].s || g[e].s) ? g[e - 1].s - g[e].s : 1; /* 0 is 0 in any arithmetic */
	for (uint32_t k = 0; k < e; k++)
		for (uint32_t i = g[k].i * 32; i < MIN(g[k].i * 32 + 32, l->run[g[k].r].rows); i++)
			if (l->run[g[k].r].alive[i / 32] >> i % 32 & 1)
				out[rows++] = (struct ref_row){g[k].r, i, -INFINITY};
	for (uint32_t j = 0; j < q->n; j++) {
		double sum = 0, base = 0;

		for (uint32_t i = 0; i < rows; i++)
			sum += exp(logit(q, l, j, out[i].r, out[i].i));
		for (uint32_t i = 0; q->resident && i < q->resident_n; i++) {
			double s = 0;

			for (uint32_t d = 0; d < l->dim; d++)
				s += (double)row_element((const char *)q->resident + i * q->resident_stride, d,
							 l->dtype) *
				     q->q[(size_t)j * l->dim + d];
			sum += exp(s * q->scale);
		}
		if (q->norm == RECALL_MASS)
			base = log(sum);
		for (uint32_t i = 0; i < rows; i++)
			out[i].s = fmax(out[i].s, logit(q, l, j, out[i].r, out[i].i) - base);
	}
	qsort(out, rows, sizeof(*out), by_score);
	return rows;
}

/* The hits are the best rows of the reference, up to rounding at the edge. */
static void compare(const struct recall_query *q, const struct lane *l)
{
	struct ref_row *ref = malloc(l->rows * sizeof(*ref));
	struct recall_hit *hits = malloc((q->want + 1) * sizeof(*hits));
	struct recall_seen seen;
	double edge, tol = 2e-4;
	uint32_t n = reference(q, l, ref, &edge);
	int got = search(q, l, hits, &seen);

	assert_true(edge > 1e-5); /* or the fixture cannot tell */
	assert_int_equal(seen.rows, n);
	assert_int_equal(got, MIN(n, q->want));
	for (int i = 0; i < got; i++) {
		const struct recall_hit *h = &hits[i];
		uint32_t k = 0;

		if (i)
			assert_true(h[-1].run < h->run || (h[-1].run == h->run && h[-1].row < h->row));
		while (k < n && (ref[k].r != h->run || ref[k].i != h->row))
			k++;
		assert_true(k < n);
		assert_true(fabs(ref[k].s - h->score) < tol);
		assert_true(ref[k].s >= ref[got - 1].s - tol);
	}
	free(ref);
	free(hits);
}

static void test_matches_definition(void **state)
{
	static const struct {
		uint32_t dim, n, want;
	} shape[] = {{64, 12, 40}, {64, 1, 7}, {80, 16, 64}, {64, 17, 33},
		     {128, 8, 20}, {13, 5, 9}, {256, 32, 50}};
	static struct lane l;
	unsigned ran = 0;

	for (size_t i = 0; i < ARRAY_SIZE(shape); i++)
		for (int t = ROW_F32; t <= ROW_BF16; t++) {
			lane_make(&l, shape[i].dim, (enum row_dtype)t, t == ROW_F16);
			for (size_t k = 0; k < ARRAY_SIZE(isas); k++) {
				struct recall_query q = query_of(&l, shape[i].n, shape[i].want);

				if (!recall_kern(isas[k]))
					continue;
				q.isa = isas[k];
				compare(&q, &l);
				q.norm = RECALL_LOGIT;
				compare(&q, &l);
				q.norm = RECALL_MASS;
				q.probe = 1000;
				q.resident = l.keys[0];
				q.resident_stride = (size_t)l.dim * (t == ROW_F32 ? 4 : 2) * 3;
				q.resident_n = 40;
				compare(&q, &l);
				ran++;
			}
			lane_free(&l);
		}
	assert_true(ran >= 3 * ARRAY_SIZE(shape));
}

/* The share of the exact search's attention mass that the two-stage search finds, on clustered keys. */
static void test_finds_most_of_the_mass(void **state)
{
	static struct lane l;
	double found = 0, best = 0;

	for (int round = 0; round < 20; round++) {
		struct recall_hit two[20], exact[20];
		struct recall_query q;

		lane_make(&l, 64, ROW_F32, true);
		q = query_of(&l, 4, 20);
		q.scale *= 2;
		assert_int_equal(search(&q, &l, two, NULL), 20);
		q.probe = 1000;
		assert_int_equal(search(&q, &l, exact, NULL), 20);
		for (int i = 0; i < 20; i++) {
			found += exp(logit(&q, &l, 0, two[i].run, two[i].row) - 12);
			best += exp(logit(&q, &l, 0, exact[i].run, exact[i].row) - 12);
		}
		lane_free(&l);
	}
	assert_true(found > 0.9 * best);
}

static void test_dead_rows_never_come(void **state)
{
	static struct lane l;
	static struct recall_hit hits[1000];
	struct recall_query q;
	uint32_t alive = 0;
	int n;

	lane_make(&l, 64, ROW_F16, false);
	for (uint32_t r = 0; r < RUNS; r++)
		for (uint32_t i = 0; i < l.run[r].rows; i++)
			alive += l.run[r].alive[i / 32] >> i % 32 & 1;
	q = query_of(&l, 12, 1000);
	n = search(&q, &l, hits, NULL);
	assert_int_equal(n, alive); /* all of them when there is room */
	for (int i = 0; i < n; i++)
		assert_true(l.run[hits[i].run].alive[hits[i].row / 32] >> hits[i].row % 32 & 1);
	for (uint32_t r = 0; r < RUNS; r++)
		memset(l.run[r].alive, 0, sizeof(l.run[r].alive));
	assert_int_equal(search(&q, &l, hits, NULL), 0);
	l.run[3].alive[0] = 1u << 30;
	assert_int_equal(search(&q, &l, hits, NULL), 1);
	assert_int_equal(hits[0].run, 3);
	assert_int_equal(hits[0].row, 30);
	lane_free(&l);
}

static void test_equal_scores_take_the_lower(void **state)
{
	static struct lane l;
	struct recall_hit hits[50];
	struct recall_query q;

	lane_make(&l, 64, ROW_F32, true);
	for (uint32_t r = 0; r < RUNS; r++) {
		memset(l.keys[r], 0, (size_t)l.run[r].rows * 64 * 4);
		recall_summarise(l.keys[r], l.run[r].rows, 64, ROW_F32, (struct recall_sum *)l.run[r].sum);
	}
	for (size_t k = 0; k < ARRAY_SIZE(isas); k++) {
		q = query_of(&l, 3, 50);
		q.isa = isas[k];
		if (!recall_kern(q.isa))
			continue;
		assert_int_equal(search(&q, &l, hits, NULL), 50);
		for (uint32_t i = 0; i < 50; i++) {
			assert_int_equal(hits[i].run, 0);
			assert_int_equal(hits[i].row, i);
		}
	}
	lane_free(&l);
}

/* Whatever the bytes: no hit that is not finite, and good rows beside bad ones are still found. */
static void test_hostile_keys(void **state)
{
	static struct lane l;
	static struct recall_hit hits[1000];
	const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-44f};

	for (size_t k = 0; k < ARRAY_SIZE(isas); k++) {
		struct recall_query q;
		bool good = false;
		int n;

		if (!recall_kern(isas[k]))
			continue;
		lane_make(&l, 64, ROW_F32, true);
		for (uint32_t r = 0; r < RUNS; r++) {
			for (uint32_t i = 0; i < l.run[r].rows; i++)
				if (any() % 3)
					put(l.keys[r], (size_t)i * 64 + any() % 64, ROW_F32,
					    bad[any() % ARRAY_SIZE(bad)]);
			recall_summarise(l.keys[r], l.run[r].rows, 64, ROW_F32,
					 (struct recall_sum *)l.run[r].sum);
		}
		q = query_of(&l, 12, 1000);
		q.isa = isas[k];
		for (int mode = 0; mode < 4; mode++) {
			q.norm = mode & 1 ? RECALL_MASS : RECALL_LOGIT;
			q.probe = mode & 2 ? 1000 : 250;
			q.want = mode & 2 ? 1000 : 64;
			n = search(&q, &l, hits, NULL);
			assert_true(n > 0);
			for (int i = 0; i < n; i++) {
				assert_false(isnan(hits[i].score));
				for (uint32_t d = 0; d < 64; d++)
					assert_true(isfinite(key_at(&l, hits[i].run, hits[i].row, d)));
			}
			good = true;
		}
		assert_true(good);
		lane_free(&l);
	}
}

static void test_bad_arguments(void **state)
{
	static struct lane l;
	struct recall_hit hits[10];
	struct recall_query ok, q;

	lane_make(&l, 64, ROW_F16, true);
	ok = query_of(&l, 12, 10);
	assert_int_equal(search(&ok, &l, hits, NULL), 10);
#define REFUSED(change)                                                                                        \
	do {                                                                                                   \
		q = ok;                                                                                        \
		q.change;                                                                                      \
		assert_int_equal(search(&q, &l, hits, NULL), -EINVAL);                                         \
	} while (0)
	REFUSED(n = 0);
	REFUSED(dim = 63);
	REFUSED(scale = 0);
	REFUSED(scale = NAN);
	REFUSED(scale = INFINITY);
	REFUSED(dtype = ROW_OPAQUE);
	REFUSED(probe = 0);
	REFUSED(probe = 1001);
	REFUSED(isa = "mmx");
	q = ok;
	q.want = 0;
	assert_int_equal(search(&q, &l, hits, NULL), 0);
	l.run[2].rows = 0;
	assert_int_equal(search(&ok, &l, hits, NULL), -EINVAL);
	l.run[2].rows = 33; /* not what was summarised */
	assert_int_equal(search(&ok, &l, hits, NULL), -EINVAL);
	lane_free(&l);
}

static void test_top(void **state)
{
	for (int round = 0; round < 300; round++) {
		uint32_t n = any() % 400, k = n ? any() % (n + 1) : 0, idx[400], got, possible = 0;
		float s[400], edge;

		for (uint32_t i = 0; i < n; i++) {
			s[i] = round % 2 ? (float)(int)(any() % 7) - 3 : normal();
			if (round % 5 == 0 && any() % 4 == 0)
				s[i] = -INFINITY;
			possible += s[i] > -INFINITY;
		}
		got = recall_top(s, n, k, idx);
		assert_int_equal(got, MIN(k, possible));
		edge = INFINITY;
		for (uint32_t i = 0; i < got; i++) {
			assert_true(idx[i] < n && (!i || idx[i] > idx[i - 1]));
			edge = MIN(edge, s[idx[i]]);
		}
		for (uint32_t i = 0, j = 0; i < n && got == k && k; i++) {
			if (j < got && idx[j] == i)
				j++;
			else
				assert_true(s[i] < edge || (s[i] == edge && i > idx[0]));
		}
		/* of those at the edge the first ones */
		for (uint32_t i = 0, j = 0, skipped = 0; i < n && got == k; i++) {
			bool in = j < got && idx[j] == i;

			j += in;
			if (s[i] == edge) {
				assert_false(in && skipped);
				skipped += !in;
			}
		}
	}
}

/* The radius is the root mean square distance from the centre as it will be used. */
static void test_summary(void **state)
{
	static struct lane l;

	for (int t = ROW_F32; t <= ROW_BF16; t++) {
		lane_make(&l, 64, (enum row_dtype)t, true);
		for (uint32_t r = 0; r < RUNS; r++) {
			const struct recall_sum *s = l.run[r].sum;

			assert_int_equal(s->groups, recall_groups(l.run[r].rows));
			for (uint32_t g = 0; g < s->groups; g++) {
				const int8_t *c = (const int8_t *)(s->v + 2 * s->groups) + g * 64;
				uint32_t n = MIN(32u, l.run[r].rows - g * 32), i = g * 32;
				double sum = 0;

				for (uint32_t d = 0; d < 64; d++) {
					double mean = 0;

					for (uint32_t k = 0; k < n; k++) {
						double e = key_at(&l, r, i + k, d) - (double)c[d] * s->v[g];

						mean += key_at(&l, r, i + k, d) / n;
						sum += e * e;
					}
					assert_true(fabs(mean - (double)c[d] * s->v[g]) <= 0.51 * s->v[g]);
				}
				assert_true(fabs(sqrt(sum / n) - s->v[s->groups + g]) < 1e-3);
			}
		}
		lane_free(&l);
	}
	assert_true(recall_sum_bytes(128, 64) <= 0.0095 * 128 * 256); /* of K and V in fp16 */
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_matches_definition),
		cmocka_unit_test(test_finds_most_of_the_mass),
		cmocka_unit_test(test_dead_rows_never_come),
		cmocka_unit_test(test_equal_scores_take_the_lower),
		cmocka_unit_test(test_hostile_keys),
		cmocka_unit_test(test_bad_arguments),
		cmocka_unit_test(test_top),
		cmocka_unit_test(test_summary),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
