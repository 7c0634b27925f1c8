/* talk serve ADDRESS PORT | talk ask ADDRESS PORT STOPFILE: numbers over one TCP connection, each answered by its double.
 * The one that asks says "answers N" about every 20 answers, and "ok N" when STOPFILE exists; the one that serves says
 * "ready", and "served N" when the connection ends. The first number that is wrong, or missing, is said, and exits 1. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static int fail(const char *what, long at)
{
	fprintf(stderr, "%s at %ld: ", what, at);
	perror("");
	return 1;
}

int main(int argc, char **argv)
{
	if (argc < 4)
		return 2;
	setvbuf(stdout, 0, _IOLBF, 0);
	int serve = !strcmp(argv[1], "serve"), on = 1, s = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[3]))};
	inet_pton(AF_INET, argv[2], &at.sin_addr);
	if (serve) {
		setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
		if (bind(s, (void *)&at, sizeof at) || listen(s, 8))
			return fail("listen", 0);
		puts("ready");
		int peer = accept(s, 0, 0);
		FILE *in = fdopen(peer, "r"), *out = fdopen(dup(peer), "w");
		long served = 0, number;
		while (fscanf(in, "%ld", &number) == 1) {
			if (number != ++served)
				return fail("a wrong number", served);
			if (fprintf(out, "%ld\n", 2 * number) < 0 || fflush(out))
				return fail("answer", served);
		}
		if (ferror(in))
			return fail("read", served);
		return printf("served %ld\n", served), 0;
	}
	if (argc < 5)
		return 2;
	if (connect(s, (void *)&at, sizeof at))
		return fail("connect", 0);
	FILE *in = fdopen(s, "r"), *out = fdopen(dup(s), "w");
	long asked = 0, answer;
	while (access(argv[4], F_OK)) {
		if (fprintf(out, "%ld\n", ++asked) < 0 || fflush(out))
			return fail("ask", asked);
		if (fscanf(in, "%ld", &answer) != 1)
			return fail("no answer", asked);
		if (answer != 2 * asked)
			return fail("a wrong answer", asked);
		if (asked % 20 == 0)
			printf("answers %ld\n", asked);
		nanosleep(&(struct timespec){.tv_nsec = 5000000}, 0);
	}
	return printf("ok %ld\n", asked), 0;
}
