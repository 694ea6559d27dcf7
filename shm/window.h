/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The exchange window of a sequence whose rows the daemon cannot reach (GPU
 * memory): two rings of bytes in the client's region. The client's GPU writes
 * pages into the out ring, the daemon writes pages into the in ring; nobody
 * reads what the other has not announced.
 *
 *   out  The plan lists its pages (plan.h, struct plan_page), each with its
 *        place in the ring, in the order in which they are to be written. A page is a
 *        struct window_out, then its K plane, then its V plane. Page i may be
 *        written once page_end(i) - page_end(taken - 1) <= out_bytes, ends counted as if
 *        the ring had no end (plan_page.end; 0 before the first page) and one page with what
 *        a wrap before it skips as the whole ring at most. Announced by
 *        seq_slot.gathered; given back by plan_hdr.taken, in order.
 *   in   A run of struct window_in, each followed by its bytes, back to back from
 *        the ring's start when the plan begins; a record that does not fit before
 *        the ring's end is preceded by WINDOW_WRAP and begins at its start. Announced by
 *        plan_hdr.staged; given back by seq_slot.drained, in order: counts of records.
 *
 * A plan that is cancelled leaves both rings empty for the next one; the client's
 * copies of the old plan must have ended before it announces anything of the new.
 * What lies in a ring is never trusted in place: the daemon copies a page, checks the
 * copy against window_out.crc and the plan's own list, and stores the copy.
 */
#include <stddef.h>
#include <stdint.h>
#include "shm/plan.h"
#include "shm/util.h"

#define WINDOW_SPAN PLAN_PAGE_SPAN
#define WINDOW_ROWS 128u /* of a page at most */

/*
 * Places in the region and bytes, multiples of 4 KiB: the out ring at least one page of 128 rows with its
 * header, the in ring two, so that what says "wrap" never lies under the record that it speaks of.
 */
struct window_place {
	uint64_t out_off, out_bytes, in_off, in_bytes;
};

#define WINDOW_WRAP UINT32_MAX /* window_in.bytes: the next record is at the ring's start */

/* Written by the daemon before each page that comes in. */
struct window_in {
	uint64_t plan;
	uint32_t bytes; /* this header and what follows, a multiple of WINDOW_ALIGN; or WINDOW_WRAP */
	uint32_t lane;
	uint32_t first;   /* position of bit 0 of pos and mask */
	uint16_t span;    /* words of pos and mask */
	uint8_t rows;     /* of the page: bits in pos */
	uint8_t wanted;   /* bits in mask, 1..rows */
	uint32_t segment; /* 0: the planes follow the header; else 1 + number of a published segment ... */
	uint32_t crc;     /* of both planes as window_out.crc */
	uint64_t off;     /* ... and the K plane's place in it */
	uint8_t pad[88];
	uint64_t pos[WINDOW_SPAN];  /* rows of the page, ascending */
	uint64_t mask[WINDOW_SPAN]; /* those that are to be brought in; the plan's bring_in, no row twice */
};
_Static_assert(sizeof(struct window_in) == 5 * WINDOW_ALIGN, "whole lines");
_Static_assert(offsetof(struct window_in, pos) == WINDOW_ALIGN, "layout");

/* Bytes of an out page in the ring. */
static inline uint64_t window_out_bytes(uint32_t rows, uint32_t row_bytes)
{
	return sizeof(struct window_out) + ALIGN_UP((uint64_t)rows * row_bytes, WINDOW_ALIGN);
}
/* Bytes of an in record whose planes, `bytes` together, follow it. */
static inline uint64_t window_in_bytes(uint64_t bytes)
{
	return sizeof(struct window_in) + ALIGN_UP(bytes, WINDOW_ALIGN);
}
/* A cursor word: how many of plan `id`'s pages or records. */
static inline uint64_t window_cursor(uint64_t id, uint32_t n)
{
	return id << 32 | n;
}
