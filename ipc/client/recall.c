/* SPDX-License-Identifier: MIT */
/* Recall: the turn's queries out, positions of what was copied into the window back. */
#include <math.h>
#include <string.h>
#include "ipc/client/client.h"

#define TOKENS 4u         /* per query head: the last and the three farthest */
#define SPIN_NS 300000u   /* a layer's search takes less */
#define MAX_TOKENS 65536u /* of one turn */
#define BEFORE 8u         /* rows that come along with a hit, unless the caller says otherwise */
#define AFTER 24u

/* What a call is about: checked, defaults filled in. */
struct find {
	struct kvtier_recall_opts o;
	const char *queries;
	uint32_t layer, tokens, heads, dim, picked; /* picked: tokens per query head that are sent */
	uint32_t send;                              /* enum kvtier_dtype of the message's queries */
};

static float half_value(uint16_t h)
{
	uint32_t exp = h >> 10 & 31, frac = h & 1023, sign = (uint32_t)(h & 0x8000) << 16, u;
	float f;

	if (!exp) {
		f = (float)frac * 0x1p-24f;
		return sign ? -f : f;
	}
	u = sign | (exp == 31 ? 255u : exp + 112) << 23 | frac << 13;
	memcpy(&f, &u, sizeof(f));
	return f;
}

static void load_query(float *x, const void *src, uint32_t dim, uint32_t dtype)
{
	if (dtype == KVT_DTYPE_F32) {
		memcpy(x, src, dim * sizeof(*x));
		return;
	}
	for (uint32_t d = 0; d < dim; d++) {
		uint32_t u;
		uint16_t h;

		memcpy(&h, (const char *)src + d * sizeof(h), sizeof(h));
		u = (uint32_t)h << 16;
		if (dtype == KVT_DTYPE_F16)
			x[d] = half_value(h);
		else
			memcpy(&x[d], &u, sizeof(u));
	}
}

static void store_query(void *dst, const float *x, uint32_t dim, uint32_t dtype)
{
	if (dtype == KVT_DTYPE_F32) {
		memcpy(dst, x, dim * sizeof(*x));
		return;
	}
	for (uint32_t d = 0; d < dim; d++) {
		uint32_t u;
		uint16_t h;

		memcpy(&u, &x[d], sizeof(u));
		h = (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16); /* to the nearest bf16 */
		memcpy((char *)dst + d * sizeof(h), &h, sizeof(h));
	}
}

/* ---- checking -------------------------------------------------------------------------- */

/* How many queries fit in a message, and in which type. */
static int choose_size(struct find *f)
{
	uint32_t want = MIN(f->tokens, TOKENS), queries = f->heads * f->o.group;
	size_t room = WIRE_MAX - sizeof(struct wire_recall), one = (size_t)queries * f->dim;

	f->send = want * one * sizeof(float) <= room ? KVT_DTYPE_F32 : KVT_DTYPE_BF16;
	f->picked = (uint32_t)MIN(want, room / (one * wire_dtype_bytes(f->send)));
	f->picked = MIN(f->picked, WIRE_MAX_QUERIES / f->o.group);
	if (!f->picked)
		return err_set(KVT_E_LIMIT, "queries: %u heads of %u elements, a message holds %zu bytes",
			       queries, f->dim, room);
	return 0;
}

