/* SPDX-License-Identifier: MIT */
/* One request, its reply, one deadline. */
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include "ipc/client/client.h"
#include "ipc/sock.h"
#include "shm/trial.h"

uint64_t call_deadline(const struct kvtier *c)
{
	return now_ns() + c->timeout_ms * UINT64_C(1000000);
}

/* The call lock by the deadline; 0 or an errno. */
static int lock_until(struct kvtier *c, uint64_t deadline_ns)
{
#ifdef __SANITIZE_THREAD__
	return pthread_mutex_lock(
		&c->call_lock); /* ThreadSanitizer does not know clocklock: no deadline there */
#else
	struct timespec ts = {.tv_sec = (time_t)(deadline_ns / 1000000000u),
			      .tv_nsec = (long)(deadline_ns % 1000000000u)};

	return pthread_mutex_clocklock(&c->call_lock, CLOCK_MONOTONIC, &ts);
#endif
}

static int send_request(struct kvtier *c, struct link *l, const struct call *k)
{
	const struct wire_hdr *req = k->req;
	int r;

	for (;;) {
		r = sock_send(l->sock, req, req->len, k->send_fds, k->n_send_fds);
		if (r != -EAGAIN)
			break;
		r = sock_wait(l->sock, POLLOUT, planted("send-without-deadline") ? UINT64_MAX : k->deadline_ns);
		if (!r)
			return err_set(KVT_E_TIMEOUT, "%s: the daemon does not read",
				       wire_type_name(req->type));
		if (r < 0)
			break;
	}
	if (r < 0) {
		link_down(c, l, "send failed");
		return err_set(KVT_E_DAEMON, "%s: connection lost", wire_type_name(req->type));
	}
	return 0;
}

int call_recv(struct kvtier *c, struct link *l, uint64_t deadline_ns, int *fds, unsigned *n_fds)
{
	char err[WIRE_TEXT];
	ssize_t n;
	int r;

	for (;;) {
		n = sock_recv(l->sock, c->rx, sizeof(c->rx), fds, n_fds);
		if (n != -EAGAIN)
			break;
		r = sock_wait(l->sock, POLLIN, planted("call-without-deadline") ? UINT64_MAX : deadline_ns);
		if (r <= 0)
			return r ? err_errno(r, "poll") : 0;
	}
	if (!n)
		return err_set(KVT_E_DAEMON, "%s: connection lost", c->path);
	if (n < 0)
		return err_errno((int)n, "receive");
	r = wire_check(c->rx, (size_t)n, true, err, sizeof(err));
	if (!r)
		return (int)n;
	for (unsigned i = 0; i < *n_fds; i++)
		close(fds[i]);
	*n_fds = 0;
	return err_set(r == KVT_E_VERSION ? r : KVT_E_PROTO, "%s", err);
}

/* ---- replies that come after their caller has gone ----------------------------------- */

static void note_late(struct kvtier *c, uint32_t cookie, bool drop)
{
	c->late[c->late_next++ % ARRAY_SIZE(c->late)] = (struct late){.cookie = cookie, .drop = drop};
}

/* Nobody waits for this reply: what it hands over goes back. Cookie 0: its own reply is skipped too. */
static void reply_late(struct kvtier *c, struct link *l)
{
	const struct wire_reply *r = (void *)c->rx;
	struct late *late = NULL;

	for (size_t i = 0; i < ARRAY_SIZE(c->late); i++)
		if (r->hdr.cookie && c->late[i].cookie == r->hdr.cookie)
			late = &c->late[i];
	if (!late || r->status)
		return;
	late->cookie = 0;
	if (r->hdr.type == (W_SEQ_OPEN | W_REPLY)) {
		struct wire_seq_close m;

		wire_init(&m.hdr, W_SEQ_CLOSE, sizeof(m), 0);
		m.seq = ((const struct wire_seq_open_reply *)r)->seq;
		m.drop = late->drop;
		(void)sock_send(l->sock, &m, sizeof(m), NULL, 0);
	} else if (r->hdr.type == (W_REGION | W_REPLY) || r->hdr.type == (W_REGION_IMPORT | W_REPLY)) {
		struct wire_handle m;

		wire_init(&m.hdr, W_REGION_CLOSE, sizeof(m), 0);
		m.handle = ((const struct wire_region_reply *)r)->region;
		(void)sock_send(l->sock, &m, sizeof(m), NULL, 0);
	}
}

