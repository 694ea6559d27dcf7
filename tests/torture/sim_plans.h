/* SPDX-License-Identifier: MIT */
#pragma once
/* A client's side of plans: looking at them, carrying them out, saying so; and what it asks about a sequence.
 */
#include "tests/torture/sim_client.h"

static inline uint64_t tables_hash(const struct plan_view *v)
{
	size_t n = (size_t)v->lanes * v->words;
	uint64_t h = v->watermark;

	for (size_t i = 0; i < n; i++)
		h = mix(mix(mix(h ^ v->resident[i]) ^ v->copy_out[i]) ^ v->bring_in[i]);
	return h;
}

static inline void check_plan(const struct mseq *s, const struct plan_view *v)
{
	must(v->watermark <= s->rows, "plan %llu: watermark %u, the sequence has %u rows",
	     (unsigned long long)v->id, v->watermark, s->rows);
	for (uint32_t l = 0; l < v->lanes; l++) {
		uint32_t after = 0, in = 0;

		for (uint32_t w = 0; w < v->words; w++) {
			uint64_t r = s->res[l][w], a = v->resident[(size_t)l * v->words + w],
				 b = v->bring_in[(size_t)l * v->words + w],
				 o = v->copy_out[(size_t)l * v->words + w];

			if (w == v->watermark / 64)
				r &= (UINT64_C(1) << v->watermark % 64) - 1;
			must(!(a & ~(r | b)) && !(b & r) && !(b & ~a) && !(o & ~r),
			     "plan %llu: lane %u, rows %u on, does not fit what is resident",
			     (unsigned long long)v->id, l, w * 64);
			after += (uint32_t)__builtin_popcountll(a);
			in += (uint32_t)__builtin_popcountll(b);
		}
		must(in <= s->stage && after <= s->cap,
		     "plan %llu: lane %u, %u in and %u after, stage %u cap %u", (unsigned long long)v->id, l,
		     in, after, s->stage, s->cap);
	}
}

/* Every row that leaves has a copy below by now, as far as the daemon knows. */
static inline void check_safe(const struct mseq *s, const struct plan_view *v)
{
	const struct seq *d = handle_get(side.core->seqs, s->handle, NULL);

	if (!d || !d->plan || d->plan->over || d->plan->id != v->id || d->misses)
		return; /* with a miss: a copy may have been found damaged since */
	must(d->plan->phase == PHASE_READY && !d->plan->moving, "plan %llu: READY, but rows are on their way",
	     (unsigned long long)v->id);
	for (uint32_t l = 0; l < v->lanes; l++)
		for (uint32_t w = 0; w < v->words; w++) {
			uint64_t out = v->copy_out[(size_t)l * v->words + w],
				 have = index_bits(&d->ix, KVT_TIER_DRAM, l)[w] |
					index_bits(&d->ix, KVT_TIER_NVME, l)[w];

			must(!(out & ~have), "plan %llu: READY, lane %u rows %u on have no copy",
			     (unsigned long long)v->id, l, w * 64);
		}
}

/* 1 a plan that concerns the sequence as it is, 0 none. */
static inline int look(struct mseq *s, struct plan_view *v)
{
	int r = plan_peek(s->area, s->area_bytes, side.shape.lanes, v);

	must(r >= 0, "plan area: tables that do not fit");
	if (r && s->want && v->id >= s->want && v->state != PLAN_DECIDED)
		s->want = 0; /* an answer, if only that it was cancelled */
	if (!r || v->id <= s->acked || v->epoch != s->epoch || v->state == PLAN_CANCELLED)
		return 0;
	if (s->seen != v->id) {
		s->seen = v->id;
		s->seen_hash = tables_hash(v);
		check_plan(s, v);
		record("plan", (uint64_t)(s - side.seq), v->id, v->watermark, s->seen_hash);
	}
	must(tables_hash(v) == s->seen_hash, "plan %llu: its tables changed", (unsigned long long)v->id);
	if (v->state == PLAN_READY)
		check_safe(s, v);
	return 1;
}

/* Is the row there after the plan? */
static inline bool stays(const struct plan_view *v, const struct mseq *s, uint32_t l, uint32_t pos)
{
	return pos < v->watermark ? bits_test(v->resident + (size_t)l * v->words, pos)
				  : bits_test(s->cur[l], pos);
}

