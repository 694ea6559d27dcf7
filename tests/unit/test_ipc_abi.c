/* SPDX-License-Identifier: MIT */
/* The headers, the version script and the shared library name the same functions. */
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>
#include "ipc/kvtier.h"

#define MAX 128

static char *slurp(const char *path)
{
	char *buf = calloc(1, 1 << 20);
	FILE *f = fopen(path, "r");

	assert_non_null(buf);
	if (!f) {
		free(buf);
		return NULL;
	}
	assert_true(fread(buf, 1, (1 << 20) - 1, f) > 0);
	fclose(f);
	return buf;
}

/* The first kvtier_* word after p, into name; the place behind it. */
static const char *word(const char *p, char name[64])
{
	size_t n;

	p = strstr(p, "kvtier_");
	if (!p)
		return NULL;
	n = strspn(p, "abcdefghijklmnopqrstuvwxyz_0123456789");
	assert_true(n < 64);
	memcpy(name, p, n);
	name[n] = 0;
	return p + n;
}

static int header_names(const char *text, char names[][64])
{
	const char *p = text;
	int n = 0;

	p = strstr(p, "#define KVT_PUBLIC");
	assert_non_null(p);
	for (p = strstr(p + 1, "\nKVT_PUBLIC"); p; p = strstr(p + 1, "\nKVT_PUBLIC")) {
		const char *q = p;

		/* the name is the word right before the first parenthesis */
		assert_true(n < MAX);
		do
			q = word(q, names[n]);
		while (q && *q != '(');
		assert_non_null(q);
		n++;
	}
	return n;
}

/* Of both headers. */
static int all_header_names(char names[][64])
{
	static const char *const files[] = {"ipc/kvtier.h", "ipc/kvtier_cuda.h"};
	int n = 0;

	for (size_t i = 0; i < 2; i++) {
		char *text = slurp(files[i]);
		char *at = text;

		if (!text)
			return -1;
		if (i) { /* no definition of its own to begin behind */
			at = malloc(strlen(text) + 32);
			assert_non_null(at);
			sprintf(at, "#define KVT_PUBLIC%s", text);
		}
		n += header_names(at, names + n);
		if (at != text)
			free(at);
		free(text);
	}
	return n;
}

static int map_names(const char *text, char names[][64])
{
	const char *p = strstr(text, "global:");
	int n = 0;

	assert_non_null(p);
	while ((p = word(p, names[n])))
		if (*p == ';')
			n++;
	return n;
}

static int by_name(const void *a, const void *b)
{
	return strcmp(a, b);
}

static void test_map_is_header(void **state)
{
	static char in_header[MAX][64], in_map[MAX][64];
	char *m = slurp("ipc/libkvtier.map");
	int nh = m ? all_header_names(in_header) : -1, nm;

	if (nh < 0) {
		print_message("# SKIP not started in the source tree\n");
		free(m);
		skip();
	}
	nm = map_names(m, in_map);
	assert_true(nh > 25);
	qsort(in_header, (size_t)nh, 64, by_name);
	qsort(in_map, (size_t)nm, 64, by_name);
	for (int i = 0; i < nh && i < nm; i++)
		assert_string_equal(in_header[i], in_map[i]);
	assert_int_equal(nh, nm);
	free(m);
}

static void test_library_exports_header(void **state)
{
	static char names[MAX][64];
	char path[512];
	ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 64);
	uint32_t (*version)(void);
	void *lib = NULL;
	int count = all_header_names(names);

	assert_true(n > 0);
	path[n] = 0;
	for (int up = 0; up < 3; up++) /* <build>/tests/unit/this */
		*strrchr(path, '/') = 0;
	strcat(path, "/libkvtier.so.0");
	if (count > 0 && !access(path, R_OK))
		lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!lib) {
		print_message("# SKIP %s is not built or cannot be loaded here\n", path);
		skip();
	}
	for (int i = 0; i < count; i++)
		if (!dlsym(lib, names[i]))
			fail_msg("%s is not exported", names[i]);
	/* and nothing else: the rooms inside stay inside */
	assert_null(dlsym(lib, "seg_create"));
	assert_null(dlsym(lib, "wire_check"));
	*(void **)&version = dlsym(lib, "kvtier_abi_version");
	assert_int_equal(version(), KVT_ABI_VERSION);
	dlclose(lib);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_map_is_header),
		cmocka_unit_test(test_library_exports_header),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
