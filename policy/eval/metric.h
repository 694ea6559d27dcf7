/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What a ranking costs. Rows are the evictable ones of a prompt, n = P - 20: the
 * first 4 and the last 16 are kept by every policy and left out of u, ranks and C. Internal to policy/eval.
 *
 *    C = sum_k k u_sigma(k)      C* the same of u's own order      C_rand = (n + 1) / 2 sum u
 *    regret (C - C*) / (C_rand - C*): 0 is the oracle, 1 random      ratio min(C / max(C*, 1e-8), 200), as
 * published evicted utility at a budget: 1 - (u of the round(budget * n) rows kept) / sum u
 *
 * u of regret and ratio is UMAX. Evicted utility is also taken for UMEAN and for UMEAN * VNORM. A metric that
 * says nothing is NaN: regret when C_rand - C* is below 1e-6 of C_rand or sum u below 1e-6 per row and query;
 * everything at a budget of fewer than 64 rows (budget * P < 64). Regret in a distance bucket is the regret of
 * the ranking restricted to rows in it, when there are 32 or more.
 */
#include <stdbool.h>
#include <stdint.h>

#define PROTECT_FIRST 4u
#define PROTECT_LAST 16u
#define PROTECTED (PROTECT_FIRST + PROTECT_LAST)
#define LEAST_PROMPT (PROTECTED + 32u) /* shorter prompts are not evaluated */
#define LEAST_KEPT 64u                 /* rows that a budget must leave */
#define LEAST_BUCKET 32u

#define EVAL_BUDGETS 5 /* 5, 10, 20, 30, 50 % */
#define EVAL_ERRORS 3  /* 10, 25, 50 % */
#define EVAL_BUCKETS 6 /* distance to the end below 128, 512, 1024, 2048, 4096, and beyond */
enum eval_utility { UTILITY_MAX, UTILITY_MEAN, UTILITY_VALUE, UTILITIES };
extern const float eval_budget[EVAL_BUDGETS], eval_error_budget[EVAL_ERRORS];
extern const uint32_t eval_bucket_end[EVAL_BUCKETS];

enum eval_metric {
	METRIC_REGRET,
	METRIC_RATIO,
	METRIC_FAR,                                               /* regret without the last 128 rows */
	METRIC_BUCKET,                                            /* [EVAL_BUCKETS] */
	METRIC_EVICTED = METRIC_BUCKET + EVAL_BUCKETS,            /* [UTILITIES][EVAL_BUDGETS] */
	METRIC_ERROR = METRIC_EVICTED + UTILITIES * EVAL_BUDGETS, /* [EVAL_ERRORS], filled elsewhere */
	METRICS = METRIC_ERROR + EVAL_ERRORS,
};
/* "regret", "evicted_mean_10", ... */
void metric_name(uint32_t metric, char *name, uint32_t size);
/* Is the metric about a budget of so few rows of this prompt that it is not reported? */
bool metric_too_small(float budget, uint32_t prompt);

/*
 * Rows by descending score, equal scores by later row first. scratch: 2 * n words. Scores are finite.
 */
void rank_rows(const float *score, uint32_t n, uint32_t *order, uint32_t *scratch);

/* A cut of a lane, seen by its utilities; arrays of the evictable rows, the caller's. */
struct metric_cut {
	uint32_t prompt, queries, n;
	const float *u[UTILITIES]; /* MEAN and VALUE may be NULL: their metrics are NaN */
	const uint32_t *best;      /* order of u[UTILITY_MAX] */
	double total[UTILITIES];
	/* Subsets: all, without the last 128, the buckets. */
	double ideal[2 + EVAL_BUCKETS], random[2 + EVAL_BUCKETS];
	bool counts[2 + EVAL_BUCKETS];
};
/* Fill what follows from prompt, queries, u and best. */
void metric_prepare(struct metric_cut *c);
/* All but METRIC_ERROR of the ranking `order`; out[METRICS], those of METRIC_ERROR become NaN. */
void metric_of(const struct metric_cut *c, const uint32_t *order, float *out);
