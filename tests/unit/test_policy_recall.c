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
#define SPAN 6u

struct lane {
	uint32_t dim, n_runs, rows;
	enum row_dtype dtype;
	struct recall_run run[RUNS];
	void *keys[RUNS];
	uint64_t pos[RUNS][SPAN];
	float q[64 * 256];
};

/* Run r's row i lies at: runs 0 and 1 are interleaved row by row, 3 to 5 with gaps, run 7 before run 6. */
static uint32_t place(uint32_t r, uint32_t i)
{
	static const uint32_t first[RUNS] = {70, 71, 400, 405, 406, 407, 700, 530, 900};

	return first[r] + i * (r < 2 ? 2 : r >= 3 && r <= 5 ? 3 : 1) + (r == 8 ? i / 10 * 13 : 0);
}

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
		uint32_t at = 0;

		l->keys[r] = malloc((size_t)rows[r] * dim * 4);
		for (uint32_t i = 0; i < rows[r]; i++) {
			if (i % 32 == 0)
				for (uint32_t d = 0; d < dim; d++)
					centre[d] = 2 * normal();
			for (uint32_t d = 0; d < dim; d++)
				put(l->keys[r], (size_t)i * dim + d, dtype, centre[d] + normal());
			if (all || any() % 4)
				l->run[r].alive[i / 32] |= 1u << i % 32;
			at = place(r, i) - place(r, 0);
			l->pos[r][at / 64] |= UINT64_C(1) << at % 64;
		}
		l->run[r].pos = l->pos[r];
		l->run[r].first = place(r, 0);
		l->run[r].span = at / 64 + 1;
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
	void *scratch = malloc(recall_scratch(q, l->run, l->n_runs));
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
	const int8_t *c = recall_centre(sum, g);
	double s = 0, sq = 0;

	for (uint32_t d = 0; d < l->dim; d++) {
		s += (double)c[d] * sum->v[g] * q->q[(size_t)j * l->dim + d];
		sq += (double)q->q[(size_t)j * l->dim + d] * q->q[(size_t)j * l->dim + d];
	}
	return q->scale * (s + RECALL_SPREAD * sqrt(sq) * sum->v[sum->groups + g] / sqrt(l->dim));
}

struct ref_row {
	uint32_t r, i;
	double s, near;
};

static bool live(const struct lane *l, uint32_t r, uint32_t i)
{
	return l->run[r].alive[i / 32] >> i % 32 & 1;
}

static int by_score(const void *a, const void *b)
{
	const struct ref_row *x = a, *y = b;

	if (x->s != y->s)
		return x->s > y->s ? -1 : 1;
	return x->r != y->r ? (x->r < y->r ? -1 : 1) : x->i < y->i ? -1 : 1;
}

static int by_place(const void *a, const void *b)
{
	const struct ref_row *x = a, *y = b;

	return place(x->r, x->i) < place(y->r, y->i) ? -1 : 1;
}

static int by_near(const void *a, const void *b)
{
	const struct ref_row *x = a, *y = b;

	return x->near != y->near ? (x->near > y->near ? -1 : 1) : by_place(a, b);
}

/* The groups to probe, first in g; how many. *ret_edge: how far the scores at the edge are apart. */
static uint32_t reference_groups(const struct recall_query *q, const struct lane *l, struct ref_row *g,
				 double *ret_edge)
{
	double top[512];
	uint32_t n = 0, e;

	for (uint32_t r = 0; r < l->n_runs; r++)
		for (uint32_t k = 0; k < l->run[r].sum->groups; k++)
			if (l->run[r].alive[k])
				g[n++] = (struct ref_row){.r = r, .i = k, .s = -INFINITY};
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
	return e;
}

/* L_q over the probed rows. */
static double reference_base(const struct recall_query *q, const struct lane *l, uint32_t j,
			     const struct ref_row *row, uint32_t rows)
{
	double sum = 0;

	if (q->norm == RECALL_LOGIT)
		return 0;
	for (uint32_t i = 0; i < rows; i++)
		if (row[i].s == 0)
			sum += exp(logit(q, l, j, row[i].r, row[i].i));
	for (uint32_t i = 0; q->resident && i < q->resident_n; i++) {
		double s = 0;

		for (uint32_t d = 0; d < l->dim; d++)
			s += (double)row_element((const char *)q->resident + i * q->resident_stride, d,
						 l->dtype) *
			     q->q[(size_t)j * l->dim + d];
		sum += exp(s * q->scale);
	}
	return log(sum);
}

