/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What the parts of the core share. Everything here belongs to the event-loop
 * thread. A worker sees only what a job lends it: see struct plan.
 */
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>
#include "daemon/core.h"
#include "daemon/index.h"
#include "daemon/pages.h"
#include "daemon/window.h"
#include "daemon/workers.h"
#include "ipc/wire.h"
#include "policy/calibrate.h"
#include "policy/policy.h"
#include "shm/ctl.h"
#include "shm/feed.h"
#include "shm/handle.h"
#include "shm/plan.h"
#include "shm/ring.h"
#include "shm/seg.h"
#include "shm/util.h"
#include "tiers/device.h"

#define CORE_MAX_SEQS (1u << 20)
#define CORE_MAX_PLAN_BYTES (UINT64_C(4) << 30)
#define ROWS_ALL UINT32_MAX
#define PLAN_RETRIES 5u /* of a plan that could not be carried out; the last one promotes nothing */

struct core;
struct sock_peer;
struct client;
struct seq;
struct plan;
struct policy_use;
struct pool_bid;
struct share;

/* A configured tenant. Who it is on pages and disk: tenant_hash(), which adds the UID. */
struct tenant {
	uint32_t index;
	char name[32];
	struct config_tenant limit;
	uint32_t seqs;
	uint64_t region_bytes;           /* device memory charged */
	struct workers *writer;          /* one thread that writes imported files, from the first import on */
	uint64_t spent_ns;               /* of the loop, lately; see fair.c */
	struct log_bucket said, audited; /* lines about its clients; what they steered */
};

/* A model description, shared by all who registered the same one. */
struct model {
	LIST_ENTRY(model) link;
	uint64_t fingerprint;
	uint32_t refs, lanes;
	char name[64];
	uint32_t n_layers, dtype, head_dim, rope, rank, world, first_head, heads; /* heads: most of any layer */
	struct wire_layer *layer;                                                 /* [n_layers] */
	uint16_t *lane_layer, *lane_head;                                         /* [lanes] */
	uint32_t row_bytes_all; /* K and V of one position over all lanes */
};

/* Device memory of a client, made here or imported; sequences and plans in flight keep it beyond its client. */
struct region {
	uint32_t refs;
	uint64_t handle;
	struct client *client; /* NULL: gone */
	struct tenant *tenant;
	struct seg seg; /* made: exchange memory; imported: nothing, its file is in mem */
	uint64_t bytes;
	const struct device_ops *ops;
	struct device_mem *mem;
	bool registered; /* a window was in it: a GPU may be copying as long as its process lives */
	LIST_ENTRY(region) link, all; /* of its client; of the core */
};

/* The published memory of a client's plans. */
struct plan_mem {
	uint32_t refs;
	struct seg seg;
	struct extent {
		uint64_t off, bytes;
	} * free; /* sorted */
	uint32_t n_free, cap_free, taken;
};

struct client {
	struct core *core;
	LIST_ENTRY(client) link;
	uint32_t id;
	struct tenant *tenant; /* NULL: the admin socket */
	uid_t uid;
	pid_t pid;
	int fd, wake_fd, notify_fd, pid_fd; /* wake_fd is never read, notify_fd is our end of a stream */
	char name[64];
	bool hello, dead;
	bool heavy;        /* served after others, for */
	uint64_t spent_ns; /* this much of the loop, lately; see fair.c */
	bool doomed;       /* ended by the loop's next turn, */
	const char *doom;  /* for this reason; NULL: it left by itself */
	sd_event_source *io, *wake, *death, *again, *retry;
	uint32_t entries, max_seqs, n_seqs, n_regions;
	struct seg ctl;
	struct plan_mem *plans;
	struct ring sq, cq;
	struct seq_slot *slots; /* client-writable */
	uint64_t *slot_used;    /* bitmap */
	LIST_HEAD(, seq) seqs;
	LIST_HEAD(, region) regions;
	struct model **models; /* registered; slot i is handle i + 1 */
	uint32_t n_models;
	struct policy_use **scorers; /* that it asked for, references */
	uint32_t n_scorers;
	struct policy_use *building; /* it waits for this one's network: nothing is read meanwhile */
	struct seq *waits;           /* for this sequence to be free: nothing is read meanwhile */
	struct wire_hdr *held;       /* the request to handle again then, or NULL */
};

