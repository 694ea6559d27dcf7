/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Adaptive budgets: as many rows as uniform budgets would keep, but where they
 * are worth most. Once scores are calibrated (policy/calibrate.h) the rows of
 * different lanes compare, so one selection over all lanes finds what a row must
 * be worth to stay; a lane's budget is how many of its rows are. That holds
 * across the heads and layers of a sequence and across sequences alike: a lane
 * is a lane. Sequences that plan at different times meet through demand curves
 * (policy/pool.h): how many rows one would keep at each price.
 *
 * Pure and deterministic; O(rows). Any thread.
 */
#include <stddef.h>
#include <stdint.h>

#define ADAPTIVE_FLOOR_ROWS 24u /* a lane keeps at least this many rows ... */
#define ADAPTIVE_FLOOR_SHARE 4u /* ... and a fourth of its uniform budget, whatever they are worth */
#define ADAPTIVE_HYSTERESIS 50u /* permille */

struct adaptive_lane {
	const uint16_t *key; /* [rows] what each row is worth, adaptive_keys(); 0: not up for selection */
	uint32_t rows;
	uint32_t forced;  /* rows that stay whatever they are worth (protected, pinned); their keys are 0 */
	uint32_t uniform; /* rows that it would keep */
	uint32_t cap;     /* most rows that it can keep */
	uint32_t before;  /* its last adaptive budget; 0: none */
};

/*
 * Keys of n rows by value (expected attention, not negative) times the lane's
 * sensitivity: never 0, monotone, of 0.4 % resolution over the whole range of
 * floats. Values that are negative or no numbers are worth nothing.
 */
void adaptive_keys(const float *values, float sensitivity, size_t n, uint16_t *keys);

/*
 * Prices, a thirty-second of an octave apart from 2^-26 to 2^6; what lies beyond counts as the first or last.
 * A row of bin b stays where the price is b or less.
 */
#define ADAPTIVE_BINS 1024u
static inline uint32_t adaptive_bin(uint16_t key)
{
	uint32_t bin = key >> 3, first = (127 - 26) << 5;

	return bin <= first ? 0 : bin - first < ADAPTIVE_BINS ? bin - first : ADAPTIVE_BINS - 1;
}

/*
 * keep[b]: rows that all lanes together keep when rows of bin b and above stay, within the limits of
 * adaptive_budgets(); keep[ADAPTIVE_BINS]: what they keep at any price, never more than the uniform budgets.
 * Descends. O(rows + lanes * bins).
 */
void adaptive_curve(const struct adaptive_lane *lane, uint32_t lanes, uint32_t keep[ADAPTIVE_BINS + 1]);

/*
 * budget[lanes], their sum exactly `total`, usually that of the uniform budgets. With floor =
 * min(max(24, uniform / 4), uniform) each is at least floor (or forced) and at
 * most what the lane has and can hold; between these limits rows stay from the
 * most valuable down, whatever lane they are in. What ties for the last seats is
 * divided evenly over the lanes, so that equal lanes get equal budgets.
 *
 * Hysteresis: a lane whose budget would change by less than `permille` of what it
 * was keeps it; the others make up for it (where they cannot, nobody is held). If
 * total changed, what was is first scaled to it. Where the limits leave no choice
 * (everybody's rows fit, or the forced rows alone do not) budgets are uniform,
 * scaled to the total.
 *
 * 0, -EINVAL (no lanes) or -ENOMEM.
 */
int adaptive_budgets(const struct adaptive_lane *lane, uint32_t lanes, uint64_t total, uint32_t permille,
		     uint32_t *budget);
/* Rows of the uniform budgets of all lanes. */
uint64_t adaptive_uniform(const struct adaptive_lane *lane, uint32_t lanes);
