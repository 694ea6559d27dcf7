/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A policy gives every row of a lane a score: predicted future utility, higher
 * is kept. It only ranks. Pure: no I/O after init, no clock, no globals;
 * randomness comes from cfg.seed.
 *
 * Threads: a policy object may score different batches from several threads at
 * once (init'ed state is read-only); scratch is on the caller's batch.
 */
#include <stddef.h>
#include <stdint.h>

enum policy_id {
	POLICY_CLIENT = 0, /* scores come from the runtime's score plane */
	POLICY_RANDOM,
	POLICY_STREAMING,
	POLICY_KNORM,
	POLICY_VNORM,
	POLICY_KEYDIFF,
	POLICY_LAGKV,
	POLICY_CUR,
	POLICY_VRANGE,
	POLICY_POSITION,
	POLICY_QFILTER,
	POLICY_KVP,
	POLICY_IDS
};

enum {
	POLICY_STATIC = 1,  /* what is kept of a row depends on that row alone: scored once */
	POLICY_CONTEXT = 2, /* other rows matter: device rows are rescored at each plan */
	POLICY_NEEDS_K = 4,
	POLICY_NEEDS_V = 8,
	POLICY_NEEDS_WEIGHTS = 16,
	POLICY_NEEDS_DIM = 32, /* needs dtype and head_dim, not opaque rows */
	POLICY_SEPARABLE = 64, /* STATIC, and has coefs_per_row, coefs and combine */
};
#define POLICY_MAX_COEFS 2u

enum row_dtype { ROW_OPAQUE = 0, ROW_F32 = 1, ROW_F16 = 2, ROW_BF16 = 3 }; /* equals enum kvtier_dtype */

struct policy_cfg {
	uint32_t layers, heads; /* KV heads per layer (equal in all layers for learned policies) */
	uint32_t k_dim, v_dim;  /* elements per row */
	enum row_dtype dtype;
	uint64_t seed;
	const char *weights; /* path of a .kvp file, for policies that need one */
	const char *isa;     /* NULL: best of this CPU; "ref", "avx2", "avx512" */
	const char *model;   /* model name, must match the weight file's */
};

/* n rows of one lane, ascending positions. */
struct policy_batch {
	uint32_t lane; /* layer * heads + head */
	uint32_t n;
	const void *k, *v;         /* row i at k + i * k_stride; may be NULL if not needed */
	size_t k_stride, v_stride; /* bytes */
	const uint32_t *pos;       /* absolute position of row i; NULL: first_pos + i */
	uint32_t first_pos;
	uint32_t total; /* rows of the sequence so far (distance to the end = total - 1 - pos) */
	uint64_t nonce; /* differs per plan: for policies that resample */
};

struct policy;
struct calibration;

struct policy_ops {
	const char *name;
	enum policy_id id;
	unsigned caps;
	/* May read the weight file. On failure one line (field, value, limit) to err. */
	int (*init)(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize);
	/* scores[i] for row i, finite. 0 or -ENOMEM. */
	int (*score)(struct policy *p, const struct policy_batch *b, float *scores);
	/*
	 * SEPARABLE: scores that depend on the distance to the end, made of a few
	 * coefficients per row that do not. Whoever keeps these never scores a row
	 * twice: score(b) is combine(b, coefs(b)) at any b->total.
	 *
	 * coefs_per_row: of this object, at most POLICY_MAX_COEFS; 0 when its scores
	 * do not depend on the distance after all, and score() is final.
	 * coefs: coef[r][i] is coefficient r of row i; b->total is not read. As score.
	 * combine: scores from coefficients; of b, only lane, n, positions and total
	 * are read; scores may be coef[0]. A coefficient that is not finite makes the
	 * least of scores. Fast where positions are consecutive. 0 or -EINVAL (lane).
	 * A policy of one coefficient only adds to it, so that it is a score at any fixed distance.
	 */
	uint32_t (*coefs_per_row)(const struct policy *p);
	int (*coefs)(struct policy *p, const struct policy_batch *b, float *const *coef);
	int (*combine)(const struct policy *p, const struct policy_batch *b, const float *const *coef,
		       float *scores);
	/* What its weight file says scores are worth (policy/calibrate.h), p's own; NULL: nothing. May be NULL.
	 */
	const struct calibration *(*calibration)(const struct policy *p);
	/* Equal for objects that score alike because their weight files do. NULL: all objects of a
	 * configuration. */
	uint64_t (*weights_id)(const struct policy *p);
	void (*free)(struct policy *p); /* NULL is fine */
	const char *doc;                /* one line for `kvtierctl policy list` */
};

struct policy { /* first member of every policy's own struct */
	const struct policy_ops *ops;
};

extern const struct policy_ops
	*const policy_registry[]; /* NULL-terminated; POLICY_CLIENT included (score fails) */
const struct policy_ops *policy_find(const char *name);
const struct policy_ops *policy_by_id(enum policy_id id);
