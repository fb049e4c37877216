/* Faults of the operating system, made to order: loaded before the C library by LD_PRELOAD, it stands between a program
 * and the system calls named in `hooks` below. What it does is told by rules, one a line, in the variable FAULTS or by
 * `faults_set`; words of a rule are separated by blanks:
 *
 *     calls=write,pwrite   which calls (no such word: all but clock and thread)
 *     path=/out/           only where this is part of the file's path (of the descriptor's, where a call has one)
 *     at=3 / from=3        only the third such call / the third and all after it (neither: all)
 *     errno=28             the call is not made and fails so
 *     short=7              it reads or writes 7 bytes at most
 *     delay=20             it is made after 20 ms
 *     signal=15            the process gets this signal before it
 *     jump=-86400          the clock (CLOCK_REALTIME) tells so many seconds more
 *
 * Of rules that apply, all are followed; of several with an errno, the first. With FAULTS_LOG each call that a rule's
 * calls and path apply to is appended to that file, `NAME PATH` a line. Linux with glibc or musl. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MOST 16

struct rule {
    char calls[256], path[1024];
    int error, signal, jumps;
    long cut, delay, jump, at, from, count;
};
struct outcome {
    int error;
    long cut, jump;
};

static struct rule rules[MOST];
static int many;
static char journal[1024];

static void parse(const char *text) {
    many = 0;
    while (*text && many < MOST) {
        const char *end = strchrnul(text, '\n');
        struct rule made = {.cut = -1};
        while (text < end) {
            size_t length = strcspn(text, " \n");
            char word[1400] = "";
            memcpy(word, text, length < sizeof word ? length : 0);
            char *value = strchr(word, '=');
            if (value) {
                *value++ = 0;
                long number = strtol(value, NULL, 10);
                if (!strcmp(word, "calls")) snprintf(made.calls, sizeof made.calls, ",%.250s,", value);
                else if (!strcmp(word, "path")) snprintf(made.path, sizeof made.path, "%.1000s", value);
                else if (!strcmp(word, "errno")) made.error = number;
                else if (!strcmp(word, "short")) made.cut = number;
                else if (!strcmp(word, "delay")) made.delay = number;
                else if (!strcmp(word, "signal")) made.signal = number;
                else if (!strcmp(word, "jump")) made.jump = number, made.jumps = 1;
                else if (!strcmp(word, "at")) made.at = number;
                else if (!strcmp(word, "from")) made.from = number;
                else abort();
            }
            text += length;
            while (text < end && *text == ' ') text++;
        }
        rules[many++] = made;
        text = *end ? end + 1 : end;
    }
}

EXPORT void faults_set(const char *text, const char *log) {
    snprintf(journal, sizeof journal, "%s", log);
    parse(text);
}

__attribute__((constructor)) static void begin(void) {
    const char *text = getenv("FAULTS"), *log = getenv("FAULTS_LOG");
    faults_set(text ? text : "", log ? log : "");
}

static void note(const char *call, const char *path) {
    char line[4200];
    int length = snprintf(line, sizeof line, "%s %s\n", call, path);
    long fd = syscall(SYS_openat, AT_FDCWD, journal, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd >= 0) {
        syscall(SYS_write, fd, line, length);
        syscall(SYS_close, fd);
    }
}

/* What is to happen to this call; `path` is NULL where it has none. */
static struct outcome consult(const char *call, const char *path) {
    struct outcome out = {.cut = -1};
    char whole[4096], name[64];
    int kept = errno, noted = 0;
    if (!many) return out;
    if (path && path[0] != '/') {
        long got = syscall(SYS_getcwd, whole, sizeof whole - 1);
        size_t used = got > 0 ? strlen(whole) : 0;
        snprintf(whole + used, sizeof whole - used, "/%s", path);
        path = whole;
    }
    snprintf(name, sizeof name, ",%s,", call);
    int apart = !strcmp(call, "clock") || !strcmp(call, "thread");
    for (int i = 0; i < many; i++) {
        struct rule *rule = &rules[i];
        if (rule->calls[0] ? !strstr(rule->calls, name) : apart) continue;
        if (rule->path[0] && !(path && strstr(path, rule->path))) continue;
        if (journal[0] && !noted++) note(call, path ? path : "");
        long count = __atomic_add_fetch(&rule->count, 1, __ATOMIC_SEQ_CST);
        if (rule->at ? count != rule->at : count < rule->from) continue;
        if (rule->delay) {
            struct timespec wait = {rule->delay / 1000, rule->delay % 1000 * 1000000};
            nanosleep(&wait, NULL);
        }
        if (rule->signal) kill(getpid(), rule->signal);
        if (rule->error && !out.error) out.error = rule->error;
        if (rule->cut >= 0) out.cut = rule->cut;
        if (rule->jumps) out.jump += rule->jump;
    }
    errno = kept;
    return out;
}

static struct outcome consult_fd(const char *call, int fd) {
    char place[64], path[4096];
    if (!many) return (struct outcome){.cut = -1};
    snprintf(place, sizeof place, "/proc/self/fd/%d", fd);
    long got = syscall(SYS_readlinkat, AT_FDCWD, place, path, sizeof path - 1);
    path[got > 0 ? got : 0] = 0;
    return consult(call, path);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(out, value) \
    do { if (out.error) { errno = out.error; return value; } } while (0)
#define CUT(out, count) if (out.cut >= 0 && (size_t)out.cut < (size_t)count) count = out.cut

#define OPEN(name) \
    EXPORT int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
        struct outcome out = consult("open", path); FAIL(out, -1); \
        return real(path, flags, mode); \
    }
#define OPENAT(name) \
    EXPORT int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
        struct outcome out = consult("open", path); FAIL(out, -1); \
        return real(folder, path, flags, mode); \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

