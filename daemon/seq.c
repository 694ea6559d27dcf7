/* SPDX-License-Identifier: MIT */
/*
 * Life of a sequence; leave.c has what happens when its client goes, words.c what the client's words mean. Only
 * seq_step() acts on what waited for a worker to give the index back: cuts, ends, saves, the next plan.
 */
#include <openssl/crypto.h>
#include <string.h>
#include "daemon/direct.h"
#include "daemon/internal.h"
#include "daemon/ledger.h"
#include "ipc/codec.h"
#include "shm/crc.h"
#include "shm/util.h"

uint64_t tenant_hash(const struct tenant *t, uid_t uid)
{
	return (uint64_t)crc32c(0, t->name, strlen(t->name)) << 32 | (uint32_t)uid;
}

void seq_lane(const struct seq *s, uint32_t lane, struct device_lane *ret)
{
	const struct model *m = s->model;
	const struct wire_layer *y = &m->layer[m->lane_layer[lane]];
	const struct wire_layout *l = &s->layout[m->lane_layer[lane]];
	uint64_t head = m->lane_head[lane];

	*ret = (struct device_lane){
		.k_off = l->k_off + head * l->k_head_stride,
		.v_off = l->v_off + head * l->v_head_stride,
		.k_stride = l->k_row_stride,
		.v_stride = l->v_row_stride,
		.k_bytes = y->k_bytes,
		.v_bytes = y->v_bytes,
	};
}

/* ---- making and ending ----------------------------------------------------------------- */

void seq_account(struct seq *s)
{
	uint64_t now = s->ix.bytes + heap_bytes(sizeof(*s)) + share_bytes(s) + journal_bytes(s->journal) +
		       (s->layout ? heap_bytes(s->model->n_layers * sizeof(*s->layout)) : 0);

	uint64_t directory = s->ix.direct ? direct_bytes(s->ix.direct) : 0;

	s->core->seq_index_bytes += now - s->index_seen;
	s->index_seen = now;
	s->core->directory_bytes += directory - s->directory_seen;
	s->directory_seen = directory;
	owner_count(s);
}

/* Rows that came to the index since it was counted are on the device, in every lane. */
static void count_new(struct seq *s)
{
	uint64_t rows = s->ix.rows > s->counted ? s->ix.rows - s->counted : 0, all = rows * s->ix.lanes;

	s->tier_rows[KVT_TIER_DEVICE] += all;
	s->held[KVT_TIER_DEVICE] += all;
	s->core->stat.rows[KVT_TIER_DEVICE] += all;
	s->device_bytes += s->model ? rows * s->model->row_bytes_all : 0;
	s->counted = s->ix.rows;
}

void seq_fresh(struct seq *s)
{
	uint64_t now = (uint64_t)(s->rows - MIN(s->rows, s->ix.rows)) * s->ix.lanes;

	count_new(s);
	s->core->fresh_rows += now - s->fresh_seen;
	s->fresh_seen = now;
	owner_count(s);
}

struct seq *seq_create(struct core *c, struct tenant *t, uint64_t hash, const uint8_t key[16],
		       const uint8_t secret[32], uint32_t lanes)
{
	struct seq *s = calloc(1, sizeof(*s));

	if (!s)
		return NULL;
	s->core = c;
	s->tenant = t;
	s->tenant_hash = hash;
	memcpy(s->key, key, 16);
	s->born = c->pages.next++;
	memcpy(s->secret_hash, secret, 32);
	s->cut = ROWS_ALL;
	s->place = LEDGER_NONE;
	s->device_cap = ROWS_ALL;
	s->slack = c->cfg.slack_rows ? c->cfg.slack_rows : 64;
	s->headroom = ROWS_ALL;
	s->refs = 1;
	STAILQ_INIT(&s->parked);
	if (index_init(&s->ix, lanes) < 0)
		goto fail;
	s->origin = origin_new(&c->pages, key, hash, t->index);
	s->handle = s->origin ? handle_add(c->seqs, s, NULL) : 0;
	if (!s->handle || owner_enter(s) < 0 || names_add(&c->names, s) < 0) {
		owner_leave(s);
		handle_del(c->seqs, s->handle);
		origin_unref(&c->pages, s->origin);
		index_free(&s->ix, &c->pages);
		goto fail;
	}
	TAILQ_INSERT_TAIL(&c->lru, s, lru);
	s->active_ns = now_ns();
	t->seqs++;
	c->n_seqs++;
	seq_account(s);
	return s;
fail:
	free(s);
	return NULL;
}

