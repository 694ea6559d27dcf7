/* SPDX-License-Identifier: MIT */
/* What the kernel's probes say, as JSON. */
#include "daemon/admin_call.h"
#include "daemon/probes.h"

static json_t *histogram_json(const struct histogram *h)
{
	return json_pack("{s:o,s:o,s:o,s:o,s:o}", "count", admin_num(histogram_count(h)), "ns_total",
			 admin_num(h->sum), "ns_p50", admin_num(histogram_quantile(h, 0.5)), "ns_p99",
			 admin_num(histogram_quantile(h, 0.99)), "ns_p999",
			 admin_num(histogram_quantile(h, 0.999)));
}

json_t *admin_probes(struct core *c)
{
	json_t *o = json_object(), *list = json_array();
	struct probes_stat s;

	probes_stat(c, &s);
	json_object_set_new(o, "on", json_boolean(s.on));
	if (!s.on)
		json_object_set_new(o, "why_off", admin_text(s.why_off));
	for (uint32_t i = 0; i < s.programs; i++) {
		json_t *p =
			json_pack("{s:o,s:b}", "name", admin_text(s.program[i].name), "on", s.program[i].on);

		if (!s.program[i].on)
			json_object_set_new(p, "why_off", admin_text(s.program[i].why_off));
		json_array_append_new(list, p);
	}
	json_object_set_new(o, "programs", list);
	if (!s.on)
		return o;
	json_object_set_new(o, "disk_read", histogram_json(&s.disk_read));
	json_object_set_new(o, "disk_write", histogram_json(&s.disk_write));
	json_object_set_new(o, "disk_inflight", admin_num(s.disk_inflight));
	json_object_set_new(o, "uring", histogram_json(&s.uring));
	json_object_set_new(o, "reclaim", histogram_json(&s.reclaim));
	json_object_set_new(o, "fault", histogram_json(&s.fault));
	json_object_set_new(o, "sched", histogram_json(&s.sched));
	json_object_set_new(o, "lost", admin_num(s.lost));
	json_object_set_new(o, "untracked", admin_num(s.untracked));
	return o;
}
