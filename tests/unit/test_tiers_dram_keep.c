/* SPDX-License-Identifier: MIT */
/* Private DRAM segments that outlive the tier: what a later life finds, and what it refuses to believe. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
/* Records and heads are forged here, so their layout is needed. */
#include "tiers/dram_dir.c"
#include "keeper.h"
#include "shm/bits.h"

#define MIB (UINT64_C(1) << 20)
#define SEG (2 * MIB)
#define OPS (&tier_dram_ops)
#define MAX_PAGES 600

/* ---- pages that are told apart ------------------------------------------------------------ */

struct found {
	struct page_meta meta;
	struct seq_record seq;
	tier_addr addr;
};

struct fixture {
	struct keeper k;
	struct tier *t;
	uint64_t size;
	struct found page[MAX_PAGES]; /* written, or found */
	uint64_t pos[MAX_PAGES][DIR_POS_WORDS];
	unsigned n, take; /* take: 0 all that is found, else one of so many */
	uint32_t seed;
	uint64_t number; /* of the next page */
};

static uint32_t draw(struct fixture *f, uint32_t below)
{
	f->seed = f->seed * 1664525 + 1013904223;
	return (uint32_t)(((uint64_t)(f->seed >> 4) * below) >> 28);
}

static void open_life(struct fixture *f)
{
	struct tier_cfg cfg = {
		.size = f->size, .segment = SEG, .node = -1, .no_huge = true, .keep = keeper_pass(&f->k)};
	char err[128];

	assert_int_equal(OPS->open(&f->t, &cfg, err, sizeof(err)), 0);
}

static struct fixture *begin(uint64_t size)
{
	struct fixture *f = calloc(1, sizeof(*f));

	assert_non_null(f);
	f->size = size;
	f->seed = 7;
	f->number = 1000;
	open_life(f);
	assert_int_equal(OPS->scan(f->t, NULL, NULL), 0);
	return f;
}

static void finish(struct fixture *f)
{
	OPS->close(f->t);
	keeper_close(&f->k);
	free(f);
}

static void fill_page(uint8_t *p, uint32_t bytes, uint64_t page)
{
	for (uint32_t i = 0; i < bytes; i++)
		p[i] = (uint8_t)((page * 0x9e3779b97f4a7c15u + i * 0xbf58476d1ce4e5b9u) >> 40);
}

static uint32_t page_crc(const struct page_ident *id, const void *buf, uint32_t bytes)
{
	return crc32c(page_crc_seed(id), buf, bytes);
}

/* 0, or -ENOSPC. rows positions, `step` apart. */
static int write_page(struct fixture *f, uint32_t seq, uint32_t bytes, uint32_t rows, uint32_t step,
		      enum tier_class life)
{
	struct found *p = &f->page[f->n];
	uint64_t *pos = f->pos[f->n];
	struct tier_io io = {.op = TIER_WRITE, .bytes = bytes, .life = (uint8_t)life, .seq = &p->seq},
		       *one = &io, *done;
	int r = OPS->prepare(f->t, &io);

	if (r < 0)
		return r;
	assert_true(f->n < MAX_PAGES);
	memset(p, 0, sizeof(*p));
	memset(pos, 0, sizeof(f->pos[0]));
	for (uint32_t i = 0; i < rows; i++)
		bits_set(pos, i * step);
	memcpy(p->seq.key, &seq, sizeof(seq));
	memset(p->seq.secret_hash, (int)seq, sizeof(p->seq.secret_hash));
	p->seq.tenant = 9;
	p->seq.model = 77;
	p->seq.lanes = 4;
	p->seq.lifetime = 1;
	p->meta = (struct page_meta){.id = {.page = f->number++,
					    .tenant = 9,
					    .lane = f->n % 4,
					    .epoch = seq,
					    .rows = rows,
					    .first = f->n * 8},
				     .bytes = bytes,
				     .pos_words = (uint32_t)BITS_WORDS((rows - 1) * step + 1),
				     .pos = pos};
	memcpy(p->meta.id.key, p->seq.key, sizeof(p->seq.key));
	fill_page(io.buf, bytes, p->meta.id.page);
	p->meta.crc = page_crc(&p->meta.id, io.buf, bytes);
	io.meta = p->meta;
	OPS->submit(f->t, &one, 1);
	assert_int_equal(OPS->reap(f->t, &done, 1), 1);
	OPS->release(f->t, &io);
	p->addr = io.addr;
	f->n++;
	return 0;
}

