/* SPDX-License-Identifier: MIT */
/*
 * The directory of the store: its lock, and its container files
 * kvtier-000.dat ... A container is made under another name, written over once (reading an
 * unwritten extent costs nothing and writing one costs twice, so nothing measured on them means
 * anything), and renamed when its superblocks are on disk; the first container comes last, so where it
 * exists the store is complete. Nothing is ever reformatted: what does not fit is refused by name.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "shm/trial.h"
#include "tiers/nvme.h"

#define ZERO_CHUNK (UINT32_C(4) << 20)
#define TEMP_SUFFIX ".new"

__attribute__((format(printf, 4, 5))) static int refuse(char *err, size_t errsize, int r, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(err, errsize, fmt, ap);
	va_end(ap);
	return r;
}

static void file_name(char ret[32], unsigned i, const char *suffix)
{
	snprintf(ret, 32, "kvtier-%03u.dat%s", i, suffix);
}

static int lock_dir(struct nvme *t, char *err, size_t errsize)
{
	if (mkdir(t->path, 0700) < 0 && errno != EEXIST)
		return refuse(err, errsize, -errno, "nvme path %s: cannot be made: %m", t->path);
	t->dir_fd = open(t->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (t->dir_fd < 0)
		return refuse(err, errsize, -errno, "nvme path %s: %m", t->path);
	if (flock(t->dir_fd, LOCK_EX | LOCK_NB) < 0)
		return refuse(err, errsize, errno == EWOULDBLOCK ? -EBUSY : -errno,
			      "nvme path %s: in use by another daemon", t->path);
	return 0;
}

/* Direct if the file system can: page cache under a tier only doubles memory and hides the device. */
static int open_file(struct nvme *t, const char *name, int flags)
{
	int fd = t->direct ? openat(t->dir_fd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_DIRECT | flags, 0600)
			   : -1;

	if (fd >= 0 || (t->direct && errno != EINVAL))
		return fd < 0 ? -errno : fd;
	t->direct = false;
	fd = openat(t->dir_fd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | flags, 0600);
	return fd < 0 ? -errno : fd;
}

static uint32_t segments_in(const struct nvme *t, unsigned file)
{
	return MIN(t->file_segments, t->segments - file * t->file_segments);
}

static uint64_t file_bytes(const struct nvme *t, unsigned file)
{
	return NVME_PREAMBLE + segments_in(t, file) * t->segment_bytes;
}

static int write_all(int fd, const void *buf, size_t len, uint64_t off)
{
	uint8_t tries = 0;

	while (len) {
		ssize_t n = pwrite(fd, buf, len, (off_t)off);

		if (n < 0 && io_again(errno, &tries))
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		buf = (const char *)buf + n;
		off += (uint64_t)n;
		len -= (size_t)n;
	}
	return 0;
}

/* Write the superblock of one container to place A (0) or B (1). */
static int write_super(const struct nvme *t, int fd, unsigned file, unsigned place, uint64_t generation,
		       uint64_t created_ns)
{
	_cleanup_free_ struct nvme_super *s = aligned_alloc(KVT_UNIT, KVT_UNIT);

	if (!s)
		return -ENOMEM;
	memset(s, 0, KVT_UNIT);
	memcpy(s->uuid, t->uuid, sizeof(s->uuid));
	s->generation = generation;
	s->created_ns = created_ns;
	s->store_bytes = t->store_bytes;
	s->segment_bytes = t->segment_bytes;
	s->container = file;
	s->containers = t->files;
	s->first_segment = file * t->file_segments;
	s->segments = segments_in(t, file);
	s->unit = KVT_UNIT;
	nvme_unit_seal(s, NVME_MAGIC_SUPER);
	return write_all(fd, s, KVT_UNIT, place ? NVME_SUPER_B : 0);
}

static int fill_file(struct nvme *t, int fd, uint64_t bytes, bool write_over)
{
	_cleanup_free_ char *zero = NULL;

	if (fallocate(fd, 0, 0, (off_t)bytes) < 0) {
		if (errno != EOPNOTSUPP)
			return -errno;
		if (ftruncate(fd, (off_t)bytes) < 0)
			return -errno;
	}
	if (!write_over)
		return 0;
	zero = aligned_alloc(KVT_UNIT, ZERO_CHUNK);
	if (!zero)
		return -ENOMEM;
	memset(zero, 0, ZERO_CHUNK);
	for (uint64_t off = 0; off < bytes; off += ZERO_CHUNK) {
		int r = write_all(fd, zero, MIN(ZERO_CHUNK, bytes - off), off);

		if (r < 0)
			return r;
	}
	return 0;
}

