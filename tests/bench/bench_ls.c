/* SPDX-License-Identifier: MIT */
/*
 * Looking at many: `kvtierctl --json ls` with 10,000 sequences, from its start to its end, the daemon beside it
 * a process of its own; and the longest slice of the daemon's loop meanwhile, with `status` and `show` asked
 * too. The rival of the listing is what one exchange with the daemon costs, that of the slices the loop at
 * rest.
 *
 * KVT_BUILD: where kvtierd and kvtierctl are (build).
 */
#include <jansson.h>
#include <sys/wait.h>
#include "tests/unit/core_harness.h"

#define SEQS 10000u
#define ROWS 128u
#define ROUNDS 9u

static char dir[64] = "/tmp/kvt-ls-XXXXXX";
static pid_t daemon_pid;

static void die(const char *what)
{
	fprintf(stderr, "bench_ls: %s: %s\n", what, kvtier_last_error());
	if (daemon_pid > 0)
		kill(daemon_pid, SIGKILL);
	harness_rm(dir);
	exit(1);
}

static int by_double(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static const char *tool(const char *name)
{
	static char path[512];
	const char *build = getenv("KVT_BUILD");

	snprintf(path, sizeof(path), "%s/%s", build ?: "build", name);
	return path;
}

static void start_daemon(char *config)
{
	FILE *f = fopen(config, "w");

	if (!f)
		die(config);
	fprintf(f,
		"[kvtierd]\nrun_dir=%s\nworkers=1\n[dram]\nsize=512M\nhuge_pages=no\n[nvme]\nenabled=no\n"
		"[policy]\ndefault=random\n[tenant default]\nmax_seqs=20000\nmax_region=8G\n",
		dir);
	fclose(f);
	daemon_pid = fork();
	if (!daemon_pid) {
		execl(tool("kvtierd"), "kvtierd", "--config", config, NULL);
		_exit(127);
	}
}

/* What `kvtierctl --json VERB` says, parsed; *ret_s: seconds that it took. */
static json_t *ctl(const char *verb, double *ret_s)
{
	char line[700];
	uint64_t start = now_ns();
	char *text = NULL;
	size_t n = 0, got;
	char buf[65536];
	FILE *p, *f = open_memstream(&text, &n);
	json_t *j;

	snprintf(line, sizeof(line), "%s --json --socket %s/admin.sock %s", tool("kvtierctl"), dir, verb);
	p = popen(line, "r");
	if (!p || !f)
		die("kvtierctl");
	while ((got = fread(buf, 1, sizeof(buf), p)) > 0)
		fwrite(buf, 1, got, f);
	if (pclose(p))
		die(verb);
	*ret_s = (double)(now_ns() - start) / 1e9;
	fclose(f);
	j = json_loadb(text, n, 0, NULL);
	free(text);
	if (!j)
		die("kvtierctl: not JSON");
	return j;
}

/* Every sequence has rows on the device and in DRAM pages, by a plan that its runtime applied. */
static void fill(struct runtime *rt, struct kvtier_seq **s)
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .kind = KVT_BUDGET_UNIFORM,
				  .device_rows = ROWS / 4,
				  .dram_rows = ROWS,
				  .manual = 1};
	struct kvtier_layout lay[2];
	struct kvtier_seq_opts o = {.size = sizeof(o), .max_rows = 2 * ROWS, .layouts = lay, .budget = &b};
	uint64_t each, bytes;

	if (kvtier_layout_plain(rt->m, ROWS, 16, 0, 0, lay, &each) < 0)
		die("layout");
	each = ALIGN_UP(each, 4096);
	if (kvtier_region_create(rt->c, SEQS * each, &o.region) < 0)
		die("region");
	for (uint32_t i = 0; i < SEQS; i++)
		if (kvtier_layout_plain(rt->m, ROWS, 16, 0, i * each, lay, &bytes) < 0 ||
		    kvtier_seq_open(rt->c, rt->m, &o, &s[i]) < 0 ||
		    kvtier_seq_append(s[i], KVT_ALL_LAYERS, 0, ROWS) < 0)
			die("sequence");
	for (uint32_t i = 0; i < SEQS; i++) {
		struct kvtier_plan p = {.size = sizeof(p)};
		uint64_t id;

		if (kvtier_plan_request(s[i], &b, &id) < 0 ||
		    kvtier_plan_wait(s[i], id, KVT_PLAN_READY, 10000, &p) < 0 ||
		    kvtier_plan_apply(s[i], &p) < 0 || kvtier_plan_ack(s[i], p.id, NULL) < 0)
			die("plan");
	}
}

