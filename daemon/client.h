/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Tenants, their clients, and what those hold: models, regions, the memory of
 * their plans. Part of internal.h; the event loop's.
 */
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>
#include <systemd/sd-event.h>
#include "daemon/config.h"
#include "daemon/pages.h"
#include "daemon/workers.h"
#include "ipc/wire.h"
#include "shm/ring.h"
#include "shm/seg.h"
#include "tiers/device.h"

struct core;
struct sock_peer;
struct seq;
struct policy_use;

/* A configured tenant. Who it is on pages and disk: tenant_hash(), which adds the UID. */
struct tenant {
	uint32_t index;
	char name[32];
	struct config_tenant limit;
	uint32_t seqs;
	uint64_t region_bytes;           /* device memory charged */
	struct in_job *in_batch;         /* pages read for its plans, not yet with a worker */
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
	uint8_t node;      /* 1 + index of the node that it is on; 0: unknown, or of no account */
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
