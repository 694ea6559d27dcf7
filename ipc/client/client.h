/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * libkvtier inside. Private to ipc/client.
 *
 * Two locks, taken in this order:
 *   call_lock  one request and its reply on the socket; held across waiting,
 *              never longer than a call's deadline
 *   lock       everything else in struct kvtier and its sequences; short, never
 *              held across a wait or a copy of rows
 *
 * kvtier_plan_peek() takes neither: what it reads is atomic or constant for the
 * life of the sequence (a link outlives the sequences opened on it).
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>
#include "ipc/codec.h"
#include "ipc/kvtier.h"
#include "ipc/wire.h"
#include "shm/bits.h"
#include "shm/ctl.h"
#include "shm/plan.h"
#include "shm/ring.h"
#include "shm/seg.h"
#include "shm/util.h"

/* One connection: made by a HELLO, dead for ever after its end of file. */
struct link {
	uint64_t id;                      /* 1, 2, ... within one struct kvtier */
	int sock, to_daemon, from_daemon; /* we write the first (eventfd) and read the second (stream) */
	struct seg ctl, plans;
	struct ring sq, cq;                   /* under lock */
	uint32_t max_seqs, entries, features; /* what both sides know: enum wire_feature */
	uint32_t refs; /* under lock: the connection's own, one per sequence, one per running call */
	_Atomic bool dead;
	_Atomic uint32_t revokes; /* times that the daemon wanted published DRAM back */
};

/* A request whose caller gave up: what its late reply brings is given back. */
struct late {
	uint32_t cookie;
	bool drop; /* a sequence that nobody has seen yet: end it, leased or not */
};

struct counters {
	_Atomic uint64_t connects, reconnects, calls, timeouts, plans_seen, plans_applied, plans_nacked,
		plans_cancelled, rows_appended, rows_promoted, rows_evicted, bytes_released, wakeups;
};

struct kvtier {
	uint32_t fork_gen;
	uint32_t timeout_ms, max_seqs;
	uint64_t plan_bytes;
	kvtier_log_fn log;
	void *log_arg;
	char name[64], path[108];
	struct counters count;
	_Atomic uint64_t next_try_ns;
	_Atomic bool up; /* link != NULL, for readers without the lock */

	pthread_mutex_t call_lock;
	uint32_t cookie;
	struct late late[16];
	unsigned late_next;
	struct link *greeting; /* connected, HELLO sent, no reply yet */
	uint64_t greeting_until_ns;
	_Alignas(8) char rx[WIRE_MAX];

	pthread_mutex_t lock;
	pthread_cond_t cond; /* a leader returned from its sleep, or the ring was drained */
	bool again;          /* under lock: timerfd is armed because the ring holds more */
	bool leader;         /* some thread sleeps on the link for all the waiters */
	int epfd, timerfd;
	struct link *link; /* NULL while there is no daemon */
	uint64_t links;
	uint32_t backoff_ms;
	LIST_HEAD(, kvtier_seq) seqs;
	LIST_HEAD(, kvtier_model) models;
	LIST_HEAD(, kvtier_region) regions;
};

struct kvtier_model {
	struct kvtier *c;
	LIST_ENTRY(kvtier_model) entry;
	uint32_t refs;    /* the runtime's and one per sequence */
	uint64_t link_id; /* where handle is valid: a newer link makes a new one */
	uint64_t handle;
	uint32_t lanes;
	uint32_t first_lane[WIRE_MAX_LAYERS + 1];
	struct wire_model *msg; /* as sent, kept to send again */
};

struct kvtier_region {
	struct kvtier *c;
	LIST_ENTRY(kvtier_region) entry;
	uint32_t refs;
	struct link *link;
	uint64_t handle;
	struct kvtier_cuda_window *window; /* registered with a GPU as this; or NULL */
	struct seg seg; /* imported: without the seals of its class; addr NULL when it could not be mapped */
};

/* One lane's K or V rows (or, with lane NO_LANE, scores); the planes of a sequence are sorted by offset. */
#define NO_LANE UINT32_MAX
struct plane {
	uint64_t off;
	uint32_t stride, bytes, lane, cap, stage;
};

/*
 * Planes whose extents overlap are the fields of one array of records, e.g.
 * [slot][head] or [slot][K|V]; most groups have one plane. What lies behind the
 * longest lane's last row can be punched; backed says how far memory may exist.
 */
struct group {
	uint32_t first, planes;
	uint64_t base;
	uint32_t stride, span; /* span: bytes of one record that belong to us */
	uint32_t cap, stage;
	uint32_t backed; /* slots of [0, cap) that may have memory */
	bool punchable;
};

/* Somebody works on the sequence without the lock. */
enum seq_busy {
	SEQ_IDLE = 0,
	SEQ_MOVES, /* its rows are being moved: nothing else may happen */
	SEQ_HELD,  /* what is resident must stay so; appending is fine */
};

