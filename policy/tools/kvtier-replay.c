/* SPDX-License-Identifier: MIT */
/* kvtier-replay: decide a stored snapshot again and say what came out. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include "policy/decide.h"
#include "shm/bits.h"
#include "shm/crc.h"
#include "shm/util.h"

static const char usage[] =
	"Usage: kvtier-replay [--lanes] SNAPSHOT\n"
	"\n"
	"Decides the snapshot in the file again and prints a summary of the plan and\n"
	"a checksum over all of its bytes: equal checksums mean equal plans.\n"
	"\n"
	"  --lanes  one line for each lane as well\n"
	"  --help   this text\n"
	"\n"
	"Exit status: 0 done, 1 the file cannot be read or is no snapshot, 2 wrong usage.\n";

static int complain(const char *path, const char *what)
{
	fprintf(stderr, "kvtier-replay: %s: %s\n", path, what);
	return -1;
}

/* The whole file, in memory of its own. */
static int slurp(const char *path, void **ret, size_t *ret_bytes)
{
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);
	_cleanup_free_ char *buf = NULL;
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0)
		return complain(path, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return complain(path, "not a regular file");
	buf = malloc((size_t)st.st_size + 1);
	if (!buf)
		return complain(path, "out of memory");
	for (off_t at = 0; at < st.st_size;) {
		ssize_t n = pread(fd, buf + at, (size_t)(st.st_size - at), at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return complain(path, n ? strerror(errno) : "shrank while it was read");
		at += n;
	}
	*ret = TAKE_PTR(buf);
	*ret_bytes = (size_t)st.st_size;
	return 0;
}

/* Bitmaps, then counts, in one piece: what the checksum is over. */
struct plan {
	struct decide_out out;
	void *memory;
	size_t bytes;
};

static int decide(struct plan *p, const struct decide_in *in)
{
	size_t words = BITS_WORDS(in->watermark), map = in->lanes * words;
	uint64_t **maps[] = {&p->out.resident, &p->out.copy_out, &p->out.bring_in,
			     &p->out.to_dram,  &p->out.to_nvme,  &p->out.drop};
	uint32_t **counts[] = {&p->out.kept, &p->out.out, &p->out.in, &p->out.dropped};
	uint32_t *tail;

	p->bytes =
		ARRAY_SIZE(maps) * map * sizeof(uint64_t) + ARRAY_SIZE(counts) * in->lanes * sizeof(uint32_t);
	p->memory = calloc(1, p->bytes);
	if (!p->memory)
		return -ENOMEM;
	p->out.words = (uint32_t)words;
	for (size_t i = 0; i < ARRAY_SIZE(maps); i++)
		*maps[i] = (uint64_t *)p->memory + i * map;
	tail = (uint32_t *)((uint64_t *)p->memory + ARRAY_SIZE(maps) * map);
	for (size_t i = 0; i < ARRAY_SIZE(counts); i++)
		*counts[i] = tail + i * in->lanes;
	return policy_decide(in, &p->out);
}

static uint64_t sum(const uint32_t *counts, uint32_t n)
{
	uint64_t s = 0;

	for (uint32_t i = 0; i < n; i++)
		s += counts[i];
	return s;
}

static void print_plan(const struct decide_in *in, const struct plan *p, bool lanes)
{
	static const char *const grans[] = {"head", "token", "block"};
	const struct decide_out *o = &p->out;
	uint64_t dram = 0, nvme = 0;

	printf("snapshot lanes=%u watermark=%u granularity=%s block_rows=%u equal_lanes=%u "
	       "write_through=%u hysteresis_permille=%u "
	       "protect=%u+%u\n",
	       in->lanes, in->watermark, grans[in->granularity], in->block_rows, in->equal_lanes,
	       in->write_through, in->hysteresis_permille, in->protect_first, in->protect_last);
	for (uint32_t l = 0; l < in->lanes; l++) {
		uint32_t d = bits_rank(o->to_dram + (size_t)l * o->words, in->watermark);
		uint32_t n = bits_rank(o->to_nvme + (size_t)l * o->words, in->watermark);

		dram += d;
		nvme += n;
		if (lanes)
			printf("lane=%u kept=%u dram=%u nvme=%u dropped=%u out=%u in=%u\n", l, o->kept[l], d, n,
			       o->dropped[l], o->out[l], o->in[l]);
	}
	printf("plan kept=%" PRIu64 " dram=%" PRIu64 " nvme=%" PRIu64 " dropped=%" PRIu64 " out=%" PRIu64
	       " in=%" PRIu64 "\n",
	       sum(o->kept, in->lanes), dram, nvme, sum(o->dropped, in->lanes), sum(o->out, in->lanes),
	       sum(o->in, in->lanes));
	printf("digest bytes=%zu crc32c=%08x\n", p->bytes, crc32c(0, p->memory, p->bytes));
}

static int replay(const char *path, bool lanes)
{
	_cleanup_free_ void *buf = NULL;
	struct plan p = {0};
	struct snapshot s;
	size_t bytes = 0, off;
	char what[96];
	int r;

	if (slurp(path, &buf, &bytes) < 0)
		return 1;
	r = snapshot_read(&s, buf, bytes, &off);
	if (r < 0) {
		snprintf(what, sizeof(what), "not a snapshot of this version: wrong at byte %zu of %zu", off,
			 bytes);
		complain(path, what);
		return 1;
	}
	r = decide(&p, &s.in);
	if (r == 0)
		print_plan(&s.in, &p, lanes);
	else
		complain(path, strerror(-r));
	free(p.memory);
	return r < 0;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"lanes", no_argument, NULL, 'l'}, {"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
	bool lanes = false;
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 'h')
			return fputs(usage, stdout) < 0;
		if (c != 'l')
			return fputs("kvtier-replay: wrong usage, see --help\n", stderr), 2;
		lanes = true;
	}
	if (optind + 1 != argc)
		return fputs("kvtier-replay: one snapshot file is needed, see --help\n", stderr), 2;
	return replay(argv[optind], lanes);
}