static void write_some(struct fixture *f, unsigned n)
{
	static const uint32_t sizes[] = {1, 3, 4, 8, 16, 33, 64, 100, 256};

	for (unsigned i = 0; i < n; i++) {
		uint32_t units = sizes[draw(f, ARRAY_SIZE(sizes))], rows = 1 + draw(f, MIN(units * 8, 128));

		assert_int_equal(write_page(f, 1 + draw(f, 5), units * KVT_UNIT - draw(f, 100), rows,
					    1 + draw(f, 15), TIER_LONG),
				 0);
	}
}

static bool on_found(void *arg, tier_addr addr, const struct page_meta *m, const struct seq_record *s)
{
	struct fixture *f = arg;
	struct found *p = &f->page[f->n];

	if (f->take && m->id.page % f->take)
		return false;
	assert_true(f->n < MAX_PAGES && m->pos_words <= DIR_POS_WORDS);
	p->meta = *m;
	p->seq = *s;
	p->addr = addr;
	memcpy(f->pos[f->n], m->pos, m->pos_words * sizeof(*m->pos));
	p->meta.pos = f->pos[f->n++];
	return true;
}

/* The process ends, another takes over. Returns what was known before; f has what is found. */
static struct fixture *next_life(struct fixture *f)
{
	struct fixture *was = malloc(sizeof(*was));

	assert_non_null(was);
	OPS->close(f->t);
	*was = *f;
	for (unsigned i = 0; i < was->n; i++)
		was->page[i].meta.pos = was->pos[i];
	f->n = f->k.refused = 0;
	open_life(f);
	assert_int_equal(OPS->scan(f->t, on_found, f), 0);
	return was;
}

static bool whole(struct fixture *f, const struct found *p)
{
	struct tier_io io = {.op = TIER_READ, .bytes = p->meta.bytes, .addr = p->addr}, *one = &io, *done;
	bool same;

	assert_int_equal(OPS->prepare(f->t, &io), 0);
	OPS->submit(f->t, &one, 1);
	assert_int_equal(OPS->reap(f->t, &done, 1), 1);
	same = page_crc(&p->meta.id, io.buf, p->meta.bytes) == p->meta.crc;
	OPS->release(f->t, &io);
	return same;
}

static const struct found *by_number(const struct fixture *f, uint64_t page)
{
	for (unsigned i = 0; i < f->n; i++)
		if (f->page[i].meta.id.page == page)
			return &f->page[i];
	return NULL;
}

/* What was found is what was written, in every field, and readable. */
static void assert_same(struct fixture *f, const struct fixture *was)
{
	for (unsigned i = 0; i < f->n; i++) {
		const struct found *p = &f->page[i], *q = by_number(was, p->meta.id.page);

		assert_non_null(q);
		assert_int_equal(p->addr, q->addr);
		assert_memory_equal(&p->meta.id, &q->meta.id, sizeof(p->meta.id));
		assert_int_equal(p->meta.crc, q->meta.crc);
		assert_int_equal(p->meta.bytes, q->meta.bytes);
		assert_int_equal(p->meta.pos_words, q->meta.pos_words);
		assert_memory_equal(p->meta.pos, q->meta.pos, p->meta.pos_words * sizeof(uint64_t));
		assert_memory_equal(&p->seq, &q->seq, sizeof(p->seq));
		assert_true(whole(f, p));
	}
}

static struct tier_stat stat_of(struct fixture *f)
{
	struct tier_stat st;

	OPS->stat(f->t, &st);
	assert_int_equal(st.used + st.free + st.overhead, st.capacity);
	return st;
}

/* ---- finding again -------------------------------------------------------------------------------- */

