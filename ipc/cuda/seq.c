/* SPDX-License-Identifier: MIT */
/* Opening, resuming and ending sequences whose rows are in GPU memory. */
#include <stdio.h>
#include <string.h>
#include "ipc/cuda/cuda.h"

#define RING_DEFAULT (UINT64_C(32) << 20)
#define PAGE_ROWS 128u

struct cuda_seq *cuda_seq_of(struct kvtier_seq *s)
{
	if (!s || forked(s->c)) {
		(void)(s ? err_forked() : err_set(KVT_E_INVAL, "s: NULL, must be a sequence"));
		return NULL;
	}
	if (!s->cu)
		err_set(KVT_E_INVAL,
			"sequence: its rows are in a region, must be opened by kvtier_cuda_seq_open()");
	return s->cu;
}

/* ---- before the daemon is asked ------------------------------------------------------------- */

static int check_layer(const struct kvtier_model *m, const struct kvtier_cuda_layer *l, uint32_t i)
{
	const struct wire_layer *d = &m->msg->layer[i];

	if ((d->k_bytes | d->v_bytes) % 16)
		return err_set(KVT_E_INVAL, "layer %u: rows of %u and %u bytes, must be multiples of 16", i,
			       d->k_bytes, d->v_bytes);
	if (!l->k || (d->v_bytes && !l->v))
		return err_set(KVT_E_INVAL, "layers[%u].%s: 0, must be an address", i, l->k ? "v" : "k");
	if ((l->k | l->v | l->k_head_stride | l->v_head_stride | l->k_row_stride | l->v_row_stride) % 16)
		return err_set(KVT_E_INVAL, "layers[%u]: addresses and strides must be multiples of 16", i);
	if (l->k_row_stride < d->k_bytes || (d->v_bytes && l->v_row_stride < d->v_bytes))
		return err_set(KVT_E_INVAL, "layers[%u]: row strides %u, %u, must be at least %u, %u", i,
			       l->k_row_stride, l->v_row_stride, d->k_bytes, d->v_bytes);
	return 0;
}

int cuda_layers_check(const struct kvtier_model *m, const struct kvtier_cuda_layer *l)
{
	int r = 0;

	for (uint32_t i = 0; i < m->msg->n_layers && !r; i++)
		r = check_layer(m, &l[i], i);
	return r;
}

static int check_scorer(const struct kvtier_model *m, const struct kvtier_cuda_scorer *s)
{
	if (s->lanes != m->lanes)
		return err_set(KVT_E_MODEL, "scorer: of %u lanes, the model has %u", s->lanes, m->lanes);
	if (m->msg->dtype != KVT_DTYPE_F16 && m->msg->dtype != KVT_DTYPE_BF16)
		return err_set(KVT_E_MODEL, "scorer: the model's dtype %u, must be f16 or bf16", m->msg->dtype);
	for (uint32_t i = 0; i < m->msg->n_layers; i++) {
		const struct wire_layer *d = &m->msg->layer[i];

		if (d->k_bytes != 2 * s->h.k_dim || d->v_bytes != d->k_bytes)
			return err_set(KVT_E_MODEL, "scorer: for rows of %u bytes, layer %u has %u and %u",
				       2 * s->h.k_dim, i, d->k_bytes, d->v_bytes);
	}
	return 0;
}

static int check_opts(const struct kvtier *c, const struct kvtier_model *m, const struct kvtier_seq_opts *o,
		      const struct kvtier_cuda_seq_opts *g)
{
	if (!g->window || !g->layers)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", g->window ? "layers" : "window");
	if (o->region || o->layouts)
		return err_set(KVT_E_INVAL, "%s: must be NULL, the rows are in GPU memory",
			       o->region ? "region" : "layouts");
	if (g->window->r->c != c || m->c != c)
		return err_set(KVT_E_INVAL, "%s: belongs to another connection",
			       m->c != c ? "model" : "window");
	if (g->scorer && g->scorer->g != g->window->g)
		return err_set(KVT_E_INVAL, "scorer: on another GPU than the window");
	if (!g->cap || g->cap > WIRE_MAX_ROWS || g->stage > WIRE_MAX_ROWS)
		return err_set(KVT_E_INVAL, "cap: %u, stage: %u, must be 1..%u, 0..%u", g->cap, g->stage,
			       WIRE_MAX_ROWS, WIRE_MAX_ROWS);
	if (g->out_bytes > WIRE_MAX_REGION || g->in_bytes > WIRE_MAX_REGION)
		return err_set(KVT_E_INVAL, "out_bytes, in_bytes: must be at most %llu",
			       (unsigned long long)WIRE_MAX_REGION);
	if (g->flags & ~KVT_CUDA_DIRECT)
		return err_set(KVT_E_INVAL, "flags: %#x, must be 0 or KVT_CUDA_DIRECT", g->flags);
	return 0;
}

