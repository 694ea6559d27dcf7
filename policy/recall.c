/* SPDX-License-Identifier: MIT */
/* The search: bounds of all groups, the best of them row by row, the best rows and what lies around them. */
#include <math.h>
#include <string.h>
#include "policy/recall_kern.h"
#include "shm/util.h"

#define LANES RECALL_LANES
#define MAX_RUNS (1u << 24)

/* One search. The arrays lie in the caller's scratch; `b` counts blocks of queries. */
struct search {
	const struct recall_query *q;
	const struct recall_run *run;
	const struct recall_kern *kern;
	const struct rows_kern *rows;
	uint32_t blocks, groups, probed, n; /* n: rows that were scored */
	size_t width;
	float *qt;      /* [blocks][dim][LANES], times scale */
	float *spread;  /* [blocks][LANES]: bound = logit of the centre + spread * radius */
	float *base;    /* [blocks][LANES] */
	float *top;     /* [blocks][LANES] */
	float *sum;     /* [blocks][LANES] */
	float *tile;    /* [RECALL_GROUP][dim] */
	float *bound;   /* [blocks][groups][LANES] */
	float *score;   /* [groups], then [n] */
	float *logit;   /* [blocks][probed * RECALL_GROUP][LANES] */
	uint32_t *id;   /* [groups]: run * 4 + group */
	uint32_t *best; /* [probed], then [want] */
	struct recall_near near;
};

static size_t take(size_t *used, size_t bytes)
{
	size_t at = *used;

	*used += ALIGN_UP(bytes, 64);
	return at;
}

static uint32_t probes(const struct recall_query *q, uint32_t groups)
{
	uint64_t share = DIV_UP((uint64_t)groups * q->probe, 1000),
		 rows = DIV_UP((uint64_t)q->want * 4, RECALL_GROUP);

	return (uint32_t)MIN(MAX(share, rows), groups);
}

/* Lay the arrays out for so many groups and words of positions; returns their bytes. */
static size_t lay_out(struct search *s, const struct recall_query *q, uint32_t groups, uint32_t words,
		      char *base)
{
	size_t blocks = DIV_UP(q->n, LANES), lanes = blocks * LANES * sizeof(float), used = 0;
	size_t probed = probes(q, groups), rows = probed * RECALL_GROUP, all = (size_t)groups * RECALL_GROUP;

	s->near.words = words;
	s->near.before = q->before;
	s->near.after = q->after;
	s->blocks = (uint32_t)blocks;
#define ARRAY(name, bytes) s->name = (void *)(base + take(&used, bytes))
	ARRAY(qt, lanes * q->dim);
	ARRAY(spread, lanes);
	ARRAY(base, lanes);
	ARRAY(top, lanes);
	ARRAY(sum, lanes);
	ARRAY(tile, (size_t)RECALL_GROUP * q->dim * sizeof(float));
	ARRAY(bound, lanes * groups);
	ARRAY(score, MAX(groups, rows) * sizeof(float));
	ARRAY(logit, lanes * rows);
	ARRAY(id, groups * sizeof(uint32_t));
	ARRAY(best, MAX(probed, MIN(q->want, all)) * sizeof(uint32_t));
	ARRAY(near.lane, words * sizeof(uint64_t));
	ARRAY(near.take, words * sizeof(uint64_t));
	ARRAY(near.rank, words * sizeof(uint32_t));
	ARRAY(near.score, (all + q->before + q->after) * sizeof(float));
#undef ARRAY
	return used;
}

static uint32_t count_groups(const struct recall_run *runs, uint32_t n_runs)
{
	uint32_t groups = 0;

	for (uint32_t i = 0; i < n_runs; i++)
		groups += runs[i].sum->groups;
	return groups;
}

size_t recall_scratch(const struct recall_query *q, const struct recall_run *runs, uint32_t n_runs)
{
	struct search s;
	static char none[64];

	n_runs = MIN(n_runs, MAX_RUNS);
	return lay_out(&s, q, count_groups(runs, n_runs), near_words(runs, n_runs), none) + 64;
}

static int check(const struct recall_query *q, const struct recall_run *runs, uint32_t n_runs)
{
	if (!q->n || q->n > RECALL_MAX_QUERIES || !q->dim || q->dim > RECALL_MAX_DIM || !(q->scale > 0) ||
	    !isfinite(q->scale) || q->dtype < ROW_F32 || q->dtype > ROW_BF16 || q->norm > RECALL_MASS ||
	    !q->probe || q->probe > 1000 || q->before > RECALL_MAX_NEAR || q->after > RECALL_MAX_NEAR ||
	    n_runs > MAX_RUNS)
		return -EINVAL;
	for (uint32_t i = 0; i < n_runs; i++)
		if (!runs[i].rows || runs[i].rows > RECALL_RUN || runs[i].sum->dim != q->dim ||
		    runs[i].sum->groups != recall_groups(runs[i].rows) || !near_fits(&runs[i]))
			return -EINVAL;
	return 0;
}

