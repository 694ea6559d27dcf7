/* SPDX-License-Identifier: MIT */
#include <err.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "daemon/ctl/table.h"
#include "shm/util.h"

#define LINE_WIDTH 80
#define MIN_WIDTH 6 /* a cut column keeps this much */

void table_init(struct table *t, char *spec)
{
	char *save = NULL;

	memset(t, 0, sizeof(*t));
	for (char *s = strtok_r(spec, " ", &save); s && t->columns < TABLE_COLUMNS;
	     s = strtok_r(NULL, " ", &save)) {
		t->align[t->columns] = *s;
		t->head[t->columns++] = s + 1;
	}
}

void table_add(struct table *t, const char *fmt, ...)
{
	va_list ap;
	char *cell;

	if (t->rows == t->cap) {
		t->cap = t->cap ? 2 * t->cap : 16 * t->columns;
		t->cell = realloc(t->cell, t->cap * sizeof(*t->cell));
		if (!t->cell)
			err(1, "table");
	}
	cell = t->cell[t->rows++];
	va_start(ap, fmt);
	vsnprintf(cell, TABLE_CELL, fmt, ap);
	va_end(ap);
	for (; *cell; cell++)
		if (*cell < 0x20 || *cell > 0x7e)
			*cell = '?';
}

static unsigned sum(const unsigned *width, unsigned n, unsigned gap)
{
	unsigned s = n ? (n - 1) * gap : 0;

	for (unsigned i = 0; i < n; i++)
		s += width[i];
	return s;
}

/* Widths so that a line fits: narrow the gap first, then the widest column that may be cut, again and again. */
static unsigned fit(const struct table *t, unsigned width[TABLE_COLUMNS])
{
	unsigned gap;

	for (unsigned c = 0; c < t->columns; c++)
		width[c] = (unsigned)strlen(t->head[c]);
	for (unsigned i = 0; i < t->rows; i++)
		width[i % t->columns] = MAX(width[i % t->columns], (unsigned)strlen(t->cell[i]));
	gap = sum(width, t->columns, 2) <= LINE_WIDTH ? 2 : 1;
	while (sum(width, t->columns, gap) > LINE_WIDTH) {
		unsigned widest = TABLE_COLUMNS;

		for (unsigned c = 0; c < t->columns; c++)
			if (t->align[c] == 'l' && width[c] > MIN_WIDTH &&
			    (widest == TABLE_COLUMNS || width[c] > width[widest]))
				widest = c;
		if (widest == TABLE_COLUMNS)
			break;
		width[widest]--;
	}
	return gap;
}

static void print_cell(const char *text, unsigned width, char align, unsigned gap, bool last)
{
	int pad = (int)width - (int)strlen(text);

	if (pad < 0)
		printf("%.*s~", (int)width - 1, text);
	else if (align == 'r')
		printf("%*s%s", pad, "", text);
	else
		printf("%s%*s", text, last ? 0 : pad, "");
	printf("%*s", last ? 0 : (int)gap, "");
}

void table_print(struct table *t)
{
	unsigned width[TABLE_COLUMNS], gap = fit(t, width);

	for (unsigned c = 0; c < t->columns; c++)
		print_cell(t->head[c], width[c], t->align[c], gap, c + 1 == t->columns);
	putchar('\n');
	for (unsigned i = 0; i < t->rows; i++) {
		unsigned c = i % t->columns;

		print_cell(t->cell[i], width[c], t->align[c], gap, c + 1 == t->columns);
		if (c + 1 == t->columns)
			putchar('\n');
	}
}

void table_free(struct table *t)
{
	free(t->cell);
	t->cell = NULL;
	t->rows = t->cap = 0;
}

static char *next_buffer(void)
{
	static char buf[16][32];
	static unsigned n;

	return buf[n++ % ARRAY_SIZE(buf)];
}

/* Three significant digits, so that columns stay narrow. */
static const char *scaled(uint64_t v, uint64_t base, const char *const *unit, const char *space)
{
	char *b = next_buffer();
	double x = (double)v;
	unsigned u = 0;

	while (x >= (double)base && unit[u + 1]) {
		x /= (double)base;
		u++;
	}
	snprintf(b, 32, "%.*f%s%s", !u || x >= 100 ? 0 : x >= 10 ? 1 : 2, x, space, unit[u]);
	return b;
}

const char *fmt_bytes(uint64_t v)
{
	static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", NULL};

	return scaled(v, 1024, unit, " ");
}

const char *fmt_count(uint64_t v)
{
	static const char *const unit[] = {"", "k", "M", "G", "T", "P", NULL};
	char *b;

	if (v > 99999)
		return scaled(v, 1000, unit, "");
	b = next_buffer();
	snprintf(b, 32, "%" PRIu64, v);
	return b;
}

const char *fmt_ns(uint64_t v)
{
	static const char *const unit[] = {"ns", "us", "ms", "s", NULL};

	return scaled(v, 1000, unit, " ");
}

const char *fmt_age(uint64_t s)
{
	char *b = next_buffer();

	if (s < 60)
		snprintf(b, 32, "%" PRIu64 " s", s);
	else if (s < 86400)
		snprintf(b, 32, "%u:%02u:%02u", (unsigned)(s / 3600), (unsigned)(s / 60 % 60),
			 (unsigned)(s % 60));
	else
		snprintf(b, 32, "%" PRIu64 " d %u:%02u:%02u", s / 86400, (unsigned)(s / 3600 % 24),
			 (unsigned)(s / 60 % 60), (unsigned)(s % 60));
	return b;
}
