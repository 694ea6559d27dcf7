/* SPDX-License-Identifier: MIT */
#pragma once
/* A core without worker threads: each step is one job. For tests of order: whose job comes before whose. */
#include "daemon/internal.h"
#include "tests/unit/core_harness.h"

#define STEP_ROWS 400u
#define STEP_WAIT_NS UINT64_C(20000000000)

static inline void step_call(struct core *c, void *arg)
{
	*(bool *)arg = workers_step(c->workers, false);
	workers_finish(c->workers);
}

/* Of what is waiting the next job; false: nothing was. */
static inline bool step(struct harness *h)
{
	bool did;

	harness_call(h, step_call, &did);
	return did;
}

static inline bool step_ready(struct rt_seq *q)
{
	struct kvtier_plan p = {.size = sizeof(p)};

	return kvtier_plan_peek(q->s, &p) == 1 && p.state == KVT_PLAN_READY;
}

/* Keys to be scored, by workers. */
static inline int step_open(struct runtime *rt, const char *sock)
{
	struct kvtier_layer_desc layer[2];
	struct kvtier_model_desc d = {.size = sizeof(d),
				      .name = "stepped",
				      .layers = layer,
				      .n_layers = 2,
				      .dtype = KVT_DTYPE_F16,
				      .head_dim = 32,
				      .world = 1};
	int r = rt_open_dims(rt, sock, 2, 3, 64, 64, 64, 0);

	for (unsigned i = 0; i < 2; i++)
		layer[i] = (struct kvtier_layer_desc){.kv_heads = 3, .k_bytes = 64, .v_bytes = 64};
	if (r)
		return r;
	kvtier_model_release(rt->m);
	return kvtier_model_register(rt->c, &d, &rt->m);
}

/* A sequence with rows that nobody has scored. */
static inline int step_make(struct rt_seq *q, struct runtime *rt, uint32_t id)
{
	struct kvtier_budget b = {.size = sizeof(b), .device_rows = KVT_ROWS_ALL, .manual = 1};
	int r = rt_prepare(q, rt, id, STEP_ROWS, STEP_ROWS, STEP_ROWS);

	if (!r)
		r = rt_seq_open(q, KVT_EPHEMERAL, &b);
	return r ? r : rt_append(q, STEP_ROWS);
}

/* Ask for a plan that keeps so many. */
static inline int step_want(struct rt_seq *q, const char *policy, uint32_t keep)
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .device_rows = keep,
				  .dram_rows = KVT_ROWS_ALL,
				  .manual = 1,
				  .policy = policy};
	uint64_t plan;

	return kvtier_plan_request(q->s, &b, &plan);
}

/* Job by job until its plan is READY; or KVT_E_TIMEOUT. */
static inline int step_until(struct harness *h, struct rt_seq *q)
{
	uint64_t end = now_ns() + STEP_WAIT_NS;

	while (!step_ready(q)) {
		step(h);
		if (now_ns() > end)
			return KVT_E_TIMEOUT;
	}
	return 0;
}
