/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What the host hands to the kernels. Plain fixed-width structs, the same for gcc, g++ and nvcc; every pointer
 * is a device address as uint64_t. Kernels take exactly one of these by value.
 */
#include <stdint.h>

/* One lane's rows; lanes are numbered layer by layer. Addresses of slot 0, strides between slots. */
struct cuda_lane {
	uint64_t k, v;
	uint32_t k_row, v_row;
	uint32_t k_bytes, v_bytes; /* multiples of 16; v may be 0 */
};

/*
 * Maps of one sequence, in GPU memory: slot_of[lane * map_rows + position] is the row's slot,
 * pos_of[lane * map_slots + slot] the slot's position. Valid for rows that were pushed and are resident.
 */
struct cuda_maps {
	uint64_t slot_of, pos_of; /* uint32_t */
	uint32_t map_rows, map_slots;
};

/* kvt_extend: rows [pos, pos + n) of every lane take slots count[lane].. in order. */
struct extend_args {
	struct cuda_maps maps;
	uint64_t count; /* uint32_t [lanes]: the slot of row pos in each lane */
	uint32_t lanes, pos, n, pad;
};

/* kvt_gather: pages [first, first + n) of a plan to the out ring, one header and checksum each. */
struct gather_args {
	struct cuda_maps maps;
	uint64_t lane;              /* struct cuda_lane [lanes] */
	uint64_t copy_out, to_dram; /* [lanes][words], in GPU memory */
	uint64_t page;              /* struct plan_page, in GPU memory */
	uint64_t plan;              /* id, for the headers */
	uint64_t out;               /* the out ring */
	uint64_t crc;               /* tables of crc.cuh, in GPU memory */
	uint32_t words, first, n, pad;
};

/* One page that comes in, as kvt_scatter wants it. In GPU memory or in memory that the GPU can read. */
struct scatter_page {
	uint64_t k, v; /* the planes: packed rows */
	uint32_t lane, first;
	uint16_t span;
	uint8_t rows, wanted;
	uint32_t crc; /* of both planes */
	uint64_t pos[32], mask[32];
};

/* kvt_scatter: wanted rows of n pages to the lanes' stage slots: cap + rank in bring_in. */
struct scatter_args {
	uint64_t lane;
	uint64_t page;     /* struct scatter_page [n] */
	uint64_t bring_in; /* [lanes][words], in GPU memory */
	uint64_t bad;      /* uint32_t: counts pages whose checksum does not match; 0: do not check. A page is
			      checked if 7/8 of it is wanted: then it is read whole, else its wanted rows alone */
	uint64_t crc;
	uint32_t words, cap, n, pad;
};

/*
 * kvt_compact: after a plan. Lane l has count[l] rows in slots [0, count) (rows past the watermark included)
 * and in[l] staged rows in [cap, cap + in). Survivors (positions in resident and not in bring_in, or at or past
 * the watermark) and staged rows fill slots [0, after[l]); maps follow. In place: rows in slots below after[l]
 * that survive do not move. to != 0: all rows go, ascending by position, to the lanes of `to`.
 */
#define COMPACT_SLICE 8192u /* slots that one block looks at */
struct compact_args {
	struct cuda_maps maps;
	uint64_t lane, to;           /* struct cuda_lane [lanes]; to: 0 or the other memory */
	uint64_t resident, bring_in; /* [lanes][words] */
	uint64_t count, in, after;   /* uint32_t [lanes] */
	uint64_t scratch; /* compact_scratch() bytes, zeroed by whoever makes them, then left alone */
	uint32_t lanes, words, watermark, rows, cap;
	uint32_t keep_words; /* set by kern_compact() */
};

/* kvt_word: *addr = value when everything before it on the stream is done and visible to the host. */
struct word_args {
	uint64_t addr, value;
};

/* kvt_score: rows [pos, pos + n) of lanes [lane, lane + lanes). */
struct score_args {
	uint64_t scorer;  /* struct scorer_hdr, in GPU memory */
	uint64_t rows;    /* struct cuda_lane [lanes]: of lane `lane` first */
	uint64_t slot_of; /* uint32_t, as in cuda_maps, of lane `lane` first; 0: row i is in slot i */
	uint64_t out;     /* float32: coefficient c of lane l (from lane 0 of this call), position p:
			     out[l * out_lane + c * out_coef + p] */
	uint64_t out_lane, out_coef;                                  /* floats */
	uint32_t map_rows, lane, lanes, pos, n, dtype, out_pos0, pad; /* out_pos0: subtracted from p */
};
