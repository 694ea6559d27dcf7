/* SPDX-License-Identifier: MIT */
/* Gather and scatter against a reference, with layouts that lie and memory that is not there. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/mman.h>

#include "shm/crc.h"
#include "shm/seg.h"
#include "shm/util.h"
#include "tiers/device.h"
#include "tiers/tier.h"

#define REGION ((size_t)1 << 20)

static uint64_t rng = 88172645463325252u;

static uint64_t next_random(void)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng;
}

static uint32_t below(uint32_t n)
{
	return (uint32_t)((next_random() >> 20) % n);
}

struct fixture {
	const struct device_ops *ops;
	struct seg seg; /* the client's view */
	struct device_mem *mem;
	uint8_t *page, *copy;
};

static int setup(void **state, const struct device_ops *ops)
{
	struct fixture *f = calloc(1, sizeof(*f));

	assert_int_equal(seg_create(&f->seg, SEG_EXCHANGE, "test-region", REGION, 0), 0);
	for (size_t i = 0; i < REGION; i += 8)
		memcpy((char *)f->seg.addr + i, &(uint64_t){next_random()}, 8);
	f->ops = ops;
	assert_int_equal(f->ops->attach(&f->mem, f->seg.fd, REGION), 0);
	f->page = malloc(TIER_MAX_PAGE);
	f->copy = malloc(TIER_MAX_PAGE);
	*state = f;
	return 0;
}

static int setup_host(void **state)
{
	return setup(state, &device_host_ops);
}

static int setup_fd(void **state)
{
	return setup(state, &device_fd_ops);
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	f->ops->detach(f->mem);
	seg_close(&f->seg);
	free(f->page);
	free(f->copy);
	free(f);
	return 0;
}

/* A layout of `slots` slots that fits: planes packed, interleaved with others, or K beside V. */
static struct device_lane some_lane(uint32_t slots)
{
	static const uint32_t widths[] = {1, 2, 60, 64, 128, 256, 300, 512};
	struct device_lane l = {.k_bytes = widths[below(8)], .v_bytes = below(5) ? widths[below(8)] : 0};
	uint64_t span;

	l.k_stride = l.k_bytes + (below(2) ? 0 : below(200));
	l.v_stride = l.v_bytes + (below(2) ? 0 : below(200));
	span = (uint64_t)slots * (l.k_stride + l.v_stride);
	assert_true(span < REGION);
	l.k_off = below((uint32_t)(REGION - span));
	l.v_off = l.k_off + (uint64_t)slots * l.k_stride;
	return l;
}

/* n of `slots`, ascending, with runs of all lengths. */
static void some_slots(uint32_t *s, uint32_t n, uint32_t slots)
{
	uint32_t got = 0, run = 0;

	for (uint32_t i = 0; got < n; i++) {
		bool must = slots - i <= n - got;

		if (!run && !must && below(2))
			continue;
		run = run ? run - 1 : below(30);
		s[got++] = i;
	}
}

static void reference_gather(const struct fixture *f, const struct device_lane *l, const uint32_t *s,
			     uint32_t n, uint8_t *page)
{
	const uint8_t *m = f->seg.addr;

	for (uint32_t i = 0; i < n; i++) {
		memcpy(page + (size_t)i * l->k_bytes, m + l->k_off + (uint64_t)s[i] * l->k_stride, l->k_bytes);
		memcpy(page + (size_t)n * l->k_bytes + (size_t)i * l->v_bytes,
		       m + l->v_off + (uint64_t)s[i] * l->v_stride, l->v_bytes);
	}
}

static void test_gather(void **state)
{
	struct fixture *f = *state;
	uint32_t slots[128];

	for (unsigned round = 0; round < 3000; round++) {
		uint32_t n = 1 + below(128), of = n + below(300), crc = (uint32_t)next_random(), seed = crc;
		struct device_lane l = some_lane(of);
		size_t bytes = (size_t)n * (l.k_bytes + l.v_bytes);

		some_slots(slots, n, of);
		memset(f->page, 0xa5, bytes + 64);
		assert_int_equal(f->ops->gather(f->mem, &l, slots, n, f->page, &crc), 0);
		reference_gather(f, &l, slots, n, f->copy);
		assert_memory_equal(f->page, f->copy, bytes);
		assert_int_equal(crc, crc32c(seed, f->copy, bytes));
		for (unsigned i = 0; i < 64; i++)
			assert_int_equal(f->page[bytes + i], 0xa5); /* nothing behind the page */
	}
}

