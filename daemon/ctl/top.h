/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * kvtierctl top, in three parts: the model asks the daemon and keeps plain structs, the view
 * draws them into a canvas of characters, the keys change what the view shows and ask the
 * daemon to act. Only top.c knows of a terminal. One thread.
 */
#include "daemon/ctl/ctl.h"
#include "shm/feed.h"
#include "shm/seg.h"

#define TOP_TIERS 3
#define TOP_TENANTS 64
#define TOP_EVENTS 256

/* ---- model ------------------------------------------------------------------------- */

/* Text in these structs is printable ASCII: whatever else a client named became '?'. */
struct top_tier {
	char name[16];
	bool sized; /* it has a capacity, and what follows it */
	bool offline;
	uint64_t rows, bytes, capacity, used, free;
	uint64_t mark[3];                                              /* free: min, low, high, permille */
	uint64_t demoted, promoted, refaults, read_bytes, write_bytes; /* since the daemon began */
	uint64_t read_p50, read_p99, write_p50, write_p99;             /* ns */
	double demoted_s, promoted_s, refaults_s, read_s, write_s;     /* per second */
};

enum top_wait { WAIT_DISK_READ, WAIT_DISK_WRITE, WAIT_URING, WAIT_RECLAIM, WAIT_FAULT, WAIT_SCHED, TOP_WAITS };

/* bytes but the device's, sequences and limits are exact where the daemon tells them; the rest are sums. */
struct top_tenant {
	char name[64];
	bool told;
	uint64_t seqs, rows, tier_bytes[TOP_TIERS], dropped, refaults, region_bytes;
	uint64_t most[TOP_TIERS]; /* bytes that it may have in a tier; 0: nobody said */
};

struct top_status {
	char version[32], mode[16], policy[48], tenant[64];
	bool own; /* a tenant's socket: only its own share is known */
	bool frozen, draining;
	uint64_t uptime_ns, clients, seqs, orphans, models;
	struct top_tier tier[TOP_TIERS];
	unsigned tiers;
	uint64_t plans, plan_last, plan_max, plan_p50, plan_p99, decide_p50, decide_p99, loop_max; /* ns */
	uint64_t dropped, misses;
	double plans_s, dropped_s, misses_s, refaults_s;
	bool probed, probes_on; /* the daemon knows of probes; they run */
	char probes_off[96];
	uint64_t wait_p99[TOP_WAITS];           /* ns */
	struct top_tenant tenants[TOP_TENANTS]; /* as the daemon charges them */
	unsigned n_tenants;
};

struct top_seq {
	char handle[24], key[36], tenant[64], client[64], model[64], policy[32], state[16];
	uint64_t rows, tier_rows[TOP_TIERS], tier_bytes[TOP_TIERS];
	uint64_t budget; /* device rows a lane, UINT64_MAX: all */
	uint64_t dropped, pinned, refaults, plans, misses;
	uint64_t
		stall; /* ns that its client's process waited for processor and memory; UINT64_MAX: not known */
};

struct top_model {
	struct ctl *ctl;
	uint64_t interval_ns;
	bool seen;                       /* the daemon has answered at least once */
	bool gone;                       /* it does not answer now; why says how */
	char why[200];                   /* of ctl_fail */
	uint64_t next_status, next_list; /* when due, now_ns() */
	struct top_status status;
	struct top_seq *seqs; /* the last complete list */
	size_t n_seqs;
	struct top_seq *coming; /* the list that is being fetched */
	size_t n_coming, cap_coming;
	char cursor[24];
	bool listing;
	uint64_t generation; /* counts complete lists */
	struct top_tenant tenant[TOP_TENANTS];
	unsigned tenants;
	bool tenants_cut; /* there are more */
	struct seg feed_seg;
	struct feed_reader feed;
	bool feeding, feed_refused;
	struct feed_event event[TOP_EVENTS]; /* a ring: event number i in [i % TOP_EVENTS] */
	uint64_t events, lost;
	bool keep_raw; /* keep the daemon's JSON too */
	json_t *raw_status, *raw_seqs;
};

/* Per second; 0 when the counter went back (the daemon restarted) or no time went by. */
static inline double top_rate(uint64_t before, uint64_t now, uint64_t ns)
{
	return now < before || !ns ? 0 : (double)(now - before) * 1e9 / (double)ns;
}

