/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What the kernels of recall are handed (see args.h for the rules), and what they keep in GPU memory. The
 * search's definitions are policy/recall.h's; numbers that both need are the same there.
 *
 *   prepare   sum (new pages) → mark (what may be recalled)
 *   a layer   select → bound → choose → probe → score → near → top → pick
 *
 * Scores are kept as uint32_t of the same order as the floats, 0 for -inf and for nothing, so that they can be
 * compared, added up by maximum and selected as integers.
 */
#include "ipc/cuda/args.h"

#define FIND_GROUP 32u        /* rows of a group */
#define FIND_PAGE 128u        /* rows of a page at most */
#define FIND_PARTS 4u         /* groups of a page at most */
#define FIND_SPAN 32u         /* words of its positions */
#define FIND_TOKENS 4u        /* selected per query head */
#define FIND_SPREAD 2.07f     /* expected maximum of 32 standard normals */
#define FIND_MAX_DIM 256u     /* elements of a key, a multiple of 8; a key has at most 512 bytes */
#define FIND_MAX_QUERIES 128u /* of one KV head: selected tokens of its query heads */
#define FIND_MAX_HEADS 128u   /* KV heads of a layer */
#define FIND_MAX_NEAR 1024u   /* rows before a hit, and behind it */
#define FIND_NEAR_TILE 1024u  /* rows of one block of kvt_recall_near */

/* One page, by its number in the directory. */
struct find_page {
	uint64_t k; /* device address of the packed keys; the V plane follows */
	uint32_t lane, first, limit;
	uint16_t span;
	uint8_t rows, pad;
	uint32_t dead[FIND_PARTS];
	uint64_t pos[FIND_SPAN];
};
/* A page that is new or changed, in host memory that the GPU reads. */
struct find_fresh {
	uint32_t slot;
	uint32_t sum; /* 1: its keys need a summary; 0: they have one, something else changed */
	struct find_page page;
};
/*
 * Its summary: float step[4], radius[4], uint32_t good[4] (rows that are finite), int8 mean[4][dim]. Slots are
 * sum_bytes apart, a multiple of 16.
 */
#define FIND_SUM_HEAD 48u

/* What is kept of one sequence, in GPU memory. */
struct find_index {
	uint64_t page;   /* struct find_page [slots] */
	uint64_t sum;    /* [slots][sum_bytes] */
	uint64_t alive;  /* uint32_t [slots][4]: rows that may be recalled */
	uint64_t list;   /* uint32_t: slots of lane l's pages are list[start[l]] .. list[start[l + 1] - 1] */
	uint64_t start;  /* uint32_t [lanes + 1] */
	uint64_t group;  /* uint32_t, lane l's from 4 * start[l] on: slot * 4 + group, those with such a row */
	uint64_t groups; /* uint32_t [lanes]: how many */
	uint64_t bits;   /* uint64_t [lanes][words]: positions of such rows */
	uint64_t rank;   /* uint32_t [lanes][words]: such rows before each word */
	uint64_t rows;   /* uint32_t [lanes]: such rows */
	uint64_t lane;   /* struct cuda_lane [lanes] */
	uint32_t lanes, words, sum_bytes, dtype; /* enum kvtier_dtype */
};

/* kvt_recall_sum: n new pages into the index. */
struct find_sum_args {
	struct find_index ix;
	uint64_t fresh; /* struct find_fresh [n] */
	uint32_t n, pad;
};

/* kvt_recall_mark: which rows may be recalled: below `end`, not on the device, not dead, finite. */
struct find_mark_args {
	struct find_index ix;
	uint64_t resident;   /* uint64_t [lanes][words], of positions below `end` */
	uint32_t words, end; /* rows at and past `end` are on the device */
};

/* One layer's search. `head` counts KV heads of the layer, `query` the selected queries of one. */
struct find_args {
	struct find_index ix;
	uint32_t first, heads; /* lane of head 0 */
	uint32_t group;        /* query heads of a KV head */
	uint32_t tokens;       /* selected of each: queries = group * tokens */
	uint32_t dim;
	uint32_t want, probe, before, after;
	uint32_t mass;     /* 1: RECALL_MASS */
	float scale;       /* 0: 1 / sqrt(dim) */
	uint32_t n_tokens; /* of the turn */
	uint64_t q, token_stride, head_stride;

	/* scratch: strides of a head are `room_*` */
	uint64_t qt;     /* float [heads][queries][dim]: selected, times scale */
	uint64_t spread; /* float [heads][queries]; negative: not a finite query, it does not count */
	uint64_t top;    /* uint32_t [heads][queries]: largest bound */
	uint64_t bound;  /* float [heads][tiles of 32 groups][queries][32] */
	uint64_t order;  /* uint32_t [heads][room_groups]: group scores */
	uint64_t probed; /* uint32_t [heads][room_groups]: groups to look into, ascending */
	uint64_t count;  /* uint32_t [heads]: how many */
	uint64_t logit;  /* float [heads][room_probed][queries][32] */
	uint64_t part;   /* float2 [heads][room_parts][queries]: largest logit, sum of exponentials */
	uint64_t score;  /* uint32_t [heads][room_rows], by rank */
	uint64_t near;   /* uint32_t [heads][room_rows] */
	uint64_t take;   /* uint32_t [heads][room_rows / 32]: recalled, by rank */
	uint64_t left;   /* the same, cleared as rows are copied */
	uint64_t base;   /* uint32_t [heads][room_rows / 32]: recalled before each word */
	uint32_t room_groups, room_probed, room_parts, room_rows; /* multiples of 32 */

	/* the runtime's window */
	uint64_t k, v, k_head_stride, v_head_stride;
	uint64_t counts, positions; /* uint32_t [heads], [heads][want]; positions may be 0 */
	uint32_t k_row_stride, v_row_stride;
	uint32_t resident[FIND_MAX_HEADS]; /* rows on the device that count, in slots [0, resident[head]) */
};
