/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Messages on the socket (AF_UNIX, SEQPACKET): one message per packet, header
 * first, fixed-width little-endian fields, variable tables last. The decoded
 * form is the wire form; ipc/codec.c checks every length, count, enum and
 * string before anybody looks at a field.
 */
#include <stddef.h>
#include <stdint.h>
#include "shm/window.h"

#define WIRE_MAGIC 0x3154564bu /* "KVT1" */
#ifndef WIRE_VERSION           /* tests build those before and after it */
#define WIRE_VERSION 2
#endif
#define WIRE_MAX 65536u /* bytes of one message */
#define WIRE_MAX_FDS 4
#define WIRE_TEXT 200
#define WIRE_MAX_LAYERS 256u
#define WIRE_MAX_ROWS 1048576u
#define WIRE_MAX_SEQS 16384u
#define WIRE_MIN_RING 64u
#define WIRE_MAX_RING 65536u
#define WIRE_MAX_ROW_BYTES 65536u
#define WIRE_MAX_HEAD_DIM 1024u
#define WIRE_MAX_TTL 2592000u /* seconds: 30 days */
#define WIRE_MAX_ARGS 64u
#define WIRE_MAX_REGION (UINT64_C(1) << 46)
#define WIRE_MAX_PLAN_BYTES (UINT64_C(1) << 40)
#define WIRE_MAX_JSON (UINT64_C(1) << 32)
#define WIRE_MAX_NEAR 1024u   /* rows before a recalled one, or behind it, that come along */
#define WIRE_MAX_QUERIES 512u /* of one KV head */

enum wire_type {
	W_HELLO = 1,
	W_MODEL = 2,
	W_REGION = 3,
	W_REGION_CLOSE = 4,
	W_SEQ_OPEN = 5,
	W_SEQ_TRUNCATE = 6,
	W_SEQ_CLOSE = 7,
	W_SEQ_INFO = 8,
	W_PLAN_REQUEST = 9,
	W_FETCH = 10,
	W_REGION_IMPORT = 11,
	W_RECALL = 12,
	W_SCORER = 13,
	W_DIRECT = 14,
	W_SEGMENT = 15,
	W_ADMIN = 32,
	W_REPLY = 0x8000, /* ored into the request's type */
};

enum wire_feature {
	WIRE_F_PLANS = 1 << 0,
	WIRE_F_LEASES = 1 << 1,
	WIRE_F_FORK = 1 << 2,
	WIRE_F_IMPORT = 1 << 3, /* W_REGION_IMPORT is served */
	WIRE_F_RECALL = 1 << 4, /* W_RECALL is served */
	WIRE_F_WINDOW = 1 << 5, /* sequences with a window, W_SCORER */
	WIRE_F_DIRECT = 1 << 6, /* W_DIRECT, W_SEGMENT */
};
#define WIRE_FEATURES                                                                                          \
	(WIRE_F_PLANS | WIRE_F_LEASES | WIRE_F_FORK | WIRE_F_IMPORT | WIRE_F_RECALL | WIRE_F_WINDOW |          \
	 WIRE_F_DIRECT)

struct wire_hdr {
	uint32_t magic;
	uint16_t version;
	uint16_t type;
	uint32_t len;    /* whole message, header included */
	uint32_t cookie; /* chosen by the requester, echoed in the reply */
};

/* Begins every reply. On failure nothing follows it. */
struct wire_reply {
	struct wire_hdr hdr;
	int32_t status; /* 0 or KVT_E_* */
	uint32_t pad;
	char text[WIRE_TEXT]; /* one line, NUL-terminated, empty on success */
};

struct wire_hello {
	struct wire_hdr hdr;
	uint32_t features;
	uint32_t max_seqs;     /* 1..WIRE_MAX_SEQS */
	uint32_t ring_entries; /* power of two, WIRE_MIN_RING..WIRE_MAX_RING */
	uint32_t pid;          /* informative; the kernel's credentials count */
	uint64_t plan_bytes;
	char name[64];
};
/*
 * fds: ctl (exchange), plans (published), an eventfd that the client writes to wake the daemon, and the
 * client's end of a stream on which the daemon sends 8 bytes to wake it. Not an eventfd: its file flags would
 * be shared, and a client that makes it blocking and fills it could stop the daemon in a write.
 */
