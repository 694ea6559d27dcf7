/* SPDX-License-Identifier: MIT */
/*
 * The core as a runtime meets it: a core on its own thread, real sockets, rings and regions through libkvtier.
 *
 *   1. From append to a visible plan, 90 lanes of 4,096 rows with scores given, against qsort(3) of the same
 * floats.
 *   2. Index and metadata per demoted row, for a prompt demoted at once and for one that grew row by row.
 *   3. What a decision costs with 100 and with 10,000 sequences of one size, caches cold each time.
 *   4. Demotion to NVMe and promotion from it, request to READY, against fio on the same file system.
 */
#include <jansson.h>
#include "tests/unit/core_harness.h"

#define MIB (UINT64_C(1) << 20)

static void die(const char *what)
{
	fprintf(stderr, "bench_core: %s: %s\n", what, kvtier_last_error());
	exit(1);
}

static void must(int r, const char *what)
{
	if (r < 0)
		die(what);
}

static int by_double(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double quantile(double *v, unsigned n, double q)
{
	qsort(v, n, sizeof(*v), by_double);
	return v[MIN(n - 1, (unsigned)(q * n))];
}

static void report(const char *name, double value, const char *unit, const char *rival, double theirs,
		   double ratio, const char *target, bool pass)
{
	printf("{\"name\":\"%s\",\"value\":%.4g,\"unit\":\"%s\",\"rival\":\"%s\",\"rival_value\":%.4g,"
	       "\"ratio\":%.4g,"
	       "\"target\":\"%s\",\"pass\":%s}\n",
	       name, value, unit, rival, theirs, ratio, target, pass ? "true" : "false");
	fflush(stdout);
}

/* ---- 1. latency ----------------------------------------------------------------------- */

#define LAT_LAYERS 30u
#define LAT_ROWS 4096u
#define LAT_KEEP 1024u
#define LAT_SEQS 16u
#define LAT_ROUNDS 15u
#define LAT_SAMPLES 240u

static int by_float(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return x < y ? -1 : x > y;
}

/*
 * One prompt of LAT_ROWS rows: seconds from append until the runtime has the plan. It waits as runtimes do, a
 * moment awake and then asleep: with two cores a spinning client would take the daemon's.
 */
static double append_to_plan(struct rt_seq *q)
{
	struct kvtier_plan p = {.size = sizeof(p)};
	uint64_t start, end;

	start = now_ns();
	must(kvtier_seq_append(q->s, KVT_ALL_LAYERS, 0, LAT_ROWS), "append");
	must(kvtier_plan_wait(q->s, 0, KVT_PLAN_DECIDED, 10000, &p), "decided");
	end = now_ns();
	must(kvtier_plan_wait(q->s, p.id, KVT_PLAN_READY, 10000, &p), "ready");
	must(kvtier_seq_truncate(q->s, 0), "truncate");
	return (double)(end - start) / 1e9;
}

static void lat_open(struct runtime *rt, struct rt_seq *q, uint32_t id)
{
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = LAT_KEEP, .dram_rows = KVT_ROWS_ALL, .policy = "client"};

	must(rt_prepare(q, rt, id, LAT_ROWS, 64, LAT_ROWS), "region");
	must(rt_seq_open(q, KVT_EPHEMERAL, &b), "open");
	for (uint32_t l = 0; l < rt->lanes; l++)
		for (uint32_t i = 0; i < LAT_ROWS; i++)
			*rt_score(q, l, i) = (float)(rt_random(q) % 1000003) / 1000.0f - 500.0f;
}

static double sort_all(struct rt_seq *q, float *buf)
{
	uint64_t ns = 0, start;

	for (uint32_t l = 0; l < q->rt->lanes; l++) {
		memcpy(buf, rt_score(q, l, 0), LAT_ROWS * sizeof(*buf));
		start = now_ns();
		qsort(buf, LAT_ROWS, sizeof(*buf), by_float);
		ns += now_ns() - start;
	}
	return (double)ns / 1e9;
}

