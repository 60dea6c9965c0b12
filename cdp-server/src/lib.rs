//! cdp-server.
