/* SPDX-License-Identifier: MIT */
/* Clip, AdamW and EMA, per lane; a lane whose loss or gradient is not finite stays as it is. */
#include "policy/train/cuda/device.cuh"

struct adam {
	float lr, beta1, beta2, eps, decay, fix1, fix2, clip, ema;
	bool average; /* false: the EMA is a copy */
	struct {
		uint32_t from, to;
	} matrix[5]; /* what decays */
};

/* grid (NORM_BLOCKS, lanes) */
static __global__ void squares(struct net net, const float *grad, double *norm)
{
	__shared__ double sums[WARPS];
	uint32_t lane = blockIdx.y;
	double sum = 0;

	grad += (size_t)lane * net.stride;
	for (uint32_t i = blockIdx.x * BLOCK + threadIdx.x; i < net.params; i += NORM_BLOCKS * BLOCK)
		sum += (double)grad[i] * (double)grad[i];
	sum = block_sum(sum, sums);
	if (threadIdx.x == 0)
		norm[(size_t)lane * NORM_BLOCKS + blockIdx.x] = sum;
}

/* grid (NORM_BLOCKS, lanes) */
static __global__ void adam_step(struct net net, struct adam a, const float *grad, const double *norm,
				 const float *loss, float *params, float *ema, float *first, float *second)
{
	uint32_t lane = blockIdx.y;
	size_t base = (size_t)lane * net.stride;
	double length = 0;
	float scale = 1;

	for (uint32_t i = 0; i < NORM_BLOCKS; i++)
		length += norm[(size_t)lane * NORM_BLOCKS + i];
	length = sqrt(length);
	if (!isfinite(length) || !isfinite(loss[lane]))
		return;
	if (a.clip > 0 && length > (double)a.clip)
		scale = (float)((double)a.clip / (length + 1e-6));
	for (uint32_t i = blockIdx.x * BLOCK + threadIdx.x; i < net.params; i += NORM_BLOCKS * BLOCK) {
		float g = grad[base + i] * scale, p = params[base + i], m = first[base + i],
		      v = second[base + i];
		float decay = 0;

#pragma unroll
		for (int t = 0; t < 5; t++)
			if (i >= a.matrix[t].from && i < a.matrix[t].to)
				decay = a.decay;
		m += (1.0f - a.beta1) * (g - m);
		v += (1.0f - a.beta2) * (g * g - v);
		first[base + i] = m;
		second[base + i] = v;
		p -= decay * p + a.lr * (m * a.fix1) / (sqrtf(v * a.fix2) + a.eps);
		params[base + i] = p;
		ema[base + i] = a.average ? ema[base + i] + (1.0f - a.ema) * (p - ema[base + i]) : p;
	}
}

void optimiser_step(struct cuda_backend *b, uint64_t step, float lr)
{
	static const uint32_t matrices[] = {KVP_WK, KVP_WV, KVP_W1, KVP_W2, KVP_W3};
	const struct train_opts *o = &b->o;
	const struct net *n = &b->net;
	const uint32_t sizes[] = {n->proj * n->kd, n->proj * n->vd, n->hidden * n->in, n->hidden * n->hidden,
				  n->rank * n->hidden};
	double t = (double)step + 1;
	struct adam a = {lr,
			 o->beta1,
			 o->beta2,
			 o->eps,
			 lr * o->weight_decay,
			 (float)(1 / (1 - pow((double)o->beta1, t))),
			 (float)(1 / (1 - pow((double)o->beta2, t))),
			 o->clip,
			 o->ema,
			 step >= o->ema_start,
			 {}};

	for (uint32_t i = 0; n->kind == WEIGHTS_KVP && i < 5; i++) {
		a.matrix[i].from = n->off[matrices[i]];
		a.matrix[i].to = n->off[matrices[i]] + sizes[i];
	}
	LAUNCH(b, squares, dim3(NORM_BLOCKS, o->lanes), 0, *n, b->grad, b->norm);
	LAUNCH(b, adam_step, dim3(NORM_BLOCKS, o->lanes), 0, *n, a, b->grad, b->norm, b->loss,
	       b->param[TRAIN_PARAMS], b->param[TRAIN_EMA], b->param[TRAIN_M], b->param[TRAIN_V]);
}
