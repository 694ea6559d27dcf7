/* SPDX-License-Identifier: MIT */
/* The fake driver's streams, failures and bookkeeping: see fake_cuda.h beside this. */
#include "fake_state.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

static struct fake &fake_instance(void)
{
	/* Never destroyed: threads of the process may outlive its exit handlers. */
	static struct fake *the = new struct fake;

	return *the;
}
struct fake &fake = fake_instance();
thread_local int fake_contexts;
static stream null_stream;

uint64_t fake_random(void)
{
	fake.seed ^= fake.seed << 13;
	fake.seed ^= fake.seed >> 7;
	fake.seed ^= fake.seed << 17;
	return fake.seed;
}

void fake_complain(const char *fmt, ...)
{
	va_list ap;

	fake.count.violations++;
	fputs("# fake driver: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
}

/* ---- failures ---------------------------------------------------------------------------- */

static bool loses(int code)
{
	return (code >= 700 && code < 712) || (code >= 713 + 1 && code < 722) || code == 214 || code == 999;
}

int fake_enter(const char *call, bool needs_context)
{
	if (!fake.initialized)
		return FAKE_NOT_INITIALIZED;
	for (failure &f : fake.failures)
		if (f.call == call && f.left > 0 && --f.left == 0) {
			if (loses(f.code))
				fake.lost = f.code;
			return f.code;
		}
	if (needs_context && fake.lost)
		return fake.lost;
	return needs_context && !fake_contexts ? FAKE_BAD_CONTEXT : 0;
}

bool fake_room(uint64_t bytes)
{
	fake.count.alloc_calls++;
	if (fake.oom_after == 0 || fake.count.bytes + bytes > fake.memory)
		return false;
	if (fake.oom_after > 0)
		fake.oom_after--;
	return true;
}

static void take_word(const char *w)
{
	char call[64];
	long n = 1;
	int code;

	if (!strcmp(w, "async"))
		fake.mode = fake::ASYNC;
	else if (!strcmp(w, "lazy"))
		fake.mode = fake::LAZY;
	else if (!strcmp(w, "stub"))
		fake.init_code = 34;
	else if (!strcmp(w, "nodev"))
		fake.init_code = FAKE_NO_DEVICE;
	else if (!strcmp(w, "old"))
		fake.version = 11080;
	else if (sscanf(w, "init=%d", &code) == 1)
		fake.init_code = code;
	else if (sscanf(w, "major=%d", &code) == 1)
		fake.major = code;
	else if (sscanf(w, "oom_after=%ld", &n) == 1)
		fake.oom_after = n;
	else if (sscanf(w, "memory=%ld", &n) == 1)
		fake.memory = (uint64_t)n << 20;
	else if (sscanf(w, "fail=%63[^:]:%d@%ld", call, &code, &n) >= 2)
		fake.failures.push_back({call, code, n});
	else if (sscanf(w, "crash=%d@%ld", &code, &n) >= 1)
		fake.crash_code = code, fake.crash_left = n;
	else
		fake_complain("KVT_FAKE_CUDA: %s: not known", w);
}

FAKE_API void fake_cuda_set(const char *words)
{
	held h(fake.lock);
	std::string all = words ? words : "";

	fake_drain(h, NULL, true);
	fake.mode = fake::NOW;
	fake.init_code = fake.lost = fake.crash_code = 0;
	fake.crash_left = 0;
	fake.version = 12080;
	fake.major = 9;
	fake.oom_after = -1;
	fake.memory = UINT64_C(4) << 30;
	fake.failures.clear();
	for (size_t at = 0, end; at < all.size(); at = end + 1) {
		end = all.find(',', at);
		end = end == std::string::npos ? all.size() : end;
		take_word(all.substr(at, end - at).c_str());
	}
}

FAKE_API void fake_cuda_counts(struct fake_cuda_counts *ret)
{
	held h(fake.lock);

	*ret = fake.count;
	ret->streams = fake.streams.size();
	ret->events = fake.events.size();
	ret->modules = fake.modules.size();
	ret->contexts = (uint64_t)fake.contexts;
	ret->vmm_handles = fake.handles.size();
	ret->vmm_ranges = fake.reserved.size();
	ret->allocs = ret->vmm_maps = ret->host_allocs = ret->registrations = 0;
	for (auto &r : fake.device) {
		ret->allocs += r.second.kind == range::ALLOC;
		ret->vmm_maps += r.second.kind == range::MAPPED;
	}
	for (auto &r : fake.host)
		(r.second.allocated ? ret->host_allocs : ret->registrations)++;
	ret->queued = null_stream.work.size();
	for (stream *s : fake.streams)
		ret->queued += s->work.size();
}

/* ---- addresses ------------------------------------------------------------------------------ */

bool fake_device_range(uint64_t addr, uint64_t n, const char *what)
{
	auto it = fake.device.upper_bound(addr);

	if (it != fake.device.begin()) {
		--it;
		if (addr + n <= it->first + it->second.bytes)
			return true;
	}
	fake_complain("%s: %#llx + %llu is no memory of the GPU", what, (unsigned long long)addr,
		      (unsigned long long)n);
	return false;
}

fake_host fake_host_range(const void *p, uint64_t n)
{
	uint64_t addr = (uint64_t)p;

	for (auto &r : fake.host)
		if (addr < r.first + r.second.bytes && r.first < addr + n)
			return addr >= r.first && addr + n <= r.first + r.second.bytes ? FAKE_PINNED
										       : FAKE_HALF;
	return FAKE_PAGEABLE;
}

void fake_reset(void)
{
	for (auto &r : fake.device)
		if (r.second.kind == range::ALLOC)
			munmap((void *)r.first, r.second.bytes);
	for (auto &r : fake.host) {
		if (r.second.alias)
			munmap((void *)r.second.device, r.second.bytes);
		if (r.second.allocated)
			munmap((void *)r.first, r.second.bytes);
	}
	for (auto &x : fake.handles)
		close(x.second);
	for (auto &x : fake.reserved)
		munmap((void *)x.first, x.second);
	fake.device.clear();
	fake.host.clear();
	fake.handles.clear();
	fake.reserved.clear();
	for (void *m : fake.modules)
		delete (char *)m;
	fake.modules.clear();
	for (stream *s : fake.streams)
		delete s;
	fake.streams.clear();
	for (event *e : fake.events)
		delete e;
	fake.events.clear();
	null_stream.work.clear();
	fake.count.bytes = 0;
	fake.lost = 0;
}

/* ---- streams ----------------------------------------------------------------------------------- */

stream *fake_stream(void *s)
{
	if (!s || s == (void *)1 || s == (void *)2) /* the default streams have these names too */
		return &null_stream;
	return fake.streams.count((stream *)s) ? (stream *)s : NULL;
}

/* Do the first piece of a stream's work. */
static void run_one(held &h, stream *s)
{
	std::function<void()> work = std::move(s->work.front());

	s->work.pop_front();
	s->running = true;
	h.unlock();
	{
		std::lock_guard<std::mutex> one(fake.kernels);

		work();
	}
	h.lock();
	s->running = false;
	if (fake.lost) { /* what comes after never happens */
		null_stream.work.clear();
		for (stream *x : fake.streams)
			x->work.clear();
	}
	fake.changed.notify_all();
}

bool fake_step_one(held &h, stream *only)
{
	std::vector<stream *> ready;

	if (only) {
		if (only->work.empty() || only->running)
			return false;
		run_one(h, only);
		return true;
	}
	if (!null_stream.work.empty() && !null_stream.running)
		ready.push_back(&null_stream);
	for (stream *s : fake.streams)
		if (!s->work.empty() && !s->running)
			ready.push_back(s);
	if (ready.empty())
		return false;
	run_one(h, ready[fake_random() % ready.size()]);
	return true;
}

static bool at_rest(stream *s, bool all)
{
	if (!all)
		return s->work.empty() && !s->running;
	if (!at_rest(&null_stream, false))
		return false;
	for (stream *x : fake.streams)
		if (!at_rest(x, false))
			return false;
	return true;
}

void fake_drain(held &h, stream *s, bool all)
{
	while (!at_rest(s, all))
		if (fake.mode == fake::ASYNC || !fake_step_one(h, all ? NULL : s))
			fake.changed.wait(h);
}

static void worker(void)
{
	held h(fake.lock);

	for (;;) {
		uint64_t pause = fake_random() % 8 ? 0 : fake_random() % 300;

		if (fake.mode != fake::ASYNC || at_rest(NULL, true)) {
			fake.changed.wait(h);
			continue;
		}
		if (pause) {
			h.unlock();
			usleep((useconds_t)pause);
			h.lock();
		}
		(void)fake_step_one(h, NULL);
	}
}

int fake_put(held &h, void *to, std::function<void()> work)
{
	stream *s = fake_stream(to);

	if (!s)
		return FAKE_BAD_HANDLE;
	s->work.push_back(std::move(work));
	if (fake.mode == fake::NOW)
		fake_drain(h, s, false);
	if (fake.mode == fake::ASYNC && !fake.worker) {
		fake.worker = true;
		std::thread(worker).detach();
	}
	fake.changed.notify_all();
	return 0;
}

FAKE_API int fake_cuda_step(int n)
{
	held h(fake.lock);
	int done = 0;

	while (done < n && fake_step_one(h, NULL))
		done++;
	return done;
}
