/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Counter-based noise: the same number for the same place on every backend, so a run can stop, go on and be
 * repeated. The mixer is splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), chained over the counters.
 */
#include <stdint.h>

#ifdef __CUDACC__
#define TRAIN_HD __host__ __device__
#else
#define TRAIN_HD
#endif

static TRAIN_HD inline uint64_t train_mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static TRAIN_HD inline uint64_t train_hash(uint64_t seed, uint64_t step, uint32_t lane, uint32_t unit,
					   uint32_t perm, uint32_t row)
{
	uint64_t h = train_mix(seed ^ train_mix(step));

	h = train_mix(h ^ ((uint64_t)lane << 32 | unit));
	return train_mix(h ^ ((uint64_t)perm << 32 | row));
}

/* Uniform in (0, 1), multiples of 2^-24 shifted by half of one. lane: index in the run; unit: slot in the
 * batch. */
static TRAIN_HD inline float train_noise(uint64_t seed, uint64_t step, uint32_t lane, uint32_t unit,
					 uint32_t perm, uint32_t row)
{
	return ((float)(train_hash(seed, step, lane, unit, perm, row) >> 40) + 0.5f) * 0x1p-24f;
}
