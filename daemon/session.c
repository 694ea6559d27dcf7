/* SPDX-License-Identifier: MIT */
/*
 * Sessions: accept, limits, messages in and replies out, ring hints, and the
 * end of a client for whatever reason. A client that breaks a rule is ended
 * with one log line; nobody else notices.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include "daemon/internal.h"
#include "ipc/codec.h"
#include "ipc/sock.h"
#include "shm/trial.h"
#include "shm/util.h"

#define HINTS 256u   /* ring entries handled in one slice */
#define MESSAGES 16u /* socket messages likewise */
#define SLICE_NS UINT64_C(200000)
#define HEAVY_SLICE_NS UINT64_C(40000)

/* ---- out ------------------------------------------------------------------------- */

/*
 * Sending happens deep inside requests and plans, which go on using the client's sequences: so it never ends
 * a client itself, the loop does so next.
 */
void client_doom(struct client *cl, const char *why)
{
	if (cl->dead || cl->doomed)
		return;
	cl->doomed = true;
	cl->doom = why;
	sd_event_source_set_enabled(cl->again, SD_EVENT_ONESHOT);
}

int client_reply(struct client *cl, struct wire_reply *r, const int *fds, unsigned n)
{
	int e = cl->dead || cl->doomed ? -EPIPE : sock_send(cl->fd, r, r->hdr.len, fds, n);

	if (e == -EAGAIN && planted("client-queue-unbounded"))
		return memset(malloc(16384), 1, 16384) ? 0 : e; /* kept for ever */
	if (e < 0)
		client_doom(cl, e == -EAGAIN ? "does not read its replies" : NULL);
	return e;
}

void client_fail(struct client *cl, const struct wire_hdr *req, int status, const char *text)
{
	struct wire_reply r;

	wire_reply_init(&r, req, sizeof(r), status, "%s", text ? text : "");
	client_reply(cl, &r, NULL, 0);
}

void client_notify(struct client *cl, uint32_t type, uint64_t handle, uint64_t a, uint64_t b)
{
	struct ring_entry e = {.type = type, .handle = handle, .arg = {a, b}};
	const uint64_t one = 1;
	int r;

	if (cl->dead || cl->doomed)
		return;
	r = ring_push(&cl->cq, &e);
	if (r == -EPROTO)
		client_doom(cl, "complete ring: impossible cursor");
	else if (r == 1)
		(void)!send(cl->notify_fd, &one, sizeof(one), MSG_DONTWAIT | MSG_NOSIGNAL);
	/* Ring full: the client finds the plan by peeking. Stream full: it is readable. */
}

/* ---- in --------------------------------------------------------------------------- */

static bool handle_hint(struct client *cl, const struct ring_entry *e)
{
	struct core *c = cl->core;
	struct seq *s = handle_get(c->seqs, e->handle, cl);

	if (e->type != Q_DIRTY) {
		client_end(cl, "submit ring: entry type %u is not known", e->type);
		return false;
	}
	if (!s) {
		/* Ours to end at any time, so a stale handle is no crime; one that is someone else's is. */
		if (!e->handle || (uint32_t)e->handle >= CORE_MAX_SEQS ||
		    (handle_get(c->seqs, e->handle, NULL) &&
		     ((struct seq *)handle_get(c->seqs, e->handle, NULL))->client)) {
			client_end(cl, "submit ring: handle %016llx is not its own",
				   (unsigned long long)e->handle);
			return false;
		}
		return true;
	}
	seq_poll(s);
	return !cl->dead && !cl->doomed;
}

/* Somebody else may come while a heavy one is served. */
static uint64_t slice_of(const struct client *cl)
{
	return cl->heavy ? HEAVY_SLICE_NS : SLICE_NS;
}

