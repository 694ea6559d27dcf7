/* SPDX-License-Identifier: MIT */
/* Counts by powers of two: which bucket, which quantile, what was added since. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <cmocka.h>
#include "shm/histogram.h"

static void values_fall_into_their_power_of_two(void **state)
{
	assert_int_equal(histogram_index(0), 0);
	assert_int_equal(histogram_index(1), 0);
	assert_int_equal(histogram_index(2), 1);
	for (unsigned i = 1; i < HISTOGRAM_BUCKETS; i++) {
		assert_int_equal(histogram_index(UINT64_C(1) << i), i);
		assert_int_equal(histogram_index((UINT64_C(1) << i) - 1), i - 1);
	}
	assert_int_equal(histogram_index(UINT64_MAX), HISTOGRAM_BUCKETS - 1);
}

static void quantiles_lie_in_the_bucket_of_their_value(void **state)
{
	struct histogram h = {0};

	assert_int_equal(histogram_quantile(&h, 0.5), 0);
	for (uint64_t v = 1; v <= 1000; v++)
		histogram_add(&h, v);
	assert_int_equal(histogram_count(&h), 1000);
	assert_int_equal(h.sum, 500500);
	assert_in_range(histogram_quantile(&h, 0.5), 256, 512);
	assert_in_range(histogram_quantile(&h, 0.99), 512, 1024);
	assert_true(histogram_quantile(&h, 0.25) <= histogram_quantile(&h, 0.26));
}

static void the_difference_is_what_came_since(void **state)
{
	struct histogram a = {0}, b, d;

	histogram_add(&a, 7);
	b = a;
	histogram_add(&b, 7);
	histogram_add(&b, 9000);
	histogram_since(&b, &a, &d);
	assert_int_equal(histogram_count(&d), 2);
	assert_int_equal(d.sum, 9007);
	assert_int_equal(d.bucket[histogram_index(9000)], 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(values_fall_into_their_power_of_two),
		cmocka_unit_test(quantiles_lie_in_the_bucket_of_their_value),
		cmocka_unit_test(the_difference_is_what_came_since),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
