/* SPDX-License-Identifier: MIT */
#pragma once
/* Rows on the move: between device and tiers, among the tiers, for recall. Part of internal.h. */
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>
#include "daemon/plan.h"
#include "tiers/tier.h"

struct recall_sum;
struct recall_shape { /* keys of dim elements; 0: not to be summarised */
	uint32_t dim, dtype;
};
/* ---- mover.c, mover_out.c, mover_in.c -------------------------------------------------- */
struct pio { /* one page on its way between a tier and us */
	struct tier_io io;
	struct core *core;
	struct page *page; /* pinned */
	bool reading;
	bool background;             /* nobody waits for it; set before anything is asked of it */
	bool throttled;              /* its bytes are in the window of writes */
	uint64_t submitted_ns;       /* to the tier */
	uint64_t reserved;           /* quota held until the page has its copy */
	int tier, error;             /* error: the worker's verdict, -errno */
	bool refused;                /* the verdict is on the region: the page itself is well */
	void (*end)(struct pio *io); /* on the loop when the tier is done, io.res valid; owns io */
	void *owner;
	uint32_t nth;     /* with a window: place in the plan's list, or number of the record */
	uint32_t segment; /* record: read in published memory, 1 + its number; 0: packed */
	uint64_t segment_off, ring_at, wrap_at; /* of the record; of what says that it is at the ring's start */
	struct recall_shape keys;
	struct recall_sum *sum; /* write: made beside the page */
	struct seq_record rec;
	uint64_t words[PAGE_SPAN]; /* write: positions for the tier to keep; read: the rows wanted */
	STAILQ_ENTRY(pio) link;
};
STAILQ_HEAD(pio_list, pio);
/* io->page gets pinned. NULL: out of memory. */
struct pio *pio_new(struct core *c, struct page *p, int tier, void (*end)(struct pio *), void *owner);
/* The buffer goes back, when there is one; the page stays pinned. */
void pio_release(struct pio *io);
/* pio_release() and unpin the page. */
void pio_free(struct pio *io);
/* Read the page: end() follows from the pump, never from here. */
void pio_read(struct pio *io);
/* Place and buffer for a write: 0, -EAGAIN (no buffer now), -ENOSPC, -EIO. */
int pio_prepare(struct pio *io, struct seq *s);
/* Start a prepared write whose buffer is filled and whose page has its crc. */
void pio_write(struct pio *io);
/* The same, and the tier has it when this returns. */
void pio_write_now(struct pio *io);
/* Check a page against its identity. Any thread. */
bool page_verify(const struct page *p, const void *buf);
/* A page could not be read or checked: count it, take its rows out of that tier. */
void mover_lost(struct seq *s, struct page *p, int tier, int err);
void mover_start(struct plan *p);
/* Go on from the loop soon: buffers, places or work appeared. */
void mover_kick(struct core *c);
/* Make pages (reads) of the plan, at most `pages`; returns how many. */
unsigned mover_out(struct plan *p, unsigned pages);
unsigned mover_in(struct plan *p, unsigned pages);
/* Hand the pages read so far to a worker. */
void mover_in_flush(struct core *c);
/* One slice of work. */
void mover_run(struct core *c);
/* Pages are on their way. */
bool mover_busy(const struct core *c);
int mover_open(struct core *c);
void mover_close(struct core *c);

/* ---- repack.c, settle.c: moves below the device tier ------------------------------------- */
#define REPACK_SOURCES 16u
struct repack;
/*
 * Write rows of one lane that lie in `src` pages of tier `from` as one page of
 * tier `to`: the bitmap take[span] from position first names them. whole: the only source, all
 * of whose rows are taken; it keeps its identity. 0, -ENOMEM; -ENODATA: not whole, of a sequence that a restart
 * found and whose client, which knows the shape of its rows, has not come back.
 */
int repack_start(struct seq *s, struct page *const *src, unsigned n, int from, int to, bool whole,
		 uint32_t first, const uint64_t *take, uint32_t span);
