/* SPDX-License-Identifier: MIT */
/* Every message type valid; then every limited field mutated and every wrong length refused. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "ipc/codec.h"
#include "shm/ctl.h"
#include "shm/plan.h"

#define LAYERS 3

static _Alignas(8) char buf[WIRE_MAX + 8];
static char err[WIRE_TEXT];

/* ---- valid messages ------------------------------------------------------------------ */

static size_t make_hello(void)
{
	struct wire_hello *m = (void *)buf;

	wire_init(&m->hdr, W_HELLO, sizeof(*m), 7);
	m->features = WIRE_FEATURES;
	m->max_seqs = 64;
	m->ring_entries = 1024;
	m->plan_bytes = 1 << 20;
	wire_string(m->name, sizeof(m->name), "unit test");
	return sizeof(*m);
}

static size_t make_model(void)
{
	struct wire_model *m = (void *)buf;

	wire_init(&m->hdr, W_MODEL, wire_model_len(LAYERS), 7);
	wire_string(m->name, sizeof(m->name), "smollm2-135m");
	m->n_layers = LAYERS;
	m->dtype = KVT_DTYPE_BF16;
	m->head_dim = 64;
	m->rope = KVT_ROPE_HALF;
	m->post_rope = 1;
	m->rope_theta = 10000;
	m->world = 2;
	m->rank = 1;
	m->first_head = 3;
	for (int i = 0; i < LAYERS; i++)
		m->layer[i] = (struct wire_layer){.kv_heads = 3, .k_bytes = 128, .v_bytes = 128};
	return m->hdr.len;
}

static size_t make_region(void)
{
	struct wire_region *m = (void *)buf;

	wire_init(&m->hdr, W_REGION, sizeof(*m), 7);
	m->bytes = 12345;
	return sizeof(*m);
}

static size_t make_region_import(void)
{
	size_t n = make_region();

	((struct wire_hdr *)buf)->type = W_REGION_IMPORT;
	return n;
}

static size_t make_handle(enum wire_type type)
{
	struct wire_handle *m = (void *)buf;

	wire_init(&m->hdr, type, sizeof(*m), 7);
	m->handle = 99;
	return sizeof(*m);
}

static size_t make_region_close(void)
{
	return make_handle(W_REGION_CLOSE);
}

static size_t make_seq_info(void)
{
	return make_handle(W_SEQ_INFO);
}

static size_t make_seq_open(void)
{
	struct wire_seq_open *m = (void *)buf;

	wire_init(&m->hdr, W_SEQ_OPEN, wire_seq_open_len(LAYERS, LAYERS), 7);
	m->op = W_OP_FORK;
	m->lifetime = KVT_LEASED;
	m->ttl_s = 60;
	m->max_rows = 4096;
	m->granularity = KVT_GRAN_TOKEN;
	m->equal_lanes = 1;
	m->n_layers = LAYERS;
	m->prefix = 100;
	m->model = 1;
	m->region = 2;
	m->parent = 3;
	m->key[3] = 1;
	m->budget.set = 1;
	m->budget.kind = KVT_BUDGET_PER_LAYER;
	m->budget.table_n = LAYERS;
	wire_string(m->budget.policy, sizeof(m->budget.policy), "kvp");
	for (uint32_t i = 0; i < LAYERS; i++) {
		wire_open_layouts(m)[i] = (struct wire_layout){.cap = 10 + i, .stage = 5};
		wire_open_table(m)[i] = i;
	}
	return m->hdr.len;
}

static size_t make_window_open(void)
{
	struct wire_seq_open *m = (void *)buf;

	wire_init(&m->hdr, W_SEQ_OPEN, wire_seq_open_len(LAYERS, 0), 7);
	m->op = W_OP_OPEN;
	m->max_rows = 4096;
	m->n_layers = LAYERS;
	m->flags = W_OPEN_WINDOW | W_OPEN_DIRECT;
	m->window = (struct window_place){.out_off = 8192, .out_bytes = 1 << 20, .in_off = 2 << 20};
	m->window.in_bytes = 1 << 20;
	m->scorer = 9;
	m->model = 1;
	m->region = 2;
	m->key[3] = 1;
	m->budget.set = 1;
	m->budget.write_through = 1;
	for (uint32_t i = 0; i < LAYERS; i++)
		wire_open_layouts(m)[i] = (struct wire_layout){.cap = 10 + i,
							       .stage = 5,
							       .score_off = (4 << 20) + i * 65536,
							       .score_head_stride = 32768};
	return m->hdr.len;
}

static size_t make_scorer(void)
{
	struct wire_scorer *m = (void *)buf;

	wire_init(&m->hdr, W_SCORER, sizeof(*m), 7);
	m->model = 1;
	wire_string(m->policy, sizeof(m->policy), "kvp");
	return sizeof(*m);
}

static size_t make_direct(void)
{
	return make_handle(W_DIRECT);
}

static size_t make_segment(void)
{
	struct wire_segment *m = (void *)buf;

	wire_init(&m->hdr, W_SEGMENT, sizeof(*m), 7);
	m->segment = 3;
	return sizeof(*m);
}

static size_t make_truncate(void)
{
	struct wire_seq_truncate *m = (void *)buf;

	wire_init(&m->hdr, W_SEQ_TRUNCATE, sizeof(*m), 7);
	m->seq = 5;
	m->rows = 10;
	return sizeof(*m);
}

static size_t make_close(void)
{
	struct wire_seq_close *m = (void *)buf;

	wire_init(&m->hdr, W_SEQ_CLOSE, sizeof(*m), 7);
	m->seq = 5;
	m->drop = 1;
	return sizeof(*m);
}

static size_t make_plan_request(void)
{
	struct wire_plan_request *m = (void *)buf;

	wire_init(&m->hdr, W_PLAN_REQUEST, wire_plan_request_len(9), 7);
	m->seq = 5;
	m->budget.set = 1;
	m->budget.kind = KVT_BUDGET_PER_LANE;
	m->budget.table_n = 9;
	wire_plan_table(m)[8] = 3;
	return m->hdr.len;
}

static size_t make_fetch(void)
{
	struct wire_fetch *m = (void *)buf;

	wire_init(&m->hdr, W_FETCH, sizeof(*m), 7);
	m->seq = 5;
	m->pos = 10;
	m->n = 20;
	return sizeof(*m);
}

