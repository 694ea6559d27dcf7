/* SPDX-License-Identifier: MIT */
/*
 * When the GPU, its driver, the daemon or the runtime fails: every call says so, what is stored below stays,
 * and nothing of the GPU is left behind.
 */
#include <sys/wait.h>
#include "tests/unit/gpu_fixture.h"

#define ROWS 300u

/* One whole life of a runtime. The first error, with everything given back whatever happened. */
static int whole_life(uint32_t id, uint32_t flags, bool *ret_settled)
{
	struct gpu g = {0};
	struct gpu_seq q = {0};
	struct kvtier_cuda_window *w = NULL;
	struct runtime own;
	int r = rt_open(&own, h.sock[0], 2);

	*ret_settled = false;
	assert_ok(r);
	r = kvtier_cuda_open(NULL, &g.g);
	g.d = g.g ? g.g->d : NULL;
	if (!r)
		r = kvtier_cuda_window_create(own.c, g.g, 1 << 20, &w);
	if (!r && gpu_prepare(&q, &g, &own, w, id, 400, 400, 1000, 0))
		r = KVT_E_GPU; /* the runtime's own memory */
	q.flags = flags;
	if (!r)
		r = gpu_seq_open(&q, KVT_LEASED, NULL, 1 << 16);
	if (!r)
		r = gpu_append(&q, ROWS);
	if (!r)
		r = gpu_plan(&q, 100, 100, KVT_ROWS_ALL, NULL);
	if (!r)
		r = gpu_plan(&q, 250, 100, KVT_ROWS_ALL, NULL);
	if (!r)
		r = kvtier_seq_truncate(q.rt.s, 200);
	if (!r)
		r = kvtier_cuda_settle(q.rt.s, 1, 5000, q.stream);
	if (!r)
		*ret_settled = true;
	if (q.gpu)
		gpu_seq_free(&q, true);
	kvtier_cuda_window_close(w);
	gpu_close(&g);
	rt_close(&own);
	return r;
}

static void drop_orphans(void)
{
	assert_int_equal(harness_stat(&h).seqs, 0);
	assert_int_equal(harness_stat(&h).orphans, 0);
}

/* GPU or pinned memory ends after n allocations, for every n, for good and once. */
static void test_out_of_memory(void **state)
{
	int fds, failed = 0;
	bool settled = false;

	begin_core(true);
	assert_ok(whole_life(1, 0, &settled)); /* what is made once stays */
	usleep(200000);
	fds = open_fds();
	for (int n = 0; n < 40; n++) {
		char words[64];
		int r;

		snprintf(words, sizeof(words), "oom_after=%d", n);
		fake.set(words);
		r = whole_life(2 + (uint32_t)n, 0, &settled);
		if (!r)
			break;
		failed++;
		assert_true(r == KVT_E_NOMEM || r == KVT_E_GPU);
		fake.set(NULL);
		assert_baseline();
		drop_orphans();
	}
	assert_true(settled && failed >= 6);
	for (int n = 1; n <= 6; n++) {
		static const char *const calls[] = {"cuMemAlloc_v2", "cuMemHostAlloc", "cuMemHostRegister_v2"};
		char words[64];

		for (size_t i = 0; i < ARRAY_SIZE(calls); i++) {
			snprintf(words, sizeof(words), "fail=%s:2@%d", calls[i], n);
			fake.set(words);
			(void)whole_life(100 + (uint32_t)n, 0, &settled);
			fake.set(NULL);
			assert_baseline();
			drop_orphans();
		}
	}
	assert_ok(whole_life(200, 0, &settled));
	/* the daemon, which is in this process too, closes its own when it hears of the end */
	for (int i = 0; i < 200 && open_fds() > fds; i++)
		usleep(10000);
	assert_true(open_fds() <= fds);
	end_core();
	assert_baseline();
}

