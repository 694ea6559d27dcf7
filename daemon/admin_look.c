/* SPDX-License-Identifier: MIT */
/* Verbs that look: status, ls, show, watch, verify status, version. */
#include <stdio.h>
#include <string.h>
#include "daemon/admin_call.h"
#include "ipc/wire.h"
#include "shm/util.h"

/*
 * A reply ends after this much work, in units of about 5 ns: 0.2 ms. Counted and not timed, for by the clock a
 * busy host's slice would do next to nothing, after it had waited for a processor.
 */
#define LS_WORK 40000u
#define LS_SEQ 300u /* looked at, and written where the caller may see it */
#define LS_LANE 2u

static const char *const tier_names[KVT_TIERS] = {"device", "dram", "nvme"};

static void set_num(json_t *o, const char *key, uint64_t v)
{
	json_object_set_new(o, key, admin_num(v));
}

static void set_text(json_t *o, const char *key, const char *v)
{
	json_object_set_new(o, key, admin_text(v));
}

static void set_bool(json_t *o, const char *key, bool v)
{
	json_object_set_new(o, key, json_boolean(v));
}

/* Counts by powers of two: bucket[i] are values from 2^i to 2^(i+1) - 1, the last ones empty left out. */
static void set_histogram(json_t *o, const char *key, const struct histogram *h)
{
	json_t *j = json_object(), *list = json_array();
	unsigned n = HISTOGRAM_BUCKETS;

	while (n && !h->bucket[n - 1])
		n--;
	for (unsigned i = 0; i < n; i++)
		json_array_append_new(list, admin_num(h->bucket[i]));
	set_num(j, "count", histogram_count(h));
	set_num(j, "sum", h->sum);
	set_num(j, "p50", histogram_quantile(h, 0.5));
	set_num(j, "p99", histogram_quantile(h, 0.99));
	json_object_set_new(j, "bucket", list);
	json_object_set_new(o, key, j);
}

/* ---- status ----------------------------------------------------------------------- */

static json_t *nodes_json(const struct tier_stat *ts)
{
	json_t *list = json_array();

	for (uint32_t i = 0; i < ts->nodes; i++) {
		json_t *o = json_object();

		set_num(o, "node", (uint64_t)ts->at[i].id);
		set_num(o, "capacity_bytes", ts->at[i].capacity);
		set_num(o, "used_bytes", ts->at[i].used);
		set_num(o, "free_bytes", ts->at[i].free);
		set_num(o, "resident_bytes", ts->at[i].resident);
		set_num(o, "fallbacks", ts->at[i].fallbacks);
		json_array_append_new(list, o);
	}
	return list;
}

static json_t *tier_json(const struct core_stat *s, unsigned t)
{
	const struct tier_stat *ts = &s->tier[t];
	json_t *o = json_object();

	set_text(o, "name", tier_names[t]);
	set_num(o, "rows", s->rows[t]);
	set_num(o, "bytes", s->bytes[t]);
	set_num(o, "rows_demoted_into", s->rows_demoted[t]);
	set_num(o, "rows_promoted_out", s->rows_promoted[t]);
	set_num(o, "refaults", s->refaults[t]);
	if (t == KVT_TIER_DEVICE)
		return o;
	set_histogram(o, "refault_rows", &s->refault_rows[t]);
	set_histogram(o, "read_ns", &s->read_ns[t]);
	set_histogram(o, "write_ns", &s->write_ns[t]);
	set_num(o, "capacity_bytes", ts->capacity);
	set_num(o, "used_bytes", ts->used);
	set_num(o, "free_bytes", ts->free);
	set_num(o, "overhead_bytes", ts->overhead);
	if (t == KVT_TIER_DRAM) {
		set_num(o, "published_bytes", ts->published);
		set_num(o, "published_held_bytes", ts->held);
	}
	set_num(o, "returned_bytes", s->returned[t]);
	if (t == KVT_TIER_DRAM)
		set_bool(o, "kept", s->kept);
	set_num(o, "free_min_permille", s->marks[t].min);
	set_num(o, "free_low_permille", s->marks[t].low);
	set_num(o, "free_high_permille", s->marks[t].high);
	set_num(o, "reads", ts->reads);
	set_num(o, "writes", ts->writes);
	set_num(o, "read_bytes", ts->read_bytes);
	set_num(o, "write_bytes", ts->write_bytes);
	set_num(o, "device_write_bytes", ts->device_write_bytes);
	set_num(o, "errors", ts->errors);
	set_num(o, "inflight", ts->inflight);
	set_num(o, "leaked_bytes", ts->leaked_bytes);
	set_num(o, "cleaned_segments", ts->cleaned_segments);
	set_bool(o, "offline", ts->offline);
	set_bool(o, "huge_pages", ts->huge);
	set_bool(o, "io_uring", ts->io_uring);
	json_object_set_new(o, "node", json_integer(ts->node));
	if (t == KVT_TIER_DRAM) {
		set_text(o, "numa", s->numa);
		set_num(o, "node_fallbacks", s->node_fallbacks);
		set_num(o, "migrated_pages", s->migrated_pages);
		set_num(o, "migrated_bytes", s->migrated_bytes);
		json_object_set_new(o, "nodes", nodes_json(ts));
	}
	set_text(o, "note", ts->note);
	return o;
}

