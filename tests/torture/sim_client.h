/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Runtimes as the daemon sees them: sockets, rings, slots and regions are real, the library is not in between,
 * so that a client can stop anywhere. What each sequence holds is kept beside it: which rows are in which slot,
 * and which bytes a row must have. A row's bytes follow from the sequence and epoch that it was appended in,
 * from lane and position; so a row that is misplaced, stale or somebody else's is never right by accident.
 */
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include "daemon/internal.h"
#include "ipc/codec.h"
#include "ipc/sock.h"
#include "shm/bits.h"
#include "tests/torture/sim_world.h"

#define MAX_CLIENTS 4u
#define MAX_SEQS 8u
#define MAX_LANES 12u
#define MAX_ROWS 768u
#define ROW_WORDS (MAX_ROWS / 64)
#define MAX_ERAS 128u
#define SLOTS_PER_CLIENT 8u
#define RING 64u

/* What rows appended in one epoch are made of, for as long as anybody may see them. */
struct era {
	uint32_t epoch, start, len; /* rows at its begin, and at most */
	uint64_t salt;
};

enum life { GONE, LIVE, AWAY }; /* AWAY: leased, without a client */

struct mem { /* one region */
	uint64_t handle, bytes;
	uint8_t *at;
};

struct mseq {
	enum life life;
	struct mclient *cl;
	uint32_t tenant;
	bool leased, busy, dropped; /* dropped: by an operator, it may not know yet */
	uint8_t key[16], secret[32];
	uint64_t handle;
	struct seq_slot *slot;
	const void *area;
	size_t area_bytes;
	struct mem mem;
	uint32_t epoch, rows, max_rows, cap, stage;
	uint64_t res[MAX_LANES][ROW_WORDS]; /* as acknowledged */
	uint64_t cur[MAX_LANES][ROW_WORDS]; /* as in the region */
	uint64_t acked, applied, nacked[1];
	uint64_t seen, seen_hash; /* newest plan looked at, and what its tables were */
	uint64_t want, want_since;
	struct era era[MAX_ERAS];
	uint32_t eras;
	uint64_t left_ns; /* when it lost its client */
};

struct mclient {
	bool on;
	uint32_t tenant;
	int sock, to_daemon, from_daemon;
	struct seg ctl, plans;
	struct ring sq, cq;
	uint64_t model;
	uint32_t cookie;
};

struct shape {
	uint32_t layers, heads, lanes, dtype, dim;
	uint32_t k[MAX_LANES], v[MAX_LANES]; /* by layer */
};

struct side { /* the clients' */
	struct core *core;
	struct shape shape;
	struct mclient client[MAX_CLIENTS];
	struct mseq seq[MAX_SEQS];
	uint64_t next_salt, next_key, next_secret;
	uint64_t rows_checked, plans_applied, rows_in;
	void (*step)(void); /* the world goes on while a call waits */
	void (*meanwhile)(void);
};
static struct side side;

/* ---- bytes ---------------------------------------------------------------------------- */

/* The era that the row at pos belongs to while the sequence is in `epoch`. */
static inline const struct era *era_of(const struct mseq *s, uint32_t epoch, uint32_t pos)
{
	for (uint32_t i = s->eras; i-- > 0;)
		if (s->era[i].epoch <= epoch && s->era[i].start <= pos)
			return &s->era[i];
	broken("no era for row %u of epoch %u", pos, epoch);
}

static inline void row_fill(uint8_t *to, uint32_t bytes, uint64_t salt, uint32_t lane, uint32_t pos, bool v)
{
	uint64_t x = mix(salt * 31 + lane) ^ mix((uint64_t)pos * 2 + v);

	for (uint32_t i = 0; i < bytes; i += 8) {
		uint64_t w = mix(x + i);

		memcpy(to + i, &w, MIN(8, bytes - i));
	}
}

static inline uint8_t *row_at(const struct mseq *s, uint32_t lane, uint32_t slot, bool v)
{
	const struct shape *m = &side.shape;
	uint32_t layer = lane / m->heads, head = lane % m->heads, room = s->cap + s->stage;
	uint64_t off = 0;

	for (uint32_t i = 0; i < layer; i++)
		off += (uint64_t)m->heads * room * (m->k[i] + m->v[i]);
	off += v ? (uint64_t)m->heads * room * m->k[layer] : 0;
	return s->mem.at + off + ((uint64_t)head * room + slot) * (v ? m->v[layer] : m->k[layer]);
}

