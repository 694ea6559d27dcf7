/* SPDX-License-Identifier: MIT */
/* The nvme tier's directory, file system and disk. */
#include <fcntl.h>
#include <limits.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include "daemon/ctl/doctor.h"
#include "shm/util.h"

#define MIB (UINT64_C(1) << 20)

static bool off(const struct patient *p, struct finding *f)
{
	if (!p->cfg.nvme_enabled)
		say(f, VERDICT_OK, "not asked for ([nvme] enabled = no)");
	return !p->cfg.nvme_enabled;
}

/* The user that the daemon runs as; false: not known. */
static bool daemon_uid(const struct patient *p, uint64_t *ret)
{
	char name[64], text[4096];
	struct passwd *pw;
	FILE *file;
	bool found = false;

	if (p->pid && host_read(p, text, sizeof(text), "/proc/%d/status", p->pid) > 0)
		return text_number(text, "Uid:", ret);
	if (!unit_value(p, "User", name, sizeof(name)))
		return false;
	file = fopen(host_path(p, "/etc/passwd"), "re");
	while (file && !found && (pw = fgetpwent(file))) {
		found = !strcmp(pw->pw_name, name);
		*ret = pw->pw_uid;
	}
	if (file)
		fclose(file);
	return found;
}

/* It is that directory, or in it. */
static bool lies_below(const char *path, const char *dir)
{
	size_t n = strlen(dir);

	while (n && dir[n - 1] == '/')
		n--;
	return !strncmp(path, dir, n) && (!path[n] || path[n] == '/');
}

/* ProtectSystem=strict leaves the service its state directory and what ReadWritePaths= names. */
static bool service_may_write(const struct patient *p)
{
	char paths[2048];

	if (!unit_there(p) || lies_below(p->cfg.nvme_path, "/var/lib/kvtier"))
		return true;
	if (!unit_value(p, "ReadWritePaths", paths, sizeof(paths)))
		return false;
	for (char *save, *s = strtok_r(paths, " ", &save); s; s = strtok_r(NULL, " ", &save))
		if (lies_below(p->cfg.nvme_path, s + strspn(s, "+-")))
			return true;
	return false;
}

void check_store(const struct patient *p, struct finding *f)
{
	const char *path = p->cfg.nvme_path;
	struct stat st;
	uint64_t uid;

	if (off(p, f))
		return;
	if (stat(host_path(p, "%s", path), &st) < 0) {
		say(f, errno == ENOENT ? VERDICT_PROBLEM : VERDICT_UNCHECKED, "%s: %s", path, strerror(errno));
		advise(f, errno == ENOENT ? "install -d -o kvtier -g kvtier -m 700 %s" : "look at %s as root",
		       path);
	} else if (!S_ISDIR(st.st_mode)) {
		say(f, VERDICT_PROBLEM, "%s: no directory", path);
		advise(f, "in %s: [nvme] path = a directory", p->file);
	} else if (!service_may_write(p)) {
		say(f, VERDICT_PROBLEM, "%s: the service may not write outside /var/lib/kvtier", path);
		advise(f, "systemctl edit kvtierd, [Service] ReadWritePaths=%s", path);
	} else if (daemon_uid(p, &uid) && uid != st.st_uid) {
		say(f, VERDICT_PROBLEM, "%s: owned by user %u, the daemon is %llu", path, (unsigned)st.st_uid,
		    (unsigned long long)uid);
		advise(f, "chown kvtier:kvtier %s", path);
	} else if (st.st_mode & 077) {
		say(f, VERDICT_WARNING, "%s: mode %04o, others may look at rows", path,
		    (unsigned)st.st_mode & 07777);
		advise(f, "chmod 700 %s", path);
	} else {
		say(f, VERDICT_OK, "%s: owned by user %u, mode %04o", path, (unsigned)st.st_uid,
		    (unsigned)st.st_mode & 07777);
	}
}

struct mount {
	char type[32], source[256], device[32];
};

