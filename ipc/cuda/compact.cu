/* SPDX-License-Identifier: MIT */
/* After a plan: the rows that stay close up. Blocks are (part, lane); every part of a lane finds its moves by
 * itself. */
#include "ipc/cuda/common.cuh"

#define MAPS_AHEAD 8u /* rows of a thread whose positions are on their way */
#define COPY_AHEAD 4u /* pieces of a thread in flight */

/* What a warp copies at a time. */
struct moves {
	uint32_t from[WARP], to[WARP]; /* slots */
};

/* Bitmaps of one lane. */
struct lane_bits {
	const uint64_t *resident, *bring_in;
};

static __device__ __forceinline__ struct lane_bits lane_bits(const struct compact_args &a, uint32_t lane)
{
	return {at<const uint64_t>(a.resident) + (uint64_t)lane * a.words,
		at<const uint64_t>(a.bring_in) + (uint64_t)lane * a.words};
}

/* Exclusive sum over the block; *ret_all: of everybody. sh: WARPS words, free again after the next barrier. */
static __device__ uint32_t block_before(uint32_t x, uint32_t *sh, uint32_t *ret_all)
{
	uint32_t upto = warp_prefix(x), before = 0, all = 0;

	__syncthreads();
	if (warp_lane() == WARP - 1)
		sh[warp_index()] = upto;
	__syncthreads();
	for (uint32_t w = 0; w < WARPS; w++) {
		before += w < warp_index() ? sh[w] : 0;
		all += sh[w];
	}
	*ret_all = all;
	return before + upto - x;
}

/* count[0, n): from counts to sums of those before. Every thread a run of neighbours. Ends with a barrier. */
static __device__ void prefix(uint32_t *count, uint32_t n, uint32_t *sh)
{
	uint32_t run = (n + BLOCK - 1) / BLOCK, from = threadIdx.x * run, sum = 0, all;

	for (uint32_t i = from; i < from + run && i < n; i++)
		sum += count[i];
	sum = block_before(sum, sh, &all);
	for (uint32_t i = from; i < from + run && i < n; i++) {
		uint32_t c = count[i];

		count[i] = sum;
		sum += c;
	}
	__syncthreads();
}

/*
 * The n moves of a list in shared memory, by the warp: K, then V, each in pieces of 16 bytes, 32 apart for a
 * thread. Neighbours in a row are neighbours in the warp, so every access is of whole rows.
 */
static __device__ __forceinline__ void copy_moves(const struct cuda_lane &l, const struct cuda_lane &t,
						  const struct moves *m, uint32_t n)
{
#pragma unroll 1
	for (uint32_t plane = 0; plane < 2; plane++) {
		uint64_t from = plane ? l.v : l.k, to = plane ? t.v : t.k;
		uint32_t from_row = plane ? l.v_row : l.k_row, to_row = plane ? t.v_row : t.k_row;
		uint32_t per = (plane ? l.v_bytes : l.k_bytes) / 16, all = n * per, j = warp_lane();
		uint32_t row = per ? j / per : 0, off = per ? j % per : 0;
		uint32_t step = per ? WARP / per : 0, rest = per ? WARP % per : 0;

		while (j < all) {
			uint4 x[COPY_AHEAD];
			uint64_t put[COPY_AHEAD];

#pragma unroll
			for (uint32_t u = 0; u < COPY_AHEAD; u++) {
				if (j + u * WARP < all) {
					x[u] = load16_once(at<const void>(
						from + (uint64_t)m->from[row] * from_row + off * 16));
					put[u] = to + (uint64_t)m->to[row] * to_row + off * 16;
				}
				row += step;
				off += rest;
				if (off >= per) {
					off -= per;
					row++;
				}
			}
#pragma unroll
			for (uint32_t u = 0; u < COPY_AHEAD; u++, j += WARP)
				if (j < all)
					store16(at<void>(put[u]), x[u]);
		}
	}
}

/* ---- in place ---- */

/* A lane's slots: which survive, and how many of them are before each word. */
struct slots {
	uint32_t *live, *before; /* [words] */
	uint32_t words, near, far, moves, after;
};