/* Transposed, scaled, in whole blocks. A lane without a query never wins: its base is infinite. */
static void take_queries(struct search *s)
{
	const struct recall_query *q = s->q;
	uint32_t dim = q->dim;

	memset(s->qt, 0, (size_t)s->blocks * dim * LANES * sizeof(float));
	memset(s->spread, 0, (size_t)s->blocks * LANES * sizeof(float));
	for (uint32_t j = 0; j < q->n; j++) {
		float *t = s->qt + (size_t)(j / LANES) * dim * LANES + j % LANES, sq = 0;

		for (uint32_t d = 0; d < dim; d++) {
			float v = q->q[(size_t)j * dim + d] * q->scale;

			t[(size_t)d * LANES] = v;
			sq += v * v;
		}
		s->spread[j] = RECALL_SPREAD * sqrtf(sq / (float)dim);
		if (!isfinite(s->spread[j]))
			s->spread[j] = 0;
	}
}

static void fill(float *v, uint32_t n, float with)
{
	for (uint32_t i = 0; i < n; i++)
		v[i] = with;
}

/* Lanes that hold no query. */
static void close_lanes(const struct search *s, float *base)
{
	fill(base + s->q->n, s->blocks * LANES - s->q->n, INFINITY);
}

/* What -inf would make of a difference. */
static void no_infinity(float *v, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		v[i] = MAX(v[i], -3e38f);
}

/* ---- groups ------------------------------------------------------------------------------------ */

/* Bounds of groups [from, from + n), whose centres are in the tile. */
static void bound_tile(struct search *s, uint32_t from, uint32_t n, const float *radius)
{
	for (uint32_t b = 0; b < s->blocks; b++) {
		float *out = s->bound + ((size_t)b * s->groups + from) * LANES, *spread = s->spread + b * LANES;

		s->kern->logits(s->tile, s->q->dim, n, s->qt + (size_t)b * s->q->dim * LANES, out);
		for (uint32_t i = 0; i < n; i++)
			for (uint32_t j = 0; j < LANES; j++)
				out[i * LANES + j] += MIN(spread[j] * radius[i], 1e30f);
		s->kern->max(out, n, s->top + b * LANES);
	}
}

static void bound_groups(struct search *s)
{
	uint32_t dim = s->q->dim;
	float radius[RECALL_GROUP];

	fill(s->top, s->blocks * LANES, -INFINITY);
	for (uint32_t from = 0, n; from < s->groups; from += n) {
		n = MIN(RECALL_GROUP, s->groups - from);
		for (uint32_t i = 0; i < n; i++) {
			const struct recall_sum *sum = s->run[s->id[from + i] / 4].sum;
			uint32_t g = s->id[from + i] % 4;

			radius[i] = sum->v[sum->groups + g];
			s->kern->centre(s->tile + (size_t)i * dim, recall_centre(sum, g), dim, sum->v[g]);
		}
		bound_tile(s, from, n, radius);
	}
}

static void list_groups(struct search *s, uint32_t n_runs)
{
	s->groups = 0;
	for (uint32_t r = 0; r < n_runs; r++)
		for (uint32_t g = 0; g < s->run[r].sum->groups; g++)
			if (near_live(&s->run[r], g))
				s->id[s->groups++] = r * 4 + g;
}

/* Indices into id, ascending, of the groups to look into. */
static void choose_groups(struct search *s)
{
	s->probed = probes(s->q, s->groups);
	if (s->probed == s->groups) {
		for (uint32_t i = 0; i < s->groups; i++)
			s->best[i] = i;
		return;
	}
	bound_groups(s);
	no_infinity(s->top, s->blocks * LANES);
	close_lanes(s, s->top);
	fill(s->score, s->groups, -3e38f); /* even one without a finite bound may be looked into */
	for (uint32_t b = 0; b < s->blocks; b++)
		s->kern->best(s->bound + (size_t)b * s->groups * LANES, s->groups, s->top + b * LANES,
			      s->score);
	s->probed = recall_top(s->kern, s->score, s->groups, s->probed, s->best);
}

/* ---- rows --------------------------------------------------------------------------------------- */

static const char *group_keys(const struct search *s, uint32_t id)
{
	return (const char *)s->run[id / 4].k + (size_t)(id % 4) * RECALL_GROUP * s->width;
}

static uint32_t group_rows(const struct search *s, uint32_t id)
{
	return MIN(RECALL_GROUP, s->run[id / 4].rows - id % 4 * RECALL_GROUP);
}

/* The next group's keys arrive while this one's are multiplied. */
static inline __attribute__((always_inline)) void prefetch(const char *p, size_t bytes)
{
	for (size_t o = 0; o < bytes; o += KVT_CACHELINE)
		__builtin_prefetch(p + o, 0, 2);
}

/* Rows as floats: in place when they are floats already. */
static const float *rows_at(struct search *s, const void *src, uint32_t n)
{
	if (s->q->dtype == ROW_F32 && (uintptr_t)src % sizeof(float) == 0)
		return src;
	if (s->q->dtype == ROW_F32)
		memcpy(s->tile, src, n * s->width);
	else
		s->kern->widen(s->tile, src, (size_t)n * s->q->dim, s->q->dtype);
	return s->tile;
}

