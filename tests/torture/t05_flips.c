/* SPDX-License-Identifier: MIT */
/*
 * torture 5: a bit flipped in every byte of metadata and in 10,000 bits of data, on disk and in memory
 * pass: 100 % detected: a miss, or metadata that is ignored or made good by a copy; never wrong bytes
 * quick: one bit of every byte of each kind of structure, spread over the segments
 * full: every bit of every byte of all structures of all segments
 * io: both
 * plants: table-crc-skipped unit-crc-skipped crc-not-seeded dram-record-unchecked
 *
 * NVMe: a store with sealed segments of which some have one live map and some have two. In each round one bit
 * of every segment is flipped, and one in one superblock; then the store is opened and scanned. A flip in a
 * head, table or foot must make exactly the pages of that segment disappear; one in the newest map must show
 * the segment as the map before it, or the foot, has it; one in an older map nothing. With both superblocks
 * flipped the store must be refused. What is found must be described as it was written (nvme_fixture.h).
 *
 * DRAM: a segment that outlives its tier (tiers/dram_dir.h). A flip in a page's record must make that page
 * disappear, one in a sequence's record its pages, one in the head the segment, and nothing else.
 *
 * Data: a flipped bit must be a miss, and the page be right again when the bit is. A page read under an
 * identity with a flipped bit must be a miss, too.
 */
#include "many.h"

#include "disk_model.h"
#include "tests/unit/keeper.h"
#include "tests/unit/nvme_fixture.h"

enum { FLIPS, DETECTED, OLDER, OPENS, DATA, DATA_DETECTED, IDENT, IDENT_DETECTED };

static void flip(void *at, unsigned bit)
{
	((uint8_t *)at)[bit / 8] ^= (uint8_t)(1u << bit % 8);
}

/* ---- the store ---------------------------------------------------------------------------- */

#define SEGMENT (256u << 10)
#define SEG_UNITS (SEGMENT / KVT_UNIT)
#define SEGS 32u
#define PAGES 600u
#define NOT_DEAD 9u

struct target {
	uint32_t off; /* in the segment */
	uint8_t bit, part;
};

enum part { HEAD, NEWEST, OLDER_MAP, TABLE, FOOT, PARTS };

static struct store {
	struct fx *f;
	int fd;
	char *image;
	size_t bytes;
	uint8_t death[PAGES]; /* killed before the first or second map, or NOT_DEAD */
	tier_addr at[PAGES];
	struct target *target[SEGS];
	uint32_t targets[SEGS], maps[SEGS];
	bool sealed[SEGS];
} st;

static uint32_t seg_of(uint64_t no)
{
	return (uint32_t)(st.at[no] >> 40);
}

static char *seg_image(uint32_t s)
{
	return st.image + NVME_PREAMBLE + (size_t)s * SEGMENT;
}

/* Kill three pages of each segment that shall have this map, and write the maps. */
static void make_maps(unsigned nth)
{
	unsigned killed[SEGS] = {0};

	for (uint64_t no = 0; no < PAGES; no++) {
		uint32_t s = seg_of(no);

		if (s % 3 < nth || killed[s] == 3 || st.death[no] != NOT_DEAD)
			continue;
		killed[s]++;
		st.death[no] = (uint8_t)nth;
		fx_kill(st.f, no);
		st.maps[s] = nth;
	}
	assert_int_equal(st.f->t->ops->sync(st.f->t), 0);
}

static void put_target(uint32_t s, uint32_t off, unsigned bit, enum part part)
{
	st.target[s] = realloc(st.target[s], (st.targets[s] + 1) * sizeof(struct target));
	st.target[s][st.targets[s]++] = (struct target){off, (uint8_t)bit, (uint8_t)part};
}

