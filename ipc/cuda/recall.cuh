/* SPDX-License-Identifier: MIT */
#pragma once
/* What the kernels of recall share: tiles of 32 rows, products with the queries, places of rows, the k largest.
 */
#include <cuda_fp16.h>
#include "ipc/cuda/common.cuh"
#include "ipc/cuda/recall_args.h"

#define FIND_PIECES 4u  /* of 16 bytes that one thread holds: 32 rows of 512 bytes are 1,024 */
#define FIND_BATCH 4u   /* queries of one thread at a time */
#define FIND_PAD 4u     /* floats behind each row of a tile: no bank is hit twice */
#define FIND_BINS 2048u /* of a histogram */
#define FIND_LIST 2048u /* elements of one bin that are looked at one by one */
#define FIND_WIDE 1024u /* threads of a block that is alone with a head's rows */
#define FIND_WIDE_WARPS (FIND_WIDE / WARP)
#define FIND_AHEAD 4u /* loads of one of its threads on their way */
#define FIND_WIDE_KERNEL extern "C" __global__ void __launch_bounds__(FIND_WIDE, 1)

enum { FIND_F32 = 1, FIND_F16 = 2, FIND_BF16 = 3 }; /* enum kvtier_dtype */

static __device__ __forceinline__ uint32_t find_elem(uint32_t dtype)
{
	return dtype == FIND_F32 ? 4 : 2;
}

/* ---- order ------------------------------------------------------------------------------ */

