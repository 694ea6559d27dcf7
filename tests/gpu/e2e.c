/* SPDX-License-Identifier: MIT */
/*
 * From GPU memory to NVMe and back, through a real kvtierd, in the shape of a 7B model's cache (28 layers of 4
 * KV heads, 256 bytes of K and of V): an idle session of 4 GiB leaves and returns, against the slower of the
 * disk (fio, same file system, between the rounds) and PCIe; a session saved to NVMe is resumed, with a fifth
 * of its rows first and with all of them, against the prefill that it spares (--prefill) and the disk. Every
 * row that comes back is compared. JSON lines; progress on stderr; exit status 77 without a GPU or fio.
 *
 *    e2e [--rounds N] [--rows N] [--workers N] [--staging MIB] [--depth N] [--ring MIB] [--dir D]
 *        [--prefill MS] [--step MS] [--idle]
 *
 *    e2e --small
 *
 * --small: the same way for a few rows, no figures, TAP; for the fake driver, and compute-sanitizer.
 * --idle: without the second part.
 * --prefill, --step: milliseconds of a prefill of 32,768 tokens and of one decode step, as tests/gpu/prefill.py
 * measures.
 */
#include <getopt.h>
#include "tests/gpu/floors.h"
#include "tests/gpu/session.h"

#define MAX_ROUNDS 9u
#define RESUME_ROWS 32768u
#define DEVICE_SHARE 5u /* a fifth of the rows on the device */

static struct {
	const char *dir;
	unsigned rounds, rows, workers, depth, staging, ring; /* MiB the last two */
	double prefill, step;
	bool small, idle;
} opt = {.dir = "build", .rounds = 3, .rows = 74898, .workers = 8, .depth = 32, .staging = 64, .ring = 64};

/* ---- figures ------------------------------------------------------------------------------------ */

static void report(const char *name, double value, const char *unit, const char *rival, double theirs,
		   double ratio, double least)
{
	printf("{\"name\":\"%s\",\"value\":%.4g,\"unit\":\"%s\",\"rival\":\"%s\",\"rival_value\":%.4g,"
	       "\"ratio\":%.3f,"
	       "\"target\":\">=%.3g\",\"pass\":%s}\n",
	       name, value, unit, rival, theirs, ratio, least, ratio >= least ? "true" : "false");
	fflush(stdout);
}

static void against(const char *name, double *ours, double *disk, unsigned n, double pcie,
		    const char *disk_name)
{
	double a = median(ours, n), d = median(disk, n);
	char rival[160];

	snprintf(rival, sizeof(rival), "slower of fio %s (1 MiB, depth 32) and PCIe (%.1f)", disk_name,
		 pcie / 1e9);
	report(name, a / 1e9, "GB/s", rival, MIN(d, pcie) / 1e9, a / MIN(d, pcie), 0.85);
}

/* An idle session leaves for NVMe and comes back, fio before and after in turn. */
static void idle(struct rig *g, const struct shape *m, double pcie_out, double pcie_in)
{
	double out[MAX_ROUNDS], in[MAX_ROUNDS], fw[MAX_ROUNDS], fr[MAX_ROUNDS];
	uint64_t all = (uint64_t)opt.rows * shape_lanes(m) * m->row_bytes, bytes, fio = all / MIB * MIB;
	struct session x;
	char name[96];

	floor_disk(g->dir, "write", fio); /* its file exists from the first counted round on */
	for (unsigned i = 0; i < opt.rounds; i++) {
		session_new(&x, g, m, opt.rows, 1 + i, opt.ring * MIB);
		session_fill(&x, opt.rows);
		session_move(&x, KVT_ROWS_ALL, &bytes); /* an idle session was ranked while it was busy */
		if (i & 1)
			fw[i] = floor_disk(g->dir, "write", fio);
		out[i] = session_move(&x, 0, &bytes);
		if (bytes != all)
			die("%llu bytes left, not %llu", (unsigned long long)bytes, (unsigned long long)all);
		out[i] = (double)all / out[i];
		cu(g, g->d->set8(x.rows.base, 0xdd, x.rows.bytes, g->stream), "cuMemsetD8Async");
		if (!(i & 1))
			fw[i] = floor_disk(g->dir, "write", fio);
		else
			fr[i] = floor_disk(g->dir, "read", fio);
		in[i] = (double)all / session_move(&x, KVT_ROWS_ALL, &bytes);
		if (!(i & 1))
			fr[i] = floor_disk(g->dir, "read", fio);
		if (!session_right(&x, opt.rows))
			die("what came back is not what left");
		session_end(&x);
		fprintf(stderr, "# round %u: out %.2f GB/s (fio %.2f), in %.2f GB/s (fio %.2f)\n", i,
			out[i] / 1e9, fw[i] / 1e9, in[i] / 1e9, fr[i] / 1e9);
	}
	snprintf(name, sizeof(name), "idle session of %.1f GiB, GPU to NVMe",
		 (double)all / (1024.0 * (double)MIB));
	against(name, out, fw, opt.rounds, pcie_out, "write");
	snprintf(name, sizeof(name), "idle session of %.1f GiB, NVMe to GPU",
		 (double)all / (1024.0 * (double)MIB));
	against(name, in, fr, opt.rounds, pcie_in, "read");
}

