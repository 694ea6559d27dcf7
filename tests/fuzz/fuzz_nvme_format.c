/* SPDX-License-Identifier: MIT */
/*
 * Whatever a disk returns: superblocks, feet, tables and position lists are checked without reading
 * outside the buffers, and what passes the check is safe to walk. Checksums are repaired
 * first, or nothing would ever get past them.
 */
#include <stdlib.h>
#include <string.h>

#include "shm/bits.h"
#include "shm/crc.h"
#include "tiers/nvme.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int ok)
{
	if (!ok)
		abort();
}

/* The input as one unit with a right tag, but for the checksum. */
static void *unit_of(const uint8_t *data, size_t size, uint64_t magic)
{
	struct nvme_tag *tag = aligned_alloc(8, KVT_UNIT);

	require(tag != NULL);
	memset(tag, 0, KVT_UNIT);
	memcpy(tag, data, MIN(size, (size_t)KVT_UNIT));
	nvme_unit_seal(tag, magic);
	return tag;
}

static void superblock(const uint8_t *data, size_t size)
{
	struct nvme_super s;
	void *unit = unit_of(data, size, NVME_MAGIC_SUPER);

	if (!nvme_super_check(unit, &s))
		require(s.segments && s.container < s.containers &&
			s.segment_bytes / KVT_UNIT <= NVME_MAX_UNITS);
	free(unit);
}

static void walk(const struct nvme_foot *foot, const struct nvme_table *t)
{
	static uint64_t pos[NVME_MAX_POS_WORDS];
	uint32_t unit = NVME_DATA_UNIT;

	for (uint32_t i = 0; i < t->pages; i++) {
		const struct nvme_entry *e = &t->entry[i];
		struct page_meta meta;

		require(e->unit >= unit);
		unit = e->unit + nvme_page_units(e->bytes);
		require(unit <= foot->data_end);
		require(e->seq_index == NVME_NO_SEQ || e->seq_index < t->seqs);
		if (!nvme_entry_meta(e, t->pos, pos, &meta) && meta.pos)
			require(bits_rank(meta.pos, meta.pos_words * 64) <= meta.pos_words * 64);
	}
}

/* As much of foot and table as the input has; counts are kept small so that the table is mostly input. */
static void table(const uint8_t *data, size_t size)
{
	static const uint8_t uuid[16];
	size_t head = MIN(size, sizeof(struct nvme_foot));
	struct nvme_foot *raw = unit_of(data, head, NVME_MAGIC_FOOT), foot;
	struct nvme_table t;
	size_t bytes;
	char *buf;

	memset(raw->uuid, 0, sizeof(raw->uuid));
	raw->segment = 5;
	raw->pages %= 64;
	raw->seqs %= 16;
	raw->pos_bytes %= 8192;
	raw->table_units = nvme_table_units(raw->pages, raw->seqs, raw->pos_bytes);
	bytes = raw->table_units * (size_t)KVT_UNIT;
	buf = calloc(1, bytes + 8);
	require(buf != NULL);
	memcpy(buf, data + head, MIN(size - head, bytes));
	raw->table_crc = crc32c(0, buf, bytes);
	nvme_unit_seal(raw, NVME_MAGIC_FOOT);
	if (!nvme_foot_check(raw, uuid, 5, 256, &foot) && !nvme_table_check(&foot, buf, &t))
		walk(&foot, &t);
	free(buf);
	free(raw);
}

/* Any bitmap survives encoding; any bytes decode or are refused. */
static void positions(const uint8_t *data, size_t size)
{
	uint32_t words = (uint32_t)MIN(size / 8, (size_t)1024), flags, len;
	uint64_t *in = calloc(words + 1, 8), *out = calloc(words + 1, 8);
	uint8_t *bytes = malloc(size + 1);

	require(in && out && bytes);
	memcpy(in, data, words * (size_t)8);
	len = nvme_pos_size(in, words, &flags);
	require(len <= words * 8);
	nvme_pos_put(bytes, in, words, flags);
	require(!nvme_pos_get(out, words, bytes, len, flags));
	require(!memcmp(in, out, words * (size_t)8));
	memcpy(bytes, data, size);
	(void)nvme_pos_get(out, words, bytes, (uint32_t)size, NVME_E_GAPS);
	(void)nvme_pos_get(out, words, bytes, (uint32_t)size, 0);
	free(bytes);
	free(in);
	free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (!size)
		return 0;
	if (data[0] % 3 == 0)
		superblock(data + 1, size - 1);
	else if (data[0] % 3 == 1)
		table(data + 1, size - 1);
	else
		positions(data + 1, size - 1);
	return 0;
}
