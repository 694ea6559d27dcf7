/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Traces as a training set: which documents, which of their rows, and the way
 * of keys, values and utilities from the files into a backend. Everything is decided
 * (and refused) in set_plan(), which reads headers only.
 */
#include "policy/trace.h"
#include "policy/train/backend.h"

enum set_utility {
	SET_MAX = 0,  /* UMAX: the published one */
	SET_MEAN = 1, /* UMEAN */
	SET_VALUE =
		2, /* UMEAN weighted by what the row's value contributes: VNORM over its mean in the document */
};

struct set_opts {
	const char *dir;
	uint32_t splits;   /* bits 1 << enum trace_split */
	uint32_t doc_rows; /* most stored rows of a document */
	uint32_t limit;    /* most documents of a split; 0: all */
	enum set_utility utility;
	uint32_t keep_means; /* bits of splits whose UMEAN per query stays on the host (struct set_unit.mean) */
	uint32_t lane_first, lanes;
	uint32_t threads;
	uint64_t seed;
};

struct set_doc {
	char *path;
	uint32_t split, rows; /* of the file */
	uint32_t stored;      /* of them in the set */
	uint32_t *pos;        /* [stored] ascending */
};

struct set_unit {
	uint32_t doc, cut;
	uint32_t split, prompt, queries;
	uint32_t rows; /* stored rows that a ranking may contain: not of the protected first and last */
	uint32_t salt; /* of the rows drawn from it: by the document's file name and the cut */
	float *mean;   /* [lanes][rows] UMEAN / queries, when kept */
};

struct set {
	struct set_opts o;
	struct trace_header model; /* of the first file: name, dims, rope */
	uint64_t digest;           /* of what the files contain and of the rows chosen */
	uint32_t docs, units;
	struct set_doc *doc;
	struct set_unit *unit;
	double *vnorm;                /* [docs][lanes] mean VNORM, where it was read; else 0 */
	struct train_set_shape shape; /* points into what follows */
	uint32_t *doc_rows, *unit_doc, *unit_rows, *unit_prompt;
	const uint32_t **doc_pos;
};

/*
 * Find the traces, check that they are of one shape and have what the utility needs,
 * and choose rows. Units of fewer than 32 rows are left out. o->dir is kept, not
 * copied. 0, -EINVAL (shapes differ, a chunk is missing, nothing found), -EBADMSG,
 * -ENOMEM or of reading, with one line in err.
 */
int set_plan(struct set **ret, const struct set_opts *o, char *err, size_t errsize);
void set_free(struct set *s);

/*
 * Read all documents into a backend opened with s->shape for s->o.lanes lanes; NULL (only for shapes that
 * read no rows) keeps the means alone. Calls progress(arg, docs done, docs) now and
 * then from this thread; a return other than 0 stops with -EINTR. Errors as set_plan().
 */
int set_load(struct set *s, struct train_backend *b, const struct weights_header *shape,
	     int (*progress)(void *arg, uint32_t done, uint32_t docs), void *arg, char *err, size_t errsize);

/* IEEE 754 binary16, to nearest even; beyond its range, the largest finite value. NaN becomes 0. */
uint16_t float_half(float f);

/*
 * Batches. Training: `batch` units of a split a step, in shuffled epochs without
 * replacement, of each up to `rows` rows without replacement. A step's batch depends on
 * seed and step alone. The arrays belong to the sampler and hold until its next call.
 */
struct sampler {
	const struct set *set;
	uint64_t seed, epoch;
	uint32_t batch, rows;
	uint32_t *pool, pool_n; /* units of the split, in the order of the epoch */
	uint64_t *key;
	uint32_t *unit, *n, *row;
	struct train_batch t;
};

int sampler_new(struct sampler **ret, const struct set *s, uint32_t split,
		const struct train_opts *o); /* -ENOMEM */
void sampler_free(struct sampler *p);
const struct train_batch *sampler_step(struct sampler *p, uint64_t step, float lr);
/* Evaluation: units [from, from + batch) of the split in their order, with rows that are always the same; NULL
 * past the end. */
const struct train_batch *sampler_fixed(struct sampler *p, uint32_t from);
