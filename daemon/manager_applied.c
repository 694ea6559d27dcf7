/* SPDX-License-Identifier: MIT */
/* What an acknowledgement means for the index, and how many rows may come before the next plan is due. */
#include <string.h>
#include "daemon/internal.h"
#include "daemon/usdt.h"
#include "shm/trial.h"
#include "shm/util.h"

void manager_applied(struct seq *s, struct plan *p, const uint64_t *nack)
{
	struct core *c = s->core;
	struct index *ix = &s->ix;

	for (uint32_t l = 0; l < ix->lanes; l++) {
		const uint64_t *after = p->t.resident + (uint64_t)l * p->words,
			       *drop = p->drop + (uint64_t)l * p->words;

		if (nack && bits_test(nack, l) && !planted("nack-ignored"))
			continue;
		memcpy(index_bits(ix, KVT_TIER_DEVICE, l), after, p->words * sizeof(uint64_t));
		if (p->dropped[l])
			for (int t = 0; t < KVT_TIERS; t++) {
				uint64_t *on = index_bits(ix, t, l);

				for (uint32_t w = 0; w < p->words; w++)
					on[w] &= ~drop[w];
			}
		ix->resident[l] = bits_rank(index_bits(ix, KVT_TIER_DEVICE, l), ix->rows);
		c->stat.rows_dropped += p->dropped[l];
		if (p->dropped[l])
			USDT(drop, s->handle, l, p->dropped[l]);
		index_sweep(ix, &c->pages, l);
	}
	if (p->win)
		s->look_twice = nack && p->win->direct;
	c->stat.plans_acked += p->id != 0;
	journal_over(p,
		     p->saving ? JOURNAL_SAVED
		     : p->id   ? JOURNAL_ACKED
			       : JOURNAL_NOTHING,
		     nack ? bits_rank(nack, ix->lanes) : 0);
	USDT(plan_acked, s->handle, p->id, now_ns() - p->started_ns);
	if (p->id)
		core_feed(c, FEED_ACK, s, p->id, 0, NULL);
	share_settled(p, !nack);
	settle_start(s, p->to_nvme, p->words);
	compact_start(s);
	p->over = true; /* done with */
	seq_recount(s);
	manager_headroom(s);
}

/* How many rows may come before a lane exceeds its budget by the slack, and what its layout can hold. */
void manager_headroom(struct seq *s)
{
	const struct config *cfg = &s->core->cfg;
	uint64_t room = ROWS_ALL, head = ROWS_ALL;

	for (uint32_t l = 0; s->layout && l < s->ix.lanes; l++) {
		uint64_t have = s->ix.resident[l], cap = s->layout[s->model->lane_layer[l]].cap;
		uint64_t budget = s->device_table ? s->device_table[l] : s->budget[KVT_TIER_DEVICE];

		if (s->adaptive)
			budget = s->adaptive[l];

		room = MIN(room, cap > have ? cap - have : 0);
		if (s->budget_default)
			budget = ROWS_ALL;
		budget = MIN(budget, s->device_cap);
		if (budget != ROWS_ALL)
			head = MIN(head, budget + s->slack > have ? budget + s->slack - have : 0);
	}
	if (s->write_through)
		head = MIN(head, s->slack);
	/* A share of a growing length: due when the length grew by the slack and a sixteenth. */
	if (s->budget_default && (cfg->budget_device || cfg->budget_dram || cfg->budget_nvme))
		head = MIN(head, s->slack + s->ix.rows / 16);
	s->room = (uint32_t)room;
	/* Where a plan could not reach the budget the next one waits for new rows all the same. */
	s->headroom = (uint32_t)MAX(head, s->slack);
}