static void test_gather_nothing(void **state)
{
	struct fixture *f = *state;
	struct device_lane l = {.k_off = UINT64_MAX, .k_bytes = 8};
	uint32_t crc = 7;

	assert_int_equal(f->ops->gather(f->mem, &l, NULL, 0, NULL, &crc), 0);
	assert_int_equal(f->ops->scatter(f->mem, &l, NULL, 0, NULL, 0, 0), 0);
	assert_int_equal(crc, 7);
}

static void test_scatter(void **state)
{
	struct fixture *f = *state;
	uint8_t *want = malloc(REGION);
	uint32_t pick[128];

	for (unsigned round = 0; round < 300; round++) {
		uint32_t rows = 1 + below(128), n = 1 + below(rows), first = below(200);
		struct device_lane l = some_lane(first + n);
		bool picked = below(2);

		for (size_t i = 0; i < (size_t)rows * (l.k_bytes + l.v_bytes); i++)
			f->page[i] = (uint8_t)next_random();
		some_slots(pick, n, rows);
		if (below(4) == 0) /* any order is fine, repeats too */
			for (uint32_t i = 0; i < n; i++)
				pick[i] = below(rows);
		memcpy(want, f->seg.addr, REGION);
		for (uint32_t i = 0; i < n; i++) {
			uint32_t r = picked ? pick[i] : i;

			memcpy(want + l.k_off + (uint64_t)(first + i) * l.k_stride,
			       f->page + (size_t)r * l.k_bytes, l.k_bytes);
			memcpy(want + l.v_off + (uint64_t)(first + i) * l.v_stride,
			       f->page + (size_t)rows * l.k_bytes + (size_t)r * l.v_bytes, l.v_bytes);
		}
		assert_int_equal(f->ops->scatter(f->mem, &l, f->page, rows, picked ? pick : NULL, first, n), 0);
		assert_memory_equal(f->seg.addr, want, REGION); /* the rows, and nothing but the rows */
	}
	free(want);
}

/* What scatter put there, gather finds, checksum and all. */
static void test_there_and_back(void **state)
{
	struct fixture *f = *state;
	struct device_lane l = {0, REGION / 2, 128, 128, 128, 128};
	uint32_t slots[128], out = 0, in = 0;

	for (uint32_t i = 0; i < 128; i++)
		slots[i] = i * 3;
	assert_int_equal(f->ops->gather(f->mem, &l, slots, 128, f->page, &out), 0);
	assert_int_equal(f->ops->scatter(f->mem, &l, f->page, 128, NULL, 1000, 128), 0);
	for (uint32_t i = 0; i < 128; i++)
		slots[i] = 1000 + i;
	assert_int_equal(f->ops->gather(f->mem, &l, slots, 128, f->copy, &in), 0);
	assert_int_equal(in, out);
	assert_memory_equal(f->page, f->copy, 128 * 256);
}

