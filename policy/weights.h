/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The .kvp weight file: flat, little-endian, no pointers, one file per model.
 *
 *    0        8    12   16           24                              56
 *   +--------+----+----+------------+-------------------------------+
 *   | magic  |ver |hdr | total size | SHA-256 of bytes [56, total)  |
 *   +--------+----+----+------------+-------------------------------+
 *   56  model name[64], NUL-padded                                  120
 *   +------+------+------+------+---------+----------+------+------+
 *   |layers|heads |k_dim |v_dim |rope_type|rope_theta| keys | kind | 152
 *   +------+------+------+------+---------+----------+------+------+
 *   |dtype | proj |pos_  |pos_  |pos_dim  | hidden   | rank | dist_| 184
 *   |      |      |kind  |rows  |         |          |      | rows |
 *   +------+------+------+------+---------+----------+------+------+
 *   | lane_off | lane_stride | calib_off | calib_size | octave, 0  | 256
 *   +----------+-------------+-----------+------------+------------+
 *   | lane 0 (layer 0, KV head 0): its tensors, zeros up to         | lane_off = 256
 *   | lane_stride, a multiple of 64                                 |
 *   +----------------------------------------------------------------
 *   | lane 1 ... lane layers * heads - 1                            |
 *   +----------------------------------------------------------------
 *   | calibration: fp32 values, all finite (absent: off = size = 0) | calib_off
 *   +---------------------------------------------------------------+ total size
 *
 * Nothing else fits in: the sections follow each other without gaps and the
 * file ends where the last one does. Words are u32 but for total size, the
 * offsets and sizes (u64) and rope_theta (f32).
 *
 * A lane's tensors follow each other without padding, matrices row-major
 * [out][in] as torch.nn.Linear stores them:
 *
 *   kind 1, KVP (bf16)   in = 2 * proj + pos_dim
 *      wk [proj][k_dim]    bk [proj]    gk [proj]    ok [proj]
 *      wv [proj][v_dim]    bv [proj]    gv [proj]    ov [proj]
 *      pos [pos_rows][pos_dim]          gp [pos_dim] op [pos_dim]
 *      w1 [hidden][in]     b1 [hidden]  g1 [hidden]  o1 [hidden]
 *      w2 [hidden][hidden] b2 [hidden]  g2 [hidden]  o2 [hidden]
 *      w3 [rank][hidden]   b3 [rank]
 *      dist [2 * rank][dist_rows]
 *   b biases of the linears; g and o weight and bias of the LayerNorms. The
 *   published network has proj 256, pos_rows 6000, pos_dim 32, hidden 256 and
 *   465,729 parameters at k_dim = v_dim = 128.
 *
 *   The network yields f_0 ... f_{rank-1} per row, once. With dist_rows > 0 the score of the row that lies
 *   x = n - 1 - position rows before the end of a sequence of n rows is
 *      f_0 + phi_0(x, n) + f_1 phi_1(x, n),     phi_r(x, n) = D_2r(t) + lambda(n) D_2r+1(t),
 *      t = min(octave * log2(1 + x), dist_rows - 1),    lambda(n) = clamp(log2 n, 8, 14) - 11,
 *   D the rows of dist, linear between knots. With pos_kind LOG2 the row's own position enters as
 *   LN(pos[t(position)]), linear between knots as well, t by pos_rows.
 *
 *   kind 2, POSITION (f32)   dist [pos_rows]   index [pos_rows]
 *   kind 3, QFILTER (f32)    f [k_dim]
 */
#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#define WEIGHTS_MAGIC "KVTIERWT"
#define WEIGHTS_VERSION 1u
#define WEIGHTS_HEADER 256u
#define WEIGHTS_DIGESTED 56u /* the digest covers everything from here on */
#define WEIGHTS_ALIGN 64u
#define WEIGHTS_MAX_BYTES (16ull << 30)

enum weights_kind { WEIGHTS_KVP = 1, WEIGHTS_POSITION = 2, WEIGHTS_QFILTER = 3 };
enum weights_dtype { WEIGHTS_F32 = 1, WEIGHTS_BF16 = 3 }; /* values of enum row_dtype */
enum weights_rope { WEIGHTS_ROPE_NONE = 0, WEIGHTS_ROPE_HALF = 1, WEIGHTS_ROPE_PAIRS = 2 };
enum weights_keys { WEIGHTS_KEYS_CACHED = 0 /* after RoPE */, WEIGHTS_KEYS_UNROTATED = 1 };
enum weights_pos {
	WEIGHTS_POS_TABLE = 1, /* LN(pos[min(position, pos_rows - 1)]) */
	WEIGHTS_POS_LOG2 = 2,  /* knots at log2(1 + x), pos_dim (POSITION) or octave (KVP) of them per octave */
};

