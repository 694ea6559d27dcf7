/* SPDX-License-Identifier: MIT */
#pragma once
/* A whole evaluation, from a directory of traces to a directory of tables. */
#include "policy/eval/rivals.h"
#include "policy/eval/set.h"

#define EVAL_WEIGHTS 24u

struct eval_args {
	const char *dir, *out;                   /* traces; made if it is not there */
	const char *policies;                    /* as rivals_open() takes them */
	const char *select_from, *model, *lanes; /* NULL: choose on validation; dir/model.kvtr; all */
	struct rival_weights weights[EVAL_WEIGHTS];
	uint32_t n_weights;
	enum trace_split split;
	uint64_t limit, queries, resamples, seed, threads; /* as kvtier-eval's options */
	bool quiet;
	const char *command; /* for the summary */
};

/* 0, or a negative error with one line in err. Notes of what is left out go to stderr. */
int eval_whole(const struct eval_args *a, char *err, size_t errsize);
