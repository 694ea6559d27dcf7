/* SPDX-License-Identifier: MIT */
/*
 * torture 4: torn, lost, misdirected and reordered writes, and power cuts
 * pass: 0 wrong bytes; every fault a counted miss; nothing flushed is lost that the disk did not lie about
 * quick: 1,000 seeds, and those that failed once
 * full: 100,000 seeds
 * io: both
 * plants: crc-of-the-first-unit table-crc-skipped pages-not-flushed copies-not-reconciled
 *
 * Each seed goes through two storms.
 *
 * Pages: the fault tier over DRAM, or for some seeds over NVMe with its real engine, under random rates of up
 * to five kinds of fault and torn at 512 B or 4 KiB. The tier counts what it does; a read of what it spoilt
 * must be a miss (seeded checksum, or error), and every other read must be right.
 *
 * Device: the NVMe tier over a model of a disk with a volatile cache (disk_model.h) that completes requests in
 * any order and loses power at a random one, several lives long. Half of the disks are honest: then everything
 * that a sync acknowledged is found and right, nothing that was freed before one is found, nothing is found
 * twice. The other half lose, tear or misplace writes that they report as flushed: then a page that is missing
 * or misses must be one that the disk lied about, and a read misses exactly when the medium differs from what
 * was written. Page `n` has bytes that follow from n (nvme_fixture.h), so that no page can pass for another
 * one.
 */
#include "many.h"

#include "disk_model.h"
#include "tests/unit/nvme_fixture.h"
#include "tiers/fault.h"

enum {
	SEEDS,
	PAGES,
	READS,
	FAULTS,
	MISSES,
	CUTS,
	CACHED,
	TORN,
	GONE,
	LIES,
	FOUND,
	LOST,
	DEVICE_MISSES,
	MOVES,
	DIGEST
};

static uint64_t mixed(uint64_t *x)
{
	*x += UINT64_C(0x9e3779b97f4a7c15);
	return fx_mix(*x);
}

/* ---- pages: through the fault tier -------------------------------------------------------- */

#define P_PAGES 48u
#define P_OPS 160u

struct pages {
	struct tier *t;
	uint64_t rng;
	struct {
		struct page_ident id;
		tier_addr addr;
		uint32_t bytes, crc;
		uint64_t no;
		bool live, spoilt;
	} page[P_PAGES];
	uint64_t faults, misses, next, digest;
	char dir[96];
};

/* A random spec: not more kinds at a time than the tier's note has room for. */
static void random_spec(struct pages *p, char *ret, size_t size)
{
	static const enum fault_kind kinds[] = {FAULT_TORN, FAULT_LOST,     FAULT_MISDIRECT, FAULT_REORDER,
						FAULT_FLIP, FAULT_READ_EIO, FAULT_WRITE_EIO, FAULT_ENOSPC};
	size_t at = (size_t)snprintf(ret, size, "seed=%llu,sector=%u", (unsigned long long)mixed(&p->rng),
				     mixed(&p->rng) % 2 ? 512 : 4096);
	unsigned from = (unsigned)(mixed(&p->rng) % ARRAY_SIZE(kinds));

	for (unsigned i = 0; i < 5; i++)
		at += (size_t)snprintf(ret + at, size - at, ",%s=%u",
				       fault_name(kinds[(from + i) % ARRAY_SIZE(kinds)]),
				       (unsigned)(mixed(&p->rng) % 250));
}

/* Faults so far that spoil a page, as the tier counts them. */
static uint64_t faults_counted(struct pages *p)
{
	static const enum fault_kind kinds[] = {FAULT_TORN,    FAULT_LOST, FAULT_MISDIRECT,
						FAULT_REORDER, FAULT_FLIP, FAULT_READ_EIO};
	struct tier_stat st;
	uint64_t n = 0;

	p->t->ops->stat(p->t, &st);
	for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++) {
		char key[32];
		const char *at;

		snprintf(key, sizeof(key), " %s=", fault_name(kinds[i]));
		at = strstr(st.note, key);
		n += at ? strtoull(at + strlen(key), NULL, 10) : 0;
	}
	return n;
}

static int finish(struct pages *p, struct tier_io *io)
{
	struct pollfd pfd = {.fd = p->t->ops->event_fd(p->t), .events = POLLIN};
	struct tier_io *done;

	p->t->ops->submit(p->t, &io, 1);
	while (!p->t->ops->reap(p->t, &done, 1))
		assert_int_equal(poll(&pfd, 1, 10000), 1);
	assert_ptr_equal(done, io);
	return io->res;
}

