/* SPDX-License-Identifier: MIT */
/* Opening and closing: what memory a backend takes, and how many lanes it works on at a time. */
#include "policy/train/cuda/memory.cuh"

#include <cerrno>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#define MIB ((uint64_t)1 << 20)
#define RESERVE (1024 * MIB)           /* left to the driver, its context and other programs */
#define WORKSPACE (64 * MIB)           /* cuBLAS' */
#define SMALL (192 * MIB)              /* workspace, batches, and what else has no row or lane */
#define GROUP_PLANNED (8 * 1024 * MIB) /* what set_bytes() counts for lanes in work, */
#define GROUP_MOST (24 * 1024 * MIB)   /* and what they may take when there is more */

static uint64_t row_floats(const struct net *n)
{
	if (n->kind == WEIGHTS_POSITION)
		return 4;
	return n->kd + n->vd + 2 * n->proj + n->in + 3 * n->hidden + 4;
}

static uint64_t lane_bytes(const struct train_opts *o, const struct net *n)
{
	uint64_t unit =
		sizeof(struct unit_cost) + sizeof(double) + sizeof(double2) + TRAIN_MAX_PERMS * sizeof(double);

	return (batch_capacity(o) * row_floats(n) + net_part_floats(o, n)) * sizeof(float) + o->batch * unit +
	       sizeof(double);
}

static uint64_t state_bytes(const struct train_opts *o, const struct net *n)
{
	return (5 * (uint64_t)n->stride * sizeof(float) + NORM_BLOCKS * sizeof(double) + sizeof(float)) *
	       o->lanes;
}

/* Lanes that fit into `budget`, in groups of nearly one size; 0: not one does. */
static uint32_t group_of(const struct train_opts *o, const struct net *n, uint64_t budget)
{
	uint64_t most = budget / lane_bytes(o, n), groups;

	if (most == 0)
		return 0;
	most = most < o->lanes ? most : o->lanes;
	groups = (o->lanes + most - 1) / most;
	return (uint32_t)((o->lanes + groups - 1) / groups);
}

int net_of(struct net *ret, const struct train_opts *o)
{
	const struct weights_header *h = &o->shape;
	struct weights_layout layout;
	struct net n = {};

	if (weights_lay_out(&layout, h) < 0 || (h->kind != WEIGHTS_KVP && h->kind != WEIGHTS_POSITION))
		return -EINVAL;
	n.kind = h->kind;
	n.pos_knots = h->pos_rows;
	if (h->kind == WEIGHTS_POSITION) {
		n.dist_knots = h->pos_rows;
	} else {
		n.kd = h->k_dim;
		n.vd = h->v_dim;
		n.proj = h->proj;
		n.pos_dim = h->pos_dim;
		n.hidden = h->hidden;
		n.in = 2 * h->proj + h->pos_dim;
		n.rank = h->rank;
		n.dist_knots = h->dist_rows;
		n.dist_tables = h->dist_rows > 0 ? 2 * h->rank : 0;
	}
	for (uint32_t t = 0; t < layout.count; t++)
		n.off[t] = (uint32_t)(layout.tensor[t].off / layout.elem);
	n.params = (uint32_t)layout.params;
	n.stride = (n.params + 63) / 64 * 64;
	*ret = n;
	return 0;
}

static uint64_t total(const uint32_t *v, uint32_t n)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < n; i++)
		sum += v[i];
	return sum;
}

uint64_t memory_set_bytes(const struct train_opts *o, const struct train_set_shape *s)
{
	struct net n;
	uint64_t rows, group;

	if (net_of(&n, o) < 0)
		return 0;
	rows = total(s->doc_rows, s->docs);
	group = group_of(o, &n, GROUP_PLANNED);
	return (rows * (n.kd + n.vd) * sizeof(uint16_t) + total(s->unit_rows, s->units) * sizeof(float)) *
		       o->lanes +
	       state_bytes(o, &n) + lane_bytes(o, &n) * (group ? group : 1) + SMALL;
}

