/* SPDX-License-Identifier: MIT */
/* What a sequence has in the ledger (ledger.h), so that a restart believes no page that its client was told is
 * gone. */
#include <string.h>
#include "daemon/internal.h"
#include "daemon/ledger.h"
#include "shm/trial.h"
#include "shm/util.h"

/* The sequence as it is, and its marks. */
static void fill(const struct seq *s, uint32_t epoch, struct ledger_entry *e)
{
	uint32_t skip = s->ix.n_epochs > LEDGER_MARKS ? s->ix.n_epochs - LEDGER_MARKS : 0;

	memset(e, 0, sizeof(*e));
	e->tenant = s->tenant_hash;
	memcpy(e->key, s->key, sizeof(e->key));
	memcpy(e->secret_hash, s->secret_hash, sizeof(e->secret_hash));
	e->born = s->born;
	e->model = s->fingerprint;
	e->lanes = s->ix.lanes;
	e->floor = s->floor;
	e->epoch = epoch;
	e->n = s->ix.n_epochs - skip;
	if (e->n)
		memcpy(e->mark, s->ix.epochs + skip, e->n * sizeof(*e->mark));
	e->oldest = skip ? e->mark[0].epoch : 0;
}

/* As index_mark_epoch() does. */
static void mark(struct ledger_entry *e, uint32_t epoch, uint32_t start)
{
	while (e->n && e->mark[e->n - 1].start >= start)
		e->n--;
	if (e->n == LEDGER_MARKS) {
		memmove(e->mark, e->mark + 1, --e->n * sizeof(*e->mark));
		e->oldest = e->mark[0].epoch;
	}
	e->mark[e->n++] = (struct epoch_mark){.epoch = epoch, .start = start};
}

int ledger_begin(struct seq *s)
{
	struct ledger *l = s->core->ledger;
	struct ledger_entry e;
	int r;

	if (!l || s->lifetime != KVT_LEASED || s->place != LEDGER_NONE)
		return 0;
	s->place = ledger_new(l);
	if (s->place == LEDGER_NONE)
		return -ENOMEM;
	s->floor = s->core->pages.next;
	fill(s, s->epoch, &e);
	crash_point("ledger.begin");
	r = ledger_put(l, s->place, &e);
	crash_point("ledger.begun");
	if (r < 0) {
		(void)ledger_end(l, s->place);
		s->place = LEDGER_NONE;
	}
	return r;
}

int ledger_cut(struct seq *s, uint32_t rows)
{
	struct ledger_entry e;
	int r;

	s->mark_cut |= s->lifetime == KVT_LEASED && s->reach > rows;
	s->reach = MIN(s->reach, rows);
	if (s->place == LEDGER_NONE || planted("cut-not-in-ledger"))
		return 0;
	fill(s, s->epoch + 1, &e);
	if (s->mark_cut)
		mark(&e, s->epoch + 1, MIN(rows, s->cut));
	crash_point("ledger.cut");
	r = ledger_put(s->core->ledger, s->place, &e);
	crash_point("ledger.was-cut");
	return r;
}

void ledger_over(struct seq *s)
{
	struct core *c = s->core;
	int r = 0;

	if (s->place != LEDGER_NONE && !c->freeing)
		r = ledger_end(c->ledger, s->place);
	crash_point("ledger.ended");
	if (r < 0)
		log_line(3, "%s: %s: a sequence that ended may be found after a crash", LEDGER_NAME,
			 strerror(-r));
	s->place = LEDGER_NONE;
}

/* The entry of this sequence, not of another one that had the name. */
static const struct ledger_entry *entry_of(const struct seq *s, uint32_t *ret_place)
{
	const struct ledger_entry *e =
		s->core->ledger ? ledger_find(s->core->ledger, s->tenant_hash, s->key, ret_place) : NULL;

	return e && e->born == s->born ? e : NULL;
}

bool ledger_knows(struct seq *s)
{
	struct ledger *l = s->core->ledger;
	const struct ledger_entry *e;
	uint32_t place;

	if (!l)
		return true;
	e = entry_of(s, &place);
	if (e) {
		s->place = place;
		ledger_take(l, place);
		s->floor = e->floor;
	}
	return e || !ledger_complete(l) || planted("restart-revives-ended");
}

const struct ledger_entry *ledger_of(struct seq *s)
{
	uint32_t place;

	return planted("restart-forgets-cut") ? NULL : entry_of(s, &place);
}

bool ledger_knows_later(struct core *c, uint64_t tenant, const uint8_t key[16], uint64_t born)
{
	uint32_t place;
	const struct ledger_entry *e = c->ledger ? ledger_find(c->ledger, tenant, key, &place) : NULL;

	return e && e->born > born;
}

bool ledger_left(struct core *c, uint32_t *cursor, struct seq_record *ret)
{
	const struct ledger_entry *e = NULL;
	uint32_t place;

	/* After a power failure it may name what has ended. */
	while (c->ledger && ledger_complete(c->ledger) && (e = ledger_next(c->ledger, cursor, &place)))
		if (e->lanes && e->lanes <= CTL_MAX_LANES && !(e->born >> 63) &&
		    !names_find(&c->names, e->tenant, e->key))
			break;
	if (!e)
		return false;
	*ret = (struct seq_record){.tenant = e->tenant,
				   .model = e->model,
				   .lanes = e->lanes,
				   .lifetime = KVT_LEASED,
				   .born_lo = (uint32_t)e->born,
				   .born_hi = (uint32_t)(e->born >> 32)};
	memcpy(ret->key, e->key, sizeof(ret->key));
	memcpy(ret->secret_hash, e->secret_hash, sizeof(ret->secret_hash));
	return true;
}

int ledger_return(struct seq *s)
{
	struct ledger_entry e;
	int r;

	if (!s->core->ledger || s->epoch == UINT32_MAX)
		return 0;
	r = index_mark_epoch(&s->ix, ++s->epoch, s->rows);
	if (r < 0)
		return r;
	s->reach = s->rows;
	if (s->place == LEDGER_NONE) {
		s->place = ledger_new(s->core->ledger);
		if (s->place == LEDGER_NONE)
			return -ENOMEM;
	}
	fill(s, s->epoch, &e);
	crash_point("ledger.return");
	return ledger_put(s->core->ledger, s->place, &e);
}
