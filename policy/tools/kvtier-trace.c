/* SPDX-License-Identifier: MIT */
/* kvtier-trace: look into, verify and print .kvtr traces, and give recorded ones their cuts and utilities. */
#include "policy/learned.h"
#include "policy/trace.h"
#include "shm/util.h"

#include <fts.h>
#include <getopt.h>
#include <stdio.h>

static const char usage[] =
	"Usage: kvtier-trace info FILE...\n"
	"       kvtier-trace verify PATH...\n"
	"       kvtier-trace cat FILE KIND [--lane N] [--cut N] [--raw]\n"
	"       kvtier-trace cut FILE -o OUT [--at P:F[:before]]... [--split NAME] [--no-queries]\n"
	"\n"
	"info    print header, cuts and what chunks there are; reads no chunk\n"
	"verify  read all of each file, or of each *.kvtr below a folder: one line for each that is\n"
	"        damaged, with the offset, and nothing else\n"
	"cat     print a chunk, a row per line\n"
	"cut     write FILE again with further cuts and with the utilities of every cut, computed from\n"
	"        keys and queries where FILE has none\n"
	"\n"
	"KIND is cuts, tokens, k, v, q, umax, umean, vnorm or gram.\n"
	"\n"
	"  --lane N        layer * heads + head (default 0)\n"
	"  --cut N         number of the cut, from 0 (umax and umean; default 0)\n"
	"  --raw           the bytes as they are in the file\n"
	"  --at P:F        rank rows [0, P) by the queries of rows [P, P + F); with :before the cut is\n"
	"                  marked as one before the question\n"
	"  --split NAME    train, valid, test or calib (default: as FILE says)\n"
	"  --no-queries    leave the queries out: training needs the utilities only\n"
	"  -o OUT          written through a temporary file beside it\n"
	"\n"
	"Exit status: 0 done, 1 a file was refused or an operation failed, 2 wrong usage.\n";

static const char *const splits[] = {"train", "valid", "test", "calib"};
static char err[1024];

static int bad_usage(const char *what, const char *value)
{
	fprintf(stderr, "kvtier-trace: %s: %s, see --help\n", what, value);
	return 2;
}

static int failed(void)
{
	fprintf(stderr, "kvtier-trace: %s\n", err);
	return 1;
}

static bool parse_u32(const char *s, char **end, uint32_t *ret)
{
	unsigned long long v;

	if (*s < '0' || *s > '9')
		return false;
	errno = 0;
	v = strtoull(s, end, 10);
	*ret = (uint32_t)v;
	return !errno && v <= UINT32_MAX;
}

/* ---- info ------------------------------------------------------------------ */

static void print_cuts(const struct trace *t)
{
	for (uint32_t i = 0; i < t->h.cuts; i++) {
		const struct trace_cut *c = &t->cut[i];

		printf("cut %-8u rows [0, %u), %u queries, context %u%s%s\n", i, c->prompt, c->queries,
		       c->context, c->flags & TRACE_CUT_BEFORE ? ", before the question" : "",
		       c->flags & TRACE_CUT_BRANCH ? ", branch" : "");
	}
}

/* The table is sorted by kind. */
static void print_chunks(const struct trace *t)
{
	for (uint32_t kind = 1, i = 0; kind < TRACE_KINDS; kind++) {
		unsigned long long bytes = 0;
		uint32_t n = 0;

		for (; i < t->h.chunks && t->chunk[i].kind == kind; i++, n++)
			bytes += t->chunk[i].bytes;
		if (n)
			printf("%-12s %u chunks, %llu bytes\n", trace_kind_name(kind), n, bytes);
	}
}

static void print_info(const struct trace *t)
{
	static const char *const dtypes[] = {"", "f32", "f16", "bf16"}, *const ropes[] = {"none", "half",
											  "pairs"};
	const struct trace_header *h = &t->h;

	printf("model        %s\n", h->model);
	printf("source       %s\n", h->source);
	printf("domain       %s\n", h->domain);
	printf("task         %s\n", h->task);
	printf("split        %s, seed %llu\n", splits[h->split], (unsigned long long)h->seed);
	printf("shape        %u layers x %u KV heads = %u lanes, group %u, k_dim %u, v_dim %u, %s\n", h->layers,
	       h->heads, h->layers * h->heads, h->group, h->k_dim, h->v_dim, dtypes[h->dtype]);
	printf("rope         %s, theta %g, keys %s RoPE\n", ropes[h->rope_type], (double)h->rope_theta,
	       h->keys == TRACE_KEYS_CACHED ? "after" : "before");
	printf("rows         %u\n", h->rows);
	print_cuts(t);
	print_chunks(t);
	printf("size         %llu bytes, format version %u\n", (unsigned long long)h->file_size, h->version);
}

