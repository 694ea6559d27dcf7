/* SPDX-License-Identifier: MIT */
/*
 * Carrying out a plan in the region. A lane's kept rows keep their order, so
 * each moves straight to its final slot: those that move down are done in
 * ascending order, those that move up in descending order, and neither pass can
 * overwrite a row of the other. Then the staged rows fall into the slots left
 * free. Rows that travel together are one memmove.
 */
#include <string.h>
#include "ipc/client/client.h"

struct move {
	uint32_t from, to, n; /* slots */
};

struct moves {
	struct move *kept, *staged;
	uint32_t n_kept, n_staged;
};

/* What one lane has before and after. */
struct counts {
	uint32_t *old, *new_, *in; /* [lanes] */
};

/* Residency after the plan: its bitmap below its watermark, everything that is resident now past it. */
static uint64_t after_word(const struct plan_view *v, uint32_t lane, uint32_t w, uint64_t now)
{
	uint64_t past;

	if (w >= v->words)
		return now;
	past = v->watermark / 64 > w ? 0 : ~UINT64_C(0) << (v->watermark % 64);
	return (v->resident[(size_t)lane * v->words + w] & ~past) | (now & past);
}

static uint64_t in_word(const struct plan_view *v, uint32_t lane, uint32_t w)
{
	return w < v->words ? v->bring_in[(size_t)lane * v->words + w] : 0;
}

/* Count a lane's rows and refuse what cannot be carried out. */
static int lane_check(const struct kvtier_seq *s, const struct plan_view *v, uint32_t layer, uint32_t lane,
		      const struct counts *n)
{
	const struct kvtier_layout *l = &s->layouts[layer];
	uint32_t old = 0, after = 0, in = 0, len = s->layer_rows[layer];

	for (uint32_t w = 0; w < BITS_WORDS(len); w++) {
		uint64_t r = rows_word(s, lane, w, len), a = after_word(v, lane, w, r), b = in_word(v, lane, w);

		if ((a & ~(r | b)) || (b & r) || (b & ~a))
			return err_set(KVT_E_PROTO,
				       "plan %llu: lane %u, rows %u..%u, does not fit what is resident",
				       (unsigned long long)v->id, lane, w * 64, w * 64 + 63);
		old += (uint32_t)__builtin_popcountll(r);
		after += (uint32_t)__builtin_popcountll(a);
		in += (uint32_t)__builtin_popcountll(b);
	}
	if (in > l->stage || after > l->cap)
		return err_set(KVT_E_PROTO,
			       "plan %llu: lane %u, %u rows in and %u after, must be at most stage %u, cap %u",
			       (unsigned long long)v->id, lane, in, after, l->stage, l->cap);
	n->old[lane] = old;
	n->new_[lane] = after;
	n->in[lane] = in;
	return 0;
}

static void add_move(struct move *list, uint32_t *n, struct move m)
{
	struct move *last = *n ? &list[*n - 1] : NULL;

	if (last && last->from + last->n == m.from && last->to + last->n == m.to)
		last->n += m.n;
	else
		list[(*n)++] = m;
}

/* The runs of `bits` as moves: from counts the rows of `source`, to counts those of `target`. */
static void word_moves(struct move *list, uint32_t *n, uint64_t bits, uint64_t source, uint64_t target,
		       uint32_t from, uint32_t to)
{
	while (bits) {
		uint32_t start = (uint32_t)__builtin_ctzll(bits);
		uint64_t below = (UINT64_C(1) << start) - 1, rest = ~(bits >> start);
		uint32_t run = rest ? (uint32_t)__builtin_ctzll(rest) : 64;

		add_move(list, n,
			 (struct move){.from = from + (uint32_t)__builtin_popcountll(source & below),
				       .to = to + (uint32_t)__builtin_popcountll(target & below),
				       .n = run});
		if (start + run >= 64)
			break;
		bits &= ~UINT64_C(0) << (start + run);
	}
}

static void lane_moves(const struct kvtier_seq *s, const struct plan_view *v, uint32_t layer, uint32_t lane,
		       struct moves *m)
{
	uint32_t from = 0, to = 0, staged = s->layouts[layer].cap, len = s->layer_rows[layer];

	m->n_kept = m->n_staged = 0;
	for (uint32_t w = 0; w < BITS_WORDS(len); w++) {
		uint64_t r = rows_word(s, lane, w, len), a = after_word(v, lane, w, r), b = in_word(v, lane, w);

		word_moves(m->kept, &m->n_kept, a & r, r, a, from, to);
		word_moves(m->staged, &m->n_staged, b, b, a, staged, to);
		from += (uint32_t)__builtin_popcountll(r);
		to += (uint32_t)__builtin_popcountll(a);
		staged += (uint32_t)__builtin_popcountll(b);
	}
}

