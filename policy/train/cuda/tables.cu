/* SPDX-License-Identifier: MIT */
/*
 * Gradients of what is looked up by position: the rows of a batch are sorted by
 * knot once, on the host, for all lanes (policy/train/cuda/batch.cu); a warp sums the rows
 * of an item, a thread the items of a knot and of the one below, always in the same order.
 */
#include "policy/train/cuda/device.cuh"

#define TABLES 4u

static __device__ inline uint32_t item_of_warp(void)
{
	return blockIdx.x * WARPS + threadIdx.x / WARP;
}

/*
 * part[item][side][table], side 0 for the knot and 1 for the next: the distance tables' gradient is
 * ds (1, lambda, f_1, f_1 lambda) times 1 - frac or frac. grid (items / WARPS, lanes)
 */
static __global__ void sum_tables(struct rows rows, struct buckets by, const float *frac, const float *ds,
				  const float *f1, uint32_t tables, float *part)
{
	uint32_t item = item_of_warp(), lane = blockIdx.y;
	float sum[2][TABLES] = {};

	if (item >= by.items)
		return;
	for (uint32_t i = by.first[item] + warp_lane(); i < by.first[item + 1]; i += WARP) {
		uint32_t r = by.order[i];
		size_t row = (size_t)lane * rows.padded + r;
		float d = ds[row], c[TABLES] = {d, 0, 0, 0}, f = frac[r];

		if (tables > 1)
			c[1] = d * rows.lambda[r];
		if (tables > 2) {
			c[2] = d * f1[row];
			c[3] = c[2] * rows.lambda[r];
		}
#pragma unroll
		for (uint32_t t = 0; t < TABLES; t++) {
			sum[0][t] += (1.0f - f) * c[t];
			sum[1][t] += f * c[t];
		}
	}
	part += ((size_t)lane * by.items + item) * 2 * tables;
#pragma unroll
	for (uint32_t side = 0; side < 2; side++)
#pragma unroll
		for (uint32_t t = 0; t < TABLES; t++) {
			float total = warp_sum(sum[side][t]);

			if (warp_lane() == 0 && t < tables)
				part[side * tables + t] = total;
		}
}

/* part[item][side][dim] of the position's vectors: x's last pos_dim columns hold the rows' gradients. */
static __global__ void sum_embedded(struct net net, struct rows rows, const float *x, float *part)
{
	struct buckets by = rows.pos;
	uint32_t item = item_of_warp(), lane = blockIdx.y, dims = net.pos_dim;
	/* Up to 16 dimensions: two rows at a time. */
	uint32_t at_once = dims <= WARP / 2 ? 2 : 1, sub = at_once == 2 ? warp_lane() / (WARP / 2) : 0;
	uint32_t dim = at_once == 2 ? warp_lane() % (WARP / 2) : warp_lane();
	float sum[2][2] = {};

	if (item >= by.items)
		return;
	for (uint32_t i = by.first[item] + sub; i < by.first[item + 1]; i += at_once) {
		uint32_t r = by.order[i];
		const float *d = x + ((size_t)lane * rows.padded + r) * net.in + 2 * net.proj;
		float f = rows.pos_frac[r];

#pragma unroll
		for (uint32_t j = 0; j < 2; j++)
			if (dim + j * WARP < dims) {
				sum[0][j] += (1.0f - f) * d[dim + j * WARP];
				sum[1][j] += f * d[dim + j * WARP];
			}
	}
	part += ((size_t)lane * by.items + item) * 2 * dims;
#pragma unroll
	for (uint32_t side = 0; side < 2; side++)
#pragma unroll
		for (uint32_t j = 0; j < 2; j++) {
			float total = sum[side][j], other = __shfl_xor_sync(0xffffffffu, total, WARP / 2);

			if (at_once == 2)
				total += other;
			if (sub == 0 && dim + j * WARP < dims)
				part[side * dims + dim + j * WARP] = total;
		}
}

/* grad[dst + knot * knot_ld + column * column_ld]. grid (knots * columns / BLOCK, lanes) */
static __global__ void sum_knots(struct net net, struct buckets by, const float *part, uint32_t columns,
				 float *grad, uint32_t knot_ld, uint32_t column_ld)
{
	uint32_t i = blockIdx.x * BLOCK + threadIdx.x, lane = blockIdx.y, knot = i / columns, c = i % columns;
	float sum = 0;

	if (knot >= by.knots)
		return;
	part += (size_t)lane * by.items * 2 * columns + c;
	for (uint32_t t = by.knot[knot]; t < by.knot[knot + 1]; t++)
		sum += part[(size_t)t * 2 * columns];
	if (knot > 0)
		for (uint32_t t = by.knot[knot - 1]; t < by.knot[knot]; t++)
			sum += part[(size_t)t * 2 * columns + columns];
	grad[(size_t)lane * net.stride + knot * knot_ld + c * column_ld] = sum;
}

static void knots_gradient(struct cuda_backend *b, const struct buckets *by, uint32_t columns, float *grad,
			   uint32_t knot_ld, uint32_t column_ld, uint32_t lanes)
{
	LAUNCH(b, sum_knots, dim3((by->knots * columns + BLOCK - 1) / BLOCK, lanes), 0, b->net, *by, b->part,
	       columns, grad, knot_ld, column_ld);
}

static void table_gradient(struct cuda_backend *b, const struct buckets *by, const float *frac, uint32_t tables,
			   float *grad, uint32_t lanes)
{
	LAUNCH(b, sum_tables, dim3((by->items + WARPS - 1) / WARPS, lanes), 0, b->rows, *by, frac, b->ds, b->f1,
	       tables, b->part);
	knots_gradient(b, by, tables, grad, 1, by->knots, lanes);
}

void tables_gradient(struct cuda_backend *b, float *grad, uint32_t lanes)
{
	const struct net *n = &b->net;

	if (n->kind == WEIGHTS_POSITION) {
		table_gradient(b, &b->rows.dist, b->rows.dist_frac, 1, grad + n->off[POSITION_DIST], lanes);
		table_gradient(b, &b->rows.pos, b->rows.pos_frac, 1, grad + n->off[POSITION_INDEX], lanes);
	} else if (n->dist_knots > 0) {
		table_gradient(b, &b->rows.dist, b->rows.dist_frac, n->dist_tables, grad + n->off[KVP_DIST],
			       lanes);
	}
}

void embed_gradient(struct cuda_backend *b, float *grad, uint32_t lanes)
{
	const struct net *n = &b->net;
	const struct buckets *by = &b->rows.pos;

	LAUNCH(b, sum_embedded, dim3((by->items + WARPS - 1) / WARPS, lanes), 0, *n, b->rows, b->x, b->part);
	knots_gradient(b, by, n->pos_dim, grad + n->off[KVP_POS], n->pos_dim, 1, lanes);
}

/* Items: full ones, and at most one more for each knot that has rows. */
size_t tables_part_floats(const struct train_opts *o, const struct net *n)
{
	size_t rows = (size_t)o->batch * o->rows, widest = n->pos_dim > TABLES ? n->pos_dim : TABLES;
	size_t knots = n->pos_knots > n->dist_knots ? n->pos_knots : n->dist_knots;

	return (rows / ITEM_ROWS + (knots < rows ? knots : rows)) * 2 * widest;
}