/* ---- the call ------------------------------------------------------------------------- */

/* The reply in c->rx answers k. fds[n] came with it and are closed unless handed over. */
static int take_reply(struct call *k, const struct wire_reply *r, int *fds, unsigned n)
{
	int rc = 0;

	if (r->hdr.type != (k->req->type | W_REPLY))
		rc = err_set(KVT_E_PROTO, "type: %s, must be the reply to %s", wire_type_name(r->hdr.type),
			     wire_type_name(k->req->type));
	else if (r->status)
		rc = err_set(r->status, "%s", r->text);
	else if (n != k->n_fds || r->hdr.len > k->reply_size ||
		 r->hdr.len < (k->reply_min ? k->reply_min : k->reply_size))
		rc = err_set(KVT_E_PROTO, "%s: %u bytes and %u fds, must be %zu and %u",
			     wire_type_name(r->hdr.type), r->hdr.len, n, k->reply_size, k->n_fds);
	if (rc || !n) {
		for (unsigned i = 0; i < n; i++)
			close(fds[i]);
	} else {
		memcpy(k->fds, fds, n * sizeof(int));
	}
	if (!rc)
		memcpy(k->reply, r, r->hdr.len);
	return rc;
}

/* A reply that comes within the time of a context switch is not worth one. */
static void spin(const struct link *l, const struct call *k)
{
	uint64_t end = k->spin_ns ? MIN(now_ns() + k->spin_ns, k->deadline_ns) : 0;
	char byte;

	while (end && recv(l->sock, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN && now_ns() < end)
		;
}

static int converse(struct kvtier *c, struct link *l, struct call *k)
{
	const struct wire_reply *reply = (void *)c->rx;
	int fds[WIRE_MAX_FDS], r;
	unsigned n;

	k->req->cookie = ++c->cookie ? c->cookie : ++c->cookie;
	r = send_request(c, l, k);
	if (r)
		return r;
	spin(l, k);
	for (;;) {
		n = 0;
		r = call_recv(c, l, k->deadline_ns, fds, &n);
		if (!r) {
			note_late(c, k->req->cookie, k->drop_late);
			return err_set(KVT_E_TIMEOUT, "%s: no reply in time", wire_type_name(k->req->type));
		}
		if (r < 0) {
			link_down(c, l, kvtier_last_error());
			return r;
		}
		if (reply->hdr.cookie == k->req->cookie)
			break;
		for (unsigned i = 0; i < n; i++)
			close(fds[i]);
		reply_late(c, l);
	}
	r = take_reply(k, reply, fds, n);
	if (r == KVT_E_PROTO)
		link_down(c, l, kvtier_last_error());
	return r;
}

int call_run(struct kvtier *c, struct call *k)
{
	struct link *l;
	int r;

	if (!k->deadline_ns)
		k->deadline_ns = call_deadline(c);
	atomic_fetch_add(&c->count.calls, 1);
	if (lock_until(c, k->deadline_ns)) {
		atomic_fetch_add(&c->count.timeouts, 1);
		return err_set(KVT_E_TIMEOUT, "%s: another thread's call took the time",
			       wire_type_name(k->req->type));
	}
	r = link_ensure(c, k->deadline_ns);
	l = r ? NULL : link_get(c);
	if (!r && !l)
		r = err_set(KVT_E_DAEMON, "%s: connection lost", c->path);
	if (!r && k->link && k->link != l)
		r = err_set(KVT_E_STALE, "%s: names something of an earlier connection",
			    wire_type_name(k->req->type));
	if (!r && (k->needs & ~l->features))
		r = err_set(KVT_E_VERSION, "%s: not known to this daemon", wire_type_name(k->req->type));
	if (!r)
		r = converse(c, l, k);
	if (r == KVT_E_TIMEOUT)
		atomic_fetch_add(&c->count.timeouts, 1);
	if (!r && k->ret_link)
		*k->ret_link = l;
	else if (l)
		link_put(c, l);
	pthread_mutex_unlock(&c->call_lock);
	return r;
}
