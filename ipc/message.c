/* SPDX-License-Identifier: MIT */
/* Building messages, and the parts of a check that need more than the message. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include "ipc/codec.h"
#include "shm/util.h"

void wire_init(struct wire_hdr *hdr, enum wire_type type, size_t len, uint32_t cookie)
{
	memset(hdr, 0, len);
	hdr->magic = WIRE_MAGIC;
	hdr->version = WIRE_VERSION;
	hdr->type = (uint16_t)type;
	hdr->len = (uint32_t)len;
	hdr->cookie = cookie;
}

void wire_reply_init(struct wire_reply *r, const struct wire_hdr *req, size_t len, int status, const char *fmt,
		     ...)
{
	struct wire_hdr h = *req; /* r may lie over req */
	va_list ap;

	if (status)
		len = sizeof(*r);
	wire_init(&r->hdr, (enum wire_type)(h.type | W_REPLY), len, h.cookie);
	r->status = status;
	if (!status || !fmt)
		return;
	va_start(ap, fmt);
	vsnprintf(r->text, sizeof(r->text), fmt, ap);
	va_end(ap);
	for (char *p = r->text; *p; p++)
		if ((unsigned char)*p < 0x20 || *p == 0x7f)
			*p = '?';
}

void wire_string(char *dst, size_t size, const char *src)
{
	size_t n = strnlen(src, size - 1);

	memcpy(dst, src, n);
	memset(dst + n, 0, size - n);
}

uint32_t wire_admin_argv(const struct wire_admin *m, const char **argv, uint32_t cap)
{
	const char *p = m->argv;

	for (uint32_t i = 0; i < m->argc && i < cap; i++) {
		argv[i] = p;
		p += strlen(p) + 1;
	}
	if (m->argc < cap)
		argv[m->argc] = NULL;
	return m->argc;
}

uint32_t wire_model_lanes(const struct wire_model *m)
{
	uint32_t lanes = 0;

	for (uint32_t i = 0; i < m->n_layers; i++)
		lanes += m->layer[i].kv_heads;
	return lanes;
}

/* One of K and V. Offsets and strides at most region_bytes (<= 2^46) keep every product below 2^55. */
static int plane_check(char name, uint64_t off, uint64_t head_stride, uint64_t row_stride, uint32_t bytes,
		       uint32_t heads, uint64_t slots, uint32_t i, uint64_t region_bytes, char *err,
		       size_t errsize)
{
	uint64_t end;

	if (row_stride < bytes) {
		snprintf(err, errsize, "layout[%u].%c_row_stride: %llu, must be at least the row's %u bytes", i,
			 name, (unsigned long long)row_stride, bytes);
		return KVT_E_INVAL;
	}
	if (heads > 1 && head_stride < bytes) {
		snprintf(err, errsize, "layout[%u].%c_head_stride: %llu, must be at least the row's %u bytes",
			 i, name, (unsigned long long)head_stride, bytes);
		return KVT_E_INVAL;
	}
	if (off > region_bytes || head_stride > region_bytes)
		end = UINT64_MAX;
	else
		end = off + (heads - 1) * head_stride + (slots - 1) * row_stride + bytes;
	if (end > region_bytes) {
		snprintf(err, errsize, "layout[%u].%c_off: %llu, its rows end at byte %llu of a region of %llu",
			 i, name, (unsigned long long)off, (unsigned long long)end,
			 (unsigned long long)region_bytes);
		return KVT_E_INVAL;
	}
	return 0;
}

static int score_check(const struct wire_layout *l, uint32_t heads, uint32_t i, uint64_t region_bytes,
		       uint32_t max_rows, char *err, size_t errsize)
{
	uint64_t plane = (uint64_t)max_rows * sizeof(float);

	if (l->score_off % sizeof(float) || l->score_head_stride % sizeof(float)) {
		snprintf(err, errsize,
			 "layout[%u].score_off: %llu, score_head_stride: %llu, must be multiples of 4", i,
			 (unsigned long long)l->score_off, (unsigned long long)l->score_head_stride);
		return KVT_E_INVAL;
	}
	if (heads > 1 && l->score_head_stride < plane) {
		snprintf(err, errsize, "layout[%u].score_head_stride: %llu, must be at least 4 x max_rows %u",
			 i, (unsigned long long)l->score_head_stride, max_rows);
		return KVT_E_INVAL;
	}
	if (l->score_off > region_bytes || l->score_head_stride > region_bytes ||
	    l->score_off + (heads - 1) * l->score_head_stride + plane > region_bytes) {
		snprintf(err, errsize,
			 "layout[%u].score_off: %llu, its plane ends past the region's %llu bytes", i,
			 (unsigned long long)l->score_off, (unsigned long long)region_bytes);
		return KVT_E_INVAL;
	}
	return 0;
}

