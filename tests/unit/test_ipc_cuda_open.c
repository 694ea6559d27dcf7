/* SPDX-License-Identifier: MIT */
/* Finding the driver, a GPU and the kernels, and every way in which that fails: on the fake driver. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "ipc/kvtier_cuda.h"
#include "shm/util.h"
#include "tests/unit/fake_gpu.h"

static struct fake_gpu fake;

/* A driver that opened stays open: what must not succeed comes first. */
static void refuse(const char *driver, const char *words, const char *line)
{
	struct kvtier_cuda *g = NULL;

	setenv("KVTIER_LIBCUDA", driver, 1);
	setenv("KVT_FAKE_CUDA", words, 1);
	assert_int_equal(kvtier_cuda_open(NULL, &g), KVT_E_GPU);
	assert_null(g);
	if (!strstr(kvtier_last_error(), line))
		fail_msg("\"%s\" does not say \"%s\"", kvtier_last_error(), line);
	assert_null(strchr(kvtier_last_error(), '\n'));
	setenv("KVTIER_LIBCUDA", fake.path, 1);
	setenv("KVT_FAKE_CUDA", "", 1);
}

static void test_no_driver(void **state)
{
	refuse("/nonexistent/libcuda.so.1", "", "/nonexistent/libcuda.so.1");
	refuse(fake.kernels, "", "no CUDA driver"); /* a file that is no library */
}

static void test_old_driver(void **state)
{
	refuse("libm.so.6", "", "no symbol cuInit, must be a driver for CUDA 12.0 or later");
	refuse(fake.path, "old", "driver: for CUDA 11.8, must be for 12.0 or later");
}

static void test_broken_driver(void **state)
{
	refuse(fake.path, "stub", "(34)");
	refuse(fake.path, "nodev", "cuInit: CUDA_ERROR_NO_DEVICE (100)");
	refuse(fake.path, "init=999", "cuInit: CUDA_ERROR_UNKNOWN (999)");
	refuse(fake.path, "init=12345", "cuInit: unknown error (12345)");
}

static void test_refused_devices(void **state)
{
	struct kvtier_cuda_opts o = {.size = sizeof(o), .device = 1};
	struct kvtier_cuda *g = NULL;

	assert_int_equal(kvtier_cuda_open(&o, &g), KVT_E_GPU);
	assert_string_equal(kvtier_last_error(), "device: 1, must be below the 1 that the driver shows");
	o.device = -1;
	assert_int_equal(kvtier_cuda_open(&o, &g), KVT_E_GPU);
	o.device = 0;
	fake.set("major=7");
	assert_int_equal(kvtier_cuda_open(&o, &g), KVT_E_GPU);
	assert_non_null(strstr(kvtier_last_error(), "compute capability 7.0, must be 8.0 or later"));
	fake.set(NULL);
	o.size = 3;
	assert_int_equal(kvtier_cuda_open(&o, &g), KVT_E_INVAL);
	assert_int_equal(kvtier_cuda_open(NULL, NULL), KVT_E_INVAL);
	assert_null(g);
	assert_int_equal(fake_gpu_counts(&fake).contexts, 0);
}

static void test_kernels(void **state)
{
	char bad[] = "/tmp/kvt-bad-XXXXXX";
	struct kvtier_cuda_opts o = {.size = sizeof(o), .kernels = "/nonexistent/kernels"};
	struct kvtier_cuda *g = NULL;
	int fd;

	assert_int_equal(kvtier_cuda_open(&o, &g), KVT_E_IO);
	assert_non_null(strstr(kvtier_last_error(), "/nonexistent/kernels: No such file"));
	fd = mkstemp(bad);
	assert_true(fd >= 0);
	o.kernels = bad;
	assert_int_equal(kvtier_cuda_open(&o, &g), KVT_E_IO); /* empty */
	assert_int_equal(write(fd, "not kernels", 11), 11);
	assert_int_equal(kvtier_cuda_open(&o, &g), KVT_E_IO);
	assert_non_null(
		strstr(kvtier_last_error(), "kernels: cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE (200)"));
	close(fd);
	unlink(bad);
	o.kernels = "/tmp";
	assert_int_equal(kvtier_cuda_open(&o, &g), KVT_E_IO);
	o.kernels = NULL;
	unsetenv("KVTIER_CUDA_KERNELS"); /* the tests' folder has none beside this program */
	assert_int_equal(kvtier_cuda_open(&o, &g), KVT_E_IO);
	assert_non_null(strstr(kvtier_last_error(), "beside the library"));
	setenv("KVTIER_CUDA_KERNELS", fake.kernels, 1);
	assert_int_equal(fake_gpu_counts(&fake).contexts, 0);
}

