/* SPDX-License-Identifier: MIT */
#include "tiers/alloc.h"
#include "shm/bits.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define NIL UINT32_MAX
#define WIDE_BELOW 8u /* classes under this have more than 64 places in a slab */
#define WIDE_WORDS 8u
#define MAX_RUN 4u

/* Slabs are named by segment and index in one word. */
static uint32_t slab_id(uint32_t seg, uint32_t slab)
{
	return seg << 20 | slab;
}

static struct alloc_slab *slab_of(struct alloc *a, uint32_t id)
{
	return &a->seg[id >> 20].slab[id & (ALLOC_MAX_SLABS - 1)];
}

static uint64_t *wide_of(struct alloc *a, uint32_t id)
{
	return &a->seg[id >> 20].wide[(uint64_t)(id & (ALLOC_MAX_SLABS - 1)) * WIDE_WORDS];
}

static uint32_t places_in(uint32_t run, uint32_t units)
{
	return run * ALLOC_SLAB_UNITS / units;
}

static uint64_t stranded_in(uint32_t run, uint32_t units)
{
	return (uint64_t)(run * ALLOC_SLAB_UNITS % units) * KVT_UNIT;
}

/* Shortest run that wastes at most an eighth; only large classes need more than one slab for that. */
static uint32_t best_run(uint32_t units)
{
	uint32_t run = 1;

	while (run < MAX_RUN && run * ALLOC_SLAB_UNITS % units * 8 > run * ALLOC_SLAB_UNITS)
		run++;
	return run;
}

static void list_push(struct alloc *a, uint32_t id)
{
	struct alloc_slab *s = slab_of(a, id);
	struct alloc_class *c = &a->cls[s->units];

	s->prev = NIL;
	s->next = c->head;
	if (c->head != NIL)
		slab_of(a, c->head)->prev = id;
	else
		bits_set(a->partial, s->units);
	c->head = id;
}

static void list_drop(struct alloc *a, uint32_t id)
{
	struct alloc_slab *s = slab_of(a, id);
	struct alloc_class *c = &a->cls[s->units];

	if (s->prev != NIL)
		slab_of(a, s->prev)->next = s->next;
	else
		c->head = s->next;
	if (s->next != NIL)
		slab_of(a, s->next)->prev = s->prev;
	if (c->head == NIL)
		bits_clear(a->partial, s->units);
}

void alloc_init(struct alloc *a)
{
	memset(a, 0, sizeof(*a));
	for (uint32_t i = 0; i <= ALLOC_MAX_UNITS; i++)
		a->cls[i].head = NIL;
	a->st.meta = sizeof(*a);
}

static size_t seg_meta(uint32_t slabs)
{
	return slabs * sizeof(struct alloc_slab) + BITS_WORDS(slabs) * sizeof(uint64_t);
}

static size_t wide_meta(uint32_t slabs)
{
	return (size_t)slabs * WIDE_WORDS * sizeof(uint64_t);
}

static void seg_drop(struct alloc_seg *g)
{
	free(g->slab);
	free(g->wide);
	memset(g, 0, sizeof(*g));
}

void alloc_fini(struct alloc *a)
{
	if (!a)
		return;
	for (uint32_t i = 0; i < a->top; i++)
		seg_drop(&a->seg[i]);
	free(a->seg);
	alloc_init(a);
}

static int seg_room(struct alloc *a, uint32_t n)
{
	uint32_t room = MIN(MAX(a->room * 2, MAX(n, 8u)), ALLOC_MAX_SEGS);
	struct alloc_seg *p;

	if (n <= a->room)
		return 0;
	p = realloc(a->seg, room * sizeof(*p));
	if (!p)
		return -ENOMEM;
	memset(p + a->room, 0, (room - a->room) * sizeof(*p));
	a->st.meta += (room - a->room) * sizeof(*p);
	a->seg = p;
	a->room = room;
	return 0;
}

int alloc_add(struct alloc *a, uint32_t slabs)
{
	uint32_t i = 0;

	while (i < a->top && a->seg[i].slab)
		i++;
	return alloc_add_at(a, i, slabs);
}