/* All rows that may be recalled, best first; how many. *ret_probed: of these were scored. */
static uint32_t reference(const struct recall_query *q, const struct lane *l, struct ref_row *out,
			  uint32_t *ret_probed, double *ret_edge)
{
	struct ref_row g[RUNS * 4];
	uint32_t e = reference_groups(q, l, g, ret_edge), n = 0;
	double *s = malloc(l->rows * sizeof(*s));

	*ret_probed = 0;
	for (uint32_t r = 0; r < l->n_runs; r++)
		for (uint32_t i = 0; i < l->run[r].rows; i++) {
			bool probed = false;

			if (!live(l, r, i))
				continue;
			for (uint32_t k = 0; k < e; k++)
				probed |= g[k].r == r && g[k].i == i / 32;
			*ret_probed += probed;
			out[n++] = (struct ref_row){.r = r, .i = i, .s = probed ? 0 : -INFINITY};
		}
	qsort(out, n, sizeof(*out), by_place);
	for (uint32_t i = 0; i < n; i++)
		s[i] = -INFINITY;
	for (uint32_t j = 0; j < q->n; j++) {
		double base = reference_base(q, l, j, out, n);

		for (uint32_t i = 0; i < n; i++)
			if (out[i].s == 0)
				s[i] = fmax(s[i], logit(q, l, j, out[i].r, out[i].i) - base);
	}
	for (int64_t i = 0; i < n; i++) {
		out[i].near = -INFINITY;
		for (int64_t j = MAX(0, i - q->after); j <= MIN(n - 1, i + q->before); j++)
			out[i].near = fmax(out[i].near, s[j]);
	}
	free(s);
	qsort(out, n, sizeof(*out), by_near);
	while (n && out[n - 1].near == -INFINITY)
		n--;
	return n;
}

/*
 * The hits are the best rows of the reference; up to rounding at the edge, unless the arithmetic is exact.
 * False: the fixture cannot tell, because two groups are too close.
 */
static bool compare(const struct recall_query *q, const struct lane *l, bool exact)
{
	struct ref_row *ref = malloc(l->rows * sizeof(*ref));
	struct recall_hit *hits = malloc((q->want + 1) * sizeof(*hits));
	struct recall_seen seen;
	double edge, tol = exact ? 0 : 2e-4;
	uint32_t probed, n = reference(q, l, ref, &probed, &edge);
	int got = search(q, l, hits, &seen);
	bool clear = edge > 1e-5;

	for (int i = 0; i < got; i++)
		assert_int_equal(hits[i].pos, place(hits[i].run, hits[i].row));
	if (clear) {
		assert_int_equal(seen.rows, probed);
		assert_int_equal(got, MIN(n, q->want));
	}
	for (int i = 0; i < got && clear; i++) {
		const struct recall_hit *h = &hits[i];
		uint32_t k = 0;

		if (i)
			assert_true(h[-1].run < h->run || (h[-1].run == h->run && h[-1].row < h->row));
		while (k < n && (ref[k].r != h->run || ref[k].i != h->row))
			k++;
		assert_true(k < n);
		assert_true(fabs(ref[k].near - h->score) <= tol);
		assert_true(exact ? k < (uint32_t)got : ref[k].near >= ref[got - 1].near - tol);
	}
	free(ref);
	free(hits);
	return clear;
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
				assert_true(compare(&q, &l, false));
				q.norm = RECALL_LOGIT;
				assert_true(compare(&q, &l, false));
				q.norm = RECALL_MASS;
				q.probe = 1000;
				q.resident = l.keys[0];
				q.resident_stride = (size_t)l.dim * (t == ROW_F32 ? 4 : 2) * 3;
				q.resident_n = 40;
				assert_true(compare(&q, &l, false));
				ran++;
			}
			lane_free(&l);
		}
	assert_true(ran >= 3 * ARRAY_SIZE(shape));
}

/* What lies around hits, in small whole numbers, which float32 adds up exactly: ties are everywhere. */
static void test_near(void **state)
{
	static const uint32_t near[][2] = {{0, 0},  {8, 24},  {0, 1},   {1, 0},      {3, 0},
					   {0, 31}, {16, 16}, {200, 3}, {1024, 1024}};
	static struct lane l;
	uint32_t ran = 0;

	for (uint32_t round = 0; round < 24; round++) {
		lane_make(&l, 16, ROW_F32, round % 3 == 0);
		for (uint32_t r = 0; r < RUNS; r++) {
			for (uint32_t i = 0; i < l.run[r].rows * 16; i++)
				put(l.keys[r], i, ROW_F32, (float)(int)(any() % 7) - 3);
			recall_summarise(l.keys[r], l.run[r].rows, 16, ROW_F32,
					 (struct recall_sum *)l.run[r].sum);
		}
		for (uint32_t i = 0; i < ARRAY_SIZE(l.q); i++)
			l.q[i] = (float)(int)(any() % 5) - 2;
		for (size_t i = 0; i < ARRAY_SIZE(near); i++)
			for (size_t k = 0; k < ARRAY_SIZE(isas); k++) {
				struct recall_query q = query_of(&l, 3, 10 + 17 * (round % 5));

				if (!recall_kern(isas[k]))
					continue;
				q.isa = isas[k];
				q.scale = 1;
				q.norm = RECALL_LOGIT;
				q.probe = round % 2 ? 1000 : 100;
				q.before = near[i][0];
				q.after = near[i][1];
				ran += compare(&q, &l, true);
			}
		lane_free(&l);
	}
	assert_true(ran > 300);
}

