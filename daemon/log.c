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
#include "shm/trial.h"
#include "shm/util.h"

#define LOG_TEXT 1024
#define BURST 100u
#define REFILL_NS UINT64_C(500000000)
#define SUMMARY_NS UINT64_C(10000000000)

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

static void say(int level, const char *fmt, va_list ap)
{
	char text[LOG_TEXT], line[2 * LOG_TEXT];
	int saved = errno;
	size_t n;

	vsnprintf(text, sizeof(text), fmt, ap);
	n = (size_t)snprintf(line, sizeof(line), "<%d>", level & LOG_PRIMASK);
	n += escape(text, line + n, sizeof(line) - n);
	if (write(STDERR_FILENO, line, n) < 0) {
		/* nowhere left to say so */
	}
	errno = saved;
}

static bool wanted(int level)
{
	return level >= 0 && (uint32_t)level <= atomic_load_explicit(&log_level, memory_order_relaxed);
}

void log_line(int level, const char *fmt, ...)
{
	va_list ap;

	if (!wanted(level))
		return;
	va_start(ap, fmt);
	say(level, fmt, ap);
	va_end(ap);
}

/* ---- lines that clients cause --------------------------------------------------------------- */

bool log_may(struct log_bucket *b)
{
	uint64_t now = now_ns(), full = MAX(b->full_ns, now);

	if (full - now > (BURST - 1) * REFILL_NS && !planted("log-unlimited")) {
		b->left_out++;
		return false;
	}
	b->full_ns = full + REFILL_NS;
	return true;
}

void log_about(struct log_bucket *b, int level, const char *fmt, ...)
{
	va_list ap;

	if (!wanted(level) || !log_may(b))
		return;
	va_start(ap, fmt);
	say(level, fmt, ap);
	va_end(ap);
}

void log_left_out(struct log_bucket *b, const char *whom)
{
	uint64_t now = b->left_out ? now_ns() : 0;

	if (!b->left_out || now - b->said_ns < SUMMARY_NS)
		return;
	log_line(LOG_WARNING, "%s: %llu more lines left out", whom, (unsigned long long)b->left_out);
	b->left_out = 0;
	b->said_ns = now;
}