static json_t *status_head(const struct core_stat *s)
{
	json_t *o = json_object();

	set_text(o, "version", KVT_VERSION);
	set_num(o, "uptime_ns", s->uptime_ns);
	set_text(o, "mode", s->observe ? "observe" : "publish");
	set_bool(o, "frozen", s->frozen);
	set_bool(o, "draining", s->draining);
	set_text(o, "policy", s->policy);
	return o;
}

static json_t *throttle_json(const struct core_stat *s)
{
	json_t *o = json_object();

	set_bool(o, "on", s->throttle_on);
	set_num(o, "window_bytes", s->throttle_window_bytes);
	set_num(o, "cuts", s->throttle_cuts);
	set_num(o, "waits", s->throttle_waits);
	set_num(o, "delayed_bytes", s->throttle_delayed_bytes);
	set_num(o, "cleaner_bytes", s->throttle_cleaner_bytes);
	set_text(o, "by", s->throttle_by);
	set_bool(o, "by_disk", s->throttle_disk);
	set_num(o, "disk_cuts", s->throttle_disk_cuts);
	set_num(o, "disk_read_ns", s->throttle_disk_read_ns);
	set_num(o, "disk_write_ns", s->throttle_disk_write_ns);
	set_num(o, "disk_wait_ns", s->throttle_disk_wait_ns);
	return o;
}

static json_t *pressure_json(const struct core_stat *s)
{
	json_t *o = json_object();

	set_bool(o, "shrink", s->pressure_on);
	set_bool(o, "squeezed", s->squeezed);
	set_text(o, "psi", s->psi);
	set_num(o, "dram_limit_bytes", s->dram_limit);
	set_num(o, "dram_resident_bytes", s->tier[KVT_TIER_DRAM].resident);
	set_num(o, "missing_bytes", s->memory_missing);
	set_num(o, "squeezes", s->squeezes);
	set_num(o, "psi_events", s->psi_events);
	set_text(o, "reclaim", s->reclaim);
	set_num(o, "reclaim_events", s->reclaim_events);
	set_num(o, "ns_last", s->squeeze_ns_last);
	set_num(o, "ns_max", s->squeeze_ns_max);
	set_num(o, "returned_bytes", s->squeeze_returned_bytes);
	set_num(o, "on_nvme_bytes", s->squeeze_copied_bytes);
	set_num(o, "demoted_bytes", s->squeeze_demoted_bytes);
	set_num(o, "dropped_bytes", s->squeeze_dropped_bytes);
	set_num(o, "dropped_rows", s->squeeze_dropped_rows);
	set_num(o, "revokes", s->revokes);
	set_num(o, "revoked_bytes", s->tier[KVT_TIER_DRAM].revoked);
	set_num(o, "kept_by_clients_bytes", s->tier[KVT_TIER_DRAM].late);
	set_num(o, "revoke_returned_bytes", s->revoke_returned_bytes);
	return o;
}

static json_t *limbo_json(const struct core_stat *s)
{
	json_t *o = json_object();

	set_num(o, "dram_bytes", s->limbo_bytes[KVT_TIER_DRAM]);
	set_num(o, "nvme_bytes", s->limbo_bytes[KVT_TIER_NVME]);
	set_num(o, "seals", s->limbo_seals);
	set_num(o, "let_go_bytes", s->limbo_let_go_bytes);
	return o;
}

