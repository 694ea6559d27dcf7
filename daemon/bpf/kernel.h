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
struct pt_regs {               /* x86; where it has no such field the group is off */
	unsigned long orig_ax; /* the number of a system call; negative: entered by an exception or interrupt */
};
struct task_struct {
	int pid, tgid;
};

#pragma clang attribute pop
