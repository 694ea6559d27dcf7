/* SPDX-License-Identifier: MIT */
/* Opening sequences with a window: what is refused and how it is said, and which policies such rows get. */
#include <sys/mman.h>
#include "window_fixture.h"

static struct wire_budget all = {.set = 1,
				 .manual = 1,
				 .device_rows = KVT_ROWS_ALL,
				 .dram_rows = KVT_ROWS_ALL,
				 .nvme_rows = KVT_ROWS_ALL};

static void refused(struct wseq *q, union wopen *u, int status, const char *field)
{
	assert_int_equal(wq_send(q, u), status);
	if (!strstr(wl_text(q->l), field))
		fail_msg("\"%s\" does not name %s", wl_text(q->l), field);
	wq_message(q, u, W_OP_OPEN, &all);
}

static void places_that_cannot_be_are_refused(void **state)
{
	struct fixture f;
	union wopen u;
	struct wseq q;

	begin(&f, false);
	assert_int_equal(wq_make(&q, &f.l, 1, 1200, 1200, 4096, RING, RING, 1), 0);
	wq_message(&q, &u, W_OP_OPEN, &all);
	u.o.window.out_bytes = 8192; /* less than a page */
	refused(&q, &u, KVT_E_INVAL, "window.out_bytes");
	u.o.window.in_bytes = 20480; /* less than two */
	refused(&q, &u, KVT_E_INVAL, "window.in_bytes");
	u.o.window.out_off = ALIGN_UP(q.region.size, 4096);
	refused(&q, &u, KVT_E_INVAL, "window.out_off");
	u.o.window.in_off = q.region.size - 4096;
	refused(&q, &u, KVT_E_INVAL, "window.in_off");
	wire_open_layouts(&u.o)[1].score_off = 4096 + RING - 4;
	refused(&q, &u, KVT_E_INVAL, "layout[1].score_off");
	wire_open_layouts(&u.o)[2].score_off = q.region.size - 4096;
	refused(&q, &u, KVT_E_INVAL, "layout[2].score_off");
	wire_open_layouts(&u.o)[0].k_row_stride = 48;
	refused(&q, &u, KVT_E_INVAL, "layout[0].k_row_stride");
	u.o.scorer = 4711;
	refused(&q, &u, KVT_E_STALE, "scorer");
	u.o.flags = W_OPEN_DIRECT;
	refused(&q, &u, KVT_E_INVAL, "flags");
	u.o.op = W_OP_FORK;
	refused(&q, &u, KVT_E_INVAL, "op: fork");
	assert_int_equal(wq_send(&q, &u), 0); /* as it was */
	wq_free(&q);
	assert_int_equal(harness_stat(&f.h).hangups_protocol, 0);
	finish(&f);
}

static void a_window_needs_memory_of_the_daemon(void **state)
{
	struct wire_region m;
	struct fixture f;
	union wopen u;
	struct wseq q;
	int fd = memfd_create("file", MFD_CLOEXEC);

	begin(&f, false);
	assert_int_equal(ftruncate(fd, 8 << 20), 0);
	assert_int_equal(wq_make(&q, &f.l, 2, 1200, 1200, 4096, RING, RING, 1), 0);
	wire_init(&m.hdr, W_REGION_IMPORT, sizeof(m), 3);
	m.bytes = 8 << 20;
	assert_int_equal(sock_send(f.l.fd, &m, sizeof(m), &fd, 1), 0);
	assert_true(sock_wait(f.l.fd, POLLIN, now_ns() + UINT64_C(5000000000)) > 0);
	assert_true(sock_recv(f.l.fd, f.l.reply, sizeof(f.l.reply), NULL, NULL) > 0);
	assert_int_equal(((struct wire_reply *)f.l.reply)->status, 0);
	wq_message(&q, &u, W_OP_OPEN, &all);
	u.o.region = ((struct wire_region_reply *)f.l.reply)->region;
	refused(&q, &u, KVT_E_INVAL, "imported");
	close(fd);
	wq_free(&q);
	finish(&f);
}