/* n rows within one plane; they may overlap. */
static void move_rows(char *plane, size_t stride, size_t bytes, const struct move *m)
{
	char *to = plane + m->to * stride;
	const char *from = plane + m->from * stride;

	if (stride == bytes) {
		memmove(to, from, m->n * bytes);
	} else if (to < from) {
		for (uint32_t i = 0; i < m->n; i++)
			memmove(to + i * stride, from + i * stride, bytes);
	} else {
		for (uint32_t i = m->n; i-- > 0;)
			memmove(to + i * stride, from + i * stride, bytes);
	}
}

static void plane_apply(char *plane, size_t stride, size_t bytes, const struct moves *m)
{
	for (uint32_t i = 0; i < m->n_kept; i++)
		if (m->kept[i].to < m->kept[i].from)
			move_rows(plane, stride, bytes, &m->kept[i]);
	for (uint32_t i = m->n_kept; i-- > 0;)
		if (m->kept[i].to > m->kept[i].from)
			move_rows(plane, stride, bytes, &m->kept[i]);
	for (uint32_t i = 0; i < m->n_staged; i++)
		move_rows(plane, stride, bytes, &m->staged[i]);
}

static void lane_apply(struct kvtier_seq *s, const struct plan_view *v, uint32_t layer, uint32_t lane,
		       struct moves *m)
{
	const struct kvtier_layout *l = &s->layouts[layer];

	lane_moves(s, v, layer, lane, m);
	plane_apply(plane_slot(s, layer, lane, false, 0), l->k_row_stride, plane_bytes(s, layer, false), m);
	if (plane_bytes(s, layer, true))
		plane_apply(plane_slot(s, layer, lane, true, 0), l->v_row_stride, plane_bytes(s, layer, true),
			    m);
}

/* Everything that can fail comes first, so that nothing is ever half done. */
static int check_all(struct kvtier_seq *s, const struct plan_view *v, const struct counts *n)
{
	for (uint32_t layer = 0, lane = 0; layer < s->n_layers; layer++)
		for (; lane < s->m->first_lane[layer + 1]; lane++) {
			int r = lane_check(s, v, layer, lane, n);

			if (r)
				return r;
		}
	return planes_commit(s, n->old, n->new_);
}

static int apply(struct kvtier_seq *s, const struct plan_view *v, const struct counts *n,
		 uint64_t *ret_released)
{
	_cleanup_free_ struct move *room = NULL;
	uint32_t most = 0;
	struct moves m;
	int r;

	for (uint32_t i = 0; i < s->n_layers; i++)
		most = MAX(most, MIN(s->layouts[i].cap, s->layer_rows[i]));
	room = malloc((size_t)most * 2 * sizeof(*room) + 1);
	if (!room)
		return err_set(KVT_E_NOMEM, "plan: out of memory");
	m.kept = room;
	m.staged = room + most;
	r = check_all(s, v, n);
	if (r)
		return r;
	for (uint32_t layer = 0, lane = 0; layer < s->n_layers; layer++)
		for (; lane < s->m->first_lane[layer + 1]; lane++)
			lane_apply(s, v, layer, lane, &m);
	*ret_released = planes_punch(s, n->old, n->new_, n->in);
	return 0;
}

static void note_applied(struct kvtier_seq *s, uint64_t id, const struct counts *n)
{
	for (uint32_t layer = 0; layer < s->n_layers; layer++) {
		s->layer_slots[layer] = 0;
		for (uint32_t lane = s->m->first_lane[layer]; lane < s->m->first_lane[layer + 1]; lane++)
			s->layer_slots[layer] = MAX(s->layer_slots[layer], n->new_[lane]);
	}
	s->applied = id;
}

int kvtier_plan_apply(struct kvtier_seq *s, const struct kvtier_plan *p)
{
	_cleanup_free_ uint32_t *room = NULL;
	struct plan_view v;
	struct counts n;
	uint64_t released = 0;
	int r;

	if (!s || !p)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", s ? "p" : "s");
	r = seq_gate(s);
	if (!r)
		r = seq_on_host(s, "kvtier_cuda_apply()");
	if (!r)
		r = planes_mapped(s);
	if (r)
		return r;
	room = calloc((size_t)s->lanes * 3, sizeof(*room));
	if (!room)
		return err_set(KVT_E_NOMEM, "plan: out of memory");
	n = (struct counts){room, room + s->lanes, room + 2 * (size_t)s->lanes};
	pthread_mutex_lock(&s->c->lock);
	if (s->busy || s->applied)
		r = err_set(KVT_E_BUSY, "plan: %s",
			    s->busy ? "another call is at work on the sequence"
				    : "already applied, to be acknowledged");
	else
		r = plan_current(s, p->id, &v);
	if (!r)
		s->busy = SEQ_MOVES;
	pthread_mutex_unlock(&s->c->lock);
	if (r)
		return r;
	r = apply(s, &v, &n, &released);
	pthread_mutex_lock(&s->c->lock);
	s->busy = SEQ_IDLE;
	if (!r)
		note_applied(s, v.id, &n);
	pthread_mutex_unlock(&s->c->lock);
	atomic_fetch_add(&s->c->count.bytes_released, released);
	return r;
}
