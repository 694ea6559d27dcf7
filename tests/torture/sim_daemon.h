/* SPDX-License-Identifier: MIT */
#pragma once
/* The daemon's life in a simulation: its turns, its jobs, its waits, and the three ways in which it ends. */
#include <fcntl.h>
#include <openssl/sha.h>
#include "shm/crc.h"
#include "tests/torture/sim_disk.h"
#include "tests/torture/sim_plans.h"
#include "tests/torture/sim_loss.h"

struct scene {
	struct config cfg;
	struct core_seams seams;
	struct tier_ops nvme_ops;
	sd_event *ev;
	struct feed_reader feed;
	char dir[64];
	uint32_t steps, power_cuts, kills, restarts;
	bool keeps, cuts, kills_on, faults, flips, quiet; /* quiet: the end, nothing goes wrong any more */
	bool drained, over;
	uint32_t restful;
};
static struct scene scene;

/* ---- the daemon's side ------------------------------------------------------------------ */

static void read_feed(void)
{
	struct feed_event e;

	while (feed_read(&scene.feed, &e, NULL) == 1) {
		record("feed", (uint64_t)e.type << 32 | (uint64_t)e.from << 16 | e.to, e.seq ^ e.plan << 20,
		       e.bytes, (uint64_t)e.rows[0] << 32 ^ e.rows[1] ^ (uint64_t)e.rows[2] << 16 ^ e.rows[3]);
	}
}

static void check_quotas(const struct core *c)
{
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
		for (uint32_t i = 0; i < c->tenants; i++) {
			const struct config_tenant *l = &c->tenant[i].limit;
			uint64_t limit = t == KVT_TIER_DRAM ? l->dram_bytes : l->nvme_bytes;

			must(c->pages.used[t][i] <= limit,
			     "tenant %u has %llu bytes in tier %d, its quota is %llu", i,
			     (unsigned long long)c->pages.used[t][i], t, (unsigned long long)limit);
		}
	for (uint32_t i = 0; i < c->tenants; i++)
		must(c->tenant[i].region_bytes <= c->tenant[i].limit.region_bytes, "tenant %u: region bytes",
		     i);
}

/* One turn of the loop; false: it had nothing to do. */
static bool turn(void)
{
	int r = sd_event_run(scene.ev, 0);

	must(r >= 0, "loop: %s", strerror(-r));
	if (r) {
		read_feed();
		check_quotas(side.core);
		loss_look(side.core);
	}
	return r > 0;
}

/* The next small thing that happens without anybody's doing. */
static void step(void)
{
	uint32_t what = below(16);
	bool did = false;
	uint64_t next;

	scene.steps++;
	if (what < 7)
		did = turn();
	else if (what < 11)
		did = workers_step(side.core->workers, one_in(3));
	else if (what < 15)
		did = disk_step();
	if (did) {
		scene.restful = 0;
		return;
	}
	if (++scene.restful < 12 && what < 15) {
		world.now += below(20000);
		return;
	}
	/* Nothing was due for a while: on to what is. */
	next = disk_next();
	world.now = next > world.now && next < world.now + 5000000 ? next : world.now + below(5000000);
}

/* Somebody in the daemon waits: a flush, an end. */
static void wait_some(bool loop)
{
	while (loop && workers_step(side.core->workers, one_in(3)))
		;
	for (unsigned i = below(8) + 1; i && disk_step(); i--)
		;
}

/* Until nothing is under way, or for this long. */
static bool settle(uint64_t ns)
{
	uint64_t end = world.now + ns;
	uint32_t idle = 0;

	while (world.now < end && idle < 4) {
		bool did = turn();

		did |= workers_step(side.core->workers, false);
		did |= disk_step();
		if (did) {
			idle = 0;
			continue;
		}
		idle += !disk.n && !mover_busy(side.core) && !workers_busy(side.core->workers);
		world.now = MAX(world.now + 1000000, MIN(disk_next(), world.now + 100000000));
	}
	return idle >= 4;
}

static int store_file(unsigned i)
{
	char path[128];
	int fd;

	snprintf(path, sizeof(path), "%s/nvme/kvtier-%03u.dat", scene.dir, i);
	fd = open(path, O_RDWR | O_CLOEXEC);
	must(fd >= 0, "%s: %s", path, strerror(errno));
	return fd;
}

static void core_on(void)
{
	char err[256];
	int r;
	const void *mem;

	scene.seams.keep = scene.keeps ? store_offer() : NULL;
	r = core_new_with(&side.core, &scene.cfg, &scene.seams, scene.ev, err, sizeof(err));
	must(!r, "core_new: %s", err);
	mem = side.core->feed_seg.addr;
	feed_reader_init(&scene.feed, mem, side.core->feed_seg.size, 1);
	record("on", side.core->n_orphans, 0, 0, 0);
}

