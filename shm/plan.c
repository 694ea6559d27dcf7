/* SPDX-License-Identifier: MIT */
#include <string.h>
#include "shm/bits.h"
#include "shm/plan.h"
#include "shm/util.h"

/*
 * The header is a seqlock whose sequence word is `id`. Its plain fields are
 * stored with release and loaded with acquire, so that a reader who saw a field
 * of the next plan also sees that id has changed. The tables need no such care
 * from a reader who keeps the protocol (they stand still until the plan is
 * acknowledged or cancelled); plan_still() tells one who does not.
 */
#define field_set(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define field_get(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)

/* A reader that meets a writer this often in a row says "none" and comes back later. */
#define PEEK_TRIES 8

#if defined(__SANITIZE_THREAD__)
#define HAVE_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HAVE_TSAN 1
#endif
#endif

/* ThreadSanitizer models no fences; it only runs where the hardware needs none of these two. */
static inline void fence(memory_order order)
{
#ifdef HAVE_TSAN
	atomic_signal_fence(order);
#else
	atomic_thread_fence(order);
#endif
}

/* Bytes in use, without rounding; cannot overflow for any 32-bit arguments. */
static uint64_t plan_need(uint32_t lanes, uint32_t rows)
{
	return sizeof(struct plan_hdr) + (uint64_t)lanes * sizeof(struct plan_lane) +
	       3 * (uint64_t)lanes * BITS_WORDS(rows) * sizeof(uint64_t);
}

/* The same with a window: where its pages begin. */
static uint64_t pages_at(uint32_t lanes, uint32_t rows)
{
	return ALIGN_UP(plan_need(lanes, rows) + (uint64_t)lanes * BITS_WORDS(rows) * sizeof(uint64_t),
			KVT_CACHELINE);
}

size_t plan_bytes(uint32_t lanes, uint32_t max_rows)
{
	return ALIGN_UP(plan_need(lanes, max_rows), KVT_CACHELINE);
}

/*
 * A page of a lane and tier ends because it is full, because its bitmap is (it may start at bit 63 of its first
 * word, which leaves SPAN - 1 words), or because there are no more rows. Both tiers share the lane's rows.
 */
size_t plan_bytes_window(uint32_t lanes, uint32_t max_rows, uint32_t page_rows)
{
	uint64_t wide = (PLAN_PAGE_SPAN - 1) * 64,
		 pages = max_rows / (page_rows ? page_rows : 1) + 2 * (max_rows / wide + 1);

	return ALIGN_UP(pages_at(lanes, max_rows) + lanes * pages * sizeof(struct plan_page), KVT_CACHELINE);
}

int plan_begin(void *area, size_t bytes, uint32_t lanes, uint32_t watermark, struct plan_tables *ret)
{
	struct plan_hdr *h = area;
	uint32_t words = (uint32_t)BITS_WORDS(watermark);
	uint64_t plane = (uint64_t)lanes * words;

	if (!area || !lanes || (uintptr_t)area % _Alignof(struct plan_hdr))
		return -EINVAL;
	if (plan_need(lanes, watermark) > bytes)
		return -ENOSPC;
	atomic_store_explicit(&h->id, 0, memory_order_release);
	fence(memory_order_seq_cst); /* hidden before the first table word changes */
	atomic_store_explicit(&h->state, PLAN_EMPTY, memory_order_release);
	field_set(&h->epoch, 0);
	field_set(&h->watermark, watermark);
	field_set(&h->lanes, lanes);
	field_set(&h->words, words);
	field_set(&h->flags, 0);
	field_set(&h->decided_ns, 0);
	field_set(&h->rows_out, 0);
	field_set(&h->rows_in, 0);
	field_set(&h->rows_drop, 0);
	field_set(&h->policy, 0);
	field_set(&h->out_pages, 0);
	plan_set_taken(h, 0);
	plan_set_staged(h, 0);
	ret->hdr = h;
	ret->lane = (struct plan_lane *)(h + 1);
	ret->resident = (uint64_t *)(ret->lane + lanes);
	ret->copy_out = ret->resident + plane;
	ret->bring_in = ret->copy_out + plane;
	ret->words = words;
	ret->to_dram = NULL;
	ret->page = NULL;
	ret->max_pages = 0;
	memset(ret->lane, 0, plan_need(lanes, watermark) - sizeof(*h));
	return 0;
}

int plan_begin_window(void *area, size_t bytes, uint32_t lanes, uint32_t watermark, struct plan_tables *ret)
{
	uint64_t at = pages_at(lanes, watermark), room;
	int r;

	if (at > bytes)
		return lanes && area ? -ENOSPC : -EINVAL;
	r = plan_begin(area, bytes, lanes, watermark, ret);
	if (r < 0)
		return r;
	field_set(&ret->hdr->flags, PLAN_F_WINDOW);
	ret->to_dram = ret->bring_in + (uint64_t)lanes * ret->words;
	memset(ret->to_dram, 0, (size_t)lanes * ret->words * sizeof(uint64_t));
	ret->page = (struct plan_page *)((char *)area + at);
	room = (bytes - at) / sizeof(struct plan_page);
	ret->max_pages = (uint32_t)MIN(room, (uint64_t)UINT32_MAX);
	return 0;
}

