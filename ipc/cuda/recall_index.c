/* SPDX-License-Identifier: MIT */
/* The index of a sequence's pages in GPU memory: see recall.h. */
#include <string.h>
#include "ipc/client/client.h"
#include "ipc/cuda/recall.h"

#define BATCH 4096u /* pages that one launch summarises */
#define TRIES 8     /* looks at a directory that changes */

/* ---- memory ---------------------------------------------------------------------------------------------- */

int find_grow(struct cuda_recall *f, struct find_mem *m, uint64_t bytes)
{
	struct find_mem *old, new = {.bytes = MAX(bytes, m->bytes * 2)};
	int r;

	if (bytes <= m->bytes)
		return 0;
	old = reallocarray(f->old, f->n_old + 1, sizeof(*old));
	if (!old)
		return err_set(KVT_E_NOMEM, "recall: out of memory");
	f->old = old;
	r = cuda_try(f->g, f->g->d->alloc(&new.addr, new.bytes), "recall: cuMemAlloc");
	if (r)
		return r;
	if (m->addr)
		f->old[f->n_old++] = *m;
	*m = new;
	return 0;
}

struct find_stage {
	void *host, *event;
	uint64_t addr, bytes;
	bool busy;
};

/* Host memory of `bytes` that the GPU does not read any more. */
static int stage_get(struct cuda_recall *f, uint64_t bytes, uint32_t *ret)
{
	const struct cuda_driver *d = f->g->d;
	struct find_stage *v, s = {.bytes = bytes};
	int r;

	for (uint32_t i = 0; i < f->n_stages; i++) {
		v = &f->stage[i];
		if (v->bytes >= bytes && (!v->busy || !d->event_query(v->event))) {
			v->busy = false;
			*ret = i;
			return 0;
		}
	}
	v = reallocarray(f->stage, f->n_stages + 1, sizeof(*v));
	if (!v)
		return err_set(KVT_E_NOMEM, "recall: out of memory");
	f->stage = v;
	r = cuda_try(f->g, d->event_create(&s.event, 2 /* no timing */), "recall: cuEventCreate");
	if (!r)
		r = cuda_try(f->g, d->host_alloc(&s.host, bytes, CUDA_HOST_MAPPED), "recall: cuMemHostAlloc");
	if (!r)
		r = cuda_try(f->g, d->host_address(&s.addr, s.host, 0), "recall: cuMemHostGetDevicePointer");
	if (r) {
		if (s.host)
			(void)d->host_free(s.host);
		if (s.event)
			(void)d->event_destroy(s.event);
		return r;
	}
	*ret = f->n_stages;
	f->stage[f->n_stages++] = s;
	return 0;
}

/* What was launched so far reads it. */
static int stage_use(struct cuda_recall *f, uint32_t i, void *stream)
{
	f->stage[i].busy = true;
	return cuda_try(f->g, f->g->d->event_record(f->stage[i].event, stream), "recall: cuEventRecord");
}

/* ---- making -------------------------------------------------------------------------------------------------
 */

static int check_shape(const struct find_shape *s, uint32_t *ret_dim)
{
	uint32_t elem = s->dtype == KVT_DTYPE_F32 ? 4 : 2, most = 0;

	for (uint32_t l = 0; l < s->lanes; l++) {
		uint32_t bytes = s->lane[l].k_bytes, dim = bytes / elem;

		if (bytes % 16 || dim % 8 || !dim || dim > FIND_MAX_DIM || bytes > 512)
			return err_set(KVT_E_INVAL,
				       "lane %u: keys of %u bytes, recall on the GPU needs 16..512 in 8 to %u "
				       "elements, "
				       "by 8",
				       l, bytes, FIND_MAX_DIM);
		most = MAX(most, dim);
	}
	*ret_dim = most;
	return 0;
}

