/* SPDX-License-Identifier: MIT */
/*
 * Life of a sequence. Only seq_step() acts on what waited for a worker to give
 * the index back: cuts, ends, saves, the next plan.
 */
#include <openssl/crypto.h>
#include <string.h>
#include "daemon/internal.h"
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

/* ---- table by tenant and key --------------------------------------------------------- */

static uint32_t hash_of(const struct core *c, uint64_t tenant, const uint8_t key[16])
{
	return crc32c(crc32c(0, &tenant, sizeof(tenant)), key, 16) & (c->hash_size - 1);
}

static int hash_grow(struct core *c)
{
	uint32_t n = c->hash_size ? c->hash_size * 2 : 256, old_size = c->hash_size;
	struct seq **old = c->hash, **v = calloc(n, sizeof(*v));

	if (!v)
		return old ? 0 : -ENOMEM;
	c->hash = v;
	c->hash_size = n;
	for (uint32_t i = 0; i < old_size; i++)
		for (struct seq *s = old[i], *next; s; s = next) {
			uint32_t h = hash_of(c, s->tenant_hash, s->key);

			next = s->hash_next;
			s->hash_next = v[h];
			v[h] = s;
		}
	free(old);
	return 0;
}

struct seq *seq_lookup(const struct core *c, uint64_t tenant, const uint8_t key[16])
{
	struct seq *s = c->hash_size ? c->hash[hash_of(c, tenant, key)] : NULL;

	while (s && (s->tenant_hash != tenant || memcmp(s->key, key, 16)))
		s = s->hash_next;
	return s;
}

static void unhash(struct seq *s)
{
	struct seq **at = &s->core->hash[hash_of(s->core, s->tenant_hash, s->key)];

	while (*at != s)
		at = &(*at)->hash_next;
	*at = s->hash_next;
}

/* ---- making and ending ----------------------------------------------------------------- */

static void index_account(struct seq *s)
{
	uint64_t now = s->ix.bytes + heap_bytes(sizeof(*s)) +
		       (s->layout ? heap_bytes(s->model->n_layers * sizeof(*s->layout)) : 0);

	s->core->seq_index_bytes += now - s->index_seen;
	s->index_seen = now;
}

struct seq *seq_create(struct core *c, struct tenant *t, uint64_t hash, const uint8_t key[16], uint32_t lanes)
{
	struct seq *s = calloc(1, sizeof(*s));
	uint32_t h;

	if (!s)
		return NULL;
	if (c->n_seqs >= c->hash_size && hash_grow(c) < 0)
		goto fail;
	s->core = c;
	s->tenant = t;
	s->tenant_hash = hash;
	memcpy(s->key, key, 16);
	s->cut = ROWS_ALL;
	s->device_cap = ROWS_ALL;
	s->slack = c->cfg.slack_rows ? c->cfg.slack_rows : 64;
	s->headroom = ROWS_ALL;
	s->refs = 1;
	STAILQ_INIT(&s->parked);
	if (index_init(&s->ix, lanes) < 0)
		goto fail;
	s->origin = origin_new(&c->pages, key, hash, t->index);
	s->handle = s->origin ? handle_add(c->seqs, s, NULL) : 0;
	if (!s->handle) {
		origin_unref(&c->pages, s->origin);
		index_free(&s->ix, &c->pages);
		goto fail;
	}
	h = hash_of(c, hash, key);
	s->hash_next = c->hash[h];
	c->hash[h] = s;
	TAILQ_INSERT_TAIL(&c->lru, s, lru);
	s->active_ns = now_ns();
	t->seqs++;
	c->n_seqs++;
	index_account(s);
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

	if (cl) {
		bits_clear(cl->slot_used, s->slot);
		plan_mem_give(cl->plans, s->plan_off, s->plan_bytes);
		LIST_REMOVE(s, of_client);
		cl->n_seqs--;
		handle_set_owner(s->core->seqs, s->handle, NULL);
		s->client = NULL;
	}
}

static void drop_region(struct seq *s)
{
	if (s->region)
		region_unref(s->core, s->region);
	s->region = NULL;
	free(s->layout);
	s->layout = NULL;
}

