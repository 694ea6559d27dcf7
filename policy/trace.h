/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Reading .kvtr traces (layout: shm/trace.h), and utilities from queries.
 */
#include "shm/trace.h"

struct trace {
	struct trace_header h;
	struct trace_cut *cut;     /* [h.cuts], owned */
	struct trace_chunk *chunk; /* [h.chunks], owned, sorted by kind, cut, lane */
	char *path;                /* for messages, owned */
	int fd;
};

/*
 * Open and check header, table and cuts: every field within its limits, chunks
 * inside the file, aligned, not overlapping, of the size their kind must have,
 * none twice. Reads nothing else. On failure err holds one line with path,
 * offset, field, value and limit. 0, -EBADMSG (content), or of open and read.
 */
int trace_open(struct trace **ret, const char *path, char *err, size_t errsize);
void trace_free(struct trace *t);

/* The chunk, or NULL when the file has none. */
const struct trace_chunk *trace_find(const struct trace *t, uint32_t kind, uint32_t lane, uint32_t cut);
/*
 * Read one chunk into buf (trace_chunk_bytes() long) and check it. -ENOENT: no such
 * chunk; -EBADMSG: CRC (err names the offset). Threads may read one trace at once.
 */
int trace_read(const struct trace *t, uint32_t kind, uint32_t lane, uint32_t cut, void *buf, char *err,
	       size_t errsize);
/* The same, mapped read-only and checked once: a file cut short later raises SIGBUS. Undo with trace_unmap().
 */
struct trace_view {
	const void *data;
	size_t bytes;
	void *map;
	size_t map_bytes;
};
int trace_map(const struct trace *t, uint32_t kind, uint32_t lane, uint32_t cut, struct trace_view *ret,
	      char *err, size_t errsize);
void trace_unmap(struct trace_view *v);

/* Read every chunk and check it, and that floats are finite. 0 or -EBADMSG with the first offset in err. */
int trace_verify(const struct trace *t, char *err, size_t errsize);

/*
 * Do two headers describe the same model shape (model, layers, heads, group, dims, rope, keys)? 0, or -EINVAL
 * with the differing field and both values in err.
 */
int trace_same_shape(const struct trace_header *a, const struct trace_header *b, char *err, size_t errsize);

/*
 * Files of one split below `dir` (*.kvtr directly in it and in its subfolders train, valid, test, calib),
 * sorted by path; the header's split field decides, files without rows are of no split. *ret is an array of
 * *ret_n strings: free with trace_list_free(). A file that cannot be opened as a trace fails the listing.
 */
int trace_list(char ***ret, uint32_t *ret_n, const char *dir, enum trace_split split, char *err,
	       size_t errsize);
void trace_list_free(char **list, uint32_t n);

/*
 * Utilities of a cut's rows from queries, as UMAX and UMEAN define them, by the
 * file's K and Q of the lane. umax, umean: f32[P], either may be NULL. Scratch is
 * allocated; any thread. -ENOENT without Q, -EINVAL for a BRANCH cut.
 */
int trace_utility(const struct trace *t, uint32_t lane, uint32_t cut, float *umax, float *umean, char *err,
		  size_t errsize);

/*
 * Undo RoPE on n rows of `dim` floats in place; row i is at position pos[i]. Angle of pair p at position m:
 * m * theta^(-2p/dim), frequency and product rounded to float as models do; HALF pairs (p, p + dim/2),
 * PAIRS (2p, 2p + 1). NONE changes nothing. dim is even and at most TRACE_MAX_DIM. Any thread. rope_apply() is
 * the way back.
 */
void rope_apply(float *rows, uint32_t dim, uint32_t n, const uint32_t *pos, enum trace_rope rope, float theta);
void rope_undo(float *rows, uint32_t dim, uint32_t n, const uint32_t *pos, enum trace_rope rope, float theta);
