/* SPDX-License-Identifier: MIT */
/*
 * A tier that misbehaves on request, around any other tier. Callers get buffers
 * of ours, never the lower tier's: what a read returns can then be spoilt without touching
 * the stored page, and what a write stores can differ from what the caller wrote. Every request has a
 * shadow request that the lower tier sees.
 *
 * Requests wait in `done` from the moment the lower tier is through with them until they are due.
 *
 * Capabilities: never mapped. Whether pages survive a restart is the lower tier's
 * affair: scan and sync pass through.
 */
#include "tiers/fault.h"
#include "tiers/tier.h"
#include "shm/util.h"

#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/queue.h>
#include <sys/timerfd.h>

#define BATCH 32u

enum shadow_state { SH_READY, SH_LOWER, SH_DONE, SH_REAPED };

struct shadow {
	TAILQ_ENTRY(shadow) all, queue;
	struct tier_io lower;  /* what the lower tier works on */
	struct tier_io *upper; /* the caller's */
	void *buf;             /* the caller's buffer, ours */
	uint64_t op;           /* number of the operation, decides its fate */
	uint64_t due;          /* ns, when SH_DONE */
	enum shadow_state state;
	bool lower_ready; /* the lower tier holds a buffer for it */
};

struct fault {
	struct tier tier, *lower;
	struct fault_inject inject;
	uint64_t ops, inflight;
	TAILQ_HEAD(, shadow) all;
	TAILQ_HEAD(, shadow) done; /* by due time: the delay is the same for all */
	uint64_t busy_ns;          /* with mib_s: until then the device has work */
	int epoll, timer, kick;    /* kick: something is due already */
};

static struct fault *fault_of(struct tier *t)
{
	return container_of(t, struct fault, tier);
}

static struct shadow *shadow_of(const struct tier_io *io)
{
	return (struct shadow *)(uintptr_t)io->priv[0];
}

static void shadow_free(struct fault *f, struct shadow *s)
{
	TAILQ_REMOVE(&f->all, s, all);
	free(s->buf);
	free(s);
}

static void release_lower(struct fault *f, struct shadow *s)
{
	if (s->lower_ready)
		f->lower->ops->release(f->lower, &s->lower);
	s->lower_ready = false;
}

/* ---- completion ------------------------------------------------------------------ */

static void complete(struct fault *f, struct shadow *s, int res)
{
	struct tier_io *io = s->upper;

	io->res = res;
	io->addr = s->lower.addr;
	if (io->op == TIER_WRITE && res < 0)
		io->addr = TIER_ADDR_NONE;
	s->due = 0;
	if (f->inject.spec.mib_s)
		s->due = f->busy_ns = MAX(f->busy_ns, now_ns()) +
				      io->bytes * UINT64_C(1000000000) / ((uint64_t)f->inject.spec.mib_s << 20);
	if (f->inject.spec.delay_us)
		s->due = MAX(s->due, now_ns()) + f->inject.spec.delay_us * UINT64_C(1000);
	s->state = SH_DONE;
	TAILQ_INSERT_TAIL(&f->done, s, queue);
}

static void lower_done(struct fault *f, struct shadow *s)
{
	int res = s->lower.res;

	if (res == 0 && s->lower.op == TIER_READ) {
		memcpy(s->buf, s->lower.buf, s->lower.bytes);
		fault_spoil_read(&f->inject, s->op, s->lower.addr, s->buf, s->lower.bytes);
	}
	release_lower(f, s);
	complete(f, s, res);
}

static void drain_lower(struct fault *f)
{
	struct tier_io *io[BATCH];
	unsigned n;

	do {
		n = f->lower->ops->reap(f->lower, io, BATCH);
		for (unsigned i = 0; i < n; i++)
			lower_done(f, io[i]->user);
	} while (n == BATCH);
}

