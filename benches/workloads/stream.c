/* stream receive PORT | stream send HOST PORT MB: one raw TCP stream, the floor of a drain. The sender prints
 * "MIB_PER_SECOND", timed from its first byte to the receiver's word that it has the last. */
#include "meter.h"
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#define BLOCK (1 << 20)

static int die(const char *what) { return perror(what), 1; }

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET};
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	static char block[BLOCK];
	if (argc == 3 && !strcmp(argv[1], "receive")) {
		to.sin_port = htons(atoi(argv[2]));
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
		if (bind(fd, (void *)&to, sizeof to) || listen(fd, 1))
			return die("bind");
		puts("listening"), fflush(stdout);
		int from = accept(fd, 0, 0);
		uint64_t wanted, got = 0;
		if (recv(from, &wanted, 8, MSG_WAITALL) != 8)
			return die("recv");
		while (got < wanted) {
			ssize_t n = recv(from, block, BLOCK, 0);
			if (n <= 0)
				return die("recv");
			got += n;
		}
		return send(from, "!", 1, 0) != 1;
	}
	if (argc == 5 && !strcmp(argv[1], "send")) {
		uint64_t bytes = strtoull(argv[4], 0, 10) << 20;
		char answer;
		to.sin_port = htons(atoi(argv[3]));
		inet_pton(AF_INET, argv[2], &to.sin_addr);
		const char *mem = (const char *)filled(bytes >> 20);
		if (connect(fd, (void *)&to, sizeof to))
			return die("connect");
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		int64_t from = now_ns();
		if (send(fd, &bytes, 8, 0) != 8)
			return die("send");
		for (uint64_t done = 0; done < bytes;) {
			ssize_t n = send(fd, mem + done, bytes - done < BLOCK ? bytes - done : BLOCK, 0);
			if (n <= 0)
				return die("send");
			done += n;
		}
		if (recv(fd, &answer, 1, 0) != 1)
			return die("recv");
		printf("%.1f\n", (bytes >> 20) / ((now_ns() - from) / 1e9));
		return 0;
	}
	return fprintf(stderr, "usage: stream receive PORT | stream send HOST PORT MB\n"), 2;
}