static size_t make_recall(void)
{
	struct wire_recall *m = (void *)buf;
	size_t len = wire_recall_len(3 * 4, 64, 2);

	wire_init(&m->hdr, W_RECALL, len, 7);
	m->seq = 5;
	m->layer = 2;
	m->epoch = 1;
	m->rows = 32;
	m->heads = 3;
	m->per_head = 4;
	m->dim = 64;
	m->dtype = KVT_DTYPE_F16;
	m->probe = 250;
	m->scale = 0.125f;
	m->window.cap = 64;
	return len;
}

static size_t make_recall_end(void)
{
	struct wire_recall *m = (void *)buf;

	wire_init(&m->hdr, W_RECALL, sizeof(*m), 7);
	m->seq = 5;
	m->op = W_RECALL_END;
	return sizeof(*m);
}

static size_t make_admin(void)
{
	static const char argv[] = "budget\0"
				   "0x10\0"
				   "500";
	struct wire_admin *m = (void *)buf;

	wire_init(&m->hdr, W_ADMIN, sizeof(*m) + sizeof(argv), 7);
	m->argc = 3;
	m->argv_bytes = sizeof(argv);
	memcpy(m->argv, argv, sizeof(argv));
	return m->hdr.len;
}

static const struct wire_hdr *request(enum wire_type type)
{
	static struct wire_hdr h;

	wire_init(&h, type, sizeof(h), 7);
	return &h;
}

static size_t make_hello_reply(void)
{
	struct wire_hello_reply *m = (void *)buf;

	wire_reply_init(&m->r, request(W_HELLO), sizeof(*m), 0, NULL);
	m->features = WIRE_F_PLANS;
	m->max_seqs = 64;
	m->ring_entries = 1024;
	m->ctl_bytes = ctl_bytes(1024, 64);
	m->plan_bytes = 1 << 20;
	wire_string(m->version, sizeof(m->version), "0.1.0");
	return sizeof(*m);
}

static size_t make_model_reply(void)
{
	struct wire_model_reply *m = (void *)buf;

	wire_reply_init(&m->r, request(W_MODEL), sizeof(*m), 0, NULL);
	m->model = 1;
	m->lanes = 9;
	return sizeof(*m);
}

static size_t make_region_reply(void)
{
	struct wire_region_reply *m = (void *)buf;

	wire_reply_init(&m->r, request(W_REGION), sizeof(*m), 0, NULL);
	m->region = 1;
	m->bytes = 8192;
	return sizeof(*m);
}

static size_t make_region_import_reply(void)
{
	struct wire_region_reply *m = (void *)buf;

	wire_reply_init(&m->r, request(W_REGION_IMPORT), sizeof(*m), 0, NULL);
	m->region = 1;
	m->bytes = 12345; /* as asked: it is the client's file, whatever its size */
	return sizeof(*m);
}

static size_t make_seq_open_reply(void)
{
	struct wire_seq_open_reply *m = (void *)buf;

	wire_reply_init(&m->r, request(W_SEQ_OPEN), sizeof(*m), 0, NULL);
	m->seq = 1;
	m->plan_off = 640;
	m->plan_bytes = 4096;
	m->slot = 3;
	m->epoch = 1;
	m->rows = 100;
	return sizeof(*m);
}

static size_t make_truncate_reply(void)
{
	struct wire_seq_truncate_reply *m = (void *)buf;

	wire_reply_init(&m->r, request(W_SEQ_TRUNCATE), sizeof(*m), 0, NULL);
	m->rows = 10;
	return sizeof(*m);
}

static size_t make_info_reply(void)
{
	struct wire_seq_info_reply *m = (void *)buf;

	wire_reply_init(&m->r, request(W_SEQ_INFO), sizeof(*m), 0, NULL);
	m->lanes = 9;
	return sizeof(*m);
}

static size_t make_plan_reply(void)
{
	wire_reply_init((void *)buf, request(W_PLAN_REQUEST), sizeof(struct wire_plan_reply), 0, NULL);
	return sizeof(struct wire_plan_reply);
}

static size_t make_fetch_reply(void)
{
	wire_reply_init((void *)buf, request(W_FETCH), sizeof(struct wire_plan_reply), 0, NULL);
	return sizeof(struct wire_plan_reply);
}

static size_t make_recall_reply(void)
{
	struct wire_recall_reply *r = (void *)buf;

	wire_reply_init(&r->r, request(W_RECALL), wire_recall_reply_len(3, 5), 0, NULL);
	r->heads = 3;
	r->rows = 5;
	wire_recall_counts(r)[0] = 2;
	wire_recall_counts(r)[2] = 3;
	wire_recall_positions(r)[4] = 77;
	return r->r.hdr.len;
}

static size_t make_admin_reply(void)
{
	wire_reply_init((void *)buf, request(W_ADMIN), sizeof(struct wire_admin_reply), 0, NULL);
	return sizeof(struct wire_admin_reply);
}

static size_t make_scorer_reply(void)
{
	struct wire_scorer_reply *m = (void *)buf;

	wire_reply_init(&m->r, request(W_SCORER), sizeof(*m), 0, NULL);
	m->id = 7;
	m->bytes = 1 << 20;
	m->coefs = 2;
	wire_string(m->policy, sizeof(m->policy), "kvp");
	return sizeof(*m);
}

static size_t make_direct_reply(void)
{
	struct wire_direct_reply *m = (void *)buf;

	wire_reply_init(&m->r, request(W_DIRECT), sizeof(*m), 0, NULL);
	m->bytes = 1 << 20;
	return sizeof(*m);
}

static size_t make_segment_reply(void)
{
	struct wire_segment_reply *m = (void *)buf;

	wire_reply_init(&m->r, request(W_SEGMENT), sizeof(*m), 0, NULL);
	m->bytes = 64 << 20;
	return sizeof(*m);
}

static size_t make_bare_reply(void)
{
	wire_reply_init((void *)buf, request(W_SEQ_CLOSE), sizeof(struct wire_reply), 0, NULL);
	return sizeof(struct wire_reply);
}

