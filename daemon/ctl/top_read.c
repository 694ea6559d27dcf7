/* SPDX-License-Identifier: MIT */
/* top: the daemon's JSON as plain structs, rates, and sums by tenant. A field that is missing reads as 0. */
#include <stdio.h>
#include <string.h>
#include "daemon/ctl/top.h"
#include "shm/util.h"

static const char *const tier_names[TOP_TIERS] = {"device", "dram", "nvme"};

static uint64_t num(const json_t *o, const char *key)
{
	json_int_t v = json_integer_value(json_object_get(o, key));

	return v > 0 ? (uint64_t)v : 0;
}

static uint64_t quantile(const json_t *o, const char *key, const char *which)
{
	return num(json_object_get(o, key), which);
}

/* Clients choose names: nothing of them reaches a terminal but printable ASCII. */
static void text(char *ret, size_t size, const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key)) ?: "";
	size_t i;

	for (i = 0; s[i] && i + 1 < size; i++)
		ret[i] = s[i] >= 0x20 && s[i] < 0x7f ? s[i] : '?';
	ret[i] = 0;
}

static void read_tier(struct top_tier *t, const json_t *j)
{
	text(t->name, sizeof(t->name), j, "name");
	t->sized = json_object_get(j, "capacity_bytes");
	t->offline = json_is_true(json_object_get(j, "offline"));
	t->rows = num(j, "rows");
	t->bytes = num(j, "bytes");
	t->capacity = num(j, "capacity_bytes");
	t->used = num(j, "used_bytes");
	t->free = num(j, "free_bytes");
	t->mark[0] = num(j, "free_min_permille");
	t->mark[1] = num(j, "free_low_permille");
	t->mark[2] = num(j, "free_high_permille");
	t->demoted = num(j, "rows_demoted_into");
	t->promoted = num(j, "rows_promoted_out");
	t->refaults = num(j, "refaults");
	t->read_bytes = num(j, "read_bytes");
	t->write_bytes = num(j, "write_bytes");
	t->read_p50 = quantile(j, "read_ns", "p50");
	t->read_p99 = quantile(j, "read_ns", "p99");
	t->write_p50 = quantile(j, "write_ns", "p50");
	t->write_p99 = quantile(j, "write_ns", "p99");
}

static void read_probes(struct top_status *s, const json_t *j)
{
	static const char *const names[TOP_WAITS] = {"disk_read", "disk_write", "uring",
						     "reclaim",   "fault",      "sched"};

	s->probed = j;
	s->probes_on = json_is_true(json_object_get(j, "on"));
	text(s->probes_off, sizeof(s->probes_off), j, "why_off");
	for (unsigned i = 0; i < TOP_WAITS; i++)
		s->wait_p99[i] = quantile(j, names[i], "ns_p99");
}

/* The daemon's own clock measures the time between two answers, so that theirs on the way does not count. */
static void count_rates(struct top_status *s, const struct top_status *b)
{
	uint64_t ns = s->uptime_ns > b->uptime_ns ? s->uptime_ns - b->uptime_ns : 0;

	for (unsigned i = 0; i < s->tiers && i < b->tiers; i++) {
		struct top_tier *t = &s->tier[i];
		const struct top_tier *u = &b->tier[i];

		t->demoted_s = top_rate(u->demoted, t->demoted, ns);
		t->promoted_s = top_rate(u->promoted, t->promoted, ns);
		t->refaults_s = top_rate(u->refaults, t->refaults, ns);
		t->read_s = top_rate(u->read_bytes, t->read_bytes, ns);
		t->write_s = top_rate(u->write_bytes, t->write_bytes, ns);
		s->refaults_s += t->refaults_s;
	}
	s->plans_s = top_rate(b->plans, s->plans, ns);
	s->dropped_s = top_rate(b->dropped, s->dropped, ns);
	s->misses_s = top_rate(b->misses, s->misses, ns);
}

