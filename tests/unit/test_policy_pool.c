/* SPDX-License-Identifier: MIT */
/* Shared budgets: curves and parts against brute force, and a ledger that no churn can overdraw. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "policy/pool.h"
#include "shm/util.h"

#include <stdlib.h>
#include <string.h>

#define SEATS 12u
#define LANES 6u
#define ROWS 400u
#define NEVER 0u

static uint64_t seed = 1;

static uint32_t rnd(uint32_t n)
{
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(seed >> 33) % n;
}

/* A sequence as its plans see it. */
struct member {
	struct pool_seat seat;
	struct pool_bid bid;
	struct adaptive_lane lane[LANES];
	uint16_t key[LANES][ROWS];
	uint64_t uniform;
	uint64_t has; /* rows, as of the newest plan carried out */
	bool planning, claimed;
};

static struct pool pool;
static struct member member[SEATS];

static uint16_t key_of_bin(uint32_t bin)
{
	return (uint16_t)((bin + ((127 - 26) << 5)) << 3 | rnd(8));
}

/* Rows whose bins lie around `worth`, `spread` of them; some are protected. */
static void fill(struct member *m, uint32_t rows, uint32_t uniform, uint32_t worth, uint32_t spread)
{
	m->uniform = (uint64_t)uniform * LANES;
	for (uint32_t l = 0; l < LANES; l++) {
		m->lane[l] = (struct adaptive_lane){
			.key = m->key[l], .rows = rows, .forced = 10, .uniform = uniform, .cap = rows};
		for (uint32_t i = 0; i < rows; i++)
			m->key[l][i] = i < 10 ? 0 : key_of_bin(worth + rnd(spread));
	}
}

static void begin(struct member *m)
{
	pool_begin(&pool, &m->seat, m->uniform, &m->bid);
	m->planning = true;
	m->claimed = false;
}

static void decide(struct member *m, uint32_t permille)
{
	uint32_t budget[LANES];
	uint64_t sum = 0;

	adaptive_curve(m->lane, LANES, m->bid.keep);
	pool_choose(&m->bid, permille);
	assert_int_equal(adaptive_budgets(m->lane, LANES, m->bid.rows, permille, budget), 0);
	for (uint32_t l = 0; l < LANES; l++)
		sum += budget[l];
	assert_true(sum <= m->bid.rows); /* and the same unless its limits are beyond */
	if (m->bid.rows >= m->bid.keep[ADAPTIVE_BINS] && m->bid.rows <= m->bid.keep[0])
		assert_int_equal(sum, m->bid.rows);
	pool_claim(&pool, &m->seat, &m->bid);
	pool_wish(&pool, &m->seat, ADAPTIVE_HYSTERESIS);
	m->claimed = true;
}

static void carry_out(struct member *m)
{
	pool_settle(&pool, &m->seat, &m->bid, true);
	m->has = m->bid.rows;
	m->planning = false;
}

static void plan(struct member *m, uint32_t permille)
{
	begin(m);
	decide(m, permille);
	carry_out(m);
}

static void reset(void)
{
	memset(&pool, 0, sizeof(pool));
	for (uint32_t i = 0; i < SEATS; i++) {
		member[i].seat.seated = member[i].planning = false;
		member[i].has = 0;
	}
}

static uint64_t debt(void)
{
	return pool_owed(&pool) ? pool.held + pool.lent - pool.uniform : 0;
}

static void curves_count_what_lanes_would_keep(void **state)
{
	static struct member m;
	uint32_t keep[ADAPTIVE_BINS + 1];

	for (int round = 0; round < 20; round++) {
		uint32_t worth = rnd(900);

		fill(&m, 60 + rnd(ROWS - 60), 40 + rnd(20), worth, 1 + rnd(120));
		for (uint32_t l = 0; l < LANES; l++) {
			m.lane[l].cap = m.lane[l].uniform + rnd(100);
			m.lane[l].forced = l == 3 ? 45 : 10;
		}
		adaptive_curve(m.lane, LANES, keep);
		for (uint32_t b = 0; b < ADAPTIVE_BINS; b++) {
			uint32_t sum = 0;

			assert_true(keep[b] >= keep[b + 1]);
			for (uint32_t l = 0; l < LANES; l++) {
				uint32_t all = m.lane[l].forced, rows = m.lane[l].forced, floor;

				for (uint32_t i = 0; i < m.lane[l].rows; i++) {
					all += m.key[l][i] != 0;
					rows += m.key[l][i] && adaptive_bin(m.key[l][i]) >= b;
				}
				floor = MAX(MAX(24, m.lane[l].uniform / 4), m.lane[l].forced);
				sum += MIN(MAX(rows, floor), MIN(m.lane[l].cap, all));
			}
			assert_int_equal(keep[b], sum);
		}
		assert_true(keep[ADAPTIVE_BINS] <= m.uniform);
	}
}

