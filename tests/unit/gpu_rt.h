/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A runtime whose rows are in GPU memory, against a real core (core_harness.h). It works by the driver's calls
 * alone, so the same code runs on the fake driver (test_ipc_cuda.c) and on a GPU (tests/gpu/check_client.c).
 * Rows carry core_harness.h's pattern; what is on the GPU is copied back and compared byte for byte.
 */
#include "ipc/cuda/cuda.h"
#include "tests/unit/core_harness.h"

struct gpu {
	const struct cuda_driver *d;
	struct kvtier_cuda *g;
	void *ctx;
};

struct gpu_seq {
	struct rt_seq rt; /* names, sizes, pattern; its region and layouts are not used */
	struct gpu *gpu;
	struct kvtier_cuda_window *w;
	struct kvtier_cuda_layer *layers, *other; /* [layers]: where rows are, and the other memory */
	uint64_t memory[2];
	uint32_t slots, pad; /* slots of a lane; bytes between rows */
	void *stream;
	uint32_t flags;                    /* KVT_CUDA_* */
	struct kvtier_cuda_scorer *scorer; /* or NULL */
	uint32_t *counts;
	struct kvtier_cuda_state state;
	uint32_t applied, moved; /* plans in place, and to other memory */
	uint64_t promoted;
};

