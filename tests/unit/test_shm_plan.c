/* SPDX-License-Identifier: MIT */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>
#include "shm/bits.h"
#include "shm/plan.h"
#include "shm/util.h"

#define LANES 3u
#define ROWS 200u

static void *new_area(size_t bytes, int fill)
{
	void *p = aligned_alloc(64, ALIGN_UP(bytes, 64));

	assert_non_null(p);
	memset(p, fill, bytes);
	return p;
}

/* A plan whose tables can be told apart lane by lane and plane by plane. */
static void write_plan(void *area, size_t bytes, uint64_t id, uint32_t rows, enum plan_state state)
{
	struct plan_tables t;

	assert_int_equal(plan_begin(area, bytes, LANES, rows, &t), 0);
	for (uint32_t l = 0; l < LANES; l++) {
		t.lane[l] = (struct plan_lane){.kept = l + 1, .out = l + 2, .in = l + 3, .drop = l + 4};
		bits_set(t.resident + l * t.words, l);
		bits_set(t.copy_out + l * t.words, l + 10);
		bits_set(t.bring_in + l * t.words, rows - 1 - l);
	}
	t.hdr->epoch = 5;
	t.hdr->flags = PLAN_F_EQUAL_LANES;
	t.hdr->rows_out = 9;
	t.hdr->rows_in = 12;
	t.hdr->rows_drop = 15;
	t.hdr->policy = 2;
	t.hdr->decided_ns = 77;
	plan_publish(&t, id, state);
}

static void sizes(void **state)
{
	assert_int_equal(plan_bytes(1, 0), 192);
	assert_int_equal(plan_bytes(1, 1), 192);
	assert_int_equal(plan_bytes(4, 64), 128 + 64 + ALIGN_UP(96, 64));
	assert_int_equal(plan_bytes(112, 10000) % 64, 0);
	assert_true(plan_bytes(112, 10000) >= 128 + 112 * 16 + 3 * 112 * 157 * 8);
	/* The largest arguments do not overflow. */
	assert_true(plan_bytes(UINT32_MAX, UINT32_MAX) > UINT64_C(3) * UINT32_MAX * (UINT32_MAX / 64) * 8);
}

static void begin_refuses(void **state)
{
	size_t bytes = plan_bytes(LANES, ROWS);
	void *area = new_area(bytes, 0);
	struct plan_tables t;
	struct plan_view v;

	write_plan(area, bytes, 7, ROWS, PLAN_DECIDED);
	assert_int_equal(plan_begin(NULL, bytes, LANES, ROWS, &t), -EINVAL);
	assert_int_equal(plan_begin((char *)area + 4, bytes, LANES, ROWS, &t), -EINVAL);
	assert_int_equal(plan_begin(area, bytes, 0, ROWS, &t), -EINVAL);
	assert_int_equal(plan_begin(area, bytes, LANES, ROWS + 64, &t), -ENOSPC);
	assert_int_equal(plan_begin(area, bytes, LANES + 1, ROWS, &t), -ENOSPC);
	assert_int_equal(plan_begin(area, bytes, UINT32_MAX, UINT32_MAX, &t), -ENOSPC);
	assert_int_equal(plan_begin(area, 64, 1, 0, &t), -ENOSPC);
	/* A refused plan hides nothing. */
	assert_int_equal(plan_peek(area, bytes, LANES, &v), 1);
	assert_int_equal(v.id, 7);
	free(area);
}

static void round_trip(void **state)
{
	size_t bytes = plan_bytes(LANES, ROWS);
	void *area = new_area(bytes, 0);
	struct plan_view v = {0};

	assert_int_equal(plan_peek(area, bytes, LANES, &v), 0);
	write_plan(area, bytes, 1, ROWS, PLAN_DECIDED);
	assert_int_equal(plan_peek(area, bytes, LANES, &v), 1);
	assert_int_equal(v.id, 1);
	assert_int_equal(v.state, PLAN_DECIDED);
	assert_int_equal(v.epoch, 5);
	assert_int_equal(v.watermark, ROWS);
	assert_int_equal(v.lanes, LANES);
	assert_int_equal(v.words, 4);
	assert_int_equal(v.flags, PLAN_F_EQUAL_LANES);
	assert_int_equal(v.policy, 2);
	assert_int_equal(v.decided_ns, 77);
	assert_int_equal(v.rows_out, 9);
	assert_int_equal(v.rows_in, 12);
	assert_int_equal(v.rows_drop, 15);
	for (uint32_t l = 0; l < LANES; l++) {
		assert_int_equal(v.lane[l].kept, l + 1);
		assert_int_equal(v.lane[l].drop, l + 4);
		for (uint32_t p = 0; p < ROWS; p++) {
			assert_int_equal(bits_test(v.resident + l * v.words, p), p == l);
			assert_int_equal(bits_test(v.copy_out + l * v.words, p), p == l + 10);
			assert_int_equal(bits_test(v.bring_in + l * v.words, p), p == ROWS - 1 - l);
		}
	}
	assert_true((const uint8_t *)(v.bring_in + LANES * v.words) <= (const uint8_t *)area + bytes);
	assert_true(plan_still(&v));
	free(area);
}

