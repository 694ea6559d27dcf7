/* SPDX-License-Identifier: MIT */
/* Recall on the GPU, third part: from products to scores by position, the best of them, and their bytes. */
#include "ipc/cuda/recall.cuh"

/* ---- scores ----------------------------------------------------------------------------------- */

/* L_q of every query into base[]: what each tile found, put together. sums: float2 [BLOCK]. */
static __device__ void put_together(const struct find_args &a, const struct find_head &f, uint32_t h,
				    uint32_t tasks, float *base, float2 *sums)
{
	const float2 *part = at<const float2>(a.part) + (uint64_t)h * a.room_parts * f.queries;
	const float *spread = at<const float>(a.spread) + (uint64_t)h * f.queries;

	for (uint32_t q0 = 0; q0 < f.queries; q0 += WARP) {
		uint32_t q = q0 + warp_lane();
		float2 all = make_float2(-3e38f, 0);

#pragma unroll 8
		for (uint32_t i = warp_index(); a.mass && i < tasks; i += WARPS) {
			float2 one = q < f.queries ? part[(uint64_t)i * f.queries + q] : all;
			float top = fmaxf(all.x, one.x);

			all = make_float2(top, all.y * expf(all.x - top) + one.y * expf(one.x - top));
		}
		sums[threadIdx.x] = all;
		__syncthreads();
		if (!warp_index() && q < f.queries) {
			for (uint32_t w = 1; w < WARPS; w++) {
				float2 one = sums[w * WARP + warp_lane()];
				float top = fmaxf(all.x, one.x);

				all = make_float2(top, all.y * expf(all.x - top) + one.y * expf(one.x - top));
			}
			base[q] = spread[q] < 0 ? INFINITY : all.y > 0 ? all.x + logf(all.y) : 0;
		}
		__syncthreads();
	}
}

/* S of the rows of the groups that were looked into, by rank. A warp takes a group at a time. */
KERNEL(3) kvt_recall_score(struct find_args a)
{
	__shared__ float base[FIND_MAX_QUERIES];
	__shared__ float2 sums[BLOCK];
	uint32_t h = blockIdx.y, probed = at<const uint32_t>(a.count)[h], lane = warp_lane(),
		 tasks = probed + (a.mass ? (a.resident[h] + FIND_GROUP - 1) / FIND_GROUP : 0);
	struct find_head f = find_head(a, h);

	if (blockIdx.x * WARPS >= probed)
		return;
	put_together(a, f, h, tasks, base, sums);
	for (uint32_t i = blockIdx.x * WARPS + warp_index(); i < probed; i += gridDim.x * WARPS) {
		uint32_t id = f.group[at<const uint32_t>(a.probed)[(uint64_t)h * a.room_groups + i]], pos;
		const struct find_page *p = at<const struct find_page>(a.ix.page) + id / FIND_PARTS;
		const float *l = at<const float>(a.logit) +
				 ((uint64_t)h * a.room_probed + i) * f.queries * FIND_GROUP + lane;
		struct find_words w = page_words(p);
		float best = -INFINITY;

#pragma unroll 8
		for (uint32_t q = 0; q < f.queries; q++)
			best = fmaxf(best, l[q * FIND_GROUP] - base[q]);
		pos = p->first + row_bit(w, id % FIND_PARTS * FIND_GROUP + lane);
		if (at<const uint32_t>(a.ix.alive)[id] >> lane & 1)
			atomicMax(at<uint32_t>(a.score) + (uint64_t)h * a.room_rows +
					  rank_of(a.ix, f.lane, pos),
				  ordered(best));
	}
}

/* ---- neighbours ---------------------------------------------------------------------------------- */

/* S' of S: FIND_NEAR_TILE rows a block, the largest of each window by doubling what is known. */
KERNEL(2) kvt_recall_near(struct find_args a)
{
	SHARED(uint32_t, x);
	uint32_t h = blockIdx.y, from = blockIdx.x * FIND_NEAR_TILE,
		 rows = at<const uint32_t>(a.ix.rows)[a.first + h], window = a.before + a.after + 1,
		 all = FIND_NEAR_TILE + window - 1, have = 1;
	const uint32_t *score = at<const uint32_t>(a.score) + (uint64_t)h * a.room_rows;
	uint32_t *y = x + all, *out = at<uint32_t>(a.near) + (uint64_t)h * a.room_rows;

	if (from >= rows)
		return;
	for (uint32_t i = threadIdx.x; i < all; i += BLOCK) {
		uint32_t row = from + i - a.after; /* wraps below 0: past the end */

		x[i] = row < rows ? score[row] : 0;
	}
	while (have < window) {
		uint32_t step = 2 * have <= window ? have : window - have, *t = x;

		__syncthreads();
		for (uint32_t i = threadIdx.x; i < all; i += BLOCK)
			y[i] = max(x[i], i + step < all ? x[i + step] : 0);
		x = y;
		y = t;
		have += step;
	}
	__syncthreads();
	for (uint32_t i = threadIdx.x; i < FIND_NEAR_TILE && from + i < rows; i += BLOCK)
		out[from + i] = x[i];
}

/* ---- the best ------------------------------------------------------------------------------------- */

