/* SPDX-License-Identifier: MIT */
/*
 * A batch on its way to the device: checked, its rows packed, where each lies between
 * knots, and the rows sorted by knot. All of it is the same for every lane. Staged in
 * one of two pinned buffers, so that the host prepares a step while the device runs the last.
 */
#include "policy/train/cuda/cuda.cuh"

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>

uint32_t batch_capacity(const struct train_opts *o)
{
	return (o->batch * o->rows + ROWS_PAD - 1) / ROWS_PAD * ROWS_PAD;
}

/* Nine words a row, two a unit; items and knots of two tables with an end each. */
size_t batch_words(const struct train_opts *o)
{
	size_t rows = batch_capacity(o);

	return 9 * rows + 2 * (size_t)o->batch + 2 * (2 * rows + o->shape.pos_rows + o->shape.dist_rows + 64);
}

struct packer {
	uint32_t *host, *device;
	size_t used;
};

/* Room for n words in both buffers; *device is the kernels' view of what is returned. */
template <typename T> static T *take(struct packer *p, size_t n, const T **device)
{
	T *host = (T *)(p->host + p->used);

	*device = (const T *)(p->device + p->used);
	p->used += (n + 3) & ~(size_t)3;
	return host;
}

static int refuse(struct cuda_backend *b, const char *field, uint64_t at, uint64_t value, uint64_t limit)
{
	snprintf(b->error, sizeof(b->error), "batch: %s[%llu]: %llu, limit %llu", field, (unsigned long long)at,
		 (unsigned long long)value, (unsigned long long)limit);
	return -EINVAL;
}

static int check(struct cuda_backend *b, const struct train_batch *t)
{
	if (t->units == 0 || t->units > b->o.batch)
		return refuse(b, "units", 0, t->units, b->o.batch);
	for (uint32_t i = 0; i < t->units; i++) {
		const uint32_t *row = t->row + (size_t)i * b->o.rows;
		uint32_t unit = t->unit[i], n = t->n[i];

		if (unit >= b->units)
			return refuse(b, "unit", i, unit, b->units);
		if (n < 2 || n > b->o.rows)
			return refuse(b, "n", i, n, b->o.rows);
		for (uint32_t r = 0; r < n; r++)
			if (row[r] >= b->unit_rows[unit] || (r > 0 && row[r] <= row[r - 1]))
				return refuse(b, "row", (uint64_t)i * b->o.rows + r, row[r],
					      b->unit_rows[unit]);
	}
	return 0;
}

/* Knot below x and how far above it; flat past the last. */
static void locate(const struct cuda_backend *b, uint32_t x, uint32_t per_octave, uint32_t knots,
		   uint32_t *knot, float *frac)
{
	float t = (float)per_octave * b->log2_of[x];

	if (t >= (float)(knots - 1)) {
		*knot = knots - 1;
		*frac = 0;
		return;
	}
	*knot = (uint32_t)t;
	*frac = t - (float)*knot;
}

/* Rows in the order of their knots, ascending within one; items of up to ITEM_ROWS of a knot. */
static void bucket(struct cuda_backend *b, struct packer *p, const uint32_t *knot_of, uint32_t count,
		   uint32_t knots, struct buckets *out)
{
	uint32_t *cursor = b->count_scratch, items = 0, sum = 0;
	uint32_t *order = take(p, count, &out->order), *item_of_knot, *first;

	memset(cursor, 0, knots * sizeof(*cursor));
	for (uint32_t i = 0; i < count; i++)
		cursor[knot_of[i]]++;
	item_of_knot = take(p, knots + 1, &out->knot);
	for (uint32_t k = 0; k < knots; k++) {
		item_of_knot[k] = items;
		items += (cursor[k] + ITEM_ROWS - 1) / ITEM_ROWS;
	}
	item_of_knot[knots] = items;
	first = take(p, items + 1, &out->first);
	for (uint32_t k = 0; k < knots; k++) {
		uint32_t rows = cursor[k];

		for (uint32_t i = 0; i * ITEM_ROWS < rows; i++)
			first[item_of_knot[k] + i] = sum + i * ITEM_ROWS;
		cursor[k] = sum;
		sum += rows;
	}
	first[items] = sum;
	for (uint32_t i = 0; i < count; i++)
		order[cursor[knot_of[i]]++] = i;
	out->items = items;
	out->knots = knots;
}

