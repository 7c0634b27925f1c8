/* blocked STOPFILE: threads that are blocked without limit in a system call stay blocked across moves, see no EINTR,
 * and get exactly what they waited for when it comes. */
#include "check.h"
#include <linux/futex.h>
#include <poll.h>
#include <semaphore.h>
#include <sys/wait.h>

static int to_reader[2], to_poller[2], full[2], start_child[2];
static int futex_word;
static sem_t sem;
static volatile int woken[8];
static volatile int may_wake;
static pid_t child;

static void *reads_pipe(void *arg)
{
	char buf[64];
	ssize_t n = read(to_reader[0], buf, sizeof buf);
	EQ("read", n, 5);
	CHECK(!memcmp(buf, "hello", 5), "read the wrong bytes");
	CHECK(may_wake, "read returned before anything was written");
	woken[(long)arg]++;
	return 0;
}
static void *polls(void *arg)
{
	struct pollfd p = {to_poller[0], POLLIN, 0};
	EQ("poll", poll(&p, 1, -1), 1);
	EQ("revents", p.revents, POLLIN);
	CHECK(may_wake, "poll returned before anything was written");
	woken[(long)arg]++;
	return 0;
}
static void *writes_full_pipe(void *arg)
{
	static char block[65536];
	memset(block, 'w', sizeof block);
	ssize_t n = write(full[1], block, sizeof block); /* the pipe is full: nothing of it goes in before it is read */
	EQ("write to a full pipe", n, sizeof block);
	CHECK(may_wake, "a write to a full pipe went through");
	woken[(long)arg]++;
	return 0;
}
static void *waits_on_futex(void *arg)
{
	long r = syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0);
	CHECK(r == 0 || errno == EAGAIN, "futex wait ended with %s", strerror(errno));
	CHECK(may_wake, "a futex wait ended before its wake");
	woken[(long)arg]++;
	return 0;
}
static void *waits_on_sem(void *arg)
{
	CHECK(!sem_wait(&sem), "sem_wait");
	CHECK(may_wake, "sem_wait ended before the post");
	woken[(long)arg]++;
	return 0;
}
static void *waits_for_signal(void *arg)
{
	sigset_t set;
	siginfo_t info;
	sigemptyset(&set), sigaddset(&set, SIGRTMIN);
	int r = sigwaitinfo(&set, &info);
	EQ("sigwaitinfo", r, SIGRTMIN);
	EQ("payload", info.si_value.sival_int, 99);
	CHECK(may_wake, "sigwaitinfo ended before the signal");
	woken[(long)arg]++;
	return 0;
}
static void *waits_for_child(void *arg)
{
	int status;
	EQ("waitpid", waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7, "the child ended with %#x", status);
	CHECK(may_wake, "waitpid ended before the child");
	woken[(long)arg]++;
	return 0;
}
static void *(*const blockers[])(void *) = {reads_pipe, polls, writes_full_pipe, waits_on_futex, waits_on_sem, waits_for_signal, waits_for_child};
#define BLOCKERS (long)(sizeof blockers / sizeof *blockers)

/* `without-child` leaves the child out, for a driver that moves this process without its tree. */
int main(int argc, char **argv)
{
	start(argc, argv);
	long blockers_used = argc > 2 && !strcmp(argv[2], "without-child") ? BLOCKERS - 1 : BLOCKERS;
	sigset_t set;
	sigemptyset(&set), sigaddset(&set, SIGRTMIN);
	pthread_sigmask(SIG_BLOCK, &set, 0);
	sem_init(&sem, 0, 0);
	ready();
	int more = 1;
	while (more) {
		SYS(pipe(to_reader)), SYS(pipe(to_poller)), SYS(pipe(full)), SYS(pipe(start_child));
		static char block[65536];
		memset(block, 'f', sizeof block);
		EQ("filling a pipe", write(full[1], block, sizeof block), sizeof block);
		if (blockers_used == BLOCKERS && !(child = SYS(fork()))) {
			char c;
			close(start_child[1]);
			EQ("the child's read", read(start_child[0], &c, 1), 0);
			_exit(7);
		}
		close(start_child[0]);
		futex_word = 0, may_wake = 0;
		memset((void *)woken, 0, sizeof woken);
		pthread_t threads[BLOCKERS];
		for (long i = 0; i < blockers_used; i++)
			CHECK(!pthread_create(&threads[i], 0, blockers[i], (void *)i), "pthread_create");
		for (int i = 0; i < 12 && more; i++) { /* some moves' time, with nobody awake but this thread */
			dwell_ms(25);
			more = next_round();
		}
		for (long i = 0; i < blockers_used; i++)
			EQ("a blocked thread's wakes", woken[i], 0);
		may_wake = 1;
		EQ("write", write(to_reader[1], "hello", 5), 5);
		EQ("write", write(to_poller[1], "x", 1), 1);
		size_t got = 0;
		static char back[2 * 65536];
		while (got < sizeof back)
			got += SYS(read(full[0], back + got, sizeof back - got));
		for (size_t i = 0; i < sizeof back; i++)
			EQ("a byte through the full pipe", back[i], i < 65536 ? 'f' : 'w');
		futex_word = 1, syscall(SYS_futex, &futex_word, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
		sem_post(&sem);
		SYS(sigqueue(getpid(), SIGRTMIN, (union sigval){.sival_int = 99}));
		close(start_child[1]);
		for (long i = 0; i < blockers_used; i++) {
			pthread_join(threads[i], 0);
			EQ("a thread's wakes", woken[i], 1);
		}
		for (int i = 0; i < 2; i++)
			close(to_reader[i]), close(to_poller[i]), close(full[i]);
	}
	return finish();
}