static inline uint64_t planes_bytes(const struct mseq *s)
{
	uint64_t n = 0;

	for (uint32_t i = 0; i < side.shape.layers; i++)
		n += (uint64_t)side.shape.heads * (s->cap + s->stage) * (side.shape.k[i] + side.shape.v[i]);
	return ALIGN_UP(n, 64);
}

static inline float *score_at(const struct mseq *s, uint32_t lane, uint32_t pos)
{
	return (float *)(s->mem.at + planes_bytes(s)) + (uint64_t)lane * s->max_rows + pos;
}

static inline void row_write(const struct mseq *s, uint32_t lane, uint32_t slot, uint32_t pos)
{
	uint32_t layer = lane / side.shape.heads;
	uint64_t salt = era_of(s, s->epoch, pos)->salt;

	row_fill(row_at(s, lane, slot, false), side.shape.k[layer], salt, lane, pos, false);
	row_fill(row_at(s, lane, slot, true), side.shape.v[layer], salt, lane, pos, true);
}

static inline bool row_right(const struct mseq *s, uint32_t lane, uint32_t slot, uint32_t pos)
{
	uint32_t layer = lane / side.shape.heads;
	uint64_t salt = era_of(s, s->epoch, pos)->salt;
	uint8_t want[1024];

	side.rows_checked++;
	row_fill(want, side.shape.k[layer], salt, lane, pos, false);
	if (memcmp(want, row_at(s, lane, slot, false), side.shape.k[layer]) != 0)
		return false;
	row_fill(want, side.shape.v[layer], salt, lane, pos, true);
	return !memcmp(want, row_at(s, lane, slot, true), side.shape.v[layer]);
}

/* Whose row it is instead, for the message. */
static inline void row_wrong(const struct mseq *s, uint32_t lane, uint32_t slot, uint32_t pos,
			     const char *where)
{
	uint32_t layer = lane / side.shape.heads;
	uint8_t want[1024];

	for (unsigned q = 0; q < MAX_SEQS; q++)
		for (uint32_t e = 0; e < side.seq[q].eras; e++)
			for (uint32_t l = 0; l < side.shape.lanes; l++)
				for (uint32_t p = 0; p < MAX_ROWS; p++) {
					row_fill(want, side.shape.k[layer], side.seq[q].era[e].salt, l, p,
						 false);
					if (!memcmp(want, row_at(s, lane, slot, false), side.shape.k[layer]))
						broken("sequence %u lane %u row %u, %s: holds sequence %u "
						       "lane %u row %u of epoch %u, wanted epoch %u",
						       (unsigned)(s - side.seq), lane, pos, where, q, l, p,
						       side.seq[q].era[e].epoch,
						       era_of(s, s->epoch, pos)->epoch);
				}
	broken("sequence %u lane %u row %u, %s: holds nothing known", (unsigned)(s - side.seq), lane, pos,
	       where);
}

static inline void check_row(const struct mseq *s, uint32_t lane, uint32_t slot, uint32_t pos,
			     const char *where)
{
	if (!row_right(s, lane, slot, pos))
		row_wrong(s, lane, slot, pos, where);
}

/* Every row in the region, byte for byte. */
static inline void check_rows(const struct mseq *s, const char *where)
{
	for (uint32_t l = 0; l < side.shape.lanes; l++) {
		uint32_t slot = 0;

		bits_for_each(pos, s->cur[l], s->rows)
			check_row(s, l, slot++, pos, where);
	}
}

/* Slots that hold no row may be written by their owner at any time. */
static inline void scribble(const struct mseq *s, uint32_t lane, uint32_t from, uint32_t to)
{
	uint32_t layer = lane / side.shape.heads;

	for (uint32_t i = from; i < to; i++) {
		memset(row_at(s, lane, i, false), 0xee, side.shape.k[layer]);
		memset(row_at(s, lane, i, true), 0xee, side.shape.v[layer]);
	}
}

/* ---- calls ------------------------------------------------------------------------------- */

