/* SPDX-License-Identifier: MIT */
/* Score keys: order over every half, rounding, saturation, and one result whatever the CPU. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "policy/cpu.h"
#include "policy/decide.h"
#include "policy/keys.h"
#include "shm/util.h"

/* The value of a half by its definition, in double. */
static double half_value(uint32_t h)
{
	int exp = h >> 10 & 31;
	double m = h & 0x3ff, v = exp ? ldexp(1024 + m, exp - 25) : ldexp(m, -24);

	return h & 0x8000 ? -v : v;
}

static bool half_finite(uint32_t h)
{
	return (h >> 10 & 31) != 31;
}

static float float_of(uint32_t bits)
{
	float f;

	memcpy(&f, &bits, sizeof(f));
	return f;
}

static void order_holds_over_every_half(void **state)
{
	uint16_t last = 0;

	/* From the most negative finite half to the largest, in numeric order. */
	for (int v = -0x7bff; v <= 0x7bff; v++) {
		uint32_t h = v < 0 ? 0x8000u | (uint32_t)-v : (uint32_t)v;
		uint16_t key = score_key((float)half_value(h));

		assert_true(half_finite(h));
		assert_true(key > last); /* 0 at first: never the key of a score */
		last = key;
	}
}

static void zero_has_one_key(void **state)
{
	assert_int_equal(score_key(0.0f), score_key(-0.0f));
}

static void extremes(void **state)
{
	const float odd[] = {NAN, -NAN, INFINITY, -INFINITY};

	for (size_t i = 0; i < ARRAY_SIZE(odd); i++)
		assert_int_equal(score_key(odd[i]), KEY_LOWEST);
	assert_true(score_key(-3.4e38f) > KEY_LOWEST);
	assert_int_equal(score_key(3.4e38f), score_key(65504));
	assert_int_equal(score_key(-3.4e38f), score_key(-65504));
	assert_true(score_key(-1e-30f) <= score_key(0));
	assert_true(score_key(1e-30f) >= score_key(0));
}

/* Between two neighbouring halves the nearer one wins, in the middle the even one. */
static void rounds_to_nearest_even(void **state)
{
	for (uint32_t h = 0; h < 0x7bff; h++) {
		double lo = half_value(h), hi = half_value(h + 1), mid = (lo + hi) / 2;
		uint16_t key_lo = score_key((float)lo), key_hi = score_key((float)hi);

		assert_int_equal(score_key((float)mid), h & 1 ? key_hi : key_lo);
		assert_int_equal(score_key(nextafterf((float)mid, 0)), key_lo);
		assert_int_equal(score_key(nextafterf((float)mid, 1e9f)), key_hi);
	}
}

static void monotone_over_floats(void **state)
{
	/* Every 4,099th float pattern, ascending. */
	for (int sign = 0; sign < 2; sign++) {
		uint16_t last = score_key(0);

		for (uint32_t u = 0; u < 0x7f800000; u += 4099) {
			uint16_t key = score_key(float_of(u | (uint32_t)sign << 31));

			assert_true(sign ? key <= last : key >= last);
			assert_true(key > KEY_LOWEST);
			last = key;
		}
	}
}

static void vector_equals_portable(void **state)
{
	enum { N = 4096 };
	_cleanup_free_ float *f = malloc(N * sizeof(*f));
	_cleanup_free_ uint16_t *want = malloc(N * sizeof(*want)), *got = malloc(N * sizeof(*got));

	if (!cpu_has_avx2()) {
		print_message("# SKIP this CPU has no AVX2\n");
		skip();
	}
	assert_non_null(f);
	assert_non_null(want);
	assert_non_null(got);
	/* All exponents, signs and the mantissas around every rounding point. */
	for (uint32_t top = 0; top < 0x10000; top++) {
		const uint32_t low[] = {0,      1,      0x0fff, 0x1000, 0x1001, 0x1fff,
					0x2000, 0x8000, 0xefff, 0xf001, 0xffff};
		size_t at = top % 256 * ARRAY_SIZE(low);

		for (size_t i = 0; i < ARRAY_SIZE(low); i++)
			f[at + i] = float_of(top << 16 | low[i]);
		if (top % 256 != 255)
			continue;
		at += ARRAY_SIZE(low);
		score_keys_portable(f, want, at);
		score_keys(f, got, at);
		assert_memory_equal(want, got, at * sizeof(*want));
		at -= at % 16;
		assert_int_equal(score_keys_avx2(f, got, at), at);
		assert_memory_equal(want, got, at * sizeof(*want));
	}
}

/* Any length, any alignment, and nothing written past the end. */
static void lengths(void **state)
{
	float f[80];
	uint16_t keys[80];

	for (uint32_t i = 0; i < 80; i++)
		f[i] = (float)i - 40.5f;
	for (size_t from = 0; from < 5; from++) {
		for (size_t n = 0; n < 70; n++) {
			memset(keys, 0xee, sizeof(keys));
			score_keys(f + from, keys + from, n);
			for (size_t i = 0; i < 80; i++)
				assert_int_equal(keys[i], i >= from && i < from + n ? score_key(f[i]) : 0xeeee);
		}
	}
}

static void keys_lead_back_to_their_scores(void **state)
{
	static uint16_t keys[65536], again[65536];
	static float fast[65536], plain[65536];

	for (uint32_t k = 0; k < 65536; k++)
		keys[k] = (uint16_t)k;
	key_scores(keys, fast, ARRAY_SIZE(keys) - 3);
	key_scores_portable(keys, plain, ARRAY_SIZE(keys));
	for (uint32_t k = 0; k < 65536 - 3; k++) {
		uint32_t half = k & 0x8000 ? k ^ 0x8000 : ~k & 0xffff;

		if ((half & 0x7c00) == 0x7c00) {
			assert_true(!isfinite(fast[k]) && !isfinite(plain[k]));
			continue;
		}
		assert_true(fast[k] == (float)half_value(half) && plain[k] == fast[k]);
	}
	assert_true(isnan(plain[KEY_DROPPED]) && isnan(plain[KEY_LOWEST]));
	score_keys(plain, again, ARRAY_SIZE(again));
	for (uint32_t k = 0; k < 65536; k++)
		assert_int_equal(again[k], isfinite(plain[k]) ? (k == 0x7fff ? 0x8000 : k) : KEY_LOWEST);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(order_holds_over_every_half),
		cmocka_unit_test(zero_has_one_key),
		cmocka_unit_test(extremes),
		cmocka_unit_test(rounds_to_nearest_even),
		cmocka_unit_test(monotone_over_floats),
		cmocka_unit_test(vector_equals_portable),
		cmocka_unit_test(lengths),
		cmocka_unit_test(keys_lead_back_to_their_scores),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
