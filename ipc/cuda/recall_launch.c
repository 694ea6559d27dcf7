/* SPDX-License-Identifier: MIT */
/* One search: where its arrays lie, and its kernels. Sizes are upper bounds that the host knows. */
#include <math.h>
#include <string.h>
#include "ipc/client/client.h"
#include "ipc/cuda/recall.h"

static uint64_t take(uint64_t *used, uint64_t bytes)
{
	uint64_t at = *used;

	*used += ALIGN_UP(bytes, 256);
	return at;
}

/* Lay the arrays out from address `base` on; returns their bytes. */
static uint64_t lay_out(struct find_args *a, uint64_t base)
{
	uint64_t used = base, heads = a->heads, queries = a->group * a->tokens,
		 words = heads * a->room_rows / 32 * 4;

	a->qt = take(&used, heads * queries * a->dim * 4);
	a->spread = take(&used, heads * queries * 4);
	a->top = take(&used, heads * queries * 4);
	a->bound = take(&used, heads * a->room_groups * queries * 4);
	a->order = take(&used, heads * a->room_groups * 4);
	a->probed = take(&used, heads * a->room_groups * 4);
	a->count = take(&used, heads * 4);
	a->logit = take(&used, heads * a->room_probed * queries * FIND_GROUP * 4);
	a->part = take(&used, heads * a->room_parts * queries * 8);
	a->score = take(&used, heads * a->room_rows * 4);
	a->near = take(&used, heads * a->room_rows * 4);
	a->take = take(&used, words);
	a->left = take(&used, words);
	a->base = take(&used, words);
	return used - base;
}

/* Groups looked into of so many: find_probes() of recall.cuh. */
static uint32_t probes(const struct find_query *q, uint32_t groups)
{
	uint64_t share = DIV_UP((uint64_t)groups * q->probe, 1000),
		 rows = DIV_UP((uint64_t)q->rows * 4, FIND_GROUP);

	return (uint32_t)MIN(MAX(share, rows), groups);
}

int find_launch(struct cuda_recall *f, const struct find_query *q, uint64_t lane, void *stream)
{
	uint32_t elem = f->shape.dtype == KVT_DTYPE_F32 ? 4 : 2, groups = MAX(f->longest, 1u) * FIND_PARTS,
		 rows = (uint32_t)MIN((uint64_t)groups * FIND_GROUP, ALIGN_UP((uint64_t)f->shape.max_rows, 32));
	struct find_args *a = &f->last;
	int r;

	*a = (struct find_args){.ix = f->ix,
				.first = q->first,
				.heads = q->heads,
				.group = q->group,
				.tokens = MIN(q->n_queries, FIND_TOKENS),
				.dim = f->shape.lane[q->first].k_bytes / elem,
				.want = q->rows,
				.probe = q->probe,
				.before = q->before,
				.after = q->after,
				.mass = q->mass,
				.scale = q->scale,
				.n_tokens = q->n_queries,
				.q = q->queries,
				.token_stride = q->token_stride,
				.head_stride = q->head_stride,
				.room_groups = (uint32_t)ALIGN_UP(groups, FIND_GROUP),
				.room_probed = ALIGN_UP(probes(q, groups), FIND_GROUP),
				.room_rows = rows,
				.k = q->k,
				.v = q->v,
				.k_head_stride = q->k_head_stride,
				.v_head_stride = q->v_head_stride,
				.counts = q->counts,
				.positions = q->positions,
				.k_row_stride = q->k_row_stride,
				.v_row_stride = q->v_row_stride};
	a->ix.lane = lane;
	a->room_parts = a->room_probed + (uint32_t)ALIGN_UP(DIV_UP(f->shape.slots, FIND_GROUP), FIND_GROUP);
	for (uint32_t h = 0; q->resident && q->mass && h < q->heads; h++)
		a->resident[h] = MIN(q->resident[h], f->shape.slots);
	r = find_grow(f, &f->scratch, lay_out(a, 0));
	if (r)
		return r;
	lay_out(a, f->scratch.addr);
	return kern_recall(f->g, a, f->longest, rows, stream);
}
