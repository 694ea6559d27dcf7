/* SPDX-License-Identifier: MIT */
/* Between the runtime's steps: rows that are new, and what the stream has come to. */
#include <string.h>
#include "ipc/cuda/cuda.h"

#define STUCK_NS 50000000u /* the word has not moved so long: ask the driver whether the GPU still lives */

/* ---- tickets ------------------------------------------------------------------------------- */

bool ticket_room(const struct cuda_seq *q, uint32_t n)
{
	return q->last_ticket - q->first_ticket + n <= CUDA_TICKETS;
}

void ticket_add(struct cuda_seq *q, enum cuda_work work, uint64_t plan, uint32_t n, uint32_t pages)
{
	q->ticket[q->last_ticket++ % CUDA_TICKETS] =
		(struct cuda_ticket){.number = ++q->issued, .plan = plan, .work = work, .n = n, .pages = pages};
	if (q->last_ticket - q->first_ticket == 1)
		q->stuck_ns = now_ns();
}

int ticket_send(struct cuda_seq *q, void *stream)
{
	struct word_args a = {.addr = q->pinned_addr + (uint64_t)((char *)q->word - q->pinned),
			      .value = q->issued};
	int r;

	if (q->sent == q->issued)
		return 0;
	r = kern_word(q->g, &a, stream);
	if (!r)
		q->sent = q->issued;
	return r;
}

/* The GPU has done this: what follows from it. true: the daemon has to hear. Lock held. */
static bool through(struct kvtier_seq *s, const struct cuda_ticket *t)
{
	static const uint64_t none[CTL_MAX_LANES / 64];
	struct cuda_seq *q = s->cu;
	bool current = t->plan && t->plan == q->plan.id;

	switch (t->work) {
	case CUDA_START:
		q->starts_used--;
		return false;
	case CUDA_TABLES:
		q->tables_used = false;
		return false;
	case CUDA_PUSH:
		s->rows = t->n;
		atomic_store_explicit(&s->slot->len,
				      seq_len_pack(atomic_load_explicit(&s->epoch, memory_order_relaxed), t->n),
				      memory_order_release);
		return true;
	case CUDA_GATHER:
		if (current)
			atomic_store_explicit(&s->slot->gathered, window_cursor(t->plan, t->n),
					      memory_order_release);
		return current;
	case CUDA_SCATTER:
		q->pages_used -= t->pages;
		if (atomic_load_explicit(q->bad, memory_order_relaxed) != q->bad_seen) {
			q->bad_seen = atomic_load(q->bad);
			q->plan.spoilt = true;
		}
		if (current)
			atomic_store_explicit(&s->slot->drained, window_cursor(t->plan, t->n),
					      memory_order_release);
		return current;
	case CUDA_APPLY:
		q->applied = 0;
		return plan_acked(s, t->plan, none);
	}
	return false;
}

int tickets_collect(struct kvtier_seq *s)
{
	struct cuda_seq *q = s->cu;
	uint64_t word, now;
	bool tell = false, lost = false;
	int r = 0;

	if (!tickets_pending(q))
		return 0;
	word = atomic_load_explicit(q->word, memory_order_acquire);
	if (q->ticket[q->first_ticket % CUDA_TICKETS].number > word) {
		now = now_ns();
		if (now - q->stuck_ns < STUCK_NS)
			return 0;
		/* It may just be busy; a GPU that is gone says so here. */
		q->stuck_ns = now;
		r = cuda_enter(q->g);
		if (r)
			return r;
		r = q->g->d->stream_query(q->stream);
		r = r == CUDA_NOT_READY ? 0 : cuda_try(q->g, r, "cuStreamQuery");
		cuda_leave(q->g);
		return r;
	}
	q->stuck_ns = now_ns();
	pthread_mutex_lock(&s->c->lock);
	while (tickets_pending(q) && q->ticket[q->first_ticket % CUDA_TICKETS].number <= word)
		tell |= through(s, &q->ticket[q->first_ticket++ % CUDA_TICKETS]);
	if (tell)
		lost = events_dirty(s);
	pthread_mutex_unlock(&s->c->lock);
	if (lost)
		link_lost(s->c, s->link);
	return 0;
}

