/* SPDX-License-Identifier: MIT */
/* Grids and blocks of recall's kernels. How many rows there are only the GPU knows: blocks too many end at
 * once. */
#include "ipc/cuda/kernels.h"
#include "ipc/cuda/recall_args.h"
#include "shm/util.h"

#define THREADS 256u
#define WARPS (THREADS / 32)
#define PER_SM 3u /* blocks of what reads host memory: several times what hides its latency */

static unsigned tile_bytes(uint32_t dim)
{
	return FIND_GROUP * (dim + 4) * (unsigned)sizeof(float);
}

int kern_recall_sum(struct kvtier_cuda *g, const struct find_sum_args *a, uint32_t max_dim, void *stream)
{
	struct find_sum_args args = *a;
	uint32_t blocks = MIN(a->n * FIND_PARTS, (uint32_t)g->sms * PER_SM);

	if (!a->n)
		return 0;
	return cuda_launch(g, K_kvt_recall_sum, blocks, 1, THREADS, tile_bytes(max_dim), &args, stream);
}

int kern_recall_mark(struct kvtier_cuda *g, const struct find_mark_args *a, void *stream)
{
	struct find_mark_args args = *a;

	return cuda_launch(g, K_kvt_recall_mark, a->ix.lanes, 1, THREADS, 0, &args, stream);
}

/* Rows of the kernel's shared memory: two windows and the rows between them, twice. */
static unsigned near_bytes(const struct find_args *a)
{
	return 2 * (FIND_NEAR_TILE + a->before + a->after) * (unsigned)sizeof(uint32_t);
}

int kern_recall(struct kvtier_cuda *g, const struct find_args *a, uint32_t pages, uint32_t rows, void *stream)
{
	struct find_args args = *a;
	uint32_t sms = (uint32_t)g->sms, groups = MAX(pages * FIND_PARTS, 1u), tiles = 0, clear, one, each;
	int r;

	for (uint32_t h = 0; h < a->heads; h++)
		tiles = MAX(tiles, DIV_UP(a->resident[h], FIND_GROUP));
	clear = MIN(DIV_UP((uint64_t)a->heads * MAX(rows, 1u), THREADS * 4), sms);
	one = MAX(sms / a->heads, 1u); /* blocks of a head: one a multiprocessor; as many as read at once */
	each = MAX(sms * PER_SM / a->heads, 1u);
#define GO(kernel, x, y, shared) cuda_launch(g, K_kvt_recall_##kernel, x, y, THREADS, shared, &args, stream)
	r = GO(select, a->heads * a->group + clear, 1, 0);
	if (!r && a->probe < 1000)
		r = GO(bound, DIV_UP(groups, FIND_GROUP), a->heads, tile_bytes(a->dim));
	if (!r)
		r = GO(choose, a->heads, 1, 0);
	if (!r)
		r = GO(probe, MIN(groups + tiles, each), a->heads, tile_bytes(a->dim));
	if (!r)
		r = GO(score, MIN(DIV_UP(groups, WARPS), one), a->heads, 0);
	if (!r)
		r = GO(near, DIV_UP(MAX(rows, 1u), FIND_NEAR_TILE), a->heads, near_bytes(a));
	if (!r)
		r = GO(top, a->heads, 1, 0);
	if (!r)
		r = GO(pick, MIN(DIV_UP(groups, WARPS), each), a->heads, 0);
#undef GO
	return r;
}
