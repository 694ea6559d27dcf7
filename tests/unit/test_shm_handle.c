/* SPDX-License-Identifier: MIT */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>
/* Retirement takes 2^32 frees from outside, so the generation is set from inside. */
#include "shm/handle.c"

static int objs[1000], owner_a, owner_b;

static struct handle_table *make_table(uint32_t max)
{
	struct handle_table *t = NULL;

	assert_int_equal(handle_table_new(&t, max), 0);
	return t;
}

static void resolves_for_its_owner_only(void **state)
{
	struct handle_table *t = make_table(8);
	uint64_t h;

	h = handle_add(t, &objs[0], &owner_a);
	assert_true(h != 0);
	assert_ptr_equal(handle_get(t, h, &owner_a), &objs[0]);
	assert_null(handle_get(t, h, &owner_b));
	assert_ptr_equal(handle_get(t, h, NULL), &objs[0]); /* admin */
	handle_set_owner(t, h, &owner_b);
	assert_null(handle_get(t, h, &owner_a));
	assert_ptr_equal(handle_get(t, h, &owner_b), &objs[0]);
	handle_set_owner(t, h, NULL); /* an orphan belongs to nobody */
	assert_null(handle_get(t, h, &owner_b));
	assert_ptr_equal(handle_get(t, h, NULL), &objs[0]);
	handle_table_free(t);
	handle_table_free(NULL);
}

static void nonsense_resolves_to_nothing(void **state)
{
	struct handle_table *t = make_table(8);
	uint64_t h;

	assert_null(handle_get(t, 0, NULL));
	h = handle_add(t, &objs[0], &owner_a);
	assert_null(handle_get(t, 0, NULL));
	assert_null(handle_get(t, UINT64_MAX, NULL));
	assert_null(handle_get(t, h + 1, NULL));
	assert_null(handle_get(t, h ^ UINT64_C(1) << 63, NULL));
	assert_null(handle_get(t, h ^ UINT64_C(1) << 32, NULL));
	handle_del(t, 0);
	handle_del(t, UINT64_MAX);
	handle_del(t, h + 7);
	handle_set_owner(t, h + 7, &owner_b);
	assert_int_equal(handle_count(t), 1);
	assert_int_equal(handle_add(t, NULL, &owner_a), 0);
	handle_table_free(t);
}

static void stale_never_resolves(void **state)
{
	struct handle_table *t = make_table(1);
	uint64_t old[1000];

	for (int i = 0; i < 1000; i++) {
		old[i] = handle_add(t, &objs[i], &owner_a);
		assert_true(old[i] != 0);
		for (int k = 0; k < i; k++)
			assert_null(handle_get(t, old[k], NULL));
		assert_ptr_equal(handle_get(t, old[i], &owner_a), &objs[i]);
		if (i)
			handle_del(t, old[i - 1]); /* a second free of the same handle touches nobody */
		assert_int_equal(handle_count(t), 1);
		handle_del(t, old[i]);
		assert_int_equal(handle_count(t), 0);
	}
	handle_table_free(t);
}

static void full_at_max(void **state)
{
	struct handle_table *t = make_table(100);
	uint64_t h[100];

	for (int i = 0; i < 100; i++) {
		h[i] = handle_add(t, &objs[i], &owner_a);
		assert_true(h[i] != 0);
	}
	assert_int_equal(handle_add(t, &objs[0], &owner_a), 0);
	assert_int_equal(handle_count(t), 100);
	for (int i = 0; i < 100; i++)
		assert_ptr_equal(handle_get(t, h[i], &owner_a), &objs[i]);
	handle_del(t, h[42]);
	assert_true(handle_add(t, &objs[200], &owner_b) != 0);
	assert_int_equal(handle_add(t, &objs[0], &owner_a), 0);
	handle_table_free(t);

	t = make_table(0);
	assert_int_equal(handle_add(t, &objs[0], &owner_a), 0);
	handle_table_free(t);
}

static void wrapped_generation_is_retired(void **state)
{
	struct handle_table *t = make_table(2);
	uint64_t first, last, h;

	first = handle_add(t, &objs[0], &owner_a);
	handle_del(t, first);
	t->slot[0].gen = UINT32_MAX;
	last = handle_add(t, &objs[1], &owner_a);
	assert_int_equal(last, (uint64_t)UINT32_MAX << 32);
	assert_ptr_equal(handle_get(t, last, &owner_a), &objs[1]);
	handle_del(t, last);
	assert_null(handle_get(t, last, NULL));
	/* The retired slot is never handed out again: one slot is left of two. */
	h = handle_add(t, &objs[2], &owner_a);
	assert_int_equal((uint32_t)h, 1);
	assert_int_equal(handle_add(t, &objs[3], &owner_a), 0);
	assert_null(handle_get(t, first, NULL));
	handle_table_free(t);
}

static void iterates_the_living(void **state)
{
	struct handle_table *t = make_table(64);
	uint64_t h[50], got;
	uint32_t cursor = 0;
	int seen = 0;
	void *o;

	for (int i = 0; i < 50; i++)
		h[i] = handle_add(t, &objs[i], &owner_a);
	for (int i = 0; i < 50; i += 3)
		handle_del(t, h[i]);
	while ((o = handle_next(t, &cursor, &got))) {
		long i = (int *)o - objs;

		assert_int_not_equal(i % 3, 0);
		assert_int_equal(got, h[i]);
		handle_del(t, got); /* deleting the current one while iterating is allowed */
		seen++;
	}
	assert_int_equal(seen, 33);
	assert_int_equal(handle_count(t), 0);
	cursor = 0;
	assert_null(handle_next(t, &cursor, NULL));
	handle_table_free(t);
}

/* Random adds and frees against a plain model. */
static void agrees_with_a_model(void **state)
{
	struct handle_table *t = make_table(600);
	uint64_t live[1000] = {0}, dead[1000] = {0};
	uint32_t x = 1, count = 0;

	for (int step = 0; step < 100000; step++) {
		uint32_t i;

		x = x * 1664525 + 1013904223;
		i = (x >> 8) % 1000;
		if (live[i]) {
			assert_ptr_equal(handle_get(t, live[i], &owner_a), &objs[i]);
			handle_del(t, live[i]);
			dead[i] = live[i];
			live[i] = 0;
			count--;
		} else {
			live[i] = handle_add(t, &objs[i], &owner_a);
			assert_int_equal(live[i] == 0, count == 600);
			count += live[i] != 0;
		}
		assert_null(handle_get(t, dead[i], NULL));
		assert_int_equal(handle_count(t), count);
	}
	handle_table_free(t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(resolves_for_its_owner_only),   cmocka_unit_test(nonsense_resolves_to_nothing),
		cmocka_unit_test(stale_never_resolves),          cmocka_unit_test(full_at_max),
		cmocka_unit_test(wrapped_generation_is_retired), cmocka_unit_test(iterates_the_living),
		cmocka_unit_test(agrees_with_a_model),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
