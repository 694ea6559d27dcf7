/* SPDX-License-Identifier: MIT */
/* The order of an evaluation: open and check everything, choose on validation, evaluate, report. */
#include <cblas.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include "policy/eval/report.h"
#include "policy/eval/run.h"
#include "policy/eval/select.h"
#include "policy/eval/whole.h"
#include "shm/util.h"

struct whole {
	const struct eval_args *a;
	struct eval_set valid, test;
	struct rivals star, rivals;
	struct eval_table valid_table, table;
	float *gram;
	bool *lane_on; /* [lanes of the model] */
	uint32_t *lane_at, *lane,
		*chosen; /* [lanes of the model]; the table's lanes and their best heuristics */
	uint32_t lanes;
	bool selected;
	char *err;
	size_t errsize;
};

static int parse_lanes(struct whole *r, uint32_t all)
{
	const char *at = r->a->lanes;

	for (uint32_t i = 0; !at && i < all; i++)
		r->lane_on[i] = true;
	while (at && *at) {
		char *end;
		unsigned long from = strtoul(at, &end, 10), to = from;

		if (end != at && *end == '-')
			to = strtoul(at = end + 1, &end, 10);
		if (end == at || (*end && *end != ',') || from > to || to >= all) {
			snprintf(r->err, r->errsize, "--lanes: %s, must be lanes or ranges below %u",
				 r->a->lanes, all);
			return -EINVAL;
		}
		for (; from <= to; from++)
			r->lane_on[from] = true;
		at = *end ? end + 1 : end;
	}
	for (uint32_t i = 0; i < all; i++) {
		r->lane_at[i] = r->lanes;
		if (r->lane_on[i])
			r->lane[r->lanes++] = i;
	}
	return 0;
}

static int choose_lanes(struct whole *r)
{
	uint32_t all = r->test.shape.layers * r->test.shape.heads;

	r->lane_on = calloc(all, sizeof(*r->lane_on));
	r->lane_at = calloc(all, sizeof(*r->lane_at));
	r->lane = calloc(all, sizeof(*r->lane));
	r->chosen = calloc(all, sizeof(*r->chosen));
	if (!r->lane_on || !r->lane_at || !r->lane || !r->chosen)
		return -ENOMEM;
	return parse_lanes(r, all);
}

static int load_gram(struct whole *r)
{
	_cleanup_free_ char *path = NULL;

	if (!r->a->queries)
		return 0;
	if (!r->a->model && asprintf(&path, "%s/model.kvtr", r->a->dir) < 0)
		return -ENOMEM;
	if (!r->a->model && access(path, F_OK) < 0) {
		fprintf(stderr, "kvtier-eval: %s is not there: no attention-output errors\n", path);
		return 0;
	}
	return eval_load_gram(&r->gram, r->a->model ? r->a->model : path, &r->test.shape, r->err, r->errsize);
}

static int evaluate(struct whole *r, const char *what, const struct eval_set *set, const struct rivals *rivals,
		    const float *gram, struct eval_table *table)
{
	struct eval_job j = {.set = set,
			     .rivals = rivals,
			     .lane_on = r->lane_on,
			     .lane_at = r->lane_at,
			     .gram = gram,
			     .error_queries = (uint32_t)r->a->queries,
			     .threads = (uint32_t)r->a->threads,
			     .quiet = r->a->quiet,
			     .what = what,
			     .table = table};

	if (eval_table_init(table, set->items, r->lanes, rivals->n) < 0) {
		snprintf(r->err, r->errsize, "memory: not enough for the results");
		return -ENOMEM;
	}
	table->lane = r->lane;
	return eval_run(&j, r->err, r->errsize);
}