int wire_layout_check(const struct wire_layout *l, const struct wire_layer *m, uint32_t i,
		      uint64_t region_bytes, uint32_t max_rows, char *err, size_t errsize)
{
	uint64_t slots = (uint64_t)l->cap + l->stage;
	int r;

	if (!l->cap || l->cap > WIRE_MAX_ROWS || l->stage > WIRE_MAX_ROWS) {
		snprintf(err, errsize, "layout[%u].cap: %u, stage: %u, must be 1..%u and 0..%u", i, l->cap,
			 l->stage, WIRE_MAX_ROWS, WIRE_MAX_ROWS);
		return KVT_E_INVAL;
	}
	r = plane_check('k', l->k_off, l->k_head_stride, l->k_row_stride, m->k_bytes, m->kv_heads, slots, i,
			region_bytes, err, errsize);
	if (!r && m->v_bytes)
		r = plane_check('v', l->v_off, l->v_head_stride, l->v_row_stride, m->v_bytes, m->kv_heads,
				slots, i, region_bytes, err, errsize);
	if (!r && l->score_off)
		r = score_check(l, m->kv_heads, i, region_bytes, max_rows, err, errsize);
	return r;
}

struct span {
	uint64_t off, bytes;
};

static bool apart(struct span a, struct span b)
{
	return a.off + a.bytes <= b.off || b.off + b.bytes <= a.off;
}

static int ring_check(const char *name, struct span ring, uint64_t least, uint64_t region_bytes, char *err,
		      size_t errsize)
{
	if (ring.bytes < least) {
		snprintf(err, errsize, "window.%s_bytes: %llu, must be at least %llu for the largest pages",
			 name, (unsigned long long)ring.bytes, (unsigned long long)least);
		return KVT_E_INVAL;
	}
	if (ring.off > region_bytes || ring.bytes > region_bytes - ring.off) {
		snprintf(err, errsize, "window.%s_off: %llu, its %llu bytes end past the region's %llu", name,
			 (unsigned long long)ring.off, (unsigned long long)ring.bytes,
			 (unsigned long long)region_bytes);
		return KVT_E_INVAL;
	}
	return 0;
}

/* Bytes of layer i's planes of scores, from its score_off on; KVT_E_INVAL when they do not lie in the region.
 */
static int window_scores(const struct wire_seq_open *m, const struct wire_layer *y, uint32_t i, uint32_t coefs,
			 uint64_t region_bytes, struct span *ret, char *err, size_t errsize)
{
	const struct wire_layout *l = wire_open_layouts(m) + i;
	uint64_t plane = (uint64_t)coefs * m->max_rows * sizeof(float);

	if (l->score_off % sizeof(float) || l->score_head_stride % sizeof(float)) {
		snprintf(err, errsize,
			 "layout[%u].score_off: %llu, score_head_stride: %llu, must be multiples of 4", i,
			 (unsigned long long)l->score_off, (unsigned long long)l->score_head_stride);
		return KVT_E_INVAL;
	}
	if (y->kv_heads > 1 && l->score_head_stride < plane) {
		snprintf(err, errsize,
			 "layout[%u].score_head_stride: %llu, must be at least 4 x max_rows %u x coefs %u", i,
			 (unsigned long long)l->score_head_stride, m->max_rows, coefs);
		return KVT_E_INVAL;
	}
	*ret = (struct span){.off = l->score_off, .bytes = UINT64_MAX};
	if (l->score_head_stride <= region_bytes)
		ret->bytes = (y->kv_heads - 1) * l->score_head_stride + plane;
	if (ret->off > region_bytes || ret->bytes > region_bytes - ret->off) {
		snprintf(err, errsize,
			 "layout[%u].score_off: %llu, its planes end past the region's %llu bytes", i,
			 (unsigned long long)l->score_off, (unsigned long long)region_bytes);
		return KVT_E_INVAL;
	}
	return 0;
}

/* Bytes in a ring of the largest page that a lane of the model may have. */
static uint64_t largest_record(const struct wire_layer *y, uint32_t layers, uint64_t header)
{
	uint64_t most = 0;

	for (uint32_t i = 0; i < layers; i++) {
		uint64_t bytes = WINDOW_ROWS * ((uint64_t)y[i].k_bytes + y[i].v_bytes);

		most = MAX(most, bytes);
	}
	return header + ALIGN_UP(most, WINDOW_ALIGN);
}

int wire_window_check(const struct wire_seq_open *m, const struct wire_layer *layers, uint32_t coefs,
		      uint64_t region_bytes, char *err, size_t errsize)
{
	const struct window_place *w = &m->window;
	struct span out = {w->out_off, w->out_bytes}, in = {w->in_off, w->in_bytes}, s;
	int r = ring_check("out", out, largest_record(layers, m->n_layers, sizeof(struct window_out)),
			   region_bytes, err, errsize);

	if (!r)
		r = ring_check("in", in, 2 * largest_record(layers, m->n_layers, sizeof(struct window_in)),
			       region_bytes, err, errsize);
	for (uint32_t i = 0; i < m->n_layers && !r; i++) {
		if (!wire_open_layouts(m)[i].score_off)
			continue;
		r = window_scores(m, &layers[i], i, coefs, region_bytes, &s, err, errsize);
		if (!r && !(apart(s, out) && apart(s, in))) {
			snprintf(err, errsize, "layout[%u].score_off: %llu, its planes lie over a ring", i,
				 (unsigned long long)s.off);
			r = KVT_E_INVAL;
		}
	}
	return r;
}
