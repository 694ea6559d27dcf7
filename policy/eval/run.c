/* SPDX-License-Identifier: MIT */
/* The threads of an evaluation and what they report on the way. */
#include <cblas.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include "policy/eval/run.h"
#include "shm/util.h"

#define MAX_THREADS 256u
#define REPORT_NS 2000000000ull

struct shared {
	const struct eval_job *job;
	uint32_t pieces; /* documents times layers */
	atomic_uint next, done;
	atomic_int failed;
	pthread_mutex_t lock; /* over err and the clock of reports */
	uint64_t started, reported;
	char *err;
	size_t errsize;
};

int eval_load_gram(float **ret, const char *path, const struct trace_header *like, char *err, size_t errsize)
{
	size_t wide = (size_t)like->group * like->v_dim;
	uint32_t lanes = like->layers * like->heads;
	_cleanup_free_ float *gram = malloc(lanes * wide * wide * sizeof(*gram));
	struct trace *t;
	char why[256];
	int r = trace_open(&t, path, err, errsize);

	if (r < 0)
		return r;
	r = gram ? 0 : -ENOMEM;
	if (r == 0 && trace_same_shape(like, &t->h, why, sizeof(why)) < 0) {
		snprintf(err, errsize, "%s: %s", path, why);
		r = -EINVAL;
	}
	if (r == 0 && (t->h.rows != 0 || !trace_find(t, TRACE_GRAM, 0, 0))) {
		snprintf(err, errsize, "%s: GRAM: none, this is not a model's trace", path);
		r = -EINVAL;
	}
	for (uint32_t lane = 0; r == 0 && lane < lanes; lane++)
		r = trace_read(t, TRACE_GRAM, lane, 0, gram + lane * wide * wide, err, errsize);
	trace_free(t);
	if (r == 0)
		*ret = TAKE_PTR(gram);
	return r;
}

static void report(struct shared *s, bool last)
{
	uint64_t now = now_ns(), done = atomic_load(&s->done);
	double spent = (double)(now - s->started) * 1e-9;

	if (s->job->quiet)
		return;
	pthread_mutex_lock(&s->lock);
	if (last || now - s->reported > REPORT_NS) {
		s->reported = now;
		fprintf(stderr, "%s: %llu of %u layers of documents, %.0f s, %.0f s left\n", s->job->what,
			(unsigned long long)done, s->pieces, spent,
			done ? spent / (double)done * (double)(s->pieces - done) : 0);
	}
	pthread_mutex_unlock(&s->lock);
}

static void fail(struct shared *s, int r, const char *err)
{
	pthread_mutex_lock(&s->lock);
	if (!atomic_load(&s->failed)) {
		snprintf(s->err, s->errsize, "%s", err);
		atomic_store(&s->failed, r);
	}
	pthread_mutex_unlock(&s->lock);
}

static void *work(void *arg)
{
	struct shared *s = arg;
	uint32_t layers = s->job->set->shape.layers, piece;
	char err[512] = "out of memory";
	struct eval_worker w;
	int r = eval_worker_init(&w, s->job, err, sizeof(err));

	if (r < 0) {
		fail(s, r, err);
		return NULL;
	}
	while (!atomic_load(&s->failed) && (piece = atomic_fetch_add(&s->next, 1)) < s->pieces) {
		r = eval_layer(&w, piece / layers, piece % layers);
		if (r < 0)
			fail(s, r, err);
		atomic_fetch_add(&s->done, 1);
		report(s, false);
	}
	eval_worker_done(&w);
	return NULL;
}

int eval_run(const struct eval_job *j, char *err, size_t errsize)
{
	struct shared s = {
		.job = j, .pieces = j->set->docs * j->set->shape.layers, .err = err, .errsize = errsize};
	pthread_t id[MAX_THREADS];
	uint32_t started = 0;

	openblas_set_num_threads(1); /* the threads are ours: one product each */
	pthread_mutex_init(&s.lock, NULL);
	s.started = s.reported = now_ns();
	while (started + 1 < MIN(j->threads, MAX_THREADS) && pthread_create(&id[started], NULL, work, &s) == 0)
		started++;
	work(&s);
	while (started)
		pthread_join(id[--started], NULL);
	pthread_mutex_destroy(&s.lock);
	if (!atomic_load(&s.failed))
		report(&s, true);
	return atomic_load(&s.failed);
}
