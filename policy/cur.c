/* SPDX-License-Identifier: MIT */
/*
 * CurDKV (Sengupta et al., arXiv 2509.15038): approximate leverage scores,
 * |k_i G|^2 * |v_i G|^2 with G Gaussian, d x 20, divided by sqrt(20) and
 * resampled at every plan. Given as its logarithm, which ranks the same and
 * fits half precision. The first 4 positions are kept.
 */
#include <errno.h>
#include <math.h>
#include "policy/heuristic.h"
#include "shm/util.h"

static int init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	return heuristic_new(ret, &policy_cur_ops, cfg, err, errsize);
}

/* Standard normals in pairs (Box-Muller), from a counter. */
static void sample_g(float *g, uint32_t dim, uint64_t seed, uint64_t nonce)
{
	const uint64_t key = mix64(seed, nonce);
	const float scale = 1 / sqrtf(ROWS_PROJ);

	for (uint32_t c = 0; c < dim; c++, g += ROWS_PROJ_PAD) {
		for (uint32_t j = 0; j < ROWS_PROJ; j += 2) {
			uint64_t u = mix64(key, (uint64_t)c * ROWS_PROJ + j);
			float radius = sqrtf(-2 * logf(((float)(u >> 40) + 0.5f) * 0x1p-24f)) * scale;
			float angle = (float)(u & 0xffffff) * (float)(2 * M_PI) * 0x1p-24f;

			g[j] = radius * cosf(angle);
			g[j + 1] = radius * sinf(angle);
		}
		for (uint32_t j = ROWS_PROJ; j < ROWS_PROJ_PAD; j++)
			g[j] = 0;
	}
}

static float log_leverage(float k, float v)
{
	const float least = 1e-37f; /* a zero row ranks last, but finitely so */

	return logf(MAX(k, least)) + logf(MAX(v, least));
}

static int score(struct policy *p, const struct policy_batch *b, float *scores)
{
	const struct heuristic *h = heuristic_of(p);
	uint32_t dim = MAX(h->cfg.k_dim, h->cfg.v_dim);
	_cleanup_free_ float *g = malloc(dim * (size_t)ROWS_PROJ_PAD * sizeof(*g));
	_cleanup_free_ float *x = malloc(dim * (size_t)ROWS_TILE * sizeof(*x));

	if (!g || !x)
		return -ENOMEM;
	sample_g(g, dim, h->cfg.seed, b->nonce);
	for (uint32_t i = 0; i < b->n; i += ROWS_TILE) {
		uint32_t n = MIN(b->n - i, ROWS_TILE);
		float k[ROWS_TILE], v[ROWS_TILE];

		load_k(h, b, i, n, x);
		h->kern->project(x, h->cfg.k_dim, n, g, k);
		load_v(h, b, i, n, x);
		h->kern->project(x, h->cfg.v_dim, n, g, v);
		for (uint32_t j = 0; j < n; j++)
			scores[i + j] = log_leverage(k[j], v[j]);
	}
	scores_finite(scores, b->n);
	for (uint32_t i = 0; i < b->n; i++)
		if (batch_pos(b, i) < SINKS)
			scores[i] = SCORE_SINK;
	return 0;
}

const struct policy_ops policy_cur_ops = {
	.name = "cur",
	.id = POLICY_CUR,
	.caps = POLICY_CONTEXT | POLICY_NEEDS_K | POLICY_NEEDS_V | POLICY_NEEDS_DIM,
	.init = init,
	.score = score,
	.free = heuristic_free,
	.doc = "|kG|^2 |vG|^2, G Gaussian d x 20, new at each plan (CurDKV, arXiv 2509.15038)",
};
