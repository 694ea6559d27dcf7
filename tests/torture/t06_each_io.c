/* SPDX-License-Identifier: MIT */
/*
 * torture 6: the Nth read, write or flush of a store's life is short, asked to come again, or fails
 * pass: no crash; nothing failed is found or served, nothing acknowledged lost, no space leaks
 * quick: N = 1 to the last, each with a third of the faults
 * full: N = 1 to the last, each with all of them
 * io: both
 * plants: short-transfer-ok failed-page-visible again-not-tried
 *
 * The tier and its engines run as they are; their calls are intercepted: pread, pwrite, fdatasync and fsync of
 * this process, and completions of the ring before the engine sees them. What a fault says was not transferred
 * is overwritten with garbage, on disk or in the buffer, so that nothing comes out right by luck.
 *
 * A life: make the store, write, free, sync, clean, read; then end, come back, scan, read. Faults that the
 * kernel means to be tried again (short by sectors, EAGAIN, EINTR) must leave no trace. Others may fail pages,
 * sync, or the store's opening with one line; sticky ones last until the end of the first life. Afterwards
 * everything is freed, and as much must fit as in a store that never saw a fault. The clock is ours, to get
 * past the tier's pauses.
 */
#include "many.h"

#include <dlfcn.h>
#include <liburing.h>
#include <stdatomic.h>
#include "tests/unit/nvme_fixture.h"

enum { LIVES, HIT, AGAIN, FAILED_PAGES, REFUSED, GONE };

enum fault {
	SHORT,
	ODD,
	NONE,
	EINTR_ONCE,
	EAGAIN_ONCE,
	EIO_ONCE,
	EIO_STICKY,
	ENOSPC_ONCE,
	ENOSPC_STICKY,
	FAULTS
};

static const char *const fault_name[] = {
	"short",  "short and odd",      "nothing moved", "EINTR", "EAGAIN", "EIO", "EIO from then on",
	"ENOSPC", "ENOSPC from then on"};

static struct {
	_Atomic uint64_t ops; /* so far, while counting */
	uint64_t nth;
	enum fault fault;
	_Atomic bool counting;
	_Atomic uint64_t hit;
	int fd[NVME_MAX_FILES]; /* of the ring */
	int64_t skip_ns;
} box;

/* ---- what the kernel says instead -------------------------------------------------------------- */

static bool for_writes(enum fault f)
{
	return f == ENOSPC_ONCE || f == ENOSPC_STICKY;
}

/* Is this operation the one? */
static bool its_turn(bool write, size_t len)
{
	uint64_t n;
	bool sticky = box.fault == EIO_STICKY || box.fault == ENOSPC_STICKY;

	if (!atomic_load(&box.counting))
		return false;
	n = atomic_fetch_add(&box.ops, 1) + 1;
	if (sticky ? n < box.nth : n != box.nth)
		return false;
	if ((for_writes(box.fault) && !write) || (!len && box.fault <= NONE) ||
	    (box.fault == SHORT && len <= 512))
		return false;
	atomic_fetch_add(&box.hit, 1);
	return true;
}

/* Bytes moved, or -errno, of `len`. */
static int64_t answer(size_t len)
{
	switch (box.fault) {
	case SHORT:
		return (int64_t)(len / 1024 * 512);
	case ODD:
		return (int64_t)len - 1;
	case NONE:
		return 0;
	case EINTR_ONCE:
		return -EINTR;
	case EAGAIN_ONCE:
		return -EAGAIN;
	case ENOSPC_ONCE:
	case ENOSPC_STICKY:
		return -ENOSPC;
	default:
		return -EIO;
	}
}

#define REAL(ret, name, ...)                                                                                   \
	static ret (*real)(__VA_ARGS__);                                                                       \
	if (!real)                                                                                             \
	*(void **)&real = dlsym(RTLD_NEXT, name)

static ssize_t real_pwrite(int fd, const void *buf, size_t len, off_t off)
{
	REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
	return real(fd, buf, len, off);
}

