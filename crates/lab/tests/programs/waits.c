/* waits STOPFILE: what event loops are made of, moved in mid-use (and memfds, pidfds, signals for what is ready): epoll sets (nested, level and edge triggered, one-shot,
 * exclusive, with numbers that have become other files'), eventfds, timerfds of several clocks, signalfds; and threads
 * that are blocked in reads of them. Nothing is lost, nothing comes twice but what epoll(7) allows. */
#include "check.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>

static int outer, inner, counter, semaphore, edge[2], once[2], moved_number, signals_fd;
static int async[2], memory, itself;
static unsigned char memory_holds;
static int periodic, absolute, boot, disarmed;
static int64_t periodic_from, periodic_read;
#define PERIOD_NS 7000000ll

static void add(int set, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event e = {.events = events, .data.u64 = data};
	SYS(epoll_ctl(set, EPOLL_CTL_ADD, fd, &e));
}
static int wait_for(int set, struct epoll_event *e, int most, int ms)
{
	int n;
	while ((n = epoll_wait(set, e, most, ms)) < 0)
		CHECK(errno == EINTR, "epoll_wait"); /* a signal of its own, never a move: there are none here */
	return n;
}
static uint64_t read8(int fd)
{
	uint64_t value = 0;
	ssize_t n = read(fd, &value, 8);
	if (n < 0) {
		CHECK(errno == EAGAIN, "read of fd %d", fd);
		return 0;
	}
	EQ("bytes read", n, 8);
	return value;
}
static void write8(int fd, uint64_t value) { EQ("bytes written", write(fd, &value, 8), 8); }

static int arm(int clock, int flags, int64_t first_ns, int64_t interval_ns)
{
	int fd = SYS(timerfd_create(clock, TFD_NONBLOCK | TFD_CLOEXEC));
	struct itimerspec spec = {{interval_ns / 1000000000, interval_ns % 1000000000}, {first_ns / 1000000000, first_ns % 1000000000}};
	SYS(timerfd_settime(fd, flags, &spec, 0));
	return fd;
}

/* Threads that block in a read of each kind until they are told. */
static int told_event, told_timer, told_signal;
static volatile int may_return, returned;
static void *reads_event(void *arg)
{
	EQ("a blocking eventfd", (int)read8(told_event), 3);
	CHECK(may_return, "a read of an eventfd returned too early");
	__atomic_add_fetch(&returned, 1, __ATOMIC_SEQ_CST);
	return arg;
}
static void *reads_timer(void *arg)
{
	EQ("a blocking timerfd", (int)read8(told_timer), 1);
	CHECK(may_return, "a read of a timerfd returned too early");
	__atomic_add_fetch(&returned, 1, __ATOMIC_SEQ_CST);
	return arg;
}
static void *reads_signal(void *arg)
{
	struct signalfd_siginfo info;
	EQ("a blocking signalfd", read(told_signal, &info, sizeof info), (int)sizeof info);
	EQ("its signal", info.ssi_signo, SIGRTMIN + 3);
	EQ("its value", info.ssi_int, 77);
	CHECK(may_return, "a read of a signalfd returned too early");
	__atomic_add_fetch(&returned, 1, __ATOMIC_SEQ_CST);
	return arg;
}

