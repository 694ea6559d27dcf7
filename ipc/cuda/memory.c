/* SPDX-License-Identifier: MIT */
/* A sequence's memory: few large blocks, made when it is opened, so that nothing allocates later. */
#include "ipc/cuda/cuda.h"

#define ALIGN 256u /* of parts of a block */

/* Hand out a part of a block; with base 0 the sum is its size. */
static uint64_t part(uint64_t *at, uint64_t bytes)
{
	uint64_t here = *at;

	*at += ALIGN_UP(bytes, ALIGN);
	return here;
}

static uint64_t lay_out_dev(struct cuda_seq *q, uint32_t lanes, uint32_t max_rows, uint64_t base)
{
	uint64_t at = base, slots = (uint64_t)q->cap + q->stage;

	q->scratch = part(&at, compact_scratch(lanes, (uint32_t)slots));
	q->lane[0] = part(&at, lanes * sizeof(struct cuda_lane));
	q->lane[1] = part(&at, lanes * sizeof(struct cuda_lane));
	q->slot_of = part(&at, (uint64_t)lanes * max_rows * sizeof(uint32_t));
	q->pos_of = part(&at, lanes * slots * sizeof(uint32_t));
	return at - base;
}

static uint64_t lay_out_pinned(struct cuda_seq *q, uint32_t lanes, char *base)
{
	uint64_t at = 0;

	q->word = (_Atomic uint64_t *)(base + part(&at, sizeof(*q->word)));
	q->bad = (_Atomic uint32_t *)(base + part(&at, sizeof(*q->bad)));
	q->starts = (uint32_t *)(base + part(&at, CUDA_PUSHES * lanes * sizeof(uint32_t)));
	q->counts = (uint32_t *)(base + part(&at, 3 * lanes * sizeof(uint32_t)));
	q->lane_new = (struct cuda_lane *)(base + part(&at, lanes * sizeof(struct cuda_lane)));
	q->pages = (struct scatter_page *)(base + part(&at, CUDA_SCATTER_PAGES * sizeof(struct scatter_page)));
	return at;
}

void cuda_lanes_fill(const struct kvtier_model *m, const struct kvtier_cuda_layer *layers,
		     struct cuda_lane *ret)
{
	for (uint32_t i = 0, lane = 0; i < m->msg->n_layers; i++) {
		const struct kvtier_cuda_layer *l = &layers[i];
		const struct wire_layer *d = &m->msg->layer[i];

		for (uint32_t head = 0; head < d->kv_heads; head++)
			ret[lane++] = (struct cuda_lane){.k = l->k + head * l->k_head_stride,
							 .v = l->v + head * l->v_head_stride,
							 .k_row = l->k_row_stride,
							 .v_row = l->v_row_stride,
							 .k_bytes = d->k_bytes,
							 .v_bytes = d->v_bytes};
	}
}

int cuda_memory_make(struct cuda_seq *q, const struct kvtier_model *m, uint32_t max_rows)
{
	const struct cuda_driver *d = q->g->d;
	uint64_t bytes = lay_out_dev(q, m->lanes, max_rows, 0);
	void *stream = NULL, *pinned = NULL;
	int r = cuda_try(q->g, d->alloc(&q->dev, bytes), "sequence: cuMemAlloc");

	if (!r)
		r = cuda_try(q->g, d->host_alloc(&pinned, lay_out_pinned(q, m->lanes, NULL), CUDA_HOST_MAPPED),
			     "sequence: cuMemHostAlloc");
	q->pinned = pinned;
	if (!r)
		r = cuda_try(q->g, d->host_address(&q->pinned_addr, q->pinned, 0), "cuMemHostGetDevicePointer");
	if (!r)
		r = cuda_try(q->g, d->stream_create(&stream, CUDA_STREAM_NON_BLOCKING), "cuStreamCreate");
	if (r)
		return r;
	lay_out_dev(q, m->lanes, max_rows, q->dev);
	lay_out_pinned(q, m->lanes, q->pinned);
	atomic_store(q->word, 0);
	atomic_store(q->bad, 0);
	cuda_lanes_fill(m, q->layers, q->lane_new);
	r = cuda_try(q->g, d->set8(q->dev, 0, bytes, stream), "cuMemsetD8Async");
	if (!r)
		r = cuda_try(q->g, d->copy_in(q->lane[0], q->lane_new, m->lanes * sizeof(*q->lane_new), stream),
			     "cuMemcpyHtoDAsync");
	if (!r)
		r = cuda_try(q->g, d->stream_sync(stream), "sequence: cuStreamSynchronize");
	(void)d->stream_destroy(stream);
	return r;
}

int cuda_tables_make(struct kvtier_seq *s)
{
	struct cuda_seq *q = s->cu;
	void *pinned = NULL;
	int r;

	/* A truncate needs two tables of all rows there. */
	q->table_bytes = MAX(s->plan_bytes, (uint64_t)s->lanes * s->words * 2 * sizeof(uint64_t));
	r = cuda_enter(q->g);
	if (r)
		return r;
	r = cuda_try(q->g, q->g->d->alloc(&q->tables, q->table_bytes), "plan tables: cuMemAlloc");
	if (!r)
		r = cuda_try(q->g, q->g->d->host_alloc(&pinned, q->table_bytes, CUDA_HOST_MAPPED),
			     "plan tables: cuMemHostAlloc");
	q->pinned_tables = pinned;
	cuda_leave(q->g);
	return r;
}

void cuda_memory_free(struct cuda_seq *q)
{
	const struct cuda_driver *d = q->g->d;

	if (q->dev)
		(void)d->free(q->dev);
	if (q->tables)
		(void)d->free(q->tables);
	if (q->pinned)
		(void)d->host_free(q->pinned);
	if (q->pinned_tables)
		(void)d->host_free(q->pinned_tables);
}
