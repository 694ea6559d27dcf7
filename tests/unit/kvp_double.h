/* SPDX-License-Identifier: MIT */
#pragma once
/* Rows of every kind, and the KVP network as its definition reads in fp64, with no code of the policy's. */
#include "kvp_fixture.h"

#include <math.h>

/* Rows as a runtime would hold them, K and V in one buffer. */
struct rows {
	char *mem;
	struct policy_batch batch;
};

static uint64_t rng = 1;

static inline double uniform(void)
{
	rng = rng * 6364136223846793005u + 1442695040888963407u;
	return ((double)(rng >> 33) + 0.5) / 2147483648.0;
}

static inline float normal(void)
{
	double u = uniform(), v = uniform();

	return (float)(sqrt(-2 * log(u)) * cos(2 * M_PI * v));
}

static inline uint16_t float_half(float x)
{
	uint16_t sign = signbit(x) ? 0x8000 : 0;
	float m;
	int e;

	m = frexpf(fabsf(x), &e); /* x = m 2^e, m in [1/2, 1) */
	if (e < -13)
		return sign | (uint16_t)lrintf(ldexpf(fabsf(x), 24));
	return sign | (uint16_t)(((e + 14) << 10) + lrintf(m * 2048) - 1024);
}

static inline void put_element(char *row, size_t i, enum row_dtype dtype, float x)
{
	uint16_t half = dtype == ROW_F16 ? float_half(x) : float_bf16(x);

	if (dtype == ROW_F32)
		memcpy(row + i * 4, &x, 4);
	else
		memcpy(row + i * 2, &half, 2);
}

/* `gap` bytes follow each row and `skew` bytes come before the first, filled with what would be NaN. */
static inline struct rows make_rows(uint32_t n, uint32_t k_dim, uint32_t v_dim, enum row_dtype dtype,
				    size_t gap, size_t skew)
{
	size_t ks = k_dim * dtype_bytes(dtype) + gap, vs = v_dim * dtype_bytes(dtype) + gap;
	struct rows r = {.mem = malloc(skew + n * (ks + vs))};
	char *v = r.mem + skew + n * ks;

	assert_non_null(r.mem);
	memset(r.mem, 0xff, skew + n * (ks + vs));
	for (uint32_t i = 0; i < n; i++) {
		for (uint32_t j = 0; j < k_dim; j++)
			put_element(r.mem + skew + i * ks, j, dtype, 3 * normal());
		for (uint32_t j = 0; j < v_dim; j++)
			put_element(v + i * vs, j, dtype, normal() / 2);
	}
	r.batch = (struct policy_batch){.lane = 1,
					.n = n,
					.k = r.mem + skew,
					.v = v,
					.k_stride = ks,
					.v_stride = vs,
					.first_pos = 100,
					.total = 100 + n};
	return r;
}

/* ---- the definition, in fp64 and with no code of the policy's ---- */

static inline double w_at(const struct weights *w, uint32_t lane, uint32_t t, size_t i)
{
	uint32_t word = (uint32_t)((const uint16_t *)(w->image + 256 + lane * w->layout.stride +
						      w->layout.tensor[t].off))[i]
			<< 16;
	float x;

	memcpy(&x, &word, 4);
	return x;
}

static inline void dense64(double *y, const double *x, const struct weights *w, uint32_t lane, uint32_t t,
			   uint32_t in, uint32_t out)
{
	for (uint32_t o = 0; o < out; o++) {
		y[o] = w_at(w, lane, t + 1, o);
		for (uint32_t i = 0; i < in; i++)
			y[o] += w_at(w, lane, t, (size_t)o * in + i) * x[i];
	}
}

static inline void norm64(double *y, const struct weights *w, uint32_t lane, uint32_t gain, uint32_t n,
			  bool silu)
{
	double mean = 0, var = 0;

	for (uint32_t i = 0; i < n; i++)
		mean += y[i] / n;
	for (uint32_t i = 0; i < n; i++)
		var += (y[i] - mean) * (y[i] - mean) / n;
	for (uint32_t i = 0; i < n; i++) {
		y[i] = (y[i] - mean) / sqrt(var + 1e-5) * w_at(w, lane, gain, i) + w_at(w, lane, gain + 1, i);
		if (silu)
			y[i] *= 1 / (1 + exp(-y[i]));
	}
}

