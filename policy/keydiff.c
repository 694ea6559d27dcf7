/* SPDX-License-Identifier: MIT */
/*
 * KeyDiff (Park et al., arXiv 2504.15364): keep the keys least like the others,
 * score_i = -cos(k_i, a) with the anchor a = mean_j k_j / |k_j| over the batch.
 */
#include <errno.h>
#include <math.h>
#include "policy/heuristic.h"
#include "shm/util.h"

static int init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	return heuristic_new(ret, &policy_keydiff_ops, cfg, err, errsize);
}

/* 1 / |x| for a squared norm; 0 for a row without direction. */
static float inverse_norm(float sumsq)
{
	return isfinite(sumsq) && sumsq > 0 ? 1 / sqrtf(sumsq) : 0;
}

/* scores[i] = 1 / |k_i|, anchor[dim] = sum of k_i / |k_i| (its length does not matter). */
static void find_anchor(const struct heuristic *h, const struct policy_batch *b, float *x, float *anchor,
			float *scores)
{
	uint32_t dim = h->cfg.k_dim;

	for (uint32_t i = 0; i < b->n; i += ROWS_TILE) {
		uint32_t n = MIN(b->n - i, ROWS_TILE);

		load_k(h, b, i, n, x);
		h->kern->sumsq(x, dim, n, scores + i);
		for (uint32_t j = 0; j < n; j++) {
			scores[i + j] = inverse_norm(scores[i + j]);
			for (uint32_t c = 0; scores[i + j] == 0 && c < dim; c++)
				x[j * dim + c] = 0; /* 0 * inf must not reach the anchor */
		}
		h->kern->add(x, dim, n, scores + i, anchor);
	}
}

static int score(struct policy *p, const struct policy_batch *b, float *scores)
{
	const struct heuristic *h = heuristic_of(p);
	uint32_t dim = h->cfg.k_dim;
	_cleanup_free_ float *x = malloc(ROWS_TILE * (size_t)dim * sizeof(*x));
	_cleanup_free_ float *anchor = calloc(dim, sizeof(*anchor));
	float length;

	if (!x || !anchor)
		return -ENOMEM;
	find_anchor(h, b, x, anchor, scores);
	h->kern->sumsq(anchor, dim, 1, &length);
	length = inverse_norm(length);
	for (uint32_t i = 0; i < b->n; i += ROWS_TILE) {
		uint32_t n = MIN(b->n - i, ROWS_TILE);
		float along[ROWS_TILE];

		load_k(h, b, i, n, x);
		h->kern->dot(x, dim, n, anchor, along);
		for (uint32_t j = 0; j < n; j++)
			scores[i + j] *= -along[j] * length;
	}
	scores_finite(scores, b->n);
	return 0;
}

const struct policy_ops policy_keydiff_ops = {
	.name = "keydiff",
	.id = POLICY_KEYDIFF,
	.caps = POLICY_CONTEXT | POLICY_NEEDS_K | POLICY_NEEDS_DIM,
	.init = init,
	.score = score,
	.free = heuristic_free,
	.doc = "-cos(k, mean of the normalised keys) (KeyDiff, arXiv 2504.15364)",
};
