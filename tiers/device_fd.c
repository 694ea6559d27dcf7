/* SPDX-License-Identifier: MIT */
/*
 * Device rows in a file that an engine brought along: read and written by descriptor, never mapped, because
 * its owner may truncate it at any time and a mapping would answer with SIGBUS. A row that is not there any
 * more is -EIO. Only tmpfs is taken: elsewhere a read could wait for a disk, or for a file system served by
 * the client itself, for ever.
 */
#include "tiers/device_check.h"
#include "tiers/tier.h"
#include "shm/crc.h"
#include "shm/util.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>

#ifndef RWF_NOAPPEND
#define RWF_NOAPPEND 0x20 /* Linux 6.9 */
#endif

/*
 * A system call costs as much as copying about 2 KiB, so shorter gaps between wanted rows are read along. The
 * room for that is on the stack and stays in cache.
 */
#define BRIDGE 2048u
#define ROOM 32768u
#define VECTORS 64u

struct device_mem {
	int fd;
	uint64_t size;
};

static int complain(char *err, size_t size, int r, const char *fmt, ...) __attribute__((format(printf, 4, 5)));
static int complain(char *err, size_t size, int r, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(err, size, fmt, ap);
	va_end(ap);
	return r;
}

/*
 * Seals come first: only files of tmpfs and hugetlbfs have them, the kernel answers without asking the file
 * system, and from then on nothing here can be made to wait.
 */
int device_fd_check(int fd, uint64_t bytes, char *err, size_t size)
{
	int mode = fcntl(fd, F_GETFL), seals;
	struct statfs fs;
	struct stat st;

	if (mode < 0)
		return complain(err, size, -errno, "fd: %d, not open", fd);
	if ((mode & O_PATH) || (mode & O_ACCMODE) != O_RDWR)
		return complain(err, size, -EBADF, "fd: mode %#o, must be open for reading and writing", mode);
	if (mode & O_APPEND)
		return complain(err, size, -EPERM, "fd: mode %#o, must be open without O_APPEND", mode);
	seals = fcntl(fd, F_GET_SEALS);
	if (seals < 0)
		return complain(err, size, -ENOTSUP, "fd: a file of another kind, must be tmpfs or hugetlbfs");
	if (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE))
		return complain(err, size, -EPERM, "fd: seals %#x, must allow writing", (unsigned)seals);
	if (fstatfs(fd, &fs) < 0 || fstat(fd, &st) < 0)
		return complain(err, size, -errno, "fd: %s", strerror(errno));
	if (fs.f_type != TMPFS_MAGIC && fs.f_type != HUGETLBFS_MAGIC)
		return complain(err, size, -ENOTSUP, "fd: file system %#lx, must be tmpfs or hugetlbfs",
				(unsigned long)fs.f_type);
	/* hugetlbfs can be read, but no kernel up to now writes it but through a mapping. */
	if (pwrite(fd, "", 0, 0) < 0)
		return complain(err, size, -errno,
				"fd: file system %#lx, its files cannot be written by pwrite",
				(unsigned long)fs.f_type);
	if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size < bytes || bytes > INT64_MAX)
		return complain(err, size, -EFBIG, "bytes: %llu, the file has %lld", (unsigned long long)bytes,
				(long long)st.st_size);
	return 0;
}

static int fd_attach(struct device_mem **ret, int fd, size_t bytes)
{
	struct device_mem *m;
	char line[128];
	int r = device_fd_check(fd, bytes, line, sizeof(line));

	if (r < 0)
		return r;
	m = malloc(sizeof(*m));
	if (!m)
		return -ENOMEM;
	*m = (struct device_mem){.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3), .size = bytes};
	if (m->fd < 0) {
		r = -errno;
		free(m);
		return r;
	}
	*ret = m;
	return 0;
}

static void fd_detach(struct device_mem *m)
{
	if (!m)
		return;
	close(m->fd);
	free(m);
}

