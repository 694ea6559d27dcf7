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
#include "policy/cpu.h"
#include "policy/decide.h"
#include "policy/select.h"
#include "shm/bits.h"
#include "shm/util.h"

enum { MAX_LANES = 5, MAX_ROWS = 2200, MAX_WORDS = MAX_ROWS / 64 + 3 };

static uint64_t seed = 20260210;

static uint32_t rnd(uint32_t below)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (uint32_t)((seed >> 11) % below);
}

/* ---- a random snapshot ------------------------------------------------------ */

static uint16_t scores[MAX_LANES][MAX_ROWS + 8];
static uint64_t where[DECIDE_TIERS][MAX_LANES][MAX_WORDS], pinned[MAX_WORDS], wanted[MAX_WORDS];
static uint32_t budgets[DECIDE_TIERS][MAX_LANES];

static struct {
	uint64_t map[6][MAX_LANES * MAX_WORDS];
	uint32_t count[4][MAX_LANES];
	struct decide_out o;
} plan;

static uint64_t word_of_density(uint32_t percent)
{
	uint64_t w = 0;

	for (int i = 0; i < 64; i++)
		w |= (uint64_t)(rnd(100) < percent) << i;
	return w;
}

static uint32_t random_rows(void)
{
	const uint32_t edges[] = {0, 1, 4, 20, 21, 63, 64, 65, 127, 128, 129, 192};

	if (rnd(4) == 0)
		return edges[rnd(ARRAY_SIZE(edges))];
	return rnd(rnd(8) ? 400 : MAX_ROWS) + 1;
}

static uint32_t random_budget(uint32_t watermark)
{
	switch (rnd(6)) {
	case 0:
		return 0;
	case 1:
		return UINT32_MAX;
	case 2:
		return rnd(24);
	default:
		return rnd(watermark + 2);
	}
}

static void random_scores(struct decide_in *in)
{
	uint32_t kind = rnd(4);

	for (uint32_t l = 0; l < in->lanes; l++) {
		for (uint32_t p = 0; p < in->score_stride; p++) {
			const uint16_t any[4] = {(uint16_t)rnd(65536), (uint16_t)(0x8000 + rnd(3)),
						 (uint16_t)(0x7ff0 + rnd(300)), (uint16_t)(rnd(2) * 65535)};

			scores[l][p] = any[kind];
		}
	}
}

static void random_in(struct decide_in *in)
{
	uint32_t wm = random_rows(), words = (uint32_t)BITS_WORDS(wm), density[DECIDE_TIERS];
	bool whole = rnd(3) == 0; /* nothing dropped yet */

	*in = (struct decide_in){.lanes = 1 + rnd(MAX_LANES), .watermark = wm, .words = MAX_WORDS};
	in->score_stride = MAX_ROWS + 8;
	in->protect_first = rnd(3) ? 4 : rnd(wm + 9);
	in->protect_last = rnd(3) ? 16 : rnd(wm + 9);
	in->granularity = rnd(3);
	in->block_rows = rnd(20) ? 1 + rnd(rnd(2) ? 16 : 100) : UINT32_MAX - rnd(3);
	in->equal_lanes = rnd(2);
	in->hysteresis_permille = rnd(3) ? 50 * rnd(4) : rnd(1001);
	in->scores = &scores[0][0];
	in->on_device = &where[0][0][0];
	in->on_dram = &where[1][0][0];
	in->on_nvme = &where[2][0][0];
	in->pinned = rnd(2) ? pinned : NULL;
	in->wanted = rnd(2) ? wanted : NULL;
	for (int t = 0; t < DECIDE_TIERS; t++)
		density[t] = (const uint32_t[]){0, 20, 50, 97, 100}[rnd(5)];
	random_scores(in);
	for (uint32_t w = 0; w < MAX_WORDS; w++) { /* past the watermark too: must not matter */
		pinned[w] = word_of_density(3);
		wanted[w] = word_of_density(5);
	}
	for (int t = 0; t < DECIDE_TIERS; t++) {
		in->budget[t] = budgets[t];
		for (uint32_t l = 0; l < in->lanes; l++) {
			budgets[t][l] = l && rnd(2) ? budgets[t][l - 1] : random_budget(wm);
			for (uint32_t w = 0; w < words + 1; w++)
				where[t][l][w] = word_of_density(t == 0 && whole ? 100 : density[t]);
		}
	}
}

