/* SPDX-License-Identifier: MIT */
#include "tiers/tier.h"
#include "shm/crc.h"

/* The identity goes in front of the payload in one chain: crc(page) = crc32c(id || K plane || V plane). */
uint32_t page_crc_seed(const struct page_ident *id)
{
	return crc32c(0, id, sizeof(*id));
}
