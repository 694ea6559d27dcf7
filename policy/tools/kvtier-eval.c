/* SPDX-License-Identifier: MIT */
/* kvtier-eval: what every policy would have kept, and what that costs, on traces. */
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include "policy/eval/gnuplot.h"
#include "policy/eval/output.h"
#include "policy/eval/whole.h"
#include "shm/util.h"

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
	struct eval_args eval;
	const char *plots;
	char command[2048];
};

static int bad_usage(const char *what, const char *value)
{
	fprintf(stderr, "kvtier-eval: %s: %s, see --help\n", what, value);
	return 2;
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

	if (!path || path == arg || !path[1] || a->eval.n_weights == EVAL_WEIGHTS)
		return false;
	*path++ = 0;
	if (strlen(arg) >= RIVAL_NAME || strpbrk(arg, ",|\" \t\n"))
		return false;
	a->eval.weights[a->eval.n_weights++] = (struct rival_weights){arg, path};
	return true;
}

static bool parse_split(struct args *a, const char *s)
{
	a->eval.split = strcmp(s, "valid") == 0 ? TRACE_VALID : TRACE_TEST;
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
		a->eval.out = arg;
		return true;
	case 'w':
		return parse_weights(a, arg);
	case 'p':
		a->eval.policies = arg;
		return true;
	case 's':
		return parse_split(a, arg);
	case 'f':
		a->eval.select_from = arg;
		return true;
	case 'm':
		a->eval.model = arg;
		return true;
	case 'l':
		a->eval.lanes = arg;
		return true;
	case 'n':
		return parse_number(arg, 1, UINT32_MAX, &a->eval.limit);
	case 'q':
		return parse_number(arg, 0, OUTPUT_QUERIES, &a->eval.queries);
	case 'r':
		return parse_number(arg, 100, 1000000, &a->eval.resamples);
	case 'e':
		return parse_number(arg, 0, UINT64_MAX, &a->eval.seed);
	case 't':
		return parse_number(arg, 1, 256, &a->eval.threads);
	case 'g':
		a->plots = arg;
		return true;
	default:
		a->eval.quiet = true;
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
	if (!a->eval.out)
		return bad_usage("--out", "missing");
	a->eval.dir = argv[optind];
	return 0;
}

int main(int argc, char **argv)
{
	struct args a = {.eval = {.split = TRACE_TEST, .queries = 16, .resamples = 10000, .seed = 1}};
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	char err[768];
	int e;

	if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
		fputs(usage, stdout);
		return 0;
	}
	if (argc > 1 && strcmp(argv[1], "--version") == 0) {
		puts("kvtier-eval " KVT_VERSION);
		return 0;
	}
	a.eval.threads = cpus > 0 ? MIN((uint64_t)cpus, 256) : 1;
	a.eval.command = a.command;
	keep_command(&a, argc, argv);
	e = parse_args(&a, argc, argv);
	if (e)
		return e;
	e = eval_whole(&a.eval, err, sizeof(err));
	if (e == 0 && a.plots)
		e = eval_plots(a.plots, a.eval.out, err, sizeof(err));
	if (e == 0)
		return 0;
	fprintf(stderr, "kvtier-eval: %s\n", err);
	return 1;
}
