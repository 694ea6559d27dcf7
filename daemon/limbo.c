/* SPDX-License-Identifier: MIT */
#include "daemon/limbo.h"
#include <string.h>
#include <syslog.h>
#include "daemon/internal.h"
#include "shm/trial.h"
#include "shm/util.h"

#define SLICE_NS UINT64_C(300000)
#define SHARE 16u /* of a tier may be in limbo before a seal is asked for */

struct limbo_move {
	struct seq *seq; /* a reference */
	struct page *dst;
	uint32_t at; /* place in the table; dst->limbo is one more */
	uint32_t n;
	int from;
	bool asked; /* its seal was */
	uint64_t bytes, since_ns;
	TAILQ_ENTRY(limbo_move) link;
	struct page *src[]; /* pinned; the destination itself where a page moved whole */
};
TAILQ_HEAD(limbo_moves, limbo_move);

struct limbo {
	struct core *core;
	struct limbo_move **move; /* NULL: the place is free */
	uint32_t places, next;
	struct limbo_moves fresh, asked; /* oldest first */
	uint64_t bytes[KVT_TIERS], unasked[KVT_TIERS];
	uint64_t *of[KVT_TIERS]; /* [tenants] bytes */
	uint64_t seen;           /* the tier's count of seals, when all were looked at */
	bool left;               /* some were not looked at, or could not end */
	bool let_go[KVT_TIERS];
};

int limbo_open(struct core *c)
{
	struct limbo *l = calloc(1, sizeof(*l));
	bool ok = l != NULL;

	for (int t = 0; ok && t < KVT_TIERS; t++) {
		l->of[t] = calloc(MAX(c->tenants, 1u), sizeof(uint64_t));
		ok = l->of[t] != NULL;
	}
	if (l) {
		l->core = c;
		TAILQ_INIT(&l->fresh);
		TAILQ_INIT(&l->asked);
	}
	c->pages.limbo = l;
	return ok ? 0 : -ENOMEM;
}

void limbo_free(struct core *c)
{
	struct limbo *l = c->pages.limbo;

	if (!l)
		return;
	for (int t = 0; t < KVT_TIERS; t++)
		free(l->of[t]);
	free(l->move);
	free(l);
	c->pages.limbo = NULL;
}

/* ---- coming ----------------------------------------------------------------------------- */

/* Would a restart find what lies there? */
static bool outlives(const struct core *c, const struct page *p, int tier)
{
	return tier == KVT_TIER_NVME || (c->seams.keep && !tier_published(p->addr[tier - 1]));
}

static int place_for(struct limbo *l, uint32_t *ret)
{
	uint32_t more = MAX(64u, l->places * 2);
	struct limbo_move **move;

	for (uint32_t i = 0; i < l->places && i < 64; i++, l->next++)
		if (!l->move[l->next % l->places]) {
			*ret = l->next++ % l->places;
			return 0;
		}
	move = realloc(l->move, more * sizeof(*move));
	if (!move)
		return -ENOMEM;
	memset(move + l->places, 0, (more - l->places) * sizeof(*move));
	*ret = l->places;
	l->next = l->places + 1;
	l->move = move;
	l->places = more;
	return 0;
}

int limbo_begin(struct seq *s, struct page *const *src, unsigned n, int from, struct limbo_move **ret)
{
	struct core *c = s->core;
	struct limbo *l = c->pages.limbo;
	const struct tier *nvme = c->pages.tier[KVT_TIER_NVME];
	struct limbo_move *m;
	uint32_t at;
	int r;

	*ret = NULL;
	if (s->lifetime != KVT_LEASED || !(nvme->ops->caps & TIER_CAP_DURABLE) || !nvme->ops->durable ||
	    !outlives(c, src[0], from))
		return 0;
	r = place_for(l, &at);
	m = r < 0 ? NULL : calloc(1, sizeof(*m) + n * sizeof(m->src[0]));
	if (!m)
		return -ENOMEM;
	m->seq = s;
	m->at = at;
	m->n = n;
	m->from = from;
	memcpy(m->src, src, n * sizeof(m->src[0]));
	l->move[at] = m;
	*ret = m;
	return 0;
}

