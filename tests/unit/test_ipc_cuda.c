/* SPDX-License-Identifier: MIT */
/* Sequences in GPU memory: the library on the fake driver, against a real daemon core. */
#include "tests/unit/gpu_fixture.h"

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
	/* room for most of them again */
	assert_ok(gpu_plan(&q, 250, 50, KVT_ROWS_ALL, NULL));
	assert_int_equal(kvtier_cuda_counts(q.rt.s, q.counts), 250);
	assert_int_equal(gpu_wrong(&q), 0);
	assert_true(q.state.bytes_in >= 150ull * rt.lanes * (RT_K + RT_V));
	assert_int_equal(rt_info(&q.rt).misses, 0);
	gpu_seq_free(&q, false);
	end();
}

static void live(const char *words, uint32_t rounds, uint64_t ring, uint32_t pad, uint32_t id, uint32_t flags)
{
	struct gpu_seq q;
	const char *bad;

	begin(true, 1 << 20);
	fake.set(words);
	assert_ok(gpu_prepare(&q, &gpu, &rt, window, id, 500, 300, 4000, pad));
	q.flags = flags;
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
	live("", 120, 1 << 16, 0, 2, 0);
}

static void test_live_small_ring(void **state)
{
	live("", 80, 1, 16, 3, 0); /* one page at a time */
}

static void test_live_lazy(void **state)
{
	live("lazy", 120, 1 << 15, 32, 4, 0);
}

static void test_live_async(void **state)
{
	live("async", 120, 1 << 15, 0, 5, 0);
}

static void test_live_direct(void **state)
{
	live("", 100, 1 << 15, 0, 6, KVT_CUDA_DIRECT);
	live("lazy", 60, 1 << 15, 0, 7, KVT_CUDA_DIRECT);
}

/* Two sequences share a window; what one gives back the next can have. */
static void test_window_is_shared(void **state)
{
	struct gpu_seq a, b, c;

	begin(false, 128 << 10);
	assert_ok(gpu_prepare(&a, &gpu, &rt, window, 11, 200, 100, 500, 0));
	assert_ok(gpu_prepare(&b, &gpu, &rt, window, 12, 200, 100, 500, 0));
	assert_ok(gpu_prepare(&c, &gpu, &rt, window, 13, 200, 100, 500, 0));
	assert_ok(gpu_seq_open(&a, KVT_EPHEMERAL, NULL, 32 << 10));
	assert_ok(gpu_seq_open(&b, KVT_EPHEMERAL, NULL, 32 << 10));
	assert_said(gpu_seq_open(&c, KVT_EPHEMERAL, NULL, 32 << 10), KVT_E_NOSPC,
		    "window: no 65536 bytes free");
	assert_ok(gpu_append(&a, 150));
	assert_ok(gpu_append(&b, 150));
	assert_ok(gpu_plan(&a, 50, KVT_ROWS_ALL, 0, NULL));
	assert_ok(gpu_plan(&b, 60, KVT_ROWS_ALL, 0, NULL));
	kvtier_seq_close(a.rt.s);
	a.rt.s = NULL;
	assert_ok(gpu_seq_open(&c, KVT_EPHEMERAL, NULL, 32 << 10));
	assert_ok(gpu_append(&c, 150));
	assert_ok(gpu_plan(&c, 70, KVT_ROWS_ALL, 0, NULL));
	assert_ok(gpu_plan(&b, 150, KVT_ROWS_ALL, 0, NULL));
	assert_ok(gpu_plan(&c, 150, KVT_ROWS_ALL, 0, NULL));
	assert_int_equal(gpu_wrong(&b) + gpu_wrong(&c), 0);
	gpu_seq_free(&a, false);
	gpu_seq_free(&b, false);
	gpu_seq_free(&c, false);
	end();
}

/* Everything is stored, the sequence closed, and all of it comes back elsewhere. */
static void test_save_and_resume(void **state)
{
	struct gpu_seq q, again;

	begin(true, 1 << 20);
	assert_ok(gpu_prepare(&q, &gpu, &rt, window, 21, 600, 600, 1000, 0));
	assert_ok(gpu_prepare(&again, &gpu, &rt, window, 21, 600, 600, 1000, 48));
	assert_ok(gpu_seq_open(&q, KVT_LEASED, NULL, 1 << 16));
	assert_ok(gpu_append(&q, 500));
	assert_ok(kvtier_cuda_settle(q.rt.s, 1, 10000, q.stream));
	assert_int_equal(kvtier_cuda_counts(q.rt.s, NULL), 500); /* and still on the device */
	assert_int_equal(gpu_wrong(&q), 0);
	memcpy(again.rt.salts, q.rt.salts, 1000 * sizeof(*q.rt.salts));
	kvtier_seq_close(q.rt.s);
	q.rt.s = NULL;
	assert_ok(gpu_seq_resume(&again, NULL, 1 << 16));
	assert_int_equal(again.rt.rows, 500);
	assert_int_equal(kvtier_cuda_counts(again.rt.s, NULL), 0);
	assert_ok(gpu_append(&again, 30)); /* before anything is back */
	assert_ok(gpu_plan(&again, 530, KVT_ROWS_ALL, KVT_ROWS_ALL, NULL));
	assert_int_equal(kvtier_cuda_counts(again.rt.s, NULL), 530);
	assert_int_equal(gpu_wrong(&again), 0);
	gpu_seq_free(&q, false);
	gpu_seq_free(&again, true);
	end();
}

