/* SPDX-License-Identifier: MIT */
/*
 * The DRAM tier: pages in memory of ours, private or published to one owner's clients. The page is the buffer,
 * so a write is what the caller puts there and submit has nothing left to do. Where pages lie: dram_seg.c.
 *
 * Memory is not touched before a page is: opening costs microseconds whatever the size. Unmapping a warm
 * segment takes milliseconds, so a short-lived thread does it.
 */
#include "tiers/dram.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SEGMENT_DEFAULT (UINT64_C(256) << 20)

enum io_state { IO_IDLE = 0, IO_READY, IO_SUBMITTED, IO_DONE }; /* tier_io.priv[0] */

static int check_cfg(const struct tier_cfg *cfg, char *err, size_t errsize)
{
	if (cfg->size < ALLOC_SLAB_BYTES) {
		snprintf(err, errsize, "dram size: %llu is below the minimum of %llu bytes",
			 (unsigned long long)cfg->size, (unsigned long long)ALLOC_SLAB_BYTES);
		return -EINVAL;
	}
	if (cfg->segment && (cfg->segment < ALLOC_SLAB_BYTES || cfg->segment % ALLOC_SLAB_BYTES ||
			     cfg->segment / ALLOC_SLAB_BYTES >= ALLOC_MAX_SLABS)) {
		snprintf(err, errsize, "dram segment: %llu is not a multiple of %llu bytes below %llu",
			 (unsigned long long)cfg->segment, (unsigned long long)ALLOC_SLAB_BYTES,
			 (unsigned long long)(ALLOC_MAX_SLABS * ALLOC_SLAB_BYTES));
		return -EINVAL;
	}
	if (cfg->segment && DIV_UP(cfg->size, cfg->segment) > ALLOC_MAX_SEGS) {
		snprintf(err, errsize, "dram segment: %llu makes more than %u segments of size %llu",
			 (unsigned long long)cfg->segment, ALLOC_MAX_SEGS, (unsigned long long)cfg->size);
		return -EINVAL;
	}
	if (!cfg->segment && cfg->size / ALLOC_MAX_SEGS > ALLOC_MAX_SLABS * ALLOC_SLAB_BYTES / 2) {
		snprintf(err, errsize, "dram size: %llu is above the limit of 4 EiB",
			 (unsigned long long)cfg->size);
		return -EINVAL;
	}
	return 0;
}

static void dram_close(struct tier *t)
{
	struct dram *d = t ? dram_of(t) : NULL;

	if (!d)
		return;
	dram_unmap(d);
	free(d->private);
	free(d->slot);
	free(d);
}

static int dram_open(struct tier **ret, const struct tier_cfg *cfg, char *err, size_t errsize)
{
	struct dram *d;
	int r = check_cfg(cfg, err, errsize);

	if (r < 0)
		return r;
	d = calloc(1, sizeof(*d));
	if (!d)
		goto nomem;
	d->tier.ops = &tier_dram_ops;
	LIST_INIT(&d->pools);
	pthread_mutex_init(&d->lock, NULL);
	d->capacity = cfg->size / ALLOC_SLAB_BYTES * ALLOC_SLAB_BYTES;
	d->limit = UINT64_MAX;
	d->segment = cfg->segment;
	if (!d->segment)
		d->segment = MAX(SEGMENT_DEFAULT, ALIGN_UP(d->capacity / ALLOC_MAX_SEGS + 1, SEGMENT_DEFAULT));
	r = dram_nodes(d, cfg, err, errsize);
	if (r < 0) {
		dram_close(&d->tier);
		return r;
	}
	d->no_huge = cfg->no_huge;
	d->tail = &d->head;
	d->slot = calloc(DRAM_SLOTS, sizeof(*d->slot)); /* what is not used is not touched */
	d->keep = cfg->keep;
	d->private = dram_pool_make(d, 0);
	if (!d->slot || !d->private || dram_adopt(d) < 0)
		goto nomem;
	*ret = &d->tier;
	return 0;
nomem:
	snprintf(err, errsize, "dram: no memory for its tables");
	dram_close(d ? &d->tier : NULL);
	return -ENOMEM;
}

