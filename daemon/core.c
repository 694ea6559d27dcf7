/* SPDX-License-Identifier: MIT */
/* The core as a whole: opening, reloading, closing. */
#include <stdio.h>
#include <string.h>
#include <syslog.h>
#include "daemon/internal.h"
#include "daemon/ledger.h"
#include "daemon/limbo.h"
#include "daemon/near.h"
#include "daemon/probes.h"
#include "daemon/usdt.h"
#include "daemon/pressure.h"
#include "shm/util.h"

#define FEED_ENTRIES 16384u
#define CLOSE_NS (UINT64_C(20) * 1000000000u)

/* ---- feed -------------------------------------------------------------------------- */

/* Fill in when, and whose it is, and publish. */
static void feed_put(struct core *c, const struct seq *s, struct feed_event *e)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME_COARSE, &ts);
	e->time_ns = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
	if (s) {
		e->seq = s->handle;
		e->client = s->client ? s->client->id : 0;
	}
	feed_write(&c->feed, e);
}

void core_feed(struct core *c, uint8_t type, const struct seq *s, uint64_t plan, uint64_t bytes,
	       const uint32_t rows[4])
{
	struct feed_event e = {.type = type, .plan = plan, .bytes = bytes};

	if (rows)
		memcpy(e.rows, rows, sizeof(e.rows));
	feed_put(c, s, &e);
}

void feed_move(const struct seq *s, int from, int to, uint32_t lane, uint32_t rows, uint64_t bytes)
{
	struct feed_event e = {.type = FEED_MOVE,
			       .bytes = bytes,
			       .rows = {rows},
			       .from = (uint8_t)from,
			       .to = (uint8_t)to,
			       .lane_lo = (uint8_t)lane};

	journal_move(s, from, to, rows);
	if (to > from)
		USDT(demote, s->handle, from, to, lane, rows, bytes);
	else
		USDT(promote, s->handle, from, to, lane, rows, bytes);
	feed_put(s->core, s, &e);
}

/* ---- opening --------------------------------------------------------------------------- */

static int open_tier(struct core *c, int t, char *err, size_t errsize)
{
	const struct config *cfg = &c->cfg;
	bool dram = t == KVT_TIER_DRAM;
	const struct tier_ops *ops = c->seams.tier[t] ? c->seams.tier[t]
				     : dram           ? &tier_dram_ops
						      : &tier_nvme_ops;
	const char *fault = dram ? cfg->dram_fault : cfg->nvme_fault;
	struct tier_cfg tc = {
		.path = cfg->nvme_path,
		.size = dram ? cfg->dram_size : cfg->nvme_size,
		.segment = dram ? cfg->dram_segment : cfg->nvme_segment,
		.staging = cfg->nvme_staging,
		.depth = cfg->nvme_depth,
		.deadline_ms = cfg->nvme_deadline_ms,
		.no_uring = !cfg->nvme_io_uring,
		.prealloc = cfg->nvme_prealloc,
		.no_huge = !cfg->dram_huge,
		.node = cfg->dram_node,
		.nodes = &c->near->nodes->table,
		.keep = c->seams.keep,
		.pace = throttle_pace(c),
	};

	if (dram ? !cfg->dram_size : !cfg->nvme_enabled)
		return 0;
	if (*fault) {
		tc.fault = fault;
		tc.lower_ops = ops;
		ops = &tier_fault_ops;
	}
	return ops->open(&c->pages.tier[t], &tc, err, errsize);
}

/*
 * Beside what outlives the daemon. A life without the nvme tier goes on with the ledger of the one before, if
 * it can: the next one that has the tier would else believe what clients are told now is gone.
 */
