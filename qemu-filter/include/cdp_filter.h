/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * qemu-cdp: continuous data protection of a block device that is not QEMU's.
 *
 * Open the disk once. For every request: begin it, issue to the disk what begin says, end it with the disk's
 * answer, then tell the guest. Without an agent, or while the disk is not protected, begin only hands back the
 * caller's own buffers. No failure of the capture makes a request fail: begin refuses wrong arguments, nothing else.
 *
 *     struct cdp_request request;
 *     const struct iovec *out;
 *     int count;
 *     cdp_write_begin(capture, offset, iov, iovcnt, 0, &request, &out, &count);
 *     ssize_t done = pwritev(fd, out, count, offset);
 *     cdp_end(capture, &request, done == expected ? 0 : -EIO);
 *
 * Requests that overlap while in flight are serialised: a thread must not begin one while it holds an overlapping one
 * that only it can end, unless it passes CDP_NONBLOCK.
 *
 * A function that can fail answers 0 or a negative errno; cdp_last_error() says why, in words.
 * Generated from src/ffi by tests/header.rs (CDP_BLESS=1); do not edit.
 */

#ifndef CDP_FILTER_H
#define CDP_FILTER_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

// Version of this interface. A library of a higher version serves callers of a lower one.
#define CDP_ABI_VERSION 1

// Force unit access: the data must be durable when the request ends. Only recorded; issuing is the caller's.
#define CDP_FUA 1

// Answer `-EAGAIN` instead of blocking when an overlapping request is in flight.
#define CDP_NONBLOCK 2

// A zero request may unmap its range.
#define CDP_MAY_UNMAP 4

// Largest write of one request, in bytes. Split longer ones and begin and end the parts one after another.
#define CDP_MAX_WRITE_BYTES 4194304

// Nothing is recorded: the agent has not switched protection on, or a fault has ended it.
#define CDP_MODE_OFF 0

// The ring was full: writes are only noted, and read back when there is room.
#define CDP_MODE_TRACKING 1

// Writes are recorded.
#define CDP_MODE_CAPTURING 2

// An opened disk. Any thread may use it.
struct cdp_capture;

// Reads `length` bytes of the disk at `offset` into `buffer`, all or nothing: 0, or a negative errno. Called from
// a thread of the library, while requests of the caller are in flight too.
typedef int (*cdp_pread_fn)(void *opaque, void *buffer, size_t length, uint64_t offset);

// Says what the disk holds from `offset` on: 1 when the first `*known` of the `length` bytes read as zeroes for
// sure, 0 when they may hold data, a negative errno when that cannot be said. `*known` is at least 1.
typedef int (*cdp_block_status_fn)(void *opaque, uint64_t offset, uint64_t length, uint64_t *known);

// What to open. Zero it, set `size` to its size and `version` to CDP_ABI_VERSION, then the rest.
struct cdp_options {
  // `sizeof(struct cdp_options)`.
  size_t size;
  // CDP_ABI_VERSION as the caller was compiled with.
  uint32_t version;
  // 0.
  uint32_t reserved;
  // Where the host's agent listens; NULL for $CDP_AGENT_SOCKET or /run/qemu-cdp/agent.sock.
  const char *socket_path;
  // Name of the VM; NULL for the program's name and process id.
  const char *vm_name;
  // The 16 bytes of the VM's UUID; NULL when it has none.
  const uint8_t *vm_uuid;
  // Name of the device within the VM.
  const char *device;
  // Size of the disk in bytes.
  uint64_t disk_bytes;
  // Reads the disk for the initial sync and resyncs.
  cdp_pread_fn pread;
  // Finds holes; may be NULL: then everything is read.
  cdp_block_status_fn block_status;
  // Handed to the two functions.
  void *opaque;
};

// One request between begin and end. Its memory is the caller's; a begin initialises it.
struct cdp_request {
  // For the library only.
  uint64_t opaque[96];
};

