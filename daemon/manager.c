/* SPDX-License-Identifier: MIT */
/*
 * The manager: when a plan is due, from its beginning to a published decision, and what becomes of one that
 * cannot be carried out. The cost of a plan depends on the rows of its sequence alone.
 *
 *   manager_consider → manager_plan → manager_work: [score jobs] → decide job → manager_decided → publish →
 *   mover → manager_moved → READY → the client applies and acks → manager_applied
 */
#include <string.h>
#include "daemon/internal.h"
#include "daemon/usdt.h"
#include "shm/trial.h"
#include "shm/util.h"

#define AGAIN_NS UINT64_C(100000000) /* there was no memory */

static int why_given_up(int error)
{
	switch (error) {
	case -ENOSPC:
		return KVT_E_NOSPC;
	case -EILSEQ:
		return KVT_E_CORRUPT;
	case -EBUSY:
		return KVT_E_BUSY;
	default:
		return KVT_E_IO;
	}
}

/* What was asked for does not come. Who waits for it looks when it is told of a cancelled plan. */
static void given_up(struct seq *s, int error)
{
	s->plan_id = MAX(s->plan_id, s->requested); /* the next request is another one */
	s->requested = 0;
	if (s->client)
		plan_give_up((char *)s->client->plans->seg.addr + s->plan_off, s->plan_id,
			     (uint32_t)-why_given_up(error));
}

/* The same where no plan was published. */
static void refused(struct seq *s, int error)
{
	if (!s->requested)
		return;
	given_up(s, error);
	if (s->client)
		client_notify(s->client, Q_PLAN, s->handle, s->plan_id, PLAN_CANCELLED);
}

void manager_failed(struct seq *s, int error)
{
	log_about(&s->tenant->said, 3, "plan: seq %016llx: %s", (unsigned long long)s->handle,
		  strerror(-error));
	if (error == -ENOMEM && !planted("oom-gives-up"))
		manager_put_off(s);
	else
		refused(s, error);
}

void manager_put_off(struct seq *s)
{
	s->not_before_ns = now_ns() + AGAIN_NS;
	s->again = true;
}

bool manager_waits(struct seq *s)
{
	if (s->not_before_ns > now_ns())
		return true;
	s->not_before_ns = 0;
	return false;
}

/* ---- starting --------------------------------------------------------------------- */

static uint64_t weights_of(const struct policy_use *u)
{
	return u->ops->weights_id ? u->ops->weights_id(u->policy) : 0;
}

/* Are keys that `had` gave what `now` would give? */
static bool same_keys(const struct policy_use *had, const struct policy_use *now)
{
	return had && (had == now || (had->ops == now->ops && weights_of(had) == weights_of(now)));
}

int manager_plan(struct seq *s, bool save)
{
	struct core *c = s->core;
	uint32_t from = MIN(s->ix.rows, s->scored);
	struct plan *p;
	int r = index_extend(&s->ix, s->rows);

	if (r < 0)
		return r;
	seq_fresh(s);
	p = calloc(1, sizeof(*p));
	if (!p)
		return -ENOMEM;
	p->seq = s;
	p->epoch = s->epoch;
	p->watermark = s->rows;
	p->words = (uint32_t)BITS_WORDS(s->rows);
	p->from = from;
	p->plane_from = s->plane_from;
	p->started_ns = now_ns();
	USDT(plan_begin, s->handle, s->rows);
	p->requested = s->requested != 0;
	p->saving = save;
	p->write_through = s->write_through && !save;
	p->cut.tier = KVT_TIER_DRAM;
	/* Copies: a reload or a request may change the originals while a worker decides. */
	p->protect_first = c->cfg.protect_first;
	p->protect_last = c->cfg.protect_last;
	p->hysteresis = c->cfg.hysteresis_permille;
	p->promote_none = s->retries >= PLAN_RETRIES;
	r = plan_alloc(p, save || c->frozen || c->cfg.observe);
	if (r < 0)
		goto fail;
	p->use = policies_get(s);
	r = p->use ? plan_alloc_keys(p) : -ENOMEM;
	if (r < 0)
		goto fail;
	s->ops = p->use->ops;
	p->rescore = from && !same_keys(s->keys_use, p->use);
	if (s->region)
		p->region = region_ref(s->region);
	s->plan = p;
	budget_for(p);
	p->error = adaptive_begin(p);
	s->nonce++;
	s->recent_page[s->nonce % ARRAY_SIZE(s->recent_page)] = c->pages.next;
	s->recent_rows[s->nonce % ARRAY_SIZE(s->recent_rows)] = s->rows;
	settle_stop(s);
	seq_touch(s);
	p->refs = 1; /* ours, until every job is out */
	r = p->error ? p->error : manager_work(p);
	if (r < 0) {
		manager_failed(s, r);
		p->error = r;
		p->over = true;
	}
	plan_unref(p);
	return 0;
fail:
	plan_free(p);
	return r;
}

