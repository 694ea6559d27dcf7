/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * libkvtier: share a KV cache with kvtierd.
 *
 * Conventions. Functions return 0 or a positive count on success, KVT_AGAIN
 * (1000) when nothing could be done yet, or a negative KVT_E_* code;
 * kvtier_strerror() names it and kvtier_last_error() gives the daemon's line
 * (field, value, limit). Option structs begin with `size`: set it to
 * sizeof(struct) and zero the rest. Handles are opaque and owned by the caller
 * until the matching close. Every call that talks to the daemon returns within
 * kvtier_open_opts.timeout_ms; when the daemon is gone calls return
 * KVT_E_DAEMON at once and the runtime keeps its cache; the library reconnects
 * by itself (see below). One struct kvtier may be used from several threads (a
 * process-private mutex guards it); kvtier_plan_peek() takes no lock and makes
 * no system call. After fork() the child gets KVT_E_FORKED from every call.
 *
 * Words: a lane is (sequence, layer, KV head); a row is one token's K and V in
 * one lane; lanes are numbered layer by layer, head by head. Rows are packed in
 * the device tier in ascending position: slot of row p = resident rows below p.
 */
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * When the daemon goes away. Its end is noticed by the next call, by
 * kvtier_process() and by a kvtier_plan_wait() in progress. From then on every
 * call returns KVT_E_DAEMON at once, and kvtier_process() or any call tries to
 * connect again, at most every 50 ms at first and every second later. Regions
 * stay mapped: the runtime keeps its rows and goes on without eviction. Once
 * connected again, models are registered anew by themselves; sequences opened
 * before are detached: append, peek and the rest return KVT_E_STALE until the
 * runtime closes them. Sequences are opened, or resumed by key, in a new region
 * (one made before is KVT_E_STALE for that), whenever it suits the runtime.
 * kvtier_seq_resident() and kvtier_seq_rows() still answer for a detached
 * sequence.
 */

#define KVT_ABI_VERSION 0u
#define KVT_PUBLIC __attribute__((visibility("default")))

#define KVT_AGAIN 1000

enum kvtier_error {
	KVT_E_INVAL = -2001,   /* bad argument: last_error names field, value, limit */
	KVT_E_NOMEM = -2002,   /* out of memory, here or in the daemon */
	KVT_E_DAEMON = -2003,  /* daemon not reachable; reconnecting */
	KVT_E_TIMEOUT = -2004, /* deadline passed; the request may still happen */
	KVT_E_VERSION = -2005, /* daemon and library speak different protocols */
	KVT_E_STALE = -2006,   /* handle or plan no longer valid */
	KVT_E_LIMIT = -2007,   /* a quota or configured limit; last_error names it */
	KVT_E_EXISTS = -2008,  /* sequence key already in use */
	KVT_E_NOENT = -2009,   /* no such sequence, or wrong secret or tenant */
	KVT_E_NOSPC = -2010,   /* tier or region full */
	KVT_E_PERM = -2011,    /* not allowed for this peer */
	KVT_E_PROTO = -2012,   /* malformed message: the connection is closed */
	KVT_E_MODEL = -2013,   /* model description and use disagree */
	KVT_E_FORKED = -2014,  /* called in a child of fork() */
	KVT_E_IO = -2015,      /* I/O error */
	KVT_E_CORRUPT = -2016, /* a checksum or identity did not match: a counted miss */
	KVT_E_BUSY = -2017,    /* try later: draining, frozen or a plan is outstanding */
	KVT_E_INTERNAL = -2018,
	KVT_E_GPU = -2019, /* a call of the CUDA driver failed: last_error names call and code */
};

struct kvtier;
struct kvtier_model;
struct kvtier_region;
struct kvtier_seq;

