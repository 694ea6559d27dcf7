/* SPDX-License-Identifier: MIT */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include "daemon/workers.h"
#include "shm/trial.h"
#include "shm/util.h"

#define JOB_LEAST 4096u /* bytes: what any job costs, however little it moves */
#define URGENT_ROW 4u   /* urgent jobs one after the other while others wait: enough of them never end */

struct queue {
	struct job *head, **tail;
	uint64_t served; /* bytes */
};

struct thread {
	pthread_t id;
	struct workers *w;
	struct worker_ctx ctx;
	_Atomic uint64_t since; /* when the running job began, 0 idle */
};

/* One lock guards the queues and the done list; nobody holds it while working. */
struct workers {
	pthread_mutex_t lock;
	pthread_cond_t wake;
	struct queue *urgent, *queue; /* [tenants] */
	unsigned turn;                /* whose urgent job came last */
	unsigned row;                 /* urgent jobs since another one was taken */
	uint64_t served; /* the clock: what the queue taken from last had been served; never goes back */
	struct queue done;
	unsigned tenants, threads, started, idle;
	unsigned jobs; /* the loop's */
	bool stop;
	int fd;
	sd_event_source *source;
	struct worker_ctx inline_ctx;
	struct thread *thread;
};

void *worker_scratch(struct worker_ctx *w, size_t n)
{
	if (n > w->size) {
		size_t size = MAX(n, w->size * 2);
		void *buf = malloc(size);

		if (!buf)
			return NULL;
		free(w->buf);
		w->buf = buf;
		w->size = size;
	}
	return w->buf;
}

static void queue_put(struct queue *q, struct job *j)
{
	j->next = NULL;
	*q->tail = j;
	q->tail = &j->next;
}

static struct job *queue_get(struct queue *q)
{
	struct job *j = q->head;

	if (!j)
		return NULL;
	q->head = j->next;
	if (!q->head)
		q->tail = &q->head;
	return j;
}

static void queue_init(struct queue *q)
{
	q->head = NULL;
	q->tail = &q->head;
	q->served = 0;
}

/* Decisions by turns: else one tenant's many would be before everybody's. */
static struct job *next_urgent(struct workers *w)
{
	for (unsigned i = 1; i <= w->tenants; i++) {
		unsigned t = (w->turn + i) % w->tenants;

		if (w->urgent[t].head) {
			w->turn = t;
			return queue_get(&w->urgent[t]);
		}
	}
	return NULL;
}

/* Start-time fair queueing (Goyal, Vin, Cheng 1996): the clock is the start of the job taken last. */
static struct job *next_fair(struct workers *w)
{
	struct queue *best = NULL;

	for (unsigned t = 0; t < w->tenants; t++)
		if (w->queue[t].head && (!best || w->queue[t].served < best->served))
			best = &w->queue[t];
	if (!best)
		return NULL;
	w->served = MAX(w->served, best->served);
	best->served += MAX(best->head->bytes, JOB_LEAST);
	return queue_get(best);
}

static struct job *next_job(struct workers *w)
{
	struct job *j = w->row < URGENT_ROW ? next_urgent(w) : NULL;

	if (j) {
		w->row++;
		return j;
	}
	w->row = 0;
	j = next_fair(w);
	return j ? j : next_urgent(w);
}

/* Nobody holds the lock. done() follows on the loop. */
static void finished(struct workers *w, struct job *j, bool first)
{
	const uint64_t one = 1;
	bool wake;

	pthread_mutex_lock(&w->lock);
	wake = !w->done.head;
	if (first && !wake) {
		j->next = w->done.head;
		w->done.head = j;
	} else {
		queue_put(&w->done, j);
	}
	pthread_mutex_unlock(&w->lock);
	if (wake)
		(void)!write(w->fd, &one, sizeof(one)); /* cannot fail: the counter is far from full */
}

static void *work(void *arg)
{
	struct thread *t = arg;
	struct workers *w = t->w;

	pthread_mutex_lock(&w->lock);
	for (;;) {
		struct job *j = next_job(w);

		if (!j) {
			if (w->stop)
				break;
			w->idle++;
			pthread_cond_wait(&w->wake, &w->lock);
			w->idle--;
			continue;
		}
		pthread_mutex_unlock(&w->lock);
		atomic_store_explicit(&t->since, now_ns(), memory_order_relaxed);
		j->run(j, &t->ctx);
		atomic_store_explicit(&t->since, 0, memory_order_relaxed);
		finished(w, j, false);
		pthread_mutex_lock(&w->lock);
	}
	pthread_mutex_unlock(&w->lock);
	return NULL;
}

bool workers_step(struct workers *w, bool first)
{
	struct job *j;

	pthread_mutex_lock(&w->lock);
	j = next_job(w);
	pthread_mutex_unlock(&w->lock);
	if (!j)
		return false;
	j->run(j, &w->inline_ctx);
	finished(w, j, first);
	return true;
}

