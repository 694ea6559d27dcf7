/* SPDX-License-Identifier: MIT */
/* kvtier-eval: what every policy would have kept, and what that costs, on traces. */
#include <cblas.h>
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include "policy/eval/gnuplot.h"
#include "policy/eval/report.h"
#include "policy/eval/run.h"
#include "policy/eval/select.h"
#include "shm/util.h"

#define MAX_WEIGHTS 24u

static const char usage[] =
	"Usage: kvtier-eval [OPTION]... --out DIR TRACES\n"
	"\n"
	"Ranks the rows of every cut of the traces in TRACES by every policy and measures\n"
	"what each ranking loses. Writes tables, a summary and plots into DIR.\n"
	"\n"
	"  --out DIR             made if it is not there\n"
	"  --weights NAME=FILE   a .kvp file of any kind, under a name of its own; repeat for more\n"
	"  --policies LIST       names, comma-separated, or all (default), or star: no attention\n"
	"  --split SPLIT         test (default) or valid\n"
	"  --select-from FILE    selected.csv of an earlier run instead of choosing the best\n"
	"                        heuristic of every lane on the validation traces\n"
	"  --model FILE          the model's trace (default: TRACES/model.kvtr)\n"
	"  --lanes LIST          lanes and ranges, such as 0-8,30 (default: all)\n"
	"  --limit N             N traces of a split, evenly spread (default: all)\n"
	"  --queries N           future queries sampled per cut for output errors, 0 to 64 (default 16)\n"
	"  --resamples N         of the bootstrap, 100 to 1000000 (default 10000)\n"
	"  --seed N              of random policies and resamples (default 1)\n"
	"  --threads N           default: one per CPU\n"
	"  --plots SCRIPTS       run gnuplot on every *.gp there\n"
	"  --quiet               no progress\n"
	"  --help, --version\n"
	"\n"
	"Exit status: 0 done, 1 input refused or an operation failed, 2 wrong usage.\n";

struct args {
	const char *dir, *out, *policies, *select_from, *model, *lanes, *plots;
	struct rival_weights weights[MAX_WEIGHTS];
	uint32_t n_weights;
	enum trace_split split;
	uint64_t limit, queries, resamples, seed, threads;
	bool quiet;
	char command[2048];
};

static int bad_usage(const char *what, const char *value)
{
	fprintf(stderr, "kvtier-eval: %s: %s, see --help\n", what, value);
	return 2;
}

static int failed(const char *err)
{
	fprintf(stderr, "kvtier-eval: %s\n", err);
	return 1;
}

static bool parse_number(const char *s, uint64_t lo, uint64_t hi, uint64_t *ret)
{
	char *end;

	errno = 0;
	*ret = strtoull(s, &end, 0);
	return !errno && end != s && !*end && *s != '-' && *ret >= lo && *ret <= hi;
}

static bool parse_weights(struct args *a, char *arg)
{
	char *path = strchr(arg, '=');

	if (!path || path == arg || !path[1] || a->n_weights == MAX_WEIGHTS)
		return false;
	*path++ = 0;
	if (strlen(arg) >= RIVAL_NAME || strpbrk(arg, ",|\" \t\n"))
		return false;
	a->weights[a->n_weights++] = (struct rival_weights){arg, path};
	return true;
}

static bool parse_split(struct args *a, const char *s)
{
	a->split = strcmp(s, "valid") == 0 ? TRACE_VALID : TRACE_TEST;
	return strcmp(s, "valid") == 0 || strcmp(s, "test") == 0;
}

static void keep_command(struct args *a, int argc, char **argv)
{
	size_t at = 0;

	for (int i = 0; i < argc && at < sizeof(a->command); i++)
		at += (size_t)snprintf(a->command + at, sizeof(a->command) - at, "%s%s", i ? " " : "", argv[i]);
}

static bool parse_option(struct args *a, int c, char *arg)
{
	switch (c) {
	case 'o':
		a->out = arg;
		return true;
	case 'w':
		return parse_weights(a, arg);
	case 'p':
		a->policies = arg;
		return true;
	case 's':
		return parse_split(a, arg);
	case 'f':
		a->select_from = arg;
		return true;
	case 'm':
		a->model = arg;
		return true;
	case 'l':
		a->lanes = arg;
		return true;
	case 'n':
		return parse_number(arg, 1, UINT32_MAX, &a->limit);
	case 'q':
		return parse_number(arg, 0, OUTPUT_QUERIES, &a->queries);
	case 'r':
		return parse_number(arg, 100, 1000000, &a->resamples);
	case 'e':
		return parse_number(arg, 0, UINT64_MAX, &a->seed);
	case 't':
		return parse_number(arg, 1, 256, &a->threads);
	case 'g':
		a->plots = arg;
		return true;
	default:
		a->quiet = true;
		return true;
	}
}