/* The whole daemon, for the admin socket. */
static json_t *status_all(const struct core_stat *s)
{
	json_t *o = status_head(s), *tiers = json_array(), *plans = json_object(), *misses = json_object();

	set_num(o, "clients", s->clients);
	set_num(o, "sequences", s->seqs);
	set_num(o, "orphans", s->orphans);
	set_num(o, "models", s->models);
	for (unsigned t = 0; t < KVT_TIERS; t++)
		json_array_append_new(tiers, tier_json(s, t));
	json_object_set_new(o, "tiers", tiers);
	set_num(plans, "decided", s->plans);
	set_num(plans, "acked", s->plans_acked);
	set_num(plans, "cancelled", s->plans_cancelled);
	set_num(plans, "nacked", s->plans_nacked);
	set_num(plans, "ns_last", s->plan_ns_last);
	set_num(plans, "ns_max", s->plan_ns_max);
	set_num(plans, "ns_total", s->plan_ns_total);
	set_histogram(plans, "plan_ns", &s->plan_ns);
	set_histogram(plans, "decide_ns", &s->decide_ns);
	json_object_set_new(o, "plans", plans);
	set_num(misses, "corrupt", s->miss_corrupt);
	set_num(misses, "client_mutated", s->miss_client_mutated);
	set_num(misses, "io", s->miss_io);
	set_num(misses, "stale", s->miss_stale);
	set_num(misses, "nospace", s->miss_nospace);
	json_object_set_new(o, "misses", misses);
	json_object_set_new(o, "pressure", pressure_json(s));
	json_object_set_new(o, "throttle", throttle_json(s));
	json_object_set_new(o, "limbo", limbo_json(s));
	set_num(o, "rows_dropped", s->rows_dropped);
	set_num(o, "recalls", s->recalls);
	set_num(o, "rows_recalled", s->rows_recalled);
	set_num(o, "direct_demotions", s->direct_demotions);
	set_num(o, "hangups_protocol", s->hangups_protocol);
	set_num(o, "admin_mutations", s->admin_mutations);
	set_num(o, "index_bytes", s->index_bytes);
	set_num(o, "staging_bytes", s->staging_bytes);
	set_num(o, "plan_bytes", s->plan_bytes);
	set_num(o, "directory_bytes", s->directory_bytes);
	set_num(o, "worker_jobs", s->worker_jobs);
	set_num(o, "page_requests", s->page_requests);
	set_num(o, "loop_max_ns", s->loop_max_ns);
	set_num(o, "loop_recent_max_ns", s->loop_recent_max_ns);
	set_num(o, "loop_cpu_max_ns", s->loop_cpu_max_ns);
	set_num(o, "loop_cpu_recent_max_ns", s->loop_cpu_recent_max_ns);
	return o;
}

/* Exact, where what ls says of sequences is as of their last count. Limits of 2^63 and more: none. */
static json_t *tenants_json(struct core *c)
{
	json_t *list = json_array();
	struct core_tenant_stat t;
	uint32_t cursor = 0;

	while (core_tenant_next(c, &cursor, &t)) {
		json_t *o = json_object();

		set_text(o, "name", t.name);
		set_num(o, "sequences", t.seqs);
		set_num(o, "region_bytes", t.region_bytes);
		set_num(o, "revoked_bytes", t.revoked);
		set_num(o, "revoked_kept_bytes", t.late);
		set_num(o, "dram_bytes", t.bytes[KVT_TIER_DRAM]);
		set_num(o, "nvme_bytes", t.bytes[KVT_TIER_NVME]);
		set_num(o, "max_sequences", t.limit.max_seqs);
		set_num(o, "max_region_bytes", t.limit.region_bytes);
		set_num(o, "max_dram_bytes", t.limit.dram_bytes);
		set_num(o, "max_nvme_bytes", t.limit.nvme_bytes);
		json_array_append_new(list, o);
	}
	return list;
}

