/* SPDX-License-Identifier: MIT */
/*
 * Admin verbs over a core made of paper: what reaches the core, what each peer
 * may see and do, what is refused in which words, and the audit line.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <fcntl.h>
#include <jansson.h>
#include <cmocka.h>
#include "daemon/admin.h"
#include "daemon/json_text.h"
#include "daemon/verbs.h"
#include "shm/util.h"

/* ---- the paper core ---------------------------------------------------------------- */

#define N_SEQS 300

static struct core_seq_stat seqs[N_SEQS];
static unsigned n_seqs;
static char call[256]; /* the last steering call */
static int core_answer;
static const char *const tenant_names[] = {"alice", "bob"};

static int note(char *err, size_t errsize, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(call, sizeof(call), fmt, ap);
	va_end(ap);
	if (core_answer)
		snprintf(err, errsize, "core says no");
	return core_answer;
}

static struct log_bucket audited[2];

bool core_may_audit(struct core *c, int tenant)
{
	return log_may(&audited[tenant]);
}

void core_stat(struct core *c, struct core_stat *ret)
{
	memset(ret, 0, sizeof(*ret));
	ret->clients = 77;
	ret->seqs = n_seqs;
	ret->tier[1].capacity = UINT64_MAX;
	strcpy(ret->policy, "kvp");
}

void probes_stat(struct core *c, struct probes_stat *ret)
{
	memset(ret, 0, sizeof(*ret));
	ret->on = true;
	ret->programs = 2;
	strcpy(ret->program[0].name, "disk");
	ret->program[0].on = true;
	strcpy(ret->program[1].name, "sched");
	strcpy(ret->program[1].why_off, "not here");
	histogram_add(&ret->disk_read, 1500);
	ret->disk_inflight = 3;
}

bool core_seq_next(struct core *c, uint32_t *cursor, struct core_seq_stat *ret)
{
	if (*cursor >= n_seqs)
		return false;
	*ret = seqs[(*cursor)++];
	return true;
}

int core_seq_find(struct core *c, int tenant, uint64_t owner, const char *name, uint64_t *ret, char *err,
		  size_t errsize)
{
	unsigned found = 0;

	for (unsigned i = 0; i < n_seqs; i++) {
		char hex[33];

		for (int b = 0; b < 16; b++)
			snprintf(hex + 2 * b, 3, "%02x", seqs[i].key[b]);
		if (tenant >= 0 && (strcmp(seqs[i].tenant, tenant_names[tenant]) || seqs[i].owner != owner))
			continue;
		if (strncmp(name, "0x", 2) ? strncasecmp(hex, name, strlen(name)) != 0
					   : seqs[i].handle != strtoull(name, NULL, 16))
			continue;
		*ret = seqs[i].handle;
		found++;
	}
	snprintf(err, errsize, "no such sequence");
	return found == 1 ? 0 : found ? KVT_E_INVAL : KVT_E_NOENT;
}

int core_seq_stat(struct core *c, uint64_t handle, struct core_seq_stat *ret)
{
	for (unsigned i = 0; i < n_seqs; i++)
		if (seqs[i].handle == handle) {
			*ret = seqs[i];
			return 0;
		}
	return KVT_E_NOENT;
}

int core_seq_lanes(struct core *c, uint64_t handle, struct core_lane_stat *ret, uint32_t cap)
{
	for (uint32_t i = 0; i < cap; i++)
		ret[i] = (struct core_lane_stat){10 + i, 20, 30, 40};
	return (int)cap;
}

bool core_tenant_next(struct core *c, uint32_t *cursor, struct core_tenant_stat *ret)
{
	if (*cursor)
		return false;
	*ret = (struct core_tenant_stat){.name = "default", .seqs = n_seqs, .bytes = {0, 12345}};
	(*cursor)++;
	return true;
}

