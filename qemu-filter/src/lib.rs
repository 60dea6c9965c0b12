//! qemu-filter.
