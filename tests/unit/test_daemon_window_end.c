/* SPDX-License-Identifier: MIT */
/* What clients with a window do wrong, and how they end. */
#include <sys/prctl.h>
#include <sys/wait.h>
#include "window_fixture.h"

/* ---- what a GPU gets wrong ---------------------------------------------------------------- */

static void a_page_that_is_not_what_was_said_is_a_miss(void **state)
{
	struct fixture f;
	struct wseq q;
	struct core_stat st;

	begin(&f, true);
	begin_seq(&f, &q, 4, KVT_EPHEMERAL, 1 << 20, 1000);
	q.bad_crc = 7;
	assert_int_equal(wq_plan(&q, 300, 300, KVT_ROWS_ALL), 0); /* the second attempt */
	st = harness_stat(&f.h);
	assert_int_equal(st.miss_client_mutated, 1);
	assert_int_equal(st.plans_cancelled, 1);
	q.bad_plan = 0;
	assert_int_equal(wq_plan(&q, 200, 300, KVT_ROWS_ALL), 0);
	assert_int_equal(harness_stat(&f.h).miss_client_mutated, 2);
	q.bad_page = 3;
	assert_int_equal(wq_plan(&q, 50, 300, KVT_ROWS_ALL), 0);
	st = harness_stat(&f.h);
	assert_int_equal(st.miss_client_mutated, 3);
	assert_int_equal(st.miss_corrupt + st.miss_io + st.miss_stale + st.miss_nospace + st.hangups_protocol,
			 0);
	assert_int_equal(wq_info(&q).misses, 3);
	assert_int_equal(wq_info(&q).dropped_rows, 0);
	assert_int_equal(wq_plan(&q, 1000, 0, KVT_ROWS_ALL), 0);
	assert_int_equal(q.count[3], 1000);
	assert_int_equal(wq_wrong(&q), 0);
	assert_int_equal(wq_close(&q, false), 0);
	assert_empty(&f);
	wq_free(&q);
	finish(&f);
}

static void pages_that_rot_are_not_brought_in(void **state)
{
	struct fixture f;
	struct wseq q;
	struct core_stat st;

	harness_init(&f.h, false);
	strcpy(f.h.cfg.dram_fault, "seed=3,flip=150");
	assert_true(harness_start(&f.h));
	assert_int_equal(wl_connect(&f.l, f.h.sock[0]), 0);
	assert_int_equal(wl_model(&f.l, "bytes", KVT_DTYPE_OPAQUE, 0, 3, 3, K, V), 0);
	begin_seq(&f, &q, 5, KVT_EPHEMERAL, RING, 1000);
	assert_int_equal(wq_plan(&q, 100, KVT_ROWS_ALL, 0), 0);
	for (int i = 0; i < 4; i++) {
		assert_int_equal(wq_plan(&q, 1000, KVT_ROWS_ALL, 0), 0);
		assert_int_equal(wq_wrong(&q), 0);
		assert_int_equal(wq_plan(&q, 100, KVT_ROWS_ALL, 0), 0);
	}
	st = harness_stat(&f.h);
	assert_true(st.miss_corrupt > 0);
	assert_int_equal(st.hangups_protocol, 0);
	wq_free(&q);
	finish(&f);
}

enum lie { GATHERED_BEYOND, GATHERED_AHEAD, GATHERED_BACK, DRAINED_BEYOND, DRAINED_AHEAD, DRAINED_BACK, LIES };