/* A session that lived with a fifth of its rows on the device is saved and resumed. */
static void resumed(struct rig *g, const struct shape *m, double pcie_in)
{
	double first[MAX_ROUNDS], whole[MAX_ROUNDS], fr[MAX_ROUNDS], ms;
	uint64_t all = (uint64_t)RESUME_ROWS * shape_lanes(m) * m->row_bytes, bytes;
	uint32_t keep = RESUME_ROWS / DEVICE_SHARE;
	struct session x;

	for (unsigned i = 0; i < opt.rounds; i++) {
		session_new(&x, g, m, RESUME_ROWS, 100 + i, opt.ring * MIB);
		session_fill(&x, RESUME_ROWS);
		session_move(&x, keep, &bytes);
		if (i & 1)
			fr[i] = floor_disk(g->dir, "read", all / MIB * MIB);
		first[i] = session_again(&x) + session_move(&x, keep, &bytes);
		if (!session_right(&x, keep))
			die("what was resumed is not what was saved");
		session_move(&x, KVT_ROWS_ALL, &bytes); /* the rest, lazily */
		if (!session_right(&x, RESUME_ROWS))
			die("what came later is not what was saved");
		whole[i] = session_again(&x);
		whole[i] = (double)all / (whole[i] + session_move(&x, KVT_ROWS_ALL, &bytes));
		if (!(i & 1))
			fr[i] = floor_disk(g->dir, "read", all / MIB * MIB);
		if (!session_right(&x, RESUME_ROWS))
			die("what was resumed whole is not what was saved");
		session_end(&x);
		fprintf(stderr, "# round %u: a fifth after %.1f ms, whole %.2f GB/s (fio %.2f)\n", i,
			first[i] * 1e3, whole[i] / 1e9, fr[i] / 1e9);
	}
	ms = median(first, opt.rounds) * 1e3 + opt.step;
	if (opt.prefill > 0)
		report("first token of a session resumed from NVMe, 32k rows, a fifth of them first", ms, "ms",
		       "prefill of 32k tokens, 7B shape, bf16", opt.prefill, opt.prefill / ms, 5);
	else
		fprintf(stderr, "# a fifth after %.1f ms; no --prefill to compare it with\n", ms);
	against("whole session resumed from NVMe, 32k rows", whole, fr, opt.rounds, pcie_in, "read");
}

static void figures(struct rig *g)
{
	static const struct shape m = {28, 4, 512};
	uint64_t bytes = (uint64_t)MAX(opt.rows, RESUME_ROWS) * shape_lanes(&m) * m.row_bytes;
	struct rig_conf conf = {.base = opt.dir,
				.workers = opt.workers,
				.depth = opt.depth,
				.dram = 256 * MIB,
				.nvme = (bytes / MIB * 2 + 1024) * MIB,
				.staging = opt.staging * MIB};
	double out, in;

	rig_daemon(g, &conf);
	out = floor_pcie(g, true);
	in = floor_pcie(g, false);
	fprintf(stderr, "# %s; PCIe out %.1f, in %.1f GB/s\n", g->info.name, out / 1e9, in / 1e9);
	idle(g, &m, out, in);
	if (!opt.idle)
		resumed(g, &m, in);
}

/* ---- small --------------------------------------------------------------------------------------- */

static unsigned tests, failures;

static void ok(bool good, const char *what)
{
	printf("%sok %u - %s\n", good ? "" : "not ", ++tests, what);
	fflush(stdout);
	failures += !good;
}

