/* sends STOPFILE: threads that write far more than there is room for with one blocking call, to sockets whose readers
 * take their time: write, writev, send, sendmsg. A call that blocks answers when all is written, natively; a short
 * answer is a difference. */
#include "check.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/uio.h>

#ifndef SO_BUF_LOCK
#define SO_BUF_LOCK 72
#endif

enum { CHANNELS = 3, MOST = 3 << 19, PIECE = 60000 };

struct channel {
	const char *name;
	int in, out;
	unsigned long sent;
	pthread_t writer, reader;
};

static struct channel channels[CHANNELS] = {{.name = "TCP"}, {.name = "a unix socket"}, {.name = "IPv6"}};
static volatile int over;

static unsigned char byte_at(unsigned long at) { return (unsigned char)(at ^ at >> 8 ^ at >> 16); }

static void *writes(void *arg)
{
	struct channel *c = arg;
	unsigned char *bytes = malloc(MOST);
	CHECK(bytes, "malloc");
	for (unsigned turn = 0; !over; turn++) {
		size_t n = MOST / 2 + turn * 7919 % (MOST / 2);
		for (size_t i = 0; i < n; i++)
			bytes[i] = byte_at(c->sent + i);
		struct iovec parts[] = {{bytes, n / 3}, {bytes + n / 3, n - n / 3}};
		struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
		ssize_t done;
		switch (turn % 4) {
		case 0: done = write(c->out, bytes, n); break;
		case 1: done = writev(c->out, parts, 2); break;
		case 2: done = send(c->out, bytes, n, 0); break;
		default: done = sendmsg(c->out, &message, 0);
		}
		CHECK(done == (ssize_t)n, "to %s, turn %u: %zd of %zu were written", c->name, turn, done, n);
		c->sent += n;
	}
	SYS(shutdown(c->out, SHUT_WR));
	free(bytes);
	return 0;
}

static void *reads(void *arg)
{
	struct channel *c = arg;
	static __thread unsigned char bytes[PIECE];
	for (unsigned long at = 0;;) {
		ssize_t n = SYS(read(c->in, bytes, sizeof bytes));
		if (n == 0)
			return (void *)at;
		for (ssize_t i = 0; i < n; i++)
			CHECK(bytes[i] == byte_at(at + i), "of %s, byte %lu", c->name, at + i);
		at += n;
		if (!over)
			usleep(2000);
	}
}

static void connect_two(int family, struct channel *c)
{
	struct sockaddr_storage name = {.ss_family = family};
	socklen_t length = sizeof name;
	if (family == AF_INET)
		((struct sockaddr_in *)&name)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	else
		((struct sockaddr_in6 *)&name)->sin6_addr = in6addr_loopback;
	int listening = SYS(socket(family, SOCK_STREAM, 0));
	SYS(bind(listening, (struct sockaddr *)&name, family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6)));
	SYS(listen(listening, 1));
	SYS(getsockname(listening, (struct sockaddr *)&name, &length));
	c->out = SYS(socket(family, SOCK_STREAM, 0));
	SYS(connect(c->out, (struct sockaddr *)&name, length));
	c->in = SYS(accept(listening, 0, 0));
	SYS(close(listening));
}

int main(int argc, char **argv)
{
	int pair[2];
	start(argc, argv);
	connect_two(AF_INET, &channels[0]);
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	channels[1].in = pair[0], channels[1].out = pair[1];
	connect_two(AF_INET6, &channels[2]);
	int buffer, locked, now;
	socklen_t word = sizeof(int);
	SYS(getsockopt(channels[1].out, SOL_SOCKET, SO_SNDBUF, &buffer, &word));
	SYS(getsockopt(channels[1].out, SOL_SOCKET, SO_BUF_LOCK, &locked, &word));
	for (int i = 0; i < CHANNELS; i++) {
		CHECK(pthread_create(&channels[i].reader, 0, reads, &channels[i]) == 0, "a thread");
		CHECK(pthread_create(&channels[i].writer, 0, writes, &channels[i]) == 0, "a thread");
	}
	ready();
	do
		dwell_ms(2);
	while (next_round());
	over = 1;
	for (int i = 0; i < CHANNELS; i++) {
		void *got;
		pthread_join(channels[i].writer, 0);
		pthread_join(channels[i].reader, &got);
		EQ(channels[i].name, (unsigned long)got, channels[i].sent);
	}
	SYS(getsockopt(channels[1].out, SOL_SOCKET, SO_SNDBUF, &now, &word));
	EQ("the unix socket's buffer", now, buffer);
	SYS(getsockopt(channels[1].out, SOL_SOCKET, SO_BUF_LOCK, &now, &word));
	EQ("whether it is fixed", now, locked);
	return finish();
}
