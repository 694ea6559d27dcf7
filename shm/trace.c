/* SPDX-License-Identifier: MIT */
/* What a .kvtr file may hold: the limits that writer and reader share. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "shm/trace.h"
#include "shm/util.h"

static const struct {
	const char *name;
	int lanes, cuts;
} kinds[TRACE_KINDS] = {
	[TRACE_CUTS] = {"CUTS", 0, 0},   [TRACE_TOKENS] = {"TOKENS", 0, 0}, [TRACE_K] = {"K", 1, 0},
	[TRACE_V] = {"V", 1, 0},         [TRACE_Q] = {"Q", 1, 0},           [TRACE_UMAX] = {"UMAX", 1, 1},
	[TRACE_UMEAN] = {"UMEAN", 1, 1}, [TRACE_VNORM] = {"VNORM", 1, 0},   [TRACE_GRAM] = {"GRAM", 1, 0},
};

const char *trace_kind_name(uint32_t kind)
{
	return kind < TRACE_KINDS ? kinds[kind].name : NULL;
}

int trace_kind_lanes(uint32_t kind)
{
	return kind < TRACE_KINDS && kinds[kind].lanes;
}

int trace_kind_cuts(uint32_t kind)
{
	return kind < TRACE_KINDS && kinds[kind].cuts;
}

uint64_t trace_chunk_bytes(const struct trace_header *h, uint32_t kind, const struct trace_cut *cut)
{
	uint64_t rows = h->rows, elem = h->dtype == TRACE_F32 ? 4 : 2, wide = (uint64_t)h->group * h->v_dim;

	switch (kind) {
	case TRACE_CUTS:
		return h->cuts * sizeof(struct trace_cut);
	case TRACE_TOKENS:
		return rows * sizeof(uint32_t);
	case TRACE_K:
		return rows * h->k_dim * elem;
	case TRACE_V:
		return rows * h->v_dim * elem;
	case TRACE_Q:
		return rows * h->group * h->k_dim * elem;
	case TRACE_UMAX:
	case TRACE_UMEAN:
		return cut ? cut->prompt * sizeof(float) : 0;
	case TRACE_VNORM:
		return rows * sizeof(float);
	case TRACE_GRAM:
		return rows ? 0 : wide * wide * sizeof(float);
	default:
		return 0;
	}
}

static int __attribute__((format(printf, 3, 4))) refuse(char *err, size_t errsize, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(err, errsize, fmt, ap);
	va_end(ap);
	return -EINVAL;
}

static int check_text(const struct trace_header *h, size_t off, size_t size, const char *name, char *err,
		      size_t errsize)
{
	const unsigned char *s = (const unsigned char *)h + off;
	size_t len = strnlen((const char *)s, size);

	if (len == size)
		return refuse(err, errsize, "offset %zu: %s: %zu bytes or more, must be at most %zu and a NUL",
			      off, name, size, size - 1);
	for (size_t i = 0; i < size; i++)
		if (i < len ? s[i] < 0x20 || s[i] == 0x7f : s[i] != 0)
			return refuse(err, errsize, "offset %zu: %s: byte 0x%02x, must be %s", off + i, name,
				      s[i], i < len ? "no control character" : "0 after the text");
	return 0;
}

struct limit {
	const char *name;
	size_t off;
	uint32_t lo, hi;
};

#define TEXT(field) offsetof(struct trace_header, field), sizeof(h->field), #field
#define LIMIT(field, lo, hi)                                                                                   \
	{                                                                                                      \
#field, offsetof(struct trace_header, field), lo, hi                                           \
	}

static int check_numbers(const struct trace_header *h, char *err, size_t errsize)
{
	static const struct limit limits[] = {
		LIMIT(layers, 1, TRACE_MAX_LAYERS),
		LIMIT(heads, 1, TRACE_MAX_LANES),
		LIMIT(group, 1, TRACE_MAX_GROUP),
		LIMIT(k_dim, 1, TRACE_MAX_DIM),
		LIMIT(v_dim, 0, TRACE_MAX_DIM),
		LIMIT(dtype, TRACE_F32, TRACE_BF16),
		LIMIT(rope_type, TRACE_ROPE_NONE, TRACE_ROPE_PAIRS),
		LIMIT(keys, TRACE_KEYS_CACHED, TRACE_KEYS_UNROTATED),
		LIMIT(rows, 0, TRACE_MAX_ROWS),
		LIMIT(cuts, 0, TRACE_MAX_CUTS),
		LIMIT(split, TRACE_TRAIN, TRACE_CALIB),
	};

	for (size_t i = 0; i < ARRAY_SIZE(limits); i++) {
		uint32_t v;

		memcpy(&v, (const char *)h + limits[i].off, sizeof(v));
		if (v < limits[i].lo || v > limits[i].hi)
			return refuse(err, errsize, "offset %zu: %s: %u, must be %u..%u", limits[i].off,
				      limits[i].name, v, limits[i].lo, limits[i].hi);
	}
	return 0;
}

int trace_check_header(const struct trace_header *h, char *err, size_t errsize)
{
	static const uint8_t zeros[sizeof(h->reserved)];
	int r = check_text(h, TEXT(model), err, errsize);

	if (r == 0)
		r = check_text(h, TEXT(source), err, errsize);
	if (r == 0)
		r = check_text(h, TEXT(domain), err, errsize);
	if (r == 0)
		r = check_text(h, TEXT(task), err, errsize);
	if (r == 0)
		r = check_numbers(h, err, errsize);
	if (r < 0)
		return r;
	if (!h->model[0])
		return refuse(err, errsize, "offset %zu: model: empty, must be a name",
			      offsetof(struct trace_header, model));
	if (h->layers * h->heads > TRACE_MAX_LANES)
		return refuse(err, errsize, "offset %zu: heads: %u x %u lanes, must be at most %u",
			      offsetof(struct trace_header, heads), h->layers, h->heads, TRACE_MAX_LANES);
	if (h->rope_type != TRACE_ROPE_NONE && h->k_dim % 2)
		return refuse(err, errsize, "offset %zu: k_dim: %u, must be even with RoPE",
			      offsetof(struct trace_header, k_dim), h->k_dim);
	if (h->rope_type != TRACE_ROPE_NONE && !(isfinite(h->rope_theta) && h->rope_theta >= 1))
		return refuse(err, errsize, "offset %zu: rope_theta: %g, must be finite and at least 1",
			      offsetof(struct trace_header, rope_theta), (double)h->rope_theta);
	if (h->cuts && !h->rows)
		return refuse(err, errsize, "offset %zu: cuts: %u, must be 0 without rows",
			      offsetof(struct trace_header, cuts), h->cuts);
	if (memcmp(h->reserved, zeros, sizeof(zeros)) != 0)
		return refuse(err, errsize, "offset %zu: reserved: not zero, must be 0",
			      offsetof(struct trace_header, reserved));
	return 0;
}

int trace_check_cut(const struct trace_header *h, const struct trace_cut *cut, uint32_t i, char *err,
		    size_t errsize)
{
	uint32_t most = cut->flags & TRACE_CUT_BRANCH ? TRACE_MAX_ROWS : h->rows - cut->prompt;

	if (cut->prompt < 1 || cut->prompt > h->rows)
		return refuse(err, errsize, "cut %u: prompt: %u, must be 1..%u", i, cut->prompt, h->rows);
	if (cut->queries < 1 || cut->queries > most)
		return refuse(err, errsize, "cut %u: queries: %u, must be 1..%u after prompt %u", i,
			      cut->queries, most, cut->prompt);
	if (cut->flags & ~(uint32_t)(TRACE_CUT_BEFORE | TRACE_CUT_BRANCH))
		return refuse(err, errsize, "cut %u: flags: 0x%x, must be 0..3", i, cut->flags);
	return 0;
}
