/* SPDX-License-Identifier: MIT */
/* Opening .kvtr files: every field of header, table and cuts is checked before anything follows from it. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include "policy/trace.h"
#include "policy/trace_io.h"
#include "shm/crc.h"
#include "shm/util.h"

#define AT(field) offsetof(struct trace_header, field)
#define IN_TABLE(t, i, field)                                                                                  \
	((t)->h.table_off + (i) * sizeof(struct trace_chunk) + offsetof(struct trace_chunk, field))

static int must_be(const struct trace *t, uint64_t off, const char *field, uint64_t v, uint64_t must, char *err,
		   size_t errsize)
{
	if (v == must)
		return 0;
	return trace_refuse(t, err, errsize, "offset %llu: %s: %llu, must be %llu", (unsigned long long)off,
			    field, (unsigned long long)v, (unsigned long long)must);
}

/* Most chunks that a file with this header can have. */
static uint32_t most_chunks(const struct trace_header *h)
{
	return 2 + h->layers * h->heads * (TRACE_KINDS + 2 * h->cuts);
}

/* `size` is what the file system says the file has. */
static int check_header(const struct trace *t, uint64_t size, char *err, size_t errsize)
{
	const struct trace_header *h = &t->h;
	char why[256];
	int r;

	if (memcmp(h->magic, TRACE_MAGIC, sizeof(h->magic)) != 0)
		return trace_refuse(t, err, errsize, "offset 0: magic: not %s, this is no trace", TRACE_MAGIC);
	r = must_be(t, AT(version), "version", h->version, TRACE_VERSION, err, errsize);
	if (r == 0)
		r = must_be(t, AT(header_size), "header_size", h->header_size, TRACE_HEADER, err, errsize);
	if (r == 0)
		r = must_be(t, AT(file_size), "file_size", h->file_size, size, err, errsize);
	if (r < 0)
		return r;
	if (trace_check_header(h, why, sizeof(why)) < 0)
		return trace_refuse(t, err, errsize, "%s", why);
	if (h->chunks < 1 || h->chunks > most_chunks(h))
		return trace_refuse(t, err, errsize, "offset %zu: chunks: %u, must be 1..%u", AT(chunks),
				    h->chunks, most_chunks(h));
	if (h->table_off % TRACE_ALIGN || h->table_off < TRACE_HEADER)
		return trace_refuse(t, err, errsize,
				    "offset %zu: table_off: %llu, must be a multiple of %u from %u on",
				    AT(table_off), (unsigned long long)h->table_off, TRACE_ALIGN, TRACE_HEADER);
	if (h->table_off > size || size - h->table_off != h->chunks * sizeof(struct trace_chunk))
		return trace_refuse(
			t, err, errsize,
			"offset %zu: table_off: %llu, must leave %u chunks of %zu bytes before %llu",
			AT(table_off), (unsigned long long)h->table_off, h->chunks, sizeof(struct trace_chunk),
			(unsigned long long)size);
	return 0;
}

static int check_crc(const struct trace *t, char *err, size_t errsize)
{
	struct trace_header h = t->h;
	uint32_t crc;

	h.crc = 0;
	crc = crc32c(crc32c(0, &h, sizeof(h)), t->chunk, h.chunks * sizeof(*t->chunk));
	if (crc == t->h.crc)
		return 0;
	return trace_refuse(t, err, errsize, "offset %zu: crc: 0x%08x, header and table have 0x%08x", AT(crc),
			    t->h.crc, crc);
}

