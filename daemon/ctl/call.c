/* SPDX-License-Identifier: MIT */
/* One exchange with the daemon: argv out, JSON (in a sealed memfd) and perhaps a descriptor back. */
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include "daemon/ctl/ctl.h"
#include "ipc/codec.h"
#include "ipc/sock.h"
#include "shm/util.h"

static char *fail_line;
static size_t fail_size;

void ctl_fail_into(char *buf, size_t size)
{
	fail_line = buf;
	fail_size = size;
}

int ctl_fail(int status, const char *fmt, ...)
{
	va_list ap;

	if (fail_line) {
		va_start(ap, fmt);
		vsnprintf(fail_line, fail_size, fmt, ap);
		va_end(ap);
		return status;
	}
	fflush(stdout);
	fputs("kvtierctl: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	return status;
}

static int connect_daemon(struct ctl *c, uint64_t deadline)
{
	const struct timespec nap = {.tv_nsec = 10000000};

	for (;;) {
		int r = sock_connect(c->socket);

		if (r >= 0) {
			c->fd = r;
			return CTL_OK;
		}
		if (r != -EAGAIN) /* its backlog is full: it lives */
			return ctl_fail(CTL_UNREACHABLE, "%s: %s", c->socket,
					r == -ECONNREFUSED ? "no daemon listens there" : strerror(-r));
		if (now_ns() >= deadline)
			return ctl_fail(CTL_TIMEOUT, "%s: no connection within %u ms", c->socket,
					c->timeout_ms);
		nanosleep(&nap, NULL);
	}
}

static int wait_for(struct ctl *c, short events, uint64_t deadline)
{
	int r = sock_wait(c->fd, events, deadline);

	if (r > 0)
		return CTL_OK;
	if (!r)
		return ctl_fail(CTL_TIMEOUT, "%s: no answer within %u ms", c->socket, c->timeout_ms);
	return ctl_fail(CTL_UNREACHABLE, "%s: %s", c->socket, strerror(-r));
}

static int send_request(struct ctl *c, unsigned argc, const char *const argv[], uint64_t deadline)
{
	_Alignas(8) char buf[WIRE_MAX];
	struct wire_admin *m = (struct wire_admin *)buf;
	size_t bytes = 0;
	char why[200];
	int r;

	for (unsigned i = 0; i < argc; i++) {
		size_t n = strlen(argv[i]) + 1;

		if (n > sizeof(buf) - sizeof(*m) - bytes)
			return ctl_fail(CTL_USAGE, "arguments: longer than %zu bytes",
					sizeof(buf) - sizeof(*m));
		memcpy(buf + sizeof(*m) + bytes, argv[i], n);
		bytes += n;
	}
	/* wire_init clears what it is given: only the fixed part, the strings stand. */
	wire_init(&m->hdr, W_ADMIN, sizeof(*m), ++c->cookie);
	m->hdr.len = (uint32_t)(sizeof(*m) + bytes);
	m->argc = argc;
	m->argv_bytes = (uint32_t)bytes;
	if (wire_check(buf, m->hdr.len, false, why, sizeof(why)))
		return ctl_fail(CTL_USAGE, "arguments: %s", why);
	while ((r = sock_send(c->fd, buf, m->hdr.len, NULL, 0)) == -EAGAIN) {
		r = wait_for(c, POLLOUT, deadline);
		if (r)
			return r;
	}
	return r ? ctl_fail(CTL_UNREACHABLE, "%s: %s", c->socket, strerror(-r)) : CTL_OK;
}

/* The daemon made the memory, but a mapping that shrinks under us would kill us: sealed or nothing. */
static int read_text(int fd, uint64_t bytes, char **ret)
{
	struct stat st;
	void *p;
	int seals = fcntl(fd, F_GET_SEALS);

	if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &st) < 0 || (uint64_t)st.st_size < bytes)
		return ctl_fail(CTL_UNREACHABLE, "reply: not a sealed memfd of %llu bytes",
				(unsigned long long)bytes);
	p = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		return ctl_fail(CTL_UNREACHABLE, "reply: %s", strerror(errno));
	*ret = strndup(p, bytes);
	munmap(p, bytes);
	return *ret ? CTL_OK : ctl_fail(CTL_UNREACHABLE, "reply: out of memory");
}

static int take_reply(struct ctl *c, const void *buf, size_t len, int *fds, unsigned n_fds, char **ret,
		      int *ret_fd)
{
	const struct wire_admin_reply *m = buf;
	unsigned json_fds;
	char why[200];
	int r;

	r = wire_check(buf, len, true, why, sizeof(why));
	if (r == KVT_E_VERSION)
		return ctl_fail(CTL_UNREACHABLE, "%s: another kvtierd's protocol: %s", c->socket, why);
	if (r || m->r.hdr.type != (W_ADMIN | W_REPLY) || m->r.hdr.cookie != c->cookie)
		return ctl_fail(CTL_UNREACHABLE, "%s: not a kvtierd's answer", c->socket);
	c->refusal = m->r.status;
	if (m->r.status)
		return ctl_fail(CTL_REFUSED, "%s", m->r.text);
	json_fds = m->json_bytes ? 1 : 0;
	if (n_fds < json_fds)
		return ctl_fail(CTL_UNREACHABLE, "reply: %u descriptors, must be at least %u", n_fds, json_fds);
	if (json_fds) {
		r = read_text(fds[0], m->json_bytes, ret);
		if (r)
			return r;
	}
	if (ret_fd && n_fds > json_fds)
		*ret_fd = TAKE_FD(fds[json_fds]);
	return CTL_OK;
}

int ctl_call_text(struct ctl *c, unsigned argc, const char *const argv[], char **ret, int *ret_fd)
{
	uint64_t deadline = now_ns() + c->timeout_ms * UINT64_C(1000000);
	_Alignas(8) char buf[WIRE_MAX];
	int fds[WIRE_MAX_FDS], r = CTL_OK;
	unsigned n_fds = 0;
	ssize_t n;

	*ret = NULL;
	if (ret_fd)
		*ret_fd = -1;
	if (c->fd < 0)
		r = connect_daemon(c, deadline);
	if (!r)
		r = send_request(c, argc, argv, deadline);
	if (r)
		return r;
	while ((n = sock_recv(c->fd, buf, sizeof(buf), fds, &n_fds)) == -EAGAIN) {
		r = wait_for(c, POLLIN, deadline);
		if (r)
			return r;
	}
	if (n <= 0)
		return ctl_fail(CTL_UNREACHABLE, "%s: %s", c->socket,
				n ? strerror((int)-n) : "the daemon hung up");
	r = take_reply(c, buf, (size_t)n, fds, n_fds, ret, ret_fd);
	for (unsigned i = 0; i < n_fds; i++)
		close_fdp(&fds[i]);
	return r;
}

int ctl_call(struct ctl *c, unsigned argc, const char *const argv[], json_t **ret, int *ret_fd)
{
	_cleanup_free_ char *text = NULL;
	int r = ctl_call_text(c, argc, argv, &text, ret_fd);
	json_error_t why;

	*ret = NULL;
	if (r || !text)
		return r;
	*ret = json_loads(text, 0, &why);
	if (*ret)
		return CTL_OK;
	if (ret_fd)
		close_fdp(ret_fd);
	return ctl_fail(CTL_UNREACHABLE, "reply: not JSON: %s", why.text);
}

void ctl_print_json(const json_t *j)
{
	json_dumpf(j, stdout, JSON_COMPACT);
	putchar('\n');
}
