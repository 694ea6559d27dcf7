/* SPDX-License-Identifier: MIT */
/*
 * What happened to a sequence, and why a row is where it is: the journal and the index as they are now. Nothing
 * is changed, and nothing read while a worker writes keys: who asks then is told to ask again.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "daemon/internal.h"
#include "daemon/json_text.h"
#include "policy/decide.h"
#include "shm/util.h"

#define SLICE_NS UINT64_C(300000)

static const char *const tier_names[KVT_TIERS] = {"device", "dram", "nvme"};

/* ---- the journal --------------------------------------------------------------------- */

static void put_limits(struct json_text *o, unsigned limits)
{
	static const char *const names[] = {"low", "demoted", "layout", "stuck", "bypass", "stayed"};

	json_text_open(o, "limits", '[');
	for (unsigned i = 0; i < ARRAY_SIZE(names); i++)
		if (limits >> i & 1)
			json_text_str(o, NULL, names[i]);
	json_text_close(o, ']');
}

void json_text_budget(struct json_text *o, const char *key, const uint32_t rows[KVT_TIERS])
{
	json_text_open(o, key, '{');
	for (int t = 0; t < KVT_TIERS; t++)
		if (rows[t] == ROWS_ALL)
			json_text_null(o, tier_names[t]);
		else
			json_text_num(o, tier_names[t], rows[t]);
	json_text_close(o, '}');
}

static void put_score(struct json_text *o, const char *key, uint16_t k)
{
	float v = NAN;

	if (k)
		key_scores(&k, &v, 1);
	json_text_real(o, key, v);
}

static const char *outcome_of(const struct seq *s, const struct journal_entry *e, bool newest)
{
	static const char *const names[] = {"open", "acked", "nothing to do", "saved", "counted", "cancelled"};
	static const char *const causes[] = {"cancelled: the client changed the sequence",
					     "cancelled: a promotion missed",
					     "cancelled: rows could not be stored",
					     "cancelled: refused by the client",
					     "cancelled: its client left",
					     "cancelled: the sequence ended"};

	_Static_assert(ARRAY_SIZE(names) == JOURNAL_OUTCOMES && ARRAY_SIZE(causes) == JOURNAL_CAUSES, "names");
	if (e->outcome == JOURNAL_CANCELLED)
		return causes[e->cause];
	if (e->outcome == JOURNAL_ACKED && e->nacked)
		return "acked, but by some lanes";
	if (e->outcome == JOURNAL_OPEN && newest && s->plan && !s->plan->over)
		return s->plan->phase == PHASE_READY ? "ready" : "moving";
	return names[e->outcome];
}

static void put_stall(struct json_text *o, const char *key, const struct probes_process *p)
{
	if (!p) {
		json_text_null(o, key);
		return;
	}
	json_text_open(o, key, '{');
	json_text_num(o, "sched_ns", p->sched_ns);
	json_text_num(o, "fault_ns", p->fault_ns);
	json_text_num(o, "reclaim_ns", p->reclaim_ns);
	json_text_num(o, "faults", p->faults);
	json_text_close(o, '}');
}

/* Between two looks at one process: another one begins anew, and what it waited is not this one's. */
static bool stalled(const struct probes_process *a, const struct probes_process *b, struct probes_process *ret)
{
	*ret = (struct probes_process){b->sched_ns - a->sched_ns, b->fault_ns - a->fault_ns,
				       b->reclaim_ns - a->reclaim_ns, b->faults - a->faults};
	return a->sched_ns <= b->sched_ns && a->fault_ns <= b->fault_ns && a->reclaim_ns <= b->reclaim_ns &&
	       a->faults <= b->faults;
}

/* now: of the client, or NULL. */
static void put_entry_stall(struct json_text *o, const struct journal_entry *e,
			    const struct journal_entry *next, const struct probes_process *now)
{
	const struct probes_process *end = !next ? now : next->stalls_known ? &next->stall : NULL;
	struct probes_process d;

	put_stall(o, "stall", e->stalls_known && end && stalled(&e->stall, end, &d) ? &d : NULL);
}

static void put_p99(struct json_text *o, const char *key, const struct histogram *h)
{
	if (histogram_count(h))
		json_text_num(o, key, histogram_quantile(h, 0.99));
	else
		json_text_null(o, key);
}

