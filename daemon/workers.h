/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Threads that score, rank, copy and check. A job's memory is lent to its
 * worker from workers_put() until done() runs on the event-loop thread.
 * Urgent jobs (decisions) go first, tenants by turns, but one of the others after every few. Those are
 * served by tenant, the one with the fewest bytes so far first; who had none waiting starts where the others
 * are.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <systemd/sd-event.h>

struct worker_ctx {
	void *buf; /* the worker's own scratch; use worker_scratch() */
	size_t size;
};
/* Scratch of at least n bytes, contents undefined; NULL when memory is out. */
void *worker_scratch(struct worker_ctx *w, size_t n);

struct job {
	void (*run)(struct job *j, struct worker_ctx *w); /* on a worker */
	void (*done)(struct job *j);                      /* on the loop; may free j */
	uint32_t tenant;
	bool urgent;
	uint64_t bytes; /* cost, for fairness */
	struct job *next;
};

struct workers;
/* threads 0: none, whoever owns it calls workers_step(). -errno. */
int workers_new(struct workers **ret, sd_event *ev, unsigned threads, unsigned tenants);
/* Waits for running jobs; done() of what is left runs here. */
void workers_free(struct workers *w);
void workers_put(struct workers *w, struct job *j);
/* Run it here and now: for jobs too small to hand over. done() runs before this returns. */
void workers_run_inline(struct workers *w, struct job *j);
/*
 * Without threads: run the job that is next; false when none waits. first: its done() comes before those that
 * are ready already, as if another thread had been slower.
 */
bool workers_step(struct workers *w, bool first);
/* Run done() of what is ready. */
void workers_finish(struct workers *w);
/* Jobs given and not yet done. */
unsigned workers_busy(const struct workers *w);
unsigned workers_count(const struct workers *w);
/*
 * Threads for the processors that this process may run on (taskset, CPUAffinity=, cpusets), one of them left to
 * the loop; at least 1. More would take turns with the loop, and clients would wait for that.
 */
unsigned workers_fitting(void);
/* Nanoseconds since the longest running job began; 0 when none runs. */
uint64_t workers_stuck_ns(struct workers *w);
