/* SPDX-License-Identifier: MIT */
/*
 * What rankings cost: one block per unit and lane. Definitions and limits as in
 * policy/train/backend.h. Sorting is bitonic in shared memory; the exact objective
 * goes over all pairs with one reciprocal each: with E = exp(s - middle), clamped to exp(+-40),
 *    sigma(s_i - s_j) = E_i r     sigma'(s_a - s_j) = E_a E_j r^2     r = 1 / (E_i + E_j)
 */
#include "policy/train/cuda/device.cuh"

#define CLAMP 40.0f
#define TILE 4u /* rows whose sums a thread keeps in registers */

/* C*, C_rand and whether the unit counts. shared: keys. grid (units, lanes) */
static __global__ void unit_costs(struct rows rows, uint64_t set_units, const float *u, uint32_t weighting,
				  uint32_t batch, struct unit_cost *cost)
{
	SHARED(uint64_t, key);
	__shared__ double sums[WARPS];
	uint32_t unit = blockIdx.x, lane = blockIdx.y, n = rows.n[unit], m = power_of_two(n);
	const uint32_t *at = rows.u_row + rows.start[unit];
	double total = 0, weights = 0, best = 0;

	u += (size_t)lane * set_units;
	for (uint32_t i = threadIdx.x; i < m; i += BLOCK)
		key[i] = i < n ? (uint64_t)falling_key(u[at[i]]) << 32 | i : ~0ull;
	sort_keys(key, m);
	for (uint32_t i = threadIdx.x; i < n; i += BLOCK) {
		double w = weight_of(weighting, i + 1, n), x = (double)u[at[(uint32_t)key[i]]];

		total += x;
		weights += w;
		best += w * x;
	}
	total = block_sum(total, sums);
	weights = block_sum(weights, sums);
	best = block_sum(best, sums);
	if (threadIdx.x == 0) {
		struct unit_cost c = {best, weights / n * total, (float)(total / n), 0};

		c.counted = total >= 1e-6 * n && c.random - c.best >= 1e-6 * c.random;
		cost[(size_t)lane * batch + unit] = c;
	}
}

/* 1 / counted units of a lane. grid (lanes) */
static __global__ void count_units(uint32_t units, uint32_t batch, const struct unit_cost *cost,
				   double *inverse)
{
	__shared__ double sums[WARPS];
	double counted = 0;

	for (uint32_t i = threadIdx.x; i < units; i += BLOCK)
		counted += cost[(size_t)blockIdx.x * batch + i].counted;
	counted = block_sum(counted, sums);
	if (threadIdx.x == 0)
		inverse[blockIdx.x] = counted > 0 ? 1 / counted : 0;
}

/* Mean loss of a lane. grid (lanes) */
static __global__ void lane_loss(uint32_t units, uint32_t batch, const double *unit_loss, const double *inverse,
				 float *loss)
{
	__shared__ double sums[WARPS];
	double sum = 0;

	for (uint32_t i = threadIdx.x; i < units; i += BLOCK)
		sum += unit_loss[(size_t)blockIdx.x * batch + i];
	sum = block_sum(sum, sums);
	if (threadIdx.x == 0)
		loss[blockIdx.x] = (float)(sum * inverse[blockIdx.x]);
}

/* The middle of the range of s, for the whole block. sh: 2 WARPS */
static __device__ float middle(const float *s, uint32_t n, float *sh)
{
	float low = s[0], high = s[0];

	for (uint32_t i = threadIdx.x; i < n; i += BLOCK) {
		low = fminf(low, s[i]);
		high = fmaxf(high, s[i]);
	}
	for (uint32_t d = WARP / 2; d; d >>= 1) {
		low = fminf(low, __shfl_xor_sync(0xffffffffu, low, d));
		high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, d));
	}
	if (warp_lane() == 0) {
		sh[threadIdx.x / WARP] = low;
		sh[WARPS + threadIdx.x / WARP] = high;
	}
	__syncthreads();
	for (uint32_t w = 0; w < WARPS; w++) {
		low = fminf(low, sh[w]);
		high = fmaxf(high, sh[WARPS + w]);
	}
	return low + (high - low) / 2;
}

/*
 * Rows `first`, first + BLOCK, ... against all n: rank[] = sum_i sigma(s_i - s_j), slope[] = sum_j (g_j - g_a)
 * sigma'(s_a - s_j). eg: {E, g}. Sums of 256 join the total, so that small terms are not lost.
 */
