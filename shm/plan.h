/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The plan area of one sequence, in published memory: the daemon writes, the
 * client reads. One plan is outstanding at a time and its tables are immutable
 * from the moment `id` becomes visible until the client acknowledges it or the
 * daemon cancels it.
 *
 *   DECIDED  tables are final; rows in copy_out must not be overwritten yet
 *   READY    every copy_out row is safe below, every bring_in row is staged:
 *            the client may apply the plan
 *   CANCELLED  forget it (truncate, fork, a missed promotion): nothing changed;
 *              another one follows, unless `given_up` says that none does
 *
 * Rows at or past `watermark` always stay. In the device tier rows are packed in
 * ascending position, so a row's slot is the number of resident rows below it.
 * Promoted rows wait, ascending, in the lane's stage slots [cap, cap + in).
 *
 * Layout: plan_hdr, plan_lane[lanes], then three bitmaps per lane of `words`
 * 64-bit words each, plane after plane: resident_after[lanes][words],
 * copy_out[lanes][words], bring_in[lanes][words]. With PLAN_F_WINDOW a fourth,
 * to_dram[lanes][words], and, from the next multiple of 64 bytes on,
 * plan_page[out_pages]: the client's GPU carries the plan out through its
 * exchange window (window.h). Slots then are the client's business.
 */
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "shm/window_page.h"

#define PLAN_PAGE_SPAN 32u /* words of a page's position bitmap at most */

enum plan_state {
	PLAN_EMPTY = 0,
	PLAN_DECIDED = 1,
	PLAN_READY = 2,
	PLAN_CANCELLED = 3,
};

enum {
	PLAN_F_EQUAL_LANES = 1, /* every lane keeps the same number of rows */
	PLAN_F_WINDOW = 2,      /* rows move through the sequence's window */
};

struct plan_hdr {
	_Atomic uint64_t id;    /* 0 while the tables are being written; rises by 1 per plan */
	_Atomic uint32_t state; /* enum plan_state */
	uint32_t epoch;         /* of the sequence when decided */
	uint32_t watermark;     /* rows the plan speaks of */
	uint32_t lanes;
	uint32_t words; /* per bitmap: BITS_WORDS(watermark) */
	uint32_t flags;
	uint64_t decided_ns;                   /* CLOCK_MONOTONIC */
	uint64_t rows_out, rows_in, rows_drop; /* over all lanes */
	uint32_t policy;                       /* enum policy_id, for display */
	uint32_t out_pages;                    /* PLAN_F_WINDOW: entries of plan_page */
	_Atomic uint32_t taken;     /* of those the daemon has copied, in order: their places are free */
	_Atomic uint32_t staged;    /* records in the in ring so far */
	_Atomic uint64_t given_up;  /* no plan of an id up to this one comes any more; 0: none was given up */
	_Atomic uint32_t given_why; /* of that: a KVT_E_*, as a positive number */
	uint32_t reserved32;
	uint64_t reserved[4];
};
_Static_assert(sizeof(struct plan_hdr) == 128, "two cache lines");
_Static_assert(offsetof(struct plan_hdr, decided_ns) == 32, "layout");

struct plan_lane {
	uint32_t kept; /* rows resident after the plan, below the watermark */
	uint32_t out;  /* rows to copy out before they may be overwritten */
	uint32_t in;   /* rows staged for promotion */
	uint32_t drop; /* rows leaving for good */
};

/* A checked, private copy of where things are; the tables stay in published memory. */
struct plan_view {
	uint64_t id;
	uint32_t state, epoch, watermark, lanes, words, flags;
	uint32_t policy;
	uint64_t decided_ns;
	uint64_t rows_out, rows_in, rows_drop;
	const struct plan_hdr *hdr;
	const struct plan_lane *lane;
	const uint64_t *resident, *copy_out, *bring_in; /* lane l starts at l * words */
	const uint64_t *to_dram;                        /* likewise; NULL without PLAN_F_WINDOW */
	const struct plan_page *page;                   /* [out_pages], or NULL */
	uint32_t out_pages;
};

/* Bytes of a plan area for `lanes` and up to `max_rows` rows, rounded to 64. */
size_t plan_bytes(uint32_t lanes, uint32_t max_rows);
/* The same for one with a window whose pages hold up to page_rows (1..128) rows. */
size_t plan_bytes_window(uint32_t lanes, uint32_t max_rows, uint32_t page_rows);

/*
 * Daemon. Begin a plan for rows [0, watermark): hides the old one (id 0, state EMPTY), returns writable tables,
 * zeroed. -EINVAL, or -ENOSPC when they do not fit in `bytes`; then the old plan stays visible.
 */
struct plan_tables {
	struct plan_hdr *hdr;
	struct plan_lane *lane;
	uint64_t *resident, *copy_out, *bring_in;
	uint32_t words;
	uint64_t *to_dram;      /* NULL without a window */
	struct plan_page *page; /* [max_pages]; hdr->out_pages says how many count */
	uint32_t max_pages;
};
int plan_begin(void *area, size_t bytes, uint32_t lanes, uint32_t watermark, struct plan_tables *ret);
/* The same for a sequence with a window: PLAN_F_WINDOW, and room for as many pages as `bytes` has. */
int plan_begin_window(void *area, size_t bytes, uint32_t lanes, uint32_t watermark, struct plan_tables *ret);
/* Daemon. Make it visible with this id in state DECIDED (or READY when nothing has to move). */
void plan_publish(struct plan_tables *t, uint64_t id, enum plan_state state);
/*
 * Daemon. Whoever waits for a plan of an id up to this one waits in vain: it could not be made or carried out,
 * why: a KVT_E_* without its sign. Until the next plan is published; survives plan_begin().
 */
void plan_give_up(void *area, uint64_t id, uint32_t why);
/* Daemon. Advance the state of the visible plan. */
void plan_set_state(void *area, enum plan_state state);
/* Daemon. Advance the cursors of a visible plan with a window. */
void plan_set_taken(void *area, uint32_t taken);
void plan_set_staged(void *area, uint32_t staged);

/*
 * Client. Read the newest plan: no lock, no system call. 1 a plan is visible,
 * 0 none, -EPROTO when the tables do not fit in `bytes` or in `lanes`.
 */
int plan_peek(const void *area, size_t bytes, uint32_t lanes, struct plan_view *ret);
/* Client. The id up to which plans were given up, 0 none; *ret_why is set then. */
uint64_t plan_given_up(const void *area, size_t bytes, uint32_t *ret_why);
/* Client. The cursors as they are now. Only while plan_still() says that they are this plan's. */
uint32_t plan_taken(const struct plan_view *v);
uint32_t plan_staged(const struct plan_view *v);
/* Client. True while the view still describes the visible plan: the same id, and not cancelled since. */
bool plan_still(const struct plan_view *v);
