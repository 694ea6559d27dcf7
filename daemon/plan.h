/* SPDX-License-Identifier: MIT */
#pragma once
/* A decision on its way, and who makes it. Part of internal.h; the event loop's but where a function says so.
 */
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>
#include "daemon/pages.h"
#include "daemon/seq.h"
#include "shm/plan.h"

struct pool_bid;

#define PLAN_RETRIES 5u /* of a plan that could not be carried out; the last one promotes nothing */

enum plan_phase { PHASE_SCORE, PHASE_DECIDE, PHASE_MOVE, PHASE_READY };

/*
 * One decision on its way. While refs > 0 workers read the sequence's device
 * bitmaps, the tables and the region, and in PHASE_DECIDE its whole index;
 * whoever wants to change those waits for seq_step().
 */
struct plan {
	struct seq *seq;
	uint64_t id;
	uint32_t epoch, watermark, from, words; /* rows [from, watermark) have no key yet */
	uint32_t plane_from;                    /* the sequence's */
	enum plan_phase phase;
	bool over; /* applied, cancelled or not to be published: forget it when nothing is lent */
	bool requested, saving, private_tables, direct;
	bool write_through;
	bool lossless;     /* its budgets promise to drop nothing */
	bool stuck;        /* rows stay on the device because nothing below takes them */
	bool promote_none; /* too many plans before it missed */
	uint32_t protect_first, protect_last, hysteresis;
	bool rescore;   /* the keys are another policy's: device rows are scored anew, rows below keep theirs */
	uint16_t *keys; /* [lanes][watermark] where the index keeps coefficients, until decided; else NULL */
	uint16_t *worth;      /* [lanes][watermark] where budgets are adaptive, until decided; else NULL */
	struct pool_bid *bid; /* where they are shared with other sequences, else NULL */
	struct plan_tables t;
	struct plan_mem *mem;
	struct region *region;
	struct policy_use *use;
	void *scratch; /* the bitmaps and arrays below; kept in the core's pool */
	size_t scratch_bytes;
	uint64_t *to_dram, *to_nvme, *drop, *pinned, *wanted;
	uint32_t *budget[KVT_TIERS], *kept, *out, *in, *dropped; /* [lanes] */
	uint64_t rows_out, rows_in, rows_drop, rows_kept;
	uint64_t started_ns, decide_ns; /* when it began, when its decision was put */
	uint64_t journal;               /* its record: as many had been made then; 0: none */
	uint8_t cause, limits;          /* of its end, of its budgets: see journal.h */
	uint32_t asked[KVT_TIERS];      /* budgets of lane 0 before anything limited them */
	uint16_t lowest_kept, highest_gone;
	uint32_t refs;
	int error; /* of a job: -errno */

	/* mover: refs is 1 + pages in flight while it works */
	struct cut_at cut; /* of the page to be made next */
	uint32_t in_lane;
	uint64_t *need; /* scratch: rows of lane in_lane without a source so far */
	bool in_begun;  /* lane in_lane's are in it */
	bool out_done, in_done, moving, missed;
	struct window_plan *win; /* NULL: the device rows are in the region */
	TAILQ_ENTRY(plan) pump;
};
static inline bool plan_lent(const struct seq *s)
{
	return s->plan && s->plan->refs;
}
/* ---- manager.c --------------------------------------------------------------------- */
/* Start a plan when one is due. */
void manager_consider(struct seq *s);
/* There was no memory for what is due: not before a tenth of a second has passed. */
void manager_put_off(struct seq *s);
bool manager_waits(struct seq *s);
/* Begin a plan now: 0, or -errno. save: nobody applies it, nothing is kept in the device tier. */
int manager_plan(struct seq *s, bool save);
/* The decide job of p ended; its reference is ours now: the tables are filled, or p->error says why not. */
void manager_decided(struct plan *p);
/*
 * No plan, for this -errno. Memory comes back: what is due waits for it. What failed otherwise would fail again
 * at once: it waits for the next request or rows, and whoever asked is told.
 */
void manager_failed(struct seq *s, int error);
/* A cancelled plan is made anew: what it was asked for is not forgotten. */
void manager_again(struct plan *p, bool at_once);
/* What a client does cancels the plan, if there is one. If it was asked for, the next one answers. */
void manager_redo(struct seq *s);
/* All moves of p ended. */
void manager_moved(struct plan *p);
/* ---- manager_work.c ----------------------------------------------------------------- */
/* Give the workers what p needs. It may be decided, and over, when this returns. 0 or -errno. */
int manager_work(struct plan *p);
/* Every scoring job of p ended: decide. */
void manager_scored(struct plan *p);
/* ---- manager_applied.c -------------------------------------------------------------- */
/* The client (or nobody, when saving) applied the plan. nack: bitmap of lanes or NULL. */
void manager_applied(struct seq *s, struct plan *p, const uint64_t *nack);
/* Count anew how many rows may come before a plan is due. */
void manager_headroom(struct seq *s);
/* ---- plan.c ------------------------------------------------------------------------- */
/* Scratch and tables for the rows of the plan; on failure plan_free() the plan. */
int plan_alloc(struct plan *p, bool private_tables);
/* What its policy needs to keep in the index and in the plan; p->use is known. -ENOMEM. */
int plan_alloc_keys(struct plan *p);
/* Keys to rank the lane by, of rows [0, watermark). */
static inline const uint16_t *plan_keys(const struct plan *p, uint32_t lane)
{
	return p->keys ? p->keys + (size_t)lane * p->watermark : p->seq->ix.key + (size_t)lane * p->seq->ix.cap;
}
void plan_free(struct plan *p);
/* Fill the visible header and the lanes' counts. */
void plan_header(const struct plan *p);
/* Fill the tables. Any thread, with the index lent. */
int plan_decide(struct plan *p);
void plan_cancel(struct plan *p);
void plan_unref(struct plan *p);
/* Nothing is lent any more: forget it. */
void plan_forget(struct plan *p);

/* ---- budget.c ---------------------------------------------------------------------- */
/* Rows per lane and tier that this plan may use: what was asked for, clipped by quota and space. */
void budget_for(struct plan *p);
/* After the decision: no lane may promote more rows than it has stage slots. Worker. */
int budget_stage(struct plan *p);
/* ---- adaptive.c -------------------------------------------------------------------- */
/* Make p->worth where this plan's device budgets are to be adaptive; budget_for() is done. -ENOMEM. */
int adaptive_begin(struct plan *p);
/* What the lane's rows are worth; its keys are there. Worker. */
void adaptive_weigh(struct plan *p, uint32_t lane);
/* Device budgets from all lanes' worth. Worker. 0 or -ENOMEM. */
int adaptive_divide(struct plan *p);
/* The plan is decided: its sequence remembers. */
void adaptive_done(struct plan *p);

/* ---- share.c ----------------------------------------------------------------------- */
/* Bid for a part of what the sequences of this owner share, or leave them; adaptive_begin()'s. -ENOMEM. */
int share_begin(struct plan *p);
/* What becomes of the bid: the plan was decided; it was applied, by all lanes; nothing comes of it. */
void share_decided(struct plan *p);
void share_settled(struct plan *p, bool all);
void share_dropped(struct plan *p);
/* The rows of s go back to where they came from. */
void share_leave(struct seq *s);
/* Plan again who can give rows to others or get some: a slice of work; true: there is more. */
bool share_pump(struct core *c);
uint64_t share_bytes(const struct seq *s);
/* Device rows that it holds and that it brought, over all lanes; false: it shares none. */
bool share_rows(const struct seq *s, uint64_t *ret_held, uint64_t *ret_brought);
