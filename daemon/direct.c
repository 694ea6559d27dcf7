/* SPDX-License-Identifier: MIT */
#include "daemon/direct.h"
#include "shm/crc.h"

bool direct_where(const struct page *p, uint32_t *segment, uint64_t *off)
{
	tier_addr at = p->addr[KVT_TIER_DRAM - 1];

	if (!tier_published(at))
		return false;
	*segment = tier_segment(at);
	*off = tier_offset(at);
	return true;
}

uint32_t direct_crc(const struct page *p)
{
	struct page_ident id;

	page_ident(p, &id);
	return crc32c_plain(page_crc_seed(&id), p->crc, p->bytes);
}