static size_t make_refusal(void)
{
	wire_reply_init((void *)buf, request(W_HELLO), sizeof(struct wire_hello_reply), KVT_E_LIMIT,
			"clients: %d, must be at most %d", 9, 8);
	return sizeof(struct wire_reply);
}

static const struct {
	const char *name;
	size_t (*make)(void);
	bool reply;
} messages[] = {
	{"hello", make_hello, false},
	{"model", make_model, false},
	{"region", make_region, false},
	{"region-import", make_region_import, false},
	{"region-close", make_region_close, false},
	{"seq-open", make_seq_open, false},
	{"seq-open", make_window_open, false},
	{"scorer", make_scorer, false},
	{"direct", make_direct, false},
	{"segment", make_segment, false},
	{"seq-truncate", make_truncate, false},
	{"seq-close", make_close, false},
	{"seq-info", make_seq_info, false},
	{"plan-request", make_plan_request, false},
	{"fetch", make_fetch, false},
	{"recall", make_recall, false},
	{"recall", make_recall_end, false},
	{"admin", make_admin, false},
	{"hello reply", make_hello_reply, true},
	{"model reply", make_model_reply, true},
	{"region reply", make_region_reply, true},
	{"region-import reply", make_region_import_reply, true},
	{"seq-open reply", make_seq_open_reply, true},
	{"seq-truncate reply", make_truncate_reply, true},
	{"seq-info reply", make_info_reply, true},
	{"plan-request reply", make_plan_reply, true},
	{"fetch reply", make_fetch_reply, true},
	{"recall reply", make_recall_reply, true},
	{"admin reply", make_admin_reply, true},
	{"scorer reply", make_scorer_reply, true},
	{"direct reply", make_direct_reply, true},
	{"segment reply", make_segment_reply, true},
	{"seq-close reply", make_bare_reply, true},
	{"hello reply", make_refusal, true},
};

static size_t make(size_t (*fn)(void))
{
	memset(buf, 0xEE, sizeof(buf)); /* builders must not rely on zeroes */
	return fn();
}

static void test_valid(void **state)
{
	for (size_t i = 0; i < ARRAY_SIZE(messages); i++) {
		size_t len = make(messages[i].make);

		err[0] = 0;
		if (wire_check(buf, len, messages[i].reply, err, sizeof(err)))
			fail_msg("%s: %s", messages[i].name, err);
		assert_string_equal(err, "");
		assert_string_equal(wire_type_name(((struct wire_hdr *)buf)->type), messages[i].name);
		assert_int_equal(wire_check(buf, len, !messages[i].reply, err, sizeof(err)), KVT_E_PROTO);
	}
	assert_string_equal(wire_type_name(31), "unknown");
	assert_string_equal(wire_type_name(W_REPLY), "unknown");
}

static void test_fd_counts(void **state)
{
	for (unsigned type = 0; type <= UINT16_MAX; type++)
		assert_int_equal(wire_request_fds((uint16_t)type), type == 11);
}

static void test_lengths(void **state)
{
	for (size_t i = 0; i < ARRAY_SIZE(messages); i++) {
		size_t len = make(messages[i].make);

		for (size_t n = 0; n <= len + 8; n++) {
			if (n == len)
				continue;
			/* a packet cut or padded on its way, and one that lies about it */
			((struct wire_hdr *)buf)->len = (uint32_t)len;
			if (!wire_check(buf, n, messages[i].reply, err, sizeof(err)))
				fail_msg("%s of %zu bytes accepted with %zu", messages[i].name, len, n);
			((struct wire_hdr *)buf)->len = (uint32_t)n;
			if (!wire_check(buf, n, messages[i].reply, err, sizeof(err)))
				fail_msg("%s of %zu bytes accepted as %zu", messages[i].name, len, n);
		}
		assert_int_equal(wire_check(buf, WIRE_MAX + 1, messages[i].reply, err, sizeof(err)),
				 KVT_E_PROTO);
	}
}

static void test_header(void **state)
{
	for (size_t i = 0; i < ARRAY_SIZE(messages); i++)
		for (size_t byte = 0; byte < offsetof(struct wire_hdr, cookie); byte++) {
			size_t len = make(messages[i].make);
			int want = byte == 4 || byte == 5 ? KVT_E_VERSION : KVT_E_PROTO;

			buf[byte] ^= 0x40;
			assert_int_equal(wire_check(buf, len, messages[i].reply, err, sizeof(err)), want);
			assert_non_null(strchr(err, ':'));
		}
}

/* ---- fields ------------------------------------------------------------------------------ */

struct mutation {
	size_t (*make)(void);
	const char *field; /* begins the line */
	size_t off, size;
	uint64_t value;
	int want;
};

#define M(mk, type, f, v, w)                                                                                   \
	{                                                                                                      \
		mk, #f, offsetof(struct type, f), sizeof(((struct type *)0)->f), (uint64_t)(v), w              \
	}
#define LAYER(f, v)                                                                                            \
	{                                                                                                      \
		make_model, "layer[1]." #f,                                                                    \
			offsetof(struct wire_model, layer) + sizeof(struct wire_layer) +                       \
				offsetof(struct wire_layer, f),                                                \
			4, v, KVT_E_INVAL                                                                      \
	}
#define LAYOUT(f, v)                                                                                           \
	{                                                                                                      \
		make_seq_open, "layout[2]." #f,                                                                \
			sizeof(struct wire_seq_open) + 2 * sizeof(struct wire_layout) +                        \
				offsetof(struct wire_layout, f),                                               \
			4, v, KVT_E_INVAL                                                                      \
	}
#define WINDOW(f, v) M(make_window_open, wire_seq_open, f, v, KVT_E_INVAL)
#define NO_ROWS(f)                                                                                             \
	{                                                                                                      \
		make_window_open, "layout[1]." #f,                                                             \
			sizeof(struct wire_seq_open) + sizeof(struct wire_layout) +                            \
				offsetof(struct wire_layout, f),                                               \
			sizeof(((struct wire_layout *)0)->f), 64, KVT_E_INVAL                                  \
	}
#define NAN_BITS 0x7fc00000u
#define INF_BITS 0x7f800000u
#define MINUS_ONE_BITS 0xbf800000u

