/* SPDX-License-Identifier: MIT */
#pragma once
/* A page of a plan as the daemon, the client and its GPU kernels know it: for C and C++. See plan.h, window.h.
 */
#include <assert.h>
#include <stdint.h>

#define WINDOW_ALIGN 128u /* of every record, header and ring, in bytes; rings also in 4 KiB of the region */

/*
 * PLAN_F_WINDOW. A page to be gathered: the rows in [first, last) of copy_out that leave for this tier, that is
 * with a bit in to_dram (tier dram) or without (tier nvme), ascending.
 */
struct plan_page {
	uint64_t off; /* of its struct window_out from the out ring's start */
	uint64_t end; /* bytes of the ring that the pages up to and with this one take, what a wrap skips
			 included, of one page at most the ring */
	uint32_t first, last;
	uint16_t lane;
	uint8_t tier; /* enum kvtier_tier: dram or nvme */
	uint8_t rows; /* 1..128 */
	uint32_t pad;
};
static_assert(sizeof(struct plan_page) == 32, "half a cache line");

/* Written by the client's GPU before each page. */
struct window_out {
	uint64_t plan; /* plan_hdr.id */
	uint32_t page; /* index in the plan's list */
	uint32_t crc;  /* CRC32C of the K plane, then the V plane, initial value 0, not inverted */
	uint8_t pad[112];
};
static_assert(sizeof(struct window_out) == WINDOW_ALIGN, "one line of the GPU");
