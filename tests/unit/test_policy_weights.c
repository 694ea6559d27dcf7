/* SPDX-License-Identifier: MIT */
/* .kvp files: what is written is what is read, and nothing but that is accepted. */
#include "kvp_fixture.h"

#include <fcntl.h>
#include <math.h>
#include <openssl/evp.h>
#include <sys/stat.h>

static char err[512];

static int parse(const uint8_t *image, uint64_t size)
{
	struct weights *w = NULL;
	int r;

	err[0] = 0;
	r = weights_parse(&w, image, size, err, sizeof(err));
	assert_true((r == 0) == (w != NULL)); /* set only on success */
	weights_free(w);
	return r;
}

/* Refused, and the line names the field. */
static void assert_refused(const uint8_t *image, uint64_t size, const char *field)
{
	assert_int_equal(parse(image, size), -EBADMSG);
	if (!strstr(err, field))
		fail_msg("message '%s' does not name '%s'", err, field);
	assert_null(strchr(err, '\n'));
}

static void published_network_has_its_parameters(void **state)
{
	struct weights_header h = shape_kvp(128, 128);
	struct weights_layout l;

	assert_int_equal(weights_lay_out(&l, &h), 0);
	assert_int_equal(l.params, 465729);
	assert_int_equal(l.count, KVP_TENSORS);
	assert_int_equal(l.stride % WEIGHTS_ALIGN, 0);
	assert_in_range(l.stride, 465729 * 2, 465729 * 2 + WEIGHTS_ALIGN);
}

static void round_trip(void **state)
{
	struct weights_header shapes[] = {shape_kvp(64, 64),      shape_narrow(),   shape_trained(),
					  shape_narrow_trained(), shape_position(), shape_qfilter(80)};

	for (size_t s = 0; s < ARRAY_SIZE(shapes); s++) {
		_cleanup_free_ uint8_t *image = make_image(shapes[s], 256, s),
				       *again = make_image(shapes[s], 256, s),
				       *other = make_image(shapes[s], 256, s + 100);
		struct weights *w;

		assert_memory_equal(image, again, image_size(image));
		assert_true(memcmp(image, other, image_size(image)) != 0);
		assert_int_equal(weights_image_write(image, fixture_file), 0);
		if (weights_load(&w, fixture_file, err, sizeof(err)) < 0)
			fail_msg("%s", err);
		assert_memory_equal(w->image, image, image_size(image));
		assert_int_equal(w->lanes, 2);
		assert_int_equal((uintptr_t)w->image % WEIGHTS_ALIGN, 0);
		for (uint32_t lane = 0; lane < w->lanes; lane++)
			for (uint32_t t = 0; t < w->layout.count; t++)
				assert_ptr_equal((const uint8_t *)weights_at(w, lane, t) - w->image,
						 (uint8_t *)weights_image_at(image, lane, t) - image);
		assert_int_equal(w->h.calib_off + 256, image_size(image));
		weights_free(w);
	}
	weights_free(NULL);
}

/* A library without algorithms is as one without memory. */
static void a_digest_that_cannot_be_made_is_told(void **state)
{
	_cleanup_free_ uint8_t *image = make_image(shape_narrow_trained(), 64, 1);
	uint64_t size = image_size(image);
	_cleanup_free_ uint8_t *was = malloc(size);

	memcpy(was, image, size);
	assert_int_equal(EVP_set_default_properties(NULL, "provider=none"), 1);
	assert_int_equal(weights_image_seal(image, size), -ENOMEM);
	assert_int_equal(EVP_set_default_properties(NULL, ""), 1);
	assert_memory_equal(image, was, size);
	image[size - 1] ^= 1;
	assert_int_equal(weights_image_seal(image, size), 0);
	assert_memory_not_equal(image, was, WEIGHTS_HEADER);
}

static void every_truncation_is_refused(void **state)
{
	_cleanup_free_ uint8_t *image = make_image(shape_narrow_trained(), 64, 1);
	struct weights_header *h = (struct weights_header *)image;
	uint64_t size = image_size(image);

	for (uint64_t cut = 0; cut < size; cut++)
		assert_refused(image, cut, cut < WEIGHTS_HEADER ? "size" : "total_size");
	/* A liar who shortens total_size and seals again is found by the sections. */
	for (uint64_t cut = WEIGHTS_HEADER; cut < size; cut += cut < size - 70 ? 64 : 1) {
		h->total_size = cut;
		weights_image_seal(image, cut);
		assert_refused(image, cut, "total_size");
	}
}