int alloc_add_at(struct alloc *a, uint32_t i, uint32_t slabs)
{
	struct alloc_seg *g;

	if (!slabs || slabs >= ALLOC_MAX_SLABS) /* the very last index would look like NIL */
		return -EINVAL;
	if (i >= ALLOC_MAX_SEGS)
		return -ENOSPC;
	if (i < a->top && a->seg[i].slab)
		return -EINVAL;
	if (seg_room(a, i + 1))
		return -ENOMEM;
	g = &a->seg[i];
	g->slab = calloc(1, seg_meta(slabs));
	if (!g->slab)
		return -ENOMEM;
	g->pool = (uint64_t *)(g->slab + slabs);
	g->slabs = g->pooled = slabs;
	bits_set_range(g->pool, 0, slabs);
	bits_set(a->avail, i);
	a->top = MAX(a->top, i + 1);
	a->st.capacity += slabs * ALLOC_SLAB_BYTES;
	a->st.meta += seg_meta(slabs);
	a->st.segs++;
	a->st.empty_segs++;
	return (int)i;
}

int alloc_remove(struct alloc *a, uint32_t seg)
{
	struct alloc_seg *g = seg < a->top ? &a->seg[seg] : NULL;

	if (!g || !g->slab)
		return -EINVAL;
	if (g->pooled != g->slabs)
		return -EBUSY;
	a->st.capacity -= g->slabs * ALLOC_SLAB_BYTES;
	a->st.meta -= seg_meta(g->slabs) + (g->wide ? wide_meta(g->slabs) : 0);
	a->st.segs--;
	a->st.empty_segs--;
	bits_clear(a->avail, seg);
	seg_drop(g);
	while (a->top && !a->seg[a->top - 1].slab)
		a->top--;
	return 0;
}

uint32_t alloc_next_empty(const struct alloc *a, uint32_t seg)
{
	while (seg < a->top && (!a->seg[seg].slab || a->seg[seg].pooled != a->seg[seg].slabs))
		seg++;
	return seg;
}

/* First slab of a pooled run, or g->slabs. */
static uint32_t find_run(const struct alloc_seg *g, uint32_t run)
{
	uint32_t i = bits_next(g->pool, 0, g->slabs);

	while (i + run <= g->slabs) {
		uint32_t n = 1;

		while (n < run && bits_test(g->pool, i + n))
			n++;
		if (n == run)
			return i;
		i = bits_next(g->pool, i + n, g->slabs);
	}
	return g->slabs;
}

/* Lowest segment first, so that the upper ones run empty and can be given back. */
static uint32_t pool_find(struct alloc *a, uint32_t run)
{
	bits_for_each(i, a->avail, a->top) {
		uint32_t s = find_run(&a->seg[i], run);

		if (s < a->seg[i].slabs)
			return slab_id(i, s);
	}
	return NIL;
}

static int wide_ready(struct alloc *a, struct alloc_seg *g)
{
	if (g->wide)
		return 0;
	g->wide = calloc(g->slabs, WIDE_WORDS * sizeof(uint64_t));
	if (!g->wide)
		return -ENOMEM;
	a->st.meta += wide_meta(g->slabs);
	return 0;
}

static void pool_take(struct alloc *a, uint32_t id, uint32_t run)
{
	struct alloc_seg *g = &a->seg[id >> 20];
	uint32_t at = id & (ALLOC_MAX_SLABS - 1);

	if (g->pooled == g->slabs)
		a->st.empty_segs--;
	g->pooled -= run;
	bits_clear_range(g->pool, at, at + run);
	if (!g->pooled)
		bits_clear(a->avail, id >> 20);
}

/* A pooled run becomes the class's; wide_ready() was called where it is a small one. */
static void dedicate(struct alloc *a, uint32_t id, uint32_t run, uint32_t units)
{
	struct alloc_slab *s = slab_of(a, id);
	uint32_t n = places_in(run, units);

	pool_take(a, id, run);
	for (uint32_t i = 0; i < run; i++)
		s[i] = (struct alloc_slab){
			.units = (uint16_t)units, .run = (uint8_t)run, .run_off = (uint8_t)i};
	s->nfree = (uint16_t)n;
	if (units < WIDE_BELOW) {
		memset(wide_of(a, id), 0, WIDE_WORDS * sizeof(uint64_t));
		bits_set_range(wide_of(a, id), 0, n);
		n = (uint32_t)BITS_WORDS(n);
	}
	bits_set_range(&s->bits, 0, n);
	a->cls[units].slabs += run;
	a->st.stranded += stranded_in(run, units);
	list_push(a, id);
}

