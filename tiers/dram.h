/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Inside the DRAM tier. Pages lie in pools: one is private, the others are published and belong to one owner
 * each. A pool has its own segments and its own allocator, so two owners never share a segment; all pools
 * share the capacity. Segments belong to one node of the host's memory each, and a pool has an allocator for
 * each node; where nodes are not told apart there is one. Segments have one numbering: that of the slots in
 * `seg`, for published ones with a generation above it, so that no number comes back: a slot whose generations
 * are used up takes private ones.
 *
 * Everything on the tier's owner thread, except that a thread of its own unmaps segments.
 */
#include "tiers/alloc.h"
#include "tiers/dram_dir.h"
#include "tiers/tier.h"
#include "shm/seg.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#define DRAM_SLOTS ALLOC_MAX_SEGS
#define DRAM_SLOT_BITS 12
#define DRAM_LAST_GEN ((1u << DRAM_SLOT_BITS) - 1)
_Static_assert(TIER_SEGMENT_GRAIN == ALLOC_SLAB_BYTES, "segments are whole slabs");
_Static_assert(DRAM_SLOTS == 1u << DRAM_SLOT_BITS, "a number is a slot and 12 bits of generation");

struct pool {
	LIST_ENTRY(pool) link;
	uint64_t owner;       /* 0: private */
	uint64_t mapped;      /* bytes of its segments */
	uint64_t revoked;     /* of that, of segments that are to go */
	bool held;            /* clients may name its segments: empty ones stay */
	struct alloc alloc[]; /* [nodes] */
};

struct dram_node {
	int id;                                          /* the kernel's number; -1: no node in particular */
	uint64_t capacity, mapped, used, stranded, warm; /* bytes; of all pools */
	uint64_t fallbacks;
	uint8_t order[TIER_NODES]; /* itself, then the others by distance */
};

struct dram_seg {
	struct seg seg;
	uint64_t bytes;      /* of pages; a directory may follow */
	struct dram_dir dir; /* of a private segment that outlives us; id 0: it does not */
	struct pool *pool;   /* NULL: free slot */
	uint8_t node;        /* index */
	uint64_t *warm;      /* slabs that may have memory behind them */
	bool holes;          /* some were given back to the host */
	uint64_t revoked_ns; /* published: it is to go, since then; 0: it is not */
	uint32_t gen;        /* of the published segment that is here, or was last; 12 bits */
};

struct dead_seg { /* to be unmapped */
	struct seg seg;
	struct dead_seg *next;
};

struct dram {
	struct tier tier;
	struct pool *private;
	LIST_HEAD(, pool) pools;            /* published */
	struct dram_seg *slot;              /* [DRAM_SLOTS] */
	uint32_t top;                       /* used slots are all below */
	uint64_t capacity, segment, mapped; /* mapped: of all pools */
	uint64_t published;                 /* of that, of published ones */
	uint64_t limit;                     /* bytes that pages may take; UINT64_MAX: the capacity */
	uint64_t warm;                      /* bytes of slabs that may have memory behind them */
	int mode;                           /* cfg.node */
	struct tier_nodes host;
	struct dram_node node[TIER_NODES]; /* those that are told apart, or one for all */
	uint32_t nodes, shun, next_probe;
	int place_err; /* -errno of the first wish that the kernel refused */
	bool no_huge;
	const struct tier_keep *keep; /* NULL: memory ends with the process */
	bool scanning;                /* segments stay, empty or not */
	struct tier_io *head, **tail; /* finished, not yet reaped */
	struct tier_stat st;
	int grow_err;         /* why the last segment could not be made */
	pthread_mutex_t lock; /* for the two that follow */
	struct dead_seg *dead;
	bool reaping; /* somebody takes from `dead` until it is empty */
	pthread_t reaper;
	bool started; /* to be joined */
};

static inline struct dram *dram_of(struct tier *t)
{
	return container_of(t, struct dram, tier);
}

/* An empty one, in no list; NULL: out of memory. / Add what all its allocators say to ret. */
struct pool *dram_pool_make(const struct dram *d, uint64_t owner);
void dram_pool_stat(const struct dram *d, const struct pool *p, struct alloc_stat *ret);
/* Its allocators' memory. / It has no segment left and nobody holds it: it is gone. */
void dram_pool_fini(const struct dram *d, struct pool *p);
void dram_pool_end(const struct dram *d, struct pool *p);
/* The pool's first segment on the node, from slot i on, that holds no page; DRAM_SLOTS: none. */
uint32_t dram_next_empty(const struct pool *p, uint32_t node, uint32_t i);
/* The pool of an owner, or NULL. / The same, made when there is none; NULL: out of memory. */
struct pool *dram_pool(struct dram *d, uint64_t owner);
struct pool *dram_pool_get(struct dram *d, uint64_t owner);
/*
 * Find a place, in a new segment when it must be; new published ones take at most `room` bytes. near: as in
 * tier_io.
 */
