/* SPDX-License-Identifier: MIT */
#pragma once
/* A sequence: one conversation's rows, wherever they are. Part of internal.h; the event loop's. */
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>
#include "daemon/client.h"
#include "daemon/index.h"
#include "daemon/pages.h"
#include "daemon/window.h"
#include "ipc/wire.h"

struct plan;
struct journal;
struct share;
struct settle;
struct recall;
struct repack;
struct origin;
struct names;
struct ledger_entry;
struct owner;

#define ROWS_ALL UINT32_MAX

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
	uint8_t node; /* its client's, or its last one's */
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
	struct journal *journal; /* of its last plans, or NULL */
	uint64_t plan_id;        /* of the newest plan published to this client */
	uint64_t requested;      /* a plan with this id or a later one is wanted; 0 none */
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

	uint64_t plans, plan_ns_last, refaults, misses;
	uint64_t recent_page[8]; /* of the last plans, by nonce: the next page's number, rows */
	uint32_t recent_rows[8];
	uint64_t tier_rows[KVT_TIERS], held[KVT_TIERS], dropped, page_bytes[KVT_TIERS], page_heap, fresh_seen,
		directory_seen; /* as last counted, best copy / any copy; device without rows past the index */
	uint32_t counted;       /* rows of the index when tier_rows and held were counted */
	uint64_t device_bytes;  /* of these, rows on the device */
	uint64_t index_seen, active_ns;
	struct owner *owner;
	struct owner_part { /* what its owner has of it, as last told: owner.c */
		uint64_t orphans, dropped, rows[KVT_TIERS], bytes[KVT_TIERS];
	} owned;
	uint64_t owned_plans, owned_misses;
	uint32_t refs; /* background work that will come back to it */
	bool dead;     /* freed but for refs */
	struct settle *settle;
	bool compacting;
	uint32_t compact_lane;
	TAILQ_ENTRY(seq) compacts;
	uint32_t repacks;             /* on their way */
	struct page *note[KVT_TIERS]; /* see note.c */
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
	uint32_t name;                      /* its place in the list of names */
};
/* Where a lane's rows lie in its region. */
void seq_lane(const struct seq *s, uint32_t lane, struct device_lane *ret);
/* Its device rows are in memory that only its client reaches; the region holds rings and scores. */
static inline bool seq_windowed(const struct seq *s)
{
	return s->flags & W_OPEN_WINDOW;
}
/* ---- names.c --------------------------------------------------------------------- */
/* Enter s under its owner, key and secret. 0, -ENOMEM, -EIO. */
int names_add(struct names *n, struct seq *s);
void names_del(struct names *n, struct seq *s);
/* owner: tenant_hash(). */
struct seq *names_find(const struct names *n, uint64_t owner, const uint8_t key[16]);
/* The one with this secret (its SHA-256); as long for a wrong secret as for a key that nobody has. */
struct seq *names_resume(const struct names *n, uint64_t owner, const uint8_t key[16],
			 const uint8_t secret[32]);
/* One after the other whose key begins with these hex digits, of all owners; *cursor starts at 0. */
struct seq *names_next(const struct names *n, const uint8_t prefix[16], unsigned digits, uint32_t *cursor);
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
/* Its rows past the index, or the index, changed. */
void seq_fresh(struct seq *s);
/* Bytes of its rows on the device, those past the index included; 0 without a model. */
static inline uint64_t seq_device_bytes(const struct seq *s)
{
	return s->model ? s->device_bytes +
				  (uint64_t)(s->rows - MIN(s->rows, s->ix.rows)) * s->model->row_bytes_all
			: 0;
}
/* Free what binds s to a client and its memory. */
void seq_unbind(struct seq *s);

/* ---- owner.c ------------------------------------------------------------------------------ */
/* s is one of its owner's from now on. -ENOMEM. */
int owner_enter(struct seq *s);
void owner_leave(struct seq *s); /* of none is fine */
/* What was counted of s changed: O(1). */
void owner_count(struct seq *s);
void owners_free(struct core *c);

/* ---- restart.c ---------------------------------------------------------------------------- */
int restart_scan(struct core *c);

/* ---- note.c ------------------------------------------------------------------------------- */
/* Write the sequence's epochs beside its pages so that a restart can cut them. */
void restart_note(struct seq *s);
/* Its rows from `cut` on are over: a life that begins this moment must know. DRAM only, at once. */
void restart_cut(struct seq *s);
void restart_forget(struct seq *s);

/* ---- ledger_seq.c ------------------------------------------------------------------------------ */

/* Enter a leased sequence, before its client hears of it. 0 or -errno. */
int ledger_begin(struct seq *s);
/* Its rows from `rows` on end with the next epoch: before anything is changed and the client told. 0 or -errno.
 */
int ledger_cut(struct seq *s, uint32_t rows);
/* It has ended. */
void ledger_over(struct seq *s);
/* At a restart: may pages of that name be believed at all? Sets place and floor. */
bool ledger_knows(struct seq *s);
/* Did a sequence of that name begin after the one born then? Then that one has ended. */
bool ledger_knows_later(struct core *c, uint64_t tenant, const uint8_t key[16], uint64_t born);
/* The next living sequence of which no tier had a page; *cursor starts at 0. false: no more. */
bool ledger_left(struct core *c, uint32_t *cursor, struct seq_record *ret);
/* What the ledger says of it, or NULL. */
const struct ledger_entry *ledger_of(struct seq *s);
/* It was found: s->rows rows from earlier epochs, and nothing that turns up later. 0 or -errno. */
int ledger_return(struct seq *s);