static void pages_are_found_again(void **state)
{
	struct fixture *f = begin(64 * MIB), *was;
	struct tier_stat before, after;

	write_some(f, 60);
	for (int life = 0; life < 3; life++) {
		before = stat_of(f);
		was = next_life(f);
		after = stat_of(f);
		assert_int_equal(f->n, was->n);
		assert_int_equal(f->k.refused, 0);
		assert_same(f, was);
		assert_int_equal(after.used, before.used);
		assert_int_equal(after.overhead, before.overhead);
		free(was);
		/* What comes next takes no place of theirs. */
		write_some(f, 5);
		for (unsigned i = 0; i < f->n; i++)
			assert_true(whole(f, &f->page[i]));
		for (unsigned i = 0; i < 5; i++)
			OPS->free(f->t, f->page[i].addr, f->page[i].meta.bytes);
		memmove(f->page, f->page + 5, (f->n - 5) * sizeof(f->page[0]));
		memmove(f->pos, f->pos + 5, (f->n - 5) * sizeof(f->pos[0]));
		f->n -= 5;
		for (unsigned i = 0; i < f->n; i++)
			f->page[i].meta.pos = f->pos[i];
	}
	assert_int_equal(stat_of(f).errors, 0);
	finish(f);
}

static void what_is_freed_or_fleeting_is_not(void **state)
{
	struct fixture *f = begin(64 * MIB), *was;
	unsigned gone = 0;

	write_some(f, 40);
	for (unsigned i = 0; i < 40; i += 3, gone++)
		OPS->free(f->t, f->page[i].addr, f->page[i].meta.bytes);
	OPS->forget(f->t, f->page[1].addr);
	for (unsigned i = 0; i < 10; i++)
		assert_int_equal(write_page(f, 3, 20000, 40, 1, TIER_SHORT), 0);
	was = next_life(f);
	assert_int_equal(f->n, 40 - gone - 1);
	for (unsigned i = 0; i < f->n; i++)
		assert_true((f->page[i].meta.id.page - 1000) % 3 && f->page[i].meta.id.page != 1001);
	assert_same(f, was);
	free(was);
	/* A segment without pages leaves the store, but for one. */
	for (unsigned i = 0; i < f->n; i++)
		OPS->free(f->t, f->page[i].addr, f->page[i].meta.bytes);
	assert_int_equal(stat_of(f).used, 0);
	assert_int_equal(f->k.n, 1);
	was = next_life(f);
	assert_int_equal(f->n, 0);
	assert_int_equal(f->k.n, 1);
	free(was);
	finish(f);
}

static void what_the_owner_refuses_is_free_for_good(void **state)
{
	struct fixture *f = begin(64 * MIB), *was;
	unsigned kept;

	write_some(f, 60);
	f->take = 3;
	was = next_life(f);
	kept = f->n;
	assert_true(kept >= 19 && kept <= 21);
	assert_same(f, was);
	free(was);
	f->take = 0;
	was = next_life(f);
	assert_int_equal(f->n, kept);
	free(was);
	finish(f);
}

/* Wherever a place was borrowed from a larger class, or cut from a run of slabs. */
static void a_full_tier_comes_back_whole(void **state)
{
	struct fixture *f = begin(8 * MIB), *was;
	struct tier_stat before, after;
	unsigned misses = 0;

	while (misses < 40 && f->n < MAX_PAGES - 1) {
		uint32_t units = 1 + draw(f, 256);

		misses += write_page(f, 1 + draw(f, 9), units * KVT_UNIT, 1 + draw(f, MIN(units * 8, 128)), 1,
				     TIER_LONG) < 0;
	}
	before = stat_of(f);
	was = next_life(f);
	after = stat_of(f);
	assert_int_equal(f->n, was->n);
	assert_same(f, was);
	assert_int_equal(after.used, before.used);
	assert_int_equal(after.overhead, before.overhead);
	free(was);
	finish(f);
}

