/* SPDX-License-Identifier: MIT */
/*
 * What the kernel sees of the daemon's disk, its io_uring, and of threads that wait. Raw tracepoints: their
 * arguments are words, so that a program does not depend on the types that a kernel gave them. Whom to look at
 * is read from `targets`; until the daemon fills it in, each program ends after one look.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include "daemon/bpf/kernel.h"
#include "shm/probe.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define REQ_OP_MASK 0xffu
enum { OP_READ = 0, OP_WRITE = 1 };

#define ONE(t)                                                                                                 \
	struct {                                                                                               \
		__uint(type, BPF_MAP_TYPE_ARRAY);                                                              \
		__uint(map_flags, BPF_F_MMAPABLE);                                                             \
		__uint(max_entries, 1);                                                                        \
		__type(key, __u32);                                                                            \
		__type(value, struct t);                                                                       \
	}
ONE(probe_targets) targets SEC(".maps");
ONE(probe_counts) counts SEC(".maps");
ONE(probe_sums) sums SEC(".maps");

#define BEGUN(kind, n)                                                                                         \
	struct {                                                                                               \
		__uint(type, kind);                                                                            \
		__uint(max_entries, n);                                                                        \
		__type(key, __u64);                                                                            \
		__type(value, __u64);                                                                          \
	}
/* When it began, by the kernel's request or by thread. What ends is taken out. */
BEGUN(BPF_MAP_TYPE_HASH, 8192) disk_begun SEC(".maps");
BEGUN(BPF_MAP_TYPE_LRU_HASH, 8192) uring_begun SEC(".maps"); /* a cancelled request may end untold */
BEGUN(BPF_MAP_TYPE_HASH, 4096) reclaim_begun SEC(".maps");
BEGUN(BPF_MAP_TYPE_LRU_HASH, 8192) fault_begun SEC(".maps"); /* a minor fault ends untold */
BEGUN(BPF_MAP_TYPE_HASH, 16384) sched_begun SEC(".maps");

static const __u32 zero;

static __always_inline struct probe_targets *whom(void)
{
	return bpf_map_lookup_elem(&targets, &zero);
}

static __always_inline struct probe_counts *count(void)
{
	return bpf_map_lookup_elem(&counts, &zero);
}

/* The slot of a process, -1: not one of ours. */
static __always_inline int slot_of(const struct probe_targets *t, __u32 tgid)
{
	__u32 at = probe_bucket(tgid);

	for (__u32 i = 0; i < PROBE_WAYS; i++)
		if (t->tgid[(at + i) % PROBE_SLOTS] == tgid)
			return (int)((at + i) % PROBE_SLOTS);
	return -1;
}

static __always_inline int current_slot(void)
{
	struct probe_targets *t = whom();

	return t && t->daemon ? slot_of(t, bpf_get_current_pid_tgid() >> 32) : -1;
}

static __always_inline struct probe_sum *sum_of(int slot)
{
	struct probe_sums *s = bpf_map_lookup_elem(&sums, &zero);

	return s ? &s->slot[(__u32)slot % PROBE_SLOTS] : NULL;
}

/* As histogram_index(): BPF has no instruction for it, and clang 14 falls over the builtin. */
static __always_inline __u32 index_of(__u64 v)
{
	__u32 i = 0;

	for (__u32 half = 32; half; half /= 2)
		if (v >> half) {
			v >>= half;
			i += half;
		}
	return i;
}

static __always_inline void add(struct histogram *h, __u64 ns)
{
	__u32 i = index_of(ns);

	__sync_fetch_and_add(&h->bucket[i < HISTOGRAM_BUCKETS ? i : HISTOGRAM_BUCKETS - 1], 1);
	__sync_fetch_and_add(&h->sum, ns);
}

static __always_inline bool begin(void *map, __u64 key)
{
	__u64 now = bpf_ktime_get_ns(), *seen = bpf_map_lookup_elem(map, &key);
	struct probe_counts *c;

	if (seen) {
		*seen = now;
		return true;
	}
	if (!bpf_map_update_elem(map, &key, &now, BPF_ANY))
		return true;
	c = count();
	if (c)
		__sync_fetch_and_add(&c->lost, 1);
	return false;
}

