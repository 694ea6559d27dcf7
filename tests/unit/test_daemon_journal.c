/* SPDX-License-Identifier: MIT */
/* The ring of a sequence's last plans: none without plans, growing, wrapping, oldest first, charged. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <cmocka.h>
#include "daemon/internal.h"

static void nothing_costs_nothing(void **state)
{
	assert_int_equal(journal_count(NULL), 0);
	assert_int_equal(journal_bytes(NULL), 0);
}

static void grows_to_the_most_and_wraps(void **state)
{
	struct journal *j = NULL;
	uint64_t bytes = 0;

	for (uint64_t i = 1; i <= 3 * JOURNAL_MOST + 5; i++) {
		struct journal_entry *e = journal_add(&j);
		uint32_t n;

		assert_non_null(e);
		assert_int_equal(e->plan, 0); /* what was there before is gone */
		assert_int_equal(e->kept, 0);
		e->plan = i;
		e->kept = 2 * i;
		n = journal_count(j);
		assert_int_equal(j->made, i);
		assert_int_equal(n, i < JOURNAL_MOST ? i : JOURNAL_MOST);
		assert_true(journal_bytes(j) >= bytes && journal_bytes(j) >= n * sizeof(*e));
		bytes = journal_bytes(j);
		for (uint32_t k = 0; k < n; k++)
			assert_int_equal(journal_at(j, k)->plan, i - n + 1 + k);
		assert_int_equal(journal_at(j, n - 1)->kept, 2 * i);
	}
	assert_int_equal(j->cap, JOURNAL_MOST);
	free(j);
}

/* Moves below the device go to the newest record; those of the device are the plan's own. */
static void moves_are_added_up(void **state)
{
	struct seq s = {.journal = NULL};

	journal_move(&s, KVT_TIER_DRAM, KVT_TIER_NVME, 5); /* no record: nothing to add to */
	assert_null(s.journal);
	assert_non_null(journal_add(&s.journal));
	assert_non_null(journal_add(&s.journal));
	journal_move(&s, KVT_TIER_DRAM, KVT_TIER_NVME, 5);
	journal_move(&s, KVT_TIER_DRAM, KVT_TIER_NVME, 6);
	journal_move(&s, KVT_TIER_NVME, KVT_TIER_DRAM, 3);
	journal_move(&s, KVT_TIER_DEVICE, KVT_TIER_DRAM, 100);
	assert_int_equal(journal_at(s.journal, 0)->down, 0);
	assert_int_equal(journal_at(s.journal, 1)->down, 11);
	assert_int_equal(journal_at(s.journal, 1)->up, 3);
	free(s.journal);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(nothing_costs_nothing),
		cmocka_unit_test(grows_to_the_most_and_wraps),
		cmocka_unit_test(moves_are_added_up),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