enum seq_state {
	SEQ_LIVE,     /* has a client */
	SEQ_SAVING,   /* leased, its client is gone: rows only in the region are being demoted */
	SEQ_DETACHED, /* leased, waiting for a resume or the end of its TTL */
	SEQ_CLOSING,  /* ends as soon as nothing of it is lent */
};

struct seq {
	struct core *core;
	uint64_t handle;
	uint8_t key[16], secret_hash[32];
	uint64_t born; /* later than every earlier sequence of this key; drawn as page numbers are */
	struct tenant *tenant;
	uint64_t tenant_hash;
	struct client *client;
	struct model *model; /* NULL: found on disk, not yet resumed */
	uint64_t fingerprint;
	struct region *region;
	struct wire_layout *layout; /* [n_layers] */
	struct origin *origin;
	enum seq_state state;
	bool orphan;   /* found on disk after a restart */
	bool believed; /* then: pages on nvme are, for the ledger does not say that it ended */
	bool taken;    /* ended under its client, who may go on writing its slot and reading its plan area */
	uint32_t slot;
	uint64_t plan_off, plan_bytes;
	uint32_t lifetime, ttl_s, max_rows, granularity, equal_lanes;
	uint64_t expires_ns;
	uint32_t flags; /* enum wire_open_flag: W_OPEN_WINDOW: its device rows are out of reach, see window.c */
	struct window_place window;
	struct policy_use *scorer;  /* whose network its runtime runs, a reference; or NULL */
	uint64_t gathered, drained; /* words of its slot as last seen */
	bool look_twice;            /* it refused rows that it read in place: the next plan checks them */
	uint32_t plane_from;        /* rows from here on have been given scores by this client */

	uint32_t epoch, rows; /* as the client last said */
	uint32_t scored;      /* rows that have a key */
	uint32_t cut;         /* rows that the index may keep once it is ours again; ROWS_ALL: no cut */
	struct index ix;
	uint32_t headroom; /* new rows that may come before a plan is due; ROWS_ALL: never */
	uint32_t room;     /* new rows that its layouts can hold */

	uint32_t budget[KVT_TIERS];
	uint32_t *device_table; /* [lanes], NULL: uniform */
	uint32_t *adaptive;     /* [lanes] device budgets of the last plan, where it chose them; else NULL */
	struct share *share;    /* its seat among those that share their budgets, or NULL; see share.c */
	bool budget_default, manual;
	bool write_through;           /* rows that stay on the device get copies below */
	uint32_t slack, device_cap;   /* device_cap: kvtierctl demote */
	uint64_t *wanted, *pinned;    /* [BITS_WORDS(max_rows)] or NULL */
	char policy[32];              /* asked for; empty: the default */
	const struct policy_ops *ops; /* in use since the last plan */
	struct policy_use *keys_use;  /* gave the keys of the index, a reference; NULL: nobody yet */

	struct plan *plan;
	uint64_t plan_id;   /* of the newest plan published to this client */
	uint64_t requested; /* a plan with this id or a later one is wanted; 0 none */
	uint64_t acked;
	uint64_t nonce;
	uint32_t retries, saves;
	bool avoid[KVT_TIERS];  /* writing there failed repeatedly */
	bool again;             /* a plan is due whatever the rows say */
	uint64_t not_before_ns; /* there was no memory: the loop's poll tries again from then on; 0: nothing
				   waits */

	struct client *closer; /* waits for the reply to its close */
	struct wire_hdr close_req;
	struct client *waiter; /* its held request waits for us */

	uint64_t plans, plan_ns_last, refaults, misses, recent_page[8];
	uint64_t tier_rows[KVT_TIERS], held[KVT_TIERS],
		dropped; /* as last counted, best copy / any copy; device without rows past the index */
	uint64_t index_seen, active_ns;
	uint32_t refs; /* background work that will come back to it */
	bool dead;     /* freed but for refs */
	struct settle *settle;
	bool compacting;
	uint32_t compact_lane;
	TAILQ_ENTRY(seq) compacts;
	uint32_t repacks;             /* on their way */
	struct page *note[KVT_TIERS]; /* see restart.c */
	uint32_t noting;              /* on their way */
	bool note_busy, note_again;   /* one to nvme is, and another is due */
	uint32_t place;               /* in the ledger, or LEDGER_NONE */
	uint32_t reach;               /* no row at or past it was given to a tier since the last cut there */
	uint64_t floor;               /* pages with lower numbers are not its own */
	bool mark_cut;                /* the cut that is due concerns pages in a tier */
	bool recount;                 /* background moves changed the counts */
	STAILQ_ENTRY(seq) recounts;
	uint32_t flushes;
	bool recalls;                /* its pages get summaries */
	uint32_t sums, sum_lane;     /* being made in the background; lane that is next */
	bool pulling;                /* rows that only nvme holds come up */
	uint32_t pull_lane, pull_at; /* lane and position that are next */
	TAILQ_ENTRY(seq) pulls;
	bool filling;       /* its directory does not list all yet */
	uint32_t fill_lane; /* lane that is next */
	TAILQ_ENTRY(seq) fills;
	struct recall *recall;        /* workers search its pages, or NULL */
	STAILQ_HEAD(, repack) parked; /* finished while a worker decided */
	LIST_ENTRY(seq) of_client;
	TAILQ_ENTRY(seq) lru, gone; /* gone: detached sequences */
	bool in_gone;
	struct seq *next_key, *next_secret; /* in the tables of names */
};