static void a_page_that_does_not_fit_is_not_kept(void **state)
{
	struct fixture *f = begin(16 * MIB), *was;
	unsigned seqs = (unsigned)(SEG / KVT_UNIT / DIR_SEQ_UNITS);

	assert_int_equal(write_page(f, 1, 4096, 128, 16, TIER_LONG),
			 0); /* 128 positions do not fit beside one unit */
	assert_int_equal(write_page(f, 1, 4096, 128, 1, TIER_LONG), 0); /* a run of them does */
	assert_int_equal(write_page(f, 1, 4096, 40, 16, TIER_LONG), 0);
	assert_int_equal(write_page(f, 1, 4 * 4096, 128, 16, TIER_LONG), 0);
	was = next_life(f);
	assert_int_equal(f->n, 3);
	assert_null(by_number(f, 1000));
	assert_same(f, was);
	free(was);
	/* More sequences than records: the last ones' pages work, and end with us. One that ends makes room. */
	for (unsigned i = 0; i < f->n; i++)
		OPS->free(f->t, f->page[i].addr, f->page[i].meta.bytes);
	f->n = 0;
	for (unsigned i = 0; i < seqs + 5; i++)
		assert_int_equal(write_page(f, 100 + i, 4096, 4, 1, TIER_LONG), 0);
	assert_true(whole(f, &f->page[seqs + 4]));
	OPS->free(f->t, f->page[0].addr, 4096);
	assert_int_equal(write_page(f, 1, 4096, 4, 1, TIER_LONG), 0);
	was = next_life(f);
	assert_int_equal(f->n, seqs);
	assert_non_null(by_number(f, was->page[was->n - 1].meta.id.page));
	assert_same(f, was);
	free(was);
	finish(f);
}

static void a_full_store_costs_only_the_keeping(void **state)
{
	struct fixture *f = begin(16 * MIB), *was;

	f->k.full = true;
	write_some(f, 10);
	assert_int_equal(f->k.n, 0);
	for (unsigned i = 0; i < f->n; i++)
		assert_true(whole(f, &f->page[i]));
	was = next_life(f);
	assert_int_equal(f->n, 0);
	free(was);
	finish(f);
}

/* ---- what must not be believed ---------------------------------------------------------------------- */

/* The directory of a kept segment, mapped beside the tier. */
struct peek {
	uint8_t *base;
	size_t size;
	struct dram_dir dir;
};

static void peek_open(struct fixture *f, unsigned i, struct peek *ret)
{
	struct stat st;
	struct dir_head *h;

	assert_int_equal(fstat(f->k.held[i].fd, &st), 0);
	ret->size = (size_t)st.st_size;
	ret->base = mmap(NULL, ret->size, PROT_READ | PROT_WRITE, MAP_SHARED, f->k.held[i].fd, 0);
	assert_true(ret->base != MAP_FAILED);
	h = (void *)(ret->base + ret->size - KVT_UNIT);
	ret->dir = (struct dram_dir){.id = h->id,
				     .slots = ret->base + h->slots_off,
				     .seq = (void *)(ret->base + h->seqs_off),
				     .units = h->units,
				     .seqs = h->seqs};
}

static void peek_close(struct peek *p)
{
	munmap(p->base, p->size);
}

/* Every bit of a record, of its sequence's and of its positions: the page is gone, the others are not. */
static void a_damaged_record_is_none(void **state)
{
	struct fixture *f = begin(16 * MIB), *was;
	uint32_t unit[3];
	struct peek p;

	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(write_page(f, 1 + i, 3 * 4096, 20, 3, TIER_LONG), 0);
		unit[i] = (uint32_t)f->page[i].addr;
	}
	peek_open(f, 0, &p);
	for (unsigned bit = 0; bit < (SLOT_HEAD + 8) * 8; bit += 3) {
		uint8_t *at = p.dir.slots + (size_t)unit[1] * DIR_SLOT;
		uint8_t save[DIR_SLOT];

		memcpy(save, at, sizeof(save));
		at[bit / 8] ^= (uint8_t)(1u << bit % 8);
		was = next_life(f);
		assert_int_equal(f->n, 2);
		assert_null(by_number(f, 1001));
		assert_same(f, was);
		assert_int_equal(stat_of(f).used, 6 * 4096);
		free(was);
		memcpy(at, save, sizeof(save));
		was = next_life(f);
		assert_int_equal(f->n, 3);
		free(was);
	}
	peek_close(&p);
	finish(f);
}

