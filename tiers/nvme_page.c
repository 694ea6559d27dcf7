/* SPDX-License-Identifier: MIT */
/*
 * A page's way through the tier: prepare, submit, reap, release, free. Place and
 * buffer are taken together, so that pages prepared one after the other are
 * neighbours on disk and in memory, and submit makes one request of them (up to a slab, 1 MiB).
 * The same holds for reads: pages that lie side by side and are prepared in that order
 * come in with one request.
 */
#include <string.h>
#include <sys/eventfd.h>

#include "shm/trial.h"
#include "tiers/nvme.h"

#define GUESSED_POS 1024u /* table bytes for positions of a page whose bitmap is not known at prepare */

static uint32_t table_need(const struct tier_io *io)
{
	uint32_t flags, pos = GUESSED_POS;

	if (io->meta.pos && io->meta.pos_words <= NVME_MAX_POS_WORDS)
		pos = nvme_pos_size(io->meta.pos, io->meta.pos_words, &flags);
	return (uint32_t)(sizeof(struct nvme_entry) + sizeof(struct seq_record)) + pos;
}

static void prepared(struct tier_io *io, struct nvme_slab *slab, struct nvme_seg *s, uint32_t unit,
		     uint32_t need)
{
	io->priv[0] = (uintptr_t)slab;
	io->priv[1] = IO_PREPARED;
	io->priv[2] = (uintptr_t)s;
	io->priv[3] = (uint64_t)need << 32 | unit;
}

/* A full store may still have room in a segment that another stream opened. */
static struct nvme_stream *place_anywhere(struct nvme *t, uint32_t units, uint32_t need, struct nvme_seg **s,
					  uint32_t *unit)
{
	for (unsigned i = 0; i < 2 * t->streams; i++) {
		struct nvme_stream *st = &t->stream[i % 2][i / 2];

		if (st->seg && !st->seg->failed && nvme_has_room(t, st->seg, units, need) &&
		    nvme_place(t, st, i % 2, units, need, s, unit) >= 0)
			return st;
	}
	return NULL;
}

static int prepare_write(struct nvme *t, struct tier_io *io)
{
	uint32_t units = nvme_page_units(io->bytes), need = table_need(io), unit;
	unsigned life = io->life == TIER_LONG ? TIER_LONG : TIER_SHORT;
	struct nvme_stream *st = nvme_stream_for(t, io->seq ? io->seq->key : io->meta.id.key, life);
	struct nvme_seg *s;

	if (NVME_DATA_UNIT + units + nvme_table_units(0, 0, need) >= t->units)
		return -EINVAL;
	if (nvme_place(t, st, life, units, need, &s, &unit) < 0 &&
	    !(st = place_anywhere(t, units, need, &s, &unit)))
		return -ENOSPC;
	io->buf = nvme_stage_get(t, &st->slab, units, SLAB_WRITE);
	if (!io->buf) {
		nvme_unplace(t, s, unit, units, need);
		return -EAGAIN;
	}
	prepared(io, st->slab, s, unit, need);
	io->addr = nvme_addr(s, unit);
	return 0;
}

static int prepare_read(struct nvme *t, struct tier_io *io)
{
	uint32_t units = nvme_page_units(io->bytes), unit;
	struct nvme_seg *s = nvme_resolve(t, io->addr, &unit);

	if (!s || units > t->units - unit)
		return -ESTALE;
	io->buf = nvme_stage_get(t, &t->read_slab, units, SLAB_READ);
	if (!io->buf)
		return -EAGAIN;
	prepared(io, t->read_slab, s, unit, 0);
	s->pins++;
	return 0;
}

/* -EINVAL: bytes 0, past TIER_MAX_PAGE or past a segment; -ESTALE: no page lives there; -EIO: offline. */
int nvme_prepare(struct tier *tier, struct tier_io *io)
{
	struct nvme *t = nvme(tier);
	int r;

	io->buf = NULL;
	io->priv[1] = IO_IDLE;
	if (!io->bytes || io->bytes > TIER_MAX_PAGE)
		return -EINVAL;
	if (t->offline)
		return -EIO;
	r = t->scanned ? 0 : nvme_scan(tier, NULL, NULL); /* the owner wants nothing of the previous life */
	if (r < 0)
		return r;
	r = io->op == TIER_WRITE ? prepare_write(t, io) : prepare_read(t, io);
	nvme_kick(t);
	return r;
}

static void pages_done(struct nvme *t, struct nvme_req *r)
{
	struct nvme_seg *s = r->seg;
	int res = r->io.res;

	if (r->io.op == IO_WRITE)
		crash_point("nvme.page.written");
	if (r->io.op == IO_WRITE && s->failed && !s->head_ok)
		res = -EIO;
	for (struct tier_io *io = r->ios, *next; io; io = next) {
		next = io->next;
		if (io->op == TIER_WRITE) {
			s->inflight--;
			if (res && !planted("failed-page-visible"))
				io->addr = TIER_ADDR_NONE;
			else
				nvme_page_live(t, s, (uint32_t)io->priv[3], nvme_page_units(io->bytes));
		}
		nvme_finish_io(t, io, res);
	}
	if (r->io.op == IO_WRITE)
		nvme_seg_settle(t, s);
}