/* Does the row at position p stay where it is? keep: resident and not coming in, in shared memory, or NULL. */
static __device__ __forceinline__ bool stays(const struct compact_args &a, const struct lane_bits &b,
					     const uint32_t *keep, uint32_t p)
{
	if (p >= a.watermark)
		return true;
	if (keep)
		return keep[p / 32] >> p % 32 & 1;
	return (b.resident[p / 64] & ~b.bring_in[p / 64]) >> p % 64 & 1;
}

/* One bit per slot. A warp takes 32 words of 32 slots at a time, so that 32 loads of each thread overlap. */
static __device__ void find_live(const struct compact_args &a, const struct lane_bits &b, const uint32_t *keep,
				 const uint32_t *pos_of, uint32_t count, struct slots *s)
{
	for (uint32_t w0 = warp_index() * WARP; w0 < s->words; w0 += BLOCK) {
		uint32_t p[WARP], mine = 0;

#pragma unroll
		for (uint32_t u = 0; u < WARP; u++) {
			uint32_t slot = (w0 + u) * 32 + warp_lane();

			p[u] = slot < count ? pos_of[slot] : 0;
		}
#pragma unroll
		for (uint32_t u = 0; u < WARP; u++) {
			bool live = (w0 + u) * 32 + warp_lane() < count && stays(a, b, keep, p[u]);
			uint32_t bits = __ballot_sync(ALL, live);

			mine = warp_lane() == u ? bits : mine;
		}
		if (w0 + warp_lane() < s->words) {
			s->live[w0 + warp_lane()] = mine;
			s->before[w0 + warp_lane()] = __popc(mine);
		}
	}
}

/* Live slots below `slot`. */
static __device__ __forceinline__ uint32_t live_below(const struct slots *s, uint32_t slot)
{
	uint32_t w = slot / 32;

	if (w >= s->words)
		w = s->words - 1, slot = s->words * 32;
	return s->before[w] + __popc(s->live[w] & (uint32_t)range_mask(0, 0, slot - w * 32));
}

/* The k-th slot below `after` that is free. */
static __device__ __forceinline__ uint32_t hole(const struct slots *s, uint32_t k)
{
	uint32_t low = 0, high = s->words; /* the last word with at most k holes before it */

	while (high - low > 1) {
		uint32_t mid = (low + high) / 2;

		if (mid * 32 - s->before[mid] <= k)
			low = mid;
		else
			high = mid;
	}
	return low * 32 + select64(~s->live[low], k - (low * 32 - s->before[low]));
}

/* The k-th live slot. */
static __device__ __forceinline__ uint32_t live(const struct slots *s, uint32_t k)
{
	uint32_t low = 0, high = s->words;

	while (high - low > 1) {
		uint32_t mid = (low + high) / 2;

		if (s->before[mid] <= k)
			low = mid;
		else
			high = mid;
	}
	return low * 32 + select64(s->live[low], k - s->before[low]);
}

/* Where the k-th move comes from: the rows that are too far up, then the staged ones. */
static __device__ __forceinline__ uint32_t source(const struct compact_args &a, const struct slots *s,
						  uint32_t k)
{
	return k < s->far ? live(s, s->near + k) : a.cap + (k - s->far);
}

