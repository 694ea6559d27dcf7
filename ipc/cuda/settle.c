/* SPDX-License-Identifier: MIT */
/* Where a sequence changes for good: a plan is applied, everything is waited for, rows are forgotten. */
#include <string.h>
#include "ipc/cuda/cuda.h"

#define NAP_NS 50000u /* between looks while waiting */

/* ---- apply --------------------------------------------------------------------------------- */

/* Launch the compaction; counts[3][lanes] are filled in. Tables are addresses for the GPU. */
static int compact(struct kvtier_seq *s, uint64_t resident, uint64_t bring_in, uint32_t words,
		   uint32_t watermark, uint64_t to, void *stream)
{
	struct cuda_seq *q = s->cu;
	uint64_t counts = q->pinned_addr + (uint64_t)((char *)q->counts - q->pinned);
	struct compact_args a = {.maps = {q->slot_of, q->pos_of, s->max_rows, q->cap + q->stage},
				 .lane = q->lane[q->lane_now],
				 .to = to,
				 .resident = resident,
				 .bring_in = bring_in,
				 .count = counts,
				 .in = counts + s->lanes * sizeof(uint32_t),
				 .after = counts + 2 * s->lanes * sizeof(uint32_t),
				 .scratch = q->scratch,
				 .lanes = s->lanes,
				 .words = words,
				 .watermark = watermark,
				 .rows = q->extended,
				 .cap = q->cap};

	return kern_compact(q->g, &a, stream);
}

static int count_rows(struct kvtier_seq *s, const struct cuda_plan *p)
{
	struct cuda_seq *q = s->cu;

	for (uint32_t lane = 0; lane < s->lanes; lane++) {
		uint64_t at = (uint64_t)lane * p->words;
		uint32_t after = bits_rank(p->resident + at, p->watermark) + q->appended - p->watermark;

		if (after > q->cap)
			return err_set(KVT_E_NOSPC,
				       "plan: lane %u has %u rows after it, must be at most cap %u", lane,
				       after, q->cap);
		q->counts[lane] = cuda_count(s, lane);
		q->counts[s->lanes + lane] = bits_rank(p->bring_in + at, p->watermark);
		q->counts[2 * s->lanes + lane] = after;
	}
	return 0;
}

/* The GPU has been told: the sequence is what the plan says from now on. */
static void note_applied(struct kvtier_seq *s, const struct kvtier_cuda_layer *to)
{
	static const uint64_t none[CTL_MAX_LANES / 64];
	struct cuda_seq *q = s->cu;
	struct plan_view v = {.id = q->plan.id,
			      .watermark = q->plan.watermark,
			      .words = q->plan.words,
			      .lanes = s->lanes,
			      .resident = q->plan.resident};

	pthread_mutex_lock(&s->c->lock);
	plan_settle(s, &v, none);
	pthread_mutex_unlock(&s->c->lock);
	cuda_recount(s);
	if (to) {
		memcpy(q->layers, to, s->n_layers * sizeof(*to));
		q->lane_now ^= 1;
	}
	q->applied = q->plan.id;
	ticket_add(q, CUDA_APPLY, q->plan.id, 0, 0);
	q->plan = (struct cuda_plan){0};
}

static int apply(struct kvtier_seq *s, const struct kvtier_cuda_layer *to, void *stream)
{
	struct cuda_seq *q = s->cu;
	const struct cuda_plan *p = &q->plan;
	uint64_t other = to ? q->lane[!q->lane_now] : 0;
	int r;

	if (!ticket_room(q, 2))
		return err_set(KVT_E_BUSY, "sequence: too much is in flight");
	r = cuda_extend(s, stream); /* rows without a slot would be left behind */
	if (!r)
		r = count_rows(s, p);
	if (!r && to) {
		cuda_lanes_fill(s->m, to, q->lane_new);
		r = cuda_try(q->g,
			     q->g->d->copy_in(other, q->lane_new, s->lanes * sizeof(*q->lane_new), stream),
			     "apply: cuMemcpyHtoDAsync");
	}
	if (!r)
		r = compact(s, q->tables, q->tables + 2 * p->plane, p->words, p->watermark, other, stream);
	if (!r)
		note_applied(s, to);
	return r;
}