static int create_file(struct nvme *t, unsigned file, bool write_over)
{
	struct timespec ts;
	char name[32];
	uint64_t created;
	int fd, r;

	file_name(name, file, TEMP_SUFFIX);
	if (unlinkat(t->dir_fd, name, 0) < 0 && errno != ENOENT)
		return -errno;
	fd = open_file(t, name, O_CREAT | O_EXCL);
	if (fd < 0)
		return fd;
	clock_gettime(CLOCK_REALTIME, &ts);
	created = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
	r = fill_file(t, fd, file_bytes(t, file), write_over);
	crash_point("nvme.create.filled");
	for (unsigned g = 0; g < 2 && !r; g++)
		r = write_super(t, fd, file, g, g, created);
	crash_point("nvme.create.super");
	if (!r && fsync(fd) < 0)
		r = -errno;
	close(fd);
	if (r < 0)
		unlinkat(t->dir_fd, name, 0);
	return r;
}

/* Ask first: fallocate would take the last block of the file system before it fails. */
static int check_space(const struct nvme *t)
{
	struct statvfs vfs;

	if (fstatvfs(t->dir_fd, &vfs) < 0)
		return -errno;
	return (uint64_t)vfs.f_bavail * vfs.f_frsize < t->store_bytes ? -ENOSPC : 0;
}

static int create_store(struct nvme *t, bool write_over, char *err, size_t errsize)
{
	char from[32], to[32];
	int r = check_space(t);

	if (getrandom(t->uuid, sizeof(t->uuid), 0) != sizeof(t->uuid))
		return -EIO;
	for (unsigned i = 0; i < t->files && !r; i++)
		r = create_file(t, i, write_over);
	for (unsigned i = t->files; i-- > 0 && !r;) {
		file_name(from, i, TEMP_SUFFIX);
		file_name(to, i, "");
		crash_point("nvme.create.rename");
		if (renameat(t->dir_fd, from, t->dir_fd, to) < 0)
			r = -errno;
	}
	crash_point("nvme.create.renamed");
	if (!r && fsync(t->dir_fd) < 0)
		r = -errno;
	if (!r)
		return 0;
	for (unsigned i = 0; i < t->files; i++) {
		file_name(from, i, TEMP_SUFFIX);
		unlinkat(t->dir_fd, from, 0);
	}
	return refuse(err, errsize, r, "nvme path %s: size %llu cannot be made there: %s", t->path,
		      (unsigned long long)t->store_bytes, strerror(-r));
}

/*
 * The better of the two superblocks, and its place. Errors name the file. Returns how many of the two are
 * unreadable: one of those may be the newer one.
 */
static int read_super(struct nvme *t, unsigned file, struct nvme_super *ret, unsigned *ret_place, char *err,
		      size_t errsize)
{
	_cleanup_free_ char *unit = aligned_alloc(KVT_UNIT, KVT_UNIT);
	struct nvme_super s = {0}, best = {0};
	int worst = -ENODATA, bad = 0;
	unsigned place = 0;
	char name[32];

	if (!unit)
		return -ENOMEM;
	file_name(name, file, "");
	for (int i = 0; i < 2; i++) {
		ssize_t n = pread(t->fd[file], unit, KVT_UNIT, i ? NVME_SUPER_B : 0);
		int r = n == KVT_UNIT ? nvme_super_check(unit, &s) : n < 0 ? -errno : -ENODATA;

		if (r == -EPROTONOSUPPORT)
			return refuse(err, errsize, r, "%s/%s: version %u, this daemon knows %u", t->path, name,
				      ((struct nvme_tag *)unit)->version, NVME_VERSION);
		bad += r < 0;
		if (!r && (!best.containers || s.generation > best.generation)) {
			best = s;
			place = (unsigned)i;
		}
		if (r < 0 && r != -ENODATA)
			worst = r;
	}
	if (!best.containers)
		return refuse(err, errsize, -EBADMSG, "%s/%s: superblock: %s; move the file away to start anew",
			      t->path, name,
			      worst == -ENODATA   ? "none in either place"
			      : worst == -EBADMSG ? "checksum wrong in both places"
			      : worst == -EINVAL  ? "fields impossible in both places"
						  : strerror(-worst));
	*ret = best;
	*ret_place = place;
	return bad;
}

