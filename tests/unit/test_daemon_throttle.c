/* SPDX-License-Identifier: MIT */
/* The window of writes to NVMe: what makes it smaller, what larger, and what is never held back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>
#include <cmocka.h>
#include "daemon/internal.h"
#include "shm/util.h"

#define MS UINT64_C(1000000)
#define EPOCH_US 60000 /* one may pass */

static int setup(void **state)
{
	struct core *c = calloc(1, sizeof(*c));

	c->cfg.nvme_throttle = true;
	c->cfg.nvme_throttle_ms = 10;
	c->cfg.nvme_staging = UINT64_C(32) << 20;
	throttle_init(c);
	*state = c;
	return 0;
}

static int teardown(void **state)
{
	free(*state);
	return 0;
}

static void a_slow_read_halves_it_once_an_epoch(void **state)
{
	struct core *c = *state;
	uint64_t w = c->throttle.window;

	throttle_saw_read(c, 11 * MS);
	assert_int_equal(c->throttle.window, w / 2);
	throttle_saw_read(c, 11 * MS);
	assert_int_equal(c->throttle.window, w / 2);
	usleep(EPOCH_US);
	throttle_saw_read(c, 9 * MS); /* but the second one of the last epoch counts */
	assert_int_equal(c->throttle.window, w / 4);
	assert_int_equal(c->stat.throttle_cuts, 2);
	assert_int_equal(c->stat.throttle_disk_cuts, 0);
}

static void it_grows_while_all_is_fast_up_to_the_staging(void **state)
{
	struct core *c = *state;
	uint64_t w = c->throttle.window;

	throttle_saw_write(c, 19 * MS); /* a write may take twice as long */
	assert_true(c->throttle.window > w);
	for (int i = 0; i < 100; i++) {
		c->throttle.epoch_ns = 0;
		throttle_saw_read(c, 1);
	}
	assert_int_equal(c->throttle.window, c->cfg.nvme_staging);
	c->throttle.epoch_ns = 0;
	throttle_saw_write(c, 21 * MS);
	assert_int_equal(c->throttle.window, c->cfg.nvme_staging / 2);
}

static void one_page_may_always_go(void **state)
{
	struct core *c = *state;

	for (int i = 0; i < 100; i++) {
		c->throttle.epoch_ns = 0;
		throttle_saw_read(c, 1000 * MS);
	}
	assert_true(c->throttle.window > 0);
	assert_true(throttle_may(c, 1u << 20, true));
	throttle_begin(c, 1u << 20, true);
	assert_false(throttle_may(c, 1, true));
	assert_true(throttle_may(c, 1u << 20, false)); /* those that clients wait for have their own */
	throttle_end(c, 1u << 20, true);
	assert_true(throttle_may(c, 1u << 20, true));
	assert_int_equal(c->stat.throttle_waits, 1);
	c->cfg.nvme_throttle = false;
	throttle_begin(c, 1u << 20, true);
	assert_true(throttle_may(c, 1u << 20, true));
}

static void the_cleaner_takes_its_turn(void **state)
{
	struct core *c = *state;
	struct tier_pace p = throttle_pace(c);
	uint64_t *bg = &c->throttle.inflight[0], window = c->throttle.window; /* 4 MiB */
	const uint32_t mib = 1u << 20, least = 256u << 10;

	assert_int_equal(p.take(p.arg, mib, false), mib);
	assert_int_equal(*bg, mib); /* others wait for it as for each other */
	assert_false(throttle_may(c, (uint32_t)window, true));
	p.ended(p.arg, mib, 1);
	assert_int_equal(*bg, 0);
	assert_int_equal(c->stat.throttle_cleaner_bytes, mib);
	window = c->throttle.window;
	throttle_begin(c, (uint32_t)window - mib / 2, true);
	assert_int_equal(p.take(p.arg, mib, false), mib / 2); /* what the others leave */
	assert_int_equal(p.take(p.arg, mib, false), 0);
	assert_int_equal(p.take(p.arg, mib, true), least); /* places run out */
	assert_int_equal(*bg, window + least);
	p.ended(p.arg, least, 0); /* it found nothing to do */
	p.ended(p.arg, mib / 2, 1000 * MS);
	assert_int_equal(c->stat.throttle_cleaner_bytes, mib + mib / 2);
	c->throttle.epoch_ns = 0;
	throttle_saw_read(c, 1);
	assert_true(c->throttle.window < window); /* its slow writes count */
	c->cfg.nvme_throttle = false;
	assert_int_equal(p.take(p.arg, mib, false), mib);
}

static void without_probes_a_tick_changes_nothing(void **state)
{
	struct core *c = *state;
	struct throttle before = c->throttle;
	struct core_stat st = {0};

	throttle_tick(c);
	assert_memory_equal(&before, &c->throttle, sizeof(before));
	c->pages.tier[KVT_TIER_NVME] = (void *)c; /* there is one */
	throttle_tick(c);
	assert_memory_equal(&before, &c->throttle, sizeof(before));
	throttle_stat(c, &st);
	assert_true(st.throttle_on);
	assert_false(st.throttle_disk);
	assert_string_equal(st.throttle_by, "the tier's own I/O alone (not asked yet)");
}

static void the_disk_is_seen_by_means_and_by_its_queue(void **state)
{
	const struct probes_disk a = {
		.reads = 100, .read_ns = 50 * MS, .writes = 10, .write_ns = 90 * MS, .inflight = 6};
	struct probes_disk b = a;
	struct throttle_sight s;

	b.inflight = 0;
	throttle_see(&a, &b, 50 * MS, &s); /* idle */
	assert_true(!s.read_ns && !s.write_ns && !s.wait_ns);
	b.inflight = 9;
	throttle_see(&a, &b, 50 * MS, &s); /* six of them have not moved */
	assert_true(!s.read_ns && !s.write_ns);
	assert_int_equal(s.wait_ns, 300 * MS);
	b.reads += 4;
	b.read_ns += 8 * MS;
	b.writes += 2;
	b.write_ns += 60 * MS;
	throttle_see(&a, &b, 50 * MS, &s); /* six ended in 50 ms, six are before whoever comes now */
	assert_int_equal(s.read_ns, 2 * MS);
	assert_int_equal(s.write_ns, 30 * MS);
	assert_int_equal(s.wait_ns, 50 * MS);
	b.inflight = 0;
	throttle_see(&a, &b, 50 * MS, &s);
	assert_int_equal(s.wait_ns, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(a_slow_read_halves_it_once_an_epoch, setup, teardown),
		cmocka_unit_test_setup_teardown(it_grows_while_all_is_fast_up_to_the_staging, setup, teardown),
		cmocka_unit_test_setup_teardown(one_page_may_always_go, setup, teardown),
		cmocka_unit_test_setup_teardown(the_cleaner_takes_its_turn, setup, teardown),
		cmocka_unit_test_setup_teardown(without_probes_a_tick_changes_nothing, setup, teardown),
		cmocka_unit_test_setup_teardown(the_disk_is_seen_by_means_and_by_its_queue, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
