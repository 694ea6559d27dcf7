/* SPDX-License-Identifier: MIT */
/*
 * Scoring for the Python side of the laboratory (scores.py, by ctypes): all lanes
 * of a sample by a policy that the daemon has, on several threads. Errors are
 * -errno with one line in err.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include "policy/learned.h"
#include "shm/util.h"

#define LAB_PUBLIC __attribute__((visibility("default")))
#define LAB_MAX_THREADS 64u

struct lab_score {
	struct policy *policy;
	uint32_t lanes, k_bytes, v_bytes; /* bytes of a row */
};

struct lab_shape {
	uint32_t layers, heads; /* KV heads per layer */
	uint32_t k_dim, v_dim;
	uint32_t dtype; /* enum row_dtype */
	uint64_t seed;
};

/* K and V of all lanes: row i of lane l at k + l * k_lane + i * (bytes of a row). */
struct lab_rows {
	uint32_t n;
	const void *k, *v;
	size_t k_lane, v_lane; /* bytes from a lane to the next */
	const uint32_t *pos;   /* ascending positions of lane l at pos + l * pos_lane; NULL: 0 ... n - 1 */
	size_t pos_lane;       /* elements; 0: the same positions in every lane */
	uint32_t total;        /* rows of the sequence so far, evicted ones included */
	uint64_t nonce;        /* for policies that resample */
	uint32_t threads;
	float *scores; /* [lanes][n] */
};

struct job {
	const struct lab_score *s;
	const struct lab_rows *rows;
	atomic_uint next; /* lane */
	atomic_int failed;
};

LAB_PUBLIC int lab_score_open(struct lab_score **ret, const char *policy, const char *weights,
			      const char *model, const struct lab_shape *shape, char *err, size_t errsize);
LAB_PUBLIC int lab_score_run(const struct lab_score *s, const struct lab_rows *rows, char *err, size_t errsize);
LAB_PUBLIC void lab_score_close(struct lab_score *s);

/* A file says which policy it is for. */
static int find_ops(const struct policy_ops **ret, const char *policy, const char *weights, char *err,
		    size_t errsize)
{
	struct weights *w;
	int r;

	if (policy && *policy) {
		*ret = policy_find(policy);
		if (*ret && (*ret)->id != POLICY_CLIENT)
			return 0;
		snprintf(err, errsize, "policy: %s, no policy of that name scores rows", policy);
		return -EINVAL;
	}
	if (!weights) {
		snprintf(err, errsize, "policy: none, must be named when there are no weights");
		return -EINVAL;
	}
	r = weights_load(&w, weights, err, errsize);
	if (r < 0)
		return r;
	*ret = policy_for_kind(w->h.kind);
	weights_free(w);
	return 0;
}

/* policy NULL: the one that the weight file is for. model NULL: any. */
int lab_score_open(struct lab_score **ret, const char *policy, const char *weights, const char *model,
		   const struct lab_shape *shape, char *err, size_t errsize)
{
	struct policy_cfg cfg = {.layers = shape->layers,
				 .heads = shape->heads,
				 .k_dim = shape->k_dim,
				 .v_dim = shape->v_dim,
				 .dtype = (enum row_dtype)shape->dtype,
				 .seed = shape->seed,
				 .weights = weights,
				 .model = model};
	_cleanup_free_ struct lab_score *s = calloc(1, sizeof(*s));
	const struct policy_ops *ops;
	int r;

	if (!s)
		return out_of_memory(err, errsize);
	r = rows_readable(&cfg, err, errsize);
	if (r < 0)
		return r;
	r = find_ops(&ops, policy, weights, err, errsize);
	if (r < 0)
		return r;
	r = ops->init(&s->policy, &cfg, err, errsize);
	if (r < 0)
		return r;
	s->lanes = shape->layers * shape->heads;
	s->k_bytes = shape->k_dim * (uint32_t)dtype_bytes(cfg.dtype);
	s->v_bytes = shape->v_dim * (uint32_t)dtype_bytes(cfg.dtype);
	*ret = TAKE_PTR(s);
	return 0;
}

static void *work(void *arg)
{
	struct job *j = arg;
	const struct lab_rows *rows = j->rows;
	unsigned lane;

	while ((lane = atomic_fetch_add(&j->next, 1)) < j->s->lanes) {
		struct policy_batch b = {.lane = lane,
					 .n = rows->n,
					 .k = (const char *)rows->k + lane * rows->k_lane,
					 .v = (const char *)rows->v + lane * rows->v_lane,
					 .k_stride = j->s->k_bytes,
					 .v_stride = j->s->v_bytes,
					 .pos = rows->pos ? rows->pos + lane * rows->pos_lane : NULL,
					 .total = rows->total,
					 .nonce = rows->nonce};
		int r = j->s->policy->ops->score(j->s->policy, &b, rows->scores + (size_t)lane * rows->n);

		if (r < 0)
			atomic_store(&j->failed, r);
	}
	return NULL;
}

/* One call at a time or several: the policy is read-only. */
int lab_score_run(const struct lab_score *s, const struct lab_rows *rows, char *err, size_t errsize)
{
	struct job j = {.s = s, .rows = rows};
	pthread_t id[LAB_MAX_THREADS];
	uint32_t started = 0;
	int r;

	if (!rows->k || !rows->v || !rows->scores) {
		snprintf(err, errsize, "rows: K, V or the place of the scores is missing");
		return -EINVAL;
	}
	if (!rows->pos && rows->total < rows->n) {
		snprintf(err, errsize, "total: %u, must be at least the %u rows given", rows->total, rows->n);
		return -EINVAL;
	}
	while (started + 1 < MIN(rows->threads, LAB_MAX_THREADS) &&
	       pthread_create(&id[started], NULL, work, &j) == 0)
		started++;
	work(&j);
	while (started)
		pthread_join(id[--started], NULL);
	r = atomic_load(&j.failed);
	if (r < 0)
		snprintf(err, errsize, "policy %s: %s", s->policy->ops->name, strerror(-r));
	return r;
}

void lab_score_close(struct lab_score *s)
{
	if (!s)
		return;
	s->policy->ops->free(s->policy);
	free(s);
}
