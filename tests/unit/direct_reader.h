/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A client that reads demoted rows where they lie: it walks a sequence's directory and the segments that it
 * names by the rules of shm/direct.h, and holds every row that it may believe against the pattern.
 */
#include "core_harness.h"
#include "daemon/direct.h"
#include "daemon/internal.h"
#include "ipc/client/client.h"
#include "ipc/codec.h"
#include "shm/crc.h"
#include "shm/direct.h"
#include "shm/seg.h"

#define READER_SEGMENTS 64u
#define READER_PAGES 8192u

struct reader {
	struct kvtier *c; /* asks for segments; any connection of the same user */
	struct rt_seq *q;
	struct seg dir;
	struct direct_hdr *hdr;
	struct seg seg[READER_SEGMENTS];
	uint32_t number[READER_SEGMENTS], segs;
	struct direct_page *page; /* [READER_PAGES] copies, `have` of them since the last look */
	uint32_t have;
	_Atomic uint32_t cuts;                                   /* odd while the runtime truncates */
	uint64_t rows, pages, wrong, bad_crc, torn, whole, lost; /* whole: looks that could be believed */
};

/* ---- requests --------------------------------------------------------------------------- */

static inline int ask_segment(struct kvtier *c, uint32_t number, int *fd, uint64_t *ret_bytes)
{
	struct wire_segment m = {.segment = number};
	struct wire_segment_reply a;
	struct call k = {.req = &m.hdr, .reply = &a, .reply_size = sizeof(a), .fds = fd, .n_fds = 1};
	int r;

	wire_init(&m.hdr, W_SEGMENT, sizeof(m), 0);
	m.segment = number;
	*fd = -1;
	r = call_run(c, &k);
	if (!r)
		*ret_bytes = a.bytes;
	return r;
}

static inline int ask_directory(struct kvtier *c, uint64_t seq, int *fd, uint64_t *ret_bytes)
{
	struct wire_handle m;
	struct wire_direct_reply a;
	struct call k = {.req = &m.hdr, .reply = &a, .reply_size = sizeof(a), .fds = fd, .n_fds = 1};
	int r;

	wire_init(&m.hdr, W_DIRECT, sizeof(m), 0);
	m.handle = seq;
	*fd = -1;
	r = call_run(c, &k);
	if (!r)
		*ret_bytes = a.bytes;
	return r;
}

/* ---- looking -------------------------------------------------------------------------------- */

static inline const uint8_t *reader_at(struct reader *r, uint64_t place, uint64_t bytes)
{
	uint32_t number = direct_segment(place), i = 0;
	uint64_t size = 0;
	int fd;

	while (i < r->segs && r->number[i] != number)
		i++;
	if (i == READER_SEGMENTS)
		return NULL;
	if (i == r->segs) {
		if (ask_segment(r->c, number, &fd, &size) < 0)
			return NULL;
		if (seg_map(&r->seg[i], SEG_PUBLISHED, fd, size) < 0) {
			close(fd);
			return NULL;
		}
		r->number[r->segs++] = number;
	}
	if (direct_off(place) + bytes > r->seg[i].size)
		return NULL;
	return (const uint8_t *)r->seg[i].addr + direct_off(place);
}

/* Rows of the page that the reader may believe and that are not what was appended; *ret_rows: believable ones.
 */
static inline uint32_t reader_page(struct reader *r, const struct direct_page *x, uint32_t *ret_rows)
{
	const struct runtime *rt = r->q->rt;
	uint32_t bytes = x->rows * (rt->k_bytes + rt->v_bytes), row = 0, bad = 0;
	const uint8_t *k = reader_at(r, x->place, bytes), *v;

	if (!k) {
		r->lost++;
		return 0;
	}
	v = k + x->rows * rt->k_bytes;
	for (uint32_t w = 0; w < x->span; w++)
		for (uint64_t b = x->pos[w]; b; b &= b - 1, row++) {
			uint32_t pos = x->first + w * 64 + (uint32_t)__builtin_ctzll(b), i = 0;

			if (pos >= x->limit || (x->dead[row / 32] >> row % 32 & 1))
				continue;
			++*ret_rows;
			if (pos >= r->q->max_rows || x->lane >= rt->lanes) {
				bad++;
				continue;
			}
			while (i < rt->k_bytes &&
			       k[row * rt->k_bytes + i] == rt_byte(r->q, x->lane, pos, i, false))
				i++;
			bad += i < rt->k_bytes;
			for (i = 0; i < rt->v_bytes &&
				    v[row * rt->v_bytes + i] == rt_byte(r->q, x->lane, pos, i, true);)
				i++;
			bad += i < rt->v_bytes;
		}
	r->bad_crc += crc32c_plain(0, crc32c(0, k, bytes), bytes) != x->crc;
	return bad + (row != x->rows);
}

