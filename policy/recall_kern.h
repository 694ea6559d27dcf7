/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The arithmetic of a recall, per CPU. Queries come in blocks of RECALL_LANES, transposed, the last block
 * filled up with zeros; what belongs to a query is one lane of a row of RECALL_LANES floats. Internal to
 * policy/.
 */
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
};
extern const struct recall_kern recall_ref, recall_avx2, recall_avx512;

/* NULL: the best of this CPU; else by name, NULL when it cannot run here. */
const struct recall_kern *recall_kern(const char *isa);
/* Indices of the k largest of s[n], ascending, into idx[k]; equal ones: the lower index. -inf is never taken,
 * NaN not allowed. Returns how many. */
uint32_t recall_top(const float *s, uint32_t n, uint32_t k, uint32_t *idx);
