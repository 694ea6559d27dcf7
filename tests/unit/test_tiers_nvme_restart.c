/* SPDX-License-Identifier: MIT */
/* What a restart finds: all of what was sealed, nothing of what died, and never wrong bytes, whatever happened.
 */
#include "nvme_fixture.h"

static int setup(void **state)
{
	*state = fx_new();
	return 0;
}

static int teardown(void **state)
{
	fx_free(*state);
	return 0;
}

static void reopen(struct fx *f)
{
	fx_close(f);
	fx_open(f);
	fx_scan(f);
}

static void exactly_the_live_pages_come_back(void **state)
{
	struct fx *f = *state;
	struct tier_stat before, after;

	fx_open(f);
	fx_write(f, 100, 32768, TIER_SHORT, NULL);
	fx_write(f, 100, 5000, TIER_LONG, NULL);
	for (uint64_t no = 0; no < 200; no += 3)
		fx_kill(f, no); /* some before their segment is sealed */
	assert_int_equal(f->t->ops->sync(f->t), 0);
	for (uint64_t no = 1; no < 200; no += 3)
		fx_kill(f, no); /* some after */
	fx_write(f, 50, 40000, TIER_SHORT, NULL);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	fx_stat(f, &before);
	for (int life = 0; life < 3; life++) {
		f->cfg.no_uring = life & 1;
		reopen(f);
		for (uint64_t no = 0; no < f->next; no++)
			assert_int_equal(f->page[no].found, f->page[no].live);
		fx_stat(f, &after);
		assert_int_equal(after.used, before.used);
		assert_int_equal(after.capacity, before.capacity);
		assert_int_equal(fx_verify(f), fx_live(f));
	}
	fx_write(f, 100, 32768, TIER_SHORT, NULL); /* and the log goes on */
	assert_int_equal(fx_verify(f), fx_live(f));
}

static void an_unsealed_segment_is_discarded(void **state)
{
	struct fx *f = *state;

	fx_open(f);
	fx_write(f, 10, 32768, TIER_SHORT, NULL);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	fx_write(f, 10, 32768, TIER_SHORT, NULL);
	reopen(f);
	for (uint64_t no = 0; no < 20; no++)
		assert_int_equal(f->page[no].found, no < 10);
}

static bool refuse_odd(void *arg, tier_addr addr, const struct page_meta *m, const struct seq_record *s)
{
	struct fx *f = arg;

	(void)fx_found(f, addr, m, s);
	f->page[m->id.page].live = m->id.page % 2 == 0;
	return f->page[m->id.page].live;
}

static void pages_the_owner_refuses_are_freed_for_good(void **state)
{
	struct fx *f = *state;
	struct tier_stat st;

	fx_open(f);
	fx_write(f, 200, 32768, TIER_SHORT, NULL);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	fx_close(f);
	fx_open(f);
	assert_int_equal(f->t->ops->scan(f->t, refuse_odd, f), 0);
	fx_stat(f, &st);
	assert_int_equal(st.used, 100 * 32768);
	assert_int_equal(f->t->ops->scan(f->t, refuse_odd, f), -EALREADY);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	reopen(f);
	for (uint64_t no = 0; no < 200; no++)
		assert_int_equal(f->page[no].found, no % 2 == 0);
	assert_int_equal(fx_verify(f), 100);
}

static void an_owner_that_does_not_ask_starts_empty(void **state)
{
	struct fx *f = *state;

	fx_open(f);
	fx_write(f, 100, 32768, TIER_SHORT, NULL);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	fx_close(f);
	fx_open(f);
	fx_write(f, 10, 32768, TIER_SHORT, NULL);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	reopen(f);
	for (uint64_t no = 0; no < 110; no++)
		assert_int_equal(f->page[no].found, no >= 100);
}

/* ---- killed at any moment ------------------------------------------------------------ */

/* What the child tells us through a pipe, before it frees and after it synced. */
struct news {
	uint64_t dead;    /* pages below this were freed before the last sync began */
	uint64_t doomed;  /* pages below this may have been freed by now */
	uint64_t durable; /* pages from `doomed` up to this must be found */
};