static void bins_follow_keys(void **state)
{
	const float value[] = {0, 1e-12f, 1.6e-8f, 1e-6f, 1e-3f, 0.1f, 0.104f, 1, 60, 64, 1e9f};
	uint16_t key[ARRAY_SIZE(value)];

	adaptive_keys(value, 1, ARRAY_SIZE(value), key);
	assert_int_equal(adaptive_bin(key[0]), 0);
	assert_int_equal(adaptive_bin(key[1]), 0);
	for (size_t i = 3; i < 9; i++)
		assert_true(adaptive_bin(key[i]) > adaptive_bin(key[i - 1]));
	assert_int_equal(adaptive_bin(key[9]), ADAPTIVE_BINS - 1);
	assert_int_equal(adaptive_bin(key[10]), ADAPTIVE_BINS - 1);
	assert_int_equal(adaptive_bin(UINT16_MAX), ADAPTIVE_BINS - 1);
}

/* The best rows of all stay, whoever has them: by a sort of everything. */
static int descending(const void *a, const void *b)
{
	return *(const int *)b - *(const int *)a;
}

static void parts_are_the_best_rows_of_all(void **state)
{
	static int bins[SEATS * LANES * ROWS];

	for (int round = 0; round < 10; round++) {
		uint32_t n = 0, forced = 0, brought = 0, price;
		uint64_t sum = 0;

		reset();
		for (uint32_t i = 0; i < SEATS; i++) {
			fill(&member[i], ROWS, 100, 200 + rnd(40), 400); /* wide: no floor nor limit binds */
			plan(&member[i], NEVER);
		}
		for (uint32_t i = 0; i < SEATS; i++)
			for (uint32_t l = 0; l < LANES; l++)
				for (uint32_t r = 0; r < ROWS; r++)
					if (member[i].key[l][r])
						bins[n++] = (int)adaptive_bin(member[i].key[l][r]);
					else
						forced++;
		brought = SEATS * LANES * 100;
		qsort(bins, n, sizeof(*bins), descending);
		price = (uint32_t)bins[brought - forced];
		for (uint32_t i = 0; i < SEATS; i++) {
			uint64_t above = 0, at = 0, got = pool_part(&pool, &member[i].seat);

			for (uint32_t l = 0; l < LANES; l++)
				for (uint32_t r = 0; r < ROWS; r++) {
					uint32_t bin = adaptive_bin(member[i].key[l][r]);

					above += !member[i].key[l][r] || bin > price;
					at += member[i].key[l][r] && bin == price;
				}
			assert_in_range(got, above, above + at);
			sum += got;
		}
		assert_in_range(sum, brought - SEATS, brought);
	}
}

static void equal_seats_get_equal_parts(void **state)
{
	for (uint32_t spread = 1; spread < 300; spread *= 6) {
		reset();
		for (uint32_t i = 0; i < SEATS; i++) {
			if (i)
				member[i] = member[0];
			else
				fill(&member[0], ROWS, 90, 300, spread);
			member[i].seat.seated = false;
		}
		for (uint32_t i = 0; i < 3 * SEATS; i++)
			plan(&member[i % SEATS], ADAPTIVE_HYSTERESIS);
		for (uint32_t i = 0; i < SEATS; i++)
			assert_int_equal(member[i].has, LANES * 90);
	}
}

