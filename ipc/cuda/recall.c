/* SPDX-License-Identifier: MIT */
/* Recall of a sequence: its directory and segments asked for by the connection, its residency, its calls. */
#include <math.h>
#include <string.h>
#include "ipc/cuda/cuda.h"
#include "ipc/cuda/recall.h"

#define MAX_TOKENS 65536u /* of one turn */
#define BEFORE 8u         /* rows that come along with a hit, unless the caller says otherwise */
#define AFTER 24u
#define PROBE 250u

/* ---- from the daemon ------------------------------------------------------------------------------ */

static int ask(struct kvtier_seq *s, struct wire_hdr *req, void *reply, size_t size, const uint64_t *bytes,
	       struct seg *ret)
{
	int fd = -1, r;
	struct call k = {.req = req,
			 .reply = reply,
			 .reply_size = size,
			 .fds = &fd,
			 .n_fds = 1,
			 .needs = WIRE_F_DIRECT,
			 .link = s->link};

	r = call_run(s->c, &k);
	if (r)
		return r;
	r = seg_map(ret, SEG_PUBLISHED, fd, *bytes);
	if (r < 0)
		close_fdp(&fd);
	return r < 0 ? err_errno(r, "published memory") : 0;
}

static int ask_segment(void *arg, uint32_t number, struct seg *ret)
{
	struct kvtier_seq *s = arg;
	struct wire_segment_reply reply;
	struct wire_segment m;

	wire_init(&m.hdr, W_SEGMENT, sizeof(m), 0);
	m.segment = number;
	return ask(s, &m.hdr, &reply, sizeof(reply), &reply.bytes, ret);
}

static int ask_directory(struct kvtier_seq *s, struct seg *ret)
{
	struct wire_direct_reply reply;
	struct wire_handle m;

	wire_init(&m.hdr, W_DIRECT, sizeof(m), 0);
	m.handle = s->handle;
	return ask(s, &m.hdr, &reply, sizeof(reply), &reply.bytes, ret);
}

/* What the sequence sees of published memory; segment numbers are the connection's. */
static int view_of(struct kvtier_seq *s, struct cuda_direct **ret)
{
	struct direct_source src = {.owner = s->link, .arg = s, .map = ask_segment};
	struct cuda_seq *q = s->cu;
	_cleanup_free_ struct cuda_lane *lane = NULL;
	int r = 0;

	if (!(q->flags & KVT_CUDA_DIRECT))
		return err_set(KVT_E_INVAL, "sequence: not opened with KVT_CUDA_DIRECT");
	if (!q->direct) {
		lane = calloc(s->lanes, sizeof(*lane));
		if (!lane)
			return err_set(KVT_E_NOMEM, "directory: out of memory");
		cuda_lanes_fill(s->m, q->layers, lane);
		r = view_new(q->g, &src, lane, s->lanes, &q->direct);
	}
	if (!r)
		*ret = q->direct;
	return r;
}

int cuda_direct_address(struct kvtier_seq *s, uint32_t segment, uint64_t off, uint64_t n, uint64_t *ret)
{
	struct cuda_direct *d;
	int r = view_of(s, &d);

	return r ? r : view_address(d, segment, off, n, ret);
}

/* Nobody else may drain the ring for a runtime that only polls. */
static void hear(struct kvtier_seq *s)
{
	struct kvtier *c = s->c;
	int r = 0;

	pthread_mutex_lock(&c->lock);
	if (!c->leader && c->link == s->link)
		r = events_drain(c, s->link);
	pthread_mutex_unlock(&c->lock);
	if (r < 0)
		link_down(c, s->link, "impossible ring cursor");
}

int cuda_direct_yield(struct kvtier_seq *s, void *stream)
{
	struct cuda_seq *q = s->cu;
	uint32_t asked;
	int r;

	if (!q->direct)
		return 0;
	hear(s);
	asked = atomic_load(&s->link->revokes);
	if (asked == q->revokes && !q->yielding)
		return 0;
	r = cuda_enter(q->g);
	if (r)
		return r;
	q->revokes = asked;
	q->yielded = true;
	view_forget(q->direct);
	q->yielding = view_yield(q->direct, stream);
	cuda_leave(q->g);
	return 0;
}

void cuda_direct_free(struct kvtier_seq *s)
{
	struct cuda_seq *q = s->cu;

	(void)q->g->d->stream_sync(q->stream); /* searches leave no ticket */
	find_end(q->recall);
	view_end(q->direct);
	q->recall = NULL;
	q->direct = NULL;
}

/* ---- prepare -------------------------------------------------------------------------------------- */