int kvtier_cuda_apply(struct kvtier_seq *s, uint64_t plan, const struct kvtier_cuda_layer *to, uint32_t *counts,
		      void *stream)
{
	struct plan_view v;
	struct cuda_seq *q;
	int r = cuda_gate(s);

	if (!r)
		r = tickets_collect(s);
	if (!r && to)
		r = cuda_layers_check(s->m, to);
	if (!r && (!plan || s->cu->plan.id != plan))
		r = err_set(KVT_E_STALE, "plan %llu: not the current plan", (unsigned long long)plan);
	if (!r)
		r = plan_current(s, plan, &v);
	if (!r && s->cu->plan.spoilt)
		r = err_set(KVT_E_STALE, "plan %llu: a page that came in was damaged",
			    (unsigned long long)plan);
	/* counts and lane_new are one each: the last plan is through, for it was acknowledged. */
	if (!r && s->cu->applied)
		r = err_set(KVT_E_BUSY, "plan %llu: not acknowledged yet", (unsigned long long)s->cu->applied);
	if (!r)
		r = cuda_enter(s->cu->g);
	if (r)
		return r;
	q = s->cu;
	q->stream = stream;
	r = apply(s, to, stream);
	if (!r && ticket_send(q, stream))
		q->stuck_ns = 0; /* the next poll tries again, and tells why not */
	cuda_leave(q->g);
	if (!r)
		(void)kvtier_cuda_counts(s, counts);
	return r;
}

/* ---- waiting ---------------------------------------------------------------------------------- */

int cuda_quiesce(struct kvtier_seq *s)
{
	struct cuda_seq *q = s->cu;
	int r;

	if (!tickets_pending(q))
		return 0;
	r = cuda_enter(q->g);
	if (r)
		return r;
	r = ticket_send(q, q->stream);
	if (!r)
		r = cuda_try(q->g, q->g->d->stream_sync(q->stream), "cuStreamSynchronize");
	cuda_leave(q->g);
	return r ? r : tickets_collect(s);
}

/* A plan by which every row has a copy below the device tier. */
static int ask_save(struct kvtier_seq *s, uint64_t *ret_id)
{
	struct cuda_seq *q = s->cu;
	struct {
		struct wire_plan_request req;
		uint32_t table[CTL_MAX_LANES];
	} m;

	wire_init(&m.req.hdr, W_PLAN_REQUEST, sizeof(m.req), 0);
	if (q->budget.set)
		m.req.budget = q->budget;
	else
		m.req.budget = (struct wire_budget){.device_rows = KVT_ROWS_ALL,
						    .dram_rows = KVT_ROWS_ALL,
						    .nvme_rows = KVT_ROWS_ALL,
						    .set = 1};
	m.req.budget.write_through = 1;
	m.req.hdr.len = (uint32_t)wire_plan_request_len(m.req.budget.table_n);
	memcpy(m.table, q->table, m.req.budget.table_n * sizeof(*m.table));
	m.req.seq = s->handle;
	return plan_ask(s, &m.req.hdr, ret_id);
}

/* One look. 1: all is at rest and plan `id` was carried out. */
static int rest(struct kvtier_seq *s, uint64_t id, void *stream)
{
	struct cuda_seq *q = s->cu;
	struct plan_view v;
	int r = kvtier_cuda_push(s, stream);

	if (!r)
		r = kvtier_cuda_poll(s, stream, NULL);
	if (r < 0)
		return r;
	if (r == PLAN_READY) {
		r = kvtier_cuda_apply(s, q->plan.id, NULL, NULL, stream);
		return r == KVT_E_BUSY || r == KVT_E_STALE ? 0 : r;
	}
	if (tickets_pending(q) || q->scored < q->appended || q->plan.id || q->applied ||
	    atomic_load_explicit(&s->acked, memory_order_relaxed) < id)
		return 0;
	/* Decided, and not taken over yet. */
	r = plan_peek(s->plan_area, s->plan_bytes, s->lanes, &v);
	return r < 0 || !r || v.state == PLAN_CANCELLED || v.epoch != atomic_load(&s->epoch) ||
	       v.id <= atomic_load(&s->acked);
}