void seq_touch(struct seq *s)
{
	s->active_ns = now_ns();
	TAILQ_REMOVE(&s->core->lru, s, lru);
	TAILQ_INSERT_TAIL(&s->core->lru, s, lru);
}

void seq_unref(struct seq *s)
{
	if (--s->refs)
		return;
	free(s);
}

/* Its place in the client: slot, plan area, region, layouts. */
void seq_unbind(struct seq *s)
{
	struct client *cl = s->client;

	recall_orphan(s);
	direct_close(s);
	if (cl) {
		/* Of one that was taken away its place is no other's until the client ends: it may not know
		 * yet. */
		if (!s->taken) {
			bits_clear(cl->slot_used, s->slot);
			plan_mem_give(cl->plans, s->plan_off, s->plan_bytes);
		}
		LIST_REMOVE(s, of_client);
		cl->n_seqs--;
		handle_set_owner(s->core->seqs, s->handle, NULL);
		s->client = NULL;
	}
}

void seq_drop_region(struct seq *s)
{
	if (s->region)
		region_unref(s->core, s->region);
	s->region = NULL;
	policies_put(s->core, s->scorer);
	s->scorer = NULL;
	s->flags = 0;
	free(s->layout);
	s->layout = NULL;
}

/* Those who waited for this sequence: the client that closes it, the one that wants to resume it. */
void seq_answer(struct seq *s)
{
	struct client *closer = s->closer, *waiter = s->waiter;

	s->closer = s->waiter = NULL;
	if (closer) {
		struct wire_reply r;

		wire_reply_init(&r, &s->close_req, sizeof(r), 0, NULL);
		client_reply(closer, &r, NULL, 0);
		closer->waits = NULL;
		client_retry(closer);
	}
	if (waiter) {
		waiter->waits = NULL;
		client_retry(waiter);
	}
}

static void destroy(struct seq *s)
{
	struct core *c = s->core;

	settle_stop(s);
	compact_stop(s);
	recall_pull_stop(s);
	share_leave(s);
	if (s->plan)
		plan_forget(s->plan);
	seq_unbind(s);
	if (s->in_gone) {
		TAILQ_REMOVE(&c->gone, s, gone);
		s->in_gone = false;
		c->n_orphans--;
	}
	TAILQ_REMOVE(&c->lru, s, lru);
	names_del(&c->names, s);
	handle_del(c->seqs, s->handle);
	for (int t = 0; t < KVT_TIERS; t++)
		c->stat.rows[t] -= s->tier_rows[t];
	restart_forget(s);
	ledger_over(s);
	index_free(&s->ix, &c->pages);
	origin_unref(&c->pages, s->origin);
	c->seq_index_bytes -= s->index_seen;
	c->fresh_rows -= s->fresh_seen;
	c->directory_bytes -= s->directory_seen;
	core_feed(c, FEED_SEQ_CLOSE, s, 0, 0, NULL);
	seq_drop_region(s);
	policies_put(s->core, s->keys_use);
	s->keys_use = NULL;
	if (s->model)
		model_unref(c, s->model);
	s->model = NULL;
	free(s->device_table);
	free(s->adaptive);
	free(s->journal);
	s->journal = NULL;
	free(s->wanted);
	free(s->pinned);
	s->device_table = s->adaptive = NULL;
	s->wanted = s->pinned = NULL;
	OPENSSL_cleanse(s->secret_hash, sizeof(s->secret_hash));
	s->tenant->seqs--;
	owner_leave(s);
	c->n_seqs--;
	s->dead = true;
	seq_answer(s);
	mover_kick(c);
	seq_unref(s);
}

void seq_end(struct seq *s)
{
	s->state = SEQ_CLOSING;
	if (s->plan) {
		s->plan->cause = JOURNAL_ENDED;
		plan_cancel(s->plan);
	}
	seq_step(s);
}

