/* SPDX-License-Identifier: MIT */
#pragma once
/* Widths of a network as the kernels of score.cu see them, and how a warp holds rows and hidden units. */
#include "ipc/cuda/mma.cuh"
#include "ipc/cuda/score.h"

/* Code for compute capability 9.0 alone: sm_90a. */
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SCORE_WGMMA 1
#else
#define SCORE_WGMMA 0
#endif

namespace net
{
constexpr uint32_t F16 = 2; /* enum kvtier_dtype */
constexpr float LEAST_SCORE = -3.402823466e38f;
constexpr uint32_t PANEL = 64; /* rows of a triangle that are multiplied at a time */

template <uint32_t D, uint32_t H> struct shape {
	/* 16-row groups of a warp: two where its registers hold so much, and it shares what it reads with no
	 * warp. */
	static constexpr uint32_t M = D == 64 && H == 128 && !SCORE_WGMMA ? 2 : 1;
	static constexpr uint32_t ROWS = WARPS * 16 * M; /* of a tile */
	static constexpr uint32_t DIM = D, HIDDEN = H, Q = D / 32, G = H / 32;
	/* Of a lane, RK to W2. */
	static constexpr uint32_t TRIANGLE = PANEL * D + (D > PANEL ? PANEL * (D - PANEL) : 0);
	static constexpr uint32_t CHUNKS =
		(2 * (TRIANGLE + H * D) + H * SCORER_POS_PAD + H * H) * 2 / SCORER_CHUNK;
	/* With mma.sync. Fewer than a lane has: the vectors of two lanes are there at a time. */
	static constexpr uint32_t STAGES = SCORE_STAGES_80 < CHUNKS ? SCORE_STAGES_80 : CHUNKS - 1;
	static constexpr uint32_t RING_BYTES = (SCORE_WGMMA ? SCORE_STAGES_90 : STAGES) * SCORER_CHUNK;
	/* Floats, as scorer_vecs() says. */
	static constexpr uint32_t RK = 0, RV = D, MK = 2 * D, MV = MK + H, C = MV + H, G1 = C + H, O1 = G1 + H,
				  B2 = O1 + H, G2 = B2 + H, O2 = G2 + H, W3 = O2 + H, REST = W3 + 2 * H,
				  B3 = REST + 2, VECS = REST + 64;
	static_assert(SCORE_SHARED(SCORE_STAGES_80, D, VECS) <= 99 << 10, "what every GPU from 8.0 on has");
	static_assert(SCORE_SHARED(SCORE_STAGES_90, D, VECS) <= 227 << 10, "what 9.0 has");
};

/* Operands of a k of 32 of one 16-row group: rows g (r 0) and g + 8 (r 1). */
struct left {
	uint4 r[2];
};

/* A thread's eight of 32 floats that belong to consecutive units. */
struct eight {
	float x[8];
};
static __device__ __forceinline__ struct eight load_eight(const float *vec, uint32_t group)
{
	const float4 *p = (const float4 *)(vec + group * 32 + warp_lane() % 4 * 8), low = p[0], high = p[1];

	return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

static __device__ __forceinline__ float quad_sum(float x)
{
	x += __shfl_xor_sync(ALL, x, 1);
	return x + __shfl_xor_sync(ALL, x, 2);
}

/* A thread's operands of slice s of a product, 16-row group m. */
template <uint32_t K, uint32_t M>
static __device__ __forceinline__ void operands(uint32_t (&a)[4], const struct left (&x)[K][M], uint32_t s,
						uint32_t m)
{
	const struct left &l = x[s / 2 % K][m]; /* s is below 2 K */

	a[0] = s % 2 ? l.r[0].z : l.r[0].x;
	a[1] = s % 2 ? l.r[1].z : l.r[1].x;
	a[2] = s % 2 ? l.r[0].w : l.r[0].y;
	a[3] = s % 2 ? l.r[1].w : l.r[1].y;
}

/* A thread's sums of N columns: of tile j, columns 2 t and 2 t + 1 of row g, then of row g + 8. */
template <uint32_t N, uint32_t M> struct sums {
	float x[M][N / 8][4];
};
} /* namespace net */
