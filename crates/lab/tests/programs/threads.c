/* threads STOPFILE: thread-local storage, thread numbers, names, robust and contended mutexes, condition variables,
 * rwlocks and barriers go on as they were; threads start and end in every round. */
#include "check.h"
#include <sched.h>
#include <sys/prctl.h>
#include <sys/rseq.h>

#define WORKERS 6

static pthread_mutex_t plain = PTHREAD_MUTEX_INITIALIZER, recursive, robust, inherit;
static pthread_rwlock_t rw = PTHREAD_RWLOCK_INITIALIZER;
static pthread_cond_t turn_changed = PTHREAD_COND_INITIALIZER;
static pthread_barrier_t barrier;
static long counter, added[WORKERS], shared_a, shared_b, turn;
static _Atomic long lockless, lockless_added;
static __thread long own_number = -1;
static __thread char own_text[300];
static volatile int ending;

static void identity(long me, pid_t tid, pthread_t self, void *robust_list)
{
	char name[16], wanted[16];
	void *head;
	size_t size;
	snprintf(wanted, sizeof wanted, "worker %ld", me);
	SYS(prctl(PR_GET_NAME, name));
	CHECK(!strcmp(name, wanted), "the thread is called %s, not %s", name, wanted);
	EQ("thread-local number", own_number, me);
	for (size_t i = 0; i < sizeof own_text; i++)
		EQ("thread-local text", own_text[i], (char)(me + i));
	EQ("gettid", syscall(SYS_gettid), tid);
	EQ("pthread_self", pthread_self(), self);
	SYS(syscall(SYS_get_robust_list, 0, &head, &size));
	EQ("robust list", (intptr_t)head, (intptr_t)robust_list);
	if (__rseq_size) { /* registered by glibc: the kernel keeps the CPU number up to date */
		struct rseq *r = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
		unsigned before, after, seen;
		do { /* until it was not moved between CPUs in between */
			syscall(SYS_getcpu, &before, 0, 0);
			seen = *(volatile uint32_t *)&r->cpu_id;
			syscall(SYS_getcpu, &after, 0, 0);
		} while (before != after);
		EQ("rseq's CPU number", seen, after);
	}
}

static void *worker(void *arg)
{
	long me = (long)arg;
	char name[16];
	void *robust_list;
	size_t size;
	own_number = me;
	for (size_t i = 0; i < sizeof own_text; i++)
		own_text[i] = me + i;
	snprintf(name, sizeof name, "worker %ld", me);
	prctl(PR_SET_NAME, name);
	pid_t tid = syscall(SYS_gettid);
	pthread_t self = pthread_self();
	SYS(syscall(SYS_get_robust_list, 0, &robust_list, &size));
	while (!ending) {
		for (int i = 0; i < 200; i++) {
			pthread_mutex_lock(&plain), counter++, pthread_mutex_unlock(&plain);
			pthread_mutex_lock(&inherit), counter++, pthread_mutex_unlock(&inherit);
			pthread_mutex_lock(&plain), counter--, pthread_mutex_unlock(&plain);
			pthread_mutex_lock(&recursive), pthread_mutex_lock(&recursive);
			added[me]++;
			pthread_mutex_unlock(&recursive), pthread_mutex_unlock(&recursive);
			lockless++;
		}
		__atomic_fetch_add(&lockless_added, 200, __ATOMIC_SEQ_CST);
		pthread_rwlock_rdlock(&rw);
		long a = shared_a;
		sched_yield();
		EQ("what a writer wrote", shared_b, a);
		pthread_rwlock_unlock(&rw);
		pthread_rwlock_wrlock(&rw), shared_a++, sched_yield(), shared_b++, pthread_rwlock_unlock(&rw);
		pthread_mutex_lock(&plain); /* take turns round the ring: a lost wake stops the ring */
		while (turn % WORKERS != me && !ending)
			pthread_cond_wait(&turn_changed, &plain);
		if (!ending)
			turn++;
		pthread_cond_broadcast(&turn_changed);
		pthread_mutex_unlock(&plain);
		identity(me, tid, self, robust_list);
	}
	pthread_barrier_wait(&barrier);
	return (void *)(me * 3);
}

static volatile int held;
static void *dies_with_lock(void *arg)
{
	(void)arg;
	pthread_mutex_lock(&robust);
	held = 1;
	dwell_ms(12); /* be moved while it is held */
	return 0;
}

/* The owner of a robust mutex ends without letting go: the next one is told. */
static void owner_death(void)
{
	pthread_t thread;
	held = 0;
	CHECK(!pthread_create(&thread, 0, dies_with_lock, 0), "pthread_create");
	while (!held)
		usleep(100);
	int r = pthread_mutex_lock(&robust);
	EQ("lock of a dead owner's mutex", r, EOWNERDEAD);
	pthread_mutex_consistent(&robust);
	pthread_mutex_unlock(&robust);
	pthread_join(thread, 0);
}

static void *brief(void *arg)
{
	own_number = (long)arg;
	return (void *)own_number;
}

int main(int argc, char **argv)
{
	start(argc, argv);
	pthread_mutexattr_t attr;
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&robust, &attr);
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_RECURSIVE);
	pthread_mutex_init(&recursive, &attr);
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setprotocol(&attr, PTHREAD_PRIO_INHERIT); /* the kernel knows its owner by TID */
	pthread_mutex_init(&inherit, &attr);
	pthread_barrier_init(&barrier, 0, WORKERS + 1);
	own_number = 4711;
	pthread_t threads[WORKERS];
	for (long i = 0; i < WORKERS; i++)
		CHECK(!pthread_create(&threads[i], 0, worker, (void *)i), "pthread_create");
	pid_t pid = getpid();
	ready();
	do {
		long before = turn;
		owner_death();
		for (long i = 0; i < 4; i++) {
			pthread_t t;
			void *result;
			CHECK(!pthread_create(&t, 0, brief, (void *)i), "pthread_create");
			pthread_join(t, &result);
			EQ("what a brief thread returned", (long)result, i);
		}
		int64_t since = now_ns(CLOCK_MONOTONIC);
		while (__atomic_load_n(&turn, __ATOMIC_RELAXED) == before) {
			CHECK(now_ns(CLOCK_MONOTONIC) - since < 20000000000ll, "the ring of threads stopped at %ld: a wake was lost", turn);
			usleep(300);
		}
		EQ("getpid", getpid(), pid);
		EQ("gettid of the leader", syscall(SYS_gettid), pid);
		EQ("the leader's thread-local number", own_number, 4711);
	} while (next_round());
	pthread_mutex_lock(&plain), ending = 1, pthread_cond_broadcast(&turn_changed), pthread_mutex_unlock(&plain);
	pthread_barrier_wait(&barrier);
	long sum = 0;
	for (long i = 0; i < WORKERS; i++) {
		void *result;
		pthread_join(threads[i], &result);
		EQ("a worker's result", (long)result, i * 3);
		sum += added[i];
	}
	EQ("lock-free counter", lockless, sum);
	EQ("its batches", lockless_added, sum);
	EQ("two halves of what writers wrote", shared_a, shared_b);
	return finish();
}
