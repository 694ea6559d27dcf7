/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The decision: from one snapshot of a sequence to where every row goes.
 * Pure and deterministic: the same snapshot gives the same bytes, on any CPU.
 *
 * Scores are 16-bit sortable keys (score_key()): unsigned, higher is kept, 0 is
 * reserved for "dropped". Ties go to the later position.
 *
 * Per lane, over rows [0, watermark) that are not dropped (a row is alive while any tier holds it):
 *   1. Rank: first `protect_first` rows, last `protect_last`, pinned, wanted, then
 *      the rest; inside each of these by key. Protection is inside the budget.
 *   2. Device: the best `keep` rows, keep = min(budget, alive rows). Hysteresis: with
 *      h = keep * permille / 1000, rows ranked h or more inside are in, rows h or more
 *      outside are out, and the seats left go to rows between that are on the device
 *      now, best first, then to the others, best first. (Protected rows yield to none.)
 *   3. Waterfall: of the others the best dram + nvme survive, what fits nowhere is
 *      dropped. dram takes the best of those not only in nvme; rows that only nvme
 *      holds stay there, and the best of them rise only when nvme would overflow.
 *   4. With write_through, rows that are on the device, stay there and have no copy below get one: the
 *      best where dram has room, the next where nvme has, room being the budget less the rows whose
 *      best copy the tier holds then and less the copies there of rows that stay on the device.
 * A tier's population is the rows whose best copy it holds. Budgets are rows per lane.
 * With equal_lanes every lane keeps min over lanes of what each could keep.
 *
 * Granularity TOKEN ranks the mean normalised rank over all lanes and gives every
 * lane the same set; BLOCK does so for runs of block_rows positions. Budgets are then
 * the least over the lanes (for BLOCK in whole blocks, the partial last one, which
 * counts as recent, taking a whole one); a token or block that is not alive in every
 * lane cannot be used and is dropped; it is on the device when it is there in every
 * lane, and only in nvme when it is so in any.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DECIDE_TIERS 3 /* device, dram, nvme */

enum decide_gran { DECIDE_HEAD = 0, DECIDE_TOKEN = 1, DECIDE_BLOCK = 2 };

struct decide_in {
	uint32_t lanes, watermark; /* rows the decision speaks of */
	uint32_t words;            /* stride of the bitmaps, in 64-bit words per lane */
	uint32_t score_stride;     /* stride of scores, in rows per lane */
	uint32_t protect_first, protect_last;
	uint32_t granularity, block_rows;
	uint32_t equal_lanes;
	uint32_t write_through;
	uint32_t hysteresis_permille;                  /* of the device budget */
	const uint16_t *scores;                        /* [lanes][score_stride] */
	const uint64_t *on_device, *on_dram, *on_nvme; /* [lanes][words] residency now (inclusive) */
	const uint64_t *pinned;                        /* [words], every lane; may be NULL */
	const uint64_t *wanted;                        /* [words], every lane; may be NULL */
	const uint32_t *budget[DECIDE_TIERS];          /* [lanes] rows; UINT32_MAX = all */
};

/* Caller's memory: bitmaps [lanes][words] with words = BITS_WORDS(watermark) packed; counts [lanes]. */
struct decide_out {
	uint32_t words;
	uint64_t *resident;                  /* device tier after the plan */
	uint64_t *copy_out;                  /* have no copy below and get one: bytes must be saved */
	uint64_t *bring_in;                  /* come up to the device */
	uint64_t *to_dram;                   /* best tier after the plan is dram; or a copy written through */
	uint64_t *to_nvme;                   /* best tier after the plan is nvme */
	uint64_t *drop;                      /* alive now, gone after */
	uint32_t *kept, *out, *in, *dropped; /* per lane */
};

/* 0, -EINVAL (a field is impossible), -ENOMEM. Any thread. */
int policy_decide(const struct decide_in *in, struct decide_out *out);

/* Sortable 16-bit key of a finite score (half precision, order-preserving, saturating; never 0). */
uint16_t score_key(float score);
void score_keys(const float *scores, uint16_t *keys,
		size_t n); /* vectorised; non-finite becomes the lowest key */

/* Back to the scores, as halves keep them; NaN for keys that no finite score has. Vectorised. */
void key_scores(const uint16_t *keys, float *scores, size_t n);

/* Snapshots: a flat byte string (magic, version, lengths, CRC32C) that replays to the same plan. */
size_t snapshot_bytes(const struct decide_in *in);
int snapshot_write(const struct decide_in *in, void *buf, size_t bytes);
/* Points *ret into buf (8-byte aligned). -EBADMSG with *err_off the offset of what is wrong. */
struct snapshot {
	struct decide_in in;
};
int snapshot_read(struct snapshot *ret, const void *buf, size_t bytes, size_t *err_off);
