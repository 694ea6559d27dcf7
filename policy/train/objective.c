/* SPDX-License-Identifier: MIT */
/* Costs of rankings, and the exact gradient of the expected cost. */
#include "policy/train/objective.h"
#include "policy/train/kern.h"
#include "shm/util.h"

#include <math.h>
#include <string.h>

#define BUDGET_SOFT 0.02
#define RATIO_MOST 200.0

int objective_scratch_new(struct objective_scratch **ret, uint32_t rows)
{
	size_t n = ALIGN_UP((size_t)rows, (size_t)KERN_PAD);
	struct objective_scratch *x = calloc(1, sizeof(*x));
	char *p;

	if (!x)
		return -ENOMEM;
	p = x->memory = aligned_alloc(KERN_ALIGN, ALIGN_UP(n * (8 * 4 + 2 * 8), (size_t)KERN_ALIGN));
	if (!p) {
		free(x);
		return -ENOMEM;
	}
	x->kern = kern_best();
	x->rows = rows;
	x->part = (double *)p;
	x->weight = x->part + n;
	x->e = (float *)(x->weight + n);
	x->g = x->e + n;
	x->rank = x->g + n;
	x->slope = x->rank + n;
	x->key = (uint32_t *)(x->slope + n);
	x->key2 = x->key + n;
	x->order = x->key2 + n;
	x->order2 = x->order + n;
	*ret = x;
	return 0;
}

void objective_scratch_free(struct objective_scratch *x)
{
	if (!x)
		return;
	free(x->memory);
	free(x);
}

double objective_weight(uint32_t weighting, double rank, uint32_t n)
{
	if (weighting == TRAIN_UNIFORM)
		return rank;
	return log1p(rank / (BUDGET_SOFT * n)) / log1p(1 / BUDGET_SOFT);
}

double objective_weight_slope(uint32_t weighting, double rank, uint32_t n)
{
	if (weighting == TRAIN_UNIFORM)
		return 1;
	return 1 / ((rank + BUDGET_SOFT * n) * log1p(1 / BUDGET_SOFT));
}

/* Order of the bits of a float, upside down: ascending keys are descending floats. */
static uint32_t falling_key(float f)
{
	uint32_t bits;

	if (isnan(f))
		return UINT32_MAX;
	f += 0.0f; /* -0 equals 0 */
	memcpy(&bits, &f, sizeof(bits));
	return bits >> 31 ? bits : ~(bits | 1u << 31);
}

/* Radix sort, least digit first, so equal keys keep their order. */
void objective_order(uint32_t *order, const float *key, uint32_t n, struct objective_scratch *x)
{
	enum { BITS = 11, DIGITS = 1 << BITS };
	uint32_t *k = x->key, *k2 = x->key2, *o = order, *o2 = x->order2;
	static const uint32_t shifts[] = {0, BITS, 2 * BITS};

	for (uint32_t i = 0; i < n; i++) {
		k[i] = falling_key(key[i]);
		o[i] = i;
	}
	for (uint32_t pass = 0; pass < 3; pass++) {
		uint32_t start[DIGITS] = {0}, sum = 0, shift = shifts[pass], *swap;

		for (uint32_t i = 0; i < n; i++)
			start[k[i] >> shift & (DIGITS - 1)]++;
		for (uint32_t d = 0; d < DIGITS; d++) {
			uint32_t count = start[d];

			start[d] = sum;
			sum += count;
		}
		for (uint32_t i = 0; i < n; i++) {
			uint32_t to = start[k[i] >> shift & (DIGITS - 1)]++;

			k2[to] = k[i];
			o2[to] = o[i];
		}
		swap = k, k = k2, k2 = swap;
		swap = o, o = o2, o2 = swap;
	}
	memcpy(order, o, n * sizeof(*order)); /* an odd number of passes ends in the other buffer */
}

static const double *weights_of(struct objective_scratch *x, uint32_t weighting, uint32_t n)
{
	if (x->weight_n != n || x->weight_kind != weighting)
		for (uint32_t r = 0; r < n; r++)
			x->weight[r] = objective_weight(weighting, r + 1, n);
	x->weight_n = n;
	x->weight_kind = weighting;
	return x->weight;
}

double objective_ranked(const struct unit_cost *c, const float *u, const uint32_t *order,
			struct objective_scratch *x)
{
	const double *w = weights_of(x, c->weighting, c->n);
	double cost = 0;

	for (uint32_t r = 0; r < c->n; r++)
		cost += w[r] * (double)u[order[r]];
	return cost;
}

void objective_cost(struct unit_cost *ret, const float *u, uint32_t n, uint32_t weighting,
		    struct objective_scratch *x)
{
	struct unit_cost c = {.n = n, .weighting = weighting};
	const double *w = weights_of(x, weighting, n);
	double mean = 0;