/* What was said not to be there is not: whole units from the first that is in doubt. */
static void garbage(bool write, int fd, void *buf, size_t len, uint64_t off, int64_t moved)
{
	size_t from = moved > 0 ? ALIGN_UP((size_t)moved, KVT_UNIT) : 0;
	char *g;

	if (from >= len)
		return;
	if (!write) {
		memset((char *)buf + MAX(moved, 0), 0xbd, len - (size_t)MAX(moved, 0));
		return;
	}
	g = aligned_alloc(KVT_UNIT, len - from);
	memset(g, 0xbd, len - from);
	if (real_pwrite(fd, g, len - from, (off_t)(off + from)) < 0)
		abort();
	free(g);
}

static bool a_container(int fd)
{
	char path[40], name[128];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, name, sizeof(name) - 1);
	return n > 0 && memmem(name, (size_t)n, "kvtier-0", 8);
}

static ssize_t end(int64_t r)
{
	if (r >= 0)
		return r;
	errno = (int)-r;
	return -1;
}

ssize_t pread(int fd, void *buf, size_t len, off_t off)
{
	REAL(ssize_t, "pread", int, void *, size_t, off_t);
	int64_t r;

	if (!a_container(fd) || !its_turn(false, len))
		return real(fd, buf, len, off);
	r = answer(len);
	if (r > 0 && real(fd, buf, len, off) != (ssize_t)len)
		abort();
	garbage(false, fd, buf, len, (uint64_t)off, r);
	return end(r);
}

ssize_t pwrite(int fd, const void *buf, size_t len, off_t off)
{
	int64_t r;

	if (!a_container(fd) || !its_turn(true, len))
		return real_pwrite(fd, buf, len, off);
	r = answer(len);
	if (r > 0 && real_pwrite(fd, buf, len, off) != (ssize_t)len)
		abort();
	garbage(true, fd, NULL, len, (uint64_t)off, r);
	return end(r);
}

int fdatasync(int fd)
{
	REAL(int, "fdatasync", int);
	return a_container(fd) && its_turn(false, 0) ? (int)end(answer(0)) : real(fd);
}

int fsync(int fd)
{
	REAL(int, "fsync", int);
	return a_container(fd) && its_turn(false, 0) ? (int)end(answer(0)) : real(fd);
}

int io_uring_register_files(struct io_uring *ring, const int *fds, unsigned n)
{
	REAL(int, "io_uring_register_files", struct io_uring *, const int *, unsigned);
	memcpy(box.fd, fds, MIN(n, NVME_MAX_FILES) * sizeof(int));
	return real(ring, fds, n);
}

static void spoil(struct io_uring_cqe *cqe)
{
	struct io_req *r = io_uring_cqe_get_data(cqe);
	uint32_t len = r ? r->len - r->done : 0;

	if (!r || cqe->res < 0 || !its_turn(r->op == IO_WRITE, len))
		return;
	cqe->res = (int)answer(len);
	if (r->op != IO_SYNC)
		garbage(r->op == IO_WRITE, box.fd[r->file], (char *)r->buf + r->done, len, r->off + r->done,
			cqe->res);
}

int io_uring_submit_and_wait(struct io_uring *ring, unsigned wait)
{
	REAL(int, "io_uring_submit_and_wait", struct io_uring *, unsigned);
	struct io_uring_cqe *cqe;
	unsigned head;
	int r = real(ring, wait);

	io_uring_for_each_cqe(ring, head, cqe) spoil(cqe);
	return r;
}

int clock_gettime(clockid_t clock, struct timespec *ts)
{
	REAL(int, "clock_gettime", clockid_t, struct timespec *);
	int r = real(clock, ts);
	int64_t ns = ts->tv_nsec + box.skip_ns;

	ts->tv_sec += ns / 1000000000;
	ts->tv_nsec = ns % 1000000000;
	return r;
}