/* How long ago it began; -1: nobody saw that. */
static __always_inline __s64 end(void *map, __u64 key)
{
	__u64 *at = bpf_map_lookup_elem(map, &key), ns;

	if (!at)
		return -1;
	ns = bpf_ktime_get_ns() - *at;
	bpf_map_delete_elem(map, &key);
	return (__s64)ns;
}

/* ---- the disk --------------------------------------------------------------------------- */

SEC("raw_tp/block_rq_issue")
int disk_issue(struct bpf_raw_tracepoint_args *x)
{
	struct request *rq = (void *)x->args[0];
	struct probe_targets *t = whom();
	struct probe_counts *c = count();
	struct gendisk *d;
	bool again;
	__u64 key;

	if (!t || !t->dev || !c || (BPF_CORE_READ(rq, cmd_flags) & REQ_OP_MASK) > OP_WRITE)
		return 0;
	d = BPF_CORE_READ(rq, q, disk);
	if (PROBE_DEV(BPF_CORE_READ(d, major), BPF_CORE_READ(d, first_minor)) != t->dev)
		return 0;
	key = (__u64)rq;
	again = bpf_map_lookup_elem(&disk_begun, &key); /* after a requeue that was not told */
	if (begin(&disk_begun, key) && !again)
		__sync_fetch_and_add(&c->disk_begun, 1);
	return 0;
}

/* In parts, perhaps: the first ends the wait of those who asked for it. */
SEC("raw_tp/block_rq_complete")
int disk_complete(struct bpf_raw_tracepoint_args *x)
{
	struct request *rq = (void *)x->args[0];
	__s64 ns = end(&disk_begun, (__u64)rq);
	struct probe_counts *c = count();

	if (ns < 0 || !c)
		return 0;
	__sync_fetch_and_add(&c->disk_ended, 1);
	add((BPF_CORE_READ(rq, cmd_flags) & REQ_OP_MASK) == OP_READ ? &c->disk_read : &c->disk_write, ns);
	return 0;
}

/* Back to the queue: it will be issued again and counts from then. */
SEC("raw_tp/block_rq_requeue")
int disk_requeue(struct bpf_raw_tracepoint_args *x)
{
	struct probe_counts *c = count();

	if (end(&disk_begun, x->args[0]) >= 0 && c)
		__sync_fetch_and_add(&c->disk_ended, 1);
	return 0;
}

/* ---- io_uring --------------------------------------------------------------------------- */

static __always_inline int uring_begin(__u64 req)
{
	struct probe_targets *t = whom();

	if (t && t->daemon && t->daemon == bpf_get_current_pid_tgid() >> 32)
		begin(&uring_begun, req);
	return 0;
}

SEC("raw_tp/io_uring_submit_req")
int uring_submit(struct bpf_raw_tracepoint_args *x)
{
	return uring_begin(x->args[0]);
}

SEC("raw_tp/io_uring_submit_sqe") /* its name before 6.3 */
int uring_submit_sqe(struct bpf_raw_tracepoint_args *x)
{
	return uring_begin(x->args[0]);
}

SEC("raw_tp/io_uring_complete")
int uring_complete(struct bpf_raw_tracepoint_args *x)
{
	__s64 ns = end(&uring_begun, x->args[1]);
	struct probe_counts *c = count();

	if (ns >= 0 && c)
		add(&c->uring, ns);
	return 0;
}

/* ---- reclaim and faults ------------------------------------------------------------------ */

static __always_inline int reclaim_from(void)
{
	if (current_slot() >= 0)
		begin(&reclaim_begun, bpf_get_current_pid_tgid());
	return 0;
}

/* A client at its own group's limit waits for nothing that the daemon could give. */
static __always_inline bool ours_to_ease(bool host)
{
	struct probe_targets *t = whom();

	return host || (t && t->daemon == bpf_get_current_pid_tgid() >> 32);
}

static __always_inline int reclaim_to(bool host)
{
	__s64 ns = end(&reclaim_begun, bpf_get_current_pid_tgid());
	struct probe_counts *c = count();
	struct probe_sum *s;
	int slot;

	if (ns < 0 || !c)
		return 0;
	add(&c->reclaim, ns);
	if (ours_to_ease(host))
		__sync_fetch_and_add(&c->short_ns, ns);
	slot = current_slot();
	s = slot >= 0 ? sum_of(slot) : NULL;
	if (s)
		__sync_fetch_and_add(&s->reclaim_ns, ns);
	return 0;
}