/* Make the fd readable now, or at the time the next request is due. */
static void arm(struct fault *f)
{
	const struct shadow *s = TAILQ_FIRST(&f->done);
	struct itimerspec at = {0};

	if (s && s->due > now_ns()) {
		at.it_value.tv_sec = (time_t)(s->due / 1000000000u);
		at.it_value.tv_nsec = (long)(s->due % 1000000000u);
	} else if (s) {
		eventfd_write(f->kick, 1);
	}
	timerfd_settime(f->timer, TFD_TIMER_ABSTIME, &at, NULL); /* a new setting also clears an old expiry */
}

/* ---- operations ------------------------------------------------------------------- */

static void fault_close(struct tier *t)
{
	struct fault *f = t ? fault_of(t) : NULL;
	struct shadow *s;

	if (!f)
		return;
	/* First the lower tier: it may still be writing to requests of ours. */
	if (f->lower)
		f->lower->ops->close(f->lower);
	while ((s = TAILQ_FIRST(&f->all)))
		shadow_free(f, s);
	fault_inject_fini(&f->inject);
	close_fdp(&f->epoll);
	close_fdp(&f->timer);
	close_fdp(&f->kick);
	free(f);
}

static int watch(struct fault *f, int fd)
{
	struct epoll_event ev = {.events = EPOLLIN};

	return epoll_ctl(f->epoll, EPOLL_CTL_ADD, fd, &ev) < 0 ? -errno : 0;
}

static int open_fds(struct fault *f)
{
	int fd = f->lower->ops->event_fd(f->lower), r;

	f->epoll = epoll_create1(EPOLL_CLOEXEC);
	f->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	f->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (f->epoll < 0 || f->timer < 0 || f->kick < 0)
		return -errno;
	r = watch(f, f->timer);
	if (r == 0)
		r = watch(f, f->kick);
	if (r == 0 && fd >= 0)
		r = watch(f, fd);
	return r;
}

static int fault_open(struct tier **ret, const struct tier_cfg *cfg, char *err, size_t errsize)
{
	struct tier_cfg below = *cfg;
	struct fault_spec spec;
	struct fault *f;
	int r = fault_parse(&spec, cfg->fault, err, errsize);

	if (r < 0)
		return r;
	if (!cfg->lower_ops || cfg->lower_ops == &tier_fault_ops) {
		snprintf(err, errsize, "fault: needs one tier to wrap, and not itself");
		return -EINVAL;
	}
	below.fault = NULL;
	below.lower_ops = NULL;
	f = calloc(1, sizeof(*f));
	if (!f) {
		snprintf(err, errsize, "fault: no memory for its tables");
		return -ENOMEM;
	}
	f->tier.ops = &tier_fault_ops;
	f->inject.spec = spec;
	f->epoll = f->timer = f->kick = -1;
	TAILQ_INIT(&f->all);
	TAILQ_INIT(&f->done);
	r = cfg->lower_ops->open(&f->lower, &below, err, errsize);
	if (r < 0)
		goto fail;
	r = open_fds(f);
	if (r < 0) {
		snprintf(err, errsize, "fault: no event descriptors: %s", strerror(-r));
		goto fail;
	}
	*ret = &f->tier;
	return 0;
fail:
	fault_close(&f->tier);
	return r;
}

static int fault_scan(struct tier *t, tier_found_fn fn, void *arg)
{
	struct tier *l = fault_of(t)->lower;

	return l->ops->scan ? l->ops->scan(l, fn, arg) : 0;
}

/* What the lower tier has to know before submit may still be filled in until then. */
static void copy_request(struct shadow *s, const struct tier_io *io)
{
	s->lower.meta = io->meta;
	s->lower.seq = io->seq;
	s->lower.life = io->life;
	s->lower.owner = io->owner;
	s->lower.near = io->near;
	s->lower.room = io->room;
}

