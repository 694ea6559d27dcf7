/* SPDX-License-Identifier: MIT */
/* The operations of policy/train/backend.h. */
#include "policy/train/cuda/memory.cuh"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
extern const struct train_backend_ops kvtier_train_cuda_ops;
}

void cuda_fail(struct cuda_backend *b, int error, const char *what, const char *why)
{
	if (b->failed)
		return;
	b->failed = error;
	snprintf(b->error, sizeof(b->error), "%s: %s", what, why);
}

bool cuda_ok(struct cuda_backend *b, cudaError_t e, const char *what)
{
	if (e == cudaSuccess)
		return true;
	cuda_fail(b, e == cudaErrorMemoryAllocation ? -ENOMEM : -EIO, what, cudaGetErrorString(e));
	return false;
}

bool blas_ok(struct cuda_backend *b, cublasStatus_t e, const char *what)
{
	if (e == CUBLAS_STATUS_SUCCESS)
		return true;
	cuda_fail(b, e == CUBLAS_STATUS_ALLOC_FAILED ? -ENOMEM : -EIO, what, cublasGetStatusString(e));
	return false;
}

static struct cuda_backend *cuda_of(struct train_backend *base)
{
	return (struct cuda_backend *)base; /* first member */
}

static int op_open(struct train_backend **ret, const struct train_opts *o, const struct train_set_shape *s,
		   char *err, size_t errsize)
{
	struct cuda_backend *b;
	int r = memory_open(&b, o, s, err, errsize);

	if (r < 0)
		return r;
	b->base.ops = &kvtier_train_cuda_ops;
	*ret = &b->base;
	return 0;
}

static void op_close(struct train_backend *base)
{
	memory_close(cuda_of(base));
}

static int op_put_rows(struct train_backend *base, uint32_t lane, uint32_t doc, const uint16_t *k,
		       const uint16_t *v)
{
	return set_put_rows(cuda_of(base), lane, doc, k, v);
}

static int op_put_utility(struct train_backend *base, uint32_t lane, uint32_t unit, const float *u)
{
	return set_put_utility(cuda_of(base), lane, unit, u);
}

/* What was copied to or from the caller's memory is done. */
static int finish(struct cuda_backend *b)
{
	if (!b->failed)
		cuda_ok(b, cudaStreamSynchronize(b->stream), "the device");
	return b->failed;
}

static int check_vector(struct cuda_backend *b, enum train_which which, uint32_t lane)
{
	b->failed = 0;
	if ((unsigned)which <= TRAIN_V && lane < b->o.lanes)
		return 0;
	snprintf(b->error, sizeof(b->error), "vector %d of lane %u: there are 4 of %u", (int)which, lane,
		 b->o.lanes);
	return -EINVAL;
}

static int op_get(struct train_backend *base, enum train_which which, uint32_t lane, float *out)
{
	struct cuda_backend *b = cuda_of(base);
	int r = check_vector(b, which, lane);

	if (r < 0)
		return r;
	cuda_ok(b,
		cudaMemcpyAsync(out, b->param[which] + (size_t)lane * b->net.stride,
				b->net.params * sizeof(float), cudaMemcpyDeviceToHost, b->stream),
		"get");
	return finish(b);
}

static int op_set(struct train_backend *base, enum train_which which, uint32_t lane, const float *in)
{
	struct cuda_backend *b = cuda_of(base);
	int r = check_vector(b, which, lane);

	if (r < 0)
		return r;
	cuda_ok(b,
		cudaMemcpyAsync(b->param[which] + (size_t)lane * b->net.stride, in,
				b->net.params * sizeof(float), cudaMemcpyHostToDevice, b->stream),
		"set");
	return finish(b);
}

static uint32_t lanes_from(const struct cuda_backend *b, uint32_t lane0)
{
	return b->o.lanes - lane0 < b->group ? b->o.lanes - lane0 : b->group;
}

/* Gradients and losses of all lanes for a batch, on the device. */
static int run(struct cuda_backend *b, const struct train_batch *t)
{
	int r;

	b->failed = 0;
	r = batch_upload(b, t);
	if (r < 0)
		return r;
	for (uint32_t lane0 = 0; lane0 < b->o.lanes; lane0 += b->group) {
		uint32_t lanes = lanes_from(b, lane0);

		net_forward(b, b->param[TRAIN_PARAMS], lane0, lanes);
		objective_run(b, t->step, lane0, lanes);
		net_backward(b, lane0, lanes);
	}
	return b->failed;
}

static void download_loss(struct cuda_backend *b)
{
	if (!b->failed)
		cuda_ok(b,
			cudaMemcpyAsync(b->loss_host, b->loss, b->o.lanes * sizeof(float),
					cudaMemcpyDeviceToHost, b->stream),
			"losses");
}