static void a_torn_record_is_none(void **state)
{
	struct fixture *f = begin(16 * MIB), *was;
	struct dir_slot *s;
	struct peek p;

	for (unsigned i = 0; i < 5; i++)
		assert_int_equal(write_page(f, 1, 4 * 4096, 30, 1, TIER_LONG), 0);
	peek_open(f, 0, &p);
	/* Not yet published, and published over an older one's fields. */
	s = slot_at(&p.dir, (uint32_t)f->page[2].addr);
	atomic_store(&s->live, 0);
	s = slot_at(&p.dir, (uint32_t)f->page[3].addr);
	s->page++;
	was = next_life(f);
	assert_int_equal(f->n, 3);
	assert_same(f, was);
	free(was);
	peek_close(&p);
	finish(f);
}

/* Records that are whole but cannot be: in each other's way, in another place, past the end, of odd classes. */
static void a_record_that_cannot_be_is_refused(void **state)
{
	struct fixture *f = begin(16 * MIB), *was;
	struct alloc_place place = {.units = 4, .run = 1};
	static const struct alloc_place odd[] = {
		{.units = 0, .run = 1},          {.units = 4, .run = 0},
		{.units = 4, .run = 5},          {.units = 4, .run = 2, .run_off = 2},
		{.units = 257, .run = 4},        {.units = 9, .run = 1},
		{.units = 3, .run = 1}, /* less than its bytes */
		{.units = UINT16_MAX, .run = 4},
	};
	struct page_meta m;
	struct peek p;
	uint32_t unit;

	assert_int_equal(write_page(f, 1, 4 * 4096, 20, 1, TIER_LONG), 0);
	unit = (uint32_t)f->page[0].addr;
	m = f->page[0].meta;
	peek_open(f, 0, &p);
	assert_int_equal(tables(&p.dir, &(struct seg){.addr = p.base, .size = p.size}, SEG, p.dir.id), 0);
	p.dir.refs[p.dir.seqs - 1] = 0;
	dir_settle(&p.dir);
	p.dir.free_head = p.dir.seqs - 1; /* not over the tier's */
	m.id.page = 5;
	dir_put(&p.dir, unit + 2, &place, &m, &f->page[0].seq); /* inside the first one's place */
	m.id.page = 6;
	dir_put(&p.dir, unit + 401, &place, &m, &f->page[0].seq); /* where no place of its class begins */
	m.id.page = 7;
	dir_put(&p.dir, p.dir.units - 4 + 2, &place, &m, &f->page[0].seq); /* past the last place */
	for (unsigned i = 0; i < ARRAY_SIZE(odd); i++) {
		struct alloc_place at = odd[i];

		m.id.page = 10 + i;
		at.units = MAX(at.units, 4); /* dir_put() needs room; the class is forged behind it */
		dir_put(&p.dir, 100 + 8 * i, &at, &m, &f->page[0].seq);
		slot_at(&p.dir, 100 + 8 * i)->units = odd[i].units;
		slot_at(&p.dir, 100 + 8 * i)->check = slot_check(
			&p.dir, 100 + 8 * i, slot_at(&p.dir, 100 + 8 * i), &p.dir.seq[p.dir.seqs - 1].rec);
	}
	/* A sound record, copied elsewhere. */
	memcpy(slot_at(&p.dir, 64), slot_at(&p.dir, unit), 4 * DIR_SLOT);
	was = next_life(f);
	assert_int_equal(f->n, 1);
	assert_same(f, was);
	assert_int_equal(stat_of(f).used, 4 * 4096);
	free(was);
	was = next_life(f); /* and the next one finds none of them any more */
	assert_int_equal(f->n, 1);
	free(was);
	dir_free(&p.dir);
	peek_close(&p);
	finish(f);
}

