/* SPDX-License-Identifier: MIT */
/*
 * A sequence whose client goes: ephemeral ones end, leased ones are saved (what
 * only the region holds is demoted by a plan that nobody applies) and wait below the
 * device tier for a resume or the end of their lease. Where a GPU had the device rows nothing is read any more:
 * what its client did not have stored is lost.
 */
#include <string.h>
#include "daemon/internal.h"
#include "shm/trial.h"
#include "shm/util.h"

/*
 * A client that died between READY and its acknowledgement may have moved rows
 * already: a lane is as the index says only below the first row that the plan
 * changes. What lies above and has no copy below is lost.
 */
static void distrust(struct seq *s, const struct plan *p)
{
	uint64_t lost = 0;

	if (index_extend(&s->ix, s->rows) < 0)
		s->rows = s->ix.rows; /* no memory for the newest ones: they are lost */
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		uint64_t *dev = index_bits(&s->ix, KVT_TIER_DEVICE, l);
		const uint64_t *after = p->t.resident + (uint64_t)l * p->words;
		uint32_t w = 0, first;

		while (w < p->words && dev[w] == after[w])
			w++;
		if (w == p->words)
			continue;
		first = w * 64 + (uint32_t)__builtin_ctzll(dev[w] ^ after[w]);
		if (first >= p->watermark)
			continue;
		lost += s->ix.resident[l] - bits_rank(dev, first);
		bits_clear_range(dev, first, s->rows);
		s->ix.resident[l] = bits_rank(dev, s->ix.rows);
	}
	if (lost)
		log_about(
			&s->tenant->said, 5,
			"seq %016llx: its client left in the middle of plan %llu: %llu device rows not trusted",
			(unsigned long long)s->handle, (unsigned long long)p->id, (unsigned long long)lost);
}

static bool holds_device_rows(const struct seq *s)
{
	if (s->rows > s->ix.rows)
		return true;
	for (uint32_t l = 0; l < s->ix.lanes; l++)
		if (s->ix.resident[l])
			return true;
	return false;
}

/* Nothing is left in the region: the sequence waits below for a resume. */
static void detached(struct seq *s)
{
	s->state = SEQ_DETACHED;
	seq_unbind(s);
	seq_drop_region(s);
	s->expires_ns = now_ns() + (uint64_t)s->ttl_s * 1000000000u;
	TAILQ_INSERT_TAIL(&s->core->gone, s, gone);
	s->in_gone = true;
	s->core->n_orphans++;
	if (s->core->draining)
		settle_flush(s);
	restart_note(s);
	seq_account(s);
	seq_answer(s);
	mover_kick(s->core);
}

/* Rows that nothing below has are gone: a GPU had them, or they could not be saved. */
static void forget_device_rows(struct seq *s)
{
	if (index_extend(&s->ix, s->rows) < 0)
		s->rows = s->ix.rows;
	for (uint32_t l = 0; l < s->ix.lanes && s->ix.rows; l++) {
		bits_clear_range(index_bits(&s->ix, KVT_TIER_DEVICE, l), 0, s->ix.rows);
		s->ix.resident[l] = 0;
	}
	seq_recount(s);
	detached(s);
}

void seq_save(struct seq *s)
{
	if (manager_waits(s))
		return;
	if (seq_windowed(s) || !holds_device_rows(s) || s->saves++ > 5)
		forget_device_rows(s);
	else if (manager_plan(s, true) < 0)
		manager_put_off(s); /* counts as a try */
}

void seq_leave(struct seq *s, bool drop)
{
	struct plan *p = s->plan;

	if (s->state == SEQ_CLOSING)
		return;
	if (s->lifetime != KVT_LEASED || drop || s->core->freeing) {
		seq_end(s);
		return;
	}
	if (s->state != SEQ_LIVE)
		return;
	if (p && !p->over && p->phase == PHASE_READY && !seq_windowed(s))
		distrust(s, p);
	if (p) {
		p->cause = JOURNAL_LEFT;
		plan_cancel(p);
	}
	share_leave(s);
	s->state = SEQ_SAVING;
	s->saves = 0;
	s->requested = 0;
	seq_step(s);
}

void seq_expire(struct core *c, uint64_t now)
{
	struct seq *s, *next;

	for (s = TAILQ_FIRST(&c->gone); s; s = next) {
		next = TAILQ_NEXT(s, gone);
		if (s->expires_ns > now || planted("lease-without-end"))
			continue;
		log_about(&s->tenant->said, 6, "seq %016llx: lease ended", (unsigned long long)s->handle);
		seq_end(s);
	}
}
