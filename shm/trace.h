/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The .kvtr trace file: what one sequence's attention heads saw, for training
 * and evaluation. Flat, little-endian, one file per sample (or, with rows = 0,
 * what belongs to the model and not to a sample). The layout and the writer
 * are here because the client library records and the policy room reads.
 *
 *    0       512 bytes: struct trace_header
 *    512     chunks, each from the next multiple of 64, zeros between
 *    table_off   struct trace_chunk[chunks], to the end of the file
 *
 * Every chunk is found through the table and carries its own CRC32C, so one
 * lane of one sample is read, or mapped, and checked without touching the rest.
 * A lane is layer * heads + head. Shapes, T = rows, P = a cut's prompt:
 *
 *    CUTS    one, struct trace_cut[cuts]
 *    TOKENS  one, u32[T]
 *    K, V    per lane, [T][k_dim], [T][v_dim] of dtype; keys as `keys` says
 *    Q       per lane, [group][T][k_dim] of dtype, after RoPE: its group's queries
 *    UMAX    per cut and lane, f32[P]: sum over the cut's future queries t of max over the group of A[t][j]
 *    UMEAN   per cut and lane, f32[P]: the same with the mean over the group
 *    VNORM   per lane, f32[T]: mean over the group of |W_o,h v_j|, what a row's value contributes
 *    GRAM    per lane, f32[group * v_dim][group * v_dim]: W_o' W_o of the group's columns of the
 *            layer's output projection, so that |W_o x|^2 = x' GRAM x; in the model's file only
 *
 * A[t][j] is softmax over the whole causal cache of q_t . k_j / sqrt(k_dim), future queries those of rows
 * P ... P + queries - 1 (Moschella et al., arXiv 2602.10238). A file has Q, or UMAX and UMEAN for every
 * cut, or both.
 */
#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#define TRACE_MAGIC "KVTRACE1"
#define TRACE_VERSION 1u
#define TRACE_HEADER 512u
#define TRACE_ALIGN 64u
#define TRACE_MAX_CUTS 64u
#define TRACE_MAX_ROWS (1u << 20)
#define TRACE_MAX_LAYERS 256u
#define TRACE_MAX_LANES 1024u
#define TRACE_MAX_GROUP 256u
#define TRACE_MAX_DIM 1024u

enum trace_kind {
	TRACE_CUTS = 1,
	TRACE_TOKENS,
	TRACE_K,
	TRACE_V,
	TRACE_Q,
	TRACE_UMAX,
	TRACE_UMEAN,
	TRACE_VNORM,
	TRACE_GRAM,
	TRACE_KINDS
};
enum trace_dtype { TRACE_F32 = 1, TRACE_F16 = 2, TRACE_BF16 = 3 };                  /* equals enum row_dtype */
enum trace_rope { TRACE_ROPE_NONE = 0, TRACE_ROPE_HALF = 1, TRACE_ROPE_PAIRS = 2 }; /* enum weights_rope */
enum trace_keys { TRACE_KEYS_CACHED = 0 /* after RoPE */, TRACE_KEYS_UNROTATED = 1 }; /* enum weights_keys */
enum trace_split { TRACE_TRAIN = 0, TRACE_VALID = 1, TRACE_TEST = 2, TRACE_CALIB = 3 };

struct trace_header {
	char magic[8];
	uint32_t version, header_size;
	uint64_t file_size, table_off; /* bytes */
	uint32_t chunks;
	uint32_t crc;                  /* CRC32C of the header, this field taken as zero, then of the table */
	char model[64];                /* NUL-padded, as in the weight file */
	char source[96];               /* document the text came from: splits and bootstrap clusters go by it */
	char domain[24];               /* "prose", "code", "chat", "task", ... */
	char task[24];                 /* name of the task; empty: a plain continuation */
	uint32_t layers, heads, group; /* KV heads per layer, query heads per KV head */
	uint32_t k_dim, v_dim;         /* elements of a row */
	uint32_t dtype, rope_type;
	float rope_theta;
	uint32_t keys;
	uint32_t rows, cuts;
	uint32_t split; /* enum trace_split */
	uint64_t seed;  /* of whoever drew the sample; 0: none */
	uint8_t reserved[208];
};
static_assert(sizeof(struct trace_header) == TRACE_HEADER, "layout is the format");
static_assert(offsetof(struct trace_header, model) == 40, "layout is the format");
static_assert(offsetof(struct trace_header, layers) == 248, "layout is the format");
static_assert(offsetof(struct trace_header, seed) == 296, "layout is the format");