/* ---- rows ------------------------------------------------------------------------------------ */

uint32_t cuda_count(const struct kvtier_seq *s, uint32_t lane)
{
	return s->held[lane] + s->cu->appended - s->watermark;
}

void cuda_recount(struct kvtier_seq *s)
{
	struct cuda_seq *q = s->cu;

	q->most = 0;
	for (uint32_t lane = 0; lane < s->lanes; lane++)
		q->most = MAX(q->most, cuda_count(s, lane));
}

int cuda_gate(struct kvtier_seq *s)
{
	int r;

	if (!cuda_seq_of(s))
		return s && forked(s->c) ? KVT_E_FORKED : KVT_E_INVAL;
	r = cuda_lost(s->cu->g);
	if (!r)
		r = seq_gate(s);
	if (!r && s->cu->broken)
		r = err_set(s->cu->broken, "sequence: its slots are not known after a failure, close it");
	return r;
}

int kvtier_cuda_append(struct kvtier_seq *s, uint32_t pos, uint32_t n)
{
	struct cuda_seq *q;
	int r = cuda_gate(s);

	if (r)
		return r;
	q = s->cu;
	if (pos != q->appended)
		return err_set(KVT_E_INVAL, "pos: %u, must be %u, the length", pos, q->appended);
	if (n > s->max_rows - pos)
		return err_set(KVT_E_NOSPC, "rows: %u + %u, must be at most max_rows %u", pos, n, s->max_rows);
	if (q->plan.id && !q->plan.spoilt && pos + n - q->plan.watermark > q->cap - q->plan.kept)
		return err_set(KVT_E_NOSPC, "rows: %u + %u, plan %llu leaves room for %u", pos, n,
			       (unsigned long long)q->plan.id, q->cap - q->plan.kept + q->plan.watermark);
	if (n > q->cap - q->most)
		return err_set(KVT_E_NOSPC, "rows: %u in the longest lane + %u, must be at most cap %u",
			       q->most, n, q->cap);
	pthread_mutex_lock(&s->c->lock);
	for (uint32_t i = 0; i < s->n_layers; i++)
		s->layer_rows[i] += n;
	pthread_mutex_unlock(&s->c->lock);
	q->appended += n;
	q->most += n;
	atomic_fetch_add_explicit(&s->c->count.rows_appended, (uint64_t)n * s->lanes, memory_order_relaxed);
	return 0;
}

int cuda_extend(struct kvtier_seq *s, void *stream)
{
	struct cuda_seq *q = s->cu;
	uint32_t *start = q->starts + (size_t)(q->next_start % CUDA_PUSHES) * s->lanes;
	struct extend_args a = {.maps = {q->slot_of, q->pos_of, s->max_rows, q->cap + q->stage},
				.count = q->pinned_addr + (uint64_t)((char *)start - q->pinned),
				.lanes = s->lanes,
				.pos = q->extended,
				.n = q->appended - q->extended};
	int r;

	if (!a.n)
		return 0;
	if (q->starts_used == CUDA_PUSHES || !ticket_room(q, 1))
		return err_set(KVT_E_BUSY, "sequence: %u pushes are in flight", q->starts_used);
	for (uint32_t lane = 0; lane < s->lanes; lane++)
		start[lane] = cuda_count(s, lane) - a.n;
	r = kern_extend(q->g, &a, stream);
	if (r)
		return r;
	q->extended = q->appended;
	q->next_start++;
	q->starts_used++;
	ticket_add(q, CUDA_START, 0, 0, 0);
	return 0;
}

