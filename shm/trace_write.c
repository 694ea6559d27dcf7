/* SPDX-License-Identifier: MIT */
/*
 * Writing .kvtr files. Each chunk is one checksum and one pwrite of the caller's
 * bytes; the gaps up to the next multiple of 64 are never written and read as zeros.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include "shm/bits.h"
#include "shm/crc.h"
#include "shm/trace.h"
#include "shm/util.h"

struct trace_writer {
	int fd;
	bool made; /* tmp is there */
	char *path, *tmp;
	struct trace_header h;
	struct trace_cut *cut;     /* [h.cuts] */
	struct trace_chunk *chunk; /* [h.chunks], room for `room` */
	uint32_t room;
	uint64_t end;      /* bytes of the file so far */
	uint64_t *written; /* a bit for each chunk that the file may have */
	int failed;        /* the first error: the file cannot become complete any more */
};

static int write_at(int fd, const void *buf, uint64_t size, uint64_t off)
{
	const char *p = buf;

	while (size > 0) {
		ssize_t n = pwrite(fd, p, MIN(size, (uint64_t)1 << 30), (off_t)off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		p += n;
		off += (uint64_t)n;
		size -= (uint64_t)n;
	}
	return 0;
}

/* The bit of a chunk in `written`: those of the file, then those of each lane, of each cut. */
static uint32_t chunk_bit(const struct trace_header *h, uint32_t kind, uint32_t lane, uint32_t cut)
{
	uint32_t per_lane = TRACE_KINDS, lanes = h->layers * h->heads;

	if (trace_kind_cuts(kind))
		return per_lane * (1 + lanes) + ((cut * lanes) + lane) * 2 + (kind == TRACE_UMAX);
	return trace_kind_lanes(kind) ? per_lane * (1 + lane) + kind : kind;
}

static int put_chunk(struct trace_writer *w, uint32_t kind, uint32_t lane, uint32_t cut, const void *data,
		     uint64_t bytes)
{
	uint64_t off = ALIGN_UP(w->end, (uint64_t)TRACE_ALIGN);
	uint32_t bit = chunk_bit(&w->h, kind, lane, cut);
	int r;

	if (w->h.chunks == w->room) {
		uint32_t room = w->room ? 2 * w->room : 256;
		struct trace_chunk *more = realloc(w->chunk, room * sizeof(*more));

		if (!more)
			return -ENOMEM;
		w->chunk = more;
		w->room = room;
	}
	r = write_at(w->fd, data, bytes, off);
	if (r < 0)
		return r;
	bits_set(w->written, bit);
	w->chunk[w->h.chunks++] = (struct trace_chunk){.kind = kind,
						       .lane = lane,
						       .cut = cut,
						       .crc = crc32c(0, data, bytes),
						       .off = off,
						       .bytes = bytes};
	w->end = off + bytes;
	return 0;
}

static int open_file(struct trace_writer *w, const char *path)
{
	w->path = strdup(path);
	if (!w->path)
		return -ENOMEM;
	if (asprintf(&w->tmp, "%s.XXXXXX", path) < 0) {
		w->tmp = NULL;
		return -ENOMEM;
	}
	w->fd = mkostemp(w->tmp, O_CLOEXEC);
	w->made = w->fd >= 0;
	return w->made ? 0 : -errno;
}

static int check(const char *path, const struct trace_header *h, const struct trace_cut *cuts, char *err,
		 size_t errsize)
{
	char why[256];
	int r = trace_check_header(h, why, sizeof(why));

	for (uint32_t i = 0; r == 0 && i < h->cuts; i++)
		r = trace_check_cut(h, &cuts[i], i, why, sizeof(why));
	if (r < 0)
		snprintf(err, errsize, "%s: %s", path, why);
	return r;
}

int trace_writer_open(struct trace_writer **ret, const char *path, const struct trace_header *h,
		      const struct trace_cut *cuts, char *err, size_t errsize)
{
	uint32_t bits;
	struct trace_writer *w;
	int r = check(path, h, cuts, err, errsize);

	if (r < 0)
		return r;
	w = calloc(1, sizeof(*w));
	if (!w)
		return -ENOMEM;
	w->fd = -1;
	w->h = *h;
	w->h.chunks = 0;
	w->end = TRACE_HEADER;
	bits = chunk_bit(h, TRACE_UMAX, 0, h->cuts) + 1;
	w->written = calloc(BITS_WORDS(bits), sizeof(*w->written));
	w->cut = calloc(MAX(h->cuts, 1u), sizeof(*w->cut));
	r = w->written && w->cut ? open_file(w, path) : -ENOMEM;
	if (r == 0 && h->cuts) {
		memcpy(w->cut, cuts, h->cuts * sizeof(*cuts));
		r = put_chunk(w, TRACE_CUTS, 0, 0, w->cut, h->cuts * sizeof(*cuts));
	}
	if (r < 0) {
		snprintf(err, errsize, "%s: %s", path, strerror(-r));
		trace_writer_abort(w);
		return r;
	}
	*ret = w;
	return 0;
}

uint64_t trace_writer_bytes(const struct trace_writer *w, uint32_t kind, uint32_t cut)
{
	if (kind == TRACE_CUTS || cut >= (trace_kind_cuts(kind) ? w->h.cuts : 1))
		return 0;
	return trace_chunk_bytes(&w->h, kind, &w->cut[cut]);
}

int trace_writer_chunk(struct trace_writer *w, uint32_t kind, uint32_t lane, uint32_t cut, const void *data)
{
	uint64_t bytes = trace_writer_bytes(w, kind, cut);

	if (w->failed)
		return w->failed;
	if (!bytes || lane >= (trace_kind_lanes(kind) ? w->h.layers * w->h.heads : 1) ||
	    bits_test(w->written, chunk_bit(&w->h, kind, lane, cut)))
		return -EINVAL;
	w->failed = put_chunk(w, kind, lane, cut, data, bytes);
	return w->failed;
}

uint64_t trace_writer_size(const struct trace_writer *w)
{
	return w->end;
}

static int complete(struct trace_writer *w, int sync)
{
	struct trace_header *h = &w->h;
	uint64_t table = h->chunks * sizeof(*w->chunk);
	int r;

	if (!h->chunks)
		return -EINVAL;
	memcpy(h->magic, TRACE_MAGIC, sizeof(h->magic));
	h->version = TRACE_VERSION;
	h->header_size = TRACE_HEADER;
	h->table_off = ALIGN_UP(w->end, (uint64_t)TRACE_ALIGN);
	h->file_size = h->table_off + table;
	h->crc = 0;
	h->crc = crc32c(crc32c(0, h, sizeof(*h)), w->chunk, table);
	r = write_at(w->fd, w->chunk, table, h->table_off);
	if (r == 0)
		r = write_at(w->fd, h, sizeof(*h), 0);
	if (r == 0 && sync && fsync(w->fd) < 0)
		r = -errno;
	if (r == 0 && close(TAKE_FD(w->fd)) < 0) /* where NFS tells of a full disk */
		r = -errno;
	if (r == 0 && rename(w->tmp, w->path) < 0)
		r = -errno;
	return r;
}

int trace_writer_finish(struct trace_writer *w, int sync)
{
	int r = w->failed ? w->failed : complete(w, sync);

	if (r == 0)
		w->made = false;
	trace_writer_abort(w);
	return r;
}

void trace_writer_abort(struct trace_writer *w)
{
	if (!w)
		return;
	if (w->made)
		unlink(w->tmp);
	close_fdp(&w->fd);
	free(w->path);
	free(w->tmp);
	free(w->cut);
	free(w->chunk);
	free(w->written);
	free(w);
}
