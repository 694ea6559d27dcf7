/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Single-producer single-consumer ring of 64-byte entries between two
 * processes that do not trust each other. The shared part holds only two
 * cursors, a sleep flag and the entries; size, mask and our own cursor live in
 * private memory. Each side copies an entry once and validates the copy.
 * An impossible peer cursor is -EPROTO: the caller ends that peer.
 *
 * Wake-up: a consumer calls ring_sleep() before every sleep; only then does the
 * producer's push return 1, meaning "write the peer's eventfd now", and it does
 * so once per sleep: that push takes the flag down. A busy pair makes no system
 * call.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ring_entry {
	uint32_t type; /* enum q_type */
	uint32_t flags;
	uint64_t handle;
	uint64_t arg[6];
};
_Static_assert(sizeof(struct ring_entry) == 64, "one cache line per entry");

struct ring_shared; /* layout in ring.c; offsets asserted there */

struct ring {
	struct ring_shared *sh;
	uint32_t entries; /* power of two */
	uint32_t pos;     /* our own cursor, never read back from shared memory */
	uint32_t peer;    /* last valid value seen of the peer's cursor */
	bool producer;
};

/* Bytes of shared memory for a ring of `entries` (a power of two, 2..65536); 0 if invalid. */
size_t ring_bytes(uint32_t entries);
/* Attach. `mem` is 64-byte aligned and zero when the ring is fresh. Both cursors start at 0. -EINVAL. */
int ring_attach(struct ring *ret, void *mem, uint32_t entries, bool producer);
/* Producer: 0 pushed, 1 pushed and the consumer sleeps, -EAGAIN full, -EPROTO impossible cursor. */
int ring_push(struct ring *r, const struct ring_entry *e);
/* Consumer: 1 popped into *ret, 0 empty, -EPROTO impossible cursor. */
int ring_pop(struct ring *r, struct ring_entry *ret);
/* Consumer: announce sleep. true: safe to sleep; false: entries arrived, flag withdrawn. */
bool ring_sleep(struct ring *r);
/* Consumer: awake again (withdraw the flag). */
void ring_awake(struct ring *r);
