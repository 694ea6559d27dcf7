/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A real core on its own thread with real sockets, for tests and benchmarks,
 * and a runtime's side whose rows carry a pattern that names sequence, lane,
 * position and epoch, so that a row in the wrong place cannot go unnoticed.
 */
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>
#include "daemon/core.h"
#include "ipc/kvtier.h"
#include "ipc/sock.h"
#include "shm/bits.h"
#include "shm/util.h"

struct harness {
	char dir[64], sock[2][108];
	struct config cfg;
	const struct tier_keep *keep; /* what its DRAM outlives it in; NULL: it does not */
	const struct nodes *nodes;    /* of a host that is made up; NULL: of this one */
	bool stepped;                 /* no worker threads: see stepped_fixture.h */
	struct core *core;
	pthread_t thread;
	int call_fd;
	_Atomic int ready;
	/* one call at a time runs on the loop */
	pthread_mutex_t lock;
	pthread_cond_t cond;
	void (*call)(struct core *c, void *arg);
	void *arg;
	bool called, stop, drained;
};

static inline int harness_on_call(sd_event_source *s, int fd, uint32_t revents, void *arg)
{
	struct harness *h = arg;
	uint64_t n;

	if (read(fd, &n, sizeof(n)) < 0)
		return 0;
	pthread_mutex_lock(&h->lock);
	if (h->call)
		h->call(h->core, h->arg);
	h->call = NULL;
	h->called = true;
	if (h->stop)
		sd_event_exit(sd_event_source_get_event(s), 0);
	pthread_cond_signal(&h->cond);
	pthread_mutex_unlock(&h->lock);
	return 0;
}

static inline void *harness_main(void *arg)
{
	struct harness *h = arg;
	const struct core_seams seams = {.keep = h->keep, .nodes = h->nodes, .stepped = h->stepped};
	sd_event *ev = NULL;
	char err[256] = "no event loop";
	int r = sd_event_new(&ev);

	if (r >= 0)
		r = core_new_with(&h->core, &h->cfg, &seams, ev, err, sizeof(err));
	for (uint32_t t = 0; t < h->cfg.tenants && r >= 0; t++) {
		int fd = sock_listen(h->sock[t], 0600, 16);

		snprintf(err, sizeof(err), "%s: cannot listen", h->sock[t]);
		r = fd < 0 ? fd : core_listen(h->core, fd, (int)t);
		if (r < 0 && fd >= 0)
			close(fd);
	}
	if (r >= 0)
		r = sd_event_add_io(ev, NULL, h->call_fd, EPOLLIN, harness_on_call, h);
	if (r < 0) {
		fprintf(stderr, "# core: %s\n", err);
		core_free(h->core);
		h->core = NULL;
		sd_event_unref(ev);
		atomic_store(&h->ready, -1);
		return NULL;
	}
	atomic_store(&h->ready, 1);
	while (r >= 0 && sd_event_get_state(ev) != SD_EVENT_FINISHED)
		r = core_turn(h->core);
	core_free(h->core);
	h->core = NULL;
	sd_event_unref(ev);
	return NULL;
}

/* Defaults for tests: small dram, nvme below the directory when asked for. */
static inline void harness_init(struct harness *h, bool nvme)
{
	char dir[] = "/tmp/kvt-core-XXXXXX";

	memset(h, 0, sizeof(*h));
	if (!mkdtemp(dir))
		abort();
	strcpy(h->dir, dir);
	config_defaults(&h->cfg);
	h->cfg.tenants = 2;
	h->cfg.tenant[1] = h->cfg.tenant[0];
	strcpy(h->cfg.tenant[1].name, "other");
	for (int t = 0; t < 2; t++) {
		snprintf(h->sock[t], sizeof(h->sock[t]), "%s/t%d.sock", dir, t);
		h->cfg.tenant[t].region_bytes = UINT64_C(64) << 30;
		h->cfg.tenant[t].max_clients_per_uid = 64;
		h->cfg.tenant[t].max_seqs = 20000;
	}
	h->cfg.dram_size = UINT64_C(256) << 20;
	h->cfg.dram_segment = UINT64_C(64) << 20;
	h->cfg.dram_huge = false;
	h->cfg.nvme_enabled = nvme;
	snprintf(h->cfg.nvme_path, sizeof(h->cfg.nvme_path), "%s/nvme", dir);
	if (nvme)
		mkdir(h->cfg.nvme_path, 0700);
	h->cfg.nvme_size = UINT64_C(256) << 20;
	h->cfg.nvme_segment = UINT64_C(16) << 20;
	h->cfg.nvme_staging = UINT64_C(8) << 20;
	h->cfg.nvme_prealloc = false;
	h->cfg.nvme_io_uring = !getenv("KVT_IO") || strcmp(getenv("KVT_IO"), "threads");
	strcpy(h->cfg.policy, "client");
	strcpy(h->cfg.fallback, "streaming");
	h->cfg.budget_device = h->cfg.budget_dram = h->cfg.budget_nvme = 0;
	h->cfg.protect_first = 4;
	h->cfg.protect_last = 16;
	h->cfg.hysteresis_permille = 0;
	log_set_level(getenv("V") ? 7 : getenv("L") ? 4 : 2);
}

