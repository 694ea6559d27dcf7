/* SPDX-License-Identifier: MIT */
/* Memory of the fake driver, and copies to and from it: see fake_cuda.h beside this. */
#include "fake_state.h"

#include <cstdio>
#include <memory>
#include <sys/mman.h>

#define GUARD 4096u /* of nothing, on both sides of each allocation */

FAKE_API int cuMemAlloc_v2(uint64_t *ret, size_t bytes)
{
	CALL(cuMemAlloc_v2);
	size_t size = (bytes + 4095) / 4096 * 4096, slack = (size - bytes) / 256 * 256;
	char *p;

	if (!bytes)
		return FAKE_INVALID;
	if (!fake_room(bytes))
		return FAKE_OOM;
	p = (char *)mmap(NULL, size + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED || mprotect(p + GUARD, size, PROT_READ | PROT_WRITE))
		return FAKE_OOM;
	memset(p + GUARD, 0xff, size);
	/* Its end lies against the guard, as near as the alignment of 256 lets it. */
	*ret = (uint64_t)(p + GUARD + slack);
	fake.device[*ret] = {bytes, range::ALLOC};
	fake.count.bytes += bytes;
	return 0;
}

FAKE_API int cuMemFree_v2(uint64_t addr)
{
	CALL(cuMemFree_v2);
	auto it = fake.device.find(addr);
	uint64_t start = addr / 4096 * 4096;

	if (!addr)
		return 0;
	if (it == fake.device.end() || it->second.kind != range::ALLOC) {
		fake_complain("cuMemFree: %#llx is not allocated", (unsigned long long)addr);
		return FAKE_INVALID;
	}
	fake.count.waits++;
	fake_drain(h, NULL, true);
	if (fake.lost)
		return fake.lost;
	fake.count.bytes -= it->second.bytes;
	munmap((void *)(start - GUARD), (addr - start + it->second.bytes + 4095) / 4096 * 4096 + 2 * GUARD);
	fake.device.erase(addr);
	return 0;
}

static bool writable(const void *p)
{
	unsigned long from, to;
	char mode[8], line[512];
	FILE *f = fopen("/proc/self/maps", "re");
	bool yes = false;

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "%lx-%lx %7s", &from, &to, mode) == 3 && (unsigned long)p >= from &&
		    (unsigned long)p < to)
			yes = mode[1] == 'w';
	if (f)
		fclose(f);
	return yes;
}

/* The GPU's own name for shared host memory; private memory has only the one. */
static void add_host(void *p, uint64_t bytes, bool allocated)
{
	void *twin = mremap(p, 0, bytes, MREMAP_MAYMOVE);
	bool alias = twin != MAP_FAILED;
	uint64_t at = (uint64_t)(alias ? twin : p);

	fake.host[(uint64_t)p] = {bytes, at, allocated, alias};
	fake.device[at] = {bytes, range::HOST};
}

FAKE_API int cuMemHostRegister_v2(void *p, size_t bytes, unsigned flags)
{
	CALL(cuMemHostRegister_v2);
	if (!p || !bytes || ((uint64_t)p | bytes) % 4096)
		return FAKE_INVALID;
	if (fake_host_range(p, bytes) != FAKE_PAGEABLE)
		return FAKE_REGISTERED;
	if (!(flags & 8) && !writable(p))
		return FAKE_INVALID;
	if (!fake_room(0))
		return FAKE_OOM;
	add_host(p, bytes, false);
	return 0;
}

/* What was started before ends first, as with the real driver; then the GPU reaches it no more. */
static int unmap_host(held &h, decltype(fake.host)::iterator it)
{
	fake.count.waits++;
	fake_drain(h, NULL, true);
	if (fake.lost)
		return fake.lost;
	if (it->second.alias)
		munmap((void *)it->second.device, it->second.bytes);
	fake.device.erase(it->second.device);
	return 0;
}

