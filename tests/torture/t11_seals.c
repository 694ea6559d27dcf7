/* SPDX-License-Identifier: MIT */
/*
 * torture 11: attacks on published memory and on the size of shared memory
 * pass: 0 successful changes to published memory, 0 SIGBUS, as the same and as another UID
 * quick: every attack on every segment, once
 * full: 200 times over, the daemon working meanwhile
 * plants: plan-unsealed memfd-open-to-all exchange-unsealed
 *
 * A real kvtierd hands out everything that it ever publishes: plans, a directory, a segment of DRAM, a scorer,
 * the feed, an answer in JSON; and exchange memory: a control segment, a region. Processes that hold those
 * descriptors then try to write, resize, seal, map, reopen and splice, as the daemon's own UID (they may open
 * /proc/PID/fd of the daemon) and as nobody. Afterwards every byte must be as it was, the daemon must serve,
 * and the neighbour's rows must be right. In exchange memory writing and punching are everybody's right;
 * changing its size or seals is not.
 */
#include <linux/userfaultfd.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include "shm/direct.h"
#include "tests/unit/scorer_fixture.h"

#define TARGETS 16
#define NOBODY 65534

struct target {
	char name[32];
	int fd;
	size_t size;
	bool published;
	uint8_t *before; /* what it held; NULL: the daemon may write there meanwhile */
	const uint8_t *map;
};

struct prey {
	char dir[64], sock[108], admin[108];
	pid_t pid;
	struct runtime rt; /* the neighbour */
	struct rt_seq near;
	struct wlink l, feed;
	struct wseq q;
	struct target t[TARGETS];
	unsigned n;
};

/* ---- attempts: 0 or more: it was possible; -1 with errno: it was not ------------------------------- */

