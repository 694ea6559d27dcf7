/* SPDX-License-Identifier: MIT */
/*
 * The published estimators: rankings drawn from Plackett-Luce, REINFORCE with
 * a leave-one-out baseline. Sums over logarithms in fp64: in fp32 the prefix sums
 * of 1 / Z lose the rows of the tail.
 */
#include "policy/train/objective.h"
#include "policy/train/noise.h"
#include "shm/util.h"

#include <math.h>

void objective_draw(uint32_t *order, const float *s, uint32_t n, uint64_t seed, uint64_t step, uint32_t lane,
		    uint32_t unit, uint32_t perm, struct objective_scratch *x)
{
	for (uint32_t i = 0; i < n; i++)
		x->e[i] = s[i] - logf(-logf(train_noise(seed, step, lane, unit, perm, i)));
	objective_order(order, x->e, n, x);
}

static double log_add(double a, double b)
{
	double most = MAX(a, b);

	return isinf(most) ? most : most + log1p(exp(MIN(a, b) - most));
}

/* log pi = sum_r s_r - log Z_r, Z_r = sum_{k >= r} exp(s_k) along the ranking; d log pi / d s_j is one less
 * exp(s_j) sum_{r <= rank(j)} 1 / Z_r. */
double objective_log_pi(const float *s, uint32_t n, const uint32_t *order, double scale, double *grad,
			struct objective_scratch *x)
{
	double log_z = -INFINITY, log_sum = -INFINITY, value = 0;

	for (uint32_t r = n; r-- > 0;) {
		log_z = log_add(log_z, (double)s[order[r]]);
		x->part[r] = log_z;
		value += (double)s[order[r]] - log_z;
	}
	for (uint32_t r = 0; grad && r < n; r++) {
		log_sum = log_add(log_sum, -x->part[r]);
		grad[order[r]] += scale * (1 - exp((double)s[order[r]] + log_sum));
	}
	return value;
}

/* Each of n values, `stride` apart, less the mean of the others. */
static void leave_one_out(double *v, uint32_t n, uint32_t stride)
{
	double sum = 0;

	for (uint32_t i = 0; i < n; i++)
		sum += v[(size_t)i * stride];
	for (uint32_t i = 0; i < n; i++)
		v[(size_t)i * stride] = n > 1 ? (n * v[(size_t)i * stride] - sum) / (n - 1) : 0;
}

void objective_advantages(double *reward, uint32_t units, uint32_t perms, uint32_t objective, bool standardise)
{
	size_t count = (size_t)units * perms;
	double squares = 0, deviation;

	if (objective == TRAIN_RLOO_BATCH)
		leave_one_out(reward, units, perms);
	for (uint32_t i = 0; objective == TRAIN_RLOO && i < units; i++)
		leave_one_out(reward + (size_t)i * perms, perms, 1);
	if (!standardise)
		return;
	for (size_t i = 0; i < count; i++)
		squares += reward[i] * reward[i];
	deviation = count > 1 ? sqrt(squares / (double)(count - 1)) : 0;
	for (size_t i = 0; i < count; i++) {
		double a = reward[i] / (deviation + 1e-8);

		reward[i] = a > 2 ? 2 : MAX(a, -2.0);
	}
}
