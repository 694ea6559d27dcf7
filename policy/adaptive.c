/* SPDX-License-Identifier: MIT */
/*
 * One radix selection over all lanes at once, in two passes of 256 bins each: a
 * lane's histogram tells how many rows it would keep at any price, so that
 * the price at which all budgets add up is found without looking at rows again.
 */
#include "policy/adaptive.h"
#include "shm/util.h"

#include <string.h>

#define BINS 256u
#define ROUNDS 8 /* of hysteresis */

struct work {
	const struct adaptive_lane *lane;
	uint32_t lanes;
	uint64_t total;        /* rows to be given out */
	uint64_t uniform;      /* rows that uniform budgets would give */
	uint32_t *high;        /* [lanes][BINS] rows whose key's high byte is at least that */
	uint32_t *low;         /* [lanes][BINS] the same for the low byte of rows whose high byte is `at` */
	uint32_t at;           /* BINS: none */
	uint32_t *lo, *hi;     /* [lanes] limits of the budgets */
	uint32_t *before;      /* [lanes] budgets of before, scaled; 0: none */
	uint32_t *room, *next; /* [lanes] scratch of solve() and settle() */
	bool *held;            /* [lanes] */
};

void adaptive_keys(const float *values, float sensitivity, size_t n, uint16_t *keys)
{
	for (size_t i = 0; i < n; i++) {
		float v = values[i] * sensitivity;
		uint32_t bits;

		memcpy(&bits, &v, sizeof(bits));
		keys[i] = v > 0 ? (uint16_t)MAX(bits >> 15, 1u) : 1;
	}
}

/* Counts become counts of this bin and all above. */
static void from_the_top(uint32_t *bins)
{
	for (uint32_t b = BINS - 1; b-- > 0;)
		bins[b] += bins[b + 1];
}

static void count_high(struct work *w)
{
	for (uint32_t l = 0; l < w->lanes; l++) {
		uint32_t *bins = w->high + (size_t)l * BINS, none = 0;

		for (uint32_t i = 0; i < w->lane[l].rows; i++) {
			bins[w->lane[l].key[i] >> 8]++;
			none += w->lane[l].key[i] == 0;
		}
		bins[0] -= none;
		from_the_top(bins);
	}
}

static void count_low(struct work *w, uint32_t at)
{
	if (w->at == at)
		return;
	w->at = at;
	memset(w->low, 0, (size_t)w->lanes * BINS * sizeof(*w->low));
	for (uint32_t l = 0; l < w->lanes; l++) {
		uint32_t *bins = w->low + (size_t)l * BINS;

		for (uint32_t i = 0; i < w->lane[l].rows; i++) {
			uint16_t key = w->lane[l].key[i];

			if (key >> 8 == at && key)
				bins[key & 0xff]++;
		}
		from_the_top(bins);
	}
}

/* Rows of the lane with keys of at least `key`, whose high byte is `at` or whose low byte is 0. */
static uint32_t rows_from(const struct work *w, uint32_t lane, uint32_t key)
{
	const uint32_t *high = w->high + (size_t)lane * BINS, *low = w->low + (size_t)lane * BINS;
	uint32_t h = key >> 8;

	if (h >= BINS)
		return 0;
	return key & 0xff ? (h + 1 < BINS ? high[h + 1] : 0) + low[key & 0xff] : high[h];
}

static uint32_t budget_at(const struct work *w, uint32_t lane, uint32_t key)
{
	uint32_t rows = w->lane[lane].forced + rows_from(w, lane, key);

	return MIN(MAX(rows, w->lo[lane]), w->hi[lane]);
}

static uint64_t sum_at(const struct work *w, uint32_t key)
{
	uint64_t sum = 0;

	for (uint32_t l = 0; l < w->lanes; l++)
		sum += budget_at(w, l, key);
	return sum;
}

/* The highest of 256 keys `step` apart from `first` on at which all get together at least the total. */
static uint32_t last_price(const struct work *w, uint32_t first, uint32_t step)
{
	uint32_t yes = 0, no = BINS;

	while (no - yes > 1) {
		uint32_t mid = yes + (no - yes) / 2;

		if (sum_at(w, first + mid * step) >= w->total)
			yes = mid;
		else
			no = mid;
	}
	return first + yes * step;
}

