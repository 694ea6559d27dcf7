/* SPDX-License-Identifier: MIT */
/*
 * Recall on the GPU, second part: a turn's queries, the groups that they may want, and the keys of the best of
 * those. Pages lie in published host memory and are read in runs of 32 rows, 16 bytes a thread, the next run on
 * its way while this one is multiplied: the link is the bound, see tests/gpu/NOTES.md.
 */
#include "ipc/cuda/recall.cuh"

/* ---- queries: one block per query head ------------------------------------------------------------- */

static __device__ __forceinline__ float query_value(const char *row, uint32_t d, uint32_t dtype)
{
	uint32_t x;

	if (dtype == FIND_F32)
		return ((const float *)row)[d];
	x = ((const unsigned short *)row)[d];
	return find_widen(x, dtype).x;
}

struct farthest {
	float d;
	uint32_t i;
};
static __device__ __forceinline__ bool farther(struct farthest a, struct farthest b)
{
	return a.d > b.d || (a.d == b.d && a.i < b.i);
}

/* The token farthest from the nearest of the `got` picked ones, x[got][dim]; the earlier of equals. */
static __device__ struct farthest next_token(const struct find_args &a, const char *q, const float *x,
					     const uint32_t *pick, uint32_t got, struct farthest *best)
{
	struct farthest most = {-1, UINT32_MAX};

	for (uint32_t from = warp_index(); from < a.n_tokens; from += WARPS * FIND_TOKENS) {
		float d[FIND_TOKENS][FIND_TOKENS - 1] = {}; /* of four tokens at a time to each picked one */

#pragma unroll 2
		for (uint32_t e = warp_lane(); e < a.dim; e += WARP) {
#pragma unroll
			for (uint32_t j = 0; j < FIND_TOKENS; j++) {
				uint32_t i = min(from + j * WARPS, a.n_tokens - 1);
				float v = query_value(q + i * a.token_stride, e, a.ix.dtype);

#pragma unroll
				for (uint32_t p = 0; p < FIND_TOKENS - 1; p++)
					if (p < got)
						d[j][p] = fmaf(v - x[p * a.dim + e], v - x[p * a.dim + e],
							       d[j][p]);
			}
		}
#pragma unroll
		for (uint32_t j = 0; j < FIND_TOKENS; j++) {
			uint32_t i = from + j * WARPS;
			float near = INFINITY;

#pragma unroll
			for (uint32_t p = 0; p < FIND_TOKENS - 1; p++)
				if (p < got)
					near = fminf(near, find_add(d[j][p]));
			if (!isfinite(near))
				near = -0.5f; /* no number: if nothing else is left */
			for (uint32_t p = 0; p < got; p++)
				near = pick[p] == i ? -2 : near;
			if (i < a.n_tokens && farther((struct farthest){near, i}, most))
				most = (struct farthest){near, i};
		}
	}
	if (!warp_lane())
		best[warp_index()] = most;
	__syncthreads();
	for (uint32_t w = 0; w < WARPS; w++)
		most = farther(best[w], most) ? best[w] : most;
	__syncthreads();
	return most;
}

static __device__ void clear_scores(const struct find_args &a, uint32_t block, uint32_t blocks)
{
	uint64_t n = (uint64_t)a.heads * a.room_rows / 4;

	for (uint64_t i = (uint64_t)block * BLOCK + threadIdx.x; i < n; i += (uint64_t)blocks * BLOCK)
		store16(at<uint32_t>(a.score) + i * 4, make_uint4(0, 0, 0, 0));
}

KERNEL(3) kvt_recall_select(struct find_args a)
{
	__shared__ float x[FIND_TOKENS * FIND_MAX_DIM];
	__shared__ struct farthest best[WARPS];
	__shared__ float red[WARPS];
	__shared__ uint32_t pick[FIND_TOKENS];
	uint32_t head = blockIdx.x, next = a.n_tokens - 1, all = a.heads * a.group;
	const char *q = at<const char>(a.q) + head * a.head_stride;
	float scale = a.scale > 0 ? a.scale : 1 / sqrtf((float)a.dim);

	if (head >= all) {
		clear_scores(a, head - all, gridDim.x - all);
		return;
	}
	for (uint32_t got = 0; got < a.tokens; got++) {
		uint64_t out = (uint64_t)head * a.tokens + got;
		float sq = 0, v = 0, bad = 0;

		if (!threadIdx.x)
			pick[got] = next;
		if (threadIdx.x < a.dim) {
			v = query_value(q + next * a.token_stride, threadIdx.x, a.ix.dtype);
			x[got * a.dim + threadIdx.x] = v;
		}
		bad = isfinite(v) ? 0 : INFINITY;
		v = isfinite(v) ? v * scale : 0;
		sq = find_add(v * v + bad);
		if (threadIdx.x < a.dim)
			at<float>(a.qt)[out * a.dim + threadIdx.x] = v;
		bad = find_max(bad);
		if (!warp_lane())
			red[warp_index()] = bad > 0 ? -1 : sq;
		__syncthreads();
		if (!threadIdx.x) {
			sq = 0;
			for (uint32_t w = 0; w < WARPS; w++)
				sq = red[w] < 0 || sq < 0 ? -1 : sq + red[w];
			sq = sq < 0 ? -1 : FIND_SPREAD * sqrtf(sq / (float)a.dim);
			at<float>(a.spread)[out] = isfinite(sq) ? sq : 0;
			at<uint32_t>(a.top)[out] = 0;
		}
		__syncthreads();
		if (got + 1 < a.tokens)
			next = next_token(a, q, x, pick, got + 1, best).i;
	}
}

