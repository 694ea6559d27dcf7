/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The faults of the fault tier. They are asked for by text: "seed=7,flip=3,delay_us=500". Rates are in
 * 1/1000 of the operations of that kind, 0 to 1000. Whether an operation is hit
 * depends on the seed and on its number alone, so a run can be repeated. sector=512 or sector=4096 is
 * what a torn write is torn into. mib_s=N makes the device slow.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum fault_kind {
	FAULT_WRITE_EIO, /* the write fails with -EIO, nothing is stored */
	FAULT_READ_EIO,  /* the read fails with -EIO */
	FAULT_FLIP,      /* the read returns one bit inverted; the stored page is sound */
	FAULT_TORN,      /* the write succeeds, its last sectors are garbage */
	FAULT_LOST,      /* the write succeeds, the page holds garbage */
	FAULT_MISDIRECT, /* the read returns another page's bytes */
	FAULT_ENOSPC,    /* prepare of a write finds no place */
	FAULT_REORDER,   /* the write succeeds, but lands before what was written to the same place before it */
	FAULT_KINDS,
};

#define FAULT_DELAY_MAX 10000000u /* us */
#define FAULT_MIB_S_MAX 1000000u

struct fault_spec {
	uint64_t seed;
	uint32_t delay_us; /* every completion comes at least this much later */
	uint32_t mib_s; /* 0, or what one queue for reads and writes carries: each waits behind all before it */
	uint32_t sector; /* bytes that a device writes whole: 512 or 4096 */
	uint16_t permille[FAULT_KINDS];
};

/* Key in the text, e.g. "write_eio". */
const char *fault_name(enum fault_kind k);
/*
 * Read a spec; NULL or "" injects nothing. *ret on success only. -EINVAL with one line in err that
 * names key, value and limit.
 */
int fault_parse(struct fault_spec *ret, const char *text, char *err, size_t errsize);
/* Would operation `op` be hit by fault `k`? Pure. */
bool fault_hits(const struct fault_spec *s, uint64_t op, enum fault_kind k);
/* A number for how operation `op` is hit by `k`: which bit, how many sectors, the seed of the garbage. */
uint64_t fault_random(const struct fault_spec *s, uint64_t op, enum fault_kind k);

#define FAULT_STASH 16u

/* The faults at work: what to do, what was done. Zero it and set spec. One thread. */
struct fault_inject {
	struct fault_spec spec;
	uint64_t count[FAULT_KINDS]; /* faults that really happened */
	struct fault_page {          /* pages written lately, for misdirected reads and late writes */
		void *buf;           /* owned */
		uint64_t addr;
		uint32_t bytes;
	} stash[FAULT_STASH];
	uint64_t stashed;
};

void fault_inject_fini(struct fault_inject *f);
/* Is `op` hit by `k`? Counts it: for faults that need no more than to be reported. */
bool fault_now(struct fault_inject *f, uint64_t op, enum fault_kind k);
/* Put into dst what operation `op` stores of src at addr: the same, or torn, or lost, or overwritten by an
 * older write. */
void fault_spoil_write(struct fault_inject *f, uint64_t op, uint64_t addr, void *dst, const void *src,
		       uint32_t bytes);
/* Turn what operation `op` read at addr into what it returns: the same, misdirected, with a bit flipped. */
void fault_spoil_read(struct fault_inject *f, uint64_t op, uint64_t addr, void *buf, uint32_t bytes);
/* A page was written: later reads may be led to it, and later writes to its place may lose against it. */
void fault_remember(struct fault_inject *f, uint64_t addr, const void *buf, uint32_t bytes);
