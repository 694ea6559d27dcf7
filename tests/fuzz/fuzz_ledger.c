/* SPDX-License-Identifier: MIT */
/*
 * The ledger's file as an earlier life might have left it: an input is the file itself (byte 0 bit 0 clear), or
 * changes to words of one that was written by the ledger; bit 1 makes checksums right. It is refused, or every
 * entry found is within its limits and has a place of its own, and what is put beside them is there in the next
 * life, with the same bytes, and nothing else is.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
/* Entries and heads are forged here, so their layout is needed. */
#include "daemon/ledger.c"

#define ENTRIES 12u
#define NEW 4u
#define MOST 64u /* slots of a file */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char dir[64], path[96];
static uint8_t good[(ENTRIES + 1) * SLOT];

static void must(int ok, const char *what)
{
	if (!ok) {
		fprintf(stderr, "must hold: %s\n", what);
		abort();
	}
}

static struct ledger_entry entry_of(uint32_t i)
{
	struct ledger_entry e = {
		.n = i * 5 % (LEDGER_MARKS + 1), .tenant = 9 + i % 2, .floor = i, .born = i + 1, .lanes = 4};

	memcpy(e.key, &i, sizeof(i));
	for (uint32_t k = 0; k < e.n; k++)
		e.mark[k] = (struct epoch_mark){k + 1, k * 10};
	return e;
}

static void end(void)
{
	unlink(path);
	rmdir(dir);
}

static void prepare(void)
{
	struct ledger *l;
	int fd;

	snprintf(dir, sizeof(dir), "%s/kvt-fuzz-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
	must(mkdtemp(dir) != NULL, "a directory");
	snprintf(path, sizeof(path), "%s/" LEDGER_NAME, dir);
	atexit(end);
	must(!ledger_open(&l, dir) && !ledger_settle(l), "a ledger");
	for (uint32_t i = 0; i < ENTRIES; i++) {
		struct ledger_entry e = entry_of(i);

		must(!ledger_put(l, ledger_new(l), &e), "an entry");
	}
	ledger_close(l);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	must(fd >= 0 && read(fd, good, sizeof(good)) == (ssize_t)sizeof(good), "its file");
	close(fd);
}

static void store(const uint8_t *buf, size_t n)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	must(fd >= 0 && write(fd, buf, n) == (ssize_t)n, "a file to write");
	close(fd);
}

/* Bytes of the file that the input stands for. */
static size_t make(const uint8_t *data, size_t size, uint8_t buf[MOST * SLOT])
{
	size_t n = MIN(size - 1, (size_t)MOST * SLOT), at;
	uint32_t value;

	if (data[0] & 1) {
		n = sizeof(good);
		memcpy(buf, good, n);
		for (size_t i = 1; i + 7 <= size; i += 7) {
			at = data[i] % (ENTRIES + 1) * SLOT + (data[i + 1] | (data[i + 2] & 1u) << 8);
			memcpy(&value, data + i + 3, 4);
			memcpy(buf + MIN(at, n - 4), &value, 1u << data[i + 2] / 2 % 3);
		}
		if (data[0] & 4)
			n -= data[0] / 8 * 17;
	} else {
		memcpy(buf, data + 1, n);
	}
	for (uint32_t i = 0; (data[0] & 2) && (i + 1) * SLOT <= n; i++) {
		value = sum_of(buf + i * SLOT, i ? i - 1 : LEDGER_NONE);
		memcpy(buf + i * SLOT, &value, sizeof(value));
	}
	return n;
}

/* Every second one is taken. Returns how many were found; keep: those taken. */
static uint32_t look(struct ledger *l, struct ledger_entry *keep, uint32_t *ret_kept)
{
	uint32_t cursor = 0, place, other, found = 0, kept = 0;
	const struct ledger_entry *e, *named;

	while ((e = ledger_next(l, &cursor, &place))) {
		must(e->n <= LEDGER_MARKS && place < l->places && !bits_test(l->used, place),
		     "limits of an entry");
		named = ledger_find(l, e->tenant, e->key, &other);
		must(named && !memcmp(named->key, e->key, sizeof(e->key)) && named->tenant == e->tenant,
		     "what is there is found by its name");
		if (found++ % 2)
			continue;
		ledger_take(l, place);
		keep[kept++] = *e;
	}
	*ret_kept = kept;
	return found;
}

static bool same(const struct ledger_entry *a, const struct ledger_entry *b)
{
	return !memcmp((const char *)a + 4, (const char *)b + 4, sizeof(*a) - 4);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct ledger_entry keep[MOST + NEW];
	static uint8_t buf[MOST * SLOT];
	uint32_t kept, n = 0, cursor = 0, place;
	const struct ledger_entry *e;
	struct ledger *l;

	if (!*dir)
		prepare();
	if (!size)
		return 0;
	store(buf, make(data, size, buf));
	must(!ledger_open(&l, dir), "a file that is none is made anew");
	(void)ledger_complete(l);
	(void)look(l, keep, &kept);
	must(!ledger_settle(l) && ledger_complete(l), "the restart ends");
	for (uint32_t i = 0; i < NEW; i++) {
		keep[kept] = entry_of(100 + i);
		place = ledger_new(l);
		must(place != LEDGER_NONE && !ledger_put(l, place, &keep[kept++]), "a new entry");
	}
	ledger_close(l);
	must(!ledger_open(&l, dir) && ledger_complete(l), "the next life");
	while ((e = ledger_next(l, &cursor, &place))) {
		uint32_t i = 0;

		while (i < kept && !same(e, &keep[i]))
			i++;
		must(i < kept, "nothing else is there");
		n++;
	}
	must(n == kept, "all that was kept is there");
	ledger_close(l);
	return 0;
}
