/* SPDX-License-Identifier: MIT */
/* The CPU backend: gradients of every tensor, learning, determinism, lanes that keep to themselves. */
#include "tests/unit/train_fixture.h"

#include "policy/learned.h"

static struct weights_header shapes(uint32_t i)
{
	switch (i) {
	case 0:
		return made_shape(WEIGHTS_KVP, WEIGHTS_POS_LOG2, 2, 19);
	case 1:
		return made_shape(WEIGHTS_KVP, WEIGHTS_POS_LOG2, 1, 0);
	case 2:
		return made_shape(WEIGHTS_KVP, WEIGHTS_POS_TABLE, 1, 0);
	case 3:
		return made_shape(WEIGHTS_KVP, WEIGHTS_POS_TABLE, 2, 9);
	default:
		return made_shape(WEIGHTS_POSITION, WEIGHTS_POS_LOG2, 1, 0);
	}
}
#define SHAPES 5u

static float *params_new(const struct net *n, float spread)
{
	float *p = calloc(n->params, sizeof(*p));

	net_random(n, 9, 0, p);
	for (size_t i = 0; i < n->params; i++) /* off the special values of the start: zeros and ones */
		p[i] += spread * (train_noise(2, 0, 0, 0, 0, (uint32_t)i) - 0.5f);
	return p;
}

/* A weighted sum of scores in fp64. */
static double functional(const struct net *n, struct net_work *w, const float *p, uint32_t rows,
			 const uint32_t *pos, const float *c)
{
	float s[128];
	double sum = 0;

	net_forward(n, w, p, rows, pos, 900, s);
	for (uint32_t i = 0; i < rows; i++)
		sum += (double)c[i] * (double)s[i];
	return sum;
}

/*
 * Along three directions in every tensor, and along the tensor's own gradient, central differences of the sum
 * must be the gradient's. fp32 and curvature leave about a thousandth of the gradient's length.
 */
static void test_differences(void **state)
{
	enum { ROWS = 100 };

	for (uint32_t k = 0; k < SHAPES; k++) {
		struct weights_header h = shapes(k);
		struct net_work *w;
		struct net n;
		uint32_t pos[ROWS];
		float c[ROWS], *p, *grad, *moved;
		char err[128];

		assert_int_equal(net_init(&n, &h, err, sizeof(err)), 0);
		assert_int_equal(net_work_new(&w, &n, ROWS), 0);
		p = params_new(&n, 0.3f);
		grad = calloc(n.params, sizeof(*grad));
		moved = calloc(n.params, sizeof(*moved));
		for (uint32_t i = 0; i < ROWS; i++) {
			pos[i] = 4 + 8 * i;
			c[i] = train_noise(4, 0, 0, 0, 0, i) - 0.5f;
		}
		for (uint32_t i = 0; i < ROWS * h.k_dim && h.kind == WEIGHTS_KVP; i++)
			w->k[i] = 2 * train_noise(4, 1, 0, 0, 0, i) - 1;
		for (uint32_t i = 0; i < ROWS * h.v_dim && h.kind == WEIGHTS_KVP; i++)
			w->v[i] = 2 * train_noise(4, 2, 0, 0, 0, i) - 1;
		functional(&n, w, p, ROWS, pos, c);
		net_backward(&n, w, p, c, grad);
		for (uint32_t x = 0; x < n.layout.count * 4; x++) {
			const struct weights_tensor *t = &n.layout.tensor[x / 4];
			size_t at = n.at[x / 4], count = (size_t)t->rows * t->cols;
			double length = 0, along = 0, size = 0, found;

			if (!count)
				continue;
			for (size_t i = at; i < at + count; i++) {
				float d = x % 4 ? train_noise(5, x, 0, 0, 0, (uint32_t)i) - 0.5f : grad[i];

				moved[i] = d;
				length += (double)d * (double)d;
				size += (double)grad[i] * (double)grad[i];
			}
			length = sqrt(length) + 1e-30;
			for (size_t i = 0; i < n.params; i++) {
				bool in = i >= at && i < at + count;
				float d = in ? (float)((double)moved[i] / length) : 0;

				along += (double)d * (double)grad[i];
				moved[i] = p[i] + 0x1p-8f * d;
			}
			found = functional(&n, w, moved, ROWS, pos, c);
			for (size_t i = 0; i < n.params; i++)
				moved[i] = 2 * p[i] - moved[i];
			found = (found - functional(&n, w, moved, ROWS, pos, c)) / 0x1p-7;
			if (fabs(found - along) > 3e-3 * (sqrt(size) + 0.05))
				fail_msg("shape %u, %s, direction %u: difference %g, gradient %g of length %g",
					 k, t->name, x % 4, found, along, sqrt(size));
		}
		free(p);
		free(grad);
		free(moved);
		net_work_free(w);
	}
}