static int info(int argc, char **argv)
{
	int bad = 0;

	if (argc < 3)
		return bad_usage("FILE", "missing");
	for (int i = 2; i < argc; i++) {
		struct trace *t;

		if (trace_open(&t, argv[i], err, sizeof(err)) < 0) {
			bad = failed();
			continue;
		}
		if (argc > 3)
			printf("%s%s:\n", i > 2 ? "\n" : "", argv[i]);
		print_info(t);
		trace_free(t);
	}
	return bad;
}

/* ---- verify ---------------------------------------------------------------- */

static int verify_file(const char *path)
{
	struct trace *t;
	int r = trace_open(&t, path, err, sizeof(err));

	if (r < 0)
		return failed();
	r = trace_verify(t, err, sizeof(err));
	trace_free(t);
	return r < 0 ? failed() : 0;
}

static bool is_trace(const FTSENT *e)
{
	return e->fts_level == FTS_ROOTLEVEL ||
	       (e->fts_namelen > 5 && strcmp(e->fts_name + e->fts_namelen - 5, ".kvtr") == 0);
}

static int by_name(const FTSENT **a, const FTSENT **b)
{
	return strcmp((*a)->fts_name, (*b)->fts_name);
}

static int verify(int argc, char **argv)
{
	int bad = 0;
	FTSENT *e;
	FTS *tree;

	if (argc < 3)
		return bad_usage("PATH", "missing");
	tree = fts_open(argv + 2, FTS_PHYSICAL | FTS_COMFOLLOW | FTS_NOCHDIR, by_name);
	if (!tree) {
		snprintf(err, sizeof(err), "%s", strerror(errno));
		return failed();
	}
	while ((e = fts_read(tree))) {
		if (e->fts_info == FTS_NS || e->fts_info == FTS_DNR || e->fts_info == FTS_ERR) {
			snprintf(err, sizeof(err), "%s: %s", e->fts_path, strerror(e->fts_errno));
			bad = failed();
		} else if (e->fts_info != FTS_D && e->fts_info != FTS_DP && is_trace(e)) {
			bad |= verify_file(e->fts_path);
		}
	}
	fts_close(tree);
	return bad;
}

/* ---- cat ------------------------------------------------------------------- */

/* Kind by name, 0 when there is none. */
static uint32_t kind_of(const char *name)
{
	for (uint32_t kind = 1; kind < TRACE_KINDS; kind++)
		if (strcasecmp(name, trace_kind_name(kind)) == 0)
			return kind;
	return 0;
}

/* Elements on a line of text. */
static uint32_t width_of(const struct trace_header *h, uint32_t kind)
{
	switch (kind) {
	case TRACE_CUTS:
		return sizeof(struct trace_cut) / sizeof(uint32_t);
	case TRACE_K:
	case TRACE_Q:
		return h->k_dim;
	case TRACE_V:
		return h->v_dim;
	case TRACE_GRAM:
		return h->group * h->v_dim;
	default:
		return 1;
	}
}

static void print_chunk(const struct trace *t, uint32_t kind, const void *data, uint64_t bytes)
{
	bool rows = kind == TRACE_K || kind == TRACE_V || kind == TRACE_Q;
	enum row_dtype dtype = rows ? (enum row_dtype)t->h.dtype : ROW_F32;
	uint32_t width = width_of(&t->h, kind);
	uint64_t n = bytes / dtype_bytes(dtype);

	for (uint64_t i = 0; i < n; i++) {
		char end = (i + 1) % width ? ' ' : '\n';

		if (kind == TRACE_CUTS || kind == TRACE_TOKENS)
			printf("%u%c", ((const uint32_t *)data)[i], end);
		else
			printf("%.9g%c", (double)row_element(data, i, dtype), end);
	}
}

