/* SPDX-License-Identifier: MIT */
#pragma once
/* What the parts of the codec share. Internal to ipc/. */
#include "ipc/codec.h"

/* The first failed check sticks; the later ones do nothing. */
struct check {
	char *err;
	size_t size;
	int rc;
};

void check_fail(struct check *c, int rc, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
void check_range(struct check *c, const char *field, uint64_t v, uint64_t lo, uint64_t hi);
void check_not_zero(struct check *c, const char *field, uint64_t v);
/* Reserved words are zero so that a later version can give them a meaning. */
void check_reserved(struct check *c, const char *field, uint64_t v);
/* NUL-terminated within its field and safe to print on one line. */
void check_text(struct check *c, const char *field, const char *s, size_t size);
/* A word that may become part of a file name. */
void check_word(struct check *c, const char *field, const char *s, size_t size);
void check_power_of_two(struct check *c, const char *field, uint64_t v, uint64_t lo, uint64_t hi);

/* ---- codec_request.c, codec_reply.c: the fields of one message whose framing was checked ---- */
void check_request(struct check *c, const struct wire_hdr *h);
void check_reply(struct check *c, const struct wire_reply *r);
