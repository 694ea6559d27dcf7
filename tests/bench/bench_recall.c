/* SPDX-License-Identifier: MIT */
/*
 * Recall as a new turn meets it: before each of 30 layers attends, its queries go to the daemon and rows come
 * back into the region, 90 lanes of 4,096 rows of dim 64 of which a fifth stays on the device. What a turn adds
 * before its first token is the sum of its 30 calls, in the caller's time, and nothing is left out of it.
 * Questions of 2 and of 32 tokens; keys drift and return as a text's topics do, and each turn asks for
 * something else.
 *
 * The rival computes q.k for every demoted row with the same kernels, on one core, keys in one piece and in
 * its own cache, nothing copied: what exact search costs at least.
 *
 * How much is found: the attention mass, among demoted rows, of the rows recalled, against the best rows there
 * are, on clustered and on random keys.
 */
#include <math.h>
#include "policy/recall.h"
#include "policy/recall_kern.h"
#include "policy/train/set.h"
#include "tests/unit/core_harness.h"

#define LAYERS 30u
#define HEADS 3u
#define GROUP 3u
#define DIM 64u
#define ROWS 4096u
#define DEVICE 819u
#define WANT 64u
#define TOKENS 32u
#define TURNS 150u
#define ROUNDS 3u

static void die(const char *what)
{
	fprintf(stderr, "bench_recall: %s: %s\n", what, kvtier_last_error());
	exit(1);
}

static void must(int r, const char *what)
{
	if (r < 0)
		die(what);
}

static int by_double(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double quantile(double *v, unsigned n, double q)
{
	qsort(v, n, sizeof(*v), by_double);
	return v[MIN(n - 1, (unsigned)(q * n))];
}

static void report(const char *name, double value, const char *unit, const char *rival, double theirs,
		   const char *target, bool pass)
{
	printf("{\"name\":\"%s\",\"value\":%.4g,\"unit\":\"%s\",\"rival\":\"%s\",\"rival_value\":%.4g,"
	       "\"ratio\":%.4g,"
	       "\"target\":\"%s\",\"pass\":%s}\n",
	       name, value, unit, rival, theirs, theirs > 0 ? value / theirs : 0, target,
	       pass ? "true" : "false");
	fflush(stdout);
}

/* ---- keys and queries ------------------------------------------------------------------------- */

static uint64_t seed = 88172645463325252u;

static float normal(void)
{
	float s = -4;

	for (int i = 0; i < 2; i++) {
		seed ^= seed << 13;
		seed ^= seed >> 7;
		seed ^= seed << 17;
		for (int k = 0; k < 4; k++)
			s += (float)(seed >> (16 * k) & 0xffff) / 65536.0f;
	}
	return s * 1.2247f; /* unit variance */
}

/* One lane's keys: topics of 16 to 80 rows around a slowly moving mean, or just noise. */
static void make_keys(float *k, uint32_t rows, bool clustered)
{
	float mean[DIM], topic[DIM] = {0};
	uint32_t left = 0;

	for (uint32_t d = 0; d < DIM; d++)
		mean[d] = normal();
	for (uint32_t i = 0; i < rows; i++) {
		if (clustered && !left--) {
			left = 16 + (uint32_t)(seed >> 20) % 64;
			for (uint32_t d = 0; d < DIM; d++)
				topic[d] = normal() * 0.8f;
		}
		for (uint32_t d = 0; d < DIM; d++)
			k[i * DIM + d] = clustered ? mean[d] + topic[d] + 0.7f * normal() : normal();
	}
}

/* Queries that look for some rows of the lane: those rows' keys, blurred and longer. */
static void make_query(float *q, const float *k, uint32_t rows)
{
	const float *aim = k + (size_t)((seed >> 13) % rows) * DIM;

	for (uint32_t d = 0; d < DIM; d++)
		q[d] = 1.2f * aim[d] + 0.8f * normal();
}

/* ---- the figure ---------------------------------------------------------------------------------- */

struct setup {
	struct harness h;
	struct runtime rt;
	struct rt_seq q;
	uint64_t window;
	uint32_t elem;
	float *keys;    /* [LAYERS * HEADS][ROWS][DIM] */
	float *queries; /* [LAYERS][TOKENS][HEADS * GROUP][DIM] */
	float *exact;   /* demoted keys of one lane in one piece */
	float *out, *qt;
};

static void put_rows(struct setup *s, uint32_t lane)
{
	const float *k = s->keys + (size_t)lane * ROWS * DIM;

	for (uint32_t i = 0; i < ROWS; i++) {
		void *kr = rt_row(&s->q, lane, i, false), *vr = rt_row(&s->q, lane, i, true);

		for (uint32_t d = 0; d < DIM; d++) {
			uint16_t h = float_half(k[i * DIM + d]);

			memcpy((char *)kr + d * s->elem, s->elem == 2 ? (const void *)&h : &k[i * DIM + d],
			       s->elem);
			memcpy((char *)vr + d * s->elem, s->elem == 2 ? (const void *)&h : &k[i * DIM + d],
			       s->elem);
		}
		*rt_score(&s->q, lane, i) = (float)(rt_random(&s->q) % 10007);
	}
}

static void open_seq(struct setup *s)
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .device_rows = KVT_ROWS_ALL,
				  .dram_rows = KVT_ROWS_ALL,
				  .manual = 1,
				  .policy = "client"};
	struct rt_seq *q = &s->q;
	uint64_t bytes, scores = 0;

	*q = (struct rt_seq){.rt = &s->rt, .id = 1, .seed = 7, .cap = ROWS, .stage = 64, .max_rows = ROWS};
	q->lay = calloc(LAYERS, sizeof(*q->lay));
	q->salts = calloc(ROWS, sizeof(*q->salts));
	must(kvtier_layout_plain(s->rt.m, ROWS, 64, 0, 0, q->lay, &bytes), "layout");
	for (uint32_t i = 0; i < LAYERS; i++) {
		q->lay[i].score_off = bytes + scores;
		q->lay[i].score_head_stride = ROWS * sizeof(float);
		scores += HEADS * ROWS * sizeof(float);
	}
	s->window = bytes + scores;
	must(kvtier_region_create(s->rt.c, s->window + (uint64_t)LAYERS * 2 * HEADS * WANT * DIM * s->elem,
				  &q->r),
	     "region");
	must(rt_seq_open(q, KVT_EPHEMERAL, &b), "open");
}

