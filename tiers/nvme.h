/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Inside the NVMe tier. One owner thread (the event loop) runs everything here;
 * only the io engine's threads run beside it, and they see nothing but struct io_req.
 *
 * A segment's life:
 *
 *   FREE → READY     picked, its head with a new sequence number is being written and flushed
 *        → OPEN      belongs to a stream; pages get consecutive places
 *        → CLOSING   full (or sync): waits for writes prepared or in flight
 *        → SEALING   live maps, table and foot are written and flushed (nvme_seal.c)
 *        → SEALED    durable; pages die one by one, or the cleaner moves them
 *        → FREE      nothing lives in it; not reused before the last reader let go
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>
#include "tiers/nvme_format.h"
#include "tiers/nvme_io.h"
#include "tiers/tier.h"

#define NVME_COLD 2u /* the cleaner's own lifetime class: what survived once tends to survive */
#define NVME_CLASSES 3u
#define NVME_MAX_STREAMS 4u /* per class */
#define NVME_MAX_FILES 64u
#define NVME_SLAB TIER_MAX_PAGE
#define NVME_READY 2u /* segments whose head is written ahead of need */

struct nvme;
struct nvme_seg;
struct nvme_slab;

/* What tests may replace. Zero: the real thing. */
struct nvme_knobs {
	const struct io_ops *engine; /* instead of io_uring or threads */
	uint32_t file_segments;      /* segments per container file (default: 1 TiB worth) */
};
int nvme_open_with(struct tier **ret, const struct tier_cfg *cfg, const struct nvme_knobs *knobs, char *err,
		   size_t errsize);

/* One request to the engine and what it was for. */
struct nvme_req {
	struct io_req io;
	TAILQ_ENTRY(nvme_req) link; /* nvme.inflight, oldest first */
	uint64_t start_ns;
	void (*done)(struct nvme *t, struct nvme_req *r); /* io.res is final; frees nothing of r */
	struct nvme_seg *seg;
	struct nvme_slab *slab; /* of ios */
	struct tier_io *ios;    /* the pages in it, by next */
	unsigned pages;
	void *owned; /* buffer that goes with the request */
	bool data;   /* pages: held back until the segment's head is durable */
	bool orphan; /* given up at the deadline: when it does come back, only its memory matters */
};
TAILQ_HEAD(nvme_reqs, nvme_req);

/* struct tier_io.priv: [0] slab, [1] enum nvme_io_stage, [2] segment, [3] table bytes promised << 32 | unit. */
enum nvme_io_stage {
	IO_IDLE = 0,
	IO_PREPARED = 0x70726570,
	IO_SUBMITTED,
	IO_FINISHED,
	IO_LEAKED, /* finished by the deadline: the buffer may still be written to, and stays ours */
};

/* The table of a segment that is not sealed yet (or whose moves are not announced yet). */
struct nvme_build {
	struct nvme_entry *entry;
	struct seq_record *seq;
	uint8_t *pos;
	uint32_t pages, page_cap, seqs, seq_cap, pos_bytes, pos_cap;
	uint32_t reserved;  /* table bytes promised to pages prepared but not submitted */
	uint32_t relocated; /* entries that name a source */
	uint32_t announced; /* entries told to the owner so far */
};

enum nvme_state { NVME_FREE, NVME_IS_READY, NVME_OPEN, NVME_CLOSING, NVME_SEALING, NVME_SEALED };

struct nvme_seg {
	TAILQ_ENTRY(nvme_seg) link;       /* nvme.ready, nvme.closing or nvme.announce */
	TAILQ_ENTRY(nvme_seg) dirty_link; /* nvme.dirty */
	uint64_t seq, seal, map_generation;
	uint64_t old_seq, old_generation; /* of the use before, while replacing */
	uint64_t *live;                   /* bit u: a live page starts at unit u */
	struct nvme_build build;
	struct io_queue held; /* data writes that wait for the head */
	uint32_t index, cursor, live_units, table_units;
	uint32_t prepared, inflight; /* writes of pages: reserved; with the engine or held */
	uint32_t pins;               /* reads and map writes in flight: no reuse */
	uint8_t state, life;
	bool head_ok, failed; /* head is durable; a write of head or foot failed */
	bool unsealed;        /* its foot could not be written: no restart finds its pages */
	bool map_dirty;       /* pages died that the disk still shows */
	bool replacing;       /* the same, and the head under way is what will say so */
	bool victim;          /* the cleaner is at it, or has been */
	bool announcing;      /* on nvme.announce */
};
TAILQ_HEAD(nvme_segs, nvme_seg);

/* One place of appending. */
struct nvme_stream {
	struct nvme_seg *seg;
	struct nvme_slab *slab;
	uint8_t owner[16]; /* sequence key that used it last */
	uint64_t used;     /* when, in prepares */
};

enum nvme_slab_kind { SLAB_WRITE, SLAB_READ, SLAB_CLEAN, SLAB_KINDS };