static inline bool harness_start(struct harness *h)
{
	h->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	h->stop = false;
	atomic_store(&h->ready, 0);
	pthread_mutex_init(&h->lock, NULL);
	pthread_cond_init(&h->cond, NULL);
	if (pthread_create(&h->thread, NULL, harness_main, h))
		abort();
	while (!atomic_load(&h->ready))
		usleep(200);
	if (atomic_load(&h->ready) > 0)
		return true;
	pthread_join(h->thread, NULL);
	close(h->call_fd);
	return false;
}

/* Run fn on the loop's thread and wait for it. */
static inline void harness_call(struct harness *h, void (*fn)(struct core *, void *), void *arg)
{
	uint64_t one = 1;

	pthread_mutex_lock(&h->lock);
	h->call = fn;
	h->arg = arg;
	h->called = false;
	if (write(h->call_fd, &one, sizeof(one)) < 0)
		abort();
	while (!h->called)
		pthread_cond_wait(&h->cond, &h->lock);
	pthread_mutex_unlock(&h->lock);
}

/* Stop the core; what is on disk stays. */
static inline void harness_stop(struct harness *h)
{
	h->stop = true;
	harness_call(h, NULL, NULL);
	pthread_join(h->thread, NULL);
	close(h->call_fd);
	pthread_mutex_destroy(&h->lock);
	pthread_cond_destroy(&h->cond);
}

static inline void harness_rm(const char *path)
{
	DIR *d = opendir(path);
	struct dirent *e;
	char p[1024];

	while (d && (e = readdir(d))) {
		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
			continue;
		if ((size_t)snprintf(p, sizeof(p), "%s/%s", path, e->d_name) >= sizeof(p))
			continue;
		if (e->d_type == DT_DIR)
			harness_rm(p);
		else
			unlink(p);
	}
	if (d)
		closedir(d);
	rmdir(path);
}

static inline void harness_stat_call(struct core *c, void *arg)
{
	core_stat(c, arg);
}
static inline struct core_stat harness_stat(struct harness *h)
{
	struct core_stat st;

	harness_call(h, harness_stat_call, &st);
	return st;
}

/* ---- a runtime ------------------------------------------------------------------- */

#define RT_HEADS 3u
#define RT_K 48u
#define RT_V 32u

struct runtime {
	struct kvtier *c;
	struct kvtier_model *m;
	uint32_t layers, lanes, heads, k_bytes, v_bytes;
};
struct rt_seq {
	struct runtime *rt;
	struct kvtier_region *r;
	struct kvtier_seq *s;
	struct kvtier_layout *lay; /* [layers] */
	uint32_t id, rows, cap, stage, max_rows, salt;
	uint32_t *salts; /* [max_rows]: pattern generation of each position */
	uint32_t seed;
};

static uint32_t rt_timeout_ms = 10000; /* of connections opened from now on */

static inline int rt_open_dims(struct runtime *rt, const char *sock, uint32_t layers, uint32_t heads,
			       uint32_t k, uint32_t v, uint32_t max_seqs, uint64_t plan_bytes)
{
	struct kvtier_layer_desc d[256];
	struct kvtier_open_opts o = {.size = sizeof(o),
				     .socket = sock,
				     .name = "test",
				     .timeout_ms = rt_timeout_ms,
				     .max_seqs = max_seqs,
				     .plan_bytes = plan_bytes};
	struct kvtier_model_desc md = {
		.size = sizeof(md), .name = "pattern", .layers = d, .n_layers = layers, .world = 1};
	int r;

	memset(rt, 0, sizeof(*rt));
	rt->layers = layers;
	rt->heads = heads;
	rt->lanes = layers * heads;
	rt->k_bytes = k;
	rt->v_bytes = v;
	for (uint32_t i = 0; i < layers; i++)
		d[i] = (struct kvtier_layer_desc){.kv_heads = heads, .k_bytes = k, .v_bytes = v};
	r = kvtier_open(&o, &rt->c);
	return r < 0 ? r : kvtier_model_register(rt->c, &md, &rt->m);
}
static inline int rt_open(struct runtime *rt, const char *sock, uint32_t layers)
{
	return rt_open_dims(rt, sock, layers, RT_HEADS, RT_K, RT_V, 0, 0);
}
static inline void rt_close(struct runtime *rt)
{
	kvtier_model_release(rt->m);
	kvtier_close(rt->c);
}

