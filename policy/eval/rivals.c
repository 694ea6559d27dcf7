/* SPDX-License-Identifier: MIT */
/* The list of policies that are compared. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "policy/eval/rivals.h"
#include "policy/learned.h"
#include "shm/util.h"

#define CUR_SINKS 4u
#define CUR_WINDOW 16u

struct known {
	const char *name;
	enum rival_role role;
	enum rival_how how;
};

static const struct known known[] = {
	{"random", RIVAL_STAR, HOW_OPS},
	{"streaming", RIVAL_STAR, HOW_OPS},
	{"knorm", RIVAL_STAR, HOW_OPS},
	{"keydiff", RIVAL_STAR, HOW_OPS},
	{"lagkv", RIVAL_STAR, HOW_OPS},
	{"cur", RIVAL_STAR, HOW_OPS},
	{"cur-local", RIVAL_STAR, HOW_CUR_LOCAL},
	{"vrange", RIVAL_STAR, HOW_OPS},
	{"vnorm", RIVAL_STAR, HOW_OPS},
	{"tova", RIVAL_ATTENTION, HOW_TOVA},
	{"h2o", RIVAL_ATTENTION, HOW_H2O},
	{"snapkv", RIVAL_ATTENTION, HOW_SNAPKV},
	{"expected-attention", RIVAL_ATTENTION, HOW_EXPECTED},
	{"defensive", RIVAL_ATTENTION, HOW_DEFENSIVE},
	{"attainable-oracle", RIVAL_ORACLE, HOW_ATTAINABLE},
	{"oracle", RIVAL_ORACLE, HOW_ORACLE},
	{"best-heuristic", RIVAL_BEST, HOW_BEST},
};

const char *rival_role_name(enum rival_role role)
{
	static const char *const names[RIVAL_ROLES] = {"heuristic", "trained", "learned",
						       "attention", "oracle",  "selected"};

	return names[role];
}

bool rival_needs_q(const struct rival *r)
{
	return r->role == RIVAL_ATTENTION;
}

int rival_find(const struct rivals *r, enum rival_how how)
{
	for (uint32_t i = 0; i < r->n; i++)
		if (r->r[i].how == how)
			return (int)i;
	return -1;
}

static struct policy_cfg config(const struct trace_header *h, uint64_t seed)
{
	return (struct policy_cfg){.layers = h->layers,
				   .heads = h->heads,
				   .k_dim = h->k_dim,
				   .v_dim = h->v_dim,
				   .dtype = (enum row_dtype)h->dtype,
				   .seed = seed,
				   .model = h->model};
}

static int add(struct rivals *r, const char *name, enum rival_role role, enum rival_how how,
	       const struct policy_ops *ops, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	struct rival *new = &r->r[r->n];

	for (uint32_t i = 0; i < r->n; i++) {
		if (strcmp(r->r[i].name, name) != 0)
			continue;
		snprintf(err, errsize, "%s: two policies of that name", name);
		return -EINVAL;
	}
	if (r->n == RIVALS_MAX || strlen(name) >= RIVAL_NAME) {
		snprintf(err, errsize, "%s: at most %u policies, with names below %u characters", name,
			 RIVALS_MAX, RIVAL_NAME);
		return -EINVAL;
	}
	*new = (struct rival){.role = role, .how = how};
	snprintf(new->name, sizeof(new->name), "%s", name);
	if (ops) {
		int e = ops->init(&new->policy, cfg, err, errsize);

		if (e < 0)
			return e;
	}
	r->n++;
	return 0;
}

static int add_weights(struct rivals *r, const struct rival_weights *w, const struct trace_header *h,
		       uint64_t seed, char *err, size_t errsize)
{
	struct policy_cfg cfg = config(h, seed);
	struct weights *file;
	uint32_t kind;
	int e = weights_load(&file, w->path, err, errsize);

	if (e < 0)
		return e;
	kind = file->h.kind;
	weights_free(file);
	cfg.weights = w->path;
	return add(r, w->name, kind == WEIGHTS_KVP ? RIVAL_LEARNED : RIVAL_TRAINED, HOW_OPS,
		   policy_for_kind(kind), &cfg, err, errsize);
}

static const struct known *find_known(const char *name, size_t len)
{
	for (size_t i = 0; i < ARRAY_SIZE(known); i++)
		if (strlen(known[i].name) == len && memcmp(known[i].name, name, len) == 0)
			return &known[i];
	return NULL;
}

/* Every word of the list is a policy's name. */
static int check_list(const char *list, char *err, size_t errsize)
{
	for (const char *at = list, *end; *at; at = *end ? end + 1 : end) {
		end = strchrnul(at, ',');
		if (find_known(at, (size_t)(end - at)))
			continue;
		snprintf(err, errsize, "--policies: %.*s, no such policy", (int)(end - at), at);
		return -EINVAL;
	}
	return 0;
}

static bool wanted(const struct known *k, const char *list)
{
	size_t len = strlen(k->name);

	if (!list || strcmp(list, "all") == 0)
		return true;
	if (strcmp(list, "star") == 0)
		return k->role == RIVAL_STAR;
	for (const char *at = list; (at = strstr(at, k->name)); at += len)
		if ((at == list || at[-1] == ',') && (at[len] == ',' || !at[len]))
			return true;
	return false;
}

int rivals_open(struct rivals *ret, const char *list, const struct rival_weights *w, uint32_t n_weights,
		const struct trace_header *h, uint64_t seed, char *err, size_t errsize)
{
	struct policy_cfg cfg = config(h, seed);
	struct rivals r = {0};
	int e = 0;

	if (list && strcmp(list, "all") != 0 && strcmp(list, "star") != 0)
		e = check_list(list, err, errsize);
	for (uint32_t i = 0; e == 0 && i < n_weights; i++)
		e = add_weights(&r, &w[i], h, seed, err, errsize);
	for (size_t i = 0; e == 0 && i < ARRAY_SIZE(known); i++) {
		const struct known *k = &known[i];

		if (wanted(k, list))
			e = add(&r, k->name, k->role, k->how, k->how == HOW_OPS ? policy_find(k->name) : NULL,
				&cfg, err, errsize);
	}
	if (e == 0 && r.n == 0) {
		snprintf(err, errsize, "--policies: none left to evaluate");
		e = -EINVAL;
	}
	if (e < 0) {
		rivals_close(&r);
		return e;
	}
	*ret = r;
	return 0;
}

void rivals_close(struct rivals *r)
{
	for (uint32_t i = 0; i < r->n; i++)
		if (r->r[i].policy)
			r->r[i].policy->ops->free(r->r[i].policy);
	r->n = 0;
}

/* Squares over their sum within windows of 16 from row 0 on; the last may be short. */
void rival_cur_local(const float *knorm, const float *vnorm, uint32_t n, float *score)
{
	for (uint32_t at = 0; at < n; at += CUR_WINDOW) {
		uint32_t end = MIN(at + CUR_WINDOW, n);
		double k = 0, v = 0;

		for (uint32_t i = at; i < end; i++) {
			k += (double)knorm[i] * knorm[i];
			v += (double)vnorm[i] * vnorm[i];
		}
		for (uint32_t i = at; i < end; i++)
			score[i] = i < CUR_SINKS ? 2
				   : k > 0 && v > 0
					   ? (float)((double)knorm[i] * knorm[i] / k * vnorm[i] * vnorm[i] / v)
					   : 0;
	}
}
