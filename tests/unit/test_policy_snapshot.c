/* SPDX-License-Identifier: MIT */
/* Snapshots replay byte for byte, in another process too, and nothing damaged is believed. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <cmocka.h>
#include "policy/decide.h"
#include "policy/snapshot.h"
#include "shm/bits.h"
#include "shm/crc.h"
#include "shm/util.h"

enum { LANES = 4, ROWS = 330, STRIDE = 9, PLAN = 6 * LANES * STRIDE * 8 + 4 * LANES * 4 };

static uint64_t seed = 7;

static uint32_t rnd(uint32_t below)
{
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)((seed >> 33) % below);
}

static uint16_t scores[LANES][ROWS + 13];
static uint64_t where[DECIDE_TIERS][LANES][STRIDE], pinned[STRIDE], wanted[STRIDE];
static uint32_t budgets[DECIDE_TIERS][LANES];

static void random_in(struct decide_in *in)
{
	*in = (struct decide_in){.lanes = 1 + rnd(LANES), .watermark = rnd(ROWS + 1), .words = STRIDE};
	in->score_stride = ROWS + 13;
	in->protect_first = rnd(6);
	in->protect_last = rnd(30);
	in->granularity = rnd(3);
	in->block_rows = 1 + rnd(40);
	in->equal_lanes = rnd(2);
	in->write_through = rnd(2);
	in->hysteresis_permille = rnd(1001);
	in->scores = &scores[0][0];
	in->on_device = &where[0][0][0];
	in->on_dram = &where[1][0][0];
	in->on_nvme = &where[2][0][0];
	in->pinned = rnd(2) ? pinned : NULL;
	in->wanted = rnd(2) ? wanted : NULL;
	for (int t = 0; t < DECIDE_TIERS; t++) {
		in->budget[t] = budgets[t];
		for (uint32_t l = 0; l < LANES; l++) {
			budgets[t][l] = rnd(5) ? rnd(in->watermark + 1) : UINT32_MAX;
			for (int w = 0; w < STRIDE; w++)
				where[t][l][w] = (uint64_t)rnd(UINT32_MAX) << 32 | rnd(UINT32_MAX);
		}
	}
	for (int w = 0; w < STRIDE; w++) {
		pinned[w] = UINT64_C(1) << rnd(64);
		wanted[w] = UINT64_C(1) << rnd(64);
	}
	for (int l = 0; l < LANES; l++)
		for (int p = 0; p < ROWS + 13; p++)
			scores[l][p] = (uint16_t)rnd(65536);
}

/* Decide into PLAN bytes, unused ones zero. */
static int decide(const struct decide_in *in, unsigned char *bytes)
{
	size_t map = (size_t)in->lanes * BITS_WORDS(in->watermark);
	uint64_t *m = (uint64_t *)bytes;
	uint32_t *n = (uint32_t *)(m + 6 * map);
	struct decide_out out = {(uint32_t)BITS_WORDS(in->watermark),
				 m,
				 m + map,
				 m + 2 * map,
				 m + 3 * map,
				 m + 4 * map,
				 m + 5 * map,
				 n,
				 n + in->lanes,
				 n + 2 * in->lanes,
				 n + 3 * in->lanes};

	memset(bytes, 0, PLAN);
	return policy_decide(in, &out);
}

static void *write_snapshot(const struct decide_in *in, size_t *ret_bytes)
{
	void *buf;

	*ret_bytes = snapshot_bytes(in);
	assert_int_equal(*ret_bytes % 8, 0);
	buf = malloc(*ret_bytes); /* exact, so that ASan sees a byte too far */
	assert_non_null(buf);
	assert_int_equal(snapshot_write(in, buf, *ret_bytes - 1), -ENOSPC);
	assert_int_equal(snapshot_write(in, buf, *ret_bytes), 0);
	return buf;
}

