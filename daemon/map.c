/* SPDX-License-Identifier: MIT */
/*
 * The map of a sequence: for each lane which tiers hold each row, as runs, and what rows are worth, summed up
 * in columns. A sequence may have millions of rows in a hundred lanes, so an answer ends where a slice of the
 * loop does, by work counted: the clock would let a slice on a busy machine do almost nothing, and one on a
 * machine that sleeps in between anything. Nothing is changed; scores are not read while a worker writes keys.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "daemon/internal.h"
#include "daemon/json_text.h"
#include "policy/decide.h"
#include "shm/util.h"

#define BLOCK_WORDS 4u /* looked at at once: 256 rows of a lane */
#define BLOCK_ROWS (BLOCK_WORDS * 64u)
/* Work in units of about 5 ns. Of a slice, then of its parts: 0.2 ms where caches are cold. */
#define SLICE_WORK 40000u
#define WORK_LANE 120u /* what is written around its runs */
#define WORK_WORD 1u   /* 64 rows */
#define WORK_PAGE 16u  /* a page that may be on its way */
#define WORK_RUN 5u
#define WORK_SCORES 160u  /* of 64 rows */
#define WORK_COLUMN 200u /* four numbers as text */

struct column {
	uint32_t rows;
	float min, max;
	double sum;
};

struct mapper {
	const struct seq *s;
	struct json_text *o;
	uint32_t rows, columns;
	uint32_t work;
	/* of the lane */
	const uint64_t *on[KVT_TIERS], *out, *in; /* out, in: of the plan that is being carried out, or NULL */
	uint32_t lane, planned;                   /* words of out and in */
	uint32_t run;
	int code; /* of the run, -1: none yet */
	/* of the block */
	uint64_t moving[BLOCK_WORDS], alive[BLOCK_WORDS];
	uint32_t first, last; /* columns that were touched, last excluded */
	struct column *col;   /* [columns] */
};

/* ---- tiers ------------------------------------------------------------------------------ */

static void end_run(struct mapper *m)
{
	if (!m->run)
		return;
	json_text_num(m->o, NULL, m->run);
	json_text_num(m->o, NULL, (uint64_t)m->code);
	m->run = 0;
	m->work += WORK_RUN;
}

static void add_run(struct mapper *m, int code, uint32_t n)
{
	if (code != m->code)
		end_run(m);
	m->code = code;
	m->run += n;
}

/* Rows of this sequence in pages that are being rewritten, positions [from, from + BLOCK_ROWS). */
static void find_moving(struct mapper *m, uint32_t from)
{
	const struct index *ix = &m->s->ix;
	const struct lane_pages *lp = &ix->lane[m->lane];
	uint32_t reach = PAGE_SPAN * 64;

	memset(m->moving, 0, sizeof(m->moving));
	if (!m->s->repacks)
		return;
	for (uint32_t i = index_from(lp, from > reach ? from - reach : 0); i < lp->n; i++) {
		const struct page *p = lp->v[i];
		uint32_t limit = index_limit(ix, p->epoch);

		m->work += WORK_PAGE;
		if (p->first >= from + BLOCK_ROWS)
			break;
		if (!p->moving)
			continue;
		bits_for_each(b, p->pos, p->span * 64u) {
			uint32_t pos = p->first + b;

			if (pos >= from && pos - from < BLOCK_ROWS && pos < limit)
				bits_set(m->moving, pos - from);
		}
		m->work += WORK_PAGE;
	}
}

/* Rows of word w that are in the tier; those past the index are on the device. */
static uint64_t tier_word(const struct mapper *m, int tier, uint32_t w)
{
	uint32_t rows = m->s->ix.rows;
	uint64_t v = w < BITS_WORDS(rows) ? m->on[tier][w] : 0;

	if (tier == KVT_TIER_DEVICE && w >= rows / 64)
		v |= w == rows / 64 ? ~UINT64_C(0) << rows % 64 : ~UINT64_C(0);
	return v;
}

static void map_word(struct mapper *m, uint32_t w, uint32_t i, uint32_t n)
{
	uint64_t v[4], turns = 0;

	for (int t = 0; t < KVT_TIERS; t++)
		v[t] = tier_word(m, t, w);
	m->alive[i] = v[0] | v[1] | v[2];
	v[3] = m->moving[i];
	if (m->out && w < m->planned)
		v[3] |= m->out[w] | m->in[w];
	v[3] &= m->alive[i];
	for (int k = 0; k < 4; k++) /* where a row differs from the one before it; the first always counts */
		turns |= v[k] ^ v[k] << 1;
	turns |= 1;
	for (uint32_t at = 0, next; at < n; at = next) {
		int code = 0;

		next = MIN(bits_next(&turns, at + 1, 64), n);
		for (int k = 0; k < 4; k++)
			code |= (int)(v[k] >> at & 1) << k;
		add_run(m, code, next - at);
	}
	m->work += WORK_WORD;
}