enum {
	TRACE_CUT_BEFORE = 1, /* the question comes after the cut: it was not seen at eviction */
	TRACE_CUT_BRANCH = 2, /* the future is not rows of this file but another continuation: utilities only */
};

struct trace_cut {
	uint32_t prompt;  /* P: rows [0, P) are ranked; 1..rows */
	uint32_t queries; /* future queries that the utilities sum over, >= 1 */
	uint32_t context; /* cuts of a file with equal context and prompt are independent continuations */
	uint32_t flags;   /* TRACE_CUT_* */
};
static_assert(sizeof(struct trace_cut) == 16, "layout is the format");

struct trace_chunk {
	uint32_t kind, lane, cut; /* lane and cut are 0 where the kind has none */
	uint32_t crc;             /* CRC32C of the bytes */
	uint64_t off, bytes;
};
static_assert(sizeof(struct trace_chunk) == 32, "layout is the format");

/*
 * Are model ... reserved within their limits? Text is NUL-padded and has no control characters; a file without
 * rows has no cuts. 0, or -EINVAL and in err one line with field, offset, value and limit.
 */
int trace_check_header(const struct trace_header *h, char *err, size_t errsize);
/* The same for cut number `i`: 1 <= prompt <= rows, and what is no BRANCH has its queries in the file. */
int trace_check_cut(const struct trace_header *h, const struct trace_cut *cut, uint32_t i, char *err,
		    size_t errsize);
/* "K", "UMAX", ...; NULL for what is no kind. */
const char *trace_kind_name(uint32_t kind);
/* Has this kind a chunk per lane, and per cut? */
int trace_kind_lanes(uint32_t kind);
int trace_kind_cuts(uint32_t kind);
/* Bytes that a chunk of this kind must have in a file with this header (cut: for UMAX and UMEAN, else NULL); 0:
 * such a file has no such chunk. */
uint64_t trace_chunk_bytes(const struct trace_header *h, uint32_t kind, const struct trace_cut *cut);

/*
 * Writer. Chunks go to a temporary file beside `path` in the order given; finish()
 * writes table and header and renames. Not thread-safe; blocks on I/O.
 */
struct trace_writer;

/*
 * The caller fills model ... seed of `h`; sizes, table and checksums are filled in, and the CUTS chunk is
 * written. cuts: h->cuts of them, copied. The file's mode is 0600: a trace holds what was said. -EINVAL: a
 * field is out of its limits (one line in err), or the error of open.
 */
int trace_writer_open(struct trace_writer **ret, const char *path, const struct trace_header *h,
		      const struct trace_cut *cuts, char *err, size_t errsize);
/* The bytes of one chunk, whose size follows from the header. -EINVAL (no such lane or cut, written before), or
 * of write. After an error only abort() is of use. */
int trace_writer_chunk(struct trace_writer *w, uint32_t kind, uint32_t lane, uint32_t cut, const void *data);
/* Bytes that the chunks of this kind (and cut) have in the file; 0: there can be none. */
uint64_t trace_writer_bytes(const struct trace_writer *w, uint32_t kind, uint32_t cut);
/* Bytes of the file so far. */
uint64_t trace_writer_size(const struct trace_writer *w);
/* Complete and rename; frees w whatever is returned. sync: fsync first. */
int trace_writer_finish(struct trace_writer *w, int sync);
/* Remove what was written; NULL is fine. */
void trace_writer_abort(struct trace_writer *w);
