/* Make one system call of a process fail, or send it a signal at that call.
 *
 * Preload it with LD_PRELOAD. It counts the calls of one kind that concern paths below a folder:
 *
 *   FAIL_ROOT    the folder
 *   FAIL_KIND    open (for writing), write, sync, rename, remove or mkdir; "any" counts all of them
 *   FAIL_AT      number of the call, from 1; 0 for none, to count only
 *   FAIL_ERRNO   the error that this call returns without doing anything, or
 *   FAIL_SIGNAL  the signal that the process sends itself before this call
 *   FAIL_LOG     a file to which every counted call appends a line
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int calls;

static int number(const char *name) {
    const char *text = getenv(name);
    return text ? atoi(text) : 0;
}

/* Write the absolute form of a path, which may be relative to an open folder. */
static const char *absolute(int folder, const char *path, char *buffer) {
    char link[64];
    if (!path || path[0] == '/') return path;
    if (folder == AT_FDCWD) {
        if (!getcwd(buffer, PATH_MAX)) return NULL;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, buffer, PATH_MAX - 1);
        if (length < 0) return NULL;
        buffer[length] = 0;
    }
    strcat(buffer, "/");
    strncat(buffer, path, PATH_MAX - 1);
    return buffer;
}

static int is_below_root(const char *path) {
    const char *root = getenv("FAIL_ROOT");
    return root && path && strncmp(path, root, strlen(root)) == 0;
}

static void log_call(const char *kind, const char *path) {
    const char *log = getenv("FAIL_LOG");
    char line[PATH_MAX * 2];
    if (!log) return;
    int file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0600);
    int length = snprintf(line, sizeof line, "%s %s\n", kind, path);
    syscall(SYS_write, file, line, length);
    syscall(SYS_close, file);
}

/* Return whether this call must fail; errno is set. */
static int fails_below(const char *kind, int folder, const char *path) {
    const char *wanted = getenv("FAIL_KIND");
    char buffer[PATH_MAX * 2 + 2];
    if (!wanted || (strcmp(wanted, kind) && strcmp(wanted, "any"))) return 0;
    path = absolute(folder, path, buffer);
    if (!is_below_root(path)) return 0;
    int saved = errno, call = atomic_fetch_add(&calls, 1) + 1;
    log_call(kind, path);
    errno = saved;
    if (call != number("FAIL_AT")) return 0;
    if (number("FAIL_SIGNAL")) {
        kill(getpid(), number("FAIL_SIGNAL"));
        return 0;
    }
    errno = number("FAIL_ERRNO");
    return 1;
}

static int fails(const char *kind, const char *path) { return fails_below(kind, AT_FDCWD, path); }

static int fails_at(const char *kind, int file) {
    char link[64], path[PATH_MAX];
    if (!getenv("FAIL_KIND")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(kind, path);
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                            \
    int name(const char *path, int flags, ...) {                              \
        va_list more;                                                         \
        va_start(more, flags);                                                \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                         \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails("open", path)) return -1; \
        return REAL(name)(path, flags, mode);                                 \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                          \
    int name(int folder, const char *path, int flags, ...) {                  \
        va_list more;                                                         \
        va_start(more, flags);                                                \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                         \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails_below("open", folder, path)) \
            return -1;                                                        \
        return REAL(name)(folder, path, flags, mode);                         \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *data, size_t size) {
    return fails_at("write", file) ? -1 : REAL(write)(file, data, size);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    return fails_at("write", file) ? -1 : REAL(writev)(file, parts, count);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    return fails_at("write", file) ? -1 : REAL(pwrite)(file, data, size, offset);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    return fails_at("write", file) ? -1 : REAL(pwrite64)(file, data, size, offset);
}
int fsync(int file) { return fails_at("sync", file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return fails_at("sync", file) ? -1 : REAL(fdatasync)(file); }
int rename(const char *from, const char *to) {
    return fails("rename", to) ? -1 : REAL(rename)(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    return fails_below("rename", b, to) ? -1 : REAL(renameat)(a, from, b, to);
}
int unlink(const char *path) { return fails("remove", path) ? -1 : REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) {
    return fails_below("remove", folder, path) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) { return fails("remove", path) ? -1 : REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) {
    return fails("mkdir", path) ? -1 : REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    return fails_below("mkdir", folder, path) ? -1 : REAL(mkdirat)(folder, path, mode);
}
