/* SPDX-License-Identifier: MIT */
/*
 * The decision against a slow reference that sorts, over thousands of random
 * snapshots, and the promises of decide.h checked one by one on every result.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "policy/decide.h"
#include "shm/bits.h"
#include "shm/util.h"
#include "tests/unit/decide_ref.h"

/* ---- properties ------------------------------------------------------------------ */

static enum where_to got_of(uint32_t lane, uint32_t row)
{
	const uint64_t *at[] = {plan.o.resident, plan.o.to_dram, plan.o.to_nvme, plan.o.drop};
	enum where_to to = DEAD;

	for (int i = 0; i < 4; i++) {
		if (!bits_test(at[i] + (size_t)lane * plan.o.words, row) || (i == 1 && to == DEVICE))
			continue;           /* a copy of what stays says nothing about where it is */
		assert_int_equal(to, DEAD); /* one place only */
		to = (enum where_to)(DEVICE + i);
	}
	return to;
}

static void check_lane(const struct decide_in *in, uint32_t l)
{
	const size_t at = (size_t)l * plan.o.words;
	uint32_t n[5] = {0}, out = 0, back = 0;

	for (uint32_t p = 0; p < in->watermark; p++) {
		bool copy = bits_test(plan.o.copy_out + at, p), bring = bits_test(plan.o.bring_in + at, p);
		bool below = has(in, 1, l, p) || has(in, 2, l, p);
		enum where_to to = got_of(l, p);

		assert_int_equal(to, want[l][p]);
		assert_int_equal(to == DEAD,
				 !exists(in, l, p)); /* dropped rows never come back, no other vanishes */
		if (to == DEVICE) {
			assert_int_equal(copy, through[l][p] != DEAD);
			assert_int_equal(bits_test(plan.o.to_dram + at, p), through[l][p] == DRAM);
		} else {
			assert_int_equal(copy, has(in, 0, l, p) && !below && (to == DRAM || to == NVME));
		}
		assert_int_equal(bring, to == DEVICE && !has(in, 0, l, p));
		n[to]++;
		out += copy;
		back += bring;
	}
	for (int i = 0; i < 6; i++) /* nothing past the watermark */
		if (in->watermark % 64)
			assert_int_equal(plan.map[i][at + plan.o.words - 1] >> (in->watermark % 64), 0);
	assert_int_equal(plan.o.kept[l], n[DEVICE]);
	assert_int_equal(plan.o.out[l], out);
	assert_int_equal(plan.o.in[l], back);
	assert_int_equal(plan.o.dropped[l], n[DROPPED]);
	for (int t = 0; t < DECIDE_TIERS; t++)
		assert_true(n[DEVICE + t] <= in->budget[t][l]);
	if (in->granularity == DECIDE_HEAD && n[DROPPED])
		assert_true(n[DRAM] == in->budget[1][l] && n[NVME] == in->budget[2][l]); /* no room anywhere */
	if (in->equal_lanes || in->granularity != DECIDE_HEAD)
		assert_int_equal(plan.o.kept[l], plan.o.kept[0]);
	if (in->granularity != DECIDE_HEAD)
		assert_memory_equal(plan.o.resident + at, plan.o.resident, plan.o.words * 8);
}

/* A protected row is off the device only when every place there is taken by a row as protected. */
static void check_protection(const struct decide_in *in, uint32_t l)
{
	uint32_t worst_in = 0, best_out = 5;

	if (in->granularity == DECIDE_BLOCK || !plan.o.kept[l])
		return;
	for (uint32_t p = 0; p < in->watermark; p++) {
		uint32_t c = class_of(in, p);
		enum where_to to = got_of(l, p);

		if (to == DEVICE)
			worst_in = MAX(worst_in, c);
		else if (to != DEAD && (in->granularity == DECIDE_HEAD || want[l][p] != DROPPED))
			best_out = MIN(best_out, c);
	}
	assert_true(worst_in <= best_out);
}