/* ---- a life ------------------------------------------------------------------------------------ */

#define SEGMENT (256u << 10)

static struct fx *f;
static bool owed[FX_PAGES]; /* a sync that returned 0 was for this page, too */

static void use(bool counting)
{
	atomic_store(&box.counting, counting);
}

static void synced(void)
{
	uint64_t n = f->next;

	if (f->t->ops->sync(f->t) < 0)
		return;
	for (uint64_t no = 0; no < n; no++)
		owed[no] = f->page[no].live;
}

static void kill_some(uint64_t step)
{
	for (uint64_t no = step % 7; no < f->next; no += step)
		fx_kill(f, no);
}

static void read_all(bool sound)
{
	for (uint64_t no = 0; no < f->next; no++) {
		enum fx_read is;

		if (!f->page[no].live)
			continue;
		is = fx_check(f, no);
		assert_int_not_equal(is, FX_GONE);
		if (sound)
			assert_int_equal(is, FX_RIGHT);
	}
}

/* Everything is freed and room for it is found again: pages that fit. */
static unsigned room(void)
{
	int why = 0;
	unsigned n;

	for (uint64_t no = 0; no < f->next; no++)
		fx_kill(f, no);
	for (int i = 0; i < 4; i++) {
		assert_int_equal(f->t->ops->sync(f->t), 0);
		box.skip_ns += 2000000000;
		f->t->ops->tick(f->t, NULL, NULL);
	}
	n = fx_write(f, 1000, 60000, TIER_LONG, &why);
	assert_int_equal(why, -ENOSPC);
	return n;
}

static bool open_store(void)
{
	f->err[0] = '\0';
	if (fx_try_open(f) == 0)
		return true;
	assert_true(f->err[0] && !strchr(f->err, '\n'));
	many_count[REFUSED]++;
	return false;
}

/* What is wrong must be said, and nothing else. */
static void check_note(uint64_t hit_before)
{
	struct tier_stat st;
	bool failing = box.fault != SHORT && box.fault != EINTR_ONCE && box.fault != EAGAIN_ONCE;

	fx_stat(f, &st);
	/* What the thread pool was doing beside us comes back in its own time. */
	for (int i = 0;
	     i < 2000 && failing && atomic_load(&box.hit) != hit_before && !strstr(st.note, "failed"); i++) {
		usleep(1000);
		fx_tick(f);
		fx_stat(f, &st);
	}
	if (atomic_load(&box.hit) == hit_before || !failing) {
		assert_null(strstr(st.note, "failed"));
		assert_int_equal(st.errors, 0);
	} else {
		assert_non_null(strstr(st.note, "requests failed, last a "));
		assert_non_null(
			strstr(st.note, for_writes(box.fault) ? "No space left" : "Input/output error"));
	}
}

static void first_life(void)
{
	uint64_t hit;
	int why;

	use(true);
	if (!open_store()) { /* with the fault gone it can be made after all */
		use(false);
		fx_open(f);
	}
	hit = atomic_load(&box.hit);
	fx_write(f, 12, 9000, TIER_LONG, &why);
	synced();
	kill_some(3);
	fx_write(f, 20, 20000, TIER_SHORT, &why);
	fx_tick(f);
	synced();
	read_all(false);
	kill_some(2);
	for (int i = 0; i < 4; i++) {
		fx_write(f, 4, 30000, TIER_LONG, &why);
		fx_tick(f);
	}
	synced();
	kill_some(5);
	fx_write(f, 3, 5000, TIER_SHORT, &why);
	check_note(hit);
	fx_close(f);
}

