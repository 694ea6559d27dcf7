/* SPDX-License-Identifier: MIT */
/* Recording: the thread that writes. Whatever goes wrong with the disk ends here. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <syslog.h>
#include <time.h>
#include "ipc/client/client.h"
#include "ipc/client/trace.h"

/* The first reason counts and is told; the recorder stays silent afterwards. */
static void __attribute__((format(printf, 3, 4))) end(struct kvtier_trace *t, int code, const char *fmt, ...)
{
	char why[512], line[640];
	int none = 0;
	va_list ap;

	if (!atomic_compare_exchange_strong(&t->ended, &none, code) || !t->log)
		return;
	va_start(ap, fmt);
	vsnprintf(why, sizeof(why), fmt, ap);
	va_end(ap);
	snprintf(line, sizeof(line), "recording has ended: %s", why);
	t->log(t->log_arg, LOG_WARNING, line);
}

/* Bytes of the files in dir; also those of others, and of writers that died. */
static int dir_bytes(const char *dir, uint64_t *ret)
{
	DIR *d = opendir(dir);
	struct dirent *e;

	if (!d)
		return -errno;
	*ret = 0;
	while ((e = readdir(d))) {
		struct stat st;

		if (fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(st.st_mode))
			*ret += (uint64_t)st.st_size;
	}
	closedir(d);
	return 0;
}

static uint64_t file_bytes(const struct kvtier_trace_seq *s)
{
	const struct trace_header *h = &s->h;
	uint64_t lane = TRACE_HEADER;

	for (uint32_t kind = TRACE_K; kind <= TRACE_Q; kind++)
		lane += trace_chunk_bytes(h, kind, NULL) + TRACE_ALIGN;
	return h->layers * h->heads * lane + trace_chunk_bytes(h, TRACE_TOKENS, NULL);
}

/* One plane's rows out of their blocks, in a row. */
static void gather(const struct kvtier_trace_seq *s, uint32_t layer, uint32_t kind, uint32_t head, char *to)
{
	size_t bytes = kind == TRACE_V ? s->v_bytes : s->k_bytes;

	for (uint32_t row = 0, n; row < s->h.rows; row += n) {
		n = MIN(s->block_rows, s->h.rows - row);
		memcpy(to, trace_seq_at(s, layer, kind, head, row), n * bytes);
		to += n * bytes;
	}
}

static int write_lane(const struct kvtier_trace_seq *s, struct trace_writer *w, uint32_t lane, char *buf)
{
	uint32_t layer = lane / s->h.heads, head = lane % s->h.heads;
	uint64_t plane = (uint64_t)s->h.rows * s->k_bytes;
	int r;

	gather(s, layer, TRACE_K, head, buf);
	r = trace_writer_chunk(w, TRACE_K, lane, 0, buf);
	if (r == 0 && s->v_bytes) {
		gather(s, layer, TRACE_V, head, buf);
		r = trace_writer_chunk(w, TRACE_V, lane, 0, buf);
	}
	if (r < 0)
		return r;
	for (uint32_t g = 0; g < s->h.group; g++)
		gather(s, layer, TRACE_Q, head * s->h.group + g, buf + g * plane);
	return trace_writer_chunk(w, TRACE_Q, lane, 0, buf);
}

static int write_file(const struct kvtier_trace_seq *s, const char *path, char *err, size_t errsize)
{
	_cleanup_free_ char *buf = malloc((size_t)s->h.rows * MAX(s->h.group * s->k_bytes, s->v_bytes));
	struct trace_writer *w;
	int r = buf ? trace_writer_open(&w, path, &s->h, s->cuts, err, errsize) : -ENOMEM;

	if (r < 0)
		return r;
	if (s->n_tokens >= s->h.rows)
		r = trace_writer_chunk(w, TRACE_TOKENS, 0, 0, s->mem->tokens);
	for (uint32_t lane = 0; r == 0 && lane < s->h.layers * s->h.heads; lane++)
		r = atomic_load(&s->t->ended) ? -ECANCELED : write_lane(s, w, lane, buf);
	if (r < 0)
		trace_writer_abort(w);
	else
		r = trace_writer_finish(w, 0);
	return r;
}

/* rec-TIME-PID-N: unique on this host, and in the order of recording. */
static void name_file(char name[64])
{
	static _Atomic uint32_t files; /* of all recorders of the process: names must differ within a second */
	time_t now = time(NULL);
	struct tm tm;

	gmtime_r(&now, &tm);
	snprintf(name, 64, "rec-%04d%02d%02dT%02d%02d%02d-%d-%u", tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday,
		 tm.tm_hour, tm.tm_min, tm.tm_sec, (int)getpid(), atomic_fetch_add(&files, 1));
}

static int code_of(int err)
{
	return err == -ENOSPC || err == -EDQUOT || err == -EFBIG ? KVT_E_NOSPC : KVT_E_IO;
}

/* true: the file is there. */
static bool record(struct kvtier_trace *t, struct kvtier_trace_seq *s)
{
	char name[64] = "", path[sizeof(t->dir) + 80], why[512] = "";
	uint64_t used = 0, bytes = file_bytes(s);
	struct stat st;
	int r = dir_bytes(t->dir, &used);

	if (r < 0) {
		end(t, code_of(r), "%s: %s", t->dir, strerrordesc_np(-r));
		return false;
	}
	if (used + bytes > t->max_bytes) {
		end(t, KVT_E_LIMIT, "%s: %llu bytes and %llu more, max_bytes is %llu", t->dir,
		    (unsigned long long)used, (unsigned long long)bytes, (unsigned long long)t->max_bytes);
		return false;
	}
	name_file(name);
	snprintf(path, sizeof(path), "%s/%s.kvtr", t->dir, name);
	if (!*s->h.source)
		memcpy(s->h.source, name, sizeof(name));
	r = write_file(s, path, why, sizeof(why));
	if (r < 0 && r != -ENOMEM)
		end(t, code_of(r), "%s%s%s", *why ? why : path, *why ? "" : ": ",
		    *why ? "" : strerrordesc_np(-r));
	if (r == 0 && stat(path, &st) == 0)
		atomic_fetch_add(&t->bytes, (uint64_t)st.st_size);
	return r == 0;
}

void *trace_thread(void *arg)
{
	struct kvtier_trace *t = arg;
	struct kvtier_trace_seq *s;

	setpriority(PRIO_PROCESS, (id_t)gettid(), 10); /* of this thread alone: the runtime goes first */
	pthread_mutex_lock(&t->lock);
	while (!t->stop) {
		s = STAILQ_FIRST(&t->queue);
		if (!s) {
			pthread_cond_wait(&t->cond, &t->lock);
			continue;
		}
		STAILQ_REMOVE_HEAD(&t->queue, entry);
		t->busy = true;
		pthread_mutex_unlock(&t->lock);
		atomic_fetch_add(!atomic_load(&t->ended) && record(t, s) ? &t->recorded : &t->dropped, 1);
		trace_seq_free(s);
		pthread_mutex_lock(&t->lock);
		t->busy = false;
		pthread_cond_broadcast(&t->cond);
	}
	pthread_mutex_unlock(&t->lock);
	trace_put(t);
	return NULL;
}
