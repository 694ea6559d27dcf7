/* SPDX-License-Identifier: MIT */
#pragma once
/* Whole files that are either the old one or the new one, whatever happens meanwhile. */
#include <stddef.h>

struct file_part {
	const void *data;
	size_t bytes;
};

/*
 * Write the parts, one after the other, to a temporary file beside `path` (mode 0644), sync it and rename it
 * there. On failure nothing is left of it. 0, -ENOMEM or the error of a call. Blocks on I/O; any thread.
 */
int file_replace(const char *path, const struct file_part *part, unsigned parts);
