/* SPDX-License-Identifier: MIT */
#pragma once
/* A core, the fake driver and one runtime, and proof afterwards that nothing of the GPU stayed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "tests/unit/fake_gpu.h"
#include "tests/unit/gpu_live.h"

static struct fake_gpu fake;
static struct harness h;
static struct gpu gpu;
static struct runtime rt;
static struct kvtier_cuda_window *window;
static struct fake_cuda_counts base;

static inline void assert_ok(int r)
{
	if (r < 0)
		fail_msg("%s: %s", kvtier_strerror(r), kvtier_last_error());
	assert_int_equal(r, 0);
}

/* The last call failed so, and says so. */
static inline void assert_said(int r, int code, const char *line)
{
	if (r != code)
		fail_msg("%d (%s), must be %d: %s", r, kvtier_strerror(r), code, kvtier_last_error());
	if (!strstr(kvtier_last_error(), line))
		fail_msg("\"%s\" does not say \"%s\"", kvtier_last_error(), line);
}

static inline void begin_core(bool nvme)
{
	fake.set(NULL);
	base = fake_gpu_counts(&fake);
	assert_int_equal(base.violations, 0);
	harness_init(&h, nvme);
	strcpy(h.cfg.policy, "random");
	h.cfg.tenant[0].direct = true;
	assert_true(harness_start(&h));
}

static inline void begin(bool nvme, uint64_t window_bytes)
{
	begin_core(nvme);
	assert_ok(rt_open(&rt, h.sock[0], 2));
	assert_ok(gpu_open(&gpu));
	assert_ok(kvtier_cuda_window_create(rt.c, gpu.g, window_bytes, &window));
}

/* Nothing of the GPU stays: memory, registrations, streams, contexts. */
static inline void assert_baseline(void)
{
	struct fake_cuda_counts c = fake_gpu_counts(&fake);

	assert_int_equal(c.violations, 0);
	assert_int_equal(c.bytes, base.bytes);
	assert_int_equal(c.allocs, base.allocs);
	assert_int_equal(c.host_allocs, base.host_allocs);
	assert_int_equal(c.registrations, base.registrations);
	assert_int_equal(c.streams, base.streams);
	assert_int_equal(c.events, base.events);
	assert_int_equal(c.modules, base.modules);
	assert_int_equal(c.contexts, base.contexts);
	assert_int_equal(c.vmm_handles + c.vmm_maps + c.vmm_ranges, 0);
}

static inline void end_runtime(void)
{
	kvtier_cuda_window_close(window);
	window = NULL;
	gpu_close(&gpu);
	rt_close(&rt);
}

static inline void end_core(void)
{
	harness_stop(&h);
	harness_rm(h.dir);
}

static inline void end(void)
{
	end_runtime();
	end_core();
	assert_baseline();
}

/* Of a process with open descriptors only: their number. */
static inline int open_fds(void)
{
	DIR *d = opendir("/proc/self/fd");
	int n = 0;

	while (d && readdir(d))
		n++;
	if (d)
		closedir(d);
	return n;
}

static inline int gpu_main(const struct CMUnitTest *tests, size_t n)
{
	int r;

	if (!fake_gpu_init(&fake) || !fake_gpu_hooks(&fake)) {
		printf("1..0 # SKIP %s is not built (make tests-bin)\n", fake.path);
		return 0;
	}
	r = _cmocka_run_group_tests("cuda", tests, n, NULL, NULL);
	unlink(fake.kernels);
	return r;
}