/* Any call of the driver refuses once, at any time, with something that passes. */
static void test_calls_that_fail(void **state)
{
	static const char *const calls[] = {
		"cuLaunchKernel",  "cuMemcpyHtoDAsync_v2",         "cuStreamSynchronize", "cuStreamCreate",
		"cuMemsetD8Async", "cuMemHostGetDevicePointer_v2", "cuFuncSetAttribute"};
	int refused = 0;
	bool settled;

	begin_core(true);
	for (size_t i = 0; i < ARRAY_SIZE(calls); i++)
		for (int n = 1; n <= 9; n += 2) {
			char words[64];
			int r;

			snprintf(words, sizeof(words), "fail=%s:1@%d", calls[i], n);
			fake.set(words);
			r = whole_life((uint32_t)(i * 100) + (uint32_t)n, 0, &settled);
			refused += r != 0;
			if (r && r != KVT_E_GPU && r != KVT_E_IO)
				fail_msg("%s: %s (%d)", words, kvtier_last_error(), r);
			fake.set(NULL);
			assert_baseline();
			drop_orphans();
		}
	assert_true(refused >= 15);
	end_core();
}

/* ---- a GPU that is gone -------------------------------------------------------------------------- */

/* The nth kernel dies halfway. Whatever was stored before comes back afterwards, byte for byte. */
static void lost_at(int n, const char *mode, uint32_t flags)
{
	struct gpu_seq q, again;
	uint32_t *salts = calloc(1000, sizeof(*salts)), rows;
	char words[64];
	int r = 0;

	begin(true, 1 << 20);
	assert_ok(gpu_prepare(&q, &gpu, &rt, window, 50, 400, 400, 1000, 0));
	q.flags = flags;
	assert_ok(gpu_seq_open(&q, KVT_LEASED, NULL, 1 << 14));
	assert_ok(gpu_append(&q, ROWS));
	assert_ok(kvtier_cuda_settle(q.rt.s, 1, 10000, q.stream)); /* ROWS are stored */
	snprintf(words, sizeof(words), "crash=719@%d%s", n, mode);
	fake.set(words);
	for (int i = 0; i < 40 && !r; i++) {
		r = gpu_append(&q, 20);
		if (r == KVT_E_NOSPC)
			r = 0;
		if (!r)
			r = gpu_plan(&q, i % 2 ? 350 : 80, 100, KVT_ROWS_ALL, NULL);
	}
	assert_said(r, KVT_E_GPU, "CUDA_ERROR_LAUNCH_FAILED (719)");
	rows = q.rt.rows;
	/* every call says so */
	assert_said(kvtier_cuda_append(q.rt.s, rows, 1), KVT_E_GPU, "(719)");
	assert_said(kvtier_cuda_push(q.rt.s, q.stream), KVT_E_GPU, "(719)");
	assert_said(kvtier_cuda_poll(q.rt.s, q.stream, NULL), KVT_E_GPU, "(719)");
	assert_said(kvtier_cuda_apply(q.rt.s, 1, NULL, NULL, q.stream), KVT_E_GPU, "(719)");
	assert_said(kvtier_cuda_settle(q.rt.s, 0, 100, q.stream), KVT_E_GPU, "(719)");
	assert_said(kvtier_seq_truncate(q.rt.s, 0), KVT_E_GPU, "(719)");
	assert_true(kvtier_cuda_counts(q.rt.s, q.counts) >= 0);
	memcpy(salts, q.rt.salts, 1000 * sizeof(*salts));
	gpu_seq_free(&q, false);
	end_runtime();
	assert_baseline();
	fake.set(NULL);
	/* a new process, for all that the daemon knows */
	assert_ok(rt_open(&rt, h.sock[0], 2));
	assert_ok(gpu_open(&gpu));
	assert_ok(kvtier_cuda_window_create(rt.c, gpu.g, 1 << 20, &window));
	assert_ok(gpu_prepare(&again, &gpu, &rt, window, 50, 1000, 1000, 1000, 0));
	again.flags = flags;
	free(again.rt.salts);
	again.rt.salts = salts;
	assert_ok(gpu_seq_resume(&again, NULL, 1 << 16));
	assert_true(again.rt.rows >= ROWS && again.rt.rows <= rows);
	assert_ok(gpu_plan(&again, 1000, 1000, KVT_ROWS_ALL, NULL));
	/* All that was saved; what came later as far as it got. */
	assert_true(kvtier_cuda_counts(again.rt.s, again.counts) >= (int)ROWS);
	for (uint32_t lane = 0; lane < rt.lanes; lane++) {
		uint32_t pos[1000];

		assert_true(kvtier_seq_resident(again.rt.s, lane, pos, 1000) >= (int)ROWS);
		for (uint32_t i = 0; i < ROWS; i++)
			assert_int_equal(pos[i], i);
	}
	assert_int_equal(gpu_wrong(&again), 0);
	assert_int_equal(rt_info(&again.rt).misses, 0);
	gpu_seq_free(&again, true);
	end();
}

