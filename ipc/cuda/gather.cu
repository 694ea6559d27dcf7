/* SPDX-License-Identifier: MIT */
/* Rows that were just written take their slots; rows that leave are packed into the out ring. */
#include "ipc/cuda/common.cuh"
#include "ipc/cuda/crc.cuh"
#include "ipc/kvtier.h"
#include "shm/window_page.h"

#define PAGE_ROWS 128u
#define AHEAD 4u /* pieces of a thread in flight */

/* A lane per blockIdx.y. */
KERNEL(4) kvt_extend(struct extend_args a)
{
	uint32_t lane = blockIdx.y, first = at<const uint32_t>(a.count)[lane];
	uint32_t *slot_of = at<uint32_t>(a.maps.slot_of) + (uint64_t)lane * a.maps.map_rows;
	uint32_t *pos_of = at<uint32_t>(a.maps.pos_of) + (uint64_t)lane * a.maps.map_slots;

	for (uint32_t i = blockIdx.x * BLOCK + threadIdx.x; i < a.n; i += gridDim.x * BLOCK) {
		slot_of[a.pos + i] = first + i;
		pos_of[first + i] = a.pos + i;
	}
}

/* A page that a block is about to write. */
struct gather_page {
	struct cuda_lane lane;
	uint64_t off;
	uint32_t rows, slot[PAGE_ROWS]; /* ascending by position */
};

/* What page i consists of, found by one warp. */
static __device__ void find_rows(const struct gather_args &a, uint32_t i, struct gather_page *g)
{
	const struct plan_page p = at<const struct plan_page>(a.page)[a.first + i];
	const uint64_t *out = at<const uint64_t>(a.copy_out) + (uint64_t)p.lane * a.words;
	const uint64_t *dram = at<const uint64_t>(a.to_dram) + (uint64_t)p.lane * a.words;
	const uint32_t *slot_of = at<const uint32_t>(a.maps.slot_of) + (uint64_t)p.lane * a.maps.map_rows;
	uint32_t n = 0;

	for (uint32_t w0 = p.first / 64; w0 * 64 < p.last; w0 += WARP) {
		uint32_t w = w0 + warp_lane(), mine, upto;
		uint64_t bits = 0;

		if (w < a.words && w * 64 < p.last)
			bits = out[w] & (p.tier == KVT_TIER_DRAM ? dram[w] : ~dram[w]) &
			       range_mask(w, p.first, p.last);
		mine = __popcll(bits);
		upto = warp_prefix(mine);
		for (uint32_t r = n + upto - mine; bits && r < PAGE_ROWS; r++, bits &= bits - 1)
			g->slot[r] = w * 64 + __ffsll((long long)bits) - 1;
		n += __shfl_sync(ALL, upto, WARP - 1);
	}
	n = n < PAGE_ROWS ? n : PAGE_ROWS;
	__syncwarp();
	for (uint32_t r = warp_lane(); r < n; r += WARP)
		g->slot[r] = slot_of[g->slot[r]];
	if (warp_lane() == 0) {
		g->lane = at<const struct cuda_lane>(a.lane)[p.lane];
		g->off = p.off;
		g->rows = n;
	}
}

/* Rows of one plane to `to`, packed: this thread's pieces from `j` on, a block apart. */
static __device__ __forceinline__ void pack_plane(uint64_t from, uint32_t stride, uint32_t width,
						  const struct gather_page *g, uint64_t to, uint32_t j,
						  struct crc_sum *crc, const uint32_t *table)
{
	uint32_t per = width / 16, n = g->rows * per, row = per ? j / per : 0, off = per ? j % per : 0;
	uint32_t step = per ? BLOCK / per : 0, rest = per ? BLOCK % per : 0;

	while (j < n) {
		uint4 x[AHEAD];

#pragma unroll
		for (uint32_t u = 0; u < AHEAD; u++) {
			if (j + u * BLOCK < n)
				x[u] = load16_once(
					at<const void>(from + (uint64_t)g->slot[row] * stride + off * 16));
			row += step;
			off += rest;
			if (off >= per) {
				off -= per;
				row++;
			}
		}
#pragma unroll
		for (uint32_t u = 0; u < AHEAD; u++, j += BLOCK)
			if (j < n) {
				store16(at<void>(to + (uint64_t)j * 16), x[u]);
				crc_add(crc, table, x[u]);
			}
	}
}

/*
 * Pages [first, first + n) of the plan to the ring, a block each: 4 KiB in a row at a time, which is what PCIe
 * wants, and pages short enough in time that blocks end together. While a block writes a page, one of its warps
 * finds the rows of its next. What is in a ring is not read before the host has seen the word that a later
 * kvt_word() writes.
 */
KERNEL(2) kvt_gather(struct gather_args a)
{
	__shared__ __align__(16) uint32_t table[1024];
	__shared__ struct gather_page pages[2];
	__shared__ uint32_t parts[2][WARPS];

	crc_load(table, a.crc);
	if (warp_index() == 0 && blockIdx.x < a.n)
		find_rows(a, blockIdx.x, &pages[0]);
	__syncthreads();
	for (uint32_t i = blockIdx.x, turn = 0; i < a.n; i += gridDim.x, turn++) {
		const struct gather_page *g = &pages[turn % 2];
		const struct cuda_lane *l = &g->lane;
		uint32_t k_pieces = g->rows * (l->k_bytes / 16),
			 pieces = k_pieces + g->rows * (l->v_bytes / 16), sum;
		uint64_t head = a.out + g->off, data = head + sizeof(struct window_out);
		struct crc_sum crc = {make_uint4(0, 0, 0, 0)};

		if (warp_index() == turn % WARPS && i + gridDim.x < a.n)
			find_rows(a, i + gridDim.x, &pages[(turn + 1) % 2]);
		pack_plane(l->k, l->k_row, l->k_bytes, g, data, threadIdx.x, &crc, table);
		pack_plane(l->v, l->v_row, l->v_bytes, g, data + (uint64_t)k_pieces * 16,
			   (threadIdx.x - k_pieces) % BLOCK, &crc, table);
		sum = crc_part(&crc, a.crc, pieces);
		if (warp_lane() == 0)
			parts[turn % 2][warp_index()] = sum;
		__syncthreads(); /* the parts are there, the next page's rows too, and this page's are free */
		if (threadIdx.x < sizeof(struct window_out) / 16) {
			sum = 0;
			for (uint32_t w = 0; w < WARPS; w++)
				sum ^= parts[turn % 2][w];
			store16(at<void>(head + threadIdx.x * 16),
				threadIdx.x ? make_uint4(0, 0, 0, 0)
					    : make_uint4((uint32_t)a.plan, (uint32_t)(a.plan >> 32),
							 a.first + i, sum));
		}
	}
}

/* What kernels before this on the stream wrote is in place when it runs; the fence says so to the host too. */
KERNEL(1) kvt_word(struct word_args a)
{
	if (threadIdx.x == 0) {
		__threadfence_system();
		store_release_system(at<uint64_t>(a.addr), a.value);
	}
}
