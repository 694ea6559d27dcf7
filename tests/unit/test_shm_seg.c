/* SPDX-License-Identifier: MIT */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <cmocka.h>
#include "shm/seg.h"
#include "shm/util.h"

#define MIB ((size_t)1 << 20)
#define SEALS_SIZE (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static int count_fds(void)
{
	int n = 0;

	for (int fd = 0; fd < 256; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

/* A memfd made by somebody else, with the seals we name. */
static int foreign_memfd(size_t size, int seals)
{
	int fd = memfd_create("foreign", MFD_ALLOW_SEALING | MFD_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)size), 0);
	assert_int_equal(fcntl(fd, F_ADD_SEALS, seals), 0);
	return fd;
}

static void create_each_class(void **state)
{
	static const int want[] = {
		[SEG_PRIVATE] = SEALS_SIZE,
		[SEG_EXCHANGE] = SEALS_SIZE,
		[SEG_PUBLISHED] = SEALS_SIZE | F_SEAL_FUTURE_WRITE,
	};

	for (int cls = SEG_PRIVATE; cls <= SEG_PUBLISHED; cls++) {
		struct seg s = SEG_INIT;
		struct stat st;

		assert_int_equal(seg_create(&s, (enum seg_class)cls, "t", 5000, 0), 0);
		assert_int_equal(s.size, 8192);
		assert_true(s.writable);
		assert_false(s.huge);
		assert_int_equal(fcntl(s.fd, F_GET_SEALS) & want[cls], want[cls]);
		assert_int_equal(fstat(s.fd, &st), 0);
		assert_int_equal(st.st_mode & 0777, 0600);
		assert_int_equal(st.st_size, 8192);
		assert_true(fcntl(s.fd, F_GETFD) & FD_CLOEXEC);
		memset(s.addr, 0xa5, s.size);
		assert_int_equal(seg_verify(s.fd, (enum seg_class)cls, 8192), 0);
		seg_close(&s);
		assert_int_equal(s.fd, -1);
		assert_null(s.addr);
		seg_close(&s);
	}
}

static void create_refuses_nonsense(void **state)
{
	struct seg s = SEG_INIT;
	int fds = count_fds();

	assert_int_equal(seg_create(&s, SEG_PRIVATE, "t", 0, 0), -EINVAL);
	assert_int_equal(seg_create(&s, (enum seg_class)3, "t", 4096, 0), -EINVAL);
	assert_int_equal(seg_create(&s, SEG_PRIVATE, "t", 4096, 4), -EINVAL);
	assert_int_equal(seg_create(&s, SEG_EXCHANGE, "t", 4096, SEG_F_HUGE), -EINVAL);
	assert_int_equal(seg_create(&s, SEG_PRIVATE, "t", SIZE_MAX, 0), -EFBIG);
	/* More than any address space: the kernel refuses, and nothing stays open. */
	assert_true(seg_create(&s, SEG_PRIVATE, "t", (size_t)1 << 61, 0) < 0);
	assert_true(seg_create(&s, SEG_PRIVATE, "t", (size_t)1 << 61, SEG_F_HUGE) < 0);
	assert_int_equal(s.fd, -1);
	assert_int_equal(count_fds(), fds);
}

static void close_leaves_fd_0_alone(void **state)
{
	struct seg zeroed = {0};
	int before = fcntl(0, F_GETFD);

	seg_close(NULL);
	seg_close(&zeroed);
	assert_int_equal(fcntl(0, F_GETFD), before);
}

static void huge_falls_back(void **state)
{
	struct seg s = SEG_INIT;

	assert_int_equal(seg_create(&s, SEG_PRIVATE, "t", 3 * MIB, SEG_F_HUGE), 0);
	assert_int_equal(s.size, s.huge ? 4 * MIB : 3 * MIB);
	memset(s.addr, 1, s.size);
	assert_true(seg_resident(&s) >= s.size);
	assert_int_equal(seg_verify(s.fd, SEG_PRIVATE, s.size), 0);
	seg_close(&s);
}

