/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A store in a directory of its own and a model of what is in it: every page has
 * a number, contents and positions that follow from the number, so any page
 * found or read can be checked against the model.
 */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <signal.h>
#include "shm/bits.h"
#include "shm/crc.h"
#include "shm/util.h"
#include "tiers/nvme.h"

#define FX_PAGES 16384
#define FX_BATCH 64

struct fx_page {
	tier_addr addr;
	uint32_t bytes, crc;
	bool live;
	bool failed;    /* its write did: nobody may ever find it */
	uint32_t found; /* times the scan showed it */
};

struct fx {
	char dir[64];
	struct tier_cfg cfg;
	struct nvme_knobs knobs;
	struct tier *t;
	char err[256];
	struct fx_page page[FX_PAGES]; /* by page number */
	uint64_t next;                 /* page number */
	uint32_t per_seq;              /* consecutive pages of one sequence */
	uint64_t moves, bad_finds;
	uint64_t rng;
	bool may_fail; /* writes may */
};

static inline uint64_t fx_rand(struct fx *f)
{
	f->rng ^= f->rng << 13;
	f->rng ^= f->rng >> 7;
	f->rng ^= f->rng << 17;
	return f->rng;
}

static inline void fx_init(struct fx *f)
{
	f->cfg = (struct tier_cfg){.path = f->dir,
				   .size = 32 << 20,
				   .segment = 1 << 20,
				   .staging = 8 << 20,
				   .depth = 16,
				   .deadline_ms = 8000};
	f->per_seq = 16;
	f->rng = 88172645463325252;
}

static inline struct fx *fx_new_in(const char *top)
{
	struct fx *f = calloc(1, sizeof(*f));

	assert_non_null(f);
	assert_in_range(snprintf(f->dir, sizeof(f->dir), "%s/kvt-nvme-XXXXXX", top), 1, sizeof(f->dir) - 1);
	assert_non_null(mkdtemp(f->dir));
	fx_init(f);
	return f;
}

static inline struct fx *fx_new(void)
{
	return fx_new_in("/tmp");
}

static inline int fx_try_open(struct fx *f)
{
	return nvme_open_with(&f->t, &f->cfg, &f->knobs, f->err, sizeof(f->err));
}

static inline void fx_open(struct fx *f)
{
	int r = fx_try_open(f);

	if (r < 0)
		print_message("# open: %d %s\n", r, f->err);
	assert_int_equal(r, 0);
}

static inline void fx_close(struct fx *f)
{
	if (f->t)
		f->t->ops->close(f->t);
	f->t = NULL;
}

static inline void fx_free(struct fx *f)
{
	DIR *d;

	fx_close(f);
	if ((d = opendir(f->dir))) {
		for (struct dirent *e; (e = readdir(d));)
			(void)unlinkat(dirfd(d), e->d_name, 0);
		closedir(d);
	}
	rmdir(f->dir);
	free(f);
}

static inline void fx_path(struct fx *f, char ret[128], const char *name)
{
	snprintf(ret, 128, "%s/%s", f->dir, name);
}

/* ---- what page `no` is ---------------------------------------------------------- */

static inline uint64_t fx_mix(uint64_t x)
{
	x ^= x >> 31;
	x *= UINT64_C(0x7fb5d329728ea185);
	x ^= x >> 27;
	x *= UINT64_C(0x81dadef4bc2dd44d);
	return x ^ x >> 33;
}

static inline struct page_ident fx_ident(const struct fx *f, uint64_t no)
{
	struct page_ident id = {.page = no, .tenant = 7, .lane = (uint32_t)no % 90, .epoch = 3, .rows = 40};
	uint64_t seq = no / f->per_seq;

	memcpy(id.key, &seq, sizeof(seq));
	id.first = (uint32_t)(no % 1000);
	return id;
}

static inline struct seq_record fx_seq(const struct fx *f, uint64_t no)
{
	struct seq_record s = {
		.tenant = 7, .model = 11, .lanes = 90, .born_lo = 5000, .born_hi = 3, .lifetime = 1};
	struct page_ident id = fx_ident(f, no);

	memcpy(s.key, id.key, sizeof(s.key));
	memset(s.secret_hash, (int)(no / f->per_seq), sizeof(s.secret_hash));
	return s;
}

