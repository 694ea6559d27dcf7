/* SPDX-License-Identifier: MIT */
#pragma once
/* A keeper of descriptors for tests: what systemd's fd store does, in this process. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "shm/util.h"
#include "tiers/tier.h"

#define MAX_KEPT 64

struct keeper {
	struct tier_keep keep;
	struct {
		char name[TIER_KEEP_NAME];
		int fd;
	} held[MAX_KEPT];
	unsigned n, dropped, refused;
	bool full;
	char why[128];
	struct tier_kept passed[MAX_KEPT];
};

static inline int keeper_store(void *arg, const char *name, int fd)
{
	struct keeper *k = arg;

	if (k->full || k->n == MAX_KEPT)
		return -ENOSPC;
	strcpy(k->held[k->n].name, name);
	k->held[k->n++].fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	return 0;
}

static inline void keeper_drop(void *arg, const char *name)
{
	struct keeper *k = arg;

	k->dropped++;
	for (unsigned i = 0; i < k->n; i++)
		if (!strcmp(k->held[i].name, name)) {
			close(k->held[i].fd);
			k->held[i--] = k->held[--k->n];
		}
}

static inline void keeper_refused(void *arg, const char *name, const char *why)
{
	struct keeper *k = arg;

	k->refused++;
	snprintf(k->why, sizeof(k->why), "%s", why);
	keeper_drop(k, name);
}

/* For the next life: its interface, with duplicates of all that is held. */
static inline const struct tier_keep *keeper_pass(struct keeper *k)
{
	k->keep = (struct tier_keep){.arg = k,
				     .store = keeper_store,
				     .drop = keeper_drop,
				     .refused = keeper_refused,
				     .kept = k->passed,
				     .n = k->n};
	for (unsigned i = 0; i < k->n; i++) {
		strcpy(k->passed[i].name, k->held[i].name);
		k->passed[i].fd = fcntl(k->held[i].fd, F_DUPFD_CLOEXEC, 0);
	}
	return &k->keep;
}

static inline void keeper_close(struct keeper *k)
{
	for (unsigned i = 0; i < k->n; i++)
		close(k->held[i].fd);
	k->n = 0;
}

/* A memfd like the one held, `more` bytes longer, under this name, with these seals and this mode. */
static inline int keeper_forge(const struct keeper *k, unsigned i, const char *name, off_t more, int seals,
			       mode_t mode)
{
	int fd = memfd_create(name, MFD_ALLOW_SEALING | MFD_CLOEXEC);
	struct stat st;
	void *a, *b;

	if (fd < 0 || fstat(k->held[i].fd, &st) < 0 || fchmod(fd, mode) < 0 ||
	    ftruncate(fd, st.st_size + more) < 0)
		return -1;
	a = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, k->held[i].fd, 0);
	b = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	memcpy(b, a, (size_t)(st.st_size + MIN(more, 0)));
	munmap(a, (size_t)st.st_size);
	munmap(b, (size_t)st.st_size);
	return seals && fcntl(fd, F_ADD_SEALS, seals) < 0 ? -1 : fd;
}
#define KEEPER_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* The memory of `from` as it is now, held by ret: what a process killed this moment would leave. */
static inline void keeper_snapshot(struct keeper *ret, const struct keeper *from)
{
	memset(ret, 0, sizeof(*ret));
	for (unsigned i = 0; i < from->n; i++) {
		strcpy(ret->held[i].name, from->held[i].name);
		ret->held[ret->n++].fd = keeper_forge(from, i, "kvtier-dram", 0, KEEPER_SEALS, 0600);
	}
}