static void report(const char *name, double value, const char *unit, const char *rival, double theirs,
		   const char *target, bool pass)
{
	printf("{\"name\":\"%s\",\"value\":%.4g,\"unit\":\"%s\",\"rival\":\"%s\",\"rival_value\":%.4g,"
	       "\"ratio\":%.4g,\"target\":\"%s\",\"pass\":%s}\n",
	       name, value, unit, rival, theirs, value / theirs, target, pass ? "true" : "false");
}

struct slices {
	double wall, cpu; /* ms */
};

/* Longest of the last two seconds, and the longest so far of `so_far`. */
static struct slices longest_slice(struct slices so_far)
{
	double t, wall, cpu;
	json_t *j = ctl("status", &t);

	wall = (double)json_integer_value(json_object_get(j, "loop_recent_max_ns")) / 1e6;
	cpu = (double)json_integer_value(json_object_get(j, "loop_cpu_recent_max_ns")) / 1e6;
	json_decref(j);
	return (struct slices){wall > so_far.wall ? wall : so_far.wall, cpu > so_far.cpu ? cpu : so_far.cpu};
}

static json_t *listed(double *ret_s)
{
	json_t *j = ctl("ls", ret_s);

	if (json_array_size(json_object_get(j, "seqs")) != SEQS)
		die("ls: not all sequences");
	return j;
}

static void look(void)
{
	double list[ROUNDS], one[ROUNDS], t;
	struct slices rest, busy = {0, 0};
	uint64_t end;
	char verb[64];
	json_t *j;

	sleep(3);
	rest = longest_slice(busy);
	for (unsigned i = 0; i < ROUNDS; i++) {
		json_decref(ctl("version", &one[i]));
		json_decref(listed(&list[i]));
	}
	sleep(3); /* what the rounds above did is forgotten: now everything at once, for more than one window */
	end = now_ns() + 4000000000u;
	while (now_ns() < end) {
		j = listed(&t);
		snprintf(verb, sizeof(verb), "show %s lanes",
			 json_string_value(
				 json_object_get(json_array_get(json_object_get(j, "seqs"), SEQS / 2), "key")));
		json_decref(j);
		json_decref(ctl(verb, &t));
		json_decref(ctl("status", &t));
		busy = longest_slice(busy);
	}
	qsort(list, ROUNDS, sizeof(*list), by_double);
	qsort(one, ROUNDS, sizeof(*one), by_double);
	report("ls --json of 10000 sequences", list[ROUNDS / 2] * 1e3, "ms", "kvtierctl version",
	       one[ROUNDS / 2] * 1e3, "<=200", list[ROUNDS / 2] <= 0.2);
	report("longest slice of the loop meanwhile, wall", busy.wall, "ms", "the loop at rest", rest.wall,
	       "<=1", busy.wall <= 1);
	report("longest slice of the loop meanwhile, its processor time", busy.cpu, "ms", "the loop at rest",
	       rest.cpu, "<=1", busy.cpu <= 1);
}

/*
 * The map of a sequence of 10^6 rows in 8 lanes of which every other one was dropped at random, with scores in
 * 1,000 columns: as many runs as there can be.
 */
