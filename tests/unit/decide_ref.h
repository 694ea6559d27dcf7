/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Random snapshots and a slow, obvious decision: sort everything and walk. For
 * one test program; all state is static.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "policy/decide.h"
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
	in->write_through = rnd(3) == 0;
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

/* Where rows that stay get a copy: DRAM, NVME; DEAD: nowhere. After want[l] is known. */
static enum where_to through[MAX_LANES][MAX_ROWS];

static void ref_through(const struct decide_in *in, uint32_t l)
{
	static struct unit rows[MAX_ROWS], *order[MAX_ROWS];
	int64_t room[2] = {in->budget[1][l], in->budget[2][l]};
	uint32_t n = 0;

	memset(through[l], 0, sizeof(through[l]));
	for (uint32_t p = 0; p < in->watermark && in->write_through; p++) {
		bool stays = want[l][p] == DEVICE, dram = has(in, 1, l, p), nvme = has(in, 2, l, p);

		room[0] -= want[l][p] == DRAM || (stays && dram);
		room[1] -= want[l][p] == NVME || (stays && nvme);
		rows[p] = (struct unit){.index = p, .key = MAX(scores[l][p], 1), .cls = class_of(in, p)};
		if (stays && has(in, 0, l, p) && !dram && !nvme)
			order[n++] = &rows[p];
	}
	qsort(order, n, sizeof(*order), by_rank);
	for (uint32_t i = 0; i < n; i++)
		for (int t = 0; t < 2; t++)
			if (room[t] > 0) {
				room[t]--;
				through[l][order[i]->index] = t ? NVME : DRAM;
				break;
			}
}

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