static void replays_byte_for_byte_in_another_process(void **state)
{
	unsigned char *shared = mmap(NULL, PLAN, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	static unsigned char here[PLAN];

	assert_ptr_not_equal(shared, MAP_FAILED);
	for (int i = 0; i < 60; i++) {
		struct decide_in in;
		size_t bytes, off = 99;
		int status;
		void *buf;
		pid_t pid;

		random_in(&in);
		buf = write_snapshot(&in, &bytes);
		assert_int_equal(decide(&in, here), 0);
		memset(scores, 0, sizeof(scores)); /* all that the snapshot points at is its own */
		memset(where, 0, sizeof(where));
		memset(budgets, 0, sizeof(budgets));
		memset(pinned, 0, sizeof(pinned));
		memset(wanted, 0, sizeof(wanted));
		memset(shared, 0xcc, PLAN);
		pid = fork();
		if (pid == 0) {
			struct snapshot s;

			if (snapshot_read(&s, buf, bytes, &off) < 0)
				_exit(1);
			_exit(decide(&s.in, shared) < 0 ? 2 : 0);
		}
		assert_true(pid > 0);
		assert_int_equal(waitpid(pid, &status, 0), pid);
		assert_int_equal(status, 0);
		assert_memory_equal(shared, here, PLAN);
		free(buf);
	}
	munmap(shared, PLAN);
}

/* What a decision never looks at does not change the file. */
static void garbage_is_not_stored(void **state)
{
	for (int i = 0; i < 60; i++) {
		struct decide_in in;
		void *first, *second;
		size_t bytes, again;

		random_in(&in);
		first = write_snapshot(&in, &bytes);
		for (uint32_t l = 0; l < in.lanes; l++) {
			for (uint32_t p = in.watermark; p < ROWS + 13; p++)
				scores[l][p] ^= 0x5555;
			for (int t = 0; t < DECIDE_TIERS; t++)
				for (uint32_t p = in.watermark; p < STRIDE * 64; p++)
					where[t][l][p / 64] ^= UINT64_C(1) << p % 64;
		}
		for (uint32_t p = in.watermark; p < STRIDE * 64; p++)
			pinned[p / 64] ^= UINT64_C(1) << p % 64;
		second = write_snapshot(&in, &again);
		assert_int_equal(again, bytes);
		assert_memory_equal(first, second, bytes);
		free(first);
		free(second);
	}
}

static void every_length_but_the_right_one_is_refused(void **state)
{
	struct decide_in in;
	size_t bytes, off;
	struct snapshot s;
	void *buf;

	random_in(&in);
	buf = write_snapshot(&in, &bytes);
	for (size_t n = 0; n < bytes; n++) {
		void *cut = malloc(n ? n : 1);

		assert_non_null(cut);
		memcpy(cut, buf, n);
		off = 1u << 30;
		assert_int_equal(snapshot_read(&s, cut, n, &off), -EBADMSG);
		assert_int_equal(off,
				 n < sizeof(struct snapshot_hdr) ? n : offsetof(struct snapshot_hdr, bytes));
		free(cut);
	}
	buf = realloc(buf, bytes + 8);
	assert_non_null(buf);
	assert_int_equal(snapshot_read(&s, buf, bytes + 8, &off), -EBADMSG);
	assert_int_equal(snapshot_read(&s, (char *)buf + 4, bytes, &off), -EINVAL);
	assert_int_equal(snapshot_read(&s, buf, bytes, &off), 0);
	free(buf);
}

static void every_flipped_byte_is_refused(void **state)
{
	struct decide_in in;
	size_t bytes, off;
	struct snapshot s;
	unsigned char *buf;

	random_in(&in);
	buf = write_snapshot(&in, &bytes);
	for (size_t i = 0; i < bytes; i++) {
		const unsigned char flips[] = {0xff, 1, 0x80, (unsigned char)(1u << rnd(8))};

		for (size_t f = 0; f < ARRAY_SIZE(flips); f++) {
			buf[i] ^= flips[f];
			off = bytes + 1;
			assert_int_equal(snapshot_read(&s, buf, bytes, &off), -EBADMSG);
			assert_true(off < bytes);
			buf[i] ^= flips[f];
		}
	}
	assert_int_equal(snapshot_read(&s, buf, bytes, &off), 0);
	free(buf);
}

static void *edited;
static size_t edited_bytes;

/* Change a field, make the checksum right again, and expect the refusal to name it. */
static void refuse(size_t at, uint64_t value, size_t width)
{
	struct snapshot_hdr h;
	struct snapshot s;
	size_t off = 0;
	_cleanup_free_ char *buf = malloc(edited_bytes);

	assert_non_null(buf);
	memcpy(buf, edited, edited_bytes);
	memcpy(buf + at, &value, width);
	memcpy(&h, buf, sizeof(h));
	h.crc = 0;
	memcpy(buf, &h, sizeof(h));
	h.crc = crc32c(0, buf, edited_bytes);
	memcpy(buf, &h, sizeof(h));
	assert_int_equal(snapshot_read(&s, buf, edited_bytes, &off), -EBADMSG);
	assert_int_equal(off, at);
}

#define REFUSE(field, value)                                                                                   \
	refuse(offsetof(struct snapshot_hdr, field), (value), sizeof(((struct snapshot_hdr *)0)->field))

static void impossible_fields_are_named(void **state)
{
	struct snapshot_hdr h;
	struct decide_in in;

	do
		random_in(&in);
	while (in.granularity != DECIDE_BLOCK);
	edited = write_snapshot(&in, &edited_bytes);
	memcpy(&h, edited, sizeof(h));
	REFUSE(magic, 0);
	REFUSE(version, 2);
	REFUSE(bytes, edited_bytes + 8);
	REFUSE(bytes, UINT64_MAX);
	REFUSE(lanes, 0);
	REFUSE(lanes, 1025);
	REFUSE(lanes, UINT32_MAX);
	REFUSE(watermark, 1048577);
	REFUSE(watermark, UINT32_MAX);
	REFUSE(granularity, 3);
	REFUSE(block_rows, 0);
	REFUSE(equal_lanes, 2);
	REFUSE(hysteresis_permille, 1001);
	REFUSE(flags, 8);
	REFUSE(reserved, 1);
	free(edited);
}

static void tables_must_fill_the_file(void **state)
{
	struct snapshot_hdr h;
	struct decide_in in;
	struct snapshot s;
	size_t bytes, off;
	char *buf;

	random_in(&in);
	buf = write_snapshot(&in, &bytes);
	memcpy(&h, buf, sizeof(h));
	h.lanes = 1024;
	h.watermark = 1048576; /* tables of gigabytes in a small file */
	memcpy(buf, &h, sizeof(h));
	assert_int_equal(snapshot_read(&s, buf, bytes, &off), -EBADMSG);
	assert_int_equal(off, offsetof(struct snapshot_hdr, bytes));
	free(buf);
}

static void impossible_inputs_are_not_written(void **state)
{
	struct decide_in in;
	uint64_t buf[64];

	random_in(&in);
	in.lanes = 0;
	assert_int_equal(snapshot_bytes(&in), 0);
	assert_int_equal(snapshot_write(&in, buf, sizeof(buf)), -EINVAL);
	random_in(&in);
	in.scores = NULL;
	assert_int_equal(snapshot_write(&in, buf, sizeof(buf)), -EINVAL);
	random_in(&in);
	assert_int_equal(snapshot_write(&in, (char *)buf + 1, sizeof(buf) - 1), -EINVAL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(replays_byte_for_byte_in_another_process),
		cmocka_unit_test(garbage_is_not_stored),
		cmocka_unit_test(every_length_but_the_right_one_is_refused),
		cmocka_unit_test(every_flipped_byte_is_refused),
		cmocka_unit_test(impossible_fields_are_named),
		cmocka_unit_test(tables_must_fill_the_file),
		cmocka_unit_test(impossible_inputs_are_not_written),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
