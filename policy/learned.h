/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The policies that read a weight file: the KVP network, the learned
 * position-only prior and q-filters. Their objects are immutable after init.
 */
#include "policy/calibrate.h"
#include "policy/policy.h"
#include "policy/weights.h"
#include <string.h>

extern const struct policy_ops policy_kvp_ops, policy_position_ops, policy_qfilter_ops;

/* Ops of the policy that scores with files of this kind, or NULL. */
const struct policy_ops *policy_for_kind(uint32_t kind);

/*
 * Load cfg->weights for a policy of `kind` and check it against cfg: model
 * (when cfg->model is set), layers, heads and, unless the kind ignores them,
 * k_dim and v_dim. 0, -EINVAL (not for this policy or model), or as
 * weights_load(); one line in err.
 */
int weights_for(struct weights **ret, const struct policy_cfg *cfg, uint32_t kind, char *err, size_t errsize);

/* The calibration section of a file, checked and copied; *ret NULL: it has none. As weights_for(). */
int weights_calibration(struct calibration **ret, const struct weights *w, const struct policy_cfg *cfg,
			char *err, size_t errsize);
void weights_calibration_free(struct calibration *c); /* NULL is fine */

/* The beginning of the file's digest. */
static inline uint64_t weights_id_of(const struct weights *w)
{
	uint64_t id;

	memcpy(&id, w->h.digest, sizeof(id));
	return id;
}

/* A policy cannot make sense of rows of this dtype: says so in err and returns -EINVAL; else 0. */
int rows_readable(const struct policy_cfg *cfg, char *err, size_t errsize);

/* Says so in err; returns -ENOMEM. */
int out_of_memory(char *err, size_t errsize);

static inline size_t dtype_bytes(enum row_dtype dtype)
{
	return dtype == ROW_F32 ? 4 : 2;
}

static inline float bf16_float(uint16_t bits)
{
	uint32_t word = (uint32_t)bits << 16;
	float value;

	memcpy(&value, &word, sizeof(value));
	return value;
}

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t float_bf16(float value)
{
	uint32_t word;

	memcpy(&word, &value, sizeof(word));
	if ((word & 0x7fffffff) > 0x7f800000)
		return (uint16_t)(word >> 16 | 0x40);
	return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

/* IEEE 754 binary16; exact. Scaling by 2^112 turns half subnormals into normal floats for free. */
static inline float half_float(uint16_t bits)
{
	uint32_t word = (uint32_t)(bits & 0x7fff) << 13;
	float value;

	if (word >= 0x7c00u << 13)
		word |= 0x7f800000;
	memcpy(&value, &word, sizeof(value));
	if (word < 0x7c00u << 13)
		value *= 0x1p112f;
	return bits & 0x8000 ? -value : value;
}

/* Element i of a row of any alignment. */
static inline float row_element(const void *row, size_t i, enum row_dtype dtype)
{
	uint16_t half;
	float value;

	if (dtype == ROW_F32) {
		memcpy(&value, (const char *)row + i * 4, sizeof(value));
		return value;
	}
	memcpy(&half, (const char *)row + i * 2, sizeof(half));
	return dtype == ROW_F16 ? half_float(half) : bf16_float(half);
}
