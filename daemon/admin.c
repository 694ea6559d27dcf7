/* SPDX-License-Identifier: MIT */
/*
 * Admin verbs: who may call them, their arguments, and the audit line. What they
 * do is in admin_look.c and admin_steer.c.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <syslog.h>
#include "daemon/admin_call.h"
#include "shm/util.h"

#define KEY_PREFIX_MIN 4

struct verb {
	const char *name, *args;
	int least, most;
	unsigned flags;
	int (*run)(struct admin_call *a);
};

static const struct verb verbs[] = {
#define ADMIN_ROW(name, args, least, most, flags, doc) {#name, args, least, most, flags, verb_##name},
	ADMIN_VERBS(ADMIN_ROW)
#undef ADMIN_ROW
};

void (*admin_hook_drain)(void *);
int (*admin_hook_reload)(void *, char *, size_t);
void *admin_hook_arg;
static const struct config *admin_config;

void admin_set_hooks(void (*drain)(void *), int (*reload)(void *, char *, size_t), void *arg)
{
	admin_hook_drain = drain;
	admin_hook_reload = reload;
	admin_hook_arg = arg;
}

void admin_set_config(const struct config *cfg)
{
	admin_config = cfg;
}

static const struct verb *find_verb(const char *name)
{
	for (unsigned i = 0; i < ARRAY_SIZE(verbs); i++)
		if (!strcmp(verbs[i].name, name))
			return &verbs[i];
	return NULL;
}

/* ---- helpers of the verbs ------------------------------------------------------ */

const char *admin_tenant(const struct admin_call *a)
{
	return a->peer->tenant < 0 ? NULL : admin_config->tenant[a->peer->tenant].name;
}

int admin_refuse(struct admin_call *a, int code, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(a->err, a->errsize, fmt, ap);
	va_end(ap);
	return code;
}

int admin_usage(struct admin_call *a)
{
	const struct verb *v = find_verb(a->argv[0]);

	return admin_refuse(a, KVT_E_INVAL, "usage: %s%s%s", v->name, *v->args ? " " : "", v->args);
}

bool admin_sees(const struct admin_call *a, const struct core_seq_stat *s)
{
	const char *tenant = admin_tenant(a);

	return !tenant || (!strcmp(tenant, s->tenant) && s->owner == a->peer->owner);
}

/* 0 name is a handle, else the number of hex digits, or -1: neither. */
static int parse_seq_name(const char *name, uint64_t *ret_handle)
{
	size_t n = strspn(name, "0123456789abcdefABCDEF");
	char *end;

	if (!strncmp(name, "0x", 2) || !strncmp(name, "0X", 2)) {
		size_t digits = strspn(name + 2, "0123456789abcdefABCDEF");

		*ret_handle = strtoull(name + 2, &end, 16);
		return digits && digits <= 16 && !*end ? 0 : -1;
	}
	return !name[n] && n >= KEY_PREFIX_MIN && n <= 32 ? (int)n : -1;
}

int admin_seq_arg(struct admin_call *a, int i, uint64_t *ret)
{
	const char *name = a->argv[i];
	uint64_t handle;
	int r;

	if (parse_seq_name(name, &handle) < 0)
		return admin_refuse(
			a, KVT_E_INVAL,
			"SEQ: \"%.40s\", must be a handle (0x...), a key (32 hex digits) or %d or more of them",
			name, KEY_PREFIX_MIN);
	r = core_seq_find(a->core, a->peer->tenant, a->peer->owner, name, ret, a->err, a->errsize);
	/* What a tenant is told is the same for what is not there and what is not its own. */
	if (r && admin_tenant(a))
		return admin_refuse(a, r, "SEQ: \"%.40s\", %s", name,
				    r == KVT_E_INVAL ? "several keys begin so" : "no such sequence");
	return r;
}

int admin_number_arg(struct admin_call *a, int i, const char *what, uint32_t min, uint32_t max, uint32_t *ret)
{
	const char *s = a->argv[i];
	unsigned long long v;
	char *end;

	errno = 0;
	v = strtoull(s, &end, 10);
	if (*s < '0' || *s > '9' || *end || errno || v < min || v > max)
		return admin_refuse(a, KVT_E_INVAL, "%s: \"%.40s\", must be a number from %u to %u", what, s,
				    min, max);
	*ret = (uint32_t)v;
	return 0;
}

