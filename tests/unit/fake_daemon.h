/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A daemon in a thread of the test: it answers every message with real segments,
 * rings and plan areas and decides nothing. Tests publish plans, look into its
 * side of the memory and make it misbehave. One client at a time.
 */
#include <assert.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>
#include "ipc/codec.h"
#include "ipc/sock.h"
#include "shm/bits.h"
#include "shm/ctl.h"
#include "shm/plan.h"
#include "shm/ring.h"
#include "shm/seg.h"
#include "shm/util.h"

#define FAKE_SEQS 16
#define FAKE_REGIONS 16
#define FAKE_AREA (UINT64_C(1) << 20) /* plan area of each sequence */

struct fake_seq {
	uint64_t handle; /* 0: free */
	uint32_t slot, lanes, epoch, rows;
	uint64_t plan_id;
	void *area;
};

struct fake {
	char dir[64], path[108];
	int listener, stop;
	pthread_t thread;
	bool running;

	/* what to do with the next message of this type; 0: behave */
	_Atomic int refuse_type, refuse_status; /* answer with a status */
	_Atomic int mute_type;                  /* answer nothing, keep the reply for fake_release() */
	_Atomic int hangup_type;                /* close the connection */
	_Atomic int garble_type;                /* answer with bytes that are no message */
	_Atomic int stray_type;                 /* two fds more than agreed */

	_Atomic uint32_t lacks; /* enum wire_feature that it does not know */

	_Atomic uint64_t imported; /* inode of the last file that came in */
	_Atomic int hellos, models, regions, opens, region_closes, seq_closes, drops, truncates, calls;
	_Atomic uint64_t dirty; /* Q_DIRTY hints seen */

	pthread_mutex_t lock; /* the rest */
	int sock, in, out;    /* in: eventfd that the client writes */
	struct seg ctl, plans;
	struct ring sq, cq;
	uint32_t entries, max_seqs, lanes;
	struct fake_seq seq[FAKE_SEQS];
	struct seg region[FAKE_REGIONS];
	uint32_t n_regions;
	uint64_t next_handle;
	struct wire_seq_open last_open;
	struct wire_plan_request last_request;
	char kept[4096]; /* the muted reply */
	size_t kept_len;
};

static inline void fake_hangup(struct fake *f)
{
	close_fdp(&f->sock);
	close_fdp(&f->in);
	close_fdp(&f->out);
	f->sock = f->in = f->out = -1;
	seg_close(&f->ctl);
	seg_close(&f->plans);
	for (uint32_t i = 0; i < f->n_regions; i++)
		seg_close(&f->region[i]);
	f->n_regions = 0;
	memset(f->seq, 0, sizeof(f->seq));
}

static inline void fake_send(struct fake *f, const void *msg, size_t len, const int *fds, unsigned n)
{
	const struct wire_hdr *h = msg;
	int type = h->type & ~W_REPLY;

	if (atomic_load(&f->mute_type) == type) {
		memcpy(f->kept, msg, len);
		f->kept_len = len;
		atomic_store(&f->mute_type, 0);
		return;
	}
	if (atomic_load(&f->garble_type) == type) {
		static const char junk[64] = "this is no message";

		atomic_store(&f->garble_type, 0);
		sock_send(f->sock, junk, sizeof(junk), NULL, 0);
		return;
	}
	if (atomic_load(&f->stray_type) == type) {
		int two[2] = {f->stop, f->stop};

		atomic_store(&f->stray_type, 0);
		sock_send(f->sock, msg, len, two, 2);
		return;
	}
	sock_send(f->sock, msg, len, fds, n);
}

static inline void fake_hello(struct fake *f, const struct wire_hello *m)
{
	struct wire_hello_reply r;
	int fds[4];

	f->max_seqs = m->max_seqs;
	f->entries = m->ring_entries;
	assert(!seg_create(&f->ctl, SEG_EXCHANGE, "fake-ctl", ctl_bytes(f->entries, f->max_seqs), 0));
	assert(!seg_create(&f->plans, SEG_PUBLISHED, "fake-plans", FAKE_SEQS * FAKE_AREA, 0));
	assert(!ring_attach(&f->sq, f->ctl.addr, f->entries, false));
	assert(!ring_attach(&f->cq, (char *)f->ctl.addr + ctl_cq_off(f->entries), f->entries, true));
	f->in = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	f->out = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	wire_reply_init(&r.r, &m->hdr, sizeof(r), 0, NULL);
	r.features = m->features & WIRE_FEATURES & ~atomic_load(&f->lacks);
	r.client = 1;
	r.max_seqs = f->max_seqs;
	r.ring_entries = f->entries;
	r.ctl_bytes = f->ctl.size;
	r.plan_bytes = f->plans.size;
	wire_string(r.version, sizeof(r.version), "fake");
	fds[0] = f->ctl.fd;
	fds[1] = f->plans.fd;
	fds[2] = f->in;
	fds[3] = f->out;
	ring_sleep(&f->sq);
	atomic_fetch_add(&f->hellos, 1);
	fake_send(f, &r, sizeof(r), fds, 4);
}

