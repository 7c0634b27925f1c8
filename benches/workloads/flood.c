// flood ADDRESS PORT COUNT: sends so many small datagrams as fast as one processor can, and prints what each took, in
// nanoseconds: on a path of virtual devices the sender's processor does all of the work of the way, too.
// flood sink ADDRESS PORT: takes datagrams and never reads them; prints "ready".
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, PAYLOAD = 18 };

static int bound(const char *address, const char *port, int take)
{
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
  int s = socket(AF_INET, SOCK_DGRAM, 0), least = 1;
  if (inet_pton(AF_INET, address, &to.sin_addr) != 1 || s < 0)
    exit(2);
  setsockopt(s, SOL_SOCKET, SO_RCVBUF, &least, sizeof least);
  if (take ? bind(s, (void *)&to, sizeof to) : connect(s, (void *)&to, sizeof to)) {
    perror(address);
    exit(1);
  }
  return s;
}

int main(int argc, char **argv)
{
  if (argc == 4 && !strcmp(argv[1], "sink")) {
    bound(argv[2], argv[3], 1);
    puts("ready");
    fflush(stdout);
    pause();
  }
  if (argc != 4)
    return 2;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sysconf(_SC_NPROCESSORS_ONLN) - 1, &one);
  sched_setaffinity(0, sizeof one, &one);
  int s = bound(argv[1], argv[2], 0);
  long count = atol(argv[3]), sent = 0;
  char payload[PAYLOAD] = {0};
  struct iovec part = {payload, sizeof payload};
  struct mmsghdr batch[BATCH];
  memset(batch, 0, sizeof batch);
  for (int i = 0; i < BATCH; i++)
    batch[i].msg_hdr.msg_iov = &part, batch[i].msg_hdr.msg_iovlen = 1;
  struct timespec before, after;
  clock_gettime(CLOCK_MONOTONIC, &before);
  while (sent < count) {
    int n = sendmmsg(s, batch, BATCH, 0);
    if (n > 0)
      sent += n;
  }
  clock_gettime(CLOCK_MONOTONIC, &after);
  double ns = (after.tv_sec - before.tv_sec) * 1e9 + (after.tv_nsec - before.tv_nsec);
  printf("%.1f\n", ns / sent);
}
