/* SPDX-License-Identifier: MIT */
/* Requests, field by field. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "ipc/codec_check.h"
#include "shm/ctl.h"
#include "shm/plan.h"
#include "shm/trial.h"

static void check_hello(struct check *c, const struct wire_hello *m)
{
	check_range(c, "max_seqs", m->max_seqs, 1, WIRE_MAX_SEQS);
	check_power_of_two(c, "ring_entries", m->ring_entries, WIRE_MIN_RING, WIRE_MAX_RING);
	check_range(c, "plan_bytes", m->plan_bytes, KVT_UNIT, WIRE_MAX_PLAN_BYTES);
	check_text(c, "name", m->name, sizeof(m->name));
}

static void check_layer(struct check *c, const struct wire_model *m, uint32_t i)
{
	const struct wire_layer *l = &m->layer[i];
	uint32_t elem = wire_dtype_bytes(m->dtype);
	char f[40];

#define FIELD(name) (snprintf(f, sizeof(f), "layer[%u]." #name, i), f)
	check_range(c, FIELD(kind), l->kind, 0, KVT_LAYER_MLA);
	check_range(c, FIELD(kv_heads), l->kv_heads, 1, 256);
	check_range(c, FIELD(k_bytes), l->k_bytes, 1, WIRE_MAX_ROW_BYTES);
	check_range(c, FIELD(v_bytes), l->v_bytes, 0, WIRE_MAX_ROW_BYTES);
	check_range(c, FIELD(side_bytes), l->side_bytes, 0, 0);
	check_range(c, FIELD(window), l->window, l->kind == KVT_LAYER_SLIDING, WIRE_MAX_ROWS);
#undef FIELD
	if (elem && l->kind != KVT_LAYER_MLA && l->k_bytes != m->head_dim * elem)
		check_fail(c, KVT_E_INVAL, "layer[%u].k_bytes: %u, must be head_dim %u x %u bytes", i,
			   l->k_bytes, m->head_dim, elem);
	if (elem && (l->k_bytes % elem || l->v_bytes % elem))
		check_fail(c, KVT_E_INVAL,
			   "layer[%u]: k_bytes %u, v_bytes %u, must be whole elements of %u bytes", i,
			   l->k_bytes, l->v_bytes, elem);
}

static void check_model(struct check *c, const struct wire_model *m)
{
	check_range(c, "n_layers", m->n_layers, 1, WIRE_MAX_LAYERS);
	if (!c->rc && m->hdr.len != wire_model_len(m->n_layers))
		check_fail(c, KVT_E_PROTO, "n_layers: %u, does not fit the message's %u bytes", m->n_layers,
			   m->hdr.len);
	if (c->rc)
		return;
	check_word(c, "name", m->name, sizeof(m->name));
	check_not_zero(c, "name", (uint64_t)m->name[0]);
	check_range(c, "dtype", m->dtype, 0, KVT_DTYPE_BF16);
	check_range(c, "head_dim", m->head_dim, m->dtype != KVT_DTYPE_OPAQUE,
		    m->dtype != KVT_DTYPE_OPAQUE ? WIRE_MAX_HEAD_DIM : 0);
	check_range(c, "rope", m->rope, 0, KVT_ROPE_INTERLEAVED);
	check_range(c, "post_rope", m->post_rope, 0, 1);
	check_range(c, "world", m->world, 1, 65536);
	check_range(c, "rank", m->rank, 0, (uint64_t)m->world - 1);
	check_range(c, "first_head", m->first_head, 0, 65535);
	if (!isfinite(m->rope_theta) || m->rope_theta < 0 || (m->rope && m->rope_theta < 1))
		check_fail(c, KVT_E_INVAL, "rope_theta: %g, must be finite and at least %d",
			   (double)m->rope_theta, !!m->rope);
	check_reserved(c, "pad", m->pad);
	for (uint32_t i = 0; i < m->n_layers && !c->rc; i++)
		check_layer(c, m, i);
	if (!c->rc)
		check_range(c, "lanes (layers x heads)", wire_model_lanes(m), 1, CTL_MAX_LANES);
}

/* n_layers 0: not known here. The table's length is checked against the message by the caller. */
static void check_budget(struct check *c, const struct wire_budget *b, uint32_t n_layers)
{
	check_range(c, "budget.kind", b->kind, 0, KVT_BUDGET_PER_LANE);
	check_range(c, "budget.set", b->set, 0, 1);
	check_range(c, "budget.manual", b->manual, 0, 1);
	check_range(c, "budget.slack_rows", b->slack_rows, 0, WIRE_MAX_ROWS);
	check_range(c, "budget.write_through", b->write_through, 0, 1);
	check_reserved(c, "budget.pad", b->pad);
	if (b->kind == KVT_BUDGET_UNIFORM || !b->set)
		check_range(c, "budget.table_n", b->table_n, 0, 0);
	else if (b->kind == KVT_BUDGET_PER_LAYER && n_layers)
		check_range(c, "budget.table_n", b->table_n, n_layers, n_layers);
	else
		check_range(c, "budget.table_n", b->table_n, 1,
			    b->kind == KVT_BUDGET_PER_LAYER ? WIRE_MAX_LAYERS : CTL_MAX_LANES);
	check_word(c, "budget.policy", b->policy, sizeof(b->policy));
}