static void place_row(const struct cuda_backend *b, uint32_t pos, uint32_t left, uint32_t *pos_knot,
		      float *pos_frac, uint32_t *dist_knot, float *dist_frac)
{
	const struct weights_header *h = &b->o.shape;
	uint32_t octave = h->kind == WEIGHTS_POSITION ? h->pos_dim : h->octave;

	if (h->pos_kind == WEIGHTS_POS_TABLE) {
		*pos_knot = pos < h->pos_rows ? pos : h->pos_rows - 1;
		*pos_frac = 0;
	} else {
		locate(b, pos, octave, h->pos_rows, pos_knot, pos_frac);
	}
	*dist_knot = 0;
	*dist_frac = 0;
	if (b->net.dist_knots > 0)
		locate(b, left, octave, b->net.dist_knots, dist_knot, dist_frac);
}

static void fill(struct cuda_backend *b, const struct train_batch *t, struct packer *p, struct rows *out)
{
	uint32_t count = 0, *set_row, *u_row, *pos_knot, *dist_knot, *start, *n;
	float *pos_frac, *dist_frac, *lambda;

	for (uint32_t i = 0; i < t->units; i++)
		count += t->n[i];
	out->units = t->units;
	out->count = count;
	out->padded = (count + ROWS_PAD - 1) / ROWS_PAD * ROWS_PAD;
	out->most = 0;
	set_row = take(p, count, &out->set_row);
	u_row = take(p, count, &out->u_row);
	pos_knot = take(p, count, &out->pos_knot);
	dist_knot = take(p, count, &out->dist_knot);
	pos_frac = take(p, count, &out->pos_frac);
	dist_frac = take(p, count, &out->dist_frac);
	lambda = take(p, count, &out->lambda);
	start = take(p, t->units, &out->start);
	n = take(p, t->units, &out->n);
	for (uint32_t i = 0, at = 0; i < t->units; i++) {
		uint32_t unit = t->unit[i], doc = b->unit_doc[unit], prompt = b->unit_prompt[unit];
		const uint32_t *row = t->row + (size_t)i * b->o.rows, *pos = b->doc_pos[doc];
		float octaves = log2f((float)prompt), l = fminf(fmaxf(octaves, 8), 14) - 11;

		start[i] = at;
		n[i] = t->n[i];
		out->most = n[i] > out->most ? n[i] : out->most;
		for (uint32_t r = 0; r < n[i]; r++, at++) {
			set_row[at] = (uint32_t)b->doc_base[doc] + row[r];
			u_row[at] = (uint32_t)b->unit_base[unit] + row[r];
			lambda[at] = l;
			place_row(b, pos[row[r]], prompt - 1 - pos[row[r]], &pos_knot[at], &pos_frac[at],
				  &dist_knot[at], &dist_frac[at]);
		}
	}
	bucket(b, p, pos_knot, count, b->net.pos_knots, &out->pos);
	if (b->net.dist_knots > 0)
		bucket(b, p, dist_knot, count, b->net.dist_knots, &out->dist);
}

int batch_upload(struct cuda_backend *b, const struct train_batch *t)
{
	uint32_t slot = b->slot++ % UPLOAD_SLOTS;
	struct packer p = {b->pinned[slot], b->upload, 0};
	int r = check(b, t);

	if (r < 0)
		return r;
	if (!cuda_ok(b, cudaEventSynchronize(b->uploaded[slot]), "cudaEventSynchronize"))
		return b->failed;
	fill(b, t, &p, &b->rows);
	cuda_ok(b,
		cudaMemcpyAsync(b->upload, p.host, p.used * sizeof(uint32_t), cudaMemcpyHostToDevice,
				b->stream),
		"upload of a batch");
	cuda_ok(b, cudaEventRecord(b->uploaded[slot], b->stream), "cudaEventRecord");
	return b->failed;
}
