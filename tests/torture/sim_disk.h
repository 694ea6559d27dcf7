/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The engine below the NVMe tier: requests end in an order, at a time and with a result that the seed chooses.
 * What was written and not flushed since is remembered, sector by sector, and a power cut keeps of it what it
 * likes: of a request still under way too.
 */
#include <sys/eventfd.h>
#include "tests/torture/sim_world.h"
#include "tiers/nvme.h"

#define SECTOR 512u
#define DISK_PENDING 4096u

struct disk_req {
	struct io_req *r;
	uint64_t due, order; /* writes before `order` are covered by this flush */
};
struct disk_undo { /* one write that no flush covered yet */
	uint64_t order, off;
	uint32_t len;
	uint16_t file;
	uint8_t *old, *new_;
};
struct disk {
	struct io_engine engine;
	struct io_cfg cfg;
	bool open, dead; /* dead: the power is gone, nothing is done any more */
	struct disk_req req[DISK_PENDING];
	unsigned n;
	struct io_queue done;
	struct disk_undo *undo;
	size_t n_undo, cap_undo;
	uint64_t order;
	/* what may go wrong, of 1,000 */
	uint32_t eio_read, eio_write, eio_sync, enospc, stall;
	uint64_t least_ns, most_ns; /* how long one takes */
	uint64_t reads, writes, syncs, errors;
};
static struct disk disk;

static inline int disk_io(uint16_t file, bool write, void *buf, size_t len, uint64_t off)
{
	ssize_t n = write ? pwrite(disk.cfg.fd[file], buf, len, (off_t)off)
			  : pread(disk.cfg.fd[file], buf, len, (off_t)off);

	return n == (ssize_t)len ? 0 : -EIO;
}

/* What lies there now, to be put back should the power go. */
static inline void disk_remember(const struct io_req *r)
{
	struct disk_undo u = {.order = ++disk.order, .off = r->off, .len = r->len, .file = r->file};

	if (disk.n_undo == disk.cap_undo) {
		disk.cap_undo = disk.cap_undo ? disk.cap_undo * 2 : 64;
		disk.undo = realloc(disk.undo, disk.cap_undo * sizeof(u));
	}
	u.old = malloc(r->len);
	u.new_ = malloc(r->len);
	if (!disk.undo || !u.old || !u.new_)
		abort();
	if (disk_io(r->file, false, u.old, r->len, r->off) < 0)
		memset(u.old, 0, r->len);
	memcpy(u.new_, r->buf, r->len);
	disk.undo[disk.n_undo++] = u;
}

static inline void disk_flushed(uint16_t file, uint64_t order)
{
	size_t out = 0;

	for (size_t i = 0; i < disk.n_undo; i++) {
		struct disk_undo *u = &disk.undo[i];

		if (u->file == file && u->order <= order) {
			free(u->old);
			free(u->new_);
		} else {
			disk.undo[out++] = *u;
		}
	}
	disk.n_undo = out;
}

static inline int disk_carry_out(const struct disk_req *q)
{
	struct io_req *r = q->r;

	if (disk.dead)
		return -EIO;
	switch (r->op) {
	case IO_READ:
		disk.reads++;
		return permille(disk.eio_read) ? -EIO : disk_io(r->file, false, r->buf, r->len, r->off);
	case IO_WRITE:
		disk.writes++;
		disk_remember(r);
		if (permille(disk.eio_write)) { /* some of it may be there all the same */
			(void)disk_io(r->file, true, r->buf, below(r->len / SECTOR + 1) * SECTOR, r->off);
			return -EIO;
		}
		if (permille(disk.enospc))
			return -ENOSPC;
		return disk_io(r->file, true, r->buf, r->len, r->off);
	default:
		disk.syncs++;
		if (permille(disk.eio_sync))
			return -EIO;
		disk_flushed(r->file, q->order);
		return 0;
	}
}

/* One request that is due ends: any of them. False: none is. */
static inline bool disk_step(void)
{
	unsigned due = 0, pick;
	struct disk_req q;

	for (unsigned i = 0; i < disk.n; i++)
		due += disk.req[i].due <= world.now || disk.dead;
	if (!due)
		return false;
	pick = below(due);
	for (unsigned i = 0;; i++)
		if ((disk.req[i].due <= world.now || disk.dead) && !pick--) {
			q = disk.req[i];
			memmove(&disk.req[i], &disk.req[i + 1], (--disk.n - i) * sizeof(q));
			break;
		}
	q.r->res = disk_carry_out(&q);
	q.r->done = q.r->res ? 0 : q.r->len;
	disk.errors += q.r->res < 0;
	record("io", q.r->op, q.r->off, q.r->len, (uint64_t)(int64_t)q.r->res);
	io_queue_add(&disk.done, q.r);
	(void)eventfd_write(disk.cfg.event_fd, 1);
	return true;
}

