/* SPDX-License-Identifier: MIT */
/*
 * The mover: carries out plans for regions. This file owns the traffic between
 * tiers and everybody who moves pages; mover_out.c makes the writes of a plan,
 * mover_in.c its reads, repack.c the moves below the device tier.
 *
 * Everything runs from one pump, a deferred event: whoever changes something
 * that others may wait for (a buffer came back, a worker ended) kicks it.
 */
#include <string.h>
#include "daemon/internal.h"
#include "daemon/limbo.h"
#include "daemon/usdt.h"
#include "daemon/pressure.h"
#include "shm/crc.h"
#include "shm/trial.h"
#include "shm/util.h"

#define BATCH 64u
#define READ_RUN (UINT64_C(2) << 20)
#define PUMP_NS UINT64_C(500000) /* of one slice */

struct mover {
	struct pio_list waiting[KVT_TIERS], behind[KVT_TIERS]; /* for a buffer */
	struct tier_io *batch[KVT_TIERS][BATCH];
	unsigned n_batch[KVT_TIERS];
	TAILQ_HEAD(plans, plan) plans;
	sd_event_source *pump, *io[KVT_TIERS];
	uint64_t reading; /* bytes of staging that reads hold */
	bool full, again;
};

/* ---- one page ------------------------------------------------------------------ */

struct pio *pio_new(struct core *c, struct page *p, int tier, void (*end)(struct pio *), void *owner)
{
	struct pio *io = calloc(1, sizeof(*io));

	if (!io)
		return NULL;
	io->core = c;
	io->page = p;
	io->tier = tier;
	io->end = end;
	io->owner = owner;
	io->io.user = io;
	io->io.bytes = p->bytes;
	io->io.addr = TIER_ADDR_NONE;
	page_pin(p);
	c->pios++;
	return io;
}

void pio_release(struct pio *io)
{
	struct core *c = io->core;

	if (io->reading && io->tier == KVT_TIER_NVME)
		c->mover->reading -= io->io.bytes;
	io->reading = false;
	if (!io->io.buf)
		return;
	c->pages.tier[io->tier]->ops->release(c->pages.tier[io->tier], &io->io);
	io->io.buf = NULL;
	mover_kick(c);
}

void pio_free(struct pio *io)
{
	struct core *c = io->core;

	pio_release(io);
	if (io->io.res >= 0 || !planted("quota-leak"))
		c->pages.used[io->tier][io->page->origin->charge] -= io->reserved;
	if (io->throttled) {
		throttle_end(c, io->io.bytes, io->background);
		mover_kick(c);
	}
	page_unpin(&c->pages, io->page);
	c->pios--;
	free(io->sum);
	free(io);
}

static void submit(struct core *c, int tier)
{
	struct mover *m = c->mover;
	unsigned n = m->n_batch[tier];
	uint64_t now = now_ns();

	for (unsigned i = 0; i < n; i++)
		((struct pio *)m->batch[tier][i]->user)->submitted_ns = now;
	m->n_batch[tier] = 0;
	if (n)
		c->pages.tier[tier]->ops->submit(c->pages.tier[tier], m->batch[tier], n);
}

static void enqueue(struct pio *io)
{
	struct mover *m = io->core->mover;

	m->batch[io->tier][m->n_batch[io->tier]++] = &io->io;
	if (m->n_batch[io->tier] == BATCH)
		submit(io->core, io->tier);
	mover_kick(io->core);
}

/* false: it must wait for a buffer. */
static bool try_read(struct pio *io)
{
	struct tier *t = io->core->pages.tier[io->tier];
	int r = page_in(io->page, io->tier) ? 0 : -ENOENT;

	if (!r) {
		io->io.addr =
			io->page->addr[io->tier - 1]; /* now: the cleaner may have moved it while we waited */
		r = t->ops->prepare(t, &io->io);
	}
	if (r == -EAGAIN)
		return false;
	if (r < 0) {
		io->io.buf = NULL;
		io->io.res = r;
		io->end(io);
	} else {
		io->reading = true;
		io->core->mover->reading += io->tier == KVT_TIER_NVME ? io->io.bytes : 0;
		enqueue(io);
	}
	return true;
}

