/* SPDX-License-Identifier: MIT */
/*
 * Traces from a stranger: nothing that trace_open() accepts may make a read
 * leave the file or a buffer, and nothing that it refuses may go without a reason.
 *
 * No mutation finds a CRC32C by itself. So an input is either a file as it is
 * (first byte even), or patches to a valid file: byte 1 cuts that many bytes off,
 * then every six bytes are a 16-bit place (the upper half of them means the table)
 * and a 32-bit value to put there, after which header, table and chunks are sealed again.
 */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include "policy/trace.h"
#include "shm/crc.h"
#include "shm/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { ROWS = 9, LANES = 2, DIM = 4 };

static char image[16384], path[64];
static size_t image_size;
static int fd = -1;

/* A valid file, read back into `image`. */
static void make_image(void)
{
	static const struct trace_cut cuts[] = {{.prompt = 5, .queries = 4},
						{.prompt = 3, .queries = 9, .flags = 2}};
	struct trace_header h = {.model = "m",
				 .layers = 1,
				 .heads = LANES,
				 .group = 2,
				 .k_dim = DIM,
				 .v_dim = DIM,
				 .dtype = TRACE_F32,
				 .rope_type = TRACE_ROPE_HALF,
				 .rope_theta = 1e4f,
				 .rows = ROWS,
				 .cuts = 2};
	static float rows[2 * ROWS * DIM];
	char tmp[] = "/tmp/fuzz_trace.XXXXXX", err[256];
	struct trace_writer *w;
	FILE *f;

	for (size_t i = 0; i < ARRAY_SIZE(rows); i++)
		rows[i] = (float)i / 7;
	fd = mkstemp(tmp);
	if (fd < 0 || trace_writer_open(&w, tmp, &h, cuts, err, sizeof(err)) < 0)
		abort();
	close(fd);
	for (uint32_t kind = TRACE_TOKENS; kind < TRACE_GRAM; kind++)
		for (uint32_t lane = 0; lane < (trace_kind_lanes(kind) ? LANES : 1u); lane++)
			for (uint32_t cut = 0; cut < (trace_kind_cuts(kind) ? 2u : 1u); cut++)
				if (trace_writer_chunk(w, kind, lane, cut, rows) < 0)
					abort();
	if (trace_writer_finish(w, 0) < 0)
		abort();
	f = fopen(tmp, "r");
	image_size = f ? fread(image, 1, sizeof(image), f) : 0;
	if (!image_size)
		abort();
	fclose(f);
	unlink(tmp);
	fd = memfd_create("trace", 0);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
}

static void use(const struct trace *t)
{
	char err[512];
	float *umax = malloc(t->h.rows * sizeof(float) + 1);

	if (!umax)
		abort();
	for (uint32_t i = 0; i < t->h.chunks; i++) {
		const struct trace_chunk *c = &t->chunk[i];
		void *buf = malloc(c->bytes); /* exact, so that one byte too far is seen */
		struct trace_view v;

		if (!buf || trace_find(t, c->kind, c->lane, c->cut) != c)
			abort();
		trace_read(t, c->kind, c->lane, c->cut, buf, err, sizeof(err));
		free(buf);
		if (trace_map(t, c->kind, c->lane, c->cut, &v, err, sizeof(err)) == 0)
			trace_unmap(&v);
	}
	for (uint32_t cut = 0; cut < t->h.cuts; cut++)
		trace_utility(t, 0, cut, umax, NULL, err, sizeof(err));
	trace_verify(t, err, sizeof(err));
	free(umax);
}

static void read_file(const void *file, size_t size)
{
	struct trace *t = NULL;
	char err[512] = "";

	if (ftruncate(fd, 0) < 0 || pwrite(fd, file, size, 0) != (ssize_t)size)
		abort();
	if (trace_open(&t, path, err, sizeof(err)) == 0) {
		use(t);
		trace_free(t);
	} else if (t || !*err) {
		abort();
	}
}

static void seal(char *file, size_t size)
{
	struct trace_header h;
	size_t table;

	if (size < sizeof(h))
		return;
	memcpy(&h, file, sizeof(h));
	if (h.table_off > size || h.chunks > (size - h.table_off) / sizeof(struct trace_chunk))
		return;
	table = h.chunks * sizeof(struct trace_chunk);
	for (uint32_t i = 0; i < h.chunks; i++) {
		char *at = file + h.table_off + i * sizeof(struct trace_chunk);
		struct trace_chunk c;

		memcpy(&c, at, sizeof(c));
		if (c.off > size || c.bytes > size - c.off)
			continue;
		c.crc = crc32c(0, file + c.off, c.bytes);
		memcpy(at, &c, sizeof(c));
	}
	h.crc = 0;
	h.crc = crc32c(crc32c(0, &h, sizeof(h)), file + h.table_off, table);
	memcpy(file, &h, sizeof(h));
}

static void read_patched(const uint8_t *data, size_t size)
{
	static char file[sizeof(image)];
	size_t n = image_size - (size ? data[0] % 128 : 0), table = ((struct trace_header *)image)->table_off;

	memcpy(file, image, image_size);
	for (size_t i = 1; i + 6 <= size; i += 6) {
		uint16_t at;

		memcpy(&at, data + i, 2);
		memcpy(at & 0x8000 ? file + table + at % (n - table - 4) : file + at % (n - 4), data + i + 2,
		       4);
	}
	seal(file, n);
	read_file(file, n);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (fd < 0)
		make_image();
	if (size > 0 && data[0] % 2)
		read_patched(data + 1, size - 1);
	else
		read_file(data + (size > 0), size - (size > 0));
	return 0;
}
