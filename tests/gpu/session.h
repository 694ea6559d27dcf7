/* SPDX-License-Identifier: MIT */
#pragma once
/* One leased sequence whose rows are in GPU memory, moved by plans that are asked for. One thread. */
#include "tests/gpu/rig_rows.h"

#define WAIT_NS (60 * UINT64_C(1000000000))

struct session {
	struct rig *g;
	struct rows rows;
	struct kvtier_model *model;
	struct kvtier_cuda_window *window;
	struct kvtier_seq *s;
	uint32_t n, id, *counts; /* rows; names the sequence; of each lane now */
	uint64_t ring;           /* bytes, each way */
};

static inline double seconds(uint64_t since)
{
	return (double)(now_ns() - since) / 1e9;
}

static inline struct kvtier_model *model_of(struct rig *g, const struct shape *m)
{
	struct kvtier_layer_desc layer[64];
	struct kvtier_model_desc d = {.size = sizeof(d),
				      .name = "e2e",
				      .layers = layer,
				      .n_layers = m->layers,
				      .dtype = KVT_DTYPE_BF16,
				      .head_dim = m->row_bytes / 4,
				      .world = 1};
	struct kvtier_model *ret;

	for (uint32_t i = 0; i < m->layers; i++)
		layer[i] = (struct kvtier_layer_desc){
			.kv_heads = m->heads, .k_bytes = m->row_bytes / 2, .v_bytes = m->row_bytes / 2};
	must(kvtier_model_register(g->c, &d, &ret), "kvtier_model_register");
	return ret;
}

/* Budget of `device` rows, the rest to NVMe; nothing happens unless asked for. Random: rows leave from
 * everywhere. */
static inline struct kvtier_budget budget_of(uint32_t device)
{
	return (struct kvtier_budget){.size = sizeof(struct kvtier_budget),
				      .device_rows = device,
				      .nvme_rows = KVT_ROWS_ALL,
				      .manual = 1,
				      .policy = "random"};
}

static inline void session_enter(struct session *x, bool resume)
{
	struct kvtier_budget b = budget_of(KVT_ROWS_ALL);
	struct kvtier_seq_opts o = {
		.size = sizeof(o), .lifetime = KVT_LEASED, .ttl_s = 600, .max_rows = x->rows.cap, .budget = &b};
	struct kvtier_cuda_seq_opts u = {.size = sizeof(u),
					 .window = x->window,
					 .layers = x->rows.layer,
					 .cap = x->rows.cap,
					 .stage = x->rows.stage,
					 .out_bytes = x->ring,
					 .in_bytes = x->ring};
	uint32_t rows;

	memcpy(o.key, &x->id, sizeof(x->id));
	o.key[15] = o.secret[0] = 1;
	if (!resume) {
		must(kvtier_cuda_seq_open(x->g->c, x->model, &o, &u, &x->s), "kvtier_cuda_seq_open");
		return;
	}
	must(kvtier_cuda_seq_resume(x->g->c, x->model, &o, &u, &x->s, &rows), "kvtier_cuda_seq_resume");
	if (rows != x->n)
		die("resumed with %u rows, not %u", rows, x->n);
}

/* All rows are there and the daemon knows. */
static inline void session_fill(struct session *x, uint32_t n)
{
	struct kvtier_cuda_state st = {.size = sizeof(st)};
	uint64_t start = now_ns();

	x->n = n;
	rows_fill(&x->rows, x->id, n);
	must(kvtier_cuda_append(x->s, 0, n), "kvtier_cuda_append");
	must(kvtier_cuda_push(x->s, x->g->stream), "kvtier_cuda_push");
	while (st.pushed != n) {
		must(kvtier_cuda_poll(x->s, x->g->stream, &st), "kvtier_cuda_poll");
		if (now_ns() - start > WAIT_NS)
			die("rows were not pushed: %u of %u", st.pushed, n);
	}
	must(kvtier_cuda_counts(x->s, x->counts), "kvtier_cuda_counts");
}

/*
 * Ask for `device` rows of each lane and carry it out: seconds until every row is where the plan wants it and
 * the stream has passed. ret_bytes: of the rows that left or came.
 */
