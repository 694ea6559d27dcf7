/* SPDX-License-Identifier: MIT */
/*
 * The DRAM tier's segments: made when a pool's allocator runs out and given back when they hold no page. One
 * empty private segment is kept, so that a workload at the edge does not make and unmake it; published ones
 * are kept as long as a client may name them. Published segments start small and grow with their
 * owner, for what lies empty in them is of no use to anybody else.
 */
#include "tiers/dram.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "shm/bits.h"
#include "shm/trial.h"

#define FIRST_SHARE 16u /* an owner's first segment is this part of a private one */

static struct alloc *alloc_of(const struct dram_seg *s)
{
	return &s->pool->alloc[s->node];
}

/* ---- memory ------------------------------------------------------------------------ */

/* The reaper: unmap until there is nothing left. */
static void *reap_run(void *arg)
{
	struct dram *d = arg;
	struct dead_seg *s;

	pthread_mutex_lock(&d->lock);
	while ((s = d->dead)) {
		d->dead = s->next;
		pthread_mutex_unlock(&d->lock);
		seg_close(&s->seg);
		free(s);
		pthread_mutex_lock(&d->lock);
	}
	d->reaping = false;
	pthread_mutex_unlock(&d->lock);
	return NULL;
}

static void reaper_join(struct dram *d)
{
	if (d->started)
		pthread_join(d->reaper, NULL);
	d->started = false;
}

/* Its memory goes back to the kernel, soon. */
static void unmap(struct dram *d, struct seg *s)
{
	struct dead_seg *dead = malloc(sizeof(*dead));
	bool start;

	if (!dead) {
		seg_close(s);
		return;
	}
	dead->seg = *s;
	*s = (struct seg)SEG_INIT;
	pthread_mutex_lock(&d->lock);
	dead->next = d->dead;
	d->dead = dead;
	start = !d->reaping;
	d->reaping = true;
	pthread_mutex_unlock(&d->lock);
	if (!start)
		return;
	reaper_join(d); /* the last one has nothing left to do */
	d->started = !pthread_create(&d->reaper, NULL, reap_run, d);
	if (!d->started)
		reap_run(d);
}

void dram_unmap(struct dram *d)
{
	struct pool *p;

	reaper_join(d);
	for (uint32_t i = 0; d->slot && i < d->top; i++)
		if (d->slot[i].pool) {
			seg_close(&d->slot[i].seg);
			dir_free(&d->slot[i].dir);
			free(d->slot[i].warm);
		}
	dram_pool_fini(d, d->private);
	while ((p = LIST_FIRST(&d->pools))) {
		LIST_REMOVE(p, link);
		dram_pool_fini(d, p);
		free(p);
	}
	pthread_mutex_destroy(&d->lock);
}

/* ---- what the host lends us ---------------------------------------------------------------- */

static uint32_t slabs_of(const struct dram_seg *s)
{
	return (uint32_t)(s->bytes / ALLOC_SLAB_BYTES);
}

/* So many more of its slabs may have memory behind them. */
static void warmer(struct dram *d, const struct dram_seg *s, int64_t slabs)
{
	d->warm += (uint64_t)slabs * ALLOC_SLAB_BYTES;
	d->node[s->node].warm += (uint64_t)slabs * ALLOC_SLAB_BYTES;
}

void dram_warm_all(struct dram *d, struct dram_seg *s)
{
	warmer(d, s, (int64_t)(slabs_of(s) - bits_rank(s->warm, slabs_of(s))));
	bits_set_range(s->warm, 0, slabs_of(s));
}

uint64_t dram_left(const struct dram *d)
{
	uint64_t limit = MIN(d->limit, d->capacity), taken = d->published;

	for (uint32_t n = 0; n < d->nodes; n++)
		taken += d->private->alloc[n].st.used;

	return limit - MIN(limit, taken);
}

/*
 * A page comes to lie here. A hole in huge pages is filled first, for the host may have none left, which would
 * be SIGBUS later. 0, -ENOSPC.
 */
static int warm_up(struct dram *d, struct dram_seg *s, uint64_t off, uint32_t bytes)
{
	for (uint64_t i = off / ALLOC_SLAB_BYTES; i <= (off + bytes - 1) / ALLOC_SLAB_BYTES; i++) {
		if (bits_test(s->warm, i))
			continue;
		if (s->holes && s->seg.huge && seg_commit(&s->seg, i * ALLOC_SLAB_BYTES, ALLOC_SLAB_BYTES) < 0)
			return -ENOSPC;
		bits_set(s->warm, i);
		warmer(d, s, 1);
	}
	return 0;
}

