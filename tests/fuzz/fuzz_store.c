/* SPDX-License-Identifier: MIT */
/*
 * A whole container file: superblocks, heads, live maps, tables and feet of a real store are changed and (byte
 * 0) sealed again, the file perhaps cut short; then it is opened, scanned, read, written to and swept. It is
 * refused with one line, or every page found lies in its segment, in no other's place, reads back, and is not
 * overwritten.
 *
 * The tier is the real one. Its engine here does everything at once, and its staging memory is kept between
 * inputs.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include "shm/bits.h"
#include "shm/crc.h"
#include "tiers/nvme.h"

#define SEGMENTS 8u
#define UNITS 64u
#define SEGMENT (UNITS * (uint64_t)KVT_UNIT)
#define BYTES (NVME_PREAMBLE + SEGMENTS * SEGMENT)
#define ALL_UNITS (BYTES / KVT_UNIT)
#define ARENA (UINT64_C(8) << 20)
#define PAGES 24u
#define MAX_FOUND 512u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char dir[64], path[96];
static uint8_t *image; /* the good store */
static int file = -1;
static uint64_t dirty[ALL_UNITS / 64 + 1];
static uint32_t meta[ALL_UNITS]; /* units that are no pages */
static uint32_t n_meta;
static struct {
	tier_addr addr;
	uint32_t bytes;
} found[MAX_FOUND];
static uint32_t n_found;
static uint64_t taken[SEGMENTS];

static void must(int ok, const char *what)
{
	if (!ok) {
		fprintf(stderr, "must hold: %s\n", what);
		abort();
	}
}

/* ---- in place of tiers/nvme_stage.c ----------------------------------------------------- */

int nvme_stage_open(struct nvme *t, size_t bytes)
{
	static _Alignas(KVT_UNIT) char arena[ARENA];

	must(bytes <= sizeof(arena), "the arena is as large as asked for");
	t->arena = arena;
	t->arena_bytes = sizeof(arena);
	t->slabs = ARENA / NVME_SLAB;
	t->slab = calloc(t->slabs, sizeof(*t->slab));
	for (unsigned i = 0; i < t->slabs; i++) {
		t->slab[i].mem = arena + (size_t)i * NVME_SLAB;
		t->slab[i].next_free = t->free_slabs;
		t->free_slabs = &t->slab[i];
	}
	return 0;
}

void nvme_stage_close(struct nvme *t)
{
	free(t->slab);
	t->arena = NULL;
}

/* One buffer a slab. */
void *nvme_stage_get(struct nvme *t, struct nvme_slab **current, uint32_t units, enum nvme_slab_kind kind)
{
	struct nvme_slab *s = t->free_slabs;

	if (!s)
		return NULL;
	t->free_slabs = s->next_free;
	s->kind = (uint8_t)kind;
	s->units = units;
	s->refs = 1;
	s->current = NULL;
	*current = s;
	return s->mem;
}

void nvme_stage_put(struct nvme *t, struct nvme_slab *s, unsigned refs)
{
	s->refs -= refs;
	if (s->refs)
		return;
	s->next_free = t->free_slabs;
	t->free_slabs = s;
}

/* ---- an engine that does everything at once --------------------------------------------- */

struct engine {
	struct io_engine e;
	struct io_cfg cfg;
	struct io_queue done;
};

static int engine_open(struct io_engine **ret, const struct io_cfg *cfg, char *note, size_t notesize)
{
	struct engine *e = calloc(1, sizeof(*e));
	extern const struct io_ops engine_ops;

	must(e != NULL, "memory");
	e->e.ops = &engine_ops;
	e->cfg = *cfg;
	io_queue_init(&e->done);
	*note = 0;
	*ret = &e->e;
	return 0;
}