/* Once it runs, nothing is allocated, nothing waits for the GPU, and no copy goes through unregistered memory.
 */
static void test_steady(void **state)
{
	struct fake_cuda_counts a, b;
	struct kvtier_budget budget = {.size = sizeof(budget), .device_rows = 100, .dram_rows = KVT_ROWS_ALL};
	struct gpu_seq q;

	begin(false, 1 << 20);
	assert_ok(gpu_prepare(&q, &gpu, &rt, window, 31, 400, 200, 4000, 0));
	assert_ok(gpu_seq_open(&q, KVT_EPHEMERAL, &budget, 1 << 16));
	fake.set("async");
	a = fake_gpu_counts(&fake);
	for (uint32_t pos = 0; pos < 2000; pos += 4) {
		int r = kvtier_cuda_append(q.rt.s, pos, 4);

		for (uint64_t until = now_ns() + 10000000000u; r == KVT_E_NOSPC && now_ns() < until;
		     usleep(50)) {
			assert_true(gpu_poll(&q, NULL) >= 0);
			r = kvtier_cuda_append(q.rt.s, pos, 4);
		}
		assert_ok(r);
		assert_ok(kvtier_cuda_push(q.rt.s, q.stream));
		assert_true(gpu_poll(&q, NULL) >= 0);
	}
	b = fake_gpu_counts(&fake);
	assert_true(q.applied + q.moved >= 5);
	assert_int_equal(b.alloc_calls, a.alloc_calls);
	assert_int_equal(b.waits, a.waits);
	assert_int_equal(b.pageable, a.pageable);
	gpu_seq_free(&q, false);
	end();
}

/* A poll with nothing to do asks the driver for nothing. */
static void test_idle_poll(void **state)
{
	struct fake_cuda_counts a, b;
	struct gpu_seq q;

	begin(false, 1 << 20);
	assert_ok(gpu_prepare(&q, &gpu, &rt, window, 32, 400, 200, 4000, 0));
	assert_ok(gpu_seq_open(&q, KVT_EPHEMERAL, NULL, 1 << 16));
	assert_ok(gpu_append(&q, 100));
	assert_ok(gpu_plan(&q, 50, 50, 0, NULL));
	/* a call of the driver would be refused, and seen */
	fake.set("fail=cuLaunchKernel:1@1,fail=cuStreamQuery:1@1,fail=cuMemcpyHtoDAsync_v2:1@1");
	a = fake_gpu_counts(&fake);
	for (int i = 0; i < 1000; i++)
		assert_int_equal(kvtier_cuda_poll(q.rt.s, q.stream, NULL), KVT_PLAN_NONE);
	b = fake_gpu_counts(&fake);
	assert_int_equal(a.queries, b.queries);
	fake.set(NULL);
	gpu_seq_free(&q, false);
	end();
}

/* The GPU finds a page damaged that came in: that plan changes nothing, and the next one brings the rows. */
static void test_damaged_page(void **state)
{
	struct kvtier_stats st = {.size = sizeof(st)};
	struct gpu_seq q;
	uint64_t id;

	begin(false, 1 << 20);
	assert_ok(gpu_prepare(&q, &gpu, &rt, window, 42, 400, 400, 1000, 0));
	q.flags = KVT_CUDA_DIRECT;
	assert_ok(gpu_seq_open(&q, KVT_EPHEMERAL, NULL, 1 << 16));
	assert_ok(gpu_append(&q, 300));
	assert_ok(gpu_plan(&q, 50, KVT_ROWS_ALL, 0, NULL));
	fake.set("lazy");
	assert_ok(kvtier_plan_request(q.rt.s,
				      &(struct kvtier_budget){.size = sizeof(struct kvtier_budget),
							      .device_rows = 300,
							      .dram_rows = KVT_ROWS_ALL,
							      .manual = 1,
							      .policy = "random"},
				      &id));
	for (int i = 0; i < 5000 && !q.rt.s->cu->pages_used; i++) {
		assert_true(kvtier_cuda_poll(q.rt.s, q.stream, &q.state) >= 0);
		usleep(500);
	}
	assert_true(q.rt.s->cu->pages_used > 0);
	atomic_fetch_add(q.rt.s->cu->bad, 1); /* as kvt_scatter does */
	for (int i = 0; i < 5000 && q.rt.s->acked < id; i++) {
		(void)fake.step(4);
		assert_true(kvtier_cuda_poll(q.rt.s, q.stream, &q.state) != KVT_PLAN_READY);
		usleep(500);
	}
	assert_ok(kvtier_stats(rt.c, &st));
	assert_int_equal(st.plans_nacked, 1);
	assert_int_equal(kvtier_cuda_counts(q.rt.s, NULL), 50);
	fake.set(NULL);
	assert_int_equal(gpu_wrong(&q), 0);
	assert_ok(gpu_plan(&q, 300, KVT_ROWS_ALL, 0, NULL));
	assert_int_equal(kvtier_cuda_counts(q.rt.s, NULL), 300);
	assert_int_equal(gpu_wrong(&q), 0);
	gpu_seq_free(&q, false);
	end();
}

