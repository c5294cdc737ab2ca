/*
 * Drives Xen's own libxl_colo_proxy.c as libxl_colo_save.c does, with a checkpoint that takes a given time in place of a real one.
 *
 * usage: peer HOST PORT COUNT MILLISECONDS
 * Makes COUNT checkpoints (0: until killed) that take MILLISECONDS each. Prints one line an event, with CLOCK_MONOTONIC in ns:
 *   setup RESULT TIME                what colo_proxy_setup gave
 *   checkpoint NUMBER BEFORE AFTER   around the sending of COLO_CHECKPOINT; after it the PVM would run
 *   asked RESULT TIME                what colo_proxy_checkpoint gave: 1 asked for, 0 by itself
 */
#include "libxl_osdeps.h"

#include "libxl_internal.h"

#include <signal.h>
#include <sys/wait.h>
#include <time.h>

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* In a child, as libxl does it (ASYNC_CALL): the child holds the socket too. */
static void wait_for_request(libxl__colo_proxy_state *cps)
{
	int status;
	pid_t child = fork();

	if (child < 0)
		exit(3);
	if (!child) {
		int asked = colo_proxy_checkpoint(cps, COLO_PROXY_CHECKPOINT_TIMEOUT);

		printf("asked %d %lld\n", asked, now());
		fflush(stdout);
		_exit(asked < 0);
	}
	if (waitpid(child, &status, 0) != child || status)
		exit(3);
}

int main(int argc, char **argv)
{
	libxl__ao ao = { 1 };
	libxl__colo_proxy_state cps = { .ao = &ao, .is_userspace_proxy = true };
	int count, ms, result;

	if (argc != 5)
		return 2;
	cps.checkpoint_host = argv[1];
	cps.checkpoint_port = argv[2];
	count = atoi(argv[3]);
	ms = atoi(argv[4]);
	setvbuf(stdout, NULL, _IOLBF, 0);
	signal(SIGPIPE, SIG_IGN); /* as xl does */

	result = colo_proxy_setup(&cps);
	printf("setup %d %lld\n", result, now());
	if (result)
		return 1;
	for (int number = 1; !count || number <= count; number++) {
		long long before;

		usleep(ms * 1000);
		before = now();
		colo_proxy_preresume(&cps);
		printf("checkpoint %d %lld %lld\n", number, before, now());
		colo_proxy_postresume(&cps);
		wait_for_request(&cps);
	}
	colo_proxy_teardown(&cps);
	return 0;
}