struct weights_header {
	char magic[8];
	uint32_t version, header_size;
	uint64_t total_size;
	uint8_t digest[32];
	char name[64]; /* model */
	uint32_t layers, heads;
	uint32_t k_dim, v_dim; /* elements of a row */
	uint32_t rope_type;
	float rope_theta;
	uint32_t keys, kind, dtype;
	uint32_t proj, pos_kind, pos_rows, pos_dim, hidden;
	uint32_t rank;      /* static coefficients per row that the network yields; 1: the score itself */
	uint32_t dist_rows; /* KVP: knots of the distance tables; 0: a score does not depend on the distance */
	uint64_t lane_off, lane_stride, calib_off, calib_size; /* bytes */
	uint32_t octave; /* KVP: knots per octave, of pos (when LOG2) and of dist */
	uint8_t reserved1[36];
};
static_assert(sizeof(struct weights_header) == WEIGHTS_HEADER, "layout is the format");
static_assert(offsetof(struct weights_header, digest) == 24, "layout is the format");
static_assert(offsetof(struct weights_header, name) == WEIGHTS_DIGESTED, "layout is the format");
static_assert(offsetof(struct weights_header, layers) == 120, "layout is the format");
static_assert(offsetof(struct weights_header, kind) == 148, "layout is the format");
static_assert(offsetof(struct weights_header, lane_off) == 184, "layout is the format");

enum weights_kvp_tensor {
	KVP_WK,
	KVP_BK,
	KVP_GK,
	KVP_OK,
	KVP_WV,
	KVP_BV,
	KVP_GV,
	KVP_OV,
	KVP_POS,
	KVP_GP,
	KVP_OP,
	KVP_W1,
	KVP_B1,
	KVP_G1,
	KVP_O1,
	KVP_W2,
	KVP_B2,
	KVP_G2,
	KVP_O2,
	KVP_W3,
	KVP_B3,
	KVP_DIST,
	KVP_TENSORS
};
enum { POSITION_DIST, POSITION_INDEX };
enum { QFILTER_F };
#define WEIGHTS_MAX_TENSORS KVP_TENSORS

struct weights_tensor {
	const char *name;
	uint32_t rows, cols;
	uint64_t off; /* bytes from the start of the lane */
};

/* How a lane of the header's kind and widths is laid out. */
struct weights_layout {
	uint32_t count;  /* tensors */
	uint32_t elem;   /* bytes per element */
	uint64_t params; /* elements of a lane */
	uint64_t stride; /* bytes of a lane, padding included */
	struct weights_tensor tensor[WEIGHTS_MAX_TENSORS];
};

/* A file, verified and in private memory. Immutable: any number of threads may read it. */
struct weights {
	struct weights_header h;
	struct weights_layout layout;
	uint32_t lanes;
	uint8_t *image; /* the whole file, owned, 64-byte aligned */
};

/*
 * Read and verify a weight file. Every byte is read from the file once, so a
 * file that changes meanwhile is either the old one, the new one, or refused.
 * Checked: size, magic, version, every header field, SHA-256, every value
 * finite. On failure `err` holds one line with the path, the field, its value
 * and the limit. Returns 0, -EBADMSG (content), -ENOMEM or the error of open
 * and read. Blocks on I/O; any thread.
 */
int weights_load(struct weights **ret, const char *path, char *err, size_t errsize);
/* The same for `size` bytes in memory, which are copied. */
int weights_parse(struct weights **ret, const void *buf, size_t size, char *err, size_t errsize);
void weights_free(struct weights *w);

/* Tensor `t` (an index of the kind's enum) of a lane below w->lanes; elements of layout.elem bytes. */
const void *weights_at(const struct weights *w, uint32_t lane, uint32_t t);

/* Name of a kind for messages, or NULL when there is no such kind. */
const char *weights_kind_name(uint32_t kind);

/*
 * Are the fields that a producer chooses (name, shape, kind, dtype, rope, keys,
 * widths) within their limits? 0, or -EBADMSG with one line in err.
 */
int weights_check_shape(const struct weights_header *h, char *err, size_t errsize);

/* Lay out a lane from h->kind and the widths, which are not checked here. -EINVAL: unknown kind. */
int weights_lay_out(struct weights_layout *ret, const struct weights_header *h);

/*
 * Build a file in memory. The caller fills the name, shape, kind, rope, keys
 * and widths of `h`; the rest (magic, sizes, offsets, dtype) is filled in.
 * Tensors and the calibration section start as zeros: write them through
 * weights_image_at() and h->calib_off, then seal. The image is the caller's to
 * free(). Returns 0, -EBADMSG (a field is out of its limits, one line in err)
 * or -ENOMEM.
 */
int weights_image_new(uint8_t **ret, const struct weights_header *h, uint64_t calib_size, char *err,
		      size_t errsize);
void *weights_image_at(uint8_t *image, uint32_t lane, uint32_t t);
/*
 * Store the digest of a finished image of `size` bytes (at least a header). 0, or -ENOMEM: the library has no
 * memory for one, or none at all, and the image is as it was.
 */
int weights_image_seal(uint8_t *image, uint64_t size);
/* Write an image to `path` through a temporary file beside it, synced, then renamed. 0 or -errno. */
int weights_image_write(const uint8_t *image, const char *path);
/*
 * Fill an unsealed image with the kind's plausible random values (linears
 * scaled by fan-in, LayerNorms near one, an outgoing layer that gives scores of
 * order one): for tests and demonstrations. Deterministic by seed.
 */
void weights_image_random(uint8_t *image, uint64_t seed);
