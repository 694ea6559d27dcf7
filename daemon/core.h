/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The daemon's core as its faces (main, admin verbs) see it. All functions run
 * on the event-loop thread and return at once; long work is started here and
 * finishes as messages. Errors are KVT_E_* with one line in err.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <systemd/sd-event.h>
#include "daemon/config.h"
#include "daemon/probes.h"
#include "ipc/kvtier.h"
#include "shm/histogram.h"
#include "tiers/tier.h"

struct core;
struct nodes;

/* Open tiers, scan those that survive us, make the feed, start workers. cfg is copied. */
int core_new(struct core **ret, const struct config *cfg, sd_event *ev, char *err, size_t errsize);
/*
 * The same where DRAM outlives the process, or threads and disk are somebody else's (a simulation). Zeros: it
 * does not, the real ones. What is here stays the caller's, and must outlive the core.
 */
struct core_seams {
	const struct tier_ops *tier[KVT_TIERS]; /* opened in the place of the tier's own */
	const struct tier_keep *keep;           /* NULL: DRAM ends with the process */
	const struct nodes *nodes;              /* NULL: those of this host */
	bool stepped;                           /* no worker threads: see workers_step() */
};
int core_new_with(struct core **ret, const struct config *cfg, const struct core_seams *seams, sd_event *ev,
		  char *err, size_t errsize);
/* Serve this listening socket (SEQPACKET, taken). tenant: index into cfg, or -1: the admin socket. */
int core_listen(struct core *c, int fd, int tenant);
/* Stop accepting, flush leased sequences to NVMe, then call done once (from the loop). */
void core_drain(struct core *c, void (*done)(void *arg), void *arg);
int core_reload(struct core *c, const struct config *cfg, char *err, size_t errsize);
void core_free(struct core *c);
/* Still alive? The watchdog is fed only when this says so: loop, workers and io threads answered lately. */
bool core_healthy(struct core *c);
/*
 * One turn of the event loop, timed: no dispatch should hold it for longer than a millisecond
 * (core_stat.loop_max_ns). Out of memory is said and waited for, the loop goes on. 0, or the loop's -errno.
 */
int core_turn(struct core *c);

/* ---- looking --------------------------------------------------------------- */