/* Dedicate a slab or run from the pool to a class. */
static int slab_make(struct alloc *a, uint32_t units)
{
	uint32_t run = best_run(units), id = pool_find(a, run);

	if (id == NIL && run > 1)
		id = pool_find(a, run = 1);
	if (id == NIL)
		return -ENOSPC;
	if (units < WIDE_BELOW && wide_ready(a, &a->seg[id >> 20]))
		return -ENOMEM;
	dedicate(a, id, run, units);
	return 0;
}

static void place_mark(struct alloc *a, uint32_t id, uint32_t i)
{
	struct alloc_slab *s = slab_of(a, id);

	if (s->units < WIDE_BELOW) {
		uint64_t *w = wide_of(a, id) + i / 64;

		bits_clear(w, i % 64);
		if (!*w)
			bits_clear(&s->bits, i / 64);
	} else {
		bits_clear(&s->bits, i);
	}
	if (--s->nfree == 0)
		list_drop(a, id);
}

/* Take the first free place of a slab that has one; its index. */
static uint32_t place_take(struct alloc *a, uint32_t id)
{
	struct alloc_slab *s = slab_of(a, id);
	uint32_t i = (uint32_t)__builtin_ctzll(s->bits);

	if (s->units < WIDE_BELOW)
		i = i * 64 + (uint32_t)__builtin_ctzll(wide_of(a, id)[i]);
	place_mark(a, id, i);
	return i;
}

static void count_page(struct alloc *a, uint32_t units, uint32_t bytes)
{
	a->cls[units].pages++;
	a->st.pages++;
	a->st.used += (uint64_t)units * KVT_UNIT;
	a->st.payload += bytes;
}

int alloc_get(struct alloc *a, uint32_t bytes, bool borrow, uint64_t *ret)
{
	uint32_t units = DIV_UP((uint64_t)bytes, KVT_UNIT), c = units, id, i;
	int r;

	if (!units || units > ALLOC_MAX_UNITS)
		return -EINVAL;
	if (a->cls[c].head == NIL) {
		r = slab_make(a, c);
		if (r == -ENOSPC && borrow) {
			uint32_t end = MIN(units * 2, ALLOC_MAX_UNITS) + 1;

			c = bits_next(a->partial, units, end);
			r = c < end ? 0 : -ENOSPC;
		}
		if (r < 0)
			return r;
	}
	id = a->cls[c].head;
	i = place_take(a, id);
	count_page(a, c, bytes);
	*ret = (uint64_t)(id >> 20) << 32 |
	       ((uint64_t)(id & (ALLOC_MAX_SLABS - 1)) * ALLOC_SLAB_UNITS + (uint64_t)i * c);
	return 0;
}

/* The slab (run head) and index of a place in use. */
static int place_find(const struct alloc *a, uint64_t addr, uint32_t bytes, uint32_t *ret_id,
		      uint32_t *ret_index)
{
	uint32_t seg = alloc_addr_seg(addr), unit = (uint32_t)addr, at = unit / ALLOC_SLAB_UNITS, off, i;
	const struct alloc_seg *g;
	const struct alloc_slab *s;
	bool is_free;

	if (seg >= a->top || !bytes)
		return -EINVAL;
	g = &a->seg[seg];
	if (at >= g->slabs || !g->slab[at].units)
		return -EINVAL;
	at -= g->slab[at].run_off;
	s = &g->slab[at];
	off = unit - at * ALLOC_SLAB_UNITS;
	i = off / s->units;
	if (off % s->units || i >= places_in(s->run, s->units))
		return -EINVAL;
	if (DIV_UP((uint64_t)bytes, KVT_UNIT) > s->units || DIV_UP((uint64_t)bytes, KVT_UNIT) * 2 < s->units)
		return -EINVAL;
	is_free = s->units < WIDE_BELOW ? bits_test(g->wide + (uint64_t)at * WIDE_WORDS, i)
					: bits_test(&s->bits, i);
	if (is_free)
		return -EINVAL;
	*ret_id = slab_id(seg, at);
	*ret_index = i;
	return 0;
}

int alloc_check(const struct alloc *a, uint64_t addr, uint32_t bytes)
{
	uint32_t id, i;

	return place_find(a, addr, bytes, &id, &i);
}

