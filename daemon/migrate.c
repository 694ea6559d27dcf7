/* SPDX-License-Identifier: MIT */
/*
 * Pages that lie on another node than their sequence's client: it moved, or its node was full. A round walks
 * over the sequences in slices of the loop; a page is read, copied to a new place on the right node by a
 * worker, the copy checked against the page's checksum, and then the page's address is the new one. The page
 * stays who it is.
 *
 *   read → place → worker (copy, check) → write → swap
 *
 * Left alone: published pages, whose place clients know; pages that others hold (pinned, on the move, shared
 * with a fork); all that would take the right node above its high mark. What is left for now is tried again
 * later, at longer and longer intervals.
 */
#include <string.h>
#include "daemon/internal.h"
#include "daemon/near.h"
#include "daemon/pressure.h"
#include "shm/util.h"

#define IN_FLIGHT 16u
#define SLICE_NS UINT64_C(300000)
#define WAIT_LEAST UINT64_C(250000000)
#define WAIT_MOST UINT64_C(16000000000)

struct carry {
	struct job job;
	struct core *core;
	struct seq *seq; /* a reference */
	struct page *page;
	struct pio *from, *to;
	tier_addr was;
	int error;
};

void migrate_look(struct core *c)
{
	c->near->migrate.due = true;
	c->near->migrate.wait_ns = WAIT_LEAST;
	c->near->migrate.next_ns = 0;
}

void migrate_saw(struct core *c, const struct tier_io *io)
{
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];
	int at = io->near && t->ops->where ? t->ops->where(t, io->addr) : -1;

	if (at >= 0 && at != io->near - 1)
		c->near->migrate.due = true;
}

/* ---- one page ------------------------------------------------------------------------------ */

static void carry_end(struct carry *k)
{
	struct core *c = k->core;

	k->page->moving = false;
	page_unpin(&c->pages, k->page);
	seq_unref(k->seq);
	c->near->migrate.inflight--;
	free(k);
	mover_kick(c);
}

/* It cannot be carried: the new place goes back. */
static void give_up(struct carry *k, int error)
{
	struct seq *s = k->seq;

	if (k->from)
		pio_free(k->from);
	if (k->to)
		pio_free(k->to);
	if (error == -EBADMSG && !s->dead && s->state != SEQ_CLOSING && page_in(k->page, KVT_TIER_DRAM) &&
	    k->page->addr[KVT_TIER_DRAM - 1] == k->was && !(plan_lent(s) && s->plan->phase == PHASE_DECIDE))
		mover_lost(s, k->page, KVT_TIER_DRAM, error);
	if (error == -ENOSPC && s->node)
		k->core->near->room[s->node - 1] = 0; /* no place of its size: nor for the next ones */
	k->core->near->migrate.left = true;
	carry_end(k);
}

static void swap_end(struct pio *io)
{
	struct carry *k = io->owner;
	struct core *c = k->core;
	struct page *p = k->page;
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];
	tier_addr now = io->io.addr;
	int error = io->io.res;
	/* Ours: of this job and of the write. Anybody else's may read where it was. */
	bool ours = p->pins == 2 && p->refs == 1;

	pio_free(io);
	k->to = NULL;
	if (error) {
		give_up(k, error);
		return;
	}
	if (!ours || !page_in(p, KVT_TIER_DRAM) || p->addr[KVT_TIER_DRAM - 1] != k->was) {
		t->ops->free(t, now, p->bytes);
		give_up(k, -EBUSY);
		return;
	}
	page_move_copy(p, KVT_TIER_DRAM, now);
	t->ops->free(t, k->was, p->bytes);
	c->stat.migrated_pages++;
	c->stat.migrated_bytes += p->bytes;
	c->near->migrate.took = true;
	carry_end(k);
}

static void carry_run(struct job *j, struct worker_ctx *w)
{
	struct carry *k = container_of(j, struct carry, job);

	memcpy(k->to->io.buf, k->from->io.buf, k->page->bytes);
	k->error = page_verify(k->page, k->to->io.buf) ? 0 : -EBADMSG;
}

static void carry_done(struct job *j)
{
	struct carry *k = container_of(j, struct carry, job);
	struct pio *to = k->to;

	pio_free(k->from);
	k->from = NULL;
	if (k->error) {
		give_up(k, k->error);
		return;
	}
	pio_write(to);
}