/* The maps of a lane, by the block that came last: until then others read them. */
static __device__ void set_maps(const struct compact_args &a, const struct lane_bits &b, const struct slots *s,
				uint32_t lane, uint32_t *sh)
{
	uint32_t *slot_of = at<uint32_t>(a.maps.slot_of) + (uint64_t)lane * a.maps.map_rows;
	uint32_t *pos_of = at<uint32_t>(a.maps.pos_of) + (uint64_t)lane * a.maps.map_slots;
	uint32_t base = s->far, far = s->far < s->moves ? s->far : s->moves;

	for (uint32_t k0 = threadIdx.x; k0 < far; k0 += MAPS_AHEAD * BLOCK) {
		uint32_t p[MAPS_AHEAD];

#pragma unroll
		for (uint32_t u = 0; u < MAPS_AHEAD; u++)
			if (k0 + u * BLOCK < far)
				p[u] = pos_of[live(s, s->near + k0 + u * BLOCK)];
#pragma unroll
		for (uint32_t u = 0; u < MAPS_AHEAD; u++)
			if (k0 + u * BLOCK < far) {
				uint32_t h = hole(s, k0 + u * BLOCK);

				pos_of[h] = p[u];
				if (p[u] < a.maps.map_rows)
					slot_of[p[u]] = h;
			}
	}
	for (uint32_t w0 = 0; w0 < a.words && base < s->moves; w0 += BLOCK) {
		uint32_t w = w0 + threadIdx.x, all;
		uint64_t bits = w < a.words ? b.bring_in[w] & range_mask(w, 0, a.watermark) : 0;
		uint32_t k = base + block_before(__popcll(bits), sh, &all);

		for (; bits && k < s->moves; bits &= bits - 1, k++) {
			uint32_t p = w * 64 + __ffsll((long long)bits) - 1, h = hole(s, k);

			pos_of[h] = p;
			slot_of[p] = h;
		}
		base += all;
	}
}

/*
 * Holes below after[lane] are filled with the rows that lie above it and with the staged ones, in the order of
 * their slots. Sources and holes never overlap, so parts and lanes need no order; only the maps, which every
 * part reads first, wait for the last part. Shared memory: two words per 32 slots, and keep_words.
 */
KERNEL(4) kvt_compact(struct compact_args a)
{
	SHARED(uint32_t, shared);
	__shared__ struct moves lists[WARPS];
	__shared__ uint32_t sh[WARPS], last;
	struct moves *m = &lists[warp_index()];
	uint32_t lane = blockIdx.y, count = at<const uint32_t>(a.count)[lane],
		 in = at<const uint32_t>(a.in)[lane];
	const struct cuda_lane l = at<const struct cuda_lane>(a.lane)[lane];
	const uint32_t *pos_of = at<const uint32_t>(a.maps.pos_of) + (uint64_t)lane * a.maps.map_slots;
	struct lane_bits b = lane_bits(a, lane);
	uint32_t *keep = a.keep_words ? shared : NULL;
	struct slots s;

	s.after = at<const uint32_t>(a.after)[lane];
	s.words = ((count > s.after ? count : s.after) + 31) / 32;
	s.live = shared + a.keep_words;
	s.before = s.live + s.words;
	if (s.after == 0)
		return;
	for (uint32_t w = threadIdx.x; w < a.keep_words / 2; w += BLOCK) {
		uint64_t bits = b.resident[w] & ~b.bring_in[w];

		keep[2 * w] = (uint32_t)bits;
		keep[2 * w + 1] = (uint32_t)(bits >> 32);
	}
	__syncthreads();
	find_live(a, b, keep, pos_of, count, &s);
	__syncthreads();
	prefix(s.before, s.words, sh);
	s.near = live_below(&s, s.after);
	s.far = live_below(&s, s.words * 32) - s.near;
	s.moves = s.after - s.near < s.far + in ? s.after - s.near : s.far + in;

	for (uint32_t k = (blockIdx.x * WARPS + warp_index()) * WARP; k < s.moves; k += gridDim.x * BLOCK) {
		uint32_t n = s.moves - k < WARP ? s.moves - k : WARP;

		if (warp_lane() < n) {
			m->from[warp_lane()] = source(a, &s, k + warp_lane());
			m->to[warp_lane()] = hole(&s, k + warp_lane());
		}
		__syncwarp();
		copy_moves(l, l, m, n);
		__syncwarp();
	}
	__syncthreads();
	if (threadIdx.x == 0) {
		uint32_t *parts = at<uint32_t>(a.scratch) + lane;

		__threadfence();
		last = atomicAdd(parts, 1u) == gridDim.x - 1;
		if (last)
			*parts = 0;
	}
	__syncthreads();
	if (last)
		set_maps(a, b, &s, lane, sh);
}

/* ---- out of place ---- */