static void test_hostile_layouts(void **state)
{
	struct fixture *f = *state;
	static const struct device_lane bad[] = {
		{.k_off = REGION, .k_stride = 8, .k_bytes = 8},
		{.k_off = REGION - 7, .k_stride = 8, .k_bytes = 8},
		{.k_off = UINT64_MAX, .k_stride = 8, .k_bytes = 8},
		{.k_off = UINT64_MAX - 6, .k_stride = 8, .k_bytes = 8}, /* off + bytes wraps to 1 */
		{.k_off = 0, .k_stride = 0, .k_bytes = 8},
		{.k_off = 0, .k_stride = 7, .k_bytes = 8},
		{.k_off = 0, .k_stride = UINT32_MAX, .k_bytes = 8},
		{.k_off = 0, .k_stride = REGION, .k_bytes = 8},
		{.k_off = 0, .k_stride = UINT32_MAX, .k_bytes = UINT32_MAX},
		{.k_off = 0, .k_stride = TIER_MAX_PAGE, .k_bytes = TIER_MAX_PAGE},
		{.k_bytes = 8, .k_stride = 8, .v_off = REGION - 8, .v_stride = 8, .v_bytes = 8},
		{.k_bytes = 8, .k_stride = 8, .v_off = UINT64_MAX, .v_stride = 8, .v_bytes = 8},
		{.k_bytes = 8, .k_stride = 8, .v_off = 0, .v_stride = 0, .v_bytes = 8},
	};
	static const uint32_t slots[2] = {0, 1};

	memset(f->page, 1, 64);
	memcpy(f->copy, f->seg.addr, REGION);
	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		uint32_t crc = 5;

		assert_int_equal(f->ops->gather(f->mem, &bad[i], slots, 2, f->page, &crc), -ERANGE);
		assert_int_equal(crc, 5);
		assert_int_equal(f->ops->scatter(f->mem, &bad[i], f->page, 2, NULL, 0, 2), -ERANGE);
	}
	assert_memory_equal(f->seg.addr, f->copy, REGION);
}

/* Planes that overlap fit the memory together, but a page of their rows would not fit a page. */
static void test_page_too_large(void **state)
{
	struct fixture *f = *state;
	struct device_lane l = {0, 0, 8192, 8192, 5000, 5000};
	uint32_t slots[128], crc = 5;

	for (uint32_t i = 0; i < 128; i++)
		slots[i] = i;
	assert_int_equal(f->ops->gather(f->mem, &l, slots, 104, f->page, &crc), 0);
	crc = 5;
	assert_int_equal(f->ops->gather(f->mem, &l, slots, 105, f->page, &crc), -ERANGE); /* 1 050 000 bytes */
	assert_int_equal(crc, 5);
	assert_int_equal(f->ops->scatter(f->mem, &l, f->page, 105, NULL, 0, 1), -ERANGE);
}

static void test_hostile_slots(void **state)
{
	struct fixture *f = *state;
	struct device_lane l = {.k_off = REGION - 800, .k_stride = 8, .k_bytes = 8};
	uint32_t up[2] = {0, 100}, down[2] = {5, 4}, twice[2] = {5, 5}, far[2] = {0, UINT32_MAX}, crc = 5;
	uint32_t hidden[3] = {1, UINT32_MAX, 2}; /* the last one alone looks innocent */
	uint32_t ok[2] = {0, 99}, pick[2] = {0, 2};

	assert_int_equal(f->ops->gather(f->mem, &l, ok, 2, f->page, &crc), 0);
	crc = 5;
	assert_int_equal(f->ops->gather(f->mem, &l, up, 2, f->page, &crc), -ERANGE);
	assert_int_equal(f->ops->gather(f->mem, &l, far, 2, f->page, &crc), -ERANGE);
	assert_int_equal(f->ops->gather(f->mem, &l, down, 2, f->page, &crc), -EINVAL);
	assert_int_equal(f->ops->gather(f->mem, &l, twice, 2, f->page, &crc), -EINVAL);
	assert_int_equal(f->ops->gather(f->mem, &l, hidden, 3, f->page, &crc), -EINVAL);
	assert_int_equal(crc, 5);

	assert_int_equal(f->ops->scatter(f->mem, &l, f->page, 2, NULL, 98, 2), 0);
	assert_int_equal(f->ops->scatter(f->mem, &l, f->page, 2, NULL, 99, 2), -ERANGE);
	assert_int_equal(f->ops->scatter(f->mem, &l, f->page, 2, NULL, UINT32_MAX, 2), -ERANGE);
	assert_int_equal(f->ops->scatter(f->mem, &l, f->page, 2, NULL, 0, 3), -ERANGE);
	assert_int_equal(f->ops->scatter(f->mem, &l, f->page, 2, pick, 0, 2), -ERANGE);
}

