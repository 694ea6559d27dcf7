/* SPDX-License-Identifier: MIT */
/* Budgets of a plan: what was asked for, what quota and space allow, what the stage slots can take. */
#include <string.h>
#include "daemon/internal.h"
#include "daemon/limbo.h"
#include "shm/trial.h"
#include "shm/util.h"

/* Bytes of `tier` that this tenant may still fill: above the min watermark and below its quota. */
static uint64_t room_in(const struct seq *s, int tier)
{
	const struct core *c = s->core;
	const struct config_watermarks *m = tier == KVT_TIER_DRAM ? &c->cfg.dram_marks : &c->cfg.nvme_marks;
	uint64_t limit = tier == KVT_TIER_DRAM ? s->tenant->limit.dram_bytes : s->tenant->limit.nvme_bytes;
	/* What waits for a seal comes back when it is wanted: pio_prepare() waits for it. */
	uint64_t waits = limbo_bytes(&c->pages, tier, s->tenant->index);
	uint64_t used = c->pages.used[tier][s->tenant->index] - waits, floor;
	uint64_t quota;
	struct tier_stat st;

	if (!c->pages.tier[tier])
		return 0;
	c->pages.tier[tier]->ops->stat(c->pages.tier[tier], &st);
	st.free += limbo_bytes(&c->pages, tier, LIMBO_ALL);
	floor = st.capacity / 1000 * m->min;
	quota = planted("quota-unchecked") ? UINT64_MAX : limit > used ? limit - used : 0;
	if (tier == KVT_TIER_DRAM && !LIST_EMPTY(&c->owners))
		st.free = direct_room(s, &quota, st.free);
	if (st.offline || st.free <= floor)
		return 0;
	return MIN(st.free - floor, quota);
}

/* What one position takes over all lanes, when its pages are full. */
static uint64_t position_bytes(const struct model *m)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < m->n_layers; i++) {
		uint32_t row = m->layer[i].k_bytes + m->layer[i].v_bytes,
			 rows = MIN(PAGE_ROWS, TIER_MAX_PAGE / row);

		sum += m->layer[i].kv_heads * DIV_UP(page_room(rows * row), rows);
	}
	return sum;
}

/* Rows per lane that fit: those that have a copy there already and what the room takes, short pages included.
 */
static uint32_t rows_that_fit(const struct seq *s, int tier)
{
	uint32_t lanes = s->ix.lanes;
	uint64_t room = s->avoid[tier] ? 0 : room_in(s, tier), padding = (uint64_t)lanes * 2 * KVT_UNIT;

	room = room > padding ? room - padding : 0;
	return (uint32_t)MIN(s->held[tier] / lanes + room / position_bytes(s->model), ROWS_ALL);
}

/*
 * Budgets that promise to drop nothing: rows of the lane for which the tiers below have no room stay on the
 * device, and where writing failed again and again all that are there do. want: rows that were asked for, all
 * tiers; below: rows that the lower tiers can take.
 */
static uint32_t stay_behind(const struct seq *s, uint32_t lane, uint64_t want, uint64_t below)
{
	uint32_t in[KVT_TIERS], gone;

	if (s->retries >= PLAN_RETRIES && (s->avoid[KVT_TIER_DRAM] || s->avoid[KVT_TIER_NVME]))
		return ROWS_ALL;
	if (MIN(want, s->ix.rows) <= below)
		return 0;
	index_count(&s->ix, lane, in, &gone);
	want = MIN(want, s->ix.rows - gone);
	return want > below ? (uint32_t)(want - below) : 0;
}