static inline void reader_copy(struct direct_page *to, struct direct_page *from)
{
	uint64_t *d = (uint64_t *)to, *s = (uint64_t *)from;

	for (uint32_t i = 1; i < sizeof(*to) / sizeof(*d); i++)
		d[i] = __atomic_load_n(&s[i], __ATOMIC_RELAXED);
}

/*
 * One look at entries [from, from + n): first all entries, then all pages, which leaves them time to change.
 * True when it could be believed.
 */
static inline bool reader_look(struct reader *r, uint32_t from, uint32_t n)
{
	uint64_t moved, bad_crc = r->bad_crc, lost = r->lost;
	uint32_t cuts = atomic_load(&r->cuts), used, have = 0, rows = 0, bad = 0;
	struct direct_page *entry = (struct direct_page *)(r->hdr + 1);

	if (cuts & 1)
		return false;
	moved = atomic_load_explicit(&r->hdr->moved, memory_order_acquire);
	used = atomic_load_explicit(&r->hdr->used, memory_order_acquire);
	for (uint32_t e = from; e < used && e - from < n && have < READER_PAGES; e++) {
		uint64_t place = atomic_load_explicit(&entry[e].place, memory_order_acquire);

		if (!place)
			continue;
		reader_copy(&r->page[have], &entry[e]);
		r->page[have++].place = place;
	}
	r->have = have;
	for (uint32_t i = 0; i < have; i++)
		bad += reader_page(r, &r->page[i], &rows);
	__sync_synchronize();
	if (atomic_load_explicit(&r->hdr->moved, memory_order_relaxed) != moved ||
	    atomic_load(&r->cuts) != cuts) {
		r->torn++;
		r->bad_crc = bad_crc;
		r->lost = lost;
		return false;
	}
	r->whole++;
	r->rows += rows;
	r->pages += have;
	r->wrong += bad;
	return true;
}

/* ---- life ------------------------------------------------------------------------------------ */

static inline void reader_attach(struct core *c, void *arg)
{
	struct seq *s = handle_get(c->seqs, *(uint64_t *)arg, NULL);

	s->flags |= W_OPEN_DIRECT;
	*(uint64_t *)arg = (uint64_t)direct_open(s);
}

/* Give a sequence whose rows the daemon reaches a directory all the same. */
static inline int harness_direct(struct harness *h, struct rt_seq *q)
{
	uint64_t x = q->s->handle;

	harness_call(h, reader_attach, &x);
	return (int)x;
}

/* c: asks for segments. */
static inline int reader_open(struct reader *r, struct rt_seq *q, struct kvtier *c)
{
	uint64_t bytes = 0;
	int fd, e;

	memset(r, 0, sizeof(*r));
	r->q = q;
	r->c = c;
	r->page = malloc(READER_PAGES * sizeof(*r->page));
	e = r->page ? ask_directory(q->rt->c, q->s->handle, &fd, &bytes) : -ENOMEM;
	if (e < 0)
		return e;
	e = seg_map(&r->dir, SEG_PUBLISHED, fd, bytes);
	r->hdr = r->dir.addr;
	return e;
}

static inline void reader_close(struct reader *r)
{
	for (uint32_t i = 0; i < r->segs; i++)
		seg_close(&r->seg[i]);
	seg_close(&r->dir);
	free(r->page);
}
