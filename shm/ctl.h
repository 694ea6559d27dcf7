/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A client's control segment (exchange class): two rings and one slot per
 * sequence. State lives in the slots, hints in the rings: losing a ring entry
 * is harmless because the next one, or the poll at 100 ms, finds the state.
 *
 *   0                     ring submit (client produces, daemon consumes)
 *   ctl_cq_off            ring complete (daemon produces, client consumes)
 *   ctl_slots_off         struct seq_slot[max_seqs]
 */
#include <stdatomic.h>
#include <stdint.h>
#include "shm/ring.h"
#include "shm/util.h"

#define CTL_MAX_LANES 1024u /* layers x KV heads of one model */

/* Entry types. handle is the sequence handle of the daemon. */
enum q_type {
	Q_NONE = 0,
	/* client to daemon */
	Q_DIRTY = 1, /* slot.len or slot.acked changed */
	/* daemon to client */
	Q_PLAN = 64, /* arg[0] plan id, arg[1] enum plan_state */
	Q_GONE = 65, /* the sequence ended: arg[0] is a positive KVT_E_* reason */
	/* published DRAM is wanted back: let go of segments that no directory names any more. No handle. */
	Q_REVOKE = 66,
};

/* Client-writable; the daemon copies each word once and validates it. */
struct seq_slot {
	_Atomic uint64_t len;              /* epoch << 32 | rows complete in every layer */
	_Atomic uint64_t acked;            /* id of the newest plan the client has finished with */
	uint64_t nack[CTL_MAX_LANES / 64]; /* lanes on which plan `acked` was refused; written before acked */
	/* Sequences with a window (shm/window.h), window_cursor(plan id, count): */
	_Atomic uint64_t gathered; /* out pages that are in the ring, checksums too */
	_Atomic uint64_t drained;  /* in records whose bytes the client no longer needs */
	uint64_t pad[4];
};
_Static_assert(sizeof(struct seq_slot) == 192, "slots are whole cache lines");

static inline uint64_t seq_len_pack(uint32_t epoch, uint32_t rows)
{
	return (uint64_t)epoch << 32 | rows;
}
static inline size_t ctl_cq_off(uint32_t entries)
{
	return ring_bytes(entries);
}
static inline size_t ctl_slots_off(uint32_t entries)
{
	return 2 * ring_bytes(entries);
}
static inline size_t ctl_bytes(uint32_t entries, uint32_t max_seqs)
{
	return ALIGN_UP(ctl_slots_off(entries) + (size_t)max_seqs * sizeof(struct seq_slot), KVT_UNIT);
}
