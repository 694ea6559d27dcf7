/* SPDX-License-Identifier: MIT */
#pragma once
/* One recall on its way, see recall.c. The event loop's; a worker has the hunt that was lent to it. */
#include "daemon/internal.h"
#include "policy/recall.h"

struct row {
	uint32_t pos, run, row;
};

/* One lane's search. */
struct hunt {
	struct job job;
	struct recall *call;
	uint32_t lane;
	struct device_lane to;  /* the window */
	struct page **page;     /* [n], pinned while a worker works */
	struct recall_run *run; /* [n] */
	uint32_t n, cap;
	struct recall_query q;
	struct recall_hit *hit; /* [rows] */
	struct row *found;      /* [rows], ascending */
	uint32_t count;
	char *rows; /* what was found: K plane, V plane */
	int error;
};

struct recall {
	struct seq *seq;       /* a reference */
	struct client *client; /* NULL: gone */
	struct region *region; /* a reference */
	struct wire_recall m;  /* without its queries */
	float *q;              /* [heads][per_head][dim] */
	uint32_t first;        /* lane of head 0 */
	uint32_t waiting;      /* pages being summarised, then lanes with workers */
	bool pinned, asked;    /* asked: pages without a summary were read once */
	uint64_t started, searched, skipped, missed;
	struct hunt hunt[]; /* [heads] */
};

/* Written by its tenant's thread. */
static inline bool recall_imported(const struct recall *k)
{
	return k->region->ops == &device_fd_ops;
}

/* ---- recall_hunt.c ---- */
/* Collect one lane's pages; those without a summary are asked for, once: summed(k) is called for each. -ENOMEM.
 */
int hunt_collect(struct recall *k, struct hunt *u, void (*summed)(void *arg));
/* What to search for in this lane, and where to put it. -ENOMEM. */
int hunt_begin(struct recall *k, struct hunt *u);
/* The job: search, copy, and scatter unless the region is imported. Any thread. */
void hunt_run(struct job *j, struct worker_ctx *w);
/* What was found goes into the window. Any thread. */
void hunt_scatter(struct hunt *u);
