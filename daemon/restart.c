/* SPDX-License-Identifier: MIT */
/*
 * Restart: leased sequences are found again by the pages they left in tiers that outlive the daemon: on NVMe,
 * and in DRAM where systemd holds its memory. Pages found in both are one page. What of them is believed is
 * rebuild.c's.
 *
 * Where there is a ledger (ledger.h) it knows what the clients of a daemon that died were told; notes (note.c)
 * are for what a power failure left, and for DRAM alone. A sequence that lives and of which no page was stored
 * is found by its entry or its note: it comes back without rows, so that its client keeps its key.
 */
#include <string.h>
#include "daemon/internal.h"
#include "daemon/ledger.h"
#include "daemon/restart.h"
#include "shm/trial.h"
#include "shm/util.h"

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
		restart_note_take(s, f->tier, p);
		return true;
	}
	if (index_list_page(&s->ix, p) == 0)
		return true;
	f->no_memory = c->pages.closing = true; /* what ends from now on stays on disk */
	page_ref(p);
	page_unref(&c->pages, p);
	return true;
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
		r = restart_rebuild(c, s);
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