FAKE_API int cuMemHostUnregister(void *p)
{
	CALL(cuMemHostUnregister);
	auto it = fake.host.find((uint64_t)p);

	if (it == fake.host.end() || it->second.allocated) {
		fake_complain("cuMemHostUnregister: %p is not registered", p);
		return FAKE_NOT_REGISTERED;
	}
	if (int lost = unmap_host(h, it))
		return lost;
	fake.host.erase(it);
	return 0;
}

FAKE_API int cuMemHostGetDevicePointer_v2(uint64_t *ret, void *p, unsigned)
{
	CALL(cuMemHostGetDevicePointer_v2);
	for (auto &r : fake.host)
		if ((uint64_t)p >= r.first && (uint64_t)p < r.first + r.second.bytes) {
			*ret = r.second.device + ((uint64_t)p - r.first);
			return 0;
		}
	return FAKE_INVALID;
}

FAKE_API int cuMemHostAlloc(void **ret, size_t bytes, unsigned)
{
	CALL(cuMemHostAlloc);
	size_t size = (bytes + 4095) / 4096 * 4096;
	void *p;

	if (!bytes)
		return FAKE_INVALID;
	if (!fake_room(0))
		return FAKE_OOM;
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return FAKE_OOM;
	memset(p, 0xff, size);
	add_host(p, size, true);
	*ret = p;
	return 0;
}

FAKE_API int cuMemFreeHost(void *p)
{
	CALL(cuMemFreeHost);
	auto it = fake.host.find((uint64_t)p);

	if (it == fake.host.end() || !it->second.allocated) {
		fake_complain("cuMemFreeHost: %p is not allocated", p);
		return FAKE_INVALID;
	}
	if (int lost = unmap_host(h, it))
		return lost;
	munmap(p, it->second.bytes);
	fake.host.erase(it);
	return 0;
}

/* ---- copies ---------------------------------------------------------------------------------------------- */

FAKE_API int cuMemcpyHtoDAsync_v2(uint64_t dst, const void *src, size_t n, void *s)
{
	CALL(cuMemcpyHtoDAsync_v2);
	fake_host kind = fake_host_range(src, n);

	fake.count.copies++;
	if (!fake_device_range(dst, n, "cuMemcpyHtoDAsync"))
		return FAKE_INVALID;
	if (kind == FAKE_HALF)
		fake_complain("cuMemcpyHtoDAsync: %p + %zu is registered in part", src, n);
	if (kind == FAKE_PINNED)
		return fake_put(h, s, [dst, src, n] { memcpy((void *)dst, src, n); });
	/* Other memory is taken before the call returns. */
	fake.count.pageable++;
	auto taken = std::make_shared<std::string>((const char *)src, n);

	return fake_put(h, s, [dst, taken] { memcpy((void *)dst, taken->data(), taken->size()); });
}

FAKE_API int cuMemcpyDtoHAsync_v2(void *dst, uint64_t src, size_t n, void *s)
{
	CALL(cuMemcpyDtoHAsync_v2);
	fake_host kind = fake_host_range(dst, n);
	int r;

	fake.count.copies++;
	if (!fake_device_range(src, n, "cuMemcpyDtoHAsync") || !fake_stream(s))
		return FAKE_INVALID;
	r = fake_put(h, s, [dst, src, n] { memcpy(dst, (void *)src, n); });
	if (kind == FAKE_HALF)
		fake_complain("cuMemcpyDtoHAsync: %p + %zu is registered in part", dst, n);
	if (kind != FAKE_PINNED && !r) {
		fake.count.pageable++;
		fake_drain(h, fake_stream(s), false);
	}
	return r;
}

FAKE_API int cuMemsetD8Async(uint64_t dst, unsigned char v, size_t n, void *s)
{
	CALL(cuMemsetD8Async);
	if (!fake_device_range(dst, n, "cuMemsetD8Async"))
		return FAKE_INVALID;
	return fake_put(h, s, [dst, v, n] { memset((void *)dst, v, n); });
}