void limbo_cancel(struct core *c, struct limbo_move *m)
{
	if (!m)
		return;
	c->pages.limbo->move[m->at] = NULL;
	free(m);
}

void limbo_enter(struct core *c, struct limbo_move *m, struct page *dst)
{
	struct limbo *l = c->pages.limbo;

	if (!m)
		return;
	if (dst->limbo || l->let_go[m->from] || planted("source-freed-before-the-seal")) {
		limbo_cancel(c, m);
		return;
	}
	m->dst = dst;
	m->since_ns = now_ns();
	m->bytes = page_room(dst->bytes);
	m->seq->refs++;
	dst->limbo = m->at + 1;
	for (uint32_t i = 0; i < m->n; i++)
		page_pin(m->src[i]);
	TAILQ_INSERT_TAIL(&l->fresh, m, link);
	l->bytes[m->from] += m->bytes;
	l->unasked[m->from] += m->bytes;
	l->of[m->from][dst->origin->charge] += m->bytes;
	l->left = true; /* it may have been sealed while the commit waited */
}

/* ---- going --------------------------------------------------------------------------------- */

/* Nobody counts on its copy there any more: what index_sweep() would find. */
static void free_unused(struct page_store *ps, struct seq *s, struct page *p, int tier)
{
	if (p->refs == 1 && !p->pins && page_in(p, tier) && index_lists(&s->ix, p) &&
	    !index_alive(&s->ix, p, tier, NULL))
		page_free_copy(ps, p, tier);
}

static void unpin(struct page_store *ps, struct limbo_move *m)
{
	struct seq *s = m->seq;
	bool over = s->dead || s->state == SEQ_CLOSING;

	for (uint32_t i = 0; i < m->n; i++) {
		struct page *p = m->src[i];

		page_ref(p);
		page_unpin(ps, p);
		p->refs--;
		if (p->refs && !over)
			free_unused(ps, s, p, m->from);
		page_ref(p);
		page_unref(ps, p);
	}
}

static void end(struct page_store *ps, struct limbo_move *m)
{
	struct limbo *l = ps->limbo;
	struct seq *s = m->seq;

	TAILQ_REMOVE(m->asked ? &l->asked : &l->fresh, m, link);
	l->move[m->at] = NULL;
	l->bytes[m->from] -= m->bytes;
	if (!m->asked)
		l->unasked[m->from] -= m->bytes;
	l->of[m->from][m->dst->origin->charge] -= m->bytes;
	if (!TAILQ_FIRST(&l->asked) && !TAILQ_FIRST(&l->fresh))
		memset(l->let_go, 0, sizeof(l->let_go));
	m->dst->limbo = 0;
	unpin(ps, m);
	mover_kick(l->core);
	if (!s->dead && !s->recount) {
		s->recount = true;
		s->refs++;
		STAILQ_INSERT_TAIL(&l->core->recounts, s, recounts);
	}
	seq_unref(s);
	free(m);
}

void limbo_over(struct page_store *ps, struct page *dst)
{
	struct limbo_move *m = ps->limbo->move[dst->limbo - 1];

	page_pin(dst); /* the caller's to free */
	end(ps, m);
	dst->pins--;
}

/* 1 it may end, 0 it waits. */
static int ripe(struct limbo *l, const struct limbo_move *m, uint64_t now)
{
	struct tier *t = l->core->pages.tier[KVT_TIER_NVME];
	const struct seq *s = m->seq;
	int r = t->ops->durable(t, m->dst->addr[KVT_TIER_NVME - 1], false);

	if (!r && !l->let_go[m->from] && now - m->since_ns < LIMBO_MOST_NS)
		return 0;
	if (!s->dead && plan_lent(s) && s->plan->phase == PHASE_DECIDE) {
		l->left = true;
		return 0;
	}
	if (r <= 0)
		l->core->stat.limbo_let_go_bytes += m->bytes;
	return 1;
}

static bool end_some(struct limbo *l, struct limbo_moves *of, uint64_t until)
{
	struct limbo_move *m, *next;
	uint64_t now = now_ns();
	uint32_t at, n = 0;

	for (m = TAILQ_FIRST(of); m; m = next) {
		next = TAILQ_NEXT(m, link);
		if (++n % 32 == 0 && (now = now_ns()) >= until)
			return false;
		if (!ripe(l, m, now))
			continue;
		at = next ? next->at : 0;
		end(&l->core->pages, m);
		if (next && l->move[at] != next) /* its end was another's too */
			next = TAILQ_FIRST(of);
	}
	return true;
}

