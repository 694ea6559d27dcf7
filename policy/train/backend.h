/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What trains: one interface to the CPU (OpenBLAS) and CUDA backends. A backend
 * owns the training rows, the parameters and the optimiser's state of `lanes`
 * independent networks of one shape, and advances all of them by one step per
 * call. Everything random is decided outside (batches) or follows from
 * train_noise() alone, so that the backends compute the same thing.
 *
 * The set. A document has rows[d] stored rows (K un-rotated when the shape says
 * so, V; both fp16) at ascending positions pos[d][...], the same in every lane.
 * A unit is one cut of a document: prompt P and, per lane, a utility for each
 * stored row below P (in row order). Protected rows (first 4, last 16 of the prompt)
 * are never in a batch.
 *
 * Parameters of a lane are one fp32 vector: the tensors of the weight file in
 * its order, without padding (weights_lay_out(); offsets / elem).
 *
 * The net, for a row at position p of a prompt of P rows (policy/weights.h):
 *    a = LN(Wk k + bk)   c = LN(Wv v + bv)   e = LN(pos[...])   x = [a; c; e]
 *    h1 = SiLU(LN(W1 x + b1))   h2 = SiLU(LN(W2 h1 + b2))   f = W3 h2 + b3
 *    s = f_0 + phi_0(P - 1 - p, P) + f_1 phi_1(P - 1 - p, P)       LN: eps 1e-5, affine
 * kind POSITION: s = dist[t(P - 1 - p)] + index[t(p)], see policy/position.c.
 */
#include "policy/weights.h"

enum train_objective {
	TRAIN_EXACT = 0,      /* closed-form expected cost under Plackett-Luce */
	TRAIN_RLOO = 1,       /* sampled: `perms` Gumbel permutations of each unit, leave-one-out among them */
	TRAIN_RLOO_BATCH = 2, /* sampled: one permutation per unit, the batch's other units as baseline */
	TRAIN_MSE = 3,        /* (s - log(u / mean u + 1e-4))^2, the rival of the same shape */
};
enum train_reward { TRAIN_REGRET = 0, TRAIN_RATIO = 1 };
enum train_which { TRAIN_PARAMS = 0, TRAIN_EMA = 1, TRAIN_M = 2, TRAIN_V = 3 };

#define TRAIN_PROTECT_FIRST 4u
#define TRAIN_PROTECT_LAST 16u
#define TRAIN_MAX_ROWS 4096u /* of a unit in a batch */
#define TRAIN_MAX_PERMS 16u

/*
 * Cost of a ranking of n rows, rank 1 kept longest: C = sum_j W(rank_j) u_j. W is the budget weighting:
 *    uniform       W(r) = r               (the published cost)
 *    log-uniform   W(r) = log(1 + r / (lo n)) / log(1 + 1 / lo), lo = 0.02
 * (the utility evicted, averaged over budgets b with that density: for log-uniform 1 / (b + lo n). A logarithm
 * clamped between two budgets would leave the exact objective without a gradient where it starts: with equal
 * scores all expected ranks are in the middle, where the clamp is flat). C* sorts by u, C_rand = mean W sum u.
 *    regret = (C - C*) / (C_rand - C*)     ratio = C / max(C*, 1e-8), reward -min(ratio, 200)
 * A unit whose C_rand - C* is below 1e-6 of C_rand, or sum u below 1e-6 per row and query, teaches nothing: its
 * gradient is zero and it is not counted.
 *
 * EXACT: E[rank_j] = 1 + sum_{i != j} sigma(s_i - s_j); loss = (sum_j W(E[rank_j]) u_j - C*) / (C_rand - C*),
 * for uniform W exactly the expected regret under Plackett-Luce. With g_j = u_j W'(E[rank_j]):
 *    d loss / d s_a = sum_j (g_j - g_a) sigma'(s_a - s_j) / (C_rand - C*)
 * RLOO: noise train_noise() per (step, lane, unit, perm, row); ranks by descending s_i - log(-log u_i); the
 * loss is the mean over the unit's n ranking steps of -advantage * log pi's terms, gradient of log pi by prefix
 * sums in fp64; advantages leave-one-out, standardised over the batch of the lane, clipped to [-2, 2]. The loss
 * of a lane is the mean over its counted units.
 *
 * So that backends agree to rounding:
 *    utilities are per future query (u / queries); "per row and query" above is therefore sum u < 1e-6 n.
 *    equal scores, utilities or keys: the row with the lower index ranks first.
 *    train_noise()'s row counts from 0 within the unit's rows of the batch; unit is the slot in the batch.
 *    regret and ratio divide as above; under TRAIN_RATIO the exact loss is min(E[C] / max(C*, 1e-8), 200),
 *    its gradient zero beyond; a sampled reward is -regret or -min(ratio, 200).
 *    advantages: reward less the mean of the unit's other perms (RLOO) or of the batch's other counted units
 *    (RLOO_BATCH, perm 0 only; one unit alone: 0); divided by the sample deviation (count - 1) of the lane's
 *    advantages + 1e-8, no mean taken off, their own being 0; then clipped.
 *    RLOO averages over perms. MSE averages over the unit's rows.
 *    step counts from 0: AdamW corrects its bias with step + 1, the EMA copies while step < ema_start.
 *    clip: gradient * clip / (norm + 1e-6) when norm > clip > 0.
 *    a lane whose loss or gradient norm is not finite keeps parameters, moments and EMA in that step.
 *    a lane with no counted unit has loss 0 and gradient 0.
 */
