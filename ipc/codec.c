/* SPDX-License-Identifier: MIT */
#include <stdio.h>
#include <string.h>
#include "ipc/codec_check.h"
#include "shm/ctl.h"
#include "shm/plan.h"
#include "shm/trial.h"

_Static_assert(sizeof(struct wire_hdr) == 16, "header");
_Static_assert(sizeof(struct wire_reply) == 224, "reply header");
_Static_assert(sizeof(struct wire_hello) == 104, "hello");
_Static_assert(offsetof(struct wire_model, layer) == 120, "model");
_Static_assert(sizeof(struct wire_budget) == 72, "budget");
_Static_assert(sizeof(struct wire_layout) == 64, "layout");
_Static_assert(sizeof(struct wire_seq_open) == 240, "layouts behind it are 8-byte aligned");
_Static_assert(sizeof(struct wire_plan_request) == 96, "plan request");
_Static_assert(sizeof(struct wire_recall) == 136, "queries behind it are 8-byte aligned");
_Static_assert(sizeof(struct wire_recall_reply) == 264, "recall reply");
_Static_assert(offsetof(struct wire_admin, argv) == 24, "admin");

void check_fail(struct check *c, int rc, const char *fmt, ...)
{
	va_list ap;

	if (c->rc)
		return;
	c->rc = rc;
	if (!c->size)
		return;
	va_start(ap, fmt);
	vsnprintf(c->err, c->size, fmt, ap);
	va_end(ap);
}

void check_range(struct check *c, const char *field, uint64_t v, uint64_t lo, uint64_t hi)
{
	if (v < lo || v > hi)
		check_fail(c, KVT_E_INVAL, "%s: %llu, must be %llu..%llu", field, (unsigned long long)v,
			   (unsigned long long)lo, (unsigned long long)hi);
}

void check_not_zero(struct check *c, const char *field, uint64_t v)
{
	if (!v)
		check_fail(c, KVT_E_INVAL, "%s: 0, must not be 0", field);
}

void check_reserved(struct check *c, const char *field, uint64_t v)
{
	if (v)
		check_fail(c, KVT_E_PROTO, "%s: %llu, reserved and must be 0", field, (unsigned long long)v);
}

void check_text(struct check *c, const char *field, const char *s, size_t size)
{
	size_t n = strnlen(s, size);

	if (n == size)
		check_fail(c, KVT_E_PROTO, "%s: not terminated within %zu bytes", field, size);
	for (size_t i = 0; i < n; i++)
		if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f)
			check_fail(c, KVT_E_PROTO, "%s: control byte 0x%02x at %zu", field, (unsigned char)s[i],
				   i);
}