static void test_info(void **state)
{
	struct kvtier_cuda_info i = {.size = sizeof(i)};
	struct kvtier_cuda *g = NULL;
	struct fake_cuda_counts c;

	assert_int_equal(kvtier_cuda_open(NULL, &g), 0);
	assert_int_equal(kvtier_cuda_info(g, &i), 0);
	assert_string_equal(i.name, "Fake GPU of host memory");
	assert_int_equal(i.major, 9);
	assert_int_equal(i.driver, 12080);
	assert_int_equal(i.numa_node, -1);
	assert_int_equal(i.bytes, UINT64_C(4) << 30);
	c = fake_gpu_counts(&fake);
	assert_int_equal(c.contexts, 1);
	assert_int_equal(c.allocs, 1); /* the checksum tables */
	assert_int_equal(i.free_bytes, i.bytes - c.bytes);
	assert_int_equal(kvtier_cuda_info(g, NULL), KVT_E_INVAL);
	kvtier_cuda_close(g);
	kvtier_cuda_close(NULL);
	c = fake_gpu_counts(&fake);
	assert_int_equal(c.contexts + c.allocs + c.streams + c.modules + c.violations, 0);
}

/* Whatever call fails, and with whatever, nothing of a half-opened GPU stays. */
static void test_every_call_fails(void **state)
{
	static const char *const calls[] = {
		"cuDevicePrimaryCtxRetain", "cuModuleLoadData",     "cuModuleGetFunction", "cuMemAlloc_v2",
		"cuStreamCreate",           "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"};
	static const int codes[] = {2, 1, 719};
	char words[64];

	for (size_t i = 0; i < ARRAY_SIZE(calls); i++)
		for (size_t k = 0; k < ARRAY_SIZE(codes); k++) {
			struct kvtier_cuda *g = NULL;
			struct fake_cuda_counts c;

			snprintf(words, sizeof(words), "fail=%s:%d@1", calls[i], codes[k]);
			fake.set(words);
			if (!kvtier_cuda_open(NULL, &g))
				fail_msg("%s: not noticed", words);
			assert_null(g);
			snprintf(words, sizeof(words), "(%d)", codes[k]);
			assert_non_null(strstr(kvtier_last_error(), words));
			c = fake_gpu_counts(&fake);
			if (c.contexts + c.allocs + c.streams + c.modules)
				fail_msg("%s of %s: something stays", words, calls[i]);
			assert_int_equal(c.violations, 0);
		}
	fake.set(NULL);
}

static void *open_one(void *arg)
{
	struct kvtier_cuda *g = NULL;

	*(int *)arg = kvtier_cuda_open(NULL, &g);
	kvtier_cuda_close(g);
	return NULL;
}

static void test_threads(void **state)
{
	pthread_t t[8];
	int r[8];

	for (int i = 0; i < 8; i++)
		assert_int_equal(pthread_create(&t[i], NULL, open_one, &r[i]), 0);
	for (int i = 0; i < 8; i++) {
		pthread_join(t[i], NULL);
		assert_int_equal(r[i], 0);
	}
	assert_int_equal(fake_gpu_counts(&fake).contexts, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_no_driver),        cmocka_unit_test(test_old_driver),
		cmocka_unit_test(test_broken_driver),    cmocka_unit_test(test_refused_devices),
		cmocka_unit_test(test_kernels),          cmocka_unit_test(test_info),
		cmocka_unit_test(test_every_call_fails), cmocka_unit_test(test_threads),
	};
	int r;

	if (!fake_gpu_init(&fake) || !fake_gpu_hooks(&fake)) {
		printf("1..0 # SKIP %s is not built (make tests-bin)\n", fake.path);
		return 0;
	}
	r = cmocka_run_group_tests(tests, NULL, NULL);
	unlink(fake.kernels);
	return r;
}
