/* SPDX-License-Identifier: MIT */
#pragma once
/* A daemon with a weight file, and a runtime whose rows a test can score for itself. */
#include "kvp_double.h"

#include "core_harness.h"
#include "policy/decide.h"

#define LAYERS 2u
#define HEADS 2u
#define LANES (LAYERS * HEADS)
#define DIM 16u
#define BUDGET 120u
#define FIRST 4u
#define LAST 16u
#define MOST 2000u

struct fixture {
	struct harness h;
	struct runtime rt;
	struct policy *p; /* the daemon's, on the same file */
	char file[sizeof(((struct config *)0)->model_dir) + 64];
};

static inline struct weights_header shape(uint32_t kind, uint32_t rank)
{
	struct weights_header h = kind == WEIGHTS_KVP ? shape_narrow_trained() : shape_position();

	memset(h.name, 0, sizeof(h.name));
	strcpy(h.name, "growing");
	h.layers = LAYERS;
	h.heads = HEADS;
	h.k_dim = h.v_dim = DIM;
	if (kind == WEIGHTS_KVP) {
		h.rank = rank;
		h.rope_type = WEIGHTS_ROPE_HALF;
	}
	return h;
}

static inline void write_file(const char *path, struct weights_header h, uint64_t seed)
{
	_cleanup_free_ uint8_t *image = make_image(h, 0, seed);

	assert_int_equal(weights_image_write(image, path), 0);
}

static inline void load_policy(struct fixture *f, struct weights_header h)
{
	struct policy_cfg cfg = {.layers = LAYERS,
				 .heads = HEADS,
				 .k_dim = DIM,
				 .v_dim = DIM,
				 .dtype = ROW_F32,
				 .weights = f->file,
				 .model = "growing"};
	char err[256] = "";

	if (policy_for_kind(h.kind)->init(&f->p, &cfg, err, sizeof(err)) < 0)
		fail_msg("%s", err);
}

/* A daemon's configuration, and where its weight file belongs. */
static inline void prepare(struct fixture *f)
{
	memset(f, 0, sizeof(*f));
	harness_init(&f->h, false);
	snprintf(f->h.cfg.model_dir, sizeof(f->h.cfg.model_dir), "%s", f->h.dir);
	snprintf(f->file, sizeof(f->file), "%s/growing.kvp", f->h.cfg.model_dir);
}

static inline int register_growing(struct kvtier *c, struct kvtier_model **ret)
{
	struct kvtier_layer_desc d[LAYERS];
	struct kvtier_model_desc md = {.size = sizeof(md),
				       .name = "growing",
				       .layers = d,
				       .n_layers = LAYERS,
				       .dtype = KVT_DTYPE_F32,
				       .head_dim = DIM,
				       .rope = KVT_ROPE_HALF,
				       .post_rope = 1,
				       .rope_theta = 10000,
				       .world = 1};

	for (uint32_t i = 0; i < LAYERS; i++)
		d[i] = (struct kvtier_layer_desc){.kv_heads = HEADS, .k_bytes = DIM * 4, .v_bytes = DIM * 4};
	return kvtier_model_register(c, &md, ret);
}

/* A connection to the daemon as this tenant. */
static inline void connect_as(struct fixture *f, int tenant, struct runtime *ret)
{
	struct kvtier_open_opts o = {
		.size = sizeof(o), .name = "test", .timeout_ms = 10000, .socket = f->h.sock[tenant]};

	*ret = (struct runtime){.layers = LAYERS, .lanes = LANES, .heads = HEADS};
	ret->k_bytes = ret->v_bytes = DIM * 4;
	assert_int_equal(kvtier_open(&o, &ret->c), 0);
	assert_int_equal(register_growing(ret->c, &ret->m), 0);
}

static inline void start(struct fixture *f)
{
	assert_true(harness_start(&f->h));
	connect_as(f, 0, &f->rt);
}

static inline void begin(struct fixture *f, struct weights_header h)
{
	prepare(f);
	write_file(f->file, h, 21);
	load_policy(f, h);
	start(f);
}

static inline void finish(struct fixture *f)
{
	if (f->p)
		f->p->ops->free(f->p);
	rt_close(&f->rt);
	harness_stop(&f->h);
	harness_rm(f->h.dir);
}

/* The row of a lane and position: the same numbers for whoever asks. */
static inline void row(uint32_t lane, uint32_t pos, float k[DIM], float v[DIM])
{
	uint32_t x = lane * 7919 + pos * 104729 + 1;

	for (uint32_t i = 0; i < 2 * DIM; i++) {
		float f;

		x = x * 1664525 + 1013904223;
		f = (float)(x >> 8) / (1 << 23) - 1.0f;
		if (i < DIM)
			k[i] = 3 * f;
		else
			v[i - DIM] = f;
	}
}

static inline void append(struct rt_seq *q, uint32_t n)
{
	for (uint32_t l = 0; l < LANES; l++) {
		int have = kvtier_seq_resident(q->s, l, NULL, 0);

		assert_true(have >= 0 && have + n <= q->cap);
		for (uint32_t i = 0; i < n; i++)
			row(l, q->rows + i, (float *)rt_row(q, l, (uint32_t)have + i, false),
			    (float *)rt_row(q, l, (uint32_t)have + i, true));
	}
	q->rows += n;
	assert_int_equal(kvtier_seq_append(q->s, KVT_ALL_LAYERS, q->rows - n, n), 0);
}

static const struct kvtier_budget everything = {
	.size = sizeof(everything), .device_rows = KVT_ROWS_ALL, .dram_rows = KVT_ROWS_ALL, .manual = 1};

static inline void open_seq(struct fixture *f, struct rt_seq *q, uint32_t id)
{
	assert_int_equal(rt_prepare(q, &f->rt, id, MOST, MOST, MOST), 0);
	assert_int_equal(rt_seq_open(q, KVT_EPHEMERAL, &everything), 0);
}

static inline void plan(struct rt_seq *q, const char *policy, struct kvtier_plan *ret)
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .device_rows = BUDGET,
				  .dram_rows = KVT_ROWS_ALL,
				  .manual = 1,
				  .policy = policy};
	uint64_t id;

	assert_int_equal(kvtier_plan_request(q->s, &b, &id), 0);
	assert_int_equal(rt_follow(q, id, ret), 0);
}
