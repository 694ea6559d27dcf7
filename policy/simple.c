/* SPDX-License-Identifier: MIT */
/* Policies whose score depends on one row alone: no state, no memory but a tile. */
#include <errno.h>
#include <math.h>
#include <string.h>
#include "policy/heuristic.h"
#include "policy/learned.h"
#include "shm/util.h"

/* ---- client: the runtime ranks ------------------------------------------------ */

static int client_init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	return heuristic_new(ret, &policy_client_ops, cfg, err, errsize);
}

static int client_score(struct policy *p, const struct policy_batch *b, float *scores)
{
	return -ENOTSUP;
}

const struct policy_ops policy_client_ops = {
	.name = "client",
	.id = POLICY_CLIENT,
	.caps = POLICY_CONTEXT,
	.init = client_init,
	.score = client_score,
	.free = heuristic_free,
	.doc = "the runtime's own scores, read from its score plane at each plan",
};

/* ---- random --------------------------------------------------------------------- */

static int random_init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	return heuristic_new(ret, &policy_random_ops, cfg, err, errsize);
}

/*
 * Uniform over the 63,487 finite half-precision values rather than over an interval: scores
 * are ranked as halves, and an interval would give half of the rows only 1,024 keys.
 */
static int random_score(struct policy *p, const struct policy_batch *b, float *scores)
{
	const uint64_t lane = mix64(heuristic_of(p)->cfg.seed, b->lane);

	for (uint32_t i = 0; i < b->n; i++) {
		uint32_t u = (uint32_t)((mix64(lane, batch_pos(b, i)) >> 32) * 63487 >> 32);

		scores[i] = half_float((uint16_t)(u < 0x7c00 ? u : 0x8000 | (u - 0x7bff)));
	}
	return 0;
}

const struct policy_ops policy_random_ops = {
	.name = "random",
	.id = POLICY_RANDOM,
	.caps = POLICY_STATIC,
	.init = random_init,
	.score = random_score,
	.free = heuristic_free,
	.doc = "uniform hash of seed, lane and position: the floor every policy must beat",
};

/* ---- streaming ------------------------------------------------------------------- */

static int streaming_init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	return heuristic_new(ret, &policy_streaming_ops, cfg, err, errsize);
}

/*
 * Recency is the position itself, which never changes, so this is static. A half
 * cannot tell neighbours apart past 2,048, but equal keys go to the later position.
 */
static int streaming_score(struct policy *p, const struct policy_batch *b, float *scores)
{
	for (uint32_t i = 0; i < b->n; i++) {
		uint32_t pos = batch_pos(b, i);

		scores[i] = pos < SINKS ? SCORE_SINK : (float)pos * 0x1p-20f;
	}
	return 0;
}

const struct policy_ops policy_streaming_ops = {
	.name = "streaming",
	.id = POLICY_STREAMING,
	.caps = POLICY_STATIC,
	.init = streaming_init,
	.score = streaming_score,
	.free = heuristic_free,
	.doc = "4 sinks, then the most recent (StreamingLLM, arXiv 2309.17453)",
};

/* ---- norms and range -------------------------------------------------------------- */

static int knorm_init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	return heuristic_new(ret, &policy_knorm_ops, cfg, err, errsize);
}

static int vnorm_init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	return heuristic_new(ret, &policy_vnorm_ops, cfg, err, errsize);
}

static int vrange_init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	return heuristic_new(ret, &policy_vrange_ops, cfg, err, errsize);
}

static int knorm_score(struct policy *p, const struct policy_batch *b, float *scores)
{
	const struct heuristic *h = heuristic_of(p);
	_cleanup_free_ float *x = malloc(ROWS_TILE * (size_t)h->cfg.k_dim * sizeof(*x));

	if (!x)
		return -ENOMEM;
	for (uint32_t i = 0; i < b->n; i += ROWS_TILE) {
		uint32_t n = MIN(b->n - i, ROWS_TILE);

		load_k(h, b, i, n, x);
		h->kern->sumsq(x, h->cfg.k_dim, n, scores + i);
	}
	for (uint32_t i = 0; i < b->n; i++)
		scores[i] = -sqrtf(scores[i]);
	scores_finite(scores, b->n);
	return 0;
}

/* f over V rows, a tile at a time. */
static int score_v(const struct heuristic *h, const struct policy_batch *b, float *scores,
		   void (*f)(const float *x, uint32_t dim, uint32_t n, float *out))
{
	_cleanup_free_ float *x = malloc(ROWS_TILE * (size_t)h->cfg.v_dim * sizeof(*x));

	if (!x)
		return -ENOMEM;
	for (uint32_t i = 0; i < b->n; i += ROWS_TILE) {
		uint32_t n = MIN(b->n - i, ROWS_TILE);

		load_v(h, b, i, n, x);
		f(x, h->cfg.v_dim, n, scores + i);
	}
	return 0;
}

static int vnorm_score(struct policy *p, const struct policy_batch *b, float *scores)
{
	const struct heuristic *h = heuristic_of(p);
	int r = score_v(h, b, scores, h->kern->sumsq);

	if (r < 0)
		return r;
	for (uint32_t i = 0; i < b->n; i++)
		scores[i] = sqrtf(scores[i]);
	scores_finite(scores, b->n);
	return 0;
}

static int vrange_score(struct policy *p, const struct policy_batch *b, float *scores)
{
	const struct heuristic *h = heuristic_of(p);
	int r = score_v(h, b, scores, h->kern->range);

	if (r < 0)
		return r;
	scores_finite(scores, b->n);
	return 0;
}

const struct policy_ops policy_knorm_ops = {
	.name = "knorm",
	.id = POLICY_KNORM,
	.caps = POLICY_STATIC | POLICY_NEEDS_K | POLICY_NEEDS_DIM,
	.init = knorm_init,
	.score = knorm_score,
	.free = heuristic_free,
	.doc = "-|k|: keys of small norm draw attention (Devoto et al., arXiv 2406.11430)",
};

const struct policy_ops policy_vnorm_ops = {
	.name = "vnorm",
	.id = POLICY_VNORM,
	.caps = POLICY_STATIC | POLICY_NEEDS_V | POLICY_NEEDS_DIM,
	.init = vnorm_init,
	.score = vnorm_score,
	.free = heuristic_free,
	.doc = "|v|: how much a row can add to the output",
};

const struct policy_ops policy_vrange_ops = {
	.name = "vrange",
	.id = POLICY_VRANGE,
	.caps = POLICY_STATIC | POLICY_NEEDS_V | POLICY_NEEDS_DIM,
	.init = vrange_init,
	.score = vrange_score,
	.free = heuristic_free,
	.doc = "max v - min v over the row's channels",
};