/* One ring: whole pages of the region, not empty, its end in 64 bits. */
static void check_ring(struct check *c, const char *name, uint64_t off, uint64_t bytes)
{
	char f[40];

	snprintf(f, sizeof(f), "window.%s_off", name);
	check_range(c, f, off, 0, WIRE_MAX_REGION - KVT_UNIT);
	if (off % KVT_UNIT)
		check_fail(c, KVT_E_INVAL, "%s: %llu, must be a multiple of %u", f, (unsigned long long)off,
			   KVT_UNIT);
	snprintf(f, sizeof(f), "window.%s_bytes", name);
	check_range(c, f, bytes, KVT_UNIT, WIRE_MAX_REGION);
	if (bytes % KVT_UNIT)
		check_fail(c, KVT_E_INVAL, "%s: %llu, must be a multiple of %u", f, (unsigned long long)bytes,
			   KVT_UNIT);
}

/* What only sequences with a window have, and what they do not have. */
static void check_window(struct check *c, const struct wire_seq_open *m)
{
	const struct window_place *w = &m->window;

	check_range(c, "flags", m->flags, 0, W_OPEN_WINDOW | W_OPEN_DIRECT);
	check_reserved(c, "pad", m->pad);
	if (!(m->flags & W_OPEN_WINDOW)) {
		if (m->flags & W_OPEN_DIRECT)
			check_fail(c, KVT_E_INVAL, "flags: %u, DIRECT only with WINDOW", m->flags);
		check_range(c, "window.out_off", w->out_off, 0, 0);
		check_range(c, "window.out_bytes", w->out_bytes, 0, 0);
		check_range(c, "window.in_off", w->in_off, 0, 0);
		check_range(c, "window.in_bytes", w->in_bytes, 0, 0);
		check_range(c, "scorer", m->scorer, 0, 0);
		return;
	}
	if (m->op == W_OP_FORK)
		check_fail(c, KVT_E_INVAL, "op: fork, a sequence with a window cannot be forked");
	check_ring(c, "out", w->out_off, w->out_bytes);
	check_ring(c, "in", w->in_off, w->in_bytes);
	if (w->out_off < w->in_off + w->in_bytes && w->in_off < w->out_off + w->out_bytes)
		check_fail(c, KVT_E_INVAL, "window.in_off: %llu, its ring lies over the other one at %llu",
			   (unsigned long long)w->in_off, (unsigned long long)w->out_off);
}

/* The daemon cannot reach the rows: where they lie says nothing. */
static void check_no_rows(struct check *c, const struct wire_layout *l, uint32_t i)
{
	char f[48];

#define NONE(name) (snprintf(f, sizeof(f), "layout[%u]." #name, i), check_range(c, f, l->name, 0, 0))
	NONE(k_off);
	NONE(v_off);
	NONE(k_head_stride);
	NONE(v_head_stride);
	NONE(k_row_stride);
	NONE(v_row_stride);
#undef NONE
}

