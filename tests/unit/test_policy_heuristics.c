/* SPDX-License-Identifier: MIT */
/* Every untrained policy against its formula in double, for all row types, widths, strides and CPUs. */
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "policy/decide.h"
#include "policy/heuristic.h"
#include "policy/policy.h"
#include "policy/rows.h"
#include "shm/util.h"

enum { MAX_N = 700, MAX_DIM = 130 };

static uint64_t seed = 97;

static uint32_t rnd(uint32_t below)
{
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)((seed >> 33) % below);
}

/* ---- rows: exact in all three types, so that the reference sees the same numbers --------- */

static double kd[MAX_N][MAX_DIM], vd[MAX_N][MAX_DIM];
static char kbytes[MAX_N * (MAX_DIM * 4 + 7) + 1], vbytes[sizeof(kbytes)];

static void encode(char *at, double value, enum row_dtype dtype)
{
	float f = (float)value;
	uint32_t u;
	uint16_t h;

	memcpy(&u, &f, sizeof(u));
	if (dtype == ROW_F32) {
		memcpy(at, &f, sizeof(f));
		return;
	}
	if (dtype == ROW_BF16)
		h = (uint16_t)(u >> 16);
	else
		h = (uint16_t)(f == 0 ? u >> 16 : (u >> 16 & 0x8000) | ((u & 0x7fffffff) - 0x38000000) >> 13);
	memcpy(at, &h, sizeof(h));
}

struct setup {
	const char *isa;
	enum row_dtype dtype;
	uint32_t k_dim, v_dim, n, pad;
	uint32_t *pos; /* NULL or positions */
};

static uint32_t positions[MAX_N];

static void fill(const struct setup *s, struct policy_cfg *cfg, struct policy_batch *b)
{
	size_t el = s->dtype == ROW_F32 ? 4 : 2;

	*cfg = (struct policy_cfg){.layers = 3, .heads = 2, .k_dim = s->k_dim, .v_dim = s->v_dim, .seed = 11};
	cfg->dtype = s->dtype;
	cfg->isa = s->isa;
	*b = (struct policy_batch){.lane = 3, .n = s->n, .k = kbytes + 1, .v = vbytes + 1, .pos = s->pos};
	b->k_stride = s->k_dim * el + s->pad;
	b->v_stride = s->v_dim * el + s->pad;
	b->total = s->n;
	b->nonce = 5;
	for (uint32_t i = 0; i < s->n; i++) {
		double scale = ldexp(1, -(int)rnd(5));

		positions[i] = i ? positions[i - 1] + 1 + rnd(3) : rnd(4);
		for (uint32_t c = 0; c < s->k_dim; c++) {
			kd[i][c] = ((int)rnd(511) - 255) * scale / 16 + (c % 5 == 0 ? 8 : 0);
			kd[i][c] = ldexp(rint(ldexp(kd[i][c], 3)), -3); /* 8 bits are enough for all types */
			if (fabs(kd[i][c]) > 15)
				kd[i][c] = rint(kd[i][c]);
			encode(kbytes + 1 + i * b->k_stride + c * el, kd[i][c], s->dtype);
		}
		for (uint32_t c = 0; c < s->v_dim; c++) {
			vd[i][c] = ((int)rnd(511) - 255) * scale / 32;
			encode(vbytes + 1 + i * b->v_stride + c * el, vd[i][c], s->dtype);
		}
	}
}

/* ---- references ------------------------------------------------------------------------------ */

static double norm(const double *x, uint32_t dim)
{
	double s = 0;

	for (uint32_t c = 0; c < dim; c++)
		s += x[c] * x[c];
	return sqrt(s);
}

static void ref_knorm(const struct setup *s, double *out)
{
	for (uint32_t i = 0; i < s->n; i++)
		out[i] = -norm(kd[i], s->k_dim);
}

static void ref_vnorm(const struct setup *s, double *out)
{
	for (uint32_t i = 0; i < s->n; i++)
		out[i] = norm(vd[i], s->v_dim);
}