/* A tenant's share: nothing that another tenant, or another user of this one, could have caused. */
static json_t *status_own(struct admin_call *a, const struct core_stat *s)
{
	json_t *o = status_head(s), *tiers = json_array();
	struct core_owner_stat own;

	core_owner_stat(a->core, a->peer->owner, &own);
	set_text(o, "tenant", admin_tenant(a));
	set_num(o, "sequences", own.seqs);
	set_num(o, "orphans", own.orphans);
	for (unsigned t = 0; t < KVT_TIERS; t++) {
		json_t *tier = json_object();

		set_text(tier, "name", tier_names[t]);
		set_num(tier, "rows", own.rows[t]);
		set_num(tier, "bytes", own.bytes[t] + (t == KVT_TIER_DRAM ? own.published_held : 0));
		if (t == KVT_TIER_DRAM) {
			set_num(tier, "published_bytes", own.published);
			set_num(tier, "published_held_bytes", own.published_held);
		}
		json_array_append_new(tiers, tier);
	}
	json_object_set_new(o, "tiers", tiers);
	set_num(o, "plans_decided", own.plans);
	set_num(o, "misses_total", own.misses);
	set_num(o, "rows_dropped", own.dropped_rows);
	return o;
}

int verb_status(struct admin_call *a)
{
	struct core_stat s;

	core_stat(a->core, &s);
	a->json = admin_tenant(a) ? status_own(a, &s) : status_all(&s);
	if (!admin_tenant(a))
		json_object_set_new(a->json, "probes", admin_probes(a->core));
	if (!admin_tenant(a))
		json_object_set_new(a->json, "tenants", tenants_json(a->core));
	return 0;
}

/* ---- sequences ------------------------------------------------------------------------ */

/* Written as text: a listing of thousands would spend its time on trees otherwise. */
static void seq_text(struct json_text *o, const struct core_seq_stat *s)
{
	char text[40];

	json_text_open(o, NULL, '{');
	snprintf(text, sizeof(text), "0x%llx", (unsigned long long)s->handle);
	json_text_str(o, "handle", text);
	for (int i = 0; i < 16; i++) {
		text[2 * i] = "0123456789abcdef"[s->key[i] >> 4];
		text[2 * i + 1] = "0123456789abcdef"[s->key[i] & 15];
	}
	text[32] = 0;
	json_text_str(o, "key", text);
	json_text_str(o, "tenant", s->tenant);
	json_text_str(o, "client", s->client);
	json_text_str(o, "model", s->model);
	json_text_str(o, "policy", s->policy);
	if (s->policy_reason)
		json_text_str(o, "policy_reason", s->policy_reason);
	if (s->stalls_known) {
		json_text_open(o, "stall", '{');
		json_text_num(o, "sched_ns", s->stalls.sched_ns);
		json_text_num(o, "fault_ns", s->stalls.fault_ns);
		json_text_num(o, "reclaim_ns", s->stalls.reclaim_ns);
		json_text_num(o, "faults", s->stalls.faults);
		json_text_close(o, '}');
	}
	json_text_num(o, "rows", s->rows);
	json_text_num(o, "epoch", s->epoch);
	json_text_num(o, "lanes", s->lanes);
	json_text_str(o, "lifetime", s->lifetime == KVT_LEASED ? "leased" : "ephemeral");
	json_text_num(o, "ttl_left_s", s->ttl_left_s);
	json_text_num(o, "resident_max", s->resident_max);
	json_text_open(o, "budget", '{');
	for (unsigned t = 0; t < KVT_TIERS; t++)
		if (s->budget[t] == KVT_ROWS_ALL)
			json_text_null(o, tier_names[t]);
		else
			json_text_num(o, tier_names[t], s->budget[t]);
	json_text_close(o, '}');
	json_text_bool(o, "adaptive", s->adaptive);
	if (s->adaptive) {
		json_text_num(o, "device_rows_least", s->device_least);
		json_text_num(o, "device_rows_most", s->device_most);
	}
	if (s->shared) {
		json_text_num(o, "device_rows_held", s->device_held);
		json_text_num(o, "device_rows_brought", s->device_brought);
	}
	json_text_open(o, "tiers", '{');
	for (unsigned t = 0; t < KVT_TIERS; t++) {
		json_text_open(o, tier_names[t], '{');
		json_text_num(o, "rows", s->tier_rows[t]);
		json_text_num(o, "bytes", s->tier_bytes[t]);
		json_text_close(o, '}');
	}
	json_text_close(o, '}');
	json_text_bool(o, "window", s->window);
	json_text_bool(o, "direct", s->direct);
	if (s->direct)
		json_text_num(o, "direct_pages", s->direct_pages);
	json_text_num(o, "rows_dropped", s->dropped_rows);
	json_text_num(o, "rows_pinned", s->pinned_rows);
	json_text_num(o, "plans", s->plans);
	json_text_num(o, "plan_id", s->plan_id);
	json_text_str(o, "plan_state", s->plan_state);
	json_text_num(o, "plan_ns_last", s->plan_ns_last);
	json_text_num(o, "refaults", s->refaults);
	json_text_num(o, "misses", s->misses);
	json_text_num(o, "index_bytes", s->index_bytes);
	json_text_close(o, '}');
}

