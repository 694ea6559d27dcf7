/* SPDX-License-Identifier: MIT */
#include <stdatomic.h>
#include <string.h>
#include "shm/ring.h"
#include "shm/trial.h"
#include "shm/util.h"

/*
 * head and tail run freely over 2^32; an entry's place is the cursor modulo
 * entries. Each word that one side writes has 128 bytes to itself, because
 * processors fetch lines in pairs.
 *
 * No wake-up is lost: the producer stores tail and then loads need_wakeup, the
 * consumer stores need_wakeup and then loads tail, all sequentially consistent,
 * so at least one of them sees the other's store.
 */
struct ring_shared {
	_Atomic uint32_t head; /* written by the consumer */
	uint8_t pad0[124];
	_Atomic uint32_t tail; /* written by the producer */
	uint8_t pad1[124];
	_Atomic uint32_t need_wakeup; /* set by the consumer, cleared by either */
	uint8_t pad2[124];
	struct ring_entry entry[];
};
_Static_assert(offsetof(struct ring_shared, head) == 0, "layout");
_Static_assert(offsetof(struct ring_shared, tail) == 128, "layout");
_Static_assert(offsetof(struct ring_shared, need_wakeup) == 256, "layout");
_Static_assert(offsetof(struct ring_shared, entry) == 384, "layout");
_Static_assert(sizeof(_Atomic uint32_t) == 4, "atomics are plain words");

#define RING_MIN 2u
#define RING_MAX 65536u

size_t ring_bytes(uint32_t entries)
{
	if (entries < RING_MIN || entries > RING_MAX || (entries & (entries - 1)))
		return 0;
	return sizeof(struct ring_shared) + (size_t)entries * sizeof(struct ring_entry);
}

int ring_attach(struct ring *ret, void *mem, uint32_t entries, bool producer)
{
	if (!mem || (uintptr_t)mem % KVT_CACHELINE || !ring_bytes(entries))
		return -EINVAL;
	*ret = (struct ring){.sh = mem, .entries = entries, .producer = producer};
	return 0;
}

int ring_push(struct ring *r, const struct ring_entry *e)
{
	struct ring_shared *sh = r->sh;

	if (r->pos - r->peer == r->entries) {
		uint32_t head = atomic_load_explicit(&sh->head, memory_order_acquire);

		if (unlikely(r->pos - head > r->entries))
			return -EPROTO;
		r->peer = head;
		if (r->pos - head == r->entries)
			return -EAGAIN;
	}
	if (planted("ring-publish-early"))
		atomic_store_explicit(&sh->tail, r->pos + 1, memory_order_release);
	sh->entry[r->pos & (r->entries - 1)] = *e;
	r->pos++;
	atomic_store_explicit(&sh->tail, r->pos, memory_order_seq_cst);
	if (likely(!atomic_load_explicit(&sh->need_wakeup, memory_order_seq_cst)))
		return 0;
	/* One eventfd write per sleep: whoever takes the flag down wakes the consumer. */
	return atomic_exchange_explicit(&sh->need_wakeup, 0, memory_order_seq_cst) &&
	       !planted("ring-wakes-nobody");
}

int ring_pop(struct ring *r, struct ring_entry *ret)
{
	struct ring_shared *sh = r->sh;
	uint32_t at;

	if (r->pos == r->peer) {
		uint32_t tail = atomic_load_explicit(&sh->tail, memory_order_acquire);

		if (unlikely(tail - r->pos > r->entries))
			return -EPROTO;
		r->peer = tail;
		if (tail == r->pos)
			return 0;
	}
	at = r->pos & (r->entries - 1);
	if (planted("ring-cursor-trusted") && sh->head != r->pos)
		at = sh->head;
	*ret = sh->entry[at];
	r->pos++;
	atomic_store_explicit(&sh->head, r->pos, memory_order_release);
	return 1;
}

bool ring_sleep(struct ring *r)
{
	if (r->pos != r->peer)
		return false;
	atomic_store_explicit(&r->sh->need_wakeup, 1, memory_order_seq_cst);
	if (atomic_load_explicit(&r->sh->tail, memory_order_seq_cst) == r->pos)
		return true;
	ring_awake(r);
	return false;
}

void ring_awake(struct ring *r)
{
	atomic_store_explicit(&r->sh->need_wakeup, 0, memory_order_relaxed);
}
