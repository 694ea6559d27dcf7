/* SPDX-License-Identifier: MIT */
/* Attention of blocks of queries, and the policies that rank by attention they saw. */
#include <assert.h>
#include <cblas.h>
#include <math.h>
#include <string.h>
#include "policy/eval/attention.h"
#include "shm/util.h"

#define MOST_QUERIES 64u
static_assert(ATTN_BLOCK <= MOST_QUERIES && ATTN_SNAPKV_WINDOW <= MOST_QUERIES, "room for a block");

static float *take(float **at, size_t n)
{
	float *p = *at;

	*at += ALIGN_UP(n, 16);
	return p;
}

/* Angle of pair p at position m: m * theta^(-2p/dim), in double: positions times frequencies need it. */
static void rotations(struct attn_scratch *s, uint32_t rope_type, float theta)
{
	uint32_t half = s->dim / 2;

	for (uint32_t p = 0; p < half; p++) {
		double f = rope_type == TRACE_ROPE_NONE ? 0 : pow(theta, -2.0 * p / s->dim);

		for (uint32_t m = 0; m < s->rows + ATTN_AHEAD; m++) {
			s->cos[(size_t)m * half + p] = (float)cos(m * f);
			s->sin[(size_t)m * half + p] = (float)sin(m * f);
		}
	}
	s->rope_type = rope_type;
	s->rope_theta = theta;
}

int attn_reserve(struct attn_scratch *s, uint32_t rows, uint32_t dim, uint32_t group, uint32_t rope_type,
		 float theta)
{
	size_t queries = (size_t)group * MOST_QUERIES, ahead = (size_t)rows + ATTN_AHEAD, floats;
	float *at;

	if (s->memory && rows <= s->rows && dim == s->dim && group == s->group && rope_type == s->rope_type &&
	    theta == s->rope_theta)
		return 0;
	attn_release(s);
	floats = queries * (dim + rows + 1) + (size_t)rows * (2 + dim) + (size_t)dim * (dim + 2) + ahead * dim;
	at = aligned_alloc(64, ALIGN_UP((floats + 11 * 16) * sizeof(*at), 64));
	if (!at)
		return -ENOMEM;
	*s = (struct attn_scratch){.kern = eval_kern(), .rows = rows, .dim = dim, .group = group, .memory = at};
	s->q = take(&at, queries * dim);
	s->a = take(&at, queries * rows);
	s->inv = take(&at, queries);
	s->row = take(&at, rows);
	s->pool = take(&at, rows);
	s->q0 = take(&at, (size_t)rows * dim);
	s->mean = take(&at, dim);
	s->cov = take(&at, (size_t)dim * dim);
	s->turn = take(&at, dim);
	s->cos = take(&at, ahead * (dim / 2));
	s->sin = take(&at, ahead * (dim / 2));
	rotations(s, rope_type, theta);
	return 0;
}

void attn_release(struct attn_scratch *s)
{
	free(s->memory);
	*s = (struct attn_scratch){0};
}

void attn_rows(const struct attn_head *h, struct attn_scratch *s, const uint32_t *t, uint32_t n,
	       uint32_t *stride)
{
	const float scale = 1 / sqrtf((float)h->dim);
	uint32_t columns = t[n - 1] + 1;

	for (uint32_t g = 0; g < h->group; g++)
		for (uint32_t i = 0; i < n; i++)
			memcpy(s->q + (size_t)(g * n + i) * h->dim,
			       h->q + ((size_t)g * h->rows + t[i]) * h->dim, h->dim * sizeof(float));
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)(h->group * n), (int)columns, (int)h->dim, 1,
		    s->q, (int)h->dim, h->k, (int)h->dim, 0, s->a, (int)columns);
	for (uint32_t r = 0; r < h->group * n; r++) {
		float *a = s->a + (size_t)r * columns;
		uint32_t sees = t[r % n] + 1;

		s->inv[r] = 1 / s->kern->exp_row(a, sees, scale);
		memset(a + sees, 0, (columns - sees) * sizeof(*a));
	}
	*stride = columns;
}

/* Attention of the `n` queries that end at row `end` - 1. */
static void block(const struct attn_head *h, struct attn_scratch *s, uint32_t end, uint32_t n, uint32_t *stride)
{
	uint32_t t[MOST_QUERIES];

	for (uint32_t i = 0; i < n; i++)
		t[i] = end - n + i;
	attn_rows(h, s, t, n, stride);
}

/* Rows from `from` on are always kept. */
static void keep_last(float *score, uint32_t from, uint32_t n)
{
	float top = 0;

	for (uint32_t i = 0; i < from; i++)
		top = MAX(top, score[i]);
	for (uint32_t i = from; i < n; i++)
		score[i] = top + 1;
}