static const struct mutation mutations[] = {
	M(make_hello, wire_hello, max_seqs, 0, KVT_E_INVAL),
	M(make_hello, wire_hello, max_seqs, WIRE_MAX_SEQS + 1, KVT_E_INVAL),
	M(make_hello, wire_hello, ring_entries, 32, KVT_E_INVAL),
	M(make_hello, wire_hello, ring_entries, 1000, KVT_E_INVAL),
	M(make_hello, wire_hello, ring_entries, 2 * WIRE_MAX_RING, KVT_E_INVAL),
	M(make_hello, wire_hello, plan_bytes, 0, KVT_E_INVAL),
	M(make_hello, wire_hello, plan_bytes, WIRE_MAX_PLAN_BYTES + 1, KVT_E_INVAL),
	M(make_model, wire_model, n_layers, 0, KVT_E_INVAL),
	M(make_model, wire_model, n_layers, LAYERS - 1, KVT_E_PROTO),
	M(make_model, wire_model, n_layers, LAYERS + 1, KVT_E_PROTO),
	M(make_model, wire_model, n_layers, WIRE_MAX_LAYERS + 1, KVT_E_INVAL),
	M(make_model, wire_model, n_layers, UINT32_MAX, KVT_E_INVAL),
	M(make_model, wire_model, dtype, 4, KVT_E_INVAL),
	M(make_model, wire_model, head_dim, 0, KVT_E_INVAL),
	M(make_model, wire_model, head_dim, WIRE_MAX_HEAD_DIM + 1, KVT_E_INVAL),
	{make_model, "layer[0].k_bytes", offsetof(struct wire_model, head_dim), 4, 65, KVT_E_INVAL},
	M(make_model, wire_model, rope, 3, KVT_E_INVAL),
	M(make_model, wire_model, post_rope, 2, KVT_E_INVAL),
	M(make_model, wire_model, world, 0, KVT_E_INVAL),
	M(make_model, wire_model, rank, 2, KVT_E_INVAL),
	M(make_model, wire_model, first_head, 65536, KVT_E_INVAL),
	M(make_model, wire_model, rope_theta, NAN_BITS, KVT_E_INVAL),
	M(make_model, wire_model, rope_theta, INF_BITS, KVT_E_INVAL),
	M(make_model, wire_model, rope_theta, MINUS_ONE_BITS, KVT_E_INVAL),
	M(make_model, wire_model, rope_theta, 0, KVT_E_INVAL),
	M(make_model, wire_model, pad, 1, KVT_E_PROTO),
	LAYER(kind, 3),
	LAYER(kind, KVT_LAYER_SLIDING + 8),
	LAYER(kv_heads, 0),
	LAYER(kv_heads, 257),
	LAYER(k_bytes, 0),
	LAYER(k_bytes, 127),
	LAYER(k_bytes, WIRE_MAX_ROW_BYTES + 1),
	LAYER(v_bytes, WIRE_MAX_ROW_BYTES + 1),
	{make_model, "layer[1]:", offsetof(struct wire_model, layer) + sizeof(struct wire_layer) + 12, 4, 127,
	 KVT_E_INVAL},
	LAYER(side_bytes, 4),
	LAYER(window, WIRE_MAX_ROWS + 1),
	M(make_region, wire_region, bytes, 0, KVT_E_INVAL),
	M(make_region, wire_region, bytes, WIRE_MAX_REGION + 1, KVT_E_INVAL),
	M(make_region_import, wire_region, bytes, 0, KVT_E_INVAL),
	M(make_region_import, wire_region, bytes, WIRE_MAX_REGION + 1, KVT_E_INVAL),
	M(make_region_import_reply, wire_region_reply, region, 0, KVT_E_INVAL),
	M(make_region_import_reply, wire_region_reply, bytes, 0, KVT_E_INVAL),
	M(make_region_import_reply, wire_region_reply, bytes, WIRE_MAX_REGION + 1, KVT_E_INVAL),
	M(make_region_close, wire_handle, handle, 0, KVT_E_INVAL),
	M(make_seq_info, wire_handle, handle, 0, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, op, 3, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, lifetime, 2, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, ttl_s, WIRE_MAX_TTL + 1, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, max_rows, 0, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, max_rows, WIRE_MAX_ROWS + 1, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, granularity, 3, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, equal_lanes, 2, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, n_layers, 0, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, n_layers, WIRE_MAX_LAYERS + 1, KVT_E_INVAL),
	{make_seq_open, "budget.table_n", offsetof(struct wire_seq_open, n_layers), 4, LAYERS + 1, KVT_E_INVAL},
	M(make_seq_open, wire_seq_open, prefix, 4097, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, model, 0, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, region, 0, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, parent, 0, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, key[3], 0, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, budget.kind, 3, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, budget.set, 2, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, budget.manual, 2, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, budget.slack_rows, WIRE_MAX_ROWS + 1, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, budget.table_n, LAYERS - 1, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, budget.table_n, UINT32_MAX, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, budget.write_through, 2, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, budget.pad, 1, KVT_E_PROTO),
	M(make_seq_open, wire_seq_open, flags, W_OPEN_DIRECT, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, flags, 4, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, pad, 1, KVT_E_PROTO),
	M(make_seq_open, wire_seq_open, window.out_off, 4096, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, window.out_bytes, 4096, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, window.in_off, 4096, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, window.in_bytes, 4096, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, scorer, 1, KVT_E_INVAL),
	{make_window_open, "op: fork", offsetof(struct wire_seq_open, op), 4, W_OP_FORK, KVT_E_INVAL},
	{make_window_open, "window.out_off", offsetof(struct wire_seq_open, flags), 4, 0, KVT_E_INVAL},
	WINDOW(flags, 5),
	WINDOW(window.out_off, 8192 + 64),
	WINDOW(window.out_off, UINT64_MAX - 4095),
	WINDOW(window.out_bytes, 0),
	WINDOW(window.out_bytes, 8192 + 128),
	WINDOW(window.out_bytes, UINT64_MAX - 4095),
	WINDOW(window.in_off, 12288), /* over the other ring */
	WINDOW(window.in_off, 1 << 20),
	WINDOW(window.in_off, 4095),
	WINDOW(window.in_bytes, 0),
	{make_window_open, "window.in_off", offsetof(struct wire_seq_open, window.out_bytes), 8, 4 << 20,
	 KVT_E_INVAL},
	NO_ROWS(k_off),
	NO_ROWS(v_off),
	NO_ROWS(k_head_stride),
	NO_ROWS(v_head_stride),
	NO_ROWS(k_row_stride),
	NO_ROWS(v_row_stride),
	M(make_scorer, wire_scorer, model, 0, KVT_E_INVAL),
	M(make_scorer, wire_scorer, policy[0], '.', KVT_E_INVAL),
	M(make_scorer, wire_scorer, policy[1], 7, KVT_E_PROTO),
	M(make_direct, wire_handle, handle, 0, KVT_E_INVAL),
	M(make_segment, wire_segment, pad, 1, KVT_E_PROTO),
	M(make_scorer_reply, wire_scorer_reply, id, 0, KVT_E_INVAL),
	M(make_scorer_reply, wire_scorer_reply, bytes, 8, KVT_E_INVAL),
	M(make_scorer_reply, wire_scorer_reply, coefs, 0, KVT_E_INVAL),
	M(make_scorer_reply, wire_scorer_reply, coefs, 3, KVT_E_INVAL),
	M(make_scorer_reply, wire_scorer_reply, pad, 1, KVT_E_PROTO),
	M(make_scorer_reply, wire_scorer_reply, policy[1], 7, KVT_E_PROTO),
	M(make_direct_reply, wire_direct_reply, bytes, 0, KVT_E_INVAL),
	M(make_segment_reply, wire_segment_reply, bytes, 0, KVT_E_INVAL),
	M(make_segment_reply, wire_segment_reply, bytes, UINT64_MAX, KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, budget.policy[0], '.', KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, budget.policy[1], '/', KVT_E_INVAL),
	M(make_seq_open, wire_seq_open, budget.policy[1], '\n', KVT_E_PROTO),
	LAYOUT(cap, 0),
	LAYOUT(cap, WIRE_MAX_ROWS + 1),
	LAYOUT(stage, WIRE_MAX_ROWS + 1),
	M(make_truncate, wire_seq_truncate, seq, 0, KVT_E_INVAL),
	M(make_truncate, wire_seq_truncate, rows, WIRE_MAX_ROWS + 1, KVT_E_INVAL),
	M(make_truncate, wire_seq_truncate, pad, 1, KVT_E_PROTO),
	M(make_close, wire_seq_close, seq, 0, KVT_E_INVAL),
	M(make_close, wire_seq_close, drop, 2, KVT_E_INVAL),
	M(make_close, wire_seq_close, pad, 1, KVT_E_PROTO),
	M(make_plan_request, wire_plan_request, seq, 0, KVT_E_INVAL),
	M(make_plan_request, wire_plan_request, budget.table_n, 8, KVT_E_PROTO),
	M(make_plan_request, wire_plan_request, budget.table_n, 10, KVT_E_PROTO),
	M(make_plan_request, wire_plan_request, budget.table_n, 0, KVT_E_INVAL),
	M(make_plan_request, wire_plan_request, budget.table_n, CTL_MAX_LANES + 1, KVT_E_INVAL),
	{make_plan_request, "budget.table_n", offsetof(struct wire_plan_request, budget.kind), 4, 0,
	 KVT_E_INVAL},
	{make_plan_request, "budget.table_n", offsetof(struct wire_plan_request, budget.set), 4, 0,
	 KVT_E_INVAL},
	M(make_fetch, wire_fetch, seq, 0, KVT_E_INVAL),
	M(make_fetch, wire_fetch, pos, WIRE_MAX_ROWS, KVT_E_INVAL),
	M(make_fetch, wire_fetch, pos, UINT32_MAX, KVT_E_INVAL),
	M(make_fetch, wire_fetch, n, 0, KVT_E_INVAL),
	M(make_fetch, wire_fetch, n, WIRE_MAX_ROWS, KVT_E_INVAL),
	M(make_fetch, wire_fetch, n, UINT32_MAX - 5, KVT_E_INVAL),
	M(make_recall, wire_recall, seq, 0, KVT_E_INVAL),
	M(make_recall, wire_recall, op, 3, KVT_E_INVAL),
	{make_recall, "recall", offsetof(struct wire_recall, op), 4, W_RECALL_END, KVT_E_PROTO},
	M(make_recall, wire_recall, layer, WIRE_MAX_LAYERS, KVT_E_INVAL),
	M(make_recall, wire_recall, rows, 0, KVT_E_INVAL),
	M(make_recall, wire_recall, rows, 65, KVT_E_INVAL),
	M(make_recall, wire_recall, heads, 0, KVT_E_INVAL),
	M(make_recall, wire_recall, heads, 257, KVT_E_INVAL),
	M(make_recall, wire_recall, heads, 4, KVT_E_PROTO),
	M(make_recall, wire_recall, per_head, 0, KVT_E_INVAL),
	M(make_recall, wire_recall, per_head, WIRE_MAX_QUERIES + 1, KVT_E_INVAL),
	{make_recall, "heads", offsetof(struct wire_recall, per_head), 4, 5, KVT_E_PROTO},
	M(make_recall, wire_recall, dim, 0, KVT_E_INVAL),
	M(make_recall, wire_recall, dim, WIRE_MAX_HEAD_DIM + 1, KVT_E_INVAL),
	{make_recall, "heads", offsetof(struct wire_recall, dim), 4, 32, KVT_E_PROTO},
	M(make_recall, wire_recall, dtype, KVT_DTYPE_OPAQUE, KVT_E_INVAL),
	{make_recall, "heads", offsetof(struct wire_recall, dtype), 4, KVT_DTYPE_F32, KVT_E_PROTO},
	M(make_recall, wire_recall, probe, 1001, KVT_E_INVAL),
	M(make_recall, wire_recall, flags, KVT_RECALL_FLAGS + 1, KVT_E_INVAL),
	M(make_recall, wire_recall, before, WIRE_MAX_NEAR + 1, KVT_E_INVAL),
	M(make_recall, wire_recall, after, WIRE_MAX_NEAR + 1, KVT_E_INVAL),
	M(make_recall, wire_recall, scale, NAN_BITS, KVT_E_INVAL),
	M(make_recall, wire_recall, scale, MINUS_ONE_BITS, KVT_E_INVAL),
	M(make_recall, wire_recall, window.cap, 0, KVT_E_INVAL),
	M(make_recall, wire_recall, window.cap, WIRE_MAX_ROWS + 1, KVT_E_INVAL),
	M(make_recall, wire_recall, window.stage, 1, KVT_E_PROTO),
	M(make_recall, wire_recall, window.score_off, 64, KVT_E_PROTO),
	M(make_recall_reply, wire_recall_reply, heads, 257, KVT_E_INVAL),
	M(make_recall_reply, wire_recall_reply, heads, 4, KVT_E_PROTO),
	{make_recall_reply, "heads", offsetof(struct wire_recall_reply, rows), 4, 4, KVT_E_PROTO},
	{make_recall_reply, "heads", offsetof(struct wire_recall_reply, rows), 4, UINT32_MAX, KVT_E_PROTO},
	{make_recall_reply, "rows", sizeof(struct wire_recall_reply), 4, 3, KVT_E_PROTO},
	{make_recall_reply, "position", sizeof(struct wire_recall_reply) + 12, 4, WIRE_MAX_ROWS, KVT_E_INVAL},
	M(make_admin, wire_admin, argc, 2, KVT_E_PROTO),
	M(make_admin, wire_admin, argc, 4, KVT_E_PROTO),
	M(make_admin, wire_admin, argc, 0, KVT_E_INVAL),
	M(make_admin, wire_admin, argc, WIRE_MAX_ARGS + 1, KVT_E_INVAL),
	M(make_admin, wire_admin, argv_bytes, 0, KVT_E_PROTO),
	M(make_admin, wire_admin, argv_bytes, 15, KVT_E_PROTO),
	M(make_admin, wire_admin, argv_bytes, UINT32_MAX, KVT_E_PROTO),
	{make_admin, "argc", offsetof(struct wire_admin, argv) + 15, 1, 'x', KVT_E_PROTO}, /* last NUL */
	{make_admin, "argv", offsetof(struct wire_admin, argv) + 2, 1, 0x1b, KVT_E_PROTO},
	M(make_hello_reply, wire_reply, status, 1, KVT_E_PROTO),
	M(make_hello_reply, wire_reply, status, -1, KVT_E_PROTO),
	M(make_hello_reply, wire_reply, status, KVT_E_INTERNAL - 1, KVT_E_PROTO),
	{make_hello_reply, "hello reply", offsetof(struct wire_reply, status), 4, (uint64_t)KVT_E_LIMIT,
	 KVT_E_PROTO},
	{make_refusal, "hello reply", offsetof(struct wire_reply, status), 4, 0, KVT_E_PROTO},
	M(make_refusal, wire_reply, pad, 1, KVT_E_PROTO),
	M(make_refusal, wire_reply, text[3], '\n', KVT_E_PROTO),
	M(make_hello_reply, wire_hello_reply, features, WIRE_FEATURES + 1, KVT_E_INVAL),
	M(make_hello_reply, wire_hello_reply, max_seqs, 0, KVT_E_INVAL),
	M(make_hello_reply, wire_hello_reply, ring_entries, 100, KVT_E_INVAL),
	M(make_hello_reply, wire_hello_reply, ctl_bytes, 4096, KVT_E_INVAL),
	M(make_hello_reply, wire_hello_reply, plan_bytes, 0, KVT_E_INVAL),
	M(make_model_reply, wire_model_reply, model, 0, KVT_E_INVAL),
	M(make_model_reply, wire_model_reply, lanes, 0, KVT_E_INVAL),
	M(make_model_reply, wire_model_reply, lanes, CTL_MAX_LANES + 1, KVT_E_INVAL),
	M(make_model_reply, wire_model_reply, pad, 1, KVT_E_PROTO),
	M(make_region_reply, wire_region_reply, region, 0, KVT_E_INVAL),
	M(make_region_reply, wire_region_reply, bytes, 8193, KVT_E_INVAL),
	M(make_region_reply, wire_region_reply, bytes, 0, KVT_E_INVAL),
	M(make_seq_open_reply, wire_seq_open_reply, seq, 0, KVT_E_INVAL),
	M(make_seq_open_reply, wire_seq_open_reply, plan_off, 641, KVT_E_INVAL),
	M(make_seq_open_reply, wire_seq_open_reply, plan_off, UINT64_MAX - 63, KVT_E_INVAL),
	M(make_seq_open_reply, wire_seq_open_reply, plan_bytes, sizeof(struct plan_hdr) - 1, KVT_E_INVAL),
	M(make_seq_open_reply, wire_seq_open_reply, plan_bytes, UINT64_MAX, KVT_E_INVAL),
	M(make_seq_open_reply, wire_seq_open_reply, slot, WIRE_MAX_SEQS, KVT_E_INVAL),
	M(make_seq_open_reply, wire_seq_open_reply, rows, WIRE_MAX_ROWS + 1, KVT_E_INVAL),
	M(make_seq_open_reply, wire_seq_open_reply, pad, 1, KVT_E_PROTO),
	M(make_truncate_reply, wire_seq_truncate_reply, rows, WIRE_MAX_ROWS + 1, KVT_E_INVAL),
	M(make_info_reply, wire_seq_info_reply, rows, WIRE_MAX_ROWS + 1, KVT_E_INVAL),
	M(make_info_reply, wire_seq_info_reply, lanes, CTL_MAX_LANES + 1, KVT_E_INVAL),
	M(make_admin_reply, wire_admin_reply, json_bytes, WIRE_MAX_JSON + 1, KVT_E_INVAL),
};