void pio_read(struct pio *io)
{
	struct mover *m = io->core->mover;

	io->io.op = TIER_READ;
	/* What somebody waits for goes before what is moved behind everything else. */
	STAILQ_INSERT_TAIL(io->background ? &m->behind[io->tier] : &m->waiting[io->tier], io, link);
	mover_kick(io->core);
}

/* The quota is kept here, to the byte: plans only estimate what their pages will take. */
static bool room_for(struct pio *io, const struct seq *s)
{
	const struct config_tenant *l = &s->tenant->limit;
	struct core *c = io->core;
	uint32_t charge = io->page->origin->charge;
	bool dram = io->tier == KVT_TIER_DRAM;
	uint64_t limit = dram ? l->dram_bytes : l->nvme_bytes, used = c->pages.used[io->tier][charge], held;

	if (dram) {
		/* Its own segments have room for it whatever is left; new ones only as far as something is. */
		held = used + direct_held(c, charge, 0);
		io->io.owner = io->page->lane == PAGE_NOTE_LANE ? 0 : direct_owner_of(s);
		io->io.room = limit > held ? limit - held : 0;
		used = io->io.owner ? used + direct_held(c, charge, io->io.owner) : held;
	}
	return planted("quota-unchecked") || (used <= limit && limit - used >= page_room(io->page->bytes));
}

int pio_prepare(struct pio *io, struct seq *s)
{
	struct core *c = io->core;
	struct tier *t = c->pages.tier[io->tier];
	struct page *p = io->page;
	int r;

	if (!t)
		return -ENOSPC;
	if (!room_for(io, s))
		return limbo_awaited(c, io->tier, p->origin->charge) ? -EAGAIN : -ENOSPC;
	if (io->tier == KVT_TIER_NVME && p->lane != PAGE_NOTE_LANE &&
	    !throttle_may(c, p->bytes, io->background))
		return -EAGAIN;
	memcpy(io->words, p->pos, p->span * sizeof(uint64_t));
	page_ident(p, &io->io.meta.id);
	io->io.op = TIER_WRITE;
	io->io.meta.bytes = p->bytes;
	io->io.meta.pos = io->words;
	io->io.meta.pos_words = p->span;
	io->io.life = s->lifetime == KVT_LEASED ? TIER_LONG : TIER_SHORT;
	io->io.near = io->tier == KVT_TIER_DRAM ? s->node : 0;
	io->io.seq = &io->rec;
	memcpy(io->rec.key, p->origin->key, sizeof(io->rec.key));
	memcpy(io->rec.secret_hash, s->secret_hash, sizeof(io->rec.secret_hash));
	io->rec.tenant = s->tenant_hash;
	io->rec.model = s->fingerprint;
	io->rec.lanes = s->ix.lanes;
	io->rec.born_lo = (uint32_t)s->born;
	io->rec.born_hi = (uint32_t)(s->born >> 32);
	io->rec.lifetime = s->lifetime;
	r = t->ops->prepare(t, &io->io);
	if (r == -ENOSPC && limbo_awaited(c, io->tier, LIMBO_ALL))
		r = -EAGAIN;
	if (!r)
		s->reach = MAX(s->reach, page_reach(p));
	if (!r && io->tier == KVT_TIER_NVME) {
		io->throttled = true;
		throttle_begin(c, p->bytes, io->background);
	}
	if (!r) {
		io->reserved = page_room(p->bytes);
		c->pages.used[io->tier][p->origin->charge] += io->reserved;
	}
	return r;
}

void pio_write(struct pio *io)
{
	io->io.meta.crc = io->page->crc;
	enqueue(io);
}

void pio_write_now(struct pio *io)
{
	pio_write(io);
	submit(io->core, io->tier);
}

bool page_verify(const struct page *p, const void *buf)
{
	struct page_ident id;

	page_ident(p, &id);
	return crc32c(page_crc_seed(&id), buf, p->bytes) == p->crc;
}