/* ---- scores ------------------------------------------------------------------------------- */

/* Scores of positions [from, from + n), not finite where a row has none. */
static void scores_of(const struct mapper *m, uint32_t from, uint32_t n, float *ret)
{
	const struct seq *s = m->s;
	const struct policy_use *use = s->keys_use;
	size_t at = (size_t)m->lane * s->ix.cap + from;
	float second[BLOCK_ROWS];

	key_scores(s->ix.key + at, ret, n);
	if (use && use->coefs) {
		struct policy_batch b = {
			.lane = policy_lane(s->model, m->lane), .n = n, .first_pos = from, .total = s->ix.rows};

		if (s->ix.coef)
			key_scores(s->ix.coef + at, second, n);
		if (use->ops->combine(use->policy, &b, (const float *const[]){ret, second}, ret) < 0)
			memset(ret, 0xff, n * sizeof(*ret));
	}
	for (uint32_t i = 0; i < n; i++)
		if (!s->ix.key[at + i] || !(fabsf(ret[i]) < 1e38f))
			ret[i] = NAN;
}

static uint32_t column_of(const struct mapper *m, uint32_t pos)
{
	return (uint32_t)((uint64_t)pos * m->columns / m->rows);
}

static void sum_scores(struct mapper *m, uint32_t from, uint32_t n)
{
	float score[BLOCK_ROWS];
	uint32_t c = column_of(m, from), end = 0;

	n = from < m->s->ix.rows ? MIN(n, m->s->ix.rows - from) : 0;
	if (!n)
		return;
	scores_of(m, from, n, score);
	for (uint32_t i = 0; i < n; i++) {
		float v = score[i];

		if (from + i >= end) {
			c = column_of(m, from + i);
			end = (uint32_t)(((uint64_t)(c + 1) * m->rows + m->columns - 1) / m->columns);
			for (m->last = MAX(m->last, m->first); m->last <= c; m->last++)
				m->col[m->last] = (struct column){.min = INFINITY, .max = -INFINITY};
		}
		if (isnan(v) || !bits_test(m->alive, i))
			continue;
		m->col[c].rows++;
		m->col[c].sum += (double)v;
		m->col[c].min = fminf(m->col[c].min, v);
		m->col[c].max = fmaxf(m->col[c].max, v);
	}
	m->work += WORK_SCORES * (uint32_t)BITS_WORDS(n);
}

static void put_columns(struct mapper *m)
{
	json_text_num(m->o, "column", m->first);
	json_text_open(m->o, "scores", '[');
	for (uint32_t i = m->first; i < m->last; i++) {
		const struct column *c = &m->col[i];

		json_text_num(m->o, NULL, c->rows);
		json_text_real(m->o, NULL, (double)c->min);
		json_text_real(m->o, NULL, (double)c->max);
		json_text_real(m->o, NULL, c->rows ? c->sum / c->rows : NAN);
	}
	json_text_close(m->o, ']');
}

/* ---- lanes ---------------------------------------------------------------------------------- */

static void begin_lane(struct mapper *m, uint32_t lane)
{
	const struct seq *s = m->s;
	const struct plan *p = s->plan;
	bool carried = p && !p->over && p->phase >= PHASE_MOVE && !p->private_tables;

	m->lane = lane;
	for (int t = 0; t < KVT_TIERS; t++)
		m->on[t] = s->ix.rows ? index_bits(&s->ix, t, lane) : NULL;
	m->planned = carried ? p->t.words : 0;
	m->out = carried ? p->t.copy_out + (size_t)lane * p->t.words : NULL;
	m->in = carried ? p->t.bring_in + (size_t)lane * p->t.words : NULL;
	m->run = 0;
	m->code = -1;
}

