/* SPDX-License-Identifier: MIT */
/*
 * Weight files from a stranger: nothing that weights_parse() accepts may make
 * a read leave the file, and nothing that it refuses may go without a reason.
 *
 * No mutation finds a SHA-256 by itself. So an input is either a file as it is
 * (first byte 0 modulo 5), or patches to a valid one of four shapes, sealed
 * again before it is parsed: byte 1 cuts that many bytes off, then every four
 * bytes are a 16-bit place (the upper half of them means the header) and a
 * 16-bit value to put there.
 */
#include "policy/weights.h"
#include "shm/util.h"

#include <stdio.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const struct weights_header shapes[] = {
	{.name = "m",
	 .layers = 1,
	 .heads = 2,
	 .k_dim = 16,
	 .v_dim = 16,
	 .kind = WEIGHTS_KVP,
	 .proj = 32,
	 .pos_kind = WEIGHTS_POS_TABLE,
	 .pos_rows = 3,
	 .pos_dim = 16,
	 .hidden = 32},
	{.name = "m",
	 .layers = 2,
	 .heads = 1,
	 .kind = WEIGHTS_POSITION,
	 .pos_kind = WEIGHTS_POS_LOG2,
	 .pos_rows = 8,
	 .pos_dim = 1},
	{.name = "m", .layers = 2, .heads = 2, .k_dim = 8, .kind = WEIGHTS_QFILTER},
	{.name = "m",
	 .layers = 1,
	 .heads = 2,
	 .k_dim = 16,
	 .v_dim = 16,
	 .rope_type = WEIGHTS_ROPE_HALF,
	 .rope_theta = 10000,
	 .keys = WEIGHTS_KEYS_UNROTATED,
	 .kind = WEIGHTS_KVP,
	 .proj = 32,
	 .pos_kind = WEIGHTS_POS_LOG2,
	 .pos_rows = 3,
	 .pos_dim = 16,
	 .hidden = 32,
	 .rank = 2,
	 .dist_rows = 5,
	 .octave = 2},
};

/* Every tensor's first and last byte, and the calibration's: the sanitizer watches. */
static unsigned touch(const struct weights *w)
{
	unsigned sum = 0;

	for (uint32_t lane = 0; lane < w->lanes; lane++)
		for (uint32_t t = 0; t < w->layout.count; t++) {
			const uint8_t *p = weights_at(w, lane, t);
			size_t bytes =
				(size_t)w->layout.tensor[t].rows * w->layout.tensor[t].cols * w->layout.elem;

			sum += bytes ? p[0] + p[bytes - 1] : 0;
		}
	if (w->h.calib_size)
		sum += w->image[w->h.calib_off] + w->image[w->h.calib_off + w->h.calib_size - 1];
	return sum;
}

static void parse(const uint8_t *image, size_t size)
{
	/* A copy that ends where the file ends, so that one byte too far is seen. */
	_cleanup_free_ uint8_t *exact = malloc(size ? size : 1);
	struct weights *w = NULL;
	volatile unsigned sink;
	char err[256] = "";

	if (!exact)
		return;
	memcpy(exact, image, size);
	if (weights_parse(&w, exact, size, err, sizeof(err)) == 0) {
		sink = touch(w);
		(void)sink;
		weights_free(w);
	} else if (w || !*err) {
		abort();
	}
}

static void parse_patched(const struct weights_header *shape, const uint8_t *data, size_t size)
{
	_cleanup_free_ uint8_t *image = NULL;
	char err[256];
	uint64_t end;

	if (weights_image_new(&image, shape, 32, err, sizeof(err)) < 0)
		abort();
	weights_image_random(image, 1);
	end = ((struct weights_header *)image)->total_size - (size ? data[0] % 64 : 0);
	for (size_t i = 1; i + 4 <= size; i += 4) {
		uint16_t at, value;

		memcpy(&at, data + i, 2);
		memcpy(&value, data + i + 2, 2);
		memcpy(image + (at & 0x8000 ? at % (WEIGHTS_HEADER - 1) : at % (end - 1)), &value, 2);
	}
	weights_image_seal(image, end);
	parse(image, end);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size > 0 && data[0] % 5 > 0)
		parse_patched(&shapes[data[0] % 5 - 1], data + 1, size - 1);
	else
		parse(data + (size > 0), size - (size > 0));
	return 0;
}
