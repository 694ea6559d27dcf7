# SPDX-License-Identifier: MIT
# kvtier: one plain Makefile. `make help` lists the targets; V=1 shows the commands.

VERSION   := 0.1.0
SOVERSION := 0
BUILD     ?= build
PREFIX    ?= /usr
SYSCONFDIR ?= /etc
LIBDIR    ?= $(PREFIX)/lib/$(shell $(CC) -print-multiarch 2>/dev/null)
UNITDIR   ?= $(PREFIX)/lib/systemd/system
PYTHON    ?= python3
CC        ?= gcc
SCDOC     ?= scdoc
SAN       ?=
OPT       ?= -O2 -g

ifeq ($(V),1)
Q :=
say = @:
else
Q := @
say = @printf '  %-7s %s\n'
endif

CPPFLAGS += -D_GNU_SOURCE -I. -DKVT_VERSION='"$(VERSION)"' -DKVT_SYSCONFDIR='"$(SYSCONFDIR)"' \
	    -DKVT_DATADIR='"$(PREFIX)/share/kvtier"'
WARN     := -Wall -Wextra -Werror -Wno-unused-parameter -Wvla -Wstrict-prototypes -Wmissing-prototypes -Wshadow
CFLAGS   += -std=gnu11 $(OPT) -fPIC -fvisibility=hidden -fno-strict-aliasing -pthread $(WARN) \
	    $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer)
LDFLAGS  += -pthread -Wl,-z,relro,-z,now $(if $(SAN),-fsanitize=$(SAN))
PKGS     := libsystemd inih jansson
LIBS     := -luring -lnuma -lisal -lcrypto -lsystemd -linih -ljansson -lm

# Rooms. A file dropped into a room is built; nothing else needs to know.
SHM    := $(wildcard shm/*.c)
IPC    := $(wildcard ipc/*.c)
CLIENT := $(wildcard ipc/client/*.c)
TIERS  := $(wildcard tiers/*.c)
POLICY := $(wildcard policy/*.c)
DAEMON := $(filter-out daemon/main.c,$(wildcard daemon/*.c))
CTL    := $(wildcard daemon/ctl/*.c)
TOOLS  := $(wildcard policy/tools/kvtier-*.c)
UNIT   := $(wildcard tests/unit/test_*.c)
BENCH  := $(wildcard tests/bench/bench_*.c)
HELPERS := $(wildcard tests/integration/*.c)

obj = $(patsubst %.c,$(BUILD)/obj/%.o,$(1))
ROOMS := $(call obj,$(SHM) $(IPC) $(TIERS) $(POLICY))
LIBOBJ := $(call obj,$(SHM) $(IPC) $(CLIENT))

# Tests that need more than one core library say so here.
BENCH_LIBS := -lopenblas

DAEMON_BIN := $(if $(wildcard daemon/main.c),$(BUILD)/kvtierd)
CTL_BIN    := $(if $(CTL),$(BUILD)/kvtierctl)
TOOL_BINS  := $(patsubst policy/tools/%.c,$(BUILD)/%,$(TOOLS))
UNIT_BINS  := $(patsubst tests/%.c,$(BUILD)/tests/%,$(UNIT))
BENCH_BINS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(BENCH))
HELPER_BINS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(HELPERS))
SOLIB      := $(BUILD)/libkvtier.so.$(SOVERSION)
MANSRC     := $(wildcard daemon/man/*.scd ipc/man/*.scd)
MAN        := $(patsubst %.scd,$(BUILD)/man/%,$(notdir $(MANSRC)))

.PHONY: all
all: $(DAEMON_BIN) $(CTL_BIN) $(if $(CLIENT),$(SOLIB) $(BUILD)/libkvtier.a $(BUILD)/libkvtier.pc) $(TOOL_BINS) man ## build everything


# ---- objects ------------------------------------------------------------------
$(BUILD)/obj/policy/%_avx2.o: CFLAGS += -mavx2 -mfma -mf16c
$(BUILD)/obj/policy/%_avx512.o: CFLAGS += -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c -mavx512bf16

$(BUILD)/obj/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(say) CC $<
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/librooms.a: $(ROOMS)
	$(say) AR $@
	$(Q)rm -f $@ && ar rcs $@ $^

$(BUILD)/libdaemon.a: $(call obj,$(DAEMON))
	$(say) AR $@
	$(Q)rm -f $@ && ar rcs $@ $^

$(BUILD)/kvtierd: $(call obj,daemon/main.c) $(BUILD)/libdaemon.a $(BUILD)/librooms.a
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)

$(BUILD)/kvtierctl: $(call obj,$(CTL)) $(BUILD)/librooms.a
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)

$(BUILD)/kvtier-%: $(BUILD)/obj/policy/tools/kvtier-%.o $(BUILD)/librooms.a
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)

# ---- libkvtier ------------------------------------------------------------------
$(SOLIB): $(LIBOBJ) ipc/libkvtier.map
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -shared -Wl,-soname,libkvtier.so.$(SOVERSION) -Wl,--version-script=ipc/libkvtier.map \
		-Wl,-z,defs -o $@ $(LIBOBJ) -lisal -lcrypto
	$(Q)ln -sf libkvtier.so.$(SOVERSION) $(BUILD)/libkvtier.so

$(BUILD)/libkvtier.a: $(LIBOBJ)
	$(say) AR $@
	$(Q)rm -f $@ && ar rcs $@ $^

$(BUILD)/libkvtier.pc: ipc/libkvtier.pc.in Makefile
	$(say) GEN $@
	$(Q)sed -e 's|@PREFIX@|$(PREFIX)|;s|@LIBDIR@|$(LIBDIR)|;s|@VERSION@|$(VERSION)|' $< > $@

# ---- manual pages -----------------------------------------------------------------
.PHONY: man
man: $(MAN) ## manual pages into build/man
vpath %.scd daemon/man ipc/man
$(BUILD)/man/%: %.scd
	@mkdir -p $(@D)
	$(say) MAN $@
	$(Q)$(SCDOC) < $< > $@.tmp && mv $@.tmp $@

# ---- tests ------------------------------------------------------------------------
$(BUILD)/tests/unit/%: tests/unit/%.c $(BUILD)/libdaemon.a $(BUILD)/librooms.a $(if $(CLIENT),$(BUILD)/libkvtier.a)
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d -Wno-missing-prototypes $(LDFLAGS) -o $@ $< \
		$(if $(CLIENT),$(BUILD)/libkvtier.a) $(BUILD)/libdaemon.a $(BUILD)/librooms.a -lcmocka $(LIBS)

$(BUILD)/tests/bench/%: tests/bench/%.c $(BUILD)/libdaemon.a $(BUILD)/librooms.a $(if $(CLIENT),$(BUILD)/libkvtier.a)
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d -Wno-missing-prototypes $(LDFLAGS) -o $@ $< \
		$(if $(CLIENT),$(BUILD)/libkvtier.a) $(BUILD)/libdaemon.a $(BUILD)/librooms.a $(LIBS) $(BENCH_LIBS)

$(BUILD)/tests/integration/%: tests/integration/%.c $(SOLIB) $(BUILD)/librooms.a
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d -Wno-missing-prototypes $(LDFLAGS) -o $@ $< \
		-L$(BUILD) -lkvtier -Wl,-rpath,'$$ORIGIN/../..' $(BUILD)/librooms.a $(LIBS)

.PHONY: tests-bin bench-bin
tests-bin: all $(UNIT_BINS) $(HELPER_BINS)
bench-bin: all $(BENCH_BINS)

.PHONY: clean
clean: ## remove build output
	rm -rf $(BUILD)

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 20

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
