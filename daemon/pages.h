/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Pages below the device tier: who they are, where their copies lie, who holds
 * them. A page is immutable; what changes is where its copies are and how many
 * sequences refer to it. Private memory, event-loop thread only; workers may
 * read the identity fields and the position bitmap of a pinned page.
 */
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include "ipc/kvtier.h"
#include "shm/bits.h"
#include "tiers/tier.h"

#define PAGE_ROWS 128u         /* rows of a page at most */
#define PAGE_SPAN 32u          /* words of its position bitmap at most: 2,048 positions */
#define PAGE_NOTE_LANE 0xffffu /* of a page that holds no rows but what a restart must know: note.c */

/* Whose rows they are: the part of the identity that many pages share. */
struct origin {
	uint8_t key[16];
	uint64_t tenant; /* stable hash of tenant and UID */
	uint32_t refs;   /* pages and sequences */
	uint32_t charge; /* tenant that pays, index in the page store */
};

struct recall_sum;
struct limbo;
struct page {
	uint64_t number;
	tier_addr addr[2]; /* dram, nvme; TIER_ADDR_NONE */
	struct origin *origin;
	uint32_t crc, bytes; /* payload */
	uint32_t first, epoch;
	uint32_t refs; /* sequences */
	uint16_t lane;
	uint16_t pins; /* reads and moves in flight: copies must stay */
	uint8_t rows, span;
	bool moving;                     /* a mover works on it: leave it alone */
	bool forgotten;                  /* no later life shall find its dram copy */
	bool summing;                    /* its summary is being made */
	uint32_t limbo;                  /* sources of its nvme copy wait for the seal: limbo.h; 0 none do */
	struct recall_sum *sum;          /* of the keys of its checked dram copy, or NULL */
	LIST_HEAD(, direct_link) listed; /* entries of its published dram copy in directories */
	uint64_t pos[];                  /* bit i: position first + i is in the page */
};

struct page_store {
	struct tier *tier[KVT_TIERS]; /* [0] NULL; NULL: no such tier */
	uint64_t next;                /* next page number */
	uint64_t *used[KVT_TIERS];    /* bytes charged, per tenant */
	uint64_t bytes;               /* of heap: pages, origins and the table below */
	uint64_t count;
	struct page **slot; /* pages with an nvme copy by number: open addressing, power of two */
	uint32_t slots, filled;
	struct limbo *limbo; /* NULL: no page waits for a seal */
	bool closing;        /* the index ends, what is on disk stays */
};

/* Heap bytes that an allocation of n really takes (glibc: 8 bytes of header, 16 byte granules). */
static inline uint64_t heap_bytes(uint64_t n)
{
	return n + 8 <= 32 ? 32 : (n + 8 + 15) & ~UINT64_C(15);
}
/* Bytes a page takes in a tier. */
static inline uint64_t page_room(uint32_t bytes)
{
	return ((uint64_t)bytes + 4095) & ~UINT64_C(4095);
}
static inline bool page_in(const struct page *p, int tier)
{
	return p->addr[tier - 1] != TIER_ADDR_NONE;
}
/* The position behind its last row. */
static inline uint32_t page_reach(const struct page *p)
{
	for (uint32_t w = p->span; w--;)
		if (p->pos[w])
			return p->first + w * 64 + 64 - (uint32_t)__builtin_clzll(p->pos[w]);
	return p->first;
}
static inline bool page_has(const struct page *p, uint32_t pos)
{
	return pos >= p->first && pos - p->first < p->span * 64u && bits_test(p->pos, pos - p->first);
}

int page_store_init(struct page_store *ps, uint32_t tenants); /* -ENOMEM */
/* Every page must be gone. */
void page_store_free(struct page_store *ps);

struct origin *origin_new(struct page_store *ps, const uint8_t key[16], uint64_t tenant, uint32_t charge);
struct origin *origin_ref(struct origin *o);
void origin_unref(struct page_store *ps, struct origin *o);

/*
 * A page without copies and references, its number drawn from the store. The
 * caller fills pos, rows and crc. NULL: out of memory.
 */
struct page *page_new(struct page_store *ps, struct origin *o, uint32_t lane, uint32_t first, uint32_t span);
void page_ident(const struct page *p, struct page_ident *ret);
/* A copy now lies at addr. -ENOMEM: the place is given back. / Its copy there is dead: its place is given back.
 */
int page_set_copy(struct page_store *ps, struct page *p, int tier, tier_addr addr);
void page_free_copy(struct page_store *ps, struct page *p, int tier);
/* The cleaner moved the copy. */
void page_move_copy(struct page *p, int tier, tier_addr addr);
/*
 * The page's dram bytes are right (checked, or just written by us) and this is what their keys are like: takes
 * sum, which ends with the dram copy. One that it has already stays.
 */
void page_set_sum(struct page_store *ps, struct page *p, struct recall_sum *sum);
void page_ref(struct page *p);
void page_unref(struct page_store *ps, struct page *p);
void page_pin(struct page *p);
void page_unpin(struct page_store *ps, struct page *p);
/* The page with this number that has an nvme copy, or NULL. */
struct page *page_find(const struct page_store *ps, uint64_t number);