static void latency(void)
{
	static struct rt_seq q[LAT_SEQS];
	static float buf[LAT_ROWS];
	double peek[LAT_ROUNDS], sort[LAT_ROUNDS], all[LAT_SAMPLES], med, p99;
	struct harness h;
	struct runtime rt;

	harness_init(&h, false);
	h.cfg.dram_size = UINT64_C(2) << 30;
	h.cfg.dram_segment = 256 * MIB;
	if (!harness_start(&h))
		die("start");
	must(rt_open_dims(&rt, h.sock[0], LAT_LAYERS, 3, 32, 32, LAT_SEQS, 64 * MIB), "open");
	lat_open(&rt, &q[0], 1);
	append_to_plan(&q[0]);
	for (unsigned i = 0; i < LAT_ROUNDS; i++) {
		peek[i] = append_to_plan(&q[0]);
		sort[i] = sort_all(&q[0], buf);
	}
	med = quantile(peek, LAT_ROUNDS, 0.5);
	report("append to plan visible, 90 x 4096, scores given", med * 1e3, "ms", "qsort of the same floats",
	       quantile(sort, LAT_ROUNDS, 0.5) * 1e3, med / quantile(sort, LAT_ROUNDS, 0.5), "<=0.05",
	       med / quantile(sort, LAT_ROUNDS, 0.5) <= 0.05);
	for (uint32_t i = 1; i < LAT_SEQS; i++)
		lat_open(&rt, &q[i], 1 + i);
	for (unsigned i = 0; i < LAT_SEQS; i++)
		append_to_plan(&q[i]);
	for (unsigned i = 0; i < LAT_SAMPLES; i++)
		all[i] = append_to_plan(&q[rt_random(&q[0]) % LAT_SEQS]);
	med = quantile(all, LAT_SAMPLES, 0.5);
	p99 = quantile(all, LAT_SAMPLES, 0.99);
	report("append to plan visible, 16 sequences, p99", p99 * 1e3, "ms", "its own median", med * 1e3,
	       p99 / med, "<=3", p99 / med <= 3);
	for (unsigned i = 0; i < LAT_SEQS; i++)
		rt_seq_free(&q[i], true);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
}

/* ---- 2. index ------------------------------------------------------------------------------ */

static void follow_all(struct rt_seq *q)
{
	struct kvtier_plan p = {.size = sizeof(p)};

	while (kvtier_plan_peek(q->s, &p) > 0)
		must(rt_follow(q, 0, &p), "follow");
}

static double metadata(bool grown, double *ret_rows)
{
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = 1024, .dram_rows = KVT_ROWS_ALL, .policy = "client"};
	struct harness h;
	struct runtime rt;
	struct rt_seq q;
	struct core_stat none, st;
	double share;

	harness_init(&h, false);
	h.cfg.dram_size = UINT64_C(1) << 30;
	if (!harness_start(&h))
		die("start");
	must(rt_open_dims(&rt, h.sock[0], 30, 3, 128, 128, 4, 64 * MIB), "open");
	none = harness_stat(&h);
	must(rt_prepare(&q, &rt, 1, grown ? 1500 : 4096, 64, 4096), "region");
	must(rt_seq_open(&q, KVT_EPHEMERAL, &b), "open");
	if (grown) {
		while (q.rows < 4096) {
			must(rt_append(&q, 64), "append");
			usleep(300);
			follow_all(&q);
		}
	} else {
		must(rt_append(&q, 4096), "append");
		must(rt_follow(&q, 0, NULL), "follow");
	}
	usleep(300000); /* small pages are merged behind the plans */
	st = harness_stat(&h);
	*ret_rows = (double)st.rows[KVT_TIER_DRAM];
	share = (double)(st.index_bytes - none.index_bytes) / (*ret_rows * 256.0);
	fprintf(stderr, "# index: %llu bytes for %.0f demoted rows of %u: %.2f bytes a row\n",
		(unsigned long long)(st.index_bytes - none.index_bytes), *ret_rows, 90 * 4096, share * 256);
	rt_seq_free(&q, true);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
	return share;
}