/* The cached key as it was before RoPE. */
static inline void unrotate64(double *k, const struct weights_header *h, uint32_t pos)
{
	uint32_t half = h->k_dim / 2;

	if (h->keys == WEIGHTS_KEYS_CACHED || h->rope_type == WEIGHTS_ROPE_NONE)
		return;
	for (uint32_t p = 0; p < half; p++) {
		uint32_t i = h->rope_type == WEIGHTS_ROPE_HALF ? p : 2 * p,
			 j = h->rope_type == WEIGHTS_ROPE_HALF ? p + half : i + 1;
		double angle = pos / pow(h->rope_theta, (double)p / half), a = k[i], b = k[j];

		k[i] = a * cos(angle) + b * sin(angle);
		k[j] = b * cos(angle) - a * sin(angle);
	}
}

static inline double knot64(uint32_t octave, uint32_t rows, uint32_t x)
{
	return fmin(octave * log2(1.0 + x), rows - 1.0);
}

/* Element `col` of a table [rows][cols] at knot t. */
static inline double between64(const struct weights *w, uint32_t lane, uint32_t tensor, uint32_t first,
			       uint32_t cols, uint32_t rows, uint32_t col, double t)
{
	uint32_t i = (uint32_t)t, j = i + 1 < rows ? i + 1 : i;
	double a = w_at(w, lane, tensor, first + (size_t)i * cols + col),
	       b = w_at(w, lane, tensor, first + (size_t)j * cols + col);

	return a + (t - i) * (b - a);
}

/* f[rank] of one row: k as cached. */
static inline void coefs64(const struct weights *w, uint32_t lane, const float *k, const float *v, uint32_t pos,
			   double *f)
{
	const struct weights_header *h = &w->h;
	double x[1024], y[1024], t;

	for (uint32_t i = 0; i < h->k_dim; i++)
		y[i] = k[i];
	unrotate64(y, h, pos);
	dense64(x, y, w, lane, KVP_WK, h->k_dim, h->proj);
	norm64(x, w, lane, KVP_GK, h->proj, false);
	for (uint32_t i = 0; i < h->v_dim; i++)
		y[i] = v[i];
	dense64(x + h->proj, y, w, lane, KVP_WV, h->v_dim, h->proj);
	norm64(x + h->proj, w, lane, KVP_GV, h->proj, false);
	t = h->pos_kind == WEIGHTS_POS_LOG2 ? knot64(h->octave, h->pos_rows, pos)
					    : (double)(pos < h->pos_rows ? pos : h->pos_rows - 1);
	for (uint32_t i = 0; i < h->pos_dim; i++)
		x[2 * h->proj + i] = between64(w, lane, KVP_POS, 0, h->pos_dim, h->pos_rows, i, t);
	norm64(x + 2 * h->proj, w, lane, KVP_GP, h->pos_dim, false);
	dense64(y, x, w, lane, KVP_W1, 2 * h->proj + h->pos_dim, h->hidden);
	norm64(y, w, lane, KVP_G1, h->hidden, true);
	dense64(x, y, w, lane, KVP_W2, h->hidden, h->hidden);
	norm64(x, w, lane, KVP_G2, h->hidden, true);
	dense64(f, x, w, lane, KVP_W3, h->hidden, h->rank);
}

/* phi_r for the row at pos of a sequence of n. */
static inline double phi64(const struct weights *w, uint32_t lane, uint32_t r, uint32_t pos, uint32_t n)
{
	uint32_t rows = w->h.dist_rows;
	double t = knot64(w->h.octave, rows, n - 1 - pos), lambda = fmin(fmax(log2(n), 8), 14) - 11;

	return between64(w, lane, KVP_DIST, 2 * r * rows, 1, rows, 0, t) +
	       lambda * between64(w, lane, KVP_DIST, (2 * r + 1) * rows, 1, rows, 0, t);
}

static inline double combine64(const struct weights *w, uint32_t lane, const double *f, uint32_t pos,
			       uint32_t n)
{
	if (!w->h.dist_rows)
		return f[0];
	return f[0] + phi64(w, lane, 0, pos, n) + (w->h.rank > 1 ? f[1] * phi64(w, lane, 1, pos, n) : 0);
}

static inline double score64(const struct weights *w, uint32_t lane, const float *k, const float *v,
			     uint32_t pos, uint32_t n)
{
	double f[KVP_RANK];

	coefs64(w, lane, k, v, pos, f);
	return combine64(w, lane, f, pos, n);
}