static void out_for(const struct decide_in *in)
{
	memset(&plan, 0xa5, sizeof(plan));
	plan.o = (struct decide_out){(uint32_t)BITS_WORDS(in->watermark),
				     plan.map[0],
				     plan.map[1],
				     plan.map[2],
				     plan.map[3],
				     plan.map[4],
				     plan.map[5],
				     plan.count[0],
				     plan.count[1],
				     plan.count[2],
				     plan.count[3]};
}

/* ---- the reference ------------------------------------------------------------ */

enum where_to { DEAD, DEVICE, DRAM, NVME, DROPPED };

struct unit {
	uint32_t index, key, cls;
	bool alive, device, nvme_only;
	enum where_to to;
};

static int by_rank(const void *a, const void *b)
{
	const struct unit *x = *(struct unit *const *)a, *y = *(struct unit *const *)b;

	if (x->cls != y->cls)
		return x->cls < y->cls ? -1 : 1;
	if (x->key != y->key)
		return x->key > y->key ? -1 : 1;
	return x->index > y->index ? -1 : 1;
}

static bool has(const struct decide_in *in, int tier, uint32_t lane, uint32_t row)
{
	const uint64_t *of[] = {in->on_device, in->on_dram, in->on_nvme};

	return bits_test(of[tier] + (size_t)lane * in->words, row);
}

static bool exists(const struct decide_in *in, uint32_t lane, uint32_t row)
{
	return has(in, 0, lane, row) || has(in, 1, lane, row) || has(in, 2, lane, row);
}

static uint32_t class_of(const struct decide_in *in, uint32_t row)
{
	if (row < in->protect_first)
		return 0;
	if (row + (uint64_t)in->protect_last >= in->watermark)
		return 1;
	if (in->pinned && bits_test(in->pinned, row))
		return 2;
	return in->wanted && bits_test(in->wanted, row) ? 3 : 4;
}

static void ref_place(struct unit *u, uint32_t n, uint32_t permille, uint32_t keep, uint64_t dram,
		      uint64_t nvme)
{
	static struct unit *order[MAX_ROWS];
	uint32_t alive = 0, guarded = 0, h, core, in = 0;
	uint64_t only = 0, saved = 0, up, room;

	for (uint32_t i = 0; i < n; i++) {
		if (!u[i].alive)
			continue;
		u[i].to = DROPPED;
		guarded += u[i].cls < 4;
		order[alive++] = &u[i];
	}
	qsort(order, alive, sizeof(*order), by_rank);
	h = (uint32_t)((uint64_t)keep * permille / 1000);
	core = MAX(keep - h, MIN(guarded, keep));
	for (; in < core; in++)
		order[in]->to = DEVICE;
	for (int turn = 0; turn < 2; turn++) /* the band: first who is there, then who is not */
		for (uint32_t i = core; i < alive && i < keep + h; i++)
			if (order[i]->to == DROPPED && (turn || order[i]->device) && in < keep) {
				order[i]->to = DEVICE;
				in++;
			}
	for (uint32_t i = 0; i < alive && saved < dram + nvme; i++)
		if (order[i]->to == DROPPED) {
			order[i]->to = NVME;
			saved++;
			only += order[i]->nvme_only;
		}
	up = only > nvme ? only - nvme : 0;
	room = dram - up;
	for (uint32_t i = 0; i < alive; i++) {
		if (order[i]->to != NVME)
			continue;
		if (order[i]->nvme_only ? up > 0 : room > 0) {
			order[i]->to = DRAM;
			*(order[i]->nvme_only ? &up : &room) -= 1;
		}
	}
}

static struct unit units[MAX_ROWS];
static enum where_to want[MAX_LANES][MAX_ROWS];

