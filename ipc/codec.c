/* SPDX-License-Identifier: MIT */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "ipc/codec.h"
#include "shm/ctl.h"
#include "shm/plan.h"

_Static_assert(sizeof(struct wire_hdr) == 16, "header");
_Static_assert(sizeof(struct wire_reply) == 224, "reply header");
_Static_assert(sizeof(struct wire_hello) == 104, "hello");
_Static_assert(offsetof(struct wire_model, layer) == 120, "model");
_Static_assert(sizeof(struct wire_budget) == 72, "budget");
_Static_assert(sizeof(struct wire_layout) == 64, "layout");
_Static_assert(sizeof(struct wire_seq_open) == 240, "layouts behind it are 8-byte aligned");
_Static_assert(sizeof(struct wire_plan_request) == 96, "plan request");
_Static_assert(sizeof(struct wire_recall) == 136, "queries behind it are 8-byte aligned");
_Static_assert(sizeof(struct wire_recall_reply) == 264, "recall reply");
_Static_assert(offsetof(struct wire_admin, argv) == 24, "admin");

/* The first failed check sticks; the later ones do nothing. */
struct check {
	char *err;
	size_t size;
	int rc;
};

static void fail(struct check *c, int rc, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void fail(struct check *c, int rc, const char *fmt, ...)
{
	va_list ap;

	if (c->rc)
		return;
	c->rc = rc;
	if (!c->size)
		return;
	va_start(ap, fmt);
	vsnprintf(c->err, c->size, fmt, ap);
	va_end(ap);
}

static void range(struct check *c, const char *field, uint64_t v, uint64_t lo, uint64_t hi)
{
	if (v < lo || v > hi)
		fail(c, KVT_E_INVAL, "%s: %llu, must be %llu..%llu", field, (unsigned long long)v,
		     (unsigned long long)lo, (unsigned long long)hi);
}

static void not_zero(struct check *c, const char *field, uint64_t v)
{
	if (!v)
		fail(c, KVT_E_INVAL, "%s: 0, must not be 0", field);
}

/* Reserved words are zero so that a later version can give them a meaning. */
static void reserved(struct check *c, const char *field, uint64_t v)
{
	if (v)
		fail(c, KVT_E_PROTO, "%s: %llu, reserved and must be 0", field, (unsigned long long)v);
}

/* NUL-terminated within its field and safe to print on one line. */
static void text(struct check *c, const char *field, const char *s, size_t size)
{
	size_t n = strnlen(s, size);

	if (n == size)
		fail(c, KVT_E_PROTO, "%s: not terminated within %zu bytes", field, size);
	for (size_t i = 0; i < n; i++)
		if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f)
			fail(c, KVT_E_PROTO, "%s: control byte 0x%02x at %zu", field, (unsigned char)s[i], i);
}

