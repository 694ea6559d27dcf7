/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The seam between the NVMe tier and whatever moves its bytes: io_uring, a
 * pool of pread/pwrite threads, or a test's fake. One owner thread calls
 * submit and reap; the engine's own threads do the rest. A request and its
 * buffer belong to the engine from submit until reap returns it.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "shm/trial.h"

enum io_op { IO_READ = 0, IO_WRITE = 1, IO_SYNC = 2 };

struct io_req {
	struct io_req *next; /* the engine's while submitted */
	void *buf;
	uint64_t off;  /* bytes in the file */
	uint32_t len;  /* bytes; IO_SYNC: 0 */
	uint32_t done; /* the engine's: bytes moved so far */
	int32_t res;   /* after reap: 0 (all bytes moved) or -errno */
	uint16_t file; /* index into io_cfg.fd */
	uint8_t op;    /* enum io_op */
	uint8_t tries; /* the engine's */
	bool fixed;    /* buf lies in the arena */
};

struct io_cfg {
	const int *fd; /* the files; stay the caller's */
	unsigned fds;
	unsigned depth; /* requests given to the kernel at once */
	void *arena;    /* staging memory that may be registered */
	size_t arena_bytes;
	int event_fd; /* written when reap has something again */
};

struct io_engine {
	const struct io_ops *ops;
};

struct io_ops {
	const char *name; /* "io_uring", "threads" */
	/* May block. A line about what had to be left out goes to note ("" when nothing). 0 or -errno. */
	int (*open)(struct io_engine **ret, const struct io_cfg *cfg, char *note, size_t notesize);
	/* Start a list of requests, in order. Owner thread; never blocks, never fails. */
	void (*submit)(struct io_engine *e, struct io_req *list);
	/* All finished requests as a list, oldest first, or NULL. Owner thread; never blocks. */
	struct io_req *(*reap)(struct io_engine *e);
	/*
	 * Stop. What the kernel has not got yet is not started any more. Waits at most
	 * timeout_ms for what it has: 0 all ended, -ETIMEDOUT something is stuck and the engine
	 * (never its threads) leaks, together with every buffer in flight. NULL is fine.
	 */
	int (*close)(struct io_engine *e, unsigned timeout_ms);
};

extern const struct io_ops io_uring_ops, io_pool_ops;

#define IO_TRIES 8 /* of what the kernel answers with EAGAIN or EINTR */

/* Is that worth another try? */
static inline bool io_again(int err, uint8_t *tries)
{
	return (err == EAGAIN || err == EINTR) && ++*tries < IO_TRIES && !planted("again-not-tried");
}

/* An engine's thread has a name, and no signals: those are the daemon's loop's. */
static inline void io_thread_begin(const char *name)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	pthread_setname_np(pthread_self(), name);
}

/*
 * A lock-free stack that many push to and one takes whole: taken and reversed it is a queue. Since
 * nodes are only ever taken all at once there is no ABA.
 */
struct io_stack {
	_Atomic(struct io_req *) top;
};

/* Push a list (linked by next, oldest first). True when the stack was empty before. */
static inline bool io_stack_push(struct io_stack *s, struct io_req *list)
{
	struct io_req *rev = NULL, *last = list, *old;

	while (list) {
		struct io_req *r = list;

		list = r->next;
		r->next = rev;
		rev = r;
	}
	old = atomic_load_explicit(&s->top, memory_order_relaxed);
	do
		last->next = old;
	while (!atomic_compare_exchange_weak(&s->top, &old, rev));
	return !old;
}

/* Everything pushed so far, oldest first. */
static inline struct io_req *io_stack_take(struct io_stack *s)
{
	struct io_req *r = atomic_exchange(&s->top, NULL), *list = NULL;

	while (r) {
		struct io_req *next = r->next;

		r->next = list;
		list = r;
		r = next;
	}
	return list;
}

/* A plain queue of requests, for one thread. */
struct io_queue {
	struct io_req *head, **tail;
};

static inline void io_queue_init(struct io_queue *q)
{
	q->head = NULL;
	q->tail = &q->head;
}
static inline void io_queue_add(struct io_queue *q, struct io_req *r)
{
	r->next = NULL;
	*q->tail = r;
	q->tail = &r->next;
}
static inline void io_queue_push_front(struct io_queue *q, struct io_req *r)
{
	r->next = q->head;
	if (!q->head)
		q->tail = &r->next;
	q->head = r;
}
static inline struct io_req *io_queue_pop(struct io_queue *q)
{
	struct io_req *r = q->head;

	if (r) {
		q->head = r->next;
		if (!q->head)
			q->tail = &q->head;
	}
	return r;
}
