/* SPDX-License-Identifier: MIT */
/* One connection after another: HELLO, its segments and rings, its end, the next try. */
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <syslog.h>
#include "ipc/client/client.h"
#include "ipc/sock.h"

#define BACKOFF_MIN_MS 50u
#define BACKOFF_MAX_MS 1000u
#define RING_DEFAULT 1024u

void conn_log(struct kvtier *c, int level, const char *fmt, ...)
{
	char line[256];
	va_list ap;

	if (!c->log)
		return;
	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	c->log(c->log_arg, level, line);
}

void conn_timer(struct kvtier *c, uint64_t at_ns)
{
	struct itimerspec t = {
		.it_value = {.tv_sec = (time_t)(at_ns / 1000000000u), .tv_nsec = (long)(at_ns % 1000000000u)}};

	timerfd_settime(c->timerfd, TFD_TIMER_ABSTIME, &t, NULL);
}

struct link *link_get(struct kvtier *c)
{
	struct link *l;

	pthread_mutex_lock(&c->lock);
	l = c->link;
	if (l)
		l->refs++;
	pthread_mutex_unlock(&c->lock);
	return l;
}

void link_free(struct link *l)
{
	if (!l)
		return;
	seg_close(&l->ctl);
	seg_close(&l->plans);
	close_fdp(&l->sock);
	close_fdp(&l->to_daemon);
	close_fdp(&l->from_daemon);
	free(l);
}

void link_put_locked(struct link *l)
{
	if (l && !--l->refs)
		link_free(l);
}

void link_put(struct kvtier *c, struct link *l)
{
	pthread_mutex_lock(&c->lock);
	link_put_locked(l);
	pthread_mutex_unlock(&c->lock);
}

void link_down(struct kvtier *c, struct link *l, const char *why)
{
	pthread_mutex_lock(&c->lock);
	if (!atomic_exchange(&l->dead, true)) {
		/* The fds stay open until the last reference is gone: another thread may sleep on them. */
		epoll_ctl(c->epfd, EPOLL_CTL_DEL, l->sock, NULL);
		epoll_ctl(c->epfd, EPOLL_CTL_DEL, l->from_daemon, NULL);
		shutdown(l->sock, SHUT_RDWR);
		c->link = NULL;
		c->again = false;
		atomic_store(&c->up, false);
		c->next_try_ns = now_ns() + BACKOFF_MIN_MS * 1000000u;
		c->backoff_ms = BACKOFF_MIN_MS;
		conn_timer(c, c->next_try_ns);
		pthread_cond_broadcast(&c->cond);
		conn_log(c, LOG_WARNING, "%s: connection lost: %s", c->path, why);
		link_put_locked(l);
	}
	pthread_mutex_unlock(&c->lock);
}

bool link_lost(struct kvtier *c, struct link *l)
{
	struct pollfd p = {.fd = l->sock};

	if (poll(&p, 1, 0) <= 0)
		return false;
	link_down(c, l, "end of file");
	return true;
}

/* ---- making one ------------------------------------------------------------------- */

/* The next try is due later each time; call_lock held. */
static int give_up(struct kvtier *c, int rc)
{
	pthread_mutex_lock(&c->lock);
	if (c->greeting && c->greeting->sock >= 0) /* a child of fork() may keep the socket alive */
		epoll_ctl(c->epfd, EPOLL_CTL_DEL, c->greeting->sock, NULL);
	link_free(TAKE_PTR(c->greeting));
	c->backoff_ms = c->backoff_ms ? MIN(2 * c->backoff_ms, BACKOFF_MAX_MS) : BACKOFF_MIN_MS;
	c->next_try_ns = now_ns() + c->backoff_ms * UINT64_C(1000000);
	conn_timer(c, c->next_try_ns);
	pthread_mutex_unlock(&c->lock);
	return rc;
}

static uint32_t ring_size(uint32_t max_seqs)
{
	uint32_t n = RING_DEFAULT;

	while (n < max_seqs)
		n *= 2;
	return n;
}

static int say_hello(struct kvtier *c)
{
	struct link *l = calloc(1, sizeof(*l));
	struct wire_hello h;
	int r;

	if (!l)
		return err_set(KVT_E_NOMEM, "connection: out of memory");
	*l = (struct link){.sock = -1, .to_daemon = -1, .from_daemon = -1, .ctl = SEG_INIT, .plans = SEG_INIT};
	c->greeting = l;
	r = sock_connect(c->path);
	if (r < 0) {
		err_errno(r, c->path);
		return r == -EACCES || r == -EPERM ? KVT_E_PERM : KVT_E_DAEMON;
	}
	l->sock = r;
	wire_init(&h.hdr, W_HELLO, sizeof(h), ++c->cookie);
	h.features = WIRE_FEATURES;
	h.max_seqs = c->max_seqs;
	h.ring_entries = ring_size(c->max_seqs);
	h.pid = (uint32_t)getpid();
	h.plan_bytes = c->plan_bytes;
	wire_string(h.name, sizeof(h.name), c->name);
	r = sock_send(l->sock, &h, sizeof(h), NULL, 0);
	/* EPIPE: turned away before the hello; the daemon's line is there to be read. */
	if (r < 0 && r != -EPIPE) {
		err_errno(r, c->path);
		return KVT_E_DAEMON;
	}
	c->greeting_until_ns = now_ns() + c->timeout_ms * UINT64_C(1000000);
	pthread_mutex_lock(&c->lock);
	epoll_ctl(c->epfd, EPOLL_CTL_ADD, l->sock, &(struct epoll_event){.events = EPOLLIN});
	conn_timer(c, c->greeting_until_ns);
	pthread_mutex_unlock(&c->lock);
	return 0;
}