static int open_ledger(struct core *c, char *err, size_t errsize)
{
	const struct tier *t = c->pages.tier[KVT_TIER_NVME];
	int r = 0;

	if (t && (t->ops->caps & TIER_CAP_DURABLE))
		r = ledger_open(&c->ledger, c->cfg.nvme_path);
	else if (!t && ledger_exists(c->cfg.nvme_path) && ledger_open(&c->ledger, c->cfg.nvme_path) < 0)
		log_line(LOG_WARNING,
			 "nvme path %s: %s cannot be opened: remove the store before nvme is switched on",
			 c->cfg.nvme_path, LEDGER_NAME);
	if (r < 0)
		snprintf(err, errsize, "nvme path %s: %s: %s", c->cfg.nvme_path, LEDGER_NAME, strerror(-r));
	return r;
}

static void set_limits(struct core *c)
{
	for (uint32_t i = 0; i < c->tenants; i++) {
		struct tenant *t = &c->tenant[i];

		t->index = i;
		t->limit = c->cfg.tenant[i];
		memcpy(t->name, c->cfg.tenant[i].name, sizeof(t->name));
	}
}

static unsigned worker_threads(const struct core *c)
{
	if (c->seams.stepped)
		return 0;
	return c->cfg.workers ? c->cfg.workers : workers_fitting();
}

static int core_open(struct core *c, char *err, size_t errsize)
{
	int r;

	r = handle_table_new(&c->seqs, CORE_MAX_SEQS);
	if (r >= 0)
		r = handle_table_new(&c->regions, CORE_MAX_SEQS);
	if (r >= 0)
		r = page_store_init(&c->pages, c->tenants);
	if (r >= 0)
		r = limbo_open(c);
	if (r >= 0)
		r = seg_create(&c->feed_seg, SEG_PUBLISHED, "kvtier-feed", feed_bytes(FEED_ENTRIES),
			       SEG_F_POPULATE);
	if (r >= 0)
		r = feed_writer_init(&c->feed, c->feed_seg.addr, FEED_ENTRIES);
	if (r < 0) {
		snprintf(err, errsize, "core: %s", strerror(-r));
		return r;
	}
	r = near_open(c);
	if (r < 0)
		return r;
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
		r = open_tier(c, t, err, errsize);
		if (r < 0)
			return r;
	}
	r = workers_new(&c->workers, c->ev, worker_threads(c), c->tenants);
	if (r >= 0)
		r = mover_open(c);
	if (r >= 0)
		r = session_init(c);
	if (r >= 0)
		r = open_ledger(c, err, errsize);
	if (r >= 0)
		r = restart_scan(c);
	if (r >= 0)
		r = pressure_open(c);
	if (r >= 0)
		r = loop_open(c);
	if (r < 0 && !*err)
		snprintf(err, errsize, "core: %s", strerror(-r));
	return r;
}

int core_new_with(struct core **ret, const struct config *cfg, const struct core_seams *seams, sd_event *ev,
		  char *err, size_t errsize)
{
	struct core *c = calloc(1, sizeof(*c));
	int r;

	if (!c) {
		snprintf(err, errsize, "core: out of memory");
		return KVT_E_NOMEM;
	}
	c->cfg = *cfg;
	c->seams = *seams;
	c->ev = sd_event_ref(ev);
	c->feed_seg = (struct seg)SEG_INIT;
	c->tenants = cfg->tenants;
	memcpy(c->policy, cfg->policy, sizeof(c->policy));
	c->started_ns = c->loop_seen_ns = now_ns();
	LIST_INIT(&c->listeners);
	LIST_INIT(&c->clients);
	LIST_INIT(&c->ended);
	LIST_INIT(&c->models);
	LIST_INIT(&c->all_regions);
	LIST_INIT(&c->lingers);
	LIST_INIT(&c->uses);
	LIST_INIT(&c->pools);
	LIST_INIT(&c->weights);
	TAILQ_INIT(&c->lru);
	TAILQ_INIT(&c->gone);
	TAILQ_INIT(&c->settles);
	TAILQ_INIT(&c->compacts);
	TAILQ_INIT(&c->pulls);
	TAILQ_INIT(&c->fills);
	LIST_INIT(&c->owners);
	LIST_INIT(&c->users);
	STAILQ_INIT(&c->repack_wait);
	STAILQ_INIT(&c->recounts);
	set_limits(c);
	throttle_init(c);
	r = core_open(c, err, errsize);
	if (r < 0) {
		core_free(c);
		return r == -ENOMEM ? KVT_E_NOMEM : r == -ENOSPC ? KVT_E_NOSPC : KVT_E_IO;
	}
	*ret = c;
	return 0;
}

