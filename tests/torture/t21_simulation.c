/* SPDX-License-Identifier: MIT */
/*
 * torture 21: deterministic simulation of manager, mover, tiers and clients, by seed
 * pass: 10,000 seeds, no wrong byte, nothing unaccounted or left behind; same seed, same trace
 * quick: 250 seeds, and those that once found something
 * full: 10,000 seeds, and those that once found something
 * plants: ready-before-copied nack-ignored quota-leak reuse-before-ack
 * plants: source-freed-before-the-seal restart-keeps-both orphan-taken-apart merged-unfound
 *
 * The daemon's core runs as it is, with its index, manager, mover, restart and both tiers. Only what makes a
 * run differ from the next is replaced: time (sim_world.h), worker threads (workers_step()), and the engine
 * below the NVMe tier (sim_disk.h). Clients speak to it over sockets and shared memory (sim_client.h). A seed
 * chooses sizes, quotas and faults, and then what happens next, one small thing at a time: a turn of the loop,
 * a job, a disk request, a client's act, an operator's, a moment that passes, a power cut.
 *
 * Checked: every row that comes up and, now and then, all that are resident; plans against what the client has;
 * that nothing READY lacks its copies and published tables never change; the index against the client's view;
 * bytes charged against pages, and quotas, after every turn; that every plan asked for is answered; that a kill
 * takes no row that was safe (sim_loss.h); and at the
 * end that nothing is left: pages, bytes, handles, descriptors.
 *
 *   t21_simulation --seed N [-v]     one seed, with its record
 *   t21_simulation --seeds A B       seeds A to B - 1
 */
#include <dirent.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include "tests/torture/sim_acts.h"

/* Seeds that once failed, and what was wrong. */
static const struct {
	uint64_t seed;
	const char *found;
} known[] = {
	{951, "an older note found at a restart took its place on the disk for ever"},
	{617, "rows that nvme had no room for were read and refused without end"},
	{2051, "a client that appended after it applied a plan was ended"},
	{46,
	 "a sequence opened in the slot of one that an operator had dropped was ended by the other's append"},
	{6450, "pages of a sequence whose client had not come back were merged without knowing where V begins"},
	{9790, "the same"},
	{7071, "the same"},
	{5468, "rows far from each other were merged into a page of which dram's directory had no room for a record"},
};

/* ---- a seed ----------------------------------------------------------------------------------- */

static void make_disk(void)
{
	disk.least_ns = between(1, 100) * 1000;
	disk.most_ns = disk.least_ns + between(1, 3000) * 1000;
	if (!scene.faults)
		return;
	disk.eio_read = one_in(2) ? below(30) : 0;
	disk.eio_write = one_in(2) ? below(30) : 0;
	disk.eio_sync = one_in(3) ? below(30) : 0;
	disk.enospc = one_in(3) ? below(40) : 0;
	disk.stall = one_in(8) ? 1 : 0;
}

static void make_shape(void)
{
	struct shape *m = &side.shape;

	m->layers = between(1, 3);
	m->heads = between(1, 3);
	m->lanes = m->layers * m->heads;
	m->dtype = one_in(2) ? KVT_DTYPE_OPAQUE : KVT_DTYPE_F16;
	m->dim = m->dtype == KVT_DTYPE_OPAQUE ? 0 : 16 * between(1, 4);
	for (uint32_t i = 0; i < m->layers; i++) {
		m->k[i] = m->dim ? m->dim * 2 : between(1, 16) * 8;
		m->v[i] = one_in(6) ? 0 : m->dim ? m->dim * 2 : between(1, 12) * 8;
	}
}

