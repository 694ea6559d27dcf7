/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Top-k over 16-bit keys: radix selection, no sort, no branch per row. Rows are
 * ordered by key, equal keys by position (the later one is better), so every
 * top-k is unique and the top j of a set lies inside its top k for j <= k.
 *
 * Pure; scratch is the caller's. Any thread.
 */
#include <stddef.h>
#include <stdint.h>

#define SELECT_CUTS 4 /* selections that share one pair of passes */

/* Where a selection ends: all keys above `key`, and the latest `ties` rows that equal it. */
struct select_cut {
	uint16_t key;
	uint32_t ties;
};

/* What differs by CPU; the results do not. Bitmaps have `words` words, eff 64 * words entries. */
struct select_kern {
	/* eff[i] = bit i of mask ? max(keys[i], 1) : 0; keys has n <= 64 * words entries. */
	void (*mask)(const uint16_t *keys, const uint64_t *mask, uint32_t n, uint32_t words, uint16_t *eff);
	/* Bit i of above: eff[i] > cut; of equal: eff[i] == cut. */
	void (*split)(const uint16_t *eff, uint32_t words, uint16_t cut, uint64_t *above, uint64_t *equal);
	uint32_t (*count)(const uint64_t *bits, uint32_t words);
	/* Cut j: the k[j]-th largest of eff, with 0 < k[j] <= entries that are not 0. bytes: 128 * words of
	 * scratch. */
	void (*find)(const uint16_t *eff, uint32_t words, const uint32_t *k, uint32_t cuts, uint8_t *bytes,
		     struct select_cut *ret);
};
extern const struct select_kern select_portable, select_avx2;
/* The best for this CPU. */
const struct select_kern *select_kern(void);

struct select_scratch {
	const struct select_kern *kern;
	uint16_t *eff;           /* [64 * words] */
	uint8_t *bytes;          /* [128 * words] */
	uint32_t *pos;           /* [SELECT_SPARSE(64 * words)] */
	uint64_t *above, *equal; /* [words] */
};
/* Sets of at most this many of n rows are gathered instead of scanned. */
#define SELECT_SPARSE(n) ((n) / 16 + 64)

/*
 * OR into out[j] the best k[j] rows of mask, for j < cuts <= SELECT_CUTS.
 * count is the number of bits in mask, all below n; 0 < k[j] < count. mask and
 * out[j] may not overlap.
 */
void select_top(const struct select_scratch *s, const uint16_t *keys, uint32_t n, const uint64_t *mask,
		uint32_t count, const uint32_t *k, uint32_t cuts, uint64_t *const *out);
