/* SPDX-License-Identifier: MIT */
/*
 * The DRAM tier: pages in private segments. The page is the buffer, so a write
 * is what the caller puts there and submit has nothing left to do.
 *
 * Segments are made when the allocator runs out and given back when they hold no
 * page; one empty segment is kept, so that a workload at the edge does not make and
 * unmake it. Memory is not touched before a page is: opening costs microseconds
 * whatever the size. Unmapping a warm segment takes milliseconds, so a short-lived
 * thread does it.
 */
#include "tiers/tier.h"
#include "tiers/alloc.h"
#include "shm/seg.h"

#include <numa.h>
#include <numaif.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#define SEGMENT_DEFAULT (UINT64_C(256) << 20)

enum io_state { IO_IDLE = 0, IO_READY, IO_SUBMITTED, IO_DONE }; /* tier_io.priv[0] */

struct dram {
	struct tier tier;
	struct alloc alloc;
	struct seg *seg; /* by the allocator's segment number */
	uint32_t max_segs;
	uint64_t capacity, segment, mapped;
	int node;
	bool no_huge;
	struct tier_io *head, **tail; /* finished, not yet reaped */
	struct tier_stat st;
	int grow_err;     /* why the last segment could not be made */
	struct seg dying; /* the reaper's while `reaping` */
	pthread_t reaper;
	bool reaping;
};

static struct dram *dram_of(struct tier *t)
{
	return container_of(t, struct dram, tier);
}

static char *page_at(const struct dram *d, tier_addr addr)
{
	return (char *)d->seg[alloc_addr_seg(addr)].addr + alloc_addr_off(addr);
}

/*
 * Say where the segment's memory shall come from. Preferred rather than bound: a full node
 * must cost latency, not the daemon's life. Failure costs placement only, so it is not an error.
 */
static void place(const struct dram *d, const struct seg *s)
{
	if (numa_available() < 0)
		return;
	if (d->node >= 0) {
		struct bitmask *m = numa_allocate_nodemask();

		if (!m)
			return;
		numa_bitmask_setbit(m, (unsigned)d->node);
		mbind(s->addr, s->size, MPOL_PREFERRED, m->maskp, m->size + 1, 0);
		numa_free_nodemask(m);
	} else if (numa_num_configured_nodes() > 1) {
		mbind(s->addr, s->size, MPOL_INTERLEAVE, numa_all_nodes_ptr->maskp,
		      numa_all_nodes_ptr->size + 1, 0);
	}
}

/* Add one segment of what is left of the capacity. -ENOSPC when nothing is, or none can be made. */
static int grow(struct dram *d)
{
	uint64_t bytes = MIN(d->segment, d->capacity - d->mapped);
	struct seg s = SEG_INIT;
	int i, r;

	if (!bytes)
		return -ENOSPC;
	r = seg_create(&s, SEG_PRIVATE, "kvtier-dram", bytes, d->no_huge ? 0 : SEG_F_HUGE);
	if (r < 0)
		goto fail;
	i = r = alloc_add(&d->alloc, (uint32_t)(bytes / ALLOC_SLAB_BYTES));
	if (r < 0)
		goto fail;
	place(d, &s);
	d->seg[i] = s;
	d->mapped += bytes;
	return 0;
fail:
	seg_close(&s);
	d->grow_err = -r;
	d->st.errors++;
	return -ENOSPC;
}

static void *reap_seg(void *arg)
{
	seg_close(arg);
	return NULL;
}

static void reaper_join(struct dram *d)
{
	if (d->reaping)
		pthread_join(d->reaper, NULL);
	d->reaping = false;
}

static void give_back(struct dram *d, uint32_t i)
{
	if (alloc_remove(&d->alloc, i) < 0)
		return;
	d->mapped -= MIN(d->segment, d->seg[i].size);
	reaper_join(d);
	d->dying = d->seg[i];
	d->seg[i] = (struct seg)SEG_INIT;
	if (pthread_create(&d->reaper, NULL, reap_seg, &d->dying))
		seg_close(&d->dying);
	else
		d->reaping = true;
}

