/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * libkvtier's CUDA side, inside: windows, scorers and the GPU's part of a sequence. Private to ipc/cuda and
 * ipc/client.
 *
 * A sequence belongs to one thread at a time, so its struct cuda_seq is not locked; what other threads may ask
 * for (rows, residency) is in struct kvtier_seq and under the connection's lock, which is never held across a
 * call of the driver. Everything that the GPU does for a sequence is on the stream of the call that started it,
 * in order, followed by one word (kvt_word) with a number that rises: poll compares, the driver is not asked.
 */
#include "ipc/client/client.h"
#include "ipc/cuda/kernels.h"
#include "ipc/kvtier_cuda.h"
#include "shm/scorer.h"

#define CUDA_PUSHES 16u         /* of rows, in flight */
#define CUDA_SCATTER_PAGES 512u /* pages coming in, in flight */
#define CUDA_TICKETS 64u        /* things in flight of which the host wants to know */

/* ---- window.c ---- */

/* A part of a window that a sequence has. */
struct cuda_extent {
	LIST_ENTRY(cuda_extent) entry; /* ascending */
	uint64_t off, bytes;
};

struct kvtier_cuda_window {
	struct kvtier_cuda *g;
	struct kvtier_region *r;        /* which owns this */
	uint64_t addr;                  /* of the region's first byte, for the GPU */
	LIST_HEAD(, cuda_extent) taken; /* under the connection's lock */
};

/* A place for `bytes`, 4 KiB aligned. Errors: NOSPC, NOMEM. */
int extent_take(struct kvtier_cuda_window *w, uint64_t bytes, struct cuda_extent **ret);
/* NULL is fine. */
void extent_give(struct kvtier_cuda_window *w, struct cuda_extent *e);
/* Its region is about to go: unregister it. Not under the connection's lock unless nobody is left. */
void window_detach(struct kvtier_region *r);

/* ---- scorer_get.c ---- */

#define SCORER_RUNS 8u /* kvtier_cuda_scorer_run() calls in flight */

struct kvtier_cuda_scorer {
	struct kvtier_cuda *g;
	struct scorer_hdr h; /* checked */
	uint64_t addr;       /* of the whole, in GPU memory */
	char policy[32];
	uint32_t lanes; /* of the model */
	/* kvtier_cuda_scorer_run(): lanes of the last calls, each with an event behind its kernels */
	struct cuda_lane *lane; /* [SCORER_RUNS][lanes], pinned */
	uint64_t lane_addr;
	void *event[SCORER_RUNS];
	uint32_t runs;
};

/* Does a prepared network in a segment of so many bytes fit itself and a model of so many lanes? 0 or
 * KVT_E_VERSION with a line. */
int scorer_check(const struct scorer_hdr *h, uint64_t size, uint32_t lanes);

/* ---- seq.c, step.c, plan.c, settle.c ---- */

enum cuda_work {
	CUDA_PUSH = 1, /* n: rows known to the daemon from then on */
	CUDA_START,    /* one of cuda_seq.starts is free again */
	CUDA_TABLES,   /* cuda_seq.pinned_tables is free again */
	CUDA_GATHER,   /* n: pages of `plan` in the ring */
	CUDA_SCATTER,  /* n: records of `plan` read; pages: of the staging, free again */
	CUDA_APPLY,    /* `plan` is carried out */
};
struct cuda_ticket {
	uint64_t number, plan;
	enum cuda_work work;
	uint32_t n, pages;
};

/* The newest plan, as taken over: checked, its tables copied. */
struct cuda_plan {
	uint64_t id; /* 0: none */
	uint32_t state, watermark, words, out_pages;
	uint32_t gathered;                                        /* pages whose copy was launched */
	uint32_t records;                                         /* whose copy was launched */
	uint64_t in_at;                                           /* of the in ring: the next record */
	const uint64_t *resident, *copy_out, *bring_in, *to_dram; /* [lanes][words], in pinned_tables */
	const struct plan_page *page;
	uint64_t plane, page_off; /* bytes of a table; of `page` from the tables' start */
	uint32_t kept;            /* rows of the longest lane after it, below the watermark */
	bool spoilt; /* to be refused: a page that came in was damaged, or there is no room for so many rows */
};

/*
 * The GPU's part of a sequence. Blocks of memory: in GPU memory maps and lanes, and the plan's tables; pinned
 * the word, what is on its way to the GPU, and the tables again.
 */
struct cuda_seq {
	struct kvtier_cuda *g;
	struct kvtier_cuda_window *w;
	struct kvtier_cuda_scorer *scorer; /* or NULL */
	struct cuda_extent *place;         /* both rings, then the score plane */
	struct window_place ring;
	uint64_t score_off; /* in the region; 0: none */
	uint32_t cap, stage, flags;
	void *stream;                     /* of the last call */
	struct kvtier_cuda_layer *layers; /* [n_layers] where the rows are now */
	int broken;                       /* KVT_E_* after a failure that left the slots unknown */

	/* Rows: appended; of them, pushed; with a slot in the maps, and scored, both as launched. */
	uint32_t appended, pushed, extended, scored;
	uint32_t most; /* rows of the longest lane */

	uint64_t dev;                      /* GPU memory */
	uint64_t slot_of, pos_of, scratch; /* in it: uint32_t [lanes][max_rows], [lanes][cap + stage] */
	uint64_t lane[2]; /* struct cuda_lane [lanes]: of `layers`, and of what apply moves to */
	unsigned lane_now;
	uint64_t tables, table_bytes; /* GPU memory: a copy of the plan's tables, and room there */

