//! capture-ring.