/* Write, free, sync now and then, until killed. A process of its own: a failed assertion ends it. */
static int child(const char *dir, bool no_uring, uint64_t seed)
{
	struct fx *f = calloc(1, sizeof(*f));
	struct news news = {0};
	uint64_t dead = 0;

	fx_init(f);
	strcpy(f->dir, dir);
	f->cfg.size = 64 << 20;
	f->cfg.no_uring = no_uring;
	f->rng = seed;
	fx_open(f);
	fx_scan(f);
	for (unsigned round = 1; f->next + 256 < FX_PAGES; round++) {
		int why;

		fx_write(f, 40, 4096 + (uint32_t)(fx_rand(f) % 60000), round % 2, &why);
		if (f->next > dead + (why ? 100 : 300))
			news.doomed = f->next - (why ? 100 : 300);
		if (write(STDOUT_FILENO, &news, sizeof(news)) != sizeof(news))
			return 1;
		while (dead < news.doomed)
			fx_kill(f, dead++);
		fx_tick(f);
		if (round % 5 == 0 && f->t->ops->sync(f->t) == 0) {
			news.dead = dead;
			news.durable = f->next;
			if (write(STDOUT_FILENO, &news, sizeof(news)) != sizeof(news))
				return 1;
		}
	}
	pause();
	return 0;
}

static struct news run_child_and_kill_it(struct fx *f, int life)
{
	char seed[32];
	struct news news = {0}, n;
	int fd[2], status;
	pid_t pid;

	snprintf(seed, sizeof(seed), "%d", life * 977 + 1);
	assert_int_equal(pipe2(fd, O_CLOEXEC), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (!pid) {
		dup2(fd[1], STDOUT_FILENO);
		execl("/proc/self/exe", "child", f->dir, f->cfg.no_uring ? "1" : "0", seed, NULL);
		_exit(127);
	}
	close(fd[1]);
	while (!news.durable && read(fd[0], &n, sizeof(n)) == sizeof(n))
		news = n;
	usleep(20000 * (unsigned)life); /* anywhere in what follows the first sync */
	kill(pid, SIGKILL);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFSIGNALED(status)); /* it did not end by itself */
	while (read(fd[0], &n, sizeof(n)) == sizeof(n))
		news = n;
	close(fd[0]);
	return news;
}

static void killed_at_any_moment_no_page_is_wrong(void **state)
{
	struct fx *f = *state;
	unsigned found = 0;

	f->cfg.size = 64 << 20;
	for (int life = 0; life < 8; life++) {
		struct news news;

		f->cfg.no_uring = life % 4 == 3;
		news = run_child_and_kill_it(f, life);
		memset(f->page, 0, sizeof(f->page));
		fx_open(f);
		fx_scan(f);
		/* More pages may have been freed or sealed since the news. */
		for (uint64_t no = 0; no < FX_PAGES; no++) {
			assert_in_range(f->page[no].found, 0, no >= news.dead);
			if (!f->page[no].found)
				continue;
			assert_int_equal(fx_check(f, no), FX_RIGHT);
			found++;
		}
		for (uint64_t no = news.doomed; no < news.durable; no++)
			assert_int_equal(f->page[no].found, 1);
		assert_true(news.durable > 0);
		fx_close(f);
		/* The next life starts afresh: it asks for nothing. */
		fx_open(f);
		memset(f->page, 0, sizeof(f->page));
		f->next = 0;
		fx_write(f, 1, 100, TIER_SHORT, NULL);
		fx_kill(f, 0);
		assert_int_equal(f->t->ops->sync(f->t), 0);
		fx_close(f);
	}
	assert_true(found > 100);
}

/* ---- damage on disk ---------------------------------------------------------------------- */

