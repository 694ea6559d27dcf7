/* SPDX-License-Identifier: MIT */
/*
 * Time of the scoring kernel: rows of all lanes of a model in one launch, from GPU memory (several times the
 * size of L2) to float32 in GPU memory or in registered host memory. Median of rounds, by events. JSON lines.
 *
 *    bench_score           every figure
 *    bench_score --only N  the milliseconds of figure N, a number alone (tests/gpu/bench_score.py)
 */
#include "tests/gpu/scoring.h"

#define ROUNDS 25

struct figure {
	const char *name;
	struct net net;
	enum row_dtype dtype;
	uint32_t pos, n;
	bool to_host;
	double target_ms; /* 0: none */
};

static const struct figure figures[] = {
	{.name = "10,000 rows x 112 lanes, d 128, published network",
	 .net = {.dim = 128, .proj = 256, .hidden = 256, .layers = 28, .heads = 4, .rope = 1},
	 .dtype = ROW_BF16,
	 .n = 10000,
	 .target_ms = 2},
	{.name = "the same, scores to host memory",
	 .net = {.dim = 128, .proj = 256, .hidden = 256, .layers = 28, .heads = 4, .rope = 1},
	 .dtype = ROW_BF16,
	 .n = 10000,
	 .to_host = true,
	 .target_ms = 2},
	{.name = "256 new rows x 112 lanes, d 128, published network, scores to host memory",
	 .net = {.dim = 128, .proj = 256, .hidden = 256, .layers = 28, .heads = 4, .rope = 1},
	 .dtype = ROW_BF16,
	 .pos = 32000,
	 .n = 256,
	 .to_host = true},
	{.name = "10,000 rows x 90 lanes, d 64, narrow network, fp16, keys before RoPE",
	 .net = {.dim = 64, .proj = 128, .hidden = 128, .layers = 30, .heads = 3, .rope = 1, .trained = true},
	 .dtype = ROW_F16,
	 .n = 10000},
};

static int by_value(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return (x > y) - (x < y);
}

/* Random rows: a block of them made here, copied over and over. */
static uint64_t random_rows(struct gpu *u, size_t bytes, enum row_dtype dtype, float scale)
{
	const size_t some = 16 << 20;
	uint16_t *x = need(some / 2, 2);
	uint64_t mem = gpu_alloc(u, bytes), seed = random_state;

	for (size_t i = 0; i < some / 2; i++)
		x[i] = row_value(&seed, dtype, scale);
	for (size_t at = 0; at < bytes; at += some)
		gpu_put(u, mem + at, x, MIN(some, bytes - at));
	free(x);
	return mem;
}

static double measure(struct gpu *u, const struct figure *f, struct net *n)
{
	const uint32_t lanes = net_lanes(n), row = n->dim * 2, coefs = n->s->coefs;
	const size_t bytes = (size_t)lanes * f->n * row, floats = (size_t)lanes * coefs * f->n;
	uint64_t k = random_rows(u, bytes, f->dtype, 3), v = random_rows(u, bytes, f->dtype, 0.5f), d_lane, out;
	struct cuda_lane *lane = need(lanes, sizeof(*lane));
	struct window_mem window = {0};
	float ms[ROUNDS];
	void *from, *to;

	for (uint32_t l = 0; l < lanes; l++)
		lane[l] = (struct cuda_lane){
			k + (uint64_t)l * f->n * row, v + (uint64_t)l * f->n * row, row, row, row, row};
	d_lane = gpu_new(u, lane, lanes * sizeof(*lane));
	if (f->to_host)
		window = window_new(u, floats * 4);
	out = f->to_host ? window.addr : gpu_alloc(u, floats * 4);
	MUST(u, u->d->event_create(&from, 0));
	MUST(u, u->d->event_create(&to, 0));
	for (int i = -3; i < ROUNDS; i++) {
		struct score_args a = {.scorer = n->gpu,
				       .rows = d_lane,
				       .out = out,
				       .out_lane = (uint64_t)coefs * f->n,
				       .out_coef = f->n,
				       .lanes = lanes,
				       .pos = f->pos,
				       .n = f->n,
				       .dtype = f->dtype,
				       .out_pos0 = f->pos};

		MUST(u, u->d->event_record(from, u->stream));
		MUST(u, kern_score(u->g, n->s, &a, u->stream));
		MUST(u, u->d->event_record(to, u->stream));
		MUST(u, u->d->event_sync(to));
		if (i >= 0)
			MUST(u, u->d->event_elapsed(&ms[i], from, to));
	}
	qsort(ms, ROUNDS, sizeof(*ms), by_value);
	MUST(u, u->d->event_destroy(from));
	MUST(u, u->d->event_destroy(to));
	gpu_free(u, k);
	gpu_free(u, v);
	gpu_free(u, d_lane);
	if (f->to_host)
		window_free(u, &window);
	else
		gpu_free(u, out);
	free(lane);
	return ms[ROUNDS / 2];
}

static void print(const struct figure *f, double ms)
{
	const struct net *n = &f->net;
	double flop = 2.0 * (2.0 * n->dim * n->proj + (2.0 * n->proj + (n->trained ? 16 : 32)) * n->hidden +
			     (double)n->hidden * n->hidden + (n->trained ? 2 : 1) * n->hidden),
	       rate = flop * f->n * net_lanes(n) / ms * 1e-9;

	printf("{\"name\":\"scores, %s (%.0f TFLOP/s as published)\",\"value\":%.4g,\"unit\":\"ms\",", f->name,
	       rate, ms);
	if (f->target_ms > 0)
		printf("\"rival\":\"the "
		       "target\",\"rival_value\":%g,\"ratio\":%.3f,\"target\":\"<=1\",\"pass\":%s}\n",
		       f->target_ms, ms / f->target_ms, ms <= f->target_ms ? "true" : "false");
	else
		printf("\"rival\":\"none\",\"rival_value\":null,\"ratio\":null,\"target\":\"-\",\"pass\":true}"
		       "\n");
	fflush(stdout);
}

int main(int argc, char **argv)
{
	const size_t only = argc > 2 && strcmp(argv[1], "--only") == 0 ? strtoul(argv[2], NULL, 10) : SIZE_MAX;
	struct net net = {0};
	struct gpu u;

	random_state = 11;
	gpu_open(&u);
	for (size_t i = 0; i < ARRAY_SIZE(figures); i++) {
		const struct figure *f = &figures[i];
		double ms;

		if (only != SIZE_MAX && only != i)
			continue;
		if (!net.w || net.dim != f->net.dim) { /* consecutive figures share a network */
			if (net.w)
				net_free(&u, &net);
			net = f->net;
			net_new(&u, &net);
		}
		ms = measure(&u, f, &net);
		if (only == SIZE_MAX)
			print(f, ms);
		else
			printf("%.5f\n", ms);
	}
	net_free(&u, &net);
	gpu_close(&u);
	return 0;
}