static int dram_prepare(struct tier *t, struct tier_io *io)
{
	struct dram *d = dram_of(t);
	struct pool *p;
	int r;

	if (io->op == TIER_WRITE) {
		p = dram_pool_get(d, io->owner);
		if (!p)
			return -ENOMEM;
		r = dram_place(d, p, io->bytes, io->room, io->near, &io->addr);
		if (r < 0)
			return r;
	}
	io->buf = dram_page(d, io->addr, io->bytes);
	if (!io->buf)
		return -EINVAL;
	io->priv[0] = IO_READY;
	return 0;
}

static void dram_submit(struct tier *t, struct tier_io *const *ios, unsigned n)
{
	struct dram *d = dram_of(t);

	for (unsigned i = 0; i < n; i++) {
		struct tier_io *io = ios[i];

		if (io->op == TIER_READ) {
			d->st.reads++;
			d->st.read_bytes += io->bytes;
		} else {
			dram_remember(d, io);
			d->st.writes++;
			d->st.write_bytes += io->bytes;
			d->st.device_write_bytes += ALIGN_UP((uint64_t)io->bytes, KVT_UNIT);
		}
		io->res = 0;
		io->priv[0] = IO_SUBMITTED;
		io->next = NULL;
		*d->tail = io;
		d->tail = &io->next;
		d->st.inflight++;
	}
}

static unsigned dram_reap(struct tier *t, struct tier_io **ret, unsigned max)
{
	struct dram *d = dram_of(t);
	unsigned n = 0;

	for (; n < max && d->head; n++) {
		ret[n] = d->head;
		d->head = ret[n]->next;
		ret[n]->next = NULL;
		ret[n]->priv[0] = IO_DONE;
	}
	if (!d->head)
		d->tail = &d->head;
	d->st.inflight -= n;
	return n;
}

static void dram_free(struct tier *t, tier_addr addr, uint32_t bytes)
{
	struct dram *d = dram_of(t);

	if (dram_put(d, addr, bytes) < 0)
		d->st.errors++;
}

static void dram_release(struct tier *t, struct tier_io *io)
{
	if (io->priv[0] == IO_READY && io->op == TIER_WRITE) {
		dram_free(t, io->addr, io->bytes);
		io->addr = TIER_ADDR_NONE;
	}
	io->buf = NULL;
	io->priv[0] = IO_IDLE;
}

static int dram_event_fd(struct tier *t)
{
	return -1;
}

static void dram_stat(struct tier *t, struct tier_stat *ret)
{
	const struct dram *d = dram_of(t);
	struct alloc_stat sum = {0};
	const struct pool *p;
	uint64_t held = d->published;
	uint32_t kept = 0;
	bool huge = true;

	LIST_FOREACH(p, &d->pools, link)
		dram_pool_stat(d, p, &sum);
	held -= sum.used;
	dram_pool_stat(d, d->private, &sum);
	for (uint32_t i = 0; i < d->top; i++) {
		huge = huge && (!d->slot[i].pool || d->slot[i].seg.huge);
		kept += d->slot[i].pool && d->slot[i].dir.id;
	}
	*ret = d->st;
	ret->capacity = MIN(d->capacity, d->limit);
	ret->used = sum.used;
	ret->free = ret->capacity - MIN(ret->capacity, sum.used + sum.stranded);
	ret->resident = d->warm;
	ret->overhead = sum.stranded;
	ret->published = d->published;
	dram_revoke_stat(d, NULL, &ret->revoked, &ret->late);
	ret->held = held;
	ret->huge = huge && sum.segs;
	dram_node_stat(d, ret);
	snprintf(ret->note, sizeof(ret->note), "%u segments, %u empty, %u kept, padding %llu KiB%s%s", sum.segs,
		 sum.empty_segs, kept, (unsigned long long)(sum.padding >> 10),
		 d->grow_err ? "; last not made: " : "", d->grow_err ? strerror(d->grow_err) : "");
}

