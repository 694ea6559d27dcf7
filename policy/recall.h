/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Recall: which evicted rows of one lane do the queries of a new turn attend to?
 * A search over packed keys that only ranks; the daemon decides which rows may
 * be searched and copies what is found. Pure: no I/O, no clock, no globals;
 * memory is the caller's; any thread.
 *
 * Definitions. A lane has rows i with key k_i (as cached, after RoPE) and, from
 * the query heads of its group, selected queries q of dimension d (after RoPE).
 *
 *   selected     per query head of the group the turn's last token and then, up to RECALL_TOKENS in all, the
 *                token whose query is farthest (Euclidean) from the nearest one already selected; ties: the
 *                earlier token. Done by libkvtier (ipc/client/pick.c), so that little crosses the socket.
 *   logit        l_qi = scale * q.k_i in float32; scale is 1/sqrt(d) unless the model says otherwise.
 *   group        up to RECALL_GROUP consecutive rows of one page (pages hold up to 128 rows of one lane,
 *                ascending positions with gaps where rows were kept). Its summary:
 *                  c   the mean key, as int8: c_j = step * i8_j, step = max_j |mean_j| / 127
 *                  r   radius: sqrt(mean over its rows of |k_i - c|^2), c as dequantised
 *   bound        b_qg = scale * (q.c_g + RECALL_SPREAD * |q| * r_g / sqrt(d)): where the best of 32 rows would
 *                be if they scattered evenly around c (RECALL_SPREAD: the expected maximum of 32 standard
 *                normals).
 *   group score  B_g = max_q (b_qg - max_g' b_qg'): each query's best group has 0.
 *   probed       the E groups of highest B (equal: the earlier), E = max(ceil(G * probe / 1000),
 *                ceil(4 * want / RECALL_GROUP)), G all groups with a row that may be recalled. probe 1000:
 *                all of them, that is, exact search.
 *   row score    S_i = max_q (l_qi - L_q) over the probed rows, -inf elsewhere. L_q normalises the queries:
 *                RECALL_LOGIT: 0, plain logits. RECALL_MASS: ln(sum over probed rows of exp(l_qi) + exp(R_q)),
 *                so that S_i is the log of the largest attention that one query would give the row; R_q =
 *                ln(sum of exp(l_q)) over the lane's rows on the device, or -inf when not known.
 *   near score   S'_i = max(S_j: i - after <= j <= i + before), i and j ranks: the rows that may be recalled,
 *                of all runs, probed or not, counted in order of position. So a hit brings `before` rows before
 *                it and `after` rows behind it along: a question's queries find the row that answers, and the
 *                answer's own queries, which nobody has yet, want what follows it.
 *   recalled     the `want` rows of highest S'; equal scores: the lower position.
 *
 * Ties and sums aside, kernels agree within float32 rounding.
 */
#include <stddef.h>
#include <stdint.h>
#include "policy/policy.h"

#define RECALL_TOKENS 4u    /* selected per query head: the last and the three farthest */
#define RECALL_GROUP 32u    /* rows of a group */
#define RECALL_RUN 128u     /* most rows of a run: a page */
#define RECALL_SPREAD 2.07f /* expected maximum of 32 standard normals */
#define RECALL_PROBE 250u   /* default: a quarter of the groups */
#define RECALL_LANES 16u    /* queries of one block; kernels work on whole blocks */
#define RECALL_MAX_QUERIES 512u
#define RECALL_MAX_DIM 1024u
#define RECALL_MAX_NEAR 1024u /* each of before and after */

enum recall_norm { RECALL_LOGIT = 0, RECALL_MASS = 1 };

/*
 * What stays in memory of a run's keys: `groups` steps, then radii (float32), then uint32_t bits of the rows
 * that are finite, then int8[groups][dim].
 */
struct recall_sum {
	uint16_t groups, dim;
	float v[];
};
static inline const uint32_t *recall_good(const struct recall_sum *s)
{
	return (const uint32_t *)(s->v + 2 * (size_t)s->groups);
}
static inline const int8_t *recall_centre(const struct recall_sum *s, uint32_t group)
{
	return (const int8_t *)(recall_good(s) + s->groups) + (size_t)group * s->dim;
}
static inline uint32_t recall_groups(uint32_t rows)
{
	return (rows + RECALL_GROUP - 1) / RECALL_GROUP;
}
/* Bytes of the summary of `rows` keys: 76 per 32 rows of dim 64, 0.95 % of K and V in fp16. */
size_t recall_sum_bytes(uint32_t rows, uint32_t dim);
/* Fill ret for rows <= RECALL_RUN packed keys of dim <= RECALL_MAX_DIM elements of dtype (not opaque). */
void recall_summarise(const void *k, uint32_t rows, uint32_t dim, enum row_dtype dtype, struct recall_sum *ret);

/* n elements of dtype (not opaque) as floats. */
void recall_load(float *x, const void *src, size_t n, enum row_dtype dtype);

/* Packed keys of one page, where its rows are, and which of them may be recalled: bit i of word i / 32. */
struct recall_run {
	const void *k;
	const struct recall_sum *sum;
	const uint64_t *pos;  /* [span]; bit i: position first + i is the next row */
	uint32_t first, span; /* positions are below 2^28 */
	uint32_t rows;        /* bits in pos */
	uint32_t alive[RECALL_RUN / 32];
};

struct recall_query {
	uint32_t n, dim;      /* queries, 1..RECALL_MAX_QUERIES; elements of each */
	float scale;          /* > 0 */
	enum row_dtype dtype; /* of the keys */
	enum recall_norm norm;
	uint32_t probe;         /* permille, 1..1000 */
	uint32_t want;          /* rows */
	uint32_t before, after; /* rows around a hit that come along, at most RECALL_MAX_NEAR each */
	const float *q;         /* [n][dim], finite */
	const void *resident;   /* keys of rows on the device, or NULL: packed, counted into R_q */
	size_t resident_stride;
	uint32_t resident_n;
	const char *isa; /* NULL: best of this CPU; "ref", "avx2", "avx512" */
};

struct recall_hit {
	uint32_t run, row; /* row of that run */
	uint32_t pos;
	float score; /* S' */
};

/* What a search did, for counters. */
struct recall_seen {
	uint32_t groups, probed, rows; /* groups and rows that may be recalled; groups scored exactly */
};

/* Bytes of scratch that a search over these runs may need. */
size_t recall_scratch(const struct recall_query *q, const struct recall_run *runs, uint32_t n_runs);
/*
 * Search the runs. hits: room for q->want; returned in order of run and row, no position twice. Returns how
 * many there are, or -EINVAL (a field out of its limits). Rows whose keys are not finite never are hits.
 */
int recall_search(const struct recall_query *q, const struct recall_run *runs, uint32_t n_runs, void *scratch,
		  struct recall_hit *hits, struct recall_seen *seen);
