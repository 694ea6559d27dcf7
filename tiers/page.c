/* SPDX-License-Identifier: MIT */
#include "tiers/tier.h"
#include "shm/crc.h"
#include "shm/trial.h"

/* The identity goes in front of the payload in one chain: crc(page) = crc32c(id || K plane || V plane). */
uint32_t page_crc_seed(const struct page_ident *id)
{
	if (planted("crc-not-seeded"))
		return 0;
	return crc32c(0, id, sizeof(*id));
}