static void garbage_is_survived(void **state)
{
	for (uint32_t seed = 1; seed <= 150; seed++) {
		struct fixture *f = begin(64 * MIB), *was;
		struct peek p;

		f->seed = seed;
		write_some(f, 12);
		peek_open(f, 0, &p);
		for (unsigned i = 0; i < 2000; i++) {
			size_t end = p.size - KVT_UNIT - SEG;
			size_t at = draw(f, 2)
					    ? draw(f, (uint32_t)end)
					    : (uint32_t)f->page[draw(f, f->n)].addr * DIR_SLOT + draw(f, 200);

			if (at < end && draw(f, 40) == 0)
				p.dir.slots[at] = (uint8_t)draw(f, 256);
		}
		/* The word that makes a record, everywhere. */
		for (uint32_t u = 0; u < p.dir.units; u += 1 + draw(f, 3))
			atomic_store(&slot_at(&p.dir, u)->live, LIVE);
		was = next_life(f);
		assert_true(f->n <= was->n);
		assert_same(f, was);
		write_some(f, 3);
		for (unsigned i = 0; i < f->n; i++)
			OPS->free(f->t, f->page[i].addr, f->page[i].meta.bytes);
		assert_int_equal(stat_of(f).used, 0);
		assert_int_equal(stat_of(f).errors, 0);
		free(was);
		peek_close(&p);
		finish(f);
	}
}

static void a_damaged_or_newer_head_is_refused(void **state)
{
	for (unsigned bit = 0; bit < sizeof(struct dir_head) * 8; bit += 3) {
		struct fixture *f = begin(8 * MIB), *was;
		struct peek p;

		assert_int_equal(write_page(f, 1, 4096, 4, 1, TIER_LONG), 0);
		peek_open(f, 0, &p);
		p.base[p.size - KVT_UNIT + bit / 8] ^= (uint8_t)(1u << bit % 8);
		was = next_life(f);
		assert_int_equal(f->n, 0);
		assert_int_equal(f->k.refused, 1);
		assert_int_equal(f->k.n, 0);
		free(was);
		write_some(f, 3);
		peek_close(&p);
		finish(f);
	}
	for (uint32_t version = 0; version < 4; version++) {
		struct fixture *f = begin(8 * MIB), *was;
		struct dir_head *h;
		struct peek p;

		assert_int_equal(write_page(f, 1, 4096, 4, 1, TIER_LONG), 0);
		peek_open(f, 0, &p);
		h = (void *)(p.base + p.size - KVT_UNIT);
		h->version = version;
		h->check = head_check(h);
		was = next_life(f);
		assert_int_equal(f->n, version == DIR_VERSION);
		assert_int_equal(f->k.refused, version != DIR_VERSION);
		if (version != DIR_VERSION)
			assert_string_equal(f->k.why, "another version of kvtierd made it");
		free(was);
		peek_close(&p);
		finish(f);
	}
}

static void hold(struct fixture *f, const char *name, int fd)
{
	assert_true(fd >= 0);
	strcpy(f->k.held[f->k.n].name, name);
	f->k.held[f->k.n++].fd = fd;
}