/* `seats` more, at most room[l] each, in even shares; what does not divide goes to the first lanes. */
static void share_out(uint32_t *budget, const uint32_t *room, uint32_t lanes, uint64_t seats)
{
	uint32_t level = 0, top = UINT32_MAX;

	while (top - level > 1) { /* the highest level that the seats reach everywhere */
		uint32_t mid = level + (top - level) / 2;
		uint64_t need = 0;

		for (uint32_t l = 0; l < lanes; l++)
			need += MIN(room[l], mid);
		if (need <= seats)
			level = mid;
		else
			top = mid;
	}
	for (uint32_t l = 0; l < lanes; l++) {
		budget[l] += MIN(room[l], level);
		seats -= MIN(room[l], level);
	}
	for (uint32_t l = 0; l < lanes && seats; l++)
		if (room[l] > level) {
			budget[l]++;
			seats--;
		}
}

/* Budgets within the limits that add up to the total; -ERANGE when there are none. */
static int solve(struct work *w, uint32_t *budget)
{
	uint64_t least = 0, most = 0, seats = w->total;
	uint32_t price;

	for (uint32_t l = 0; l < w->lanes; l++) {
		least += w->lo[l];
		most += w->hi[l];
	}
	if (w->total < least || w->total > most)
		return -ERANGE;
	price = last_price(w, 0, BINS);
	count_low(w, price >> 8);
	price = last_price(w, price, 1);
	for (uint32_t l = 0; l < w->lanes; l++) {
		budget[l] = budget_at(w, l, price + 1);
		w->room[l] = budget_at(w, l, price) - budget[l];
		seats -= budget[l];
	}
	share_out(budget, w->room, w->lanes, seats);
	return 0;
}

static uint32_t least_of(const struct adaptive_lane *l)
{
	uint32_t floor = MAX(ADAPTIVE_FLOOR_ROWS, l->uniform / ADAPTIVE_FLOOR_SHARE);

	return MAX(MIN(floor, l->uniform), l->forced);
}

static void set_limits(struct work *w)
{
	for (uint32_t l = 0; l < w->lanes; l++) {
		const struct adaptive_lane *a = &w->lane[l];

		w->hi[l] = MIN(a->cap, a->forced + w->high[(size_t)l * BINS]);
		w->lo[l] = MIN(least_of(a), w->hi[l]);
	}
}

/* What lanes had, in shares of what all of those that had something have in this total. */
static void scale_before(struct work *w)
{
	uint64_t had = 0, have = 0, left;

	for (uint32_t l = 0; l < w->lanes; l++) {
		had += w->lane[l].before;
		have += w->lane[l].before ? w->lane[l].uniform : 0;
	}
	have = w->uniform ? (uint64_t)((double)have / (double)w->uniform * (double)w->total) : 0;
	left = have;
	for (uint32_t l = 0; l < w->lanes; l++) {
		w->before[l] = had ? (uint32_t)((double)w->lane[l].before * ((double)have / (double)had)) : 0;
		w->room[l] = w->lane[l].before ? w->lanes : 0;
		left -= MIN(left, w->before[l]);
	}
	share_out(w->before, w->room, w->lanes, left);
}

/* Lanes whose budget would hardly change keep what they had: how many more these are now. */
static uint32_t hold(struct work *w, uint32_t permille, const uint32_t *budget)
{
	uint32_t n = 0;

	for (uint32_t l = 0; l < w->lanes; l++) {
		uint32_t was = w->before[l], change = MAX(budget[l], was) - MIN(budget[l], was);

		if (w->held[l] || !was || was < w->lo[l] || was > w->hi[l] ||
		    (uint64_t)change * 1000 >= (uint64_t)was * permille)
			continue;
		w->held[l] = true;
		w->lo[l] = w->hi[l] = was;
		n++;
	}
	return n;
}

