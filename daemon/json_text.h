/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * JSON written straight into a growing buffer, where a tree of values would take longer to build than the loop
 * may be held. Commas are put where they belong. Out of memory is remembered: look at `failed` in the end.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct json_text {
	char *buf; /* the caller's to free */
	size_t n, cap;
	bool comma, failed;
};

/* key NULL: an element of an array. open: '{' or '['. */
void json_text_open(struct json_text *t, const char *key, char open);
void json_text_close(struct json_text *t, char close);
/* JSON integers are signed: what does not fit is capped. */
void json_text_num(struct json_text *t, const char *key, uint64_t v);
void json_text_real(struct json_text *t, const char *key, double v); /* null when it is not finite */
void json_text_bool(struct json_text *t, const char *key, bool v);
void json_text_null(struct json_text *t, const char *key);
/* The text, with a zero behind it, the caller's to free; NULL: out of memory. t is empty then. */
char *json_text_take(struct json_text *t, size_t *ret_bytes);
/* s may be anything: what is not ASCII and not UTF-8 becomes '?'. */
void json_text_str(struct json_text *t, const char *key, const char *s);