/* Enter the page in its segment's table. */
static int note_page(struct nvme *t, struct tier_io *io)
{
	struct nvme_seg *s = (struct nvme_seg *)(uintptr_t)io->priv[2];
	struct nvme_entry e = {
		.id = io->meta.id,
		.crc = io->meta.crc,
		.bytes = io->bytes,
		.unit = (uint32_t)io->priv[3],
		.pos_words = io->meta.pos ? io->meta.pos_words : 0,
	};

	if (e.pos_words > NVME_MAX_POS_WORDS)
		return -E2BIG;
	if (e.pos_words)
		e.pos_len = nvme_pos_size(io->meta.pos, e.pos_words, &e.flags);
	return nvme_build_add(t, s, &e, (uint32_t)(io->priv[3] >> 32), io->seq, io->meta.pos);
}

/* Requests under construction in one submit: the last one may still grow. */
struct batch {
	struct nvme_req *r;
	struct tier_io **tail;
	uint32_t end; /* first unit past it */
};

/* Neighbours on disk and in one slab travel together. */
static bool joins(const struct batch *b, const struct tier_io *io)
{
	const struct nvme_req *r = b->r;

	return r && (uintptr_t)r->slab == io->priv[0] && (uintptr_t)r->seg == io->priv[2] &&
	       r->ios->op == io->op && b->end == (uint32_t)io->priv[3] &&
	       (char *)r->io.buf + r->io.len == io->buf;
}

static void batch_send(struct nvme *t, struct batch *b)
{
	if (b->r)
		nvme_send(t, b->r);
	b->r = NULL;
}

static int batch_add(struct nvme *t, struct batch *b, struct tier_io *io)
{
	uint32_t units = nvme_page_units(io->bytes), unit = (uint32_t)io->priv[3];
	struct nvme_seg *s = (struct nvme_seg *)(uintptr_t)io->priv[2];

	if (!joins(b, io)) {
		batch_send(t, b);
		b->r = nvme_req_new(t, io->op == TIER_WRITE ? IO_WRITE : IO_READ, s, unit, 0, io->buf,
				    pages_done);
		if (!b->r)
			return -ENOMEM;
		b->r->slab = (struct nvme_slab *)(uintptr_t)io->priv[0];
		b->r->data = true;
		b->tail = &b->r->ios;
		b->end = unit;
	}
	io->next = NULL;
	*b->tail = io;
	b->tail = &io->next;
	b->r->pages++;
	b->r->io.len += units * KVT_UNIT;
	b->end += units;
	return 0;
}

void nvme_submit(struct tier *tier, struct tier_io *const *ios, unsigned n)
{
	struct nvme *t = nvme(tier);
	struct batch b = {0};

	for (unsigned i = 0; i < n; i++) {
		struct tier_io *io = ios[i];
		struct nvme_seg *s = (struct nvme_seg *)(uintptr_t)io->priv[2];
		int r = t->offline ? -EIO : 0;

		if (io->priv[1] != IO_PREPARED)
			continue;
		io->priv[1] = IO_SUBMITTED;
		t->stat.inflight++;
		if (io->op == TIER_WRITE) {
			size_t padded = (size_t)nvme_page_units(io->bytes) * KVT_UNIT;

			memset((char *)io->buf + io->bytes, 0, padded - io->bytes);
			if (!r)
				r = note_page(t, io);
			s->prepared--;
			s->inflight++;
		}
		if (!r)
			r = batch_add(t, &b, io);
		if (!r)
			continue;
		if (io->op == TIER_WRITE) {
			s->inflight--;
			io->addr = TIER_ADDR_NONE;
			nvme_seg_settle(t, s);
		}
		nvme_finish_io(t, io, r);
	}
	batch_send(t, &b);
	crash_point("nvme.page.write");
	nvme_kick(t);
	crash_point("nvme.page.submitted");
	if (t->done)
		(void)eventfd_write(t->event_fd, 1);
}

unsigned nvme_reap(struct tier *tier, struct tier_io **ret, unsigned max)
{
	struct nvme *t = nvme(tier);
	unsigned n = 0;
	eventfd_t v;

	(void)eventfd_read(t->event_fd, &v);
	nvme_drain(t);
	while (n < max && t->done) {
		ret[n++] = t->done;
		t->done = t->done->next;
	}
	if (t->done)
		(void)eventfd_write(t->event_fd, 1);
	else
		t->done_tail = &t->done;
	return n;
}

void nvme_release(struct tier *tier, struct tier_io *io)
{
	struct nvme *t = nvme(tier);
	uint64_t stage = io->priv[1];
	struct nvme_seg *s = (struct nvme_seg *)(uintptr_t)io->priv[2];

	if (stage != IO_PREPARED && stage != IO_FINISHED && stage != IO_LEAKED)
		return;
	if (stage != IO_LEAKED)
		nvme_stage_put(t, (struct nvme_slab *)(uintptr_t)io->priv[0], 1);
	if (io->op == TIER_READ)
		s->pins--;
	if (io->op == TIER_WRITE && stage == IO_PREPARED) {
		nvme_unplace(t, s, (uint32_t)io->priv[3], nvme_page_units(io->bytes),
			     (uint32_t)(io->priv[3] >> 32));
		io->addr = TIER_ADDR_NONE;
	}
	io->priv[1] = IO_IDLE;
	io->buf = NULL;
	if (!t->offline)
		nvme_seal_pump(t);
	nvme_kick(t);
}

void nvme_free(struct tier *tier, tier_addr addr, uint32_t bytes)
{
	struct nvme *t = nvme(tier);
	uint32_t unit;
	struct nvme_seg *s = nvme_resolve(t, addr, &unit);

	crash_point("nvme.page.free");
	if (s) /* else it is dead already */
		nvme_page_dead(t, s, unit, nvme_page_units(bytes));
}
