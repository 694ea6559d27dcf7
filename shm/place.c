/* SPDX-License-Identifier: MIT */
#include "shm/place.h"

#include <errno.h>
#include <linux/mempolicy.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WORD_BITS (8 * sizeof(unsigned long))

struct mask {
	unsigned long word[PLACE_NODES / WORD_BITS];
};

static int wish(void *addr, size_t bytes, int mode, const struct mask *m)
{
	/* The kernel takes one bit less than it is told of. */
	return syscall(SYS_mbind, addr, bytes, mode, m->word, PLACE_NODES + 1UL, 0) < 0 ? -errno : 0;
}

static int mask_add(struct mask *m, int node)
{
	if (node < 0 || (unsigned)node >= PLACE_NODES)
		return -EINVAL;
	m->word[(unsigned)node / WORD_BITS] |= 1UL << ((unsigned)node % WORD_BITS);
	return 0;
}

int place_near(void *addr, size_t bytes, int node)
{
	struct mask m = {0};
	int r = mask_add(&m, node);

	return r < 0 ? r : wish(addr, bytes, MPOL_PREFERRED, &m);
}

int place_spread(void *addr, size_t bytes, const int *node, unsigned n)
{
	struct mask m = {0};
	int r = n ? 0 : -EINVAL;

	for (unsigned i = 0; i < n && !r; i++)
		r = mask_add(&m, node[i]);
	return r < 0 ? r : wish(addr, bytes, MPOL_INTERLEAVE, &m);
}

int place_wish(const void *addr)
{
	struct mask m = {0};
	int mode;

	if (syscall(SYS_get_mempolicy, &mode, m.word, PLACE_NODES + 1UL, addr, MPOL_F_ADDR) < 0 ||
	    (mode & ~MPOL_MODE_FLAGS) != MPOL_PREFERRED)
		return -1;
	for (unsigned i = 0; i < PLACE_NODES; i++)
		if (m.word[i / WORD_BITS] >> (i % WORD_BITS) & 1)
			return (int)i;
	return -1;
}
