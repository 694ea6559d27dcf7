/* SPDX-License-Identifier: MIT */
/*
 * Restart: leased sequences are found again by the pages they left in tiers that outlive the daemon: on NVMe,
 * and in DRAM where systemd holds its memory. What a page cannot tell is which of its rows a later truncation
 * cut off; a note (a page of lane PAGE_NOTE_LANE) written at every truncation and at the end holds the list.
 * Each such tier has its own, the newer one counts. Without a note of the newest epoch only pages of that epoch
 * are believed: fewer rows, never wrong ones.
 *
 * In DRAM the note is there before a truncation is answered. Pages found in both tiers are one page.
 *
 * Where there is a ledger (ledger.h) it knows what the clients of a daemon that died were told; notes are for
 * what a power failure left, and for DRAM alone. A sequence that lives and of which no page was stored is found
 * by its entry or its note: it comes back without rows, so that its client keeps its key.
 */
#include <poll.h>
#include <string.h>
#include "daemon/internal.h"
#include "daemon/ledger.h"
#include "shm/crc.h"
#include "shm/trial.h"
#include "shm/util.h"

#define NOTE_MAGIC 0x314f4e5453455651u
#define NOTE_BYTES KVT_UNIT
#define NOTE_MARKS ((NOTE_BYTES - 24) / sizeof(struct epoch_mark))

struct note {
	uint64_t magic;
	uint32_t rows, epoch, n, pad;
	struct epoch_mark mark[NOTE_MARKS];
};
_Static_assert(sizeof(struct note) == NOTE_BYTES, "one unit on disk");

/* Do pages of this tier outlive us? */
static bool outlives(const struct core *c, int tier)
{
	const struct tier *t = c->pages.tier[tier];

	return t && (tier == KVT_TIER_DRAM ? c->seams.keep != NULL : t->ops->caps & TIER_CAP_DURABLE);
}

/* ---- writing -------------------------------------------------------------------- */

/* The page is a note of s; what it had there before goes. Takes no reference of the caller's. */
static void note_take(struct seq *s, int tier, struct page *p)
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
		note_take(s, tier, p);
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
			const struct page *p = s->ix.lane[l].v[i];

			if (page_in(p, KVT_TIER_DRAM) && p->first + p->span * 64u > s->cut && t->ops->forget)
				t->ops->forget(t, p->addr[KVT_TIER_DRAM - 1]);
		}
}

