/* SPDX-License-Identifier: MIT */
/* Pools: the private one, and those of owners, which come with their first page and go with their last segment.
 */
#include "tiers/dram.h"

#include <stdlib.h>

uint32_t dram_next_empty(const struct pool *p, uint32_t node, uint32_t i)
{
	i = alloc_next_empty(&p->alloc[node], i);
	return i < p->alloc[node].top ? i : DRAM_SLOTS;
}

void dram_pool_stat(const struct dram *d, const struct pool *p, struct alloc_stat *ret)
{
	struct alloc_stat a;

	for (uint32_t n = 0; n < d->nodes; n++) {
		alloc_stat(&p->alloc[n], &a);
		ret->capacity += a.capacity;
		ret->used += a.used;
		ret->free += a.free;
		ret->stranded += a.stranded;
		ret->padding += a.padding;
		ret->segs += a.segs;
		ret->empty_segs += a.empty_segs;
	}
}

struct pool *dram_pool_make(const struct dram *d, uint64_t owner)
{
	struct pool *p = calloc(1, sizeof(*p) + d->nodes * sizeof(p->alloc[0]));

	if (!p)
		return NULL;
	p->owner = owner;
	for (uint32_t n = 0; n < d->nodes; n++)
		alloc_init(&p->alloc[n]);
	return p;
}

void dram_pool_fini(const struct dram *d, struct pool *p)
{
	for (uint32_t n = 0; p && n < d->nodes; n++)
		alloc_fini(&p->alloc[n]);
}

struct pool *dram_pool(struct dram *d, uint64_t owner)
{
	struct pool *p;

	if (!owner)
		return d->private;
	LIST_FOREACH(p, &d->pools, link)
		if (p->owner == owner)
			return p;
	return NULL;
}

struct pool *dram_pool_get(struct dram *d, uint64_t owner)
{
	struct pool *p = dram_pool(d, owner);

	if (p)
		return p;
	p = dram_pool_make(d, owner);
	if (p)
		LIST_INSERT_HEAD(&d->pools, p, link);
	return p;
}

void dram_pool_end(const struct dram *d, struct pool *p)
{
	if (!p->owner || p->held || p->mapped)
		return;
	LIST_REMOVE(p, link);
	dram_pool_fini(d, p);
	free(p);
}
