/* SPDX-License-Identifier: MIT */
/* Many lanes, one ranking: mean normalised rank, computed with a stable two-pass radix sort per lane. */
#include <errno.h>
#include <string.h>
#include "policy/limits.h"
#include "policy/merge.h"
#include "shm/bits.h"
#include "shm/util.h"

_Static_assert(DECIDE_MAX_ROWS <= 1 << 24, "a position leaves room for a key's high byte");

struct ranks {
	uint32_t n;       /* rows ranked: alive in every lane */
	uint32_t *row;    /* [n] their positions, ascending */
	uint32_t *by_low; /* [n] scratch: sorted by low byte; high byte << 24 | position */
	uint32_t *sum;    /* [watermark] over lanes, of the rank from the bottom */
};

/* Turn counts into first places. */
static void starts(uint32_t counts[256])
{
	uint32_t at = 0;

	for (uint32_t b = 0; b < 256; b++) {
		uint32_t here = counts[b];

		counts[b] = at;
		at += here;
	}
}

/* Add each row's rank in this lane: 0 the worst; equal keys by position. A key of 0 counts as 1. */
static void add_ranks(const struct ranks *r, const uint16_t *restrict keys)
{
	const uint32_t n = r->n, *restrict row = r->row;
	uint32_t *restrict by_low = r->by_low, *restrict sum = r->sum;
	uint32_t low[256] = {0}, high[256] = {0};

	for (uint32_t i = 0; i < n; i++) {
		uint32_t key = keys[row[i]];

		low[(key | (key == 0)) & 0xff]++;
		high[key >> 8]++;
	}
	starts(low);
	starts(high);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t key = keys[row[i]];

		by_low[low[(key | (key == 0)) & 0xff]++] = key >> 8 << 24 | row[i];
	}
	for (uint32_t i = 0; i < n; i++)
		sum[by_low[i] & 0xffffff] += high[by_low[i] >> 24]++;
}

/* Row bitmaps over all lanes: alive and on the device everywhere, nvme only anywhere. */
static void fold(const struct decide_in *in, uint64_t *alive, uint64_t *device, uint64_t *nvme_only)
{
	uint32_t words = (uint32_t)BITS_WORDS(in->watermark);

	memset(alive, 0xff, words * sizeof(*alive));
	memset(device, 0xff, words * sizeof(*device));
	memset(nvme_only, 0, words * sizeof(*nvme_only));
	for (uint32_t l = 0; l < in->lanes; l++) {
		const size_t at = (size_t)l * in->words;

		for (uint32_t w = 0; w < words; w++) {
			uint64_t dev = in->on_device[at + w], dram = in->on_dram[at + w],
				 nvme = in->on_nvme[at + w];

			alive[w] &= dev | dram | nvme;
			device[w] &= dev;
			nvme_only[w] |= nvme & ~dram;
		}
	}
	if (words && in->watermark % 64) {
		uint64_t tail = (UINT64_C(1) << (in->watermark % 64)) - 1;

		alive[words - 1] &= tail;
		device[words - 1] &= tail;
		nvme_only[words - 1] &= tail;
	}
}

void merge_rows(uint64_t *blocks, const uint64_t *rows, uint32_t watermark, uint32_t block_rows)
{
	for (uint32_t p = bits_next(rows, 0, watermark); p < watermark;) {
		uint32_t b = p / block_rows;

		bits_set(blocks, b);
		p = bits_next(rows, (uint32_t)MIN((uint64_t)(b + 1) * block_rows, watermark), watermark);
	}
}

void expand_blocks(uint64_t *dst, const uint64_t *blocks, uint32_t watermark, uint32_t block_rows)
{
	uint32_t n = DIV_UP(watermark, block_rows);

	memset(dst, 0, BITS_WORDS(watermark) * sizeof(*dst));
	bits_for_each(b, blocks, n)
		bits_set_range(dst, b * block_rows, (uint32_t)MIN((uint64_t)(b + 1) * block_rows, watermark));
}

