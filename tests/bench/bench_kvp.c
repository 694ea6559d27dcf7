/* SPDX-License-Identifier: MIT */
/*
 * The whole of policy_kvp_ops.score on one core (element conversion,
 * LayerNorms, SiLU, position lookup, every linear) against OpenBLAS doing
 * nothing but the network's matrix products over as many rows.
 *
 * The rival runs as one thread and in its best of several row blocks. It reads
 * fp32 weights and rows that need no conversion. The AVX2 kernel meets
 * OpenBLAS's Haswell kernels, which are chosen when the library is loaded:
 * hence one process per comparison.
 *
 * Then the narrow network that is trained for SmolLM2-135M: the share of prefill
 * time that scoring all its lanes takes on the same core, prefill being nothing
 * but the model's matrix products in OpenBLAS (no attention, no output layer);
 * and what a grown sequence's scores cost when they are made from coefficients.
 */
#include "policy/learned.h"
#include "shm/util.h"

#include <cblas.h>
#include <math.h>
#include <stdio.h>
#include <sys/wait.h>

char *openblas_get_corename(void);

#define ROWS 4096u
#define ROUNDS 41
#define PROJ 256u
#define HIDDEN 256u
#define POS_DIM 32u
#define IN (2 * PROJ + POS_DIM)

struct contest {
	const char *isa, *label, *target, *rival;
	double floor;
};

/* Multiply-adds of a row; the last 256 of them, hidden -> 1, the rival is spared. */
static double macs(uint32_t dim)
{
	return 2.0 * dim * PROJ + (double)IN * HIDDEN + HIDDEN * HIDDEN + HIDDEN;
}

static float *random_floats(size_t n)
{
	float *p = aligned_alloc(64, ALIGN_UP(n * sizeof(float), (size_t)64));
	uint32_t x = 12345;

	if (!p)
		abort();
	for (size_t i = 0; i < n; i++) {
		x = x * 1664525 + 1013904223;
		p[i] = (float)(x >> 8) / (1 << 23) - 1.0f;
	}
	return p;
}

/* ---- ours ---- */

static struct weights_header published(uint32_t dim)
{
	return (struct weights_header){.name = "bench",
				       .layers = 1,
				       .heads = 1,
				       .k_dim = dim,
				       .v_dim = dim,
				       .kind = WEIGHTS_KVP,
				       .pos_kind = WEIGHTS_POS_TABLE,
				       .proj = PROJ,
				       .pos_rows = 6000,
				       .pos_dim = POS_DIM,
				       .hidden = HIDDEN};
}

static struct weights_header narrow(void)
{
	struct weights_header h = published(64);

	h.keys = WEIGHTS_KEYS_UNROTATED;
	h.rope_type = WEIGHTS_ROPE_HALF;
	h.rope_theta = 100000;
	h.proj = h.hidden = 128;
	h.pos_kind = WEIGHTS_POS_LOG2;
	h.pos_rows = h.dist_rows = 33;
	h.pos_dim = 16;
	h.octave = h.rank = 2;
	return h;
}

static struct policy *make_policy(struct weights_header h, const char *isa)
{
	char path[] = "/tmp/kvtier-bench.XXXXXX", err[256] = "";
	struct policy_cfg cfg = {.layers = 1,
				 .heads = 1,
				 .k_dim = h.k_dim,
				 .v_dim = h.v_dim,
				 .dtype = ROW_BF16,
				 .weights = path,
				 .isa = isa};
	_cleanup_free_ uint8_t *image = NULL;
	_cleanup_close_ int fd = mkstemp(path);
	struct policy *p = NULL;
	int r;

	if (fd < 0 || weights_image_new(&image, &h, 0, err, sizeof(err)) < 0)
		abort();
	weights_image_random(image, 1);
	weights_image_seal(image, ((struct weights_header *)image)->total_size);
	r = weights_image_write(image, path);
	if (r == 0)
		r = policy_kvp_ops.init(&p, &cfg, err, sizeof(err));
	unlink(path);
	if (r < 0)
		fprintf(stderr, "bench_kvp: %s: %s\n", isa, err);
	return p;
}

static double time_score(struct policy *p, const struct policy_batch *b, float *scores)
{
	uint64_t start = now_ns();

	if (p->ops->score(p, b, scores) < 0)
		abort();
	return (double)(now_ns() - start) / 1e9;
}

/* ---- the rival ---- */

struct gemms {
	float *k, *v, *wk, *wv, *x, *w1, *h1, *w2, *h2;
};

static void product(float *c, uint32_t c_ld, const float *a, const float *w, uint32_t n, uint32_t in,
		    uint32_t out)
{
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)n, (int)out, (int)in, 1.0f, a, (int)in, w,
		    (int)out, 0.0f, c, (int)c_ld);
}

