/* SPDX-License-Identifier: MIT */
/*
 * Which policy runs where: one initialised policy object per (model, policy),
 * and the fallback when the one asked for cannot run. Objects are shared by all
 * sequences of a model and live as long as a plan or the table needs them.
 */
#include <stdio.h>
#include <string.h>
#include "daemon/internal.h"
#include "policy/learned.h"
#include "policy/weights.h"
#include "shm/util.h"

struct weights_path { /* by hand: core_policy_load() */
	LIST_ENTRY(weights_path) link;
	char model[64], path[CONFIG_PATH];
};

static void use_free(struct policy_use *u)
{
	if (u->ops->free && u->policy)
		u->ops->free(u->policy);
	calibrate_drop(&u->own);
	seg_close(&u->scorer.seg);
	free(u);
}

static void file_for(const struct core *c, const struct model *m, char *ret, size_t size)
{
	struct weights_path *w;

	LIST_FOREACH(w, &c->weights, link)
		if (!strcmp(w->model, m->name)) {
			snprintf(ret, size, "%s", w->path);
			return;
		}
	/* A model's name comes from a client: it names a file, never a path. */
	if (strchr(m->name, '/') || m->name[0] == '.' ||
	    (size_t)snprintf(ret, size, "%s/%s.kvp", c->cfg.model_dir, m->name) >= size)
		ret[0] = 0;
}

static uint32_t elem_bytes(uint32_t dtype)
{
	return dtype == KVT_DTYPE_F32 ? 4 : dtype == KVT_DTYPE_OPAQUE ? 1 : 2;
}

/* The policy's own calibration, or a file of its own beside the weights. What is refused is said, and not used.
 */
static void find_calibration(struct core *c, struct policy_use *u)
{
	const struct model *m = u->model;
	char path[2 * CONFIG_PATH], err[400] = "";
	int r;

	u->calibration = u->ops->calibration ? u->ops->calibration(u->policy) : NULL;
	if (u->calibration || strchr(m->name, '/') || m->name[0] == '.')
		return;
	snprintf(path, sizeof(path), "%s/%s.%s.calib", c->cfg.model_dir, m->name, u->ops->name);
	r = calibrate_load(&u->own, path, m->n_layers * m->heads, err, sizeof(err));
	if (!r && (strcmp(u->own.policy, u->ops->name) || strcmp(u->own.model, m->name))) {
		snprintf(err, sizeof(err), "%.200s: of policy %s and model %s", path, u->own.policy,
			 u->own.model);
		calibrate_drop(&u->own);
		memset(&u->own, 0, sizeof(u->own));
		r = -EINVAL;
	}
	if (!r)
		u->calibration = &u->own;
	else if (r != -ENOENT)
		log_about(&c->said, 4, "calibration: refused: %s", err);
}

static int use_init(struct core *c, struct policy_use *u, const struct policy_ops *ops, char *err,
		    size_t errsize)
{
	const struct model *m = u->model;
	struct policy_cfg cfg = {
		.layers = m->n_layers,
		.heads = m->heads,
		.k_dim = m->layer[0].k_bytes / elem_bytes(m->dtype),
		.v_dim = m->layer[0].v_bytes / elem_bytes(m->dtype),
		.dtype = (enum row_dtype)m->dtype,
		.seed = c->cfg.seed,
		.model = m->name,
	};
	int r = 0;

	for (uint32_t i = 1; i < m->n_layers; i++)
		if ((ops->caps & (POLICY_NEEDS_K | POLICY_NEEDS_V)) &&
		    (m->layer[i].k_bytes != m->layer[0].k_bytes ||
		     m->layer[i].v_bytes != m->layer[0].v_bytes)) {
			snprintf(err, errsize, "layer %u: rows of %u + %u bytes differ from layer 0's", i,
				 m->layer[i].k_bytes, m->layer[i].v_bytes);
			return -EINVAL;
		}
	if ((ops->caps & POLICY_NEEDS_DIM) && m->dtype == KVT_DTYPE_OPAQUE) {
		snprintf(err, errsize, "dtype: opaque, %s reads elements", ops->name);
		return -EINVAL;
	}
	u->weights[0] = 0;
	if (ops->caps & POLICY_NEEDS_WEIGHTS) {
		file_for(c, m, u->weights, sizeof(u->weights));
		if (!u->weights[0]) {
			snprintf(err, errsize, "model \"%s\": not a file name", m->name);
			return -EINVAL;
		}
		cfg.weights = u->weights;
	}
	u->ops = ops;
	if (ops->id != POLICY_CLIENT)
		r = ops->init(&u->policy, &cfg, err, errsize);
	if (!r)
		find_calibration(c, u);
	u->coefs = !r && ops->caps & POLICY_SEPARABLE ? ops->coefs_per_row(u->policy) : 0;
	return r;
}

