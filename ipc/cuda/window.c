/* SPDX-License-Identifier: MIT */
/* Exchange memory that the GPU reads and writes, and who has which part of it. */
#include "ipc/cuda/cuda.h"

int kvtier_cuda_window_create(struct kvtier *c, struct kvtier_cuda *g, uint64_t bytes,
			      struct kvtier_cuda_window **ret)
{
	struct kvtier_cuda_window *w;
	struct kvtier_region *region = NULL;
	bool registered = false;
	int r;

	if (!c || !g || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", !c ? "c" : !g ? "g" : "ret");
	w = calloc(1, sizeof(*w));
	if (!w)
		return err_set(KVT_E_NOMEM, "window: out of memory");
	w->g = g;
	LIST_INIT(&w->taken);
	r = cuda_enter(g);
	if (r) {
		free(w);
		return r;
	}
	r = kvtier_region_create(c, bytes, &region);
	if (!r) {
		r = cuda_try(g, g->d->host_register(region->seg.addr, region->seg.size, CUDA_HOST_MAPPED),
			     "window: cuMemHostRegister");
		registered = !r;
	}
	if (!r)
		r = cuda_try(g, g->d->host_address(&w->addr, region->seg.addr, 0),
			     "window: cuMemHostGetDevicePointer");
	if (r && registered)
		(void)g->d->host_unregister(region->seg.addr);
	cuda_leave(g);
	if (r) {
		kvtier_region_close(region);
		free(w);
		return r;
	}
	w->r = region;
	region->window = w;
	*ret = w;
	return 0;
}

void kvtier_cuda_window_close(struct kvtier_cuda_window *w)
{
	if (w)
		kvtier_region_close(w->r);
}

void window_detach(struct kvtier_region *r)
{
	struct kvtier_cuda_window *w = r->window;
	struct kvtier_cuda *g = w ? w->g : NULL;

	if (!w)
		return;
	r->window = NULL;
	/* A lost GPU has let go already, or will with its context: the driver's answer changes nothing. A child
	 * of fork() has no GPU. */
	if (!forked(r->c) && !g->d->ctx_push(g->ctx)) {
		(void)g->d->host_unregister(r->seg.addr);
		cuda_leave(g);
	}
	while (!LIST_EMPTY(&w->taken)) {
		struct cuda_extent *e = LIST_FIRST(&w->taken);

		LIST_REMOVE(e, entry);
		free(e);
	}
	free(w);
}

int extent_take(struct kvtier_cuda_window *w, uint64_t bytes, struct cuda_extent **ret)
{
	struct kvtier *c = w->r->c;
	struct cuda_extent *e = malloc(sizeof(*e)), *next, *before = NULL;
	uint64_t at = 0, end = w->r->seg.size;

	if (!e)
		return err_set(KVT_E_NOMEM, "window: out of memory");
	bytes = ALIGN_UP(bytes, KVT_UNIT);
	pthread_mutex_lock(&c->lock);
	LIST_FOREACH(next, &w->taken, entry) {
		if (next->off - at >= bytes)
			break;
		at = next->off + next->bytes;
		before = next;
	}
	if (!next && end - at < bytes) {
		pthread_mutex_unlock(&c->lock);
		free(e);
		return err_set(KVT_E_NOSPC, "window: no %llu bytes free of its %llu in one piece",
			       (unsigned long long)bytes, (unsigned long long)end);
	}
	*e = (struct cuda_extent){.off = at, .bytes = bytes};
	if (before)
		LIST_INSERT_AFTER(before, e, entry);
	else
		LIST_INSERT_HEAD(&w->taken, e, entry);
	pthread_mutex_unlock(&c->lock);
	*ret = e;
	return 0;
}

void extent_give(struct kvtier_cuda_window *w, struct cuda_extent *e)
{
	if (!e)
		return;
	pthread_mutex_lock(&w->r->c->lock);
	LIST_REMOVE(e, entry);
	pthread_mutex_unlock(&w->r->c->lock);
	free(e);
}