int alloc_where(const struct alloc *a, uint64_t addr, uint32_t bytes, struct alloc_place *ret)
{
	const struct alloc_slab *s;
	uint32_t id, i;
	int r = place_find(a, addr, bytes, &id, &i);

	if (r < 0)
		return r;
	s = &a->seg[id >> 20].slab[id & (ALLOC_MAX_SLABS - 1)];
	*ret = (struct alloc_place){
		.units = s->units,
		.run = s->run,
		.run_off = (uint8_t)((uint32_t)addr / ALLOC_SLAB_UNITS - (id & (ALLOC_MAX_SLABS - 1))),
	};
	return 0;
}

/* The run that begins at slab `at` is this class's; it is made so when it was in the pool. */
static int restore_run(struct alloc *a, uint32_t seg, uint32_t at, const struct alloc_place *p)
{
	struct alloc_seg *g = &a->seg[seg];
	const struct alloc_slab *s = &g->slab[at];

	if (s->units)
		return s->units == p->units && s->run == p->run && !s->run_off ? 0 : -EINVAL;
	for (uint32_t i = 0; i < p->run; i++)
		if (!bits_test(g->pool, at + i))
			return -EINVAL;
	if (p->units < WIDE_BELOW && wide_ready(a, g))
		return -ENOMEM;
	dedicate(a, slab_id(seg, at), p->run, p->units);
	return 0;
}

int alloc_restore(struct alloc *a, uint64_t addr, uint32_t bytes, const struct alloc_place *p)
{
	uint32_t seg = alloc_addr_seg(addr), unit = (uint32_t)addr, at = unit / ALLOC_SLAB_UNITS, off, i;
	uint32_t need = (uint32_t)DIV_UP((uint64_t)bytes, KVT_UNIT);
	const struct alloc_slab *s;
	bool is_free;
	int r;

	if (seg >= a->top || !a->seg[seg].slab || !need || need > p->units || need * 2 < p->units ||
	    p->units > ALLOC_MAX_UNITS || !p->run || p->run > MAX_RUN || p->run_off >= p->run ||
	    at < p->run_off || at - p->run_off + p->run > a->seg[seg].slabs)
		return -EINVAL;
	at -= p->run_off;
	off = unit - at * ALLOC_SLAB_UNITS;
	i = off / p->units;
	if (off % p->units || i >= places_in(p->run, p->units))
		return -EINVAL;
	r = restore_run(a, seg, at, p);
	if (r < 0)
		return r;
	s = &a->seg[seg].slab[at];
	is_free = s->units < WIDE_BELOW ? bits_test(a->seg[seg].wide + (uint64_t)at * WIDE_WORDS, i)
					: bits_test(&s->bits, i);
	if (!is_free)
		return -EINVAL;
	place_mark(a, slab_id(seg, at), i);
	count_page(a, p->units, bytes);
	return 0;
}

/* Return a slab or run without pages to the pool. True when that empties its segment. */
static bool slab_drop(struct alloc *a, uint32_t id)
{
	struct alloc_slab *s = slab_of(a, id);
	struct alloc_seg *g = &a->seg[id >> 20];
	uint32_t at = id & (ALLOC_MAX_SLABS - 1), run = s->run;

	list_drop(a, id);
	a->cls[s->units].slabs -= run;
	a->st.stranded -= stranded_in(run, s->units);
	for (uint32_t i = 0; i < run; i++)
		s[i].units = 0;
	bits_set_range(g->pool, at, at + run);
	g->pooled += run;
	bits_set(a->avail, id >> 20);
	if (g->pooled != g->slabs)
		return false;
	a->st.empty_segs++;
	return true;
}

int alloc_put(struct alloc *a, uint64_t addr, uint32_t bytes)
{
	struct alloc_slab *s;
	uint32_t id, i;
	int r = place_find(a, addr, bytes, &id, &i);

	if (r < 0)
		return r;
	s = slab_of(a, id);
	if (s->units < WIDE_BELOW) {
		bits_set(wide_of(a, id), i);
		bits_set(&s->bits, i / 64);
	} else {
		bits_set(&s->bits, i);
	}
	a->cls[s->units].pages--;
	a->st.pages--;
	a->st.used -= (uint64_t)s->units * KVT_UNIT;
	a->st.payload -= bytes;
	if (s->nfree++ == 0)
		list_push(a, id);
	return s->nfree == places_in(s->run, s->units) && slab_drop(a, id);
}

void alloc_stat(const struct alloc *a, struct alloc_stat *ret)
{
	*ret = a->st;
	ret->padding = ret->used - ret->payload;
	ret->free = ret->capacity - ret->used - ret->stranded;
}