static void h2o_finish(const float *sum, uint32_t prompt, float *score)
{
	for (uint32_t i = 0; i < prompt; i++)
		score[i] = sum[i] / (float)(prompt - i);
	keep_last(score, prompt > ATTN_H2O_WINDOW ? prompt - ATTN_H2O_WINDOW : 0, prompt);
}

void attn_h2o(const struct attn_head *h, struct attn_scratch *s, const uint32_t *prompt, uint32_t prompts,
	      float *const *score)
{
	float *sum = s->row;
	uint32_t at = 0;

	memset(sum, 0, prompt[prompts - 1] * sizeof(*sum));
	for (uint32_t p = 0; p < prompts; p++) {
		while (at < prompt[p]) {
			uint32_t n = MIN(ATTN_BLOCK, prompt[p] - at), stride;

			at += n;
			block(h, s, at, n, &stride);
			for (uint32_t r = 0; r < h->group * n; r++)
				s->kern->axpy(sum, s->a + (size_t)r * stride, s->inv[r] / (float)h->group, at);
		}
		h2o_finish(sum, prompt[p], score[p]);
	}
}

/* out[i] = mean of in[i - 2 ... i + 2], zeros outside of [0, n). */
static void average_pool(const float *in, float *out, uint32_t n)
{
	const uint32_t half = ATTN_POOL / 2;

	for (uint32_t i = 0; i < n; i++) {
		float sum = 0;

		for (uint32_t j = i > half ? i - half : 0; j <= i + half && j < n; j++)
			sum += in[j];
		out[i] = sum / ATTN_POOL;
	}
}

void attn_snapkv(const struct attn_head *h, struct attn_scratch *s, uint32_t prompt, float *score)
{
	uint32_t window = MIN(ATTN_SNAPKV_WINDOW, prompt), n = prompt - window, stride;

	block(h, s, prompt, window, &stride);
	memset(s->row, 0, n * sizeof(float));
	for (uint32_t r = 0; r < h->group * window; r++)
		s->kern->axpy(s->row, s->a + (size_t)r * stride, s->inv[r] / (float)(h->group * window), n);
	average_pool(s->row, score, n); /* linear: pooling the mean is the mean of what is pooled */
	keep_last(score, n, prompt);
}

void attn_defensive(const struct attn_head *h, struct attn_scratch *s, uint32_t prompt, const float *vnorm,
		    float *score)
{
	uint32_t window = MIN(ATTN_DEFENSIVE_WINDOW, prompt), n = prompt - window, stride;
	double mean = 0;

	block(h, s, prompt, window, &stride);
	memset(score, 0, n * sizeof(float));
	for (uint32_t r = 0; r < h->group * window; r++) {
		memset(s->row, 0, n * sizeof(float));
		s->kern->axpy(s->row, s->a + (size_t)r * stride, s->inv[r], n);
		average_pool(s->row, s->pool, n);
		s->kern->most(score, s->pool, n);
	}
	for (uint32_t i = 0; i < n; i++)
		mean += score[i];
	mean /= MAX(n, 1u);
	for (uint32_t i = 0; i < n; i++)
		score[i] = MAX(score[i], (float)mean) * vnorm[i];
	keep_last(score, n, prompt);
}

void attn_last(const struct attn_head *h, struct attn_scratch *s, uint32_t prompt, float *sum)
{
	uint32_t stride;

	block(h, s, prompt, 1, &stride);
	for (uint32_t g = 0; g < h->group; g++)
		s->kern->axpy(sum, s->a + (size_t)g * stride, s->inv[g], prompt);
}

void attn_utility(const struct attn_head *h, struct attn_scratch *s, uint32_t prompt, uint32_t first,
		  uint32_t n, float *umax, float *umean)
{
	for (uint32_t at = 0; at < n; at += ATTN_BLOCK) {
		uint32_t m = MIN(ATTN_BLOCK, n - at), stride;

		block(h, s, first + at + m, m, &stride);
		for (uint32_t i = 0; i < m; i++) {
			memset(s->row, 0, prompt * sizeof(float));
			for (uint32_t g = 0; g < h->group; g++) {
				uint32_t r = g * m + i;
				float *a = s->a + (size_t)r * stride;

				for (uint32_t j = 0; j < prompt; j++)
					a[j] *= s->inv[r];
				s->kern->most(s->row, a, prompt);
				s->kern->axpy(umean, a, 1 / (float)h->group, prompt);
			}
			s->kern->axpy(umax, s->row, 1, prompt);
		}
	}
}
