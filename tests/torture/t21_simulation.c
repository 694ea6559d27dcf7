/* SPDX-License-Identifier: MIT */
/*
 * torture 21: deterministic simulation of manager, mover, tiers and clients, by seed
 * pass: 10,000 seeds, no wrong byte, nothing unaccounted or left behind; same seed, same trace
 * quick: 250 seeds, and those that once found something
 * full: 10,000 seeds, and those that once found something
 * plants: ready-before-copied nack-ignored quota-leak reuse-before-ack
 *
 * The daemon's core runs as it is, with its index, manager, mover, restart and both tiers. Only what makes a
 * run differ from the next is replaced: time (sim_world.h), worker threads (workers_step()), and the engine
 * below the NVMe tier (sim_disk.h). Clients speak to it over sockets and shared memory (sim_client.h). A seed
 * chooses sizes, quotas and faults, and then what happens next, one small thing at a time: a turn of the loop,
 * a job, a disk request, a client's act, an operator's, a moment that passes, a power cut.
 *
 * Checked: every row that comes up and, now and then, all that are resident; plans against what the client has;
 * that nothing READY lacks its copies and published tables never change; the index against the client's view;
 * bytes charged against pages, and quotas, after every turn; that every plan asked for is answered; and at the
 * end that nothing is left: pages, bytes, handles, descriptors.
 *
 *   t21_simulation --seed N [-v]     one seed, with its record
 *   t21_simulation --seeds A B       seeds A to B - 1
 */
#include <dirent.h>
#include <openssl/sha.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <fcntl.h>
#include "shm/crc.h"
#include "tests/torture/sim_client.h"
#include "tests/torture/sim_disk.h"

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
};

struct scene {
	struct config cfg;
	struct core_seams seams;
	struct tier_ops nvme_ops;
	sd_event *ev;
	struct feed_reader feed;
	char dir[64];
	uint32_t steps, power_cuts, kills, restarts;
	bool cuts, kills_on, faults, flips, quiet; /* quiet: the end, nothing goes wrong any more */
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
	int r = core_new_with(&side.core, &scene.cfg, &scene.seams, scene.ev, err, sizeof(err));
	const void *mem;

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
	disk_killed();
	core_off();
	all_lost();
	disk.dead = false;
	core_again(false);
}

static void power_cut(void)
{
	record("power", 0, 0, 0, 0);
	scene.power_cuts++;
	disk_off();
	core_off();
	all_lost();
	disk_cut(store_file);
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

/* ---- what must hold ----------------------------------------------------------------------- */

static int by_address(const void *a, const void *b)
{
	const struct page *const *x = a, *const *y = b;

	return *x < *y ? -1 : *x > *y;
}

/* Charged bytes are those of the pages, when nothing is under way. */
static void check_bytes(const struct core *c)
{
	static const struct page *list[65536];
	uint64_t used[KVT_TIERS][2] = {{0}}, rows[KVT_TIERS] = {0};
	struct tier_stat st;
	size_t n = 0, out = 0;
	struct seq *s;

	if (c->pios || workers_busy(c->workers) || c->background_bytes)
		return;
	TAILQ_FOREACH(s, &c->lru, lru) {
		for (unsigned i = 0; i < ARRAY_SIZE(s->note); i++)
			if (s->note[i])
				list[n++] = s->note[i];
		for (uint32_t l = 0; l < s->ix.lanes; l++)
			for (uint32_t i = 0; i < s->ix.lane[l].n && n < ARRAY_SIZE(list); i++)
				list[n++] = s->ix.lane[l].v[i];
		for (int t = 0; t < KVT_TIERS; t++)
			rows[t] += s->tier_rows[t];
	}
	qsort(list, n, sizeof(*list), by_address);
	for (size_t i = 0; i < n; i++)
		if (!i || list[i] != list[i - 1])
			list[out++] = list[i];
	must(c->pages.count == out, "%llu pages, %zu are somebody's", (unsigned long long)c->pages.count, out);
	for (size_t i = 0; i < out; i++)
		for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
			if (page_in(list[i], t))
				used[t][list[i]->origin->charge] += page_room(list[i]->bytes);
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
		for (uint32_t i = 0; i < c->tenants; i++)
			must(used[t][i] == c->pages.used[t][i],
			     "tenant %u is charged %llu bytes in tier %d, its pages take %llu", i,
			     (unsigned long long)c->pages.used[t][i], t, (unsigned long long)used[t][i]);
		if (!c->pages.tier[t])
			continue;
		c->pages.tier[t]->ops->stat(c->pages.tier[t], &st);
		/* The disk's cleaner copies pages before it says so; small pages borrow larger places. */
		must(scene.over && !n ? !st.used || st.offline : st.used >= used[t][0] + used[t][1],
		     "tier %d says %llu bytes, pages take %llu", t, (unsigned long long)st.used,
		     (unsigned long long)(used[t][0] + used[t][1]));
	}
	for (int t = 0; t < KVT_TIERS; t++)
		must(rows[t] == c->stat.rows[t], "tier %d: %llu rows counted, sequences have %llu", t,
		     (unsigned long long)c->stat.rows[t], (unsigned long long)rows[t]);
}

