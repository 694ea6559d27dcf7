/* SPDX-License-Identifier: MIT */
/* Reading a host's files. Nothing is trusted to be there, whole, or small. */
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "daemon/ctl/doctor.h"
#include "shm/util.h"

static const char *rooted(const struct patient *p, const char *fmt, va_list args)
{
	static char path[4][1024];
	static unsigned turn;
	char *s = path[turn++ % 4];
	int n = snprintf(s, sizeof(*path), "%s", p->root);

	vsnprintf(s + n, sizeof(*path) - (size_t)n, fmt, args);
	return s;
}

#define ROOTED_PATH(p, fmt)                                                                                    \
	({                                                                                                     \
		va_list _a;                                                                                    \
		va_start(_a, fmt);                                                                             \
		const char *_s = rooted(p, fmt, _a);                                                           \
		va_end(_a);                                                                                    \
		_s;                                                                                            \
	})

const char *host_path(const struct patient *p, const char *fmt, ...)
{
	return ROOTED_PATH(p, fmt);
}

static int read_path(const char *path, char *ret, size_t size)
{
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	size_t have = 0;
	ssize_t n = 0;

	*ret = 0;
	if (fd < 0)
		return -errno;
	while (have < size - 1 && (n = read(fd, ret + have, size - 1 - have)) > 0)
		have += (size_t)n;
	if (n < 0) {
		*ret = 0;
		return -errno;
	}
	for (size_t i = 0; i < have; i++)
		if (!ret[i])
			ret[i] = ' ';
	ret[have] = 0;
	if (have && ret[have - 1] == '\n')
		ret[have - 1] = 0;
	return (int)have;
}

int host_read(const struct patient *p, char *ret, size_t size, const char *fmt, ...)
{
	return read_path(ROOTED_PATH(p, fmt), ret, size);
}

static bool decimal(const char *s, uint64_t *ret, const char **ret_end)
{
	char *end;

	while (*s == ' ' || *s == '\t')
		s++;
	if (!isdigit((unsigned char)*s))
		return false;
	errno = 0;
	*ret = strtoull(s, &end, 10);
	*ret_end = end;
	return !errno;
}

bool host_number(const struct patient *p, uint64_t *ret, const char *fmt, ...)
{
	char text[64];
	const char *end;

	return read_path(ROOTED_PATH(p, fmt), text, sizeof(text)) > 0 && decimal(text, ret, &end) && !*end;
}

bool text_number(const char *text, const char *key, uint64_t *ret)
{
	const char *end;
	uint64_t v;

	for (const char *s = text; s; s = strchr(s, '\n')) {
		s += *s == '\n';
		if (strncmp(s, key, strlen(key)))
			continue;
		if (!decimal(s + strlen(key), &v, &end))
			return false;
		if (!strncmp(end, " kB", 3) && __builtin_mul_overflow(v, 1024, &v))
			return false;
		*ret = v;
		return true;
	}
	return false;
}

bool host_there(const struct patient *p, const char *fmt, ...)
{
	return !access(ROOTED_PATH(p, fmt), F_OK);
}

static const char *const unit_dirs[] = {"/etc/systemd/system", "/run/systemd/system",
					"/usr/local/lib/systemd/system", "/usr/lib/systemd/system",
					"/lib/systemd/system"};

bool unit_there(const struct patient *p)
{
	for (size_t i = 0; i < ARRAY_SIZE(unit_dirs); i++)
		if (host_there(p, "%s/kvtierd.service", unit_dirs[i]))
			return true;
	return false;
}

/* The last line that sets the key; paths that may be written add up. */
static bool value_in(const char *path, const char *key, char *ret, size_t size)
{
	static char text[32768];
	bool adds = !strcmp(key, "ReadWritePaths"), any = false;
	size_t n = strlen(key);

	if (read_path(path, text, sizeof(text)) <= 0)
		return false;
	for (char *s = text, *next; s; s = next) {
		next = strchr(s, '\n');
		if (next)
			*next++ = 0;
		if (strncmp(s, key, n) || s[n] != '=')
			continue;
		if (adds && *ret && s[n + 1]) {
			size_t have = strlen(ret);

			snprintf(ret + have, size - have, " %s", s + n + 1);
		} else {
			snprintf(ret, size, "%s", s + n + 1);
		}
		any = true;
	}
	return any;
}

