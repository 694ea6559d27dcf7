/* SPDX-License-Identifier: MIT */
#include "policy/train/run.h"
#include "shm/util.h"

#include <stdio.h>
#include <string.h>

struct progress {
	bool quiet, terminal, open;
	uint64_t last;
};

struct progress *progress_new(bool quiet)
{
	struct progress *p = calloc(1, sizeof(*p));

	if (p) {
		p->quiet = quiet;
		p->terminal = isatty(STDERR_FILENO);
		p->last = now_ns();
	}
	return p;
}

void progress_break(struct progress *p)
{
	if (p && p->open)
		fputc('\n', stderr);
	if (p)
		p->open = false;
}

void progress_free(struct progress *p)
{
	progress_break(p);
	free(p);
}

bool progress_due(const struct progress *p)
{
	return p && !p->quiet && now_ns() - p->last > (p->terminal ? 200000000u : 10000000000u);
}

void progress_draw(struct progress *p, const char *line, double done)
{
	enum { WIDTH = 24 };
	char bar[WIDTH + 1];
	int full = (int)(done * WIDTH);

	if (!p || p->quiet)
		return;
	p->last = now_ns();
	if (!p->terminal) {
		fprintf(stderr, "%3.0f %% %s\n", 100 * done, line);
		return;
	}
	memset(bar, '.', WIDTH);
	memset(bar, '#', (size_t)MIN(MAX(full, 0), WIDTH));
	bar[WIDTH] = 0;
	fprintf(stderr, "\r[%s] %s\033[K", bar, line);
	p->open = true;
}
