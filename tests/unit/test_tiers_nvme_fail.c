/* SPDX-License-Identifier: MIT */
/* Where things fail: hosts that refuse io_uring or locked memory, failed writes, a device that stops answering.
 */
#include "nvme_fixture.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

static int setup(void **state)
{
	*state = fx_new();
	return 0;
}

static int teardown(void **state)
{
	fx_free(*state);
	return 0;
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

struct granted {
	uint32_t bytes; /* and not given back */
	unsigned n;
};

static uint32_t grant_and_fall_silent(void *arg, uint32_t bytes, bool urgent)
{
	struct granted *g = arg;

	fake.hold = true;
	g->bytes += bytes;
	g->n++;
	return bytes;
}

static void given_back(void *arg, uint32_t bytes, uint64_t ns)
{
	((struct granted *)arg)->bytes -= bytes;
	assert_int_equal(ns, 0); /* nothing was written */
}

/* Else the owner's other writes would wait for it for ever, instead of failing. */
static void what_the_cleaner_was_granted_comes_back_at_the_deadline(void **state)
{
	struct fx *f = *state;
	struct granted g = {0};
	struct tier_stat st;
	unsigned n;
	int why;

	f->cfg.size = 32 << 20;
	f->cfg.deadline_ms = 1500;
	f->cfg.pace = (struct tier_pace){.arg = &g, .take = grant_and_fall_silent, .ended = given_back};
	f->knobs.engine = &fake_ops;
	fx_open(f);
	n = fx_write(f, 2000, 32768, TIER_LONG, &why);
	assert_int_equal(why, -ENOSPC);
	for (uint64_t no = 0; no < n; no++)
		if (no % 4)
			fx_kill(f, no);
	do {
		fx_tick(f);
		usleep(5000);
		fx_stat(f, &st);
	} while (!st.offline);
	assert_true(g.n > 0);
	assert_int_equal(g.bytes, 0);
	fx_close(f);
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

#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		T(without_io_uring_threads_serve),
		T(without_memlock_buffers_stay_unregistered),
		T(consecutive_pages_travel_as_one_request),
		T(a_silent_device_takes_the_tier_offline),
		T(what_the_cleaner_was_granted_comes_back_at_the_deadline),
		T(a_failed_write_is_dead_and_harmless),
	};

	if (argc == 3 && !strcmp(argv[0], "refused"))
		return refused_child(argv[1], argv[2]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