static void random_snapshots_match_the_reference(void **state)
{
	for (int i = 0; i < 6000; i++) {
		struct decide_in in;

		random_in(&in);
		out_for(&in);
		memset(want, 0, sizeof(want));
		if (in.granularity == DECIDE_HEAD)
			ref_heads(&in);
		else
			ref_blocks(&in);
		assert_int_equal(policy_decide(&in, &plan.o), 0);
		for (uint32_t l = 0; l < in.lanes; l++) {
			ref_through(&in, l);
			check_lane(&in, l);
			check_protection(&in, l);
		}
	}
}

/*
 * Acting on a plan and deciding again with the same scores moves nothing. (Merged
 * ranks are among the rows that exist, so there only when none was dropped.)
 */
static void settled_plans_stay(void **state)
{
	int settled = 0;

	for (int i = 0; i < 3000; i++) {
		struct decide_in in;
		uint32_t words, dropped = 0;

		random_in(&in);
		words = (uint32_t)BITS_WORDS(in.watermark);
		out_for(&in);
		assert_int_equal(policy_decide(&in, &plan.o), 0);
		for (uint32_t l = 0; l < in.lanes; l++)
			dropped += plan.o.dropped[l];
		if (dropped && in.granularity != DECIDE_HEAD)
			continue;
		settled++;
		for (uint32_t l = 0; l < in.lanes; l++)
			for (uint32_t w = 0; w < words; w++) {
				uint64_t keep = plan.o.resident[l * words + w],
					 dram = plan.o.to_dram[l * words + w],
					 nvme = plan.o.to_nvme[l * words + w] |
						(plan.o.copy_out[l * words + w] & ~dram); /* written through */

				where[0][l][w] = keep;
				where[1][l][w] =
					(where[1][l][w] & keep) | dram; /* copies below kept rows stay */
				where[2][l][w] = (where[2][l][w] & (keep | dram)) | nvme;
			}
		assert_int_equal(policy_decide(&in, &plan.o), 0);
		for (uint32_t l = 0; l < in.lanes; l++) {
			for (uint32_t w = 0; w < words; w++) {
				uint64_t dev = where[0][l][w], dram = where[1][l][w] & ~dev,
					 nvme = where[2][l][w] & ~dev & ~where[1][l][w];

				assert_int_equal(plan.o.resident[l * words + w], dev);
				assert_int_equal(plan.o.copy_out[l * words + w], 0);
				assert_int_equal(plan.o.drop[l * words + w], 0);
				assert_int_equal(nvme & ~plan.o.to_nvme[l * words + w], 0);
				assert_int_equal(plan.o.to_dram[l * words + w] & ~dram, 0);
			}
		}
	}
	assert_true(settled > 1000);
}

static void same_snapshot_same_bytes(void **state)
{
	static uint64_t first[6][MAX_LANES * MAX_WORDS];

	for (int i = 0; i < 200; i++) {
		struct decide_in in;

		random_in(&in);
		out_for(&in);
		assert_int_equal(policy_decide(&in, &plan.o), 0);
		memcpy(first, plan.map, sizeof(first));
		out_for(&in);
		for (uint32_t l = 0; l < in.lanes; l++) /* what is past the watermark is nobody's business */
			for (int t = 0; t < DECIDE_TIERS; t++)
				for (uint32_t p = in.watermark; p < in.watermark + 64; p++)
					bits_clear(where[t][l], p);
		assert_int_equal(policy_decide(&in, &plan.o), 0);
		assert_memory_equal(first, plan.map, sizeof(first));
	}
}

/* ---- small cases worked by hand --------------------------------------------------- */

