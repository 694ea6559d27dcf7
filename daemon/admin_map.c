/* SPDX-License-Identifier: MIT */
/* The verb map: which tiers hold each row of a sequence, and what rows are worth. */
#include <stdio.h>
#include "daemon/admin_call.h"
#include "shm/util.h"

/* Where the last answer ended: lane, position, rows and epoch, with points between them. */
static int from_arg(struct admin_call *a, int i, struct core_map_ask *ask)
{
	const char *s = a->argv[i];
	int n = 0;

	if (sscanf(s, "%9u.%9u.%9u.%10u%n", &ask->lane, &ask->pos, &ask->rows, &ask->epoch, &n) != 4 || s[n] ||
	    !ask->rows)
		return admin_refuse(a, KVT_E_INVAL, "FROM: \"%.40s\", must be what an answer named as next", s);
	return 0;
}

int verb_map(struct admin_call *a)
{
	struct core_map_ask ask = {.lanes = UINT32_MAX};
	uint64_t handle;
	int r;

	r = admin_seq_arg(a, 1, &handle);
	if (!r && a->argc > 2)
		r = admin_lanes_arg(a, 2, &ask.lane, &ask.lanes);
	if (!r && a->argc > 3)
		r = admin_number_arg(a, 3, "COLUMNS", 0, MAP_COLUMNS, &ask.columns);
	if (!r && a->argc > 4)
		r = from_arg(a, 4, &ask);
	if (!r)
		r = core_seq_map(a->core, handle, &ask, &a->text, a->err, a->errsize);
	if (r == KVT_E_STALE && !a->err[0])
		return admin_refuse(a, r, "SEQ: \"%.40s\", no such sequence", a->argv[1]);
	return r;
}
