/* SPDX-License-Identifier: MIT */
/*
 * Snapshots from anywhere: as they are, and once more with length and checksum
 * made right so that the tables are reached. What is accepted must decide,
 * inside its budgets, and decide the same after it was written and read again.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "policy/decide.h"
#include "policy/snapshot.h"
#include "shm/bits.h"
#include "shm/crc.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The plan's six bitmaps, after checking them against the budgets. */
static uint64_t *decide(const struct decide_in *in)
{
	size_t words = BITS_WORDS(in->watermark), map = in->lanes * words;
	uint64_t *maps = malloc(6 * map * 8 + 1);
	uint32_t *counts = malloc(4 * in->lanes * sizeof(*counts));
	struct decide_out out = {(uint32_t)words};

	if (!maps || !counts)
		abort();
	out.resident = maps;
	out.copy_out = maps + map;
	out.bring_in = maps + 2 * map;
	out.to_dram = maps + 3 * map;
	out.to_nvme = maps + 4 * map;
	out.drop = maps + 5 * map;
	out.kept = counts;
	out.out = counts + in->lanes;
	out.in = counts + 2 * in->lanes;
	out.dropped = counts + 3 * in->lanes;
	if (policy_decide(in, &out) < 0)
		abort();
	for (uint32_t l = 0; l < in->lanes; l++)
		if (out.kept[l] > in->budget[0][l] ||
		    bits_rank(out.to_dram + l * words, in->watermark) > in->budget[1][l] ||
		    bits_rank(out.to_nvme + l * words, in->watermark) > in->budget[2][l])
			abort();
	free(counts);
	return maps;
}

/* Whether it was accepted. */
static bool try(const void *buf, size_t size)
{
	struct snapshot s, copy;
	uint64_t *first, *second;
	size_t off = 0;
	void *again;

	if (snapshot_read(&s, buf, size, &off) < 0) {
		if (off > size)
			abort();
		return false;
	}
	again = malloc(size);
	if (!again || snapshot_bytes(&s.in) != size || snapshot_write(&s.in, again, size) < 0 ||
	    snapshot_read(&copy, again, size, &off) < 0)
		abort();
	first = decide(&s.in);
	second = decide(&copy.in);
	if (memcmp(first, second, 6 * s.in.lanes * BITS_WORDS(s.in.watermark) * 8) != 0)
		abort();
	free(first);
	free(second);
	free(again);
	return true;
}

/* The size that a snapshot with this header must have. */
static size_t right_size(const struct snapshot_hdr *h)
{
	static const uint64_t some;
	const uint32_t *n = (const uint32_t *)&some;
	struct decide_in in = {.lanes = h->lanes, .watermark = h->watermark, .budget = {n, n, n}};

	in.words = (uint32_t)BITS_WORDS(h->watermark);
	in.score_stride = h->watermark;
	in.scores = (const uint16_t *)&some;
	in.on_device = in.on_dram = in.on_nvme = &some;
	in.pinned = h->flags & SNAPSHOT_PINNED ? &some : NULL;
	in.wanted = h->flags & SNAPSHOT_WANTED ? &some : NULL;
	return snapshot_bytes(&in); /* reads no table */
}

/* A header that passes, and tables that are the input over and over. */
static void try_repaired(const uint8_t *data, size_t size)
{
	struct snapshot_hdr h;
	size_t bytes;
	char *buf;

	memcpy(&h, data, sizeof(h));
	h.magic = SNAPSHOT_MAGIC;
	h.version = SNAPSHOT_VERSION;
	h.lanes = h.lanes % 6 + 1;
	h.watermark %= 300;
	h.granularity %= 3;
	h.block_rows += h.block_rows == 0;
	h.equal_lanes &= 1;
	h.hysteresis_permille %= 1001;
	h.flags &= SNAPSHOT_PINNED | SNAPSHOT_WANTED;
	h.reserved = 0;
	h.crc = 0;
	h.bytes = bytes = right_size(&h);
	buf = malloc(bytes);
	if (!buf)
		return;
	for (size_t i = 0; i < bytes; i++)
		buf[i] = (char)data[i % size];
	for (uint32_t i = 0; i < 3 * h.lanes; i++) { /* budgets of a likely size */
		uint32_t rows;

		memcpy(&rows, buf + sizeof(h) + i * sizeof(rows), sizeof(rows));
		rows = rows % 16 ? rows % 400 : UINT32_MAX;
		memcpy(buf + sizeof(h) + i * sizeof(rows), &rows, sizeof(rows));
	}
	memcpy(buf, &h, sizeof(h));
	h.crc = crc32c(0, buf, bytes);
	memcpy(buf, &h, sizeof(h));
	if (!try(buf, bytes))
		abort();
	free(buf);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	void *buf = aligned_alloc(8, (size + 8) / 8 * 8);

	if (!buf)
		return 0;
	memcpy(buf, data, size);
	try(buf, size);
	free(buf);
	if (size >= sizeof(struct snapshot_hdr))
		try_repaired(data, size);
	return 0;
}
