/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The KVP network inside the policy room: one interface to the instruction
 * sets that compute it.
 *
 *     a = LN(Wk k + bk)    c = LN(Wv v + bv)    p = LN(pos[...])
 *     x = [a; c; p] -> (Linear -> LN -> SiLU) twice -> Linear -> f_0 ... f_{rank-1}
 *     score = f_0 + phi_0(distance, n) + f_1 phi_1(distance, n)
 *
 * as policy/weights.h defines it. Rows pass in tiles of up to KVP_TILE: a tile's
 * activations stay in the L2 cache while the weights stream past them once. A
 * row's coefficients do not depend on the rows beside it, to the last bit.
 */
#include "policy/learned.h"
#include <cpuid.h>
#include <math.h>
#include <stdbool.h>

#define KVP_TILE 48 /* rows; a multiple of every kernel's row block */
/*
 * Elements from one row of activations to the next: enough for the widest
 * input (576), and no power of two, which would send all rows to a few cache sets.
 */
#define KVP_LD 608
#define KVP_WIDEST 512 /* widest output of a linear */
#define KVP_ROW 256    /* most elements of a key or value row */
#define KVP_RANK 2     /* most coefficients of a row */
#define KVP_EPS 1e-5f  /* of the LayerNorms */

struct kvp_dims {
	uint32_t k_dim, v_dim, proj, pos_rows, pos_dim, hidden;
	uint32_t in;     /* of the first hidden layer: 2 * proj + pos_dim */
	uint32_t octave; /* knots per octave of pos; 0: one entry per position */
	uint32_t rank;
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
	const float *pos; /* [pos_rows][pos_dim] */
	struct kvp_norm pos_norm;
	const float *out;      /* [rank][hidden] */
	const float *out_bias; /* [rank] */
};

/*
 * Rotations that undo RoPE, in three steps of 128 positions each: a row's is
 * the product of one from each, so that any position below 2^20 costs two
 * complex products and no sine. An entry is cos[dim], then sin[dim] signed so
 * that element i of the original is x_i cos_i + x_partner(i) sin_i.
 */
#define KVP_ROPE_STEP 128u
struct kvp_rope {
	uint32_t type, dim; /* enum weights_rope; NONE: nothing to undo, no tables */
	double *freq;       /* [dim] radians per position */
	float *fine;        /* [KVP_ROPE_STEP][2][dim] position % 128 */
	float *mid;         /* position / 128 % 128 */
	float *coarse;      /* position / 128^2, below 64 */
};
int kvp_rope_init(struct kvp_rope *r, uint32_t type, uint32_t dim, float theta); /* -ENOMEM */
void kvp_rope_done(struct kvp_rope *r);
/* The rotation of position step * 128: base is [2][dim]. */
void kvp_rope_base(const struct kvp_rope *r, uint32_t step, float *base);
/* Element that RoPE pairs with element i. */
static inline uint32_t kvp_rope_partner(const struct kvp_rope *r, uint32_t i)
{
	uint32_t half = r->dim / 2;

	return r->type == WEIGHTS_ROPE_PAIRS ? i ^ 1u : i < half ? i + half : i - half;
}

/*
 * Between two knots of the distance tables phi_r = a[r] + b[r] t, with the
 * tables of one lane already summed for one length of sequence.
 */
struct kvp_segment {
	float a[KVP_RANK], b[KVP_RANK];
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
	/* The same for keys whose RoPE is undone on the way; row i is at pos[i]. */
	void (*unrotate)(void *act, const void *rows, size_t stride, enum row_dtype dtype, uint32_t n,
			 const struct kvp_rope *rope, const uint32_t *pos);
	/* c = act W + bias for n rows, `in` inputs and `out` outputs (a multiple of panel). */
	void (*linear)(float *c, const void *act, uint32_t n, uint32_t in, uint32_t out,
		       const struct kvp_dense *d);
	/* act = LayerNorm(c), and SiLU of that if asked. */
	void (*norm)(void *act, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm, bool silu);
	/* coef[r][i] = out[r] . SiLU(LayerNorm(c_i)) + bias[r] for r < rank */
	void (*finish)(float *const *coef, const float *c, uint32_t n, uint32_t width, struct kvp_norm norm,
		       const float *out, const float *bias, uint32_t rank);
	/*
	 * Scores of n rows at consecutive positions, all in one segment, the first
	 * `distance` rows before the end; per_octave knots per octave. f1 NULL: rank 1.
	 */
	void (*combine)(float *scores, const float *f0, const float *f1, uint32_t n, uint32_t distance,
			float per_octave, const struct kvp_segment *seg);
};

extern const struct kvp_isa kvp_avx2, kvp_avx512_fp32, kvp_avx512_bf16;

/* The distance tables of all lanes; rows 0: the file has none. */
struct kvp_dist {
	uint32_t rows, rank, octave;
	uint32_t *from; /* [rows] first distance at or past each knot */
	float *table;   /* [lanes][2 * rank][rows] */
};
int kvp_dist_init(struct kvp_dist *d, const struct weights *w); /* -ENOMEM */
void kvp_dist_done(struct kvp_dist *d);
/* policy_ops.combine; finite for whatever coefficients. */
void kvp_dist_combine(const struct kvp_dist *d, const struct kvp_isa *isa, const struct policy_batch *b,
		      const float *const *coef, float *scores);

/*
 * The isa that cfg->isa names and this CPU has; NULL names the fastest.
 * Names: "ref", "avx2", "avx512" (with bf16 dot products where the CPU has
 * them), "avx512-fp32", "avx512-bf16". *ret NULL is the scalar reference.
 * -EINVAL (no such isa) or -ENOTSUP (not on this CPU), with one line in err.
 */
int kvp_isa_find(const struct kvp_isa **ret, const char *name, char *err, size_t errsize);

/* The scalar fp32 reference, straight from the file's tensors. Same contracts as policy_ops.coefs and combine.
 */
void kvp_ref_coefs(const struct weights *w, enum row_dtype dtype, const struct policy_batch *b,
		   float *const *coef);
void kvp_ref_combine(const struct weights *w, const struct policy_batch *b, const float *const *coef,
		     float *scores);

/* Where x lies among `rows` knots at log2(1 + x), `octave` of them per octave. rows >= 1. */
static inline float kvp_knot(uint32_t octave, uint32_t rows, uint32_t x)
{
	float t = (float)octave * log2f(1.0f + (float)x), last = (float)(rows - 1);

	return t < last ? t : last;
}

/* How much of the odd distance tables a sequence of n rows takes. */
static inline float kvp_lambda(uint32_t n)
{
	float l = log2f((float)(n ? n : 1));

	return (l < 8.0f ? 8.0f : l > 14.0f ? 14.0f : l) - 11.0f;
}

/* Rows before the end of a sequence of `total`; what is past it counts as its newest row. */
static inline uint32_t kvp_distance(uint32_t total, uint32_t pos)
{
	return total > pos ? total - 1 - pos : 0;
}

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
