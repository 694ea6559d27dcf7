/* SPDX-License-Identifier: MIT */
/* Draining: what leased sequences have goes to nvme before the daemon ends. */
#include <syslog.h>
#include "daemon/internal.h"
#include "daemon/ledger.h"
#include "shm/util.h"

#define DRAIN_NS (UINT64_C(20) * 1000000000u)

/* Rows of s that would not survive us. */
static bool only_in_dram(const struct seq *s)
{
	for (uint32_t l = 0; l < s->ix.lanes; l++)
		for (uint32_t w = 0; w < BITS_WORDS(s->ix.rows); w++)
			if (index_bits(&s->ix, KVT_TIER_DRAM, l)[w] & ~index_bits(&s->ix, KVT_TIER_NVME, l)[w])
				return true;
	return false;
}

/* Is this one on nvme as far as it can be? Moves that are still due are started. */
static bool drained(struct seq *s)
{
	if (s->lifetime != KVT_LEASED)
		return true;
	if (s->state != SEQ_DETACHED || s->noting || s->settle)
		return false;
	if (!s->core->pages.tier[KVT_TIER_NVME] || !only_in_dram(s) || s->flushes++ > 3)
		return true;
	seq_recount(s);
	settle_flush(s);
	return false;
}

void drain_check(struct core *c)
{
	void (*done)(void *) = c->drain_done;
	struct tier *nvme = c->pages.tier[KVT_TIER_NVME];
	bool late = now_ns() > c->drain_deadline_ns, all = true;
	struct seq *s;

	if (!done || c->freeing || (!late && (mover_busy(c) || c->background_bytes)))
		return;
	TAILQ_FOREACH(s, &c->lru, lru)
		if (!drained(s))
			all = false;
	if (!all && !late)
		return;
	if (!all)
		log_line(LOG_WARNING, "drain: deadline passed, what is not on nvme yet is %s",
			 c->seams.keep ? "lost if this is no restart" : "lost");
	c->drain_done = NULL;
	if (nvme && nvme->ops->sync && nvme->ops->sync(nvme) < 0)
		log_line(LOG_ERR, "drain: the nvme tier could not be flushed");
	ledger_sync(c->ledger);
	done(c->drain_arg);
}

void core_drain(struct core *c, void (*done)(void *arg), void *arg)
{
	struct seq *s, *next;

	if (c->draining)
		return;
	c->draining = true;
	c->drain_done = done;
	c->drain_arg = arg;
	c->drain_deadline_ns = now_ns() + DRAIN_NS;
	session_stop_listening(c);
	for (s = TAILQ_FIRST(&c->lru); s; s = next) {
		next = TAILQ_NEXT(s, lru);
		if (s->lifetime != KVT_LEASED)
			continue;
		s->refs++;
		seq_last_words(s);
		if (s->state == SEQ_LIVE) {
			client_notify(s->client, Q_GONE, s->handle, (uint64_t)-KVT_E_DAEMON, 0);
			seq_leave(s, false);
		} else if (s->state == SEQ_DETACHED) {
			restart_note(s);
		}
		seq_unref(s);
	}
	mover_kick(c); /* done() is called from the loop, never from here */
}
