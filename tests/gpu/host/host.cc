/* SPDX-License-Identifier: MIT */
/* Blocks of fibers: see cuda_runtime.h beside this. x86-64. */
#include "cublas_v2.h"

#include <cblas.h>
#include <cstdio>
#include <cstdlib>

#define THREADS 256u
#define STACK ((size_t)64 << 10)
#define SHARED_BYTES ((size_t)48 << 10) /* what a kernel gets without asking */

dim3 threadIdx, blockIdx, blockDim, gridDim;
unsigned char *host_shared;

struct fiber {
	void *sp;
	bool live;
	unsigned warp_turn, block_turn; /* barriers passed */
};

static struct fiber fibers[THREADS];
static unsigned char *stacks;
static void *scheduler_sp;
static unsigned current, live, waiting, turn; /* of the block barrier */
static unsigned warp_waiting[THREADS / 32], warp_turn[THREADS / 32];
static uint64_t slots[THREADS];
static void (*body)(void *);
static void *body_arg;
static unsigned long progress;

extern "C" void host_switch(void **save, void *to);
__asm__(".text\n.globl host_switch\n.hidden host_switch\nhost_switch:\n"
	"push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
	"mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
	"pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");

static void yield(void)
{
	host_switch(&fibers[current].sp, scheduler_sp);
}

static void pass_block(void)
{
	waiting = 0;
	turn++;
	progress++;
}

void host_block_barrier(void)
{
	unsigned mine = turn;

	if (++waiting == live)
		pass_block();
	else
		while (turn == mine)
			yield();
}

static void warp_barrier(void)
{
	unsigned w = current / 32, mine = warp_turn[w];

	if (++warp_waiting[w] == 32) {
		warp_waiting[w] = 0;
		warp_turn[w]++;
		progress++;
		return;
	}
	while (warp_turn[w] == mine)
		yield();
}

uint64_t host_exchange(uint64_t value, unsigned from)
{
	uint64_t got;

	slots[current] = value;
	warp_barrier();
	got = slots[current / 32 * 32 + from];
	warp_barrier();
	return got;
}

static void fiber_main(void)
{
	body(body_arg);
	fibers[current].live = false;
	progress++;
	if (--live > 0 && waiting == live)
		pass_block();
	for (;;)
		yield();
}

static void start_fiber(unsigned i)
{
	void **sp = (void **)(stacks + (i + 1) * STACK - 64);

	*--sp = NULL; /* keeps the stack as a call leaves it */
	*--sp = (void *)fiber_main;
	for (int r = 0; r < 6; r++)
		*--sp = NULL;
	fibers[i].sp = sp;
	fibers[i].live = true;
}

static void run_block(size_t shared)
{
	const char *order = getenv("KVT_HOST_ORDER");
	bool falling = order && strcmp(order, "falling") == 0;

	if (shared > SHARED_BYTES) {
		fprintf(stderr, "a kernel asked for %zu bytes of shared memory\n", shared);
		abort();
	}
	memset(host_shared, 0xff, SHARED_BYTES);
	live = THREADS;
	waiting = 0;
	memset(warp_waiting, 0, sizeof(warp_waiting));
	for (unsigned i = 0; i < THREADS; i++)
		start_fiber(i);
	while (live > 0) {
		unsigned long before = progress;

		for (unsigned i = 0; i < THREADS; i++) {
			current = falling ? THREADS - 1 - i : i;
			if (!fibers[current].live)
				continue;
			threadIdx = dim3(current);
			host_switch(&scheduler_sp, fibers[current].sp);
		}
		if (live > 0 && progress == before) {
			fprintf(stderr, "block %u,%u,%u waits for itself: a barrier that some threads miss\n",
				blockIdx.x, blockIdx.y, blockIdx.z);
			abort();
		}
	}
}

void host_launch(dim3 grid, unsigned block, size_t shared, void (*run)(void *), void *arg)
{
	if (block != THREADS || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
		fprintf(stderr, "bad launch: grid %u,%u,%u of %u\n", grid.x, grid.y, grid.z, block);
		abort();
	}
	if (!stacks) {
		stacks = (unsigned char *)malloc(THREADS * STACK);
		host_shared = (unsigned char *)aligned_alloc(64, SHARED_BYTES);
	}
	body = run;
	body_arg = arg;
	gridDim = grid;
	blockDim = dim3(block);
	for (unsigned z = 0; z < grid.z; z++)
		for (unsigned y = 0; y < grid.y; y++)
			for (unsigned x = 0; x < grid.x; x++) {
				blockIdx = dim3(x, y, z);
				run_block(shared);
			}
}

cudaError_t cudaMalloc(void **p, size_t size)
{
	*p = aligned_alloc(256, (size + 255) / 256 * 256);
	if (!*p)
		return cudaErrorMemoryAllocation;
	memset(*p, 0xff, size);
	return cudaSuccess;
}

cudaError_t cudaMallocHost(void **p, size_t size)
{
	return cudaMalloc(p, size);
}

cudaError_t cudaFree(void *p)
{
	free(p);
	return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p)
{
	return cudaFree(p);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all)
{
	*free_bytes = *all = (size_t)4 << 30;
	return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind, cudaStream_t)
{
	memcpy(to, from, n);
	return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
			      size_t height, cudaMemcpyKind, cudaStream_t)
{
	for (size_t i = 0; i < height; i++)
		memcpy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
	return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t)
{
	memset(to, value, n);
	return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count)
{
	*count = 1;
	return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t)
{
	return "out of memory";
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m,
					  int n, int k, const void *alpha, const void *a, cudaDataType_t,
					  int lda, long long stride_a, const void *b, cudaDataType_t, int ldb,
					  long long stride_b, const void *beta, void *c, cudaDataType_t,
					  int ldc, long long stride_c, int batch, cublasComputeType_t, int)
{
	for (long long i = 0; i < batch; i++)
		cblas_sgemm(CblasColMajor, ta == CUBLAS_OP_T ? CblasTrans : CblasNoTrans,
			    tb == CUBLAS_OP_T ? CblasTrans : CblasNoTrans, m, n, k, *(const float *)alpha,
			    (const float *)a + i * stride_a, lda, (const float *)b + i * stride_b, ldb,
			    *(const float *)beta, (float *)c + i * stride_c, ldc);
	return CUBLAS_STATUS_SUCCESS;
}
