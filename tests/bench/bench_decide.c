/* SPDX-License-Identifier: MIT */
/*
 * Deciding: scores given, 90 lanes x 4,096 rows to a finished plan, against
 * sorting the same arrays with qsort(). Then rows per second of each heuristic.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "policy/decide.h"
#include "policy/policy.h"
#include "shm/bits.h"
#include "shm/util.h"

enum { LANES = 90, ROWS = 4096, WORDS = ROWS / 64, DIM = 64, ROUNDS = 21 };

static int by_value(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return (x > y) - (x < y);
}

static int by_time(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static double median_ms(uint64_t *t, int n)
{
	qsort(t, (size_t)n, sizeof(*t), by_time);
	return (double)t[n / 2] / 1e6;
}

static void *must(size_t bytes)
{
	void *p = aligned_alloc(64, ALIGN_UP(bytes, 64));

	if (!p)
		abort();
	memset(p, 0, bytes);
	return p;
}

/* Sum of four uniforms, roughly normal, as learned scores are. */
static float normal_ish(uint64_t *state)
{
	float s = -2;

	for (int i = 0; i < 4; i++) {
		*state = *state * 6364136223846793005u + 1442695040888963407u;
		s += (float)(*state >> 40) * 0x1p-24f;
	}
	return s;
}

struct scene {
	struct decide_in in;
	struct decide_out out;
	float *scores, *sorted;
	uint16_t *keys;
};

/* device, dram and nvme hold a quarter each; the sequence has a tail of new rows, the rest was demoted before.
 */
static void scene_init(struct scene *s)
{
	uint64_t state = 1, *maps = must(sizeof(uint64_t) * LANES * WORDS * 9);
	uint32_t *budget = must(sizeof(uint32_t) * LANES * 7);

	*s = (struct scene){.scores = must(sizeof(float) * LANES * ROWS),
			    .sorted = must(sizeof(float) * LANES * ROWS)};
	s->keys = must(sizeof(uint16_t) * LANES * ROWS);
	for (size_t i = 0; i < (size_t)LANES * ROWS; i++)
		s->scores[i] = normal_ish(&state);
	for (size_t i = 0; i < (size_t)LANES * 3; i++)
		budget[i] = ROWS / 4;
	memset(maps, 0xff, sizeof(uint64_t) * LANES * WORDS);
	s->in = (struct decide_in){.lanes = LANES,
				   .watermark = ROWS,
				   .words = WORDS,
				   .score_stride = ROWS,
				   .protect_first = 4,
				   .protect_last = 16,
				   .hysteresis_permille = 50,
				   .scores = s->keys,
				   .on_device = maps,
				   .on_dram = maps + LANES * WORDS,
				   .on_nvme = maps + 2 * LANES * WORDS,
				   .budget = {budget, budget + LANES, budget + 2 * LANES}};
	s->out = (struct decide_out){.words = WORDS,
				     .resident = maps + 3 * LANES * WORDS,
				     .copy_out = maps + 4 * LANES * WORDS,
				     .bring_in = maps + 5 * LANES * WORDS,
				     .to_dram = maps + 6 * LANES * WORDS,
				     .to_nvme = maps + 7 * LANES * WORDS,
				     .drop = maps + 8 * LANES * WORDS,
				     .kept = budget + 3 * LANES,
				     .out = budget + 4 * LANES,
				     .in = budget + 5 * LANES,
				     .dropped = budget + 6 * LANES};
}

static void decide_once(struct scene *s)
{
	score_keys(s->scores, s->keys, (size_t)LANES * ROWS);
	if (policy_decide(&s->in, &s->out) < 0)
		abort();
}

/* A plan is in force: what it said is where the rows are, and the last 64 rows are new. */
static void settle(struct scene *s)
{
	uint64_t *dev = (uint64_t *)s->in.on_device, *dram = (uint64_t *)s->in.on_dram,
		 *nvme = (uint64_t *)s->in.on_nvme;

	decide_once(s);
	memcpy(dev, s->out.resident, sizeof(uint64_t) * LANES * WORDS);
	memcpy(dram, s->out.to_dram, sizeof(uint64_t) * LANES * WORDS);
	memcpy(nvme, s->out.to_nvme, sizeof(uint64_t) * LANES * WORDS);
	for (int l = 0; l < LANES; l++) {
		dev[(l + 1) * WORDS - 1] = ~UINT64_C(0);
		dram[(l + 1) * WORDS - 1] = nvme[(l + 1) * WORDS - 1] = 0;
	}
}

