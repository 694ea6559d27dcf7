/* SPDX-License-Identifier: MIT */
/*
 * What a .kvp file may say about itself: the limits of every field per kind,
 * and the layout of a lane that follows from kind and widths.
 */
#include "policy/weights.h"
#include "shm/util.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define FIELD(f) #f, offsetof(struct weights_header, f)

struct field_limit {
	const char *name;
	size_t off;
	uint32_t min, max, step;
};

static const struct field_limit common_limits[] = {
	{FIELD(layers), 1, 1024, 1}, {FIELD(heads), 1, 1024, 1}, {FIELD(rope_type), 0, 2, 1},
	{FIELD(keys), 0, 1, 1},      {NULL, 0, 0, 0, 0},
};

static const struct field_limit kvp_limits[] = {
	{FIELD(dtype), WEIGHTS_BF16, WEIGHTS_BF16, 1},
	{FIELD(k_dim), 16, 256, 16},
	{FIELD(v_dim), 16, 256, 16},
	{FIELD(proj), 32, 256, 32},
	{FIELD(pos_kind), WEIGHTS_POS_TABLE, WEIGHTS_POS_LOG2, 1},
	{FIELD(pos_rows), 1, 1u << 20, 1},
	{FIELD(pos_dim), 16, 64, 16},
	{FIELD(hidden), 32, 512, 32},
	{FIELD(rank), 1, 2, 1},
	{FIELD(dist_rows), 0, 4096, 1},
	{FIELD(octave), 0, 64, 1},
	{NULL, 0, 0, 0, 0},
};

static const struct field_limit position_limits[] = {
	{FIELD(dtype), WEIGHTS_F32, WEIGHTS_F32, 1},
	{FIELD(k_dim), 0, 65536, 1},
	{FIELD(v_dim), 0, 65536, 1},
	{FIELD(proj), 0, 0, 1},
	{FIELD(pos_kind), WEIGHTS_POS_LOG2, WEIGHTS_POS_LOG2, 1},
	{FIELD(pos_rows), 2, 4096, 1},
	{FIELD(pos_dim), 1, 64, 1},
	{FIELD(hidden), 0, 0, 1},
	{FIELD(rank), 1, 1, 1},
	{FIELD(dist_rows), 0, 0, 1},
	{FIELD(octave), 0, 0, 1},
	{NULL, 0, 0, 0, 0},
};

static const struct field_limit qfilter_limits[] = {
	{FIELD(dtype), WEIGHTS_F32, WEIGHTS_F32, 1},
	{FIELD(k_dim), 1, 65536, 1},
	{FIELD(v_dim), 0, 65536, 1},
	{FIELD(proj), 0, 0, 1},
	{FIELD(pos_kind), 0, 0, 1},
	{FIELD(pos_rows), 0, 0, 1},
	{FIELD(pos_dim), 0, 0, 1},
	{FIELD(hidden), 0, 0, 1},
	{FIELD(rank), 1, 1, 1},
	{FIELD(dist_rows), 0, 0, 1},
	{FIELD(octave), 0, 0, 1},
	{NULL, 0, 0, 0, 0},
};

static const struct field_limit *limits_of(uint32_t kind)
{
	switch (kind) {
	case WEIGHTS_KVP:
		return kvp_limits;
	case WEIGHTS_POSITION:
		return position_limits;
	case WEIGHTS_QFILTER:
		return qfilter_limits;
	}
	return NULL;
}

static int __attribute__((format(printf, 3, 4))) refuse(char *err, size_t errsize, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(err, errsize, fmt, ap);
	va_end(ap);
	return -EBADMSG;
}

const char *weights_kind_name(uint32_t kind)
{
	switch (kind) {
	case WEIGHTS_KVP:
		return "kvp";
	case WEIGHTS_POSITION:
		return "position";
	case WEIGHTS_QFILTER:
		return "qfilter";
	}
	return NULL;
}

