/* SPDX-License-Identifier: MIT */
/* Recall on the GPU, first part: what is known of every page, and which of its rows may be recalled. */
#include "ipc/cuda/recall.cuh"

/* ---- summaries ------------------------------------------------------------------------------ */

struct sum_task {
	const struct find_fresh *fresh;
	uint32_t part, rows, dim; /* rows 0: nothing to do */
	struct find_rows keys;
};

static __device__ struct sum_task sum_task(const struct find_sum_args &a, uint32_t i)
{
	struct sum_task t = {.fresh = at<const struct find_fresh>(a.fresh) + i / FIND_PARTS,
			     .part = i % FIND_PARTS,
			     .rows = 0,
			     .dim = 0,
			     .keys = {}};
	const struct find_page *p = &t.fresh->page;
	uint32_t from = t.part * FIND_GROUP, bytes;

	if (i >= a.n * FIND_PARTS)
		return t;
	bytes = at<const struct cuda_lane>(a.ix.lane)[p->lane].k_bytes;
	t.dim = bytes / find_elem(a.ix.dtype);
	if (!t.fresh->sum || from >= p->rows)
		return t;
	t.rows = p->rows - from < FIND_GROUP ? p->rows - from : FIND_GROUP;
	t.keys.at = at<const char>(p->k) + (uint64_t)from * bytes;
	t.keys.stride = bytes;
	t.keys.live = t.rows == 32 ? ALL : (1u << t.rows) - 1;
	return t;
}

/* Rows of the tile whose elements are numbers. All threads get them. */
static __device__ uint32_t finite_rows(const float *x, uint32_t rows, uint32_t dim, uint32_t *ok)
{
	for (uint32_t r = warp_index(); r < FIND_GROUP; r += WARPS) {
		float sum = 0;

		for (uint32_t d = warp_lane(); d < dim && r < rows; d += WARP)
			sum += fabsf(x[r * (dim + FIND_PAD) + d]) * 0x1p-12f;
		sum = find_add(sum);
		if (!warp_lane())
			ok[r] = r < rows && isfinite(sum);
	}
	__syncthreads();
	return __ballot_sync(ALL, ok[warp_lane()]);
}

/* The mean of the good rows as int8, and how far they scatter: thread d has element d. */
static __device__ void summarise(const float *x, const struct sum_task *t, char *to, uint32_t good, float *red)
{
	uint32_t n = (uint32_t)__popc(good), d = threadIdx.x;
	float mean = 0, top = 0, step, inv, sq = 0, c;

	for (uint32_t r = 0; d < t->dim && r < FIND_GROUP; r++)
		if (good >> r & 1)
			mean = fmaf(x[r * (t->dim + FIND_PAD) + d], 1.0f / (float)n, mean);
	top = find_max(fabsf(mean));
	if (!warp_lane())
		red[warp_index()] = top;
	__syncthreads();
	for (uint32_t w = 0; w < WARPS; w++)
		top = fmaxf(top, red[w]);
	step = top / 127;
	inv = top > 0 ? 127 / top : 0;
	if (!isfinite(top) || !isfinite(inv))
		inv = step = 0; /* too large or too small for a mean that says anything */
	c = inv > 0 ? rintf(mean * inv) : 0;
	for (uint32_t r = 0; d < t->dim && r < FIND_GROUP; r++)
		if (good >> r & 1) {
			float e = x[r * (t->dim + FIND_PAD) + d] - c * step;

			sq = fmaf(e, e, sq);
		}
	sq = find_add(sq);
	__syncthreads(); /* everybody has read red[] */
	if (!warp_lane())
		red[warp_index()] = sq;
	__syncthreads();
	sq = 0;
	for (uint32_t w = 0; w < WARPS; w++)
		sq += red[w];
	if (d < t->dim)
		((int8_t *)(to + FIND_SUM_HEAD))[t->part * t->dim + d] = (int8_t)c;
	if (d)
		return;
	((float *)to)[t->part] = step;
	((float *)to)[FIND_PARTS + t->part] = sqrtf(fminf(n ? sq / (float)n : 0, 1e36f));
	((uint32_t *)to)[2 * FIND_PARTS + t->part] = good;
}

/* The page's entry, by the block that has its first part. */
static __device__ void keep_page(const struct find_index &ix, const struct find_fresh *f)
{
	const uint64_t *from = (const uint64_t *)&f->page;
	uint64_t *to = (uint64_t *)(at<struct find_page>(ix.page) + f->slot);

	if (threadIdx.x < sizeof(f->page) / sizeof(*to))
		to[threadIdx.x] = from[threadIdx.x];
}

KERNEL(3) kvt_recall_sum(struct find_sum_args a)
{
	SHARED(float, x);
	__shared__ uint32_t ok[FIND_GROUP];
	__shared__ float red[WARPS];
	uint32_t elem = find_elem(a.ix.dtype), tasks = a.n * FIND_PARTS;
	struct sum_task t = sum_task(a, blockIdx.x);
	struct find_pieces p;

	tile_fetch(&p, t.keys, t.dim ? t.dim * elem / 16 : 1);
	for (uint32_t i = blockIdx.x; i < tasks; i += gridDim.x) {
		struct sum_task now = t;
		char *to = at<char>(a.ix.sum) + (uint64_t)now.fresh->slot * a.ix.sum_bytes;
		uint32_t good;

		tile_store(x, &p, now.dim * elem / 16, now.dim, a.ix.dtype);
		if (!now.part)
			keep_page(a.ix, now.fresh);
		t = sum_task(a, i + gridDim.x);
		tile_fetch(&p, t.keys, t.dim ? t.dim * elem / 16 : 1);
		__syncthreads();
		good = finite_rows(x, now.rows, now.dim, ok);
		if (now.rows)
			summarise(x, &now, to, good, red);
		else if (now.fresh->sum && !threadIdx.x)
			((uint32_t *)to)[2 * FIND_PARTS + now.part] = 0;
		__syncthreads(); /* the tile is free */
	}
}

