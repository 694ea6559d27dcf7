/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * LayerNorm of a row by a warp: thread t holds elements t, t + 32, ... of the
 * row, N of them at most, zeros past its width.
 */
#include "policy/train/cuda/device.cuh"

#define NORM_EPS 1e-5f
#define COLUMN_GRID(lanes) dim3(COLUMN_BLOCKS, lanes)
/* Rows of the block's warps: the same rows for the same warp on every device. */
#define EACH_ROW(r, rows)                                                                                      \
	for (uint32_t r = blockIdx.x * WARPS + threadIdx.x / WARP; r < (rows); r += COLUMN_BLOCKS * WARPS)
#define EACH(j, idx, width)                                                                                    \
	_Pragma("unroll") for (int j = 0; j < N; j++) if (uint32_t idx = j * WARP + warp_lane(); idx < (width))

template <int N> static __device__ inline void load_row(float (&z)[N], const float *from, uint32_t width)
{
#pragma unroll
	for (int j = 0; j < N; j++) {
		uint32_t i = j * WARP + warp_lane();

		z[j] = i < width ? from[i] : 0;
	}
}

/* z to (z - mean) / deviation; returns 1 / deviation. */
template <int N> static __device__ inline float normalise(float (&z)[N], uint32_t width)
{
	float sum = 0, squares = 0, scale;

#pragma unroll
	for (int j = 0; j < N; j++)
		sum += z[j];
	sum = warp_sum(sum) / (float)width;
	EACH(j, i, width)
	{
		z[j] -= sum;
		squares += z[j] * z[j];
	}
	scale = 1.0f / sqrtf(warp_sum(squares) / (float)width + NORM_EPS);
#pragma unroll
	for (int j = 0; j < N; j++)
		z[j] *= scale;
	return scale;
}

/* d, the gradient of the normalised row times gain, to the gradient of what was normalised. */
template <int N>
static __device__ inline void normalise_back(float (&d)[N], const float (&hat)[N], float scale, uint32_t width)
{
	float sum = 0, along = 0;

#pragma unroll
	for (int j = 0; j < N; j++) {
		sum += d[j];
		along += d[j] * hat[j];
	}
	sum = warp_sum(sum) / (float)width;
	along = warp_sum(along) / (float)width;
#pragma unroll
	for (int j = 0; j < N; j++)
		d[j] = (d[j] - sum - hat[j] * along) * scale;
}

static __device__ inline float sigmoid(float x)
{
	return __fdividef(1.0f, 1.0f + __expf(-x)); /* 0 where the exponential is too large */
}

/* Adds the warps' columns up, in order, into out[width]. sh: [WARPS][width]. The whole block. */
template <int N>
static __device__ inline void add_columns(const float (&sum)[N], uint32_t width, float *sh, float *out)
{
	__syncthreads();
	EACH(j, i, width)
	sh[threadIdx.x / WARP * width + i] = sum[j];
	__syncthreads();
	for (uint32_t i = threadIdx.x; i < width; i += BLOCK) {
		float total = 0;

		for (uint32_t w = 0; w < WARPS; w++)
			total += sh[w * width + i];
		out[i] = total;
	}
}

/* Runs `call` with N a constant that is enough for `width`. */
#define FOR_WIDTH(width, call)                                                                                 \
	do {                                                                                                   \
		if ((width) <= 1 * WARP) {                                                                     \
			constexpr int N = 1;                                                                   \
			call;                                                                                  \
		} else if ((width) <= 2 * WARP) {                                                              \
			constexpr int N = 2;                                                                   \
			call;                                                                                  \
		} else if ((width) <= 4 * WARP) {                                                              \
			constexpr int N = 4;                                                                   \
			call;                                                                                  \
		} else if ((width) <= 8 * WARP) {                                                              \
			constexpr int N = 8;                                                                   \
			call;                                                                                  \
		} else {                                                                                       \
			constexpr int N = 16;                                                                  \
			call;                                                                                  \
		}                                                                                              \
	} while (0)
