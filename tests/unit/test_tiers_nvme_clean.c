/* SPDX-License-Identifier: MIT */
/* The cleaner: pages move and stay whole, dead copies stay dead, and the restart finds each page once. */
#include "nvme_fixture.h"

static int setup(void **state)
{
	struct fx *f = fx_new();

	f->cfg.size = 64 << 20;
	*state = f;
	return 0;
}

static int setup_threads(void **state)
{
	int r = setup(state);

	((struct fx *)*state)->cfg.no_uring = true;
	return r;
}

static int teardown(void **state)
{
	fx_free(*state);
	return 0;
}

/* Everything dies but every keep-th page, so that no segment empties by itself. */
static void thin_out(struct fx *f, uint64_t from, uint64_t to, unsigned keep)
{
	for (uint64_t no = from; no < to; no++)
		if (no % keep)
			fx_kill(f, no);
}

/* Tick until n pages have moved in all, at most five seconds. */
static void tick_until_moved(struct fx *f, uint64_t n)
{
	uint64_t start = now_ns();
	struct tier_io *none[1];

	while (f->moves < n && now_ns() - start < UINT64_C(5000000000)) {
		fx_tick(f);
		assert_int_equal(f->t->ops->reap(f->t, none, 1), 0);
		usleep(500);
	}
}

static void a_full_store_of_holes_takes_pages_again(void **state)
{
	struct fx *f = *state;
	struct tier_stat st;
	unsigned n, more = 0;
	int why;

	fx_open(f);
	n = fx_write(f, 4000, 32768, TIER_LONG, &why);
	assert_int_equal(why, -ENOSPC);
	thin_out(f, 0, n, 4);
	assert_int_equal(fx_write(f, 64, 32768, TIER_LONG, &why), 0); /* every segment still holds something */
	assert_int_equal(why, -ENOSPC);
	for (int i = 0; i < 10000 && more < n / 2; i++) {
		more += fx_write(f, 64, 32768, TIER_LONG, &why);
		fx_tick(f);
		if (why)
			usleep(200);
	}
	assert_true(more >= n / 2);
	assert_true(f->moves > 0);
	assert_int_equal(fx_verify(f), fx_live(f));
	fx_stat(f, &st);
	assert_true(st.cleaned_segments > 0);
	assert_int_equal(st.errors, 0);
}

/* The contract: sources stay until the copies are durable, so no kill between the two loses or doubles a page.
 */
static void a_restart_between_copy_and_freeing_finds_each_page_once(void **state)
{
	struct fx *f = *state;
	struct tier_stat st;
	uint64_t start = now_ns();
	struct tier_io *none[1];
	unsigned n;
	int why;

	fx_open(f);
	n = fx_write(f, 4000, 32768, TIER_LONG, &why);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	thin_out(f, 0, n, 4);
	fx_tick(f); /* allows cleaning */
	do {        /* copies are made and sealed as completions come in; only a tick would announce them */
		assert_int_equal(f->t->ops->reap(f->t, none, 1), 0);
		fx_stat(f, &st);
		usleep(500);
	} while (st.used < (fx_live(f) + 40) * UINT64_C(32768) && now_ns() - start < UINT64_C(5000000000));
	assert_true(st.used > fx_live(f) * UINT64_C(32768)); /* there are copies beside their sources */
	assert_int_equal(f->moves, 0);
	fx_kill(f, 0); /* with it dies its copy, wherever that is */
	assert_int_equal(f->t->ops->sync(f->t), 0);
	fx_close(f);
	fx_open(f);
	fx_scan(f);
	for (uint64_t no = 0; no < n; no++)
		assert_int_equal(f->page[no].found, f->page[no].live);
	fx_stat(f, &st);
	assert_int_equal(st.used, fx_live(f) * UINT64_C(32768));
	assert_int_equal(fx_verify(f), fx_live(f));
}

static bool refuse_moves(void *arg, const struct page_meta *m, tier_addr from, tier_addr to)
{
	struct fx *f = arg;

	assert_true(f->page[m->id.page].live);
	assert_true(f->page[m->id.page].addr == from);
	f->page[m->id.page].live = false;
	f->moves++;
	return false;
}

static void an_owner_that_answers_dead_frees_both(void **state)
{
	struct fx *f = *state;
	struct tier_io *none[1];
	struct tier_stat st;
	unsigned n;
	int why;

	fx_open(f);
	n = fx_write(f, 4000, 32768, TIER_LONG, &why);
	thin_out(f, 0, n, 4);
	for (int i = 0; i < 5000 && !f->moves; i++) {
		f->t->ops->tick(f->t, refuse_moves, f);
		assert_int_equal(f->t->ops->reap(f->t, none, 1), 0);
		usleep(500);
	}
	assert_true(f->moves > 0);
	for (int i = 0; i < 20; i++) {
		f->t->ops->tick(f->t, refuse_moves, f);
		usleep(1000);
	}
	for (uint64_t no = 0; no < n; no++)
		fx_kill(f, no);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	f->t->ops->tick(f->t, refuse_moves, f);
	fx_stat(f, &st);
	assert_int_equal(st.used, 0);
}

/* A read that was prepared before its page moved still gets the old bytes, however often the place is wanted.
 */
