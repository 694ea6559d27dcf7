/* SPDX-License-Identifier: MIT */
/* Adaptive budgets against brute force: sums, floors, optimality, even ties, hysteresis, several sequences. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "policy/adaptive.h"
#include "shm/util.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LANES 40u
#define MAX_ROWS 700u

static uint64_t seed = 1;

static uint32_t rnd(uint32_t n)
{
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(seed >> 33) % n;
}

struct lanes {
	struct adaptive_lane lane[MAX_LANES];
	uint16_t key[MAX_LANES][MAX_ROWS];
	uint32_t n;
};

static struct lanes w;

static uint32_t candidates(const struct adaptive_lane *a)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < a->rows; i++)
		n += a->key[i] != 0;
	return n;
}

static uint32_t most_of(const struct adaptive_lane *a)
{
	return MIN(a->cap, a->forced + candidates(a));
}

static uint32_t least_of(const struct adaptive_lane *a)
{
	uint32_t floor = MAX(24, a->uniform / 4);

	floor = MIN(floor, a->uniform);
	return MIN(MAX(floor, a->forced), most_of(a));
}

static int descending(const void *a, const void *b)
{
	return *(const uint16_t *)b - *(const uint16_t *)a;
}

/* What the best `budget` rows of a lane are worth, the forced ones nothing. */
static uint64_t worth(const struct adaptive_lane *a, uint32_t budget)
{
	static uint16_t sorted[MAX_ROWS];
	uint64_t sum = 0;

	memcpy(sorted, a->key, a->rows * sizeof(*sorted));
	qsort(sorted, a->rows, sizeof(*sorted), descending);
	for (uint32_t i = 0; i + a->forced < budget && i < a->rows; i++)
		sum += sorted[i];
	return sum;
}

/* The most that any budgets within the limits can be worth: one row after the other, the best first. */
static uint64_t best_worth(uint64_t total)
{
	static uint16_t sorted[MAX_LANES][MAX_ROWS];
	uint32_t has[MAX_LANES];
	uint64_t sum = 0, used = 0;

	for (uint32_t l = 0; l < w.n; l++) {
		memcpy(sorted[l], w.lane[l].key, w.lane[l].rows * sizeof(uint16_t));
		qsort(sorted[l], w.lane[l].rows, sizeof(uint16_t), descending);
		has[l] = least_of(&w.lane[l]);
		used += has[l];
		sum += worth(&w.lane[l], has[l]);
	}
	for (; used < total; used++) {
		int best = -1, best_lane = -1;

		for (uint32_t l = 0; l < w.n; l++)
			if (has[l] < most_of(&w.lane[l]) && sorted[l][has[l] - w.lane[l].forced] > best) {
				best = sorted[l][has[l] - w.lane[l].forced];
				best_lane = (int)l;
			}
		assert_true(best_lane >= 0);
		sum += (uint64_t)best;
		has[best_lane]++;
	}
	return sum;
}

/* Lanes of one uniform budget; the spread of keys grows with the lane, `levels` different values in all. */
static void make(uint32_t lanes, uint32_t rows, uint32_t uniform, uint32_t forced, uint32_t levels)
{
	w.n = lanes;
	for (uint32_t l = 0; l < lanes; l++) {
		w.lane[l] = (struct adaptive_lane){
			.key = w.key[l], .rows = rows, .forced = forced, .uniform = uniform, .cap = rows};
		for (uint32_t i = 0; i < rows; i++)
			w.key[l][i] =
				i < forced ? 0
					   : (uint16_t)(1 + rnd(levels) * (65534 / levels) / (1 + rnd(l + 1)));
	}
}

static uint64_t total_of(const uint32_t *budget)
{
	uint64_t sum = 0;

	for (uint32_t l = 0; l < w.n; l++)
		sum += budget[l];
	return sum;
}

static uint64_t uniform_total(void)
{
	uint64_t sum = 0;

	for (uint32_t l = 0; l < w.n; l++)
		sum += w.lane[l].uniform;
	return sum;
}

static void assert_best(const uint32_t *budget)
{
	uint64_t sum = 0;

	assert_int_equal(total_of(budget), uniform_total());
	for (uint32_t l = 0; l < w.n; l++) {
		assert_in_range(budget[l], least_of(&w.lane[l]), most_of(&w.lane[l]));
		sum += worth(&w.lane[l], budget[l]);
	}
	assert_int_equal(sum, best_worth(uniform_total()));
}

