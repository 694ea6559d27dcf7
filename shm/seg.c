/* SPDX-License-Identifier: MIT */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <linux/magic.h>
#include "shm/seg.h"
#include "shm/trial.h"
#include "shm/util.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U /* Linux 6.3; older kernels answer EINVAL */
#endif

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26) /* log2 of the page size above MFD_HUGE_SHIFT */
#endif

#define PAGE_PLAIN ((size_t)KVT_UNIT)
#define PAGE_HUGE ((size_t)2 << 20)
/*
 * shmem undoes a whole fallocate that a signal interrupts; smaller steps keep
 * what was done, so a retry always gets further.
 */
#define COMMIT_STEP ((size_t)64 << 20)

/* Seals that make a mapping of the whole file safe from the other side's ftruncate. */
#define SEALS_SIZE (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static int seals_of(enum seg_class cls)
{
	if (cls == SEG_EXCHANGE && planted("exchange-unsealed"))
		return F_SEAL_GROW | F_SEAL_SEAL;
	return cls == SEG_PUBLISHED && !planted("plan-unsealed") ? SEALS_SIZE | F_SEAL_FUTURE_WRITE
								 : SEALS_SIZE;
}

static bool class_ok(enum seg_class cls)
{
	return cls == SEG_PRIVATE || cls == SEG_EXCHANGE || cls == SEG_PUBLISHED;
}

static size_t page_of(const struct seg *s)
{
	return s->huge ? PAGE_HUGE : PAGE_PLAIN;
}

static int make_memfd(const char *name, unsigned flags)
{
	int fd;

	flags |= MFD_ALLOW_SEALING | MFD_CLOEXEC;
	fd = memfd_create(name, flags | MFD_NOEXEC_SEAL);
	if (fd < 0 && errno == EINVAL)
		fd = memfd_create(name, flags);
	return fd < 0 ? -errno : fd;
}

static int commit_range(int fd, size_t off, size_t len)
{
	while (len) {
		size_t n = MIN(len, COMMIT_STEP);

		if (fallocate(fd, 0, (off_t)off, (off_t)n) < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		off += n;
		len -= n;
	}
	return 0;
}

/* Kernels before 5.18 take FUTURE_WRITE on huge pages and let everybody map them for writing all the same. */
static bool still_writable(const struct seg *s)
{
	void *p = mmap(NULL, s->size, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);

	if (p == MAP_FAILED)
		return errno != EPERM;
	munmap(p, s->size);
	return true;
}

/* One attempt with one page size; on failure nothing is left behind. */
static int try_create(struct seg *ret, enum seg_class cls, const char *name, size_t size, unsigned flags,
		      bool huge)
{
	struct seg s = {.fd = -1, .cls = cls, .huge = huge, .writable = true};
	int r;

	s.size = ALIGN_UP(size, page_of(&s));
	s.fd = make_memfd(name, huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0);
	if (s.fd < 0)
		return s.fd;
	/* Without this another process of the same or another user could reopen it through /proc/pid/fd. */
	if ((!planted("memfd-open-to-all") && fchmod(s.fd, 0600) < 0) || ftruncate(s.fd, (off_t)s.size) < 0)
		goto fail_errno;
	s.addr = mmap(NULL, s.size, PROT_READ | PROT_WRITE, MAP_SHARED, s.fd, 0);
	if (s.addr == MAP_FAILED) {
		s.addr = NULL;
		goto fail_errno;
	}
	if ((flags & SEG_F_HUGE) && !huge)
		(void)madvise(s.addr, s.size, MADV_HUGEPAGE); /* only a wish: kernels without THP refuse it */
	if (flags & SEG_F_POPULATE) {
		r = commit_range(s.fd, 0, s.size);
		if (r < 0)
			goto fail;
	}
	/* One call, after our own writable mapping: FUTURE_WRITE cannot be added once SEAL is set. */
	if (fcntl(s.fd, F_ADD_SEALS, seals_of(cls)) < 0)
		goto fail_errno;
	if (huge && cls == SEG_PUBLISHED && still_writable(&s)) {
		r = -EPERM;
		goto fail;
	}
	*ret = s;
	return 0;
fail_errno:
	r = -errno;
fail:
	seg_close(&s);
	return r;
}

int seg_create(struct seg *ret, enum seg_class cls, const char *name, size_t size, unsigned flags)
{
	if (!class_ok(cls) || !size || (flags & ~(unsigned)(SEG_F_POPULATE | SEG_F_HUGE)))
		return -EINVAL;
	if ((flags & SEG_F_HUGE) && cls == SEG_EXCHANGE)
		return -EINVAL;
	if (size > (size_t)PTRDIFF_MAX - PAGE_HUGE)
		return -EFBIG;
	/* With an empty huge page pool it is mmap that fails, so any error means: plain pages. */
	if ((flags & SEG_F_HUGE) && try_create(ret, cls, name, size, flags, true) == 0)
		return 0;
	return try_create(ret, cls, name, size, flags, false);
}

/* What verification learns; size and seals cannot change any more once they were seen sealed. */
static int inspect(int fd, enum seg_class cls, size_t size, bool *ret_huge)
{
	int want = seals_of(cls), mode, seals;
	struct statfs fs;
	struct stat st;
	bool huge;

	if (!class_ok(cls))
		return -EINVAL;
	mode = fcntl(fd, F_GETFL);
	if (mode < 0)
		return -errno;
	if ((mode & O_PATH) || (cls != SEG_PUBLISHED && (mode & O_ACCMODE) != O_RDWR) ||
	    (mode & O_ACCMODE) == O_WRONLY)
		return -EPROTO;
	seals = fcntl(fd, F_GET_SEALS);
	if (seals < 0)
		return errno == EINVAL ? -EPROTO : -errno;
	if ((seals & want) != want)
		return -EPROTO;
	if (cls != SEG_PUBLISHED && (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)))
		return -EPROTO;
	/* After the seals: before them the size could still move. */
	if (fstat(fd, &st) < 0 || fstatfs(fd, &fs) < 0)
		return -errno;
	huge = fs.f_type == HUGETLBFS_MAGIC;
	/* A hole in hugetlb memory may have no page left to fill it: never where both sides may make one. */
	if (!S_ISREG(st.st_mode) || !size || (uint64_t)st.st_size != size || (huge && cls == SEG_EXCHANGE))
		return -EPROTO;
	*ret_huge = huge;
	return 0;
}

