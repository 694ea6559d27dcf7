/* SPDX-License-Identifier: MIT */
/*
 * The KVP network as its definition reads, one row at a time in scalar fp32,
 * from the tensors as they lie in the file. The measure of the fast kernels,
 * and what runs where there are none.
 */
#include "policy/kvp.h"
#include "shm/util.h"

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

static float score_row(const struct weights *w, uint32_t lane, enum row_dtype dtype, const void *k,
		       const void *v, uint32_t pos)
{
	const struct weights_header *h = &w->h;
	uint32_t in = 2 * h->proj + h->pos_dim;
	float a[REF_WIDEST], b[REF_WIDEST], score;
	const uint16_t *t[KVP_TENSORS];

	for (uint32_t i = 0; i < KVP_TENSORS; i++)
		t[i] = weights_at(w, lane, i);
	for (uint32_t i = 0; i < h->k_dim; i++)
		a[i] = row_element(k, i, dtype);
	linear(b, a, t[KVP_WK], t[KVP_BK], h->k_dim, h->proj);
	layer_norm(b, t[KVP_GK], t[KVP_OK], h->proj);
	for (uint32_t i = 0; i < h->v_dim; i++)
		a[i] = row_element(v, i, dtype);
	linear(b + h->proj, a, t[KVP_WV], t[KVP_BV], h->v_dim, h->proj);
	layer_norm(b + h->proj, t[KVP_GV], t[KVP_OV], h->proj);
	for (uint32_t i = 0; i < h->pos_dim; i++)
		b[2 * h->proj + i] = bf16_float(t[KVP_POS][(size_t)MIN(pos, h->pos_rows - 1) * h->pos_dim + i]);
	layer_norm(b + 2 * h->proj, t[KVP_GP], t[KVP_OP], h->pos_dim);

	linear(a, b, t[KVP_W1], t[KVP_B1], in, h->hidden);
	layer_norm(a, t[KVP_G1], t[KVP_O1], h->hidden);
	silu(a, h->hidden);
	linear(b, a, t[KVP_W2], t[KVP_B2], h->hidden, h->hidden);
	layer_norm(b, t[KVP_G2], t[KVP_O2], h->hidden);
	silu(b, h->hidden);
	linear(&score, b, t[KVP_W3], t[KVP_B3], h->hidden, 1);
	return score;
}

int kvp_ref_score(const struct weights *w, enum row_dtype dtype, const struct policy_batch *b, float *scores)
{
	for (uint32_t i = 0; i < b->n; i++)
		scores[i] = score_row(w, b->lane, dtype, (const char *)b->k + i * b->k_stride,
				      (const char *)b->v + i * b->v_stride, batch_pos(b, i));
	return 0;
}
