/* SPDX-License-Identifier: MIT */
/*
 * The network of shm/scorer.h on tensor cores: all rows of all lanes in one launch.
 *
 * A block takes tiles of 8 warps' rows of one lane, a warp 16 rows (or 32) from
 * K and V to the coefficients: everything about a row stays in the registers of four threads. The lane's
 * matrices pass by in shared memory (score_stream.cuh).
 *
 * Which element of a row, or which hidden unit, is "column k" of a product does not matter as long as both
 * operands agree. Thread 4 g + t of a warp holds elements 32 q + 8 t .. + 7 of its rows g and g + 8, for every
 * q: 16 bytes as they lie in memory, and as they come out of the layer before.
 */
#include "ipc/cuda/score_rows.cuh"
#include "ipc/cuda/score_stream.cuh"

namespace net
{
/* u = vec in every row. */
template <uint32_t N, uint32_t M>
static __device__ __forceinline__ void start(struct sums<N, M> &u, const float *vec)
{
#pragma unroll
	for (uint32_t g = 0; g < N / 32; g++) {
		struct eight b = load_eight(vec, g);

#pragma unroll
		for (uint32_t m = 0; m < M; m++) {
#pragma unroll
			for (uint32_t i = 0; i < 16; i++)
				u.x[m][g * 4 + i / 4][i % 4] = b.x[i / 4 * 2 + i % 2];
		}
	}
}

template <uint32_t N, uint32_t M> static __device__ __forceinline__ void clear(struct sums<N, M> &u)
{
#pragma unroll
	for (uint32_t i = 0; i < N / 8 * 4 * M; i++)
		u.x[i % M][i / M / 4][i / M % 4] = 0;
}

/* u = u scale + vec; scale by 16-row group and row. */
template <uint32_t N, uint32_t M>
static __device__ __forceinline__ void rescale(struct sums<N, M> &u, const float (&scale)[M][2],
					       const float *vec)
{
#pragma unroll
	for (uint32_t g = 0; g < N / 32; g++) {
		struct eight b = load_eight(vec, g);

#pragma unroll
		for (uint32_t m = 0; m < M; m++) {
#pragma unroll
			for (uint32_t i = 0; i < 16; i++) {
				float &x = u.x[m][g * 4 + i / 4][i % 4];

				x = x * scale[m][i % 4 / 2] + b.x[i / 4 * 2 + i % 2];
			}
		}
	}
}

/* Add the squares of each row's units. */
template <uint32_t N, uint32_t M>
static __device__ __forceinline__ void add_squares(float (&squares)[M][2], const struct sums<N, M> &u)
{
#pragma unroll
	for (uint32_t i = 0; i < N / 8 * 4; i++) {
#pragma unroll
		for (uint32_t m = 0; m < M; m++) {
			float x = u.x[m][i / 4][i % 4];

			squares[m][i % 4 / 2] += x * x;
		}
	}
}

/* Scale of the LayerNorm of centred rows. */
template <uint32_t N, uint32_t M>
static __device__ __forceinline__ void normal_scale(float (&scale)[M][2], const struct sums<N, M> &u)
{
	float squares[M][2] = {};

	add_squares(squares, u);
#pragma unroll
	for (uint32_t m = 0; m < M; m++) {
#pragma unroll
		for (uint32_t r = 0; r < 2; r++)
			scale[m][r] = rsqrtf(quad_sum(squares[m][r]) * (1.0f / N) + SCORER_EPS);
	}
}

/* SiLU(2 y) */
static __device__ __forceinline__ float silu2(float y)
{
	return y * tanh_fast(y) + y;
}

/* SiLU(LN(u)) as the next layer's operand. */
template <uint32_t G, uint32_t M>
static __device__ __forceinline__ void activate(struct left (&out)[G][M], const struct sums<G * 32, M> &u,
						const float *gain, const float *offset)
{
	float scale[M][2];

	normal_scale(scale, u);
#pragma unroll
	for (uint32_t g = 0; g < G; g++) {
		struct eight a = load_eight(gain, g), b = load_eight(offset, g);

#pragma unroll
		for (uint32_t m = 0; m < M; m++) {
			uint32_t word[2][4];

#pragma unroll
			for (uint32_t j = 0; j < 4; j++) {
#pragma unroll
				for (uint32_t r = 0; r < 2; r++) {
					float y[2];

#pragma unroll
					for (uint32_t i = 0; i < 2; i++)
						y[i] = silu2(u.x[m][g * 4 + j][r * 2 + i] * scale[m][r] *
								     a.x[j * 2 + i] +
							     b.x[j * 2 + i]);
					word[r][j] = pack_bf16(y[0], y[1]);
				}
			}
#pragma unroll
			for (uint32_t r = 0; r < 2; r++)
				out[g][m].r[r] = make_uint4(word[r][0], word[r][1], word[r][2], word[r][3]);
		}
	}
}

/* 1 / sd of each row's projection, from the triangle, which comes next. */
template <typename S>
static __device__ __forceinline__ void project(float (&sd)[S::M][2], const struct left (&x)[S::Q][S::M],
					       const float *shift, const float *rest, float per_unit,
					       struct stream &s)
{
	struct sums<PANEL, S::M> y;
	float squares[S::M][2] = {};