union message {
	struct wire_hdr hdr;
	uint8_t raw[4096];
	uint64_t align;
};

static inline void client_off(struct mclient *cl)
{
	if (!cl->on)
		return;
	close_fdp(&cl->sock);
	close_fdp(&cl->to_daemon);
	close_fdp(&cl->from_daemon);
	seg_close(&cl->ctl);
	seg_close(&cl->plans);
	cl->on = false;
}

/*
 * Ask and wait. The status, or KVT_E_DAEMON when the connection ended. fds: [WIRE_MAX_FDS], the caller's, or
 * NULL.
 */
static inline int call(struct mclient *cl, union message *m, union message *ret, int *fds, unsigned *n_fds)
{
	uint64_t end = world.now + UINT64_C(60000000000);
	int mine[WIRE_MAX_FDS];
	unsigned n = 0;
	ssize_t len;

	m->hdr.cookie = ++cl->cookie;
	record("call", (uint64_t)(cl - side.client), m->hdr.type, cl->cookie, 0);
	if (sock_send(cl->sock, m, m->hdr.len, NULL, 0) < 0)
		return KVT_E_DAEMON;
	for (;;) {
		struct wire_reply *r = (struct wire_reply *)ret;
		char err[WIRE_TEXT];

		side.step();
		if (side.meanwhile)
			side.meanwhile();
		len = sock_recv(cl->sock, ret, sizeof(*ret), fds ? fds : mine, n_fds ? n_fds : &n);
		if (len == -EAGAIN) {
			must(world.now < end, "no answer to %s within a minute", wire_type_name(m->hdr.type));
			continue;
		}
		if (len <= 0)
			return KVT_E_DAEMON;
		must(!wire_check(ret, (size_t)len, true, err, sizeof(err)), "reply to %s: %s",
		     wire_type_name(m->hdr.type), err);
		must(r->hdr.cookie == cl->cookie, "reply %u to call %u", r->hdr.cookie, cl->cookie);
		record("reply", (uint64_t)(cl - side.client), r->hdr.type, (uint64_t)(int64_t)r->status, 0);
		if (world.verbose && r->status)
			fprintf(stderr, "             %s\n", r->text);
		return r->status;
	}
}

static inline void hint(const struct mseq *s)
{
	struct ring_entry e = {.type = Q_DIRTY, .handle = s->handle};
	int r = ring_push(&s->cl->sq, &e);

	must(r != -EPROTO, "submit ring: impossible cursor");
	if (r == 1)
		(void)eventfd_write(s->cl->to_daemon, 1);
}

/* The daemon's hints, which say nothing that the tables do not, but for the end of a sequence. */
static inline void seq_stale(struct mseq *s);
static inline void client_listen(struct mclient *cl)
{
	struct mseq *gone[MAX_SEQS];
	unsigned n_gone = 0;
	struct ring_entry e;
	uint64_t drop[8];
	int r;

	while (recv(cl->from_daemon, drop, sizeof(drop), MSG_DONTWAIT) > 0)
		;
	ring_awake(&cl->cq);
	do {
		while ((r = ring_pop(&cl->cq, &e)) == 1) {
			record("hint", e.type, e.handle, e.arg[0], e.arg[1]);
			for (struct mseq *s = side.seq; e.type == Q_GONE && s < side.seq + MAX_SEQS; s++)
				if (s->life == LIVE && s->cl == cl && s->handle == e.handle && !s->busy)
					gone[n_gone++] = s;
		}
		must(r != -EPROTO, "complete ring: impossible cursor");
	} while (!ring_sleep(&cl->cq));
	for (unsigned i = 0; i < n_gone; i++)
		seq_stale(gone[i]);
}

/* ---- coming ------------------------------------------------------------------------------- */