struct cuda_seq;
struct kvtier_seq {
	struct kvtier *c;
	LIST_ENTRY(kvtier_seq) entry;
	struct link *link;
	struct kvtier_model *m;
	struct kvtier_region *r;
	uint64_t handle;
	struct seq_slot *slot;
	const void *plan_area;
	size_t plan_bytes;
	uint32_t max_rows, lanes, n_layers, words;
	struct kvtier_layout *layouts;
	struct plane *planes;
	struct group *groups;
	uint32_t n_planes, n_groups;

	_Atomic uint32_t epoch;
	_Atomic uint64_t acked, seen;
	_Atomic int gone;   /* the daemon ended it: a KVT_E_* reason */
	_Atomic bool limbo; /* a truncate was sent and its outcome is not known */

	/* under lock */
	enum seq_busy busy;
	uint64_t applied;     /* plan carried out and not acknowledged, or 0 */
	uint32_t rows;        /* complete in every layer, as published */
	uint32_t *layer_rows; /* [n_layers] */
	/* Residency: a bitmap below the watermark; everything at or past it is resident. */
	uint32_t watermark;
	uint64_t *resident;    /* [lanes][words] */
	uint32_t *held;        /* [lanes] bits set below the watermark */
	uint32_t *layer_slots; /* [n_layers] slots in use in the longest lane, as memory is now */

	struct cuda_seq *cu; /* rows in GPU memory (ipc/cuda/cuda.h); NULL: in the region */
};