static int cat_chunk(const struct trace *t, uint32_t kind, uint32_t lane, uint32_t cut, bool raw)
{
	const struct trace_chunk *c = trace_find(t, kind, lane, cut);
	_cleanup_free_ void *data = malloc(c ? c->bytes : 1);
	int r;

	if (!data) {
		snprintf(err, sizeof(err), "%s: out of memory", t->path);
		return failed();
	}
	r = trace_read(t, kind, lane, cut, data, err, sizeof(err));
	if (r < 0)
		return failed();
	if (raw)
		fwrite(data, 1, c->bytes, stdout);
	else
		print_chunk(t, kind, data, c->bytes);
	if (fflush(stdout) == 0 && !ferror(stdout))
		return 0;
	snprintf(err, sizeof(err), "output: %s", strerror(errno));
	return failed();
}

static int cat(int argc, char **argv)
{
	static const struct option options[] = {
		{"lane", required_argument, NULL, 'l'},
		{"cut", required_argument, NULL, 'c'},
		{"raw", no_argument, NULL, 'r'},
		{NULL, 0, NULL, 0},
	};
	uint32_t lane = 0, cut = 0, kind;
	bool raw = false, ok = true;
	struct trace *t;
	char *end = "";
	int c, r;

	optind = 2;
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 'l' || c == 'c')
			ok = parse_u32(optarg, &end, c == 'l' ? &lane : &cut) && !*end;
		else if (c == 'r')
			raw = true;
		else
			return 2;
		if (!ok)
			return bad_usage("not a number", optarg);
	}
	if (argc - optind != 2)
		return bad_usage("FILE KIND", "must be given, and nothing else");
	kind = kind_of(argv[optind + 1]);
	if (!kind)
		return bad_usage("KIND", argv[optind + 1]);
	if (trace_open(&t, argv[optind], err, sizeof(err)) < 0)
		return failed();
	r = cat_chunk(t, kind, lane, cut, raw);
	trace_free(t);
	return r;
}

/* ---- cut ------------------------------------------------------------------- */

struct cut_job {
	struct trace *t; /* with the new cuts */
	struct trace_writer *w;
	void *buf; /* the largest chunk */
	float *umax, *umean;
	bool queries; /* keep them */
};

static int wrong(const char *out, int r)
{
	snprintf(err, sizeof(err), "%s: %s", out, strerror(-r));
	return r;
}

static int copy_chunks(const struct cut_job *j, const char *out)
{
	const struct trace *t = j->t;

	for (uint32_t i = 0; i < t->h.chunks; i++) {
		const struct trace_chunk *c = &t->chunk[i];
		int r;

		if (c->kind == TRACE_CUTS || (c->kind == TRACE_Q && !j->queries))
			continue;
		r = trace_read(t, c->kind, c->lane, c->cut, j->buf, err, sizeof(err));
		if (r < 0)
			return r;
		r = trace_writer_chunk(j->w, c->kind, c->lane, c->cut, j->buf);
		if (r < 0)
			return wrong(out, r);
	}
	return 0;
}

static int add_utility(const struct cut_job *j, uint32_t lane, uint32_t cut, const char *out)
{
	bool has_max = trace_find(j->t, TRACE_UMAX, lane, cut),
	     has_mean = trace_find(j->t, TRACE_UMEAN, lane, cut);
	int r;

	if (has_max && has_mean)
		return 0;
	r = trace_utility(j->t, lane, cut, j->umax, j->umean, err, sizeof(err));
	if (r < 0)
		return r;
	if (!has_max)
		r = trace_writer_chunk(j->w, TRACE_UMAX, lane, cut, j->umax);
	if (r == 0 && !has_mean)
		r = trace_writer_chunk(j->w, TRACE_UMEAN, lane, cut, j->umean);
	return r < 0 ? wrong(out, r) : 0;
}

static int write_cuts(struct cut_job *j, const char *out)
{
	const struct trace *t = j->t;
	uint64_t most = 0;
	int r;

	for (uint32_t i = 0; i < t->h.chunks; i++)
		most = MAX(most, t->chunk[i].bytes);
	j->buf = malloc(most);
	j->umax = malloc(t->h.rows * sizeof(float) + 1);
	j->umean = malloc(t->h.rows * sizeof(float) + 1);
	if (!j->buf || !j->umax || !j->umean)
		return wrong(out, -ENOMEM);
	r = copy_chunks(j, out);
	for (uint32_t cut = 0; r == 0 && cut < t->h.cuts; cut++)
		for (uint32_t lane = 0; r == 0 && lane < t->h.layers * t->h.heads; lane++)
			r = add_utility(j, lane, cut, out);
	if (r < 0)
		return r;
	r = trace_writer_finish(TAKE_PTR(j->w), 0);
	return r < 0 ? wrong(out, r) : 0;
}

