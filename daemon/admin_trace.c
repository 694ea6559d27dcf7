/* SPDX-License-Identifier: MIT */
/* The verb trace: what the journal of a sequence says, or where one row is and why. */
#include <stdio.h>
#include <string.h>
#include "daemon/admin_call.h"
#include "shm/util.h"

int verb_trace(struct admin_call *a)
{
	uint32_t pos, lane = 0, n = UINT32_MAX;
	uint64_t handle;
	int r;

	r = admin_seq_arg(a, 1, &handle);
	if (!r && a->argc == 2)
		r = core_seq_trace(a->core, handle, !admin_tenant(a), &a->text);
	if (!r && a->argc > 2) {
		r = admin_number_arg(a, 2, "POS", 0, UINT32_MAX - 1, &pos);
		if (!r && a->argc > 3)
			r = admin_lanes_arg(a, 3, &lane, &n);
		if (!r)
			r = core_row_trace(a->core, handle, pos, lane, n, &a->text, a->err, a->errsize);
	}
	if (r == KVT_E_STALE)
		return admin_refuse(a, r, "SEQ: \"%.40s\", no such sequence", a->argv[1]);
	return r;
}
