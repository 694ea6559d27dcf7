/* SPDX-License-Identifier: MIT */
/*
 * The NVMe tier against fio on the same file system in the same minute: same
 * block size, same number of requests in flight, io_uring with registered buffers and files, O_DIRECT, files
 * written over beforehand, buffers on transparent huge pages (for fio through malloc's tunable: it doubles its
 * speed at 1 MiB). On our side every page is copied in and checksummed, or checksummed
 * and compared after the read, as the mover does, and segments are sealed and flushed along the way.
 *
 * Then write amplification: whole sequences die at random while others are written, at 80 % of capacity.
 */
#include <fcntl.h>
#include <jansson.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "shm/crc.h"
#include "shm/util.h"
#include "tiers/tier.h"

#define MIB (UINT64_C(1) << 20)
#define PAGE 32768u
#define ROUND_BYTES (384 * MIB)
#define PAGES (ROUND_BYTES / PAGE)
#define ROUNDS 5
#define MAX_IOS 2048

static char dir[64] = "build/bench-nvme-XXXXXX";
static struct tier *tier;
static tier_addr addr[PAGES];
static uint32_t crc[PAGES];
static struct tier_io ios[MAX_IOS];
static struct tier_io *idle[MAX_IOS];
static unsigned nidle;
static char source[4 * MIB];

static void die(const char *what)
{
	fprintf(stderr, "bench_nvme: %s\n", what);
	exit(1);
}

static void open_tier(uint64_t size, uint64_t segment, unsigned depth)
{
	struct tier_cfg cfg = {.path = dir, .size = size, .segment = segment, .depth = depth, .prealloc = true};
	struct tier_stat st;
	char err[256];

	if (tier_nvme_ops.open(&tier, &cfg, err, sizeof(err)) < 0)
		die(err);
	if (tier_nvme_ops.scan(tier, NULL, NULL) < 0)
		die("scan");
	nidle = 0;
	for (unsigned i = 0; i < MAX_IOS; i++)
		idle[nidle++] = &ios[i];
	tier_nvme_ops.stat(tier, &st);
	fprintf(stderr, "# engine %s, huge pages %s %s\n", st.io_uring ? "io_uring" : "threads",
		st.huge ? "yes" : "no", st.note);
}

static void remove_store(void)
{
	char path[128];

	tier_nvme_ops.close(tier);
	snprintf(path, sizeof(path), "%s/kvtier-000.dat", dir);
	unlink(path);
}

/* ---- speed ------------------------------------------------------------------------- */

/* Take in what is finished. Reads are checked against the checksum. */
static unsigned reap(bool wait)
{
	struct tier_io *done[64];
	unsigned n = tier_nvme_ops.reap(tier, done, 64);

	if (!n && wait) {
		struct pollfd pfd = {.fd = tier_nvme_ops.event_fd(tier), .events = POLLIN};

		poll(&pfd, 1, 1000);
		n = tier_nvme_ops.reap(tier, done, 64);
	}
	for (unsigned i = 0; i < n; i++) {
		struct tier_io *io = done[i];
		uint64_t no = (uintptr_t)io->user;

		if (io->res)
			die("I/O error");
		if (io->op == TIER_WRITE)
			addr[no] = io->addr;
		else if (crc32c(page_crc_seed(&(struct page_ident){.page = no}), io->buf, PAGE) != crc[no])
			die("wrong bytes");
		tier_nvme_ops.release(tier, io);
		idle[nidle++] = io;
	}
	return n;
}

static int prepare(struct tier_io *io, enum tier_op op, uint64_t no)
{
	int r;

	*io = (struct tier_io){.op = op, .bytes = PAGE, .addr = addr[no], .life = TIER_LONG};
	io->user = (void *)(uintptr_t)no;
	io->meta.id.page = no;
	io->meta.bytes = PAGE;
	r = tier_nvme_ops.prepare(tier, io);
	if (r || op == TIER_READ)
		return r;
	memset(&io->meta.id, 0, sizeof(io->meta.id));
	io->meta.id.page = no;
	crc[no] = crc32c_gather(page_crc_seed(&io->meta.id), io->buf,
				source + no * 4096 % (sizeof(source) - PAGE), 256, 256, NULL, PAGE / 256);
	io->meta.crc = crc[no];
	return 0;
}

/*
 * All pages once: `run` pages to a submit. The tier gives the device at most cfg.depth requests at once, as fio
 * does; the caller keeps twice as many under way, or the device would idle while pages are copied. Bytes per
 * second.
 */
