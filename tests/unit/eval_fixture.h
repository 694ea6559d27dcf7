/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Made-up traces for the tests of the evaluation: keys with a few heavy rows, queries that like them, several
 * source documents and domains, cuts before and after, five continuations of one prompt.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "policy/train/noise.h"
#include "shm/trace.h"
#include "shm/util.h"

enum {
	FX_LAYERS = 2,
	FX_HEADS = 2,
	FX_GROUP = 2,
	FX_DIM = 16,
	FX_LANES = FX_LAYERS * FX_HEADS,
	FX_QUERIES = 40
};

struct fx_options {
	uint32_t rows;
	enum trace_split split;
	const char *source, *domain;
	uint64_t seed;
	bool no_q, no_umax, continuations;
	uint32_t k_dim; /* 0: FX_DIM */
};

static inline float fx_uniform(uint64_t seed, uint32_t a, uint32_t b, uint32_t c)
{
	return train_noise(seed, a, b, c, 0, 0);
}

/* Roughly normal: the sum of four uniforms. */
static inline float fx_normal(uint64_t seed, uint32_t a, uint32_t b, uint32_t c)
{
	float s = 0;

	for (uint32_t i = 0; i < 4; i++)
		s += train_noise(seed, a, b, c, i, 1);
	return (s - 2) * 1.732f;
}

static inline struct trace_header fx_header(const struct fx_options *o)
{
	struct trace_header h = {.layers = FX_LAYERS,
				 .heads = FX_HEADS,
				 .group = FX_GROUP,
				 .k_dim = o->k_dim ? o->k_dim : FX_DIM,
				 .v_dim = FX_DIM,
				 .dtype = TRACE_F32,
				 .rope_type = TRACE_ROPE_HALF,
				 .rope_theta = 10000,
				 .rows = o->rows,
				 .split = o->split,
				 .seed = o->seed};

	strcpy(h.model, "made-up");
	snprintf(h.source, sizeof(h.source), "%s", o->source ? o->source : "");
	snprintf(h.domain, sizeof(h.domain), "%s", o->domain ? o->domain : "");
	return h;
}

/* Two cuts with a future in the file; then, if asked for, five continuations of the first's prompt. */
static inline uint32_t fx_cuts(const struct fx_options *o, struct trace_cut *cut)
{
	uint32_t last = o->rows - FX_QUERIES;

	cut[0] = (struct trace_cut){last / 2, FX_QUERIES, 1, TRACE_CUT_BEFORE};
	cut[1] = (struct trace_cut){last, FX_QUERIES, 2, 0};
	for (uint32_t i = 0; o->continuations && i < 5; i++)
		cut[2 + i] = (struct trace_cut){last / 2, FX_QUERIES, 3, TRACE_CUT_BEFORE | TRACE_CUT_BRANCH};
	return o->continuations ? 7 : 2;
}

static inline float *fx_lane_k(const struct trace_header *h, uint32_t lane)
{
	float *k = malloc((size_t)h->rows * h->k_dim * sizeof(*k));

	for (uint32_t i = 0; i < h->rows; i++) /* few rows lie far out along the first axis */
		for (uint32_t c = 0; c < h->k_dim; c++)
			k[(size_t)i * h->k_dim + c] =
				fx_normal(h->seed, lane, i, c) +
				(c == 0 && fx_uniform(h->seed, 100 + lane, i, 0) < 0.1f ? 6 : 0);
	return k;
}

static inline float *fx_lane_q(const struct trace_header *h, uint32_t lane)
{
	size_t n = (size_t)h->group * h->rows;
	float *q = malloc(n * h->k_dim * sizeof(*q));

	for (uint32_t i = 0; i < n; i++)
		for (uint32_t c = 0; c < h->k_dim; c++)
			q[(size_t)i * h->k_dim + c] = fx_normal(h->seed + 1, lane, i, c) + (c == 0 ? 2 : 0);
	return q;
}

static inline float *fx_random(uint64_t seed, uint32_t lane, uint32_t n)
{
	float *x = malloc(n * sizeof(*x));

	for (uint32_t i = 0; i < n; i++)
		x[i] = fx_uniform(seed, lane, i, 7);
	return x;
}

