//! journal-store.