	start(y, shift);
	multiply<S, S::DIM / 16>(y, x, 0, s);
	add_squares(squares, y);
	if constexpr (S::DIM > PANEL) {
		start(y, shift + PANEL);
		multiply<S, (S::DIM - PANEL) / 16>(y, x, PANEL / 16, s);
		add_squares(squares, y);
	}
#pragma unroll
	for (uint32_t m = 0; m < S::M; m++) {
#pragma unroll
		for (uint32_t r = 0; r < 2; r++)
			sd[m][r] = rsqrtf((quad_sum(squares[m][r]) + *rest) * per_unit + SCORER_EPS);
	}
}

/* The last LayerNorm, SiLU and the dots; a quad's threads all get its rows' coefficients. */
template <typename S>
static __device__ __forceinline__ void finish(float (&out)[2][S::M][2], const struct sums<S::HIDDEN, S::M> &u,
					      const float *vecs, bool two)
{
	float scale[S::M][2];

#pragma unroll
	for (uint32_t i = 0; i < 4 * S::M; i++)
		out[i / (2 * S::M)][i / 2 % S::M][i % 2] = 0;
	normal_scale(scale, u);
#pragma unroll
	for (uint32_t g = 0; g < S::G; g++) {
		struct eight a = load_eight(vecs + S::G2, g), b = load_eight(vecs + S::O2, g),
			     w0 = load_eight(vecs + S::W3, g), w1 = load_eight(vecs + S::W3 + S::HIDDEN, g);

#pragma unroll
		for (uint32_t m = 0; m < S::M; m++) {
#pragma unroll
			for (uint32_t i = 0; i < 16; i++) {
				const uint32_t unit = i / 4 * 2 + i % 2, r = i % 4 / 2;
				float y = silu2(u.x[m][g * 4 + i / 4][i % 4] * scale[m][r] * a.x[unit] +
						b.x[unit]);

				out[0][m][r] += w0.x[unit] * y;
				if (two)
					out[1][m][r] += w1.x[unit] * y;
			}
		}
	}
#pragma unroll
	for (uint32_t m = 0; m < S::M; m++) {
#pragma unroll
		for (uint32_t r = 0; r < 2; r++) {
			out[0][m][r] = quad_sum(out[0][m][r]) + vecs[S::B3];
			out[1][m][r] = quad_sum(out[1][m][r]) + vecs[S::B3 + 1];
			if (!isfinite(out[0][m][r]) || !isfinite(out[1][m][r])) {
				out[0][m][r] = LEAST_SCORE;
				out[1][m][r] = 0;
			}
		}
	}
}

/* 16 rows at once: the memory may be the host's. */
template <typename S>
static __device__ __forceinline__ void store(const struct score_args &a, const float (&out)[2][S::M][2],
					     uint32_t coefs, uint32_t lane, uint32_t first)
{
	const uint32_t row = warp_lane() % 16;

#pragma unroll
	for (uint32_t m = 0; m < S::M; m++) {
		const uint32_t i = first + warp_index() * 16 * S::M + m * 16 + row;

#pragma unroll
		for (uint32_t c = 0; c < SCORER_MAX_COEFS; c++) {
			float low = __shfl_sync(ALL, out[c][m][0], row % 8 * 4),
			      high = __shfl_sync(ALL, out[c][m][1], row % 8 * 4);

			if (warp_lane() < 16 && c < coefs && i < a.n)
				at<float>(a.out)[lane * a.out_lane + c * a.out_coef + a.pos + i - a.out_pos0] =
					row < 8 ? low : high;
		}
	}
}

/* ---- a block ------------------------------------------------------------------------------ */

template <uint32_t D, uint32_t H> static __device__ __forceinline__ void score(const struct score_args &a)
{
	typedef struct shape<D, H> S;
	SHARED(unsigned char, shared);
	const struct scorer_hdr *h = at<const struct scorer_hdr>(a.scorer);
	const struct cuda_lane *memory = at<const struct cuda_lane>(a.rows);
	const uint32_t lane_tiles = (a.n + S::ROWS - 1) / S::ROWS, flags = h->flags;
	const float per_unit = 1.0f / (float)h->proj;
	struct stream s;
	struct left next[S::Q][S::M];
	uint32_t slot[S::M][2], vec = 0;
	uint64_t *turn;

	s.lanes = (const unsigned char *)h + h->lane_off + a.lane * h->lane_stride;
	s.lane_stride = h->lane_stride;
	s.vecs_off = h->tensor_off[SCORER_VECS];
	s.stage = shared;
	s.vecs = shared + S::RING_BYTES;
	s.tiles = lane_tiles * a.lanes;
	s.lane_tiles = lane_tiles;
	s.copy_tile = blockIdx.x;
	s.copy_chunk = s.copy_stage = s.copy_vec = s.use_stage = 0;
	start_stream<S>(s);
	turn = (uint64_t *)(s.vecs + 2 * S::VECS * 4);
	if (flags & SCORER_UNROTATE)
		for (uint32_t i = threadIdx.x; i < D / 2; i += BLOCK)
			turn[i] = at<const uint64_t>(a.scorer + h->turn_off)[i];
	__syncthreads();
	if (blockIdx.x < s.tiles) {
		const uint32_t lane = blockIdx.x / lane_tiles;

		find_slots<S>(slot, a, lane, (blockIdx.x - lane * lane_tiles) * S::ROWS);
		load_rows<S>(next, memory[lane].k, memory[lane].k_row, slot);
	}

	for (uint32_t tile = blockIdx.x; tile < s.tiles; tile += gridDim.x, vec ^= 1) {
		const uint32_t lane = tile / lane_tiles, first = (tile - lane * lane_tiles) * S::ROWS;
		const float *vecs = (const float *)(s.vecs + vec * (S::VECS * 4));
		struct sums<H, S::M> u;
		struct left x[S::Q][S::M], place[1][S::M], hidden[S::G][S::M];
		float factor[S::M][2], scale[S::M][2], out[2][S::M][2];

		wait_vectors<S>(s);
		clear(u);
#pragma unroll 1
		for (uint32_t v = 0; v < 2; v++) { /* K, then V */
			take<S>(x, next);
			if (v == 0)
				load_rows<S>(next, memory[lane].v, memory[lane].v_row, slot);
			if (v == 0 && flags & SCORER_UNROTATE)
				unrotate<S>(x, a, flags & SCORER_ROPE_PAIRS, turn, first);
			else if (a.dtype == F16)
				to_bf16<S>(x);
			project<S>(scale, x, vecs + S::RK + v * D, vecs + S::REST + v, per_unit, s);
			/* u is in units of the last part's sd: in this part's, and that part's shift */
#pragma unroll
			for (uint32_t i = 0; i < 2 * S::M; i++) {
				factor[i / 2][i % 2] = v ? factor[i / 2][i % 2] / scale[i / 2][i % 2] : 0;
			}
			rescale(u, factor, vecs + S::MK + v * H);
			multiply<S, D / 16>(u, x, 0, s);
#pragma unroll
			for (uint32_t i = 0; i < 2 * S::M; i++)
				factor[i / 2][i % 2] = scale[i / 2][i % 2];
		}

		find_places<S>(place, h, s.lanes + lane * s.lane_stride, a, first);
		rescale(u, factor, vecs + S::C);
		multiply<S, SCORER_POS_PAD / 16>(u, place, 0, s);
		activate(hidden, u, vecs + S::G1, vecs + S::O1);

		start(u, vecs + S::B2);
		multiply<S, H / 16>(u, hidden, 0, s);
		if (tile + gridDim.x < s.tiles) {
			const uint32_t after = (tile + gridDim.x) / lane_tiles;

			find_slots<S>(slot, a, after, (tile + gridDim.x - after * lane_tiles) * S::ROWS);
			load_rows<S>(next, memory[after].k, memory[after].k_row, slot);
		}
		finish<S>(out, u, vecs, h->coefs > 1);
		store<S>(a, out, h->coefs, lane, first);
	}
	end_stream();
}
} /* namespace net */

KERNEL(1) kvt_score_64_128(struct score_args a)
{
	net::score<64, 128>(a);
}
KERNEL(1) kvt_score_64_256(struct score_args a)
{
	net::score<64, 256>(a);
}
KERNEL(1) kvt_score_128_128(struct score_args a)
{
	net::score<128, 128>(a);
}
KERNEL(1) kvt_score_128_256(struct score_args a)
{
	net::score<128, 256>(a);
}
