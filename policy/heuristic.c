/* SPDX-License-Identifier: MIT */
/* Opening and closing an untrained policy. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "policy/heuristic.h"
#include "shm/util.h"

static int refuse_dim(char *err, size_t errsize, const struct policy_ops *ops, const char *field, uint32_t dim)
{
	snprintf(err, errsize, "%s: %u, policy %s needs 1 to %u elements", field, dim, ops->name,
		 HEURISTIC_MAX_DIM);
	return -EINVAL;
}

static int check(const struct policy_ops *ops, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	if (!(ops->caps & POLICY_NEEDS_DIM))
		return 0;
	if (cfg->dtype != ROW_F32 && cfg->dtype != ROW_F16 && cfg->dtype != ROW_BF16) {
		snprintf(err, errsize, "dtype: %u, policy %s needs f32 (1), f16 (2) or bf16 (3) rows",
			 (unsigned)cfg->dtype, ops->name);
		return -EINVAL;
	}
	if (ops->caps & POLICY_NEEDS_K && (cfg->k_dim < 1 || cfg->k_dim > HEURISTIC_MAX_DIM))
		return refuse_dim(err, errsize, ops, "k_dim", cfg->k_dim);
	if (ops->caps & POLICY_NEEDS_V && (cfg->v_dim < 1 || cfg->v_dim > HEURISTIC_MAX_DIM))
		return refuse_dim(err, errsize, ops, "v_dim", cfg->v_dim);
	return 0;
}

int heuristic_new(struct policy **ret, const struct policy_ops *ops, const struct policy_cfg *cfg, char *err,
		  size_t errsize)
{
	const struct rows_kern *kern = rows_kern(cfg->isa);
	struct heuristic *h;
	int r;

	r = check(ops, cfg, err, errsize);
	if (r < 0)
		return r;
	if (!kern) {
		snprintf(err, errsize, "isa: %s, this CPU runs ref%s", cfg->isa,
			 rows_kern("avx2") ? " and avx2" : "");
		return -ENOTSUP;
	}
	h = malloc(sizeof(*h));
	if (!h) {
		snprintf(err, errsize, "policy %s: out of memory", ops->name);
		return -ENOMEM;
	}
	*h = (struct heuristic){.base = {.ops = ops}, .cfg = *cfg, .kern = kern};
	h->cfg.weights = h->cfg.isa = h->cfg.model = NULL;
	*ret = &h->base;
	return 0;
}

void heuristic_free(struct policy *p)
{
	free(p);
}

void scores_finite(float *scores, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (!isfinite(scores[i]))
			scores[i] = SCORE_FLOOR;
}
