// pingpong ADDRESS PORT COUNT: one byte to and fro over TCP so many times; prints the median and the 99th percentile in
// microseconds. pingpong serve ADDRESS PORT: its other end, for as many as come; prints "ready".
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
  if (argc != 4)
    return 2;
  int serve = !strcmp(argv[1], "serve"), on = 1, s = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[serve ? 3 : 2]))};
  inet_pton(AF_INET, argv[serve ? 2 : 1], &to.sin_addr);
  char byte = 'x';
  if (serve) {
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(s, (void *)&to, sizeof to) || listen(s, 8)) {
      perror("serve");
      return 1;
    }
    puts("ready");
    fflush(stdout);
    for (;;) {
      int c = accept(s, 0, 0);
      setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      while (read(c, &byte, 1) == 1 && write(c, &byte, 1) == 1)
        ;
      close(c);
    }
  }
  long count = atol(argv[3]);
  double *took = malloc(count * sizeof *took);
  if (connect(s, (void *)&to, sizeof to)) {
    perror(argv[1]);
    return 1;
  }
  setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  for (long i = 0; i < count; i++) {
    double began = now();
    if (write(s, &byte, 1) != 1 || read(s, &byte, 1) != 1)
      return 1;
    took[i] = now() - began;
  }
  qsort(took, count, sizeof *took, compare);
  printf("%.2f %.2f\n", took[count / 2], took[count * 99 / 100]);
}