static int memfd(const char *name, off_t size, int seals, mode_t mode)
{
	int fd = memfd_create(name, MFD_ALLOW_SEALING | MFD_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(fchmod(fd, mode), 0);
	assert_int_equal(ftruncate(fd, size), 0);
	if (seals)
		assert_int_equal(fcntl(fd, F_ADD_SEALS, seals), 0);
	return fd;
}

static void a_foreign_descriptor_is_refused(void **state)
{
	const int sealed = KEEPER_SEALS;
	struct fixture *f = begin(8 * MIB), *was;
	char path[] = "/tmp/kvt-keep-XXXXXX", name[TIER_KEEP_NAME], other[TIER_KEEP_NAME];
	unsigned mine, foreign;
	int fds[2];

	write_some(f, 4);
	mine = f->k.n;
	strcpy(name, f->k.held[0].name);
	strcpy(other, "dram-00000000000000ff");
	assert_int_equal(pipe(fds), 0);
	hold(f, "dram-0000000000000001", fds[0]);
	hold(f, "dram-0000000000000002", fds[1]);
	hold(f, "dram-0000000000000003", mkstemp(path));
	unlink(path);
	hold(f, "dram-0000000000000004", memfd("kvtier-dram", 0, sealed, 0600));
	hold(f, "dram-0000000000000005", memfd("kvtier-dram", (off_t)SEG, sealed, 0600));
	hold(f, "dram-0000000000000006", memfd("kvtier-dram", (off_t)(SEG + dir_bytes(SEG)), sealed, 0600));
	hold(f, "dram-0000000000000007", memfd("kvtier-dram", (off_t)1 << 60, sealed, 0600));
	hold(f, other, keeper_forge(&f->k, 0, "kvtier-dram", 0, sealed, 0600)); /* another's name */
	hold(f, "dram-0000000000000008", keeper_forge(&f->k, 0, "kvtier-dram", 0, sealed, 0600));
	/* The right name, but: */
	hold(f, name, keeper_forge(&f->k, 0, "kvtier-dram", 0, 0, 0600));             /* not sealed */
	hold(f, name, keeper_forge(&f->k, 0, "kvtier-dram", 0, F_SEAL_SHRINK, 0600)); /* not all of it */
	hold(f, name, keeper_forge(&f->k, 0, "kvtier-dram", 0, sealed | F_SEAL_WRITE, 0600)); /* read-only */
	hold(f, name, keeper_forge(&f->k, 0, "kvtier-dram", 4096, sealed, 0600));             /* too long */
	hold(f, name, keeper_forge(&f->k, 0, "kvtier-dram", -4096, sealed, 0600));            /* too short */
	hold(f, name, keeper_forge(&f->k, 0, "kvtier-dram", 0, sealed, 0666));   /* open to others */
	hold(f, name, keeper_forge(&f->k, 0, "kvtier-region", 0, sealed, 0600)); /* not made for this */
	hold(f, "dram-", keeper_forge(&f->k, 0, "kvtier-dram", 0, sealed, 0600));
	hold(f, "dram-1", keeper_forge(&f->k, 0, "kvtier-dram", 0, sealed, 0600));
	hold(f, "dram-000000000000000g", keeper_forge(&f->k, 0, "kvtier-dram", 0, sealed, 0600));
	hold(f, name, fcntl(f->k.held[0].fd, F_DUPFD_CLOEXEC, 0)); /* twice */
	foreign = f->k.n - mine;
	was = next_life(f);
	assert_int_equal(f->k.refused, foreign);
	assert_int_equal(f->n, was->n);
	assert_same(f, was);
	free(was);
	finish(f);
}

static void what_no_longer_fits_is_refused(void **state)
{
	struct fixture *f = begin(16 * MIB), *was;
	unsigned pages;

	while (f->k.n < 4)
		assert_int_equal(write_page(f, 1, 256 * 4096, 100, 1, TIER_LONG), 0);
	pages = f->n;
	f->size = 4 * MIB;
	was = next_life(f);
	assert_int_equal(f->k.refused, 2);
	assert_string_equal(f->k.why, "does not fit in [dram] size");
	assert_int_equal(f->k.n, 2);
	assert_true(f->n >= 2 && f->n < pages);
	assert_same(f, was);
	free(was);
	finish(f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(pages_are_found_again),
		cmocka_unit_test(what_is_freed_or_fleeting_is_not),
		cmocka_unit_test(what_the_owner_refuses_is_free_for_good),
		cmocka_unit_test(a_full_tier_comes_back_whole),
		cmocka_unit_test(a_page_that_does_not_fit_is_not_kept),
		cmocka_unit_test(a_full_store_costs_only_the_keeping),
		cmocka_unit_test(a_damaged_record_is_none),
		cmocka_unit_test(a_torn_record_is_none),
		cmocka_unit_test(a_record_that_cannot_be_is_refused),
		cmocka_unit_test(garbage_is_survived),
		cmocka_unit_test(a_damaged_or_newer_head_is_refused),
		cmocka_unit_test(a_foreign_descriptor_is_refused),
		cmocka_unit_test(what_no_longer_fits_is_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