	char *pinned; /* and its address for the GPU */
	uint64_t pinned_addr;
	_Atomic uint64_t *word;     /* the newest ticket that is through */
	_Atomic uint32_t *bad;      /* damaged pages so far */
	uint32_t *starts;           /* [CUDA_PUSHES][lanes] */
	uint32_t *counts;           /* [3][lanes]: before, coming in, after */
	struct cuda_lane *lane_new; /* [lanes] */
	struct scatter_page *pages; /* [CUDA_SCATTER_PAGES] */
	char *pinned_tables;

	struct cuda_ticket ticket[CUDA_TICKETS]; /* a ring: [first, last) */
	uint32_t first_ticket, last_ticket;
	uint64_t issued, sent; /* newest ticket, and newest whose kvt_word() was launched */
	uint64_t stuck_ns;     /* when the driver was asked last, or the word moved */
	uint32_t next_start, starts_used;
	uint32_t next_page, pages_used;
	uint32_t bad_seen;
	bool tables_used;
	struct cuda_plan plan;
	uint64_t applied; /* carried out, not acknowledged, or 0 */
	uint64_t bytes_out, bytes_in;

	struct wire_budget budget; /* as given last; set 0: never */
	uint32_t *table;           /* [lanes] of it */

	/* Other rooms': they end with the sequence. */
	struct cuda_direct *direct; /* direct.h: segments and directory; NULL: not DIRECT, or not used yet */
	uint32_t revokes;           /* of the link, as answered */
	bool yielding, yielded;     /* segments wait for the stream; recall must be prepared again */
	struct cuda_recall *recall; /* recall.h: summaries and scratch; NULL: not used yet */
};

/* The GPU's part, or NULL with a line: no sequence, or one whose rows are on the host. */
struct cuda_seq *cuda_seq_of(struct kvtier_seq *s);
/* Give back everything on the GPU, waiting for what is in flight; no word to the daemon. Does nothing for
 * others. */
void cuda_seq_free(struct kvtier_seq *s);
/* Not even the daemon's answer is known: what it may still use of the window is never used again. */
void cuda_seq_leak_place(struct kvtier_seq *s);
/* What an open message says of the window and the scorer. */
void cuda_seq_wire(const struct kvtier_seq *s, struct wire_seq_open *m);
void cuda_seq_budget(struct kvtier_seq *s, const struct wire_budget *b, const uint32_t *table);
int cuda_layers_check(const struct kvtier_model *m, const struct kvtier_cuda_layer *l);
/* May its thread use the sequence now? 0, INVAL, FORKED, DAEMON, STALE, or what broke it. */
int cuda_gate(struct kvtier_seq *s);
/* Rows of a lane in the device tier. */
uint32_t cuda_count(const struct kvtier_seq *s, uint32_t lane);
/* Count the longest lane again. */
void cuda_recount(struct kvtier_seq *s);

/* ---- memory.c ---- */

/* What does not depend on the daemon's answer; waits for the GPU. The device's context is current. */
int cuda_memory_make(struct cuda_seq *q, const struct kvtier_model *m, uint32_t max_rows);
/* Room for a plan's tables, once it is known how large they may be. */
int cuda_tables_make(struct kvtier_seq *s);
void cuda_memory_free(struct cuda_seq *q);
void cuda_lanes_fill(const struct kvtier_model *m, const struct kvtier_cuda_layer *layers,
		     struct cuda_lane *ret);

/* ---- step.c ---- */

/* Room for `n` more things in flight. */
bool ticket_room(const struct cuda_seq *q, uint32_t n);
void ticket_add(struct cuda_seq *q, enum cuda_work work, uint64_t plan, uint32_t n, uint32_t pages);
/* Have the stream tell when it has come to the newest ticket. */
int ticket_send(struct cuda_seq *q, void *stream);
static inline bool tickets_pending(const struct cuda_seq *q)
{
	return q->first_ticket != q->last_ticket;
}
/* See which are through and tell the daemon. */
int tickets_collect(struct kvtier_seq *s);
/* Give all appended rows their slots. Launches; KVT_E_BUSY when too much is in flight. */
int cuda_extend(struct kvtier_seq *s, void *stream);
/* That, and scores for rows below `rows`, who then become known to the daemon. */
int cuda_push(struct kvtier_seq *s, uint32_t rows, void *stream);

/* ---- take.c, carry.c ---- */

int cuda_take_over(struct kvtier_seq *s, const struct plan_view *v, void *stream);
/* KVT_E_PROTO with a line. */
int plan_refuse(const struct plan_view *v, const char *what, uint32_t lane);

/* Take over a plan that is visible, launch what it needs, forget one that is over. */
int cuda_plan_step(struct kvtier_seq *s, void *stream);

/* ---- settle.c ---- */

/* Wait for everything in flight, and see it. */
int cuda_quiesce(struct kvtier_seq *s);
/* Before a truncate: all is at rest and rows up to n are known to the daemon. Behind it: the slots close up. */
int cuda_truncate_begin(struct kvtier_seq *s, uint32_t n);
int cuda_truncate_end(struct kvtier_seq *s, uint32_t n);

/* ---- recall.c ---- */

/* Where bytes [off, off + n) of a published segment lie for the GPU; maps it when it is new. */
int cuda_direct_address(struct kvtier_seq *s, uint32_t segment, uint64_t off, uint64_t n, uint64_t *ret);
/* Give published DRAM back when the daemon asked for it. The context need not be current. */
int cuda_direct_yield(struct kvtier_seq *s, void *stream);
/* End what direct reads and recall hold of a sequence, waiting for its stream. */
void cuda_direct_free(struct kvtier_seq *s);
