/* SPDX-License-Identifier: MIT */
/* The verb trace: what the journal of a sequence says, or where one row is and why. */
#include <stdio.h>
#include <string.h>
#include "daemon/admin_call.h"
#include "shm/util.h"

/* "7": that lane; "7+": and those after it; none: all. */
static int lanes_arg(struct admin_call *a, uint32_t *ret_lane, uint32_t *ret_n)
{
	const char *s = a->argc > 3 ? a->argv[3] : "0+";
	size_t n = strspn(s, "0123456789");

	*ret_n = s[n] == '+' ? UINT32_MAX : 1;
	if (!n || n > 6 || strcmp(s + n, *ret_n > 1 ? "+" : ""))
		return admin_refuse(a, KVT_E_INVAL, "LANE: \"%.40s\", must be a lane, or one and a plus", s);
	*ret_lane = (uint32_t)strtoul(s, NULL, 10);
	return 0;
}

int verb_trace(struct admin_call *a)
{
	uint32_t pos, lane = 0, n = 0;
	uint64_t handle;
	int r;

	r = admin_seq_arg(a, 1, &handle);
	if (!r && a->argc == 2)
		r = core_seq_trace(a->core, handle, &a->text);
	if (!r && a->argc > 2) {
		r = admin_number_arg(a, 2, "POS", 0, UINT32_MAX - 1, &pos);
		if (!r)
			r = lanes_arg(a, &lane, &n);
		if (!r)
			r = core_row_trace(a->core, handle, pos, lane, n, &a->text, a->err, a->errsize);
	}
	if (r == KVT_E_STALE)
		return admin_refuse(a, r, "SEQ: \"%.40s\", no such sequence", a->argv[1]);
	return r;
}
