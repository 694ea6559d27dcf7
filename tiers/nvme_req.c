/* SPDX-License-Identifier: MIT */
/*
 * Requests: made, sent in batches, taken back, and given up. A request that is
 * older than the deadline means that the device does not answer: the tier goes
 * offline, every page in flight ends with -EIO at once, and the buffers stay out of use for as
 * long as the device might still write to them.
 */
#include <sys/eventfd.h>

#include "tiers/nvme.h"

struct nvme_req *nvme_req_new(struct nvme *t, enum io_op op, struct nvme_seg *seg, uint32_t unit,
			      uint32_t units, void *buf, void (*done)(struct nvme *t, struct nvme_req *r))
{
	struct nvme_req *r = calloc(1, sizeof(*r));

	if (!r)
		return NULL;
	r->io.op = (uint8_t)op;
	r->io.buf = buf;
	r->io.len = units * KVT_UNIT;
	r->io.file = (uint16_t)(seg->index / t->file_segments);
	r->io.off = NVME_PREAMBLE + (uint64_t)(seg->index % t->file_segments) * t->segment_bytes +
		    (uint64_t)unit * KVT_UNIT;
	r->io.fixed = (char *)buf >= t->arena && (char *)buf < t->arena + t->arena_bytes;
	r->seg = seg;
	r->done = done;
	return r;
}

void nvme_send(struct nvme *t, struct nvme_req *r)
{
	struct nvme_seg *s = r->seg;

	r->start_ns = now_ns();
	TAILQ_INSERT_TAIL(&t->inflight, r, link);
	if (r->data && r->io.op == IO_WRITE && !s->head_ok && !s->failed)
		io_queue_add(&s->held, &r->io);
	else
		io_queue_add(&t->outbox, &r->io);
}

void nvme_kick(struct nvme *t)
{
	struct io_req *list = t->outbox.head;

	if (!list)
		return;
	io_queue_init(&t->outbox);
	t->engine->ops->submit(t->engine, list);
}

void nvme_finish_io(struct nvme *t, struct tier_io *io, int res)
{
	io->res = res;
	io->next = NULL;
	io->priv[1] = IO_FINISHED;
	*t->done_tail = io;
	t->done_tail = &io->next;
	t->stat.inflight--;
	if (res < 0)
		t->stat.errors++;
	else if (io->op == TIER_READ) {
		t->stat.reads++;
		t->stat.read_bytes += io->bytes;
	} else {
		t->stat.writes++;
		t->stat.write_bytes += io->bytes;
	}
}

static void late(struct nvme *t, struct nvme_req *r)
{
	if (r->slab)
		nvme_stage_put(t, r->slab, r->pages);
	t->stat.leaked_bytes -= r->io.len;
	TAILQ_REMOVE(&t->orphans, r, link);
}

void nvme_drain(struct nvme *t)
{
	struct io_req *io = t->engine->ops->reap(t->engine), *next;

	for (; io; io = next) {
		struct nvme_req *r = container_of(io, struct nvme_req, io);

		next = io->next;
		if (r->orphan) {
			late(t, r);
		} else {
			TAILQ_REMOVE(&t->inflight, r, link);
			if (io->op == IO_WRITE && !io->res)
				t->stat.device_write_bytes += io->len;
			if (io->res && io->res != -ECANCELED) {
				t->failed_requests++;
				t->last_error = io->res;
				t->last_op = io->op;
			}
			r->done(t, r);
		}
		free(r->owned);
		free(r);
	}
	if (!t->offline) {
		nvme_clean_pump(t);
		nvme_seal_pump(t);
		nvme_head_pump(t);
	}
	nvme_kick(t);
}

static void give_up(struct nvme *t, struct nvme_req *r)
{
	r->orphan = true;
	t->stat.leaked_bytes += r->io.len;
	for (struct tier_io *io = r->ios, *next; io; io = next) {
		next = io->next;
		if (io->op == TIER_WRITE) {
			r->seg->inflight--;
			io->addr = TIER_ADDR_NONE;
		}
		nvme_finish_io(t, io, -EIO);
		io->priv[1] = IO_LEAKED;
	}
	r->ios = NULL;
}

void nvme_check_deadline(struct nvme *t)
{
	struct nvme_req *r = TAILQ_FIRST(&t->inflight);

	if (!r || now_ns() - r->start_ns < (uint64_t)t->deadline_ms * 1000000)
		return;
	t->offline = true;
	nvme_clean_stop(t);
	while ((r = TAILQ_FIRST(&t->inflight))) {
		TAILQ_REMOVE(&t->inflight, r, link);
		TAILQ_INSERT_TAIL(&t->orphans, r, link);
		give_up(t, r);
	}
	if (t->done)
		(void)eventfd_write(t->event_fd, 1);
}
