/* SPDX-License-Identifier: MIT */
/* Where a sequence's rows lie, and which memory behind them may come and go. */
#include "ipc/client/client.h"

uint32_t plane_bytes(const struct kvtier_seq *s, uint32_t layer, bool v)
{
	const struct wire_layer *d = &s->m->msg->layer[layer];

	return v ? d->v_bytes : d->k_bytes;
}

static uint64_t plane_off(const struct kvtier_seq *s, uint32_t layer, uint32_t lane, bool v)
{
	const struct kvtier_layout *l = &s->layouts[layer];
	uint64_t head = lane - s->m->first_lane[layer];

	return v ? l->v_off + head * l->v_head_stride : l->k_off + head * l->k_head_stride;
}

char *plane_slot(const struct kvtier_seq *s, uint32_t layer, uint32_t lane, bool v, uint64_t slot)
{
	const struct kvtier_layout *l = &s->layouts[layer];

	return (char *)s->r->seg.addr + plane_off(s, layer, lane, v) +
	       slot * (v ? l->v_row_stride : l->k_row_stride);
}

/* ---- groups ------------------------------------------------------------------------ */

static uint64_t plane_end(const struct plane *p)
{
	return p->off + ((uint64_t)p->cap + p->stage - 1) * p->stride + p->bytes;
}

static int by_offset(const void *a, const void *b)
{
	const struct plane *x = a, *y = b;

	return x->off < y->off ? -1 : x->off > y->off;
}

static void add_planes(struct kvtier_seq *s, uint32_t layer)
{
	const struct kvtier_layout *l = &s->layouts[layer];

	for (uint32_t lane = s->m->first_lane[layer]; lane < s->m->first_lane[layer + 1]; lane++) {
		struct plane p = {.lane = lane, .cap = l->cap, .stage = l->stage};

		p.off = plane_off(s, layer, lane, false);
		p.stride = l->k_row_stride;
		p.bytes = plane_bytes(s, layer, false);
		s->planes[s->n_planes++] = p;
		p.off = plane_off(s, layer, lane, true);
		p.stride = l->v_row_stride;
		p.bytes = plane_bytes(s, layer, true);
		if (p.bytes)
			s->planes[s->n_planes++] = p;
		if (l->score_off)
			s->planes[s->n_planes++] = (struct plane){
				.off = l->score_off + (lane - s->m->first_lane[layer]) * l->score_head_stride,
				.stride = sizeof(float),
				.bytes = sizeof(float),
				.lane = NO_LANE,
				.cap = s->max_rows,
			};
	}
}

/* Records can be punched when every field repeats at one stride and all fields of a record fit in it. */
static void close_group(struct kvtier_seq *s, struct group *g)
{
	const struct plane *p = &s->planes[g->first];
	uint64_t span = 0;

	g->base = p->off;
	g->stride = p->stride;
	g->cap = g->backed = p->cap;
	g->stage = p->stage;
	g->punchable = true;
	for (uint32_t i = 0; i < g->planes; i++, p++) {
		span = MAX(span, p->off + p->bytes - g->base);
		if (p->lane == NO_LANE || p->stride != g->stride || p->cap != g->cap || p->stage != g->stage)
			g->punchable = false;
	}
	if (span > g->stride)
		g->punchable = false;
	g->span = g->punchable ? (uint32_t)span : 0;
}

int planes_mapped(const struct kvtier_seq *s)
{
	return s->r->seg.addr ? 0
			      : err_set(KVT_E_INVAL, "region: not mapped here, its rows must be moved by hand");
}

int planes_build(struct kvtier_seq *s)
{
	uint64_t end = 0;
	struct group *g = NULL;

	s->planes = calloc((size_t)s->lanes * 3, sizeof(*s->planes));
	s->groups = calloc((size_t)s->lanes * 3, sizeof(*s->groups));
	if (!s->planes || !s->groups)
		return err_set(KVT_E_NOMEM, "sequence: out of memory");
	for (uint32_t i = 0; i < s->n_layers; i++)
		add_planes(s, i);
	qsort(s->planes, s->n_planes, sizeof(*s->planes), by_offset);
	for (uint32_t i = 0; i < s->n_planes; i++) {
		if (!g || s->planes[i].off >= end) {
			g = &s->groups[s->n_groups++];
			g->first = i;
		}
		g->planes++;
		end = MAX(end, plane_end(&s->planes[i]));
	}
	for (uint32_t i = 0; i < s->n_groups; i++)
		close_group(s, &s->groups[i]);
	return 0;
}