/* The connection goes first, with a window and a sequence on it and work in flight: it takes them along. */
static void test_close_everything(void **state)
{
	struct gpu_seq q;

	begin(false, 1 << 20);
	assert_ok(gpu_prepare(&q, &gpu, &rt, window, 41, 400, 200, 1000, 0));
	assert_ok(gpu_seq_open(&q, KVT_EPHEMERAL, NULL, 1 << 16));
	fake.set("lazy");
	assert_ok(gpu_append(&q, 200));
	assert_ok(kvtier_cuda_push(q.rt.s, q.stream));
	assert_true(fake_gpu_counts(&fake).queued > 0);
	rt_close(&rt);
	q.rt.s = NULL;
	gpu_seq_free(&q, false);
	gpu_close(&gpu);
	end_core();
	assert_baseline();
}

static void test_pool(void **state)
{
	struct kvtier_cuda_pool *a = NULL, *b = NULL;
	int fd;

	begin_core(false);
	assert_ok(gpu_open(&gpu));
	assert_ok(kvtier_cuda_pool_create(gpu.g, 1, &a));
	assert_int_equal(kvtier_cuda_pool_bytes(a), 2 << 20);
	fd = kvtier_cuda_pool_fd(a);
	assert_true(fd >= 0);
	assert_ok(kvtier_cuda_pool_import(gpu.g, fd, kvtier_cuda_pool_bytes(a), &b));
	close(fd);
	assert_true(kvtier_cuda_pool_addr(a) != kvtier_cuda_pool_addr(b));
	memset((void *)kvtier_cuda_pool_addr(a), 0x5a, 2 << 20); /* the fake's GPU memory is the host's */
	kvtier_cuda_pool_close(a);
	assert_int_equal(*(uint8_t *)(kvtier_cuda_pool_addr(b) + 12345), 0x5a);
	assert_said(kvtier_cuda_pool_import(gpu.g, -1, 1, &a), KVT_E_INVAL, "fd: -1");
	assert_int_equal(kvtier_cuda_pool_import(gpu.g, 0, 2 << 20, &a), KVT_E_GPU); /* some other descriptor */
	assert_int_equal(kvtier_cuda_pool_create(gpu.g, 0, &a), KVT_E_INVAL);
	kvtier_cuda_pool_close(b);
	for (int n = 1; n <= 5; n++) {
		static const char *const calls[] = {"cuMemCreate", "cuMemAddressReserve", "cuMemMap",
						    "cuMemSetAccess", "cuMemGetAllocationGranularity"};
		char words[64];

		snprintf(words, sizeof(words), "fail=%s:%d@1", calls[n - 1], n % 2 ? 2 : 1);
		fake.set(words);
		assert_int_equal(kvtier_cuda_pool_create(gpu.g, 1, &a), n % 2 ? KVT_E_NOMEM : KVT_E_GPU);
	}
	fake.set(NULL);
	gpu_close(&gpu);
	end_core();
	assert_baseline();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_out_and_back),
		cmocka_unit_test(test_live),
		cmocka_unit_test(test_live_small_ring),
		cmocka_unit_test(test_live_lazy),
		cmocka_unit_test(test_live_async),
		cmocka_unit_test(test_live_direct),
		cmocka_unit_test(test_window_is_shared),
		cmocka_unit_test(test_save_and_resume),
		cmocka_unit_test(test_steady),
		cmocka_unit_test(test_idle_poll),
		cmocka_unit_test(test_pool),
		cmocka_unit_test(test_close_everything),
		cmocka_unit_test(test_damaged_page),
	};

	return gpu_main(tests, ARRAY_SIZE(tests));
}