static void begin(struct setup *s, uint32_t elem)
{
	struct kvtier_layer_desc d[LAYERS];
	struct kvtier_model_desc md = {.size = sizeof(md),
				       .name = "bench",
				       .layers = d,
				       .n_layers = LAYERS,
				       .dtype = elem == 2 ? KVT_DTYPE_F16 : KVT_DTYPE_F32,
				       .head_dim = DIM,
				       .world = 1};
	struct kvtier_open_opts o = {.size = sizeof(o), .timeout_ms = 10000};

	memset(s, 0, sizeof(*s));
	s->elem = elem;
	s->keys = malloc((size_t)LAYERS * HEADS * ROWS * DIM * sizeof(float));
	s->queries = malloc((size_t)LAYERS * TOKENS * HEADS * GROUP * DIM * sizeof(float));
	s->exact = malloc((size_t)ROWS * DIM * sizeof(float));
	s->out = malloc((size_t)ROWS * RECALL_LANES * sizeof(float));
	s->qt = calloc((size_t)DIM * RECALL_LANES, sizeof(float));
	if (!s->keys || !s->queries || !s->exact || !s->out || !s->qt)
		die("memory");
	harness_init(&s->h, false);
	s->h.cfg.dram_size = UINT64_C(1) << 30;
	s->h.cfg.dram_huge = true;
	o.socket = s->h.sock[0];
	if (!harness_start(&s->h))
		die("start");
	for (uint32_t i = 0; i < LAYERS; i++)
		d[i] = (struct kvtier_layer_desc){
			.kv_heads = HEADS, .k_bytes = DIM * elem, .v_bytes = DIM * elem};
	s->rt = (struct runtime){.layers = LAYERS,
				 .lanes = LAYERS * HEADS,
				 .heads = HEADS,
				 .k_bytes = DIM * elem,
				 .v_bytes = DIM * elem};
	must(kvtier_open(&o, &s->rt.c), "open");
	must(kvtier_model_register(s->rt.c, &md, &s->rt.m), "model");
	open_seq(s);
	for (uint32_t l = 0; l < LAYERS * HEADS; l++) {
		make_keys(s->keys + (size_t)l * ROWS * DIM, ROWS, true);
		put_rows(s, l);
	}
	must(kvtier_seq_append(s->q.s, KVT_ALL_LAYERS, 0, ROWS), "append");
	must(kvtier_seq_recall_prepare(s->q.s), "prepare");
	must(rt_plan(&s->q, DEVICE - WANT, KVT_ROWS_ALL, 0, NULL), "plan");
}