static void page_write(struct pages *p, unsigned i)
{
	struct tier_io io = {.op = TIER_WRITE, .bytes = 1 + (uint32_t)(mixed(&p->rng) % 20000)};
	uint64_t before = faults_counted(p);
	int r;

	p->page[i].no = p->next++;
	p->page[i].id = (struct page_ident){.page = p->page[i].no, .lane = i, .rows = 3};
	io.meta.id = p->page[i].id;
	r = p->t->ops->prepare(p->t, &io);
	if (r < 0) {
		assert_int_equal(r, -ENOSPC);
		return;
	}
	fx_fill(p->page[i].no, io.buf, io.bytes);
	io.meta.crc = p->page[i].crc = crc32c(page_crc_seed(&io.meta.id), io.buf, io.bytes);
	p->page[i].bytes = io.meta.bytes = io.bytes;
	r = finish(p, &io);
	p->page[i].live = r == 0;
	p->page[i].addr = io.addr;
	p->page[i].spoilt = faults_counted(p) != before;
	assert_int_equal(io.addr == TIER_ADDR_NONE, r < 0);
	p->t->ops->release(p->t, &io);
}

static void page_read(struct pages *p, unsigned i)
{
	struct tier_io io = {.op = TIER_READ, .bytes = p->page[i].bytes, .addr = p->page[i].addr};
	uint64_t before = faults_counted(p);
	bool hit, miss;
	char *want;
	int r;

	assert_int_equal(p->t->ops->prepare(p->t, &io), 0);
	r = finish(p, &io);
	hit = p->page[i].spoilt || faults_counted(p) != before;
	miss = r < 0 || crc32c(page_crc_seed(&p->page[i].id), io.buf, io.bytes) != p->page[i].crc;
	if (!miss) {
		want = malloc(io.bytes);
		fx_fill(p->page[i].no, want, io.bytes);
		assert_memory_equal(io.buf, want, io.bytes);
		free(want);
	}
	assert_int_equal(miss, hit);
	p->faults += hit;
	p->misses += miss;
	p->digest = fx_mix(p->digest + p->page[i].no * 2 + miss);
	p->t->ops->release(p->t, &io);
}

static void remove_store(const char *dir)
{
	DIR *d = opendir(dir);

	for (struct dirent *e; d && (e = readdir(d));)
		(void)unlinkat(dirfd(d), e->d_name, 0);
	if (d)
		closedir(d);
	rmdir(dir);
}

static void storm_of_pages(uint64_t seed)
{
	struct pages p = {.rng = seed};
	bool nvme = seed % 16 == 0;
	char spec[256], err[256];
	struct tier_cfg cfg = {.size = nvme ? 4 << 20 : 8 << 20,
			       .segment = nvme ? 256 << 10 : 2 << 20,
			       .node = -1,
			       .no_huge = true,
			       .no_uring = many_threads(),
			       .path = p.dir,
			       .fault = spec,
			       .lower_ops = nvme ? &tier_nvme_ops : &tier_dram_ops};
	struct tier_stat st;

	snprintf(p.dir, sizeof(p.dir), "%s/kvt-storm-XXXXXX", many_top);
	if (nvme)
		assert_non_null(mkdtemp(p.dir));
	random_spec(&p, spec, sizeof(spec));
	if (tier_fault_ops.open(&p.t, &cfg, err, sizeof(err)) < 0)
		fail_msg("%s: %s", spec, err);
	for (unsigned n = 0; n < P_OPS; n++) {
		unsigned i = (unsigned)(mixed(&p.rng) % P_PAGES);

		if (p.page[i].live && mixed(&p.rng) % 3 == 0) {
			p.t->ops->free(p.t, p.page[i].addr, p.page[i].bytes);
			p.page[i].live = false;
		}
		if (p.page[i].live)
			page_read(&p, i);
		else
			page_write(&p, i);
	}
	for (unsigned i = 0; i < P_PAGES; i++)
		if (p.page[i].live)
			p.t->ops->free(p.t, p.page[i].addr, p.page[i].bytes);
	p.t->ops->stat(p.t, &st);
	assert_int_equal(st.used, 0);
	p.t->ops->close(p.t);
	if (nvme)
		remove_store(p.dir);
	many_count[FAULTS] += p.faults;
	many_count[MISSES] += p.misses;
	many_count[PAGES] += p.next;
	many_count[DIGEST] ^= fx_mix(p.digest + seed);
}