/* The whole chain at once: loss of the batch, exact objective and both weightings, along the batch's gradient.
 */
static void test_batch_gradient(void **state)
{
	for (uint32_t k = 0; k < 2 * SHAPES; k++) {
		struct made_set m;
		struct train_backend *b;
		float *p, *q, *grad, loss, up, down;
		double length = 0;
		struct net n;
		char err[128];

		made_set(&m, shapes(k / 2), 1);
		m.o.weighting = k % 2;
		m.o.objective = k % 4 == 3 ? TRAIN_MSE : TRAIN_EXACT;
		b = made_open(&m, &train_cpu);
		net_init(&n, &m.o.shape, err, sizeof(err));
		p = params_new(&n, 0.3f);
		q = calloc(n.params, sizeof(*q));
		grad = calloc(n.params, sizeof(*grad));
		b->ops->set(b, TRAIN_PARAMS, 0, p);
		assert_int_equal(b->ops->gradient(b, made_batch(&m, 1), grad, &loss), 0);
		for (size_t i = 0; i < n.params; i++)
			length += (double)grad[i] * (double)grad[i];
		length = sqrt(length);
		for (int sign = 0; sign < 2; sign++) {
			for (size_t i = 0; i < n.params; i++)
				q[i] = p[i] + (sign ? -1 : 1) * 0x1p-9f * grad[i] / (float)length;
			b->ops->set(b, TRAIN_PARAMS, 0, q);
			b->ops->gradient(b, made_batch(&m, 1), q, sign ? &down : &up);
		}
		if (fabs(((double)up - (double)down) / 0x1p-8 - length) > 0.01 * length)
			fail_msg("case %u: difference %g, gradient's length %g", k,
				 ((double)up - (double)down) / 0x1p-8, length);
		b->ops->close(b);
		free(p);
		free(q);
		free(grad);
		made_free(&m);
	}
}

static double run(struct made_set *m, struct train_backend *b, uint32_t steps, struct train_score *score)
{
	float loss[8] = {0};

	for (uint32_t s = 0; s < steps; s++)
		assert_int_equal(b->ops->step(b, made_batch(m, s), loss), 0);
	if (score) {
		memset(score, 0, m->o.lanes * sizeof(*score));
		assert_int_equal(b->ops->evaluate(b, TRAIN_EMA, made_batch(m, 9999), score), 0);
	}
	return (double)loss[0];
}

/* Every objective ends well below a random ranking, and the network below the position-only prior. */
static void test_learns(void **state)
{
	struct train_score score[2], prior[2];
	struct made_set m;
	struct train_backend *b;

	made_set(&m, shapes(4), 2);
	b = made_open(&m, &train_cpu);
	run(&m, b, 150, prior);
	b->ops->close(b);
	made_free(&m);
	for (uint32_t objective = TRAIN_EXACT; objective <= TRAIN_MSE; objective++) {
		made_set(&m, shapes(0), 2);
		m.o.objective = objective;
		b = made_open(&m, &train_cpu);
		run(&m, b, 150, score);
		for (int lane = 0; lane < 2; lane++) {
			assert_int_equal(score[lane].counted, m.o.batch);
			assert_true(score[lane].regret / score[lane].counted <
				    (objective == TRAIN_RLOO_BATCH ? 0.9 : 0.25));
			assert_true(score[lane].ratio / score[lane].counted >= 1);
			if (objective == TRAIN_EXACT)
				assert_true(score[lane].regret < 0.6 * prior[lane].regret);
		}
		b->ops->close(b);
		made_free(&m);
	}
}

