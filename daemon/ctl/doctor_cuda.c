/* SPDX-License-Identifier: MIT */
/* GPUs and their driver, which is opened only to be asked. */
#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include "daemon/ctl/doctor.h"
#include "shm/util.h"

#define COMPUTE_MODE 20 /* CU_DEVICE_ATTRIBUTE_COMPUTE_MODE; of it: */
#define PROHIBITED 2

/* NVIDIA's display and 3D controllers on the PCI bus; `ret` tells the first ones with their nodes. */
static unsigned gpus(const struct patient *p, char *ret, size_t size)
{
	DIR *d = opendir(host_path(p, "/sys/bus/pci/devices"));
	char vendor[16], class[16], node[16];
	unsigned n = 0;

	*ret = 0;
	for (struct dirent *e; d && (e = readdir(d));) {
		if (host_read(p, vendor, sizeof(vendor), "/sys/bus/pci/devices/%s/vendor", e->d_name) <= 0 ||
		    strcmp(vendor, "0x10de") ||
		    host_read(p, class, sizeof(class), "/sys/bus/pci/devices/%s/class", e->d_name) <= 0 ||
		    (strncmp(class, "0x0300", 6) && strncmp(class, "0x0302", 6)))
			continue;
		host_read(p, node, sizeof(node), "/sys/bus/pci/devices/%s/numa_node", e->d_name);
		snprintf(ret + strlen(ret), size - strlen(ret), "%s%.16s on node %s", n ? ", " : "", e->d_name,
			 *node ? node : "?");
		n++;
	}
	if (d)
		closedir(d);
	return n;
}

void check_cuda(const struct patient *p, struct finding *f)
{
	const char *env = secure_getenv("KVTIER_LIBCUDA"), *path = env && *env ? env : "libcuda.so.1";
	int (*init)(unsigned), (*version)(int *), (*count)(int *), (*attribute)(int *, int, int);
	int v = 0, devices = 0, mode = 0, r;
	char where[160];
	unsigned n = gpus(p, where, sizeof(where));
	void *lib;

	if (!n) {
		say(f, VERDICT_OK, "no NVIDIA GPU here");
		return;
	}
	lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!lib) {
		say(f, VERDICT_WARNING, "%s, but no %s", where, path);
		advise(f, "install NVIDIA's driver (Debian: apt install nvidia-driver libcuda1), for CUDA 12 "
			  "or later");
		return;
	}
	*(void **)&init = dlsym(lib, "cuInit");
	*(void **)&version = dlsym(lib, "cuDriverGetVersion");
	*(void **)&count = dlsym(lib, "cuDeviceGetCount");
	*(void **)&attribute = dlsym(lib, "cuDeviceGetAttribute");
	if (!init || !version || !count) {
		say(f, VERDICT_UNCHECKED, "%s is no CUDA driver", path);
		return;
	}
	r = init(0);
	if (r) {
		say(f, VERDICT_WARNING, "%s: cuInit: error %d", path, r);
		advise(f,
		       "nvidia-smi says more; modprobe nvidia-uvm, or reboot after an upgrade of the driver");
		return;
	}
	version(&v);
	count(&devices);
	for (int i = 0; i < devices && attribute && mode != PROHIBITED; i++)
		if (attribute(&mode, COMPUTE_MODE, i))
			mode = 0;
	if (mode == PROHIBITED) {
		say(f, VERDICT_WARNING, "%d GPUs, one in compute mode \"prohibited\"", devices);
		advise(f, "nvidia-smi -c DEFAULT");
	} else if (!host_there(p, "/run/nvidia-persistenced/socket")) {
		say(f, VERDICT_NOTE, "%s; CUDA %d.%d, no nvidia-persistenced", where, v / 1000, v % 1000 / 10);
		advise(f,
		       "systemctl enable --now nvidia-persistenced: the driver stays loaded between runtimes");
	} else {
		say(f, VERDICT_OK, "%s; CUDA %d.%d", where, v / 1000, v % 1000 / 10);
	}
}
