/* SPDX-License-Identifier: MIT */
/*
 * Private segments that outlive the process. Each is kept under a name of its own, "dram-" and 64 random bits
 * that its directory repeats, from when it is made until it is given back. A later life takes over those that
 * verify, walks their directories and puts in use what its owner still wants; everything else in them is free.
 */
#include "tiers/dram.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#define NAME_FORMAT "dram-%016llx"

static void name_of(uint64_t id, char name[TIER_KEEP_NAME])
{
	snprintf(name, TIER_KEEP_NAME, NAME_FORMAT, (unsigned long long)id);
}

/* 0: it is none of ours. */
static uint64_t id_of(const char *name)
{
	unsigned long long id;
	char again[TIER_KEEP_NAME];

	if (sscanf(name, "dram-%16llx", &id) != 1)
		return 0;
	name_of(id, again);
	return strcmp(name, again) ? 0 : id;
}

int dram_keep(const struct dram *d, const struct seg *s, uint64_t bytes, struct dram_dir *ret)
{
	struct dram_dir dir;
	char name[TIER_KEEP_NAME];
	uint64_t id = 0;
	int r;

	while (!id)
		if (getrandom(&id, sizeof(id), 0) != sizeof(id))
			return -EIO;
	r = dir_make(&dir, s, bytes, id);
	if (r < 0)
		return r;
	name_of(id, name);
	r = d->keep->store(d->keep->arg, name, s->fd);
	if (r < 0)
		dir_free(&dir);
	else
		*ret = dir;
	return r;
}

void dram_unkeep(const struct dram *d, const struct dram_dir *dir)
{
	char name[TIER_KEEP_NAME];

	if (!dir->id)
		return;
	name_of(dir->id, name);
	d->keep->drop(d->keep->arg, name);
}

/* ---- taking over ---------------------------------------------------------------------------- */

/* A memfd that we made: its name cannot be given to another file. */
static bool ours(int fd, const struct stat *st)
{
	char path[40], link[64];
	ssize_t n;

	if (st->st_uid != geteuid() || (st->st_mode & 0777) != 0600)
		return false;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, link, sizeof(link) - 1);
	if (n < 0)
		return false;
	link[n] = 0;
	return !strcmp(link, "/memfd:kvtier-dram (deleted)");
}

static bool have(const struct dram *d, uint64_t id)
{
	for (uint32_t i = 0; i < d->top; i++)
		if (d->slot[i].pool && d->slot[i].dir.id == id)
			return true;
	return false;
}

/* One segment. On failure *why says what is wrong with it. */
static int adopt(struct dram *d, struct tier_kept *k, const char **why)
{
	struct dram_dir dir = {0};
	struct seg s = SEG_INIT;
	uint64_t id = id_of(k->name), bytes = 0;
	uint32_t node;
	struct stat st;
	int r = -EPROTO;

	*why = "is not a memfd of ours";
	if (!id || fstat(k->fd, &st) < 0 || !ours(k->fd, &st))
		return r;
	*why = "is there twice";
	if (have(d, id))
		return r;
	*why = "has a size that no segment has";
	if ((uint64_t)st.st_size < ALLOC_SLAB_BYTES + dir_bytes(ALLOC_SLAB_BYTES) ||
	    (uint64_t)st.st_size >= 2 * ALLOC_MAX_SLABS * ALLOC_SLAB_BYTES)
		return r;
	*why = "is not sealed as a private segment, or cannot be mapped";
	r = seg_map(&s, SEG_PRIVATE, k->fd, (size_t)st.st_size);
	if (r < 0)
		return r;
	r = dir_adopt(&dir, &s, id, &bytes, why);
	node = dram_node_of(d, &s, bytes);
	dram_place_seg(d, &s, node);
	if (!r && bytes > d->capacity - d->mapped) {
		*why = "does not fit in [dram] size";
		r = -ENOSPC;
	}
	if (!r)
		r = dram_seat(d, d->private, &s, &dir, bytes, node);
	if (r < 0) {
		dir_free(&dir);
		seg_close(&s); /* and the descriptor */
	}
	k->fd = -1;
	return r;
}

int dram_adopt(struct dram *d)
{
	const struct tier_keep *keep = d->keep;

	for (unsigned i = 0; keep && i < keep->n; i++) {
		struct tier_kept *k = &keep->kept[i];
		const char *why;
		int r;

		if (k->fd < 0)
			continue;
		r = adopt(d, k, &why);
		if (r == -ENOMEM)
			return r;
		if (r < 0)
			keep->refused(keep->arg, k->name, why);
		if (k->fd >= 0 && r < 0) {
			close(k->fd);
			k->fd = -1;
		}
	}
	return 0;
}

/* ---- finding ---------------------------------------------------------------------------------- */

/* First unit at or after this one whose slot may have been written: holes are not made real by looking. */
static uint32_t next_written(const struct dram_seg *s, uint32_t unit)
{
	uint64_t at = s->bytes + (uint64_t)unit * DIR_SLOT;
	off_t data = lseek(s->seg.fd, (off_t)at, SEEK_DATA);

	if (data < 0)
		return errno == ENXIO ? s->dir.units : unit;
	if ((uint64_t)data <= at)
		return unit;
	return (uint32_t)MIN(DIV_UP((uint64_t)data - s->bytes, DIR_SLOT), s->dir.units);
}

/* Units that the record takes; 1 where there is none. */
static uint32_t look(struct dram *d, uint32_t i, uint32_t unit, tier_found_fn fn, void *arg)
{
	struct dram_seg *s = &d->slot[i];
	tier_addr addr = (uint64_t)i << 32 | unit;
	struct dir_page p;
	int r = dir_get(&s->dir, unit, &p);

	if (!r)
		return 1;
	if (r > 0)
		r = dram_restore(d, i, unit, p.meta.bytes, &p.place);
	if (r < 0) {
		dir_wipe(&s->dir, unit);
		return 1;
	}
	dir_keep(&s->dir, &p);
	if (!fn || !fn(arg, addr, &p.meta, &p.seq))
		(void)dram_put(d, addr, p.meta.bytes);
	return p.place.units;
}

int dram_scan(struct tier *t, tier_found_fn fn, void *arg)
{
	struct dram *d = dram_of(t);

	d->scanning = true;
	for (uint32_t i = 0; i < d->top; i++) {
		struct dram_seg *s = &d->slot[i];

		if (!s->pool || !s->dir.id || s->dir.settled)
			continue;
		dram_warm_all(d, s);
		for (uint32_t u = next_written(s, 0); u < s->dir.units;) {
			uint32_t next = u + look(d, i, u, fn, arg);

			if ((uint64_t)next * DIR_SLOT / KVT_UNIT != (uint64_t)u * DIR_SLOT / KVT_UNIT)
				next = next_written(s, next);
			u = next;
		}
		dir_settle(&s->dir);
	}
	d->scanning = false;
	dram_trim(d);
	return 0;
}
