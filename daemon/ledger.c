/* SPDX-License-Identifier: MIT */
#include "daemon/ledger.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "shm/bits.h"
#include "shm/crc.h"
#include "shm/util.h"

#define MAGIC UINT64_C(0x52454744454c564b) /* "KVLEDGER" */
#define VERSION 2u
#define SLOT sizeof(struct ledger_entry)
#define GROW 1024u /* entries */

/* The first 512 bytes. */
struct head {
	uint32_t crc, version;
	uint64_t magic;
	char boot[40]; /* of the kernel under which the entries were last known to be complete */
	char pad[456];
};
_Static_assert(sizeof(struct head) == 512, "as an entry");

struct found {
	struct ledger_entry e;
	uint32_t place;
};

struct ledger {
	int fd;
	bool complete;
	uint64_t *used; /* [places / 64] */
	uint32_t places, next;
	struct found *found; /* sorted; during the restart only */
	uint32_t n_found;
};

static uint32_t sum_of(const void *slot, uint32_t place)
{
	return crc32c(crc32c(0, &place, sizeof(place)), (const char *)slot + 4, SLOT - 4);
}

static int put(struct ledger *l, const void *slot, uint32_t place)
{
	ssize_t n;

	do
		n = pwrite(l->fd, slot, SLOT, (off_t)(place + 1) * (off_t)SLOT);
	while (n < 0 && errno == EINTR);
	return n == (ssize_t)SLOT ? 0 : n < 0 ? -errno : -ENOSPC;
}

static void read_boot(char ret[40])
{
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);

	memset(ret, 0, 40);
	if (fd >= 0 && read(fd, ret, 36) != 36)
		memset(ret, 0, 40); /* unknown: never the same as anything */
	if (fd >= 0)
		close(fd);
}

static int put_head(struct ledger *l)
{
	struct head h = {.version = VERSION, .magic = MAGIC};

	read_boot(h.boot);
	h.crc = sum_of(&h, LEDGER_NONE);
	return put(l, &h, LEDGER_NONE);
}

static int grow(struct ledger *l, uint32_t places)
{
	uint64_t *used = realloc(l->used, places / 8);

	if (!used)
		return -ENOMEM;
	memset((char *)used + l->places / 8, 0, (places - l->places) / 8);
	l->used = used;
	l->places = places;
	return 0;
}

static int by_name(const void *a, const void *b)
{
	const struct found *x = a, *y = b;
	int r = memcmp(&x->e.tenant, &y->e.tenant, sizeof(x->e.tenant));

	return r ? r : memcmp(x->e.key, y->e.key, sizeof(x->e.key));
}

/* The entries of an earlier life. */
static int load(struct ledger *l, uint64_t bytes)
{
	uint32_t n = (uint32_t)MIN(bytes / SLOT - 1, (uint64_t)LEDGER_NONE / 2);
	int r = grow(l, (uint32_t)ALIGN_UP(MAX(n, 1u), GROW));

	l->found = r ? NULL : malloc(MAX(n, 1u) * sizeof(*l->found));
	if (!l->found)
		return -ENOMEM;
	for (uint32_t i = 0; i < n; i++) {
		struct found *f = &l->found[l->n_found];

		if (pread(l->fd, &f->e, SLOT, (off_t)(i + 1) * (off_t)SLOT) != (ssize_t)SLOT)
			return -EIO;
		f->place = i;
		if (f->e.crc == sum_of(&f->e, i) && f->e.n <= LEDGER_MARKS)
			l->n_found++;
	}
	qsort(l->found, l->n_found, sizeof(*l->found), by_name);
	return 0;
}

int ledger_open(struct ledger **ret, const char *dir)
{
	struct ledger *l = calloc(1, sizeof(*l));
	_cleanup_close_ int dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	char boot[40];
	struct stat sb;
	struct head h;
	int r = 0;

	if (!l || dir_fd < 0) {
		r = l ? -errno : -ENOMEM;
		free(l);
		return r;
	}
	l->fd = openat(dir_fd, LEDGER_NAME, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (l->fd < 0 || fstat(l->fd, &sb) < 0)
		r = -errno;
	else if (!S_ISREG(sb.st_mode))
		r = -EINVAL;
	if (!r && pread(l->fd, &h, sizeof(h), 0) == (ssize_t)sizeof(h) && h.magic == MAGIC &&
	    h.version == VERSION && h.crc == sum_of(&h, LEDGER_NONE)) {
		read_boot(boot);
		l->complete = boot[0] && !memcmp(boot, h.boot, sizeof(boot));
		r = load(l, (uint64_t)sb.st_size);
	} else if (!r) {
		r = ftruncate(l->fd, 0) < 0 ? -errno : grow(l, GROW);
	}
	if (r < 0) {
		ledger_close(l);
		return r;
	}
	*ret = l;
	return 0;
}

bool ledger_exists(const char *dir)
{
	char path[512];
	int n = snprintf(path, sizeof(path), "%s/" LEDGER_NAME, dir);

	return *dir && n > 0 && n < (int)sizeof(path) && !access(path, F_OK);
}

void ledger_close(struct ledger *l)
{
	if (!l)
		return;
	close_fdp(&l->fd);
	free(l->found);
	free(l->used);
	free(l);
}

bool ledger_complete(const struct ledger *l)
{
	return l->complete;
}

const struct ledger_entry *ledger_find(struct ledger *l, uint64_t tenant, const uint8_t key[16],
				       uint32_t *ret_place)
{
	struct found want = {.e.tenant = tenant}, *f;

	memcpy(want.e.key, key, sizeof(want.e.key));
	f = l->n_found ? bsearch(&want, l->found, l->n_found, sizeof(want), by_name) : NULL;
	if (f)
		*ret_place = f->place;
	return f ? &f->e : NULL;
}

const struct ledger_entry *ledger_next(struct ledger *l, uint32_t *cursor, uint32_t *ret_place)
{
	while (*cursor < l->n_found) {
		const struct found *f = &l->found[(*cursor)++];

		if (bits_test(l->used, f->place))
			continue;
		*ret_place = f->place;
		return &f->e;
	}
	return NULL;
}

int ledger_settle(struct ledger *l)
{
	int r = 0;

	for (uint32_t i = 0; i < l->n_found && !r; i++)
		if (!bits_test(l->used, l->found[i].place))
			r = ledger_end(l, l->found[i].place);
	free(l->found);
	l->found = NULL;
	l->n_found = 0;
	if (!r)
		r = put_head(l);
	l->complete = !r;
	return r;
}

uint32_t ledger_new(struct ledger *l)
{
	for (uint32_t i = 0; i < l->places; i++) {
		uint32_t place = l->next++ % l->places;

		if (!bits_test(l->used, place)) {
			bits_set(l->used, place);
			return place;
		}
	}
	l->next = l->places;
	if (grow(l, l->places + GROW) < 0)
		return LEDGER_NONE;
	bits_set(l->used, l->next);
	return l->next++;
}

void ledger_take(struct ledger *l, uint32_t place)
{
	bits_set(l->used, place);
}

int ledger_put(struct ledger *l, uint32_t place, struct ledger_entry *e)
{
	e->crc = sum_of(e, place);
	return put(l, e, place);
}

int ledger_end(struct ledger *l, uint32_t place)
{
	static const struct ledger_entry none;

	bits_clear(l->used, place);
	return put(l, &none, place);
}

void ledger_sync(struct ledger *l)
{
	if (l)
		(void)fdatasync(l->fd);
}