static void read_end(struct pio *io)
{
	struct carry *k = io->owner;
	struct core *c = k->core;
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];
	struct seq *s = k->seq;
	int r = io->io.res;

	k->was = io->io.addr;
	if (!r && (s->dead || s->state == SEQ_CLOSING || !index_lists(&s->ix, k->page)))
		r = -ESTALE;
	if (!r) {
		k->to = pio_new(c, k->page, KVT_TIER_DRAM, swap_end, k);
		r = k->to ? pio_prepare(k->to, s) : -ENOMEM;
		if (r < 0 && k->to)
			k->to->io.buf = NULL;
	}
	if (!r && t->ops->where(t, k->to->io.addr) != s->node - 1)
		r = -ENOSPC; /* no room there after all */
	if (r < 0) {
		give_up(k, r);
		return;
	}
	k->to->background = true;
	k->job.run = carry_run;
	k->job.done = carry_done;
	k->job.tenant = s->tenant->index;
	k->job.bytes = k->page->bytes;
	workers_put(c->workers, &k->job);
}

static bool carry_start(struct seq *s, struct page *p)
{
	struct core *c = s->core;
	struct carry *k = calloc(1, sizeof(*k));

	if (k)
		k->from = pio_new(c, p, KVT_TIER_DRAM, read_end, k);
	if (!k || !k->from) {
		free(k);
		return false;
	}
	k->core = c;
	k->seq = s;
	k->page = p;
	k->was = TIER_ADDR_NONE;
	s->refs++;
	page_pin(p);
	p->moving = true;
	k->from->background = true;
	c->near->migrate.inflight++;
	pio_read(k->from);
	return true;
}

/* ---- rounds -------------------------------------------------------------------------------- */

static bool elsewhere(const struct seq *s, const struct page *p)
{
	struct tier *t = s->core->pages.tier[KVT_TIER_DRAM];
	int at;

	if (!page_in(p, KVT_TIER_DRAM) || tier_published(p->addr[KVT_TIER_DRAM - 1]))
		return false;
	at = t->ops->where(t, p->addr[KVT_TIER_DRAM - 1]);
	return at >= 0 && at != s->node - 1;
}

/* Nobody else has to do with it, now or ever since a restart was told to forget it. */
static bool free_to_go(const struct seq *s, const struct page *p)
{
	return !p->moving && !p->limbo && !p->pins && p->refs == 1 && !p->forgotten && p->origin == s->origin;
}

/* False: no more can be started now. */
static bool walk_lane(struct migrate *m, struct seq *s)
{
	struct lane_pages *lp = &s->ix.lane[m->lane];
	uint64_t *room = &s->core->near->room[s->node - 1];

	for (; m->page < lp->n; m->page++) {
		struct page *p = lp->v[m->page];

		if (!elsewhere(s, p))
			continue;
		if (m->inflight == IN_FLIGHT)
			return false;
		if (!free_to_go(s, p) || *room < page_room(p->bytes) || !carry_start(s, p)) {
			m->left = true;
			continue;
		}
		*room -= page_room(p->bytes);
	}
	m->page = 0;
	return true;
}

static void round_over(struct migrate *m)
{
	uint64_t wait = m->took ? WAIT_LEAST : MIN(MAX(m->wait_ns * 2, WAIT_LEAST), WAIT_MOST);

	m->walking = false;
	m->due |= m->left;
	m->wait_ns = wait;
	m->next_ns = now_ns() + wait;
}

void migrate_pump(struct core *c)
{
	struct migrate *m = &c->near->migrate;
	uint64_t end = m->walking ? now_ns() + SLICE_NS : 0;
	uint32_t next = m->cursor;
	struct seq *s;

	while (m->walking && (s = handle_next(c->seqs, &next, NULL))) {
		bool lent = plan_lent(s) || s->cut != ROWS_ALL;

		m->left |= lent && s->node;
		while (s->node && !lent && !s->dead && s->state != SEQ_CLOSING && m->lane < s->ix.lanes) {
			if (!walk_lane(m, s))
				return; /* their ends kick the pump */
			m->lane++;
			if (now_ns() >= end) {
				mover_kick(c);
				return;
			}
		}
		m->lane = m->page = 0;
		m->cursor = next;
	}
	if (m->walking && !m->inflight)
		round_over(m);
}

void migrate_tick(struct core *c)
{
	struct migrate *m = &c->near->migrate;
	const struct tier *t = c->pages.tier[KVT_TIER_DRAM];

	if (!m->due || m->walking || !t->ops->where || c->frozen || c->draining || pressure_gives(c) ||
	    now_ns() < m->next_ns)
		return;
	m->due = m->left = m->took = false;
	m->walking = true;
	m->cursor = m->lane = m->page = 0;
	mover_kick(c);
}
