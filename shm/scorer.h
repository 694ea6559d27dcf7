/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A KVP network prepared for a GPU: what the daemon hands to a client that scores
 * its own rows (W_SCORER), and what ipc/cuda/score.cu reads. One flat byte string,
 * little-endian, offsets from its start, everything aligned to 256 bytes.
 *
 * The first LayerNorms are folded into the layer behind them. With k the row's key (before RoPE if
 * SCORER_UNROTATE), v its value, and for a LayerNorm of y = W x + b over P units
 * with gain g and offset o: the mean is removed from W and b beforehand (centred: W' = W - mean over
 * units, b' likewise), so that LN(y) = (W'x + b') / sd * g + o, sd^2 = |W'x + b'|^2 / P + 1e-5,
 * and |W'x + b'|^2 = |R x + r|^2 + rest for the R of a QR decomposition of [W' b'] (d x d). Hence
 *
 *   h1 = LN1( (Mk k + mk) / sd_k + (Mv v + mv) / sd_v + Wp p(pos) + c )       LN1 with gain and offset, then
 * SiLU h2 = SiLU(LN2( W2 h1 + b2 ))        out_r = w3_r . h2 + b3_r,  r < coefs
 *
 *   Mk = W1[:, K part] diag(g_k) W'k,  mk = W1[:, K part] diag(g_k) b'k,  likewise v;
 *   c = b1 + W1 [o_k; o_v; 0] ;  p(pos) is LN of the position's table row (linear between knots when
 *   SCORER_LOG2), gain and offset applied: pos_dim numbers, zero-padded to pos_pad.
 *
 * Products take bf16 operands and accumulate in fp32; everything else is fp32.
 * Scores equal policy/kvp's within 1e-2 (bf16 products there and here).
 */
#include <stddef.h>
#include <stdint.h>

#define SCORER_MAGIC 0x31435353544b564bull /* "KVKTSSC1" */
#define SCORER_VERSION 1u
#define SCORER_ALIGN 256u
#define SCORER_MAX_COEFS 2u

enum scorer_flag {
	SCORER_UNROTATE = 1,   /* keys are stored after RoPE and the network wants them before */
	SCORER_ROPE_PAIRS = 2, /* RoPE turns neighbouring elements, not halves */
	SCORER_LOG2 = 4,       /* position tables have knots at log2(1 + pos), `octave` per octave */
};

/* Tensors of one lane, in this order, each aligned to SCORER_ALIGN. Matrices row-major [out][in]. */
enum scorer_tensor {
	SCORER_RK,   /* bf16 [k_dim][k_dim] */
	SCORER_RV,   /* bf16 [v_dim][v_dim] */
	SCORER_MK,   /* bf16 [hidden][k_dim] */
	SCORER_MV,   /* bf16 [hidden][v_dim] */
	SCORER_WP,   /* bf16 [hidden][pos_pad] */
	SCORER_W2,   /* bf16 [hidden][hidden] */
	SCORER_VECS, /* fp32: rk [k_dim], rv [v_dim], {rest_k, rest_v, 1/proj, 0 ...} [64], mk [hidden], mv
			[hidden], c [hidden], g1, o1, b2, g2, o2 [hidden] each, w3 [2][hidden], b3 [64] */
	SCORER_POS,  /* bf16 [pos_rows][pos_pad]: LOG2: raw rows (interpolated, then normalised); else p itself
		      */
	SCORER_POS_LN, /* fp32 gain [pos_pad], offset [pos_pad]; used with SCORER_LOG2 */
	SCORER_TENSORS
};

struct scorer_hdr {
	uint64_t magic;
	uint32_t version, flags;
	uint64_t bytes; /* of the whole */
	uint64_t id;
	uint32_t layers, heads;    /* lanes = layers * heads, layer by layer */
	uint32_t k_dim, v_dim;     /* 64 or 128, equal */
	uint32_t proj, hidden;     /* hidden: 128 or 256 */
	uint32_t pos_dim, pos_pad; /* pos_pad: pos_dim rounded up to 16, at most 32 */
	uint32_t pos_rows, octave;
	uint32_t coefs;
	float rope_theta;
	uint64_t lane_off, lane_stride;      /* of lane 0; of each */
	uint64_t tensor_off[SCORER_TENSORS]; /* within a lane */
	uint64_t tensor_bytes[SCORER_TENSORS];
	uint8_t reserved[16];
};
_Static_assert(sizeof(struct scorer_hdr) == 256, "one unit of alignment");