template <bool RANK, bool SLOPE>
static __device__ inline void pairs(const float2 *eg, uint32_t n, uint32_t first, float (&rank)[TILE],
				    float (&slope)[TILE])
{
	float2 own[TILE];

#pragma unroll
	for (uint32_t q = 0; q < TILE; q++) {
		uint32_t i = first + q * BLOCK;

		own[q] = i < n ? eg[i] : make_float2(1, 0);
		rank[q] = slope[q] = 0;
	}
	for (uint32_t from = 0; from < n; from += 256) {
		uint32_t to = from + 256 < n ? from + 256 : n;
		float a[TILE] = {}, b[TILE] = {};

#pragma unroll 4
		for (uint32_t i = from; i < to; i++) {
			float2 x = eg[i];

#pragma unroll
			for (uint32_t q = 0; q < TILE; q++) {
				float r = __fdividef(1.0f, x.x + own[q].x), p = x.x * r;

				if (RANK)
					a[q] += p;
				if (SLOPE)
					b[q] += (x.y - own[q].y) * (p * r);
			}
		}
#pragma unroll
		for (uint32_t q = 0; q < TILE; q++) {
			rank[q] += a[q];
			slope[q] += b[q];
		}
	}
#pragma unroll
	for (uint32_t q = 0; q < TILE; q++)
		slope[q] *= own[q].x;
}

struct objective_args {
	uint32_t reward, weighting, batch;
	uint64_t set_units;
	const float *u;
	const struct unit_cost *cost;
	const double *inverse;
};

/* d loss / d cost */
static __device__ inline double loss_slope(const struct unit_cost *c, uint32_t reward, double cost)
{
	if (reward == TRAIN_REGRET)
		return 1 / (c->random - c->best);
	return ratio_of(c, cost) < 200 ? 1 / (c->best > 1e-8 ? c->best : 1e-8) : 0;
}

static __device__ inline float weight_slope(uint32_t weighting, float rank, uint32_t n)
{
	if (weighting == TRAIN_UNIFORM)
		return 1;
	return 1 / ((rank + 0.02f * n) * 3.9318256f); /* log(1 + 1 / 0.02) */
}

/* shared: float2[n]. ds in rows of [lane][padded]. grid (units, lanes) */
static __global__ void exact(struct rows rows, struct objective_args o, const float *s, float *ds,
			     double *unit_loss)
{
	SHARED(float2, eg);
	__shared__ double sums[WARPS];
	__shared__ float range[2 * WARPS];
	uint32_t unit = blockIdx.x, lane = blockIdx.y, n = rows.n[unit];
	const uint32_t *at = rows.u_row + rows.start[unit];
	struct unit_cost c = o.cost[(size_t)lane * o.batch + unit];
	bool uniform = o.weighting == TRAIN_UNIFORM;
	float rank[TILE], slope[TILE], mid;
	double cost = 0, scale;

	s += (size_t)lane * rows.padded + rows.start[unit];
	ds += (size_t)lane * rows.padded + rows.start[unit];
	o.u += (size_t)lane * o.set_units;
	if (!c.counted) {
		for (uint32_t i = threadIdx.x; i < n; i += BLOCK)
			ds[i] = 0;
		if (threadIdx.x == 0)
			unit_loss[(size_t)lane * o.batch + unit] = 0;
		return;
	}
	mid = middle(s, n, range);
	for (uint32_t i = threadIdx.x; i < n; i += BLOCK) {
		float x = s[i] - mid; /* not fminf() and fmaxf(): NaN must stay NaN */

		x = x > CLAMP ? CLAMP : x < -CLAMP ? -CLAMP : x;
		eg[i] = make_float2(expf(x), o.u[at[i]]);
	}
	__syncthreads();
	for (uint32_t first = threadIdx.x; first < n + threadIdx.x; first += TILE * BLOCK) {
		/* Uniform weights need no ranks first, so one pass over the pairs does both. */
		if (uniform)
			pairs<true, true>(eg, n, first, rank, slope);
		else
			pairs<true, false>(eg, n, first, rank, slope);
		for (uint32_t q = 0; q < TILE; q++) {
			uint32_t i = first + q * BLOCK;
			float expected = 0.5f + rank[q]; /* a row's pair with itself counted one half */

			if (i >= n)
				continue;
			cost += weight_of(o.weighting, (double)expected, n) * (double)eg[i].y;
			ds[i] = uniform ? slope[q] : eg[i].y * weight_slope(o.weighting, expected, n);
		}
	}
	cost = block_sum(cost, sums); /* in step: ds holds g now, or the gradient's sum */
	if (!uniform) {
		for (uint32_t i = threadIdx.x; i < n; i += BLOCK)
			eg[i].y = ds[i];
		__syncthreads();
		for (uint32_t first = threadIdx.x; first < n + threadIdx.x; first += TILE * BLOCK) {
			pairs<false, true>(eg, n, first, rank, slope);
			for (uint32_t q = 0; q < TILE; q++)
				if (first + q * BLOCK < n)
					ds[first + q * BLOCK] = slope[q];
		}
	}
	scale = loss_slope(&c, o.reward, cost) * o.inverse[lane];
	for (uint32_t i = threadIdx.x; i < n; i += BLOCK) /* a thread's own rows */
		ds[i] *= (float)scale;
	if (threadIdx.x == 0)
		unit_loss[(size_t)lane * o.batch + unit] = loss_of(&c, o.reward, cost);
}

