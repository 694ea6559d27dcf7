/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A disk with a volatile cache, as an engine below the NVMe tier. Requests are carried out one at a time, in an
 * order that a seed chooses; what was written since the last flush is kept together with what it
 * replaced. When the power goes, any part of that is on the medium, torn at the sector size, in any order:
 *
 *   written    ── IO_WRITE ──→ file (what reads return), and the log of what is not flushed
 *   flushed    ── IO_SYNC ───→ what had been carried out before the flush was asked for leaves the log
 *   cut        the log is undone, then some of its sectors are done again; every request fails from then on
 *
 * A disk may also lie: a write is lost, torn or put elsewhere although it is reported as done and flushed.
 * Where that happened is kept (disk_hit).
 *
 * One disk at a time, all of it on the owner's thread.
 */
#include <errno.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>
#include "shm/util.h"
#include "tiers/nvme_format.h"
#include "tiers/nvme_io.h"

#define DISK_PENDING 512u

struct disk_write {
	uint32_t file, len;
	uint64_t off, at; /* at: number of the operation */
	char *data, *old; /* owned; old: NULL when it was not carried out before the cut */
};

struct disk_range {
	uint32_t file;
	uint64_t from, to;
};

static struct disk {
	struct io_engine engine;
	struct io_cfg cfg;
	uint64_t rng, now, cut_at; /* operations so far; the power goes at that one (0: never) */
	uint32_t sector;
	uint16_t lost, torn, stray; /* in 1/1000 of the writes */
	bool off;
	struct io_req *pending[DISK_PENDING];
	unsigned npending;
	struct io_queue done;
	struct disk_write *log; /* oldest first */
	unsigned nlog, log_cap;
	struct disk_range *hit;
	unsigned nhit, hit_cap;
	uint64_t lies[3];                        /* lost, torn, stray */
	uint64_t cut_writes, cut_torn, cut_gone; /* at cuts: not flushed, of them in part, of them not at all */
} disk;

static inline uint64_t disk_rand(void)
{
	disk.rng ^= disk.rng << 13;
	disk.rng ^= disk.rng >> 7;
	disk.rng ^= disk.rng << 17;
	return disk.rng * UINT64_C(0x2545f4914f6cdd1d) >> 11;
}

static inline void *disk_alloc(size_t len)
{
	void *p = aligned_alloc(KVT_UNIT, ALIGN_UP(len, KVT_UNIT));

	if (!p)
		abort();
	return p;
}

/* The model's own I/O, which must work. */
static inline void disk_pread(uint32_t file, void *buf, uint32_t len, uint64_t off)
{
	if (pread(disk.cfg.fd[file], buf, len, (off_t)off) != (ssize_t)len)
		abort();
}
static inline void disk_pwrite(uint32_t file, const void *buf, uint32_t len, uint64_t off)
{
	if (pwrite(disk.cfg.fd[file], buf, len, (off_t)off) != (ssize_t)len)
		abort();
}

static inline void *disk_grow(void *p, unsigned n, unsigned *cap, size_t size)
{
	if (n < *cap)
		return p;
	*cap = MAX(64u, *cap * 2);
	p = realloc(p, *cap * size);
	if (!p)
		abort();
	return p;
}

static inline void disk_hit(uint32_t file, uint64_t from, uint64_t len)
{
	disk.hit = disk_grow(disk.hit, disk.nhit, &disk.hit_cap, sizeof(*disk.hit));
	disk.hit[disk.nhit++] = (struct disk_range){file, from, from + len};
}

/* Did the disk lie about any of these bytes? */
static inline bool disk_lied(uint32_t file, uint64_t from, uint64_t len)
{
	for (unsigned i = 0; i < disk.nhit; i++)
		if (disk.hit[i].file == file && disk.hit[i].from < from + len && from < disk.hit[i].to)
			return true;
	return false;
}

static inline void disk_log_free(struct disk_write *w)
{
	free(w->data);
	free(w->old);
}

/* Forget lies and log. */
static inline void disk_reset(uint64_t seed)
{
	for (unsigned i = 0; i < disk.nlog; i++)
		disk_log_free(&disk.log[i]);
	disk.nlog = disk.nhit = disk.npending = 0;
	disk.rng = seed | 1;
	disk.now = disk.cut_at = 0;
	disk.sector = 512;
	disk.lost = disk.torn = disk.stray = 0;
	disk.off = false;
}

/* Overlay some sectors of data on what is there. Returns how many. */
static inline uint32_t disk_some(char *there, const char *data, uint32_t len, bool all)
{
	uint32_t n = 0;

	for (uint32_t at = 0; at < len; at += disk.sector) {
		if (!all && disk_rand() % 2)
			continue;
		memcpy(there + at, data + at, MIN(disk.sector, len - at));
		n++;
	}
	return n;
}

static inline void disk_land(const struct disk_write *w)
{
	unsigned how = (unsigned)(disk_rand() % 4);
	_cleanup_free_ char *there = NULL;

	disk.cut_writes++;
	disk.cut_gone += how == 0;
	disk.cut_torn += how > 1;
	if (!how)
		return;
	there = disk_alloc(w->len);
	disk_pread(w->file, there, w->len, w->off);
	disk_some(there, w->data, w->len, how == 1);
	disk_pwrite(w->file, there, w->len, w->off);
}