int cuda_push(struct kvtier_seq *s, uint32_t rows, void *stream)
{
	struct cuda_seq *q = s->cu;
	struct score_args a;
	int r;

	if (rows <= q->scored)
		return ticket_send(q, stream);
	r = cuda_extend(s, stream);
	if (!r && !ticket_room(q, 1))
		r = err_set(KVT_E_BUSY, "sequence: too much is in flight");
	if (!r && q->scorer) {
		uint64_t stride = s->max_rows;

		a = (struct score_args){.scorer = q->scorer->addr,
					.rows = q->lane[q->lane_now],
					.slot_of = q->slot_of,
					.out = q->w->addr + q->score_off,
					.out_lane = stride * q->scorer->h.coefs,
					.out_coef = stride,
					.map_rows = s->max_rows,
					.lanes = s->lanes,
					.pos = q->scored,
					.n = rows - q->scored,
					.dtype = s->m->msg->dtype};
		r = kern_score(q->g, &q->scorer->h, &a, stream);
	}
	if (r)
		return r;
	q->scored = rows;
	ticket_add(q, CUDA_PUSH, 0, rows, 0);
	return ticket_send(q, stream);
}

/* What push was asked for and was too much then is done by a later look. */
static int push_rest(struct kvtier_seq *s, void *stream)
{
	struct cuda_seq *q = s->cu;
	int r;

	if (q->scored >= q->pushed || q->starts_used == CUDA_PUSHES)
		return 0;
	r = cuda_enter(q->g);
	if (r)
		return r;
	r = cuda_push(s, q->pushed, stream);
	cuda_leave(q->g);
	return r == KVT_E_BUSY ? 0 : r;
}

int kvtier_cuda_push(struct kvtier_seq *s, void *stream)
{
	int r = cuda_gate(s);

	if (!r)
		r = tickets_collect(s);
	if (r)
		return r;
	s->cu->stream = stream;
	s->cu->pushed = s->cu->appended;
	return push_rest(s, stream);
}

/* ---- looking ----------------------------------------------------------------------------------- */

int kvtier_cuda_poll(struct kvtier_seq *s, void *stream, struct kvtier_cuda_state *ret)
{
	struct kvtier_cuda_state v = {0};
	struct cuda_seq *q;
	int r = cuda_gate(s);

	if (!r)
		r = tickets_collect(s);
	if (r)
		return r;
	q = s->cu;
	q->stream = stream;
	r = push_rest(s, stream);
	if (!r)
		r = cuda_plan_step(s, stream);
	if (r >= 0)
		r = MIN(cuda_direct_yield(s, stream), r);
	if (r < 0)
		return r;
	if (!ret)
		return (int)q->plan.state;
	v.plan = q->plan.id;
	v.state = q->plan.state;
	v.rows = q->appended;
	v.pushed = s->rows;
	v.busy = tickets_pending(q);
	v.bytes_out = q->bytes_out;
	v.bytes_in = q->bytes_in;
	r = opts_give(ret, &v, sizeof(v), "state");
	return r ? r : (int)v.state;
}

int kvtier_cuda_counts(struct kvtier_seq *s, uint32_t *counts)
{
	struct cuda_seq *q = cuda_seq_of(s);

	if (!q)
		return s && forked(s->c) ? KVT_E_FORKED : KVT_E_INVAL;
	for (uint32_t lane = 0; counts && lane < s->lanes; lane++)
		counts[lane] = cuda_count(s, lane);
	return (int)q->most;
}

int kvtier_cuda_map(struct kvtier_seq *s, uint64_t *ret_addr, uint32_t *ret_stride)
{
	struct cuda_seq *q = cuda_seq_of(s);

	if (!q)
		return s && forked(s->c) ? KVT_E_FORKED : KVT_E_INVAL;
	if (!ret_addr || !ret_stride)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", ret_addr ? "ret_stride" : "ret_addr");
	*ret_addr = q->pos_of;
	*ret_stride = q->cap + q->stage;
	return 0;
}