void core_owner_stat(struct core *c, uint64_t owner, struct core_owner_stat *ret)
{
	*ret = (struct core_owner_stat){.published = owner == 7 ? 4 << 20 : 0,
					.published_held = owner == 7 ? 1 << 20 : 0};
	for (unsigned i = 0; i < n_seqs; i++) {
		if (seqs[i].owner != owner)
			continue;
		ret->seqs++;
		ret->orphans += !strcmp(seqs[i].client, "-");
		ret->plans += seqs[i].plans;
		ret->misses += seqs[i].misses;
		ret->dropped_rows += seqs[i].dropped_rows;
		for (unsigned t = 0; t < KVT_TIERS; t++) {
			ret->rows[t] += seqs[i].tier_rows[t];
			ret->bytes[t] += seqs[i].tier_bytes[t];
		}
	}
}

int core_seq_trace(struct core *c, uint64_t handle, bool host, struct json_text *out)
{
	json_text_open(out, NULL, '{');
	json_text_num(out, "traced", handle);
	json_text_close(out, '}');
	return 0;
}

int core_row_trace(struct core *c, uint64_t handle, uint32_t pos, uint32_t lane, uint32_t lanes,
		   struct json_text *out, char *err, size_t errsize)
{
	snprintf(call, sizeof(call), "row %u of lanes %u + %u", pos, lane, lanes);
	return core_seq_trace(c, handle, true, out);
}

int core_seq_map(struct core *c, uint64_t handle, const struct core_map_ask *ask, struct json_text *out,
		 char *err, size_t errsize)
{
	snprintf(call, sizeof(call), "map of lanes %u + %u, %u columns, at %u of %u in %u", ask->lane,
		 ask->lanes, ask->columns, ask->pos, ask->rows, ask->epoch);
	return core_seq_trace(c, handle, true, out);
}

int core_feed_fd(struct core *c, size_t *ret_bytes)
{
	*ret_bytes = 4096;
	return 9;
}

int core_seq_budget(struct core *c, uint64_t h, const uint32_t r[KVT_TIERS], char *err, size_t n)
{
	return note(err, n, "budget %llx %u %u %u", (unsigned long long)h, r[0], r[1], r[2]);
}

int core_seq_pin(struct core *c, uint64_t h, uint32_t pos, uint32_t rows, bool on, char *err, size_t n)
{
	return note(err, n, "pin %llx %u %u %d", (unsigned long long)h, pos, rows, on);
}

int core_seq_demote(struct core *c, uint64_t h, uint32_t keep, char *err, size_t n)
{
	return note(err, n, "demote %llx %u", (unsigned long long)h, keep);
}

int core_seq_promote(struct core *c, uint64_t h, char *err, size_t n)
{
	return note(err, n, "promote %llx", (unsigned long long)h);
}

int core_seq_drop(struct core *c, uint64_t h, char *err, size_t n)
{
	return note(err, n, "drop %llx", (unsigned long long)h);
}

int core_policy_set(struct core *c, uint64_t h, const char *name, char *err, size_t n)
{
	return note(err, n, "policy %llx %s", (unsigned long long)h, name);
}

int core_policy_load(struct core *c, const char *path, char *err, size_t n)
{
	return note(err, n, "load %s", path);
}

bool core_policy_next(struct core *c, uint32_t *cursor, struct core_policy_info *ret)
{
	if (*cursor)
		return false;
	++*cursor;
	*ret = (struct core_policy_info){.name = "kvp", .doc = "learned", .seqs = 5, .is_default = true};
	return true;
}

int core_freeze(struct core *c, bool on)
{
	char err[8];

	return note(err, sizeof(err), "freeze %d", on);
}

int core_verify_start(struct core *c, uint64_t h, char *err, size_t n)
{
	return note(err, n, "verify %llx", (unsigned long long)h);
}

void core_verify_stat(struct core *c, struct core_verify *ret)
{
	*ret = (struct core_verify){.running = true, .pages = 3, .total = 9};
}

static void hook_drain(void *arg)
{
	snprintf(call, sizeof(call), "drain %s", (char *)arg);
}

static int hook_reload(void *arg, char *err, size_t n)
{
	return note(err, n, "reload %s", (char *)arg);
}