static void ref_vrange(const struct setup *s, double *out)
{
	for (uint32_t i = 0; i < s->n; i++) {
		double lo = INFINITY, hi = -INFINITY;

		for (uint32_t c = 0; c < s->v_dim; c++) {
			lo = fmin(lo, vd[i][c]);
			hi = fmax(hi, vd[i][c]);
		}
		out[i] = hi - lo;
	}
}

static void ref_keydiff(const struct setup *s, double *out)
{
	double mean[MAX_DIM] = {0}, len;

	for (uint32_t i = 0; i < s->n; i++)
		for (uint32_t c = 0; c < s->k_dim; c++)
			if (norm(kd[i], s->k_dim) > 0)
				mean[c] += kd[i][c] / norm(kd[i], s->k_dim) / s->n;
	len = norm(mean, s->k_dim);
	for (uint32_t i = 0; i < s->n; i++) {
		double dot = 0, own = norm(kd[i], s->k_dim);

		for (uint32_t c = 0; c < s->k_dim; c++)
			dot += kd[i][c] * mean[c];
		out[i] = own > 0 && len > 0 ? -dot / (own * len) : 0;
	}
}

/* softmax over the chunk of the spread against the next chunk, for one of K and V. */
static void ref_lag_side(double (*x)[MAX_DIM], uint32_t dim, uint32_t at, double *sum)
{
	double spread[128], total = 0;

	for (uint32_t i = 0; i < 128; i++) {
		double r[MAX_DIM], mean = 0, var = 0;

		for (uint32_t c = 0; c < dim; c++) {
			double lo = INFINITY, hi = -INFINITY;

			for (uint32_t j = at + 128; j < at + 256; j++) {
				lo = fmin(lo, x[j][c]);
				hi = fmax(hi, x[j][c]);
			}
			r[c] = hi > lo ? (x[at + i][c] - lo) / (hi - lo) : 0;
			mean += r[c] / dim;
		}
		for (uint32_t c = 0; c < dim; c++)
			var += (r[c] - mean) * (r[c] - mean);
		spread[i] = dim > 1 ? sqrt(var / (dim - 1)) : 0;
		total += exp(spread[i]);
	}
	for (uint32_t i = 0; i < 128; i++)
		sum[i] += exp(spread[i]) / total / 2;
}

/* ---- the closed formulas, everywhere ------------------------------------------------------------- */

static struct policy *open_policy(const char *name, const struct policy_cfg *cfg)
{
	struct policy *p = NULL;
	char err[200] = "";

	if (policy_find(name)->init(&p, cfg, err, sizeof(err)) < 0)
		fail_msg("%s: %s", name, err);
	return p;
}

static float got[MAX_N + 1];

static void score(const char *name, const struct policy_cfg *cfg, const struct policy_batch *b)
{
	struct policy *p = open_policy(name, cfg);

	for (uint32_t i = 0; i <= MAX_N; i++)
		got[i] = 12345;
	assert_int_equal(p->ops->score(p, b, got), 0);
	assert_true(got[b->n] == 12345); /* wrote n scores */
	for (uint32_t i = 0; i < b->n; i++)
		assert_true(isfinite(got[i]));
	p->ops->free(p);
}

static const char *const isas[] = {"ref", NULL};
static const enum row_dtype dtypes[] = {ROW_F32, ROW_F16, ROW_BF16};
static const uint32_t shapes[][4] = {
	/* k_dim, v_dim, n, pad */
	{64, 64, 300, 0},  {64, 64, 32, 64}, {128, 96, 33, 2}, {1, 1, 5, 3}, {7, 9, 64, 1},
	{80, 20, 600, 32}, {16, 130, 31, 0}, {8, 8, 1, 0},     {3, 2, 0, 0},
};