/* ---- device: the NVMe tier over a disk ------------------------------------------------------ */

#define SEGMENT (256u << 10)

struct storm {
	struct fx *f;
	bool honest;
	uint64_t lives;
	uint8_t flags[FX_PAGES];
};

enum {
	DURABLE = 1,   /* a sync that began after it was written returned 0 */
	KILLED = 2,    /* freed */
	GOOD_DEAD = 4, /* a sync that began after it was freed returned 0 */
	LIED = 8,      /* the cleaner copied it from where the disk had lied */
};

static struct storm *storm;

static void place_of(const struct fx *f, tier_addr addr, uint32_t *file, uint64_t *seg, uint64_t *off)
{
	const struct nvme *t = container_of(f->t, struct nvme, tier);
	uint64_t index = addr >> 40;

	*file = (uint32_t)(index / t->file_segments);
	*seg = NVME_PREAMBLE + index % t->file_segments * SEGMENT;
	*off = *seg + (addr & 0xffff) * KVT_UNIT;
}

/* Did the disk lie about the page's place, or about what its segment says of itself? */
static bool lied_about(const struct fx *f, tier_addr addr, uint32_t bytes)
{
	_cleanup_free_ struct nvme_foot *foot = disk_alloc(KVT_UNIT);
	uint32_t file, table = 1;
	uint64_t seg, off, end;

	place_of(f, addr, &file, &seg, &off);
	end = seg + SEGMENT;
	disk_pread(file, foot, KVT_UNIT, end - KVT_UNIT);
	if (foot->tag.magic == NVME_MAGIC_FOOT && foot->table_units < SEGMENT / KVT_UNIT)
		table = foot->table_units + 1;
	return disk_lied(file, seg, NVME_DATA_UNIT * KVT_UNIT) || disk_lied(file, off, bytes) ||
	       disk_lied(file, end - table * KVT_UNIT, table * KVT_UNIT);
}

/* What the medium holds there, past the tier. */
static bool medium_differs(const struct fx *f, uint64_t no)
{
	const struct fx_page *p = &f->page[no];
	uint32_t len = (uint32_t)ALIGN_UP(p->bytes, KVT_UNIT), file;
	_cleanup_free_ char *got = disk_alloc(len), *want = malloc(p->bytes);
	uint64_t seg, off;

	place_of(f, p->addr, &file, &seg, &off);
	disk_pread(file, got, len, off);
	fx_fill(no, want, p->bytes);
	return memcmp(got, want, p->bytes) != 0;
}

static bool on_moved(void *arg, const struct page_meta *m, tier_addr from, tier_addr to)
{
	struct fx *f = arg;

	if (lied_about(f, from, m->bytes))
		storm->flags[m->id.page] |= LIED;
	return fx_moved(arg, m, from, to);
}

static void check_page(struct fx *f, uint64_t no)
{
	bool before = medium_differs(f, no), after;
	enum fx_read is = fx_check(f, no);

	if (disk.off)
		return;
	many_count[READS]++;
	assert_int_not_equal(is, FX_GONE);
	after = medium_differs(f, no);
	if (before == after) /* else another write went astray onto the page around the read */
		assert_int_equal(is == FX_MISS, after);
	else
		assert_false(storm->honest);
	many_count[DEVICE_MISSES] += is == FX_MISS;
	if (is == FX_RIGHT)
		return;
	assert_false(storm->honest); /* not even what nobody flushed: what is sealed is there */
	assert_true(!(storm->flags[no] & DURABLE) || storm->flags[no] & LIED ||
		    lied_about(f, f->page[no].addr, f->page[no].bytes));
	fx_kill(f, no);
	storm->flags[no] |= KILLED;
}

static void sync_all(struct fx *f)
{
	uint8_t *next = storm->flags;
	static uint8_t before[FX_PAGES];

	for (uint64_t no = 0; no < f->next; no++)
		before[no] = f->page[no].live ? DURABLE : next[no] & KILLED ? GOOD_DEAD : 0;
	if (f->t->ops->sync(f->t) < 0 || disk.off)
		return;
	for (uint64_t no = 0; no < f->next; no++)
		next[no] |= before[no];
}

