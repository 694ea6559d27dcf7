/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The arithmetic of a recall, per CPU. Queries come in blocks of RECALL_LANES, transposed, the last block
 * filled up with zeros; what belongs to a query is one lane of a row of RECALL_LANES floats. Internal to
 * policy/.
 */
#include <stdbool.h>
#include "policy/recall.h"
#include "policy/rows.h"

struct recall_kern {
	const char *isa;
	/* n packed elements as floats: of dtype F16 or BF16; int8, times step. */
	void (*widen)(float *x, const void *src, size_t n, enum row_dtype dtype);
	void (*centre)(float *x, const int8_t *c, uint32_t n, float step);
	/*
	 * out[i][lane] = x_i . q_lane for rows x [n][dim] and qt [dim][RECALL_LANES]; -inf where that is not
	 * finite.
	 */
	void (*logits)(const float *x, uint32_t dim, uint32_t n, const float *qt, float *out);
	/* m[lane] = max(m[lane], l[i][lane]). */
	void (*max)(const float *l, uint32_t n, float *m);
	/* sum[lane] += sum over i of exp(l[i][lane] - m[lane]); m finite, no l above it. */
	void (*sumexp)(const float *l, uint32_t n, const float *m, float *sum);
	/* score[i] = max(score[i], max over lanes of l[i][lane] - base[lane]); base is never -inf. */
	void (*best)(const float *l, uint32_t n, const float *base, float *score);
	/* x[i] = max(x[i], x[i + step]) for i < n, from the front; step > 0. */
	void (*pair)(float *x, size_t n, size_t step);
	/* How many of s[n] are larger than the edge. */
	uint32_t (*above)(const float *s, uint32_t n, float edge);
};
extern const struct recall_kern recall_ref, recall_avx2, recall_avx512;

/* NULL: the best of this CPU; else by name, NULL when it cannot run here. */
const struct recall_kern *recall_kern(const char *isa);
/* Indices of the k largest of s[n], ascending, into idx[k]; equal ones: the lower index. -inf is never taken,
 * NaN not allowed. Returns how many. */
uint32_t recall_top(const struct recall_kern *kern, const float *s, uint32_t n, uint32_t k, uint32_t *idx);

/* ---- recall_near.c: rows in order of position ----------------------------------------------------- */

/* The arrays are the search's; every rank has a score, -inf where nothing was scored. */
struct recall_near {
	uint32_t words, n;      /* of lane, rank and take; rows that may be recalled */
	uint32_t before, after; /* of recall_query */
	uint64_t *lane, *take;  /* by position: rows that may be recalled; those chosen */
	uint32_t *rank;         /* rows before each word */
	float *score;           /* [n + before + after] */
};
/* Words over the positions of these runs. */
uint32_t near_words(const struct recall_run *runs, uint32_t n_runs);
/* Are the run's rows and positions the same number? */
bool near_fits(const struct recall_run *run);
/* Rows of a group that may be recalled: alive, and finite. */
uint32_t near_live(const struct recall_run *run, uint32_t group);
/* Fill lane and rank, count n. */
void near_mark(struct recall_near *m, const struct recall_run *runs, uint32_t n_runs);
/* No row has a score. */
void near_clear(struct recall_near *m);
/* Scores of the rows of a group that may be recalled, packed. */
void near_put(struct recall_near *m, const struct recall_run *run, uint32_t group, const float *score);
/* S' of S. The scores lie `after` places further on before, in their places after. */
void near_spread(struct recall_near *m, const struct recall_kern *kern);
/* The `want` best rows in order of run and row, each once; best: room for as many. Returns how many. */
int near_best(struct recall_near *m, const struct recall_kern *kern, const struct recall_run *runs,
	      uint32_t n_runs, uint32_t want, uint32_t *best, struct recall_hit *hits);