	objective_order(x->order, u, n, x);
	for (uint32_t i = 0; i < n; i++) {
		c.total += (double)u[i];
		mean += w[i];
	}
	c.best = objective_ranked(&c, u, x->order, x);
	c.random = mean / n * c.total;
	c.counted = c.total >= 1e-6 * n && c.random - c.best >= 1e-6 * c.random;
	*ret = c;
}

double objective_regret(const struct unit_cost *c, double cost)
{
	return (cost - c->best) / (c->random - c->best);
}

double objective_ratio(const struct unit_cost *c, double cost)
{
	return cost / MAX(c->best, 1e-8);
}

double objective_loss(const struct unit_cost *c, uint32_t reward, double cost)
{
	return reward == TRAIN_REGRET ? objective_regret(c, cost) : MIN(objective_ratio(c, cost), RATIO_MOST);
}

/* d loss / d cost */
static double loss_slope(const struct unit_cost *c, uint32_t reward, double cost)
{
	if (reward == TRAIN_REGRET)
		return 1 / (c->random - c->best);
	return objective_ratio(c, cost) < RATIO_MOST ? 1 / MAX(c->best, 1e-8) : 0;
}

static float middle(const float *s, uint32_t n)
{
	float low = s[0], high = s[0];

	for (uint32_t i = 1; i < n; i++) {
		low = MIN(low, s[i]);
		high = MAX(high, s[i]);
	}
	return low + (high - low) / 2;
}

double objective_exact(const struct unit_cost *c, uint32_t reward, const float *s, const float *u, float *grad,
		       struct objective_scratch *x)
{
	bool uniform = c->weighting == TRAIN_UNIFORM;
	uint32_t n = c->n, padded = ALIGN_UP(n, KERN_PAD);
	double cost = 0;
	float scale;

	if (!c->counted) {
		memset(grad, 0, n * sizeof(*grad));
		return 0;
	}
	x->kern->exp(s, n, middle(s, n), x->e);
	memcpy(x->g, u, n * sizeof(*u));
	for (uint32_t i = n; i < padded; i++) {
		x->e[i] = 1;
		x->g[i] = 0;
	}
	/* Uniform weights need no ranks first, so that one pass over the pairs does both. */
	x->kern->pairs(x->e, uniform ? x->g : NULL, n, x->rank, uniform ? x->slope : NULL);
	for (uint32_t i = 0; i < n; i++) {
		double rank = 0.5 + (double)x->rank[i]; /* a row's pair with itself counted one half */

		cost += objective_weight(c->weighting, rank, n) * (double)u[i];
		if (!uniform)
			x->g[i] = u[i] * (float)objective_weight_slope(c->weighting, rank, n);
	}
	if (!uniform)
		x->kern->pairs(x->e, x->g, n, NULL, x->slope);
	scale = (float)loss_slope(c, reward, cost);
	for (uint32_t i = 0; i < n; i++)
		grad[i] = scale * x->slope[i];
	return objective_loss(c, reward, cost);
}

static double sigmoid(double x)
{
	return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x));
}

int objective_exact_ref(double *loss, const struct unit_cost *c, uint32_t reward, const double *s,
			const double *u, double *grad)
{
	_cleanup_free_ double *g = calloc(c->n, sizeof(*g));
	double cost = 0, scale;

	if (!g)
		return -ENOMEM;
	*loss = 0;
	memset(grad, 0, c->n * sizeof(*grad));
	if (!c->counted)
		return 0;
	for (uint32_t j = 0; j < c->n; j++) {
		double rank = 1;

		for (uint32_t i = 0; i < c->n; i++)
			rank += i == j ? 0 : sigmoid(s[i] - s[j]);
		cost += objective_weight(c->weighting, rank, c->n) * u[j];
		g[j] = objective_weight_slope(c->weighting, rank, c->n) * u[j];
	}
	scale = loss_slope(c, reward, cost);
	for (uint32_t a = 0; a < c->n; a++)
		for (uint32_t j = 0; j < c->n; j++) {
			double p = sigmoid(s[a] - s[j]);

			grad[a] += scale * (g[j] - g[a]) * p * (1 - p);
		}
	*loss = objective_loss(c, reward, cost);
	return 0;
}

double objective_mse(const struct unit_cost *c, const float *s, const float *u, float *grad)
{
	double mean = c->total / c->n, loss = 0;

	memset(grad, 0, c->n * sizeof(*grad));
	if (!c->counted)
		return 0;
	for (uint32_t i = 0; i < c->n; i++) {
		double miss = (double)s[i] - log((double)u[i] / mean + 1e-4);

		loss += miss * miss;
		grad[i] = (float)(2 * miss / c->n);
	}
	return loss / c->n;
}
