/* SPDX-License-Identifier: MIT */
/*
 * Utilities from queries: the attention that a cut's future pays to each of its
 * rows (formulas: shm/trace.h). Queries of consecutive rows go through the keys
 * together, so that a tile of keys is loaded from memory once for all of them.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "policy/rows.h"
#include "policy/trace.h"
#include "shm/util.h"

#define QUERIES 8 /* at once */

struct scratch {
	const struct rows_kern *kern;
	void *raw;      /* a chunk as it is in the file */
	float *k;       /* [rows][k_dim], as attention sees them */
	float *q;       /* [QUERIES][k_dim] of one head of the group */
	float *logits;  /* [QUERIES][rows] */
	float *most;    /* [QUERIES][prompt]: maximum over the group ... */
	float *sum;     /* ... and sum */
	uint32_t *pos;  /* [rows] 0, 1, ... */
	uint32_t rows;  /* that the last query sees: prompt + queries */
	uint32_t first; /* row of the first query: the prompt's length */
	uint32_t dim;
};

static void scratch_free(struct scratch *s)
{
	free(s->raw);
	free(s->k);
	free(s->q);
	free(s->logits);
	free(s->most);
	free(s->sum);
	free(s->pos);
}

static int scratch_new(struct scratch *s, const struct trace *t, const struct trace_cut *cut)
{
	size_t rows = (size_t)cut->prompt + cut->queries, dim = t->h.k_dim;

	*s = (struct scratch){
		.kern = rows_kern(NULL), .rows = (uint32_t)rows, .first = cut->prompt, .dim = t->h.k_dim};
	s->raw = malloc(trace_chunk_bytes(&t->h, TRACE_Q, NULL));
	s->k = malloc(rows * dim * sizeof(float));
	s->q = malloc(QUERIES * dim * sizeof(float));
	s->logits = malloc(QUERIES * rows * sizeof(float));
	s->most = malloc(QUERIES * (size_t)cut->prompt * sizeof(float));
	s->sum = malloc(QUERIES * (size_t)cut->prompt * sizeof(float));
	s->pos = malloc(rows * sizeof(*s->pos));
	return s->raw && s->k && s->q && s->logits && s->most && s->sum && s->pos ? 0 : -ENOMEM;
}

static size_t row_bytes(const struct trace *t)
{
	return (size_t)t->h.k_dim * (t->h.dtype == TRACE_F32 ? 4 : 2);
}

static int load_keys(struct scratch *s, const struct trace *t, uint32_t lane, char *err, size_t errsize)
{
	int r = trace_read(t, TRACE_K, lane, 0, s->raw, err, errsize);

	if (r < 0)
		return r;
	s->kern->load(s->k, s->raw, row_bytes(t), s->dim, s->rows, (enum row_dtype)t->h.dtype);
	if (t->h.keys == TRACE_KEYS_UNROTATED) {
		for (uint32_t i = 0; i < s->rows; i++)
			s->pos[i] = i;
		rope_apply(s->k, s->dim, s->rows, s->pos, (enum trace_rope)t->h.rope_type, t->h.rope_theta);
	}
	return 0;
}

/* logits[b][j] = q_b . k_j for the rows below `seen`. */
static void multiply(struct scratch *s, const float *q, uint32_t n, uint32_t seen)
{
	for (uint32_t j = 0; j < seen; j += ROWS_TILE) {
		uint32_t rows = MIN(ROWS_TILE, seen - j);

		for (uint32_t b = 0; b < n; b++)
			s->kern->dot(s->k + (size_t)j * s->dim, s->dim, rows, q + (size_t)b * s->dim,
				     s->logits + (size_t)b * s->rows + j);
	}
}

/* Attention of one query over the rows below `seen`; those of the prompt join the group's maximum and sum. */
static void attend(const struct scratch *s, float *logits, uint32_t seen, float *most, float *sum)
{
	float scale = 1.0f / sqrtf((float)s->dim), top = -INFINITY, part;
	double all = 0;

	for (uint32_t j = 0; j < seen; j++)
		top = MAX(top, logits[j]);
	for (uint32_t j = 0; j < seen; j++) {
		logits[j] = expf((logits[j] - top) * scale);
		all += (double)logits[j];
	}
	part = (float)(1.0 / all);
	for (uint32_t j = 0; j < s->first; j++) {
		float a = logits[j] * part;

		most[j] = MAX(most[j], a);
		sum[j] += a;
	}
}

/* Queries [at, at + n) of the cut, all heads of the group: `raw` holds the Q chunk. */
static void block(struct scratch *s, const struct trace *t, uint32_t at, uint32_t n, float *umax, float *umean)
{
	uint32_t row = s->first + at;
	size_t head = (size_t)t->h.rows * row_bytes(t);

	memset(s->most, 0, (size_t)n * s->first * sizeof(float));
	memset(s->sum, 0, (size_t)n * s->first * sizeof(float));
	for (uint32_t g = 0; g < t->h.group; g++) {
		s->kern->load(s->q, (const char *)s->raw + g * head + row * row_bytes(t), row_bytes(t), s->dim,
			      n, (enum row_dtype)t->h.dtype);
		multiply(s, s->q, n, row + n);
		for (uint32_t b = 0; b < n; b++)
			attend(s, s->logits + (size_t)b * s->rows, row + b + 1, s->most + (size_t)b * s->first,
			       s->sum + (size_t)b * s->first);
	}
	for (uint32_t b = 0; b < n; b++)
		for (uint32_t j = 0; j < s->first; j++) {
			umax[j] += s->most[(size_t)b * s->first + j];
			umean[j] += s->sum[(size_t)b * s->first + j] / (float)t->h.group;
		}
}

static int utility(struct scratch *s, const struct trace *t, uint32_t lane, uint32_t queries, float *umax,
		   float *umean, char *err, size_t errsize)
{
	int r = load_keys(s, t, lane, err, errsize);

	if (r == 0)
		r = trace_read(t, TRACE_Q, lane, 0, s->raw, err, errsize);
	if (r < 0)
		return r;
	memset(umax, 0, s->first * sizeof(*umax));
	memset(umean, 0, s->first * sizeof(*umean));
	for (uint32_t at = 0; at < queries; at += QUERIES)
		block(s, t, at, MIN(QUERIES, queries - at), umax, umean);
	return 0;
}

int trace_utility(const struct trace *t, uint32_t lane, uint32_t cut, float *umax, float *umean, char *err,
		  size_t errsize)
{
	_cleanup_free_ float *unwanted = NULL;
	struct scratch s = {0};
	int r;

	if (cut >= t->h.cuts || t->cut[cut].flags & TRACE_CUT_BRANCH) {
		snprintf(err, errsize, "%s: cut %u: %s", t->path, cut,
			 cut >= t->h.cuts ? "there is no such cut" : "its future is not in this file");
		return -EINVAL;
	}
	r = scratch_new(&s, t, &t->cut[cut]);
	if (r == 0 && !(umax && umean)) {
		unwanted = malloc(t->cut[cut].prompt * sizeof(float));
		r = unwanted ? 0 : -ENOMEM;
	}
	if (r == 0)
		r = utility(&s, t, lane, t->cut[cut].queries, umax ? umax : unwanted, umean ? umean : unwanted,
			    err, errsize);
	else
		snprintf(err, errsize, "%s: out of memory", t->path);
	scratch_free(&s);
	return r;
}