/* Where the part lies in the segment; 0 bytes: it has none. */
static uint32_t part_of(uint32_t s, enum part part, uint32_t *ret_off)
{
	const struct nvme_foot *foot = (const void *)(seg_image(s) + SEGMENT - KVT_UNIT);
	uint32_t unit = part == NEWEST ? (st.maps[s] == 1 ? 2 : 1) : 2, units = 1;

	if (!st.sealed[s] || (part == NEWEST && !st.maps[s]) || (part == OLDER_MAP && st.maps[s] < 2))
		return 0;
	if (part == HEAD)
		unit = 0;
	if (part == FOOT)
		unit = SEG_UNITS - 1;
	if (part == TABLE) {
		units = foot->table_units;
		unit = SEG_UNITS - 1 - units;
	}
	*ret_off = unit * KVT_UNIT;
	return units * KVT_UNIT;
}

static void choose_targets(void)
{
	for (enum part part = 0; part < PARTS; part++) {
		uint32_t with[SEGS], n = 0, off, longest = 0;

		for (uint32_t s = 0; s < SEGS; s++) {
			uint32_t bytes = part_of(s, part, &off);

			longest = MAX(longest, bytes);
			if (bytes)
				with[n++] = s;
		}
		assert_true(n > 3);
		for (uint32_t i = 0; i < longest; i++)
			for (uint32_t k = 0; k < n; k++) {
				if ((!many_full() && k != i % n) || i >= part_of(with[k], part, &off))
					continue;
				for (unsigned bit = 0; bit < 8; bit++)
					if (many_full() || bit == fx_mix(i + part) % 8)
						put_target(with[k], off + i, bit, part);
			}
	}
}

/* Each process has a store of its own. */
static void store_new(const struct io_ops *engine)
{
	char path[128];
	struct stat file;

	memset(&st, 0, sizeof(st));
	st.f = fx_new_in(many_top);
	st.f->knobs.engine = engine;
	st.f->cfg.no_uring = many_threads();
	st.f->cfg.segment = SEGMENT;
	st.f->cfg.size = SEGS * SEGMENT;
	memset(st.death, NOT_DEAD, sizeof(st.death));
	disk_reset(1);
	fx_open(st.f);
	fx_write(st.f, PAGES, 7777, TIER_LONG, NULL);
	assert_int_equal(st.f->t->ops->sync(st.f->t), 0);
	for (uint64_t no = 0; no < PAGES; no++)
		st.at[no] = st.f->page[no].addr;
	make_maps(1);
	make_maps(2);
	fx_path(st.f, path, "kvtier-000.dat");
	st.fd = open(path, O_RDWR | O_CLOEXEC);
	assert_true(st.fd >= 0 && !fstat(st.fd, &file));
	st.bytes = (size_t)file.st_size;
	if (engine != &disk_ops)
		return;
	fx_close(st.f);
	st.image = malloc(st.bytes);
	assert_int_equal(pread(st.fd, st.image, st.bytes, 0), st.bytes);
	for (uint64_t no = 0; no < PAGES; no++)
		st.sealed[seg_of(no)] = true;
	choose_targets();
}

static void put_back(uint64_t off, size_t len)
{
	assert_int_equal(pwrite(st.fd, st.image + off, len, (off_t)off), len);
}

static void put_flipped(uint64_t off, unsigned bit)
{
	uint8_t b = (uint8_t)st.image[off];

	flip(&b, bit);
	assert_int_equal(pwrite(st.fd, &b, 1, (off_t)off), 1);
}

/* Must this page be found while that bit is wrong? */
static bool must_be_found(uint64_t no, const struct target *t)
{
	bool alive = st.death[no] == NOT_DEAD;

	if (!t || t->part == OLDER_MAP)
		return alive;
	return t->part == NEWEST && (alive || st.death[no] == st.maps[seg_of(no)]);
}

static void check_found(uint64_t round)
{
	bool wrong[SEGS] = {false};

	for (uint64_t no = 0; no < PAGES; no++) {
		uint32_t s = seg_of(no);
		const struct target *t = round < st.targets[s] ? &st.target[s][round] : NULL;

		if (st.f->page[no].found != must_be_found(no, t)) {
			wrong[s] = true;
			assert_non_null(t); /* a segment that nobody touched */
		}
	}
	for (uint32_t s = 0; s < SEGS; s++) {
		if (round >= st.targets[s])
			continue;
		many_count[FLIPS]++;
		many_count[DETECTED] += !wrong[s];
		many_count[OLDER] += st.target[s][round].part == OLDER_MAP;
		if (wrong[s])
			printf("# segment %u byte %u bit %u part %u: not noticed\n", s, st.target[s][round].off,
			       st.target[s][round].bit, st.target[s][round].part);
	}
}

