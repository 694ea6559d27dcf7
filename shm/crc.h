/* SPDX-License-Identifier: MIT */
#pragma once
/* CRC32C (Castagnoli), by libisal. Standard pre- and post-inversion: crc32c(0, "123456789", 9) = 0xe3069283. */
#include <stddef.h>
#include <stdint.h>

/* Continue a checksum; start with crc = 0. Chains: crc32c(crc32c(0, a), b) = crc32c(0, ab). */
uint32_t crc32c(uint32_t crc, const void *buf, size_t len);
/*
 * Copy n rows of `width` bytes from src (stride bytes apart, or the rows named by
 * idx[] when idx is not NULL) to dst (packed) and continue the checksum over the
 * packed bytes, chunk by chunk while they are in cache. One pass.
 */
uint32_t crc32c_gather(uint32_t crc, void *dst, const void *src, size_t stride, size_t width,
		       const uint32_t *idx, uint32_t n);
