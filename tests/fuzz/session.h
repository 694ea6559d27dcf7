/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * One core for many inputs, in this process and on this thread, and clients of it that are made of nothing but
 * a socket, a region and what they write into shared memory. After each input everything of theirs must be
 * gone.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include "daemon/internal.h"
#include "ipc/codec.h"
#include "ipc/sock.h"
#include "policy/weights.h"
#include "shm/crc.h"
#include "tests/fuzz/workers.h"

#define PEERS 3u
#define SEQS 4u
#define TURNS 20000 /* more for one step, and the loop does not come to rest */
#define MODEL "fuzz"

struct peer {
	uint32_t id; /* of its struct client; 0: not connected */
	int fd;
	uint64_t model, region, seq[SEQS], scorer;
	char *mem;
	size_t bytes;
	struct window_place win;
};

static struct core *core;
static sd_event *loop;
static struct peer peers[PEERS];

static void must(int ok, const char *what)
{
	if (!ok) {
		fprintf(stderr, "must hold: %s\n", what);
		abort();
	}
}

/* ---- the core ------------------------------------------------------------------------ */

/* A network, so that models of bf16 rows have a policy with weights and clients a scorer to ask for. */
static void make_weights(const char *dir)
{
	const struct weights_header h = {.name = MODEL,
					 .layers = 1,
					 .heads = 2,
					 .k_dim = 16,
					 .v_dim = 16,
					 .kind = WEIGHTS_KVP,
					 .rope_type = WEIGHTS_ROPE_HALF,
					 .rope_theta = 10000,
					 .proj = 32,
					 .pos_kind = WEIGHTS_POS_LOG2,
					 .pos_rows = 3,
					 .pos_dim = 16,
					 .hidden = 32,
					 .rank = 2,
					 .dist_rows = 5,
					 .octave = 2};
	uint8_t *image;
	char path[400], err[256];

	must(!weights_image_new(&image, &h, 0, err, sizeof(err)), "weights");
	weights_image_random(image, 7);
	weights_image_seal(image, ((struct weights_header *)image)->total_size);
	snprintf(path, sizeof(path), "%s/" MODEL ".kvp", dir);
	must(!weights_image_write(image, path), "a place for weights");
	free(image);
}

static char models_dir[] = "/tmp/kvt-fuzz-XXXXXX";

static void remove_models(void)
{
	char path[400];

	snprintf(path, sizeof(path), "%s/" MODEL ".kvp", models_dir);
	unlink(path);
	rmdir(models_dir);
}

static void core_begin(void)
{
	static struct config cfg;
	char err[256] = "";

	must(mkdtemp(models_dir) != NULL, "a folder below /tmp");
	make_weights(models_dir);
	atexit(remove_models);
	config_defaults(&cfg);
	cfg.tenants = 2;
	cfg.tenant[1] = cfg.tenant[0];
	strcpy(cfg.tenant[1].name, "other");
	for (int t = 0; t < 2; t++) {
		cfg.tenant[t].region_bytes = UINT64_C(8) << 20;
		cfg.tenant[t].max_clients_per_uid = 8;
		cfg.tenant[t].max_seqs = 8;
		cfg.tenant[t].direct = true;
	}
	cfg.tenant[1].dram_bytes = 256 << 10; /* this one meets its quota */
	cfg.dram_size = 24 << 20;
	cfg.dram_segment = 4 << 20;
	cfg.dram_huge = false;
	cfg.nvme_enabled = false;
	strcpy(cfg.policy, "client");
	strcpy(cfg.fallback, "streaming");
	strcpy(cfg.model_dir, models_dir);
	cfg.budget_device = cfg.budget_dram = cfg.budget_nvme = 0;
	cfg.protect_first = 2;
	cfg.protect_last = 8;
	cfg.slack_rows = 16;
	log_set_level(getenv("V") ? 7 : 0);
	must(sd_event_new(&loop) >= 0, "a loop");
	must(!core_new(&core, &cfg, loop, err, sizeof(err)), err);
}

/* Until nothing is left to do. */
static void settle(void)
{
	for (int n = 0; sd_event_run(loop, 0) > 0; n++)
		must(n < TURNS, "the loop comes to rest");
}

static struct client *client_of(const struct peer *p)
{
	struct client *cl;

	LIST_FOREACH(cl, &core->clients, link)
		if (p->id && cl->id == p->id && !cl->dead)
			return cl;
	return NULL;
}

static struct seq *seq_of(const struct peer *p, unsigned i)
{
	struct client *cl = client_of(p);

	return cl && p->seq[i % SEQS] ? handle_get(core->seqs, p->seq[i % SEQS], cl) : NULL;
}

/* ---- a client ------------------------------------------------------------------------- */

static void peer_close(struct peer *p)
{
	if (!p->id)
		return;
	close(p->fd);
	if (p->mem)
		munmap(p->mem, p->bytes);
	memset(p, 0, sizeof(*p));
}

