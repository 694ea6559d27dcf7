/* SPDX-License-Identifier: MIT */
#include "daemon/throttle.h"
#include <stdio.h>
#include "daemon/internal.h"
#include "daemon/pressure.h"
#include "daemon/usdt.h"
#include "shm/util.h"

#define LEAST (UINT64_C(256) << 10) /* of the window, and of what clients wait for */
#define STEP (UINT64_C(512) << 10)
#define EPOCH_NS UINT64_C(50000000) /* one change of the window in so long */
#define BEGIN (UINT64_C(4) << 20)

static uint64_t most(const struct core *c)
{
	return MAX(c->cfg.nvme_staging, LEAST);
}

static uint64_t target_ns(const struct core *c)
{
	return c->cfg.nvme_throttle_ms * UINT64_C(1000000);
}

void throttle_init(struct core *c)
{
	c->throttle.window = MIN(BEGIN, most(c));
}

bool throttle_may(struct core *c, uint32_t bytes, bool background)
{
	struct throttle *t = &c->throttle;
	uint64_t mine = t->inflight[!background], limit = background ? t->window : MAX(2 * t->window, LEAST);

	if (!c->cfg.nvme_throttle || !mine || mine + bytes <= limit || pressure_gives(c))
		return true;
	c->stat.throttle_waits++;
	return false;
}

void throttle_begin(struct core *c, uint32_t bytes, bool background)
{
	struct throttle *t = &c->throttle;

	t->inflight[!background] += bytes;
	if (t->window < most(c))
		c->stat.throttle_delayed_bytes += bytes;
}

void throttle_end(struct core *c, uint32_t bytes, bool background)
{
	c->throttle.inflight[!background] -= bytes;
}

/* ---- the disk as the kernel sees it ------------------------------------------------------ */

void throttle_see(const struct probes_disk *before, const struct probes_disk *now, uint64_t ns,
		  struct throttle_sight *ret)
{
	uint64_t reads = now->reads - before->reads, writes = now->writes - before->writes;
	uint64_t queue = MIN(now->inflight, before->inflight);

	*ret = (struct throttle_sight){
		.read_ns = reads ? (now->read_ns - before->read_ns) / reads : 0,
		.write_ns = writes ? (now->write_ns - before->write_ns) / writes : 0,
		.wait_ns = (uint64_t)((double)ns * (double)queue / (double)MAX(reads + writes, UINT64_C(1))),
	};
}

/* Nanoseconds that are too many; 0: the disk is fast. *ret_seen: there was something to see. */
static uint64_t look(struct core *c, uint64_t now, bool *ret_seen)
{
	struct throttle *t = &c->throttle;
	uint64_t target = target_ns(c), since = now - t->disk_ns;
	struct throttle_sight *s = &t->sight;
	struct probes_disk disk;
	bool first = !t->disk_ns;

	*ret_seen = false;
	if (probes_disk(c, &disk)) {
		t->disk_ns = 0;
		*s = (struct throttle_sight){0};
		return 0;
	}
	if (!first)
		throttle_see(&t->disk, &disk, since, s);
	t->disk = disk;
	t->disk_ns = now;
	if (first)
		return 0;
	*ret_seen = s->read_ns || s->write_ns || s->wait_ns;
	if (s->read_ns > target)
		return s->read_ns;
	if (s->write_ns > 2 * target)
		return s->write_ns;
	/* A queue of others' that does not slow down what ends is theirs. */
	return s->wait_ns > 2 * target && t->inflight[0] + t->inflight[1] ? s->wait_ns : 0;
}

/* ---- the window ----------------------------------------------------------------------------- */

/* ns: of something of our own that ended; 0: nothing did. */
static void turn(struct core *c, uint64_t ns)
{
	struct throttle *t = &c->throttle;
	uint64_t now = now_ns(), from = t->window, own, disk;
	bool seen;

	/* What is on its way was sent under the old window: it says nothing of the new one. */
	if (now - t->epoch_ns < t->wait_ns)
		return;
	own = t->slow_ns;
	disk = look(c, now, &seen);
	if (!ns && !own && !seen)
		return;
	t->epoch_ns = now;
	t->wait_ns = MAX(EPOCH_NS, MAX(ns, disk));
	t->slow_ns = 0;
	c->stat.throttle_cuts += own || disk;
	c->stat.throttle_disk_cuts += !own && disk;
	if (own || disk)
		t->window = MAX(t->window / 2, LEAST);
	else
		t->window = MIN(t->window + t->window / 8 + STEP, most(c));
	if (t->window != from)
		USDT(throttle, from, t->window, own ? 1 : disk ? 2 : 0, own ?: disk);
}

static void saw(struct core *c, uint64_t ns, uint64_t target)
{
	if (ns > target)
		c->throttle.slow_ns = ns;
	turn(c, MAX(ns, UINT64_C(1)));
}

void throttle_saw_read(struct core *c, uint64_t ns)
{
	saw(c, ns, target_ns(c));
}

void throttle_saw_write(struct core *c, uint64_t ns)
{
	saw(c, ns, 2 * target_ns(c));
}

/* ---- the cleaner ------------------------------------------------------------------------------ */

static uint32_t take(void *arg, uint32_t bytes, bool urgent)
{
	struct core *c = arg;
	struct throttle *t = &c->throttle;
	uint64_t room = t->window - MIN(t->window, t->inflight[0]);

	if (!c->cfg.nvme_throttle || pressure_gives(c))
		room = bytes;
	else if (urgent || !t->inflight[0])
		room = MAX(room, LEAST);
	if (room < MIN(bytes, LEAST)) {
		c->stat.throttle_waits++;
		return 0;
	}
	bytes = (uint32_t)MIN(bytes, room);
	t->inflight[0] += bytes;
	return bytes;
}

static void ended(void *arg, uint32_t bytes, uint64_t ns)
{
	struct core *c = arg;

	throttle_end(c, bytes, true);
	if (!ns)
		return;
	c->stat.throttle_cleaner_bytes += bytes;
	throttle_saw_write(c, ns);
	if (c->mover)
		mover_kick(c);
}

struct tier_pace throttle_pace(struct core *c)
{
	return (struct tier_pace){.arg = c, .take = take, .ended = ended};
}

/* ---- looking ---------------------------------------------------------------------------------- */

void throttle_tick(struct core *c)
{
	if (c->pages.tier[KVT_TIER_NVME] && c->cfg.nvme_throttle && !c->seams.stepped)
		turn(c, 0);
}

void throttle_stat(const struct core *c, struct core_stat *ret)
{
	const struct throttle *t = &c->throttle;
	struct probes_disk disk;
	const char *why = probes_disk(c, &disk);

	ret->throttle_on = c->cfg.nvme_throttle && c->pages.tier[KVT_TIER_NVME];
	ret->throttle_window_bytes = t->window;
	ret->throttle_disk = ret->throttle_on && !why;
	if (!ret->throttle_on)
		snprintf(ret->throttle_by, sizeof(ret->throttle_by), "nothing: it is off");
	else
		snprintf(ret->throttle_by, sizeof(ret->throttle_by), "the tier's own I/O%s%.96s%s",
			 why ? " alone (" : " and the disk's", why ?: "", why ? ")" : "");
	ret->throttle_disk_read_ns = t->sight.read_ns;
	ret->throttle_disk_write_ns = t->sight.write_ns;
	ret->throttle_disk_wait_ns = t->sight.wait_ns;
}