static void engine_submit(struct io_engine *io, struct io_req *list)
{
	struct engine *e = (struct engine *)io;

	while (list) {
		struct io_req *r = list;
		ssize_t n = 0;

		list = r->next;
		must(r->op == IO_SYNC ||
			     (r->off % KVT_UNIT == 0 && r->len % KVT_UNIT == 0 && r->off + r->len <= BYTES),
		     "requests lie in the file");
		if (r->op == IO_READ) {
			n = pread(e->cfg.fd[r->file], r->buf, r->len, (off_t)r->off);
		} else if (r->op == IO_WRITE) {
			must(r->off >= NVME_PREAMBLE, "superblocks are not the log's");
			bits_set_range(dirty, (uint32_t)(r->off / KVT_UNIT),
				       (uint32_t)((r->off + r->len) / KVT_UNIT));
			n = pwrite(e->cfg.fd[r->file], r->buf, r->len, (off_t)r->off);
		}
		r->res = r->op == IO_SYNC || n == (ssize_t)r->len ? 0 : -EIO;
		io_queue_add(&e->done, r);
		(void)eventfd_write(e->cfg.event_fd, 1);
	}
}

static struct io_req *engine_reap(struct io_engine *io)
{
	struct engine *e = (struct engine *)io;
	struct io_req *r = e->done.head;

	io_queue_init(&e->done);
	return r;
}

static int engine_close(struct io_engine *io, unsigned timeout_ms)
{
	free(io);
	return 0;
}

extern const struct io_ops engine_ops;
const struct io_ops engine_ops = {"fuzz", engine_open, engine_submit, engine_reap, engine_close};

static int open_store(struct tier **ret, char *err, size_t errsize)
{
	const struct tier_cfg cfg = {
		.path = dir, .size = SEGMENTS * SEGMENT, .segment = SEGMENT, .staging = ARENA, .depth = 8};
	const struct nvme_knobs knobs = {.engine = &engine_ops};

	return nvme_open_with(ret, &cfg, &knobs, err, errsize);
}

/* ---- pages ------------------------------------------------------------------------------- */

/* Write one page; its place, or TIER_ADDR_NONE. */
static tier_addr write_page(struct tier *t, uint32_t no, uint32_t bytes)
{
	static uint64_t pos[40];
	const struct seq_record seq = {.key = {(uint8_t)(1 + no / 8)}, .model = 5, .lanes = 4, .born_lo = 900};
	struct tier_io io = {.op = TIER_WRITE, .bytes = bytes, .life = no % 2, .seq = &seq}, *p = &io, *done;

	memset(pos, 0, sizeof(pos));
	for (uint32_t i = 0; i < 40; i++)
		bits_set(pos, no % 2 ? i * 61 : i);
	io.meta = (struct page_meta){
		.id = {.page = no, .rows = 40}, .bytes = bytes, .pos_words = no % 3 ? 40 : 0, .pos = pos};
	if (t->ops->prepare(t, &io) < 0)
		return TIER_ADDR_NONE;
	memset(io.buf, (int)no, bytes);
	t->ops->submit(t, &p, 1);
	for (int i = 0; !t->ops->reap(t, &done, 1); i++)
		must(i < 10, "a write ends");
	t->ops->release(t, &io);
	return io.res ? TIER_ADDR_NONE : io.addr;
}

static void read_page(struct tier *t, tier_addr addr, uint32_t bytes)
{
	struct tier_io io = {.op = TIER_READ, .bytes = bytes, .addr = addr}, *p = &io, *done;
	volatile uint8_t sum = 0;

	must(!t->ops->prepare(t, &io), "what was found has a place");
	t->ops->submit(t, &p, 1);
	for (int i = 0; !t->ops->reap(t, &done, 1); i++)
		must(i < 10, "a read ends");
	if (!io.res)
		for (uint32_t i = 0; i < bytes; i += 97)
			sum += ((uint8_t *)io.buf)[i];
	t->ops->release(t, &io);
}

static void mark(tier_addr addr, uint32_t bytes)
{
	uint32_t segment = (uint32_t)(addr >> 40), unit = (uint32_t)addr & 0xffff, n = nvme_page_units(bytes);

	must(segment < SEGMENTS && unit >= NVME_DATA_UNIT && unit + n < UNITS, "a page lies in its segment");
	for (uint32_t i = unit; i < unit + n; i++) {
		must(!(taken[segment] >> i & 1), "a place is one page's");
		taken[segment] |= UINT64_C(1) << i;
	}
}

