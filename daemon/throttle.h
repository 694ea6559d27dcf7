/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Writes to NVMe back off when reads that somebody waits for become slow: bytes of writes in flight stay below
 * a window, which is halved when such a read took longer than [nvme] throttle_target, or a write twice as long,
 * and grows while none does: a queue that is longer than that makes nothing faster, and the next reader would
 * wait for all of it. Where the kernel's probes see the disk, it is halved as well when the disk's own
 * requests, whoever made them, are that slow, or wait that long in its queue. Event-loop thread.
 *
 * Nothing starves and nothing is refused: one page may always be on its way, and of the writes that a client
 * waits for a few; memory pressure lifts the window. The tier's own copies, the cleaner's, are background
 * writes; when it runs out of places they go first.
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/probes.h"
#include "tiers/tier.h"

struct core;
struct core_stat;

/* The disk between two looks, in nanoseconds; 0: nothing to see. */
struct throttle_sight {
	uint64_t read_ns, write_ns; /* mean of those that ended */
	uint64_t wait_ns;           /* until what was in the queue all the time has ended at that rate */
};

/* How the tier asks for its own copies. */
struct tier_pace throttle_pace(struct core *c);

struct throttle {
	uint64_t window;      /* bytes */
	uint64_t inflight[2]; /* bytes: background, foreground */
	uint64_t epoch_ns;    /* when the window was last changed */
	uint64_t wait_ns;     /* not to be changed again for so long */
	uint64_t slow_ns;     /* the last of this epoch that was; 0: none */
	struct probes_disk disk;
	uint64_t disk_ns; /* when that was read; 0: never, or the probes were off since */
	struct throttle_sight sight;
};

void throttle_init(struct core *c);
/* May this write be prepared now? false: when others have ended, which kicks the pump. */
bool throttle_may(struct core *c, uint32_t bytes, bool background);
void throttle_begin(struct core *c, uint32_t bytes, bool background);
void throttle_end(struct core *c, uint32_t bytes, bool background);
/* A read that somebody waits for, or a write, took so long in the tier. */
void throttle_saw_read(struct core *c, uint64_t ns);
void throttle_saw_write(struct core *c, uint64_t ns);
/* Look at the disk, which others may have made slow. */
void throttle_tick(struct core *c);
void throttle_stat(const struct core *c, struct core_stat *ret);
/* What was seen in `ns` nanoseconds. A queue is that long at least: the shorter one of both looks. */
void throttle_see(const struct probes_disk *before, const struct probes_disk *now, uint64_t ns,
		  struct throttle_sight *ret);