static int fault_prepare(struct tier *t, struct tier_io *io)
{
	struct fault *f = fault_of(t);
	struct shadow *s;
	int r = -ENOMEM;

	if (!io->bytes || io->bytes > TIER_MAX_PAGE)
		return -EINVAL;
	s = calloc(1, sizeof(*s));
	if (!s)
		return r;
	TAILQ_INSERT_TAIL(&f->all, s, all);
	s->upper = io;
	s->op = f->ops;
	s->lower = (struct tier_io){.op = io->op, .bytes = io->bytes, .addr = io->addr, .user = s};
	copy_request(s, io);
	if (io->op == TIER_WRITE && fault_now(&f->inject, s->op, FAULT_ENOSPC)) {
		f->ops++;
		r = -ENOSPC;
		goto fail;
	}
	if (posix_memalign(&s->buf, KVT_UNIT, ALIGN_UP((size_t)io->bytes, KVT_UNIT)))
		goto fail;
	r = f->lower->ops->prepare(f->lower, &s->lower);
	if (r < 0) {
		/* How often a caller has to retry depends on timing; the fate of its operations must not. */
		if (r != -EAGAIN)
			f->ops++;
		goto fail;
	}
	f->ops++;
	s->lower_ready = true;
	io->addr = s->lower.addr;
	io->buf = s->buf;
	io->priv[0] = (uintptr_t)s;
	return 0;
fail:
	shadow_free(f, s);
	return r;
}

/* The request that the lower tier shall see, or NULL when it never gets there. */
static struct tier_io *spoil_submit(struct fault *f, struct tier_io *io)
{
	struct shadow *s = shadow_of(io);
	enum fault_kind eio = io->op == TIER_READ ? FAULT_READ_EIO : FAULT_WRITE_EIO;

	f->inflight++;
	if (fault_now(&f->inject, s->op, eio)) {
		release_lower(f, s); /* frees a write's place as well */
		complete(f, s, -EIO);
		return NULL;
	}
	copy_request(s, io);
	if (io->op == TIER_WRITE) {
		fault_spoil_write(&f->inject, s->op, s->lower.addr, s->lower.buf, s->buf, s->lower.bytes);
		/* Here rather than at completion, whose order may differ from run to run. */
		fault_remember(&f->inject, s->lower.addr, s->buf, s->lower.bytes);
	}
	s->state = SH_LOWER;
	return &s->lower;
}

static void fault_submit(struct tier *t, struct tier_io *const *ios, unsigned n)
{
	struct fault *f = fault_of(t);
	struct tier_io *batch[BATCH];

	for (unsigned i = 0; i < n;) {
		unsigned k = 0;

		for (; i < n && k < BATCH; i++) {
			batch[k] = spoil_submit(f, ios[i]);
			k += batch[k] != NULL;
		}
		f->lower->ops->submit(f->lower, batch, k);
	}
	if (f->lower->ops->event_fd(f->lower) < 0)
		drain_lower(f);
	arm(f);
}

static unsigned fault_reap(struct tier *t, struct tier_io **ret, unsigned max)
{
	struct fault *f = fault_of(t);
	struct shadow *s;
	eventfd_t seen;
	unsigned n = 0;
	uint64_t now;

	eventfd_read(f->kick, &seen);
	drain_lower(f);
	now = now_ns();
	while (n < max && (s = TAILQ_FIRST(&f->done)) && s->due <= now) {
		TAILQ_REMOVE(&f->done, s, queue);
		s->state = SH_REAPED;
		ret[n++] = s->upper;
	}
	f->inflight -= n;
	arm(f);
	return n;
}

static void fault_release(struct tier *t, struct tier_io *io)
{
	struct fault *f = fault_of(t);
	struct shadow *s = shadow_of(io);

	if (!s)
		return;
	if (s->state == SH_READY && io->op == TIER_WRITE)
		io->addr = TIER_ADDR_NONE;
	release_lower(f, s);
	shadow_free(f, s);
	io->priv[0] = 0;
	io->buf = NULL;
}

static void fault_free(struct tier *t, tier_addr addr, uint32_t bytes)
{
	struct tier *l = fault_of(t)->lower;

	l->ops->free(l, addr, bytes);
}

static void fault_forget(struct tier *t, tier_addr addr)
{
	struct tier *l = fault_of(t)->lower;

	if (l->ops->forget)
		l->ops->forget(l, addr);
}

