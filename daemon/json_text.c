/* SPDX-License-Identifier: MIT */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "daemon/json_text.h"
#include "shm/util.h"

static char *room(struct json_text *t, size_t n)
{
	if (t->failed)
		return NULL;
	if (t->cap - t->n < n) {
		size_t cap = MAX(t->cap * 2, t->n + n + 4096);
		char *b = realloc(t->buf, cap);

		if (!b) {
			t->failed = true;
			return NULL;
		}
		t->buf = b;
		t->cap = cap;
	}
	return t->buf + t->n;
}

static void put(struct json_text *t, const char *s, size_t n)
{
	char *p = room(t, n);

	if (p) {
		memcpy(p, s, n);
		t->n += n;
	}
}

/* What comes before a value. Keys are ours and need no escapes. */
static void begin(struct json_text *t, const char *key)
{
	if (t->comma)
		put(t, ",", 1);
	if (key) {
		put(t, "\"", 1);
		put(t, key, strlen(key));
		put(t, "\":", 2);
	}
	t->comma = true;
}

void json_text_open(struct json_text *t, const char *key, char open)
{
	begin(t, key);
	put(t, &open, 1);
	t->comma = false;
}

void json_text_close(struct json_text *t, char close)
{
	put(t, &close, 1);
	t->comma = true;
}

void json_text_num(struct json_text *t, const char *key, uint64_t v)
{
	char digits[20];
	size_t i = sizeof(digits);

	begin(t, key);
	v = MIN(v, (uint64_t)INT64_MAX);
	do
		digits[--i] = (char)('0' + v % 10);
	while (v /= 10);
	put(t, digits + i, sizeof(digits) - i);
}

void json_text_real(struct json_text *t, const char *key, double v)
{
	char text[40];

	if (!isfinite(v)) {
		json_text_null(t, key);
		return;
	}
	begin(t, key);
	put(t, text, (size_t)snprintf(text, sizeof(text), "%.6g", v));
}

void json_text_bool(struct json_text *t, const char *key, bool v)
{
	begin(t, key);
	put(t, v ? "true" : "false", v ? 4 : 5);
}

void json_text_null(struct json_text *t, const char *key)
{
	begin(t, key);
	put(t, "null", 4);
}

/* Bytes of the well-formed UTF-8 character at s; 0: it is none. */
static size_t utf8(const unsigned char *s)
{
	size_t n = *s >= 0xc2 && *s < 0xe0 ? 2 : *s >= 0xe0 && *s < 0xf0 ? 3 : *s >= 0xf0 && *s < 0xf5 ? 4 : 0;

	for (size_t i = 1; i < n; i++)
		if ((s[i] & 0xc0) != 0x80)
			return 0;
	if ((*s == 0xe0 && s[1] < 0xa0) || (*s == 0xed && s[1] > 0x9f) || (*s == 0xf0 && s[1] < 0x90) ||
	    (*s == 0xf4 && s[1] > 0x8f))
		return 0;
	return n;
}

void json_text_str(struct json_text *t, const char *key, const char *text)
{
	const unsigned char *s = (const unsigned char *)text;

	begin(t, key);
	put(t, "\"", 1);
	while (*s) {
		size_t n = 1, wide;
		char escape[8];

		while (s[n - 1] >= 0x20 && s[n - 1] < 0x7f && s[n - 1] != '"' && s[n - 1] != '\\')
			n++;
		put(t, (const char *)s, n - 1);
		s += n - 1;
		if (!*s)
			break;
		wide = *s >= 0x80 ? utf8(s) : 0;
		if (wide)
			put(t, (const char *)s, wide);
		else if (*s >= 0x80)
			put(t, "?", 1);
		else
			put(t, escape, (size_t)snprintf(escape, sizeof(escape), "\\u%04x", *s));
		s += wide ?: 1;
	}
	put(t, "\"", 1);
}

char *json_text_take(struct json_text *t, size_t *ret_bytes)
{
	char *s;

	put(t, "", 1);
	s = t->failed ? NULL : t->buf;
	if (s)
		*ret_bytes = t->n - 1;
	else
		free(t->buf);
	memset(t, 0, sizeof(*t));
	return s;
}