static json_t *seq_json(const struct core_seq_stat *s)
{
	struct json_text o = {.buf = NULL};
	json_t *j;

	seq_text(&o, s);
	j = o.failed ? NULL : json_loadb(o.buf, o.n, 0, NULL);
	free(o.buf);
	return j;
}

/*
 * A slice of the loop at a time, each with the cursor of the next: {"seqs": [...], "next": cursor or null}.
 * What the caller may not see costs time as well, so a page may be empty.
 */
int verb_ls(struct admin_call *a)
{
	struct json_text *o = &a->text;
	struct core_seq_stat s;
	uint32_t cursor = 0, work = 0;
	bool more = true;
	int r;

	if (a->argc == 2) {
		r = admin_number_arg(a, 1, "FROM", 0, UINT32_MAX, &cursor);
		if (r)
			return r;
	}
	json_text_open(o, NULL, '{');
	json_text_open(o, "seqs", '[');
	while (work < LS_WORK) {
		more = core_seq_next(a->core, &cursor, &s);
		if (!more)
			break;
		work += LS_SEQ + LS_LANE * s.lanes;
		if (admin_sees(a, &s))
			seq_text(o, &s);
	}
	json_text_close(o, ']');
	if (more)
		json_text_num(o, "next", cursor);
	else
		json_text_null(o, "next");
	json_text_close(o, '}');
	return 0;
}

static int add_lanes(struct admin_call *a, uint64_t handle, uint32_t lanes)
{
	_cleanup_free_ struct core_lane_stat *l = calloc(lanes ?: 1, sizeof(*l));
	json_t *list = json_array();
	int n;

	json_object_set_new(a->json, "lane", list);
	if (!l)
		return admin_refuse(a, KVT_E_NOMEM, "out of memory");
	n = core_seq_lanes(a->core, handle, l, lanes);
	if (n < 0)
		return admin_refuse(a, n, "SEQ: \"%.40s\", no such sequence", a->argv[1]);
	for (int i = 0; i < n && i < (int)lanes; i++)
		json_array_append_new(list,
				      json_pack("{s:o,s:o,s:o,s:o}", "device", admin_num(l[i].device), "dram",
						admin_num(l[i].dram), "nvme", admin_num(l[i].nvme), "dropped",
						admin_num(l[i].dropped)));
	return 0;
}

int verb_show(struct admin_call *a)
{
	struct core_seq_stat s;
	uint64_t handle;
	int r;

	if (a->argc == 3 && strcmp(a->argv[2], "lanes"))
		return admin_usage(a);
	r = admin_seq_arg(a, 1, &handle);
	if (r)
		return r;
	r = core_seq_stat(a->core, handle, &s);
	if (r)
		return admin_refuse(a, r, "SEQ: \"%.40s\", no such sequence", a->argv[1]);
	a->json = seq_json(&s);
	if (!a->json)
		return admin_refuse(a, KVT_E_NOMEM, "out of memory");
	return a->argc == 3 ? add_lanes(a, handle, s.lanes) : 0;
}

/* ---- the rest ------------------------------------------------------------------------- */

int verb_watch(struct admin_call *a)
{
	size_t bytes = 0;
	int fd;

	fd = core_feed_fd(a->core, &bytes);
	if (fd < 0)
		return admin_refuse(a, KVT_E_INTERNAL, "feed: not available");
	a->result->fd = fd;
	a->json = json_pack("{s:o}", "feed_bytes", admin_num(bytes));
	return 0;
}

int verb_version(struct admin_call *a)
{
	a->json = json_pack("{s:s,s:i,s:i}", "version", KVT_VERSION, "protocol", WIRE_VERSION, "abi",
			    (int)KVT_ABI_VERSION);
	return 0;
}