/* All of it or -errno; -EIO when the file ends before. */
static int read_at(const struct device_mem *m, uint64_t off, char *dst, size_t bytes)
{
	while (bytes) {
		ssize_t n = pread(m->fd, dst, bytes, (off_t)off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -EIO;
		off += (size_t)n;
		dst += n;
		bytes -= (size_t)n;
	}
	return 0;
}

/*
 * The client shares the open file and may set O_APPEND behind our back, whereupon a write at an offset goes
 * to the end instead: its file would grow without bound.
 */
static ssize_t write_vector(int fd, const struct iovec *v, unsigned n, uint64_t off)
{
	ssize_t r = pwritev2(fd, v, (int)n, (off_t)off, RWF_NOAPPEND);
	int mode;

	if (r >= 0 || errno != EOPNOTSUPP)
		return r;
	mode = fcntl(fd, F_GETFL);
	if (mode < 0 || (mode & O_APPEND)) {
		errno = EPERM;
		return -1;
	}
	return pwritev(fd, v, (int)n, (off_t)off);
}

/* All of v, which is used up, or -errno. */
static int write_at(const struct device_mem *m, uint64_t off, struct iovec *v, unsigned n)
{
	while (n) {
		ssize_t done = write_vector(m->fd, v, n, off);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done ? -errno : -EIO;
		off += (size_t)done;
		for (; n && (size_t)done >= v->iov_len; v++, n--)
			done -= (ssize_t)v->iov_len;
		if (n) {
			v->iov_base = (char *)v->iov_base + done;
			v->iov_len -= (size_t)done;
		}
	}
	return 0;
}

/* How many of the slots one read takes in: gaps are short and everything fits the room. */
static uint32_t span_length(const struct device_plane *p, const uint32_t *slots, uint32_t n)
{
	uint32_t k = 1;

	while (k < n && (slots[k] - slots[k - 1]) * (uint64_t)p->stride - p->width <= BRIDGE &&
	       (slots[k] - slots[0]) * (uint64_t)p->stride + p->width <= ROOM)
		k++;
	return k;
}

/* Runs without gaps go where they belong; other spans into the room first, and the rows are picked there. */
static int gather_plane(const struct device_mem *m, const struct device_plane *p, const uint32_t *slots,
			uint32_t n, char *dst)
{
	char room[ROOM];
	int r = 0;

	for (uint32_t i = 0, k; p->width && i < n && !r; i += k, dst += (size_t)k * p->width) {
		uint64_t off = p->off + (uint64_t)slots[i] * p->stride;
		uint32_t span = span_length(p, slots + i, n - i);

		k = p->stride == p->width ? device_run(slots + i, n - i) : 1;
		if (k >= span) {
			r = read_at(m, off, dst, (size_t)k * p->width);
			continue;
		}
		k = span;
		r = read_at(m, off, room, (uint64_t)(slots[i + k - 1] - slots[i]) * p->stride + p->width);
		for (uint32_t j = 0; j < k && !r; j++)
			memcpy(dst + (size_t)j * p->width,
			       room + (uint64_t)(slots[i + j] - slots[i]) * p->stride, p->width);
	}
	return r;
}

static int fd_gather(struct device_mem *m, const struct device_lane *lane, const uint32_t *slots, uint32_t n,
		     void *page, uint32_t *crc)
{
	struct device_plane p[2];
	size_t k_bytes;
	int r;

	if (!n)
		return 0;
	r = device_planes(p, m->size, lane, n);
	if (r == 0)
		r = device_slots(p, slots, n);
	if (r < 0)
		return r;
	k_bytes = (size_t)n * p[0].width;
	r = gather_plane(m, &p[0], slots, n, page);
	if (r == 0)
		r = gather_plane(m, &p[1], slots, n, (char *)page + k_bytes);
	if (r == 0)
		*crc = crc32c(*crc, page, k_bytes + (size_t)n * p[1].width);
	return r;
}

/* Rows that lie apart are written one by one: what is between them is not ours to write. */
static int scatter_plane(const struct device_mem *m, const struct device_plane *p, const char *src,
			 const uint32_t *pick, uint32_t first, uint32_t n)
{
	uint64_t off = p->off + (uint64_t)first * p->stride;
	bool packed = p->stride == p->width;
	struct iovec v[VECTORS];
	int r = 0;

	for (uint32_t i = 0; p->width && i < n && !r;) {
		uint64_t at = off + (uint64_t)i * p->stride;
		unsigned used = 0;

		do {
			uint32_t k = !packed ? 1 : pick ? device_run(pick + i, n - i) : n - i;

			v[used++] = (struct iovec){.iov_base = (char *)src +
							       (size_t)(pick ? pick[i] : i) * p->width,
						   .iov_len = (size_t)k * p->width};
			i += k;
		} while (packed && i < n && used < VECTORS);
		r = write_at(m, at, v, used);
	}
	return r;
}

static int fd_scatter(struct device_mem *m, const struct device_lane *lane, const void *page, uint32_t rows,
		      const uint32_t *pick, uint32_t first, uint32_t n)
{
	struct device_plane p[2];
	int r;

	if (!n)
		return 0;
	r = device_planes(p, m->size, lane, rows);
	if (r == 0)
		r = device_range(p, rows, pick, first, n);
	if (r == 0)
		r = scatter_plane(m, &p[0], page, pick, first, n);
	if (r == 0)
		r = scatter_plane(m, &p[1], (const char *)page + (size_t)rows * p[0].width, pick, first, n);
	return r;
}

static int fd_read(struct device_mem *m, uint64_t off, void *dst, size_t bytes)
{
	if (off > m->size || bytes > m->size - off)
		return -ERANGE;
	return read_at(m, off, dst, bytes);
}

/* Contents that could vanish under a pointer are not lent. */
static const void *fd_peek(struct device_mem *m, uint64_t off, size_t bytes)
{
	return NULL;
}

static size_t fd_resident(struct device_mem *m)
{
	struct stat st;

	return fstat(m->fd, &st) < 0 ? 0 : (size_t)st.st_blocks * 512;
}

const struct device_ops device_fd_ops = {
	.name = "fd",
	.attach = fd_attach,
	.detach = fd_detach,
	.gather = fd_gather,
	.scatter = fd_scatter,
	.read = fd_read,
	.peek = fd_peek,
	.resident = fd_resident,
};
