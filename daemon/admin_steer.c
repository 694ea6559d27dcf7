/* SPDX-License-Identifier: MIT */
/* Verbs that change something, and the scrub. The core checks what a verb asks; here it is only read. */
#include <string.h>
#include "daemon/admin_call.h"
#include "ipc/wire.h"
#include "shm/util.h"

/* ---- one sequence -------------------------------------------------------------------- */

/* TIER=ROWS; tiers that are not named keep their budget. */
static int budget_arg(struct admin_call *a, int i, uint32_t rows[KVT_TIERS], bool seen[KVT_TIERS])
{
	static const char *const names[KVT_TIERS] = {"device", "dram", "nvme"};
	const char *eq = strchr(a->argv[i], '='), *value = eq ? eq + 1 : NULL;
	unsigned long long v;
	char *end;

	for (unsigned t = 0; eq && t < KVT_TIERS; t++) {
		if (strlen(names[t]) != (size_t)(eq - a->argv[i]) ||
		    strncmp(names[t], a->argv[i], strlen(names[t])))
			continue;
		if (seen[t])
			return admin_refuse(a, KVT_E_INVAL, "%s: given twice", names[t]);
		seen[t] = true;
		if (!strcmp(value, "all")) {
			rows[t] = KVT_ROWS_ALL;
			return 0;
		}
		errno = 0;
		v = strtoull(value, &end, 10);
		if (*value < '0' || *value > '9' || *end || errno || v > WIRE_MAX_ROWS)
			return admin_refuse(a, KVT_E_INVAL, "%s: \"%.40s\", must be rows from 0 to %u, or all",
					    names[t], value, WIRE_MAX_ROWS);
		rows[t] = (uint32_t)v;
		return 0;
	}
	return admin_refuse(a, KVT_E_INVAL, "TIER=ROWS: \"%.40s\", TIER must be device, dram or nvme",
			    a->argv[i]);
}

int verb_budget(struct admin_call *a)
{
	bool seen[KVT_TIERS] = {};
	struct core_seq_stat s;
	uint32_t rows[KVT_TIERS];
	uint64_t handle;
	int r;

	r = admin_seq_arg(a, 1, &handle);
	if (r)
		return r;
	r = core_seq_stat(a->core, handle, &s);
	if (r)
		return admin_refuse(a, r, "SEQ: \"%.40s\", no such sequence", a->argv[1]);
	memcpy(rows, s.budget, sizeof(rows));
	for (int i = 2; i < a->argc; i++) {
		r = budget_arg(a, i, rows, seen);
		if (r)
			return r;
	}
	return core_seq_budget(a->core, handle, rows, a->err, a->errsize);
}

static int pin(struct admin_call *a, bool on)
{
	uint32_t pos, n;
	uint64_t handle;
	int r;

	r = admin_seq_arg(a, 1, &handle);
	if (!r)
		r = admin_number_arg(a, 2, "POS", 0, WIRE_MAX_ROWS - 1, &pos);
	if (!r)
		r = admin_number_arg(a, 3, "ROWS", 1, WIRE_MAX_ROWS - pos, &n);
	return r ?: core_seq_pin(a->core, handle, pos, n, on, a->err, a->errsize);
}

int verb_pin(struct admin_call *a)
{
	return pin(a, true);
}

int verb_unpin(struct admin_call *a)
{
	return pin(a, false);
}

int verb_demote(struct admin_call *a)
{
	uint32_t keep = 0;
	uint64_t handle;
	int r;

	r = admin_seq_arg(a, 1, &handle);
	if (!r && a->argc == 3)
		r = admin_number_arg(a, 2, "KEEP", 0, WIRE_MAX_ROWS, &keep);
	return r ?: core_seq_demote(a->core, handle, keep, a->err, a->errsize);
}

int verb_promote(struct admin_call *a)
{
	uint64_t handle;
	int r;

	r = admin_seq_arg(a, 1, &handle);
	return r ?: core_seq_promote(a->core, handle, a->err, a->errsize);
}

int verb_drop(struct admin_call *a)
{
	uint64_t handle;
	int r;

	r = admin_seq_arg(a, 1, &handle);
	return r ?: core_seq_drop(a->core, handle, a->err, a->errsize);
}

/* ---- policies ------------------------------------------------------------------------- */