/* ---- helpers ------------------------------------------------------------------------- */

static struct config cfg;
static char err[256], audit[2048];
static struct admin_result res;
static const struct admin_peer root = {.uid = 0, .pid = 11, .tenant = -1};
static const struct admin_peer alice = {.uid = 1000, .pid = 22, .owner = 1000, .tenant = 0};
static const struct admin_peer bob = {.uid = 1001, .pid = 33, .owner = 1001, .tenant = 1};

static void add_seq(uint64_t handle, const char *key, const char *tenant)
{
	struct core_seq_stat *s = &seqs[n_seqs++];

	*s = (struct core_seq_stat){.handle = handle,
				    .owner = strcmp(tenant, "bob") ? 1000 : 1001,
				    .tenant = tenant,
				    .client = "c",
				    .model = "m",
				    .policy = "kvp",
				    .plan_state = "none",
				    .rows = 100,
				    .lanes = 4,
				    .budget = {512, 1024, KVT_ROWS_ALL},
				    .tier_rows = {1, 2, 3}};
	for (int i = 0; i < 16; i++) {
		unsigned v;

		sscanf(key + 2 * i, "%2x", &v);
		s->key[i] = (uint8_t)v;
	}
}

static int setup(void **state)
{
	config_defaults(&cfg);
	strcpy(cfg.tenant[0].name, "alice");
	cfg.tenant[1] = cfg.tenant[0];
	strcpy(cfg.tenant[1].name, "bob");
	cfg.tenants = 2;
	admin_set_config(&cfg);
	admin_set_hooks(hook_drain, hook_reload, (void *)"arg");
	n_seqs = 0;
	memset(audited, 0, sizeof(audited));
	add_seq(0x100000001, "aaaa0000000000000000000000000001", "alice");
	add_seq(0x100000002, "aaaa0000000000000000000000000002", "bob");
	add_seq(0x100000003, "bbbb0000000000000000000000000003", "bob");
	core_answer = 0;
	return 0;
}

/* Calls the verb, with stderr caught in audit. */
static int ask(const struct admin_peer *peer, const char *line)
{
	char buf[256], *argv[16], *save = NULL;
	int argc = 0, r, p[2], saved = dup(2);
	ssize_t n;

	snprintf(buf, sizeof(buf), "%s", line);
	for (char *s = strtok_r(buf, " ", &save); s; s = strtok_r(NULL, " ", &save))
		argv[argc++] = s;
	call[0] = 0;
	free(res.json);
	memset(&res, 0, sizeof(res));
	assert_int_equal(pipe2(p, O_CLOEXEC | O_NONBLOCK), 0);
	dup2(p[1], 2);
	r = admin_dispatch(NULL, peer, argc, argv, &res, err, sizeof(err));
	dup2(saved, 2);
	n = read(p[0], audit, sizeof(audit) - 1);
	audit[n > 0 ? n : 0] = 0;
	close(saved);
	close(p[0]);
	close(p[1]);
	return r;
}

/* Succeeds, reaches the core as `want`, and leaves one audit line. */
static void steers(const struct admin_peer *peer, const char *line, const char *want)
{
	if (ask(peer, line))
		fail_msg("%s: %s", line, err);
	assert_string_equal(call, want);
	assert_ptr_equal(strchr(audit, '\n'), audit + strlen(audit) - 1);
	assert_non_null(strstr(audit, line));
	assert_non_null(strstr(audit, ": ok\n"));
}

static void refuses(const struct admin_peer *peer, const char *line, int code, const char *text)
{
	assert_int_equal(ask(peer, line), code);
	assert_string_equal(err, text);
	assert_string_equal(call, "");
	assert_null(res.json);
}

static json_t *json(void)
{
	json_t *j;

	assert_non_null(res.json);
	assert_int_equal(strlen(res.json), res.json_bytes);
	j = json_loads(res.json, 0, NULL);
	assert_non_null(j);
	return j;
}