static void formulas(void **state)
{
	static const struct {
		const char *name;
		void (*ref)(const struct setup *s, double *out);
	} policies[] = {
		{"knorm", ref_knorm}, {"vnorm", ref_vnorm}, {"vrange", ref_vrange}, {"keydiff", ref_keydiff}};
	static double want[MAX_N];

	for (size_t p = 0; p < ARRAY_SIZE(policies); p++)
		for (size_t a = 0; a < ARRAY_SIZE(isas) * ARRAY_SIZE(dtypes) * ARRAY_SIZE(shapes); a++) {
			const uint32_t *sh = shapes[a / 6];
			struct setup s = {isas[a % 2], dtypes[a / 2 % 3], sh[0], sh[1], sh[2], sh[3], NULL};
			struct policy_batch b;
			struct policy_cfg cfg;

			fill(&s, &cfg, &b);
			score(policies[p].name, &cfg, &b);
			policies[p].ref(&s, want);
			for (uint32_t i = 0; i < s.n; i++)
				assert_true(fabs(got[i] - want[i]) <= 2e-5 * (fabs(want[i]) + 0.05));
		}
}

static void zero_keys_have_no_direction(void **state)
{
	struct setup s = {NULL, ROW_F16, 64, 64, 40, 0, NULL};
	struct policy_batch b;
	struct policy_cfg cfg;

	fill(&s, &cfg, &b);
	memset(kbytes + 1 + 7 * b.k_stride, 0, b.k_stride);
	memset(kd[7], 0, sizeof(kd[7]));
	score("keydiff", &cfg, &b);
	assert_true(got[7] == 0);
	memset(kbytes, 0, sizeof(kbytes));
	score("keydiff", &cfg, &b);
	for (uint32_t i = 0; i < s.n; i++)
		assert_true(got[i] == 0);
}

/* ---- lagkv ------------------------------------------------------------------------------------------ */

static void check_chunk(const struct setup *s, uint32_t at)
{
	double sum[128] = {0};
	bool seen[128] = {0};

	ref_lag_side(kd, s->k_dim, at, sum);
	ref_lag_side(vd, s->v_dim, at, sum);
	for (uint32_t i = 0; i < 128; i++) {
		uint32_t rank = (uint32_t)lrintf(got[at + i] * 128);

		assert_true(rank < 128 && got[at + i] == (float)rank / 128 && !seen[rank]);
		seen[rank] = true;
		for (uint32_t j = 0; j < 128; j++)
			if (sum[i] < sum[j] * (1 - 1e-5))
				assert_true(got[at + i] < got[at + j]);
	}
}

static void lagkv_ranks_inside_chunks(void **state)
{
	const uint32_t lengths[] = {260, 261, 387, 388, 400, 645};

	for (size_t a = 0; a < 2 * 3 * ARRAY_SIZE(lengths); a++) {
		struct setup s = {
			isas[a % 2], dtypes[a / 2 % 3], a % 5 ? 64 : 7, a % 3 ? 64 : 1, lengths[a / 6], 2,
			NULL};
		uint32_t first = a % 4 == 3 ? rnd(5) : 4, at;
		struct policy_batch b;
		struct policy_cfg cfg;

		fill(&s, &cfg, &b);
		b.first_pos = 4 - first; /* so many of the rows are sinks */
		score("lagkv", &cfg, &b);
		for (uint32_t i = 0; i < first; i++)
			assert_true(got[i] == 1);
		for (at = first; at + 256 <= s.n; at += 128)
			check_chunk(&s, at);
		assert_true(at > first);
		for (; at < s.n; at++) /* the last whole chunk and what follows tie, on top */
			assert_true(got[at] == 1);
	}
}

static void lagkv_ties_go_to_the_later_position(void **state)
{
	for (int isa = 0; isa < 2; isa++) {
		struct setup s = {isas[isa], ROW_F32, 64, 64, 400, 0, NULL};
		struct policy_batch b;
		struct policy_cfg cfg;

		fill(&s, &cfg, &b);
		for (uint32_t i = 5; i < 132; i++) { /* one chunk of equal rows */
			memcpy(kbytes + 1 + i * b.k_stride, kbytes + 1 + 4 * b.k_stride, b.k_stride);
			memcpy(vbytes + 1 + i * b.v_stride, vbytes + 1 + 4 * b.v_stride, b.v_stride);
		}
		score("lagkv", &cfg, &b);
		for (uint32_t i = 0; i < 128; i++)
			assert_true(got[4 + i] == (float)i / 128);
	}
}