static int compare(const struct nvme *t, unsigned file, const struct nvme_super *s, char *err, size_t errsize)
{
	const struct {
		const char *field;
		uint64_t disk, want;
	} check[] = {
		{"segment", s->segment_bytes, t->segment_bytes},
		{"size", s->store_bytes, t->store_bytes},
		{"containers", s->containers, t->files},
		{"container", s->container, file},
		{"first segment", s->first_segment, (uint64_t)file * t->file_segments},
		{"segments", s->segments, segments_in(t, file)},
	};
	struct stat st;
	char name[32];

	file_name(name, file, "");
	for (unsigned i = 0; i < ARRAY_SIZE(check); i++)
		if (check[i].disk != check[i].want)
			return refuse(err, errsize, -EINVAL, "%s/%s: %s %llu, configured %llu", t->path, name,
				      check[i].field, (unsigned long long)check[i].disk,
				      (unsigned long long)check[i].want);
	if (file && memcmp(s->uuid, t->uuid, sizeof(s->uuid)) != 0)
		return refuse(err, errsize, -EINVAL, "%s/%s: uuid is not that of kvtier-000.dat", t->path,
			      name);
	if (fstat(t->fd[file], &st) < 0)
		return -errno;
	if ((uint64_t)st.st_size < file_bytes(t, file))
		return refuse(err, errsize, -EINVAL, "%s/%s: file size %lld, superblock says %llu", t->path,
			      name, (long long)st.st_size, (unsigned long long)file_bytes(t, file));
	return 0;
}

static int open_store(struct nvme *t, char *err, size_t errsize)
{
	struct nvme_super super[NVME_MAX_FILES];
	unsigned place[NVME_MAX_FILES];
	uint64_t generation = 0;
	bool bad = false;
	int r;

	for (unsigned i = 0; i < t->files; i++) {
		char name[32];

		file_name(name, i, "");
		r = open_file(t, name, 0);
		if (r < 0)
			return refuse(err, errsize, r, "%s/%s: %s", t->path, name, strerror(-r));
		t->fd[i] = r;
		r = read_super(t, i, &super[i], &place[i], err, errsize);
		if (r < 0)
			return r;
		bad = bad || r;
		if (!i)
			memcpy(t->uuid, super[i].uuid, sizeof(t->uuid));
		r = compare(t, i, &super[i], err, errsize);
		if (r < 0)
			return r;
		generation = MAX(generation, super[i].generation);
	}
	/*
	 * This life's sequence numbers start above all earlier ones, once this is on disk; also above those of
	 * the last life, if it is that one's superblock that cannot be read. The good copy stays until then.
	 */
	generation += bad ? 2 : 1;
	for (unsigned i = 0; i < t->files; i++) {
		crash_point("nvme.super.write");
		r = write_super(t, t->fd[i], i, !place[i], generation, super[i].created_ns);
		crash_point("nvme.super.written");
		if (!r && fdatasync(t->fd[i]) < 0)
			r = -errno;
		if (r < 0)
			return refuse(err, errsize, r, "nvme path %s: superblock cannot be written: %s",
				      t->path, strerror(-r));
	}
	t->next_seq = generation << 32 | 1;
	return 0;
}

int nvme_dir_open(struct nvme *t, const struct tier_cfg *cfg, char *err, size_t errsize)
{
	bool other = false;
	char name[32];
	int r = lock_dir(t, err, errsize);

	if (r < 0)
		return r;
	file_name(name, 0, "");
	if (faccessat(t->dir_fd, name, F_OK, AT_SYMLINK_NOFOLLOW) < 0) {
		for (unsigned i = 1; i < NVME_MAX_FILES && !other; i++) {
			file_name(name, i, "");
			other = !faccessat(t->dir_fd, name, F_OK, AT_SYMLINK_NOFOLLOW);
		}
		if (other)
			return refuse(err, errsize, -EINVAL, "%s/%s: exists, but kvtier-000.dat is missing",
				      t->path, name);
		t->fresh = t->scanned = true; /* nothing to find */
		r = create_store(t, cfg->prealloc, err, errsize);
		if (r < 0)
			return r;
	}
	return open_store(t, err, errsize);
}

void nvme_dir_close(struct nvme *t)
{
	for (unsigned i = 0; i < NVME_MAX_FILES; i++)
		close_fdp(&t->fd[i]);
	close_fdp(&t->dir_fd); /* and with it the lock */
}
