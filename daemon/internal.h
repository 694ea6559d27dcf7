/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What the parts of the core share: the core itself here, the rest in the
 * headers it includes. Everything belongs to the event-loop thread. A worker
 * sees only what a job lends it: see struct plan.
 */
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>
#include "daemon/core.h"
#include "daemon/client.h"
#include "daemon/journal.h"
#include "daemon/mover.h"
#include "daemon/nodes.h"
#include "daemon/plan.h"
#include "daemon/policies.h"
#include "daemon/seq.h"
#include "daemon/throttle.h"
#include "daemon/workers.h"
#include "shm/ctl.h"
#include "shm/feed.h"
#include "shm/handle.h"
#include "shm/util.h"

#define CORE_MAX_SEQS (1u << 20)
#define CORE_MAX_PLAN_BYTES (UINT64_C(4) << 30)

struct core {
	struct config cfg;
	struct core_seams seams;
	sd_event *ev;
	struct workers *workers;
	struct page_store pages;
	struct ledger *ledger; /* of leased sequences; NULL: nothing here outlives us */
	sd_event_source *tier_io[KVT_TIERS], *tick, *poll, *pump;
	struct seg feed_seg;
	struct feed_writer feed;
	struct tenant tenant[CONFIG_MAX_TENANTS];
	uint32_t tenants;
	LIST_HEAD(, listener) listeners;
	LIST_HEAD(, client) clients, ended; /* ended: freed from the loop */
	sd_event_source *reap_clients;
	LIST_HEAD(, model) models;
	LIST_HEAD(, region) all_regions;
	LIST_HEAD(, linger) lingers; /* regions whose client left and whose process lives */
	uint32_t n_lingers;
	LIST_HEAD(, policy_use) uses;
	LIST_HEAD(, share_pool) pools;
	LIST_HEAD(, weights_path) weights; /* files loaded by hand */
	char policy[32];                   /* default, may be steered */
	struct handle_table *seqs, *regions;
	struct names { /* see names.c */
		struct seq **by_key, **by_secret;
		uint32_t size, count, room;
		uint64_t seed[2];
		struct name { /* [count], in no order */
			uint64_t head;
			struct seq *seq;
		} * all;
	} names;
	uint32_t n_seqs, n_orphans, n_clients, n_models, next_client;
	TAILQ_HEAD(, seq) lru;  /* longest idle first */
	TAILQ_HEAD(, seq) gone; /* detached */
	uint32_t poll_cursor;

	/* mover */
	struct mover *mover;
	unsigned in_jobs, out_jobs; /* with the workers */
	uint32_t in_turn;           /* tenant whose batch of pages read goes next */
	uint32_t pios;              /* pages between a tier and us */
	STAILQ_HEAD(, seq) recounts;
	STAILQ_HEAD(, repack) repack_wait; /* for a buffer to write from */
	uint64_t background_bytes;         /* of lower-tier moves in flight */
	TAILQ_HEAD(, settle) settles;
	TAILQ_HEAD(, seq) compacts;
	TAILQ_HEAD(, seq) pulls;
	TAILQ_HEAD(, seq) fills;
	LIST_HEAD(, direct_owner) owners; /* of published memory */
	LIST_HEAD(, owner) users;
	bool below_low[KVT_TIERS], below_min[KVT_TIERS];

	struct probes *probes; /* NULL until the first tick */
	struct throttle throttle;
	struct near *near;
	struct pressure *pressure; /* NULL: no dram tier, or a simulation's */
	struct verify *verify;
	struct core_stat stat;
	struct log_bucket said; /* lines about nobody's clients in particular */
	uint64_t fresh_rows,
		directory_bytes; /* past the indexes, of all sequences and lanes; of all directories */
	struct loop_slices {     /* the longest of this second and of the last one, by the wall and by processor
				    time */
		uint64_t since_ns, now_ns, before_ns, cpu_now_ns, cpu_before_ns, cpu_seen_ns;
	} slices;
	uint64_t started_ns, region_rows_extra, seq_index_bytes, loop_seen_ns;
	bool frozen, draining, no_accept, freeing, short_of_memory;
	void (*drain_done)(void *arg);
	void *drain_arg;
	uint64_t drain_deadline_ns;
};

/* Whose lines about this tenant's clients count against; NULL: the admin socket's. */
static inline struct log_bucket *said_of(struct core *c, struct tenant *t)
{
	return t ? &t->said : &c->said;
}

/* ---- verify.c, stat.c ------------------------------------------------------------------------ */
void verify_pump(struct core *c);
void verify_free(struct core *c);
void core_feed(struct core *c, uint8_t type, const struct seq *s, uint64_t plan, uint64_t bytes,
	       const uint32_t rows[4]);
void feed_move(const struct seq *s, int from, int to, uint32_t lane, uint32_t rows, uint64_t bytes);

/* ---- loop.c, drain.c -------------------------------------------------------------------------- */
int loop_open(struct core *c);
void loop_close(struct core *c);
/* Called when a sequence is saved or work ends. */
void drain_check(struct core *c);