EXPORT ssize_t read(int fd, void *data, size_t count) {
    REAL(read); struct outcome out = consult_fd("read", fd); FAIL(out, -1); CUT(out, count);
    return real(fd, data, count);
}
EXPORT ssize_t write(int fd, const void *data, size_t count) {
    REAL(write); struct outcome out = consult_fd("write", fd); FAIL(out, -1); CUT(out, count);
    return real(fd, data, count);
}
#define PREAD(name) \
    EXPORT ssize_t name(int fd, void *data, size_t count, off_t place) { \
        REAL(name); struct outcome out = consult_fd("pread", fd); FAIL(out, -1); CUT(out, count); \
        return real(fd, data, count, place); \
    }
#define PWRITE(name) \
    EXPORT ssize_t name(int fd, const void *data, size_t count, off_t place) { \
        REAL(name); struct outcome out = consult_fd("pwrite", fd); FAIL(out, -1); CUT(out, count); \
        return real(fd, data, count, place); \
    }
PREAD(pread) PREAD(pread64) PWRITE(pwrite) PWRITE(pwrite64)

/* Of several buffers a short read fills the first one only, which is short enough. */
static const struct iovec *cut(struct iovec *first, const struct iovec *parts, int *count, long most) {
    if (most < 0 || !*count) return parts;
    *first = parts[0];
    if (first->iov_len > (size_t)most) first->iov_len = most;
    *count = 1;
    return first;
}
#define VECTOR(name, told) \
    EXPORT ssize_t name(int fd, const struct iovec *parts, int count, off_t place) { \
        REAL(name); struct iovec first; struct outcome out = consult_fd(told, fd); FAIL(out, -1); \
        parts = cut(&first, parts, &count, out.cut); \
        return real(fd, parts, count, place); \
    }
#define VECTOR2(name, told) \
    EXPORT ssize_t name(int fd, const struct iovec *parts, int count, off_t place, int flags) { \
        REAL(name); struct iovec first; struct outcome out = consult_fd(told, fd); FAIL(out, -1); \
        parts = cut(&first, parts, &count, out.cut); \
        return real(fd, parts, count, place, flags); \
    }
VECTOR(preadv, "preadv") VECTOR(preadv64, "preadv") VECTOR2(preadv2, "preadv") VECTOR2(preadv64v2, "preadv")
VECTOR(pwritev, "pwritev") VECTOR(pwritev64, "pwritev") VECTOR2(pwritev2, "pwritev") VECTOR2(pwritev64v2, "pwritev")

#define OF_FD(name, told, params, ...) \
    EXPORT int name params { \
        REAL(name); struct outcome out = consult_fd(told, fd); FAIL(out, -1); \
        return real(__VA_ARGS__); \
    }
#define OF_PATH(name, told, params, ...) \
    EXPORT int name params { \
        REAL(name); struct outcome out = consult(told, path); FAIL(out, -1); \
        return real(__VA_ARGS__); \
    }
int flock(int, int);
int fallocate(int, int, off_t, off_t);
int fallocate64(int, int, off_t, off_t);
OF_FD(fsync, "fsync", (int fd), fd)
OF_FD(fdatasync, "fdatasync", (int fd), fd)
OF_FD(ftruncate, "ftruncate", (int fd, off_t size), fd, size)
OF_FD(ftruncate64, "ftruncate", (int fd, off_t size), fd, size)
OF_FD(fallocate, "fallocate", (int fd, int mode, off_t place, off_t size), fd, mode, place, size)
OF_FD(fallocate64, "fallocate", (int fd, int mode, off_t place, off_t size), fd, mode, place, size)
OF_FD(flock, "flock", (int fd, int how), fd, how)
int rename(const char *, const char *);
int mkdir(const char *, mode_t);
OF_PATH(rename, "rename", (const char *path, const char *to), path, to)
OF_PATH(renameat, "rename", (int from, const char *path, int below, const char *to), from, path, below, to)
OF_PATH(mkdir, "mkdir", (const char *path, mode_t mode), path, mode)
OF_PATH(rmdir, "rmdir", (const char *path), path)
OF_PATH(unlink, "unlink", (const char *path), path)
OF_PATH(unlinkat, "unlink", (int folder, const char *path, int flags), folder, path, flags)

/* Fails by its value, not by errno. */
#define RESERVE(name) \
    EXPORT int name(int fd, off_t place, off_t size) { \
        REAL(name); struct outcome out = consult_fd("fallocate", fd); \
        return out.error ? out.error : real(fd, place, size); \
    }
RESERVE(posix_fallocate) RESERVE(posix_fallocate64)

/* The descriptor is closed all the same, as Linux does it. */
EXPORT int close(int fd) {
    REAL(close);
    struct outcome out = consult_fd("close", fd);
    int closed = real(fd);
    FAIL(out, -1);
    return closed;
}

#define MAP(name) \
    EXPORT void *name(void *where, size_t size, int allowed, int flags, int fd, off_t place) { \
        REAL(name); \
        if (fd >= 0) { struct outcome out = consult_fd("mmap", fd); FAIL(out, (void *)-1); } \
        return real(where, size, allowed, flags, fd, place); \
    }
void *mmap(void *, size_t, int, int, int, off_t);
void *mmap64(void *, size_t, int, int, int, off_t);
MAP(mmap) MAP(mmap64)

EXPORT int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int got = real(clock, now);
    if (clock == CLOCK_REALTIME && many) now->tv_sec += consult("clock", NULL).jump;
    return got;
}

EXPORT int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*work)(void *), void *given) {
    REAL(pthread_create);
    struct outcome out = consult("thread", NULL);
    return out.error ? out.error : real(thread, how, work, given);
}
