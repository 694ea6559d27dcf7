/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Evaluating every policy on every cut of a set, on threads that each take one
 * layer of one document at a time. Internal to policy/eval.
 */
#include "policy/eval/output.h"
#include "policy/eval/rivals.h"
#include "policy/eval/set.h"

struct eval_job {
	const struct eval_set *set;
	const struct rivals *rivals;
	const bool *lane_on;     /* [lanes of the model] */
	const uint32_t *lane_at; /* [lanes of the model] place in the table */
	const float *gram;       /* [lanes][wide][wide], or NULL: no output errors */
	uint32_t error_queries;  /* sampled future queries of a cut, at most OUTPUT_QUERIES; 0: no output errors
				  */
	uint32_t threads;
	bool quiet; /* no progress on stderr */
	const char *what;
	struct eval_table *table; /* filled */
};

/* GRAM of every lane from a model's trace. *ret is the caller's to free. -EINVAL: another model's. */
int eval_load_gram(float **ret, const char *path, const struct trace_header *like, char *err, size_t errsize);
/* Runs to the end or to the first error (one line in err). */
int eval_run(const struct eval_job *j, char *err, size_t errsize);

/* ---- what the threads of eval_run() share; the rest is one thread's ------------------------------ */

struct eval_worker {
	const struct eval_job *job;
	struct attn_scratch attn;
	struct output out;
	bool has_q;
	char *raw_k, *raw_v, *raw_q; /* of a layer's heads, of a head: as in the file */
	float *k, *v, *q;            /* [heads][rows][k_dim], [rows][v_dim], [heads][group][rows][k_dim] */
	float *vnorm, *knorm;        /* [rows] of a lane */
	float *contrib;              /* [rows] VNORM of the file */
	float *umax, *umean;         /* [cuts][rows] of a lane */
	float *value;                /* [rows] UMEAN * VNORM of a cut */
	float *mean;                 /* [rows] of four continuations */
	float *last, *h2o;           /* [cuts][rows] by distinct prompt: of the layer, of a lane */
	float *score;                /* [rows] */
	uint32_t *order;             /* [policies][rows] */
	uint32_t *best, *scratch;    /* [rows], [2 * rows] */
	uint32_t *prompt;            /* [cuts] distinct prompts of the document, ascending */
	uint32_t prompts;
	void *memory;
	char *err; /* [errsize], the thread's own */
	size_t errsize;
};
int eval_worker_init(struct eval_worker *w, const struct eval_job *j, char *err, size_t errsize);
void eval_worker_done(struct eval_worker *w);
/* Everything of one layer of one document. */
int eval_layer(struct eval_worker *w, uint32_t doc, uint32_t layer);
/* One lane of it, after its rows are loaded. */
int eval_lane(struct eval_worker *w, uint32_t doc, uint32_t layer, uint32_t head);