static void flip(struct fx *f, uint64_t off)
{
	char path[128], c;
	int fd;

	fx_path(f, path, "kvtier-000.dat");
	fd = open(path, O_RDWR);
	assert_true(fd >= 0);
	assert_int_equal(pread(fd, &c, 1, (off_t)off), 1);
	c ^= 0x10;
	assert_int_equal(pwrite(fd, &c, 1, (off_t)off), 1);
	assert_int_equal(fsync(fd), 0);
	close(fd);
}

static uint64_t next_seq(struct fx *f)
{
	return container_of(f->t, struct nvme, tier)->next_seq;
}

static void a_damaged_superblock_is_survived_two_are_refused(void **state)
{
	struct fx *f = *state;
	uint64_t seq;

	fx_open(f);
	fx_write(f, 40, 32768, TIER_SHORT, NULL);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	for (int i = 0; i < 4; i++) { /* whichever of the two is the newer */
		seq = next_seq(f);
		fx_close(f);
		flip(f, (i & 1 ? NVME_SUPER_B : 0) + 40);
		fx_open(f);
		fx_scan(f);
		assert_int_equal(fx_verify(f), 40);
		assert_true(next_seq(f) >> 32 > seq >> 32); /* numbers of the last life never come again */
	}
	fx_close(f);
	fx_open(f); /* rewrites the second one */
	fx_close(f);
	flip(f, 48);
	flip(f, NVME_SUPER_B + 48);
	assert_int_equal(fx_try_open(f), -EBADMSG);
	assert_non_null(strstr(f->err, "kvtier-000.dat: superblock: checksum wrong in both places"));
	flip(f, 0); /* not even the magic */
	flip(f, NVME_SUPER_B);
	assert_int_equal(fx_try_open(f), -EBADMSG);
	assert_non_null(strstr(f->err, "none in either place"));
}

static void another_version_is_refused_by_name(void **state)
{
	struct fx *f = *state;
	_Alignas(8) char unit[KVT_UNIT], again[KVT_UNIT];
	struct nvme_tag *tag = (void *)unit;
	char path[128];
	int fd;

	fx_open(f);
	fx_close(f);
	fx_path(f, path, "kvtier-000.dat");
	fd = open(path, O_RDWR);
	assert_int_equal(pread(fd, unit, sizeof(unit), 0), sizeof(unit));
	tag->version = 2;
	tag->crc = 0;
	tag->crc = crc32c(0, unit, sizeof(unit));
	assert_int_equal(pwrite(fd, unit, sizeof(unit), 0), sizeof(unit));
	assert_int_equal(fx_try_open(f), -EPROTONOSUPPORT);
	assert_non_null(strstr(f->err, "kvtier-000.dat: version 2, this daemon knows 1"));
	assert_int_equal(pread(fd, again, sizeof(again), 0), sizeof(again));
	assert_memory_equal(unit, again, sizeof(unit)); /* untouched */
	close(fd);
}

static void another_geometry_is_refused_by_name(void **state)
{
	struct fx *f = *state;

	fx_open(f);
	fx_close(f);
	f->cfg.segment = 2 << 20;
	assert_int_equal(fx_try_open(f), -EINVAL);
	assert_non_null(strstr(f->err, "segment 1048576, configured 2097152"));
	f->cfg.segment = 1 << 20;
	f->cfg.size = 40 << 20;
	assert_int_equal(fx_try_open(f), -EINVAL);
	assert_non_null(strstr(f->err, "size 33554432, configured 41943040"));
}

/* Segment index of a page; segments follow the preamble. */
static uint64_t segment_off(struct fx *f, uint64_t no)
{
	return NVME_PREAMBLE + (f->page[no].addr >> 40) * f->cfg.segment;
}

