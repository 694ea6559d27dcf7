/* SPDX-License-Identifier: MIT */
/*
 * Published memory under pressure. Every kind of memory gives in proportion to what is held of it; published
 * segments go whole. Their pages leave as private ones do (pressure_give.c), which takes them out of
 * the directories; their clients are told to let go, again and again, for a full ring loses hints; and the tier
 * asks the kernel whether they did. Who does not keeps the memory and stays charged with it, and what is
 * missing is taken from others.
 */
#include <syslog.h>
#include "daemon/direct.h"
#include "daemon/internal.h"
#include "daemon/pressure.h"

#define TELL_NS UINT64_C(100000000)

void revoke_choose(struct core *c, const struct tier_stat *st, uint64_t need)
{
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];
	uint64_t live = MIN(st->published, st->resident) - MIN(st->revoked, MIN(st->published, st->resident)),
		 way = st->revoked - st->late, share;

	if (!t->ops->revoke || !live || !need)
		return;
	share = (uint64_t)((double)need * (double)(live + way) / (double)(st->resident - st->late));
	if (share > way && t->ops->revoke(t, share - way))
		c->stat.revokes++;
}

/* Whoever has, or may have, something of it mapped. */
static void tell(struct core *c)
{
	struct tier_owner own;
	struct client *cl;

	LIST_FOREACH(cl, &c->clients, link) {
		if (!cl->hello || !cl->tenant)
			continue;
		direct_stat(c, tenant_hash(cl->tenant, cl->uid), &own);
		if (own.revoked)
			client_notify(cl, Q_REVOKE, 0, 0, 0);
	}
}

/* Once for each time that somebody is late. */
static void accuse(struct core *c)
{
	struct tier_owner own;
	struct client *cl;

	LIST_FOREACH(cl, &c->clients, link) {
		if (!cl->hello || !cl->tenant)
			continue;
		direct_stat(c, tenant_hash(cl->tenant, cl->uid), &own);
		if (own.late)
			log_about(&cl->tenant->said, LOG_WARNING,
				  "memory pressure: client %u \"%s\" pid %d uid %u: its user keeps %llu MiB of "
				  "published memory that was asked back",
				  cl->id, cl->name, (int)cl->pid, (unsigned)cl->uid,
				  (unsigned long long)(own.late >> 20));
	}
}

bool revoke_look(struct core *c, struct revoke *r)
{
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];
	struct tier_stat st;
	uint64_t now = now_ns();

	if (!t || !t->ops->reclaim)
		return false;
	t->ops->stat(t, &st);
	if (!st.revoked) {
		r->late = 0;
		return false;
	}
	if (now - r->told_ns >= TELL_NS) {
		r->told_ns = now;
		tell(c);
	}
	c->stat.revoke_returned_bytes += t->ops->reclaim(t);
	if (st.late > r->late)
		accuse(c);
	r->late = st.late;
	return true;
}