#define FX_WORDS 40
/* Positions: dense for even pages, scattered for odd ones, none for every seventh. */
static inline uint32_t fx_positions(uint64_t no, uint64_t pos[FX_WORDS])
{
	memset(pos, 0, FX_WORDS * sizeof(*pos));
	if (no % 7 == 0)
		return 0;
	for (uint32_t i = 0; i < 40; i++)
		bits_set(pos, no % 2 ? i * 63 : i);
	return FX_WORDS;
}

static inline void fx_fill(uint64_t no, void *buf, uint32_t bytes)
{
	uint64_t x = fx_mix(no + 1);

	for (uint32_t i = 0; i < bytes; i++) {
		if (i % 8 == 0)
			x = fx_mix(x + i);
		((uint8_t *)buf)[i] = (uint8_t)(x >> i % 8 * 8);
	}
}

static inline uint32_t fx_crc(const struct fx *f, uint64_t no, const void *buf, uint32_t bytes)
{
	struct page_ident id = fx_ident(f, no);

	return crc32c(page_crc_seed(&id), buf, bytes);
}

/* ---- moving pages ----------------------------------------------------------------- */

static inline void fx_wait(struct fx *f)
{
	struct pollfd pfd = {.fd = f->t->ops->event_fd(f->t), .events = POLLIN};

	assert_int_equal(poll(&pfd, 1, 10000), 1);
}

static inline bool fx_moved(void *arg, const struct page_meta *m, tier_addr from, tier_addr to)
{
	struct fx *f = arg;
	struct fx_page *p;

	assert_in_range(m->id.page, 0, FX_PAGES - 1);
	p = &f->page[m->id.page];
	assert_true(p->live); /* dead ones are never announced */
	assert_true(p->addr == from);
	assert_int_equal(m->bytes, p->bytes);
	p->addr = to;
	f->moves++;
	return true;
}

static inline void fx_tick(struct fx *f)
{
	f->t->ops->tick(f->t, fx_moved, f);
}

static inline void fx_written(struct fx *f, struct tier_io *io)
{
	struct fx_page *p = io->user;

	p->live = io->res == 0;
	p->failed = !p->live;
	if (p->failed && f->may_fail) {
		assert_true(io->addr == TIER_ADDR_NONE);
		return;
	}
	assert_int_equal(io->res, 0);
	p->addr = io->addr;
	p->bytes = io->bytes;
	p->crc = io->meta.crc;
}

/*
 * Write n new pages of `bytes` each, in batches. Returns how many were submitted; fewer means that
 * prepare said *ret_why.
 */
static inline unsigned fx_write(struct fx *f, unsigned n, uint32_t bytes, uint8_t life, int *ret_why)
{
	const struct tier_ops *ops = f->t->ops;
	uint64_t pos[FX_BATCH][FX_WORDS];
	struct seq_record seq[FX_BATCH];
	struct tier_io io[FX_BATCH], *ios[FX_BATCH], *done[FX_BATCH];
	unsigned stored = 0;
	int r = 0;

	while (stored < n && !r) {
		unsigned k = 0, left;

		while (k < FX_BATCH && stored + k < n) {
			uint64_t no = f->next;

			assert_true(no < FX_PAGES);
			seq[k] = fx_seq(f, no);
			io[k] = (struct tier_io){
				.op = TIER_WRITE, .bytes = bytes, .life = life, .seq = &seq[k]};
			io[k].meta.id = fx_ident(f, no);
			io[k].meta.bytes = bytes;
			io[k].meta.pos_words = fx_positions(no, pos[k]);
			io[k].meta.pos = pos[k];
			io[k].user = &f->page[no];
			r = ops->prepare(f->t, &io[k]);
			if (r < 0)
				break;
			fx_fill(no, io[k].buf, bytes);
			io[k].meta.crc = fx_crc(f, no, io[k].buf, bytes);
			ios[k] = &io[k];
			f->next++;
			k++;
		}
		if (r == -EAGAIN)
			r = 0;
		ops->submit(f->t, ios, k);
		for (left = k; left;) {
			unsigned got = ops->reap(f->t, done, FX_BATCH);

			if (!got)
				fx_wait(f);
			for (unsigned i = 0; i < got; i++, left--) {
				fx_written(f, done[i]);
				ops->release(f->t, done[i]);
			}
		}
		stored += k;
	}
	if (ret_why)
		*ret_why = r;
	else
		assert_int_equal(r, 0);
	return stored;
}

static inline void fx_kill(struct fx *f, uint64_t no)
{
	if (!f->page[no].live)
		return;
	f->t->ops->free(f->t, f->page[no].addr, f->page[no].bytes);
	f->page[no].live = false;
}

enum fx_read { FX_RIGHT, FX_MISS, FX_GONE };

