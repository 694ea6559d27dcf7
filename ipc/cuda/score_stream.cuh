/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The weights of a block's tiles, passing by in shared memory chunk after chunk, and the products with them.
 * Two ways: with cp.async, ldmatrix and mma.sync, all warps in step, from compute capability 8.0 on; and with
 * bulk copies and wgmma, groups of four warps each at its own pace.
 */
#include "ipc/cuda/score_shape.cuh"
#if SCORE_WGMMA
#include "ipc/cuda/wgmma.cuh"
#endif

namespace net
{
struct stream {
	const unsigned char *lanes; /* of the scorer, from the call's first lane on */
	uint64_t lane_stride, vecs_off;
	unsigned char *stage, *vecs;
	uint32_t tiles, lane_tiles; /* of all; of a lane */
	/* Next to copy; only thread 0's count with bulk copies. */
	uint32_t copy_tile, copy_chunk /* or piece */, copy_stage, copy_vec;
	const unsigned char *from;
	uint32_t use_stage;
#if SCORE_WGMMA
	uint64_t *full, *empty; /* [PLACES] */
	uint32_t *piece;        /* bytes of each */
	uint32_t copy_phase, use_phase;
#endif
};

template <typename S> static __device__ __forceinline__ void step(uint32_t &stage)
{
	stage = stage + 1 == S::STAGES ? 0 : stage + 1;
}

/* The chunk after this one, of this tile or the block's next. */
template <typename S> static __device__ __forceinline__ void step_copy(struct stream &s)
{
	s.from += SCORER_CHUNK;
	if (++s.copy_chunk == S::CHUNKS) {
		s.copy_chunk = 0;
		s.copy_tile += gridDim.x;
	}
}

#if !SCORE_WGMMA

/* Start copying the next chunk, and with the first of a tile the lane's vectors; none after the last tile. */
template <typename S> static __device__ __forceinline__ void copy_next(struct stream &s)
{
	if (s.copy_tile < s.tiles) {
		unsigned char *to = s.stage + s.copy_stage * SCORER_CHUNK + threadIdx.x * 16;

		if (s.copy_chunk == 0) {
			unsigned char *vecs = s.vecs + s.copy_vec * (S::VECS * 4);

			s.from = s.lanes + s.copy_tile / s.lane_tiles * s.lane_stride + threadIdx.x * 16;
			for (uint32_t i = threadIdx.x; i < S::VECS / 4; i += BLOCK)
				async16(vecs + i * 16, s.from + s.vecs_off + (i - threadIdx.x) * 16);
			s.copy_vec ^= 1;
		}
#pragma unroll
		for (uint32_t i = 0; i < SCORER_CHUNK; i += BLOCK * 16)
			async16(to + i, s.from + i);
		step_copy<S>(s);
	}
	step<S>(s.copy_stage);
	async_commit();
}

template <typename S> static __device__ __forceinline__ void start_stream(struct stream &s)
{
	for (uint32_t i = 0; i < S::STAGES - 1; i++)
		copy_next<S>(s);
}

/* The next chunk, there for all threads. The one before it is done with, and makes room. */
template <typename S> static __device__ __forceinline__ const unsigned char *use_next(struct stream &s)
{
	const unsigned char *chunk = s.stage + s.use_stage * SCORER_CHUNK;

	async_wait<S::STAGES - 2>();
	__syncthreads();
	copy_next<S>(s);
	step<S>(s.use_stage);
	return chunk;
}

/* At the beginning of a tile: its vectors are there, without a chunk being used. */
template <typename S> static __device__ __forceinline__ void wait_vectors(struct stream &)
{
	async_wait<S::STAGES - 2>();
	__syncthreads();
}

static __device__ __forceinline__ void end_stream(void)
{
	async_wait<0>();
}

/* u += x W, of slices [first, first + COUNT) of x and the next chunks. */
template <typename S, uint32_t COUNT, uint32_t N, uint32_t K>
static __device__ __forceinline__ void multiply(struct sums<N, S::M> &u, const struct left (&x)[K][S::M],
						uint32_t first, struct stream &s)
{
	constexpr uint32_t SLICE = N * 32, PER_CHUNK = SCORER_CHUNK / SLICE;
	const uint32_t i = warp_lane(), mine = (i / 8 % 2) * (N * 16) + i / 16 * 128 + i % 8 * 16;
	const unsigned char *chunk = NULL;

#pragma unroll
	for (uint32_t slice = 0; slice < COUNT; slice++) {
		uint32_t a[S::M][4];

		if (slice % PER_CHUNK == 0)
			chunk = use_next<S>(s) + mine;
#pragma unroll
		for (uint32_t m = 0; m < S::M; m++)
			operands(a[m], x, first + slice, m);
#pragma unroll
		for (uint32_t tile = 0; tile < N / 8; tile += 2) {
			uint4 b = load_matrices(chunk + slice % PER_CHUNK * SLICE + tile * 128);

#pragma unroll
			for (uint32_t m = 0; m < S::M; m++) {
				mma_bf16(u.x[m][tile], a[m], b.x, b.y);
				mma_bf16(u.x[m][tile + 1], a[m], b.z, b.w);
			}
		}
	}
}

#else

/*
 * Chunks pass in pieces of up to four, none across two products. A ring of pieces: some are copied ahead of the
 * warps that are first, the rest let others lag.
 */
constexpr uint32_t PIECE_BYTES = 4 * SCORER_CHUNK, PLACES = SCORE_STAGES_90 / 4, COPIED_AHEAD = 3,
		   PRODUCT_COUNT = 8;

template <typename S> constexpr __device__ uint32_t product_bytes(uint32_t i)
{
	constexpr uint32_t D = S::DIM, H = S::HIDDEN;
	constexpr uint32_t bytes[PRODUCT_COUNT] = {
		PANEL * D * 2, PANEL * (D - PANEL) * 2, H * D * 2, PANEL * D * 2, PANEL * (D - PANEL) * 2,
		H * D * 2,     H * SCORER_POS_PAD * 2,  H * H * 2};

	return bytes[i];
}

template <typename S> constexpr __device__ uint32_t pieces(void)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < PRODUCT_COUNT; i++)
		n += (product_bytes<S>(i) + PIECE_BYTES - 1) / PIECE_BYTES;
	return n;
}

