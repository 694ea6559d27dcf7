/* SPDX-License-Identifier: MIT */
/*
 * How much the DRAM tier may hold. What is missing on the host (or in a cgroup of ours) is taken off what the
 * tier holds now, at once; a PSI event, or as much time in reclaim, takes an eighth. Up it goes in eighths of
 * the capacity, each after a quiet time and only into what is really free. Pressure that comes back soon after
 * a step doubles that time, so that the tier does not swing.
 *
 * Rows whose only copy is in DRAM are dropped only when bytes are missing, never for stalls alone, and not
 * before `deadline` has gone by, so that nvme takes what it can.
 */
#include "daemon/pressure.h"
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <syslog.h>
#include "daemon/internal.h"
#include "shm/util.h"

#define WATCH_US 20000u /* between looks while memory is to be given back */
#define QUIET_NS UINT64_C(2000000000)
#define QUIET_MOST_NS UINT64_C(60000000000)
#define STEP_NS UINT64_C(500000000)
#define STEPS 8u
#define ENOUGH_NS UINT64_C(1000000000) /* without pressure, then giving ends wherever it is */
#define AHEAD (UINT64_C(256) << 20)
#define LEAST (UINT64_C(2) << 20) /* what the tier counts memory in */

struct pressure {
	struct host *host;
	struct give *give;
	struct revoke revoke;
	struct stall stall;
	int psi_fd;
	sd_event_source *psi, *watch;
	char where[64];
	uint64_t limit; /* UINT64_MAX: none */
	uint64_t missing, spare;
	bool giving;       /* the tier holds more than the limit */
	uint64_t since_ns; /* giving: the trigger */
	uint64_t from;     /* giving: held then */
	struct squeezed {
		uint64_t copied, demoted, dropped, rows;
	} before;                            /* the counters then */
	uint64_t last_ns, step_ns, quiet_ns; /* last pressure; last step up; time without pressure before one */
};

static struct tier *dram(const struct core *c)
{
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];

	return t && t->ops->limit && t->ops->trim ? t : NULL;
}

static struct squeezed counters(const struct core *c)
{
	return (struct squeezed){c->stat.squeeze_copied_bytes, c->stat.squeeze_demoted_bytes,
				 c->stat.squeeze_dropped_bytes, c->stat.squeeze_dropped_rows};
}

static uint64_t held(const struct core *c, struct tier_stat *st)
{
	dram(c)->ops->stat(dram(c), st);
	return st->resident;
}

static uint64_t configured(const struct core *c)
{
	return c->cfg.dram_size;
}

static void set_limit(struct core *c, uint64_t limit)
{
	struct pressure *p = c->pressure;

	p->limit = limit >= configured(c) ? UINT64_MAX : limit;
	dram(c)->ops->limit(dram(c), p->limit);
}

static void watch(struct pressure *p)
{
	sd_event_source_set_time_relative(p->watch, WATCH_US);
	sd_event_source_set_enabled(p->watch, SD_EVENT_ONESHOT);
}

/* ---- down ------------------------------------------------------------------------------- */

static void begin(struct core *c, uint64_t now, uint64_t has)
{
	struct pressure *p = c->pressure;

	p->giving = true;
	p->since_ns = now;
	p->from = has;
	p->before = counters(c);
	c->stat.squeezes++;
	give_start(p->give);
	log_about(&c->said, LOG_NOTICE,
		  "memory pressure: %llu MiB are missing, the dram tier gives back %llu of its %llu MiB",
		  (unsigned long long)(p->missing >> 20), (unsigned long long)((has - p->limit) >> 20),
		  (unsigned long long)(has >> 20));
	core_feed(c, FEED_PRESSURE, NULL, 1, p->limit, NULL);
}

static void end(struct core *c, uint64_t now, uint64_t has)
{
	struct pressure *p = c->pressure;
	struct squeezed s = counters(c);
	uint32_t rows[4] = {(uint32_t)MIN(s.rows - p->before.rows, UINT32_MAX)};
	uint64_t ns = now - p->since_ns;

	p->giving = false;
	c->stat.squeeze_ns_last = ns;
	c->stat.squeeze_ns_max = MAX(c->stat.squeeze_ns_max, ns);
	log_about(
		&c->said, LOG_NOTICE,
		"memory pressure: %llu MiB given back in %llu ms: %llu MiB were on nvme, %llu MiB moved there, "
		"%llu MiB dropped (%llu rows); the dram tier may hold %llu MiB",
		(unsigned long long)((p->from - MIN(p->from, has)) >> 20), (unsigned long long)(ns / 1000000),
		(unsigned long long)((s.copied - p->before.copied) >> 20),
		(unsigned long long)((s.demoted - p->before.demoted) >> 20),
		(unsigned long long)((s.dropped - p->before.dropped) >> 20),
		(unsigned long long)(s.rows - p->before.rows), (unsigned long long)(p->limit >> 20));
	core_feed(c, FEED_PRESSURE, NULL, 0, p->from - MIN(p->from, has), rows);
}