/* Staging is cut into slabs; buffers in a slab are handed out one after the other. */
struct nvme_slab {
	char *mem;
	struct nvme_slab *next_free, **current; /* who still hands out from it */
	uint32_t units, refs;
	uint8_t kind;
};

enum nvme_step {
	STEP_IDLE,
	STEP_MAPS,
	STEP_HEADS,
	STEP_MAP_SYNC,
	STEP_FOOT,
	STEP_FOOT_WRITTEN,
	STEP_FOOT_SYNC
};

/* The one sealing or flushing of live maps that runs at a time. */
struct nvme_sealer {
	enum nvme_step step;
	struct nvme_seg *seg; /* NULL: only maps */
	unsigned outstanding;
	int error;
	bool sync;      /* flush the maps too */
	uint32_t maps;  /* still to be written */
	uint64_t files; /* bit per container that is being flushed for its maps */
	void *buf;
};

/* The cleaner's one victim at a time. */
struct nvme_cleaner {
	struct nvme_seg *victim;
	uint64_t seq; /* of the victim */
	void *table_buf;
	struct nvme_table table;
	bool nothing;  /* no segment was worth it: do not look again before the next tick */
	bool ready;    /* the table is there and checked */
	uint32_t next; /* entry to look at next */
	unsigned outstanding;
	int error;
	/* The chunk under way: table entries pick[] go to `to`, packed from to_unit on. */
	struct nvme_slab *slab;
	char *buf;
	struct nvme_seg *to;
	uint32_t to_unit, units, picks;
	uint32_t granted;  /* bytes that the owner lets it copy now */
	uint64_t write_ns; /* when the write was sent; 0: not */
	uint32_t pick[NVME_SLAB / KVT_UNIT];
	bool added[NVME_SLAB / KVT_UNIT]; /* has an entry in the table of `to` */
};

struct nvme {
	struct tier tier;
	struct nvme *next_stuck;
	char path[256];
	uint8_t uuid[16];
	uint64_t segment_bytes, store_bytes, next_seq;
	uint32_t units, segments, file_segments, reserve, streams, map_words;
	unsigned files, depth, deadline_ms;
	int dir_fd, event_fd, fd[NVME_MAX_FILES];
	bool direct, offline, can_move;
	bool scanned, fresh; /* made in this life: nothing to find */

	struct io_engine *engine;
	struct nvme_reqs inflight, orphans;
	struct io_queue outbox; /* requests made but not yet handed over */
	struct tier_io *done, **done_tail;

	char *arena;
	size_t arena_bytes;
	bool huge;
	struct nvme_slab *slab, *free_slabs, *read_slab;
	unsigned slabs, slabs_used[SLAB_KINDS];

	struct nvme_seg *seg;
	uint64_t *live_words;
	struct nvme_segs ready, closing, announce, dirty;
	uint32_t nfree; /* FREE and READY */
	uint32_t ndirty;
	uint32_t replacing; /* segments that are */
	uint64_t unflushed; /* bit per container with maps that are written but not flushed */
	uint32_t nvictims;  /* copied or being copied, not FREE yet */
	uint32_t free_hint; /* where the search for a FREE one starts */
	uint64_t retry_ns;  /* after a failed head: no new one before */
	uint64_t live_units, prepares, maps_ns;
	struct nvme_stream stream[2][NVME_MAX_STREAMS], cold;
	struct nvme_sealer sealer;
	struct nvme_cleaner cleaner;
	struct tier_pace pace;
	uint64_t *pos; /* scratch: NVME_MAX_POS_WORDS */
	struct tier_stat stat;
	uint32_t bad_tables, seal_errors;
	uint64_t seals; /* ended, well or not */
	uint64_t failed_requests;
	int last_error; /* of the last of them, -errno, and its enum io_op */
	uint8_t last_op;
};

static inline struct nvme *nvme(struct tier *tier)
{
	return container_of(tier, struct nvme, tier);
}

/* ---- nvme_page.c: the ops that handle pages, as in tier.h --------------------------- */
int nvme_prepare(struct tier *tier, struct tier_io *io);
void nvme_submit(struct tier *tier, struct tier_io *const *ios, unsigned n);
unsigned nvme_reap(struct tier *tier, struct tier_io **ret, unsigned max);
void nvme_release(struct tier *tier, struct tier_io *io);
void nvme_free(struct tier *tier, tier_addr addr, uint32_t bytes);

/* ---- nvme_dir.c: the directory, its lock, its container files --------------------- */
int nvme_dir_open(struct nvme *t, const struct tier_cfg *cfg, char *err, size_t errsize);
void nvme_dir_close(struct nvme *t);

/* ---- nvme_stage.c: staging memory ---------------------------------------------------- */
int nvme_stage_open(struct nvme *t, size_t bytes);
void nvme_stage_close(struct nvme *t);
/* The next `units` units of *current, or of a fresh slab. NULL: none of this kind is to be had now. */
void *nvme_stage_get(struct nvme *t, struct nvme_slab **current, uint32_t units, enum nvme_slab_kind kind);
void nvme_stage_put(struct nvme *t, struct nvme_slab *slab, unsigned refs);