static long try_write(int fd, size_t size)
{
	return pwrite(fd, "x", 1, 0);
}
static long try_writev(int fd, size_t size)
{
	struct iovec v = {.iov_base = "xy", .iov_len = 2};

	return pwritev(fd, &v, 1, (off_t)size / 2);
}
static long try_append(int fd, size_t size)
{
	return pwrite(fd, "x", 1, (off_t)size);
}
static long try_shrink(int fd, size_t size)
{
	return ftruncate(fd, 0);
}
static long try_grow(int fd, size_t size)
{
	return ftruncate(fd, (off_t)size * 2);
}
static long try_extend(int fd, size_t size)
{
	return fallocate(fd, 0, (off_t)size, 4096);
}
static long try_punch(int fd, size_t size)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)size);
}
static long try_zero(int fd, size_t size)
{
	return fallocate(fd, FALLOC_FL_ZERO_RANGE, 0, (off_t)size);
}
static long try_collapse(int fd, size_t size)
{
	return fallocate(fd, FALLOC_FL_COLLAPSE_RANGE, 0, 4096);
}
static long try_seal(int fd, size_t size)
{
	return fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE);
}
static long try_seal_future(int fd, size_t size)
{
	return fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE);
}
static long try_map(int fd, size_t size)
{
	uint8_t *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (p == MAP_FAILED)
		return -1;
	p[0]++;
	munmap(p, size);
	return 0;
}
static void *readable(int fd, size_t size)
{
	void *p = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);

	return p == MAP_FAILED ? NULL : p;
}
static long try_protect(int fd, size_t size)
{
	uint8_t *p = readable(fd, size);
	long r = p ? mprotect(p, size, PROT_READ | PROT_WRITE) : -1;

	if (!r)
		p[0]++;
	return r;
}
static long try_remove(int fd, size_t size)
{
	void *p = readable(fd, size);

	return p ? madvise(p, size, MADV_REMOVE) : -1;
}
static long try_populate(int fd, size_t size)
{
	void *p = readable(fd, size);

	return p ? madvise(p, size, 23 /* MADV_POPULATE_WRITE */) : -1;
}
static long try_proc_mem(int fd, size_t size)
{
	uint8_t *p = readable(fd, size);
	int mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	long r = p && mem >= 0 ? pwrite(mem, "x", 1, (off_t)(uintptr_t)p) : -1;

	close_fdp(&mem);
	return r;
}
static long try_vm_writev(int fd, size_t size)
{
	struct iovec from = {.iov_base = "x", .iov_len = 1},
		     to = {.iov_base = readable(fd, size), .iov_len = 1};

	return to.iov_base ? process_vm_writev(getpid(), &from, 1, &to, 1, 0) : -1;
}
static long try_read_into(int fd, size_t size)
{
	_cleanup_close_ int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	void *p = readable(fd, size);

	return p ? read(zero, p, 4096) : -1;
}
static long try_userfault(int fd, size_t size)
{
	_cleanup_close_ int u = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register reg = {.range.len = ALIGN_UP(size, 4096), .mode = UFFDIO_REGISTER_MODE_MISSING};
	void *p = readable(fd, size);

	if (u < 0 || !p || ioctl(u, UFFDIO_API, &api) < 0)
		return -1;
	reg.range.start = (uintptr_t)p;
	return ioctl(u, UFFDIO_REGISTER, &reg);
}
static long pipe_with(const char *text, int end[2])
{
	return pipe2(end, O_CLOEXEC) < 0 ? -1 : write(end[1], text, 1);
}
static long try_splice(int fd, size_t size)
{
	loff_t off = 0;
	int p[2];
	long r = pipe_with("x", p) == 1 ? splice(p[0], NULL, fd, &off, 1, 0) : -1;

	close(p[0]);
	close(p[1]);
	return r;
}
/* Its page in a pipe, and then more written to that pipe: it must not end up in the page. */
static long try_splice_out(int fd, size_t size)
{
	loff_t off = 0;
	int p[2];

	if (pipe2(p, O_CLOEXEC) < 0)
		return -1;
	if (splice(fd, &off, p[1], NULL, 1, 0) == 1)
		(void)!write(p[1], "xxxx", 4);
	close(p[0]);
	close(p[1]);
	errno = 0;
	return -1; /* the bytes tell */
}
static long try_vmsplice(int fd, size_t size)
{
	struct iovec v = {.iov_base = readable(fd, size), .iov_len = 4096};
	int p[2];

	if (!v.iov_base || pipe2(p, O_CLOEXEC) < 0)
		return -1;
	if (vmsplice(p[1], &v, 1, SPLICE_F_GIFT) > 0)
		(void)!write(p[1], "xxxx", 4);
	if (write(p[1], "x", 1) == 1)
		(void)!vmsplice(p[0], &v, 1, 0); /* pipe to memory: copies */
	close(p[0]);
	close(p[1]);
	errno = 0;
	return -1;
}
static long try_sendfile(int fd, size_t size)
{
	_cleanup_close_ int from = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);

	if (lseek(fd, 0, SEEK_SET) < 0)
		return -1;
	return sendfile(fd, from, NULL, 4096);
}
static long try_copy_range(int fd, size_t size)
{
	_cleanup_close_ int from = memfd_create("from", MFD_CLOEXEC);
	loff_t a = 0, b = 0;

	if (from < 0 || ftruncate(from, 4096) < 0)
		return -1;
	return copy_file_range(from, &a, fd, &b, 4096, 0);
}

struct attempt {
	const char *name;
	long (*run)(int fd, size_t size);
	bool exchange_too; /* nobody may do this to exchange memory either */
};

static const struct attempt attempts[] = {
	{"pwrite", try_write, false},
	{"pwritev", try_writev, false},
	{"pwrite past the end", try_append, true},
	{"ftruncate to 0", try_shrink, true},
	{"ftruncate to more", try_grow, true},
	{"fallocate past the end", try_extend, true},
	{"punch", try_punch, false},
	{"zero range", try_zero, false},
	{"collapse range", try_collapse, true},
	{"seal write", try_seal, true},
	{"seal future write", try_seal_future, true},
	{"mmap for writing", try_map, false},
	{"mprotect for writing", try_protect, false},
	{"MADV_REMOVE", try_remove, false},
	{"MADV_POPULATE_WRITE", try_populate, false},
	{"/proc/self/mem", try_proc_mem, false},
	{"process_vm_writev", try_vm_writev, false},
	{"read() into it", try_read_into, false},
	{"userfaultfd", try_userfault, false},
	{"splice into", try_splice, false},
	{"splice out", try_splice_out, false},
	{"vmsplice", try_vmsplice, false},
	{"sendfile", try_sendfile, false},
	{"copy_file_range", try_copy_range, false},
};

static unsigned tried;

