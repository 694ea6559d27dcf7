/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * In place of daemon/workers.c, for fuzzers: jobs run one by one on the loop's own thread, in a turn of their
 * own, so that an input always does the same. While workers_held a job stays lent, as on a slow worker, and the
 * loop goes on without it.
 */
#include <stdlib.h>
#include "daemon/workers.h"
#include "shm/util.h"

struct workers {
	struct job *head, **tail;
	unsigned jobs;
	struct worker_ctx ctx;
	sd_event_source *run;
	struct workers *next;
};

static bool workers_held;
static struct workers *all_workers;

void *worker_scratch(struct worker_ctx *w, size_t n)
{
	/* Fresh and exact each time: contents are undefined, and one byte too far is seen. */
	free(w->buf);
	w->buf = malloc(n ? n : 1);
	w->size = n;
	return w->buf;
}

void workers_finish(struct workers *w)
{
	struct job *j = w->head;

	if (!j)
		return;
	w->head = j->next;
	if (!w->head)
		w->tail = &w->head;
	w->jobs--;
	j->run(j, &w->ctx);
	j->done(j);
}

static void workers_go(struct workers *w)
{
	if (!workers_held && w->head)
		sd_event_source_set_enabled(w->run, SD_EVENT_ONESHOT);
}

static int workers_turn(sd_event_source *s, void *arg)
{
	if (!workers_held)
		workers_finish(arg);
	workers_go(arg);
	return 0;
}

/* Lend or give back. */
static void workers_hold(bool on)
{
	workers_held = on;
	for (struct workers *w = all_workers; w; w = w->next)
		workers_go(w);
}

int workers_new(struct workers **ret, sd_event *ev, unsigned threads, unsigned tenants)
{
	struct workers *w = calloc(1, sizeof(*w));

	if (!w)
		return -ENOMEM;
	w->tail = &w->head;
	if (sd_event_add_defer(ev, &w->run, workers_turn, w) < 0 ||
	    sd_event_source_set_enabled(w->run, SD_EVENT_OFF) < 0)
		abort();
	sd_event_source_set_priority(w->run, SD_EVENT_PRIORITY_NORMAL - 1);
	w->next = all_workers;
	all_workers = w;
	*ret = w;
	return 0;
}

void workers_put(struct workers *w, struct job *j)
{
	j->next = NULL;
	*w->tail = j;
	w->tail = &j->next;
	w->jobs++;
	workers_go(w);
}

void workers_run_inline(struct workers *w, struct job *j)
{
	j->run(j, &w->ctx);
	j->done(j);
}

unsigned workers_busy(const struct workers *w)
{
	return w->jobs;
}

unsigned workers_count(const struct workers *w)
{
	return 1;
}

unsigned workers_fitting(void)
{
	return 1;
}

uint64_t workers_stuck_ns(struct workers *w)
{
	return 0;
}

void workers_free(struct workers *w)
{
	struct workers **at = &all_workers;

	if (!w)
		return;
	while (w->head)
		workers_finish(w);
	while (*at != w)
		at = &(*at)->next;
	*at = w->next;
	sd_event_source_disable_unref(w->run);
	free(w->ctx.buf);
	free(w);
}