/* What can be said of a table entry without the cuts. */
static int check_place(const struct trace *t, uint32_t i, char *err, size_t errsize)
{
	const struct trace_chunk *c = &t->chunk[i];
	uint32_t lanes = trace_kind_lanes(c->kind) ? t->h.layers * t->h.heads : 1;
	uint32_t cuts = trace_kind_cuts(c->kind) ? t->h.cuts : 1;

	if (!trace_kind_name(c->kind))
		return trace_refuse(t, err, errsize, "offset %llu: chunk %u: kind: %u, must be 1..%u",
				    (unsigned long long)IN_TABLE(t, i, kind), i, c->kind, TRACE_KINDS - 1);
	if (c->lane >= lanes)
		return trace_refuse(t, err, errsize, "offset %llu: chunk %u: lane: %u, must be below %u",
				    (unsigned long long)IN_TABLE(t, i, lane), i, c->lane, lanes);
	if (c->cut >= cuts)
		return trace_refuse(t, err, errsize, "offset %llu: chunk %u: cut: %u, must be below %u",
				    (unsigned long long)IN_TABLE(t, i, cut), i, c->cut, cuts);
	if (c->off % TRACE_ALIGN || c->off < TRACE_HEADER || c->off > t->h.table_off)
		return trace_refuse(t, err, errsize,
				    "offset %llu: chunk %u: off: %llu, must be a multiple of %u in %u..%llu",
				    (unsigned long long)IN_TABLE(t, i, off), i, (unsigned long long)c->off,
				    TRACE_ALIGN, TRACE_HEADER, (unsigned long long)t->h.table_off);
	if (c->bytes > t->h.table_off - c->off)
		return trace_refuse(t, err, errsize, "offset %llu: chunk %u: bytes: %llu, must end before %llu",
				    (unsigned long long)IN_TABLE(t, i, bytes), i, (unsigned long long)c->bytes,
				    (unsigned long long)t->h.table_off);
	return 0;
}

static int check_bytes(const struct trace *t, uint32_t i, char *err, size_t errsize)
{
	const struct trace_chunk *c = &t->chunk[i];
	const struct trace_cut *cut = trace_kind_cuts(c->kind) ? &t->cut[c->cut] : NULL;
	uint64_t must = trace_chunk_bytes(&t->h, c->kind, cut);

	if (must && c->bytes == must)
		return 0;
	return trace_refuse(t, err, errsize,
			    "offset %llu: chunk %u (%s, lane %u, cut %u): bytes: %llu, must be %llu",
			    (unsigned long long)IN_TABLE(t, i, bytes), i, trace_kind_name(c->kind), c->lane,
			    c->cut, (unsigned long long)c->bytes, (unsigned long long)must);
}

/* The cuts must be known before the sizes of utilities can be checked; the table is still in the file's order.
 */
static int read_cuts(struct trace *t, char *err, size_t errsize)
{
	const struct trace_chunk *c = NULL;
	char why[256];
	int r;

	if (!t->h.cuts)
		return 0;
	for (uint32_t i = 0; i < t->h.chunks && !c; i++)
		if (t->chunk[i].kind == TRACE_CUTS)
			c = &t->chunk[i];
	if (!c)
		return trace_refuse(t, err, errsize, "offset %zu: cuts: %u, but there is no CUTS chunk",
				    AT(cuts), t->h.cuts);
	r = check_bytes(t, (uint32_t)(c - t->chunk), err, errsize);
	if (r < 0)
		return r;
	t->cut = malloc(c->bytes);
	if (!t->cut)
		return -ENOMEM;
	r = trace_read_checked(t, c, t->cut, err, errsize);
	for (uint32_t i = 0; r == 0 && i < t->h.cuts; i++)
		if (trace_check_cut(&t->h, &t->cut[i], i, why, sizeof(why)) < 0)
			r = trace_refuse(t, err, errsize, "offset %llu: %s",
					 (unsigned long long)c->off + i * sizeof(*t->cut), why);
	return r;
}

static int by_place(const void *a, const void *b)
{
	const struct trace_chunk *x = a, *y = b;

	return (x->off > y->off) - (x->off < y->off);
}

static int by_key(const void *a, const void *b)
{
	const struct trace_chunk *x = a, *y = b;

	if (x->kind != y->kind)
		return x->kind < y->kind ? -1 : 1;
	if (x->cut != y->cut)
		return x->cut < y->cut ? -1 : 1;
	return (x->lane > y->lane) - (x->lane < y->lane);
}

/* Chunks follow each other from the header to the table, each from the next multiple of TRACE_ALIGN. Sorts by
 * place. */
