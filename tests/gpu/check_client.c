/* SPDX-License-Identifier: MIT */
/*
 * libkvtier's CUDA side end to end: a core in this process, rows in GPU memory, plans carried out by the
 * kernels, every row compared byte for byte. TAP. On a GPU, or on the fake driver ($KVTIER_LIBCUDA). Exit
 * status 77 with one line where there is no GPU.
 */
#include <stdio.h>
#include "tests/unit/gpu_live.h"

static int number, failed;

static void result(const char *name, const char *bad, const char *more)
{
	number++;
	failed += bad != NULL;
	printf("%sok %d - %s%s%s%s%s\n", bad ? "not " : "", number, name, bad ? ": " : "", bad ? bad : "",
	       more ? " # " : "", more ? more : "");
	fflush(stdout);
}

struct shape {
	const char *name;
	uint32_t layers, heads, k, v, pad, cap, stage, max_rows, rounds;
	uint64_t ring;
	bool nvme;
};

static const char *run(const struct shape *s, struct gpu *gpu, struct harness *h, char *note, size_t size)
{
	struct kvtier_cuda_window *w = NULL;
	struct runtime rt;
	struct gpu_seq q = {0};
	const char *bad = NULL;
	uint64_t start = now_ns();

	if (rt_open_dims(&rt, h->sock[0], s->layers, s->heads, s->k, s->v, 0, 0))
		return kvtier_last_error();
	if (kvtier_cuda_window_create(rt.c, gpu->g, 4 * s->ring + (1 << 20), &w) ||
	    gpu_prepare(&q, gpu, &rt, w, 7 + s->k, s->cap, s->stage, s->max_rows, s->pad) ||
	    gpu_seq_open(&q, KVT_EPHEMERAL, NULL, s->ring))
		bad = kvtier_last_error();
	if (!bad)
		bad = gpu_live(&q, s->rounds, NULL);
	snprintf(note, size,
		 "%u lanes, rows of %u + %u, %u plans in place, %u to other memory, %llu KiB out, %llu in, "
		 "%.1f s",
		 rt.lanes, s->k, s->v, q.applied, q.moved, (unsigned long long)(q.state.bytes_out >> 10),
		 (unsigned long long)(q.state.bytes_in >> 10), (double)(now_ns() - start) * 1e-9);
	if (!bad && rt_info(&q.rt).misses)
		bad = "pages were missed";
	if (q.gpu)
		gpu_seq_free(&q, false);
	kvtier_cuda_window_close(w);
	rt_close(&rt);
	return bad;
}

/* Save, close, resume in other memory, bring everything back. */
static const char *resume(struct gpu *gpu, struct harness *h)
{
	struct kvtier_cuda_window *w = NULL;
	struct runtime rt;
	struct gpu_seq q = {0}, again = {0};
	const char *bad = NULL;
	uint32_t *salts;

	if (rt_open_dims(&rt, h->sock[0], 4, 4, 256, 256, 0, 0))
		return kvtier_last_error();
	if (kvtier_cuda_window_create(rt.c, gpu->g, 8 << 20, &w) ||
	    gpu_prepare(&q, gpu, &rt, w, 99, 2000, 2000, 2000, 0) ||
	    gpu_prepare(&again, gpu, &rt, w, 99, 2000, 2000, 2000, 32) ||
	    gpu_seq_open(&q, KVT_LEASED, NULL, 1 << 20) || gpu_append(&q, 1500) ||
	    kvtier_cuda_settle(q.rt.s, 1, 20000, q.stream) || gpu_wrong(&q))
		bad = kvtier_last_error();
	if (!bad) {
		kvtier_seq_close(q.rt.s);
		q.rt.s = NULL;
		salts = again.rt.salts;
		again.rt.salts = q.rt.salts;
		q.rt.salts = salts;
		if (gpu_seq_resume(&again, NULL, 1 << 20))
			bad = kvtier_last_error();
		else if (again.rt.rows != 1500 || gpu_plan(&again, 1500, 2000, KVT_ROWS_ALL, NULL))
			bad = kvtier_last_error();
		else if (kvtier_cuda_counts(again.rt.s, again.counts) != 1500 || gpu_wrong(&again))
			bad = "rows that came back";
		else if (gpu_append(&again, 300) || gpu_plan(&again, 700, 300, KVT_ROWS_ALL, NULL) ||
			 gpu_wrong(&again))
			bad = kvtier_last_error();
	}
	if (q.gpu)
		gpu_seq_free(&q, false);
	if (again.gpu)
		gpu_seq_free(&again, true);
	kvtier_cuda_window_close(w);
	rt_close(&rt);
	return bad;
}