static inline void fake_model(struct fake *f, const struct wire_model *m)
{
	struct wire_model_reply r;

	f->lanes = wire_model_lanes(m);
	wire_reply_init(&r.r, &m->hdr, sizeof(r), 0, NULL);
	r.model = 0x100 + (uint64_t)atomic_fetch_add(&f->models, 1);
	r.lanes = f->lanes;
	fake_send(f, &r, sizeof(r), NULL, 0);
}

static inline void fake_region(struct fake *f, const struct wire_region *m)
{
	struct wire_region_reply r;
	struct seg *s = &f->region[f->n_regions++];

	assert(f->n_regions <= FAKE_REGIONS);
	assert(!seg_create(s, SEG_EXCHANGE, "fake-region", m->bytes, 0));
	wire_reply_init(&r.r, &m->hdr, sizeof(r), 0, NULL);
	r.region = 0x200 + f->n_regions;
	r.bytes = s->size;
	atomic_fetch_add(&f->regions, 1);
	fake_send(f, &r, sizeof(r), &s->fd, 1);
}

static inline void fake_import(struct fake *f, const struct wire_region *m, int fd)
{
	struct wire_region_reply r;
	struct stat st;

	assert(!fstat(fd, &st));
	atomic_store(&f->imported, st.st_ino);
	wire_reply_init(&r.r, &m->hdr, sizeof(r), 0, NULL);
	r.region = 0x300 + (uint64_t)atomic_fetch_add(&f->regions, 1);
	r.bytes = m->bytes;
	fake_send(f, &r, sizeof(r), NULL, 0);
}

static inline struct fake_seq *fake_find(struct fake *f, uint64_t handle)
{
	for (int i = 0; i < FAKE_SEQS; i++)
		if (f->seq[i].handle == handle)
			return &f->seq[i];
	return NULL;
}

static inline struct seq_slot *fake_slot(struct fake *f, const struct fake_seq *s)
{
	return (struct seq_slot *)((char *)f->ctl.addr + ctl_slots_off(f->entries)) + s->slot;
}

/* For the test's thread: sequence i's slot. */
static inline struct seq_slot *fake_slot_at(struct fake *f, int i)
{
	struct seq_slot *slot;

	pthread_mutex_lock(&f->lock);
	slot = fake_slot(f, &f->seq[i]);
	pthread_mutex_unlock(&f->lock);
	return slot;
}

static inline void fake_open(struct fake *f, const struct wire_seq_open *m)
{
	struct wire_seq_open_reply r;
	struct fake_seq *s = fake_find(f, 0);
	uint32_t i;

	assert(s);
	i = (uint32_t)(s - f->seq);
	*s = (struct fake_seq){.handle = 0x1000 + ++f->next_handle, .slot = i, .lanes = f->lanes, .epoch = 1};
	s->area = (char *)f->plans.addr + i * FAKE_AREA;
	memset(s->area, 0, sizeof(struct plan_hdr));
	s->rows = m->op == W_OP_FORK ? m->prefix : m->op == W_OP_RESUME ? 100 : 0;
	f->last_open = *m;
	atomic_store(&fake_slot(f, s)->len, seq_len_pack(s->epoch, s->rows));
	atomic_store(&fake_slot(f, s)->acked, 0);
	wire_reply_init(&r.r, &m->hdr, sizeof(r), 0, NULL);
	r.seq = s->handle;
	r.plan_off = i * FAKE_AREA;
	r.plan_bytes = FAKE_AREA;
	r.slot = i;
	r.epoch = s->epoch;
	r.rows = s->rows;
	atomic_fetch_add(&f->opens, 1);
	fake_send(f, &r, sizeof(r), NULL, 0);
}

