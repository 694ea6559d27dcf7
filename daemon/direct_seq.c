/* SPDX-License-Identifier: MIT */
/*
 * Direct reads as sequences, clients and tenants see them: who has a directory, who may have which segment, and
 * what published memory costs. Whole segments are charged, for what lies empty in one is of use to its owner
 * alone; so what an owner's segments hold back does not keep that owner's own pages out.
 */
#include <stdio.h>
#include <string.h>
#include "daemon/direct.h"
#include "daemon/internal.h"
#include "ipc/codec.h"
#include "shm/util.h"

#define SLICE_NS UINT64_C(300000) /* of the loop, for directories that are being filled */

/* Somebody who has, or had, published memory: a user in a tenant. */
struct direct_owner {
	LIST_ENTRY(direct_owner) link;
	uint64_t hash; /* tenant_hash() */
	uint32_t tenant;
	bool held; /* has clients */
};

static struct tier *dram(const struct core *c)
{
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];

	return t && t->ops->hold ? t : NULL;
}

/* ---- owners -------------------------------------------------------------------------- */

static struct direct_owner *owner_find(struct core *c, uint64_t hash)
{
	struct direct_owner *o;

	LIST_FOREACH(o, &c->owners, link)
		if (o->hash == hash)
			return o;
	return NULL;
}

/* Its clients may name its segments from now on. */
static int owner_hold(struct core *c, const struct tenant *t, uint64_t hash)
{
	struct direct_owner *o = owner_find(c, hash);
	int r;

	if (o && o->held)
		return 0;
	r = dram(c) ? dram(c)->ops->hold(dram(c), hash, true) : 0;
	if (r < 0)
		return r;
	if (!o) {
		o = calloc(1, sizeof(*o));
		if (!o) {
			if (dram(c))
				dram(c)->ops->hold(dram(c), hash, false);
			return -ENOMEM;
		}
		o->hash = hash;
		o->tenant = t->index;
		LIST_INSERT_HEAD(&c->owners, o, link);
	}
	o->held = true;
	return 0;
}

void direct_left(const struct client *gone)
{
	struct core *c = gone->core;
	struct direct_owner *o;
	const struct client *cl;
	uint64_t hash;

	if (!gone->tenant)
		return;
	hash = tenant_hash(gone->tenant, gone->uid);
	o = owner_find(c, hash);
	if (!o || !o->held)
		return;
	LIST_FOREACH(cl, &c->clients, link)
		if (cl != gone && cl->tenant == gone->tenant && cl->uid == gone->uid)
			return;
	o->held = false;
	if (dram(c))
		dram(c)->ops->hold(dram(c), hash, false);
}

void direct_stat(struct core *c, uint64_t owner, struct tier_owner *ret)
{
	memset(ret, 0, sizeof(*ret));
	if (dram(c))
		dram(c)->ops->owner_stat(dram(c), owner, ret);
}

uint64_t direct_held(struct core *c, uint32_t tenant, uint64_t except)
{
	struct direct_owner *o, *next;
	struct tier_owner st;
	uint64_t sum = 0;

	for (o = LIST_FIRST(&c->owners); o; o = next) {
		next = LIST_NEXT(o, link);
		if (o->tenant != tenant)
			continue;
		direct_stat(c, o->hash, &st);
		if (o->hash != except)
			sum += st.bytes - st.used;
		if (!st.bytes && !o->held) {
			LIST_REMOVE(o, link);
			free(o);
		}
	}
	return sum;
}

void direct_revoked(struct core *c, uint32_t tenant, uint64_t *ret_all, uint64_t *ret_late)
{
	struct direct_owner *o;
	struct tier_owner st;

	*ret_all = *ret_late = 0;
	LIST_FOREACH(o, &c->owners, link) {
		if (o->tenant != tenant)
			continue;
		direct_stat(c, o->hash, &st);
		*ret_all += st.revoked;
		*ret_late += st.late;
	}
}

