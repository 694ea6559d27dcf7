/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The directory of one sequence's pages in published DRAM: a client's GPU reads
 * demoted rows where they lie, without a copy by the daemon. Published memory:
 * the daemon writes, the client reads.
 *
 * Reading takes no lock. When the bytes of a page that was listed so far may
 * change their meaning (freed, moved, cut), its entry is first withdrawn (place 0) or cut
 * (a lower limit), then `moved` rises, and only then the change happens. A reader
 *
 *   1. reads `moved` (acquire),
 *   2. reads `used`, entries and pages: `place` first (acquire), then what is
 *      behind it; all words whole,
 *   3. fences (acquire) and reads `moved` again: unchanged, all that it read was
 *      valid; changed, none of it is to be believed.
 *
 * Step 3 covers what was copied or computed from pages, not what will be read later
 * through a place noted before. `serial` rises after an entry was added, which
 * invalidates nothing; an entry whose `dead` gains bits, neither.
 *
 * What an entry does not say: whether its rows are in the device tier as well
 * (residency is inclusive), or already in another page (while pages are merged a
 * row lies in two; its bytes are the same). The reader knows what is resident and
 * takes each position once. Rows that a plan drops are dead once the daemon has
 * seen its acknowledgement; until then the reader knows better. Rows in private
 * or NVMe pages, and those for which there was no room (`full`), have no entry.
 *
 *   struct direct_hdr, struct direct_page[capacity]
 */
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define DIRECT_MAGIC 0x31524944u /* "DIR1" */
#define DIRECT_SPAN 32u

struct direct_hdr {
	uint32_t magic, capacity; /* entries that there is room for */
	_Atomic uint64_t moved;
	_Atomic uint64_t serial;
	_Atomic uint32_t used; /* entries [0, used) have been used at least once */
	_Atomic uint32_t full; /* 1: pages exist that have no entry because there was no room */
	uint64_t pad[12];
};
_Static_assert(sizeof(struct direct_hdr) == 128, "layout");

struct direct_page {
	_Atomic uint64_t place; /* segment number << 40 | offset of the K plane / 64, plus 1; 0: nothing here */
	uint64_t serial;        /* of the directory when it was added: entries with a higher one are new */
	uint32_t lane, first;   /* position of bit 0 */
	uint32_t limit;         /* rows at and past this position are dead; never rises */
	uint8_t rows, span;     /* rows of the page: bits in pos */
	uint16_t pad;
	uint32_t crc;     /* of K plane then V plane, as window_out.crc */
	uint32_t dead[4]; /* bit by packed row: dropped although the page is there */
	uint32_t pad2[3];
	uint64_t pos[DIRECT_SPAN];
};
_Static_assert(sizeof(struct direct_page) == 320, "layout");

static inline uint64_t direct_place(uint32_t segment, uint64_t off)
{
	return ((uint64_t)segment << 40 | off / 64) + 1;
}
static inline uint32_t direct_segment(uint64_t place)
{
	return (uint32_t)((place - 1) >> 40);
}
static inline uint64_t direct_off(uint64_t place)
{
	return ((place - 1) & ((UINT64_C(1) << 40) - 1)) * 64;
}
