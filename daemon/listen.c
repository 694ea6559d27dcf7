/* SPDX-License-Identifier: MIT */
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <syslog.h>
#include <systemd/sd-daemon.h>
#include "daemon/fdstore.h"
#include "daemon/listen.h"
#include "daemon/metrics.h"
#include "ipc/sock.h"
#include "shm/util.h"

#define BACKLOG 128
#define ADMIN_MODE 0660

static const char *name_of(const struct config *cfg, unsigned i)
{
	return i ? cfg->tenant[i - 1].name : "admin";
}

/* Which configured socket a passed one is: by name, else by where it is bound. -1: none. */
static int match(const struct listeners *l, const struct config *cfg, int fd, const char *name)
{
	struct sockaddr_un a = {};
	socklen_t n = sizeof(a) - 1;

	for (unsigned i = 0; i < l->n; i++)
		if (!strcmp(name, name_of(cfg, i)))
			return (int)i;
	if (getsockname(fd, (struct sockaddr *)&a, &n) < 0 || a.sun_family != AF_UNIX)
		return -1;
	for (unsigned i = 0; i < l->n; i++)
		if (!strcmp(a.sun_path, l->path[i]))
			return (int)i;
	return -1;
}

/* The one that Prometheus reads from; systemd's goes before the configured one. True: it was that. */
static bool take_metrics(struct listeners *l, int fd, const char *name)
{
	if (strcmp(name, "metrics") || l->metrics >= 0 || sd_is_socket(fd, AF_UNSPEC, SOCK_STREAM, 1) <= 0)
		return false;
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	l->metrics = fd;
	return true;
}

static void take_passed(struct listeners *l, const struct config *cfg, struct fdstore *store)
{
	char **names = NULL;
	int n = sd_listen_fds_with_names(1, &names);

	for (int k = 0; k < n; k++) {
		bool kept = fdstore_offer(store, SD_LISTEN_FDS_START + k, names[k]);
		int fd = SD_LISTEN_FDS_START + k, i = kept ? -1 : match(l, cfg, fd, names[k]);

		if (kept || take_metrics(l, fd, names[k])) {
			free(names[k]);
			continue;
		}
		if (i >= 0 && l->fd[i] < 0 && sd_is_socket(fd, AF_UNIX, SOCK_SEQPACKET, 1) > 0) {
			fcntl(fd, F_SETFL,
			      fcntl(fd, F_GETFL) | O_NONBLOCK); /* the loop must not wait in accept */
			l->fd[i] = fd;
		} else {
			log_line(LOG_WARNING, "socket %d \"%s\" from systemd: %s; closed", fd, names[k],
				 !strcmp(names[k], "metrics") ? "not a listening stream socket, or a second one"
				 : i < 0                      ? "no such tenant"
				 : l->fd[i] >= 0              ? "a second one for this tenant"
							      : "not a listening SEQPACKET socket");
			close(fd);
		}
		free(names[k]);
	}
	free(names);
}

static int set_group(const char *path, const char *group, char *err, size_t errsize)
{
	struct group *g;
	int r;

	if (!*group)
		return 0;
	errno = 0;
	g = getgrnam(group);
	if (!g) {
		r = errno ? -errno : -ENOENT;
		snprintf(err, errsize, "socket %s: group \"%s\": %s", path, group,
			 errno ? strerror(errno) : "no such group");
		return r;
	}
	if (chown(path, (uid_t)-1, g->gr_gid) < 0) {
		r = -errno;
		snprintf(err, errsize, "socket %s: group \"%s\": %s", path, group, strerror(errno));
		return r;
	}
	return 0;
}

static int make(struct listeners *l, const struct config *cfg, unsigned i, char *err, size_t errsize)
{
	const struct config_tenant *t = i ? &cfg->tenant[i - 1] : NULL;
	int fd = sock_listen(l->path[i], t ? t->socket_mode : ADMIN_MODE, BACKLOG);

	if (fd < 0) {
		snprintf(err, errsize, "socket %s (%s): %s", l->path[i], name_of(cfg, i),
			 fd == -EADDRINUSE ? "another kvtierd listens there"
			 : fd == -EEXIST   ? "the path exists and is not a socket"
					   : strerror(-fd));
		return fd;
	}
	l->fd[i] = fd;
	l->made[i] = true;
	return set_group(l->path[i], t ? t->socket_group : cfg->admin_group, err, errsize);
}

static int make_metrics(struct listeners *l, const struct config *cfg, char *err, size_t errsize)
{
	int fd = metrics_listen(cfg->metrics_listen, err, errsize);

	if (fd < 0)
		return fd;
	l->metrics = fd;
	l->made_metrics = *cfg->metrics_listen == '/';
	strcpy(l->metrics_path, cfg->metrics_listen);
	return 0;
}

int listeners_open(struct listeners *l, const struct config *cfg, struct fdstore *store, char *err,
		   size_t errsize)
{
	memset(l, 0, sizeof(*l));
	l->n = cfg->tenants + 1;
	for (unsigned i = 0; i < ARRAY_SIZE(l->fd); i++)
		l->fd[i] = -1;
	l->metrics = -1;
	for (unsigned i = 0; i < l->n; i++) {
		int r = config_socket_path(cfg, (int)i - 1, l->path[i], sizeof(l->path[i]));

		if (r < 0) {
			snprintf(err, errsize, "socket of %s: path too long", name_of(cfg, i));
			return r;
		}
	}
	take_passed(l, cfg, store);
	for (unsigned i = 0; i < l->n; i++) {
		int r = l->fd[i] < 0 ? make(l, cfg, i, err, errsize) : 0;

		if (r < 0) {
			listeners_close(l);
			return r;
		}
	}
	if (l->metrics < 0 && *cfg->metrics_listen) {
		int r = make_metrics(l, cfg, err, errsize);

		if (r < 0) {
			listeners_close(l);
			return r;
		}
	}
	return 0;
}

void listeners_close(struct listeners *l)
{
	for (unsigned i = 0; i < l->n; i++) {
		close_fdp(&l->fd[i]);
		l->fd[i] = -1;
		if (l->made[i])
			unlink(l->path[i]);
		l->made[i] = false;
	}
	close_fdp(&l->metrics);
	l->metrics = -1;
	if (l->made_metrics)
		unlink(l->metrics_path);
	l->made_metrics = false;
}
