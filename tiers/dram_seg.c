/* SPDX-License-Identifier: MIT */
/*
 * The DRAM tier's segments: made when a pool's allocator runs out and given back when they hold no page. One
 * empty private segment is kept, so that a workload at the edge does not make and unmake it; published ones
 * are kept as long as a client may name them. Published segments start small and grow with their
 * owner, for what lies empty in them is of no use to anybody else.
 */
#include "tiers/dram.h"

#include <errno.h>
#include <numa.h>
#include <numaif.h>
#include <stdlib.h>
#include <string.h>

#include "shm/bits.h"
#include "shm/trial.h"

#define FIRST_SHARE 16u /* an owner's first segment is this part of a private one */

struct pool *dram_pool(struct dram *d, uint64_t owner)
{
	struct pool *p;

	if (!owner)
		return &d->private;
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
	p = calloc(1, sizeof(*p));
	if (!p)
		return NULL;
	p->owner = owner;
	alloc_init(&p->alloc);
	LIST_INSERT_HEAD(&d->pools, p, link);
	return p;
}

static void pool_end(struct pool *p)
{
	if (!p->owner || p->held || p->mapped)
		return;
	LIST_REMOVE(p, link);
	alloc_fini(&p->alloc);
	free(p);
}

/* ---- memory ------------------------------------------------------------------------ */

/*
 * Say where the segment's memory shall come from. Preferred rather than bound: a full node
 * must cost latency, not the daemon's life. Failure costs placement only, so it is not an error.
 */
static void place(const struct dram *d, const struct seg *s)
{
	if (numa_available() < 0)
		return;
	if (d->node >= 0) {
		struct bitmask *m = numa_allocate_nodemask();

		if (!m)
			return;
		numa_bitmask_setbit(m, (unsigned)d->node);
		mbind(s->addr, s->size, MPOL_PREFERRED, m->maskp, m->size + 1, 0);
		numa_free_nodemask(m);
	} else if (numa_num_configured_nodes() > 1) {
		mbind(s->addr, s->size, MPOL_INTERLEAVE, numa_all_nodes_ptr->maskp,
		      numa_all_nodes_ptr->size + 1, 0);
	}
}

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
	alloc_fini(&d->private.alloc);
	while ((p = LIST_FIRST(&d->pools))) {
		LIST_REMOVE(p, link);
		alloc_fini(&p->alloc);
		free(p);
	}
	pthread_mutex_destroy(&d->lock);
}

/* ---- what the host lends us ---------------------------------------------------------------- */

static uint32_t slabs_of(const struct dram_seg *s)
{
	return (uint32_t)(s->bytes / ALLOC_SLAB_BYTES);
}

void dram_warm_all(struct dram *d, struct dram_seg *s)
{
	d->warm += (slabs_of(s) - bits_rank(s->warm, slabs_of(s))) * ALLOC_SLAB_BYTES;
	bits_set_range(s->warm, 0, slabs_of(s));
}

uint64_t dram_left(const struct dram *d)
{
	uint64_t limit = MIN(d->limit, d->capacity), taken = d->private.alloc.st.used + d->published;

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
		d->warm += ALLOC_SLAB_BYTES;
	}
	return 0;
}

/* ---- segments ------------------------------------------------------------------------ */