/* ---- groups -------------------------------------------------------------------------------------- */

/* The means of 32 groups into the tile, their radii into radius[]. */
static __device__ void load_means(const struct find_args &a, const struct find_head &f, uint32_t from, float *x,
				  float *radius)
{
	uint32_t pieces = a.dim / 8;

	for (uint32_t i = threadIdx.x; i < FIND_GROUP * pieces; i += BLOCK) {
		uint32_t row = i / pieces, col = i - row * pieces, part;
		float *to = x + row * (a.dim + FIND_PAD) + col * 8, step = 0;
		uint64_t c = 0;

		if (from + row < f.groups) {
			uint32_t id = f.group[from + row];
			const char *sum =
				at<const char>(a.ix.sum) + (uint64_t)(id / FIND_PARTS) * a.ix.sum_bytes;

			part = id % FIND_PARTS;
			step = ((const float *)sum)[part];
			c = *(const uint64_t *)(sum + FIND_SUM_HEAD + part * a.dim + col * 8);
			if (!col)
				radius[row] = ((const float *)sum)[FIND_PARTS + part];
		}
#pragma unroll
		for (uint32_t j = 0; j < 8; j++)
			to[j] = (float)(int8_t)(c >> j * 8) * step;
	}
}

/* Bounds of 32 groups a block; not needed where all groups are looked into. */
KERNEL(2) kvt_recall_bound(struct find_args a)
{
	SHARED(float, x);
	__shared__ float radius[FIND_GROUP];
	uint32_t h = blockIdx.y, from = blockIdx.x * FIND_GROUP, lane = warp_lane();
	struct find_head f = find_head(a, h);
	const float *spread = at<const float>(a.spread) + (uint64_t)h * f.queries;
	float *out = at<float>(a.bound) +
		     ((uint64_t)h * a.room_groups + (uint64_t)blockIdx.x * FIND_GROUP) * f.queries;

	if (from >= f.groups || find_probes(a, f.groups) == f.groups)
		return;
	load_means(a, f, from, x, radius);
	__syncthreads();
	for (uint32_t q0 = 0; q0 < f.queries; q0 += WARPS * FIND_BATCH) {
		float dot[FIND_BATCH];

		tile_dots(x, f.qt, a.dim, f.queries, q0, dot);
#pragma unroll
		for (uint32_t j = 0; j < FIND_BATCH; j++) {
			uint32_t q = q0 + warp_index() + j * WARPS;
			float b = -INFINITY, top;

			if (q >= f.queries)
				continue;
			if (from + lane < f.groups)
				b = dot[j] + fminf(spread[q] * radius[lane], 1e30f);
			out[(uint64_t)q * FIND_GROUP + lane] = b;
			top = find_max(b);
			if (!lane)
				atomicMax(at<uint32_t>(a.top) + (uint64_t)h * f.queries + q, ordered(top));
		}
	}
}