static float *all_params(struct made_set *m, struct train_backend *b, size_t *count)
{
	struct net n;
	char err[128];
	float *p;

	net_init(&n, &m->o.shape, err, sizeof(err));
	*count = n.params;
	p = calloc(n.params * m->o.lanes, sizeof(*p));
	for (uint32_t lane = 0; lane < m->o.lanes; lane++)
		b->ops->get(b, TRAIN_PARAMS, lane, p + lane * n.params);
	return p;
}

static void test_deterministic(void **state)
{
	float *first = NULL;
	size_t count;

	for (uint32_t k = 0; k < 3; k++) {
		struct made_set m;
		struct train_backend *b;
		float *p;

		made_set(&m, shapes(0), 5);
		m.o.objective = TRAIN_RLOO;
		m.o.threads = 1 + k;
		b = made_open(&m, &train_cpu);
		run(&m, b, 4, NULL);
		p = all_params(&m, b, &count);
		if (k)
			assert_memory_equal(p, first, count * 5 * sizeof(*p));
		else
			first = p;
		if (k)
			free(p);
		b->ops->close(b);
		made_free(&m);
	}
	free(first);
}

/* Lane 1 of three is broken in one of two runs: it keeps its parameters, and the others never notice. */
static void test_lanes_apart(void **state)
{
	float *p[2], *before = NULL;
	size_t count;

	for (uint32_t k = 0; k < 2; k++) {
		struct made_set m;
		struct train_backend *b;

		made_set(&m, shapes(0), 3);
		b = made_open(&m, &train_cpu);
		before = all_params(&m, b, &count);
		if (k) {
			before[count + 5] = INFINITY;
			b->ops->set(b, TRAIN_PARAMS, 1, before + count);
		}
		run(&m, b, 3, NULL);
		p[k] = all_params(&m, b, &count);
		if (k)
			assert_memory_equal(p[k] + count, before + count, count * sizeof(float));
		free(before);
		b->ops->close(b);
		made_free(&m);
	}
	assert_memory_equal(p[0], p[1], count * sizeof(float));
	assert_memory_equal(p[0] + 2 * count, p[1] + 2 * count, count * sizeof(float));
	for (size_t i = 0; i < 3 * count; i++)
		assert_true(isfinite(p[0][i]));
	free(p[0]);
	free(p[1]);
}

/* The first step moves a lane whose gradient is clipped as far as clip says: with beta 0 and a large eps AdamW
 * is plain descent. Another lane with a small gradient is not scaled along. */