/* ---- deciding ------------------------------------------------------------------------- */

static void sum_up(struct plan *p)
{
	for (uint32_t l = 0; l < p->seq->ix.lanes; l++) {
		p->rows_kept += p->kept[l];
		p->rows_out += p->out[l];
		p->rows_in += p->in[l];
		p->rows_drop += p->dropped[l];
	}
}

/* Nothing for the client to do: every lane keeps what it has. */
static bool nothing_moves(const struct plan *p)
{
	if (p->rows_out || p->rows_in)
		return false;
	for (uint32_t l = 0; l < p->seq->ix.lanes; l++)
		if (p->kept[l] != p->seq->ix.resident[l])
			return false;
	return true;
}

static void account(struct plan *p)
{
	struct core *c = p->seq->core;
	uint64_t now = now_ns(), ns = now - p->started_ns;
	uint32_t rows[4] = {(uint32_t)MIN(p->rows_kept, UINT32_MAX), (uint32_t)MIN(p->rows_out, UINT32_MAX),
			    (uint32_t)MIN(p->rows_in, UINT32_MAX), (uint32_t)MIN(p->rows_drop, UINT32_MAX)};

	c->stat.plans++;
	histogram_add(&c->stat.plan_ns, ns);
	histogram_add(&c->stat.decide_ns, now - p->decide_ns);
	c->stat.plan_ns_last = ns;
	c->stat.plan_ns_total += ns;
	c->stat.plan_ns_max = MAX(c->stat.plan_ns_max, ns);
	p->seq->plans++;
	p->seq->plan_ns_last = ns;
	journal_decided(p, now);
	core_feed(c, FEED_PLAN, p->seq, p->id, 0, rows);
	USDT(plan_decided, p->seq->handle, p->id, ns, p->rows_out, p->rows_in, p->rows_drop);
}

static void carried_out(struct seq *s)
{
	s->retries = 0;
	memset(s->avoid, 0, sizeof(s->avoid));
}

static void publish(struct plan *p)
{
	struct seq *s = p->seq;
	bool moves = p->rows_out || p->rows_in;

	if (!p->saving)
		p->id = ++s->plan_id;
	if (!p->private_tables) {
		plan_header(p);
		plan_publish(&p->t, p->id, moves ? PLAN_DECIDED : PLAN_READY);
		client_notify(s->client, Q_PLAN, s->handle, p->id, moves ? PLAN_DECIDED : PLAN_READY);
	}
	account(p);
	p->phase = PHASE_MOVE;
	if (moves) {
		mover_start(p);
	} else {
		carried_out(s);
		p->phase = PHASE_READY;
		if (p->saving)
			manager_applied(s, p, NULL);
	}
}