/*
 * Read one page as the mover does: a checksum that does not match its identity, like an I/O error, is a miss.
 * What passes must be what was written, byte for byte. FX_GONE: the tier has no such page.
 */
static inline enum fx_read fx_check(struct fx *f, uint64_t no)
{
	const struct fx_page *p = &f->page[no];
	struct tier_io io = {.op = TIER_READ, .bytes = p->bytes, .addr = p->addr}, *one = &io, *done;
	enum fx_read is = FX_MISS;
	char *want;
	int r;

	r = f->t->ops->prepare(f->t, &io);
	if (r < 0)
		return FX_GONE;
	f->t->ops->submit(f->t, &one, 1);
	while (!f->t->ops->reap(f->t, &done, 1))
		fx_wait(f);
	if (!io.res && fx_crc(f, no, io.buf, io.bytes) == p->crc) {
		want = malloc(io.bytes);
		assert_non_null(want);
		fx_fill(no, want, io.bytes);
		assert_memory_equal(io.buf, want, io.bytes);
		free(want);
		is = FX_RIGHT;
	}
	f->t->ops->release(f->t, &io);
	return is;
}

/* Read every live page back, many at a time, and compare it with what it must be. Returns how many. */
static inline unsigned fx_verify(struct fx *f)
{
	const struct tier_ops *ops = f->t->ops;
	struct tier_io io[FX_BATCH], *ios[FX_BATCH], *done[FX_BATCH];
	unsigned n = 0;
	uint64_t no = 0;
	char *want = malloc(TIER_MAX_PAGE);

	while (no < f->next) {
		unsigned k = 0;

		for (; no < f->next && k < FX_BATCH; no++) {
			int r;

			if (!f->page[no].live)
				continue;
			io[k] = (struct tier_io){.op = TIER_READ,
						 .bytes = f->page[no].bytes,
						 .addr = f->page[no].addr,
						 .user = &f->page[no]};
			r = ops->prepare(f->t, &io[k]);
			if (r == -EAGAIN)
				break;
			assert_int_equal(r, 0);
			ios[k] = &io[k];
			k++;
		}
		ops->submit(f->t, ios, k);
		for (unsigned left = k; left;) {
			unsigned got = ops->reap(f->t, done, FX_BATCH);

			if (!got)
				fx_wait(f);
			for (unsigned i = 0; i < got; i++, left--, n++) {
				struct fx_page *p = done[i]->user;

				assert_int_equal(done[i]->res, 0);
				fx_fill((uint64_t)(p - f->page), want, p->bytes);
				assert_memory_equal(done[i]->buf, want, p->bytes);
				ops->release(f->t, done[i]);
			}
		}
	}
	free(want);
	return n;
}

static inline unsigned fx_live(const struct fx *f)
{
	unsigned n = 0;

	for (uint64_t no = 0; no < f->next; no++)
		n += f->page[no].live;
	return n;
}

/* scan callback: what is found must be a page of the model, described as it was written. */
static inline bool fx_found(void *arg, tier_addr addr, const struct page_meta *m, const struct seq_record *s)
{
	struct fx *f = arg;
	uint64_t pos[FX_WORDS], no = m->id.page;
	uint32_t words = fx_positions(no, pos);
	struct page_ident id = fx_ident(f, no);
	struct seq_record seq = fx_seq(f, no);
	struct fx_page *p;

	assert_in_range(no, 0, FX_PAGES - 1);
	p = &f->page[no];
	assert_memory_equal(&m->id, &id, sizeof(id));
	assert_non_null(s);
	assert_memory_equal(s, &seq, sizeof(seq));
	assert_int_equal(m->pos_words, words);
	if (words)
		assert_memory_equal(m->pos, pos, words * sizeof(*pos));
	if (p->failed || (p->bytes && p->bytes != m->bytes))
		f->bad_finds++;
	if (p->found++) /* the owner takes one, as the daemon does; that it was there twice is counted */
		return false;
	p->addr = addr;
	p->bytes = m->bytes;
	p->crc = m->crc;
	return true;
}

static inline void fx_scan(struct fx *f)
{
	for (uint64_t no = 0; no < FX_PAGES; no++)
		f->page[no].found = 0;
	assert_int_equal(f->t->ops->scan(f->t, fx_found, f), 0);
	assert_int_equal(f->bad_finds, 0);
}

static inline void fx_stat(struct fx *f, struct tier_stat *ret)
{
	f->t->ops->stat(f->t, ret);
}