int weights_lay_out(struct weights_layout *ret, const struct weights_header *h)
{
	uint32_t in = 2 * h->proj + h->pos_dim;
	const struct weights_tensor kvp[] = {
		{"wk", h->proj, h->k_dim, 0},
		{"bk", 1, h->proj, 0},
		{"gk", 1, h->proj, 0},
		{"ok", 1, h->proj, 0},
		{"wv", h->proj, h->v_dim, 0},
		{"bv", 1, h->proj, 0},
		{"gv", 1, h->proj, 0},
		{"ov", 1, h->proj, 0},
		{"pos", h->pos_rows, h->pos_dim, 0},
		{"gp", 1, h->pos_dim, 0},
		{"op", 1, h->pos_dim, 0},
		{"w1", h->hidden, in, 0},
		{"b1", 1, h->hidden, 0},
		{"g1", 1, h->hidden, 0},
		{"o1", 1, h->hidden, 0},
		{"w2", h->hidden, h->hidden, 0},
		{"b2", 1, h->hidden, 0},
		{"g2", 1, h->hidden, 0},
		{"o2", 1, h->hidden, 0},
		{"w3", h->rank, h->hidden, 0},
		{"b3", 1, h->rank, 0},
		{"dist", 2 * h->rank, h->dist_rows, 0},
	};
	const struct weights_tensor position[] = {{"dist", 1, h->pos_rows, 0}, {"index", 1, h->pos_rows, 0}};
	const struct weights_tensor qfilter[] = {{"f", 1, h->k_dim, 0}};
	struct weights_layout l = {.elem = h->kind == WEIGHTS_KVP ? 2 : 4};

	static_assert(ARRAY_SIZE(kvp) == KVP_TENSORS, "one line per tensor");
	switch (h->kind) {
	case WEIGHTS_KVP:
		l.count = ARRAY_SIZE(kvp);
		memcpy(l.tensor, kvp, sizeof(kvp));
		break;
	case WEIGHTS_POSITION:
		l.count = ARRAY_SIZE(position);
		memcpy(l.tensor, position, sizeof(position));
		break;
	case WEIGHTS_QFILTER:
		l.count = ARRAY_SIZE(qfilter);
		memcpy(l.tensor, qfilter, sizeof(qfilter));
		break;
	default:
		return -EINVAL;
	}
	for (uint32_t t = 0; t < l.count; t++) {
		l.tensor[t].off = l.params * l.elem;
		l.params += (uint64_t)l.tensor[t].rows * l.tensor[t].cols;
	}
	l.stride = ALIGN_UP(l.params * l.elem, (uint64_t)WEIGHTS_ALIGN);
	*ret = l;
	return 0;
}

static int check_limits(const struct weights_header *h, const struct field_limit *l, char *err, size_t errsize)
{
	for (; l->name; l++) {
		uint32_t v = *(const uint32_t *)((const char *)h + l->off);

		if (v >= l->min && v <= l->max && v % l->step == 0)
			continue;
		if (l->min == l->max)
			return refuse(err, errsize, "%s: %u, must be %u", l->name, v, l->min);
		if (l->step > 1)
			return refuse(err, errsize, "%s: %u, must be a multiple of %u from %u to %u", l->name,
				      v, l->step, l->min, l->max);
		return refuse(err, errsize, "%s: %u, must be %u to %u", l->name, v, l->min, l->max);
	}
	return 0;
}

static int check_name(const char name[64], char *err, size_t errsize)
{
	size_t len = strnlen(name, 64);

	if (len == 0 || len == 64)
		return refuse(err, errsize, "name: %zu bytes, must be 1 to 63 and NUL-terminated", len);
	for (size_t i = 0; i < 64; i++)
		if (i < len ? (name[i] <= ' ' || name[i] > '~') : name[i] != 0)
			return refuse(err, errsize, "name: byte %zu is 0x%02x, must be %s", i,
				      (unsigned char)name[i], i < len ? "printable ASCII without spaces" : "0");
	return 0;
}

/* What one field asks of another. */
static int check_together(const struct weights_header *h, char *err, size_t errsize)
{
	bool unrotate = h->keys == WEIGHTS_KEYS_UNROTATED && h->rope_type != WEIGHTS_ROPE_NONE;

	if (unrotate && !(h->rope_theta > 0))
		return refuse(err, errsize, "rope_theta: %g, must be positive where keys is 1 (before RoPE)",
			      (double)h->rope_theta);
	if (h->kind != WEIGHTS_KVP)
		return 0;
	if (h->rank > 1 && !h->dist_rows)
		return refuse(err, errsize, "dist_rows: 0, must be 1 to 4096 where rank is %u", h->rank);
	if (h->octave == 0 && (h->dist_rows || h->pos_kind == WEIGHTS_POS_LOG2))
		return refuse(err, errsize, "octave: 0, must be 1 to 64 where %s",
			      h->dist_rows ? "dist_rows is not 0" : "pos_kind is 2 (log2)");
	return 0;
}

int weights_check_shape(const struct weights_header *h, char *err, size_t errsize)
{
	int r = check_name(h->name, err, errsize);

	if (r < 0)
		return r;
	if (!limits_of(h->kind))
		return refuse(err, errsize, "kind: %u, must be 1 (kvp), 2 (position) or 3 (qfilter)", h->kind);
	r = check_limits(h, common_limits, err, errsize);
	if (r == 0)
		r = check_limits(h, limits_of(h->kind), err, errsize);
	if (r == 0 && !(isfinite(h->rope_theta) && h->rope_theta >= 0))
		r = refuse(err, errsize, "rope_theta: %g, must be finite and not negative",
			   (double)h->rope_theta);
	return r ? r : check_together(h, err, errsize);
}