SEC("raw_tp/mm_vmscan_direct_reclaim_begin")
int reclaim_begin(void *x)
{
	return reclaim_from();
}

SEC("raw_tp/mm_vmscan_direct_reclaim_end")
int reclaim_end(void *x)
{
	return reclaim_to(true);
}

SEC("raw_tp/mm_vmscan_memcg_reclaim_begin") /* the limit of a control group instead of the host's */
int memcg_begin(void *x)
{
	return reclaim_from();
}

SEC("raw_tp/mm_vmscan_memcg_reclaim_end")
int memcg_end(void *x)
{
	return reclaim_to(false);
}

/*
 * Faults are far too many to time each one's beginning: a runtime that fills memory makes hundreds of thousands
 * a second. What can hold a thread up is a fault in which it sleeps, and then it leaves its processor by
 * sched_switch, with the frame of an exception, not of a system call, where it left user mode.
 */
SEC("raw_tp/sched_switch")
int fault_begin(struct bpf_raw_tracepoint_args *x)
{
	struct pt_regs *regs;

	if (x->args[0] || !x->args[3] || current_slot() < 0) /* preempted, or it yields */
		return 0;
	regs = (void *)bpf_task_pt_regs(bpf_get_current_task_btf());
	if ((long)BPF_CORE_READ(regs, orig_ax) < 0)
		begin(&fault_begun, bpf_get_current_pid_tgid());
	return 0;
}

/* The kernel's software event of a major fault is raised when the fault is done. */
SEC("perf_event")
int fault_end(void *x)
{
	__s64 ns = end(&fault_begun, bpf_get_current_pid_tgid());
	struct probe_counts *c = count();
	int slot = current_slot();
	struct probe_sum *s = slot >= 0 ? sum_of(slot) : NULL;

	if (s)
		__sync_fetch_and_add(&s->faults, 1);
	if (ns < 0 || !c) /* it did not sleep */
		return 0;
	add(&c->fault, ns);
	if (s)
		__sync_fetch_and_add(&s->fault_ns, ns);
	return 0;
}

/* ---- the scheduler ------------------------------------------------------------------------- */

/* A client's thread: its slot; -1: not one, or the daemon's. */
static __always_inline int runtime_slot(const struct probe_targets *t, __u32 tgid)
{
	return tgid == t->daemon ? -1 : slot_of(t, tgid);
}

static __always_inline int runnable(struct task_struct *p)
{
	struct probe_targets *t = whom();

	if (t && t->daemon && runtime_slot(t, BPF_CORE_READ(p, tgid)) >= 0)
		begin(&sched_begun, BPF_CORE_READ(p, pid));
	return 0;
}

SEC("raw_tp/sched_wakeup")
int sched_wakeup(struct bpf_raw_tracepoint_args *x)
{
	return runnable((void *)x->args[0]);
}

SEC("raw_tp/sched_wakeup_new")
int sched_wakeup_new(struct bpf_raw_tracepoint_args *x)
{
	return runnable((void *)x->args[0]);
}

SEC("raw_tp/sched_switch")
int sched_switch(struct bpf_raw_tracepoint_args *x)
{
	struct task_struct *prev = (void *)x->args[1], *next = (void *)x->args[2];
	struct probe_targets *t = whom();
	struct probe_counts *c = count();
	struct probe_sum *s;
	__s64 ns;
	int slot;

	if (!t || !t->daemon || !c)
		return 0;
	if ((x->args[0] || !x->args[3]) && runtime_slot(t, BPF_CORE_READ(prev, tgid)) >= 0)
		begin(&sched_begun, BPF_CORE_READ(prev, pid)); /* preempted: it waits again */
	slot = runtime_slot(t, BPF_CORE_READ(next, tgid));
	if (slot < 0)
		return 0;
	ns = end(&sched_begun, BPF_CORE_READ(next, pid));
	if (ns < 0)
		return 0;
	add(&c->sched, ns);
	s = sum_of(slot);
	if (s)
		__sync_fetch_and_add(&s->sched_ns, ns);
	return 0;
}