static uint32_t refuse_every;

static bool on_found(void *arg, tier_addr addr, const struct page_meta *m, const struct seq_record *s)
{
	volatile uint32_t sum = 0;

	must(m->bytes && m->bytes <= TIER_MAX_PAGE && m->pos_words <= NVME_MAX_POS_WORDS &&
		     !m->pos == !m->pos_words,
	     "what is found is described within limits");
	for (uint32_t i = 0; i < m->pos_words; i++)
		sum += (uint32_t)m->pos[i];
	for (size_t i = 0; s && i < sizeof(*s); i++)
		sum += ((const uint8_t *)s)[i];
	if ((refuse_every && m->id.page % refuse_every == 0) || n_found == MAX_FOUND)
		return false;
	mark(addr, m->bytes);
	found[n_found].addr = addr;
	found[n_found++].bytes = m->bytes;
	return true;
}

static bool on_moved(void *arg, const struct page_meta *m, tier_addr from, tier_addr to)
{
	return true;
}

static void use(struct tier *t)
{
	memset(taken, 0, sizeof(taken));
	n_found = 0;
	if (t->ops->scan(t, on_found, NULL) < 0)
		return;
	for (uint32_t i = 0; i < n_found; i++)
		read_page(t, found[i].addr, found[i].bytes);
	for (uint32_t i = 0; i < 4; i++) {
		tier_addr at = write_page(t, 100 + i, 6000);

		if (at != TIER_ADDR_NONE)
			mark(at, 6000);
	}
	for (uint32_t i = 0; i < n_found; i += 2)
		t->ops->free(t, found[i].addr, found[i].bytes);
	t->ops->tick(t, on_moved, NULL);
	(void)t->ops->sync(t);
	t->ops->tick(t, on_moved, NULL);
}

/* ---- the image ---------------------------------------------------------------------------- */

static void end(void)
{
	unlink(path);
	rmdir(dir);
}

/* A store of a few sealed segments, some pages of which died later. */
static void prepare(void)
{
	const char *base = access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
	tier_addr at[PAGES];
	struct tier *t;
	char err[256];

	snprintf(dir, sizeof(dir), "%s/kvt-fuzz-XXXXXX", base);
	must(mkdtemp(dir) != NULL, "a folder");
	snprintf(path, sizeof(path), "%s/kvtier-000.dat", dir);
	atexit(end);
	must(!open_store(&t, err, sizeof(err)), err);
	for (uint32_t i = 0; i < PAGES; i++)
		at[i] = write_page(t, i, 3000 + i * 1500);
	must(!t->ops->sync(t), "the store is flushed");
	for (uint32_t i = 0; i < PAGES; i += 5)
		t->ops->free(t, at[i], 3000 + i * 1500);
	must(!t->ops->sync(t), "the store is flushed");
	t->ops->close(t);
	image = aligned_alloc(KVT_UNIT, BYTES);
	file = open(path, O_RDWR | O_CLOEXEC);
	must(image && file >= 0 && pread(file, image, BYTES, 0) == (ssize_t)BYTES, "the file reads");
	meta[n_meta++] = 0;
	meta[n_meta++] = NVME_SUPER_B / KVT_UNIT;
	for (uint32_t s = 0; s < SEGMENTS; s++) {
		uint32_t first = NVME_PREAMBLE / KVT_UNIT + s * UNITS;
		const struct nvme_foot *f = (void *)(image + (first + UNITS - 1) * (size_t)KVT_UNIT);

		if (f->tag.magic != NVME_MAGIC_FOOT)
			continue;
		for (uint32_t u = 0; u < NVME_DATA_UNIT; u++)
			meta[n_meta++] = first + u;
		for (uint32_t u = UNITS - 1 - f->table_units; u < UNITS; u++)
			meta[n_meta++] = first + u;
	}
	must(n_meta > 8, "segments are sealed");
	memset(dirty, 0xff, sizeof(dirty));
}