static void check_seq_open(struct check *c, const struct wire_seq_open *m)
{
	static const uint8_t none[sizeof(m->key)];
	bool fork = m->op == W_OP_FORK;
	char f[40];

	check_range(c, "n_layers", m->n_layers, 1, WIRE_MAX_LAYERS);
	check_budget(c, &m->budget, m->n_layers);
	if (!c->rc && m->hdr.len != wire_seq_open_len(m->n_layers, m->budget.table_n))
		check_fail(c, KVT_E_PROTO,
			   "n_layers: %u, budget.table_n: %u, do not fit the message's %u bytes", m->n_layers,
			   m->budget.table_n, m->hdr.len);
	if (c->rc)
		return;
	check_range(c, "op", m->op, 0, W_OP_FORK);
	check_range(c, "lifetime", m->lifetime, 0, KVT_LEASED);
	check_range(c, "ttl_s", m->ttl_s, 0, WIRE_MAX_TTL);
	check_range(c, "max_rows", m->max_rows, 1, WIRE_MAX_ROWS);
	check_range(c, "granularity", m->granularity, 0, KVT_GRAN_BLOCK);
	check_range(c, "equal_lanes", m->equal_lanes, 0, 1);
	check_range(c, "prefix", m->prefix, 0, fork ? m->max_rows : 0);
	check_window(c, m);
	check_not_zero(c, "model", m->model);
	check_not_zero(c, "region", m->region);
	if (fork)
		check_not_zero(c, "parent", m->parent);
	else
		check_reserved(c, "parent", m->parent);
	if (!memcmp(m->key, none, sizeof(none)))
		check_fail(c, KVT_E_INVAL, "key: all zero, must name the sequence");
	for (uint32_t i = 0; i < m->n_layers && !c->rc; i++) {
		const struct wire_layout *l = wire_open_layouts(m) + i;

		snprintf(f, sizeof(f), "layout[%u].cap", i);
		check_range(c, f, l->cap, 1, WIRE_MAX_ROWS);
		snprintf(f, sizeof(f), "layout[%u].stage", i);
		check_range(c, f, l->stage, 0, WIRE_MAX_ROWS);
		if (m->flags & W_OPEN_WINDOW)
			check_no_rows(c, l, i);
	}
}

static void check_plan_request(struct check *c, const struct wire_plan_request *m)
{
	check_budget(c, &m->budget, 0);
	if (!c->rc && m->hdr.len != wire_plan_request_len(m->budget.table_n) &&
	    !planted("wire-count-unchecked"))
		check_fail(c, KVT_E_PROTO, "budget.table_n: %u, does not fit the message's %u bytes",
			   m->budget.table_n, m->hdr.len);
	check_not_zero(c, "seq", m->seq);
}

static void check_find(struct check *c, const struct wire_recall *m)
{
	uint32_t elem = wire_dtype_bytes(m->dtype);

	check_range(c, "heads", m->heads, 1, 256);
	check_range(c, "per_head", m->per_head, 1, WIRE_MAX_QUERIES);
	check_range(c, "dim", m->dim, 1, WIRE_MAX_HEAD_DIM);
	check_range(c, "dtype", m->dtype, KVT_DTYPE_F32, KVT_DTYPE_BF16);
	if (!c->rc && m->hdr.len != wire_recall_len(m->heads * m->per_head, m->dim, elem))
		check_fail(c, KVT_E_PROTO,
			   "heads: %u, per_head: %u, dim: %u, do not fit the message's %u bytes", m->heads,
			   m->per_head, m->dim, m->hdr.len);
	check_range(c, "window.cap", m->window.cap, 1, WIRE_MAX_ROWS);
	check_range(c, "rows", m->rows, 1, m->window.cap);
	if (!c->rc &&
	    wire_recall_reply_len(m->heads, m->rows) + (uint64_t)(m->heads - 1) * m->rows * 4 > WIRE_MAX)
		check_fail(c, KVT_E_INVAL,
			   "rows: %u for %u heads, the reply's %u bytes have no room for so many positions",
			   m->rows, m->heads, WIRE_MAX);
	check_range(c, "layer", m->layer, 0, WIRE_MAX_LAYERS - 1);
	check_range(c, "probe", m->probe, 0, 1000);
	check_range(c, "flags", m->flags, 0, KVT_RECALL_FLAGS);
	check_range(c, "before", m->before, 0, WIRE_MAX_NEAR);
	check_range(c, "after", m->after, 0, WIRE_MAX_NEAR);
	if (!isfinite(m->scale) || m->scale < 0)
		check_fail(c, KVT_E_INVAL, "scale: %g, must be finite and not negative", (double)m->scale);
	check_reserved(c, "window.stage", m->window.stage);
	check_reserved(c, "window.score_off", m->window.score_off | m->window.score_head_stride);
}