/* Bytes of the longest page that may have to go through a ring, with what is before it. */
static uint64_t longest_page(const struct kvtier_model *m)
{
	uint32_t row = 0;

	for (uint32_t i = 0; i < m->msg->n_layers; i++)
		row = MAX(row, m->msg->layer[i].k_bytes + m->msg->layer[i].v_bytes);
	return window_in_bytes((uint64_t)PAGE_ROWS * row);
}

static int take_place(struct cuda_seq *q, const struct kvtier_model *m, const struct kvtier_cuda_seq_opts *g,
		      uint32_t max_rows)
{
	uint64_t least = longest_page(m), scores = 0;
	int r;

	/* The daemon wants two records in the one: then one fits wherever the last one ended. */
	q->ring.out_bytes = ALIGN_UP(MAX(g->out_bytes ? g->out_bytes : RING_DEFAULT, least), KVT_UNIT);
	q->ring.in_bytes = ALIGN_UP(MAX(g->in_bytes ? g->in_bytes : RING_DEFAULT, 2 * least), KVT_UNIT);
	if (q->scorer)
		scores = (uint64_t)m->lanes * q->scorer->h.coefs * max_rows * sizeof(float);
	r = extent_take(q->w, q->ring.out_bytes + q->ring.in_bytes + scores, &q->place);
	if (r)
		return r;
	q->ring.out_off = q->place->off;
	q->ring.in_off = q->ring.out_off + q->ring.out_bytes;
	q->score_off = scores ? q->ring.in_off + q->ring.in_bytes : 0;
	return 0;
}

/* ---- ending ---------------------------------------------------------------------------------------- */

/* Everything, of a sequence or of one that never came to be. The GPU is at rest. */
static void cuda_part_free(struct cuda_seq *q, bool driver)
{
	if (driver && !q->g->d->ctx_push(q->g->ctx)) {
		cuda_memory_free(q);
		cuda_leave(q->g);
	}
	extent_give(q->w, q->place);
	free(q->layers);
	free(q->table);
	free(q);
}

void cuda_seq_free(struct kvtier_seq *s)
{
	struct cuda_seq *q = s->cu;
	bool driver = !forked(s->c);

	if (!q)
		return;
	/* What is in flight must not write into what others have next. A lost GPU does nothing any more. */
	if (driver && !q->g->d->ctx_push(q->g->ctx)) {
		if (q->issued)
			(void)q->g->d->stream_sync(q->stream);
		if (q->direct)
			cuda_direct_free(s);
		cuda_leave(q->g);
	}
	s->cu = NULL;
	cuda_part_free(q, driver);
}

void cuda_seq_leak_place(struct kvtier_seq *s)
{
	if (s->cu)
		s->cu->place = NULL;
}

/* ---- opening --------------------------------------------------------------------------------------- */

void cuda_seq_wire(const struct kvtier_seq *s, struct wire_seq_open *m)
{
	const struct cuda_seq *q = s->cu;

	m->flags = W_OPEN_WINDOW | (q->flags & KVT_CUDA_DIRECT ? W_OPEN_DIRECT : 0);
	m->window = q->ring;
	m->scorer = q->scorer ? q->scorer->h.id : 0;
}

void cuda_seq_budget(struct kvtier_seq *s, const struct wire_budget *b, const uint32_t *table)
{
	if (!b->set)
		return;
	s->cu->budget = *b;
	if (b->table_n && s->cu->table)
		memcpy(s->cu->table, table, b->table_n * sizeof(*table));
}

static int cuda_part_new(const struct kvtier_model *m, const struct kvtier_cuda_seq_opts *g, uint32_t max_rows,
			 struct cuda_seq **ret)
{
	struct cuda_seq *q = calloc(1, sizeof(*q));
	int r = 0;