static inline void apply_lane(struct mseq *s, const struct plan_view *v, uint32_t l)
{
	const uint64_t *in = v->bring_in + (size_t)l * v->words;
	uint32_t layer = l / side.shape.heads, kb = side.shape.k[layer], vb = side.shape.v[layer];
	uint32_t had = bits_rank(s->cur[l], s->rows), from = 0, staged = s->cap, to = 0;
	static uint8_t room[MAX_ROWS * 2048];
	uint64_t after[ROW_WORDS] = {0};

	for (uint32_t pos = 0; pos < s->rows; pos++) {
		bool is = bits_test(s->cur[l], pos), comes = pos < v->watermark && bits_test(in, pos);
		uint32_t slot = is ? from : staged;

		if (comes)
			check_row(s, l, slot, pos, "staged");
		side.rows_in += comes;
		if (stays(v, s, l, pos)) {
			memcpy(room + (size_t)to * (kb + vb), row_at(s, l, slot, false), kb);
			memcpy(room + (size_t)to * (kb + vb) + kb, row_at(s, l, slot, true), vb);
			bits_set(after, pos);
			to++;
		}
		from += is;
		staged += comes;
	}
	for (uint32_t i = 0; i < to; i++) {
		memcpy(row_at(s, l, i, false), room + (size_t)i * (kb + vb), kb);
		memcpy(row_at(s, l, i, true), room + (size_t)i * (kb + vb) + kb, vb);
	}
	scribble(s, l, to, MAX(to, had));
	scribble(s, l, s->cap, staged);
	memcpy(s->cur[l], after, sizeof(after));
}

static inline void seq_ack(struct mseq *s, uint64_t id, uint64_t nack)
{
	__atomic_store_n(&s->slot->nack[0], nack, __ATOMIC_RELAXED);
	for (uint32_t i = 1; i < ARRAY_SIZE(s->slot->nack); i++)
		__atomic_store_n(&s->slot->nack[i], 0, __ATOMIC_RELAXED);
	atomic_store_explicit(&s->slot->acked, id, memory_order_release);
	memcpy(s->res, s->cur, sizeof(s->res));
	s->acked = id;
	s->applied = 0;
	record("ack", (uint64_t)(s - side.seq), id, nack, 0);
	if (!one_in(8))
		hint(s);
}

/* Look, and apply what is READY; a refusal or a delay now and then unless prompt. */
static inline void seq_follow(struct mseq *s, bool prompt)
{
	uint64_t all = (UINT64_C(1) << side.shape.lanes) - 1, nack = 0;
	struct plan_view v;

	if (s->applied) {
		seq_ack(s, s->applied, s->nacked[0]);
		return;
	}
	if (!look(s, &v))
		return;
	if (v.state == PLAN_DECIDED) {
		if (!prompt && one_in(10))
			seq_ack(s, v.id, all);
		return;
	}
	if (!prompt && one_in(12))
		nack = one_in(3) ? all : chance() & all;
	for (uint32_t l = 0; l < v.lanes; l++) /* the rows since then may leave no room for those that come */
		if (v.lane[l].kept + bits_rank(s->cur[l], s->rows) - bits_rank(s->cur[l], v.watermark) > s->cap)
			bits_set(&nack, l);
	for (uint32_t l = 0; l < v.lanes; l++)
		if (!bits_test(&nack, l))
			apply_lane(s, &v, l);
	side.plans_applied++;
	s->applied = v.id;
	s->nacked[0] = nack;
	record("apply", (uint64_t)(s - side.seq), v.id, nack, 0);
	if (prompt || !one_in(4))
		seq_ack(s, s->applied, nack);
}

/* ---- more calls ------------------------------------------------------------------------------ */

/* Handle the answer of a call about s. True: it went well. */
static inline bool answered(struct mseq *s, int st)
{
	if (st == KVT_E_STALE)
		seq_stale(s);
	return !st;
}

static inline void seq_cut(struct mseq *s, uint32_t rows)
{
	struct wire_seq_truncate_reply *a;
	union message m, r;
	int st;

	if (s->applied)
		seq_ack(s, s->applied, s->nacked[0]);
	wire_init(&m.hdr, W_SEQ_TRUNCATE, sizeof(struct wire_seq_truncate), 0);
	((struct wire_seq_truncate *)&m)->seq = s->handle;
	((struct wire_seq_truncate *)&m)->rows = rows;
	s->busy = true;
	st = call(s->cl, &m, &r, NULL, NULL);
	s->busy = false;
	if (!answered(s, st)) {
		must(st == KVT_E_STALE || st == KVT_E_DAEMON, "truncate: %s", ((struct wire_reply *)&r)->text);
		return;
	}
	a = (struct wire_seq_truncate_reply *)&r;
	must(a->epoch == s->epoch + 1 && a->rows == rows, "truncate to %u: epoch %u rows %u", rows, a->epoch,
	     a->rows);
	s->epoch = a->epoch;
	s->rows = rows;
	s->want = 0;
	era_add(s, s->epoch, rows);
	for (uint32_t l = 0; l < side.shape.lanes; l++) {
		bits_clear_range(s->cur[l], rows, MAX_ROWS);
		bits_clear_range(s->res[l], rows, MAX_ROWS);
		scribble(s, l, bits_rank(s->cur[l], rows), s->cap + s->stage);
	}
	atomic_store_explicit(&s->slot->len, seq_len_pack(s->epoch, s->rows), memory_order_release);
	record("cut", (uint64_t)(s - side.seq), s->epoch, rows, 0);
}

