/* SPDX-License-Identifier: MIT */
/* Asking for plans, seeing them, acknowledging them. */
#include <string.h>
#include "ipc/client/client.h"
#include "ipc/cuda/cuda.h"
#include "shm/trial.h"

#define SPIN_NS 20000u

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* The visible plan when it concerns this sequence as it is now: 1, 0, KVT_E_PROTO. */
static int look(struct kvtier_seq *s, struct plan_view *v)
{
	int r = plan_peek(s->plan_area, s->plan_bytes, s->lanes, v);

	if (r < 0)
		return err_set(KVT_E_PROTO, "plan: its tables do not fit its area");
	return r && v->lanes == s->lanes && v->id > atomic_load_explicit(&s->acked, memory_order_relaxed) &&
	       v->epoch == atomic_load_explicit(&s->epoch, memory_order_relaxed);
}

static int give(struct kvtier_seq *s, const struct plan_view *v, struct kvtier_plan *ret)
{
	struct kvtier_plan p = {.id = v->id,
				.state = v->state,
				.epoch = v->epoch,
				.watermark = v->watermark,
				.lanes = v->lanes,
				.words = v->words,
				.flags = v->flags,
				.decided_ns = v->decided_ns,
				.rows_out = v->rows_out,
				.rows_in = v->rows_in,
				.rows_drop = v->rows_drop,
				.resident_after = v->resident,
				.copy_out = v->copy_out,
				.bring_in = v->bring_in};
	int r = opts_give(ret, &p, sizeof(p), "plan");

	if (!r && atomic_exchange_explicit(&s->seen, v->id, memory_order_relaxed) != v->id)
		atomic_fetch_add_explicit(&s->c->count.plans_seen, 1, memory_order_relaxed);
	return r ? r : 1;
}

