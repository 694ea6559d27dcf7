/* SPDX-License-Identifier: MIT */
/* What the event loop does of its own accord: the ticks, one turn, and whether it still turns. */
#include <stdio.h>
#include <syslog.h>
#include "daemon/internal.h"
#include "daemon/pressure.h"
#include "daemon/probes.h"
#include "shm/util.h"

#define TICK_US 250000u
#define POLL_US 10000u /* each look covers a tenth of the sequences: a lost hint waits 100 ms at most */
#define POLL_SLICES 10u
#define STUCK_NS (UINT64_C(30) * 1000000000u)

static void rearm(sd_event_source *s, uint64_t us)
{
	sd_event_source_set_time_relative(s, us);
	sd_event_source_set_enabled(s, SD_EVENT_ONESHOT);
}

/* The cleaner of a tier moved a page. */
static bool on_moved(void *arg, const struct page_meta *m, tier_addr from, tier_addr to)
{
	struct core *c = arg;
	struct page *p = page_find(&c->pages, m->id.page);

	if (!p || p->addr[KVT_TIER_NVME - 1] != from)
		return false;
	page_move_copy(p, KVT_TIER_NVME, to);
	return true;
}

bool core_may_audit(struct core *c, int tenant)
{
	return log_may(&c->tenant[tenant].audited);
}

static void tell_left_out(struct core *c)
{
	char whom[80];

	log_left_out(&c->said, "policies, scorers, admin socket");
	for (uint32_t i = 0; i < c->tenants; i++) {
		snprintf(whom, sizeof(whom), "tenant %s: its clients", c->tenant[i].name);
		log_left_out(&c->tenant[i].said, whom);
		snprintf(whom, sizeof(whom), "tenant %s: audit, refused for their number", c->tenant[i].name);
		log_left_out(&c->tenant[i].audited, whom);
	}
}

static int on_tick(sd_event_source *src, uint64_t usec, void *arg)
{
	struct core *c = arg;
	struct seq *s, *next;

	c->loop_seen_ns = now_ns();
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
		if (c->pages.tier[t])
			c->pages.tier[t]->ops->tick(c->pages.tier[t], on_moved, c);
	probes_tick(c);
	pressure_tick(c);
	settle_watermarks(c);
	seq_expire(c, c->loop_seen_ns);
	for (s = STAILQ_FIRST(&c->recounts); s; s = next) {
		next = STAILQ_NEXT(s, recounts);
		STAILQ_REMOVE_HEAD(&c->recounts, recounts);
		s->recount = false;
		if (!s->dead)
			seq_recount(s);
		seq_unref(s);
	}
	tell_left_out(c);
	mover_kick(c);
	session_listen_again(c);
	drain_check(c);
	rearm(src, TICK_US);
	return 0;
}

/* The net under the hints: look at the slots themselves, a tenth of them each time. */
static int on_poll(sd_event_source *src, uint64_t usec, void *arg)
{
	struct core *c = arg;
	uint32_t n = DIV_UP(handle_count(c->seqs), POLL_SLICES);

	for (uint32_t i = 0; i < n; i++) {
		struct seq *s = handle_next(c->seqs, &c->poll_cursor, NULL);

		if (!s) {
			c->poll_cursor = 0;
			break;
		}
		if (s->state == SEQ_LIVE)
			seq_poll(s);
		else if (s->not_before_ns)
			seq_step(s);
	}
	fair_tick(c);
	rearm(src, POLL_US);
	return 0;
}

static int turn(struct core *c)
{
	int r = sd_event_prepare(c->ev);
	uint64_t begin, end;

	if (!r)
		r = sd_event_wait(c->ev, UINT64_MAX);
	if (r <= 0)
		return r;
	begin = now_ns();
	r = sd_event_dispatch(c->ev);
	end = now_ns();
	if (end - c->loop_since_ns > UINT64_C(1000000000)) {
		c->loop_before_ns = c->loop_now_ns;
		c->loop_now_ns = 0;
		c->loop_since_ns = end;
	}
	c->loop_now_ns = MAX(c->loop_now_ns, end - begin);
	c->stat.loop_max_ns = MAX(c->stat.loop_max_ns, end - begin);
	return r;
}

int core_turn(struct core *c)
{
	const struct timespec nap = {.tv_nsec = 10000000};
	int r = turn(c);

	/* sd-event may want memory in any of its steps, and each can be taken again. */
	if (r == -ENOMEM && !c->short_of_memory)
		log_line(LOG_ERR, "event loop: out of memory, trying again");
	c->short_of_memory = r == -ENOMEM;
	if (r == -ENOMEM)
		nanosleep(&nap, NULL);
	return r < 0 && r != -ENOMEM ? r : 0;
}

bool core_healthy(struct core *c)
{
	uint64_t now = now_ns();

	if (now - c->loop_seen_ns > STUCK_NS)
		return false;
	return workers_stuck_ns(c->workers) < STUCK_NS;
}

static int add_timer(struct core *c, sd_event_source **ret, uint64_t us, sd_event_time_handler_t fn)
{
	return sd_event_add_time_relative(c->ev, ret, CLOCK_MONOTONIC, us, us / 10, fn, c);
}

int loop_open(struct core *c)
{
	int r = add_timer(c, &c->tick, TICK_US, on_tick);

	return r < 0 ? r : add_timer(c, &c->poll, POLL_US, on_poll);
}

void loop_close(struct core *c)
{
	sd_event_source_disable_unref(c->tick);
	sd_event_source_disable_unref(c->poll);
}