void restart_cut(struct seq *s)
{
	if (s->lifetime != KVT_LEASED || s->dead || !outlives(s->core, KVT_TIER_DRAM))
		return;
	if (note_write(s, KVT_TIER_DRAM) < 0)
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

/* ---- scanning -------------------------------------------------------------------- */

static struct tenant *tenant_of(struct core *c, uint64_t hash)
{
	for (uint32_t i = 0; i < c->tenants; i++)
		if (tenant_hash(&c->tenant[i], (uid_t)(uint32_t)hash) == hash)
			return &c->tenant[i];
	return NULL;
}

struct finding {
	struct core *core;
	int tier;
	bool no_memory; /* the scan goes on to its end, and then kvtierd does not start */
};

static struct seq *orphan(struct finding *f, const struct seq_record *r)
{
	struct core *c = f->core;
	struct seq *s = names_find(&c->names, r->tenant, r->key);
	struct tenant *t = tenant_of(c, r->tenant);

	/* The key was given up and used anew: of the sequence of before nothing shall come back. */
	if (s && seq_born(r) > s->born) {
		seq_end(s);
		s = NULL;
	}
	if (s)
		return s->ix.lanes == r->lanes && s->fingerprint == r->model && s->born == seq_born(r) &&
				       !memcmp(s->secret_hash, r->secret_hash, sizeof(s->secret_hash))
			       ? s
			       : NULL;
	if (!t)
		return NULL;
	if (ledger_knows_later(c, r->tenant, r->key, seq_born(r))) {
		c->stat.miss_stale++;
		return NULL;
	}
	s = seq_create(c, t, r->tenant, r->key, r->secret_hash, r->lanes);
	f->no_memory |= !s;
	if (!s)
		return NULL;
	s->fingerprint = r->model;
	s->born = seq_born(r);
	c->pages.next = MAX(c->pages.next, s->born + 1);
	s->lifetime = KVT_LEASED;
	s->ttl_s = c->cfg.orphan_ttl_s;
	s->budget_default = true;
	s->orphan = true;
	s->believed = ledger_knows(s);
	s->state = SEQ_DETACHED;
	TAILQ_INSERT_TAIL(&c->gone, s, gone);
	s->in_gone = true;
	c->n_orphans++;
	return s;
}

static bool sane(const struct page_meta *m, const struct seq_record *r)
{
	uint32_t rows = 0;

	if (r->lifetime != KVT_LEASED || seq_born(r) >> 63 || !r->lanes || r->lanes > CTL_MAX_LANES ||
	    memcmp(r->key, m->id.key, 16) || r->tenant != m->id.tenant || !m->pos_words ||
	    m->pos_words > PAGE_SPAN || !m->bytes || m->bytes > TIER_MAX_PAGE || m->id.first > WIRE_MAX_ROWS ||
	    m->id.rows > PAGE_ROWS || !m->id.rows || m->bytes % m->id.rows || m->id.page >> 63 ||
	    (m->id.lane == PAGE_NOTE_LANE ? m->bytes != NOTE_BYTES : m->id.lane >= r->lanes))
		return false;
	for (uint32_t w = 0; w < m->pos_words; w++)
		rows += (uint32_t)__builtin_popcountll(m->pos[w]);
	return rows == m->id.rows && m->id.first + m->pos_words * 64 <= WIRE_MAX_ROWS + 64;
}

static struct page *found_page(struct core *c, struct seq *s, int tier, tier_addr addr,
			       const struct page_meta *m)
{
	struct page *p = page_new(&c->pages, s->origin, m->id.lane, m->id.first, m->pos_words);

	if (!p)
		return NULL;
	p->number = m->id.page;
	c->pages.next = MAX(c->pages.next, p->number + 1);
	p->epoch = m->id.epoch;
	p->rows = (uint8_t)m->id.rows;
	p->bytes = m->bytes;
	p->crc = m->crc;
	memcpy(p->pos, m->pos, m->pos_words * sizeof(uint64_t));
	if (page_set_copy(&c->pages, p, tier, addr) < 0) {
		page_ref(p);
		page_unref(&c->pages, p);
		return NULL;
	}
	return p;
}

/* A page that is known already has another copy, if it is the same one in all that it says. */
static bool second_copy(struct core *c, struct page *p, int tier, tier_addr addr, const struct page_meta *m)
{
	if (page_in(p, tier) || p->epoch != m->id.epoch || p->rows != m->id.rows || p->bytes != m->bytes ||
	    p->crc != m->crc || p->span != m->pos_words || memcmp(p->pos, m->pos, p->span * sizeof(*p->pos)))
		return false;
	return page_set_copy(&c->pages, p, tier, addr) == 0;
}

/* What is not taken is freed on disk: so where memory lacks it is taken, and nobody will refer to it. */
static bool on_found(void *arg, tier_addr addr, const struct page_meta *m, const struct seq_record *r)
{
	struct finding *f = arg;
	struct core *c = f->core;
	struct page *p;
	struct seq *s;

	if (!r || !sane(m, r))
		return false;
	s = f->no_memory ? NULL : orphan(f, r);
	if (!s)
		return f->no_memory;
	if ((f->tier == KVT_TIER_NVME && !s->believed) || m->id.page < s->floor) {
		c->stat.miss_stale++;
		return false;
	}
	p = m->id.lane == PAGE_NOTE_LANE ? s->note[f->tier] : NULL;
	if (p && p->number >= m->id.page) {
		s->epoch = MAX(s->epoch, m->id.epoch);
		return false; /* there is a newer one */
	}
	p = m->id.lane == PAGE_NOTE_LANE ? NULL : index_find(&s->ix, m->id.lane, m->id.first, m->id.page);
	if (p)
		return second_copy(c, p, f->tier, addr, m);
	p = found_page(c, s, f->tier, addr, m);
	f->no_memory |= !p;
	if (!p)
		return true;
	s->epoch = MAX(s->epoch, p->epoch);
	if (p->lane == PAGE_NOTE_LANE) {
		note_take(s, f->tier, p);
		return true;
	}
	if (index_list_page(&s->ix, p) == 0)
		return true;
	f->no_memory = c->pages.closing = true; /* what ends from now on stays on disk */
	page_ref(p);
	page_unref(&c->pages, p);
	return true;
}

/* ---- rebuilding --------------------------------------------------------------------- */

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

/* The newest note, if it is of the newest epoch. */
static int find_note(struct core *c, const struct seq *s, struct note *ret)
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

/* Pages that cannot be believed leave the list. Returns the rows that the others reach. */
static uint32_t drop_stale(struct core *c, struct seq *s, uint32_t oldest)
{
	uint32_t rows = 0;

	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		struct lane_pages *lp = &s->ix.lane[l];
		uint32_t out = 0;

		for (uint32_t i = 0; i < lp->n; i++) {
			struct page *p = lp->v[i];

			if (p->epoch < oldest) {
				c->stat.miss_stale++;
				page_unref(&c->pages, p);
				continue;
			}
			lp->v[out++] = p;
			for (uint32_t w = p->span; w--;)
				if (p->pos[w]) {
					uint32_t end =
						p->first + w * 64 + 64 - (uint32_t)__builtin_clzll(p->pos[w]);

					rows = MAX(rows, MIN(end, index_limit(&s->ix, p->epoch)));
					break;
				}
		}
		lp->n = out;
	}
	return rows;
}

