/* floor serve PORT MB [spin] | floor touch HOST PORT COUNT [spin]: the least that a demand fault over TCP can be: one
 * thread touches a page, another reads the userfaultfd event, asks for the page by its number, gets 4096 bytes, copies
 * them in and wakes the first. One page each time, no drain, nothing else. With `spin` neither side blocks between
 * messages. `touch` prints "US" for each touch, as the touching thread saw it. Needs root. */
#include "meter.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>

static int spin, sock, uffd;
static char *mem;
static _Alignas(4096) char page[4096];

static void die(const char *what)
{
	perror(what);
	exit(1);
}
/* All of it, blocking or spinning; false at the end of the stream. */
static int get(int fd, void *to, size_t n)
{
	for (size_t got = 0; got < n;) {
		ssize_t r = recv(fd, (char *)to + got, n - got, spin ? MSG_DONTWAIT : MSG_WAITALL);
		if (r == 0 || (r < 0 && errno != EAGAIN && errno != EINTR))
			return 0;
		got += r > 0 ? r : 0;
	}
	return 1;
}

static int serve(int port, size_t pages)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	mem = (char *)filled(pages / 256);
	if (bind(fd, (void *)&at, sizeof at) || listen(fd, 1))
		die("bind");
	puts("listening"), fflush(stdout);
	int peer = accept(fd, 0, 0);
	setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	for (uint64_t number; get(peer, &number, 8);)
		if (number >= pages || send(peer, mem + number * 4096, 4096, 0) != 4096)
			die("send");
	return 0;
}

static void *pager(void *arg)
{
	(void)arg;
	for (;;) {
		struct uffd_msg event;
		ssize_t n = read(uffd, &event, sizeof event);
		if (n < 0 && errno == EAGAIN)
			continue;
		if (n != sizeof event)
			die("read of the userfaultfd");
		uint64_t at = event.arg.pagefault.address & ~4095ull, number = (at - (uintptr_t)mem) / 4096;
		if (send(sock, &number, 8, 0) != 8 || !get(sock, page, 4096))
			die("page");
		struct uffdio_copy copy = {.dst = at, .src = (uintptr_t)page, .len = 4096};
		if (ioctl(uffd, UFFDIO_COPY, &copy))
			die("UFFDIO_COPY");
	}
	return 0;
}

static int touch(const char *host, int port, size_t count)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
	int one = 1;
	inet_pton(AF_INET, host, &to.sin_addr);
	sock = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(sock, (void *)&to, sizeof to))
		die("connect");
	setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	mem = mmap(0, count * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(mem, count * 4096, MADV_NOHUGEPAGE);
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC | (spin ? O_NONBLOCK : 0));
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register reg = {{(uintptr_t)mem, count * 4096}, UFFDIO_REGISTER_MODE_MISSING, 0};
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("userfaultfd");
	pthread_t thread;
	pthread_create(&thread, 0, pager, 0);
	size_t stride = count * 5 / 8 | 1;
	while (stride % 3 == 0 || stride % 5 == 0 || stride % 7 == 0)
		stride += 2;
	float *took = calloc(count, sizeof *took);
	for (size_t i = 0, at = 0; i < count; i++, at = (at + stride) % count) {
		int64_t from = now_ns();
		uint64_t v = *(volatile uint64_t *)(mem + at * 4096);
		took[i] = (now_ns() - from) / 1e3;
		if (v != (at + 1) * GOLDEN)
			return fprintf(stderr, "floor: page %zu is wrong\n", at), 3;
		for (int64_t until = now_ns() + 50000; now_ns() < until;)
			;
	}
	for (size_t i = 0; i < count; i++)
		printf("%.2f\n", took[i]);
	return 0;
}

int main(int argc, char **argv)
{
	spin = argc > 1 && !strcmp(argv[argc - 1], "spin");
	argc -= spin;
	if (argc == 4 && !strcmp(argv[1], "serve"))
		return serve(atoi(argv[2]), strtoul(argv[3], 0, 10) * 256);
	if (argc == 5 && !strcmp(argv[1], "touch"))
		return touch(argv[2], atoi(argv[3]), strtoul(argv[4], 0, 10));
	return fprintf(stderr, "usage: floor serve PORT MB [spin] | floor touch HOST PORT COUNT [spin]\n"), 2;
}
