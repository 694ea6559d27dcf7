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

static void try(const void *buf, size_t size)
{
	struct snapshot s, copy;
	uint64_t *first, *second;
	size_t off = 0;
	void *again;

	if (snapshot_read(&s, buf, size, &off) < 0) {
		if (off > size)
			abort();
		return;
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
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	void *buf = aligned_alloc(8, (size + 8) / 8 * 8);
	struct snapshot_hdr h;

	if (!buf)
		return 0;
	memcpy(buf, data, size);
	try(buf, size);
	if (size >= sizeof(h)) {
		memcpy(&h, buf, sizeof(h));
		h.magic = SNAPSHOT_MAGIC;
		h.version = SNAPSHOT_VERSION;
		h.bytes = size;
		h.lanes = h.lanes % 8 + 1;
		h.watermark %= 700;
		h.granularity %= 3;
		h.equal_lanes &= 1;
		h.hysteresis_permille %= 1001;
		h.flags &= SNAPSHOT_PINNED | SNAPSHOT_WANTED;
		h.reserved = 0;
		h.crc = 0;
		memcpy(buf, &h, sizeof(h));
		h.crc = crc32c(0, buf, size);
		memcpy(buf, &h, sizeof(h));
		try(buf, size);
	}
	free(buf);
	return 0;
}