static void finish(struct setup *s)
{
	rt_seq_free(&s->q, true);
	rt_close(&s->rt);
	harness_stop(&s->h);
	harness_rm(s->h.dir);
	free(s->keys);
	free(s->queries);
	free(s->exact);
	free(s->out);
	free(s->qt);
}

static void ask_something(struct setup *s, uint32_t tokens)
{
	for (uint32_t l = 0; l < LAYERS; l++)
		for (uint32_t t = 0; t < tokens; t++)
			for (uint32_t a = 0; a < HEADS * GROUP; a++)
				make_query(s->queries + ((size_t)(l * TOKENS + t) * HEADS * GROUP + a) * DIM,
					   s->keys + (size_t)(l * HEADS + a / GROUP) * ROWS * DIM, ROWS);
}

/* Seconds that the 30 calls of one turn take. Between them a model would compute: its caches are not ours. */
static double turn(struct setup *s, uint32_t tokens, uint64_t *ret_daemon_ns)
{
	struct kvtier_recall_opts o = {.size = sizeof(o),
				       .group = GROUP,
				       .dtype = KVT_DTYPE_F32,
				       .rows = WANT,
				       .window_rows = WANT,
				       .k_head_stride = (uint64_t)WANT * DIM * s->elem,
				       .v_head_stride = (uint64_t)WANT * DIM * s->elem,
				       .k_row_stride = DIM * s->elem,
				       .v_row_stride = DIM * s->elem};
	uint32_t counts[HEADS], positions[HEADS * WANT];
	struct kvtier_recalled r = {.size = sizeof(r), .counts = counts, .positions = positions};
	uint64_t ns = 0;

	for (uint32_t l = 0; l < LAYERS; l++) {
		uint64_t start;

		o.k_off = s->window + (uint64_t)(2 * l) * HEADS * WANT * DIM * s->elem;
		o.v_off = s->window + (uint64_t)(2 * l + 1) * HEADS * WANT * DIM * s->elem;
		start = now_ns();
		if (kvtier_seq_recall(s->q.s, l, s->queries + (size_t)l * TOKENS * HEADS * GROUP * DIM, tokens,
				      &o, &r) != WANT)
			die("recall");
		ns += now_ns() - start;
		*ret_daemon_ns += r.daemon_ns;
		usleep(300); /* both sides sleep, as they do while the layer computes */
	}
	return (double)ns / 1e9;
}

/* Exact q.k of every demoted row for the queries that recall would use, keys as floats and warm. */
static double exact(struct setup *s, uint32_t queries)
{
	uint32_t n = ROWS - DEVICE + WANT;
	const struct recall_kern *kern = recall_kern(NULL);
	uint64_t start = now_ns();

	for (uint32_t l = 0; l < LAYERS * HEADS; l++)
		for (uint32_t b = 0; b < DIV_UP(queries, RECALL_LANES); b++)
			kern->logits(s->keys + (size_t)l * ROWS * DIM, DIM, n, s->qt, s->out);
	return (double)(now_ns() - start) / 1e9;
}

static void figure(uint32_t elem)
{
	static const uint32_t questions[] = {2, TOKENS};
	static struct setup s;
	double t[TURNS], theirs[TURNS];

	begin(&s, elem);
	for (size_t i = 0; i < ARRAY_SIZE(questions); i++) {
		uint64_t daemon = 0;
		double p50, p99, rival;
		char name[96];

		for (uint32_t k = 0; k < TURNS; k++) {
			ask_something(&s, questions[i]);
			t[k] = turn(&s, questions[i], &daemon);
			theirs[k] = exact(&s, GROUP * MIN(questions[i], RECALL_TOKENS));
		}
		p99 = quantile(t, TURNS, 0.99);
		p50 = quantile(t, TURNS, 0.5);
		rival = quantile(theirs, TURNS, 0.5);
		fprintf(stderr,
			"# fp%u, %u tokens: p50 %.2f ms, p99 %.2f ms, in the daemon %.2f ms a turn; exact "
			"%.2f\n",
			elem * 8, questions[i], p50 * 1e3, p99 * 1e3, (double)daemon / TURNS / 1e6,
			rival * 1e3);
		snprintf(name, sizeof(name), "recall, 30 calls, 90 x 4096 rows fp%u, question of %u, p99",
			 elem * 8, questions[i]);
		report(name, p99 * 1e3, "ms", "exact q.k on one core, keys warm, nothing copied", rival * 1e3,
		       "<=15", p99 <= 0.015);
		snprintf(name, sizeof(name), "recall, 30 calls, 90 x 4096 rows fp%u, question of %u, p50",
			 elem * 8, questions[i]);
		report(name, p50 * 1e3, "ms", "exact q.k on one core, keys warm, nothing copied", rival * 1e3,
		       "<=15", p50 <= 0.015);
	}
	finish(&s);
}

