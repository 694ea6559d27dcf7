/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The CUDA backend, inside. One step, for a group of lanes at a time (as many as
 * device memory lets be resident):
 *
 *    gather K, V (fp16) -> kv      z0 = kv [Wk Wv]^T    x  = [LN z0; LN pos]
 *    z1 = x W1^T                   h1 = SiLU LN z1      z2 = h1 W2^T
 *    f  = W3 SiLU LN z2            s  = f_0 + phi_0 + f_1 phi_1
 *    objective -> ds, and backwards; gradients overwrite what is not needed again:
 *    z2 <- dz2, h1 <- dh1, z1 <- dz1, x <- dx, z0 <- dz0
 *
 * Storage is fp32, products of matrices are TF32 (fp32 with KVT_TRAIN_MATH=fp32), the rest is fp32 with sums in
 * fp64 where they are long. Every sum has one order: nothing is added atomically, so a run repeats bit by bit
 * on one device. Rows of the batch's units follow each other without gaps, padded at the end of a lane to a
 * multiple of ROWS_PAD with rows of zero gradient.
 *
 * One stream; step() waits for the device only to reuse a staging buffer two steps old, or for losses.
 */
extern "C" {
#include "policy/train/backend.h"
}
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <mutex>

#define WARP 32u
#define BLOCK 256u
#define WARPS (BLOCK / WARP)
#define SPLITS 8u         /* parts of the rows that weight gradients are first summed over */
#define ROWS_PAD 512u     /* SPLITS * 64 */
#define COLUMN_BLOCKS 64u /* blocks of a lane that first sum the columns of LayerNorm's gradients */
#define ITEM_ROWS 128u    /* rows of a knot that one warp sums */
#define NORM_BLOCKS 32u
#define MAX_SEGMENTS 6u

/* What kernels need of the shape. off: floats from the start of a lane. */
struct net {
	uint32_t kind, kd, vd, proj, pos_dim, hidden, in, rank;
	uint32_t pos_knots;               /* of pos, or of POSITION's index */
	uint32_t dist_knots, dist_tables; /* 0 knots: none */
	uint32_t off[WEIGHTS_MAX_TENSORS];
	uint32_t params;
	uint32_t stride; /* floats from lane to lane, a multiple of 64 */
	bool round;      /* operands of products to TF32, to nearest (the units only cut) */
};

/* The batch's rows by knot: those of item i are order[first[i] ... first[i + 1]), all of one knot, whose items
 * are knot[k] ... knot[k + 1). */
struct buckets {
	const uint32_t *order, *first, *knot;
	uint32_t items, knots;
};

/* A batch on the device. The value between knots k and k + 1 is (1 - frac) [k] + frac [k + 1]. */
struct rows {
	uint32_t units, count, padded, most; /* most: rows of the largest unit */
	const uint32_t *set_row, *u_row;     /* in a lane's set */
	const uint32_t *pos_knot, *dist_knot;
	const float *pos_frac, *dist_frac, *lambda;
	const uint32_t *start, *n; /* of a unit */
	struct buckets pos, dist;
};

struct unit_cost {
	double best, random;
	float mean; /* u */
	uint32_t counted;
};

struct segment {
	uint32_t src, dst, len; /* column of the partial sums, place in the lane's gradient */
};
struct segments {
	struct segment s[MAX_SEGMENTS];
	uint32_t count;
};

#define UPLOAD_SLOTS 2u
#define LOADERS 16u
#define LOADER_BYTES ((size_t)4 << 20)

struct loader {
	void *pinned;
	cudaStream_t stream;
	bool busy;
};

struct cuda_backend {
	struct train_backend base;
	struct train_opts o;
	struct net net;
	uint32_t docs, units;
	const uint32_t *unit_rows, *unit_prompt, *unit_doc, *doc_rows;
	const uint32_t *const *doc_pos;
	uint64_t *doc_base, *unit_base; /* first row of a document, first utility of a unit, in a lane */
	uint64_t set_rows, set_units;   /* per lane */
	float *log2_of;                 /* [highest position or prompt + 1]: log2(1 + x) */
	uint32_t group;                 /* lanes at a time */
	uint32_t capacity;              /* padded rows of the largest batch */

	cudaStream_t stream;
	cublasHandle_t blas;
	cublasComputeType_t math;
	void *workspace;

	uint16_t *k, *v; /* fp16 [lanes][set_rows][k_dim] */
	float *u;        /* [lanes][set_units] */
	float *param[4]; /* by enum train_which: [lanes][net.stride] */
	float *grad;     /* [lanes][net.stride] */

	/* of a group: [group][padded][...] */
	float *kv, *z0, *x, *z1, *h1, *z2;
	float *s, *ds, *f1, *phi1;
	float *part; /* partial sums */
	struct unit_cost *cost;
	double *unit_loss; /* [group][batch] */
	double *reward;    /* [group][batch][perms] */
	double2 *hard;     /* [group][batch] regret, ratio */
	double *norm;      /* [lanes][NORM_BLOCKS] */
	float *loss;       /* [lanes] */
	double *inverse;   /* [group] 1 / counted units, 0: none */