static bool is_reply(size_t (*fn)(void))
{
	for (size_t i = 0; i < ARRAY_SIZE(messages); i++)
		if (messages[i].make == fn)
			return messages[i].reply;
	fail_msg("not in the table");
	return false;
}

static void test_fields(void **state)
{
	for (size_t i = 0; i < ARRAY_SIZE(mutations); i++) {
		const struct mutation *m = &mutations[i];
		size_t len = make(m->make);
		size_t name = strcspn(m->field, "["); /* key[3] is "key", layer[1].kind is itself */
		int r;

		memcpy(buf + m->off, &m->value, m->size);
		r = wire_check(buf, len, is_reply(m->make), err, sizeof(err));
		if (r != m->want)
			fail_msg("%s = %llu: %d instead of %d (%s)", m->field, (unsigned long long)m->value, r,
				 m->want, r ? err : "accepted");
		if (strncmp(m->field, "layer[", 6) == 0 || strncmp(m->field, "layout[", 7) == 0)
			name = strlen(m->field);
		if (strncmp(err, m->field, name))
			fail_msg("%s = %llu: the line is \"%s\"", m->field, (unsigned long long)m->value, err);
	}
}

/* No string field may run to its end without a NUL. */
static void test_unterminated(void **state)
{
	static const struct {
		size_t (*make)(void);
		size_t off, size;
	} strings[] = {
		{make_hello, offsetof(struct wire_hello, name), 64},
		{make_model, offsetof(struct wire_model, name), 64},
		{make_seq_open, offsetof(struct wire_seq_open, budget.policy), 32},
		{make_plan_request, offsetof(struct wire_plan_request, budget.policy), 32},
		{make_refusal, offsetof(struct wire_reply, text), WIRE_TEXT},
		{make_hello_reply, offsetof(struct wire_reply, text), WIRE_TEXT},
		{make_hello_reply, offsetof(struct wire_hello_reply, version), 32},
		{make_info_reply, offsetof(struct wire_seq_info_reply, policy), 32},
	};

	for (size_t i = 0; i < ARRAY_SIZE(strings); i++) {
		size_t len = make(strings[i].make);

		memset(buf + strings[i].off, 'a', strings[i].size);
		assert_int_equal(wire_check(buf, len, is_reply(strings[i].make), err, sizeof(err)),
				 KVT_E_PROTO);
		assert_non_null(strstr(err, "not terminated"));
	}
}

