/* SPDX-License-Identifier: MIT */
/* The configuration, the service, and the sockets. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include "daemon/ctl/doctor.h"
#include "shm/util.h"

void check_config(const struct patient *p, struct finding *f)
{
	if (*p->error) {
		say(f, p->ready ? VERDICT_PROBLEM : VERDICT_UNCHECKED, "%s", p->error);
		advise(f, "mend that line; kvtierd --check-config -c %s tells the next", p->file);
	} else if (!p->file_there) {
		say(f, VERDICT_NOTE, "%s: not there, built-in defaults hold", p->file);
		advise(f, "kvtierd --print-config > %s", p->file);
	} else {
		say(f, VERDICT_OK, "%s: right; dram %s, nvme %s", p->file, human(p->cfg.dram_size),
		    p->cfg.nvme_enabled ? human(p->cfg.nvme_size) : "off");
	}
}

static bool wanted(const struct patient *p, const char *socket)
{
	return host_there(p, "/etc/systemd/system/sockets.target.wants/%s", socket) ||
	       host_there(p, "/etc/systemd/system/multi-user.target.wants/%s", socket) ||
	       host_there(p, "/usr/lib/systemd/system/sockets.target.wants/%s", socket);
}

void check_unit(const struct patient *p, struct finding *f)
{
	uint64_t segments = p->cfg.dram_size / MAX(p->cfg.dram_segment, 1), store = 0;
	char text[64];

	if (!unit_there(p)) {
		say(f, VERDICT_NOTE, "kvtierd.service is not installed");
		advise(f, "apt install kvtierd, or make install; then systemctl enable --now kvtierd.socket "
			  "kvtierd-admin.socket kvtierd");
		return;
	}
	if (!wanted(p, "kvtierd.socket") || !wanted(p, "kvtierd-admin.socket")) {
		say(f, VERDICT_WARNING, "%s is not enabled",
		    wanted(p, "kvtierd.socket") ? "kvtierd-admin.socket" : "kvtierd.socket");
		advise(f, "systemctl enable --now kvtierd.socket kvtierd-admin.socket");
		return;
	}
	if (unit_value(p, "FileDescriptorStoreMax", text, sizeof(text)))
		unit_size(text, &store);
	if (store < segments) {
		say(f, VERDICT_WARNING, "FileDescriptorStoreMax=%llu, [dram] has %llu segments",
		    (unsigned long long)store, (unsigned long long)segments);
		advise(f, "systemctl edit kvtierd, [Service] FileDescriptorStoreMax=4096");
	} else if (!unit_value(p, "WatchdogSec", text, sizeof(text)) || !strcmp(text, "0")) {
		say(f, VERDICT_NOTE, "no watchdog");
		advise(f, "systemctl edit kvtierd, [Service] WatchdogSec=30s");
	} else {
		say(f, VERDICT_OK, "sockets enabled, WatchdogSec=%s, fd store for %llu segments of %llu", text,
		    (unsigned long long)store, (unsigned long long)segments);
	}
}

void check_sockets(const struct patient *p, struct finding *f)
{
	static const char *const group[] = {"kvtier-admin", "kvtier"};
	char path[CONFIG_PATH + 128];
	struct stat st;

	for (int i = -1; i < (int)p->cfg.tenants; i++) {
		if (config_socket_path(&p->cfg, i, path, sizeof(path)) < 0)
			continue;
		if (stat(host_path(p, "%s", path), &st) < 0 && errno == ENOENT) {
			say(f, VERDICT_WARNING, "%s: not there", path);
			advise(f, "systemctl enable --now %s",
			       i < 0 ? "kvtierd-admin.socket" : "kvtierd.socket");
			return;
		}
		if (faccessat(AT_FDCWD, host_path(p, "%s", path), W_OK, AT_EACCESS) < 0) {
			say(f, VERDICT_NOTE, "%s: %s for this user", path, strerror(errno));
			advise(f, "usermod -aG %s USER, then log in anew", group[i >= 0]);
			return;
		}
	}
	say(f, VERDICT_OK, "this user reaches the admin socket and those of %u tenant%s", p->cfg.tenants,
	    p->cfg.tenants == 1 ? "" : "s");
}
