/* SPDX-License-Identifier: MIT */
/*
 * A decision's input as a flat byte string, so that any plan can be replayed
 * without the hardware it was made on. Tables are repacked to their least
 * strides; what a decision never reads is not stored.
 */
#include <errno.h>
#include <string.h>
#include "policy/decide.h"
#include "policy/limits.h"
#include "policy/snapshot.h"
#include "shm/bits.h"
#include "shm/crc.h"
#include "shm/util.h"

/* Where the tables begin, in bytes from the header. */
struct map {
	size_t budget, on_tier[DECIDE_TIERS], pinned, wanted, scores, end;
	size_t words, score_stride;
};

static struct map map_of(size_t lanes, size_t watermark, uint32_t flags)
{
	struct map m = {.words = BITS_WORDS(watermark), .score_stride = ALIGN_UP(watermark, 4)};
	size_t at = sizeof(struct snapshot_hdr);

	m.budget = at;
	at += ALIGN_UP(DECIDE_TIERS * lanes * sizeof(uint32_t), 8);
	for (int t = 0; t < DECIDE_TIERS; t++) {
		m.on_tier[t] = at;
		at += lanes * m.words * sizeof(uint64_t);
	}
	m.pinned = at;
	at += flags & SNAPSHOT_PINNED ? m.words * sizeof(uint64_t) : 0;
	m.wanted = at;
	at += flags & SNAPSHOT_WANTED ? m.words * sizeof(uint64_t) : 0;
	m.scores = at;
	m.end = at + lanes * m.score_stride * sizeof(uint16_t);
	return m;
}

static struct map map_of_in(const struct decide_in *in, uint32_t *ret_flags)
{
	*ret_flags = (in->pinned ? SNAPSHOT_PINNED : 0) | (in->wanted ? SNAPSHOT_WANTED : 0) |
		     (in->write_through ? SNAPSHOT_WRITE_THROUGH : 0);
	return map_of(in->lanes, in->watermark, *ret_flags);
}

size_t snapshot_bytes(const struct decide_in *in)
{
	uint32_t flags;

	return decide_check(in) < 0 ? 0 : map_of_in(in, &flags).end;
}

/* rows [0, watermark) of `lanes` bitmaps; what is past them in the source is dropped. */
static void put_bits(void *dst, const uint64_t *src, size_t stride, uint32_t lanes, uint32_t watermark)
{
	size_t words = BITS_WORDS(watermark);
	uint64_t *to = dst;

	for (uint32_t l = 0; l < lanes; l++, to += words, src += stride) {
		memcpy(to, src, words * sizeof(*to));
		if (watermark % 64)
			to[words - 1] &= (UINT64_C(1) << (watermark % 64)) - 1;
	}
}

static uint32_t checksum(const struct snapshot_hdr *h, const void *buf)
{
	struct snapshot_hdr copy = *h;

	copy.crc = 0;
	return crc32c(crc32c(0, &copy, sizeof(copy)), (const char *)buf + sizeof(copy),
		      h->bytes - sizeof(copy));
}

int snapshot_write(const struct decide_in *in, void *buf, size_t bytes)
{
	const uint64_t *tiers[DECIDE_TIERS] = {in->on_device, in->on_dram, in->on_nvme};
	struct snapshot_hdr h = {.magic = SNAPSHOT_MAGIC, .version = SNAPSHOT_VERSION};
	char *base = buf;
	struct map m;

	if (decide_check(in) < 0 || (uintptr_t)buf % 8)
		return -EINVAL;
	m = map_of_in(in, &h.flags);
	if (bytes < m.end)
		return -ENOSPC;
	memset(base, 0, m.end);
	for (int t = 0; t < DECIDE_TIERS; t++) {
		memcpy(base + m.budget + (size_t)t * in->lanes * sizeof(uint32_t), in->budget[t],
		       in->lanes * sizeof(uint32_t));
		put_bits(base + m.on_tier[t], tiers[t], in->words, in->lanes, in->watermark);
	}
	if (in->pinned)
		put_bits(base + m.pinned, in->pinned, 0, 1, in->watermark);
	if (in->wanted)
		put_bits(base + m.wanted, in->wanted, 0, 1, in->watermark);
	for (uint32_t l = 0; l < in->lanes; l++)
		memcpy(base + m.scores + (size_t)l * m.score_stride * sizeof(uint16_t),
		       in->scores + (size_t)l * in->score_stride, in->watermark * sizeof(uint16_t));
	h.bytes = m.end;
	h.lanes = in->lanes;
	h.watermark = in->watermark;
	h.protect_first = in->protect_first;
	h.protect_last = in->protect_last;
	h.granularity = in->granularity;
	h.block_rows = in->block_rows;
	h.equal_lanes = in->equal_lanes;
	h.hysteresis_permille = in->hysteresis_permille;
	h.crc = checksum(&h, buf);
	memcpy(buf, &h, sizeof(h));
	return 0;
}