static const struct policy_ops *last_resort(void)
{
	return policy_by_id(POLICY_STREAMING);
}

static struct policy_use *use_new(struct core *c, struct model *m, const char *asked, bool no_scores,
				  bool no_rows)
{
	struct policy_use *u = calloc(1, sizeof(*u));
	const char *try[] = {asked, c->cfg.fallback, last_resort()->name};
	char err[400] = "";

	if (!u)
		return NULL;
	u->scorer.seg = (struct seg)SEG_INIT;
	u->model = m;
	snprintf(u->asked, sizeof(u->asked), "%s", asked);
	u->no_scores = no_scores;
	u->no_rows = no_rows;
	for (unsigned i = 0; i < ARRAY_SIZE(try); i++) {
		const struct policy_ops *ops = policy_find(try[i]);
		int r = -ENOENT;

		if (!ops)
			snprintf(err, sizeof(err), "no such policy");
		else if (ops->id == POLICY_CLIENT && no_scores)
			snprintf(err, sizeof(err), "the layouts have no score plane");
		else if (no_rows && ops->caps & (POLICY_NEEDS_K | POLICY_NEEDS_V))
			snprintf(err, sizeof(err), "rows are in GPU memory and come without its scores");
		else
			r = use_init(c, u, ops, err, sizeof(err));
		if (!r)
			break;
		if (!i)
			snprintf(u->reason, sizeof(u->reason), "%s: %s", try[i], err);
		if (i + 1 == ARRAY_SIZE(try)) {
			free(u);
			return NULL;
		}
	}
	if (u->reason[0])
		log_about(&c->said, 4, "policy: model \"%s\" runs %s: %s", m->name, u->ops->name, u->reason);
	LIST_INSERT_HEAD(&c->uses, u, link);
	return u;
}

static bool has_scores(const struct seq *s)
{
	for (uint32_t i = 0; s->layout && i < s->model->n_layers; i++)
		if (!s->layout[i].score_off)
			return false;
	return s->layout != NULL;
}

struct policy_use *policies_ref(struct policy_use *u)
{
	u->refs++;
	return u;
}

static struct policy_use *use_get(struct core *c, struct model *m, const char *asked, bool no_scores,
				  bool no_rows)
{
	struct policy_use *u;

	LIST_FOREACH(u, &c->uses, link)
		if (!u->stale && u->model == m && u->no_scores == no_scores && u->no_rows == no_rows &&
		    !strcmp(u->asked, asked))
			break;
	if (!u)
		u = use_new(c, m, asked, no_scores, no_rows);
	return u ? policies_ref(u) : NULL;
}

/* A sequence that brings a policy's scores runs that policy, unless it was asked for one that needs none. */
static bool scorer_serves(const struct seq *s)
{
	const struct policy_ops *ops = s->policy[0] ? policy_find(s->policy) : NULL;

	return s->scorer && (!ops || ops->id == POLICY_CLIENT || ops == s->scorer->ops ||
			     ops->caps & (POLICY_NEEDS_K | POLICY_NEEDS_V));
}

struct policy_use *policies_get(struct seq *s)
{
	struct core *c = s->core;

	if (scorer_serves(s))
		return policies_ref(s->scorer);
	return use_get(c, s->model, s->policy[0] ? s->policy : c->policy, !has_scores(s), seq_windowed(s));
}

struct policy_use *policies_of(struct core *c, struct model *m, const char *asked)
{
	return use_get(c, m, *asked ? asked : c->policy, false, false);
}

