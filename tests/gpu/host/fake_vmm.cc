/* SPDX-License-Identifier: MIT */
/* Virtual memory of the fake driver: physical memory is a memfd, so descriptors really go to other processes.
 */
#include "fake_state.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define GRAIN ((size_t)2 << 20)

FAKE_API int cuMemGetAllocationGranularity(size_t *ret, const void *, int)
{
	CALL(cuMemGetAllocationGranularity);
	*ret = GRAIN;
	return 0;
}

FAKE_API int cuMemCreate(uint64_t *ret, size_t bytes, const void *, uint64_t)
{
	CALL(cuMemCreate);
	int fd;

	if (!bytes || bytes % GRAIN)
		return FAKE_INVALID;
	if (!fake_room(bytes))
		return FAKE_OOM;
	fd = memfd_create("fake GPU memory", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, (off_t)bytes))
		return FAKE_OOM;
	*ret = fake.next_handle++;
	fake.handles[*ret] = fd;
	return 0;
}

FAKE_API int cuMemRelease(uint64_t handle)
{
	CALL(cuMemRelease);
	if (!fake.handles.count(handle))
		return FAKE_BAD_HANDLE;
	close(fake.handles[handle]);
	fake.handles.erase(handle);
	return 0;
}

FAKE_API int cuMemExportToShareableHandle(void *ret_fd, uint64_t handle, int type, uint64_t)
{
	CALL(cuMemExportToShareableHandle);
	if (type != 1 || !fake.handles.count(handle))
		return FAKE_BAD_HANDLE;
	*(int *)ret_fd = fcntl(fake.handles[handle], F_DUPFD_CLOEXEC, 3);
	return *(int *)ret_fd < 0 ? FAKE_OOM : 0;
}

FAKE_API int cuMemImportFromShareableHandle(uint64_t *ret, void *fd, int type)
{
	CALL(cuMemImportFromShareableHandle);
	struct stat st;
	int own;

	if (type != 1 || fstat((int)(intptr_t)fd, &st) || !S_ISREG(st.st_mode))
		return FAKE_INVALID;
	own = fcntl((int)(intptr_t)fd, F_DUPFD_CLOEXEC, 3);
	if (own < 0)
		return FAKE_OOM;
	*ret = fake.next_handle++;
	fake.handles[*ret] = own;
	return 0;
}

FAKE_API int cuMemAddressReserve(uint64_t *ret, size_t bytes, size_t, uint64_t, uint64_t)
{
	CALL(cuMemAddressReserve);
	void *p = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (!bytes || bytes % GRAIN || p == MAP_FAILED)
		return FAKE_INVALID;
	*ret = (uint64_t)p;
	fake.reserved[*ret] = bytes;
	return 0;
}

FAKE_API int cuMemAddressFree(uint64_t addr, size_t bytes)
{
	CALL(cuMemAddressFree);
	auto it = fake.reserved.find(addr);

	if (it == fake.reserved.end() || it->second != bytes || fake.device.count(addr))
		return FAKE_INVALID;
	munmap((void *)addr, bytes);
	fake.reserved.erase(it);
	return 0;
}

FAKE_API int cuMemMap(uint64_t addr, size_t bytes, size_t off, uint64_t handle, uint64_t)
{
	CALL(cuMemMap);
	struct stat st;

	if (!fake.reserved.count(addr) || !fake.handles.count(handle) || off)
		return FAKE_INVALID;
	if (fstat(fake.handles[handle], &st) || (size_t)st.st_size != bytes || fake.reserved[addr] != bytes)
		return FAKE_INVALID;
	if (mmap((void *)addr, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, fake.handles[handle], 0) == MAP_FAILED)
		return FAKE_OOM;
	fake.device[addr] = {bytes, range::MAPPED};
	return 0;
}

FAKE_API int cuMemUnmap(uint64_t addr, size_t bytes)
{
	CALL(cuMemUnmap);
	auto it = fake.device.find(addr);

	if (it == fake.device.end() || it->second.kind != range::MAPPED || it->second.bytes != bytes)
		return FAKE_INVALID;
	fake.count.waits++;
	fake_drain(h, NULL, true);
	mmap((void *)addr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	fake.device.erase(addr);
	return 0;
}

FAKE_API int cuMemSetAccess(uint64_t addr, size_t bytes, const void *, size_t n)
{
	CALL(cuMemSetAccess);
	if (!fake.device.count(addr) || n != 1)
		return FAKE_INVALID;
	return mprotect((void *)addr, bytes, PROT_READ | PROT_WRITE) ? FAKE_OOM : 0;
}
