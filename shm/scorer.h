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
 *   u1 = (Mk k + mk) / sd_k + (Mv v + mv) / sd_v + Wp p(pos) + c        h1 = SiLU(LN1(u1))
 *   u2 = W2 h1 + b2                                                     h2 = SiLU(LN2(u2))
 *   out_r = w3_r . h2 + b3_r,  r < coefs
 *
 *   Mk = W1[:, K part] diag(g_k) W'k,  mk = W1[:, K part] diag(g_k) b'k,  likewise v;
 *   c = b1 + W1 [o_k; o_v; 0] ;  p(pos) is LN of the position's table row (linear between knots when
 *   SCORER_LOG2), gain and offset applied: pos_dim numbers, zero-padded to SCORER_POS_PAD.
 *
 * What makes u1 and u2 is centred as well (Mk, mk, Mv, mv, Wp, c, W2, b2: the mean over the hidden units is
 * removed), so that LN1 and LN2 are u / sqrt(|u|^2 / hidden + 1e-5) * g + o. Their g and o are stored halved:
 * with y = LN(u) / 2, SiLU is y tanh(y) + y.
 *
 * Products take bf16 operands and accumulate in fp32; everything else is fp32.
 * Scores equal those of policy/kvp as closely as its own bf16 kernels do: to half a percent of their spread.
 */
#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define SCORER_FN static inline __host__ __device__
#else
#define SCORER_FN static inline
#endif

#define SCORER_MAGIC 0x31435353544b564bull /* "KVKTSSC1" */
#define SCORER_VERSION 1u
#define SCORER_ALIGN 256u
#define SCORER_MAX_COEFS 2u
#define SCORER_EPS 1e-5f
#define SCORER_POS_PAD 32u

enum scorer_flag {
	SCORER_UNROTATE = 1,   /* keys are stored after RoPE and the network wants them before */
	SCORER_ROPE_PAIRS = 2, /* RoPE turns neighbouring elements, not halves */
	SCORER_LOG2 = 4,       /* position tables have knots at log2(1 + pos), `octave` per octave */
};

/*
 * Tensors of one lane, in this order. Matrices [out][in] are stored as tensor cores take them (scorer_at()): a
 * kernel streams RK to W2 as they lie, in chunks of SCORER_CHUNK, of which every matrix is a multiple.
 */
enum scorer_tensor {
	SCORER_RK,   /* bf16 [k_dim][k_dim]: for every 64 rows, the columns from the diagonal on */
	SCORER_MK,   /* bf16 [hidden][k_dim] */
	SCORER_RV,   /* bf16 [v_dim][v_dim], as RK */
	SCORER_MV,   /* bf16 [hidden][v_dim] */
	SCORER_WP,   /* bf16 [hidden][SCORER_POS_PAD] */
	SCORER_W2,   /* bf16 [hidden][hidden] */
	SCORER_VECS, /* fp32, where scorer_vecs() says */
	SCORER_POS,  /* bf16 [pos_rows][SCORER_POS_PAD]: LOG2: raw rows (interpolated, then normalised); else p
		      */
	SCORER_POS_LN, /* fp32 gain [SCORER_POS_PAD], offset [SCORER_POS_PAD]; used with SCORER_LOG2 */
	SCORER_TENSORS
};

#define SCORER_CHUNK 8192u /* bytes */

struct scorer_hdr {
	uint64_t magic;
	uint32_t version, flags;
	uint64_t bytes; /* of the whole */
	uint64_t id;
	uint32_t layers, heads;    /* lanes = layers * heads, layer by layer */
	uint32_t k_dim, v_dim;     /* 64 or 128, equal */
	uint32_t proj, hidden;     /* hidden: 128 or 256 */
	uint32_t pos_dim, pos_pad; /* pos_pad: SCORER_POS_PAD */
	uint32_t pos_rows, octave;
	uint32_t coefs;
	float rope_theta;
	uint64_t lane_off, lane_stride;      /* of lane 0; of each */
	uint64_t tensor_off[SCORER_TENSORS]; /* within a lane */
	uint64_t tensor_bytes[SCORER_TENSORS];
	/*
	 * SCORER_UNROTATE: uint64_t [k_dim / 2], how far RoPE turns pair i per position: 2^64 is one turn, so
	 * that position * turn is the angle, exact at any position.
	 */
	uint64_t turn_off;
	uint8_t reserved[8];
};
static_assert(sizeof(struct scorer_hdr) == 256, "one unit of alignment");

