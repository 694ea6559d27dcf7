/* SPDX-License-Identifier: MIT */
/* Hints in both directions and sleeping for them. */
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include "ipc/client/client.h"
#include "ipc/sock.h"

/* The daemon polls state every 100 ms when a hint was lost; so do we. */
#define SLICE_NS UINT64_C(100000000)

static void take_event(struct kvtier *c, struct link *l, const struct ring_entry *e)
{
	struct kvtier_seq *s;

	switch (e->type) {
	case Q_PLAN:
		if (e->arg[1] == PLAN_CANCELLED)
			atomic_fetch_add(&c->count.plans_cancelled, 1);
		break;
	case Q_REVOKE:
		atomic_fetch_add(&l->revokes, 1);
		break;
	case Q_GONE:
		LIST_FOREACH(s, &c->seqs, entry)
			if (s->link == l && s->handle == e->handle)
				atomic_store(&s->gone,
					     e->arg[0] && e->arg[0] < 10000 ? -(int)e->arg[0] : KVT_E_STALE);
		break;
	}
}

int events_drain(struct kvtier *c, struct link *l)
{
	struct ring_entry e;
	int n = 0, r = 0;

	if (c->again)
		conn_timer(c, 0);
	c->again = false;
	ring_awake(&l->cq);
	do {
		while (n < (int)l->entries && (r = ring_pop(&l->cq, &e)) > 0) {
			take_event(c, l, &e);
			n++;
		}
		if (r < 0)
			return r;
		/* A daemon that keeps pushing cannot keep us here: come again through the event fd. */
		if (n >= (int)l->entries) {
			c->again = true;
			conn_timer(c, 1);
			return n;
		}
	} while (!ring_sleep(&l->cq));
	return n;
}

bool events_dirty(struct kvtier_seq *s)
{
	struct ring_entry e = {.type = Q_DIRTY, .handle = s->handle};
	uint64_t one = 1;
	int r = ring_push(&s->link->sq, &e);

	if (!r)
		return false;
	if (r == 1 && write(s->link->to_daemon, &one, sizeof(one)) == sizeof(one))
		atomic_fetch_add_explicit(&s->c->count.wakeups, 1, memory_order_relaxed);
	/* Full, or asleep: a daemon that does not consume may be gone. The state word stands, the hint may be
	 * lost. */
	return true;
}

/* Eight bytes for each time that the daemon found us asleep. */
static void clear_wakeups(struct link *l)
{
	char buf[4096];

	(void)!read(l->from_daemon, buf, sizeof(buf));
}

void events_wait(struct kvtier *c, struct link *l, uint64_t deadline_ns)
{
	struct timespec ts;
	int n;

	deadline_ns = MIN(deadline_ns, now_ns() + SLICE_NS);
	ts = (struct timespec){.tv_sec = (time_t)(deadline_ns / 1000000000u),
			       .tv_nsec = (long)(deadline_ns % 1000000000u)};
	if (c->leader) {
		pthread_cond_clockwait(&c->cond, &c->lock, CLOCK_MONOTONIC, &ts);
		return;
	}
	n = events_drain(c, l);
	if (!n) {
		struct pollfd p[2] = {{.fd = l->from_daemon, .events = POLLIN}, {.fd = l->sock}};
		uint64_t now = now_ns(), left = deadline_ns > now ? deadline_ns - now : 0;
		struct timespec wait = {.tv_nsec = (long)left};

		c->leader = true;
		pthread_mutex_unlock(&c->lock);
		ppoll(p, 2, &wait, NULL);
		if (p[1].revents)
			link_down(c, l, "end of file");
		clear_wakeups(l);
		pthread_mutex_lock(&c->lock);
		c->leader = false;
		n = events_drain(c, l);
	}
	pthread_cond_broadcast(&c->cond);
	if (n < 0) {
		pthread_mutex_unlock(&c->lock);
		link_down(c, l, "impossible ring cursor");
		pthread_mutex_lock(&c->lock);
	}
}

int kvtier_event_fd(struct kvtier *c)
{
	if (!c)
		return err_set(KVT_E_INVAL, "c: NULL, must be a connection");
	return forked(c) ? err_forked() : c->epfd;
}

/* Reconnect without waiting, unless some thread's call is at it already. */
static int try_reconnect(struct kvtier *c)
{
	int r;

	if (atomic_load(&c->up) || pthread_mutex_trylock(&c->call_lock))
		return 0;
	r = link_ensure(c, 0);
	pthread_mutex_unlock(&c->call_lock);
	return !r;
}

int kvtier_process(struct kvtier *c)
{
	struct link *l;
	int n = 0, r;

	if (!c)
		return err_set(KVT_E_INVAL, "c: NULL, must be a connection");
	if (forked(c))
		return err_forked();
	n = try_reconnect(c);
	l = link_get(c);
	if (!l)
		return n;
	if (!link_lost(c, l)) {
		pthread_mutex_lock(&c->lock);
		if (!c->leader)
			clear_wakeups(l); /* else it is the sleeper's, who drains too */
		r = events_drain(c, l);
		pthread_cond_broadcast(&c->cond);
		pthread_mutex_unlock(&c->lock);
		if (r < 0)
			link_down(c, l, "impossible ring cursor");
		else
			n += r;
	} else {
		n++;
	}
	link_put(c, l);
	return n;
}