/* What is resident, for as long as the sequence is not touched. */
static struct find_resident resident(const struct kvtier_seq *s)
{
	return (struct find_resident){
		.bits = s->resident, .words = s->words, .end = MIN(s->watermark, s->cu->appended)};
}

/* Rises with everything that changes what is resident below the watermark. */
static struct find_version version(const struct kvtier_seq *s)
{
	uint64_t acked = atomic_load_explicit(&s->acked, memory_order_relaxed);

	return (struct find_version){.plan = MAX(s->cu->applied, acked),
				     .epoch = atomic_load_explicit(&s->epoch, memory_order_relaxed),
				     .end = resident(s).end};
}

static int recall_of(struct kvtier_seq *s, const struct cuda_direct *d)
{
	struct cuda_seq *q = s->cu;
	struct find_shape shape = {.lane = d->lane,
				   .lanes = s->lanes,
				   .max_rows = s->max_rows,
				   .slots = q->cap + q->stage,
				   .dtype = s->m->msg->dtype};

	if (shape.dtype == KVT_DTYPE_OPAQUE)
		return err_set(KVT_E_MODEL, "model: opaque rows cannot be searched");
	return q->recall ? 0 : find_new(q->g, &shape, &q->recall);
}

/* The context is current. */
static int prepare(struct kvtier_seq *s, void *stream)
{
	struct find_resident r = resident(s);
	struct cuda_seq *q = s->cu;
	struct seg dir = SEG_INIT;
	struct cuda_direct *d;
	int rc = view_of(s, &d);

	if (!rc && d->dir.fd < 0) {
		rc = ask_directory(s, &dir);
		if (!rc)
			rc = view_take(d, &dir);
		seg_close(&dir);
	}
	if (!rc)
		rc = recall_of(s, d);
	if (!rc)
		rc = find_prepare(q->recall, d, &r, q->lane[q->lane_now], stream);
	if (!rc) {
		q->recall->version = version(s);
		q->yielded = false;
	}
	return rc;
}

int kvtier_cuda_recall_prepare(struct kvtier_seq *s, void *stream)
{
	int r = cuda_gate(s);

	if (!r)
		r = cuda_enter(s->cu->g);
	if (r)
		return r;
	s->cu->stream = stream;
	r = prepare(s, stream);
	cuda_leave(s->cu->g);
	return r;
}

/* ---- one layer --------------------------------------------------------------------------------------- */

static int bad(const char *field, uint64_t value, const char *must)
{
	return err_set(KVT_E_INVAL, "%s: %llu, must be %s", field, (unsigned long long)value, must);
}

/* Defaults, and what depends on the options alone. */
static int take_opts(struct kvtier_cuda_recall_opts *o, uint32_t n_queries)
{
	if (!n_queries || n_queries > MAX_TOKENS)
		return bad("n_queries", n_queries, "1..65536");
	if (!o->group)
		o->group = 1;
	if (!o->probe)
		o->probe = PROBE;
	if (o->group > FIND_MAX_QUERIES || o->group * MIN(n_queries, FIND_TOKENS) > FIND_MAX_QUERIES)
		return bad("group", o->group, "so that 4 tokens of each query head are at most 128");
	if (!o->rows || o->rows > WIRE_MAX_ROWS)
		return bad("rows", o->rows, "1..1048576");
	if (o->probe > 1000)
		return bad("probe", o->probe, "at most 1000");
	if (o->flags & ~(uint32_t)KVT_RECALL_FLAGS)
		return bad("flags", o->flags, "of KVT_RECALL_FLAGS");
	if (!(o->scale >= 0) || !isfinite(o->scale))
		return err_set(KVT_E_INVAL, "scale: %g, must be 0 or positive", (double)o->scale);
	if (o->before > FIND_MAX_NEAR || o->after > FIND_MAX_NEAR)
		return bad(o->before > FIND_MAX_NEAR ? "before" : "after", MAX(o->before, o->after),
			   "at most 1024");
	if (o->flags & KVT_RECALL_ALONE && (o->before || o->after))
		return bad("before, after", MAX(o->before, o->after), "0 with KVT_RECALL_ALONE");
	if (!(o->flags & KVT_RECALL_ALONE) && !o->before && !o->after) {
		o->before = BEFORE;
		o->after = AFTER;
	}
	return 0;
}

