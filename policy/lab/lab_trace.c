/* SPDX-License-Identifier: MIT */
/*
 * Entry points for policy/lab/kvtr.py, which calls them through ctypes: writing
 * traces from Python by the code that every other writer uses. One writer per
 * thread; calls on different writers run in parallel (ctypes lets the interpreter go).
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include "shm/trace.h"

#define LAB_EXPORT __attribute__((visibility("default")))

LAB_EXPORT const char *lab_trace_error(void);
LAB_EXPORT struct trace_writer *lab_trace_open(const char *path, const void *header, const void *cuts,
					       uint32_t n);
LAB_EXPORT int lab_trace_chunk(struct trace_writer *w, uint32_t kind, uint32_t lane, uint32_t cut,
			       const void *data, uint64_t bytes);
LAB_EXPORT int lab_trace_lanes(struct trace_writer *w, uint32_t kind, uint32_t first, uint32_t n, uint32_t cut,
			       const void *data, uint64_t bytes, uint64_t stride);
LAB_EXPORT uint64_t lab_trace_size(const struct trace_writer *w);
LAB_EXPORT int lab_trace_finish(struct trace_writer *w, int sync);
LAB_EXPORT void lab_trace_abort(struct trace_writer *w);

static __thread char line[512];

/* The calling thread's last failure in words. */
const char *lab_trace_error(void)
{
	return line;
}

/* header: TRACE_HEADER bytes, cuts: n of struct trace_cut, copied. NULL on failure. */
struct trace_writer *lab_trace_open(const char *path, const void *header, const void *cuts, uint32_t n)
{
	struct trace_header h;
	struct trace_writer *w;
	int r;

	memcpy(&h, header, sizeof(h));
	if (h.cuts != n) {
		snprintf(line, sizeof(line), "%s: cuts: %u, the header says %u", path, n, h.cuts);
		return NULL;
	}
	snprintf(line, sizeof(line), "%s", strerror(ENOMEM));
	r = trace_writer_open(&w, path, &h, cuts, line, sizeof(line));
	return r < 0 ? NULL : w;
}

/* n lanes of one kind from lane `first` on, `bytes` each, `stride` bytes apart. 0 or -errno. */
int lab_trace_lanes(struct trace_writer *w, uint32_t kind, uint32_t first, uint32_t n, uint32_t cut,
		    const void *data, uint64_t bytes, uint64_t stride)
{
	const char *name = trace_kind_name(kind);

	for (uint32_t i = 0; i < n; i++) {
		uint64_t must = trace_writer_bytes(w, kind, cut);
		int r = bytes == must
				? trace_writer_chunk(w, kind, first + i, cut, (const char *)data + i * stride)
				: -EINVAL;

		if (r == 0)
			continue;
		snprintf(line, sizeof(line), "%s of lane %u, cut %u: %llu bytes (must be %llu): %s",
			 name ? name : "unknown kind", first + i, cut, (unsigned long long)bytes,
			 (unsigned long long)must, strerror(-r));
		return r;
	}
	return 0;
}

int lab_trace_chunk(struct trace_writer *w, uint32_t kind, uint32_t lane, uint32_t cut, const void *data,
		    uint64_t bytes)
{
	return lab_trace_lanes(w, kind, lane, 1, cut, data, bytes, 0);
}

uint64_t lab_trace_size(const struct trace_writer *w)
{
	return trace_writer_size(w);
}

/* Frees w whatever is returned. */
int lab_trace_finish(struct trace_writer *w, int sync)
{
	int r = trace_writer_finish(w, sync);

	if (r < 0)
		snprintf(line, sizeof(line), "%s", strerror(-r));
	return r;
}

void lab_trace_abort(struct trace_writer *w)
{
	trace_writer_abort(w);
}