uint64_t direct_room(const struct seq *s, uint64_t *quota, uint64_t free_bytes)
{
	uint64_t owner = direct_owner_of(s), held = direct_held(s->core, s->tenant->index, 0);
	struct tier_owner own;

	/* What is free in another owner's segments is not free for this one. */
	direct_stat(s->core, owner, &own);
	*quota = *quota > held ? *quota - held : 0;
	if (owner) /* in whole segments, and in those that it has */
		*quota = *quota / TIER_SEGMENT_GRAIN * TIER_SEGMENT_GRAIN + own.bytes - own.used;
	return MIN(free_bytes, own.room);
}

void direct_owners_free(struct core *c)
{
	struct direct_owner *o;

	while ((o = LIST_FIRST(&c->owners))) {
		LIST_REMOVE(o, link);
		free(o);
	}
}

/* ---- sequences ------------------------------------------------------------------------ */

int direct_open(struct seq *s)
{
	struct core *c = s->core;
	int r;

	if (!(s->flags & W_OPEN_DIRECT))
		return 0;
	r = owner_hold(c, s->tenant, s->tenant_hash);
	if (r >= 0)
		r = direct_new(&s->ix.direct, s->ix.lanes, s->max_rows);
	if (r < 0)
		return r;
	direct_cut(&s->ix, s->cut);
	s->fill_lane = 0;
	s->filling = true;
	TAILQ_INSERT_TAIL(&c->fills, s, fills);
	mover_kick(c);
	return 0;
}

void direct_close(struct seq *s)
{
	if (s->filling)
		TAILQ_REMOVE(&s->core->fills, s, fills);
	s->filling = false;
	direct_free(s->ix.direct);
	s->ix.direct = NULL;
}

/* Pages that were there before the directory. */
void direct_pump(struct core *c)
{
	uint64_t end = now_ns() + SLICE_NS;
	struct seq *s;

	while ((s = TAILQ_FIRST(&c->fills))) {
		for (; s->fill_lane < s->ix.lanes; s->fill_lane++) {
			const struct lane_pages *lp = &s->ix.lane[s->fill_lane];

			if (now_ns() >= end) {
				mover_kick(c);
				return;
			}
			for (uint32_t i = 0; i < lp->n; i++)
				direct_add(&s->ix, lp->v[i]);
		}
		s->filling = false;
		TAILQ_REMOVE(&c->fills, s, fills);
	}
}

/* ---- requests --------------------------------------------------------------------------- */

int request_direct(struct client *cl, const struct wire_handle *m)
{
	struct seq *s = request_seq(cl, &m->hdr, m->handle);
	struct wire_direct_reply a;
	int fd;

	if (!s)
		return 0;
	if (!s->ix.direct) {
		client_fail(cl, &m->hdr, KVT_E_INVAL, "seq: was not opened for direct reads");
	} else {
		wire_reply_init(&a.r, &m->hdr, sizeof(a), 0, NULL);
		fd = direct_fd(s->ix.direct, &a.bytes);
		client_reply(cl, &a.r, &fd, 1);
	}
	seq_unref(s);
	return 0;
}

int request_segment(struct client *cl, const struct wire_segment *m)
{
	uint64_t owner = tenant_hash(cl->tenant, cl->uid);
	struct tier *t = dram(cl->core);
	struct wire_segment_reply a;
	char text[WIRE_TEXT];
	_cleanup_close_ int lent = -1;
	int fd;

	wire_reply_init(&a.r, &m->hdr, sizeof(a), 0, NULL);
	fd = t ? t->ops->segment(t, owner, m->segment, &a.bytes) : -ENOENT;
	if (fd >= 0)
		lent = seg_lend(fd);
	if (fd < 0) {
		snprintf(text, sizeof(text), "segment: %u, none of this user's has that number", m->segment);
		client_fail(cl, &m->hdr, KVT_E_NOENT, text);
	} else if (lent < 0 || owner_hold(cl->core, cl->tenant, owner) < 0) {
		client_fail(cl, &m->hdr, KVT_E_NOMEM, "out of memory");
	} else {
		client_reply(cl, &a.r, &lent, 1);
	}
	return 0;
}
