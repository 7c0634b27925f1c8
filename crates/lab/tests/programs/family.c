/* family STOPFILE: a parent and its child, either of which may be moved. Prints "child PID". In every round they signal
 * each other with a payload, the parent stops and continues the child and sees both by waitpid, the child forks and
 * waits for children of its own; getppid, process group and session never change. At the end children leave in every
 * way there is, and the parent sees which. */
#include "check.h"
#include <sys/resource.h>
#include <sys/wait.h>

#define ASK (SIGRTMIN + 1)
#define ANSWER (SIGRTMIN + 2)
static pid_t parent;

/* Waits for one signal (EINTR is what the kernel gives a waiter that is stopped and continued); a limit makes a lost one a difference, not a hang. */
static siginfo_t take(int sig, const char *what)
{
	sigset_t set;
	siginfo_t info;
	int64_t end = now_ns(CLOCK_MONOTONIC) + 20000000000ll;
	sigemptyset(&set), sigaddset(&set, sig);
	for (;;) {
		int r = syscall(SYS_rt_sigtimedwait, &set, &info, &(struct timespec){1, 0}, 8);
		if (r == sig)
			return info;
		CHECK(r == -1 && (errno == EAGAIN || errno == EINTR), "waiting for %s: %s", what, strerror(errno));
		CHECK(now_ns(CLOCK_MONOTONIC) < end, "%s did not come within 20 s", what);
	}
}

static void own_children(int n)
{
	int status;
	pid_t me = getpid(), kids[3];
	for (int i = 0; i < 3; i++)
		if (!(kids[i] = SYS(fork()))) {
			EQ("a grandchild's parent", getppid(), me);
			if (i == 2)
				raise(SIGKILL);
			_exit(10 + i + n % 50);
		}
	for (int i = 2; i >= 0; i--) {
		EQ("waitpid for an own child", waitpid(kids[i], &status, 0), kids[i]);
		if (i == 2)
			CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "a killed child's status is %#x", status);
		else
			CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 10 + i + n % 50, "a child's status is %#x", status);
	}
	CHECK(waitpid(-1, &status, WNOHANG) == -1 && errno == ECHILD, "a child is there that nobody forked");
}

/* The child: answers each ASK by an ANSWER with its payload plus one; SIGTERM makes it leave. */
static void child(int how_it_leaves)
{
	pid_t group = getpgrp(), session = getsid(0);
	for (;;) {
		siginfo_t info = take(ASK, "a question");
		EQ("who asked", info.si_pid, parent);
		EQ("getppid", getppid(), parent);
		EQ("process group", getpgrp(), group);
		EQ("session", getsid(0), session);
		EQ("process group by number", getpgid(getpid()), group);
		EQ("the parent's session", getsid(parent), session);
		if (info.si_value.sival_int < 0)
			break;
		own_children(info.si_value.sival_int);
		SYS(sigqueue(parent, ANSWER, (union sigval){.sival_int = info.si_value.sival_int + 1}));
	}
	SYS(setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0}));
	sigset_t none;
	switch (how_it_leaves) {
	case 0: exit(42);
	case 1: signal(SIGSEGV, SIG_DFL); *(volatile int *)8 = 1; _exit(99);
	case 2: abort();
	default: sigemptyset(&none); sigsuspend(&none); _exit(98); /* the parent kills it */
	}
}

static pid_t make_child(int how)
{
	pid_t pid = SYS(fork());
	if (!pid)
		child(how);
	return pid;
}

static void ask(pid_t pid, int n)
{
	SYS(sigqueue(pid, ASK, (union sigval){.sival_int = n}));
	siginfo_t info = take(ANSWER, "the child's answer");
	EQ("who answered", info.si_pid, pid);
	EQ("the answer", info.si_value.sival_int, n + 1);
}

static void stop_and_go(pid_t pid)
{
	int status;
	SYS(kill(pid, SIGSTOP));
	EQ("waitpid for the stop", waitpid(pid, &status, WUNTRACED), pid);
	CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP, "the stopped child's status is %#x", status);
	siginfo_t info = take(SIGCHLD, "SIGCHLD of the stop");
	EQ("si_pid", info.si_pid, pid);
	EQ("si_code", info.si_code, CLD_STOPPED);
	SYS(sigqueue(pid, ASK, (union sigval){.sival_int = 1000}));
	dwell_ms(10);
	sigset_t pending;
	sigpending(&pending);
	CHECK(!sigismember(&pending, ANSWER), "a stopped child answered");
	SYS(kill(pid, SIGCONT));
	EQ("waitpid for the continuation", waitpid(pid, &status, WCONTINUED), pid);
	CHECK(WIFCONTINUED(status), "the continued child's status is %#x", status);
	info = take(SIGCHLD, "SIGCHLD of the continuation");
	EQ("si_code", info.si_code, CLD_CONTINUED);
	info = take(ANSWER, "the continued child's answer");
	EQ("the answer", info.si_value.sival_int, 1001);
}

static void leave(pid_t pid, int how)
{
	static const int codes[] = {CLD_EXITED, CLD_KILLED, CLD_KILLED, CLD_KILLED}, values[] = {42, SIGSEGV, SIGABRT, SIGKILL};
	int status;
	siginfo_t info;
	if (how == 3)
		SYS(kill(pid, SIGKILL));
	else
		SYS(sigqueue(pid, ASK, (union sigval){.sival_int = -1}));
	SYS(waitid(P_PID, pid, &info, WEXITED | WNOWAIT));
	EQ("waitid's si_pid", info.si_pid, pid);
	CHECK(info.si_code == codes[how], "waitid: child %d has si_code %d and si_status %d", how, info.si_code, info.si_status);
	EQ("waitid's si_status", info.si_status, values[how]);
	EQ("waitpid", waitpid(pid, &status, 0), pid);
	CHECK(how ? WIFSIGNALED(status) && WTERMSIG(status) == values[how] : WIFEXITED(status) && WEXITSTATUS(status) == 42,
	      "child %d left with %#x", how, status);
	info = take(SIGCHLD, "SIGCHLD of the end");
	EQ("SIGCHLD's si_pid", info.si_pid, pid);
	CHECK(kill(pid, 0) == -1 && errno == ESRCH, "a child that was waited for is still there");
}

int main(int argc, char **argv)
{
	start(argc, argv);
	parent = getpid();
	sigset_t set;
	sigemptyset(&set), sigaddset(&set, ASK), sigaddset(&set, ANSWER), sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, 0);
	pid_t kids[4];
	for (int i = 0; i < 4; i++)
		kids[i] = make_child(i);
	for (int i = 0; i < 4; i++)
		printf("child %d\n", kids[i]);
	ready();
	int n = 0;
	do {
		for (int i = 0; i < 4; i++)
			ask(kids[i], n++ % 900);
		stop_and_go(kids[n % 3]);
		dwell_ms(5);
	} while (next_round());
	for (int i = 0; i < 4; i++)
		leave(kids[i], i);
	int status;
	CHECK(waitpid(-1, &status, WNOHANG) == -1 && errno == ECHILD, "a child is left over");
	return finish();
}
