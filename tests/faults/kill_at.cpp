// Preloaded into the process under test: notes every write, fsync, rename and removal below a
// path, and at one chosen of them kills the process as a power switch would, a write half done.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[4096];
static std::atomic<long> left_to_go{-1};
static int notes = -1;

// below: start of the paths that count. at: the event to die at, from 1; 0 only notes.
extern "C" void kill_at(const char *path, long at, const char *notes_path) {
    std::snprintf(below, sizeof below, "%s", path);
    notes = open(notes_path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    left_to_go = at;
}

static bool counts(const char *path) {
    return notes >= 0 && path && std::strncmp(path, below, std::strlen(below)) == 0;
}

static bool is_last(const char *what, const char *path) {
    char line[5000];
    int size = std::snprintf(line, sizeof line, "%s %s\n", what, path);
    syscall(SYS_write, notes, line, size);
    return left_to_go > 0 && --left_to_go == 0;
}

static void die() { syscall(SYS_kill, getpid(), SIGKILL); }

static bool path_of(int fd, char *path, size_t size) {
    char link[64];
    std::snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t got = readlink(link, path, size - 1);
    path[got < 0 ? 0 : got] = 0;
    return got > 0;
}

template <class F> static F next(F, const char *name) {
    return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

extern "C" ssize_t write(int fd, const void *data, size_t size) {
    static auto real = next(&write, "write");
    char path[4096];
    if (notes >= 0 && fd != notes && path_of(fd, path, sizeof path) && counts(path) &&
        is_last("write", path)) {
        real(fd, data, size / 2);
        die();
    }
    return real(fd, data, size);
}

extern "C" ssize_t writev(int fd, const struct iovec *parts, int count) {
    static auto real = next(&writev, "writev");
    char path[4096];
    if (notes >= 0 && path_of(fd, path, sizeof path) && counts(path) && is_last("write", path)) {
        real(fd, parts, 1);
        die();
    }
    return real(fd, parts, count);
}

extern "C" int fsync(int fd) {
    static auto real = next(&fsync, "fsync");
    char path[4096];
    if (notes >= 0 && path_of(fd, path, sizeof path) && counts(path) && is_last("fsync", path))
        die();
    return real(fd);
}

extern "C" int rename(const char *from, const char *to) noexcept {
    static auto real = next(&rename, "rename");
    if (counts(to) && is_last("rename", to)) die();
    return real(from, to);
}

extern "C" int mkdir(const char *path, mode_t mode) noexcept {
    static auto real = next(&mkdir, "mkdir");
    if (counts(path) && is_last("mkdir", path)) die();
    return real(path, mode);
}

extern "C" int link(const char *from, const char *to) noexcept {
    static auto real = next(&link, "link");
    if (counts(to) && is_last("link", to)) die();
    return real(from, to);
}

extern "C" int unlink(const char *path) noexcept {
    static auto real = next(&unlink, "unlink");
    if (counts(path) && is_last("unlink", path)) die();
    return real(path);
}

extern "C" int unlinkat(int folder, const char *name, int flags) noexcept {
    static auto real = next(&unlinkat, "unlinkat");
    char path[4096];
    if (notes >= 0 && path_of(folder, path, sizeof path)) {
        size_t length = std::strlen(path);
        std::snprintf(path + length, sizeof path - length, "/%s", name);
        if (counts(path) && is_last("unlink", path)) die();
    }
    return real(folder, name, flags);
}