/* A worker decides over the index no more: what ended meanwhile may change it. */
void repack_unpark(struct seq *s);
void repack_pump(struct core *c);
/* After a plan: carry out what it says about the tiers below. */
void settle_start(struct seq *s, const uint64_t *to_nvme, uint32_t words);
/* Move all that is in dram only to nvme. */
void settle_flush(struct seq *s);
void settle_stop(struct seq *s);
/* Move those pages of the lane's dram rows to nvme that choose() wants; returns the bytes that they take. */
typedef bool (*settle_choice_fn)(void *arg, const struct seq *s, const struct page *p, const uint64_t *mask,
				 uint32_t alive);
uint64_t settle_choose(struct seq *s, uint32_t lane, settle_choice_fn choose, void *arg);
/* A page of it went from dram to nvme. */
void settle_moved(struct seq *s);
void settle_pump(struct core *c);
/* Merge small and mostly dead pages of the sequence, behind everything else. */
void compact_start(struct seq *s);
void compact_stop(struct seq *s);
void compact_pump(struct core *c);
/* Tier watermarks: wake the demoter, set direct demotion. */
void settle_watermarks(struct core *c);

/* ---- recall.c, recall_sum.c, recall_pull.c ----------------------------------------------------------------
 */
/* W_RECALL. 0, or KVT_AGAIN: it waits for the one before. */
int request_recall(struct client *cl, const struct wire_recall *m);
/* The sequence has no client any more: nobody is to be answered. */
void recall_orphan(struct seq *s);
/* What pages of this lane are summarised as: nothing while the sequence does not recall, or when rows have no
 * type. */
struct recall_shape recall_shape(const struct seq *s, uint32_t lane);
/* The summary of a page's K plane at k; NULL: none is wanted, no memory. Any thread. */
struct recall_sum *recall_sum_make(struct recall_shape keys, const struct page *p, const void *k);
/*
 * Read, check and summarise one page that has none; end(arg) follows from the loop, never from here. A page
 * that is lost is counted as a miss. -ENOMEM.
 */
int recall_sum_start(struct seq *s, struct page *p, void (*end)(void *arg), void *arg);
/* From now on all its pages get summaries; those that exist get them in the background. */
void recall_prepare(struct seq *s);
/* Bring what only nvme holds up to dram, in the background, once. */
void recall_pull(struct seq *s);
void recall_pull_stop(struct seq *s);
void recall_pump(struct core *c);

/* ---- direct.c, direct_seq.c -------------------------------------------------------------------- */
/* Give a sequence that asked for one its directory; pages that it has are entered soon. 0, -ENOMEM, -errno. */
int direct_open(struct seq *s);
void direct_close(struct seq *s);
void direct_pump(struct core *c);
int request_direct(struct client *cl, const struct wire_handle *m);
int request_segment(struct client *cl, const struct wire_segment *m);
/* This client is gone, off the list: with an owner's last one its empty segments go. */
void direct_left(const struct client *gone);
/* What an owner's published memory takes; owner 0: all that is private. */
void direct_stat(struct core *c, uint64_t owner, struct tier_owner *ret);
/* The same for a plan: of `free` bytes those that pages of s may take; *quota: what its tenant may add. */
uint64_t direct_room(const struct seq *s, uint64_t *quota, uint64_t free_bytes);
/* Of all a tenant's users: bytes asked back, and those that they keep. */
void direct_revoked(struct core *c, uint32_t tenant, uint64_t *ret_all, uint64_t *ret_late);
/* Bytes that the segments of the tenant's owners hold back, without those of one of them (0: of none). */
uint64_t direct_held(struct core *c, uint32_t tenant, uint64_t except);
void direct_owners_free(struct core *c);
/* Whose published memory the pages of s go to; 0: they are private. */
static inline uint64_t direct_owner_of(const struct seq *s)
{
	return s->ix.direct ? s->tenant_hash : 0;
}