/* ---- segments ------------------------------------------------------------------------ */

uint64_t dram_warm(const struct dram_seg *s)
{
	return bits_rank(s->warm, slabs_of(s)) * ALLOC_SLAB_BYTES;
}

void dram_give_back(struct dram *d, uint32_t i)
{
	struct dram_seg *s = &d->slot[i];
	struct pool *p = s->pool;

	if (alloc_remove(alloc_of(s), i) < 0)
		return;
	p->mapped -= s->bytes;
	d->mapped -= s->bytes;
	d->node[s->node].mapped -= s->bytes;
	if (p->owner)
		d->published -= s->bytes;
	if (s->revoked_ns)
		p->revoked -= s->bytes;
	s->revoked_ns = 0;
	s->pool = NULL;
	warmer(d, s, -(int64_t)bits_rank(s->warm, slabs_of(s)));
	free(s->warm);
	s->warm = NULL;
	dram_unkeep(d, &s->dir);
	dir_free(&s->dir);
	unmap(d, &s->seg);
	while (d->top && !d->slot[d->top - 1].pool)
		d->top--;
}

static uint64_t slabs_in(uint64_t bytes)
{
	return bytes / ALLOC_SLAB_BYTES * ALLOC_SLAB_BYTES;
}

/* Capacity of the node that no segment takes. */
static uint64_t unmapped(const struct dram *d, uint32_t node)
{
	const struct dram_node *n = &d->node[node];

	return MIN(n->capacity - MIN(n->capacity, n->mapped), d->capacity - d->mapped);
}

/* Bytes of the pool's next segment there; 0: there is no room for one. */
static uint64_t next_size(struct dram *d, const struct pool *p, uint32_t node, uint64_t room)
{
	uint64_t bytes = d->segment;
	uint32_t spare;

	if (p->owner) {
		bytes = MIN(bytes, MAX(p->mapped, MAX(slabs_in(bytes / FIRST_SHARE), ALLOC_SLAB_BYTES)));
		bytes = MIN(bytes, slabs_in(room));
		/* The empty one that is kept for private pages is worth less than this. */
		spare = dram_next_empty(d->private, node, 0);
		if (unmapped(d, node) < bytes && spare < DRAM_SLOTS)
			dram_give_back(d, spare);
		bytes = MIN(bytes, slabs_in(dram_left(d)));
	}
	return MIN(bytes, unmapped(d, node));
}

static int make(const struct dram *d, const struct pool *p, uint64_t bytes, struct seg *ret)
{
	unsigned flags = d->no_huge ? 0 : SEG_F_HUGE;

	if (p->owner)
		return seg_create(ret, SEG_PUBLISHED, "kvtier-direct", bytes, flags);
	return seg_create(ret, SEG_PRIVATE, "kvtier-dram", bytes + (d->keep ? dir_bytes(bytes) : 0), flags);
}

/*
 * Free, and for a published segment with a number that no other had: a client may still name the first one. A
 * slot whose numbers are used up takes private ones.
 */
static bool vacant(const struct dram_seg *s, const struct pool *p)
{
	return !s->pool && (!p->owner || s->gen < DRAM_LAST_GEN || planted("segment-number-returns"));
}

int dram_seat(struct dram *d, struct pool *p, struct seg *s, struct dram_dir *dir, uint64_t bytes,
	      uint32_t node)
{
	uint32_t i = 0;
	uint64_t *warm;
	int r;

	while (i < DRAM_SLOTS && !vacant(&d->slot[i], p))
		i++;
	if (i == DRAM_SLOTS)
		return -ENOSPC;
	warm = calloc(BITS_WORDS(bytes / ALLOC_SLAB_BYTES), sizeof(*warm));
	r = warm ? alloc_add_at(&p->alloc[node], i, (uint32_t)(bytes / ALLOC_SLAB_BYTES)) : -ENOMEM;
	if (r < 0) {
		free(warm);
		return r;
	}
	d->slot[i].seg = *s;
	d->slot[i].bytes = bytes;
	d->slot[i].dir = *dir;
	d->slot[i].node = (uint8_t)node;
	d->slot[i].warm = warm;
	d->slot[i].holes = false;
	d->slot[i].pool = p;
	if (p->owner)
		d->slot[i].gen = (d->slot[i].gen + 1) & DRAM_LAST_GEN;
	d->top = MAX(d->top, i + 1);
	p->mapped += bytes;
	d->mapped += bytes;
	d->node[node].mapped += bytes;
	d->published += p->owner ? bytes : 0;
	return 0;
}