/* Utilities of a continuation: what the heavy rows of all have in common, and its own noise. */
static inline float *fx_utility(const struct trace_header *h, uint32_t lane, uint32_t cut, uint32_t prompt)
{
	float *u = malloc(prompt * sizeof(*u));

	for (uint32_t i = 0; i < prompt; i++)
		u[i] = fx_uniform(h->seed, 100 + lane, i, 0) < 0.1f ? 1 + fx_uniform(h->seed, lane, i, cut)
								    : 0.2f * fx_uniform(h->seed, lane, i, cut);
	return u;
}

static inline int fx_chunk(struct trace_writer *w, uint32_t kind, uint32_t lane, uint32_t cut, float *data)
{
	int r = trace_writer_chunk(w, kind, lane, cut, data);

	free(data);
	return r;
}

static inline int fx_write(const char *path, const struct fx_options *o)
{
	struct trace_header h = fx_header(o);
	struct trace_cut cut[7];
	struct trace_writer *w;
	char err[256];
	int r = 0;

	h.cuts = fx_cuts(o, cut);
	if (trace_writer_open(&w, path, &h, cut, err, sizeof(err)) < 0) {
		fprintf(stderr, "%s\n", err);
		return -1;
	}
	for (uint32_t lane = 0; lane < FX_LANES; lane++) {
		r |= fx_chunk(w, TRACE_K, lane, 0, fx_lane_k(&h, lane));
		r |= fx_chunk(w, TRACE_V, lane, 0, fx_random(h.seed + 2, lane, h.rows * h.v_dim));
		r |= fx_chunk(w, TRACE_VNORM, lane, 0, fx_random(h.seed + 3, lane, h.rows));
		if (!o->no_q)
			r |= fx_chunk(w, TRACE_Q, lane, 0, fx_lane_q(&h, lane));
		for (uint32_t c = o->no_umax ? 2 : 0; c < h.cuts; c++) {
			r |= fx_chunk(w, TRACE_UMAX, lane, c, fx_utility(&h, lane, c, cut[c].prompt));
			r |= fx_chunk(w, TRACE_UMEAN, lane, c, fx_utility(&h, lane, c, cut[c].prompt));
		}
	}
	if (r == 0)
		return trace_writer_finish(w, 0);
	trace_writer_abort(w);
	return r;
}

static inline int fx_write_model(const char *path)
{
	struct fx_options o = {.rows = 0};
	struct trace_header h = fx_header(&o);
	const uint32_t wide = FX_GROUP * FX_DIM;
	struct trace_writer *w;
	char err[256];
	int r = 0;

	if (trace_writer_open(&w, path, &h, NULL, err, sizeof(err)) < 0) {
		fprintf(stderr, "%s\n", err);
		return -1;
	}
	for (uint32_t lane = 0; lane < FX_LANES; lane++) { /* A'A + I of a random A: symmetric and positive */
		float *g = calloc(wide * wide, sizeof(*g)), *a = fx_random(5, lane, wide * wide);

		for (uint32_t i = 0; i < wide; i++)
			for (uint32_t j = 0; j < wide; j++)
				for (uint32_t k = 0; k < wide; k++)
					g[i * wide + j] += a[k * wide + i] * a[k * wide + j] + (i == j);
		free(a);
		r |= fx_chunk(w, TRACE_GRAM, lane, 0, g);
	}
	return r == 0 ? trace_writer_finish(w, 0) : r;
}

/* A whole directory: `valid` and `test` traces of as many documents, one test domain of its own, the model. */
static inline int fx_write_dir(const char *dir, uint32_t valid, uint32_t test, uint32_t rows)
{
	char path[256], source[32];
	int r;

	snprintf(path, sizeof(path), "%s/model.kvtr", dir);
	r = fx_write_model(path);
	for (uint32_t i = 0; r == 0 && i < valid + test; i++) {
		bool is_test = i >= valid;
		struct fx_options o = {.rows = rows + 32 * (i % 3),
				       .split = is_test ? TRACE_TEST : TRACE_VALID,
				       .source = source,
				       .domain = is_test && i % 4 == 3 ? "letters"
						 : i % 2               ? "prose"
								       : "code",
				       .seed = 1000 + i,
				       .no_umax = true,
				       .continuations = is_test};

		snprintf(source, sizeof(source), "document-%u", i - i % 2); /* two traces of one source each */
		snprintf(path, sizeof(path), "%s/%s", dir, is_test ? "test" : "valid");
		if (mkdir(path, 0777) < 0 && errno != EEXIST)
			return -1;
		snprintf(path, sizeof(path), "%s/%s/%u.kvtr", dir, is_test ? "test" : "valid", i);
		r = fx_write(path, &o);
	}
	return r;
}