void budget_for(struct plan *p)
{
	struct seq *s = p->seq;
	struct core *c = s->core;
	const struct config *cfg = &c->cfg;
	uint32_t want[KVT_TIERS] = {s->budget[0], s->budget[1], s->budget[2]};
	uint32_t shares = cfg->budget_device + cfg->budget_dram + cfg->budget_nvme;
	bool direct;
	uint64_t asked; /* rows that the tiers below should take */

	p->lossless = s->budget_default ? shares >= 1000 : want[2] == ROWS_ALL;
	if (s->budget_default) {
		want[0] = shares ? (uint32_t)((uint64_t)p->watermark * cfg->budget_device / 1000) : ROWS_ALL;
		want[1] = (uint32_t)((uint64_t)p->watermark * cfg->budget_dram / 1000);
		want[2] = (uint32_t)((uint64_t)p->watermark * cfg->budget_nvme / 1000);
	}
	if (p->saving) {
		want[0] = 0;
		want[1] = c->draining && !c->seams.keep
				  ? 0
				  : ROWS_ALL; /* else on to nvme from there, as far as it takes them */
		want[2] = ROWS_ALL;
	}
	p->asked[0] = s->device_table && !s->budget_default && !p->saving ? s->device_table[0] : want[0];
	p->asked[1] = want[1];
	p->asked[2] = want[2];
	/* Below min nothing new enters DRAM: rows pass it by. */
	asked = (uint64_t)want[1] + want[2];
	direct = want[1] && c->below_min[KVT_TIER_DRAM] && c->pages.tier[KVT_TIER_NVME];
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
		uint32_t fit = rows_that_fit(s, t);

		if (MIN(want[t], s->ix.rows) > fit)
			p->limits |= JOURNAL_LOW;
		want[t] = MIN(want[t], fit);
	}
	if (direct) {
		want[1] = 0;
		p->direct = true;
	}
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		uint32_t device =
			s->device_table && !s->budget_default && !p->saving ? s->device_table[l] : want[0];
		uint64_t total = device + asked;

		if (device > s->device_cap)
			p->limits |= JOURNAL_DEMOTED;
		device = MIN(device, s->device_cap);
		if (p->lossless && !p->saving) {
			uint32_t stay = stay_behind(s, l, total, (uint64_t)want[1] + want[2]);

			p->stuck |= stay > device;
			device = MAX(device, stay);
		}
		if (s->layout && MIN(device, s->ix.rows) > s->layout[s->model->lane_layer[l]].cap)
			p->limits |= JOURNAL_LAYOUT;
		if (s->layout)
			device = MIN(device, s->layout[s->model->lane_layer[l]].cap);
		p->budget[0][l] = device;
		p->budget[1][l] = want[1];
		p->budget[2][l] = want[2];
	}
}

/*
 * Take n rows with the lowest keys out of `set` (a lane's bitmap) and out of
 * the device tier. Whole-token plans take the lowest positions instead, so
 * that every lane gives up the same ones.
 */
static void give_up(struct plan *p, uint32_t lane, uint64_t *set, uint32_t n, bool staged)
{
	struct index *ix = &p->seq->ix;
	const uint16_t *key = plan_keys(p, lane);
	const uint64_t *dram = index_bits(ix, KVT_TIER_DRAM, lane), *nvme = index_bits(ix, KVT_TIER_NVME, lane);
	uint64_t base = (uint64_t)lane * p->words;
	bool by_key = p->seq->granularity == KVT_GRAN_HEAD;
	uint32_t count[256] = {0}, edge = 0, below = 0;

	if (by_key) {
		bits_for_each(i, set, p->watermark)
			count[key[i] >> 8]++;
		while (below + count[edge] < n)
			below += count[edge++];
	}
	for (int pass = 0; pass < 2 && n; pass++) {
		bits_for_each(i, set, p->watermark) {
			uint32_t k = by_key ? key[i] >> 8 : 0;

			if (!n || (pass ? k != edge : k >= edge))
				continue;
			n--;
			bits_clear(p->t.resident + base, i);
			p->kept[lane]--;
			if (staged) {
				bits_clear(p->t.bring_in + base, i);
				p->in[lane]--;
			} else if (!bits_test(dram, i) && !bits_test(nvme, i)) {
				p->out[lane] +=
					!bits_test(p->t.copy_out + base, i); /* written through as it is */
				bits_set(p->t.copy_out + base, i);
			}
			bits_set((bits_test(dram, i) || !bits_test(nvme, i) ? p->to_dram : p->to_nvme) + base,
				 i);
		}
	}
}

/* Copies of rows that stay are not made where writing failed again and again. */
static void copy_no_more(struct plan *p, uint32_t lane)
{
	const bool *avoid = p->seq->avoid;
	uint64_t base = (uint64_t)lane * p->words;

	for (uint64_t i = base; i < base + p->words; i++) {
		uint64_t stay = p->t.copy_out[i] & p->t.resident[i], dram = stay & p->to_dram[i];
		uint64_t lost = (avoid[KVT_TIER_DRAM] ? dram : 0) | (avoid[KVT_TIER_NVME] ? stay & ~dram : 0);

		p->t.copy_out[i] &= ~lost;
		p->to_dram[i] &= ~lost;
		p->out[lane] -= (uint32_t)__builtin_popcountll(lost);
	}
}

/*
 * Nothing more is written to a tier where writing failed again and again: rows that were to go there are
 * dropped, and as many that would have been dropped though they have a copy take their seats.
 */
