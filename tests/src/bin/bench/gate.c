/*
 * Holds `qemu-img bench` just before its first request and just after its last one, and measures it between the two.
 *
 * It is loaded before the program's own libraries and stands in for `gettimeofday`, which the benchmark calls at these
 * two places and nowhere else. (glib calls it too: only calls of the program itself count.) While it holds, QEMU's main
 * loop turns, so that everything works that capture needs. It goes on when a file appears: the first time that in the
 * variable GATE_BEGIN, the second time that in GATE_END.
 *
 * Where GATE_RUN_US and GATE_PAUSE_US say so, it pauses the program for so many microseconds whenever it has run for so many: load
 * in bursts. The pauses do not count.
 *
 * It also makes a throttle group without limits, `none`: the benchmark cannot make objects.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* QEMU's own functions. Programs that are no QEMU, as `taskset`, have none of them. */
__attribute__((weak)) void register_module_init(void (*init)(void), unsigned type);
__attribute__((weak)) void user_creatable_process_cmdline(const char *object);
__attribute__((weak)) void main_loop_wait(int nonblocking);
__attribute__((weak)) void qemu_notify_event(void);

/* MODULE_INIT_BLOCK, in every release. */
enum { INIT_BLOCK = 1 };

static atomic_bool opened;

static int64_t nanoseconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void *wait_for_file(void *path)
{
    while (access(path, F_OK) != 0) {
        usleep(1000);
    }
    atomic_store(&opened, true);
    qemu_notify_event();
    return NULL;
}

/* Turns the main loop until the file is there. */
static void hold(const char *variable)
{
    char *path = getenv(variable);
    pthread_t thread;
    atomic_store(&opened, false);
    if (!path || pthread_create(&thread, NULL, wait_for_file, path) != 0) {
        abort();
    }
    while (!atomic_load(&opened)) {
        main_loop_wait(false);
    }
    pthread_join(thread, NULL);
}

static struct itimerspec run;
static struct timespec pause_of;
static timer_t timer;
static volatile int64_t paused;

static void pause_here(int signal)
{
    int64_t began = nanoseconds(CLOCK_MONOTONIC);
    (void)signal;
    nanosleep(&pause_of, NULL);
    timer_settime(timer, 0, &run, NULL);
    paused += nanoseconds(CLOCK_MONOTONIC) - began;
}

static int64_t from_environment(const char *variable)
{
    const char *text = getenv(variable);
    return text ? 1000 * atoll(text) : 0;
}

/* A timer that interrupts this thread, which is the one that runs the benchmark. */
static void begin_to_pause(void)
{
    struct sigaction action = {.sa_handler = pause_here, .sa_flags = SA_RESTART};
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 5};
    int64_t nanoseconds_run = from_environment("GATE_RUN_US"), nanoseconds_pause = from_environment("GATE_PAUSE_US");
    if (!nanoseconds_run || !nanoseconds_pause) {
        return;
    }
    run.it_value = (struct timespec){nanoseconds_run / 1000000000, nanoseconds_run % 1000000000};
    pause_of = (struct timespec){nanoseconds_pause / 1000000000, nanoseconds_pause % 1000000000};
    event._sigev_un._tid = gettid();
    if (sigaction(event.sigev_signo, &action, NULL) != 0 || timer_create(CLOCK_MONOTONIC, &event, &timer) != 0
        || timer_settime(timer, 0, &run, NULL) != 0) {
        abort();
    }
}

static void end_pauses(void)
{
    struct itimerspec never = {0};
    if (run.it_value.tv_sec || run.it_value.tv_nsec) {
        signal(SIGRTMIN + 5, SIG_IGN);
        timer_settime(timer, 0, &never, NULL);
    }
}

static void stop_here(void)
{
    static int64_t began, wall, cpu;
    static int stops;
    stops++;
    if (stops == 1) {
        dprintf(STDOUT_FILENO, "ready gate=begin\n");
        hold("GATE_BEGIN");
        began = nanoseconds(CLOCK_REALTIME);
        cpu = nanoseconds(CLOCK_PROCESS_CPUTIME_ID);
        wall = nanoseconds(CLOCK_MONOTONIC);
        begin_to_pause();
    } else if (stops == 2) {
        end_pauses();
        wall = nanoseconds(CLOCK_MONOTONIC) - wall;
        cpu = nanoseconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
        dprintf(STDOUT_FILENO, "done %lld %lld %lld %lld\n", (long long)began, (long long)wall, (long long)paused,
                (long long)cpu);
        hold("GATE_END");
    }
}

static bool same_object(void *one, void *other)
{
    Dl_info a, b;
    return dladdr(one, &a) && dladdr(other, &b) && a.dli_fbase == b.dli_fbase;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone)
{
    int64_t now;
    (void)zone;
    if (main_loop_wait && same_object(__builtin_return_address(0), main_loop_wait)) {
        stop_here();
    }
    now = nanoseconds(CLOCK_REALTIME);
    time->tv_sec = now / 1000000000;
    time->tv_usec = now % 1000000000 / 1000;
    return 0;
}

static void make_throttle_group(void)
{
    user_creatable_process_cmdline("throttle-group,id=none");
}

__attribute__((constructor)) static void when_loaded(void)
{
    if (register_module_init) {
        register_module_init(make_throttle_group, INIT_BLOCK);
    }
}
