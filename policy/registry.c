/* SPDX-License-Identifier: MIT */
/* All policies, in the order in which `kvtierctl policy list` shows them. */
#include <string.h>
#include "policy/heuristic.h"
#include "policy/learned.h"
#include "policy/policy.h"

const struct policy_ops *const policy_registry[] = {
	&policy_kvp_ops,
	&policy_position_ops,
	&policy_qfilter_ops,
	&policy_keydiff_ops,
	&policy_lagkv_ops,
	&policy_cur_ops,
	&policy_knorm_ops,
	&policy_vnorm_ops,
	&policy_vrange_ops,
	&policy_streaming_ops,
	&policy_random_ops,
	&policy_client_ops,
	NULL,
};

const struct policy_ops *policy_find(const char *name)
{
	for (const struct policy_ops *const *p = policy_registry; *p; p++)
		if (strcmp((*p)->name, name) == 0)
			return *p;
	return NULL;
}

const struct policy_ops *policy_by_id(enum policy_id id)
{
	for (const struct policy_ops *const *p = policy_registry; *p; p++)
		if ((*p)->id == id)
			return *p;
	return NULL;
}
