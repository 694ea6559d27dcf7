/* SPDX-License-Identifier: MIT */
/*
 * What each owner (a user on a tenant's socket) has in all its sequences, kept up as they change: who asks for
 * its own status costs the loop the same with one sequence and with ten thousand. An owner that was here once
 * is remembered, for its plans and misses only rise.
 */
#include <stdlib.h>
#include "daemon/internal.h"
#include "shm/util.h"

struct owner {
	LIST_ENTRY(owner) link;
	uint64_t hash, seqs, plans, misses;
	struct owner_part sum;
};

static struct owner *find(const struct core *c, uint64_t hash)
{
	struct owner *o;

	LIST_FOREACH(o, &c->users, link)
		if (o->hash == hash)
			return o;
	return NULL;
}

int owner_enter(struct seq *s)
{
	struct owner *o = find(s->core, s->tenant_hash);

	if (!o) {
		o = calloc(1, sizeof(*o));
		if (!o)
			return -ENOMEM;
		o->hash = s->tenant_hash;
		LIST_INSERT_HEAD(&s->core->users, o, link);
	}
	o->seqs++;
	s->owner = o;
	return 0;
}

static void add(struct owner *o, const struct owner_part *was, const struct owner_part *now)
{
	o->sum.orphans += now->orphans - was->orphans;
	o->sum.dropped += now->dropped - was->dropped;
	for (int t = 0; t < KVT_TIERS; t++) {
		o->sum.rows[t] += now->rows[t] - was->rows[t];
		o->sum.bytes[t] += now->bytes[t] - was->bytes[t];
	}
}

void owner_count(struct seq *s)
{
	struct owner_part now = {.orphans = s->in_gone,
				 .dropped = s->dropped,
				 .rows = {s->tier_rows[0] + s->fresh_seen, s->tier_rows[1], s->tier_rows[2]},
				 .bytes = {seq_device_bytes(s), s->page_bytes[1], s->page_bytes[2]}};
	struct owner *o = s->owner;

	if (!o)
		return;
	add(o, &s->owned, &now);
	s->owned = now;
	o->plans += s->plans - s->owned_plans;
	s->owned_plans = s->plans;
	o->misses += s->misses - s->owned_misses;
	s->owned_misses = s->misses;
}

void owner_leave(struct seq *s)
{
	const struct owner_part none = {.orphans = 0};

	if (!s->owner)
		return;
	owner_count(s);
	add(s->owner, &s->owned, &none);
	s->owner->seqs--;
	s->owner = NULL;
}

void owners_free(struct core *c)
{
	struct owner *o;

	while ((o = LIST_FIRST(&c->users))) {
		LIST_REMOVE(o, link);
		free(o);
	}
}

void core_owner_stat(struct core *c, uint64_t owner, struct core_owner_stat *ret)
{
	const struct owner *o = find(c, owner);

	*ret = (struct core_owner_stat){.seqs = 0};
	core_owner_published(c, owner, &ret->published, &ret->published_held);
	if (!o)
		return;
	ret->seqs = o->seqs;
	ret->orphans = o->sum.orphans;
	ret->plans = o->plans;
	ret->misses = o->misses;
	ret->dropped_rows = o->sum.dropped;
	for (int t = 0; t < KVT_TIERS; t++) {
		ret->rows[t] = o->sum.rows[t];
		ret->bytes[t] = o->sum.bytes[t];
	}
}