static void ref_heads(const struct decide_in *in)
{
	uint32_t equal = UINT32_MAX, alive[MAX_LANES] = {0};

	for (uint32_t l = 0; l < in->lanes; l++) {
		for (uint32_t p = 0; p < in->watermark; p++)
			alive[l] += exists(in, l, p);
		equal = MIN(equal, MIN(alive[l], in->budget[0][l]));
	}
	for (uint32_t l = 0; l < in->lanes; l++) {
		uint32_t keep = in->equal_lanes ? equal : MIN(alive[l], in->budget[0][l]);

		for (uint32_t p = 0; p < in->watermark; p++)
			units[p] = (struct unit){.index = p,
						 .key = MAX(scores[l][p], 1),
						 .cls = class_of(in, p),
						 .alive = exists(in, l, p),
						 .device = has(in, 0, l, p),
						 .nvme_only = has(in, 2, l, p) && !has(in, 1, l, p)};
		ref_place(units, in->watermark, in->hysteresis_permille, keep, in->budget[1][l],
			  in->budget[2][l]);
		for (uint32_t p = 0; p < in->watermark; p++)
			want[l][p] = units[p].to;
	}
}

/* Sum over lanes of each row's rank among the rows alive in all lanes. */
static uint32_t ref_rank_sums(const struct decide_in *in, const bool *everywhere, uint64_t *sum)
{
	static struct unit rows[MAX_ROWS];
	static struct unit *order[MAX_ROWS];
	uint32_t n = 0;

	memset(sum, 0, MAX_ROWS * sizeof(*sum));
	for (uint32_t l = 0; l < in->lanes; l++) {
		n = 0;
		for (uint32_t p = 0; p < in->watermark; p++) {
			rows[p] = (struct unit){.index = p, .key = MAX(scores[l][p], 1)};
			if (everywhere[p])
				order[n++] = &rows[p];
		}
		qsort(order, n, sizeof(*order), by_rank);
		for (uint32_t i = 0; i < n; i++)
			sum[order[i]->index] += n - 1 - i;
	}
	return n;
}

static uint64_t ref_block_budget(const struct decide_in *in, int tier, uint64_t rows)
{
	uint32_t least = UINT32_MAX;

	for (uint32_t l = 0; l < in->lanes; l++)
		least = MIN(least, in->budget[tier][l]);
	return least >= in->watermark ? UINT32_MAX : least / rows;
}

static void ref_blocks(const struct decide_in *in)
{
	static uint64_t sum[MAX_ROWS];
	static bool everywhere[MAX_ROWS];
	uint64_t rows = in->granularity == DECIDE_BLOCK ? in->block_rows : 1, top;
	uint32_t blocks = (uint32_t)DIV_UP(in->watermark, rows), n, alive = 0;

	for (uint32_t p = 0; p < in->watermark; p++) {
		everywhere[p] = true;
		for (uint32_t l = 0; l < in->lanes; l++)
			everywhere[p] = everywhere[p] && exists(in, l, p);
	}
	n = ref_rank_sums(in, everywhere, sum);
	top = (uint64_t)in->lanes * (n > 1 ? n - 1 : 1);
	for (uint32_t b = 0; b < blocks; b++) {
		uint64_t end = MIN((b + 1) * rows, in->watermark), mean = 0;
		struct unit u = {.index = b, .cls = 4, .alive = true, .device = true};

		for (uint32_t p = (uint32_t)(b * rows); p < end; p++) {
			u.alive = u.alive && everywhere[p];
			u.cls = MIN(u.cls, class_of(in, p));
			mean += sum[p];
			for (uint32_t l = 0; l < in->lanes; l++) {
				u.device = u.device && has(in, 0, l, p);
				u.nvme_only = u.nvme_only || (has(in, 2, l, p) && !has(in, 1, l, p));
			}
		}
		if (end - b * rows < rows && u.cls > 1)
			u.cls = 1;
		u.key = (uint32_t)(1 + mean * 65534 / (top * (end - b * rows)));
		units[b] = u;
		alive += u.alive;
	}
	ref_place(units, blocks, in->hysteresis_permille, (uint32_t)MIN(ref_block_budget(in, 0, rows), alive),
		  ref_block_budget(in, 1, rows), ref_block_budget(in, 2, rows));
	for (uint32_t l = 0; l < in->lanes; l++)
		for (uint32_t p = 0; p < in->watermark; p++) {
			want[l][p] = units[p / rows].to;
			if (want[l][p] == DEAD && exists(in, l, p))
				want[l][p] = DROPPED; /* its block has a hole somewhere */
		}
}