enum kvtier_tier { KVT_TIER_DEVICE = 0, KVT_TIER_DRAM = 1, KVT_TIER_NVME = 2, KVT_TIERS = 3 };
enum kvtier_dtype { KVT_DTYPE_OPAQUE = 0, KVT_DTYPE_F32 = 1, KVT_DTYPE_F16 = 2, KVT_DTYPE_BF16 = 3 };
enum kvtier_granularity { KVT_GRAN_HEAD = 0, KVT_GRAN_TOKEN = 1, KVT_GRAN_BLOCK = 2 };
enum kvtier_lifetime { KVT_EPHEMERAL = 0, KVT_LEASED = 1 };
enum kvtier_rope { KVT_ROPE_NONE = 0, KVT_ROPE_HALF = 1, KVT_ROPE_INTERLEAVED = 2 };
enum kvtier_layer_kind { KVT_LAYER_FULL = 0, KVT_LAYER_SLIDING = 1, KVT_LAYER_MLA = 2 };
enum { KVT_ALL_LAYERS = -1 };

/* ---- connection ---------------------------------------------------------- */

typedef void (*kvtier_log_fn)(void *arg, int level, const char *line); /* level: syslog(3) */

struct kvtier_open_opts {
	size_t size;
	const char *socket;  /* NULL: $KVTIER_SOCKET, then /run/kvtier/kvtierd.sock */
	const char *name;    /* shown by kvtierctl; NULL: the program's name */
	uint32_t timeout_ms; /* deadline of each call; 0: 2000 */
	uint32_t max_seqs;   /* sequences open at once; 0: 64, at most 16384 */
	uint64_t plan_bytes; /* published memory for plans; 0: 64 MiB */
	kvtier_log_fn log;   /* NULL: silent; called under the library's locks: must not call back into it */
	void *log_arg;
};

/* Connect. Waits for the daemon at most timeout_ms. opts NULL: all defaults. Errors: DAEMON, LIMIT, PERM,
 * VERSION. */
KVT_PUBLIC int kvtier_open(const struct kvtier_open_opts *opts, struct kvtier **ret);
/* Close everything it owns; NULL is fine. Ephemeral sequences end, leased ones wait for their TTL. */
KVT_PUBLIC void kvtier_close(struct kvtier *c);
/* A descriptor that polls readable when kvtier_process() has something to do (or a KVT_E_*). Owned by c. */
KVT_PUBLIC int kvtier_event_fd(struct kvtier *c);
/* Drain notifications, see the daemon's end, reconnect when due. Never blocks. Returns the number of events
 * handled. */
KVT_PUBLIC int kvtier_process(struct kvtier *c);
KVT_PUBLIC const char *kvtier_strerror(int code);
/* The daemon's or the library's line for the calling thread's last failure; never NULL. */
KVT_PUBLIC const char *kvtier_last_error(void);
KVT_PUBLIC uint32_t kvtier_abi_version(void);

struct kvtier_stats {
	size_t size;
	uint64_t connects, reconnects, calls, timeouts;
	uint64_t plans_seen, plans_applied, plans_nacked, plans_cancelled;
	uint64_t rows_appended, rows_promoted, rows_evicted;
	uint64_t bytes_released; /* device bytes given back to the kernel */
	uint64_t wakeups;        /* eventfd writes made: a busy pair makes none */
};
/* ret->size is set by the caller, here and in every result struct that begins with it. */
KVT_PUBLIC int kvtier_stats(struct kvtier *c, struct kvtier_stats *ret);

/* ---- model and device memory ---------------------------------------------- */

struct kvtier_layer_desc {
	uint32_t kind;       /* enum kvtier_layer_kind */
	uint32_t kv_heads;   /* 1..256 */
	uint32_t k_bytes;    /* bytes of one head's K row */
	uint32_t v_bytes;    /* bytes of one head's V row; may be 0 */
	uint32_t side_bytes; /* scales and the like, per row; 0 for now */
	uint32_t window;     /* sliding window in rows, 0 = none */
};

struct kvtier_model_desc {
	size_t size;
	const char *name;                       /* e.g. "smollm2-135m-instruct"; picks the weight file */
	const struct kvtier_layer_desc *layers; /* n_layers entries, copied */
	uint32_t n_layers;                      /* 1..256; layers x heads <= 1024 */
	uint32_t dtype;                         /* enum kvtier_dtype of K and V */
	uint32_t head_dim;                      /* elements; 0 when dtype is opaque */
	uint32_t rope;                          /* enum kvtier_rope */
	uint32_t post_rope;                     /* keys are stored after RoPE */
	float rope_theta;
	uint32_t rank, world, first_head; /* tensor parallel: 0, 1, 0 when not */
};
/* Describe a model. Two registrations of one description share it. Errors: INVAL, MODEL, LIMIT. */
KVT_PUBLIC int kvtier_model_register(struct kvtier *c, const struct kvtier_model_desc *d,
				     struct kvtier_model **ret);
