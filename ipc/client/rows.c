/* SPDX-License-Identifier: MIT */
/* Which rows there are, and which of them are in the device tier. */
#include <string.h>
#include "ipc/client/client.h"
#include "ipc/cuda/cuda.h"

uint64_t rows_word(const struct kvtier_seq *s, uint32_t lane, uint32_t w, uint32_t len)
{
	uint64_t bits = 0, from = (uint64_t)w * 64;

	if (from < s->watermark)
		bits = s->resident[(size_t)lane * s->words + w];
	if (from + 64 > s->watermark)
		bits |= ~UINT64_C(0) << (s->watermark > from ? s->watermark - from : 0);
	if (from + 64 > len)
		bits &= len > from ? (UINT64_C(1) << (len - from)) - 1 : 0;
	return bits;
}

uint32_t rows_held(const struct kvtier_seq *s, uint32_t layer, uint32_t lane)
{
	return s->held[lane] + s->layer_rows[layer] - s->watermark;
}

void rows_counts(const struct kvtier_seq *s, uint32_t *n)
{
	for (uint32_t layer = 0, lane = 0; layer < s->n_layers; layer++)
		for (; lane < s->m->first_lane[layer + 1]; lane++)
			n[lane] = rows_held(s, layer, lane);
}

void rows_recount(struct kvtier_seq *s)
{
	for (uint32_t layer = 0, lane = 0; layer < s->n_layers; layer++) {
		s->layer_slots[layer] = 0;
		for (; lane < s->m->first_lane[layer + 1]; lane++) {
			s->held[lane] = bits_rank(s->resident + (size_t)lane * s->words, s->watermark);
			s->layer_slots[layer] = MAX(s->layer_slots[layer], rows_held(s, layer, lane));
		}
	}
}

void rows_start(struct kvtier_seq *s, uint32_t rows)
{
	for (uint32_t i = 0; i < s->n_layers; i++)
		s->layer_rows[i] = rows;
	s->rows = s->watermark = rows;
	rows_recount(s);
}

/* ---- append -------------------------------------------------------------------------- */

static int append_check(const struct kvtier_seq *s, uint32_t layer, uint32_t pos, uint32_t n)
{
	uint32_t cap = s->layouts[layer].cap, used = s->layer_slots[layer];

	if (pos != s->layer_rows[layer])
		return err_set(KVT_E_INVAL, "pos: %u, must be %u, the length of layer %u", pos,
			       s->layer_rows[layer], layer);
	if (n > s->max_rows - pos)
		return err_set(KVT_E_NOSPC, "rows: %u + %u, must be at most max_rows %u", pos, n, s->max_rows);
	if (n > cap - MIN(used, cap))
		return err_set(KVT_E_NOSPC, "layer %u: %u rows resident + %u, must be at most cap %u", layer,
			       used, n, cap);
	return 0;
}

/* The shortest layer's length is the sequence's. Returns whether it grew. */
static bool publish(struct kvtier_seq *s)
{
	uint32_t rows = UINT32_MAX;

	for (uint32_t i = 0; i < s->n_layers; i++)
		rows = MIN(rows, s->layer_rows[i]);
	if (rows == s->rows)
		return false;
	s->rows = rows;
	atomic_store_explicit(&s->slot->len,
			      seq_len_pack(atomic_load_explicit(&s->epoch, memory_order_relaxed), rows),
			      memory_order_release);
	return true;
}

static int append_locked(struct kvtier_seq *s, uint32_t first, uint32_t last, uint32_t pos, uint32_t n,
			 bool *ret_look)
{
	uint32_t lanes = s->m->first_lane[last + 1] - s->m->first_lane[first];
	int r = seq_gate(s);

	if (!r && s->busy == SEQ_MOVES)
		r = err_set(KVT_E_BUSY, "append: a plan is being applied");
	for (uint32_t i = first; i <= last && !r; i++)
		r = append_check(s, i, pos, n);
	if (r)
		return r;
	for (uint32_t i = first; i <= last; i++) {
		s->layer_rows[i] += n;
		s->layer_slots[i] += n;
	}
	atomic_fetch_add_explicit(&s->c->count.rows_appended, (uint64_t)n * lanes, memory_order_relaxed);
	*ret_look = publish(s) && events_dirty(s);
	return 0;
}

int kvtier_seq_append(struct kvtier_seq *s, int layer, uint32_t pos, uint32_t n)
{
	uint32_t first, last;
	bool look = false;
	int r;

	if (!s)
		return err_set(KVT_E_INVAL, "s: NULL, must be a sequence");
	if (forked(s->c))
		return err_forked();
	r = seq_on_host(s, "kvtier_cuda_append()");
	if (r)
		return r;
	if (layer != KVT_ALL_LAYERS && (layer < 0 || (uint32_t)layer >= s->n_layers))
		return err_set(KVT_E_INVAL, "layer: %d, must be 0..%u or KVT_ALL_LAYERS", layer,
			       s->n_layers - 1);
	first = layer == KVT_ALL_LAYERS ? 0 : (uint32_t)layer;
	last = layer == KVT_ALL_LAYERS ? s->n_layers - 1 : (uint32_t)layer;
	pthread_mutex_lock(&s->c->lock);
	r = append_locked(s, first, last, pos, n, &look);
	pthread_mutex_unlock(&s->c->lock);
	if (look)
		link_lost(s->c, s->link);
	return r;
}