/* 0, or the exit status. */
static int parse_args(struct args *a, int argc, char **argv)
{
	static const struct option options[] = {
		{"out", required_argument, NULL, 'o'},
		{"weights", required_argument, NULL, 'w'},
		{"policies", required_argument, NULL, 'p'},
		{"split", required_argument, NULL, 's'},
		{"select-from", required_argument, NULL, 'f'},
		{"model", required_argument, NULL, 'm'},
		{"lanes", required_argument, NULL, 'l'},
		{"limit", required_argument, NULL, 'n'},
		{"queries", required_argument, NULL, 'q'},
		{"resamples", required_argument, NULL, 'r'},
		{"seed", required_argument, NULL, 'e'},
		{"threads", required_argument, NULL, 't'},
		{"plots", required_argument, NULL, 'g'},
		{"quiet", no_argument, NULL, 'x'},
		{NULL, 0, NULL, 0},
	};
	int c, at = 0;

	while ((c = getopt_long(argc, argv, "", options, &at)) != -1) {
		if (c == '?')
			return 2;
		if (!parse_option(a, c, optarg))
			return bad_usage(options[at].name, "not a value for this option");
	}
	if (optind + 1 != argc)
		return bad_usage("TRACES", optind == argc ? "missing" : "more than one");
	if (!a->out)
		return bad_usage("--out", "missing");
	a->dir = argv[optind];
	return 0;
}

/* ---- a run ------------------------------------------------------------------------------------- */

struct run {
	const struct args *a;
	struct eval_set valid, test;
	struct rivals star, rivals;
	struct eval_table valid_table, table;
	float *gram;
	bool *lane_on; /* [lanes of the model] */
	uint32_t *lane_at, *lane,
		*chosen; /* [lanes of the model]; the table's lanes and their best heuristics */
	uint32_t lanes;
	bool selected;
	char err[768];
};

static int parse_lanes(struct run *r, uint32_t all)
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
			snprintf(r->err, sizeof(r->err), "--lanes: %s, must be lanes or ranges below %u",
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

static int choose_lanes(struct run *r)
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

static int load_gram(struct run *r)
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
	return eval_load_gram(&r->gram, r->a->model ? r->a->model : path, &r->test.shape, r->err,
			      sizeof(r->err));
}

static int evaluate(struct run *r, const char *what, const struct eval_set *set, const struct rivals *rivals,
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
		snprintf(r->err, sizeof(r->err), "memory: not enough for the results");
		return -ENOMEM;
	}
	table->lane = r->lane;
	return eval_run(&j, r->err, sizeof(r->err));
}

/* The heuristics alone, on the validation split. */
static int select_on_valid(struct run *r, uint32_t *chosen, float *regret)
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
	e = select_write(path, chosen, regret, &r->star, r->lane, r->lanes, r->err, sizeof(r->err));
	for (uint32_t l = 0; l < r->lanes; l++)
		for (uint32_t p = 0; p < r->rivals.n; p++)
			if (strcmp(r->rivals.r[p].name, r->star.r[chosen[l]].name) == 0) {
				chosen[l] = p;
				break;
			}
	r->selected = true;
	return e;
}

static int select_heuristics(struct run *r)
{
	_cleanup_free_ float *regret = calloc(r->lanes + 1, sizeof(*regret));
	int e;

	if (!regret)
		return -ENOMEM;
	if (r->a->select_from) {
		e = select_read(r->chosen, r->a->select_from, &r->rivals, r->lane, r->lanes, r->err,
				sizeof(r->err));
		r->selected = e == 0;
		return e;
	}
	e = eval_set_open(&r->valid, r->a->dir, TRACE_VALID, (uint32_t)r->a->limit, &r->test.shape, r->err,
			  sizeof(r->err));
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

static int open_everything(struct run *r)
{
	const struct args *a = r->a;
	bool need_q = false;
	int e = eval_set_open(&r->test, a->dir, a->split, (uint32_t)a->limit, NULL, r->err, sizeof(r->err));

	if (e == 0)
		e = rivals_open(&r->rivals, a->policies, a->weights, a->n_weights, &r->test.shape, a->seed,
				r->err, sizeof(r->err));
	for (uint32_t i = 0; e == 0 && i < r->rivals.n; i++)
		need_q |= rival_needs_q(&r->rivals.r[i]);
	if (e == 0 && need_q)
		e = eval_set_need_q(&r->test, r->err, sizeof(r->err));
	if (e == 0)
		e = choose_lanes(r);
	return e == 0 ? load_gram(r) : e;
}

static int run(struct run *r)
{
	const struct args *a = r->a;
	struct report report = {.set = &r->test,
				.rivals = &r->rivals,
				.table = &r->table,
				.resamples = (uint32_t)a->resamples,
				.seed = a->seed,
				.out = a->out,
				.command = a->command,
				.err = r->err,
				.errsize = sizeof(r->err)};
	int e;

	if (mkdir(a->out, 0777) < 0 && errno != EEXIST) {
		snprintf(r->err, sizeof(r->err), "--out: %s: %s", a->out, strerror(errno));
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
	openblas_set_num_threads((int)a->threads);
	return report_write(&report);
}

static void release(struct run *r)
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

int main(int argc, char **argv)
{
	struct args a = {.split = TRACE_TEST, .queries = 16, .resamples = 10000, .seed = 1};
	struct run r = {.a = &a, .err = "memory: not enough"};
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	int e;

	if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
		fputs(usage, stdout);
		return 0;
	}
	if (argc > 1 && strcmp(argv[1], "--version") == 0) {
		puts("kvtier-eval " KVT_VERSION);
		return 0;
	}
	a.threads = cpus > 0 ? MIN((uint64_t)cpus, 256) : 1;
	keep_command(&a, argc, argv);
	e = parse_args(&a, argc, argv);
	if (e)
		return e;
	e = run(&r);
	release(&r);
	if (e < 0)
		return failed(r.err);
	return a.plots && eval_plots(a.plots, a.out, r.err, sizeof(r.err)) < 0 ? failed(r.err) : 0;
}