static void set_up(void)
{
	outer = SYS(epoll_create1(EPOLL_CLOEXEC)), inner = SYS(epoll_create1(0));
	counter = SYS(eventfd(0, EFD_NONBLOCK)), semaphore = SYS(eventfd(0, EFD_SEMAPHORE | EFD_NONBLOCK));
	SYS(pipe2(edge, O_NONBLOCK)), SYS(pipe2(once, O_NONBLOCK));
	add(outer, inner, EPOLLIN, 100);
	add(inner, counter, EPOLLIN | EPOLLET, 1);
	add(inner, semaphore, EPOLLIN | EPOLLEXCLUSIVE, 2);
	add(outer, edge[0], EPOLLIN | EPOLLET | EPOLLRDHUP, 3);
	add(outer, once[0], EPOLLIN | EPOLLONESHOT, 4);
	/* Added under one number, which then becomes another file's. */
	int other[2];
	SYS(pipe2(other, O_NONBLOCK));
	moved_number = SYS(fcntl(other[0], F_DUPFD, 500));
	add(outer, other[0], EPOLLIN, 5);
	SYS(dup2(SYS(open("/dev/null", O_RDONLY)), other[0]));
	told_event = SYS(eventfd(0, 0)), told_timer = SYS(timerfd_create(CLOCK_MONOTONIC, 0));
	sigset_t set;
	sigemptyset(&set), sigaddset(&set, SIGRTMIN + 1);
	signals_fd = SYS(signalfd(-1, &set, SFD_NONBLOCK));
	sigaddset(&set, SIGRTMIN + 2);
	SYS(signalfd(signals_fd, &set, 0)); /* another mask */
	add(outer, signals_fd, EPOLLIN, 6);
	sigemptyset(&set), sigaddset(&set, SIGRTMIN + 3);
	told_signal = SYS(signalfd(-1, &set, 0));
	periodic_from = now_ns(CLOCK_MONOTONIC) + PERIOD_NS;
	periodic = arm(CLOCK_MONOTONIC, TFD_TIMER_ABSTIME, periodic_from, PERIOD_NS);
	disarmed = arm(CLOCK_MONOTONIC, 0, 0, 0);
	SYS(pipe2(async, O_NONBLOCK));
	SYS(fcntl(async[0], F_SETOWN, getpid())), SYS(fcntl(async[0], F_SETSIG, SIGRTMIN + 4));
	SYS(fcntl(async[0], F_SETFL, O_ASYNC | O_NONBLOCK));
	memory = SYS(memfd_create("waits", MFD_ALLOW_SEALING));
	SYS(ftruncate(memory, 100000)), SYS(fcntl(memory, F_ADD_SEALS, F_SEAL_GROW));
	itself = SYS(syscall(SYS_pidfd_open, getpid(), 0));
	dup2(other[1], 501), close(other[1]);
}

