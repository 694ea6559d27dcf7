/* SPDX-License-Identifier: MIT */
#include "policy/train/options.h"
#include "shm/util.h"

#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static const char usage[] =
	"Usage: kvtier-train --traces DIR --out FILE.kvp [OPTION...]\n"
	"       kvtier-train --traces DIR --calibrate-only FILE.kvp [--out FILE.kvp]\n"
	"       kvtier-train --traces DIR --calibrate-policy NAME --out FILE\n"
	"       kvtier-train --traces DIR --q-filter --out FILE.kvp\n"
	"\n"
	"Train one small network per KV head from recorded traces and write them as a weight file.\n"
	"\n"
	"What is trained:\n"
	"  --traces DIR           traces (*.kvtr) of splits train and valid (calib with --calibrate)\n"
	"  --out FILE             written through a temporary file beside it\n"
	"  --net NAME             narrow (default), published or position; single widths below\n"
	"  --proj N               width of the projections of key and value\n"
	"  --hidden N             width of the hidden layers\n"
	"  --rank N               coefficients per row: 1 or 2\n"
	"  --keys WHICH           cached (after RoPE) or unrotated (before it)\n"
	"  --position KIND        table (clamped at 6000) or log2\n"
	"  --distance yes|no      does the score depend on the distance to the end?\n"
	"  --lanes A-B            only these lanes (default: all of the model)\n"
	"  --base FILE            weight file that other lanes are taken from (default: zeros)\n"
	"\n"
	"What is learned:\n"
	"  --objective NAME       exact (default), rloo, rloo-batch or mse\n"
	"  --reward NAME          regret (default) or ratio\n"
	"  --weighting NAME       of budgets: uniform (default) or log\n"
	"  --utility NAME         max (default), mean or value (mean times what the value contributes)\n"
	"  --perms N              permutations per unit for rloo (default 4)\n"
	"\n"
	"How:\n"
	"  --preset published     the published settings: net, objective, reward and schedule\n"
	"  --steps N              default 3000\n"
	"  --batch N              units (cuts of documents) per step (default 32)\n"
	"  --rows N               most rows of a unit per step (default 1024; 256 on a CPU)\n"
	"  --doc-rows N           most rows kept of a document (default 2048; fewer if memory is short)\n"
	"  --limit N              most documents of a split\n"
	"  --lr X                 peak learning rate (default 1e-3; position 2e-2)\n"
	"  --lr-min X             at the end of the cosine (default 1e-5)\n"
	"  --warmup N             steps of linear warm-up (default 100)\n"
	"  --weight-decay X       of matrices (default 1e-3)\n"
	"  --clip X               gradient norm per lane (default 5; 0: none)\n"
	"  --ema X                decay of the parameters' average (default 0.995)\n"
	"  --ema-start N          first step of that average (default 100)\n"
	"  --validate N           steps between validations (default 100)\n"
	"  --seed N               same seed, same result on one device (default 1)\n"
	"  --device NAME          cpu, cuda or auto (default)\n"
	"  --threads N            default: one per CPU\n"
	"\n"
	"Interruptions and reports:\n"
	"  --checkpoint FILE      state of the run (default: OUT.part); removed when OUT is written\n"
	"  --every SECONDS        between checkpoints (default 60)\n"
	"  --resume auto|no       go on from the checkpoint when there is one (default auto)\n"
	"  --stop-after SECONDS   write a checkpoint so long after the start and exit with 75\n"
	"  --csv FILE             regret of every lane at every validation\n"
	"  --json                 summary as JSON on stdout\n"
	"  --quiet                no progress on stderr\n"
	"\n"
	"Calibration and q-filters:\n"
	"  --calibrate            fit scores to attention on split calib, put the table into OUT\n"
	"  --calibrate-only FILE  the same for an existing weight file\n"
	"  --calibrate-policy P   the same for a policy without weights, into a file of its own\n"
	"  --q-filter             no training: filters from the queries in the traces\n"
	"  --help                 this text\n"
	"  --version              print the version\n"
	"\n"
	"Exit status: 0 done, 1 something failed or was refused, 2 wrong usage, 75 stopped, a checkpoint was "
	"written.\n";