static inline void client_on(struct mclient *cl, uint32_t tenant)
{
	struct sock_peer peer = {.pid = 100 + (pid_t)(cl - side.client), .uid = 1000, .pidfd = -1};
	struct wire_model *mm;
	union message m, r;
	int ends[2], fds[WIRE_MAX_FDS];
	unsigned n = 0;
	int st;

	memset(cl, 0, sizeof(*cl));
	cl->ctl = cl->plans = (struct seg)SEG_INIT;
	cl->tenant = tenant;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) < 0)
		abort();
	cl->sock = ends[0];
	cl->to_daemon = cl->from_daemon = -1;
	cl->on = true;
	must(!client_new(side.core, ends[1], &side.core->tenant[tenant], &peer), "client_new failed");
	wire_init(&m.hdr, W_HELLO, sizeof(struct wire_hello), 0);
	((struct wire_hello *)&m)->features = WIRE_FEATURES;
	((struct wire_hello *)&m)->max_seqs = SLOTS_PER_CLIENT;
	((struct wire_hello *)&m)->ring_entries = RING;
	((struct wire_hello *)&m)->plan_bytes = 256 << 10;
	strcpy(((struct wire_hello *)&m)->name, "sim");
	st = call(cl, &m, &r, fds, &n);
	must(!st && n == 4, "hello: %d, %u descriptors", st, n);
	must(!seg_map(&cl->ctl, SEG_EXCHANGE, fds[0], ((struct wire_hello_reply *)&r)->ctl_bytes), "ctl");
	must(!seg_map(&cl->plans, SEG_PUBLISHED, fds[1], ((struct wire_hello_reply *)&r)->plan_bytes), "plans");
	cl->to_daemon = fds[2];
	cl->from_daemon = fds[3];
	ring_attach(&cl->sq, cl->ctl.addr, RING, true);
	ring_attach(&cl->cq, (char *)cl->ctl.addr + ctl_cq_off(RING), RING, false);
	mm = (struct wire_model *)&m;
	wire_init(&m.hdr, W_MODEL, wire_model_len(side.shape.layers), 0);
	strcpy(mm->name, "sim");
	mm->n_layers = side.shape.layers;
	mm->dtype = side.shape.dtype;
	mm->head_dim = side.shape.dim;
	mm->world = 1;
	for (uint32_t i = 0; i < side.shape.layers; i++)
		mm->layer[i] = (struct wire_layer){
			.kv_heads = side.shape.heads, .k_bytes = side.shape.k[i], .v_bytes = side.shape.v[i]};
	st = call(cl, &m, &r, NULL, NULL);
	must(!st, "model: %s", ((struct wire_reply *)&r)->text);
	cl->model = ((struct wire_model_reply *)&r)->model;
}

