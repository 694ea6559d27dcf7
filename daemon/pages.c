/* SPDX-License-Identifier: MIT */
#include <string.h>
#include "daemon/direct.h"
#include "daemon/limbo.h"
#include "daemon/pages.h"
#include "policy/recall.h"
#include "shm/util.h"

int page_store_init(struct page_store *ps, uint32_t tenants)
{
	struct timespec ts;

	memset(ps, 0, sizeof(*ps));
	for (int t = 0; t < KVT_TIERS; t++) {
		ps->used[t] = calloc(tenants ? tenants : 1, sizeof(uint64_t));
		if (!ps->used[t]) {
			page_store_free(ps);
			return -ENOMEM;
		}
	}
	/* Numbers must also differ from those that earlier lives left on the disk. */
	clock_gettime(CLOCK_REALTIME, &ts);
	ps->next = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
	return 0;
}

void page_store_free(struct page_store *ps)
{
	for (int t = 0; t < KVT_TIERS; t++) {
		free(ps->used[t]);
		ps->used[t] = NULL;
	}
	free(ps->slot);
	ps->slot = NULL;
	ps->slots = ps->filled = 0;
}

struct origin *origin_new(struct page_store *ps, const uint8_t key[16], uint64_t tenant, uint32_t charge)
{
	struct origin *o = calloc(1, sizeof(*o));

	if (!o)
		return NULL;
	memcpy(o->key, key, sizeof(o->key));
	o->tenant = tenant;
	o->charge = charge;
	o->refs = 1;
	ps->bytes += heap_bytes(sizeof(*o));
	return o;
}

struct origin *origin_ref(struct origin *o)
{
	o->refs++;
	return o;
}

void origin_unref(struct page_store *ps, struct origin *o)
{
	if (!o || --o->refs)
		return;
	ps->bytes -= heap_bytes(sizeof(*o));
	free(o);
}

static size_t page_heap(uint32_t span)
{
	return sizeof(struct page) + span * sizeof(uint64_t);
}

struct page *page_new(struct page_store *ps, struct origin *o, uint32_t lane, uint32_t first, uint32_t span)
{
	struct page *p = calloc(1, page_heap(span));

	if (!p)
		return NULL;
	p->number = ps->next++;
	p->addr[0] = p->addr[1] = TIER_ADDR_NONE;
	p->origin = origin_ref(o);
	p->lane = (uint16_t)lane;
	p->first = first;
	p->span = (uint8_t)span;
	ps->bytes += heap_bytes(page_heap(span));
	ps->count++;
	return p;
}

void page_ident(const struct page *p, struct page_ident *ret)
{
	memset(ret, 0, sizeof(*ret));
	memcpy(ret->key, p->origin->key, sizeof(ret->key));
	ret->page = p->number;
	ret->tenant = p->origin->tenant;
	ret->lane = p->lane;
	ret->epoch = p->epoch;
	ret->rows = p->rows;
	ret->first = p->first;
}

static uint32_t slot_of(const struct page_store *ps, uint64_t number)
{
	return (uint32_t)((number * UINT64_C(0x9e3779b97f4a7c15)) >> 32) & (ps->slots - 1);
}

static void table_put(struct page_store *ps, struct page *p)
{
	uint32_t i = slot_of(ps, p->number);

	while (ps->slot[i])
		i = (i + 1) & (ps->slots - 1);
	ps->slot[i] = p;
}

static int table_grow(struct page_store *ps)
{
	struct page **old = ps->slot;
	uint32_t n = ps->slots, bigger = n ? n * 2 : 64;
	struct page **slot = calloc(bigger, sizeof(*slot));

	if (!slot)
		return -ENOMEM;
	ps->slot = slot;
	ps->slots = bigger;
	for (uint32_t i = 0; i < n; i++)
		if (old[i])
			table_put(ps, old[i]);
	ps->bytes += heap_bytes(bigger * sizeof(*slot)) - (n ? heap_bytes(n * sizeof(*slot)) : 0);
	free(old);
	return 0;
}

