/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What the fault tier does, as text: "seed=7,flip=3,delay_us=500". Rates are in
 * 1/1000 of the operations of that kind, 0 to 1000. Whether an operation is hit
 * depends on the seed and on its number alone, so a run can be repeated.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum fault_kind {
	FAULT_WRITE_EIO, /* the write fails with -EIO, nothing is stored */
	FAULT_READ_EIO,  /* the read fails with -EIO */
	FAULT_FLIP,      /* the read returns one bit inverted; the stored page is sound */
	FAULT_TORN,      /* the write succeeds, its last 512-byte sectors are garbage */
	FAULT_LOST,      /* the write succeeds, the page holds garbage */
	FAULT_MISDIRECT, /* the read returns another page's bytes */
	FAULT_ENOSPC,    /* prepare of a write finds no place */
	FAULT_KINDS,
};

#define FAULT_DELAY_MAX 10000000u /* us */

struct fault_spec {
	uint64_t seed;
	uint32_t delay_us; /* every completion comes at least this much later */
	uint16_t permille[FAULT_KINDS];
};

/* Key in the text, e.g. "write_eio". */
const char *fault_name(enum fault_kind k);
/*
 * Read a spec; NULL or "" injects nothing. *ret on success only. -EINVAL with one line in err that
 * names key, value and limit.
 */
int fault_parse(struct fault_spec *ret, const char *text, char *err, size_t errsize);
/* Is operation `op` hit by fault `k`? */
bool fault_hits(const struct fault_spec *s, uint64_t op, enum fault_kind k);
/* A number for how operation `op` is hit by `k`: which bit, how many sectors, the seed of the garbage. */
uint64_t fault_random(const struct fault_spec *s, uint64_t op, enum fault_kind k);
