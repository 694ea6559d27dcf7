/* SPDX-License-Identifier: MIT */
/*
 * The io_uring engine: one thread owns one ring and is the only one to touch
 * it. Work comes in over a lock-free stack; the owner writes the wake eventfd only
 * when the thread said that it sleeps, and the thread sleeps in the ring itself,
 * where a read of that eventfd is always pending: so one system call waits for
 * disk and owner alike, and the ring needs no operation but READ, WRITE and FSYNC.
 *
 * The ring starts disabled, is restricted to those operations on registered
 * files, and is enabled by the thread, which thereby becomes its single issuer. Older
 * kernels refuse some of the set-up flags: they are dropped stepwise. Registered buffers are
 * dropped when RLIMIT_MEMLOCK is too small; the note says so.
 */
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>

#include "shm/trial.h"
#include "shm/util.h"
#include "tiers/nvme_io.h"

#define MANY 8u /* requests in flight that keep a device busy for a while */

struct uring {
	struct io_engine engine;
	struct io_uring ring;
	pthread_t thread;
	struct io_cfg cfg;
	bool fixed;    /* the arena is registered */
	int wake_fd;   /* owner → thread; registered as file cfg.fds */
	int exited_fd; /* readable once the thread has ended */
	struct io_stack inbox, done;
	atomic_bool sleeping;
	atomic_bool stop;
	/* The thread's own from here on. */
	struct io_queue queue[2]; /* writes and syncs; reads */
	unsigned inflight;
	unsigned turn;
	bool waking; /* the read of wake_fd is in the ring */
	uint64_t wake_value;
	bool stuck; /* ended with requests in flight */
	struct io_req *finished, **finished_tail;
};

static void finish(struct uring *u, struct io_req *r, int res)
{
	r->res = res;
	r->next = NULL;
	*u->finished_tail = r;
	u->finished_tail = &r->next;
}

static void publish(struct uring *u)
{
	struct io_req *list = u->finished;

	if (!list)
		return;
	u->finished = NULL;
	u->finished_tail = &u->finished;
	if (io_stack_push(&u->done, list))
		(void)eventfd_write(u->cfg.event_fd, 1);
}

static void prep(struct uring *u, struct io_uring_sqe *sqe, struct io_req *r)
{
	char *buf = (char *)r->buf + r->done;
	uint32_t len = r->len - r->done;
	uint64_t off = r->off + r->done;

	if (r->op == IO_SYNC)
		io_uring_prep_fsync(sqe, r->file, IORING_FSYNC_DATASYNC);
	else if (r->op == IO_READ && r->fixed && u->fixed)
		io_uring_prep_read_fixed(sqe, r->file, buf, len, off, 0);
	else if (r->op == IO_READ)
		io_uring_prep_read(sqe, r->file, buf, len, off);
	else if (r->fixed && u->fixed)
		io_uring_prep_write_fixed(sqe, r->file, buf, len, off, 0);
	else
		io_uring_prep_write(sqe, r->file, buf, len, off);
	sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, r);
}

/* Reads and writes take turns, so that a burst of demotions does not hold up a promotion. */
static struct io_req *next_request(struct uring *u)
{
	struct io_req *r = io_queue_pop(&u->queue[u->turn ^= 1]);

	return r ? r : io_queue_pop(&u->queue[u->turn ^ 1]);
}

static void fill(struct uring *u)
{
	struct io_uring_sqe *sqe;
	struct io_req *r;

	if (!u->waking && (sqe = io_uring_get_sqe(&u->ring))) {
		io_uring_prep_read(sqe, (int)u->cfg.fds, &u->wake_value, sizeof(u->wake_value), 0);
		sqe->flags |= IOSQE_FIXED_FILE;
		io_uring_sqe_set_data(sqe, NULL);
		u->waking = true;
	}
	while (u->inflight < u->cfg.depth && (r = next_request(u))) {
		sqe = io_uring_get_sqe(&u->ring);
		if (!sqe) {
			io_queue_push_front(&u->queue[r->op == IO_READ], r);
			return;
		}
		prep(u, sqe, r);
		u->inflight++;
	}
}