static int op_step(struct train_backend *base, const struct train_batch *t, float *loss)
{
	struct cuda_backend *b = cuda_of(base);
	int r = run(b, t);

	if (r < 0)
		return r;
	optimiser_step(b, t->step, t->lr);
	if (!loss)
		return b->failed;
	download_loss(b);
	r = finish(b);
	if (r == 0)
		memcpy(loss, b->loss_host, b->o.lanes * sizeof(*loss));
	return r;
}

static int op_gradient(struct train_backend *base, const struct train_batch *t, float *grad, float *loss)
{
	struct cuda_backend *b = cuda_of(base);
	size_t width = b->net.params * sizeof(float);
	int r = run(b, t);

	if (r < 0)
		return r;
	download_loss(b);
	if (!b->failed)
		cuda_ok(b,
			cudaMemcpy2DAsync(grad, width, b->grad, b->net.stride * sizeof(float), width,
					  b->o.lanes, cudaMemcpyDeviceToHost, b->stream),
			"gradients");
	r = finish(b);
	if (r == 0)
		memcpy(loss, b->loss_host, b->o.lanes * sizeof(*loss));
	return r;
}

static int start_scores(struct cuda_backend *b, enum train_which which, const struct train_batch *t)
{
	b->failed = 0;
	if (which != TRAIN_PARAMS && which != TRAIN_EMA) {
		snprintf(b->error, sizeof(b->error),
			 "scores from vector %d: must be the parameters or their EMA", (int)which);
		return -EINVAL;
	}
	return batch_upload(b, t);
}

static int op_evaluate(struct train_backend *base, enum train_which which, const struct train_batch *t,
		       struct train_score *out)
{
	struct cuda_backend *b = cuda_of(base);
	int r = start_scores(b, which, t);

	for (uint32_t lane0 = 0; r == 0 && lane0 < b->o.lanes; lane0 += b->group) {
		uint32_t lanes = lanes_from(b, lane0);
		size_t units = (size_t)lanes * b->o.batch;

		net_forward(b, b->param[which], lane0, lanes);
		objective_costs(b, lane0, lanes);
		objective_hard(b, lane0, lanes);
		if (!b->failed)
			cuda_ok(b,
				cudaMemcpyAsync(b->cost_host, b->cost, units * sizeof(*b->cost),
						cudaMemcpyDeviceToHost, b->stream),
				"costs");
		if (!b->failed)
			cuda_ok(b,
				cudaMemcpyAsync(b->hard_host, b->hard, units * sizeof(*b->hard),
						cudaMemcpyDeviceToHost, b->stream),
				"costs");
		r = finish(b);
		for (uint32_t l = 0; r == 0 && l < lanes; l++)
			for (uint32_t u = 0; u < t->units; u++) {
				size_t at = (size_t)l * b->o.batch + u;

				if (!b->cost_host[at].counted)
					continue;
				out[lane0 + l].regret += b->hard_host[at].x;
				out[lane0 + l].ratio += b->hard_host[at].y;
				out[lane0 + l].counted++;
			}
	}
	return r;
}

static int op_scores(struct train_backend *base, enum train_which which, const struct train_batch *t,
		     float *out)
{
	struct cuda_backend *b = cuda_of(base);
	size_t lane_floats = (size_t)t->units * b->o.rows;
	int r = start_scores(b, which, t);
	float *s = NULL;

	if (r < 0)
		return r;
	s = (float *)malloc((size_t)b->group * b->rows.padded * sizeof(*s));
	if (!s)
		return -ENOMEM;
	memset(out, 0, b->o.lanes * lane_floats * sizeof(*out));
	for (uint32_t lane0 = 0; r == 0 && lane0 < b->o.lanes; lane0 += b->group) {
		uint32_t lanes = lanes_from(b, lane0);

		net_forward(b, b->param[which], lane0, lanes);
		if (!b->failed)
			cuda_ok(b,
				cudaMemcpyAsync(s, b->s, (size_t)lanes * b->rows.padded * sizeof(*s),
						cudaMemcpyDeviceToHost, b->stream),
				"scores");
		r = finish(b);
		for (uint32_t l = 0; r == 0 && l < lanes; l++)
			for (uint32_t u = 0, at = 0; u < t->units; at += t->n[u++])
				memcpy(out + (lane0 + l) * lane_floats + (size_t)u * b->o.rows,
				       s + (size_t)l * b->rows.padded + at, t->n[u] * sizeof(*s));
	}
	free(s);
	return r;
}

static const char *op_error(struct train_backend *base)
{
	return cuda_of(base)->error;
}

extern "C" __attribute__((visibility("default"))) const struct train_backend_ops kvtier_train_cuda_ops = {
	"cuda", op_open, op_close, memory_set_bytes, memory_free, op_put_rows, op_put_utility,
	op_get, op_set,  op_step,  op_gradient,      op_evaluate, op_scores,   op_error,
};
