/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The traces of a split, opened and checked for what will be read, and the table of
 * results. Internal to policy/eval.
 */
#include <stdbool.h>
#include "policy/eval/metric.h"
#include "policy/trace.h"

struct eval_doc {
	struct trace *trace; /* owned */
	char *path;          /* owned */
	uint32_t cluster, domain;
	uint32_t first_item; /* of its cuts that are evaluated, which follow each other */
	uint32_t items;
};

/* One evaluated cut. */
struct eval_item {
	uint32_t doc, cut;
	uint32_t prompt, queries, flags; /* as in struct trace_cut */
	bool attainable;                 /* four other cuts have its context and prompt */
	bool long_doc;                   /* of a document longer than validation's, and than 4,096 rows */
	bool held_out;                   /* of a domain that validation does not have, unless long_doc */
};

struct eval_set {
	uint32_t docs, items, clusters, domains;
	struct eval_doc *doc;
	struct eval_item *item;
	char **cluster; /* source of each cluster, into the traces */
	char **domain;
	uint32_t max_rows, max_cuts;
	struct trace_header shape; /* of the first trace */
};

/*
 * Open the traces of `split` below dir; `limit` of them, evenly spread (0: all). like: the shape that they must
 * have (NULL: the first one's); need_q: refuse a trace without queries. Files stay open: the limit on
 * descriptors is raised as far as it may be. No traces: -ENOENT. One line in err.
 */
int eval_set_open(struct eval_set *ret, const char *dir, enum trace_split split, uint32_t limit,
		  const struct trace_header *like, char *err, size_t errsize);
/* -EINVAL when a trace has no queries. */
int eval_set_need_q(const struct eval_set *s, char *err, size_t errsize);
void eval_set_close(struct eval_set *s);
#define EVAL_MAIN_ROWS 4096u
/* Find long_doc and held_out by the validation set. */
void eval_set_mark_held_out(struct eval_set *s, const struct eval_set *seen);

/* Values of every (item, lane, policy, metric); NaN where there is none. */
struct eval_table {
	uint32_t items, lanes, policies;
	const uint32_t *lane; /* [lanes] the model's index of each, the caller's */
	float *value;
};
int eval_table_init(struct eval_table *t, uint32_t items, uint32_t lanes, uint32_t policies);
void eval_table_done(struct eval_table *t);
static inline float *eval_at(const struct eval_table *t, uint32_t item, uint32_t lane, uint32_t policy)
{
	return t->value + (((size_t)item * t->lanes + lane) * t->policies + policy) * METRICS;
}