static void cursors_that_cannot_be_end_the_client(void **state)
{
	for (int lie = 0; lie < LIES; lie++) {
		struct fixture f;
		struct wseq q;
		struct wire_budget b = wq_budget(900, 900, 0);
		_Atomic uint64_t *word;
		uint64_t id, now;

		begin(&f, false);
		begin_seq(&f, &q, 6, KVT_EPHEMERAL, RING, 1000);
		assert_int_equal(wq_plan(&q, 200, KVT_ROWS_ALL, 0), 0);
		b.device_rows = lie < DRAINED_BEYOND ? 100 : 900;
		assert_int_equal(wq_ask(&q, &b, &id), 0);
		q.stop_out = q.stop_in = true; /* the plan stays as it is */
		for (int i = 0; i < 5000 && q.plan < id; i++) {
			assert_int_equal(wq_step(&q), 0);
			usleep(200);
		}
		assert_int_equal(q.plan, id);
		for (int i = 0; i < 5000 && lie >= DRAINED_BEYOND && !plan_staged(&q.view); i++)
			usleep(200);
		word = lie < DRAINED_BEYOND ? &q.slot->gathered : &q.slot->drained;
		now = atomic_load(word);
		switch (lie % 3) {
		case 0:
			now = window_cursor(id, lie ? plan_staged(&q.view) + 1 : q.view.out_pages + 1);
			break;
		case 1:
			now = window_cursor(id + 1, 0);
			break;
		case 2:
			atomic_store(word, window_cursor(id, 0));
			wq_poke(&q);
			harness_stat(&f.h);
			now = window_cursor(id - 1, 1);
			break;
		}
		if (lie % 3 == 2)
			usleep(30000); /* seen */
		atomic_store(word, now);
		wq_poke(&q);
		assert_ended(&f);
		assert_empty(&f);
		wq_free(&q);
		finish(&f);
	}
}

/* ---- the end --------------------------------------------------------------------------------- */

static void what_was_stored_is_resumed(void **state)
{
	struct wire_budget b = wq_budget(KVT_ROWS_ALL, KVT_ROWS_ALL, KVT_ROWS_ALL);
	struct fixture f;
	struct wseq q, r;

	begin(&f, true);
	begin_seq(&f, &q, 7, KVT_LEASED, RING, 900);
	assert_int_equal(wq_plan(&q, 0, 300, KVT_ROWS_ALL), 0); /* as kvtier_cuda_settle() saves */
	assert_int_equal(q.count[0], 0);
	assert_int_equal(wq_append(&q, 50), 0); /* these nobody saves */
	assert_int_equal(wq_close(&q, false), 0);
	strcpy(b.policy, "client");
	assert_int_equal(wq_make(&r, &f.l, 7, 1200, 1200, 4096, RING, RING, 1), 0);
	assert_int_equal(wq_open(&r, W_OP_RESUME, KVT_LEASED, 0, 0, &b), 0);
	assert_int_equal(r.rows, 950);
	memcpy(r.salts, q.salts, r.max_rows * sizeof(*r.salts));
	assert_int_equal(wq_info(&r).dropped_rows, 50 * f.l.lanes);
	assert_int_equal(wq_append(&r, 30), 0);
	assert_int_equal(wq_plan(&r, KVT_ROWS_ALL, 0, KVT_ROWS_ALL), 0);
	for (uint32_t l = 0; l < f.l.lanes; l++)
		assert_int_equal(r.count[l], 930);
	assert_int_equal(wq_wrong(&r), 0);
	any_life(&f, &r, 12);
	assert_no_miss(&f);
	assert_int_equal(wq_close(&r, true), 0);
	assert_empty(&f);
	wq_free(&q);
	wq_free(&r);
	finish(&f);
}

/* In a process of its own, which is killed in the middle of a plan. */
static pid_t doomed(struct fixture *f, bool linger)
{
	int ready[2];
	pid_t pid;
	char c;

	assert_int_equal(pipe(ready), 0);
	pid = fork();
	if (!pid) {
		struct wire_budget b = wq_budget(100, 300, KVT_ROWS_ALL);
		struct fixture g;
		struct wseq q;
		uint64_t id;

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(ready[0]);
		if (wl_connect(&g.l, f->h.sock[0]) || wl_model(&g.l, "bytes", 0, 0, 3, 3, K, V))
			_exit(1);
		strcpy(b.policy, "client");
		if (wq_make(&q, &g.l, 8, 1200, 1200, 4096, RING, RING, 1) ||
		    wq_open(&q, W_OP_OPEN, KVT_LEASED, 0, 0, &b) || wq_append(&q, 1000) || wq_ask(&q, &b, &id))
			_exit(2);
		for (int i = 0; i < 30; i++)
			if (wq_step(&q) < 0)
				_exit(3);
		if (linger) {
			close(g.l.fd);
			close(ready[1]);
			pause();
		}
		if (write(ready[1], "x", 1) != 1)
			_exit(4);
		for (;;)
			wq_step(&q);
	}
	close(ready[1]);
	assert_int_equal(read(ready[0], &c, 1), linger ? 0 : 1);
	close(ready[0]);
	return pid;
}