/* Sequences open on it keep what they need. NULL is fine. */
KVT_PUBLIC void kvtier_model_release(struct kvtier_model *m);

/*
 * Daemon-made exchange memory for device rows (CPU runtimes): sealed, never
 * huge, given back page by page as rows leave. bytes is rounded up to 4 KiB;
 * physical memory appears on use: also again when rows are written where an
 * applied plan gave pages back. A host without memory for that raises SIGBUS in
 * the writer, as with any shared memory. Errors: LIMIT, NOMEM.
 */
KVT_PUBLIC int kvtier_region_create(struct kvtier *c, uint64_t bytes, struct kvtier_region **ret);
/*
 * An engine's own pool instead: the first `bytes` (1..2^46) of a file open for reading and writing, a memfd or
 * a file on tmpfs, e.g. in /dev/shm. The daemon reads and writes it by descriptor and never maps it. fd stays
 * the caller's, who may close it at once: the library and the daemon keep their own; the library also maps it,
 * for kvtier_region_addr() and kvtier_plan_apply(), in addition to any mapping that the runtime has. Layouts,
 * apply, close and reconnecting are as for a made region, the tenant's quota too, except that an import may be
 * made again of the same file. The file stays as long as it is: rows that the daemon finds cut off are lost and
 * counted as misses; a file that is cut raises SIGBUS in this process when they are touched. Where the file
 * supports it (tmpfs does) memory of evicted rows is punched. Any thread, within timeout_ms. Errors: INVAL (fd:
 * not open read-write, opened for appending, sealed against writing, another file system; bytes: more than the
 * file has), LIMIT, NOMEM, VERSION (a daemon without it).
 */
KVT_PUBLIC int kvtier_region_import(struct kvtier *c, int fd, uint64_t bytes, struct kvtier_region **ret);
/* Where the library has it mapped; NULL for an imported file that it could not map. */
KVT_PUBLIC void *kvtier_region_addr(struct kvtier_region *r);
KVT_PUBLIC uint64_t kvtier_region_bytes(struct kvtier_region *r);
/* Bytes that the kernel really holds behind the region now. */
KVT_PUBLIC uint64_t kvtier_region_resident(struct kvtier_region *r);
/* Unmapped when the last sequence in it is closed. NULL is fine. */
KVT_PUBLIC void kvtier_region_close(struct kvtier_region *r);

/*
 * Where one layer's rows live in the region, in bytes. Row in slot s of head h:
 * K at k_off + h * k_head_stride + s * k_row_stride, V likewise. Slots
 * [0, cap) are the runtime's; slots [cap, cap + stage) belong to the daemon
 * while a plan promotes rows, and must exist in the region. score_off, when not
 * 0, is a plane of float32 [head][row position < max_rows] that the runtime
 * fills (used by policy "client"). The bytes from a plane's first to its last
 * slot belong to its sequence alone: heads, K and V or layers of one sequence may
 * be interleaved there, other sequences may not.
 */
struct kvtier_layout {
	uint64_t k_off, v_off;
	uint64_t k_head_stride, v_head_stride;
	uint64_t score_off, score_head_stride;
	uint32_t k_row_stride, v_row_stride;
	uint32_t cap, stage;
};
/*
 * The layouts of, and the bytes of region needed (from base on) by, the plain
 * layout [layer][K|V][head][cap + stage][row], followed by [layer][head][score_rows]
 * floats when score_rows (then the sequence's max_rows) is not 0. Talks to nobody.
 * ret_layers has room for the model's layers; either result may be NULL.
 */