uint64_t memory_free(void)
{
	size_t free_bytes, all;

	if (cudaMemGetInfo(&free_bytes, &all) != cudaSuccess)
		return 0;
	return free_bytes > RESERVE ? free_bytes - RESERVE : 0;
}

static int __attribute__((format(printf, 2, 3))) refuse(struct cuda_backend *b, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(b->error, sizeof(b->error), fmt, ap);
	va_end(ap);
	return -EINVAL;
}

static int check_options(struct cuda_backend *b)
{
	const struct train_opts *o = &b->o;
	const struct weights_header *h = &o->shape;

	if (net_of(&b->net, o) < 0)
		return refuse(b, "kind: %u, must be 1 (kvp) or 2 (position)", h->kind);
	if (h->kind == WEIGHTS_KVP && (h->k_dim % 16 || h->v_dim % 16 || h->proj % 32 || h->proj > 512 ||
				       h->hidden % 32 || h->hidden > 512 || h->pos_dim % 16 || h->pos_dim > 64))
		return refuse(b, "shape: widths outside the weight file's limits");
	if (h->pos_rows < 1 || h->rank < 1 || h->rank > 2)
		return refuse(b, "shape: pos_rows %u, rank %u", h->pos_rows, h->rank);
	if (o->lanes < 1 || o->lanes > 65535)
		return refuse(b, "lanes: %u, must be 1 to 65535", o->lanes);
	if (o->batch < 1 || o->batch > 65535)
		return refuse(b, "batch: %u, must be 1 to 65535", o->batch);
	if (o->rows < 64 || o->rows % 64 || o->rows > TRAIN_MAX_ROWS)
		return refuse(b, "rows: %u, must be a multiple of 64 up to %u", o->rows, TRAIN_MAX_ROWS);
	if (o->objective > TRAIN_MSE || o->reward > TRAIN_RATIO || o->weighting > TRAIN_LOG_UNIFORM)
		return refuse(b, "objective %u, reward %u, weighting %u: unknown", o->objective, o->reward,
			      o->weighting);
	if (o->objective == TRAIN_RLOO && (o->perms < 2 || o->perms > TRAIN_MAX_PERMS))
		return refuse(b, "perms: %u, must be 2 to %u", o->perms, TRAIN_MAX_PERMS);
	return 0;
}

/* Where documents and units begin in a lane, and log2(1 + x) for every position there is. */
static int index_set(struct cuda_backend *b, const struct train_set_shape *s)
{
	uint32_t highest = 1;

	b->docs = s->docs;
	b->units = s->units;
	b->doc_rows = s->doc_rows;
	b->doc_pos = s->doc_pos;
	b->unit_doc = s->unit_doc;
	b->unit_rows = s->unit_rows;
	b->unit_prompt = s->unit_prompt;
	b->doc_base = (uint64_t *)calloc(s->docs + 1, sizeof(*b->doc_base));
	b->unit_base = (uint64_t *)calloc(s->units + 1, sizeof(*b->unit_base));
	if (!b->doc_base || !b->unit_base)
		return -ENOMEM;
	for (uint32_t i = 0; i < s->docs; i++) {
		b->doc_base[i] = b->set_rows;
		b->set_rows += s->doc_rows[i];
	}
	for (uint32_t i = 0; i < s->units; i++) {
		uint32_t doc = s->unit_doc[i], rows = s->unit_rows[i];

		if (doc >= s->docs || rows > s->doc_rows[doc] ||
		    (rows > 0 && s->doc_pos[doc][rows - 1] >= s->unit_prompt[i]))
			return refuse(b, "unit %u: document %u, %u rows, prompt %u do not fit together", i, doc,
				      rows, s->unit_prompt[i]);
		b->unit_base[i] = b->set_units;
		b->set_units += rows;
		highest = s->unit_prompt[i] > highest ? s->unit_prompt[i] : highest;
	}
	if (b->set_rows > UINT32_MAX || b->set_units > UINT32_MAX)
		return refuse(b, "set: %llu rows and %llu utilities a lane, limit 2^32",
			      (unsigned long long)b->set_rows, (unsigned long long)b->set_units);
	b->log2_of = (float *)malloc(((size_t)highest + 1) * sizeof(float));
	if (!b->log2_of)
		return -ENOMEM;
	for (uint32_t x = 0; x <= highest; x++)
		b->log2_of[x] = log2f(1.0f + (float)x);
	return 0;
}

