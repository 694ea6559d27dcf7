/* SPDX-License-Identifier: MIT */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <syslog.h>
#include <systemd/sd-daemon.h>
#include "daemon/config.h"
#include "daemon/fdstore.h"
#include "shm/util.h"

#define PREFIX "dram-"

static int on_store(void *arg, const char *name, int fd)
{
	struct fdstore *s = arg;
	char text[96];
	int r;

	if (s->held >= s->max)
		return -ENOSPC;
	snprintf(text, sizeof(text), "FDSTORE=1\nFDNAME=%s\nFDPOLL=0", name);
	r = sd_pid_notify_with_fds(0, 0, text, &fd, 1);
	if (r <= 0)
		return r < 0 ? r : -ENOTCONN;
	s->held++;
	return 0;
}

static void on_drop(void *arg, const char *name)
{
	struct fdstore *s = arg;

	sd_notifyf(0, "FDSTOREREMOVE=1\nFDNAME=%s", name);
	s->held -= s->held > 0;
}

static void on_refused(void *arg, const char *name, const char *why)
{
	log_line(LOG_WARNING, "segment \"%s\" of an earlier life: %s; given up", name, why);
	on_drop(arg, name);
}

void fdstore_open(struct fdstore *s)
{
	const char *max = getenv("FDSTORE");

	memset(s, 0, sizeof(*s));
	s->on = getenv("NOTIFY_SOCKET") != NULL;
	s->max = max ? (unsigned)MIN(strtoul(max, NULL, 10), UINT32_MAX) : FDSTORE_MAX;
	s->keep = (struct tier_keep){.arg = s, .store = on_store, .drop = on_drop, .refused = on_refused};
}

bool fdstore_offer(struct fdstore *s, int fd, const char *name)
{
	struct tier_kept *v, *k;

	if (!s->on || strncmp(name, PREFIX, strlen(PREFIX)) != 0 || strlen(name) >= sizeof(k->name))
		return false;
	v = reallocarray(s->keep.kept, s->keep.n + 1, sizeof(*v));
	if (!v) {
		close(fd); /* it stays in the store, for another start */
		return true;
	}
	s->keep.kept = v;
	k = &v[s->keep.n++];
	strcpy(k->name, name);
	k->fd = fd;
	s->held++;
	return true;
}

const struct tier_keep *fdstore_keep(const struct fdstore *s)
{
	return s->on ? &s->keep : NULL;
}

void fdstore_close(struct fdstore *s)
{
	for (unsigned i = 0; i < s->keep.n; i++)
		close_fdp(&s->keep.kept[i].fd);
	free(s->keep.kept);
	s->keep.kept = NULL;
	s->keep.n = 0;
}

void fdstore_sweep(struct fdstore *s)
{
	for (unsigned i = 0; i < s->keep.n; i++)
		if (s->keep.kept[i].fd >= 0) {
			on_refused(s, s->keep.kept[i].name, "there is no dram tier");
			close(TAKE_FD(s->keep.kept[i].fd));
		}
	fdstore_close(s);
}
