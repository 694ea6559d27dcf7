/* SPDX-License-Identifier: MIT */
/* The NVMe tier in one life: pages in and out, limits, and what it refuses. */
#include "nvme_fixture.h"

static int setup_uring(void **state)
{
	*state = fx_new();
	return 0;
}

static int setup_threads(void **state)
{
	struct fx *f = fx_new();

	f->cfg.no_uring = true;
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	fx_free(*state);
	return 0;
}

static void round_trip_at_many_sizes(void **state)
{
	static const uint32_t sizes[] = {
		1, 511, 512, 4095, 4096, 4097, 32768, 65535, 300001, TIER_MAX_PAGE - 1, TIER_MAX_PAGE};
	struct fx *f = *state;
	struct tier_stat st;
	uint64_t bytes = 0, units = 0;
	unsigned n = 0;

	f->cfg.segment = 4 << 20;
	f->cfg.size = 64 << 20;
	fx_open(f);
	for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++) {
		n += fx_write(f, 3, sizes[i], i % 2, NULL);
		bytes += 3 * (uint64_t)sizes[i];
		units += 3 * DIV_UP(sizes[i], KVT_UNIT);
	}
	assert_int_equal(fx_verify(f), n);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	assert_int_equal(fx_verify(f), n);
	fx_stat(f, &st);
	assert_int_equal(st.writes, n);
	assert_int_equal(st.reads, 2 * n);
	assert_int_equal(st.write_bytes, bytes);
	assert_int_equal(st.read_bytes, 2 * bytes);
	assert_int_equal(st.used, units * KVT_UNIT);
	assert_true(st.device_write_bytes >= st.used);
	assert_int_equal(st.inflight, 0);
	assert_int_equal(st.errors, 0);
	assert_false(st.offline);
	assert_true(st.io_uring == !f->cfg.no_uring || strlen(st.note));
	if (f->cfg.no_uring)
		assert_non_null(strstr(st.note, "threads"));
}

static void a_prepare_can_be_undone(void **state)
{
	struct fx *f = *state;
	struct tier_io io[3];
	struct tier_stat st;

	fx_open(f);
	for (int round = 0; round < 3000; round++) {
		for (int i = 0; i < 3; i++) {
			io[i] = (struct tier_io){.op = TIER_WRITE, .bytes = 32768, .life = TIER_SHORT};
			assert_int_equal(f->t->ops->prepare(f->t, &io[i]), 0);
			assert_non_null(io[i].buf);
		}
		for (int i = 0; i < 3; i++) {
			f->t->ops->release(f->t, &io[i]);
			assert_null(io[i].buf);
			f->t->ops->release(f->t, &io[i]); /* once is enough */
		}
	}
	fx_stat(f, &st);
	assert_int_equal(st.used, 0);
	assert_int_equal(fx_write(f, 200, 32768, TIER_SHORT, NULL), 200);
	assert_int_equal(fx_verify(f), 200);
}

static void reads_and_writes_keep_a_share_of_staging(void **state)
{
	struct fx *f = *state;
	struct tier_io *io = calloc(600, sizeof(*io));
	unsigned w = 0, r = 0;
	int res;

	fx_open(f);
	fx_write(f, 1, 300000, TIER_SHORT, NULL);
	for (; w < 300; w++) {
		io[w] = (struct tier_io){.op = TIER_WRITE, .bytes = 300000, .life = TIER_SHORT};
		if ((res = f->t->ops->prepare(f->t, &io[w])) < 0)
			break;
	}
	assert_int_equal(res, -EAGAIN);
	assert_true(w > 0);
	for (; r < 300; r++) {
		io[w + r] = (struct tier_io){.op = TIER_READ, .bytes = 300000, .addr = f->page[0].addr};
		if ((res = f->t->ops->prepare(f->t, &io[w + r])) < 0)
			break;
	}
	assert_int_equal(res, -EAGAIN);
	assert_true(r > 0);
	for (unsigned i = 0; i < w + r; i++)
		f->t->ops->release(f->t, &io[i]);
	free(io);
	assert_int_equal(fx_write(f, 10, 300000, TIER_SHORT, NULL), 10);
	assert_int_equal(fx_verify(f), 11);
}