/* What the daemon would need the rows for. */
static void what_needs_the_rows_is_refused(void **state)
{
	struct wire_recall *r;
	_Alignas(8) uint8_t buf[1024];
	struct fixture f;
	union wopen u;
	struct wseq q, kid;

	begin(&f, false);
	assert_int_equal(wl_model(&f.l, "floats", KVT_DTYPE_F32, 12, 1, 3, 48, 48), 0);
	assert_int_equal(wq_make(&q, &f.l, 3, 1200, 1200, 4096, 64 << 10, 64 << 10, 1), 0);
	assert_int_equal(wq_open(&q, W_OP_OPEN, KVT_EPHEMERAL, 0, 0, &all), 0);
	assert_int_equal(wq_append(&q, 100), 0);
	/* A fork, said to have rows in the region. */
	assert_int_equal(wq_make(&kid, &f.l, 4, 100, 100, 300, 64 << 10, 64 << 10, 1), 0);
	wq_message(&kid, &u, W_OP_FORK, &all);
	u.o.flags = 0;
	memset(&u.o.window, 0, sizeof(u.o.window));
	u.o.parent = q.handle;
	u.o.prefix = 50;
	*wire_open_layouts(&u.o) = (struct wire_layout){.k_row_stride = 48, .v_row_stride = 48, .cap = 10};
	wire_open_layouts(&u.o)->k_head_stride = wire_open_layouts(&u.o)->v_head_stride = 480;
	assert_int_equal(wq_send(&kid, &u), KVT_E_INVAL);
	assert_non_null(strstr(wl_text(&f.l), "parent: a sequence with a window"));
	/* A search. */
	r = (struct wire_recall *)buf;
	wire_init(&r->hdr, W_RECALL, wire_recall_len(3, 12, 4), 7);
	r->seq = q.handle;
	r->rows = 8;
	r->heads = 3;
	r->per_head = 1;
	r->dim = 12;
	r->dtype = KVT_DTYPE_F32;
	r->window = (struct wire_layout){.k_row_stride = 48, .v_row_stride = 48, .cap = 8};
	assert_int_equal(wl_call(&f.l, &r->hdr), KVT_E_INVAL);
	assert_non_null(strstr(wl_text(&f.l), "window"));
	/* But they may be told of one to come. */
	wire_init(&r->hdr, W_RECALL, sizeof(*r), 8);
	r->seq = q.handle;
	r->op = W_RECALL_PREPARE;
	assert_int_equal(wl_call(&f.l, &r->hdr), 0);
	assert_int_equal(wq_plan(&q, 20, KVT_ROWS_ALL, 0), 0);
	assert_int_equal(wq_plan(&q, 100, KVT_ROWS_ALL, 0), 0);
	assert_int_equal(wq_wrong(&q), 0);
	assert_int_equal(harness_stat(&f.h).hangups_protocol, 0);
	wq_free(&q);
	wq_free(&kid);
	finish(&f);
}

struct asked {
	const struct wseq *q;
	char policy[32], reason[200], set[32];
	bool window;
};

static void ask(struct core *c, void *arg)
{
	struct asked *a = arg;
	struct core_seq_stat st;
	char err[200];

	if (a->set[0])
		assert_int_equal(core_policy_set(c, a->q->handle, a->set, err, sizeof(err)), 0);
	assert_int_equal(core_seq_stat(c, a->q->handle, &st), 0);
	snprintf(a->policy, sizeof(a->policy), "%s", st.policy);
	snprintf(a->reason, sizeof(a->reason), "%s", st.policy_reason ? st.policy_reason : "");
	a->window = st.window;
}

