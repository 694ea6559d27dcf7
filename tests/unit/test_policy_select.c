/* SPDX-License-Identifier: MIT */
/* Top-k over keys: both sets of kernels, every density, ties, odd lengths and the edges of the cuts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "policy/cpu.h"
#include "policy/select.h"
#include "shm/bits.h"
#include "shm/util.h"

enum { MAX_ROWS = 40000, MAX_WORDS = MAX_ROWS / 64 + 1 };

static uint64_t seed = 5;

static uint32_t rnd(uint32_t below)
{
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)((seed >> 33) % below);
}

static uint16_t keys[MAX_ROWS], eff[MAX_WORDS * 64];
static uint8_t bytes[2 * MAX_WORDS * 64];
static uint32_t pos[SELECT_SPARSE(MAX_WORDS * 64)];
static uint64_t above[MAX_WORDS], equal[MAX_WORDS], mask[MAX_WORDS], got[2][SELECT_CUTS][MAX_WORDS];

static const struct select_kern *kernels(int i)
{
	return i && cpu_has_avx2() ? &select_avx2 : &select_portable;
}

/* Keys of one of many shapes: few values, all values, the extremes, one bucket, all equal. */
static void random_keys(uint32_t n)
{
	uint32_t shape = rnd(5), one = rnd(65536);

	for (uint32_t p = 0; p < n; p++) {
		const uint32_t any[] = {rnd(3), rnd(65536), rnd(2) * 65535, 0x8100 + rnd(256), one};

		keys[p] = (uint16_t)any[shape];
	}
}

static uint32_t random_mask(uint32_t n)
{
	uint32_t percent = (uint32_t[]){1, 4, 50, 96, 100}[rnd(5)];

	memset(mask, 0, sizeof(mask));
	for (uint32_t p = 0; p < n; p++)
		if (rnd(100) < percent)
			bits_set(mask, p);
	return bits_rank(mask, n);
}

static void select_with(const struct select_kern *kern, uint32_t n, uint32_t in, const uint32_t *k,
			uint64_t (*ret)[MAX_WORDS])
{
	const struct select_scratch s = {kern, eff, bytes, pos, above, equal};
	uint64_t *out[SELECT_CUTS] = {ret[0], ret[1], ret[2], ret[3]};
	/* The exact array, so that ASan sees a read past its end. */
	_cleanup_free_ uint16_t *exact = malloc(n * sizeof(*exact));

	assert_non_null(exact);
	memcpy(exact, keys, n * sizeof(*exact));
	memset(ret, 0, SELECT_CUTS * sizeof(*ret));
	select_top(&s, exact, n, mask, in, k, SELECT_CUTS, out);
	assert_int_equal(kern->count(mask, (uint32_t)BITS_WORDS(n)), in);
}

/* Whoever is in beats whoever is out, and as many are in as were asked for. */
static void check_cut(uint32_t n, uint32_t k, const uint64_t *out)
{
	uint64_t worst_in = UINT64_MAX, best_out = 0;
	uint32_t in = 0;

	bits_for_each(p, mask, n) {
		uint64_t rank = (uint64_t)MAX(keys[p], 1) << 32 | p;

		if (bits_test(out, p)) {
			worst_in = MIN(worst_in, rank);
			in++;
		} else {
			best_out = MAX(best_out, rank);
		}
	}
	assert_int_equal(in, k);
	assert_int_equal(bits_rank(out, MAX_WORDS * 64), k); /* nobody from outside the mask */
	assert_true(worst_in > best_out);
}

static void best_of_any_set(void **state)
{
	for (int i = 0; i < 1200; i++) {
		uint32_t n = 2 + rnd(i % 40 ? 700 : MAX_ROWS - 1), in, k[SELECT_CUTS];

		random_keys(n);
		in = random_mask(n);
		if (in < 2)
			continue;
		for (int j = 0; j < SELECT_CUTS; j++)
			k[j] = rnd(4) ? 1 + rnd(in - 1) : rnd(2) ? 1 : in - 1;
		for (int kern = 0; kern < 2; kern++)
			select_with(kernels(kern), n, in, k, got[kern]);
		assert_memory_equal(got[0], got[1], sizeof(got[0]));
		for (int j = 0; j < SELECT_CUTS; j++)
			check_cut(n, k[j], got[0][j]);
	}
}

/* Counters that wrap at 256 or 65,536 would show here: every row counts alike. */
static void long_runs_of_one_key(void **state)
{
	const uint16_t values[] = {0, 1, 255, 256, 0x80ff, 0xff00, 0xffff};

	for (size_t v = 0; v < ARRAY_SIZE(values); v++) {
		uint32_t n = MAX_ROWS, k[SELECT_CUTS] = {1, 8129, 32768, MAX_ROWS - 1};

		for (uint32_t p = 0; p < n; p++)
			keys[p] = values[v];
		memset(mask, 0, sizeof(mask));
		bits_set_range(mask, 0, n);
		for (int kern = 0; kern < 2; kern++) {
			select_with(kernels(kern), n, n, k, got[0]);
			for (int j = 0; j < SELECT_CUTS; j++) {
				assert_int_equal(bits_next(got[0][j], 0, n), n - k[j]); /* the latest k */
				assert_int_equal(bits_rank(got[0][j], n), k[j]);
			}
		}
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(best_of_any_set),
		cmocka_unit_test(long_runs_of_one_key),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
