/* SPDX-License-Identifier: MIT */
/* Recording: sequences. Rows go into blocks that are mapped as they are needed and counted against the buffer.
 */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include "ipc/client/client.h"
#include "ipc/client/trace.h"

#define BLOCK_TARGET (4ull << 20) /* bytes */
#define BLOCK_ROWS 256u           /* at most */

/* One of every every_n sequences, at a random place among them, so that no rhythm of the traffic is caught. */
static bool pick(struct kvtier_trace *t)
{
	uint64_t i = atomic_fetch_add(&t->seen, 1) % t->every_n;

	if (i == 0) {
		t->random = t->random * 6364136223846793005u + 1442695040888963407u;
		t->pick = (uint32_t)((t->random >> 33) % t->every_n);
	}
	return i == t->pick;
}

static int fill_header(struct kvtier_trace_seq *s, const struct kvtier_trace_model *m, const char *source)
{
	struct trace_header *h = &s->h;
	char why[256];
	int r = trace_text(h->model, sizeof(h->model), m->name, "name");

	if (!r)
		r = trace_text(h->source, sizeof(h->source), source ? source : s->t->source, "source");
	if (r)
		return r;
	memcpy(h->domain, s->t->domain, sizeof(h->domain));
	h->layers = m->layers;
	h->heads = m->heads;
	h->group = m->group;
	h->k_dim = m->k_dim;
	h->v_dim = m->v_dim;
	h->dtype = m->dtype;
	h->rope_type = m->rope;
	h->rope_theta = m->rope_theta;
	h->keys = m->post_rope ? TRACE_KEYS_CACHED : TRACE_KEYS_UNROTATED;
	if (trace_check_header(h, why, sizeof(why)) < 0)
		return err_set(KVT_E_INVAL, "model: %s", why);
	return 0;
}

static void lay_out(struct kvtier_trace_seq *s)
{
	const struct trace_header *h = &s->h;
	uint32_t elem = h->dtype == TRACE_F32 ? 4 : 2, rows = BLOCK_ROWS;
	uint64_t row;

	s->k_bytes = h->k_dim * elem;
	s->v_bytes = h->v_dim * elem;
	row = (uint64_t)h->heads * (s->k_bytes + s->v_bytes + (uint64_t)h->group * s->k_bytes);
	while (rows > 1 && row * h->layers * rows > BLOCK_TARGET)
		rows /= 2;
	s->block_rows = rows;
	s->layer_bytes = row * rows;
	s->mem->block_bytes = s->layer_bytes * h->layers;
}

static struct kvtier_trace_seq *seq_make(struct kvtier_trace *t)
{
	struct kvtier_trace_seq *s = calloc(1, sizeof(*s));
	struct trace_mem *m = calloc(1, sizeof(*m));

	if (!s || !m) {
		free(s);
		free(m);
		return NULL;
	}
	s->mem = m;
	s->t = t;
	pthread_mutex_lock(&t->lock);
	t->refs++;
	pthread_mutex_unlock(&t->lock);
	return s;
}

int kvtier_trace_begin(struct kvtier_trace *t, const struct kvtier_trace_model *model, const char *source,
		       struct kvtier_trace_seq **ret)
{
	struct kvtier_trace_model m;
	struct kvtier_trace_seq *s;
	bool wanted;
	int r;

	if (!ret)
		return err_set(KVT_E_INVAL, "ret: NULL, must be given");
	*ret = NULL;
	if (!t)
		return KVT_AGAIN;
	if (t->fork_gen != fork_generation())
		return err_forked();
	r = OPTS_TAKE(&m, model);
	if (r)
		return r;
	pthread_mutex_lock(&t->lock);
	wanted = pick(t);
	pthread_mutex_unlock(&t->lock);
	if (!wanted)
		return KVT_AGAIN;
	atomic_fetch_add(&t->picked, 1);
	s = atomic_load(&t->ended) ? NULL : seq_make(t);
	if (!s) {
		atomic_fetch_add(&t->dropped, 1);
		return KVT_AGAIN;
	}
	r = fill_header(s, &m, source);
	if (r) {
		atomic_fetch_add(&t->dropped, 1);
		trace_seq_free(s);
		return r;
	}
	lay_out(s);
	*ret = s;
	return 0;
}

bool trace_pool_shrink(struct kvtier_trace *t)
{
	struct trace_block *b = t->pool;

	if (!b)
		return false;
	t->pool = b->next;
	t->pooled -= b->bytes;
	munmap(b, b->bytes);
	return true;
}

void trace_mem_free(struct kvtier_trace *t, struct trace_mem *m)
{
	if (!m)
		return;
	pthread_mutex_lock(&t->lock);
	for (uint32_t i = 0; i < m->n_blocks; i++) {
		struct trace_block *b = (void *)m->block[i];

		*b = (struct trace_block){.next = t->pool, .bytes = m->block_bytes};
		t->pool = b;
		t->pooled += b->bytes;
	}
	atomic_fetch_sub(&t->buffered, m->held);
	pthread_mutex_unlock(&t->lock);
	free(m->block);
	free(m->tokens);
	free(m);
}