/* Products write into a block's worth of activations only, which stay in cache when the block is small. */
static double time_gemms(const struct gemms *g, uint32_t dim, uint32_t block)
{
	uint64_t start = now_ns();

	for (uint32_t i = 0; i < ROWS; i += block) {
		product(g->x, IN, g->k + (size_t)i * dim, g->wk, block, dim, PROJ);
		product(g->x + PROJ, IN, g->v + (size_t)i * dim, g->wv, block, dim, PROJ);
		product(g->h1, HIDDEN, g->x, g->w1, block, IN, HIDDEN);
		product(g->h2, HIDDEN, g->h1, g->w2, block, HIDDEN, HIDDEN);
	}
	return (double)(now_ns() - start) / 1e9;
}

static uint32_t best_block(const struct gemms *g, uint32_t dim)
{
	static const uint32_t blocks[] = {64, 128, 256, 512, 1024, 4096};
	double best = INFINITY;
	uint32_t ret = 0;

	for (size_t i = 0; i < ARRAY_SIZE(blocks); i++) {
		double t = INFINITY;

		for (int round = 0; round < 4; round++)
			t = fmin(t, time_gemms(g, dim, blocks[i]));
		if (t < best) {
			best = t;
			ret = blocks[i];
		}
	}
	return ret;
}

/* ---- the contest ---- */

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(double *t)
{
	qsort(t, ROUNDS, sizeof(*t), by_value);
	return t[ROUNDS / 2];
}

static void run(const struct contest *c, uint32_t dim)
{
	struct gemms g = {random_floats((size_t)ROWS * dim),    random_floats((size_t)ROWS * dim),
			  random_floats((size_t)dim * PROJ),    random_floats((size_t)dim * PROJ),
			  random_floats((size_t)ROWS * IN),     random_floats((size_t)IN * HIDDEN),
			  random_floats((size_t)ROWS * HIDDEN), random_floats((size_t)HIDDEN * HIDDEN),
			  random_floats((size_t)ROWS * HIDDEN)};
	float *scores = random_floats(ROWS);
	uint16_t *rows = malloc((size_t)ROWS * dim * 4);
	struct policy_batch b = {.n = ROWS,
				 .k = rows,
				 .v = rows + (size_t)ROWS * dim,
				 .k_stride = dim * 2,
				 .v_stride = dim * 2,
				 .total = ROWS};
	struct policy *p = make_policy(published(dim), c->isa);
	double ours[ROUNDS], theirs[ROUNDS], gflop = 2 * macs(dim) * ROWS / 1e9, mine, rival;
	uint32_t block = best_block(&g, dim);

	if (!rows || !p)
		return;
	for (size_t i = 0; i < (size_t)ROWS * dim; i++) {
		rows[i] = float_bf16(g.k[i]);
		rows[(size_t)ROWS * dim + i] = float_bf16(g.v[i]);
	}
	time_score(p, &b, scores);
	for (int i = 0; i < ROUNDS; i++) {
		ours[i] = time_score(p, &b, scores);
		theirs[i] = time_gemms(&g, dim, block);
	}
	mine = median(ours);
	rival = median(theirs);
	fprintf(stderr, "bench_kvp: %s head_dim %u: OpenBLAS core %s, blocks of %u rows\n", c->isa, dim,
		openblas_get_corename(), block);
	printf("{\"name\":\"KVP scoring head_dim %u, %s\",\"value\":%.1f,\"unit\":\"GFLOP/s\","
	       "\"rival\":\"%s, products alone\",\"rival_value\":%.1f,\"ratio\":%.2f,\"target\":\">=%s\","
	       "\"pass\":%s,\"rows_per_s\":%.0f}\n",
	       dim, c->label, gflop / mine, c->rival, gflop / rival, rival / mine, c->target,
	       rival / mine >= c->floor ? "true" : "false", ROWS / mine);
	fflush(stdout);
	p->ops->free(p);
	free(rows);
	free(scores);
	free(g.k), free(g.v), free(g.wk), free(g.wv), free(g.x), free(g.w1), free(g.h1), free(g.w2), free(g.h2);
}

/* ---- SmolLM2 ---- */

#define LAYERS 30
#define LANES 90
#define TOKENS 512u
#define WIDTH 576u
#define KV_WIDTH 192u
#define FFN 1536u

struct model {
	float *x, *y, *wide,
		*w; /* w: large enough for any matrix; all layers share it, which is kind to the rival */
};

/* One layer's products over TOKENS tokens. */
static double time_layer(const struct model *m)
{
	uint64_t start = now_ns();

	product(m->y, WIDTH, m->x, m->w, TOKENS, WIDTH, WIDTH);
	product(m->y, KV_WIDTH, m->x, m->w, TOKENS, WIDTH, KV_WIDTH);
	product(m->y, KV_WIDTH, m->x, m->w, TOKENS, WIDTH, KV_WIDTH);
	product(m->x, WIDTH, m->y, m->w, TOKENS, WIDTH, WIDTH);
	product(m->wide, FFN, m->x, m->w, TOKENS, WIDTH, FFN);
	product(m->wide, FFN, m->x, m->w, TOKENS, WIDTH, FFN);
	product(m->y, WIDTH, m->wide, m->w, TOKENS, FFN, WIDTH);
	return (double)(now_ns() - start) / 1e9;
}

