/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The feed: one host-wide broadcast ring of decisions and moves in published
 * memory. One writer (the event loop), any number of readers, lossy: a reader
 * that is lapped learns how many entries it lost from the sequence numbers.
 */
#include <stddef.h>
#include <stdint.h>

enum feed_type {
	FEED_NONE = 0,
	FEED_SEQ_OPEN,
	FEED_SEQ_CLOSE,
	FEED_PLAN, /* rows = kept, rows2 = out, rows3 = in, rows4 = drop */
	FEED_READY,
	FEED_ACK,
	FEED_CANCEL,
	FEED_MOVE, /* from -> to, rows, bytes */
	FEED_DROP,
	FEED_MISS,     /* plan = errno, rows = lost, bytes */
	FEED_CLIENT,   /* plan = client, bytes = 1 connected, 0 left */
	FEED_ADMIN,    /* a mutation by kvtierctl */
	FEED_PRESSURE, /* plan = 1: dram may hold `bytes`; 0: `bytes` were given back, rows = dropped */
	FEED_TYPES
};

struct feed_event {
	uint64_t time_ns; /* CLOCK_REALTIME */
	uint64_t seq;     /* sequence handle, 0 when it is about none */
	uint64_t plan;    /* plan id or argument */
	uint64_t bytes;
	uint32_t rows[4];
	uint8_t type, from, to, lane_lo; /* enum feed_type; tier numbers; low bits of the lane */
	uint32_t client;
};
_Static_assert(sizeof(struct feed_event) == 56, "56 bytes plus the sequence word fill a line");

struct feed;
size_t feed_bytes(uint32_t entries); /* power of two, 2..2^24; 0 if invalid */
/* Writer: initialise over zeroed, 64-byte aligned memory and write. Private state in *ret. -EINVAL. */
struct feed_writer {
	void *mem;
	uint32_t entries;
	uint64_t next;
};
int feed_writer_init(struct feed_writer *ret, void *mem, uint32_t entries);
void feed_write(struct feed_writer *w, const struct feed_event *e);
/* Reader: starts at the oldest entry still there (from_start) or at the next one. -EPROTO: no feed of `bytes`.
 */
struct feed_reader {
	const void *mem;
	uint32_t entries;
	uint64_t next;
};
int feed_reader_init(struct feed_reader *ret, const void *mem, size_t bytes, int from_start);
/*
 * 1 copied into *ret, 0 nothing new (or lapped many times in a row: call again).
 * *lost grows by the entries overwritten before they were read; lost may be NULL.
 */
int feed_read(struct feed_reader *r, struct feed_event *ret, uint64_t *lost);
