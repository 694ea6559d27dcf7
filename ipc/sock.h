/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Unix sockets (SEQPACKET) that carry one wire message per packet and up to
 * WIRE_MAX_FDS descriptors. Every descriptor made here is close-on-exec; the
 * sockets are non-blocking. No state; any thread, one reader and one writer
 * per socket.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include "ipc/wire.h"

/*
 * Listen on `path` (at most 107 bytes). mode is set before anybody can connect.
 * A socket file that a live process listens on is refused with -EADDRINUSE; a
 * dead one is replaced; anything else at that path is -EEXIST. The listening
 * fd, or -errno (-ENAMETOOLONG for a long path).
 */
int sock_listen(const char *path, unsigned mode, int backlog);
/* The same for bytes in a stream instead of messages. */
int sock_listen_stream(const char *path, unsigned mode, int backlog);
/* The next connection, -EAGAIN when there is none, -errno. */
int sock_accept(int fd);
/*
 * Connect; never waits. The fd, or -errno: -ENOENT and -ECONNREFUSED when nobody
 * listens, -EAGAIN when the listener's backlog is full.
 */
int sock_connect(const char *path);
/*
 * Send one message with n_fds descriptors (they stay the caller's). 0, or
 * -errno: -EAGAIN when the peer does not read, -EPIPE when it is gone, -E2BIG
 * for too many fds. Never raises SIGPIPE.
 */
int sock_send(int fd, const void *buf, size_t len, const int *fds, unsigned n_fds);
/*
 * Receive one message into buf. Its length (> 0), 0 at end of file, or -errno:
 * -EAGAIN nothing there; -EPROTO when the message or its descriptors were cut
 * or there were more than WIRE_MAX_FDS of them: all are closed. ret_fds has
 * room for WIRE_MAX_FDS and belongs to the caller on success; NULL: a message
 * that carries descriptors is -EPROTO. *ret_n_fds is 0 unless successful.
 */
ssize_t sock_recv(int fd, void *buf, size_t size, int *ret_fds, unsigned *ret_n_fds);
/* Wait for `events` (poll(2)) until the monotonic time deadline_ns. revents (> 0), 0 at the deadline, -errno.
 */
int sock_wait(int fd, short events, uint64_t deadline_ns);

struct sock_peer {
	pid_t pid;
	uid_t uid;
	gid_t gid;
	int pidfd; /* readable when the peer process is gone; -1 when the kernel has no SO_PEERPIDFD */
};
/* Credentials as the kernel knows them, taken when the peer connected. pidfd is the caller's. 0 or -errno. */
int sock_peer(int fd, struct sock_peer *ret);