/* Any layout at all is either refused or stays inside; the verdict is checked with 128-bit sums. */
static void test_random_layouts(void **state)
{
	struct fixture *f = *state;
	unsigned good = 0, refused = 0;

	for (unsigned round = 0; round < 200000; round++) {
		unsigned k_shift = below(64), s_shift = below(32), w_shift = 12 + below(20);
		struct device_lane l = {
			.k_off = next_random() >> k_shift,
			.k_stride = (uint32_t)next_random() >> s_shift,
			.k_bytes = (uint32_t)next_random() >> w_shift,
		};
		uint32_t slot = (uint32_t)next_random() >> below(32), crc = 0;
		unsigned __int128 end =
			(unsigned __int128)l.k_off + (unsigned __int128)slot * l.k_stride + l.k_bytes;
		bool fits = !l.k_bytes || (end <= REGION && l.k_stride >= l.k_bytes);

		assert_int_equal(f->ops->gather(f->mem, &l, &slot, 1, f->page, &crc), fits ? 0 : -ERANGE);
		good += fits;
		refused += !fits;
	}
	assert_true(good > 1000 && refused > 1000);
}

/* The client may punch its memory whenever it likes: that reads as zeros and is made again by scatter. */
static void test_punched(void **state)
{
	struct fixture *f = *state;
	struct device_lane l = {.k_off = 0, .k_stride = 128, .k_bytes = 128};
	uint32_t slots[64], crc = 0;
	size_t before = f->ops->resident(f->mem);

	assert_int_equal(before, REGION);
	assert_int_equal(seg_punch(&f->seg, 0, REGION / 2), 0);
	assert_int_equal(f->ops->resident(f->mem), REGION / 2);
	for (uint32_t i = 0; i < 64; i++)
		slots[i] = i;
	memset(f->page, 0xff, 64 * 128);
	assert_int_equal(f->ops->gather(f->mem, &l, slots, 64, f->page, &crc), 0);
	for (unsigned i = 0; i < 64 * 128; i++)
		assert_int_equal(f->page[i], 0);
	assert_int_equal(crc, crc32c(0, f->page, 64 * 128));

	assert_int_equal(seg_punch(&f->seg, 0, REGION / 2), 0);
	memset(f->page, 0x5a, 64 * 128);
	assert_int_equal(f->ops->scatter(f->mem, &l, f->page, 64, NULL, 0, 64), 0);
	assert_int_equal(f->ops->resident(f->mem), REGION / 2 + 64 * 128);
	assert_memory_equal(f->seg.addr, f->page, 64 * 128);
}

/* Far-apart rows get memory for themselves, not for the gaps. */
static void test_sparse_commit(void **state)
{
	struct fixture *f = *state;
	struct device_lane l = {.k_off = 0, .k_stride = 64 << 10, .k_bytes = 128};

	assert_int_equal(seg_punch(&f->seg, 0, REGION), 0);
	memset(f->page, 1, 16 * 128);
	assert_int_equal(f->ops->scatter(f->mem, &l, f->page, 16, NULL, 0, 16), 0);
	assert_int_equal(f->ops->resident(f->mem), 16 * KVT_UNIT);

	/* Near rows: one allocation for the whole extent. That it comes first shows in the gaps. */
	assert_int_equal(seg_punch(&f->seg, 0, REGION), 0);
	l.k_stride = 12 << 10;
	assert_int_equal(f->ops->scatter(f->mem, &l, f->page, 16, NULL, 0, 16), 0);
	assert_int_equal(f->ops->resident(f->mem), 15 * (12 << 10) + KVT_UNIT);
}

/* A file gets memory for what is written and nothing else. */
static void test_fd_sparse(void **state)
{
	struct fixture *f = *state;
	struct device_lane l = {.k_off = 0, .k_stride = 12 << 10, .k_bytes = 128};

	assert_int_equal(seg_punch(&f->seg, 0, REGION), 0);
	memset(f->page, 1, 16 * 128);
	assert_int_equal(f->ops->scatter(f->mem, &l, f->page, 16, NULL, 0, 16), 0);
	assert_int_equal(f->ops->resident(f->mem), 16 * KVT_UNIT);
}