int find_new(struct kvtier_cuda *g, const struct find_shape *shape, struct cuda_recall **ret)
{
	uint64_t words = BITS_WORDS(shape->max_rows), all = words * shape->lanes, at;
	struct cuda_recall *f;
	uint32_t dim = 0;
	int r = check_shape(shape, &dim);

	if (r)
		return r;
	f = calloc(1, sizeof(*f));
	if (!f)
		return err_set(KVT_E_NOMEM, "recall: out of memory");
	f->g = g;
	f->shape = *shape;
	f->max_dim = dim;
	r = find_grow(f, &f->fixed, all * 12 + (uint64_t)shape->lanes * 12 + 64);
	if (r) {
		find_end(f);
		return r;
	}
	at = f->fixed.addr;
	f->ix = (struct find_index){.lanes = shape->lanes,
				    .words = (uint32_t)words,
				    .sum_bytes = ALIGN_UP(FIND_SUM_HEAD + FIND_PARTS * dim, 16),
				    .dtype = shape->dtype,
				    .bits = at,
				    .rank = at + all * 8,
				    .groups = at + all * 12,
				    .rows = at + all * 12 + shape->lanes * UINT64_C(4)};
	*ret = f;
	return 0;
}

void find_end(struct cuda_recall *f)
{
	if (!f)
		return;
	for (uint32_t i = 0; i < f->n_old; i++)
		(void)f->g->d->free(f->old[i].addr);
	for (uint32_t i = 0; i < f->n_stages; i++) {
		(void)f->g->d->host_free(f->stage[i].host);
		(void)f->g->d->event_destroy(f->stage[i].event);
	}
	(void)f->g->d->free(f->fixed.addr);
	(void)f->g->d->free(f->paged.addr);
	(void)f->g->d->free(f->listed.addr);
	(void)f->g->d->free(f->residents.addr);
	(void)f->g->d->free(f->scratch.addr);
	free(f->old);
	free(f->stage);
	free(f);
}

/* ---- pages
 * --------------------------------------------------------------------------------------------------- */

/* Room for so many entries of the directory. What is there already is made again: *ret_moved. */
static int make_slots(struct cuda_recall *f, uint32_t used, bool *ret_moved)
{
	uint32_t slots = MAX(f->slots, 256u);
	int r;

	if (used <= f->slots)
		return 0;
	while (slots < used)
		slots += slots / 2;
	r = find_grow(f, &f->paged,
		      slots * (sizeof(struct find_page) + f->ix.sum_bytes + FIND_PARTS * sizeof(uint32_t)));
	if (r)
		return r;
	f->slots = slots;
	f->ix.sum = f->paged.addr;
	f->ix.page = f->ix.sum + (uint64_t)slots * f->ix.sum_bytes;
	f->ix.alive = f->ix.page + slots * sizeof(struct find_page);
	*ret_moved = true;
	return 0;
}

static int flush(struct cuda_recall *f)
{
	struct find_sum_args a = {.ix = f->ix, .n = f->n_fresh};
	int r;

	if (!f->n_fresh)
		return 0;
	a.fresh = f->stage[f->filling].addr;
	f->n_fresh = 0;
	f->fresh = NULL;
	r = kern_recall_sum(f->g, &a, f->max_dim, f->stream);
	return r ? r : stage_use(f, f->filling, f->stream);
}

static int take_page(void *arg, uint32_t slot, bool sum, const struct find_page *p)
{
	struct cuda_recall *f = arg;
	int r;

	if (slot >= f->slots)
		return KVT_AGAIN; /* the directory has grown meanwhile */
	if (!f->fresh) {
		r = stage_get(f, BATCH * sizeof(*f->fresh), &f->filling);
		if (r)
			return r;
		f->fresh = f->stage[f->filling].host;
	}
	f->fresh[f->n_fresh++] = (struct find_fresh){.slot = slot, .sum = sum, .page = *p};
	return f->n_fresh == BATCH ? flush(f) : 0;
}

