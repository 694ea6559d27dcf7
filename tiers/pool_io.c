/* SPDX-License-Identifier: MIT */
/*
 * The engine for hosts that refuse io_uring: threads that pread and pwrite. Same
 * requests, same results, same order of completion reporting; more system
 * calls and switches. One mutex guards the queue; completions go back over the same lock-free
 * stack as the ring's.
 */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>

#include "shm/trial.h"
#include "shm/util.h"
#include "tiers/nvme_io.h"

#define POOL_MAX 16u

struct pool {
	struct io_engine engine;
	struct io_cfg cfg;
	int *fd;
	pthread_t thread[POOL_MAX];
	unsigned threads;
	struct io_stack done;
	pthread_mutex_t lock; /* guards what follows */
	pthread_cond_t more, ended;
	struct io_queue queue[2]; /* writes and syncs; reads */
	unsigned turn, alive;
	bool stop;
};

static void finish(struct pool *p, struct io_req *r, int res)
{
	r->res = res;
	r->next = NULL;
	if (io_stack_push(&p->done, r))
		(void)eventfd_write(p->cfg.event_fd, 1);
}

static int transfer(struct pool *p, struct io_req *r)
{
	int fd = p->fd[r->file];

	while (r->op == IO_SYNC && fdatasync(fd) < 0)
		if (!io_again(errno, &r->tries))
			return -errno;
	while (r->done < r->len) {
		char *buf = (char *)r->buf + r->done;
		size_t len = r->len - r->done;
		off_t off = (off_t)(r->off + r->done);
		ssize_t n = r->op == IO_READ ? pread(fd, buf, len, off) : pwrite(fd, buf, len, off);

		if (n < 0 && io_again(errno, &r->tries))
			continue;
		if (n < 0)
			return -errno;
		r->done += planted("short-transfer-ok") ? (uint32_t)len : (uint32_t)n;
		if (!n || (r->done < r->len && r->done % 512))
			return -EIO;
	}
	return 0;
}

static struct io_req *next_request(struct pool *p)
{
	struct io_req *r = io_queue_pop(&p->queue[p->turn ^= 1]);

	return r ? r : io_queue_pop(&p->queue[p->turn ^ 1]);
}

static void *pool_thread(void *arg)
{
	struct pool *p = arg;

	io_thread_begin("kvtier-io");
	pthread_mutex_lock(&p->lock);
	for (;;) {
		struct io_req *r = next_request(p);
		bool stop = p->stop;

		if (!r && stop)
			break;
		if (!r) {
			pthread_cond_wait(&p->more, &p->lock);
			continue;
		}
		pthread_mutex_unlock(&p->lock);
		finish(p, r, stop ? -ECANCELED : transfer(p, r));
		pthread_mutex_lock(&p->lock);
	}
	if (!--p->alive)
		pthread_cond_signal(&p->ended);
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

static int pool_close(struct io_engine *e, unsigned timeout_ms)
{
	struct pool *p = container_of(e, struct pool, engine);
	struct timespec until;
	int r = 0;

	if (!e)
		return 0;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	pthread_mutex_lock(&p->lock);
	p->stop = true;
	pthread_cond_broadcast(&p->more);
	while (p->alive && r != ETIMEDOUT)
		r = pthread_cond_timedwait(&p->ended, &p->lock, &until);
	r = p->alive ? -ETIMEDOUT : 0;
	pthread_mutex_unlock(&p->lock);
	for (unsigned i = 0; i < p->threads; i++)
		r < 0 ? pthread_detach(p->thread[i]) : pthread_join(p->thread[i], NULL);
	if (r < 0)
		return r;
	pthread_cond_destroy(&p->more);
	pthread_cond_destroy(&p->ended);
	pthread_mutex_destroy(&p->lock);
	free(p->fd);
	free(p);
	return 0;
}

static int pool_open(struct io_engine **ret, const struct io_cfg *cfg, char *note, size_t notesize)
{
	struct pool *p = calloc(1, sizeof(*p));
	unsigned want = MIN(MAX(cfg->depth, 1u), POOL_MAX);
	pthread_condattr_t attr;
	int r = 0;

	if (!p)
		return -ENOMEM;
	p->engine.ops = &io_pool_ops;
	p->cfg = *cfg;
	p->fd = malloc(cfg->fds * sizeof(*p->fd));
	if (!p->fd) {
		free(p);
		return -ENOMEM;
	}
	memcpy(p->fd, cfg->fd, cfg->fds * sizeof(*p->fd));
	io_queue_init(&p->queue[0]);
	io_queue_init(&p->queue[1]);
	pthread_mutex_init(&p->lock, NULL);
	pthread_cond_init(&p->more, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&p->ended, &attr);
	pthread_condattr_destroy(&attr);
	pthread_mutex_lock(&p->lock);
	for (; p->threads < want && !r; p->threads += !r, p->alive += !r)
		r = pthread_create(&p->thread[p->threads], NULL, pool_thread, p);
	pthread_mutex_unlock(&p->lock);
	if (!p->threads) {
		(void)pool_close(&p->engine, 0);
		return -r;
	}
	*ret = &p->engine;
	return 0;
}

static void pool_submit(struct io_engine *e, struct io_req *list)
{
	struct pool *p = container_of(e, struct pool, engine);

	pthread_mutex_lock(&p->lock);
	for (struct io_req *next; list; list = next) {
		next = list->next;
		io_queue_add(&p->queue[list->op == IO_READ], list);
		pthread_cond_signal(&p->more);
	}
	pthread_mutex_unlock(&p->lock);
}

static struct io_req *pool_reap(struct io_engine *e)
{
	return io_stack_take(&container_of(e, struct pool, engine)->done);
}

const struct io_ops io_pool_ops = {
	.name = "threads",
	.open = pool_open,
	.submit = pool_submit,
	.reap = pool_reap,
	.close = pool_close,
};