static void some_step(struct fx *f)
{
	unsigned x = (unsigned)(fx_rand(f) % 16);
	int why = 0;

	if (x < 7) {
		fx_write(f, 1 + (unsigned)(fx_rand(f) % 8), 1 + (uint32_t)(fx_rand(f) % 24000),
			 (uint8_t)(fx_rand(f) % 2), &why);
	} else if (x < 12) {
		for (unsigned n = (unsigned)(fx_rand(f) % 12); n-- && f->next;) {
			uint64_t no = fx_rand(f) % f->next;

			if (f->page[no].live)
				storm->flags[no] |= KILLED;
			fx_kill(f, no);
		}
	} else if (x < 13) {
		sync_all(f);
	} else if (x < 15) {
		f->t->ops->tick(f->t, on_moved, f);
	} else if (f->next) {
		uint64_t no = fx_rand(f) % f->next;

		if (f->page[no].live)
			check_page(f, no);
	}
}

/* After a restart: compare what was found with what must and what must not be there. */
static void take_stock(struct fx *f, const tier_addr *was)
{
	for (uint64_t no = 0; no < f->next; no++) {
		struct fx_page *p = &f->page[no];
		uint8_t *flag = &storm->flags[no];
		bool owed = *flag & DURABLE && !(*flag & KILLED);

		/* Where the disk lost what a copy or a map said, a page may be there twice: both are it. */
		assert_in_range(p->found, 0, storm->honest ? 1 : 2);
		if (storm->honest)
			assert_false(p->found && *flag & GOOD_DEAD);
		p->live = p->found;
		if (!p->found && owed) {
			assert_false(storm->honest);
			assert_true(*flag & LIED || lied_about(f, was[no], p->bytes));
			many_count[LOST]++;
		}
		if (!p->found)
			continue;
		many_count[FOUND]++;
		*flag &= (uint8_t)~KILLED;
		if (!storm->honest && lied_about(f, was[no], p->bytes))
			*flag |= LIED;
		check_page(f, no);
		*flag |= DURABLE;
	}
}

/* A cut in the middle of writing the superblock: parts of the new one over the old one. */
static void tear_superblock(struct fx *f, const char *old, uint32_t file)
{
	for (int i = 0; i < 2; i++) {
		_cleanup_free_ char *now = disk_alloc(KVT_UNIT);
		const char *was = old + (size_t)i * KVT_UNIT;

		disk_pread(file, now, KVT_UNIT, i ? NVME_SUPER_B : 0);
		if (!memcmp(now, was, KVT_UNIT))
			continue;
		disk_some(now, was, KVT_UNIT, false);
		disk_pwrite(file, now, KVT_UNIT, i ? NVME_SUPER_B : 0);
	}
}

/* Open, and lose power before the superblocks are all on the medium. */
static void cut_in_open(struct fx *f)
{
	static _Alignas(KVT_UNIT) char old[8][2 * KVT_UNIT];
	unsigned files;

	fx_open(f); /* to know where they are; this one becomes the old one */
	files = disk.cfg.fds;
	for (unsigned i = 0; i < files; i++)
		for (int k = 0; k < 2; k++)
			disk_pread(i, old[i] + k * KVT_UNIT, KVT_UNIT, k ? NVME_SUPER_B : 0);
	fx_close(f);
	fx_open(f);
	for (unsigned i = 0; i < files; i++)
		tear_superblock(f, old[i], i);
	disk_cut();
	fx_close(f);
}

static void one_life(struct fx *f, uint64_t life)
{
	static tier_addr was[FX_PAGES];
	unsigned steps = 20 + (unsigned)(fx_rand(f) % 80);

	if (life && fx_rand(f) % 8 == 0)
		cut_in_open(f);
	for (uint64_t no = 0; no < f->next; no++)
		was[no] = f->page[no].addr;
	fx_open(f);
	if (life) {
		fx_scan(f);
		take_stock(f, was);
	}
	disk.cut_at = fx_rand(f) % 4 ? disk.now + 1 + fx_rand(f) % 160 : 0;
	while (steps-- && !disk.off)
		some_step(f);
	if (!disk.off && fx_rand(f) % 4)
		sync_all(f); /* an orderly end, more or less */
	many_count[CUTS]++;
	disk_cut();
	fx_close(f);
}