/* `bytes` are missing, or stalls say so. */
static void shrink(struct core *c, uint64_t bytes, uint64_t now)
{
	struct pressure *p = c->pressure;
	struct tier_stat st;
	uint64_t has = held(c, &st), least = MIN(c->cfg.pressure_floor, configured(c)), limit;

	/* Back so soon: the step up was too early. */
	if (p->step_ns && now - p->step_ns < 2 * p->quiet_ns)
		p->quiet_ns = MIN(p->quiet_ns * 2, QUIET_MOST_NS);
	p->step_ns = 0;
	p->last_ns = now;
	/* Some more, so that who takes on is not met at every few pages. */
	bytes += MIN(configured(c) / (2 * STEPS), AHEAD);
	limit = MAX(least, has - MIN(has, ALIGN_UP(bytes, LEAST)));
	if (limit < p->limit)
		set_limit(c, limit);
	if (!p->giving && has > MAX(p->limit, st.late))
		begin(c, now, has);
	watch(p); /* who takes fast is met soon */
	mover_kick(c);
}

void pressure_pump(struct core *c)
{
	struct pressure *p = c->pressure;
	struct tier_stat st;
	uint64_t now, has, drop_at, need;

	if (!p || !p->giving)
		return;
	now = now_ns();
	has = held(c, &st);
	if (has <= MAX(p->limit, st.late) || p->limit == UINT64_MAX) {
		end(c, now, has);
		return;
	}
	drop_at = p->since_ns + c->cfg.pressure_deadline_ms * UINT64_C(1000000);
	need = has - MAX(p->limit, st.late);
	revoke_choose(c, &st, need);
	/* Of private pages what revoked ones do not make up for; a round for those there is all the same. */
	need -= MIN(need, st.revoked - st.late);
	if (give_some(c, p->give, need, p->missing && now >= drop_at))
		mover_kick(c);
}

/* ---- up ----------------------------------------------------------------------------------- */

static void grow(struct core *c, uint64_t now)
{
	struct pressure *p = c->pressure;
	uint64_t margin = c->cfg.pressure_reserve / 8, step = MAX(configured(c) / STEPS, LEAST);
	struct tier_stat st;
	uint64_t has, room;

	if (p->limit == UINT64_MAX || p->giving || now - p->last_ns < p->quiet_ns ||
	    (p->step_ns && now - p->step_ns < STEP_NS))
		return;
	has = held(c, &st);
	room = p->spare - MIN(p->spare, margin);
	/* What the limit leaves free already may be taken at any moment: it counts as if it were. */
	room -= MIN(room, p->limit - MIN(p->limit, has));
	step = MIN(step, room / LEAST * LEAST);
	if (!step)
		return;
	p->step_ns = now;
	set_limit(c, p->limit + step);
	if (p->limit == UINT64_MAX) {
		log_about(&c->said, LOG_NOTICE,
			  "memory pressure is over: the dram tier has its whole size again");
		core_feed(c, FEED_PRESSURE, NULL, 0, 0, NULL);
	}
}

/* ---- looking ---------------------------------------------------------------------------------- */

static bool on(const struct core *c)
{
	return c->pressure && c->cfg.pressure_shrink;
}

static void look(struct core *c, bool stalls)
{
	struct pressure *p = c->pressure;
	uint64_t now = now_ns(), eighth = 0;
	struct tier_stat st;

	p->missing = host_missing(p->host, c->cfg.pressure_reserve, &p->spare);
	if (stalls)
		eighth = held(c, &st) / STEPS;
	if (p->missing || stalls) {
		shrink(c, MAX(p->missing, eighth), now);
		return;
	}
	if (p->giving && now - p->last_ns > ENOUGH_NS) { /* others gave: what is here may stay */
		set_limit(c, held(c, &st));
		end(c, now, st.resident);
	}
	grow(c, now);
}

/* As a PSI event does, but it has to be asked for. */
static bool stalled(struct core *c)
{
	uint64_t sum;

	if (probes_short(c, &sum) || !stall_look(&c->pressure->stall, sum, now_ns()))
		return false;
	c->stat.reclaim_events++;
	return true;
}

