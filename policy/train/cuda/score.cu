/* SPDX-License-Identifier: MIT */
/*
 * The end of the net: LayerNorm and SiLU of the last hidden layer, W3 and the distance tables
 * to a score in one pass, and back in another. kind POSITION has nothing but tables.
 */
#include "policy/train/cuda/norm.cuh"

/* Between knots of a table. */
static __device__ inline float between(const float *table, uint32_t knots, uint32_t knot, float frac)
{
	return (1.0f - frac) * table[knot] + frac * table[knot + 1 < knots ? knot + 1 : knot];
}

/* s, and for the backward pass f_1 and phi_1. */
template <int N>
static __global__ void score_forward(struct net net, const float *params, struct rows rows, const float *z,
				     float *s, float *f1, float *phi1)
{
	uint32_t lane = blockIdx.y, w = net.hidden;
	float bias[N], gain[N], shift[N], w0[N], w1[N];
	const float *dist;

	params += (size_t)lane * net.stride;
	dist = params + net.off[KVP_DIST];
	load_row(bias, params + net.off[KVP_B2], w);
	load_row(gain, params + net.off[KVP_G2], w);
	load_row(shift, params + net.off[KVP_O2], w);
	load_row(w0, params + net.off[KVP_W3], w);
	load_row(w1, params + net.off[KVP_W3] + (net.rank - 1) * w, w);
	EACH_ROW(r, rows.count)
	{
		size_t row = (size_t)lane * rows.padded + r;
		float h[N], a = 0, c = 0, phi[2] = {0, 0};

		load_row(h, z + row * w, w);
#pragma unroll
		for (int j = 0; j < N; j++)
			h[j] += bias[j];
		normalise(h, w);
#pragma unroll
		for (int j = 0; j < N; j++) {
			float x = h[j] * gain[j] + shift[j];

			x *= sigmoid(x);
			a += x * w0[j];
			c += x * w1[j];
		}
		a = warp_sum(a);
		c = warp_sum(c);
		if (warp_lane() > 0)
			continue;
		a += params[net.off[KVP_B3]];
		c = net.rank > 1 ? c + params[net.off[KVP_B3] + 1] : 0;
		for (uint32_t i = 0; i < net.dist_tables / 2; i++)
			phi[i] = between(dist + 2 * i * net.dist_knots, net.dist_knots, rows.dist_knot[r],
					 rows.dist_frac[r]) +
				 rows.lambda[r] * between(dist + (2 * i + 1) * net.dist_knots, net.dist_knots,
							  rows.dist_knot[r], rows.dist_frac[r]);
		s[row] = a + phi[0] + c * phi[1];
		f1[row] = c;
		phi1[row] = phi[1];
	}
}

/* z becomes its gradient. part: [5][hidden] gain, shift, bias, W3's rows, then b3[2]. */
template <int N>
static __global__ void score_backward(struct net net, const float *params, struct rows rows, float *z,
				      const float *ds, const float *phi1, float *part)
{
	SHARED(float, sh);
	uint32_t lane = blockIdx.y, w = net.hidden;
	float bias[N], gain[N], shift[N], w0[N], w1[N];
	float dgain[N] = {}, dshift[N] = {}, dbias[N] = {}, dw0[N] = {}, dw1[N] = {}, db[1] = {}, dc[1] = {};

	params += (size_t)lane * net.stride;
	load_row(bias, params + net.off[KVP_B2], w);
	load_row(gain, params + net.off[KVP_G2], w);
	load_row(shift, params + net.off[KVP_O2], w);
	load_row(w0, params + net.off[KVP_W3], w);
	load_row(w1, params + net.off[KVP_W3] + (net.rank - 1) * w, w);
	EACH_ROW(r, rows.padded)
	{
		size_t row = (size_t)lane * rows.padded + r;
		bool real = r < rows.count;
		float a = real ? ds[row] : 0, c = real && net.rank > 1 ? a * phi1[row] : 0;
		float h[N], d[N], scale;

		load_row(h, z + row * w, w);
#pragma unroll
		for (int j = 0; j < N; j++)
			h[j] += bias[j];
		scale = normalise(h, w);
		db[0] += a;
		dc[0] += c;
#pragma unroll
		for (int j = 0; j < N; j++) {
			float x = h[j] * gain[j] + shift[j], q = sigmoid(x);

			dw0[j] += a * x * q;
			dw1[j] += c * x * q;
			d[j] = (a * w0[j] + c * w1[j]) * q * (1.0f + x * (1.0f - q));
			dgain[j] += d[j] * h[j];
			dshift[j] += d[j];
			d[j] *= gain[j];
		}
		normalise_back(d, h, scale, w);
		EACH(j, i, w)
		{
			dbias[j] += d[j];
			z[row * w + i] = rounded(d[j], net.round);
		}
	}
	part += ((size_t)lane * COLUMN_BLOCKS + blockIdx.x) * (5 * w + 2);
	add_columns(dgain, w, sh, part);
	add_columns(dshift, w, sh, part + w);
	add_columns(dbias, w, sh, part + 2 * w);
	add_columns(dw0, w, sh, part + 3 * w);
	add_columns(dw1, w, sh, part + 4 * w);
	add_columns(db, 1, sh, part + 5 * w);
	add_columns(dc, 1, sh, part + 5 * w + 1);
}

/* kind POSITION. grid (rows / BLOCK, lanes) */
static __global__ void position_forward(struct net net, const float *params, struct rows rows, float *s)
{
	uint32_t r = blockIdx.x * BLOCK + threadIdx.x, lane = blockIdx.y;

	if (r >= rows.count)
		return;
	params += (size_t)lane * net.stride;
	s[(size_t)lane * rows.padded + r] =
		between(params + net.off[POSITION_DIST], net.dist_knots, rows.dist_knot[r], rows.dist_frac[r]) +
		between(params + net.off[POSITION_INDEX], net.pos_knots, rows.pos_knot[r], rows.pos_frac[r]);
}

void score_position(struct cuda_backend *b, const float *params, uint32_t lanes)
{
	LAUNCH(b, position_forward, dim3((b->rows.count + BLOCK - 1) / BLOCK, lanes), 0, b->net, params,
	       b->rows, b->s);
}

void score_forwards(struct cuda_backend *b, const float *params, uint32_t lanes)
{
	FOR_WIDTH(b->net.hidden, LAUNCH(b, score_forward<N>, COLUMN_GRID(lanes), 0, b->net, params, b->rows,
					b->z2, b->s, b->f1, b->phi1));
}

void score_backwards(struct cuda_backend *b, const float *params, float *grad, uint32_t lanes)
{
	const struct net *n = &b->net;
	uint32_t w = n->hidden;
	struct segments to = {{{0, n->off[KVP_G2], w},
			       {w, n->off[KVP_O2], w},
			       {2 * w, n->off[KVP_B2], w},
			       {3 * w, n->off[KVP_W3], n->rank * w},
			       {5 * w, n->off[KVP_B3], n->rank}},
			      5};

	FOR_WIDTH(w, LAUNCH(b, score_backward<N>, COLUMN_GRID(lanes), WARPS * w * sizeof(float), *n, params,
			    b->rows, b->z2, b->ds, b->phi1, b->part));
	sum_parts(b, b->part, COLUMN_BLOCKS, 5 * w + 2, grad, &to, lanes);
}