/* The groups to look into, ascending: one block per head. */
FIND_WIDE_KERNEL kvt_recall_choose(struct find_args a)
{
	__shared__ struct find_shared s;
	__shared__ float top[FIND_MAX_QUERIES];
	uint32_t h = blockIdx.x, n;
	struct find_head f = find_head(a, h);
	uint32_t *order = at<uint32_t>(a.order) + (uint64_t)h * a.room_groups,
		 *probed = at<uint32_t>(a.probed) + (uint64_t)h * a.room_groups;

	n = find_probes(a, f.groups);
	if (!threadIdx.x)
		at<uint32_t>(a.count)[h] = n;
	if (n == f.groups) {
		for (uint32_t g = threadIdx.x; g < n; g += FIND_WIDE)
			probed[g] = g;
		return;
	}
	for (uint32_t q = threadIdx.x; q < f.queries; q += FIND_WIDE)
		top[q] = at<const float>(a.spread)[(uint64_t)h * f.queries + q] < 0
				 ? INFINITY
				 : fmaxf(unordered(at<const uint32_t>(a.top)[(uint64_t)h * f.queries + q]),
					 -3e38f);
	__syncthreads();
	for (uint32_t g = threadIdx.x; g < f.groups; g += FIND_WIDE) {
		const float *b = at<const float>(a.bound) +
				 ((uint64_t)h * a.room_groups + g / FIND_GROUP * FIND_GROUP) * f.queries +
				 g % FIND_GROUP;
		float best = -3e38f; /* even one without a finite bound may be looked into */

#pragma unroll 8
		for (uint32_t q = 0; q < f.queries; q++)
			best = fmaxf(best, b[(uint64_t)q * FIND_GROUP] - top[q]);
		order[g] = ordered(best);
	}
	__syncthreads();
	edge_take(find_edge(order, f.groups, n, &s), order, f.groups, NULL, NULL, NULL, probed, &s);
}

/* ---- rows ------------------------------------------------------------------------------------------ */

/* Task i of a head: a group that is looked into, then 32 rows on the device, then nothing. */
static __device__ struct find_rows probe_rows(const struct find_args &a, const struct find_head &f, uint32_t h,
					      uint32_t i, uint32_t probed)
{
	struct find_rows r = {.at = NULL, .stride = 0, .live = 0};
	const struct cuda_lane *l = at<const struct cuda_lane>(a.ix.lane) + f.lane;

	if (i < probed) {
		uint32_t id = f.group[at<const uint32_t>(a.probed)[(uint64_t)h * a.room_groups + i]];

		r.stride = l->k_bytes;
		r.at = at<const char>((at<const struct find_page>(a.ix.page) + id / FIND_PARTS)->k) +
		       (uint64_t)(id % FIND_PARTS) * FIND_GROUP * r.stride;
		r.live = at<const uint32_t>(a.ix.alive)[id];
	} else if (a.mass && (uint64_t)(i - probed) * FIND_GROUP < a.resident[h]) {
		uint32_t from = (i - probed) * FIND_GROUP, n = a.resident[h] - from;

		r.stride = l->k_row;
		r.at = at<const char>(l->k) + (uint64_t)from * r.stride;
		r.live = n >= FIND_GROUP ? ALL : (1u << n) - 1;
	}
	return r;
}

/* Products of one tile with all queries: each row's to `out` (or NULL), largest and sum to `part`. */
static __device__ void probe_tile(const struct find_args &a, const struct find_head &f, const float *x,
				  uint32_t live, float *out, float2 *part)
{
	uint32_t lane = warp_lane();

	for (uint32_t q0 = 0; q0 < f.queries; q0 += WARPS * FIND_BATCH) {
		float dot[FIND_BATCH];

		tile_dots(x, f.qt, a.dim, f.queries, q0, dot);
#pragma unroll
		for (uint32_t j = 0; j < FIND_BATCH; j++) {
			uint32_t q = q0 + warp_index() + j * WARPS;
			float l = live >> lane & 1 ? dot[j] : -INFINITY, top, sum;

			if (q >= f.queries)
				continue;
			if (out)
				out[(uint64_t)q * FIND_GROUP + lane] = l;
			if (!a.mass)
				continue;
			top = fmaxf(find_max(l), -3e38f);
			sum = find_add(expf(l - top));
			if (!lane)
				part[q] = make_float2(top, sum);
		}
	}
}

KERNEL(3) kvt_recall_probe(struct find_args a)
{
	SHARED(float, x);
	uint32_t h = blockIdx.y, pieces = a.dim * find_elem(a.ix.dtype) / 16,
		 probed = at<const uint32_t>(a.count)[h],
		 tasks = probed + (a.mass ? (a.resident[h] + FIND_GROUP - 1) / FIND_GROUP : 0);
	struct find_head f = find_head(a, h);
	struct find_rows r = probe_rows(a, f, h, blockIdx.x, probed);
	struct find_pieces p;

	tile_fetch(&p, r, pieces);
	for (uint32_t i = blockIdx.x; i < tasks; i += gridDim.x) {
		uint32_t live = r.live;

		tile_store(x, &p, pieces, a.dim, a.ix.dtype);
		__syncthreads();
		r = probe_rows(a, f, h, i + gridDim.x, probed);
		tile_fetch(&p, r, pieces);
		probe_tile(a, f, x, live,
			   i < probed ? at<float>(a.logit) +
						((uint64_t)h * a.room_probed + i) * f.queries * FIND_GROUP
				      : NULL,
			   at<float2>(a.part) + ((uint64_t)h * a.room_parts + i) * f.queries);
		__syncthreads(); /* the tile is free */
	}
}