/* New cuts are no continuations of others. */
static void number_contexts(struct trace_cut *cut, uint32_t own, uint32_t n)
{
	uint32_t next = 0;

	for (uint32_t i = 0; i < own; i++)
		next = MAX(next, cut[i].context + 1);
	for (uint32_t i = own; i < n; i++)
		cut[i].context = next++;
}

static int cut_file(const char *path, const char *out, const struct trace_cut *more, uint32_t n, int split,
		    bool queries)
{
	struct cut_job j = {.queries = queries};
	struct trace_cut *cut;
	uint32_t own;
	int r = trace_open(&j.t, path, err, sizeof(err));

	if (r < 0)
		return failed();
	own = j.t->h.cuts;
	cut = realloc(j.t->cut, (own + n + 1) * sizeof(*cut));
	if (cut) {
		j.t->cut = cut;
		memcpy(cut + own, more, n * sizeof(*cut));
		number_contexts(cut, own, own + n);
		j.t->h.cuts += n;
		j.t->h.split = split < 0 ? j.t->h.split : (uint32_t)split;
		r = trace_writer_open(&j.w, out, &j.t->h, cut, err, sizeof(err));
	} else {
		r = wrong(out, -ENOMEM);
	}
	if (r == 0)
		r = write_cuts(&j, out);
	trace_writer_abort(j.w);
	trace_free(j.t);
	free(j.buf);
	free(j.umax);
	free(j.umean);
	return r < 0 ? failed() : 0;
}

/* P:F or P:F:before */
static bool parse_cut(const char *s, struct trace_cut *ret)
{
	char *end;

	*ret = (struct trace_cut){0};
	if (!parse_u32(s, &end, &ret->prompt) || *end != ':' || !parse_u32(end + 1, &end, &ret->queries))
		return false;
	if (strcmp(end, ":before") == 0)
		ret->flags = TRACE_CUT_BEFORE;
	return !*end || ret->flags;
}

static int cut(int argc, char **argv)
{
	static const struct option options[] = {
		{"at", required_argument, NULL, 'a'},
		{"split", required_argument, NULL, 's'},
		{"no-queries", no_argument, NULL, 'n'},
		{NULL, 0, NULL, 0},
	};
	struct trace_cut cuts[TRACE_MAX_CUTS];
	const char *out = NULL;
	bool queries = true;
	int c, split = -1;
	uint32_t n = 0;

	optind = 2;
	while ((c = getopt_long(argc, argv, "o:", options, NULL)) != -1) {
		if (c == 'a') {
			if (n == TRACE_MAX_CUTS || !parse_cut(optarg, &cuts[n++]))
				return bad_usage("--at", optarg);
		} else if (c == 's') {
			for (split = ARRAY_SIZE(splits) - 1; split >= 0; split--)
				if (strcmp(optarg, splits[split]) == 0)
					break;
			if (split < 0)
				return bad_usage("--split", optarg);
		} else if (c == 'n') {
			queries = false;
		} else if (c == 'o') {
			out = optarg;
		} else {
			return 2;
		}
	}
	if (argc - optind != 1)
		return bad_usage("FILE", argc > optind ? "more than one" : "missing");
	if (!out)
		return bad_usage("-o", "missing");
	return cut_file(argv[optind], out, cuts, n, split, queries);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*run)(int argc, char **argv);
	} commands[] = {{"info", info}, {"verify", verify}, {"cat", cat}, {"cut", cut}};

	if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
		fputs(usage, stdout);
		return 0;
	}
	if (argc > 1 && strcmp(argv[1], "--version") == 0) {
		puts("kvtier-trace " KVT_VERSION);
		return 0;
	}
	if (argc < 2) {
		fputs(usage, stderr);
		return 2;
	}
	for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
		if (strcmp(argv[1], commands[i].name) == 0)
			return commands[i].run(argc, argv);
	return bad_usage("command", argv[1]);
}