// What a capture is doing. Set `size` before the call.
struct cdp_status {
  // `sizeof(struct cdp_status)`.
  size_t size;
  // CDP_MODE_OFF, CDP_MODE_TRACKING or CDP_MODE_CAPTURING.
  uint32_t mode;
  // 1 while history has a gap: its points are not restorable.
  uint32_t gap_is_open;
  // The last LSN given to a record; 0 before the first.
  uint64_t captured_lsn;
  // Bytes of disk that history does not have yet.
  uint64_t dirty_bytes;
  // Bytes of the ring in use.
  uint64_t ring_used_bytes;
  // Requests between begin and end.
  uint64_t in_flight;
  // Size of the disk in bytes.
  uint64_t disk_bytes;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The version of the interface that the library has: compare with CDP_ABI_VERSION.
uint32_t cdp_abi_version(void);

// The text of this thread's last failed call, in words for an operator. Valid until the thread's next call.
const char *cdp_last_error(void);

// Opens a disk: tells the agent that it exists, and lets the agent switch capture on and off. It returns at once,
// whether or not an agent is there. 0 and a handle in `*out`, or a negative errno.
//
// # Safety
// `options` and `out` are NULL or point to what their types say.
int cdp_open(const struct cdp_options *options,
             struct cdp_capture **out);

// Ends capture in order and frees the handle. Every request has to have ended; `-EBUSY` when one has not. Takes up
// to two seconds.
//
// # Safety
// A handle from `cdp_open`, not closed, and no other thread uses it any more.
int cdp_close(struct cdp_capture *capture);

// Begins a write of the `iovcnt` parts of `iov` at `offset`: copies the data and says in `*out_iov` and
// `*out_iovcnt` what to write to the disk, which is the copy while the disk is captured. That memory is valid until
// the request ends. Blocks while an overlapping request is in flight, and while the ring is full where the disk's
// policy is to wait; or answers `-EAGAIN` with CDP_NONBLOCK. At most
// CDP_MAX_WRITE_BYTES. After 0, `cdp_end` must follow.
//
// # Safety
// The pointers are NULL or what their types say; `iov` has `iovcnt` parts.
int cdp_write_begin(struct cdp_capture *capture,
                    uint64_t offset,
                    const struct iovec *iov,
                    int iovcnt,
                    uint32_t flags,
                    struct cdp_request *request,
                    const struct iovec **out_iov,
                    int *out_iovcnt);

// Begins a request after which `length` bytes at `offset` read as zeroes. Flags: CDP_FUA, CDP_MAY_UNMAP,
// CDP_NONBLOCK. After 0, `cdp_end` must follow.
//
// # Safety
// The pointers are NULL or what their types say.
int cdp_zero_begin(struct cdp_capture *capture,
                   uint64_t offset,
                   uint64_t length,
                   uint32_t flags,
                   struct cdp_request *request);

// Begins a discard of `length` bytes at `offset`. Flags: CDP_NONBLOCK. After 0, `cdp_end` must follow.
//
// # Safety
// The pointers are NULL or what their types say.
int cdp_discard_begin(struct cdp_capture *capture,
                      uint64_t offset,
                      uint64_t length,
                      uint32_t flags,
                      struct cdp_request *request);

// Begins a change of the disk's size to `disk_bytes`. Flags: CDP_NONBLOCK. After 0, `cdp_end` must follow.
//
// # Safety
// The pointers are NULL or what their types say.
int cdp_resize_begin(struct cdp_capture *capture,
                     uint64_t disk_bytes,
                     uint32_t flags,
                     struct cdp_request *request);

// Ends a request with the disk's answer: 0 or more, it is done; `-ENOTSUP`, nothing was changed; another negative
// errno, it failed. Call it before the guest is told. With CDP_FUA and sync mode on it blocks as `cdp_flush` does.
//
// # Safety
// `capture` is NULL or the handle that the request began with, `request` NULL or a request that has begun.
int cdp_end(struct cdp_capture *capture,
            struct cdp_request *request,
            int result);

// Marks the beginning of a guest's flush: everything that the guest saw end before has a smaller LSN. With sync mode on
// it blocks until all that is durable at the server, or the policy's time is over.
//
// # Safety
// NULL or a live handle.
int cdp_flush(struct cdp_capture *capture);

// Says what the capture is doing. An older caller's shorter structure is filled as far as it goes.
//
// # Safety
// `capture` is NULL or a live handle, `status` NULL or a structure whose size is set.
int cdp_status(struct cdp_capture *capture, struct cdp_status *status);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* CDP_FILTER_H */
