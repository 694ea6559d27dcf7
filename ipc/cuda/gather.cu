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

/* The slots of a page's rows, ascending by position, by one warp. Returns how many. */
static __device__ uint32_t page_slots(const struct gather_args &a, const struct plan_page &p, uint32_t *slot)
{
	const uint64_t *out = at<const uint64_t>(a.copy_out) + (uint64_t)p.lane * a.words;
	const uint64_t *dram = at<const uint64_t>(a.to_dram) + (uint64_t)p.lane * a.words;
	const uint32_t *slot_of = at<const uint32_t>(a.maps.slot_of) + (uint64_t)p.lane * a.maps.map_rows;
	uint32_t n = 0;

	for (uint32_t w0 = p.first / 64; w0 * 64 < p.last; w0 += WARP) {
		uint32_t w = w0 + warp_lane(), mine, before;
		uint64_t bits = 0;

		if (w < a.words && w * 64 < p.last)
			bits = out[w] & (p.tier == KVT_TIER_DRAM ? dram[w] : ~dram[w]) &
			       range_mask(w, p.first, p.last);
		mine = __popcll(bits);
		before = warp_prefix(mine);
		for (uint32_t i = n + before - mine; bits && i < PAGE_ROWS; i++, bits &= bits - 1)
			slot[i] = w * 64 + __ffsll((long long)bits) - 1;
		n += __shfl_sync(ALL, before, WARP - 1);
	}
	n = n < PAGE_ROWS ? n : PAGE_ROWS;
	__syncwarp();
	for (uint32_t i = warp_lane(); i < n; i += WARP)
		slot[i] = slot_of[slot[i]];
	__syncwarp();
	return n;
}

/* Rows of one plane to `to`, packed, this thread's pieces from `j` on, 32 apart. */
static __device__ __forceinline__ void pack_plane(uint64_t from, uint32_t stride, uint32_t width,
						  const uint32_t *slot, uint32_t rows, uint64_t to, uint32_t j,
						  struct crc_sum *crc, const uint32_t *table)
{
	uint32_t per = width / 16, n = rows * per, row = per ? j / per : 0, off = per ? j % per : 0;
	uint32_t step = per ? WARP / per : 0, rest = per ? WARP % per : 0;

	while (j < n) {
		uint4 x[AHEAD];

#pragma unroll
		for (uint32_t u = 0; u < AHEAD; u++) {
			if (j + u * WARP < n)
				x[u] = load16_once(
					at<const void>(from + (uint64_t)slot[row] * stride + off * 16));
			row += step;
			off += rest;
			if (off >= per) {
				off -= per;
				row++;
			}
		}
#pragma unroll
		for (uint32_t u = 0; u < AHEAD; u++, j += WARP)
			if (j < n) {
				store16(at<void>(to + (uint64_t)j * 16), x[u]);
				crc_add(crc, table, x[u]);
			}
	}
}

/*
 * Pages [first, first + n) of the plan to the ring, a warp each: every warp writes 512 consecutive bytes at a
 * time, which is what PCIe wants, and no thread waits for another. What is in a ring is not read before the
 * host has seen the word that a later kvt_word() writes.
 */
KERNEL(2) kvt_gather(struct gather_args a)
{
	__shared__ __align__(16) uint32_t table[1024];
	__shared__ uint32_t slots[WARPS][PAGE_ROWS];
	uint32_t *slot = slots[warp_index()];

	crc_load(table, a.crc);
	__syncthreads();
	for (uint32_t i = blockIdx.x + gridDim.x * warp_index(); i < a.n; i += gridDim.x * WARPS) {
		const struct plan_page p = at<const struct plan_page>(a.page)[a.first + i];
		const struct cuda_lane l = at<const struct cuda_lane>(a.lane)[p.lane];
		uint32_t rows = page_slots(a, p, slot), sum;
		uint32_t k_pieces = rows * (l.k_bytes / 16), v_pieces = rows * (l.v_bytes / 16);
		uint64_t head = a.out + p.off, data = head + sizeof(struct window_out);
		struct crc_sum crc = {make_uint4(0, 0, 0, 0)};

		pack_plane(l.k, l.k_row, l.k_bytes, slot, rows, data, warp_lane(), &crc, table);
		pack_plane(l.v, l.v_row, l.v_bytes, slot, rows, data + (uint64_t)k_pieces * 16,
			   (warp_lane() - k_pieces) % WARP, &crc, table);
		sum = crc_finish(&crc, a.crc, k_pieces + v_pieces);
		if (warp_lane() < sizeof(struct window_out) / 16)
			store16(at<void>(head + warp_lane() * 16),
				warp_lane() ? make_uint4(0, 0, 0, 0)
					    : make_uint4((uint32_t)a.plan, (uint32_t)(a.plan >> 32),
							 a.first + i, sum));
		__syncwarp();
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
