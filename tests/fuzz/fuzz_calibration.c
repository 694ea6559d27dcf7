/* SPDX-License-Identifier: MIT */
/*
 * Calibrations from a stranger: a table as it is (byte 0 even) or a fitted one with words changed, alone and as
 * a file with its checksum made right. What is accepted gives finite, ascending values for any score.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "policy/calibrate.h"
#include "shm/crc.h"
#include "shm/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum {
	LANES = 3,
	HEAD = 120,
	BODY = 16
}; /* of the file: what comes before the table, what the CRC leaves out */

static const struct calibrate_shape shape = {
	.lanes = LANES, .knots = 4, .lengths = 2, .distances = 2, .length_edge = {100}, .distance_edge = {50}};
static float *fitted;
static size_t fitted_size;
static int fd = -1;

static void must(int ok)
{
	if (!ok)
		abort();
}

static void prepare(void)
{
	struct calibrate_point p[64];

	fitted_size = calibrate_bytes(&shape);
	fitted = calloc(1, fitted_size);
	must(fitted != NULL);
	calibrate_begin(fitted, &shape);
	for (uint32_t l = 0; l < LANES; l++) {
		for (uint32_t i = 0; i < 64; i++)
			p[i] = (struct calibrate_point){(float)i, (float)(i * l) / 64, i, 128};
		must(!calibrate_fit(fitted, &shape, l, 1, p, 64));
	}
	fd = memfd_create("calibration", MFD_CLOEXEC);
	must(fd >= 0);
}

static void use(const struct calibration *c)
{
	static const float scores[] = {-INFINITY, -3e38f, -1, 0, 1, 2e38f, 3e38f, INFINITY};

	for (uint32_t l = 0; l < c->shape.lanes; l++) {
		must(isfinite(calibrate_sensitivity(c, l)));
		for (uint32_t n = 1; n < 3000; n = n * 7 + 1)
			for (uint32_t d = 0; d < n; d = d * 5 + 1) {
				float before = 0;

				for (size_t i = 0; i < ARRAY_SIZE(scores); i++) {
					float v = calibrate_value(c, l, scores[i], d, n);

					must(isfinite(v) && v >= 0);
					if (isfinite(scores[i])) /* one that is not counts as the lowest */
						must(v >= before), before = v;
				}
				must(isfinite(calibrate_value(c, l, NAN, d, n)));
			}
	}
}

static void parse(const void *bytes, size_t size)
{
	_cleanup_free_ void *exact = malloc(size ? size : 1);
	struct calibration c;
	char err[256] = "";

	must(exact != NULL);
	memcpy(exact, bytes, size);
	if (!calibrate_parse(&c, exact, size, LANES, err, sizeof(err)))
		use(&c);
	else
		must(*err && !strchr(err, '\n'));
}

static void load(const uint8_t *file, size_t size)
{
	struct calibration c;
	char path[64], err[256] = "";

	must(!ftruncate(fd, 0) && pwrite(fd, file, size, 0) == (ssize_t)size);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	if (!calibrate_load(&c, path, LANES, err, sizeof(err))) {
		use(&c);
		must(strnlen(c.policy, sizeof(c.policy)) < sizeof(c.policy) &&
		     strnlen(c.model, sizeof(c.model)) < sizeof(c.model));
		calibrate_drop(&c);
	} else {
		must(*err && !strchr(err, '\n'));
	}
}

/* As calibrate_write() makes them, of any table. */
static void load_as_file(const void *table, size_t size, int cut)
{
	_cleanup_free_ uint8_t *f = calloc(1, HEAD + size);
	uint64_t total = HEAD + size;
	uint32_t word = 1;

	must(f != NULL);
	memcpy(f, "KVTCALIB", 8);
	memcpy(f + 8, &word, 4);
	memcpy(f + 16, &total, 8);
	strcpy((char *)f + 24, "knorm");
	strcpy((char *)f + 56, "m");
	memcpy(f + HEAD, table, size);
	word = crc32c(0, f + BODY, total - BODY);
	memcpy(f + 12, &word, 4);
	load(f, total - MIN((size_t)cut, (size_t)total));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	_cleanup_free_ float *table = NULL;
	size_t bytes;

	if (fd < 0)
		prepare();
	if (size < 2)
		return 0;
	if (data[0] % 2 == 0) {
		parse(data + 2, size - 2);
		load(data + 2, size - 2);
		return 0;
	}
	table = malloc(fitted_size);
	must(table != NULL);
	memcpy(table, fitted, fitted_size);
	bytes = fitted_size - MIN((size_t)data[1] % 32, fitted_size);
	for (size_t i = 2; i + 5 <= size; i += 5)
		memcpy(&table[data[i] % (fitted_size / 4)], data + i + 1, 4);
	parse(table, bytes);
	load_as_file(table, fitted_size, data[1] >> 6);
	return 0;
}