static void budgets_are_the_best_there_are(void **state)
{
	uint32_t budget[MAX_LANES], moved = 0;

	for (int round = 0; round < 100; round++) {
		uint32_t lanes = 1 + rnd(MAX_LANES), rows = 60 + rnd(MAX_ROWS - 60);

		make(lanes, rows, 30 + rnd(rows - 59), rnd(21), 1 + rnd(round % 3 ? 60000 : 5));
		for (uint32_t l = 0; l < lanes; l++)
			if (rnd(8) == 0)
				w.lane[l].cap = w.lane[l].uniform + rnd(rows - w.lane[l].uniform + 1);
		assert_int_equal(adaptive_budgets(w.lane, lanes, uniform_total(), ADAPTIVE_HYSTERESIS, budget),
				 0);
		assert_best(budget);
		for (uint32_t l = 0; l < lanes; l++)
			moved += budget[l] != w.lane[l].uniform;
	}
	assert_true(moved > 300);
}

/* Lanes of different sequences: lengths, budgets and protection differ; one selection serves all. */
static void sequences_share_what_they_have(void **state)
{
	uint32_t budget[MAX_LANES];

	for (int round = 0; round < 10; round++) {
		make(MAX_LANES, MAX_ROWS, 100, 20, 60000);
		for (uint32_t l = 0; l < MAX_LANES; l++) {
			uint32_t seq = l / 10;

			w.lane[l].rows = w.lane[l].cap = 150 + 100 * seq;
			w.lane[l].uniform = 60 + 60 * seq;
			for (uint32_t i = 0; i < w.lane[l].rows; i++)
				w.key[l][i] =
					(uint16_t)(w.key[l][i] ? 1 + w.key[l][i] / (seq == 3 ? 1 : 4) : 0);
		}
		assert_int_equal(
			adaptive_budgets(w.lane, MAX_LANES, uniform_total(), ADAPTIVE_HYSTERESIS, budget), 0);
		assert_best(budget);
		for (uint32_t seq = 0, sum = 0; seq < 4; seq++, sum = 0) {
			for (uint32_t l = 10 * seq; l < 10 * seq + 10; l++)
				sum += budget[l];
			if (seq == 3) /* worth four times as much: it gets more than its own */
				assert_true(sum > 10 * w.lane[30].uniform);
		}
	}
}

static void equal_lanes_get_equal_budgets(void **state)
{
	static const uint32_t uniforms[] = {24, 25, 100, 333, 699};
	uint32_t budget[MAX_LANES];

	for (size_t u = 0; u < ARRAY_SIZE(uniforms); u++)
		for (uint32_t levels = 1; levels < 2000; levels *= 7) {
			make(MAX_LANES, MAX_ROWS, uniforms[u], 20, levels);
			for (uint32_t l = 1; l < MAX_LANES; l++)
				memcpy(w.key[l], w.key[0], sizeof(w.key[0]));
			assert_int_equal(adaptive_budgets(w.lane, MAX_LANES, uniform_total(),
							  ADAPTIVE_HYSTERESIS, budget),
					 0);
			for (uint32_t l = 0; l < MAX_LANES; l++)
				assert_int_equal(budget[l], uniforms[u]);
		}
}

static void floors_hold_for_lanes_worth_nothing(void **state)
{
	static const uint32_t uniforms[] = {10, 24, 40, 96, 200};
	uint32_t budget[MAX_LANES];

	for (size_t u = 0; u < ARRAY_SIZE(uniforms); u++) {
		uint32_t uniform = uniforms[u], floor = MIN(MAX(24, uniform / 4), uniform);

		make(4, MAX_ROWS, uniform, 4, 100);
		for (uint32_t i = 4; i < MAX_ROWS; i++) {
			w.key[0][i] = (uint16_t)(60000 + i);
			w.key[1][i] = w.key[2][i] = w.key[3][i] = (uint16_t)(1 + i);
		}
		assert_int_equal(adaptive_budgets(w.lane, 4, uniform_total(), 0, budget), 0);
		assert_int_equal(budget[1], floor);
		assert_int_equal(budget[2], floor);
		assert_int_equal(budget[3], floor);
		assert_int_equal(budget[0], MIN(4 * uniform - 3 * floor, MAX_ROWS));
	}
}

static void without_a_choice_budgets_are_uniform(void **state)
{
	uint32_t budget[MAX_LANES];

	make(5, 200, 200, 20, 1000); /* everything fits */
	assert_int_equal(adaptive_budgets(w.lane, 5, uniform_total(), 50, budget), 0);
	for (uint32_t l = 0; l < 5; l++)
		assert_int_equal(budget[l], 200);
	make(5, 200, 300, 20, 1000); /* more than fits */
	assert_int_equal(adaptive_budgets(w.lane, 5, uniform_total(), 50, budget), 0);
	for (uint32_t l = 0; l < 5; l++)
		assert_int_equal(budget[l], 300);
	make(5, 200, 50, 60, 1000); /* pinned rows alone are too many */
	assert_int_equal(adaptive_budgets(w.lane, 5, uniform_total(), 50, budget), 0);
	for (uint32_t l = 0; l < 5; l++)
		assert_int_equal(budget[l], 50);
	make(5, 0, 50, 0, 1);
	assert_int_equal(adaptive_budgets(w.lane, 5, uniform_total(), 50, budget), 0);
	assert_int_equal(budget[4], 50);
	assert_int_equal(adaptive_budgets(w.lane, 0, uniform_total(), 50, budget), -EINVAL);
}