static int find_check(const struct kvtier_seq *s, struct find *f)
{
	const struct wire_model *m = s->m->msg;
	struct kvtier_recall_opts *o = &f->o;
	uint32_t elem = wire_dtype_bytes(o->dtype);

	if (f->layer >= s->n_layers)
		return err_set(KVT_E_INVAL, "layer: %u, must be below %u", f->layer, s->n_layers);
	if (!f->queries || !f->tokens || f->tokens > MAX_TOKENS)
		return err_set(KVT_E_INVAL, "n_queries: %u, must be 1..%u with queries", f->tokens, MAX_TOKENS);
	if (!elem)
		return err_set(KVT_E_INVAL, "dtype: %u, must be f32, f16 or bf16", o->dtype);
	if (m->dtype == KVT_DTYPE_OPAQUE)
		return err_set(KVT_E_MODEL, "model: opaque rows cannot be searched");
	if (!o->rows || o->rows > o->window_rows)
		return err_set(KVT_E_INVAL, "rows: %u, must be 1..window_rows %u", o->rows, o->window_rows);
	if (o->before > WIRE_MAX_NEAR || o->after > WIRE_MAX_NEAR)
		return err_set(KVT_E_INVAL, "%s: %u, must be at most %u",
			       o->before > WIRE_MAX_NEAR ? "before" : "after", MAX(o->before, o->after),
			       WIRE_MAX_NEAR);
	if (o->flags & KVT_RECALL_ALONE && (o->before || o->after))
		return err_set(KVT_E_INVAL, "before: %u, after: %u, must be 0 with KVT_RECALL_ALONE", o->before,
			       o->after);
	if (!(o->flags & KVT_RECALL_ALONE) && !o->before && !o->after) {
		o->before = BEFORE;
		o->after = AFTER;
	}
	f->heads = m->layer[f->layer].kv_heads;
	f->dim = m->layer[f->layer].k_bytes / wire_dtype_bytes(m->dtype);
	if (!o->group)
		o->group = 1;
	if (o->group > WIRE_MAX_QUERIES)
		return err_set(KVT_E_INVAL, "group: %u, must be at most %u", o->group, WIRE_MAX_QUERIES);
	if (!o->token_stride && !o->head_stride) {
		o->head_stride = (uint64_t)f->dim * elem;
		o->token_stride = o->head_stride * f->heads * o->group;
	}
	return choose_size(f);
}

/* May rows be searched now? */
static int state_check(struct kvtier_seq *s)
{
	int r = seq_gate(s);

	if (!r)
		r = seq_on_host(s, "kvtier_cuda_recall()");
	pthread_mutex_lock(&s->c->lock);
	if (!r && (s->busy == SEQ_MOVES || s->applied))
		r = err_set(KVT_E_BUSY, "recall: a plan is %s",
			    s->applied ? "applied, to be acknowledged" : "being applied");
	pthread_mutex_unlock(&s->c->lock);
	return r;
}

/* ---- the message ------------------------------------------------------------------------- */

/* One query head's tokens, the picked ones of them into dst. */
static void pick_head(const struct find *f, uint32_t head, float *x, char *dst)
{
	float *near = x + (size_t)f->tokens * f->dim;
	uint32_t pick[TOKENS], n;

	for (uint32_t t = 0; t < f->tokens; t++)
		load_query(x + (size_t)t * f->dim, f->queries + t * f->o.token_stride + head * f->o.head_stride,
			   f->dim, f->o.dtype);
	n = pick_farthest(x, f->dim, f->dim, f->tokens, f->picked, near, pick);
	for (uint32_t i = 0; i < n; i++, dst += (size_t)f->dim * wire_dtype_bytes(f->send))
		store_query(dst, x + (size_t)pick[i] * f->dim, f->dim, f->send);
}

static int build(const struct kvtier_seq *s, const struct find *f, struct wire_recall **ret)
{
	const struct kvtier_recall_opts *o = &f->o;
	uint32_t queries = f->heads * o->group, elem = wire_dtype_bytes(f->send);
	size_t len = wire_recall_len(queries * f->picked, f->dim, elem);
	_cleanup_free_ float *x = malloc(((size_t)f->dim + 1) * f->tokens * sizeof(*x));
	_cleanup_free_ struct wire_recall *m = malloc(len);
	char err[WIRE_TEXT];

	if (!x || !m)
		return err_set(KVT_E_NOMEM, "recall: out of memory");
	memset(m, 0, sizeof(*m));
	wire_init(&m->hdr, W_RECALL, sizeof(*m), 0);
	m->hdr.len = (uint32_t)len;
	m->seq = s->handle;
	m->op = W_RECALL_FIND;
	m->layer = f->layer;
	m->epoch = atomic_load(&s->epoch);
	m->rows = o->rows;
	m->heads = f->heads;
	m->per_head = o->group * f->picked;
	m->dim = f->dim;
	m->dtype = f->send;
	m->probe = o->probe;
	m->flags = o->flags;
	m->scale = o->scale;
	m->before = (uint16_t)o->before;
	m->after = (uint16_t)o->after;
	m->window = (struct wire_layout){.k_off = o->k_off,
					 .v_off = o->v_off,
					 .k_head_stride = o->k_head_stride,
					 .v_head_stride = o->v_head_stride,
					 .k_row_stride = o->k_row_stride,
					 .v_row_stride = o->v_row_stride,
					 .cap = o->window_rows};
	for (uint32_t h = 0; h < queries; h++)
		pick_head(f, h, x, (char *)wire_recall_queries(m) + (size_t)h * f->picked * f->dim * elem);
	if (wire_check(m, len, false, err, sizeof(err)))
		return err_set(KVT_E_INVAL, "%s", err);
	if (wire_layout_check(&m->window, &s->m->msg->layer[f->layer], f->layer, s->r->seg.size, s->max_rows,
			      err, sizeof(err)))
		return err_set(KVT_E_INVAL, "window: %s", err);
	*ret = TAKE_PTR(m);
	return 0;
}

