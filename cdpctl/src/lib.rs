//! cdpctl.
