/* SPDX-License-Identifier: MIT */
/*
 * Restart: leased sequences are found again by the pages they left on the NVMe
 * tier. What a page cannot tell is which of its rows a later truncation cut off;
 * a note (a page of lane NOTE_LANE) written at every truncation and at the end
 * holds the list. Without a note of the newest epoch only pages of that epoch
 * are believed: fewer rows, never wrong ones.
 */
#include <poll.h>
#include <string.h>
#include "daemon/internal.h"
#include "shm/crc.h"
#include "shm/util.h"

#define NOTE_LANE 0xffffu
#define NOTE_MAGIC 0x314f4e5453455651u
#define NOTE_BYTES KVT_UNIT
#define NOTE_MARKS ((NOTE_BYTES - 24) / sizeof(struct epoch_mark))

struct note {
	uint64_t magic;
	uint32_t rows, epoch, n, pad;
	struct epoch_mark mark[NOTE_MARKS];
};
_Static_assert(sizeof(struct note) == NOTE_BYTES, "one unit on disk");

/* ---- writing -------------------------------------------------------------------- */

static void note_end(struct pio *io)
{
	struct seq *s = io->owner;
	struct core *c = io->core;
	struct page *p = io->page;

	page_ref(p);
	s->noting = false;
	if (!io->io.res && !page_set_copy(&c->pages, p, KVT_TIER_NVME, io->io.addr) && !s->dead) {
		struct page *old = s->note;

		s->note = p;
		page_ref(p);
		if (old)
			page_unref(&c->pages, old);
	}
	pio_free(io);
	page_unref(&c->pages, p);
	if (!s->dead && s->note_again)
		restart_note(s);
	seq_unref(s);
	mover_kick(c);
}

void restart_note(struct seq *s)
{
	struct core *c = s->core;
	struct page_ident id;
	struct note *n;
	struct page *p;
	struct pio *io;

	if (s->lifetime != KVT_LEASED || !c->pages.tier[KVT_TIER_NVME] || s->dead ||
	    !(c->pages.tier[KVT_TIER_NVME]->ops->caps & TIER_CAP_DURABLE))
		return;
	s->note_again = s->noting;
	if (s->noting)
		return;
	p = page_new(&c->pages, s->origin, NOTE_LANE, 0, 1);
	if (!p)
		return;
	p->epoch = s->epoch;
	p->rows = 1;
	p->pos[0] = 1;
	p->bytes = NOTE_BYTES;
	io = pio_new(c, p, KVT_TIER_NVME, note_end, s);
	if (!io) {
		page_ref(p);
		page_unref(&c->pages, p);
		return;
	}
	if (pio_prepare(io, s) < 0) {
		/* No buffer or no place: the restart falls back to the newest epoch. */
		io->io.buf = NULL;
		pio_free(io);
		return;
	}
	n = io->io.buf;
	memset(n, 0, sizeof(*n));
	n->magic = NOTE_MAGIC;
	n->rows = s->rows;
	n->epoch = s->epoch;
	n->n = (uint32_t)MIN(s->ix.n_epochs, NOTE_MARKS);
	/* Too many: the oldest marks go, and with them (on reading) the pages that they would cut. */
	for (uint32_t i = 0; i < n->n; i++)
		n->mark[i] = s->ix.epochs[s->ix.n_epochs - n->n + i];
	n->pad = s->ix.n_epochs > NOTE_MARKS ? n->mark[0].epoch : 0; /* oldest epoch that is believed */
	page_ident(p, &id);
	p->crc = crc32c(page_crc_seed(&id), n, NOTE_BYTES);
	s->noting = true;
	s->refs++;
	pio_write(io);
}

void restart_forget(struct seq *s)
{
	if (s->note)
		page_unref(&s->core->pages, s->note);
	s->note = NULL;
}

/* ---- scanning -------------------------------------------------------------------- */

static struct tenant *tenant_of(struct core *c, uint64_t hash)
{
	for (uint32_t i = 0; i < c->tenants; i++)
		if (tenant_hash(&c->tenant[i], (uid_t)(uint32_t)hash) == hash)
			return &c->tenant[i];
	return NULL;
}

static struct seq *orphan(struct core *c, const struct seq_record *r)
{
	struct seq *s = seq_lookup(c, r->tenant, r->key);
	struct tenant *t = tenant_of(c, r->tenant);

	if (s)
		return s->ix.lanes == r->lanes && s->fingerprint == r->model ? s : NULL;
	if (!t)
		return NULL;
	s = seq_create(c, t, r->tenant, r->key, r->lanes);
	if (!s)
		return NULL;
	memcpy(s->secret_hash, r->secret_hash, sizeof(s->secret_hash));
	s->fingerprint = r->model;
	s->lifetime = KVT_LEASED;
	s->ttl_s = c->cfg.orphan_ttl_s;
	s->budget_default = true;
	s->orphan = true;
	s->state = SEQ_DETACHED;
	TAILQ_INSERT_TAIL(&c->gone, s, gone);
	s->in_gone = true;
	c->n_orphans++;
	return s;
}

