/* SPDX-License-Identifier: MIT */
#pragma once
/* From rows where they lie, and their positions, to operands of the tensor cores. */
#include "ipc/cuda/score_shape.cuh"

namespace net
{

/* Index among the call's rows of this thread's: 16-row group m, row g (r 0) or g + 8 (1). */
template <typename S>
static __device__ __forceinline__ uint32_t row_index(uint32_t first, uint32_t m, uint32_t r)
{
	return first + warp_index() * 16 * S::M + m * 16 + r * 8 + warp_lane() / 4;
}

/* Slots of this thread's rows of a tile. Rows past the last are computed as it, and not written. */
template <typename S>
static __device__ __forceinline__ void find_slots(uint32_t (&slot)[S::M][2], const struct score_args &a,
						  uint32_t lane, uint32_t first)
{
#pragma unroll
	for (uint32_t m = 0; m < S::M; m++) {
#pragma unroll
		for (uint32_t r = 0; r < 2; r++) {
			uint32_t i = min(row_index<S>(first, m, r), a.n - 1);

			slot[m][r] =
				a.slot_of
					? at<const uint32_t>(a.slot_of)[(uint64_t)lane * a.map_rows + a.pos + i]
					: i;
		}
	}
}

template <typename S>
static __device__ __forceinline__ void load_rows(struct left (&x)[S::Q][S::M], uint64_t base, uint32_t stride,
						 const uint32_t (&slot)[S::M][2])
{
#pragma unroll
	for (uint32_t m = 0; m < S::M; m++) {
#pragma unroll
		for (uint32_t r = 0; r < 2; r++) {
			const unsigned char *row = at<const unsigned char>(base) +
						   (uint64_t)slot[m][r] * stride + warp_lane() % 4 * 16;

#pragma unroll
			for (uint32_t q = 0; q < S::Q; q++)
				x[q][m].r[r] = load16_once(row + q * 64);
		}
	}
}

template <typename S>
static __device__ __forceinline__ void take(struct left (&x)[S::Q][S::M], const struct left (&from)[S::Q][S::M])
{
#pragma unroll
	for (uint32_t i = 0; i < S::Q * S::M; i++)
		x[i / S::M][i % S::M] = from[i / S::M][i % S::M];
}

static __device__ __forceinline__ uint32_t f16_to_bf16(uint32_t pair)
{
	float low, high;

	unpack_f16(pair, low, high);
	return pack_bf16(low, high);
}

template <typename S> static __device__ __forceinline__ void to_bf16(struct left (&x)[S::Q][S::M])
{
#pragma unroll
	for (uint32_t q = 0; q < S::Q; q++) {
#pragma unroll
		for (uint32_t i = 0; i < 2 * S::M; i++) {
			uint4 &w = x[q][i / 2].r[i % 2];

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
static __device__ __forceinline__ void turn_halves(uint32_t &low, uint32_t &high, bool f16,
						   const uint64_t *turn, uint32_t pos)
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

/* Keys to what they were before RoPE, in bf16. */
template <typename S>
static __device__ __forceinline__ void unrotate(struct left (&x)[S::Q][S::M], const struct score_args &a,
						bool pairs, const uint64_t *turn, uint32_t first)
{
	const uint32_t t = warp_lane() % 4;
	const bool f16 = a.dtype == F16;

#pragma unroll
	for (uint32_t i = 0; i < 2 * S::M; i++) {
		const uint32_t pos = a.pos + min(row_index<S>(first, i / 2, i % 2), a.n - 1);

		if (pairs) {
#pragma unroll
			for (uint32_t q = 0; q < S::Q; q++) {
				const uint64_t *p = turn + q * 16 + t * 4;
				uint4 &w = x[q][i / 2].r[i % 2];

				w.x = turn_pair(w.x, f16, p[0], pos);
				w.y = turn_pair(w.y, f16, p[1], pos);
				w.z = turn_pair(w.z, f16, p[2], pos);
				w.w = turn_pair(w.w, f16, p[3], pos);
			}
			continue;
		}
#pragma unroll
		for (uint32_t q = 0; q < S::Q / 2; q++) {
			const uint64_t *p = turn + q * 32 + t * 8;
			uint4 &low = x[q][i / 2].r[i % 2], &high = x[q + S::Q / 2][i / 2].r[i % 2];

			turn_halves(low.x, high.x, f16, p, pos);
			turn_halves(low.y, high.y, f16, p + 2, pos);
			turn_halves(low.z, high.z, f16, p + 4, pos);
			turn_halves(low.w, high.w, f16, p + 6, pos);
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

static __device__ __forceinline__ uint4 position(const struct scorer_hdr *h, const unsigned char *lane,
						 uint32_t pos)
{
	const unsigned char *table = lane + h->tensor_off[SCORER_POS] + warp_lane() % 4 * 16;
	const uint32_t row = SCORER_POS_PAD * 2, last = h->pos_rows - 1;

	if (h->flags & SCORER_LOG2) {
		float t = fminf((float)h->octave * log2f(1.0f + (float)pos), (float)last);
		uint32_t knot = (uint32_t)t;

		return normal_position(load16(table + (uint64_t)knot * row),
				       load16(table + (uint64_t)min(knot + 1, last) * row), t - (float)knot,
				       h->pos_dim, (const float *)(lane + h->tensor_off[SCORER_POS_LN]));
	}
	return load16(table + (uint64_t)min(pos, last) * row);
}

/* The position features of this thread's rows. */
template <typename S>
static __device__ __forceinline__ void find_places(struct left (&place)[1][S::M], const struct scorer_hdr *h,
						   const unsigned char *lane, const struct score_args &a,
						   uint32_t first)
{
#pragma unroll
	for (uint32_t i = 0; i < 2 * S::M; i++)
		place[0][i / 2].r[i % 2] =
			position(h, lane, a.pos + min(row_index<S>(first, i / 2, i % 2), a.n - 1));
}
} /* namespace net */