static long long num(json_t *j, const char *key)
{
	assert_true(json_is_integer(json_object_get(j, key)));
	return json_integer_value(json_object_get(j, key));
}

/* ---- tests ---------------------------------------------------------------------------- */

static void mutations_reach_the_core(void **state)
{
	steers(&root, "budget 0x100000001 device=7", "budget 100000001 7 1024 4294967295");
	steers(&root, "budget 0x100000001 nvme=0 device=all dram=1", "budget 100000001 4294967295 1 0");
	steers(&root, "pin 0x100000001 5 10", "pin 100000001 5 10 1");
	steers(&root, "unpin 0x100000001 0 1048576", "pin 100000001 0 1048576 0");
	steers(&root, "demote 0x100000002", "demote 100000002 0");
	steers(&root, "demote 0x100000002 12", "demote 100000002 12");
	steers(&root, "promote 0x100000002", "promote 100000002");
	steers(&root, "drop 0x100000003", "drop 100000003");
	steers(&root, "policy set streaming", "policy 0 streaming");
	steers(&root, "policy set knorm 0x100000003", "policy 100000003 knorm");
	steers(&root, "policy load /x/y.kvp", "load /x/y.kvp");
	steers(&root, "freeze on", "freeze 1");
	steers(&root, "freeze off", "freeze 0");
	steers(&root, "drain", "drain arg");
	assert_true(res.drain);
	steers(&root, "reload", "reload arg");
	assert_true(res.reload);
}

static void audit_says_who_what_and_result(void **state)
{
	steers(&alice, "demote 0x100000001", "demote 100000001 0");
	assert_string_equal(audit, "<5>audit: uid 1000 pid 22 tenant alice: demote 0x100000001: ok\n");
	assert_int_equal(ask(&root, "drop 0xdead"), KVT_E_NOENT);
	assert_string_equal(audit, "<4>audit: uid 0 pid 11 admin: drop 0xdead: refused: no such sequence\n");
	core_answer = KVT_E_BUSY;
	assert_int_equal(ask(&root, "promote 0x100000001"), KVT_E_BUSY);
	assert_string_equal(err, "core says no");
	assert_non_null(strstr(audit, "refused: core says no\n"));
	assert_int_equal(ask(&root, "reload"), KVT_E_BUSY);
	assert_false(res.reload);
	assert_int_equal(ask(&alice, "drain"), KVT_E_PERM);
	assert_non_null(strstr(audit, "refused: drain: only on the admin socket\n"));
	assert_int_equal(ask(&root, "status"), 0);
	assert_string_equal(audit, "");
	assert_int_equal(ask(&root, "policy list"), 0);
	assert_string_equal(audit, "");
}

/* A tenant that steers faster than lines may be written is told to wait: what happened has its line, always. */
static void changes_are_no_faster_than_their_lines(void **state)
{
	unsigned done = 0, busy = 0;

	for (int i = 0; i < 200; i++)
		if (ask(&alice, "demote 0x100000001") == 0) {
			done++;
			assert_non_null(strstr(audit, ": ok\n"));
		} else {
			busy++;
			assert_string_equal(err, "demote: too many at once, limit two a second");
			assert_string_equal(call, "");
			assert_string_equal(audit, "");
		}
	assert_in_range(done, 100, 110);
	assert_int_equal(audited[0].left_out, busy);
	assert_int_equal(ask(&alice, "status"), 0);
	steers(&bob, "demote 0x100000002", "demote 100000002 0");
	for (int i = 0; i < 200; i++)
		steers(&root, "demote 0x100000001", "demote 100000001 0");
}

static void audit_cannot_be_forged_or_flooded(void **state)
{
	char *argv[40], big[200];

	memset(big, 'x', sizeof(big));
	big[sizeof(big) - 1] = 0;
	for (int i = 0; i < 40; i++)
		argv[i] = big;
	argv[0] = (char *)"drop";
	assert_int_equal(admin_dispatch(NULL, &root, 40, argv, &res, err, sizeof(err)), KVT_E_INVAL);
	assert_int_equal(ask(&root, "policy load a\nb"), 0);
	assert_non_null(strstr(audit, "load a\\x0ab: ok\n"));
}