int admin_lanes_arg(struct admin_call *a, int i, uint32_t *ret_lane, uint32_t *ret_n)
{
	const char *s = a->argv[i];
	size_t n = strspn(s, "0123456789");

	*ret_n = s[n] == '+' ? UINT32_MAX : 1;
	if (!n || n > 6 || strcmp(s + n, *ret_n > 1 ? "+" : ""))
		return admin_refuse(a, KVT_E_INVAL, "LANE: \"%.40s\", must be a lane, or one and a plus", s);
	*ret_lane = (uint32_t)strtoul(s, NULL, 10);
	return 0;
}

json_t *admin_text(const char *s)
{
	json_t *j = json_string(s);
	char buf[CONFIG_PATH];
	size_t n = 0;

	if (j)
		return j;
	for (; *s && n < sizeof(buf) - 1; s++)
		buf[n++] = (unsigned char)*s < 0x80 ? *s : '?';
	buf[n] = 0;
	return json_string(buf);
}

json_t *admin_num(uint64_t v)
{
	return json_integer((json_int_t)MIN(v, (uint64_t)INT64_MAX));
}

/* ---- dispatch -------------------------------------------------------------------- */

static void audit(const struct admin_call *a, int r)
{
	char what[256];
	size_t n = 0;

	what[0] = 0;
	for (int i = 0; i < a->argc && n < sizeof(what); i++)
		n += (size_t)snprintf(what + n, sizeof(what) - n, "%s%s", i ? " " : "", a->argv[i]);
	log_line(r ? LOG_WARNING : LOG_NOTICE, "audit: uid %u pid %d %s%s: %s: %s%s%s", a->peer->uid,
		 a->peer->pid, admin_tenant(a) ? "tenant " : "admin", admin_tenant(a) ?: "", what,
		 r ? "refused: " : "ok", r ? a->err : "", n >= sizeof(what) ? " (arguments cut)" : "");
}

/* An object that lacks what there was no memory for looks whole: the answer is refused instead. The loop's. */
static bool short_of_memory;

static void *json_memory(size_t n)
{
	void *p = malloc(n);

	short_of_memory |= !p;
	return p;
}

static int answer(struct admin_call *a, struct admin_result *ret)
{
	if (!a->json && !a->text.n && !short_of_memory && !a->text.failed)
		return 0;
	if (a->json)
		ret->json = json_dumps(a->json, JSON_COMPACT);
	else
		ret->json = json_text_take(&a->text, &ret->json_bytes);
	if (!ret->json || short_of_memory) {
		free(ret->json);
		ret->json = NULL;
		ret->json_bytes = 0;
		return admin_refuse(a, KVT_E_NOMEM, "out of memory");
	}
	if (a->json)
		ret->json_bytes = strlen(ret->json);
	return 0;
}

int admin_dispatch(struct core *c, const struct admin_peer *peer, int argc, char *const argv[],
		   struct admin_result *ret, char *err, size_t errsize)
{
	struct admin_result res = {.fd = -1};
	struct admin_call a = {.core = c,
			       .peer = peer,
			       .argc = argc,
			       .argv = argv,
			       .result = &res,
			       .err = err,
			       .errsize = errsize};
	const struct verb *v = argc > 0 ? find_verb(argv[0]) : NULL;
	int r;

	err[0] = 0;
	short_of_memory = false;
	json_set_alloc_funcs(json_memory, free);
	if (!v)
		return admin_refuse(&a, KVT_E_INVAL, "verb: \"%.40s\", unknown; see kvtierctl --help",
				    argc > 0 ? argv[0] : "");
	if (peer->tenant >= 0 && (!admin_config || (uint32_t)peer->tenant >= admin_config->tenants))
		return admin_refuse(&a, KVT_E_INTERNAL, "tenant %d: not configured", peer->tenant);
	/* Each change, and each that was refused, has its line: who is faster than lines may be written waits.
	 */
	if (peer->tenant >= 0 && v->flags & VERB_AUDIT && !core_may_audit(c, peer->tenant))
		return admin_refuse(&a, KVT_E_BUSY, "%s: too many at once, limit two a second", v->name);
	if (peer->tenant >= 0 && v->flags & VERB_ADMIN)
		r = admin_refuse(&a, KVT_E_PERM, "%s: only on the admin socket", v->name);
	else if (argc - 1 < v->least || argc - 1 > v->most)
		r = admin_usage(&a);
	else
		r = v->run(&a);
	if (!r)
		r = answer(&a, &res);
	if (v->flags & VERB_AUDIT && !a.quiet)
		audit(&a, r);
	json_decref(a.json);
	free(a.text.buf);
	if (!r)
		*ret = res;
	return r;
}