/* Drain hints. Returns false when the client was ended. */
static bool drain_ring(struct client *cl)
{
	struct ring_entry e;
	uint64_t end;

	if (cl->doomed)
		client_end(cl, cl->doom ? "%s" : NULL, cl->doom);
	if (cl->dead)
		return false;
	end = now_ns() + slice_of(cl);
	ring_awake(&cl->sq);
	/* A hint may start a plan that is decided here and now: the clock counts too. */
	for (unsigned i = 0; i < HINTS && (!i || now_ns() < end); i++) {
		int r = ring_pop(&cl->sq, &e);

		if (r == -EPROTO) {
			client_end(cl, "submit ring: impossible cursor");
			return false;
		}
		if (r == 0) {
			if (ring_sleep(&cl->sq))
				return true;
			continue;
		}
		if (!handle_hint(cl, &e))
			return false;
	}
	sd_event_source_set_enabled(cl->again, SD_EVENT_ONESHOT);
	return true;
}

static int on_again(sd_event_source *src, void *arg)
{
	uint64_t t = now_ns();

	drain_ring(arg);
	fair_spent(arg, t);
	return 0;
}

static int on_wake(sd_event_source *src, int fd, uint32_t revents, void *arg)
{
	return on_again(src, arg);
}

static int on_death(sd_event_source *src, int fd, uint32_t revents, void *arg)
{
	client_end(arg, NULL);
	return 0;
}

/* Only an import brings a descriptor, and it brings one. Whatever else the message says. */
static bool fds_fit(struct client *cl, const struct wire_hdr *h, size_t len, unsigned n_fds)
{
	unsigned want = len >= sizeof(*h) ? wire_request_fds(h->type) : 0;

	if (n_fds != want)
		client_end(cl, "message: %s with descriptors: %u, must be %u",
			   len >= sizeof(*h) ? wire_type_name(h->type) : "short", n_fds, want);
	return n_fds == want;
}

/* One message is in buf; fds came with it and stay the caller's. false: stop reading. */
static bool handle_message(struct client *cl, void *buf, size_t len, const int *fds, unsigned n_fds)
{
	const struct wire_hdr *h = buf;
	char err[WIRE_TEXT] = "";
	int r;

	if (!fds_fit(cl, h, len, n_fds))
		return false;
	r = wire_check(buf, len, false, err, sizeof(err));
	if (r == KVT_E_PROTO) {
		if (len >= sizeof(*h))
			client_fail(cl, h, r, err);
		client_end(cl, "message: %s", err);
		return false;
	}
	if (r < 0) {
		client_fail(cl, h, r, err);
		return !cl->dead && !cl->doomed;
	}
	if (!cl->hello && h->type != W_HELLO && h->type != W_ADMIN) {
		client_end(cl, "message: %s before hello", wire_type_name(h->type));
		return false;
	}
	/* What the client published before this message happened before it. */
	if (cl->hello && !drain_ring(cl))
		return false;
	if (request_handle(cl, h, n_fds ? fds[0] : -1) == KVT_AGAIN) {
		cl->held = malloc(len);
		if (cl->held) {
			memcpy(cl->held, buf, len);
		} else {
			if (cl->waits)
				cl->waits->waiter = NULL;
			cl->waits = NULL;
			cl->building = NULL;
			client_fail(cl, h, KVT_E_NOMEM, "out of memory");
		}
	}
	return !cl->dead && !cl->doomed;
}

static void read_messages(struct client *cl, uint32_t revents, uint64_t end)
{
	static _Alignas(8) uint8_t buf[WIRE_MAX]; /* the loop's */

	for (unsigned i = 0; i < MESSAGES && (!i || now_ns() < end); i++) {
		int fds[WIRE_MAX_FDS];
		unsigned n_fds;
		ssize_t n;
		bool on;

		if (cl->waits || cl->building) {
			/* Level-triggered: look away until it may go on, but notice the end. */
			sd_event_source_set_io_events(cl->io, EPOLLRDHUP);
			if (revents & (EPOLLHUP | EPOLLRDHUP | EPOLLERR))
				client_end(cl, NULL);
			return;
		}
		n = sock_recv(cl->fd, buf, sizeof(buf), fds, &n_fds);
		if (n == -EAGAIN)
			return;
		if (n == 0 || n == -ECONNRESET) {
			client_end(cl, NULL);
			return;
		}
		if (n < 0) {
			client_end(cl, "message: %s",
				   n == -EPROTO ? "cut short or with descriptors that are too many"
						: strerror((int)-n));
			return;
		}
		on = handle_message(cl, buf, (size_t)n, fds, n_fds);
		for (unsigned k = 0; k < n_fds; k++)
			close(fds[k]);
		if (!on)
			return;
	}
}

