/* SPDX-License-Identifier: MIT */
/* The NVMe tier in one life: pages in and out, limits, errors, and a device that stops answering. */
#include "nvme_fixture.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

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

/* ---- hosts that refuse ------------------------------------------------------------- */

/* In a process of its own, because what is refused once stays refused. argv: "refused", what, directory. */
static int refused_child(const char *what, const char *dir)
{
	struct fx *f = calloc(1, sizeof(*f));
	struct tier_stat st;

	fx_init(f);
	strcpy(f->dir, dir);
	if (!strcmp(what, "io_uring")) {
		struct sock_filter code[] = {
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		};
		struct sock_fprog prog = {ARRAY_SIZE(code), code};

		if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog))
			return 77;
	} else {
		struct rlimit lim = {65536, 65536};

		if (setrlimit(RLIMIT_MEMLOCK, &lim) || setgid(65534) || setuid(65534))
			return 77;
	}
	fx_open(f);
	fx_stat(f, &st);
	if (!strstr(st.note,
		    strcmp(what, "io_uring") ? "RLIMIT_MEMLOCK" : "io_uring refused (Operation not permitted)"))
		return 1;
	if (st.io_uring != !!strcmp(what, "io_uring"))
		return 2;
	fx_write(f, 100, 32768, TIER_LONG, NULL);
	if (fx_verify(f) != 100 || f->t->ops->sync(f->t))
		return 3;
	fx_close(f);
	free(f);
	return 0;
}