/* Linear probing without tombstones: what follows the hole moves up when it may. */
static void table_del(struct page_store *ps, const struct page *p)
{
	uint32_t i = slot_of(ps, p->number), mask = ps->slots - 1, j;

	while (ps->slot[i] != p)
		i = (i + 1) & mask;
	for (j = (i + 1) & mask; ps->slot[j]; j = (j + 1) & mask) {
		uint32_t home = slot_of(ps, ps->slot[j]->number);

		if (((j - home) & mask) >= ((j - i) & mask)) {
			ps->slot[i] = ps->slot[j];
			i = j;
		}
	}
	ps->slot[i] = NULL;
	ps->filled--;
}

struct page *page_find(const struct page_store *ps, uint64_t number)
{
	if (!ps->slots)
		return NULL;
	for (uint32_t i = slot_of(ps, number); ps->slot[i]; i = (i + 1) & (ps->slots - 1))
		if (ps->slot[i]->number == number)
			return ps->slot[i];
	return NULL;
}

int page_set_copy(struct page_store *ps, struct page *p, int tier, tier_addr addr)
{
	if (addr == TIER_ADDR_NONE)
		return -EINVAL;
	if (tier == KVT_TIER_NVME) {
		if ((ps->filled + 1) * 4 > ps->slots * 3 && table_grow(ps) < 0) {
			ps->tier[tier]->ops->free(ps->tier[tier], addr, p->bytes);
			return -ENOMEM;
		}
		table_put(ps, p);
		ps->filled++;
	}
	p->addr[tier - 1] = addr;
	ps->used[tier][p->origin->charge] += page_room(p->bytes);
	return 0;
}

static uint64_t sum_heap(const struct page *p)
{
	return heap_bytes(recall_sum_bytes(p->rows, p->sum->dim));
}

void page_set_sum(struct page_store *ps, struct page *p, struct recall_sum *sum)
{
	if (p->sum || !page_in(p, KVT_TIER_DRAM)) {
		free(sum);
		return;
	}
	p->sum = sum;
	ps->bytes += sum_heap(p);
}

void page_free_copy(struct page_store *ps, struct page *p, int tier)
{
	if (!page_in(p, tier))
		return;
	if (tier == KVT_TIER_DRAM)
		direct_gone(p);
	if (tier == KVT_TIER_DRAM && p->sum) {
		ps->bytes -= sum_heap(p);
		free(p->sum);
		p->sum = NULL;
	}
	if (tier == KVT_TIER_NVME && p->limbo)
		limbo_over(ps, p);
	if (tier == KVT_TIER_NVME)
		table_del(ps, p);
	if (!ps->closing)
		ps->tier[tier]->ops->free(ps->tier[tier], p->addr[tier - 1], p->bytes);
	p->addr[tier - 1] = TIER_ADDR_NONE;
	ps->used[tier][p->origin->charge] -= page_room(p->bytes);
}

void page_move_copy(struct page *p, int tier, tier_addr addr)
{
	p->addr[tier - 1] = addr;
}

static void page_end(struct page_store *ps, struct page *p)
{
	if (!p->refs && p->limbo)
		limbo_over(ps, p);
	if (p->refs || p->pins)
		return;
	page_free_copy(ps, p, KVT_TIER_DRAM);
	page_free_copy(ps, p, KVT_TIER_NVME);
	origin_unref(ps, p->origin);
	ps->bytes -= heap_bytes(page_heap(p->span));
	ps->count--;
	free(p);
}

void page_ref(struct page *p)
{
	p->refs++;
}

void page_unref(struct page_store *ps, struct page *p)
{
	p->refs--;
	page_end(ps, p);
}

void page_pin(struct page *p)
{
	p->pins++;
}

void page_unpin(struct page_store *ps, struct page *p)
{
	p->pins--;
	page_end(ps, p);
}