static void bench_decide(struct scene *s, const char *name)
{
	uint64_t ours[ROUNDS], theirs[ROUNDS], t;
	double a, b;

	for (int r = 0; r < ROUNDS; r++) {
		t = now_ns();
		decide_once(s);
		ours[r] = now_ns() - t;
		memcpy(s->sorted, s->scores, sizeof(float) * LANES * ROWS);
		t = now_ns();
		for (int l = 0; l < LANES; l++)
			qsort(s->sorted + l * ROWS, ROWS, sizeof(float), by_value);
		theirs[r] = now_ns() - t;
	}
	a = median_ms(ours, ROUNDS);
	b = median_ms(theirs, ROUNDS);
	printf("{\"name\":\"%s\",\"value\":%.3f,\"unit\":\"ms\",\"rival\":\"qsort of the same float arrays\","
	       "\"rival_value\":%.3f,\"ratio\":%.4f,\"target\":\"<=0.05\",\"pass\":%s}\n",
	       name, a, b, a / b, a / b <= 0.05 ? "true" : "false");
}

/* Rows a second on one core: f16, head dimension 64, as many lanes as a small model has. */
static void bench_heuristics(void)
{
	enum { REPEAT = 5 };
	size_t lane = (size_t)ROWS * DIM * sizeof(uint16_t);
	char *k = must(LANES * lane), *v = must(LANES * lane);
	float *scores = must(ROWS * sizeof(float));
	uint64_t state = 2;

	for (size_t i = 0; i < LANES * lane / 2; i++) { /* any sign, exponents near 1, any fraction */
		state = state * 6364136223846793005u + 1442695040888963407u;
		((uint16_t *)k)[i] = (uint16_t)((state >> 48 & 0x87ff) | 0x3400);
		((uint16_t *)v)[i] = (uint16_t)((state >> 32 & 0x87ff) | 0x3400);
	}
	for (const struct policy_ops *const *ops = policy_registry; *ops; ops++) {
		struct policy_cfg cfg = {
			.layers = 30, .heads = 3, .k_dim = DIM, .v_dim = DIM, .dtype = ROW_F16};
		struct policy *p;
		uint64_t t[REPEAT];
		char err[128];
		double ms;

		if ((*ops)->caps & POLICY_NEEDS_WEIGHTS || (*ops)->id == POLICY_CLIENT)
			continue;
		if ((*ops)->init(&p, &cfg, err, sizeof(err)) < 0)
			abort();
		for (int r = 0; r < REPEAT; r++) {
			t[r] = now_ns();
			for (uint32_t l = 0; l < LANES; l++) {
				struct policy_batch b = {
					.lane = l, .n = ROWS, .total = ROWS, .k = k + l * lane};

				b.v = v + l * lane;
				b.k_stride = b.v_stride = DIM * sizeof(uint16_t);
				if (p->ops->score(p, &b, scores) < 0)
					abort();
			}
			t[r] = now_ns() - t[r];
		}
		p->ops->free(p);
		ms = median_ms(t, REPEAT);
		printf("{\"name\":\"score 90 x 4096 x d 64 f16, %s\",\"value\":%.1f,\"unit\":\"Mrows/s\","
		       "\"rival\":\"-\",\"rival_value\":0,\"ratio\":0,\"target\":\"-\",\"pass\":true}\n",
		       (*ops)->name, LANES * ROWS / ms / 1e3);
	}
	free(k);
	free(v);
	free(scores);
}

int main(void)
{
	struct scene s;

	scene_init(&s);
	bench_decide(&s, "decide 90 x 4096, scores given");
	s.in.granularity = DECIDE_TOKEN;
	bench_decide(&s, "decide 90 x 4096, scores given, one set for all lanes");
	s.in.granularity = DECIDE_HEAD;
	settle(&s);
	bench_decide(&s, "decide 90 x 4096, scores given, plan in force");
	bench_heuristics();
	return 0;
}