/* The index says of the device rows what the client says. */
static void check_index(const struct mseq *s)
{
	const struct seq *d = handle_get(side.core->seqs, s->handle, NULL);

	if (s->life != LIVE || s->busy || !d || d->state != SEQ_LIVE || d->cut != ROWS_ALL ||
	    d->acked != s->acked)
		return;
	must(d->epoch == s->epoch && d->rows <= s->rows, "sequence %u: epoch %u rows %u, the client has %u, %u",
	     (unsigned)(s - side.seq), d->epoch, d->rows, s->epoch, s->rows);
	for (uint32_t l = 0; l < d->ix.lanes && d->ix.rows; l++) {
		const uint64_t *on = index_bits(&d->ix, KVT_TIER_DEVICE, l);
		uint32_t n = 0;

		for (uint32_t pos = 0; pos < d->ix.rows; pos++) {
			must(bits_test(on, pos) == bits_test(s->res[l], pos),
			     "sequence %u lane %u row %u: the index says it is %s the device",
			     (unsigned)(s - side.seq), l, pos, bits_test(on, pos) ? "on" : "not on");
			n += bits_test(on, pos);
		}
		must(n == d->ix.resident[l], "sequence %u lane %u: %u resident, counted %u",
		     (unsigned)(s - side.seq), l, n, d->ix.resident[l]);
	}
}

/* Faults that nobody made do not happen. */
static void check_misses(const struct core *c)
{
	if (!scene.flips)
		must(!c->stat.miss_corrupt, "%llu corrupt pages on media without faults",
		     (unsigned long long)c->stat.miss_corrupt);
	if (!scene.faults && !disk.stall)
		must(!c->stat.miss_io, "%llu pages lost on media without faults",
		     (unsigned long long)c->stat.miss_io);
	must(!c->stat.miss_client_mutated, "pages changed by clients that do not");
	must(!c->stat.hangups_protocol, "a client that keeps the rules was ended");
}

static void check_all(void)
{
	check_bytes(side.core);
	check_misses(side.core);
	for (unsigned i = 0; i < MAX_SEQS; i++) {
		check_index(&side.seq[i]);
		if (side.seq[i].life == LIVE && !side.seq[i].applied)
			check_rows(&side.seq[i], "resident");
	}
}

/* ---- clients' acts -------------------------------------------------------------------------- */

static struct mseq *any_live(void)
{
	struct mseq *s = &side.seq[below(MAX_SEQS)];

	return s->life == LIVE && !s->busy ? s : NULL;
}

/* What needs no call, while another one waits for its answer. */
static void meanwhile(void)
{
	struct mseq *s = one_in(4) ? any_live() : NULL;

	if (!s)
		return;
	if (one_in(2))
		seq_follow(s, false);
	else
		seq_append(s, between(1, 16));
}

static struct mclient *some_client(uint32_t tenant)
{
	unsigned first = below(MAX_CLIENTS);

