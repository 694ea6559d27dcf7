/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Forward and backward of one lane's network (policy/weights.h, kinds KVP and
 * POSITION) on the CPU: linears by sgemm, the rest by the loops of kern.h.
 * Parameters and gradients are vectors of net.params floats in the order of the
 * weight file.
 */
#include "policy/train/kern.h"
#include "policy/weights.h"

struct net {
	struct weights_header h;
	struct weights_layout layout;
	size_t at[WEIGHTS_MAX_TENSORS]; /* where a tensor starts, in floats */
	size_t params;
	uint32_t in; /* of the first hidden layer */
	const struct kern *kern;
};

/* -EINVAL: a kind that has no network, or widths beyond their limits; one line in err. */
int net_init(struct net *ret, const struct weights_header *shape, char *err, size_t errsize);

/* Is this tensor a matrix of a linear, which weight decay is for? */
bool net_decays(const struct net *n, uint32_t tensor);

/*
 * Starting parameters, the same for the same seed and lane: matrices uniform within 1 / sqrt(inputs), the last
 * one a tenth of that; LayerNorm gains 1; the position table within 0.1; all else 0.
 */
void net_random(const struct net *n, uint64_t seed, uint32_t lane, float *params);

/*
 * Tables over log-spaced knots, for use beyond the places of training: knots past the last one at or before
 * `farthest`, the longest distance and position trained on, were never or hardly moved from where they started,
 * and take its values instead. Tables by position alone (TABLE) stay as published.
 */
void net_flatten(const struct net *n, uint32_t farthest, float *params);

/* Activations of up to `rows` rows; one thread's. */
struct net_work {
	uint32_t rows;
	float *k, *v; /* [rows][k_dim], [rows][v_dim]: the caller's input */
	/* internal */
	uint32_t n;
	float lambda;
	float *hat_k, *hat_v, *hat_p, *x, *hat_1, *h1, *hat_2, *h2, *f;
	float *rstd[5]; /* k, v, p, 1, 2 */
	float *dx, *dh, *d1, *df;
	uint32_t *dist_knot, *pos_knot;
	float *dist_part, *pos_part; /* how far towards the next knot */
	void *memory;
};

int net_work_new(struct net_work **ret, const struct net *n, uint32_t rows); /* -ENOMEM */
void net_work_free(struct net_work *w);

/* scores[rows] of rows at positions pos[rows] of a prompt of `prompt` rows, K and V in w. */
void net_forward(const struct net *n, struct net_work *w, const float *params, uint32_t rows,
		 const uint32_t *pos, uint32_t prompt, float *scores);
/* After that forward: add the gradient of sum(dscore * scores) to grad. */
void net_backward(const struct net *n, struct net_work *w, const float *params, const float *dscore,
		  float *grad);