/* One is worth more: it grows, but not before others have given up rows, and never beyond what there is. */
static void rows_go_where_they_are_worth_more(void **state)
{
	reset();
	fill(&member[0], ROWS, 100, 300, 100);
	fill(&member[1], ROWS, 100, 360, 100);
	plan(&member[1], ADAPTIVE_HYSTERESIS);
	assert_int_equal(member[1].has, LANES * 100);
	begin(&member[0]);
	assert_false(pool_due(&pool, &member[1].seat, ADAPTIVE_HYSTERESIS));
	decide(&member[0], ADAPTIVE_HYSTERESIS);
	assert_true(member[0].bid.rows < LANES * 95);
	plan(&member[1], ADAPTIVE_HYSTERESIS);
	assert_int_equal(member[1].has, LANES * 100); /* not given up yet */
	assert_true(member[1].seat.wish > LANES * 105);
	assert_false(pool_due(&pool, &member[1].seat, ADAPTIVE_HYSTERESIS));
	carry_out(&member[0]);
	assert_true(pool_due(&pool, &member[1].seat, ADAPTIVE_HYSTERESIS));
	plan(&member[1], ADAPTIVE_HYSTERESIS);
	assert_true(member[1].has > LANES * 105);
	assert_in_range(member[0].has + member[1].has, 2 * LANES * 100 - 2, 2 * LANES * 100);
	assert_true(member[0].has >= LANES * 25); /* its floor */
	assert_int_equal(pool.waiting, 0);
	/* What stays the same stays. */
	for (int i = 0; i < 4; i++) {
		uint64_t had = member[i % 2].has;

		assert_false(pool_due(&pool, &member[i % 2].seat, ADAPTIVE_HYSTERESIS));
		plan(&member[i % 2], ADAPTIVE_HYSTERESIS);
		assert_int_equal(member[i % 2].has, had);
	}
	/* The giver leaves: the other has to give back, and is due at once. */
	pool_leave(&pool, &member[0].seat, NULL);
	assert_true(pool_owed(&pool));
	assert_true(pool_due(&pool, &member[1].seat, ADAPTIVE_HYSTERESIS));
	plan(&member[1], ADAPTIVE_HYSTERESIS);
	assert_int_equal(member[1].has, LANES * 100);
	assert_false(pool_owed(&pool));
}

/* Debts are paid to the last row, also where each one's part of them is less than what hysteresis holds. */
static void small_debts_are_paid_too(void **state)
{
	reset();
	for (uint32_t i = 0; i < SEATS; i++)
		fill(&member[i], ROWS, 100, i ? 300 : 285, 100);
	for (uint32_t i = 0; i < 3 * SEATS; i++)
		plan(&member[i % SEATS], NEVER);
	pool_leave(&pool, &member[0].seat, NULL);
	assert_true(debt() > LANES * 10 && debt() < (SEATS - 1) * LANES * 5);
	for (uint32_t i = 1; i < SEATS; i++)
		plan(&member[i], ADAPTIVE_HYSTERESIS);
	assert_int_equal(debt(), 0);
}

/* A plan of which nothing comes leaves everything as it was. */
static void abandoned_plans_give_everything_back(void **state)
{
	uint64_t held;

	reset();
	fill(&member[0], ROWS, 100, 300, 100);
	fill(&member[1], ROWS, 100, 380, 100);
	for (uint32_t i = 0; i < 3; i++)
		plan(&member[i % 2], ADAPTIVE_HYSTERESIS);
	held = pool.held;
	assert_true(pool_spare(&pool) > 0);
	for (int claim = 0; claim < 2; claim++) {
		begin(&member[1]);
		assert_int_equal(pool_spare(&pool), 0);
		if (claim) {
			decide(&member[1], NEVER);
			assert_true(pool.held > held);
		}
		pool_abandon(&pool, &member[1].seat, &member[1].bid);
		pool_abandon(&pool, &member[1].seat, &member[1].bid);
		assert_int_equal(pool.held, held);
		assert_int_equal(pool.lent, 0);
	}
	member[1].planning = false;
}

/* The one that waits makes those due who hold more than their part. */
static void who_holds_too_much_is_due(void **state)
{
	reset();
	fill(&member[0], ROWS, 100, 300, 100);
	plan(&member[0], ADAPTIVE_HYSTERESIS);
	fill(&member[1], ROWS, 100, 380, 100);
	plan(&member[1], ADAPTIVE_HYSTERESIS);
	assert_int_equal(member[1].has, LANES * 100);
	assert_true(member[1].seat.wish && pool.waiting == 1);
	assert_true(pool_due(&pool, &member[0].seat, ADAPTIVE_HYSTERESIS));
	plan(&member[0], ADAPTIVE_HYSTERESIS);
	assert_false(pool_due(&pool, &member[0].seat, ADAPTIVE_HYSTERESIS));
	assert_true(pool_due(&pool, &member[1].seat, ADAPTIVE_HYSTERESIS));
}