static void dram_tick(struct tier *t,
		      bool (*moved)(void *arg, const struct page_meta *m, tier_addr from, tier_addr to),
		      void *arg)
{
}

/* ---- published memory --------------------------------------------------------------------- */

static int dram_hold(struct tier *t, uint64_t owner, bool on)
{
	struct dram *d = dram_of(t);
	struct pool *p = on ? dram_pool_get(d, owner) : dram_pool(d, owner);

	if (!p)
		return on ? -ENOMEM : 0;
	if (on)
		p->held = true;
	else
		dram_pool_release(d, p);
	return 0;
}

static int dram_segment(struct tier *t, uint64_t owner, uint32_t number, uint64_t *ret_bytes)
{
	const struct dram *d = dram_of(t);
	uint32_t i = number % DRAM_SLOTS;
	const struct dram_seg *s = &d->slot[i];

	if (!owner || i >= d->top || !s->pool || s->pool->owner != owner || s->gen != number >> DRAM_SLOT_BITS ||
	    dram_vacated(s, i))
		return -ENOENT;
	*ret_bytes = s->seg.size;
	return s->seg.fd;
}

static void dram_op_forget(struct tier *t, tier_addr addr)
{
	dram_forget(dram_of(t), addr);
}

static bool dram_finds(struct tier *t, uint32_t bytes, const uint64_t *pos, uint32_t pos_words)
{
	return dram_of(t)->keep && dir_fits(bytes, pos, pos_words);
}

static void dram_owner_stat(struct tier *t, uint64_t owner, struct tier_owner *ret)
{
	struct dram *d = dram_of(t);
	const struct pool *p = dram_pool(d, owner);
	struct alloc_stat a = {0};

	if (p)
		dram_pool_stat(d, p, &a);
	*ret = (struct tier_owner){
		.bytes = a.capacity,
		.used = a.used,
		.room = d->capacity - d->mapped + a.free,
		.segments = a.segs,
		.empty = a.empty_segs,
	};
	if (owner) /* the empty private one would be given up */
		for (uint32_t n = 0; n < d->nodes; n++)
			for (uint32_t i = 0; (i = dram_next_empty(d->private, n, i)) < DRAM_SLOTS; i++)
				ret->room += d->slot[i].bytes;
	ret->room = MIN(ret->room, dram_left(d) + (owner ? a.free : 0));
	if (p && p->revoked) {
		ret->room = 0;
		dram_revoke_stat(d, p, &ret->revoked, &ret->late);
	}
}

static void dram_limit(struct tier *t, uint64_t bytes)
{
	dram_of(t)->limit = bytes;
	if (bytes == UINT64_MAX)
		dram_revoke_end(dram_of(t));
}

static uint64_t dram_op_trim(struct tier *t, uint64_t bytes)
{
	return dram_give(dram_of(t), bytes);
}

static int dram_op_where(struct tier *t, tier_addr addr)
{
	return dram_where(dram_of(t), addr);
}

static void dram_shun(struct tier *t, uint32_t nodes)
{
	dram_of(t)->shun = nodes;
}

const struct tier_ops tier_dram_ops = {
	.name = "dram",
	.caps = TIER_CAP_MAPPED,
	.open = dram_open,
	.close = dram_close,
	.scan = dram_scan,
	.prepare = dram_prepare,
	.submit = dram_submit,
	.reap = dram_reap,
	.release = dram_release,
	.free = dram_free,
	.forget = dram_op_forget,
	.finds = dram_finds,
	.event_fd = dram_event_fd,
	.stat = dram_stat,
	.tick = dram_tick,
	.hold = dram_hold,
	.segment = dram_segment,
	.owner_stat = dram_owner_stat,
	.limit = dram_limit,
	.trim = dram_op_trim,
	.revoke = dram_revoke,
	.revoked = dram_revoked,
	.reclaim = dram_reclaim,
	.where = dram_op_where,
	.shun = dram_shun,
};