#define FIELD(f) offsetof(struct snapshot_hdr, f)

/* 0, or the offset of the first header field that cannot be, counted from 1. */
static size_t bad_field(const struct snapshot_hdr *h, size_t bytes)
{
	const struct {
		bool bad;
		size_t at;
	} checks[] = {
		{h->magic != SNAPSHOT_MAGIC, FIELD(magic)},
		{h->version != SNAPSHOT_VERSION, FIELD(version)},
		{h->bytes != bytes, FIELD(bytes)},
		{h->lanes < 1 || h->lanes > DECIDE_MAX_LANES, FIELD(lanes)},
		{h->watermark > DECIDE_MAX_ROWS, FIELD(watermark)},
		{h->granularity > DECIDE_BLOCK, FIELD(granularity)},
		{h->granularity == DECIDE_BLOCK && h->block_rows < 1, FIELD(block_rows)},
		{h->equal_lanes > 1, FIELD(equal_lanes)},
		{h->hysteresis_permille > 1000, FIELD(hysteresis_permille)},
		{h->flags & ~(SNAPSHOT_PINNED | SNAPSHOT_WANTED | SNAPSHOT_WRITE_THROUGH), FIELD(flags)},
		{h->reserved != 0, FIELD(reserved)},
	};

	for (size_t i = 0; i < ARRAY_SIZE(checks); i++)
		if (checks[i].bad)
			return checks[i].at + 1;
	return 0;
}

static int refuse(size_t *err_off, size_t at)
{
	*err_off = at;
	return -EBADMSG;
}

int snapshot_read(struct snapshot *ret, const void *buf, size_t bytes, size_t *err_off)
{
	const char *base = buf;
	struct snapshot_hdr h;
	struct map m;
	size_t bad;

	if ((uintptr_t)buf % 8)
		return -EINVAL;
	if (bytes < sizeof(h))
		return refuse(err_off, bytes);
	memcpy(&h, buf, sizeof(h));
	bad = bad_field(&h, bytes);
	if (bad)
		return refuse(err_off, bad - 1);
	m = map_of(h.lanes, h.watermark, h.flags);
	if (m.end != bytes)
		return refuse(err_off, FIELD(bytes));
	if (checksum(&h, buf) != h.crc)
		return refuse(err_off, FIELD(crc));
	ret->in = (struct decide_in){
		.lanes = h.lanes,
		.watermark = h.watermark,
		.words = (uint32_t)m.words,
		.score_stride = (uint32_t)m.score_stride,
		.protect_first = h.protect_first,
		.protect_last = h.protect_last,
		.granularity = h.granularity,
		.block_rows = h.block_rows,
		.equal_lanes = h.equal_lanes,
		.write_through = !!(h.flags & SNAPSHOT_WRITE_THROUGH),
		.hysteresis_permille = h.hysteresis_permille,
		.scores = (const uint16_t *)(base + m.scores),
		.on_device = (const uint64_t *)(base + m.on_tier[0]),
		.on_dram = (const uint64_t *)(base + m.on_tier[1]),
		.on_nvme = (const uint64_t *)(base + m.on_tier[2]),
		.pinned = h.flags & SNAPSHOT_PINNED ? (const uint64_t *)(base + m.pinned) : NULL,
		.wanted = h.flags & SNAPSHOT_WANTED ? (const uint64_t *)(base + m.wanted) : NULL,
	};
	for (int t = 0; t < DECIDE_TIERS; t++)
		ret->in.budget[t] = (const uint32_t *)(base + m.budget) + (size_t)t * h.lanes;
	return 0;
}
