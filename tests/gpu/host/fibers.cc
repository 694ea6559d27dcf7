/* SPDX-License-Identifier: MIT */
/* Blocks of fibers: see cuda_runtime.h beside this. x86-64. One launch at a time: the caller sees to that. */
#include "cuda_runtime.h"

#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#define THREADS 1024u
#define STACK ((size_t)64 << 10)

dim3 threadIdx, blockIdx, blockDim, gridDim;
unsigned char *host_shared;

struct fiber {
	void *sp;
	bool live;
};
/* Of the threads of a warp that wait together: a mask is known by its lowest lane. */
struct meeting {
	unsigned waiting, turn, mask;
};

static struct fiber fibers[THREADS];
static struct meeting meetings[THREADS];
static unsigned alive[THREADS / 32]; /* lanes of each warp that have not returned */
static unsigned char *stacks, *shared_end;
static void *scheduler_sp;
static unsigned current, threads, live, waiting, turn; /* of the block barrier */
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

static void pass_warp(struct meeting *m)
{
	m->waiting = 0;
	m->turn++;
	progress++;
}

static bool all_there(const struct meeting *m, unsigned warp)
{
	return m->waiting && m->waiting == (unsigned)__builtin_popcount(m->mask & alive[warp]);
}

void host_warp_barrier(unsigned mask)
{
	unsigned warp = current / 32, lane = current % 32, mine;
	struct meeting *m;

	if (!(mask >> lane & 1)) {
		fprintf(stderr, "thread %u is not in its own mask %#x\n", current, mask);
		abort();
	}
	m = &meetings[warp * 32 + (unsigned)__builtin_ctz(mask)];
	m->mask = mask;
	mine = m->turn;
	m->waiting++;
	if (all_there(m, warp))
		pass_warp(m);
	else
		while (m->turn == mine)
			yield();
}

uint64_t host_exchange_mask(unsigned mask, uint64_t value, unsigned from)
{
	uint64_t got;

	slots[current] = value;
	host_warp_barrier(mask);
	got = slots[current / 32 * 32 + from % 32];
	host_warp_barrier(mask);
	return got;
}

uint64_t host_exchange(uint64_t value, unsigned from)
{
	return host_exchange_mask(~0u, value, from);
}

unsigned host_ballot(unsigned mask, bool yes)
{
	unsigned warp = current / 32, got = 0;

	slots[current] = yes;
	host_warp_barrier(mask);
	for (unsigned i = 0; i < 32; i++)
		if ((mask & alive[warp]) >> i & 1 && slots[warp * 32 + i])
			got |= 1u << i;
	host_warp_barrier(mask);
	return got;
}

static void fiber_main(void)
{
	unsigned warp = current / 32;

	body(body_arg);
	fibers[current].live = false;
	alive[warp] &= ~(1u << current % 32);
	progress++;
	if (--live > 0 && waiting == live)
		pass_block();
	for (unsigned i = 0; i < 32; i++)
		if (all_there(&meetings[warp * 32 + i], warp))
			pass_warp(&meetings[warp * 32 + i]);
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
	meetings[i] = {0, 0, 0};
	alive[i / 32] |= 1u << i % 32;
}

static void run_block(bool falling)
{
	live = threads;
	waiting = 0;
	for (unsigned i = 0; i < threads; i++)
		start_fiber(i);
	while (live > 0) {
		unsigned long before = progress;

		for (unsigned i = 0; i < threads; i++) {
			current = falling ? threads - 1 - i : i;
			if (!fibers[current].live)
				continue;
			threadIdx = dim3(current % blockDim.x, current / blockDim.x);
			host_switch(&scheduler_sp, fibers[current].sp);
		}
		if (live > 0 && progress == before) {
			fprintf(stderr, "block %u,%u,%u waits for itself: a barrier that some threads miss\n",
				blockIdx.x, blockIdx.y, blockIdx.z);
			abort();
		}
	}
}

/* What is behind the shared memory that the launch asked for must not be touched: it ends at a page of nothing.
 */
static void set_up(void)
{
	size_t bytes = (size_t)256 << 10; /* whole pages, at least HOST_SHARED_MAX */
	char *p = (char *)mmap(NULL, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	stacks = (unsigned char *)mmap(NULL, THREADS * STACK, PROT_READ | PROT_WRITE,
				       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED || stacks == MAP_FAILED || mprotect(p + bytes, 4096, PROT_NONE))
		abort();
	shared_end = (unsigned char *)p + bytes;
}

void host_run(dim3 grid, dim3 block, size_t shared, void (*run)(void *), void *arg, unsigned blocks)
{
	const char *order = getenv("KVT_HOST_ORDER");
	bool falling = order && strcmp(order, "falling") == 0;
	size_t room = (shared + 127) / 128 * 128;

	if (!stacks)
		set_up();
	threads = block.x * block.y;
	body = run;
	body_arg = arg;
	blockDim = block;
	gridDim = grid;
	host_shared = shared_end - room;
	for (unsigned z = 0; z < grid.z; z++)
		for (unsigned y = 0; y < grid.y; y++)
			for (unsigned x = 0; x < grid.x && blocks; x++, blocks--) {
				memset(host_shared, 0xff, room);
				blockIdx = dim3(x, y, z);
				run_block(falling);
			}
}

const char *host_bad_launch(dim3 grid, dim3 block, size_t shared)
{
	unsigned n = block.x * block.y;

	if (!n || block.z != 1 || n > THREADS || n % 32)
		return "threads: must be 32..1024, a multiple of 32, in x and y";
	if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
		return "grid: must be 1..2^31-1, 1..65535, 1..65535";
	return shared > HOST_SHARED_MAX ? "shared memory: must be at most 227 KiB" : NULL;
}

void host_launch(dim3 grid, unsigned block, size_t shared, void (*run)(void *), void *arg)
{
	const char *bad = host_bad_launch(grid, dim3(block), shared);

	if (!bad && shared > HOST_SHARED_PLAIN)
		bad = "shared memory: 48 KiB is what a kernel gets without asking";
	if (bad) {
		fprintf(stderr, "bad launch: grid %u,%u,%u of %u: %s\n", grid.x, grid.y, grid.z, block, bad);
		abort();
	}
	host_run(grid, dim3(block), shared, run, arg, ~0u);
}
