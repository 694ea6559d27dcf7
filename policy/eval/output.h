/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Relative error of the attention output when rows are missing,
 *    sqrt( sum_t |W_o (o_t - o'_t)|^2 / sum_t |W_o o_t|^2 ),
 * over a sample of a cut's future queries t; o is attention over the whole cache, o' over the protected rows,
 * the kept ones and the future rows up to t. |W_o x|^2 = x' GRAM x over the group's heads. One worker's;
 * internal to policy/eval.
 */
#include "policy/eval/attention.h"
#include "policy/eval/metric.h"

#define OUTPUT_QUERIES 64u /* most sampled queries of a cut */

struct output {
	uint32_t queries, v_dim, group; /* of the cut that is prepared */
	uint32_t wide;                  /* v_dim + 1: values and, for the sum of attention, a one */
	const float *gram;              /* [group * v_dim][group * v_dim] */
	double norm;                    /* sum_t |W_o o_t|^2 */
	size_t room;                    /* floats of memory */
	float *memory;
	float *at;              /* [rows][group * queries] attention, transposed */
	float *v;               /* [rows][wide] */
	float *fixed;           /* [group * queries][wide] what every policy keeps */
	float *full;            /* [group * queries][v_dim] o */
	float *acc;             /* [group * queries][wide] */
	float *diff, *image;    /* [queries][group * v_dim] */
	float *pick_a, *pick_v; /* [rows][group * queries], [rows][wide] rows being added */
};

/*
 * Prepare cut [0, prompt) with future queries `future` of head h, values v [rows][v_dim]: attention of
 * `sample` of them, evenly spread. -ENOMEM.
 */
int output_prepare(struct output *o, const struct attn_head *h, struct attn_scratch *s, const float *v,
		   uint32_t v_dim, const float *gram, uint32_t prompt, uint32_t future, uint32_t sample);
/* Errors of the ranking `order` of the n evictable rows at the three budgets; NaN where too few rows are kept.
 */
void output_errors(struct output *o, const uint32_t *order, uint32_t n, float *out);
void output_release(struct output *o);