static void tenants_steer_only_their_own(void **state)
{
	steers(&alice, "budget aaaa device=9",
	       "budget 100000001 9 1024 4294967295"); /* bob's aaaa... is invisible */
	steers(&bob, "drop BBBB", "drop 100000003");
	steers(&bob, "drop aaaa0000000000000000000000000002", "drop 100000002");
	steers(&alice, "policy set knorm 0x100000001", "policy 100000001 knorm");
	refuses(&alice, "drop 0x100000002", KVT_E_NOENT, "SEQ: \"0x100000002\", no such sequence");
	refuses(&alice, "drop bbbb", KVT_E_NOENT, "SEQ: \"bbbb\", no such sequence");
	refuses(&alice, "show bbbb", KVT_E_NOENT, "SEQ: \"bbbb\", no such sequence");
	refuses(&alice, "show 0x1", KVT_E_NOENT, "SEQ: \"0x1\", no such sequence");
	add_seq(0x100000004, "bbbb0000000000000000000000000004", "bob");
	refuses(&bob, "drop bbbb", KVT_E_INVAL, "SEQ: \"bbbb\", several keys begin so");
	refuses(&alice, "drop bbbb", KVT_E_NOENT, "SEQ: \"bbbb\", no such sequence");
}

/* One socket, two users: each is alone. */
static void users_of_a_tenant_are_apart(void **state)
{
	const struct admin_peer carol = {.uid = 1002, .pid = 44, .owner = 1002, .tenant = 1};
	json_t *j;

	refuses(&carol, "drop bbbb", KVT_E_NOENT, "SEQ: \"bbbb\", no such sequence");
	refuses(&carol, "show 0x100000002", KVT_E_NOENT, "SEQ: \"0x100000002\", no such sequence");
	assert_int_equal(ask(&carol, "status"), 0);
	j = json();
	assert_int_equal(num(j, "sequences"), 0);
	json_decref(j);
	assert_int_equal(ask(&bob, "verify start 0x100000002"), 0);
	assert_int_equal(ask(&carol, "verify status"), KVT_E_PERM);
}

static void tenants_may_not_touch_the_daemon(void **state)
{
	refuses(&alice, "drain", KVT_E_PERM, "drain: only on the admin socket");
	refuses(&alice, "reload", KVT_E_PERM, "reload: only on the admin socket");
	refuses(&alice, "freeze on", KVT_E_PERM, "freeze: only on the admin socket");
	refuses(&alice, "watch", KVT_E_PERM, "watch: only on the admin socket");
	refuses(&alice, "policy load /x", KVT_E_PERM, "policy load: only on the admin socket");
	refuses(&alice, "policy set kvp", KVT_E_PERM, "policy set: the default, only on the admin socket");
	refuses(&alice, "verify", KVT_E_PERM, "verify start: all sequences, only on the admin socket");
	refuses(&alice, "verify start", KVT_E_PERM, "verify start: all sequences, only on the admin socket");
}

static void tenants_see_only_their_own(void **state)
{
	json_t *j;

	assert_int_equal(ask(&alice, "ls"), 0);
	assert_null(strstr(res.json, "bob"));
	j = json();
	assert_int_equal(json_array_size(json_object_get(j, "seqs")), 1);
	json_decref(j);
	assert_int_equal(ask(&bob, "status"), 0);
	j = json();
	assert_int_equal(num(j, "sequences"), 2);
	assert_int_equal(num(json_array_get(json_object_get(j, "tiers"), 2), "rows"), 6);
	assert_null(json_object_get(j, "clients"));
	json_decref(j);
	assert_int_equal(ask(&bob, "policy list"), 0);
	assert_null(strstr(res.json, "weights"));
	assert_int_equal(ask(&bob, "version"), 0);
	assert_int_equal(ask(&(struct admin_peer){.tenant = 2}, "status"), KVT_E_INTERNAL);
}