/* Rows change a little from plan to plan: budgets follow in steps of at least five per cent, or not at all. */
static void budgets_move_in_steps(void **state)
{
	uint32_t budget[MAX_LANES], before[MAX_LANES], kept = 0, moved = 0;

	make(MAX_LANES, MAX_ROWS, 200, 20, 60000);
	assert_int_equal(adaptive_budgets(w.lane, w.n, uniform_total(), ADAPTIVE_HYSTERESIS, before), 0);
	for (int plan = 0; plan < 60; plan++) {
		for (uint32_t l = 0; l < w.n; l++) {
			w.lane[l].before = before[l];
			for (uint32_t i = 20; i < MAX_ROWS; i++)
				if (rnd(100) < (l == 3 ? 20 : 3))
					w.key[l][i] = (uint16_t)(1 + rnd(65000) / (1 + rnd(l + 1)));
		}
		assert_int_equal(adaptive_budgets(w.lane, w.n, uniform_total(), ADAPTIVE_HYSTERESIS, budget),
				 0);
		assert_int_equal(total_of(budget), uniform_total());
		for (uint32_t l = 0; l < w.n; l++) {
			uint32_t change = MAX(budget[l], before[l]) - MIN(budget[l], before[l]);

			assert_true(change == 0 || change * 1000 >= before[l] * ADAPTIVE_HYSTERESIS);
			kept += change == 0;
			moved += change != 0;
			assert_in_range(budget[l], least_of(&w.lane[l]), most_of(&w.lane[l]));
		}
		memcpy(before, budget, sizeof(before));
	}
	assert_true(kept > moved && moved > 20);
}

/* The same rows, the same budgets: nothing moves, at any hysteresis; a budget that grows takes all with it. */
static void what_stays_the_same_stays(void **state)
{
	uint32_t first[MAX_LANES], again[MAX_LANES];

	make(MAX_LANES, MAX_ROWS, 200, 20, 60000);
	assert_int_equal(adaptive_budgets(w.lane, w.n, uniform_total(), ADAPTIVE_HYSTERESIS, first), 0);
	for (uint32_t l = 0; l < w.n; l++)
		w.lane[l].before = first[l];
	assert_int_equal(adaptive_budgets(w.lane, w.n, uniform_total(), ADAPTIVE_HYSTERESIS, again), 0);
	assert_memory_equal(first, again, sizeof(first));
	assert_int_equal(adaptive_budgets(w.lane, w.n, uniform_total(), 1000, again), 0);
	assert_memory_equal(first, again, sizeof(first));
	for (uint32_t l = 0; l < w.n; l++)
		w.lane[l].uniform = 220;
	assert_int_equal(adaptive_budgets(w.lane, w.n, uniform_total(), 200, again), 0);
	assert_int_equal(total_of(again), uniform_total());
	for (uint32_t l = 0; l < w.n; l++)
		assert_true(again[l] + 1 >= first[l]);
}

static void keys_follow_values(void **state)
{
	const float odd[] = {0, -1, NAN, -INFINITY, INFINITY, FLT_MAX, 1e-30f, 1e-6f, 0.5f, 1.0f};
	float ramp[1000];
	uint16_t key[1000], twice[1000];

	adaptive_keys(odd, 1, ARRAY_SIZE(odd), key);
	for (int i = 0; i < 4; i++)
		assert_int_equal(key[i], 1);
	assert_true(key[4] > key[5] && key[5] > key[9] && key[9] > key[8] && key[8] > key[7] &&
		    key[7] > key[6] && key[6] > 1);
	for (int i = 0; i < 1000; i++)
		ramp[i] = 1e-7f * powf(1.01f, (float)i);
	adaptive_keys(ramp, 1, 1000, key);
	adaptive_keys(ramp, 2, 1000, twice);
	for (int i = 0; i < 1000; i++) {
		assert_true(twice[i] > key[i]);
		if (i)
			assert_true(key[i] > key[i - 1]); /* one per cent apart and still told apart */
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(budgets_are_the_best_there_are),
		cmocka_unit_test(sequences_share_what_they_have),
		cmocka_unit_test(equal_lanes_get_equal_budgets),
		cmocka_unit_test(floors_hold_for_lanes_worth_nothing),
		cmocka_unit_test(without_a_choice_budgets_are_uniform),
		cmocka_unit_test(budgets_move_in_steps),
		cmocka_unit_test(what_stays_the_same_stays),
		cmocka_unit_test(keys_follow_values),
	};

	return cmocka_run_group_tests_name("policy/adaptive", tests, NULL, NULL);
}