void mover_lost(struct seq *s, struct page *p, int tier, int err)
{
	struct core *c = s->core;
	uint32_t rows[4] = {index_alive(&s->ix, p, tier, NULL), 0, 0, 0};

	if (err == -EBADMSG)
		c->stat.miss_corrupt++;
	else
		c->stat.miss_io++;
	s->misses++;
	log_about(&s->tenant->said, 4, "miss: seq %016llx lane %u page %llx: %s in %s, %u rows lost there",
		  (unsigned long long)s->handle, p->lane, (unsigned long long)p->number,
		  err == -EBADMSG ? "checksum mismatch" : strerror(-err), c->pages.tier[tier]->ops->name,
		  rows[0]);
	core_feed(c, FEED_MISS, s, (uint64_t)-err, p->bytes, rows);
	index_mark(&s->ix, p, tier, false);
	index_sweep(&s->ix, &c->pages, p->lane);
	seq_recount(s);
}

/* ---- the pump --------------------------------------------------------------------- */

static bool reap(struct core *c, int tier)
{
	struct tier *t = c->pages.tier[tier];
	struct tier_io *done[BATCH];
	unsigned n = t->ops->reap(t, done, BATCH);
	uint64_t now = n ? now_ns() : 0;

	for (unsigned i = 0; i < n; i++) {
		struct pio *io = done[i]->user;

		histogram_add(io->reading ? &c->stat.read_ns[tier] : &c->stat.write_ns[tier],
			      now - io->submitted_ns);
		if (io->reading && tier == KVT_TIER_NVME && !io->background)
			throttle_saw_read(c, now - io->submitted_ns);
		if (!io->reading && tier == KVT_TIER_DRAM && io->io.res >= 0)
			migrate_saw(c, &io->io);
		if (io->throttled)
			throttle_saw_write(c, now - io->submitted_ns);
		if (io->reading)
			USDT(tier_read, tier, io->io.bytes, now - io->submitted_ns, io->io.res);
		else
			USDT(tier_write, tier, io->io.bytes, now - io->submitted_ns, io->io.res);
		io->end(io);
	}
	return n == BATCH;
}

/*
 * Buffers come back a few at a time, but a disk wants long runs: once the share
 * of the staging memory that reads may hold is used up, wait until a good run fits.
 */
static bool may_read(struct core *c, int tier)
{
	struct mover *m = c->mover;
	uint64_t share = c->cfg.nvme_staging / 4 * 3;

	if (tier != KVT_TIER_NVME)
		return true;
	if (m->reading >= share)
		m->full = true;
	else if (m->reading + MIN(READ_RUN, share / 2) <= share)
		m->full = false;
	return !m->full;
}

static void start_reads(struct core *c, int tier)
{
	struct mover *m = c->mover;
	struct pio *io;

	for (;;) {
		struct pio_list *from = STAILQ_EMPTY(&m->waiting[tier]) ? &m->behind[tier] : &m->waiting[tier];

		io = STAILQ_FIRST(from);
		if (!io || !may_read(c, tier))
			break;
		STAILQ_REMOVE_HEAD(from, link);
		if (!try_read(io)) {
			STAILQ_INSERT_HEAD(from, io, link);
			m->full = m->reading > 0;
			break;
		}
	}
}

static void check_moved(struct plan *p)
{
	if (!p->moving || !p->out_done || !p->in_done || (p->refs != 1 && !planted("ready-before-copied")) ||
	    !window_settled(p))
		return;
	TAILQ_REMOVE(&p->seq->core->mover->plans, p, pump);
	p->moving = false;
	manager_moved(p);
}

/* One round over the plans that move: a few pages each, so that none waits for another. */
static unsigned pump_plans(struct core *c)
{
	struct plan *p, *next, *last = TAILQ_LAST(&c->mover->plans, plans);
	unsigned n = 0, made;

	for (p = TAILQ_FIRST(&c->mover->plans); p; p = p == last ? NULL : next) {
		next = TAILQ_NEXT(p, pump);
		/* After a miss the others are still read: the next plan should not meet them one by one. */
		if (p->over || p->error)
			p->out_done = p->in_done = true;
		if (!p->out_done && (made = mover_out(p, BATCH))) {
			n += made;
			TAILQ_REMOVE(&c->mover->plans, p, pump); /* the next one goes first next time */
			TAILQ_INSERT_TAIL(&c->mover->plans, p, pump);
		}
		if (!p->in_done)
			n += mover_in(p, BATCH);
	}
	mover_in_flush(c);
	return n;
}

