/* SPDX-License-Identifier: MIT */
/*
 * The learned position-only prior: what a policy knows that looks at no key
 * and no value. Every learned policy has to beat it.
 *
 * A lane has two tables of `pos_rows` knots, over the distance to the end and
 * over the index from the start. Knots sit at log2(1 + x), `pos_dim` of them
 * per octave; between knots the table is linear, past the last it is flat:
 *
 *     t(x)  = min(pos_dim * log2(1 + x), pos_rows - 1)
 *     score = dist[t(total - 1 - pos)] + index[t(pos)]
 */
#include "policy/learned.h"
#include "shm/util.h"

#include <float.h>
#include <math.h>

struct position {
	struct policy base;
	struct weights *weights;
	struct calibration *calibration; /* or NULL */
};

static void position_free(struct policy *p)
{
	struct position *q = (struct position *)p;

	if (!q)
		return;
	weights_calibration_free(q->calibration);
	weights_free(q->weights);
	free(q);
}

static int position_init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	struct position *q = calloc(1, sizeof(*q));
	int r;

	if (!q)
		return out_of_memory(err, errsize);
	q->base.ops = &policy_position_ops;
	r = weights_for(&q->weights, cfg, WEIGHTS_POSITION, err, errsize);
	if (r == 0)
		r = weights_calibration(&q->calibration, q->weights, cfg, err, errsize);
	if (r < 0) {
		position_free(&q->base);
		return r;
	}
	*ret = &q->base;
	return 0;
}

static float lookup(const float *table, uint32_t knots, uint32_t per_octave, uint32_t x)
{
	float t = (float)per_octave * log2f(1.0f + (float)x);
	uint32_t i;

	if (t >= (float)(knots - 1))
		return table[knots - 1];
	i = (uint32_t)t;
	return table[i] + (t - (float)i) * (table[i + 1] - table[i]);
}

static float bounded(float s)
{
	return isfinite(s) ? s : -FLT_MAX; /* two huge knots can overflow, and a caller's coefficients */
}

/* One coefficient: what the index is worth. */
static int position_coefs(struct policy *p, const struct policy_batch *b, float *const *coef)
{
	const struct position *q = (const struct position *)p;
	const struct weights_header *h = &q->weights->h;
	const float *index;

	if (b->lane >= q->weights->lanes)
		return -EINVAL;
	index = weights_at(q->weights, b->lane, POSITION_INDEX);
	for (uint32_t i = 0; i < b->n; i++)
		coef[0][i] =
			bounded(lookup(index, h->pos_rows, h->pos_dim, b->pos ? b->pos[i] : b->first_pos + i));
	return 0;
}

static uint32_t position_coefs_per_row(const struct policy *p)
{
	return 1;
}

static int position_combine(const struct policy *p, const struct policy_batch *b, const float *const *coef,
			    float *scores)
{
	const struct position *q = (const struct position *)p;
	const struct weights_header *h = &q->weights->h;
	const float *dist;

	if (b->lane >= q->weights->lanes)
		return -EINVAL;
	dist = weights_at(q->weights, b->lane, POSITION_DIST);
	for (uint32_t i = 0; i < b->n; i++) {
		uint32_t pos = b->pos ? b->pos[i] : b->first_pos + i;
		uint32_t left = b->total > pos ? b->total - 1 - pos : 0;

		scores[i] = bounded(coef[0][i] + lookup(dist, h->pos_rows, h->pos_dim, left));
	}
	return 0;
}

static int position_score(struct policy *p, const struct policy_batch *b, float *scores)
{
	int r = position_coefs(p, b, (float *const[]){scores});

	return r < 0 ? r : position_combine(p, b, (const float *const[]){scores}, scores);
}

static const struct calibration *position_calibration(const struct policy *p)
{
	return ((const struct position *)p)->calibration;
}

static uint64_t position_weights_id(const struct policy *p)
{
	return weights_id_of(((const struct position *)p)->weights);
}

const struct policy_ops policy_position_ops = {
	.name = "position",
	.id = POLICY_POSITION,
	.caps = POLICY_STATIC | POLICY_SEPARABLE | POLICY_NEEDS_WEIGHTS,
	.init = position_init,
	.score = position_score,
	.coefs_per_row = position_coefs_per_row,
	.coefs = position_coefs,
	.combine = position_combine,
	.calibration = position_calibration,
	.weights_id = position_weights_id,
	.free = position_free,
	.doc = "learned prior over index and distance to the end (from the weight file)",
};