static inline void seq_leave_by_call(struct mseq *s, bool drop)
{
	union message m, r;
	struct mclient *cl = s->cl;
	struct mem g = s->mem;
	int st;

	if (s->applied)
		seq_ack(s, s->applied, s->nacked[0]);
	wire_init(&m.hdr, W_SEQ_CLOSE, sizeof(struct wire_seq_close), 0);
	((struct wire_seq_close *)&m)->seq = s->handle;
	((struct wire_seq_close *)&m)->drop = drop;
	s->busy = true;
	st = call(cl, &m, &r, NULL, NULL);
	s->busy = false;
	must(!st || st == KVT_E_STALE || st == KVT_E_DAEMON, "close: %s", ((struct wire_reply *)&r)->text);
	memset(g.at, 0xdd, g.bytes); /* the daemon looks no more */
	s->mem = (struct mem){0};
	seq_lost(s, drop || st == KVT_E_STALE);
	if (st == KVT_E_DAEMON)
		mem_off(&g);
	else
		region_put(cl, &g);
}

/* A plan with a new budget, or rows back by position. */
static inline void seq_ask(struct mseq *s, bool fetch)
{
	struct wire_plan_request *q;
	uint32_t table[MAX_LANES] = {0};
	union message m, r;
	int st;

	if (fetch && !s->rows)
		return;
	if (fetch) {
		struct wire_fetch *f = (struct wire_fetch *)&m;

		wire_init(&m.hdr, W_FETCH, sizeof(*f), 0);
		f->seq = s->handle;
		f->pos = below(s->rows);
		f->n = between(1, s->rows - f->pos);
	} else {
		struct wire_budget b = {0};

		if (!one_in(3))
			make_budget(&b, table, s);
		q = (struct wire_plan_request *)&m;
		wire_init(&m.hdr, W_PLAN_REQUEST, wire_plan_request_len(b.table_n), 0);
		q->seq = s->handle;
		q->budget = b;
		memcpy(wire_plan_table(q), table, b.table_n * sizeof(*table));
	}
	s->busy = true;
	st = call(s->cl, &m, &r, NULL, NULL);
	s->busy = false;
	if (answered(s, st)) {
		s->want = ((struct wire_plan_reply *)&r)->plan_id;
		s->want_since = world.now;
	} else {
		must(st == KVT_E_STALE || st == KVT_E_BUSY || st == KVT_E_DAEMON, "plan request: %s",
		     ((struct wire_reply *)&r)->text);
	}
}

static inline void seq_info(struct mseq *s)
{
	struct wire_seq_info_reply *a;
	const struct seq *d;
	union message m, r;
	uint64_t sum;
	int st;

	wire_init(&m.hdr, W_SEQ_INFO, sizeof(struct wire_handle), 0);
	((struct wire_handle *)&m)->handle = s->handle;
	s->busy = true;
	st = call(s->cl, &m, &r, NULL, NULL);
	s->busy = false;
	if (!answered(s, st))
		return;
	a = (struct wire_seq_info_reply *)&r;
	must(a->rows == s->rows && a->epoch == s->epoch && a->lanes == side.shape.lanes,
	     "info: %u rows, epoch %u; it has %u, %u", a->rows, a->epoch, s->rows, s->epoch);
	d = handle_get(side.core->seqs, s->handle, NULL);
	if (!d || d->cut != ROWS_ALL)
		return; /* not counted anew yet */
	sum = a->tier_rows[0] + a->tier_rows[1] + a->tier_rows[2] + a->dropped_rows;
	must(sum == (uint64_t)s->rows * side.shape.lanes, "info: rows by tier are %llu, it has %u in %u lanes",
	     (unsigned long long)sum, s->rows, side.shape.lanes);
}
