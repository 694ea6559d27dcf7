/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Who is compared: the policies of policy/registry.c, weight files under names of
 * their own, the policies that need attention, and the oracles. Internal to policy/eval.
 */
#include <stdbool.h>
#include "policy/policy.h"
#include "shm/trace.h"

#define RIVALS_MAX 48u
#define RIVAL_NAME 32u

enum rival_role {
	RIVAL_STAR,      /* untrained, from K and V alone */
	RIVAL_TRAINED,   /* position-only and q-filters: trained, but no network */
	RIVAL_LEARNED,   /* networks */
	RIVAL_ATTENTION, /* sees queries: not possible where attention is not at hand */
	RIVAL_ORACLE,    /* sees the future */
	RIVAL_BEST,      /* in every lane the RIVAL_STAR of the least regret on the validation split */
	RIVAL_ROLES
};
enum rival_how {
	HOW_OPS,       /* policy_ops.score */
	HOW_CUR_LOCAL, /* CurDKV as kvpress runs it by default: shares of a window of 16, no random projection
			*/
	HOW_TOVA,
	HOW_H2O,
	HOW_SNAPKV,
	HOW_EXPECTED,
	HOW_DEFENSIVE,
	HOW_ORACLE,     /* u itself */
	HOW_ATTAINABLE, /* mean u of four other continuations of the same context and prompt */
	HOW_BEST,       /* no scores: filled in from the others */
};

struct rival {
	char name[RIVAL_NAME];
	enum rival_role role;
	enum rival_how how;
	struct policy *policy; /* HOW_OPS; owned */
};

struct rivals {
	uint32_t n;
	struct rival r[RIVALS_MAX];
};

struct rival_weights { /* of --weights NAME=FILE */
	const char *name, *path;
};

/*
 * Open the policies that `list` names (comma-separated; NULL or "all": every one; "star": those of RIVAL_STAR)
 * and those of the weight files for the model of `h`. -EINVAL and others with one line in err.
 */
int rivals_open(struct rivals *ret, const char *list, const struct rival_weights *w, uint32_t n_weights,
		const struct trace_header *h, uint64_t seed, char *err, size_t errsize);
void rivals_close(struct rivals *r);

const char *rival_role_name(enum rival_role role);
/* Does this one read Q? */
bool rival_needs_q(const struct rival *r);
/* Index of the first with this `how`, or -1. */
int rival_find(const struct rivals *r, enum rival_how how);

/* HOW_CUR_LOCAL's scores: knorm and vnorm are |k_i| and |v_i|. */
void rival_cur_local(const float *knorm, const float *vnorm, uint32_t n, float *score);
