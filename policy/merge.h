/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Granularity TOKEN and BLOCK: all lanes of a sequence merged into one ranking
 * of blocks (a token is a block of one row). Internal to policy/.
 */
#include <stdint.h>
#include "policy/decide.h"

/* One ranking of `blocks` blocks; bitmaps of BITS_WORDS(blocks) words, owned by `memory`. */
struct merged {
	uint32_t blocks, block_rows;
	uint16_t *keys;
	uint64_t *alive, *device, *nvme_only;
	void *memory;
};

/*
 * A block is alive when every row of it is alive in every lane, on the device
 * when every row is there in every lane, nvme_only when any row is so in any
 * lane. Its key is the mean over its rows and lanes of the row's rank among the
 * lane's rows, normalised to 1..65535. 0 or -ENOMEM.
 */
int merge_lanes(struct merged *ret, const struct decide_in *in);
void merged_done(struct merged *m);
/* Set bit b of blocks for every block with a row in `rows` (a bitmap of watermark rows). */
void merge_rows(uint64_t *blocks, const uint64_t *rows, uint32_t watermark, uint32_t block_rows);
/* The rows of the blocks: dst has BITS_WORDS(watermark) words. */
void expand_blocks(uint64_t *dst, const uint64_t *blocks, uint32_t watermark, uint32_t block_rows);
