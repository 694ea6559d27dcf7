/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What the untrained policies share: a checked configuration, the kernels, and
 * walking a batch tile by tile. Internal to policy/.
 */
#include <stdbool.h>
#include "policy/policy.h"
#include "policy/rows.h"

#define SINKS 4               /* first positions, which attention leans on whatever they say */
#define SCORE_SINK 60000.0f   /* above every other score, and finite as a half */
#define SCORE_FLOOR -60000.0f /* of a row whose score is not a number */
#define HEURISTIC_MAX_DIM 8192

struct heuristic {
	struct policy base;
	struct policy_cfg cfg; /* strings not kept */
	const struct rows_kern *kern;
};

/* Checks the fields that ops->caps needs. 0, -EINVAL or -ENOTSUP with one line in err, -ENOMEM. */
int heuristic_new(struct policy **ret, const struct policy_ops *ops, const struct policy_cfg *cfg, char *err,
		  size_t errsize);
void heuristic_free(struct policy *p);

static inline const struct heuristic *heuristic_of(const struct policy *p)
{
	return (const struct heuristic *)p;
}

static inline uint32_t batch_pos(const struct policy_batch *b, uint32_t i)
{
	return b->pos ? b->pos[i] : b->first_pos + i;
}

/* Load rows [from, from + n) of K or V. */
static inline void load_k(const struct heuristic *h, const struct policy_batch *b, uint32_t from, uint32_t n,
			  float *x)
{
	h->kern->load(x, (const char *)b->k + from * b->k_stride, b->k_stride, h->cfg.k_dim, n, h->cfg.dtype);
}
static inline void load_v(const struct heuristic *h, const struct policy_batch *b, uint32_t from, uint32_t n,
			  float *x)
{
	h->kern->load(x, (const char *)b->v + from * b->v_stride, b->v_stride, h->cfg.v_dim, n, h->cfg.dtype);
}

/* A well-mixed hash of two words (the finaliser of splitmix64). */
static inline uint64_t mix64(uint64_t a, uint64_t b)
{
	uint64_t x = a * 0x9e3779b97f4a7c15u + b + 0x9e3779b97f4a7c15u;

	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

/* Replace what is not finite (rows come from clients and may hold anything) by SCORE_FLOOR. */
void scores_finite(float *scores, uint32_t n);

extern const struct policy_ops policy_client_ops, policy_random_ops, policy_streaming_ops, policy_knorm_ops,
	policy_vnorm_ops, policy_vrange_ops, policy_keydiff_ops, policy_lagkv_ops, policy_cur_ops;