/* A pool made here, mapped again by its descriptor: one memory under two addresses. */
static const char *pool(struct gpu *gpu)
{
	struct kvtier_cuda_pool *a = NULL, *b = NULL;
	uint64_t out[512], in[512];
	const char *bad = NULL;
	int fd = -1;

	for (uint32_t i = 0; i < 512; i++)
		in[i] = i * 0x9e3779b97f4a7c15u;
	if (kvtier_cuda_pool_create(gpu->g, 3 << 20, &a))
		return kvtier_last_error();
	fd = kvtier_cuda_pool_fd(a);
	if (fd < 0 || kvtier_cuda_pool_import(gpu->g, fd, kvtier_cuda_pool_bytes(a), &b)) {
		bad = kvtier_last_error();
	} else if (!cuda_enter(gpu->g)) {
		uint64_t last = kvtier_cuda_pool_bytes(a) - sizeof(in);

		if (gpu->d->copy_in(kvtier_cuda_pool_addr(a) + last, in, sizeof(in), NULL) ||
		    gpu->d->stream_sync(NULL) ||
		    gpu->d->copy_out(out, kvtier_cuda_pool_addr(b) + last, sizeof(out), NULL) ||
		    gpu->d->stream_sync(NULL) || memcmp(in, out, sizeof(in)))
			bad = "what one wrote the other does not read";
		cuda_leave(gpu->g);
	}
	close_fdp(&fd);
	kvtier_cuda_pool_close(a);
	kvtier_cuda_pool_close(b);
	return bad;
}

int main(int argc, char **argv)
{
	static const struct shape shapes[] = {
		{"small rows", 2, 3, 48, 32, 0, 500, 300, 4000, 120, 1 << 16, true},
		{"one page at a time", 2, 3, 48, 32, 16, 500, 300, 4000, 60, 1, false},
		{"SmolLM2-135M's shape", 30, 3, 128, 128, 0, 600, 400, 3000, 60, 4 << 20, true},
		{"7B shape", 28, 4, 256, 256, 0, 400, 300, 2000, 40, 8 << 20, true},
	};
	struct kvtier_cuda_info info = {.size = sizeof(info)};
	struct harness h;
	struct gpu gpu;
	char note[256] = "";
	bool small = argc > 1 && !strcmp(argv[1], "--small"); /* for the sanitizer */
	int r = kvtier_cuda_open(NULL, &gpu.g);

	if (r) {
		printf("1..0 # SKIP %s\n", kvtier_last_error());
		return r == KVT_E_GPU ? 77 : 1;
	}
	gpu.d = gpu.g->d;
	(void)kvtier_cuda_info(gpu.g, &info);
	printf("# %s, driver %d, NUMA node %d\n", info.name, info.driver, info.numa_node);
	harness_init(&h, true);
	strcpy(h.cfg.policy, "random");
	h.cfg.dram_size = UINT64_C(1) << 30;
	h.cfg.nvme_size = UINT64_C(1) << 30;
	if (!harness_start(&h))
		return 1;
	for (size_t i = 0; i < (small ? 1 : ARRAY_SIZE(shapes)); i++) {
		const char *bad = run(&shapes[i], &gpu, &h, note, sizeof(note));

		result(shapes[i].name, bad, note);
	}
	result("saved, closed, resumed", resume(&gpu, &h), NULL);
	result("a pool by its descriptor", pool(&gpu), NULL);
	harness_stop(&h);
	harness_rm(h.dir);
	gpu_close(&gpu);
	printf("1..%d\n", number);
	return failed ? 1 : 0;
}