#define GPU_CHECK(call)                                                                                        \
	do {                                                                                                   \
		int gpu_r = (call);                                                                            \
		if (gpu_r) {                                                                                   \
			fprintf(stderr, "# %s:%d: %s: %d\n", __FILE__, __LINE__, #call, gpu_r);                \
			return gpu_r < 0 ? gpu_r : KVT_E_GPU;                                                  \
		}                                                                                              \
	} while (0)

static inline int gpu_open(struct gpu *gpu)
{
	memset(gpu, 0, sizeof(*gpu));
	GPU_CHECK(kvtier_cuda_open(NULL, &gpu->g));
	gpu->d = gpu->g->d;
	return 0;
}

static inline void gpu_close(struct gpu *gpu)
{
	kvtier_cuda_close(gpu->g);
}

/* ---- one sequence ----------------------------------------------------------------------- */

static inline uint64_t gpu_lay_out(struct gpu_seq *q, uint64_t base, struct kvtier_cuda_layer *ret)
{
	const struct runtime *rt = q->rt.rt;
	uint32_t k = rt->k_bytes + q->pad, v = rt->v_bytes + q->pad;
	uint64_t at = base;

	for (uint32_t i = 0; i < rt->layers; i++) {
		ret[i] = (struct kvtier_cuda_layer){.k_head_stride = (uint64_t)q->slots * k,
						    .v_head_stride = (uint64_t)q->slots * v,
						    .k_row_stride = k,
						    .v_row_stride = v};
		ret[i].k = at;
		at += rt->heads * ret[i].k_head_stride;
		ret[i].v = at;
		at += rt->heads * ret[i].v_head_stride;
	}
	return at - base;
}

static inline int gpu_prepare(struct gpu_seq *q, struct gpu *gpu, struct runtime *rt,
			      struct kvtier_cuda_window *w, uint32_t id, uint32_t cap, uint32_t stage,
			      uint32_t max_rows, uint32_t pad)
{
	int r = 0;

	memset(q, 0, sizeof(*q));
	q->gpu = gpu;
	q->w = w;
	q->pad = pad;
	q->slots = cap + stage;
	q->rt.rt = rt;
	q->rt.id = id;
	q->rt.seed = id * 77u + 1;
	q->rt.cap = cap;
	q->rt.stage = stage;
	q->rt.max_rows = max_rows;
	q->rt.salts = calloc(max_rows, sizeof(*q->rt.salts));
	q->layers = calloc(rt->layers, sizeof(*q->layers));
	q->other = calloc(rt->layers, sizeof(*q->other));
	q->counts = calloc(rt->lanes, sizeof(*q->counts));
	q->state.size = sizeof(q->state);
	GPU_CHECK(cuda_enter(gpu->g));
	for (int i = 0; i < 2 && !r; i++)
		r = gpu->d->alloc(&q->memory[i], gpu_lay_out(q, 0, q->other));
	if (!r)
		r = gpu->d->stream_create(&q->stream, CUDA_STREAM_NON_BLOCKING);
	cuda_leave(gpu->g);
	if (r)
		return cuda_check(gpu->d, r, "the runtime's own memory");
	gpu_lay_out(q, q->memory[0], q->layers);
	gpu_lay_out(q, q->memory[1], q->other);
	return 0;
}

static inline struct kvtier_cuda_seq_opts gpu_opts(struct gpu_seq *q, uint64_t ring)
{
	return (struct kvtier_cuda_seq_opts){.size = sizeof(struct kvtier_cuda_seq_opts),
					     .window = q->w,
					     .layers = q->layers,
					     .cap = q->rt.cap,
					     .stage = q->rt.stage,
					     .out_bytes = ring,
					     .in_bytes = ring,
					     .flags = q->flags,
					     .scorer = q->scorer};
}

static inline int gpu_seq_open(struct gpu_seq *q, uint32_t lifetime, const struct kvtier_budget *b,
			       uint64_t ring)
{
	struct kvtier_cuda_seq_opts g = gpu_opts(q, ring);
	struct kvtier_seq_opts o = rt_opts(&q->rt, lifetime, b);

	return kvtier_cuda_seq_open(q->rt.rt->c, q->rt.rt->m, &o, &g, &q->rt.s);
}

static inline int gpu_seq_resume(struct gpu_seq *q, const struct kvtier_budget *b, uint64_t ring)
{
	struct kvtier_cuda_seq_opts g = gpu_opts(q, ring);
	struct kvtier_seq_opts o = rt_opts(&q->rt, KVT_LEASED, b);

	return kvtier_cuda_seq_resume(q->rt.rt->c, q->rt.rt->m, &o, &g, &q->rt.s, &q->rt.rows);
}

static inline void gpu_seq_free(struct gpu_seq *q, bool drop)
{
	if (q->rt.s && drop)
		kvtier_seq_drop(q->rt.s);
	else
		kvtier_seq_close(q->rt.s);
	if (!q->gpu->d->ctx_push(q->gpu->g->ctx)) {
		for (int i = 0; i < 2; i++)
			if (q->memory[i])
				(void)q->gpu->d->free(q->memory[i]);
		if (q->stream)
			(void)q->gpu->d->stream_destroy(q->stream);
		cuda_leave(q->gpu->g);
	}
	free(q->rt.salts);
	free(q->layers);
	free(q->other);
	free(q->counts);
	memset(q, 0, sizeof(*q));
}

/* ---- rows ------------------------------------------------------------------------------------ */

static inline void gpu_pattern(const struct gpu_seq *q, uint32_t lane, uint32_t pos, bool v, uint8_t *ret)
{
	uint32_t n = v ? q->rt.rt->v_bytes : q->rt.rt->k_bytes;

	for (uint32_t i = 0; i < n; i++)
		ret[i] = rt_byte(&q->rt, lane, pos, i, v);
}

static inline uint64_t gpu_slot(const struct gpu_seq *q, uint32_t lane, uint32_t slot, bool v)
{
	const struct kvtier_cuda_layer *l = &q->layers[lane / q->rt.rt->heads];
	uint32_t h = lane % q->rt.rt->heads;

	return v ? l->v + h * l->v_head_stride + (uint64_t)slot * l->v_row_stride
		 : l->k + h * l->k_head_stride + (uint64_t)slot * l->k_row_stride;
}

/* n more rows of all lanes, on the stream, as a model's kernels would write them. */
static inline int gpu_append(struct gpu_seq *q, uint32_t n)
{
	struct runtime *rt = q->rt.rt;
	uint32_t most = (rt->k_bytes > rt->v_bytes ? rt->k_bytes : rt->v_bytes) + q->pad;
	_cleanup_free_ uint8_t *buf = malloc((size_t)n * most);
	int r = kvtier_cuda_counts(q->rt.s, q->counts);

	if (r < 0)
		return r;
	if ((uint32_t)r + n > q->rt.cap || n > q->rt.max_rows - q->rt.rows)
		return KVT_E_NOSPC;
	for (uint32_t i = 0; i < n; i++)
		q->rt.salts[q->rt.rows + i] = q->rt.salt;
	GPU_CHECK(cuda_enter(q->gpu->g));
	r = 0;
	for (uint32_t lane = 0; lane < rt->lanes; lane++)
		for (int v = 0; v < 2 && !r; v++) {
			uint32_t stride = (v ? rt->v_bytes : rt->k_bytes) + q->pad;

			memset(buf, 0xee, (size_t)n * stride);
			for (uint32_t i = 0; i < n; i++)
				gpu_pattern(q, lane, q->rt.rows + i, v, buf + (size_t)i * stride);
			r = q->gpu->d->copy_in(gpu_slot(q, lane, q->counts[lane], v), buf, (size_t)n * stride,
					       q->stream);
		}
	cuda_leave(q->gpu->g);
	if (r)
		return cuda_check(q->gpu->d, r, "the runtime's own copy");
	r = kvtier_cuda_append(q->rt.s, q->rt.rows, n);
	if (!r)
		q->rt.rows += n;
	return r;
}

/* Rows on the GPU that are not what the library says, after pushing them. Waits for the stream. */
static inline int gpu_wrong(struct gpu_seq *q)
{
	struct runtime *rt = q->rt.rt;
	uint32_t stride, bad = 0, most = (uint32_t)kvtier_cuda_counts(q->rt.s, q->counts);
	_cleanup_free_ uint32_t *map = NULL, *resident = calloc(q->rt.max_rows, sizeof(*resident));
	_cleanup_free_ uint8_t *rows = malloc((size_t)q->slots * (rt->k_bytes + rt->v_bytes + 2 * q->pad) + 1);
	_cleanup_free_ uint8_t *want = malloc(rt->k_bytes + rt->v_bytes), *seen = calloc(q->rt.max_rows, 1);
	uint64_t addr;

	(void)kvtier_cuda_push(q->rt.s, q->stream); /* fails when the daemon is gone: all were pushed before */
	GPU_CHECK(kvtier_cuda_map(q->rt.s, &addr, &stride));
	map = malloc((size_t)rt->lanes * stride * sizeof(*map));
	GPU_CHECK(cuda_enter(q->gpu->g));
	GPU_CHECK(q->gpu->d->copy_out(map, addr, (size_t)rt->lanes * stride * sizeof(*map), q->stream));
	GPU_CHECK(q->gpu->d->stream_sync(q->stream));
	for (uint32_t lane = 0; lane < rt->lanes && bad < 20; lane++) {
		uint32_t n = (uint32_t)kvtier_seq_resident(q->rt.s, lane, resident, q->rt.max_rows);

		if (n != q->counts[lane] || n > most || n > q->rt.cap) {
			fprintf(stderr, "# lane %u: %u rows resident, %u counted\n", lane, n, q->counts[lane]);
			bad++;
			continue;
		}
		if (!n)
			continue;
		for (int v = 0; v < 2; v++) {
			uint32_t bytes = v ? rt->v_bytes : rt->k_bytes;

			GPU_CHECK(q->gpu->d->copy_out(rows, gpu_slot(q, lane, 0, v),
						      (size_t)n * (bytes + q->pad), q->stream));
			GPU_CHECK(q->gpu->d->stream_sync(q->stream));
			for (uint32_t slot = 0; slot < n; slot++) {
				uint32_t pos = map[(size_t)lane * stride + slot];
				uint32_t lo = 0, hi = n;

				while (lo < hi) /* is it one of those that are resident? */
					if (resident[(lo + hi) / 2] < pos)
						lo = (lo + hi) / 2 + 1;
					else
						hi = (lo + hi) / 2;
				if (lo == n || resident[lo] != pos) {
					fprintf(stderr, "# lane %u slot %u: row %u is not resident\n", lane,
						slot, pos);
					bad++;
					continue;
				}
				gpu_pattern(q, lane, pos, v, want);
				if (memcmp(want, rows + (size_t)slot * (bytes + q->pad), bytes)) {
					if (bad < 5)
						fprintf(stderr, "# lane %u slot %u row %u: wrong %c\n", lane,
							slot, pos, v ? 'V' : 'K');
					bad++;
				}
				/* every slot has another row: found once, it is not there any more */
				if (v && seen[lo]++) {
					fprintf(stderr, "# lane %u slot %u: row %u is there twice\n", lane,
						slot, pos);
					bad++;
				}
			}
		}
		memset(seen, 0, n);
	}
	cuda_leave(q->gpu->g);
	return (int)bad;
}

/* ---- plans -------------------------------------------------------------------------------------- */

/* Apply the plan that is READY; `move`: to the other memory. */
static inline int gpu_apply(struct gpu_seq *q, bool move)
{
	int r = kvtier_cuda_apply(q->rt.s, q->state.plan, move ? q->other : NULL, q->counts, q->stream);

	if (r)
		return r;
	if (move) {
		struct kvtier_cuda_layer *was = q->layers;

		q->layers = q->other;
		q->other = was;
		q->moved++;
	} else {
		q->applied++;
	}
	return 0;
}

/* Look once and apply what is ready. `step` makes a lazy driver work. The plan's state, or an error. */
static inline int gpu_poll(struct gpu_seq *q, int (*step)(int))
{
	int r;

	if (step)
		(void)step((int)(rt_random(&q->rt) % 6));
	r = kvtier_cuda_poll(q->rt.s, q->stream, &q->state);
	if (r == KVT_PLAN_READY) {
		int applied = gpu_apply(q, (q->applied + q->moved) % 3 == 1);

		if (applied && applied != KVT_E_BUSY)
			return applied;
	}
	return r;
}

/* Until a plan with this id was applied and acknowledged and nothing is in flight. */
static inline int gpu_follow(struct gpu_seq *q, uint64_t id, int (*step)(int))
{
	uint64_t until = now_ns() + 20000000000u;
	int r;

	do {
		r = kvtier_cuda_push(q->rt.s, q->stream);
		if (r >= 0)
			r = gpu_poll(q, step);
		if (r >= 0 && !q->state.busy && !q->state.plan && atomic_load(&q->rt.s->acked) >= id &&
		    q->state.pushed == q->rt.rows)
			return 0;
		if (r >= 0 && !step)
			usleep(50);
	} while (r >= 0 && now_ns() < until);
	if (r >= 0) {
		struct plan_view v = {0};

		r = plan_peek(q->rt.s->plan_area, q->rt.s->plan_bytes, q->rt.s->lanes, &v);
		r = err_set(KVT_E_TIMEOUT,
			    "plan %llu: not there: plan %llu state %u busy %u, pushed %u of %u, acked %llu; "
			    "visible %d: "
			    "%llu state %u, taken %u staged %u of %u",
			    (unsigned long long)id, (unsigned long long)q->state.plan, q->state.state,
			    q->state.busy, q->state.pushed, q->rt.rows,
			    (unsigned long long)atomic_load(&q->rt.s->acked), r, (unsigned long long)v.id,
			    v.state, r > 0 ? plan_taken(&v) : 0, r > 0 ? plan_staged(&v) : 0, v.out_pages);
	}
	return r;
}

static inline int gpu_plan(struct gpu_seq *q, uint32_t dev, uint32_t dram, uint32_t nvme, int (*step)(int))
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .device_rows = dev,
				  .dram_rows = dram,
				  .nvme_rows = nvme,
				  .manual = 1,
				  .policy = "random"};
	uint64_t id;
	int r = kvtier_plan_request(q->rt.s, &b, &id);

	return r < 0 ? r : gpu_follow(q, id, step);
}
