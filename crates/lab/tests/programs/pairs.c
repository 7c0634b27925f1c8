/* pairs STOPFILE [tree]: unix socket pairs of all kinds with both ends in this process, moved with bytes, messages,
 * descriptors and credentials on their way through them, half shut down, with the other end closed; threads that are
 * blocked in them. With `tree`, a child has the other end of one of them and the two are moved together. */
#include "check.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

static void send_with(int s, const void *bytes, size_t n, int *fds, int count)
{
	union { char space[CMSG_SPACE(4 * sizeof(int))]; struct cmsghdr align; } c;
	struct iovec part = {(void *)bytes, n};
	struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1};
	if (count) {
		m.msg_control = &c, m.msg_controllen = CMSG_SPACE(count * sizeof(int));
		struct cmsghdr *h = CMSG_FIRSTHDR(&m);
		h->cmsg_level = SOL_SOCKET, h->cmsg_type = SCM_RIGHTS, h->cmsg_len = CMSG_LEN(count * sizeof(int));
		memcpy(CMSG_DATA(h), fds, count * sizeof(int));
	}
	EQ("sent", sendmsg(s, &m, MSG_DONTWAIT), (long)n);
}
/* Receives; the descriptors that came (at most 4), the sender if it was said. */
static ssize_t receive(int s, void *bytes, size_t n, int *fds, int *count, struct ucred *who)
{
	union { char space[512]; struct cmsghdr align; } c;
	struct iovec part = {bytes, n};
	struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c};
	ssize_t got = recvmsg(s, &m, MSG_DONTWAIT);
	*count = 0;
	if (who)
		who->pid = -1;
	for (struct cmsghdr *h = got < 0 ? 0 : CMSG_FIRSTHDR(&m); h; h = CMSG_NXTHDR(&m, h)) {
		if (h->cmsg_type == SCM_RIGHTS) {
			*count = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
			memcpy(fds, CMSG_DATA(h), *count * sizeof(int));
		} else if (h->cmsg_type == SCM_CREDENTIALS && who)
			memcpy(who, CMSG_DATA(h), sizeof *who);
	}
	return got;
}

static int echo[2], told[2];
static volatile int may_return, returned;
static void *reads(void *arg)
{
	char c;
	EQ("a blocking recv", recv(told[0], &c, 1, 0), 1);
	EQ("its byte", c, 't');
	CHECK(may_return, "a recv returned before anything was sent");
	returned = 1;
	return arg;
}

static void child(void)
{
	char text[64];
	ssize_t n;
	while ((n = read(echo[1], text, sizeof text)) > 0)
		EQ("the child's write", write(echo[1], text, n), n);
	EQ("the end of the echo", n, 0);
	_exit(7);
}