/* The mount that holds the tier's directory, by the longest mount point that begins its path. */
static bool mount_of(const struct patient *p, struct mount *ret)
{
	FILE *file = fopen(host_path(p, "/proc/self/mountinfo"), "re");
	char line[4096], device[32], point[1024], *dash;
	size_t best = 0;

	while (file && fgets(line, sizeof(line), file)) {
		struct mount m;

		dash = strstr(line, " - ");
		if (!dash || sscanf(line, "%*s %*s %31s %*s %1023s", device, point) != 2 ||
		    sscanf(dash, " - %31s %255s", m.type, m.source) != 2)
			continue;
		/* Of two at the same point the later one hides the earlier. */
		if (strlen(point) < best || !lies_below(p->cfg.nvme_path, point))
			continue;
		best = strlen(point);
		memcpy(m.device, device, sizeof(device));
		*ret = m;
	}
	if (file)
		fclose(file);
	return best;
}

static bool is_network(const char *type)
{
	static const char *const types[] = {"nfs",  "cifs", "smb",       "9p",    "ceph",
					    "fuse", "afs",  "glusterfs", "lustre"};

	for (size_t i = 0; i < ARRAY_SIZE(types); i++)
		if (!strncmp(type, types[i], strlen(types[i])))
			return true;
	return false;
}

/* A file without a name, one block written past the page cache. 0 or -errno. */
static int try_direct(const struct patient *p)
{
	static char block[KVT_UNIT] __attribute__((aligned(KVT_UNIT)));
	_cleanup_close_ int fd =
		open(host_path(p, "%s", p->cfg.nvme_path), O_TMPFILE | O_RDWR | O_DIRECT | O_CLOEXEC, 0600);

	if (fd < 0)
		return -errno;
	return pwrite(fd, block, sizeof(block), 0) == sizeof(block) ? 0 : -errno;
}

void check_filesystem(const struct patient *p, struct finding *f)
{
	struct mount m;
	int r;

	if (off(p, f))
		return;
	if (!mount_of(p, &m)) {
		say(f, VERDICT_UNCHECKED, "/proc/self/mountinfo: nothing holds %s", p->cfg.nvme_path);
		return;
	}
	if (is_network(m.type)) {
		say(f, VERDICT_PROBLEM, "%s is on %s (%s), over the network", p->cfg.nvme_path, m.type,
		    m.source);
		advise(f, "in %s: [nvme] path = a directory on a local disk", p->file);
		return;
	}
	if (!strcmp(m.type, "tmpfs") || !strcmp(m.type, "ramfs") || !strcmp(m.type, "overlay")) {
		say(f, VERDICT_WARNING, "%s is on %s, %s", p->cfg.nvme_path, m.type,
		    *m.type == 'o' ? "a container's layer" : "which is memory");
		advise(f, "in %s: [nvme] path = a directory on ext4 or xfs", p->file);
		return;
	}
	r = try_direct(p);
	if (r == -EINVAL || r == -EOPNOTSUPP) {
		say(f, VERDICT_WARNING, "%s: no direct I/O (%s)", m.type, strerror(-r));
		advise(f, "in %s: [nvme] path = a directory on ext4 or xfs", p->file);
	} else if (r < 0) {
		say(f, VERDICT_UNCHECKED, "%s: direct I/O: %s; try as root", m.type, strerror(-r));
	} else {
		say(f, VERDICT_OK, "%s of %s, direct I/O works", m.type, m.source);
	}
}

/* What the container files have already; the tier makes no directories. */
void check_space(const struct patient *p, struct finding *f)
{
	struct statvfs st;
	struct stat data;
	uint64_t have = 0, is_free;

	if (off(p, f))
		return;
	if (statvfs(host_path(p, "%s", p->cfg.nvme_path), &st) < 0) {
		say(f, VERDICT_UNCHECKED, "%s: %s", p->cfg.nvme_path, strerror(errno));
		return;
	}
	if (!stat(host_path(p, "%s/data", p->cfg.nvme_path), &data))
		have = (uint64_t)data.st_blocks * 512;
	is_free = (uint64_t)st.f_bavail * st.f_frsize;
	if (is_free + have < p->cfg.nvme_size) {
		say(f, VERDICT_PROBLEM, "[nvme] size is %s, %s free and %s taken already",
		    human(p->cfg.nvme_size), human(is_free), human(have));
		advise(f, "in %s: [nvme] size = %lluM", p->file,
		       (unsigned long long)((is_free + have) / 10 * 9 / MIB));
	} else {
		say(f, VERDICT_OK, "[nvme] size is %s, %s free and %s taken already", human(p->cfg.nvme_size),
		    human(is_free), human(have));
	}
}

