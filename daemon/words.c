/* SPDX-License-Identifier: MIT */
/* What a client says in its sequence's slot. Each word is copied once; the copy is checked, then used. */
#include "daemon/internal.h"
#include "shm/util.h"

/* One look at slot.acked. */
static bool poll_acked(struct seq *s)
{
	uint64_t acked = atomic_load_explicit(&s->client->slots[s->slot].acked, memory_order_acquire);
	uint32_t words = (uint32_t)BITS_WORDS(s->ix.lanes), refused = 0;
	uint64_t nack[CTL_MAX_LANES / 64];
	struct plan *p = s->plan;

	if (acked == s->acked)
		return true;
	if (acked > s->plan_id || acked < s->acked) {
		client_end(s->client, "slot.acked: %llu, plans so far are %llu..%llu",
			   (unsigned long long)acked, (unsigned long long)s->acked,
			   (unsigned long long)s->plan_id);
		return false;
	}
	s->acked = acked;
	if (!p || p->over || p->id != acked)
		return true; /* of a plan that was cancelled meanwhile */
	for (uint32_t w = 0; w < words; w++) {
		nack[w] = __atomic_load_n(&s->client->slots[s->slot].nack[w], __ATOMIC_RELAXED);
		if (w == words - 1 && s->ix.lanes % 64)
			nack[w] &= (UINT64_C(1) << (s->ix.lanes % 64)) - 1;
		refused += (uint32_t)__builtin_popcountll(nack[w]);
	}
	if (refused)
		s->core->stat.plans_nacked++;
	if (p->phase != PHASE_READY && refused < s->ix.lanes) {
		client_end(s->client, "slot.acked: plan %llu is not ready yet", (unsigned long long)acked);
		return false;
	}
	if (p->phase == PHASE_READY) {
		manager_applied(s, p, refused ? nack : NULL);
	} else {
		p->cause = JOURNAL_REFUSED;
		plan_cancel(p);
		if (p->win)
			window_refused(p);
	}
	return true;
}

/*
 * Rows that the layouts can hold. A client may have applied a READY plan and not said so yet, or since we
 * looked: then what it left free counts.
 */
static uint32_t rows_at_most(const struct seq *s)
{
	uint32_t most = s->ix.rows + s->room, room = ROWS_ALL;
	const struct plan *p = s->plan;

	if (!p || p->over || p->phase != PHASE_READY)
		return most;
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		uint32_t cap = s->layout[s->model->lane_layer[l]].cap;

		room = MIN(room, cap - MIN(p->kept[l], cap));
	}
	return MAX(most, p->watermark + room);
}

/* One look at slot.len. */
static bool poll_len(struct seq *s)
{
	uint64_t len = atomic_load_explicit(&s->client->slots[s->slot].len, memory_order_acquire);
	uint32_t epoch = (uint32_t)(len >> 32), rows = (uint32_t)len;

	if (epoch < s->epoch || (epoch == s->epoch && rows == s->rows))
		return true; /* before the last truncate, or nothing new */
	if (epoch > s->epoch || rows < s->rows || rows > s->max_rows) {
		client_end(s->client, "slot.len: epoch %u rows %u, must be epoch %u rows %u..%u", epoch, rows,
			   s->epoch, s->rows, s->max_rows);
		return false;
	}
	/* With a cut pending the room is not known yet; the device checks every slot anyway. */
	if (s->cut == ROWS_ALL && rows > rows_at_most(s)) {
		client_end(s->client, "slot.len: %u rows, a layout has room for %u", rows, rows_at_most(s));
		return false;
	}
	s->rows = rows;
	seq_fresh(s);
	return true;
}

void seq_last_words(struct seq *s)
{
	if (s->state == SEQ_LIVE && poll_acked(s))
		poll_len(s);
}

bool seq_poll(struct seq *s)
{
	bool live;

	s->refs++; /* a client that lies ends here, and its sequences with it */
	if (s->state == SEQ_LIVE && poll_acked(s) && poll_len(s) && (!seq_windowed(s) || window_poll(s)))
		seq_step(s);
	live = s->state == SEQ_LIVE && s->client;
	seq_unref(s);
	return live;
}
