/* SPDX-License-Identifier: MIT */
/* Grids and blocks of recall's kernels. How many rows there are only the GPU knows: blocks too many end at
 * once. */
#include "ipc/cuda/kernels.h"
#include "ipc/cuda/recall_args.h"
#include "shm/util.h"

#define THREADS 256u
#define WARPS (THREADS / 32)
#define WIDE 1024u /* threads of what is one block per head: FIND_WIDE of recall.cuh */
#define PER_SM 3u  /* blocks of what reads host memory: several times what hides its latency */

const enum cuda_kernel kern_recall_steps[KERN_RECALL_STEPS] = {
	K_kvt_recall_select, K_kvt_recall_bound, K_kvt_recall_choose, K_kvt_recall_probe,
	K_kvt_recall_score,  K_kvt_recall_near,  K_kvt_recall_top,    K_kvt_recall_pick,
};

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

int kern_recall_step(struct kvtier_cuda *g, enum cuda_kernel k, const struct find_args *a, uint32_t pages,
		     uint32_t rows, void *stream)
{
	struct find_args args = *a;
	uint32_t sms = (uint32_t)g->sms, groups = MAX(pages * FIND_PARTS, 1u), tiles = 0, x = a->heads,
		 y = a->heads;
	uint32_t one = MAX(sms / a->heads, 1u), each = MAX(sms * PER_SM / a->heads, 1u); /* blocks of a head */
	unsigned shared = 0, threads = THREADS;

	for (uint32_t h = 0; h < a->heads; h++)
		tiles = MAX(tiles, DIV_UP(a->resident[h], FIND_GROUP));
	switch (k) {
	case K_kvt_recall_select:
		x = a->heads * a->group + MIN(DIV_UP((uint64_t)a->heads * MAX(rows, 1u), THREADS * 4), sms);
		y = 1;
		break;
	case K_kvt_recall_bound:
		if (a->probe >= 1000)
			return 0; /* all groups are looked into */
		x = DIV_UP(groups, FIND_GROUP);
		shared = tile_bytes(a->dim);
		break;
	case K_kvt_recall_probe:
		x = MIN(groups + tiles, each);
		shared = tile_bytes(a->dim);
		break;
	case K_kvt_recall_score:
		x = MIN(DIV_UP(groups, WARPS), one);
		break;
	case K_kvt_recall_near:
		x = DIV_UP(MAX(rows, 1u), FIND_NEAR_TILE);
		shared = near_bytes(a);
		break;
	case K_kvt_recall_pick:
		x = DIV_UP(groups, WARPS);
		break;
	default: /* one block per head */
		y = 1;
		threads = WIDE;
	}
	return cuda_launch(g, k, x, y, threads, shared, &args, stream);
}

int kern_recall(struct kvtier_cuda *g, const struct find_args *a, uint32_t pages, uint32_t rows, void *stream)
{
	int r = 0;

	for (size_t i = 0; i < ARRAY_SIZE(kern_recall_steps) && !r; i++)
		r = kern_recall_step(g, kern_recall_steps[i], a, pages, rows, stream);
	return r;
}