static void round_of_sets(void)
{
	struct epoll_event e[16];
	/* Nothing is ready but what the move may repeat; an edge may come once more, then there must be nothing to read. */
	int n = wait_for(outer, e, 16, 0);
	for (int i = 0; i < n; i++)
		CHECK(e[i].data.u64 == 3 || e[i].data.u64 == 100, "an event of %lld out of nothing", (long long)e[i].data.u64);
	n = wait_for(inner, e, 16, 0);
	for (int i = 0; i < n; i++)
		EQ("an event of the inner set out of nothing", e[i].data.u64, 1);
	EQ("the counter", (int)read8(counter), 0);
	char c;
	CHECK(read(edge[0], &c, 1) == -1 && errno == EAGAIN, "a byte out of nothing");

	/* An edge is made; it must be told after whatever happens now, once at least. */
	write8(counter, 5), write8(semaphore, 2);
	EQ("write", write(edge[1], "e", 1), 1);
	EQ("write", write(once[1], "o", 1), 1);
	EQ("write", write(501, "m", 1), 1);
	SYS(sigqueue(getpid(), SIGRTMIN + 2, (union sigval){.sival_int = 9}));
	dwell_ms(6);
	unsigned seen = 0;
	for (int tries = 0; seen != (1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7) && tries < 100; tries++) {
		n = wait_for(outer, e, 16, 100);
		for (int i = 0; i < n; i++) {
			unsigned which = e[i].data.u64 == 100 ? 7 : e[i].data.u64;
			CHECK(which >= 3 && which <= 7, "an event of %u", which);
			CHECK(which != 4 || !(seen & 1 << 4), "a one-shot event was told twice");
			CHECK(e[i].events & EPOLLIN, "events of %u are %#x", which, e[i].events);
			seen |= 1 << which;
		}
	}
	EQ("events seen", seen, 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7);
	seen = 0;
	for (int tries = 0; seen != 6 && tries < 100; tries++) {
		n = wait_for(inner, e, 16, 100);
		for (int i = 0; i < n; i++)
			seen |= 1 << e[i].data.u64;
	}
	EQ("events of the inner set", seen, 6);
	/* The one-shot watch has fired: not once more, though there is a byte. */
	dwell_ms(4);
	n = wait_for(outer, e, 16, 0);
	for (int i = 0; i < n; i++)
		CHECK(e[i].data.u64 != 4, "a one-shot event was told again");
	EQ("the counter", (int)read8(counter), 5);
	EQ("the semaphore", (int)read8(semaphore), 1); EQ("the semaphore", (int)read8(semaphore), 1);
	EQ("the empty semaphore", (int)read8(semaphore), 0);
	EQ("read", read(edge[0], &c, 1), 1); EQ("byte", c, 'e');
	EQ("read", read(once[0], &c, 1), 1); EQ("byte", c, 'o');
	EQ("read", read(moved_number, &c, 1), 1); EQ("byte", c, 'm');
	struct signalfd_siginfo info;
	EQ("signalfd", read(signals_fd, &info, sizeof info), (int)sizeof info);
	EQ("signal", info.ssi_signo, SIGRTMIN + 2); EQ("value", info.ssi_int, 9);
	/* Nor when there is nothing in the pipe any more, and then something new: not before it is armed again. */
	dwell_ms(3);
	EQ("write", write(once[1], "p", 1), 1);
	n = wait_for(outer, e, 16, 0);
	for (int i = 0; i < n; i++)
		CHECK(e[i].data.u64 != 4, "a one-shot event was told before it was armed again");
	struct epoll_event again = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = 4};
	SYS(epoll_ctl(outer, EPOLL_CTL_MOD, once[0], &again));
	dwell_ms(3);
	seen = 0;
	for (int tries = 0; !seen && tries < 100; tries++) {
		n = wait_for(outer, e, 16, 100);
		for (int i = 0; i < n; i++)
			seen |= e[i].data.u64 == 4;
	}
	EQ("an event of a watch that was armed again", seen, 1);
	EQ("read", read(once[0], &c, 1), 1); EQ("byte", c, 'p');
	SYS(epoll_ctl(outer, EPOLL_CTL_MOD, once[0], &again));
	/* Flags of descriptions. */
	EQ("flags", fcntl(counter, F_GETFL) & (O_NONBLOCK | O_ACCMODE), O_NONBLOCK | O_RDWR);
	EQ("cloexec", fcntl(outer, F_GETFD), FD_CLOEXEC); EQ("cloexec", fcntl(inner, F_GETFD), 0);
}

static void round_of_others(void)
{
	/* A signal for what can be read, with the descriptor's number. */
	sigset_t set;
	siginfo_t info;
	sigemptyset(&set), sigaddset(&set, SIGRTMIN + 4);
	struct timespec none = {0, 0};
	int got = sigtimedwait(&set, &info, &none);
	CHECK(got == -1 && errno == EAGAIN, "a signal %d out of nothing (code %d, descriptor %d, band %lx)", got, info.si_code, info.si_fd, info.si_band);
	dwell_ms(2);
	EQ("owner", fcntl(async[0], F_GETOWN), getpid()); EQ("signal", fcntl(async[0], F_GETSIG), SIGRTMIN + 4);
	EQ("write", write(async[1], "a", 1), 1);
	EQ("signal", sigtimedwait(&set, &info, &none), SIGRTMIN + 4); EQ("descriptor", info.si_fd, async[0]);
	char c;
	EQ("read", read(async[0], &c, 1), 1);
	/* Memory keeps what is in it, its length and its seals. */
	unsigned char block[3];
	EQ("pread", pread(memory, block, 3, 99997), 3);
	for (int i = 0; i < 3; i++)
		EQ("memory", block[i], memory_holds);
	memset(block, ++memory_holds, 3);
	EQ("pwrite", pwrite(memory, block, 3, 99997), 3);
	EQ("seals", fcntl(memory, F_GET_SEALS), F_SEAL_GROW);
	CHECK(ftruncate(memory, 100001) == -1 && errno == EPERM, "a sealed memory grew");
	struct stat stat;
	fstat(memory, &stat);
	EQ("size", stat.st_size, 100000);
	/* A descriptor of this process. */
	EQ("a signal to itself", syscall(SYS_pidfd_send_signal, itself, 0, 0, 0), 0);
	EQ("a signal to itself", syscall(SYS_pidfd_send_signal, itself, SIGRTMIN + 4, 0, 0), 0);
	EQ("signal", sigtimedwait(&set, &info, &none), SIGRTMIN + 4);
	struct pollfd p = {itself, POLLIN, 0};
	EQ("poll", poll(&p, 1, 0), 0);
}

