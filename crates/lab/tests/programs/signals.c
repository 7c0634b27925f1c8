/* signals STOPFILE: masks, actions, alternate stack, and signals pending with their payload, for the process and for
 * single threads, as they were set; handlers that are moved while they run. */
#include "check.h"

#define RT (SIGRTMIN + 3)
/* The raw call: glibc's sigtimedwait turns SI_TKILL into SI_USER. */
static int take(const sigset_t *set, siginfo_t *info)
{
	struct timespec none = {0, 0};
	return syscall(SYS_rt_sigtimedwait, set, info, &none, 8);
}

static char altstack[65536];
static volatile sig_atomic_t handled, on_stack, depth_sum;
static volatile int order[64], order_n;

static void on_usr(int sig, siginfo_t *info, void *context)
{
	(void)context;
	char here;
	on_stack = &here > altstack && &here < altstack + sizeof altstack;
	depth_sum += sig + info->si_value.sival_int;
	dwell_ms(6); /* be moved in here, on the alternate stack */
	handled++;
}

static void on_rt(int sig, siginfo_t *info, void *context)
{
	(void)sig, (void)context;
	if (order_n < 64)
		order[order_n++] = info->si_value.sival_int;
}

/* Queue signals to the whole process while all threads block them; dwell; take them out one by one. */
static void pending_with_payload(void)
{
	sigset_t set, now;
	sigemptyset(&set);
	sigaddset(&set, RT), sigaddset(&set, SIGUSR2), sigaddset(&set, RT + 1);
	sigprocmask(SIG_BLOCK, &set, 0);
	for (int i = 1; i <= 5; i++)
		SYS(sigqueue(getpid(), RT, (union sigval){.sival_int = 1000 + i}));
	SYS(sigqueue(getpid(), RT + 1, (union sigval){.sival_ptr = (void *)0x123456789abcull}));
	kill(getpid(), SIGUSR2), kill(getpid(), SIGUSR2); /* a standard signal is pending once */
	SYS(syscall(SYS_tgkill, getpid(), gettid(), SIGUSR2)); /* …and once more for this thread */
	dwell_ms(20);
	sigpending(&now);
	CHECK(sigismember(&now, RT) && sigismember(&now, RT + 1) && sigismember(&now, SIGUSR2), "a pending signal is gone");
	CHECK(!sigismember(&now, RT + 2) && !sigismember(&now, SIGTERM), "a signal is pending that nobody sent");
	siginfo_t info;
	sigset_t one;
	sigemptyset(&one), sigaddset(&one, RT);
	for (int i = 1; i <= 5; i++) {
		EQ("signal", take(&one, &info), RT);
		EQ("payload", info.si_value.sival_int, 1000 + i);
		EQ("si_code", info.si_code, SI_QUEUE);
		EQ("si_pid", info.si_pid, getpid());
		EQ("si_uid", info.si_uid, getuid());
	}
	CHECK(take(&one, &info) == -1 && errno == EAGAIN, "a sixth signal came out");
	sigemptyset(&one), sigaddset(&one, RT + 1);
	EQ("signal", take(&one, &info), RT + 1);
	EQ("pointer payload", (intptr_t)info.si_value.sival_ptr, 0x123456789abcll);
	sigemptyset(&one), sigaddset(&one, SIGUSR2);
	EQ("thread's SIGUSR2", take(&one, &info), SIGUSR2);
	EQ("si_code of tgkill", info.si_code, SI_TKILL);
	EQ("process's SIGUSR2", take(&one, &info), SIGUSR2);
	EQ("si_code of kill", info.si_code, SI_USER);
	CHECK(take(&one, &info) == -1 && errno == EAGAIN, "a standard signal was pending thrice");
	sigprocmask(SIG_UNBLOCK, &set, 0);
}

/* Signals that become deliverable together come in the order in which they were sent. */
static void delivery_order(void)
{
	sigset_t set;
	sigemptyset(&set), sigaddset(&set, RT + 2);
	order_n = 0;
	sigprocmask(SIG_BLOCK, &set, 0);
	for (int i = 0; i < 32; i++)
		SYS(sigqueue(getpid(), RT + 2, (union sigval){.sival_int = i}));
	dwell_ms(10);
	sigprocmask(SIG_UNBLOCK, &set, 0);
	EQ("signals delivered", order_n, 32);
	for (int i = 0; i < 32; i++)
		EQ("signal in order", order[i], i);
}

