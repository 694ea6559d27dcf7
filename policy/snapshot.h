/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The snapshot file: little-endian, one header, then tables without gaps but
 * each padded with zeros to 8 bytes. Internal to policy/, and to tests.
 *
 *   u32 budget[3][lanes]                  device, dram, nvme
 *   u64 on_device, on_dram, on_nvme       each [lanes][words]
 *   u64 pinned, wanted                    each [words], when the flag says so
 *   u16 scores[lanes][watermark, padded to a multiple of 4]
 *
 * words = BITS_WORDS(watermark); bits at or past the watermark are zero.
 */
#include <stddef.h>
#include <stdint.h>

#define SNAPSHOT_MAGIC UINT64_C(0x31504e5354564b) /* "KVTSNP1" */
#define SNAPSHOT_VERSION 1u

enum { SNAPSHOT_PINNED = 1, SNAPSHOT_WANTED = 2, SNAPSHOT_WRITE_THROUGH = 4 };

struct snapshot_hdr {
	uint64_t magic;
	uint32_t version;
	uint32_t crc; /* CRC32C of all `bytes`, this field taken as zero */
	uint64_t bytes;
	uint32_t lanes, watermark, protect_first, protect_last;
	uint32_t granularity, block_rows, equal_lanes, hysteresis_permille;
	uint32_t flags;
	uint32_t reserved; /* zero */
};
_Static_assert(sizeof(struct snapshot_hdr) == 64, "one cache line, no padding");
_Static_assert(offsetof(struct snapshot_hdr, lanes) == 24, "layout");
