/* SPDX-License-Identifier: MIT */
/*
 * Networks that clients run themselves: W_SCORER hands out what a policy object scores with, prepared for a GPU
 * (shm/scorer.h), as published memory. It belongs to the policy object, is made once, by the workers, lane by
 * lane, and lives as long as somebody holds the object: a sequence that scores with it, a client that
 * asked for it. So newer weights change nothing for those who have older ones.
 */
#include <stdio.h>
#include <string.h>
#include "daemon/internal.h"
#include "ipc/codec.h"
#include "policy/scorer.h"
#include "shm/util.h"

#define MAX_SCORERS 64u                  /* of one client */
#define LANE_BYTES (UINT64_C(100) << 20) /* what a lane's folding costs, in bytes that other jobs move */

/* One network being made: a job that reads the file, then one for every lane. */
struct making {
	struct core *core;
	struct policy_use *use; /* a reference, */
	struct model *model;    /* and one to its model: whoever asked may be gone */
	struct weights *weights;
	struct scorer_hdr h;
	struct seg seg;
	int error;
	uint32_t tenant;  /* of who asked first: it is that one's turn at the workers */
	uint32_t waiting; /* jobs */
	char err[WIRE_TEXT];
};

struct fold_job {
	struct job job;
	struct making *making;
	uint32_t lane;
	int error;
};

struct policy_use *scorer_find(struct client *cl, uint64_t id)
{
	for (uint32_t i = 0; i < cl->n_scorers; i++)
		if (cl->scorers[i]->scorer.id == id)
			return cl->scorers[i];
	return NULL;
}

void scorer_forget(struct client *cl)
{
	for (uint32_t i = 0; i < cl->n_scorers; i++)
		policies_put(cl->core, cl->scorers[i]);
	free(cl->scorers);
	cl->scorers = NULL;
	cl->n_scorers = 0;
}

/* ---- making ----------------------------------------------------------------------------- */

/* Made, or not: those who wait ask again. */
static void made(struct making *k)
{
	struct policy_use *u = k->use;
	struct core *c = k->core;
	struct client *cl;

	if (k->error) {
		if (!k->err[0])
			snprintf(k->err, sizeof(k->err), "%s", strerror(-k->error));
		snprintf(u->scorer.refusal, sizeof(u->scorer.refusal), "model \"%s\": %.110s", u->model->name,
			 k->err);
		log_about(&c->said, 4, "scorer: refused: %s", u->scorer.refusal);
		seg_close(&k->seg);
	} else {
		u->scorer.seg = k->seg;
		u->scorer.coefs = k->h.coefs;
		u->scorer.id = k->h.id;
	}
	u->scorer.making = false;
	LIST_FOREACH(cl, &c->clients, link)
		if (cl->building == u) {
			cl->building = NULL;
			client_retry(cl);
		}
	weights_free(k->weights);
	policies_put(c, u);
	model_unref(c, k->model);
	free(k);
}

static void fold_run(struct job *j, struct worker_ctx *w)
{
	struct fold_job *f = container_of(j, struct fold_job, job);
	struct making *k = f->making;

	f->error = scorer_fold(k->seg.addr, &k->h, k->weights, f->lane, 1);
}

static void fold_done(struct job *j)
{
	struct fold_job *f = container_of(j, struct fold_job, job);
	struct making *k = f->making;

	if (f->error)
		k->error = f->error;
	free(f);
	if (!--k->waiting)
		made(k);
}

/* The file may not be the one that the policy runs by any more. */
static int read_weights(struct making *k)
{
	const struct policy_use *u = k->use;
	int r = weights_load(&k->weights, u->weights, k->err, sizeof(k->err));

	if (!r)
		r = scorer_header(&k->h, k->weights, k->err, sizeof(k->err));
	if (!r && k->h.id != u->ops->weights_id(u->policy)) {
		snprintf(k->err, sizeof(k->err), "%.100s: replaced since it was loaded", u->weights);
		r = -ESTALE;
	}
	if (!r)
		r = seg_create(&k->seg, SEG_PUBLISHED, "kvtier-scorer", k->h.bytes, SEG_F_POPULATE);
	if (!r)
		scorer_begin(k->seg.addr, &k->h);
	return r;
}

static void read_run(struct job *j, struct worker_ctx *w)
{
	struct fold_job *f = container_of(j, struct fold_job, job);

	f->error = read_weights(f->making);
}