static void test_clip(void **state)
{
	float *grad, *before, *after, loss[2];
	struct made_set m;
	struct train_backend *b;
	double norm[2] = {0}, moved[2] = {0};
	size_t count;

	made_set(&m, shapes(0), 2);
	m.o.beta1 = m.o.beta2 = 0;
	m.o.eps = 1e6f;
	m.o.weight_decay = 0;
	b = made_open(&m, &train_cpu);
	before = all_params(&m, b, &count);
	for (size_t i = 0; i < count; i++)
		before[i] *= 4; /* only lane 0 */
	b->ops->set(b, TRAIN_PARAMS, 0, before);
	grad = calloc(2 * count, sizeof(*grad));
	b->ops->gradient(b, made_batch(&m, 0), grad, loss);
	for (size_t i = 0; i < 2 * count; i++)
		norm[i / count] += (double)grad[i] * (double)grad[i];
	assert_true(norm[0] > 4 * norm[1] || norm[1] > 4 * norm[0]);
	m.o.clip = (float)sqrt(sqrt(norm[0] * norm[1])); /* between the two */
	b->ops->close(b);

	b = made_open(&m, &train_cpu);
	b->ops->set(b, TRAIN_PARAMS, 0, before);
	m.batch.lr = 1e6f;
	((struct train_batch *)made_batch(&m, 0))->lr = 1e6f;
	b->ops->step(b, &m.batch, loss);
	after = all_params(&m, b, &count);
	for (size_t i = 0; i < 2 * count; i++)
		moved[i / count] += pow((double)after[i] - (double)before[i], 2);
	for (int lane = 0; lane < 2; lane++)
		assert_true(fabs(sqrt(moved[lane]) - MIN(sqrt(norm[lane]), (double)m.o.clip)) <
			    0.02 * sqrt(norm[lane]));
	b->ops->close(b);
	free(grad);
	free(before);
	free(after);
	made_free(&m);
}

/* The network of the trainer is the network of the daemon: its scalar reference on the same (rounded) weights.
 */
static void check_like_the_policy(uint32_t shape)
{
	enum { ROWS = 64 };
	struct weights_header h = shapes(shape);
	uint16_t k[ROWS * 32], v[ROWS * 48];
	float score[ROWS], want[ROWS], *p;
	char err[256], path[] = "/tmp/kvtier-test.XXXXXX";
	struct policy_cfg cfg = {.layers = 1,
				 .heads = 1,
				 .k_dim = 32,
				 .v_dim = 48,
				 .dtype = ROW_F16,
				 .weights = path,
				 .isa = "ref",
				 .model = "made"};
	uint32_t pos[ROWS];
	struct policy_batch b = {
		.n = ROWS, .k = k, .v = v, .k_stride = 64, .v_stride = 96, .pos = pos, .total = 500};
	const struct policy_ops *ops = policy_find(h.kind == WEIGHTS_KVP ? "kvp" : "position");
	struct policy *policy;
	uint8_t *image;
	struct net_work *act;
	struct net n;

	assert_int_equal(net_init(&n, &h, err, sizeof(err)), 0);
	assert_int_equal(net_work_new(&act, &n, ROWS), 0);
	p = params_new(&n, 0.3f);
	assert_int_equal(weights_image_new(&image, &h, 0, err, sizeof(err)), 0);
	for (size_t i = 0; i < n.params; i++) {
		void *lane = weights_image_at(image, 0, 0);

		if (n.layout.elem == 4) {
			((float *)lane)[i] = p[i];
			continue;
		}
		((uint16_t *)lane)[i] = float_bf16(p[i]);
		p[i] = bf16_float(((uint16_t *)lane)[i]);
	}
	weights_image_seal(image, ((struct weights_header *)image)->total_size);
	close(mkstemp(path));
	assert_int_equal(weights_image_write(image, path), 0);
	if (ops->init(&policy, &cfg, err, sizeof(err)) != 0)
		fail_msg("%s", err);
	unlink(path);
	for (uint32_t i = 0; i < ROWS * 32; i++) {
		k[i] = made_half(train_hash(1, 1, 1, i, 0, 0));
		act->k[i] = half_value(k[i]);
	}
	for (uint32_t i = 0; i < ROWS * 48; i++) {
		v[i] = made_half(train_hash(1, 1, 2, i, 0, 0));
		act->v[i] = half_value(v[i]);
	}
	for (uint32_t i = 0; i < ROWS; i++)
		pos[i] = 5 * i;
	net_forward(&n, act, p, ROWS, pos, 500, score);
	assert_int_equal(ops->score(policy, &b, want), 0);
	for (uint32_t i = 0; i < ROWS; i++)
		if (fabsf(score[i] - want[i]) > 1e-4f)
			fail_msg("shape %u row %u: %g, the policy says %g", shape, i, (double)score[i],
				 (double)want[i]);
	ops->free(policy);
	free(image);
	free(p);
	net_work_free(act);
}