enum plan_phase { PHASE_SCORE, PHASE_DECIDE, PHASE_MOVE, PHASE_READY };

/*
 * One decision on its way. While refs > 0 workers read the sequence's device
 * bitmaps, the tables and the region, and in PHASE_DECIDE its whole index;
 * whoever wants to change those waits for seq_step().
 */
struct plan {
	struct seq *seq;
	uint64_t id;
	uint32_t epoch, watermark, from, words; /* rows [from, watermark) have no key yet */
	uint32_t plane_from;                    /* the sequence's */
	enum plan_phase phase;
	bool over; /* applied, cancelled or not to be published: forget it when nothing is lent */
	bool requested, saving, private_tables, direct;
	bool write_through;
	bool lossless;     /* its budgets promise to drop nothing */
	bool stuck;        /* rows stay on the device because nothing below takes them */
	bool promote_none; /* too many plans before it missed */
	uint32_t protect_first, protect_last, hysteresis;
	bool rescore;   /* the keys are another policy's: device rows are scored anew, rows below keep theirs */
	uint16_t *keys; /* [lanes][watermark] where the index keeps coefficients, until decided; else NULL */
	uint16_t *worth;      /* [lanes][watermark] where budgets are adaptive, until decided; else NULL */
	struct pool_bid *bid; /* where they are shared with other sequences, else NULL */
	struct plan_tables t;
	struct plan_mem *mem;
	struct region *region;
	struct policy_use *use;
	void *scratch; /* the bitmaps and arrays below; kept in the core's pool */
	size_t scratch_bytes;
	uint64_t *to_dram, *to_nvme, *drop, *pinned, *wanted;
	uint32_t *budget[KVT_TIERS], *kept, *out, *in, *dropped; /* [lanes] */
	uint64_t rows_out, rows_in, rows_drop, rows_kept;
	uint64_t started_ns;
	uint32_t refs;
	int error; /* of a job: -errno */

	/* mover: refs is 1 + pages in flight while it works */
	struct cut_at cut; /* of the page to be made next */
	uint32_t in_lane;
	uint64_t *need; /* scratch: rows of lane in_lane without a source so far */
	bool in_begun;  /* lane in_lane's are in it */
	bool out_done, in_done, moving, missed;
	struct window_plan *win; /* NULL: the device rows are in the region */
	TAILQ_ENTRY(plan) pump;
};

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
		uint32_t size, count;
		uint64_t seed[2];
	} names;
	uint32_t n_seqs, n_orphans, n_clients, n_models, next_client;
	TAILQ_HEAD(, seq) lru;  /* longest idle first */
	TAILQ_HEAD(, seq) gone; /* detached */
	uint32_t poll_cursor;

	/* mover */
	struct mover *mover;
	struct in_job *in_batch;    /* pages read, not yet with a worker */
	unsigned in_jobs, out_jobs; /* with the workers */
	uint32_t pios;              /* pages between a tier and us */
	STAILQ_HEAD(, seq) recounts;
	STAILQ_HEAD(, repack) repack_wait; /* for a buffer to write from */
	uint64_t background_bytes;         /* of lower-tier moves in flight */
	TAILQ_HEAD(, settle) settles;
	TAILQ_HEAD(, seq) compacts;
	TAILQ_HEAD(, seq) pulls;
	TAILQ_HEAD(, seq) fills;
	LIST_HEAD(, direct_owner) owners;
	bool below_low[KVT_TIERS], below_min[KVT_TIERS];

	struct verify *verify;
	struct core_stat stat;
	struct log_bucket said; /* lines about nobody's clients in particular */
	uint64_t started_ns, region_rows_extra, seq_index_bytes, loop_seen_ns;
	bool frozen, draining, no_accept, freeing, short_of_memory;
	void (*drain_done)(void *arg);
	void *drain_arg;
	uint64_t drain_deadline_ns;
};

