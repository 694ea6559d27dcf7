/* SPDX-License-Identifier: MIT */
/*
 * Encoding and checking of the on-disk structures. A page's rows are ascending
 * positions that may lie close together or be scattered over a long context, so
 * positions are stored in whichever form is smaller: the bitmap without its
 * trailing zero words, or the gaps between set bits as base-128 varints. 128 rows
 * then cost 16 to 384 bytes instead of up to 128 KiB.
 */
#include "tiers/nvme_format.h"

#include <string.h>

#include "shm/bits.h"
#include "shm/crc.h"
#include "shm/trial.h"

static uint32_t unit_crc(const void *unit)
{
	static const uint32_t zero;
	const uint8_t *p = unit;
	uint32_t crc = crc32c(0, p, offsetof(struct nvme_tag, crc));

	crc = crc32c(crc, &zero, sizeof(zero));
	return crc32c(crc, p + sizeof(struct nvme_tag), KVT_UNIT - sizeof(struct nvme_tag));
}

void nvme_unit_seal(void *unit, uint64_t magic)
{
	struct nvme_tag *tag = unit;

	tag->magic = magic;
	tag->version = NVME_VERSION;
	tag->crc = unit_crc(unit);
}

int nvme_unit_check(const void *unit, uint64_t magic)
{
	const struct nvme_tag *tag = unit;

	if (tag->magic != magic)
		return -ENODATA;
	if (tag->crc != unit_crc(unit) && !planted("unit-crc-skipped"))
		return -EBADMSG;
	return tag->version == NVME_VERSION || planted("store-version-ignored") ? 0 : -EPROTONOSUPPORT;
}

int nvme_super_check(const void *unit, struct nvme_super *ret)
{
	struct nvme_super s;
	int r = nvme_unit_check(unit, NVME_MAGIC_SUPER);

	if (r < 0)
		return r;
	memcpy(&s, unit, sizeof(s));
	if (s.unit != KVT_UNIT || !s.segments || !s.containers || s.container >= s.containers ||
	    !s.segment_bytes || s.segment_bytes % KVT_UNIT || s.segment_bytes / KVT_UNIT > NVME_MAX_UNITS ||
	    s.segments > UINT32_MAX - s.first_segment)
		return -EINVAL;
	*ret = s;
	return 0;
}

int nvme_foot_check(const void *unit, const uint8_t uuid[16], uint32_t segment, uint32_t units,
		    struct nvme_foot *ret)
{
	struct nvme_foot f;
	int r = nvme_unit_check(unit, NVME_MAGIC_FOOT);

	if (r < 0)
		return r;
	memcpy(&f, unit, sizeof(f));
	if (memcmp(f.uuid, uuid, sizeof(f.uuid)) != 0 || f.segment != segment)
		return -ENODATA;
	if (!f.pages || f.pages > units || f.data_end < NVME_DATA_UNIT || f.data_end > units ||
	    f.table_units > units || (uint64_t)f.data_end + f.table_units + 1 > units ||
	    nvme_table_units(f.pages, f.seqs, f.pos_bytes) != f.table_units)
		return -EINVAL;
	*ret = f;
	return 0;
}

static bool entry_ok(const struct nvme_foot *f, const struct nvme_entry *e, uint32_t min_unit)
{
	if (e->unit < min_unit && !planted("table-overlap-unchecked"))
		return false;
	if (!e->bytes || e->bytes > TIER_MAX_PAGE || e->unit >= f->data_end ||
	    DIV_UP(e->bytes, KVT_UNIT) > f->data_end - e->unit)
		return false;
	if (e->seq_index != NVME_NO_SEQ && e->seq_index >= f->seqs)
		return false;
	if (e->pos_words > NVME_MAX_POS_WORDS || e->flags > NVME_E_GAPS)
		return false;
	return e->pos_off <= f->pos_bytes && e->pos_len <= f->pos_bytes - e->pos_off;
}

int nvme_table_check(const struct nvme_foot *f, const void *table, struct nvme_table *ret)
{
	struct nvme_table t = {.entry = table, .pages = f->pages, .seqs = f->seqs};
	uint32_t unit = NVME_DATA_UNIT;

	if (crc32c(0, table, (size_t)f->table_units * KVT_UNIT) != f->table_crc &&
	    !planted("table-crc-skipped"))
		return -EBADMSG;
	t.seq = (const void *)(t.entry + t.pages);
	t.pos = (const uint8_t *)(t.seq + t.seqs);
	for (uint32_t i = 0; i < t.pages; i++) {
		if (!entry_ok(f, &t.entry[i], unit))
			return -EBADMSG;
		unit = t.entry[i].unit + (uint32_t)DIV_UP(t.entry[i].bytes, KVT_UNIT);
	}
	*ret = t;
	return 0;
}

static uint32_t varint_size(uint32_t v)
{
	return v < 1u << 7 ? 1 : v < 1u << 14 ? 2 : v < 1u << 21 ? 3 : v < 1u << 28 ? 4 : 5;
}

static uint32_t raw_words(const uint64_t *pos, uint32_t words)
{
	while (words && !pos[words - 1])
		words--;
	return words;
}

uint32_t nvme_pos_size(const uint64_t *pos, uint32_t words, uint32_t *ret_flags)
{
	uint32_t raw = raw_words(pos, words) * 8, gaps = 0, last = 0;

	bits_for_each(i, pos, words * 64) {
		gaps += varint_size(i - last);
		last = i;
		if (gaps >= raw)
			break;
	}
	*ret_flags = gaps < raw ? NVME_E_GAPS : 0;
	return gaps < raw ? gaps : raw;
}

void nvme_pos_put(uint8_t *dst, const uint64_t *pos, uint32_t words, uint32_t flags)
{
	uint32_t last = 0;

	if (!(flags & NVME_E_GAPS)) {
		memcpy(dst, pos, raw_words(pos, words) * sizeof(*pos));
		return;
	}
	bits_for_each(i, pos, words * 64) {
		uint32_t gap = i - last;

		for (last = i; gap >= 0x80; gap >>= 7)
			*dst++ = (uint8_t)(gap | 0x80);
		*dst++ = (uint8_t)gap;
	}
}

int nvme_pos_get(uint64_t *pos, uint32_t words, const uint8_t *src, uint32_t len, uint32_t flags)
{
	uint64_t bit = 0;

	memset(pos, 0, words * sizeof(*pos));
	if (!(flags & NVME_E_GAPS)) {
		if (len % 8 || len / 8 > words)
			return -EBADMSG;
		if (len)
			memcpy(pos, src, len);
		return 0;
	}
	for (uint32_t i = 0, n = 0; i < len; n++) {
		uint64_t gap = 0;
		unsigned shift = 0;

		while (i < len && src[i] & 0x80 && shift < 28) {
			gap |= (uint64_t)(src[i++] & 0x7f) << shift;
			shift += 7;
		}
		if (i == len || src[i] & 0x80)
			return -EBADMSG;
		gap |= (uint64_t)src[i++] << shift;
		bit += gap;
		if (bit >= (uint64_t)words * 64 || (n && !gap))
			return -EBADMSG;
		bits_set(pos, (uint32_t)bit);
	}
	return 0;
}
