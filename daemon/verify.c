/* SPDX-License-Identifier: MIT */
/*
 * The scrub: every page of one sequence or of all is read and checked, a few
 * at a time, behind everything else. Sequences are walked by handle, lanes and pages by
 * number; what changes meanwhile may be seen twice or not at all.
 */
#include <stdio.h>
#include <string.h>
#include "daemon/internal.h"
#include "shm/util.h"

#define IN_FLIGHT 16u
#define SLICE_NS UINT64_C(300000) /* of the loop, over sequences without pages */

struct verify {
	struct core_verify st;
	uint64_t only; /* handle, 0: all */
	uint32_t cursor, lane, page;
	int tier;
	uint64_t handle; /* of the sequence being walked, 0: take the next */
	unsigned inflight;
};

struct check {
	struct job job;
	struct pio *io;
	uint64_t handle;
};

static void check_end(struct check *k, int err)
{
	struct core *c = k->io->core;
	struct verify *v = c->verify;
	struct seq *s = handle_get(c->seqs, k->handle, NULL);

	v->inflight--;
	v->st.pages++;
	v->st.bytes += k->io->page->bytes;
	if (err < 0) {
		v->st.bad++;
		/* A plan in the making reads the index: it will meet the page itself. */
		if (s && s->state != SEQ_CLOSING && !(plan_lent(s) && s->plan->phase == PHASE_DECIDE))
			mover_lost(s, k->io->page, k->io->tier, err);
	}
	pio_free(k->io);
	free(k);
	mover_kick(c);
}

static void check_run(struct job *j, struct worker_ctx *w)
{
	struct check *k = container_of(j, struct check, job);

	k->io->error = page_verify(k->io->page, k->io->io.buf) ? 0 : -EBADMSG;
}

static void check_done(struct job *j)
{
	struct check *k = container_of(j, struct check, job);

	check_end(k, k->io->error);
}

static void read_end(struct pio *io)
{
	struct check *k = io->owner;

	if (io->io.res < 0) {
		check_end(k, io->io.res);
		return;
	}
	k->job.run = check_run;
	k->job.done = check_done;
	k->job.bytes = io->page->bytes;
	workers_put(io->core->workers, &k->job);
}

/* The next page with a copy in v->tier, or NULL when the sequence is done. */
static struct page *next_page(struct verify *v, const struct seq *s)
{
	for (; v->tier < KVT_TIERS; v->tier++, v->lane = v->page = 0)
		for (; v->lane < s->ix.lanes; v->lane++, v->page = 0)
			while (v->page < s->ix.lane[v->lane].n) {
				struct page *p = s->ix.lane[v->lane].v[v->page++];

				if (page_in(p, v->tier))
					return p;
			}
	return NULL;
}

static struct seq *next_seq(struct core *c, struct verify *v)
{
	struct seq *s = v->handle ? handle_get(c->seqs, v->handle, NULL) : NULL;

	if (s)
		return s;
	if (v->only) {
		s = v->st.running && !v->handle ? handle_get(c->seqs, v->only, NULL) : NULL;
		v->handle = v->only;
	} else {
		s = handle_next(c->seqs, &v->cursor, &v->handle);
	}
	v->tier = KVT_TIER_DRAM;
	v->lane = v->page = 0;
	return s;
}

void verify_pump(struct core *c)
{
	struct verify *v = c->verify;
	uint64_t end = v && v->st.running ? now_ns() + SLICE_NS : 0;

	while (v && v->st.running && v->inflight < IN_FLIGHT) {
		struct seq *s = next_seq(c, v);
		struct page *p = s ? next_page(v, s) : NULL;
		struct check *k;

		if (!s || (!p && v->only)) {
			v->st.running = v->inflight > 0;
			return;
		}
		if (!p) {
			v->handle = 0;
			if (now_ns() < end)
				continue;
			mover_kick(c);
			return;
		}
		k = calloc(1, sizeof(*k));
		if (k)
			k->io = pio_new(c, p, v->tier, read_end, k);
		if (!k || !k->io) {
			free(k);
			return; /* the next kick tries again */
		}
		k->handle = v->handle;
		k->job.tenant = s->tenant->index;
		v->inflight++;
		pio_read(k->io);
	}
}

static uint64_t copies_of(const struct seq *s)
{
	uint64_t n = 0;

	for (uint32_t l = 0; l < s->ix.lanes; l++)
		for (uint32_t i = 0; i < s->ix.lane[l].n; i++)
			n += (uint64_t)page_in(s->ix.lane[l].v[i], KVT_TIER_DRAM) +
			     page_in(s->ix.lane[l].v[i], KVT_TIER_NVME);
	return n;
}

int core_verify_start(struct core *c, uint64_t handle, char *err, size_t errsize)
{
	struct verify *v = c->verify;
	uint32_t cursor = 0;
	struct seq *s;

	if (handle && !handle_get(c->seqs, handle, NULL)) {
		snprintf(err, errsize, "sequence %016llx: gone", (unsigned long long)handle);
		return KVT_E_STALE;
	}
	if (v && (v->st.running || v->inflight)) {
		snprintf(err, errsize, "verify: already running, %llu of %llu pages",
			 (unsigned long long)v->st.pages, (unsigned long long)v->st.total);
		return KVT_E_BUSY;
	}
	if (!v)
		c->verify = v = malloc(sizeof(*v));
	if (!v) {
		snprintf(err, errsize, "out of memory");
		return KVT_E_NOMEM;
	}
	memset(v, 0, sizeof(*v));
	v->only = handle;
	v->st.running = true;
	if (handle)
		v->st.total = copies_of(handle_get(c->seqs, handle, NULL));
	else
		while ((s = handle_next(c->seqs, &cursor, NULL)))
			v->st.total += copies_of(s);
	mover_kick(c);
	return 0;
}

void core_verify_stat(struct core *c, struct core_verify *ret)
{
	*ret = c->verify ? c->verify->st : (struct core_verify){0};
}

void verify_free(struct core *c)
{
	free(c->verify);
	c->verify = NULL;
}