/*
 * Element (row, col) of a matrix of `rows` rows: slices of 16 columns; in a slice its halves, in a half tiles
 * of 8 rows, in a tile its rows of 8 elements, 16 bytes. Rows and columns are shuffled within each 32, so that
 * the thread of a warp that holds elements 8 t .. 8 t + 7 of 32 finds them in the places where the tensor cores
 * want a thread's operands and leave its results: of column 8 t + 4 s + 2 h + i, s counts slices, h halves;
 * row 8 a + 2 j + b is in tile j.
 */
SCORER_FN size_t scorer_at(uint32_t rows, uint32_t row, uint32_t col)
{
	uint32_t slice = col / 32 * 2 + (col >> 2 & 1), half = col >> 1 & 1,
		 element = (col >> 3 & 3) * 2 + (col & 1), tile = row / 32 * 4 + (row >> 1 & 3),
		 in_tile = (row >> 3 & 3) * 2 + (row & 1);

	return ((size_t)slice * 2 + half) * rows * 8 + tile * 64 + in_tile * 8 + element;
}

/* The same of a triangular matrix [dim][dim]; col at least row / 64 * 64. */
SCORER_FN size_t scorer_tri_at(uint32_t dim, uint32_t row, uint32_t col)
{
	uint32_t panel = row / 64, before = panel ? dim / 16 : 0; /* slices; there are at most two panels */

	return (size_t)before * 16 * 64 + scorer_at(64, row % 64, col - panel * 64);
}

/* Where the vectors of a lane lie in SCORER_VECS, in floats. */
struct scorer_vecs {
	uint32_t rk, rv;         /* [dim] */
	uint32_t mk, mv, c;      /* [hidden], as all below */
	uint32_t g1, o1;         /* halved */
	uint32_t b2, g2, o2, w3; /* g2, o2 halved; w3 [SCORER_MAX_COEFS][hidden], zero past coefs */
	uint32_t rest_k, rest_v; /* one float each */
	uint32_t b3;             /* [SCORER_MAX_COEFS] */
	uint32_t floats;         /* of all, a multiple of 64 */
};

SCORER_FN struct scorer_vecs scorer_vecs(uint32_t dim, uint32_t hidden)
{
	struct scorer_vecs s;

	s.rk = 0;
	s.rv = dim;
	s.mk = 2 * dim;
	s.mv = s.mk + hidden;
	s.c = s.mv + hidden;
	s.g1 = s.c + hidden;
	s.o1 = s.g1 + hidden;
	s.b2 = s.o1 + hidden;
	s.g2 = s.b2 + hidden;
	s.o2 = s.g2 + hidden;
	s.w3 = s.o2 + hidden;
	s.rest_k = s.w3 + SCORER_MAX_COEFS * hidden;
	s.rest_v = s.rest_k + 1;
	s.b3 = s.rest_v + 1;
	s.floats = s.rest_k + 64;
	return s;
}

/* All places of a network, from its layers, heads, dimensions and pos_rows: one way to lie, for those who make
 * it and those who check it. */
SCORER_FN void scorer_lay_out(struct scorer_hdr *h)
{
	uint64_t triangle = 2 * (uint64_t)(64 * h->k_dim + (h->k_dim > 64 ? 64 * (h->k_dim - 64) : 0)), off = 0;

	h->tensor_bytes[SCORER_RK] = h->tensor_bytes[SCORER_RV] = triangle;
	h->tensor_bytes[SCORER_MK] = h->tensor_bytes[SCORER_MV] = 2 * (uint64_t)h->hidden * h->k_dim;
	h->tensor_bytes[SCORER_WP] = 2 * (uint64_t)h->hidden * SCORER_POS_PAD;
	h->tensor_bytes[SCORER_W2] = 2 * (uint64_t)h->hidden * h->hidden;
	h->tensor_bytes[SCORER_VECS] = scorer_vecs(h->k_dim, h->hidden).floats * sizeof(float);
	h->tensor_bytes[SCORER_POS] = 2 * (uint64_t)h->pos_rows * SCORER_POS_PAD;
	h->tensor_bytes[SCORER_POS_LN] = 2 * SCORER_POS_PAD * sizeof(float);
	for (int t = 0; t < SCORER_TENSORS; t++) {
		h->tensor_off[t] = off;
		off = (off + h->tensor_bytes[t] + SCORER_ALIGN - 1) / SCORER_ALIGN * SCORER_ALIGN;
	}
	h->turn_off = sizeof(*h);
	h->lane_off = (h->turn_off + h->k_dim / 2 * sizeof(uint64_t) + SCORER_ALIGN - 1) / SCORER_ALIGN *
		      SCORER_ALIGN;
	h->lane_stride = off;
	h->bytes = h->lane_off + h->lane_stride * h->layers * h->heads;
}