/* Device memory that close() gives back. */
template <typename T> static void device_memory(struct cuda_backend *b, T **ret, uint64_t count)
{
	void *p = NULL;

	if (b->failed)
		return;
	if (cuda_ok(b, cudaMalloc(&p, count > 0 ? count * sizeof(T) : 16), "cudaMalloc"))
		b->owned[b->owned_count++] = p;
	*ret = (T *)p;
}

template <typename T> static void pinned_memory(struct cuda_backend *b, T **ret, uint64_t count)
{
	if (!b->failed)
		cuda_ok(b, cudaMallocHost((void **)ret, count * sizeof(T)), "cudaMallocHost");
}

static void allocate_set(struct cuda_backend *b)
{
	const struct net *n = &b->net;
	uint64_t lanes = b->o.lanes;

	device_memory(b, &b->k, lanes * b->set_rows * n->kd);
	device_memory(b, &b->v, lanes * b->set_rows * n->vd);
	device_memory(b, &b->u, lanes * b->set_units);
	for (uint32_t i = 0; i < 5; i++) {
		float **to = i < 4 ? &b->param[i] : &b->grad;

		device_memory(b, to, lanes * n->stride);
		if (!b->failed)
			cuda_ok(b, cudaMemsetAsync(*to, 0, lanes * n->stride * sizeof(float), b->stream),
				"cudaMemset");
	}
	device_memory(b, &b->norm, lanes * NORM_BLOCKS);
	device_memory(b, &b->loss, lanes);
	pinned_memory(b, &b->loss_host, lanes);
}

static void allocate_batches(struct cuda_backend *b)
{
	uint32_t knots = b->net.pos_knots > b->net.dist_knots ? b->net.pos_knots : b->net.dist_knots;

	b->upload_words = batch_words(&b->o);
	device_memory(b, &b->upload, b->upload_words);
	for (uint32_t i = 0; i < UPLOAD_SLOTS; i++) {
		pinned_memory(b, &b->pinned[i], b->upload_words);
		if (!b->failed)
			cuda_ok(b, cudaEventCreateWithFlags(&b->uploaded[i], cudaEventDisableTiming),
				"cudaEventCreate");
	}
	b->count_scratch = (uint32_t *)calloc(knots + 1, sizeof(uint32_t));
	if (!b->count_scratch)
		cuda_fail(b, -ENOMEM, "open", "out of memory");
}

static void allocate_group(struct cuda_backend *b)
{
	const struct net *n = &b->net;
	const char *most = getenv("KVT_TRAIN_LANES");
	uint64_t room = memory_free(), rows, units;
	uint32_t limit = most ? (uint32_t)strtoul(most, NULL, 10) : 0;

	b->group = group_of(&b->o, n, room < GROUP_MOST ? room : GROUP_MOST);
	if (limit > 0 && limit < b->group)
		b->group = limit;
	if (b->group == 0) {
		cuda_fail(b, -ENOMEM, "one lane's activations", "not enough device memory beside the set");
		return;
	}
	rows = (uint64_t)b->group * batch_capacity(&b->o);
	units = (uint64_t)b->group * b->o.batch;
	if (n->kind == WEIGHTS_KVP) {
		device_memory(b, &b->kv, rows * (n->kd + n->vd));
		device_memory(b, &b->z0, rows * 2 * n->proj);
		device_memory(b, &b->x, rows * n->in);
		device_memory(b, &b->z1, rows * n->hidden);
		device_memory(b, &b->h1, rows * n->hidden);
		device_memory(b, &b->z2, rows * n->hidden);
	}
	device_memory(b, &b->s, rows);
	device_memory(b, &b->ds, rows);
	device_memory(b, &b->f1, rows);
	device_memory(b, &b->phi1, rows);
	device_memory(b, &b->part, b->group * (uint64_t)net_part_floats(&b->o, n));
	device_memory(b, &b->cost, units);
	device_memory(b, &b->unit_loss, units);
	device_memory(b, &b->reward, units * TRAIN_MAX_PERMS);
	device_memory(b, &b->hard, units);
	device_memory(b, &b->inverse, b->group);
	pinned_memory(b, &b->cost_host, units);
	pinned_memory(b, &b->hard_host, units);
}

