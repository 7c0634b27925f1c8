/* crowd vmas|threads N LOG [SECONDS]: a program of N mappings (every other one read-only, so that none merge), or of N
 * threads (one in eight at work now and then, the others blocked). Writes "ready PID", then "beat UNIX_MS" every 20 ms
 * after it has checked all mappings, or heard from the threads at work. */
#include "meter.h"
#include <pthread.h>

static int count;
static volatile uint64_t beats[8192];
static pthread_mutex_t never = PTHREAD_MUTEX_INITIALIZER;

static void *thread(void *arg)
{
	long me = (long)arg;
	if (me % 8)
		pthread_mutex_lock(&never);
	for (;; usleep(5000))
		beats[me]++;
	return 0;
}

int main(int argc, char **argv)
{
	int vmas = argc > 3 && !strcmp(argv[1], "vmas");
	if (argc < 4 || (!vmas && strcmp(argv[1], "threads")) || (count = atoi(argv[2])) < 1 || count > 8192)
		return fprintf(stderr, "usage: crowd vmas|threads N LOG [SECONDS] (N up to 8192)\n"), 2;
	char *mem = vmas ? (char *)filled((count * 4 + 255) / 256) : 0;
	if (vmas)
		for (int i = 0; i < count; i += 2)
			if (mprotect(mem + i * 4 * 4096, 4 * 4096, PROT_READ))
				return perror("mprotect"), 1;
	pthread_attr_t attr;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 64 << 10);
	pthread_mutex_lock(&never);
	for (long i = 0; !vmas && i < count - 1; i++) {
		pthread_t t;
		if (pthread_create(&t, &attr, thread, (void *)i))
			return fprintf(stderr, "crowd: no thread %ld\n", i), 1;
	}
	FILE *log = open_log(argv[3]);
	int64_t end = now_ns() + (int64_t)(1e9 * seconds_from(argc, argv, 4));
	fprintf(log, "ready %d\n", getpid());
	while (now_ns() < end) {
		usleep(20000);
		for (size_t p = 0; vmas && p < (size_t)count * 4; p++)
			if (*(uint64_t *)(mem + p * 4096) != (p + 1) * GOLDEN)
				return fprintf(log, "corrupt %zu\n", p), 3;
		for (int i = 0; !vmas && i < count - 1; i += 8) {
			uint64_t was = beats[i];
			for (int64_t until = now_ns() + 10000000000ll; beats[i] == was;) {
				if (now_ns() > until)
					return fprintf(log, "corrupt: thread %d stands still\n", i), 3;
				usleep(1000);
			}
		}
		fprintf(log, "beat %.3f\n", unix_ms());
	}
	return 0;
}