struct choice {
	const char *name;
	uint32_t value;
};

static const struct choice objectives[] = {
	{"exact", TRAIN_EXACT}, {"rloo", TRAIN_RLOO}, {"rloo-batch", TRAIN_RLOO_BATCH}, {"mse", TRAIN_MSE}, {0},
};
static const struct choice rewards[] = {{"regret", TRAIN_REGRET}, {"ratio", TRAIN_RATIO}, {0}};
static const struct choice weightings[] = {{"uniform", TRAIN_UNIFORM}, {"log", TRAIN_LOG_UNIFORM}, {0}};
static const struct choice utilities[] = {{"max", SET_MAX}, {"mean", SET_MEAN}, {"value", SET_VALUE}, {0}};
static const struct choice keys[] = {
	{"cached", WEIGHTS_KEYS_CACHED}, {"unrotated", WEIGHTS_KEYS_UNROTATED}, {0}};
static const struct choice positions[] = {{"table", WEIGHTS_POS_TABLE}, {"log2", WEIGHTS_POS_LOG2}, {0}};
static const struct choice yes_no[] = {{"no", 0}, {"yes", 1}, {0}};
static const struct choice resumes[] = {{"no", 0}, {"auto", 1}, {0}};
static const struct choice nets[] = {{"narrow", 0}, {"published", 1}, {"position", 2}, {0}};
static const struct choice presets[] = {{"published", 0}, {0}};

enum { TEXT, CHOICE, U32, U64, REAL, SECONDS, FLAG, SPECIAL };
enum {
	S_LANES = 1,
	S_NET,
	S_POSITION,
	S_DISTANCE,
	S_PRESET,
	S_ROWS,
	S_LR,
	S_CALIBRATE_ONLY,
	S_CALIBRATE_POLICY,
	S_QFILTER,
	S_PROBE,
	S_HELP,
	S_VERSION
};

struct option_spec {
	const char *name;
	int type;
	size_t off; /* in struct options; SPECIAL: S_... */
	const struct choice *choice;
	double min, max;
};

#define RUN(f) offsetof(struct options, run.f)

