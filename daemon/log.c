/* SPDX-License-Identifier: MIT */
/*
 * One line per event on stderr, with the level prefix that the journal reads.
 * Every line is one write, so lines of several threads do not mix. Whatever
 * is not printable ASCII is escaped: names come from clients, and no client may
 * forge a line.
 */
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <syslog.h>
#include "daemon/config.h"
#include "shm/util.h"

#define LOG_TEXT 1024

static _Atomic uint32_t log_level = LOG_INFO;

void log_set_level(uint32_t level)
{
	atomic_store_explicit(&log_level, MIN(level, (uint32_t)LOG_DEBUG), memory_order_relaxed);
}

/* Returns the length; the result ends in a newline. */
static size_t escape(const char *text, char *out, size_t size)
{
	static const char hex[] = "0123456789abcdef";
	size_t n = 0;

	for (const unsigned char *p = (const unsigned char *)text; *p && n + 5 < size; p++) {
		if (*p >= 0x20 && *p < 0x7f) {
			out[n++] = (char)*p;
			continue;
		}
		out[n++] = '\\';
		out[n++] = 'x';
		out[n++] = hex[*p >> 4];
		out[n++] = hex[*p & 15];
	}
	out[n++] = '\n';
	return n;
}

void log_line(int level, const char *fmt, ...)
{
	char text[LOG_TEXT], line[2 * LOG_TEXT];
	int saved = errno;
	va_list ap;
	size_t n;

	if (level < 0 || (uint32_t)level > atomic_load_explicit(&log_level, memory_order_relaxed))
		return;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	n = (size_t)snprintf(line, sizeof(line), "<%d>", level & LOG_PRIMASK);
	n += escape(text, line + n, sizeof(line) - n);
	if (write(STDERR_FILENO, line, n) < 0) {
		/* nowhere left to say so */
	}
	errno = saved;
}
