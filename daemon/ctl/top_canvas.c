/* SPDX-License-Identifier: MIT */
/* top: a screen of characters, and where its parts lie. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "daemon/ctl/top.h"
#include "shm/util.h"

int canvas_size(struct canvas *c, int w, int h)
{
	size_t n = (size_t)w * (size_t)h;
	struct canvas to = {.w = w, .h = h, .text = malloc(n ?: 1), .attr = calloc(n ?: 1, 1)};

	if (!to.text || !to.attr) {
		canvas_free(&to);
		return -ENOMEM;
	}
	memset(to.text, ' ', n);
	canvas_free(c);
	*c = to;
	return 0;
}

void canvas_free(struct canvas *c)
{
	free(c->text);
	free(c->attr);
	c->text = NULL;
	c->attr = NULL;
}

int canvas_put(struct canvas *c, int y, int x, enum top_attr a, const char *fmt, ...)
{
	char line[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	if (y < 0 || y >= c->h || x < 0)
		return x;
	for (const char *s = line; *s && x < c->w; s++, x++) {
		size_t i = (size_t)y * (size_t)c->w + (size_t)x;

		c->text[i] = *s >= 0x20 && *s < 0x7f ? *s : '?';
		c->attr[i] = (uint8_t)a;
	}
	return x;
}

void canvas_attr(struct canvas *c, int y, enum top_attr a)
{
	if (y >= 0 && y < c->h)
		memset(c->attr + (size_t)y * (size_t)c->w, (int)a, (size_t)c->w);
}

/* The sequences get what the others leave; tenants and the stream grow with the screen. */
struct top_layout top_layout(int h, bool own, unsigned tiers, unsigned tenants, bool feed)
{
	struct top_layout l = {.head = 0, .tiers = own ? 2 : 4, .foot = h - 1};
	int most = h < 20 ? 1 : h < 34 ? 2 : h / 8;

	l.tenants = l.tiers + 1 + (int)tiers;
	l.tenant_lines = MIN((int)tenants, most);
	l.seqs = l.tenants + 1 + l.tenant_lines;
	l.feed_lines = feed && h >= 20 ? MAX(3, h / 5) : 0;
	l.feed = l.foot - l.feed_lines - (l.feed_lines ? 1 : 0);
	l.seq_lines = MAX(0, l.feed - l.seqs - 2);
	return l;
}