/* The good store again, where the last input or the tier wrote. */
static void restore(void)
{
	must(!ftruncate(file, BYTES), "the file's size");
	bits_set(dirty, 0);
	bits_set(dirty, NVME_SUPER_B / KVT_UNIT);
	for (uint32_t u = 0; u < ALL_UNITS; u++)
		if (bits_test(dirty, u))
			must(pwrite(file, image + u * (size_t)KVT_UNIT, KVT_UNIT, (off_t)u * KVT_UNIT) ==
				     KVT_UNIT,
			     "a write");
	memset(dirty, 0, sizeof(dirty));
}

static uint8_t *changed(uint32_t unit)
{
	static _Alignas(8) uint8_t buf[KVT_UNIT];

	must(pread(file, buf, KVT_UNIT, (off_t)unit * KVT_UNIT) == KVT_UNIT, "a read");
	bits_set(dirty, unit);
	return buf;
}

static void store(const uint8_t *buf, uint32_t unit)
{
	must(pwrite(file, buf, KVT_UNIT, (off_t)unit * KVT_UNIT) == KVT_UNIT, "a write");
}

static void seal(uint8_t *buf)
{
	static const uint32_t zero;
	struct nvme_tag *tag = (void *)buf;
	uint32_t crc = crc32c(0, buf, offsetof(struct nvme_tag, crc));

	crc = crc32c(crc, &zero, sizeof(zero));
	tag->crc = crc32c(crc, buf + sizeof(*tag), KVT_UNIT - sizeof(*tag));
}

/* Checksums of what was changed; a table's is in its foot. */
static void seal_all(void)
{
	static uint8_t table[UNITS * KVT_UNIT];

	for (uint32_t i = 0; i < n_meta; i++) {
		uint8_t *b;

		if (!bits_test(dirty, meta[i]) ||
		    !((struct nvme_tag *)(image + meta[i] * (size_t)KVT_UNIT))->magic)
			continue;
		b = changed(meta[i]);
		seal(b);
		store(b, meta[i]);
	}
	for (uint32_t s = 0; s < SEGMENTS; s++) {
		uint32_t last = NVME_PREAMBLE / KVT_UNIT + (s + 1) * UNITS - 1;
		struct nvme_foot *f = (void *)changed(last);
		size_t n = MIN(f->table_units, UNITS - 1) * (size_t)KVT_UNIT;

		if (f->tag.magic != NVME_MAGIC_FOOT)
			continue;
		must(pread(file, table, n, (off_t)last * KVT_UNIT - (off_t)n) == (ssize_t)n, "a read");
		f->table_crc = crc32c(0, table, n);
		seal((uint8_t *)f);
		store((uint8_t *)f, last);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char err[256] = "";
	struct tier *t;

	if (!image)
		prepare();
	restore();
	if (size < 2)
		return 0;
	for (size_t i = 2; i + 8 <= size; i += 8) {
		uint32_t unit = meta[data[i] % n_meta], value;
		uint16_t at, span = data[i + 1] & 0x80 ? KVT_UNIT : 128; /* fields come first */
		uint8_t *b = changed(unit);

		memcpy(&at, data + i + 2, 2);
		memcpy(&value, data + i + 4, 4);
		memcpy(b + at % (span - 3), &value, 1u << data[i + 1] % 3);
		store(b, unit);
	}
	if (data[0] & 1)
		seal_all();
	if (data[0] & 2)
		must(!ftruncate(file, (off_t)(BYTES - data[1] * UINT64_C(9000))), "the file's size");
	refuse_every = data[0] >> 4;
	if (open_store(&t, err, sizeof(err)) < 0) {
		must(*err && !strchr(err, '\n'), "a refusal is one line");
		return 0;
	}
	use(t);
	t->ops->close(t);
	return 0;
}
