/* SPDX-License-Identifier: MIT */
/*
 * The published estimators: rankings drawn by sorting s - log(-log noise), REINFORCE with a
 * leave-one-out baseline. A ranking is drawn twice, first for its cost, then (the noise
 * follows from its place alone) for its gradient: cheaper than to keep it.
 */
#include "policy/train/cuda/device.cuh"
#include "policy/train/noise.h"

#define CHUNK (TRAIN_MAX_ROWS / BLOCK) /* ranks of a thread */

struct sampled_args {
	uint64_t seed, step;
	uint32_t lane0, batch, perms, reward, weighting, objective;
	uint64_t set_units;
	const float *u;
	const struct unit_cost *cost;
	const double *inverse;
};

/* key[r] & 0xffffffff = the row of rank r + 1. The whole block. */
static __device__ void draw(const struct sampled_args &o, uint32_t unit, uint32_t lane, uint32_t perm,
			    const float *s, uint32_t n, uint64_t *key)
{
	uint32_t m = power_of_two(n);

	__syncthreads(); /* the keys of a draw before may still be read */
	for (uint32_t i = threadIdx.x; i < m; i += BLOCK) {
		uint64_t k = ~0ull;

		if (i < n) {
			float noise = train_noise(o.seed, o.step, o.lane0 + lane, unit, perm, i);

			k = (uint64_t)falling_key(s[i] - logf(-logf(noise))) << 32 | i;
		}
		key[i] = k;
	}
	sort_keys(key, m);
}

/* reward[lane][unit][perm]. shared: keys. grid (units, perms, lanes) */
static __global__ void drawn_rewards(struct rows rows, struct sampled_args o, const float *s, double *reward)
{
	SHARED(uint64_t, key);
	__shared__ double sums[WARPS];
	uint32_t unit = blockIdx.x, perm = blockIdx.y, lane = blockIdx.z, n = rows.n[unit];
	const uint32_t *at = rows.u_row + rows.start[unit];
	struct unit_cost c = o.cost[(size_t)lane * o.batch + unit];
	double cost = 0;

	if (!c.counted)
		return;
	o.u += (size_t)lane * o.set_units;
	draw(o, unit, lane, perm, s + (size_t)lane * rows.padded + rows.start[unit], n, key);
	for (uint32_t i = threadIdx.x; i < n; i += BLOCK)
		cost += weight_of(o.weighting, i + 1, n) * (double)o.u[at[(uint32_t)key[i]]];
	cost = block_sum(cost, sums);
	if (threadIdx.x == 0)
		reward[((size_t)lane * o.batch + unit) * o.perms + perm] = -loss_of(&c, o.reward, cost);
}

/* Rewards of a lane to advantages, in place; 0 for units that do not count. grid (lanes) */
static __global__ void advantages(uint32_t units, struct sampled_args o, double *reward)
{
	__shared__ double sums[WARPS];
	uint32_t lane = blockIdx.x;
	double counted = 0, sum = 0, squares = 0, deviation;

	reward += (size_t)lane * o.batch * o.perms;
	o.cost += (size_t)lane * o.batch;
	for (uint32_t i = threadIdx.x; i < units; i += BLOCK)
		if (o.cost[i].counted) {
			counted++;
			sum += reward[(size_t)i * o.perms];
		}
	counted = block_sum(counted, sums);
	sum = block_sum(sum, sums);
	for (uint32_t i = threadIdx.x; i < units; i += BLOCK) {
		double *v = reward + (size_t)i * o.perms, own = 0;

		for (uint32_t p = 0; p < o.perms; p++)
			own += o.cost[i].counted ? v[p] : 0;
		for (uint32_t p = 0; p < o.perms; p++) {
			if (!o.cost[i].counted)
				v[p] = 0;
			else if (o.objective == TRAIN_RLOO)
				v[p] = o.perms > 1 ? (o.perms * v[p] - own) / (o.perms - 1) : 0;
			else
				v[p] = counted > 1 ? (counted * v[p] - sum) / (counted - 1) : 0;
			squares += v[p] * v[p];
		}
	}
	squares = block_sum(squares, sums);
	counted *= o.perms;
	deviation = counted > 1 ? sqrt(squares / (counted - 1)) : 0;
	for (uint32_t i = threadIdx.x; i < units * o.perms; i += BLOCK) {
		double a = reward[i] / (deviation + 1e-8);

		reward[i] = a > 2 ? 2 : a < -2 ? -2 : a;
	}
}

