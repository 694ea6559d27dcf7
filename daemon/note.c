/* SPDX-License-Identifier: MIT */
/*
 * Notes: what a page cannot tell a restart is which of its rows a later truncation cut off. A note (a page of
 * lane PAGE_NOTE_LANE), written at every truncation and at the end, holds the list. Each tier that outlives the
 * daemon has its own, the newer one counts. Without a note of the newest epoch only pages of that epoch are
 * believed: fewer rows, never wrong ones. In DRAM the note is there before a truncation is answered.
 */
#include <poll.h>
#include <string.h>
#include "daemon/internal.h"
#include "daemon/ledger.h"
#include "daemon/restart.h"
#include "shm/crc.h"
#include "shm/trial.h"
#include "shm/util.h"

/* Do pages of this tier outlive us? */
static bool outlives(const struct core *c, int tier)
{
	const struct tier *t = c->pages.tier[tier];

	return t && (tier == KVT_TIER_DRAM ? c->seams.keep != NULL : t->ops->caps & TIER_CAP_DURABLE);
}

/* ---- writing -------------------------------------------------------------------- */

void restart_note_take(struct seq *s, int tier, struct page *p)
{
	struct page *old = s->note[tier];

	s->note[tier] = p;
	page_ref(p);
	if (old)
		page_unref(&s->core->pages, old);
}

static void note_end(struct pio *io)
{
	struct seq *s = io->owner;
	struct core *c = io->core;
	struct page *p = io->page;
	int tier = io->tier;

	crash_point("note.written");
	page_ref(p);
	s->noting--;
	/* In DRAM several may be on their way. */
	if (!io->io.res && !page_set_copy(&c->pages, p, tier, io->io.addr) && !s->dead &&
	    (!s->note[tier] || s->note[tier]->number < p->number))
		restart_note_take(s, tier, p);
	pio_free(io);
	page_unref(&c->pages, p);
	if (tier == KVT_TIER_NVME) {
		s->note_busy = false;
		if (!s->dead && s->note_again)
			restart_note(s);
	}
	seq_unref(s);
	mover_kick(c);
}

static void note_fill(const struct seq *s, struct note *n)
{
	const struct index *ix = &s->ix;

	memset(n, 0, sizeof(*n));
	n->magic = NOTE_MAGIC;
	n->rows = s->rows;
	n->epoch = s->epoch;
	n->n = (uint32_t)MIN(ix->n_epochs, NOTE_MARKS - 1);
	/* Too many: the oldest marks go, and with them (on reading) the pages that they would cut. */
	for (uint32_t i = 0; i < n->n; i++)
		n->mark[i] = ix->epochs[ix->n_epochs - n->n + i];
	n->pad = ix->n_epochs > n->n ? n->mark[0].epoch : 0; /* oldest epoch that is believed */
	if (s->cut != ROWS_ALL) /* a worker still has the index, which will say so later */
		n->mark[n->n++] = (struct epoch_mark){.epoch = s->epoch, .start = s->cut};
}

static int note_write(struct seq *s, int tier)
{
	struct core *c = s->core;
	struct page *p = page_new(&c->pages, s->origin, PAGE_NOTE_LANE, 0, 1);
	struct page_ident id;
	struct pio *io;
	int r;

	if (!p)
		return -ENOMEM;
	p->epoch = s->epoch;
	p->rows = 1;
	p->pos[0] = 1;
	p->bytes = NOTE_BYTES;
	io = pio_new(c, p, tier, note_end, s);
	if (!io) {
		page_ref(p);
		page_unref(&c->pages, p);
		return -ENOMEM;
	}
	r = pio_prepare(io, s);
	if (r < 0) {
		io->io.buf = NULL;
		pio_free(io);
		return r;
	}
	note_fill(s, io->io.buf);
	page_ident(p, &id);
	p->crc = crc32c(page_crc_seed(&id), io->io.buf, NOTE_BYTES);
	s->noting++;
	s->refs++;
	if (tier == KVT_TIER_DRAM)
		pio_write_now(io);
	else
		pio_write(io);
	return 0;
}