/* A store that takes fewer rows than there are: settle says so, and how many. */
static void unsaved(struct session *x, uint32_t room)
{
	struct kvtier_budget b = budget_of(KVT_ROWS_ALL);
	struct kvtier_seq_info info = {.size = sizeof(info)};
	uint64_t id;
	int r;

	b.nvme_rows = room;
	must(kvtier_plan_request(x->s, &b, &id), "kvtier_plan_request");
	r = kvtier_cuda_settle(x->s, 1, 20000, x->g->stream);
	must(kvtier_seq_info(x->s, &info), "kvtier_seq_info");
	ok(r == KVT_E_NOSPC && info.unsaved_rows == (uint64_t)(x->n - room) * shape_lanes(&x->rows.m),
	   "what has no room below is not called saved");
}

static void small(struct rig *g)
{
	static const struct shape m = {3, 2, 256};
	enum { ROWS = 700, KEEP = 140 };
	struct rig_conf conf = {.base = opt.dir,
				.workers = 2,
				.depth = 8,
				.dram = 64 * MIB,
				.nvme = 128 * MIB,
				.staging = 8 * MIB};
	uint64_t each = (uint64_t)shape_lanes(&m) * m.row_bytes, bytes;
	struct session x;

	rig_daemon(g, &conf);
	/* rings smaller than what moves: they go round */
	session_new(&x, g, &m, ROWS, 1, MIB);
	session_fill(&x, ROWS);
	ok(session_right(&x, ROWS), "rows are in the slots that the map says");
	unsaved(&x, 100);
	session_move(&x, 0, &bytes);
	ok(bytes == (ROWS - 100) * each && session_right(&x, 0), "all rows went to NVMe");
	cu(g, g->d->set8(x.rows.base, 0xdd, x.rows.bytes, g->stream), "cuMemsetD8Async");
	session_move(&x, KVT_ROWS_ALL, &bytes);
	ok(bytes == ROWS * each && session_right(&x, ROWS), "all rows came back");
	session_move(&x, KEEP, &bytes);
	ok(session_right(&x, KEEP), "a fifth stayed");
	session_again(&x);
	session_move(&x, KEEP, &bytes);
	ok(bytes == KEEP * each && session_right(&x, KEEP), "resumed, the same fifth came first");
	session_move(&x, KVT_ROWS_ALL, &bytes);
	ok(bytes == (ROWS - KEEP) * each && session_right(&x, ROWS), "the rest followed");
	session_end(&x);
	printf("1..%u\n", tests);
}

/* -------------------------------------------------------------------------------------------------- */

static void arguments(int argc, char **argv)
{
	enum { ROUNDS, ROWS, WORKERS, STAGING, DEPTH, RING, DIR, PREFILL, STEP, IDLE, SMALL };
	static const struct option longs[] = {
		{"rounds", 1, NULL, ROUNDS},   {"rows", 1, NULL, ROWS},   {"workers", 1, NULL, WORKERS},
		{"staging", 1, NULL, STAGING}, {"depth", 1, NULL, DEPTH}, {"ring", 1, NULL, RING},
		{"dir", 1, NULL, DIR},         {"step", 1, NULL, STEP},   {"prefill", 1, NULL, PREFILL},
		{"idle", 0, NULL, IDLE},       {"small", 0, NULL, SMALL}, {}};
	unsigned *const numbers[] = {&opt.rounds, &opt.rows, &opt.workers, &opt.staging, &opt.depth, &opt.ring};
	int c;

	while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		if (c >= ROUNDS && c <= RING)
			*numbers[c] = (unsigned)atoi(optarg);
		else if (c == DIR)
			opt.dir = optarg;
		else if (c == PREFILL)
			opt.prefill = atof(optarg);
		else if (c == STEP)
			opt.step = atof(optarg);
		else if (c == IDLE)
			opt.idle = true;
		else if (c == SMALL)
			opt.small = true;
		else
			exit(2);
	}
	opt.rounds = MAX(1u, MIN(opt.rounds, MAX_ROUNDS));
}

int main(int argc, char **argv)
{
	static struct rig g;

	arguments(argc, argv);
	if (rig_gpu(&g) < 0) {
		printf("1..0 # SKIP %s\n", kvtier_last_error());
		return 77;
	}
	if (!opt.small && !fio_program()) {
		printf("1..0 # SKIP no fio to compare the disk with\n");
		return 77;
	}
	if (opt.small)
		small(&g);
	else
		figures(&g);
	kvtier_close(g.c);
	rig_stop(&g);
	return failures ? 1 : 0;
}
