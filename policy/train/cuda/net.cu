/* SPDX-License-Identifier: MIT */
/*
 * The net forwards and backwards around its products: LayerNorm with bias, gain,
 * shift and SiLU in one pass over a row, the outgoing layer and the position's part in the
 * same passes. Backwards, z is normalised again rather than kept, the gradient overwrites it, and
 * gradients of columns are summed by COLUMN_BLOCKS blocks of a lane, then over those.
 */
#include "policy/train/cuda/norm.cuh"

#include <cuda_fp16.h>

struct norm_of {
	uint32_t bias, gain, shift, width;
};

static __device__ inline float4 widen(uint32_t lo, uint32_t hi)
{
	return make_float4(__half2float(__ushort_as_half((unsigned short)lo)),
			   __half2float(__ushort_as_half((unsigned short)(lo >> 16))),
			   __half2float(__ushort_as_half((unsigned short)hi)),
			   __half2float(__ushort_as_half((unsigned short)(hi >> 16))));
}

/* kv[row] = k, v of the set's row, 8 elements a thread; zeros in the padding. grid (pieces / BLOCK, lanes) */
static __global__ void gather(struct net net, struct rows rows, uint64_t set_rows, const uint16_t *k,
			      const uint16_t *v, float *kv)
{
	uint32_t pieces = (net.kd + net.vd) / 8, lane = blockIdx.y;
	uint64_t i = (uint64_t)blockIdx.x * BLOCK + threadIdx.x;
	uint32_t r = (uint32_t)(i / pieces), c = (uint32_t)(i % pieces) * 8;
	uint4 raw = make_uint4(0, 0, 0, 0);
	float4 *to;

	if (r >= rows.padded)
		return;
	if (r < rows.count) {
		uint64_t from = (uint64_t)lane * set_rows + rows.set_row[r];

		raw = *(const uint4 *)(c < net.kd ? k + from * net.kd + c : v + from * net.vd + (c - net.kd));
	}
	to = (float4 *)(kv + ((uint64_t)lane * rows.padded + r) * (net.kd + net.vd) + c);
	to[0] = widen(raw.x, raw.y);
	to[1] = widen(raw.z, raw.w);
}

template <int N, bool SILU>
static __global__ void norm_forward(struct net net, const float *params, struct norm_of p, uint32_t rows,
				    const float *z, uint32_t zld, float *y, uint32_t yld)
{
	uint32_t lane = blockIdx.y;
	float bias[N], gain[N], shift[N];

	params += (size_t)lane * net.stride;
	load_row(bias, params + p.bias, p.width);
	load_row(gain, params + p.gain, p.width);
	load_row(shift, params + p.shift, p.width);
	EACH_ROW(r, rows)
	{
		size_t row = (size_t)lane * rows + r;
		float h[N];

		load_row(h, z + row * zld, p.width);
#pragma unroll
		for (int j = 0; j < N; j++)
			h[j] += bias[j];
		normalise(h, p.width);
		EACH(j, i, p.width)
		{
			float x = h[j] * gain[j] + shift[j];

			y[row * yld + i] = rounded(SILU ? x * sigmoid(x) : x, net.round);
		}
	}
}

/* dy: gradient of norm_forward's y; z becomes its own gradient. part: [3][width], gain, shift, bias. */
template <int N, bool SILU>
static __global__ void norm_backward(struct net net, const float *params, struct norm_of p, uint32_t rows,
				     float *z, uint32_t zld, const float *dy, uint32_t dyld, float *part)
{
	SHARED(float, sh);
	uint32_t lane = blockIdx.y;
	float bias[N], gain[N], shift[N], dgain[N] = {}, dshift[N] = {}, dbias[N] = {};

	params += (size_t)lane * net.stride;
	load_row(bias, params + p.bias, p.width);
	load_row(gain, params + p.gain, p.width);
	load_row(shift, params + p.shift, p.width);
	EACH_ROW(r, rows)
	{
		size_t row = (size_t)lane * rows + r;
		float h[N], d[N], scale;

		load_row(h, z + row * zld, p.width);
		load_row(d, dy + row * dyld, p.width);
#pragma unroll
		for (int j = 0; j < N; j++)
			h[j] += bias[j];
		scale = normalise(h, p.width);
#pragma unroll
		for (int j = 0; j < N; j++) {
			if (SILU) {
				float x = h[j] * gain[j] + shift[j], s = sigmoid(x);

				d[j] *= s * (1.0f + x * (1.0f - s));
			}
			dgain[j] += d[j] * h[j];
			dshift[j] += d[j];
			d[j] *= gain[j];
		}
		normalise_back(d, h, scale, p.width);
		EACH(j, i, p.width)
		{
			dbias[j] += d[j];
			z[row * zld + i] = rounded(d[j], net.round);
		}
	}
	part += ((size_t)lane * COLUMN_BLOCKS + blockIdx.x) * 3 * p.width;
	add_columns(dgain, p.width, sh, part);
	add_columns(dshift, p.width, sh, part + p.width);
	add_columns(dbias, p.width, sh, part + 2 * p.width);
}