void plan_set_taken(void *area, uint32_t taken)
{
	atomic_store_explicit(&((struct plan_hdr *)area)->taken, taken, memory_order_release);
}

void plan_set_staged(void *area, uint32_t staged)
{
	atomic_store_explicit(&((struct plan_hdr *)area)->staged, staged, memory_order_release);
}

void plan_publish(struct plan_tables *t, uint64_t id, enum plan_state state)
{
	atomic_store_explicit(&t->hdr->given_up, 0, memory_order_release);
	atomic_store_explicit(&t->hdr->state, state, memory_order_release);
	atomic_store_explicit(&t->hdr->id, id, memory_order_release);
}

void plan_give_up(void *area, uint64_t id, uint32_t why)
{
	struct plan_hdr *h = area;

	atomic_store_explicit(&h->given_why, why, memory_order_relaxed);
	atomic_store_explicit(&h->given_up, id, memory_order_release);
}

uint64_t plan_given_up(const void *area, size_t bytes, uint32_t *ret_why)
{
	const struct plan_hdr *h = area;
	uint64_t id;

	if (!area || bytes < sizeof(*h) || (uintptr_t)area % _Alignof(struct plan_hdr))
		return 0;
	id = atomic_load_explicit(&h->given_up, memory_order_acquire);
	if (id)
		*ret_why = atomic_load_explicit(&h->given_why, memory_order_relaxed);
	return id;
}

void plan_set_state(void *area, enum plan_state state)
{
	struct plan_hdr *h = area;

	atomic_store_explicit(&h->state, state, memory_order_release);
}

/* One attempt at a consistent copy of the header: 1, 0 nothing visible, -EAGAIN changed meanwhile. */
static int copy_header(const struct plan_hdr *h, struct plan_view *v)
{
	v->id = atomic_load_explicit(&h->id, memory_order_acquire);
	if (!v->id)
		return 0;
	v->state = atomic_load_explicit(&h->state, memory_order_acquire);
	v->epoch = field_get(&h->epoch);
	v->watermark = field_get(&h->watermark);
	v->lanes = field_get(&h->lanes);
	v->words = field_get(&h->words);
	v->flags = field_get(&h->flags);
	v->policy = field_get(&h->policy);
	v->out_pages = field_get(&h->out_pages);
	v->decided_ns = field_get(&h->decided_ns);
	v->rows_out = field_get(&h->rows_out);
	v->rows_in = field_get(&h->rows_in);
	v->rows_drop = field_get(&h->rows_drop);
	return atomic_load_explicit(&h->id, memory_order_relaxed) == v->id ? 1 : -EAGAIN;
}

int plan_peek(const void *area, size_t bytes, uint32_t lanes, struct plan_view *ret)
{
	const struct plan_hdr *h = area;
	struct plan_view v = {.hdr = h};
	uint64_t plane;
	int r = -EAGAIN;

	if (!area || bytes < sizeof(*h) || (uintptr_t)area % _Alignof(struct plan_hdr))
		return -EPROTO;
	for (int i = 0; i < PEEK_TRIES && r == -EAGAIN; i++)
		r = copy_header(h, &v);
	if (r <= 0)
		return 0;
	if (v.state < PLAN_DECIDED || v.state > PLAN_CANCELLED)
		return -EPROTO;
	if (!v.lanes || v.lanes > lanes || v.words != BITS_WORDS(v.watermark) ||
	    plan_need(v.lanes, v.watermark) > bytes)
		return -EPROTO;
	plane = (uint64_t)v.lanes * v.words;
	v.lane = (const struct plan_lane *)(h + 1);
	v.resident = (const uint64_t *)(v.lane + v.lanes);
	v.copy_out = v.resident + plane;
	v.bring_in = v.copy_out + plane;
	if (v.flags & PLAN_F_WINDOW) {
		uint64_t at = pages_at(v.lanes, v.watermark);

		if (at > bytes || v.out_pages > (bytes - at) / sizeof(struct plan_page))
			return -EPROTO;
		v.to_dram = v.bring_in + plane;
		v.page = (const struct plan_page *)((const char *)area + at);
	}
	*ret = v;
	return 1;
}

uint32_t plan_taken(const struct plan_view *v)
{
	return atomic_load_explicit(&v->hdr->taken, memory_order_acquire);
}

uint32_t plan_staged(const struct plan_view *v)
{
	return atomic_load_explicit(&v->hdr->staged, memory_order_acquire);
}

bool plan_still(const struct plan_view *v)
{
	uint32_t state;

	fence(memory_order_acquire); /* what was read from the tables was read before this */
	state = atomic_load_explicit(&v->hdr->state, memory_order_acquire);
	if (atomic_load_explicit(&v->hdr->id, memory_order_acquire) != v->id)
		return false;
	return (state == PLAN_CANCELLED) == (v->state == PLAN_CANCELLED);
}