static void test_read(void **state)
{
	struct fixture *f = *state;
	uint8_t b[16];

	assert_int_equal(f->ops->read(f->mem, 100, b, 16), 0);
	assert_memory_equal(b, (char *)f->seg.addr + 100, 16);
	assert_int_equal(f->ops->read(f->mem, REGION - 16, b, 16), 0);
	assert_int_equal(f->ops->read(f->mem, REGION - 15, b, 16), -ERANGE);
	assert_int_equal(f->ops->read(f->mem, UINT64_MAX, b, 16), -ERANGE);
	assert_int_equal(f->ops->read(f->mem, 16, b, SIZE_MAX), -ERANGE);
}

static void test_peek(void **state)
{
	struct fixture *f = *state;

	assert_memory_equal(f->ops->peek(f->mem, 5000, 64), (char *)f->seg.addr + 5000, 64);
	assert_non_null(f->ops->peek(f->mem, 0, REGION));
	assert_null(f->ops->peek(f->mem, 1, REGION));
	assert_null(f->ops->peek(f->mem, REGION + 1, 0));
}

static void test_attach(void **state)
{
	struct fixture *f = *state;
	struct device_mem *m = NULL;
	int fd = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	assert_int_equal(ftruncate(fd, (off_t)REGION), 0);
	assert_int_equal(f->ops->attach(&m, fd, REGION), -EPROTO);
	close(fd);
	fd = open("/dev/zero", O_RDWR | O_CLOEXEC);
	assert_int_equal(f->ops->attach(&m, fd, REGION), -EPROTO);
	close(fd);
	assert_int_equal(f->ops->attach(&m, f->seg.fd, REGION - 4096), -EPROTO);
	assert_int_equal(f->ops->attach(&m, f->seg.fd, REGION + 4096), -EPROTO);
	assert_int_equal(f->ops->attach(&m, f->seg.fd, 0), -EPROTO);
	assert_int_equal(f->ops->attach(&m, -1, REGION), -EBADF);
	assert_null(m);
	/* The fd stays the caller's, and the mapping outlives it. */
	fd = fcntl(f->seg.fd, F_DUPFD_CLOEXEC, 3);
	assert_int_equal(f->ops->attach(&m, fd, REGION), 0);
	assert_int_equal(close(fd), 0);
	assert_memory_equal(f->ops->peek(m, 0, 4096), f->seg.addr, 4096);
	assert_int_equal(f->ops->resident(m), REGION);
	f->ops->detach(m);
	f->ops->detach(NULL);
}

/* ---- a client's own file ------------------------------------------------------------------ */

/* An unsealed memfd of REGION bytes, every row of 128 of it different. */
static int own_file(void)
{
	int fd = memfd_create("own", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	uint64_t v[16];

	assert_true(fd >= 0);
	for (size_t at = 0; at < REGION; at += sizeof(v)) {
		for (unsigned i = 0; i < 16; i++)
			v[i] = next_random();
		assert_int_equal(pwrite(fd, v, sizeof(v), (off_t)at), sizeof(v));
	}
	return fd;
}

static void refused(int fd, uint64_t bytes, int want, const char *line)
{
	struct device_mem *m = NULL;
	char err[128] = "";

	assert_int_equal(device_fd_check(fd, bytes, err, sizeof(err)), want);
	if (!strstr(err, line))
		fail_msg("\"%s\" does not say \"%s\"", err, line);
	assert_int_equal(device_fd_ops.attach(&m, fd, bytes), want);
	assert_null(m);
}

static int reopened(int fd, int flags)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return open(path, flags | O_CLOEXEC);
}

