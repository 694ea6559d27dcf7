/* SPDX-License-Identifier: MIT */
/*
 * The network of shm/scorer.h on tensor cores: all rows of all lanes in one launch.
 *
 * A block takes tiles of 8 warps' rows of one lane, a warp 16 rows (32 where the accumulators leave room) from
 * K and V to the coefficients: everything about a row stays in the registers of four threads. The lane's
 * matrices pass by in shared memory, chunk after chunk, copied asynchronously from L2; all warps use a chunk
 * while the next ones come in. They are stored in the order in which a thread wants them, so that both the copy
 * and the reads are of 16 consecutive bytes a thread.
 *
 * Which element of a row, or which hidden unit, is "column k" of a product does not matter as long as both
 * operands agree. Thread 4 g + t of a warp holds elements 32 q + 8 t .. + 7 of its rows, for every q: 16 bytes as
 * they lie in memory, and as they come out of the layer before.
 */
#include "ipc/cuda/mma.cuh"
#include "ipc/cuda/score.h"

namespace net
{
constexpr uint32_t STAGES = SCORE_STAGES;
constexpr uint32_t CHUNK_BLOCKS = SCORER_CHUNK / SCORER_BLOCK;
constexpr uint32_t COPIES = SCORER_CHUNK / 16 / BLOCK; /* a thread's of a chunk */
constexpr uint32_t F16 = 2; /* enum kvtier_dtype */
constexpr float LEAST_SCORE = -3.402823466e38f;

/* What follows from the widths of rows and hidden layers. */
template <uint32_t D, uint32_t H> struct shape {
	static constexpr uint32_t M = SCORE_WARP_ROWS(D, H) / 16; /* 16-row groups of a warp */
	static constexpr uint32_t ROWS = WARPS * 16 * M;           /* of a tile */
	static constexpr uint32_t Q = D / 32, G = H / 32;
	static constexpr uint32_t TRI = Q * (Q + 1) / 2; /* blocks of RK */
	static constexpr uint32_t KEY_CHUNKS = (TRI + G * Q + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
	static constexpr uint32_t TAIL_CHUNKS = (G + G * G + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
	static constexpr uint32_t CHUNKS = 2 * KEY_CHUNKS + TAIL_CHUNKS;
	/* Floats, as scorer_vecs() says. */
	static constexpr uint32_t RK = 0, RV = D, MK = 2 * D, MV = MK + H, C = MV + H, G1 = C + H, O1 = G1 + H,
				  B2 = O1 + H, G2 = B2 + H, O2 = G2 + H, W3 = O2 + H, REST = W3 + 2 * H,
				  B3 = REST + 2, VECS = REST + 64;
	static_assert(CHUNKS > STAGES, "vectors of two tiles at a time");
	static_assert(SCORE_SHARED(D, VECS) <= 99 << 10, "what every GPU from compute capability 8.0 on has");
};

/* The block's walk over its tiles: the next chunk to copy, the next to use. */
struct stream {
	const struct score_args *a;
	const unsigned char *lanes; /* of the scorer, from lane a->lane on */
	uint64_t lane_stride, vecs_off;
	unsigned char *stage, *vecs;
	uint32_t tiles, lane_tiles;         /* of all; of a lane */
	uint32_t copy_tile, copy_chunk;     /* next */
	uint32_t copy_stage, use_stage, vec; /* places */
	const unsigned char *from;           /* this thread's piece of the next */
};

/* Start copying the next chunk, and with the first of a tile the lane's vectors; none after the last tile. */
template <typename S> static __device__ __forceinline__ void copy_next(struct stream &s)
{
	if (s.copy_tile < s.tiles) {
		unsigned char *to = s.stage + s.copy_stage * SCORER_CHUNK + threadIdx.x * 16;

		if (s.copy_chunk == 0) {
			unsigned char *vecs = s.vecs + s.vec * (S::VECS * 4);

			s.from = s.lanes + s.copy_tile / s.lane_tiles * s.lane_stride + threadIdx.x * 16;
			for (uint32_t i = threadIdx.x; i < S::VECS / 4; i += BLOCK)
				async16(vecs + i * 16, s.from + s.vecs_off + (i - threadIdx.x) * 16);
			s.vec ^= 1;
		}
#pragma unroll
		for (uint32_t i = 0; i < COPIES; i++)
			async16(to + i * BLOCK * 16, s.from + i * BLOCK * 16);
		s.from += SCORER_CHUNK;
		if (++s.copy_chunk == S::CHUNKS) {
			s.copy_chunk = 0;
			s.copy_tile += gridDim.x;
		}
	}
	s.copy_stage = s.copy_stage + 1 == STAGES ? 0 : s.copy_stage + 1;
	async_commit();
}

/* The next chunk, there for all threads. The one before it is done with, and makes room. */
template <typename S> static __device__ __forceinline__ const uint4 *use_next(struct stream &s)
{
	const uint4 *chunk = (const uint4 *)(s.stage + s.use_stage * SCORER_CHUNK);

	async_wait<STAGES - 2>();
	__syncthreads();
	copy_next<S>(s);
	s.use_stage = s.use_stage + 1 == STAGES ? 0 : s.use_stage + 1;
	return chunk + warp_lane();
}

/* Operands of a k of 32 of one 16-row group: rows g (r 0) and g + 8 (r 1). */
struct left {
	uint4 r[2];
};

/* sum[j] += left x the block's 32 columns: tile j has columns 8 t' + 2 j and one on, t' below 4. */
template <uint32_t M>
static __device__ __forceinline__ void multiply(float (&sum)[M][4][4], const struct left (&x)[M],
						const uint4 *block)
{
	uint4 b[4];

#pragma unroll
	for (uint32_t j = 0; j < 4; j++)
		b[j] = block[j * 32];
#pragma unroll
	for (uint32_t m = 0; m < M; m++) {
#pragma unroll
		for (uint32_t j = 0; j < 4; j++)
			mma_bf16(sum[m][j], x[m].r[0].x, x[m].r[1].x, x[m].r[0].y, x[m].r[1].y, b[j].x, b[j].y);
	}
#pragma unroll
	for (uint32_t m = 0; m < M; m++) {
#pragma unroll
		for (uint32_t j = 0; j < 4; j++)
			mma_bf16(sum[m][j], x[m].r[0].z, x[m].r[1].z, x[m].r[0].w, x[m].r[1].w, b[j].z, b[j].w);
	}
}

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

/* ---- rows ------------------------------------------------------------------------------ */

template <uint32_t Q, uint32_t M> struct rows {
	struct left x[Q][M];
};

/* Slots of this thread's rows of a tile: 16-row group m, row g (0) or g + 8 (1). */
template <typename S>
static __device__ __forceinline__ void find_slots(uint32_t (&slot)[S::M][2], const struct score_args &a,
						  uint32_t lane, uint32_t first)
{
#pragma unroll
	for (uint32_t m = 0; m < S::M; m++) {
#pragma unroll
		for (uint32_t r = 0; r < 2; r++) {
			uint32_t i = first + warp_index() * 16 * S::M + m * 16 + r * 8 + warp_lane() / 4;

			i = min(i, a.n - 1); /* rows past the last are computed as it, and not written */
			slot[m][r] = a.slot_of ? at<const uint32_t>(a.slot_of)[(uint64_t)lane * a.map_rows + a.pos + i] :
						 i;
		}
	}
}

template <typename S>
static __device__ __forceinline__ void load_rows(struct rows<S::Q, S::M> &x, uint64_t base, uint32_t stride,
						 const uint32_t (&slot)[S::M][2])
{
#pragma unroll
	for (uint32_t m = 0; m < S::M; m++) {
#pragma unroll
		for (uint32_t r = 0; r < 2; r++) {
			const unsigned char *row = at<const unsigned char>(base) + (uint64_t)slot[m][r] * stride +
						   warp_lane() % 4 * 16;

#pragma unroll
			for (uint32_t q = 0; q < S::Q; q++)
				x.x[q][m].r[r] = load16_once(row + q * 64);
		}
	}
}

static __device__ __forceinline__ uint32_t f16_to_bf16(uint32_t pair)
{
	float low, high;

	unpack_f16(pair, low, high);
	return pack_bf16(low, high);
}

template <typename S> static __device__ __forceinline__ void to_bf16(struct rows<S::Q, S::M> &x)
{
#pragma unroll
	for (uint32_t q = 0; q < S::Q; q++) {
#pragma unroll
		for (uint32_t i = 0; i < 2 * S::M; i++) {
			uint4 &w = x.x[q][i / 2].r[i % 2];

			w.x = f16_to_bf16(w.x);
			w.y = f16_to_bf16(w.y);
			w.z = f16_to_bf16(w.z);
			w.w = f16_to_bf16(w.w);
		}
	}
}

/* Sine and cosine of pos * turn / 2^64 turns. */
static __device__ __forceinline__ void turn_at(uint64_t turn, uint32_t pos, float &c, float &s)
{
	uint32_t part = (uint32_t)(turn >> 32) * pos + __umulhi((uint32_t)turn, pos);
	float angle = (float)(int32_t)part * 1.4629180792671596e-9f; /* 2 pi / 2^32 */

	sincos_fast(angle, s, c);
}

/* A pair of values as RoPE found it. */
static __device__ __forceinline__ void turn_back(float &a, float &b, float c, float s)
{
	float first = a * c + b * s;

	b = b * c - a * s;
	a = first;
}

static __device__ __forceinline__ void split(uint32_t pair, bool f16, float &low, float &high)
{
	if (f16) {
		unpack_f16(pair, low, high);
	} else {
		low = low_bf16(pair);
		high = high_bf16(pair);
	}
}

static __device__ __forceinline__ uint32_t turn_pair(uint32_t pair, bool f16, uint64_t turn, uint32_t pos)
{
	float a, b, c, s;

	split(pair, f16, a, b);
	turn_at(turn, pos, c, s);
	turn_back(a, b, c, s);
	return pack_bf16(a, b);
}

/* Elements 2 i and 2 i + 1, and their partners half a row further. */
static __device__ __forceinline__ void turn_halves(uint32_t &low, uint32_t &high, bool f16, const uint64_t *turn,
						   uint32_t pos)
{
	float a[2], b[2], c, s;

	split(low, f16, a[0], a[1]);
	split(high, f16, b[0], b[1]);
#pragma unroll
	for (uint32_t i = 0; i < 2; i++) {
		turn_at(turn[i], pos, c, s);
		turn_back(a[i], b[i], c, s);
	}
	low = pack_bf16(a[0], a[1]);
	high = pack_bf16(b[0], b[1]);
}

/* Keys to what they were before RoPE, in bf16. pos: of each group's row g; row g + 8 is 8 positions on. */
template <typename S>
static __device__ __forceinline__ void unrotate(struct rows<S::Q, S::M> &x, bool f16, bool pairs,
						const uint64_t *turn, const uint32_t (&pos)[S::M][2])
{
	const uint32_t t = warp_lane() % 4;

	if (pairs) {
#pragma unroll
		for (uint32_t q = 0; q < S::Q; q++) {
			const uint64_t *p = turn + q * 16 + t * 4;

#pragma unroll
			for (uint32_t i = 0; i < 2 * S::M; i++) {
				uint4 &w = x.x[q][i / 2].r[i % 2];
				uint32_t at_row = pos[i / 2][i % 2];

				w.x = turn_pair(w.x, f16, p[0], at_row);
				w.y = turn_pair(w.y, f16, p[1], at_row);
				w.z = turn_pair(w.z, f16, p[2], at_row);
				w.w = turn_pair(w.w, f16, p[3], at_row);
			}
		}
		return;
	}
#pragma unroll
	for (uint32_t q = 0; q < S::Q / 2; q++) {
		const uint64_t *p = turn + q * 32 + t * 8;

#pragma unroll
		for (uint32_t i = 0; i < 2 * S::M; i++) {
			uint4 &low = x.x[q][i / 2].r[i % 2], &high = x.x[q + S::Q / 2][i / 2].r[i % 2];
			uint32_t at_row = pos[i / 2][i % 2];

			turn_halves(low.x, high.x, f16, p, at_row);
			turn_halves(low.y, high.y, f16, p + 2, at_row);
			turn_halves(low.z, high.z, f16, p + 4, at_row);
			turn_halves(low.w, high.w, f16, p + 6, at_row);
		}
	}
}

/* ---- position ------------------------------------------------------------------------------ */

/* Eight values between two rows of a table, normalised over the quad. */
static __device__ __forceinline__ uint4 normal_position(uint4 low, uint4 high, float part, uint32_t dim,
							const float *ln)
{
	const uint32_t first = warp_lane() % 4 * 8, *l = &low.x, *h = &high.x;
	float x[8], sum = 0, squares = 0, scale;
	uint4 out;

#pragma unroll
	for (uint32_t i = 0; i < 8; i++) {
		float a = i & 1 ? high_bf16(l[i / 2]) : low_bf16(l[i / 2]),
		      b = i & 1 ? high_bf16(h[i / 2]) : low_bf16(h[i / 2]);

		x[i] = a + part * (b - a);
		sum += x[i]; /* padding is zero */
	}
	sum = quad_sum(sum) / (float)dim;
#pragma unroll
	for (uint32_t i = 0; i < 8; i++) {
		x[i] = first + i < dim ? x[i] - sum : 0;
		squares += x[i] * x[i];
	}
	scale = rsqrtf(quad_sum(squares) / (float)dim + SCORER_EPS);
#pragma unroll
	for (uint32_t i = 0; i < 8; i++)
		x[i] = x[i] * scale * ln[first + i] + ln[SCORER_POS_PAD + first + i];
	out.x = pack_bf16(x[0], x[1]);
	out.y = pack_bf16(x[2], x[3]);
	out.z = pack_bf16(x[4], x[5]);
	out.w = pack_bf16(x[6], x[7]);
	return out;
}

static __device__ __forceinline__ uint4 position(const struct scorer_hdr *h, const unsigned char *lane, uint32_t pos)
{
	const unsigned char *table = lane + h->tensor_off[SCORER_POS] + warp_lane() % 4 * 16;
	const uint32_t row = SCORER_POS_PAD * 2, last = h->pos_rows - 1;

	if (h->flags & SCORER_LOG2) {
		float t = fminf((float)h->octave * log2f(1.0f + (float)pos), (float)last);
		uint32_t knot = (uint32_t)t;

		return normal_position(load16(table + (uint64_t)knot * row),
				       load16(table + (uint64_t)min(knot + 1, last) * row), t - (float)knot, h->pos_dim,
				       (const float *)(lane + h->tensor_off[SCORER_POS_LN]));
	}
	return load16(table + (uint64_t)min(pos, last) * row);
}

/* ---- layers -------------------------------------------------------------------------------- */

template <uint32_t G, uint32_t M> struct sums {
	float x[G][M][4][4];
};

template <uint32_t G, uint32_t M>
static __device__ __forceinline__ void start(struct sums<G, M> &u, const float *vec)
{
#pragma unroll
	for (uint32_t g = 0; g < G; g++) {
		struct eight b = load_eight(vec, g);

#pragma unroll
		for (uint32_t m = 0; m < M; m++) {
#pragma unroll
			for (uint32_t i = 0; i < 16; i++)
				u.x[g][m][i / 4][i % 4] = b.x[i / 4 * 2 + i % 2];
		}
	}
}

/* u = u scale + vec; scale by 16-row group and row. */
template <uint32_t G, uint32_t M>
static __device__ __forceinline__ void rescale(struct sums<G, M> &u, const float (&scale)[M][2], const float *vec)
{
#pragma unroll
	for (uint32_t g = 0; g < G; g++) {
		struct eight b = load_eight(vec, g);

#pragma unroll
		for (uint32_t m = 0; m < M; m++) {
#pragma unroll
			for (uint32_t i = 0; i < 16; i++)
				u.x[g][m][i / 4][i % 4] = u.x[g][m][i / 4][i % 4] * scale[m][i % 4 / 2] +
							  b.x[i / 4 * 2 + i % 2];
		}
	}
}

/* Sums over each row's units of u^2. */
template <uint32_t G, uint32_t M>
static __device__ __forceinline__ void add_squares(float (&squares)[M][2], const struct sums<G, M> &u)
{
#pragma unroll
	for (uint32_t g = 0; g < G; g++) {
#pragma unroll
		for (uint32_t m = 0; m < M; m++) {
#pragma unroll
			for (uint32_t i = 0; i < 16; i++) {
				float x = u.x[g][m][i / 4][i % 4];

				squares[m][i % 4 / 2] += x * x;
			}
		}
	}
}

/* Scale of the LayerNorm of centred rows. */
template <uint32_t G, uint32_t M>
static __device__ __forceinline__ void normal_scale(float (&scale)[M][2], const struct sums<G, M> &u)
{
	float squares[M][2] = {};

	add_squares(squares, u);
#pragma unroll
	for (uint32_t m = 0; m < M; m++) {
#pragma unroll
		for (uint32_t r = 0; r < 2; r++)
			scale[m][r] = rsqrtf(quad_sum(squares[m][r]) * (1.0f / (G * 32)) + SCORER_EPS);
	}
}

/* SiLU(2 y) */
static __device__ __forceinline__ float silu2(float y)
{
	return y * tanh_fast(y) + y;
}

/* SiLU(LN(u)) as the next layer's operand. */
template <uint32_t G, uint32_t M>
static __device__ __forceinline__ void activate(struct left (&out)[G][M], const struct sums<G, M> &u,
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
						y[i] = silu2(u.x[g][m][j][r * 2 + i] * scale[m][r] * a.x[j * 2 + i] +
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

/* 1 / sd of each row's projection, from the triangle: the first blocks of a section. */
template <typename S>
static __device__ __forceinline__ void project(float (&sd)[S::M][2], const struct rows<S::Q, S::M> &x,
					       const float *shift, const float *rest, float per_unit,
					       struct stream &s, const uint4 *&chunk)
{
	struct sums<1, S::M> y;
	float squares[S::M][2] = {};

	chunk = use_next<S>(s); /* with a tile's first come its vectors */
#pragma unroll
	for (uint32_t g = 0, block = 0; g < S::Q; g++) {
		start(y, shift + g * 32);
#pragma unroll
		for (uint32_t q = g; q < S::Q; q++, block++) {
			if (block && block % CHUNK_BLOCKS == 0)
				chunk = use_next<S>(s);
			multiply<S::M>(y.x[0], x.x[q], chunk + block % CHUNK_BLOCKS * (SCORER_BLOCK / 16));
		}
		add_squares(squares, y);
	}
#pragma unroll
	for (uint32_t m = 0; m < S::M; m++) {
#pragma unroll
		for (uint32_t r = 0; r < 2; r++)
			sd[m][r] = rsqrtf((quad_sum(squares[m][r]) + *rest) * per_unit + SCORER_EPS);
	}
}

/* u += M x, the matrix's blocks beginning with the section's block FIRST. */
template <typename S, uint32_t FIRST, uint32_t K>
static __device__ __forceinline__ void add_product(struct sums<S::G, S::M> &u, const struct left (&x)[K][S::M],
						   struct stream &s, const uint4 *&chunk)
{
#pragma unroll
	for (uint32_t q = 0; q < K; q++) {
#pragma unroll
		for (uint32_t g = 0; g < S::G; g++) {
			const uint32_t block = FIRST + q * S::G + g;

			if (block % CHUNK_BLOCKS == 0)
				chunk = use_next<S>(s);
			multiply<S::M>(u.x[g], x[q], chunk + block % CHUNK_BLOCKS * (SCORER_BLOCK / 16));
		}
	}
}

/* The last LayerNorm, SiLU and the dots; a quad's threads all get its rows' coefficients. */
template <typename S>
static __device__ __forceinline__ void finish(float (&out)[2][S::M][2], const struct sums<S::G, S::M> &u,
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
			     w0 = load_eight(vecs + S::W3, g), w1 = load_eight(vecs + S::W3 + S::G * 32, g);

#pragma unroll
		for (uint32_t m = 0; m < S::M; m++) {
#pragma unroll
			for (uint32_t i = 0; i < 16; i++) {
				const uint32_t unit = i / 4 * 2 + i % 2, r = i % 4 / 2;
				float y = silu2(u.x[g][m][i / 4][i % 4] * scale[m][r] * a.x[unit] + b.x[unit]);

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
	const unsigned char *lanes = (const unsigned char *)h + h->lane_off + a.lane * h->lane_stride;
	uint64_t *turn = (uint64_t *)(shared + STAGES * SCORER_CHUNK + 2 * S::VECS * 4);
	const uint32_t lane_tiles = (a.n + S::ROWS - 1) / S::ROWS, coefs = h->coefs, flags = h->flags;
	const float per_unit = 1.0f / (float)h->proj;
	struct stream s;
	struct rows<S::Q, S::M> next;
	uint32_t slot[S::M][2], pos[S::M][2], vec = 0;
	const struct cuda_lane *memory = at<const struct cuda_lane>(a.rows);

	s.lanes = lanes;
	s.lane_stride = h->lane_stride;
	s.vecs_off = h->tensor_off[SCORER_VECS];
	s.stage = shared;
	s.vecs = shared + STAGES * SCORER_CHUNK;
	s.tiles = lane_tiles * a.lanes;
	s.lane_tiles = lane_tiles;
	s.copy_tile = blockIdx.x;
	s.copy_chunk = s.copy_stage = s.use_stage = s.vec = 0;
	for (uint32_t i = 0; i < STAGES - 1; i++)
		copy_next<S>(s);
	if (flags & SCORER_UNROTATE)
		for (uint32_t i = threadIdx.x; i < D / 2; i += BLOCK)
			turn[i] = at<const uint64_t>(a.scorer + h->turn_off)[i];
	__syncthreads();
	if (blockIdx.x < s.tiles) {
		const uint32_t lane = blockIdx.x / lane_tiles;

		find_slots<S>(slot, a, lane, (blockIdx.x - lane * lane_tiles) * S::ROWS);
		load_rows<S>(next, memory[lane].k, memory[lane].k_row, slot);
	}

	for (uint32_t tile = blockIdx.x; tile < s.tiles; tile += gridDim.x) {
		const uint32_t lane = tile / lane_tiles, first = (tile - lane * lane_tiles) * S::ROWS;
		const float *vecs = (const float *)(s.vecs + vec * (S::VECS * 4));
		struct sums<S::G, S::M> u;
		struct rows<S::Q, S::M> x;
		struct left place[1][S::M], hidden[S::G][S::M];
		float inverse[S::M][2], scale[S::M][2], out[2][S::M][2];
		const uint4 *chunk = NULL;

		vec ^= 1;
#pragma unroll
		for (uint32_t i = 0; i < 2 * S::M; i++) {
			pos[i / 2][i % 2] = a.pos + min(first + warp_index() * 16 * S::M + i * 8 + warp_lane() / 4, a.n - 1);
		}
		x = next;
		load_rows<S>(next, memory[lane].v, memory[lane].v_row, slot);
		if (flags & SCORER_UNROTATE)
			unrotate<S>(x, a.dtype == F16, flags & SCORER_ROPE_PAIRS, turn, pos);
		else if (a.dtype == F16)
			to_bf16<S>(x);

		project<S>(inverse, x, vecs + S::RK, vecs + S::REST, per_unit, s, chunk);
		start(u, vecs + S::MK);
		add_product<S, S::TRI, S::Q>(u, x.x, s, chunk);

		x = next;
		if (a.dtype == F16)
			to_bf16<S>(x);
		project<S>(scale, x, vecs + S::RV, vecs + S::REST + 1, per_unit, s, chunk);
#pragma unroll
		for (uint32_t i = 0; i < 2 * S::M; i++)
			inverse[i / 2][i % 2] /= scale[i / 2][i % 2];
		rescale(u, inverse, vecs + S::MV);
		add_product<S, S::TRI, S::Q>(u, x.x, s, chunk);
#pragma unroll
		for (uint32_t i = 0; i < 2 * S::M; i++)
			place[0][i / 2].r[i % 2] = position(h, lanes + lane * s.lane_stride, pos[i / 2][i % 2]);
		rescale(u, scale, vecs + S::C);

		add_product<S, 0, 1>(u, place, s, chunk);
		activate(hidden, u, vecs + S::G1, vecs + S::O1);
		start(u, vecs + S::B2);
		add_product<S, S::G, S::G>(u, hidden, s, chunk);

		if (tile + gridDim.x < s.tiles) {
			const uint32_t after = (tile + gridDim.x) / lane_tiles;

			find_slots<S>(slot, a, after, (tile + gridDim.x - after * lane_tiles) * S::ROWS);
			load_rows<S>(next, memory[after].k, memory[after].k_row, slot);
		}
		finish<S>(out, u, vecs, coefs > 1);
		store<S>(a, out, coefs, lane, first);
	}
	async_wait<0>();
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
