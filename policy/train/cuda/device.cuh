/* SPDX-License-Identifier: MIT */
#pragma once
/* Device helpers shared by the kernels. Blocks have BLOCK threads; sums have one order. */
#include "policy/train/cuda/cuda.cuh"

/* The block's dynamic shared memory. */
#ifndef SHARED
#define SHARED(type, name)                                                                                     \
	extern __shared__ __align__(16) unsigned char shared_memory[];                                         \
	type *name = (type *)shared_memory
#endif

static __device__ inline uint32_t warp_lane(void)
{
	return threadIdx.x % WARP;
}

/* Everybody in the warp gets the sum. */
template <typename T> static __device__ inline T warp_sum(T x)
{
	for (uint32_t d = WARP / 2; d; d >>= 1)
		x += __shfl_xor_sync(0xffffffffu, x, d);
	return x;
}

/* Everybody in the block gets the sum; `sh` holds WARPS values and may be reused at once. */
template <typename T> static __device__ inline T block_sum(T x, T *sh)
{
	x = warp_sum(x);
	__syncthreads();
	if (warp_lane() == 0)
		sh[threadIdx.x / WARP] = x;
	__syncthreads();
	x = sh[0];
	for (uint32_t w = 1; w < WARPS; w++)
		x += sh[w];
	return x;
}

/* To TF32, to nearest: the matrix units ignore the low 13 bits. */
static __device__ inline float rounded(float x, bool round)
{
#ifdef __CUDA_ARCH__
	uint32_t r;

	if (!round)
		return x;
	asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
	return __uint_as_float(r);
#else
	(void)round;
	return x;
#endif
}

/* Ascending keys are descending floats; NaN last. */
static __device__ inline uint32_t falling_key(float f)
{
	uint32_t bits = __float_as_uint(f + 0.0f); /* -0 equals 0 */

	if (f != f)
		return 0xffffffffu;
	return bits >> 31 ? bits : ~(bits | 1u << 31);
}

/* Sorts m (a power of two) keys in shared memory, ascending; the whole block, which is in step afterwards. */
static __device__ inline void sort_keys(uint64_t *key, uint32_t m)
{
	for (uint32_t k = 2; k <= m; k <<= 1)
		for (uint32_t j = k >> 1; j; j >>= 1) {
			__syncthreads();
			for (uint32_t t = threadIdx.x; t < m / 2; t += BLOCK) {
				uint32_t i = 2 * t - (t & (j - 1)), l = i + j;
				uint64_t a = key[i], c = key[l];

				if ((a > c) == !(i & k)) {
					key[i] = c;
					key[l] = a;
				}
			}
		}
	__syncthreads();
}

static __host__ __device__ inline uint32_t power_of_two(uint32_t n)
{
	uint32_t m = 1;

	while (m < n)
		m <<= 1;
	return m;
}

/* Budget weighting of a rank, 1 ... n. */
static __device__ inline double weight_of(uint32_t weighting, double rank, uint32_t n)
{
	if (weighting == TRAIN_UNIFORM)
		return rank;
	return log1p(rank / (0.02 * n)) / log1p(1 / 0.02);
}

static __device__ inline double regret_of(const struct unit_cost *c, double cost)
{
	return (cost - c->best) / (c->random - c->best);
}

static __device__ inline double ratio_of(const struct unit_cost *c, double cost)
{
	return cost / (c->best > 1e-8 ? c->best : 1e-8);
}

static __device__ inline double loss_of(const struct unit_cost *c, uint32_t reward, double cost)
{
	double ratio;

	if (reward == TRAIN_REGRET)
		return regret_of(c, cost);
	ratio = ratio_of(c, cost);
	return ratio < 200 ? ratio : 200;
}