static void plain(struct decide_in *in, uint32_t rows, uint32_t device, uint32_t dram, uint32_t nvme)
{
	memset(where, 0, sizeof(where));
	for (uint32_t p = 0; p < rows; p++)
		scores[0][p] = (uint16_t)(1000 + p * 37 % 101);
	bits_set_range(where[0][0], 0, rows);
	budgets[0][0] = device;
	budgets[1][0] = dram;
	budgets[2][0] = nvme;
	*in = (struct decide_in){.lanes = 1, .watermark = rows, .words = MAX_WORDS, .score_stride = MAX_ROWS};
	in->block_rows = 1;
	in->scores = &scores[0][0];
	in->on_device = &where[0][0][0];
	in->on_dram = &where[1][0][0];
	in->on_nvme = &where[2][0][0];
	for (int t = 0; t < DECIDE_TIERS; t++)
		in->budget[t] = budgets[t];
	out_for(in);
}

static void hysteresis_holds_the_band_only(void **state)
{
	struct decide_in in;

	/* Row p has rank p. Rows 60..139 are on the device, budget 100, h = 10: core 0..89, band 90..109. */
	plain(&in, 200, 100, UINT32_MAX, 0);
	in.hysteresis_permille = 100;
	memset(where, 0, sizeof(where));
	bits_set_range(where[0][0], 60, 95);
	bits_set_range(where[0][0], 105, 140);
	bits_set_range(where[1][0], 0, 200);
	for (uint32_t p = 0; p < 200; p++)
		scores[0][p] = (uint16_t)(5000 - p);
	assert_int_equal(policy_decide(&in, &plan.o), 0);
	/* Band seats: 10. There already: 90..94 and 105..109, so nobody else. */
	for (uint32_t p = 0; p < 200; p++)
		assert_int_equal(bits_test(plan.o.resident, p), p < 95 || (p >= 105 && p < 110));
	assert_int_equal(plan.o.in[0], 60);
}

static void nvme_rows_rise_only_when_nvme_is_full(void **state)
{
	struct decide_in in;

	plain(&in, 40, 10, 10, 20);
	for (uint32_t p = 0; p < 40; p++)
		scores[0][p] = (uint16_t)(5000 - p);
	/* 10..19 are next in line for dram, and only nvme has them: they stay, dram takes 20..29. */
	bits_clear_range(where[0][0], 10, 20);
	bits_set_range(where[2][0], 10, 20);
	assert_int_equal(policy_decide(&in, &plan.o), 0);
	for (uint32_t p = 0; p < 40; p++)
		assert_int_equal(got_of(0, p), p < 10 ? DEVICE : p >= 20 && p < 30 ? DRAM : NVME);
	assert_int_equal(plan.o.out[0], 20);
	/* With room for four in nvme, four of the worst stay below and the best six rise. */
	budgets[2][0] = 4;
	bits_clear_range(where[0][0], 20, 40);
	assert_int_equal(policy_decide(&in, &plan.o), 0);
	for (uint32_t p = 0; p < 20; p++)
		assert_int_equal(got_of(0, p), p < 10 ? DEVICE : p < 16 ? DRAM : NVME);
	assert_int_equal(plan.o.dropped[0], 0);
}

static void protection_order_inside_a_small_budget(void **state)
{
	struct decide_in in;

	plain(&in, 100, 26, 0, UINT32_MAX);
	memset(pinned, 0, sizeof(pinned));
	memset(wanted, 0, sizeof(wanted));
	bits_set_range(pinned, 40, 46);
	bits_set_range(wanted, 50, 60);
	in.protect_first = 4;
	in.protect_last = 16;
	in.pinned = pinned;
	in.wanted = wanted;
	for (uint32_t budget = 0; budget <= 40; budget++) {
		uint32_t n[5] = {0};

		budgets[0][0] = budget;
		assert_int_equal(policy_decide(&in, &plan.o), 0);
		for (uint32_t p = 0; p < 100; p++)
			n[class_of(&in, p)] += got_of(0, p) == DEVICE;
		assert_int_equal(n[0], MIN(budget, 4));
		assert_int_equal(n[1], MIN(budget - n[0], 16));
		assert_int_equal(n[2], MIN(budget - n[0] - n[1], 6));
		assert_int_equal(n[3], MIN(budget - n[0] - n[1] - n[2], 10));
	}
}