/* Add one segment of what is left of the capacity. -ENOSPC when nothing is, or none can be made. */
static int grow(struct dram *d, struct pool *p, uint32_t node, uint64_t room)
{
	uint64_t bytes = next_size(d, p, node, room);
	struct dram_dir dir = {0};
	struct seg s = SEG_INIT;
	int r;

	if (!bytes)
		return -ENOSPC;
	r = make(d, p, bytes, &s);
	if (!r)
		dram_place_seg(d, &s, node);
	if (!r && !p->owner && d->keep)
		(void)dram_keep(d, &s, bytes, &dir); /* else it ends with us, as it would without */
	if (!r)
		r = dram_seat(d, p, &s, &dir, bytes, node);
	if (!r)
		return 0;
	dram_unkeep(d, &dir);
	dir_free(&dir);
	seg_close(&s);
	d->grow_err = -r;
	d->st.errors++;
	return -ENOSPC;
}

void dram_pool_release(struct dram *d, struct pool *p)
{
	p->held = false;
	for (uint32_t n = 0; n < d->nodes; n++)
		for (uint32_t i = 0; (i = dram_next_empty(p, n, i)) < DRAM_SLOTS; i++)
			if (!d->slot[i].revoked_ns) /* else when nobody has it */
				dram_give_back(d, i);
	dram_pool_end(d, p);
}

/* ---- places -------------------------------------------------------------------------- */

/* The allocator knows slots; a published address says which segment of the slot it means. */
static tier_addr address(const struct dram *d, const struct pool *p, uint64_t local)
{
	uint64_t gen = d->slot[alloc_addr_seg(local)].gen;

	return p->owner ? TIER_ADDR_PUBLISHED | gen << (32 + DRAM_SLOT_BITS) | local : local;
}

/* Its slot, and what the allocator calls it; NULL: no such segment. */
static struct dram_seg *resolve(const struct dram *d, tier_addr addr, uint64_t *ret)
{
	uint32_t i = alloc_addr_seg(addr) % DRAM_SLOTS;
	struct dram_seg *s = &d->slot[i];
	uint64_t local = (uint64_t)i << 32 | (uint32_t)addr;

	if (i >= d->top || !s->pool || address(d, s->pool, local) != addr)
		return NULL;
	*ret = local;
	return s;
}

/* What pages take of the node changed by what the allocator says now, `was` before. */
static void node_took(struct dram *d, uint32_t node, const struct alloc *a, const struct alloc_stat *was)
{
	d->node[node].used += a->st.used - was->used;
	d->node[node].stranded += a->st.stranded - was->stranded;
}

/* A place on that node; borrowed: one that is too large, when there is no other. */
static int place_on(struct dram *d, struct pool *p, uint32_t node, uint32_t bytes, uint64_t room, bool borrow,
		    uint64_t *ret)
{
	struct alloc *a = &p->alloc[node];
	struct alloc_stat was = a->st;
	int r = alloc_get(a, bytes, borrow, ret);

	if (r == -ENOSPC && !borrow && !grow(d, p, node, room))
		r = alloc_get(a, bytes, false, ret);
	if (!r) {
		r = warm_up(d, &d->slot[alloc_addr_seg(*ret)], alloc_addr_off(*ret), bytes);
		if (r < 0)
			(void)alloc_put(a, *ret, bytes);
	}
	node_took(d, node, a, &was);
	return r;
}

int dram_place(struct dram *d, struct pool *p, uint32_t bytes, uint64_t room, uint8_t near, tier_addr *ret)
{
	int r = (p->owner ? !p->revoked : bytes <= dram_left(d)) ? -EAGAIN : -ENOSPC;
	uint8_t order[TIER_NODES];
	uint64_t local;
	uint32_t i = 0;

	if (r == -EAGAIN) {
		dram_order(d, near, order);
		for (; i < 2 * d->nodes; i++) {
			r = place_on(d, p, order[i % d->nodes], bytes, room, i >= d->nodes, &local);
			if (r != -ENOSPC)
				break;
		}
	}
	if (r < 0) {
		dram_pool_end(d, p);
		return r;
	}
	if (near && near <= d->nodes && order[i % d->nodes] != near - 1)
		d->node[near - 1].fallbacks++;
	*ret = address(d, p, local);
	return 0;
}

