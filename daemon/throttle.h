/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Writes to NVMe back off when reads that somebody waits for become slow: bytes of writes in flight stay below
 * a window, which is halved when such a read took longer than [nvme] throttle_target, or a write twice as long,
 * and grows while none does: a queue that is longer than that makes nothing faster, and the next reader would
 * wait for all of it. Event-loop thread.
 *
 * Nothing starves and nothing is refused: one page may always be on its way, and of the writes that a client
 * waits for a few; memory pressure lifts the window.
 */
#include <stdbool.h>
#include <stdint.h>

struct core;
struct core_stat;

struct throttle {
	uint64_t window;      /* bytes */
	uint64_t inflight[2]; /* bytes: background, foreground */
	uint64_t epoch_ns;    /* when the window was last changed */
	uint64_t wait_ns;     /* not to be changed again for so long */
	bool slow;            /* one of this epoch was */
};

void throttle_init(struct core *c);
/* May this write be prepared now? false: when others have ended, which kicks the pump. */
bool throttle_may(struct core *c, uint32_t bytes, bool background);
void throttle_begin(struct core *c, uint32_t bytes, bool background);
void throttle_end(struct core *c, uint32_t bytes, bool background);
/* A read that somebody waits for, or a write, took so long in the tier. */
void throttle_saw_read(struct core *c, uint64_t ns);
void throttle_saw_write(struct core *c, uint64_t ns);
void throttle_stat(const struct core *c, struct core_stat *ret);
