/* SPDX-License-Identifier: MIT */
/* Replies, field by field. */
#include "ipc/codec_check.h"
#include "shm/ctl.h"
#include "shm/direct.h"
#include "shm/plan.h"
#include "shm/scorer.h"

static void check_hello_reply(struct check *c, const struct wire_hello_reply *m)
{
	check_range(c, "features", m->features, 0, WIRE_FEATURES);
	check_range(c, "max_seqs", m->max_seqs, 1, WIRE_MAX_SEQS);
	check_power_of_two(c, "ring_entries", m->ring_entries, WIRE_MIN_RING, WIRE_MAX_RING);
	if (!c->rc)
		check_range(c, "ctl_bytes", m->ctl_bytes, ctl_bytes(m->ring_entries, m->max_seqs),
			    ctl_bytes(m->ring_entries, m->max_seqs));
	check_range(c, "plan_bytes", m->plan_bytes, KVT_UNIT, WIRE_MAX_PLAN_BYTES);
	check_text(c, "version", m->version, sizeof(m->version));
}

static void check_seq_open_reply(struct check *c, const struct wire_seq_open_reply *m)
{
	check_not_zero(c, "seq", m->seq);
	check_range(c, "slot", m->slot, 0, WIRE_MAX_SEQS - 1);
	check_range(c, "rows", m->rows, 0, WIRE_MAX_ROWS);
	check_range(c, "plan_bytes", m->plan_bytes, sizeof(struct plan_hdr), WIRE_MAX_PLAN_BYTES);
	check_range(c, "plan_off", m->plan_off, 0, WIRE_MAX_PLAN_BYTES - sizeof(struct plan_hdr));
	if (m->plan_off % KVT_CACHELINE)
		check_fail(c, KVT_E_INVAL, "plan_off: %llu, must be a multiple of %d",
			   (unsigned long long)m->plan_off, KVT_CACHELINE);
	check_reserved(c, "pad", m->pad);
}

static void check_recall_reply(struct check *c, const struct wire_recall_reply *m)
{
	uint64_t sum = 0;

	check_range(c, "heads", m->heads, 0, 256);
	if (!c->rc && (m->rows > WIRE_MAX || m->r.hdr.len != wire_recall_reply_len(m->heads, m->rows)))
		check_fail(c, KVT_E_PROTO, "heads: %u, rows: %u, do not fit the message's %u bytes", m->heads,
			   m->rows, m->r.hdr.len);
	for (uint32_t h = 0; h < m->heads && !c->rc; h++)
		sum += wire_recall_counts(m)[h];
	if (sum != m->rows)
		check_fail(c, KVT_E_PROTO, "rows: %u, the counts sum up to %llu", m->rows,
			   (unsigned long long)sum);
	for (uint32_t i = 0; i < m->rows && !c->rc; i++)
		check_range(c, "position", wire_recall_positions(m)[i], 0, WIRE_MAX_ROWS - 1);
}

void check_reply(struct check *c, const struct wire_reply *r)
{
	const void *m = r;

	switch (r->hdr.type & ~W_REPLY) {
	case W_HELLO:
		return check_hello_reply(c, m);
	case W_MODEL: {
		const struct wire_model_reply *v = m;

		check_not_zero(c, "model", v->model);
		check_range(c, "lanes", v->lanes, 1, CTL_MAX_LANES);
		return check_reserved(c, "pad", v->pad);
	}
	case W_REGION: {
		const struct wire_region_reply *v = m;

		check_not_zero(c, "region", v->region);
		check_range(c, "bytes", v->bytes, KVT_UNIT, WIRE_MAX_REGION);
		if (v->bytes % KVT_UNIT)
			check_fail(c, KVT_E_INVAL, "bytes: %llu, must be a multiple of %u",
				   (unsigned long long)v->bytes, KVT_UNIT);
		return;
	}
	case W_REGION_IMPORT: {
		const struct wire_region_reply *v = m;

		check_not_zero(c, "region", v->region);
		return check_range(c, "bytes", v->bytes, 1, WIRE_MAX_REGION);
	}
	case W_SEQ_OPEN:
		return check_seq_open_reply(c, m);
	case W_SEQ_TRUNCATE:
		return check_range(c, "rows", ((const struct wire_seq_truncate_reply *)m)->rows, 0,
				   WIRE_MAX_ROWS);
	case W_SEQ_INFO: {
		const struct wire_seq_info_reply *v = m;

		check_range(c, "rows", v->rows, 0, WIRE_MAX_ROWS);
		check_range(c, "lanes", v->lanes, 1, CTL_MAX_LANES);
		return check_text(c, "policy", v->policy, sizeof(v->policy));
	}
	case W_RECALL:
		return check_recall_reply(c, m);
	case W_SCORER: {
		const struct wire_scorer_reply *v = m;

		check_not_zero(c, "id", v->id);
		check_range(c, "bytes", v->bytes, sizeof(struct scorer_hdr), WIRE_MAX_REGION);
		check_range(c, "coefs", v->coefs, 1, SCORER_MAX_COEFS);
		check_reserved(c, "pad", v->pad);
		return check_text(c, "policy", v->policy, sizeof(v->policy));
	}
	case W_DIRECT:
		return check_range(c, "bytes", ((const struct wire_direct_reply *)m)->bytes,
				   sizeof(struct direct_hdr), WIRE_MAX_REGION);
	case W_SEGMENT:
		return check_range(c, "bytes", ((const struct wire_segment_reply *)m)->bytes, KVT_UNIT,
				   WIRE_MAX_REGION);
	case W_ADMIN:
		return check_range(c, "json_bytes", ((const struct wire_admin_reply *)m)->json_bytes, 0,
				   WIRE_MAX_JSON);
	}
}
