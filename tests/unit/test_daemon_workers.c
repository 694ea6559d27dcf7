/* SPDX-License-Identifier: MIT */
/* Whose job a worker takes next. Without threads: each step is one job. */
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <cmocka.h>
#include "daemon/workers.h"
#include "shm/util.h"

#define MiB (UINT64_C(1) << 20)

struct fix {
	sd_event *ev;
	struct workers *w;
};

struct seen {
	struct job job;
	unsigned *order; /* counts up with each job that ran */
	unsigned at;     /* when this one did, 0 not yet */
};

static void seen_run(struct job *j, struct worker_ctx *w)
{
	struct seen *s = container_of(j, struct seen, job);

	s->at = ++*s->order;
}

static void seen_done(struct job *j)
{
}

static void put(struct fix *f, struct seen *s, uint32_t tenant, bool urgent, uint64_t bytes, unsigned *order)
{
	*s = (struct seen){
		.job = {.run = seen_run, .done = seen_done, .tenant = tenant, .urgent = urgent, .bytes = bytes},
		.order = order};
	workers_put(f->w, &s->job);
}

static void step(struct fix *f)
{
	assert_true(workers_step(f->w, false));
	workers_finish(f->w);
}

static int setup(void **state)
{
	struct fix *f = calloc(1, sizeof(*f));

	assert_non_null(f);
	assert_true(sd_event_new(&f->ev) >= 0);
	assert_int_equal(workers_new(&f->w, f->ev, 0, 2), 0);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fix *f = *state;

	workers_free(f->w);
	sd_event_unref(f->ev);
	free(f);
	return 0;
}

/* One served 1 GiB alone. Another comes when nobody waits, and from then on always has jobs. */
static void newcomer_has_no_credit(void **state)
{
	struct fix *f = *state;
	struct seen old, new[8];
	unsigned order = 0;

	for (unsigned i = 0; i < 1024; i++) {
		put(f, &old, 0, false, MiB, &order);
		step(f);
	}
	order = 0;
	for (unsigned i = 0; i < ARRAY_SIZE(new); i++)
		put(f, &new[i], 1, false, MiB, &order);
	step(f);
	put(f, &old, 0, false, MiB, &order);
	for (unsigned i = 1; i < ARRAY_SIZE(new); i++)
		step(f);
	assert_in_range(old.at, 2, 4);
	step(f);
}

/* Both always have jobs: both get as many bytes, whatever the size of a job. */
static void equal_bytes(void **state)
{
	struct fix *f = *state;
	struct seen big[16], small[64];
	unsigned order = 0, had = 0;

	for (unsigned i = 0; i < ARRAY_SIZE(big); i++)
		put(f, &big[i], 0, false, 4 * MiB, &order);
	for (unsigned i = 0; i < ARRAY_SIZE(small); i++)
		put(f, &small[i], 1, false, MiB, &order);
	for (unsigned i = 0; i < 40; i++)
		step(f);
	for (unsigned i = 0; i < ARRAY_SIZE(big); i++)
		had += big[i].at != 0;
	assert_in_range(had, 7, 9);
	while (workers_step(f->w, false))
		workers_finish(f->w);
}

/* Jobs that move nothing are not for nothing: enough of them never end. */
static void every_job_costs(void **state)
{
	struct fix *f = *state;
	struct seen none[32], one;
	unsigned order = 0;

	for (unsigned i = 0; i < ARRAY_SIZE(none); i++)
		put(f, &none[i], 0, false, 0, &order);
	put(f, &one, 1, false, MiB, &order);
	step(f);
	step(f);
	assert_in_range(one.at, 1, 2);
	while (workers_step(f->w, false))
		workers_finish(f->w);
}

/* Decisions without end of one tenant do not keep another's copies waiting. */
static void decisions_end(void **state)
{
	struct fix *f = *state;
	struct seen copy, decide[32];
	unsigned order = 0;

	for (unsigned i = 0; i < ARRAY_SIZE(decide); i++)
		put(f, &decide[i], 1, true, 0, &order);
	put(f, &copy, 0, false, MiB, &order);
	for (unsigned i = 0; i < 8; i++)
		step(f);
	assert_in_range(copy.at, 2, 8); /* after a decision, not after all of them */
	while (workers_step(f->w, false))
		workers_finish(f->w);
	assert_int_equal(order, ARRAY_SIZE(decide) + 1);
}

static void decisions_by_turns(void **state)
{
	struct fix *f = *state;
	struct seen many[16], one;
	unsigned order = 0;

	for (unsigned i = 0; i < ARRAY_SIZE(many); i++)
		put(f, &many[i], 1, true, 0, &order);
	put(f, &one, 0, true, 0, &order);
	step(f);
	step(f);
	assert_in_range(one.at, 1, 2);
	while (workers_step(f->w, false))
		workers_finish(f->w);
}

/* Processors that others have are none of ours. */
static void threads_fit_the_affinity(void **state)
{
	cpu_set_t all, few;

	assert_int_equal(sched_getaffinity(0, sizeof(all), &all), 0);
	if (CPU_COUNT(&all) < 2) {
		print_message("# SKIP one processor: no fewer to be had\n");
		skip();
	}
	assert_int_equal(workers_fitting(), MAX(CPU_COUNT(&all) - 1, 1));
	CPU_ZERO(&few);
	for (int i = 0; !CPU_COUNT(&few); i++)
		if (CPU_ISSET(i, &all))
			CPU_SET(i, &few);
	assert_int_equal(sched_setaffinity(0, sizeof(few), &few), 0);
	assert_int_equal(workers_fitting(), 1);
	assert_int_equal(sched_setaffinity(0, sizeof(all), &all), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(newcomer_has_no_credit, setup, teardown),
		cmocka_unit_test_setup_teardown(equal_bytes, setup, teardown),
		cmocka_unit_test_setup_teardown(every_job_costs, setup, teardown),
		cmocka_unit_test_setup_teardown(decisions_end, setup, teardown),
		cmocka_unit_test_setup_teardown(decisions_by_turns, setup, teardown),
		cmocka_unit_test(threads_fit_the_affinity),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