static void start_device(struct cuda_backend *b)
{
	const char *math = getenv("KVT_TRAIN_MATH");
	int devices = 0;
	cudaError_t e = cudaGetDeviceCount(&devices);

	if (e != cudaSuccess || devices == 0) {
		cuda_fail(b, -ENOTSUP, "no CUDA device",
			  e == cudaSuccess ? "none found" : cudaGetErrorString(e));
		return;
	}
	b->math = CUBLAS_COMPUTE_32F_FAST_TF32;
	b->net.round = true;
	if (math && strcmp(math, "fp32") == 0) {
		b->math = CUBLAS_COMPUTE_32F;
		b->net.round = false;
	}
	if (!cuda_ok(b, cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking), "cudaStreamCreate") ||
	    !blas_ok(b, cublasCreate(&b->blas), "cublasCreate") ||
	    !blas_ok(b, cublasSetStream(b->blas, b->stream), "cublasSetStream"))
		return;
	/* Its own workspace, and no atomics: the same sums in every run. */
	blas_ok(b, cublasSetAtomicsMode(b->blas, CUBLAS_ATOMICS_NOT_ALLOWED), "cublasSetAtomicsMode");
	device_memory(b, (char **)&b->workspace, WORKSPACE);
	if (!b->failed)
		blas_ok(b, cublasSetWorkspace(b->blas, b->workspace, WORKSPACE), "cublasSetWorkspace");
}

static void allocate_loaders(struct cuda_backend *b)
{
	for (uint32_t i = 0; i < LOADERS; i++) {
		pinned_memory(b, (char **)&b->loader[i].pinned, LOADER_BYTES);
		if (!b->failed)
			cuda_ok(b, cudaStreamCreateWithFlags(&b->loader[i].stream, cudaStreamNonBlocking),
				"cudaStreamCreate");
	}
}

int memory_open(struct cuda_backend **ret, const struct train_opts *o, const struct train_set_shape *s,
		char *err, size_t errsize)
{
	struct cuda_backend *b = new (std::nothrow) cuda_backend();
	int r;

	if (!b)
		return -ENOMEM;
	b->o = *o;
	r = check_options(b);
	if (r == 0)
		r = index_set(b, s);
	if (r == 0) {
		start_device(b);
		allocate_set(b);
		allocate_batches(b);
		allocate_loaders(b);
		if (!b->failed)
			allocate_group(b);
		if (!b->failed)
			cuda_ok(b, cudaStreamSynchronize(b->stream), "open");
		r = b->failed;
	}
	if (r < 0) {
		snprintf(err, errsize, "%s", b->error[0] ? b->error : strerror(-r));
		memory_close(b);
		return r;
	}
	*ret = b;
	return 0;
}

void memory_close(struct cuda_backend *b)
{
	if (!b)
		return;
	if (b->stream)
		cudaStreamSynchronize(b->stream);
	if (b->blas)
		cublasDestroy(b->blas);
	for (uint32_t i = 0; i < b->owned_count; i++)
		cudaFree(b->owned[i]);
	for (uint32_t i = 0; i < UPLOAD_SLOTS; i++) {
		cudaFreeHost(b->pinned[i]);
		if (b->uploaded[i])
			cudaEventDestroy(b->uploaded[i]);
	}
	for (struct loader &l : b->loader) {
		cudaFreeHost(l.pinned);
		if (l.stream)
			cudaStreamDestroy(l.stream);
	}
	cudaFreeHost(b->loss_host);
	cudaFreeHost(b->cost_host);
	cudaFreeHost(b->hard_host);
	if (b->stream)
		cudaStreamDestroy(b->stream);
	free(b->doc_base);
	free(b->unit_base);
	free(b->log2_of);
	free(b->count_scratch);
	delete b;
}