static void give_back(struct dram *d, uint32_t i)
{
	struct dram_seg *s = &d->slot[i];
	struct pool *p = s->pool;

	if (alloc_remove(&p->alloc, i) < 0)
		return;
	p->mapped -= s->bytes;
	d->mapped -= s->bytes;
	if (p->owner)
		d->published -= s->bytes;
	s->pool = NULL;
	d->warm -= bits_rank(s->warm, slabs_of(s)) * ALLOC_SLAB_BYTES;
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

/* Bytes of the pool's next segment; 0: there is no room for one. */
static uint64_t next_size(struct dram *d, const struct pool *p, uint64_t room)
{
	uint64_t bytes = d->segment;
	uint32_t spare;

	if (p->owner) {
		bytes = MIN(bytes, MAX(p->mapped, MAX(slabs_in(bytes / FIRST_SHARE), ALLOC_SLAB_BYTES)));
		bytes = MIN(bytes, slabs_in(room));
		/* The empty one that is kept for private pages is worth less than this. */
		spare = alloc_next_empty(&d->private.alloc, 0);
		if (d->capacity - d->mapped < bytes && spare < d->private.alloc.top)
			give_back(d, spare);
		bytes = MIN(bytes, slabs_in(dram_left(d)));
	}
	return MIN(bytes, d->capacity - d->mapped);
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

int dram_seat(struct dram *d, struct pool *p, struct seg *s, struct dram_dir *dir, uint64_t bytes)
{
	uint32_t i = 0;
	uint64_t *warm;
	int r;

	while (i < DRAM_SLOTS && !vacant(&d->slot[i], p))
		i++;
	if (i == DRAM_SLOTS)
		return -ENOSPC;
	warm = calloc(BITS_WORDS(bytes / ALLOC_SLAB_BYTES), sizeof(*warm));
	r = warm ? alloc_add_at(&p->alloc, i, (uint32_t)(bytes / ALLOC_SLAB_BYTES)) : -ENOMEM;
	if (r < 0) {
		free(warm);
		return r;
	}
	place(d, s);
	d->slot[i].seg = *s;
	d->slot[i].bytes = bytes;
	d->slot[i].dir = *dir;
	d->slot[i].warm = warm;
	d->slot[i].holes = false;
	d->slot[i].pool = p;
	if (p->owner)
		d->slot[i].gen = (d->slot[i].gen + 1) & DRAM_LAST_GEN;
	d->top = MAX(d->top, i + 1);
	p->mapped += bytes;
	d->mapped += bytes;
	d->published += p->owner ? bytes : 0;
	return 0;
}

/* Add one segment of what is left of the capacity. -ENOSPC when nothing is, or none can be made. */
static int grow(struct dram *d, struct pool *p, uint64_t room)
{
	uint64_t bytes = next_size(d, p, room);
	struct dram_dir dir = {0};
	struct seg s = SEG_INIT;
	int r;

	if (!bytes)
		return -ENOSPC;
	r = make(d, p, bytes, &s);
	if (!r && !p->owner && d->keep)
		(void)dram_keep(d, &s, bytes, &dir); /* else it ends with us, as it would without */
	if (!r)
		r = dram_seat(d, p, &s, &dir, bytes);
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
	uint32_t i = 0;

	p->held = false;
	while ((i = alloc_next_empty(&p->alloc, i)) < p->alloc.top)
		give_back(d, i++);
	pool_end(p);
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

int dram_place(struct dram *d, struct pool *p, uint32_t bytes, uint64_t room, tier_addr *ret)
{
	uint64_t local;
	int r = p->owner || bytes <= dram_left(d) ? alloc_get(&p->alloc, bytes, false, &local) : -EDQUOT;

	if (r == -ENOSPC)
		r = alloc_get(&p->alloc, bytes, grow(d, p, room) < 0, &local);
	if (!r) {
		r = warm_up(d, &d->slot[alloc_addr_seg(local)], alloc_addr_off(local), bytes);
		if (r < 0)
			(void)alloc_put(&p->alloc, local, bytes);
	}
	if (r == -EDQUOT)
		r = -ENOSPC;
	if (r < 0) {
		pool_end(p);
		return r;
	}
	*ret = address(d, p, local);
	return 0;
}

int dram_put(struct dram *d, tier_addr addr, uint32_t bytes)
{
	uint64_t local;
	struct dram_seg *s = resolve(d, addr, &local);
	struct pool *p = s ? s->pool : NULL;
	int r = s ? alloc_check(&p->alloc, local, bytes) : -EINVAL;

	if (r < 0)
		return r;
	if (s->dir.id)
		dir_del(&s->dir, (uint32_t)local);
	r = alloc_put(&p->alloc, local, bytes);
	if (r <= 0)
		return r;
	if (p->owner ? !p->held : p->alloc.st.empty_segs > (d->limit == UINT64_MAX) && !d->scanning)
		give_back(d, alloc_addr_seg(local));
	pool_end(p);
	return 0;
}

void dram_remember(struct dram *d, const struct tier_io *io)
{
	struct alloc_place place;
	uint64_t local;
	struct dram_seg *s = io->seq && io->life == TIER_LONG ? resolve(d, io->addr, &local) : NULL;

	if (s && s->dir.id && !alloc_where(&s->pool->alloc, local, io->bytes, &place))
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
	uint32_t i = 0;

	while (d->private.alloc.st.empty_segs > 1 &&
	       (i = alloc_next_empty(&d->private.alloc, i)) < d->private.alloc.top)
		give_back(d, i++);
}

/* Free slabs of one segment that have memory. */
static void punch(struct dram *d, uint32_t i, uint64_t bytes)
{
	struct dram_seg *s = &d->slot[i];
	const struct alloc_seg *a = &s->pool->alloc.seg[i];
	uint64_t gone = 0;

	for (uint32_t w = 0; w < BITS_WORDS(slabs_of(s)); w++)
		for (uint64_t b = s->warm[w] & a->pool[w]; b && gone < bytes; b &= b - 1) {
			uint32_t slab = w * 64 + (uint32_t)__builtin_ctzll(b);

			if (seg_punch(&s->seg, slab * ALLOC_SLAB_BYTES, ALLOC_SLAB_BYTES) < 0)
				return;
			bits_clear(s->warm, slab);
			s->holes = true;
			d->warm -= ALLOC_SLAB_BYTES;
			gone += ALLOC_SLAB_BYTES;
		}
}

uint64_t dram_give(struct dram *d, uint64_t bytes)
{
	uint64_t before = d->warm;
	uint32_t i = 0;

	while (before - d->warm < bytes && (i = alloc_next_empty(&d->private.alloc, i)) < d->private.alloc.top)
		give_back(d, i++);
	for (i = 0; i < d->top && before - d->warm < bytes; i++)
		if (d->slot[i].pool == &d->private)
			punch(d, i, bytes - (before - d->warm));
	return before - d->warm;
}

void *dram_page(const struct dram *d, tier_addr addr, uint32_t bytes)
{
	uint64_t local;
	struct dram_seg *s = resolve(d, addr, &local);

	if (!s || alloc_check(&s->pool->alloc, local, bytes) < 0)
		return NULL;
	return (char *)s->seg.addr + alloc_addr_off(local);
}