static void storm_of_writes(uint64_t seed)
{
	uint64_t x = seed;
	struct fx *f = fx_new_in(many_top);

	storm = calloc(1, sizeof(*storm));
	storm->f = f;
	storm->honest = mixed(&x) % 2;
	storm->lives = 2 + mixed(&x) % 3;
	disk_reset(mixed(&x));
	disk.sector = mixed(&x) % 2 ? 512 : KVT_UNIT;
	if (!storm->honest) {
		disk.lost = (uint16_t)(mixed(&x) % 40);
		disk.torn = (uint16_t)(mixed(&x) % 40);
		disk.stray = (uint16_t)(mixed(&x) % 40);
	}
	f->rng = mixed(&x) | 1;
	f->may_fail = true;
	f->per_seq = 4;
	f->knobs.engine = &disk_ops;
	f->knobs.file_segments = mixed(&x) % 2 ? 5 : 0;
	f->cfg.segment = SEGMENT;
	f->cfg.size = (8 + mixed(&x) % 8) * SEGMENT;
	for (uint64_t life = 0; life < storm->lives; life++)
		one_life(f, life);
	/* And it goes on: on a disk that tells the truth from now on. */
	disk.lost = disk.torn = disk.stray = 0;
	one_life(f, 1);
	many_count[MOVES] += f->moves;
	free(storm);
	fx_free(f);
}

static void one_seed(uint64_t seed)
{
	struct disk before = disk;

	storm_of_pages(seed);
	storm_of_writes(seed);
	many_count[SEEDS]++;
	many_count[CACHED] += disk.cut_writes - before.cut_writes;
	many_count[TORN] += disk.cut_torn - before.cut_torn;
	many_count[GONE] += disk.cut_gone - before.cut_gone;
	for (unsigned i = 0; i < 3; i++)
		many_count[LIES] += disk.lies[i] - before.lies[i];
}

/* Numbers that once failed, beyond those that quick goes through. */
static const uint64_t kept[] = {
	/* a disk that lied had a page twice, and the cleaner moved the copy that the owner did not hold */
	8845, 24346, 33031, 47256, 56806, 56885, 93938,
	/* the same, after the owner had freed the one that it held */
	33043, 35657, 49676, 74462, 90673,
	/* a write went astray onto a page between the read of it and the look at the medium */
	73547};

static void one_kept(uint64_t i)
{
	snprintf(many_what, sizeof(many_workers->what), "of those kept, %llu", (unsigned long long)kept[i]);
	one_seed(kept[i]);
}

static unsigned run_kept(uint64_t *sum)
{
	uint64_t more[MANY_COUNTERS];
	unsigned bad = many_run(0, ARRAY_SIZE(kept), one_kept, more);

	for (unsigned i = 0; i < MANY_COUNTERS; i++)
		sum[i] = i == DIGEST ? sum[i] ^ more[i] : sum[i] + more[i];
	return bad;
}

int main(void)
{
	uint64_t sum[MANY_COUNTERS], seed, seeds = many_full() ? 100000 : 1000, start = now_ns();
	bool alone = many_only(&seed);
	unsigned bad = many_run(alone ? seed : 1, alone ? 1 : seeds, one_seed, sum);

	if (!alone && !many_full())
		bad += run_kept(sum);
	many_tap(!bad, "%s seeds: no wrong byte, no fault that is no miss, nothing acknowledged lost",
		 many_comma(sum[SEEDS]));
	if (!alone && !bad) {
		many_tap(sum[FAULTS] > seeds && sum[FAULTS] == sum[MISSES],
			 "faults of pages happened and were misses");
		many_tap(sum[TORN] > seeds && sum[GONE] > seeds, "power cuts tore writes and lost some");
		many_tap(sum[LIES] > seeds && sum[LOST] + sum[DEVICE_MISSES] > seeds / 4 &&
				 sum[MOVES] > seeds / 4,
			 "disks lied, and pages moved");
	}
	printf("# figure: %s seeds, 0 wrong bytes; %s faults of pages, %s misses\n", many_comma(sum[SEEDS]),
	       many_comma(sum[FAULTS]), many_comma(sum[MISSES]));
	printf("# figure: %s power cuts with %s writes in the disk's cache, %s of them torn",
	       many_comma(sum[CUTS]), many_comma(sum[CACHED]), many_comma(sum[TORN]));
	printf(", %s gone; %s pages found after them\n", many_comma(sum[GONE]), many_comma(sum[FOUND]));
	printf("# figure: %s writes the disk lied about, %s pages lost and %s missed by that, all of them "
	       "named\n",
	       many_comma(sum[LIES]), many_comma(sum[LOST]), many_comma(sum[DEVICE_MISSES]));
	printf("# %s pages moved by the cleaner, digest %016llx, %.1f s\n", many_comma(sum[MOVES]),
	       (unsigned long long)sum[DIGEST], (double)(now_ns() - start) / 1e9);
	return many_end();
}
