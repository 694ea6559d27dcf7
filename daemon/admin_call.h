/* SPDX-License-Identifier: MIT */
#pragma once
/* What the admin verbs share: one call, its arguments and its answer. */
#include <jansson.h>
#include "daemon/admin.h"
#include "daemon/json_text.h"
#include "daemon/verbs.h"

struct admin_call {
	struct core *core;
	const struct admin_peer *peer;
	int argc; /* the verb is argv[0] */
	char *const *argv;
	struct admin_result *result;
	json_t *json;          /* set by the verb; the dispatcher writes and frees it */
	struct json_text text; /* or the answer written already, its memory the dispatcher's */
	char *err;
	size_t errsize;
	bool quiet; /* this call of a VERB_AUDIT verb only looked */
};

extern void (*admin_hook_drain)(void *);
extern int (*admin_hook_reload)(void *, char *, size_t);
extern void *admin_hook_arg;

/* The peer's tenant; NULL for the admin socket. */
const char *admin_tenant(const struct admin_call *a);
/* Fill err and return code. */
int __attribute__((format(printf, 3, 4))) admin_refuse(struct admin_call *a, int code, const char *fmt, ...);
/* err says what the verb takes. */
int admin_usage(struct admin_call *a);
/* The caller's sequence named by argv[i]; others' look as if they did not exist. */
int admin_seq_arg(struct admin_call *a, int i, uint64_t *ret);
/* argv[i] as a decimal number in [min, max]; `what` names it in the error line. */
int admin_number_arg(struct admin_call *a, int i, const char *what, uint32_t min, uint32_t max, uint32_t *ret);
/* argv[i] as lanes: "7", that one; "7+", and those after it. */
int admin_lanes_arg(struct admin_call *a, int i, uint32_t *ret_lane, uint32_t *ret_n);
/* True when this peer may see the sequence: on a tenant's socket every user is alone. */
bool admin_sees(const struct admin_call *a, const struct core_seq_stat *s);

/* JSON of client-given text, which may not be UTF-8. */
json_t *admin_text(const char *s);
/* What the kernel's probes say. */
json_t *admin_probes(struct core *c);
/* JSON integers are signed: what does not fit is capped. */
json_t *admin_num(uint64_t v);

#define ADMIN_DECLARE(name, args, least, most, flags, doc) int verb_##name(struct admin_call *a);
ADMIN_VERBS(ADMIN_DECLARE)
#undef ADMIN_DECLARE