static void lagkv_short_is_recency(void **state)
{
	for (uint32_t n = 1; n < 260; n += 43) {
		struct setup s = {NULL, ROW_F16, 64, 64, n, 0, NULL};
		struct policy_batch b;
		struct policy_cfg cfg;

		fill(&s, &cfg, &b);
		score("lagkv", &cfg, &b);
		for (uint32_t i = 1; i < n; i++) {
			if (i < 4)
				assert_true(got[i] == got[0]);
			else
				assert_true(got[i] < got[0] && (i == 4 || got[i] > got[i - 1]));
		}
	}
}

/* ---- cur ----------------------------------------------------------------------------------------------- */

/* exp(score) of rows k and v (doubles, small integers), one at a time, past the sinks. */
static double leverage(struct policy *p, const double *k, const double *v, uint32_t dim, uint64_t nonce)
{
	float kf[MAX_DIM], vf[MAX_DIM], s;
	struct policy_batch b = {.n = 1, .k = kf, .v = vf, .first_pos = 100, .total = 101, .nonce = nonce};

	for (uint32_t c = 0; c < dim; c++) {
		kf[c] = (float)k[c];
		vf[c] = (float)v[c];
	}
	assert_int_equal(p->ops->score(p, &b, &s), 0);
	return exp(s);
}

static void gram_of(struct policy *p, uint32_t dim, uint64_t nonce, double a[MAX_DIM][MAX_DIM])
{
	double unit[MAX_DIM] = {1}, e[MAX_DIM] = {0}, first = sqrt(leverage(p, unit, unit, dim, nonce));

	for (uint32_t i = 0; i < dim; i++) {
		e[i] = 1;
		a[i][i] = leverage(p, e, unit, dim, nonce) / first;
		for (uint32_t j = 0; j < i; j++) {
			e[j] = 1;
			a[i][j] = a[j][i] = (leverage(p, e, unit, dim, nonce) / first - a[i][i] - a[j][j]) / 2;
			e[j] = 0;
		}
		e[i] = 0;
	}
}

static double form(double a[MAX_DIM][MAX_DIM], const double *x, uint32_t dim)
{
	double s = 0;

	for (uint32_t i = 0; i < dim; i++)
		for (uint32_t j = 0; j < dim; j++)
			s += x[i] * a[i][j] * x[j];
	return s;
}

/* Pivots of symmetric elimination that are not rounding. */
static uint32_t rank_of(double a[MAX_DIM][MAX_DIM], uint32_t dim)
{
	uint32_t rank = 0;

	for (uint32_t step = 0; step < dim; step++) {
		uint32_t best = 0;

		for (uint32_t i = 0; i < dim; i++)
			if (a[i][i] > a[best][best])
				best = i;
		if (a[best][best] < 1e-3)
			break;
		rank++;
		for (uint32_t i = 0; i < dim; i++)
			for (uint32_t j = 0; j < dim; j++)
				if (i != best && j != best)
					a[i][j] -= a[i][best] * a[best][j] / a[best][best];
		for (uint32_t i = 0; i < dim; i++)
			a[i][best] = a[best][i] = 0;
	}
	return rank;
}

/*
 * |kG|^2 |vG|^2 for one hidden G: measure GG' on unit vectors, then predict the
 * score of other rows from it; GG' has rank 20 and, over many plans, mean I.
 */