static void truncated_and_longer_files_are_refused(void **state)
{
	_cleanup_free_ uint8_t *image = make_image(shape_narrow_trained(), 0, 1);
	uint64_t size = image_size(image), stride = ((struct weights_header *)image)->lane_stride;
	uint64_t sizes[] = {0, 1, 255, 256, 256 + stride, size - 1, size + 1, size + 4096};
	struct weights *w = NULL;

	for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		assert_int_equal(weights_image_write(image, fixture_file), 0);
		assert_int_equal(truncate(fixture_file, (off_t)sizes[i]), 0);
		assert_int_equal(weights_load(&w, fixture_file, err, sizeof(err)), -EBADMSG);
		assert_non_null(strstr(err, fixture_file));
		assert_non_null(strstr(err, "size"));
	}
	assert_null(w);
}

static void every_changed_byte_is_refused(void **state)
{
	_cleanup_free_ uint8_t *image = make_image(shape_narrow_trained(), 64, 1);
	uint64_t size = image_size(image);

	for (uint64_t i = 0; i < size; i++) {
		image[i] ^= 1;
		assert_int_equal(parse(image, size), -EBADMSG);
		if (i >= WEIGHTS_HEADER || (i >= 24 && i < 56))
			assert_non_null(strstr(err, "digest"));
		image[i] ^= 1;
	}
	assert_int_equal(parse(image, size), 0);
}

struct lie {
	const char *field;
	size_t off;
	uint32_t value;
};
#define LIE(f, v)                                                                                              \
	{                                                                                                      \
#f, offsetof(struct weights_header, f), v                                                      \
	}

/* The digest is right; the header is not. */
static void header_lies_are_named(void **state)
{
	static const struct lie lies[] = {
		LIE(magic, 0),
		LIE(version, 0),
		LIE(version, 2),
		LIE(header_size, 512),
		LIE(total_size, 4096),
		LIE(name, 0),
		LIE(name, 0x01010101),
		LIE(layers, 0),
		LIE(layers, 1025),
		LIE(layers, UINT32_MAX),
		LIE(heads, 0),
		LIE(heads, UINT32_MAX),
		LIE(k_dim, 0),
		LIE(k_dim, 17),
		LIE(k_dim, 272),
		LIE(v_dim, 0),
		LIE(v_dim, 1u << 31),
		LIE(rope_type, 3),
		LIE(rope_theta, 0x7f800000),
		LIE(rope_theta, 0xbf800000),
		LIE(keys, 2),
		LIE(kind, 0),
		LIE(kind, 4),
		LIE(dtype, 0),
		LIE(dtype, 1),
		LIE(proj, 0),
		LIE(proj, 33),
		LIE(proj, 288),
		LIE(pos_kind, 0),
		LIE(pos_kind, 3),
		LIE(pos_rows, 0),
		LIE(pos_rows, UINT32_MAX),
		LIE(pos_dim, 0),
		LIE(pos_dim, 80),
		LIE(hidden, 0),
		LIE(hidden, 544),
		LIE(rank, 0),
		LIE(rank, 3),
		LIE(dist_rows, 4097),
		LIE(octave, 65),
		LIE(lane_off, 0),
		LIE(lane_off, 320),
		LIE(lane_stride, 0),
		LIE(lane_stride, 64),
		LIE(calib_off, 0),
		LIE(calib_off, 256),
		LIE(calib_size, 3),
		LIE(reserved1, 1),
	};
	_cleanup_free_ uint8_t *image = make_image(shape_narrow(), 64, 1), *copy = NULL;
	uint64_t size = image_size(image);

	copy = malloc(size);
	assert_non_null(copy);
	for (size_t i = 0; i < ARRAY_SIZE(lies); i++) {
		memcpy(copy, image, size);
		memcpy(copy + lies[i].off, &lies[i].value, sizeof(lies[i].value));
		weights_image_seal(copy, size);
		assert_refused(copy, size, lies[i].field);
	}
}

/* Fields that are fine alone and wrong together; the message says which other field asks for what. */
static void fields_that_contradict_each_other_are_named(void **state)
{
	static const struct {
		struct lie lie;
		const char *why;
	} cases[] = {
		{LIE(rope_theta, 0), "rope_theta: 0, must be positive where keys is 1 (before RoPE)"},
		{LIE(dist_rows, 0), "dist_rows: 0, must be 1 to 4096 where rank is 2"},
		{LIE(octave, 0), "octave: 0, must be 1 to 64 where dist_rows is not 0"},
	};
	_cleanup_free_ uint8_t *image = make_image(shape_narrow_trained(), 64, 1), *copy = NULL;
	struct weights_header h = shape_narrow();
	uint64_t size = image_size(image);

	copy = malloc(size);
	assert_non_null(copy);
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		memcpy(copy, image, size);
		memcpy(copy + cases[i].lie.off, &cases[i].lie.value, sizeof(cases[i].lie.value));
		weights_image_seal(copy, size);
		assert_refused(copy, size, cases[i].why);
	}
	h.dtype = WEIGHTS_BF16;
	h.pos_kind = WEIGHTS_POS_LOG2;
	assert_int_equal(weights_check_shape(&h, err, sizeof(err)), -EBADMSG);
	assert_string_equal(err, "octave: 0, must be 1 to 64 where pos_kind is 2 (log2)");
	h.octave = 64;
	assert_int_equal(weights_check_shape(&h, err, sizeof(err)), 0);
	h.keys = WEIGHTS_KEYS_UNROTATED; /* of a model without RoPE: nothing to undo, no theta to know */
	h.rope_type = WEIGHTS_ROPE_NONE;
	h.rope_theta = 0;
	assert_int_equal(weights_check_shape(&h, err, sizeof(err)), 0);
}