static void read_tenants(struct top_status *s, const json_t *list)
{
	const json_t *o;
	size_t i;

	json_array_foreach(list, i, o)
	{
		struct top_tenant *t = &s->tenants[s->n_tenants];

		if (s->n_tenants == TOP_TENANTS)
			break;
		text(t->name, sizeof(t->name), o, "name");
		t->told = true;
		t->seqs = num(o, "sequences");
		t->region_bytes = num(o, "region_bytes");
		t->tier_bytes[1] = num(o, "dram_bytes");
		t->tier_bytes[2] = num(o, "nvme_bytes");
		t->most[1] = num(o, "max_dram_bytes");
		t->most[2] = num(o, "max_nvme_bytes");
		s->n_tenants++;
	}
}

void top_read_status(struct top_status *ret, const json_t *j, const struct top_status *before)
{
	const json_t *plans = json_object_get(j, "plans"), *misses = json_object_get(j, "misses"), *o;
	struct top_status s = {};
	const char *key;
	size_t i;

	text(s.version, sizeof(s.version), j, "version");
	text(s.mode, sizeof(s.mode), j, "mode");
	text(s.policy, sizeof(s.policy), j, "policy");
	text(s.tenant, sizeof(s.tenant), j, "tenant");
	s.own = json_object_get(j, "tenant");
	s.frozen = json_is_true(json_object_get(j, "frozen"));
	s.draining = json_is_true(json_object_get(j, "draining"));
	s.uptime_ns = num(j, "uptime_ns");
	s.clients = num(j, "clients");
	s.seqs = num(j, "sequences");
	s.orphans = num(j, "orphans");
	s.models = num(j, "models");
	json_array_foreach(json_object_get(j, "tiers"), i, o)
	{
		if (i < TOP_TIERS)
			read_tier(&s.tier[s.tiers++], o);
	}
	s.plans = s.own ? num(j, "plans_decided") : num(plans, "decided");
	s.plan_last = num(plans, "ns_last");
	s.plan_max = num(plans, "ns_max");
	s.plan_p50 = quantile(plans, "plan_ns", "p50");
	s.plan_p99 = quantile(plans, "plan_ns", "p99");
	s.decide_p50 = quantile(plans, "decide_ns", "p50");
	s.decide_p99 = quantile(plans, "decide_ns", "p99");
	s.loop_max = num(j, "loop_max_ns");
	s.dropped = num(j, "rows_dropped");
	s.misses = num(j, "misses_total");
	json_object_foreach((json_t *)misses, key, o) s.misses += num(misses, key);
	read_tenants(&s, json_object_get(j, "tenants"));
	read_probes(&s, json_object_get(j, "probes"));
	if (before)
		count_rates(&s, before);
	*ret = s;
}

void top_read_seq(struct top_seq *s, const json_t *j)
{
	const json_t *tiers = json_object_get(j, "tiers"),
		     *budget = json_object_get(json_object_get(j, "budget"), "device"), *stall;

	memset(s, 0, sizeof(*s));
	text(s->handle, sizeof(s->handle), j, "handle");
	text(s->key, sizeof(s->key), j, "key");
	text(s->tenant, sizeof(s->tenant), j, "tenant");
	text(s->client, sizeof(s->client), j, "client");
	text(s->model, sizeof(s->model), j, "model");
	text(s->policy, sizeof(s->policy), j, "policy");
	text(s->state, sizeof(s->state), j, "plan_state");
	s->rows = num(j, "rows");
	for (unsigned t = 0; t < TOP_TIERS; t++) {
		const json_t *o = json_object_get(tiers, tier_names[t]);

		s->tier_rows[t] = num(o, "rows");
		s->tier_bytes[t] = num(o, "bytes");
	}
	s->budget = json_is_integer(budget) ? (uint64_t)json_integer_value(budget) : UINT64_MAX;
	s->dropped = num(j, "rows_dropped");
	s->pinned = num(j, "rows_pinned");
	s->refaults = num(j, "refaults");
	s->plans = num(j, "plans");
	s->misses = num(j, "misses");
	stall = json_object_get(j, "stall");
	s->stall = num(stall, "sched_ns") + num(stall, "fault_ns") + num(stall, "reclaim_ns");
}