static void cur_is_a_random_projection(void **state)
{
	static double a[MAX_DIM][MAX_DIM];
	enum { D = 40 };

	for (int isa = 0; isa < 2; isa++) {
		struct policy_cfg cfg = {.k_dim = D, .v_dim = D, .dtype = ROW_F32, .seed = 3, .isa = isas[isa]};
		struct policy *p = open_policy("cur", &cfg);
		double mean = 0, off = 0;

		gram_of(p, D, 9, a);
		for (int t = 0; t < 50; t++) {
			double k[D], v[D], want;

			for (int c = 0; c < D; c++) {
				k[c] = (int)rnd(21) - 10;
				v[c] = (int)rnd(21) - 10;
			}
			want = form(a, k, D) * form(a, v, D);
			assert_true(fabs(leverage(p, k, v, D, 9) / want - 1) < 1e-3);
			assert_true(fabs(leverage(p, k, v, D, 10) / want - 1) >
				    1e-6); /* another plan, another G */
		}
		assert_int_equal(rank_of(a, D), 20);
		for (uint64_t nonce = 0; nonce < 40; nonce++) {
			gram_of(p, D, nonce, a);
			for (int i = 0; i < D; i++) {
				mean += a[i][i] / (40 * D);
				off += i ? a[i][i - 1] / (40 * (D - 1)) : 0;
			}
		}
		assert_true(fabs(mean - 1) < 0.05 && fabs(off) < 0.03);
		p->ops->free(p);
	}
}

static void cur_keeps_sinks_and_survives_zeros(void **state)
{
	struct setup s = {NULL, ROW_F16, 64, 32, 50, 0, NULL};
	struct policy_batch b;
	struct policy_cfg cfg;

	fill(&s, &cfg, &b);
	memset(kbytes + 1 + 20 * b.k_stride, 0, b.k_stride);
	score("cur", &cfg, &b);
	for (uint32_t i = 0; i < 50; i++) {
		assert_int_equal(got[i] == SCORE_SINK, i < 4);
		assert_true(i == 20 || got[i] > got[20]);
	}
}

/* ---- random and streaming -----------------------------------------------------------------------------------
 */

static int by_key(const void *x, const void *y)
{
	return (int)*(const uint16_t *)x - (int)*(const uint16_t *)y;
}

static void random_spreads_over_the_keys(void **state)
{
	static float s[16384], t[16384];
	static uint16_t keys[16384];
	struct policy_cfg cfg = {.seed = 42};
	struct policy *p = open_policy("random", &cfg), *q;
	struct policy_batch b = {.lane = 7, .n = 16384, .total = 16384};
	uint32_t distinct = 1, quarter[4] = {0};

	assert_int_equal(p->ops->score(p, &b, s), 0);
	score_keys(s, keys, 16384);
	for (uint32_t i = 0; i < 16384;
	     i++) /* each quarter of the ranks is as likely in each quarter of positions */
		quarter[(keys[i] - 0x400) / 15872]++;
	for (int i = 0; i < 4; i++)
		assert_true(quarter[i] > 3900 && quarter[i] < 4300);
	qsort(keys, 16384, sizeof(*keys), by_key);
	for (uint32_t i = 1; i < 16384; i++)
		distinct += keys[i] != keys[i - 1];
	assert_true(distinct > 14000); /* of 63,487: 14,440 expected */

	b.lane = 8;
	assert_int_equal(p->ops->score(p, &b, t), 0);
	assert_memory_not_equal(s, t, sizeof(s));
	b.lane = 7;
	cfg.seed = 43;
	q = open_policy("random", &cfg);
	assert_int_equal(q->ops->score(q, &b, t), 0);
	assert_memory_not_equal(s, t, sizeof(s));
	p->ops->free(p);
	q->ops->free(q);
}

static void streaming_is_sinks_then_recency(void **state)
{
	struct policy_cfg cfg = {0};
	struct policy *p = open_policy("streaming", &cfg);
	uint16_t last = 0, sink;
	float s[4];

	for (uint32_t pos = 4; pos + 4 < 1048576; pos += 997) {
		struct policy_batch b = {.n = 4, .first_pos = pos, .total = pos + 5};

		assert_int_equal(p->ops->score(p, &b, s), 0);
		for (int i = 0; i < 4; i++) {
			assert_true(score_key(s[i]) >= last); /* equal keys go to the later position */
			last = score_key(s[i]);
		}
	}
	assert_int_equal(p->ops->score(p, &(struct policy_batch){.n = 4, .total = 4}, s), 0);
	sink = score_key(s[0]);
	assert_true(sink > last && score_key(s[3]) == sink);
	p->ops->free(p);
}