/* When the next one is due; 0: nothing is under way. */
static inline uint64_t disk_next(void)
{
	uint64_t next = 0;

	for (unsigned i = 0; i < disk.n; i++)
		next = !next || disk.req[i].due < next ? disk.req[i].due : next;
	return next;
}

/* ---- the engine ------------------------------------------------------------------------ */

static const struct io_ops disk_ops;

static int disk_open(struct io_engine **ret, const struct io_cfg *cfg, char *note, size_t notesize)
{
	must(!disk.open, "the disk is opened twice");
	disk.engine.ops = &disk_ops;
	disk.cfg = *cfg;
	disk.n = 0;
	disk.open = true;
	io_queue_init(&disk.done);
	*ret = &disk.engine;
	return 0;
}

static void disk_submit(struct io_engine *e, struct io_req *list)
{
	for (struct io_req *next; list; list = next) {
		struct disk_req *q = &disk.req[disk.n];
		uint64_t ns = disk.least_ns + chance() % (disk.most_ns - disk.least_ns + 1);

		next = list->next;
		must(disk.n++ < DISK_PENDING - 1, "%u requests under way", disk.n);
		if (permille(disk.stall))
			ns += UINT64_C(1000000000) * between(1, 30);
		*q = (struct disk_req){.r = list, .due = world.now + ns, .order = disk.order};
	}
}

static struct io_req *disk_reap(struct io_engine *e)
{
	struct io_req *list = disk.done.head;

	io_queue_init(&disk.done);
	return list;
}

/* A disk that answers in the end: nothing is stuck for ever. */
static int disk_close(struct io_engine *e, unsigned timeout_ms)
{
	for (; disk.n; disk.n--)
		disk.req[disk.n - 1].r->res = -ECANCELED;
	disk.open = false;
	return 0;
}

static const struct io_ops disk_ops = {
	.name = "simulated",
	.open = disk_open,
	.submit = disk_submit,
	.reap = disk_reap,
	.close = disk_close,
};

static int disk_tier_open(struct tier **ret, const struct tier_cfg *cfg, char *err, size_t errsize)
{
	static const struct nvme_knobs knobs = {.engine = &disk_ops, .file_segments = 12};

	return nvme_open_with(ret, cfg, &knobs, err, errsize);
}

/* ---- the power -------------------------------------------------------------------------- */

/*
 * From here on nothing reaches the disk: requests under way do so in part, sector by sector. disk_cut() says
 * what was lost of the writes that no flush covered, when the files are open nowhere any more.
 */
static inline void disk_off(void)
{
	for (unsigned i = 0; i < disk.n; i++) {
		struct io_req *r = disk.req[i].r;

		if (r->op != IO_WRITE || one_in(3))
			continue;
		disk_remember(r);
		(void)disk_io(r->file, true, r->buf, r->len, r->off);
	}
	disk.dead = true;
}

/* The process is gone, the kernel goes on: what it was given is done, or was not given yet. */
static inline void disk_killed(void)
{
	for (unsigned i = 0; i < disk.n; i++) {
		struct io_req *r = disk.req[i].r;

		if (r->op != IO_WRITE || one_in(2))
			continue;
		disk_remember(r);
		(void)disk_io(r->file, true, r->buf, r->len, r->off);
	}
	disk.dead = true;
}

/* Newest first: where one write's sector stays, earlier ones of the same place do not matter any more. */
static inline void disk_cut(int (*file)(unsigned i))
{
	uint32_t lose = below(4) * 333;
	struct {
		uint64_t at;
		uint16_t file;
	} * kept;
	size_t n = 0, cap = 0;

	for (size_t i = 0; i < disk.n_undo; i++)
		cap += disk.undo[i].len / SECTOR;
	kept = calloc(cap + 1, sizeof(*kept));
	for (size_t i = disk.n_undo; i-- > 0;) {
		struct disk_undo *u = &disk.undo[i];
		int fd = file(u->file);

		for (uint32_t s = 0; s < u->len; s += SECTOR) {
			size_t k = 0;

			if (!memcmp(u->old + s, u->new_ + s, SECTOR))
				continue;
			while (k < n && (kept[k].at != u->off + s || kept[k].file != u->file))
				k++;
			if (k < n)
				continue;
			if (!permille(lose)) {
				kept[n].at = u->off + s;
				kept[n++].file = u->file;
			} else if (pwrite(fd, u->old + s, SECTOR, (off_t)(u->off + s)) != SECTOR) {
				abort();
			}
		}
		free(u->old);
		free(u->new_);
		close(fd);
	}
	free(kept);
	disk.n_undo = 0;
	disk.dead = false;
}

static inline void disk_forget(void)
{
	for (size_t i = 0; i < disk.n_undo; i++) {
		free(disk.undo[i].old);
		free(disk.undo[i].new_);
	}
	free(disk.undo);
	memset(&disk, 0, sizeof(disk));
}
