/* SPDX-License-Identifier: MIT */
/* A policy's network, from the daemon into GPU memory. */
#include <string.h>
#include "ipc/cuda/cuda.h"

static int bad(const char *field, uint64_t value, const char *must)
{
	return err_set(KVT_E_VERSION, "scorer: %s: %llu, must be %s", field, (unsigned long long)value, must);
}

int scorer_check(const struct scorer_hdr *h, uint64_t size, uint32_t lanes)
{
	struct scorer_hdr should = *h;

	if (h->magic != SCORER_MAGIC || h->version != SCORER_VERSION)
		return bad("version", h->version, "1, with its magic number");
	if (h->bytes > size || h->bytes < sizeof(*h))
		return bad("bytes", h->bytes, "at most those of the segment");
	if (h->flags & ~(SCORER_UNROTATE | SCORER_ROPE_PAIRS | SCORER_LOG2))
		return bad("flags", h->flags, "known ones");
	if (!h->layers || !h->heads || h->layers > CTL_MAX_LANES || h->heads > CTL_MAX_LANES ||
	    h->layers * h->heads != lanes)
		return bad("lanes", (uint64_t)h->layers * h->heads, "the model's");
	if ((h->k_dim != 64 && h->k_dim != 128) || h->v_dim != h->k_dim)
		return bad("k_dim", h->k_dim, "64 or 128, as v_dim");
	if (h->proj != 128 && h->proj != 256)
		return bad("proj", h->proj, "128 or 256");
	if (h->hidden != 128 && h->hidden != 256)
		return bad("hidden", h->hidden, "128 or 256");
	if (h->pos_pad != SCORER_POS_PAD || h->pos_dim > h->pos_pad)
		return bad("pos_dim", h->pos_dim, "at most 32, padded to 32");
	if (!h->pos_rows || h->pos_rows > WIRE_MAX_ROWS)
		return bad("pos_rows", h->pos_rows, "1..1048576");
	if ((h->flags & SCORER_LOG2) && (!h->octave || h->octave > h->pos_rows))
		return bad("octave", h->octave, "1..pos_rows");
	if (!h->coefs || h->coefs > SCORER_MAX_COEFS)
		return bad("coefs", h->coefs, "1 or 2");
	scorer_lay_out(&should);
	if (should.bytes != h->bytes || should.turn_off != h->turn_off || should.lane_off != h->lane_off ||
	    should.lane_stride != h->lane_stride ||
	    memcmp(should.tensor_off, h->tensor_off, sizeof(should.tensor_off)) ||
	    memcmp(should.tensor_bytes, h->tensor_bytes, sizeof(should.tensor_bytes)))
		return bad("lane_stride", h->lane_stride, "what its dimensions say, all other places too");
	return 0;
}

/* ---- fetching --------------------------------------------------------------------------- */

static int ask(struct kvtier *c, struct kvtier_model *m, const char *policy, struct wire_scorer_reply *reply,
	       struct seg *ret)
{
	struct wire_scorer req;
	struct link *l = NULL;
	int fd = -1, r;
	struct call k = {.req = &req.hdr,
			 .reply = reply,
			 .reply_size = sizeof(*reply),
			 .fds = &fd,
			 .n_fds = 1,
			 .needs = WIRE_F_WINDOW,
			 .ret_link = &l};

	k.deadline_ns = call_deadline(c);
	r = model_ensure(m, k.deadline_ns);
	if (r)
		return r;
	wire_init(&req.hdr, W_SCORER, sizeof(req), 0);
	req.model = m->handle;
	wire_string(req.policy, sizeof(req.policy), policy ? policy : "");
	r = call_run(c, &k);
	if (r)
		return r;
	link_put(c, l);
	reply->policy[sizeof(reply->policy) - 1] = 0;
	r = seg_map(ret, SEG_PUBLISHED, fd, reply->bytes);
	if (r < 0)
		close_fdp(&fd);
	return r < 0 ? err_errno(r, "scorer") : 0;
}

/* The bytes to the GPU, waiting for them: the segment goes afterwards. */
static int upload(struct kvtier_cuda_scorer *s, const struct seg *seg, uint32_t lanes)
{
	const struct cuda_driver *d = s->g->d;
	void *stream = NULL;
	int r = cuda_try(s->g, d->alloc(&s->addr, seg->size), "scorer: cuMemAlloc");

	if (!r)
		r = cuda_try(s->g,
			     d->host_alloc((void **)&s->lane, SCORER_RUNS * lanes * sizeof(*s->lane),
					   CUDA_HOST_MAPPED),
			     "scorer: cuMemHostAlloc");
	if (!r)
		r = cuda_try(s->g, d->host_address(&s->lane_addr, s->lane, 0), "cuMemHostGetDevicePointer");
	for (uint32_t i = 0; i < SCORER_RUNS && !r; i++)
		r = cuda_try(s->g, d->event_create(&s->event[i], CUDA_EVENT_NO_TIMING), "cuEventCreate");
	if (!r)
		r = cuda_try(s->g, d->stream_create(&stream, CUDA_STREAM_NON_BLOCKING), "cuStreamCreate");
	if (!r)
		r = cuda_try(s->g, d->copy_in(s->addr, seg->addr, seg->size, stream), "cuMemcpyHtoDAsync");
	if (stream) {
		int sync = cuda_try(s->g, d->stream_sync(stream), "scorer: cuStreamSynchronize");

		r = r ? r : sync;
		(void)d->stream_destroy(stream);
	}
	return r;
}

int kvtier_cuda_scorer_get(struct kvtier *c, struct kvtier_cuda *g, struct kvtier_model *m, const char *policy,
			   struct kvtier_cuda_scorer **ret)
{
	struct wire_scorer_reply reply;
	struct kvtier_cuda_scorer *s;
	struct seg seg = SEG_INIT;
	int r;