/* The whole disk's directory below /sys, or false. */
static bool disk_dir(const struct patient *p, const struct mount *m, char ret[PATH_MAX])
{
	const char *path = host_path(p, "/sys/dev/block/%s", m->device);
	char file[PATH_MAX + 16], *slash;

	if (!realpath(path, ret)) {
		slash = strrchr(m->source, '/');
		path = host_path(p, "/sys/class/block/%s", slash ? slash + 1 : m->source);
		if (!realpath(path, ret))
			return false;
	}
	snprintf(file, sizeof(file), "%s/partition", ret);
	slash = strrchr(ret, '/');
	if (!access(file, F_OK) && slash)
		*slash = 0;
	return true;
}

static const char *class_of(const char *name)
{
	static const struct {
		const char *prefix, *name;
	} classes[] = {{"nvme", "NVMe"},   {"sd", "SATA, SAS or USB"},
		       {"vd", "virtual"},  {"xvd", "virtual"},
		       {"dm-", "stacked"}, {"md", "stacked"},
		       {"loop", "loop"},   {"zram", "memory"},
		       {"ram", "memory"},  {"pmem", "persistent memory"}};

	for (size_t i = 0; i < ARRAY_SIZE(classes); i++)
		if (!strncmp(name, classes[i].prefix, strlen(classes[i].prefix)))
			return classes[i].name;
	return "unknown class";
}

void check_disk(const struct patient *p, struct finding *f)
{
	char dir[PATH_MAX], scheduler[128];
	uint64_t rotational = 0, discard = 0;
	const char *name, *class, *below;
	struct mount m;

	if (off(p, f))
		return;
	if (!mount_of(p, &m) || !disk_dir(p, &m, dir) || !strrchr(dir, '/')) {
		say(f, VERDICT_UNCHECKED, "%s: no disk found for it in /sys/dev/block", p->cfg.nvme_path);
		return;
	}
	name = strrchr(dir, '/') + 1;
	class = class_of(name);
	below = dir;
	if (*p->root && !strncmp(dir, p->root, strlen(p->root)))
		below += strlen(p->root);
	if (!host_number(p, &rotational, "%s/queue/rotational", below)) {
		say(f, VERDICT_UNCHECKED, "%s: no queue/rotational", name);
		return;
	}
	host_number(p, &discard, "%s/queue/discard_max_bytes", below);
	host_read(p, scheduler, sizeof(scheduler), "%s/queue/scheduler", below);
	if (rotational) {
		say(f, VERDICT_WARNING, "%s (%s) is rotational", name, class);
		advise(f, "in %s: [nvme] path = a directory on an SSD, or enabled = no", p->file);
	} else if (!strcmp(class, "loop") || !strcmp(class, "memory")) {
		say(f, VERDICT_NOTE, "%s (%s) is not a disk", name, class);
		advise(f, "in %s: [nvme] path = a directory on a disk", p->file);
	} else if (!strcmp(class, "NVMe") && *scheduler && strchr(scheduler, '[') &&
		   !strstr(scheduler, "[none]")) {
		say(f, VERDICT_NOTE, "%s (%s), scheduler %s", name, class, scheduler);
		advise(f, "echo none > /sys/block/%s/queue/scheduler", name);
	} else {
		say(f, VERDICT_OK, "%s (%s), not rotational, scheduler %s, discard %s", name, class,
		    *scheduler ? scheduler : "unknown", discard ? "yes" : "no");
	}
}