	uint32_t *upload, *pinned[UPLOAD_SLOTS];
	size_t upload_words;
	cudaEvent_t uploaded[UPLOAD_SLOTS];
	uint32_t slot;
	struct rows rows;
	uint32_t *count_scratch;
	float *loss_host;            /* pinned [lanes] */
	struct unit_cost *cost_host; /* pinned [group][batch] */
	double2 *hard_host;

	std::mutex lock; /* of loader[].busy and of error while rows are put */
	struct loader loader[LOADERS];
	void *owned[48]; /* device memory */
	uint32_t owned_count;
	int failed; /* sticky: the first failure of the call in progress */
	char error[256];
};

/* Remember the first failure; every later launch of the call is skipped. */
void cuda_fail(struct cuda_backend *b, int error, const char *what, const char *why);
bool cuda_ok(struct cuda_backend *b, cudaError_t e, const char *what);
bool blas_ok(struct cuda_backend *b, cublasStatus_t e, const char *what);

#ifndef KERNEL_LAUNCH
#define KERNEL_LAUNCH(fn, grid, block, shared, stream, ...) fn<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif
#define LAUNCH(b, kernel, grid, shared, ...)                                                                   \
	do {                                                                                                   \
		if (!(b)->failed) {                                                                            \
			auto launch_fn = kernel;                                                               \
			KERNEL_LAUNCH(launch_fn, grid, BLOCK, shared, (b)->stream, __VA_ARGS__);               \
			cuda_ok(b, cudaGetLastError(), #kernel);                                               \
		}                                                                                              \
	} while (0)

/* batch.cu: checks a batch and sends it to the device. 0 or -EINVAL, -EIO. */
int batch_upload(struct cuda_backend *b, const struct train_batch *t);
size_t batch_words(const struct train_opts *o);
uint32_t batch_capacity(const struct train_opts *o);

/* net.cu: scores of lanes [lane0, lane0 + lanes) from `params`, and the gradient from ds. */
void net_forward(struct cuda_backend *b, const float *params, uint32_t lane0, uint32_t lanes);
void net_backward(struct cuda_backend *b, uint32_t lane0, uint32_t lanes);
size_t net_part_floats(const struct train_opts *o, const struct net *n); /* of b->part, per lane */

/* score.cu: z2 (or, for kind POSITION, the tables alone) to s, and ds to dz2 and the outgoing layer's
 * gradients; params and grad of the first of `lanes`. */
void score_position(struct cuda_backend *b, const float *params, uint32_t lanes);
void score_forwards(struct cuda_backend *b, const float *params, uint32_t lanes);
void score_backwards(struct cuda_backend *b, const float *params, float *grad, uint32_t lanes);

/* product.cu: y = x W^T, dx = dy W, and W's gradient. Widths and lds in floats, w in a lane's parameters. */
void product_forward(struct cuda_backend *b, const float *w, uint32_t in, uint32_t out, const float *x,
		     uint32_t xld, float *y, uint32_t yld, uint32_t lanes);
void product_input(struct cuda_backend *b, const float *w, uint32_t in, uint32_t out, const float *dy,
		   uint32_t dyld, float *dx, uint32_t dxld, uint32_t lanes);
void product_weight(struct cuda_backend *b, float *dw, uint32_t in, uint32_t out, const float *x, uint32_t xld,
		    const float *dy, uint32_t dyld, uint32_t lanes);
/* Sums `parts` rows of `cols` partial sums per lane into the lanes' gradients. */
void sum_parts(struct cuda_backend *b, const float *part, uint32_t parts, uint32_t cols, float *grad,
	       const struct segments *to, uint32_t lanes);

/* tables.cu: what depends on position alone. */
void tables_gradient(struct cuda_backend *b, float *grad, uint32_t lanes);
void embed_gradient(struct cuda_backend *b, float *grad, uint32_t lanes);
size_t tables_part_floats(const struct train_opts *o, const struct net *n);

/* objective.cu, sampled.cu: b->s to b->ds and losses, or to hard rankings' regret and ratio (of unit costs). */
void objective_costs(struct cuda_backend *b, uint32_t lane0, uint32_t lanes);
void objective_run(struct cuda_backend *b, uint64_t step, uint32_t lane0, uint32_t lanes);
void objective_hard(struct cuda_backend *b, uint32_t lane0, uint32_t lanes);
void sampled_run(struct cuda_backend *b, uint64_t step, uint32_t lane0, uint32_t lanes);

/* optimiser.cu: clip, AdamW and EMA of all lanes. */
void optimiser_step(struct cuda_backend *b, uint64_t step, float lr);