KVT_PUBLIC int kvtier_layout_plain(struct kvtier_model *m, uint32_t cap, uint32_t stage, uint32_t score_rows,
				   uint64_t base, struct kvtier_layout *ret_layers, uint64_t *ret_bytes);

/* ---- sequences ------------------------------------------------------------- */

enum { KVT_BUDGET_UNIFORM = 0, KVT_BUDGET_PER_LAYER = 1, KVT_BUDGET_PER_LANE = 2 };
#define KVT_ROWS_ALL UINT32_MAX

/*
 * Rows per lane that each tier may hold. Rows past the sum are dropped, and rows for which a full tier or a
 * quota leaves no room or that cannot be written. nvme_rows = KVT_ROWS_ALL drops nothing: such rows stay on the
 * device.
 */
struct kvtier_budget {
	size_t size;
	uint32_t kind; /* KVT_BUDGET_*; the tables below are used unless uniform */
	uint32_t device_rows, dram_rows, nvme_rows;
	const uint32_t *device_table; /* per layer or per lane; device tier only */
	uint32_t table_n;
	uint32_t slack_rows; /* plan again when a lane holds this many above budget; 0: 64 */
	uint32_t manual;     /* 1: never plan by itself, only on request */
	const char *policy;  /* NULL: keep; else a policy name */
	uint32_t
		write_through; /* 1: rows that stay on the device get a copy below as soon as they are ranked,
				  the best in dram, as far as dram_rows and nvme_rows go; 0: keep what is set */
	uint32_t reserved;
};

struct kvtier_seq_opts {
	size_t size;
	uint8_t key[16];      /* 128-bit name, unique in the tenant; ephemeral: all zero picks a random one */
	uint8_t secret[32];   /* leased: needed to resume */
	uint32_t lifetime;    /* enum kvtier_lifetime */
	uint32_t ttl_s;       /* leased: kept this long without a client; at most 30 days */
	uint32_t max_rows;    /* positions this sequence may ever reach; <= 1048576 */
	uint32_t granularity; /* enum kvtier_granularity */
	uint32_t equal_lanes; /* 1: every lane keeps the same count */
	struct kvtier_region *region;
	const struct kvtier_layout *layouts; /* one per layer, copied */
	const struct kvtier_budget *budget;  /* NULL: the daemon's default for the tenant */
};

/*
 * Errors: INVAL, EXISTS, LIMIT, MODEL, STALE (a region of an earlier connection). After DAEMON or TIMEOUT a
 * leased sequence may have been opened: resume it, and open it when there is none (NOENT).
 */
KVT_PUBLIC int kvtier_seq_open(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *o,
			       struct kvtier_seq **ret);
/*
 * Take over a leased sequence by key and secret. Its rows are in the lower tiers
 * (the device tier is empty); request a plan to bring rows in. *ret_rows is its length: after a crash of the
 * daemon that of what had been stored, 0 where nothing had.
 */
KVT_PUBLIC int kvtier_seq_resume(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *o,
				 struct kvtier_seq **ret, uint32_t *ret_rows);
/*
 * Rows [pos, pos + n) of this layer (or KVT_ALL_LAYERS) are complete in the
 * region and immutable from now on. pos must be the layer's current length.
 * No system call unless the daemon sleeps. The sequence's length is that of its
 * shortest layer. Errors: INVAL (wrong pos), NOSPC (past max_rows, or more rows
 * resident than cap), BUSY (while a plan is being applied); nothing changed then.
 */
KVT_PUBLIC int kvtier_seq_append(struct kvtier_seq *s, int layer, uint32_t pos, uint32_t n);
/*
 * Forget rows at and past n; begins a new epoch. Cancels any plan; one that was
 * applied must be acknowledged before (BUSY). Their memory is given back when the
 * next plan is applied. After KVT_E_TIMEOUT the outcome is not known and other
 * calls return KVT_E_STALE until it is called again.
 */
KVT_PUBLIC int kvtier_seq_truncate(struct kvtier_seq *s, uint32_t n);
/*
 * A child with the parent's first `prefix` rows: lower tiers are shared, device
 * rows are copied into the child's own layouts by the library. Cancels the parent's
 * plan; one that was applied must be acknowledged before (BUSY). Errors: as open,
 * and NOSPC when the child's cap is too small for a lane of the parent.
 */