static void index_size(void)
{
	double rows, share = metadata(false, &rows);

	report("index and metadata per demoted row", share * 256, "bytes", "256 bytes of K and V", 256, share,
	       "<=0.02", share <= 0.02);
	share = metadata(true, &rows);
	report("index and metadata per demoted row, grown 64 rows at a time", share * 256, "bytes",
	       "256 bytes of K and V", 256, share, "<=0.02", share <= 0.02);
}

/* ---- 3. many sequences ----------------------------------------------------------------------- */

#define MANY_ROWS 400u
#define MANY_BUDGET 128u
#define MANY_SAMPLES 100u
#define MANY_MAX 10000u

static uint8_t *cold;

static void chill(void)
{
	static uint8_t x;

	for (uint64_t i = 0; i < 64 * MIB; i += 64)
		cold[i] = x++;
}

/* Median seconds of one decision (append to visible plan) while n sequences of one size exist. */
static double decision(uint32_t n)
{
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = MANY_BUDGET, .dram_rows = KVT_ROWS_ALL, .policy = "client"};
	struct kvtier_region *region;
	struct kvtier_seq **s = calloc(n, sizeof(struct kvtier_seq *));
	struct kvtier_layout lay[2];
	struct kvtier_seq_opts o = {.size = sizeof(o), .max_rows = 512, .layouts = lay, .budget = &b};
	struct harness h;
	struct runtime rt;
	double t[MANY_SAMPLES];
	uint64_t each, start;

	harness_init(&h, false);
	h.cfg.dram_size = UINT64_C(1) << 30;
	if (!harness_start(&h))
		die("start");
	must(rt_open_dims(&rt, h.sock[0], 2, 4, 16, 16, MANY_MAX + 8, 512 * MIB), "open");
	must(kvtier_layout_plain(rt.m, MANY_ROWS, 16, 0, 0, lay, &each), "layout");
	each = ALIGN_UP(each, 4096);
	must(kvtier_region_create(rt.c, n * (each + 8 * 512 * sizeof(float)), &region), "region");
	o.region = region;
	for (uint32_t i = 0; i < n; i++) {
		uint64_t base = i * (each + 8 * 512 * sizeof(float)), bytes;
		float *score = (float *)((char *)kvtier_region_addr(region) + base + each);

		must(kvtier_layout_plain(rt.m, MANY_ROWS, 16, 0, base, lay, &bytes), "layout");
		for (uint32_t k = 0; k < 2; k++) {
			lay[k].score_off = base + each + k * 4 * 512 * sizeof(float);
			lay[k].score_head_stride = 512 * sizeof(float);
		}
		for (uint32_t k = 0; k < 8 * 512; k++)
			score[k] = (float)(k * 7919 % 4096);
		must(kvtier_seq_open(rt.c, rt.m, &o, &s[i]), "open");
		must(kvtier_seq_append(s[i], KVT_ALL_LAYERS, 0, MANY_BUDGET), "append");
	}
	for (uint32_t i = 0; i < MANY_SAMPLES; i++) {
		struct kvtier_seq *q = s[(uint64_t)i * n / MANY_SAMPLES];
		struct kvtier_plan p = {.size = sizeof(p)};

		chill();
		start = now_ns();
		must(kvtier_seq_append(q, KVT_ALL_LAYERS, MANY_BUDGET, MANY_ROWS - MANY_BUDGET), "append");
		while (kvtier_plan_peek(q, &p) == 0)
			if (now_ns() - start > 5000000000u)
				die("no plan");
		t[i] = (double)(now_ns() - start) / 1e9;
	}
	for (uint32_t i = 0; i < n; i++)
		kvtier_seq_close(s[i]);
	kvtier_region_close(region);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
	free(s);
	return quantile(t, MANY_SAMPLES, 0.5);
}