/* Shapes that are allowed, but not the ones that the sections were made for. */
static void other_shapes_of_the_same_size_are_refused(void **state)
{
	static const struct lie lies[] = {
		LIE(layers, 1),      LIE(layers, 3),      LIE(heads, 2),      LIE(k_dim, 32),
		LIE(v_dim, 16),      LIE(proj, 64),       LIE(hidden, 32),    LIE(pos_dim, 32),
		LIE(pos_rows, 6000), LIE(calib_size, 60), LIE(calib_size, 0),
	};
	_cleanup_free_ uint8_t *image = make_image(shape_narrow(), 64, 1), *copy = NULL;
	uint64_t size = image_size(image);

	copy = malloc(size);
	assert_non_null(copy);
	for (size_t i = 0; i < ARRAY_SIZE(lies); i++) {
		memcpy(copy, image, size);
		memcpy(copy + lies[i].off, &lies[i].value, sizeof(lies[i].value));
		weights_image_seal(copy, size);
		assert_int_equal(parse(copy, size), -EBADMSG);
		assert_true(strstr(err, "total_size") || strstr(err, "lane_stride") ||
			    strstr(err, "calib_off"));
	}
}

static void values_that_are_not_finite_are_named(void **state)
{
	static const uint16_t bad[] = {0x7f80, 0xff80, 0x7fc0, 0x7f81, 0xffff};
	static const char *const names[] = {"wk[0]", "pos[79]", "b3[1]", "dist[79]"};
	static const uint32_t tensors[] = {KVP_WK, KVP_POS, KVP_B3, KVP_DIST}, elements[] = {0, 79, 1, 79};
	_cleanup_free_ uint8_t *image = make_image(shape_narrow_trained(), 64, 1);
	struct weights_header *h = (struct weights_header *)image;
	uint64_t size = image_size(image);
	float infinity = INFINITY;
	char where[64];

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		for (size_t t = 0; t < ARRAY_SIZE(tensors); t++) {
			uint16_t *x = (uint16_t *)weights_image_at(image, 1, tensors[t]) + elements[t],
				 was = *x;

			*x = bad[i];
			weights_image_seal(image, size);
			snprintf(where, sizeof(where), "layer 1 head 0 %s", names[t]);
			assert_refused(image, size, where);
			*x = was;
		}
	}
	memcpy(image + h->calib_off + 60, &infinity, sizeof(infinity));
	weights_image_seal(image, size);
	assert_refused(image, size, "calibration[15]");
}

static void float_kinds_check_their_values(void **state)
{
	_cleanup_free_ uint8_t *image = make_image(shape_qfilter(80), 0, 1);
	float *f = weights_image_at(image, 0, QFILTER_F);

	f[79] = NAN;
	weights_image_seal(image, image_size(image));
	assert_refused(image, image_size(image), "layer 0 head 0 f[79]");
}

static void writer_refuses_bad_shapes(void **state)
{
	struct weights_header h = shape_kvp(24, 64);
	uint8_t *image = NULL;

	assert_int_equal(weights_image_new(&image, &h, 0, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, "k_dim: 24"));
	h = shape_kvp(64, 64);
	memset(h.name, 'x', sizeof(h.name));
	assert_int_equal(weights_image_new(&image, &h, 0, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, "name"));
	h = shape_kvp(64, 64);
	h.kind = 9;
	assert_int_equal(weights_image_new(&image, &h, 0, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, "kind: 9"));
	assert_null(image);
}

static void a_failed_write_leaves_nothing(void **state)
{
	_cleanup_free_ uint8_t *image = make_image(shape_position(), 0, 1);
	char path[128];

	snprintf(path, sizeof(path), "%s/no/such/w.kvp", fixture_dir);
	assert_int_equal(weights_image_write(image, path), -ENOENT);
	/* The target is a directory: the temporary file must go. Teardown's rmdir proves it. */
	snprintf(path, sizeof(path), "%s/dir", fixture_dir);
	assert_int_equal(mkdir(path, 0700), 0);
	assert_int_equal(weights_image_write(image, path), -EISDIR);
	assert_int_equal(rmdir(path), 0);
}

