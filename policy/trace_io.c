/* SPDX-License-Identifier: MIT */
/* Chunks of an open trace: read or mapped, and checked against their CRC. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include "policy/trace_io.h"
#include "shm/crc.h"
#include "shm/util.h"

int trace_refuse(const struct trace *t, char *err, size_t errsize, const char *fmt, ...)
{
	int n = snprintf(err, errsize, "%s: ", t->path);
	va_list ap;

	if (n >= 0 && (size_t)n < errsize) {
		va_start(ap, fmt);
		vsnprintf(err + n, errsize - (size_t)n, fmt, ap);
		va_end(ap);
	}
	return -EBADMSG;
}

int trace_pread(const struct trace *t, void *buf, uint64_t size, uint64_t off, char *err, size_t errsize)
{
	char *p = buf;

	while (size > 0) {
		ssize_t n = pread(t->fd, p, MIN(size, (uint64_t)1 << 30), (off_t)off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0) {
			int e = errno;

			trace_refuse(t, err, errsize, "offset %llu: %s", (unsigned long long)off, strerror(e));
			return -e;
		}
		if (n == 0)
			return trace_refuse(t, err, errsize,
					    "offset %llu: the file ends here, %llu bytes short",
					    (unsigned long long)off, (unsigned long long)size);
		p += n;
		off += (uint64_t)n;
		size -= (uint64_t)n;
	}
	return 0;
}

static int check_crc(const struct trace *t, const struct trace_chunk *c, const void *data, char *err,
		     size_t errsize)
{
	uint32_t crc = crc32c(0, data, c->bytes);

	if (crc == c->crc)
		return 0;
	return trace_refuse(t, err, errsize,
			    "offset %llu: %s of lane %u, cut %u: CRC32C 0x%08x, the table says 0x%08x",
			    (unsigned long long)c->off, trace_kind_name(c->kind), c->lane, c->cut, crc, c->crc);
}

int trace_read_checked(const struct trace *t, const struct trace_chunk *c, void *buf, char *err, size_t errsize)
{
	int r = trace_pread(t, buf, c->bytes, c->off, err, errsize);

	return r < 0 ? r : check_crc(t, c, buf, err, errsize);
}

static const struct trace_chunk *find(const struct trace *t, uint32_t kind, uint32_t lane, uint32_t cut,
				      char *err, size_t errsize)
{
	const struct trace_chunk *c = trace_find(t, kind, lane, cut);
	const char *name = trace_kind_name(kind);

	if (!c)
		snprintf(err, errsize, "%s: no %s of lane %u, cut %u in this file", t->path,
			 name ? name : "chunk", lane, cut);
	return c;
}

int trace_read(const struct trace *t, uint32_t kind, uint32_t lane, uint32_t cut, void *buf, char *err,
	       size_t errsize)
{
	const struct trace_chunk *c = find(t, kind, lane, cut, err, errsize);

	return c ? trace_read_checked(t, c, buf, err, errsize) : -ENOENT;
}

int trace_map(const struct trace *t, uint32_t kind, uint32_t lane, uint32_t cut, struct trace_view *ret,
	      char *err, size_t errsize)
{
	const struct trace_chunk *c = find(t, kind, lane, cut, err, errsize);
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), from;
	struct trace_view v;
	int r;

	if (!c)
		return -ENOENT;
	from = c->off / page * page;
	v.bytes = c->bytes;
	v.map_bytes = c->off - from + c->bytes;
	v.map = mmap(NULL, v.map_bytes, PROT_READ, MAP_SHARED, t->fd, (off_t)from);
	if (v.map == MAP_FAILED) {
		r = -errno;
		trace_refuse(t, err, errsize, "offset %llu: map: %s", (unsigned long long)c->off, strerror(-r));
		return r;
	}
	v.data = (const char *)v.map + (c->off - from);
	r = check_crc(t, c, v.data, err, errsize);
	if (r < 0)
		munmap(v.map, v.map_bytes);
	else
		*ret = v;
	return r;
}

void trace_unmap(struct trace_view *v)
{
	if (!v || !v->map)
		return;
	munmap(v->map, v->map_bytes);
	*v = (struct trace_view){0};
}
