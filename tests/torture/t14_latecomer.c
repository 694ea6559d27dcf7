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
#include "tests/unit/stepped_fixture.h"

#define KEEP 200u
#define BEFORE 24u /* plans of the early one: more than it takes to make the newcomer's */
#define AT_ONCE 16u

static int fail(const char *what, int r)
{
	printf("# %s: %s: %s\n", what, kvtier_strerror(r), kvtier_last_error());
	return -1;
}

static int ask(struct rt_seq *q, struct runtime *rt, uint32_t id)
{
	int r = step_make(q, rt, id);

	return r ? r : step_want(q, "knorm", KEEP);
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
		if (step_until(h, &q) || take(&q))
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
	r = step_until(h, &one);
	if (r)
		return fail("no plan", r);
	for (uint32_t i = 0; i < AT_ONCE; i++)
		before += step_ready(&many[i]);
	if (take(&one))
		return -1;
	for (uint32_t i = 0; i < AT_ONCE; i++) {
		if (step_until(h, &many[i]) || take(&many[i]))
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
	r = step_open(&early, h.sock[swap]);
	if (!r)
		r = step_open(&late, h.sock[!swap]);
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