void workers_finish(struct workers *w)
{
	struct job *j;

	pthread_mutex_lock(&w->lock);
	j = w->done.head;
	queue_init(&w->done);
	pthread_mutex_unlock(&w->lock);
	while (j) {
		struct job *next = j->next;

		w->jobs--;
		j->done(j);
		j = next;
	}
}

static int on_done(sd_event_source *s, int fd, uint32_t revents, void *arg)
{
	uint64_t n;

	if (read(fd, &n, sizeof(n)) < 0 && errno != EAGAIN)
		return -errno;
	workers_finish(arg);
	return 0;
}

int workers_new(struct workers **ret, sd_event *ev, unsigned threads, unsigned tenants)
{
	struct workers *w = calloc(1, sizeof(*w));
	sigset_t all, old;
	int r = -ENOMEM;

	if (!w)
		return -ENOMEM;
	w->fd = -1;
	w->threads = threads;
	w->tenants = tenants ? tenants : 1;
	w->thread = calloc(MAX(threads, 1u), sizeof(*w->thread));
	w->queue = calloc(w->tenants, sizeof(*w->queue));
	w->urgent = calloc(w->tenants, sizeof(*w->urgent));
	queue_init(&w->done);
	pthread_mutex_init(&w->lock, NULL);
	pthread_cond_init(&w->wake, NULL);
	if (!w->thread || !w->queue || !w->urgent)
		goto fail;
	for (unsigned t = 0; t < w->tenants; t++) {
		queue_init(&w->queue[t]);
		queue_init(&w->urgent[t]);
	}
	w->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (w->fd < 0) {
		r = -errno;
		goto fail;
	}
	r = sd_event_add_io(ev, &w->source, w->fd, EPOLLIN, on_done, w);
	if (r < 0)
		goto fail;
	/* Completions before new requests: they free what the requests wait for. */
	sd_event_source_set_priority(w->source, SD_EVENT_PRIORITY_NORMAL - 1);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old); /* signals belong to the loop */
	for (; w->started < w->threads; w->started++) {
		struct thread *t = &w->thread[w->started];

		t->w = w;
		r = -pthread_create(&t->id, NULL, work, t);
		if (r < 0)
			break;
		pthread_setname_np(t->id, "kvt-worker");
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (r < 0)
		goto fail;
	*ret = w;
	return 0;
fail:
	workers_free(w);
	return r;
}

void workers_free(struct workers *w)
{
	if (!w)
		return;
	pthread_mutex_lock(&w->lock);
	w->stop = true;
	pthread_cond_broadcast(&w->wake);
	pthread_mutex_unlock(&w->lock);
	for (unsigned i = 0; i < w->started; i++) {
		pthread_join(w->thread[i].id, NULL);
		free(w->thread[i].ctx.buf);
	}
	while (w->done.head)
		workers_finish(w);
	sd_event_source_disable_unref(w->source);
	close_fdp(&w->fd);
	pthread_cond_destroy(&w->wake);
	pthread_mutex_destroy(&w->lock);
	free(w->inline_ctx.buf);
	free(w->thread);
	free(w->queue);
	free(w->urgent);
	free(w);
}

void workers_put(struct workers *w, struct job *j)
{
	struct queue *q = &(j->urgent ? w->urgent : w->queue)[j->tenant % w->tenants];
	bool wake;

	w->jobs++;
	pthread_mutex_lock(&w->lock);
	/* Back from idleness: no credit for the time away, whether or not somebody waits just now. */
	if (!q->head && !j->urgent && !planted("credit-for-absence"))
		q->served = MAX(q->served, w->served);
	queue_put(q, j);
	wake = w->idle > 0;
	pthread_mutex_unlock(&w->lock);
	if (wake)
		pthread_cond_signal(&w->wake);
}

void workers_run_inline(struct workers *w, struct job *j)
{
	j->run(j, &w->inline_ctx);
	j->done(j);
}

unsigned workers_fitting(void)
{
	cpu_set_t set;
	long n = sched_getaffinity(0, sizeof(set), &set) < 0 ? sysconf(_SC_NPROCESSORS_ONLN) : CPU_COUNT(&set);

	return n > 2 ? (unsigned)n - 1 : 1;
}

unsigned workers_busy(const struct workers *w)
{
	return w->jobs;
}

unsigned workers_count(const struct workers *w)
{
	return MAX(w->threads, 1u);
}

uint64_t workers_stuck_ns(struct workers *w)
{
	uint64_t now = now_ns(), worst = 0;

	for (unsigned i = 0; i < w->started; i++) {
		uint64_t since = atomic_load_explicit(&w->thread[i].since, memory_order_relaxed);

		if (since && now > since)
			worst = MAX(worst, now - since);
	}
	return worst;
}
