/* SPDX-License-Identifier: MIT */
#include "daemon/journal.h"
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "daemon/internal.h"
#include "shm/util.h"

#define FIRST 4u

uint64_t journal_bytes(const struct journal *j)
{
	return j ? heap_bytes(sizeof(*j) + j->cap * sizeof(j->e[0])) : 0;
}

uint32_t journal_count(const struct journal *j)
{
	return j ? (uint32_t)MIN(j->made, j->cap) : 0;
}

const struct journal_entry *journal_at(const struct journal *j, uint32_t i)
{
	return &j->e[(j->made - journal_count(j) + i) % j->cap];
}

/* A ring that grows has never wrapped: it grows as long as it is full for the first time. */
struct journal_entry *journal_add(struct journal **jp)
{
	struct journal *j = *jp;
	struct journal_entry *e;

	if (!j || (j->made == j->cap && j->cap < JOURNAL_MOST)) {
		uint32_t cap = j ? 2 * j->cap : FIRST;
		struct journal *more = realloc(j, sizeof(*j) + cap * sizeof(j->e[0]));

		if (!more && !j)
			return NULL;
		if (more) {
			more->made = j ? more->made : 0;
			more->cap = cap;
			*jp = j = more;
		} /* else the oldest one makes place */
	}
	e = &j->e[j->made++ % j->cap];
	memset(e, 0, sizeof(*e));
	return e;
}

/* The plan's record, while it is the newest. */
static struct journal_entry *of(const struct plan *p)
{
	struct journal *j = p->seq->journal;

	return j && p->journal && p->journal == j->made ? &j->e[(j->made - 1) % j->cap] : NULL;
}

void journal_cut(struct plan *p)
{
	const uint16_t *key = plan_keys(p, 0);
	const struct index *ix = &p->seq->ix;
	uint32_t last = p->watermark > p->protect_last ? p->watermark - p->protect_last : 0;

	p->lowest_kept = p->highest_gone = 0;
	for (uint32_t i = p->protect_first; i < last; i++) {
		bool kept = bits_test(p->t.resident, i);

		if ((p->pinned && bits_test(p->pinned, i)) || (p->wanted && bits_test(p->wanted, i)))
			continue;
		if (kept && (!p->lowest_kept || key[i] < p->lowest_kept))
			p->lowest_kept = key[i];
		else if (!kept && key[i] > p->highest_gone &&
			 (bits_test(index_bits(ix, 0, 0), i) || bits_test(index_bits(ix, 1, 0), i) ||
			  bits_test(index_bits(ix, 2, 0), i)))
			p->highest_gone = key[i];
	}
}

void journal_decided(struct plan *p, uint64_t now)
{
	struct seq *s = p->seq;
	struct journal_entry *e = journal_add(&s->journal);
	struct timespec ts;

	if (!e)
		return;
	clock_gettime(CLOCK_REALTIME, &ts);
	p->journal = s->journal->made;
	e->time_ns = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
	e->plan = p->id;
	e->epoch = p->epoch;
	e->watermark = p->watermark;
	e->policy = p->use->ops->name;
	e->fallback = p->use->reason[0];
	e->adaptive = p->worth || p->bid;
	e->limits = p->limits | (p->stuck ? JOURNAL_STUCK : 0) | (p->direct ? JOURNAL_BYPASS : 0) |
		    (p->promote_none ? JOURNAL_STAYED : 0);
	for (int t = 0; t < KVT_TIERS; t++) {
		e->budget[t] = p->budget[t][0];
		e->asked[t] = p->asked[t];
	}
	for (uint32_t l = 0; l < s->ix.lanes; l++)
		e->most = MAX(e->most, p->budget[0][l]);
	e->kept = p->rows_kept;
	e->out = p->rows_out;
	e->in = p->rows_in;
	e->dropped = p->rows_drop;
	e->lowest_kept = p->lowest_kept;
	e->highest_gone = p->highest_gone;
	e->score_ns = p->decide_ns - p->started_ns;
	e->decide_ns = now - p->decide_ns;
	e->at_ns = now;
	e->refaults = s->refaults;
	e->misses = s->misses;
	e->stalls_known = s->client && probes_process(s->core, s->client->pid, &e->stall);
	seq_account(s);
}

void journal_moved(struct plan *p)
{
	struct journal_entry *e = of(p);
	uint64_t now = now_ns();

	if (!e || e->outcome)
		return;
	e->move_ns = now - e->at_ns;
	e->at_ns = now;
}

void journal_over(struct plan *p, enum journal_outcome outcome, uint32_t nacked)
{
	struct journal_entry *e = of(p);
	uint64_t now = now_ns();

	if (!e || e->outcome)
		return;
	e->outcome = (uint8_t)outcome;
	e->cause = p->cause;
	e->nacked = nacked;
	if (outcome == JOURNAL_ACKED)
		e->ack_ns = now - e->at_ns;
	e->at_ns = now;
}

void journal_move(const struct seq *s, int from, int to, uint32_t rows)
{
	struct journal *j = s->journal;

	if (!j || !j->made || from == KVT_TIER_DEVICE || to == KVT_TIER_DEVICE)
		return;
	if (to > from)
		j->e[(j->made - 1) % j->cap].down += rows;
	else if (to < from)
		j->e[(j->made - 1) % j->cap].up += rows;
}