static inline double session_move(struct session *x, uint32_t device, uint64_t *ret_bytes)
{
	struct kvtier_budget b = budget_of(device);
	struct kvtier_cuda_state st = {.size = sizeof(st)}, was = st;
	struct kvtier_plan p = {.size = sizeof(p)};
	struct rig_cpu c0 = rig_cpu(x->g), c1;
	uint64_t id, start, seen = 0, moved = 0, last = 0;
	double ready, all;
	int state;

	must(kvtier_cuda_poll(x->s, x->g->stream, &was), "kvtier_cuda_poll");
	start = now_ns();
	must(kvtier_plan_request(x->s, &b, &id), "kvtier_plan_request");
	for (;;) {
		state = must(kvtier_cuda_poll(x->s, x->g->stream, &st), "kvtier_cuda_poll");
		if (!seen && st.plan >= id)
			seen = now_ns() - start;
		if (st.bytes_out + st.bytes_in != moved) {
			moved = st.bytes_out + st.bytes_in;
			last = now_ns() - start;
		}
		if (st.plan >= id && state == KVT_PLAN_READY)
			break;
		if (now_ns() - start > WAIT_NS)
			die("no plan: newest %llu, asked for %llu, state %d", (unsigned long long)st.plan,
			    (unsigned long long)id, state);
	}
	ready = seconds(start);
	must(kvtier_plan_peek(x->s, &p), "kvtier_plan_peek");
	*ret_bytes = (p.rows_out + p.rows_in) * x->rows.m.row_bytes;
	must(kvtier_cuda_apply(x->s, st.plan, NULL, x->counts, x->g->stream), "kvtier_cuda_apply");
	cu(x->g, x->g->d->stream_sync(x->g->stream), "cuStreamSynchronize");
	all = seconds(start);
	must(kvtier_cuda_settle(x->s, 0, 20000, x->g->stream), "kvtier_cuda_settle");
	c1 = rig_cpu(x->g);
	fprintf(stderr,
		"#   to %u rows a lane: decided after %.1f ms, seen %.1f, last bytes %.1f, ready %.1f, applied "
		"%.1f; out "
		"%.0f MB, "
		"in %.0f MB; daemon's loop busy %.0f %%, workers %.0f %%, I/O %.0f %%\n",
		MIN(device, x->n), (double)(p.decided_ns - start) / 1e6, (double)seen / 1e6, (double)last / 1e6,
		ready * 1e3, all * 1e3, (double)(st.bytes_out - was.bytes_out) / 1e6,
		(double)(st.bytes_in - was.bytes_in) / 1e6, 100 * (c1.loop - c0.loop) / all,
		100 * (c1.workers - c0.workers) / all, 100 * (c1.io - c0.io) / all);
	return all;
}

/* Every lane has `want` rows, each the right bytes at its position. */
static inline bool session_right(struct session *x, uint32_t want)
{
	uint64_t wrong;

	for (uint32_t l = 0; l < shape_lanes(&x->rows.m); l++)
		if (x->counts[l] != want) {
			fprintf(stderr, "# lane %u has %u rows, not %u\n", l, x->counts[l], want);
			return false;
		}
	wrong = rows_wrong(&x->rows, x->s, x->counts, x->n);
	if (wrong)
		fprintf(stderr, "# %llu rows are wrong\n", (unsigned long long)wrong);
	return !wrong;
}

static inline void session_new(struct session *x, struct rig *g, const struct shape *m, uint32_t cap,
			       uint32_t id, uint64_t ring)
{
	*x = (struct session){.g = g, .id = id, .ring = ring};
	rows_new(&x->rows, g, m, cap, cap);
	x->counts = calloc(shape_lanes(m), sizeof(*x->counts));
	x->model = model_of(g, m);
	must(kvtier_cuda_window_create(g->c, g->gpu, 2 * x->ring + 8 * MIB, &x->window), "window");
	session_enter(x, false);
}

static inline void session_end(struct session *x)
{
	must(kvtier_seq_drop(x->s), "kvtier_seq_drop");
	kvtier_cuda_window_close(x->window);
	kvtier_model_release(x->model);
	rows_free(&x->rows);
	free(x->counts);
}

/* Saved below, gone, and back under the same key; nothing is in GPU memory any more. Seconds of the resume
 * alone. */
static inline double session_again(struct session *x)
{
	uint64_t start;

	must(kvtier_cuda_settle(x->s, 1, 60000, x->g->stream), "kvtier_cuda_settle, save");
	kvtier_seq_close(x->s);
	cu(x->g, x->g->d->set8(x->rows.base, 0xdd, x->rows.bytes, x->g->stream), "cuMemsetD8Async");
	cu(x->g, x->g->d->stream_sync(x->g->stream), "cuStreamSynchronize");
	start = now_ns();
	session_enter(x, true);
	memset(x->counts, 0, shape_lanes(&x->rows.m) * sizeof(*x->counts));
	return seconds(start);
}