static void test_model_limits(void **state)
{
	struct wire_model *m = (void *)buf;

	/* 5 layers of 205 heads are 1025 lanes */
	make(make_model);
	wire_init(&m->hdr, W_MODEL, wire_model_len(5), 1);
	wire_string(m->name, sizeof(m->name), "wide");
	m->n_layers = 5;
	m->world = 1;
	for (int i = 0; i < 5; i++)
		m->layer[i] = (struct wire_layer){.kv_heads = 205, .k_bytes = 3};
	assert_int_equal(wire_check(buf, m->hdr.len, false, err, sizeof(err)), KVT_E_INVAL);
	assert_string_equal(err, "lanes (layers x heads): 1025, must be 1..1024");
	m->layer[4].kv_heads = 204;
	assert_int_equal(wire_check(buf, m->hdr.len, false, err, sizeof(err)), 0);
	assert_int_equal(wire_model_lanes(m), 1024);
	m->head_dim = 1; /* opaque elements have no dimension */
	assert_int_equal(wire_check(buf, m->hdr.len, false, err, sizeof(err)), KVT_E_INVAL);
	m->head_dim = 0;
	m->layer[0].kind = KVT_LAYER_SLIDING;
	assert_int_equal(wire_check(buf, m->hdr.len, false, err, sizeof(err)),
			 KVT_E_INVAL); /* needs a window */
	m->layer[0].window = 1024;
	assert_int_equal(wire_check(buf, m->hdr.len, false, err, sizeof(err)), 0);
	strcpy(m->name, "../x");
	assert_int_equal(wire_check(buf, m->hdr.len, false, err, sizeof(err)), KVT_E_INVAL);
	strcpy(m->name, "");
	assert_int_equal(wire_check(buf, m->hdr.len, false, err, sizeof(err)), KVT_E_INVAL);
}