struct wire_hello_reply {
	struct wire_reply r;
	uint32_t features, client, max_seqs, ring_entries;
	uint64_t ctl_bytes, plan_bytes;
	char version[32];
};

struct wire_layer {
	uint32_t kind, kv_heads, k_bytes, v_bytes, side_bytes, window;
};
struct wire_model {
	struct wire_hdr hdr;
	char name[64];
	uint32_t n_layers, dtype, head_dim, rope, post_rope, rank, world, first_head;
	float rope_theta;
	uint32_t pad;
	struct wire_layer layer[]; /* n_layers */
};
struct wire_model_reply {
	struct wire_reply r;
	uint64_t model;
	uint32_t lanes, pad;
};

struct wire_region {
	struct wire_hdr hdr;
	uint64_t bytes;
};
/*
 * fds: region (exchange). W_REGION_IMPORT is the other way round: the request, a struct wire_region too,
 * carries one fd, the client's own file, whose first `bytes` become the region. No other request carries any: a
 * number of descriptors that is not wire_request_fds() ends the client.
 */
struct wire_region_reply {
	struct wire_reply r;
	uint64_t region, bytes;
};
struct wire_handle { /* W_REGION_CLOSE, W_SEQ_INFO */
	struct wire_hdr hdr;
	uint64_t handle;
};

struct wire_budget {
	uint32_t kind, device_rows, dram_rows, nvme_rows;
	uint32_t slack_rows, manual, table_n, set; /* set 0: use the default / keep */
	uint32_t write_through, pad;               /* rows that stay on the device get a copy below at once */
	char policy[32];                           /* empty: keep */
};
struct wire_layout {
	uint64_t k_off, v_off, k_head_stride, v_head_stride, score_off, score_head_stride;
	uint32_t k_row_stride, v_row_stride, cap, stage;
};
/*
 * Both sides know what is resident without telling each other:
 *   OPEN    nothing.
 *   RESUME  nothing: the region is new, every row is below or dropped.
 *   FORK    the parent's acknowledged residency, cut at prefix. The library has
 *           copied those rows into the child's layouts before it sends the
 *           message and lets no acknowledgement pass meanwhile; the daemon
 *           takes the parent's slot.acked into account first.
 * The same holds for TRUNCATE: slot.acked first, then rows at and past `rows`
 * are forgotten; the library stores the new epoch in slot.len after the reply.
 * Before the daemon replies to SEQ_OPEN it sets the slot to
 * len = seq_len_pack(epoch, rows), acked = 0.
 * Plans are cancelled, and READY is taken back, only by what the client asked
 * for (truncate, fork, close): a client may apply a READY plan at leisure.
 */
enum wire_open_op { W_OP_OPEN = 0, W_OP_RESUME = 1, W_OP_FORK = 2 };
enum wire_open_flag {
	W_OPEN_WINDOW = 1, /* device rows are out of the daemon's reach: they move through `window` */
	W_OPEN_DIRECT =
		2, /* with WINDOW: DRAM pages in published segments, brought in from there by the client */
};
/*
 * With W_OPEN_WINDOW a layout says cap, stage and where scores are; its other fields are 0. The plane of scores
 * is [head][coefficient][max_rows] float32, as many coefficients as the scorer has (1 for policy "client"),
 * score_head_stride bytes a head; score_off 0: no scores, only policies that need none.
 */
