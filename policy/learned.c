/* SPDX-License-Identifier: MIT */
/* What the policies with weight files have in common: finding out whether a file is for this model. */
#include "policy/learned.h"
#include "shm/util.h"

#include <stdio.h>

const struct policy_ops *policy_for_kind(uint32_t kind)
{
	switch (kind) {
	case WEIGHTS_KVP:
		return &policy_kvp_ops;
	case WEIGHTS_POSITION:
		return &policy_position_ops;
	case WEIGHTS_QFILTER:
		return &policy_qfilter_ops;
	}
	return NULL;
}

int rows_readable(const struct policy_cfg *cfg, char *err, size_t errsize)
{
	if (cfg->dtype == ROW_F32 || cfg->dtype == ROW_F16 || cfg->dtype == ROW_BF16)
		return 0;
	snprintf(err, errsize, "dtype: %d, must be f32 (1), f16 (2) or bf16 (3)", (int)cfg->dtype);
	return -EINVAL;
}

int out_of_memory(char *err, size_t errsize)
{
	snprintf(err, errsize, "memory: not enough for the policy's state");
	return -ENOMEM;
}

static int mismatch(const struct policy_cfg *cfg, const char *field, uint32_t file, uint32_t model, char *err,
		    size_t errsize)
{
	if (file == model)
		return 0;
	snprintf(err, errsize, "%s: %s: %u, must be the model's %u", cfg->weights, field, file, model);
	return -EINVAL;
}

static int check_for(const struct weights *w, const struct policy_cfg *cfg, uint32_t kind, char *err,
		     size_t errsize)
{
	int r;

	if (w->h.kind != kind) {
		snprintf(err, errsize, "%s: kind: %s, must be %s", cfg->weights, weights_kind_name(w->h.kind),
			 weights_kind_name(kind));
		return -EINVAL;
	}
	if (cfg->model && strcmp(cfg->model, w->h.name) != 0) {
		snprintf(err, errsize, "%s: name: %s, must be the model's %s", cfg->weights, w->h.name,
			 cfg->model);
		return -EINVAL;
	}
	if (kind == WEIGHTS_QFILTER && w->h.keys != WEIGHTS_KEYS_CACHED) {
		snprintf(err, errsize, "%s: keys: %u (before RoPE), must be 0: its keys are scored as cached",
			 cfg->weights, w->h.keys);
		return -EINVAL;
	}
	r = mismatch(cfg, "layers", w->h.layers, cfg->layers, err, errsize);
	if (r == 0)
		r = mismatch(cfg, "heads", w->h.heads, cfg->heads, err, errsize);
	if (r == 0 && kind != WEIGHTS_POSITION)
		r = mismatch(cfg, "k_dim", w->h.k_dim, cfg->k_dim, err, errsize);
	if (r == 0 && kind == WEIGHTS_KVP)
		r = mismatch(cfg, "v_dim", w->h.v_dim, cfg->v_dim, err, errsize);
	return r;
}

int weights_for(struct weights **ret, const struct policy_cfg *cfg, uint32_t kind, char *err, size_t errsize)
{
	struct weights *w;
	int r;

	if (!cfg->weights) {
		snprintf(err, errsize, "weights: none, policy %s needs a .kvp file", weights_kind_name(kind));
		return -EINVAL;
	}
	r = weights_load(&w, cfg->weights, err, errsize);
	if (r < 0)
		return r;
	r = check_for(w, cfg, kind, err, errsize);
	if (r < 0) {
		weights_free(w);
		return r;
	}
	*ret = w;
	return 0;
}

int weights_calibration(struct calibration **ret, const struct weights *w, const struct policy_cfg *cfg,
			char *err, size_t errsize)
{
	char why[256] = "";
	struct calibration *c;
	float *copy;
	int r;

	*ret = NULL;
	if (!w->h.calib_size)
		return 0;
	c = calloc(1, sizeof(*c));
	copy = malloc(w->h.calib_size);
	if (!c || !copy) {
		free(c);
		free(copy);
		return out_of_memory(err, errsize);
	}
	memcpy(copy, w->image + w->h.calib_off, w->h.calib_size);
	r = calibrate_parse(c, copy, w->h.calib_size, w->lanes, why, sizeof(why));
	if (r < 0) {
		snprintf(err, errsize, "%s: %s", cfg->weights, why);
		free(c);
		free(copy);
		return r;
	}
	c->owned = copy;
	*ret = c;
	return 0;
}

void weights_calibration_free(struct calibration *c)
{
	if (c)
		calibrate_drop(c);
	free(c);
}