/* Element i of the position's vector, before its LayerNorm. */
static __device__ inline float embedded(const struct net &net, const float *pos, uint32_t knot, float frac,
					uint32_t i)
{
	uint32_t next = knot + 1 < net.pos_knots ? knot + 1 : knot;

	return (1.0f - frac) * pos[(size_t)knot * net.pos_dim + i] + frac * pos[(size_t)next * net.pos_dim + i];
}

template <int N>
static __device__ inline float load_embedded(float (&e)[N], const struct net &net, const float *params,
					     const struct rows &rows, uint32_t r)
{
	bool real = r < rows.count;
	uint32_t knot = real ? rows.pos_knot[r] : 0;
	float frac = real ? rows.pos_frac[r] : 0;

#pragma unroll
	for (int j = 0; j < N; j++) {
		uint32_t i = j * WARP + warp_lane();

		e[j] = i < net.pos_dim ? embedded(net, params + net.off[KVP_POS], knot, frac, i) : 0;
	}
	return normalise(e, net.pos_dim);
}

static __global__ void embed_forward(struct net net, const float *params, struct rows rows, float *x)
{
	constexpr int N = 2;
	uint32_t lane = blockIdx.y;
	float gain[N], shift[N], e[N];

	params += (size_t)lane * net.stride;
	load_row(gain, params + net.off[KVP_GP], net.pos_dim);
	load_row(shift, params + net.off[KVP_OP], net.pos_dim);
	EACH_ROW(r, rows.padded)
	{
		float *to = x + ((size_t)lane * rows.padded + r) * net.in + 2 * net.proj;

		load_embedded(e, net, params, rows, r);
		EACH(j, i, net.pos_dim)
		to[i] = rounded(e[j] * gain[j] + shift[j], net.round);
	}
}

/* x's last pos_dim columns, the gradient of the LayerNorm, become that of the position's vector. part:
 * [2][pos_dim] */
static __global__ void embed_backward(struct net net, const float *params, struct rows rows, float *x,
				      float *part)
{
	SHARED(float, sh);
	constexpr int N = 2;
	uint32_t lane = blockIdx.y;
	float gain[N], dgain[N] = {}, dshift[N] = {}, e[N], d[N], scale;

	params += (size_t)lane * net.stride;
	load_row(gain, params + net.off[KVP_GP], net.pos_dim);
	EACH_ROW(r, rows.count)
	{
		float *dx = x + ((size_t)lane * rows.padded + r) * net.in + 2 * net.proj;

		scale = load_embedded(e, net, params, rows, r);
		load_row(d, dx, net.pos_dim);
#pragma unroll
		for (int j = 0; j < N; j++) {
			dgain[j] += d[j] * e[j];
			dshift[j] += d[j];
			d[j] *= gain[j];
		}
		normalise_back(d, e, scale, net.pos_dim);
		EACH(j, i, net.pos_dim)
		dx[i] = d[j];
	}
	part += ((size_t)lane * COLUMN_BLOCKS + blockIdx.x) * 2 * net.pos_dim;
	add_columns(dgain, net.pos_dim, sh, part);
	add_columns(dshift, net.pos_dim, sh, part + net.pos_dim);
}

static void norm_forwards(struct cuda_backend *b, const float *params, struct norm_of p, bool silu,
			  const float *z, uint32_t zld, float *y, uint32_t yld, uint32_t lanes)
{
	uint32_t rows = b->rows.padded;

	if (silu)
		FOR_WIDTH(p.width, LAUNCH(b, (norm_forward<N, true>), COLUMN_GRID(lanes), 0, b->net, params, p,
					  rows, z, zld, y, yld));
	else
		FOR_WIDTH(p.width, LAUNCH(b, (norm_forward<N, false>), COLUMN_GRID(lanes), 0, b->net, params, p,
					  rows, z, zld, y, yld));
}

static void norm_backwards(struct cuda_backend *b, const float *params, float *grad, struct norm_of p,
			   bool silu, float *z, uint32_t zld, const float *dy, uint32_t dyld, uint32_t lanes)
{
	uint32_t rows = b->rows.padded, w = p.width;
	size_t shared = WARPS * w * sizeof(float);
	struct segments to = {{{0, p.gain, w}, {w, p.shift, w}, {2 * w, p.bias, w}}, 3};

	if (silu)
		FOR_WIDTH(w, LAUNCH(b, (norm_backward<N, true>), COLUMN_GRID(lanes), shared, b->net, params, p,
				    rows, z, zld, dy, dyld, b->part));
	else
		FOR_WIDTH(w, LAUNCH(b, (norm_backward<N, false>), COLUMN_GRID(lanes), shared, b->net, params, p,
				    rows, z, zld, dy, dyld, b->part));
	sum_parts(b, b->part, COLUMN_BLOCKS, 3 * w, grad, &to, lanes);
}