/* What the kernel's probes say of its client, and of the host to those who may know; or why they say nothing.
 */
static void put_probes(struct json_text *o, const struct seq *s, const struct probes_process *now, bool host)
{
	struct probes_stat p;
	const char *why = "its client's process has no place among those that are watched";

	probes_stat(s->core, &p);
	json_text_open(o, "probes", '{');
	json_text_bool(o, "on", p.on);
	put_stall(o, "client", now);
	for (uint32_t i = 0; i < p.programs; i++)
		if (!strcmp(p.program[i].name, "sched") && !p.program[i].on)
			why = p.program[i].why_off;
	if (!now)
		json_text_str(o, "why_off", !p.on ? p.why_off : !s->client ? "it has no client" : why);
	if (p.on && host) {
		put_p99(o, "disk_read_ns_p99", &p.disk_read);
		put_p99(o, "disk_write_ns_p99", &p.disk_write);
		put_p99(o, "uring_ns_p99", &p.uring);
	}
	json_text_close(o, '}');
}

static void put_entry(struct json_text *o, const struct seq *s, uint32_t i, uint32_t n,
		      const struct probes_process *now)
{
	const struct journal_entry *e = journal_at(s->journal, i),
				   *next = i + 1 < n ? journal_at(s->journal, i + 1) : NULL;

	json_text_open(o, NULL, '{');
	json_text_num(o, "time_ns", e->time_ns);
	json_text_num(o, "plan", e->plan);
	json_text_num(o, "epoch", e->epoch);
	json_text_num(o, "watermark", e->watermark);
	json_text_str(o, "policy", e->policy);
	json_text_bool(o, "fallback", e->fallback);
	if (e->fallback && s->keys_use && s->keys_use->reason[0])
		json_text_str(o, "reason", s->keys_use->reason);
	json_text_budget(o, "asked", e->asked);
	json_text_budget(o, "budget", e->budget);
	json_text_num(o, "device_most", e->most);
	json_text_bool(o, "adaptive", e->adaptive);
	put_limits(o, e->limits);
	json_text_num(o, "kept", e->kept);
	json_text_num(o, "out", e->out);
	json_text_num(o, "in", e->in);
	json_text_num(o, "dropped", e->dropped);
	json_text_num(o, "down", e->down);
	json_text_num(o, "up", e->up);
	put_score(o, "lowest_kept", e->lowest_kept);
	put_score(o, "highest_gone", e->highest_gone);
	json_text_num(o, "score_ns", e->score_ns);
	json_text_num(o, "decide_ns", e->decide_ns);
	json_text_num(o, "move_ns", e->move_ns);
	json_text_num(o, "ack_ns", e->ack_ns);
	json_text_num(o, "refaults", (next ? next->refaults : s->refaults) - e->refaults);
	json_text_num(o, "misses", (next ? next->misses : s->misses) - e->misses);
	put_entry_stall(o, e, next, now);
	json_text_num(o, "nacked", e->nacked);
	json_text_str(o, "outcome", outcome_of(s, e, !next));
	json_text_close(o, '}');
}

int core_seq_trace(struct core *c, uint64_t handle, bool host, struct json_text *o)
{
	const struct seq *s = handle_get(c->seqs, handle, NULL);
	struct probes_process stall, *now = NULL;
	uint32_t n;

	if (!s)
		return KVT_E_STALE;
	if (s->client && probes_process(c, s->client->pid, &stall))
		now = &stall;
	n = journal_count(s->journal);
	json_text_open(o, NULL, '{');
	json_text_num(o, "rows", s->rows);
	json_text_num(o, "lanes", s->ix.lanes);
	json_text_num(o, "made", s->journal ? s->journal->made : 0);
	json_text_open(o, "plans", '[');
	for (uint32_t i = 0; i < n; i++)
		put_entry(o, s, i, n, now);
	json_text_close(o, ']');
	put_probes(o, s, now, host);
	json_text_close(o, '}');
	return 0;
}

/* ---- one row ------------------------------------------------------------------------- */