struct wire_seq_open {
	struct wire_hdr hdr;
	uint32_t op; /* enum wire_open_op */
	uint32_t lifetime, ttl_s, max_rows, granularity, equal_lanes;
	uint32_t n_layers, prefix;
	uint32_t flags, pad;        /* enum wire_open_flag */
	struct window_place window; /* zeros without W_OPEN_WINDOW */
	uint64_t scorer; /* id of what gives the scores; 0: the runtime's own (policy "client"), or none */
	uint64_t model, region, parent;
	uint8_t key[16], secret[32];
	struct wire_budget budget;
	/* then: struct wire_layout[n_layers], uint32_t table[budget.table_n] */
};
struct wire_seq_open_reply {
	struct wire_reply r;
	uint64_t seq;
	uint64_t plan_off, plan_bytes; /* in the client's plan segment */
	uint32_t slot;                 /* in the control segment */
	uint32_t epoch, rows, pad;     /* rows: 0 (OPEN), its length (RESUME), prefix (FORK) */
};
struct wire_seq_truncate {
	struct wire_hdr hdr;
	uint64_t seq;
	uint32_t rows, pad;
};
struct wire_seq_truncate_reply {
	struct wire_reply r;
	uint32_t epoch, rows;
};
struct wire_seq_close {
	struct wire_hdr hdr;
	uint64_t seq;
	uint32_t drop, pad;
};
struct wire_seq_info_reply {
	struct wire_reply r;
	uint32_t rows, epoch, lanes, resident_max;
	uint64_t tier_rows[3], tier_bytes[3];
	uint64_t dropped_rows, plans, plan_ns_last, refaults, misses, index_bytes;
	uint64_t unsaved_rows; /* of all lanes, on the device and nowhere else */
	char policy[32];
};
struct wire_plan_request {
	struct wire_hdr hdr;
	uint64_t seq;
	struct wire_budget budget;
	/* then: uint32_t table[budget.table_n] */
};
struct wire_plan_reply { /* W_PLAN_REQUEST, W_FETCH */
	struct wire_reply r;
	uint64_t plan_id; /* plans with this id or a later one reflect the request */
};
struct wire_fetch {
	struct wire_hdr hdr;
	uint64_t seq;
	uint32_t pos, n;
};
/*
 * Recall. FIND searches one layer and copies what it finds into the window, in the sequence's region: head h's
 * i-th recalled row, ascending in position, lies at k_off + h * k_head_stride + i * k_row_stride, V likewise.
 * The window is the daemon's from the request to its reply; END is answered when no FIND of the sequence
 * touches a window any more. PREPARE says that recalls will come. Only FIND has what follows `rows`.
 */
enum wire_recall_op { W_RECALL_FIND = 0, W_RECALL_PREPARE = 1, W_RECALL_END = 2 };
struct wire_recall {
	struct wire_hdr hdr;
	uint64_t seq;
	uint32_t op; /* enum wire_recall_op */
	uint32_t layer, epoch;
	uint32_t rows;                 /* wanted per head, 1..window.cap */
	uint32_t heads;                /* KV heads of the layer */
	uint32_t per_head, dim, dtype; /* queries of each KV head, their elements: f32, f16 or bf16 */
	uint32_t probe;                /* permille of the groups scored exactly; 0: the daemon's default */
	uint32_t flags;                /* KVT_RECALL_* */
	float scale;                   /* 0: 1 / sqrt(dim) */
	uint16_t before, after;        /* rows around a hit that come along, up to WIRE_MAX_NEAR each */
	struct wire_layout window;     /* cap: rows it has room for; stage and score fields 0 */
				       /* then: queries [heads][per_head][dim] */
};
struct wire_recall_reply {
	struct wire_reply r;
	uint32_t heads, rows; /* rows: sum of the counts */
	uint64_t searched, skipped, missed, ns;
	/* then: uint32_t count[heads], uint32_t position[rows], head after head */
};
/*
 * What a client needs to score rows itself: the policy's network, prepared (shm/scorer.h), as a published
 * memfd. policy empty: the one that a new sequence of this model would get. NOENT: it has no network, so rows
 * need no scores or the daemon cannot hand it out; `text` says which.
 */
struct wire_scorer {
	struct wire_hdr hdr;
	uint64_t model;
	char policy[32];
};
struct wire_scorer_reply { /* fds: the scorer (published, all seals) */
	struct wire_reply r;
	uint64_t id; /* never 0; the same network, the same id */
	uint64_t bytes;
	uint32_t coefs, pad;
	char policy[32];
};
/* W_DIRECT: a struct wire_handle (a live sequence with W_OPEN_DIRECT) → its directory (shm/direct.h). */
struct wire_direct_reply { /* fds: the directory (published) */
	struct wire_reply r;
	uint64_t bytes;
};
/* W_SEGMENT: a published segment of DRAM that a directory or a record names. NOENT: not this owner's. */
struct wire_segment {
	struct wire_hdr hdr;
	uint32_t segment, pad; /* its number */
};
struct wire_segment_reply { /* fds: the segment (published) */
	struct wire_reply r;
	uint64_t bytes;
};
/* Admin: argv as NUL-terminated strings back to back. Reply carries a memfd with JSON when json_bytes > 0. */
struct wire_admin {
	struct wire_hdr hdr;
	uint32_t argc, argv_bytes;
	char argv[];
};
struct wire_admin_reply {
	struct wire_reply r;
	uint64_t json_bytes;
};
