/* SPDX-License-Identifier: MIT */
/*
 * Adaptive device budgets of a plan: a uniform budget is a number of rows, and
 * which lanes hold them follows from what rows are worth; share.c has the sequence's
 * part where sequences share. Below the device tier, and in every lane's own
 * ranking, all stays as it is, but for plans that promise to drop nothing.
 */
#include <string.h>
#include "daemon/internal.h"
#include "policy/adaptive.h"
#include "policy/decide.h"
#include "policy/pool.h"
#include "shm/util.h"

#define CHUNK_ROWS 1024u

/* Rows of all lanes are as wide, so that as many rows are as many bytes. */
static bool lanes_alike(const struct model *m)
{
	for (uint32_t l = 1; l < m->lanes; l++)
		if (lane_bytes(m, l) != lane_bytes(m, 0))
			return false;
	return true;
}

static bool may_differ(const struct plan *p)
{
	const struct seq *s = p->seq;
	uint32_t most = 0;

	if (!s->core->cfg.adaptive || !p->use->calibration || s->equal_lanes || p->saving || p->stuck ||
	    s->device_cap != ROWS_ALL || s->granularity != KVT_GRAN_HEAD ||
	    (s->device_table && !s->budget_default) || !lanes_alike(s->model))
		return false;
	for (uint32_t l = 0; l < s->ix.lanes; l++)
		most = MAX(most, p->budget[KVT_TIER_DEVICE][l]);
	return most && most < p->watermark;
}

int adaptive_begin(struct plan *p)
{
	if (may_differ(p)) {
		p->worth = malloc((size_t)p->seq->ix.lanes * p->watermark * sizeof(*p->worth));
		if (!p->worth)
			return -ENOMEM;
	}
	return share_begin(p);
}

/* Rows that rank before all scores: bits of word w. */
static uint64_t forced_rows(const struct plan *p, uint32_t w)
{
	uint32_t first = w * 64, end = p->watermark, tail = end - MIN(p->protect_last, end);
	uint64_t bits = (p->pinned ? p->pinned[w] : 0) | (p->wanted ? p->wanted[w] : 0);

	if (first + 64 > tail)
		bits |= first >= tail ? UINT64_MAX : UINT64_MAX << (tail - first);
	if (first < p->protect_first)
		bits |= p->protect_first - first >= 64 ? UINT64_MAX
						       : (UINT64_C(1) << (p->protect_first - first)) - 1;
	return bits;
}

/* Rows of the lane that some tier holds: bits of word w below the watermark. */
static uint64_t alive_rows(const struct plan *p, uint32_t lane, uint32_t w)
{
	const struct index *ix = &p->seq->ix;
	uint64_t bits = 0;

	for (int t = 0; t < KVT_TIERS; t++)
		bits |= index_bits(ix, t, lane)[w];
	return p->watermark - w * 64 < 64 ? bits & ((UINT64_C(1) << (p->watermark - w * 64)) - 1) : bits;
}

void adaptive_weigh(struct plan *p, uint32_t lane)
{
	const struct calibration *c = p->use->calibration;
	const uint16_t *keys = plan_keys(p, lane);
	uint16_t *worth = p->worth + (size_t)lane * p->watermark;
	uint32_t of = policy_lane(p->seq->model, lane);
	float score[CHUNK_ROWS], value[CHUNK_ROWS];

	for (uint32_t at = 0; at < p->watermark; at += CHUNK_ROWS) {
		uint32_t n = MIN(CHUNK_ROWS, p->watermark - at);

		key_scores(keys + at, score, n);
		calibrate_values(c, of, score, NULL, at, n, p->watermark, value);
		adaptive_keys(value, calibrate_sensitivity(c, of), n, worth + at);
	}
	for (uint32_t w = 0; w < p->words; w++) {
		uint64_t choice = alive_rows(p, lane, w) & ~forced_rows(p, w);

		for (uint32_t i = w * 64; i < MIN(w * 64 + 64, p->watermark); i++)
			if (!(choice >> i % 64 & 1))
				worth[i] = 0;
	}
}

/* Nothing may be dropped: where a lane has less of the device, the tier below takes more of it. */
static void make_up_below(struct plan *p, const struct adaptive_lane *lane)
{
	int t = p->budget[KVT_TIER_DRAM][0] ? KVT_TIER_DRAM : KVT_TIER_NVME;

	for (uint32_t l = 0; l < p->seq->ix.lanes; l++) {
		uint32_t device = p->budget[KVT_TIER_DEVICE][l], *below = &p->budget[t][l];

		if (device < lane[l].uniform)
			*below += MIN(lane[l].uniform - device, ROWS_ALL - *below);
	}
}

int adaptive_divide(struct plan *p)
{
	const struct seq *s = p->seq;
	_cleanup_free_ struct adaptive_lane *lane = NULL;
	uint64_t total;
	int r;

	if (!p->worth)
		return 0;
	lane = calloc(s->ix.lanes, sizeof(*lane));
	if (!lane)
		return -ENOMEM;
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		struct adaptive_lane *a = &lane[l];
		uint32_t room = s->layout ? s->layout[s->model->lane_layer[l]].cap : ROWS_ALL;

		*a = (struct adaptive_lane){
			.key = p->worth + (size_t)l * p->watermark,
			.rows = p->watermark,
			.uniform = p->budget[KVT_TIER_DEVICE][l],
			.before = s->adaptive ? s->adaptive[l] : 0,
		};
		/* The next rows need room too, as they have under uniform budgets. */
		a->cap = MAX(a->uniform, room - MIN(room, s->slack));
		for (uint32_t w = 0; w < p->words; w++)
			a->forced += (uint32_t)__builtin_popcountll(alive_rows(p, l, w) & forced_rows(p, w));
	}
	total = adaptive_uniform(lane, s->ix.lanes);
	if (p->bid) {
		adaptive_curve(lane, s->ix.lanes, p->bid->keep);
		pool_choose(p->bid, ADAPTIVE_HYSTERESIS);
		total = p->bid->rows;
	}
	r = adaptive_budgets(lane, s->ix.lanes, total, ADAPTIVE_HYSTERESIS, p->budget[KVT_TIER_DEVICE]);
	if (!r && p->lossless)
		make_up_below(p, lane);
	return r;
}

void adaptive_done(struct plan *p)
{
	struct seq *s = p->seq;
	size_t bytes = s->ix.lanes * sizeof(*s->adaptive);

	/* What sequences share is theirs by plans that somebody carries out. */
	if (p->error || p->over || p->saving || (p->private_tables && s->share))
		return;
	share_decided(p);
	if (!p->worth) {
		free(s->adaptive);
		s->adaptive = NULL;
		return;
	}
	free(p->worth);
	p->worth = NULL;
	if (!s->adaptive)
		s->adaptive = malloc(bytes); /* without it the next plan only lacks hysteresis */
	if (s->adaptive)
		memcpy(s->adaptive, p->budget[KVT_TIER_DEVICE], bytes);
}