static void a_damaged_segment_is_a_miss_and_the_others_stay(void **state)
{
	static const char *const what[] = {"head", "foot", "table", "both live maps"};
	struct fx *f = *state;

	for (unsigned w = 0; w < ARRAY_SIZE(what); w++) {
		uint64_t off, hit = 0, kept = 0;
		uint32_t index;

		print_message("# %s\n", what[w]);
		f->next = 0;
		memset(f->page, 0, sizeof(f->page));
		fx_open(f);
		fx_write(f, 200, 32768, TIER_SHORT, NULL);
		assert_int_equal(f->t->ops->sync(f->t), 0);
		fx_kill(f, 60);
		assert_int_equal(f->t->ops->sync(f->t), 0);
		fx_close(f);
		index = (uint32_t)(f->page[60].addr >> 40);
		off = segment_off(f, 60);
		if (w == 0)
			flip(f, off + 100);
		if (w == 1)
			flip(f, off + f->cfg.segment - 1);
		if (w == 2)
			flip(f, off + f->cfg.segment - 2 * KVT_UNIT + 50);
		if (w == 3) {
			flip(f, off + KVT_UNIT + 60);
			flip(f, off + 2 * KVT_UNIT + 60);
		}
		fx_open(f);
		fx_scan(f);
		for (uint64_t no = 0; no < 200; no++) {
			bool inside = (f->page[no].addr >> 40) == index;

			hit += inside && !f->page[no].found;
			kept += f->page[no].found;
			if (!inside)
				assert_int_equal(f->page[no].found, 1);
			else if (w < 3)
				assert_int_equal(f->page[no].found, 0);
			f->page[no].live = f->page[no].found;
		}
		if (w == 3)
			assert_int_equal(f->page[60].found, 1); /* the foot is all that is left to go by */
		else
			assert_true(hit > 10);
		assert_int_equal(fx_verify(f), kept);
		for (uint64_t no = 0; no < 200; no++)
			fx_kill(f, no);
		assert_int_equal(f->t->ops->sync(f->t), 0);
		fx_close(f);
	}
}

static void a_torn_live_map_falls_back_to_the_older(void **state)
{
	struct fx *f = *state;

	fx_open(f);
	fx_write(f, 20, 32768, TIER_SHORT, NULL);
	assert_int_equal(f->t->ops->sync(f->t), 0);
	fx_kill(f, 3);
	assert_int_equal(f->t->ops->sync(f->t), 0); /* generation 1, place B */
	fx_kill(f, 4);
	assert_int_equal(f->t->ops->sync(f->t), 0); /* generation 2, place A */
	fx_close(f);
	flip(f, segment_off(f, 3) + KVT_UNIT + 60);
	fx_open(f);
	fx_scan(f);
	for (uint64_t no = 0; no < 20; no++)
		assert_int_equal(f->page[no].found, no != 3);
}

static void an_interrupted_creation_is_started_over(void **state)
{
	struct fx *f = *state;
	char path[128], other[128];
	int fd;

	fx_path(f, path, "kvtier-000.dat.new");
	fd = open(path, O_CREAT | O_RDWR, 0600);
	assert_int_equal(write(fd, "half", 4), 4);
	close(fd);
	f->cfg.prealloc = true;
	fx_open(f);
	assert_int_equal(access(path, F_OK), -1);
	fx_close(f);
	fx_path(f, path, "kvtier-000.dat");
	fx_path(f, other, "kvtier-003.dat");
	assert_int_equal(rename(path, other), 0);
	assert_int_equal(fx_try_open(f), -EINVAL);
	assert_non_null(strstr(f->err, "kvtier-003.dat: exists, but kvtier-000.dat is missing"));
}

#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		T(exactly_the_live_pages_come_back),
		T(an_unsealed_segment_is_discarded),
		T(pages_the_owner_refuses_are_freed_for_good),
		T(an_owner_that_does_not_ask_starts_empty),
		T(killed_at_any_moment_no_page_is_wrong),
		T(a_damaged_superblock_is_survived_two_are_refused),
		T(another_version_is_refused_by_name),
		T(another_geometry_is_refused_by_name),
		T(a_damaged_segment_is_a_miss_and_the_others_stay),
		T(a_torn_live_map_falls_back_to_the_older),
		T(an_interrupted_creation_is_started_over),
	};

	if (argc == 4 && !strcmp(argv[0], "child"))
		return child(argv[1], argv[2][0] == '1', strtoull(argv[3], NULL, 10));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
