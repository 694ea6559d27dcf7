/* SPDX-License-Identifier: MIT */
/* kvtier-weights: look into, verify and make .kvp weight files. */
#include "policy/learned.h"
#include "shm/util.h"

#include <getopt.h>
#include <stdio.h>

static const char usage[] =
	"Usage: kvtier-weights info FILE\n"
	"       kvtier-weights verify FILE\n"
	"       kvtier-weights random --layers L --heads H --dim D --model NAME -o FILE\n"
	"                             [--kind kvp|position|qfilter] [--v-dim D] [--seed S]\n"
	"                             [--net published|narrow] [--theta T]\n"
	"\n"
	"info    verify FILE and print its model, shape, network and sections\n"
	"verify  print nothing but what is wrong: the field, its value and the limit\n"
	"random  write a file of plausible random weights, for tests and demonstrations\n"
	"\n"
	"  --layers L    layers of the model\n"
	"  --heads H     KV heads per layer\n"
	"  --dim D       elements of a key row; kvp: a multiple of 16 up to 256\n"
	"  --v-dim D     elements of a value row (default: as --dim)\n"
	"  --model NAME  the name that the runtime registers the model under\n"
	"  --kind K      kvp (default), position, qfilter\n"
	"  --net N       kvp: published (default), or narrow: keys before RoPE, widths of 128,\n"
	"                scores of two coefficients that follow the distance to the end\n"
	"  --theta T     base of the model's RoPE, halves paired (default 10000; 0: no RoPE)\n"
	"  --seed S      same seed, same file (default 1)\n"
	"  -o FILE       written through a temporary file beside it\n"
	"\n"
	"Exit status: 0 done, 1 the file was refused or an operation failed, 2 wrong usage.\n";

static int bad_usage(const char *what, const char *value)
{
	fprintf(stderr, "kvtier-weights: %s: %s, see --help\n", what, value);
	return 2;
}

static const char *rope_name(uint32_t type)
{
	static const char *const names[] = {"none", "half", "pairs"};

	return names[type]; /* verified to be one of them */
}

static void print_info(const struct weights *w)
{
	const struct weights_header *h = &w->h;

	printf("model        %s\n", h->name);
	printf("kind         %s, format version %u\n", weights_kind_name(h->kind), h->version);
	printf("shape        %u layers x %u KV heads = %u lanes, k_dim %u, v_dim %u\n", h->layers, h->heads,
	       w->lanes, h->k_dim, h->v_dim);
	printf("rope         %s, theta %g, keys %s RoPE\n", rope_name(h->rope_type), (double)h->rope_theta,
	       h->keys == WEIGHTS_KEYS_CACHED ? "after" : "before");
	printf("network      proj %u, pos_rows %u, pos_dim %u, hidden %u, rank %u, %s\n", h->proj, h->pos_rows,
	       h->pos_dim, h->hidden, h->rank, w->layout.elem == 2 ? "bf16" : "f32");
	if (h->kind == WEIGHTS_KVP && h->pos_kind == WEIGHTS_POS_LOG2)
		printf("position     %u knots per octave\n", h->octave);
	else if (h->kind == WEIGHTS_KVP)
		printf("position     a table, blind from %u on\n", h->pos_rows);
	if (h->dist_rows)
		printf("distance     %u knots, %u per octave\n", h->dist_rows, h->octave);
	printf("parameters   %llu per lane, %llu bytes per lane in the file\n",
	       (unsigned long long)w->layout.params, (unsigned long long)h->lane_stride);
	for (uint32_t t = 0; t < w->layout.count; t++)
		printf("  %-10s %u x %u at %llu\n", w->layout.tensor[t].name, w->layout.tensor[t].rows,
		       w->layout.tensor[t].cols, (unsigned long long)w->layout.tensor[t].off);
	printf("calibration  %llu bytes at %llu\n", (unsigned long long)h->calib_size,
	       (unsigned long long)h->calib_off);
	printf("size         %llu bytes\n", (unsigned long long)h->total_size);
	printf("sha256       ");
	for (size_t i = 0; i < sizeof(h->digest); i++)
		printf("%02x", h->digest[i]);
	putchar('\n');
}

static int inspect(int argc, char **argv, bool info)
{
	struct calibration *calibration = NULL;
	struct policy_cfg cfg;
	struct weights *w;
	char err[512];
	int r;

	if (argc != 3)
		return bad_usage("FILE", argc < 3 ? "missing" : "more than one");
	r = weights_load(&w, argv[2], err, sizeof(err));
	if (r < 0) {
		fprintf(stderr, "kvtier-weights: %s\n", err);
		return 1;
	}
	cfg = (struct policy_cfg){.weights = argv[2]};
	r = weights_calibration(&calibration, w, &cfg, err, sizeof(err));
	if (r < 0)
		fprintf(stderr, "kvtier-weights: %s\n", err);
	else if (info)
		print_info(w);
	weights_calibration_free(calibration);
	weights_free(w);
	return r < 0;
}

static bool parse_u64(const char *s, uint64_t max, uint64_t *ret)
{
	char *end;

	errno = 0;
	*ret = strtoull(s, &end, 0);
	return !errno && end != s && !*end && *s != '-' && *ret <= max;
}