	for (unsigned i = 0; i < MAX_CLIENTS; i++) {
		struct mclient *cl = &side.client[(first + i) % MAX_CLIENTS];

		if (cl->on && (tenant > 1 || cl->tenant == tenant))
			return cl;
	}
	return NULL;
}

static void new_key(struct mseq *s)
{
	/* Now and then that of one before: its pages may still be on the disk. */
	uint64_t key = side.next_key && one_in(5) ? 1 + below((uint32_t)side.next_key) : 0;

	for (unsigned i = 0; i < MAX_SEQS && key; i++)
		if (side.seq[i].life != GONE && !memcmp(side.seq[i].key, &key, sizeof(key)))
			key = 0;
	if (!key)
		key = ++side.next_key;
	memset(s->key, 0, sizeof(s->key));
	memcpy(s->key, &key, sizeof(key));
	/* What a power cut forgets may be that a sequence ended: then it is found again by who knows its
	 * secret. */
	key = one_in(2) && !scene.cuts ? key : 1000 + ++side.next_secret;
	memset(s->secret, 0, sizeof(s->secret));
	memcpy(s->secret, &key, sizeof(key));
}

static void act_open(struct mseq *s)
{
	struct mclient *cl = some_client(9);
	int st;

	if (!cl)
		return;
	memset(s, 0, sizeof(*s));
	s->leased = !one_in(3);
	s->max_rows = between(MAX_ROWS / 4, MAX_ROWS);
	s->cap = MIN(s->max_rows, between(24, 400));
	s->stage = one_in(6) ? 0 : between(1, 200);
	new_key(s);
	st = seq_open(s, cl, W_OP_OPEN, NULL, 0);
	must(!st || st == KVT_E_EXISTS || st == KVT_E_LIMIT || st == KVT_E_NOSPC || st == KVT_E_BUSY,
	     "open: %d", st);
}

static void act_resume(struct mseq *s)
{
	struct mclient *cl = some_client(one_in(20) ? 9 : s->tenant);
	struct mseq was = *s;
	int st;

	if (!cl)
		return;
	s->max_rows = MAX(s->rows, between(MAX_ROWS / 4, MAX_ROWS));
	s->cap = MIN(s->max_rows, between(24, 400));
	s->stage = one_in(6) ? 0 : between(1, 200);
	st = seq_open(s, cl, W_OP_RESUME, NULL, 0);
	if (!st)
		return;
	*s = was;
	s->cl = NULL;
	if (st == KVT_E_NOENT && cl->tenant == s->tenant) {
		must(s->dropped || world.now - s->left_ns > UINT64_C(50000000000),
		     "a lease ended early, or was lost");
		s->life = GONE;
	}
}

static void act_fork(struct mseq *s)
{
	struct mseq *child = &side.seq[below(MAX_SEQS)];
	int st;

	if (child->life != GONE || child->busy || s->eras + 2 >= MAX_ERAS)
		return;
	if (s->applied)
		seq_ack(s, s->applied, s->nacked[0]);
	memset(child, 0, sizeof(*child));
	child->leased = one_in(2);
	child->max_rows = s->max_rows;
	child->cap = MAX(s->cap, most_resident(s));
	child->stage = s->stage;
	new_key(child);
	st = seq_open(child, s->cl, W_OP_FORK, s, below(s->rows + 1));
	must(!st || st == KVT_E_EXISTS || st == KVT_E_LIMIT || st == KVT_E_NOSPC || st == KVT_E_BUSY ||
		     st == KVT_E_STALE,
	     "fork: %d", st);
	s->want = 0;
}

/* It is gone in the middle of whatever it did. */
static void act_die(struct mclient *cl)
{
	record("die", (uint64_t)(cl - side.client), 0, 0, 0);
	for (unsigned i = 0; i < MAX_SEQS; i++) {
		struct mseq *s = &side.seq[i];
		struct plan_view v;

		if (s->life != LIVE || s->cl != cl)
			continue;
		/* Rows were on the move: nothing above the first one that the plan changes is what it was. */
		if (!s->applied && one_in(3) && look(s, &v) && v.state == PLAN_READY)
			for (uint32_t l = 0; l < v.lanes; l++) {
				uint32_t pos = 0, slot = 0;

				if (one_in(2))
					continue;
				while (pos < v.watermark && bits_test(s->cur[l], pos) == stays(&v, s, l, pos))
					slot += bits_test(s->cur[l], pos++);
				if (pos < v.watermark)
					scribble(s, l, slot, s->cap + s->stage);
			}
		seq_lost(s, false);
	}
	client_off(cl);
}

