/* SPDX-License-Identifier: MIT */
/* What the event loop does of its own accord: the ticks, one turn, and whether it still turns. */
#include <stdio.h>
#include <syslog.h>
#include <time.h>
#include "daemon/internal.h"
#include "daemon/pressure.h"
#include "daemon/probes.h"
#include "shm/util.h"

#define TICK_US 250000u
#define POLL_US 10000u /* each look covers a tenth of the sequences: a lost hint waits 100 ms at most */
#define POLL_SLICES 10u
#define POLL_MOST 2048u      /* in one slice: beyond ten times as many sequences a lost hint waits longer */
#define RECOUNT_WORK 100000u /* words of bitmaps in one tick, but for the sequence that goes beyond */
#define LONG_SLICE_NS 50000u /* by the wall: its processor time is looked at */
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

/* Sequences in which something moved in the background; the next tick goes on with those that are left. */
static void recount_some(struct core *c)
{
	uint64_t work = 0;
	struct seq *s;

	while (work < RECOUNT_WORK && (s = STAILQ_FIRST(&c->recounts))) {
		STAILQ_REMOVE_HEAD(&c->recounts, recounts);
		s->recount = false;
		work += s->ix.lanes * (6 * BITS_WORDS(s->ix.rows) + 8);
		if (!s->dead)
			seq_recount(s);
		seq_unref(s);
	}
}

static int on_tick(sd_event_source *src, uint64_t usec, void *arg)
{
	struct core *c = arg;

	c->loop_seen_ns = now_ns();
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
		if (c->pages.tier[t])
			c->pages.tier[t]->ops->tick(c->pages.tier[t], on_moved, c);
	probes_tick(c);
	throttle_tick(c);
	pressure_tick(c);
	near_tick(c);
	settle_watermarks(c);
	seq_expire(c, c->loop_seen_ns);
	recount_some(c);
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
	uint32_t n = MIN(DIV_UP(handle_count(c->seqs), POLL_SLICES), POLL_MOST);

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

static uint64_t cpu_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/*
 * Two clocks, for a host with more to do than processors takes the loop's away in the middle of a slice: by the
 * wall it then was long, by its own time not. To ask for the latter is a system call; short slices are spared
 * it.
 */
static void count_slice(struct core *c, uint64_t begin, uint64_t end)
{
	struct loop_slices *l = &c->slices;
	uint64_t cpu = 0;

	if (end - begin > LONG_SLICE_NS) {
		cpu = cpu_ns() - l->cpu_seen_ns;
		l->cpu_seen_ns += cpu;
	}
	if (end - l->since_ns > UINT64_C(1000000000)) {
		l->before_ns = l->now_ns;
		l->cpu_before_ns = l->cpu_now_ns;
		l->now_ns = l->cpu_now_ns = 0;
		l->since_ns = end;
	}
	l->now_ns = MAX(l->now_ns, end - begin);
	l->cpu_now_ns = MAX(l->cpu_now_ns, cpu);
	c->stat.loop_max_ns = MAX(c->stat.loop_max_ns, end - begin);
	c->stat.loop_cpu_max_ns = MAX(c->stat.loop_cpu_max_ns, cpu);
}

static int turn(struct core *c)
{
	int r = sd_event_prepare(c->ev);
	uint64_t begin;

	if (!r)
		r = sd_event_wait(c->ev, UINT64_MAX);
	if (r <= 0)
		return r;
	c->slices.cpu_seen_ns = cpu_ns();
	begin = now_ns();
	r = sd_event_dispatch(c->ev);
	count_slice(c, begin, now_ns());
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
