//! cdp-api.
