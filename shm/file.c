/* SPDX-License-Identifier: MIT */
#include "shm/file.h"
#include "shm/util.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>

static int write_all(int fd, const char *buf, size_t size)
{
	while (size > 0) {
		ssize_t n = write(fd, buf, MIN(size, (size_t)64 << 20));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		buf += n;
		size -= (size_t)n;
	}
	return 0;
}

int file_replace(const char *path, const struct file_part *part, unsigned parts)
{
	_cleanup_free_ char *tmp = NULL;
	_cleanup_close_ int fd = -1;
	int r = 0;

	if (asprintf(&tmp, "%s.XXXXXX", path) < 0) {
		tmp = NULL;
		return -ENOMEM;
	}
	fd = mkostemp(tmp, O_CLOEXEC);
	if (fd < 0)
		return -errno;
	for (unsigned i = 0; r == 0 && i < parts; i++)
		r = write_all(fd, part[i].data, part[i].bytes);
	if (r == 0 && (fsync(fd) < 0 || fchmod(fd, 0644) < 0 || rename(tmp, path) < 0))
		r = -errno;
	if (r < 0)
		unlink(tmp);
	return r;
}