KVT_PUBLIC int kvtier_seq_fork(struct kvtier_seq *parent, uint32_t prefix, const struct kvtier_seq_opts *o,
			       struct kvtier_seq **ret);
/* Ephemeral: its rows are freed. Leased: kept for its TTL. NULL is fine. */
KVT_PUBLIC void kvtier_seq_close(struct kvtier_seq *s);
/* Close and free even when leased. s is gone whatever is returned. */
KVT_PUBLIC int kvtier_seq_drop(struct kvtier_seq *s);

struct kvtier_seq_info {
	size_t size;
	uint64_t handle;
	uint32_t rows, epoch, lanes, resident_max; /* resident_max: longest lane in the device tier */
	uint64_t tier_rows[KVT_TIERS];             /* rows whose best copy is there, over all lanes */
	uint64_t tier_bytes[KVT_TIERS];            /* allocated bytes, padding included */
	uint64_t dropped_rows;
	uint64_t plans, plan_ns_last, refaults, misses;
	uint64_t index_bytes;
	char policy[32];
	uint64_t unsaved_rows; /* on the device and nowhere else: gone with it */
};
/* Asks the daemon. */
KVT_PUBLIC int kvtier_seq_info(struct kvtier_seq *s, struct kvtier_seq_info *ret);
/* Rows of lane that are in the device tier now, ascending; returns the count (positions may be NULL). */
KVT_PUBLIC int kvtier_seq_resident(struct kvtier_seq *s, uint32_t lane, uint32_t *positions, uint32_t cap);
/* The sequence's length in rows as this library knows it. */
KVT_PUBLIC uint32_t kvtier_seq_rows(struct kvtier_seq *s);

/* ---- plans ------------------------------------------------------------------ */

enum { KVT_PLAN_NONE = 0, KVT_PLAN_DECIDED = 1, KVT_PLAN_READY = 2, KVT_PLAN_CANCELLED = 3 };

struct kvtier_plan {
	size_t size;
	uint64_t id;
	uint32_t state, epoch, watermark, lanes, words, flags;
	uint64_t decided_ns, rows_out, rows_in, rows_drop;
	/* bitmaps: bit p of lane l is word[l * words + p / 64] >> (p % 64) & 1; valid until acknowledged */
	const uint64_t *resident_after, *copy_out, *bring_in;
};

/*
 * Set the budget (sticky) and ask for a plan; asynchronous. *ret_id: plans with
 * id >= it reflect it. One that is outstanding already does not, and comes first.
 * A sequence without rows has nothing to decide: its plan comes with its first rows.
 */
KVT_PUBLIC int kvtier_plan_request(struct kvtier_seq *s, const struct kvtier_budget *b, uint64_t *ret_id);
/* Newest plan of this epoch, DECIDED or READY, not yet acknowledged: 1 found, 0 none. No lock, no system call.
 */
KVT_PUBLIC int kvtier_plan_peek(struct kvtier_seq *s, struct kvtier_plan *ret);
/*
 * Wait until a plan with id >= min_id is in `state`: READY, DECIDED (or READY), or
 * CANCELLED. A cancelled plan is followed by one with a later id, so a wait for
 * READY just goes on. Errors: BUSY when an earlier plan is READY (apply and
 * acknowledge it first: the awaited one is made then), TIMEOUT, DAEMON as soon as its end is seen, STALE.
 * Where the daemon gave up what min_id was asked for, at once: NOSPC, IO, CORRUPT (what a window held was not
 * what was announced) or BUSY (frozen meanwhile). Nothing changed then; ask again when it suits you, or append:
 * new rows make a plan due as ever. min_id 0 waits for whatever comes next.
 */
KVT_PUBLIC int kvtier_plan_wait(struct kvtier_seq *s, uint64_t min_id, uint32_t state, uint32_t timeout_ms,
				struct kvtier_plan *ret);
/*
 * Positions below the watermark resident in one lane after the plan (kept: the
 * promoted ones included), and promoted by it, ascending; returns the count, of
 * which the first cap are written. positions may be NULL.
 */