static double time_combine(struct policy *p, const struct policy_batch *b, float *const *coef, float *scores)
{
	uint64_t start = now_ns();

	if (p->ops->combine(p, b, (const float *const[]){coef[0], coef[1]}, scores) < 0)
		abort();
	return (double)(now_ns() - start) / 1e9;
}

static void run_narrow(const struct contest *c)
{
	struct model m = {random_floats(TOKENS * WIDTH), random_floats(TOKENS * WIDTH),
			  random_floats(TOKENS * FFN), random_floats(WIDTH * FFN)};
	struct policy *p = make_policy(narrow(), c->isa);
	float *scores = random_floats(ROWS), *coef[2] = {random_floats(ROWS), random_floats(ROWS)};
	float *values = random_floats((size_t)ROWS * 128);
	uint16_t *rows = malloc((size_t)ROWS * 128 * 2);
	struct policy_batch b = {
		.n = ROWS, .k = rows, .v = rows + 64, .k_stride = 256, .v_stride = 256, .total = ROWS};
	double score[ROUNDS], layer[ROUNDS], combine[ROUNDS], ours, theirs;

	if (!rows || !p)
		return;
	for (size_t i = 0; i < (size_t)ROWS * 128; i++)
		rows[i] = float_bf16(values[i]);
	time_score(p, &b, scores);
	time_layer(&m);
	p->ops->coefs(p, &b, coef);
	for (int i = 0; i < ROUNDS; i++) {
		score[i] = time_score(p, &b, scores);
		layer[i] = time_layer(&m);
		combine[i] = time_combine(p, &b, coef, scores);
	}
	ours = median(score) / ROWS;
	theirs = median(layer) * LAYERS / TOKENS;
	printf("{\"name\":\"KVP narrow, 90 lanes of SmolLM2, %s: share of "
	       "prefill\",\"value\":%.2f,\"unit\":\"%%\","
	       "\"rival\":\"prefill products alone, %s, us per token\",\"rival_value\":%.1f,\"ratio\":%.4f,"
	       "\"target\":\"<=5\",\"pass\":%s,\"us_per_token\":%.2f,\"rows_per_s\":%.0f}\n",
	       c->label, 100 * ours * LANES / theirs, c->rival, theirs * 1e6, ours * LANES / theirs,
	       ours * LANES / theirs <= 0.05 ? "true" : "false", ours * LANES * 1e6, 1 / ours);
	theirs = ours;
	ours = median(combine) / ROWS;
	printf("{\"name\":\"KVP combine, two coefficients, %s\",\"value\":%.2f,\"unit\":\"ns/row\","
	       "\"rival\":\"scoring the row again, "
	       "ns\",\"rival_value\":%.1f,\"ratio\":%.4f,\"target\":\"<=0.02\","
	       "\"pass\":%s}\n",
	       c->label, ours * 1e9, theirs * 1e9, ours / theirs, ours / theirs <= 0.02 ? "true" : "false");
	fflush(stdout);
	p->ops->free(p);
	free(rows);
	free(scores), free(values), free(coef[0]), free(coef[1]);
	free(m.x), free(m.y), free(m.wide), free(m.w);
}

/* Run ourselves again with the library's kernels chosen by `core` (NULL: by the library). */
static void spawn(char *self, char *isa, const char *core)
{
	char *argv[] = {self, isa, NULL};
	pid_t pid = fork();

	if (pid < 0)
		abort();
	if (pid == 0) {
		setenv("OPENBLAS_NUM_THREADS", "1", 1);
		if (core)
			setenv("OPENBLAS_CORETYPE", core, 1);
		execv("/proc/self/exe", argv);
		_exit(127);
	}
	waitpid(pid, NULL, 0);
}

int main(int argc, char **argv)
{
	static const struct contest contests[] = {
		{"avx512-bf16", "bf16 hardware", "1.5", "OpenBLAS sgemm", 1.5},
		{"avx2", "AVX2", "0.8", "OpenBLAS sgemm (Haswell kernels)", 0.8},
	};

	if (argc < 2) {
		spawn(argv[0], "avx512-bf16", NULL);
		spawn(argv[0], "avx2", "Haswell");
		return 0;
	}
	for (size_t i = 0; i < ARRAY_SIZE(contests); i++) {
		if (strcmp(argv[1], contests[i].isa) != 0)
			continue;
		run(&contests[i], 64);
		run(&contests[i], 128);
		run_narrow(&contests[i]);
	}
	return 0;
}