/* Thread 0: the next piece into its place, once every warp has done with what is there. */
template <typename S> static __device__ __forceinline__ void copy_next(struct stream &s)
{
	uint32_t bytes, all;
	uint64_t *full = s.full + s.copy_stage;

	if (s.copy_tile >= s.tiles)
		return;
	barrier_wait(s.empty + s.copy_stage, s.copy_phase ^ 1);
	bytes = all = s.piece[s.copy_chunk];
	if (s.copy_chunk == 0) {
		s.from = s.lanes + s.copy_tile / s.lane_tiles * s.lane_stride;
		all += S::VECS * 4;
	}
	barrier_expect(full, all);
	if (s.copy_chunk == 0) {
		bulk_copy(s.vecs + s.copy_vec * (S::VECS * 4), s.from + s.vecs_off, S::VECS * 4, full);
		s.copy_vec ^= 1;
	}
	bulk_copy(s.stage + s.copy_stage * PIECE_BYTES, s.from, bytes, full);
	s.from += bytes;
	if (++s.copy_chunk == pieces<S>()) {
		s.copy_chunk = 0;
		s.copy_tile += gridDim.x;
	}
	if (++s.copy_stage == PLACES) {
		s.copy_stage = 0;
		s.copy_phase ^= 1;
	}
}

template <typename S> static __device__ __forceinline__ void start_stream(struct stream &s)
{
	static_assert(PLACES <= pieces<S>(), "the vectors of two lanes are there at a time");
	static_assert(PLACES * 16 + pieces<S>() * 4 <= SCORE_STAGES_90 * 16, "room that SCORE_SHARED() leaves");
	s.full = (uint64_t *)(s.vecs + 2 * S::VECS * 4 + S::DIM / 2 * 8);
	s.empty = s.full + PLACES;
	s.piece = (uint32_t *)(s.empty + PLACES);
	s.copy_phase = s.use_phase = 0;
	if (threadIdx.x == 0) {
		uint32_t piece = 0;

		for (uint32_t i = 0; i < PRODUCT_COUNT; i++)
			for (uint32_t at = 0; at < product_bytes<S>(i); at += PIECE_BYTES)
				s.piece[piece++] = min(PIECE_BYTES, product_bytes<S>(i) - at);
		for (uint32_t i = 0; i < PLACES; i++) {
			barrier_init(s.full + i, 1);
			barrier_init(s.empty + i, WARPS);
		}
		barrier_publish();
	}
	__syncthreads();
	if (threadIdx.x == 0)
		for (uint32_t i = 0; i < COPIED_AHEAD; i++)
			copy_next<S>(s);
	__syncwarp();
}

/* The next piece, once it is there; release() its place. */
template <typename S> static __device__ __forceinline__ uint32_t use_next(struct stream &s)
{
	const uint32_t stage = s.use_stage;

	if (threadIdx.x == 0)
		copy_next<S>(s);
	__syncwarp();
	barrier_wait(s.full + stage, s.use_phase);
	if (++s.use_stage == PLACES) {
		s.use_stage = 0;
		s.use_phase ^= 1;
	}
	return stage;
}

static __device__ __forceinline__ void release(struct stream &s, uint32_t stage)
{
	if (warp_lane() == 0)
		barrier_arrive(s.empty + stage);
	__syncwarp();
}

template <typename S> static __device__ __forceinline__ void wait_vectors(struct stream &s)
{
	barrier_wait(s.full + s.use_stage, s.use_phase);
}

static __device__ __forceinline__ void end_stream(void)
{
}

template <typename S, uint32_t COUNT, uint32_t N, uint32_t K>
static __device__ __forceinline__ void multiply(struct sums<N, S::M> &u, const struct left (&x)[K][S::M],
						uint32_t first, struct stream &s)
{
	constexpr uint32_t SLICE = N * 32, PIECE_SLICES = PIECE_BYTES / SLICE;
	uint32_t stage = 0;

#pragma unroll
	for (uint32_t slice = 0; slice < COUNT; slice += PIECE_SLICES) {
		const uint32_t before = stage;
		uint64_t right;

		stage = use_next<S>(s);
		right = wgmma_right(shared_address(s.stage) + stage * PIECE_BYTES, N);
		wgmma_fence();
#pragma unroll
		for (uint32_t i = 0; i < PIECE_SLICES && slice + i < COUNT; i++) {
#pragma unroll
			for (uint32_t m = 0; m < S::M; m++) {
				uint32_t a[4];

				operands(a, x, first + slice + i, m);
				wgmma_bf16(u.x[m], a, right + (i * SLICE >> 4));
			}
		}
		wgmma_commit();
		if (slice) {
			wgmma_wait<1>();
			release(s, before);
		}
	}
	wgmma_wait<0>();
	release(s, stage);
}

#endif
} /* namespace net */