static void complete(struct uring *u, struct io_req *r, int res)
{
	u->inflight--;
	if (io_again(-res, &r->tries)) {
		io_queue_push_front(&u->queue[r->op == IO_READ], r);
		return;
	}
	if (res < 0 || r->op == IO_SYNC) {
		finish(u, r, res);
		return;
	}
	r->done += planted("short-transfer-ok") ? r->len - r->done : (uint32_t)res;
	if (r->done >= r->len)
		finish(u, r, 0);
	else if (!res || r->done % 512) /* the file ended, or what is left cannot be read directly */
		finish(u, r, -EIO);
	else
		io_queue_push_front(&u->queue[r->op == IO_READ], r);
}

static void take_completions(struct uring *u)
{
	struct io_uring_cqe *cqe;
	unsigned head, n = 0;

	io_uring_for_each_cqe(&u->ring, head, cqe)
	{
		struct io_req *r = io_uring_cqe_get_data(cqe);

		n++;
		if (r)
			complete(u, r, cqe->res);
		else
			u->waking = false;
	}
	io_uring_cq_advance(&u->ring, n);
}

static void take_inbox(struct uring *u)
{
	for (struct io_req *r = io_stack_take(&u->inbox), *next; r; r = next) {
		next = r->next;
		io_queue_add(&u->queue[r->op == IO_READ], r);
	}
}

static void cancel_queued(struct uring *u)
{
	struct io_req *r;

	take_inbox(u);
	while ((r = next_request(u)))
		finish(u, r, -ECANCELED);
}

/*
 * How many completions to sleep for. While the device has plenty to do, a few at a time, and nobody wakes us
 * for new work: the next completions come soon, and then all of it goes down together. A wake-up per
 * request costs more than the request (a switch, and on a virtual disk an exit per doorbell). With little in
 * flight the next completion counts, and so does every new request.
 */
static unsigned patience(struct uring *u)
{
	if (u->inflight >= MANY)
		return MIN(u->inflight / 4, MANY);
	atomic_store(&u->sleeping, true);
	if (!atomic_load(&u->inbox.top))
		return 1;
	atomic_store(&u->sleeping, false);
	return 0;
}

/* The ring itself failed, which nothing here can mend: answer what is queued, keep the rest as stuck. */
static void *uring_thread(void *arg)
{
	struct uring *u = arg;
	/* liburing 2.3 declares wrappers for this and for the restrictions but does not export them. */
	int r = io_uring_register((unsigned)u->ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);

	io_thread_begin("kvtier-uring");
	while (r >= 0 || r == -EINTR || r == -EAGAIN || r == -EBUSY) {
		if (atomic_load(&u->stop)) {
			cancel_queued(u);
			publish(u);
			if (!u->inflight)
				break;
		}
		take_inbox(u);
		fill(u);
		r = io_uring_submit_and_wait(&u->ring, patience(u));
		atomic_store(&u->sleeping, false);
		take_completions(u);
		publish(u);
	}
	u->stuck = u->inflight > 0;
	while (r < 0 && !atomic_load(&u->stop)) {
		struct pollfd pfd = {.fd = u->wake_fd, .events = POLLIN};
		uint64_t v;

		cancel_queued(u);
		publish(u);
		atomic_store(&u->sleeping, true);
		if (!atomic_load(&u->inbox.top) && poll(&pfd, 1, 1000) == 1)
			(void)eventfd_read(u->wake_fd, &v);
	}
	cancel_queued(u);
	publish(u);
	(void)eventfd_write(u->exited_fd, 1);
	return NULL;
}

static int ring_setup(struct uring *u)
{
	static const unsigned flags[] = {
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
		IORING_SETUP_COOP_TASKRUN,
		0,
	};
	int r = -EINVAL;

	for (unsigned i = 0; i < ARRAY_SIZE(flags) && r == -EINVAL; i++) {
		struct io_uring_params p = {.flags = flags[i] | IORING_SETUP_R_DISABLED};

		r = io_uring_queue_init_params(u->cfg.depth + 2, &u->ring, &p);
	}
	return r;
}

