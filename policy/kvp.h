/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The KVP network inside the policy room: one interface to the instruction
 * sets that compute it.
 *
 *     a = LN(Wk k + bk)    c = LN(Wv v + bv)    p = LN(pos[min(position, last)])
 *     x = [a; c; p] -> (Linear -> LN -> SiLU) twice -> Linear -> score
 *
 * Rows are scored in tiles of up to KVP_TILE: a tile's activations stay in the
 * L2 cache while the weights stream past them once. A row's score does not
 * depend on the rows beside it, to the last bit.
 */
#include "policy/learned.h"
#include <cpuid.h>
#include <stdbool.h>

#define KVP_TILE 48 /* rows; a multiple of every kernel's row block */
/*
 * Elements from one row of activations to the next: enough for the widest
 * input (576), and no power of two, which would send all rows to a few cache sets.
 */
#define KVP_LD 608
#define KVP_WIDEST 512 /* widest output of a linear */
#define KVP_EPS 1e-5f  /* of the LayerNorms */

struct kvp_dims {
	uint32_t k_dim, v_dim, proj, pos_rows, pos_dim, hidden;
	uint32_t in; /* of the first hidden layer: 2 * proj + pos_dim */
};

struct kvp_norm {
	const float *gain, *shift;
};

/*
 * A Linear and the LayerNorm after it. Weights are packed in panels of
 * isa->panel outputs; a panel holds [in / 2][panel][2] bf16, so that one load
 * brings the weights of two inputs for each of a vector's outputs: the operand
 * of a bf16 dot product, and for fp32 a shift and a mask away from two vectors.
 */
struct kvp_dense {
	const uint16_t *w;
	const float *bias;
	struct kvp_norm norm;
};

struct kvp_lane {
	struct kvp_dense k, v, h1, h2;
	const uint16_t *pos; /* [pos_rows][pos_dim] bf16 */
	struct kvp_norm pos_norm;
	const float *out; /* [hidden] */
	float out_bias;
};

/*
 * What an instruction set has to do. Activations (`act`) are the isa's own
 * element type, act_bytes each, KVP_LD apart, 64-byte aligned; `c` is fp32
 * [rows][width], 64-byte aligned. All counts of elements are multiples of 16.
 */
struct kvp_isa {
	const char *name;
	bool (*supported)(void);
	uint32_t panel;
	uint32_t act_bytes;
	/* Convert n rows of dim elements, `stride` bytes apart and aligned to nothing. */
	void (*load)(void *act, const void *rows, size_t stride, enum row_dtype dtype, uint32_t n,
		     uint32_t dim);
	/* c = act W + bias for n rows, `in` inputs and `out` outputs (a multiple of panel). */
	void (*linear)(float *c, const void *act, uint32_t n, uint32_t in, uint32_t out,
		       const struct kvp_dense *d);
	/* act = LayerNorm(c), and SiLU of that if asked. */
	void (*norm)(void *act, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm, bool silu);
	/* scores = out . SiLU(LayerNorm(c)) + bias */
	void (*finish)(float *scores, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm,
		       const float *out, float bias);
};

extern const struct kvp_isa kvp_avx2, kvp_avx512_fp32, kvp_avx512_bf16;

/*
 * The isa that cfg->isa names and this CPU has; NULL names the fastest.
 * Names: "ref", "avx2", "avx512" (with bf16 dot products where the CPU has
 * them), "avx512-fp32", "avx512-bf16". *ret NULL is the scalar reference.
 * -EINVAL (no such isa) or -ENOTSUP (not on this CPU), with one line in err.
 */
int kvp_isa_find(const struct kvp_isa **ret, const char *name, char *err, size_t errsize);

/* The scalar fp32 reference, straight from the file's tensors. Same contract as policy_ops.score. */
int kvp_ref_score(const struct weights *w, enum row_dtype dtype, const struct policy_batch *b, float *scores);

/* Absolute position of row i. */
static inline uint32_t batch_pos(const struct policy_batch *b, uint32_t i)
{
	return b->pos ? b->pos[i] : b->first_pos + i;
}

/* clang's __builtin_cpu_supports() does not know it. */
static inline bool cpu_has_f16c(void)
{
	unsigned a, b, c, d;

	return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