/* How many attempts worked on this descriptor. */
static unsigned attack_fd(const struct target *t, int fd, const char *how)
{
	unsigned worked = 0;

	for (size_t i = 0; i < ARRAY_SIZE(attempts); i++) {
		if (!t->published && !attempts[i].exchange_too)
			continue;
		tried++;
		if (attempts[i].run(fd, t->size) < 0)
			continue;
		printf("# %s, %s: %s worked\n", t->name, how, attempts[i].name);
		worked++;
	}
	return worked;
}

static unsigned attack(const struct target *t, bool stranger)
{
	static const int how[] = {O_RDWR, O_WRONLY, O_RDWR | O_TRUNC};
	char path[64];
	unsigned worked = attack_fd(t, t->fd, "as it came");
	struct stat st;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", t->fd);
	for (size_t i = 0; i < ARRAY_SIZE(how); i++) {
		int fd = open(path, how[i] | O_CLOEXEC);

		tried++;
		if (fd < 0)
			continue;
		if (stranger) {
			printf("# %s: another user reopened it for writing\n", t->name);
			worked++;
		}
		worked += attack_fd(t, fd, "reopened");
		close(fd);
	}
	/* Its mode is its owner's to change; what is sealed stays sealed. */
	if (fstat(t->fd, &st) == 0 && fchmod(t->fd, 0666) == 0) {
		if (stranger) {
			printf("# %s: another user changed its mode\n", t->name);
			worked++;
		}
		worked += attack_fd(t, t->fd, "with another mode");
		fchmod(t->fd, st.st_mode & 0777);
	}
	return worked;
}

/* What the daemon itself holds, where the kernel lets us look. */
static unsigned attack_daemon(const struct prey *p, bool stranger)
{
	unsigned worked = 0, seen = 0;
	char path[64];

	for (int fd = 3; fd < 256; fd++) {
		struct target t = {.name = "of the daemon", .published = true};
		struct stat st;
		int seals;

		snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)p->pid, fd);
		t.fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
		if (t.fd < 0)
			continue;
		if (stranger) {
			printf("# another user opened %s\n", path);
			worked++;
		}
		seals = fcntl(t.fd, F_GET_SEALS);
		/* Its private memory is not published: whoever is the daemon's user may do as the daemon. */
		if (seals >= 0 && (seals & (F_SEAL_FUTURE_WRITE | F_SEAL_GROW)) && fstat(t.fd, &st) == 0) {
			t.size = (size_t)st.st_size;
			t.published = seals & F_SEAL_FUTURE_WRITE;
			worked += attack_fd(&t, t.fd, path);
			seen++;
		}
		close(t.fd);
	}
	if (!stranger)
		worked += seen < 4; /* plans, feed, control segment, region at least */
	return worked;
}