/* A lane's rows afterwards: how many are before each word of 64 positions, how many of those came in. */
struct rows {
	const uint64_t *bits; /* in shared memory, or NULL */
	uint32_t *before, *staged;
	uint32_t words;
};

static __device__ __forceinline__ uint64_t final_word(const struct compact_args &a, const struct lane_bits &b,
						      uint32_t w)
{
	uint64_t bits = w < a.words ? (b.resident[w] | b.bring_in[w]) & range_mask(w, 0, a.watermark) : 0;

	return bits | range_mask(w, a.watermark, a.rows);
}

/* Where the row that goes to slot k is now. Its place in the maps is written on the way. */
static __device__ __forceinline__ uint32_t move_row(const struct compact_args &a, const struct lane_bits &b,
						    const struct rows *r, uint32_t *slot_of, uint32_t *pos_of,
						    uint32_t k)
{
	uint32_t low = 0, high = r->words, place, p, from;
	uint64_t in;

	while (high - low > 1) {
		uint32_t mid = (low + high) / 2;

		if (r->before[mid] <= k)
			low = mid;
		else
			high = mid;
	}
	place = select64(r->bits ? r->bits[low] : final_word(a, b, low), k - r->before[low]);
	p = low * 64 + place;
	from = slot_of[p];
	if (r->staged[low] != (low + 1 < r->words ? r->staged[low + 1] : ALL)) { /* some of these 64 came in */
		in = p < a.watermark ? b.bring_in[low] : 0;
		if (in >> place & 1)
			from = a.cap + r->staged[low] + __popcll(in & ((1ull << place) - 1));
	}
	slot_of[p] = k;
	pos_of[k] = p;
	return from;
}

/*
 * Rows go in the order of their positions, so a row's new slot is its rank. While the rows of one list are
 * copied, the slots of the next are on their way. Shared memory: two words per 64 rows, and keep_words.
 */
KERNEL(4) kvt_compact_to(struct compact_args a)
{
	SHARED(uint32_t, shared);
	__shared__ struct moves lists[WARPS];
	__shared__ uint32_t sh[WARPS];
	struct moves *m = &lists[warp_index()];
	uint32_t lane = blockIdx.y, words = (a.rows + 63) / 64, after = at<const uint32_t>(a.after)[lane];
	const struct cuda_lane l = at<const struct cuda_lane>(a.lane)[lane],
			       t = at<const struct cuda_lane>(a.to)[lane];
	uint32_t *slot_of = at<uint32_t>(a.maps.slot_of) + (uint64_t)lane * a.maps.map_rows;
	uint32_t *pos_of = at<uint32_t>(a.maps.pos_of) + (uint64_t)lane * a.maps.map_slots;
	uint32_t k = (blockIdx.x * WARPS + warp_index()) * WARP, from = 0;
	struct lane_bits b = lane_bits(a, lane);
	struct rows r = {a.keep_words ? (const uint64_t *)shared : NULL, shared + a.keep_words,
			 shared + a.keep_words + words, words};

	for (uint32_t w = threadIdx.x; w < words; w += BLOCK) {
		uint64_t bits = final_word(a, b, w);

		if (a.keep_words)
			((uint64_t *)shared)[w] = bits;
		r.before[w] = __popcll(bits);
		r.staged[w] = w < a.words ? __popcll(b.bring_in[w] & range_mask(w, 0, a.watermark)) : 0;
	}
	__syncthreads();
	prefix(r.before, words, sh);
	prefix(r.staged, words, sh);

	if (k + warp_lane() < after)
		from = move_row(a, b, &r, slot_of, pos_of, k + warp_lane());
	for (; k < after; k += gridDim.x * BLOCK) {
		uint32_t next = k + gridDim.x * BLOCK + warp_lane();

		m->from[warp_lane()] = from;
		m->to[warp_lane()] = k + warp_lane();
		__syncwarp();
		if (next < after)
			from = move_row(a, b, &r, slot_of, pos_of, next);
		copy_moves(l, t, m, after - k < WARP ? after - k : WARP);
		__syncwarp();
	}
}