int dram_place(struct dram *d, struct pool *p, uint32_t bytes, uint64_t room, uint8_t near, tier_addr *ret);
/* A place is free again. -EINVAL: it was not in use. */
int dram_put(struct dram *d, tier_addr addr, uint32_t bytes);
/* It is written: a later life may find it. / No later life shall. Where there is none nothing happens. */
void dram_remember(struct dram *d, const struct tier_io *io);
void dram_forget(struct dram *d, tier_addr addr);
/* Where a page of `bytes` at addr lies; NULL: there is none. */
void *dram_page(const struct dram *d, tier_addr addr, uint32_t bytes);
/* Nobody names the pool's segments any more. p is gone when it has none left. */
void dram_pool_release(struct dram *d, struct pool *p);
/* The segment takes a free slot, on that node. Takes seg and dir on success only. */
int dram_seat(struct dram *d, struct pool *p, struct seg *s, struct dram_dir *dir, uint64_t bytes,
	      uint32_t node);
/* A place that an earlier life used is in use again. 0, -EINVAL, -ENOMEM. */
int dram_restore(struct dram *d, uint32_t slot, uint32_t unit, uint32_t bytes, const struct alloc_place *p);
/* Index of the node of the page's segment; -1: none in particular. */
int dram_where(const struct dram *d, tier_addr addr);
/* Private segments without a page, but for one. */
void dram_trim(struct dram *d);
/* Free slabs of private segments, and all empty ones: up to about `bytes`. Returns how many went. */
uint64_t dram_give(struct dram *d, uint64_t bytes);
/* All of a segment's slabs may have memory behind them: an earlier life's. */
void dram_warm_all(struct dram *d, struct dram_seg *s);
/* Bytes that new private pages, or an owner's new segments, may still take under the limit. */
uint64_t dram_left(const struct dram *d);
/* End: unmap everything. What is kept stays kept. */
void dram_unmap(struct dram *d);

/* ---- dram_node.c: nodes of the host's memory ------------------------------------------------ */
/* Divide the capacity, which is set. 0, or -EINVAL with a line. */
int dram_nodes(struct dram *d, const struct tier_cfg *cfg, char *err, size_t errsize);
/* Say where the segment's memory shall come from. Failure costs placement only, so it is no error. */
void dram_place_seg(struct dram *d, const struct seg *s, uint32_t node);
/* The nodes in the order in which a page should be offered to them. ret[d->nodes]. */
void dram_order(const struct dram *d, uint8_t near, uint8_t *ret);
/* For a segment of an earlier life: where its memory was to come from, else where there is most room. */
uint32_t dram_node_of(const struct dram *d, const struct seg *s, uint64_t bytes);
void dram_node_stat(const struct dram *d, struct tier_stat *ret);

/* Unmap a segment that holds no page, and forget it. / Bytes of it that may have memory behind them. */
void dram_give_back(struct dram *d, uint32_t i);
uint64_t dram_warm(const struct dram_seg *s);

/* ---- dram_revoke.c: the ops of that name; see tier.h ------------------------------------------ */
uint64_t dram_revoke(struct tier *t, uint64_t bytes);
bool dram_revoked(struct tier *t, tier_addr addr);
uint64_t dram_reclaim(struct tier *t);
/* It is to go, and no page lies in it: nobody may have it any more. */
bool dram_vacated(const struct dram_seg *s, uint32_t i);
/* What was not given back may stay. */
void dram_revoke_end(struct dram *d);
/* Bytes of revoked segments, and of those whose time is over. p NULL: everybody's. */
void dram_revoke_stat(const struct dram *d, const struct pool *p, uint64_t *ret_all, uint64_t *ret_late);

/* ---- dram_keep.c: what outlives us -------------------------------------------------------- */
/* Hand a new segment over. 0 and its directory made, or not kept: -errno. */
int dram_keep(const struct dram *d, const struct seg *s, uint64_t bytes, struct dram_dir *ret);
/* It goes. */
void dram_unkeep(const struct dram *d, const struct dram_dir *dir);
/* Take over what earlier lives left. Refuses with a line each; -ENOMEM alone fails. */
int dram_adopt(struct dram *d);
int dram_scan(struct tier *t, tier_found_fn fn, void *arg);