static void make_config(void)
{
	struct config *c = &scene.cfg;

	config_defaults(c);
	c->tenants = 2;
	c->tenant[1] = c->tenant[0];
	strcpy(c->tenant[1].name, "other");
	for (int t = 0; t < 2; t++) {
		c->tenant[t].region_bytes = one_in(4) ? 2 << 20 : 64 << 20;
		c->tenant[t].max_clients_per_uid = 8;
		c->tenant[t].max_seqs = one_in(4) ? 3 : 64;
		c->tenant[t].dram_bytes = one_in(3) ? between(16, 300) * 4096u : UINT64_MAX;
		c->tenant[t].nvme_bytes = one_in(3) ? between(16, 300) * 4096u : UINT64_MAX;
	}
	c->dram_size = one_in(8) ? 0 : between(1, 2) * (UINT64_C(2) << 20);
	c->dram_segment = 2 << 20;
	c->dram_huge = false;
	c->dram_marks.min = below(60);
	c->dram_marks.low = c->dram_marks.min + below(200);
	c->dram_marks.high = c->dram_marks.low + below(200);
	c->nvme_enabled = !c->dram_size || !one_in(8);
	c->nvme_segment = 256 << 10;
	c->nvme_size = c->nvme_segment * between(9, 24);
	c->nvme_staging = 8 << 20;
	c->nvme_prealloc = false;
	c->nvme_deadline_ms = 5000;
	snprintf(c->nvme_path, sizeof(c->nvme_path), "%s/nvme", scene.dir);
	strcpy(c->policy, one_in(2) ? "client" : "streaming");
	strcpy(c->fallback, "streaming");
	c->protect_first = below(8);
	c->protect_last = below(24);
	c->hysteresis_permille = one_in(2) ? 0 : below(200);
	c->slack_rows = between(1, 64);
	if (one_in(2)) {
		c->budget_device = below(800);
		c->budget_dram = below(1000 - c->budget_device);
		c->budget_nvme = 1000 - c->budget_device - c->budget_dram;
	} else {
		c->budget_device = c->budget_dram = c->budget_nvme = 0;
	}
	c->orphan_ttl_s = 60;
	if (scene.flips && c->dram_size)
		snprintf(c->dram_fault, sizeof(c->dram_fault), "seed=%u,flip=%u,write_eio=%u", below(1000000),
			 below(20), below(20));
}

static void make_scene(uint64_t seed)
{
	memset(&side, 0, sizeof(side));
	world.seed = seed;
	world.rng = mix(seed + 1);
	world.now = SIM_EPOCH;
	world.look_ns = one_in(3) ? between(1, 20000) : between(1, 300);
	world.hash = world.events = 0;
	world.wait = wait_some;
	scene.faults = one_in(3);
	scene.flips = scene.faults && one_in(3);
	scene.cuts = one_in(3);
	make_shape();
	make_config();
	make_disk();
	scene.kills_on = one_in(3);
	scene.cuts &= scene.cfg.nvme_enabled;
	/* Not by the seed's own numbers: those of before have the lives that they had. */
	scene.keeps = seed >= 1000 && scene.cfg.dram_size && scene.cfg.nvme_enabled && !scene.flips &&
		      mix(seed * 31 + 7) % 2;
	loss.on = scene.kills_on && !scene.faults && scene.cfg.nvme_enabled;
	scene.nvme_ops = tier_nvme_ops;
	scene.nvme_ops.open = disk_tier_open;
	scene.seams = (struct core_seams){.stepped = true, .tier = {[KVT_TIER_NVME] = &scene.nvme_ops}};
	side.step = step;
	side.meanwhile = meanwhile;
	if (sd_event_new(&scene.ev) < 0)
		abort();
}

static void live_through(void)
{
	uint32_t acts = between(150, 500);

	for (uint32_t i = 0; i < acts; i++) {
		for (uint32_t k = below(12); k; k--)
			step();
		if (one_in(40))
			operator_act();
		else
			client_act();
		if (one_in(40))
			check_all();
		if (one_in(200))
			pause_for(UINT64_C(1000000000) * between(1, one_in(3) ? 80 : 5));
		if (scene.kills_on && one_in(150))
			killed();
		else if (scene.cuts && one_in(120))
			power_cut();
		else if (one_in(400))
			restart();
	}
}