int core_new(struct core **ret, const struct config *cfg, sd_event *ev, char *err, size_t errsize)
{
	return core_new_with(ret, cfg, &(struct core_seams){0}, ev, err, errsize);
}

/* ---- closing and reloading ----------------------------------------------------------------- */

/* Runs done() of what the tenants' writers have written. True: some are still at it. */
static bool writers_busy(struct core *c)
{
	bool busy = false;

	for (uint32_t i = 0; i < c->tenants; i++)
		if (c->tenant[i].writer) {
			workers_finish(c->tenant[i].writer);
			busy |= workers_busy(c->tenant[i].writer) > 0;
		}
	return busy;
}

/* What is under way ends, without the event loop: it may have ended before us. */
static void settle_down(struct core *c)
{
	uint64_t end = now_ns() + CLOSE_NS;

	while (c->n_seqs || writers_busy(c) || mover_busy(c) || workers_busy(c->workers)) {
		if (now_ns() > end) {
			log_line(LOG_WARNING, "closing with work in flight: %u sequences, %u pages", c->n_seqs,
				 c->pios);
			return;
		}
		workers_finish(c->workers);
		mover_run(c);
		usleep(200);
	}
}

/* False: a file's owner holds one of them up, and what its thread uses must stay to the end of the process. */
static bool writers_free(struct core *c)
{
	bool all = true;

	for (uint32_t i = 0; i < c->tenants; i++) {
		struct tenant *t = &c->tenant[i];

		if (t->writer && workers_busy(t->writer)) {
			all = false;
		} else {
			workers_free(t->writer);
			t->writer = NULL;
		}
	}
	return all;
}

void core_free(struct core *c)
{
	struct seq *s, *next;
	bool quiet;

	if (!c)
		return;
	c->freeing = true;
	c->pages.closing = true;
	if (c->mover) {
		session_fini(c);
		for (s = TAILQ_FIRST(&c->lru); s; s = next) {
			next = TAILQ_NEXT(s, lru);
			seq_end(s);
		}
		settle_down(c);
	}
	while ((s = STAILQ_FIRST(&c->recounts))) {
		STAILQ_REMOVE_HEAD(&c->recounts, recounts);
		seq_unref(s);
	}
	loop_close(c);
	pressure_close(c);
	workers_free(c->workers);
	quiet = writers_free(c);
	mover_close(c);
	policies_free(c);
	verify_free(c);
	probes_free(c);
	direct_owners_free(c);
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
		if (c->pages.tier[t])
			c->pages.tier[t]->ops->close(c->pages.tier[t]);
	near_close(c);
	ledger_close(c->ledger);
	if (!quiet)
		return;
	limbo_free(c);
	page_store_free(&c->pages);
	handle_table_free(c->seqs);
	handle_table_free(c->regions);
	names_free(&c->names);
	owners_free(c);
	seg_close(&c->feed_seg);
	sd_event_unref(c->ev);
	free(c);
}

int core_reload(struct core *c, const struct config *cfg, char *err, size_t errsize)
{
	int r = config_reloadable(&c->cfg, cfg, err, errsize);

	if (r < 0)
		return KVT_E_INVAL;
	if (strcmp(c->cfg.policy, cfg->policy))
		memcpy(c->policy, cfg->policy, sizeof(c->policy));
	c->cfg = *cfg;
	set_limits(c);
	pressure_reload(c);
	policies_drop(c, NULL);
	return 0;
}