static void scrub_results_belong_to_who_asked(void **state)
{
	assert_int_equal(ask(&bob, "verify start 0x100000002"), 0);
	assert_string_equal(call, "verify 100000002");
	assert_int_equal(ask(&bob, "verify status"), 0);
	assert_int_equal(ask(&alice, "verify status"), KVT_E_PERM);
	assert_int_equal(ask(&root, "verify"), 0);
	assert_string_equal(call, "verify 0");
	assert_int_equal(ask(&bob, "verify status"), KVT_E_PERM);
	assert_int_equal(ask(&root, "verify status"), 0);
	assert_non_null(strstr(res.json, "\"total\":9"));
	core_answer = KVT_E_BUSY;
	assert_int_equal(ask(&bob, "verify start 0x100000002"), KVT_E_BUSY);
	assert_int_equal(ask(&bob, "verify status"), KVT_E_PERM);
}

static void listing_is_paged_and_complete(void **state)
{
	uint64_t seen = 0, next = 0;
	char key[33], line[64];
	unsigned pages = 0;
	bool more = true;

	for (unsigned i = n_seqs; i < N_SEQS; i++) {
		snprintf(key, sizeof(key), "%032x", i);
		add_seq(i, key, i % 2 ? "alice" : "bob");
	}
	while (more) {
		json_t *j;

		snprintf(line, sizeof(line), "ls %llu", (unsigned long long)next);
		assert_int_equal(ask(&root, line), 0);
		j = json();
		seen += json_array_size(json_object_get(j, "seqs"));
		more = json_is_integer(json_object_get(j, "next"));
		next = (uint64_t)json_integer_value(json_object_get(j, "next"));
		json_decref(j);
		pages++;
	}
	assert_int_equal(seen, N_SEQS);
	assert_in_range(pages, 3, N_SEQS); /* a slice of the loop at a time */
}

static void probes_say(json_t *probes)
{
	json_t *list = json_object_get(probes, "programs"), *p = json_array_get(list, 1);

	assert_true(json_is_true(json_object_get(probes, "on")));
	assert_int_equal(json_array_size(list), 2);
	assert_null(json_object_get(json_array_get(list, 0), "why_off"));
	assert_false(json_is_true(json_object_get(p, "on")));
	assert_string_equal(json_string_value(json_object_get(p, "why_off")), "not here");
	assert_int_equal(num(json_object_get(probes, "disk_read"), "count"), 1);
	assert_int_equal(num(json_object_get(probes, "disk_read"), "ns_total"), 1500);
	assert_int_equal(num(probes, "disk_inflight"), 3);
}

static void json_has_the_numbers(void **state)
{
	json_t *j, *o;

	seqs[0].client = "\xff\xfe evil \"\n";
	assert_int_equal(ask(&root, "show 0x100000001 lanes"), 0);
	j = json();
	assert_string_equal(json_string_value(json_object_get(j, "key")), "aaaa0000000000000000000000000001");
	assert_string_equal(json_string_value(json_object_get(j, "client")), "?? evil \"\n");
	assert_int_equal(num(json_object_get(j, "budget"), "dram"), 1024);
	assert_true(json_is_null(json_object_get(json_object_get(j, "budget"), "nvme")));
	o = json_object_get(j, "lane");
	assert_int_equal(json_array_size(o), 4);
	assert_int_equal(num(json_array_get(o, 3), "device"), 13);
	assert_int_equal(num(json_array_get(o, 3), "dropped"), 40);
	json_decref(j);
	assert_int_equal(ask(&root, "status"), 0);
	j = json();
	assert_int_equal(num(j, "clients"), 77);
	assert_true(num(json_array_get(json_object_get(j, "tiers"), 1), "capacity_bytes") == INT64_MAX);
	probes_say(json_object_get(j, "probes"));
	json_decref(j);
	assert_int_equal(ask(&root, "watch"), 0);
	assert_int_equal(res.fd, 9);
	assert_string_equal(res.json, "{\"feed_bytes\":4096}");
}