/* Nothing goes wrong any more: everybody gets what was asked for, and what is below comes up right. */
static void come_to_rest(void)
{
	disk.eio_read = disk.eio_write = disk.eio_sync = disk.enospc = disk.stall = 0;
	scene.quiet = true;
	if (side.core->frozen)
		core_freeze(side.core, false);
	side.meanwhile = NULL;
	for (int round = 0; round < 40; round++) {
		bool waits = false;

		settle(UINT64_C(2000000000));
		world.now += 125000000;
		for (unsigned i = 0; i < MAX_SEQS; i++) {
			struct mseq *s = &side.seq[i];
			struct plan_view v;

			if (s->life != LIVE)
				continue;
			if (round % 8 == 4 && round < 30)
				seq_ask(s, one_in(2));
			if (s->life != LIVE)
				continue;
			seq_follow(s, true);
			if (s->applied)
				seq_ack(s, s->applied, s->nacked[0]);
			hint(s);
			if (s->want)
				(void)look(s, &v);
			waits |= s->want != 0;
		}
		if (!waits && round > 34)
			break;
	}
	settle(UINT64_C(5000000000));
	for (unsigned i = 0; i < MAX_SEQS; i++) {
		const struct mseq *s = &side.seq[i];

		must(s->life != LIVE || !s->want || !s->rows || !handle_get(side.core->seqs, s->handle, NULL),
		     "sequence %u: plan %llu was asked for %llu ms ago and never came", i,
		     (unsigned long long)s->want, (unsigned long long)((world.now - s->want_since) / 1000000));
	}
	check_all();
}

/* Everything that anybody held goes. */
static void end_all(void)
{
	struct core *c = side.core;

	for (unsigned i = 0; i < MAX_SEQS; i++) {
		struct mseq *s = &side.seq[i];

		if (s->life == LIVE)
			seq_leave_by_call(s, one_in(2));
	}
	for (unsigned i = 0; i < MAX_CLIENTS; i++)
		client_off(&side.client[i]);
	for (int i = 0; i < 400 && c->n_seqs; i++) {
		settle(UINT64_C(1000000000));
		world.now += 250000000;
	}
	settle(UINT64_C(5000000000));
	must(!c->n_seqs && !c->n_orphans && !handle_count(c->seqs), "%u sequences are left, %u of them leased",
	     c->n_seqs, c->n_orphans);
	must(!c->n_clients && LIST_EMPTY(&c->clients) && LIST_EMPTY(&c->ended), "clients are left");
	must(!handle_count(c->regions) && LIST_EMPTY(&c->all_regions), "regions are left");
	must(!c->pages.count, "%llu pages are left", (unsigned long long)c->pages.count);
	must(!c->seq_index_bytes, "index: %llu bytes are left", (unsigned long long)c->seq_index_bytes);
	must(!c->stat.plan_bytes && LIST_EMPTY(&c->models), "plans or models are left");
	for (uint32_t i = 0; i < c->tenants; i++)
		must(!c->tenant[i].seqs && !c->tenant[i].region_bytes && !c->pages.used[1][i] &&
			     !c->pages.used[2][i],
		     "tenant %u is still charged", i);
	/* Copies that the cleaner has not told of yet die when it does. */
	if (c->pages.tier[KVT_TIER_NVME])
		(void)c->pages.tier[KVT_TIER_NVME]->ops->sync(c->pages.tier[KVT_TIER_NVME]);
	pause_for(UINT64_C(2000000000));
	scene.over = true;
	check_bytes(c);
}