static int on_message(sd_event_source *src, int fd, uint32_t revents, void *arg)
{
	uint64_t t = now_ns();

	read_messages(arg, revents, t + slice_of(arg));
	fair_spent(arg, t);
	return 0;
}

static int on_retry(sd_event_source *src, void *arg)
{
	struct client *cl = arg;
	struct wire_hdr *held = cl->held;

	if (cl->dead || cl->waits || cl->building)
		return 0;
	sd_event_source_set_io_events(cl->io, EPOLLIN);
	cl->held = NULL;
	if (held && request_handle(cl, held, -1) == KVT_AGAIN)
		cl->held = held;
	else
		free(held);
	return 0;
}

void client_retry(struct client *cl)
{
	if (!cl->dead)
		sd_event_source_set_enabled(cl->retry, SD_EVENT_ONESHOT);
}

/* ---- coming and going ----------------------------------------------------------------- */

static int on_reap_clients(sd_event_source *src, void *arg)
{
	struct core *c = arg;
	struct client *cl;

	while ((cl = LIST_FIRST(&c->ended))) {
		LIST_REMOVE(cl, link);
		client_free(cl);
	}
	return 0;
}

void client_free(struct client *cl)
{
	sd_event_source_disable_unref(cl->io);
	sd_event_source_disable_unref(cl->wake);
	sd_event_source_disable_unref(cl->death);
	sd_event_source_disable_unref(cl->again);
	sd_event_source_disable_unref(cl->retry);
	close_fdp(&cl->fd);
	close_fdp(&cl->wake_fd);
	close_fdp(&cl->notify_fd);
	if (!planted("soak-leaks-fd"))
		close_fdp(&cl->pid_fd);
	seg_close(&cl->ctl);
	plan_mem_unref(cl->plans);
	free(cl->slot_used);
	free(cl->models);
	free(cl->held);
	free(cl);
}

static void say_end(const struct client *cl, const char *fmt, va_list ap)
{
	char why[256];

	vsnprintf(why, sizeof(why), fmt, ap);
	for (char *p = why; *p; p++)
		if ((unsigned char)*p < 0x20 || *p == 0x7f)
			*p = '?';
	log_about(said_of(cl->core, cl->tenant), 4, "client %u \"%s\" pid %d uid %u ended: %s", cl->id,
		  cl->name, (int)cl->pid, (unsigned)cl->uid, why);
}

