/* connections serve MB PORT LOG: fills MB of memory, takes connections and sends back what comes; writes "ready PID" to LOG.
 * connections connect ADDRESS PORT COUNT: opens so many, prints "connected"; for each line on standard input it sends a byte
 * over each, waits until all have come back and prints "all MICROSECONDS". */
#include "meter.h"
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>

static int failed(const char *what) { return perror(what), 1; }

static int serve(size_t megabytes, struct sockaddr_in at, const char *path)
{
	uint64_t *mem = filled(megabytes);
	FILE *log = open_log(path);
	int on = 1, door = socket(AF_INET, SOCK_STREAM, 0), all = epoll_create1(0);
	setsockopt(door, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(door, (void *)&at, sizeof at) || listen(door, 4096))
		return failed("listen");
	struct epoll_event it = {.events = EPOLLIN, .data.fd = door}, some[64];
	epoll_ctl(all, EPOLL_CTL_ADD, door, &it);
	fprintf(log, "ready %d\n", getpid());
	for (size_t page = 0;; page = (page + 1) % (megabytes * 256)) {
		int n = epoll_wait(all, some, 64, -1);
		if (n < 0)
			return failed("epoll_wait");
		if (mem[page * 512] != (page + 1) * GOLDEN)
			return fprintf(log, "corrupt %zu\n", page), 3;
		for (int i = 0; i < n; i++) {
			int fd = some[i].data.fd;
			char bytes[512];
			if (fd == door) {
				it.data.fd = accept(door, 0, 0);
				setsockopt(it.data.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
				epoll_ctl(all, EPOLL_CTL_ADD, it.data.fd, &it);
				continue;
			}
			ssize_t got = read(fd, bytes, sizeof bytes);
			if (got <= 0 || write(fd, bytes, got) != got)
				close(fd);
		}
	}
}

static int connect_all(struct sockaddr_in to, size_t count)
{
	int *sockets = calloc(count, sizeof *sockets);
	char line[64], byte = 'x';
	for (size_t i = 0; i < count; i++) {
		sockets[i] = socket(AF_INET, SOCK_STREAM, 0);
		/* A byte to and fro: it has been accepted. */
		if (connect(sockets[i], (void *)&to, sizeof to) || write(sockets[i], &byte, 1) != 1 || read(sockets[i], &byte, 1) != 1)
			return failed("connect");
	}
	puts("connected"), fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {
		int64_t begun = now_ns();
		for (size_t i = 0; i < count; i++)
			if (write(sockets[i], &byte, 1) != 1)
				return failed("write");
		for (size_t i = 0; i < count; i++)
			if (read(sockets[i], &byte, 1) != 1)
				return failed("read");
		printf("all %ld\n", (now_ns() - begun) / 1000), fflush(stdout);
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct rlimit most = {65536, 65536};
	if (argc != 5)
		return fprintf(stderr, "usage: connections serve MB PORT LOG | connect ADDRESS PORT COUNT\n"), 2;
	setrlimit(RLIMIT_NOFILE, &most);
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[3]))};
	if (!strcmp(argv[1], "serve"))
		return serve(strtoul(argv[2], 0, 10), at, argv[4]);
	inet_pton(AF_INET, argv[2], &at.sin_addr);
	return connect_all(at, strtoul(argv[4], 0, 10));
}
