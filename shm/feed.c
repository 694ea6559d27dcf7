/* SPDX-License-Identifier: MIT */
#include <stdatomic.h>
#include <string.h>
#include "shm/feed.h"
#include "shm/util.h"

#define FEED_MAX (1u << 24)
#define EVENT_WORDS (sizeof(struct feed_event) / sizeof(uint64_t))
/* Set in an entry's sequence word while its event is being written. */
#define SEQ_BUSY (UINT64_C(1) << 63)
/* Each failed attempt means that the writer went a whole lap further; the next call goes on. */
#define READ_TRIES 16

/*
 * Entry number n (from 0) lives in place n % entries and carries n + 1 in its
 * sequence word, with SEQ_BUSY while it is being written. The event's words are
 * stored with release and loaded with acquire: a reader who saw a word of a
 * newer event also sees the sequence word that announced it.
 */
struct feed_slot {
	_Atomic uint64_t seq;
	_Atomic uint64_t word[EVENT_WORDS];
};
_Static_assert(sizeof(struct feed_slot) == KVT_CACHELINE, "one line per entry");

struct feed {
	_Atomic uint64_t next; /* number of the entry that will be written next */
	_Atomic uint32_t entries;
	uint8_t pad[52];
	struct feed_slot slot[];
};
_Static_assert(offsetof(struct feed, entries) == 8, "layout");
_Static_assert(offsetof(struct feed, slot) == KVT_CACHELINE, "layout");

size_t feed_bytes(uint32_t entries)
{
	if (entries < 2 || entries > FEED_MAX || (entries & (entries - 1)))
		return 0;
	return sizeof(struct feed) + (size_t)entries * sizeof(struct feed_slot);
}

int feed_writer_init(struct feed_writer *ret, void *mem, uint32_t entries)
{
	struct feed *f = mem;

	if (!mem || (uintptr_t)mem % KVT_CACHELINE || !feed_bytes(entries))
		return -EINVAL;
	atomic_store_explicit(&f->next, 0, memory_order_relaxed);
	atomic_store_explicit(&f->entries, entries, memory_order_release);
	*ret = (struct feed_writer){.mem = mem, .entries = entries};
	return 0;
}

void feed_write(struct feed_writer *w, const struct feed_event *e)
{
	struct feed *f = w->mem;
	struct feed_slot *s = &f->slot[w->next & (w->entries - 1)];
	uint64_t word[EVENT_WORDS];

	memcpy(word, e, sizeof(word));
	atomic_store_explicit(&s->seq, (w->next + 1) | SEQ_BUSY, memory_order_relaxed);
	for (size_t i = 0; i < EVENT_WORDS; i++)
		atomic_store_explicit(&s->word[i], word[i], memory_order_release);
	w->next++;
	atomic_store_explicit(&s->seq, w->next, memory_order_release);
	atomic_store_explicit(&f->next, w->next, memory_order_release);
}

static uint64_t oldest(uint64_t next, uint32_t entries)
{
	return next > entries ? next - entries : 0;
}

int feed_reader_init(struct feed_reader *ret, const void *mem, size_t bytes, int from_start)
{
	const struct feed *f = mem;
	uint32_t entries;
	uint64_t next;

	if (!mem || (uintptr_t)mem % KVT_CACHELINE || bytes < sizeof(*f))
		return -EPROTO;
	entries = atomic_load_explicit(&f->entries, memory_order_acquire);
	if (!feed_bytes(entries) || feed_bytes(entries) > bytes)
		return -EPROTO;
	next = atomic_load_explicit(&f->next, memory_order_acquire);
	*ret = (struct feed_reader){
		.mem = mem, .entries = entries, .next = from_start ? oldest(next, entries) : next};
	return 0;
}

/* Move a lapped reader to the oldest entry that is not gone, given what its place holds by now. */
static void skip_lost(struct feed_reader *r, uint64_t seq, uint64_t *lost)
{
	const struct feed *f = r->mem;
	/* Entry seq - 1 replaced (or is replacing) seq - 1 - entries. */
	uint64_t to =
		MAX(oldest(atomic_load_explicit(&f->next, memory_order_acquire), r->entries), seq - r->entries);

	if (lost)
		*lost += to - r->next;
	r->next = to;
}

int feed_read(struct feed_reader *r, struct feed_event *ret, uint64_t *lost)
{
	const struct feed *f = r->mem;
	uint64_t word[EVENT_WORDS];

	for (int tries = 0; tries < READ_TRIES; tries++) {
		const struct feed_slot *s = &f->slot[r->next & (r->entries - 1)];
		uint64_t want = r->next + 1;
		uint64_t seq = atomic_load_explicit(&s->seq, memory_order_acquire);

		if ((seq & ~SEQ_BUSY) < want || seq == (want | SEQ_BUSY))
			return 0;
		if (seq == want) {
			for (size_t i = 0; i < EVENT_WORDS; i++)
				word[i] = atomic_load_explicit(&s->word[i], memory_order_acquire);
			seq = atomic_load_explicit(&s->seq, memory_order_relaxed);
			if (seq == want) {
				memcpy(ret, word, sizeof(*ret));
				r->next++;
				return 1;
			}
		}
		skip_lost(r, seq & ~SEQ_BUSY, lost);
	}
	return 0;
}
