/* SPDX-License-Identifier: MIT */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>
#include "ipc/sock.h"
#include "shm/util.h"

struct place {
	char dir[64], path[96];
};

static int setup(void **state)
{
	struct place *p = calloc(1, sizeof(*p));

	strcpy(p->dir, "/tmp/kvt-sock-XXXXXX");
	assert_non_null(mkdtemp(p->dir));
	snprintf(p->path, sizeof(p->path), "%s/s", p->dir);
	*state = p;
	return 0;
}

static int teardown(void **state)
{
	struct place *p = *state;

	unlink(p->path);
	assert_int_equal(rmdir(p->dir), 0); /* nothing else was left there */
	free(p);
	return 0;
}

static int open_fds(void)
{
	int n = 0;
	DIR *d = opendir("/proc/self/fd");

	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

static void pair(int sv[2])
{
	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sv), 0);
}

static void test_listen_connect(void **state)
{
	struct place *p = *state;
	char buf[64];
	struct stat st;
	int l, c, s;

	assert_int_equal(sock_connect(p->path), -ENOENT);
	l = sock_listen(p->path, 0620, 4);
	assert_true(l >= 0);
	assert_int_equal(stat(p->path, &st), 0);
	assert_int_equal(st.st_mode & 0777, 0620);
	assert_true(fcntl(l, F_GETFD) & FD_CLOEXEC);
	assert_int_equal(sock_accept(l), -EAGAIN);
	c = sock_connect(p->path);
	assert_true(c >= 0);
	s = sock_accept(l);
	assert_true(s >= 0);
	assert_true(fcntl(s, F_GETFD) & FD_CLOEXEC);
	assert_true(fcntl(s, F_GETFL) & O_NONBLOCK);
	assert_int_equal(sock_recv(s, buf, sizeof(buf), NULL, NULL), -EAGAIN);
	assert_int_equal(sock_wait(s, POLLIN, now_ns()), 0);
	assert_int_equal(sock_send(c, "one", 3, NULL, 0), 0);
	assert_int_equal(sock_send(c, "three", 5, NULL, 0), 0);
	assert_true(sock_wait(s, POLLIN, now_ns() + 1000000000) & POLLIN);
	assert_int_equal(sock_recv(s, buf, sizeof(buf), NULL, NULL), 3); /* packets stay apart */
	assert_int_equal(sock_recv(s, buf, sizeof(buf), NULL, NULL), 5);
	close(c);
	assert_int_equal(sock_recv(s, buf, sizeof(buf), NULL, NULL), 0);
	assert_int_equal(sock_send(s, "x", 1, NULL, 0), -EPIPE); /* and no SIGPIPE */
	close(s);
	close(l);
}

static void test_stale_socket(void **state)
{
	struct place *p = *state;
	int l = sock_listen(p->path, 0600, 4), l2, c;

	assert_true(l >= 0);
	assert_int_equal(sock_listen(p->path, 0600, 4), -EADDRINUSE);
	c = sock_connect(p->path); /* the first one still lives and was not disturbed */
	assert_true(c >= 0);
	close(c);
	close(l);
	assert_int_equal(access(p->path, F_OK), 0); /* a dead socket file */
	assert_int_equal(sock_connect(p->path), -ECONNREFUSED);
	l2 = sock_listen(p->path, 0600, 4);
	assert_true(l2 >= 0);
	c = sock_connect(p->path);
	assert_true(c >= 0);
	close(c);
	close(l2);
}

static void test_backlog_full_is_alive(void **state)
{
	struct place *p = *state;
	int l = sock_listen(p->path, 0600, 0), c[8], n = 0;

	while (n < 8 && (c[n] = sock_connect(p->path)) >= 0)
		n++;
	assert_true(n < 8);
	assert_int_equal(c[n], -EAGAIN);
	assert_int_equal(sock_listen(p->path, 0600, 4), -EADDRINUSE);
	while (n--)
		close(c[n]);
	close(l);
}

