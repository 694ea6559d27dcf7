/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What the NVMe tier writes to disk. Everything is little-endian, sized in
 * units of 4 KiB, and carries a CRC32C; the functions are pure, so that a fuzzer
 * can feed them whatever a disk may return.
 *
 * A container file:      preamble (1 MiB: superblock A at 0, B at 512 KiB), then segments
 * A segment of N units:  0        head: sequence number of this use of the segment
 *                        1, 2     live map A and B: which pages outlived the footer
 *                        3 ...    pages
 *                        ...      table: entries, sequence records, positions
 *                        N - 1    foot: seals the segment, checks the table
 *
 * Nothing in a segment counts unless head and foot carry the same sequence
 * number; head is rewritten (and flushed) before a reused segment gets new data,
 * so what an earlier use left behind never speaks again. The foot is immutable;
 * pages that die later are cleared in a live map, written alternately to A and B
 * so that a torn write leaves the older one. A copy made by the cleaner names the place it came
 * from, so that after a crash between the copy and the freeing only one of the two is found.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "shm/util.h"
#include "tiers/tier.h"

#define NVME_VERSION 1u
#define NVME_PREAMBLE (1u << 20)
#define NVME_SUPER_B (512u << 10)
#define NVME_DATA_UNIT 3u     /* first unit of pages in a segment */
#define NVME_MAX_UNITS 16384u /* of a segment: 64 MiB */
#define NVME_MAP_WORDS (NVME_MAX_UNITS / 64)
#define NVME_MAX_POS_WORDS (16384u + 1) /* 2^20 rows, off by less than a word */
#define NVME_NO_SEQ UINT32_MAX

#define NVME_MAGIC_SUPER UINT64_C(0x524550555354564b) /* "KVTSUPER" */
#define NVME_MAGIC_HEAD UINT64_C(0x444847455354564b)  /* "KVTSEGHD" */
#define NVME_MAGIC_MAP UINT64_C(0x504d47455354564b)   /* "KVTSEGMP" */
#define NVME_MAGIC_FOOT UINT64_C(0x544647455354564b)  /* "KVTSEGFT" */

/* First in every checked unit, in every version. crc covers the whole unit with this field zero. */
struct nvme_tag {
	uint64_t magic;
	uint32_t version;
	uint32_t crc;
};

struct nvme_super {
	struct nvme_tag tag;
	uint8_t uuid[16];
	uint64_t generation; /* rises at every open; the higher valid copy wins */
	uint64_t created_ns; /* CLOCK_REALTIME */
	uint64_t store_bytes, segment_bytes;
	uint32_t container, containers;   /* this file, of how many */
	uint32_t first_segment, segments; /* those in this file */
	uint32_t unit, pad;
	uint8_t key_id[16]; /* reserved for an encryption key id; zero: plain */
};
_Static_assert(offsetof(struct nvme_super, generation) == 32, "layout");
_Static_assert(offsetof(struct nvme_super, container) == 64, "layout");
_Static_assert(sizeof(struct nvme_super) == 104, "layout");

struct nvme_head {
	struct nvme_tag tag;
	uint8_t uuid[16];
	uint64_t seq; /* of this use of the segment; never repeats in a store */
	uint32_t segment, pad;
};
_Static_assert(sizeof(struct nvme_head) == 48, "layout");

struct nvme_map {
	struct nvme_tag tag;
	uint8_t uuid[16];
	uint64_t seq, generation; /* the higher generation of one seq wins */
	uint32_t segment, pad;
	uint64_t live[NVME_MAP_WORDS]; /* bit u: a live page starts at unit u */
};
_Static_assert(offsetof(struct nvme_map, live) == 56, "layout");
_Static_assert(sizeof(struct nvme_map) <= KVT_UNIT, "one unit, one atomic write");

struct nvme_foot {
	struct nvme_tag tag;
	uint8_t uuid[16];
	uint64_t seq;           /* equals the head's */
	uint64_t seal;          /* order of sealing over the whole store */
	uint32_t segment, life; /* enum tier_class, or NVME_COLD */
	uint32_t pages, seqs;
	uint32_t pos_bytes, table_units;
	uint32_t table_crc, data_end; /* crc of all table units; first unit past the pages */
};
_Static_assert(offsetof(struct nvme_foot, segment) == 48, "layout");
_Static_assert(sizeof(struct nvme_foot) == 80, "layout");

enum {
	NVME_E_GAPS = 1, /* positions as varint gaps, else as bitmap words */
};

struct nvme_entry {
	struct page_ident id;
	uint32_t crc, bytes;
	uint32_t unit;      /* where the page starts */
	uint32_t seq_index; /* into the sequence records, or NVME_NO_SEQ */
	uint32_t pos_off, pos_len, pos_words;
	uint32_t flags;
	uint32_t from_segment, from_unit; /* the cleaner's source; from_seq 0: none */
	uint64_t from_seq;
};
_Static_assert(offsetof(struct nvme_entry, from_seq) == 88, "layout");
_Static_assert(sizeof(struct nvme_entry) == 96, "layout");
_Static_assert(sizeof(struct seq_record) == 80, "written as bytes");

/* A checked table: pointers into the caller's buffer, good as long as that is. */
struct nvme_table {
	const struct nvme_entry *entry; /* ascending by unit, not overlapping */
	const struct seq_record *seq;
	const uint8_t *pos;
	uint32_t pages, seqs;
};

/* Fill tag and CRC of a 4 KiB unit whose other fields are set. */
void nvme_unit_seal(void *unit, uint64_t magic);
/*
 * 0, or -ENODATA (the magic is another's), -EBADMSG (CRC), -EPROTONOSUPPORT (intact, of another
 * version). `unit` is 4 KiB, 8-byte aligned.
 */
int nvme_unit_check(const void *unit, uint64_t magic);

/* As nvme_unit_check, and the fields agree with each other: -EINVAL. */
int nvme_super_check(const void *unit, struct nvme_super *ret);
/* The unit is a valid foot of `segment` in a segment of `units`: 0 or as above. */
int nvme_foot_check(const void *unit, const uint8_t uuid[16], uint32_t segment, uint32_t units,
		    struct nvme_foot *ret);
/* Check the whole table (table_units units at `table`) against its checked foot. 0 or -EBADMSG. */
int nvme_table_check(const struct nvme_foot *foot, const void *table, struct nvme_table *ret);

/* Bytes of a table with so many pages, records and position bytes, in units. */
static inline uint32_t nvme_table_units(uint64_t pages, uint64_t seqs, uint64_t pos_bytes)
{
	return (uint32_t)DIV_UP(
		pages * sizeof(struct nvme_entry) + seqs * sizeof(struct seq_record) + pos_bytes, KVT_UNIT);
}

/* Bytes that nvme_pos_put will write for this bitmap; *ret_flags says in which form. */
uint32_t nvme_pos_size(const uint64_t *pos, uint32_t words, uint32_t *ret_flags);
void nvme_pos_put(uint8_t *dst, const uint64_t *pos, uint32_t words, uint32_t flags);
/* Decode into pos[words]. -EBADMSG when the bytes are not exactly one bitmap of that size. */
int nvme_pos_get(uint64_t *pos, uint32_t words, const uint8_t *src, uint32_t len, uint32_t flags);