int dram_restore(struct dram *d, uint32_t slot, uint32_t unit, uint32_t bytes, const struct alloc_place *p)
{
	struct dram_seg *s = &d->slot[slot];
	struct alloc_stat was = alloc_of(s)->st;
	int r = alloc_restore(alloc_of(s), (uint64_t)slot << 32 | unit, bytes, p);

	node_took(d, s->node, alloc_of(s), &was);
	return r;
}

int dram_where(const struct dram *d, tier_addr addr)
{
	uint64_t local;
	const struct dram_seg *s = d->nodes > 1 ? resolve(d, addr, &local) : NULL;

	return s ? s->node : -1;
}

int dram_put(struct dram *d, tier_addr addr, uint32_t bytes)
{
	uint64_t local;
	struct dram_seg *s = resolve(d, addr, &local);
	struct pool *p = s ? s->pool : NULL;
	struct alloc *a = s ? alloc_of(s) : NULL;
	int r = s ? alloc_check(a, local, bytes) : -EINVAL;
	struct alloc_stat was;

	if (r < 0)
		return r;
	if (s->dir.id)
		dir_del(&s->dir, (uint32_t)local);
	was = a->st;
	r = alloc_put(a, local, bytes);
	node_took(d, s->node, a, &was);
	if (r <= 0)
		return r;
	if (p->owner ? !p->held && !s->revoked_ns : a->st.empty_segs > (d->limit == UINT64_MAX) && !d->scanning)
		dram_give_back(d, alloc_addr_seg(local));
	dram_pool_end(d, p);
	return 0;
}

void dram_remember(struct dram *d, const struct tier_io *io)
{
	struct alloc_place place;
	uint64_t local;
	struct dram_seg *s = io->seq && io->life == TIER_LONG ? resolve(d, io->addr, &local) : NULL;

	if (s && s->dir.id && !alloc_where(alloc_of(s), local, io->bytes, &place))
		dir_put(&s->dir, (uint32_t)local, &place, &io->meta, io->seq);
}

void dram_forget(struct dram *d, tier_addr addr)
{
	uint64_t local;
	struct dram_seg *s = resolve(d, addr, &local);

	if (s && s->dir.id)
		dir_del(&s->dir, (uint32_t)local);
}

void dram_trim(struct dram *d)
{
	for (uint32_t n = 0; n < d->nodes; n++)
		for (uint32_t i = 0; d->private->alloc[n].st.empty_segs > 1 &&
				     (i = dram_next_empty(d->private, n, i)) < DRAM_SLOTS;
		     i++)
			dram_give_back(d, i);
}

/* Free slabs of one segment that have memory. */
static void punch(struct dram *d, uint32_t i, uint64_t bytes)
{
	struct dram_seg *s = &d->slot[i];
	const struct alloc_seg *a = &alloc_of(s)->seg[i];
	uint64_t gone = 0;

	for (uint32_t w = 0; w < BITS_WORDS(slabs_of(s)); w++)
		for (uint64_t b = s->warm[w] & a->pool[w]; b && gone < bytes; b &= b - 1) {
			uint32_t slab = w * 64 + (uint32_t)__builtin_ctzll(b);

			if (seg_punch(&s->seg, slab * ALLOC_SLAB_BYTES, ALLOC_SLAB_BYTES) < 0)
				return;
			bits_clear(s->warm, slab);
			s->holes = true;
			warmer(d, s, -1);
			gone += ALLOC_SLAB_BYTES;
		}
}

uint64_t dram_give(struct dram *d, uint64_t bytes)
{
	uint64_t before = d->warm;

	for (uint32_t n = 0; n < d->nodes; n++)
		for (uint32_t i = 0;
		     before - d->warm < bytes && (i = dram_next_empty(d->private, n, i)) < DRAM_SLOTS; i++)
			dram_give_back(d, i);
	for (uint32_t i = 0; i < d->top && before - d->warm < bytes; i++)
		if (d->slot[i].pool == d->private)
			punch(d, i, bytes - (before - d->warm));
	return before - d->warm;
}

void *dram_page(const struct dram *d, tier_addr addr, uint32_t bytes)
{
	uint64_t local;
	struct dram_seg *s = resolve(d, addr, &local);

	if (!s || alloc_check(alloc_of(s), local, bytes) < 0)
		return NULL;
	return (char *)s->seg.addr + alloc_addr_off(local);
}