static int restrict_ring(struct uring *u)
{
	static const uint8_t ops[] = {IORING_OP_READ, IORING_OP_READ_FIXED, IORING_OP_WRITE,
				      IORING_OP_WRITE_FIXED, IORING_OP_FSYNC};
	struct io_uring_restriction res[ARRAY_SIZE(ops) + 2] = {0};
	unsigned n = 0;

	for (; n < ARRAY_SIZE(ops); n++) {
		res[n].opcode = IORING_RESTRICTION_SQE_OP;
		res[n].sqe_op = ops[n];
	}
	res[n].opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED;
	res[n++].sqe_flags = IOSQE_FIXED_FILE;
	res[n].opcode = IORING_RESTRICTION_SQE_FLAGS_REQUIRED;
	res[n++].sqe_flags = IOSQE_FIXED_FILE;
	return io_uring_register((unsigned)u->ring.ring_fd, IORING_REGISTER_RESTRICTIONS, res, n);
}

static int register_files(struct uring *u)
{
	_cleanup_free_ int *fds = malloc((u->cfg.fds + 1) * sizeof(*fds));

	if (!fds)
		return -ENOMEM;
	memcpy(fds, u->cfg.fd, u->cfg.fds * sizeof(*fds));
	fds[u->cfg.fds] = u->wake_fd;
	return io_uring_register_files(&u->ring, fds, u->cfg.fds + 1);
}

static void uring_destroy(struct uring *u)
{
	if (u->ring.ring_fd >= 0)
		io_uring_queue_exit(&u->ring);
	close_fdp(&u->wake_fd);
	close_fdp(&u->exited_fd);
	free(u);
}

static int uring_open(struct io_engine **ret, const struct io_cfg *cfg, char *note, size_t notesize)
{
	struct uring *u = calloc(1, sizeof(*u));
	struct iovec iov = {cfg->arena, cfg->arena_bytes};
	int r;

	if (!u)
		return -ENOMEM;
	u->engine.ops = &io_uring_ops;
	u->cfg = *cfg;
	u->ring.ring_fd = -1;
	u->finished_tail = &u->finished;
	io_queue_init(&u->queue[0]);
	io_queue_init(&u->queue[1]);
	u->wake_fd = eventfd(0, EFD_CLOEXEC);
	u->exited_fd = eventfd(0, EFD_CLOEXEC);
	r = u->wake_fd < 0 || u->exited_fd < 0 ? -errno : ring_setup(u);
	if (r < 0) {
		u->ring.ring_fd = -1;
		goto fail;
	}
	if ((r = register_files(u)) < 0)
		goto fail;
	r = io_uring_register_buffers(&u->ring, &iov, 1);
	u->fixed = r >= 0;
	if (r < 0)
		snprintf(note, notesize, "buffers not registered (%s: raise RLIMIT_MEMLOCK)", strerror(-r));
	if ((r = restrict_ring(u)) < 0)
		goto fail;
	r = -pthread_create(&u->thread, NULL, uring_thread, u);
	if (r < 0)
		goto fail;
	*ret = &u->engine;
	return 0;
fail:
	uring_destroy(u);
	return r;
}

static void wake(struct uring *u)
{
	if (atomic_exchange(&u->sleeping, false))
		(void)eventfd_write(u->wake_fd, 1);
}

static void uring_submit(struct io_engine *e, struct io_req *list)
{
	struct uring *u = container_of(e, struct uring, engine);

	io_stack_push(&u->inbox, list);
	wake(u);
}

static struct io_req *uring_reap(struct io_engine *e)
{
	return io_stack_take(&container_of(e, struct uring, engine)->done);
}

static int uring_close(struct io_engine *e, unsigned timeout_ms)
{
	struct uring *u = container_of(e, struct uring, engine);
	struct pollfd pfd;

	if (!e)
		return 0;
	pfd = (struct pollfd){.fd = u->exited_fd, .events = POLLIN};
	atomic_store(&u->stop, true);
	(void)eventfd_write(u->wake_fd, 1);
	if (poll(&pfd, 1, (int)timeout_ms) != 1) {
		pthread_detach(u->thread);
		return -ETIMEDOUT;
	}
	pthread_join(u->thread, NULL);
	if (u->stuck)
		return -ETIMEDOUT;
	uring_destroy(u);
	return 0;
}

const struct io_ops io_uring_ops = {
	.name = "io_uring",
	.open = uring_open,
	.submit = uring_submit,
	.reap = uring_reap,
	.close = uring_close,
};