static void second_life(void)
{
	bool hit = atomic_load(&box.hit) > 0, scan_hit;

	if (box.fault == EIO_STICKY || box.fault == ENOSPC_STICKY)
		use(false); /* the disk is well again */
	for (uint64_t no = 0; no < f->next; no++)
		many_count[FAILED_PAGES] += f->page[no].failed;
	if (!open_store()) {
		use(false);
		fx_open(f);
	}
	fx_scan(f);
	scan_hit = !hit && atomic_load(&box.hit);
	for (uint64_t no = 0; no < f->next; no++) {
		struct fx_page *p = &f->page[no];
		bool must = owed[no] && p->live;

		p->live = p->found;
		/* A segment that cannot be read at the restart is missing as a whole, and the note says so. */
		if (must && !p->found) {
			assert_true(scan_hit && box.fault != SHORT && box.fault != EINTR_ONCE &&
				    box.fault != EAGAIN_ONCE);
			many_count[GONE]++;
		}
	}
	read_all(hit || !box.fault);
	use(false);
	read_all(true);
}

static unsigned baseline;
static uint64_t last_op;

static void one_life(uint64_t nth, enum fault fault)
{
	snprintf(many_what, 48, "%s", fault_name[fault]);
	memset(owed, 0, sizeof(owed));
	box.nth = nth;
	box.fault = fault;
	atomic_store(&box.ops, 0);
	atomic_store(&box.hit, 0);
	f = fx_new_in(many_top);
	f->may_fail = true;
	f->per_seq = 4;
	f->cfg.segment = SEGMENT;
	f->cfg.size = 10 * SEGMENT;
	f->cfg.prealloc = true;
	f->cfg.deadline_ms = 600000; /* of the clock that is ours */
	f->cfg.no_uring = many_threads();
	first_life();
	second_life();
	if (!baseline && nth == UINT64_MAX)
		baseline = room();
	else
		assert_int_equal(room(), baseline);
	last_op = atomic_load(&box.ops);
	fx_free(f);
	many_count[LIVES]++;
	many_count[HIT] += atomic_load(&box.hit) > 0;
	many_count[AGAIN] +=
		atomic_load(&box.hit) && (fault == SHORT || fault == EINTR_ONCE || fault == EAGAIN_ONCE);
}

static void with_number(uint64_t n)
{
	for (enum fault k = 0; k < FAULTS; k++) {
		if (!many_full() && (n + k) % 3)
			continue;
		one_life(n, k);
	}
}

/* How many operations a life has, and how much fits: in a process of its own, for its counters are shared. */
static void sound_life(uint64_t n)
{
	one_life(UINT64_MAX, EIO_ONCE);
	many_count[0] = baseline;
	many_count[1] = last_op;
}

int main(void)
{
	uint64_t sum[MANY_COUNTERS], ops, start = now_ns(), only;
	unsigned bad = many_run(0, 1, sound_life, sum);
	bool alone = many_only(&only);

	if (!many_tap(!bad && sum[0] && sum[1], "a life without faults has %s operations", many_comma(sum[1])))
		return many_end();
	baseline = (unsigned)sum[0];
	ops = sum[1];
	bad = many_run(alone ? only : 1, alone ? 1 : ops + 4, with_number, sum);
	many_tap(!bad, "%s lives with a fault at their Nth operation", many_comma(sum[LIVES]));
	if (!bad && !alone)
		many_tap(sum[HIT] > ops && sum[AGAIN] && sum[FAILED_PAGES] && sum[REFUSED] && sum[GONE],
			 "faults happened: retried, failed pages, refused stores, unreadable segments");
	printf("# figure: %s of %s lives hit by a fault at one of %s operations", many_comma(sum[HIT]),
	       many_comma(sum[LIVES]), many_comma(ops));
	printf(", %s pages failed and none of them seen, 0 bytes wrong, no space lost\n",
	       many_comma(sum[FAILED_PAGES]));
	printf("# %s kinds of fault, last %s; %s stores refused", many_comma(FAULTS), fault_name[FAULTS - 1],
	       many_comma(sum[REFUSED]));
	printf(", %s pages unreadable at the restart, %.1f s\n", many_comma(sum[GONE]),
	       (double)(now_ns() - start) / 1e9);
	return many_end();
}