int seq_truncate(struct seq *s, uint32_t rows)
{
	int r = ledger_cut(s, rows);

	if (r < 0)
		return r;
	s->epoch++;
	s->rows = rows;
	s->cut = MIN(s->cut, rows);
	seq_fresh(s);
	direct_cut(&s->ix, s->cut); /* before the client hears of it and appends others there */
	restart_cut(s);
	s->scored = MIN(s->scored, rows);
	s->plane_from = MIN(s->plane_from, rows);
	if (s->share) { /* what is left may need less, or nothing: its next plan tells */
		share_leave(s);
		free(s->adaptive);
		s->adaptive = NULL;
		s->again = true;
	}
	manager_redo(s);
	if (s->wanted)
		bits_clear_range(s->wanted, rows, s->max_rows);
	seq_step(s);
	return 0;
}

void seq_step(struct seq *s)
{
	struct plan *p = s->plan;

	if (s->dead || (p && p->refs) || s->recall)
		return;
	if (p && !p->over && p->phase == PHASE_SCORE) {
		manager_scored(p);
		if (!p->over)
			return;
	}
	if (p && (p->over || s->state == SEQ_CLOSING)) {
		plan_forget(p);
		p = NULL;
	}
	if (s->state == SEQ_CLOSING) {
		destroy(s);
		return;
	}
	if (!p && s->cut != ROWS_ALL) {
		if (index_truncate(&s->ix, &s->core->pages, s->cut, s->epoch, s->mark_cut) < 0)
			return; /* no memory for one list entry: the next step tries again */
		s->mark_cut = false;
		s->cut = ROWS_ALL;
		direct_cut(&s->ix, ROWS_ALL);
		settle_stop(s);
		seq_recount(s);
		manager_headroom(s);
		/* It said so while a worker held the index and nobody could tell. */
		if (s->state == SEQ_LIVE && s->rows - MIN(s->ix.rows, s->rows) > s->room)
			client_doom(s->client, "slot.len: more rows than a layout has room for");
		if (s->lifetime == KVT_LEASED)
			restart_note(s);
		if (s->state == SEQ_LIVE)
			seq_answer(s);
	}
	if (s->settle || s->compacting)
		mover_kick(s->core);
	if (s->state == SEQ_SAVING && !p)
		seq_save(s);
	else if (!p)
		manager_consider(s);
}

/* What its pages take, in the tiers and of heap: a shared page's heap is counted where it was made. */
static void count_pages(struct seq *s)
{
	memset(s->page_bytes, 0, sizeof(s->page_bytes));
	s->page_heap = 0;
	for (uint32_t l = 0; l < s->ix.lanes; l++)
		for (uint32_t i = 0; i < s->ix.lane[l].n; i++) {
			const struct page *p = s->ix.lane[l].v[i];

			for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
				if (page_in(p, t))
					s->page_bytes[t] += page_room(p->bytes);
			if (p->origin == s->origin)
				s->page_heap += heap_bytes(sizeof(*p) + p->span * sizeof(uint64_t));
		}
}

void seq_recount(struct seq *s)
{
	uint64_t rows[KVT_TIERS] = {0}, held[KVT_TIERS] = {0}, dropped = 0, bytes = 0;

	for (uint32_t l = 0; l < s->ix.lanes && s->ix.rows; l++) {
		uint32_t n[KVT_TIERS], d;

		index_count(&s->ix, l, n, &d);
		dropped += d;
		bytes += s->model ? (uint64_t)n[KVT_TIER_DEVICE] * lane_bytes(s->model, l) : 0;
		for (int t = 0; t < KVT_TIERS; t++) {
			rows[t] += n[t];
			held[t] += bits_rank(index_bits(&s->ix, t, l), s->ix.rows);
		}
	}
	for (int t = 0; t < KVT_TIERS; t++)
		s->core->stat.rows[t] += rows[t] - s->tier_rows[t];
	memcpy(s->tier_rows, rows, sizeof(rows));
	memcpy(s->held, held, sizeof(held));
	s->dropped = dropped;
	s->device_bytes = bytes;
	s->counted = s->ix.rows;
	count_pages(s);
	seq_fresh(s);
	seq_account(s);
}
