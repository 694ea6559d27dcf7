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
/*
 * What a checksum becomes when `len` zero bytes follow, without the inversions: x^(8 len) * crc modulo P. A
 * checksum is linear in its initial value, so crc32c(a, buf, len) = crc32c(b, buf, len) ^ crc32c_shift(a ^ b,
 * len).
 */
uint32_t crc32c_shift(uint32_t crc, uint64_t len);
/*
 * The plain checksum of what has the checksum `crc` when it was begun with `seed`: initial value 0, no
 * inversions. That is what GPU kernels compute (shm/window.h).
 */
uint32_t crc32c_plain(uint32_t seed, uint32_t crc, uint64_t len);
/* The way back: crc32c(seed, data, len) from the plain checksum of data. */
uint32_t crc32c_seeded(uint32_t seed, uint32_t plain, uint64_t len);
