/* SPDX-License-Identifier: MIT */
#include "daemon/throttle.h"
#include "daemon/internal.h"
#include "daemon/pressure.h"
#include "shm/util.h"

#define LEAST (UINT64_C(256) << 10) /* of the window, and of what clients wait for */
#define STEP (UINT64_C(512) << 10)
#define EPOCH_NS UINT64_C(50000000) /* one change of the window in so long */
#define BEGIN (UINT64_C(4) << 20)

static uint64_t most(const struct core *c)
{
	return MAX(c->cfg.nvme_staging, LEAST);
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

static void saw(struct core *c, uint64_t ns, uint64_t target_ns)
{
	struct throttle *t = &c->throttle;
	uint64_t now = now_ns();

	t->slow |= ns > target_ns;
	/* What is on its way was sent under the old window: it says nothing of the new one. */
	if (now - t->epoch_ns < t->wait_ns)
		return;
	t->epoch_ns = now;
	t->wait_ns = MAX(EPOCH_NS, ns);
	c->stat.throttle_cuts += t->slow;
	if (t->slow)
		t->window = MAX(t->window / 2, LEAST);
	else
		t->window = MIN(t->window + t->window / 8 + STEP, most(c));
	t->slow = false;
}

void throttle_saw_read(struct core *c, uint64_t ns)
{
	saw(c, ns, c->cfg.nvme_throttle_ms * UINT64_C(1000000));
}

void throttle_saw_write(struct core *c, uint64_t ns)
{
	saw(c, ns, c->cfg.nvme_throttle_ms * 2 * UINT64_C(1000000));
}

void throttle_stat(const struct core *c, struct core_stat *ret)
{
	ret->throttle_on = c->cfg.nvme_throttle && c->pages.tier[KVT_TIER_NVME];
	ret->throttle_window_bytes = c->throttle.window;
}
