/* SPDX-License-Identifier: MIT */
/* After a plan: the rows that stay close up, in place or in order elsewhere. All lanes in one launch. */
#include "ipc/cuda/common.cuh"

static_assert(COMPACT_SLICE == WARPS * WARP * 32, "a word of 32 slots a thread");
#define LOOK_AHEAD 8u /* lanes looked at before the first is moved */
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

/* Exclusive sum over the block. sh: WARPS words, free again after the next barrier. */
static __device__ uint32_t block_before(uint32_t x, uint32_t *sh)
{
	uint32_t upto = warp_prefix(x), before = 0;

	__syncthreads();
	if (warp_lane() == WARP - 1)
		sh[warp_index()] = upto;
	__syncthreads();
	for (uint32_t w = 0; w < warp_index(); w++)
		before += sh[w];
	return before + upto - x;
}

/* count[0, n): from counts to sums of those before. Every thread a run of neighbours. Ends with a barrier. */
static __device__ void prefix(uint32_t *count, uint32_t n, uint32_t *sh)
{
	uint32_t run = (n + BLOCK - 1) / BLOCK, from = threadIdx.x * run, sum = 0;

	for (uint32_t i = from; i < from + run && i < n; i++)
		sum += count[i];
	sum = block_before(sum, sh);
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

/* Of compact_args.scratch; all zero between launches but for the words. */
struct compact_work {
	uint32_t ticket, done,
		found[]; /* found[lanes]: slices of the lane whose live words are written; then the words */
};

/* A lane's slots: which survive, and how many of them are before each word; staged rows before each word of
 * positions. */
struct slots {
	uint32_t *live, *before, *staged;
	uint32_t words, near, far;
};

/*
 * Which of COMPACT_SLICE slots hold a row that stays where it is or moves down: one bit each. A warp takes 32
 * words of 32 slots, so that 32 loads of each thread overlap. keep: keep_words of shared memory.
 */
static __device__ void find_live(const struct compact_args &a, uint32_t lane, uint32_t slice, uint32_t *live,
				 uint32_t *keep)
{
	const uint32_t *pos_of = at<const uint32_t>(a.maps.pos_of) + (uint64_t)lane * a.maps.map_slots;
	uint32_t count = at<const uint32_t>(a.count)[lane], words = (a.cap + 31) / 32, p[WARP], mine = 0;
	uint32_t w0 = slice * (COMPACT_SLICE / 32) + warp_index() * WARP;
	struct lane_bits b = lane_bits(a, lane);

#pragma unroll
	for (uint32_t u = 0; u < WARP; u++) {
		uint32_t slot = (w0 + u) * 32 + warp_lane();

		p[u] = slot < count ? pos_of[slot] : 0;
	}
	for (uint32_t w = threadIdx.x; w < a.keep_words / 2; w += BLOCK)
		((uint64_t *)keep)[w] = b.resident[w] & ~b.bring_in[w];
	__syncthreads();
#pragma unroll
	for (uint32_t u = 0; u < WARP; u++) {
		bool stays = (w0 + u) * 32 + warp_lane() < count;

		if (stays && p[u] < a.watermark)
			stays = a.keep_words
					? keep[p[u] / 32] >> p[u] % 32 & 1
					: (b.resident[p[u] / 64] & ~b.bring_in[p[u] / 64]) >> p[u] % 64 & 1;
		uint32_t bits = __ballot_sync(ALL, stays);

		mine = warp_lane() == u ? bits : mine;
	}
	if (w0 + warp_lane() < words)
		live[(uint64_t)lane * words + w0 + warp_lane()] = mine;
}

/* Live slots below `slot`. */
static __device__ __forceinline__ uint32_t live_below(const struct slots *s, uint32_t slot)
{
	uint32_t w = slot / 32;

	return w < s->words ? s->before[w] + __popc(s->live[w] & (uint32_t)range_mask(0, 0, slot % 32))
			    : s->before[s->words - 1] + __popc(s->live[s->words - 1]);
}

/* The k-th slot that is free. */
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

/* The last entry of sums[0, n) that is at most k. */
static __device__ __forceinline__ uint32_t last_upto(const uint32_t *sums, uint32_t n, uint32_t k)
{
	uint32_t low = 0, high = n;

	while (high - low > 1) {
		uint32_t mid = (low + high) / 2;

		if (sums[mid] <= k)
			low = mid;
		else
			high = mid;
	}
	return low;
}

/* Where the k-th move comes from: the rows that are too far up, then the staged ones. And that row's position.
 */
static __device__ __forceinline__ uint32_t source(const struct compact_args &a, const struct lane_bits &b,
						  const struct slots *s, const uint32_t *pos_of, uint32_t k,
						  uint32_t *ret_pos)
{
	uint32_t w, slot;

	if (k < s->far) {
		w = last_upto(s->before, s->words, s->near + k);
		slot = w * 32 + select64(s->live[w], s->near + k - s->before[w]);
		*ret_pos = pos_of[slot];
		return slot;
	}
	k -= s->far;
	w = last_upto(s->staged, a.words, k);
	*ret_pos = w * 64 + select64(b.bring_in[w], k - s->staged[w]);
	return a.cap + k;
}

/* One part of a lane's moves; the lane's live words are written. */
static __device__ void move_down(const struct compact_args &a, uint32_t lane, uint32_t part, uint32_t parts,
				 const uint32_t *live, uint32_t *shared, uint32_t *sh, struct moves *m)
{
	const struct cuda_lane l = at<const struct cuda_lane>(a.lane)[lane];
	uint32_t *slot_of = at<uint32_t>(a.maps.slot_of) + (uint64_t)lane * a.maps.map_rows;
	uint32_t *pos_of = at<uint32_t>(a.maps.pos_of) + (uint64_t)lane * a.maps.map_slots;
	uint32_t after = at<const uint32_t>(a.after)[lane], in = at<const uint32_t>(a.in)[lane];
	uint32_t words = (a.cap + 31) / 32, moves, k = (part * WARPS + warp_index()) * WARP + warp_lane();
	uint32_t from = 0, to = 0, pos = 0;
	struct lane_bits b = lane_bits(a, lane);
	struct slots s = {shared, shared + words, shared + 2 * words, words, 0, 0};

	for (uint32_t w = threadIdx.x; w < words; w += BLOCK) {
		s.live[w] = load_l2(&live[(uint64_t)lane * words + w]);
		s.before[w] = __popc(s.live[w]);
	}
	for (uint32_t w = threadIdx.x; in && w < a.words; w += BLOCK)
		s.staged[w] = __popcll(b.bring_in[w]);
	__syncthreads();
	prefix(s.before, words, sh);
	if (in)
		prefix(s.staged, a.words, sh);
	s.near = live_below(&s, after);
	s.far = live_below(&s, words * 32) - s.near;
	moves = after - s.near < s.far + in ? after - s.near : s.far + in;

	if (k < moves) {
		from = source(a, b, &s, pos_of, k, &pos);
		to = hole(&s, k);
	}
	for (uint32_t k0 = k - warp_lane(); k0 < moves; k0 += parts * BLOCK, k += parts * BLOCK) {
		uint32_t next = k + parts * BLOCK;

		m->from[warp_lane()] = from;
		m->to[warp_lane()] = to;
		if (k < moves) {
			pos_of[to] = pos;
			if (pos < a.maps.map_rows)
				slot_of[pos] = to;
		}
		__syncwarp();
		if (next < moves) { /* found while these are copied */
			from = source(a, b, &s, pos_of, next, &pos);
			to = hole(&s, next);
		}
		copy_moves(l, l, m, moves - k0 < WARP ? moves - k0 : WARP);
		__syncwarp();
	}
}

/* What a ticket is for. */
struct errand {
	uint32_t lane, index; /* index: of the slice to look at, or of the part to move */
	bool look;
};

/* Lanes [0, ahead) are looked at first; then lane after lane is moved, and one `ahead` lanes further looked at.
 */
static __device__ __forceinline__ struct errand errand(uint32_t ticket, uint32_t lanes, uint32_t slices,
						       uint32_t parts)
{
	uint32_t ahead = lanes < LOOK_AHEAD ? lanes : LOOK_AHEAD, both = parts + slices;

	if (ticket < ahead * slices)
		return {ticket / slices, ticket % slices, true};
	ticket -= ahead * slices;
	if (ticket >= (lanes - ahead) * both) {
		ticket -= (lanes - ahead) * both;
		return {lanes - ahead + ticket / parts, ticket % parts, false};
	}
	if (ticket % both < parts)
		return {ticket / both, ticket % both, false};
	return {ticket / both + ahead, ticket % both - parts, true};
}

/*
 * Holes below after[lane] are filled with the rows that lie above it and with the staged ones, in the order of
 * their slots. Sources and holes never overlap, so moves need no order; but all of a lane's slots must have
 * been looked at before its maps change. Blocks take tickets, COMPACT_SLICE slots to look at or a part of a
 * lane to move; who moves waits for those who look, and they have earlier tickets, so they run, and wait for
 * nobody. Few lanes are in work at a time: their pages stay in the TLBs. Shared memory: keep_words to look; two
 * words per 32 slots and one per 64 positions to move.
 */
KERNEL(3) kvt_compact(struct compact_args a)
{
	SHARED(uint32_t, shared);
	__shared__ struct moves lists[WARPS];
	__shared__ uint32_t sh[WARPS], mine;
	struct compact_work *work = at<struct compact_work>(a.scratch);
	uint32_t *live = work->found + a.lanes, slices = (a.cap + COMPACT_SLICE - 1) / COMPACT_SLICE;
	uint32_t parts = gridDim.x / a.lanes - slices;
	struct errand e;

	if (threadIdx.x == 0)
		mine = atomicAdd(&work->ticket, 1u);
	__syncthreads();
	e = errand(mine, a.lanes, slices, parts);
	if (e.look) {
		find_live(a, e.lane, e.index, live, shared);
		__threadfence();
		__syncthreads();
		if (threadIdx.x == 0)
			atomicAdd(&work->found[e.lane], 1u);
	} else {
		if (threadIdx.x == 0)
			wait_until(&work->found[e.lane], slices);
		__syncthreads();
		move_down(a, e.lane, e.index, parts, live, shared, sh, &lists[warp_index()]);
	}
	__syncthreads();
	if (threadIdx.x == 0) {
		__threadfence();
		mine = atomicAdd(&work->done, 1u) == gridDim.x - 1;
	}
	__syncthreads();
	if (mine) /* nobody else is left: all zero for the next launch */
		for (uint32_t i = threadIdx.x; i < 2 + a.lanes; i += BLOCK)
			at<uint32_t>(a.scratch)[i] = 0;
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
	uint32_t low = last_upto(r->before, r->words, k), place, p, from;
	uint64_t in;

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
