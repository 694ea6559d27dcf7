/* SPDX-License-Identifier: MIT */
/*
 * Rows of all pages in order of position, which pages interleave: a bitmap over positions and, per word of it,
 * the rows before. Scores lie by rank, so that what lies around a row lies around its score.
 */
#include <math.h>
#include <string.h>
#include "policy/recall_kern.h"
#include "shm/util.h"

#define FAR (1u << 28) /* positions are below */

static uint32_t ones(uint64_t v)
{
	return (uint32_t)__builtin_popcountll(v);
}

/* ---- words over any position ------------------------------------------------------------ */

static void word_or(uint64_t *bits, uint32_t pos, uint64_t v)
{
	uint32_t w = pos / 64, s = pos % 64;

	bits[w] |= v << s;
	if (s)
		bits[w + 1] |= v >> (64 - s);
}

static uint64_t word_at(const uint64_t *bits, uint32_t pos)
{
	uint32_t w = pos / 64, s = pos % 64;

	return s ? bits[w] >> s | bits[w + 1] << (64 - s) : bits[w];
}

uint32_t near_words(const struct recall_run *runs, uint32_t n_runs)
{
	uint32_t end = 0;

	for (uint32_t i = 0; i < n_runs; i++)
		end = MAX(end, MIN(runs[i].first, FAR) + runs[i].span * 64u);
	return DIV_UP(end, 64) + 1;
}

bool near_fits(const struct recall_run *run)
{
	uint32_t rows = 0;

	for (uint32_t w = 0; w < run->span; w++)
		rows += ones(run->pos[w]);
	return rows == run->rows && run->first < FAR;
}

/* ---- where rows are --------------------------------------------------------------------- */

uint32_t near_live(const struct recall_run *run, uint32_t group)
{
	return run->alive[group] & recall_good(run->sum)[group];
}

/* The packed rows' bits v where `pos` has its bits. */
static uint64_t deposit(uint64_t v, uint64_t pos)
{
	uint32_t n = ones(pos);
	uint64_t d = 0;

	if (n < 64)
		v &= (UINT64_C(1) << n) - 1;
	if (ones(v) == n)
		return pos;
	for (; v; v >>= 1, pos &= pos - 1)
		if (v & 1)
			d |= pos & -pos;
	return d;
}

void near_mark(struct recall_near *m, const struct recall_run *runs, uint32_t n_runs)
{
	memset(m->lane, 0, m->words * sizeof(*m->lane));
	for (uint32_t i = 0; i < n_runs; i++) {
		const struct recall_run *run = &runs[i];
		uint64_t live[RECALL_RUN / 64 + 1] = {0};
		uint32_t row = 0;

		for (uint32_t g = 0; g < run->sum->groups; g++)
			live[g / 2] |= (uint64_t)near_live(run, g) << g % 2 * 32;
		for (uint32_t w = 0; w < run->span; row += ones(run->pos[w++]))
			if (run->pos[w])
				word_or(m->lane, run->first + w * 64, deposit(word_at(live, row), run->pos[w]));
	}
	m->n = 0;
	for (uint32_t w = 0; w < m->words; w++) {
		m->rank[w] = m->n;
		m->n += ones(m->lane[w]);
	}
}

static uint32_t rank_of(const struct recall_near *m, uint32_t pos)
{
	return m->rank[pos / 64] + ones(m->lane[pos / 64] & ((UINT64_C(1) << pos % 64) - 1));
}

/* ---- scores ------------------------------------------------------------------------------ */

void near_clear(struct recall_near *m)
{
	for (uint32_t i = 0; i < m->n + m->before + m->after; i++)
		m->score[i] = -INFINITY;
}

void near_put(struct recall_near *m, const struct recall_run *run, uint32_t group, const float *score)
{
	uint32_t live = near_live(run, group), row = group * RECALL_GROUP, w = 0;
	float *to = m->score + m->after;
	uint64_t b;

	for (; row >= ones(run->pos[w]); w++)
		row -= ones(run->pos[w]);
	for (b = run->pos[w]; row; row--)
		b &= b - 1;
	for (; live; live >>= 1, b &= b - 1) {
		while (!b)
			b = run->pos[++w];
		if (live & 1) {
			uint32_t at = rank_of(m, run->first + w * 64 + (uint32_t)__builtin_ctzll(b));

			to[at] = MAX(to[at], *score);
			score++;
		}
	}
}

void near_spread(struct recall_near *m, const struct recall_kern *kern)
{
	size_t window = (size_t)m->before + m->after + 1, all = m->n + window - 1, have = 1;

	/* score[i] is the largest of the `have` from i on; the window over row i begins at i, `after` rows
	 * before it */
	for (; 2 * have <= window; have *= 2)
		if (all + 1 > 2 * have)
			kern->pair(m->score, all + 1 - 2 * have, have);
	if (have < window)
		kern->pair(m->score, m->n, window - have);
}

/* ---- the best ------------------------------------------------------------------------------ */

/* The bits of the rows of these ranks, ascending. */
static void mark_best(struct recall_near *m, const uint32_t *best, uint32_t n)
{
	uint32_t w = 0, rank = 0;
	uint64_t left = m->lane[0];

	memset(m->take, 0, m->words * sizeof(*m->take));
	for (uint32_t i = 0; i < n; i++) {
		while (rank + ones(left) <= best[i]) {
			rank += ones(left);
			left = m->lane[++w];
		}
		for (; rank < best[i]; rank++)
			left &= left - 1;
		m->take[w] |= left & -left;
	}
}

int near_best(struct recall_near *m, const struct recall_kern *kern, const struct recall_run *runs,
	      uint32_t n_runs, uint32_t want, uint32_t *best, struct recall_hit *hits)
{
	uint32_t n = recall_top(kern, m->score, m->n, MIN(want, m->n), best), out = 0;

	mark_best(m, best, n);
	for (uint32_t i = 0; i < n_runs && out < n; i++) {
		const struct recall_run *run = &runs[i];

		for (uint32_t w = 0, row = 0; w < run->span; row += ones(run->pos[w++])) {
			uint32_t pos = run->first + w * 64;
			uint64_t b = run->pos[w] ? run->pos[w] & word_at(m->take, pos) : 0;

			for (; b; b &= b - 1) {
				uint32_t r = row + ones(run->pos[w] & ((b & -b) - 1));
				uint32_t at = pos + (uint32_t)__builtin_ctzll(b);

				if (!(near_live(run, r / 32) >> r % 32 & 1))
					continue; /* another page serves it */
				hits[out++] = (struct recall_hit){
					.run = i, .row = r, .pos = at, .score = m->score[rank_of(m, at)]};
				m->take[at / 64] &= ~(UINT64_C(1) << at % 64);
			}
		}
	}
	return (int)out;
}