static inline uint8_t rt_byte(const struct rt_seq *q, uint32_t lane, uint32_t pos, uint32_t i, bool v)
{
	uint64_t x = q->id * 0x9e3779b97f4a7c15u + lane * 0xbf58476d1ce4e5b9u + pos * 0x94d049bb133111ebu +
		     __atomic_load_n(&q->salts[pos], __ATOMIC_RELAXED) * 0xd6e8feb86659fd93u +
		     (i / 8 + (v ? 1000 : 0)) * 0xff51afd7ed558ccdu;

	x ^= x >> 29;
	x *= 0xbf58476d1ce4e5b9u;
	x ^= x >> 32;
	return (uint8_t)(x >> (i % 8 * 8));
}

static inline uint8_t *rt_row(struct rt_seq *q, uint32_t lane, uint32_t slot, bool v)
{
	struct kvtier_layout *l = &q->lay[lane / q->rt->heads];
	uint32_t h = lane % q->rt->heads;
	uint8_t *base = kvtier_region_addr(q->r);

	return v ? base + l->v_off + h * l->v_head_stride + (uint64_t)slot * l->v_row_stride
		 : base + l->k_off + h * l->k_head_stride + (uint64_t)slot * l->k_row_stride;
}

static inline void rt_write(struct rt_seq *q, uint32_t lane, uint32_t slot, uint32_t pos)
{
	for (uint32_t i = 0; i < q->rt->k_bytes; i++)
		rt_row(q, lane, slot, false)[i] = rt_byte(q, lane, pos, i, false);
	for (uint32_t i = 0; i < q->rt->v_bytes; i++)
		rt_row(q, lane, slot, true)[i] = rt_byte(q, lane, pos, i, true);
}

/* 0 when the slot holds that row, byte for byte. */
static inline int rt_check(struct rt_seq *q, uint32_t lane, uint32_t slot, uint32_t pos)
{
	for (uint32_t i = 0; i < q->rt->k_bytes; i++)
		if (rt_row(q, lane, slot, false)[i] != rt_byte(q, lane, pos, i, false))
			return -1;
	for (uint32_t i = 0; i < q->rt->v_bytes; i++)
		if (rt_row(q, lane, slot, true)[i] != rt_byte(q, lane, pos, i, true))
			return -1;
	return 0;
}

static inline float *rt_score(struct rt_seq *q, uint32_t lane, uint32_t pos)
{
	struct kvtier_layout *l = &q->lay[lane / q->rt->heads];

	return (float *)((uint8_t *)kvtier_region_addr(q->r) + l->score_off +
			 lane % q->rt->heads * l->score_head_stride) +
	       pos;
}

static inline uint32_t rt_random(struct rt_seq *q)
{
	q->seed = q->seed * 1664525u + 1013904223u;
	return q->seed >> 8;
}

/* Memory and layouts of a sequence that may reach max_rows with cap resident. Score planes are by position. */
static inline int rt_prepare(struct rt_seq *q, struct runtime *rt, uint32_t id, uint32_t cap, uint32_t stage,
			     uint32_t max_rows)
{
	uint64_t bytes, scores = 0;
	int r;

	memset(q, 0, sizeof(*q));
	q->rt = rt;
	q->id = id;
	q->seed = id * 77u + 1;
	q->cap = cap;
	q->stage = stage;
	q->max_rows = max_rows;
	q->lay = calloc(rt->layers, sizeof(*q->lay));
	q->salts = calloc(max_rows, sizeof(*q->salts));
	r = kvtier_layout_plain(rt->m, cap, stage, 0, 0, q->lay, &bytes);
	if (r < 0)
		return r;
	bytes = ALIGN_UP(bytes, 64);
	for (uint32_t i = 0; i < rt->layers; i++) {
		q->lay[i].score_off = bytes + scores;
		q->lay[i].score_head_stride = (uint64_t)max_rows * sizeof(float);
		scores += rt->heads * q->lay[i].score_head_stride;
	}
	return kvtier_region_create(rt->c, bytes + scores, &q->r);
}