static void client_act(void)
{
	struct mclient *cl = &side.client[below(MAX_CLIENTS)];
	struct mseq *s = &side.seq[below(MAX_SEQS)];
	uint32_t what = below(100);

	if (!cl->on) {
		client_on(cl, below(2));
		return;
	}
	if (what < 2) {
		act_die(cl);
		return;
	}
	if (what < 20)
		client_listen(cl);
	if (s->busy)
		return;
	if (s->life == GONE) {
		act_open(s);
	} else if (s->life == AWAY) {
		if (one_in(3))
			act_resume(s);
	} else if (what < 45) {
		seq_append(s, one_in(4) ? between(1, 160) : between(1, 24));
	} else if (what < 75) {
		seq_follow(s, false);
	} else if (what < 82) {
		seq_ask(s, false);
	} else if (what < 86) {
		seq_ask(s, true);
	} else if (what < 90 && s->eras + 1 < MAX_ERAS) {
		seq_cut(s, s->rows ? below(s->rows + 1) : 0);
	} else if (what < 93) {
		act_fork(s);
	} else if (what < 95) {
		seq_leave_by_call(s, one_in(2));
	} else {
		seq_info(s);
	}
}

/* ---- the operator's, the power's ------------------------------------------------------------- */

static void operator_act(void)
{
	struct core *c = side.core;
	struct mseq *s = any_live();
	struct config cfg = scene.cfg;
	char err[256];

	switch (below(9)) {
	case 0:
		core_freeze(c, !c->frozen);
		break;
	case 1:
		if (s)
			core_seq_demote(c, s->handle, below(s->cap), err, sizeof(err));
		break;
	case 2:
		if (s)
			core_seq_promote(c, s->handle, err, sizeof(err));
		break;
	case 3:
		if (s)
			core_seq_pin(c, s->handle, below(s->max_rows), between(1, 30), !one_in(3), err,
				     sizeof(err));
		break;
	case 4:
		if (s && one_in(4))
			s->dropped |= !core_seq_drop(c, s->handle, err, sizeof(err));
		break;
	case 5:
		if (s)
			core_seq_budget(c, s->handle,
					(uint32_t[]){below(s->cap), below(s->max_rows), below(s->max_rows)},
					err, sizeof(err));
		break;
	case 6:
		cfg.slack_rows = between(1, 100);
		cfg.protect_first = below(8);
		cfg.protect_last = below(40);
		if (!core_reload(c, &cfg, err, sizeof(err)))
			scene.cfg = cfg;
		break;
	case 7:
		core_verify_start(c, s && one_in(2) ? s->handle : 0, err, sizeof(err));
		break;
	default:
		core_policy_set(c, s ? s->handle : 0, one_in(2) ? "streaming" : "random", err, sizeof(err));
		break;
	}
}

/* Nobody does anything for a while: leases end, the cleaner works, maps are flushed. */
static void pause_for(uint64_t ns)
{
	uint64_t end = world.now + ns;

	record("pause", ns, 0, 0, 0);
	ledger_remember();
	while (world.now < end) {
		settle(UINT64_C(1000000000));
		world.now += 125000000;
	}
}

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
	_Atomic uint64_t rows, plans, cuts, kills, steps, events;
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
		       "rows wrong, %.0f lives/s\n",
		       (unsigned long long)n, (unsigned long long)sh->plans, (unsigned long long)sh->kills,
		       (unsigned long long)sh->cuts, (unsigned long long)sh->rows, (double)n / s);
	printf("# %llu events of %llu steps in %.1f s\n1..3\n", (unsigned long long)sh->events,
	       (unsigned long long)sh->steps, s);
	return !good;
}