/* ---- truncate ------------------------------------------------------------------------- */

static void forget_rows(struct kvtier_seq *s, uint32_t n, uint32_t epoch, uint32_t *counts)
{
	rows_counts(s, counts);
	planes_touched(s, counts);
	for (uint32_t lane = 0; lane < s->lanes && n < s->watermark; lane++)
		bits_clear_range(s->resident + (size_t)lane * s->words, n, s->watermark);
	s->watermark = MIN(s->watermark, n);
	for (uint32_t i = 0; i < s->n_layers; i++)
		s->layer_rows[i] = MIN(s->layer_rows[i], n);
	s->rows = n;
	rows_recount(s);
	atomic_store(&s->epoch, epoch);
	atomic_store_explicit(&s->slot->len, seq_len_pack(epoch, n), memory_order_release);
}

/* May a truncate to n rows begin? One whose outcome is not known may be asked for again. */
static int truncate_begin(struct kvtier_seq *s, uint32_t n, bool *ret_was_limbo)
{
	int r;

	*ret_was_limbo = atomic_exchange(&s->limbo, false);
	r = seq_gate(s);
	if (!r && (s->busy || s->applied))
		r = err_set(KVT_E_BUSY, "truncate: %s",
			    s->busy ? "another call is at work on the sequence"
				    : "an applied plan must be acknowledged first");
	if (!r && n > s->rows)
		r = err_set(KVT_E_INVAL, "n: %u, must be at most the sequence's %u rows", n, s->rows);
	atomic_store(&s->limbo, r ? *ret_was_limbo : true);
	if (!r)
		s->busy = SEQ_HELD;
	return r;
}

/* The request and its outcome. */
static int truncate_ask(struct kvtier_seq *s, uint32_t n, uint32_t *counts)
{
	struct wire_seq_truncate req;
	struct wire_seq_truncate_reply reply;
	struct call k = {.req = &req.hdr, .reply = &reply, .reply_size = sizeof(reply)};
	bool was_limbo;
	int r;

	pthread_mutex_lock(&s->c->lock);
	r = truncate_begin(s, n, &was_limbo);
	pthread_mutex_unlock(&s->c->lock);
	if (r)
		return r;
	wire_init(&req.hdr, W_SEQ_TRUNCATE, sizeof(req), 0);
	req.seq = s->handle;
	req.rows = n;
	k.link = s->link;
	r = call_run(s->c, &k);
	pthread_mutex_lock(&s->c->lock);
	s->busy = SEQ_IDLE;
	if (!r && reply.rows != n)
		r = err_set(KVT_E_PROTO, "rows: %u, must be %u", reply.rows, n);
	else if (!r)
		forget_rows(s, n, reply.epoch, counts);
	/* After a timeout the daemon may or may not have truncated: nothing goes on until it is asked again. */
	if (!r || (!was_limbo && r != KVT_E_TIMEOUT && r != KVT_E_PROTO))
		atomic_store(&s->limbo, false);
	pthread_mutex_unlock(&s->c->lock);
	return r;
}

int kvtier_seq_truncate(struct kvtier_seq *s, uint32_t n)
{
	_cleanup_free_ uint32_t *counts = NULL;
	int r = 0;

	if (!s)
		return err_set(KVT_E_INVAL, "s: NULL, must be a sequence");
	if (forked(s->c))
		return err_forked();
	counts = calloc(s->lanes, sizeof(*counts));
	if (!counts)
		return err_set(KVT_E_NOMEM, "truncate: out of memory");
	if (s->cu)
		r = cuda_truncate_begin(s, n);
	if (!r)
		r = truncate_ask(s, n, counts);
	if (!r && s->cu)
		r = cuda_truncate_end(s, n);
	return r;
}

/* ---- looking ---------------------------------------------------------------------------- */

int kvtier_seq_resident(struct kvtier_seq *s, uint32_t lane, uint32_t *positions, uint32_t cap)
{
	uint32_t n = 0, layer, len;

	if (!s)
		return err_set(KVT_E_INVAL, "s: NULL, must be a sequence");
	if (forked(s->c))
		return err_forked();
	if (lane >= s->lanes)
		return err_set(KVT_E_INVAL, "lane: %u, must be 0..%u", lane, s->lanes - 1);
	layer = layer_of(s->m, lane);
	pthread_mutex_lock(&s->c->lock);
	len = s->layer_rows[layer];
	for (uint32_t w = 0; w < BITS_WORDS(len); w++)
		for (uint64_t bits = rows_word(s, lane, w, len); bits; bits &= bits - 1, n++)
			if (positions && n < cap)
				positions[n] = w * 64 + (uint32_t)__builtin_ctzll(bits);
	pthread_mutex_unlock(&s->c->lock);
	return (int)n;
}

uint32_t kvtier_seq_rows(struct kvtier_seq *s)
{
	uint32_t rows;

	if (!s || forked(s->c))
		return 0;
	pthread_mutex_lock(&s->c->lock);
	rows = s->cu ? s->layer_rows[0] : s->rows;
	pthread_mutex_unlock(&s->c->lock);
	return rows;
}
