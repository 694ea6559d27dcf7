/* SPDX-License-Identifier: MIT */
#include <sys/random.h>
#include "shm/handle.h"
#include "shm/trial.h"
#include "shm/util.h"

#define NO_SLOT UINT32_MAX
#define FIRST_CAP 16u
#ifndef HANDLE_GEN_MAX /* a test has fewer, so that it sees them all */
#define HANDLE_GEN_MAX UINT32_MAX
#endif

struct handle_slot {
	void *obj; /* NULL: free or retired */
	const void *owner;
	uint32_t gen; /* of the live handle, or of the next one; never 0, so that no handle is */
	uint32_t next_free;
};

struct handle_table {
	struct handle_slot *slot;
	uint32_t max;  /* slots it may ever have */
	uint32_t cap;  /* slots allocated */
	uint32_t used; /* slots ever handed out */
	uint32_t free_head;
	uint32_t count;
	uint32_t first; /* generation that slots begin with */
};

/* Somewhere in the lower half, so that what an earlier process gave out is stale here, and half of them are
 * left. */
static uint32_t first_generation(void)
{
	uint32_t n = 0;

	if (planted("handles-start-over") || getrandom(&n, sizeof(n), 0) != sizeof(n))
		n = 0;
	return n % (HANDLE_GEN_MAX / 2) + 1;
}

int handle_table_new(struct handle_table **ret, uint32_t max)
{
	struct handle_table *t = calloc(1, sizeof(*t));

	if (!t)
		return -ENOMEM;
	t->max = MIN(max, NO_SLOT);
	t->first = first_generation();
	t->free_head = NO_SLOT;
	*ret = t;
	return 0;
}

void handle_table_free(struct handle_table *t)
{
	if (!t)
		return;
	free(t->slot);
	free(t);
}

static bool grow(struct handle_table *t)
{
	uint32_t cap = t->cap > t->max / 2 ? t->max : MIN(t->max, MAX(t->cap * 2, FIRST_CAP));
	struct handle_slot *slot;

	if (t->cap == t->max)
		return false;
	slot = reallocarray(t->slot, cap, sizeof(*slot));
	if (!slot)
		return false;
	t->slot = slot;
	t->cap = cap;
	return true;
}

static uint32_t take_slot(struct handle_table *t)
{
	uint32_t i = t->free_head;

	if (i != NO_SLOT) {
		t->free_head = t->slot[i].next_free;
		return i;
	}
	if (t->used == t->cap && !grow(t))
		return NO_SLOT;
	t->slot[t->used].gen = t->first;
	return t->used++;
}

static uint64_t make_handle(const struct handle_table *t, uint32_t i)
{
	return (uint64_t)t->slot[i].gen << 32 | i;
}

static struct handle_slot *find(const struct handle_table *t, uint64_t handle)
{
	uint32_t i = (uint32_t)handle;

	if ((i >= t->used && !planted("handle-unchecked")) || !t->slot[i].obj || t->slot[i].gen != handle >> 32)
		return NULL;
	return &t->slot[i];
}

uint64_t handle_add(struct handle_table *t, void *obj, const void *owner)
{
	uint32_t i;

	if (!obj)
		return 0;
	i = take_slot(t);
	if (i == NO_SLOT)
		return 0;
	t->slot[i].obj = obj;
	t->slot[i].owner = owner;
	t->count++;
	return make_handle(t, i);
}

void *handle_get(const struct handle_table *t, uint64_t handle, const void *owner)
{
	const struct handle_slot *s = find(t, handle);

	if (!s || (owner && s->owner != owner && !planted("handle-owner-unchecked")))
		return NULL;
	return s->obj;
}

void handle_set_owner(struct handle_table *t, uint64_t handle, const void *owner)
{
	struct handle_slot *s = find(t, handle);

	if (s)
		s->owner = owner;
}

void handle_del(struct handle_table *t, uint64_t handle)
{
	struct handle_slot *s = find(t, handle);

	if (!s)
		return;
	s->obj = NULL;
	s->owner = NULL;
	t->count--;
	if (s->gen == HANDLE_GEN_MAX && !planted("generation-wraps"))
		return; /* retired: one generation more would revive the first handle */
	s->gen = s->gen % HANDLE_GEN_MAX + 1;
	s->next_free = t->free_head;
	t->free_head = (uint32_t)handle;
}

uint32_t handle_count(const struct handle_table *t)
{
	return t->count;
}

void *handle_next(const struct handle_table *t, uint32_t *cursor, uint64_t *ret_handle)
{
	while (*cursor < t->used) {
		uint32_t i = (*cursor)++;

		if (!t->slot[i].obj)
			continue;
		if (ret_handle)
			*ret_handle = make_handle(t, i);
		return t->slot[i].obj;
	}
	return NULL;
}
