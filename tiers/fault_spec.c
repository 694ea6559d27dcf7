/* SPDX-License-Identifier: MIT */
#include "tiers/fault.h"
#include "shm/util.h"

#include <stdio.h>
#include <string.h>

static const char *const names[FAULT_KINDS] = {
	[FAULT_WRITE_EIO] = "write_eio", [FAULT_READ_EIO] = "read_eio", [FAULT_FLIP] = "flip",
	[FAULT_TORN] = "torn",           [FAULT_LOST] = "lost",         [FAULT_MISDIRECT] = "misdirect",
	[FAULT_ENOSPC] = "enospc",       [FAULT_REORDER] = "reorder",
};

const char *fault_name(enum fault_kind k)
{
	return names[k];
}

/* Decimal digits only: no sign, no space, no overflow. */
static bool parse_number(const char *p, size_t len, uint64_t *ret)
{
	uint64_t v = 0;

	if (!len)
		return false;
	for (size_t i = 0; i < len; i++)
		if (p[i] < '0' || p[i] > '9' || __builtin_mul_overflow(v, 10, &v) ||
		    __builtin_add_overflow(v, (uint64_t)(p[i] - '0'), &v))
			return false;
	*ret = v;
	return true;
}

static bool is_key(const char *p, size_t len, const char *key)
{
	return strlen(key) == len && !memcmp(p, key, len);
}

/* One "key=value" of `len` bytes. */
static int parse_item(struct fault_spec *s, const char *p, size_t len, char *err, size_t errsize)
{
	const char *eq = memchr(p, '=', len);
	size_t klen = eq ? (size_t)(eq - p) : len;
	uint64_t v, max = 1000;
	enum fault_kind k = 0;
	bool seed = is_key(p, klen, "seed"), delay = is_key(p, klen, "delay_us");
	bool sector = is_key(p, klen, "sector"), speed = is_key(p, klen, "mib_s");

	while (k < FAULT_KINDS && !is_key(p, klen, names[k]))
		k++;
	if (seed)
		max = UINT64_MAX;
	else if (delay)
		max = FAULT_DELAY_MAX;
	else if (speed)
		max = FAULT_MIB_S_MAX;
	else if (sector)
		max = KVT_UNIT;
	else if (k == FAULT_KINDS) {
		snprintf(err, errsize, "fault: unknown key \"%.*s\"", (int)MIN(klen, 32u), p);
		return -EINVAL;
	}
	if (!eq || !parse_number(eq + 1, len - klen - 1, &v) || v > max) {
		snprintf(err, errsize, "fault %.*s: \"%.*s\" is not a number from 0 to %llu", (int)klen, p,
			 eq ? (int)MIN(len - klen - 1, 32u) : 0, eq ? eq + 1 : "", (unsigned long long)max);
		return -EINVAL;
	}
	if (sector && v != 512 && v != KVT_UNIT) {
		snprintf(err, errsize, "fault sector: %llu is neither 512 nor 4096", (unsigned long long)v);
		return -EINVAL;
	}
	if (seed)
		s->seed = v;
	else if (sector)
		s->sector = (uint32_t)v;
	else if (speed)
		s->mib_s = (uint32_t)v;
	else if (delay)
		s->delay_us = (uint32_t)v;
	else
		s->permille[k] = (uint16_t)v;
	return 0;
}

int fault_parse(struct fault_spec *ret, const char *text, char *err, size_t errsize)
{
	struct fault_spec s = {.seed = 1, .sector = 512};

	for (const char *p = text; p && *p;) {
		size_t len = strcspn(p, ",");
		int r = parse_item(&s, p, len, err, errsize);

		if (r < 0)
			return r;
		p += len + (p[len] == ',');
	}
	*ret = s;
	return 0;
}
