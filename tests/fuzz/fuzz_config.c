/* SPDX-License-Identifier: MIT */
/* Any bytes as a configuration file: refused with one line, or printed and read back to the same configuration.
 */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include "daemon/config.h"
#include "shm/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int load(struct config *c, int fd, char *err, size_t errsize)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return config_load(c, path, err, errsize);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct config a, b;
	_cleanup_close_ int in = memfd_create("in", MFD_CLOEXEC), out = memfd_create("out", MFD_CLOEXEC);
	char err[512] = "";

	if (in < 0 || out < 0 || write(in, data, size) != (ssize_t)size)
		abort();
	if (load(&a, in, err, sizeof(err)) < 0) {
		if (!*err || strchr(err, '\n'))
			abort();
		return 0;
	}
	config_print(&a, out);
	if (load(&b, out, err, sizeof(err)) < 0)
		abort();
	/* Where a value came from is not printed. */
	strcpy(b.file, a.file);
	memcpy(b.line, a.line, sizeof(b.line));
	for (uint32_t i = 0; i < CONFIG_MAX_TENANTS; i++)
		memcpy(b.tenant[i].line, a.tenant[i].line, sizeof(b.tenant[i].line));
	if (memcmp(&a, &b, sizeof(a)))
		abort();
	return 0;
}
