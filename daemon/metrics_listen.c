/* SPDX-License-Identifier: MIT */
/* Where the counters may be read, and the socket there. Knows nothing of the core: the configuration asks, too.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include "daemon/metrics.h"
#include "ipc/sock.h"
#include "shm/util.h"

#define METRICS_BACKLOG 8

/* "127.0.0.1:PORT" or "[::1]:PORT". False: neither. */
static bool loopback(const char *where, struct sockaddr_storage *ret, socklen_t *ret_size)
{
	static const char v4[] = "127.0.0.1:", v6[] = "[::1]:";
	bool six = !strncmp(where, v6, strlen(v6));
	const char *port = where + (six ? strlen(v6) : strlen(v4));
	unsigned long n;

	if (!six && strncmp(where, v4, strlen(v4)))
		return false;
	if (!*port || strlen(port) > 5 || strspn(port, "0123456789") != strlen(port))
		return false;
	n = strtoul(port, NULL, 10);
	if (!n || n > 65535)
		return false;
	memset(ret, 0, sizeof(*ret));
	if (six) {
		*(struct sockaddr_in6 *)ret = (struct sockaddr_in6){.sin6_family = AF_INET6,
								    .sin6_port = htons((uint16_t)n),
								    .sin6_addr = IN6ADDR_LOOPBACK_INIT};
		*ret_size = sizeof(struct sockaddr_in6);
	} else {
		*(struct sockaddr_in *)ret = (struct sockaddr_in){.sin_family = AF_INET,
								  .sin_port = htons((uint16_t)n),
								  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
		*ret_size = sizeof(struct sockaddr_in);
	}
	return true;
}

int metrics_where(const char *where, char *err, size_t errsize)
{
	struct sockaddr_storage a;
	socklen_t n;

	if (!*where || (*where == '/' && strlen(where) < sizeof(((struct sockaddr_un *)0)->sun_path)) ||
	    loopback(where, &a, &n))
		return 0;
	snprintf(err, errsize,
		 "\"%.64s\", must be empty, a path of at most %zu bytes, 127.0.0.1:PORT or [::1]:PORT", where,
		 sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
	return -EINVAL;
}

int metrics_listen(const char *where, char *err, size_t errsize)
{
	_cleanup_close_ int fd = -1;
	struct sockaddr_storage a;
	socklen_t n;
	int r = metrics_where(where, err, errsize), one = 1;

	if (r < 0)
		return r;
	if (*where == '/') {
		fd = sock_listen_stream(where, 0660, METRICS_BACKLOG);
		r = fd < 0 ? fd : 0;
	} else {
		loopback(where, &a, &n);
		fd = socket(a.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) < 0 ||
		    bind(fd, (struct sockaddr *)&a, n) < 0 || listen(fd, METRICS_BACKLOG) < 0)
			r = -errno;
	}
	if (r < 0) {
		snprintf(err, errsize, "metrics socket %s: %s%s", where, strerror(-r),
			 r == -EAFNOSUPPORT ? "; the unit allows no TCP: use kvtierd-metrics.socket" : "");
		return r;
	}
	return TAKE_FD(fd);
}