/* No room for a note: what it would cut shall not be found. */
static void forget_cut(struct seq *s)
{
	struct tier *t = s->core->pages.tier[KVT_TIER_DRAM];

	for (uint32_t l = 0; l < s->ix.lanes; l++)
		for (uint32_t i = 0; i < s->ix.lane[l].n; i++) {
			struct page *p = s->ix.lane[l].v[i];

			if (page_in(p, KVT_TIER_DRAM) && p->first + p->span * 64u > s->cut && t->ops->forget) {
				t->ops->forget(t, p->addr[KVT_TIER_DRAM - 1]);
				p->forgotten = true;
			}
		}
}

void restart_cut(struct seq *s)
{
	if (s->lifetime != KVT_LEASED || s->dead || !outlives(s->core, KVT_TIER_DRAM))
		return;
	if (note_write(s, KVT_TIER_DRAM) < 0 && s->place == LEDGER_NONE) /* else the ledger says the same */
		forget_cut(s);
}

void restart_note(struct seq *s)
{
	struct core *c = s->core;

	if (s->lifetime != KVT_LEASED || s->dead)
		return;
	if (outlives(c, KVT_TIER_DRAM))
		(void)note_write(
			s, KVT_TIER_DRAM); /* an older one says the same, or restart_cut() did what it could */
	if (!outlives(c, KVT_TIER_NVME))
		return;
	s->note_again = s->note_busy;
	/* No buffer or no place: the restart falls back to the newest epoch. */
	if (!s->note_busy)
		s->note_busy = !note_write(s, KVT_TIER_NVME);
}

void restart_forget(struct seq *s)
{
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
		if (s->note[t])
			page_unref(&s->core->pages, s->note[t]);
		s->note[t] = NULL;
	}
}

/* ---- reading ------------------------------------------------------------------------- */

/* Start-up only: nobody else uses the tier yet, so waiting here is fine. */
static int read_note(struct core *c, int tier, const struct page *p, struct note *ret)
{
	struct tier *t = c->pages.tier[tier];
	struct tier_io io = {.op = TIER_READ, .bytes = p->bytes, .addr = p->addr[tier - 1]}, *done, *one = &io;
	int r = t->ops->prepare(t, &io), fd = t->ops->event_fd(t);

	if (r < 0)
		return r;
	t->ops->submit(t, &one, 1);
	while (!t->ops->reap(t, &done, 1)) {
		struct pollfd pf = {.fd = fd, .events = POLLIN};

		if (fd >= 0)
			poll(&pf, 1, 100);
	}
	r = io.res;
	if (!r && !page_verify(p, io.buf))
		r = -EBADMSG;
	if (!r)
		memcpy(ret, io.buf, sizeof(*ret));
	t->ops->release(t, &io);
	if (!r && (ret->magic != NOTE_MAGIC || ret->n > NOTE_MARKS || ret->rows > WIRE_MAX_ROWS))
		r = -EBADMSG;
	return r;
}

int restart_find_note(struct core *c, const struct seq *s, struct note *ret)
{
	int newest = s->note[KVT_TIER_DRAM] ? KVT_TIER_DRAM : KVT_TIER_NVME;
	const struct page *dram = s->note[KVT_TIER_DRAM], *nvme = s->note[KVT_TIER_NVME];
	int r = -ENOENT;

	if (dram && nvme && nvme->number > dram->number)
		newest = KVT_TIER_NVME;
	for (int i = 0; i < 2; i++, newest = KVT_TIER_DRAM + KVT_TIER_NVME - newest) {
		if (!s->note[newest])
			continue;
		r = read_note(c, newest, s->note[newest], ret);
		if ((!r && ret->epoch == s->epoch) || r == -ENOMEM)
			return r;
	}
	return r ? r : -ESTALE;
}