/* Positions of the lane from pos on, as far as the slice goes; returns where it ended. */
static uint32_t map_lane(struct mapper *m, uint32_t lane, uint32_t pos)
{
	const struct seq *s = m->s;
	uint32_t budget[KVT_TIERS];

	begin_lane(m, lane);
	json_text_open(m->o, NULL, '{');
	json_text_num(m->o, "lane", lane);
	if (s->model) {
		json_text_num(m->o, "layer", s->model->lane_layer[lane]);
		json_text_num(m->o, "head", s->model->lane_head[lane]);
	}
	seq_budgets(s, lane, budget);
	json_text_budget(m->o, "budget", budget);
	json_text_num(m->o, "from", pos);
	json_text_open(m->o, "runs", '[');
	m->first = m->last = m->columns && m->rows ? column_of(m, MIN(pos, m->rows - 1)) : 0;
	while (pos < m->rows && m->work < SLICE_WORK) {
		uint32_t n = MIN(BLOCK_ROWS, m->rows - pos), before = m->last;

		find_moving(m, pos);
		for (uint32_t i = 0; i < BITS_WORDS(n); i++)
			map_word(m, pos / 64 + i, i, MIN(64u, n - i * 64));
		if (m->columns)
			sum_scores(m, pos, n);
		m->work += (m->last - before) * WORK_COLUMN;
		pos += n;
	}
	end_run(m);
	json_text_close(m->o, ']');
	if (m->columns)
		put_columns(m);
	json_text_close(m->o, '}');
	m->work += WORK_LANE;
	return pos;
}

static int check(const struct seq *s, const struct core_map_ask *ask, char *err, size_t errsize)
{
	if (ask->lane >= s->ix.lanes) {
		snprintf(err, errsize, "LANE: %u, the sequence has %u lanes", ask->lane, s->ix.lanes);
		return KVT_E_INVAL;
	}
	if (ask->rows && (ask->epoch != s->epoch || ask->rows > s->rows)) {
		snprintf(err, errsize, "the sequence was cut since the map was begun: begin again");
		return KVT_E_STALE;
	}
	if (ask->pos % BLOCK_ROWS || (ask->pos && ask->pos >= ask->rows)) {
		snprintf(err, errsize, "FROM: position %u, must be what an answer named as next", ask->pos);
		return KVT_E_INVAL;
	}
	if (s->cut != ROWS_ALL || (ask->columns && plan_lent(s) && s->plan->phase <= PHASE_DECIDE)) {
		snprintf(err, errsize, "a plan is being made, its scores are not final: ask again");
		return KVT_E_BUSY;
	}
	return 0;
}

int core_seq_map(struct core *c, uint64_t handle, const struct core_map_ask *ask, struct json_text *o,
		 char *err, size_t errsize)
{
	const struct seq *s = handle_get(c->seqs, handle, NULL);
	_cleanup_free_ struct column *col = NULL;
	struct mapper m = {.s = s, .o = o, .columns = ask->columns};
	uint32_t lane = ask->lane, pos = ask->pos, last, n;
	char text[48];
	int r;

	if (!s)
		return KVT_E_STALE;
	r = check(s, ask, err, errsize);
	if (r)
		return r;
	m.rows = ask->rows ?: s->rows;
	col = malloc(ask->columns * sizeof(*col) + 1);
	if (!col) {
		snprintf(err, errsize, "out of memory");
		return KVT_E_NOMEM;
	}
	m.col = col;
	last = MIN(s->ix.lanes, lane + MIN(ask->lanes, s->ix.lanes));
	n = journal_count(s->journal);
	json_text_open(o, NULL, '{');
	snprintf(text, sizeof(text), "0x%llx", (unsigned long long)handle);
	json_text_str(o, "handle", text);
	json_text_num(o, "rows", m.rows);
	json_text_num(o, "epoch", s->epoch);
	json_text_num(o, "lanes", s->ix.lanes);
	json_text_num(o, "watermark", n ? journal_at(s->journal, n - 1)->watermark : 0);
	json_text_num(o, "plans", s->plans);
	json_text_str(o, "policy", s->ops ? s->ops->name : "-");
	json_text_num(o, "columns", m.columns);
	json_text_open(o, "lane", '[');
	while (lane < last && m.work < SLICE_WORK) {
		pos = map_lane(&m, lane, pos);
		if (pos < m.rows)
			break;
		lane++;
		pos = 0;
	}
	json_text_close(o, ']');
	snprintf(text, sizeof(text), "%u.%u.%u.%u", lane, pos, m.rows, s->epoch);
	if (lane < last && m.rows)
		json_text_str(o, "next", text);
	else
		json_text_null(o, "next");
	json_text_close(o, '}');
	return 0;
}