/* ---- error.c ---- */
/* Keep the calling thread's line and return code. */
int err_set(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The same for an -errno of shm or sock. */
int err_errno(int err, const char *what);
/* Option structs: copy what the caller's size says, zero the rest, refuse unknown set bytes. */
int opts_take(void *dst, size_t dst_size, const void *src, const char *what);
#define OPTS_TAKE(dst, src) opts_take((dst), sizeof(*(dst)), (src), #src)
/* Result structs: hand out what the caller's size has room for. */
int opts_give(void *ret, const void *src, size_t src_size, const char *what);
bool forked(const struct kvtier *c);
int err_forked(void);
uint32_t fork_generation(void);

/* ---- link.c ---- */
/* Connect when there is no link and it is time; call_lock held. 0 connected, KVT_E_DAEMON, other KVT_E_*. */
int link_ensure(struct kvtier *c, uint64_t deadline_ns);
/* Its end was seen: sequences on it are detached, the next try is scheduled. */
void link_down(struct kvtier *c, struct link *l, const char *why);
struct link *link_get(struct kvtier *c); /* a reference, or NULL */
void link_put(struct kvtier *c, struct link *l);
void link_put_locked(struct link *l);
/* Close a link's memory and fds without a word to the daemon. */
void link_free(struct link *l);
/* End of file without a read: one poll. Downs the link. */
bool link_lost(struct kvtier *c, struct link *l);
void conn_log(struct kvtier *c, int level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* Arm the timer behind the event fd; 0 disarms. */
void conn_timer(struct kvtier *c, uint64_t at_ns);

/* ---- event.c ---- */
/* Pop what the daemon sent and announce sleep; lock held. Number of entries, or -EPROTO. */
int events_drain(struct kvtier *c, struct link *l);
/* Tell the daemon that the sequence's slot changed; lock held. true: look whether the link is lost. */
bool events_dirty(struct kvtier_seq *s);
/*
 * Sleep, with the lock held, until something may have come or deadline_ns; the
 * lock is released meanwhile. Returns at once when entries were drained.
 */
void events_wait(struct kvtier *c, struct link *l, uint64_t deadline_ns);

/* ---- call.c ---- */
struct call {
	struct wire_hdr *req;
	void *reply; /* room for reply_size bytes; filled on success only */
	size_t reply_size;
	size_t reply_min; /* the reply has at least so many bytes instead; 0: exactly reply_size */
	uint64_t spin_ns; /* look for the reply so long before sleeping */
	int *fds;         /* n_fds of them on success, -1 before; NULL when the reply has none */
	unsigned n_fds;
	const int *send_fds; /* n_send_fds of them go with the request and stay the caller's */
	unsigned n_send_fds;
	uint32_t needs;          /* enum wire_feature that the daemon must know */
	uint64_t deadline_ns;    /* 0: the connection's timeout from now */
	const struct link *link; /* the request names things of this link; NULL: any */
	struct link **ret_link;  /* a reference to the link that served it; may be NULL */
	bool drop_late;          /* see struct late */
};
int call_run(struct kvtier *c, struct call *k);
/* One reply off the socket by deadline_ns: its length, 0 at the deadline, KVT_E_* (the link is then of no use).
 */
int call_recv(struct kvtier *c, struct link *l, uint64_t deadline_ns, int *fds, unsigned *n_fds);
uint64_t call_deadline(const struct kvtier *c);

/* ---- model.c, region.c ---- */
/* Make sure the model is known on the current link. *ret its handle and *ret_link_id the link it is valid on.
 */
int model_ensure(struct kvtier_model *m, uint64_t deadline_ns);
void model_put_locked(struct kvtier_model *m);
/* The layer that a lane belongs to. */
uint32_t layer_of(const struct kvtier_model *m, uint32_t lane);
void region_put(struct kvtier_region *r);
void region_free(struct kvtier_region *r);

/* ---- seq.c, rows.c ---- */
/* May this sequence be used now? 0, FORKED, DAEMON or STALE. No lock, no system call. */
int seq_gate(struct kvtier_seq *s);
/*
 * Everything of a sequence that is known before the daemon answers; opts are checked and layouts copied. With
 * `cu` its rows are in GPU memory: layouts say no more than their number, and cu is the sequence's from success
 * on.
 */
int seq_new(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *o, struct cuda_seq *cu,
	    struct kvtier_seq **ret);
/* Ask the daemon for it, op OPEN, RESUME or FORK of the parent's first `prefix` rows. On failure s is as
 * before. */
int seq_ask(struct kvtier_seq *s, const struct kvtier_seq_opts *o, enum wire_open_op op,
	    struct kvtier_seq *parent, uint32_t prefix);
/* Forget it here, without a word to the daemon; lock held, or nobody left to race with. The region reference
 * stays. */
void seq_free(struct kvtier_seq *s);
/* Tell the daemon that it ends; it is gone whatever is returned. */
int seq_over(struct kvtier_seq *s, bool drop);
/* KVT_E_INVAL with a line for a sequence whose rows are in GPU memory. */
int seq_on_host(const struct kvtier_seq *s, const char *instead);
/* seq_free(), what it has on a GPU, and the reference to its region. */
void seq_discard(struct kvtier_seq *s);
/* The wire form of a budget; table (room for CTL_MAX_LANES) is filled. b NULL: keep. */
int seq_budget(const struct kvtier_model *m, const struct kvtier_budget *b, struct wire_budget *ret,
	       uint32_t *table);
/* Residency of 64 rows of a lane in a layer of `len` rows. */
uint64_t rows_word(const struct kvtier_seq *s, uint32_t lane, uint32_t w, uint32_t len);
/* Rows of the lane in the device tier. */
uint32_t rows_held(const struct kvtier_seq *s, uint32_t layer, uint32_t lane);
/* Recount held and layer_slots after the bitmaps changed. */
void rows_recount(struct kvtier_seq *s);
/* Set the length of every layer and the watermark; the bitmaps are the caller's. */
void rows_start(struct kvtier_seq *s, uint32_t rows);
/* Slots in use per lane, into n[lanes]. */
void rows_counts(const struct kvtier_seq *s, uint32_t *n);

/* ---- planes.c ---- */
int planes_build(struct kvtier_seq *s);
/* KVT_E_INVAL for a sequence in an imported region that the library could not map. */
int planes_mapped(const struct kvtier_seq *s);
/* Slot `slot` of a lane's K (v false) or V. */
char *plane_slot(const struct kvtier_seq *s, uint32_t layer, uint32_t lane, bool v, uint64_t slot);
/* Bytes of the lane's K or V row. */
uint32_t plane_bytes(const struct kvtier_seq *s, uint32_t layer, bool v);
/*
 * The three below take per-lane counts [lanes] of slots in use. Make sure that
 * memory is behind slots [old, new_): 0, or KVT_E_NOSPC and nothing is kept.
 */
int planes_commit(struct kvtier_seq *s, const uint32_t *old, const uint32_t *new_);
/* Give back what lies behind new_ rows, the stage slots of `staged` rows included. Returns bytes released. */
uint64_t planes_punch(struct kvtier_seq *s, const uint32_t *old, const uint32_t *new_, const uint32_t *staged);
/* These slots were in use: the next punch must reach that far. */
void planes_touched(struct kvtier_seq *s, const uint32_t *old);

/* ---- pick.c ---- */
/*
 * Of n points of dim floats, point i at x + i * stride, the last one and then, until there are k, the one that
 * is farthest (Euclidean) from the nearest already picked; equal ones: the earlier. near: scratch, n floats.
 * Fills pick[min(n, k)], returns that count.
 */
uint32_t pick_farthest(const float *x, size_t stride, uint32_t dim, uint32_t n, uint32_t k, float *near,
		       uint32_t *pick);

/* ---- plan.c ---- */
/* The plan with this id as it stands now, READY and of this epoch. 0, KVT_E_STALE, KVT_E_BUSY (not ready yet).
 */
int plan_current(struct kvtier_seq *s, uint64_t id, struct plan_view *ret);
/* The lanes' residency becomes the plan's, but not that of lanes in `nack`; lock held. */
void plan_settle(struct kvtier_seq *s, const struct plan_view *v, const uint64_t *nack);
/* Tell the daemon that the plan is done with; lock held. true: look whether the link is lost. */
bool plan_acked(struct kvtier_seq *s, uint64_t id, const uint64_t *nack);
/* Send a request for a plan; see kvtier_plan_request(). */
int plan_ask(struct kvtier_seq *s, struct wire_hdr *req, uint64_t *ret_id);
