/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The few fields of the kernel's structures that the programs read. libbpf finds where they are in the running
 * kernel (CO-RE), so that a build depends on no kernel.
 */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct gendisk {
	int major, first_minor;
};
struct request_queue {
	struct gendisk *disk;
};
struct request {
	struct request_queue *q;
	unsigned int cmd_flags;
};
struct task_struct {
	int pid, tgid;
};

#pragma clang attribute pop