static void begin_clears_the_tables(void **state)
{
	size_t bytes = plan_bytes(LANES, ROWS);
	uint8_t *area = new_area(bytes + 64, 0xff);
	struct plan_tables t;

	memset(area, 0, sizeof(struct plan_hdr));
	assert_int_equal(plan_begin(area, bytes, LANES, ROWS, &t), 0);
	assert_int_equal(t.words, 4);
	for (uint32_t i = 0; i < LANES * t.words; i++)
		assert_int_equal(t.resident[i] | t.copy_out[i] | t.bring_in[i], 0);
	for (uint32_t l = 0; l < LANES; l++)
		assert_int_equal(t.lane[l].kept | t.lane[l].out | t.lane[l].in | t.lane[l].drop, 0);
	for (size_t i = bytes; i < bytes + 64; i++)
		assert_int_equal(area[i], 0xff); /* and nothing past the area */
	free(area);
}

static void states_advance(void **state)
{
	size_t bytes = plan_bytes(LANES, ROWS);
	void *area = new_area(bytes, 0);
	struct plan_view v, w;
	struct plan_tables t;

	write_plan(area, bytes, 1, ROWS, PLAN_DECIDED);
	assert_int_equal(plan_peek(area, bytes, LANES, &v), 1);
	plan_set_state(area, PLAN_READY);
	assert_true(plan_still(&v)); /* the same plan, further on */
	assert_int_equal(plan_peek(area, bytes, LANES, &w), 1);
	assert_int_equal(w.state, PLAN_READY);
	plan_set_state(area, PLAN_CANCELLED);
	assert_false(plan_still(&w)); /* what it says no longer holds */
	assert_int_equal(plan_peek(area, bytes, LANES, &w), 1);
	assert_int_equal(w.state, PLAN_CANCELLED);
	assert_true(plan_still(&w));

	/* Hidden as soon as the next one is begun, smaller this time. */
	assert_int_equal(plan_begin(area, bytes, LANES, 64, &t), 0);
	assert_false(plan_still(&w));
	assert_int_equal(plan_peek(area, bytes, LANES, &w), 0);
	plan_publish(&t, 2, PLAN_READY);
	assert_false(plan_still(&v));
	assert_int_equal(plan_peek(area, bytes, LANES, &w), 1);
	assert_int_equal(w.id, 2);
	assert_int_equal(w.state, PLAN_READY);
	assert_int_equal(w.words, 1);
	free(area);
}

static void empty_watermark(void **state)
{
	size_t bytes = plan_bytes(LANES, 0);
	void *area = new_area(bytes, 0);
	struct plan_tables t;
	struct plan_view v;

	assert_int_equal(plan_begin(area, bytes, LANES, 0, &t), 0);
	plan_publish(&t, 1, PLAN_READY);
	assert_int_equal(plan_peek(area, bytes, LANES, &v), 1);
	assert_int_equal(v.words, 0);
	free(area);
}