/* ---- what holds for every policy
 * -------------------------------------------------------------------------------- */

/* A static score is the row's own: whatever batch it comes in, and whatever the total. */
static void static_scores_ignore_the_batch(void **state)
{
	static float all[MAX_N];

	for (const struct policy_ops *const *ops = policy_registry; *ops; ops++) {
		struct setup s = {NULL, ROW_F16, 64, 64, 300, 0, positions};
		struct policy_batch b, part;
		struct policy_cfg cfg;

		if (!((*ops)->caps & POLICY_STATIC) || (*ops)->caps & POLICY_NEEDS_WEIGHTS)
			continue;
		fill(&s, &cfg, &b);
		score((*ops)->name, &cfg, &b);
		memcpy(all, got, sizeof(all));
		for (uint32_t from = 0; from < 300; from += 61) {
			part = b;
			part.n = MIN(61, 300 - from);
			part.k = (const char *)b.k + from * b.k_stride;
			part.v = (const char *)b.v + from * b.v_stride;
			part.pos = positions + from;
			part.nonce = from;
			part.total = 1000;
			score((*ops)->name, &cfg, &part);
			assert_memory_equal(got, all + from, part.n * sizeof(*got));
		}
	}
}

/* Rows are the client's: not-a-number, infinities and huge values must come out finite. */
static void hostile_rows_score_finite(void **state)
{
	static const uint16_t odd[] = {0x7e00, 0xfe00, 0x7c00, 0xfc00, 0x7bff, 0xfbff,
				       0x7f80, 0xff80, 0x7f7f, 0,      1};

	for (const struct policy_ops *const *ops = policy_registry; *ops; ops++)
		for (int a = 0; a < 12; a++) {
			struct setup s = {isas[a % 2], dtypes[a / 2 % 3], 64, 64, 300, 0, NULL};
			struct policy_batch b;
			struct policy_cfg cfg;

			if ((*ops)->id == POLICY_CLIENT || (*ops)->caps & POLICY_NEEDS_WEIGHTS)
				continue;
			fill(&s, &cfg, &b);
			for (uint32_t i = 0; i < (a < 6 ? 40 : sizeof(kbytes) / 4); i++) {
				size_t at = 1 + 2 * (size_t)rnd((300 * 128 - 2) / 2);

				memcpy(kbytes + at, &odd[rnd(ARRAY_SIZE(odd))], 2);
				memcpy(vbytes + at, &odd[rnd(ARRAY_SIZE(odd))], 2);
			}
			score((*ops)->name, &cfg, &b);
		}
}

static void registry_is_sound(void **state)
{
	uint32_t seen = 0, n = 0;

	for (const struct policy_ops *const *p = policy_registry; *p; p++, n++) {
		bool is_static = (*p)->caps & POLICY_STATIC, context = (*p)->caps & POLICY_CONTEXT;

		assert_true((*p)->id < POLICY_IDS && !(seen >> (*p)->id & 1));
		seen |= 1u << (*p)->id;
		assert_ptr_equal(policy_find((*p)->name), *p);
		assert_ptr_equal(policy_by_id((*p)->id), *p);
		assert_true(is_static != context);
		assert_true((*p)->doc && strlen((*p)->doc) > 10 && !strchr((*p)->doc, '\n'));
		(*p)->free(NULL);
	}
	assert_int_equal(n, POLICY_IDS);
	assert_null(policy_find("oracle"));
	assert_null(policy_find(""));
	assert_null(policy_by_id(POLICY_IDS));
}

static void client_scores_come_from_elsewhere(void **state)
{
	struct policy_cfg cfg = {0};
	struct policy *p = open_policy("client", &cfg);
	float s;

	assert_int_equal(p->ops->score(p, &(struct policy_batch){.n = 1, .total = 1}, &s), -ENOTSUP);
	p->ops->free(p);
}