/* One row answers; its neighbours come although their group is not looked into, in the order of positions. */
static void test_neighbours_of_one(void **state)
{
	static struct lane l;
	struct recall_hit hits[20];
	struct recall_seen seen;
	struct recall_query q;
	bool found[1200] = {false};

	lane_make(&l, 16, ROW_F32, true);
	for (uint32_t r = 0; r < RUNS; r++) {
		memset(l.keys[r], 0, (size_t)l.run[r].rows * 16 * 4);
		if (r == 1) /* its last row of group 1, at 71 + 2 * 63 */
			put(l.keys[r], 63 * 16, ROW_F32, 100);
		recall_summarise(l.keys[r], l.run[r].rows, 16, ROW_F32, (struct recall_sum *)l.run[r].sum);
	}
	q = query_of(&l, 1, 8);
	memset(l.q, 0, sizeof(l.q));
	l.q[0] = 1;
	q.probe = 1;
	q.before = 2;
	q.after = 5;
	assert_int_equal(search(&q, &l, hits, &seen), 8);
	assert_int_equal(seen.rows, 32);
	for (int i = 0; i < 8; i++)
		found[hits[i].pos] = true;
	for (uint32_t p = 195; p <= 202; p++) /* of runs 0 and 1 in turn */
		assert_true(found[p]);
	l.run[0].alive[1] = l.run[0].alive[2] = 0; /* positions 134 to 260: then every second one */
	memset(found, 0, sizeof(found));
	assert_int_equal(search(&q, &l, hits, &seen), 8);
	for (int i = 0; i < 8; i++)
		found[hits[i].pos] = true;
	for (uint32_t p = 193; p <= 207; p += 2)
		assert_true(found[p]);
	lane_free(&l);
}

/* A row that two pages hold comes once, and counts once as a neighbour. */
static void test_row_in_two_pages(void **state)
{
	static struct lane l;
	struct recall_hit hits[300];
	struct recall_query q;
	bool found[1200] = {false};
	int n;

	lane_make(&l, 16, ROW_F32, true);
	memcpy(l.pos[1], l.pos[0], sizeof(l.pos[0]));
	memcpy(l.keys[1], l.keys[0], 128 * 16 * 4);
	recall_summarise(l.keys[1], 128, 16, ROW_F32, (struct recall_sum *)l.run[1].sum);
	l.run[1].first = l.run[0].first;
	l.n_runs = 2;
	q = query_of(&l, 3, 300);
	for (uint32_t after = 0; after < 40; after += 13) {
		q.after = after;
		q.want = 300;
		n = search(&q, &l, hits, NULL);
		assert_int_equal(n, 128);
		memset(found, 0, sizeof(found));
		for (int i = 0; i < n; i++) {
			assert_false(found[hits[i].pos]);
			found[hits[i].pos] = true;
		}
		q.want = 37;
		assert_int_equal(search(&q, &l, hits, NULL), 37);
	}
	l.n_runs = RUNS;
	lane_free(&l);
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
		for (uint32_t i = 0; i < 50; i++) { /* 25 of run 0, then 25 of run 1, which lie between them */
			assert_int_equal(hits[i].run, i / 25);
			assert_int_equal(hits[i].row, i % 25);
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
			q.before = mode & 2 ? 8 : 0; /* neighbours neither */
			q.after = mode ? 24 : 0;
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
	REFUSED(before = RECALL_MAX_NEAR + 1);
	REFUSED(after = UINT32_MAX);
	q = ok;
	q.want = 0;
	assert_int_equal(search(&q, &l, hits, NULL), 0);
	l.run[2].rows = 0;
	assert_int_equal(search(&ok, &l, hits, NULL), -EINVAL);
	l.run[2].rows = 33; /* not what was summarised */
	assert_int_equal(search(&ok, &l, hits, NULL), -EINVAL);
	l.run[2].rows = 1;
	assert_int_equal(search(&ok, &l, hits, NULL), 10);
	l.pos[2][0] = 3; /* more positions than rows */
	assert_int_equal(search(&ok, &l, hits, NULL), -EINVAL);
	lane_free(&l);
}

static void test_top(void **state)
{
	for (int round = 0; round < 300; round++) {
		uint32_t n = any() % 400, k = n ? any() % (n + 1) : 0, idx[400], got, possible = 0;
		const struct recall_kern *kern = recall_kern(isas[round % 3]);
		float s[400], edge;

		for (uint32_t i = 0; i < n; i++) {
			s[i] = round % 2 ? (float)(int)(any() % 7) - 3 : normal();
			if (round % 5 == 0 && any() % 4 == 0)
				s[i] = -INFINITY;
			possible += s[i] > -INFINITY;
		}
		got = recall_top(kern ? kern : &recall_ref, s, n, k, idx);
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
				const int8_t *c = recall_centre(s, g);
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
	assert_true(recall_sum_bytes(128, 64) <= 0.0096 * 128 * 256); /* of K and V in fp16 */
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_matches_definition),
		cmocka_unit_test(test_near),
		cmocka_unit_test(test_neighbours_of_one),
		cmocka_unit_test(test_row_in_two_pages),
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