static void a_full_store_says_so_and_recovers(void **state)
{
	struct fx *f = *state;
	struct tier_stat st;
	unsigned n;
	int why;

	fx_open(f);
	n = fx_write(f, 5000, 32768, TIER_LONG, &why);
	assert_int_equal(why, -ENOSPC);
	fx_stat(f, &st);
	assert_true(st.used <= st.capacity);
	assert_true(st.used >= st.capacity * 9 / 10);
	assert_int_equal(fx_verify(f), n);
	for (uint64_t no = 0; no < n; no++)
		fx_kill(f, no);
	fx_stat(f, &st);
	assert_int_equal(st.used, 0);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	assert_true(fx_write(f, n - 64, 32768, TIER_LONG, NULL) == n - 64);
	assert_int_equal(fx_verify(f), n - 64);
}

static void stale_addresses_are_refused(void **state)
{
	struct fx *f = *state;
	struct tier_io io = {.op = TIER_READ, .bytes = 8192};
	struct tier_stat st;

	fx_open(f);
	fx_write(f, 3, 8192, TIER_SHORT, NULL);
	fx_kill(f, 1);
	io.addr = f->page[1].addr;
	assert_int_equal(f->t->ops->prepare(f->t, &io), -ESTALE);
	f->t->ops->free(f->t, f->page[1].addr, 8192); /* twice: nothing happens */
	for (int i = 0; i < 64; i++) {
		io.addr = f->page[0].addr ^ UINT64_C(1) << i;
		if (io.addr != f->page[2].addr)
			assert_int_equal(f->t->ops->prepare(f->t, &io), -ESTALE);
	}
	io.addr = TIER_ADDR_NONE;
	assert_int_equal(f->t->ops->prepare(f->t, &io), -ESTALE);
	f->t->ops->free(f->t, TIER_ADDR_NONE, 8192);
	io.bytes = 0;
	assert_int_equal(f->t->ops->prepare(f->t, &io), -EINVAL);
	io.bytes = TIER_MAX_PAGE + 1;
	assert_int_equal(f->t->ops->prepare(f->t, &io), -EINVAL);
	fx_stat(f, &st);
	assert_int_equal(st.used, 4 * KVT_UNIT);
	assert_int_equal(fx_verify(f), 2);
}

static void a_truncated_container_is_an_error_not_a_crash(void **state)
{
	struct fx *f = *state;
	struct tier_io io = {.op = TIER_READ, .bytes = 32768}, *p = &io, *done;
	char path[128];

	fx_open(f);
	fx_write(f, 2, 32768, TIER_SHORT, NULL);
	fx_path(f, path, "kvtier-000.dat");
	assert_int_equal(truncate(path, NVME_PREAMBLE), 0);
	io.addr = f->page[1].addr;
	assert_int_equal(f->t->ops->prepare(f->t, &io), 0);
	f->t->ops->submit(f->t, &p, 1);
	while (!f->t->ops->reap(f->t, &done, 1))
		fx_wait(f);
	assert_ptr_equal(done, &io);
	assert_int_equal(io.res, -EIO);
	f->t->ops->release(f->t, &io);
	fx_close(f);
	assert_int_equal(fx_try_open(f), -EINVAL);
	assert_non_null(strstr(f->err, "file size 1048576"));
}

static void several_containers_hold_one_store(void **state)
{
	struct fx *f = *state;
	char path[128];
	struct stat sb;
	unsigned n;

	f->knobs.file_segments = 7; /* 32 segments: five files, the last one short */
	fx_open(f);
	n = fx_write(f, 700, 32768, TIER_LONG, NULL);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	fx_path(f, path, "kvtier-004.dat");
	assert_int_equal(stat(path, &sb), 0);
	assert_int_equal(sb.st_size, NVME_PREAMBLE + (4 << 20));
	fx_close(f);
	f->cfg.no_uring = !f->cfg.no_uring; /* either engine reads what the other wrote */
	fx_open(f);
	fx_scan(f);
	for (uint64_t no = 0; no < n; no++)
		assert_int_equal(f->page[no].found, 1);
	assert_int_equal(fx_verify(f), n);
	fx_close(f);
	assert_int_equal(unlink(path), 0);
	assert_int_equal(fx_try_open(f), -ENOENT);
	assert_non_null(strstr(f->err, "kvtier-004.dat"));
}