static void test_other_files_are_kept(void **state)
{
	struct place *p = *state;
	int fd = open(p->path, O_CREAT | O_WRONLY, 0600);

	close(fd);
	assert_int_equal(sock_listen(p->path, 0600, 4), -EEXIST);
	assert_int_equal(access(p->path, F_OK), 0);
	assert_int_equal(unlink(p->path), 0);
	assert_int_equal(symlink("/etc/hostname", p->path), 0);
	assert_int_equal(sock_listen(p->path, 0600, 4), -EEXIST);
}

static void test_bad_paths(void **state)
{
	char longpath[200];

	memset(longpath, 'a', sizeof(longpath));
	longpath[0] = '/';
	longpath[sizeof(longpath) - 1] = 0;
	assert_int_equal(sock_listen(longpath, 0600, 1), -ENAMETOOLONG);
	assert_int_equal(sock_connect(longpath), -ENAMETOOLONG);
	assert_int_equal(sock_listen("", 0600, 1), -EINVAL);
	assert_int_equal(sock_listen("/nonexistent-kvt/s", 0600, 1), -ENOENT);
}

static bool same_file(int a, int b)
{
	struct stat x, y;

	return !fstat(a, &x) && !fstat(b, &y) && x.st_ino == y.st_ino && x.st_dev == y.st_dev;
}

static void test_fds_pass(void **state)
{
	int sv[2], pipes[4], got[WIRE_MAX_FDS], before;
	unsigned n = 77;
	char buf[16];

	pair(sv);
	assert_int_equal(pipe2(pipes, O_CLOEXEC), 0);
	assert_int_equal(pipe2(pipes + 2, O_CLOEXEC), 0);
	before = open_fds();
	assert_int_equal(sock_send(sv[0], "fds", 3, pipes, 4), 0);
	assert_int_equal(sock_recv(sv[1], buf, sizeof(buf), got, &n), 3);
	assert_int_equal(n, 4);
	for (int i = 0; i < 4; i++) {
		assert_true(same_file(got[i], pipes[i]));
		assert_true(fcntl(got[i], F_GETFD) & FD_CLOEXEC);
		close(got[i]);
	}
	assert_int_equal(sock_send(sv[0], "x", 1, pipes, 5), -E2BIG);
	/* a receiver that expects none refuses and keeps none */
	assert_int_equal(sock_send(sv[0], "fds", 3, pipes, 1), 0);
	assert_int_equal(sock_recv(sv[1], buf, sizeof(buf), NULL, NULL), -EPROTO);
	assert_int_equal(open_fds(), before);
	/* and the next message is unharmed */
	assert_int_equal(sock_send(sv[0], "ok", 2, NULL, 0), 0);
	assert_int_equal(sock_recv(sv[1], buf, sizeof(buf), got, &n), 2);
	assert_int_equal(n, 0);
	for (int i = 0; i < 4; i++)
		close(pipes[i]);
	close(sv[0]);
	close(sv[1]);
}

/* What a hostile peer may send: any number of fds in one packet. */
static void send_many(int fd, unsigned n)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(253 * sizeof(int))] = {0};
	struct iovec iov = {.iov_base = (void *)"x", .iov_len = 1};
	struct msghdr m = {.msg_iov = &iov,
			   .msg_iovlen = 1,
			   .msg_control = control,
			   .msg_controllen = CMSG_SPACE(n * sizeof(int))};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(n * sizeof(int));
	for (unsigned i = 0; i < n; i++)
		memcpy(CMSG_DATA(c) + i * sizeof(int), &fd, sizeof(int));
	assert_int_equal(sendmsg(fd, &m, 0), 1);
}

static void test_too_many_fds_are_all_closed(void **state)
{
	static const unsigned counts[] = {WIRE_MAX_FDS + 1, 2 * WIRE_MAX_FDS, 2 * WIRE_MAX_FDS + 1, 253};
	int sv[2], got[WIRE_MAX_FDS], before;
	unsigned n;
	char buf[16];

	pair(sv);
	before = open_fds();
	for (size_t i = 0; i < ARRAY_SIZE(counts);
	     i++) { /* beyond the cap, and beyond the control buffer (MSG_CTRUNC) */
		send_many(sv[0], counts[i]);
		n = 77;
		assert_int_equal(sock_recv(sv[1], buf, sizeof(buf), got, &n), -EPROTO);
		assert_int_equal(n, 0);
		assert_int_equal(open_fds(), before);
	}
	close(sv[0]);
	close(sv[1]);
}