/* The tables that the trainer uses for position. */
static bool set_kind(struct weights_header *h, const char *name)
{
	for (uint32_t kind = WEIGHTS_KVP; weights_kind_name(kind); kind++)
		if (strcmp(name, weights_kind_name(kind)) == 0)
			h->kind = kind;
	if (h->kind == WEIGHTS_POSITION) {
		h->pos_kind = WEIGHTS_POS_LOG2;
		h->pos_rows = 80;
		h->pos_dim = 4;
	}
	return h->kind != 0;
}

static bool set_net(struct weights_header *h, const char *name)
{
	if (strcmp(name, "published") == 0) {
		h->proj = h->hidden = 256;
		h->pos_kind = WEIGHTS_POS_TABLE;
		h->pos_rows = 6000;
		h->pos_dim = 32;
		return true;
	}
	h->keys = WEIGHTS_KEYS_UNROTATED;
	h->proj = h->hidden = 128;
	h->pos_kind = WEIGHTS_POS_LOG2;
	h->octave = 2;
	h->pos_rows = h->dist_rows = 33;
	h->pos_dim = 16;
	h->rank = 2;
	return strcmp(name, "narrow") == 0;
}

static bool parse_theta(const char *s, struct weights_header *h)
{
	char *end;

	errno = 0;
	h->rope_theta = strtof(s, &end);
	h->rope_type = h->rope_theta > 0 ? WEIGHTS_ROPE_HALF : WEIGHTS_ROPE_NONE;
	return !errno && end != s && !*end && h->rope_theta >= 0;
}

static int write_random(const struct weights_header *h, uint64_t seed, const char *path)
{
	_cleanup_free_ uint8_t *image = NULL;
	char err[256] = "out of memory";
	int r;

	r = weights_image_new(&image, h, 0, err, sizeof(err));
	if (r < 0) {
		fprintf(stderr, "kvtier-weights: %s\n", err);
		return 1;
	}
	weights_image_random(image, seed);
	r = weights_image_seal(image, ((struct weights_header *)image)->total_size);
	if (r == 0)
		r = weights_image_write(image, path);
	if (r < 0)
		fprintf(stderr, "kvtier-weights: %s: %s\n", path, strerror(-r));
	return r < 0 ? 1 : 0;
}

static int make_random(int argc, char **argv)
{
	static const struct option options[] = {
		{"layers", required_argument, NULL, 'l'},
		{"heads", required_argument, NULL, 'h'},
		{"dim", required_argument, NULL, 'd'},
		{"v-dim", required_argument, NULL, 'v'},
		{"model", required_argument, NULL, 'm'},
		{"kind", required_argument, NULL, 'k'},
		{"net", required_argument, NULL, 'n'},
		{"theta", required_argument, NULL, 't'},
		{"seed", required_argument, NULL, 's'},
		{"output", required_argument, NULL, 'o'},
		{NULL, 0, NULL, 0},
	};
	struct weights_header h = {.rope_type = WEIGHTS_ROPE_HALF, .rope_theta = 10000.0f};
	uint64_t layers = 0, heads = 0, dim = 0, v_dim = 0, seed = 1;
	const char *path = NULL, *kind = "kvp", *net = "published";
	bool ok = true;
	int c;

	optind = 2;
	while ((c = getopt_long(argc, argv, "o:", options, NULL)) != -1 && ok) {
		if (c == 'l')
			ok = parse_u64(optarg, UINT32_MAX, &layers);
		else if (c == 'h')
			ok = parse_u64(optarg, UINT32_MAX, &heads);
		else if (c == 'd')
			ok = parse_u64(optarg, UINT32_MAX, &dim);
		else if (c == 'v')
			ok = parse_u64(optarg, UINT32_MAX, &v_dim);
		else if (c == 's')
			ok = parse_u64(optarg, UINT64_MAX, &seed);
		else if (c == 'm')
			snprintf(h.name, sizeof(h.name), "%.63s", strlen(optarg) < 64 ? optarg : "");
		else if (c == 'k')
			kind = optarg;
		else if (c == 'n')
			net = optarg;
		else if (c == 't')
			ok = parse_theta(optarg, &h);
		else if (c == 'o')
			path = optarg;
		else
			return 2;
		if (!ok)
			return bad_usage("not a number in range", optarg);
	}
	if (optind != argc)
		return bad_usage("unexpected argument", argv[optind]);
	if (!path)
		return bad_usage("-o", "missing");
	if (!set_kind(&h, kind))
		return bad_usage("--kind", kind);
	if (h.kind == WEIGHTS_KVP && !set_net(&h, net))
		return bad_usage("--net", net);
	h.layers = (uint32_t)layers;
	h.heads = (uint32_t)heads;
	h.k_dim = (uint32_t)dim;
	h.v_dim = (uint32_t)(v_dim ? v_dim : dim);
	return write_random(&h, seed, path);
}

int main(int argc, char **argv)
{
	if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
		fputs(usage, stdout);
		return 0;
	}
	if (argc > 1 && strcmp(argv[1], "--version") == 0) {
		puts("kvtier-weights " KVT_VERSION);
		return 0;
	}
	if (argc < 2)
		return bad_usage("command", "missing");
	if (strcmp(argv[1], "info") == 0 || strcmp(argv[1], "verify") == 0)
		return inspect(argc, argv, argv[1][0] == 'i');
	if (strcmp(argv[1], "random") == 0)
		return make_random(argc, argv);
	return bad_usage("command", argv[1]);
}