/* ---- properties ------------------------------------------------------------------ */

static enum where_to got_of(uint32_t lane, uint32_t row)
{
	const uint64_t *at[] = {plan.o.resident, plan.o.to_dram, plan.o.to_nvme, plan.o.drop};
	enum where_to to = DEAD;

	for (int i = 0; i < 4; i++) {
		if (!bits_test(at[i] + (size_t)lane * plan.o.words, row))
			continue;
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
		assert_int_equal(copy, has(in, 0, l, p) && !below && (to == DRAM || to == NVME));
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
					 nvme = plan.o.to_nvme[l * words + w];

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

/* ---- the kernels -------------------------------------------------------------------- */

static void kernels_agree(void **state)
{
	static uint16_t eff[MAX_ROWS + 64];
	static uint32_t pos[SELECT_SPARSE(MAX_ROWS + 64)];
	static uint64_t above[MAX_WORDS], equal[MAX_WORDS], mask[MAX_WORDS];
	const struct select_kern *kern[2] = {&select_portable,
					     cpu_has_avx2() ? &select_avx2 : &select_portable};

	for (int i = 0; i < 1500; i++) {
		uint64_t got[2][SELECT_CUTS][MAX_WORDS] = {0};
		uint32_t n = 2 + rnd(MAX_ROWS - 1), words = (uint32_t)BITS_WORDS(n), cut[SELECT_CUTS], in = 0;
		uint32_t density = rnd(3) ? 50 : 4, span = rnd(2) ? 65536 : 3;

		for (uint32_t p = 0; p < n; p++)
			scores[0][p] = (uint16_t)rnd(span);
		for (uint32_t w = 0; w < words; w++)
			mask[w] = word_of_density(density);
		if (n % 64)
			mask[words - 1] &= (UINT64_C(1) << (n % 64)) - 1;
		in = bits_rank(mask, n);
		if (in < 2)
			continue;
		for (int j = 0; j < SELECT_CUTS; j++)
			cut[j] = 1 + rnd(in - 1);
		for (int k = 0; k < 2; k++) {
			struct select_scratch s = {kern[k], eff, pos, above, equal};
			uint64_t *out[SELECT_CUTS] = {got[k][0], got[k][1], got[k][2], got[k][3]};

			/* The exact array, so that ASan sees a read past its end. */
			_cleanup_free_ uint16_t *keys = malloc(n * sizeof(*keys));
			assert_non_null(keys);
			memcpy(keys, scores[0], n * sizeof(*keys));
			select_top(&s, keys, n, mask, in, cut, SELECT_CUTS, out);
			assert_int_equal(kern[k]->count(mask, words), in);
		}
		assert_memory_equal(got[0], got[1], sizeof(got[0]));
		for (int j = 0; j < SELECT_CUTS; j++) { /* whoever is in beats whoever is out */
			uint32_t worst_in = UINT32_MAX, best_out = 0, c = 0;

			bits_for_each(p, mask, n) {
				uint32_t rank = MAX(scores[0][p], 1) * (MAX_ROWS + 1u) + p;

				if (bits_test(got[0][j], p))
					worst_in = MIN(worst_in, rank);
				else
					best_out = MAX(best_out, rank);
				c += bits_test(got[0][j], p);
			}
			assert_int_equal(c, cut[j]);
			assert_int_equal(bits_rank(got[0][j], n), cut[j]); /* nobody from outside the mask */
			assert_true(worst_in > best_out);
		}
	}
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
		cmocka_unit_test(kernels_agree),
		cmocka_unit_test(impossible_fields_are_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