static void test_lost(void **state)
{
	for (int n = 1; n <= 12; n++)
		lost_at(n, "", 0);
}

static void test_lost_async(void **state)
{
	for (int n = 1; n <= 9; n += 2)
		lost_at(n, ",async", n % 4 == 1 ? KVT_CUDA_DIRECT : 0);
}

/* ---- no daemon ------------------------------------------------------------------------------------- */

static void test_daemon_gone(void **state)
{
	struct gpu_seq q, fresh;
	struct kvtier_cuda_window *stale;
	uint32_t counts[64];
	uint64_t id;
	int most;

	begin(true, 1 << 20);
	assert_ok(gpu_prepare(&q, &gpu, &rt, window, 60, 400, 400, 1000, 0));
	assert_ok(gpu_seq_open(&q, KVT_EPHEMERAL, NULL, 1 << 14));
	assert_ok(gpu_append(&q, ROWS));
	assert_ok(gpu_plan(&q, 120, 100, KVT_ROWS_ALL, NULL));
	assert_ok(gpu_append(&q, 100));
	assert_ok(kvtier_cuda_push(q.rt.s, q.stream));
	/* mid-plan: copies are in flight */
	fake.set("lazy");
	assert_ok(kvtier_plan_request(q.rt.s,
				      &(struct kvtier_budget){.size = sizeof(struct kvtier_budget),
							      .device_rows = 60,
							      .dram_rows = KVT_ROWS_ALL,
							      .manual = 1,
							      .policy = "random"},
				      &id));
	for (int i = 0; i < 200 && q.state.plan < id; i++) {
		(void)fake.step(1);
		assert_true(kvtier_cuda_poll(q.rt.s, q.stream, &q.state) >= 0);
		usleep(1000);
	}
	assert_true(q.state.plan >= id && q.state.busy);
	assert_true(fake_gpu_counts(&fake).queued > 0);
	harness_stop(&h);
	(void)kvtier_process(rt.c);
	assert_int_equal(kvtier_cuda_poll(q.rt.s, q.stream, NULL), KVT_E_DAEMON);
	assert_int_equal(kvtier_cuda_append(q.rt.s, q.rt.rows, 1), KVT_E_DAEMON);
	assert_true(kvtier_cuda_apply(q.rt.s, q.state.plan, NULL, NULL, q.stream) < 0);
	assert_int_equal(kvtier_cuda_settle(q.rt.s, 0, 100, q.stream), KVT_E_DAEMON);
	/* the runtime keeps its cache and knows where everything is */
	most = kvtier_cuda_counts(q.rt.s, counts);
	assert_int_equal(most, 220);
	assert_int_equal(gpu_wrong(&q), 0);
	/* another daemon: the window and the sequence are of the old one */
	stale = window;
	assert_true(harness_start(&h));
	for (int i = 0; i < 200 && kvtier_process(rt.c) <= 0; i++)
		usleep(10000);
	assert_ok(gpu_prepare(&fresh, &gpu, &rt, stale, 61, 400, 400, 1000, 0));
	assert_said(gpu_seq_open(&fresh, KVT_EPHEMERAL, NULL, 1 << 14), KVT_E_STALE, "an earlier connection");
	assert_int_equal(kvtier_cuda_poll(q.rt.s, q.stream, NULL), KVT_E_STALE);
	assert_ok(kvtier_cuda_window_create(rt.c, gpu.g, 1 << 20, &window));
	fresh.w = window;
	fake.set(NULL);
	assert_ok(gpu_seq_open(&fresh, KVT_EPHEMERAL, NULL, 1 << 14));
	assert_ok(gpu_append(&fresh, ROWS));
	assert_ok(gpu_plan(&fresh, 50, 100, KVT_ROWS_ALL, NULL));
	assert_ok(gpu_plan(&fresh, 300, 0, KVT_ROWS_ALL, NULL));
	assert_int_equal(gpu_wrong(&fresh), 0);
	gpu_seq_free(&q, false);
	gpu_seq_free(&fresh, false);
	kvtier_cuda_window_close(stale);
	end();
}

