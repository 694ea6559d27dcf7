/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * One waterfall: given the units of one ranking (the rows of a lane, or the
 * blocks of a sequence), which stay in the device tier, which go to dram, to
 * nvme, and which are lost. Knows nothing of lanes. Internal to policy/.
 */
#include <stdint.h>
#include "policy/select.h"

/*
 * Rank order: protected classes first, in this order, then all others; inside a
 * class by key, equal keys by position, the later one better.
 */
enum { CLASS_FIRST, CLASS_RECENT, CLASS_PINNED, CLASS_WANTED, CLASS_REST, CLASSES };

/* All bitmaps have BITS_WORDS(n) words and no bit at or past n. */
struct place_work {
	uint32_t n, words, hysteresis_permille;
	uint64_t *cls[CLASSES];            /* disjoint, together all units */
	uint32_t lo[CLASSES], hi[CLASSES]; /* words that may hold bits of the class */
	struct select_scratch select;
	uint64_t *segment, *cut[SELECT_CUTS], *tmp[2]; /* scratch */
	void *memory;
};

/* Where every alive unit is now, and the result. */
struct place_units {
	const uint16_t *keys;                    /* [n] */
	const uint64_t *alive, *device;          /* device: a subset of alive */
	const uint64_t *nvme_only;               /* copy in nvme, none in dram; whether or not on the device */
	uint64_t *to_device, *to_dram, *to_nvme; /* disjoint; alive units in none of them are dropped */
};

/* Scratch for n units; cls is zeroed but for CLASS_REST, which the caller need not touch. 0 or -ENOMEM. */
int place_work_init(struct place_work *w, uint32_t n, uint32_t hysteresis_permille);
void place_work_done(struct place_work *w);
/* Make the classes disjoint and find CLASS_REST. Call once after the protected classes were filled. */
void place_work_classes(struct place_work *w);

/*
 * out[j] = the best k[j] units of mask in rank order (all of them when it has fewer); k ascending, at most
 * SELECT_CUTS cuts. out may not be w->segment.
 */
void place_top(const struct place_work *w, const uint16_t *keys, const uint64_t *mask, const uint32_t *k,
	       uint32_t cuts, uint64_t *const *out);

/* keep: units that the device tier holds afterwards, at most the alive ones. dram, nvme: units, UINT32_MAX =
 * all. */
void place(const struct place_work *w, const struct place_units *u, uint32_t keep, uint32_t dram,
	   uint32_t nvme);