static double pass(enum tier_op op, unsigned run, unsigned depth, const uint32_t *order)
{
	struct tier_io *batch[64];
	uint64_t start = now_ns(), inflight = 0, most = 2 * (uint64_t)run * depth;
	unsigned k = 0;

	for (uint64_t i = 0; i < PAGES;) {
		int r = -EAGAIN;

		if (nidle && inflight + k < most)
			r = prepare(idle[nidle - 1], op, order[i]);
		if (!r) {
			batch[k++] = idle[--nidle];
			i++;
		} else if (r != -EAGAIN) {
			die(strerror(-r));
		}
		if (k == run || i == PAGES || (r && k)) {
			tier_nvme_ops.submit(tier, batch, k);
			inflight += k;
			k = 0;
		}
		if (r || inflight >= most)
			inflight -= reap(true);
	}
	while (inflight)
		inflight -= reap(true);
	return (double)ROUND_BYTES / ((double)(now_ns() - start) / 1e9);
}

static double fio(const char *rw, const char *bs, unsigned depth)
{
	char cmd[512];
	json_t *root;
	double bw;
	FILE *p;

	snprintf(cmd, sizeof(cmd),
		 "GLIBC_TUNABLES=glibc.malloc.hugetlb=1 fio --name=x --filename=%s/fio.dat --size=%lluM "
		 "--rw=%s --bs=%s --iodepth=%u "
		 "--ioengine=io_uring "
		 "--fixedbufs=1 --registerfiles=1 --direct=1 --output-format=json 2>/dev/null",
		 dir, (unsigned long long)(ROUND_BYTES / MIB), rw, bs, depth);
	p = popen(cmd, "r");
	root = p ? json_loadf(p, 0, NULL) : NULL;
	if (p)
		pclose(p);
	if (!root)
		die("fio did not run");
	bw = json_number_value(json_object_get(json_object_get(json_array_get(json_object_get(root, "jobs"), 0),
							       strstr(rw, "read") ? "read" : "write"),
					       "bw_bytes"));
	json_decref(root);
	return bw;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static void report(const char *name, double *ours, double *theirs, const char *rival)
{
	double ratio;

	qsort(ours, ROUNDS, sizeof(*ours), by_value);
	qsort(theirs, ROUNDS, sizeof(*theirs), by_value);
	ratio = ours[ROUNDS / 2] / theirs[ROUNDS / 2];
	printf("{\"name\":\"%s\",\"value\":%.3f,\"unit\":\"GB/"
	       "s\",\"rival\":\"%s\",\"rival_value\":%.3f,\"ratio\":%.3f,"
	       "\"target\":\">=0.90\",\"pass\":%s}\n",
	       name, ours[ROUNDS / 2] / 1e9, rival, theirs[ROUNDS / 2] / 1e9, ratio,
	       ratio >= 0.9 ? "true" : "false");
	fflush(stdout);
}

static void free_all(void)
{
	for (uint64_t i = 0; i < PAGES; i++)
		tier_nvme_ops.free(tier, addr[i], PAGE);
	if (tier_nvme_ops.sync(tier) < 0)
		die("sync");
}

/* Writes and reads in turn, ours and fio's in turn, first one then the other first. */
static void speed(unsigned run, const char *bs, unsigned depth, const char *read_name, const char *write_name)
{
	static uint32_t straight[PAGES], mixed[PAGES];
	double w[ROUNDS], fw[ROUNDS], r[ROUNDS], fr[ROUNDS];
	const char *fread = run == 1 ? "randread" : "read";
	char rival[64];

	for (uint32_t i = 0; i < PAGES; i++)
		straight[i] = mixed[i] = i;
	for (uint32_t i = PAGES - 1; run == 1 && i; i--) {
		uint32_t j = (uint32_t)(random() % (i + 1)), x = mixed[i];

		mixed[i] = mixed[j];
		mixed[j] = x;
	}
	open_tier(2 * ROUND_BYTES, 32 * MIB, depth);
	for (int i = 0; i < ROUNDS; i++) {
		if (i & 1)
			fw[i] = fio("write", bs, depth);
		w[i] = pass(TIER_WRITE, run, depth, straight);
		if (!(i & 1))
			fw[i] = fio("write", bs, depth);
		else
			fr[i] = fio(fread, bs, depth);
		r[i] = pass(TIER_READ, run, depth, mixed);
		if (!(i & 1))
			fr[i] = fio(fread, bs, depth);
		fprintf(stderr, "# %s depth %u: write %.2f (fio %.2f), read %.2f (fio %.2f) GB/s\n", bs, depth,
			w[i] / 1e9, fw[i] / 1e9, r[i] / 1e9, fr[i] / 1e9);
		free_all();
	}
	snprintf(rival, sizeof(rival), "fio io_uring write bs=%s qd=%u", bs, depth);
	report(write_name, w, fw, rival);
	snprintf(rival, sizeof(rival), "fio io_uring %s bs=%s qd=%u", fread, bs, depth);
	report(read_name, r, fr, rival);
	remove_store();
}

/* ---- amplification -------------------------------------------------------------------- */

#define SEQS 4096
#define WRITERS 4
#define SEQ_PAGES 1024 /* at most */

static struct seq {
	uint32_t pages, want;
	tier_addr addr[SEQ_PAGES];
	bool live;
} * seqs;
static uint32_t nseqs, nlive, live_seq[SEQS];

static bool moved(void *arg, const struct page_meta *m, tier_addr from, tier_addr to)
{
	struct seq *s = &seqs[m->id.page / SEQ_PAGES];

	if (!s->live)
		return false;
	s->addr[m->id.page % SEQ_PAGES] = to;
	return true;
}

static void kill_one(void)
{
	uint32_t i = (uint32_t)random() % nlive;
	struct seq *s = &seqs[live_seq[i]];

	for (uint32_t p = 0; p < s->pages; p++)
		tier_nvme_ops.free(tier, s->addr[p], PAGE);
	s->live = false;
	live_seq[i] = live_seq[--nlive];
}

/* Append up to n pages to a sequence. */
static void append(uint32_t index, unsigned n)
{
	struct seq *s = &seqs[index];
	struct tier_io *batch[64], *done[64];
	struct seq_record rec = {.lanes = 112};
	unsigned k = 0, got = 0;

	memcpy(rec.key, &index, sizeof(index));
	for (; k < n && s->pages + k < s->want; k++) {
		batch[k] = &ios[k];
		ios[k] = (struct tier_io){.op = TIER_WRITE, .bytes = PAGE, .life = index % 2, .seq = &rec};
		ios[k].meta.id.page = (uint64_t)index * SEQ_PAGES + s->pages + k;
		ios[k].meta.bytes = PAGE;
		if (tier_nvme_ops.prepare(tier, &ios[k]) < 0)
			break;
	}
	tier_nvme_ops.submit(tier, batch, k);
	while (got < k) {
		unsigned m = tier_nvme_ops.reap(tier, done, 64);

		for (unsigned i = 0; i < m; i++) {
			s->addr[done[i]->meta.id.page % SEQ_PAGES] = done[i]->addr;
			tier_nvme_ops.release(tier, done[i]);
		}
		got += m;
	}
	s->pages += k;
	if (s->pages == s->want) {
		s->live = true;
		live_seq[nlive++] = index;
	}
}

/*
 * Four sequences are written at a time, 2 MiB of each in turn. They are 2 to 16 segments long: as a 7B
 * model's 2,300 to 18,000 tokens (57 KB each) are in segments of 64 MiB. Which one dies is uniform.
 */
static void amplification(void)
{
	struct tier_stat st, base = {0};
	uint32_t writer[WRITERS] = {0};
	double wa;

	seqs = calloc(SEQS, sizeof(*seqs));
	if (!seqs)
		die("memory");
	open_tier(768 * MIB, 2 * MIB, 32);
	for (unsigned round = 0;; round++) {
		uint32_t *w = &writer[round % WRITERS];
		struct seq *s = &seqs[*w];

		if (!*w || s->pages == s->want) {
			if (nseqs + 1 == SEQS)
				break;
			*w = ++nseqs;
			seqs[*w].want = 128 + (uint32_t)random() % 896;
		}
		append(*w, 64);
		tier_nvme_ops.tick(tier, moved, NULL);
		tier_nvme_ops.stat(tier, &st);
		while (st.used > st.capacity / 5 * 4 && nlive) {
			kill_one();
			tier_nvme_ops.stat(tier, &st);
			if (!base.writes)
				base = st; /* full for the first time: count from here */
		}
		if (base.writes && st.write_bytes - base.write_bytes > 3 * st.capacity)
			break;
	}
	wa = (double)(st.device_write_bytes - base.device_write_bytes) /
	     (double)(st.write_bytes - base.write_bytes);
	fprintf(stderr, "# %u sequences, %llu segments cleaned\n", nseqs,
		(unsigned long long)st.cleaned_segments);
	printf("{\"name\":\"nvme write amplification at 80 %% full under churn\",\"value\":%.3f,\"unit\":\"x\","
	       "\"rival\":\"payload "
	       "bytes\",\"rival_value\":1.0,\"ratio\":%.3f,\"target\":\"<=1.3\",\"pass\":%s}\n",
	       wa, wa, wa <= 1.3 ? "true" : "false");
	remove_store();
	free(seqs);
}

int main(void)
{
	char path[128];

	(void)mkdir("build", 0755);
	if (!mkdtemp(dir))
		die("mkdtemp");
	srandom(1);
	for (size_t i = 0; i < sizeof(source); i++)
		source[i] = (char)random();
	fprintf(stderr, "# writing fio's file over once: %.2f GB/s\n", fio("write", "1M", 16) / 1e9);
	speed(1, "32k", 32, "nvme read, 32 KiB pages at random", "nvme write, 32 KiB pages");
	speed(32, "1M", 16, "nvme read, runs of 1 MiB", "nvme write, runs of 1 MiB");
	amplification();
	snprintf(path, sizeof(path), "%s/fio.dat", dir);
	unlink(path);
	rmdir(dir);
	return 0;
}
