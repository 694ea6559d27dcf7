/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include "ipc/client/client.h"
#include "ipc/cuda/cuda.h"

#define SOCKET_DEFAULT "/run/kvtier/kvtierd.sock"
#define RETRY_NS 20000000u

static const char *socket_path(const struct kvtier_open_opts *o)
{
	const char *env = secure_getenv("KVTIER_SOCKET");

	if (o->socket)
		return o->socket;
	return env && *env ? env : SOCKET_DEFAULT;
}

static int take_opts(struct kvtier *c, const struct kvtier_open_opts *o)
{
	const char *path = socket_path(o);

	if (strlen(path) >= sizeof(c->path))
		return err_set(KVT_E_INVAL, "socket: %zu bytes, must be at most %zu", strlen(path),
			       sizeof(c->path) - 1);
	if (o->max_seqs > WIRE_MAX_SEQS)
		return err_set(KVT_E_INVAL, "max_seqs: %u, must be at most %u", o->max_seqs, WIRE_MAX_SEQS);
	if (o->plan_bytes > WIRE_MAX_PLAN_BYTES)
		return err_set(KVT_E_INVAL, "plan_bytes: %llu, must be at most %llu",
			       (unsigned long long)o->plan_bytes, (unsigned long long)WIRE_MAX_PLAN_BYTES);
	wire_string(c->path, sizeof(c->path), path);
	wire_string(c->name, sizeof(c->name), o->name ? o->name : program_invocation_short_name);
	c->timeout_ms = o->timeout_ms ? o->timeout_ms : 2000;
	c->max_seqs = o->max_seqs ? o->max_seqs : 64;
	c->plan_bytes = o->plan_bytes ? MAX(o->plan_bytes, KVT_UNIT) : UINT64_C(64) << 20;
	c->log = o->log;
	c->log_arg = o->log_arg;
	return 0;
}

/* Wait for a daemon that is not there yet; any other refusal is final. */
static int first_connect(struct kvtier *c)
{
	uint64_t deadline = call_deadline(c);
	int r;

	for (;;) {
		r = link_ensure(c, deadline);
		if (r != KVT_E_DAEMON || now_ns() + RETRY_NS >= deadline)
			return r;
		c->next_try_ns = 0;
		c->backoff_ms = 0;
		nanosleep(&(struct timespec){.tv_nsec = RETRY_NS}, NULL);
	}
}

int kvtier_open(const struct kvtier_open_opts *opts, struct kvtier **ret)
{
	struct kvtier_open_opts o = {0};
	struct kvtier *c;
	int r = 0;

	if (!ret)
		return err_set(KVT_E_INVAL, "ret: NULL, must be given");
	if (opts)
		r = OPTS_TAKE(&o, opts);
	if (r)
		return r;
	c = calloc(1, sizeof(*c));
	if (!c)
		return err_set(KVT_E_NOMEM, "connection: out of memory");
	c->epfd = c->timerfd = -1;
	c->fork_gen = fork_generation();
	pthread_mutex_init(&c->call_lock, NULL);
	pthread_mutex_init(&c->lock, NULL);
	pthread_cond_init(&c->cond, NULL);
	r = take_opts(c, &o);
	if (r)
		goto fail;
	c->epfd = epoll_create1(EPOLL_CLOEXEC);
	c->timerfd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (c->epfd < 0 || c->timerfd < 0 ||
	    epoll_ctl(c->epfd, EPOLL_CTL_ADD, c->timerfd, &(struct epoll_event){.events = EPOLLIN}) < 0) {
		r = err_errno(-errno, "event fd");
		goto fail;
	}
	r = first_connect(c);
	if (r)
		goto fail;
	*ret = c;
	return 0;
fail:
	kvtier_close(c);
	return r;
}

void kvtier_close(struct kvtier *c)
{
	bool child = c && forked(c);

	if (!c)
		return;
	/* In a child the parent's socket is shared: closing our copy says nothing to the daemon. */
	while (!LIST_EMPTY(&c->seqs)) {
		cuda_seq_free(LIST_FIRST(&c->seqs));
		seq_free(LIST_FIRST(&c->seqs));
	}
	while (!LIST_EMPTY(&c->regions)) {
		window_detach(LIST_FIRST(&c->regions));
		region_free(LIST_FIRST(&c->regions));
	}
	while (!LIST_EMPTY(&c->models)) {
		LIST_FIRST(&c->models)->refs = 1;
		model_put_locked(LIST_FIRST(&c->models));
	}
	if (c->link && !child)
		shutdown(c->link->sock, SHUT_RDWR);
	link_put_locked(c->link);
	link_free(c->greeting);
	close_fdp(&c->epfd);
	close_fdp(&c->timerfd);
	if (!child) {
		pthread_cond_destroy(&c->cond);
		pthread_mutex_destroy(&c->lock);
		pthread_mutex_destroy(&c->call_lock);
	}
	free(c);
}

int kvtier_stats(struct kvtier *c, struct kvtier_stats *ret)
{
	struct kvtier_stats v = {0};

	if (!c || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", c ? "ret" : "c");
	if (forked(c))
		return err_forked();
#define COPY(field) v.field = atomic_load_explicit(&c->count.field, memory_order_relaxed)
	COPY(connects);
	COPY(reconnects);
	COPY(calls);
	COPY(timeouts);
	COPY(plans_seen);
	COPY(plans_applied);
	COPY(plans_nacked);
	COPY(plans_cancelled);
	COPY(rows_appended);
	COPY(rows_promoted);
	COPY(rows_evicted);
	COPY(bytes_released);
	COPY(wakeups);
#undef COPY
	return opts_give(ret, &v, sizeof(v), "stats");
}
