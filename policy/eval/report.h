/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * From values to tables: means over source documents with paired bootstrap
 * intervals, by slice of the test cuts. Internal to policy/eval.
 *
 * A cluster is a source document; its value is the mean over its cuts of the
 * slice, a slice's mean that over its clusters, and a policy's that over lanes.
 */
#include <stdio.h>
#include "policy/eval/boot.h"
#include "policy/eval/rivals.h"
#include "policy/eval/set.h"

struct report {
	const struct eval_set *set;
	const struct rivals *rivals;
	const struct eval_table *table;
	const uint32_t *chosen; /* [lanes] of the table: policy of the best heuristic, or NULL */
	uint32_t resamples;
	uint64_t seed;
	const char *out;     /* directory */
	const char *command; /* for the summary */
	uint32_t error_queries;
	char *err;
	size_t errsize;
};

/* A slice of the items, as values by cluster. */
struct slice {
	char name[40];
	bool length; /* a range of prompt lengths */
	uint32_t items, clusters;
	uint32_t metrics, columns; /* METRICS, or 1 (regret alone) when made for gaps; policies * metrics */
	float *regret;             /* [lanes][clusters][policies] */
	float *metric;             /* [clusters][policies][METRICS], mean over lanes */
	struct boot boot;
	float *point, *mean; /* of metric: [columns], [resamples][columns] */
};

enum slice_kind {
	SLICE_ALL,
	SLICE_MAIN,
	SLICE_HELD_OUT,
	SLICE_LONG,
	SLICE_BEFORE,
	SLICE_AFTER,
	SLICE_LENGTH,
	SLICE_DOMAIN
};
struct slice_def {
	enum slice_kind kind;
	uint32_t from, to; /* LENGTH: prompts of (from, to] rows */
	uint32_t domain;
	bool attainable; /* only cuts that have an attainable oracle */
};
/* -ENODATA: no cut is in it; -ENOMEM. */
int slice_make(struct slice *ret, const struct report *r, const struct slice_def *def);
void slice_done(struct slice *s);
/* Mean of a metric of a policy, with its interval; scratch: resamples floats. */
struct interval slice_mean(const struct slice *s, uint32_t policy, uint32_t metric, float *scratch);

/* Difference of two policies, and its p-value. */
struct interval slice_difference(const struct slice *s, uint32_t policy, uint32_t than, uint32_t metric,
				 double *p, float *scratch);
/* Share of the gap in regret from `from` to `to` that `policy` closes: (from - policy) / (from - to). */
struct interval slice_share(const struct slice *s, uint32_t policy, uint32_t from, uint32_t to, float *scratch);
/* The same draws alone, for ratios between slices. */
void slice_share_draws(const struct slice *s, uint32_t policy, uint32_t from, uint32_t to, float *draws);

/* On how many lanes a policy's regret is the lowest among those of its rivals. */
struct wins {
	uint32_t lanes, lowest, sure; /* sure: the interval of its distance to the best of them excludes 0 */
};
enum wins_among { AMONG_STAR, AMONG_TRAINED /* position-only and q-filters too */, AMONG };
/*
 * wins[policies][AMONG]; lane (or NULL): [lanes][policies] regret with its interval. -ENOMEM.
 */
int slice_wins(const struct report *r, const struct slice *s, struct wins (*wins)[AMONG],
	       struct interval *lane);

/* Write every file into r->out. 0 or an error with one line in r->err. */
int report_write(const struct report *r);

/* ---- between the files of the report ------------------------------------------------------------- */

struct report_data {
	struct slice *slice;      /* those with cuts */
	struct slice *attainable; /* of the same cuts, those with an attainable oracle; .items 0: none */
	uint32_t n;
	struct wins (*wins)[RIVALS_MAX][AMONG];                   /* [n] */
	struct interval *lane;                                    /* [lanes][policies] of the main slice */
	int main, to_4k, near_4k, over_4k; /* near_4k: from 2k */ /* places among the slices, or -1 */
	int best, oracle, reach;                                  /* places among the policies, or -1 */
	float *scratch;                                           /* [resamples] */
};
int report_csv(const struct report *r, struct report_data *d);
int report_markdown(const struct report *r, struct report_data *d);
/* Wide tables, a column a policy, for gnuplot. */
int report_plots(const struct report *r, struct report_data *d);
FILE *report_open(const struct report *r, const char *name);
/* Flushes and closes; -errno with a line in r->err when anything was not written. */
int report_close(const struct report *r, FILE *f, const char *name);