static void round_of_timers(void)
{
	/* Every expiration is counted once, wherever it fell; the last may be on its way. */
	int64_t before = now_ns(CLOCK_MONOTONIC);
	periodic_read += read8(periodic);
	int64_t after = now_ns(CLOCK_MONOTONIC);
	int64_t least = (before - periodic_from) / PERIOD_NS + (before >= periodic_from), most = (after - periodic_from) / PERIOD_NS + 1;
	CHECK(periodic_read >= least - 1 && periodic_read <= most, "%lld expirations, not %lld to %lld", (long long)periodic_read, (long long)least, (long long)most);
	struct itimerspec spec;
	SYS(timerfd_gettime(periodic, &spec));
	EQ("interval", spec.it_interval.tv_nsec, PERIOD_NS);
	EQ("a disarmed timer", (int)read8(disarmed), 0);

	/* Timers for a moment of two clocks: not before it. */
	int64_t moment = now_ns(CLOCK_REALTIME) + 9000000, boots = now_ns(CLOCK_BOOTTIME) + 5000000, relative = now_ns(CLOCK_MONOTONIC) + 7000000;
	absolute = arm(CLOCK_REALTIME, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, moment, 0);
	boot = arm(CLOCK_BOOTTIME, TFD_TIMER_ABSTIME, boots, 0);
	int soon = arm(CLOCK_REALTIME, 0, 7000000, 0);
	dwell_ms(3);
	struct pollfd p[3] = {{absolute, POLLIN, 0}, {boot, POLLIN, 0}, {soon, POLLIN, 0}};
	for (int left = 7; left;) {
		EQ("poll", poll(p, 3, 10000) > 0, 1);
		for (int i = 0; i < 3; i++) {
			if (!(left & 1 << i) || !p[i].revents)
				continue;
			int64_t now = i == 0 ? now_ns(CLOCK_REALTIME) : i == 1 ? now_ns(CLOCK_BOOTTIME) : now_ns(CLOCK_MONOTONIC);
			int64_t due = i == 0 ? moment : i == 1 ? boots : relative;
			EQ("expirations", (int)read8(p[i].fd), 1);
			CHECK(now >= due, "timer %d came %lld ns early", i, (long long)(due - now));
			left &= ~(1 << i), p[i].fd = -1;
		}
	}
	close(absolute), close(boot), close(soon);
}

int main(int argc, char **argv)
{
	start(argc, argv);
	sigset_t set;
	sigemptyset(&set), sigaddset(&set, SIGRTMIN + 1), sigaddset(&set, SIGRTMIN + 2), sigaddset(&set, SIGRTMIN + 3), sigaddset(&set, SIGRTMIN + 4);
	pthread_sigmask(SIG_BLOCK, &set, 0);
	set_up();
	ready();
	int more = 1;
	while (more) {
		pthread_t threads[3];
		may_return = returned = 0;
		CHECK(!pthread_create(&threads[0], 0, reads_event, 0), "pthread_create");
		CHECK(!pthread_create(&threads[1], 0, reads_timer, 0), "pthread_create");
		CHECK(!pthread_create(&threads[2], 0, reads_signal, 0), "pthread_create");
		for (int i = 0; i < 12 && more; i++) {
			round_of_sets();
			round_of_timers();
			round_of_others();
			more = next_round();
		}
		EQ("threads that returned", returned, 0);
		may_return = 1;
		write8(told_event, 3);
		struct itimerspec spec = {{0, 0}, {0, 1}};
		SYS(timerfd_settime(told_timer, 0, &spec, 0));
		SYS(sigqueue(getpid(), SIGRTMIN + 3, (union sigval){.sival_int = 77}));
		for (int i = 0; i < 3; i++)
			pthread_join(threads[i], 0);
		EQ("threads that returned", returned, 3);
	}
	return finish();
}