static int policy_list(struct admin_call *a)
{
	json_t *list = json_array();
	struct core_policy_info p;
	uint32_t cursor = 0;

	a->quiet = true;
	while (core_policy_next(a->core, &cursor, &p)) {
		json_t *o = json_pack("{s:o,s:o,s:o,s:b}", "name", admin_text(p.name), "doc", admin_text(p.doc),
				      "caps", admin_num(p.caps), "default", p.is_default);

		/* How many sequences use it, and from which file, is the operator's business. */
		if (!admin_tenant(a)) {
			json_object_set_new(o, "sequences", admin_num(p.seqs));
			json_object_set_new(o, "weights", admin_text(p.weights));
		}
		json_array_append_new(list, o);
	}
	a->json = json_pack("{s:o}", "policies", list);
	return 0;
}

static int policy_set(struct admin_call *a)
{
	uint64_t handle = 0;
	int r;

	if (a->argc < 3)
		return admin_usage(a);
	if (a->argc == 3 && admin_tenant(a))
		return admin_refuse(a, KVT_E_PERM, "policy set: the default, only on the admin socket");
	if (a->argc == 4) {
		r = admin_seq_arg(a, 3, &handle);
		if (r)
			return r;
	}
	return core_policy_set(a->core, handle, a->argv[2], a->err, a->errsize);
}

int verb_policy(struct admin_call *a)
{
	const char *sub = a->argc > 1 ? a->argv[1] : "";

	if (!strcmp(sub, "list") && a->argc == 2)
		return policy_list(a);
	if (!strcmp(sub, "set"))
		return policy_set(a);
	if (strcmp(sub, "load") || a->argc != 3)
		return admin_usage(a);
	if (admin_tenant(a))
		return admin_refuse(a, KVT_E_PERM, "policy load: only on the admin socket");
	return core_policy_load(a->core, a->argv[2], a->err, a->errsize);
}

/* ---- the scrub ------------------------------------------------------------------------- */

/* Who started the last scrub: what it found is their own business. The admin socket sees everything. */
static struct admin_peer verify_peer = {.tenant = -1};

static int verify_status(struct admin_call *a)
{
	struct core_verify v;

	if (admin_tenant(a) && (verify_peer.tenant != a->peer->tenant || verify_peer.owner != a->peer->owner))
		return admin_refuse(a, KVT_E_PERM, "verify status: the last one was not started from here");
	core_verify_stat(a->core, &v);
	a->json = json_pack("{s:b,s:o,s:o,s:o,s:o}", "running", v.running, "pages", admin_num(v.pages), "total",
			    admin_num(v.total), "bytes", admin_num(v.bytes), "bad", admin_num(v.bad));
	return 0;
}

static int verify_start(struct admin_call *a)
{
	uint64_t handle = 0;
	int r;

	if (a->argc == 3) {
		r = admin_seq_arg(a, 2, &handle);
		if (r)
			return r;
	} else if (admin_tenant(a)) {
		return admin_refuse(a, KVT_E_PERM, "verify start: all sequences, only on the admin socket");
	}
	r = core_verify_start(a->core, handle, a->err, a->errsize);
	if (!r)
		verify_peer = *a->peer;
	return r;
}

int verb_verify(struct admin_call *a)
{
	const char *sub = a->argc > 1 ? a->argv[1] : "start";

	if (!strcmp(sub, "status") && a->argc == 2)
		return verify_status(a);
	if (!strcmp(sub, "start"))
		return verify_start(a);
	return admin_usage(a);
}

/* ---- the daemon ------------------------------------------------------------------------- */

int verb_freeze(struct admin_call *a)
{
	bool on;

	if (strcmp(a->argv[1], "on") && strcmp(a->argv[1], "off"))
		return admin_usage(a);
	on = !strcmp(a->argv[1], "on");
	return core_freeze(a->core, on) ? admin_refuse(a, KVT_E_INTERNAL, "freeze: refused by the core") : 0;
}

int verb_drain(struct admin_call *a)
{
	if (!admin_hook_drain)
		return admin_refuse(a, KVT_E_INTERNAL, "drain: not available");
	admin_hook_drain(admin_hook_arg);
	a->result->drain = true;
	return 0;
}

static json_t *changes;

void admin_no_changes(void)
{
	json_decref(changes);
	changes = json_array();
}

void admin_add_change(const char *line)
{
	json_array_append_new(changes, admin_text(line));
}

int verb_reload(struct admin_call *a)
{
	int r;

	if (!admin_hook_reload)
		return admin_refuse(a, KVT_E_INTERNAL, "reload: not available");
	r = admin_hook_reload(admin_hook_arg, a->err, a->errsize);
	if (r)
		return r;
	a->result->reload = true;
	a->json = json_pack("{s:o}", "changed", changes ?: json_array());
	changes = NULL;
	return 0;
}