#define NORM_OF(n, t, width)                                                                                   \
	{                                                                                                      \
		(n)->off[KVP_B##t], (n)->off[KVP_G##t], (n)->off[KVP_O##t], width                              \
	}

void net_forward(struct cuda_backend *b, const float *params, uint32_t lane0, uint32_t lanes)
{
	const struct net *n = &b->net;
	uint32_t dims = n->kd + n->vd;
	struct norm_of k = NORM_OF(n, K, n->proj), v = NORM_OF(n, V, n->proj), one = NORM_OF(n, 1, n->hidden);

	params += (size_t)lane0 * n->stride;
	if (n->kind == WEIGHTS_POSITION) {
		score_position(b, params, lanes);
		return;
	}
	LAUNCH(b, gather, dim3((uint32_t)(((uint64_t)b->rows.padded * (dims / 8) + BLOCK - 1) / BLOCK), lanes),
	       0, *n, b->rows, b->set_rows, b->k + lane0 * b->set_rows * n->kd,
	       b->v + lane0 * b->set_rows * n->vd, b->kv);
	product_forward(b, params + n->off[KVP_WK], n->kd, n->proj, b->kv, dims, b->z0, 2 * n->proj, lanes);
	product_forward(b, params + n->off[KVP_WV], n->vd, n->proj, b->kv + n->kd, dims, b->z0 + n->proj,
			2 * n->proj, lanes);
	norm_forwards(b, params, k, false, b->z0, 2 * n->proj, b->x, n->in, lanes);
	norm_forwards(b, params, v, false, b->z0 + n->proj, 2 * n->proj, b->x + n->proj, n->in, lanes);
	LAUNCH(b, embed_forward, COLUMN_GRID(lanes), 0, *n, params, b->rows, b->x);
	product_forward(b, params + n->off[KVP_W1], n->in, n->hidden, b->x, n->in, b->z1, n->hidden, lanes);
	norm_forwards(b, params, one, true, b->z1, n->hidden, b->h1, n->hidden, lanes);
	product_forward(b, params + n->off[KVP_W2], n->hidden, n->hidden, b->h1, n->hidden, b->z2, n->hidden,
			lanes);
	score_forwards(b, params, lanes);
}

static void embed_backwards(struct cuda_backend *b, const float *params, float *grad, uint32_t lanes)
{
	const struct net *n = &b->net;
	uint32_t w = n->pos_dim;
	struct segments to = {{{0, n->off[KVP_GP], w}, {w, n->off[KVP_OP], w}}, 2};

	LAUNCH(b, embed_backward, COLUMN_GRID(lanes), WARPS * w * sizeof(float), *n, params, b->rows, b->x,
	       b->part);
	sum_parts(b, b->part, COLUMN_BLOCKS, 2 * w, grad, &to, lanes);
	embed_gradient(b, grad, lanes);
}

void net_backward(struct cuda_backend *b, uint32_t lane0, uint32_t lanes)
{
	const struct net *n = &b->net;
	uint32_t dims = n->kd + n->vd;
	struct norm_of k = NORM_OF(n, K, n->proj), v = NORM_OF(n, V, n->proj), one = NORM_OF(n, 1, n->hidden);
	const float *params = b->param[TRAIN_PARAMS] + (size_t)lane0 * n->stride;
	float *grad = b->grad + (size_t)lane0 * n->stride;

	tables_gradient(b, grad, lanes);
	if (n->kind == WEIGHTS_POSITION)
		return;
	score_backwards(b, params, grad, lanes);
	product_weight(b, grad + n->off[KVP_W2], n->hidden, n->hidden, b->h1, n->hidden, b->z2, n->hidden,
		       lanes);
	product_input(b, params + n->off[KVP_W2], n->hidden, n->hidden, b->z2, n->hidden, b->h1, n->hidden,
		      lanes);
	norm_backwards(b, params, grad, one, true, b->z1, n->hidden, b->h1, n->hidden, lanes);
	product_weight(b, grad + n->off[KVP_W1], n->in, n->hidden, b->x, n->in, b->z1, n->hidden, lanes);
	product_input(b, params + n->off[KVP_W1], n->in, n->hidden, b->z1, n->hidden, b->x, n->in, lanes);
	norm_backwards(b, params, grad, k, false, b->z0, 2 * n->proj, b->x, n->in, lanes);
	norm_backwards(b, params, grad, v, false, b->z0 + n->proj, 2 * n->proj, b->x + n->proj, n->in, lanes);
	embed_backwards(b, params, grad, lanes);
	product_weight(b, grad + n->off[KVP_WK], n->kd, n->proj, b->kv, dims, b->z0, 2 * n->proj, lanes);
	product_weight(b, grad + n->off[KVP_WV], n->vd, n->proj, b->kv + n->kd, dims, b->z0 + n->proj,
		       2 * n->proj, lanes);
}

size_t net_part_floats(const struct train_opts *o, const struct net *n)
{
	size_t tables = tables_part_floats(o, n), most = 0;
	const size_t need[] = {
		(size_t)SPLITS * n->in * n->hidden,
		(size_t)SPLITS * n->hidden * n->hidden,
		(size_t)SPLITS * n->proj * (n->kd > n->vd ? n->kd : n->vd),
		(size_t)COLUMN_BLOCKS * (5 * n->hidden + 2),
		(size_t)COLUMN_BLOCKS * 3 * n->proj,
		tables,
	};

	for (size_t x : need)
		most = x > most ? x : most;
	return most;
}
