/* SPDX-License-Identifier: MIT */
/* The listening sockets: who may come in. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include "daemon/internal.h"
#include "ipc/codec.h"
#include "ipc/sock.h"
#include "shm/trial.h"
#include "shm/util.h"

#define MAX_CLIENTS 4096u

struct listener {
	LIST_ENTRY(listener) link;
	struct core *core;
	int fd, tenant;
	int spare;   /* given up to turn a connection away when no descriptor is left */
	bool paused; /* until the next tick */
	sd_event_source *io;
};

static uint32_t clients_of(const struct core *c, const struct tenant *t, uid_t uid)
{
	const struct client *cl;
	uint32_t n = 0;

	LIST_FOREACH(cl, &c->clients, link)
		n += cl->tenant == t && cl->uid == uid;
	return n;
}

/*
 * One connection too many: it gets its line as the answer to the hello that it sends, or has sent. What it
 * sent is read before the close, which would otherwise overtake the line with a reset.
 */
static void turn_away(struct log_bucket *said, int fd, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));
static void turn_away(struct log_bucket *said, int fd, const char *fmt, ...)
{
	struct wire_hdr hello = {.type = W_HELLO};
	char text[WIRE_TEXT], rest[256];
	struct wire_reply r;
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	wire_reply_init(&r, &hello, sizeof(r), KVT_E_LIMIT, "%s", text);
	(void)sock_send(fd, &r, r.hdr.len, NULL, 0);
	shutdown(fd, SHUT_RDWR);
	for (int i = 0; i < 16 && recv(fd, rest, sizeof(rest), MSG_DONTWAIT) > 0; i++)
		;
	close(fd);
	log_about(said, 4, "connection refused: %s", text);
}

/* A connection that waits and cannot be taken would wake the loop again and again. */
static void pause_listener(struct listener *l)
{
	l->paused = sd_event_source_set_enabled(l->io, SD_EVENT_OFF) >= 0;
}

void session_listen_again(struct core *c)
{
	struct listener *l;

	LIST_FOREACH(l, &c->listeners, link)
		if (l->paused)
			l->paused = sd_event_source_set_enabled(l->io, SD_EVENT_ON) < 0;
}

static void no_descriptor(struct listener *l, int lfd)
{
	int fd;

	close_fdp(&l->spare);
	l->spare = -1;
	fd = sock_accept(lfd);
	if (fd >= 0)
		turn_away(said_of(l->core, l->tenant < 0 ? NULL : &l->core->tenant[l->tenant]), fd,
			  "clients: kvtierd has no descriptor left");
	else
		pause_listener(l); /* not even that one: the whole host is out of them */
	l->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
}

static int on_accept(sd_event_source *src, int lfd, uint32_t revents, void *arg)
{
	struct listener *l = arg;
	struct core *c = l->core;
	struct tenant *t = l->tenant < 0 ? NULL : &c->tenant[l->tenant];
	struct sock_peer peer;
	int fd = sock_accept(lfd), r;
	uint32_t n;

	if (fd == -EMFILE || fd == -ENFILE) {
		no_descriptor(l, lfd);
		return 0;
	}
	if (fd == -ENOMEM || fd == -ENOBUFS)
		pause_listener(l);
	if (fd < 0)
		return 0;
	r = sock_peer(fd, &peer);
	if (r < 0) {
		close(fd);
		return 0;
	}
	n = t ? clients_of(c, t, peer.uid) : 0;
	if (c->n_clients >= MAX_CLIENTS) {
		turn_away(said_of(c, t), TAKE_FD(fd), "clients: %u, limit %u", c->n_clients, MAX_CLIENTS);
		r = -EMFILE;
	} else if (t && t->limit.max_clients_per_uid && !planted("no-accept-limit") &&
		   n >= t->limit.max_clients_per_uid) {
		turn_away(said_of(c, t), TAKE_FD(fd),
			  "clients: uid %u has %u in tenant %s, limit max_clients_per_uid %u",
			  (unsigned)peer.uid, n, t->name, t->limit.max_clients_per_uid);
		r = -EMFILE;
	} else {
		r = client_new(c, fd, t, &peer);
	}
	if (r < 0) {
		close_fdp(&peer.pidfd);
		close_fdp(&fd);
	}
	return 0;
}

int core_listen(struct core *c, int fd, int tenant)
{
	struct listener *l = calloc(1, sizeof(*l));
	int r;

	if (!l)
		return KVT_E_NOMEM;
	l->core = c;
	l->fd = fd;
	l->tenant = tenant;
	l->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
	r = sd_event_add_io(c->ev, &l->io, fd, EPOLLIN, on_accept, l);
	/* Those who are here before those who come, but for the operator. */
	if (r >= 0 && tenant >= 0)
		r = sd_event_source_set_priority(l->io, FAIR_ACCEPT);
	if (r < 0) {
		close_fdp(&l->spare);
		free(l);
		return KVT_E_INTERNAL;
	}
	LIST_INSERT_HEAD(&c->listeners, l, link);
	return 0;
}

void session_stop_listening(struct core *c)
{
	struct listener *l;

	while ((l = LIST_FIRST(&c->listeners))) {
		LIST_REMOVE(l, link);
		sd_event_source_disable_unref(l->io);
		close(l->fd);
		close_fdp(&l->spare);
		free(l);
	}
}
