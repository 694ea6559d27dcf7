/* SPDX-License-Identifier: MIT */
/*
 * Device budgets that sequences of one owner and model share: who sits in which
 * pool (policy/pool.h), and who is planned again because rows are owed or have
 * become free. Sequences that only plan on request never sit in one.
 */
#include <string.h>
#include "daemon/internal.h"
#include "policy/pool.h"
#include "shm/util.h"

#define VISITS 64u /* seats looked at in one turn of the loop */

struct share_pool {
	LIST_ENTRY(share_pool) link;
	uint64_t owner; /* tenant_hash() */
	const struct model *model;
	struct pool pool;
	TAILQ_HEAD(, share) shares;
	uint32_t walk; /* seats that are still to be looked at */
};

struct share {
	struct seq *seq;
	struct share_pool *in;
	struct pool_seat seat;
	TAILQ_ENTRY(share) link;
};

static struct share_pool *pool_get(struct core *c, const struct seq *s)
{
	struct share_pool *sp;

	LIST_FOREACH(sp, &c->pools, link)
		if (sp->owner == s->tenant_hash && sp->model == s->model)
			return sp;
	sp = calloc(1, sizeof(*sp));
	if (!sp)
		return NULL;
	sp->owner = s->tenant_hash;
	sp->model = s->model;
	TAILQ_INIT(&sp->shares);
	LIST_INSERT_HEAD(&c->pools, sp, link);
	c->seq_index_bytes += heap_bytes(sizeof(*sp));
	return sp;
}

static void pool_put(struct core *c, struct share_pool *sp)
{
	if (sp->pool.seats)
		return;
	LIST_REMOVE(sp, link);
	c->seq_index_bytes -= heap_bytes(sizeof(*sp));
	free(sp);
}

static void look_at_all(struct core *c, struct share_pool *sp)
{
	sp->walk = sp->pool.seats;
	mover_kick(c);
}

/* Rows changed hands: is there something to do for the others? */
static void look_around(struct core *c, struct share_pool *sp)
{
	uint64_t some = sp->pool.seats ? sp->pool.uniform / sp->pool.seats * ADAPTIVE_HYSTERESIS / 1000 : 0;

	if (pool_owed(&sp->pool) || pool_spare(&sp->pool) > some)
		look_at_all(c, sp);
}

static struct share *share_new(struct seq *s)
{
	struct share *sh = calloc(1, sizeof(*sh));

	if (!sh)
		return NULL;
	sh->seq = s;
	sh->in = pool_get(s->core, s);
	if (!sh->in) {
		free(sh);
		return NULL;
	}
	TAILQ_INSERT_TAIL(&sh->in->shares, sh, link);
	return sh;
}

static bool shares(const struct plan *p)
{
	const struct seq *s = p->seq;

	return p->worth && s->core->cfg.adaptive == CONFIG_ADAPTIVE_TENANT && s->state == SEQ_LIVE &&
	       !s->manual && (uint64_t)s->ix.lanes * p->watermark <= UINT32_MAX;
}

int share_begin(struct plan *p)
{
	struct seq *s = p->seq;
	uint64_t uniform = 0;

	if (p->private_tables && !p->saving)
		return 0; /* nobody carries it out */
	if (!shares(p)) {
		share_leave(s);
		return 0;
	}
	p->bid = malloc(sizeof(*p->bid));
	if (!p->bid)
		return -ENOMEM;
	p->bid->phase = POOL_OVER;
	if (!s->share)
		s->share = share_new(s);
	if (!s->share)
		return -ENOMEM;
	for (uint32_t l = 0; l < s->ix.lanes; l++)
		uniform += p->budget[KVT_TIER_DEVICE][l];
	pool_begin(&s->share->in->pool, &s->share->seat, uniform, p->bid);
	return 0;
}

void share_decided(struct plan *p)
{
	struct share *sh = p->seq->share;

	if (!p->bid || !sh)
		return;
	pool_claim(&sh->in->pool, &sh->seat, p->bid);
	pool_wish(&sh->in->pool, &sh->seat, ADAPTIVE_HYSTERESIS);
	/* It could not get its part, or others have planned meanwhile: who holds what is whose? */
	if (pool_off(&sh->in->pool, &sh->seat, ADAPTIVE_HYSTERESIS))
		look_at_all(p->seq->core, sh->in);
	else
		look_around(p->seq->core, sh->in);
}

void share_settled(struct plan *p, bool all)
{
	struct share *sh = p->seq->share;

	if (!p->bid || !sh)
		return;
	pool_settle(&sh->in->pool, &sh->seat, p->bid, all);
	look_around(p->seq->core, sh->in);
}

void share_dropped(struct plan *p)
{
	struct share *sh = p->seq->share;

	if (p->bid && sh)
		pool_abandon(&sh->in->pool, &sh->seat, p->bid);
}

void share_leave(struct seq *s)
{
	struct share *sh = s->share;
	struct plan *p = s->plan;
	struct share_pool *sp;

	if (!sh)
		return;
	sp = sh->in;
	s->share = NULL;
	pool_leave(&sp->pool, &sh->seat, p ? p->bid : NULL);
	TAILQ_REMOVE(&sp->shares, sh, link);
	free(sh);
	if (!s->core->freeing)
		look_around(s->core, sp);
	pool_put(s->core, sp);
}

uint64_t share_bytes(const struct seq *s)
{
	return s->share ? heap_bytes(sizeof(*s->share)) : 0;
}

bool share_rows(const struct seq *s, uint64_t *ret_held, uint64_t *ret_brought)
{
	if (!s->share)
		return false;
	*ret_held = s->share->seat.held;
	*ret_brought = s->share->seat.uniform;
	return true;
}

static struct share_pool *next_walk(struct core *c)
{
	struct share_pool *sp;

	LIST_FOREACH(sp, &c->pools, link)
		if (sp->walk)
			return sp;
	return NULL;
}

bool share_pump(struct core *c)
{
	struct share_pool *sp = NULL;

	for (uint32_t n = 0; n < VISITS && (sp = next_walk(c)); n++) {
		struct share *sh = TAILQ_FIRST(&sp->shares);
		struct seq *s = sh->seq;

		sp->walk--;
		TAILQ_REMOVE(&sp->shares, sh, link);
		TAILQ_INSERT_TAIL(&sp->shares, sh, link);
		if (pool_wish(&sp->pool, &sh->seat, ADAPTIVE_HYSTERESIS))
			sp->walk = sp->pool.seats; /* who was passed before may have what this one waits for */
		if (c->frozen || c->freeing || !pool_due(&sp->pool, &sh->seat, ADAPTIVE_HYSTERESIS))
			continue;
		s->again = true;
		seq_step(s);
	}
	return sp != NULL;
}