/* Exit status: how many worked, 255 at most; a signal is one, too. */
static unsigned in_a_child(struct prey *p, bool stranger)
{
	int status = 0;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	assert_true(pid >= 0);
	if (!pid) {
		unsigned worked = 0;

		if (stranger && (setgid(NOBODY) < 0 || setuid(NOBODY) < 0))
			_exit(200);
		prctl(PR_SET_DUMPABLE, 1); /* else the kernel closes its own /proc/self to it */
		for (unsigned i = 0; i < p->n; i++)
			worked += attack(&p->t[i], stranger);
		worked += attack_daemon(p, stranger);
		printf("# as %s: %u attempts, %u worked\n", stranger ? "nobody" : "the daemon's user", tried,
		       worked);
		fflush(stdout);
		_exit((int)MIN(worked, 199u));
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	if (WIFSIGNALED(status))
		print_message("# the attacker got signal %d\n", WTERMSIG(status));
	return WIFEXITED(status) ? (unsigned)WEXITSTATUS(status) : 200;
}

/* ---- afterwards ----------------------------------------------------------------------------------- */

static unsigned changed(const struct prey *p)
{
	unsigned n = 0;

	for (unsigned i = 0; i < p->n; i++) {
		const struct target *t = &p->t[i];
		struct stat st;

		if (fstat(t->fd, &st) < 0 || (size_t)st.st_size != t->size) {
			print_message("# %s: %lld bytes, must be %zu\n", t->name, (long long)st.st_size,
				      t->size);
			n++;
		} else if (t->before && memcmp(t->before, t->map, t->size)) {
			print_message("# %s: bytes changed\n", t->name);
			n++;
		}
	}
	return n;
}

static void neighbour_works(struct prey *p)
{
	if (p->near.rows + 32 > 1000) {
		assert_int_equal(kvtier_seq_truncate(p->near.s, 100), 0);
		p->near.rows = 100;
		p->near.salt++;
	}
	assert_int_equal(rt_append(&p->near, 32), 0);
	assert_int_equal(rt_plan(&p->near, 64, 200, 0, NULL), 0);
	assert_int_equal(rt_wrong(&p->near), 0);
	assert_int_equal(rt_plan(&p->near, 200, 200, 0, NULL), 0);
	assert_int_equal(rt_wrong(&p->near), 0);
}

static void nothing_published_can_be_changed(void **state)
{
	struct prey *p = *state;
	bool full = getenv("KVT_TORTURE") && !strcmp(getenv("KVT_TORTURE"), "full"), root = getuid() == 0;
	unsigned rounds = full ? 200 : 1, worked = 0;

	if (!root)
		print_message("# SKIP attacks as another user: needs root\n");
	for (unsigned i = 0; i < rounds; i++) {
		worked += in_a_child(p, false);
		worked += root ? in_a_child(p, true) : 0;
		worked += changed(p);
		neighbour_works(p);
		if (worked)
			break;
	}
	print_message(
		"# figure: %zu kinds of attack on %u segments, %u times over, as the same%s user: %u worked\n",
		ARRAY_SIZE(attempts), p->n, rounds, root ? " and as another" : "", worked);
	assert_int_equal(worked, 0);
	assert_int_equal(kill(p->pid, 0), 0);
	assert_int_equal(waitpid(p->pid, NULL, WNOHANG), 0);
}

/* Writing to its own exchange memory, and punching it, costs nobody but the client. */
static void exchange_memory_is_its_clients(void **state)
{
	struct prey *p = *state;

	for (unsigned i = 0; i < p->n; i++)
		if (!p->t[i].published) {
			assert_int_equal(try_punch(p->t[i].fd, p->t[i].size), 0);
			assert_int_equal(try_map(p->t[i].fd, p->t[i].size), 0);
		}
	wq_poke(&p->q);
	for (int i = 0; i < 20; i++)
		neighbour_works(p);
	assert_int_equal(waitpid(p->pid, NULL, WNOHANG), 0);
}

/* ---- the daemon, and what it gives away -------------------------------------------------------------- */

static void add(struct prey *p, const char *name, int fd, uint64_t size, bool published)
{
	struct target *t = &p->t[p->n++];

	assert_in_range(p->n, 1, TARGETS);
	snprintf(t->name, sizeof(t->name), "%s", name);
	t->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	assert_true(t->fd >= 0);
	t->size = ALIGN_UP(size, KVT_UNIT);
	t->published = published;
	t->map = readable(t->fd, t->size);
	assert_non_null(t->map);
}

static void ask_admin(struct wlink *l, const char *verb)
{
	union {
		struct wire_admin m;
		_Alignas(8) uint8_t b[256];
	} u;
	size_t n = strlen(verb) + 1;

	wire_init(&u.m.hdr, W_ADMIN, sizeof(u.m) + n, 9);
	u.m.argc = 1;
	u.m.argv_bytes = (uint32_t)n;
	memcpy(u.m.argv, verb, n);
	assert_int_equal(wl_call(l, &u.m.hdr), 0);
}

static void start(struct prey *p)
{
	const char *build = getenv("KVT_BUILD") ?: "build";
	char conf[128], exe[256];
	FILE *f;

	snprintf(p->dir, sizeof(p->dir), "/tmp/kvt-seals-XXXXXX");
	assert_non_null(mkdtemp(p->dir));
	snprintf(conf, sizeof(conf), "%s/conf", p->dir);
	snprintf(exe, sizeof(exe), "%s/kvtierd", build);
	snprintf(p->sock, sizeof(p->sock), "%s/kvtierd.sock", p->dir);
	snprintf(p->admin, sizeof(p->admin), "%s/admin.sock", p->dir);
	f = fopen(conf, "w");
	assert_non_null(f);
	fprintf(f,
		"[kvtierd]\nrun_dir=%s\nworkers=2\nlog_level=err\n[dram]\nsize=64M\nsegment=16M\nhuge_pages="
		"no\n"
		"[policy]\ndefault=kvp\nmodel_dir=%s\n[tenant default]\n",
		p->dir, p->dir);
	fclose(f);
	p->pid = fork();
	if (!p->pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		execl(exe, "kvtierd", "--config", conf, NULL);
		_exit(127);
	}
	for (int i = 0; i < 500 && access(p->admin, F_OK) < 0; i++)
		usleep(10000);
}

static void published_dram(struct prey *p)
{
	struct wire_budget b = wq_budget(KVT_ROWS_ALL, 0, 0);
	struct wire_handle d;
	struct wire_segment s;
	const struct direct_page *e;

	strcpy(b.policy, "client");
	assert_int_equal(wq_make(&p->q, &p->l, 7, 1200, 1200, 4096, 256 << 10, 256 << 10, 1), 0);
	assert_int_equal(wq_open(&p->q, W_OP_OPEN, KVT_EPHEMERAL, 0, W_OPEN_DIRECT, &b), 0);
	assert_int_equal(wq_append(&p->q, 600), 0);
	assert_int_equal(wq_plan(&p->q, 100, KVT_ROWS_ALL, 0), 0);
	add(p, "a region", p->q.region.fd, p->q.region.size, false);
	wire_init(&d.hdr, W_DIRECT, sizeof(d), 10);
	d.handle = p->q.handle;
	assert_int_equal(wl_call(&p->l, &d.hdr), 0);
	add(p, "a directory", p->l.fds[0], ((struct wire_direct_reply *)p->l.reply)->bytes, true);
	e = (const struct direct_page *)(p->t[p->n - 1].map + sizeof(struct direct_hdr));
	for (int i = 0; i < 200 && !e->place; i++)
		usleep(5000);
	assert_true(e->place != 0);
	wire_init(&s.hdr, W_SEGMENT, sizeof(s), 11);
	s.segment = direct_segment(e->place);
	assert_int_equal(wl_call(&p->l, &s.hdr), 0);
	add(p, "a segment of DRAM", p->l.fds[0], ((struct wire_segment_reply *)p->l.reply)->bytes, true);
}

static int set_up(void **state)
{
	struct prey *p = calloc(1, sizeof(*p));
	struct wire_scorer_reply sr;
	struct fixture f = {0};

	*state = p;
	signal(SIGPIPE, SIG_IGN);
	start(p);
	snprintf(f.h.dir, sizeof(f.h.dir), "%s", p->dir);
	write_weights(&f, 2, 21);
	assert_int_equal(rt_open(&p->rt, p->sock, 2), 0);
	assert_int_equal(rt_prepare(&p->near, &p->rt, 5, 512, 512, 1024), 0);
	assert_int_equal(rt_seq_open(&p->near, KVT_EPHEMERAL, NULL), 0);
	assert_int_equal(wl_connect(&p->l, p->sock), 0);
	register_kvp(&p->l);
	assert_int_equal(ask_scorer(&p->l, "kvp", &sr), 0);
	add(p, "a scorer", p->l.fds[0], sr.bytes, true);
	published_dram(p);
	add(p, "plans", p->l.plans.fd, p->l.plans.size, true);
	add(p, "a control segment", p->l.ctl.fd, p->l.ctl.size, false);
	ask_admin(&p->l, "status");
	add(p, "an answer", p->l.fds[0], ((struct wire_admin_reply *)p->l.reply)->json_bytes, true);
	p->feed.fd = sock_connect(p->admin);
	ask_admin(&p->feed, "watch");
	assert_true(p->feed.n_fds >= 1);
	{
		int fd = p->feed.fds[p->feed.n_fds - 1];
		struct stat st;

		assert_int_equal(fstat(fd, &st), 0);
		add(p, "the feed", fd, (uint64_t)st.st_size, true);
	}
	for (unsigned i = 0; i < p->n; i++)
		if (p->t[i].published && strcmp(p->t[i].name, "the feed")) {
			p->t[i].before = malloc(p->t[i].size);
			memcpy(p->t[i].before, p->t[i].map, p->t[i].size);
		}
	return 0;
}

static int tear_down(void **state)
{
	struct prey *p = *state;
	int status;

	kill(p->pid, SIGTERM);
	assert_int_equal(waitpid(p->pid, &status, 0), p->pid);
	harness_rm(p->dir);
	assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(nothing_published_can_be_changed),
		cmocka_unit_test(exchange_memory_is_its_clients),
	};

	setenv("CMOCKA_MESSAGE_OUTPUT", "TAP", 0);
	return cmocka_run_group_tests(tests, set_up, tear_down);
}