/* Pages by lane: start[lanes + 1], then slots, in the order of the directory. */
static int list_pages(struct cuda_recall *f, const struct cuda_direct *d, void *stream)
{
	uint32_t lanes = f->shape.lanes, *start, *list, stage = 0, n = 0;
	uint64_t bytes;
	int r;

	for (uint32_t i = 0; i < d->used; i++)
		n += d->seen[i].place != 0;
	bytes = (lanes + 1 + n) * sizeof(uint32_t);
	r = find_grow(f, &f->listed, (lanes + 1 + (1 + FIND_PARTS) * (uint64_t)MAX(n, 1u)) * sizeof(uint32_t));
	if (!r)
		r = stage_get(f, MAX(bytes, f->listed.bytes / (1 + FIND_PARTS)), &stage);
	if (r)
		return r;
	start = f->stage[stage].host;
	list = start + lanes + 1;
	memset(start, 0, (lanes + 1) * sizeof(*start));
	for (uint32_t i = 0; i < d->used; i++)
		if (d->seen[i].place)
			start[d->seen[i].lane + 1]++;
	f->pages = n;
	f->longest = 0;
	for (uint32_t l = 0; l < lanes; l++) {
		f->longest = MAX(f->longest, start[l + 1]);
		start[l + 1] += start[l];
	}
	for (uint32_t i = 0; i < d->used; i++)
		if (d->seen[i].place)
			list[start[d->seen[i].lane]++] = i;
	memmove(start + 1, start, lanes * sizeof(*start)); /* each was moved on to the next one's start */
	start[0] = 0;
	f->ix.start = f->listed.addr;
	f->ix.list = f->ix.start + (lanes + 1) * sizeof(uint32_t);
	f->ix.group = f->ix.list + MAX(n, 1u) * sizeof(uint32_t);
	r = cuda_try(f->g, f->g->d->copy_in(f->listed.addr, start, bytes, stream), "recall: cuMemcpyHtoDAsync");
	return r ? r : stage_use(f, stage, stream);
}

int find_mark(struct cuda_recall *f, const struct find_resident *resident, void *stream)
{
	struct find_mark_args a = {.ix = f->ix, .words = resident->words, .end = resident->end};
	uint64_t bytes = (uint64_t)f->shape.lanes * resident->words * sizeof(uint64_t);
	uint32_t stage = 0;
	int r = find_grow(f, &f->residents, (uint64_t)f->shape.lanes * f->ix.words * sizeof(uint64_t));

	f->marked = false;
	if (!r && bytes)
		r = stage_get(f, f->residents.bytes, &stage);
	if (!r && bytes) {
		memcpy(f->stage[stage].host, resident->bits, bytes);
		r = cuda_try(f->g, f->g->d->copy_in(f->residents.addr, f->stage[stage].host, bytes, stream),
			     "recall: cuMemcpyHtoDAsync");
		if (!r)
			r = stage_use(f, stage, stream);
	}
	a.resident = f->residents.addr;
	if (!r)
		r = kern_recall_mark(f->g, &a, stream);
	f->marked = !r;
	return r;
}

/* Everything that is new in the directory into the index. */
static int take_pages(struct cuda_recall *f, struct cuda_direct *d, void *stream, bool *ret_changed)
{
	const struct direct_hdr *h = d->dir.addr;
	int r = KVT_AGAIN;

	*ret_changed = false;
	for (int i = 0; r == KVT_AGAIN && i < TRIES; i++) {
		bool moved = false, changed = i > 0;

		r = make_slots(f, MIN(atomic_load(&h->used), h->capacity), &moved);
		if (moved)
			view_forget(d);
		if (!r)
			r = view_look(d, take_page, f, stream, &changed);
		if (r >= 0 && flush(f)) /* of pages that are taken again, too: nothing is lost by it */
			r = KVT_E_GPU;
		*ret_changed |= changed || i > 0;
	}
	f->n_fresh = 0;
	f->fresh = NULL;
	return r;
}

int find_prepare(struct cuda_recall *f, struct cuda_direct *d, const struct find_resident *resident,
		 uint64_t lane, void *stream)
{
	bool changed;
	int r;

	f->ix.lane = lane;
	f->stream = stream;
	r = take_pages(f, d, stream, &changed);
	if (!r && (changed || !f->ix.start))
		r = list_pages(f, d, stream);
	if (!r)
		r = find_mark(f, resident, stream);
	if (r) {
		f->marked = false;
		view_forget(d);
	}
	return r;
}
