/* SPDX-License-Identifier: MIT */
/* From a snapshot to a plan: budgets, granularity and the lanes; place() does the waterfall. */
#include <errno.h>
#include <string.h>
#include "policy/decide.h"
#include "policy/limits.h"
#include "policy/merge.h"
#include "policy/place.h"
#include "shm/bits.h"
#include "shm/util.h"

int decide_check(const struct decide_in *in)
{
	if (in->lanes < 1 || in->lanes > DECIDE_MAX_LANES || in->watermark > DECIDE_MAX_ROWS)
		return -EINVAL;
	if (in->words < BITS_WORDS(in->watermark) || in->score_stride < in->watermark)
		return -EINVAL;
	if (in->granularity > DECIDE_BLOCK || (in->granularity == DECIDE_BLOCK && in->block_rows < 1))
		return -EINVAL;
	if (in->equal_lanes > 1 || in->write_through > 1 || in->hysteresis_permille > 1000)
		return -EINVAL;
	if (!in->scores || !in->on_device || !in->on_dram || !in->on_nvme)
		return -EINVAL;
	for (int t = 0; t < DECIDE_TIERS; t++)
		if (!in->budget[t])
			return -EINVAL;
	return 0;
}

static int check_out(const struct decide_in *in, const struct decide_out *out)
{
	if (out->words != BITS_WORDS(in->watermark))
		return -EINVAL;
	if (!out->resident || !out->copy_out || !out->bring_in || !out->to_dram || !out->to_nvme || !out->drop)
		return -EINVAL;
	if (!out->kept || !out->out || !out->in || !out->dropped)
		return -EINVAL;
	return 0;
}

/* Classes in rows; what is in several is in the best one. */
static void row_classes(const struct decide_in *in, uint64_t *const cls[CLASSES])
{
	uint32_t wm = in->watermark, words = (uint32_t)BITS_WORDS(wm);
	const uint64_t *marks[2] = {in->pinned, in->wanted};

	bits_set_range(cls[CLASS_FIRST], 0, MIN(in->protect_first, wm));
	bits_set_range(cls[CLASS_RECENT], wm - MIN(in->protect_last, wm), wm);
	for (int i = 0; i < 2; i++) {
		if (!marks[i])
			continue;
		memcpy(cls[CLASS_PINNED + i], marks[i], words * sizeof(uint64_t));
		if (wm % 64)
			cls[CLASS_PINNED + i][words - 1] &= (UINT64_C(1) << (wm % 64)) - 1;
	}
}

/* Rows [0, watermark) of one lane that exist somewhere, and those that only nvme has below the device. */
static void lane_alive(const struct decide_in *in, uint32_t lane, uint64_t *alive, uint64_t *nvme_only)
{
	const size_t at = (size_t)lane * in->words;
	uint32_t words = (uint32_t)BITS_WORDS(in->watermark);

	for (uint32_t w = 0; w < words; w++) {
		alive[w] = in->on_device[at + w] | in->on_dram[at + w] | in->on_nvme[at + w];
		nvme_only[w] = in->on_nvme[at + w] & ~in->on_dram[at + w];
	}
	if (in->watermark % 64) {
		uint64_t tail = (UINT64_C(1) << (in->watermark % 64)) - 1;

		alive[words - 1] &= tail;
		nvme_only[words - 1] &= tail;
	}
}

/* From where a lane's rows go (disjoint bitmaps) to what the plan says about it. */
static void emit_lane(const struct decide_in *in, const struct decide_out *out, uint32_t lane,
		      const uint64_t *alive, const struct place_units *u, const struct select_kern *kern)
{
	const size_t from = (size_t)lane * in->words, to = (size_t)lane * out->words;

	for (uint32_t w = 0; w < out->words; w++) {
		uint64_t dev = in->on_device[from + w] & alive[w];
		uint64_t copies = in->on_dram[from + w] | in->on_nvme[from + w];
		uint64_t keep = u->to_device[w], dram = u->to_dram[w], nvme = u->to_nvme[w];

		out->resident[to + w] = keep;
		out->to_dram[to + w] = dram;
		out->to_nvme[to + w] = nvme;
		out->copy_out[to + w] = dev & (dram | nvme) & ~copies;
		out->bring_in[to + w] = keep & ~dev;
		out->drop[to + w] = alive[w] & ~(keep | dram | nvme);
	}
	out->kept[lane] = kern->count(out->resident + to, out->words);
	out->out[lane] = kern->count(out->copy_out + to, out->words);
	out->in[lane] = kern->count(out->bring_in + to, out->words);
	out->dropped[lane] = kern->count(out->drop + to, out->words);
}