/* What does not fit is refused, whoever wrote it; the caller's view stays as it was. */
static void peek_refuses(void **state)
{
	static _Alignas(64) uint8_t area[1024];
	size_t bytes = plan_bytes(LANES, ROWS);
	struct plan_hdr *h = (struct plan_hdr *)area, good;
	struct plan_view v = {.id = 123};

	write_plan(h, bytes, 1, ROWS, PLAN_DECIDED);
	memcpy(&good, h, sizeof(good));
	assert_int_equal(plan_peek(h, bytes, LANES - 1, &v), -EPROTO);
	assert_int_equal(plan_peek(h, 128 + 48 + 3 * LANES * 4 * 8 - 1, LANES, &v), -EPROTO);
	assert_int_equal(plan_peek(h, sizeof(*h) - 1, LANES, &v), -EPROTO);
	assert_int_equal(plan_peek(NULL, bytes, LANES, &v), -EPROTO);
	assert_int_equal(plan_peek((char *)h + 1, bytes - 1, LANES, &v), -EPROTO);
#define REFUSED(field, value)                                                                                  \
	do {                                                                                                   \
		h->field = (value);                                                                            \
		assert_int_equal(plan_peek(h, bytes, UINT32_MAX, &v), -EPROTO);                                \
		memcpy((void *)h, &good, sizeof(good));                                                        \
	} while (0)
	REFUSED(lanes, 0);
	REFUSED(lanes, LANES + 1);
	REFUSED(lanes, UINT32_MAX);
	REFUSED(words, 0);
	REFUSED(words, 3);
	REFUSED(words, 5);
	REFUSED(words, UINT32_MAX);
	REFUSED(watermark, 0);
	REFUSED(watermark, 192);
	REFUSED(watermark, UINT32_MAX);
	REFUSED(state, PLAN_EMPTY);
	REFUSED(state, PLAN_CANCELLED + 1);
	REFUSED(state, UINT32_MAX);
	/* Consistent with itself and far too large. */
	h->lanes = UINT32_MAX;
	h->watermark = UINT32_MAX;
	h->words = UINT32_C(1) << 26;
	assert_int_equal(plan_peek(h, bytes, UINT32_MAX, &v), -EPROTO);
	assert_int_equal(v.id, 123);
}

struct race {
	void *area;
	size_t bytes;
	_Atomic bool stop;
};

/* Plan `id` has watermark 64 * (id % 4 + 1) and says so in every header field. */
static void *rewriter(void *arg)
{
	struct race *r = arg;

	for (uint64_t id = 1; !r->stop; id++) {
		struct plan_tables t;
		uint32_t tag = (uint32_t)(id % 4 + 1);

		if (plan_begin(r->area, r->bytes, LANES, 64 * tag, &t) < 0)
			abort();
		__atomic_store_n(&t.hdr->epoch, tag, __ATOMIC_RELEASE);
		__atomic_store_n(&t.hdr->flags, tag, __ATOMIC_RELEASE);
		__atomic_store_n(&t.hdr->policy, tag, __ATOMIC_RELEASE);
		__atomic_store_n(&t.hdr->decided_ns, (uint64_t)tag, __ATOMIC_RELEASE);
		__atomic_store_n(&t.hdr->rows_out, (uint64_t)tag, __ATOMIC_RELEASE);
		plan_publish(&t, id, PLAN_DECIDED);
		plan_set_state(r->area, PLAN_READY);
	}
	return NULL;
}

/* A header is never a mix of two plans, however often the daemon rewrites it. */
static void header_is_never_torn(void **state)
{
	struct race r = {.bytes = plan_bytes(LANES, 256)};
	uint64_t seen = 0, last = 0;
	pthread_t t;

	r.area = new_area(r.bytes, 0);
	assert_int_equal(pthread_create(&t, NULL, rewriter, &r), 0);
	for (uint64_t t0 = now_ns(); seen < 200000 && now_ns() - t0 < 3000000000u;) {
		struct plan_view v;
		int k = plan_peek(r.area, r.bytes, LANES, &v);
		uint32_t tag;

		assert_true(k >= 0);
		if (!k)
			continue;
		tag = (uint32_t)(v.id % 4 + 1);
		assert_int_equal(v.watermark, 64 * tag);
		assert_int_equal(v.words, tag);
		assert_int_equal(v.epoch, tag);
		assert_int_equal(v.flags, tag);
		assert_int_equal(v.policy, tag);
		assert_int_equal(v.decided_ns, tag);
		assert_int_equal(v.rows_out, tag);
		assert_true(v.id >= last);
		last = v.id;
		seen++;
	}
	r.stop = true;
	assert_int_equal(pthread_join(t, NULL), 0);
	assert_true(seen > 0);
	free(r.area);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(sizes),          cmocka_unit_test(begin_refuses),
		cmocka_unit_test(round_trip),     cmocka_unit_test(begin_clears_the_tables),
		cmocka_unit_test(states_advance), cmocka_unit_test(empty_watermark),
		cmocka_unit_test(peek_refuses),   cmocka_unit_test(header_is_never_torn),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