/* Map what the daemon sent. Takes the fds it uses out of fds[]. */
static int link_setup(struct link *l, const struct wire_hello_reply *h, int *fds)
{
	int r;

	l->features = h->features;
	l->max_seqs = h->max_seqs;
	l->entries = h->ring_entries;
	r = seg_map(&l->ctl, SEG_EXCHANGE, fds[0], h->ctl_bytes);
	if (r < 0)
		return err_errno(r, "hello reply: control segment");
	fds[0] = -1;
	r = seg_map(&l->plans, SEG_PUBLISHED, fds[1], h->plan_bytes);
	if (r < 0)
		return err_errno(r, "hello reply: plan segment");
	fds[1] = -1;
	l->to_daemon = TAKE_FD(fds[2]);
	l->from_daemon = TAKE_FD(fds[3]);
	fcntl(l->to_daemon, F_SETFL, O_RDWR | O_NONBLOCK);
	fcntl(l->from_daemon, F_SETFL, O_RDWR | O_NONBLOCK);
	r = ring_attach(&l->sq, l->ctl.addr, l->entries, true);
	if (!r)
		r = ring_attach(&l->cq, (char *)l->ctl.addr + ctl_cq_off(l->entries), l->entries, false);
	return r < 0 ? err_errno(r, "hello reply: rings") : 0;
}

static int read_hello(struct kvtier *c, struct link *l, uint64_t deadline_ns)
{
	struct wire_hello_reply *h = (void *)c->rx;
	int fds[WIRE_MAX_FDS] = {-1, -1, -1, -1}, r;
	unsigned n = 0;

	r = call_recv(c, l, deadline_ns, fds, &n);
	if (r <= 0)
		return r ? r : KVT_AGAIN;
	if (h->r.hdr.type != (W_HELLO | W_REPLY))
		r = err_set(KVT_E_PROTO, "type: %s, must be the hello reply", wire_type_name(h->r.hdr.type));
	else if (h->r.status)
		r = err_set(h->r.status, "%s", h->r.text);
	else if (n != 4)
		r = err_set(KVT_E_PROTO, "hello reply: %u fds, must be 4", n);
	else
		r = link_setup(l, h, fds);
	for (unsigned i = 0; i < n; i++)
		close_fdp(&fds[i]);
	return r;
}

static void link_up(struct kvtier *c)
{
	struct link *l = TAKE_PTR(c->greeting);

	pthread_mutex_lock(&c->lock);
	l->id = ++c->links;
	l->refs = 1;
	c->link = l;
	c->backoff_ms = 0;
	c->again = false;
	/* Of the socket only its end matters: poll reports that without being asked. */
	epoll_ctl(c->epfd, EPOLL_CTL_MOD, l->sock, &(struct epoll_event){.events = 0});
	epoll_ctl(c->epfd, EPOLL_CTL_ADD, l->from_daemon, &(struct epoll_event){.events = EPOLLIN});
	conn_timer(c, 0);
	events_drain(c, l);
	atomic_store(&c->up, true);
	atomic_fetch_add(l->id == 1 ? &c->count.connects : &c->count.reconnects, 1);
	conn_log(c, LOG_INFO, "%s: %s", c->path, l->id == 1 ? "connected" : "connected again");
	pthread_mutex_unlock(&c->lock);
}

int link_ensure(struct kvtier *c, uint64_t deadline_ns)
{
	int r;

	if (atomic_load(&c->up))
		return 0;
	if (!c->greeting) {
		if (now_ns() < c->next_try_ns)
			return err_set(KVT_E_DAEMON, "%s: daemon not reachable", c->path);
		r = say_hello(c);
		if (r)
			return give_up(c, r);
	}
	r = read_hello(c, c->greeting, MIN(deadline_ns, c->greeting_until_ns));
	if (r == KVT_AGAIN && now_ns() < c->greeting_until_ns)
		return err_set(KVT_E_DAEMON, "%s: no answer yet", c->path);
	if (r == KVT_AGAIN)
		r = err_set(KVT_E_DAEMON, "%s: no answer to hello within %u ms", c->path, c->timeout_ms);
	if (r)
		return give_up(c, r);
	link_up(c);
	return 0;
}