/* Those who waited for this sequence: the client that closes it, the one that wants to resume it. */
static void answer(struct seq *s)
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
	if (s->plan)
		plan_forget(s->plan);
	seq_unbind(s);
	if (s->in_gone) {
		TAILQ_REMOVE(&c->gone, s, gone);
		s->in_gone = false;
		c->n_orphans--;
	}
	TAILQ_REMOVE(&c->lru, s, lru);
	unhash(s);
	handle_del(c->seqs, s->handle);
	for (int t = 0; t < KVT_TIERS; t++)
		c->stat.rows[t] -= s->tier_rows[t];
	restart_forget(s);
	index_free(&s->ix, &c->pages);
	origin_unref(&c->pages, s->origin);
	c->seq_index_bytes -= s->index_seen;
	core_feed(c, FEED_SEQ_CLOSE, s, 0, 0, NULL);
	drop_region(s);
	if (s->model)
		model_unref(c, s->model);
	s->model = NULL;
	free(s->device_table);
	free(s->wanted);
	free(s->pinned);
	s->device_table = NULL;
	s->wanted = s->pinned = NULL;
	OPENSSL_cleanse(s->secret_hash, sizeof(s->secret_hash));
	s->tenant->seqs--;
	c->n_seqs--;
	s->dead = true;
	answer(s);
	mover_kick(c);
	seq_unref(s);
}

void seq_end(struct seq *s)
{
	s->state = SEQ_CLOSING;
	if (s->plan)
		plan_cancel(s->plan);
	seq_step(s);
}

/* ---- saving what only the region holds ------------------------------------------------------ */

/*
 * A client that died between READY and its acknowledgement may have moved rows
 * already: a lane is as the index says only below the first row that the plan
 * changes. What lies above and has no copy below is lost.
 */
static void distrust(struct seq *s, const struct plan *p)
{
	uint64_t lost = 0;

	if (index_extend(&s->ix, s->rows) < 0)
		return;
	for (uint32_t l = 0; l < s->ix.lanes; l++) {
		uint64_t *dev = index_bits(&s->ix, KVT_TIER_DEVICE, l);
		const uint64_t *after = p->t.resident + (uint64_t)l * p->words;
		uint32_t w = 0, first;

		while (w < p->words && dev[w] == after[w])
			w++;
		if (w == p->words)
			continue;
		first = w * 64 + (uint32_t)__builtin_ctzll(dev[w] ^ after[w]);
		if (first >= p->watermark)
			continue;
		lost += s->ix.resident[l] - bits_rank(dev, first);
		bits_clear_range(dev, first, s->rows);
		s->ix.resident[l] = bits_rank(dev, s->ix.rows);
	}
	if (lost)
		log_line(
			5,
			"seq %016llx: its client left in the middle of plan %llu: %llu device rows not trusted",
			(unsigned long long)s->handle, (unsigned long long)p->id, (unsigned long long)lost);
}

static bool holds_device_rows(const struct seq *s)
{
	if (s->rows > s->ix.rows)
		return true;
	for (uint32_t l = 0; l < s->ix.lanes; l++)
		if (s->ix.resident[l])
			return true;
	return false;
}

/* Nothing is left in the region: the sequence waits below for a resume. */
static void detached(struct seq *s)
{
	s->state = SEQ_DETACHED;
	seq_unbind(s);
	drop_region(s);
	s->expires_ns = now_ns() + (uint64_t)s->ttl_s * 1000000000u;
	TAILQ_INSERT_TAIL(&s->core->gone, s, gone);
	s->in_gone = true;
	s->core->n_orphans++;
	if (s->core->draining)
		settle_flush(s);
	restart_note(s);
	index_account(s);
	answer(s);
	mover_kick(s->core);
}

static void save_step(struct seq *s)
{
	if (!holds_device_rows(s) || s->saves++ > 5) {
		for (uint32_t l = 0; l < s->ix.lanes && s->ix.rows; l++) {
			bits_clear_range(index_bits(&s->ix, KVT_TIER_DEVICE, l), 0, s->ix.rows);
			s->ix.resident[l] = 0;
		}
		seq_recount(s);
		detached(s);
	} else if (manager_plan(s, true) < 0) {
		save_step(s); /* out of memory: counts as a try */
	}
}

void seq_leave(struct seq *s, bool drop)
{
	struct plan *p = s->plan;

	if (s->state == SEQ_CLOSING)
		return;
	if (s->lifetime != KVT_LEASED || drop || s->core->freeing) {
		seq_end(s);
		return;
	}
	if (s->state != SEQ_LIVE)
		return;
	if (p && !p->over && p->phase == PHASE_READY)
		distrust(s, p);
	if (p)
		plan_cancel(p);
	s->state = SEQ_SAVING;
	s->saves = 0;
	s->requested = 0;
	seq_step(s);
}

void seq_truncate(struct seq *s, uint32_t rows)
{
	s->epoch++;
	s->rows = rows;
	s->cut = MIN(s->cut, rows);
	s->scored = MIN(s->scored, rows);
	if (s->plan)
		plan_cancel(s->plan);
	seq_step(s);
}