static void test_fd_attach(void **state)
{
	struct device_mem *m = NULL;
	char path[] = "/tmp/kvt-device-XXXXXX", row[128];
	int fd = own_file(), other, p[2], r;

	refused(-1, 4096, -EBADF, "fd: -1");
	refused(fd, REGION + 1, -EFBIG, "bytes: 1048577, the file has 1048576");
	refused(fd, UINT64_MAX, -EFBIG, "bytes:");
	static const struct {
		int flags, want;
	} modes[] = {{O_RDONLY, -EBADF}, {O_WRONLY, -EBADF}, {O_PATH, -EBADF}, {O_RDWR | O_APPEND, -EPERM}};
	for (unsigned i = 0; i < ARRAY_SIZE(modes); i++) {
		other = reopened(fd, modes[i].flags);
		assert_true(other >= 0);
		refused(other, 4096, modes[i].want, "fd: mode");
		close(other);
	}
	assert_int_equal(pipe(p), 0);
	refused(p[0], 4096, -EBADF, "fd: mode"); /* reads only */
	close(p[0]);
	close(p[1]);
	other = open("/dev/zero", O_RDWR | O_CLOEXEC);
	refused(other, 4096, -ENOTSUP, "must be tmpfs or hugetlbfs");
	close(other);
	other = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
	if (other >= 0 && !ftruncate(other, 2 << 20)) {
		char none;

		r = pwrite(other, &none, 0, 0) < 0 ? -errno : 0;
		if (r < 0)
			refused(other, 4096, r, "cannot be written");
	}
	close_fdp(&other);
	other = mkstemp(path);
	assert_int_equal(ftruncate(other, 4096), 0);
	if (fcntl(other, F_GET_SEALS) < 0) /* /tmp may be tmpfs */
		refused(other, 4096, -ENOTSUP, "must be tmpfs or hugetlbfs");
	close(other);
	unlink(path);

	/* The caller's fd is its own before and after. */
	assert_int_equal(device_fd_ops.attach(&m, fd, REGION), 0);
	assert_int_equal(pread(fd, row, 128, 256), 128);
	other = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	close(fd);
	assert_int_equal(device_fd_ops.read(m, 256, row, 128), 0);
	assert_null(device_fd_ops.peek(m, 0, 1));
	device_fd_ops.detach(m);
	device_fd_ops.detach(NULL);
	assert_int_equal(fcntl(other, F_ADD_SEALS, F_SEAL_WRITE), 0);
	refused(other, 4096, -EPERM, "fd: seals 0x8");
	close(other);
}

/* The owner cuts, seals, lengthens: what is gone is an error, what is there is right, nothing dies. */
static void test_fd_owner_at_work(void **state)
{
	struct device_lane l = {.k_off = 0, .k_stride = 128, .k_bytes = 128};
	int fd = own_file();
	uint32_t slots[64], crc = 5;
	struct device_mem *m;
	uint8_t page[64 * 128], want[64 * 128];

	assert_int_equal(device_fd_ops.attach(&m, fd, REGION), 0);
	for (uint32_t i = 0; i < 64; i++)
		slots[i] = 2 * i;
	assert_int_equal(ftruncate(fd, 126 * 128 + 127), 0); /* a byte short of the last row */
	assert_int_equal(device_fd_ops.gather(m, &l, slots, 64, page, &crc), -EIO);
	assert_int_equal(crc, 5);
	assert_int_equal(device_fd_ops.gather(m, &l, slots, 63, page, &crc), 0);
	for (uint32_t i = 0; i < 63; i++)
		assert_int_equal(pread(fd, want + i * 128, 128, 256 * i), 128);
	assert_memory_equal(page, want, 63 * 128);
	assert_int_equal(crc, crc32c(5, want, 63 * 128));
	assert_int_equal(device_fd_ops.read(m, 126 * 128, page, 128), -EIO);
	assert_int_equal(device_fd_ops.read(m, REGION - 1, page, 1), -EIO);
	assert_int_equal(device_fd_ops.read(m, REGION, page, 1), -ERANGE);

	assert_int_equal(ftruncate(fd, (off_t)REGION * 2), 0);
	assert_int_equal(device_fd_ops.gather(m, &l, slots, 64, page, &crc), 0);
	assert_int_equal(device_fd_ops.read(m, REGION, page, 1), -ERANGE); /* as imported, no further */

	assert_int_equal(fcntl(fd, F_SETFL, O_RDWR | O_APPEND), 0); /* one open file, shared */
	(void)device_fd_ops.scatter(m, &l, want, 63, NULL, 0,
				    63); /* refused or at its place, as the kernel can */
	assert_int_equal(lseek(fd, 0, SEEK_END), REGION * 2);
	assert_int_equal(fcntl(fd, F_SETFL, O_RDWR), 0);
	assert_int_equal(device_fd_ops.scatter(m, &l, want, 63, NULL, 0, 63), 0);
	assert_int_equal(pread(fd, page, 63 * 128, 0), 63 * 128);
	assert_memory_equal(page, want, 63 * 128);

	assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), 0);
	assert_int_equal(device_fd_ops.scatter(m, &l, want, 63, NULL, 0, 63), -EPERM);
	assert_int_equal(device_fd_ops.gather(m, &l, slots, 64, page, &crc), 0);
	device_fd_ops.detach(m);
	close(fd);
}