/* Rows without scores: a policy that reads none, and why. */
static void rows_that_come_without_scores_get_a_policy_that_needs_none(void **state)
{
	static const char *const want[][2] = {{"keydiff", "streaming"},
					      {"knorm", "streaming"},
					      {"random", "random"},
					      {"client", "streaming"}};
	struct fixture f;
	struct wseq q;

	begin(&f, false);
	assert_int_equal(wl_model(&f.l, "floats", KVT_DTYPE_F32, 12, 1, 3, 48, 48), 0);
	assert_int_equal(wq_make(&q, &f.l, 5, 1200, 1200, 4096, 64 << 10, 64 << 10, 0), 0);
	assert_int_equal(wq_open(&q, W_OP_OPEN, KVT_EPHEMERAL, 0, 0, &all), 0);
	assert_int_equal(wq_append(&q, 600), 0);
	for (size_t i = 0; i < ARRAY_SIZE(want); i++) {
		struct asked a = {.q = &q};

		snprintf(a.set, sizeof(a.set), "%s", want[i][0]);
		harness_call(&f.h, ask, &a);
		assert_int_equal(wq_plan(&q, 100 + 50 * (uint32_t)i, KVT_ROWS_ALL, 0), 0);
		assert_int_equal(wq_wrong(&q), 0);
		a.set[0] = 0;
		harness_call(&f.h, ask, &a);
		assert_string_equal(a.policy, want[i][1]);
		assert_true(a.window);
		if (strcmp(want[i][0], want[i][1]))
			assert_memory_equal(a.reason, want[i][0], strlen(want[i][0]));
		else
			assert_string_equal(a.reason, "");
		for (uint32_t k = 0; !i && k < q.count[1]; k++) /* streaming keeps the newest */
			assert_true(*wq_pos(&q, 1, k) < 4 || *wq_pos(&q, 1, k) >= 600 - 96);
	}
	wq_free(&q);
	finish(&f);
}

/* A sequence may come back with its rows in a region, or in a GPU's memory, as it likes. */
static void a_sequence_may_change_its_kind_when_it_is_resumed(void **state)
{
	struct fixture f;
	struct runtime rt;
	struct rt_seq host;
	struct wseq q;
	struct kvtier_budget keep = {
		.size = sizeof(keep), .device_rows = KVT_ROWS_ALL, .nvme_rows = KVT_ROWS_ALL};
	struct kvtier_seq_opts o;
	uint32_t rows;

	keep.manual = 1;
	begin(&f, true);
	assert_int_equal(rt_open_dims(&rt, f.h.sock[0], 3, 3, K, V, 0, 0), 0);
	assert_int_equal(wl_model(&f.l, "pattern", KVT_DTYPE_OPAQUE, 0, 3, 3, K, V), 0);
	assert_int_equal(wq_make(&q, &f.l, 6, 1200, 1200, 4096, RING, RING, 1), 0);
	assert_int_equal(wq_open(&q, W_OP_OPEN, KVT_LEASED, 0, 0, &all), 0);
	assert_int_equal(wq_append(&q, 700), 0);
	assert_int_equal(wq_plan(&q, 0, 0, KVT_ROWS_ALL), 0);
	assert_int_equal(wq_close(&q, false), 0);
	assert_int_equal(rt_prepare(&host, &rt, 6, 1200, 1200, 4096), 0);
	o = rt_opts(&host, KVT_LEASED, &keep);
	memset(o.secret, 0x5a, sizeof(o.secret));
	assert_int_equal(kvtier_seq_resume(rt.c, rt.m, &o, &host.s, &rows), 0);
	assert_int_equal(rows, 700);
	host.rows = rows;
	assert_int_equal(rt_plan(&host, 700, 0, KVT_ROWS_ALL, NULL), 0);
	for (uint32_t l = 0; l < rt.lanes; l++) {
		uint32_t pos[700];

		assert_int_equal(rt_resident(&host, l, pos), 700);
		for (uint32_t s = 0; s < 700; s += 7)
			for (uint32_t b = 0; b < K; b++)
				assert_int_equal(rt_row(&host, l, s, false)[b], wq_byte(&q, l, pos[s], b));
	}
	rt_seq_free(&host, true);
	rt_close(&rt);
	wq_free(&q);
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(places_that_cannot_be_are_refused),
		cmocka_unit_test(a_window_needs_memory_of_the_daemon),
		cmocka_unit_test(what_needs_the_rows_is_refused),
		cmocka_unit_test(rows_that_come_without_scores_get_a_policy_that_needs_none),
		cmocka_unit_test(a_sequence_may_change_its_kind_when_it_is_resumed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
