/* SPDX-License-Identifier: MIT */
/* Making .kvp files: the counterpart of weights.c for trainers, tools and tests. */
#include "policy/weights.h"
#include "policy/learned.h"
#include "shm/file.h"
#include "shm/util.h"

#include <math.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <string.h>

int weights_image_new(uint8_t **ret, const struct weights_header *shape, uint64_t calib_size, char *err,
		      size_t errsize)
{
	struct weights_header h = *shape;
	struct weights_layout layout;
	uint8_t *image;
	uint64_t end;
	int r;

	memcpy(h.magic, WEIGHTS_MAGIC, sizeof(h.magic));
	h.version = WEIGHTS_VERSION;
	h.header_size = WEIGHTS_HEADER;
	h.dtype = h.kind == WEIGHTS_KVP ? WEIGHTS_BF16 : WEIGHTS_F32;
	if (!h.rank)
		h.rank = 1;
	memset(h.reserved1, 0, sizeof(h.reserved1));
	memset(h.digest, 0, sizeof(h.digest));
	r = weights_check_shape(&h, err, errsize);
	if (r == 0)
		r = weights_lay_out(&layout, &h);
	if (r < 0)
		return r;
	end = WEIGHTS_HEADER + (uint64_t)h.layers * h.heads * layout.stride;
	h.lane_off = WEIGHTS_HEADER;
	h.lane_stride = layout.stride;
	h.calib_off = calib_size ? end : 0;
	h.calib_size = calib_size;
	h.total_size = end + calib_size;
	image = calloc(1, h.total_size);
	if (!image)
		return -ENOMEM;
	memcpy(image, &h, sizeof(h));
	*ret = image;
	return 0;
}

void *weights_image_at(uint8_t *image, uint32_t lane, uint32_t t)
{
	const struct weights_header *h = (const struct weights_header *)image;
	struct weights_layout layout;

	weights_lay_out(&layout, h);
	return image + h->lane_off + lane * h->lane_stride + layout.tensor[t].off;
}

int weights_image_seal(uint8_t *image, uint64_t size)
{
	uint8_t digest[SHA256_DIGEST_LENGTH];

	if (!SHA256(image + WEIGHTS_DIGESTED, size - WEIGHTS_DIGESTED, digest))
		return -ENOMEM;
	memcpy(image + offsetof(struct weights_header, digest), digest, sizeof(digest));
	return 0;
}

int weights_image_write(const uint8_t *image, const char *path)
{
	const struct weights_header *h = (const struct weights_header *)image;

	return file_replace(path, &(struct file_part){image, h->total_size}, 1);
}

/* splitmix64, public domain algorithm by Sebastiano Vigna. */
static uint64_t next_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

/* Near enough to normal, with deviation 1: the sum of eight 16-bit uniforms. */
static float next_normal(uint64_t *state)
{
	uint64_t a = next_random(state), b = next_random(state);
	double sum = -4.0;

	for (int i = 0; i < 64; i += 16)
		sum += ((a >> i & 0xffff) + (b >> i & 0xffff)) / 65535.0;
	return (float)(sum * 1.2247448713915890); /* sqrt(12 / 8) */
}

struct spread {
	float mean, deviation;
};

static struct spread kvp_spread(uint32_t t, uint32_t cols)
{
	switch (t) {
	case KVP_GK:
	case KVP_GV:
	case KVP_GP:
	case KVP_G1:
	case KVP_G2:
		return (struct spread){1.0f, 0.1f};
	case KVP_WK:
	case KVP_WV:
	case KVP_W1:
	case KVP_W2:
		return (struct spread){0.0f, 1.0f / sqrtf((float)cols)};
	case KVP_W3: /* its inputs, SiLU of LayerNorms, have a mean square near 0.36 */
		return (struct spread){0.0f, 1.6f / sqrtf((float)cols)};
	case KVP_POS:
		return (struct spread){0.0f, 1.0f};
	case KVP_DIST:
		return (struct spread){0.0f, 0.5f};
	default: /* biases */
		return (struct spread){0.0f, 0.1f};
	}
}

void weights_image_random(uint8_t *image, uint64_t seed)
{
	const struct weights_header *h = (const struct weights_header *)image;
	struct weights_layout layout;

	weights_lay_out(&layout, h);
	for (uint64_t x = 0; x < (uint64_t)h->layers * h->heads * layout.count; x++) {
		uint32_t lane = (uint32_t)(x / layout.count), t = (uint32_t)(x % layout.count);
		const struct weights_tensor *info = &layout.tensor[t];
		struct spread s = {0.0f, 1.0f};
		void *p = weights_image_at(image, lane, t);

		if (h->kind == WEIGHTS_KVP)
			s = kvp_spread(t, info->cols);
		for (uint64_t i = 0; i < (uint64_t)info->rows * info->cols; i++) {
			float value = s.mean + s.deviation * next_normal(&seed);

			if (layout.elem == 2)
				((uint16_t *)p)[i] = float_bf16(value);
			else
				((float *)p)[i] = value;
		}
	}
}