/* ---- a runtime that dies ------------------------------------------------------------------------------ */

/* The child: stores ROWS, then dies with a plan's copies on their way. */
static void die_copying(void)
{
	struct gpu_seq q;
	uint64_t id;

	if (rt_open(&rt, h.sock[0], 2) || gpu_open(&gpu) ||
	    kvtier_cuda_window_create(rt.c, gpu.g, 1 << 20, &window) ||
	    gpu_prepare(&q, &gpu, &rt, window, 70, 1000, 1000, 1000, 0) ||
	    gpu_seq_open(&q, KVT_LEASED, NULL, 1 << 14) || gpu_append(&q, ROWS) ||
	    kvtier_cuda_settle(q.rt.s, 1, 10000, q.stream) || gpu_append(&q, 200) ||
	    kvtier_cuda_push(q.rt.s, q.stream))
		_exit(1);
	fake.set("lazy");
	if (kvtier_plan_request(q.rt.s,
				&(struct kvtier_budget){.size = sizeof(struct kvtier_budget),
							.device_rows = 20,
							.nvme_rows = KVT_ROWS_ALL,
							.manual = 1,
							.policy = "random"},
				&id))
		_exit(2);
	for (int i = 0; i < 2000; i++) {
		if (kvtier_cuda_poll(q.rt.s, q.stream, &q.state) < 0)
			_exit(3);
		if (q.state.plan >= id && q.state.bytes_out > 3 * 128 * 80 && fake_gpu_counts(&fake).queued > 0)
			kill(getpid(), SIGKILL);
		(void)fake.step(1);
		usleep(500);
	}
	_exit(4);
}

static void test_client_killed(void **state)
{
	struct gpu_seq again;
	int status = 0;
	pid_t pid;

	begin_core(true);
	pid = fork();
	assert_true(pid >= 0);
	if (!pid)
		die_copying();
	assert_int_equal(waitpid(pid, &status, 0), pid);
	if (!WIFSIGNALED(status))
		fail_msg("the child ended with %d", WEXITSTATUS(status));
	assert_int_equal(WTERMSIG(status), SIGKILL);
	for (int i = 0; i < 500 && harness_stat(&h).clients; i++)
		usleep(10000);
	assert_int_equal(harness_stat(&h).clients, 0);
	assert_int_equal(harness_stat(&h).hangups_protocol, 0);
	/* its successor finds all that was stored */
	assert_ok(rt_open(&rt, h.sock[0], 2));
	assert_ok(gpu_open(&gpu));
	assert_ok(kvtier_cuda_window_create(rt.c, gpu.g, 1 << 20, &window));
	assert_ok(gpu_prepare(&again, &gpu, &rt, window, 70, 1000, 1000, 1000, 0));
	assert_ok(gpu_seq_resume(&again, NULL, 1 << 16));
	assert_true(again.rt.rows >= ROWS);
	assert_ok(gpu_plan(&again, 1000, 1000, KVT_ROWS_ALL, NULL));
	assert_true(kvtier_cuda_counts(again.rt.s, NULL) >= (int)ROWS);
	assert_int_equal(gpu_wrong(&again), 0);
	assert_int_equal(rt_info(&again.rt).misses, 0);
	gpu_seq_free(&again, true);
	end();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_client_killed), /* first: the fake driver has no thread yet */
		cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_calls_that_fail),
		cmocka_unit_test(test_lost),          cmocka_unit_test(test_lost_async),
		cmocka_unit_test(test_daemon_gone),
	};

	return gpu_main(tests, ARRAY_SIZE(tests));
}