/* ---- nvme_req.c: requests, completions, the deadline -------------------------------- */
/* A request for `units` units at `unit` of seg; NULL when memory is out. Send it with nvme_send. */
struct nvme_req *nvme_req_new(struct nvme *t, enum io_op op, struct nvme_seg *seg, uint32_t unit,
			      uint32_t units, void *buf, void (*done)(struct nvme *t, struct nvme_req *r));
void nvme_send(struct nvme *t, struct nvme_req *r);
/* Hand everything sent to the engine. */
void nvme_kick(struct nvme *t);
/* Take in what the engine finished, and go on with sealing, cleaning and heads. */
void nvme_drain(struct nvme *t);
/* Take the tier offline when a request is older than the deadline. */
void nvme_check_deadline(struct nvme *t);
void nvme_finish_io(struct nvme *t, struct tier_io *io, int res);

/* ---- nvme_log.c: segments, streams, places ------------------------------------------- */
static inline uint32_t nvme_generation(uint64_t seq)
{
	return (uint32_t)(seq ^ (seq >> 32) * 0x9e3779b1u) & 0xffffff;
}
static inline tier_addr nvme_addr(const struct nvme_seg *s, uint32_t unit)
{
	return (uint64_t)s->index << 40 | (uint64_t)nvme_generation(s->seq) << 16 | unit;
}
static inline uint32_t nvme_page_units(uint32_t bytes)
{
	return (uint32_t)DIV_UP((uint64_t)bytes, KVT_UNIT);
}
/* The segment of a live page, or NULL. */
struct nvme_seg *nvme_resolve(struct nvme *t, tier_addr addr, uint32_t *ret_unit);
int nvme_log_open(struct nvme *t);
void nvme_log_close(struct nvme *t);
struct nvme_stream *nvme_stream_for(struct nvme *t, const uint8_t key[16], unsigned life);
/* Would that many more units and table bytes fit? */
bool nvme_has_room(const struct nvme *t, const struct nvme_seg *s, uint32_t units, uint32_t need);
/* Reserve `units` units and `need` table bytes in the stream. -ENOSPC. */
int nvme_place(struct nvme *t, struct nvme_stream *st, unsigned life, uint32_t units, uint32_t need,
	       struct nvme_seg **ret, uint32_t *ret_unit);
/* Undo nvme_place for a page that was never submitted. */
void nvme_unplace(struct nvme *t, struct nvme_seg *s, uint32_t unit, uint32_t units, uint32_t need);
/* Stop appending to the stream's segment. */
void nvme_stream_close(struct nvme *t, struct nvme_stream *st);
/* Note a page in the table under construction. need: as promised to nvme_place. -ENOMEM, -E2BIG. */
int nvme_build_add(struct nvme *t, struct nvme_seg *s, const struct nvme_entry *e, uint32_t need,
		   const struct seq_record *seq, const void *pos);
void nvme_build_free(struct nvme_build *b);
void nvme_page_live(struct nvme *t, struct nvme_seg *s, uint32_t unit, uint32_t units);
void nvme_page_dead(struct nvme *t, struct nvme_seg *s, uint32_t unit, uint32_t units);
/* A CLOSING segment without writes under way goes to the sealer. */
void nvme_seg_settle(struct nvme *t, struct nvme_seg *s);
void nvme_seg_free(struct nvme *t, struct nvme_seg *s);
/* The live map on disk shows pages that are dead (dirty), or nothing needs writing any more (clean). */
void nvme_mark_dirty(struct nvme *t, struct nvme_seg *s);
void nvme_mark_clean(struct nvme *t, struct nvme_seg *s);

/* ---- nvme_seal.c: heads, live maps, tables, feet --------------------------------------- */
/* Pick a FREE segment and start writing its head; NULL when there is none. It joins nvme.ready. */
struct nvme_seg *nvme_head_start(struct nvme *t);
void nvme_head_pump(struct nvme *t);
void nvme_seal_pump(struct nvme *t);
/* Start writing the live maps that changed; sync: and flush them. Nothing happens while a seal runs: it does
 * it. */
void nvme_maps_start(struct nvme *t, bool sync);

/* ---- nvme_clean.c -------------------------------------------------------------------------- */
void nvme_clean_pump(struct nvme *t);
/* Nothing of its comes back any more: the tier is offline. */
void nvme_clean_stop(struct nvme *t);
/* Sources that died after they were copied: their copies are dead too. */
void nvme_clean_reconcile(struct nvme *t, struct nvme_seg *s);
void nvme_clean_announce(struct nvme *t,
			 bool (*moved)(void *arg, const struct page_meta *m, tier_addr from, tier_addr to),
			 void *arg);

/* ---- nvme_scan.c ------------------------------------------------------------------------------ */
int nvme_scan(struct tier *tier, tier_found_fn fn, void *arg);
/* An entry as the owner sees it. pos: room for NVME_MAX_POS_WORDS words. -EBADMSG. */
int nvme_entry_meta(const struct nvme_entry *e, const uint8_t *pos_bytes, uint64_t *pos, struct page_meta *ret);