/* Rows that stay on the device get copies below, where there is room. w: of rows, with their classes. */
static void write_through(const struct decide_in *in, const struct decide_out *out, uint32_t lane,
			  const struct place_work *w)
{
	const size_t from = (size_t)lane * in->words, to = (size_t)lane * out->words;
	uint64_t *bare = w->tmp[0], *used = w->tmp[1], *best[] = {w->cut[0], w->cut[1]};
	uint64_t room[2];
	uint32_t k[2];

	for (int t = 0; t < 2; t++) {
		const uint64_t *on = (t ? in->on_nvme : in->on_dram) + from,
			       *goes = (t ? out->to_nvme : out->to_dram) + to;
		uint32_t budget = in->budget[1 + t][lane], n;

		for (uint32_t i = 0; i < out->words; i++)
			used[i] = goes[i] | (out->resident[to + i] & on[i]);
		n = w->select.kern->count(used, out->words);
		room[t] = budget > n ? budget - n : 0;
	}
	for (uint32_t i = 0; i < out->words; i++)
		bare[i] = out->resident[to + i] & in->on_device[from + i] &
			  ~(in->on_dram[from + i] | in->on_nvme[from + i]);
	k[0] = (uint32_t)MIN(room[0], in->watermark);
	k[1] = (uint32_t)MIN(room[0] + room[1], in->watermark);
	place_top(w, in->scores + (size_t)lane * in->score_stride, bare, k, 2, best);
	for (uint32_t i = 0; i < out->words; i++) {
		out->to_dram[to + i] |= best[0][i];
		out->copy_out[to + i] |= best[1][i];
	}
	out->out[lane] += w->select.kern->count(best[1], out->words);
}

/* Row bitmaps that a lane's turn needs: alive, nvme_only and the three results. */
struct lane_maps {
	uint64_t *map[5];
	void *memory;
};

static int lane_maps_init(struct lane_maps *m, uint32_t words)
{
	uint64_t *at = calloc((size_t)words * ARRAY_SIZE(m->map) + 1, sizeof(*at));

	if (!at)
		return -ENOMEM;
	m->memory = at;
	for (size_t i = 0; i < ARRAY_SIZE(m->map); i++)
		m->map[i] = at + i * words;
	return 0;
}

/* Rows each lane keeps on the device when all must keep as many: what the poorest lane can. */
static uint32_t equal_keep(const struct decide_in *in, const struct lane_maps *m,
			   const struct select_kern *kern)
{
	uint32_t keep = UINT32_MAX;

	for (uint32_t l = 0; l < in->lanes; l++) {
		lane_alive(in, l, m->map[0], m->map[1]);
		keep = MIN(keep, kern->count(m->map[0], (uint32_t)BITS_WORDS(in->watermark)));
		keep = MIN(keep, in->budget[0][l]);
	}
	return keep;
}

static int decide_heads(const struct decide_in *in, struct decide_out *out, struct lane_maps *m)
{
	struct place_units u = {.alive = m->map[0], .nvme_only = m->map[1]};
	uint32_t equal = UINT32_MAX;
	struct place_work w;

	if (place_work_init(&w, in->watermark, in->hysteresis_permille) < 0)
		return -ENOMEM;
	row_classes(in, w.cls);
	place_work_classes(&w);
	if (in->equal_lanes)
		equal = equal_keep(in, m, w.select.kern);
	u.to_device = m->map[2];
	u.to_dram = m->map[3];
	u.to_nvme = m->map[4];
	for (uint32_t l = 0; l < in->lanes; l++) {
		uint32_t keep = MIN(in->budget[0][l], equal);

		lane_alive(in, l, m->map[0], m->map[1]);
		keep = MIN(keep, w.select.kern->count(u.alive, w.words));
		u.keys = in->scores + (size_t)l * in->score_stride;
		u.device = in->on_device + (size_t)l * in->words;
		place(&w, &u, keep, in->budget[1][l], in->budget[2][l]);
		emit_lane(in, out, l, u.alive, &u, w.select.kern);
		if (in->write_through)
			write_through(in, out, l, &w);
	}
	place_work_done(&w);
	return 0;
}

