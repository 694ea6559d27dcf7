/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Plans of sequences whose device rows only their client reaches, and how the rows that any plan copies out are
 * cut into pages. Event-loop thread but where it says worker.
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/pages.h"

struct plan;
struct pio;
struct seq;

/* Pages as a plan's copy_out is cut into them: see cut.c. */
struct cut {
	uint64_t word[PAGE_SPAN + 1]; /* positions from `first` on */
	uint32_t first, span, rows;
	uint32_t end; /* where the next page may begin */
};
struct cut_at {
	uint32_t lane, pos;
	int tier;
};

/* What a plan with a window adds: see window.c. */
struct window_plan {
	uint32_t pages, gathered, next,
		taken;    /* of the list: all, announced, in hand, in buffers of ours in order */
	uint64_t *copied; /* [BITS_WORDS(pages)] taken, in any order */
	struct window_record {
		uint64_t end;      /* of the in ring, counted as if it had no end */
		struct page *page; /* pinned: read where it lies, until the record is drained; or NULL */
		bool done;
	} * record;
	uint32_t records, room, staged, drained;
	bool direct; /* some were to be read where they lie */
};

/* ---- cut.c ----------------------------------------------------------------------------------- */
/*
 * From `at` on, which begins at {.tier = dram}: the plan's next page, and `at` moved to its lane and tier. The
 * one behind it is found from at->pos = ret->end. false: no more.
 */
bool cut_find(const struct plan *p, struct cut_at *at, struct cut *ret);

/* ---- window.c, window_out.c, window_in.c --------------------------------------------------------- */
/* One look at slot.gathered and slot.drained. false: the client was ended. */
bool window_poll(struct seq *s);
/* The decided plan's list of pages. Worker. 0 or -ENOMEM, -ENOSPC. */
int window_list(struct plan *p);
void window_free(struct plan *p);
/* Nothing of this plan is left in the rings (or it failed). */
bool window_settled(const struct plan *p);
/* The client refused the plan before it was READY: pages that it read in place are wrong, or it is. Look here.
 */
void window_refused(struct plan *p);
/* Nothing of it is in our hands: it waits for its client. */
bool window_rests(const struct plan *p);
/* The next page of the list is not in the ring yet. */
static inline bool window_waits(const struct window_plan *w)
{
	return w->next == w->gathered && w->next < w->pages;
}
/* Copy a page from the ring into its buffer and check it: 0, or -EILSEQ: it is not what was announced. Worker.
 */
int window_take(const struct plan *p, struct pio *io);
/* These are copied, or not. */
void window_taken(struct plan *p, struct pio *const *io, unsigned n);
/*
 * A record for the rows io->words of its page, before it is read, or named where it lies (io->segment). 0,
 * -EAGAIN (the ring is full), -ENOMEM. Once the plan missed there are no more records: WINDOW_NO_RECORD.
 */
#define WINDOW_NO_RECORD UINT32_MAX
int window_reserve(struct plan *p, struct pio *io);
/* Write the record of a checked page. Worker. 0 or -ENOSPC. */
int window_pack(const struct plan *p, const struct pio *io);
/* Announce the records that are there. */
void window_stage(struct plan *p);
/* The client needs records below n no longer. */
void window_drained(struct plan *p, uint32_t n);
