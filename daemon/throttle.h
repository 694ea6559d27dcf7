/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Writes to NVMe back off when reads that somebody waits for become slow: bytes of writes in flight stay below
 * a window, which is halved when such a read took longer than [nvme] throttle_target and grows by a step while
 * none does. With nobody reading it opens again. Event-loop thread.
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
	uint64_t read_ns;     /* when somebody's read last came back */
	bool slow;            /* one of this epoch was */
};

void throttle_init(struct core *c);
/* May this write be prepared now? false: when others have ended, which kicks the pump. */
bool throttle_may(struct core *c, uint32_t bytes, bool background);
void throttle_begin(struct core *c, uint32_t bytes, bool background);
void throttle_end(struct core *c, uint32_t bytes, bool background);
/* A read that somebody waits for took so long. */
void throttle_saw(struct core *c, uint64_t ns);
/* From the tick: a window that nobody's reads hold down opens. */
void throttle_tick(struct core *c);
void throttle_stat(const struct core *c, struct core_stat *ret);