	if (!q)
		return err_set(KVT_E_NOMEM, "sequence: out of memory");
	q->g = g->window->g;
	q->w = g->window;
	q->scorer = g->scorer;
	q->cap = g->cap;
	q->stage = g->stage;
	q->flags = g->flags;
	q->layers = calloc(m->msg->n_layers, sizeof(*q->layers));
	q->table = calloc(m->lanes, sizeof(*q->table));
	if (!q->layers || !q->table)
		r = err_set(KVT_E_NOMEM, "sequence: out of memory");
	if (!r) {
		memcpy(q->layers, g->layers, m->msg->n_layers * sizeof(*q->layers));
		r = take_place(q, m, g, max_rows);
	}
	if (!r)
		r = cuda_enter(q->g);
	if (!r) {
		r = cuda_memory_make(q, m, max_rows);
		cuda_leave(q->g);
	}
	if (r) {
		cuda_part_free(q, true);
		return r;
	}
	*ret = q;
	return 0;
}

/* What the daemon hears of the layers: room, and where scores are. */
static void lay_out(const struct kvtier_model *m, const struct cuda_seq *q, uint32_t max_rows,
		    struct kvtier_layout *ret)
{
	uint64_t stride = q->scorer ? (uint64_t)q->scorer->h.coefs * max_rows * sizeof(float) : 0;

	for (uint32_t i = 0; i < m->msg->n_layers; i++)
		ret[i] = (struct kvtier_layout){
			.cap = q->cap,
			.stage = q->stage,
			.score_off = q->score_off ? q->score_off + m->first_lane[i] * stride : 0,
			.score_head_stride = stride};
}

static int open_cuda(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *opts,
		     const struct kvtier_cuda_seq_opts *cuda_opts, enum wire_open_op op,
		     struct kvtier_seq **ret)
{
	struct kvtier_layout layouts[WIRE_MAX_LAYERS];
	struct kvtier_cuda_seq_opts g;
	struct kvtier_seq_opts o;
	struct cuda_seq *q = NULL;
	struct kvtier_seq *s;
	int r;

	if (!c || !m || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", !c ? "c" : !m ? "m" : "ret");
	if (forked(c))
		return err_forked();
	r = opts_take(&o, sizeof(o), opts, "opts");
	if (!r)
		r = opts_take(&g, sizeof(g), cuda_opts, "cuda opts");
	if (!r)
		r = check_opts(c, m, &o, &g);
	if (!r && (!o.max_rows || o.max_rows > WIRE_MAX_ROWS))
		r = err_set(KVT_E_INVAL, "max_rows: %u, must be 1..%u", o.max_rows, WIRE_MAX_ROWS);
	if (!r)
		r = cuda_layers_check(m, g.layers);
	if (!r && g.scorer)
		r = check_scorer(m, g.scorer);
	if (!r)
		r = cuda_part_new(m, &g, o.max_rows, &q);
	if (r)
		return r;
	lay_out(m, q, o.max_rows, layouts);
	o.region = g.window->r;
	o.layouts = layouts;
	r = seq_new(c, m, &o, q, &s);
	if (r) {
		cuda_part_free(q, true);
		return r;
	}
	r = seq_ask(s, &o, op, NULL, 0);
	if (r) {
		seq_discard(s);
		return r;
	}
	q->appended = q->pushed = q->extended = q->scored = s->rows;
	r = cuda_tables_make(s);
	if (r) {
		char line[256];

		snprintf(line, sizeof(line), "%s", kvtier_last_error());
		(void)seq_over(s, op == W_OP_OPEN);
		return err_set(r, "%s", line);
	}
	*ret = s;
	return 0;
}

int kvtier_cuda_seq_open(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *o,
			 const struct kvtier_cuda_seq_opts *g, struct kvtier_seq **ret)
{
	return open_cuda(c, m, o, g, W_OP_OPEN, ret);
}

int kvtier_cuda_seq_resume(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *o,
			   const struct kvtier_cuda_seq_opts *g, struct kvtier_seq **ret, uint32_t *ret_rows)
{
	int r = open_cuda(c, m, o, g, W_OP_RESUME, ret);

	if (!r && ret_rows)
		*ret_rows = kvtier_seq_rows(*ret);
	return r;
}
