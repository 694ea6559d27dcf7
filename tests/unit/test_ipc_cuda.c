/* SPDX-License-Identifier: MIT */
/* Sequences in GPU memory: the library on the fake driver, against a real daemon core. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/wait.h>
#include <cmocka.h>
#include "tests/unit/fake_gpu.h"
#include "tests/unit/gpu_rt.h"

static struct fake_gpu fake;
static struct harness h;
static struct gpu gpu;
static struct runtime rt;
static struct kvtier_cuda_window *window;
static struct fake_cuda_counts base;

static void begin(bool nvme, uint64_t window_bytes)
{
	fake.set(NULL);
	base = fake_gpu_counts(&fake);
	assert_int_equal(base.violations, 0);
	harness_init(&h, nvme);
	strcpy(h.cfg.policy, "random");
	assert_true(harness_start(&h));
	assert_int_equal(rt_open(&rt, h.sock[0], 2), 0);
	assert_int_equal(gpu_open(&gpu), 0);
	assert_int_equal(kvtier_cuda_window_create(rt.c, gpu.g, window_bytes, &window), 0);
}

/* Nothing of the GPU stays: memory, registrations, streams, contexts. */
static void assert_baseline(void)
{
	struct fake_cuda_counts c = fake_gpu_counts(&fake);

	assert_int_equal(c.violations, 0);
	assert_int_equal(c.bytes, base.bytes);
	assert_int_equal(c.allocs, base.allocs);
	assert_int_equal(c.host_allocs, base.host_allocs);
	assert_int_equal(c.registrations, base.registrations);
	assert_int_equal(c.streams, base.streams);
	assert_int_equal(c.events, base.events);
	assert_int_equal(c.modules, base.modules);
	assert_int_equal(c.contexts, base.contexts);
}

static void end(void)
{
	kvtier_cuda_window_close(window);
	gpu_close(&gpu);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
	assert_baseline();
}

static void assert_ok(int r)
{
	if (r < 0)
		fail_msg("%s: %s", kvtier_strerror(r), kvtier_last_error());
	assert_int_equal(r, 0);
}

/* ---- right ------------------------------------------------------------------------------- */

static void test_out_and_back(void **state)
{
	struct gpu_seq q;

	begin(true, 1 << 20);
	assert_ok(gpu_prepare(&q, &gpu, &rt, window, 1, 400, 200, 1000, 0));
	assert_ok(gpu_seq_open(&q, KVT_EPHEMERAL, NULL, 1 << 16));
	assert_ok(gpu_append(&q, 300));
	assert_ok(kvtier_cuda_push(q.rt.s, q.stream));
	assert_int_equal(gpu_wrong(&q), 0);
	assert_ok(gpu_plan(&q, 100, 120, KVT_ROWS_ALL, NULL));
	assert_int_equal(kvtier_cuda_counts(q.rt.s, q.counts), 100);
	assert_int_equal(gpu_wrong(&q), 0);
	assert_int_equal(rt_info(&q.rt).tier_rows[KVT_TIER_DRAM], 120 * rt.lanes);
	assert_int_equal(rt_info(&q.rt).tier_rows[KVT_TIER_NVME], 80 * rt.lanes);
	/* room for all of them again */
	assert_ok(gpu_plan(&q, 250, 50, KVT_ROWS_ALL, NULL));
	assert_int_equal(kvtier_cuda_counts(q.rt.s, q.counts), 250);
	assert_int_equal(gpu_wrong(&q), 0);
	assert_true(q.state.bytes_in >= 150ull * rt.lanes * (RT_K + RT_V));
	assert_int_equal(rt_info(&q.rt).misses, 0);
	gpu_seq_free(&q, false);
	end();
}

static void live(const char *words, uint32_t rounds, uint64_t ring, uint32_t pad, uint32_t id, bool nvme)
{
	struct gpu_seq q;
	const char *bad;

	begin(nvme, 1 << 20);
	fake.set(words);
	assert_ok(gpu_prepare(&q, &gpu, &rt, window, id, 500, 300, 4000, pad));
	assert_ok(gpu_seq_open(&q, KVT_EPHEMERAL, NULL, ring));
	bad = gpu_live(&q, rounds, strstr(words, "lazy") ? fake.step : NULL);
	if (bad)
		fail_msg("%s (seed %u)", bad, id);
	assert_true(q.applied > 0 && q.moved > 0);
	assert_true(q.state.bytes_in > 0 && q.state.bytes_out > 0);
	assert_int_equal(rt_info(&q.rt).misses, 0);
	gpu_seq_free(&q, false);
	end();
}

static void test_live(void **state)
{
	live("", 150, 1 << 16, 0, 2, true);
}

static void test_live_small_ring(void **state)
{
	live("", 100, 1, 16, 3, false); /* one page at a time */
}

static void test_live_lazy(void **state)
{
	live("lazy", 150, 1 << 15, 32, 4, true);
}

static void test_live_async(void **state)
{
	live("async", 150, 1 << 15, 0, 5, true);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_out_and_back),
		cmocka_unit_test(test_live),
		cmocka_unit_test(test_live_small_ring),
		cmocka_unit_test(test_live_lazy),
		cmocka_unit_test(test_live_async),
	};
	int r;

	if (!fake_gpu_init(&fake) || !fake_gpu_hooks(&fake)) {
		printf("1..0 # SKIP %s is not built (make tests-bin)\n", fake.path);
		return 0;
	}
	r = cmocka_run_group_tests(tests, NULL, NULL);
	unlink(fake.kernels);
	return r;
}