static void check_books(void)
{
	uint64_t uniform = 0, held = 0, lent = 0;
	uint32_t seats = 0, waiting = 0;

	for (uint32_t i = 0; i < SEATS; i++) {
		const struct member *m = &member[i];

		if (!m->seat.seated)
			continue;
		seats++;
		waiting += m->seat.wish != 0;
		uniform += m->seat.uniform;
		held += m->seat.held;
		lent += m->planning && !m->claimed ? m->bid.lent : 0;
		/* What it has, and what it may get any moment. */
		assert_true(m->seat.held >= m->has || m->has == 0);
		if (m->planning && m->claimed)
			assert_true(m->seat.held >= m->bid.rows);
	}
	assert_int_equal(pool.seats, seats);
	assert_int_equal(pool.waiting, waiting);
	assert_int_equal(pool.uniform, uniform);
	assert_int_equal(pool.held, held);
	assert_int_equal(pool.lent, lent);
	for (uint32_t b = 0; b <= ADAPTIVE_BINS; b += 61) {
		uint64_t keep = 0;

		for (uint32_t i = 0; i < SEATS; i++)
			keep += member[i].seat.seated ? member[i].seat.keep[b] : 0;
		assert_int_equal(pool.keep[b], keep);
	}
}

/* One random step of a random member. true: it may leave debts (somebody who had given rows away goes or asks
 * for less). */
static bool churn(struct member *m)
{
	uint32_t dice = rnd(20);

	if (dice == 0) {
		pool_leave(&pool, &m->seat, m->planning ? &m->bid : NULL);
		m->planning = false;
		m->has = 0;
		return true;
	}
	if (!m->planning) {
		bool less;

		if (dice < 12 || !m->uniform)
			fill(m, 150 + rnd(ROWS - 150), 30 + rnd(100), rnd(800), 1 + rnd(200));
		less = m->seat.seated && m->uniform < m->seat.uniform;
		begin(m);
		return less;
	}
	if (dice == 1) {
		pool_abandon(&pool, &m->seat, &m->bid);
		m->planning = false;
	} else if (!m->claimed) {
		decide(m, rnd(2) ? ADAPTIVE_HYSTERESIS : NEVER);
	} else if (dice == 2) {
		pool_settle(&pool, &m->seat, &m->bid, false); /* some lanes refused */
		m->has = MAX(m->has, m->bid.rows);
		m->planning = false;
	} else {
		carry_out(m);
	}
	return false;
}

static void churn_never_overdraws(void **state)
{
	uint64_t grown = 0;

	memset(member, 0, sizeof(member));
	reset();
	for (int round = 0; round < 20; round++) {
		for (int step = 0; step < 1000; step++) {
			struct member *m = &member[rnd(SEATS)];
			uint64_t before = debt();
			bool may = churn(m);

			check_books();
			if (!may)
				assert_true(debt() <= before);
			grown += m->seat.seated && m->seat.held > m->seat.uniform;
		}
		/* Left alone, everybody's plans pay all debts, and then nobody holds more than is his. */
		for (uint32_t i = 0; i < 3 * SEATS; i++) {
			struct member *m = &member[i % SEATS];

			if (m->planning) {
				pool_abandon(&pool, &m->seat, &m->bid);
				m->planning = false;
			}
			if (m->seat.seated)
				plan(m, ADAPTIVE_HYSTERESIS);
		}
		assert_int_equal(debt(), 0);
		check_books();
	}
	assert_true(grown > 1000);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(curves_count_what_lanes_would_keep),
		cmocka_unit_test(bins_follow_keys),
		cmocka_unit_test(parts_are_the_best_rows_of_all),
		cmocka_unit_test(equal_seats_get_equal_parts),
		cmocka_unit_test(rows_go_where_they_are_worth_more),
		cmocka_unit_test(small_debts_are_paid_too),
		cmocka_unit_test(abandoned_plans_give_everything_back),
		cmocka_unit_test(who_holds_too_much_is_due),
		cmocka_unit_test(churn_never_overdraws),
	};

	return cmocka_run_group_tests_name("policy/pool", tests, NULL, NULL);
}