/* grid (units, lanes) */
static __global__ void squared(struct rows rows, struct objective_args o, const float *s, float *ds,
			       double *unit_loss)
{
	__shared__ double sums[WARPS];
	uint32_t unit = blockIdx.x, lane = blockIdx.y, n = rows.n[unit];
	const uint32_t *at = rows.u_row + rows.start[unit];
	struct unit_cost c = o.cost[(size_t)lane * o.batch + unit];
	double loss = 0, inverse = o.inverse[lane];

	s += (size_t)lane * rows.padded + rows.start[unit];
	ds += (size_t)lane * rows.padded + rows.start[unit];
	o.u += (size_t)lane * o.set_units;
	for (uint32_t i = threadIdx.x; i < n; i += BLOCK) {
		double miss = c.counted ? (double)s[i] - (double)logf(o.u[at[i]] / c.mean + 1e-4f) : 0;

		loss += miss * miss;
		ds[i] = (float)(2 * miss / n * inverse);
	}
	loss = block_sum(loss, sums);
	if (threadIdx.x == 0)
		unit_loss[(size_t)lane * o.batch + unit] = loss / n;
}

/* Regret and ratio of the ranking by scores. shared: keys. grid (units, lanes) */
static __global__ void hard(struct rows rows, struct objective_args o, const float *s, double2 *out)
{
	SHARED(uint64_t, key);
	__shared__ double sums[WARPS];
	uint32_t unit = blockIdx.x, lane = blockIdx.y, n = rows.n[unit], m = power_of_two(n);
	const uint32_t *at = rows.u_row + rows.start[unit];
	struct unit_cost c = o.cost[(size_t)lane * o.batch + unit];
	double cost = 0;

	s += (size_t)lane * rows.padded + rows.start[unit];
	o.u += (size_t)lane * o.set_units;
	for (uint32_t i = threadIdx.x; i < m; i += BLOCK)
		key[i] = i < n ? (uint64_t)falling_key(s[i]) << 32 | i : ~0ull;
	sort_keys(key, m);
	for (uint32_t i = threadIdx.x; i < n; i += BLOCK)
		cost += weight_of(o.weighting, i + 1, n) * (double)o.u[at[(uint32_t)key[i]]];
	cost = block_sum(cost, sums);
	if (threadIdx.x == 0)
		out[(size_t)lane * o.batch + unit] =
			c.counted ? make_double2(regret_of(&c, cost), ratio_of(&c, cost)) : make_double2(0, 0);
}

static struct objective_args arguments(const struct cuda_backend *b, uint32_t lane0)
{
	return {b->o.reward, b->o.weighting, b->o.batch, b->set_units, b->u + (size_t)lane0 * b->set_units,
		b->cost,     b->inverse};
}

void objective_costs(struct cuda_backend *b, uint32_t lane0, uint32_t lanes)
{
	size_t keys = power_of_two(b->rows.most) * sizeof(uint64_t);

	LAUNCH(b, unit_costs, dim3(b->rows.units, lanes), keys, b->rows, b->set_units,
	       b->u + (size_t)lane0 * b->set_units, b->o.weighting, b->o.batch, b->cost);
	LAUNCH(b, count_units, dim3(lanes), 0, b->rows.units, b->o.batch, b->cost, b->inverse);
}

void objective_hard(struct cuda_backend *b, uint32_t lane0, uint32_t lanes)
{
	size_t keys = power_of_two(b->rows.most) * sizeof(uint64_t);

	LAUNCH(b, hard, dim3(b->rows.units, lanes), keys, b->rows, arguments(b, lane0), b->s, b->hard);
}

void objective_run(struct cuda_backend *b, uint64_t step, uint32_t lane0, uint32_t lanes)
{
	struct objective_args o = arguments(b, lane0);
	dim3 grid(b->rows.units, lanes);

	objective_costs(b, lane0, lanes);
	if (b->o.objective == TRAIN_EXACT)
		LAUNCH(b, exact, grid, b->rows.most * sizeof(float2), b->rows, o, b->s, b->ds, b->unit_loss);
	else if (b->o.objective == TRAIN_MSE)
		LAUNCH(b, squared, grid, 0, b->rows, o, b->s, b->ds, b->unit_loss);
	else
		sampled_run(b, step, lane0, lanes);
	LAUNCH(b, lane_loss, dim3(lanes), 0, b->rows.units, b->o.batch, b->unit_loss, b->inverse,
	       b->loss + lane0);
}