/* One block per head: which ranks are recalled, and how many. */
FIND_WIDE_KERNEL kvt_recall_top(struct find_args a)
{
	__shared__ struct find_shared s;
	uint32_t h = blockIdx.x, rows = at<const uint32_t>(a.ix.rows)[a.first + h], n;
	uint64_t row = (uint64_t)h * a.room_rows, word = row / 32;
	const uint32_t *v = at<const uint32_t>(a.near) + row;

	n = edge_take(find_edge(v, rows, a.want, &s), v, rows, at<uint32_t>(a.take) + word,
		      at<uint32_t>(a.left) + word, at<uint32_t>(a.base) + word, NULL, &s);
	if (!threadIdx.x)
		at<uint32_t>(a.counts)[h] = n;
}

/* ---- their bytes ------------------------------------------------------------------------------------ */

#define FIND_BURST 8u /* pieces of one thread on their way */

/* What one block copies: where rows are and where they go. */
struct find_copy {
	const char *k[BLOCK], *v[BLOCK];
	uint32_t to[BLOCK];
};

static __device__ void copy_found(const struct find_args &a, uint32_t h, const struct find_copy *c, uint32_t n)
{
	const struct cuda_lane *l = at<const struct cuda_lane>(a.ix.lane) + a.first + h;
	uint32_t k_pieces = l->k_bytes / 16, pieces = k_pieces + l->v_bytes / 16;
	char *to_k = at<char>(a.k) + h * a.k_head_stride, *to_v = at<char>(a.v) + h * a.v_head_stride;

	for (uint32_t i = threadIdx.x; i < n * pieces; i += BLOCK * FIND_BURST) {
		uint4 x[FIND_BURST];

#pragma unroll
		for (uint32_t j = 0; j < FIND_BURST; j++) { /* all on their way before the first is needed */
			uint32_t piece = i + j * BLOCK, row = piece / pieces, col = piece - row * pieces;

			if (row < n)
				x[j] = load16_once(col < k_pieces ? c->k[row] + col * 16
								  : c->v[row] + (col - k_pieces) * 16);
		}
#pragma unroll
		for (uint32_t j = 0; j < FIND_BURST; j++) {
			uint32_t piece = i + j * BLOCK, row = piece / pieces, col = piece - row * pieces;

			if (row < n)
				store16(col < k_pieces ? to_k + (uint64_t)c->to[row] * a.k_row_stride + col * 16
						       : to_v + (uint64_t)c->to[row] * a.v_row_stride +
								 (col - k_pieces) * 16,
					x[j]);
		}
	}
}

/* One row of group `id` per thread: is it recalled, and which place in the window is its? */
static __device__ bool is_taken(const struct find_args &a, const struct find_head &f, uint32_t h, uint32_t id,
				const struct find_page *p, uint32_t *ret_to)
{
	uint64_t word = (uint64_t)h * a.room_rows / 32;
	const uint32_t *take = at<const uint32_t>(a.take) + word;
	uint32_t pos = p->first + row_bit(page_words(p), id % FIND_PARTS * FIND_GROUP + warp_lane()), rank, bit;

	if (!(at<const uint32_t>(a.ix.alive)[id] >> warp_lane() & 1))
		return false;
	rank = rank_of(a.ix, f.lane, pos);
	bit = 1u << rank % 32;
	word += rank / 32;
	/* Where two pages have the row, one of them serves it. */
	if (!(take[rank / 32] & bit) || !(atomicAnd(at<uint32_t>(a.left) + word, ~bit) & bit))
		return false;
	*ret_to = at<const uint32_t>(a.base)[word] + (uint32_t)__popc(take[rank / 32] & (bit - 1));
	if (a.positions)
		at<uint32_t>(a.positions)[(uint64_t)h * a.want + *ret_to] = pos;
	return true;
}

/* A group for each warp, of all groups of the lane: rows around a hit need not have been looked into. */
KERNEL(3) kvt_recall_pick(struct find_args a)
{
	__shared__ struct find_copy c;
	__shared__ uint32_t sums[WARPS];
	uint32_t h = blockIdx.y;
	struct find_head f = find_head(a, h);
	const struct cuda_lane *l = at<const struct cuda_lane>(a.ix.lane) + f.lane;

	for (uint32_t from = blockIdx.x * WARPS; from < f.groups; from += gridDim.x * WARPS) {
		uint32_t i = from + warp_index(), id = f.group[min(i, f.groups - 1)], to = 0, place, all,
			 row = id % FIND_PARTS * FIND_GROUP + warp_lane();
		const struct find_page *p = at<const struct find_page>(a.ix.page) + id / FIND_PARTS;
		bool hit = i < f.groups && is_taken(a, f, h, id, p, &to);

		place = find_prefix(hit, sums, &all);
		if (hit) {
			const char *k = at<const char>(p->k);

			c.k[place - 1] = k + (uint64_t)row * l->k_bytes;
			c.v[place - 1] = k + (uint64_t)p->rows * l->k_bytes + (uint64_t)row * l->v_bytes;
			c.to[place - 1] = to;
		}
		__syncthreads();
		copy_found(a, h, &c, all);
	}
}