static void test_open_ops(void **state)
{
	struct wire_seq_open *m = (void *)buf;
	size_t len = make(make_seq_open);

	m->op = W_OP_OPEN; /* a parent and a prefix belong to a fork */
	assert_int_equal(wire_check(buf, len, false, err, sizeof(err)), KVT_E_INVAL);
	m->prefix = 0;
	assert_int_equal(wire_check(buf, len, false, err, sizeof(err)), KVT_E_PROTO);
	m->parent = 0;
	assert_int_equal(wire_check(buf, len, false, err, sizeof(err)), 0);
	assert_int_equal(wire_open_layouts(m)[2].cap, 12);
	assert_int_equal(wire_open_table(m)[2], 2);
	m->budget.set = 0; /* keep, and yet a table */
	assert_int_equal(wire_check(buf, len, false, err, sizeof(err)), KVT_E_INVAL);
}

static void test_argv(void **state)
{
	const char *argv[4];

	make(make_admin);
	assert_int_equal(wire_admin_argv((void *)buf, argv, 4), 3);
	assert_string_equal(argv[0], "budget");
	assert_string_equal(argv[1], "0x10");
	assert_string_equal(argv[2], "500");
	assert_null(argv[3]);
	argv[1] = NULL;
	assert_int_equal(wire_admin_argv((void *)buf, argv, 1), 3);
	assert_null(argv[1]);
}

static void test_reply_text(void **state)
{
	struct wire_reply *r = (void *)buf;
	char big[400];

	memset(big, 'x', sizeof(big) - 1);
	big[sizeof(big) - 1] = 0;
	big[5] = '\n';
	wire_reply_init(r, request(W_FETCH), sizeof(struct wire_plan_reply), KVT_E_BUSY, "%s", big);
	assert_int_equal(r->hdr.len, sizeof(*r));
	assert_int_equal(r->hdr.cookie, 7);
	assert_int_equal(strlen(r->text), WIRE_TEXT - 1);
	assert_int_equal(r->text[5], '?');
	assert_int_equal(wire_check(r, sizeof(*r), true, err, sizeof(err)), 0);
}

