/* SPDX-License-Identifier: MIT */
#pragma once
/* What clients and the operator do, one act at a time, by chance. */
#include "tests/torture/sim_check.h"

/* ---- clients' acts -------------------------------------------------------------------------- */

static struct mseq *any_live(void)
{
	struct mseq *s = &side.seq[below(MAX_SEQS)];

	return s->life == LIVE && !s->busy ? s : NULL;
}

/* What needs no call, while another one waits for its answer. */
static void meanwhile(void)
{
	struct mseq *s = one_in(4) ? any_live() : NULL;

	if (!s)
		return;
	if (one_in(2))
		seq_follow(s, false);
	else
		seq_append(s, between(1, 16));
}

static struct mclient *some_client(uint32_t tenant)
{
	unsigned first = below(MAX_CLIENTS);

	for (unsigned i = 0; i < MAX_CLIENTS; i++) {
		struct mclient *cl = &side.client[(first + i) % MAX_CLIENTS];

		if (cl->on && (tenant > 1 || cl->tenant == tenant))
			return cl;
	}
	return NULL;
}

static void new_key(struct mseq *s)
{
	/* Now and then that of one before: its pages may still be on the disk. */
	uint64_t key = side.next_key && one_in(5) ? 1 + below((uint32_t)side.next_key) : 0;

	for (unsigned i = 0; i < MAX_SEQS && key; i++)
		if (side.seq[i].life != GONE && !memcmp(side.seq[i].key, &key, sizeof(key)))
			key = 0;
	if (!key)
		key = ++side.next_key;
	memset(s->key, 0, sizeof(s->key));
	memcpy(s->key, &key, sizeof(key));
	/* What a power cut forgets may be that a sequence ended: then it is found again by who knows its
	 * secret. */
	key = one_in(2) && !scene.cuts ? key : 1000 + ++side.next_secret;
	memset(s->secret, 0, sizeof(s->secret));
	memcpy(s->secret, &key, sizeof(key));
}

static void act_open(struct mseq *s)
{
	struct mclient *cl = some_client(9);
	int st;

	if (!cl)
		return;
	memset(s, 0, sizeof(*s));
	s->leased = !one_in(3);
	s->max_rows = between(MAX_ROWS / 4, MAX_ROWS);
	s->cap = MIN(s->max_rows, between(24, 400));
	s->stage = one_in(6) ? 0 : between(1, 200);
	new_key(s);
	st = seq_open(s, cl, W_OP_OPEN, NULL, 0);
	must(!st || st == KVT_E_EXISTS || st == KVT_E_LIMIT || st == KVT_E_NOSPC || st == KVT_E_BUSY,
	     "open: %d", st);
}

static void act_resume(struct mseq *s)
{
	struct mclient *cl = some_client(one_in(20) ? 9 : s->tenant);
	struct mseq was = *s;
	int st;

	if (!cl)
		return;
	s->max_rows = MAX(s->rows, between(MAX_ROWS / 4, MAX_ROWS));
	s->cap = MIN(s->max_rows, between(24, 400));
	s->stage = one_in(6) ? 0 : between(1, 200);
	st = seq_open(s, cl, W_OP_RESUME, NULL, 0);
	if (!st)
		return;
	*s = was;
	s->cl = NULL;
	if (st == KVT_E_NOENT && cl->tenant == s->tenant) {
		must(s->dropped || world.now - s->left_ns > UINT64_C(50000000000),
		     "a lease ended early, or was lost");
		s->life = GONE;
	}
}

static void act_fork(struct mseq *s)
{
	struct mseq *child = &side.seq[below(MAX_SEQS)];
	int st;

	if (child->life != GONE || child->busy || s->eras + 2 >= MAX_ERAS)
		return;
	if (s->applied)
		seq_ack(s, s->applied, s->nacked[0]);
	memset(child, 0, sizeof(*child));
	child->leased = one_in(2);
	child->max_rows = s->max_rows;
	child->cap = MAX(s->cap, most_resident(s));
	child->stage = s->stage;
	new_key(child);
	st = seq_open(child, s->cl, W_OP_FORK, s, below(s->rows + 1));
	must(!st || st == KVT_E_EXISTS || st == KVT_E_LIMIT || st == KVT_E_NOSPC || st == KVT_E_BUSY ||
		     st == KVT_E_STALE,
	     "fork: %d", st);
	s->want = 0;
}

