/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What the hardware does without kvtier: fio on the disk that the daemon uses, copies over PCIe. To be measured
 * between the rounds of what is compared with them: disks swing by a factor of two from minute to minute.
 */
#include <time.h>
#include "tests/gpu/rig.h"

/* Fields of fio's terse output, version 3, counted from 0: KiB and milliseconds. */
enum { FIO_ERROR = 4, FIO_READ_KIB = 5, FIO_READ_MS = 8, FIO_WRITE_KIB = 46, FIO_WRITE_MS = 49 };

/* Where fio is, or NULL: $FIO, else the path. */
static inline const char *fio_program(void)
{
	static char found[300];
	FILE *p = popen("command -v \"${FIO:-fio}\" 2>/dev/null", "r");

	if (p && fgets(found, sizeof(found), p))
		found[strcspn(found, "\n")] = '\0';
	if (p)
		pclose(p);
	return found[0] ? found : NULL;
}

/*
 * Bytes per second of fio, 1 MiB requests, 32 in flight, in a file of its own in dir: io_uring with registered
 * buffers and file, O_DIRECT, buffers on huge pages. rw: "write" or "read"; read what was written before.
 */
static inline double floor_disk(const char *dir, const char *rw, uint64_t bytes)
{
	char cmd[1024], line[4096] = "";
	double kib = 0, ms = 0;
	bool reads = !strcmp(rw, "read");
	int field = 0;
	FILE *p;

	snprintf(cmd, sizeof(cmd),
		 "GLIBC_TUNABLES=glibc.malloc.hugetlb=1 '%s' --name=x --filename='%s/fio.dat' --size=%lluM "
		 "--rw=%s "
		 "--bs=1M --iodepth=32 --ioengine=io_uring --fixedbufs=1 --registerfiles=1 --direct=1 --thread "
		 "--output-format=terse --terse-version=3 2>/dev/null",
		 fio_program(), dir, (unsigned long long)(bytes / MIB), rw);
	p = popen(cmd, "r");
	while (p && fgets(line, sizeof(line), p) && strncmp(line, "3;", 2))
		;
	if (p)
		pclose(p);
	for (char *at = line, *f; (f = strsep(&at, ";")); field++) {
		if (field == FIO_ERROR && atoi(f))
			die("fio: error %s", f);
		if (field == (reads ? FIO_READ_KIB : FIO_WRITE_KIB))
			kib = atof(f);
		if (field == (reads ? FIO_READ_MS : FIO_WRITE_MS))
			ms = atof(f);
	}
	if (kib <= 0 || ms <= 0)
		die("fio did not run: %s", line);
	return kib * 1024 / (ms / 1e3);
}

/* Bytes per second between pinned host memory and the GPU, the copy engine alone. */
static inline double floor_pcie(struct rig *g, bool out)
{
	enum { COPIES = 64 };
	uint64_t buf, start = 0;
	double s;

	cu(g, g->d->alloc(&buf, RIG_CHUNK), "cuMemAlloc");
	for (int i = -4; i < COPIES; i++) {
		if (!i) {
			cu(g, g->d->stream_sync(g->stream), "cuStreamSynchronize");
			start = now_ns();
		}
		cu(g,
		   out ? g->d->copy_out(g->pinned, buf, RIG_CHUNK, g->stream)
		       : g->d->copy_in(buf, g->pinned, RIG_CHUNK, g->stream),
		   "cuMemcpyAsync");
	}
	cu(g, g->d->stream_sync(g->stream), "cuStreamSynchronize");
	s = (double)(now_ns() - start) / 1e9;
	cu(g, g->d->free(buf), "cuMemFree");
	return (double)(COPIES * RIG_CHUNK) / s;
}

static inline int by_double(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}
static inline double median(double *v, unsigned n)
{
	qsort(v, n, sizeof(*v), by_double);
	return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}