/* ---- the calls --------------------------------------------------------------------------- */

/* Hand out what came back; the largest count. */
static int give(const struct find *f, const struct wire_recall_reply *a, struct kvtier_recalled *ret)
{
	const uint32_t *count = wire_recall_counts(a), *pos = wire_recall_positions(a);
	struct kvtier_recalled v = {
		.searched = a->searched, .skipped = a->skipped, .missed = a->missed, .daemon_ns = a->ns};
	uint32_t most = 0;
	size_t size = ret->size;
	int r;

	for (uint32_t h = 0; a->heads == f->heads && h < f->heads; h++)
		most = MAX(most, count[h]);
	if (a->heads != f->heads || most > f->o.rows)
		return err_set(KVT_E_PROTO, "recall: %u heads of up to %u rows, must be %u of %u", a->heads,
			       most, f->heads, f->o.rows);
	/* A caller built before one of them was there does not have it. */
	v.counts = size >= offsetof(struct kvtier_recalled, positions) ? ret->counts : NULL;
	v.positions = size >= offsetof(struct kvtier_recalled, searched) ? ret->positions : NULL;
	r = opts_give(ret, &v, sizeof(v), "recalled");
	if (r)
		return r;
	for (uint32_t h = 0; h < f->heads; pos += count[h++]) {
		if (v.counts)
			v.counts[h] = count[h];
		if (v.positions)
			memcpy(v.positions + (size_t)h * f->o.rows, pos, count[h] * sizeof(*pos));
	}
	return (int)most;
}

int kvtier_seq_recall(struct kvtier_seq *s, uint32_t layer, const void *queries, uint32_t n_queries,
		      const struct kvtier_recall_opts *o, struct kvtier_recalled *ret)
{
	_cleanup_free_ struct wire_recall *m = NULL;
	_cleanup_free_ struct wire_recall_reply *reply = NULL;
	struct find f = {.queries = queries, .layer = layer, .tokens = n_queries};
	struct call k = {.reply_min = sizeof(*reply), .needs = WIRE_F_RECALL, .spin_ns = SPIN_NS};
	int r;

	if (!s || !o || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", !s ? "s" : !o ? "o" : "ret");
	r = opts_take(&f.o, sizeof(f.o), o, "opts");
	if (!r)
		r = state_check(s);
	if (!r)
		r = find_check(s, &f);
	if (!r)
		r = build(s, &f, &m);
	if (r)
		return r;
	k.reply_size = wire_recall_reply_len(f.heads, f.heads * f.o.rows);
	reply = malloc(k.reply_size);
	if (!reply)
		return err_set(KVT_E_NOMEM, "recall: out of memory");
	k.reply = reply;
	k.req = &m->hdr;
	k.link = s->link;
	if (f.o.timeout_ms)
		k.deadline_ns = now_ns() + f.o.timeout_ms * UINT64_C(1000000);
	r = call_run(s->c, &k);
	return r ? r : give(&f, reply, ret);
}

static int simple(struct kvtier_seq *s, enum wire_recall_op op)
{
	struct wire_recall_reply reply;
	struct wire_recall m;
	struct call k = {.req = &m.hdr, .reply = &reply, .reply_size = sizeof(reply), .needs = WIRE_F_RECALL};
	int r;

	if (!s)
		return err_set(KVT_E_INVAL, "s: NULL, must be a sequence");
	r = seq_gate(s);
	if (r)
		return r;
	wire_init(&m.hdr, W_RECALL, sizeof(m), 0);
	m.seq = s->handle;
	m.op = op;
	k.link = s->link;
	return call_run(s->c, &k);
}

int kvtier_seq_recall_prepare(struct kvtier_seq *s)
{
	return simple(s, W_RECALL_PREPARE);
}

int kvtier_seq_recall_end(struct kvtier_seq *s)
{
	return simple(s, W_RECALL_END);
}
