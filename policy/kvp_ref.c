/* SPDX-License-Identifier: MIT */
/*
 * The KVP network as its definition reads, one row at a time in scalar fp32,
 * from the tensors as they lie in the file. The measure of the fast kernels,
 * and what runs where there are none.
 */
#include "policy/kvp.h"
#include "shm/util.h"

#include <float.h>
#include <math.h>

#define REF_WIDEST 640 /* any layer's input or output */

/* y[out] = W x + b, W [out][in] */
static void linear(float *y, const float *x, const uint16_t *w, const uint16_t *b, uint32_t in, uint32_t out)
{
	for (uint32_t o = 0; o < out; o++, w += in) {
		float sum = bf16_float(b[o]);

		for (uint32_t i = 0; i < in; i++)
			sum += bf16_float(w[i]) * x[i];
		y[o] = sum;
	}
}

static void layer_norm(float *x, const uint16_t *gain, const uint16_t *shift, uint32_t n)
{
	float mean = 0, var = 0, scale;

	for (uint32_t i = 0; i < n; i++)
		mean += x[i];
	mean /= (float)n;
	for (uint32_t i = 0; i < n; i++)
		var += (x[i] - mean) * (x[i] - mean);
	scale = 1.0f / sqrtf(var / (float)n + KVP_EPS);
	for (uint32_t i = 0; i < n; i++)
		x[i] = (x[i] - mean) * scale * bf16_float(gain[i]) + bf16_float(shift[i]);
}

static void silu(float *x, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		x[i] /= 1.0f + expf(-x[i]);
}

/* Undo RoPE by its definition: pair p of a row at position m was turned by m theta^(-2p/dim). */
static void unrotate(float *x, const struct weights_header *h, uint32_t pos)
{
	uint32_t half = h->k_dim / 2, step = h->rope_type == WEIGHTS_ROPE_HALF ? half : 1;

	for (uint32_t p = 0; p < half; p++) {
		double angle = pos * pow((double)h->rope_theta, -2.0 * p / h->k_dim);
		float *a = x + (h->rope_type == WEIGHTS_ROPE_HALF ? p : 2 * p), *b = a + step;
		float c = (float)cos(angle), s = (float)sin(angle), first = *a * c + *b * s;

		*b = *b * c - *a * s;
		*a = first;
	}
}

/* Knot t of `rows`, and what lies between it and the next. */
static float between(const uint16_t *table, uint32_t stride, uint32_t rows, float t)
{
	uint32_t i = (uint32_t)t;
	float low = bf16_float(table[(size_t)i * stride]);

	if (i + 1 >= rows)
		return low;
	return low + (t - (float)i) * (bf16_float(table[((size_t)i + 1) * stride]) - low);
}

static void position_features(float *p, const struct weights_header *h, const uint16_t *table, uint32_t pos)
{
	float t = h->pos_kind == WEIGHTS_POS_LOG2 ? kvp_knot(h->octave, h->pos_rows, pos)
						  : (float)MIN(pos, h->pos_rows - 1);

	for (uint32_t i = 0; i < h->pos_dim; i++)
		p[i] = between(table + i, h->pos_dim, h->pos_rows, t);
}

/* f: the row's [rank] coefficients. */
static void row_coefs(const struct weights *w, uint32_t lane, enum row_dtype dtype, const void *k,
		      const void *v, uint32_t pos, float *f)
{
	const struct weights_header *h = &w->h;
	uint32_t in = 2 * h->proj + h->pos_dim;
	float a[REF_WIDEST], b[REF_WIDEST];
	const uint16_t *t[KVP_TENSORS];

	for (uint32_t i = 0; i < KVP_TENSORS; i++)
		t[i] = weights_at(w, lane, i);
	for (uint32_t i = 0; i < h->k_dim; i++)
		a[i] = row_element(k, i, dtype);
	if (h->keys == WEIGHTS_KEYS_UNROTATED && h->rope_type != WEIGHTS_ROPE_NONE)
		unrotate(a, h, pos);
	linear(b, a, t[KVP_WK], t[KVP_BK], h->k_dim, h->proj);
	layer_norm(b, t[KVP_GK], t[KVP_OK], h->proj);
	for (uint32_t i = 0; i < h->v_dim; i++)
		a[i] = row_element(v, i, dtype);
	linear(b + h->proj, a, t[KVP_WV], t[KVP_BV], h->v_dim, h->proj);
	layer_norm(b + h->proj, t[KVP_GV], t[KVP_OV], h->proj);
	position_features(b + 2 * h->proj, h, t[KVP_POS], pos);
	layer_norm(b + 2 * h->proj, t[KVP_GP], t[KVP_OP], h->pos_dim);

	linear(a, b, t[KVP_W1], t[KVP_B1], in, h->hidden);
	layer_norm(a, t[KVP_G1], t[KVP_O1], h->hidden);
	silu(a, h->hidden);
	linear(b, a, t[KVP_W2], t[KVP_B2], h->hidden, h->hidden);
	layer_norm(b, t[KVP_G2], t[KVP_O2], h->hidden);
	silu(b, h->hidden);
	linear(f, b, t[KVP_W3], t[KVP_B3], h->hidden, h->rank);
}

void kvp_ref_coefs(const struct weights *w, enum row_dtype dtype, const struct policy_batch *b,
		   float *const *coef)
{
	for (uint32_t i = 0; i < b->n; i++) {
		float f[KVP_RANK];

		row_coefs(w, b->lane, dtype, (const char *)b->k + i * b->k_stride,
			  (const char *)b->v + i * b->v_stride, batch_pos(b, i), f);
		for (uint32_t r = 0; r < w->h.rank; r++)
			coef[r][i] = f[r];
	}
}

void kvp_ref_combine(const struct weights *w, const struct policy_batch *b, const float *const *coef,
		     float *scores)
{
	const uint16_t *dist = weights_at(w, b->lane, KVP_DIST);
	uint32_t rows = w->h.dist_rows;
	float lambda = kvp_lambda(b->total);

	for (uint32_t i = 0; i < b->n; i++) {
		float t = kvp_knot(w->h.octave, rows, kvp_distance(b->total, batch_pos(b, i))), s = coef[0][i];

		for (uint32_t r = 0; r < w->h.rank; r++) {
			float phi = between(dist + (size_t)2 * r * rows, 1, rows, t) +
				    lambda * between(dist + (size_t)(2 * r + 1) * rows, 1, rows, t);

			s += r ? coef[r][i] * phi : phi;
		}
		scores[i] = isfinite(s) ? s : -FLT_MAX;
	}
}
