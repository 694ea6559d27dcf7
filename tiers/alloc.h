/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Places for pages inside segments. The allocator knows no memory: it hands
 * out addresses (segment, unit), and the tier that owns the segments turns them into
 * pointers.
 *
 * A segment is cut into slabs of 2 MiB (512 units of 4 KiB). A slab holds
 * pages of one size class, the class being the size in units; a class above 64 units
 * takes a run of up to four slabs where that wastes less. Free places are bits, two
 * levels deep, so that get and put touch a constant number of words. A slab
 * without pages goes back to the pool of every class.
 *
 * Bookkeeping costs 24 bytes per slab, and 64 more in segments that hold pages
 * under 8 units: at most 12 bytes per page when full.
 *
 * Not thread-safe: one owner thread.
 */
#include "shm/util.h"
#include <stdbool.h>
#include <stdint.h>

#define ALLOC_SLAB_UNITS 512u
#define ALLOC_SLAB_BYTES ((uint64_t)ALLOC_SLAB_UNITS * KVT_UNIT)
#define ALLOC_MAX_UNITS 256u /* largest page, 1 MiB */
#define ALLOC_MAX_SEGS 4096u
#define ALLOC_MAX_SLABS (1u << 20) /* a segment has fewer */

struct alloc_slab {
	uint64_t bits;       /* free places; under 8 units: which words of wide[] have one */
	uint32_t prev, next; /* slabs of this class with a free place */
	uint16_t units;      /* size class; 0: the slab is in the pool */
	uint16_t nfree;
	uint8_t run;     /* slabs in the run, in its head */
	uint8_t run_off; /* distance to the run's head */
};
_Static_assert(sizeof(struct alloc_slab) == 24, "bookkeeping per slab");

struct alloc_seg {
	struct alloc_slab *slab; /* owned; NULL: no such segment */
	uint64_t *pool;          /* bit set: the slab is in the pool. Behind slab[], same allocation */
	uint64_t *wide;          /* owned; 8 words per slab, made when a small class first needs it */
	uint32_t slabs, pooled;
};

struct alloc_class {
	uint32_t head;  /* first slab with a free place */
	uint32_t slabs; /* slabs that belong to the class, runs counted whole */
	uint64_t pages; /* pages in use */
};

/* Bytes. capacity = used + free + stranded, and used = payload + padding. */
struct alloc_stat {
	uint64_t capacity;
	uint64_t used;     /* places in use, padding included */
	uint64_t payload;  /* what the callers asked for */
	uint64_t padding;  /* rest of the last unit, and of a borrowed place */
	uint64_t free;     /* pooled slabs and free places; not every size fits everywhere */
	uint64_t stranded; /* ends of slabs where no page of their class fits */
	uint64_t meta;     /* bookkeeping of this allocator */
	uint64_t pages;
	uint32_t segs, empty_segs;
};

struct alloc {
	struct alloc_seg *seg; /* owned; grows */
	struct alloc_class cls[ALLOC_MAX_UNITS + 1];
	uint64_t avail[ALLOC_MAX_SEGS / 64];        /* segments with a pooled slab */
	uint64_t partial[ALLOC_MAX_UNITS / 64 + 1]; /* classes with a free place */
	uint32_t top, room;   /* segments are all below top; seg[] has room for this many */
	struct alloc_stat st; /* kept current except `free` */
};

static inline uint32_t alloc_addr_seg(uint64_t addr)
{
	return (uint32_t)(addr >> 32);
}
/* Byte offset of the place inside its segment. */
static inline uint64_t alloc_addr_off(uint64_t addr)
{
	return (addr & UINT32_MAX) * KVT_UNIT;
}

/* Start empty. */
void alloc_init(struct alloc *a);
/* Forget everything, pages in use too. */
void alloc_fini(struct alloc *a);
/*
 * Add a segment of `slabs` slabs. Returns its number (lowest unused), or -EINVAL (0 slabs, or
 * ALLOC_MAX_SLABS and more), -ENOSPC (no number left), -ENOMEM.
 */
int alloc_add(struct alloc *a, uint32_t slabs);
/* The same with a number of the caller's choice, which is not in use. */
int alloc_add_at(struct alloc *a, uint32_t seg, uint32_t slabs);
/* Remove a segment without pages. 0, -EBUSY (pages in it), -EINVAL (no such segment). */
int alloc_remove(struct alloc *a, uint32_t seg);
/* Lowest segment from `seg` on that holds no page; a->top: there is none. */
uint32_t alloc_next_empty(const struct alloc *a, uint32_t seg);
/*
 * Find a place for `bytes`. With `borrow`, when the class has no place left, one of up to twice the
 * size is taken: better padding than eviction. *ret on success only. 0, -ENOSPC, -EINVAL (0 bytes or more than
 * 1 MiB), -ENOMEM.
 */
int alloc_get(struct alloc *a, uint32_t bytes, bool borrow, uint64_t *ret);
/*
 * Give a place back; `bytes` as in alloc_get. Returns 0, 1 when its segment is wholly empty now, or
 * -EINVAL when no such place is in use (never was, freed already, wrong size): nothing changed then.
 */
int alloc_put(struct alloc *a, uint64_t addr, uint32_t bytes);
/* 0 when addr is a place in use that can hold `bytes`, else -EINVAL. */
int alloc_check(const struct alloc *a, uint64_t addr, uint32_t bytes);
/* How a place was cut, so that a later life can cut it again. */
struct alloc_place {
	uint16_t units;  /* its class: what it really takes */
	uint8_t run;     /* slabs in its run */
	uint8_t run_off; /* slab of the run in which it begins */
};
/* Of a place in use; -EINVAL when it is none. */
int alloc_where(const struct alloc *a, uint64_t addr, uint32_t bytes, struct alloc_place *ret);
/*
 * Put the place in use again that alloc_where() described, in an allocator that has the segment. 0, -EINVAL (no
 * such place, another in its way, or in use), -ENOMEM. Nothing is believed: p may be garbage.
 */
int alloc_restore(struct alloc *a, uint64_t addr, uint32_t bytes, const struct alloc_place *p);
void alloc_stat(const struct alloc *a, struct alloc_stat *ret);