static inline uint32_t lane_bytes(const struct model *m, uint32_t lane)
{
	const struct wire_layer *y = &m->layer[m->lane_layer[lane]];

	return y->k_bytes + y->v_bytes;
}
/* Rows of a full page of the lane, and of the lane of the model whose rows are widest. */
static inline uint32_t lane_page_rows(const struct model *m, uint32_t lane)
{
	return MIN(PAGE_ROWS, TIER_MAX_PAGE / lane_bytes(m, lane));
}
static inline uint32_t page_rows_least(const struct model *m)
{
	uint32_t least = PAGE_ROWS;

	for (uint32_t l = 0; l < m->lanes; l++)
		least = MIN(least, lane_page_rows(m, l));
	return least;
}
/* Where a lane's rows lie in its region. */
void seq_lane(const struct seq *s, uint32_t lane, struct device_lane *ret);
/* Its device rows are in memory that only its client reaches; the region holds rings and scores. */
static inline bool seq_windowed(const struct seq *s)
{
	return s->flags & W_OPEN_WINDOW;
}
static inline bool plan_lent(const struct seq *s)
{
	return s->plan && s->plan->refs;
}

/* Whose lines about this tenant's clients count against; NULL: the admin socket's. */
static inline struct log_bucket *said_of(struct core *c, struct tenant *t)
{
	return t ? &t->said : &c->said;
}

