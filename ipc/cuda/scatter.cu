/* SPDX-License-Identifier: MIT */
/* Rows that come back: from packed pages to the lanes' stage slots. */
#include "ipc/cuda/common.cuh"
#include "ipc/cuda/crc.cuh"

#define SCATTER_ROWS 128u
#define SCATTER_AHEAD 8u /* pieces of a thread in flight: a read from the host takes two microseconds */
#ifndef SCATTER_WHOLE_NUM
#define SCATTER_WHOLE_NUM 1u
#define SCATTER_WHOLE_DEN 3u
#endif
#define NOWHERE 0xffffffffu

/* Rows of a page that a warp reads, and the slot of each; NOWHERE: only read. */
struct scatter_list {
	uint32_t slot[SCATTER_ROWS];
	uint8_t row[SCATTER_ROWS];
};

/* 64 bits of a bitmap from bit `from` on; bits past its end are 0. */
static __device__ __forceinline__ uint64_t bits_at(const uint64_t *bits, uint32_t words, uint32_t from)
{
	uint32_t w = from / 64, shift = from % 64;
	uint64_t low = w < words ? bits[w] >> shift : 0;

	return shift && w + 1 < words ? low | bits[w + 1] << (64 - shift) : low;
}

/* Set bits below bit `end`, counted by the warp. */
static __device__ __forceinline__ uint32_t bits_below(const uint64_t *bits, uint32_t end)
{
	uint32_t n = 0;

	for (uint32_t w = warp_lane(); w * 64 < end; w += WARP)
		n += __popcll(bits[w] & range_mask(w, 0, end));
	return warp_sum(n);
}

/* Make the list of a page, all its rows or the wanted ones. Returns how many. */
static __device__ uint32_t scatter_rows(const struct scatter_args &a, const struct scatter_page *p, bool whole,
					struct scatter_list *list)
{
	const uint64_t *in = at<const uint64_t>(a.bring_in) + (uint64_t)p->lane * a.words;
	uint32_t first = p->first, lane = warp_lane();
	bool mine = lane < p->span && lane < 32;
	uint64_t pos = mine ? p->pos[lane] : 0, mask = mine ? p->mask[lane] & pos : 0;
	uint64_t coming = mine ? bits_at(in, a.words, first + lane * 64) : 0;
	uint32_t row = warp_prefix(__popcll(pos)) - __popcll(pos);
	uint32_t wanted = warp_prefix(__popcll(mask)) - __popcll(mask);
	uint32_t slot = a.cap + bits_below(in, first < a.words * 64 ? first : a.words * 64) +
			warp_prefix(__popcll(coming)) - __popcll(coming);
	uint32_t n = warp_sum(__popcll(whole ? pos : mask));

	for (uint64_t left = whole ? pos : mask; left; left &= left - 1) {
		uint64_t bit = left & -left, below = bit - 1;
		uint32_t r = row + __popcll(pos & below), i = whole ? r : wanted + __popcll(mask & below);

		if (i >= SCATTER_ROWS)
			break;
		list->slot[i] = mask & bit ? slot + __popcll(coming & below) : NOWHERE;
		list->row[i] = (uint8_t)r;
	}
	__syncwarp();
	return n < SCATTER_ROWS ? n : SCATTER_ROWS;
}

/* The listed rows of one plane, this thread's pieces from `j` on, 32 apart. */
static __device__ __forceinline__ void unpack_plane(uint64_t from, uint32_t width,
						    const struct scatter_list *list, uint32_t rows, uint64_t to,
						    uint32_t stride, uint32_t j, bool check,
						    struct crc_sum *crc, const uint32_t *table)
{
	uint32_t per = width / 16, n = rows * per, row = per ? j / per : 0, off = per ? j % per : 0;
	uint32_t step = per ? WARP / per : 0, rest = per ? WARP % per : 0;

	while (j < n) {
		uint4 x[SCATTER_AHEAD];
		uint64_t put[SCATTER_AHEAD];

#pragma unroll
		for (uint32_t u = 0; u < SCATTER_AHEAD; u++) {
			put[u] = 0;
			if (j + u * WARP < n) {
				uint32_t slot = list->slot[row];

				x[u] = load16_once(
					at<const void>(from + (uint64_t)(list->row[row] * width + off * 16)));
				put[u] = slot == NOWHERE ? 0 : to + (uint64_t)slot * stride + off * 16;
			}
			row += step;
			off += rest;
			if (off >= per) {
				off -= per;
				row++;
			}
		}
#pragma unroll
		for (uint32_t u = 0; u < SCATTER_AHEAD; u++, j += WARP)
			if (j < n) {
				if (put[u])
					store16(at<void>(put[u]), x[u]);
				if (check)
					crc_add(crc, table, x[u]);
			}
	}
}

/*
 * A page per warp. Pages of which much is wanted are read whole, in one run, and checked; of the others only
 * the wanted rows are read, and their checksum cannot be known.
 */
KERNEL(2) kvt_scatter(struct scatter_args a)
{
	__shared__ __align__(16) uint32_t table[1024];
	__shared__ struct scatter_list lists[WARPS];
	struct scatter_list *list = &lists[warp_index()];

	if (a.bad)
		crc_load(table, a.crc);
	__syncthreads();
	for (uint32_t i = blockIdx.x + gridDim.x * warp_index(); i < a.n; i += gridDim.x * WARPS) {
		const struct scatter_page *p = at<const struct scatter_page>(a.page) + i;
		const struct cuda_lane l = at<const struct cuda_lane>(a.lane)[p->lane];
		bool whole = p->wanted * SCATTER_WHOLE_DEN >= p->rows * SCATTER_WHOLE_NUM,
		     check = whole && a.bad;
		uint32_t rows = scatter_rows(a, p, whole, list), k_pieces = rows * (l.k_bytes / 16), sum;
		struct crc_sum crc = {make_uint4(0, 0, 0, 0)};

		unpack_plane(p->k, l.k_bytes, list, rows, l.k, l.k_row, warp_lane(), check, &crc, table);
		unpack_plane(p->v, l.v_bytes, list, rows, l.v, l.v_row, (warp_lane() - k_pieces) % WARP, check,
			     &crc, table);
		if (check) {
			sum = crc_finish(&crc, a.crc, k_pieces + rows * (l.v_bytes / 16));
			if (warp_lane() == 0 && sum != p->crc)
				atomicAdd(at<uint32_t>(a.bad), 1u);
		}
		__syncwarp();
	}
}
