/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * One training run: what was asked for, the state that a checkpoint holds, and
 * the loop of steps, validations and checkpoints. One thread.
 */
#include "policy/train/net.h"
#include "policy/train/set.h"
#include <signal.h>

#define RUN_STOPPED 1 /* a checkpoint was written before the end */

struct run_opts {
	struct train_opts t; /* lanes and shape's model fields are filled in from the traces */
	struct set_opts s;
	const char *device; /* "cpu", "cuda", "auto" */
	const char *out, *base, *csv;
	const char *checkpoint; /* NULL: none */
	bool resume, calibrate, json, quiet;
	uint64_t steps, warmup, validate; /* in steps */
	float lr, lr_min;
	double every, stop_after; /* seconds; 0: never */
};

struct progress;

struct run {
	struct run_opts o;
	struct set *set;
	struct train_backend *backend;
	struct net net;
	struct sampler *train, *valid;
	struct progress *progress;
	uint64_t step; /* steps done */
	float *best;   /* [lanes][params] parameters of the lowest regret on the valid split so far */
	double *best_regret;
	uint64_t *best_step; /* [lanes] */
	float *curve;        /* [validations][lanes] regret */
	uint64_t validations;
	double seconds;  /* of training, over all parts of the run */
	uint64_t opened; /* ns, when run_open() began */
	char error[320];
};

/* Set by a signal handler: write a checkpoint and stop. */
extern volatile sig_atomic_t run_stop;

/* The backend's operations: "cpu", "cuda" (its shared object is opened), "auto" (cuda when it works). -ENOTSUP.
 */
int run_device(const struct train_backend_ops **ret, const char *name, char *err, size_t errsize);

/*
 * Plan, open and load everything; start or resume. On failure run->error says why and run_close() frees what
 * there is. run_close() on a zeroed struct is fine.
 */
int run_open(struct run *r, const struct run_opts *o);
void run_close(struct run *r);

/* Train to the end: 0; RUN_STOPPED; or an error with a line in run->error. */
int run_train(struct run *r);

/* Mean regret and ratio per lane on a split's fixed batches. score: [lanes]. */
int run_evaluate(struct run *r, struct sampler *p, enum train_which which, struct train_score *score);

/* Round the best parameters as the weight file does, put them into the backend and evaluate them: score[lanes].
 */
int run_round(struct run *r, struct train_score *score);
/*
 * The weight file of the best parameters, calib_size bytes of calibration left zero. Lanes that were not
 * trained come from o.base or are zero. *ret is the caller's to free().
 */
int run_image(struct run *r, uint64_t calib_size, uint8_t **ret);

/* Learning rate of a step: linear from a hundredth over the warm-up, then a cosine to lr_min. */
float run_lr(const struct run_opts *o, uint64_t step);

/*
 * Checkpoint: parameters, moments, EMA, best, curve and step of every lane, with what the run was asked for and
 * CRC32C. Save: through a temporary file, synced. Load: 0; -ENOENT: none; -EINVAL: of another run, run->error
 * names the field; -EBADMSG: damaged.
 */
int checkpoint_save(struct run *r);
int checkpoint_load(struct run *r);
/* Stored rows per document that a checkpoint was made with, or 0: memory may have been another one then. */
uint32_t checkpoint_doc_rows(const char *path);

/* A line on stderr that is drawn again on a terminal, and now and then a line elsewhere. */
struct progress *progress_new(bool quiet);
void progress_free(struct progress *p);
/* Is it time to draw? */
bool progress_due(const struct progress *p);
void progress_draw(struct progress *p, const char *line, double done);
/* End the line that is drawn again, so that something else can be said. */
void progress_break(struct progress *p);
