/* SPDX-License-Identifier: MIT */
/* Expected attention: what queries like those of the prompt would see from positions further on. */
#include <cblas.h>
#include <math.h>
#include <string.h>
#include "policy/eval/attention.h"
#include "shm/util.h"

/* The two elements of pair p. */
static void pair(const struct attn_scratch *s, uint32_t p, uint32_t *a, uint32_t *b)
{
	bool half = s->rope_type != TRACE_ROPE_PAIRS;

	*a = half ? p : 2 * p;
	*b = half ? p + s->dim / 2 : 2 * p + 1;
}

/* Rotate `n` vectors, elements `step` apart and vectors `next` apart, by one angle per pair. */
static void rotate(const struct attn_scratch *s, float *x, uint32_t n, size_t step, size_t next, const float *c,
		   const float *sn, float sign)
{
	for (uint32_t p = 0; p < s->dim / 2; p++) {
		uint32_t a, b;

		pair(s, p, &a, &b);
		for (uint32_t i = 0; i < n; i++) {
			float *xa = x + i * next + a * step, *xb = x + i * next + b * step, keep = *xa;

			*xa = keep * c[p] - sign * *xb * sn[p];
			*xb = *xb * c[p] + sign * keep * sn[p];
		}
	}
}

/* s->q0 = rows [from, to) of q before RoPE; s->mean, and q0 less the mean. */
static void centre(struct attn_scratch *s, const float *q, uint32_t from, uint32_t to)
{
	uint32_t half = s->dim / 2, n = to - from;

	memset(s->mean, 0, s->dim * sizeof(float));
	for (uint32_t i = 0; i < n; i++) {
		float *x = s->q0 + (size_t)i * s->dim;

		memcpy(x, q + (size_t)(from + i) * s->dim, s->dim * sizeof(float));
		rotate(s, x, 1, 1, 0, s->cos + (size_t)(from + i) * half, s->sin + (size_t)(from + i) * half,
		       -1);
		s->kern->axpy(s->mean, x, 1 / (float)n, s->dim);
	}
	for (uint32_t i = 0; i < n; i++)
		s->kern->axpy(s->q0 + (size_t)i * s->dim, s->mean, -1, s->dim);
}

/* Mean rotation over the next positions, as one cosine and sine per pair (no rotation any more, but linear). */
static void mean_rotation(const struct attn_scratch *s, uint32_t prompt, float *c, float *sn)
{
	uint32_t half = s->dim / 2;

	memset(c, 0, half * sizeof(*c));
	memset(sn, 0, half * sizeof(*sn));
	for (uint32_t m = prompt; m < prompt + ATTN_AHEAD; m++) {
		s->kern->axpy(c, s->cos + (size_t)m * half, 1.0f / ATTN_AHEAD, half);
		s->kern->axpy(sn, s->sin + (size_t)m * half, 1.0f / ATTN_AHEAD, half);
	}
}

/* s->row[i] += softmax over rows [sinks, prompt) of what one head expects. */
static void add_head(const struct attn_head *h, struct attn_scratch *s, const float *q, uint32_t sinks,
		     uint32_t prompt)
{
	uint32_t dim = h->dim, n = prompt - sinks;
	float *c = s->turn, *sn = s->turn + dim / 2;
	const float *k = h->k + (size_t)sinks * dim;
	float sum;

	centre(s, q, sinks, prompt);
	cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (int)dim, (int)dim, (int)n, 1 / (float)n, s->q0,
		    (int)dim, s->q0, (int)dim, 0, s->cov, (int)dim);
	mean_rotation(s, prompt, c, sn);
	rotate(s, s->mean, 1, 1, 0, c, sn, 1);
	rotate(s, s->cov, dim, dim, 1, c, sn, 1); /* R S, then (R S) R' */
	rotate(s, s->cov, dim, 1, dim, c, sn, 1);
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)n, (int)dim, (int)dim, 1, k, (int)dim,
		    s->cov, (int)dim, 0, s->q0, (int)dim);
	for (uint32_t i = 0; i < n; i++) {
		const float *ki = k + (size_t)i * dim, *ks = s->q0 + (size_t)i * dim;
		float mu = 0, quad = 0;

		for (uint32_t d = 0; d < dim; d++) {
			mu += ki[d] * s->mean[d];
			quad += ki[d] * ks[d];
		}
		s->pool[i] = mu / sqrtf((float)dim) + quad / (2 * (float)dim);
	}
	sum = s->kern->exp_row(s->pool, n, 1);
	s->kern->axpy(s->row, s->pool, 1 / (sum * (float)h->group), n);
}

void attn_expected(const struct attn_head *h, struct attn_scratch *s, uint32_t prompt, const float *vnorm,
		   float *score)
{
	uint32_t sinks = MIN(ATTN_SINKS, prompt - 1), n = prompt - sinks;
	float top = 0;

	memset(s->row, 0, n * sizeof(float));
	for (uint32_t g = 0; g < h->group; g++)
		add_head(h, s, h->q + (size_t)g * h->rows * h->dim, sinks, prompt);
	for (uint32_t i = 0; i < n; i++) {
		score[sinks + i] = s->row[i] * vnorm[sinks + i];
		top = MAX(top, score[sinks + i]);
	}
	for (uint32_t i = 0; i < sinks; i++)
		score[i] = top + 1;
}
