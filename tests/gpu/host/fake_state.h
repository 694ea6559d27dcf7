/* SPDX-License-Identifier: MIT */
#pragma once
/* The fake driver inside. One lock guards everything; work runs without it. */
#include "fake_cuda.h"
#include "kernels_host.h"

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

enum {
	FAKE_INVALID = 1,
	FAKE_OOM = 2,
	FAKE_NOT_INITIALIZED = 3,
	FAKE_NO_DEVICE = 100,
	FAKE_BAD_DEVICE = 101,
	FAKE_BAD_IMAGE = 200,
	FAKE_BAD_CONTEXT = 201,
	FAKE_BAD_HANDLE = 400,
	FAKE_NOT_FOUND = 500,
	FAKE_NOT_READY = 600,
	FAKE_BAD_ADDRESS = 700,
	FAKE_REGISTERED = 712,
	FAKE_NOT_REGISTERED = 713,
};

/* Addresses that the GPU may use. */
struct range {
	uint64_t bytes;
	enum { ALLOC, HOST, MAPPED } kind;
};
struct host_range {
	uint64_t bytes, device; /* device: its address for the GPU */
	bool allocated, alias;
};
struct stream {
	std::deque<std::function<void()>> work;
	bool running = false;
};
struct event {
	bool done = true;
	uint64_t ns = 0;
};
struct failure {
	std::string call;
	int code;
	long left;
};

struct fake {
	std::mutex lock;
	std::condition_variable changed;
	std::mutex kernels; /* fibers.cc runs one launch at a time */
	enum { NOW, ASYNC, LAZY } mode = NOW;
	bool initialized = false, worker = false;
	int init_code = 0, version = 12080, major = 9, lost = 0, contexts = 0;
	uint64_t memory = UINT64_C(4) << 30;
	long oom_after = -1, crash_left = 0;
	int crash_code = 0;
	std::vector<failure> failures;
	std::map<uint64_t, range> device;
	std::map<uint64_t, host_range> host;
	std::set<stream *> streams;
	std::set<event *> events;
	std::set<void *> modules;
	std::map<uint64_t, int> handles; /* of physical memory: a memfd */
	std::map<uint64_t, uint64_t> reserved;
	uint64_t next_handle = 1, seed = 88172645463325252u;
	struct fake_cuda_counts count = {};
};
extern struct fake &fake;
extern thread_local int fake_contexts; /* pushed on this thread */

using held = std::unique_lock<std::mutex>;

/* What every call does first: a failure that was asked for, an earlier loss, no context. */
int fake_enter(const char *call, bool needs_context);
#define CALL(name)                                                                                             \
	held h(fake.lock);                                                                                     \
	if (int entered = fake_enter(#name, true))                                                             \
	return entered
/* May one more thing be allocated? */
bool fake_room(uint64_t bytes);
/* Is [addr, addr + n) the GPU's to use, or [p, p + n) registered host memory? Complains when it is neither. */
bool fake_device_range(uint64_t addr, uint64_t n, const char *what);
enum fake_host { FAKE_PAGEABLE, FAKE_PINNED, FAKE_HALF };
fake_host fake_host_range(const void *p, uint64_t n);
void fake_complain(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* Add work to a stream (NULL: the default one) and do what the mode says; `h` is released meanwhile. */
int fake_put(held &h, void *s, std::function<void()> work);
/* Until the stream, or with `all` every stream, is at rest. */
void fake_drain(held &h, stream *s, bool all);
stream *fake_stream(void *s);
bool fake_step_one(held &h, stream *only);
uint64_t fake_random(void);
/* The context is gone: everything in it too. */
void fake_reset(void);

#define FAKE_API extern "C" __attribute__((visibility("default")))