static struct top_tenant *find_tenant(struct top_model *m, const char *name)
{
	struct top_tenant *t;

	for (unsigned i = 0; i < m->tenants; i++)
		if (!strcmp(m->tenant[i].name, name))
			return &m->tenant[i];
	if (m->tenants == TOP_TENANTS) {
		m->tenants_cut = true;
		return NULL;
	}
	t = &m->tenant[m->tenants++];
	snprintf(t->name, sizeof(t->name), "%s", name);
	return t;
}

static int by_bytes(const void *a, const void *b)
{
	const struct top_tenant *x = a, *y = b;
	uint64_t u = 0, v = 0;

	for (unsigned i = 0; i < TOP_TIERS; i++) {
		u += x->tier_bytes[i];
		v += y->tier_bytes[i];
	}
	return u == v ? strcmp(x->name, y->name) : u < v ? 1 : -1;
}

void top_sum_tenants(struct top_model *m)
{
	m->tenants = m->status.n_tenants;
	m->tenants_cut = false;
	memset(m->tenant, 0, sizeof(m->tenant));
	memcpy(m->tenant, m->status.tenants, m->tenants * sizeof(m->tenant[0]));
	for (size_t i = 0; i < m->n_seqs; i++) {
		const struct top_seq *s = &m->seqs[i];
		struct top_tenant *t = find_tenant(m, s->tenant);

		if (!t)
			continue;
		t->seqs += !t->told;
		t->rows += s->rows;
		t->dropped += s->dropped;
		t->refaults += s->refaults;
		for (unsigned k = 0; k < TOP_TIERS; k++)
			t->tier_bytes[k] += !k || !t->told ? s->tier_bytes[k] : 0;
	}
	qsort(m->tenant, m->tenants, sizeof(m->tenant[0]), by_bytes);
}

/* ---- JSON ----------------------------------------------------------------------------- */

static json_t *rates_json(const struct top_status *s)
{
	json_t *o = json_pack("{s:f,s:f,s:f,s:f}", "plans", s->plans_s, "refaults", s->refaults_s,
			      "rows_dropped", s->dropped_s, "misses", s->misses_s),
	       *tiers = json_object();

	for (unsigned i = 0; i < s->tiers; i++) {
		const struct top_tier *t = &s->tier[i];

		json_object_set_new(tiers, t->name,
				    json_pack("{s:f,s:f,s:f,s:f,s:f}", "rows_demoted_into", t->demoted_s,
					      "rows_promoted_out", t->promoted_s, "refaults", t->refaults_s,
					      "read_bytes", t->read_s, "write_bytes", t->write_s));
	}
	json_object_set_new(o, "tiers", tiers);
	return o;
}

json_t *top_json(const struct top_model *m)
{
	json_t *tenants = json_array(), *events = json_array();

	for (unsigned i = 0; i < m->tenants; i++) {
		const struct top_tenant *t = &m->tenant[i];

		json_array_append_new(tenants,
				      json_pack("{s:s,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I}", "name", t->name,
						"sequences", (json_int_t)t->seqs, "rows", (json_int_t)t->rows,
						"region_bytes", (json_int_t)t->region_bytes, "device_bytes",
						(json_int_t)t->tier_bytes[0], "dram_bytes",
						(json_int_t)t->tier_bytes[1], "nvme_bytes",
						(json_int_t)t->tier_bytes[2], "rows_dropped",
						(json_int_t)t->dropped, "refaults", (json_int_t)t->refaults));
	}
	for (uint64_t i = m->events > TOP_EVENTS ? m->events - TOP_EVENTS : 0; i < m->events; i++)
		json_array_append_new(events, event_json(&m->event[i % TOP_EVENTS]));
	return json_pack("{s:O,s:o,s:o,s:O,s:o}", "status", m->raw_status, "rates_per_s",
			 rates_json(&m->status), "tenants", tenants, "seqs", m->raw_seqs, "events", events);
}