static void exchange_is_shared_both_ways(void **state)
{
	struct seg a = SEG_INIT, b = SEG_INIT;

	assert_int_equal(seg_create(&a, SEG_EXCHANGE, "t", MIB, SEG_F_POPULATE), 0);
	assert_int_equal(seg_resident(&a), MIB);
	assert_int_equal(seg_map(&b, SEG_EXCHANGE, dup(a.fd), MIB), 0);
	assert_true(b.writable);
	((char *)a.addr)[77] = 5;
	assert_int_equal(((char *)b.addr)[77], 5);
	((char *)b.addr)[MIB - 1] = 6;
	assert_int_equal(((char *)a.addr)[MIB - 1], 6);
	seg_close(&a);
	seg_close(&b);
}

static void sealed_size_cannot_move(void **state)
{
	for (int cls = SEG_PRIVATE; cls <= SEG_PUBLISHED; cls++) {
		struct seg s = SEG_INIT;

		assert_int_equal(seg_create(&s, (enum seg_class)cls, "t", MIB, 0), 0);
		assert_int_equal(ftruncate(s.fd, 4096), -1);
		assert_int_equal(errno, EPERM);
		assert_int_equal(ftruncate(s.fd, 2 * MIB), -1);
		assert_int_equal(errno, EPERM);
		assert_int_equal(fcntl(s.fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
		seg_close(&s);
	}
}

static void published_is_read_only_for_others(void **state)
{
	struct seg a = SEG_INIT, b = SEG_INIT;
	char path[64];
	int fd;

	assert_int_equal(seg_create(&a, SEG_PUBLISHED, "t", 8192, 0), 0);
	assert_int_equal(seg_map(&b, SEG_PUBLISHED, dup(a.fd), 8192), 0);
	assert_false(b.writable);
	((char *)a.addr)[4096] = 9; /* our own, older mapping still writes */
	assert_int_equal(((char *)b.addr)[4096], 9);

	assert_int_equal(mprotect(b.addr, b.size, PROT_READ | PROT_WRITE), -1);
	assert_ptr_equal(mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, b.fd, 0), MAP_FAILED);
	assert_int_equal(pwrite(b.fd, "x", 1, 0), -1);
	assert_int_equal(errno, EPERM);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", b.fd);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd >= 0) {
		assert_ptr_equal(mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
		close(fd);
	}
	assert_int_equal(seg_punch(&a, 0, 8192), -EPERM);
	assert_int_equal(seg_commit(&a, 0, 8192), -EPERM);
	assert_int_equal(((char *)b.addr)[4096], 9);
	seg_close(&b);
	seg_close(&a);
}

/* A writable mapping made by a hostile reader is killed, not served. */
static void published_write_faults(void **state)
{
	struct seg a = SEG_INIT, b = SEG_INIT;
	int status;
	pid_t pid;

	assert_int_equal(seg_create(&a, SEG_PUBLISHED, "t", 4096, 0), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (!pid) {
		signal(SIGSEGV, SIG_DFL);
		if (seg_map(&b, SEG_PUBLISHED, dup(a.fd), 4096) == 0)
			*(volatile char *)b.addr = 1;
		_exit(0);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFSIGNALED(status));
	assert_int_equal(WTERMSIG(status), SIGSEGV);
	assert_int_equal(*(char *)a.addr, 0);
	seg_close(&a);
}

static void map_refuses(enum seg_class cls, int fd, size_t size, int want)
{
	struct seg s = SEG_INIT;
	int fds = count_fds();

	assert_int_equal(seg_map(&s, cls, fd, size), want);
	assert_int_equal(seg_verify(fd, cls, size), want);
	assert_int_equal(s.fd, -1); /* ret untouched and the fd still the caller's */
	assert_null(s.addr);
	assert_int_equal(count_fds(), fds);
}

static void map_refuses_missing_seals(void **state)
{
	static const int lacking[] = {0, F_SEAL_GROW | F_SEAL_SEAL, F_SEAL_SHRINK | F_SEAL_SEAL,
				      F_SEAL_SHRINK | F_SEAL_GROW};

	for (size_t i = 0; i < ARRAY_SIZE(lacking); i++) {
		_cleanup_close_ int fd = foreign_memfd(8192, lacking[i]);

		map_refuses(SEG_EXCHANGE, fd, 8192, -EPROTO);
		map_refuses(SEG_PUBLISHED, fd, 8192, -EPROTO);
		map_refuses(SEG_PRIVATE, fd, 8192, -EPROTO);
	}
	_cleanup_close_ int plain = foreign_memfd(8192, SEALS_SIZE);
	_cleanup_close_ int future = foreign_memfd(8192, SEALS_SIZE | F_SEAL_FUTURE_WRITE);
	_cleanup_close_ int frozen = foreign_memfd(8192, SEALS_SIZE | F_SEAL_WRITE);

	map_refuses(SEG_PUBLISHED, plain, 8192, -EPROTO);
	map_refuses(SEG_EXCHANGE, future, 8192, -EPROTO);
	map_refuses(SEG_EXCHANGE, frozen, 8192, -EPROTO);
	assert_int_equal(seg_verify(plain, SEG_EXCHANGE, 8192), 0);
	assert_int_equal(seg_verify(future, SEG_PUBLISHED, 8192), 0);
}

static void map_refuses_wrong_size(void **state)
{
	_cleanup_close_ int fd = foreign_memfd(8192, SEALS_SIZE);
	_cleanup_close_ int odd = foreign_memfd(5000, SEALS_SIZE);
	struct seg s = SEG_INIT;

	map_refuses(SEG_EXCHANGE, fd, 4096, -EPROTO);
	map_refuses(SEG_EXCHANGE, fd, 12288, -EPROTO);
	map_refuses(SEG_EXCHANGE, fd, 0, -EPROTO);
	map_refuses(SEG_EXCHANGE, fd, SIZE_MAX, -EPROTO);
	map_refuses((enum seg_class)7, fd, 8192, -EINVAL);
	assert_int_equal(seg_map(&s, SEG_EXCHANGE, odd, 5000), -EPROTO);
	assert_int_equal(s.fd, -1);
}

static void map_refuses_what_is_no_memfd(void **state)
{
	char path[] = "/tmp/kvt-seg-XXXXXX", proc[64];
	_cleanup_close_ int file = mkstemp(path);
	int pipefd[2];

	assert_true(file >= 0);
	assert_int_equal(unlink(path), 0);
	assert_int_equal(ftruncate(file, 8192), 0);
	assert_int_equal(pipe(pipefd), 0);
	map_refuses(SEG_EXCHANGE, file, 8192, -EPROTO);
	map_refuses(SEG_PUBLISHED, pipefd[0], 8192, -EPROTO);
	map_refuses(SEG_EXCHANGE, -1, 8192, -EBADF);
	close(pipefd[0]);
	close(pipefd[1]);

	_cleanup_close_ int sealed = foreign_memfd(8192, SEALS_SIZE);

	snprintf(proc, sizeof(proc), "/proc/self/fd/%d", sealed);
	_cleanup_close_ int ro = open(proc, O_RDONLY | O_CLOEXEC);
	_cleanup_close_ int wo = open(proc, O_WRONLY | O_CLOEXEC);
	_cleanup_close_ int path_only = open(proc, O_PATH | O_CLOEXEC);

	assert_true(ro >= 0 && wo >= 0 && path_only >= 0);
	map_refuses(SEG_EXCHANGE, ro, 8192, -EPROTO);
	map_refuses(SEG_EXCHANGE, wo, 8192, -EPROTO);
	map_refuses(SEG_EXCHANGE, path_only, 8192, -EPROTO);
	map_refuses(SEG_PUBLISHED, path_only, 8192, -EPROTO);
}

/* A hole in hugetlb memory can be unfillable, which would be SIGBUS for the daemon. */
static void map_refuses_hugetlb_from_others(void **state)
{
	_cleanup_close_ int fd = memfd_create("huge", MFD_ALLOW_SEALING | MFD_CLOEXEC | MFD_HUGETLB);

	if (fd < 0) {
		print_message("# SKIP no hugetlb memfd on this kernel: %s\n", strerror(errno));
		skip();
	}
	assert_int_equal(ftruncate(fd, (off_t)(2 * MIB)), 0);
	assert_int_equal(fcntl(fd, F_ADD_SEALS, SEALS_SIZE), 0);
	map_refuses(SEG_EXCHANGE, fd, 2 * MIB, -EPROTO);
}

static void punch_frees_whole_pages_only(void **state)
{
	struct seg s = SEG_INIT;
	unsigned char *p;

	assert_int_equal(seg_create(&s, SEG_EXCHANGE, "t", 8 * 4096, 0), 0);
	assert_int_equal(seg_resident(&s), 0);
	p = s.addr;
	memset(p, 0xee, s.size);
	assert_int_equal(seg_resident(&s), 8 * 4096);
	/* Pages 1, 2 and 3 are inside; the ends of 0 and 4 are kept. */
	assert_int_equal(seg_punch(&s, 100, 4 * 4096), 0);
	assert_int_equal(seg_resident(&s), 5 * 4096);
	for (size_t i = 0; i < s.size; i++)
		assert_int_equal(p[i], i >= 4096 && i < 4 * 4096 ? 0 : 0xee);
	assert_int_equal(seg_punch(&s, 5 * 4096 + 1, 4096), 0); /* holds no whole page */
	assert_int_equal(p[5 * 4096 + 1], 0xee);
	assert_int_equal(seg_punch(&s, 8 * 4096, 0), 0);
	assert_int_equal(seg_punch(&s, 0, s.size + 1), -EINVAL);
	assert_int_equal(seg_punch(&s, 4096, SIZE_MAX), -EINVAL);
	assert_int_equal(seg_punch(&s, SIZE_MAX, 1), -EINVAL);
	seg_close(&s);
}

static void commit_backs_a_range(void **state)
{
	struct seg s = SEG_INIT;

	assert_int_equal(seg_create(&s, SEG_EXCHANGE, "t", MIB, 0), 0);
	assert_int_equal(seg_commit(&s, 4096, 3 * 4096), 0);
	assert_int_equal(seg_resident(&s), 3 * 4096);
	assert_int_equal(seg_commit(&s, 0, 0), 0);
	assert_int_equal(seg_commit(&s, MIB, 1), -EINVAL);
	assert_int_equal(seg_commit(&s, 1, SIZE_MAX), -EINVAL);
	assert_int_equal(seg_punch(&s, 0, MIB), 0);
	assert_int_equal(seg_resident(&s), 0);
	assert_int_equal(seg_commit(&s, 0, MIB), 0);
	assert_int_equal(seg_resident(&s), MIB);
	seg_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(create_each_class),
		cmocka_unit_test(create_refuses_nonsense),
		cmocka_unit_test(close_leaves_fd_0_alone),
		cmocka_unit_test(huge_falls_back),
		cmocka_unit_test(exchange_is_shared_both_ways),
		cmocka_unit_test(sealed_size_cannot_move),
		cmocka_unit_test(published_is_read_only_for_others),
		cmocka_unit_test(published_write_faults),
		cmocka_unit_test(map_refuses_missing_seals),
		cmocka_unit_test(map_refuses_wrong_size),
		cmocka_unit_test(map_refuses_what_is_no_memfd),
		cmocka_unit_test(map_refuses_hugetlb_from_others),
		cmocka_unit_test(punch_frees_whole_pages_only),
		cmocka_unit_test(commit_backs_a_range),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