/* Floats as integers of the same order; 0, below all of them, for -inf and NaN. */
static __device__ __forceinline__ uint32_t ordered(float f)
{
	uint32_t u = __float_as_uint(f);

	return !(f > -INFINITY) ? 0 : u & 0x80000000u ? ~u : u | 0x80000000u;
}
static __device__ __forceinline__ float unordered(uint32_t u)
{
	return !u ? -INFINITY : __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

/* ---- whole blocks ------------------------------------------------------------------------- */

/* Sum over the threads up to and with this one, and of all; `sums`: a word of shared memory for each warp. */
template <uint32_t threads = BLOCK>
static __device__ __forceinline__ uint32_t find_prefix(uint32_t x, uint32_t *sums, uint32_t *ret_all)
{
	uint32_t own = warp_prefix(x), before = 0, all = 0;

	__syncthreads(); /* sums may be in use */
	if (warp_lane() == WARP - 1)
		sums[warp_index()] = own;
	__syncthreads();
	for (uint32_t w = 0; w < threads / WARP; w++) {
		before += w < warp_index() ? sums[w] : 0;
		all += sums[w];
	}
	*ret_all = all;
	return own + before;
}
static __device__ __forceinline__ float find_max(float x)
{
	for (uint32_t d = WARP / 2; d; d >>= 1)
		x = fmaxf(x, __shfl_xor_sync(ALL, x, d));
	return x;
}
static __device__ __forceinline__ float find_add(float x)
{
	for (uint32_t d = WARP / 2; d; d >>= 1)
		x += __shfl_xor_sync(ALL, x, d);
	return x;
}

/* ---- tiles -------------------------------------------------------------------------------- */

/* Up to 32 rows somewhere; those without a bit in `live` are not read and count as zeros. */
struct find_rows {
	const char *at;
	uint32_t stride, live;
};
/* This thread's pieces of a tile, on their way. */
struct find_pieces {
	uint4 v[FIND_PIECES];
};

/* `pieces` of 16 bytes make a row. */
static __device__ __forceinline__ void tile_fetch(struct find_pieces *p, struct find_rows r, uint32_t pieces)
{
#pragma unroll
	for (uint32_t j = 0; j < FIND_PIECES; j++) {
		uint32_t i = threadIdx.x + j * BLOCK, row = i / pieces;

		p->v[j] = make_uint4(0, 0, 0, 0);
		if (row < FIND_GROUP && r.live >> row & 1)
			p->v[j] = load16_once(r.at + (uint64_t)row * r.stride + (i - row * pieces) * 16);
	}
}
static __device__ __forceinline__ float2 find_widen(uint32_t x, uint32_t dtype)
{
	if (dtype == FIND_BF16)
		return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
	return make_float2(__half2float(__ushort_as_half((unsigned short)x)),
			   __half2float(__ushort_as_half((unsigned short)(x >> 16))));
}
/* Into shared memory as floats: x[32][dim + FIND_PAD]. */
static __device__ __forceinline__ void tile_store(float *x, const struct find_pieces *p, uint32_t pieces,
						  uint32_t dim, uint32_t dtype)
{
#pragma unroll
	for (uint32_t j = 0; j < FIND_PIECES; j++) {
		uint32_t i = threadIdx.x + j * BLOCK, row = i / pieces, col = i - row * pieces;
		float *to = x + row * (dim + FIND_PAD);
		uint4 v = p->v[j];

		if (row >= FIND_GROUP)
			continue;
		if (dtype == FIND_F32) {
			*(uint4 *)(to + col * 4) = v;
		} else {
			float2 a = find_widen(v.x, dtype), b = find_widen(v.y, dtype),
			       c = find_widen(v.z, dtype), d = find_widen(v.w, dtype);

			*(float4 *)(to + col * 8) = make_float4(a.x, a.y, b.x, b.y);
			*(float4 *)(to + col * 8 + 4) = make_float4(c.x, c.y, d.x, d.y);
		}
	}
}
/* Products of the tile's row (the thread's lane) with the queries from + warp + j * WARPS. */
static __device__ __forceinline__ void tile_dots(const float *x, const float *qt, uint32_t dim,
						 uint32_t queries, uint32_t from, float *ret)
{
	const float4 *row = (const float4 *)(x + warp_lane() * (dim + FIND_PAD)), *q[FIND_BATCH];

#pragma unroll
	for (uint32_t j = 0; j < FIND_BATCH; j++) {
		uint32_t i = from + warp_index() + j * WARPS;

		q[j] = (const float4 *)(qt + (uint64_t)(i < queries ? i : queries - 1) * dim);
		ret[j] = 0;
	}
#pragma unroll 4
	for (uint32_t d = 0; d < dim / 4; d++) {
		float4 k = row[d];

#pragma unroll
		for (uint32_t j = 0; j < FIND_BATCH; j++) {
			float4 v = q[j][d];

			ret[j] = fmaf(k.x, v.x, ret[j]);
			ret[j] = fmaf(k.y, v.y, ret[j]);
			ret[j] = fmaf(k.z, v.z, ret[j]);
			ret[j] = fmaf(k.w, v.w, ret[j]);
		}
	}
#pragma unroll
	for (uint32_t j = 0; j < FIND_BATCH; j++)
		ret[j] = isfinite(ret[j]) ? ret[j] : -INFINITY;
}

/* ---- where rows are: one warp, one page --------------------------------------------------------- */

struct find_words {
	uint64_t pos;    /* the page's word `lane` */
	uint32_t before; /* rows before it */
};
static __device__ __forceinline__ struct find_words page_words(const struct find_page *p)
{
	struct find_words w = {.pos = warp_lane() < p->span ? p->pos[warp_lane()] : 0, .before = 0};
	uint32_t n = (uint32_t)__popcll(w.pos);

	w.before = warp_prefix(n) - n;
	return w;
}
/* Bits of the page's words that packed row r, one per thread, has; nonsense at and past the page's rows. */
static __device__ __forceinline__ uint32_t row_bit(struct find_words w, uint32_t r)
{
	uint32_t word = 0, before;
	uint64_t pos;

	for (uint32_t d = WARP / 2; d; d >>= 1) {
		uint32_t b = __shfl_sync(ALL, w.before, (word + d) % WARP);

		word += b <= r ? d : 0;
	}
	before = __shfl_sync(ALL, w.before, word);
	pos = __shfl_sync(ALL, w.pos, word);
	return word * 64 + select64(pos, (r - before) % 64);
}
/* Rank of a position among the rows of its lane that may be recalled. */
static __device__ __forceinline__ uint32_t rank_of(const struct find_index &ix, uint32_t lane, uint32_t pos)
{
	uint64_t word = (uint64_t)lane * ix.words + pos / 64;

	return at<const uint32_t>(ix.rank)[word] +
	       (uint32_t)__popcll(at<const uint64_t>(ix.bits)[word] & ((1ull << pos % 64) - 1));
}

/* ---- the k largest, by one block of FIND_WIDE threads ---------------------------------------------------- */

struct find_edge {
	uint32_t key, left; /* what is above key, and of what equals it the first `left` */
};
struct find_shared {
	uint32_t bin[FIND_BINS], list[FIND_LIST], sums[3 * FIND_WIDE_WARPS], at, above, n;
};

/* Four of v[n] from i on, 0 past the end. */
static __device__ __forceinline__ uint4 load_four(const uint32_t *v, uint32_t i, uint32_t n)
{
	uint4 x = make_uint4(0, 0, 0, 0);

	if (i + 4 <= n)
		return load16(v + i);
	x.x = i < n ? v[i] : 0;
	x.y = i + 1 < n ? v[i + 1] : 0;
	x.z = i + 2 < n ? v[i + 2] : 0;
	return x;
}
/* f(x) for every element of v[n] that is not 0, several loads on their way at a time. */
template <typename F> static __device__ __forceinline__ void each_of(const uint32_t *v, uint32_t n, F f)
{
	for (uint32_t from = threadIdx.x * 4; from < n; from += FIND_WIDE * 4 * FIND_AHEAD) {
		uint4 x[FIND_AHEAD];

#pragma unroll
		for (uint32_t j = 0; j < FIND_AHEAD; j++)
			x[j] = load_four(v, from + j * FIND_WIDE * 4, n);
#pragma unroll
		for (uint32_t j = 0; j < FIND_AHEAD; j++) {
			f(x[j].x);
			f(x[j].y);
			f(x[j].z);
			f(x[j].w);
		}
	}
}

/* Count those of v[n] by bin(x), below FIND_BINS; equal neighbours at once. bin() < 0: it does not count. */
template <typename F>
static __device__ __forceinline__ void count_bins(const uint32_t *v, uint32_t n, uint32_t *bins, F bin)
{
	uint32_t last = 0, same = 0;

	for (uint32_t i = threadIdx.x; i < FIND_BINS; i += FIND_WIDE)
		bins[i] = 0;
	__syncthreads();
	each_of(v, n, [&](uint32_t x) {
		int b;

		if (x == last) {
			same++;
			return;
		}
		b = last ? bin(last) : -1;
		if (b >= 0)
			atomicAdd(&bins[b], same);
		last = x;
		same = 1;
	});
	if (last && bin(last) >= 0)
		atomicAdd(&bins[bin(last)], same);
	__syncthreads();
}

/* The bin that the k-th largest is in, into s->at; what is in higher ones into s->above. Returns its count. */
static __device__ uint32_t find_bin(uint32_t k, struct find_shared *s)
{
	uint32_t own = 0, all, bin = threadIdx.x * (FIND_BINS / FIND_WIDE), above, n;

	for (uint32_t i = 0; i < FIND_BINS / FIND_WIDE; i++)
		own += s->bin[bin + i];
	above = find_prefix<FIND_WIDE>(own, s->sums, &all);
	above = all - above;
	if (above < k && above + own >= k) {
		uint32_t i = FIND_BINS / FIND_WIDE - 1;

		for (; above + s->bin[bin + i] < k; i--)
			above += s->bin[bin + i];
		s->at = bin + i;
		s->above = above;
	}
	__syncthreads();
	n = s->bin[s->at];
	__syncthreads(); /* the bins are free */
	return n;
}

/* The k-th largest of v[n], digit by digit (11, 11 and 10 bits); there are more than k. */
static __device__ struct find_edge edge_by_digits(const uint32_t *v, uint32_t n, uint32_t k,
						  struct find_shared *s)
{
	uint32_t key = 0, mask = 0;

	for (int pass = 0; pass < 3; pass++) {
		uint32_t shift = pass == 0   ? 21
				 : pass == 1 ? 10
					     : 0; /* the last has a bit of the one before, too */

		count_bins(v, n, s->bin, [&](uint32_t x) {
			return (x & mask) == key ? (int)(x >> shift & (FIND_BINS - 1)) : -1;
		});
		find_bin(k, s);
		k -= s->above;
		key |= s->at << shift;
		mask |= (FIND_BINS - 1) << shift;
	}
	return (struct find_edge){key, k};
}

/* The same of a list of at most FIND_WIDE elements: each thread counts what is above its own. */
static __device__ struct find_edge edge_of_few(const uint32_t *v, uint32_t n, uint32_t k, struct find_shared *s)
{
	uint32_t own = threadIdx.x < n ? v[threadIdx.x] : 0, above = 0, same = 0;

	for (uint32_t i = 0; i < n; i++) {
		above += v[i] > own;
		same += v[i] == own;
	}
	if (threadIdx.x < n && above < k && above + same >= k) { /* all who are equal say the same */
		s->at = own;
		s->above = above;
	}
	__syncthreads();
	return (struct find_edge){s->at, k - s->above};
}

/* Smallest, largest and number of those of v[n] that are not 0. All threads get them. */
static __device__ void find_range(const uint32_t *v, uint32_t n, struct find_shared *s, uint32_t *ret_low,
				  uint32_t *ret_high, uint32_t *ret_n)
{
	uint32_t low = UINT32_MAX, high = 0, all = 0;

	each_of(v, n, [&](uint32_t x) {
		low = x && x < low ? x : low;
		high = max(high, x);
		all += x != 0;
	});
	low = __reduce_min_sync(ALL, low);
	high = __reduce_max_sync(ALL, high);
	all = warp_sum(all);
	if (!warp_lane()) {
		s->sums[warp_index()] = low;
		s->sums[FIND_WIDE_WARPS + warp_index()] = high;
		s->sums[2 * FIND_WIDE_WARPS + warp_index()] = all;
	}
	__syncthreads();
	all = 0;
	for (uint32_t w = 0; w < FIND_WIDE_WARPS; w++) {
		low = min(low, s->sums[w]);
		high = max(high, s->sums[FIND_WIDE_WARPS + w]);
		all += s->sums[2 * FIND_WIDE_WARPS + w];
	}
	*ret_low = low;
	*ret_high = high;
	*ret_n = all;
}

/*
 * The k-th largest of v[n] that are not 0 (scores, as ordered() makes them). With k or fewer of them: {0, 0},
 * all of them. Equal steps between the smallest and the largest leave few elements in a bin, where the digits
 * of floats would leave thousands; should they not, digits it is. v is aligned to 16 bytes.
 */
static __device__ struct find_edge find_edge(const uint32_t *v, uint32_t n, uint32_t k, struct find_shared *s)
{
	uint32_t low, high, all, in;
	float bottom, step;

	find_range(v, n, s, &low, &high, &all);
	if (all <= k)
		return (struct find_edge){0, 0};
	bottom = unordered(low);
	step = (float)(FIND_BINS - 1) / (unordered(high) - bottom);
	if (!isfinite(step))
		return edge_by_digits(v, n, k, s);
	auto bin = [&](uint32_t x) { return min((int)((unordered(x) - bottom) * step), (int)FIND_BINS - 1); };

	count_bins(v, n, s->bin, bin);
	in = find_bin(k, s);
	if (in > FIND_LIST)
		return edge_by_digits(v, n, k, s);
	uint32_t at = s->at, above = s->above;

	if (!threadIdx.x)
		s->n = 0;
	__syncthreads();
	each_of(v, n, [&](uint32_t x) {
		if (x && (uint32_t)bin(x) == at)
			s->list[atomicAdd(&s->n, 1u)] = x;
	});
	__syncthreads();
	return in <= FIND_WIDE ? edge_of_few(s->list, in, k - above, s)
			       : edge_by_digits(s->list, in, k - above, s);
}

/* The bits of 32 elements that are taken, one per thread; *eq counts those that equal the edge. */
static __device__ __forceinline__ uint32_t edge_word(struct find_edge e, uint32_t x, uint32_t *eq)
{
	uint32_t is = __ballot_sync(ALL, x && x == e.key), over = __ballot_sync(ALL, x > e.key), n = __popc(is),
		 room = e.left > *eq ? e.left - *eq : 0;

	*eq += n;
	for (; n > room; n--) /* the last ones go */
		is &= ~(0x80000000u >> __clz((int)is));
	return is | over;
}

/*
 * Which of v[n] are taken: bits of 32 elements to take[] and copy[], how many before them to base[]; or their
 * indices, ascending, to list[]. What is not wanted is NULL. Returns how many.
 */
static __device__ uint32_t edge_take(struct find_edge e, const uint32_t *v, uint32_t n, uint32_t *take,
				     uint32_t *copy, uint32_t *base, uint32_t *list, struct find_shared *s)
{
	uint32_t words = (n + 31) / 32, each = (words + FIND_WIDE_WARPS - 1) / FIND_WIDE_WARPS,
		 from = warp_index() * each, to = min(from + each, words), eq = 0, over = 0, out = 0, all = 0,
		 lane = warp_lane();

#pragma unroll 8
	for (uint32_t w = from; w < to; w++) {
		uint32_t x = w * 32 + lane < n ? v[w * 32 + lane] : 0;

		eq += x && x == e.key;
		over += x > e.key;
	}
	eq = warp_sum(eq);
	over = warp_sum(over);
	__syncthreads();
	if (!lane) {
		s->bin[warp_index()] = eq;
		s->bin[FIND_WIDE_WARPS + warp_index()] = over;
	}
	__syncthreads();
	eq = 0;
	for (uint32_t w = 0, seen = 0; w < FIND_WIDE_WARPS; w++) {
		uint32_t room = e.left > seen ? e.left - seen : 0,
			 took = min(s->bin[w], room) + s->bin[FIND_WIDE_WARPS + w];

		out += w < warp_index() ? took : 0;
		eq += w < warp_index() ? s->bin[w] : 0;
		seen += s->bin[w];
		all += took;
	}
	for (; from < to; from += FIND_AHEAD) {
		uint32_t x[FIND_AHEAD];

#pragma unroll
		for (uint32_t j = 0; j < FIND_AHEAD; j++) {
			uint32_t i = (from + j) * 32 + lane;

			x[j] = from + j < to && i < n ? v[i] : 0;
		}
#pragma unroll
		for (uint32_t j = 0; j < FIND_AHEAD; j++) {
			uint32_t w = from + j, bits = edge_word(e, x[j], &eq);

			if (list && bits >> lane & 1)
				list[out + (uint32_t)__popc(bits & ((1u << lane) - 1))] = w * 32 + lane;
			if (take && !lane && w < to) {
				take[w] = bits;
				copy[w] = bits;
				base[w] = out;
			}
			out += (uint32_t)__popc(bits);
		}
	}
	return all;
}

/* ---- one head of a layer ------------------------------------------------------------------------- */

struct find_head {
	uint32_t lane, groups, queries;
	const uint32_t *group; /* of the lane */
	const float *qt;
};
static __device__ __forceinline__ struct find_head find_head(const struct find_args &a, uint32_t h)
{
	struct find_head f = {
		.lane = a.first + h, .groups = 0, .queries = a.group * a.tokens, .group = NULL, .qt = NULL};

	f.groups = at<const uint32_t>(a.ix.groups)[f.lane];
	f.group =
		at<const uint32_t>(a.ix.group) + (uint64_t)at<const uint32_t>(a.ix.start)[f.lane] * FIND_PARTS;
	f.qt = at<const float>(a.qt) + (uint64_t)h * f.queries * a.dim;
	return f;
}

/* Groups to look into of so many; policy/recall.h says why. */
static __device__ __forceinline__ uint32_t find_probes(const struct find_args &a, uint32_t groups)
{
	uint64_t share = ((uint64_t)groups * a.probe + 999) / 1000,
		 rows = ((uint64_t)a.want * 4 + FIND_GROUP - 1) / FIND_GROUP,
		 most = share > rows ? share : rows;

	return (uint32_t)(most < groups ? most : groups);
}
