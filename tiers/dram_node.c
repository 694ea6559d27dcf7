/* SPDX-License-Identifier: MIT */
/*
 * Nodes of the host's memory. Where they are told apart each has a part of the capacity, in proportion to its
 * memory, and segments of its own; a page that finds no room on its node goes to the nearest one that has some.
 */
#include "tiers/dram.h"

#include <errno.h>
#include <numa.h>
#include <stdio.h>
#include <string.h>

#include "shm/place.h"

static bool known(const struct tier_cfg *cfg, int id)
{
	if (!cfg->nodes || !cfg->nodes->n)
		return numa_available() < 0 ? !id : numa_bitmask_isbitset(numa_all_nodes_ptr, (unsigned)id);
	for (unsigned i = 0; i < cfg->nodes->n; i++)
		if (cfg->nodes->id[i] == id)
			return true;
	return false;
}

static int highest(const struct tier_cfg *cfg)
{
	if (cfg->nodes && cfg->nodes->n)
		return cfg->nodes->id[cfg->nodes->n - 1];
	return numa_available() < 0 ? 0 : numa_max_node();
}

/* In whole slabs; what does not divide goes to the first. */
static void divide(struct dram *d)
{
	uint64_t all = 0, slabs = d->capacity / ALLOC_SLAB_BYTES, given = 0;

	for (unsigned i = 0; i < d->nodes; i++)
		all += d->host.memory[i];
	for (unsigned i = 0; i < d->nodes; i++) {
		double part = all ? (double)d->host.memory[i] / (double)all : 1.0 / d->nodes;

		d->node[i].capacity = (uint64_t)((double)slabs * part) * ALLOC_SLAB_BYTES;
		given += d->node[i].capacity;
	}
	d->node[0].capacity += d->capacity - given;
}

static void sort_by_distance(struct dram *d, unsigned from)
{
	uint8_t *o = d->node[from].order;
	const uint8_t *far = d->host.distance[from];

	o[0] = (uint8_t)from;
	for (unsigned i = 0, n = 1; i < d->nodes; i++) {
		unsigned at = n;

		if (i == from)
			continue;
		for (; at > 1 && far[o[at - 1]] > far[i]; at--)
			o[at] = o[at - 1];
		o[at] = (uint8_t)i;
		n++;
	}
}

int dram_nodes(struct dram *d, const struct tier_cfg *cfg, char *err, size_t errsize)
{
	if (cfg->node > 0 && !known(cfg, cfg->node)) {
		snprintf(err, errsize, "dram node: %d is not a memory node of this host (highest is %d)",
			 cfg->node, highest(cfg));
		return -EINVAL;
	}
	if (cfg->nodes)
		d->host = *cfg->nodes;
	d->mode = cfg->node;
	d->nodes = 1;
	if (d->mode == TIER_NODE_CLIENT && d->host.n > 1)
		d->nodes = d->host.n;
	divide(d);
	for (unsigned i = 0; i < d->nodes; i++) {
		d->node[i].id = d->nodes > 1 ? d->host.id[i] : MAX(d->mode, -1);
		sort_by_distance(d, i);
	}
	return 0;
}

static uint64_t room_on(const struct dram_node *n)
{
	return n->capacity - MIN(n->capacity, n->used + n->stranded);
}

void dram_place_seg(struct dram *d, const struct seg *s, uint32_t node)
{
	int id = d->node[node].id, r = 0;

	if (id >= 0)
		r = d->host.near ? d->host.near(s->addr, s->size, id) : place_near(s->addr, s->size, id);
	else if (d->mode == TIER_NODE_SPREAD && d->host.n > 1)
		r = place_spread(s->addr, s->size, d->host.id, d->host.n);
	if (r < 0 && !d->place_err)
		d->place_err = r;
}

void dram_order(const struct dram *d, uint8_t near, uint8_t *ret)
{
	uint32_t first = near && near <= d->nodes ? near - 1u : 0, n = 0;

	/* No wish: where there is most room. */
	for (uint32_t i = 1; (!near || near > d->nodes) && i < d->nodes; i++)
		if (room_on(&d->node[i]) > room_on(&d->node[first]))
			first = i;
	for (uint32_t late = 0; late < 2; late++)
		for (uint32_t i = 0; i < d->nodes; i++) {
			uint8_t node = d->node[first].order[i];

			if ((d->shun >> node & 1) == late)
				ret[n++] = node;
		}
}

uint32_t dram_node_of(const struct dram *d, const struct seg *s, uint64_t bytes)
{
	int id = d->nodes > 1 ? place_wish(s->addr) : -1;
	uint32_t best = 0;

	for (uint32_t i = 0; i < d->nodes; i++) {
		const struct dram_node *n = &d->node[i];

		if (n->id == id && n->mapped + bytes <= n->capacity)
			return i;
		/* Signed: a capacity that was divided otherwise may be exceeded. */
		if ((int64_t)(n->capacity - n->mapped) >
		    (int64_t)(d->node[best].capacity - d->node[best].mapped))
			best = i;
	}
	return best;
}

/* Interleaved memory takes equal parts of every node. */
static void spread_stat(const struct dram *d, struct tier_stat *ret)
{
	ret->nodes = d->host.n;
	for (uint32_t i = 0; i < ret->nodes; i++)
		ret->at[i] = (struct tier_node_stat){
			.id = d->host.id[i],
			.capacity = ret->capacity / ret->nodes,
			.used = ret->used / ret->nodes,
			.free = ret->free / ret->nodes,
			.resident = ret->resident / ret->nodes,
		};
}

void dram_node_stat(const struct dram *d, struct tier_stat *ret)
{
	ret->node = d->nodes > 1 ? -1 : d->node[0].id;
	ret->place_err = d->place_err;
	if (d->mode == TIER_NODE_SPREAD) {
		spread_stat(d, ret);
		return;
	}
	ret->nodes = d->nodes > 1 || d->node[0].id >= 0 || d->host.n == 1 ? d->nodes : 0;
	for (uint32_t i = 0; i < ret->nodes; i++) {
		const struct dram_node *n = &d->node[i];

		ret->at[i] = (struct tier_node_stat){
			.id = n->id < 0 ? d->host.id[0] : n->id,
			.capacity = n->capacity,
			.used = n->used,
			.free = room_on(n),
			.resident = n->warm,
			.fallbacks = n->fallbacks,
		};
	}
}