KVT_PUBLIC int kvtier_plan_kept(const struct kvtier_plan *p, uint32_t lane, uint32_t *positions, uint32_t cap);
KVT_PUBLIC int kvtier_plan_promoted(const struct kvtier_plan *p, uint32_t lane, uint32_t *positions,
				    uint32_t cap);
/*
 * Region runtimes: carry out a READY plan in place: close the gaps, merge the
 * staged rows, give the freed pages back to the kernel. The caller must not
 * touch the sequence's rows meanwhile, and rows that are written but not yet
 * appended are lost. All or nothing; does not acknowledge: plan_ack comes next.
 * Errors: STALE, BUSY (not ready, or applied before), NOSPC (no memory for rows
 * that come in), PROTO (a plan that does not fit what is resident).
 */
KVT_PUBLIC int kvtier_plan_apply(struct kvtier_seq *s, const struct kvtier_plan *p);
/*
 * Done with a READY plan. nack_lanes (bitmap over lanes, may be NULL) names lanes
 * left as they were: it is for runtimes that move rows themselves, lane by lane;
 * kvtier_plan_apply() does all of them, and nacking after it is INVAL. Errors:
 * STALE, BUSY (not ready). When the daemon is gone after an apply the error comes
 * back, and kvtier_seq_resident() tells what is resident now.
 */
KVT_PUBLIC int kvtier_plan_ack(struct kvtier_seq *s, uint64_t id, const uint64_t *nack_lanes);
/* Promotion by hand: rows [pos, pos + n) of every lane are wanted in the next plan, within the budget. */
KVT_PUBLIC int kvtier_fetch(struct kvtier_seq *s, uint32_t pos, uint32_t n, uint64_t *ret_id);

/* ---- recall ----------------------------------------------------------------- */

/*
 * A new turn's queries ask for rows that were demoted. Right before a layer
 * attends, the runtime hands over the turn's queries of that layer, after RoPE;
 * the daemon searches the layer's rows in DRAM that are not on the device,
 * finds those that the queries would attend to most, and copies them, K and V,
 * into a window of the sequence's region. The runtime attends over its resident
 * rows and the window in one pass. The copies are transient: the rows stay
 * where they were, no plan knows of them, and the window's memory is the
 * runtime's to reserve within its budget (ask plans for that many rows less).
 */
enum {
	KVT_RECALL_LOGITS = 1,      /* rank by q.k alone, not by the share of attention that q.k means */
	KVT_RECALL_NO_RESIDENT = 2, /* leave the rows on the device out of that share: cheaper */
	KVT_RECALL_ALONE = 4,       /* nothing comes along with a hit: before and after are really 0 */
	KVT_RECALL_FLAGS = 7,
};

struct kvtier_recall_opts {
	size_t size;
	uint32_t group; /* query heads of one KV head, e.g. 3; 0: 1 */
	uint32_t dtype; /* enum kvtier_dtype of the queries, not opaque */
	/* Query of token t, query head a (KV head a / group) at queries + t * token_stride + a * head_stride;
	 * bytes; 0, 0: packed [token][query head][head_dim]. */
	uint64_t token_stride, head_stride;
	float scale;    /* of q.k; 0: 1 / sqrt(head_dim) */
	uint32_t rows;  /* wanted per KV head, at most window_rows */
	uint32_t probe; /* of 1000 groups of 32 rows this many are searched row by row; 0: 250; 1000: exact */
	uint32_t flags; /* KVT_RECALL_* */
	uint32_t timeout_ms; /* deadline of this call; 0: the connection's */
	/* Where head h's i-th recalled row goes, in bytes of the region: K at k_off + h * k_head_stride +
	 * i * k_row_stride, V likewise. It must not overlap slots that plans use. */
	uint32_t window_rows;
	uint64_t k_off, v_off, k_head_stride, v_head_stride;
	uint32_t k_row_stride, v_row_stride;
	/* Demoted rows right before and behind a row that answers, which the answer's own queries will want:
	 * they score as it does. At most 1024 each; 0, 0: 8 and 24, unless flags say KVT_RECALL_ALONE. */
	uint32_t before, after;
};