static void a_pinned_source_is_not_reused(void **state)
{
	struct fx *f = *state;
	struct tier_io io = {.op = TIER_READ, .bytes = 32768}, *p = &io, *done = NULL;
	char *want = malloc(32768);
	uint64_t first = 4;
	unsigned n;
	int why;

	fx_open(f);
	n = fx_write(f, 4000, 32768, TIER_LONG, &why);
	thin_out(f, 0, n, 4);
	io.addr = f->page[first].addr;
	assert_int_equal(f->t->ops->prepare(f->t, &io), 0);
	for (int i = 0; i < 400; i++) {
		fx_write(f, 32, 32768, TIER_LONG, &why);
		thin_out(f, n, f->next, 1000);
		n = (unsigned)f->next;
		fx_tick(f);
		usleep(100);
		if (f->next + 64 > FX_PAGES)
			break;
	}
	tick_until_moved(f, 1);
	assert_true(f->moves > 0);
	f->t->ops->submit(f->t, &p, 1);
	while (!f->t->ops->reap(f->t, &done, 1))
		fx_wait(f);
	assert_int_equal(io.res, 0);
	fx_fill(first, want, 32768);
	assert_memory_equal(io.buf, want, 32768);
	f->t->ops->release(f->t, &io);
	free(want);
}

struct turns {
	struct fx *f;
	uint32_t grant, taken; /* what is granted, to whom it is not urgent: not; bytes under way */
	unsigned asked, urgent, ended, wrote;
};

static uint32_t turn_take(void *arg, uint32_t bytes, bool urgent)
{
	struct turns *x = arg;

	assert_int_equal(x->taken, 0);
	x->asked++;
	x->urgent += urgent;
	x->taken = urgent ? MIN(bytes, x->grant) : 0;
	return x->taken;
}

static void turn_ended(void *arg, uint32_t bytes, uint64_t ns)
{
	struct turns *x = arg;

	assert_int_equal(bytes, x->taken);
	if (ns)
		assert_true(nvme(x->f->t)->cleaner.units * KVT_UNIT <= bytes);
	x->taken = 0;
	x->ended++;
	x->wrote += ns > 0;
}

/* It asks before each chunk, copies no more than it may, says when that has ended; what writers need it insists
 * on.
 */
static void the_cleaner_waits_for_its_turn(void **state)
{
	struct fx *f = *state;
	struct turns x = {.f = f, .grant = 3 * 32768};
	struct nvme *t;
	unsigned more = 0, n;
	int why = 0;

	f->cfg.pace = (struct tier_pace){.arg = &x, .take = turn_take, .ended = turn_ended};
	fx_open(f);
	t = nvme(f->t);
	do { /* until it would like to clean, and need not yet */
		n = (unsigned)f->next;
		fx_write(f, 8, 32768, TIER_LONG, &why);
		thin_out(f, n, f->next, 4);
	} while (t->nfree >= t->reserve + 4);
	assert_int_equal(why, 0);
	for (int i = 0; i < 50; i++) {
		fx_tick(f);
		assert_int_equal(fx_verify(f), fx_live(f));
	}
	assert_true(x.asked > 0);
	assert_int_equal(x.urgent + x.ended + f->moves, 0);
	for (int i = 0; i < 10000 && more < 3000; i++) {
		n = (unsigned)f->next;
		more += fx_write(f, 8, 32768, TIER_LONG, &why);
		thin_out(f, n, f->next, 4);
		fx_tick(f);
		if (why)
			usleep(200);
	}
	assert_true(more >= 3000); /* far more than there is room for at once */
	assert_true(x.urgent > 0 && x.wrote > 0 && f->moves > 0);
	assert_int_equal(fx_verify(f), fx_live(f));
	fx_close(f);
	assert_int_equal(x.taken, 0);
}

/* Sequences come and go at random at 80 % of capacity; the model is checked all along and after a restart. */
static void churn_at_80_percent_keeps_every_page(void **state)
{
	struct fx *f = *state;
	struct tier_stat st, before = {0};
	unsigned refused = 0;
	uint64_t target;

	f->cfg.segment = 512 << 10;
	fx_open(f);
	fx_stat(f, &st);
	target = st.capacity / 5 * 4;
	while (f->next < 10000) {
		int why;

		fx_stat(f, &st);
		while (st.used > target) {
			uint64_t seq = fx_rand(f) % (f->next / f->per_seq);

			for (uint64_t i = 0; i < f->per_seq; i++)
				fx_kill(f, seq * f->per_seq + i);
			fx_stat(f, &st);
		}
		if (!before.writes && st.used > target * 9 / 10)
			before = st;
		fx_write(f, f->per_seq - (unsigned)(f->next % f->per_seq),
			 8192 + (uint32_t)(fx_rand(f) % 40000), (uint8_t)(fx_rand(f) % 2), &why);
		if (why == -ENOSPC)
			refused++;
		fx_tick(f);
		if (why)
			usleep(500);
		if (f->next % 4096 < f->per_seq)
			assert_int_equal(fx_verify(f), fx_live(f));
	}
	fx_stat(f, &st);
	print_message("# amplification of small sequences (2 to 3 in a segment) at 80 %%: %.2f; %u refusals, "
		      "%llu moves\n",
		      (double)(st.device_write_bytes - before.device_write_bytes) /
			      (double)(st.write_bytes - before.write_bytes),
		      refused, (unsigned long long)f->moves);
	assert_int_equal(st.errors, 0);
	assert_int_equal(fx_verify(f), fx_live(f));
	assert_int_equal(f->t->ops->sync(f->t), 0);
	fx_close(f);
	fx_open(f);
	fx_scan(f);
	for (uint64_t no = 0; no < f->next; no++)
		assert_int_equal(f->page[no].found, f->page[no].live);
	assert_int_equal(fx_verify(f), fx_live(f));
}

#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(a_full_store_of_holes_takes_pages_again),
		T(a_restart_between_copy_and_freeing_finds_each_page_once),
		T(an_owner_that_answers_dead_frees_both),
		T(a_pinned_source_is_not_reused),
		T(the_cleaner_waits_for_its_turn),
		T(churn_at_80_percent_keeps_every_page),
		cmocka_unit_test_setup_teardown(churn_at_80_percent_keeps_every_page, setup_threads, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
