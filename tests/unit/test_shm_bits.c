/* SPDX-License-Identifier: MIT */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>
#include "shm/bits.h"

#define ROWS 300u
#define WORDS BITS_WORDS(ROWS)

/* One guard word on each side of the bitmap and a plain array beside it. */
struct model {
	uint64_t map[WORDS + 2];
	bool bit[WORDS * 64];
};

static uint32_t rnd(uint32_t n)
{
	static uint32_t x = 7;

	x = x * 1664525 + 1013904223;
	return (x >> 8) % n;
}

static void check(const struct model *m)
{
	const uint64_t *b = m->map + 1;
	uint32_t count = 0, next = 0;

	assert_int_equal(m->map[0], UINT64_MAX);
	assert_int_equal(m->map[WORDS + 1], UINT64_MAX);
	for (uint32_t i = 0; i < ROWS; i++) {
		assert_int_equal(bits_test(b, i), m->bit[i]);
		assert_int_equal(bits_rank(b, i), count);
		count += m->bit[i];
	}
	assert_int_equal(bits_rank(b, ROWS), count);
	bits_for_each(i, b, ROWS) {
		while (next < i)
			assert_false(m->bit[next++]);
		assert_true(m->bit[next++]);
		count--;
	}
	assert_int_equal(count, 0);
}

static void agrees_with_an_array(void **state)
{
	struct model m = {0};
	uint64_t *b = m.map + 1;

	m.map[0] = m.map[WORDS + 1] = UINT64_MAX;
	for (int step = 0; step < 3000; step++) {
		uint32_t i = rnd(ROWS), from = rnd(ROWS + 1), to = from + rnd(ROWS + 1 - from);

		switch (rnd(4)) {
		case 0:
			bits_set(b, i);
			m.bit[i] = true;
			break;
		case 1:
			bits_clear(b, i);
			m.bit[i] = false;
			break;
		case 2:
			bits_set_range(b, from, to);
			memset(m.bit + from, 1, to - from);
			break;
		default:
			bits_clear_range(b, from, to);
			memset(m.bit + from, 0, to - from);
		}
		check(&m);
	}
}

static void ends(void **state)
{
	uint64_t b[2] = {0, UINT64_C(1) << 63};

	assert_int_equal(BITS_WORDS(0), 0);
	assert_int_equal(BITS_WORDS(64), 1);
	assert_int_equal(BITS_WORDS(65), 2);
	assert_int_equal(BITS_WORDS(UINT32_MAX), UINT32_C(1) << 26);
	assert_int_equal(bits_next(b, 0, 128), 127);
	assert_int_equal(bits_next(b, 0, 127), 127); /* found past n: none */
	assert_int_equal(bits_next(b, 128, 128), 128);
	assert_int_equal(bits_next(b, 0, 0), 0);
	assert_int_equal(bits_rank(b, 127), 0);
	assert_int_equal(bits_rank(b, 128), 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(agrees_with_an_array),
		cmocka_unit_test(ends),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
