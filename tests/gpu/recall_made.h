/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Demoted rows as a daemon would publish them, made here: segments, pages, a directory, rows that are left on
 * the GPU, queries. Bytes come from a pool of random ones. Failures end the program with status 1.
 */
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "ipc/cuda/recall.h"
#include "ipc/kvtier_cuda.h"
#include "shm/bits.h"
#include "shm/util.h"

__attribute__((format(printf, 1, 2), noreturn)) static inline void die(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	printf("Bail out! ");
	vprintf(fmt, ap);
	printf("\n");
	va_end(ap);
	exit(1);
}
static inline void ok(int r, const char *what)
{
	if (r)
		die("%s: %d: %s", what, r, kvtier_last_error());
}

/* ---- numbers ------------------------------------------------------------------------------------ */

static uint64_t made_seed = 1;
static inline uint32_t rnd(void)
{
	made_seed += 0x9e3779b97f4a7c15u;
	uint64_t x = (made_seed ^ made_seed >> 30) * 0xbf58476d1ce4e5b9u;

	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return (uint32_t)(x >> 32);
}
static inline uint32_t below(uint32_t n)
{
	return (uint32_t)((uint64_t)rnd() * n >> 32);
}
static inline float normal(void)
{
	float s = 0;

	for (int i = 0; i < 6; i++)
		s += (float)(rnd() >> 8) * 0x1p-24f - 0.5f;
	return s * 1.41421356f;
}
static inline uint32_t elem_of(uint32_t dtype)
{
	return dtype == KVT_DTYPE_F32 ? 4 : 2;
}
/* Of a float's bits, cut off; what is too small for a normal half is 0. */
static inline uint16_t made_half(uint32_t u)
{
	uint32_t exp = u >> 23 & 255;

	if (exp < 113 || exp > 142)
		return 0;
	return (uint16_t)(u >> 16 & 0x8000u) | (uint16_t)((exp - 112) << 10) | (uint16_t)(u >> 13 & 1023);
}
/* n elements of dtype, standard normal times `by`; two-byte types only lose what they must. */
static inline void put_normal(void *dst, uint32_t n, uint32_t dtype, float by)
{
	for (uint32_t i = 0; i < n; i++) {
		float f = normal() * by;
		uint32_t u;

		memcpy(&u, &f, 4);
		if (dtype == KVT_DTYPE_F32)
			memcpy((char *)dst + i * 4, &f, 4);
		else if (dtype == KVT_DTYPE_BF16)
			((uint16_t *)dst)[i] = (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
		else
			((uint16_t *)dst)[i] = made_half(u);
	}
}

/* ---- what a daemon publishes ---------------------------------------------------------------------- */

struct made_shape {
	uint32_t lanes, rows, dim, v_bytes, dtype;
	uint32_t segments;
	uint32_t page_rows;   /* of a page; 0: any number, positions with gaps */
	uint32_t resident_pc; /* percent of the rows that are on the device */
	uint32_t capacity;    /* of the directory; 0: what is needed, and a few */
	uint64_t segment_bytes;
};
struct made {
	struct made_shape s;
	struct kvtier_cuda *g;
	uint32_t k_bytes, row_bytes;
	struct seg *seg;    /* [segments] */
	uint64_t *seg_used; /* [segments] */
	struct seg dir;     /* the daemon's mapping */
	struct direct_hdr *hdr;
	struct direct_page *page;
	uint64_t *resident; /* [lanes][words] */
	uint32_t words;
	uint32_t *held;         /* [lanes] rows on the device */
	struct cuda_lane *lane; /* [lanes] of the device, addresses of the GPU */
	char *device;           /* what the GPU has: [lanes][cap][row bytes], K of all slots, then V */
	uint64_t gpu, lane_addr;
	uint32_t cap;
	uint32_t maps; /* segments handed out */
	char *pool;    /* rows to copy from */
	uint32_t pool_rows;
};

static inline int made_map(void *arg, uint32_t number, struct seg *ret)
{
	struct made *m = arg;
	int fd, r;

	if (number >= m->s.segments)
		return KVT_E_NOENT;
	fd = fcntl(m->seg[number].fd, F_DUPFD_CLOEXEC, 3);
	if (fd < 0)
		die("F_DUPFD: %m");
	r = seg_map(ret, SEG_PUBLISHED, fd, m->seg[number].size);
	if (r)
		die("seg_map: %s", strerror(-r));
	m->maps++;
	return 0;
}
static inline struct direct_source made_source(struct made *m)
{
	return (struct direct_source){.owner = m, .arg = m, .map = made_map};
}

/* The directory as a client gets it. */
static inline struct seg made_directory(const struct made *m)
{
	struct seg s;
	int r = seg_map(&s, SEG_PUBLISHED, fcntl(m->dir.fd, F_DUPFD_CLOEXEC, 3), m->dir.size);

	if (r)
		die("seg_map: %s", strerror(-r));
	return s;
}

static inline char *made_k(const struct made *m, const struct direct_page *p)
{
	return (char *)m->seg[direct_segment(p->place)].addr + direct_off(p->place);
}

/* Put a page of these positions of a lane into entry `slot`: fresh bytes in a segment, 64-byte aligned. */
static inline void made_page(struct made *m, uint32_t slot, uint32_t segment, uint32_t lane,
			     const uint32_t *pos, uint32_t rows)
{
	struct direct_page *p = &m->page[slot];
	uint64_t bytes = ALIGN_UP((uint64_t)rows * m->row_bytes, 64), off = m->seg_used[segment];
	char *k;

	if (off + bytes > m->seg[segment].size)
		die("segment %u is full", segment);
	m->seg_used[segment] += bytes;
	memset(p, 0, sizeof(*p));
	p->lane = lane;
	p->first = pos[0] - below(pos[0] % 64 + 1);
	p->limit = UINT32_MAX;
	p->rows = (uint8_t)rows;
	p->span = (uint8_t)((pos[rows - 1] - p->first) / 64 + 1);
	for (uint32_t i = 0; i < rows; i++)
		bits_set(p->pos, pos[i] - p->first);
	k = (char *)m->seg[segment].addr + off;
	for (uint32_t i = 0; i < rows; i++) { /* K plane, then V plane */
		const char *row = m->pool + (size_t)below(m->pool_rows) * m->row_bytes;

		memcpy(k + (size_t)i * m->k_bytes, row, m->k_bytes);
		memcpy(k + (size_t)rows * m->k_bytes + (size_t)i * m->s.v_bytes, row + m->k_bytes,
		       m->s.v_bytes);
	}
	p->serial = atomic_load(&m->hdr->serial) + 1;
	atomic_store(&p->place, direct_place(segment, off));
	atomic_store(&m->hdr->serial, p->serial);
	if (slot >= m->hdr->used)
		atomic_store(&m->hdr->used, slot + 1);
}

/* All rows of a lane that are not on the device into pages; entries are given out by next(). */
static inline void made_demote(struct made *m, uint32_t lane, uint32_t *slot)
{
	const uint64_t *dev = m->resident + (size_t)lane * m->words;
	uint32_t pos[FIND_PAGE], n = 0, want = m->s.page_rows ? m->s.page_rows : 1 + below(FIND_PAGE);

	for (uint32_t p = 0; p <= m->s.rows; p++) {
		bool end = p == m->s.rows || (n && p - pos[0] / 64 * 64 >= (FIND_SPAN - 1) * 64);

		if (n && (end || n == want)) {
			made_page(m, (*slot)++, below(m->s.segments), lane, pos, n);
			n = 0;
			want = m->s.page_rows ? m->s.page_rows : 1 + below(FIND_PAGE);
		}
		if (p < m->s.rows && !bits_test(dev, p))
			pos[n++] = p;
	}
}

static inline void made_device(struct made *m)
{
	uint64_t lane_bytes = (uint64_t)m->cap * m->row_bytes, all = lane_bytes * m->s.lanes;
	const struct cuda_driver *d = m->g->d;

	m->device = malloc(all);
	m->lane = calloc(m->s.lanes, sizeof(*m->lane));
	if (!m->device || !m->lane)
		die("no memory");
	ok(cuda_try(m->g, d->alloc(&m->gpu, all), "alloc"), "device rows");
	ok(cuda_try(m->g, d->alloc(&m->lane_addr, m->s.lanes * sizeof(*m->lane)), "alloc"), "lanes");
	for (uint32_t l = 0; l < m->s.lanes; l++) {
		uint64_t at = m->gpu + l * lane_bytes;

		m->lane[l] = (struct cuda_lane){.k = at,
						.v = at + (uint64_t)m->cap * m->k_bytes,
						.k_row = m->k_bytes,
						.v_row = m->s.v_bytes,
						.k_bytes = m->k_bytes,
						.v_bytes = m->s.v_bytes};
		for (uint32_t i = 0; i < m->cap; i++)
			memcpy(m->device + l * lane_bytes + (size_t)i * m->k_bytes,
			       m->pool + (size_t)below(m->pool_rows) * m->row_bytes, m->k_bytes);
	}
	ok(cuda_try(m->g, d->copy_in(m->gpu, m->device, all, NULL), "copy"), "device rows");
	ok(cuda_try(m->g, d->copy_in(m->lane_addr, m->lane, m->s.lanes * sizeof(*m->lane), NULL), "copy"),
	   "lanes");
	ok(cuda_try(m->g, d->stream_sync(NULL), "sync"), "device rows");
}

static inline void made_new(struct made *m, struct kvtier_cuda *g, const struct made_shape *s)
{
	uint32_t most = 0, slot = 0;
	uint64_t rows = (uint64_t)s->lanes * s->rows, capacity;
	int r = 0;

	*m = (struct made){
		.s = *s, .g = g, .k_bytes = s->dim * elem_of(s->dtype), .words = (uint32_t)BITS_WORDS(s->rows)};
	m->row_bytes = m->k_bytes + s->v_bytes;
	capacity = s->capacity ? s->capacity : rows / (s->page_rows ? s->page_rows : 16) + 4 * s->lanes + 64;
	m->pool_rows = MIN(1u << 16, (uint32_t)rows);
	m->pool = malloc((size_t)m->pool_rows * m->row_bytes);
	m->seg = calloc(s->segments, sizeof(*m->seg));
	m->seg_used = calloc(s->segments, sizeof(*m->seg_used));
	m->resident = calloc((size_t)s->lanes * m->words, sizeof(uint64_t));
	m->held = calloc(s->lanes, sizeof(*m->held));
	if (!m->pool || !m->seg || !m->seg_used || !m->resident || !m->held)
		die("no memory");
	for (uint32_t i = 0; i < m->pool_rows; i++) {
		put_normal(m->pool + (size_t)i * m->row_bytes, s->dim, s->dtype, 1);
		for (uint32_t b = m->k_bytes; b < m->row_bytes; b++)
			m->pool[(size_t)i * m->row_bytes + b] = (char)rnd();
	}
	for (uint32_t i = 0; i < s->segments && !r; i++)
		r = seg_create(&m->seg[i], SEG_PUBLISHED, "made",
			       s->segment_bytes
				       ? s->segment_bytes
				       : ALIGN_UP(3 * rows * m->row_bytes / s->segments + (1u << 20), 4096),
			       0);
	if (!r)
		r = seg_create(&m->dir, SEG_PUBLISHED, "made-directory",
			       sizeof(struct direct_hdr) + capacity * sizeof(struct direct_page), 0);
	if (r)
		die("seg_create: %s", strerror(-r));
	m->hdr = m->dir.addr;
	m->hdr->magic = DIRECT_MAGIC;
	m->hdr->capacity = (uint32_t)capacity;
	m->page = (struct direct_page *)(m->hdr + 1);
	for (uint32_t l = 0; l < s->lanes; l++) {
		for (uint32_t p = 0; p < s->rows; p++)
			if (below(100) < s->resident_pc) {
				bits_set(m->resident + (size_t)l * m->words, p);
				m->held[l]++;
			}
		most = MAX(most, m->held[l]);
		made_demote(m, l, &slot);
	}
	m->cap = MAX(most, 1u) + 3;
	made_device(m);
}

static inline void made_free(struct made *m)
{
	(void)m->g->d->free(m->gpu);
	(void)m->g->d->free(m->lane_addr);
	for (uint32_t i = 0; i < m->s.segments; i++)
		seg_close(&m->seg[i]);
	seg_close(&m->dir);
	free(m->seg);
	free(m->seg_used);
	free(m->pool);
	free(m->resident);
	free(m->held);
	free(m->device);
	free(m->lane);
}

static inline struct find_resident made_resident(const struct made *m)
{
	return (struct find_resident){.bits = m->resident, .words = m->words, .end = m->s.rows};
}