static void many(void)
{
	double few[3], lots[3], a, b;

	cold = malloc(64 * MIB);
	if (!cold)
		die("memory");
	for (int i = 0; i < 3; i++) {
		few[i] = decision(100);
		lots[i] = decision(MANY_MAX);
		fprintf(stderr, "# decision with 100 sequences %.1f us, with %u %.1f us\n", few[i] * 1e6,
			MANY_MAX, lots[i] * 1e6);
	}
	a = quantile(few, 3, 0.5);
	b = quantile(lots, 3, 0.5);
	free(cold);
	report("cost per decision, 100 to 10000 sequences", b * 1e6, "us", "100 sequences", a * 1e6, b / a,
	       "<=1.3", b / a <= 1.3);
}

/* ---- 4. nvme --------------------------------------------------------------------------------------- */

#define DISK_ROWS 16384u
#define DISK_ROUNDS 5

static double fio(const char *dir, const char *rw, const char *shape, uint64_t bytes)
{
	char cmd[512];
	json_t *root;
	double bw;
	FILE *p;

	snprintf(cmd, sizeof(cmd),
		 "GLIBC_TUNABLES=glibc.malloc.hugetlb=1 fio --name=x --filename=%s/fio.dat --size=%lluM "
		 "--rw=%s %s "
		 "--ioengine=io_uring --fixedbufs=1 --registerfiles=1 --direct=1 --output-format=json "
		 "2>/dev/null",
		 dir, (unsigned long long)(bytes / MIB), rw, shape);
	p = popen(cmd, "r");
	root = p ? json_loadf(p, 0, NULL) : NULL;
	if (p)
		pclose(p);
	if (!root) {
		fprintf(stderr, "bench_core: fio did not run\n");
		exit(1);
	}
	bw = json_number_value(json_object_get(json_object_get(json_array_get(json_object_get(root, "jobs"), 0),
							       !strcmp(rw, "read") ? "read" : "write"),
					       "bw_bytes"));
	json_decref(root);
	return bw;
}

/* Request to READY: bytes per second of the rows that moved. */
static double move(struct rt_seq *q, uint32_t device)
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .device_rows = device,
				  .nvme_rows = KVT_ROWS_ALL,
				  .manual = 1,
				  .policy = "client"};
	struct kvtier_plan p = {.size = sizeof(p)};
	uint64_t id, start = now_ns(), ns;

	must(kvtier_plan_request(q->s, &b, &id), "request");
	must(kvtier_plan_wait(q->s, id, KVT_PLAN_READY, 60000, &p), "ready");
	ns = now_ns() - start;
	must(kvtier_plan_apply(q->s, &p), "apply");
	must(kvtier_plan_ack(q->s, p.id, NULL), "ack");
	return (double)(p.rows_out + p.rows_in) * 256.0 / ((double)ns / 1e9);
}

/* fio in the daemon's own sizes: runs as they reach the disk, and pages one by one. */
static const struct shape {
	const char *args, *name;
} shapes[] = {
	{"--bs=1M --iodepth=8", "1 MiB, depth 8"},
	{"--bs=32k --iodepth=32", "32 KiB, depth 32"},
};
#define SHAPES ARRAY_SIZE(shapes)

static void rivals(const char *dir, const char *rw, uint64_t bytes, double (*ret)[DISK_ROUNDS], int round)
{
	for (size_t i = 0; i < SHAPES; i++)
		ret[i][round] = fio(dir, rw, shapes[i].args, bytes);
}

