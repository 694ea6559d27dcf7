/* SPDX-License-Identifier: MIT */
/* Recording: the calls. Rows go into blocks that are mapped as they are needed and counted against the buffer.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include "ipc/client/client.h"
#include "ipc/client/trace.h"

int trace_text(char *dst, size_t size, const char *src, const char *what)
{
	if (src && strlen(src) >= size)
		return err_set(KVT_E_INVAL, "%s: %zu bytes, must be at most %zu", what, strlen(src), size - 1);
	if (src)
		strcpy(dst, src);
	return 0;
}

static int take_opts(struct kvtier_trace *t, const struct kvtier_trace_opts *o, const char *dir)
{
	struct stat st;
	int r = trace_text(t->dir, sizeof(t->dir), dir, "dir");

	if (!r)
		r = trace_text(t->source, sizeof(t->source), o->source, "source");
	if (!r)
		r = trace_text(t->domain, sizeof(t->domain), o->domain, "domain");
	if (r)
		return r;
	if (stat(dir, &st) < 0)
		return err_errno(-errno, dir);
	if (!S_ISDIR(st.st_mode))
		return err_set(KVT_E_INVAL, "dir: %s, must be a folder", dir);
	t->max_bytes = o->max_bytes ? o->max_bytes : UINT64_C(4) << 30;
	t->buffer_bytes = o->buffer_bytes ? o->buffer_bytes : UINT64_C(512) << 20;
	t->every_n = o->every_n ? o->every_n : 1;
	t->log = o->log;
	t->log_arg = o->log_arg;
	return 0;
}

/* Signals are for the runtime's threads. */
static int start_thread(struct kvtier_trace *t)
{
	sigset_t all, old;
	pthread_t thread;
	int r;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	r = pthread_create(&thread, NULL, trace_thread, t);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (r)
		return err_errno(-ENOMEM, "thread");
	pthread_detach(thread);
	return 0;
}

int kvtier_trace_open(const struct kvtier_trace_opts *opts, struct kvtier_trace **ret)
{
	struct kvtier_trace_opts o = {0};
	struct kvtier_trace *t;
	const char *dir;
	int r = 0;

	if (!ret)
		return err_set(KVT_E_INVAL, "ret: NULL, must be given");
	if (opts)
		r = OPTS_TAKE(&o, opts);
	if (r)
		return r;
	*ret = NULL;
	dir = o.dir ? o.dir : secure_getenv("KVTIER_TRACE_DIR");
	if (!dir || !*dir)
		return KVT_AGAIN;
	t = calloc(1, sizeof(*t));
	if (!t)
		return err_set(KVT_E_NOMEM, "recorder: out of memory");
	t->fork_gen = fork_generation();
	t->refs = 2;
	pthread_mutex_init(&t->lock, NULL);
	pthread_cond_init(&t->cond, NULL);
	STAILQ_INIT(&t->queue);
	if (getrandom(&t->random, sizeof(t->random), GRND_NONBLOCK) < 0)
		t->random = now_ns();
	r = take_opts(t, &o, dir);
	if (!r)
		r = start_thread(t);
	if (r) {
		t->refs = 1;
		trace_put(t);
		return r;
	}
	*ret = t;
	return 0;
}

void trace_put(struct kvtier_trace *t)
{
	bool last;

	pthread_mutex_lock(&t->lock);
	last = --t->refs == 0;
	pthread_mutex_unlock(&t->lock);
	if (!last)
		return;
	while (trace_pool_shrink(t))
		;
	pthread_cond_destroy(&t->cond);
	pthread_mutex_destroy(&t->lock);
	free(t);
}

void kvtier_trace_close(struct kvtier_trace *t)
{
	struct kvtier_trace_seq *s;

	/* In a child of fork() the thread is missing and the lock may be held: all of it is left as it is. */
	if (!t || t->fork_gen != fork_generation())
		return;
	atomic_store(&t->ended, KVT_E_STALE);
	pthread_mutex_lock(&t->lock);
	t->stop = true;
	while ((s = STAILQ_FIRST(&t->queue))) {
		STAILQ_REMOVE_HEAD(&t->queue, entry);
		pthread_mutex_unlock(&t->lock);
		trace_seq_free(s);
		pthread_mutex_lock(&t->lock);
	}
	pthread_cond_broadcast(&t->cond);
	pthread_mutex_unlock(&t->lock);
	trace_put(t);
}

int kvtier_trace_flush(struct kvtier_trace *t, uint32_t timeout_ms)
{
	struct timespec until;
	int r = 0, ended;

	if (!t)
		return 0;
	if (t->fork_gen != fork_generation())
		return err_forked();
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	until.tv_sec += timeout_ms / 1000 + until.tv_nsec / 1000000000;
	until.tv_nsec %= 1000000000;
	pthread_mutex_lock(&t->lock);
	while ((t->busy || !STAILQ_EMPTY(&t->queue)) && r == 0)
		r = pthread_cond_timedwait(&t->cond, &t->lock, &until);
	pthread_mutex_unlock(&t->lock);
	ended = atomic_load(&t->ended);
	if (ended)
		return err_set(ended, "recording: has ended");
	return r ? err_set(KVT_E_TIMEOUT, "flush: not written after %u ms", timeout_ms) : 0;
}

int kvtier_trace_stats(struct kvtier_trace *t, struct kvtier_trace_stats *ret)
{
	struct kvtier_trace_stats v = {0};

	if (!ret)
		return err_set(KVT_E_INVAL, "ret: NULL, must be given");
	if (t) {
		v.seen = atomic_load(&t->seen);
		v.picked = atomic_load(&t->picked);
		v.recorded = atomic_load(&t->recorded);
		v.dropped = atomic_load(&t->dropped);
		v.bytes = atomic_load(&t->bytes);
		v.buffered = atomic_load(&t->buffered);
		v.ended = atomic_load(&t->ended);
	}
	return opts_give(ret, &v, sizeof(v), "stats");
}
