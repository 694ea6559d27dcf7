/* SPDX-License-Identifier: MIT */
/* From parameters to a weight file. */
#include "policy/learned.h"
#include "policy/train/run.h"
#include "shm/util.h"

#include <stdio.h>
#include <string.h>

int run_round(struct run *r, struct train_score *score)
{
	_cleanup_free_ float *p = calloc(r->net.params, sizeof(*p));
	int x = p ? 0 : -ENOMEM;

	for (uint32_t lane = 0; x == 0 && lane < r->o.t.lanes; lane++) {
		memcpy(p, r->best + lane * r->net.params, r->net.params * sizeof(*p));
		for (size_t i = 0; i < r->net.params && r->net.layout.elem == 2; i++)
			p[i] = bf16_float(float_bf16(p[i]));
		x = r->backend->ops->set(r->backend, TRAIN_PARAMS, lane, p);
	}
	if (x < 0) {
		snprintf(r->error, sizeof(r->error), "%s",
			 p ? r->backend->ops->error(r->backend) : "out of memory");
		return x;
	}
	return run_evaluate(r, r->valid, TRAIN_PARAMS, score);
}

static void put_lane(const struct run *r, uint8_t *image, uint32_t lane)
{
	void *to = weights_image_at(image, r->o.s.lane_first + lane, 0);
	const float *p = r->best + lane * r->net.params;
	uint16_t *half = to;

	if (r->net.layout.elem == 4)
		memcpy(to, p, r->net.params * sizeof(*p));
	for (size_t i = 0; i < r->net.params && r->net.layout.elem == 2; i++)
		half[i] = float_bf16(p[i]);
}

/* Lanes of a file of the same network. */
static int put_base(struct run *r, uint8_t *image)
{
	struct weights_header *h = (struct weights_header *)image;
	struct weights *w;
	char err[256];
	int x = weights_load(&w, r->o.base, err, sizeof(err));

	if (x < 0) {
		snprintf(r->error, sizeof(r->error), "%s", err);
		return x;
	}
	/* Everything that describes model and network lies between the name and the place of the lanes. */
	if (memcmp(w->h.name, h->name, offsetof(struct weights_header, lane_off) - WEIGHTS_DIGESTED) != 0 ||
	    w->h.octave != h->octave) {
		snprintf(r->error, sizeof(r->error), "%s: of another model or network than this run",
			 r->o.base);
		x = -EINVAL;
	}
	for (uint32_t lane = 0; x == 0 && lane < w->lanes; lane++)
		memcpy(weights_image_at(image, lane, 0), weights_at(w, lane, 0), h->lane_stride);
	weights_free(w);
	return x;
}

int run_image(struct run *r, uint64_t calib_size, uint8_t **ret)
{
	uint8_t *image;
	int x = weights_image_new(&image, &r->o.t.shape, calib_size, r->error, sizeof(r->error));

	if (x == 0 && r->o.base) {
		x = put_base(r, image);
		if (x < 0)
			free(image);
	}
	if (x < 0)
		return x;
	for (uint32_t lane = 0; lane < r->o.t.lanes; lane++)
		put_lane(r, image, lane);
	*ret = image;
	return 0;
}