static void peer_connect(struct peer *p, struct tenant *t)
{
	struct sock_peer who = {.pid = getpid(), .uid = getuid(), .gid = getgid(), .pidfd = -1};
	int ends[2];

	must(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends), "a socket pair");
	must(!client_new(core, ends[0], t, &who), "a client");
	memset(p, 0, sizeof(*p));
	p->fd = ends[1];
	p->id = core->next_client;
}

static void remember(struct peer *p, const struct wire_reply *r, const int *fds, unsigned n_fds)
{
	const void *a = r;

	if (r->status)
		return;
	switch (r->hdr.type & ~W_REPLY) {
	case W_MODEL:
		p->model = ((const struct wire_model_reply *)a)->model;
		break;
	case W_REGION:
		if (p->mem)
			munmap(p->mem, p->bytes);
		p->region = ((const struct wire_region_reply *)a)->region;
		p->bytes = ((const struct wire_region_reply *)a)->bytes;
		must(n_fds == 1, "a region has its descriptor");
		p->mem = mmap(NULL, p->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
		must(p->mem != MAP_FAILED, "the region maps");
		break;
	case W_REGION_IMPORT:
		p->region = ((const struct wire_region_reply *)a)->region;
		break;
	case W_SEQ_OPEN:
		p->seq[r->hdr.cookie % SEQS] = ((const struct wire_seq_open_reply *)a)->seq;
		break;
	case W_SCORER:
		p->scorer = ((const struct wire_scorer_reply *)a)->id;
		break;
	}
}

/* A request without a known type or version is refused under those that it has. */
static bool well_formed(const void *buf, size_t len, char *err)
{
	const struct wire_reply *r = buf;

	return !wire_check(buf, len, true, err, WIRE_TEXT) ||
	       (len == sizeof(*r) && (r->status == KVT_E_PROTO || r->status == KVT_E_VERSION));
}

static void hear(struct peer *p)
{
	static _Alignas(8) uint8_t buf[WIRE_MAX];
	char err[WIRE_TEXT];
	int fds[WIRE_MAX_FDS];
	unsigned n;

	while (p->id) {
		ssize_t len = sock_recv(p->fd, buf, sizeof(buf), fds, &n);

		if (len <= 0)
			return;
		must(well_formed(buf, (size_t)len, err), err);
		remember(p, (const void *)buf, fds, n);
		for (unsigned i = 0; i < n; i++)
			close(fds[i]);
	}
}

static void step(void)
{
	settle();
	for (unsigned i = 0; i < PEERS; i++)
		hear(&peers[i]);
}

static void say(struct peer *p, const void *m, size_t len, const int *fds, unsigned n)
{
	if (p->id)
		(void)sock_send(p->fd, m, len, fds, n);
	step();
}

/* Write what the word says and tell the daemon, as a hint in the ring or only by waking it. */
static void push_entry(struct peer *p, const struct ring_entry *e)
{
	struct client *cl = client_of(p);
	uint64_t one = 1;
	_Atomic uint32_t *tail;

	if (!cl || !cl->hello)
		return;
	tail = (_Atomic uint32_t *)((char *)cl->ctl.addr + 128);
	memcpy((char *)cl->ctl.addr + 384 + (size_t)(*tail & (cl->entries - 1)) * sizeof(*e), e, sizeof(*e));
	(*tail)++;
	(void)!write(cl->wake_fd, &one, sizeof(one));
}

static void push_dirty(struct peer *p, unsigned i)
{
	push_entry(p, &(struct ring_entry){.type = Q_DIRTY, .handle = p->seq[i % SEQS]});
}

/* ---- the end of an input -------------------------------------------------------------- */

/* All leave; what they left behind is ended; nothing may be left. */
static void everything_gone(void)
{
	struct tier_stat st;
	struct seq *s, *next;

	workers_hold(false);
	for (unsigned i = 0; i < PEERS; i++)
		peer_close(&peers[i]);
	settle();
	for (s = TAILQ_FIRST(&core->lru); s; s = next) {
		next = TAILQ_NEXT(s, lru);
		seq_end(s);
	}
	sd_event_source_set_time_relative(core->tick, 0); /* lets go of what background moves held */
	settle();
	must(!core->n_clients && LIST_EMPTY(&core->ended), "no client is left");
	must(!core->n_seqs && !handle_count(core->seqs), "no sequence is left");
	must(LIST_EMPTY(&core->all_regions) && !handle_count(core->regions), "no region is left");
	must(!core->n_models && LIST_EMPTY(&core->uses), "no model is left");
	must(!core->pios && !workers_busy(core->workers), "nothing is on its way");
	must(!core->pages.count && !core->stat.plan_bytes && !core->seq_index_bytes, "no byte is charged");
	for (unsigned t = 0; t < core->tenants; t++)
		must(!core->tenant[t].seqs && !core->tenant[t].region_bytes &&
			     !core->pages.used[KVT_TIER_DRAM][t],
		     "no tenant is charged");
	core->pages.tier[KVT_TIER_DRAM]->ops->stat(core->pages.tier[KVT_TIER_DRAM], &st);
	must(!st.used, "dram is empty");
}