static void what_is_no_file_is_refused(void **state)
{
	struct weights *w = NULL;
	char path[128];

	snprintf(path, sizeof(path), "%s/none", fixture_dir);
	assert_int_equal(weights_load(&w, path, err, sizeof(err)), -ENOENT);
	assert_non_null(strstr(err, "none: No such file"));
	assert_int_equal(weights_load(&w, fixture_dir, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, "regular file"));
	assert_int_equal(mkfifo(path, 0600), 0);
	assert_int_equal(weights_load(&w, path, err, sizeof(err)), -EBADMSG); /* and does not hang */
	assert_non_null(strstr(err, "regular file"));
	unlink(path);
	assert_null(w);
}

struct misfit {
	void (*apply)(struct policy_cfg *cfg);
	const char *says;
};

static void other_model(struct policy_cfg *c)
{
	c->model = "other-model";
}
static void other_layers(struct policy_cfg *c)
{
	c->layers++;
}
static void other_heads(struct policy_cfg *c)
{
	c->heads++;
}
static void other_k(struct policy_cfg *c)
{
	c->k_dim = 128;
}
static void other_v(struct policy_cfg *c)
{
	c->v_dim = 128;
}
static void opaque_rows(struct policy_cfg *c)
{
	c->dtype = ROW_OPAQUE;
}
static void no_file(struct policy_cfg *c)
{
	c->weights = NULL;
}
static void unknown_isa(struct policy_cfg *c)
{
	c->isa = "mmx";
}

static void files_for_others_are_refused(void **state)
{
	static const struct misfit misfits[] = {
		{other_model, "name: " MODEL ", must be the model's other-model"},
		{other_layers, "layers: 2, must be the model's 3"},
		{other_heads, "heads: 1, must be the model's 2"},
		{other_k, "k_dim: 16, must be the model's 128"},
		{other_v, "v_dim: 48, must be the model's 128"},
		{opaque_rows, "dtype: 0"},
		{no_file, "weights: none"},
		{unknown_isa, "isa: mmx, must be"},
	};
	struct weights_header h = shape_narrow_trained();

	save_random(h, 1);
	for (size_t i = 0; i < ARRAY_SIZE(misfits); i++) {
		struct policy_cfg cfg = config_for(h, ROW_F32, NULL);
		struct policy *p = NULL;

		misfits[i].apply(&cfg);
		err[0] = 0;
		assert_int_equal(policy_kvp_ops.init(&p, &cfg, err, sizeof(err)), -EINVAL);
		if (!strstr(err, misfits[i].says))
			fail_msg("'%s' does not say '%s'", err, misfits[i].says);
		assert_null(p);
	}
}

static void files_of_other_kinds_are_refused(void **state)
{
	struct weights_header h = shape_narrow();
	struct policy_cfg cfg;
	struct policy *p = NULL;

	save_random(h, 1);
	cfg = config_for(h, ROW_F32, NULL);
	assert_int_equal(policy_position_ops.init(&p, &cfg, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "kind: kvp, must be position"));
	assert_int_equal(policy_qfilter_ops.init(&p, &cfg, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "kind: kvp, must be qfilter"));
	h = shape_qfilter(16);
	h.keys = WEIGHTS_KEYS_UNROTATED;
	save_random(h, 1);
	cfg = config_for(h, ROW_F32, NULL);
	assert_int_equal(policy_qfilter_ops.init(&p, &cfg, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "keys: 1"));
	assert_null(p);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(published_network_has_its_parameters),
		cmocka_unit_test(round_trip),
		cmocka_unit_test(a_digest_that_cannot_be_made_is_told),
		cmocka_unit_test(every_truncation_is_refused),
		cmocka_unit_test(truncated_and_longer_files_are_refused),
		cmocka_unit_test(every_changed_byte_is_refused),
		cmocka_unit_test(header_lies_are_named),
		cmocka_unit_test(fields_that_contradict_each_other_are_named),
		cmocka_unit_test(other_shapes_of_the_same_size_are_refused),
		cmocka_unit_test(values_that_are_not_finite_are_named),
		cmocka_unit_test(float_kinds_check_their_values),
		cmocka_unit_test(writer_refuses_bad_shapes),
		cmocka_unit_test(a_failed_write_leaves_nothing),
		cmocka_unit_test(what_is_no_file_is_refused),
		cmocka_unit_test(files_for_others_are_refused),
		cmocka_unit_test(files_of_other_kinds_are_refused),
	};

	return cmocka_run_group_tests_name("policy/weights", tests, fixture_setup, fixture_teardown);
}