/* Both superblocks damaged in the same place: there is nothing left to believe. */
static void both_superblocks(uint32_t byte, unsigned bit)
{
	put_flipped(byte, bit);
	put_flipped(NVME_SUPER_B + byte, bit);
	many_count[FLIPS]++;
	many_count[DETECTED] += fx_try_open(st.f) == -EBADMSG;
	fx_close(st.f);
	put_back(byte, 1);
	put_back(NVME_SUPER_B + byte, 1);
}

static void one_round(uint64_t round)
{
	uint64_t super = (round & 1 ? NVME_SUPER_B : 0) + (round >> 1) % KVT_UNIT;

	if (!st.f)
		store_new(&disk_ops);
	for (unsigned i = 0; i < (many_full() ? 1u : 5u); i++)
		both_superblocks((uint32_t)(round * (many_full() ? 1 : 5) + i) % KVT_UNIT,
				 (unsigned)(many_full() ? round / KVT_UNIT % 8 : fx_mix(round + i) % 8));
	for (uint32_t s = 0; s < SEGS; s++)
		if (round < st.targets[s])
			put_flipped(NVME_PREAMBLE + (uint64_t)s * SEGMENT + st.target[s][round].off,
				    st.target[s][round].bit);
	put_flipped(super, (unsigned)(round / (2 * KVT_UNIT) % 8));
	fx_open(st.f);
	fx_scan(st.f);
	many_count[OPENS]++;
	check_found(round);
	many_count[FLIPS]++;
	many_count[DETECTED]++; /* it opened, and with the right geometry */
	fx_close(st.f);
	put_back(0, KVT_UNIT);
	put_back(NVME_SUPER_B, KVT_UNIT);
	for (uint32_t s = 0; s < SEGS; s++) {
		put_back(NVME_PREAMBLE + (uint64_t)s * SEGMENT, NVME_DATA_UNIT * KVT_UNIT);
		if (round < st.targets[s])
			put_back(NVME_PREAMBLE + (uint64_t)s * SEGMENT + st.target[s][round].off, 1);
	}
}

static uint64_t rounds_of_store(void)
{
	uint64_t longest = 0;

	store_new(&disk_ops);
	for (uint32_t s = 0; s < SEGS; s++)
		longest = MAX(longest, st.targets[s]);
	close(st.fd);
	fx_free(st.f);
	free(st.image);
	memset(&st, 0, sizeof(st));
	return MAX(longest, many_full() ? 8 * 2 * KVT_UNIT : KVT_UNIT / 5 + 1);
}

/* ---- data ------------------------------------------------------------------------------------ */

static void data_of_store(uint64_t round)
{
	uint64_t rng = round;

	if (!st.f)
		store_new(NULL);
	for (uint64_t no = 0; no < PAGES; no++) {
		uint64_t x = fx_mix(rng += 0x9e3779b97f4a7c15), off;
		uint32_t bit = (uint32_t)(x % (7777 * 8));
		uint8_t b;

		if (st.death[no] != NOT_DEAD)
			continue;
		off = NVME_PREAMBLE + (uint64_t)seg_of(no) * SEGMENT + (st.at[no] & 0xffff) * KVT_UNIT +
		      bit / 8;
		assert_int_equal(pread(st.fd, &b, 1, (off_t)off), 1);
		flip(&b, bit % 8);
		assert_int_equal(pwrite(st.fd, &b, 1, (off_t)off), 1);
		many_count[DATA]++;
		many_count[DATA_DETECTED] += fx_check(st.f, no) == FX_MISS;
		flip(&b, bit % 8);
		assert_int_equal(pwrite(st.fd, &b, 1, (off_t)off), 1);
		if (no % 16 == round % 16)
			assert_int_equal(fx_check(st.f, no), FX_RIGHT);
	}
}