static inline void fake_other(struct fake *f, const struct wire_hdr *h)
{
	union {
		struct wire_reply r;
		struct wire_seq_truncate_reply t;
		struct wire_seq_info_reply i;
		struct wire_plan_reply p;
	} v;
	size_t len = sizeof(v.r);
	struct fake_seq *s;

	switch (h->type) {
	case W_SEQ_TRUNCATE:
		len = sizeof(v.t);
		break;
	case W_SEQ_INFO:
		len = sizeof(v.i);
		break;
	case W_PLAN_REQUEST:
	case W_FETCH:
		len = sizeof(v.p);
		break;
	}
	/* Sequence messages name the sequence first, behind the header. */
	s = h->type == W_REGION_CLOSE ? NULL : fake_find(f, ((const struct wire_handle *)h)->handle);
	if (h->type != W_REGION_CLOSE && !s) {
		wire_reply_init(&v.r, h, len, KVT_E_STALE, "seq: not known");
		fake_send(f, &v, sizeof(v.r), NULL, 0);
		return;
	}
	wire_reply_init(&v.r, h, len, 0, NULL);
	switch (h->type) {
	case W_REGION_CLOSE:
		atomic_fetch_add(&f->region_closes, 1);
		break;
	case W_SEQ_CLOSE:
		atomic_fetch_add(&f->seq_closes, 1);
		atomic_fetch_add(&f->drops, (int)((const struct wire_seq_close *)h)->drop);
		s->handle = 0;
		break;
	case W_SEQ_TRUNCATE:
		atomic_fetch_add(&f->truncates, 1);
		s->rows = ((const struct wire_seq_truncate *)h)->rows;
		v.t.epoch = ++s->epoch;
		v.t.rows = s->rows;
		break;
	case W_SEQ_INFO:
		v.i.rows = (uint32_t)atomic_load(&fake_slot(f, s)->len);
		v.i.epoch = s->epoch;
		v.i.lanes = s->lanes;
		wire_string(v.i.policy, sizeof(v.i.policy), "fake");
		break;
	case W_PLAN_REQUEST:
		f->last_request = *(const struct wire_plan_request *)h;
		v.p.plan_id = s->plan_id + 1;
		break;
	case W_FETCH:
		v.p.plan_id = s->plan_id + 1;
		break;
	}
	fake_send(f, &v, len, NULL, 0);
}

/* fds: what came with it, the caller's. */
static inline void fake_message(struct fake *f, const struct wire_hdr *h, size_t len, const int *fds,
				unsigned n_fds)
{
	struct wire_reply r;
	char err[WIRE_TEXT];

	atomic_fetch_add(&f->calls, 1);
	if (wire_check(h, len, false, err, sizeof(err)) || n_fds != wire_request_fds(h->type)) {
		fprintf(stderr, "fake daemon: %s (%u fds)\n", err, n_fds);
		fake_hangup(f);
		return;
	}
	if (atomic_load(&f->hangup_type) == h->type) {
		atomic_store(&f->hangup_type, 0);
		fake_hangup(f);
		return;
	}
	if (atomic_load(&f->refuse_type) == h->type) {
		wire_reply_init(&r, h, sizeof(r), atomic_load(&f->refuse_status),
				"field: 7, must be at most 5");
		atomic_store(&f->refuse_type, 0);
		fake_send(f, &r, sizeof(r), NULL, 0);
		return;
	}
	switch (h->type) {
	case W_HELLO:
		return fake_hello(f, (const void *)h);
	case W_MODEL:
		return fake_model(f, (const void *)h);
	case W_REGION:
		return fake_region(f, (const void *)h);
	case W_REGION_IMPORT:
		return fake_import(f, (const void *)h, fds[0]);
	case W_SEQ_OPEN:
		return fake_open(f, (const void *)h);
	default:
		return fake_other(f, h);
	}
}

static inline void fake_hints(struct fake *f)
{
	struct ring_entry e;
	uint64_t n;

	(void)!read(f->in, &n, sizeof(n));
	do
		while (ring_pop(&f->sq, &e) > 0)
			if (e.type == Q_DIRTY && fake_find(f, e.handle))
				atomic_fetch_add(&f->dirty, 1);
	while (!ring_sleep(&f->sq));
}

