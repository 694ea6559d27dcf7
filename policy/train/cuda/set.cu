/* SPDX-License-Identifier: MIT */
/* Rows and utilities to the device, through a pinned buffer and a stream per loading thread. */
#include "policy/train/cuda/memory.cuh"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <thread>

static struct loader *acquire(struct cuda_backend *b)
{
	for (;;) {
		{
			std::lock_guard<std::mutex> hold(b->lock);

			for (struct loader &l : b->loader)
				if (!l.busy) {
					l.busy = true;
					return &l;
				}
		}
		std::this_thread::yield(); /* more threads than loaders: a copy takes well under a millisecond
					    */
	}
}

static void release(struct cuda_backend *b, struct loader *l)
{
	std::lock_guard<std::mutex> hold(b->lock);

	l->busy = false;
}

static cudaError_t copy(struct loader *l, void *to, const void *from, size_t size)
{
	for (size_t done = 0; done < size;) {
		size_t n = size - done < LOADER_BYTES ? size - done : LOADER_BYTES;
		cudaError_t e;

		memcpy(l->pinned, (const char *)from + done, n);
		e = cudaMemcpyAsync((char *)to + done, l->pinned, n, cudaMemcpyHostToDevice, l->stream);
		if (e == cudaSuccess)
			e = cudaStreamSynchronize(l->stream);
		if (e != cudaSuccess)
			return e;
		done += n;
	}
	return cudaSuccess;
}

static int result(struct cuda_backend *b, cudaError_t e, const char *what)
{
	if (e == cudaSuccess)
		return 0;
	std::lock_guard<std::mutex> hold(b->lock);
	snprintf(b->error, sizeof(b->error), "%s: %s", what, cudaGetErrorString(e));
	return -EIO;
}

static int outside(struct cuda_backend *b, const char *what, uint32_t lane, uint32_t at, uint32_t limit)
{
	std::lock_guard<std::mutex> hold(b->lock);

	snprintf(b->error, sizeof(b->error), "lane %u, %s %u: there are %u and %u", lane, what, at, b->o.lanes,
		 limit);
	return -EINVAL;
}

int set_put_rows(struct cuda_backend *b, uint32_t lane, uint32_t doc, const uint16_t *k, const uint16_t *v)
{
	const struct net *n = &b->net;
	uint64_t row = lane * b->set_rows;
	struct loader *l;
	cudaError_t e;

	if (lane >= b->o.lanes || doc >= b->docs)
		return outside(b, "document", lane, doc, b->docs);
	if (n->kd + n->vd == 0)
		return 0; /* kind POSITION looks at no row */
	row += b->doc_base[doc];
	l = acquire(b);
	e = copy(l, b->k + row * n->kd, k, (size_t)b->doc_rows[doc] * n->kd * sizeof(*k));
	if (e == cudaSuccess)
		e = copy(l, b->v + row * n->vd, v, (size_t)b->doc_rows[doc] * n->vd * sizeof(*v));
	release(b, l);
	return result(b, e, "copy of rows");
}

int set_put_utility(struct cuda_backend *b, uint32_t lane, uint32_t unit, const float *u)
{
	struct loader *l;
	cudaError_t e;

	if (lane >= b->o.lanes || unit >= b->units)
		return outside(b, "unit", lane, unit, b->units);
	l = acquire(b);
	e = copy(l, b->u + lane * b->set_units + b->unit_base[unit], u, b->unit_rows[unit] * sizeof(*u));
	release(b, l);
	return result(b, e, "copy of utilities");
}