static void put(struct dram *d, tier_addr addr, uint32_t bytes)
{
	int r = alloc_put(&d->alloc, addr, bytes);

	if (r < 0)
		d->st.errors++;
	else if (r > 0 && d->alloc.st.empty_segs > 1)
		give_back(d, alloc_addr_seg(addr));
}

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
	if (cfg->node > 0 &&
	    (numa_available() < 0 || !numa_bitmask_isbitset(numa_all_nodes_ptr, (unsigned)cfg->node))) {
		snprintf(err, errsize, "dram node: %d is not a memory node of this host (highest is %d)",
			 cfg->node, numa_available() < 0 ? 0 : numa_max_node());
		return -EINVAL;
	}
	return 0;
}

static void dram_close(struct tier *t)
{
	struct dram *d = t ? dram_of(t) : NULL;

	if (!d)
		return;
	reaper_join(d);
	for (uint32_t i = 0; d->seg && i < d->max_segs; i++)
		seg_close(&d->seg[i]);
	alloc_fini(&d->alloc);
	free(d->seg);
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
	alloc_init(&d->alloc);
	d->capacity = cfg->size / ALLOC_SLAB_BYTES * ALLOC_SLAB_BYTES;
	d->segment = cfg->segment;
	if (!d->segment)
		d->segment = MAX(SEGMENT_DEFAULT, ALIGN_UP(d->capacity / ALLOC_MAX_SEGS + 1, SEGMENT_DEFAULT));
	d->max_segs = (uint32_t)DIV_UP(d->capacity, d->segment);
	d->node = numa_available() < 0 || cfg->node < 0 ? -1 : cfg->node;
	d->no_huge = cfg->no_huge;
	d->tail = &d->head;
	d->seg = calloc(d->max_segs, sizeof(*d->seg));
	if (!d->seg)
		goto nomem;
	for (uint32_t i = 0; i < d->max_segs; i++)
		d->seg[i] = (struct seg)SEG_INIT;
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
	int r;

	if (io->op == TIER_READ) {
		r = alloc_check(&d->alloc, io->addr, io->bytes);
	} else {
		r = alloc_get(&d->alloc, io->bytes, false, &io->addr);
		if (r == -ENOSPC)
			r = grow(d) ? alloc_get(&d->alloc, io->bytes, true, &io->addr)
				    : alloc_get(&d->alloc, io->bytes, false, &io->addr);
	}
	if (r < 0)
		return r;
	io->buf = page_at(d, io->addr);
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

static void dram_release(struct tier *t, struct tier_io *io)
{
	if (io->priv[0] == IO_READY && io->op == TIER_WRITE) {
		put(dram_of(t), io->addr, io->bytes);
		io->addr = TIER_ADDR_NONE;
	}
	io->buf = NULL;
	io->priv[0] = IO_IDLE;
}

static void dram_free(struct tier *t, tier_addr addr, uint32_t bytes)
{
	put(dram_of(t), addr, bytes);
}

static int dram_event_fd(struct tier *t)
{
	return -1;
}

static void dram_stat(struct tier *t, struct tier_stat *ret)
{
	const struct dram *d = dram_of(t);
	struct alloc_stat a;
	bool huge = true;

	alloc_stat(&d->alloc, &a);
	for (uint32_t i = 0; i < d->max_segs; i++)
		huge = huge && (d->seg[i].fd < 0 || d->seg[i].huge);
	*ret = d->st;
	ret->capacity = d->capacity;
	ret->used = a.used;
	ret->free = d->capacity - a.used - a.stranded;
	ret->overhead = a.stranded;
	ret->huge = huge && a.segs;
	ret->node = d->node;
	snprintf(ret->note, sizeof(ret->note), "%u segments, %u empty, padding %llu KiB%s%s", a.segs,
		 a.empty_segs, (unsigned long long)(a.padding >> 10), d->grow_err ? "; last not made: " : "",
		 d->grow_err ? strerror(d->grow_err) : "");
}

static void dram_tick(struct tier *t,
		      bool (*moved)(void *arg, const struct page_meta *m, tier_addr from, tier_addr to),
		      void *arg)
{
}

const struct tier_ops tier_dram_ops = {
	.name = "dram",
	.caps = TIER_CAP_MAPPED,
	.open = dram_open,
	.close = dram_close,
	.prepare = dram_prepare,
	.submit = dram_submit,
	.reap = dram_reap,
	.release = dram_release,
	.free = dram_free,
	.event_fd = dram_event_fd,
	.stat = dram_stat,
	.tick = dram_tick,
};
