/* SPDX-License-Identifier: MIT */
#pragma once
/* A daemon with a weight file whose network fits GPU kernels, and a client that asks for it. */
#include "kvp_double.h"

#include "window_fixture.h"

#include "daemon/core.h"
#include "policy/calibrate.h"
#include "policy/decide.h"
#include "policy/scorer.h"

#define DIM 64u
#define LAYERS 2u
#define HEADS 2u
#define LANES (LAYERS * HEADS)
#define KEEP 120u

static inline struct weights_header shape(uint32_t rank)
{
	struct weights_header h = shape_trained();

	h.layers = LAYERS;
	h.heads = HEADS;
	h.rank = rank;
	return h;
}

static inline void file_of(const struct fixture *f, char *ret, size_t size)
{
	snprintf(ret, size, "%s/" MODEL ".kvp", f->h.dir);
}

static inline void write_weights(const struct fixture *f, uint32_t rank, uint64_t seed)
{
	_cleanup_free_ uint8_t *image = make_image(shape(rank), 0, seed);
	char path[200];

	file_of(f, path, sizeof(path));
	assert_int_equal(weights_image_write(image, path), 0);
}

static inline int register_kvp(struct wlink *l)
{
	union {
		struct wire_model m;
		uint8_t b[1024];
	} u;

	wire_init(&u.m.hdr, W_MODEL, wire_model_len(LAYERS), 2);
	strcpy(u.m.name, MODEL);
	u.m.n_layers = LAYERS;
	u.m.world = 1;
	u.m.dtype = KVT_DTYPE_F16;
	u.m.head_dim = DIM;
	u.m.rope = KVT_ROPE_HALF;
	u.m.post_rope = 1;
	u.m.rope_theta = 100000;
	for (uint32_t i = 0; i < LAYERS; i++)
		u.m.layer[i] = (struct wire_layer){.kv_heads = HEADS, .k_bytes = DIM * 2, .v_bytes = DIM * 2};
	assert_int_equal(wl_call(l, &u.m.hdr), 0);
	l->model = ((struct wire_model_reply *)l->reply)->model;
	l->layers = LAYERS;
	l->heads = HEADS;
	l->lanes = LANES;
	l->k_bytes = l->v_bytes = DIM * 2;
	return 0;
}

static inline void begin_kvp(struct fixture *f, uint32_t rank, uint8_t *image)
{
	char path[200];

	harness_init(&f->h, true);
	snprintf(f->h.cfg.model_dir, sizeof(f->h.cfg.model_dir), "%s", f->h.dir);
	strcpy(f->h.cfg.policy, "kvp");
	file_of(f, path, sizeof(path));
	if (image)
		assert_int_equal(weights_image_write(image, path), 0);
	else
		write_weights(f, rank, 21);
	f->h.cfg.adaptive = image != NULL;
	assert_true(harness_start(&f->h));
	assert_int_equal(wl_connect(&f->l, f->h.sock[0]), 0);
	register_kvp(&f->l);
}

/* Status; the reply is in l->reply. */
static inline int ask_scorer(struct wlink *l, const char *policy, struct wire_scorer_reply *ret)
{
	struct wire_scorer m;
	int r;

	wire_init(&m.hdr, W_SCORER, sizeof(m), 12);
	m.model = l->model;
	strcpy(m.policy, policy);
	r = wl_call(l, &m.hdr);
	if (!r)
		memcpy(ret, l->reply, sizeof(*ret));
	return r;
}
