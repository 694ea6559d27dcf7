/* SPDX-License-Identifier: MIT */
#pragma once
/* A client whose rows a network ranks, that recalls and reads published pages, and an operator who looks and
 * steers. */
#include <jansson.h>
#include <poll.h>
#include "oom_life.h"

#include "daemon/admin.h"
#include "policy/weights.h"
#include "tests/unit/direct_reader.h"

#define L_DIM 16u
#define L_CAP 300u
#define L_ROWS 1024u
#define L_WINDOW 16u

static char weights_path[128], admin_path[128];
static size_t status_size; /* members of a whole status, counted before memory runs out */

/* ---- an operator ---------------------------------------------------------------------------- */

/* Without the buckets of histograms, of which there are as many as there is to count. */
static size_t members(const json_t *j)
{
	const char *key;
	size_t n = 0, i;
	json_t *v;

	json_object_foreach((json_t *)j, key, v) n += 1 + (strcmp(key, "bucket") ? members(v) : 0);
	json_array_foreach((json_t *)j, i, v) n += 1 + members(v);
	return n;
}

/* 0, or what it was refused with. Answers are whole. */
static int verb(const char *words)
{
	union {
		struct wire_admin m;
		uint8_t b[1024];
	} u;
	_Alignas(8) uint8_t reply[WIRE_MAX];
	const struct wire_admin_reply *a = (const void *)reply;
	int fds[WIRE_MAX_FDS], fd = sock_connect(admin_path), r = KVT_E_DAEMON;
	unsigned n_fds = 0;
	size_t n = strlen(words) + 1;
	char *at;

	if (fd < 0)
		return KVT_E_DAEMON;
	wire_init(&u.m.hdr, W_ADMIN, sizeof(u.m), 1);
	memcpy(u.b + sizeof(u.m), words, n);
	u.m.argc = 1;
	for (at = (char *)u.b + sizeof(u.m); *at; at++)
		if (*at == ' ') {
			*at = 0;
			u.m.argc++;
		}
	u.m.argv_bytes = (uint32_t)n;
	u.m.hdr.len = (uint32_t)(sizeof(u.m) + n);
	if (!sock_send(fd, &u.m, u.m.hdr.len, NULL, 0) &&
	    sock_wait(fd, POLLIN,
		      now_ns() + (oom.sticky && atomic_load(&oom.mode) != OOM_OFF ? 200000000u
										  : 10000000000u)) > 0 &&
	    sock_recv(fd, reply, sizeof(reply), fds, &n_fds) > 0)
		r = a->r.status;
	if (!clean(r))
		oom_fail("kvtierctl %s: %s: %s", words, kvtier_strerror(r), a->r.text);
	if (!r && a->json_bytes) {
		_cleanup_free_ char *text = calloc(1, a->json_bytes + 1);
		json_t *j = NULL;

		if (pread(fds[0], text, a->json_bytes, 0) == (ssize_t)a->json_bytes)
			j = json_loadb(text, a->json_bytes, 0, NULL);
		if (!j)
			oom_fail("kvtierctl %s: no JSON", words);
		if (j && !strcmp(words, "status")) {
			if (atomic_load(&oom.mode) == OOM_OFF && !status_size)
				status_size = members(j);
			else if (status_size && members(j) != status_size)
				oom_fail("status has %zu members, must have %zu", members(j), status_size);
		}
		json_decref(j);
	}
	while (n_fds)
		close(fds[--n_fds]);
	close(fd);
	return r;
}

static void operate(void)
{
	static const char *const words[] = {"status",        "ls",          "policy list", "verify start",
					    "verify status", "policy load", "reload",      "policy set kvp",
					    "freeze on",     "freeze off"};
	char load[160];

	for (size_t i = 0; i < ARRAY_SIZE(words); i++) {
		snprintf(load, sizeof(load), "policy load %s", weights_path);
		if (verb(strcmp(words[i], "policy load") ? words[i] : load) == KVT_E_DAEMON)
			break;
	}
}

static int hook_reload(void *arg, char *err, size_t errsize)
{
	return core_reload(host.core, &host.cfg, err, errsize);
}

static void hook_drain(void *arg)
{
}

static bool admin_listens;