static void refused(struct fx *f, const char *what)
{
	int status;
	pid_t pid;

	assert_int_equal(chown(f->dir, geteuid() ? geteuid() : 65534, (gid_t)-1), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (!pid) {
		execl("/proc/self/exe", "refused", what, f->dir, NULL);
		_exit(127);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	if (WEXITSTATUS(status) == 77) {
		print_message("# SKIP this host does not let the test refuse %s\n", what);
		skip();
	}
	assert_int_equal(WEXITSTATUS(status), 0);
	fx_open(f);
	fx_scan(f);
	for (int i = 0; i < 100; i++)
		assert_int_equal(f->page[i].found, 1);
}

static void without_io_uring_threads_serve(void **state)
{
	refused(*state, "io_uring");
}

static void without_memlock_buffers_stay_unregistered(void **state)
{
	if (geteuid()) {
		print_message("# SKIP only root can give up the right to lock memory\n");
		skip();
	}
	refused(*state, "memlock");
}

/* ---- engines that misbehave -------------------------------------------------------- */

static struct {
	struct io_engine engine;
	struct io_engine *real;
	struct io_req *held, *out;
	struct io_cfg cfg;
	unsigned reads, writes; /* of pages, seen so far */
	bool hold;              /* keep data requests for ever */
	unsigned fail_next;     /* data writes to fail */
	int error;
} fake;

static int fake_open(struct io_engine **ret, const struct io_cfg *cfg, char *note, size_t notesize)
{
	extern const struct io_ops fake_ops;

	memset(&fake, 0, sizeof(fake));
	fake.engine.ops = &fake_ops;
	fake.cfg = *cfg;
	*ret = &fake.engine;
	return io_pool_ops.open(&fake.real, cfg, note, notesize);
}

static void fake_submit(struct io_engine *e, struct io_req *list)
{
	for (struct io_req *r = list, *next; r; r = next) {
		next = r->next;
		r->next = NULL;
		fake.reads += r->fixed && r->op == IO_READ;
		fake.writes += r->fixed && r->op == IO_WRITE;
		if (fake.hold) {
			r->next = fake.held;
			fake.held = r;
		} else if (r->op == IO_WRITE && r->fixed && fake.fail_next) {
			fake.fail_next--;
			r->res = fake.error;
			r->next = fake.out;
			fake.out = r;
			assert_int_equal(write(fake.cfg.event_fd, &(uint64_t){1}, 8), 8);
		} else {
			io_pool_ops.submit(fake.real, r);
		}
	}
}

static struct io_req *fake_reap(struct io_engine *e)
{
	struct io_req *r = fake.out;

	if (!r)
		return io_pool_ops.reap(fake.real);
	fake.out = NULL;
	return r;
}

static int fake_close(struct io_engine *e, unsigned timeout_ms)
{
	int r = io_pool_ops.close(fake.real, timeout_ms);

	return fake.held ? -ETIMEDOUT : r;
}

const struct io_ops fake_ops = {
	.name = "fake", .open = fake_open, .submit = fake_submit, .reap = fake_reap, .close = fake_close};

static void prepare_page(struct fx *f, struct tier_io *io, enum tier_op op)
{
	*io = (struct tier_io){.op = op, .bytes = 32768, .addr = op == TIER_READ ? f->page[0].addr : 0};
	assert_int_equal(f->t->ops->prepare(f->t, io), 0);
}

static void consecutive_pages_travel_as_one_request(void **state)
{
	struct fx *f = *state;

	f->knobs.engine = &fake_ops;
	fx_open(f);
	fx_write(f, 1, 4096, TIER_LONG, NULL);
	assert_int_equal(fake.writes, 1);
	fx_write(f, 32, 8192, TIER_LONG, NULL);
	assert_int_equal(fake.writes, 2);
	for (unsigned i = 2; i <= 32; i++)
		assert_int_equal(f->page[i].addr, f->page[i - 1].addr + 2);
	assert_int_equal(fx_verify(f), 33);
	assert_int_equal(fake.reads, 1);
	fx_kill(f, 10); /* a hole parts them */
	assert_int_equal(fx_verify(f), 32);
	assert_int_equal(fake.reads, 3);
}

static void a_silent_device_takes_the_tier_offline(void **state)
{
	struct fx *f = *state;
	struct tier_io io[4], *ios[4], *done[4];
	struct tier_stat st;
	uint64_t start = now_ns(), leaked;
	unsigned n = 0;

	f->cfg.deadline_ms = 50;
	f->knobs.engine = &fake_ops;
	fx_open(f);
	fx_write(f, 1, 32768, TIER_LONG, NULL);
	fake.hold = true;
	for (int i = 0; i < 4; i++) {
		prepare_page(f, &io[i], i % 2 ? TIER_READ : TIER_WRITE);
		ios[i] = &io[i];
	}
	f->t->ops->submit(f->t, ios, 3); /* the fourth is only prepared */
	fx_tick(f);
	assert_int_equal(f->t->ops->reap(f->t, done, 4), 0);
	while (n < 3 && now_ns() - start < UINT64_C(5000000000)) {
		usleep(10000);
		fx_tick(f);
		n += f->t->ops->reap(f->t, done + n, 4 - n);
	}
	assert_int_equal(n, 3);
	fx_stat(f, &st);
	assert_true(st.offline);
	leaked = st.leaked_bytes;
	assert_true(leaked >= 3 * 32768);
	assert_int_equal(st.inflight, 0);
	for (int i = 0; i < 3; i++) {
		assert_int_equal(io[i].res, -EIO);
		if (io[i].op == TIER_WRITE)
			assert_true(io[i].addr == TIER_ADDR_NONE);
		f->t->ops->release(f->t, &io[i]);
	}
	f->t->ops->submit(f->t, &ios[3], 1);
	assert_int_equal(f->t->ops->reap(f->t, done, 4), 1);
	assert_int_equal(io[3].res, -EIO);
	f->t->ops->release(f->t, &io[3]);
	io[0] = (struct tier_io){.op = TIER_WRITE, .bytes = 100};
	assert_int_equal(f->t->ops->prepare(f->t, &io[0]), -EIO);
	assert_int_equal(f->t->ops->sync(f->t), -EIO);
	/* One request comes back after all: its buffer is no longer lost. */
	fake.out = fake.held;
	fake.held = fake.held->next;
	fake.out->next = NULL;
	fx_tick(f);
	fx_stat(f, &st);
	assert_true(st.leaked_bytes < leaked);
	start = now_ns();
	fx_close(f);
	assert_true(now_ns() - start < UINT64_C(5000000000));
}

static void a_failed_write_is_dead_and_harmless(void **state)
{
	struct fx *f = *state;
	struct tier_io io[8], *ios[8], *done[8];
	struct tier_stat st;
	unsigned n = 0;

	f->knobs.engine = &fake_ops;
	fx_open(f);
	fx_write(f, 4, 32768, TIER_LONG, NULL);
	fake.fail_next = 1;
	fake.error = -ENOSPC;
	for (int i = 0; i < 8; i++) {
		prepare_page(f, &io[i], TIER_WRITE);
		memset(io[i].buf, 0xee, 32768);
		ios[i] = &io[i];
	}
	f->t->ops->submit(f->t, ios, 8);
	while (n < 8) {
		n += f->t->ops->reap(f->t, done + n, 8 - n);
		if (n < 8)
			fx_wait(f);
	}
	for (int i = 0; i < 8; i++) {
		assert_int_equal(io[i].res, -ENOSPC);
		assert_true(io[i].addr == TIER_ADDR_NONE);
		f->t->ops->release(f->t, &io[i]);
	}
	fx_write(f, 4, 32768, TIER_LONG, NULL);
	fx_stat(f, &st);
	assert_int_equal(st.errors, 8);
	assert_int_equal(st.used, 8 * 32768);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	fx_close(f);
	f->knobs.engine = NULL;
	fx_open(f);
	fx_scan(f);
	for (int i = 0; i < 8; i++)
		assert_int_equal(f->page[i].found, 1);
	assert_int_equal(fx_verify(f), 8);
}

#define BOTH(test)                                                                                             \
	{#test " (io_uring)", test, setup_uring, teardown, NULL},                                              \
	{                                                                                                      \
#test " (threads)", test, setup_threads, teardown, NULL                                        \
	}

int main(int argc, char **argv)
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
		cmocka_unit_test_setup_teardown(without_io_uring_threads_serve, setup_uring, teardown),
		cmocka_unit_test_setup_teardown(without_memlock_buffers_stay_unregistered, setup_uring,
						teardown),
		cmocka_unit_test_setup_teardown(a_file_system_too_small_is_named, setup_uring, teardown),
		cmocka_unit_test_setup_teardown(consecutive_pages_travel_as_one_request, setup_uring, teardown),
		cmocka_unit_test_setup_teardown(a_silent_device_takes_the_tier_offline, setup_uring, teardown),
		cmocka_unit_test_setup_teardown(a_failed_write_is_dead_and_harmless, setup_uring, teardown),
	};

	if (argc == 3 && !strcmp(argv[0], "refused"))
		return refused_child(argv[1], argv[2]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