/* Sum of x over the threads below (UP) or above: never a difference, small sums beside large ones count. */
template <bool UP> static __device__ double block_scan(double x, double *sh)
{
	uint32_t lane = warp_lane(), warp = threadIdx.x / WARP;
	double sum = x, rest = 0;

	for (uint32_t d = 1; d < WARP; d <<= 1) {
		double y = UP ? __shfl_up_sync(0xffffffffu, sum, d) : __shfl_down_sync(0xffffffffu, sum, d);

		if (UP ? lane >= d : lane + d < WARP)
			sum += y;
	}
	__syncthreads();
	if (lane == (UP ? WARP - 1 : 0))
		sh[warp] = sum;
	sum = UP ? __shfl_up_sync(0xffffffffu, sum, 1) : __shfl_down_sync(0xffffffffu, sum, 1);
	if (lane == (UP ? 0 : WARP - 1))
		sum = 0;
	__syncthreads();
	if (UP)
		for (uint32_t w = 0; w < warp; w++)
			rest += sh[w];
	else
		for (uint32_t w = WARPS; w-- > warp + 1;)
			rest += sh[w];
	return rest + sum;
}

/* exp(s - most), never 0. */
static __device__ inline double share(float s, double most)
{
	double x = (double)s - most;

	return exp(x < -700 ? -700 : x);
}

/*
 * log pi = sum_r s_r - log Z_r, Z_r = sum_{k >= r} exp(s_k); d log pi / d s_j = 1 - exp(s_j) sum_{r <= rank(j)}
 * 1 / Z_r. shared: keys. grid (units, lanes)
 */
static __global__ void drawn_gradient(struct rows rows, struct sampled_args o, const float *s,
				      const double *advantage, float *ds, double *unit_loss)
{
	SHARED(uint64_t, key);
	__shared__ double sums[WARPS];
	uint32_t unit = blockIdx.x, lane = blockIdx.y, n = rows.n[unit], chunk = (n + BLOCK - 1) / BLOCK;
	uint32_t from = threadIdx.x * chunk < n ? threadIdx.x * chunk : n,
		 to = from + chunk < n ? from + chunk : n;
	bool counted = o.cost[(size_t)lane * o.batch + unit].counted;
	double most = -INFINITY, loss = 0, mean = o.inverse[lane], each[CHUNK];

	s += (size_t)lane * rows.padded + rows.start[unit];
	ds += (size_t)lane * rows.padded + rows.start[unit];
	advantage += ((size_t)lane * o.batch + unit) * o.perms;
	for (uint32_t i = threadIdx.x; i < n; i += BLOCK)
		ds[i] = 0;
	for (uint32_t i = 0; i < n; i++) /* every thread all of them: no order of NaN to agree on */
		most = (double)s[i] > most ? (double)s[i] : most;
	for (uint32_t perm = 0; counted && perm < o.perms; perm++) {
		double a = advantage[perm] / ((double)o.perms * n), z = 0, inverse = 0, value = 0;

		draw(o, unit, lane, perm, s, n, key);
		for (uint32_t r = to; r-- > from;)
			z += share(s[(uint32_t)key[r]], most);
		z = block_scan<false>(z, sums);
#pragma unroll
		for (uint32_t q = CHUNK; q-- > 0;)
			if (from + q < to) {
				float x = s[(uint32_t)key[from + q]];

				z += share(x, most);
				value += (double)x - most - log(z);
				each[q] = 1 / z;
				inverse += each[q];
			}
		loss -= a * value;
		inverse = block_scan<true>(inverse, sums);
#pragma unroll
		for (uint32_t q = 0; q < CHUNK; q++)
			if (from + q < to) {
				uint32_t row =
					(uint32_t)key[from + q]; /* once a draw: no other thread has it */

				inverse += each[q];
				ds[row] -= (float)(a * mean * (1 - share(s[row], most) * inverse));
			}
	}
	loss = block_sum(loss, sums);
	if (threadIdx.x == 0)
		unit_loss[(size_t)lane * o.batch + unit] = loss;
}

void sampled_run(struct cuda_backend *b, uint64_t step, uint32_t lane0, uint32_t lanes)
{
	uint32_t perms = b->o.objective == TRAIN_RLOO ? b->o.perms : 1;
	size_t keys = power_of_two(b->rows.most) * sizeof(uint64_t);
	struct sampled_args o = {
		b->o.seed,   step,           lane0,          b->o.batch,   perms,
		b->o.reward, b->o.weighting, b->o.objective, b->set_units, b->u + (size_t)lane0 * b->set_units,
		b->cost,     b->inverse};

	LAUNCH(b, drawn_rewards, dim3(b->rows.units, perms, lanes), keys, b->rows, o, b->s, b->reward);
	LAUNCH(b, advantages, dim3(lanes), 0, b->rows.units, o, b->reward);
	LAUNCH(b, drawn_gradient, dim3(b->rows.units, lanes), keys, b->rows, o, b->s, b->reward, b->ds,
	       b->unit_loss);
}
