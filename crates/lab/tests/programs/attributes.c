/* attributes STOPFILE: what a process is beside memory, descriptors and signals: limits, nice, scheduling, affinity,
 * names, prctl settings, personality, oom score, I/O priority, group and session. Needs root. */
#include "check.h"
#include <sched.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

static struct rlimit limits[RLIM_NLIMITS];
static cpu_set_t cpus;
static pid_t group, session, parent;

static long number_in(const char *path)
{
	char text[64] = "";
	int fd = SYS(open(path, O_RDONLY));
	CHECK(read(fd, text, sizeof text - 1) > 0, "%s is empty", path);
	close(fd);
	return strtol(text, 0, 10);
}

static void set_all(void)
{
	static const int chosen[][3] = {{RLIMIT_CORE, 12345, 1 << 20}, {RLIMIT_NOFILE, 200, 400}, {RLIMIT_FSIZE, 1 << 26, 1 << 27},
					{RLIMIT_MEMLOCK, 1 << 20, 1 << 21}, {RLIMIT_RTPRIO, 3, 5}, {RLIMIT_SIGPENDING, 300, 301},
					{RLIMIT_STACK, 4 << 20, 32 << 20}, {RLIMIT_NICE, 25, 30}};
	for (size_t i = 0; i < sizeof chosen / sizeof *chosen; i++) {
		struct rlimit was; /* without CAP_SYS_RESOURCE, a hard limit only goes down */
		SYS(getrlimit(chosen[i][0], &was));
		if (was.rlim_max >= (rlim_t)chosen[i][2])
			SYS(setrlimit(chosen[i][0], &(struct rlimit){chosen[i][1], chosen[i][2]}));
	}
	for (int i = 0; i < RLIM_NLIMITS; i++)
		SYS(getrlimit(i, &limits[i]));
	SYS(setpriority(PRIO_PROCESS, 0, 7));
	SYS(prctl(PR_SET_NAME, "odd (name) x"));
	SYS(prctl(PR_SET_DUMPABLE, 0)), SYS(prctl(PR_SET_DUMPABLE, 1));
	SYS(prctl(PR_SET_TIMERSLACK, 123456)), SYS(prctl(PR_SET_CHILD_SUBREAPER, 1)), SYS(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	SYS(prctl(PR_SET_KEEPCAPS, 1)), SYS(prctl(PR_SET_PDEATHSIG, SIGUSR2));
	SYS(personality(ADDR_NO_RANDOMIZE | PER_LINUX));
	int fd = SYS(open("/proc/self/oom_score_adj", O_WRONLY));
	SYS(write(fd, "321", 3)), close(fd);
	SYS(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6)); /* this process: best effort, 6 */
	SYS(sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){0}));
	SYS(sched_getaffinity(0, sizeof cpus, &cpus));
	if (CPU_COUNT(&cpus) > 1) { /* a real restriction, where there is more than one */
		int first = 0;
		while (!CPU_ISSET(first, &cpus))
			first++;
		CPU_ZERO(&cpus);
		CPU_SET(first, &cpus);
		SYS(sched_setaffinity(0, sizeof cpus, &cpus));
	}
	setsid(); /* fails for a group leader: then it has what it was given */
	group = getpgrp(), session = getsid(0), parent = getppid();
}

static void all_as_set(void)
{
	for (int i = 0; i < RLIM_NLIMITS; i++) {
		struct rlimit now;
		SYS(getrlimit(i, &now));
		CHECK(now.rlim_cur == limits[i].rlim_cur && now.rlim_max == limits[i].rlim_max, "limit %d is %lld/%lld, was %lld/%lld", i,
		      (long long)now.rlim_cur, (long long)now.rlim_max, (long long)limits[i].rlim_cur, (long long)limits[i].rlim_max);
	}
	char name[16];
	int n;
	EQ("nice", getpriority(PRIO_PROCESS, 0), 7);
	SYS(prctl(PR_GET_NAME, name));
	CHECK(!strcmp(name, "odd (name) x"), "the name is %s", name);
	EQ("dumpable", prctl(PR_GET_DUMPABLE), 1);
	EQ("timer slack", prctl(PR_GET_TIMERSLACK), 123456);
	EQ("transparent huge pages off", prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), 1);
	EQ("keepcaps", prctl(PR_GET_KEEPCAPS), 1);
	SYS(prctl(PR_GET_CHILD_SUBREAPER, &n));
	EQ("child subreaper", n, 1);
	SYS(prctl(PR_GET_PDEATHSIG, &n));
	EQ("parent-death signal", n, SIGUSR2);
	EQ("personality", personality(0xffffffff), ADDR_NO_RANDOMIZE);
	EQ("oom_score_adj", number_in("/proc/self/oom_score_adj"), 321);
	EQ("I/O priority", syscall(SYS_ioprio_get, 1, 0), 2 << 13 | 6);
	EQ("scheduling policy", sched_getscheduler(0), SCHED_BATCH);
	cpu_set_t now;
	SYS(sched_getaffinity(0, sizeof now, &now));
	CHECK(CPU_EQUAL(&now, &cpus), "the affinity changed");
	EQ("process group", getpgrp(), group);
	EQ("session", getsid(0), session);
	EQ("parent", getppid(), parent);
	/* /proc agrees with what the program knows of itself. */
	char link[256] = "", arg[256] = "";
	CHECK(readlink("/proc/self/exe", link, sizeof link - 1) > 0 && strstr(link, "attributes"), "exe is %s", link);
	int fd = SYS(open("/proc/self/cmdline", O_RDONLY));
	CHECK(read(fd, arg, sizeof arg - 1) > 0 && strstr(arg, "attributes"), "cmdline is %s", arg);
	close(fd);
	char stat[64];
	snprintf(stat, sizeof stat, "/proc/%d/stat", getpid());
	EQ("own number in /proc", number_in(stat), getpid());
}

int main(int argc, char **argv)
{
	start(argc, argv);
	set_all();
	ready();
	do {
		all_as_set();
		dwell_ms(3);
	} while (next_round());
	return finish();
}