void mover_run(struct core *c)
{
	struct mover *m = c->mover;
	uint64_t end = now_ns() + PUMP_NS;
	struct plan *p, *next;

	do {
		m->again = false;
		for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
			if (c->pages.tier[t])
				start_reads(c, t);
		limbo_pump(c);
		repack_pump(c);
		settle_pump(c);
		pressure_pump(c);
		recall_pump(c);
		direct_pump(c);
		compact_pump(c);
		migrate_pump(c);
		verify_pump(c);
		if (share_pump(c))
			m->again = true;
		if (pump_plans(c))
			m->again = true;
		for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
			if (!c->pages.tier[t])
				continue;
			submit(c, t);
			if (reap(c, t))
				m->again = true;
		}
		mover_in_flush(c);
		for (p = TAILQ_FIRST(&m->plans); p; p = next) {
			next = TAILQ_NEXT(p, pump);
			check_moved(p);
		}
	} while (m->again && now_ns() < end);
}

bool mover_busy(const struct core *c)
{
	const struct plan *p;

	TAILQ_FOREACH(p, &c->mover->plans, pump)
		if (!window_rests(p))
			return true;
	return c->pios || !STAILQ_EMPTY(&c->repack_wait);
}

static int on_pump(sd_event_source *src, void *arg)
{
	struct core *c = arg;

	mover_run(c);
	if (c->mover->again)
		sd_event_source_set_enabled(src, SD_EVENT_ONESHOT);
	drain_check(c);
	return 0;
}

void mover_kick(struct core *c)
{
	if (c->mover->again)
		return;
	c->mover->again = true;
	sd_event_source_set_enabled(c->mover->pump, SD_EVENT_ONESHOT);
}

void mover_start(struct plan *p)
{
	p->refs++;
	p->moving = true;
	p->out_done = !p->rows_out;
	p->in_done = !p->rows_in;
	TAILQ_INSERT_TAIL(&p->seq->core->mover->plans, p, pump);
	mover_kick(p->seq->core);
}

static int on_tier(sd_event_source *src, int fd, uint32_t revents, void *arg)
{
	struct core *c = arg;

	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
		if (c->pages.tier[t])
			while (reap(c, t))
				;
	mover_in_flush(c);
	mover_kick(c);
	return 0;
}

int mover_open(struct core *c)
{
	struct mover *m = calloc(1, sizeof(*m));
	int r;

	if (!m)
		return -ENOMEM;
	c->mover = m;
	TAILQ_INIT(&m->plans);
	for (int t = 0; t < KVT_TIERS; t++)
		STAILQ_INIT(&m->waiting[t]);
	for (int t = 0; t < KVT_TIERS; t++)
		STAILQ_INIT(&m->behind[t]);
	r = sd_event_add_defer(c->ev, &m->pump, on_pump, c);
	if (r < 0)
		return r;
	sd_event_source_set_enabled(m->pump, SD_EVENT_OFF);
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
		int fd = c->pages.tier[t] ? c->pages.tier[t]->ops->event_fd(c->pages.tier[t]) : -1;

		if (fd < 0)
			continue;
		r = sd_event_add_io(c->ev, &m->io[t], fd, EPOLLIN, on_tier, c);
		if (r < 0)
			return r;
		sd_event_source_set_priority(m->io[t], SD_EVENT_PRIORITY_NORMAL - 1);
	}
	return 0;
}

void mover_close(struct core *c)
{
	struct mover *m = c->mover;

	if (!m)
		return;
	for (int t = 0; t < KVT_TIERS; t++)
		sd_event_source_disable_unref(m->io[t]);
	sd_event_source_disable_unref(m->pump);
	free(m);
	c->mover = NULL;
}
