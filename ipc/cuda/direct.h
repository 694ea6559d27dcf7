/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What a client sees of a sequence's pages in published DRAM (shm/direct.h): its directory, and the segments
 * that the directory names, mapped and registered with the GPU. A segment is registered once for each
 * struct kvtier_cuda, whatever the number of sequences that read it, and goes when the last of them lets go of
 * it. A view belongs to one thread at a time; the segments behind it are shared under a lock of their own.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "ipc/cuda/kernels.h"
#include "ipc/cuda/recall_args.h"
#include "shm/direct.h"
#include "shm/seg.h"

/* Where segments come from. */
struct direct_source {
	const void *owner; /* whose numbers: sequences with the same owner share segments */
	void *arg;
	int (*map)(void *arg, uint32_t number, struct seg *ret); /* 0 or KVT_E_* with a line */
};

/* One entry as it was last looked at. */
struct direct_seen {
	uint64_t place, serial; /* place 0: nothing here */
	uint32_t lane, limit, dead[4];
};

struct direct_held;
struct cuda_direct {
	struct kvtier_cuda *g;
	struct direct_source src;
	struct cuda_lane *lane; /* [lanes] bytes of rows */
	uint32_t lanes;
	struct seg dir;           /* fd -1: none yet */
	uint64_t moved;           /* of the directory at the last look */
	bool complete;            /* every entry of it was seen */
	struct direct_seen *seen; /* [used] */
	uint32_t used, room;
	struct direct_held *held; /* segments in use, and those that wait until the stream has passed */
	uint32_t n_held, room_held;
};

/* Whoever reads entries: a page that is new (sum: its bytes too) or changed. 0 or KVT_E_*. */
typedef int (*view_page_fn)(void *arg, uint32_t slot, bool sum, const struct find_page *p);

/* lane: [lanes], copied. KVT_E_NOMEM. */
int view_new(struct kvtier_cuda *g, const struct direct_source *src, const struct cuda_lane *lane,
	     uint32_t lanes, struct cuda_direct **ret);
/* The directory; taken on success. KVT_E_PROTO when it is none. */
int view_take(struct cuda_direct *d, struct seg *dir);
/*
 * Compare one cache line of each entry with what was seen there, and hand over those that are new or changed
 * (rows are dropped without a word). *ret_changed: some came, went or changed. Segments that no entry names any
 * more are let go of once the stream has passed this point. After an error nothing counts as seen. Errors: of
 * page() and of the source, PROTO (an entry that cannot be), NOMEM, GPU.
 */
int view_look(struct cuda_direct *d, view_page_fn page, void *arg, void *stream, bool *ret_changed);
/* Forget what was seen: the next look hands over everything. */
void view_forget(struct cuda_direct *d);
/* Has no page that was listed at the last look changed since? */
bool view_still(const struct cuda_direct *d);
/* Device address of [off, off + n) of a segment, mapped and registered when it is new. PROTO: not inside it. */
int view_address(struct cuda_direct *d, uint32_t segment, uint64_t off, uint64_t n, uint64_t *ret);
/*
 * The daemon wants memory back: let go of segments that no entry names now, once the stream has passed this
 * point. What was prepared from earlier looks must not be launched any more. True: some wait for the stream,
 * call again.
 */
bool view_yield(struct cuda_direct *d, void *stream);
/* Let go of everything; nothing on the GPU reads it any more. NULL is fine. */
void view_end(struct cuda_direct *d);
