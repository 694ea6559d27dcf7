# SPDX-License-Identifier: MIT
# kvtier: one plain Makefile. `make help` lists the targets; V=1 shows the commands.

VERSION   := 0.1.0
SOVERSION := 0
BUILD     ?= build
PREFIX    ?= /usr
SYSCONFDIR ?= /etc
LIBDIR    ?= $(PREFIX)/lib/$(shell $(CC) -print-multiarch 2>/dev/null)
UNITDIR   ?= $(PREFIX)/lib/systemd/system
ZSHDIR    ?= $(PREFIX)/share/zsh/site-functions
PYTHON    ?= python3
CC        ?= gcc
SCDOC     ?= scdoc
SAN       ?=
OPT       ?= -O2 -g
TRIAL     ?=
COV       ?=

ifeq ($(V),1)
Q :=
say = @:
else
Q := @
say = @printf '  %-7s %s\n'
endif

CPPFLAGS += -D_GNU_SOURCE -I. -DKVT_VERSION='"$(VERSION)"' -DKVT_SYSCONFDIR='"$(SYSCONFDIR)"' \
	    -DKVT_DATADIR='"$(PREFIX)/share/kvtier"' -DKVT_PKGLIBDIR='"$(LIBDIR)/kvtier"' $(if $(TRIAL),-DKVT_TRIAL)
WARN     := -Wall -Wextra -Werror -Wno-unused-parameter -Wvla -Wstrict-prototypes -Wmissing-prototypes -Wshadow
CFLAGS   += -std=gnu11 $(OPT) -fPIC -fvisibility=hidden -fno-strict-aliasing -pthread $(WARN) \
	    $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer) $(if $(COV),--coverage -fprofile-update=atomic)
LDFLAGS  += -pthread -Wl,-z,relro,-z,now $(if $(SAN),-fsanitize=$(SAN)) $(if $(COV),--coverage)
PKGS     := libsystemd inih jansson
LIBS     := -luring -lnuma -lisal -lcrypto -lsystemd -linih -ljansson -lmicrohttpd -lm

# Rooms. A file dropped into a room is built; nothing else needs to know.
SHM    := $(wildcard shm/*.c)
IPC    := $(wildcard ipc/*.c)
CLIENT := $(wildcard ipc/client/*.c) $(wildcard ipc/cuda/*.c)
TIERS  := $(wildcard tiers/*.c)
POLICY := $(wildcard policy/*.c)
DAEMON := $(filter-out daemon/main.c,$(wildcard daemon/*.c))
CTL    := $(wildcard daemon/ctl/*.c)
TOOLS  := $(wildcard policy/tools/kvtier-*.c)
TRAIN  := $(wildcard policy/train/*.c)
EVAL   := $(wildcard policy/eval/*.c)
LAB    := $(wildcard policy/lab/*.c)
CUDA   := $(wildcard policy/train/cuda/*.cu)
UNIT   := $(wildcard tests/unit/test_*.c)
BENCH  := $(wildcard tests/bench/bench_*.c)
BENCH_PY := $(wildcard tests/bench/bench_*.py)
HELPERS := $(wildcard tests/integration/*.c)
TORTURE := $(wildcard tests/torture/*.c)

obj = $(patsubst %.c,$(BUILD)/obj/%.o,$(1))
ROOMS := $(call obj,$(SHM) $(IPC) $(TIERS) $(POLICY))
LIBOBJ := $(call obj,$(SHM) $(IPC) $(CLIENT))

# What trains and evaluates needs a BLAS; the daemon and the client library do not.
BLAS := -lopenblas

# CUDA is optional: nvcc makes libkvtier's kernels and, with cuBLAS, the trainer's GPU backend, an object that
# kvtier-train opens by itself. Where a host has no nvcc, .ci/deps gets one into build/cuda.
NVCC      ?= $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc) $(shell command -v nvcc 2>/dev/null) \
	     $(wildcard build/cuda/nvidia/cu*/bin/nvcc))
CUDA_ARCH ?= -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_80,code=compute_80
NVCCFLAGS += -O3 -std=c++17 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden,-Wall $(CUDA_ARCH)
CUDA_LIBS ?= -lcublas

DAEMON_BIN := $(if $(wildcard daemon/main.c),$(BUILD)/kvtierd)
CTL_BIN    := $(if $(CTL),$(BUILD)/kvtierctl)
# The BPF programs' loader is optional: clang compiles them, bpftool makes them a header, libbpf loads them.
BPF_HAS    := $(if $(SAN)$(COV),,$(shell command -v clang llvm-strip >/dev/null && PATH=$$PATH:/usr/sbin command -v bpftool >/dev/null && \
	      printf '\043include <bpf/libbpf.h>\n' | $(CC) -E - >/dev/null 2>&1 && echo yes))