static void a_client_may_die_in_the_middle(void **state)
{
	struct wire_budget b = wq_budget(KVT_ROWS_ALL, KVT_ROWS_ALL, KVT_ROWS_ALL);

	for (int round = 0; round < 4; round++) {
		struct fixture f;
		struct wseq r;
		uint32_t below;
		pid_t pid;
		int how;

		begin(&f, true);
		pid = doomed(&f, false);
		usleep(1000 * (unsigned)round);
		kill(pid, SIGKILL);
		assert_int_equal(waitpid(pid, &how, 0), pid);
		assert_true(WIFSIGNALED(how));
		strcpy(b.policy, "client");
		assert_int_equal(wq_make(&r, &f.l, 8, 1200, 1200, 4096, RING, RING, 1), 0);
		for (int i = 0; (how = wq_open(&r, W_OP_RESUME, KVT_LEASED, 0, 0, &b)) == KVT_E_BUSY && i < 100;
		     i++)
			usleep(5000);
		assert_int_equal(how, 0);
		assert_int_equal(r.rows, 1000);
		below = (uint32_t)(wq_info(&r).tier_rows[KVT_TIER_DRAM] + wq_info(&r).tier_rows[KVT_TIER_NVME]);
		assert_int_equal(wq_info(&r).dropped_rows + below, 1000 * f.l.lanes);
		assert_int_equal(wq_plan(&r, KVT_ROWS_ALL, 0, KVT_ROWS_ALL), 0);
		for (uint32_t l = 0; l < f.l.lanes; l++)
			below -= r.count[l];
		assert_int_equal(below, 0);
		assert_int_equal(wq_wrong(&r), 0); /* pages that were whole, whatever the moment */
		assert_no_miss(&f);
		wq_free(&r);
		finish(&f);
	}
}

static uint64_t region_room(struct fixture *f)
{
	struct wire_region g;
	uint64_t lo = 0, hi = UINT64_C(64) << 20;

	while (lo < hi) { /* the largest region that the quota leaves, in pages */
		uint64_t mid = (lo + hi + 4096) / 2 / 4096 * 4096;
		struct wire_handle c;

		wire_init(&g.hdr, W_REGION, sizeof(g), 3);
		g.bytes = mid;
		if (wl_call(&f->l, &g.hdr)) {
			hi = mid - 4096;
			continue;
		}
		lo = mid;
		close(f->l.fds[0]);
		wire_init(&c.hdr, W_REGION_CLOSE, sizeof(c), 4);
		c.handle = ((struct wire_region_reply *)f->l.reply)->region;
		assert_int_equal(wl_call(&f->l, &c.hdr), 0);
	}
	return lo;
}

/* A connection that is closed says nothing about the copies of a GPU; the end of its process does. */
static void memory_is_charged_until_the_process_is_gone(void **state)
{
	struct fixture f;
	uint64_t room;
	pid_t pid;

	harness_init(&f.h, false);
	f.h.cfg.tenant[0].region_bytes = UINT64_C(64) << 20;
	assert_true(harness_start(&f.h));
	assert_int_equal(wl_connect(&f.l, f.h.sock[0]), 0);
	assert_int_equal(region_room(&f), UINT64_C(64) << 20);
	pid = doomed(&f, true);
	for (int i = 0; i < 200 && harness_stat(&f.h).clients > 1; i++)
		usleep(5000);
	assert_int_equal(harness_stat(&f.h).clients, 1);
	room = region_room(&f);
	if (room == UINT64_C(64) << 20 && harness_stat(&f.h).seqs) { /* no SO_PEERPIDFD */
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
		finish(&f);
		print_message("# SKIP the kernel gives no descriptor of the peer's process\n");
		skip();
	}
	assert_true(room < UINT64_C(64) << 20);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	for (int i = 0; i < 200 && room < UINT64_C(64) << 20; i++) {
		room = region_room(&f);
		usleep(5000);
	}
	assert_int_equal(room, UINT64_C(64) << 20);
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_page_that_is_not_what_was_said_is_a_miss),
		cmocka_unit_test(pages_that_rot_are_not_brought_in),
		cmocka_unit_test(cursors_that_cannot_be_end_the_client),
		cmocka_unit_test(what_was_stored_is_resumed),
		cmocka_unit_test(a_client_may_die_in_the_middle),
		cmocka_unit_test(memory_is_charged_until_the_process_is_gone),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
