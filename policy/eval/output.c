/* SPDX-License-Identifier: MIT */
/* Attention output with rows missing: kept rows are added budget by budget, so each is multiplied once. */
#include <cblas.h>
#include <math.h>
#include <string.h>
#include "policy/eval/output.h"
#include "shm/util.h"

static float *take(float **at, size_t n)
{
	float *p = *at;

	*at += ALIGN_UP(n, 16);
	return p;
}

static int reserve(struct output *o, uint32_t rows)
{
	size_t m = (size_t)o->group * o->queries, wide = (size_t)o->group * o->v_dim;
	size_t need = 2 * (size_t)rows * (m + o->wide) + m * (2 * o->wide + o->v_dim) + 2 * o->queries * wide +
		      9 * 16;
	float *at;

	if (need > o->room) {
		free(o->memory);
		o->room = 0;
		o->memory = aligned_alloc(64, ALIGN_UP(need * sizeof(float), 64));
		if (!o->memory)
			return -ENOMEM;
		o->room = need;
	}
	at = o->memory;
	o->at = take(&at, rows * m);
	o->v = take(&at, (size_t)rows * o->wide);
	o->fixed = take(&at, m * o->wide);
	o->full = take(&at, m * o->v_dim);
	o->acc = take(&at, m * o->wide);
	o->diff = take(&at, o->queries * wide);
	o->image = take(&at, o->queries * wide);
	o->pick_a = take(&at, rows * m);
	o->pick_v = take(&at, (size_t)rows * o->wide);
	return 0;
}

void output_release(struct output *o)
{
	free(o->memory);
	*o = (struct output){0};
}

/* acc += A' V over n consecutive rows of a and v. */
static void add_rows(const struct output *o, const float *a, const float *v, uint32_t n, float *acc)
{
	int m = (int)(o->group * o->queries);

	if (n)
		cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, m, (int)o->wide, (int)n, 1, a, m, v,
			    (int)o->wide, 1, acc, (int)o->wide);
}

/* sum_t x_t' GRAM x_t for x in o->diff. */
static double gram_norm(struct output *o)
{
	int wide = (int)(o->group * o->v_dim);
	double sum = 0;

	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)o->queries, wide, wide, 1, o->diff, wide,
		    o->gram, wide, 0, o->image, wide);
	for (size_t i = 0; i < (size_t)o->queries * (size_t)wide; i++)
		sum += (double)o->diff[i] * o->image[i];
	return MAX(sum, 0.0);
}

/* o->diff[t][g] = full - acc / sum of attention; acc NULL: full alone. */
static void difference(struct output *o, const float *acc)
{
	for (uint32_t r = 0; r < o->group * o->queries; r++) {
		uint32_t g = r / o->queries, t = r % o->queries;
		float *d = o->diff + ((size_t)t * o->group + g) * o->v_dim;
		const float *full = o->full + (size_t)r * o->v_dim, *a = acc ? acc + (size_t)r * o->wide : NULL;
		float inv = a && a[o->v_dim] > 0 ? 1 / a[o->v_dim] : 0; /* no attention left: no output */

		for (uint32_t c = 0; c < o->v_dim; c++)
			d[c] = a ? full[c] - a[c] * inv : full[c];
	}
}

/* Attention of the sampled queries, one column a query, and values with a one behind. */
static void load(struct output *o, const struct attn_head *h, struct attn_scratch *s, const float *v,
		 const uint32_t *t)
{
	uint32_t m = o->group * o->queries, stride;

	attn_rows(h, s, t, o->queries, &stride);
	for (uint32_t j = 0; j < stride; j++) {
		for (uint32_t r = 0; r < m; r++)
			o->at[(size_t)j * m + r] = s->a[(size_t)r * stride + j];
		memcpy(o->v + (size_t)j * o->wide, v + (size_t)j * o->v_dim, o->v_dim * sizeof(*v));
		o->v[(size_t)j * o->wide + o->v_dim] = 1;
	}
}

int output_prepare(struct output *o, const struct attn_head *h, struct attn_scratch *s, const float *v,
		   uint32_t v_dim, const float *gram, uint32_t prompt, uint32_t future, uint32_t sample)
{
	uint32_t t[OUTPUT_QUERIES], m, rows, tail = prompt - PROTECT_LAST;

	o->queries = MIN(MIN(sample, future), OUTPUT_QUERIES);
	o->v_dim = v_dim;
	o->wide = v_dim + 1;
	o->group = h->group;
	o->gram = gram;
	for (uint32_t i = 0; i < o->queries; i++)
		t[i] = prompt + (uint32_t)((2 * (uint64_t)i + 1) * future / (2 * o->queries));
	rows = t[o->queries - 1] + 1;
	m = o->group * o->queries;
	if (reserve(o, rows) < 0)
		return -ENOMEM;
	load(o, h, s, v, t);
	memset(o->fixed, 0, (size_t)m * o->wide * sizeof(float));
	add_rows(o, o->at, o->v, PROTECT_FIRST, o->fixed);
	add_rows(o, o->at + (size_t)tail * m, o->v + (size_t)tail * o->wide, rows - tail, o->fixed);
	memcpy(o->acc, o->fixed, (size_t)m * o->wide * sizeof(float));
	add_rows(o, o->at + (size_t)PROTECT_FIRST * m, o->v + (size_t)PROTECT_FIRST * o->wide,
		 tail - PROTECT_FIRST, o->acc);
	for (uint32_t r = 0; r < m; r++)
		for (uint32_t c = 0; c < v_dim; c++)
			o->full[(size_t)r * v_dim + c] =
				o->acc[(size_t)r * o->wide + c] / o->acc[(size_t)r * o->wide + v_dim];
	difference(o, NULL);
	o->norm = gram_norm(o);
	return 0;
}

void output_errors(struct output *o, const uint32_t *order, uint32_t n, float *out)
{
	uint32_t m = o->group * o->queries, k = 0;

	memcpy(o->acc, o->fixed, (size_t)m * o->wide * sizeof(float));
	for (int b = 0; b < EVAL_ERRORS; b++) {
		uint32_t until = (uint32_t)lrint((double)eval_error_budget[b] * n), from = k;

		for (; k < until; k++) {
			uint32_t row = PROTECT_FIRST + order[k];

			memcpy(o->pick_a + (size_t)(k - from) * m, o->at + (size_t)row * m, m * sizeof(float));
			memcpy(o->pick_v + (size_t)(k - from) * o->wide, o->v + (size_t)row * o->wide,
			       o->wide * sizeof(float));
		}
		add_rows(o, o->pick_a, o->pick_v, k - from, o->acc);
		if (metric_too_small(eval_error_budget[b], n + PROTECTED) || o->norm <= 0) {
			out[b] = NAN;
			continue;
		}
		difference(o, o->acc);
		out[b] = (float)sqrt(gram_norm(o) / o->norm);
	}
}