static void huge(const char *sock)
{
	const uint32_t rows = 1000000;
	struct kvtier_budget b = {
		.size = sizeof(b), .kind = KVT_BUDGET_UNIFORM, .device_rows = rows / 2, .manual = 1};
	struct kvtier_layout lay[2];
	struct kvtier_seq_opts o = {.size = sizeof(o), .max_rows = rows, .layouts = lay, .budget = &b};
	struct kvtier_seq_info info = {.size = sizeof(info)};
	struct kvtier_plan p = {.size = sizeof(p)};
	struct slices rest, busy = {0, 0};
	struct kvtier_seq *s;
	struct runtime rt;
	uint64_t bytes, id, end;
	double took[64], t;
	unsigned n = 0;
	char verb[64], name[64];
	size_t runs = 0;

	if (rt_open_dims(&rt, sock, 2, 4, 16, 16, 1, UINT64_C(64) << 20) < 0 ||
	    kvtier_layout_plain(rt.m, rows, 16, 0, 0, lay, &bytes) < 0 ||
	    kvtier_region_create(rt.c, ALIGN_UP(bytes, 4096), &o.region) < 0 ||
	    kvtier_seq_open(rt.c, rt.m, &o, &s) < 0 || kvtier_seq_append(s, KVT_ALL_LAYERS, 0, rows) < 0 ||
	    kvtier_plan_request(s, &b, &id) < 0 || kvtier_plan_wait(s, id, KVT_PLAN_READY, 20000, &p) < 0 ||
	    kvtier_plan_apply(s, &p) < 0 || kvtier_plan_ack(s, p.id, NULL) < 0 || kvtier_seq_info(s, &info) < 0)
		die("the huge sequence");
	sleep(3);
	rest = longest_slice(busy);
	end = now_ns() + 4000000000u;
	for (snprintf(verb, sizeof(verb), "map 0x%llx 0+ 1000", (unsigned long long)info.handle);
	     now_ns() < end; n += n + 1 < ARRAY_SIZE(took)) {
		json_t *j = ctl(verb, &took[n]);
		const json_t *lanes = json_object_get(j, "lane");

		if (json_array_size(lanes) != 8)
			die("map: not all lanes");
		for (size_t l = runs = 0; l < 8; l++)
			runs += json_array_size(json_object_get(json_array_get(lanes, l), "runs")) / 2;
		json_decref(j);
		busy = longest_slice(busy);
	}
	json_decref(ctl("version", &t));
	qsort(took, n, sizeof(*took), by_double);
	snprintf(name, sizeof(name), "map of 8 lanes of 10^6 rows, %zu runs", runs);
	report(name, took[n / 2] * 1e3, "ms", "kvtierctl version", t * 1e3, "none", true);
	report("longest slice of the loop during map, wall", busy.wall, "ms", "the loop at rest", rest.wall,
	       "<=1", busy.wall <= 1);
	report("longest slice of the loop during map, its processor time", busy.cpu, "ms", "the loop at rest",
	       rest.cpu, "<=1", busy.cpu <= 1);
	rt_close(&rt);
}

int main(void)
{
	struct kvtier_seq **s = calloc(SEQS, sizeof(*s));
	char config[128], sock[128];
	struct runtime rt;
	int r = KVT_E_DAEMON;

	if (!s || !mkdtemp(dir))
		die("directory");
	snprintf(config, sizeof(config), "%s/kvtierd.conf", dir);
	snprintf(sock, sizeof(sock), "%s/kvtierd.sock", dir);
	start_daemon(config);
	for (int i = 0; i < 500 && r < 0; i++) {
		r = rt_open(&rt, sock, 1);
		usleep(10000);
	}
	if (r < 0)
		die("daemon");
	rt_close(&rt);
	huge(sock);
	if (rt_open_dims(&rt, sock, 2, 4, 16, 16, SEQS, UINT64_C(512) << 20) < 0)
		die("client");
	fill(&rt, s);
	look();
	rt_close(&rt);
	kill(daemon_pid, SIGTERM);
	waitpid(daemon_pid, NULL, 0);
	harness_rm(dir);
	free(s);
	return 0;
}