/* ---- session.c ---------------------------------------------------------------- */
/* End this client now with one log line; NULL: it left by itself. */
void client_end(struct client *cl, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The same from the loop's next turn, for those whose callers go on with it. why: static text or NULL. */
void client_doom(struct client *cl, const char *why);
/* Push a hint and wake the client when it sleeps. */
void client_notify(struct client *cl, uint32_t type, uint64_t handle, uint64_t a, uint64_t b);
int client_reply(struct client *cl, struct wire_reply *r, const int *fds, unsigned n);
void client_fail(struct client *cl, const struct wire_hdr *req, int status, const char *text);
/* Handle its held request again and go on reading. */
void client_retry(struct client *cl);
void client_free(struct client *cl);
int client_new(struct core *c, int fd, struct tenant *t, const struct sock_peer *peer);
int session_init(struct core *c);
void session_listen_again(struct core *c); /* where connections could not be taken */
void session_stop_listening(struct core *c);
/* Ends every client. */
void session_fini(struct core *c);
/* Hello is done: listen to its ring. */
int session_attach(struct client *cl);

/* ---- fair.c ---------------------------------------------------------------------- */
#define FAIR_ACCEPT (SD_EVENT_PRIORITY_NORMAL + 5)
#define FAIR_HEAVY (SD_EVENT_PRIORITY_NORMAL + 10)
/* The loop was at work for this client since then. */
void fair_spent(struct client *cl, uint64_t since_ns);
/* 10 ms later. */
void fair_tick(struct core *c);

/* ---- request.c ------------------------------------------------------------------ */
/*
 * One checked request. fd: the file that came with it, the caller's, or -1. KVT_AGAIN: it waits (seq->waiter is
 * set); the caller holds it.
 */
int request_handle(struct client *cl, const struct wire_hdr *m, int fd);
int request_open(struct client *cl, const struct wire_seq_open *m);
/* The client's live sequence, with a reference, its newest words taken into account; NULL: refused. */
struct seq *request_seq(struct client *cl, const struct wire_hdr *m, uint64_t handle);
/* Take over what the budget sets. 0 or KVT_E_* with a line in err. */
int seq_set_budget(struct seq *s, const struct wire_budget *b, const uint32_t *table, char *err,
		   size_t errsize);

/* ---- models.c, plan_mem.c ---------------------------------------------------------- */
struct model *model_get(struct core *c, const struct wire_model *w); /* a reference; NULL: no memory */
struct model *model_ref(struct model *m);
void model_unref(struct core *c, struct model *m);
/* fd: the client's file to import, which stays the caller's; -1: make one. */
int region_new(struct region **ret, struct client *cl, uint64_t bytes, int fd);
struct region *region_ref(struct region *g);
void region_unref(struct core *c, struct region *g);
/* Its client is gone: give the region up now, or when the client's process has ended. Takes the reference. */
void region_leave(struct client *cl, struct region *g);
/* Give up all that wait for a process. */
void region_linger_end(struct core *c);
struct plan_mem *plan_mem_new(uint64_t bytes, int *ret_err);
struct plan_mem *plan_mem_ref(struct plan_mem *m);
void plan_mem_unref(struct plan_mem *m);
/* Offset, or UINT64_MAX when it does not fit. */
uint64_t plan_mem_take(struct plan_mem *m, uint64_t bytes);
void plan_mem_give(struct plan_mem *m, uint64_t off, uint64_t bytes);

/* ---- names.c --------------------------------------------------------------------- */
/* Enter s under its owner, key and secret. 0, -ENOMEM, -EIO. */
int names_add(struct names *n, struct seq *s);
void names_del(struct names *n, struct seq *s);
/* owner: tenant_hash(). */
struct seq *names_find(const struct names *n, uint64_t owner, const uint8_t key[16]);
/* The one with this secret (its SHA-256); as long for a wrong secret as for a key that nobody has. */
struct seq *names_resume(const struct names *n, uint64_t owner, const uint8_t key[16],
			 const uint8_t secret[32]);
void names_free(struct names *n);

/* ---- seq.c ----------------------------------------------------------------------- */
uint64_t tenant_hash(const struct tenant *t, uid_t uid);
/* secret: its SHA-256, as of a moment when nobody has this name. */
struct seq *seq_create(struct core *c, struct tenant *t, uint64_t hash, const uint8_t key[16],
		       const uint8_t secret[32], uint32_t lanes);
/* Copy the client's words, check them, act. false: the client was ended. */
bool seq_poll(struct seq *s);
/* Whatever can be done now that something changed. May free s. */
void seq_step(struct seq *s);
/* The same at the client's end: no consequences but what the words say. */
void seq_last_words(struct seq *s);
/* The client is gone or closes: ephemeral (or drop) ends, leased is saved. May free s. */
void seq_leave(struct seq *s, bool drop);
void seq_end(struct seq *s); /* free as soon as nothing is lent */
int seq_truncate(struct seq *s, uint32_t rows);
void seq_unref(struct seq *s);
void seq_recount(struct seq *s);
void seq_touch(struct seq *s);
void seq_expire(struct core *c, uint64_t now);
/* One step of saving a sequence whose client is gone. */
void seq_save(struct seq *s);
void seq_drop_region(struct seq *s);
/* Reply to those who waited for this sequence. */
void seq_answer(struct seq *s);
void seq_account(struct seq *s);
/* Free what binds s to a client and its memory. */
void seq_unbind(struct seq *s);

/* ---- manager.c --------------------------------------------------------------------- */
/* Start a plan when one is due. */
void manager_consider(struct seq *s);
/* There was no memory for what is due: not before a tenth of a second has passed. */
void manager_put_off(struct seq *s);
bool manager_waits(struct seq *s);
/* Begin a plan now: 0, or -errno. save: nobody applies it, nothing is kept in the device tier. */
int manager_plan(struct seq *s, bool save);
/* Every scoring job of p ended: decide. */
void manager_scored(struct plan *p);
void manager_headroom(struct seq *s);
/* ---- plan.c ------------------------------------------------------------------------- */
/* Scratch and tables for the rows of the plan; on failure plan_free() the plan. */
int plan_alloc(struct plan *p, bool private_tables);
/* What its policy needs to keep in the index and in the plan; p->use is known. -ENOMEM. */
int plan_alloc_keys(struct plan *p);
/* Keys to rank the lane by, of rows [0, watermark). */
static inline const uint16_t *plan_keys(const struct plan *p, uint32_t lane)
{
	return p->keys ? p->keys + (size_t)lane * p->watermark : p->seq->ix.key + (size_t)lane * p->seq->ix.cap;
}
void plan_free(struct plan *p);
/* Fill the visible header and the lanes' counts. */
void plan_header(const struct plan *p);
/* Fill the tables. Any thread, with the index lent. */
int plan_decide(struct plan *p);
void plan_cancel(struct plan *p);
void plan_unref(struct plan *p);
/* Nothing is lent any more: forget it. */
void plan_forget(struct plan *p);
/* The client (or nobody, when saving) applied the plan. nack: bitmap of lanes or NULL. */
void manager_applied(struct seq *s, struct plan *p, const uint64_t *nack);
/* A cancelled plan is made anew: what it was asked for is not forgotten. */
void manager_again(struct plan *p, bool at_once);
/* What a client does cancels the plan, if there is one. If it was asked for, the next one answers. */
void manager_redo(struct seq *s);
/* All moves of p ended. */
void manager_moved(struct plan *p);

/* ---- budget.c ---------------------------------------------------------------------- */
/* Rows per lane and tier that this plan may use: what was asked for, clipped by quota and space. */
void budget_for(struct plan *p);
/* After the decision: no lane may promote more rows than it has stage slots. Worker. */
int budget_stage(struct plan *p);

struct recall_sum;
struct recall_shape { /* keys of dim elements; 0: not to be summarised */
	uint32_t dim, dtype;
};

/* ---- adaptive.c -------------------------------------------------------------------- */
/* Make p->worth where this plan's device budgets are to be adaptive; budget_for() is done. -ENOMEM. */
int adaptive_begin(struct plan *p);
/* What the lane's rows are worth; its keys are there. Worker. */
void adaptive_weigh(struct plan *p, uint32_t lane);
/* Device budgets from all lanes' worth. Worker. 0 or -ENOMEM. */
int adaptive_divide(struct plan *p);
/* The plan is decided: its sequence remembers. */
void adaptive_done(struct plan *p);

/* ---- share.c ----------------------------------------------------------------------- */
/* Bid for a part of what the sequences of this owner share, or leave them; adaptive_begin()'s. -ENOMEM. */
int share_begin(struct plan *p);
/* What becomes of the bid: the plan was decided; it was applied, by all lanes; nothing comes of it. */
void share_decided(struct plan *p);
void share_settled(struct plan *p, bool all);
void share_dropped(struct plan *p);
/* The rows of s go back to where they came from. */
void share_leave(struct seq *s);
/* Plan again who can give rows to others or get some: a slice of work; true: there is more. */
bool share_pump(struct core *c);
uint64_t share_bytes(const struct seq *s);
/* Device rows that it holds and that it brought, over all lanes; false: it shares none. */
bool share_rows(const struct seq *s, uint64_t *ret_held, uint64_t *ret_brought);

/* ---- mover.c, mover_out.c, mover_in.c -------------------------------------------------- */
struct pio { /* one page on its way between a tier and us */
	struct tier_io io;
	struct core *core;
	struct page *page; /* pinned */
	bool reading;
	uint64_t reserved;           /* quota held until the page has its copy */
	int tier, error;             /* error: the worker's verdict, -errno */
	bool refused;                /* the verdict is on the region: the page itself is well */
	void (*end)(struct pio *io); /* on the loop when the tier is done, io.res valid; owns io */
	void *owner;
	uint32_t nth;     /* with a window: place in the plan's list, or number of the record */
	uint32_t segment; /* record: read in published memory, 1 + its number; 0: packed */
	uint64_t segment_off, ring_at, wrap_at; /* of the record; of what says that it is at the ring's start */
	struct recall_shape keys;
	struct recall_sum *sum; /* write: made beside the page */
	struct seq_record rec;
	uint64_t words[PAGE_SPAN]; /* write: positions for the tier to keep; read: the rows wanted */
	STAILQ_ENTRY(pio) link;
};
STAILQ_HEAD(pio_list, pio);
/* io->page gets pinned. NULL: out of memory. */
struct pio *pio_new(struct core *c, struct page *p, int tier, void (*end)(struct pio *), void *owner);
/* The buffer goes back, when there is one; the page stays pinned. */
void pio_release(struct pio *io);
/* pio_release() and unpin the page. */
void pio_free(struct pio *io);
/* Read the page: end() follows from the pump, never from here. */
void pio_read(struct pio *io);
/* Place and buffer for a write: 0, -EAGAIN (no buffer now), -ENOSPC, -EIO. */
int pio_prepare(struct pio *io, struct seq *s);
/* Start a prepared write whose buffer is filled and whose page has its crc. */
void pio_write(struct pio *io);
/* The same, and the tier has it when this returns. */
void pio_write_now(struct pio *io);
/* Check a page against its identity. Any thread. */
bool page_verify(const struct page *p, const void *buf);
/* A page could not be read or checked: count it, take its rows out of that tier. */
void mover_lost(struct seq *s, struct page *p, int tier, int err);
void mover_start(struct plan *p);
/* Go on from the loop soon: buffers, places or work appeared. */
void mover_kick(struct core *c);
/* Make pages (reads) of the plan, at most `pages`; returns how many. */
unsigned mover_out(struct plan *p, unsigned pages);
unsigned mover_in(struct plan *p, unsigned pages);
/* Hand the pages read so far to a worker. */
void mover_in_flush(struct core *c);
/* One slice of work. */
void mover_run(struct core *c);
/* Pages are on their way. */
bool mover_busy(const struct core *c);
int mover_open(struct core *c);
void mover_close(struct core *c);

/* ---- repack.c, settle.c: moves below the device tier ------------------------------------- */
#define REPACK_SOURCES 16u
struct repack;
/*
 * Write rows of one lane that lie in `src` pages of tier `from` as one page of
 * tier `to`: the bitmap take[span] from position first names them. whole: the only source, all
 * of whose rows are taken; it keeps its identity. 0, -ENOMEM.
 */
int repack_start(struct seq *s, struct page *const *src, unsigned n, int from, int to, bool whole,
		 uint32_t first, const uint64_t *take, uint32_t span);
/* A worker decides over the index no more: what ended meanwhile may change it. */
void repack_unpark(struct seq *s);
void repack_pump(struct core *c);
/* After a plan: carry out what it says about the tiers below. */
void settle_start(struct seq *s, const uint64_t *to_nvme, uint32_t words);
/* Move all that is in dram only to nvme. */
void settle_flush(struct seq *s);
void settle_stop(struct seq *s);
/* A page of it went from dram to nvme. */
void settle_moved(struct seq *s);
void settle_pump(struct core *c);
/* Merge small and mostly dead pages of the sequence, behind everything else. */
void compact_start(struct seq *s);
void compact_stop(struct seq *s);
void compact_pump(struct core *c);
/* Tier watermarks: wake the demoter, set direct demotion. */
void settle_watermarks(struct core *c);

/* ---- recall.c, recall_sum.c, recall_pull.c ----------------------------------------------------------------
 */
/* W_RECALL. 0, or KVT_AGAIN: it waits for the one before. */
int request_recall(struct client *cl, const struct wire_recall *m);
/* The sequence has no client any more: nobody is to be answered. */
void recall_orphan(struct seq *s);
/* What pages of this lane are summarised as: nothing while the sequence does not recall, or when rows have no
 * type. */
struct recall_shape recall_shape(const struct seq *s, uint32_t lane);
/* The summary of a page's K plane at k; NULL: none is wanted, no memory. Any thread. */
struct recall_sum *recall_sum_make(struct recall_shape keys, const struct page *p, const void *k);
/*
 * Read, check and summarise one page that has none; end(arg) follows from the loop, never from here. A page
 * that is lost is counted as a miss. -ENOMEM.
 */
int recall_sum_start(struct seq *s, struct page *p, void (*end)(void *arg), void *arg);
/* From now on all its pages get summaries; those that exist get them in the background. */
void recall_prepare(struct seq *s);
/* Bring what only nvme holds up to dram, in the background, once. */
void recall_pull(struct seq *s);
void recall_pull_stop(struct seq *s);
void recall_pump(struct core *c);

/* ---- direct.c, direct_seq.c -------------------------------------------------------------------- */
/* Give a sequence that asked for one its directory; pages that it has are entered soon. 0, -ENOMEM, -errno. */
int direct_open(struct seq *s);
void direct_close(struct seq *s);
void direct_pump(struct core *c);
int request_direct(struct client *cl, const struct wire_handle *m);
int request_segment(struct client *cl, const struct wire_segment *m);
/* This client is gone, off the list: with an owner's last one its empty segments go. */
void direct_left(const struct client *gone);
/* What an owner's published memory takes; owner 0: all that is private. */
void direct_stat(struct core *c, uint64_t owner, struct tier_owner *ret);
/* The same for a plan: of `free` bytes those that pages of s may take; *quota: what its tenant may add. */
uint64_t direct_room(const struct seq *s, uint64_t *quota, uint64_t free_bytes);
/* Bytes that the segments of the tenant's owners hold back, without those of one of them (0: of none). */
uint64_t direct_held(struct core *c, uint32_t tenant, uint64_t except);
void direct_owners_free(struct core *c);
/* Whose published memory the pages of s go to; 0: they are private. */
static inline uint64_t direct_owner_of(const struct seq *s)
{
	return s->ix.direct ? s->tenant_hash : 0;
}

/* ---- policies.c ------------------------------------------------------------------------ */
struct policy_use {
	LIST_ENTRY(policy_use) link;
	struct model *model;
	const struct policy_ops *ops; /* what runs */
	struct policy *policy;        /* NULL: client */
	char asked[32], weights[CONFIG_PATH], reason[440];
	uint32_t coefs;                        /* that the index keeps of a row; 0: its score */
	const struct calibration *calibration; /* what scores are worth: the policy's or `own`; NULL: unknown */
	struct calibration own;
	struct scorer { /* its network as clients run it; id 0: not made, or refused for a reason */
		uint64_t id;
		uint32_t coefs;
		bool making;
		struct seg seg;
		char refusal[WIRE_TEXT];
	} scorer;
	uint32_t refs;
	bool stale;     /* newer weights exist */
	bool no_scores; /* the layouts have no score plane */
	bool no_rows;   /* the daemon cannot read K and V */
};
/* What runs for this sequence; a reference. NULL: out of memory. */
struct policy_use *policies_get(struct seq *s);
/* What runs for a model where everything can be read; asked "": the default. A reference, or NULL. */
struct policy_use *policies_of(struct core *c, struct model *m, const char *asked);
struct policy_use *policies_ref(struct policy_use *u);
void policies_put(struct core *c, struct policy_use *u); /* NULL is fine */
void policies_drop(struct core *c, const char *model);   /* make them stale; NULL: all */
void policies_forget_model(struct core *c, const struct model *m);
void policies_free(struct core *c);

/* ---- scorer.c ---------------------------------------------------------------------------- */
/* W_SCORER. 0, or KVT_AGAIN: the network is being made. */
int request_scorer(struct client *cl, const struct wire_scorer *m);
/* What this client was given under this id, or NULL. */
struct policy_use *scorer_find(struct client *cl, uint64_t id);
/* The client ends. */
void scorer_forget(struct client *cl);

/* ---- score.c ------------------------------------------------------------------------------ */
/*
 * Score [from, watermark) of lanes [lo, hi) (and device rows below when CONTEXT) into the index, and the plan's
 * keys from coefficients. Any thread.
 */
/* A lane as policies and their calibrations count them. */
static inline uint32_t policy_lane(const struct model *m, uint32_t lane)
{
	return (uint32_t)m->lane_layer[lane] * m->heads + m->lane_head[lane];
}
/* Its scores lie in planes of the region: nothing is computed. */
static inline bool score_given(const struct plan *p)
{
	return p->use->ops->id == POLICY_CLIENT || (p->seq->scorer && p->use == p->seq->scorer);
}
int score_lanes(struct plan *p, uint32_t lo, uint32_t hi, struct worker_ctx *w);
/*
 * Keys of rows [0, rows) of a lane whose index holds coefficients of `use`, as the sequence has `total` rows.
 * keys may be the index's own. Any thread.
 */
void score_combine(const struct seq *s, const struct policy_use *use, uint32_t lane, uint32_t rows,
		   uint32_t total, uint16_t *keys);

/* ---- restart.c ---------------------------------------------------------------------------- */
int restart_scan(struct core *c);
/* Write the sequence's epochs beside its pages so that a restart can cut them. */
void restart_note(struct seq *s);
/* Its rows from `cut` on are over: a life that begins this moment must know. DRAM only, at once. */
void restart_cut(struct seq *s);
void restart_forget(struct seq *s);

/* ---- ledger_seq.c ------------------------------------------------------------------------------ */

struct ledger_entry;
/* Enter a leased sequence, before its client hears of it. 0 or -errno. */
int ledger_begin(struct seq *s);
/* Its rows from `rows` on end with the next epoch: before anything is changed and the client told. 0 or -errno.
 */
int ledger_cut(struct seq *s, uint32_t rows);
/* It has ended. */
void ledger_over(struct seq *s);
/* At a restart: may pages of that name be believed at all? Sets place and floor. */
bool ledger_knows(struct seq *s);
/* What the ledger says of it, or NULL. */
const struct ledger_entry *ledger_of(struct seq *s);
/* It was found: s->rows rows from earlier epochs, and nothing that turns up later. 0 or -errno. */
int ledger_return(struct seq *s);

/* ---- verify.c, stat.c ------------------------------------------------------------------------ */
void verify_pump(struct core *c);
void verify_free(struct core *c);
void core_feed(struct core *c, uint8_t type, const struct seq *s, uint64_t plan, uint64_t bytes,
	       const uint32_t rows[4]);
void feed_move(const struct seq *s, int from, int to, uint32_t lane, uint32_t rows, uint64_t bytes);
/* Drain: called when a sequence is saved or work ends. */
void drain_check(struct core *c);
