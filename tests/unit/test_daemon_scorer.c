/* SPDX-License-Identifier: MIT */
/* Networks that clients run: who gets which, and who none. */
#include "scorer_fixture.h"

/* What a client gets is what the weight file folds into, the same for all, and nobody can write it. */
static void the_network_of_a_policy_is_handed_out(void **state)
{
	struct wire_scorer_reply a, b;
	struct seg s = SEG_INIT;
	struct weights *w;
	struct scorer_hdr h;
	struct wlink other;
	struct fixture f;
	char path[200], err[200];
	void *want;

	begin_kvp(&f, 2, NULL);
	assert_int_equal(ask_scorer(&f.l, "", &a), 0);
	assert_string_equal(a.policy, "kvp");
	assert_int_equal(a.coefs, 2);
	assert_int_equal(f.l.n_fds, 1);
	assert_int_equal(seg_map(&s, SEG_PUBLISHED, f.l.fds[0], a.bytes), 0);
	file_of(&f, path, sizeof(path));
	assert_int_equal(weights_load(&w, path, err, sizeof(err)), 0);
	assert_int_equal(scorer_header(&h, w, err, sizeof(err)), 0);
	want = aligned_alloc(256, ALIGN_UP(h.bytes, UINT64_C(256)));
	memset(want, 0, h.bytes);
	assert_int_equal(scorer_build(want, &h, w), 0);
	assert_true(a.bytes >= h.bytes);
	assert_memory_equal(s.addr, want, h.bytes);
	assert_int_equal(h.id, a.id);
	free(want);
	weights_free(w);
	seg_close(&s);
	/* Again, by name, and for somebody else who asks while nobody else does. */
	assert_int_equal(ask_scorer(&f.l, "kvp", &b), 0);
	assert_int_equal(b.id, a.id);
	close(f.l.fds[0]);
	assert_int_equal(wl_connect(&other, f.h.sock[0]), 0);
	register_kvp(&other);
	assert_int_equal(ask_scorer(&other, "", &b), 0);
	assert_int_equal(b.id, a.id);
	close(other.fds[0]);
	wl_close(&other);
	finish(&f);
}

static void what_has_no_network_says_so(void **state)
{
	struct wire_scorer_reply a;
	struct wire_scorer m;
	struct fixture f;

	begin_kvp(&f, 2, NULL);
	assert_int_equal(ask_scorer(&f.l, "streaming", &a), KVT_E_NOENT);
	assert_non_null(strstr(wl_text(&f.l), "no network"));
	assert_int_equal(ask_scorer(&f.l, "client", &a), KVT_E_NOENT);
	assert_int_equal(ask_scorer(&f.l, "nonsense", &a), KVT_E_NOENT);
	assert_non_null(strstr(wl_text(&f.l), "nonsense"));
	assert_int_equal(wl_model(&f.l, "untrained", KVT_DTYPE_F16, DIM, 2, 2, DIM * 2, DIM * 2), 0);
	assert_int_equal(ask_scorer(&f.l, "", &a), KVT_E_NOENT);
	assert_non_null(strstr(wl_text(&f.l), "untrained.kvp"));
	wire_init(&m.hdr, W_SCORER, sizeof(m), 13);
	m.model = 77;
	assert_int_equal(wl_call(&f.l, &m.hdr), KVT_E_STALE);
	assert_int_equal(harness_stat(&f.h).hangups_protocol, 0);
	finish(&f);
}

/* The workers go on with what nobody wants any more; the file may be gone by then. */
static void a_client_may_leave_while_its_network_is_made(void **state)
{
	for (int i = 0; i < 12; i++) {
		struct wire_scorer m;
		struct fixture f;
		char path[200];

		begin_kvp(&f, 2, NULL);
		wire_init(&m.hdr, W_SCORER, sizeof(m), 12);
		m.model = f.l.model;
		if (i % 3 == 1) {
			/* A policy object is there, its file is not. */
			file_of(&f, path, sizeof(path));
			assert_int_equal(sock_send(f.l.fd, &m, sizeof(m), NULL, 0), 0);
			unlink(path);
		} else {
			assert_int_equal(sock_send(f.l.fd, &m, sizeof(m), NULL, 0), 0);
		}
		usleep(1000u * (unsigned)(i / 3));
		wl_close(&f.l);
		if (i % 2) {
			harness_stop(&f.h);
		} else {
			struct wire_scorer_reply a;

			assert_int_equal(wl_connect(&f.l, f.h.sock[0]), 0);
			register_kvp(&f.l);
			assert_true(ask_scorer(&f.l, "", &a) == 0 || i % 3 == 1);
			wl_close(&f.l);
			harness_stop(&f.h);
		}
		harness_rm(f.h.dir);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_network_of_a_policy_is_handed_out),
		cmocka_unit_test(what_has_no_network_says_so),
		cmocka_unit_test(a_client_may_leave_while_its_network_is_made),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
