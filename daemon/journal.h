/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What a sequence's last plans decided, why so, and what became of them: a ring of small records, none for a
 * sequence without plans. Part of internal.h; the event loop's, but journal_cut().
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/probes.h"
#include "ipc/kvtier.h"

struct plan;
struct seq;

#define JOURNAL_MOST 64u /* records of a sequence; 4 at first, twice as many when they are full */

enum journal_outcome {
	JOURNAL_OPEN,      /* its rows are moved, or it waits for the client */
	JOURNAL_ACKED,     /* applied, by all lanes but `nacked` */
	JOURNAL_NOTHING,   /* every lane keeps what it has: nobody was asked */
	JOURNAL_SAVED,     /* its client is gone: applied by the daemon */
	JOURNAL_COUNTED,   /* observed or frozen: not published */
	JOURNAL_CANCELLED, /* for this cause: */
	JOURNAL_OUTCOMES,
};
enum journal_cause {
	JOURNAL_OF_CLIENT, /* it cut or forked the sequence, or closed it */
	JOURNAL_MISSED,    /* rows could not be read */
	JOURNAL_FAILED,    /* rows could not be written, or no memory */
	JOURNAL_REFUSED,   /* by the client, in every lane, before it was ready */
	JOURNAL_LEFT,      /* the client went */
	JOURNAL_ENDED,     /* the sequence did */
	JOURNAL_CAUSES,
};
enum journal_limit {                      /* what kept budgets below those asked for */
		     JOURNAL_LOW = 1,     /* dram or nvme: a quota or free space */
		     JOURNAL_DEMOTED = 2, /* device: kvtierctl demote */
		     JOURNAL_LAYOUT = 4,  /* device: the slots of the layout */
		     JOURNAL_STUCK = 8,   /* device: more, for nothing below takes what may not be dropped */
		     JOURNAL_BYPASS = 16, /* dram is short of space: rows pass it by */
		     JOURNAL_STAYED = 32, /* too many plans before it missed: nothing is promoted */
};

struct journal_entry {
	uint64_t time_ns; /* of the decision, since the epoch of 1970 */
	uint64_t plan;    /* 0: was not published */
	uint32_t epoch, watermark;
	const char *policy;             /* that ran; static */
	bool fallback, adaptive;        /* another than the one asked for; budgets differ by lane */
	uint8_t outcome, cause, limits; /* enums above */
	uint32_t budget[KVT_TIERS], most, asked[KVT_TIERS]; /* lane 0; largest device budget; before limits */
	uint64_t kept, out, in, dropped;                    /* rows, all lanes */
	uint64_t down, up;                  /* rows moved below the device since: dram to nvme, back */
	uint16_t lowest_kept, highest_gone; /* keys at the cut of lane 0, of unprotected rows; 0: none */
	uint32_t nacked;                    /* lanes */
	uint64_t score_ns, decide_ns, move_ns, ack_ns, at_ns; /* phases; when the last one ended (monotonic) */
	uint64_t refaults, misses;                            /* of the sequence, before this plan's moves */
	bool stalls_known;
	struct probes_process stall; /* of its client's process, when this was decided */
};

struct journal {
	uint64_t made; /* records ever; number i lies at i % cap */
	uint32_t cap;
	struct journal_entry e[];
};

/* The record of plan p, whose tables are final. No memory: there is none. */
void journal_decided(struct plan *p, uint64_t now);
/* Every row is where it should be. */
void journal_moved(struct plan *p);
void journal_over(struct plan *p, enum journal_outcome outcome, uint32_t nacked);
/* Rows of s moved between the tiers below the device. */
void journal_move(const struct seq *s, int from, int to, uint32_t rows);
/* Keys at the cut of lane 0, into p. Worker, while keys and tables are there. */
void journal_cut(struct plan *p);
/* Records that are still there, and the i-th of them, oldest first. */
uint32_t journal_count(const struct journal *j);
const struct journal_entry *journal_at(const struct journal *j, uint32_t i);
/* Room for one more record and its place; *jp may move. NULL: no memory, nothing changed. */
struct journal_entry *journal_add(struct journal **jp);
/* Budgets of the lane, as the last plan of s had them. */
void seq_budgets(const struct seq *s, uint32_t lane, uint32_t ret[KVT_TIERS]);
/* Rows by tier as JSON, null where there is no limit. */
struct json_text;
void json_text_budget(struct json_text *o, const char *key, const uint32_t rows[KVT_TIERS]);
uint64_t journal_bytes(const struct journal *j); /* of heap; NULL is fine */