static void refuse(const char *name, const struct policy_cfg *cfg, int want, const char *field)
{
	struct policy *p = (struct policy *)&refuse;
	char err[160] = "";

	assert_int_equal(policy_find(name)->init(&p, cfg, err, sizeof(err)), want);
	assert_ptr_equal(p, &refuse); /* set only on success */
	assert_non_null(strstr(err, field));
	assert_null(strchr(err, '\n'));
}

static void impossible_configurations_are_refused(void **state)
{
	struct policy_cfg good = {.k_dim = 64, .v_dim = 64, .dtype = ROW_F16}, cfg;

	cfg = good;
	cfg.dtype = ROW_OPAQUE;
	refuse("knorm", &cfg, -EINVAL, "dtype: 0");
	cfg.dtype = 4;
	refuse("lagkv", &cfg, -EINVAL, "dtype: 4");
	cfg = good;
	cfg.k_dim = 0;
	refuse("keydiff", &cfg, -EINVAL, "k_dim: 0");
	cfg.k_dim = 8193;
	refuse("cur", &cfg, -EINVAL, "k_dim: 8193");
	cfg = good;
	cfg.v_dim = 0; /* a cache without V, as MLA's */
	refuse("vnorm", &cfg, -EINVAL, "v_dim: 0");
	score("knorm", &cfg, &(struct policy_batch){.n = 0});
	cfg = good;
	cfg.isa = "sse9";
	refuse("knorm", &cfg, -ENOTSUP, "isa: sse9");
	cfg.isa = "ref";
	cfg.dtype = ROW_OPAQUE; /* position is enough for these */
	score("random", &cfg, &(struct policy_batch){.n = 3, .total = 3});
	score("streaming", &cfg, &(struct policy_batch){.n = 3, .total = 3});
}

/* ---- the row kernels
 * ----------------------------------------------------------------------------------------------- */

static void every_half_and_bf16_loads_exactly(void **state)
{
	static uint16_t raw[65536];
	static float x[65536];

	for (uint32_t h = 0; h < 65536; h++)
		raw[h] = (uint16_t)h;
	for (int isa = 0; isa < 2; isa++) {
		rows_kern(isas[isa])->load(x, raw, 0, 65536, 1, ROW_F16);
		for (uint32_t h = 0; h < 65536; h++) {
			int exp = h >> 10 & 31;
			double m = h & 0x3ff, v = exp ? ldexp(1024 + m, exp - 25) : ldexp(m, -24);

			if (exp == 31)
				v = m ? NAN : INFINITY;
			v = h & 0x8000 ? -v : v;
			assert_true(isnan(v) ? isnan(x[h]) : x[h] == v);
		}
		rows_kern(isas[isa])->load(x, raw, 0, 65536, 1, ROW_BF16);
		for (uint32_t h = 0; h < 65536; h++) {
			uint32_t u;

			memcpy(&u, &x[h], sizeof(u));
			assert_int_equal(u, h << 16);
		}
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(formulas),
		cmocka_unit_test(zero_keys_have_no_direction),
		cmocka_unit_test(lagkv_ranks_inside_chunks),
		cmocka_unit_test(lagkv_ties_go_to_the_later_position),
		cmocka_unit_test(lagkv_short_is_recency),
		cmocka_unit_test(cur_is_a_random_projection),
		cmocka_unit_test(cur_keeps_sinks_and_survives_zeros),
		cmocka_unit_test(random_spreads_over_the_keys),
		cmocka_unit_test(streaming_is_sinks_then_recency),
		cmocka_unit_test(static_scores_ignore_the_batch),
		cmocka_unit_test(hostile_rows_score_finite),
		cmocka_unit_test(registry_is_sound),
		cmocka_unit_test(client_scores_come_from_elsewhere),
		cmocka_unit_test(impossible_configurations_are_refused),
		cmocka_unit_test(every_half_and_bf16_loads_exactly),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