/* budget holds the solution without hysteresis, and still does where there is none with it. */
static int settle(struct work *w, uint32_t permille, uint32_t *budget)
{
	uint32_t *next = w->next;

	memcpy(next, budget, w->lanes * sizeof(*next));
	for (int round = 0; hold(w, permille, next); round++) {
		int r = round < ROUNDS ? solve(w, next) : -ERANGE;

		if (r < 0) /* what is held leaves too much or too little for the others */
			return r == -ERANGE ? 0 : r;
	}
	memcpy(budget, next, w->lanes * sizeof(*next));
	return 0;
}

static int work_init(struct work *w, const struct adaptive_lane *lane, uint32_t lanes, uint64_t total)
{
	*w = (struct work){.lane = lane, .lanes = lanes, .at = BINS, .total = total};
	w->high = calloc(lanes, 2 * BINS * sizeof(*w->high));
	w->lo = calloc(lanes, 5 * sizeof(*w->lo));
	w->held = calloc(lanes, sizeof(*w->held));
	if (!w->high || !w->lo || !w->held)
		return -ENOMEM;
	w->low = w->high + (size_t)lanes * BINS;
	w->hi = w->lo + lanes;
	w->before = w->hi + lanes;
	w->room = w->before + lanes;
	w->next = w->room + lanes;
	w->uniform = adaptive_uniform(lane, lanes);
	return 0;
}

static void work_done(struct work *w)
{
	free(w->high);
	free(w->lo);
	free(w->held);
}

/* Shares of the total as of the uniform budgets. */
static void scale_uniform(const struct work *w, uint32_t *budget)
{
	uint64_t given = 0;

	for (uint32_t l = 0; l < w->lanes; l++) {
		uint32_t uniform = w->lane[l].uniform;

		budget[l] = w->total == w->uniform
				    ? uniform
				    : (uint32_t)((double)uniform / (double)w->uniform * (double)w->total);
		given += budget[l];
	}
	for (uint32_t l = 0; given > w->total; l = (l + 1) % w->lanes) /* rounding of huge sums */
		if (budget[l]) {
			budget[l]--;
			given--;
		}
}

uint64_t adaptive_uniform(const struct adaptive_lane *lane, uint32_t lanes)
{
	uint64_t sum = 0;

	for (uint32_t l = 0; l < lanes; l++)
		sum += lane[l].uniform;
	return sum;
}

void adaptive_curve(const struct adaptive_lane *lane, uint32_t lanes, uint32_t keep[ADAPTIVE_BINS + 1])
{
	uint64_t uniform = adaptive_uniform(lane, lanes);

	memset(keep, 0, (ADAPTIVE_BINS + 1) * sizeof(*keep));
	for (uint32_t l = 0; l < lanes; l++) {
		const struct adaptive_lane *a = &lane[l];
		uint32_t bins[ADAPTIVE_BINS + 1] = {0}, rows = a->forced, lo, hi;

		for (uint32_t i = 0; i < a->rows; i++)
			if (a->key[i])
				bins[adaptive_bin(a->key[i])]++;
		for (uint32_t b = 0; b < ADAPTIVE_BINS; b++)
			rows += bins[b];
		hi = MIN(a->cap, rows);
		lo = MIN(least_of(a), hi);
		rows = a->forced;
		for (uint32_t b = ADAPTIVE_BINS + 1; b-- > 0;) {
			rows += bins[b];
			keep[b] += MIN(MAX(rows, lo), hi);
		}
	}
	keep[ADAPTIVE_BINS] = (uint32_t)MIN(keep[ADAPTIVE_BINS], uniform);
}

int adaptive_budgets(const struct adaptive_lane *lane, uint32_t lanes, uint64_t total, uint32_t permille,
		     uint32_t *budget)
{
	struct work w;
	int r = lanes ? work_init(&w, lane, lanes, total) : -EINVAL;

	if (r == -EINVAL)
		return r;
	if (r == 0) {
		count_high(&w);
		set_limits(&w);
		scale_before(&w);
		r = solve(&w, budget);
	}
	if (r == 0)
		r = settle(&w, permille, budget);
	if (r == -ERANGE)
		scale_uniform(&w, budget);
	work_done(&w);
	return r == -ERANGE ? 0 : r;
}