void trace_seq_free(struct kvtier_trace_seq *s)
{
	struct kvtier_trace *t = s->t;

	trace_mem_free(t, s->mem);
	free(s);
	trace_put(t);
}

/* Its memory is for others at once. */
static int drop(struct kvtier_trace_seq *s)
{
	atomic_fetch_add(&s->t->dropped, 1);
	trace_mem_free(s->t, TAKE_PTR(s->mem));
	return KVT_AGAIN;
}

static bool reserve(struct kvtier_trace_seq *s, uint64_t bytes)
{
	struct kvtier_trace *t = s->t;

	if (atomic_fetch_add(&t->buffered, bytes) + bytes > t->buffer_bytes) {
		atomic_fetch_sub(&t->buffered, bytes);
		return false;
	}
	s->mem->held += bytes;
	return true;
}

/* A block that is reserved: one of the pool's, or new memory, for which blocks of other sizes make room. */
static void *take_block(struct kvtier_trace *t, uint64_t bytes)
{
	struct trace_block **at, *b;
	void *p;

	pthread_mutex_lock(&t->lock);
	for (at = &t->pool; (b = *at) && b->bytes != bytes;)
		at = &b->next;
	if (b) {
		*at = b->next;
		t->pooled -= bytes;
	}
	while (!b && t->pooled + atomic_load(&t->buffered) > t->buffer_bytes && trace_pool_shrink(t))
		;
	pthread_mutex_unlock(&t->lock);
	if (b)
		return b;
	p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return NULL;
	madvise(p, bytes, MADV_HUGEPAGE);
	return p;
}

/* Blocks for rows below `rows`. */
static bool grow(struct kvtier_trace_seq *s, uint32_t rows)
{
	uint32_t need = DIV_UP(rows, s->block_rows);
	struct trace_mem *m = s->mem;

	if (need > m->n_blocks) {
		char **more = realloc(m->block, need * sizeof(*more));

		if (!more)
			return false;
		m->block = more;
	}
	while (m->n_blocks < need) {
		void *p;

		if (!reserve(s, m->block_bytes))
			return false;
		p = take_block(s->t, m->block_bytes);
		if (!p)
			return false;
		m->block[m->n_blocks++] = p;
	}
	return true;
}

char *trace_seq_at(const struct kvtier_trace_seq *s, uint32_t layer, uint32_t kind, uint32_t head, uint32_t row)
{
	uint64_t off = layer * s->layer_bytes, rows = s->block_rows, k = s->k_bytes, v = s->v_bytes;

	if (kind != TRACE_K)
		off += s->h.heads * k * rows;
	if (kind == TRACE_Q)
		off += s->h.heads * v * rows;
	off += (head * rows + row % rows) * (kind == TRACE_V ? v : k);
	return s->mem->block[row / s->block_rows] + off;
}

static void copy_plane(struct kvtier_trace_seq *s, const struct kvtier_trace_span *r, uint32_t kind,
		       const void *src, uint32_t heads, uint64_t head, uint64_t row)
{
	size_t bytes = kind == TRACE_V ? s->v_bytes : s->k_bytes;

	for (uint32_t h = 0; h < heads; h++)
		for (uint32_t i = 0, n; i < r->n; i += n) {
			uint32_t p = r->pos + i;
			const char *from = (const char *)src + h * head + i * row;
			char *to = trace_seq_at(s, r->layer, kind, h, p);

			n = MIN(r->n - i, s->block_rows - p % s->block_rows);
			if (row == bytes) {
				memcpy(to, from, n * bytes);
				continue;
			}
			for (uint32_t j = 0; j < n; j++, to += bytes, from += row)
				memcpy(to, from, bytes);
		}
}

static int check_span(const struct kvtier_trace_seq *s, const struct kvtier_trace_span *r)
{
	if (r->layer >= s->h.layers)
		return err_set(KVT_E_INVAL, "layer: %u, must be below %u", r->layer, s->h.layers);
	if (r->pos != s->len[r->layer])
		return err_set(KVT_E_INVAL, "pos: %u, must be layer %u's length %u", r->pos, r->layer,
			       s->len[r->layer]);
	if (r->n > TRACE_MAX_ROWS - r->pos)
		return err_set(KVT_E_INVAL, "n: %u, must be at most %u after %u rows", r->n,
			       TRACE_MAX_ROWS - r->pos, r->pos);
	if (!r->k || !r->q || (!r->v && s->v_bytes))
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", !r->k ? "k" : !r->q ? "q" : "v");
	return 0;
}

