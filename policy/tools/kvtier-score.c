/* SPDX-License-Identifier: MIT */
/* kvtier-score: run a weight file over raw rows on stdin; what proofs against other frameworks are made with.
 */
#include "policy/kvp.h"
#include "shm/util.h"

#include <getopt.h>
#include <stdio.h>

static const char usage[] =
	"Usage: kvtier-score --weights FILE --dtype f32|f16|bf16 [--lane L] [--isa X]\n"
	"                    [--dim D] [--first-pos P] [--total N] < rows > scores\n"
	"\n"
	"Scores the rows on standard input with the policy that FILE is for. A row is\n"
	"the key's elements and then the value's, little-endian, in the given type.\n"
	"Prints one little-endian float32 per row.\n"
	"\n"
	"  --weights FILE  a .kvp file of any kind\n"
	"  --dtype T       type of the elements on standard input\n"
	"  --dim D         refuse a file whose key rows have not D elements\n"
	"  --lane L        layer * KV heads + head (default 0)\n"
	"  --isa X         ref, avx2, avx512, avx512-fp32, avx512-bf16 (default: the fastest)\n"
	"  --first-pos P   position of the first row; the others follow (default 0)\n"
	"  --total N       rows of the whole sequence (default: P + rows given)\n"
	"\n"
	"Exit status: 0 done, 1 input refused or an operation failed, 2 wrong usage,\n"
	"3 this CPU does not have the --isa asked for.\n";

struct args {
	const char *weights, *isa;
	enum row_dtype dtype;
	uint64_t dim, lane, first_pos, total;
};

static int complain(int status, const char *what, const char *value)
{
	fprintf(stderr, "kvtier-score: %s: %s%s\n", what, value, status == 2 ? ", see --help" : "");
	return status;
}

static bool parse_u32(const char *s, uint64_t *ret)
{
	char *end;

	errno = 0;
	*ret = strtoull(s, &end, 0);
	return !errno && end != s && !*end && *s != '-' && *ret <= UINT32_MAX;
}

static bool parse_dtype(const char *s, enum row_dtype *ret)
{
	static const char *const names[] = {[ROW_F32] = "f32", [ROW_F16] = "f16", [ROW_BF16] = "bf16"};

	for (int i = ROW_F32; i <= ROW_BF16; i++) {
		if (strcmp(s, names[i]) != 0)
			continue;
		*ret = (enum row_dtype)i;
		return true;
	}
	return false;
}

/* 0, or the exit status. */
static int parse_args(struct args *a, int argc, char **argv)
{
	static const struct option options[] = {
		{"weights", required_argument, NULL, 'w'}, {"dtype", required_argument, NULL, 't'},
		{"dim", required_argument, NULL, 'd'},     {"lane", required_argument, NULL, 'l'},
		{"isa", required_argument, NULL, 'i'},     {"first-pos", required_argument, NULL, 'p'},
		{"total", required_argument, NULL, 'n'},   {NULL, 0, NULL, 0},
	};
	bool ok = true;
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 'w')
			a->weights = optarg;
		else if (c == 'i')
			a->isa = optarg;
		else if (c == 't')
			ok = parse_dtype(optarg, &a->dtype);
		else if (c == 'd')
			ok = parse_u32(optarg, &a->dim);
		else if (c == 'l')
			ok = parse_u32(optarg, &a->lane);
		else if (c == 'p')
			ok = parse_u32(optarg, &a->first_pos);
		else if (c == 'n')
			ok = parse_u32(optarg, &a->total);
		else
			return 2;
		if (!ok)
			return complain(2, "not a value for this option", optarg);
	}
	if (optind != argc)
		return complain(2, "unexpected argument", argv[optind]);
	if (!a->weights)
		return complain(2, "--weights", "missing");
	if (!a->dtype)
		return complain(2, "--dtype", "missing");
	return 0;
}

/* All of standard input; NULL on error. */
static char *read_stdin(size_t *ret_size)
{
	size_t size = 0, room = 1 << 20;
	char *buf = malloc(room), *more;

	while (buf) {
		size += fread(buf + size, 1, room - size, stdin);
		if (size < room)
			break;
		more = realloc(buf, room *= 2);
		if (!more)
			free(buf);
		buf = more;
	}
	*ret_size = size;
	if (buf && ferror(stdin)) {
		free(buf);
		return NULL;
	}
	return buf;
}

static int score_rows(struct policy *p, const struct args *a, uint32_t k_dim, uint32_t v_dim)
{
	size_t esize = dtype_bytes(a->dtype), row = (k_dim + v_dim) * esize, size;
	_cleanup_free_ char *rows = read_stdin(&size);
	_cleanup_free_ float *scores = NULL;
	struct policy_batch b;

	if (!rows)
		return complain(1, "standard input", strerror(errno));
	if (row == 0 || size % row != 0 || size / row > UINT32_MAX - a->first_pos)
		return complain(1, "standard input", "not a whole number of rows, see --help");
	b = (struct policy_batch){
		.lane = (uint32_t)a->lane,
		.n = (uint32_t)(size / row),
		.k = rows,
		.v = rows + k_dim * esize,
		.k_stride = row,
		.v_stride = row,
		.first_pos = (uint32_t)a->first_pos,
		.total = (uint32_t)(a->total ? a->total : a->first_pos + size / row),
	};
	scores = malloc((b.n + 1ul) * sizeof(*scores));
	if (!scores || p->ops->score(p, &b, scores) < 0)
		return complain(1, "scoring", "out of memory");
	if (fwrite(scores, sizeof(*scores), b.n, stdout) != b.n || fflush(stdout) != 0)
		return complain(1, "standard output", strerror(errno));
	return 0;
}

/* The file says what it is for; the policy then loads it as the daemon would. */
static int run(const struct args *a)
{
	const struct kvp_isa *isa;
	const struct policy_ops *ops;
	struct weights_header h;
	struct policy_cfg cfg;
	struct weights *w;
	struct policy *p;
	char err[512] = "";
	int r;

	if (weights_load(&w, a->weights, err, sizeof(err)) < 0)
		return complain(1, "weights", err);
	h = w->h;
	weights_free(w);
	if (a->dim && a->dim != h.k_dim) {
		fprintf(stderr, "kvtier-score: %s: k_dim: %u, must be --dim %llu\n", a->weights, h.k_dim,
			(unsigned long long)a->dim);
		return 1;
	}
	if (a->lane >= (uint64_t)h.layers * h.heads) {
		fprintf(stderr, "kvtier-score: --lane: %llu, must be below %u\n", (unsigned long long)a->lane,
			h.layers * h.heads);
		return 1;
	}
	r = kvp_isa_find(&isa, a->isa, err, sizeof(err));
	if (r < 0)
		return complain(r == -ENOTSUP ? 3 : 2, "--isa", err);
	ops = policy_for_kind(h.kind);
	cfg = (struct policy_cfg){.layers = h.layers,
				  .heads = h.heads,
				  .k_dim = h.k_dim,
				  .v_dim = h.v_dim,
				  .dtype = a->dtype,
				  .weights = a->weights,
				  .isa = a->isa};
	if (ops->init(&p, &cfg, err, sizeof(err)) < 0)
		return complain(1, ops->name, err);
	r = score_rows(p, a, h.k_dim, h.v_dim);
	ops->free(p);
	return r;
}

int main(int argc, char **argv)
{
	struct args a = {0};
	int r;

	if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
		fputs(usage, stdout);
		return 0;
	}
	r = parse_args(&a, argc, argv);
	return r ? r : run(&a);
}