void client_end(struct client *cl, const char *fmt, ...)
{
	struct core *c = cl->core;
	struct region *g;
	struct seq *s;
	va_list ap;

	if (cl->dead)
		return;
	cl->dead = true; /* callers up the stack still hold it: freed from the loop */
	if (fmt) {
		va_start(ap, fmt);
		say_end(cl, fmt, ap);
		va_end(ap);
		c->stat.hangups_protocol++;
	}
	sd_event_source_set_enabled(cl->io, SD_EVENT_OFF);
	if (cl->wake)
		sd_event_source_set_enabled(cl->wake, SD_EVENT_OFF);
	if (cl->death)
		sd_event_source_set_enabled(cl->death, SD_EVENT_OFF);
	if (cl->waits) {
		if (cl->waits->closer == cl)
			cl->waits->closer = NULL;
		if (cl->waits->waiter == cl)
			cl->waits->waiter = NULL;
		cl->waits = NULL;
	}
	while ((s = LIST_FIRST(&cl->seqs))) {
		s->refs++;
		seq_last_words(s);
		seq_unbind(s);
		seq_leave(s, false);
		seq_unref(s);
	}
	while ((g = LIST_FIRST(&cl->regions))) {
		LIST_REMOVE(g, link);
		cl->n_regions--;
		g->client = NULL;
		handle_del(c->regions, g->handle);
		region_leave(cl, g);
	}
	cl->building = NULL;
	scorer_forget(cl);
	for (uint32_t i = 0; i < cl->n_models; i++)
		model_unref(c, cl->models[i]);
	cl->n_models = 0;
	close_fdp(&cl->fd);
	cl->fd = -1;
	c->stat.plan_bytes -= cl->plans ? cl->plans->seg.size : 0;
	c->n_clients--;
	LIST_REMOVE(cl, link);
	direct_left(cl);
	LIST_INSERT_HEAD(&c->ended, cl, link);
	core_feed(c, FEED_CLIENT, NULL, cl->id, 0, NULL);
	if (!c->freeing)
		sd_event_source_set_enabled(c->reap_clients, SD_EVENT_ONESHOT);
}

int client_new(struct core *c, int fd, struct tenant *t, const struct sock_peer *peer)
{
	struct client *cl = calloc(1, sizeof(*cl));
	int r;

	if (!cl)
		return -ENOMEM;
	cl->core = c;
	cl->fd = cl->wake_fd = cl->notify_fd = cl->pid_fd = -1;
	cl->ctl = (struct seg)SEG_INIT;
	cl->id = ++c->next_client;
	cl->tenant = t;
	cl->uid = peer->uid;
	cl->pid = peer->pid;
	LIST_INIT(&cl->seqs);
	LIST_INIT(&cl->regions);
	r = sd_event_add_io(c->ev, &cl->io, fd, EPOLLIN, on_message, cl);
	if (r >= 0)
		r = sd_event_add_defer(c->ev, &cl->again, on_again, cl);
	if (r >= 0)
		r = sd_event_source_set_enabled(cl->again, SD_EVENT_OFF);
	if (r >= 0)
		r = sd_event_add_defer(c->ev, &cl->retry, on_retry, cl);
	if (r >= 0)
		r = sd_event_source_set_enabled(cl->retry, SD_EVENT_OFF);
	if (r >= 0 && peer->pidfd >= 0 && !planted("session-ends-with-socket"))
		r = sd_event_add_io(c->ev, &cl->death, peer->pidfd, EPOLLIN, on_death, cl);
	if (r < 0) {
		client_free(cl);
		return r;
	}
	cl->fd = fd;
	cl->pid_fd = peer->pidfd;
	LIST_INSERT_HEAD(&c->clients, cl, link);
	c->n_clients++;
	return 0;
}

/* Its rings and descriptors exist now: listen to them. */
int session_attach(struct client *cl)
{
	/* By edges: the client shares the file and its flags, so a read of ours could be made to block. */
	int r = sd_event_add_io(cl->core->ev, &cl->wake, cl->wake_fd, EPOLLIN | EPOLLET, on_wake, cl);

	return r < 0 ? r : (drain_ring(cl), 0);
}

int session_init(struct core *c)
{
	int r = sd_event_add_defer(c->ev, &c->reap_clients, on_reap_clients, c);

	return r < 0 ? r : sd_event_source_set_enabled(c->reap_clients, SD_EVENT_OFF);
}

void session_fini(struct core *c)
{
	struct client *cl;

	session_stop_listening(c);
	while ((cl = LIST_FIRST(&c->clients)))
		client_end(cl, NULL);
	on_reap_clients(NULL, c);
	region_linger_end(c);
	sd_event_source_disable_unref(c->reap_clients);
	c->reap_clients = NULL;
}