/* May anything more be recorded of it? 0, KVT_AGAIN, or FORKED. */
static int gate(struct kvtier_trace_seq *s)
{
	if (!s || !s->mem)
		return KVT_AGAIN;
	if (s->t->fork_gen != fork_generation())
		return err_forked();
	return atomic_load(&s->t->ended) ? drop(s) : 0;
}

int kvtier_trace_rows(struct kvtier_trace_seq *s, const struct kvtier_trace_span *rows)
{
	struct kvtier_trace_span span;
	int r = gate(s);

	if (r)
		return r;
	r = OPTS_TAKE(&span, rows);
	if (!r)
		r = check_span(s, &span);
	if (r) {
		drop(s);
		return r;
	}
	if (!grow(s, span.pos + span.n))
		return drop(s);
	copy_plane(s, &span, TRACE_K, span.k, s->h.heads, span.k_head, span.k_row);
	if (s->v_bytes)
		copy_plane(s, &span, TRACE_V, span.v, s->h.heads, span.v_head, span.v_row);
	copy_plane(s, &span, TRACE_Q, span.q, s->h.heads * s->h.group, span.q_head, span.q_row);
	s->len[span.layer] += span.n;
	return 0;
}

static bool grow_tokens(struct kvtier_trace_seq *s, uint32_t n)
{
	struct trace_mem *m = s->mem;
	uint32_t room = MAX(n, 2 * m->token_room), *more;

	if (n <= m->token_room)
		return true;
	if (!reserve(s, (room - m->token_room) * sizeof(*more)))
		return false;
	more = realloc(m->tokens, room * sizeof(*more));
	if (!more)
		return false;
	m->tokens = more;
	m->token_room = room;
	return true;
}

int kvtier_trace_tokens(struct kvtier_trace_seq *s, uint32_t pos, const uint32_t *tokens, uint32_t n)
{
	int r = gate(s);

	if (r)
		return r;
	if (pos != s->n_tokens || n > TRACE_MAX_ROWS - pos || !tokens) {
		r = err_set(KVT_E_INVAL, "pos: %u with %u tokens, must be %u and have at most %u", pos, n,
			    s->n_tokens, TRACE_MAX_ROWS - s->n_tokens);
		drop(s);
		return r;
	}
	if (!grow_tokens(s, pos + n))
		return drop(s);
	memcpy(s->mem->tokens + pos, tokens, n * sizeof(*tokens));
	s->n_tokens += n;
	return 0;
}

static int take_cuts(struct kvtier_trace_seq *s, const struct kvtier_trace_cut *cuts, uint32_t n)
{
	char why[256];

	if (n > TRACE_MAX_CUTS || (n && !cuts))
		return err_set(KVT_E_INVAL, "cuts: %u, must be given and at most %u", n, TRACE_MAX_CUTS);
	for (uint32_t i = 0; i < n; i++) {
		if (cuts[i].flags & ~(uint32_t)KVT_CUT_BEFORE)
			return err_set(KVT_E_INVAL, "cut %u: flags: 0x%x, must be 0 or KVT_CUT_BEFORE", i,
				       cuts[i].flags);
		s->cuts[i] = (struct trace_cut){.prompt = cuts[i].prompt,
						.queries = cuts[i].queries,
						.context = cuts[i].context,
						.flags = cuts[i].flags ? TRACE_CUT_BEFORE : 0};
		if (trace_check_cut(&s->h, &s->cuts[i], i, why, sizeof(why)) < 0)
			return err_set(KVT_E_INVAL, "%s", why);
	}
	s->h.cuts = n;
	return 0;
}

int kvtier_trace_end(struct kvtier_trace_seq *s, const struct kvtier_trace_cut *cuts, uint32_t n)
{
	struct kvtier_trace *t;
	int r = gate(s);

	if (r) {
		kvtier_trace_discard(s);
		return r;
	}
	t = s->t;
	s->h.rows = s->len[0];
	for (uint32_t i = 1; i < s->h.layers; i++)
		s->h.rows = MIN(s->h.rows, s->len[i]);
	if (s->h.rows)
		r = take_cuts(s, cuts, n);
	if (r || !s->h.rows) {
		drop(s);
		trace_seq_free(s);
		return r ? r : KVT_AGAIN;
	}
	pthread_mutex_lock(&t->lock);
	if (t->stop) {
		r = KVT_AGAIN;
	} else {
		STAILQ_INSERT_TAIL(&t->queue, s, entry);
		pthread_cond_broadcast(&t->cond);
	}
	pthread_mutex_unlock(&t->lock);
	if (r)
		trace_seq_free(s);
	return r;
}

void kvtier_trace_discard(struct kvtier_trace_seq *s)
{
	if (!s || s->t->fork_gen != fork_generation())
		return;
	if (s->mem)
		drop(s);
	trace_seq_free(s);
}
