/* SPDX-License-Identifier: MIT */
/* Rows that come back: from packed pages to the lanes' stage slots. */
#include "ipc/cuda/common.cuh"
#include "ipc/cuda/crc.cuh"

#define SCATTER_ROWS 128u
#define SCATTER_AHEAD 8u /* pieces of a thread in flight: a read from the host takes two microseconds */
#define NOWHERE 0xffffffffu

/* A page that a block is about to read: the rows to be read, and the slot of each; NOWHERE: only read. */
struct scatter_list {
	struct cuda_lane lane;
	uint64_t k, v;
	uint32_t rows, crc, check;
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

/*
 * The list of page i, by one warp. Without a check only wanted rows are read: runs of 256 bytes come from the
 * host nearly as fast as whole pages. With one, a page of which nearly all is wanted is read whole.
 */
static __device__ void scatter_rows(const struct scatter_args &a, uint32_t i, struct scatter_list *list)
{
	const struct scatter_page *p = at<const struct scatter_page>(a.page) + i;
	const uint64_t *in = at<const uint64_t>(a.bring_in) + (uint64_t)p->lane * a.words;
	bool whole = a.bad && p->wanted * 8u >= p->rows * 7u;
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
		uint32_t r = row + __popcll(pos & below), e = whole ? r : wanted + __popcll(mask & below);

		if (e >= SCATTER_ROWS)
			break;
		list->slot[e] = mask & bit ? slot + __popcll(coming & below) : NOWHERE;
		list->row[e] = (uint8_t)r;
	}
	if (lane == 0) {
		list->lane = at<const struct cuda_lane>(a.lane)[p->lane];
		list->k = p->k;
		list->v = p->v;
		list->rows = n < SCATTER_ROWS ? n : SCATTER_ROWS;
		list->crc = p->crc;
		list->check = whole;
	}
}

/* The listed rows of one plane, this thread's pieces from `j` on, a block apart. */
static __device__ __forceinline__ void unpack_plane(uint64_t from, uint32_t width,
						    const struct scatter_list *list, uint64_t to,
						    uint32_t stride, uint32_t j, struct crc_sum *crc,
						    const uint32_t *table)
{
	uint32_t per = width / 16, n = list->rows * per, row = per ? j / per : 0, off = per ? j % per : 0;
	uint32_t step = per ? BLOCK / per : 0, rest = per ? BLOCK % per : 0;

	while (j < n) {
		uint4 x[SCATTER_AHEAD];
		uint64_t put[SCATTER_AHEAD];

#pragma unroll
		for (uint32_t u = 0; u < SCATTER_AHEAD; u++) {
			put[u] = 0;
			if (j + u * BLOCK < n) {
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
		for (uint32_t u = 0; u < SCATTER_AHEAD; u++, j += BLOCK)
			if (j < n) {
				if (put[u])
					store16(at<void>(put[u]), x[u]);
				if (list->check)
					crc_add(crc, table, x[u]);
			}
	}
}

/* A page per block, straight from where it lies; meanwhile one warp makes the list of the block's next page. */
KERNEL(2) kvt_scatter(struct scatter_args a)
{
	__shared__ __align__(16) uint32_t table[1024];
	__shared__ struct scatter_list lists[2];
	__shared__ uint32_t parts[2][WARPS];

	if (a.bad)
		crc_load(table, a.crc);
	if (warp_index() == 0 && blockIdx.x < a.n)
		scatter_rows(a, blockIdx.x, &lists[0]);
	__syncthreads();
	for (uint32_t i = blockIdx.x, turn = 0; i < a.n; i += gridDim.x, turn++) {
		const struct scatter_list *s = &lists[turn % 2];
		const struct cuda_lane *l = &s->lane;
		uint32_t k_pieces = s->rows * (l->k_bytes / 16),
			 pieces = k_pieces + s->rows * (l->v_bytes / 16);
		uint32_t crc_is = s->crc, check = s->check, sum;
		struct crc_sum crc = {make_uint4(0, 0, 0, 0)};

		if (warp_index() == turn % WARPS && i + gridDim.x < a.n)
			scatter_rows(a, i + gridDim.x, &lists[(turn + 1) % 2]);
		unpack_plane(s->k, l->k_bytes, s, l->k, l->k_row, threadIdx.x, &crc, table);
		unpack_plane(s->v, l->v_bytes, s, l->v, l->v_row, (threadIdx.x - k_pieces) % BLOCK, &crc,
			     table);
		if (check) {
			sum = crc_part(&crc, a.crc, pieces);
			if (warp_lane() == 0)
				parts[turn % 2][warp_index()] = sum;
		}
		__syncthreads(); /* the parts are there, the next page's list too, and this page's is free */
		if (check && threadIdx.x == 0) {
			sum = 0;
			for (uint32_t w = 0; w < WARPS; w++)
				sum ^= parts[turn % 2][w];
			if (sum != crc_is)
				atomicAdd(at<uint32_t>(a.bad), 1u);
		}
	}
}
