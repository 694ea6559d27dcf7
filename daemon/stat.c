/* SPDX-License-Identifier: MIT */
/* Looking: counters of the whole, of a sequence, of its lanes. */
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include "daemon/direct.h"
#include "daemon/internal.h"
#include "daemon/limbo.h"
#include "daemon/pressure.h"
#include "shm/util.h"

void core_stat(struct core *c, struct core_stat *ret)
{
	const struct client *cl;
	const struct region *g;

	*ret = c->stat;
	ret->uptime_ns = now_ns() - c->started_ns;
	ret->clients = 0;
	LIST_FOREACH(cl, &c->clients, link)
		ret->clients += cl->hello;
	ret->seqs = c->n_seqs;
	ret->orphans = c->n_orphans;
	ret->models = c->n_models;
	ret->rows[KVT_TIER_DEVICE] += c->fresh_rows;
	ret->directory_bytes = c->directory_bytes;
	ret->worker_jobs = workers_busy(c->workers);
	ret->page_requests = c->pios;
	ret->loop_recent_max_ns = MAX(c->slices.now_ns, c->slices.before_ns);
	ret->loop_cpu_recent_max_ns = MAX(c->slices.cpu_now_ns, c->slices.cpu_before_ns);
	LIST_FOREACH(g, &c->all_regions, all)
		ret->bytes[KVT_TIER_DEVICE] += g->ops->resident(g->mem);
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
		if (c->pages.tier[t]) {
			c->pages.tier[t]->ops->stat(c->pages.tier[t], &ret->tier[t]);
			for (uint32_t i = 0; i < c->tenants; i++)
				ret->bytes[t] += c->pages.used[t][i];
		}
	ret->bytes[KVT_TIER_DRAM] += ret->tier[KVT_TIER_DRAM].held;
	pressure_stat(c, ret);
	throttle_stat(c, ret);
	limbo_stat(c, ret);
	near_stat(c, ret);
	ret->marks[KVT_TIER_DRAM] = c->cfg.dram_marks;
	ret->marks[KVT_TIER_NVME] = c->cfg.nvme_marks;
	ret->index_bytes = c->seq_index_bytes + c->pages.bytes;
	ret->staging_bytes = c->pages.tier[KVT_TIER_NVME] ? c->cfg.nvme_staging : 0;
	ret->observe = c->cfg.observe;
	ret->frozen = c->frozen;
	ret->draining = c->draining;
	ret->kept = c->seams.keep && c->pages.tier[KVT_TIER_DRAM];
	memcpy(ret->policy, c->policy, sizeof(ret->policy));
}

bool core_tenant_next(struct core *c, uint32_t *cursor, struct core_tenant_stat *ret)
{
	const struct tenant *t = &c->tenant[*cursor];

	if (*cursor >= c->tenants)
		return false;
	*ret = (struct core_tenant_stat){
		.name = t->name, .seqs = t->seqs, .region_bytes = t->region_bytes, .limit = t->limit};
	for (int tier = KVT_TIER_DRAM; tier < KVT_TIERS; tier++)
		if (c->pages.tier[tier])
			ret->bytes[tier] = c->pages.used[tier][*cursor];
	direct_revoked(c, *cursor, &ret->revoked, &ret->late);
	(*cursor)++;
	return true;
}

static const char *plan_state(const struct seq *s)
{
	static const char *const names[] = {"scoring", "deciding", "moving", "ready"};

	return s->plan && !s->plan->over ? names[s->plan->phase] : s->requested ? "asked" : "none";
}

static void fill(const struct seq *s, struct core_seq_stat *ret)
{
	const struct core *c = s->core;
	const struct index *ix = &s->ix;
	uint64_t now = now_ns();
	uint32_t fresh = s->rows - MIN(s->rows, ix->rows);

	*ret = (struct core_seq_stat){
		.handle = s->handle,
		.owner = s->tenant_hash,
		.tenant = s->tenant->name,
		.client = s->client ? s->client->name : "-",
		.model = s->model ? s->model->name : "-",
		.policy = s->ops         ? s->ops->name
			  : s->policy[0] ? s->policy
					 : c->policy,
		.policy_reason = s->keys_use && s->keys_use->reason[0] ? s->keys_use->reason : NULL,
		.window = seq_windowed(s),
		.rows = s->rows,
		.epoch = s->epoch,
		.lanes = ix->lanes,
		.lifetime = s->lifetime,
		.ttl_left_s =
			s->in_gone && s->expires_ns > now ? (uint32_t)((s->expires_ns - now) / 1000000000u) : 0,
		.budget = {s->device_table ? s->device_table[0] : s->budget[0], s->budget[1], s->budget[2]},
		.dropped_rows = s->dropped,
		.plans = s->plans,
		.plan_id = s->plan_id,
		.plan_ns_last = s->plan_ns_last,
		.refaults = s->refaults,
		.misses = s->misses,
		.plan_state = plan_state(s),
	};
	memcpy(ret->key, s->key, sizeof(ret->key));
	memcpy(ret->tier_rows, s->tier_rows, sizeof(ret->tier_rows));
	ret->adaptive = s->adaptive;
	for (uint32_t l = 0; s->adaptive && l < ix->lanes; l++) {
		ret->device_least = l ? MIN(ret->device_least, s->adaptive[l]) : s->adaptive[l];
		ret->device_most = MAX(ret->device_most, s->adaptive[l]);
	}
	ret->shared = share_rows(s, &ret->device_held, &ret->device_brought);
	if (s->budget_default) {
		bool shares = c->cfg.budget_device || c->cfg.budget_dram || c->cfg.budget_nvme;

		ret->budget[0] =
			shares ? (uint32_t)((uint64_t)s->rows * c->cfg.budget_device / 1000) : ROWS_ALL;
		ret->budget[1] = (uint32_t)((uint64_t)s->rows * c->cfg.budget_dram / 1000);
		ret->budget[2] = (uint32_t)((uint64_t)s->rows * c->cfg.budget_nvme / 1000);
	}
	ret->tier_rows[KVT_TIER_DEVICE] += (uint64_t)fresh * ix->lanes;
	for (uint32_t l = 0; l < ix->lanes; l++) {
		ret->resident_max = MAX(ret->resident_max, ix->resident[l] + fresh);
	}
	ret->tier_bytes[KVT_TIER_DEVICE] = seq_device_bytes(s);
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
		ret->tier_bytes[t] = s->page_bytes[t];
	ret->index_bytes = s->index_seen + s->page_heap;
	ret->stalls_known = s->client && probes_process(s->core, s->client->pid, &ret->stalls);
	ret->direct = ix->direct;
	ret->direct_pages = ix->direct ? direct_pages(ix->direct) : 0;
	if (s->pinned)
		ret->pinned_rows = bits_rank(s->pinned, s->rows);
}