static void copies_of_what_stays_fill_what_is_left(void **state)
{
	struct decide_in in;

	/* Row p has rank p. 0..59 stay, 60..79 go to dram, 80..99 to nvme; dram has room for 8 more, nvme
	 * for 5. */
	plain(&in, 100, 60, 28, 25);
	for (uint32_t p = 0; p < 100; p++)
		scores[0][p] = (uint16_t)(5000 - p);
	bits_set_range(where[2][0], 80, 100);
	bits_set_range(where[1][0], 2, 4); /* two of those that stay have a copy, which takes room */
	in.write_through = 1;
	budgets[1][0] = 20 + 2 + 8;
	assert_int_equal(policy_decide(&in, &plan.o), 0);
	for (uint32_t p = 0; p < 100; p++) {
		bool dram = p < 2 || (p >= 4 && p < 10), nvme = p >= 10 && p < 15;

		assert_int_equal(got_of(0, p), p < 60 ? DEVICE : p < 80 ? DRAM : NVME);
		assert_int_equal(bits_test(plan.o.copy_out, p), dram || nvme || (p >= 60 && p < 80));
		assert_int_equal(bits_test(plan.o.to_dram, p), dram || (p >= 60 && p < 80));
	}
	assert_int_equal(plan.o.out[0], 8 + 5 + 20);
	assert_int_equal(plan.o.kept[0], 60);
	in.write_through = 0;
	assert_int_equal(policy_decide(&in, &plan.o), 0);
	assert_int_equal(plan.o.out[0], 20);
}

/* ---- refusals ------------------------------------------------------------------------- */

#define REFUSED(change)                                                                                        \
	do {                                                                                                   \
		struct decide_in in;                                                                           \
		plain(&in, 70, 10, 10, 10);                                                                    \
		assert_int_equal(policy_decide(&in, &plan.o), 0);                                              \
		change;                                                                                        \
		assert_int_equal(policy_decide(&in, &plan.o), -EINVAL);                                        \
	} while (0)

static void impossible_fields_are_refused(void **state)
{
	REFUSED(in.lanes = 0);
	REFUSED(in.lanes = 1025);
	REFUSED(in.lanes = UINT32_MAX);
	REFUSED(in.watermark = 1048577);
	REFUSED(in.watermark = UINT32_MAX);
	REFUSED(in.words = 1);
	REFUSED(in.score_stride = 69);
	REFUSED(in.granularity = 3);
	REFUSED((in.granularity = DECIDE_BLOCK, in.block_rows = 0));
	REFUSED(in.equal_lanes = 2);
	REFUSED(in.write_through = 2);
	REFUSED(in.hysteresis_permille = 1001);
	REFUSED(in.scores = NULL);
	REFUSED(in.on_device = NULL);
	REFUSED(in.on_dram = NULL);
	REFUSED(in.on_nvme = NULL);
	for (int t = 0; t < DECIDE_TIERS; t++)
		REFUSED(in.budget[t] = NULL);
	REFUSED(plan.o.words = 1);
	REFUSED(plan.o.words = 3);
	REFUSED(plan.o.resident = NULL);
	REFUSED(plan.o.copy_out = NULL);
	REFUSED(plan.o.bring_in = NULL);
	REFUSED(plan.o.to_dram = NULL);
	REFUSED(plan.o.to_nvme = NULL);
	REFUSED(plan.o.drop = NULL);
	REFUSED(plan.o.kept = NULL);
	REFUSED(plan.o.out = NULL);
	REFUSED(plan.o.in = NULL);
	REFUSED(plan.o.dropped = NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(random_snapshots_match_the_reference),
		cmocka_unit_test(settled_plans_stay),
		cmocka_unit_test(same_snapshot_same_bytes),
		cmocka_unit_test(hysteresis_holds_the_band_only),
		cmocka_unit_test(nvme_rows_rise_only_when_nvme_is_full),
		cmocka_unit_test(protection_order_inside_a_small_budget),
		cmocka_unit_test(copies_of_what_stays_fill_what_is_left),
		cmocka_unit_test(impossible_fields_are_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
