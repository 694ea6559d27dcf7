/* SPDX-License-Identifier: MIT */
/* Rates that kvtierctl top counts between two answers of the daemon. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include "daemon/ctl/top.h"

static void rate_is_per_second(void **state)
{
	(void)state;
	assert_true(top_rate(100, 400, 2000000000u) == 150.0);
	assert_true(top_rate(0, 1, 500000000u) == 2.0);
}

static void rate_is_zero_without_time_and_after_a_restart(void **state)
{
	(void)state;
	assert_true(top_rate(100, 400, 0) == 0);
	assert_true(top_rate(400, 100, 1000000000u) == 0);
	assert_true(top_rate(UINT64_MAX, 0, 1) == 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rate_is_per_second),
		cmocka_unit_test(rate_is_zero_without_time_and_after_a_restart),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