static int is_drop_in(const struct dirent *d)
{
	size_t n = strlen(d->d_name);

	return n > 5 && !strcmp(d->d_name + n - 5, ".conf");
}

bool unit_value(const struct patient *p, const char *key, char *ret, size_t size)
{
	bool any = false;

	*ret = 0;
	for (size_t i = 0; i < ARRAY_SIZE(unit_dirs); i++) {
		const char *path = host_path(p, "%s/kvtierd.service", unit_dirs[i]);

		if (!access(path, F_OK)) {
			any = value_in(path, key, ret, size);
			break;
		}
	}
	for (size_t i = ARRAY_SIZE(unit_dirs); i--;) {
		struct dirent **list;
		int n = scandir(host_path(p, "%s/kvtierd.service.d", unit_dirs[i]), &list, is_drop_in,
				alphasort);

		for (int k = 0; k < n; k++) {
			any |= value_in(host_path(p, "%s/kvtierd.service.d/%s", unit_dirs[i], list[k]->d_name),
					key, ret, size);
			free(list[k]);
		}
		if (n >= 0)
			free(list);
	}
	return any && *ret;
}

bool unit_size(const char *text, uint64_t *ret)
{
	static const char units[] = "KMGT";
	const char *end, *u;
	uint64_t v;

	if (!strcmp(text, "infinity")) {
		*ret = UINT64_MAX;
		return true;
	}
	if (!decimal(text, &v, &end))
		return false;
	u = *end ? strchr(units, *end) : NULL;
	if (*end && (!u || end[1]))
		return false;
	if (u && __builtin_mul_overflow(v, UINT64_C(1) << 10 * (u - units + 1), &v))
		v = UINT64_MAX;
	*ret = v;
	return true;
}

bool limit_of(const struct patient *p, const char *name, const char *unit_key, uint64_t *ret,
	      const char **ret_whose)
{
	char text[4096], value[128], *line;
	const char *end;

	*ret_whose = p->pid ? "the daemon's" : "the unit's";
	if (!p->pid && unit_value(p, unit_key, value, sizeof(value))) {
		char *colon = strchr(value, ':'); /* soft:hard */

		if (colon)
			*colon = 0;
		return unit_size(value, ret);
	}
	if (!p->pid)
		*ret_whose = "this shell's";
	if (p->pid)
		host_read(p, text, sizeof(text), "/proc/%d/limits", p->pid);
	else
		host_read(p, text, sizeof(text), "/proc/self/limits");
	line = strstr(text, name);
	if (!line)
		return false;
	line += strlen(name);
	line += strspn(line, " ");
	if (!strncmp(line, "unlimited", 9)) {
		*ret = UINT64_MAX;
		return true;
	}
	return decimal(line, ret, &end);
}

const char *human(uint64_t bytes)
{
	static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
	static char text[8][32];
	static unsigned turn;
	char *s = text[turn++ % 8];
	double v = (double)bytes;
	unsigned u = 0;

	if (bytes == UINT64_MAX)
		return "unlimited";
	for (; v >= 1024 && u < 4; u++)
		v /= 1024;
	snprintf(s, sizeof(*text), v == (double)(uint64_t)v ? "%.0f %s" : "%.1f %s", v, units[u]);
	return s;
}

void say(struct finding *f, enum verdict v, const char *fmt, ...)
{
	va_list args;

	f->verdict = v;
	*f->advice = 0;
	va_start(args, fmt);
	vsnprintf(f->found, sizeof(f->found), fmt, args);
	va_end(args);
}

void advise(struct finding *f, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	vsnprintf(f->advice, sizeof(f->advice), fmt, args);
	va_end(args);
}
