/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A runtime with a GPU, in C: rows in memory that the daemon never sees, pages written into the out ring with
 * their checksums, records taken out of the in ring, plans applied by filling holes. It speaks the wire itself
 * and checks what shm/window.h promises at every step; what it does wrong it does because a test says so.
 */
#include <assert.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "ipc/codec.h"
#include "ipc/sock.h"
#include "shm/crc.h"
#include "shm/ctl.h"
#include "shm/plan.h"
#include "shm/seg.h"
#include "shm/util.h"

struct wlink {
	int fd, wake, fds[WIRE_MAX_FDS];
	unsigned n_fds;
	struct seg ctl, plans;
	struct ring sq;
	struct seq_slot *slots;
	uint64_t model;
	uint32_t layers, heads, lanes, k_bytes, v_bytes;
	_Alignas(8) uint8_t reply[WIRE_MAX];
};

struct wseq {
	struct wlink *l;
	struct seg region;
	uint64_t region_handle, handle;
	struct window_place win;
	struct wire_layout lay[64];
	struct seq_slot *slot;
	char *area;
	size_t area_bytes;
	uint32_t id, salt, seed, rows, epoch, cap, stage, max_rows, coefs;
	/* the GPU */
	uint8_t *k, *v;                  /* [lanes][cap + stage] */
	uint32_t *pos, *slot_of, *count; /* [lanes][cap + stage], [lanes][max_rows], [lanes] */
	uint32_t *salts;                 /* [max_rows] */
	/* the plan under way */
	uint64_t plan, applied;
	struct plan_view view;
	uint32_t gathered, drained, staged_rows;
	uint64_t in_at;
	uint64_t *came; /* [lanes][words] rows that came in */
	/* mischief, each once: page of the list, or UINT32_MAX */
	uint32_t bad_crc, bad_plan, bad_page, nack_lane;
	bool stop_out, stop_in;
	uint64_t wraps_out, wraps_in, direct, pages_out;
	const char *(*segment)(void *arg, uint32_t number); /* where it is mapped */
	void *segment_arg;
};

