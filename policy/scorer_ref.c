/* SPDX-License-Identifier: MIT */
/* The prepared network of shm/scorer.h as its definition reads, one row at a time: what GPU kernels are
 * measured by. */
#include "policy/kvp.h"
#include "policy/scorer.h"
#include "shm/util.h"

#include <float.h>
#include <math.h>

static double bf16(double x)
{
	return bf16_float(float_bf16((float)x));
}

/* Undo RoPE of the row at pos. */
static void turn_back(double *x, const struct scorer_hdr *h, uint32_t pos)
{
	const uint64_t *turn = (const uint64_t *)((const char *)h + h->turn_off);
	const uint32_t half = h->k_dim / 2, step = h->flags & SCORER_ROPE_PAIRS ? 1 : half;

	for (uint32_t p = 0; p < half; p++) {
		double angle = ldexp((double)(int64_t)(turn[p] * pos), -63) * M_PI, c = cos(angle),
		       s = sin(angle), *a = x + (step == 1 ? 2 * p : p), *b = a + step, first = *a * c + *b * s;

		*b = *b * c - *a * s;
		*a = first;
	}
}

/* 1 / sd of a projection of x, from the triangle. */
static double inverse_sd(const double *x, const uint16_t *r, const float *shift, double rest,
			 const struct scorer_hdr *h)
{
	double sum = rest;

	for (uint32_t i = 0; i < h->k_dim; i++) {
		double y = shift[i];

		for (uint32_t j = i; j < h->k_dim; j++)
			y += bf16_float(r[scorer_tri_at(h->k_dim, i, j)]) * x[j];
		sum += y * y;
	}
	return 1 / sqrt(sum / h->proj + (double)SCORER_EPS);
}

/* u += scale * (M x + m) */
static void add_product(double *u, const double *x, const uint16_t *m, const float *shift, double scale,
			uint32_t in, uint32_t hidden)
{
	for (uint32_t o = 0; o < hidden; o++) {
		double y = shift ? shift[o] : 0;

		for (uint32_t i = 0; i < in; i++)
			y += bf16_float(m[scorer_at(hidden, o, i)]) * x[i];
		u[o] += scale * y;
	}
}

/* u = SiLU(LN(u)) of centred u. */
static void activate(double *u, const float *gain, const float *offset, uint32_t hidden)
{
	double sum = 0, scale;

	for (uint32_t i = 0; i < hidden; i++)
		sum += u[i] * u[i];
	scale = 1 / sqrt(sum / hidden + (double)SCORER_EPS);
	for (uint32_t i = 0; i < hidden; i++) {
		double y = u[i] * scale * gain[i] + offset[i];

		u[i] = y * tanh(y) + y;
	}
}

static void position(double *p, const struct scorer_hdr *h, const char *lane, uint32_t pos)
{
	const uint16_t *table = (const uint16_t *)(lane + h->tensor_off[SCORER_POS]);
	const float *ln = (const float *)(lane + h->tensor_off[SCORER_POS_LN]);
	uint32_t at = MIN(pos, h->pos_rows - 1), next;
	double part = 0, mean = 0, var = 0;

	if (h->flags & SCORER_LOG2) {
		float t = kvp_knot(h->octave, h->pos_rows, pos);

		at = (uint32_t)t;
		part = t - (double)at;
	}
	next = MIN(at + 1, h->pos_rows - 1);
	for (uint32_t i = 0; i < SCORER_POS_PAD; i++) {
		double low = bf16_float(table[(size_t)at * SCORER_POS_PAD + i]),
		       high = bf16_float(table[(size_t)next * SCORER_POS_PAD + i]);

		p[i] = low + part * (high - low);
		mean += p[i] / h->pos_dim; /* the padding is zero */
	}
	for (uint32_t i = 0; i < h->pos_dim; i++)
		var += (p[i] - mean) * (p[i] - mean) / h->pos_dim;
	for (uint32_t i = 0; h->flags & SCORER_LOG2 && i < h->pos_dim; i++)
		p[i] = bf16((p[i] - mean) / sqrt(var + (double)SCORER_EPS) * ln[i] + ln[SCORER_POS_PAD + i]);
}

void scorer_eval_ref(const struct scorer_hdr *h, uint32_t lane, enum row_dtype dtype, const void *k,
		     const void *v, uint32_t pos, float *coef)
{
	const struct scorer_vecs at = scorer_vecs(h->k_dim, h->hidden);
	const char *l = (const char *)h + h->lane_off + lane * h->lane_stride;
	const float *vecs = (const float *)(l + h->tensor_off[SCORER_VECS]);
	const uint32_t dim = h->k_dim, hidden = h->hidden;
	double x[128], y[128], p[SCORER_POS_PAD], u[256] = {0}, next[256] = {0};
#define MATRIX(t) ((const uint16_t *)(l + h->tensor_off[t]))

	for (uint32_t i = 0; i < dim; i++)
		x[i] = row_element(k, i, dtype);
	if (h->flags & SCORER_UNROTATE)
		turn_back(x, h, pos);
	for (uint32_t i = 0; i < dim; i++) {
		x[i] = bf16(x[i]);
		y[i] = bf16(row_element(v, i, dtype));
	}
	position(p, h, l, pos);
	for (uint32_t o = 0; o < hidden; o++)
		u[o] = vecs[at.c + o];
	add_product(u, x, MATRIX(SCORER_MK), vecs + at.mk,
		    inverse_sd(x, MATRIX(SCORER_RK), vecs + at.rk, vecs[at.rest_k], h), dim, hidden);
	add_product(u, y, MATRIX(SCORER_MV), vecs + at.mv,
		    inverse_sd(y, MATRIX(SCORER_RV), vecs + at.rv, vecs[at.rest_v], h), dim, hidden);
	add_product(u, p, MATRIX(SCORER_WP), NULL, 1, SCORER_POS_PAD, hidden);
	activate(u, vecs + at.g1, vecs + at.o1, hidden);
	for (uint32_t o = 0; o < hidden; o++)
		u[o] = bf16(u[o]);
	add_product(next, u, MATRIX(SCORER_W2), vecs + at.b2, 1, hidden, hidden);
	activate(next, vecs + at.g2, vecs + at.o2, hidden);
	for (uint32_t r = 0; r < h->coefs; r++) {
		double sum = vecs[at.b3 + r];

		for (uint32_t o = 0; o < hidden; o++)
			sum += vecs[at.w3 + r * hidden + o] * next[o];
		coef[r] = (float)sum;
	}
	if (!isfinite(coef[0]) || (h->coefs > 1 && !isfinite(coef[1]))) {
		coef[0] = -FLT_MAX;
		coef[h->coefs - 1] = h->coefs > 1 ? 0 : coef[0];
	}
#undef MATRIX
}