static void opening_refuses_with_one_line(void **state)
{
	const struct {
		const char *field;
		uint64_t size, segment, staging;
		unsigned depth;
	} wrong[] = {
		{"segment", 32 << 20, 1000000, 0, 0},
		{"segment", 32 << 20, 4096, 0, 0},
		{"segment", 1 << 30, 128 << 20, 0, 0},
		{"size", 0, 1 << 20, 0, 0},
		{"size", 7 << 20, 1 << 20, 0, 0},
		{"size", UINT64_MAX, 64 << 20, 0, 0},
		{"staging", 32 << 20, 1 << 20, 2ull << 30, 0},
		{"depth", 32 << 20, 1 << 20, 0, 5000},
	};
	struct fx *f = *state;
	struct tier_cfg good = f->cfg;
	struct tier *t = f->t;

	for (unsigned i = 0; i < ARRAY_SIZE(wrong); i++) {
		f->cfg.size = wrong[i].size;
		f->cfg.segment = wrong[i].segment;
		f->cfg.staging = wrong[i].staging;
		f->cfg.depth = wrong[i].depth;
		assert_int_equal(fx_try_open(f), -EINVAL);
		assert_non_null(strstr(f->err, wrong[i].field));
		assert_null(strchr(f->err, '\n'));
		assert_ptr_equal(f->t, t);
	}
	f->cfg = good;
	f->cfg.path = "/proc/nothing/here";
	assert_int_equal(fx_try_open(f), -ENOENT);
	assert_non_null(strstr(f->err, "/proc/nothing/here"));
	f->cfg = good;
	fx_open(f);
	t = f->t;
	assert_int_equal(fx_try_open(f), -EBUSY);
	assert_non_null(strstr(f->err, "in use by another daemon"));
	assert_ptr_equal(f->t, t);
	tier_nvme_ops.close(NULL);
}

static void a_file_system_too_small_is_named(void **state)
{
	struct fx *f = *state;
	struct stat sb;
	char path[128];

	f->cfg.size = UINT64_C(1) << 49;
	f->cfg.segment = 64 << 20;
	f->knobs.file_segments = 1 << 20;
	assert_true(fx_try_open(f) < 0);
	assert_non_null(strstr(f->err, "size 562949953421312"));
	fx_path(f, path, "kvtier-000.dat.new");
	assert_int_equal(stat(path, &sb), -1); /* nothing is left lying about */
}

static void sync_says_when_a_write_was_never_submitted(void **state)
{
	struct fx *f = *state;
	struct tier_io io = {.op = TIER_WRITE, .bytes = 4096}, *p = &io, *done;

	fx_open(f);
	fx_write(f, 5, 32768, TIER_SHORT, NULL);
	memset(io.meta.id.key, 0xff, sizeof(io.meta.id.key));
	assert_int_equal(f->t->ops->prepare(f->t, &io), 0);
	memset(io.buf, 1, io.bytes);
	assert_int_equal(f->t->ops->sync(f->t), -EBUSY);
	f->t->ops->submit(f->t, &p, 1);
	while (!f->t->ops->reap(f->t, &done, 1))
		fx_wait(f);
	assert_int_equal(io.res, 0);
	f->t->ops->release(f->t, &io);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	assert_int_equal(fx_verify(f), 5);
}

static void pages_may_be_reaped_after_a_sync(void **state)
{
	struct fx *f = *state;
	struct tier_io io[4], *ios[4], *done[4];

	fx_open(f);
	for (int i = 0; i < 4; i++) {
		io[i] = (struct tier_io){.op = TIER_WRITE, .bytes = 4096};
		assert_int_equal(f->t->ops->prepare(f->t, &io[i]), 0);
		ios[i] = &io[i];
	}
	f->t->ops->submit(f->t, ios, 4);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	for (int i = 0; i < 4; i++) { /* one at a time: the fd stays readable as long as there is more */
		fx_wait(f);
		assert_int_equal(f->t->ops->reap(f->t, done, 1), 1);
		assert_ptr_equal(done[0], &io[i]);
		assert_int_equal(io[i].res, 0);
		f->t->ops->release(f->t, &io[i]);
	}
	assert_int_equal(f->t->ops->reap(f->t, done, 4), 0);
}

#define BOTH(test)                                                                                             \
	{#test " (io_uring)", test, setup_uring, teardown, NULL},                                              \
	{                                                                                                      \
#test " (threads)", test, setup_threads, teardown, NULL                                        \
	}

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(round_trip_at_many_sizes),
		BOTH(a_prepare_can_be_undone),
		BOTH(reads_and_writes_keep_a_share_of_staging),
		BOTH(a_full_store_says_so_and_recovers),
		BOTH(stale_addresses_are_refused),
		BOTH(a_truncated_container_is_an_error_not_a_crash),
		BOTH(several_containers_hold_one_store),
		BOTH(opening_refuses_with_one_line),
		BOTH(sync_says_when_a_write_was_never_submitted),
		BOTH(pages_may_be_reaped_after_a_sync),
		cmocka_unit_test_setup_teardown(a_file_system_too_small_is_named, setup_uring, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
