/* SPDX-License-Identifier: MIT */
/* Finding the traces of a split. */
#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include "policy/trace.h"
#include "shm/util.h"

struct list {
	char **path;
	uint32_t n, room;
};

/* 1: a file of the split, 0: of another one. */
static int wanted(const char *path, enum trace_split split, char *err, size_t errsize)
{
	struct trace *t;
	int r = trace_open(&t, path, err, errsize);

	if (r < 0)
		return r;
	r = t->h.rows && t->h.split == split;
	trace_free(t);
	return r;
}

/* Takes `path`. */
static int add(struct list *l, char *path)
{
	if (l->n == l->room) {
		uint32_t room = l->room ? 2 * l->room : 64;
		char **more = realloc(l->path, room * sizeof(*more));

		if (!more) {
			free(path);
			return -ENOMEM;
		}
		l->path = more;
		l->room = room;
	}
	l->path[l->n++] = path;
	return 0;
}

static int add_if_wanted(struct list *l, const char *dir, const char *name, enum trace_split split, char *err,
			 size_t errsize)
{
	char *path;
	int r;

	if (asprintf(&path, "%s/%s", dir, name) < 0)
		return -ENOMEM;
	r = wanted(path, split, err, errsize);
	if (r > 0)
		return add(l, path);
	free(path);
	return r;
}

static bool is_trace_name(const char *name)
{
	size_t n = strlen(name);

	return n > 5 && name[0] != '.' && strcmp(name + n - 5, ".kvtr") == 0;
}

static int scan(struct list *l, const char *dir, enum trace_split split, char *err, size_t errsize)
{
	DIR *d = opendir(dir);
	struct dirent *e;
	int r = 0;

	if (!d) {
		r = -errno;
		snprintf(err, errsize, "%s: %s", dir, strerror(-r));
		return r;
	}
	for (errno = 0; r == 0 && (e = readdir(d)); errno = 0)
		if (is_trace_name(e->d_name))
			r = add_if_wanted(l, dir, e->d_name, split, err, errsize);
	if (r == 0 && errno)
		r = -errno;
	closedir(d);
	return r;
}

static int scan_all(struct list *l, const char *dir, enum trace_split split, char *err, size_t errsize)
{
	static const char *const below[] = {"train", "valid", "test", "calib"};
	int r = scan(l, dir, split, err, errsize);

	for (size_t i = 0; r == 0 && i < ARRAY_SIZE(below); i++) {
		_cleanup_free_ char *sub = NULL;

		if (asprintf(&sub, "%s/%s", dir, below[i]) < 0) {
			sub = NULL;
			return -ENOMEM;
		}
		r = scan(l, sub, split, err, errsize);
		if (r == -ENOENT || r == -ENOTDIR)
			r = 0;
	}
	return r;
}

static int by_path(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

int trace_list(char ***ret, uint32_t *ret_n, const char *dir, enum trace_split split, char *err, size_t errsize)
{
	struct list l = {.path = malloc(sizeof(char *)), .room = 1};
	int r = l.path ? 0 : -ENOMEM;

	snprintf(err, errsize, "%s: out of memory", dir);
	if (r == 0)
		r = scan_all(&l, dir, split, err, errsize);
	if (r < 0) {
		trace_list_free(l.path, l.n);
		return r;
	}
	qsort(l.path, l.n, sizeof(*l.path), by_path);
	*ret = l.path;
	*ret_n = l.n;
	return 0;
}

void trace_list_free(char **list, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		free(list[i]);
	free(list);
}