/* What depends on the layer's rows. */
static int check_opts(const struct wire_layer *y, uint32_t elem, uint32_t n_queries,
		      struct kvtier_cuda_recall_opts *o)
{
	if (!o->queries || !o->k || (y->v_bytes && !o->v) || !o->counts)
		return bad(!o->queries ? "queries" : !o->k ? "k" : o->counts ? "v" : "counts", 0, "an address");
	if (!o->token_stride && !o->head_stride) {
		o->token_stride = y->k_bytes;
		o->head_stride = (uint64_t)y->k_bytes * n_queries;
	}
	if ((o->queries | o->token_stride | o->head_stride) % elem)
		return bad("queries, strides", o->token_stride, "multiples of an element");
	if ((o->k | o->v | o->k_head_stride | o->v_head_stride | o->k_row_stride | o->v_row_stride) % 16)
		return bad("k, v, strides", o->k_row_stride, "multiples of 16");
	if (o->k_row_stride < y->k_bytes || (y->v_bytes && o->v_row_stride < y->v_bytes))
		return bad("row strides", MIN(o->k_row_stride, o->v_row_stride), "at least a row");
	if ((o->counts | o->positions) % 4)
		return bad("counts, positions", o->counts, "multiples of 4");
	if (y->kv_heads > FIND_MAX_HEADS)
		return bad("layer: KV heads", y->kv_heads, "at most 128 for recall on the GPU");
	return 0;
}

/* The context is current. */
static int search(struct kvtier_seq *s, uint32_t layer, uint32_t n_queries,
		  const struct kvtier_cuda_recall_opts *o, void *stream)
{
	struct cuda_seq *q = s->cu;
	uint32_t first = s->m->first_lane[layer], heads = s->m->msg->layer[layer].kv_heads,
		 held[FIND_MAX_HEADS];
	struct find_version now = version(s);
	struct find_query f = {.first = first,
			       .heads = heads,
			       .group = o->group,
			       .n_queries = n_queries,
			       .rows = o->rows,
			       .probe = o->probe,
			       .before = o->before,
			       .after = o->after,
			       .mass = !(o->flags & KVT_RECALL_LOGITS),
			       .scale = o->scale,
			       .queries = o->queries,
			       .token_stride = o->token_stride,
			       .head_stride = o->head_stride,
			       .k = o->k,
			       .v = o->v,
			       .k_head_stride = o->k_head_stride,
			       .v_head_stride = o->v_head_stride,
			       .k_row_stride = o->k_row_stride,
			       .v_row_stride = o->v_row_stride,
			       .counts = o->counts,
			       .positions = o->positions};
	int r = 0;

	if (memcmp(&now, &q->recall->version, sizeof(now))) { /* a plan was applied since */
		struct find_resident rows = resident(s);

		r = find_mark(q->recall, &rows, stream);
		if (r)
			return r;
		q->recall->version = now;
	}
	for (uint32_t h = 0; h < heads; h++)
		held[h] = cuda_count(s, first + h);
	if (!(o->flags & KVT_RECALL_NO_RESIDENT))
		f.resident = held;
	return find_launch(q->recall, &f, q->lane[q->lane_now], stream);
}

/* Is there something to search in? */
static int ready(struct kvtier_seq *s)
{
	const struct cuda_seq *q = s->cu;

	if (!q->recall || !q->recall->marked)
		return err_set(KVT_E_INVAL, "recall: kvtier_cuda_recall_prepare() must have been called");
	if (q->yielded)
		return err_set(KVT_E_STALE, "recall: published memory was asked back, prepare again");
	return 0;
}

int kvtier_cuda_recall(struct kvtier_seq *s, uint32_t layer, uint32_t n_queries,
		       const struct kvtier_cuda_recall_opts *opts, void *stream)
{
	struct kvtier_cuda_recall_opts o;
	const struct wire_layer *y;
	uint32_t elem;
	int r = cuda_gate(s);

	if (!r)
		r = opts_take(&o, sizeof(o), opts, "opts");
	if (!r && layer >= s->n_layers)
		r = err_set(KVT_E_INVAL, "layer: %u, must be below %u", layer, s->n_layers);
	if (!r)
		r = take_opts(&o, n_queries);
	if (!r)
		r = ready(s);
	if (r)
		return r;
	y = &s->m->msg->layer[layer];
	elem = wire_dtype_bytes(s->m->msg->dtype);
	r = check_opts(y, elem, n_queries, &o);
	if (!r)
		r = cuda_enter(s->cu->g);
	if (r)
		return r;
	s->cu->stream = stream;
	r = search(s, layer, n_queries, &o, stream);
	cuda_leave(s->cu->g);
	return r;
}

int kvtier_cuda_recall_check(struct kvtier_seq *s)
{
	int r = cuda_gate(s);

	if (!r)
		r = ready(s);
	if (r == KVT_E_STALE && s->cu->yielded)
		return KVT_AGAIN;
	return r ? r : view_still(s->cu->direct) ? 0 : KVT_AGAIN;
}