static void listen_admin(struct core *c, void *arg)
{
	int fd;

	if (admin_listens)
		return;
	unlink(admin_path);
	fd = sock_listen(admin_path, 0600, 16);
	admin_listens = fd >= 0 && core_listen(c, fd, -1) == 0;
	if (fd >= 0 && !admin_listens)
		close(fd);
}

/* ---- a client --------------------------------------------------------------------------------- */

static int open_learned(struct runtime *rt)
{
	struct kvtier_layer_desc d[LAYERS];
	struct kvtier_open_opts o = {
		.size = sizeof(o), .socket = host.sock[0], .name = "learned", .timeout_ms = rt_timeout_ms};
	struct kvtier_model_desc md = {.size = sizeof(md),
				       .name = "learned",
				       .layers = d,
				       .n_layers = LAYERS,
				       .dtype = KVT_DTYPE_F32,
				       .head_dim = L_DIM,
				       .rope = KVT_ROPE_HALF,
				       .post_rope = 1,
				       .rope_theta = 10000,
				       .world = 1};
	int r;

	for (uint32_t i = 0; i < LAYERS; i++)
		d[i] = (struct kvtier_layer_desc){.kv_heads = 2, .k_bytes = L_DIM * 4, .v_bytes = L_DIM * 4};
	*rt = (struct runtime){.layers = LAYERS, .lanes = LAYERS * 2, .heads = 2};
	rt->k_bytes = rt->v_bytes = L_DIM * 4;
	r = kvtier_open(&o, &rt->c);
	return r < 0 ? r : kvtier_model_register(rt->c, &md, &rt->m);
}

/* As rt_prepare(), with a window of recall behind the score planes. */
static int prepare_seq(struct rt_seq *q, struct runtime *rt, uint32_t id, uint64_t *ret_window)
{
	uint64_t bytes, scores = 0;
	int r;

	*q = (struct rt_seq){.rt = rt, .id = id, .seed = id, .cap = L_CAP, .stage = L_CAP, .max_rows = L_ROWS};
	q->lay = calloc(LAYERS, sizeof(*q->lay));
	q->salts = calloc(L_ROWS, sizeof(*q->salts));
	r = kvtier_layout_plain(rt->m, L_CAP, L_CAP, 0, 0, q->lay, &bytes);
	if (r < 0)
		return r;
	bytes = ALIGN_UP(bytes, 64);
	for (uint32_t i = 0; i < LAYERS; i++) {
		q->lay[i].score_off = bytes + scores;
		q->lay[i].score_head_stride = L_ROWS * sizeof(float);
		scores += 2 * q->lay[i].score_head_stride;
	}
	*ret_window = bytes + scores;
	return kvtier_region_create(rt->c, *ret_window + 4 * L_WINDOW * L_DIM * 4, &q->r);
}

static int plan_by(struct rt_seq *q, const char *policy, uint32_t device)
{
	struct kvtier_budget b = {.size = sizeof(b), .manual = 1, .policy = policy, .device_rows = device};
	uint64_t id;
	int r;

	b.dram_rows = KVT_ROWS_ALL;
	r = kvtier_plan_request(q->s, &b, &id);
	if (!r)
		r = follow(q, id);
	if (!r && rt_wrong(q))
		oom_fail("%u rows are wrong after a plan by %s", rt_wrong(q), policy);
	return r;
}

static int recall(struct rt_seq *q, uint64_t window)
{
	struct kvtier_recall_opts o = {.size = sizeof(o),
				       .group = 1,
				       .dtype = KVT_DTYPE_F32,
				       .rows = 8,
				       .probe = 1000,
				       .window_rows = L_WINDOW,
				       .k_off = window,
				       .v_off = window + 2 * L_WINDOW * L_DIM * 4,
				       .k_head_stride = L_WINDOW * L_DIM * 4,
				       .v_head_stride = L_WINDOW * L_DIM * 4,
				       .k_row_stride = L_DIM * 4,
				       .v_row_stride = L_DIM * 4};
	struct kvtier_recalled a = {.size = sizeof(a)};
	uint32_t counts[2] = {0}, pos[2 * 8];
	float queries[2 * L_DIM];
	int r;

	for (uint32_t i = 0; i < 2 * L_DIM; i++)
		queries[i] = (float)(i % 7) - 3;
	a.counts = counts;
	a.positions = pos;
	r = kvtier_seq_recall(q->s, 0, queries, 1, &o, &a);
	for (uint32_t l = 0; r >= 0 && l < 2; l++)
		for (uint32_t i = 0; i < counts[l]; i++)
			for (uint32_t b = 0; b < L_DIM * 4; b++) {
				const uint8_t *k = (uint8_t *)kvtier_region_addr(q->r) + window +
						   (l * L_WINDOW + i) * L_DIM * 4;

				if (k[b] != rt_byte(q, l, pos[l * 8 + i], b, false)) {
					oom_fail("recalled row %u of lane %u is wrong", pos[l * 8 + i], l);
					return KVT_E_CORRUPT;
				}
			}
	return r;
}