static void one_round(unsigned long r, int with_child)
{
	static char big[150000], got[150000];
	int a[2], s[2], m[2], q[2], half[2], alone[2], p[2], fds[4], count;
	struct ucred who;
	SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, a)), SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, s)), SYS(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, m));
	SYS(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, q)), SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, half)), SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, alone));
	SYS(pipe(p));
	int on = 1, size = 300000;
	SYS(setsockopt(q[1], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
	SYS(setsockopt(s[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size));
	int set = SYS(epoll_create1(0));
	struct epoll_event e = {.events = EPOLLIN | EPOLLET, .data.u64 = 11};
	SYS(epoll_ctl(set, EPOLL_CTL_ADD, a[1], &e));
	for (size_t i = 0; i < sizeof big; i++)
		big[i] = (char)(i * 31 + r);
	int file = SYS(open("pairs-file", O_RDWR | O_CREAT | O_TRUNC, 0600)), sent[3] = {p[0], file, a[0]};
	EQ("write", write(file, "file", 4), 4);
	send_with(a[0], "with", 4, sent, 3);
	close(p[0]), close(file);
	EQ("write", write(p[1], "piped", 5), 5);
	send_with(s[0], "before", 6, 0, 0), send_with(s[0], big, sizeof big, 0, 0);
	send_with(m[0], "one", 3, 0, 0), send_with(m[0], "", 0, 0, 0), send_with(m[0], big, 90000, &p[1], 1), send_with(m[1], "back", 4, 0, 0);
	send_with(q[0], "signed", 6, 0, 0), send_with(q[0], "twice", 5, 0, 0);
	send_with(half[0], "last", 4, 0, 0), SYS(shutdown(half[0], SHUT_WR));
	send_with(alone[0], "words", 5, 0, 0), close(alone[0]);
	if (with_child)
		EQ("write", write(echo[0], "hello", 5), 5);
	dwell_ms(8);

	EQ("edges", epoll_wait(set, &e, 1, 1000), 1);
	EQ("data", e.data.u64, 11);
	char text[64];
	EQ("a short recv", receive(s[1], text, 4, fds, &count, 0), 4);
	CHECK(!memcmp(text, "befo", 4), "%.4s", text);
	EQ("the rest", receive(s[1], text, 2, fds, &count, 0), 2);
	CHECK(!memcmp(text, "re", 2), "%.2s", text);
	EQ("a message with descriptors", receive(a[1], text, 3, fds, &count, 0), 3);
	CHECK(!memcmp(text, "wit", 3), "%.3s", text);
	EQ("descriptors", count, 3);
	EQ("read", read(fds[0], text, sizeof text), 5);
	CHECK(!memcmp(text, "piped", 5), "%.5s", text);
	EQ("offset", lseek(fds[1], 0, SEEK_CUR), 4);
	struct stat one, other;
	fstat(fds[2], &one), fstat(a[0], &other);
	EQ("the socket that came back", one.st_ino, other.st_ino);
	for (int i = 0; i < 3; i++)
		close(fds[i]);
	for (size_t n = 0; n < sizeof got;) {
		ssize_t more = receive(s[1], got + n, sizeof got - n, fds, &count, 0);
		CHECK(more > 0 && !count, "%zd bytes more, %d descriptors", more, count);
		n += more;
	}
	CHECK(!memcmp(got, big, sizeof got), "a stream came out different");
	EQ("the rest of a message", receive(a[1], text, 9, fds, &count, 0), 1); EQ("descriptors", count, 0);
	CHECK(receive(a[1], text, 1, fds, &count, 0) == -1 && errno == EAGAIN, "more in a stream than was sent");
	CHECK(receive(s[1], text, 1, fds, &count, 0) == -1 && errno == EAGAIN, "more in a stream than was sent");
	EQ("nonblocking", fcntl(a[0], F_GETFL) & O_NONBLOCK, O_NONBLOCK); EQ("cloexec", fcntl(m[0], F_GETFD), FD_CLOEXEC);
	socklen_t length = sizeof size;
	SYS(getsockopt(s[0], SOL_SOCKET, SO_SNDBUF, &size, &length));
	EQ("send buffer", size, 600000);

	EQ("message", receive(m[1], got, sizeof got, fds, &count, 0), 3);
	EQ("empty message", receive(m[1], got, sizeof got, fds, &count, 0), 0);
	EQ("large message", receive(m[1], got, sizeof got, fds, &count, 0), 90000);
	CHECK(!memcmp(got, big, 90000), "a message came out different");
	EQ("descriptors", count, 1);
	fstat(fds[0], &one), fstat(p[1], &other);
	EQ("the pipe's end that came back", one.st_ino, other.st_ino);
	close(fds[0]);
	EQ("message back", receive(m[0], got, sizeof got, fds, &count, 0), 4);

	EQ("packet", receive(q[1], text, sizeof text, fds, &count, &who), 6);
	EQ("its sender", who.pid, getpid()); EQ("its user", who.uid, getuid());
	EQ("packet", receive(q[1], text, sizeof text, fds, &count, &who), 5);
	EQ("its sender", who.pid, getpid());
	length = sizeof who;
	SYS(getsockopt(q[0], SOL_SOCKET, SO_PEERCRED, &who, &length));
	EQ("peer", who.pid, getpid()); EQ("peer's user", who.uid, geteuid());

	struct pollfd poll_half = {half[1], POLLIN | POLLRDHUP, 0};
	EQ("poll", poll(&poll_half, 1, 0), 1); EQ("revents", poll_half.revents, POLLIN | POLLRDHUP);
	EQ("last words", receive(half[1], text, sizeof text, fds, &count, 0), 4);
	EQ("the end", receive(half[1], text, sizeof text, fds, &count, 0), 0);
	send_with(half[1], "still", 5, 0, 0);
	EQ("the other way", receive(half[0], text, sizeof text, fds, &count, 0), 5);
	CHECK(send(half[0], "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "a send after shutdown");

	EQ("words of one who is gone", receive(alone[1], text, sizeof text, fds, &count, 0), 5);
	EQ("the end", receive(alone[1], text, sizeof text, fds, &count, 0), 0);
	CHECK(send(alone[1], "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "a send to nobody");
	if (with_child) {
		for (size_t n = 0; n < 5;)
			n += SYS(read(echo[0], text + n, 5 - n));
		CHECK(!memcmp(text, "hello", 5), "the echo is %.5s", text);
	}
	for (int i = 0; i < 2; i++)
		close(a[i]), close(s[i]), close(m[i]), close(q[i]), close(half[i]);
	close(alone[1]), close(p[1]), close(set);
}

int main(int argc, char **argv)
{
	start(argc, argv);
	int with_child = argc > 2 && !strcmp(argv[2], "tree");
	pid_t pid = 0;
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, told));
	if (with_child) {
		SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, echo));
		if (!(pid = SYS(fork())))
			close(echo[0]), close(told[0]), close(told[1]), child();
		close(echo[1]);
	}
	ready();
	unsigned long r = 0;
	for (int more = 1; more;) {
		pthread_t thread;
		may_return = returned = 0;
		CHECK(!pthread_create(&thread, 0, reads, 0), "pthread_create");
		for (int i = 0; i < 12 && more; i++) {
			one_round(++r, with_child);
			more = next_round();
		}
		EQ("a blocked thread", returned, 0);
		may_return = 1;
		EQ("send", send(told[1], "t", 1, 0), 1);
		pthread_join(thread, 0);
		EQ("a blocked thread", returned, 1);
	}
	if (with_child) {
		int status;
		close(echo[0]);
		EQ("waitpid", waitpid(pid, &status, 0), pid);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7, "the child ended with %#x", status);
	}
	return finish();
}