static void core_off(void)
{
	struct core *c = side.core;

	core_free(c);
	side.core = NULL;
}

/* Every client's connection is gone: what they have left is their memory. */
static void all_lost(void)
{
	for (unsigned i = 0; i < MAX_SEQS; i++)
		if (side.seq[i].life == LIVE)
			seq_lost(&side.seq[i], false);
	for (unsigned i = 0; i < MAX_CLIENTS; i++)
		client_off(&side.client[i]);
}

/*
 * What the new life has of a sequence: a state that it once was in, some rows missing. Its clients had been
 * told of every epoch, so only a power cut may take one back. The daemon begins a new epoch behind what it
 * found.
 */
static void find_again(struct mseq *s, bool cut)
{
	const struct tenant *t = &side.core->tenant[s->tenant];
	uint8_t hash[SHA256_DIGEST_LENGTH];
	const struct seq *d;
	uint32_t epoch;

	SHA256(s->secret, sizeof(s->secret), hash);
	d = names_resume(&side.core->names, tenant_hash(t, 1000), s->key, hash);
	if (!d) {
		s->life = GONE;
		return;
	}
	epoch = d->epoch - 1;
	must(cut ? epoch <= s->epoch : epoch == s->epoch, "found at epoch %u, its client was told %u", epoch,
	     s->epoch);
	while (s->eras && s->era[s->eras - 1].epoch > epoch)
		s->eras--;
	must(s->eras && d->rows <= s->era[s->eras - 1].len,
	     "found at epoch %u with %u rows, there never were as many", epoch, d->rows);
	s->era[s->eras - 1].len = d->rows;
	s->epoch = d->epoch;
	s->rows = d->rows;
	s->left_ns = world.now;
	era_add(s, s->epoch, s->rows);
}

static void core_again(bool cut)
{
	core_on();
	for (unsigned i = 0; i < MAX_SEQS; i++)
		if (side.seq[i].life == AWAY)
			find_again(&side.seq[i], cut);
}

/* ---- the ledger through a power cut ---------------------------------------------------------- */

static struct { /* as the disk had it last */
	uint8_t slot[256][512];
	unsigned n;
} ledger_was;

static int ledger_file(void)
{
	char path[128];

	snprintf(path, sizeof(path), "%s/nvme/kvtier-ledger", scene.dir);
	return open(path, O_RDWR | O_CLOEXEC);
}

static void ledger_remember(void)
{
	int fd = ledger_file();
	ssize_t n = fd < 0 ? 0 : pread(fd, ledger_was.slot, sizeof(ledger_was.slot), 0);

	ledger_was.n = n < 0 ? 0 : (unsigned)n / 512;
	close_fdp(&fd);
}

/* Each entry as it is, as it was, or never written; and another boot of the kernel. */
static void ledger_torn(void)
{
	const uint32_t head = UINT32_MAX;
	uint8_t slot[512], old[512];
	int fd = ledger_file();
	uint32_t crc;

	for (unsigned i = 0; fd >= 0 && pread(fd, slot, 512, i * 512) == 512; i++) {
		memset(old, 0, sizeof(old));
		if (i < ledger_was.n)
			memcpy(old, ledger_was.slot[i], 512);
		if (i && one_in(3))
			memcpy(slot, old, 512);
		if (!i) {
			memset(slot + 16, 'x', 36);
			crc = crc32c(crc32c(0, &head, sizeof(head)), slot + 4, 508);
			memcpy(slot, &crc, sizeof(crc));
		}
		must(pwrite(fd, slot, 512, i * 512) == 512, "ledger");
	}
	close_fdp(&fd);
}

/* ---- three ways to end ------------------------------------------------------------------------ */

/* The daemon is killed: what it asked of the kernel is done or not. */
static void killed(void)
{
	record("killed", 0, 0, 0, 0);
	scene.kills++;
	loss_look(side.core);
	disk_killed();
	core_off();
	all_lost();
	disk.dead = false;
	core_again(false);
	loss_check(side.core);
	loss_check_twice(side.core);
}

static void power_cut(void)
{
	record("power", 0, 0, 0, 0);
	scene.power_cuts++;
	disk_off();
	core_off();
	all_lost();
	disk_cut(store_file);
	store_empty();
	ledger_torn();
	core_again(true);
	ledger_remember();
}

static void on_drained(void *arg)
{
	scene.drained = true;
}

/* In an orderly way: leased sequences are saved first. */
static void restart(void)
{
	uint64_t end = world.now + UINT64_C(60000000000);

	record("restart", 0, 0, 0, 0);
	scene.restarts++;
	scene.drained = false;
	core_drain(side.core, on_drained, NULL);
	while (!scene.drained) {
		step();
		must(world.now < end, "a drain takes more than a minute");
	}
	core_off();
	all_lost();
	core_again(false);
}
