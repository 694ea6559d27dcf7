/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What recall keeps of one sequence on the GPU, and how it searches: plain arguments, no connection. One thread
 * at a time; everything is launched on the caller's stream and nothing waits. GPU memory that became too small
 * is kept until the end, for the stream may still use it: it doubles, so that is less than what is in use.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "ipc/cuda/direct.h"

/* What stays the same. */
struct find_shape {
	const struct cuda_lane *lane; /* [lanes], bytes of rows; the maker's, outlives the index */
	uint32_t lanes, max_rows;
	uint32_t slots; /* rows of a lane that the device tier can hold */
	uint32_t dtype; /* enum kvtier_dtype, not opaque */
};
/* Which rows are on the device: bits of positions below `end`; what lies at and past it is. */
struct find_resident {
	const uint64_t *bits; /* host, [lanes][words]; copied */
	uint32_t words, end;
};
/* One search, by its layer's lanes; as kvtier_cuda_recall() has it, defaults filled in. */
struct find_query {
	uint32_t first, heads; /* lanes */
	uint32_t group, n_queries;
	uint32_t rows, probe, before, after;
	bool mass;
	float scale;              /* 0: 1 / sqrt(elements of a key) */
	const uint32_t *resident; /* [heads] rows on the device that count into the mass; NULL: none */
	uint64_t queries, token_stride, head_stride;
	uint64_t k, v, k_head_stride, v_head_stride;
	uint32_t k_row_stride, v_row_stride;
	uint64_t counts, positions;
};

/* A block of GPU memory that only grows. */
struct find_mem {
	uint64_t addr, bytes;
};
struct find_stage;
/* What the caller knows of residency, and compares: the newest plan, the epoch, the end. */
struct find_version {
	uint64_t plan;
	uint32_t epoch, end;
};
struct cuda_recall {
	struct kvtier_cuda *g;
	struct find_shape shape;
	uint32_t max_dim;
	struct find_index ix;
	uint32_t slots;              /* of the directory that ix has room for */
	uint32_t pages, longest;     /* pages that are listed; of the lane with most */
	bool marked;                 /* there is something to search in */
	struct find_version version; /* when it was marked; the caller's */
	struct find_mem fixed, paged, listed, residents, scratch, *old;
	uint32_t n_old;
	struct find_stage *stage; /* host memory that the GPU reads */
	uint32_t n_stages;
	struct find_fresh *fresh; /* being filled, in the stage `filling` */
	uint32_t n_fresh, filling;
	void *stream;          /* while preparing */
	struct find_args last; /* the last search, for tests */
};

/* KVT_E_NOMEM, KVT_E_INVAL (rows whose keys cannot be searched: the line says why), GPU. */
int find_new(struct kvtier_cuda *g, const struct find_shape *shape, struct cuda_recall **ret);
/*
 * Bring the index up to date with the directory and with what is resident. lane: device address of struct
 * cuda_lane [lanes]. resident NULL: as before. KVT_AGAIN: pages move faster than they can be looked at.
 */
int find_prepare(struct cuda_recall *f, struct cuda_direct *d, const struct find_resident *resident,
		 uint64_t lane, void *stream);
/* The same when only what is resident changed. After a find_prepare(). */
int find_mark(struct cuda_recall *f, const struct find_resident *resident, void *stream);
/* Launch one search. lane as above: where rows are now. */
int find_launch(struct cuda_recall *f, const struct find_query *q, uint64_t lane, void *stream);
/* Room for so many bytes, the old ones lost. */
int find_grow(struct cuda_recall *f, struct find_mem *m, uint64_t bytes);
/* The GPU has done everything. NULL is fine. */
void find_end(struct cuda_recall *f);