/* Runs and gaps longer than what one read takes in. */
static void test_fd_long_spans(void **state)
{
	struct fixture *f = *state;
	static const struct device_lane lanes[] = {
		{.k_off = 3, .k_stride = 512, .k_bytes = 512, .v_off = 400000, .v_stride = 700, .v_bytes = 512},
		{.k_off = 0, .k_stride = 3000, .k_bytes = 40, .v_off = 50, .v_stride = 3000, .v_bytes = 40},
		{.k_off = 0, .k_stride = 40000, .k_bytes = 40000},
	};
	uint32_t slots[128];

	for (unsigned i = 0; i < ARRAY_SIZE(lanes); i++) {
		const struct device_lane *l = &lanes[i];
		uint32_t n = i == 2 ? 20 : 128, of = i == 2 ? 26 : i ? 340 : 700;

		for (unsigned round = 0; round < 100; round++) {
			uint32_t crc = round;

			if (round)
				some_slots(slots, n, of);
			for (uint32_t k = 0; !round && k < n; k++)
				slots[k] = k;
			assert_int_equal(f->ops->gather(f->mem, l, slots, n, f->page, &crc), 0);
			reference_gather(f, l, slots, n, f->copy);
			assert_memory_equal(f->page, f->copy, (size_t)n * (l->k_bytes + l->v_bytes));
			assert_int_equal(crc, crc32c(round, f->copy, (size_t)n * (l->k_bytes + l->v_bytes)));
		}
	}
}

static atomic_bool stop;

static void *scribble(void *arg)
{
	volatile uint64_t *p = arg;
	uint64_t x = 1;

	while (!atomic_load(&stop))
		for (unsigned i = 0; i < 128 * 16; i++)
			p[i] = x++;
	return NULL;
}

/* The checksum belongs to the copy, whatever the client does meanwhile. */
static void test_writer_in_the_way(void **state)
{
	struct fixture *f = *state;
	struct device_lane l = {.k_off = 0, .k_stride = 128, .k_bytes = 128};
	uint32_t slots[128];
	pthread_t th;

	atomic_store(&stop, false);
	assert_int_equal(pthread_create(&th, NULL, scribble, f->seg.addr), 0);
	for (unsigned round = 0; round < 3000; round++) {
		uint32_t crc = round;

		for (uint32_t i = 0; i < 64; i++)
			slots[i] = round % 2 ? i : i * 2;
		assert_int_equal(f->ops->gather(f->mem, &l, slots, 64, f->page, &crc), 0);
		assert_int_equal(crc, crc32c(round, f->page, 64 * 128));
	}
	atomic_store(&stop, true);
	pthread_join(th, NULL);
}

#define HOST(fn) cmocka_unit_test_setup_teardown(fn, setup_host, teardown)
#define FD(fn)                                                                                                 \
	{                                                                                                      \
#fn " (fd)", fn, setup_fd, teardown, NULL                                                      \
	}
#define BOTH(fn) HOST(fn), FD(fn)

int main(void)
{
	const struct CMUnitTest tests[] = {
		BOTH(test_gather),
		BOTH(test_gather_nothing),
		BOTH(test_scatter),
		BOTH(test_there_and_back),
		BOTH(test_hostile_layouts),
		BOTH(test_hostile_slots),
		BOTH(test_page_too_large),
		BOTH(test_random_layouts),
		BOTH(test_punched),
		BOTH(test_read),
		BOTH(test_writer_in_the_way),
		HOST(test_sparse_commit),
		HOST(test_peek),
		HOST(test_attach),
		FD(test_fd_sparse),
		FD(test_fd_long_spans),
		cmocka_unit_test(test_fd_attach),
		cmocka_unit_test(test_fd_owner_at_work),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
