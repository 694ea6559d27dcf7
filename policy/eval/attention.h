/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Scores that need queries: what runtimes with access to attention rank by, from
 * a trace's Q. One KV head of a sample as floats; row i is at position i.
 * Higher is kept, as everywhere. Windows and sinks that a method always keeps score above every other row.
 * Not thread-safe on one scratch; pure otherwise. Internal to policy/eval.
 *
 * tova       last query's attention, mean over all heads of the layer (arXiv 2401.06104)
 * h2o        attention received from past queries over the number that see the row, mean over the group;
 *            the last 64 rows kept (arXiv 2306.14048)
 * snapkv     mean attention of the last 64 queries, average-pooled with width 5, mean over the group; those
 *            64 rows kept (arXiv 2404.14469)
 * expected   softmax_i(mu.k_i / sqrt(d) + k_i' S k_i / 2d), mean over the group, times |v_i|; mu and S mean and
 *            covariance of the queries before RoPE from row 4 on, rotated to the mean of the next 512
 *            positions; 4 sinks kept (arXiv 2510.00636)
 * defensive  attention of the last 32 queries, pooled with width 5, the most over group and window, clamped up
 *            to its mean, times |v_i|; those 32 rows kept (arXiv 2510.13334, with uniform budgets)
 */
#include <stdint.h>
#include "policy/eval/kern.h"
#include "shm/trace.h"

#define ATTN_BLOCK 32u /* queries of a head at once */
#define ATTN_H2O_WINDOW 64u
#define ATTN_SNAPKV_WINDOW 64u
#define ATTN_DEFENSIVE_WINDOW 32u
#define ATTN_POOL 5u
#define ATTN_AHEAD 512u /* positions that expected attention looks ahead */
#define ATTN_SINKS 4u

struct attn_head {
	const float *k; /* [rows][dim], after RoPE */
	const float *q; /* [group][rows][dim], after RoPE */
	uint32_t rows, dim, group;
};

/* Owned by one worker; grows by attn_reserve(). */
struct attn_scratch {
	const struct eval_kern *kern;
	uint32_t rows, dim, group; /* what the memory is for */
	float *memory;
	float *q;           /* [group * 64][dim] queries of a block */
	float *a;           /* [group * 64][rows] their attention */
	float *inv;         /* [group * 64] one over a row's sum */
	float *row, *pool;  /* [rows] */
	float *q0;          /* [rows][dim] a head's queries before RoPE */
	float *mean, *cov;  /* [dim], [dim][dim] */
	float *turn;        /* [dim] a mean rotation */
	float *cos, *sin;   /* [rows + ATTN_AHEAD][dim / 2] */
	uint32_t rope_type; /* of cos and sin */
	float rope_theta;
};

/* Room for heads of this shape, and the rotations of their RoPE. -ENOMEM. */
int attn_reserve(struct attn_scratch *s, uint32_t rows, uint32_t dim, uint32_t group, uint32_t rope_type,
		 float theta);
void attn_release(struct attn_scratch *s);

/*
 * Attention of n <= 64 queries t[i] (ascending rows): row h * n + i of s->a, `*stride` floats apart, holds
 * exp(q.k / sqrt(d) - most) of rows 0 ... t[i] and zeros up to t[n - 1]; s->inv what makes a row sum to one.
 */
void attn_rows(const struct attn_head *h, struct attn_scratch *s, const uint32_t *t, uint32_t n,
	       uint32_t *stride);

/* score[p][i] for i < prompt[p]; prompts ascending. One pass over the past queries serves all of them. */
void attn_h2o(const struct attn_head *h, struct attn_scratch *s, const uint32_t *prompt, uint32_t prompts,
	      float *const *score);
/* The three below for one prompt P >= 1: score[P]; vnorm[i] = |v_i|. */
void attn_snapkv(const struct attn_head *h, struct attn_scratch *s, uint32_t prompt, float *score);
void attn_defensive(const struct attn_head *h, struct attn_scratch *s, uint32_t prompt, const float *vnorm,
		    float *score);
void attn_expected(const struct attn_head *h, struct attn_scratch *s, uint32_t prompt, const float *vnorm,
		   float *score);
/* sum[i] += attention of row prompt - 1 to row i, summed over the group. */
void attn_last(const struct attn_head *h, struct attn_scratch *s, uint32_t prompt, float *sum);
/* UMAX and UMEAN of shm/trace.h from queries `first` ... first + n - 1 over rows below `prompt`; added to. */
void attn_utility(const struct attn_head *h, struct attn_scratch *s, uint32_t prompt, uint32_t first,
		  uint32_t n, float *umax, float *umean);