static void put_job(struct making *k, uint32_t lane, void (*run)(struct job *, struct worker_ctx *),
		    void (*done)(struct job *))
{
	struct fold_job *f = calloc(1, sizeof(*f));

	if (!f) {
		k->error = -ENOMEM;
		return;
	}
	*f = (struct fold_job){.making = k, .lane = lane};
	f->job.run = run;
	f->job.done = done;
	f->job.tenant = k->tenant;
	f->job.bytes = LANE_BYTES;
	k->waiting++;
	workers_put(k->core->workers, &f->job);
}

static void read_done(struct job *j)
{
	struct fold_job *f = container_of(j, struct fold_job, job);
	struct making *k = f->making;

	k->error = f->error;
	free(f);
	for (uint32_t l = 0; !k->error && l < k->h.layers * k->h.heads; l++)
		put_job(k, l, fold_run, fold_done);
	if (!--k->waiting)
		made(k);
}

static int make(struct client *cl, struct policy_use *u)
{
	struct core *c = cl->core;
	struct making *k = calloc(1, sizeof(*k));

	if (!k)
		return -ENOMEM;
	k->core = c;
	k->tenant = cl->tenant->index;
	k->use = policies_ref(u);
	k->model = model_ref(u->model);
	k->seg = (struct seg)SEG_INIT;
	u->scorer.making = true;
	put_job(k, 0, read_run, read_done);
	if (k->error) {
		u->scorer.making = false;
		policies_put(c, u);
		model_unref(c, k->model);
		free(k);
		return -ENOMEM;
	}
	return 0;
}

/* ---- the message ------------------------------------------------------------------------ */

static int keep(struct client *cl, struct policy_use *u)
{
	struct policy_use **v;

	for (uint32_t i = 0; i < cl->n_scorers; i++)
		if (cl->scorers[i] == u)
			return 0;
	if (cl->n_scorers == MAX_SCORERS)
		return -ENOSPC;
	v = reallocarray(cl->scorers, cl->n_scorers + 1, sizeof(*v));
	if (!v)
		return -ENOMEM;
	cl->scorers = v;
	v[cl->n_scorers++] = policies_ref(u);
	return 0;
}

static int give(struct client *cl, const struct wire_scorer *m, struct policy_use *u)
{
	struct wire_scorer_reply a;
	int r = keep(cl, u);

	if (r == -ENOSPC) {
		client_fail(cl, &m->hdr, KVT_E_LIMIT, "scorers: this client has 64, the limit");
		return 0;
	}
	if (r < 0) {
		client_fail(cl, &m->hdr, KVT_E_NOMEM, "daemon: out of memory");
		return 0;
	}
	wire_reply_init(&a.r, &m->hdr, sizeof(a), 0, NULL);
	a.id = u->scorer.id;
	a.bytes = u->scorer.seg.size;
	a.coefs = u->scorer.coefs;
	wire_string(a.policy, sizeof(a.policy), u->ops->name);
	client_reply(cl, &a.r, &u->scorer.seg.fd, 1);
	return 0;
}

static int answer(struct client *cl, const struct wire_scorer *m, struct policy_use *u)
{
	char line[WIRE_TEXT];

	if (u->ops->id != POLICY_KVP) {
		snprintf(line, sizeof(line), "policy: %.180s", u->reason);
		if (!u->reason[0])
			snprintf(line, sizeof(line), "policy: %s has no network", u->ops->name);
		client_fail(cl, &m->hdr, KVT_E_NOENT, line);
		return 0;
	}
	if (u->scorer.id)
		return give(cl, m, u);
	if (u->scorer.refusal[0]) {
		client_fail(cl, &m->hdr, KVT_E_NOENT, u->scorer.refusal);
		return 0;
	}
	if (!u->scorer.making && make(cl, u) < 0) {
		client_fail(cl, &m->hdr, KVT_E_NOMEM, "daemon: out of memory");
		return 0;
	}
	cl->building = u;
	return KVT_AGAIN;
}

int request_scorer(struct client *cl, const struct wire_scorer *m)
{
	struct policy_use *u;
	int r;

	if (m->model > cl->n_models) {
		client_fail(cl, &m->hdr, KVT_E_STALE, "model: not registered");
		return 0;
	}
	u = policies_of(cl->core, cl->models[m->model - 1], m->policy);
	if (!u) {
		client_fail(cl, &m->hdr, KVT_E_NOMEM, "daemon: out of memory");
		return 0;
	}
	r = answer(cl, m, u);
	policies_put(cl->core, u);
	return r;
}