	if (!c || !g || !m || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", !c ? "c" : !g ? "g" : !m ? "m" : "ret");
	if (forked(c))
		return err_forked();
	if (policy && strlen(policy) >= sizeof(s->policy))
		return err_set(KVT_E_INVAL, "policy: %zu bytes, must be at most %zu", strlen(policy),
			       sizeof(s->policy) - 1);
	s = calloc(1, sizeof(*s));
	if (!s)
		return err_set(KVT_E_NOMEM, "scorer: out of memory");
	s->g = g;
	s->lanes = m->lanes;
	r = ask(c, m, policy, &reply, &seg);
	if (!r && seg.size < sizeof(s->h))
		r = bad("bytes", seg.size, "at least 256");
	if (!r) {
		memcpy(&s->h, seg.addr, sizeof(s->h));
		r = scorer_check(&s->h, seg.size, m->lanes);
	}
	if (!r && (s->h.id != reply.id || !reply.id || s->h.coefs != reply.coefs))
		r = bad("id", s->h.id, "as the daemon says, coefficients too");
	if (!r)
		r = cuda_enter(g);
	if (!r) {
		memcpy(s->policy, reply.policy, sizeof(s->policy));
		r = upload(s, &seg, m->lanes);
		cuda_leave(g);
	}
	seg_close(&seg);
	if (r) {
		kvtier_cuda_scorer_put(s);
		return r;
	}
	*ret = s;
	return 0;
}

void kvtier_cuda_scorer_put(struct kvtier_cuda_scorer *s)
{
	if (!s)
		return;
	if ((s->addr || s->lane) && !s->g->d->ctx_push(s->g->ctx)) {
		for (uint32_t i = 0; i < SCORER_RUNS; i++)
			if (s->event[i])
				(void)s->g->d->event_destroy(s->event[i]);
		if (s->lane)
			(void)s->g->d->host_free(s->lane);
		if (s->addr)
			(void)s->g->d->free(s->addr);
		cuda_leave(s->g);
	}
	free(s);
}

uint32_t kvtier_cuda_scorer_coefs(const struct kvtier_cuda_scorer *s)
{
	return s ? s->h.coefs : 0;
}

const char *kvtier_cuda_scorer_policy(const struct kvtier_cuda_scorer *s)
{
	return s ? s->policy : "";
}

/* ---- by hand -------------------------------------------------------------------------------- */

static int run_check(const struct kvtier_cuda_scorer *s, uint32_t lane, uint32_t lanes, uint32_t dtype,
		     uint32_t pos, uint32_t n, uint64_t k, uint64_t v)
{
	if (!lanes || lane >= s->lanes || lanes > s->lanes - lane)
		return err_set(KVT_E_INVAL, "lanes: %u from %u on, must be 1..%u in all", lanes, lane,
			       s->lanes);
	if (dtype != KVT_DTYPE_F16 && dtype != KVT_DTYPE_BF16)
		return err_set(KVT_E_INVAL, "dtype: %u, must be f16 or bf16", dtype);
	if (!n || n > WIRE_MAX_ROWS || pos > WIRE_MAX_ROWS - n)
		return err_set(KVT_E_INVAL, "rows: %u from %u on, must be 1..%u in all", n, pos, WIRE_MAX_ROWS);
	if (!k || !v)
		return err_set(KVT_E_INVAL, "%s: 0, must be an address", k ? "v" : "k");
	return 0;
}

int kvtier_cuda_scorer_run(struct kvtier_cuda_scorer *s, uint32_t lane, uint32_t lanes, uint64_t k, uint64_t v,
			   uint64_t k_head_stride, uint64_t v_head_stride, uint32_t k_row_stride,
			   uint32_t v_row_stride, uint32_t dtype, uint32_t pos, uint32_t n, uint64_t out,
			   uint64_t out_stride, void *stream)
{
	uint32_t slot, bytes;
	struct cuda_lane *l;
	struct score_args a;
	int r;

	if (!s || !out)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", s ? "out" : "s");
	r = run_check(s, lane, lanes, dtype, pos, n, k, v);
	if (r)
		return r;
	if ((k | v | k_head_stride | v_head_stride | k_row_stride | v_row_stride) % 16)
		return err_set(KVT_E_INVAL, "k, v: addresses and strides must be multiples of 16");
	r = cuda_enter(s->g);
	if (r)
		return r;
	slot = s->runs++ % SCORER_RUNS;
	bytes = s->h.k_dim * 2;
	/* Only a caller who is that many calls ahead of the GPU waits here. */
	if (s->runs > SCORER_RUNS)
		r = cuda_try(s->g, s->g->d->event_sync(s->event[slot]), "cuEventSynchronize");
	l = s->lane + (size_t)slot * s->lanes;
	for (uint32_t i = 0; i < lanes; i++)
		l[i] = (struct cuda_lane){
			k + i * k_head_stride, v + i * v_head_stride, k_row_stride, v_row_stride, bytes, bytes};
	a = (struct score_args){.scorer = s->addr,
				.rows = s->lane_addr + (uint64_t)slot * s->lanes * sizeof(*l),
				.out = out,
				.out_lane = out_stride * s->h.coefs,
				.out_coef = out_stride,
				.lane = lane,
				.lanes = lanes,
				.pos = pos,
				.n = n,
				.dtype = dtype,
				.out_pos0 = pos};
	if (!r)
		r = kern_score(s->g, &s->h, &a, stream);
	if (!r)
		r = cuda_try(s->g, s->g->d->event_record(s->event[slot], stream), "cuEventRecord");
	cuda_leave(s->g);
	return r;
}
