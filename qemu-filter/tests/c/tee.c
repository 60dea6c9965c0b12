/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * A block device of its own: threads write to a file and tee every request through cdp_filter.h.
 * usage: tee SOCKET IMAGE THREADS REQUESTS
 * Prints "done" when all requests have ended, and closes when it reads a line.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cdp_filter.h"

#define CHECK(what)                                                                      \
    do {                                                                                 \
        if (!(what)) {                                                                   \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #what, cdp_last_error()); \
            exit(1);                                                                     \
        }                                                                                \
    } while (0)

static int image;
static uint64_t disk_bytes;
static int requests;
static struct cdp_capture *capture;

static int read_image(void *opaque, void *buffer, size_t length, uint64_t offset)
{
    CHECK(opaque == &image);
    ssize_t done = pread(image, buffer, length, (off_t)offset);
    return done == (ssize_t)length ? 0 : -EIO;
}

static int image_status(void *opaque, uint64_t offset, uint64_t length, uint64_t *known)
{
    CHECK(opaque == &image);
    off_t data = lseek(image, (off_t)offset, SEEK_DATA);
    if (data < 0 && errno == ENXIO) {
        *known = length;
        return 1;
    }
    if (data < 0) {
        return -errno;
    }
    if ((uint64_t)data > offset) {
        *known = (uint64_t)data - offset;
        return 1;
    }
    off_t hole = lseek(image, (off_t)offset, SEEK_HOLE);
    *known = hole > (off_t)offset ? (uint64_t)(hole - (off_t)offset) : length;
    return 0;
}

static void write_once(unsigned *seed, unsigned char *buffer, uint64_t offset, size_t length, uint32_t flags)
{
    for (size_t i = 0; i < length; i++) {
        buffer[i] = (unsigned char)rand_r(seed);
    }
    size_t cut = (size_t)rand_r(seed) % (length + 1);
    struct iovec parts[2] = {{buffer, cut}, {buffer + cut, length - cut}};
    struct cdp_request request;
    const struct iovec *out;
    int count;
    CHECK(cdp_write_begin(capture, offset, parts, 2, flags, &request, &out, &count) == 0);
    if (out != parts) {
        /* A guest that changes its buffer in flight: what is recorded is what is on the disk all the same. */
        memset(buffer, 0xaa, length);
    }
    ssize_t done = pwritev(image, out, count, (off_t)offset);
    CHECK(cdp_end(capture, &request, done == (ssize_t)length ? 0 : -EIO) == 0);
}