/* A tier's budget in blocks: the poorest lane's. A partial last block takes a whole one, as an allocator's
 * would. */
static uint32_t block_budget(const struct decide_in *in, int tier, uint32_t block_rows)
{
	uint32_t rows = UINT32_MAX;

	for (uint32_t l = 0; l < in->lanes; l++)
		rows = MIN(rows, in->budget[tier][l]);
	return rows >= in->watermark ? UINT32_MAX : rows / block_rows;
}

/* Protected blocks: those with a protected row, and the partial last one. */
static int block_classes(const struct decide_in *in, const struct merged *mg, uint64_t *const cls[CLASSES])
{
	uint32_t words = (uint32_t)BITS_WORDS(in->watermark);
	_cleanup_free_ uint64_t *rows = calloc((size_t)words * CLASS_REST + 1, sizeof(*rows));
	uint64_t *of[CLASSES] = {0};

	if (!rows)
		return -ENOMEM;
	for (int c = 0; c < CLASS_REST; c++)
		of[c] = rows + (size_t)c * words;
	row_classes(in, of);
	for (int c = 0; c < CLASS_REST; c++)
		merge_rows(cls[c], of[c], in->watermark, mg->block_rows);
	if (in->watermark % mg->block_rows)
		bits_set(cls[CLASS_RECENT], mg->blocks - 1);
	return 0;
}

static int decide_blocks(const struct decide_in *in, struct decide_out *out, struct lane_maps *m,
			 const struct merged *mg, struct place_work *w)
{
	struct place_units rows = {.to_device = m->map[2], .to_dram = m->map[3], .to_nvme = m->map[4]};
	struct place_units u = {.keys = mg->keys, .alive = mg->alive, .device = mg->device};
	uint32_t words = (uint32_t)BITS_WORDS(mg->blocks), keep = block_budget(in, 0, mg->block_rows);
	struct lane_maps to; /* three of its five bitmaps: the result in blocks */

	if (block_classes(in, mg, w->cls) < 0 || lane_maps_init(&to, words) < 0)
		return -ENOMEM;
	place_work_classes(w);
	u.nvme_only = mg->nvme_only;
	u.to_device = to.map[0];
	u.to_dram = to.map[1];
	u.to_nvme = to.map[2];
	keep = MIN(keep, w->select.kern->count(mg->alive, words));
	place(w, &u, keep, block_budget(in, 1, mg->block_rows), block_budget(in, 2, mg->block_rows));
	for (int i = 0; i < 3; i++)
		expand_blocks(m->map[2 + i], to.map[i], in->watermark, mg->block_rows);
	for (uint32_t l = 0; l < in->lanes; l++) {
		lane_alive(in, l, m->map[0], m->map[1]);
		emit_lane(in, out, l, m->map[0], &rows, w->select.kern);
	}
	free(to.memory);
	return 0;
}

/* Copies are made row by row, in each lane's own order, whatever the plan moves. */
static int write_lanes_through(const struct decide_in *in, const struct decide_out *out)
{
	struct place_work w;

	if (place_work_init(&w, in->watermark, 0) < 0)
		return -ENOMEM;
	row_classes(in, w.cls);
	place_work_classes(&w);
	for (uint32_t l = 0; l < in->lanes; l++)
		write_through(in, out, l, &w);
	place_work_done(&w);
	return 0;
}

static int decide_merged(const struct decide_in *in, struct decide_out *out, struct lane_maps *m)
{
	struct place_work w = {0};
	struct merged mg;
	int r;

	r = merge_lanes(&mg, in);
	if (r < 0)
		return r;
	r = place_work_init(&w, mg.blocks, in->hysteresis_permille);
	if (r == 0)
		r = decide_blocks(in, out, m, &mg, &w);
	place_work_done(&w);
	merged_done(&mg);
	if (r == 0 && in->write_through)
		r = write_lanes_through(in, out);
	return r;
}

int policy_decide(const struct decide_in *in, struct decide_out *out)
{
	struct lane_maps m;
	int r;

	if (decide_check(in) < 0 || check_out(in, out) < 0)
		return -EINVAL;
	if (lane_maps_init(&m, out->words) < 0)
		return -ENOMEM;
	r = in->granularity == DECIDE_HEAD ? decide_heads(in, out, &m) : decide_merged(in, out, &m);
	free(m.memory);
	return r;
}