void manager_decided(struct plan *p)
{
	struct seq *s = p->seq;

	s->refs++;
	p->phase = PHASE_MOVE;
	if (!p->error && p->epoch == s->epoch) {
		s->scored = MAX(s->scored, p->watermark);
		policies_put(s->core, s->keys_use);
		s->keys_use = policies_ref(p->use);
		if (p->use->coefs < 2)
			index_keep_coef(&s->ix, false);
	}
	if (p->error || p->epoch != s->epoch || s->state == SEQ_CLOSING)
		p->over = true;
	adaptive_done(p);
	free(p->keys);
	p->keys = NULL;
	if (p->error)
		manager_failed(s, p->error);
	if (!p->over) {
		sum_up(p);
		if (p->wanted && s->wanted)
			memset(s->wanted, 0, BITS_WORDS(s->max_rows) * sizeof(uint64_t));
		if (p->private_tables && !p->saving) {
			account(p); /* observe, frozen: counted and not published */
			journal_over(p, JOURNAL_COUNTED, 0);
			p->over = true;
			refused(s, -EBUSY);
		} else if (nothing_moves(p) && !p->requested) {
			account(p);
			p->phase = PHASE_READY;
			manager_applied(s, p, NULL);
		} else {
			if (p->requested && s->requested <= s->plan_id + 1)
				s->requested = 0;
			publish(p);
		}
	}
	repack_unpark(s);
	plan_unref(p);
	seq_unref(s);
}

void manager_again(struct plan *p, bool at_once)
{
	struct seq *s = p->seq;

	s->again = at_once;
	if (p->requested && at_once)
		s->requested = s->plan_id + 1;
	for (uint32_t w = 0; p->wanted && s->wanted && w < p->words; w++)
		s->wanted[w] |= p->wanted[w];
}

void manager_redo(struct seq *s)
{
	struct plan *p = s->plan;

	if (!p || p->over)
		return;
	plan_cancel(p);
	if (p->requested)
		manager_again(p, true);
}

void manager_moved(struct plan *p)
{
	struct seq *s = p->seq;
	struct core *c = s->core;

	s->refs++;
	if (!p->over && (p->missed || p->error)) {
		bool again = p->error == -ENOMEM || s->retries++ < PLAN_RETRIES;

		log_about(&s->tenant->said, again ? 5 : 4, "plan %llu: seq %016llx: %s, %s",
			  (unsigned long long)p->id, (unsigned long long)s->handle,
			  p->missed             ? "a promotion missed"
			  : p->error == -EILSEQ ? "what the window holds is not what was announced"
						: strerror(-p->error),
			  again ? "planned again" : "given up until the next rows");
		p->cause = p->missed ? JOURNAL_MISSED : JOURNAL_FAILED;
		if (!again && p->requested)
			given_up(s, p->error);
		plan_cancel(p);
		manager_again(p, again);
		if (p->error == -ENOMEM)
			manager_put_off(s);
	} else if (!p->over) {
		carried_out(s);
		p->phase = PHASE_READY;
		c->stat.rows_promoted[KVT_TIER_DEVICE] += p->rows_in;
		journal_moved(p);
		USDT(plan_ready, s->handle, p->id, now_ns() - p->started_ns);
		if (p->saving) {
			manager_applied(s, p, NULL);
		} else if (p->rows_out || p->rows_in) {
			plan_set_state(p->t.hdr, PLAN_READY);
			core_feed(c, FEED_READY, s, p->id, 0, NULL);
			client_notify(s->client, Q_PLAN, s->handle, p->id, PLAN_READY);
		}
	}
	plan_unref(p);
	seq_unref(s);
}

/* ---- when ---------------------------------------------------------------------------------- */

void manager_consider(struct seq *s)
{
	int r;

	if (s->plan || s->state != SEQ_LIVE || s->cut != ROWS_ALL || !s->rows || s->core->freeing ||
	    manager_waits(s))
		return;
	if (!s->requested && !s->again &&
	    (s->manual || s->headroom == ROWS_ALL || s->rows - s->ix.rows <= s->headroom))
		return;
	s->again = false;
	r = manager_plan(s, false);
	if (r < 0)
		manager_failed(s, r);
}
