/* SPDX-License-Identifier: MIT */
/* Drawing the plots with another program, when it is there. */
#include <errno.h>
#include <glob.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include "policy/eval/gnuplot.h"
#include "shm/util.h"

extern char **environ;

static int draw(const char *script, const char *scripts, const char *out, char *err, size_t errsize)
{
	_cleanup_free_ char *set = NULL;
	pid_t pid;
	int r, status;

	if (strchr(out, '\'') || strchr(scripts, '\'')) {
		snprintf(err, errsize, "--plots: gnuplot needs paths without quotes");
		return -EINVAL;
	}
	if (asprintf(&set, "dir='%s'; set loadpath '%s'", out, scripts) < 0)
		return -ENOMEM;
	r = posix_spawnp(&pid, "gnuplot", NULL, NULL,
			 (char *const[]){(char *)"gnuplot", (char *)"-e", set, (char *)script, NULL}, environ);
	if (r)
		return -r;
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -errno;
	if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
		return -ENOENT;
	if (!WIFEXITED(status) || WEXITSTATUS(status)) {
		snprintf(err, errsize, "gnuplot %s: failed", script);
		return -EIO;
	}
	return 0;
}

int eval_plots(const char *scripts, const char *out, char *err, size_t errsize)
{
	_cleanup_free_ char *pattern = NULL;
	glob_t found;
	int r = 0;

	if (asprintf(&pattern, "%s/*.gp", scripts) < 0)
		return -ENOMEM;
	if (glob(pattern, 0, NULL, &found)) {
		snprintf(err, errsize, "--plots: %s: no scripts there", pattern);
		return -ENOENT;
	}
	for (size_t i = 0; r == 0 && i < found.gl_pathc; i++)
		r = draw(found.gl_pathv[i], scripts, out, err, errsize);
	globfree(&found);
	if (r == -ENOENT) {
		fprintf(stderr,
			"kvtier-eval: gnuplot is not installed: the tables are in %s, the plots are not\n",
			out);
		return 0;
	}
	return r;
}
