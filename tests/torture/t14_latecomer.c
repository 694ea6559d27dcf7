/* SPDX-License-Identifier: MIT */
/*
 * torture 14: who comes late, with much to do, to workers that served somebody else all the while
 * pass: the other one's plan comes before half of the newcomer's, no row wrong
 * quick: 2 lives of the daemon
 * full: 200 lives
 * plants: credit-for-absence
 *
 * Without worker threads: each step is one job, so what is counted is order, not time. A tenant has plans made,
 * one after the other; then another one, who never asked for anything, asks for many at once, and while those
 * wait the first asks for one more.
 */
#include <inttypes.h>
#include "daemon/internal.h"
#include "tests/unit/core_harness.h"

#define ROWS 400u
#define KEEP 200u
#define BEFORE 24u /* plans of the early one: more than it takes to make the newcomer's */
#define AT_ONCE 16u
#define WAIT_NS UINT64_C(20000000000)

static int fail(const char *what, int r)
{
	printf("# %s: %s: %s\n", what, kvtier_strerror(r), kvtier_last_error());
	return -1;
}

static void step(struct core *c, void *arg)
{
	*(bool *)arg = workers_step(c->workers, false);
	workers_finish(c->workers);
}

static bool ready(struct rt_seq *q)
{
	struct kvtier_plan p = {.size = sizeof(p)};

	return kvtier_plan_peek(q->s, &p) == 1 && p.state == KVT_PLAN_READY;
}

/* Keys to be scored, by workers. */
static int come(struct runtime *rt, const char *sock)
{
	struct kvtier_layer_desc layer[2];
	struct kvtier_model_desc d = {.size = sizeof(d),
				      .name = "late",
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

/* A sequence with rows to score and to copy, and the request for its plan. */
static int ask(struct rt_seq *q, struct runtime *rt, uint32_t id)
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .device_rows = KEEP,
				  .dram_rows = KVT_ROWS_ALL,
				  .manual = 1,
				  .policy = "knorm"};
	uint64_t plan;
	int r = rt_prepare(q, rt, id, ROWS, 64, ROWS);

	if (!r)
		r = rt_seq_open(q, KVT_EPHEMERAL, &b);
	if (!r)
		r = rt_append(q, ROWS);
	return r ? r : kvtier_plan_request(q->s, &b, &plan);
}

/* Job by job until its plan is there. */
static int work_for(struct harness *h, struct rt_seq *q)
{
	uint64_t end = now_ns() + WAIT_NS;
	bool did;

	while (!ready(q)) {
		harness_call(h, step, &did);
		if (now_ns() > end)
			return fail("no plan", KVT_E_TIMEOUT);
	}
	return 0;
}

static int take(struct rt_seq *q)
{
	int r = rt_follow(q, 0, NULL);

	return r ? fail("apply", r) : rt_wrong(q) ? fail("rows are wrong", KVT_E_CORRUPT) : 0;
}

static int serve_before(struct harness *h, struct runtime *early)
{
	for (uint32_t i = 0; i < BEFORE; i++) {
		struct rt_seq q;
		int r = ask(&q, early, i + 1);

		if (r)
			return fail("early", r);
		if (work_for(h, &q) || take(&q))
			return -1;
		rt_seq_free(&q, true);
	}
	return 0;
}

/* How many of the newcomer's plans came before the one; < 0: an error. */
static int race(struct harness *h, struct runtime *early, struct runtime *late)
{
	struct rt_seq many[AT_ONCE], one;
	int r, before = 0;

	for (uint32_t i = 0; i < AT_ONCE; i++)
		if ((r = ask(&many[i], late, 100 + i)))
			return fail("late", r);
	r = ask(&one, early, 200);
	if (r)
		return fail("early", r);
	if (work_for(h, &one))
		return -1;
	for (uint32_t i = 0; i < AT_ONCE; i++)
		before += ready(&many[i]);
	if (take(&one))
		return -1;
	for (uint32_t i = 0; i < AT_ONCE; i++) {
		if (work_for(h, &many[i]) || take(&many[i]))
			return -1;
		rt_seq_free(&many[i], true);
	}
	rt_seq_free(&one, true);
	return before;
}

static int life(int swap)
{
	struct runtime early, late;
	struct harness h;
	int r, before;

	harness_init(&h, false);
	h.stepped = true;
	if (!harness_start(&h))
		return -1;
	r = come(&early, h.sock[swap]);
	if (!r)
		r = come(&late, h.sock[!swap]);
	before = r ? fail("connect", r) : serve_before(&h, &early) ? -1 : race(&h, &early, &late);
	if (before >= 0) {
		rt_close(&early);
		rt_close(&late);
		harness_stop(&h);
	}
	harness_rm(h.dir);
	return before;
}

int main(void)
{
	const char *mode = getenv("KVT_TORTURE");
	int n = mode && !strcmp(mode, "full") ? 200 : 2, most = 0;

	printf("1..1\n");
	for (int i = 0; i < n; i++) {
		int before = life(i % 2);

		if (before < 0 || (unsigned)before > AT_ONCE / 2) {
			printf("# life %d: %d of the newcomer's %u plans came first\nnot ok 1 - latecomer\n", i,
			       before, AT_ONCE);
			return 1;
		}
		most = MAX(most, before);
	}
	printf("# figure: %d lives: at most %d of a newcomer's %u plans came before one of a tenant served "
	       "before\n",
	       n, most, AT_ONCE);
	printf("ok 1 - latecomer\n");
	return 0;
}