static void actions_as_set(void)
{
	struct sigaction act;
	sigaction(SIGUSR1, 0, &act);
	EQ("handler", (intptr_t)act.sa_sigaction, (intptr_t)on_usr);
	EQ("flags", act.sa_flags & ~0x04000000, SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_NODEFER);
	CHECK(sigismember(&act.sa_mask, SIGALRM) == 1 && sigismember(&act.sa_mask, SIGHUP) == 0, "mask of an action");
	sigaction(SIGPIPE, 0, &act);
	CHECK(act.sa_handler == SIG_IGN, "an ignored signal is not ignored");
	sigaction(SIGWINCH, 0, &act);
	CHECK(act.sa_handler == SIG_DFL, "a default action is not the default");
	sigaction(SIGTRAP, 0, &act);
	CHECK(act.sa_handler == SIG_IGN, "the action of SIGTRAP was changed");
	stack_t stack;
	sigaltstack(0, &stack);
	EQ("alternate stack", (intptr_t)stack.ss_sp, (intptr_t)altstack);
	EQ("its size", stack.ss_size, sizeof altstack);
	EQ("its flags", stack.ss_flags, 0);
}

struct own {
	int sig;
	pthread_t thread;
	volatile int state; /* 0 starting, 1 blocked with a signal pending, 2 may look, 3 done */
};

static void *masked_thread(void *arg)
{
	struct own *own = arg;
	sigset_t set, now;
	sigemptyset(&set), sigaddset(&set, own->sig);
	pthread_sigmask(SIG_SETMASK, &set, 0);
	pthread_kill(pthread_self(), own->sig);
	own->state = 1;
	while (own->state != 2)
		usleep(500);
	pthread_sigmask(SIG_SETMASK, 0, &now);
	for (int s = 1; s < SIGRTMIN; s++)
		EQ("thread's mask", sigismember(&now, s), s == own->sig);
	sigpending(&now);
	CHECK(sigismember(&now, own->sig), "a thread's own pending signal is gone");
	for (int s = 1; s < SIGRTMIN; s++)
		CHECK(s == own->sig || !sigismember(&now, s), "signal %d pending in the wrong thread", s);
	siginfo_t info;
	EQ("own signal", sigwaitinfo(&set, &info), own->sig);
	own->state = 3;
	return 0;
}

static void masks_of_threads(void)
{
	struct own own[3] = {{.sig = SIGHUP}, {.sig = SIGXCPU}, {.sig = SIGTTIN}};
	for (int i = 0; i < 3; i++) {
		CHECK(!pthread_create(&own[i].thread, 0, masked_thread, &own[i]), "pthread_create");
		while (own[i].state != 1)
			usleep(200);
	}
	dwell_ms(20);
	for (int i = 0; i < 3; i++)
		own[i].state = 2;
	for (int i = 0; i < 3; i++)
		pthread_join(own[i].thread, 0);
}

int main(int argc, char **argv)
{
	start(argc, argv);
	stack_t stack = {.ss_sp = altstack, .ss_size = sizeof altstack};
	SYS(sigaltstack(&stack, 0));
	struct sigaction act = {.sa_sigaction = on_usr, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_NODEFER};
	sigaddset(&act.sa_mask, SIGALRM);
	SYS(sigaction(SIGUSR1, &act, 0));
	struct sigaction rt = {.sa_sigaction = on_rt, .sa_flags = SA_SIGINFO};
	SYS(sigaction(RT + 2, &rt, 0));
	signal(SIGPIPE, SIG_IGN), signal(SIGTRAP, SIG_IGN);
	sigset_t mask, now;
	sigemptyset(&mask), sigaddset(&mask, SIGQUIT), sigaddset(&mask, 60);
	sigprocmask(SIG_SETMASK, &mask, 0);
	ready();
	do {
		actions_as_set();
		pending_with_payload();
		delivery_order();
		masks_of_threads();
		int before = handled, sum = depth_sum;
		SYS(sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = 77}));
		EQ("handled", handled, before + 1);
		EQ("payload in a handler", depth_sum, sum + SIGUSR1 + 77);
		CHECK(on_stack, "the handler did not run on the alternate stack");
		sigprocmask(SIG_SETMASK, 0, &now);
		for (int s = 1; s < 65; s++)
			if (s != 32 && s != 33)
				EQ("mask", sigismember(&now, s), s == SIGQUIT || s == 60);
	} while (next_round());
	return finish();
}
