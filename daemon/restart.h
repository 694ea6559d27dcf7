/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Within a restart: restart.c finds pages and whose they are, note.c what was cut off them, rebuild.c makes the
 * index of what is believed. Event-loop thread; while a restart runs, nobody else uses the tiers.
 */
#include "daemon/seq.h"

#define NOTE_MAGIC 0x314f4e5453455651u
#define NOTE_BYTES KVT_UNIT
#define NOTE_MARKS ((NOTE_BYTES - 24) / sizeof(struct epoch_mark))

struct note {
	uint64_t magic;
	uint32_t rows, epoch, n, pad;
	struct epoch_mark mark[NOTE_MARKS];
};
_Static_assert(sizeof(struct note) == NOTE_BYTES, "one unit on disk");

/* The page is a note of s; what it had there before goes. Takes no reference of the caller's. */
void restart_note_take(struct seq *s, int tier, struct page *p);
/* The newest note, if it is of the newest epoch. 0, -ENOENT, -ESTALE, -EBADMSG, -ENOMEM, -EIO. */
int restart_find_note(struct core *c, const struct seq *s, struct note *ret);
/* Index and counts of a sequence whose pages were found. -ENOENT: nothing to believe; -ENOMEM. */
int restart_rebuild(struct core *c, struct seq *s);