static void test_like_the_policy(void **state)
{
	for (uint32_t shape = 0; shape < SHAPES; shape++)
		check_like_the_policy(shape);
}

static void test_refusals(void **state)
{
	struct weights_header h = shapes(0);
	struct made_set m;
	struct train_backend *b;
	struct train_batch t;
	char err[256] = "";
	struct net n;
	float loss;

	h.hidden = 33;
	assert_int_equal(net_init(&n, &h, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "hidden: 33"));
	h = shapes(0);
	h.octave = 0;
	assert_int_equal(net_init(&n, &h, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "octave"));
	h = shapes(0);
	h.kind = WEIGHTS_QFILTER;
	assert_int_equal(net_init(&n, &h, err, sizeof(err)), -EINVAL);

	made_set(&m, shapes(4), 1);
	m.o.rows = 100;
	assert_int_equal(train_cpu.open(&b, &m.o, &m.shape, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "rows"));
	m.o.rows = 256;
	b = made_open(&m, &train_cpu);
	t = *made_batch(&m, 0);
	m.row[10] = SET_ROWS;
	assert_int_equal(b->ops->step(b, &t, &loss), -EINVAL);
	assert_non_null(strstr(b->ops->error(b), "out of its limits"));
	t = *made_batch(&m, 0);
	m.units[1] = SET_UNITS;
	assert_int_equal(b->ops->step(b, &t, &loss), -EINVAL);
	assert_int_equal(b->ops->put_utility(b, 1, 0, &loss), -EINVAL);
	assert_int_equal(b->ops->get(b, TRAIN_M, 1, &loss), -EINVAL);
	b->ops->close(b);
	b = NULL;
	train_cpu.close(b);
	made_free(&m);
}

/* Beyond the longest prompt of training a score is that of its last knot; up to that knot nothing changes. */
static void test_flatten(void **state)
{
	for (uint32_t k = 0; k < 5; k++) {
		struct weights_header h = shapes(k);
		bool prior = h.kind == WEIGHTS_POSITION, log2 = h.pos_kind == WEIGHTS_POS_LOG2;
		struct net n;
		float *was, *is;
		char err[128];

		assert_int_equal(net_init(&n, &h, err, sizeof(err)), 0);
		was = calloc(n.params, sizeof(*was));
		is = calloc(n.params, sizeof(*is));
		for (size_t i = 0; i < n.params; i++)
			was[i] = is[i] = (float)(i + 1);
		net_flatten(&n, 7, is); /* log2(1 + 7) = 3 octaves */
		for (uint32_t t = 0; t < n.layout.count; t++) {
			const struct weights_tensor *x = &n.layout.tensor[t];
			bool table = prior || (t == KVP_POS && log2) || t == KVP_DIST;
			bool rows = !prior && t == KVP_POS; /* knots are rows, else columns */
			uint32_t last = 3 * (prior ? h.pos_dim : h.octave);

			for (uint32_t r = 0; r < x->rows; r++)
				for (uint32_t c = 0; c < x->cols; c++) {
					uint32_t knot = rows ? r : c, from = table && knot > last ? last : knot;
					size_t at = n.at[t] + (size_t)(rows ? from : r) * x->cols +
						    (rows ? c : from);

					assert_true(is[n.at[t] + (size_t)r * x->cols + c] == was[at]);
				}
		}
		free(was);
		free(is);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_differences),     cmocka_unit_test(test_batch_gradient),
		cmocka_unit_test(test_learns),          cmocka_unit_test(test_deterministic),
		cmocka_unit_test(test_lanes_apart),     cmocka_unit_test(test_clip),
		cmocka_unit_test(test_like_the_policy), cmocka_unit_test(test_refusals),
		cmocka_unit_test(test_flatten),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