void check_word(struct check *c, const char *field, const char *s, size_t size)
{
	static const char ok[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+@:";

	check_text(c, field, s, size);
	if (c->rc)
		return;
	if (s[0] == '.' || s[strspn(s, ok)])
		check_fail(c, KVT_E_INVAL,
			   "%s: \"%s\", must be letters, digits and ._-+@: and not begin with a dot", field, s);
}

void check_power_of_two(struct check *c, const char *field, uint64_t v, uint64_t lo, uint64_t hi)
{
	check_range(c, field, v, lo, hi);
	if (v & (v - 1))
		check_fail(c, KVT_E_INVAL, "%s: %llu, must be a power of two", field, (unsigned long long)v);
}

uint32_t wire_dtype_bytes(uint32_t dtype)
{
	switch (dtype) {
	case KVT_DTYPE_F32:
		return 4;
	case KVT_DTYPE_F16:
	case KVT_DTYPE_BF16:
		return 2;
	default:
		return 0;
	}
}

/* ---- framing -------------------------------------------------------------------- */

static const struct {
	uint16_t type;
	bool tail; /* a table follows: checked by the type's own function */
	const char *name, *reply_name;
	uint32_t request, reply;
} types[] = {
	{W_HELLO, false, "hello", "hello reply", sizeof(struct wire_hello), sizeof(struct wire_hello_reply)},
	{W_MODEL, true, "model", "model reply", sizeof(struct wire_model), sizeof(struct wire_model_reply)},
	{W_REGION, false, "region", "region reply", sizeof(struct wire_region),
	 sizeof(struct wire_region_reply)},
	{W_REGION_CLOSE, false, "region-close", "region-close reply", sizeof(struct wire_handle),
	 sizeof(struct wire_reply)},
	{W_SEQ_OPEN, true, "seq-open", "seq-open reply", sizeof(struct wire_seq_open),
	 sizeof(struct wire_seq_open_reply)},
	{W_SEQ_TRUNCATE, false, "seq-truncate", "seq-truncate reply", sizeof(struct wire_seq_truncate),
	 sizeof(struct wire_seq_truncate_reply)},
	{W_SEQ_CLOSE, false, "seq-close", "seq-close reply", sizeof(struct wire_seq_close),
	 sizeof(struct wire_reply)},
	{W_SEQ_INFO, false, "seq-info", "seq-info reply", sizeof(struct wire_handle),
	 sizeof(struct wire_seq_info_reply)},
	{W_PLAN_REQUEST, true, "plan-request", "plan-request reply", sizeof(struct wire_plan_request),
	 sizeof(struct wire_plan_reply)},
	{W_FETCH, false, "fetch", "fetch reply", sizeof(struct wire_fetch), sizeof(struct wire_plan_reply)},
	{W_REGION_IMPORT, false, "region-import", "region-import reply", sizeof(struct wire_region),
	 sizeof(struct wire_region_reply)},
	{W_RECALL, true, "recall", "recall reply", sizeof(struct wire_recall),
	 sizeof(struct wire_recall_reply)},
	{W_SCORER, false, "scorer", "scorer reply", sizeof(struct wire_scorer),
	 sizeof(struct wire_scorer_reply)},
	{W_DIRECT, false, "direct", "direct reply", sizeof(struct wire_handle),
	 sizeof(struct wire_direct_reply)},
	{W_SEGMENT, false, "segment", "segment reply", sizeof(struct wire_segment),
	 sizeof(struct wire_segment_reply)},
	{W_ADMIN, true, "admin", "admin reply", sizeof(struct wire_admin), sizeof(struct wire_admin_reply)},
};

static int type_index(uint16_t type)
{
	for (size_t i = 0; i < ARRAY_SIZE(types); i++)
		if (types[i].type == type)
			return (int)i;
	return -1;
}

unsigned wire_request_fds(uint16_t type)
{
	return type == W_REGION_IMPORT;
}

const char *wire_type_name(uint16_t type)
{
	int i = type_index(type & (uint16_t)~W_REPLY);

	if (i < 0)
		return "unknown";
	return type & W_REPLY ? types[i].reply_name : types[i].name;
}

static void check_length(struct check *c, const char *name, uint32_t len, uint32_t want, bool tail)
{
	if (tail ? len < want : len != want)
		check_fail(c, KVT_E_PROTO, "%s: %u bytes, must be %s%u", name, len, tail ? "at least " : "",
			   want);
}

static void check_framed_reply(struct check *c, const struct wire_reply *r, int t)
{
	if (r->hdr.len < sizeof(*r)) {
		check_fail(c, KVT_E_PROTO, "%s: %u bytes, must be at least %zu", types[t].reply_name,
			   r->hdr.len, sizeof(*r));
		return;
	}
	if (r->status > 0 || (r->status < 0 && (r->status > KVT_E_INVAL || r->status < KVT_E_INTERNAL)))
		check_fail(c, KVT_E_PROTO, "status: %d, must be 0 or %d..%d", r->status, KVT_E_INTERNAL,
			   KVT_E_INVAL);
	check_reserved(c, "pad", r->pad);
	check_text(c, "text", r->text, sizeof(r->text));
	check_length(c, types[t].reply_name, r->hdr.len, r->status ? (uint32_t)sizeof(*r) : types[t].reply,
		     !r->status && types[t].type == W_RECALL); /* tables follow */
	if (!c->rc && !r->status)
		check_reply(c, r);
}

int wire_check(const void *buf, size_t len, bool reply, char *err, size_t errsize)
{
	struct check c = {.err = err, .size = errsize};
	const struct wire_hdr *h = buf;
	int t;

	if (len < sizeof(*h) || len > WIRE_MAX) {
		check_fail(&c, KVT_E_PROTO, "message: %zu bytes, must be %zu..%u", len, sizeof(*h), WIRE_MAX);
		return c.rc;
	}
	if (h->magic != WIRE_MAGIC)
		check_fail(&c, KVT_E_PROTO, "magic: 0x%08x, must be 0x%08x", h->magic, WIRE_MAGIC);
	if (h->version != WIRE_VERSION && !planted("version-ignored"))
		check_fail(&c, KVT_E_VERSION, "version: %u, must be %u", h->version, WIRE_VERSION);
	if (h->len != len)
		check_fail(&c, KVT_E_PROTO, "len: %u, the packet has %zu bytes", h->len, len);
	t = type_index(h->type & (uint16_t)~W_REPLY);
	if (t < 0 || !!(h->type & W_REPLY) != reply) {
		check_fail(&c, KVT_E_PROTO, "type: %u, not a known %s", h->type, reply ? "reply" : "request");
		return c.rc;
	}
	if (!c.rc && reply)
		check_framed_reply(&c, buf, t);
	if (!c.rc && !reply)
		check_length(&c, types[t].name, h->len, types[t].request, types[t].tail);
	if (!c.rc && !reply)
		check_request(&c, h);
	return c.rc;
}