static void drop_unused(struct policy_use *u)
{
	if (u->refs || !u->stale)
		return;
	LIST_REMOVE(u, link);
	use_free(u);
}

void policies_put(struct core *c, struct policy_use *u)
{
	if (!u)
		return;
	u->refs--;
	drop_unused(u);
}

void policies_drop(struct core *c, const char *model)
{
	struct policy_use *u, *next;

	for (u = LIST_FIRST(&c->uses); u; u = next) {
		next = LIST_NEXT(u, link);
		if (model && strcmp(model, u->model->name))
			continue;
		u->stale = true;
		drop_unused(u);
	}
}

void policies_forget_model(struct core *c, const struct model *m)
{
	struct policy_use *u, *next;

	for (u = LIST_FIRST(&c->uses); u; u = next) {
		next = LIST_NEXT(u, link);
		if (u->model == m) {
			u->stale = true;
			drop_unused(u);
		}
	}
}

void policies_free(struct core *c)
{
	struct weights_path *w;

	policies_drop(c, NULL);
	while ((w = LIST_FIRST(&c->weights))) {
		LIST_REMOVE(w, link);
		free(w);
	}
}

int core_policy_load(struct core *c, const char *path, char *err, size_t errsize)
{
	const struct policy_cfg cfg = {.weights = path};
	struct calibration *calibration;
	struct weights_path *w, *old;
	struct weights *file;
	int r = weights_load(&file, path, err, errsize);

	if (r < 0)
		return r == -ENOMEM ? KVT_E_NOMEM : KVT_E_INVAL;
	r = weights_calibration(&calibration, file, &cfg, err, errsize);
	if (r < 0) {
		weights_free(file);
		return r == -ENOMEM ? KVT_E_NOMEM : KVT_E_INVAL;
	}
	weights_calibration_free(calibration);
	w = calloc(1, sizeof(*w));
	if (!w) {
		weights_free(file);
		snprintf(err, errsize, "out of memory");
		return KVT_E_NOMEM;
	}
	snprintf(w->path, sizeof(w->path), "%s", path);
	memcpy(w->model, file->h.name, sizeof(w->model));
	w->model[sizeof(w->model) - 1] = 0;
	weights_free(file);
	LIST_FOREACH(old, &c->weights, link)
		if (!strcmp(old->model, w->model))
			break;
	if (old) {
		LIST_REMOVE(old, link);
		free(old);
	}
	LIST_INSERT_HEAD(&c->weights, w, link);
	policies_drop(c, w->model);
	log_line(6, "policy: model \"%s\" uses %s from now on", w->model, path);
	return 0;
}

int core_policy_set(struct core *c, uint64_t handle, const char *name, char *err, size_t errsize)
{
	struct seq *s;

	if (!policy_find(name)) {
		snprintf(err, errsize, "policy: \"%s\" is not known", name);
		return KVT_E_INVAL;
	}
	if (!handle) {
		snprintf(c->policy, sizeof(c->policy), "%s", name);
		return 0;
	}
	s = handle_get(c->seqs, handle, NULL);
	if (!s) {
		snprintf(err, errsize, "sequence %016llx: gone", (unsigned long long)handle);
		return KVT_E_STALE;
	}
	snprintf(s->policy, sizeof(s->policy), "%s", name);
	return 0;
}

bool core_policy_next(struct core *c, uint32_t *cursor, struct core_policy_info *ret)
{
	const struct policy_ops *ops = policy_registry[*cursor];
	struct policy_use *u;
	uint32_t i = 0;
	struct seq *s;

	if (!ops)
		return false;
	(*cursor)++;
	*ret = (struct core_policy_info){.name = ops->name,
					 .doc = ops->doc,
					 .caps = ops->caps,
					 .is_default = !strcmp(ops->name, c->policy)};
	LIST_FOREACH(u, &c->uses, link)
		if (u->ops == ops && u->weights[0])
			snprintf(ret->weights, sizeof(ret->weights), "%s", u->weights);
	while ((s = handle_next(c->seqs, &i, NULL)))
		ret->seqs += s->ops == ops;
	return true;
}