static void test_layouts(void **state)
{
	struct wire_layer d = {.kv_heads = 4, .k_bytes = 128, .v_bytes = 64};
	struct wire_layout ok = {.k_off = 0,
				 .v_off = 61440,
				 .k_head_stride = 15360,
				 .v_head_stride = 7680,
				 .k_row_stride = 128,
				 .v_row_stride = 64,
				 .cap = 100,
				 .stage = 20},
			   l;
	uint64_t bytes = 61440 + 30720;

#define BAD(field, v)                                                                                          \
	do {                                                                                                   \
		l = ok;                                                                                        \
		l.field = (v);                                                                                 \
		assert_int_equal(wire_layout_check(&l, &d, 3, bytes, 200, err, sizeof(err)), KVT_E_INVAL);     \
		assert_int_equal(strncmp(err, "layout[3].", 10), 0);                                           \
	} while (0)
	assert_int_equal(wire_layout_check(&ok, &d, 3, bytes, 200, err, sizeof(err)), 0);
	assert_int_equal(wire_layout_check(&ok, &d, 3, bytes - 1, 200, err, sizeof(err)), KVT_E_INVAL);
	BAD(k_off, bytes);
	BAD(k_off, UINT64_MAX);
	BAD(v_off, 61441);
	BAD(k_head_stride, 127);
	BAD(k_head_stride, UINT64_MAX);
	BAD(k_head_stride, UINT64_C(1) << 62);
	BAD(v_head_stride, 7681);
	BAD(k_row_stride, 127);
	BAD(v_row_stride, UINT32_MAX);
	BAD(cap, 0);
	BAD(cap, 101);
	BAD(stage, 21);
	BAD(stage, UINT32_MAX);
	BAD(score_off, 2);
	BAD(score_off, bytes);
	BAD(score_off, UINT64_MAX - 3);
#undef BAD
	l = ok;
	l.score_off = 4;
	l.score_head_stride = 799; /* not a multiple of 4 */
	assert_int_equal(wire_layout_check(&l, &d, 3, bytes, 200, err, sizeof(err)), KVT_E_INVAL);
	l.score_head_stride = 796;
	assert_int_equal(wire_layout_check(&l, &d, 3, bytes, 200, err, sizeof(err)), KVT_E_INVAL);
	l.score_head_stride = 800;
	assert_int_equal(wire_layout_check(&l, &d, 3, bytes, 200, err, sizeof(err)), 0);
	d.v_bytes = 0; /* no V: its fields do not matter */
	l.v_off = UINT64_MAX;
	assert_int_equal(wire_layout_check(&l, &d, 3, bytes, 200, err, sizeof(err)), 0);
}

/* The parts of a window that need the model and the region. */
static void test_window_check(void **state)
{
	static const struct wire_layer small = {.kv_heads = 2, .k_bytes = 256, .v_bytes = 256},
				       wide = {.kv_heads = 2, .k_bytes = 4096, .v_bytes = 4096};
	struct wire_layer y[LAYERS];
	struct wire_seq_open *m = (void *)buf;
	const uint64_t region = 8 << 20;

	make_window_open();
	for (int i = 0; i < LAYERS; i++)
		y[i] = small;
	assert_int_equal(wire_window_check(m, y, 2, region, err, sizeof(err)), 0);
	assert_int_equal(wire_window_check(m, y, 2, (4 << 20) + 65536 * LAYERS, err, sizeof(err)), 0);
	assert_int_equal(wire_window_check(m, y, 2, (4 << 20) + 65536 * LAYERS - 4, err, sizeof(err)),
			 KVT_E_INVAL);
	assert_non_null(strstr(err, "score_off"));
	y[1] = wide; /* 128 rows of 8 KiB are 1 MiB, the header is too much */
	assert_int_equal(wire_window_check(m, y, 2, region, err, sizeof(err)), KVT_E_INVAL);
	assert_non_null(strstr(err, "window.out_bytes"));
	m->window.out_bytes += KVT_UNIT;
	assert_int_equal(wire_window_check(m, y, 2, region, err, sizeof(err)), KVT_E_INVAL);
	assert_non_null(strstr(err, "window.in_bytes"));
	m->window.in_bytes += KVT_UNIT;
	assert_int_equal(wire_window_check(m, y, 2, region, err, sizeof(err)), KVT_E_INVAL);
	m->window.in_off = 5 << 20; /* two of them fit there */
	m->window.in_bytes = (2 << 20) + KVT_UNIT;
	assert_int_equal(wire_window_check(m, y, 2, region, err, sizeof(err)), 0);
	m->window.in_bytes -= KVT_UNIT;
	assert_int_equal(wire_window_check(m, y, 2, region, err, sizeof(err)), KVT_E_INVAL);
	y[1] = small;
	m->window.in_off = 2 << 20;
	m->window.in_bytes = 1 << 20;
	wire_open_layouts(m)[2].score_off = (3 << 20) - 4; /* its first bytes are the ring's last */
	assert_int_equal(wire_window_check(m, y, 2, region, err, sizeof(err)), KVT_E_INVAL);
	assert_non_null(strstr(err, "over a ring"));
	wire_open_layouts(m)[2].score_off = 0;
	assert_int_equal(wire_window_check(m, y, 2, region, err, sizeof(err)), 0);
	wire_open_layouts(m)[0].score_head_stride = 32764;
	assert_int_equal(wire_window_check(m, y, 2, region, err, sizeof(err)), KVT_E_INVAL);
	assert_int_equal(wire_window_check(m, y, 1, region, err, sizeof(err)), 0);
	wire_open_layouts(m)[0].score_head_stride = UINT64_MAX - 3;
	assert_int_equal(wire_window_check(m, y, 1, region, err, sizeof(err)), KVT_E_INVAL);
	wire_open_layouts(m)[0].score_head_stride = 32766;
	assert_int_equal(wire_window_check(m, y, 1, region, err, sizeof(err)), KVT_E_INVAL);
	make_window_open();
	m->window.in_off = region - m->window.in_bytes + KVT_UNIT;
	for (int i = 0; i < LAYERS; i++)
		y[i] = small;
	assert_int_equal(wire_window_check(m, y, 2, region, err, sizeof(err)), KVT_E_INVAL);
	assert_non_null(strstr(err, "window.in_off"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_valid),        cmocka_unit_test(test_lengths),
		cmocka_unit_test(test_header),       cmocka_unit_test(test_fields),
		cmocka_unit_test(test_unterminated), cmocka_unit_test(test_model_limits),
		cmocka_unit_test(test_open_ops),     cmocka_unit_test(test_argv),
		cmocka_unit_test(test_reply_text),   cmocka_unit_test(test_layouts),
		cmocka_unit_test(test_fd_counts),    cmocka_unit_test(test_window_check),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
