/* SPDX-License-Identifier: MIT */
/*
 * The kernel tells of stalls by PSI where it has that and lets us listen. Where kvtierd-bpf counts time in
 * reclaim, that is the same thing seen from nearer: threads of the daemon and its clients, added up. Both are
 * answered in the same way, by the same numbers of [pressure] psi.
 */
#include <stdio.h>
#include "daemon/pressure.h"

void stall_set(struct stall *st, const char *spec)
{
	uint32_t stall_us = 0, window_us = 0;
	char why[128];
	bool full;

	if (psi_parse(spec, &full, &stall_us, &window_us, why, sizeof(why)) < 0)
		window_us = 0;
	*st = (struct stall){.stall_ns = stall_us * UINT64_C(1000), .window_ns = window_us * UINT64_C(1000)};
}

bool stall_look(struct stall *st, uint64_t sum, uint64_t now)
{
	if (!st->window_ns || now < st->quiet_ns)
		return false;
	if (!st->then_ns || sum < st->next) { /* after a quiet time, or the probes are new */
		st->then = st->next = sum;
		st->then_ns = st->next_ns = now;
	}
	if (sum - st->then >= st->stall_ns) {
		st->then_ns = 0;
		st->quiet_ns = now + st->window_ns;
		return true;
	}
	if (now - st->next_ns >= st->window_ns / 2) {
		st->then = st->next;
		st->then_ns = st->next_ns;
		st->next = sum;
		st->next_ns = now;
	}
	return false;
}

void stall_says(const struct stall *st, const char *why_off, char *ret, size_t size)
{
	if (!st->window_ns)
		snprintf(ret, size, "off: psi = no");
	else if (why_off)
		snprintf(ret, size, "off: %s", why_off);
	else
		snprintf(ret, size, "%llu ms in %llu s", (unsigned long long)(st->stall_ns / 1000000),
			 (unsigned long long)(st->window_ns / 1000000000));
}
