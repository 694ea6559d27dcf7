/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include "ipc/sock.h"
#include "shm/util.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77 /* Linux 6.5 */
#endif

static int address(struct sockaddr_un *ret, const char *path)
{
	size_t n = strlen(path);

	if (!n)
		return -EINVAL;
	if (n >= sizeof(ret->sun_path))
		return -ENAMETOOLONG;
	memset(ret, 0, sizeof(*ret));
	ret->sun_family = AF_UNIX;
	memcpy(ret->sun_path, path, n);
	return 0;
}

static int open_socket(int type)
{
	int fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	return fd < 0 ? -errno : fd;
}

int sock_connect(const char *path)
{
	_cleanup_close_ int fd = -1;
	struct sockaddr_un a;
	int r = address(&a, path);

	if (r < 0)
		return r;
	fd = open_socket(SOCK_SEQPACKET);
	if (fd < 0)
		return fd;
	if (connect(fd, (struct sockaddr *)&a, sizeof(a)) < 0)
		return -errno;
	return TAKE_FD(fd);
}

/* 0: the way is free (a dead socket was removed), -EADDRINUSE: somebody lives there, -EEXIST: not a socket. */
static int clear_stale(const char *path)
{
	struct stat st;
	int fd;

	if (lstat(path, &st) < 0)
		return errno == ENOENT ? 0 : -errno;
	if (!S_ISSOCK(st.st_mode))
		return -EEXIST;
	fd = sock_connect(path);
	if (fd >= 0)
		close(fd);
	if (fd != -ECONNREFUSED && fd != -ENOENT)
		return -EADDRINUSE; /* connected, backlog full, wrong type or no permission: not ours to remove
				     */
	return unlink(path) < 0 && errno != ENOENT ? -errno : 0;
}

/*
 * Between the look and the bind another daemon could do the same and lose its
 * fresh socket to our unlink: whoever replaces a socket locks its directory.
 */
static int lock_directory(const char *path)
{
	char dir[sizeof(((struct sockaddr_un *)0)->sun_path)];
	_cleanup_close_ int fd = -1;

	snprintf(dir, sizeof(dir), "%s", path);
	fd = open(dirname(dir), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0 || flock(fd, LOCK_EX) < 0)
		return -errno;
	return TAKE_FD(fd);
}

static int listen_at(const char *path, int type, unsigned mode, int backlog)
{
	_cleanup_close_ int fd = -1, lock = -1;
	struct sockaddr_un a;
	int r = address(&a, path);

	if (r < 0)
		return r;
	lock = lock_directory(path);
	if (lock < 0)
		return lock;
	r = clear_stale(path);
	if (r < 0)
		return r;
	fd = open_socket(type);
	if (fd < 0)
		return fd;
	if (bind(fd, (struct sockaddr *)&a, sizeof(a)) < 0)
		return -errno;
	/* Nobody can connect before listen(): the mode is never wider than asked. */
	if (chmod(path, mode) < 0 || listen(fd, backlog) < 0) {
		r = -errno;
		unlink(path);
		return r;
	}
	return TAKE_FD(fd);
}

int sock_listen(const char *path, unsigned mode, int backlog)
{
	return listen_at(path, SOCK_SEQPACKET, mode, backlog);
}

int sock_listen_stream(const char *path, unsigned mode, int backlog)
{
	return listen_at(path, SOCK_STREAM, mode, backlog);
}

int sock_accept(int fd)
{
	int r;

	do
		r = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	while (r < 0 && (errno == EINTR || errno == ECONNABORTED));
	return r < 0 ? -errno : r;
}

int sock_send(int fd, const void *buf, size_t len, const int *fds, unsigned n_fds)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(WIRE_MAX_FDS * sizeof(int))] = {0};
	struct iovec iov = {.iov_base = (void *)buf, .iov_len = len};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
	ssize_t n;

	if (n_fds > WIRE_MAX_FDS)
		return -E2BIG;
	if (n_fds) {
		struct cmsghdr *c;

		m.msg_control = control;
		m.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
		c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
		memcpy(CMSG_DATA(c), fds, n_fds * sizeof(int));
	}
	do
		n = sendmsg(fd, &m, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return errno == ECONNRESET ? -EPIPE : -errno;
	return (size_t)n == len ? 0 : -EIO;
}

/* Room for more than the cap, so that a few too many arrive, are counted and are closed by us. */
#define RECV_FDS (2 * WIRE_MAX_FDS)

static unsigned take_fds(struct msghdr *m, int *ret)
{
	unsigned n = 0;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
		size_t k = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		memcpy(ret + n, CMSG_DATA(c), k * sizeof(int));
		n += (unsigned)k;
	}
	return n;
}

ssize_t sock_recv(int fd, void *buf, size_t size, int *ret_fds, unsigned *ret_n_fds)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(RECV_FDS * sizeof(int))];
	struct iovec iov = {.iov_base = buf, .iov_len = size};
	struct msghdr m = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	int fds[sizeof(control) / sizeof(int)];
	unsigned n_fds, cap = ret_fds ? WIRE_MAX_FDS : 0;
	ssize_t n;

	if (ret_n_fds)
		*ret_n_fds = 0;
	do
		n = recvmsg(fd, &m, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return errno == ECONNRESET ? 0 : -errno;
	n_fds = take_fds(&m, fds);
	if (m.msg_flags & (MSG_TRUNC | MSG_CTRUNC) || n_fds > cap || (!n && n_fds)) {
		for (unsigned i = 0; i < n_fds; i++)
			close(fds[i]);
		return -EPROTO;
	}
	if (n_fds)
		memcpy(ret_fds, fds, n_fds * sizeof(int));
	if (ret_n_fds)
		*ret_n_fds = n_fds;
	return n;
}

int sock_wait(int fd, short events, uint64_t deadline_ns)
{
	for (;;) {
		uint64_t now = now_ns(), left = deadline_ns > now ? deadline_ns - now : 0;
		struct timespec ts = {.tv_sec = (time_t)(left / 1000000000u),
				      .tv_nsec = (long)(left % 1000000000u)};
		struct pollfd p = {.fd = fd, .events = events};
		int r = ppoll(&p, 1, &ts, NULL);

		if (r > 0)
			return p.revents;
		if (!r)
			return 0;
		if (errno != EINTR)
			return -errno;
	}
}

int sock_peer(int fd, struct sock_peer *ret)
{
	struct ucred u;
	socklen_t n = sizeof(u);
	int pidfd = -1;

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &u, &n) < 0)
		return -errno;
	n = sizeof(pidfd);
	if (getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &n) < 0)
		pidfd = -1;
	else
		fcntl(pidfd, F_SETFD, FD_CLOEXEC);
	*ret = (struct sock_peer){.pid = u.pid, .uid = u.uid, .gid = u.gid, .pidfd = pidfd};
	return 0;
}