#define W_CHECK(x)                                                                                             \
	do {                                                                                                   \
		if (!(x)) {                                                                                    \
			fprintf(stderr, "# %s:%d: %s\n", __FILE__, __LINE__, #x);                              \
			return -1;                                                                             \
		}                                                                                              \
	} while (0)

/* ---- the wire -------------------------------------------------------------------- */

static uint64_t wl_patience_ns = UINT64_C(20000000000);

/* Its status, or -1000: the daemon ended us, or says nothing. The reply is in l->reply. */
static inline int wl_call(struct wlink *l, struct wire_hdr *m)
{
	ssize_t n;

	l->n_fds = 0;
	if (sock_send(l->fd, m, m->len, NULL, 0) < 0 ||
	    sock_wait(l->fd, POLLIN, now_ns() + wl_patience_ns) <= 0)
		return -1000;
	n = sock_recv(l->fd, l->reply, sizeof(l->reply), l->fds, &l->n_fds);
	return n <= 0 ? -1000 : ((struct wire_reply *)l->reply)->status;
}

static inline const char *wl_text(const struct wlink *l)
{
	return ((const struct wire_reply *)l->reply)->text;
}

static inline int wl_connect(struct wlink *l, const char *sock)
{
	struct wire_hello h;
	const struct wire_hello_reply *a = (const void *)l->reply;

	memset(l, 0, sizeof(*l));
	l->ctl = l->plans = (struct seg)SEG_INIT;
	l->fd = sock_connect(sock);
	W_CHECK(l->fd >= 0);
	wire_init(&h.hdr, W_HELLO, sizeof(h), 1);
	h.max_seqs = 4;
	h.ring_entries = 64;
	h.plan_bytes = 8 << 20;
	h.features = WIRE_FEATURES;
	strcpy(h.name, "gpu");
	W_CHECK(wl_call(l, &h.hdr) == 0 && l->n_fds == 4 && a->features & WIRE_F_WINDOW);
	W_CHECK(seg_map(&l->ctl, SEG_EXCHANGE, l->fds[0], a->ctl_bytes) == 0);
	W_CHECK(seg_map(&l->plans, SEG_PUBLISHED, l->fds[1], a->plan_bytes) == 0);
	close(l->fds[3]);
	l->wake = l->fds[2];
	l->slots = (struct seq_slot *)((char *)l->ctl.addr + ctl_slots_off(64));
	return ring_attach(&l->sq, l->ctl.addr, 64, true);
}

static inline int wl_model(struct wlink *l, const char *name, uint32_t dtype, uint32_t dim, uint32_t layers,
			   uint32_t heads, uint32_t k, uint32_t v)
{
	union {
		struct wire_model m;
		uint8_t b[4096];
	} u;

	wire_init(&u.m.hdr, W_MODEL, wire_model_len(layers), 2);
	strcpy(u.m.name, name);
	u.m.n_layers = layers;
	u.m.world = 1;
	u.m.dtype = dtype;
	u.m.head_dim = dim;
	for (uint32_t i = 0; i < layers; i++)
		u.m.layer[i] = (struct wire_layer){.kv_heads = heads, .k_bytes = k, .v_bytes = v};
	W_CHECK(wl_call(l, &u.m.hdr) == 0);
	l->model = ((struct wire_model_reply *)l->reply)->model;
	l->layers = layers;
	l->heads = heads;
	l->lanes = layers * heads;
	l->k_bytes = k;
	l->v_bytes = v;
	return 0;
}

static inline void wl_close(struct wlink *l)
{
	close(l->fd);
	close(l->wake);
	seg_close(&l->ctl);
	seg_close(&l->plans);
}

static inline void wq_poke(struct wseq *q)
{
	struct ring_entry e = {.type = Q_DIRTY, .handle = q->handle};
	uint64_t one = 1;

	if (ring_push(&q->l->sq, &e) == 1 && write(q->l->wake, &one, sizeof(one)) < 0)
		abort();
}

/* ---- rows ------------------------------------------------------------------------ */

static inline uint8_t wq_byte(const struct wseq *q, uint32_t lane, uint32_t pos, uint32_t i)
{
	uint64_t x = q->id * 0x9e3779b97f4a7c15u + lane * 0xbf58476d1ce4e5b9u + pos * 0x94d049bb133111ebu +
		     q->salts[pos] * 0xd6e8feb86659fd93u + i / 8 * 0xff51afd7ed558ccdu;

	x ^= x >> 29;
	x *= 0xbf58476d1ce4e5b9u;
	x ^= x >> 32;
	return (uint8_t)(x >> (i % 8 * 8));
}

static inline uint8_t *wq_k(const struct wseq *q, uint32_t lane, uint32_t slot)
{
	return q->k + ((size_t)lane * (q->cap + q->stage) + slot) * q->l->k_bytes;
}
static inline uint8_t *wq_v(const struct wseq *q, uint32_t lane, uint32_t slot)
{
	return q->v + ((size_t)lane * (q->cap + q->stage) + slot) * q->l->v_bytes;
}
static inline uint32_t *wq_pos(const struct wseq *q, uint32_t lane, uint32_t slot)
{
	return q->pos + (size_t)lane * (q->cap + q->stage) + slot;
}
static inline uint32_t *wq_slot(const struct wseq *q, uint32_t lane, uint32_t pos)
{
	return q->slot_of + (size_t)lane * q->max_rows + pos;
}
static inline float *wq_score(const struct wseq *q, uint32_t lane, uint32_t coef, uint32_t pos)
{
	const struct wire_layout *y = &q->lay[lane / q->l->heads];

	return (float *)((char *)q->region.addr + y->score_off + lane % q->l->heads * y->score_head_stride) +
	       (size_t)coef * q->max_rows + pos;
}
static inline uint32_t wq_random(struct wseq *q)
{
	q->seed = q->seed * 1664525u + 1013904223u;
	return q->seed >> 8;
}

/* Rows that are not what was written, over all lanes. */
static inline uint32_t wq_wrong(const struct wseq *q)
{
	uint32_t bad = 0;

	for (uint32_t l = 0; l < q->l->lanes; l++)
		for (uint32_t s = 0; s < q->count[l]; s++) {
			uint32_t pos = *wq_pos(q, l, s), i = 0;

			while (i < q->l->k_bytes && wq_k(q, l, s)[i] == wq_byte(q, l, pos, i))
				i++;
			while (i >= q->l->k_bytes && i < q->l->k_bytes + q->l->v_bytes &&
			       wq_v(q, l, s)[i - q->l->k_bytes] == wq_byte(q, l, pos, i))
				i++;
			bad += i < q->l->k_bytes + q->l->v_bytes;
		}
	return bad;
}

/* New rows in all lanes, with scores; NULL: random ones. */
static inline int wq_append(struct wseq *q, uint32_t n)
{
	for (uint32_t l = 0; l < q->l->lanes; l++) {
		W_CHECK(q->count[l] + n <= q->cap);
		for (uint32_t i = 0; i < n; i++) {
			uint32_t pos = q->rows + i, s = q->count[l]++;

			q->salts[pos] = q->salt;
			for (uint32_t b = 0; b < q->l->k_bytes; b++)
				wq_k(q, l, s)[b] = wq_byte(q, l, pos, b);
			for (uint32_t b = 0; b < q->l->v_bytes; b++)
				wq_v(q, l, s)[b] = wq_byte(q, l, pos, q->l->k_bytes + b);
			*wq_pos(q, l, s) = pos;
			*wq_slot(q, l, pos) = s;
			for (uint32_t c = 0; c < q->coefs; c++)
				*wq_score(q, l, c, pos) = (float)(wq_random(q) % 10000) / 1000.0f - 5.0f;
		}
	}
	q->rows += n;
	atomic_store_explicit(&q->slot->len, seq_len_pack(q->epoch, q->rows), memory_order_release);
	wq_poke(q);
	return 0;
}

/* ---- opening --------------------------------------------------------------------- */

static inline int wq_make(struct wseq *q, struct wlink *l, uint32_t id, uint32_t cap, uint32_t stage,
			  uint32_t max_rows, uint64_t out, uint64_t in, uint32_t coefs)
{
	uint64_t plane = (uint64_t)max_rows * coefs * sizeof(float), off = 4096 + out + in;
	size_t slots = (size_t)l->lanes * (cap + stage);
	struct wire_region g;

	memset(q, 0, sizeof(*q));
	q->l = l;
	q->id = id;
	q->seed = id * 77 + 1;
	q->cap = cap;
	q->stage = stage;
	q->max_rows = max_rows;
	q->coefs = coefs;
	q->bad_crc = q->bad_plan = q->bad_page = q->nack_lane = UINT32_MAX;
	q->win = (struct window_place){.out_off = 4096, .out_bytes = out, .in_off = 4096 + out, .in_bytes = in};
	for (uint32_t i = 0; i < l->layers; i++) {
		q->lay[i] = (struct wire_layout){.cap = cap, .stage = stage};
		if (coefs) {
			q->lay[i].score_off = off;
			q->lay[i].score_head_stride = plane;
			off += l->heads * plane;
		}
	}
	q->k = malloc(slots * l->k_bytes);
	q->v = malloc(slots * l->v_bytes + 1);
	q->pos = calloc(slots, sizeof(uint32_t));
	q->slot_of = calloc((size_t)l->lanes * max_rows, sizeof(uint32_t));
	q->count = calloc(l->lanes, sizeof(uint32_t));
	q->salts = calloc(max_rows, sizeof(uint32_t));
	q->came = calloc((size_t)l->lanes * BITS_WORDS(max_rows), sizeof(uint64_t));
	q->region = (struct seg)SEG_INIT;
	wire_init(&g.hdr, W_REGION, sizeof(g), 3);
	g.bytes = off;
	W_CHECK(wl_call(l, &g.hdr) == 0 && l->n_fds == 1);
	q->region_handle = ((struct wire_region_reply *)l->reply)->region;
	return seg_map(&q->region, SEG_EXCHANGE, l->fds[0], ((struct wire_region_reply *)l->reply)->bytes);
}

union wopen {
	struct wire_seq_open o;
	_Alignas(8) uint8_t b[8192];
};

static inline void wq_message(struct wseq *q, union wopen *u, uint32_t op, const struct wire_budget *b)
{
	wire_init(&u->o.hdr, W_SEQ_OPEN, wire_seq_open_len(q->l->layers, 0), 4);
	u->o.op = op;
	u->o.flags = W_OPEN_WINDOW;
	u->o.window = q->win;
	u->o.max_rows = q->max_rows;
	u->o.n_layers = q->l->layers;
	u->o.model = q->l->model;
	u->o.region = q->region_handle;
	memcpy(u->o.key, &q->id, sizeof(q->id));
	u->o.key[15] = 1;
	memset(u->o.secret, 0x5a, sizeof(u->o.secret));
	u->o.budget = *b;
	memcpy(wire_open_layouts(&u->o), q->lay, q->l->layers * sizeof(q->lay[0]));
}

static inline int wq_send(struct wseq *q, union wopen *u)
{
	const struct wire_seq_open_reply *a = (const void *)q->l->reply;
	int r = wl_call(q->l, &u->o.hdr);

	if (r)
		return r;
	q->handle = a->seq;
	q->slot = &q->l->slots[a->slot];
	q->area = (char *)q->l->plans.addr + a->plan_off;
	q->area_bytes = a->plan_bytes;
	q->epoch = a->epoch;
	q->rows = a->rows;
	q->plan = q->applied = 0;
	return 0;
}

static inline int wq_open(struct wseq *q, uint32_t op, uint32_t lifetime, uint64_t scorer, uint32_t flags,
			  const struct wire_budget *b)
{
	union wopen u;

	wq_message(q, &u, op, b);
	u.o.lifetime = lifetime;
	u.o.ttl_s = 60;
	u.o.scorer = scorer;
	u.o.flags |= flags;
	return wq_send(q, &u);
}

static inline void wq_free(struct wseq *q)
{
	seg_close(&q->region);
	free(q->k);
	free(q->v);
	free(q->pos);
	free(q->slot_of);
	free(q->count);
	free(q->salts);
	free(q->came);
}