/* ---- how much is found --------------------------------------------------------------------------- */

/* Attention mass of the rows found, over that of the `WANT` rows with most of it; mean over lanes. */
static void found(bool clustered)
{
	const uint32_t lanes = 40, runs = ROWS / RECALL_RUN, n = GROUP * RECALL_TOKENS;
	float *k = malloc((size_t)ROWS * DIM * sizeof(float)), *q = malloc(n * DIM * sizeof(float));
	double *mass = malloc(ROWS * sizeof(double)), sum = 0, hits = 0;
	struct recall_run run[ROWS / RECALL_RUN];
	struct recall_hit hit[WANT];
	char name[96];

	for (uint32_t l = 0; l < lanes; l++) {
		struct recall_query rq = {.n = n,
					  .dim = DIM,
					  .scale = 0.125f,
					  .dtype = ROW_F32,
					  .norm = RECALL_MASS,
					  .probe = RECALL_PROBE,
					  .want = WANT,
					  .q = q};
		struct recall_seen seen;
		uint64_t all[RECALL_RUN / 64] = {UINT64_MAX, UINT64_MAX};
		void *scratch;
		double got = 0, best = 0;

		make_keys(k, ROWS, clustered);
		for (uint32_t j = 0; j < n; j++)
			make_query(q + j * DIM, k, ROWS);
		for (uint32_t r = 0; r < runs; r++) {
			struct recall_sum *s = malloc(recall_sum_bytes(RECALL_RUN, DIM));

			recall_summarise(k + (size_t)r * RECALL_RUN * DIM, RECALL_RUN, DIM, ROW_F32, s);
			run[r] = (struct recall_run){.k = k + (size_t)r * RECALL_RUN * DIM,
						     .sum = s,
						     .pos = all,
						     .first = r * RECALL_RUN,
						     .span = ARRAY_SIZE(all),
						     .rows = RECALL_RUN};
			memset(run[r].alive, 0xff, sizeof(run[r].alive));
		}
		scratch = malloc(recall_scratch(&rq, run, runs));
		memset(mass, 0, ROWS * sizeof(*mass));
		for (uint32_t j = 0; j < n; j++) {
			double total = 0, *e = malloc(ROWS * sizeof(double));

			for (uint32_t i = 0; i < ROWS; i++) {
				double dot = 0;

				for (uint32_t d = 0; d < DIM; d++)
					dot += (double)q[j * DIM + d] * k[(size_t)i * DIM + d];
				total += e[i] = exp(dot * 0.125);
			}
			for (uint32_t i = 0; i < ROWS; i++)
				mass[i] = fmax(mass[i], e[i] / total);
			free(e);
		}
		for (int i = recall_search(&rq, run, runs, scratch, hit, &seen); i-- > 0;)
			got += mass[hit[i].run * RECALL_RUN + hit[i].row];
		qsort(mass, ROWS, sizeof(*mass), by_double);
		for (uint32_t i = ROWS - WANT; i < ROWS; i++)
			best += mass[i];
		sum += got / best;
		hits++;
		for (uint32_t r = 0; r < runs; r++)
			free((void *)run[r].sum);
		free(scratch);
	}
	snprintf(name, sizeof(name), "recall@%u of attention mass, a quarter probed, %s keys", WANT,
		 clustered ? "clustered" : "random");
	report(name, sum / hits, "share", "exact search", 1, "none: to be reported", true);
	free(k);
	free(q);
	free(mass);
}

int main(int argc, char **argv)
{
	const char *only = argc > 1 ? argv[1] : "";

	if (!*only || strstr(only, "fp16"))
		figure(2);
	if (!*only || strstr(only, "fp32"))
		figure(4);
	if (!*only || strstr(only, "found")) {
		found(true);
		found(false);
	}
	return 0;
}