static int live_learned(uint32_t id)
{
	struct life f;
	uint64_t window = 0;
	int r;

	memset(&f, 0, sizeof(f));
	rt_timeout_ms = oom.sticky && atomic_load(&oom.mode) != OOM_OFF ? 1000 : 10000;
	TRY(open_learned(&f.rt));
	TRY(prepare_seq(&f.q, &f.rt, id, &window));
	TRY(rt_seq_open(&f.q, KVT_EPHEMERAL, &keep_all));
	(void)harness_direct(&host, &f.q);
	TRY(rt_append(&f.q, 160));
	TRY(plan_by(&f.q, "kvp", 80));
	TRY(kvtier_seq_recall_prepare(f.q.s));
	TRY(rt_append(&f.q, 30));
	TRY(plan_by(&f.q, "keydiff", 60));
	TRY(recall(&f.q, window));
	TRY(kvtier_seq_recall_end(f.q.s));
	TRY(plan_by(&f.q, "kvp", 100));
	operate();
	TRY(plan_by(&f.q, "lagkv", 40));
out:
	if (f.q.s && r && rt_wrong(&f.q))
		oom_fail("%u rows are wrong after an error", rt_wrong(&f.q));
	end_life(&f);
	return r;
}

/* ---- the daemon around them -------------------------------------------------------------------- */

static void prepare_learned(void)
{
	struct weights_header w = {.name = "learned",
				   .layers = LAYERS,
				   .heads = 2,
				   .k_dim = L_DIM,
				   .v_dim = L_DIM,
				   .kind = WEIGHTS_KVP,
				   .keys = WEIGHTS_KEYS_UNROTATED,
				   .rope_type = WEIGHTS_ROPE_HALF,
				   .rope_theta = 10000,
				   .pos_kind = WEIGHTS_POS_LOG2,
				   .octave = 3,
				   .pos_rows = 5,
				   .pos_dim = 16,
				   .proj = 32,
				   .hidden = 64,
				   .rank = 2,
				   .dist_rows = 20};
	char err[200];
	uint8_t *image;

	prepare();
	strcpy(host.cfg.model_dir, host.dir);
	snprintf(weights_path, sizeof(weights_path), "%s/learned.kvp", host.dir);
	snprintf(admin_path, sizeof(admin_path), "%s/admin.sock", host.dir);
	host.cfg.tenant[0].direct = true;
	admin_listens = false;
	admin_set_config(&host.cfg);
	admin_set_hooks(hook_drain, hook_reload, NULL);
	if (weights_image_new(&image, &w, 0, err, sizeof(err)) < 0) {
		oom_fail("weights: %s", err);
		return;
	}
	weights_image_random(image, 3);
	weights_image_seal(image, ((struct weights_header *)image)->total_size);
	weights_image_write(image, weights_path);
	free(image);
}

static void under_learned(void)
{
	start();
	if (!up)
		return;
	harness_call(&host, listen_admin, NULL);
	(void)live_learned(9);
}

static void after_learned(void)
{
	int r;

	if (!up)
		start();
	if (up) {
		harness_call(&host, listen_admin, NULL);
		if (verb("freeze off"))
			oom_fail("cannot thaw");
		r = live_learned(1009);
		if (r < 0)
			oom_fail("the next client: %s: %s", kvtier_strerror(r), kvtier_last_error());
	}
	served();
}