int seg_verify(int fd, enum seg_class cls, size_t size)
{
	bool huge;

	return inspect(fd, cls, size, &huge);
}

int seg_map(struct seg *ret, enum seg_class cls, int fd, size_t size)
{
	struct seg s = {.size = size, .fd = fd, .cls = cls, .writable = cls != SEG_PUBLISHED};
	int r;

	r = inspect(fd, cls, size, &s.huge);
	if (r < 0)
		return r;
	if (size % page_of(&s))
		return -EPROTO;
	s.addr = mmap(NULL, size, s.writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
	if (s.addr == MAP_FAILED)
		return -errno;
	*ret = s;
	return 0;
}

/* Punching and committing need a range inside a segment that we may write. */
static int range_check(const struct seg *s, size_t off, size_t len)
{
	if (s->cls == SEG_PUBLISHED)
		return -EPERM;
	return off > s->size || len > s->size - off ? -EINVAL : 0;
}

int seg_punch(struct seg *s, size_t off, size_t len)
{
	size_t page = page_of(s), from, to;
	int r = range_check(s, off, len);

	if (r < 0)
		return r;
	from = ALIGN_UP(off, page);
	to = (off + len) / page * page;
	if (from >= to)
		return 0;
	do
		r = fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)from,
			      (off_t)(to - from));
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

int seg_commit(struct seg *s, size_t off, size_t len)
{
	int r = range_check(s, off, len);

	return r < 0 ? r : commit_range(s->fd, off, len);
}

size_t seg_resident(const struct seg *s)
{
	struct stat st;

	return fstat(s->fd, &st) < 0 ? 0 : (size_t)st.st_blocks * 512;
}

void seg_close(struct seg *s)
{
	if (!s)
		return;
	/* A zeroed segment names fd 0 without owning it. */
	if (s->fd > 0 || (s->fd == 0 && s->addr))
		close(s->fd);
	if (s->addr)
		munmap(s->addr, s->size);
	*s = (struct seg)SEG_INIT;
}

int seg_lend(int fd)
{
	char path[64];
	int r;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	r = open(path, O_RDONLY | O_CLOEXEC);
	return r < 0 ? -errno : r;
}

/*
 * The kernel gives a write lease only when nobody else has the inode open. A memfd's first descriptor counts
 * as neither reader nor writer, so what it counts is what was lent, and what others opened again.
 */
int seg_alone(int fd)
{
	_cleanup_close_ int mine = seg_lend(fd);

	if (mine < 0)
		return mine;
	if (fcntl(mine, F_SETLEASE, F_WRLCK) < 0)
		return errno == EAGAIN ? 0 : -errno;
	(void)fcntl(mine, F_SETLEASE, F_UNLCK);
	return 1;
}