static void score_groups(struct search *s)
{
	uint32_t stride = s->probed * RECALL_GROUP;

	s->n = 0;
	for (uint32_t i = 0; i < s->probed; i++) {
		uint32_t id = s->id[s->best[i]], n = group_rows(s, id),
			 alive = near_live(&s->run[id / 4], id % 4);
		const float *x;

		if (i + 1 < s->probed) {
			uint32_t next = s->id[s->best[i + 1]];

			prefetch(group_keys(s, next), group_rows(s, next) * s->width);
		}
		x = rows_at(s, group_keys(s, id), n);
		for (uint32_t b = 0; b < s->blocks; b++) {
			float *out = s->logit + ((size_t)b * stride + s->n) * LANES, *to = out;

			s->kern->logits(x, s->q->dim, n, s->qt + (size_t)b * s->q->dim * LANES, out);
			for (uint32_t r = 0; r < n; r++) {
				if (!(alive >> r & 1))
					continue;
				if (to != out + (size_t)r * LANES)
					memcpy(to, out + (size_t)r * LANES, LANES * sizeof(float));
				to += LANES;
			}
		}
		s->n += (uint32_t)__builtin_popcount(alive);
	}
}

/* Add n rows' logits to the running maximum and sum of one block. */
static void accumulate(const struct search *s, const float *l, uint32_t n, float *top, float *sum)
{
	float before[LANES];

	memcpy(before, top, sizeof(before));
	s->kern->max(l, n, top);
	no_infinity(top, LANES);
	for (uint32_t j = 0; j < LANES; j++)
		sum[j] *= expf(MAX(before[j] - top[j], -100.0f));
	s->kern->sumexp(l, n, top, sum);
}

/* L_q into base. */
static void normalise(struct search *s)
{
	uint32_t lanes = s->blocks * LANES, stride = s->probed * RECALL_GROUP;
	const struct recall_query *q = s->q;
	float out[RECALL_GROUP * LANES];

	fill(s->base, lanes, 0);
	if (q->norm == RECALL_LOGIT)
		return;
	fill(s->top, lanes, -3e38f);
	fill(s->sum, lanes, 0);
	for (uint32_t b = 0; b < s->blocks; b++)
		accumulate(s, s->logit + (size_t)b * stride * LANES, s->n, s->top + b * LANES,
			   s->sum + b * LANES);
	for (uint32_t i = 0; q->resident && i < q->resident_n; i += RECALL_GROUP) {
		uint32_t n = MIN(RECALL_GROUP, q->resident_n - i);

		/* Whoever owns these may write them meanwhile: read once. */
		s->rows->load(s->tile, (const char *)q->resident + i * q->resident_stride, q->resident_stride,
			      q->dim, n, q->dtype);

		for (uint32_t b = 0; b < s->blocks; b++) {
			s->kern->logits(s->tile, q->dim, n, s->qt + (size_t)b * q->dim * LANES, out);
			accumulate(s, out, n, s->top + b * LANES, s->sum + b * LANES);
		}
	}
	for (uint32_t j = 0; j < lanes; j++)
		s->base[j] = s->sum[j] > 0 ? s->top[j] + logf(s->sum[j]) : 0;
}

static int choose_rows(struct search *s, uint32_t n_runs, struct recall_hit *hits)
{
	uint32_t stride = s->probed * RECALL_GROUP;
	const float *score = s->score;

	normalise(s);
	close_lanes(s, s->base);
	fill(s->score, s->n, -INFINITY);
	for (uint32_t b = 0; b < s->blocks; b++)
		s->kern->best(s->logit + (size_t)b * stride * LANES, s->n, s->base + b * LANES, s->score);
	near_mark(&s->near, s->run, n_runs);
	near_clear(&s->near);
	for (uint32_t i = 0; i < s->probed; i++) {
		uint32_t id = s->id[s->best[i]];

		near_put(&s->near, &s->run[id / 4], id % 4, score);
		score += __builtin_popcount(near_live(&s->run[id / 4], id % 4));
	}
	near_spread(&s->near, s->kern);
	return near_best(&s->near, s->kern, s->run, n_runs, s->q->want, s->best, hits);
}

int recall_search(const struct recall_query *q, const struct recall_run *runs, uint32_t n_runs, void *scratch,
		  struct recall_hit *hits, struct recall_seen *seen)
{
	struct search s = {.q = q, .run = runs, .rows = rows_kern(NULL)};
	int r = check(q, runs, n_runs);

	if (r < 0)
		return r;
	s.kern = recall_kern(q->isa);
	if (!s.kern)
		return -EINVAL;
	s.width = (size_t)q->dim * (q->dtype == ROW_F32 ? 4 : 2);
	lay_out(&s, q, count_groups(runs, n_runs), near_words(runs, n_runs),
		(char *)ALIGN_UP((uintptr_t)scratch, 64));
	list_groups(&s, n_runs);
	*seen = (struct recall_seen){.groups = s.groups};
	if (!s.groups || !q->want)
		return 0;
	take_queries(&s);
	choose_groups(&s);
	score_groups(&s);
	r = choose_rows(&s, n_runs, hits);
	seen->probed = s.probed;
	seen->rows = s.n;
	return r;
}
