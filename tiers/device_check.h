/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What every device backend asks of a lane before it touches a byte. Layouts and slots come from a client:
 * all of it is 64-bit arithmetic that cannot wrap. Pure, any thread.
 */
#include "tiers/device.h"

/* One plane of a lane that fits its memory. Width 0: a plane without rows, any slot will do. */
struct device_plane {
	uint64_t off; /* of slot 0 */
	uint32_t stride, width;
	uint64_t slots; /* slots below this lie inside the memory */
};

/*
 * Both planes of a lane in `size` bytes of memory, for pages of `rows` rows. 0, or -ERANGE: slot 0 lies
 * outside, a stride is less than a row, or a page would exceed TIER_MAX_PAGE.
 */
int device_planes(struct device_plane ret[2], uint64_t size, const struct device_lane *l, uint32_t rows);
/* n > 0 slots: 0, -EINVAL (not strictly ascending) or -ERANGE (outside the memory). */
int device_slots(const struct device_plane p[2], const uint32_t *slots, uint32_t n);
/* Slots [first, first + n), n > 0, from rows of a page of `rows` rows: 0 or -ERANGE. pick may be NULL. */
int device_range(const struct device_plane p[2], uint32_t rows, const uint32_t *pick, uint32_t first,
		 uint32_t n);
/* Slots (or picks) that follow v[0] without a gap, itself included; n > 0. */
uint32_t device_run(const uint32_t *v, uint32_t n);