static void write_no_more(struct plan *p, uint32_t lane)
{
	struct seq *s = p->seq;
	const uint64_t *dram = index_bits(&s->ix, KVT_TIER_DRAM, lane),
		       *nvme = index_bits(&s->ix, KVT_TIER_NVME, lane);
	uint64_t base = (uint64_t)lane * p->words;
	uint32_t seats = 0;

	for (uint64_t i = base; i < base + p->words; i++) {
		uint64_t to = (s->avoid[KVT_TIER_DRAM] ? p->to_dram[i] : 0) |
			      (s->avoid[KVT_TIER_NVME] ? p->to_nvme[i] : 0),
			 lost = p->t.copy_out[i] & to;

		p->t.copy_out[i] &= ~lost;
		p->to_dram[i] &= ~lost;
		p->to_nvme[i] &= ~lost;
		p->drop[i] |= lost;
		seats += (uint32_t)__builtin_popcountll(lost);
	}
	p->out[lane] -= seats;
	p->dropped[lane] += seats;
	bits_for_each(row, p->drop + base, p->watermark) {
		bool in_dram = bits_test(dram, row);

		if (!seats)
			break;
		if (!in_dram && !bits_test(nvme, row))
			continue;
		bits_clear(p->drop + base, row);
		bits_set((in_dram ? p->to_dram : p->to_nvme) + base, row);
		p->dropped[lane]--;
		seats--;
	}
}

/* Where writing to dram failed again and again, and nothing may be lost, what was to go there goes further. */
static void write_below(struct plan *p, uint32_t lane)
{
	for (uint64_t i = (uint64_t)lane * p->words; i < (uint64_t)(lane + 1) * p->words; i++)
		p->to_dram[i] &= ~p->t.copy_out[i];
}

/* Nothing can be written, nothing may be lost, and an answer is due: the lane keeps what it has. */
static void stand_still(struct plan *p, uint32_t lane)
{
	uint64_t base = (uint64_t)lane * p->words,
		 *none[] = {p->t.bring_in, p->t.copy_out, p->to_dram, p->to_nvme, p->drop};

	memcpy(p->t.resident + base, index_bits(&p->seq->ix, KVT_TIER_DEVICE, lane),
	       p->words * sizeof(uint64_t));
	for (size_t i = 0; i < ARRAY_SIZE(none); i++)
		memset(none[i] + base, 0, p->words * sizeof(uint64_t));
	p->kept[lane] = bits_rank(p->t.resident + base, p->watermark);
	p->out[lane] = p->in[lane] = p->dropped[lane] = 0;
}

int budget_stage(struct plan *p)
{
	struct seq *s = p->seq;
	uint32_t least = ROWS_ALL;

	if (p->saving || !s->layout)
		return 0;
	if (p->promote_none && p->lossless && (s->avoid[KVT_TIER_DRAM] || s->avoid[KVT_TIER_NVME])) {
		for (uint32_t l = 0; l < s->ix.lanes; l++)
			stand_still(p, l);
		return 0;
	}
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		/* After too many misses the runtime gets a plan that promotes nothing, rather than none. */
		uint32_t stage = p->promote_none ? 0 : s->layout[s->model->lane_layer[l]].stage;

		if (p->in[l] > stage)
			give_up(p, l, p->t.bring_in + (uint64_t)l * p->words, p->in[l] - stage, true);
		least = MIN(least, p->kept[l]);
	}
	for (uint32_t l = 0; s->equal_lanes && l < s->ix.lanes; l++) {
		uint64_t base = (uint64_t)l * p->words;
		uint32_t n = p->kept[l] - least;

		if (n && p->in[l]) {
			uint32_t staged = MIN(n, p->in[l]);

			give_up(p, l, p->t.bring_in + base, staged, true);
			n -= staged;
		}
		if (n)
			give_up(p, l, p->t.resident + base, n, false);
	}
	for (uint32_t l = 0; p->write_through && l < s->ix.lanes; l++)
		copy_no_more(p, l);
	for (uint32_t l = 0; l < s->ix.lanes; l++)
		if (!p->lossless && (s->avoid[KVT_TIER_DRAM] || s->avoid[KVT_TIER_NVME]))
			write_no_more(p, l);
		else if (s->avoid[KVT_TIER_DRAM] && !s->avoid[KVT_TIER_NVME] &&
			 s->core->pages.tier[KVT_TIER_NVME])
			write_below(p, l);
	return 0;
}