struct core_stat {
	uint64_t uptime_ns, clients, seqs, orphans, models; /* clients: runtimes, not kvtierctl */
	uint64_t rows[KVT_TIERS];                           /* best copy there, all sequences */
	uint64_t bytes[KVT_TIERS];                          /* device: resident bytes of all regions */
	struct tier_stat tier[KVT_TIERS];                   /* [0] unused */
	struct config_watermarks marks[KVT_TIERS];
	uint64_t plans, plans_acked, plans_cancelled, plans_nacked, plan_ns_last, plan_ns_max, plan_ns_total;
	uint64_t rows_demoted[KVT_TIERS], rows_promoted[KVT_TIERS],
		rows_dropped;         /* demoted[t]: into t; promoted[t]: out of t */
	uint64_t refaults[KVT_TIERS]; /* rows wanted back from t soon after they left */
	uint64_t miss_corrupt, miss_client_mutated, miss_io, miss_stale, miss_nospace;
	uint64_t recalls, rows_recalled; /* searches asked for, rows copied out for them */
	uint64_t direct_demotions, hangups_protocol, admin_mutations;
	uint64_t index_bytes, staging_bytes, plan_bytes, directory_bytes;
	uint64_t worker_jobs, page_requests; /* now: with the workers; between us and the tiers */
	uint64_t loop_max_ns;                /* longest slice of the event loop */
	uint64_t loop_recent_max_ns;         /* of the last one to two seconds */
	uint64_t loop_cpu_max_ns;            /* the same by the loop's own processor time; 0: none was long */
	uint64_t loop_cpu_recent_max_ns;
	/* Nanoseconds. Of plans: from their beginning to the decision; of that, the decision's own job, its
	 * wait for a worker included. Of tiers: pages, from submission until the loop knows the result, good or
	 * bad. */
	struct histogram plan_ns, decide_ns, read_ns[KVT_TIERS], write_ns[KVT_TIERS];
	/*
	 * Of the rows in refaults: by how many rows their sequence had grown between the plan that wrote their
	 * page and the plan that wanted them back. A sequence remembers its last 8 plans: what comes back later
	 * is neither here nor in refaults, pages of an earlier life or a parent are in refaults only, and a
	 * page that was merged since counts from then.
	 */
	struct histogram refault_rows[KVT_TIERS];
	uint64_t
		returned[KVT_TIERS]; /* bytes of pages that an earlier life left there and the start believed */
	bool throttle_on;
	uint64_t throttle_window_bytes; /* of writes to nvme in flight, now */
	uint64_t throttle_waits, throttle_cuts,
		throttle_delayed_bytes;  /* delayed: written below the full window */
	bool throttle_disk;              /* it goes by the kernel's probes of the disk, too */
	char throttle_by[160];           /* what it goes by, and why not by the disk */
	uint64_t throttle_cleaner_bytes; /* that the tier's cleaner was let copy */
	uint64_t throttle_disk_cuts;     /* of the cuts: only the disk asked for them */
	/* At the last look: mean of what ended; what a request would have waited for. 0: nothing to see. */
	uint64_t throttle_disk_read_ns, throttle_disk_write_ns, throttle_disk_wait_ns;
	bool pressure_on, squeezed; /* the shrinker may act; it holds the tier below its size */
	char psi[64];               /* the kernel's events come from there, or why they do not */
	char reclaim[128];          /* so much time in reclaim counts as such an event, or why it does not */
	uint64_t reclaim_events;
	uint64_t dram_limit;     /* bytes that the DRAM tier may hold now */
	uint64_t memory_missing; /* bytes on the host or in a cgroup, as last seen */
	uint64_t squeezes, psi_events, squeeze_ns_last, squeeze_ns_max; /* from trigger to memory returned */
	uint64_t squeeze_returned_bytes;         /* in pieces of 2 MiB, beside whole segments */
	uint64_t revokes, revoke_returned_bytes; /* published: times that segments were chosen; what went */
	uint64_t squeeze_copied_bytes, squeeze_demoted_bytes, squeeze_dropped_bytes, squeeze_dropped_rows;
	uint64_t limbo_bytes[KVT_TIERS]; /* of moves to nvme that no seal covers yet, by where their sources
					    wait */
	uint64_t limbo_seals;            /* asked for before a segment was full */
	uint64_t limbo_let_go_bytes;     /* of sources that went before the seal */
	char numa[96];                   /* where memory is placed, or why it is not */
	uint64_t node_fallbacks, migrated_pages, migrated_bytes;
	bool kept; /* DRAM outlives the process */
	bool observe, frozen, draining;
	char policy[32];
};
void core_stat(struct core *c, struct core_stat *ret);

/* What a configured tenant is charged with at this moment, and its limits. */
struct core_tenant_stat {
	const char *name;
	uint64_t seqs, region_bytes, bytes[KVT_TIERS]; /* bytes: [0] unused */
	uint64_t revoked, late; /* published memory that was asked back; of that, that it keeps */
	struct config_tenant limit;
};
/* *cursor starts at 0. false at the end. */
bool core_tenant_next(struct core *c, uint32_t *cursor, struct core_tenant_stat *ret);

struct core_seq_stat {
	uint64_t handle;
	uint64_t owner; /* tenant and UID, hashed: the unit of isolation */
	uint8_t key[16];
	const char *tenant, *client, *model, *policy; /* client "-" when orphaned or detached */
	const char *policy_reason; /* why it is not the one asked for; NULL: it is, or nobody knows */
	bool window;               /* its device rows are in memory that only the client reaches */
	uint32_t rows, epoch, lanes, lifetime, ttl_left_s, resident_max;
	uint32_t budget[KVT_TIERS]; /* lane 0 */
	bool adaptive;              /* device budgets differ by lane, from least to most: */
	uint32_t device_least, device_most;
	bool shared; /* with other sequences: device rows of all lanes that it holds, and that it brought */
	uint64_t device_held, device_brought;
	uint64_t tier_rows[KVT_TIERS], tier_bytes[KVT_TIERS], dropped_rows;
	uint64_t plans, plan_id, plan_ns_last, refaults, misses, index_bytes, pinned_rows;
	bool direct; /* its client reads pages in published memory; so many are listed */
	uint64_t direct_pages;
	const char *plan_state;
	bool stalls_known; /* to the kernel's probes: of all threads of its client's process */
	struct probes_process stalls;
};
/* Published memory of an owner, and what of it no page takes. */
void core_owner_published(struct core *c, uint64_t owner, uint64_t *ret_bytes, uint64_t *ret_held);
/* What a user on a tenant's socket has; plans and misses since it first came. */
struct core_owner_stat {
	uint64_t seqs, orphans, plans, misses, dropped_rows, rows[KVT_TIERS], bytes[KVT_TIERS];
	uint64_t published, published_held;
};
void core_owner_stat(struct core *c, uint64_t owner, struct core_owner_stat *ret);
/* May this tenant have one more line of audit now? What is refused is counted and told later. */
bool core_may_audit(struct core *c, int tenant);
/* Iterate; *cursor starts at 0. false at the end. Strings live until the loop runs again. */
bool core_seq_next(struct core *c, uint32_t *cursor, struct core_seq_stat *ret);
/* By handle ("0x..."), by key (32 hex digits) or a unique prefix of one (at least 4), among the sequences of
 * that tenant and owner (tenant -1: all). KVT_E_NOENT, KVT_E_INVAL (ambiguous). */
