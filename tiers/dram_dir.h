/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The directory of a private DRAM segment that outlives the process: what a later life must know to find the
 * pages again. It lies behind the payload in the same memfd:
 *
 *   payload | slots: 96 bytes for each unit of 4 KiB | sequence records | head, in the last unit
 *
 * A page owns the slots of its units, so its record needs no allocator: it begins in the slot of its first
 * unit, and one that does not fit there is not kept (a page of one unit has room for about 40 rows'
 * positions). 2.5 % of the payload in all, untouched where no page is. Sequence records are shared by a
 * segment's pages; when there is no free one the page is not kept either.
 *
 * A record counts while its word `live` says so: stored last (release), cleared before the place may get
 * another page. A process that is killed leaves its stores as the program made them, so a record is whole or
 * not there. What may have happened to the memory since is another matter: nothing of it is believed. Every
 * record is copied, its checksum (seeded with the segment's id and the unit) compared and every field checked,
 * on the copy. The payload is checked against the record's CRC at every read, as ever.
 *
 * Owner thread of the tier.
 */
#include "tiers/alloc.h"
#include "tiers/tier.h"
#include "shm/seg.h"

#include <stdbool.h>
#include <stdint.h>

#define DIR_VERSION 1u
#define DIR_SLOT 96u      /* bytes for each unit */
#define DIR_SEQ_UNITS 16u /* units for each sequence record */
#define DIR_POS_WORDS 64u /* of a page's position bitmap at most */

struct dram_dir {
	uint64_t id; /* of the segment; 0: no directory */
	uint8_t *slots;
	struct dir_seq *seq;
	uint32_t units, seqs;
	/* private: how many pages refer to a record, and the records by hash */
	uint32_t *refs, *next, *bucket;
	uint32_t mask, free_head;
	bool settled;
};

/* One record, checked. */
struct dir_page {
	struct page_meta meta; /* pos is words; seq_info is the sequence record's number */
	struct seq_record seq;
	struct alloc_place place;
	uint64_t words[DIR_POS_WORDS];
};

/* Bytes that follow a payload of so many. */
uint64_t dir_bytes(uint64_t payload);
/* Begin a directory in a fresh segment. 0 or -ENOMEM. */
int dir_make(struct dram_dir *ret, const struct seg *s, uint64_t payload, uint64_t id);
/*
 * Find the directory of a segment that an earlier life made; then dir_get() and dir_keep() for each page that
 * shall stay, dir_wipe() for every other, dir_settle(). 0, -ENOMEM, or -EPROTO with *why set.
 */
int dir_adopt(struct dram_dir *ret, const struct seg *s, uint64_t id, uint64_t *ret_payload, const char **why);
void dir_free(struct dram_dir *d);
/* Have these positions room in the slots of a page of so many bytes? */
bool dir_fits(uint32_t bytes, const uint64_t *pos, uint32_t pos_words);
/* A page that is now in its place: remember it, or not where there is no room for that. */
void dir_put(struct dram_dir *d, uint32_t unit, const struct alloc_place *p, const struct page_meta *m,
	     const struct seq_record *seq);
/* The page that was put or kept there leaves: called before its place may get another. */
void dir_del(struct dram_dir *d, uint32_t unit);
/* What dir_get() found is not kept, or is no record. */
void dir_wipe(struct dram_dir *d, uint32_t unit);
/* 1 a record, 0 none, -EBADMSG something that is none any more. */
int dir_get(const struct dram_dir *d, uint32_t unit, struct dir_page *ret);
void dir_keep(struct dram_dir *d, const struct dir_page *p);
void dir_settle(struct dram_dir *d);