static bool sane(const struct page_meta *m, const struct seq_record *r)
{
	uint32_t rows = 0;

	if (r->lifetime != KVT_LEASED || !r->lanes || r->lanes > CTL_MAX_LANES ||
	    memcmp(r->key, m->id.key, 16) || r->tenant != m->id.tenant || !m->pos_words ||
	    m->pos_words > PAGE_SPAN || !m->bytes || m->bytes > TIER_MAX_PAGE || m->id.first > WIRE_MAX_ROWS ||
	    m->id.rows > PAGE_ROWS || !m->id.rows || (m->id.lane >= r->lanes && m->id.lane != NOTE_LANE))
		return false;
	for (uint32_t w = 0; w < m->pos_words; w++)
		rows += (uint32_t)__builtin_popcountll(m->pos[w]);
	return rows == m->id.rows && m->id.first + m->pos_words * 64 <= WIRE_MAX_ROWS + 64;
}

static struct page *found_page(struct core *c, struct seq *s, tier_addr addr, const struct page_meta *m)
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
	if (page_set_copy(&c->pages, p, KVT_TIER_NVME, addr) < 0) {
		page_ref(p);
		page_unref(&c->pages, p);
		return NULL;
	}
	return p;
}

static bool on_found(void *arg, tier_addr addr, const struct page_meta *m, const struct seq_record *r)
{
	struct core *c = arg;
	struct page *p;
	struct seq *s;

	if (!sane(m, r))
		return false;
	s = orphan(c, r);
	if (!s)
		return false;
	p = found_page(c, s, addr, m);
	if (!p)
		return false;
	s->epoch = MAX(s->epoch, p->epoch);
	if (p->lane != NOTE_LANE) {
		if (index_list_page(&s->ix, p) == 0)
			return true;
	} else if (!s->note || s->note->number < p->number) {
		struct page *old = s->note;

		s->note = p;
		page_ref(p);
		if (old)
			page_unref(&c->pages, old);
		return true;
	}
	/* Freed here, so the tier must not do it again. */
	page_ref(p);
	page_unref(&c->pages, p);
	return true;
}

/* ---- rebuilding --------------------------------------------------------------------- */

/* Start-up only: nobody else uses the tier yet, so waiting here is fine. */
static int read_note(struct core *c, const struct page *p, struct note *ret)
{
	struct tier *t = c->pages.tier[KVT_TIER_NVME];
	struct tier_io io = {.op = TIER_READ, .bytes = p->bytes, .addr = p->addr[KVT_TIER_NVME - 1]}, *done,
		       *one = &io;
	int r = t->ops->prepare(t, &io), fd = t->ops->event_fd(t);

	if (r < 0 || p->bytes != NOTE_BYTES)
		return r < 0 ? r : -EBADMSG;
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

static int rebuild(struct core *c, struct seq *s)
{
	static struct note n; /* start-up only */
	uint32_t oldest = s->epoch, rows;
	int r = s->note ? read_note(c, s->note, &n) : -ENOENT;

	if (!r && n.epoch == s->epoch) {
		oldest = n.pad;
		for (uint32_t i = 0; i < n.n && !r; i++)
			r = index_mark_epoch(&s->ix, n.mark[i].epoch, n.mark[i].start);
		if (r < 0)
			return r;
	}
	rows = drop_stale(c, s, oldest);
	if (!rows)
		return -ENOENT;
	r = index_extend(&s->ix, rows);
	if (r < 0)
		return r;
	s->rows = s->scored = rows;
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		bits_clear_range(index_bits(&s->ix, KVT_TIER_DEVICE, l), 0, rows);
		s->ix.resident[l] = 0;
		for (uint32_t i = 0; i < s->ix.lane[l].n; i++)
			index_mark(&s->ix, s->ix.lane[l].v[i], KVT_TIER_NVME, true);
		/* Keys are not kept on disk: all rows are equal until they are scored again. */
		bits_for_each(i, index_bits(&s->ix, KVT_TIER_NVME, l), rows)
			s->ix.key[(size_t)l * s->ix.cap + i] = 1;
	}
	s->expires_ns = now_ns() + (uint64_t)s->ttl_s * 1000000000u;
	seq_recount(s);
	return 0;
}

int restart_scan(struct core *c)
{
	struct tier *t = c->pages.tier[KVT_TIER_NVME];
	struct seq *s, *next;
	int r;

	if (!t || !t->ops->scan)
		return 0;
	r = t->ops->scan(t, on_found, c);
	if (r < 0)
		return r;
	for (s = TAILQ_FIRST(&c->gone); s; s = next) {
		next = TAILQ_NEXT(s, gone);
		r = rebuild(c, s);
		if (r < 0) {
			log_line(4, "restart: sequence of tenant %s: nothing to believe, freed",
				 s->tenant->name);
			seq_end(s);
		}
	}
	if (c->n_orphans)
		log_line(6, "restart: %u leased sequences found on nvme, kept %u s for their clients",
			 c->n_orphans, c->cfg.orphan_ttl_s);
	return 0;
}
