/* SPDX-License-Identifier: MIT */
/*
 * plot --policy: what a policy prefers before it has seen a key or a value. Its own code scores rows of zeros,
 * by position and by distance to the end; where scores are made of what rows hold, there is nothing to draw.
 */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "daemon/ctl/plot.h"
#include "policy/learned.h"
#include "shm/util.h"

#define POINTS 256u /* of a panel at most: a network scores every one of them, in every lane */

/* The file of a policy that the daemon runs; NULL: a line is on stderr. The caller's. */
static char *weights_of(struct ctl *c, const char *name)
{
	static const char *const argv[] = {"policy", "list"};
	json_t *j = NULL;
	const json_t *o;
	char *path = NULL;
	size_t i;

	if (ctl_call(c, 2, argv, &j, NULL))
		return NULL;
	json_array_foreach(json_object_get(j, "policies"), i, o)
	{
		const char *n = json_string_value(json_object_get(o, "name")),
			   *w = json_string_value(json_object_get(o, "weights"));

		if (n && w && *w && !strcmp(n, name))
			path = strdup(w);
	}
	json_decref(j);
	if (!path)
		ctl_fail(CTL_REFUSED, "policy %s: the daemon runs it with no weight file now; name a file",
			 name);
	return path;
}

/* Which policy, and the shape that its file speaks of. */
static int choose(struct ctl *c, const char *name, const struct policy_ops **ret_ops, struct policy_cfg *cfg,
		  char **ret_path, char *model, size_t size)
{
	const struct policy_ops *ops = policy_find(name);
	struct weights *w;
	char err[300];

	*cfg = (struct policy_cfg){
		.layers = 1, .heads = 1, .k_dim = 1, .v_dim = 1, .dtype = ROW_F32, .seed = 1};
	*ret_path = NULL;
	if (ops && !(ops->caps & POLICY_NEEDS_WEIGHTS)) {
		*ret_ops = ops;
		return CTL_OK;
	}
	*ret_path = ops ? weights_of(c, name) : strdup(name);
	if (!*ret_path)
		return ops ? CTL_REFUSED : ctl_fail(CTL_USAGE, "out of memory");
	if (!ops && !strchr(name, '/') && !strchr(name, '.'))
		return ctl_fail(CTL_USAGE,
				"--policy: \"%s\", no policy has this name; a file's has a point or a slash",
				name);
	if (weights_load(&w, *ret_path, err, sizeof(err)) < 0)
		return ctl_fail(CTL_USAGE, "%s", err);
	cfg->layers = w->h.layers;
	cfg->heads = w->h.heads;
	cfg->k_dim = w->h.k_dim;
	cfg->v_dim = w->h.v_dim;
	cfg->weights = *ret_path;
	snprintf(model, size, "%.*s", (int)sizeof(w->h.name), w->h.name);
	*ret_ops = policy_for_kind(w->h.kind);
	weights_free(w);
	return *ret_ops ? CTL_OK : ctl_fail(CTL_USAGE, "%s: no policy reads this kind of file", *ret_path);
}

/* Positions that a panel's columns stand for, its ends included; by distance the first column is the end. */
static uint32_t position(const struct plot *p, const struct plot_panel *q, uint32_t col)
{
	double at = (double)col / MAX(p->cols - 1, 1u);

	if (q->log)
		return p->rows - 1 - (uint32_t)MIN(lrint(exp2(at * log2(p->rows))) - 1, (long)p->rows - 1);
	return (uint32_t)lrint(at * (p->rows - 1));
}

/* Scores of the lane at each column of the panel. */
static int score_lane(struct policy *policy, const struct plot *p, const struct plot_panel *q, uint32_t lane,
		      const void *zeros, struct map_column *col)
{
	uint32_t pos[POINTS];
	float score[POINTS];
	struct policy_batch b = {.lane = lane, .k = zeros, .v = zeros, .pos = pos, .total = p->rows};
	int r;

	for (uint32_t i = 0; i < p->cols; i++) { /* ascending, each once */
		uint32_t at = position(p, q, q->log ? p->cols - 1 - i : i);

		if (!b.n || at > pos[b.n - 1])
			pos[b.n++] = at;
	}
	r = policy->ops->score(policy, &b, score);
	for (uint32_t i = 0, k = 0; i < p->cols && r >= 0; i++) {
		uint32_t c = q->log ? p->cols - 1 - i : i, at = position(p, q, c);

		while (k + 1 < b.n && pos[k] < at)
			k++;
		col[c] = (struct map_column){1, (double)score[k], (double)score[k], (double)score[k]};
	}
	return r;
}

static int fill(struct plot *p, struct policy *policy, const struct policy_cfg *cfg)
{
	_cleanup_free_ void *zeros = calloc(MAX(cfg->k_dim, cfg->v_dim), sizeof(float));
	struct map_column col[POINTS];
	int r = zeros ? 0 : -ENOMEM;

	for (uint32_t lane = 0; lane < p->lanes && !r; lane++) {
		uint32_t band = (uint32_t)((uint64_t)lane * p->bands / p->lanes);

		if (!p->label[band][0])
			snprintf(p->label[band], PLOT_LABEL, "%u.%u", lane / cfg->heads, lane % cfg->heads);
		for (unsigned k = 0; k < ARRAY_SIZE(p->panel) && !r; k++) {
			r = score_lane(policy, p, &p->panel[k], lane, zeros, col);
			r = r < 0 ? r : plot_add_scores(p, &p->panel[k], lane, col);
		}
	}
	return r;
}

int plot_policy(struct ctl *c, const char *name, uint32_t rows, uint32_t cols, uint32_t bands, struct plot *p)
{
	const struct policy_ops *ops;
	_cleanup_free_ char *path = NULL;
	struct policy *policy = NULL;
	struct policy_cfg cfg;
	char err[300], model[80] = "";
	int r = choose(c, name, &ops, &cfg, &path, model, sizeof(model));

	if (r)
		return r;
	if (ops->id == POLICY_CLIENT || ops->caps & POLICY_CONTEXT ||
	    (ops->caps & (POLICY_NEEDS_K | POLICY_NEEDS_V) && ops->id != POLICY_KVP))
		return ctl_fail(CTL_USAGE,
				"policy %s: its scores are made of what rows hold, there is nothing to "
				"draw without a sequence",
				ops->name);
	if (ops->init(&policy, &cfg, err, sizeof(err)) < 0)
		return ctl_fail(CTL_USAGE, "%s", err);
	for (unsigned k = 0; k < ARRAY_SIZE(p->panel); k++)
		p->panel[k].scores = true;
	p->panel[1].log = true;
	p->panel[0].axis = "position in the sequence, rows";
	p->panel[1].axis = "distance to the end of the sequence, rows, logarithmic";
	snprintf(p->panel[0].title, sizeof(p->panel[0].title), "preference by position");
	snprintf(p->panel[1].title, sizeof(p->panel[1].title), "preference by distance to the end");
	r = plot_size(p, rows, MIN(cols, POINTS), cfg.layers * cfg.heads, bands);
	p->lane_axis = "L.head";
	snprintf(p->title[0], sizeof(p->title[0]), "policy %s%s%s, a sequence of %u rows", ops->name,
		 *model ? " for " : "", model, rows);
	snprintf(p->title[1], sizeof(p->title[1]), "scores of rows that say nothing: keys and values are zero");
	r = r ?: fill(p, policy, &cfg);
	ops->free(policy);
	return r < 0 ? ctl_fail(CTL_USAGE, "%s: %s", ops->name, strerror(-r)) : CTL_OK;
}