enum train_weighting { TRAIN_UNIFORM = 0, TRAIN_LOG_UNIFORM = 1 };

struct train_opts {
	struct weights_header shape; /* kind, widths, rank, pos_*, dist_rows, octave, k_dim, v_dim */
	uint32_t lanes;
	uint32_t batch; /* most units in a step */
	uint32_t rows;  /* most rows of a unit, multiple of 64, <= TRAIN_MAX_ROWS */
	uint32_t objective, reward, weighting;
	uint32_t perms;                        /* RLOO: 2..TRAIN_MAX_PERMS */
	float beta1, beta2, eps, weight_decay; /* AdamW, decoupled; decay on matrices (W*) only */
	float clip;                            /* gradient norm, per lane */
	float ema;                             /* decay per step; from step ema_start; before it EMA = params */
	uint32_t ema_start;
	uint64_t seed;
	uint32_t threads; /* CPU backend */
};

/* What the set will hold; arrays stay the caller's and live as long as the backend. */
struct train_set_shape {
	uint32_t docs, units;
	const uint32_t *doc_rows;       /* [docs] */
	const uint32_t *const *doc_pos; /* [docs][doc_rows] */
	const uint32_t *unit_doc;       /* [units] */
	const uint32_t *unit_rows;      /* [units] stored rows of its document below its prompt */
	const uint32_t *unit_prompt;    /* [units] P */
};

/* One step's (or one evaluation's) rows, the same for every lane. */
struct train_batch {
	uint64_t step;
	float lr;
	uint32_t units;       /* <= opts.batch */
	const uint32_t *unit; /* [units] */
	const uint32_t *n;    /* [units] rows of each, >= 2, <= opts.rows */
	const uint32_t *row;  /* [units][opts.rows] ascending indices of the document's stored rows */
};

/* Per lane, summed over the counted units of a call: divide by `counted`. */
struct train_score {
	double regret, ratio;
	uint32_t counted;
};

struct train_backend { /* first member of every backend's own struct */
	const struct train_backend_ops *ops;
};

struct train_backend_ops {
	const char *name; /* "cpu", "cuda" */
	/* Allocates everything that steps will need. -ENOMEM, -ENOTSUP (no device), -EINVAL; one line in err.
	 */
	int (*open)(struct train_backend **ret, const struct train_opts *o, const struct train_set_shape *s,
		    char *err, size_t errsize);
	void (*close)(struct train_backend *b);
	/* Bytes of memory (device memory for CUDA) that a set of this shape would take, to choose its size. */
	uint64_t (*set_bytes)(const struct train_opts *o, const struct train_set_shape *s);
	uint64_t (*memory)(void); /* bytes that a backend may reasonably use now */

	/* Copied. k: fp16 [doc_rows][k_dim], v likewise. Several threads, for different (lane, doc) or (lane,
	 * unit). */
	int (*put_rows)(struct train_backend *b, uint32_t lane, uint32_t doc, const uint16_t *k,
			const uint16_t *v);
	int (*put_utility)(struct train_backend *b, uint32_t lane, uint32_t unit, const float *u);

	/* One thread from here on. Vectors of layout.params floats. */
	int (*get)(struct train_backend *b, enum train_which which, uint32_t lane, float *out);
	int (*set)(struct train_backend *b, enum train_which which, uint32_t lane, const float *in);
	/* Forward, objective, backward, clip, AdamW, EMA. loss: [lanes] or NULL (then nothing is waited for).
	 */
	int (*step)(struct train_backend *b, const struct train_batch *t, float *loss);
	/* The batch's gradient before clipping, [lanes][params], and loss [lanes]; changes nothing. For proofs.
	 */
	int (*gradient)(struct train_backend *b, const struct train_batch *t, float *grad, float *loss);
	/* Regret and ratio of the hard ranking by scores of TRAIN_PARAMS or TRAIN_EMA; added to out[lanes]. */
	int (*evaluate)(struct train_backend *b, enum train_which which, const struct train_batch *t,
			struct train_score *out);
	/* Scores of the batch's rows, [lanes][units][opts.rows]; for proofs and calibration. */
	int (*scores)(struct train_backend *b, enum train_which which, const struct train_batch *t, float *out);
	const char *(*error)(struct train_backend *b); /* line for the last failure of any call above */
};

extern const struct train_backend_ops train_cpu;
/* The CUDA backend is a shared object, kvtier-train-cuda.so, beside the program or in $KVT_LIBDIR, so that one
 * kvtier-train serves hosts with and without a GPU; this is its one exported symbol. */
#define TRAIN_CUDA_SYMBOL "kvtier_train_cuda_ops"