static const struct option_spec specs[] = {
	{"traces", TEXT, RUN(s.dir), NULL, 0, 0},
	{"out", TEXT, RUN(out), NULL, 0, 0},
	{"base", TEXT, RUN(base), NULL, 0, 0},
	{"csv", TEXT, RUN(csv), NULL, 0, 0},
	{"checkpoint", TEXT, RUN(checkpoint), NULL, 0, 0},
	{"device", TEXT, RUN(device), NULL, 0, 0},
	{"net", SPECIAL, S_NET, nets, 0, 0},
	{"preset", SPECIAL, S_PRESET, presets, 0, 0},
	{"lanes", SPECIAL, S_LANES, NULL, 0, 0},
	{"position", SPECIAL, S_POSITION, positions, 0, 0},
	{"distance", SPECIAL, S_DISTANCE, yes_no, 0, 0},
	{"rows", SPECIAL, S_ROWS, NULL, 0, 0},
	{"lr", SPECIAL, S_LR, NULL, 0, 0},
	{"proj", U32, RUN(t.shape.proj), NULL, 32, 256},
	{"hidden", U32, RUN(t.shape.hidden), NULL, 32, 512},
	{"rank", U32, RUN(t.shape.rank), NULL, 1, 2},
	{"keys", CHOICE, RUN(t.shape.keys), keys, 0, 0},
	{"objective", CHOICE, RUN(t.objective), objectives, 0, 0},
	{"reward", CHOICE, RUN(t.reward), rewards, 0, 0},
	{"weighting", CHOICE, RUN(t.weighting), weightings, 0, 0},
	{"utility", CHOICE, RUN(s.utility), utilities, 0, 0},
	{"perms", U32, RUN(t.perms), NULL, 2, TRAIN_MAX_PERMS},
	{"steps", U64, RUN(steps), NULL, 1, 1e7},
	{"batch", U32, RUN(t.batch), NULL, 1, 4096},
	{"doc-rows", U32, RUN(s.doc_rows), NULL, 64, TRACE_MAX_ROWS},
	{"limit", U32, RUN(s.limit), NULL, 1, 1e9},
	{"lr-min", REAL, RUN(lr_min), NULL, 0, 10},
	{"warmup", U64, RUN(warmup), NULL, 0, 1e7},
	{"weight-decay", REAL, RUN(t.weight_decay), NULL, 0, 10},
	{"clip", REAL, RUN(t.clip), NULL, 0, 1e9},
	{"ema", REAL, RUN(t.ema), NULL, 0, 0.999999},
	{"ema-start", U32, RUN(t.ema_start), NULL, 0, 1e7},
	{"validate", U64, RUN(validate), NULL, 1, 1e7},
	{"seed", U64, RUN(t.seed), NULL, 0, 1e18},
	{"threads", U32, RUN(t.threads), NULL, 1, 256},
	{"every", SECONDS, RUN(every), NULL, 0, 1e9},
	{"stop-after", SECONDS, RUN(stop_after), NULL, 0, 1e9},
	{"resume", CHOICE, RUN(resume), resumes, 0, 0},
	{"json", FLAG, RUN(json), NULL, 0, 0},
	{"quiet", FLAG, RUN(quiet), NULL, 0, 0},
	{"calibrate", FLAG, RUN(calibrate), NULL, 0, 0},
	{"calibrate-only", SPECIAL, S_CALIBRATE_ONLY, NULL, 0, 0},
	{"calibrate-policy", SPECIAL, S_CALIBRATE_POLICY, NULL, 0, 0},
	{"q-filter", SPECIAL, S_QFILTER, NULL, 0, 0},
	{"probe", SPECIAL, S_PROBE, NULL, 0, 0}, /* for tests: policy/train/probe.h */
	{"help", SPECIAL, S_HELP, NULL, 0, 0},
	{"version", SPECIAL, S_VERSION, NULL, 0, 0},
};

static int bad(const char *option, const char *value, const char *limit)
{
	fprintf(stderr, "kvtier-train: --%s: %s, must be %s\n", option, value, limit);
	return 2;
}

static int bad_choice(const char *option, const char *value, const struct choice *c)
{
	char all[128] = "";

	for (; c->name; c++) {
		if (*all)
			strncat(all, c[1].name ? ", " : " or ", sizeof(all) - strlen(all) - 1);
		strncat(all, c->name, sizeof(all) - strlen(all) - 1);
	}
	return bad(option, value, all);
}

static const struct choice *find_choice(const struct choice *c, const char *name)
{
	for (; c->name; c++)
		if (strcmp(c->name, name) == 0)
			return c;
	return NULL;
}

static int parse_number(const char *option, const char *s, double min, double max, bool whole, double *ret)
{
	char *end, limit[96];

	errno = 0;
	*ret = strtod(s, &end);
	if (!errno && end != s && !*end && *ret >= min && *ret <= max && (!whole || *ret == floor(*ret)))
		return 0;
	snprintf(limit, sizeof(limit), "a%s number from %.10g to %.10g", whole ? " whole" : "", min, max);
	return bad(option, s, limit);
}

static void set_net(struct weights_header *h, uint32_t net)
{
	h->kind = net == 2 ? WEIGHTS_POSITION : WEIGHTS_KVP;
	h->proj = h->hidden = net == 0 ? 128 : net == 1 ? 256 : 0;
	h->rank = net == 0 ? 2 : 1;
	h->keys = net == 0 ? WEIGHTS_KEYS_UNROTATED : WEIGHTS_KEYS_CACHED;
	h->pos_kind = net == 1 ? WEIGHTS_POS_TABLE : WEIGHTS_POS_LOG2;
	h->pos_rows = net == 0 ? 33 : net == 1 ? 6000 : 80;
	h->pos_dim = net == 0 ? 16 : net == 1 ? 32 : 4;
	h->dist_rows = net == 0 ? 33 : 0;
	h->octave = net == 0 ? 2 : 0;
}