/* It is gone in the middle of whatever it did. */
static void act_die(struct mclient *cl)
{
	record("die", (uint64_t)(cl - side.client), 0, 0, 0);
	for (unsigned i = 0; i < MAX_SEQS; i++) {
		struct mseq *s = &side.seq[i];
		struct plan_view v;

		if (s->life != LIVE || s->cl != cl)
			continue;
		/* Rows were on the move: nothing above the first one that the plan changes is what it was. */
		if (!s->applied && one_in(3) && look(s, &v) && v.state == PLAN_READY)
			for (uint32_t l = 0; l < v.lanes; l++) {
				uint32_t pos = 0, slot = 0;

				if (one_in(2))
					continue;
				while (pos < v.watermark && bits_test(s->cur[l], pos) == stays(&v, s, l, pos))
					slot += bits_test(s->cur[l], pos++);
				if (pos < v.watermark)
					scribble(s, l, slot, s->cap + s->stage);
			}
		seq_lost(s, false);
	}
	client_off(cl);
}

static void client_act(void)
{
	struct mclient *cl = &side.client[below(MAX_CLIENTS)];
	struct mseq *s = &side.seq[below(MAX_SEQS)];
	uint32_t what = below(100);

	if (!cl->on) {
		client_on(cl, below(2));
		return;
	}
	if (what < 2) {
		act_die(cl);
		return;
	}
	if (what < 20)
		client_listen(cl);
	if (s->busy)
		return;
	if (s->life == GONE) {
		act_open(s);
	} else if (s->life == AWAY) {
		if (one_in(3))
			act_resume(s);
	} else if (what < 45) {
		seq_append(s, one_in(4) ? between(1, 160) : between(1, 24));
	} else if (what < 75) {
		seq_follow(s, false);
	} else if (what < 82) {
		seq_ask(s, false);
	} else if (what < 86) {
		seq_ask(s, true);
	} else if (what < 90 && s->eras + 1 < MAX_ERAS) {
		seq_cut(s, s->rows ? below(s->rows + 1) : 0);
	} else if (what < 93) {
		act_fork(s);
	} else if (what < 95) {
		seq_leave_by_call(s, one_in(2));
	} else {
		seq_info(s);
	}
}

/* ---- the operator's, the power's ------------------------------------------------------------- */

static void operator_act(void)
{
	struct core *c = side.core;
	struct mseq *s = any_live();
	struct config cfg = scene.cfg;
	char err[256];

	switch (below(9)) {
	case 0:
		core_freeze(c, !c->frozen);
		break;
	case 1:
		if (s)
			core_seq_demote(c, s->handle, below(s->cap), err, sizeof(err));
		break;
	case 2:
		if (s)
			core_seq_promote(c, s->handle, err, sizeof(err));
		break;
	case 3:
		if (s)
			core_seq_pin(c, s->handle, below(s->max_rows), between(1, 30), !one_in(3), err,
				     sizeof(err));
		break;
	case 4:
		if (s && one_in(4))
			s->dropped |= !core_seq_drop(c, s->handle, err, sizeof(err));
		break;
	case 5:
		if (s)
			core_seq_budget(c, s->handle,
					(uint32_t[]){below(s->cap), below(s->max_rows), below(s->max_rows)},
					err, sizeof(err));
		break;
	case 6:
		cfg.slack_rows = between(1, 100);
		cfg.protect_first = below(8);
		cfg.protect_last = below(40);
		if (!core_reload(c, &cfg, err, sizeof(err)))
			scene.cfg = cfg;
		break;
	case 7:
		core_verify_start(c, s && one_in(2) ? s->handle : 0, err, sizeof(err));
		break;
	default:
		core_policy_set(c, s ? s->handle : 0, one_in(2) ? "streaming" : "random", err, sizeof(err));
		break;
	}
}

/* Nobody does anything for a while: leases end, the cleaner works, maps are flushed. */
static void pause_for(uint64_t ns)
{
	uint64_t end = world.now + ns;

	record("pause", ns, 0, 0, 0);
	ledger_remember();
	while (world.now < end) {
		settle(UINT64_C(1000000000));
		world.now += 125000000;
	}
}
