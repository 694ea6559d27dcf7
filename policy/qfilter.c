/* SPDX-License-Identifier: MIT */
/*
 * q-filters: a lane's queries share one main direction f (the first right
 * singular vector of queries collected offline), and a key's projection on it
 * predicts the attention that it will get. score = -f . k_i, so the file's
 * sign of f is the one whose projection falls as attention rises.
 */
#include "policy/learned.h"
#include "shm/util.h"

#include <float.h>
#include <math.h>

struct qfilter {
	struct policy base;
	struct weights *weights;
	enum row_dtype dtype;
};

static void qfilter_free(struct policy *p)
{
	struct qfilter *q = (struct qfilter *)p;

	if (!q)
		return;
	weights_free(q->weights);
	free(q);
}

static int qfilter_init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	struct qfilter *q;
	int r = rows_readable(cfg, err, errsize);

	if (r < 0)
		return r;
	q = calloc(1, sizeof(*q));
	if (!q)
		return out_of_memory(err, errsize);
	q->base.ops = &policy_qfilter_ops;
	q->dtype = cfg->dtype;
	r = weights_for(&q->weights, cfg, WEIGHTS_QFILTER, err, errsize);
	if (r < 0) {
		qfilter_free(&q->base);
		return r;
	}
	*ret = &q->base;
	return 0;
}

/* Eight partial sums, added pairwise: a fixed order that compilers can keep in one vector. */
static float dot(const float *f, const void *row, uint32_t dim, enum row_dtype dtype)
{
	float s[8] = {0};

	for (uint32_t i = 0; i < dim; i++)
		s[i % 8] += f[i] * row_element(row, i, dtype);
	return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

static int qfilter_score(struct policy *p, const struct policy_batch *b, float *scores)
{
	const struct qfilter *q = (const struct qfilter *)p;
	const float *f;

	if (b->lane >= q->weights->lanes || (b->n && !b->k))
		return -EINVAL;
	f = weights_at(q->weights, b->lane, QFILTER_F);
	for (uint32_t i = 0; i < b->n; i++) {
		float s = -dot(f, (const char *)b->k + i * b->k_stride, q->weights->h.k_dim, q->dtype);

		scores[i] = isfinite(s) ? s : -FLT_MAX;
	}
	return 0;
}

static uint64_t qfilter_weights_id(const struct policy *p)
{
	return weights_id_of(((const struct qfilter *)p)->weights);
}

const struct policy_ops policy_qfilter_ops = {
	.name = "qfilter",
	.id = POLICY_QFILTER,
	.caps = POLICY_STATIC | POLICY_NEEDS_K | POLICY_NEEDS_WEIGHTS | POLICY_NEEDS_DIM,
	.init = qfilter_init,
	.score = qfilter_score,
	.weights_id = qfilter_weights_id,
	.free = qfilter_free,
	.doc = "-f.k, f the main direction of the lane's queries (from the weight file)",
};