void seq_step(struct seq *s)
{
	struct plan *p = s->plan;

	if (s->dead || (p && p->refs))
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
		if (index_truncate(&s->ix, &s->core->pages, s->cut, s->epoch) < 0)
			return; /* no memory for one list entry: the next step tries again */
		s->cut = ROWS_ALL;
		settle_stop(s);
		seq_recount(s);
		manager_headroom(s);
		if (s->lifetime == KVT_LEASED)
			restart_note(s);
		if (s->state == SEQ_LIVE)
			answer(s);
	}
	if (s->settle || s->compacting)
		mover_kick(s->core);
	if (s->state == SEQ_SAVING && !p)
		save_step(s);
	else if (!p)
		manager_consider(s);
}

void seq_recount(struct seq *s)
{
	uint64_t rows[KVT_TIERS] = {0}, held[KVT_TIERS] = {0}, dropped = 0;

	for (uint32_t l = 0; l < s->ix.lanes && s->ix.rows; l++) {
		uint32_t n[KVT_TIERS], d;

		index_count(&s->ix, l, n, &d);
		dropped += d;
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
	index_account(s);
}

void seq_expire(struct core *c, uint64_t now)
{
	struct seq *s, *next;

	for (s = TAILQ_FIRST(&c->gone); s; s = next) {
		next = TAILQ_NEXT(s, gone);
		if (s->expires_ns > now)
			continue;
		log_line(6, "seq %016llx: lease ended", (unsigned long long)s->handle);
		seq_end(s);
	}
}

/* ---- what the client says ---------------------------------------------------------------------- */

/* One look at slot.acked. */
static bool poll_acked(struct seq *s)
{
	uint64_t acked = atomic_load_explicit(&s->client->slots[s->slot].acked, memory_order_acquire);
	uint32_t words = (uint32_t)BITS_WORDS(s->ix.lanes), refused = 0;
	uint64_t nack[CTL_MAX_LANES / 64];
	struct plan *p = s->plan;

	if (acked == s->acked)
		return true;
	if (acked > s->plan_id || acked < s->acked) {
		client_end(s->client, "slot.acked: %llu, plans so far are %llu..%llu",
			   (unsigned long long)acked, (unsigned long long)s->acked,
			   (unsigned long long)s->plan_id);
		return false;
	}
	s->acked = acked;
	if (!p || p->over || p->id != acked)
		return true; /* of a plan that was cancelled meanwhile */
	for (uint32_t w = 0; w < words; w++) {
		nack[w] = __atomic_load_n(&s->client->slots[s->slot].nack[w], __ATOMIC_RELAXED);
		if (w == words - 1 && s->ix.lanes % 64)
			nack[w] &= (UINT64_C(1) << (s->ix.lanes % 64)) - 1;
		refused += (uint32_t)__builtin_popcountll(nack[w]);
	}
	if (refused)
		s->core->stat.plans_nacked++;
	if (p->phase != PHASE_READY && refused < s->ix.lanes) {
		client_end(s->client, "slot.acked: plan %llu is not ready yet", (unsigned long long)acked);
		return false;
	}
	if (p->phase == PHASE_READY)
		manager_applied(s, p, refused ? nack : NULL);
	else
		plan_cancel(p);
	return true;
}

/* One look at slot.len. */
static bool poll_len(struct seq *s)
{
	uint64_t len = atomic_load_explicit(&s->client->slots[s->slot].len, memory_order_acquire);
	uint32_t epoch = (uint32_t)(len >> 32), rows = (uint32_t)len;

	if (epoch < s->epoch || (epoch == s->epoch && rows == s->rows))
		return true; /* before the last truncate, or nothing new */
	if (epoch > s->epoch || rows < s->rows || rows > s->max_rows) {
		client_end(s->client, "slot.len: epoch %u rows %u, must be epoch %u rows %u..%u", epoch, rows,
			   s->epoch, s->rows, s->max_rows);
		return false;
	}
	/* With a cut pending the room is not known yet; the device checks every slot anyway. */
	if (s->cut == ROWS_ALL && rows - MIN(s->ix.rows, rows) > s->room) {
		client_end(s->client, "slot.len: %u rows, a layout has room for %u", rows,
			   s->ix.rows + s->room);
		return false;
	}
	s->rows = rows;
	return true;
}

void seq_last_words(struct seq *s)
{
	if (s->state == SEQ_LIVE && poll_acked(s))
		poll_len(s);
}

bool seq_poll(struct seq *s)
{
	bool live;

	s->refs++; /* a client that lies ends here, and its sequences with it */
	if (s->state == SEQ_LIVE && poll_acked(s) && poll_len(s))
		seq_step(s);
	live = s->state == SEQ_LIVE && s->client;
	seq_unref(s);
	return live;
}