void core_owner_published(struct core *c, uint64_t owner, uint64_t *ret_bytes, uint64_t *ret_held)
{
	struct tier_owner st;

	direct_stat(c, owner, &st);
	*ret_bytes = st.bytes;
	*ret_held = st.bytes - st.used;
}

bool core_seq_next(struct core *c, uint32_t *cursor, struct core_seq_stat *ret)
{
	struct seq *s = handle_next(c->seqs, cursor, NULL);

	if (s)
		fill(s, ret);
	return s != NULL;
}

int core_seq_stat(struct core *c, uint64_t handle, struct core_seq_stat *ret)
{
	struct seq *s = handle_get(c->seqs, handle, NULL);

	if (!s)
		return KVT_E_STALE;
	/* Counts follow what changes them, but for moves in the background, which the next tick counts. */
	if (s->recount && !(plan_lent(s) && s->plan->phase == PHASE_DECIDE))
		seq_recount(s);
	fill(s, ret);
	return 0;
}

/* Two digits a byte; the last may lack its second. */
static void from_hex(const char *hex, uint8_t ret[16])
{
	memset(ret, 0, 16);
	for (size_t i = 0; hex[i]; i++)
		ret[i / 2] |=
			(uint8_t)((hex[i] <= '9' ? hex[i] - '0' : (hex[i] | 32) - 'a' + 10) << (i % 2 ? 0 : 4));
}

static bool belongs(const struct seq *s, int tenant, uint64_t owner)
{
	return tenant < 0 || (s->tenant->index == (uint32_t)tenant && s->tenant_hash == owner);
}

int core_seq_find(struct core *c, int tenant, uint64_t owner, const char *name, uint64_t *ret, char *err,
		  size_t errsize)
{
	size_t n = strlen(name);
	uint32_t cursor = 0, found = 0;
	uint64_t handle;
	uint8_t prefix[16];
	struct seq *s;
	char *end;

	if (!strncasecmp(name, "0x", 2)) {
		handle = strtoull(name, &end, 16);
		s = *end ? NULL : handle_get(c->seqs, handle, NULL);
		if (!s || !belongs(s, tenant, owner)) {
			snprintf(err, errsize, "sequence \"%s\": no such handle", name);
			return KVT_E_NOENT;
		}
		*ret = handle;
		return 0;
	}
	if (n < 4 || n > 32 || strspn(name, "0123456789abcdefABCDEF") != n) {
		snprintf(err, errsize, "sequence \"%s\": must be 0x..., or 4 to 32 hex digits of a key", name);
		return KVT_E_INVAL;
	}
	from_hex(name, prefix);
	while ((s = names_next(&c->names, prefix, (unsigned)n, &cursor))) {
		if (!belongs(s, tenant, owner))
			continue;
		*ret = s->handle;
		found++;
	}
	if (!found)
		snprintf(err, errsize, "sequence \"%s\": no such key", name);
	else if (found > 1)
		snprintf(err, errsize, "sequence \"%s\": %u keys begin so", name, found);
	return found == 1 ? 0 : found ? KVT_E_INVAL : KVT_E_NOENT;
}

int core_seq_lanes(struct core *c, uint64_t handle, struct core_lane_stat *ret, uint32_t cap)
{
	struct seq *s = handle_get(c->seqs, handle, NULL);

	if (!s)
		return KVT_E_STALE;
	if (cap < s->ix.lanes)
		return KVT_E_INVAL;
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		uint32_t n[KVT_TIERS] = {0}, dropped = 0;

		if (s->ix.rows)
			index_count(&s->ix, l, n, &dropped);
		ret[l] =
			(struct core_lane_stat){n[0] + s->rows - MIN(s->rows, s->ix.rows), n[1], n[2], dropped};
	}
	return (int)s->ix.lanes;
}

int core_feed_fd(struct core *c, size_t *ret_bytes)
{
	*ret_bytes = c->feed_seg.size;
	return c->feed_seg.fd;
}