static inline void *fake_main(void *arg)
{
	_Alignas(8) static _Thread_local char buf[WIRE_MAX];
	struct fake *f = arg;

	for (;;) {
		struct pollfd p[4] = {{.fd = f->stop, .events = POLLIN},
				      {.fd = f->listener, .events = POLLIN},
				      {.fd = f->sock, .events = POLLIN},
				      {.fd = f->in, .events = POLLIN}};
		int fds[WIRE_MAX_FDS];
		unsigned n_fds = 0;
		ssize_t n;

		poll(p, 4, -1);
		if (p[0].revents)
			return NULL;
		pthread_mutex_lock(&f->lock);
		if (p[3].revents && f->in == p[3].fd)
			fake_hints(f);
		if (p[2].revents && f->sock == p[2].fd) {
			n = sock_recv(f->sock, buf, sizeof(buf), fds, &n_fds);
			if (n > 0)
				fake_message(f, (const void *)buf, (size_t)n, fds, n_fds);
			else if (n != -EAGAIN)
				fake_hangup(f);
			for (unsigned i = 0; i < n_fds; i++)
				close(fds[i]);
		}
		if (p[1].revents && f->sock < 0)
			f->sock = sock_accept(f->listener);
		pthread_mutex_unlock(&f->lock);
	}
}

/* Listen at f->path (made by fake_new) and serve. */
static inline void fake_start(struct fake *f)
{
	f->sock = f->in = f->out = -1;
	f->stop = eventfd(0, EFD_CLOEXEC);
	f->listener = sock_listen(f->path, 0600, 8);
	assert(f->stop >= 0 && f->listener >= 0);
	assert(!pthread_create(&f->thread, NULL, fake_main, f));
	f->running = true;
}

/* Die: the socket file stays, as after a crash. */
static inline void fake_stop(struct fake *f)
{
	uint64_t one = 1;

	if (!f->running)
		return;
	assert(write(f->stop, &one, sizeof(one)) == sizeof(one));
	pthread_join(f->thread, NULL);
	fake_hangup(f);
	close(f->listener);
	close(f->stop);
	f->running = false;
}

static inline struct fake *fake_new(void)
{
	struct fake *f = calloc(1, sizeof(*f));

	assert(f);
	pthread_mutex_init(&f->lock, NULL);
	f->ctl = f->plans = (struct seg)SEG_INIT;
	strcpy(f->dir, "/tmp/kvt-fake-XXXXXX");
	assert(mkdtemp(f->dir));
	snprintf(f->path, sizeof(f->path), "%s/sock", f->dir);
	fake_start(f);
	return f;
}

static inline void fake_free(struct fake *f)
{
	fake_stop(f);
	unlink(f->path);
	rmdir(f->dir);
	free(f);
}

/* Send the muted reply after all. */
static inline void fake_release(struct fake *f)
{
	pthread_mutex_lock(&f->lock);
	sock_send(f->sock, f->kept, f->kept_len, NULL, 0);
	pthread_mutex_unlock(&f->lock);
}

static inline void fake_hint(struct fake *f, struct fake_seq *s, uint32_t type, uint64_t a, uint64_t b)
{
	struct ring_entry e = {.type = type, .handle = s->handle, .arg = {a, b}};
	uint64_t one = 1;

	if (ring_push(&f->cq, &e) == 1)
		assert(write(f->out, &one, sizeof(one)) == sizeof(one));
}

/*
 * Publish a plan for sequence i. Bitmaps are [lanes][BITS_WORDS(watermark)];
 * copy_out is what leaves. Returns its id.
 */
static inline uint64_t fake_plan(struct fake *f, int i, uint32_t watermark, const uint64_t *resident,
				 const uint64_t *bring_in, enum plan_state state)
{
	struct fake_seq *s = &f->seq[i];
	struct plan_tables t;
	size_t bytes;

	pthread_mutex_lock(&f->lock);
	assert(!plan_begin(s->area, FAKE_AREA, s->lanes, watermark, &t));
	bytes = (size_t)s->lanes * t.words * sizeof(uint64_t);
	memcpy(t.resident, resident, bytes);
	if (bring_in)
		memcpy(t.bring_in, bring_in, bytes);
	t.hdr->epoch = s->epoch;
	plan_publish(&t, ++s->plan_id, state);
	fake_hint(f, s, Q_PLAN, s->plan_id, state);
	pthread_mutex_unlock(&f->lock);
	return s->plan_id;
}

static inline void fake_plan_state(struct fake *f, int i, enum plan_state state)
{
	pthread_mutex_lock(&f->lock);
	plan_set_state(f->seq[i].area, state);
	fake_hint(f, &f->seq[i], Q_PLAN, f->seq[i].plan_id, state);
	pthread_mutex_unlock(&f->lock);
}

/* Wait (bounded) until a counter reaches n. */
static inline bool fake_until(_Atomic int *counter, int n)
{
	for (int i = 0; i < 2000 && atomic_load(counter) < n; i++)
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	return atomic_load(counter) >= n;
}