/* ---- memory ---------------------------------------------------------------------------------- */

#define DRAM_PAGES 160u
#define DRAM_SEG (2u << 20)

static struct memory {
	struct fx *f;
	struct keeper k, kept;
	uint8_t *map, *image;
	size_t bytes;
} mem;

static void memory_open(struct keeper *k)
{
	struct tier_cfg cfg = {
		.size = 2 * DRAM_SEG, .segment = DRAM_SEG, .node = -1, .no_huge = true, .keep = keeper_pass(k)};

	assert_int_equal(tier_dram_ops.open(&mem.f->t, &cfg, mem.f->err, sizeof(mem.f->err)), 0);
}

static void memory_new(void)
{
	struct stat file;

	mem.f = fx_new_in(many_top);
	memory_open(&mem.k);
	assert_int_equal(mem.f->t->ops->scan(mem.f->t, NULL, NULL), 0);
	fx_write(mem.f, DRAM_PAGES, 5000, TIER_LONG, NULL);
	fx_close(mem.f);
	assert_int_equal(mem.k.n, 1);
	assert_int_equal(fstat(mem.k.held[0].fd, &file), 0);
	mem.bytes = (size_t)file.st_size;
	mem.map = mmap(NULL, mem.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, mem.k.held[0].fd, 0);
	mem.image = malloc(mem.bytes);
	assert_true(mem.map != MAP_FAILED && mem.image);
	memcpy(mem.image, mem.map, mem.bytes);
}

static void memory_scan(void)
{
	/* A refused segment is given up by its keeper: pass it a keeper of its own each time. */
	mem.kept = (struct keeper){.n = 1};
	strcpy(mem.kept.held[0].name, mem.k.held[0].name);
	mem.kept.held[0].fd = fcntl(mem.k.held[0].fd, F_DUPFD_CLOEXEC, 0);
	memory_open(&mem.kept);
	fx_scan(mem.f);
}

/* Which pages went away: 0 none, 1 just `no`, 2 those of its sequence, 3 all, -1 anything else. */
static int gone(uint64_t no)
{
	uint64_t one = 0, seq = 0, other = 0, of_seq = 0;

	for (uint64_t i = 0; i < DRAM_PAGES; i++) {
		bool same = i / mem.f->per_seq == no / mem.f->per_seq;

		of_seq += same;
		if (mem.f->page[i].found)
			continue;
		one += i == no;
		seq += same;
		other += !same;
	}
	if (other)
		return seq + other == DRAM_PAGES ? 3 : -1;
	return !seq ? 0 : seq == of_seq ? 2 : seq == 1 && one ? 1 : -1;
}

static void memory_flip(size_t off, unsigned bit, uint64_t no, int want)
{
	int is;

	flip(mem.map + off, bit);
	memory_scan();
	is = gone(no);
	many_count[FLIPS]++;
	many_count[DETECTED] += is == want;
	if (is != want)
		printf("# byte %zu bit %u of kept memory: %d, must be %d\n", off, bit, is, want);
	fx_close(mem.f);
	keeper_close(&mem.kept);
	memcpy(mem.map + DRAM_SEG, mem.image + DRAM_SEG, mem.bytes - DRAM_SEG);
}

/* The bytes of a page's record, of its sequence's, and of the head that say something. */
#define SLOT 96u
#define RECORD(rows_bytes) (52u + (rows_bytes))
#define SEQ_RECORD 84u
#define DIR_HEAD 64u

static void some_bits(size_t off, uint64_t no, int want)
{
	for (unsigned bit = 0; bit < 8; bit++)
		if (many_full() || bit == fx_mix(off) % 8)
			memory_flip(off, bit, no, want);
}