void pressure_tick(struct core *c)
{
	struct pressure *p = c->pressure;

	if (on(c) && !c->freeing)
		look(c, stalled(c));
	if (p && !c->freeing)
		(void)revoke_look(c, &p->revoke);
	/* Quiet for a long time: what was learnt of too early steps is forgotten. */
	if (p && p->limit == UINT64_MAX && now_ns() - p->last_ns > QUIET_MOST_NS)
		p->quiet_ns = QUIET_NS;
}

static int on_watch(sd_event_source *src, uint64_t usec, void *arg)
{
	struct core *c = arg;

	bool revoked = revoke_look(c, &c->pressure->revoke);

	if (on(c))
		look(c, stalled(c));
	if (c->pressure->giving)
		mover_kick(c);
	if (revoked || c->pressure->giving || now_ns() - c->pressure->last_ns < QUIET_NS)
		watch(c->pressure);
	return 0;
}

static int on_psi(sd_event_source *src, int fd, uint32_t revents, void *arg)
{
	struct core *c = arg;

	if (revents & EPOLLERR) { /* the cgroup is gone */
		sd_event_source_set_enabled(src, SD_EVENT_OFF);
		return 0;
	}
	c->stat.psi_events++;
	if (on(c))
		look(c, true);
	return 0;
}

/* ---- life --------------------------------------------------------------------------------------- */

static void listen_psi(struct core *c)
{
	struct pressure *p = c->pressure;
	int r;

	sd_event_source_disable_unref(p->psi);
	p->psi = NULL;
	close_fdp(&p->psi_fd);
	stall_set(&p->stall, c->cfg.pressure_psi);
	p->psi_fd = r = host_psi(p->host, c->cfg.pressure_psi, p->where);
	if (r >= 0)
		r = sd_event_add_io(c->ev, &p->psi, p->psi_fd, EPOLLPRI, on_psi, c);
	if (r < 0) {
		close_fdp(&p->psi_fd);
		snprintf(p->where, sizeof(p->where), "off: %s",
			 strcmp(c->cfg.pressure_psi, "no") ? strerror(-r) : "psi = no");
	}
}

int pressure_open(struct core *c)
{
	struct pressure *p;
	int r;

	if (!dram(c) || c->seams.stepped)
		return 0;
	p = c->pressure = calloc(1, sizeof(*p));
	if (!p)
		return -ENOMEM;
	p->psi_fd = -1;
	p->limit = UINT64_MAX;
	p->quiet_ns = QUIET_NS;
	p->give = give_new(c->tenants);
	r = p->give ? host_open(&p->host, "") : -ENOMEM;
	if (r >= 0)
		r = sd_event_add_time_relative(c->ev, &p->watch, CLOCK_MONOTONIC, WATCH_US, 1000, on_watch, c);
	if (r < 0)
		return r;
	sd_event_source_set_enabled(p->watch, SD_EVENT_OFF);
	listen_psi(c);
	return 0;
}

void pressure_close(struct core *c)
{
	struct pressure *p = c->pressure;

	if (!p)
		return;
	c->pressure = NULL;
	sd_event_source_disable_unref(p->psi);
	sd_event_source_disable_unref(p->watch);
	close_fdp(&p->psi_fd);
	host_close(p->host);
	give_free(p->give);
	free(p);
}

void pressure_reload(struct core *c)
{
	struct pressure *p = c->pressure;

	if (!p)
		return;
	listen_psi(c);
	if (!c->cfg.pressure_shrink) {
		p->giving = false;
		set_limit(c, UINT64_MAX);
	} else if (!c->freeing) {
		look(c, false); /* what is to stay available may be another */
	}
}

bool pressure_gives(const struct core *c)
{
	return c->pressure && c->pressure->giving && c->pressure->missing;
}

void pressure_stat(const struct core *c, struct core_stat *ret)
{
	const struct pressure *p = c->pressure;
	uint64_t sum;

	ret->pressure_on = on(c);
	ret->dram_limit = p && p->limit != UINT64_MAX ? p->limit : ret->tier[KVT_TIER_DRAM].capacity;
	ret->memory_missing = p ? p->missing : 0;
	ret->squeezed = p && p->limit != UINT64_MAX;
	snprintf(ret->psi, sizeof(ret->psi), "%s", p ? p->where : "off: there is no dram tier");
	if (p)
		stall_says(&p->stall, probes_short(c, &sum), ret->reclaim, sizeof(ret->reclaim));
	else
		snprintf(ret->reclaim, sizeof(ret->reclaim), "%s", ret->psi);
}