static int check_order(struct trace *t, char *err, size_t errsize)
{
	uint64_t end = TRACE_HEADER, next = TRACE_HEADER;

	qsort(t->chunk, t->h.chunks, sizeof(*t->chunk), by_place);
	for (uint32_t i = 0; i <= t->h.chunks; i++) {
		const struct trace_chunk *c = i < t->h.chunks ? &t->chunk[i] : NULL;
		uint64_t off = c ? c->off : t->h.table_off;
		const char *name = c ? trace_kind_name(c->kind) : "the table";

		if (off < end)
			return trace_refuse(t, err, errsize, "offset %llu: %s overlaps what ends at %llu",
					    (unsigned long long)off, name, (unsigned long long)end);
		if (off != next)
			return trace_refuse(t, err, errsize, "offset %llu: %s begins here, must begin at %llu",
					    (unsigned long long)off, name, (unsigned long long)next);
		end = off + (c ? c->bytes : 0);
		next = ALIGN_UP(end, (uint64_t)TRACE_ALIGN);
	}
	return 0;
}

/* None twice. Sorts the table by key. */
static int check_keys(struct trace *t, char *err, size_t errsize)
{
	const struct trace_chunk *c = t->chunk;

	qsort(t->chunk, t->h.chunks, sizeof(*t->chunk), by_key);
	for (uint32_t i = 1; i < t->h.chunks; i++)
		if (by_key(&c[i], &c[i - 1]) == 0)
			return trace_refuse(t, err, errsize, "offset %llu: a second %s of lane %u, cut %u",
					    (unsigned long long)MAX(c[i].off, c[i - 1].off),
					    trace_kind_name(c[i].kind), c[i].lane, c[i].cut);
	return 0;
}

static int load(struct trace *t, char *err, size_t errsize)
{
	struct stat st;
	int r;

	if (fstat(t->fd, &st) < 0)
		return -errno;
	if (!S_ISREG(st.st_mode))
		return trace_refuse(t, err, errsize, "offset 0: type: not a regular file, must be one");
	if (st.st_size < TRACE_HEADER)
		return trace_refuse(t, err, errsize,
				    "offset %lld: size: file ends here, must have at least %u bytes",
				    (long long)st.st_size, TRACE_HEADER);
	r = trace_pread(t, &t->h, sizeof(t->h), 0, err, errsize);
	if (r == 0)
		r = check_header(t, (uint64_t)st.st_size, err, errsize);
	if (r < 0)
		return r;
	t->chunk = malloc(t->h.chunks * sizeof(*t->chunk));
	if (!t->chunk)
		return -ENOMEM;
	r = trace_pread(t, t->chunk, t->h.chunks * sizeof(*t->chunk), t->h.table_off, err, errsize);
	if (r == 0)
		r = check_crc(t, err, errsize);
	for (uint32_t i = 0; r == 0 && i < t->h.chunks; i++)
		r = check_place(t, i, err, errsize);
	if (r == 0)
		r = read_cuts(t, err, errsize);
	for (uint32_t i = 0; r == 0 && i < t->h.chunks; i++)
		r = check_bytes(t, i, err, errsize);
	if (r == 0)
		r = check_order(t, err, errsize);
	return r < 0 ? r : check_keys(t, err, errsize);
}

int trace_open(struct trace **ret, const char *path, char *err, size_t errsize)
{
	struct trace *t = calloc(1, sizeof(*t));
	int r;

	snprintf(err, errsize, "%s", "");
	if (!t)
		return -ENOMEM;
	/* O_NONBLOCK: opening a fifo must not hang; it is refused as no regular file. */
	t->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	r = t->fd < 0 ? -errno : 0;
	t->path = strdup(path);
	if (r == 0)
		r = t->path ? load(t, err, errsize) : -ENOMEM;
	if (r < 0) {
		if (!*err)
			snprintf(err, errsize, "%s: %s", path, strerror(-r));
		trace_free(t);
		return r;
	}
	*ret = t;
	return 0;
}

void trace_free(struct trace *t)
{
	if (!t)
		return;
	close_fdp(&t->fd);
	free(t->path);
	free(t->cut);
	free(t->chunk);
	free(t);
}

const struct trace_chunk *trace_find(const struct trace *t, uint32_t kind, uint32_t lane, uint32_t cut)
{
	struct trace_chunk key = {.kind = kind, .lane = lane, .cut = cut};

	return bsearch(&key, t->chunk, t->h.chunks, sizeof(key), by_key);
}