/* Number i: page i; then its sequence's record and the head with every sixteenth. */
static void memory_round(uint64_t no)
{
	uint64_t pos[FX_WORDS], unit;
	uint32_t flags, len, words = fx_positions(no, pos), seq;
	size_t slot, seqs, head;

	if (!mem.f) {
		memory_new();
		memory_scan();
		assert_int_equal(gone(0), 0);
		fx_close(mem.f);
		keeper_close(&mem.kept);
	}
	len = nvme_pos_size(pos, words, &flags);
	unit = mem.f->page[no].addr & UINT32_MAX;
	slot = DRAM_SEG + (size_t)unit * SLOT;
	for (uint32_t i = 0; i < RECORD(len); i++)
		if (many_full() || i % 8 == no % 8)
			some_bits(slot + i, no, 1);
	if (no % mem.f->per_seq)
		return;
	memcpy(&seq, mem.image + slot + 36, sizeof(seq));
	seqs = DRAM_SEG + DRAM_SEG / KVT_UNIT * SLOT;
	for (uint32_t i = 0; i < SEQ_RECORD; i++)
		some_bits(seqs + (size_t)seq * SLOT + i, no, 2);
	head = mem.bytes - KVT_UNIT;
	for (uint32_t i = 0; i < DIR_HEAD; i++)
		if (many_full() || no / mem.f->per_seq == i % (DRAM_PAGES / mem.f->per_seq))
			some_bits(head + i, no, 3);
}

/* Data and identities of pages in memory: number i is a page again. */
static void memory_data(uint64_t no)
{
	struct page_ident id;
	struct fx_page *p;

	if (!mem.f)
		memory_new();
	memory_scan();
	p = &mem.f->page[no];
	for (unsigned i = 0; i < 64; i++) {
		uint32_t bit = (uint32_t)(fx_mix(no * 64 + i) % (p->bytes * 8));
		uint8_t *at = mem.map + (p->addr & UINT32_MAX) * KVT_UNIT;

		flip(at + bit / 8, bit % 8);
		many_count[DATA]++;
		many_count[DATA_DETECTED] += fx_check(mem.f, no) == FX_MISS;
		flip(at + bit / 8, bit % 8);
	}
	assert_int_equal(fx_check(mem.f, no), FX_RIGHT);
	for (unsigned bit = 0; bit < sizeof(id) * 8; bit++) {
		id = fx_ident(mem.f, no);
		flip(&id, bit);
		many_count[IDENT]++;
		many_count[IDENT_DETECTED] +=
			crc32c(page_crc_seed(&id), mem.map + (p->addr & UINT32_MAX) * KVT_UNIT, p->bytes) !=
			p->crc;
	}
	fx_close(mem.f);
	keeper_close(&mem.kept);
}

static bool all_noticed(uint64_t from, uint64_t count, void (*one)(uint64_t), const char *what, uint64_t *total,
			uint64_t *noticed)
{
	uint64_t sum[MANY_COUNTERS];
	unsigned bad = many_run(from, count, one, sum);
	uint64_t n = sum[FLIPS] + sum[DATA] + sum[IDENT],
		 seen = sum[DETECTED] + sum[DATA_DETECTED] + sum[IDENT_DETECTED];

	*total += n;
	*noticed += seen;
	return many_tap(!bad && n && n == seen, "%s: %s of %s flips noticed or without effect", what,
			many_comma(seen), many_comma(n));
}

int main(void)
{
	uint64_t meta = 0, meta_seen = 0, data = 0, data_seen = 0, start = now_ns();

	all_noticed(0, rounds_of_store(), one_round, "the store's metadata", &meta, &meta_seen);
	all_noticed(0, DRAM_PAGES, memory_round, "the directory of kept memory", &meta, &meta_seen);
	all_noticed(0, many_full() ? 200 : 20, data_of_store, "pages in the store", &data, &data_seen);
	all_noticed(0, DRAM_PAGES, memory_data, "pages in memory and their identities", &data, &data_seen);
	printf("# figure: %s of %s bits flipped in metadata detected", many_comma(meta_seen), many_comma(meta));
	printf(", %s of %s in data and identities\n", many_comma(data_seen), many_comma(data));
	printf("# %.1f s\n", (double)(now_ns() - start) / 1e9);
	return many_end();
}