static inline void disk_note(uint32_t file, uint64_t off, uint32_t len, const void *data, bool carried_out)
{
	struct disk_write *w;

	disk.log = disk_grow(disk.log, disk.nlog, &disk.log_cap, sizeof(*disk.log));
	w = &disk.log[disk.nlog++];
	*w = (struct disk_write){.file = file, .off = off, .len = len, .at = disk.now, .data = disk_alloc(len)};
	memcpy(w->data, data, len);
	if (!carried_out)
		return;
	w->old = disk_alloc(len);
	disk_pread(file, w->old, len, off);
	disk_pwrite(file, data, len, off);
}

/* The power goes. */
static inline void disk_cut(void)
{
	if (disk.off)
		return;
	disk.off = true;
	for (unsigned i = disk.nlog; i-- > 0;)
		disk_pwrite(disk.log[i].file, disk.log[i].old, disk.log[i].len, disk.log[i].off);
	for (unsigned i = 0; i < disk.npending; i++) {
		const struct io_req *r = disk.pending[i];

		if (r->op == IO_WRITE)
			disk_note(r->file, r->off, r->len, r->buf, false);
	}
	for (unsigned i = disk.nlog; i > 1; i--) {
		unsigned k = (unsigned)(disk_rand() % i);
		struct disk_write w = disk.log[k];

		disk.log[k] = disk.log[i - 1];
		disk.log[i - 1] = w;
	}
	for (unsigned i = 0; i < disk.nlog; i++) {
		disk_land(&disk.log[i]);
		disk_log_free(&disk.log[i]);
	}
	disk.nlog = 0;
}

/* ---- requests ------------------------------------------------------------------------- */

/* Somewhere else in the same file, superblocks excepted: for those there are two copies, and a test of its own.
 */
static inline uint64_t disk_elsewhere(const struct io_req *r)
{
	struct stat st;

	if (fstat(disk.cfg.fd[r->file], &st) < 0)
		abort();
	return NVME_PREAMBLE +
	       disk_rand() % ((uint64_t)(st.st_size - NVME_PREAMBLE - r->len) / KVT_UNIT + 1) * KVT_UNIT;
}

static inline void disk_write(const struct io_req *r)
{
	unsigned x = (unsigned)(disk_rand() % 1000);
	_cleanup_free_ char *there = NULL;
	uint64_t off;

	if (x < disk.lost) {
		disk.lies[0]++;
		disk_hit(r->file, r->off, r->len);
	} else if (x < 0u + disk.lost + disk.torn) {
		disk.lies[1]++;
		disk_hit(r->file, r->off, r->len);
		there = disk_alloc(r->len);
		disk_pread(r->file, there, r->len, r->off);
		disk_some(there, r->buf, r->len, false);
		disk_note(r->file, r->off, r->len, there, true);
	} else if (x < 0u + disk.lost + disk.torn + disk.stray) {
		off = disk_elsewhere(r);
		disk.lies[2]++;
		disk_hit(r->file, r->off, r->len);
		disk_hit(r->file, off, r->len);
		disk_note(r->file, off, r->len, r->buf, true);
	} else {
		disk_note(r->file, r->off, r->len, r->buf, true);
	}
}

/* r->done of a flush is the number of the operation before which it was asked for. */
static inline void disk_sync(const struct io_req *r)
{
	unsigned n = 0;

	for (unsigned i = 0; i < disk.nlog; i++) {
		struct disk_write *w = &disk.log[i];

		if (w->file == r->file && w->at <= r->done)
			disk_log_free(w);
		else
			disk.log[n++] = *w;
	}
	disk.nlog = n;
}

static inline void disk_carry_out(unsigned i)
{
	struct io_req *r = disk.pending[i];

	if (!disk.off && ++disk.now == disk.cut_at)
		disk_cut();
	for (disk.npending--; i < disk.npending; i++)
		disk.pending[i] = disk.pending[i + 1];
	r->res = disk.off ? -EIO : 0;
	if (!disk.off && r->op == IO_READ)
		disk_pread(r->file, r->buf, r->len, r->off);
	else if (!disk.off && r->op == IO_WRITE)
		disk_write(r);
	else if (!disk.off)
		disk_sync(r);
	io_queue_add(&disk.done, r);
}

static inline int disk_open(struct io_engine **ret, const struct io_cfg *cfg, char *note, size_t notesize);

static inline void disk_submit(struct io_engine *e, struct io_req *list)
{
	for (struct io_req *r = list, *next; r; r = next) {
		next = r->next;
		if (disk.npending == DISK_PENDING)
			disk_carry_out(0);
		if (r->op == IO_SYNC)
			r->done = (uint32_t)disk.now;
		disk.pending[disk.npending++] = r;
	}
	eventfd_write(disk.cfg.event_fd, 1);
}

/* At least one request ends, and any number of others, in any order. */
static inline struct io_req *disk_reap(struct io_engine *e)
{
	unsigned n = disk.npending ? 1 + (unsigned)(disk_rand() % disk.npending) : 0;
	struct io_req *list;

	while (n--)
		disk_carry_out((unsigned)(disk_rand() % disk.npending));
	if (disk.npending)
		eventfd_write(disk.cfg.event_fd, 1);
	list = disk.done.head;
	io_queue_init(&disk.done);
	return list;
}

static inline int disk_close(struct io_engine *e, unsigned timeout_ms)
{
	return 0;
}

static const struct io_ops disk_ops = {
	.name = "model", .open = disk_open, .submit = disk_submit, .reap = disk_reap, .close = disk_close};

static inline int disk_open(struct io_engine **ret, const struct io_cfg *cfg, char *note, size_t notesize)
{
	disk.engine.ops = &disk_ops;
	disk.cfg = *cfg;
	disk.off = false;
	disk.npending = 0;
	io_queue_init(&disk.done);
	*ret = &disk.engine;
	return 0;
}