struct kvtier_recalled {
	size_t size;
	uint32_t *counts;    /* the caller's, [KV heads of the layer]: rows found for each; NULL: not wanted */
	uint32_t *positions; /* the caller's, [KV heads][opts.rows]: their positions, ascending; NULL: not
				wanted */
	uint64_t searched;   /* rows that were candidates, over the layer's heads */
	uint64_t skipped;    /* rows that only NVMe holds: not searched */
	uint64_t missed;     /* rows whose page could not be read or checked: not searched */
	uint64_t daemon_ns;  /* of the call, spent in the daemon */
};
/*
 * Search one layer. n_queries tokens; of each query head the last token and the
 * three farthest from it and each other are used. Returns the largest of the
 * counts, 0 when nothing below is in DRAM. Rows of the sequence that are
 * appended to the layer but not to all layers yet are neither searched nor
 * counted. Any thread; one layer's call does not wait for the rest of the cache. What is
 * recalled is valid until the sequence is truncated below it, whatever plans do.
 * After KVT_E_TIMEOUT the daemon may still write to the window: it is not to be
 * read or reused before kvtier_seq_recall_end() returned 0. Errors: INVAL, MODEL
 * (opaque rows), LIMIT (queries of one token are more than a message holds), BUSY (a plan is being
 * applied, or is applied and not acknowledged), STALE, TIMEOUT, NOSPC (no memory
 * behind the window), DAEMON at once when it is gone: attend without.
 */
KVT_PUBLIC int kvtier_seq_recall(struct kvtier_seq *s, uint32_t layer, const void *queries, uint32_t n_queries,
				 const struct kvtier_recall_opts *o, struct kvtier_recalled *ret);
/*
 * Recalls will come: pages of this sequence get their summaries (0.95 % of K and V) in the background now, and
 * new ones as they are written, so that the first recall finds them made. Rows that only NVMe holds are copied
 * up to DRAM in the background, once, as far as its quota and low watermark allow, whatever a plan's dram_rows
 * said; the next plan's holds again. Call it when a turn begins whose rows may have gone down. Returns at once.
 */
KVT_PUBLIC int kvtier_seq_recall_prepare(struct kvtier_seq *s);
/* The turn is over: returns 0 when nothing of the daemon touches the sequence's windows any more. */
KVT_PUBLIC int kvtier_seq_recall_end(struct kvtier_seq *s);

/* ---- recording traces -------------------------------------------------------- */

/*
 * What a runtime's attention heads see, as .kvtr files to train and measure
 * policies with (kvtr(5)). Needs no daemon. Rows are copied into a bounded buffer
 * and written by a thread of the library; no call here waits for a disk. A
 * sequence for which there is no room, because the disk is slow or the buffer
 * small, is dropped whole and counted. A full disk, an I/O error and max_bytes
 * end the recording with one line to `log`, and never the runtime.
 *
 * Handles may be NULL: then nothing is recorded, so that a runtime need not ask
 * whether recording is on or this sequence is wanted.
 */
struct kvtier_trace;     /* a recorder: any thread */
struct kvtier_trace_seq; /* a sequence being recorded: one thread at a time */

struct kvtier_trace_opts {
	size_t size;
	const char *dir;       /* an existing folder; NULL: $KVTIER_TRACE_DIR */
	uint64_t max_bytes;    /* that all files in dir may have together; 0: 4 GiB */
	uint64_t buffer_bytes; /* memory for rows not yet written; 0: 512 MiB */
	uint32_t every_n;      /* record one of so many sequences, any of them; 0: 1 */
	const char
		*source; /* document or service the text comes from, at most 95 bytes; NULL: the file's name */
	const char *domain; /* "chat", "code", ..., at most 23 bytes; may be NULL */
	kvtier_log_fn log;  /* NULL: silent; called on the library's thread: must not call back into it */
	void *log_arg;
};
/*
 * Start recording. KVT_AGAIN and *ret NULL: dir is NULL and $KVTIER_TRACE_DIR is not set, so recording is off.
 * opts NULL: all defaults. Errors: INVAL, IO (dir), NOMEM.
 */