int kvtier_plan_peek(struct kvtier_seq *s, struct kvtier_plan *ret)
{
	struct plan_view v;
	int r;

	if (!s || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", s ? "ret" : "s");
	r = seq_gate(s);
	if (r)
		return r;
	r = look(s, &v);
	if (r <= 0 || v.state == PLAN_CANCELLED)
		return MIN(r, 0);
	return give(s, &v, ret);
}

int plan_current(struct kvtier_seq *s, uint64_t id, struct plan_view *ret)
{
	int r = seq_gate(s);

	if (!r)
		r = look(s, ret);
	if (r < 0)
		return r;
	if (!r || ret->id != id || ret->state == PLAN_CANCELLED)
		return err_set(KVT_E_STALE, "plan %llu: not the current plan", (unsigned long long)id);
	if (ret->watermark > s->rows)
		return err_set(KVT_E_PROTO, "plan %llu: watermark %u, must be at most %u rows",
			       (unsigned long long)id, ret->watermark, s->rows);
	if (ret->state != PLAN_READY)
		return err_set(KVT_E_BUSY, "plan %llu: not ready yet", (unsigned long long)id);
	return 0;
}

/* ---- waiting --------------------------------------------------------------------------- */

/* 0, or why the daemon will not make the awaited plan. */
static int given_up(const struct kvtier_seq *s, uint64_t min_id)
{
	uint32_t why = 0;
	uint64_t id = plan_given_up(s->plan_area, s->plan_bytes, &why);

	if (!min_id || id < min_id)
		return 0;
	return err_set(why <= (uint32_t)-KVT_E_INVAL || why > (uint32_t)-KVT_E_GPU ? KVT_E_IO : -(int)why,
		       "plan %llu: given up by kvtierd", (unsigned long long)min_id);
}

/* 1 when the awaited plan is there, 0, or an error that ends the wait. */
static int arrived(struct kvtier_seq *s, uint64_t min_id, uint32_t state, struct plan_view *v)
{
	int r = seq_gate(s);

	if (r)
		return r;
	r = look(s, v);
	if (r <= 0)
		return r ? r : given_up(s, min_id);
	/* One plan at a time: the awaited one is not made before this one is acknowledged. */
	if (v->id < min_id && v->state == PLAN_READY)
		return err_set(KVT_E_BUSY, "plan %llu: ready, to be acknowledged before plan %llu is made",
			       (unsigned long long)v->id, (unsigned long long)min_id);
	if (v->id < min_id || (v->state == PLAN_CANCELLED) != (state == PLAN_CANCELLED))
		return given_up(s, min_id);
	return v->state >= state;
}

int kvtier_plan_wait(struct kvtier_seq *s, uint64_t min_id, uint32_t state, uint32_t timeout_ms,
		     struct kvtier_plan *ret)
{
	uint64_t start = now_ns(), deadline = start + timeout_ms * UINT64_C(1000000);
	struct plan_view v;
	int r;

	if (!s || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", s ? "ret" : "s");
	if (state < PLAN_DECIDED || state > PLAN_CANCELLED)
		return err_set(KVT_E_INVAL, "state: %u, must be %d..%d", state, PLAN_DECIDED, PLAN_CANCELLED);
	while (!(r = arrived(s, min_id, state, &v)) && now_ns() < MIN(start + SPIN_NS, deadline))
		cpu_relax();
	if (!r) {
		pthread_mutex_lock(&s->c->lock);
		while (!(r = arrived(s, min_id, state, &v)) &&
		       (now_ns() < deadline || planted("wait-without-deadline")))
			events_wait(s->c, s->link, deadline);
		pthread_mutex_unlock(&s->c->lock);
	}
	if (!r)
		return err_set(KVT_E_TIMEOUT, "plan %llu: not there within %u ms", (unsigned long long)min_id,
			       timeout_ms);
	if (r > 0)
		r = give(s, &v, ret);
	return MIN(r, 0);
}

/* ---- asking ------------------------------------------------------------------------------ */

int plan_ask(struct kvtier_seq *s, struct wire_hdr *req, uint64_t *ret_id)
{
	struct wire_plan_reply reply;
	struct call k = {.req = req, .reply = &reply, .reply_size = sizeof(reply), .link = s->link};
	char err[WIRE_TEXT];
	int r;

	if (wire_check(req, req->len, false, err, sizeof(err)))
		return err_set(KVT_E_INVAL, "%s", err);
	r = call_run(s->c, &k);
	if (!r && ret_id)
		*ret_id = reply.plan_id;
	return r;
}

int kvtier_plan_request(struct kvtier_seq *s, const struct kvtier_budget *b, uint64_t *ret_id)
{
	struct {
		struct wire_plan_request req;
		uint32_t table[CTL_MAX_LANES];
	} m;
	struct wire_budget budget;
	int r;

	if (!s)
		return err_set(KVT_E_INVAL, "s: NULL, must be a sequence");
	r = seq_gate(s);
	if (!r)
		r = seq_budget(s->m, b, &budget, m.table);
	if (r)
		return r;
	wire_init(&m.req.hdr, W_PLAN_REQUEST, sizeof(m.req), 0);
	m.req.hdr.len = (uint32_t)wire_plan_request_len(budget.table_n);
	m.req.seq = s->handle;
	m.req.budget = budget;
	r = plan_ask(s, &m.req.hdr, ret_id);
	if (!r && s->cu)
		cuda_seq_budget(s, &budget, m.table);
	return r;
}

int kvtier_fetch(struct kvtier_seq *s, uint32_t pos, uint32_t n, uint64_t *ret_id)
{
	struct wire_fetch m;
	int r;

	if (!s)
		return err_set(KVT_E_INVAL, "s: NULL, must be a sequence");
	r = seq_gate(s);
	if (r)
		return r;
	wire_init(&m.hdr, W_FETCH, sizeof(m), 0);
	m.seq = s->handle;
	m.pos = pos;
	m.n = n;
	return plan_ask(s, &m.hdr, ret_id);
}

/* ---- reading ------------------------------------------------------------------------------ */

static int list_rows(const struct kvtier_plan *p, const uint64_t *bits, uint32_t lane, uint32_t *positions,
		     uint32_t cap)
{
	uint32_t n = 0;

	if (lane >= p->lanes)
		return err_set(KVT_E_INVAL, "lane: %u, must be below %u", lane, p->lanes);
	bits += (size_t)lane * p->words;
	if (!positions)
		return (int)bits_rank(bits, p->watermark);
	bits_for_each(row, bits, p->watermark) {
		if (n < cap)
			positions[n] = row;
		n++;
	}
	return (int)n;
}

/* The caller's struct reaches to `end`: one built before a bitmap was there has no pointer to it. */
static int plan_has(const struct kvtier_plan *p, size_t end)
{
	if (!p)
		return err_set(KVT_E_INVAL, "p: NULL, must be a plan");
	return p->size >= end ? 0 : err_set(KVT_E_INVAL, "plan.size: %zu, must be at least %zu", p->size, end);
}

int kvtier_plan_kept(const struct kvtier_plan *p, uint32_t lane, uint32_t *positions, uint32_t cap)
{
	int r = plan_has(p, offsetof(struct kvtier_plan, copy_out));

	if (r)
		return r;
	return list_rows(p, p->resident_after, lane, positions, cap);
}

int kvtier_plan_promoted(const struct kvtier_plan *p, uint32_t lane, uint32_t *positions, uint32_t cap)
{
	int r = plan_has(p, sizeof(*p));

	if (r)
		return r;
	return list_rows(p, p->bring_in, lane, positions, cap);
}

/* ---- acknowledging -------------------------------------------------------------------------- */

struct tally {
	uint64_t in, out, nacked;
};

/* One lane's residency becomes the plan's, or stays what it was; the watermark is moved by the caller. */
static void settle_lane(struct kvtier_seq *s, const struct plan_view *v, uint32_t lane, bool nack,
			struct tally *t)
{
	uint64_t *bits = s->resident + (size_t)lane * s->words;
	const uint64_t *after = v->resident + (size_t)lane * v->words;

	for (uint32_t w = s->watermark / 64; w < v->words; w++)
		bits[w] = rows_word(s, lane, w, MAX(v->watermark, s->watermark));
	if (nack) {
		t->nacked++;
		return;
	}
	for (uint32_t w = 0; w < v->words; w++) {
		uint64_t in_range =
			v->watermark - w * 64 < 64 ? (UINT64_C(1) << (v->watermark % 64)) - 1 : ~UINT64_C(0);
		uint64_t now = after[w] & in_range;

		t->in += (uint64_t)__builtin_popcountll(now & ~bits[w]);
		t->out += (uint64_t)__builtin_popcountll(bits[w] & in_range & ~now);
		bits[w] = now | (bits[w] & ~in_range);
	}
}

void plan_settle(struct kvtier_seq *s, const struct plan_view *v, const uint64_t *nack)
{
	struct tally t = {0};

	for (uint32_t lane = 0; lane < s->lanes; lane++)
		settle_lane(s, v, lane, bits_test(nack, lane), &t);
	s->watermark = MAX(s->watermark, v->watermark);
	rows_recount(s);
	atomic_fetch_add(t.nacked == s->lanes ? &s->c->count.plans_nacked : &s->c->count.plans_applied, 1);
	atomic_fetch_add(&s->c->count.rows_promoted, t.in);
	atomic_fetch_add(&s->c->count.rows_evicted, t.out);
}

bool plan_acked(struct kvtier_seq *s, uint64_t id, const uint64_t *nack)
{
	for (size_t i = 0; i < ARRAY_SIZE(s->slot->nack); i++)
		__atomic_store_n(&s->slot->nack[i], nack[i], __ATOMIC_RELAXED);
	atomic_store_explicit(&s->acked, id, memory_order_relaxed);
	atomic_store_explicit(&s->slot->acked, id, memory_order_release);
	return events_dirty(s);
}

static int ack_check(struct kvtier_seq *s, uint64_t id, bool any_nack, struct plan_view *v)
{
	int r = plan_current(s, id, v);

	if (!r && s->busy)
		r = err_set(KVT_E_BUSY, "plan: another call is at work on the sequence");
	if (!r && any_nack && s->applied)
		r = err_set(KVT_E_INVAL, "nack_lanes: plan %llu was applied to every lane",
			    (unsigned long long)id);
	return r;
}

int kvtier_plan_ack(struct kvtier_seq *s, uint64_t id, const uint64_t *nack_lanes)
{
	uint64_t nack[CTL_MAX_LANES / 64] = {0};
	struct plan_view v;
	bool any = false, lost = false;
	int r;

	if (!s)
		return err_set(KVT_E_INVAL, "s: NULL, must be a sequence");
	if (forked(s->c))
		return err_forked();
	r = seq_on_host(s, "kvtier_cuda_apply()");
	if (r)
		return r;
	for (uint32_t lane = 0; nack_lanes && lane < s->lanes; lane++)
		if (bits_test(nack_lanes, lane)) {
			bits_set(nack, lane);
			any = true;
		}
	pthread_mutex_lock(&s->c->lock);
	r = ack_check(s, id, any, &v);
	if (!r) {
		plan_settle(s, &v, nack); /* before the daemon may write the next plan over this one */
		s->applied = 0;
		lost = plan_acked(s, id, nack);
	} else if (s->applied == id && look(s, &v) == 1 && v.id == id && !s->busy && !any) {
		plan_settle(s, &v, nack); /* the daemon is gone, but the rows have moved: know where they are */
		s->applied = 0;
	}
	pthread_mutex_unlock(&s->c->lock);
	if (lost)
		link_lost(s->c, s->link);
	return r;
}
