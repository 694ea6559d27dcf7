/* SPDX-License-Identifier: MIT */
/* Ranking by radix, and the metrics of a ranking: one walk down the order serves all of them. */
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "policy/eval/metric.h"
#include "shm/util.h"

const float eval_budget[EVAL_BUDGETS] = {0.05f, 0.1f, 0.2f, 0.3f, 0.5f};
const float eval_error_budget[EVAL_ERRORS] = {0.1f, 0.25f, 0.5f};
const uint32_t eval_bucket_end[EVAL_BUCKETS] = {128, 512, 1024, 2048, 4096, UINT32_MAX};

enum { ALL, FAR, BUCKET, SUBSETS = BUCKET + EVAL_BUCKETS };
#define FAR_FROM 128u

static int percent(float budget)
{
	return (int)lrintf(budget * 100);
}

void metric_name(uint32_t metric, char *name, uint32_t size)
{
	static const char *const utility[UTILITIES] = {"max", "mean", "value"};
	uint32_t i;

	if (metric >= METRIC_ERROR) {
		snprintf(name, size, "error_%d", percent(eval_error_budget[metric - METRIC_ERROR]));
	} else if (metric >= METRIC_EVICTED) {
		i = metric - METRIC_EVICTED;
		snprintf(name, size, "evicted_%s_%d", utility[i / EVAL_BUDGETS],
			 percent(eval_budget[i % EVAL_BUDGETS]));
	} else if (metric >= METRIC_BUCKET) {
		i = metric - METRIC_BUCKET;
		if (i + 1 < EVAL_BUCKETS)
			snprintf(name, size, "regret_below_%u", eval_bucket_end[i]);
		else
			snprintf(name, size, "regret_from_%u", eval_bucket_end[i - 1]);
	} else {
		snprintf(name, size, "%s",
			 metric == METRIC_REGRET  ? "regret"
			 : metric == METRIC_RATIO ? "ratio"
						  : "regret_far");
	}
}

bool metric_too_small(float budget, uint32_t prompt)
{
	return (double)budget * prompt < LEAST_KEPT * (1 - 1e-6);
}

/* ---- ranking ---------------------------------------------------------------------- */

/* A key that ascends as the score descends. -0 and 0 are one score. */
static uint32_t descending(float score)
{
	float plain = score + 0.0f;
	uint32_t bits;

	memcpy(&bits, &plain, sizeof(bits));
	return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

/* Three stable passes of 11 bits from the last row to the first, so that later rows win ties. */
void rank_rows(const float *score, uint32_t n, uint32_t *order, uint32_t *scratch)
{
	uint32_t count[3][2048] = {{0}}, *key = scratch, *from = order, *to = scratch + n;

	for (uint32_t i = 0; i < n; i++) {
		uint32_t k = descending(score[i]);

		key[i] = k;
		order[n - 1 - i] = i;
		count[0][k & 2047]++;
		count[1][k >> 11 & 2047]++;
		count[2][k >> 22]++;
	}
	for (int pass = 0; pass < 3; pass++) {
		uint32_t sum = 0, *swap = from;

		for (uint32_t b = 0; b < 2048; b++) {
			uint32_t here = count[pass][b];

			count[pass][b] = sum;
			sum += here;
		}
		for (uint32_t i = 0; i < n; i++)
			to[count[pass][key[from[i]] >> (11 * pass) & 2047]++] = from[i];
		from = to;
		to = swap;
	}
	if (from != order)
		memcpy(order, from, n * sizeof(*order));
}

/* ---- cost --------------------------------------------------------------------------- */

static uint32_t bucket_of(uint32_t distance)
{
	uint32_t b = 0;

	while (distance >= eval_bucket_end[b] && b + 1 < EVAL_BUCKETS)
		b++;
	return b;
}

/* Distance to the end of the prompt of evictable row i. */
static uint32_t distance(const struct metric_cut *c, uint32_t i)
{
	return c->prompt - 1 - (PROTECT_FIRST + i);
}

/* C of every subset under `order`; size and sum of u may be NULL. */
static void costs(const struct metric_cut *c, const uint32_t *order, double *cost, uint32_t *size, double *sum)
{
	uint32_t rank[SUBSETS] = {0};
	double total[SUBSETS] = {0};
	const float *u = c->u[UTILITY_MAX];

	memset(cost, 0, SUBSETS * sizeof(*cost));
	for (uint32_t k = 0; k < c->n; k++) {
		uint32_t away = distance(c, order[k]);
		const uint32_t in[3] = {ALL, BUCKET + bucket_of(away), FAR};

		for (int s = 0; s < (away >= FAR_FROM ? 3 : 2); s++) {
			cost[in[s]] += (double)++rank[in[s]] * u[order[k]];
			total[in[s]] += u[order[k]];
		}
	}
	if (size)
		memcpy(size, rank, sizeof(rank));
	if (sum)
		memcpy(sum, total, sizeof(total));
}

void metric_prepare(struct metric_cut *c)
{
	uint32_t size[SUBSETS];
	double sum[SUBSETS];

	static_assert(SUBSETS == ARRAY_SIZE(c->ideal), "one of each");
	c->n = c->prompt - PROTECTED;
	for (int k = 0; k < UTILITIES; k++) {
		c->total[k] = 0;
		for (uint32_t i = 0; c->u[k] && i < c->n; i++)
			c->total[k] += c->u[k][i];
	}
	costs(c, c->best, c->ideal, size, sum);
	for (int s = 0; s < SUBSETS; s++) {
		c->random[s] = (size[s] + 1.0) / 2 * sum[s];
		c->counts[s] = size[s] >= (s == ALL ? 2 : LEAST_BUCKET) &&
			       c->random[s] - c->ideal[s] > 1e-6 * c->random[s] &&
			       sum[s] > 1e-6 * size[s] * c->queries;
	}
}

static float regret(const struct metric_cut *c, const double *cost, int s)
{
	return c->counts[s] ? (float)((cost[s] - c->ideal[s]) / (c->random[s] - c->ideal[s])) : NAN;
}

static void evicted(const struct metric_cut *c, int utility, const uint32_t *order, float *out)
{
	const float *u = c->u[utility];
	double kept = 0;
	uint32_t k = 0;

	for (int b = 0; b < EVAL_BUDGETS; b++) {
		uint32_t until = (uint32_t)lrint((double)eval_budget[b] * c->n);

		for (; u && k < until; k++)
			kept += u[order[k]];
		out[b] = u && c->total[utility] > 0 && !metric_too_small(eval_budget[b], c->prompt)
				 ? (float)(1 - kept / c->total[utility])
				 : NAN;
	}
}

void metric_of(const struct metric_cut *c, const uint32_t *order, float *out)
{
	double cost[SUBSETS];

	costs(c, order, cost, NULL, NULL);
	out[METRIC_REGRET] = regret(c, cost, ALL);
	out[METRIC_RATIO] = c->counts[ALL] ? (float)MIN(cost[ALL] / MAX(c->ideal[ALL], 1e-8), 200.0) : NAN;
	out[METRIC_FAR] = regret(c, cost, FAR);
	for (int b = 0; b < EVAL_BUCKETS; b++)
		out[METRIC_BUCKET + b] = regret(c, cost, BUCKET + b);
	for (int k = 0; k < UTILITIES; k++)
		evicted(c, k, order, out + METRIC_EVICTED + k * EVAL_BUDGETS);
	for (int e = 0; e < EVAL_ERRORS; e++)
		out[METRIC_ERROR + e] = NAN;
}
