/* SPDX-License-Identifier: MIT */
/*
 * LagKV (Liang et al., arXiv 2504.04704). Past the sinks, rows are cut into
 * chunks of 128. K and V of a chunk are normalised per channel by the next
 * chunk's minimum and maximum; a row's spread is the standard deviation over its
 * channels (d - 1 degrees of freedom), softmaxed inside the chunk, averaged over
 * K and V, and ranked inside the chunk: score = rank / 128.
 *
 * Ties: sinks, the last whole chunk (it has no next) and the rows after it all
 * score 1, above every ranked row; equal scores go to the later position, there
 * and between chunks. Below 260 rows there is nothing to compare and recency rules.
 */
#include <errno.h>
#include <math.h>
#include <string.h>
#include "policy/heuristic.h"
#include "shm/util.h"

enum { LAG = ROWS_CHUNK, LEAST = SINKS + 2 * LAG };

/* One of K and V: this chunk and the next one, and the channel bounds of the next. */
struct side {
	uint32_t dim;
	void (*load)(const struct heuristic *h, const struct policy_batch *b, uint32_t from, uint32_t n,
		     float *x);
	float *now, *next, *lo, *inv;
	void *memory;
};

static int init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	return heuristic_new(ret, &policy_lagkv_ops, cfg, err, errsize);
}

static int side_init(struct side *s, uint32_t dim)
{
	float *at = malloc((size_t)dim * (2 * LAG + 2) * sizeof(*at));

	if (!at)
		return -ENOMEM;
	s->memory = s->now = at;
	s->dim = dim;
	s->next = s->now + (size_t)LAG * dim;
	s->lo = s->next + (size_t)LAG * dim;
	s->inv = s->lo + dim;
	return 0;
}

/* Half of softmax_i(spread_i) over the chunk, added to s; then the next chunk becomes this one. */
static void side_add(const struct heuristic *h, const struct policy_batch *b, struct side *s, uint32_t next,
		     float *sum)
{
	float spread[LAG], most = -INFINITY, total = 0, *old = s->now;

	s->load(h, b, next, LAG, s->next);
	h->kern->minmax(s->next, s->dim, LAG, s->lo, s->inv);
	for (uint32_t c = 0; c < s->dim; c++) { /* a channel without range says nothing */
		float range = s->inv[c] - s->lo[c];

		s->inv[c] = range > 0 ? 1 / range : 0;
	}
	if (s->dim > 1)
		h->kern->spread(s->now, s->dim, LAG, s->lo, s->inv, spread);
	else
		memset(spread, 0, sizeof(spread));
	scores_finite(spread, LAG);
	for (uint32_t i = 0; i < LAG; i++)
		most = MAX(most, spread[i]);
	for (uint32_t i = 0; i < LAG; i++) {
		spread[i] = expf(spread[i] - most);
		total += spread[i];
	}
	for (uint32_t i = 0; i < LAG; i++)
		sum[i] += spread[i] / (2 * total);
	s->now = s->next;
	s->next = old;
}

static void by_recency(const struct policy_batch *b, float *scores)
{
	for (uint32_t i = 0; i < b->n; i++)
		scores[i] = batch_pos(b, i) < SINKS ? 2 : (float)batch_pos(b, i) * 0x1p-20f;
}

static void score_chunks(const struct heuristic *h, const struct policy_batch *b, struct side sides[2],
			 uint32_t first, float *scores)
{
	for (int k = 0; k < 2; k++)
		sides[k].load(h, b, first, LAG, sides[k].now);
	for (uint32_t at = first; at + 2 * LAG <= b->n; at += LAG) {
		float sum[LAG] = {0};

		for (int k = 0; k < 2; k++)
			side_add(h, b, &sides[k], at + LAG, sum);
		h->kern->rank(sum, LAG, scores + at);
		for (uint32_t i = 0; i < LAG; i++)
			scores[at + i] *= 1.0f / LAG;
	}
}

static int score(struct policy *p, const struct policy_batch *b, float *scores)
{
	const struct heuristic *h = heuristic_of(p);
	struct side sides[2] = {{.load = load_k}, {.load = load_v}};
	uint32_t first = 0;

	if (b->n < LEAST) {
		by_recency(b, scores);
		return 0;
	}
	while (first < SINKS && batch_pos(b, first) < SINKS)
		first++;
	if (side_init(&sides[0], h->cfg.k_dim) < 0)
		return -ENOMEM;
	if (side_init(&sides[1], h->cfg.v_dim) < 0) {
		free(sides[0].memory);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < b->n; i++)
		scores[i] = 1;
	score_chunks(h, b, sides, first, scores);
	free(sides[0].memory);
	free(sides[1].memory);
	return 0;
}

const struct policy_ops policy_lagkv_ops = {
	.name = "lagkv",
	.id = POLICY_LAGKV,
	.caps = POLICY_CONTEXT | POLICY_NEEDS_K | POLICY_NEEDS_V | POLICY_NEEDS_DIM,
	.init = init,
	.score = score,
	.free = heuristic_free,
	.doc = "spread of k and v against the next chunk of 128, ranked per chunk (LagKV, arXiv 2504.04704)",
};