/* A word that may become part of a file name. */
static void word(struct check *c, const char *field, const char *s, size_t size)
{
	static const char ok[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+@:";

	text(c, field, s, size);
	if (c->rc)
		return;
	if (s[0] == '.' || s[strspn(s, ok)])
		fail(c, KVT_E_INVAL, "%s: \"%s\", must be letters, digits and ._-+@: and not begin with a dot",
		     field, s);
}

static void power_of_two(struct check *c, const char *field, uint64_t v, uint64_t lo, uint64_t hi)
{
	range(c, field, v, lo, hi);
	if (v & (v - 1))
		fail(c, KVT_E_INVAL, "%s: %llu, must be a power of two", field, (unsigned long long)v);
}

uint32_t wire_dtype_bytes(uint32_t dtype)
{
	switch (dtype) {
	case KVT_DTYPE_F32:
		return 4;
	case KVT_DTYPE_F16:
	case KVT_DTYPE_BF16:
		return 2;
	default:
		return 0;
	}
}

/* ---- requests --------------------------------------------------------------- */

static void check_hello(struct check *c, const struct wire_hello *m)
{
	range(c, "max_seqs", m->max_seqs, 1, WIRE_MAX_SEQS);
	power_of_two(c, "ring_entries", m->ring_entries, WIRE_MIN_RING, WIRE_MAX_RING);
	range(c, "plan_bytes", m->plan_bytes, KVT_UNIT, WIRE_MAX_PLAN_BYTES);
	text(c, "name", m->name, sizeof(m->name));
}

static void check_layer(struct check *c, const struct wire_model *m, uint32_t i)
{
	const struct wire_layer *l = &m->layer[i];
	uint32_t elem = wire_dtype_bytes(m->dtype);
	char f[40];

#define FIELD(name) (snprintf(f, sizeof(f), "layer[%u]." #name, i), f)
	range(c, FIELD(kind), l->kind, 0, KVT_LAYER_MLA);
	range(c, FIELD(kv_heads), l->kv_heads, 1, 256);
	range(c, FIELD(k_bytes), l->k_bytes, 1, WIRE_MAX_ROW_BYTES);
	range(c, FIELD(v_bytes), l->v_bytes, 0, WIRE_MAX_ROW_BYTES);
	range(c, FIELD(side_bytes), l->side_bytes, 0, 0);
	range(c, FIELD(window), l->window, l->kind == KVT_LAYER_SLIDING, WIRE_MAX_ROWS);
#undef FIELD
	if (elem && l->kind != KVT_LAYER_MLA && l->k_bytes != m->head_dim * elem)
		fail(c, KVT_E_INVAL, "layer[%u].k_bytes: %u, must be head_dim %u x %u bytes", i, l->k_bytes,
		     m->head_dim, elem);
	if (elem && (l->k_bytes % elem || l->v_bytes % elem))
		fail(c, KVT_E_INVAL, "layer[%u]: k_bytes %u, v_bytes %u, must be whole elements of %u bytes", i,
		     l->k_bytes, l->v_bytes, elem);
}

static void check_model(struct check *c, const struct wire_model *m)
{
	range(c, "n_layers", m->n_layers, 1, WIRE_MAX_LAYERS);
	if (!c->rc && m->hdr.len != wire_model_len(m->n_layers))
		fail(c, KVT_E_PROTO, "n_layers: %u, does not fit the message's %u bytes", m->n_layers,
		     m->hdr.len);
	if (c->rc)
		return;
	word(c, "name", m->name, sizeof(m->name));
	not_zero(c, "name", (uint64_t)m->name[0]);
	range(c, "dtype", m->dtype, 0, KVT_DTYPE_BF16);
	range(c, "head_dim", m->head_dim, m->dtype != KVT_DTYPE_OPAQUE,
	      m->dtype != KVT_DTYPE_OPAQUE ? WIRE_MAX_HEAD_DIM : 0);
	range(c, "rope", m->rope, 0, KVT_ROPE_INTERLEAVED);
	range(c, "post_rope", m->post_rope, 0, 1);
	range(c, "world", m->world, 1, 65536);
	range(c, "rank", m->rank, 0, (uint64_t)m->world - 1);
	range(c, "first_head", m->first_head, 0, 65535);
	if (!isfinite(m->rope_theta) || m->rope_theta < 0 || (m->rope && m->rope_theta < 1))
		fail(c, KVT_E_INVAL, "rope_theta: %g, must be finite and at least %d", (double)m->rope_theta,
		     !!m->rope);
	reserved(c, "pad", m->pad);
	for (uint32_t i = 0; i < m->n_layers && !c->rc; i++)
		check_layer(c, m, i);
	if (!c->rc)
		range(c, "lanes (layers x heads)", wire_model_lanes(m), 1, CTL_MAX_LANES);
}

/* n_layers 0: not known here. The table's length is checked against the message by the caller. */
static void check_budget(struct check *c, const struct wire_budget *b, uint32_t n_layers)
{
	range(c, "budget.kind", b->kind, 0, KVT_BUDGET_PER_LANE);
	range(c, "budget.set", b->set, 0, 1);
	range(c, "budget.manual", b->manual, 0, 1);
	range(c, "budget.slack_rows", b->slack_rows, 0, WIRE_MAX_ROWS);
	if (b->kind == KVT_BUDGET_UNIFORM || !b->set)
		range(c, "budget.table_n", b->table_n, 0, 0);
	else if (b->kind == KVT_BUDGET_PER_LAYER && n_layers)
		range(c, "budget.table_n", b->table_n, n_layers, n_layers);
	else
		range(c, "budget.table_n", b->table_n, 1,
		      b->kind == KVT_BUDGET_PER_LAYER ? WIRE_MAX_LAYERS : CTL_MAX_LANES);
	word(c, "budget.policy", b->policy, sizeof(b->policy));
}

static void check_seq_open(struct check *c, const struct wire_seq_open *m)
{
	static const uint8_t none[sizeof(m->key)];
	bool fork = m->op == W_OP_FORK;
	char f[40];

	range(c, "n_layers", m->n_layers, 1, WIRE_MAX_LAYERS);
	check_budget(c, &m->budget, m->n_layers);
	if (!c->rc && m->hdr.len != wire_seq_open_len(m->n_layers, m->budget.table_n))
		fail(c, KVT_E_PROTO, "n_layers: %u, budget.table_n: %u, do not fit the message's %u bytes",
		     m->n_layers, m->budget.table_n, m->hdr.len);
	if (c->rc)
		return;
	range(c, "op", m->op, 0, W_OP_FORK);
	range(c, "lifetime", m->lifetime, 0, KVT_LEASED);
	range(c, "ttl_s", m->ttl_s, 0, WIRE_MAX_TTL);
	range(c, "max_rows", m->max_rows, 1, WIRE_MAX_ROWS);
	range(c, "granularity", m->granularity, 0, KVT_GRAN_BLOCK);
	range(c, "equal_lanes", m->equal_lanes, 0, 1);
	range(c, "prefix", m->prefix, 0, fork ? m->max_rows : 0);
	not_zero(c, "model", m->model);
	not_zero(c, "region", m->region);
	if (fork)
		not_zero(c, "parent", m->parent);
	else
		reserved(c, "parent", m->parent);
	if (!memcmp(m->key, none, sizeof(none)))
		fail(c, KVT_E_INVAL, "key: all zero, must name the sequence");
	for (uint32_t i = 0; i < m->n_layers && !c->rc; i++) {
		const struct wire_layout *l = wire_open_layouts(m) + i;

		snprintf(f, sizeof(f), "layout[%u].cap", i);
		range(c, f, l->cap, 1, WIRE_MAX_ROWS);
		snprintf(f, sizeof(f), "layout[%u].stage", i);
		range(c, f, l->stage, 0, WIRE_MAX_ROWS);
	}
}

static void check_plan_request(struct check *c, const struct wire_plan_request *m)
{
	check_budget(c, &m->budget, 0);
	if (!c->rc && m->hdr.len != wire_plan_request_len(m->budget.table_n))
		fail(c, KVT_E_PROTO, "budget.table_n: %u, does not fit the message's %u bytes",
		     m->budget.table_n, m->hdr.len);
	not_zero(c, "seq", m->seq);
}

static void check_find(struct check *c, const struct wire_recall *m)
{
	uint32_t elem = wire_dtype_bytes(m->dtype);

	range(c, "heads", m->heads, 1, 256);
	range(c, "per_head", m->per_head, 1, WIRE_MAX_QUERIES);
	range(c, "dim", m->dim, 1, WIRE_MAX_HEAD_DIM);
	range(c, "dtype", m->dtype, KVT_DTYPE_F32, KVT_DTYPE_BF16);
	if (!c->rc && m->hdr.len != wire_recall_len(m->heads * m->per_head, m->dim, elem))
		fail(c, KVT_E_PROTO, "heads: %u, per_head: %u, dim: %u, do not fit the message's %u bytes",
		     m->heads, m->per_head, m->dim, m->hdr.len);
	range(c, "window.cap", m->window.cap, 1, WIRE_MAX_ROWS);
	range(c, "rows", m->rows, 1, m->window.cap);
	if (!c->rc &&
	    wire_recall_reply_len(m->heads, m->rows) + (uint64_t)(m->heads - 1) * m->rows * 4 > WIRE_MAX)
		fail(c, KVT_E_INVAL,
		     "rows: %u for %u heads, the reply's %u bytes have no room for so many positions", m->rows,
		     m->heads, WIRE_MAX);
	range(c, "layer", m->layer, 0, WIRE_MAX_LAYERS - 1);
	range(c, "probe", m->probe, 0, 1000);
	range(c, "flags", m->flags, 0, KVT_RECALL_FLAGS);
	range(c, "before", m->before, 0, WIRE_MAX_NEAR);
	range(c, "after", m->after, 0, WIRE_MAX_NEAR);
	if (!isfinite(m->scale) || m->scale < 0)
		fail(c, KVT_E_INVAL, "scale: %g, must be finite and not negative", (double)m->scale);
	reserved(c, "window.stage", m->window.stage);
	reserved(c, "window.score_off", m->window.score_off | m->window.score_head_stride);
}

static void check_recall(struct check *c, const struct wire_recall *m)
{
	range(c, "op", m->op, 0, W_RECALL_END);
	not_zero(c, "seq", m->seq);
	if (c->rc)
		return;
	if (m->op == W_RECALL_FIND)
		check_find(c, m);
	else if (m->hdr.len != sizeof(*m))
		fail(c, KVT_E_PROTO, "recall: %u bytes, must be %zu without queries", m->hdr.len, sizeof(*m));
}

static void check_admin(struct check *c, const struct wire_admin *m)
{
	uint32_t strings = 0;

	if (!m->argv_bytes || m->hdr.len != sizeof(*m) + (size_t)m->argv_bytes) {
		fail(c, KVT_E_PROTO, "argv_bytes: %u, does not fit the message's %u bytes", m->argv_bytes,
		     m->hdr.len);
		return;
	}
	range(c, "argc", m->argc, 1, WIRE_MAX_ARGS);
	for (uint32_t i = 0; i < m->argv_bytes; i++) {
		unsigned char b = (unsigned char)m->argv[i];

		strings += !b;
		if (b && (b < 0x20 || b == 0x7f))
			fail(c, KVT_E_PROTO, "argv: control byte 0x%02x at %u", b, i);
	}
	if (strings != m->argc || m->argv[m->argv_bytes - 1])
		fail(c, KVT_E_PROTO, "argc: %u, the message holds %u strings", m->argc, strings);
}

static void check_request(struct check *c, const struct wire_hdr *h)
{
	const void *m = h;

	switch (h->type) {
	case W_HELLO:
		return check_hello(c, m);
	case W_MODEL:
		return check_model(c, m);
	case W_REGION:
	case W_REGION_IMPORT:
		return range(c, "bytes", ((const struct wire_region *)m)->bytes, 1, WIRE_MAX_REGION);
	case W_REGION_CLOSE:
	case W_SEQ_INFO:
		return not_zero(c, "handle", ((const struct wire_handle *)m)->handle);
	case W_SEQ_OPEN:
		return check_seq_open(c, m);
	case W_SEQ_TRUNCATE: {
		const struct wire_seq_truncate *t = m;

		not_zero(c, "seq", t->seq);
		range(c, "rows", t->rows, 0, WIRE_MAX_ROWS);
		return reserved(c, "pad", t->pad);
	}
	case W_SEQ_CLOSE: {
		const struct wire_seq_close *s = m;

		not_zero(c, "seq", s->seq);
		range(c, "drop", s->drop, 0, 1);
		return reserved(c, "pad", s->pad);
	}
	case W_PLAN_REQUEST:
		return check_plan_request(c, m);
	case W_FETCH: {
		const struct wire_fetch *f = m;

		not_zero(c, "seq", f->seq);
		range(c, "pos", f->pos, 0, WIRE_MAX_ROWS - 1);
		return range(c, "n", f->n, 1, WIRE_MAX_ROWS - (f->pos < WIRE_MAX_ROWS ? f->pos : 0));
	}
	case W_RECALL:
		return check_recall(c, m);
	case W_ADMIN:
		return check_admin(c, m);
	}
}

/* ---- replies ------------------------------------------------------------------ */

static void check_hello_reply(struct check *c, const struct wire_hello_reply *m)
{
	range(c, "features", m->features, 0, WIRE_FEATURES);
	range(c, "max_seqs", m->max_seqs, 1, WIRE_MAX_SEQS);
	power_of_two(c, "ring_entries", m->ring_entries, WIRE_MIN_RING, WIRE_MAX_RING);
	if (!c->rc)
		range(c, "ctl_bytes", m->ctl_bytes, ctl_bytes(m->ring_entries, m->max_seqs),
		      ctl_bytes(m->ring_entries, m->max_seqs));
	range(c, "plan_bytes", m->plan_bytes, KVT_UNIT, WIRE_MAX_PLAN_BYTES);
	text(c, "version", m->version, sizeof(m->version));
}

static void check_seq_open_reply(struct check *c, const struct wire_seq_open_reply *m)
{
	not_zero(c, "seq", m->seq);
	range(c, "slot", m->slot, 0, WIRE_MAX_SEQS - 1);
	range(c, "rows", m->rows, 0, WIRE_MAX_ROWS);
	range(c, "plan_bytes", m->plan_bytes, sizeof(struct plan_hdr), WIRE_MAX_PLAN_BYTES);
	range(c, "plan_off", m->plan_off, 0, WIRE_MAX_PLAN_BYTES - sizeof(struct plan_hdr));
	if (m->plan_off % KVT_CACHELINE)
		fail(c, KVT_E_INVAL, "plan_off: %llu, must be a multiple of %d",
		     (unsigned long long)m->plan_off, KVT_CACHELINE);
	reserved(c, "pad", m->pad);
}

static void check_recall_reply(struct check *c, const struct wire_recall_reply *m)
{
	uint64_t sum = 0;

	range(c, "heads", m->heads, 0, 256);
	if (!c->rc && (m->rows > WIRE_MAX || m->r.hdr.len != wire_recall_reply_len(m->heads, m->rows)))
		fail(c, KVT_E_PROTO, "heads: %u, rows: %u, do not fit the message's %u bytes", m->heads,
		     m->rows, m->r.hdr.len);
	for (uint32_t h = 0; h < m->heads && !c->rc; h++)
		sum += wire_recall_counts(m)[h];
	if (sum != m->rows)
		fail(c, KVT_E_PROTO, "rows: %u, the counts sum up to %llu", m->rows, (unsigned long long)sum);
	for (uint32_t i = 0; i < m->rows && !c->rc; i++)
		range(c, "position", wire_recall_positions(m)[i], 0, WIRE_MAX_ROWS - 1);
}

static void check_reply(struct check *c, const struct wire_reply *r)
{
	const void *m = r;

	switch (r->hdr.type & ~W_REPLY) {
	case W_HELLO:
		return check_hello_reply(c, m);
	case W_MODEL: {
		const struct wire_model_reply *v = m;

		not_zero(c, "model", v->model);
		range(c, "lanes", v->lanes, 1, CTL_MAX_LANES);
		return reserved(c, "pad", v->pad);
	}
	case W_REGION: {
		const struct wire_region_reply *v = m;

		not_zero(c, "region", v->region);
		range(c, "bytes", v->bytes, KVT_UNIT, WIRE_MAX_REGION);
		if (v->bytes % KVT_UNIT)
			fail(c, KVT_E_INVAL, "bytes: %llu, must be a multiple of %u",
			     (unsigned long long)v->bytes, KVT_UNIT);
		return;
	}
	case W_REGION_IMPORT: {
		const struct wire_region_reply *v = m;

		not_zero(c, "region", v->region);
		return range(c, "bytes", v->bytes, 1, WIRE_MAX_REGION);
	}
	case W_SEQ_OPEN:
		return check_seq_open_reply(c, m);
	case W_SEQ_TRUNCATE:
		return range(c, "rows", ((const struct wire_seq_truncate_reply *)m)->rows, 0, WIRE_MAX_ROWS);
	case W_SEQ_INFO: {
		const struct wire_seq_info_reply *v = m;

		range(c, "rows", v->rows, 0, WIRE_MAX_ROWS);
		range(c, "lanes", v->lanes, 1, CTL_MAX_LANES);
		return text(c, "policy", v->policy, sizeof(v->policy));
	}
	case W_RECALL:
		return check_recall_reply(c, m);
	case W_ADMIN:
		return range(c, "json_bytes", ((const struct wire_admin_reply *)m)->json_bytes, 0,
			     WIRE_MAX_JSON);
	}
}

/* ---- framing -------------------------------------------------------------------- */

static const struct {
	uint16_t type;
	bool tail; /* a table follows: checked by the type's own function */
	const char *name, *reply_name;
	uint32_t request, reply;
} types[] = {
	{W_HELLO, false, "hello", "hello reply", sizeof(struct wire_hello), sizeof(struct wire_hello_reply)},
	{W_MODEL, true, "model", "model reply", sizeof(struct wire_model), sizeof(struct wire_model_reply)},
	{W_REGION, false, "region", "region reply", sizeof(struct wire_region),
	 sizeof(struct wire_region_reply)},
	{W_REGION_CLOSE, false, "region-close", "region-close reply", sizeof(struct wire_handle),
	 sizeof(struct wire_reply)},
	{W_SEQ_OPEN, true, "seq-open", "seq-open reply", sizeof(struct wire_seq_open),
	 sizeof(struct wire_seq_open_reply)},
	{W_SEQ_TRUNCATE, false, "seq-truncate", "seq-truncate reply", sizeof(struct wire_seq_truncate),
	 sizeof(struct wire_seq_truncate_reply)},
	{W_SEQ_CLOSE, false, "seq-close", "seq-close reply", sizeof(struct wire_seq_close),
	 sizeof(struct wire_reply)},
	{W_SEQ_INFO, false, "seq-info", "seq-info reply", sizeof(struct wire_handle),
	 sizeof(struct wire_seq_info_reply)},
	{W_PLAN_REQUEST, true, "plan-request", "plan-request reply", sizeof(struct wire_plan_request),
	 sizeof(struct wire_plan_reply)},
	{W_FETCH, false, "fetch", "fetch reply", sizeof(struct wire_fetch), sizeof(struct wire_plan_reply)},
	{W_REGION_IMPORT, false, "region-import", "region-import reply", sizeof(struct wire_region),
	 sizeof(struct wire_region_reply)},
	{W_RECALL, true, "recall", "recall reply", sizeof(struct wire_recall),
	 sizeof(struct wire_recall_reply)},
	{W_ADMIN, true, "admin", "admin reply", sizeof(struct wire_admin), sizeof(struct wire_admin_reply)},
};

static int type_index(uint16_t type)
{
	for (size_t i = 0; i < ARRAY_SIZE(types); i++)
		if (types[i].type == type)
			return (int)i;
	return -1;
}

unsigned wire_request_fds(uint16_t type)
{
	return type == W_REGION_IMPORT;
}

const char *wire_type_name(uint16_t type)
{
	int i = type_index(type & (uint16_t)~W_REPLY);

	if (i < 0)
		return "unknown";
	return type & W_REPLY ? types[i].reply_name : types[i].name;
}

static void check_length(struct check *c, const char *name, uint32_t len, uint32_t want, bool tail)
{
	if (tail ? len < want : len != want)
		fail(c, KVT_E_PROTO, "%s: %u bytes, must be %s%u", name, len, tail ? "at least " : "", want);
}

static void check_framed_reply(struct check *c, const struct wire_reply *r, int t)
{
	if (r->hdr.len < sizeof(*r)) {
		fail(c, KVT_E_PROTO, "%s: %u bytes, must be at least %zu", types[t].reply_name, r->hdr.len,
		     sizeof(*r));
		return;
	}
	if (r->status > 0 || (r->status < 0 && (r->status > KVT_E_INVAL || r->status < KVT_E_INTERNAL)))
		fail(c, KVT_E_PROTO, "status: %d, must be 0 or %d..%d", r->status, KVT_E_INTERNAL, KVT_E_INVAL);
	reserved(c, "pad", r->pad);
	text(c, "text", r->text, sizeof(r->text));
	check_length(c, types[t].reply_name, r->hdr.len, r->status ? (uint32_t)sizeof(*r) : types[t].reply,
		     !r->status && types[t].type == W_RECALL); /* tables follow */
	if (!c->rc && !r->status)
		check_reply(c, r);
}

int wire_check(const void *buf, size_t len, bool reply, char *err, size_t errsize)
{
	struct check c = {.err = err, .size = errsize};
	const struct wire_hdr *h = buf;
	int t;

	if (len < sizeof(*h) || len > WIRE_MAX) {
		fail(&c, KVT_E_PROTO, "message: %zu bytes, must be %zu..%u", len, sizeof(*h), WIRE_MAX);
		return c.rc;
	}
	if (h->magic != WIRE_MAGIC)
		fail(&c, KVT_E_PROTO, "magic: 0x%08x, must be 0x%08x", h->magic, WIRE_MAGIC);
	if (h->version != WIRE_VERSION)
		fail(&c, KVT_E_VERSION, "version: %u, must be %u", h->version, WIRE_VERSION);
	if (h->len != len)
		fail(&c, KVT_E_PROTO, "len: %u, the packet has %zu bytes", h->len, len);
	t = type_index(h->type & (uint16_t)~W_REPLY);
	if (t < 0 || !!(h->type & W_REPLY) != reply) {
		fail(&c, KVT_E_PROTO, "type: %u, not a known %s", h->type, reply ? "reply" : "request");
		return c.rc;
	}
	if (!c.rc && reply)
		check_framed_reply(&c, buf, t);
	if (!c.rc && !reply)
		check_length(&c, types[t].name, h->len, types[t].request, types[t].tail);
	if (!c.rc && !reply)
		check_request(&c, h);
	return c.rc;
}
