/* SPDX-License-Identifier: MIT */
/* libkvtier's kernels as C++, by name: see fake_cuda.h beside this. */
#include "kernels_host.h"

#include <vector>

#include "ipc/cuda/all.cuh"

#define _Atomic volatile /* of one field of a C struct that is not looked at here */
#include "ipc/cuda/kernels.h"

template <typename A> static void run(void (*fn)(A), void *args)
{
	fn(*(A *)args);
}

/* Addresses among a kernel's arguments. 0 where the kernel takes it for "none". */
static std::vector<uint64_t> addresses(const extend_args &a)
{
	return {a.maps.slot_of, a.maps.pos_of, a.count};
}
static std::vector<uint64_t> addresses(const gather_args &a)
{
	return {a.maps.slot_of, a.lane, a.copy_out, a.to_dram, a.page, a.out, a.crc};
}
static std::vector<uint64_t> addresses(const scatter_args &a)
{
	return {a.lane, a.page, a.bring_in, a.bad, a.crc};
}
static std::vector<uint64_t> addresses(const compact_args &a)
{
	return {a.maps.slot_of, a.maps.pos_of, a.lane, a.to,    a.resident,
		a.bring_in,     a.count,       a.in,   a.after, a.scratch};
}
static std::vector<uint64_t> addresses(const word_args &a)
{
	return {a.addr};
}
static std::vector<uint64_t> addresses(const score_args &a)
{
	return {a.scorer, a.rows, a.slot_of, a.out};
}
static std::vector<uint64_t> addresses(const find_index &x)
{
	return {x.page, x.sum, x.alive, x.list, x.start, x.group, x.groups, x.bits, x.rank, x.rows, x.lane};
}
static std::vector<uint64_t> addresses(const find_sum_args &a)
{
	return {a.ix.page, a.ix.sum, a.ix.lane, a.fresh};
}
static std::vector<uint64_t> addresses(const find_mark_args &a)
{
	std::vector<uint64_t> v = addresses(a.ix);

	v.push_back(a.resident);
	return v;
}
static std::vector<uint64_t> addresses(const find_args &a)
{
	std::vector<uint64_t> v = addresses(a.ix);

	for (uint64_t x : {a.q, a.qt, a.spread, a.top, a.bound, a.order, a.probed, a.count, a.logit, a.part,
			   a.score, a.near, a.take, a.left, a.base, a.k, a.v, a.counts, a.positions})
		v.push_back(x);
	return v;
}

template <typename A> static size_t bytes_of(void (*)(A))
{
	return sizeof(A);
}
template <typename A> static size_t list(void (*)(A), const void *args, uint64_t *ret)
{
	size_t n = 0;

	for (uint64_t x : addresses(*(const A *)args))
		if (x)
			ret[n++] = x;
	return n;
}

#define X(name)                                                                                                \
	{#name, bytes_of(name), [](void *args) { run(name, args); },                                           \
	 [](const void *args, uint64_t *ret) { return list(name, args, ret); }},
static const struct host_kernel table[] = {CUDA_KERNELS(X)};
#undef X

const struct host_kernel *host_kernel_find(const char *name)
{
	for (const struct host_kernel &k : table)
		if (strcmp(k.name, name) == 0)
			return &k;
	return NULL;
}