/* ---- seals --------------------------------------------------------------------------------- */

static void ask(struct limbo *l)
{
	struct tier *t = l->core->pages.tier[KVT_TIER_NVME];
	struct limbo_move *m;

	if (TAILQ_EMPTY(&l->fresh))
		return;
	l->core->stat.limbo_seals++;
	while ((m = TAILQ_FIRST(&l->fresh))) {
		(void)t->ops->durable(t, m->dst->addr[KVT_TIER_NVME - 1], true);
		TAILQ_REMOVE(&l->fresh, m, link);
		TAILQ_INSERT_TAIL(&l->asked, m, link);
		m->asked = true;
		l->unasked[m->from] -= m->bytes;
	}
}

static uint64_t bound(const struct core *c, int tier)
{
	return (tier == KVT_TIER_DRAM ? c->cfg.dram_size : c->cfg.nvme_size) / SHARE;
}

void limbo_hurry(struct core *c, int tier)
{
	struct limbo *l = c->pages.limbo;

	/* While seals are under way others would only be smaller. */
	if (l->unasked[tier] && (TAILQ_EMPTY(&l->asked) || l->unasked[tier] > bound(c, tier) / 8))
		ask(l);
}

bool limbo_awaited(struct core *c, int tier, uint32_t tenant)
{
	if (!c->pages.limbo || !limbo_bytes(&c->pages, tier, tenant))
		return false;
	limbo_hurry(c, tier);
	return true;
}

void limbo_let_go(struct core *c, int tier)
{
	struct limbo *l = c->pages.limbo;

	if (!l->bytes[tier] || l->let_go[tier])
		return;
	l->let_go[tier] = l->left = true;
	mover_kick(c);
}

void limbo_pump(struct core *c)
{
	struct limbo *l = c->pages.limbo;
	struct tier *t = c->pages.tier[KVT_TIER_NVME];
	const struct limbo_move *old;
	uint64_t seals, now;

	if (TAILQ_EMPTY(&l->fresh) && TAILQ_EMPTY(&l->asked))
		return;
	now = now_ns();
	seals = t->ops->seals(t);
	old = TAILQ_FIRST(&l->asked) ? TAILQ_FIRST(&l->asked) : TAILQ_FIRST(&l->fresh);
	if (l->left || seals != l->seen || now - old->since_ns >= LIMBO_MOST_NS) {
		l->left = false;
		l->seen = seals;
		if (!end_some(l, &l->asked, now + SLICE_NS) || !end_some(l, &l->fresh, now + SLICE_NS)) {
			l->left = true;
			mover_kick(c);
		}
	}
	old = TAILQ_FIRST(&l->fresh);
	if (old && (now - old->since_ns >= LIMBO_NS || l->unasked[KVT_TIER_DRAM] > bound(c, KVT_TIER_DRAM) ||
		    l->unasked[KVT_TIER_NVME] > bound(c, KVT_TIER_NVME)))
		ask(l);
}

/* ---- looking -------------------------------------------------------------------------------- */

uint64_t limbo_bytes(const struct page_store *ps, int tier, uint32_t tenant)
{
	const struct limbo *l = ps->limbo;

	return !l ? 0 : tenant == LIMBO_ALL ? l->bytes[tier] : l->of[tier][tenant];
}

void limbo_stat(const struct core *c, struct core_stat *ret)
{
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
		ret->limbo_bytes[t] = limbo_bytes(&c->pages, t, LIMBO_ALL);
}

const struct page *limbo_next(const struct page_store *ps, uint64_t *cursor)
{
	const struct limbo *l = ps->limbo;
	uint32_t at = (uint32_t)(*cursor >> 32), i = (uint32_t)*cursor;

	for (; at < l->places; at++, i = 0)
		if (l->move[at] && l->move[at]->dst && i < l->move[at]->n) {
			*cursor = (uint64_t)at << 32 | (i + 1);
			return l->move[at]->src[i];
		}
	*cursor = (uint64_t)at << 32;
	return NULL;
}