static void set_position(struct weights_header *h, uint32_t kind)
{
	h->pos_kind = kind;
	h->pos_rows = kind == WEIGHTS_POS_TABLE ? 6000 : 33;
	if (kind == WEIGHTS_POS_LOG2)
		h->octave = 2;
}

static void set_distance(struct weights_header *h, bool yes)
{
	h->dist_rows = yes ? 33 : 0;
	if (yes)
		h->octave = 2;
}

/* The released configuration, but for the batch of 1,024 sequences, which --batch may ask for. */
static void set_published(struct options *o)
{
	struct run_opts *r = &o->run;

	set_net(&r->t.shape, 1);
	r->t.objective = TRAIN_RLOO_BATCH;
	r->t.reward = TRAIN_RATIO;
	r->t.weighting = TRAIN_UNIFORM;
	r->s.utility = SET_MAX;
	r->lr = 5e-5f;
	o->lr_given = true;
	r->lr_min = 1e-6f;
	r->warmup = 100;
	r->steps = 4000;
	r->t.weight_decay = 1e-3f;
	r->t.clip = 5;
	r->t.ema = 0.99f;
	r->t.ema_start = 100;
	r->validate = 200;
}

static int parse_lanes(struct options *o, const char *s)
{
	unsigned first, last;
	char end;

	if (sscanf(s, "%u-%u%c", &first, &last, &end) != 2) {
		if (sscanf(s, "%u%c", &first, &end) != 1)
			return bad("lanes", s, "A-B or A");
		last = first;
	}
	if (first > last || last >= 1u << 20)
		return bad("lanes", s, "A-B with A not above B");
	o->run.s.lane_first = first;
	o->lane_last = last;
	o->lanes_given = true;
	return 0;
}

static int special(struct options *o, const struct option_spec *s, const char *arg)
{
	const struct choice *c = s->choice ? find_choice(s->choice, arg) : NULL;
	struct weights_header *h = &o->run.t.shape;
	double x = 0;
	int r = 0;

	if (s->choice && !c)
		return bad_choice(s->name, arg, s->choice);
	switch (s->off) {
	case S_LANES:
		return parse_lanes(o, arg);
	case S_NET:
		set_net(h, c->value);
		break;
	case S_PRESET:
		set_published(o);
		break;
	case S_POSITION:
		set_position(h, c->value);
		break;
	case S_DISTANCE:
		set_distance(h, c->value);
		break;
	case S_ROWS:
		r = parse_number("rows", arg, 64, TRAIN_MAX_ROWS, true, &x);
		if (r == 0 && (uint32_t)x % 64)
			r = bad("rows", arg, "a multiple of 64");
		o->run.t.rows = (uint32_t)x;
		o->rows_given = true;
		break;
	case S_LR:
		r = parse_number("lr", arg, 0, 10, false, &x);
		o->run.lr = (float)x;
		o->lr_given = true;
		break;
	case S_CALIBRATE_ONLY:
		o->mode = MODE_CALIBRATE_FILE;
		o->subject = arg;
		break;
	case S_CALIBRATE_POLICY:
		o->mode = MODE_CALIBRATE_POLICY;
		o->subject = arg;
		break;
	case S_QFILTER:
		o->mode = MODE_QFILTER;
		break;
	case S_PROBE:
		o->mode = MODE_PROBE;
		o->subject = arg;
		break;
	case S_HELP:
		fputs(usage, stdout);
		o->mode = MODE_DONE;
		break;
	case S_VERSION:
		puts("kvtier-train " KVT_VERSION);
		o->mode = MODE_DONE;
		break;
	}
	return r;
}