static void disk_report(const char *what, double *ours, double (*theirs)[DISK_ROUNDS])
{
	double a = quantile(ours, DISK_ROUNDS, 0.5);

	for (size_t i = 0; i < SHAPES; i++) {
		double f = quantile(theirs[i], DISK_ROUNDS, 0.5);
		char name[96], rival[96];

		snprintf(name, sizeof(name), "%s, %s", what, shapes[i].name);
		snprintf(rival, sizeof(rival), "fio io_uring, %s", shapes[i].name);
		report(name, a / 1e9, "GB/s", rival, f / 1e9, a / f, ">=0.90", a / f >= 0.9);
	}
}

/* One round: fio before and after, so that neither side always comes first. */
static void disk_round(const struct harness *h, struct rt_seq *q, int i, uint64_t bytes, double *out,
		       double *in, double (*w)[DISK_ROUNDS], double (*r)[DISK_ROUNDS])
{
	const char *dir = h->cfg.nvme_path;

	if (i & 1)
		rivals(dir, "write", bytes, w, i);
	out[i] = move(q, 0);
	rivals(dir, i & 1 ? "read" : "write", bytes, i & 1 ? r : w, i);
	in[i] = move(q, DISK_ROWS);
	if (!(i & 1))
		rivals(dir, "read", bytes, r, i);
	fprintf(stderr, "# demote %.2f (fio %.2f, %.2f), promote %.2f (fio %.2f, %.2f) GB/s\n", out[i] / 1e9,
		w[0][i] / 1e9, w[1][i] / 1e9, in[i] / 1e9, r[0][i] / 1e9, r[1][i] / 1e9);
}

static void disk(void)
{
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = KVT_ROWS_ALL, .manual = 1, .policy = "client"};
	double out[DISK_ROUNDS], in[DISK_ROUNDS], w[SHAPES][DISK_ROUNDS], r[SHAPES][DISK_ROUNDS];
	uint64_t bytes = (uint64_t)90 * DISK_ROWS * 256;
	char dir[] = "build/bench-core-XXXXXX";
	struct harness h;
	struct runtime rt;
	struct rt_seq q;

	if (!mkdtemp(dir))
		die(dir);
	harness_init(&h, true);
	snprintf(h.cfg.nvme_path, sizeof(h.cfg.nvme_path), "%s", dir); /* a disk, not a tmpfs */
	h.cfg.dram_size = 64 * MIB;
	h.cfg.workers = 2; /* the loop has little to do meanwhile */
	h.cfg.nvme_size = 4 * bytes / MIB * MIB;
	h.cfg.nvme_segment = 32 * MIB;
	h.cfg.nvme_staging = 32 * MIB;
	h.cfg.nvme_depth = 32;
	h.cfg.nvme_prealloc = true;
	if (!harness_start(&h))
		die("start");
	must(rt_open_dims(&rt, h.sock[0], 30, 3, 128, 128, 4, 64 * MIB), "open");
	fio(dir, "write", shapes[0].args, bytes); /* its file exists from the first counted round on */
	for (int i = 0; i < DISK_ROUNDS; i++) {
		must(rt_prepare(&q, &rt, 1 + (uint32_t)i, DISK_ROWS, DISK_ROWS, DISK_ROWS), "region");
		must(rt_seq_open(&q, KVT_EPHEMERAL, &b), "open");
		memset(kvtier_region_addr(q.r), 0x35 + i, q.lay[29].v_off + 3 * q.lay[29].v_head_stride);
		must(kvtier_seq_append(q.s, KVT_ALL_LAYERS, 0, DISK_ROWS), "append");
		disk_round(&h, &q, i, bytes, out, in, w, r);
		rt_seq_free(&q, true);
	}
	disk_report("demote to nvme through the daemon", out, w);
	disk_report("promote from nvme through the daemon", in, r);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
	harness_rm(dir);
}

int main(int argc, char **argv)
{
	const char *only = argc > 1 ? argv[1] : "";

	if (!*only || strstr(only, "latency"))
		latency();
	if (!*only || strstr(only, "index"))
		index_size();
	if (!*only || strstr(only, "many"))
		many();
	if (!*only || strstr(only, "disk"))
		disk();
	return 0;
}