static void check_recall(struct check *c, const struct wire_recall *m)
{
	check_range(c, "op", m->op, 0, W_RECALL_END);
	check_not_zero(c, "seq", m->seq);
	if (c->rc)
		return;
	if (m->op == W_RECALL_FIND)
		check_find(c, m);
	else if (m->hdr.len != sizeof(*m))
		check_fail(c, KVT_E_PROTO, "recall: %u bytes, must be %zu without queries", m->hdr.len,
			   sizeof(*m));
}

static void check_admin(struct check *c, const struct wire_admin *m)
{
	uint32_t strings = 0;

	if (!m->argv_bytes || m->hdr.len != sizeof(*m) + (size_t)m->argv_bytes) {
		check_fail(c, KVT_E_PROTO, "argv_bytes: %u, does not fit the message's %u bytes", m->argv_bytes,
			   m->hdr.len);
		return;
	}
	check_range(c, "argc", m->argc, 1, WIRE_MAX_ARGS);
	for (uint32_t i = 0; i < m->argv_bytes; i++) {
		unsigned char b = (unsigned char)m->argv[i];

		strings += !b;
		if (b && (b < 0x20 || b == 0x7f))
			check_fail(c, KVT_E_PROTO, "argv: control byte 0x%02x at %u", b, i);
	}
	if (strings != m->argc || m->argv[m->argv_bytes - 1])
		check_fail(c, KVT_E_PROTO, "argc: %u, the message holds %u strings", m->argc, strings);
}

void check_request(struct check *c, const struct wire_hdr *h)
{
	const void *m = h;

	switch (h->type) {
	case W_HELLO:
		return check_hello(c, m);
	case W_MODEL:
		return check_model(c, m);
	case W_REGION:
	case W_REGION_IMPORT:
		return check_range(c, "bytes", ((const struct wire_region *)m)->bytes, 1, WIRE_MAX_REGION);
	case W_REGION_CLOSE:
	case W_SEQ_INFO:
	case W_DIRECT:
		return check_not_zero(c, "handle", ((const struct wire_handle *)m)->handle);
	case W_SEQ_OPEN:
		return check_seq_open(c, m);
	case W_SEQ_TRUNCATE: {
		const struct wire_seq_truncate *t = m;

		check_not_zero(c, "seq", t->seq);
		check_range(c, "rows", t->rows, 0, WIRE_MAX_ROWS);
		return check_reserved(c, "pad", t->pad);
	}
	case W_SEQ_CLOSE: {
		const struct wire_seq_close *s = m;

		check_not_zero(c, "seq", s->seq);
		check_range(c, "drop", s->drop, 0, 1);
		return check_reserved(c, "pad", s->pad);
	}
	case W_PLAN_REQUEST:
		return check_plan_request(c, m);
	case W_FETCH: {
		const struct wire_fetch *f = m;

		check_not_zero(c, "seq", f->seq);
		check_range(c, "pos", f->pos, 0, WIRE_MAX_ROWS - 1);
		return check_range(c, "n", f->n, 1, WIRE_MAX_ROWS - (f->pos < WIRE_MAX_ROWS ? f->pos : 0));
	}
	case W_RECALL:
		return check_recall(c, m);
	case W_SCORER: {
		const struct wire_scorer *q = m;

		check_not_zero(c, "model", q->model);
		return check_word(c, "policy", q->policy, sizeof(q->policy));
	}
	case W_SEGMENT:
		return check_reserved(c, "pad", ((const struct wire_segment *)m)->pad);
	case W_ADMIN:
		return check_admin(c, m);
	}
}