BPF_BIN    := $(if $(BPF_HAS),$(BUILD)/kvtierd-bpf)
CUDA_HAS   := $(if $(and $(CUDA),$(NVCC)),$(shell printf '\043include <cublas_v2.h>\n' | $(NVCC) $(NVCCFLAGS) -x cu -E - >/dev/null 2>&1 && echo yes))
CUDA_SO    := $(if $(CUDA_HAS),$(BUILD)/kvtier-train-cuda.so)
# libkvtier's kernels, loaded at run time: one file for every GPU from compute capability 8.0 on.
KERNELS    := $(wildcard ipc/cuda/*.cu)
FATBIN     := $(if $(and $(KERNELS),$(NVCC)),$(BUILD)/kvtier-cuda.fatbin)
LAB_SO     := $(if $(LAB),$(BUILD)/libkvtier-lab.so)
TOOL_BINS  := $(patsubst policy/tools/%.c,$(BUILD)/%,$(TOOLS))
UNIT_BINS  := $(patsubst tests/%.c,$(BUILD)/tests/%,$(UNIT))
BENCH_BINS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(BENCH))
HELPER_BINS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(HELPERS))
TORTURE_BINS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(TORTURE))
# What checks kernels and the library's CUDA side: on a GPU (make check-gpu), and small on the fake driver (make test).
GPU_CHECKS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(filter-out tests/gpu/check_train.c,$(wildcard tests/gpu/check_*.c)) tests/gpu/e2e.c)
SOLIB      := $(BUILD)/libkvtier.so.$(SOVERSION)
MANSRC     := $(wildcard daemon/man/*.scd ipc/man/*.scd)
MAN        := $(patsubst %.scd,$(BUILD)/man/%,$(notdir $(MANSRC)))

.SECONDARY:
.PHONY: all
all: $(DAEMON_BIN) $(CTL_BIN) $(BPF_BIN) $(if $(CLIENT),$(SOLIB) $(BUILD)/libkvtier.a $(BUILD)/libkvtier.pc) $(TOOL_BINS) $(LAB_SO) $(CUDA_SO) $(FATBIN) man ## build everything


# ---- objects ------------------------------------------------------------------
$(BUILD)/obj/policy/%_avx2.o: CFLAGS += -mavx2 -mfma -mf16c
$(BUILD)/obj/policy/%_avx512.o: CFLAGS += -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c -mavx512bf16

$(BUILD)/obj/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(say) CC $<
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/librooms.a: $(ROOMS)
	@mkdir -p $(@D)
	$(say) AR $@
	$(Q)rm -f $@ && ar rcs $@ $^

# What ranks, trains and evaluates, alone: needs no io_uring, no NUMA, no systemd.
$(BUILD)/libpolicy.a: $(call obj,$(SHM) $(POLICY))
	@mkdir -p $(@D)
	$(say) AR $@
	$(Q)rm -f $@ && ar rcs $@ $^

$(BUILD)/libdaemon.a: $(call obj,$(DAEMON))
	@mkdir -p $(@D)
	$(say) AR $@
	$(Q)rm -f $@ && ar rcs $@ $^

$(BUILD)/kvtierd: $(call obj,daemon/main.c) $(BUILD)/libdaemon.a $(BUILD)/librooms.a
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)

$(BUILD)/kvtierctl: $(call obj,$(CTL)) $(BUILD)/libdaemon.a $(BUILD)/librooms.a
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ -lncursesw -ltinfo -lpng $(LIBS)

# One object for every kernel: what it reads of the kernel's structures is in daemon/bpf/kernel.h.
$(BUILD)/bpf/probes.bpf.o: daemon/bpf/probes.bpf.c daemon/bpf/kernel.h shm/probe.h shm/histogram.h Makefile
	@mkdir -p $(@D)
	$(say) BPF $<
	$(Q)clang -target bpf -ffreestanding -O2 -g -Wall -Werror -I. -I/usr/include/$(shell $(CC) -print-multiarch) -c -o $@.tmp $<
	$(Q)llvm-strip -g $@.tmp && mv $@.tmp $@
$(BUILD)/bpf/probes.skel.h: $(BUILD)/bpf/probes.bpf.o
	$(Q)PATH=$$PATH:/usr/sbin bpftool gen skeleton $< name probes > $@.tmp && mv $@.tmp $@
$(BUILD)/obj/daemon/bpf/load.o: $(BUILD)/bpf/probes.skel.h
$(BUILD)/obj/daemon/bpf/load.o: CPPFLAGS += -isystem $(BUILD)/bpf
$(BUILD)/kvtierd-bpf: $(call obj,daemon/bpf/main.c daemon/bpf/load.c) $(BUILD)/librooms.a
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ -lbpf -lsystemd -lisal

$(BUILD)/liblearn.a: $(call obj,$(TRAIN) $(EVAL))
	@mkdir -p $(@D)
	$(say) AR $@
	$(Q)rm -f $@ && ar rcs $@ $^

$(BUILD)/kvtier-train $(BUILD)/kvtier-eval: $(BUILD)/liblearn.a
$(BUILD)/kvtier-train $(BUILD)/kvtier-eval: TOOL_LIBS := -Wl,--no-as-needed -ldl -Wl,--as-needed $(BLAS)
$(BUILD)/kvtier-%: $(BUILD)/obj/policy/tools/kvtier-%.o $(BUILD)/libpolicy.a
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $< $(filter %/liblearn.a,$^) $(BUILD)/libpolicy.a $(TOOL_LIBS) -lisal -lcrypto -lm

# For the Python side of the laboratory: trace writing and scoring by the code that the daemon runs. Not installed.
$(BUILD)/libkvtier-lab.so: $(call obj,$(LAB) $(SHM) $(POLICY))
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -shared -Wl,-z,defs -o $@ $^ -lisal -lcrypto -lm

$(BUILD)/obj/policy/train/cuda/%.o: policy/train/cuda/%.cu $(wildcard policy/train/cuda/*.cuh policy/train/*.h policy/*.h) Makefile
	@mkdir -p $(@D)
	$(say) NVCC $<
	$(Q)$(NVCC) $(NVCCFLAGS) -I. -c -o $@ $<

$(BUILD)/kvtier-train-cuda.so: $(patsubst %.cu,$(BUILD)/obj/%.o,$(CUDA)) $(call obj,policy/weights_shape.c)
	$(say) NVLD $@
	$(Q)$(NVCC) -shared $(CUDA_ARCH) -o $@ $^ $(CUDA_LIBS)

$(BUILD)/kvtier-cuda.fatbin: ipc/cuda/all.cuh $(KERNELS) $(wildcard ipc/cuda/*.h ipc/cuda/*.cuh shm/*.h) Makefile
	@mkdir -p $(@D)
	$(say) NVCC $@
	$(Q)$(NVCC) -O3 -std=c++17 -lineinfo $(CUDA_ARCH) -no-compress -Xptxas -v -I. -fatbin -x cu -o $@ ipc/cuda/all.cuh \
		2>$(BUILD)/kvtier-cuda.ptxas.txt || { cat $(BUILD)/kvtier-cuda.ptxas.txt >&2; rm -f $@; exit 1; }

# ---- libkvtier ------------------------------------------------------------------
$(SOLIB): $(LIBOBJ) ipc/libkvtier.map
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -shared -Wl,-soname,libkvtier.so.$(SOVERSION) -Wl,--version-script=ipc/libkvtier.map \
		-Wl,-z,defs -o $@ $(LIBOBJ) -lisal -lcrypto -ldl
	$(Q)ln -sf libkvtier.so.$(SOVERSION) $(BUILD)/libkvtier.so

$(BUILD)/libkvtier.a: $(LIBOBJ)
	@mkdir -p $(@D)
	$(say) AR $@
	$(Q)rm -f $@ && ar rcs $@ $^

$(BUILD)/libkvtier.pc: ipc/libkvtier.pc.in Makefile
	$(say) GEN $@
	$(Q)sed -e 's|@PREFIX@|$(PREFIX)|;s|@LIBDIR@|$(LIBDIR)|;s|@VERSION@|$(VERSION)|' $< > $@

# Both sides as the protocol before ours and the one after it: tests let them meet.
NEIGHBOURS := $(shell n=$$(sed -n 's/^\#define WIRE_VERSION \([0-9]*\)$$/\1/p' ipc/wire.h); echo $$((n - 1)) $$((n + 1)))
SAYS_VERSION := ipc/codec.c ipc/message.c daemon/admin_look.c
define neighbour
$(BUILD)/v$(1)/obj/%.o: %.c Makefile
	@mkdir -p $$(@D)
	$(Q)$(CC) $(CPPFLAGS) -DWIRE_VERSION=$(1) $(CFLAGS) -MMD -MP -c -o $$@ $$<
$(BUILD)/v$(1)/libkvtier.so.0: $(patsubst %.c,$(BUILD)/v$(1)/obj/%.o,$(filter ipc/%,$(SAYS_VERSION))) $(LIBOBJ) ipc/libkvtier.map
	$(say) LD $$@
	$(Q)$(CC) $(LDFLAGS) -shared -Wl,-soname,libkvtier.so.$(SOVERSION) -Wl,--version-script=ipc/libkvtier.map -o $$@ \
		$$(filter-out $(call obj,$(SAYS_VERSION)),$$(filter %.o,$$^)) -lisal -lcrypto -ldl
$(BUILD)/v$(1)/kvtierd: $(patsubst %.c,$(BUILD)/v$(1)/obj/%.o,$(SAYS_VERSION)) $(call obj,daemon/main.c) $(BUILD)/libdaemon.a $(BUILD)/librooms.a
	$(say) LD $$@
	$(Q)$(CC) $(LDFLAGS) -o $$@ $$^ $(LIBS)
endef
$(foreach n,$(NEIGHBOURS),$(eval $(call neighbour,$(n))))
VERSION_BINS := $(foreach n,$(NEIGHBOURS),$(BUILD)/v$(n)/libkvtier.so.0 $(BUILD)/v$(n)/kvtierd)

# ---- manual pages -----------------------------------------------------------------
.PHONY: man
man: $(MAN) ## manual pages into build/man
vpath %.scd daemon/man ipc/man
$(BUILD)/man/%: %.scd
	@mkdir -p $(@D)
	$(say) MAN $@
	$(Q)$(SCDOC) < $< > $@.tmp && mv $@.tmp $@

# ---- tests ------------------------------------------------------------------------
$(BUILD)/tests/unit/%: tests/unit/%.c $(BUILD)/libdaemon.a $(BUILD)/liblearn.a $(BUILD)/librooms.a $(if $(CLIENT),$(BUILD)/libkvtier.a)
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d -Wno-missing-prototypes $(LDFLAGS) -o $@ $< \
		$(if $(CLIENT),$(BUILD)/libkvtier.a) $(BUILD)/libdaemon.a $(BUILD)/liblearn.a $(BUILD)/librooms.a \
		-lcmocka $(LIBS) $(BLAS)

$(BUILD)/tests/bench/%: tests/bench/%.c $(BUILD)/libdaemon.a $(BUILD)/liblearn.a $(BUILD)/librooms.a $(if $(CLIENT),$(BUILD)/libkvtier.a)
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d -Wno-missing-prototypes $(LDFLAGS) -o $@ $< \
		$(if $(CLIENT),$(BUILD)/libkvtier.a) $(BUILD)/libdaemon.a $(BUILD)/liblearn.a $(BUILD)/librooms.a \
		$(LIBS) $(BLAS)

$(BUILD)/tests/integration/%: tests/integration/%.c $(SOLIB) $(BUILD)/librooms.a
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d -Wno-missing-prototypes $(LDFLAGS) -o $@ $< \
		-L$(BUILD) -lkvtier -Wl,-rpath,'$$ORIGIN/../..' $(BUILD)/librooms.a $(LIBS)

$(BUILD)/tests/torture/%: tests/torture/%.c $(BUILD)/libdaemon.a $(BUILD)/librooms.a $(BUILD)/libkvtier.a
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d -Wno-missing-prototypes $(LDFLAGS) -o $@ $< \
		$(BUILD)/libkvtier.a $(BUILD)/libdaemon.a $(BUILD)/librooms.a -lcmocka $(LIBS)

# The ring under ThreadSanitizer, whatever the rest is built with.
$(BUILD)/tests/torture/t13_rings: tests/torture/t13_rings.c shm/ring.c shm/trial.c shm/ring.h shm/trial.h shm/util.h Makefile
	@mkdir -p $(@D)
	$(say) TSAN $@
	$(Q)$(CC) $(CPPFLAGS) $(filter-out -fsanitize=%,$(CFLAGS)) -fsanitize=thread -Wno-missing-prototypes \
		$(filter-out -fsanitize=%,$(LDFLAGS)) -fsanitize=thread -o $@ $(filter %.c,$^)

# A CUDA driver of host memory with libkvtier's kernels in it, for tests where there is no GPU.
FAKE_SRC := $(wildcard tests/gpu/host/fake_*.cc) tests/gpu/host/fibers.cc tests/gpu/host/kernels.cc
FAKE_OBJ := $(patsubst %.cc,$(BUILD)/obj/%.o,$(FAKE_SRC))
FAKE_CUDA := $(BUILD)/fake/libcuda.so.1
$(BUILD)/obj/tests/gpu/host/%.o: tests/gpu/host/%.cc Makefile
	@mkdir -p $(@D)
	$(say) CXX $<
	$(Q)g++ -O2 -g -std=c++17 -fPIC -fvisibility=hidden -pthread -Wall -Wextra -Wno-unknown-pragmas -mavx2 -mfma -mf16c \
		-I. -Itests/gpu/host -MMD -MP -c -o $@ $<
$(FAKE_CUDA): $(FAKE_OBJ)
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)g++ -shared -pthread -Wl,-soname,libcuda.so.1 -o $@ $^

# What needs a GPU links the CPU backend alone, so that it builds where only a BLAS is installed.
GPU_OBJ := $(call obj,$(addprefix policy/train/,cpu.c lane.c net.c kern.c kern_avx2.c kern_avx512.c objective.c sampled.c) \
	   $(addprefix policy/,rows.c rows_avx2.c weights_shape.c))
$(BUILD)/tests/gpu/check_train: $(call obj,tests/gpu/check_train.c) $(GPU_OBJ)
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ -ldl $(BLAS) -lm
$(BUILD)/tests/gpu/bench_train: $(call obj,tests/gpu/bench_train.c) $(BUILD)/obj/tests/gpu/ceiling.o $(GPU_OBJ)
	@mkdir -p $(@D)
	$(say) NVLD $@
	$(Q)$(NVCC) $(CUDA_ARCH) -Xcompiler -pthread -o $@ $^ $(CUDA_LIBS) -ldl $(BLAS) -lm
$(BUILD)/tests/gpu/check_client: tests/gpu/check_client.c $(BUILD)/libkvtier.a $(BUILD)/libdaemon.a $(BUILD)/librooms.a
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d -Wno-missing-prototypes $(LDFLAGS) -o $@ $< \
		$(BUILD)/libkvtier.a $(BUILD)/libdaemon.a $(BUILD)/librooms.a $(LIBS)
$(BUILD)/tests/gpu/%: tests/gpu/%.c $(BUILD)/libkvtier.a $(BUILD)/libpolicy.a
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d -Wno-missing-prototypes $(LDFLAGS) -o $@ $< \
		$(BUILD)/libkvtier.a $(BUILD)/libpolicy.a -lisal -lcrypto -ldl -lm
$(BUILD)/obj/tests/gpu/%.o: tests/gpu/%.cu Makefile
	@mkdir -p $(@D)
	$(say) NVCC $<
	$(Q)$(NVCC) $(NVCCFLAGS) -c -o $@ $<

.PHONY: check-gpu bench-gpu
check-gpu: ## every check of what runs on a GPU, and compute-sanitizer (skips, with reasons, what cannot run)
	$(Q)tests/gpu/run check
bench-gpu: ## every figure of the GPU; writes tests/bench/results/
	$(Q)tests/gpu/run bench

.PHONY: tests-bin bench-bin
tests-bin: all $(VERSION_BINS) $(UNIT_BINS) $(HELPER_BINS) $(GPU_CHECKS) $(FAKE_CUDA) $(TORTURE_BINS)
# With planted bugs and crash points (shm/trial.h), each asleep until the environment names it.
.PHONY: trial trial-bin
trial: ## build/trial: the same with bugs that tests must catch and places to die at
	$(Q)$(MAKE) --no-print-directory -j2 BUILD=build/trial TRIAL=1 NVCC= trial-bin
trial-bin: $(VERSION_BINS) $(DAEMON_BIN) $(CTL_BIN) $(SOLIB) $(BUILD)/kvtier-weights $(BUILD)/kvtier-trace $(TORTURE_BINS) $(HELPER_BINS)
bench-bin: all $(BENCH_BINS)

# The interpreter that .ci/deps found or made; tests of the Python package run under it.
PY = $$(cat build/python 2>/dev/null || echo $(PYTHON))
INTEGRATION := $(wildcard tests/integration/*.bats tests/integration/*.py)
RUNTIME     := $(wildcard tests/runtime/check_*.py)
TESTENV      = KVT_BUILD=$(abspath $(BUILD)) PYTHONPATH=$(abspath ipc/python)

.PHONY: deps
deps: ## install what is missing (apt and pip; root or sudo)
	$(Q).ci/deps all

.PHONY: demo
demo: ## the main job on a real model: keep, demote to DRAM and NVMe, drop, bring back
	$(Q).ci/deps all
	$(Q)$(MAKE) --no-print-directory all
	$(Q)$(TESTENV) $(PY) -m kvtier.demo $(DEMO_ARGS)

.PHONY: tour
tour: all ## record README's tour anew: kvtierctl beside the model
	$(Q).ci/deps model
	$(Q)$(TESTENV) $(PY) tests/runtime/tour.py

.PHONY: test
test: ## install what is missing, build, run every test
	$(Q).ci/deps all
	$(Q)$(MAKE) --no-print-directory -j2 tests-bin
	$(Q)$(MAKE) --no-print-directory trial fuzz-bin
	$(Q)$(TESTENV) $(PY) tests/run --timeout 400 tests/check-layers tests/check-trials $(sort $(UNIT_BINS)) \
		$(INTEGRATION) $(RUNTIME) --and $$($(TESTENV) $(PY) tests/torture/run list)

.PHONY: test-unit
test-unit: tests-bin ## unit tests alone (no model needed)
	$(Q)$(TESTENV) $(PYTHON) tests/run $(sort $(UNIT_BINS))

.PHONY: torture check-planted
torture: tests-bin ## the tests of tests/torture at full length (hours); ONLY=1,5 chooses, OUT=FILE keeps the report
	$(Q)$(MAKE) --no-print-directory trial fuzz-bin
	$(Q)$(TESTENV) $(PY) tests/torture/run full $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out $(OUT))
check-planted: tests-bin ## each of those tests, short, with each bug that it must catch planted
	$(Q)$(MAKE) --no-print-directory trial fuzz-bin
	$(Q)$(TESTENV) $(PY) tests/torture/run planted $(if $(ONLY),--only $(ONLY))

.PHONY: bench
bench: bench-bin ## measure against floors and rivals; writes build/bench.json
	$(Q)$(TESTENV) tests/bench/run --json $(BUILD)/bench.json $(BENCH_BINS) $(BENCH_PY)

.PHONY: bench-policies
bench-policies: all ## perplexity under each policy without weights (six minutes; needs the model)
	$(Q).ci/deps model
	$(Q)$(TESTENV) $(PY) tests/bench/policies.py

.PHONY: train eval
train: all ## traces to weights for SmolLM2: data, then training (a GPU, or a night)
	$(Q).ci/deps lab
	$(Q)[ -f build/samples/samples.jsonl.gz ] || { $(PY) policy/lab/corpus.py && $(PY) policy/lab/samples.py; }
	$(Q)$(TESTENV) $(PY) policy/lab/traces.py --samples build/samples/samples.jsonl.gz --out build/traces
	$(Q)policy/lab/train.sh
eval: all ## the shipped weights on traces and with the model in the loop (DEVICE, SCALE, N)
	$(Q).ci/deps lab
	$(Q)policy/lab/eval.sh

.PHONY: check-asan check-tsan
check-asan: ## unit tests under AddressSanitizer and UBSan
	$(Q)$(MAKE) --no-print-directory -j2 BUILD=build/asan SAN=address,undefined OPT="-O1 -g" tests-bin
	$(Q)KVT_BUILD=$(abspath build/asan) UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(PYTHON) tests/run --timeout 600 $(patsubst $(BUILD)/%,build/asan/%,$(sort $(UNIT_BINS)))
check-tsan: ## unit tests under ThreadSanitizer
	$(Q)$(MAKE) --no-print-directory -j2 BUILD=build/tsan SAN=thread OPT="-O1 -g" tests-bin
	$(Q)KVT_BUILD=$(abspath build/tsan) TSAN_OPTIONS=halt_on_error=1 \
		$(PYTHON) tests/run --timeout 600 $(patsubst $(BUILD)/%,build/tsan/%,$(sort $(UNIT_BINS)))

.PHONY: coverage
# What a killed process counted is lost; what tests of the runtime side need a model for is left out.
coverage: ## lines and branches that the tests reach, by room and file (build/cov/missed.txt: those they do not)
	$(Q)$(MAKE) --no-print-directory -j2 BUILD=build/cov COV=1 OPT="-O1 -g" NVCC= tests-bin
	$(Q)find build/cov -name '*.gcda' -delete
	-$(Q)KVT_BUILD=$(abspath build/cov) PYTHONPATH=$(abspath ipc/python) $(PY) tests/run --timeout 900 \
		$(patsubst $(BUILD)/%,build/cov/%,$(sort $(UNIT_BINS))) $(filter-out %.bats,$(INTEGRATION)) \
		--and $$(KVT_BUILD=$(abspath build/cov) $(PY) tests/torture/run list)
	$(Q)tests/coverage build/cov --missed build/cov/missed.txt

.PHONY: check-layers check-docs
check-layers: ## who includes whom
	$(Q)tests/check-layers
check-docs: tests-bin ## manual pages, --help, configuration and README agree
	$(Q)$(TESTENV) $(PYTHON) tests/run $(wildcard tests/integration/docs.* tests/integration/readme.* tests/integration/commands.* tests/integration/recipes.*)

# ---- fuzzing ------------------------------------------------------------------------
# Every object once more with libFuzzer's counters and the sanitizers, and with planted bugs (asleep, as in build/trial).
FUZZERS := $(patsubst tests/fuzz/%.c,$(BUILD)/%,$(wildcard tests/fuzz/fuzz_*.c))
FUZZ_SAN := address,undefined
$(BUILD)/fuzz_%: tests/fuzz/fuzz_%.c $(BUILD)/libdaemon.a $(BUILD)/librooms.a
	$(say) FUZZ $@
	$(Q)$(CC) $(CPPFLAGS) -std=gnu11 $(OPT) -Wall -Wno-unused-function -Wno-unused-but-set-variable -fsanitize=fuzzer,$(FUZZ_SAN) -MMD -MP -MF $@.d -o $@ $< \
		$(BUILD)/libdaemon.a $(BUILD)/librooms.a $(LIBS) -pthread
.PHONY: fuzz-bin fuzz-link fuzz fuzz-long
fuzz-bin:
	$(Q)$(MAKE) --no-print-directory -j2 CC=clang BUILD=build/fuzz SAN=$(FUZZ_SAN),fuzzer-no-link \
		OPT="-O1 -gline-tables-only" TRIAL=1 NVCC= fuzz-link
fuzz-link: $(FUZZERS)
fuzz: fuzz-bin ## libFuzzer over every parser and whole sessions, a million executions each
	$(Q)$(TESTENV) KVT_TORTURE=full $(PYTHON) tests/torture/t09_fuzz.py
fuzz-long: fuzz-bin ## a hundred million each, on all cores; goes on where it stopped (KVT_MINUTES=N stops after N minutes)
	$(Q)$(TESTENV) KVT_TORTURE=long $(PYTHON) tests/torture/t09_fuzz.py

# ---- hygiene --------------------------------------------------------------------------
CSRC = $(shell git ls-files '*.c' '*.h')
.PHONY: tidy format-check format
# Every finding fails. Left out are the classes in which this clang-tidy (14) mostly reports sound code:
#   idiom     !strcmp(), sizeof(*v) of arrays of pointers, macros that paste initialisers, int products far below 2^31
#   analyzer  it knows neither __attribute__((cleanup)) nor <sys/queue.h> (leaks, uses after free, null), nor that an
#             output is set when another file's function returned 0 (null, garbage, division by it), nor va_start()
TIDY_NOT := bugprone-easily-swappable-parameters bugprone-narrowing-conversions bugprone-reserved-identifier \
	bugprone-assignment-in-if-condition bugprone-macro-parentheses bugprone-suspicious-string-compare \
	bugprone-sizeof-expression bugprone-implicit-widening-of-multiplication-result \
	clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling clang-analyzer-security.insecureAPI.strcpy \
	clang-analyzer-unix.Malloc clang-analyzer-valist.Uninitialized clang-analyzer-core.NullDereference \
	clang-analyzer-core.UndefinedBinaryOperatorResult clang-analyzer-core.CallAndMessage \
	clang-analyzer-core.DivideZero clang-analyzer-core.NonNullParamChecker clang-analyzer-optin.portability.UnixAPI
TIDY_SRC = $(filter-out tests/% daemon/bpf/% policy/%_avx2.c policy/%_avx512.c,$(filter %.c,$(CSRC)))
empty :=
tidy: ## clang-tidy over the sources
	$(Q)clang-tidy --quiet --warnings-as-errors='*' \
		-checks='-*,clang-analyzer-*,bugprone-*$(subst $(empty) ,,$(TIDY_NOT:%=,-%))' \
		$(TIDY_SRC) -- $(CPPFLAGS) -std=gnu11
format-check: ## the sources follow .clang-format
	$(Q)clang-format --dry-run -Werror $(CSRC)
format:
	$(Q)clang-format -i $(CSRC)

# ---- running by hand ----------------------------------------------------------------------
RUNDIR ?= build/run
.PHONY: run gdb
run gdb: all ## a private daemon in build/run (gdb: under the debugger)
	@mkdir -p $(RUNDIR)/nvme
	$(Q)printf '[kvtierd]\nrun_dir=%s\n[nvme]\nenabled=yes\npath=%s\nsize=1G\n[policy]\nmodel_dir=%s\n' $(abspath $(RUNDIR)) \
		$(abspath $(RUNDIR)/nvme) $(abspath policy/models) > $(RUNDIR)/kvtierd.conf
	$(Q)$(if $(filter gdb,$@),gdb --args) $(BUILD)/kvtierd --config $(RUNDIR)/kvtierd.conf

# ---- install ------------------------------------------------------------------------------
D = $(DESTDIR)
.PHONY: install uninstall
install: all ## into DESTDIR, PREFIX, SYSCONFDIR
	install -d $(D)$(PREFIX)/bin $(D)$(PREFIX)/sbin $(D)$(LIBDIR)/pkgconfig $(D)$(PREFIX)/include/kvtier \
		$(D)$(UNITDIR) $(D)$(PREFIX)/lib/sysusers.d $(D)$(PREFIX)/lib/tmpfiles.d $(D)$(SYSCONFDIR)/kvtier \
		$(D)$(PREFIX)/share/kvtier/models $(D)$(PREFIX)/share/doc/kvtier $(D)$(PREFIX)/share/kvtier/python/kvtier/data \
		$(addprefix $(D)$(PREFIX)/share/man/man,1 3 5 8)
	install -m 755 $(BUILD)/kvtierd $(BPF_BIN) $(D)$(PREFIX)/sbin/
	install -m 755 $(BUILD)/kvtierctl $(TOOL_BINS) $(D)$(PREFIX)/bin/
	install -m 755 $(SOLIB) $(D)$(LIBDIR)/libkvtier.so.$(VERSION)
	ln -sf libkvtier.so.$(VERSION) $(D)$(LIBDIR)/libkvtier.so.$(SOVERSION)
	ln -sf libkvtier.so.$(SOVERSION) $(D)$(LIBDIR)/libkvtier.so
	install -m 644 $(BUILD)/libkvtier.a $(D)$(LIBDIR)/
	install -m 644 $(BUILD)/libkvtier.pc $(D)$(LIBDIR)/pkgconfig/
	install -m 644 ipc/kvtier.h ipc/kvtier_cuda.h $(D)$(PREFIX)/include/kvtier/
	install -m 644 $(wildcard systemd/*.service systemd/*.socket) $(D)$(UNITDIR)/
	install -d $(D)$(PREFIX)/share/kvtier/bpf && install -m 755 $(wildcard daemon/bpf/*.bt) $(D)$(PREFIX)/share/kvtier/bpf/
	install -m 644 $(wildcard systemd/sysusers.d/*.conf) $(D)$(PREFIX)/lib/sysusers.d/
	install -m 644 $(wildcard systemd/tmpfiles.d/*.conf) $(D)$(PREFIX)/lib/tmpfiles.d/
	install -d $(D)$(PREFIX)/share/kvtier/grafana $(D)$(PREFIX)/share/kvtier/prometheus
	install -m 644 systemd/grafana/kvtier.json $(D)$(PREFIX)/share/kvtier/grafana/
	install -m 644 systemd/prometheus/kvtier.rules.yml $(D)$(PREFIX)/share/kvtier/prometheus/
	install -m 644 systemd/kvtierd.conf $(D)$(SYSCONFDIR)/kvtier/
	install -D -m 644 systemd/completion/kvtierctl.bash $(D)$(PREFIX)/share/bash-completion/completions/kvtierctl
	install -D -m 644 systemd/completion/_kvtierctl $(D)$(ZSHDIR)/_kvtierctl
	install -D -m 644 systemd/completion/kvtierctl.fish $(D)$(PREFIX)/share/fish/vendor_completions.d/kvtierctl.fish
	install -m 644 $(wildcard ipc/python/kvtier/*.py) $(D)$(PREFIX)/share/kvtier/python/kvtier/
	install -m 644 $(wildcard ipc/python/kvtier/data/*) $(D)$(PREFIX)/share/kvtier/python/kvtier/data/
	install -m 644 README.md LICENSE daemon/DESIGN.md $(D)$(PREFIX)/share/doc/kvtier/
	$(if $(CUDA_SO),install -d $(D)$(LIBDIR)/kvtier && install -m 755 $(CUDA_SO) $(D)$(LIBDIR)/kvtier/)
	$(if $(FATBIN),install -d $(D)$(LIBDIR)/kvtier && install -m 644 $(FATBIN) $(D)$(LIBDIR)/kvtier/)
	for m in $(notdir $(MAN)); do install -m 644 $(BUILD)/man/$$m $(D)$(PREFIX)/share/man/man$${m##*.}/; done
	set -e; for w in $(wildcard policy/models/*.kvp); do install -m 644 $$w $(D)$(PREFIX)/share/kvtier/models/; done

uninstall: ## remove what install put there (configuration that was edited stays)
	rm -f $(D)$(PREFIX)/sbin/kvtierd $(D)$(PREFIX)/sbin/kvtierd-bpf $(addprefix $(D)$(PREFIX)/bin/,kvtierctl $(notdir $(TOOL_BINS))) \
		$(D)$(LIBDIR)/libkvtier.* $(D)$(LIBDIR)/pkgconfig/libkvtier.pc \
		$(addprefix $(D)$(UNITDIR)/,$(notdir $(wildcard systemd/*.service systemd/*.socket))) \
		$(D)$(PREFIX)/lib/sysusers.d/kvtier.conf $(D)$(PREFIX)/lib/tmpfiles.d/kvtier.conf \
		$(D)$(PREFIX)/share/bash-completion/completions/kvtierctl $(D)$(ZSHDIR)/_kvtierctl \
		$(D)$(PREFIX)/share/fish/vendor_completions.d/kvtierctl.fish
	for m in $(notdir $(MAN)); do rm -f $(D)$(PREFIX)/share/man/man$${m##*.}/$$m; done
	rm -rf $(D)$(LIBDIR)/kvtier $(D)$(PREFIX)/include/kvtier $(D)$(PREFIX)/share/kvtier $(D)$(PREFIX)/share/doc/kvtier
	cmp -s systemd/kvtierd.conf $(D)$(SYSCONFDIR)/kvtier/kvtierd.conf && rm -f $(D)$(SYSCONFDIR)/kvtier/kvtierd.conf || true

# Packaging files cannot stand at the top of this tree: a copy, kept for the objects in it, gets them there.
DEB_TREE := $(BUILD)/deb/tree
DEB_SRC  := Makefile README.md LICENSE shm ipc tiers policy daemon systemd
DEB_STAMP := $(BUILD)/deb/stamp
.PHONY: deb
deb: $(DEB_STAMP) ## Debian packages into build/deb (NVCC=: without kernels for GPUs)
	$(Q)ls $(BUILD)/deb/*.deb
$(DEB_STAMP): $(FATBIN) $(shell find $(DEB_SRC) -type f ! -name '*.pyc')
	@command -v dpkg-buildpackage dh >/dev/null || { echo "make deb: needs dpkg-dev and debhelper" >&2; exit 1; }
	@mkdir -p $(DEB_TREE)/build
	$(Q)find $(DEB_TREE) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	$(Q)tar -c --exclude=__pycache__ $(DEB_SRC) | tar -x -C $(DEB_TREE)
	$(Q)cp -a systemd/debian $(DEB_TREE)/debian
	$(Q)rm -f $(DEB_TREE)/build/kvtier-cuda.fatbin $(BUILD)/deb/*.deb
	$(if $(FATBIN),$(Q)cp -p $(FATBIN) $(DEB_TREE)/build/)
	$(say) DEB $(BUILD)/deb
	$(Q)cd $(DEB_TREE) && env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL DEB_BUILD_OPTIONS=noautodbgsym NVCC=$(if $(NVCC),$(abspath $(NVCC))) \
		dpkg-buildpackage -b -us -uc -nc -j2 >../build.log 2>&1 || { tail -n 30 ../build.log >&2; exit 1; }
	$(Q)touch $@

.PHONY: clean
clean: ## remove build output
	rm -rf $(BUILD)

.PHONY: help
help: ## this list
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z -]+):.*## /  \1\t/' | expand -t 20

-include $(shell find $(BUILD) -path $(BUILD)/unpacked -prune -o -type f -name '*.d' -print 2>/dev/null)
