/* SPDX-License-Identifier: MIT */
#pragma once
/* Networks of random weights and rows for them, for the check and the benchmark of scoring. */
#include "policy/learned.h"
#include "policy/scorer.h"
#include "tests/gpu/gpu.h"

struct net {
	const char *name;
	uint32_t dim, proj, hidden;
	bool trained; /* keys before RoPE, positions on knots, two coefficients; else as published */
	uint32_t layers, heads;
	uint32_t rope; /* enum weights_rope */
	/* made by net_new(): */
	struct weights *w;
	struct scorer_hdr *s;
	uint64_t gpu; /* the same in GPU memory */
};

static inline void net_new(struct gpu *u, struct net *n)
{
	struct weights_header h = {.name = "random",
				   .layers = n->layers,
				   .heads = n->heads,
				   .k_dim = n->dim,
				   .v_dim = n->dim,
				   .kind = WEIGHTS_KVP,
				   .proj = n->proj,
				   .hidden = n->hidden,
				   .pos_kind = n->trained ? WEIGHTS_POS_LOG2 : WEIGHTS_POS_TABLE,
				   .pos_rows = n->trained ? 33 : 6000,
				   .pos_dim = n->trained ? 16 : 32,
				   .octave = n->trained ? 2 : 0,
				   .rank = n->trained ? 2 : 1,
				   .dist_rows = n->trained ? 33 : 0,
				   .keys = n->trained ? WEIGHTS_KEYS_UNROTATED : WEIGHTS_KEYS_CACHED,
				   .rope_type = n->rope,
				   .rope_theta = 100000};
	struct scorer_hdr s;
	uint8_t *image;
	char err[256] = "";
	uint64_t size;

	if (weights_image_new(&image, &h, 0, err, sizeof(err)) < 0)
		die("%s", err);
	size = ((struct weights_header *)image)->total_size;
	weights_image_random(image, mix(random_state));
	weights_image_seal(image, size);
	if (weights_parse(&n->w, image, size, err, sizeof(err)) < 0 ||
	    scorer_header(&s, n->w, err, sizeof(err)) < 0)
		die("%s", err);
	free(image);
	n->s = aligned_alloc(SCORER_ALIGN, ALIGN_UP(s.bytes, (uint64_t)SCORER_ALIGN));
	if (!n->s)
		die("out of memory");
	memset(n->s, 0, s.bytes);
	if (scorer_build(n->s, &s, n->w) < 0)
		die("out of memory");
	n->gpu = gpu_new(u, n->s, s.bytes);
}

static inline void net_free(struct gpu *u, struct net *n)
{
	gpu_free(u, n->gpu);
	weights_free(n->w);
	free(n->s);
}

static inline uint32_t net_lanes(const struct net *n)
{
	return n->layers * n->heads;
}

/* A value of a row: roughly normal, times scale; as 16 bits of the dtype. */
static inline uint16_t row_value(uint64_t *state, enum row_dtype dtype, float scale)
{
	uint64_t r = *state = mix(*state);
	float x = (float)(int16_t)r + (float)(int16_t)(r >> 16) + (float)(int16_t)(r >> 32) +
		  (float)(int16_t)(r >> 48);

	x *= scale / 37837.0f;
	if (dtype == ROW_BF16)
		return float_bf16(x);
	/* fp16: enough of a rounding for numbers between 2^-14 and 65504 */
	{
		uint32_t bits;

		memcpy(&bits, &x, 4);
		if ((bits & 0x7fffffff) < 0x38800000)
			return 0;
		bits += 0x1000;
		return (uint16_t)(bits >> 16 & 0x8000) | (uint16_t)(((bits & 0x7fffffff) - 0x38000000) >> 13);
	}
}