void top_model_init(struct top_model *m, struct ctl *c);
void top_model_free(struct top_model *m);
/* Do what is due, at most one exchange with the daemon. True: something changed. */
bool top_model_step(struct top_model *m);
/* Nanoseconds until something is due, at most `most`. */
uint64_t top_model_wait(const struct top_model *m, uint64_t most);
/* Status twice, an interval apart, all sequences, the feed's past. An enum ctl_exit, and then a line on stderr.
 */
int top_model_once(struct top_model *m);
/* A verb that changes something; the daemon's answer is one line in said. */
void top_model_ask(struct top_model *m, unsigned argc, const char *const argv[], char *said, size_t size);

/* JSON to structs. before: the status that rates are counted from, NULL for none. */
void top_read_status(struct top_status *ret, const json_t *j, const struct top_status *before);
void top_read_seq(struct top_seq *ret, const json_t *j);
void top_sum_tenants(struct top_model *m);
/* What --once --json prints; the caller's. */
json_t *top_json(const struct top_model *m);

/* ---- view -------------------------------------------------------------------------- */

enum top_column {
	COL_HANDLE,
	COL_KEY,
	COL_TENANT,
	COL_CLIENT,
	COL_MODEL,
	COL_POLICY,
	COL_ROWS,
	COL_DEVICE,
	COL_DRAM,
	COL_NVME,
	COL_DROPPED,
	COL_BUDGET,
	COL_PINNED,
	COL_REFAULTS,
	COL_PLANS,
	COL_STALL,
	COL_STATE,
	TOP_COLUMNS
};

enum top_mode { MODE_LIST, MODE_FILTER, MODE_ARGS, MODE_INTERVAL, MODE_CONFIRM, MODE_HELP };

struct top_ui {
	enum top_mode mode;
	bool quit, paused, down; /* down: the largest first */
	enum top_column sort;
	char filter[48], was_filter[48];
	char selected[24]; /* a handle, "" none */
	size_t at, first;  /* the selected line and the first one shown, of those in order[] */
	size_t page;       /* lines that the last frame had for sequences */
	uint32_t *order;   /* sequences as shown */
	size_t shown;
	char input[48];  /* what is being typed */
	char target[24]; /* the sequence that the question is about */
	const char *verb;
	char arg[2][16];
	unsigned args;
	char said[220]; /* the last answer, until the next key */
};

enum top_attr { ATTR_NONE, ATTR_BOLD, ATTR_BAR, ATTR_SELECTED };

/* A screen of characters; what does not fit is cut. Only printable ASCII gets in. */
struct canvas {
	int w, h;
	char *text;    /* [h][w] */
	uint8_t *attr; /* [h][w], enum top_attr */
};

int canvas_size(struct canvas *c, int w, int h); /* 0, or -ENOMEM; all blank */
void canvas_free(struct canvas *c);
/* Returns the column after the text. */
int __attribute__((format(printf, 5, 6)))
canvas_put(struct canvas *c, int y, int x, enum top_attr a, const char *fmt, ...);
void canvas_attr(struct canvas *c, int y, enum top_attr a); /* the whole line */

#define TOP_MIN_W 60
#define TOP_MIN_H 16

/* Where the parts of a screen begin and how many lines of content each has; depends on nothing but the
 * arguments. */
struct top_layout {
	int head, tiers, tenants, tenant_lines, seqs, seq_lines, feed, feed_lines, foot;
};
struct top_layout top_layout(int h, bool own, unsigned tiers, unsigned tenants, bool feed);
/* Draw everything; a canvas below the least size only says so. Fits ui's scrolling to what is there. */
void top_draw(struct canvas *c, const struct top_model *m, struct top_ui *ui);
/* Filter and sort again, keeping the selection. 0 or -ENOMEM. */
int top_order(const struct top_model *m, struct top_ui *ui);
const char *top_column_name(enum top_column c);
void top_draw_seqs(struct canvas *c, const struct top_layout *l, const struct top_model *m, struct top_ui *ui);

/* ---- keys -------------------------------------------------------------------------- */

enum top_key {
	KEY_NONE = 0x1000,
	KEY_GO_UP,
	KEY_GO_DOWN,
	KEY_PAGE_UP,
	KEY_PAGE_DOWN,
	KEY_FIRST,
	KEY_LAST,
	KEY_ERASE,
	KEY_RETURN,
	KEY_ESCAPE
};

/* A character, or an enum top_key. */
void top_key(struct top_model *m, struct top_ui *ui, int key);
