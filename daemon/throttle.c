/* SPDX-License-Identifier: MIT */
#include "daemon/throttle.h"
#include "daemon/internal.h"
#include "daemon/pressure.h"
#include "shm/util.h"

#define LEAST (UINT64_C(256) << 10) /* of the window, and of what clients wait for */
#define STEP (UINT64_C(512) << 10)
#define EPOCH_NS UINT64_C(50000000)   /* one change of the window in so long */
#define ALONE_NS UINT64_C(2000000000) /* nobody has read for so long */

static uint64_t most(const struct core *c)
{
	return MAX(c->cfg.nvme_staging, LEAST);
}

void throttle_init(struct core *c)
{
	c->throttle.window = most(c);
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

static void step(struct core *c, uint64_t now)
{
	struct throttle *t = &c->throttle;

	if (now - t->epoch_ns < EPOCH_NS)
		return;
	t->epoch_ns = now;
	if (t->slow)
		t->window = MAX(t->window / 2, LEAST);
	else
		t->window = MIN(t->window + STEP, most(c));
	c->stat.throttle_cuts += t->slow;
	t->slow = false;
}

void throttle_saw(struct core *c, uint64_t ns)
{
	struct throttle *t = &c->throttle;

	t->read_ns = now_ns();
	t->slow |= ns > c->cfg.nvme_throttle_ms * UINT64_C(1000000);
	step(c, t->read_ns);
}

void throttle_tick(struct core *c)
{
	struct throttle *t = &c->throttle;
	uint64_t now = now_ns();

	if (!c->cfg.nvme_throttle || now - t->read_ns > ALONE_NS)
		t->window = MIN(t->window * 2, most(c));
}

void throttle_stat(const struct core *c, struct core_stat *ret)
{
	ret->throttle_on = c->cfg.nvme_throttle && c->pages.tier[KVT_TIER_NVME];
	ret->throttle_window_bytes = c->throttle.window;
}