/* ---- memory comes and goes ------------------------------------------------------------ */

static uint32_t longest(const struct kvtier_seq *s, const struct group *g, const uint32_t *count)
{
	uint32_t n = 0;

	for (uint32_t i = g->first; i < g->first + g->planes; i++)
		if (s->planes[i].lane != NO_LANE)
			n = MAX(n, count[s->planes[i].lane]);
	return n;
}

static int commit_plane(struct kvtier_seq *s, const struct plane *p, uint32_t from, uint32_t to)
{
	int r = seg_commit(&s->r->seg, p->off + (uint64_t)from * p->stride,
			   (uint64_t)(to - from - 1) * p->stride + p->bytes);

	return r == -EOPNOTSUPP ? 0 : r; /* an imported file of a kind that takes its memory on use */
}

/* One group's slots [from, to). Records are one range; other groups are committed plane by plane. */
static int commit_group(struct kvtier_seq *s, const struct group *g, uint32_t from, uint32_t to)
{
	struct plane records = {.off = g->base, .stride = g->stride, .bytes = g->span};
	int r = 0;

	if (g->punchable)
		return commit_plane(s, &records, from, to);
	for (uint32_t i = g->first; i < g->first + g->planes && !r; i++)
		if (s->planes[i].lane != NO_LANE)
			r = commit_plane(s, &s->planes[i], from, to);
	return r;
}

int planes_commit(struct kvtier_seq *s, const uint32_t *old, const uint32_t *new_)
{
	int r = 0;
	uint32_t i;

	for (i = 0; i < s->n_groups && !r; i++) {
		uint32_t from = longest(s, &s->groups[i], old), to = longest(s, &s->groups[i], new_);

		if (to > from)
			r = commit_group(s, &s->groups[i], from, to);
	}
	if (!r)
		return 0;
	while (i--) {
		const struct group *g = &s->groups[i];
		uint32_t from = longest(s, g, old), to = longest(s, g, new_);

		if (g->punchable && to > from)
			(void)seg_punch(&s->r->seg, g->base + (uint64_t)from * g->stride,
					(uint64_t)(to - from) * g->stride);
	}
	return err_errno(r, "region: no memory for the rows that come in");
}

uint64_t planes_punch(struct kvtier_seq *s, const uint32_t *old, const uint32_t *new_, const uint32_t *staged)
{
	uint64_t run_from = 0, run_to = 0, before = seg_resident(&s->r->seg), after;

	/* Neighbours that are empty to the end make one range: fewer calls, and no page is cut between them. */
	for (uint32_t i = 0; i < s->n_groups; i++) {
		struct group *g = &s->groups[i];
		uint32_t n = longest(s, g, new_), used = MAX(g->backed, longest(s, g, old));
		uint64_t from = g->base + (n ? (uint64_t)(n - 1) * g->stride + g->span : 0);

		if (!g->punchable || (used <= n && !longest(s, g, staged)))
			continue;
		g->backed = n;
		if (from != run_to) {
			(void)seg_punch(&s->r->seg, run_from, run_to - run_from);
			run_from = from;
		}
		run_to = g->base + ((uint64_t)g->cap + g->stage - 1) * g->stride + g->span;
	}
	(void)seg_punch(&s->r->seg, run_from, run_to - run_from);
	after = seg_resident(&s->r->seg);
	return before > after ? before - after : 0;
}

void planes_touched(struct kvtier_seq *s, const uint32_t *old)
{
	for (uint32_t i = 0; i < s->n_groups; i++)
		s->groups[i].backed = MAX(s->groups[i].backed, longest(s, &s->groups[i], old));
}
