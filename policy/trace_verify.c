/* SPDX-License-Identifier: MIT */
/* Checks that read the whole file, and comparing the shapes of two. */
#include <stdio.h>
#include <string.h>
#include "policy/trace_io.h"
#include "shm/util.h"

static bool has_floats(uint32_t kind)
{
	return kind != TRACE_CUTS && kind != TRACE_TOKENS;
}

static uint32_t dtype_of(const struct trace *t, uint32_t kind)
{
	return kind == TRACE_K || kind == TRACE_V || kind == TRACE_Q ? t->h.dtype : TRACE_F32;
}

/* Index of the first element that is infinite or no number, or `count`. */
static uint64_t first_wild(const void *data, uint64_t count, uint32_t dtype)
{
	uint32_t mask = dtype == TRACE_F16 ? 0x7c00 : 0x7f80;
	const uint16_t *half = data;
	const uint32_t *word = data;

	for (uint64_t i = 0; i < count; i++)
		if (dtype == TRACE_F32 ? (word[i] & 0x7f800000) == 0x7f800000 : (half[i] & mask) == mask)
			return i;
	return count;
}

static int verify_chunk(const struct trace *t, const struct trace_chunk *c, void *buf, char *err,
			size_t errsize)
{
	uint32_t dtype = dtype_of(t, c->kind), elem = dtype == TRACE_F32 ? 4 : 2;
	uint64_t bad;
	int r = trace_read_checked(t, c, buf, err, errsize);

	if (r < 0 || !has_floats(c->kind))
		return r;
	bad = first_wild(buf, c->bytes / elem, dtype);
	if (bad == c->bytes / elem)
		return 0;
	return trace_refuse(t, err, errsize, "offset %llu: %s of lane %u, cut %u: element %llu: not finite",
			    (unsigned long long)(c->off + bad * elem), trace_kind_name(c->kind), c->lane,
			    c->cut, (unsigned long long)bad);
}

static int by_place(const void *a, const void *b)
{
	const struct trace_chunk *x = a, *y = b;

	return (x->off > y->off) - (x->off < y->off);
}

/* No checksum covers what lies between the chunks, less than TRACE_ALIGN bytes: it must be zeros. */
static int verify_gap(const struct trace *t, uint64_t from, uint64_t to, char *err, size_t errsize)
{
	unsigned char buf[TRACE_ALIGN];
	int r = trace_pread(t, buf, to - from, from, err, errsize);

	for (uint64_t i = 0; r == 0 && i < to - from; i++)
		if (buf[i])
			r = trace_refuse(t, err, errsize, "offset %llu: 0x%02x between chunks, must be 0",
					 (unsigned long long)(from + i), buf[i]);
	return r;
}

/* A cut without queries and without utilities says nothing. */
static int verify_cuts(const struct trace *t, char *err, size_t errsize)
{
	for (uint32_t cut = 0; cut < t->h.cuts; cut++)
		for (uint32_t lane = 0; lane < t->h.layers * t->h.heads; lane++) {
			bool q = trace_find(t, TRACE_Q, lane, 0) && !(t->cut[cut].flags & TRACE_CUT_BRANCH);

			if (q ||
			    (trace_find(t, TRACE_UMAX, lane, cut) && trace_find(t, TRACE_UMEAN, lane, cut)))
				continue;
			return trace_refuse(t, err, errsize,
					    "offset %llu: lane %u, cut %u: has neither queries nor utilities",
					    (unsigned long long)t->h.table_off, lane, cut);
		}
	return 0;
}

static int verify_all(const struct trace *t, const struct trace_chunk *c, void *buf, char *err, size_t errsize)
{
	uint64_t at = TRACE_HEADER;
	int r = 0;

	for (uint32_t i = 0; r == 0 && i < t->h.chunks; i++) {
		r = verify_gap(t, at, c[i].off, err, errsize);
		if (r == 0)
			r = verify_chunk(t, &c[i], buf, err, errsize);
		at = c[i].off + c[i].bytes;
	}
	if (r == 0)
		r = verify_gap(t, at, t->h.table_off, err, errsize);
	return r < 0 ? r : verify_cuts(t, err, errsize);
}

int trace_verify(const struct trace *t, char *err, size_t errsize)
{
	_cleanup_free_ struct trace_chunk *c = malloc(t->h.chunks * sizeof(*c));
	_cleanup_free_ void *buf = NULL;
	uint64_t most = 0;

	for (uint32_t i = 0; i < t->h.chunks; i++)
		most = MAX(most, t->chunk[i].bytes);
	buf = malloc(most);
	if (!c || !buf) {
		trace_refuse(t, err, errsize, "out of memory");
		return -ENOMEM;
	}
	memcpy(c, t->chunk, t->h.chunks * sizeof(*c));
	qsort(c, t->h.chunks, sizeof(*c), by_place);
	return verify_all(t, c, buf, err, errsize);
}

int trace_same_shape(const struct trace_header *a, const struct trace_header *b, char *err, size_t errsize)
{
	const struct {
		const char *name;
		uint32_t a, b;
	} fields[] = {
		{"layers", a->layers, b->layers}, {"heads", a->heads, b->heads},
		{"group", a->group, b->group},    {"k_dim", a->k_dim, b->k_dim},
		{"v_dim", a->v_dim, b->v_dim},    {"rope_type", a->rope_type, b->rope_type},
		{"keys", a->keys, b->keys},
	};

	if (strncmp(a->model, b->model, sizeof(a->model)) != 0) {
		snprintf(err, errsize, "model: %.63s, must be %.63s", a->model, b->model);
		return -EINVAL;
	}
	for (size_t i = 0; i < ARRAY_SIZE(fields); i++)
		if (fields[i].a != fields[i].b) {
			snprintf(err, errsize, "%s: %u, must be %u", fields[i].name, fields[i].a, fields[i].b);
			return -EINVAL;
		}
	if (a->rope_type != TRACE_ROPE_NONE && a->rope_theta != b->rope_theta) {
		snprintf(err, errsize, "rope_theta: %g, must be %g", (double)a->rope_theta,
			 (double)b->rope_theta);
		return -EINVAL;
	}
	return 0;
}