static int take(struct options *o, const struct option_spec *s, const char *arg)
{
	void *at = (char *)o + s->off;
	const struct choice *c;
	double x = 0;
	int r;

	switch (s->type) {
	case TEXT:
		*(const char **)at = arg;
		return 0;
	case FLAG:
		*(bool *)at = true;
		return 0;
	case SPECIAL:
		return special(o, s, arg);
	case CHOICE:
		c = find_choice(s->choice, arg);
		if (!c)
			return bad_choice(s->name, arg, s->choice);
		if (s->choice == resumes)
			*(bool *)at = c->value;
		else
			*(uint32_t *)at = c->value; /* enums included */
		return 0;
	}
	r = parse_number(s->name, arg, s->min, s->max, s->type == U32 || s->type == U64, &x);
	if (r != 0)
		return r;
	if (s->type == U32)
		*(uint32_t *)at = (uint32_t)x;
	else if (s->type == U64)
		*(uint64_t *)at = (uint64_t)x;
	else if (s->type == REAL)
		*(float *)at = (float)x;
	else
		*(double *)at = x;
	return 0;
}

static void defaults(struct options *o)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	memset(o, 0, sizeof(*o));
	set_net(&o->run.t.shape, 0);
	o->run.device = "auto";
	o->run.steps = 3000;
	o->run.warmup = 100;
	o->run.validate = 100;
	o->run.lr_min = 1e-5f;
	o->run.every = 60;
	o->run.resume = true;
	o->run.s.doc_rows = 2048;
	o->run.s.utility = SET_MAX;
	o->run.t.batch = 32;
	o->run.t.perms = 4;
	o->run.t.beta1 = 0.9f;
	o->run.t.beta2 = 0.999f;
	o->run.t.eps = 1e-8f;
	o->run.t.weight_decay = 1e-3f;
	o->run.t.clip = 5;
	o->run.t.ema = 0.995f;
	o->run.t.ema_start = 100;
	o->run.t.seed = 1;
	o->run.t.threads = (uint32_t)MIN(MAX(cpus, 1), 256);
}

/* What single options left open. */
static int complete(struct options *o)
{
	struct run_opts *r = &o->run;

	if (!r->s.dir && o->mode != MODE_PROBE) {
		fprintf(stderr, "kvtier-train: --traces: missing, see --help\n");
		return 2;
	}
	if (!r->out && o->mode == MODE_CALIBRATE_FILE)
		r->out = o->subject;
	if (!r->out) {
		fprintf(stderr, "kvtier-train: --out: missing, see --help\n");
		return 2;
	}
	if (strcmp(r->device, "cpu") != 0 && strcmp(r->device, "cuda") != 0 && strcmp(r->device, "auto") != 0)
		return bad("device", r->device, "cpu, cuda or auto");
	if (!o->lr_given)
		r->lr = r->t.shape.kind == WEIGHTS_POSITION ? 2e-2f : 1e-3f;
	if (!r->checkpoint) {
		snprintf(o->checkpoint, sizeof(o->checkpoint), "%s.part", r->out);
		r->checkpoint = o->checkpoint;
	}
	r->s.seed = r->t.seed;
	r->s.threads = r->t.threads;
	return 0;
}

int options_parse(struct options *ret, int argc, char **argv)
{
	struct option list[ARRAY_SIZE(specs) + 1] = {{0}};
	int index, c, r = 0;

	defaults(ret);
	for (size_t i = 0; i < ARRAY_SIZE(specs); i++) {
		bool none = specs[i].type == FLAG ||
			    (specs[i].type == SPECIAL && (specs[i].off == S_QFILTER || specs[i].off >= S_HELP));

		list[i] = (struct option){specs[i].name, none ? no_argument : required_argument, NULL, 0};
	}
	while (r == 0 && ret->mode != MODE_DONE && (c = getopt_long(argc, argv, "", list, &index)) != -1)
		r = c == '?' ? 2 : take(ret, &specs[index], optarg);
	if (r != 0 || ret->mode == MODE_DONE)
		return r;
	if (optind < argc)
		return bad("traces", argv[optind], "given as an option, see --help");
	return complete(ret);
}