__attribute__((noinline)) static unsigned descriptors(void)
{
	unsigned n = 0;

	for (int fd = 0; fd < 512; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

static void clear_dir(const char *path)
{
	char p[512];
	DIR *d = opendir(path);

	for (struct dirent *e; d && (e = readdir(d));) {
		if (e->d_name[0] == '.')
			continue;
		snprintf(p, sizeof(p), "%s/%s", path, e->d_name);
		unlink(p);
	}
	if (d)
		closedir(d);
	rmdir(path);
}

__attribute__((noinline)) static void whole_life(void)
{
	core_on();
	live_through();
	come_to_rest();
	if (one_in(4) && scene.cfg.nvme_enabled) {
		restart();
		for (int i = 0; i < 60; i++)
			client_act();
		come_to_rest();
	}
	end_all();
	core_off();
}

/* True: all well. The record's hash is left in world. */
static bool run_seed(uint64_t seed, const char *dir)
{
	unsigned had = descriptors();
	char nvme[96];

	memset(&scene, 0, sizeof(scene));
	memset(&ledger_was, 0, sizeof(ledger_was));
	disk_forget(); /* a seed that failed leaves it as it was */
	store_empty();
	memset(&loss, 0, sizeof(loss));
	snprintf(scene.dir, sizeof(scene.dir), "%s", dir);
	snprintf(nvme, sizeof(nvme), "%s/nvme", dir);
	world.failed = false;
	make_scene(seed);
	world.on = true;
	if (!setjmp(world.out))
		whole_life();
	world.on = false;
	if (world.failed)
		return false;
	sd_event_unref(scene.ev);
	store_empty();
	disk_forget();
	clear_dir(nvme);
	if (descriptors() != had) {
		snprintf(world.why, sizeof(world.why), "%u descriptors before, %u after", had, descriptors());
		return false;
	}
	return true;
}

/* ---- many of them ----------------------------------------------------------------------------- */

struct shared { /* between the processes */
	_Atomic uint64_t next;
	_Atomic uint64_t rows, plans, cuts, kills, steps, events, kept;
	_Atomic uint32_t failed;
	uint64_t at[256]; /* which seed a process is at */
};

static void make_dir(char *dir, size_t size)
{
	snprintf(dir, size, "%s/kvt-sim-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
	if (!mkdtemp(dir))
		abort();
}

static void one_process(struct shared *sh, unsigned me, uint64_t end)
{
	char dir[64];
	uint64_t seed;

	make_dir(dir, sizeof(dir));
	while ((seed = atomic_fetch_add(&sh->next, 1)) < end) {
		sh->at[me] = seed;
		if (!run_seed(seed, dir)) {
			printf("# seed %llu: %s\n", (unsigned long long)seed, world.why);
			fflush(stdout);
			atomic_fetch_add(&sh->failed, 1);
			clear_dir(scene.cfg.nvme_path);
			rmdir(dir);
			_exit(3);
		}
		atomic_fetch_add(&sh->rows, side.rows_checked);
		atomic_fetch_add(&sh->plans, side.plans_applied);
		atomic_fetch_add(&sh->cuts, scene.power_cuts);
		atomic_fetch_add(&sh->kills, scene.kills);
		atomic_fetch_add(&sh->kept, loss.expected);
		atomic_fetch_add(&sh->steps, scene.steps);
		atomic_fetch_add(&sh->events, world.events);
	}
	rmdir(dir);
	_exit(0);
}

/* Seeds [from, end) over all cores; a process that dies takes one seed with it. Failures. */
static uint32_t run_seeds(uint64_t from, uint64_t end, struct shared *sh)
{
	unsigned n = (unsigned)MIN(MAX(sysconf(_SC_NPROCESSORS_ONLN), 1), 256), on = 0;
	pid_t pid[256] = {0};

	atomic_store(&sh->next, from);
	for (;;) {
		int st;
		pid_t p;

		for (unsigned i = 0; i < n; i++)
			if (!pid[i] && atomic_load(&sh->next) < end && atomic_load(&sh->failed) < 20) {
				fflush(stdout);
				pid[i] = fork();
				if (!pid[i])
					one_process(sh, i, end);
				on++;
			}
		if (!on)
			return atomic_load(&sh->failed);
		p = wait(&st);
		if (p < 0)
			abort();
		for (unsigned i = 0; i < n; i++)
			if (pid[i] == p) {
				pid[i] = 0;
				on--;
				if (WIFSIGNALED(st) || (WEXITSTATUS(st) && WEXITSTATUS(st) != 3)) {
					printf("# seed %llu: the process ended with %s %d\n",
					       (unsigned long long)sh->at[i],
					       WIFSIGNALED(st) ? "signal" : "status",
					       WIFSIGNALED(st) ? WTERMSIG(st) : WEXITSTATUS(st));
					atomic_fetch_add(&sh->failed, 1);
				}
			}
	}
}

static uint64_t hash_of_seed(uint64_t seed)
{
	char dir[64];

	make_dir(dir, sizeof(dir));
	if (!run_seed(seed, dir))
		printf("# seed %llu: %s\n", (unsigned long long)seed, world.why);
	rmdir(dir);
	return world.hash;
}

/* The record of a seed in another process, at other addresses. */
static uint64_t hash_elsewhere(const char *self, uint64_t seed)
{
	char cmd[512];
	unsigned long long h = 0;
	FILE *f;

	snprintf(cmd, sizeof(cmd), "'%s' --hash %llu", self, (unsigned long long)seed);
	f = popen(cmd, "r");
	if (!f || fscanf(f, "%llx", &h) != 1)
		h = 1;
	if (f)
		pclose(f);
	return h;
}

static bool ok(unsigned n, bool good, const char *what)
{
	printf("%s %u - %s\n", good ? "ok" : "not ok", n, what);
	fflush(stdout);
	return good;
}

static bool same_record(const char *self, uint64_t from, unsigned n)
{
	bool good = true;

	for (uint64_t seed = from; seed < from + n; seed++) {
		uint64_t a = hash_of_seed(seed), b = hash_of_seed(seed), c = hash_elsewhere(self, seed);

		if (a != b || a != c) {
			printf("# seed %llu: records %llx, %llx and, in another process, %llx\n",
			       (unsigned long long)seed, (unsigned long long)a, (unsigned long long)b,
			       (unsigned long long)c);
			good = false;
		}
	}
	return good;
}

int main(int argc, char **argv)
{
	const char *mode = getenv("KVT_TORTURE"), *first = getenv("KVT_SEED");
	bool full = mode && !strcmp(mode, "full"), good;
	uint64_t from = first ? strtoull(first, NULL, 0) : 1000, n = full ? 10000 : 250;
	struct shared *sh = mmap(NULL, sizeof(*sh), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct timespec a, b;
	double s;

	signal(SIGPIPE, SIG_IGN);
	log_set_level(7); /* always: what is logged reads the clock */
	world.verbose = argc > 3 && !strcmp(argv[3], "-v");
	if (!world.verbose && !freopen("/dev/null", "w", stderr))
		return 1;
	if (argc > 2 && (!strcmp(argv[1], "--seed") || !strcmp(argv[1], "--hash"))) {
		uint64_t seed = strtoull(argv[2], NULL, 0);

		hash_of_seed(seed);
		printf("%llx\n", (unsigned long long)world.hash);
		return world.failed;
	}
	if (argc > 3 && !strcmp(argv[1], "--seeds")) {
		from = strtoull(argv[2], NULL, 0);
		n = strtoull(argv[3], NULL, 0) - from;
	}
	clock_gettime(CLOCK_MONOTONIC, &a);
	good = ok(1, same_record(argv[0], from, full ? 100 : 10), "same seed, same record, in any process");
	for (unsigned i = 0; i < ARRAY_SIZE(known); i++)
		run_seeds(known[i].seed, known[i].seed + 1, sh);
	good &= ok(2, !atomic_load(&sh->failed), "seeds that once found something");
	atomic_store(&sh->failed, 0);
	good &= ok(3, !run_seeds(from, from + n, sh), "seeds");
	clock_gettime(CLOCK_MONOTONIC, &b);
	s = (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec) / 1e9;
	if (good)
		printf("# figure: %llu simulated lives, %llu plans, %llu kills, %llu power cuts, 0 of %llu "
		       "rows wrong, 0 of %llu known rows lost by kills, %.0f lives/s\n",
		       (unsigned long long)n, (unsigned long long)sh->plans, (unsigned long long)sh->kills,
		       (unsigned long long)sh->cuts, (unsigned long long)sh->rows, (unsigned long long)sh->kept,
		       (double)n / s);
	printf("# %llu events of %llu steps in %.1f s\n1..3\n", (unsigned long long)sh->events,
	       (unsigned long long)sh->steps, s);
	return !good;
}