/* The heuristics alone, on the validation split. */
static int select_on_valid(struct whole *r, uint32_t *chosen, float *regret)
{
	char path[4096];
	int e;

	for (uint32_t i = 0; i < r->rivals.n; i++)
		if (r->rivals.r[i].role == RIVAL_STAR)
			r->star.r[r->star.n++] = r->rivals.r[i]; /* policies stay those of r->rivals */
	if (!r->star.n)
		return 0;
	e = evaluate(r, "kvtier-eval: valid", &r->valid, &r->star, NULL, &r->valid_table);
	if (e == 0)
		e = select_best(chosen, regret, &r->valid, &r->star, &r->valid_table);
	if (e < 0)
		return e;
	snprintf(path, sizeof(path), "%s/selected.csv", r->a->out);
	e = select_write(path, chosen, regret, &r->star, r->lane, r->lanes, r->err, r->errsize);
	for (uint32_t l = 0; l < r->lanes; l++)
		for (uint32_t p = 0; p < r->rivals.n; p++)
			if (strcmp(r->rivals.r[p].name, r->star.r[chosen[l]].name) == 0) {
				chosen[l] = p;
				break;
			}
	r->selected = true;
	return e;
}

static int select_heuristics(struct whole *r)
{
	_cleanup_free_ float *regret = calloc(r->lanes + 1, sizeof(*regret));
	int e;

	if (!regret)
		return -ENOMEM;
	if (r->a->select_from) {
		e = select_read(r->chosen, r->a->select_from, &r->rivals, r->lane, r->lanes, r->err,
				r->errsize);
		r->selected = e == 0;
		return e;
	}
	e = eval_set_open(&r->valid, r->a->dir, TRACE_VALID, (uint32_t)r->a->limit, &r->test.shape, r->err,
			  r->errsize);
	if (e == -ENOENT) {
		fprintf(stderr,
			"kvtier-eval: no validation traces: no best heuristic is chosen, no gap is given\n");
		return 0;
	}
	if (e < 0)
		return e;
	eval_set_mark_held_out(&r->test, &r->valid);
	return select_on_valid(r, r->chosen, regret);
}

static int open_everything(struct whole *r)
{
	const struct eval_args *a = r->a;
	bool need_q = false;
	int e = eval_set_open(&r->test, a->dir, a->split, (uint32_t)a->limit, NULL, r->err, r->errsize);

	if (e == 0)
		e = rivals_open(&r->rivals, a->policies, a->weights, a->n_weights, &r->test.shape, a->seed,
				r->err, r->errsize);
	for (uint32_t i = 0; e == 0 && i < r->rivals.n; i++)
		need_q |= rival_needs_q(&r->rivals.r[i]);
	if (e == 0 && need_q)
		e = eval_set_need_q(&r->test, r->err, r->errsize);
	if (e == 0)
		e = choose_lanes(r);
	return e == 0 ? load_gram(r) : e;
}

static int run(struct whole *r)
{
	const struct eval_args *a = r->a;
	struct report report = {.set = &r->test,
				.rivals = &r->rivals,
				.table = &r->table,
				.resamples = (uint32_t)a->resamples,
				.seed = a->seed,
				.out = a->out,
				.command = a->command,
				.err = r->err,
				.errsize = r->errsize};
	int e;

	if (mkdir(a->out, 0777) < 0 && errno != EEXIST) {
		snprintf(r->err, r->errsize, "--out: %s: %s", a->out, strerror(errno));
		return -errno;
	}
	e = open_everything(r);
	if (e == 0)
		e = select_heuristics(r);
	if (e == 0)
		e = evaluate(r, "kvtier-eval", &r->test, &r->rivals, r->gram, &r->table);
	if (e < 0)
		return e;
	if (r->selected) {
		select_fill(&r->table, &r->rivals, r->chosen);
		report.chosen = r->chosen;
	}
	report.error_queries = r->gram ? (uint32_t)a->queries : 0;
	openblas_set_num_threads((int)a->threads);
	return report_write(&report);
}

static void release(struct whole *r)
{
	eval_table_done(&r->valid_table);
	eval_table_done(&r->table);
	rivals_close(&r->rivals);
	eval_set_close(&r->valid);
	eval_set_close(&r->test);
	free(r->gram);
	free(r->lane_on);
	free(r->lane_at);
	free(r->lane);
	free(r->chosen);
}

int eval_whole(const struct eval_args *a, char *err, size_t errsize)
{
	struct whole r = {.a = a, .err = err, .errsize = errsize};
	int e;

	snprintf(err, errsize, "memory: not enough");
	e = run(&r);
	release(&r);
	return e;
}
