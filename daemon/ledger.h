/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The ledger: which leased sequences there are, and what was cut off them, in a file beside the NVMe tier's
 * containers. Pages reach the disk when their segment is sealed, which may be before or long after the client
 * was told that some of their rows are gone; so a daemon that is killed needs to know what it had promised. An
 * entry is written when a sequence begins, before a truncation is answered, and taken out before an end is
 * answered.
 *
 * One entry is 512 bytes at a fixed place, written by one pwrite() that lies within a page of the page cache: a
 * daemon that is killed has written all of it or nothing. It is not flushed but by ledger_sync(): after a power
 * failure entries may be missing or old, then ledger_complete() is false and the notes of note.c decide.
 *
 * Event-loop thread. Errors are -errno.
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/index.h"

#define LEDGER_NAME "kvtier-ledger"
#define LEDGER_NONE UINT32_MAX
#define LEDGER_MARKS 51u

struct ledger_entry {
	uint32_t crc; /* of the rest, seeded with the entry's place */
	uint32_t n;   /* marks */
	uint64_t tenant;
	uint8_t key[16];
	uint64_t floor;  /* pages with lower numbers are of an earlier sequence of that name */
	uint32_t epoch;  /* of the sequence */
	uint32_t oldest; /* pages of earlier epochs are not believed: their marks did not fit */
	/* Who it is where no page of it is left to tell. */
	uint64_t born; /* later than every earlier sequence of that name */
	uint64_t model;
	uint8_t secret_hash[32];
	uint32_t lanes, pad;
	struct epoch_mark mark[LEDGER_MARKS];
};
_Static_assert(sizeof(struct ledger_entry) == 512, "one sector on disk");

struct ledger;

/* Open or make the file in the directory `dir`. A file that is none, or is of another version, is made anew. */
int ledger_open(struct ledger **ret, const char *dir);
/* Is there one? */
bool ledger_exists(const char *dir);
/* What is in the file stays. NULL is fine. */
void ledger_close(struct ledger *l);
/* Every leased sequence that has not ended has an entry: one that has none has ended. */
bool ledger_complete(const struct ledger *l);
/* During a restart: the intact entry of that name and its place, or NULL. */
const struct ledger_entry *ledger_find(struct ledger *l, uint64_t tenant, const uint8_t key[16],
				       uint32_t *ret_place);
/* During a restart: the next one that nobody took (ledger_take); *cursor starts at 0. NULL at the end. */
const struct ledger_entry *ledger_next(struct ledger *l, uint32_t *cursor, uint32_t *ret_place);
/* The restart is over: entries that nobody took (ledger_take) end. */
int ledger_settle(struct ledger *l);
/* A place for a new entry / the place of one that was found is in use. */
uint32_t ledger_new(struct ledger *l);
void ledger_take(struct ledger *l, uint32_t place);
/* Write it; e->crc is filled in. */
int ledger_put(struct ledger *l, uint32_t place, struct ledger_entry *e);
/* The sequence has ended. The place is used again as late as possible. */
int ledger_end(struct ledger *l, uint32_t place);
void ledger_sync(struct ledger *l);