static inline int region_get(struct mclient *cl, uint64_t bytes, struct mem *ret)
{
	struct wire_region_reply *a;
	int fds[WIRE_MAX_FDS], st;
	union message m, r;
	unsigned n = 0;

	wire_init(&m.hdr, W_REGION, sizeof(struct wire_region), 0);
	((struct wire_region *)&m)->bytes = bytes;
	st = call(cl, &m, &r, fds, &n);
	if (st)
		return st;
	a = (struct wire_region_reply *)&r;
	must(n == 1, "region: %u descriptors", n);
	ret->handle = a->region;
	ret->bytes = a->bytes;
	ret->at = mmap(NULL, a->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
	must(ret->at != MAP_FAILED, "region: %s", strerror(errno));
	close(fds[0]);
	return 0;
}

static inline void mem_off(struct mem *m)
{
	if (m->at)
		munmap(m->at, m->bytes);
	memset(m, 0, sizeof(*m));
}

static inline void region_put(struct mclient *cl, struct mem *g)
{
	union message m, r;
	int st;

	wire_init(&m.hdr, W_REGION_CLOSE, sizeof(struct wire_handle), 0);
	((struct wire_handle *)&m)->handle = g->handle;
	mem_off(g);
	st = call(cl, &m, &r, NULL, NULL);
	must(!st || st == KVT_E_DAEMON, "region close: %s", ((struct wire_reply *)&r)->text);
}

/* ---- sequences ------------------------------------------------------------------------------ */

static inline void era_add(struct mseq *s, uint32_t epoch, uint32_t start)
{
	must(s->eras < MAX_ERAS, "too many epochs for the test");
	s->era[s->eras++] =
		(struct era){.epoch = epoch, .start = start, .len = start, .salt = ++side.next_salt};
}

static inline void make_budget(struct wire_budget *b, uint32_t *table, const struct mseq *s)
{
	static const char *const policies[] = {"client",  "streaming", "random", "knorm",
					       "keydiff", "lagkv",     ""};
	uint32_t n = side.shape.lanes;

	b->set = 1;
	b->device_rows = one_in(8) ? ROWS_ALL : below(s->cap + 8);
	b->dram_rows = one_in(3) ? ROWS_ALL : one_in(4) ? 0 : below(s->max_rows);
	b->nvme_rows = one_in(2) ? ROWS_ALL : one_in(4) ? 0 : below(s->max_rows);
	b->slack_rows = one_in(2) ? 0 : between(1, 40);
	b->manual = one_in(3);
	b->write_through = one_in(5);
	if (one_in(4)) {
		b->kind = one_in(2) ? KVT_BUDGET_PER_LAYER : KVT_BUDGET_PER_LANE;
		b->table_n = b->kind == KVT_BUDGET_PER_LAYER ? side.shape.layers : n;
		for (uint32_t i = 0; i < b->table_n; i++)
			table[i] = below(s->cap + 8);
	}
	if (one_in(2))
		wire_string(b->policy, sizeof(b->policy), policies[below(ARRAY_SIZE(policies))]);
}

/* op, and for a fork its parent and prefix. The status. */
static inline int seq_open(struct mseq *s, struct mclient *cl, enum wire_open_op op, struct mseq *parent,
			   uint32_t prefix)
{
	struct wire_seq_open_reply *a;
	struct wire_layout *lay;
	struct wire_seq_open *o;
	uint64_t off = 0, scores;
	union message m, r;
	struct mem mem;
	uint32_t table[MAX_LANES] = {0};
	struct wire_budget b = {0};
	int st;

	s->cl = cl;
	s->busy = true;
	if (parent)
		parent->busy = true;
	st = region_get(cl, planes_bytes(s) + (uint64_t)side.shape.lanes * s->max_rows * sizeof(float), &mem);
	if (st) {
		s->busy = false;
		if (parent)
			parent->busy = false;
		return st;
	}
	s->mem = mem;
	if (parent) /* the library has copied the rows before it asks */
		for (uint32_t l = 0; l < side.shape.lanes; l++) {
			uint32_t slot = 0;

			bits_for_each(pos, parent->cur[l], prefix) {
				uint32_t layer = l / side.shape.heads;

				memcpy(row_at(s, l, slot, false), row_at(parent, l, slot, false),
				       side.shape.k[layer]);
				memcpy(row_at(s, l, slot, true), row_at(parent, l, slot, true),
				       side.shape.v[layer]);
				slot++;
			}
		}
	if (!one_in(4))
		make_budget(&b, table, s);
	o = (struct wire_seq_open *)&m;
	wire_init(&m.hdr, W_SEQ_OPEN, wire_seq_open_len(side.shape.layers, b.table_n), 0);
	o->op = op;
	o->lifetime = s->leased ? KVT_LEASED : KVT_EPHEMERAL;
	o->ttl_s = 60;
	o->max_rows = s->max_rows;
	o->granularity = one_in(4) ? below(3) : KVT_GRAN_HEAD;
	o->equal_lanes = one_in(5);
	o->n_layers = side.shape.layers;
	o->prefix = prefix;
	o->model = cl->model;
	o->region = s->mem.handle;
	o->parent = parent ? parent->handle : 0;
	memcpy(o->key, s->key, sizeof(o->key));
	memcpy(o->secret, s->secret, sizeof(o->secret));
	o->budget = b;
	lay = wire_open_layouts(o);
	scores = planes_bytes(s);
	for (uint32_t i = 0; i < side.shape.layers; i++) {
		uint64_t room = s->cap + s->stage, heads = side.shape.heads;

		lay[i] = (struct wire_layout){.k_off = off,
					      .v_off = off + heads * room * side.shape.k[i],
					      .k_head_stride = room * side.shape.k[i],
					      .v_head_stride = room * side.shape.v[i],
					      .score_off = scores + i * heads * s->max_rows * sizeof(float),
					      .score_head_stride = s->max_rows * sizeof(float),
					      .k_row_stride = side.shape.k[i],
					      .v_row_stride = side.shape.v[i],
					      .cap = s->cap,
					      .stage = s->stage};
		off += heads * room * (side.shape.k[i] + side.shape.v[i]);
	}
	memcpy(wire_open_table(o), table, b.table_n * sizeof(*table));
	st = call(cl, &m, &r, NULL, NULL);
	s->busy = false;
	if (parent)
		parent->busy = false;
	if (st) {
		if (st != KVT_E_DAEMON)
			region_put(cl, &s->mem);
		else
			mem_off(&s->mem);
		return st;
	}
	a = (struct wire_seq_open_reply *)&r;
	must(a->slot < SLOTS_PER_CLIENT && a->plan_off + a->plan_bytes <= cl->plans.size, "places");
	s->slot = (struct seq_slot *)((char *)cl->ctl.addr + ctl_slots_off(RING)) + a->slot;
	s->area = (const char *)cl->plans.addr + a->plan_off;
	s->area_bytes = a->plan_bytes;
	s->handle = a->seq;
	memset(s->res, 0, sizeof(s->res));
	memset(s->cur, 0, sizeof(s->cur));
	s->acked = s->applied = s->seen = s->want = 0;
	if (op == W_OP_RESUME) {
		must(a->epoch == s->epoch && a->rows == s->rows,
		     "resumed at epoch %u with %u rows, it had epoch %u and %u", a->epoch, a->rows, s->epoch,
		     s->rows);
	} else if (op == W_OP_FORK) {
		must(a->rows == prefix, "forked %u rows, asked for %u", a->rows, prefix);
		memcpy(s->era, parent->era, sizeof(s->era));
		s->eras = parent->eras;
		era_add(s, a->epoch, prefix);
		for (uint32_t l = 0; l < side.shape.lanes; l++) {
			memcpy(s->cur[l], parent->cur[l], sizeof(s->cur[l]));
			bits_clear_range(s->cur[l], prefix, MAX_ROWS);
			memcpy(s->res[l], s->cur[l], sizeof(s->cur[l]));
		}
	} else {
		must(!a->rows, "opened with %u rows", a->rows);
		s->eras = 0;
		era_add(s, a->epoch, 0);
	}
	s->epoch = a->epoch;
	s->rows = a->rows;
	s->life = LIVE;
	s->tenant = cl->tenant;
	must(atomic_load(&s->slot->len) == seq_len_pack(s->epoch, s->rows) && !atomic_load(&s->slot->acked),
	     "slot after open");
	record("open", (uint64_t)(s - side.seq), op, s->epoch, s->rows);
	return 0;
}

/* It has no client any more. */
static inline void seq_lost(struct mseq *s, bool dropped)
{
	mem_off(&s->mem);
	s->life = s->leased && !dropped ? AWAY : GONE;
	s->cl = NULL;
	s->left_ns = world.now;
	s->applied = s->want = 0;
}

/* A stale answer: the daemon ended it (dropped by an operator). */
static inline void seq_stale(struct mseq *s)
{
	struct mem g = s->mem;
	struct mclient *cl = s->cl;

	s->mem = (struct mem){0};
	seq_lost(s, true);
	region_put(cl, &g);
}

static inline uint32_t most_resident(const struct mseq *s)
{
	uint32_t most = 0;

	for (uint32_t l = 0; l < side.shape.lanes; l++)
		most = MAX(most, bits_rank(s->cur[l], s->rows));
	return most;
}

static inline void seq_append(struct mseq *s, uint32_t n)
{
	n = MIN(n, s->max_rows - s->rows);
	n = MIN(n, s->cap - most_resident(s));
	if (!n)
		return;
	for (uint32_t l = 0; l < side.shape.lanes; l++) {
		uint32_t slot = bits_rank(s->cur[l], s->rows);

		for (uint32_t i = 0; i < n; i++) {
			row_write(s, l, slot + i, s->rows + i);
			*score_at(s, l, s->rows + i) = (float)below(10000) / 100.0f;
		}
		bits_set_range(s->cur[l], s->rows, s->rows + n);
		bits_set_range(s->res[l], s->rows, s->rows + n);
	}
	s->rows += n;
	s->era[s->eras - 1].len = s->rows;
	atomic_store_explicit(&s->slot->len, seq_len_pack(s->epoch, s->rows), memory_order_release);
	record("append", (uint64_t)(s - side.seq), n, s->rows, 0);
	if (!one_in(8)) /* losing one is harmless */
		hint(s);
}