int core_seq_find(struct core *c, int tenant, uint64_t owner, const char *name, uint64_t *ret, char *err,
		  size_t errsize);
int core_seq_stat(struct core *c, uint64_t handle, struct core_seq_stat *ret);
/* Per lane: rows by tier. ret[lanes]. */
struct core_lane_stat {
	uint32_t device, dram, nvme, dropped;
};
int core_seq_lanes(struct core *c, uint64_t handle, struct core_lane_stat *ret, uint32_t cap);
/* The journal of its last plans, oldest first, as JSON into `out`; see journal.h, and what the kernel's
 * probes say of its client, and of the host if the caller may know. KVT_E_STALE. */
struct json_text;
int core_seq_trace(struct core *c, uint64_t handle, bool host, struct json_text *out);
/*
 * Where row pos of lanes [lane, lane + lanes) is, its rank, and why so: as JSON into `out`, as many lanes as a
 * slice of the loop allows, with the lane that is next or null. KVT_E_STALE, KVT_E_INVAL, KVT_E_BUSY (a worker
 * has the index).
 */
int core_row_trace(struct core *c, uint64_t handle, uint32_t pos, uint32_t lane, uint32_t lanes,
		   struct json_text *out, char *err, size_t errsize);
/*
 * Which tiers hold each row, lane after lane, and what rows are worth, as JSON into `out`: as much as a slice
 * of the loop allows, and where to go on, or null. Codes of runs are sums of enum map_code (verbs.h).
 * KVT_E_STALE (with a line in err: it was cut since rows and epoch were told), KVT_E_INVAL, KVT_E_BUSY (a
 * worker has the index).
 */
struct core_map_ask {
	uint32_t lane, lanes;      /* lanes from this one on */
	uint32_t columns;          /* that scores are summed up in, over all rows; 0: no scores */
	uint32_t pos, rows, epoch; /* to go on: as the last answer said; 0: begin */
};
int core_seq_map(struct core *c, uint64_t handle, const struct core_map_ask *ask, struct json_text *out,
		 char *err, size_t errsize);
/* Read-only fd of the feed for `watch` (owned by the core). */
int core_feed_fd(struct core *c, size_t *ret_bytes);

/* ---- steering (each writes one audit line and one feed entry) ---------------- */

int core_seq_budget(struct core *c, uint64_t handle, const uint32_t rows[KVT_TIERS], char *err, size_t errsize);
int core_seq_pin(struct core *c, uint64_t handle, uint32_t pos, uint32_t n, bool pin, char *err,
		 size_t errsize);
/* Demote: at most keep device rows per lane until told otherwise. Promote: back to the budget. */
int core_seq_demote(struct core *c, uint64_t handle, uint32_t keep_rows, char *err, size_t errsize);
int core_seq_promote(struct core *c, uint64_t handle, char *err, size_t errsize);
int core_seq_drop(struct core *c, uint64_t handle, char *err, size_t errsize); /* ends the sequence */
/* name NULL handle: new default; else this sequence's. */
int core_policy_set(struct core *c, uint64_t handle, const char *name, char *err, size_t errsize);
/* Validate a .kvp file and use it for its model from now on. */
int core_policy_load(struct core *c, const char *path, char *err, size_t errsize);
struct core_policy_info {
	const char *name, *doc;
	unsigned caps;
	uint64_t seqs;
	bool is_default;
	char weights[CONFIG_PATH];
};
bool core_policy_next(struct core *c, uint32_t *cursor, struct core_policy_info *ret);
int core_freeze(struct core *c, bool on);
/* Scrub: read every page of one sequence (handle) or all (0) and check it. Runs in the background. */
struct core_verify {
	bool running;
	uint64_t pages, bytes, bad, total;
};
int core_verify_start(struct core *c, uint64_t handle, char *err, size_t errsize);
void core_verify_stat(struct core *c, struct core_verify *ret);