static void bad_arguments_are_named(void **state)
{
	refuses(&root, "bogus", KVT_E_INVAL, "verb: \"bogus\", unknown; see kvtierctl --help");
	refuses(&root, "", KVT_E_INVAL, "verb: \"\", unknown; see kvtierctl --help");
	refuses(&root, "show", KVT_E_INVAL, "usage: show SEQ [lanes]");
	refuses(&root, "show 0x100000001 lane", KVT_E_INVAL, "usage: show SEQ [lanes]");
	refuses(&root, "show abc", KVT_E_INVAL,
		"SEQ: \"abc\", must be a handle (0x...), a key (32 hex digits) or 4 or more of them");
	refuses(&root, "show 0xzz", KVT_E_INVAL,
		"SEQ: \"0xzz\", must be a handle (0x...), a key (32 hex digits) or 4 or more of them");
	refuses(&root, "budget 0x100000001 device=-1", KVT_E_INVAL,
		"device: \"-1\", must be rows from 0 to 1048576, or all");
	refuses(&root, "budget 0x100000001 gpu=1", KVT_E_INVAL,
		"TIER=ROWS: \"gpu=1\", TIER must be device, dram or nvme");
	refuses(&root, "budget 0x100000001 device=1 device=2", KVT_E_INVAL, "device: given twice");
	refuses(&root, "budget 0x100000001 device", KVT_E_INVAL,
		"TIER=ROWS: \"device\", TIER must be device, dram or nvme");
	refuses(&root, "pin 0x100000001 1 0", KVT_E_INVAL, "ROWS: \"0\", must be a number from 1 to 1048575");
	refuses(&root, "pin 0x100000001 1x 5", KVT_E_INVAL, "POS: \"1x\", must be a number from 0 to 1048575");
	refuses(&root, "freeze", KVT_E_INVAL, "usage: freeze on|off");
	refuses(&root, "policy set", KVT_E_INVAL, "usage: policy list | load FILE | set NAME [SEQ]");
	refuses(&root, "policy load", KVT_E_INVAL, "usage: policy list | load FILE | set NAME [SEQ]");
	refuses(&root, "policy unload x", KVT_E_INVAL, "usage: policy list | load FILE | set NAME [SEQ]");
	refuses(&root, "ls 4294967296", KVT_E_INVAL,
		"FROM: \"4294967296\", must be a number from 0 to 4294967295");
}

/* No verb of the list is missing from the dispatcher, and each counts its arguments. */
static void every_verb_is_dispatched(void **state)
{
	static const char *const names[] = {
#define NAME(name, args, least, most, flags, doc) #name,
		ADMIN_VERBS(NAME)};

	for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
		char line[64], want[32];

		snprintf(line, sizeof(line), "%s 1 2 3 4 5 6 7 8", names[i]);
		snprintf(want, sizeof(want), "usage: %s", names[i]);
		assert_int_equal(ask(&root, line), KVT_E_INVAL);
		assert_ptr_equal(strstr(err, want), err);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup(mutations_reach_the_core, setup),
		cmocka_unit_test_setup(audit_says_who_what_and_result, setup),
		cmocka_unit_test_setup(changes_are_no_faster_than_their_lines, setup),
		cmocka_unit_test_setup(audit_cannot_be_forged_or_flooded, setup),
		cmocka_unit_test_setup(tenants_steer_only_their_own, setup),
		cmocka_unit_test_setup(users_of_a_tenant_are_apart, setup),
		cmocka_unit_test_setup(tenants_may_not_touch_the_daemon, setup),
		cmocka_unit_test_setup(tenants_see_only_their_own, setup),
		cmocka_unit_test_setup(scrub_results_belong_to_who_asked, setup),
		cmocka_unit_test_setup(listing_is_paged_and_complete, setup),
		cmocka_unit_test_setup(json_has_the_numbers, setup),
		cmocka_unit_test_setup(bad_arguments_are_named, setup),
		cmocka_unit_test_setup(every_verb_is_dispatched, setup),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