/* The daemon says what it has: a full tier, a quota or a failing disk leave rows on the device alone. */
static int all_saved(struct kvtier_seq *s)
{
	struct kvtier_seq_info i = {.size = sizeof(i)};
	int r = kvtier_seq_info(s, &i);

	if (!r && i.unsaved_rows)
		r = err_set(KVT_E_NOSPC,
			    "save: %llu rows of %llu are in GPU memory alone: no room below for them",
			    (unsigned long long)i.unsaved_rows, (unsigned long long)i.rows * i.lanes);
	return r;
}

int kvtier_cuda_settle(struct kvtier_seq *s, int save, uint32_t timeout_ms, void *stream)
{
	uint64_t deadline = now_ns() + timeout_ms * UINT64_C(1000000), id = 0;
	bool asked = !save;
	int r = cuda_gate(s);

	while (!r) {
		r = rest(s, id, stream);
		if (r > 0 && asked)
			return save ? all_saved(s) : 0;
		if (r > 0) { /* the daemon knows all rows: now it can be asked to store them */
			asked = true;
			r = ask_save(s, &id);
			continue;
		}
		if (!r && now_ns() > deadline)
			r = err_set(KVT_E_TIMEOUT, "settle: not at rest within %u ms", timeout_ms);
		if (!r)
			nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
	}
	return r;
}

/* ---- truncate ------------------------------------------------------------------------------------ */

int cuda_truncate_begin(struct kvtier_seq *s, uint32_t n)
{
	struct cuda_seq *q = s->cu;
	int r;

	if (n > q->appended)
		return err_set(KVT_E_INVAL, "n: %u, must be at most the sequence's %u rows", n, q->appended);
	if (q->broken)
		return cuda_gate(s);
	r = cuda_quiesce(s);
	if (!r && n > s->rows) {
		r = cuda_enter(q->g);
		if (!r) {
			r = cuda_push(s, n, q->stream);
			cuda_leave(q->g);
		}
		if (!r)
			r = cuda_quiesce(s);
	}
	/* Slots as they are now, for what comes after. */
	for (uint32_t lane = 0; !r && lane < s->lanes; lane++)
		q->counts[lane] = cuda_count(s, lane) - (q->appended - q->extended);
	return r;
}

/* Rows that are left move down into the slots of those that are gone. */
static int close_up(struct kvtier_seq *s, uint32_t n)
{
	struct cuda_seq *q = s->cu;
	uint32_t words = (uint32_t)BITS_WORDS(q->extended), lane;
	uint64_t *left = (uint64_t *)q->pinned_tables, plane = (uint64_t)s->lanes * words;
	int r;

	for (lane = 0; lane < s->lanes; lane++) {
		for (uint32_t w = 0; w < words; w++)
			left[(uint64_t)lane * words + w] = rows_word(s, lane, w, n);
		q->counts[s->lanes + lane] = 0;
		q->counts[2 * s->lanes + lane] = cuda_count(s, lane);
	}
	memset(left + plane, 0, plane * sizeof(*left));
	r = cuda_enter(q->g);
	if (r)
		return r;
	r = cuda_try(q->g, q->g->d->copy_in(q->tables, left, 2 * plane * sizeof(*left), q->stream),
		     "truncate: cuMemcpyHtoDAsync");
	if (!r)
		r = compact(s, q->tables, q->tables + plane * sizeof(*left), words, q->extended, 0, q->stream);
	if (!r)
		r = cuda_try(q->g, q->g->d->stream_sync(q->stream), "truncate: cuStreamSynchronize");
	cuda_leave(q->g);
	return r;
}

int cuda_truncate_end(struct kvtier_seq *s, uint32_t n)
{
	struct cuda_seq *q = s->cu;
	int r = 0;

	q->plan = (struct cuda_plan){0};
	q->appended = n;
	if (n < q->extended)
		r = close_up(s, n);
	q->broken = r;
	q->extended = MIN(q->extended, n);
	q->scored = MIN(q->scored, n);
	q->pushed = MIN(q->pushed, n);
	cuda_recount(s);
	return r;
}