static void zero_once(uint64_t offset, uint64_t length, bool discard)
{
    struct cdp_request request;
    int result = discard ? cdp_discard_begin(capture, offset, length, 0, &request)
                         : cdp_zero_begin(capture, offset, length, CDP_MAY_UNMAP, &request);
    CHECK(result == 0);
    result = fallocate(image, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
    CHECK(cdp_end(capture, &request, result == 0 ? 0 : -errno) == 0);
}

static void *guest(void *argument)
{
    unsigned seed = (unsigned)(uintptr_t)argument;
    unsigned char *buffer = malloc(256 << 10);
    CHECK(buffer);
    for (int i = 0; i < requests; i++) {
        uint64_t sectors = disk_bytes / 512;
        uint64_t first = (uint64_t)rand_r(&seed) % (i % 2 ? sectors : 128);
        uint64_t length = 1 + (uint64_t)rand_r(&seed) % (i % 16 ? 64 : 512);
        length = length < sectors - first ? length : sectors - first;
        switch (rand_r(&seed) % 8) {
        case 0:
            zero_once(first * 512, length * 512, false);
            break;
        case 1:
            zero_once(first * 512, length * 512, true);
            break;
        case 2:
            CHECK(cdp_flush(capture) == 0);
            break;
        default:
            write_once(&seed, buffer, first * 512, length * 512, i % 4 ? 0 : CDP_FUA);
        }
    }
    free(buffer);
    return NULL;
}

/* What a caller may get wrong is refused with a text and breaks nothing. */
static void misuse(void)
{
    struct cdp_request request = {{0}}, second;
    struct iovec part = {&request, CDP_MAX_WRITE_BYTES + 1};
    const struct iovec *out;
    int count;
    CHECK(cdp_write_begin(capture, 0, &part, 1, 0, &request, &out, &count) == -EINVAL);
    CHECK(strstr(cdp_last_error(), "split"));
    part.iov_len = 1;
    CHECK(cdp_write_begin(NULL, 0, &part, 1, 0, &request, &out, &count) == -EINVAL);
    CHECK(cdp_write_begin(capture, 0, NULL, 1, 0, &request, &out, &count) == -EINVAL);
    CHECK(cdp_write_begin(capture, 0, &part, -1, 0, &request, &out, &count) == -EINVAL);
    CHECK(cdp_write_begin(capture, 0, &part, 1, 64, &request, &out, &count) == -EINVAL);
    CHECK(cdp_write_begin(capture, 1ull << 40, &part, 1, 0, &request, &out, &count) == -EINVAL);
    CHECK(cdp_zero_begin(capture, ~0ull - 10, 4096, 0, &request) == -EINVAL);
    CHECK(cdp_discard_begin(capture, ~0ull, 1, 0, &request) == -EINVAL);
    CHECK(cdp_resize_begin(capture, ~0ull, 0, &request) == -EINVAL);
    CHECK(cdp_write_begin(capture, 0, &part, 1, 0, NULL, &out, &count) == -EINVAL);
    CHECK(cdp_write_begin(capture, 0, &part, 1, 0, &request, NULL, &count) == -EINVAL);
    CHECK(cdp_end(capture, NULL, 0) == -EINVAL);
    CHECK(cdp_end(capture, &request, 0) == -EINVAL);
    CHECK(cdp_open(NULL, NULL) == -EINVAL);
    CHECK(cdp_status(capture, NULL) == -EINVAL);
    CHECK(cdp_close(NULL) == -EINVAL);

    /* Overlap without blocking; a request that is refused holds nothing. */
    CHECK(cdp_zero_begin(capture, 4096, 4096, 0, &request) == 0);
    CHECK(cdp_discard_begin(capture, 0, 8192, CDP_NONBLOCK, &second) == -EAGAIN);
    CHECK(cdp_close(capture) == -EBUSY);
    CHECK(cdp_end(capture, &request, -ENOTSUP) == 0);
    CHECK(cdp_end(capture, &request, 0) == -EINVAL);
    CHECK(cdp_discard_begin(capture, 0, 8192, CDP_NONBLOCK, &second) == 0);
    CHECK(cdp_end(capture, &second, -ENOTSUP) == 0);
}

static struct cdp_status status(void)
{
    struct cdp_status now = {.size = sizeof now};
    CHECK(cdp_status(capture, &now) == 0);
    CHECK(now.size == sizeof now);
    return now;
}

static void grow(uint64_t to)
{
    struct cdp_request request;
    CHECK(cdp_resize_begin(capture, to, 0, &request) == 0);
    int result = ftruncate(image, (off_t)to);
    CHECK(cdp_end(capture, &request, result == 0 ? 0 : -errno) == 0);
    CHECK(status().disk_bytes == to);
}

int main(int argc, char **argv)
{
    assert(argc == 5);
    image = open(argv[2], O_RDWR | O_CLOEXEC);
    struct stat file;
    assert(image >= 0 && fstat(image, &file) == 0);
    disk_bytes = (uint64_t)file.st_size;
    int threads = atoi(argv[3]);
    requests = atoi(argv[4]);

    const uint8_t uuid[16] = {1, 2, 3};
    struct cdp_options options = {
        .size = sizeof options,
        .version = CDP_ABI_VERSION,
        .socket_path = argv[1],
        .vm_name = "tee",
        .vm_uuid = uuid,
        .device = "disk0",
        .disk_bytes = disk_bytes,
        .pread = read_image,
        .block_status = image_status,
        .opaque = &image,
    };
    CHECK(cdp_abi_version() >= CDP_ABI_VERSION);
    options.size = 8;
    CHECK(cdp_open(&options, &capture) == -EINVAL);
    options.size = sizeof options;
    options.device = NULL;
    CHECK(cdp_open(&options, &capture) == -EINVAL);
    options.device = "disk0";
    CHECK(cdp_open(&options, &capture) == 0);

    /* The guests run while the agent attaches: every write is either recorded or read back. */
    pthread_t guests[16];
    assert(threads <= 16);
    for (int i = 0; i < threads; i++) {
        assert(pthread_create(&guests[i], NULL, guest, (void *)(uintptr_t)(i + 1)) == 0);
    }
    for (int i = 0; i < 20000 && status().mode != CDP_MODE_CAPTURING; i++) {
        usleep(1000);
    }
    CHECK(status().mode == CDP_MODE_CAPTURING);
    for (int i = 0; i < threads; i++) {
        assert(pthread_join(guests[i], NULL) == 0);
    }
    misuse();
    grow(disk_bytes + (1 << 20));
    guest((void *)(uintptr_t)99);
    CHECK(cdp_flush(capture) == 0);
    CHECK(status().in_flight == 0 && status().captured_lsn > 0);
    puts("done");
    fflush(stdout);
    getchar();
    CHECK(cdp_close(capture) == 0);
    puts("closed");
    return 0;
}