/* The rows of the lane that have a copy in this tier. */
static void mark_copies(struct core *c, struct seq *s, uint32_t lane, int tier)
{
	for (uint32_t i = 0; i < s->ix.lane[lane].n; i++) {
		struct page *p = s->ix.lane[lane].v[i];

		if (!page_in(p, tier))
			continue;
		index_mark(&s->ix, p, tier, true);
		c->stat.returned[tier] += p->bytes;
	}
}

/* Index and counts of a sequence whose pages reach `rows` rows. */
static int list_rows(struct core *c, struct seq *s, uint32_t rows)
{
	int r = index_extend(&s->ix, rows);

	if (r < 0)
		return r;
	s->rows = s->scored = rows;
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		bits_clear_range(index_bits(&s->ix, KVT_TIER_DEVICE, l), 0, rows);
		s->ix.resident[l] = 0;
		for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
			mark_copies(c, s, l, t);
			/* Keys are not kept: all rows are equal until they are scored again. */
			bits_for_each(i, index_bits(&s->ix, t, l), rows)
				s->ix.key[(size_t)l * s->ix.cap + i] = 1;
		}
	}
	return 0;
}

static int rebuild(struct core *c, struct seq *s)
{
	static struct note n; /* start-up only */
	uint32_t oldest = s->epoch, rows;
	const struct ledger_entry *e = ledger_of(s);
	bool lives = s->place != LEDGER_NONE; /* whatever is left of it */
	int r = 0;

	if (e && e->epoch >= s->epoch) {
		s->epoch = e->epoch;
		oldest = e->oldest;
		for (uint32_t i = 0; i < e->n && !r; i++)
			r = index_mark_epoch(&s->ix, e->mark[i].epoch, e->mark[i].start);
		if (r < 0)
			return r;
	} else {
		r = find_note(c, s, &n);
		if (r == -ENOMEM)
			return r;
		oldest = r ? oldest : n.pad;
		lives |= !r;
		for (uint32_t i = 0; !r && i < n.n && !planted("restart-skips-epoch-cut"); i++)
			r = index_mark_epoch(&s->ix, n.mark[i].epoch, n.mark[i].start);
		if (r == -ENOMEM)
			return r;
	}
	rows = drop_stale(c, s, oldest);
	if (!rows && (!lives || planted("restart-frees-the-empty")))
		return -ENOENT;
	if (!rows)
		(void)drop_stale(c, s, UINT32_MAX); /* all are cut */
	r = rows ? list_rows(c, s, rows) : 0;
	if (r < 0)
		return r;
	s->expires_ns = now_ns() + (uint64_t)s->ttl_s * 1000000000u;
	r = ledger_return(s);
	if (r < 0)
		return r;
	seq_recount(s);
	return 0;
}

int restart_scan(struct core *c)
{
	struct finding left = {.core = c};
	struct seq_record record;
	struct seq *s, *next;
	uint32_t cursor = 0;
	int r;

	for (int t = KVT_TIERS - 1; t >= KVT_TIER_DRAM; t--) {
		struct tier *tier = c->pages.tier[t];
		struct finding f = {.core = c, .tier = t};

		r = tier && tier->ops->scan ? tier->ops->scan(tier, on_found, &f) : 0;
		if (r < 0 || f.no_memory)
			return r < 0 ? r : -ENOMEM;
	}
	while (ledger_left(c, &cursor, &record))
		(void)orphan(&left, &record);
	if (left.no_memory)
		return -ENOMEM;
	for (s = TAILQ_FIRST(&c->gone); s; s = next) {
		next = TAILQ_NEXT(s, gone);
		r = rebuild(c, s);
		if (r == -ENOMEM)
			return r; /* what is on disk stays there */
		if (r < 0) {
			log_line(4, "restart: sequence of tenant %s: nothing to believe, freed",
				 s->tenant->name);
			seq_end(s);
		}
	}
	crash_point("restart.rebuilt");
	if (c->ledger) {
		r = ledger_settle(c->ledger);
		if (r < 0)
			return r;
	}
	if (c->n_orphans)
		log_line(6,
			 "restart: %u leased sequences found, %llu KiB in dram, %llu KiB on nvme, kept %u s "
			 "for their clients",
			 c->n_orphans, (unsigned long long)(c->stat.returned[KVT_TIER_DRAM] >> 10),
			 (unsigned long long)(c->stat.returned[KVT_TIER_NVME] >> 10), c->cfg.orphan_ttl_s);
	return 0;
}