KVT_PUBLIC int kvtier_trace_open(const struct kvtier_trace_opts *opts, struct kvtier_trace **ret);
/* Stop. What was not written is dropped (see flush); a disk that hangs is not waited for. NULL is fine. */
KVT_PUBLIC void kvtier_trace_close(struct kvtier_trace *t);
/* Wait until what was handed over is written. Errors: TIMEOUT, or what ended the recording. */
KVT_PUBLIC int kvtier_trace_flush(struct kvtier_trace *t, uint32_t timeout_ms);

struct kvtier_trace_stats {
	size_t size;
	uint64_t seen;     /* sequences begun */
	uint64_t picked;   /* of those, by sampling */
	uint64_t recorded; /* files written */
	uint64_t dropped;  /* picked, and not written: no room, or the recording has ended */
	uint64_t bytes;    /* in files written */
	uint64_t buffered; /* bytes of the buffer in use now */
	int32_t ended;     /* 0, or the KVT_E_* that ended the recording */
	uint32_t reserved;
};
KVT_PUBLIC int kvtier_trace_stats(struct kvtier_trace *t, struct kvtier_trace_stats *ret);

struct kvtier_trace_model {
	size_t size;
	const char *name;              /* as in kvtier_model_desc */
	uint32_t layers, heads, group; /* KV heads per layer, query heads per KV head */
	uint32_t k_dim, v_dim;         /* elements of a row */
	uint32_t dtype;                /* enum kvtier_dtype, not OPAQUE, of K, V and Q */
	uint32_t rope;                 /* enum kvtier_rope */
	uint32_t post_rope;            /* keys come after RoPE; queries always do */
	float rope_theta;
};
/* A new sequence. KVT_AGAIN and *ret NULL: it is not to be recorded. source NULL: as opts say. Errors: INVAL,
 * NOMEM. */
KVT_PUBLIC int kvtier_trace_begin(struct kvtier_trace *t, const struct kvtier_trace_model *m,
				  const char *source, struct kvtier_trace_seq **ret);

/* Rows [pos, pos + n) of a layer. Row i of head h lies at base + h * head + i * row, in bytes, on the host. */
struct kvtier_trace_span {
	size_t size;
	uint32_t layer, pos, n;
	uint32_t reserved;
	const void *k, *v; /* KV heads; v may be NULL when v_dim is 0 */
	const void *q;     /* heads * group query heads, those of one KV head together */
	uint64_t k_head, k_row, v_head, v_row, q_head, q_row;
};
/*
 * Copy rows; they may be overwritten afterwards. pos must be the layer's length so far. KVT_AGAIN: the sequence
 * was dropped, nothing more will be recorded of it. Errors: INVAL, and the sequence is dropped.
 */
KVT_PUBLIC int kvtier_trace_rows(struct kvtier_trace_seq *s, const struct kvtier_trace_span *rows);
/* The tokens of rows [pos, pos + n), in order like rows. Recorded if every row gets one. Errors as above. */
KVT_PUBLIC int kvtier_trace_tokens(struct kvtier_trace_seq *s, uint32_t pos, const uint32_t *tokens,
				   uint32_t n);

enum { KVT_CUT_BEFORE = 1 /* the question came after the cut */ };
struct kvtier_trace_cut {
	uint32_t prompt;  /* rows [0, prompt) are to be ranked ... */
	uint32_t queries; /* ... by so many queries after them */
	uint32_t context; /* numbers the contexts; 0 is fine */
	uint32_t flags;   /* KVT_CUT_* */
};
/*
 * Complete: rows that all layers have, with n cuts, are handed to the library's thread. s is gone whatever is
 * returned. KVT_AGAIN: there is nothing to record, or it was dropped. Errors: INVAL (a cut).
 */
KVT_PUBLIC int kvtier_trace_end(struct kvtier_trace_seq *s, const struct kvtier_trace_cut *cuts, uint32_t n);
/* Forget it. NULL is fine. */
KVT_PUBLIC void kvtier_trace_discard(struct kvtier_trace_seq *s);

#ifdef __cplusplus
}
#endif
