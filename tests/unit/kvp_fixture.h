/* SPDX-License-Identifier: MIT */
#pragma once
/* What the tests of the learned policies share: weight files of any shape in a directory of their own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "policy/kvp.h"
#include "shm/util.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MODEL "test-model"

static char fixture_dir[64], fixture_file[96];

static inline int fixture_setup(void **state)
{
	snprintf(fixture_dir, sizeof(fixture_dir), "/tmp/kvtier-test.XXXXXX");
	if (!mkdtemp(fixture_dir))
		return -1;
	snprintf(fixture_file, sizeof(fixture_file), "%s/w.kvp", fixture_dir);
	return 0;
}

static inline int fixture_teardown(void **state)
{
	unlink(fixture_file);
	return rmdir(fixture_dir);
}

static inline struct weights_header shape_kvp(uint32_t k_dim, uint32_t v_dim)
{
	return (struct weights_header){.name = MODEL,
				       .layers = 2,
				       .heads = 1,
				       .k_dim = k_dim,
				       .v_dim = v_dim,
				       .kind = WEIGHTS_KVP,
				       .pos_kind = WEIGHTS_POS_TABLE,
				       .proj = 256,
				       .pos_rows = 6000,
				       .pos_dim = 32,
				       .hidden = 256,
				       .rank = 1,
				       .rope_type = WEIGHTS_ROPE_HALF,
				       .rope_theta = 10000};
}

/* Every width different and small, so that mixed-up dimensions and offsets show and every byte can be tried. */
static inline struct weights_header shape_narrow(void)
{
	struct weights_header h = shape_kvp(16, 48);

	h.proj = 32;
	h.pos_rows = 5;
	h.pos_dim = 16;
	h.hidden = 64;
	return h;
}

/* What is trained for SmolLM2, for keys before RoPE and scores that follow the distance to the end. */
static inline struct weights_header shape_trained(void)
{
	struct weights_header h = shape_kvp(64, 64);

	h.keys = WEIGHTS_KEYS_UNROTATED;
	h.rope_theta = 100000;
	h.proj = h.hidden = 128;
	h.pos_kind = WEIGHTS_POS_LOG2;
	h.pos_rows = h.dist_rows = 33;
	h.pos_dim = 16;
	h.octave = 2;
	h.rank = 2;
	return h;
}

/* shape_narrow() with everything on that it leaves off. */
static inline struct weights_header shape_narrow_trained(void)
{
	struct weights_header h = shape_narrow();

	h.keys = WEIGHTS_KEYS_UNROTATED;
	h.rope_type = WEIGHTS_ROPE_PAIRS;
	h.pos_kind = WEIGHTS_POS_LOG2;
	h.octave = 3;
	h.rank = 2;
	h.dist_rows = 20;
	return h;
}

static inline struct weights_header shape_position(void)
{
	return (struct weights_header){.name = MODEL,
				       .layers = 2,
				       .heads = 1,
				       .k_dim = 64,
				       .v_dim = 64,
				       .kind = WEIGHTS_POSITION,
				       .pos_kind = WEIGHTS_POS_LOG2,
				       .pos_rows = 20,
				       .pos_dim = 2};
}

static inline struct weights_header shape_qfilter(uint32_t k_dim)
{
	return (struct weights_header){
		.name = MODEL, .layers = 2, .heads = 1, .k_dim = k_dim, .v_dim = 64, .kind = WEIGHTS_QFILTER};
}

static inline uint64_t image_size(const uint8_t *image)
{
	return ((const struct weights_header *)image)->total_size;
}

/* A sealed image of random weights, the caller's to free. */
static inline uint8_t *make_image(struct weights_header h, uint64_t calib, uint64_t seed)
{
	char err[256] = "";
	uint8_t *image;

	if (weights_image_new(&image, &h, calib, err, sizeof(err)) < 0)
		fail_msg("%s", err);
	weights_image_random(image, seed);
	weights_image_seal(image, image_size(image));
	return image;
}

static inline void save_random(struct weights_header h, uint64_t seed)
{
	_cleanup_free_ uint8_t *image = make_image(h, 0, seed);

	assert_int_equal(weights_image_write(image, fixture_file), 0);
}

static inline struct policy_cfg config_for(struct weights_header h, enum row_dtype dtype, const char *isa)
{
	return (struct policy_cfg){.layers = h.layers,
				   .heads = h.heads,
				   .k_dim = h.k_dim,
				   .v_dim = h.v_dim,
				   .dtype = dtype,
				   .weights = fixture_file,
				   .isa = isa,
				   .model = MODEL};
}

/* A policy on fixture_file; NULL when this CPU lacks the isa. */
static inline struct policy *make_policy(const struct policy_ops *ops, struct weights_header h,
					 enum row_dtype dtype, const char *isa)
{
	struct policy_cfg cfg = config_for(h, dtype, isa);
	struct policy *p = NULL;
	char err[512] = "";
	int r = ops->init(&p, &cfg, err, sizeof(err));

	if (r == -ENOTSUP)
		return NULL;
	if (r < 0)
		fail_msg("%s", err);
	return p;
}
