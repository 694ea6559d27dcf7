/* SPDX-License-Identifier: MIT */
/* One plan as an object: its memory, its references, its header, and the call that decides. */
#include <string.h>
#include "daemon/internal.h"
#include "daemon/usdt.h"
#include "policy/decide.h"
#include "shm/util.h"

int plan_alloc(struct plan *p, bool private_tables)
{
	struct seq *s = p->seq;
	size_t plane = (size_t)s->ix.lanes * p->words * sizeof(uint64_t), arr = s->ix.lanes * sizeof(uint32_t);
	size_t row = s->ix.words * sizeof(uint64_t), bytes;
	void *area;
	char *m;
	int r;

	p->scratch = malloc(3 * plane + 3 * row + 7 * arr);
	if (!p->scratch)
		return -ENOMEM;
	m = p->scratch;
	p->to_dram = (uint64_t *)m;
	p->to_nvme = (uint64_t *)(m += plane);
	p->drop = (uint64_t *)(m += plane);
	p->need = (uint64_t *)(m += plane);
	p->pinned = s->pinned ? (uint64_t *)(m + row) : NULL;
	p->wanted = s->wanted ? (uint64_t *)(m + 2 * row) : NULL;
	m += 3 * row;
	for (int t = 0; t < KVT_TIERS; t++, m += arr)
		p->budget[t] = (uint32_t *)m;
	p->kept = (uint32_t *)m;
	p->out = (uint32_t *)(m += arr);
	p->in = (uint32_t *)(m += arr);
	p->dropped = (uint32_t *)(m + arr);
	/* The decision's own copies: steering may change the originals while a worker reads. */
	if (p->pinned)
		memcpy(p->pinned, s->pinned, MIN(row, BITS_WORDS(s->max_rows) * 8));
	if (p->wanted)
		memcpy(p->wanted, s->wanted, MIN(row, BITS_WORDS(s->max_rows) * 8));
	if (private_tables) {
		bytes = plan_bytes(s->ix.lanes, p->watermark);
		area = aligned_alloc(KVT_CACHELINE, bytes);
		if (!area)
			return -ENOMEM;
		p->private_tables = true;
	} else {
		p->mem = plan_mem_ref(s->client->plans);
		bytes = s->plan_bytes;
		area = (char *)p->mem->seg.addr + s->plan_off;
	}
	if (!private_tables && seq_windowed(s)) {
		p->win = calloc(1, sizeof(*p->win));
		if (!p->win)
			return -ENOMEM;
		r = plan_begin_window(area, bytes, s->ix.lanes, p->watermark, &p->t);
		p->to_dram = p->t.to_dram; /* the client needs it too */
		return r;
	}
	r = plan_begin(area, bytes, s->ix.lanes, p->watermark, &p->t);
	if (r < 0 && p->private_tables)
		free(area);
	return r;
}

int plan_alloc_keys(struct plan *p)
{
	struct index *ix = &p->seq->ix;

	if (!p->use->coefs)
		return 0;
	if (p->use->coefs > 1 && index_keep_coef(ix, true) < 0)
		return -ENOMEM;
	p->keys = malloc((size_t)ix->lanes * p->watermark * sizeof(*p->keys));
	return p->keys ? 0 : -ENOMEM;
}

void plan_free(struct plan *p)
{
	struct core *c = p->seq->core;

	window_free(p);
	if (p->private_tables)
		free(p->t.hdr);
	plan_mem_unref(p->mem);
	if (p->region)
		region_unref(c, p->region);
	if (p->use)
		policies_put(c, p->use);
	free(p->scratch);
	free(p->keys);
	free(p->worth);
	share_dropped(p);
	free(p->bid);
	free(p);
}

void plan_forget(struct plan *p)
{
	if (p->seq->plan == p)
		p->seq->plan = NULL;
	plan_free(p);
}

void plan_unref(struct plan *p)
{
	if (--p->refs == 0)
		seq_step(p->seq);
}

void plan_cancel(struct plan *p)
{
	struct seq *s = p->seq;

	if (p->over)
		return;
	p->over = true;
	journal_over(p, JOURNAL_CANCELLED, 0);
	s->core->stat.plans_cancelled++;
	USDT(plan_cancelled, s->handle, p->id, now_ns() - p->started_ns);
	if (!p->id)
		return;
	if (!p->private_tables)
		plan_set_state(p->t.hdr, PLAN_CANCELLED);
	core_feed(s->core, FEED_CANCEL, s, p->id, 0, NULL);
	if (s->client)
		client_notify(s->client, Q_PLAN, s->handle, p->id, PLAN_CANCELLED);
}

void plan_header(const struct plan *p)
{
	struct plan_hdr *h = p->t.hdr;
	struct seq *s = p->seq;

	__atomic_store_n(&h->epoch, p->epoch, __ATOMIC_RELEASE);
	__atomic_store_n(&h->flags, (s->equal_lanes ? PLAN_F_EQUAL_LANES : 0u) | (p->win ? PLAN_F_WINDOW : 0u),
			 __ATOMIC_RELEASE);
	__atomic_store_n(&h->out_pages, p->win ? p->win->pages : 0, __ATOMIC_RELEASE);
	__atomic_store_n(&h->decided_ns, now_ns(), __ATOMIC_RELEASE);
	__atomic_store_n(&h->rows_out, p->rows_out, __ATOMIC_RELEASE);
	__atomic_store_n(&h->rows_in, p->rows_in, __ATOMIC_RELEASE);
	__atomic_store_n(&h->rows_drop, p->rows_drop, __ATOMIC_RELEASE);
	__atomic_store_n(&h->policy, (uint32_t)p->use->ops->id, __ATOMIC_RELEASE);
	for (uint32_t l = 0; l < s->ix.lanes; l++)
		p->t.lane[l] = (struct plan_lane){p->kept[l], p->out[l], p->in[l], p->dropped[l]};
}

int plan_decide(struct plan *p)
{
	struct seq *s = p->seq;
	struct decide_in in = {
		.lanes = s->ix.lanes,
		.watermark = p->watermark,
		.words = s->ix.words,
		.score_stride = p->keys ? p->watermark : s->ix.cap,
		.protect_first = p->protect_first,
		.protect_last = p->protect_last,
		.granularity = s->granularity,
		.block_rows = 16,
		.equal_lanes = s->equal_lanes,
		.write_through = p->write_through,
		.hysteresis_permille = p->hysteresis,
		.scores = plan_keys(p, 0),
		.on_device = s->ix.on[KVT_TIER_DEVICE],
		.on_dram = s->ix.on[KVT_TIER_DRAM],
		.on_nvme = s->ix.on[KVT_TIER_NVME],
		.pinned = p->pinned,
		.wanted = p->wanted,
		.budget = {p->budget[0], p->budget[1], p->budget[2]},
	};
	struct decide_out out = {
		.words = p->words,
		.resident = p->t.resident,
		.copy_out = p->t.copy_out,
		.bring_in = p->t.bring_in,
		.to_dram = p->to_dram,
		.to_nvme = p->to_nvme,
		.drop = p->drop,
		.kept = p->kept,
		.out = p->out,
		.in = p->in,
		.dropped = p->dropped,
	};

	int r = adaptive_divide(p);

	if (!r)
		r = policy_decide(&in, &out);
	if (!r)
		r = budget_stage(p);
	if (!r)
		journal_cut(p);
	return r < 0 || !p->win ? r : window_list(p);
}
