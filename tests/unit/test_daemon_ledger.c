/* SPDX-License-Identifier: MIT */
/* The ledger: what it says after a restart is what was said before, or nothing. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <errno.h>
#include <cmocka.h>
#include "daemon/ledger.h"

static char dir[] = "/tmp/kvt-ledger-XXXXXX", path[64];

static struct ledger *open_it(void)
{
	struct ledger *l;

	assert_int_equal(ledger_open(&l, dir), 0);
	return l;
}

static struct ledger_entry entry(uint64_t tenant, uint32_t key, uint32_t n)
{
	struct ledger_entry e = {.n = n, .tenant = tenant, .floor = key * 10, .epoch = n};

	memcpy(e.key, &key, sizeof(key));
	for (uint32_t i = 0; i < n; i++)
		e.mark[i] = (struct epoch_mark){.epoch = i + 1, .start = i * 3};
	return e;
}

static const struct ledger_entry *look(struct ledger *l, uint64_t tenant, uint32_t key, uint32_t *place)
{
	uint8_t k[16] = {0};

	memcpy(k, &key, sizeof(key));
	return ledger_find(l, tenant, k, place);
}

static void fresh(void **state)
{
	(void)state;
	unlink(path);
}

static void says_after_a_restart_what_was_put(void **state)
{
	struct ledger *l;
	uint32_t place[3000], at;

	fresh(state);
	l = open_it();
	assert_false(ledger_complete(l));
	assert_int_equal(ledger_settle(l), 0);
	assert_true(ledger_complete(l));
	for (uint32_t i = 0; i < 3000; i++) { /* more than the first places */
		struct ledger_entry e = entry(i % 2, i, i % (LEDGER_MARKS + 1));

		place[i] = ledger_new(l);
		assert_int_not_equal(place[i], LEDGER_NONE);
		assert_int_equal(ledger_put(l, place[i], &e), 0);
	}
	for (uint32_t i = 0; i < 3000; i += 3)
		assert_int_equal(ledger_end(l, place[i]), 0);
	ledger_close(l);
	l = open_it();
	assert_true(ledger_complete(l));
	for (uint32_t i = 0; i < 3000; i++) {
		const struct ledger_entry *e = look(l, i % 2, i, &at);
		struct ledger_entry want = entry(i % 2, i, i % (LEDGER_MARKS + 1));

		assert_null(look(l, 1 - i % 2, i, &at));
		if (i % 3 == 0) {
			assert_null(e);
			continue;
		}
		assert_non_null(e);
		assert_int_equal(at, place[i]);
		assert_memory_equal((const char *)e + 4, (char *)&want + 4, sizeof(want) - 4);
		if (i % 3 == 1)
			ledger_take(l, at);
	}
	assert_int_equal(ledger_settle(l), 0);
	ledger_close(l);
	l = open_it(); /* what nobody took has ended */
	for (uint32_t i = 0; i < 3000; i++)
		assert_int_equal(look(l, i % 2, i, &at) != NULL, i % 3 == 1);
	ledger_close(l);
}

static void gives_a_place_again_as_late_as_possible(void **state)
{
	struct ledger *l;
	uint32_t first, n = 0;

	fresh(state);
	l = open_it();
	assert_int_equal(ledger_settle(l), 0);
	first = ledger_new(l);
	assert_int_equal(ledger_end(l, first), 0);
	while (ledger_new(l) != first)
		assert_true(++n < 5000);
	assert_true(n > 500);
	ledger_close(l);
}

static void every_flipped_bit_is_seen(void **state)
{
	struct ledger_entry e = entry(7, 1, 5), was, got;
	struct ledger *l;
	uint32_t place, at;
	char all[1024];
	int fd;

	fresh(state);
	l = open_it();
	assert_int_equal(ledger_settle(l), 0);
	place = ledger_new(l);
	assert_int_equal(ledger_put(l, place, &e), 0);
	ledger_close(l);
	fd = open(path, O_RDWR);
	assert_int_equal(pread(fd, all, sizeof(all), 0), sizeof(all));
	for (uint32_t bit = 0; bit < 8 * sizeof(all); bit++) { /* the head and the entry */
		all[bit / 8] ^= (char)(1 << bit % 8);
		assert_int_equal(pwrite(fd, all, sizeof(all), 0), sizeof(all));
		l = open_it();
		assert_int_equal(ledger_complete(l), bit >= 8 * 512);
		assert_null(look(l, 7, 1, &at));
		ledger_close(l);
		all[bit / 8] ^= (char)(1 << bit % 8);
	}
	assert_int_equal(pwrite(fd, all, sizeof(all), 0), sizeof(all));
	/* An intact entry at another place is none. */
	assert_int_equal(pread(fd, &was, sizeof(was), 512), sizeof(was));
	assert_int_equal(pwrite(fd, &was, sizeof(was), 1024), sizeof(was));
	memset(&got, 0, sizeof(got));
	assert_int_equal(pwrite(fd, &got, sizeof(got), 512), sizeof(got));
	l = open_it();
	assert_null(look(l, 7, 1, &at));
	ledger_close(l);
	close(fd);
}

static void another_boot_is_not_complete(void **state)
{
	struct ledger *l;
	char head[512] = {0};
	int fd;

	fresh(state);
	l = open_it();
	assert_int_equal(ledger_settle(l), 0);
	ledger_close(l);
	fd = open(path, O_RDWR);
	assert_int_equal(pread(fd, head, sizeof(head), 0), sizeof(head));
	head[16 + 3] ^= 1; /* of the boot id: the checksum is wrong, too */
	assert_int_equal(pwrite(fd, head, sizeof(head), 0), sizeof(head));
	close(fd);
	l = open_it();
	assert_false(ledger_complete(l));
	ledger_close(l);
}

static void what_is_no_file_is_refused(void **state)
{
	struct ledger *l;

	fresh(state);
	assert_int_equal(symlink("/dev/null", path), 0);
	assert_int_equal(ledger_open(&l, dir), -ELOOP);
	unlink(path);
	assert_int_equal(ledger_open(&l, "/nonexistent"), -ENOENT);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(says_after_a_restart_what_was_put),
		cmocka_unit_test(gives_a_place_again_as_late_as_possible),
		cmocka_unit_test(every_flipped_bit_is_seen),
		cmocka_unit_test(another_boot_is_not_complete),
		cmocka_unit_test(what_is_no_file_is_refused),
	};
	int r;

	if (!mkdtemp(dir))
		return 1;
	snprintf(path, sizeof(path), "%s/%s", dir, LEDGER_NAME);
	r = cmocka_run_group_tests(tests, NULL, NULL);
	unlink(path);
	rmdir(dir);
	return r;
}