static bool fault_finds(struct tier *t, uint32_t bytes, const uint64_t *pos, uint32_t pos_words)
{
	struct tier *l = fault_of(t)->lower;

	return l->ops->finds && l->ops->finds(l, bytes, pos, pos_words);
}

static int fault_sync(struct tier *t)
{
	struct tier *l = fault_of(t)->lower;

	return l->ops->sync ? l->ops->sync(l) : 0;
}

static int fault_event_fd(struct tier *t)
{
	return fault_of(t)->epoll;
}

/* The lower tier's numbers, and ours: requests held back are in flight, injected errors are errors. */
static void fault_stat(struct tier *t, struct tier_stat *ret)
{
	const struct fault *f = fault_of(t);
	size_t at = 0;
	int n;

	f->lower->ops->stat(f->lower, ret);
	ret->inflight = f->inflight;
	ret->errors += f->inject.count[FAULT_READ_EIO] + f->inject.count[FAULT_WRITE_EIO];
	memset(ret->note, 0, sizeof(ret->note));
	for (enum fault_kind k = 0; k < FAULT_KINDS && at < sizeof(ret->note); k++) {
		if (!f->inject.spec.permille[k])
			continue;
		n = snprintf(ret->note + at, sizeof(ret->note) - at, "%s%s=%llu", at ? " " : "injected ",
			     fault_name(k), (unsigned long long)f->inject.count[k]);
		at += n > 0 ? (size_t)n : 0;
	}
	if (!at)
		snprintf(ret->note, sizeof(ret->note), "injects nothing");
}

static void fault_tick(struct tier *t,
		       bool (*moved)(void *arg, const struct page_meta *m, tier_addr from, tier_addr to),
		       void *arg)
{
	struct tier *l = fault_of(t)->lower;

	if (l->ops->tick)
		l->ops->tick(l, moved, arg);
}

static int fault_hold(struct tier *t, uint64_t owner, bool on)
{
	struct tier *l = fault_of(t)->lower;

	return l->ops->hold ? l->ops->hold(l, owner, on) : 0;
}

static int fault_segment(struct tier *t, uint64_t owner, uint32_t number, uint64_t *ret_bytes)
{
	struct tier *l = fault_of(t)->lower;

	return l->ops->segment ? l->ops->segment(l, owner, number, ret_bytes) : -ENOENT;
}

static void fault_owner_stat(struct tier *t, uint64_t owner, struct tier_owner *ret)
{
	struct tier *l = fault_of(t)->lower;

	memset(ret, 0, sizeof(*ret));
	if (l->ops->owner_stat)
		l->ops->owner_stat(l, owner, ret);
}

static void fault_limit(struct tier *t, uint64_t bytes)
{
	struct tier *l = fault_of(t)->lower;

	if (l->ops->limit)
		l->ops->limit(l, bytes);
}

static uint64_t fault_trim(struct tier *t, uint64_t bytes)
{
	struct tier *l = fault_of(t)->lower;

	return l->ops->trim ? l->ops->trim(l, bytes) : 0;
}

static int fault_where(struct tier *t, tier_addr addr)
{
	struct tier *l = fault_of(t)->lower;

	return l->ops->where ? l->ops->where(l, addr) : -1;
}

static void fault_shun(struct tier *t, uint32_t nodes)
{
	struct tier *l = fault_of(t)->lower;

	if (l->ops->shun)
		l->ops->shun(l, nodes);
}

const struct tier_ops tier_fault_ops = {
	.name = "fault",
	.caps = TIER_CAP_ASYNC,
	.open = fault_open,
	.close = fault_close,
	.scan = fault_scan,
	.prepare = fault_prepare,
	.submit = fault_submit,
	.reap = fault_reap,
	.release = fault_release,
	.free = fault_free,
	.forget = fault_forget,
	.finds = fault_finds,
	.sync = fault_sync,
	.event_fd = fault_event_fd,
	.stat = fault_stat,
	.tick = fault_tick,
	.hold = fault_hold,
	.segment = fault_segment,
	.owner_stat = fault_owner_stat,
	.limit = fault_limit,
	.trim = fault_trim,
	.where = fault_where,
	.shun = fault_shun,
};
