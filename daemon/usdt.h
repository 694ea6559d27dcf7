/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Probes for bpftrace and the like: a nop each, until somebody attaches. kvtierd-bpf(8) lists them with their
 * arguments. Without <sys/sdt.h> (systemtap-sdt-dev) there are none.
 */
#if __has_include(<sys/sdt.h>)
#define SDT_USE_VARIADIC
#include <sys/sdt.h>
#define USDT(name, ...) STAP_PROBEV(kvtierd, name, __VA_ARGS__)
#else
static inline void usdt_none(int first, ...)
{
}
#define USDT(name, ...) usdt_none(0, __VA_ARGS__)
#endif
