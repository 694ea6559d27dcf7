/* SPDX-License-Identifier: MIT */
/* Time in reclaim against what [pressure] psi asks for. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <string.h>
#include "daemon/pressure.h"

#define MS UINT64_C(1000000)

static struct stall begun(const char *spec, uint64_t sum, uint64_t now)
{
	struct stall st;

	stall_set(&st, spec);
	assert_false(stall_look(&st, sum, now));
	return st;
}

static void as_much_as_psi_asks_for_is_an_event(void **state)
{
	struct stall st = begun("some 150ms/2s", 7000 * MS, MS); /* what was before counts for nothing */

	assert_false(stall_look(&st, 7149 * MS, 250 * MS));
	assert_true(stall_look(&st, 7150 * MS, 500 * MS));
}

static void one_event_in_a_window(void **state)
{
	struct stall st = begun("some 150ms/2s", 0, MS);

	assert_true(stall_look(&st, 200 * MS, 100 * MS));
	for (uint64_t at = 110; at < 2100; at += 10)
		assert_false(stall_look(&st, (200 + 10 * at) * MS, at * MS));
	assert_false(stall_look(&st, 90000 * MS, 2100 * MS)); /* from here on */
	assert_true(stall_look(&st, 90150 * MS, 2110 * MS));
}

/* 70 ms a second are 140 in each window of two. */
static void little_by_little_is_none(void **state)
{
	struct stall st = begun("some 150ms/2s", 0, MS);

	for (uint64_t at = 250; at < 60000; at += 250)
		assert_false(stall_look(&st, at * 70 / 1000 * MS, at * MS + MS));
}

static void a_burst_is_seen_wherever_it_falls(void **state)
{
	for (uint64_t from = 250; from < 5000; from += 50) {
		struct stall st = begun("some 150ms/2s", 0, MS);
		bool seen = false;

		for (uint64_t at = 50; at < from + 1000; at += 50)
			seen |= stall_look(&st, at < from ? 0 : (at - from) / 5 * MS, at * MS);
		assert_true(seen);
	}
}

static void new_probes_begin_at_nothing(void **state)
{
	struct stall st = begun("some 150ms/2s", 500 * MS, MS);

	assert_false(stall_look(&st, 3 * MS, 250 * MS));
	assert_false(stall_look(&st, 152 * MS, 500 * MS));
	assert_true(stall_look(&st, 153 * MS, 750 * MS));
}

static void psi_no_is_none_of_these_either(void **state)
{
	struct stall st = begun("no", 0, MS);
	char text[64];

	assert_false(stall_look(&st, 99999 * MS, 9 * MS));
	stall_says(&st, NULL, text, sizeof(text));
	assert_string_equal(text, "off: psi = no");
	stall_set(&st, "full 100ms/4s");
	stall_says(&st, NULL, text, sizeof(text));
	assert_string_equal(text, "100 ms in 4 s");
	stall_says(&st, "why", text, sizeof(text));
	assert_string_equal(text, "off: why");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(as_much_as_psi_asks_for_is_an_event),
		cmocka_unit_test(one_event_in_a_window),
		cmocka_unit_test(little_by_little_is_none),
		cmocka_unit_test(a_burst_is_seen_wherever_it_falls),
		cmocka_unit_test(new_probes_begin_at_nothing),
		cmocka_unit_test(psi_no_is_none_of_these_either),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