struct row {
	uint32_t pos, lane, rank, alive; /* rank: alive rows of the lane before it */
	uint16_t key;
	uint32_t budget[KVT_TIERS];
	bool in[KVT_TIERS], fresh;
	const char *class; /* why it goes before others, or NULL */
};

/* As the decision ranks: protected, pinned, wanted, then by key; ties go to the later one. Lower is earlier. */
static unsigned class_of(const struct seq *s, uint32_t pos)
{
	const struct config *cfg = &s->core->cfg;
	uint32_t rows = s->ix.rows;

	if (pos < cfg->protect_first)
		return 0;
	if (pos + cfg->protect_last >= rows)
		return 1;
	if (s->pinned && bits_test(s->pinned, pos))
		return 2;
	return s->wanted && bits_test(s->wanted, pos) ? 3 : 4;
}

void seq_budgets(const struct seq *s, uint32_t lane, uint32_t ret[KVT_TIERS])
{
	uint32_t n = journal_count(s->journal);

	memcpy(ret, n ? journal_at(s->journal, n - 1)->budget : s->budget, KVT_TIERS * sizeof(*ret));
	if (s->adaptive)
		ret[0] = s->adaptive[lane];
	else if (s->device_table)
		ret[0] = MIN(s->device_table[lane], s->device_cap);
}

static void rank_row(const struct seq *s, const uint16_t *key, struct row *r)
{
	static const char *const names[] = {"one of the first rows, protected",
					    "one of the last rows, protected", "pinned", "wanted by its client",
					    NULL};
	const uint64_t *dev = index_bits(&s->ix, 0, r->lane), *dram = index_bits(&s->ix, 1, r->lane),
		       *nvme = index_bits(&s->ix, 2, r->lane);
	unsigned mine = class_of(s, r->pos);

	r->class = names[mine];
	r->key = key[r->pos];
	for (uint32_t w = 0; w < BITS_WORDS(s->ix.rows); w++)
		for (uint64_t v = dev[w] | dram[w] | nvme[w]; v; v &= v - 1) {
			uint32_t i = w * 64 + (uint32_t)__builtin_ctzll(v);
			unsigned theirs = class_of(s, i);

			r->alive++;
			if (theirs < mine ||
			    (theirs == mine && (key[i] > r->key || (key[i] == r->key && i > r->pos))))
				r->rank++;
		}
}

static void rows_text(char *buf, size_t n, uint32_t rows)
{
	if (rows == ROWS_ALL)
		snprintf(buf, n, "all");
	else
		snprintf(buf, n, "%u", rows);
}

static void why(const struct seq *s, const struct row *r, char *buf, size_t size)
{
	uint32_t n = journal_count(s->journal);
	const struct journal_entry *e = n ? journal_at(s->journal, n - 1) : NULL;
	char dev[12], dram[12], nvme[12];

	rows_text(dev, sizeof(dev), r->budget[0]);
	rows_text(dram, sizeof(dram), r->budget[1]);
	rows_text(nvme, sizeof(nvme), r->budget[2]);
	if (r->fresh)
		snprintf(buf, size, "device: appended after the last plan, not ranked yet");
	else if (!r->in[0] && !r->in[1] && !r->in[2])
		snprintf(buf, size, "dropped: budgets device %s, dram %s, nvme %s%s", dev, dram, nvme,
			 e && e->limits & JOURNAL_LOW ? ", below those asked for: quota or space" : "");
	else
		snprintf(buf, size, "%s: rank %u of %u, budgets device %s, dram %s, nvme %s%s%s%s%s",
			 r->in[0]   ? "device"
			 : r->in[1] ? "dram"
				    : "nvme",
			 r->rank + 1, r->alive, dev, dram, nvme, r->class ? "; " : "", r->class ?: "",
			 s->granularity == KVT_GRAN_HEAD ? "" : "; whole tokens: lanes rank together",
			 e && e->limits & JOURNAL_DEMOTED ? "; demoted by hand" : "");
}