/* blocks = those whose every row is in rows; rows is inverted on the way (scratch). */
static void merge_whole(uint64_t *blocks, uint32_t n_blocks, uint64_t *rows, uint32_t watermark,
			uint32_t block_rows)
{
	uint32_t words = (uint32_t)BITS_WORDS(watermark);

	for (uint32_t w = 0; w < words; w++)
		rows[w] = ~rows[w];
	memset(blocks, 0, BITS_WORDS(n_blocks) * sizeof(*blocks));
	merge_rows(blocks, rows, watermark, block_rows);
	for (uint32_t w = 0; w < BITS_WORDS(n_blocks); w++)
		blocks[w] = ~blocks[w];
	if (n_blocks % 64)
		blocks[n_blocks / 64] &= (UINT64_C(1) << (n_blocks % 64)) - 1;
}

/* 1 + 65534 * mean rank / highest rank, over the rows of each alive block. */
static void block_keys(struct merged *m, const struct ranks *r, uint32_t lanes, uint32_t watermark)
{
	uint64_t top = (uint64_t)lanes * (r->n > 1 ? r->n - 1 : 1);

	bits_for_each(b, m->alive, m->blocks) {
		uint32_t from = b * m->block_rows;
		uint32_t to = (uint32_t)MIN((uint64_t)from + m->block_rows, watermark);
		uint64_t sum = 0;

		for (uint32_t p = from; p < to; p++)
			sum += r->sum[p];
		m->keys[b] = (uint16_t)(1 + (uint64_t)((unsigned __int128)sum * 65534 /
						       ((unsigned __int128)top * (to - from))));
	}
}

int merge_lanes(struct merged *ret, const struct decide_in *in)
{
	uint32_t wm = in->watermark, longest = MAX(wm, 1);
	uint32_t rows = in->granularity == DECIDE_BLOCK ? MIN(in->block_rows, longest) : 1;
	uint32_t blocks = DIV_UP(wm, rows), words = (uint32_t)BITS_WORDS(wm);
	struct merged m = {.blocks = blocks, .block_rows = rows};
	_cleanup_free_ uint32_t *scratch = calloc((size_t)wm * 3 + 1, sizeof(*scratch));
	_cleanup_free_ uint64_t *folded = calloc((size_t)words * 3 + 1, sizeof(*folded));
	uint64_t *maps = calloc(BITS_WORDS(blocks) * (3 + 16) + 1, sizeof(*maps));
	struct ranks r = {0};

	if (!scratch || !folded || !maps) {
		free(maps);
		return -ENOMEM;
	}
	m.memory = maps;
	m.alive = maps;
	m.device = m.alive + BITS_WORDS(blocks);
	m.nvme_only = m.device + BITS_WORDS(blocks);
	m.keys = (uint16_t *)(m.nvme_only + BITS_WORDS(blocks));
	fold(in, folded, folded + words, folded + 2 * (size_t)words);

	r.row = scratch;
	r.by_low = r.row + wm;
	r.sum = r.by_low + wm;
	bits_for_each(p, folded, wm)
		r.row[r.n++] = p;
	for (uint32_t l = 0; l < in->lanes; l++)
		add_ranks(&r, in->scores + (size_t)l * in->score_stride);

	merge_rows(m.nvme_only, folded + 2 * (size_t)words, wm, rows);
	merge_whole(m.device, blocks, folded + words, wm, rows);
	merge_whole(m.alive, blocks, folded, wm, rows);
	for (uint32_t w = 0; w < BITS_WORDS(blocks); w++)
		m.nvme_only[w] &= m.alive[w];
	block_keys(&m, &r, in->lanes, wm);
	*ret = m;
	return 0;
}

void merged_done(struct merged *m)
{
	free(m->memory);
	m->memory = NULL;
}