/* The descriptor table is full half way: the kernel delivers some and says MSG_CTRUNC. */
static void test_fds_cut_by_rlimit_are_closed(void **state)
{
	int sv[2], got[WIRE_MAX_FDS], before, top;
	struct rlimit old, tight;
	unsigned n = 77;
	char buf[16];
	ssize_t r;

	pair(sv);
	before = open_fds();
	assert_int_equal(sock_send(sv[0], "fds", 3, (int[]){sv[0], sv[0], sv[0], sv[0]}, 4), 0);
	assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
	top = dup(sv[0]); /* the lowest free number */
	close(top);
	tight = (struct rlimit){.rlim_cur = (rlim_t)top + 2, .rlim_max = old.rlim_max};
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &tight), 0);
	r = sock_recv(sv[1], buf, sizeof(buf), got, &n);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
	assert_int_equal(r, -EPROTO);
	assert_int_equal(n, 0);
	assert_int_equal(open_fds(), before);
	close(sv[0]);
	close(sv[1]);
}

static void test_cut_message_closes_fds(void **state)
{
	int sv[2], got[WIRE_MAX_FDS], before;
	unsigned n = 77;
	char buf[16];

	pair(sv);
	before = open_fds();
	assert_int_equal(sock_send(sv[0], "seventeen letters", 17, sv, 2), 0);
	assert_int_equal(sock_recv(sv[1], buf, sizeof(buf), got, &n), -EPROTO);
	assert_int_equal(n, 0);
	assert_int_equal(open_fds(), before);
	close(sv[0]);
	close(sv[1]);
}

static void test_peer(void **state)
{
	struct place *p = *state;
	struct sock_peer peer;
	int l = sock_listen(p->path, 0600, 4), s, st, hold[2];
	pid_t pid;

	assert_true(l >= 0);
	assert_int_equal(pipe(hold), 0);
	fflush(NULL);
	pid = fork();
	if (!pid) {
		char c;

		close(hold[1]);
		if (sock_connect(p->path) < 0)
			_exit(1);
		_exit(read(hold[0], &c, 1) != 0); /* until the parent lets go */
	}
	close(hold[0]);
	assert_true(sock_wait(l, POLLIN, now_ns() + UINT64_C(5000000000)) > 0);
	s = sock_accept(l);
	assert_int_equal(sock_peer(s, &peer), 0);
	assert_int_equal(peer.pid, pid);
	assert_int_equal(peer.uid, getuid());
	assert_int_equal(peer.gid, getgid());
	if (peer.pidfd >= 0) {
		assert_int_equal(sock_wait(peer.pidfd, POLLIN, now_ns()), 0); /* alive */
		assert_true(fcntl(peer.pidfd, F_GETFD) & FD_CLOEXEC);
	}
	close(hold[1]);
	assert_int_equal(waitpid(pid, &st, 0), pid);
	assert_int_equal(st, 0);
	if (peer.pidfd >= 0) {
		assert_true(sock_wait(peer.pidfd, POLLIN, now_ns() + UINT64_C(5000000000)) & POLLIN);
		close(peer.pidfd);
	} else {
		print_message("# this kernel has no SO_PEERPIDFD\n");
	}
	close(s);
	close(l);
	assert_true(sock_peer(-1, &peer) < 0);
}

#define PLACE(t) cmocka_unit_test_setup_teardown(t, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		PLACE(test_listen_connect),
		PLACE(test_stale_socket),
		PLACE(test_backlog_full_is_alive),
		PLACE(test_other_files_are_kept),
		cmocka_unit_test(test_bad_paths),
		cmocka_unit_test(test_fds_pass),
		cmocka_unit_test(test_too_many_fds_are_all_closed),
		cmocka_unit_test(test_fds_cut_by_rlimit_are_closed),
		cmocka_unit_test(test_cut_message_closes_fds),
		PLACE(test_peer),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
