/* SPDX-License-Identifier: MIT */
#pragma once
/* Bytes of a trace, checked. Internal to policy/trace*.c. */
#include "policy/trace.h"

/* One line "path: ..." into err; -EBADMSG. */
int trace_refuse(const struct trace *t, char *err, size_t errsize, const char *fmt, ...)
	__attribute__((format(printf, 4, 5)));
/* Exactly `size` bytes at `off`. -EBADMSG when the file ends before, or of pread; err is filled. */
int trace_pread(const struct trace *t, void *buf, uint64_t size, uint64_t off, char *err, size_t errsize);
/* The bytes of a chunk of the table, against its CRC. */
int trace_read_checked(const struct trace *t, const struct trace_chunk *c, void *buf, char *err,
		       size_t errsize);