static inline struct kvtier_seq_opts rt_opts(struct rt_seq *q, uint32_t lifetime, const struct kvtier_budget *b)
{
	struct kvtier_seq_opts o = {.size = sizeof(o),
				    .lifetime = lifetime,
				    .ttl_s = 60,
				    .max_rows = q->max_rows,
				    .region = q->r,
				    .layouts = q->lay,
				    .budget = b};

	memcpy(o.key, &q->id, sizeof(q->id));
	o.key[15] = 1;
	memset(o.secret, 0x5a, sizeof(o.secret));
	memcpy(o.secret, &q->id, sizeof(q->id));
	return o;
}

static inline int rt_seq_open(struct rt_seq *q, uint32_t lifetime, const struct kvtier_budget *b)
{
	struct kvtier_seq_opts o = rt_opts(q, lifetime, b);

	return kvtier_seq_open(q->rt->c, q->rt->m, &o, &q->s);
}

/* Resident rows of a lane, from the library. */
static inline int rt_resident(struct rt_seq *q, uint32_t lane, uint32_t *pos)
{
	return kvtier_seq_resident(q->s, lane, pos, q->max_rows);
}

static inline int rt_append(struct rt_seq *q, uint32_t n)
{
	for (uint32_t l = 0; l < q->rt->lanes; l++) {
		int have = kvtier_seq_resident(q->s, l, NULL, 0);

		if (have < 0 || have + n > q->cap)
			return have < 0 ? have : KVT_E_NOSPC;
		for (uint32_t i = 0; i < n; i++) {
			uint32_t pos = q->rows + i;

			if (!l)
				__atomic_store_n(&q->salts[pos], q->salt, __ATOMIC_RELAXED);
			rt_write(q, l, (uint32_t)have + i, pos);
			*rt_score(q, l, pos) = (float)(rt_random(q) % 10000) / 100.0f;
		}
	}
	q->rows += n;
	return kvtier_seq_append(q->s, KVT_ALL_LAYERS, q->rows - n, n);
}

/* Every resident row, byte for byte: rows that are wrong. */
static inline uint32_t rt_wrong(struct rt_seq *q)
{
	uint32_t *pos = calloc(q->max_rows, sizeof(*pos)), bad = 0;

	for (uint32_t l = 0; l < q->rt->lanes; l++) {
		int n = rt_resident(q, l, pos);

		for (int i = 0; i < n; i++)
			if (rt_check(q, l, (uint32_t)i, pos[i])) {
				uint32_t real = q->salts[pos[i]], k;

				for (k = 0; k < 10; k++) {
					q->salts[pos[i]] = k;
					if (!rt_check(q, l, (uint32_t)i, pos[i]))
						break;
				}
				q->salts[pos[i]] = real;
				if (getenv("V") && bad < 40)
					fprintf(stderr, "is salt %u: ", k),
						fprintf(stderr, "# lane %u slot %d pos %u salt %u\n", l, i,
							pos[i], q->salts[pos[i]]);
				bad++;
			}
	}
	free(pos);
	return bad;
}

/* Wait for a READY plan with id >= min, apply, ack. 0 or the error. */
static inline int rt_follow(struct rt_seq *q, uint64_t min, struct kvtier_plan *ret)
{
	struct kvtier_plan p = {.size = sizeof(p)};
	int r = kvtier_plan_wait(q->s, min, KVT_PLAN_READY, 10000, &p);

	if (!r)
		r = kvtier_plan_apply(q->s, &p);
	if (!r)
		r = kvtier_plan_ack(q->s, p.id, NULL);
	if (ret)
		*ret = p;
	return r;
}

static inline int rt_plan(struct rt_seq *q, uint32_t dev, uint32_t dram, uint32_t nvme, struct kvtier_plan *ret)
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .device_rows = dev,
				  .dram_rows = dram,
				  .nvme_rows = nvme,
				  .manual = 1,
				  .policy = "client"};
	uint64_t id;
	int r = kvtier_plan_request(q->s, &b, &id);

	if (ret)
		memset(ret, 0, sizeof(*ret));
	return r < 0 ? r : rt_follow(q, id, ret);
}

static inline struct kvtier_seq_info rt_info(struct rt_seq *q)
{
	struct kvtier_seq_info i = {.size = sizeof(i)};

	if (kvtier_seq_info(q->s, &i) < 0)
		fprintf(stderr, "# info: %s\n", kvtier_last_error());
	return i;
}

static inline void rt_seq_free(struct rt_seq *q, bool drop)
{
	if (q->s && drop)
		kvtier_seq_drop(q->s);
	else if (q->s)
		kvtier_seq_close(q->s);
	kvtier_region_close(q->r);
	free(q->lay);
	free(q->salts);
	memset(q, 0, sizeof(*q));
}