static void put_page(struct json_text *o, const struct seq *s, const struct row *r)
{
	const struct lane_pages *lp = &s->ix.lane[r->lane];

	for (uint32_t i = 0; i < lp->n && lp->v[i]->first <= r->pos; i++) {
		const struct page *p = lp->v[i];

		if (!page_has(p, r->pos) || index_limit(&s->ix, p->epoch) <= r->pos)
			continue;
		json_text_open(o, "page", '{');
		json_text_num(o, "number", p->number);
		json_text_num(o, "first", p->first);
		json_text_num(o, "rows", p->rows);
		json_text_bool(o, "dram", page_in(p, KVT_TIER_DRAM));
		json_text_bool(o, "nvme", page_in(p, KVT_TIER_NVME));
		json_text_close(o, '}');
		return;
	}
	json_text_null(o, "page");
}

static void put_row(struct json_text *o, const struct seq *s, const struct row *r)
{
	char text[200];

	json_text_open(o, NULL, '{');
	json_text_num(o, "lane", r->lane);
	json_text_num(o, "key", r->key);
	put_score(o, "score", r->key);
	if (r->fresh || !(r->in[0] || r->in[1] || r->in[2]))
		json_text_null(o, "rank");
	else
		json_text_num(o, "rank", r->rank + 1);
	json_text_num(o, "of", r->alive);
	json_text_budget(o, "budget", r->budget);
	json_text_open(o, "tiers", '[');
	for (int t = 0; t < KVT_TIERS; t++)
		if (r->in[t])
			json_text_str(o, NULL, tier_names[t]);
	json_text_close(o, ']');
	put_page(o, s, r);
	why(s, r, text, sizeof(text));
	json_text_str(o, "why", text);
	json_text_close(o, '}');
}

static void look_at(const struct seq *s, uint16_t *scratch, struct row *r)
{
	const uint16_t *key = s->ix.key + (size_t)r->lane * s->ix.cap;

	seq_budgets(s, r->lane, r->budget);
	r->fresh = r->pos >= s->ix.rows;
	if (r->fresh) {
		r->in[0] = true;
		return;
	}
	for (int t = 0; t < KVT_TIERS; t++)
		r->in[t] = bits_test(index_bits(&s->ix, t, r->lane), r->pos);
	if (s->keys_use && s->keys_use->coefs) {
		score_combine(s, s->keys_use, r->lane, s->ix.rows, s->ix.rows, scratch);
		key = scratch;
	}
	rank_row(s, key, r);
}

int core_row_trace(struct core *c, uint64_t handle, uint32_t pos, uint32_t lane, uint32_t lanes,
		   struct json_text *o, char *err, size_t errsize)
{
	struct seq *s = handle_get(c->seqs, handle, NULL);
	uint64_t end = now_ns() + SLICE_NS;
	_cleanup_free_ uint16_t *scratch = NULL;
	uint32_t last;

	if (!s)
		return KVT_E_STALE;
	if (pos >= s->rows || lane >= s->ix.lanes) {
		snprintf(err, errsize, "%s: %u, the sequence has %u %s", pos >= s->rows ? "POS" : "LANE",
			 pos >= s->rows ? pos : lane, pos >= s->rows ? s->rows : s->ix.lanes,
			 pos >= s->rows ? "rows" : "lanes");
		return KVT_E_INVAL;
	}
	if (s->cut != ROWS_ALL || (plan_lent(s) && s->plan->phase <= PHASE_DECIDE)) {
		snprintf(err, errsize, "a plan is being made, its ranks are not final: ask again");
		return KVT_E_BUSY;
	}
	if (s->keys_use && s->keys_use->coefs) {
		scratch = malloc(s->ix.rows * sizeof(*scratch) + 1);
		if (!scratch) {
			snprintf(err, errsize, "out of memory");
			return KVT_E_NOMEM;
		}
	}
	last = MIN(s->ix.lanes, lane + MIN(lanes, s->ix.lanes));
	json_text_open(o, NULL, '{');
	json_text_num(o, "pos", pos);
	json_text_open(o, "lanes", '[');
	for (uint32_t first = lane; lane < last && (lane == first || now_ns() < end); lane++) {
		struct row r = {.pos = pos, .lane = lane};

		look_at(s, scratch, &r);
		put_row(o, s, &r);
	}
	json_text_close(o, ']');
	if (lane < last)
		json_text_num(o, "next", lane);
	else
		json_text_null(o, "next");
	json_text_close(o, '}');
	return 0;
}