/* ---- what may be recalled ------------------------------------------------------------------- */

/* Packed rows of a page as bits of its word: the alive ones of the n from `before` on. */
static __device__ uint64_t spread_bits(uint64_t pos, uint32_t before, const uint32_t *alive)
{
	uint32_t n = (uint32_t)__popcll(pos), have = 0;
	uint64_t got = 0;

	for (uint32_t r = before; r < before + n; r++)
		have += alive[r / 32] >> r % 32 & 1;
	if (have == n)
		return pos;
	for (uint32_t r = before; pos && have; r++, pos &= pos - 1)
		if (alive[r / 32] >> r % 32 & 1)
			got |= pos & (~pos + 1);
	return got;
}

/* One warp, one page: its rows that may be recalled, by packed row and by position. */
static __device__ void mark_page(const struct find_mark_args &a, uint32_t lane, uint32_t slot)
{
	const struct find_page *p = at<const struct find_page>(a.ix.page) + slot;
	const uint32_t *good = at<const uint32_t>(a.ix.sum + (uint64_t)slot * a.ix.sum_bytes) + 2 * FIND_PARTS;
	const uint64_t *resident = at<const uint64_t>(a.resident) + (uint64_t)lane * a.words;
	unsigned long long *bits = at<unsigned long long>(a.ix.bits) + (uint64_t)lane * a.ix.words;
	uint32_t end = p->limit < a.end ? p->limit : a.end, alive[FIND_PARTS], to;
	struct find_words w = page_words(p);
	uint64_t v;

#pragma unroll
	for (uint32_t g = 0; g < FIND_PARTS; g++) {
		uint32_t r = g * FIND_GROUP + warp_lane(), pos = p->first + row_bit(w, r);
		bool live = r < p->rows && pos < end && good[g] >> warp_lane() & 1 &&
			    !(p->dead[g] >> warp_lane() & 1) && !(resident[pos / 64] >> pos % 64 & 1);

		alive[g] = __ballot_sync(ALL, live);
		if (!warp_lane())
			at<uint32_t>(a.ix.alive)[(uint64_t)slot * FIND_PARTS + g] = alive[g];
	}
	v = spread_bits(w.pos, w.before, alive);
	to = p->first + warp_lane() * 64;
	if (v << to % 64)
		atomicOr(bits + to / 64, (unsigned long long)(v << to % 64));
	if (to % 64 && v >> (64 - to % 64))
		atomicOr(bits + to / 64 + 1, (unsigned long long)(v >> (64 - to % 64)));
}

KERNEL(3) kvt_recall_mark(struct find_mark_args a)
{
	__shared__ uint32_t sums[WARPS];
	uint32_t lane = blockIdx.x, first = at<const uint32_t>(a.ix.start)[lane],
		 n = at<const uint32_t>(a.ix.start)[lane + 1] - first, before = 0, all;
	const uint32_t *list = at<const uint32_t>(a.ix.list) + first, *alive = at<const uint32_t>(a.ix.alive);
	uint64_t *bits = at<uint64_t>(a.ix.bits) + (uint64_t)lane * a.ix.words;
	uint32_t *rank = at<uint32_t>(a.ix.rank) + (uint64_t)lane * a.ix.words,
		 *group = at<uint32_t>(a.ix.group) + (uint64_t)first * FIND_PARTS;

	for (uint32_t w = threadIdx.x; w < a.ix.words; w += BLOCK)
		bits[w] = 0;
	__syncthreads();
	for (uint32_t i = warp_index(); i < n; i += WARPS)
		mark_page(a, lane, list[i]);
	__syncthreads();
	for (uint32_t from = 0; from < a.ix.words; from += BLOCK) {
		uint32_t w = from + threadIdx.x, own = w < a.ix.words ? (uint32_t)__popcll(bits[w]) : 0;
		uint32_t upto = find_prefix(own, sums, &all);

		if (w < a.ix.words)
			rank[w] = before + upto - own;
		before += all;
	}
	if (!threadIdx.x)
		at<uint32_t>(a.ix.rows)[lane] = before;
	before = 0;
	for (uint32_t from = 0; from < n * FIND_PARTS; from += BLOCK) {
		uint32_t i = from + threadIdx.x,
			 id = i < n * FIND_PARTS ? list[i / FIND_PARTS] * FIND_PARTS + i % FIND_PARTS : 0,
			 own = i < n * FIND_PARTS && alive[id], upto = find_prefix(own, sums, &all);

		if (own)
			group[before + upto - 1] = id;
		before += all;
	}
	if (!threadIdx.x)
		at<uint32_t>(a.ix.groups)[lane] = before;
}
